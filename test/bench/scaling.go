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
	"varve/volumedriver/backend/local"
	"varve/volumedriver/blockio"
	"varve/volumedriver/blockmap"
	"varve/volumedriver/vfs"
)

// The rows S5-S7 ask how snapshots and clones scale. They print lines of their own, and run in this process: the volume driver
// on a volume of 1 GiB, written in order; and its block map alone, where a TiB can be had in seconds, of volumes of 1 GiB and
// of 1 TiB that are mapped whole.

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
	manySnaps   = 1000
	someClones  = 100
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
	if err := scaleDriver(ctx, dir, r.settings.runTime); err != nil {
		return fmt.Errorf("volume driver: %w", err)
	}
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
	bare, err := writes()
	if err != nil {
		return err
	}
	var snaps, clones, deletes []time.Duration
	for range manySnaps {
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
	for range someClones {
		if err := stopwatch(&clones, func() error { _, err := d.Clone(ctx, v.ID(), last, spec()); return err }); err != nil {
			return err
		}
	}
	for _, s := range v.Snapshots()[:manySnaps/10] {
		if err := stopwatch(&deletes, func() error { return v.DeleteSnapshot(ctx, s.ID) }); err != nil {
			return err
		}
	}
	fmt.Printf("S5   snapshot of 1 GiB mapped, up to %d of them, p99 %.2f ms (goal <= 10 ms: %s)\n", manySnaps, millis(tail(snaps)),
		met(millis(tail(snaps)) <= 10))
	fmt.Printf("S5   4 KiB writes one at a time with %d snapshots: %.0f/s, without any %.0f/s, %.2f of it (goal >= 0.95, at 10,000: %s)\n", manySnaps,
		covered, bare, covered/bare, met(covered >= 0.95*bare))
	fmt.Printf("S6   clone of 1 GiB, %d of one snapshot, p99 %.2f ms (goal <= 50 ms: %s)\n", someClones, millis(tail(clones)),
		met(millis(tail(clones)) <= 50))
	fmt.Printf("S7   delete of a snapshot with one block of its own among %d, p99 %.2f ms (goal O(unique), <= 1 s: %s)\n", manySnaps,
		millis(tail(deletes)), met(tail(deletes) <= time.Second))
	return nil
}
