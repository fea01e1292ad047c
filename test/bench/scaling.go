package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver"
	"varve/volumedriver/backend/backendtest"
	"varve/volumedriver/backend/local"
	"varve/volumedriver/blockio"
	"varve/volumedriver/blockmap"
	"varve/volumedriver/cache"
	"varve/volumedriver/vfs"
)

// The rows S5-S7 ask how snapshots and clones scale. They print lines of their own, and run in this process: the block map alone, of
// volumes of 1 GiB and of 1 TiB that are mapped whole; the volume driver on volumes that are mapped so, by leaves that are made while it
// is stopped, since a snapshot or clone never looks at data; and the driver on a volume of 1 GiB that was written, with very many snapshots
// and clones of it.

var scalingRows = []string{"S1", "S2", "S3", "S4", "S5", "S6", "S7", "S8", "S9", "S10", "S11", "S15", "S16"}

// scalingGroups are rows that go together.
var scalingGroups = []struct {
	rows []string
	run  func(ctx context.Context, r *recorder, dir string) error
}{
	{[]string{"S3", "S4"}, restartRows},
	{[]string{"S5", "S6", "S7"}, snapshotRows},
	{[]string{"S8"}, reclaimRows},
	{[]string{"S9", "S10", "S11"}, requestRows},
	{[]string{"S15"}, fairnessRows},
	{[]string{"S1", "S2", "S16"}, memoryRows},
}

const (
	scaledBytes = 1 << 30
	pieceBytes  = 1 << 20
	manySnaps   = 10000
	manyClones  = 1000
	someOf      = 100
	mapRounds   = 50
	mapChanged  = 100 // leaves between two generations
)

// tail gives the 99th percentile.
func tail(times []time.Duration) time.Duration {
	slices.Sort(times)
	return times[(len(times)-1)*99/100]
}

func stopwatch(times *[]time.Duration, f func() error) error {
	start := time.Now()
	err := f()
	*times = append(*times, time.Since(start))
	return err
}

func millis(d time.Duration) float64 { return float64(d.Microseconds()) / 1e3 }

func scalingRun(ctx context.Context, r *recorder, dir string) error {
	for i, g := range scalingGroups {
		if !slices.ContainsFunc(g.rows, r.settings.wantsRow) || ctx.Err() != nil {
			continue
		}
		sub, begin := filepath.Join(dir, fmt.Sprint("scale-", i)), time.Now()
		if err := os.MkdirAll(sub, 0o755); err != nil {
			return err
		}
		if err := errors.Join(g.run(ctx, r, sub), os.RemoveAll(sub)); err != nil {
			return fmt.Errorf("%s: %w", strings.Join(g.rows, " "), err)
		}
		fmt.Printf("     %s took %s\n", strings.Join(g.rows, " "), time.Since(begin).Round(time.Second))
	}
	return ctx.Err()
}

func snapshotRows(ctx context.Context, r *recorder, dir string) error {
	if err := scaleMaps(ctx, filepath.Join(dir, "map")); err != nil {
		return fmt.Errorf("block map: %w", err)
	}
	if err := scaleSizes(ctx, filepath.Join(dir, "sizes")); err != nil {
		return fmt.Errorf("volume driver: %w", err)
	}
	if err := scaleDriver(ctx, dir, r.settings.runTime); err != nil {
		return fmt.Errorf("volume driver: %w", err)
	}
	return sharedCache(ctx, filepath.Join(dir, "shared"))
}

