package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"varve/volumedriver/backend"
	"varve/volumedriver/backend/backendtest"
	"varve/volumedriver/vfs"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var poolID = uuid.MustParse("6ba7b810-9dad-11d1-80b4-00c04fd430c8")

const kib, mib = 1 << 10, 1 << 20

func mustOpen(t testing.TB, cfg Config) *Cache {
	t.Helper()
	if cfg.FS == nil {
		cfg.FS = vfs.NewMem(1)
	}
	if cfg.Dir == "" {
		cfg.Dir = "/cache"
	}
	c, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// content is what an object of that name holds.
func content(name string, n int) []byte {
	var seed [32]byte
	copy(seed[:], name)
	p := make([]byte, n)
	_, _ = rand.NewChaCha8(seed).Read(p)
	return p
}

func put(t testing.TB, b backend.Backend, name string, n int) []byte {
	t.Helper()
	p := content(name, n)
	check(t, b.Put(context.Background(), name, p))
	return p
}

func open(t testing.TB, b backend.Backend, name string) *object {
	t.Helper()
	o, err := b.Open(context.Background(), name)
	check(t, err)
	return o.(*object)
}

// want reads and compares.
func want(t testing.TB, o backend.Object, data []byte, off, n int) {
	t.Helper()
	p := make([]byte, n)
	check(t, o.ReadAt(context.Background(), p, int64(off)))
	if !bytes.Equal(p, data[off:off+n]) {
		t.Fatalf("bytes %d+%d differ", off, n)
	}
}

func settle(t testing.TB, c *Cache) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	check(t, c.Settle(ctx))
}

// counting counts the ranged reads and opens of a backend.
type counting struct {
	backend.Backend
	reads, bytes, opens atomic.Int64
	gate                func()
}

func (c *counting) Open(ctx context.Context, name string) (backend.Object, error) {
	c.opens.Add(1)
	o, err := c.Backend.Open(ctx, name)
	if err != nil {
		return nil, err
	}
	return &countingObject{o, c}, nil
}

type countingObject struct {
	backend.Object
	c *counting
}

func (o *countingObject) ReadAt(ctx context.Context, p []byte, off int64) error {
	o.c.reads.Add(1)
	o.c.bytes.Add(int64(len(p)))
	if o.c.gate != nil {
		o.c.gate()
	}
	return o.Object.ReadAt(ctx, p, off)
}

// closing closes the cache after the backend, as the conformance suite does not know it.
type closing struct {
	backend.Backend
	c *Cache
}

func (c closing) Close() error { return errors.Join(c.Backend.Close(), c.c.Close()) }

func TestConformance(t *testing.T) {
	for name, cfg := range map[string]Config{
		"ram and disk": {RAMBytes: 4 * mib, Bytes: 16 * mib},
		"keeps writes": {RAMBytes: 4 * mib, Bytes: 64 * mib, KeepWrites: true},
		"tiny lines":   {RAMBytes: 256 * kib, Bytes: mib, LineBytes: 4 * kib},
		"ram only":     {RAMBytes: 2 * mib},
		"disk only":    {Bytes: 8 * mib},
		"no tier":      {},
		"large lines":  {RAMBytes: 4 * mib, Bytes: 16 * mib, LineBytes: mib},
	} {
		t.Run(name, func(t *testing.T) {
			backendtest.Run(t, func(t *testing.T) backend.Backend {
				c := mustOpen(t, cfg)
				return closing{c.Wrap(poolID, backendtest.NewMem()), c}
			})
		})
	}
}

func TestWrongConfigIsRefused(t *testing.T) {
	for _, line := range []int{-1, 1, 4095, 6000, 3 << 12, 2 << 20} {
		if _, err := Open(Config{LineBytes: line, RAMBytes: mib}); err == nil {
			t.Errorf("lines of %d bytes are accepted", line)
		}
	}
}

// TestSecondReadIsFromTheCache reads twice, and then from a cache opened again on the same disk.
func TestSecondReadIsFromTheCache(t *testing.T) {
	mem, fs := &counting{Backend: backendtest.NewMem()}, vfs.NewMem(1)
	data := put(t, mem, "v/a/00/1-1-0", 3*mib+777)
	for round, wantReads := range []bool{true, false, false} {
		c := mustOpen(t, Config{FS: fs, RAMBytes: 8 * mib, Bytes: 16 * mib})
		b := c.Wrap(poolID, keepOpen{mem})
		for range 2 {
			o := open(t, b, "v/a/00/1-1-0")
			want(t, o, data, 0, len(data))
			want(t, o, data, 100_000, 5000)
			want(t, o, data, len(data)-1, 1)
			check(t, o.Close())
		}
		settle(t, c)
		s := c.Stats()
		if reads := mem.reads.Swap(0); wantReads != (reads > 0) || wantReads && reads != 4 {
			t.Errorf("round %d: %d reads of the backend; %+v", round, reads, s)
		}
		if !wantReads && s.DiskHits == 0 {
			t.Errorf("round %d: no hits on the disk", round)
		}
		if s.DiskCorrupt+s.DiskStale+s.DiskErrors > 0 || s.DiskOff != "" {
			t.Errorf("round %d: %+v", round, s)
		}
		check(t, b.Close())
		check(t, c.Close())
	}
}

