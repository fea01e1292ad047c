//go:build e2e

// Package e2e runs real clients against the real binary on loopback: libnbd, qemu, fio, libnfs, Linux guests, and our own
// clients that keep a journal while the server is killed. What a test proves it prints through harness.Show.
//
// VARVE_PEER=“nbdkit memory”, “qemu-nbd writeback”, … runs the NBD interoperability tests against that server instead,
// which tells a mistake of a test from one of ours.
package e2e

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"varve/test/harness"
	"varve/test/nbdclient"
)

const (
	kib = int64(1) << 10
	mib = int64(1) << 20
	gib = int64(1) << 30
	tib = int64(1) << 40
)

// export gives the URI of a fresh NBD export, ours or that of the chosen peer.
func export(t *testing.T, size int64) string {
	t.Helper()
	if peer := os.Getenv("VARVE_PEER"); peer != "" {
		p, err := harness.StartNBD(peer, t.TempDir(), size)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(p.Stop)
		return p.URI
	}
	n := harness.StartNode(t)
	n.CreateDisk(t, "disk1", fmt.Sprint(size))
	return n.NBD("disk1")
}

// random writes n bytes that do not compress, the same for the same seed.
func random(seed uint64, n int64) io.Reader {
	var key [32]byte
	key[0], key[1] = byte(seed), byte(seed>>8)
	return io.LimitReader(rand.NewChaCha8(key), n)
}

func writeFile(t *testing.T, path string, r io.Reader) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(f, r); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func sum(t *testing.T, path string, n int64) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if got, err := io.CopyN(h, f, n); err != nil {
		t.Fatalf("%s: %d of %d bytes: %v", path, got, n, err)
	}
	return h.Sum(nil)
}

func sameBytes(t *testing.T, a, b string, n int64) {
	t.Helper()
	if !bytes.Equal(sum(t, a, n), sum(t, b, n)) {
		t.Fatalf("%s and %s differ in their first %d bytes", filepath.Base(a), filepath.Base(b), n)
	}
}

// scatter writes total random bytes as pieces spread evenly over an export, through eight requests in flight.
func scatter(t *testing.T, c *nbdclient.Client, seed uint64, total, piece int64) {
	t.Helper()
	pieces := total / piece
	step := c.Size / pieces
	src := random(seed, total)
	room := make(chan struct{}, 8)
	const request = 1 << 20
	errs := make(chan error, pieces+total/request)
	sent := 0
	for i := range pieces {
		for off := int64(0); off < piece; off += request {
			p := make([]byte, min(request, piece-off))
			if _, err := io.ReadFull(src, p); err != nil {
				t.Fatal(err)
			}
			room <- struct{}{}
			sent++
			c.Submit(nbdclient.Write, 0, i*step+off, 0, p, func(err error) { <-room; errs <- err })
		}
	}
	for range sent {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Do(nbdclient.Flush, 0, 0, 0, nil); err != nil {
		t.Fatal(err)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// timed gives how long f took.
func timed(f func()) time.Duration {
	start := time.Now()
	f()
	return time.Since(start)
}
