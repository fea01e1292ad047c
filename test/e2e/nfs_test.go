//go:build e2e

package e2e

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"varve/test/harness"
	"varve/test/nbdclient"
	"varve/test/nfsclient"
)

// mountNFS opens our own client on the datastore default.
func mountNFS(t testing.TB, n *harness.Node) (*nfsclient.Client, nfsclient.Handle) {
	t.Helper()
	c, err := nfsclient.Dial(n.NFSAddr())
	must(t, err)
	t.Cleanup(c.Close)
	root, err := c.Mount("/default")
	must(t, err)
	return c, root
}

// libnfs's own tools store, list and read back a file. The tools sometimes hang in their unmount: each has a limit.
func TestNFSLibnfsTools(t *testing.T) {
	harness.Need(t, "nfs-ls", "nfs-cp", "nfs-cat")
	n := harness.StartNode(t)
	dir := t.TempDir()
	in, out := filepath.Join(dir, "in"), filepath.Join(dir, "out")
	const size = 20<<20 + 12345
	writeFile(t, in, random(4, size))
	run := func(args ...string) string {
		t.Helper()
		return harness.Qemu(t, 30*time.Second, args[0], args[1:]...)
	}
	run("nfs-cp", in, n.NFS("/file.bin"))
	if list := run("nfs-ls", n.NFS("/")); !strings.Contains(list, "file.bin") || !strings.Contains(list, fmt.Sprint(size)) {
		t.Fatalf("listing:\n%s", list)
	}
	run("nfs-cp", n.NFS("/file.bin"), out)
	sameBytes(t, in, out, size)
	cat, err := exec.Command("timeout", "30", "nfs-cat", n.NFS("/file.bin")).Output()
	must(t, err)
	want, err := os.ReadFile(in)
	must(t, err)
	if sha256.Sum256(cat) != sha256.Sum256(want) {
		t.Fatalf("nfs-cat gives %d other bytes", len(cat))
	}
	harness.Show("libnfs nfs-cp, nfs-ls, nfs-cat: a file of %d bytes goes round trip", size)
}

// libnfs 4.0.0 now and then waits for ever, at a mount, an unmount or between two of its own polls, whatever the server is
// (with every byte that the server sent read from its socket). Such a run is repeated and counted; any other failure is one.
// TestNFSLargePipelined shows with a client of ours that no reply stays away.
func TestNFSFioVerify(t *testing.T) {
	fio := harness.Cache("fio-nfs")
	harness.Need(t, fio)
	n := harness.StartNode(t)
	c, root := mountNFS(t, n)
	for _, job := range [][]string{
		{"4k qd16", "--rw=randwrite", "--bs=4k", "--size=32M", "--iodepth=16", "--fsync=64"},
		{"mixed 512..64k qd8", "--rw=randwrite", "--bsrange=512-64k", "--blockalign=512", "--size=32M", "--iodepth=8"},
		{"1M qd4", "--rw=write", "--bs=1M", "--size=96M", "--iodepth=4"},
	} {
		name := "verify-" + strings.Fields(job[0])[0]
		h, err := c.Create(root, name, true) // the engine makes files for sequential writes only
		must(t, err)
		must(t, c.Truncate(h, 96<<20))
		j, err := fioNFS(fio, append([]string{"--name=" + name, "--ioengine=nfs", "--nfs_url=" + n.NFS("/"),
			"--filename=/" + name, "--verify=crc32c", "--verify_fatal=1", "--do_verify=1"}, job[1:]...)...)
		must(t, err)
		if j.Write.TotalIOs == 0 || j.Read.TotalIOs == 0 {
			t.Fatalf("%s: %d writes, %d verified", job[0], j.Write.TotalIOs, j.Read.TotalIOs)
		}
		harness.Show("fio nfs engine (libnfs) --verify=crc32c %s: %d writes, %d read back, 0 errors", job[0], j.Write.TotalIOs, j.Read.TotalIOs)
	}
}

// fioNFS runs fio over libnfs, and again when libnfs has hung.
func fioNFS(fio string, args ...string) (harness.FioJob, error) {
	for try := 1; ; try++ {
		j, err := harness.Fio(30*time.Second, fio, args...)
		if !errors.Is(err, harness.ErrTimeLimit) || try == 4 {
			return j, err
		}
		harness.Show("libnfs hung in %s: run %d is repeated", args[0], try)
	}
}

