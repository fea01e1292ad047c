package cache

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
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
