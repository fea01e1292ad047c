package nfstest_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	vmware "github.com/vmware/go-nfs-client/nfs"
	vmwarerpc "github.com/vmware/go-nfs-client/nfs/rpc"
	willscott "github.com/willscott/go-nfs-client/nfs"
	willscottrpc "github.com/willscott/go-nfs-client/nfs/rpc"

	"varve/gateway/nfs"
	"varve/gateway/nfs/nfstest"
	"varve/gateway/nfs/portmap"
)

// serve runs a server, and a portmapper on port 111 of the same address if withPortmap.
func serve(t *testing.T, host string, withPortmap bool) (ns *nfstest.Namespace, addr string) {
	t.Helper()
	ns = nfstest.New(nfstest.Loopback(7, "/default"))
	server := nfs.New(nfs.Config{Namespace: ns, Verifier: func() [8]byte { return [8]byte{1} }})
	ln, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := server.Run(ctx, ln); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	if withPortmap {
		probe, err := net.Listen("tcp", net.JoinHostPort(host, "111"))
		if errors.Is(err, os.ErrPermission) {
			t.Skip("may not listen on port 111, where these clients look for a portmapper")
		}
		if err != nil {
			t.Fatal(err)
		}
		probe.Close()
		running.Go(func() {
			if err := server.RunPortmap(ctx, net.JoinHostPort(host, "111")); err != nil {
				t.Errorf("RunPortmap: %v", err)
			}
		})
		for end := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
			nc, err := net.Dial("tcp", net.JoinHostPort(host, "111"))
			if err == nil {
				nc.Close()
				break
			}
			if time.Now().After(end) {
				t.Fatal(err)
			}
		}
	}
	return ns, ln.Addr().String()
}

func random(n int) []byte {
	r := rand.NewChaCha8([32]byte{byte(n)})
	b := make([]byte, n)
	r.Read(b)
	return b
}