// scaleSizes takes snapshots and makes clones of a volume of which a GiB is mapped, and of one of which a TiB is.
func scaleSizes(ctx context.Context, dir string) error {
	var snaps, clones, deletes [2]time.Duration
	for i, bytes := range []int64{1 << 30, 1 << 40} {
		sub := filepath.Join(dir, fmt.Sprint(i))
		l, _, err := openRestart(ctx, sub)
		if err != nil {
			return err
		}
		if err := errors.Join(l.stop(), mapVolume(ctx, sub, bytes)); err != nil {
			return err
		}
		l, v, err := openRestart(ctx, sub)
		if err != nil {
			return err
		}
		l.d.AddPool(restartPool, backendtest.NewMem())
		l.pool = restartPool
		var ids []uuid.UUID
		var snap, clone, del []time.Duration
		p := make([]byte, blockio.BlockSize)
		for range someOf {
			err = errors.Join(err, v.Write(ctx, p, rand.Int64N(bytes/blockio.BlockSize)*blockio.BlockSize, 0))
			err = errors.Join(err, stopwatch(&snap, func() error {
				id, err := l.snapshot(ctx, v)
				ids = append(ids, id)
				return err
			}))
		}
		err = errors.Join(err, l.d.Drain(ctx))
		for k := range someOf {
			err = errors.Join(err, stopwatch(&clone, func() error { _, err := l.d.Clone(ctx, v.ID(), ids[k/10], l.spec(bytes)); return err }))
		}
		for k := range someOf / 2 {
			err = errors.Join(err, stopwatch(&del, func() error { return v.DeleteSnapshot(ctx, ids[20+k]) }))
		}
		if err := errors.Join(err, l.stop(), os.RemoveAll(sub)); err != nil {
			return err
		}
		snaps[i], clones[i], deletes[i] = tail(snap), tail(clone), tail(del)
	}
	ratio := func(d [2]time.Duration) float64 { return float64(d[1]) / float64(d[0]) }
	line("S5", fmt.Sprintf("snapshot after a write, p99 of %d: %.2f ms with 1 GiB mapped, %.2f ms with 1 TiB, ratio %.2f", someOf, millis(snaps[0]), millis(snaps[1]),
		ratio(snaps)), "<= 10 ms, ratio <= 1.5", millis(snaps[1]) <= 10 && ratio(snaps) <= 1.5)
	line("S6", fmt.Sprintf("clone, p99 of %d: %.2f ms with 1 GiB mapped, %.2f ms with 1 TiB, ratio %.2f", someOf, millis(clones[0]), millis(clones[1]), ratio(clones)),
		"<= 50 ms", millis(clones[1]) <= 50)
	line("S7", fmt.Sprintf("delete of a snapshot with one block of its own, p99 of %d: %.2f ms with 1 GiB mapped, %.2f ms with 1 TiB, ratio %.2f", someOf/2,
		millis(deletes[0]), millis(deletes[1]), ratio(deletes)), "ratio <= 1.3", ratio(deletes) <= 1.3)
	return nil
}

// sharedCache has one clone read what another has read before, through the read cache.
func sharedCache(ctx context.Context, dir string) error {
	c, err := cache.Open(cache.Config{FS: vfs.OS(), Dir: filepath.Join(dir, "cache"), RAMBytes: 64 << 20})
	if err != nil {
		return err
	}
	pool := uuid.New()
	store := c.Wrap(pool, backendtest.NewMem())
	l, err := openLab(ctx, volumedriver.Config{LogBytes: 256 << 20}, dir, pool, store)
	if err != nil {
		return errors.Join(err, store.Close(), c.Close())
	}
	const image, reads = 128 << 20, 500
	v, err := l.d.Create(ctx, l.spec(image))
	if err == nil {
		err = l.fillOrdered(ctx, v, 0, image)
	}
	id, serr := l.snapshot(ctx, v)
	err = errors.Join(err, serr, l.d.Drain(ctx))
	var misses [2]int64
	for i := range misses {
		if err != nil {
			break
		}
		clone, cerr := l.d.Clone(ctx, v.ID(), id, l.spec(image))
		if err = cerr; err != nil {
			break
		}
		before := c.Stats().Misses
		r, p := rand.New(rand.NewPCG(6, 6)), make([]byte, 16<<10)
		for range reads {
			if err = clone.Read(ctx, p, r.Int64N(image/int64(len(p)))*int64(len(p))); err != nil {
				break
			}
		}
		misses[i] = c.Stats().Misses - before
	}
	if err := errors.Join(err, l.stop(), store.Close(), c.Close()); err != nil {
		return err
	}
	hits := 1 - float64(misses[1])/float64(max(1, misses[0]))
	line("S6", fmt.Sprintf("the second clone reads what the first has read: %d lines fetched, then %d, %.1f %% hits", misses[0], misses[1], 100*hits), ">= 95 %",
		hits >= 0.95 && misses[0] > 0)
	return nil
}

// mapTimes are those of a volume in the block map.
type mapTimes struct{ freeze, fork, release []time.Duration }

