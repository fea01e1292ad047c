package blockmap

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"varve/volumedriver/blockio"
	"varve/volumedriver/vfs"
)

// stored counts the versions of leaves and pages that Pebble has of a handle.
func stored(t *testing.T, s *Store, h Handle) (leaves, pages int) {
	t.Helper()
	m, err := s.newImage()
	ok(t, err)
	m.leaves.SetBounds(numberKey('l', h, 0), numberKey('l', h+1, 0))
	for more := m.leaves.First(); more; more = m.leaves.Next() {
		leaves++
	}
	m.pages.SetBounds(numberKey('b', h, 0), numberKey('b', h+1, 0))
	for more := m.pages.First(); more; more = m.pages.Next() {
		pages++
	}
	ok(t, m.close())
	return leaves, pages
}

// TestReleaseDeletes: whatever the order in which snapshots are made and deleted, there are no versions but those that can be read.
// Where leaves are cleared, there may be some that were written and cleared in the same generation.
func TestReleaseDeletes(t *testing.T) {
	const leaves = 300
	for name, c := range map[string]struct {
		keep  int
		clear bool
	}{"none is kept": {0, false}, "one is kept": {1, false}, "three are kept": {3, false}, "with clears": {2, true}} {
		t.Run(name, func(t *testing.T) {
			s := openStore(t, vfs.NewMem(1), 0)
			defer closeStore(t, s)
			h := handle(t, s)
			scatter(t, s, h, leaves, 1)
			var live []uint32
			r := rand.New(rand.NewPCG(1, 2))
			for i := range 100 {
				for range 20 {
					ok(t, s.Set(h, r.Uint64N(leaves)*LeafBlocks, MakeRef(uint32(i+2), 1), 1))
					if c.clear {
						ok(t, s.Clear(h, r.Uint64N(leaves)*LeafBlocks, LeafBlocks))
					}
				}
				gen, err := s.Freeze(h, nil)
				ok(t, err)
				live = append(live, gen)
				for len(live) > c.keep {
					k := r.IntN(len(live))
					n := []uint32{0, live[k], gen + 1}
					if k > 0 {
						n[0] = live[k-1]
					}
					if k+1 < len(live) {
						n[2] = live[k+1]
					}
					ok(t, s.Release(h, n[1], n[0], n[2]))
					live = slices.Delete(live, k, k+1)
				}
				visible := 0
				ok(t, s.EachVersion(context.Background(), h, live, func(_ uint64, versions []Version) error {
					visible += len(versions)
					return nil
				}))
				l, p := stored(t, s, h)
				if i > 3 && !c.clear && l != visible || l > visible+leaves*(c.keep+1) || p > len(live)+2 {
					t.Fatalf("%d snapshots, %d leaves and %d pages are stored, %d leaves can be read", len(live), l, p, visible)
				}
			}
			ok(t, s.Check())
			ok(t, s.Clear(h, 0, MaxBlocks)) // and without blocks, without versions
			gen, err := s.Freeze(h, nil)
			ok(t, err)
			live = append(live, gen)
			for i, gen := range live[:len(live)-1] {
				ok(t, s.Release(h, gen, 0, live[i+1]))
			}
			if l, p := stored(t, s, h); len(live) > 1 && l != 0 || p > 2 {
				t.Fatalf("%d leaves and %d pages are stored of a snapshot of nothing", l, p)
			}
		})
	}
}

// TestReleaseDuringFlush: a leaf that was cleared, and is written again while Release looks for versions that nobody sees.
func TestReleaseDuringFlush(t *testing.T) {
	s := openStore(t, vfs.NewMem(1), 0)
	defer closeStore(t, s)
	h := handle(t, s)
	const leaves = 1500
	for i := range uint32(8) {
		scatter(t, s, h, leaves, 3*i+1)
		gen, err := s.Freeze(h, nil)
		ok(t, err)
		scatter(t, s, h, leaves, 3*i+2)
		ok(t, s.Flush(h))
		ok(t, s.Clear(h, 0, MaxBlocks))
		var release sync.WaitGroup
		release.Go(func() { check(t, s.Release(h, gen, 0, gen+1)) })
		ordinal := 3*i + 3
		for leaf := uint64(leaves); leaf > 0; leaf-- {
			ok(t, s.Set(h, (leaf-1)*LeafBlocks+uint64(ordinal), MakeRef(ordinal, uint32(leaf-1)), 1))
			if leaf%50 == 0 {
				ok(t, s.Flush(h))
			}
		}
		release.Wait()
		gen, err = s.Freeze(h, nil)
		ok(t, err)
		v, err := s.OpenView(h, gen)
		ok(t, err)
		refs := make([]Ref, 1)
		for leaf := range uint64(leaves) {
			ok(t, s.Lookup(v, leaf*LeafBlocks+uint64(ordinal), refs))
			if refs[0] != MakeRef(ordinal, uint32(leaf)) {
				t.Fatalf("round %d, leaf %d: %x", i, leaf, refs[0])
			}
		}
		ok(t, s.DropVolume(v))
		ok(t, s.Release(h, gen, 0, gen+1))
		ok(t, s.Clear(h, 0, MaxBlocks))
	}
}