// keepOpen outlives the store that wraps it.
type keepOpen struct{ backend.Backend }

func (keepOpen) Close() error { return nil }

// TestManyReadersOneFetch has many want a line at once.
func TestManyReadersOneFetch(t *testing.T) {
	release := make(chan struct{})
	mem := &counting{Backend: backendtest.NewMem(), gate: func() { <-release }}
	data := put(t, mem, "v/a/00/1-1-0", mib)
	c := mustOpen(t, Config{RAMBytes: 8 * mib})
	b := c.Wrap(poolID, mem)
	o := open(t, b, "v/a/00/1-1-0")
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			p := make([]byte, 4096)
			if err := o.ReadAt(context.Background(), p, int64(i%16)*4096); err != nil || !bytes.Equal(p, data[i%16*4096:][:4096]) {
				t.Errorf("reader %d: %v", i, err)
			}
		})
	}
	for c.Stats().Misses+c.Stats().Shared < 32 {
		time.Sleep(time.Millisecond)
	}
	close(release)
	wg.Wait()
	if s := c.Stats(); s.Misses != 1 || s.Shared != 31 { // and reading ahead, since the readers together look like a sequential one
		t.Errorf("%+v", s)
	}
	check(t, o.Close())
	check(t, b.Close())
	check(t, c.Close())
}

// TestReaderThatLeavesTakesNoOneWithIt cancels the reader that started a fetch; the other gets its bytes. When all have left, the
// fetch is given up, and the next reader is not told of it.
func TestReaderThatLeavesTakesNoOneWithIt(t *testing.T) {
	fault := backendtest.NewFault(backendtest.NewMem())
	data := put(t, fault, "v/a/00/1-1-0", mib)
	slow := fault.Add(backendtest.Spoil{Op: backendtest.OpRead, Delay: 100 * time.Millisecond})
	c := mustOpen(t, Config{RAMBytes: 8 * mib})
	b := c.Wrap(poolID, fault)
	o := open(t, b, "v/a/00/1-1-0")
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := o.ReadAt(ctx, make([]byte, 10), 0); !errors.Is(err, context.Canceled) {
			t.Errorf("the reader that left: %v", err)
		}
	})
	for c.Stats().Misses == 0 {
		time.Sleep(time.Millisecond)
	}
	wg.Go(func() {
		p := make([]byte, 10)
		if err := o.ReadAt(context.Background(), p, 5); err != nil || !bytes.Equal(p, data[5:15]) {
			t.Errorf("the reader that stayed: %v", err)
		}
	})
	for c.Stats().Shared == 0 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	wg.Wait()

	slow.Remove()
	fault.Add(backendtest.Spoil{Op: backendtest.OpRead, Times: 1, Delay: time.Hour})
	ctx, cancel = context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if err := o.ReadAt(ctx, make([]byte, 10), 500_000); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a read that nobody waited for: %v", err)
	}
	want(t, o, data, 500_000, 10)
	check(t, o.Close())
	check(t, b.Close())
	check(t, c.Close())
}

// TestFailedFetchFailsOnlyItsReaders, and is not remembered.
func TestFailedFetchFailsOnlyItsReaders(t *testing.T) {
	fault := backendtest.NewFault(backendtest.NewMem())
	data := put(t, fault, "v/a/00/1-1-0", 4*mib)
	c := mustOpen(t, Config{RAMBytes: 8 * mib, Bytes: 16 * mib})
	b := c.Wrap(poolID, fault)
	o := open(t, b, "v/a/00/1-1-0")
	want(t, o, data, 0, 100)
	fault.Add(backendtest.Spoil{Op: backendtest.OpRead, Times: 1})
	if err := o.ReadAt(t.Context(), make([]byte, 200_000), 2*mib); !errors.Is(err, backendtest.ErrInjected) {
		t.Errorf("a failed fetch: %v", err)
	}
	want(t, o, data, 2*mib, 200_000)
	fault.SetDown(true)
	want(t, o, data, 50, 1000)
	again := open(t, b, "v/a/00/1-1-0") // known, so the backend is not asked
	want(t, again, data, 2*mib+5, 100_000)
	if err := o.ReadAt(t.Context(), make([]byte, 10), 3*mib); !errors.Is(err, backendtest.ErrDown) {
		t.Errorf("a miss while the backend is down: %v", err)
	}
	fault.SetDown(false)
	want(t, again, data, 3*mib, 10)
	check(t, again.Close())
	check(t, o.Close())
	check(t, b.Close())
	check(t, c.Close())
}