func scaleMaps(ctx context.Context, dir string) (err error) {
	s, err := blockmap.Open(blockmap.Config{FS: vfs.OS(), Dir: dir, BudgetBytes: 256 << 20})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	small, err := scaleMap(ctx, s, 1<<30)
	if err != nil {
		return err
	}
	large, err := scaleMap(ctx, s, 1<<40)
	if err != nil {
		return err
	}
	for _, row := range []struct {
		what         string
		small, large []time.Duration
		ms, ratio    float64
	}{
		{"S5   snapshot in the map, p99", small.freeze, large.freeze, 10, 1.5},
		{"S6   clone in the map, p99", small.fork, large.fork, 50, 0},
		{"S7   snapshot delete in the map, p99", small.release, large.release, 0, 1.3},
	} {
		a, b := tail(row.small), tail(row.large)
		ratio := float64(b) / float64(a)
		goals, reached := "", true
		if row.ms > 0 {
			goals, reached = fmt.Sprintf("<= %.0f ms", row.ms), millis(b) <= row.ms
		}
		if row.ratio > 0 {
			if goals != "" {
				goals += ", "
			}
			goals, reached = goals+fmt.Sprintf("ratio <= %.1f", row.ratio), reached && ratio <= row.ratio
		}
		fmt.Printf("%s, %d leaves changed: %.2f ms at 1 GiB, %.2f ms at 1 TiB mapped, ratio %.2f (goal %s: %s)\n", row.what, mapChanged,
			millis(a), millis(b), ratio, goals, met(reached))
	}
	return nil
}

// scaleMap maps a volume whole, and then freezes, forks and releases generations that differ in a few leaves.
func scaleMap(ctx context.Context, s *blockmap.Store, bytes int64) (t mapTimes, err error) {
	h, err := s.NewHandle()
	if err != nil {
		return t, err
	}
	blocks := uint64(bytes / blockio.BlockSize)
	const whole = blockmap.LeafBlocks * 8
	ordinal := uint32(1)
	for lba := uint64(0); lba < blocks; lba += whole {
		if err := s.Set(h, lba, blockmap.MakeRef(ordinal, 0), whole); err != nil {
			return t, err
		}
		ordinal++
	}
	if err := s.Checkpoint(nil, nil); err != nil {
		return t, err
	}
	before, err := s.Freeze(h, nil)
	for range mapRounds {
		if err = errors.Join(err, ctx.Err()); err != nil {
			return t, err
		}
		var gens [2]uint32
		for i := range gens {
			for range mapChanged {
				if err := s.Set(h, rand.Uint64N(blocks), blockmap.MakeRef(ordinal, 0), 1); err != nil {
					return t, err
				}
			}
			ordinal++
			if err := stopwatch(&t.freeze, func() (err error) { gens[i], err = s.Freeze(h, nil); return err }); err != nil {
				return t, err
			}
		}
		var child blockmap.Handle
		if err := stopwatch(&t.fork, func() (err error) { child, err = s.Fork(h, gens[1], nil); return err }); err != nil {
			return t, err
		}
		if err := s.DropVolume(child); err != nil {
			return t, err
		}
		err = stopwatch(&t.release, func() error { return s.Release(h, gens[0], before, gens[1]) })
		before = gens[1]
	}
	return t, err
}

