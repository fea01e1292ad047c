//go:build e2e

package cluster

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"os"
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
// NFS: no request fails, and what changes names while control is away waits for it and is done. Then the gateway is killed: the API, on its
// socket and over HTTPS, goes on answering and changing names, a task waits for the gateway and is done when it is back.
func TestClusterUnits(t *testing.T) {
	data := filepath.Join(t.TempDir(), "data")
	ports := make([]int, 4)
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
	at := func(i int) string { return fmt.Sprintf("127.0.0.1:%d", ports[i]) }
	startControl := func() *harness.Process { return start("control", "--node", at(0), "--https", at(3)) }
	control := startControl()
	startGateway := func() *harness.Process {
		return start("gateway", "--nbd", at(1), "--nfs", at(2), "--log-size", "256MiB")
	}
	gateway := startGateway()
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

	disk, err := nbdclient.Dial("tcp", at(1), "default/d")
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	files, err := nfsclient.Dial(at(2))
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

	names, err := nfsclient.Dial(at(2)) // its calls may wait, those of the other may not
	if err != nil {
		t.Fatal(err)
	}
	defer names.Close()

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
				began := time.Now()
				if err := request(i); err != nil {
					t.Errorf("%s, request %d: %v", what, i, err)
					return
				}
				requests.Add(1)
				for took := int64(time.Since(began)); took > longest.Load(); {
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
		killed := time.Now()
		made := make(chan error, 1)
		go func() {
			_, err := names.Create(root, fmt.Sprintf("while%d.raw", i), true)
			made <- err
		}()
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
			t.Fatalf("create a vDisk by NFS while control is away: %v", err)
		}
		waited = max(waited, time.Since(killed))
	}
	close(stop)
	wg.Wait()
	harness.Show("units: control killed 5 times for a second under %d NBD and NFS writes and reads, none failed, the longest took %s; "+
		"a vDisk created meanwhile was there after %s at most", requests.Load(), time.Duration(longest.Load()).Round(time.Millisecond),
		waited.Round(10*time.Millisecond))

	gateway.Kill()
	client := httpsClient(t, data)
	token, err := os.ReadFile(filepath.Join(data, "admin.token"))
	if err != nil {
		t.Fatal(err)
	}
	get := func(path string) (int, string, error) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+at(3)+path, nil)
		if err != nil {
			return 0, "", err
		}
		req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
		res, err := client.Do(req)
		if err != nil {
			return 0, "", err
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		return res.StatusCode, string(body), err
	}
	ready := func(want int) {
		t.Helper()
		if err := harness.Poll(30*time.Second, func() error {
			status, body, err := get("/readyz")
			if err == nil && status != want {
				err = fmt.Errorf("readyz: %d %s", status, body)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	ready(http.StatusServiceUnavailable)
	answered := 0
	for _, path := range []string{"/", "/metrics", "/api/customer/v1/status", "/api/customer/v1/vdisks", "/api/customer/v1/vpools", "/api/customer/v1/tasks",
		"/api/customer/v1/health", "/api/customer/v1/cluster", "/api/customer/v1/schedules", "/api/customer/v1/events"} {
		status, body, err := get(path)
		if err != nil || status != http.StatusOK {
			t.Errorf("GET %s without a gateway: %d, %v: %.300s", path, status, err, body)
		} else if answered++; path == "/api/customer/v1/vdisks" && !strings.Contains(body, "default/while4") {
			t.Errorf("the list of vDisks without a gateway: %.300s", body)
		}
	}
	for _, args := range [][]string{{"vdisk", "create", "default/alone", "--size", "1MiB"}, {"schedule", "run", "health", "--no-wait"}} {
		if err := cli(args...); err != nil {
			t.Errorf("without a gateway: %v", err)
		} else {
			answered++
		}
	}
	gateway = startGateway()
	ready(http.StatusOK)
	if err := harness.Poll(30*time.Second, func() error {
		status, body, err := get("/api/customer/v1/tasks?state=succeeded")
		if err == nil && (status != http.StatusOK || !strings.Contains(body, `"type":"cluster.health"`)) {
			err = fmt.Errorf("the task that waited for the gateway is not done: %d %.500s", status, body)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"default/alone", "default/d"} {
		again, err := nbdclient.Dial("tcp", at(1), name)
		if err != nil {
			t.Errorf("attach %s after the gateway was killed: %v", name, err)
			continue
		}
		again.Close()
	}
	harness.Show("units: while the gateway was killed the API answered %d of 12 requests, over HTTPS and on its socket, among them a new vDisk and a "+
		"task, which was done when the gateway was back", answered)
}

// httpsClient trusts the appliance's authority.
func httpsClient(t *testing.T, data string) *http.Client {
	t.Helper()
	ca, err := os.ReadFile(filepath.Join(data, "tls", "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		t.Fatal("no authority in ca.crt")
	}
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 20 * time.Second}
}