// TestVMwareClient goes through the cycle of a datastore probe with the client that ESXi's makers wrote.
func TestVMwareClient(t *testing.T) {
	ns, _ := serve(t, "127.0.0.71", true)
	mount, err := vmware.DialMount("127.0.0.71")
	if err != nil {
		t.Fatal(err)
	}
	defer mount.Close()
	target, err := mount.Mount("/default", vmwarerpc.NewAuthUnix("probe", 0, 0).Auth())
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	info, err := target.FSInfo()
	if err != nil || info.WTPref != 1<<20 {
		t.Fatalf("FSInfo: %+v, %v", info, err)
	}
	if _, err := target.Mkdir("/vm", 0o775); err != nil {
		t.Fatal(err)
	}
	if _, err := target.Mkdir("/vm", 0o775); err == nil {
		t.Fatal("a second Mkdir of one name went through")
	}
	data := random(3_000_000)
	f, err := target.OpenFile("/vm/disk-flat.vmdk", 0o644)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := f.Write(data); err != nil || n != len(data) {
		t.Fatalf("Write: %d, %v", n, err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	ns.Crash() // Close is a COMMIT
	f, err = target.Open("/vm/disk-flat.vmdk")
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(f)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("read %d bytes back, %v", len(got), err)
	}
	entries, err := target.ReadDirPlus("/vm")
	if err != nil || len(entries) != 3 { // with "." and ".."
		t.Fatalf("ReadDirPlus: %d entries, %v", len(entries), err)
	}
	if err := target.RmDir("/vm"); err == nil {
		t.Fatal("RmDir of a directory with a file went through")
	}
	if err := target.Remove("/vm/disk-flat.vmdk"); err != nil {
		t.Fatal(err)
	}
	if err := target.RmDir("/vm"); err != nil {
		t.Fatal(err)
	}
	if _, _, err := target.Lookup("/vm"); !os.IsNotExist(err) {
		t.Fatalf("Lookup of what was removed: %v", err)
	}
	if err := mount.Unmount(); err != nil {
		t.Fatal(err)
	}
	if _, err := mount.Mount("/nothing", vmwarerpc.NewAuthUnix("probe", 0, 0).Auth()); err == nil {
		t.Fatal("Mount of nothing went through")
	}
}

func TestWillscottClient(t *testing.T) {
	_, _ = serve(t, "127.0.0.72", true)
	mount, err := willscott.DialMount("127.0.0.72", time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer mount.Close()
	auth := willscottrpc.NewAuthUnix("probe", 0, 0).Auth()
	target, err := mount.Mount("/default", auth)
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	if _, err := target.Mkdir("/a", 0o755); err != nil {
		t.Fatal(err)
	}
	f, err := target.OpenFile("/a/one", 0o644)
	if err != nil {
		t.Fatal(err)
	}
	data := random(100_000)
	if _, err := f.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := target.Rename("/a/one", "/two"); err != nil {
		t.Fatal(err)
	}
	if err := target.Symlink("two", "/link"); err != nil {
		t.Fatal(err)
	}
	link, err := target.Open("/link")
	if err != nil {
		t.Fatal(err)
	}
	if s, err := link.Readlink(); err != nil || s != "two" {
		t.Fatalf("Readlink: %q, %v", s, err)
	}
	attr, err := target.Getattr("/two")
	if err != nil || attr.Size() != int64(len(data)) {
		t.Fatalf("Getattr: %+v, %v", attr, err)
	}
	set := willscott.Sattr3{Size: willscott.SetSize{SetIt: true, Size: 10}, Mode: willscott.SetMode{SetIt: true, Mode: 0o600}}
	if err := target.Setattr("/two", set); err != nil {
		t.Fatal(err)
	}
	if attr, err = target.Getattr("/two"); err != nil || attr.Size() != 10 || attr.FileMode != 0o600 {
		t.Fatalf("Getattr after Setattr: %+v, %v", attr, err)
	}
	if bits, err := target.Access("/two", 0x3f); err != nil || bits != 0x01|0x04|0x08 {
		t.Fatalf("Access: %#x, %v", bits, err)
	}
	if err := target.RemoveAll("/a"); err != nil {
		t.Fatal(err)
	}
}

// libnfs runs one of libnfs's tools. It hangs in umount now and then, also with other servers, so it is always bounded.
func libnfs(t *testing.T, tool string, args ...string) []byte {
	t.Helper()
	if _, err := exec.LookPath(tool); err != nil {
		t.Skip(tool + " is not installed (package libnfs-utils)")
	}
	for try := 0; ; try++ {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		cmd := exec.CommandContext(ctx, tool, args...)
		var out, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &stderr
		err := cmd.Run()
		hung := ctx.Err() != nil
		cancel()
		if hung && try < 2 {
			t.Logf("%s hung", tool)
			continue
		}
		if err != nil {
			t.Fatalf("%s %v: %v\n%s", tool, args, err, stderr.String())
		}
		return out.Bytes()
	}
}

func TestLibnfsTools(t *testing.T) {
	ns, addr := serve(t, "127.0.0.1", false)
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	url := func(path string) string {
		return fmt.Sprintf("nfs://127.0.0.1%s?version=3&nfsport=%s&mountport=%s&uid=0&gid=0", path, port, port)
	}
	data := random(5_000_001)
	local := filepath.Join(t.TempDir(), "local")
	if err := os.WriteFile(local, data, 0o644); err != nil {
		t.Fatal(err)
	}
	libnfs(t, "nfs-cp", local, url("/default/copy"))
	if f := ns.File(7, "copy"); f == nil || !bytes.Equal(f.Bytes(), data) {
		t.Fatal("nfs-cp wrote something else")
	}
	if got := libnfs(t, "nfs-cat", url("/default/copy")); !bytes.Equal(got, data) {
		t.Fatalf("nfs-cat printed %d bytes", len(got))
	}
	list := string(libnfs(t, "nfs-ls", url("/default")))
	if !strings.Contains(list, "copy") || !strings.Contains(list, "5000001") {
		t.Fatalf("nfs-ls: %s", list)
	}
	list = string(libnfs(t, "nfs-ls", "-s", "-R", url("/default")))
	if !strings.Contains(list, "copy") {
		t.Fatalf("nfs-ls -R: %s", list)
	}
}

func TestPortmapOverUDP(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := pc.LocalAddr().String()
	pc.Close()
	ended := make(chan error, 1)
	mappings := func() []portmap.Mapping {
		return []portmap.Mapping{{Program: 100003, Version: 3, Protocol: portmap.TCP, Port: 2049}}
	}
	go func() { ended <- portmap.Run(ctx, addr, mappings) }()
	nc, err := net.Dial("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	c := nfstest.Client{}
	call := c.Record(7, 100000, 2, 3, []byte{0, 1, 0x86, 0xa3, 0, 0, 0, 3, 0, 0, 0, 6, 0, 0, 0, 0})[4:]
	b := make([]byte, 100)
	n := 0
	for try := 0; n == 0 && try < 100; try++ {
		if _, err := nc.Write(call); err == nil {
			nc.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
			n, _ = nc.Read(b)
		}
		if n == 0 {
			time.Sleep(5 * time.Millisecond) // it may not listen yet
		}
	}
	if n != 28 || b[26] != 2049>>8 || b[27] != 2049&255 {
		t.Fatalf("GETPORT: % x", b[:n])
	}
	cancel()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
}