// TestBitFlipsOnDiskGiveRightBytes flips bits all over the cache file: each read gives the right bytes all the same, and the
// damage is counted. This is what catches a cache without CRC.
func TestBitFlipsOnDiskGiveRightBytes(t *testing.T) {
	fs, mem := vfs.NewMem(1), backendtest.NewMem()
	data := put(t, mem, "v/a/00/1-1-0", 4*mib)
	c := mustOpen(t, Config{FS: fs, Bytes: 16 * mib})
	b := c.Wrap(poolID, mem)
	o := open(t, b, "v/a/00/1-1-0")
	want(t, o, data, 0, len(data))
	settle(t, c)
	rnd := rand.New(rand.NewPCG(1, 2))
	f, err := fs.OpenFile("/cache/lines", os.O_RDWR, 0)
	check(t, err)
	size, err := f.Size()
	check(t, err)
	for range 40 {
		flip(t, f, rnd.Int64N(size), 1<<rnd.IntN(8))
	}
	check(t, f.Close())
	for range 2 {
		for off := 0; off < len(data); off += 16 * kib {
			want(t, o, data, off, 16*kib)
		}
		settle(t, c)
	}
	s := c.Stats()
	if s.DiskCorrupt == 0 || s.DiskHits == 0 || s.DiskOff != "" {
		t.Errorf("%+v", s)
	}
	check(t, o.Close())
	check(t, b.Close())
	check(t, c.Close())
}

func flip(t testing.TB, f vfs.File, off int64, bits byte) {
	t.Helper()
	p := []byte{0}
	_, err := f.ReadAt(p, off)
	check(t, err)
	p[0] ^= bits
	_, err = f.WriteAt(p, off)
	check(t, err)
}

// TestOldIndexCostsOnlyMisses restarts with the index of an earlier time, whose slots have gone to other lines since.
func TestOldIndexCostsOnlyMisses(t *testing.T) {
	fs, mem := vfs.NewMem(1), backendtest.NewMem()
	var data [][]byte
	name := func(i int) string { return fmt.Sprintf("v/a/00/1-%d-0", i) }
	for i := range 6 {
		data = append(data, put(t, mem, name(i), mib))
	}
	cfg := Config{FS: fs, Bytes: 2 * mib}
	fill := func(c *Cache, from, to int) {
		b := c.Wrap(poolID, keepOpen{mem})
		for i := from; i < to; i++ {
			o := open(t, b, name(i))
			want(t, o, data[i], 0, mib)
			check(t, o.Close())
			settle(t, c)
		}
		check(t, b.Close())
	}
	c := mustOpen(t, cfg)
	fill(c, 0, 2)
	check(t, c.Close())
	old := read(t, fs, "/cache/index")
	c = mustOpen(t, cfg)
	fill(c, 2, 6)
	check(t, c.Close())
	write(t, fs, "/cache/index", old)

	c = mustOpen(t, cfg)
	if s := c.Stats(); s.DiskUsed == 0 {
		t.Fatalf("the old index was not loaded: %+v", s)
	}
	fill(c, 0, 6)
	fill(c, 0, 6)
	if s := c.Stats(); s.DiskStale == 0 || s.DiskCorrupt > 0 {
		t.Errorf("%+v", s)
	}
	check(t, c.Close())

	for i := range old { // and of any damage
		if i%7 != 0 && i > 64 {
			continue
		}
		bad := slices.Clone(old)
		bad[i] ^= 1 << (i % 8)
		write(t, fs, "/cache/index", bad)
		c := mustOpen(t, cfg)
		if s := c.Stats(); s.DiskUsed != 0 || s.Objects != 0 {
			t.Fatalf("an index with byte %d changed was taken", i)
		}
		check(t, c.Close())
	}
	write(t, fs, "/cache/index", old[:len(old)-1])
	c = mustOpen(t, cfg)
	fill(c, 0, 6)
	check(t, c.Close())
}

func read(t testing.TB, fs vfs.FS, name string) []byte {
	t.Helper()
	f, err := fs.OpenFile(name, os.O_RDONLY, 0)
	check(t, err)
	size, err := f.Size()
	check(t, err)
	p := make([]byte, size)
	_, err = f.ReadAt(p, 0)
	check(t, err)
	check(t, f.Close())
	return p
}

func write(t testing.TB, fs vfs.FS, name string, p []byte) {
	t.Helper()
	f, err := fs.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	check(t, err)
	_, err = f.WriteAt(p, 0)
	check(t, err)
	check(t, f.Close())
}

// TestObjectDeletedAfterTheIndexWasSaved is not found by its lines after a restart.
func TestObjectDeletedAfterTheIndexWasSaved(t *testing.T) {
	fs, mem := vfs.NewMem(1), backendtest.NewMem()
	data := put(t, mem, "v/a/00/1-1-0", mib)
	cfg := Config{FS: fs, Bytes: 4 * mib, RAMBytes: mib}
	c := mustOpen(t, cfg)
	b := c.Wrap(poolID, keepOpen{mem})
	o := open(t, b, "v/a/00/1-1-0")
	want(t, o, data, 0, mib)
	check(t, o.Close())
	check(t, b.Close())
	check(t, c.Close())
	check(t, mem.Delete(t.Context(), "v/a/00/1-1-0"))

	c = mustOpen(t, cfg)
	b = c.Wrap(poolID, keepOpen{mem})
	if _, err := b.Open(t.Context(), "v/a/00/1-1-0"); !errors.Is(err, backend.ErrNotExist) {
		t.Errorf("open of an object that is cached and gone: %v", err)
	}
	if s := c.Stats(); s.DiskUsed != 0 || s.Objects != 0 {
		t.Errorf("its lines are kept: %+v", s)
	}
	check(t, b.Close())
	check(t, c.Close())
}