// TestReleaseOvertakenByFreeze: the head that Release was told of is frozen before Release gets to it. It stays a neighbour like
// another, and a clear must not take it for free.
func TestReleaseOvertakenByFreeze(t *testing.T) {
	s := openStore(t, vfs.NewMem(1), 0)
	defer closeStore(t, s)
	h := handle(t, s)
	scatter(t, s, h, 100, 1)
	first, err := s.Freeze(h, nil)
	ok(t, err)
	second, err := s.Freeze(h, nil)
	ok(t, err)
	ok(t, s.merge(s.peek(h), 0, second))
	ok(t, s.Release(h, first, 0, second))
	ok(t, s.Clear(h, 0, MaxBlocks))
	v, err := s.OpenView(h, second)
	ok(t, err)
	refs := make([]Ref, 1)
	for leaf := range uint64(100) {
		ok(t, s.Lookup(v, leaf*LeafBlocks+1, refs))
		if refs[0] != MakeRef(1, uint32(leaf)) {
			t.Fatalf("leaf %d: %x", leaf, refs[0])
		}
	}
}

// TestReleaseHeadNote: the note that makes the core call again is there until all is deleted.
func TestReleaseHeadNote(t *testing.T) {
	deleted := 0
	for n := range 200 {
		mem := vfs.NewMem(int64(n))
		s := openStore(t, mem, 0)
		h := handle(t, s)
		scatter(t, s, h, 5, 1)
		gen, err := s.Freeze(h, []KV{{[]byte("note"), nil}})
		ok(t, err)
		scatter(t, s, h, 50, 2)
		ok(t, s.Checkpoint(nil, nil))
		cut := cutAt(mem, n%8, int64(n), float64(n%3)/2)
		ok(t, s.ReleaseHead(h, gen, []KV{{[]byte("root"), nil}}, [][]byte{[]byte("note")}))
		ok(t, s.Put([]KV{{[]byte("later"), nil}}, true))
		disk := cut()
		closeStore(t, s)
		if disk == nil {
			continue
		}
		s = openStore(t, disk, 0)
		_, noted := s.Get([]byte("note"))
		_, rooted := s.Get([]byte("root"))
		_, open := s.opened(h)
		if (rooted == nil) != errors.Is(open, ErrHandle) {
			t.Fatalf("metadata %v, head %v", rooted, open)
		}
		if l, _ := stored(t, s, h); errors.Is(noted, ErrNotFound) {
			deleted++
			if l != 5 {
				t.Fatalf("%d leaves are stored, and nobody knows", l)
			}
		}
		closeStore(t, s)
	}
	if deleted == 0 {
		t.Fatal("never done")
	}
}

