package blockmap

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"varve/volumedriver/vfs"
)

// scatter dirties n leaves of a volume, one block each.
func scatter(t testing.TB, s *Store, h Handle, n int, ordinal uint32) {
	t.Helper()
	for i := range uint64(n) {
		ok(t, s.Set(h, i*LeafBlocks+uint64(ordinal)%LeafBlocks, MakeRef(ordinal, uint32(i%4096)), 1))
	}
}

func diskStore(b *testing.B, budget int64) *Store {
	s := openStoreOn(b, vfs.OS(), b.TempDir(), budget)
	b.Cleanup(func() { closeStore(b, s) })
	return s
}

// BenchmarkFreeze is a snapshot, on a disk, by how many leaves are dirty; another volume has 200,000 dirty ones all the time.
func BenchmarkFreeze(b *testing.B) {
	for _, dirty := range []int{0, 1000, 100_000} {
		b.Run(fmt.Sprint(dirty), func(b *testing.B) {
			s := diskStore(b, 256<<20)
			other, h := handle(b, s), handle(b, s)
			ordinal := uint32(1)
			for b.Loop() {
				b.StopTimer()
				ordinal++
				scatter(b, s, other, 200_000, ordinal)
				scatter(b, s, h, dirty, ordinal)
				b.StartTimer()
				_, err := s.Freeze(h, []KV{{[]byte("root"), make([]byte, 500)}})
				ok(b, err)
			}
		})
	}
}

// BenchmarkFork is a clone of a volume of a TiB in which every leaf exists, on a disk.
func BenchmarkFork(b *testing.B) {
	s := diskStore(b, 64<<20)
	h := handle(b, s)
	scatter(b, s, h, 1<<19, 1)
	gen, err := s.Freeze(h, nil)
	ok(b, err)
	for b.Loop() {
		_, err := s.Fork(h, gen, func(child Handle) []KV { return []KV{{[]byte("root"), make([]byte, 500)}} })
		ok(b, err)
	}
}

// BenchmarkColdLookup reads leaves that are not in memory, by the number of generations, and through forks of forks.
func BenchmarkColdLookup(b *testing.B) {
	for _, c := range []struct{ gens, forks int }{{0, 0}, {1, 0}, {100, 0}, {10_000, 0}, {1, 1}, {1, 10}} {
		b.Run(fmt.Sprintf("generations-%d-forks-%d", c.gens, c.forks), func(b *testing.B) {
			s := diskStore(b, 0)
			h := handle(b, s)
			const leaves = 20_000
			scatter(b, s, h, leaves, 1)
			for i := range c.gens {
				if i < 100 { // each leaf in some of them, the first in all
					for leaf := uint64(i % 10); leaf < leaves; leaf += 10 {
						ok(b, s.Set(h, leaf*LeafBlocks, MakeRef(uint32(2+i), 1), 1))
					}
				}
				ok(b, s.Set(h, 1, MakeRef(uint32(2+i), 1), 1))
				_, err := s.Freeze(h, nil)
				ok(b, err)
			}
			for range c.forks {
				gen, err := s.Generation(h)
				ok(b, err)
				if gen == 1 {
					gen, err = s.Freeze(h, nil)
					ok(b, err)
				} else {
					gen--
				}
				h, err = s.Fork(h, gen, nil)
				ok(b, err)
			}
			ok(b, s.Checkpoint(nil, nil))
			r := rand.New(rand.NewPCG(1, 1))
			refs := make([]Ref, 1)
			before := s.Stats().Misses
			for b.Loop() {
				ok(b, s.Lookup(h, r.Uint64N(leaves)*LeafBlocks, refs))
			}
			b.ReportMetric(float64(s.Stats().Misses-before)/float64(b.N), "misses/op")
		})
	}
}

// BenchmarkRelease deletes a snapshot between which and the next n leaves were changed, of 500,000.
func BenchmarkRelease(b *testing.B) {
	for _, changed := range []int{100, 10_000} {
		b.Run(fmt.Sprint(changed), func(b *testing.B) {
			s := diskStore(b, 64<<20)
			h := handle(b, s)
			scatter(b, s, h, 500_000, 1)
			first, err := s.Freeze(h, nil)
			ok(b, err)
			ordinal := uint32(1)
			for b.Loop() {
				b.StopTimer()
				var gens [2]uint32
				for i := range gens {
					ordinal++
					scatter(b, s, h, changed, ordinal)
					gens[i], err = s.Freeze(h, nil)
					ok(b, err)
				}
				b.StartTimer()
				ok(b, s.Release(h, gens[0], first, gens[1]))
				b.StopTimer()
				ok(b, s.Release(h, gens[1], first, gens[1]+1))
				b.StartTimer()
			}
		})
	}
}

// TestScanOf1TiB walks all versions of a volume of a TiB (VARVE_MAP_GIB) that is mapped at random, block by block.
func TestScanOf1TiB(t *testing.T) {
	gib := fromEnv(t, "VARVE_MAP_GIB", 4)
	s := openStoreOn(t, vfs.OS(), t.TempDir(), 64<<20)
	h := handle(t, s)
	leaves := uint64(gib) << 9
	for leaf := range leaves {
		for i := range uint64(LeafBlocks) {
			ok(t, s.Set(h, leaf*LeafBlocks+i, MakeRef(1+uint32((leaf*7919+i*104729)%1e6), uint32(i*31%4096)), 1))
		}
	}
	ok(t, s.Flush(h))
	before, begin := rss(t), time.Now()
	blocks := 0
	ok(t, s.EachVersion(context.Background(), h, nil, func(_ uint64, versions []Version) error {
		for _, v := range versions {
			for _, ref := range v.Refs {
				if ref != 0 {
					blocks++
				}
			}
		}
		return nil
	}))
	took := time.Since(begin)
	t.Logf("%d GiB, %d blocks in %v: %.1f GiB of disk a second; RSS %d -> %d MiB", gib, blocks, took,
		float64(gib)/took.Seconds(), before>>20, rss(t)>>20)
	if blocks != int(leaves)*LeafBlocks {
		t.Fatalf("%d blocks, want %d", blocks, leaves*LeafBlocks)
	}
	closeStore(t, s)
}

// BenchmarkSetRandomEvicted maps random blocks of 100 GiB under 64 MiB, sorted in batches as the destager does, with and without a
// snapshot every 64 batches.
func BenchmarkSetRandomEvicted(b *testing.B) {
	for _, snapshots := range []bool{false, true} {
		b.Run(fmt.Sprintf("snapshots-%v", snapshots), func(b *testing.B) {
			s := diskStore(b, 64<<20)
			h := handle(b, s)
			r := rand.New(rand.NewPCG(3, 4))
			const blocks = 100 << 18
			stride := uint64(blocks / 4096)
			n := uint32(0)
			for b.Loop() {
				i := uint64(n % 4096)
				ok(b, s.Set(h, i*stride+r.Uint64N(stride), MakeRef(1+n>>12, n%4096), 1))
				if n++; n%(16*4096) == 0 {
					ok(b, s.Checkpoint(nil, nil))
				}
				if snapshots && n%(64*4096) == 0 {
					_, err := s.Freeze(h, nil)
					ok(b, err)
				}
			}
			b.ReportMetric(float64(s.Stats().PebbleBytes)/float64(b.N), "stored-B/op")
		})
	}
}