// Large transfers many deep on one connection, more than the socket takes at once: each call is answered, with the right bytes.
func TestNFSLargePipelined(t *testing.T) {
	n := harness.StartNode(t)
	c, root := mountNFS(t, n)
	h, err := c.Create(root, "large", true)
	must(t, err)
	const size, blocks, deep, rounds = 1 << 20, 64, 8, 40
	fill := func(p []byte, block, round int) {
		for i := 0; i < len(p); i += 512 {
			binary.LittleEndian.PutUint64(p[i:], uint64(block)<<32|uint64(round))
		}
	}
	ended := make(chan error, 1)
	go func() {
		var lanes sync.WaitGroup
		var mu sync.Mutex
		var failed error
		for lane := range deep {
			lanes.Go(func() {
				p, q := make([]byte, size), make([]byte, size)
				for round := range rounds {
					for block := lane; block < blocks; block += deep {
						fill(p, block, round)
						_, err := c.Write(h, p, int64(block)*size, nfsclient.Unstable)
						if err == nil {
							err = c.Read(h, q, int64(block)*size)
						}
						if err == nil && !bytes.Equal(p, q) {
							err = fmt.Errorf("block %d round %d reads other bytes", block, round)
						}
						if err != nil {
							mu.Lock()
							failed = errors.Join(failed, err)
							mu.Unlock()
							return
						}
					}
				}
			})
		}
		lanes.Wait()
		ended <- failed
	}()
	select {
	case err := <-ended:
		must(t, err)
	case <-time.After(100 * time.Second):
		t.Fatal("a call stays without an answer")
	}
	harness.Show("NFS, %d calls of 1 MiB %d deep on one connection: all answered, right bytes", 2*rounds*blocks, deep)
}

// A .raw file made over NFS is a vDisk: NBD serves the same bytes, and the CLI lists it under its name.
func TestNFSFileIsADisk(t *testing.T) {
	n := harness.StartNode(t)
	c, root := mountNFS(t, n)
	h, err := c.Create(root, "made.raw", true)
	must(t, err)
	must(t, c.Truncate(h, 64<<20))
	p := bytes.Repeat([]byte("varve!"), 4096)[:16384]
	_, err = c.Write(h, p, 1<<20, nfsclient.FileSync)
	must(t, err)
	d := dial(t, n.NBD("made"))
	if d.Size != 64<<20 {
		t.Fatalf("NBD size %d", d.Size)
	}
	got := make([]byte, len(p))
	must(t, d.Do(nbdclient.Read, 0, 1<<20, 0, got))
	if !bytes.Equal(got, p) {
		t.Fatal("NBD reads other bytes than NFS wrote")
	}
	for i := range got {
		got[i] ^= 0xff
	}
	must(t, d.Do(nbdclient.Write, nbdclient.FUA, 1<<20, 0, got))
	must(t, c.Read(h, p, 1<<20))
	if !bytes.Equal(got, p) {
		t.Fatal("NFS reads other bytes than NBD wrote")
	}
	if list := n.MustCLI(t, "vdisk", "list"); !strings.Contains(list, "made") {
		t.Fatalf("vdisk list:\n%s", list)
	}
	d.Close()
	must(t, c.Rename(root, "made.raw", root, "renamed.raw"))
	if d := dial(t, n.NBD("renamed")); d.Size != 64<<20 {
		t.Fatalf("size after the rename: %d", d.Size)
	}
	if _, err := nbdclient.Dial("tcp", n.NBDAddr(), "default/made"); err == nil {
		t.Fatal("the old name is still exported")
	}
	harness.Show("a .raw file made over NFS is a vDisk: same bytes over NBD and NFS, rename renames the export")
}

// Ten thousand names, listed while others are renamed: each name that stays is listed exactly once.
func TestNFSReadDirWhileNamesChange(t *testing.T) {
	n := harness.StartNode(t)
	c, root := mountNFS(t, n)
	dir, err := c.MkDir(root, "many")
	must(t, err)
	const names = 10000
	create := timed(func() {
		errs := make(chan error, names)
		room := make(chan struct{}, 64)
		for i := range names {
			room <- struct{}{}
			go func() {
				_, err := c.Create(dir, fmt.Sprintf("stay-%05d", i), true)
				<-room
				errs <- err
			}()
		}
		for range names {
			must(t, <-errs)
		}
	})
	list := timed(func() {
		all, err := c.Names(dir)
		must(t, err)
		if len(all) != names {
			t.Fatalf("%d names of %d", len(all), names)
		}
	})
	churner, err := nfsclient.Dial(n.NFSAddr())
	must(t, err)
	defer churner.Close()
	stop, churned := make(chan struct{}), make(chan int)
	go func() {
		renames := 0
		defer func() { churned <- renames }()
		if _, err := churner.Create(dir, "move-0", true); err != nil {
			return
		}
		for {
			select {
			case <-stop:
				return
			default:
			}
			if churner.Rename(dir, fmt.Sprintf("move-%d", renames), dir, fmt.Sprintf("move-%d", renames+1)) != nil {
				return
			}
			renames++
		}
	}()
	for range 5 {
		all, err := c.Names(dir)
		must(t, err)
		seen := map[string]int{}
		for _, name := range all {
			seen[name]++
		}
		for i := range names {
			if k := seen[fmt.Sprintf("stay-%05d", i)]; k != 1 {
				t.Fatalf("stay-%05d is listed %d times", i, k)
			}
		}
	}
	close(stop)
	renames := <-churned
	if renames < 10 {
		t.Fatalf("only %d renames went on meanwhile", renames)
	}
	harness.Show("READDIRPLUS of 10,000 names: %.0f ms; each listed once while %d renames went on; creating them took %.1f s",
		list.Seconds()*1000, renames, create.Seconds())
}