// TestNameMadeAgain reads an object whose name had other bytes before, through a handle from then and a new one.
func TestNameMadeAgain(t *testing.T) {
	mem := backendtest.NewMem()
	c := mustOpen(t, Config{RAMBytes: 4 * mib, Bytes: 4 * mib, KeepWrites: true})
	b := c.Wrap(poolID, mem)
	old := bytes.Repeat([]byte{1}, 300_000)
	check(t, b.Put(t.Context(), "x", old))
	o := open(t, b, "x")
	want(t, o, old, 0, 100_000)
	check(t, b.Delete(t.Context(), "x"))
	now := bytes.Repeat([]byte{2}, 300_000)
	check(t, b.Put(t.Context(), "x", now))
	_ = o.ReadAt(t.Context(), make([]byte, 300_000), 0)
	fresh := open(t, b, "x")
	for range 3 {
		want(t, fresh, now, 0, len(now))
		settle(t, c)
	}
	check(t, o.Close())
	check(t, fresh.Close())
	check(t, b.Close())
	check(t, c.Close())
}

// TestFailingDiskIsNoError fails each call on the SSD once, and then all from there on: readers get their bytes.
func TestFailingDiskIsNoError(t *testing.T) {
	for _, times := range []int64{1, 0} {
		for _, err := range []error{syscall.EIO, syscall.ENOSPC} {
			for n := int64(1); n < 60; n++ {
				e := vfs.NewErrors(vfs.NewMem(1))
				hit := e.Inject(vfs.Fault{From: n, Times: times, Err: err})
				useDisk(t, e)
				if hit.Fired() == 0 {
					break
				}
			}
		}
	}
	e := vfs.NewErrors(vfs.NewMem(1))
	e.Inject(vfs.Fault{Op: vfs.OpWrite, Path: "lines", Err: syscall.ENOSPC})
	c := mustOpen(t, Config{FS: e, Bytes: 4 * mib})
	b := c.Wrap(poolID, backendtest.NewMem())
	data := put(t, b, "x", mib)
	o := open(t, b, "x")
	want(t, o, data, 0, mib)
	settle(t, c)
	want(t, o, data, 0, mib)
	if s := c.Stats(); s.DiskOff == "" {
		t.Errorf("a full disk raises no alarm: %+v", s)
	}
	check(t, o.Close())
	check(t, b.Close())
	check(t, c.Close())
}

func useDisk(t *testing.T, fs vfs.FS) {
	mem := backendtest.NewMem()
	for round := range 2 {
		c := mustOpen(t, Config{FS: fs, Bytes: 2 * mib, KeepWrites: true})
		b := c.Wrap(poolID, keepOpen{mem})
		if round == 0 {
			put(t, b, "x", 300_000)
		}
		data := content("x", 300_000)
		o := open(t, b, "x")
		for range 2 {
			for off := 0; off < 300_000; off += 100_000 {
				want(t, o, data, off, 100_000)
			}
			settle(t, c)
		}
		check(t, o.Close())
		check(t, b.Close())
		_ = c.Close() // may fail to save its index
	}
}

// TestDiskThatLies: reads of the cache file that return nothing, old or shifted bytes, writes that do not happen.
func TestDiskThatLies(t *testing.T) {
	for _, fault := range []vfs.Fault{
		{Op: vfs.OpRead, Drop: true}, {Op: vfs.OpRead, Shift: 4128}, {Op: vfs.OpRead, Flip: true}, {Op: vfs.OpRead, Shift: 66048},
		{Op: vfs.OpWrite, Drop: true}, {Op: vfs.OpWrite, Shift: 4128}, {Op: vfs.OpWrite, Shift: 66048}, {Op: vfs.OpWrite, Flip: true},
	} {
		fault.Path = "lines"
		e := vfs.NewErrors(vfs.NewMem(1))
		hit := e.Inject(fault)
		useDisk(t, e)
		if hit.Fired() == 0 {
			t.Errorf("%+v did not happen", fault)
		}
	}
}

// TestPowerCuts cuts the power before every call that changes the cache's files. After a restart every byte is right.
func TestPowerCuts(t *testing.T) {
	m := vfs.NewMem(7)
	var images []*vfs.Mem
	m.OnCall(func(c vfs.Call) {
		for i, survive := range []float64{0, 0.5, 1} {
			images = append(images, m.Crash(c.Seq*3+int64(i), survive))
		}
	})
	mem := backendtest.NewMem()
	work := func(fs vfs.FS) {
		c := mustOpen(t, Config{FS: fs, Bytes: 512 * kib, LineBytes: 16 * kib})
		b := c.Wrap(poolID, keepOpen{mem})
		for i := range 6 {
			name := fmt.Sprintf("v/a/00/1-%d-0", i)
			data := content(name, 200_000)
			if _, err := mem.Stat(t.Context(), name); err != nil {
				check(t, mem.Put(t.Context(), name, data))
			}
			o := open(t, b, name)
			for off := 0; off+20_000 <= len(data); off += 20_000 {
				want(t, o, data, off, 20_000)
			}
			check(t, o.Close())
			if i == 3 {
				settle(t, c)
				check(t, c.ssd.save())
			}
		}
		settle(t, c)
		check(t, b.Close())
		check(t, c.Close())
	}
	work(m)
	m.OnCall(nil)
	for _, image := range images {
		work(image)
	}
	t.Logf("%d images", len(images))
}

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

