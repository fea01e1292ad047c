package cache_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver"
	"varve/volumedriver/backend/backendtest"
	"varve/volumedriver/cache"
	"varve/volumedriver/vfs"
)

// node is a volume driver on a backend that is read through a cache.
type node struct {
	t      *testing.T
	fs     *vfs.Mem
	fault  *backendtest.Fault
	mem    *backendtest.Mem
	cache  *cache.Cache
	driver *volumedriver.Driver
	cancel context.CancelFunc
	done   chan error
	close  func() error
}

var pool, disk = uuid.MustParse("6ba7b811-9dad-11d1-80b4-00c04fd430c8"), uuid.MustParse("6ba7b812-9dad-11d1-80b4-00c04fd430c8")

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func start(t *testing.T, fs *vfs.Mem, mem *backendtest.Mem, cfg cache.Config) *node {
	t.Helper()
	n := &node{t: t, fs: fs, mem: mem.Reopen(), fault: backendtest.NewFault(mem)}
	cfg.FS, cfg.Dir = fs, "/cache"
	var err error
	n.cache, err = cache.Open(cfg)
	check(t, err)
	n.driver, err = volumedriver.Open(volumedriver.Config{FS: fs, Dir: "/data", LogBytes: 64 << 20, SegmentBytes: 8 << 20, SCOBytes: 2 << 20,
		NoPrewrite: true})
	check(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	n.cancel, n.done = cancel, make(chan error, 1)
	b := n.cache.Wrap(pool, n.fault)
	n.close = b.Close
	n.driver.AddPool(pool, b)
	go func() { n.done <- n.driver.Run(ctx) }()
	return n
}

func (n *node) stop() {
	n.t.Helper()
	n.cancel()
	check(n.t, <-n.done)
	check(n.t, n.driver.Close())
	check(n.t, n.close())
	check(n.t, n.cache.Close())
}

func (n *node) volume() *volumedriver.Volume {
	n.t.Helper()
	v, err := n.driver.Create(context.Background(), volumedriver.Spec{ID: disk, Pool: pool, Epoch: 1, Size: 64 << 20, PoolName: "p", Path: "d", Kind: "disk"})
	check(n.t, err)
	return v
}

func (n *node) wantAll(v *volumedriver.Volume, data []byte, step int) {
	n.t.Helper()
	p := make([]byte, step)
	for off := 0; off < len(data); off += step {
		if err := v.Read(context.Background(), p, int64(off)); err != nil {
			n.t.Fatalf("read at %d: %v", off, err)
		}
		if !bytes.Equal(p, data[off:off+step]) {
			n.t.Fatalf("bytes %d+%d differ", off, step)
		}
	}
}

// TestVolumeOverDamagedCache reads a volume whose SSD cache is damaged again and again, over restarts: right bytes each time.
func TestVolumeOverDamagedCache(t *testing.T) {
	fs, mem := vfs.NewMem(1), backendtest.NewMem()
	cfg := cache.Config{RAMBytes: 1 << 20, Bytes: 32 << 20, KeepWrites: true}
	rnd := rand.New(rand.NewPCG(1, 4))
	data := make([]byte, 24<<20)
	seed := rand.NewChaCha8([32]byte{4})
	_, _ = seed.Read(data)
	n := start(t, fs, mem, cfg)
	v := n.volume()
	for off := 0; off < len(data); off += 1 << 20 {
		check(t, v.Write(t.Context(), data[off:off+1<<20], int64(off), 0))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	check(t, n.driver.Drain(ctx))
	corrupt := int64(0)
	for round := range 4 {
		n.wantAll(v, data, 64<<10)
		check(t, n.cache.Settle(ctx))
		n.wantAll(v, data, 12<<10)
		corrupt += n.cache.Stats().DiskCorrupt
		if round%2 == 1 {
			n.stop()
			damage(t, fs, rnd)
			n = start(t, fs, mem, cfg)
			v = n.volume()
		} else {
			damage(t, fs, rnd)
		}
	}
	n.wantAll(v, data, 64<<10)
	corrupt += n.cache.Stats().DiskCorrupt
	n.stop()
	if corrupt == 0 {
		t.Error("no damage was met")
	}
	t.Logf("» bit flips in the SSD cache: %d damaged lines found and fetched again, all bytes right", corrupt)
}

// damage flips bits of the cache file.
func damage(t *testing.T, fs vfs.FS, rnd *rand.Rand) {
	t.Helper()
	f, err := fs.OpenFile("/cache/lines", os.O_RDWR, 0)
	check(t, err)
	size, err := f.Size()
	check(t, err)
	for range 100 {
		p := []byte{0}
		off := rnd.Int64N(size)
		_, err := f.ReadAt(p, off)
		check(t, err)
		p[0] ^= 1 << rnd.IntN(8)
		_, err = f.WriteAt(p, off)
		check(t, err)
	}
	check(t, f.Close())
}

// TestCachedDataWhileTheBackendIsAway: all that was cached is read, and after the outage the rest as well.
func TestCachedDataWhileTheBackendIsAway(t *testing.T) {
	fs, mem := vfs.NewMem(1), backendtest.NewMem()
	n := start(t, fs, mem, cache.Config{RAMBytes: 4 << 20, Bytes: 32 << 20, KeepWrites: true})
	v := n.volume()
	data := bytes.Repeat([]byte("what was written before the outage. "), 1<<20)[:16<<20]
	for off := 0; off < len(data); off += 1 << 20 {
		check(t, v.Write(t.Context(), data[off:off+1<<20], int64(off), 0))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	check(t, n.driver.Drain(ctx))
	n.wantAll(v, data, 128<<10)
	check(t, n.cache.Settle(ctx))
	n.fault.SetDown(true)
	n.wantAll(v, data, 128<<10)
	n.wantAll(v, data, 4<<10)
	n.fault.SetDown(false)
	n.wantAll(v, data, 64<<10)
	n.stop()
}