// TestForkReleasesEverything: a fork that is dropped, and a head that is given up, leave nothing.
func TestForkReleasesEverything(t *testing.T) {
	s := openStore(t, vfs.NewMem(1), 0)
	defer closeStore(t, s)
	h := handle(t, s)
	scatter(t, s, h, 100, 1)
	gen, err := s.Freeze(h, nil)
	ok(t, err)
	scatter(t, s, h, 100, 2)
	child, err := s.Fork(h, gen, nil)
	ok(t, err)
	if p, at, forked, err := s.Parent(child); err != nil || !forked || p != h || at != gen {
		t.Fatal(p, at, forked, err)
	}
	if _, _, forked, err := s.Parent(h); err != nil || forked {
		t.Fatal(forked, err)
	}
	ok(t, s.Set(child, 7*LeafBlocks, MakeRef(9, 9), 3))
	if l, p := stored(t, s, child); l != 0 || p != 0 {
		t.Fatalf("fork stored %d leaves and %d pages before it was flushed", l, p)
	}
	ok(t, s.Flush(child))
	if l, p := stored(t, s, child); l != 1 || p != 1 {
		t.Fatalf("fork stored %d leaves and %d pages after one was changed", l, p)
	}
	for _, err := range []error{s.DropVolume(h), s.Release(h, gen, 0, gen+1)} {
		if !errors.Is(err, ErrInUse) {
			t.Fatal(err)
		}
	}
	ok(t, s.ReleaseHead(h, gen, nil, nil)) // rollback to gen
	if l, _ := stored(t, s, h); l != 100 {
		t.Fatalf("%d leaves of the parent are stored, want 100", l)
	}
	refs := make([]Ref, 1)
	ok(t, s.Lookup(child, 8*LeafBlocks+1, refs))
	if refs[0] != MakeRef(1, 8) {
		t.Fatalf("%x", refs[0])
	}
	ok(t, s.DropVolume(child))
	ok(t, s.DropVolume(h))
	for _, h := range []Handle{h, child} {
		if l, p := stored(t, s, h); l != 0 || p != 0 {
			t.Fatalf("%d leaves and %d pages are left", l, p)
		}
	}
	if _, err := s.OpenView(child, 1); !errors.Is(err, ErrGeneration) {
		t.Fatal(err)
	}
	ok(t, s.Check())
}

// TestTrim1TiBWithSnapshots: as without, and the snapshots do not lose anything by it.
func TestTrim1TiBWithSnapshots(t *testing.T) {
	s := openStore(t, vfs.NewMem(1), 64<<20)
	defer closeStore(t, s)
	h := handle(t, s)
	const leaves = 1 << 19
	best := time.Hour
	var gens []uint32
	for try := 0; try < 4 && (try == 0 || best > 100*time.Millisecond); try++ { // others may be using the machine
		scatter(t, s, h, leaves, uint32(try+1))
		gen, err := s.Freeze(h, nil)
		ok(t, err)
		gens = append(gens, gen)
		scatter(t, s, h, leaves/2, uint32(try+100))
		best = min(best, cpuTime(t, func() { ok(t, s.Clear(h, 0, leaves*LeafBlocks)) }))
		if _, found, err := s.NextMapped(h, 0, MaxBlocks); err != nil || found {
			t.Fatal(found, err)
		}
	}
	t.Logf("clear of 1 TiB with a snapshot: %v", best)
	if best > 100*time.Millisecond {
		t.Fatalf("clear took %v", best)
	}
	for i, gen := range gens {
		v, err := s.OpenView(h, gen)
		ok(t, err)
		refs := make([]Ref, 1)
		for leaf := uint64(0); leaf < leaves; leaf += 1777 {
			ok(t, s.Lookup(v, leaf*LeafBlocks+uint64(i+1), refs))
			if refs[0] != MakeRef(uint32(i+1), uint32(leaf%4096)) {
				t.Fatalf("leaf %d of snapshot %d: %x", leaf, i, refs[0])
			}
		}
		ok(t, s.DropVolume(v))
	}
	ok(t, s.Check())
}