// TestDiscard throws away what a reader found wrong: here the backend itself had given wrong bytes once.
func TestDiscard(t *testing.T) {
	fault := backendtest.NewFault(backendtest.NewMem())
	data := put(t, fault, "x", mib)
	c := mustOpen(t, Config{RAMBytes: 4 * mib, Bytes: 4 * mib})
	b := c.Wrap(poolID, fault)
	o := open(t, b, "x")
	fault.Add(backendtest.Spoil{Op: backendtest.OpRead, Times: 1, Flip: true})
	p := make([]byte, mib)
	check(t, o.ReadAt(t.Context(), p, 0))
	if bytes.Equal(p, data) {
		t.Fatal("no bit was flipped")
	}
	settle(t, c)
	o.Discard(0, mib)
	want(t, o, data, 0, mib)
	if s := c.Stats(); s.Discarded != 16 {
		t.Errorf("%d lines are counted as discarded", s.Discarded)
	}
	check(t, o.Close())
	check(t, b.Close())
	check(t, c.Close())
}

// TestScrubReadsTheBackend: what it verifies must not come from the cache, and what it writes or reads must not go there.
func TestScrubReadsTheBackend(t *testing.T) {
	mem := backendtest.NewMem()
	data := put(t, mem, "v/a/1", mib)
	c := mustOpen(t, Config{RAMBytes: 4 * mib, Bytes: 8 * mib, KeepWrites: true})
	b := c.Wrap(poolID, mem)
	o := open(t, b, "v/a/1")
	want(t, o, data, 0, mib)
	settle(t, c)
	mem.Corrupt("v/a/1", func(p []byte) []byte { p[5000] ^= 1; return p })
	before := c.Stats()
	ctx := backend.WithClass(t.Context(), backend.Scrub)
	again, err := b.Open(ctx, "v/a/1")
	check(t, err)
	p := make([]byte, mib)
	check(t, again.ReadAt(ctx, p, 0))
	if p[5000] == data[5000] {
		t.Error("the scrub was shown the cached copy of a damaged object")
	}
	check(t, b.Put(ctx, "v/a/2", data))
	settle(t, c)
	if after := c.Stats(); after.DiskWritten != before.DiskWritten || after.RAMUsed != before.RAMUsed {
		t.Errorf("the scrub left traces: %+v", after)
	}
	check(t, backend.DeleteAll(ctx, b, []string{"v/a/1", "v/a/2", "v/a/3"}))
	if _, err := b.Open(t.Context(), "v/a/1"); !errors.Is(err, backend.ErrNotExist) {
		t.Errorf("open of an object deleted with others: %v", err)
	}
	check(t, again.Close())
	check(t, o.Close())
	check(t, b.Close())
	check(t, c.Close())
}

// TestWholePutsAreKept: also of an object with more lines than may wait to be written.
func TestWholePutsAreKept(t *testing.T) {
	mem := &counting{Backend: backendtest.NewMem()}
	c := mustOpen(t, Config{FS: vfs.OS(), Dir: t.TempDir(), Bytes: 128 * mib, KeepWrites: true})
	b := c.Wrap(poolID, mem)
	var all [][]byte
	for i := range 3 {
		all = append(all, put(t, b, fmt.Sprint(i), 16*mib))
	}
	settle(t, c)
	for i, data := range all {
		o := open(t, b, fmt.Sprint(i))
		want(t, o, data, 0, len(data))
		check(t, o.Close())
	}
	if s := c.Stats(); mem.reads.Load() > 0 || s.DiskDropped > 0 {
		t.Errorf("%d reads of the backend; %+v", mem.reads.Load(), s)
	}
	check(t, b.Close())
	check(t, c.Close())
}

