package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"varve/volumedriver/backend"
	"varve/volumedriver/backend/backendtest"
	"varve/volumedriver/vfs"
)

// TestModel does random things against what each object must hold.
func TestModel(t *testing.T) {
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { model(t, seed) })
	}
}

func model(t *testing.T, seed uint64) {
	rnd := rand.New(rand.NewPCG(seed, 9))
	fs, mem := vfs.NewMem(int64(seed)), backendtest.NewMem()
	fault := backendtest.NewFault(mem)
	cfg := Config{FS: fs, LineBytes: 4096 << rnd.IntN(5), Bytes: int64(rnd.IntN(4)) * 512 * kib, RAMBytes: int64(rnd.IntN(3)) * 256 * kib,
		KeepWrites: rnd.IntN(2) == 0, ScanBytes: mib}
	c := mustOpen(t, cfg)
	b := c.Wrap(poolID, keepOpen{fault})
	oracle, version := map[string][]byte{}, 0
	name := func() string { return fmt.Sprintf("v/%d/o%d", rnd.IntN(2), rnd.IntN(8)) }
	handles := map[string]backend.Object{}
	closeAll := func() {
		for name, o := range handles {
			check(t, o.Close())
			delete(handles, name)
		}
	}
	for range 1500 {
		n := name()
		data, exists := oracle[n]
		switch op := rnd.IntN(100); {
		case op < 8:
			version++
			p := content(fmt.Sprint(n, version), rnd.IntN(400_000))
			err := b.Put(t.Context(), n, p[:len(p)/2], p[len(p)/2:])
			if exists != errors.Is(err, backend.ErrExist) || !exists && err != nil {
				t.Fatalf("put %s: %v", n, err)
			}
			if !exists {
				oracle[n] = p
			}
		case op < 11:
			if o := handles[n]; o != nil {
				check(t, o.Close())
				delete(handles, n)
			}
			check(t, b.Delete(t.Context(), n))
			delete(oracle, n)
		case op < 12:
			closeAll()
			check(t, b.Close())
			if rnd.IntN(2) == 0 {
				check(t, c.Close())
			} else { // killed: the index is what it was
				old, has := []byte(nil), false
				if _, err := fs.Stat("/cache/index"); err == nil {
					old, has = read(t, fs, "/cache/index"), true
				}
				check(t, c.Close())
				if has {
					write(t, fs, "/cache/index", old)
				} else if _, err := fs.Stat("/cache/index"); err == nil {
					check(t, fs.Remove("/cache/index"))
				}
			}
			c = mustOpen(t, cfg)
			b = c.Wrap(poolID, keepOpen{fault})
		case op < 14:
			if cfg.Bytes > 0 {
				f, err := fs.OpenFile("/cache/lines", os.O_RDWR, 0)
				check(t, err)
				if size, err := f.Size(); err == nil && size > 0 {
					flip(t, f, rnd.Int64N(size), 1)
				}
				check(t, f.Close())
			}
		case op < 16:
			fault.Add(backendtest.Spoil{Op: backendtest.OpRead, Times: 1})
		case op < 18:
			b.(Prefetcher).Prefetch(n, int64(rnd.IntN(500_000)), int64(rnd.IntN(500_000)))
		case op < 20:
			if o := handles[n]; o != nil {
				o.(Discarder).Discard(int64(rnd.IntN(400_000)), int64(rnd.IntN(400_000)))
			}
		default:
			o := handles[n]
			if o == nil {
				var err error
				if o, err = b.Open(t.Context(), n); err != nil {
					if exists || !errors.Is(err, backend.ErrNotExist) {
						t.Fatalf("open %s: %v", n, err)
					}
					continue
				}
				handles[n] = o
			}
			if !exists {
				t.Fatalf("%s was opened and does not exist", n)
			}
			readSome(t, rnd, o, data)
		}
	}
	closeAll()
	check(t, b.Close())
	check(t, c.Close())
	if c.reg.len() != int(countObjects(c)) {
		t.Errorf("%d objects are known, %d have lines", c.reg.len(), countObjects(c))
	}
}