// TestManyGenerations: ten thousand snapshots of one volume, each leaf changed in most of them.
func TestManyGenerations(t *testing.T) {
	fs := vfs.NewMem(1)
	s := openStore(t, fs, 0)
	h := handle(t, s)
	const gens, leaves = 10_000, 8
	for i := range uint32(gens) {
		ok(t, s.Set(h, uint64(i%leaves)*LeafBlocks, MakeRef(i+1, 5), 1))
		_, err := s.Freeze(h, nil)
		ok(t, err)
	}
	closeStore(t, s)
	s = openStore(t, fs, 0)
	defer closeStore(t, s)
	begin := time.Now()
	refs := make([]Ref, 1)
	for leaf := range uint64(leaves) {
		ok(t, s.Lookup(h, leaf*LeafBlocks, refs))
		if want := uint32(gens - leaves + leaf + 1); refs[0].Ordinal() != want {
			t.Fatalf("leaf %d: %d, want %d", leaf, refs[0].Ordinal(), want)
		}
	}
	head := time.Since(begin)
	begin = time.Now()
	for _, gen := range []uint32{1, 8, 500, 5000, gens} {
		v, err := s.OpenView(h, gen)
		ok(t, err)
		ok(t, s.Lookup(v, uint64((gen-1)%leaves)*LeafBlocks, refs))
		if refs[0].Ordinal() != gen {
			t.Fatalf("generation %d: %d", gen, refs[0].Ordinal())
		}
		ok(t, s.DropVolume(v))
	}
	t.Logf("opening, and reading %d leaves: %v; five views: %v", leaves, head, time.Since(begin))
	if head > 100*time.Millisecond {
		t.Errorf("opening took %v", head)
	}
	n, calls := 0, 0
	live := make([]uint32, gens)
	for i := range live {
		live[i] = uint32(i + 1)
	}
	ok(t, s.EachVersion(context.Background(), h, live, func(_ uint64, versions []Version) error {
		n += len(versions)
		calls++
		return nil
	}))
	if most := leaves * (1 + gens/leaves/versionsAtOnce); n != gens || calls > most {
		t.Fatalf("%d versions in %d calls, want %d in at most %d", n, calls, gens, most)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	err := s.EachVersion(ctx, h, live, func(uint64, []Version) error { return nil })
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
}

// TestFailingFreeze fails each mutating call: what Freeze, Fork and ReleaseHead have confirmed is there after a power cut, and what
// they have not confirmed is there as a whole or not at all.
func TestFailingFreeze(t *testing.T) {
	confirmedAll := 0
	for n := int64(1); ; n++ {
		mem := vfs.NewMem(n)
		e := vfs.NewErrors(mem)
		hit := e.Inject(vfs.Fault{Op: vfs.OpMutating, From: n, Err: syscall.EIO})
		s, err := Open(Config{FS: e, Dir: "/map", memTableBytes: 64 << 10})
		if err != nil {
			continue
		}
		h, confirmed, child := Handle(1), uint32(0), Handle(0)
		_, err = s.NewHandle()
		for i := uint32(1); i <= 6 && err == nil; i++ {
			for leaf := range uint64(200) {
				if err = s.Set(h, leaf*LeafBlocks, MakeRef(i, uint32(leaf)), 1); err != nil {
					break
				}
			}
			if err == nil {
				if _, err = s.Freeze(h, []KV{{[]byte("frozen"), []byte{byte(i)}}}); err == nil {
					confirmed = i
				}
			}
		}
		if err == nil {
			if child, err = s.Fork(h, confirmed, nil); err == nil {
				err = s.ReleaseHead(h, confirmed, []KV{{[]byte("headless"), nil}}, nil)
			}
		}
		fired := hit.Fired() > 0
		if (s.failure.Load() != nil) != fired || err != nil && !fired {
			t.Fatalf("call %d failed: %v, error %v, store: %v", n, fired, err, s.Err())
		}
		cut := mem.Crash(n, float64(n%3)/2)
		_ = s.Close() // it may complain
		checkFrozen(t, cut, h, confirmed, child)
		if !fired {
			if confirmedAll++; confirmedAll > 1 {
				t.Logf("%d calls", n)
				return
			}
		}
	}
}

func checkFrozen(t *testing.T, fs vfs.FS, h Handle, confirmed uint32, child Handle) {
	t.Helper()
	s := openStore(t, fs, 0)
	defer closeStore(t, s)
	ok(t, s.Check())
	frozen, err := s.Get([]byte("frozen"))
	if errors.Is(err, ErrNotFound) {
		frozen = []byte{0}
	} else {
		ok(t, err)
	}
	if frozen[0] < byte(confirmed) {
		t.Fatalf("generation %d was confirmed, found %d", confirmed, frozen[0])
	}
	if confirmed > 0 {
		gen, err := s.Generation(h)
		ok(t, err)
		if gen != uint32(frozen[0])+1 {
			t.Fatalf("generation %d, its metadata %d", gen, frozen[0])
		}
	}
	refs := make([]Ref, 1)
	look := func(v Handle, want uint32) {
		t.Helper()
		for leaf := range uint64(200) {
			ok(t, s.Lookup(v, leaf*LeafBlocks, refs))
			if refs[0] != MakeRef(want, uint32(leaf)) {
				t.Fatalf("leaf %d at generation %d: %x", leaf, want, refs[0])
			}
		}
	}
	for gen := uint32(1); gen <= uint32(frozen[0]); gen++ {
		v, err := s.OpenView(h, gen)
		ok(t, err)
		look(v, gen)
	}
	if child != 0 {
		look(child, confirmed)
	}
}

// TestFreezeOnFullDisk: it fails, nothing has happened, and it may be tried again.
func TestFreezeOnFullDisk(t *testing.T) {
	for _, cleared := range []uint64{0, 20} {
		mem := vfs.NewMem(1)
		s := openStore(t, mem, 0)
		h := handle(t, s)
		scatter(t, s, h, 50, 1)
		first, err := s.Freeze(h, nil)
		ok(t, err)
		ok(t, s.Clear(h, 0, cleared*LeafBlocks))
		scatter(t, s, h, 10, 2)
		mem.SetCapacity(reserveBytes)
		s.unchecked.Store(0)
		for range 3 {
			if _, err := s.Freeze(h, nil); !errors.Is(err, blockio.ErrNoSpace) {
				t.Fatalf("freeze on a full disk: %v", err)
			}
			if err := s.Release(h, first, 0, first+1); !errors.Is(err, blockio.ErrNoSpace) {
				t.Fatalf("release on a full disk: %v", err)
			}
		}
		ok(t, s.Check())
		mem.SetCapacity(0)
		second, err := s.Freeze(h, nil)
		ok(t, err)
		if second != first+1 {
			t.Fatalf("generation %d after %d", second, first)
		}
		cut := mem.Crash(1, 0)
		closeStore(t, s)
		s = openStore(t, cut, 0)
		ok(t, s.Check())
		v, err := s.OpenView(h, first)
		ok(t, err)
		w, err := s.OpenView(h, second)
		ok(t, err)
		for leaf := range uint64(50) {
			old, new := make([]Ref, 3), make([]Ref, 3)
			ok(t, s.Lookup(v, leaf*LeafBlocks, old))
			ok(t, s.Lookup(w, leaf*LeafBlocks, new))
			wantOld, wantNew := []Ref{0, MakeRef(1, uint32(leaf)), 0}, []Ref{0, MakeRef(1, uint32(leaf)), 0}
			if leaf < cleared {
				wantNew[1] = 0
			}
			if leaf < 10 {
				wantNew[2] = MakeRef(2, uint32(leaf))
			}
			if !slices.Equal(old, wantOld) || !slices.Equal(new, wantNew) {
				t.Fatalf("leaf %d: %x and %x, want %x and %x", leaf, old, new, wantOld, wantNew)
			}
		}
		changed := 0
		ok(t, s.Changed(h, first, second, func(uint64) error { changed++; return nil }))
		if want := max(10, int(cleared)); changed != want {
			t.Fatalf("%d leaves changed, want %d", changed, want)
		}
		closeStore(t, s)
	}
}

// TestClearedLeafStaysCleared: a leaf that was cleared, written again and not flushed must not bring back what it was before, when
// its page goes to Pebble before it and the power fails.
func TestClearedLeafStaysCleared(t *testing.T) {
	mem := vfs.NewMem(1)
	s := openStore(t, mem, 0)
	h := handle(t, s)
	ok(t, s.Set(h, 0, MakeRef(1, 0), 100))
	_, err := s.Freeze(h, nil)
	ok(t, err)
	ok(t, s.Set(h, 0, MakeRef(2, 0), 100)) // a version of this generation
	ok(t, s.Checkpoint(nil, nil))
	ok(t, s.Clear(h, 0, LeafBlocks))
	ok(t, s.Checkpoint(nil, nil))
	ok(t, s.Set(h, 50, MakeRef(3, 0), 1)) // applied again after the crash
	ok(t, s.Set(h, LeafBlocks, MakeRef(3, 1), 1))
	mem.SetCapacity(reserveBytes)
	s.unchecked.Store(0)
	if err := s.flushKeys([]uint64{memoryKey(h, 0)}); !errors.Is(err, blockio.ErrNoSpace) { // this does not count
		t.Fatal(err)
	}
	mem.SetCapacity(0)
	ok(t, s.flushKeys([]uint64{memoryKey(h, 1)})) // and with it the page
	ok(t, s.Update([]KV{{[]byte("x"), nil}}, nil))
	cut := mem.Crash(1, 0)
	closeStore(t, s)
	s = openStore(t, cut, 0)
	defer closeStore(t, s)
	ok(t, s.Check())
	ok(t, s.Set(h, 50, MakeRef(3, 0), 1))
	for lba, want := range map[uint64]Ref{5: 0, 50: MakeRef(3, 0), 51: 0, LeafBlocks: MakeRef(3, 1)} {
		refs := make([]Ref, 1)
		ok(t, s.Lookup(h, lba, refs))
		if refs[0] != want {
			t.Fatalf("block %d: %x, want %x", lba, refs[0], want)
		}
	}
}

// TestEmptiedLeafStaysEmpty: likewise for one that was emptied block by block, and whose page has not gone to Pebble.
func TestEmptiedLeafStaysEmpty(t *testing.T) {
	mem := vfs.NewMem(1)
	s := openStore(t, mem, 0)
	h := handle(t, s)
	ok(t, s.Set(h, 0, MakeRef(1, 0), 10))
	_, err := s.Freeze(h, nil)
	ok(t, err)
	ok(t, s.Clear(h, 0, 5))
	ok(t, s.Checkpoint(nil, nil))
	ok(t, s.Clear(h, 5, 5)) // applied again after the crash
	ok(t, s.flushKeys([]uint64{memoryKey(h, 0)}))
	ok(t, s.Update([]KV{{[]byte("x"), nil}}, nil))
	cut := mem.Crash(1, 0)
	closeStore(t, s)
	s = openStore(t, cut, 0)
	defer closeStore(t, s)
	ok(t, s.Check())
	ok(t, s.Clear(h, 5, 5))
	if at, found, err := s.NextMapped(h, 0, MaxBlocks); err != nil || found {
		t.Fatal(at, found, err)
	}
}

// TestUnloadedVolumes: bits of volumes that nobody uses leave memory, and those of views as well; not those of leaves that are dirty.
func TestUnloadedVolumes(t *testing.T) {
	for _, frozen := range []bool{false, true} {
		mem := vfs.NewMem(1)
		s := openStore(t, mem, 0)
		var volumes []Handle
		for range 300 {
			h := handle(t, s)
			volumes = append(volumes, h)
			scatter(t, s, h, 2, 1)
			if frozen {
				_, err := s.Freeze(h, nil)
				ok(t, err)
				scatter(t, s, h, 2, 2)
			}
		}
		ok(t, s.Checkpoint(nil, nil))
		h, refs := volumes[0], make([]Ref, 1)
		scatter(t, s, h, 2, 3) // dirty, but its bits are not
		other := volumes[1]
		if frozen {
			v, err := s.OpenView(other, 1)
			ok(t, err)
			other = v
			ok(t, s.Lookup(v, 5*LeafBlocks, refs))
		}
		for _, h := range volumes[2:] {
			ok(t, s.Lookup(h, 5*LeafBlocks, refs))
		}
		if s.peek(h).pages.Load() == nil {
			t.Fatal("bits of a dirty leaf were unloaded")
		}
		if s.peek(other).pages.Load() != nil {
			t.Fatal("bits that nobody uses stay")
		}
		ok(t, s.Lookup(other, 1, refs))
		if refs[0] != MakeRef(1, 0) {
			t.Fatalf("%x", refs[0])
		}
		ok(t, s.Check())
		ok(t, s.Checkpoint(nil, nil))
		cut := mem.Crash(1, 0)
		closeStore(t, s)
		s = openStore(t, cut, 0)
		for leaf := range uint64(2) {
			ok(t, s.Lookup(h, leaf*LeafBlocks+3, refs))
			if refs[0] != MakeRef(3, uint32(leaf)) {
				t.Fatalf("leaf %d: %x", leaf, refs[0])
			}
		}
		ok(t, s.Check())
		closeStore(t, s)
	}
}

// TestOldFormat: a store of the format before generations is refused, and not changed.
func TestOldFormat(t *testing.T) {
	fs := vfs.NewMem(1)
	s := openStore(t, fs, 0)
	ok(t, s.db.Set([]byte("f"), []byte("1"), nil))
	closeStore(t, s)
	_, err := Open(Config{FS: fs, Dir: "/map"})
	if err == nil || !slices.Contains([]string{`open block map in /map: format "1"; this program knows "2"`}, err.Error()) {
		t.Fatal(err)
	}
}

// TestLostParent: a fork whose parent is gone is an error, not holes.
func TestLostParent(t *testing.T) {
	fs := vfs.NewMem(1)
	s := openStore(t, fs, 0)
	h := handle(t, s)
	ok(t, s.Set(h, 0, MakeRef(1, 0), 100))
	gen, err := s.Freeze(h, nil)
	ok(t, err)
	child, err := s.Fork(h, gen, nil)
	ok(t, err)
	ok(t, s.db.Delete(recordKey(h), nil))
	closeStore(t, s)
	s = openStore(t, fs, 0)
	defer closeStore(t, s)
	if err := s.Lookup(child, 0, make([]Ref, 1)); !errors.Is(err, ErrCorrupt) {
		t.Fatal(err)
	}
}

// TestSnapshotsWhileWriting has a writer that sets leaf after leaf, round after round, while others freeze, read, compare, scan and
// release. Every frozen generation is a prefix of what was written: rounds descend by at most one from the first leaf to the last.
func TestSnapshotsWhileWriting(t *testing.T) {
	s, err := Open(Config{FS: vfs.NewMem(1), Dir: "/map", memTableBytes: 256 << 10})
	ok(t, err)
	const leaves, rounds = 60, 60
	h := handle(t, s)
	other := handle(t, s) // that evicts the first one's leaves
	var round atomic.Uint32
	var writers, others sync.WaitGroup
	stop := make(chan struct{})
	write := func(h Handle, count *atomic.Uint32) {
		r := rand.New(rand.NewPCG(uint64(h), 1))
		for i := uint32(1); i <= rounds; i++ {
			for leaf := range uint64(leaves) {
				if r.IntN(4) == 0 {
					check(t, s.Set(h, leaf*LeafBlocks, MakeRef(i, 0), LeafBlocks))
					continue
				}
				for k := range uint32(LeafBlocks) { // backwards, so that it is an array
					check(t, s.Set(h, leaf*LeafBlocks+uint64(k), MakeRef(i, LeafBlocks-1-k), 1))
				}
			}
			count.Store(i)
		}
	}
	var ignored atomic.Uint32
	writers.Go(func() { write(h, &round) })
	writers.Go(func() { write(other, &ignored) })
	others.Go(func() {
		live := []uint32{}
		r := rand.New(rand.NewPCG(1, 9))
		for n := 0; ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			oldest := round.Load()
			gen, err := s.Freeze(h, nil)
			check(t, err)
			live = append(live, gen)
			checkPrefix(t, s, h, gen, oldest, leaves)
			if len(live) > 4 {
				i := r.IntN(len(live))
				prev, next := uint32(0), gen+1
				if i > 0 {
					prev = live[i-1]
				}
				if i+1 < len(live) {
					next = live[i+1]
				}
				check(t, s.Release(h, live[i], prev, next))
				live = slices.Delete(live, i, i+1)
			}
			checkPrefix(t, s, h, live[r.IntN(len(live))], 0, leaves)
			if n%4 == 0 {
				check(t, s.Diff(At{h, live[0]}, At{h, gen + 1}, 0, MaxBlocks, func(lba, n uint64, old, new Ref) error {
					if new.Ordinal() < old.Ordinal() {
						return fmt.Errorf("block %d went from round %d to %d", lba, old.Ordinal(), new.Ordinal())
					}
					return nil
				}))
				_, err := s.Unique(h, live[0], 0, gen+1)
				check(t, err)
				check(t, s.EachVersion(context.Background(), h, live, func(uint64, []Version) error { return nil }))
			}
		}
	})
	others.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				check(t, s.Checkpoint(nil, nil))
			}
		}
	})
	writers.Wait()
	close(stop)
	others.Wait()
	ok(t, s.Check())
	closeStore(t, s)
}

func checkPrefix(t *testing.T, s *Store, h Handle, gen, oldest uint32, leaves uint64) {
	v, err := s.OpenView(h, gen)
	check(t, err)
	defer func() { check(t, s.DropVolume(v)) }()
	refs := make([]Ref, leaves*LeafBlocks)
	check(t, s.Lookup(v, 0, refs))
	first, last := refs[0].Ordinal(), refs[len(refs)-1].Ordinal()
	if last < oldest || first > last+1 {
		t.Errorf("generation %d: rounds %d to %d, want at least %d", gen, first, last, oldest)
	}
	before := first
	for i, ref := range refs {
		if ref.Ordinal() > before {
			t.Errorf("generation %d block %d: round %d after %d", gen, i, ref.Ordinal(), before)
			return
		}
		before = ref.Ordinal()
	}
}
