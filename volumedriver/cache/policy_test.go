package cache

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"varve/volumedriver/backend/backendtest"
	"varve/volumedriver/vfs"
)

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
	c := mustOpen(t, Config{RAMBytes: 256 * mib, Successor: func(name string) string {
		return fmt.Sprintf("v/a/%c", name[len(name)-1]+1)
	}})
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
	// Alone, 384 reads of 128 KiB would take 7.7 s. The one after the last is asked for in vain.
	if took > 2500*time.Millisecond || most.Load() > 2*aheadMax || mem.opens.Load() > objects+2 {
		t.Errorf("%v, %d requests at once, %d opens", took, most.Load(), mem.opens.Load())
	}
	t.Logf("48 MiB in %v, %d requests, at most %d at once, %d opens", took, mem.reads.Load(), most.Load(), mem.opens.Load())
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
		for i := range 80_000 {
			l := place[z.draw(rnd)]
			o, off := handles[l/perObject], int64(l%perObject)*int64(line)
			counted := i > 30_000
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
	if beside < alone-0.07 || beside < lruBeside+0.15 || alone < lruAlone-0.01 {
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