// TestHitInRAMAllocatesNothing, and is tried without waiting.
func TestHitInRAMAllocatesNothing(t *testing.T) {
	c := mustOpen(t, Config{RAMBytes: 32 * mib})
	b := c.Wrap(poolID, backendtest.NewMem())
	data := put(t, b, "v/a/00/1-1-0", 16*mib)
	o := open(t, b, "v/a/00/1-1-0")
	want(t, o, data, 0, len(data))
	settle(t, c)
	p, ctx, i := make([]byte, 4096), context.Background(), 0
	if n := testing.AllocsPerRun(1000, func() {
		i++
		off := int64(i*7919%4096) * 4096
		if err := o.TryReadAt(p, off); err != nil {
			t.Fatal(err)
		}
		if err := o.ReadAt(ctx, p, off); err != nil {
			t.Fatal(err)
		}
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
	check(t, o.Close())
	check(t, b.Close())
	check(t, c.Close())
}

// TestRandomReadsFetchOnce: cold random reads of 4 KiB cost one request each, and no reading ahead.
func TestRandomReadsFetchOnce(t *testing.T) {
	mem := &counting{Backend: backendtest.NewMem()}
	rnd := rand.New(rand.NewPCG(1, 1))
	const objects, size = 40, 4 * mib
	var handles []*object
	c := mustOpen(t, Config{RAMBytes: 64 * mib})
	b := c.Wrap(poolID, mem)
	zeros := make([]byte, size)
	for i := range objects {
		check(t, b.Put(t.Context(), fmt.Sprintf("v/a/%d", i), zeros))
		handles = append(handles, open(t, b, fmt.Sprintf("v/a/%d", i)))
	}
	const reads = 3000
	p, missed := make([]byte, 4096), int64(0)
	for range reads {
		o, off := handles[rnd.IntN(objects)], rnd.Int64N(size/4096)*4096
		if !b.(*store).cached(o, c.lineAt(off)) {
			missed++
		}
		check(t, o.ReadAt(t.Context(), p, off))
	}
	settle(t, c)
	if n := mem.reads.Load(); float64(n) > 1.02*float64(missed) {
		t.Errorf("%d requests for %d misses", n, missed)
	}
	t.Logf("%d reads, %d misses, %d requests, %d exact, %d prefetched", reads, missed, mem.reads.Load(), c.Stats().Exact, c.Stats().Prefetched)
	for _, o := range handles {
		check(t, o.Close())
	}
	check(t, b.Close())
	check(t, c.Close())
}

// TestSequentialReadIsAhead reads cold objects from start to end through a backend of 20 ms a request: most reads find their
// bytes there, and at most aheadMax requests are ahead.
func TestSequentialReadIsAhead(t *testing.T) {
	fault := backendtest.NewFault(backendtest.NewMem())
	var inFlight, most atomic.Int64
	mem := &counting{Backend: fault}
	mem.gate = func() {
		n := inFlight.Add(1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		time.Sleep(20 * time.Millisecond)
		inFlight.Add(-1)
	}
	const objects, size = 3, 16 * mib
	c := mustOpen(t, Config{RAMBytes: 64 * mib})
	b := c.Wrap(poolID, mem)
	var all [][]byte
	for i := range objects {
		all = append(all, put(t, b, fmt.Sprintf("v/a/%d", i), size))
	}
	started := time.Now()
	for i, data := range all {
		o := open(t, b, fmt.Sprintf("v/a/%d", i))
		for off := 0; off < size; off += 128 * kib {
			want(t, o, data, off, 128*kib)
		}
		check(t, o.Close())
	}
	took := time.Since(started)
	// Alone, 384 reads of 128 KiB would take 7.7 s.
	if took > 2500*time.Millisecond || most.Load() > aheadMax+1 {
		t.Errorf("%v, %d requests at once", took, most.Load())
	}
	t.Logf("48 MiB in %v, %d requests, at most %d at once", took, mem.reads.Load(), most.Load())
	check(t, b.Close())
	check(t, c.Close())
}

// zipf draws lines of a hot set with s near 1.
type zipf struct{ cdf []float64 }

func newZipf(n int, s float64) zipf {
	z := zipf{make([]float64, n)}
	sum := 0.0
	for i := range n {
		sum += 1 / math.Pow(float64(i+1), s)
		z.cdf[i] = sum
	}
	for i := range z.cdf {
		z.cdf[i] /= sum
	}
	return z
}

func (z zipf) draw(rnd *rand.Rand) int {
	i, _ := slices.BinarySearch(z.cdf, rnd.Float64())
	return min(i, len(z.cdf)-1)
}

// TestScanLeavesTheHotSet reads zipf-distributed lines, alone and beside a backup that reads everything once: the hit ratio of
// the guest must stay, and prints beside that of an LRU list.
func TestScanLeavesTheHotSet(t *testing.T) {
	const objects, size, room = 16, 4 * mib, 4 * mib
	line := 4 * kib
	perObject := size / line
	run := func(scan bool, scanBytes int64) (hit, lru float64) {
		rnd := rand.New(rand.NewPCG(5, 5))
		c := mustOpen(t, Config{RAMBytes: room, LineBytes: line, ScanBytes: scanBytes})
		b := c.Wrap(poolID, backendtest.NewMem())
		zeros := make([]byte, size)
		var handles []*object
		for i := range objects {
			check(t, b.Put(t.Context(), fmt.Sprintf("v/a/%d", i), zeros))
			handles = append(handles, open(t, b, fmt.Sprintf("v/a/%d", i)))
		}
		z := newZipf(objects*perObject, 1)
		place := rnd.Perm(objects * perObject)
		old := newLRU(room / line)
		p, big := make([]byte, line), make([]byte, 64*kib)
		hits, lruHits, reads, scanned := 0, 0, 0, 0
		for i := range 120_000 {
			l := place[z.draw(rnd)]
			o, off := handles[l/perObject], int64(l%perObject)*int64(line)
			counted := i > 40_000
			cached := b.(*store).cached(o, c.lineAt(off))
			check(t, o.ReadAt(t.Context(), p, off))
			inLRU := old.touch(l)
			if counted {
				reads++
				if cached {
					hits++
				}
				if inLRU {
					lruHits++
				}
			}
			if scan && i%4 == 0 { // 64 KiB of backup for each 16 KiB of guest
				at := scanned * 16
				so := handles[at/perObject%objects]
				check(t, so.ReadAt(t.Context(), big, int64(at%perObject)*int64(line)))
				for k := range 16 {
					old.touch((at + k) % (objects * perObject))
				}
				scanned++
			}
		}
		for _, o := range handles {
			check(t, o.Close())
		}
		check(t, b.Close())
		check(t, c.Close())
		return float64(hits) / float64(reads), float64(lruHits) / float64(reads)
	}
	alone, lruAlone := run(false, 8*mib)
	beside, lruBeside := run(true, 8*mib)
	unseen, _ := run(true, 1<<40) // the scan is not recognised: the policy alone
	t.Logf("hit ratio of a zipf guest, cache 1/16 of the data: alone %.3f (LRU %.3f), beside a scan %.3f (LRU %.3f), policy alone %.3f",
		alone, lruAlone, beside, lruBeside, unseen)
	if beside < alone-0.05 || beside < lruBeside+0.15 || alone < lruAlone-0.01 {
		t.Errorf("alone %.3f, beside a scan %.3f; LRU %.3f, %.3f", alone, beside, lruAlone, lruBeside)
	}
}

// lru is what the policy is compared with.
type lru struct {
	room int
	at   map[int]int
	age  []int
	tick int
}

func newLRU(room int) *lru { return &lru{room: room, at: map[int]int{}} }

// touch reads a line: a queue of uses, of which only each line's last counts.
func (l *lru) touch(line int) bool {
	_, hit := l.at[line]
	l.age = append(l.age, line)
	l.at[line] = l.tick + len(l.age) - 1
	for len(l.at) > l.room {
		old := l.age[0]
		if l.at[old] == l.tick {
			delete(l.at, old)
		}
		l.age = l.age[1:]
		l.tick++
	}
	return hit
}

// TestSecondCloneBootsFromTheCache records what a first clone reads and prefetches it in a node that has nothing cached.
func TestSecondCloneBootsFromTheCache(t *testing.T) {
	mem := &counting{Backend: backendtest.NewMem()}
	const objects, size = 8, 4 * mib
	var all [][]byte
	for i := range objects {
		all = append(all, put(t, mem, fmt.Sprintf("v/template/%d", i), size))
	}
	boot := func(b backend.Backend, r *Recorder) {
		rnd := rand.New(rand.NewPCG(3, 3)) // the same reads each time
		for range 400 {
			i := rnd.IntN(objects - 1)
			o, err := b.(Tracer).OpenTraced(t.Context(), fmt.Sprintf("v/template/%d", i), r)
			check(t, err)
			want(t, o, all[i], rnd.IntN(size/4)&^4095, 4096*(1+rnd.IntN(8)))
			check(t, o.Close())
		}
	}
	first := mustOpen(t, Config{RAMBytes: 64 * mib, Bytes: 64 * mib})
	b := first.Wrap(poolID, keepOpen{mem})
	r := NewRecorder(time.Minute)
	boot(b, r)
	r.Stop()
	trace := r.Trace()
	template := uuid.New()
	check(t, first.SaveTrace(template, trace))
	saved, err := first.LoadTrace(template)
	check(t, err)
	if !bytes.Equal(saved, trace) || len(trace) == 0 || len(trace) > 4096 {
		t.Fatalf("a trace of %d bytes is loaded with %d", len(trace), len(saved))
	}
	if none, err := first.LoadTrace(uuid.New()); none != nil || err != nil {
		t.Errorf("the trace of an unknown template: %v, %v", none, err)
	}
	before := first.Stats()
	boot(b, nil)
	settle(t, first)
	if after := first.Stats(); after.Fetches != before.Fetches {
		t.Errorf("the second clone fetched %d times", after.Fetches-before.Fetches)
	}
	check(t, b.Close())
	check(t, first.Close())

	other := mustOpen(t, Config{RAMBytes: 64 * mib})
	b = other.Wrap(poolID, keepOpen{mem})
	n, err := b.(Tracer).PrefetchTrace(t.Context(), saved)
	check(t, err)
	settle(t, other)
	before = other.Stats()
	boot(b, nil)
	after := other.Stats()
	misses, lines := after.Misses-before.Misses, after.RAMHits-before.RAMHits
	t.Logf("boot trace of %d bytes for %d KiB; then %d of %d lines hit", len(trace), n>>10, lines, lines+misses)
	if misses*20 > lines {
		t.Errorf("%d misses, %d hits after the prefetch", misses, lines)
	}
	check(t, b.Close())
	check(t, other.Close())
}

// TestWastefulFetchesShrink reads far more data than fits, at random: when whole lines turn out to be of little use, the first
// read of a line fetches its own bytes only, and the second the line.
func TestWastefulFetchesShrink(t *testing.T) {
	mem := &counting{Backend: backendtest.NewMem()}
	c := mustOpen(t, Config{RAMBytes: 2 * mib})
	b := c.Wrap(poolID, mem)
	const objects, size = 16, 16 * mib
	zeros := make([]byte, size)
	var handles []*object
	for i := range objects {
		check(t, b.Put(t.Context(), fmt.Sprint(i), zeros))
		handles = append(handles, open(t, b, fmt.Sprint(i)))
	}
	rnd := rand.New(rand.NewPCG(1, 1))
	p := make([]byte, 4096)
	for range 3000 {
		check(t, handles[rnd.IntN(objects)].ReadAt(t.Context(), p, rnd.Int64N(size/4096)*4096))
	}
	s := c.Stats()
	if s.Exact < 1500 {
		t.Errorf("%d of 3000 reads fetched just their bytes", s.Exact)
	}
	o, before := handles[0], c.Stats().Misses
	for off := int64(0); off < 4; off++ {
		check(t, o.ReadAt(t.Context(), p, 5*mib+off*4096))
	}
	if got := c.Stats().Misses - before; got != 1 {
		t.Errorf("%d lines were fetched for four reads of one", got)
	}
	for _, o := range handles {
		check(t, o.Close())
	}
	check(t, b.Close())
	check(t, c.Close())
}

func TestMetricsAreRegisteredAndUnregistered(t *testing.T) {
	reg := prometheus.NewRegistry()
	for range 2 {
		c := mustOpen(t, Config{RAMBytes: mib, Metrics: reg})
		families, err := reg.Gather()
		check(t, err)
		if len(families) < 15 {
			t.Errorf("%d metrics", len(families))
		}
		if _, err := Open(Config{RAMBytes: mib, Metrics: reg}); err == nil {
			t.Error("two caches share a registry")
		}
		check(t, c.Close())
	}
	if families, err := reg.Gather(); err != nil || len(families) > 0 {
		t.Errorf("%d metrics are left, %v", len(families), err)
	}
}

// TestOnARealFile runs through the operating system's files.
func TestOnARealFile(t *testing.T) {
	dir, mem := t.TempDir(), backendtest.NewMem()
	data := put(t, mem, "v/a/00/1-1-0", 4*mib)
	for round := range 2 {
		c := mustOpen(t, Config{FS: vfs.OS(), Dir: dir, Bytes: 16 * mib})
		b := c.Wrap(poolID, keepOpen{mem})
		o := open(t, b, "v/a/00/1-1-0")
		want(t, o, data, 0, len(data))
		settle(t, c)
		p := make([]byte, 4096)
		if err := o.TryReadAt(p, 40_960); err == nil && !bytes.Equal(p, data[40_960:45_056]) || err != nil && !errors.Is(err, vfs.ErrWouldBlock) {
			t.Errorf("tried read: %v", err)
		}
		if s := c.Stats(); round == 1 && (s.Fetches > 0 || s.DiskHits < 64) || s.DiskOff != "" {
			t.Errorf("round %d: %+v", round, s)
		}
		check(t, o.Close())
		check(t, b.Close())
		if _, err := b.Open(t.Context(), "v/a/00/1-1-0"); !errors.Is(err, fs.ErrClosed) {
			t.Errorf("open after close: %v", err)
		}
		if err := o.ReadAt(t.Context(), p, int64(len(data))); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("read beyond the end: %v", err)
		}
		check(t, c.Close())
	}
}

func FuzzTrace(f *testing.F) {
	r := NewRecorder(time.Hour)
	defer r.Stop()
	o := &object{name: "v/a/1", size: 5 * mib}
	o.trace(r.object("v/a/1", o.size), 100_000, 300_000)
	f.Add(r.Trace())
	f.Add([]byte("VTR1\x01\x01a\x01\x00\x01\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		runs, err := parseTrace(b)
		if err != nil {
			return
		}
		for _, r := range runs {
			if r.off < 0 || r.n < 0 || r.off+r.n > traceObjectBytes || backend.CheckName(r.name) != nil {
				t.Errorf("%+v", r)
			}
		}
	})
}

func BenchmarkHitInRAM(b *testing.B) {
	c := mustOpen(b, Config{RAMBytes: 32 * mib})
	w := c.Wrap(poolID, backendtest.NewMem())
	data := put(b, w, "v/a/00/1-1-0", 16*mib)
	o := open(b, w, "v/a/00/1-1-0")
	want(b, o, data, 0, len(data))
	settle(b, c)
	p, i := make([]byte, 4096), 0
	b.SetBytes(4096)
	b.ReportAllocs()
	for b.Loop() {
		i++
		if err := o.TryReadAt(p, int64(i*7919%4096)*4096); err != nil {
			b.Fatal(err)
		}
	}
	check(b, o.Close())
	check(b, w.Close())
	check(b, c.Close())
}

func BenchmarkHitOnDisk(b *testing.B) {
	c := mustOpen(b, Config{FS: vfs.OS(), Dir: b.TempDir(), Bytes: 32 * mib})
	w := c.Wrap(poolID, backendtest.NewMem())
	data := put(b, w, "v/a/00/1-1-0", 16*mib)
	o := open(b, w, "v/a/00/1-1-0")
	want(b, o, data, 0, len(data))
	settle(b, c)
	p, i := make([]byte, 4096), 0
	b.SetBytes(4096)
	b.ReportAllocs()
	for b.Loop() {
		i++
		if err := o.ReadAt(context.Background(), p, int64(i*7919%4096)*4096); err != nil {
			b.Fatal(err)
		}
	}
	check(b, o.Close())
	check(b, w.Close())
	check(b, c.Close())
}