// countObjects counts the objects of which lines are in the SSD tier; those of the RAM tier are gone with Close.
func countObjects(c *Cache) int64 {
	ids := map[uint32]bool{}
	for i := range c.reg.all {
		if c.reg.all[i].lines > 0 && !c.reg.all[i].dead {
			ids[uint32(i)] = true
		}
	}
	return int64(len(ids))
}

func readSome(t *testing.T, rnd *rand.Rand, o backend.Object, data []byte) {
	t.Helper()
	if o.Size() != int64(len(data)) {
		t.Fatalf("size %d, want %d", o.Size(), len(data))
	}
	off := rnd.IntN(len(data) + 1)
	size := rnd.IntN(len(data) - off + 1)
	if rnd.IntN(2) == 0 {
		size = min(size, 5000)
	}
	p := make([]byte, size)
	var err error
	switch rnd.IntN(4) {
	case 0:
		err = o.TryReadAt(p, int64(off))
	case 1:
		err = o.(Scanner).ReadScanAt(t.Context(), p, int64(off))
	default:
		err = o.ReadAt(t.Context(), p, int64(off))
	}
	if err == nil && !bytes.Equal(p, data[off:off+size]) {
		t.Fatalf("bytes %d+%d of %d differ", off, size, len(data))
	}
	if err != nil && !errors.Is(err, vfs.ErrWouldBlock) && !errors.Is(err, backendtest.ErrInjected) {
		t.Fatal(err)
	}
}

// TestConcurrent has readers, deleters and putters at the same few objects, with evictions all the time.
func TestConcurrent(t *testing.T) {
	mem := backendtest.NewMem()
	c := mustOpen(t, Config{RAMBytes: 300 * kib, Bytes: 600 * kib, LineBytes: 8 * kib, KeepWrites: true, ScanBytes: 100 * kib})
	b := c.Wrap(poolID, mem)
	const objects, size = 12, 150_000
	name := func(i int) string { return fmt.Sprintf("v/%d/x", i) }
	for i := range objects {
		put(t, b, name(i), size)
	}
	end := time.Now().Add(1500 * time.Millisecond)
	var wg sync.WaitGroup
	var reads atomic.Int64
	for w := range 8 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(w), 3))
			for time.Now().Before(end) {
				i := rnd.IntN(objects)
				if w == 0 && rnd.IntN(20) == 0 {
					_ = b.Delete(context.Background(), name(i))
					_ = b.Put(context.Background(), name(i), content(name(i), size))
					continue
				}
				o, err := b.Open(context.Background(), name(i))
				if errors.Is(err, backend.ErrNotExist) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				data := content(name(i), size)
				for range 20 {
					readConcurrent(t, rnd, o, data)
					reads.Add(1)
				}
				if err := o.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	t.Logf("%d reads, %+v", reads.Load(), c.Stats())
	check(t, b.Close())
	check(t, c.Close())
}

func readConcurrent(t *testing.T, rnd *rand.Rand, o backend.Object, data []byte) {
	off := rnd.IntN(len(data))
	p := make([]byte, min(len(data)-off, 1+rnd.IntN(30_000)))
	ctx, cancel := context.Background(), context.CancelFunc(func() {})
	if rnd.IntN(10) == 0 {
		ctx, cancel = context.WithTimeout(ctx, time.Duration(rnd.IntN(100))*time.Microsecond)
	}
	defer cancel()
	err := o.ReadAt(ctx, p, int64(off))
	if rnd.IntN(2) == 0 {
		err = o.TryReadAt(p, int64(off))
	}
	switch {
	case err == nil && !bytes.Equal(p, data[off:off+len(p)]):
		t.Errorf("bytes %d+%d differ", off, len(p))
	case err != nil && !errors.Is(err, vfs.ErrWouldBlock) && !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, backend.ErrNotExist):
		t.Error(err)
	}
}