func scaleDriver(ctx context.Context, dir string, runTime time.Duration) (err error) {
	d, err := volumedriver.Open(volumedriver.Config{FS: vfs.OS(), Dir: filepath.Join(dir, "data"), LogBytes: scaledBytes, ScrubEvery: -1})
	if err != nil {
		return err
	}
	store, err := local.Open(vfs.OS(), filepath.Join(dir, "backend"))
	if err != nil {
		return errors.Join(err, d.Close())
	}
	pool := uuid.New()
	d.AddPool(pool, store)
	running, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- d.Run(running) }()
	defer func() {
		stop()
		err = errors.Join(err, <-ended, d.Close())
	}()
	spec := func() volumedriver.Spec {
		id := uuid.New()
		return volumedriver.Spec{ID: id, Pool: pool, Epoch: 1, Size: scaledBytes, PoolName: "bench", Path: id.String() + ".raw", Kind: "disk"}
	}
	v, err := d.Create(ctx, spec())
	if err != nil {
		return err
	}
	p := make([]byte, pieceBytes)
	for i := range p {
		p[i] = byte(rand.Uint32())
	}
	for off := int64(0); off < scaledBytes; off += pieceBytes {
		if err := v.Write(ctx, p, off, 0); err != nil {
			return err
		}
	}
	if err := d.Drain(ctx); err != nil {
		return err
	}
	var last uuid.UUID
	snapshot := func() error {
		last = uuid.New()
		_, err := v.Snapshot(ctx, volumedriver.SnapshotSpec{ID: last, Name: last.String(), Created: time.Now()})
		return err
	}
	// writes gives how many blocks a second one client writes.
	writes := func() (float64, error) {
		n, start := 0, time.Now()
		for ; time.Since(start) < runTime; n++ {
			if err := v.Write(ctx, p[:blockio.BlockSize], rand.Int64N(scaledBytes/blockio.BlockSize)*blockio.BlockSize, 0); err != nil {
				return 0, err
			}
		}
		return float64(n) / time.Since(start).Seconds(), d.Drain(ctx)
	}
	// reads gives how many blocks a second one client reads of what is in memory.
	reads := func() (float64, error) {
		const warm = 32 << 20
		into := make([]byte, pieceBytes)
		for off := int64(0); off < warm; off += pieceBytes {
			if err := v.Read(ctx, into, off); err != nil {
				return 0, err
			}
		}
		n, start := 0, time.Now()
		for ; time.Since(start) < runTime/2; n++ {
			if err := v.Read(ctx, into[:blockio.BlockSize], rand.Int64N(warm/blockio.BlockSize)*blockio.BlockSize); err != nil {
				return 0, err
			}
		}
		return float64(n) / time.Since(start).Seconds(), nil
	}
	bare, err := writes()
	if err != nil {
		return err
	}
	bareReads, err := reads()
	if err != nil {
		return err
	}
	var snaps, clones, deletes []time.Duration
	for i := range manySnaps {
		if i%16 > 0 { // a write before each would upload 10,000 objects
			if err := stopwatch(&snaps, snapshot); err != nil {
				return err
			}
			continue
		}
		if err := v.Write(ctx, p[:blockio.BlockSize], rand.Int64N(scaledBytes/blockio.BlockSize)*blockio.BlockSize, 0); err != nil {
			return err
		}
		if err := stopwatch(&snaps, snapshot); err != nil {
			return err
		}
	}
	if err := d.Drain(ctx); err != nil {
		return err
	}
	covered, err := writes()
	if err != nil {
		return err
	}
	coveredReads, err := reads()
	if err != nil {
		return err
	}
	before, cloning := heap()+d.Stats().Map.Bytes, time.Now()
	for range manyClones {
		if err := stopwatch(&clones, func() error { _, err := d.Clone(ctx, v.ID(), last, spec()); return err }); err != nil {
			return err
		}
	}
	cloned := time.Since(cloning)
	ram := (heap() + d.Stats().Map.Bytes - before) / manyClones
	for _, s := range v.Snapshots()[:someOf] {
		if err := stopwatch(&deletes, func() error { return v.DeleteSnapshot(ctx, s.ID) }); err != nil {
			return err
		}
	}
	fmt.Printf("S5   snapshot of 1 GiB mapped, up to %d of them, p99 %.2f ms (goal <= 10 ms: %s)\n", manySnaps, millis(tail(snaps)),
		met(millis(tail(snaps)) <= 10))
	fmt.Printf("S5   4 KiB writes one at a time with %d snapshots: %.0f/s, without any %.0f/s, %.2f of it (goal >= 0.95: %s)\n", manySnaps,
		covered, bare, covered/bare, met(covered >= 0.95*bare))
	fmt.Printf("S5   4 KiB reads one at a time with %d snapshots: %.0f/s, without any %.0f/s, %.2f of the latency (goal <= 1.05: %s)\n", manySnaps,
		coveredReads, bareReads, bareReads/coveredReads, met(bareReads <= 1.05*coveredReads))
	fmt.Printf("S6   %d clones of one snapshot of 1 GiB in %.1f s, p99 %.2f ms, %.1f KiB of RAM each (goal <= 30 s, <= 50 ms, <= 64 KiB: %s)\n", manyClones,
		cloned.Seconds(), millis(tail(clones)), float64(ram)/1024, met(millis(tail(clones)) <= 50 && cloned <= 30*time.Second && ram <= 64<<10))
	fmt.Printf("S7   delete of a snapshot with one block of its own among %d, p99 %.2f ms (goal O(unique), <= 1 s: %s)\n", manySnaps,
		millis(tail(deletes)), met(tail(deletes) <= time.Second))
	return nil
}
