package nbd

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// tool runs a program of another project against our server, and skips loudly when it is not installed.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	if testing.Short() {
		t.Skip("programs of other projects take seconds")
	}
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("SKIPPED: %s is not installed", name)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = t.TempDir() // fio leaves a file where it runs
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// serveTools serves export "d" of size bytes and returns its URI.
func serveTools(t *testing.T, m Device) string {
	t.Helper()
	_, addr, _ := listen(t, "tcp", Config{Exports: newExports(map[string]Device{"d": m, "second": newMemory(1 << 20)})})
	return fmt.Sprintf("nbd://%s/d", addr)
}

// image writes a file of size bytes with data in its first and its last n bytes.
func image(t *testing.T, size, n int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	data := pattern(uint64(size), int(n))
	for _, off := range []int64{0, size - n} {
		if _, err := f.WriteAt(data, off); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

func TestInteropNbdinfo(t *testing.T) {
	m := newMemory(1 << 40)
	m.writeLocked(make([]byte, 1<<20), 1<<30)
	uri := serveTools(t, m)
	var info struct {
		Exports []struct {
			Name     string   `json:"export-name"`
			Size     int64    `json:"export-size"`
			Flush    bool     `json:"can_flush"`
			Multi    bool     `json:"can_multi_conn"`
			Contexts []string `json:"contexts"`
			Min      int      `json:"block_size_minimum"`
		}
	}
	if err := json.Unmarshal([]byte(tool(t, "nbdinfo", "--json", uri)), &info); err != nil {
		t.Fatal(err)
	}
	e := info.Exports[0]
	if e.Size != 1<<40 || !e.Flush || !e.Multi || len(e.Contexts) != 1 || e.Contexts[0] != allocationContext || e.Min != blockMin {
		t.Fatalf("%+v", e)
	}
	var extents []struct{ Offset, Length, Type int64 }
	if err := json.Unmarshal([]byte(tool(t, "nbdinfo", "--map", "--json", uri)), &extents); err != nil {
		t.Fatal(err)
	}
	if len(extents) != 3 || extents[1].Offset != 1<<30 || extents[1].Length != 1<<20 || extents[1].Type != 0 || extents[2].Type != 3 {
		t.Fatalf("%+v", extents)
	}
	out := tool(t, "nbdinfo", "--list", strings.TrimSuffix(uri, "/d"))
	if !strings.Contains(out, `export="d"`) || !strings.Contains(out, `export="second"`) {
		t.Fatalf("%s", out)
	}
}

func TestInteropNbdcopy(t *testing.T) {
	uri := serveTools(t, newMemory(64<<20))
	in := image(t, 64<<20, 16<<20)
	out := filepath.Join(t.TempDir(), "out")
	tool(t, "nbdcopy", "--connections=4", "--flush", in, uri)
	tool(t, "nbdcopy", "--connections=4", uri, out)
	tool(t, "cmp", in, out)
}

// TestInteropSparse (G10): 1 TiB with little in it is copied in the time of the little.
func TestInteropSparse(t *testing.T) {
	m := newMemory(1 << 40)
	for i := range int64(64) {
		m.writeLocked(make([]byte, 64<<10), i<<33)
	}
	uri := serveTools(t, m)
	begun := time.Now()
	tool(t, "nbdcopy", uri, "null:")
	if spent := time.Since(begun); spent > 10*time.Second {
		t.Fatalf("1 TiB with 4 MiB of data took %v", spent)
	}
}

func TestInteropQemuImg(t *testing.T) {
	uri := serveTools(t, newMemory(64<<20))
	in := image(t, 64<<20, 8<<20)
	qcow := filepath.Join(t.TempDir(), "q.qcow2")
	tool(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", in, uri)
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", in, uri)
	tool(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, qcow)
	tool(t, "qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", qcow, uri)
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", in, uri)
	var extents []struct {
		Start, Length int64
		Data          bool
	}
	if err := json.Unmarshal([]byte(tool(t, "qemu-img", "map", "--output=json", "-f", "raw", uri)), &extents); err != nil {
		t.Fatal(err)
	}
	if len(extents) != 3 || !extents[0].Data || extents[1].Data || extents[1].Length != 48<<20 {
		t.Fatalf("%+v", extents)
	}
	tool(t, "qemu-img", "bench", "-w", "-f", "raw", "-t", "none", "-c", "3000", "-d", "16", "-s", "4096", "--flush-interval=64", uri)
}

func TestInteropQemuIO(t *testing.T) {
	uri := serveTools(t, newMemory(64<<20))
	out := tool(t, "qemu-io", "-f", "raw", "-c", "write -P 0x5a 1M 3M", "-c", "read -P 0x5a 1M 3M", "-c", "write -f -P 0xa5 1537 777",
		"-c", "read -P 0xa5 1537 777", "-c", "write -z 2M 64k", "-c", "read -P 0 2M 64k", "-c", "discard 3M 64k", "-c", "flush",
		"-c", "aio_write -P 1 0 64k", "-c", "aio_write -P 2 64k 64k", "-c", "aio_flush", "-c", "read -P 2 64k 64k", uri)
	if strings.Contains(out, "Pattern verification failed") || strings.Contains(out, "rror") {
		t.Fatalf("%s", out)
	}
}

func TestInteropFio(t *testing.T) {
	uri := serveTools(t, newMemory(64<<20))
	tool(t, "fio", "--name=v", "--ioengine=nbd", "--uri="+uri, "--rw=randwrite", "--bs=4k", "--size=16M", "--iodepth=16", "--fsync=16",
		"--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--thread")
	tool(t, "fio", "--name=v", "--ioengine=nbd", "--uri="+uri, "--rw=randwrite", "--bsrange=512-64k", "--blockalign=512", "--size=16M",
		"--iodepth=8", "--verify=md5", "--verify_fatal=1", "--thread")
}

// TestInteropTLS attaches libnbd over TLS with certificates on both sides.
func TestInteropTLS(t *testing.T) {
	m := newMemory(64 << 20)
	e := newExports(map[string]Device{"d": m})
	_, addr, _ := listen(t, "tcp", Config{Exports: e, TLS: TLSRequired, TLSConfig: serverTLS(t), ClientCAs: ca(t).pool})
	dir := t.TempDir()
	cert := ca(t).issue(t, "libnbd")
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{
		"ca-cert.pem":     {Type: "CERTIFICATE", Bytes: ca(t).cert.Raw},
		"client-cert.pem": {Type: "CERTIFICATE", Bytes: cert.Certificate[0]},
		"client-key.pem":  {Type: "PRIVATE KEY", Bytes: key},
	} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	uri := fmt.Sprintf("nbds://%s/d?tls-certificates=%s", addr, dir)
	if size := strings.TrimSpace(tool(t, "nbdinfo", "--size", uri)); size != "67108864" {
		t.Fatalf("size %q", size)
	}
	in := image(t, 64<<20, 8<<20)
	out := filepath.Join(t.TempDir(), "out")
	tool(t, "nbdcopy", in, uri)
	tool(t, "nbdcopy", uri, out)
	tool(t, "cmp", in, out)
	if id := e.peers[0].Identity; id != "libnbd" {
		t.Fatalf("identity %q", id)
	}
}

// TestInteropNbdkit (Z17) plays the same random script to our server and to nbdkit's memory plugin: the answers agree.
func TestInteropNbdkit(t *testing.T) {
	if _, err := exec.LookPath("nbdkit"); err != nil {
		t.Skip("SKIPPED: nbdkit is not installed")
	}
	sock := filepath.Join(t.TempDir(), "kit.sock")
	ctx, cancel := context.WithCancel(t.Context())
	cmd := exec.CommandContext(ctx, "nbdkit", "-f", "-U", sock, "memory", "4M")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cancel()
		cmd.Wait()
	}()
	waitFor(t, "nbdkit", func() bool { // its socket is there before it listens
		c, err := net.Dial("unix", sock)
		return err == nil && c.Close() == nil
	})
	_, addr, _ := listen(t, "unix", Config{Exports: newExports(map[string]Device{"": newMemory(4 << 20)})})
	ours, kits := attach(t, addr, "", true), attach(t, &net.UnixAddr{Name: sock, Net: "unix"}, "", true)
	r := rand.New(rand.NewPCG(17, 17))
	for i := range 3000 {
		cmd := []uint16{cmdRead, cmdRead, cmdWrite, cmdWrite, cmdWrite, cmdTrim, cmdWriteZeroes, cmdFlush, cmdCache}[r.IntN(9)]
		off, n := uint64(r.IntN(4<<20)), uint32(1+r.IntN(64<<10))
		flags := uint16(0)
		switch r.IntN(8) {
		case 0:
			off = 4<<20 - uint64(r.IntN(70<<10)) // often beyond the end
		case 1:
			flags = cmdFlagFUA
		case 2:
			off, n = off&^4095, 4096
		}
		var payload []byte
		if cmd == cmdWrite {
			payload = bytes.Repeat([]byte{byte(i)}, int(n))
		}
		if cmd == cmdFlush {
			off, n, flags = 0, 0, 0
		}
		a, b := ours.do(cmd, flags, off, n, payload), kits.do(cmd, flags, off, n, payload)
		if a.errno != b.errno || !bytes.Equal(a.data, b.data) {
			t.Fatalf("request %d: command %d flags %d at %d+%d: errno %d and %d, data equal %t", i, cmd, flags, off, n, a.errno, b.errno, bytes.Equal(a.data, b.data))
		}
	}
}
