//go:build e2e

package cluster

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"varve/test/harness"
	"varve/test/nbdclient"
	"varve/test/nfsclient"
)

// Control is killed and started again, five times, while clients write and read an open vDisk over NBD and an open file over
// NFS: no request fails, and what changes names while control is away waits for it and is done.
func TestClusterUnits(t *testing.T) {
	data := filepath.Join(t.TempDir(), "data")
	ports := make([]int, 3)
	for i := range ports {
		p, err := harness.FreePort()
		if err != nil {
			t.Fatal(err)
		}
		ports[i] = p
	}
	start := func(args ...string) *harness.Process {
		p, err := harness.Start(harness.Binary(), append(args, "--data", data, "--log-level", "warn")...)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	startControl := func() *harness.Process { return start("control", "--node", fmt.Sprintf("127.0.0.1:%d", ports[0])) }
	control := startControl()
	gateway := start("gateway", "--nbd", fmt.Sprintf("127.0.0.1:%d", ports[1]), "--nfs", fmt.Sprintf("127.0.0.1:%d", ports[2]),
		"--https", "off", "--log-size", "256MiB")
	t.Cleanup(func() {
		gateway.Kill()
		control.Kill()
		if t.Failed() {
			t.Logf("gateway printed:\n%s\ncontrol printed:\n%s", gateway.Log(), control.Log())
		}
	})
	cli := func(args ...string) error {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		out, err := exec.CommandContext(ctx, harness.Binary(), append([]string{"--data", data}, args...)...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
		}
		return nil
	}
	if err := harness.Poll(30*time.Second, func() error { return cli("vdisk", "create", "default/d", "--size", "64MiB") }); err != nil {
		t.Fatal(err)
	}

	disk, err := nbdclient.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", ports[1]), "default/d")
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	files, err := nfsclient.Dial(fmt.Sprintf("127.0.0.1:%d", ports[2]))
	if err != nil {
		t.Fatal(err)
	}
	defer files.Close()
	root, err := files.Mount("/default")
	if err != nil {
		t.Fatal(err)
	}
	file, err := files.Create(root, "open", true)
	if err != nil {
		t.Fatal(err)
	}

	stop := make(chan struct{})
	var wg sync.WaitGroup
	var requests atomic.Int64
	var longest atomic.Int64
	// loop sends one request after the other until the end and remembers the slowest.
	loop := func(what string, request func(i int) error) {
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				at := time.Now()
				if err := request(i); err != nil {
					t.Errorf("%s, request %d: %v", what, i, err)
					return
				}
				requests.Add(1)
				for took := int64(time.Since(at)); took > longest.Load(); {
					longest.Store(took)
				}
			}
		})
	}
	const block = 4096
	loop("NBD", func(i int) error {
		want := bytes.Repeat([]byte{byte(i + 1)}, block)
		off := int64(i%1024) * block
		if err := disk.Do(nbdclient.Write, nbdclient.FUA, off, block, want); err != nil {
			return err
		}
		got := make([]byte, block)
		if err := disk.Do(nbdclient.Read, 0, off, block, got); err != nil {
			return err
		}
		if !bytes.Equal(got, want) {
			return fmt.Errorf("read %x… at %d, wrote %x…", got[:4], off, want[:4])
		}
		return nil
	})
	loop("NFS", func(i int) error {
		want := bytes.Repeat([]byte{byte(i + 1)}, block)
		off := int64(i%1024) * block
		if _, err := files.Write(file, want, off, 2); err != nil {
			return err
		}
		got := make([]byte, block)
		if err := files.Read(file, got, off); err != nil {
			return err
		}
		if !bytes.Equal(got, want) {
			return fmt.Errorf("read %x… at %d, wrote %x…", got[:4], off, want[:4])
		}
		_, err := files.Lookup(root, "open")
		return err
	})
	time.Sleep(500 * time.Millisecond)
	var waited time.Duration
	for i := range 5 {
		control.Kill()
		before := requests.Load()
		at := time.Now()
		made := make(chan error, 1)
		go func() { made <- cli("vdisk", "create", fmt.Sprintf("default/while%d", i), "--size", "1MiB") }()
		time.Sleep(time.Second)
		if requests.Load() == before {
			t.Fatal("no request was answered while control was away")
		}
		select {
		case err := <-made:
			t.Fatalf("a vDisk was made without control: %v", err)
		default:
		}
		control = startControl()
		if err := <-made; err != nil {
			t.Fatal(err)
		}
		waited = max(waited, time.Since(at))
	}
	close(stop)
	wg.Wait()
	harness.Show("units: control killed 5 times for a second under %d NBD and NFS writes and reads, none failed, the longest took %s; "+
		"a vDisk created meanwhile was there after %s at most", requests.Load(), time.Duration(longest.Load()).Round(time.Millisecond),
		waited.Round(10*time.Millisecond))
}
