package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver"
	"varve/volumedriver/backend/backendtest"
	"varve/volumedriver/blockio"
)

// The rows S8-S11 count bytes and requests of the volume driver, so they do not depend on how busy the machine is.
//
// S8 is scaled down, with all ratios as in service: a volume of 96 MiB in SCOs of 1 MiB stands for one of 1.5 GiB in SCOs of 16 MiB.
// It is filled, overwritten twice in the way of the row, and measured while it is overwritten twice more; the scrub makes a pass
// after every MiB, with the goals' target less what a MiB adds, and deletes what it replaced at once.

const (
	reclaimBytes = 96 << 20
	reclaimSCO   = 1 << 20
	reclaimLog   = 32 << 20
	reclaimPass  = 1 << 20
	reclaimOver  = 1.375 // held/live at which a pass ends
	reclaimMany  = 100   // snapshots, or clones
)

// pattern gives the block that is written next, of n.
type pattern struct {
	name string
	goal float64
	next func(n uint64) func() uint64
}

func patterns() []pattern {
	r := rand.New(rand.NewPCG(8, 8))
	return []pattern{
		{"uniform", 2.1, func(n uint64) func() uint64 { return func() uint64 { return r.Uint64N(n) } }},
		{"zipf 0.99", 1.4, func(n uint64) func() uint64 { return zipf(r, n, 0.99) }},
		{"in order", 1.02, func(n uint64) func() uint64 {
			at := n
			return func() uint64 { at++; return at % n }
		}},
	}
}

// zipf draws from 0..n-1, the ith most frequent with a weight of i^-theta, strewn over the range (Gray et al., SIGMOD 1994).
func zipf(r *rand.Rand, n uint64, theta float64) func() uint64 {
	zeta := 0.0
	for i := range n {
		zeta += math.Pow(float64(i+1), -theta)
	}
	alpha, zeta2 := 1/(1-theta), 1+math.Pow(0.5, theta)
	eta := (1 - math.Pow(2/float64(n), 1-theta)) / (1 - zeta2/zeta)
	strewn := r.Perm(int(n))
	return func() uint64 {
		u := r.Float64()
		rank := uint64(0)
		switch uz := u * zeta; {
		case uz < 1:
		case uz < zeta2:
			rank = 1
		default:
			rank = min(n-1, uint64(float64(n)*math.Pow(eta*u-eta+1, alpha)))
		}
		return uint64(strewn[rank])
	}
}

// reclaimed is what a run of S8 gave.
type reclaimed struct {
	amplification float64 // bytes put for each byte written
	space, most   float64 // bytes held for each that is live: at the end of the run, and at most before a pass
}

func reclaimRows(ctx context.Context, r *recorder, dir string) error {
	for _, p := range patterns() {
		base := 0.0
		for _, with := range []string{"", "100 snapshots", "100 clones"} {
			got, err := reclaim(ctx, filepath.Join(dir, uuid.NewString()), p, with)
			if err != nil {
				return fmt.Errorf("S8 %s %s: %w", p.name, with, err)
			}
			what := fmt.Sprintf("4 KiB overwrite %s: %.2f bytes put for each written; held/live %.2f at the end, at most %.2f", p.name,
				got.amplification, got.space, got.most)
			if with == "" {
				base = got.amplification
				line("S8", what, fmt.Sprintf("<= %.2f, <= 1.40", p.goal), got.amplification <= p.goal && got.most <= 1.4)
				continue
			}
			change := got.amplification/base - 1
			line("S8", what+fmt.Sprintf("; with %s %+.0f %%", with, 100*change), "at most 5 % more, <= 1.40", change <= 0.05 && got.most <= 1.4)
		}
	}
	return nil
}

func reclaim(ctx context.Context, dir string, p pattern, with string) (got reclaimed, err error) {
	store := newTally(backendtest.NewMem())
	l, err := openLab(ctx, volumedriver.Config{LogBytes: reclaimLog, SegmentBytes: 4 << 20, SCOBytes: reclaimSCO, ScrubTarget: reclaimOver,
		ScrubBytesPerSecond: -1}, dir, uuid.New(), store)
	if err != nil {
		return got, err
	}
	defer func() { err = errors.Join(err, l.stop(), os.RemoveAll(dir)) }()
	v, err := l.d.Create(ctx, l.spec(reclaimBytes))
	if err != nil {
		return got, err
	}
	if err := l.fillOrdered(ctx, v, 0, reclaimBytes); err != nil {
		return got, err
	}
	const blocks = reclaimBytes / blockio.BlockSize
	next := p.next(blocks)
	block := make([]byte, blockio.BlockSize)
	r := rand.New(rand.NewPCG(9, 9))
	w := newWriter(v, 32)
	overwrite := func(n int64) error {
		for range n / blockio.BlockSize {
			fillRandom(r, block)
			if err := w.write(ctx, block, int64(next())*blockio.BlockSize, 0); err != nil {
				return err
			}
		}
		return errors.Join(w.wait(), l.d.Drain(ctx), ctx.Err())
	}
	pass := func() (volumedriver.ScrubReport, error) {
		return l.d.Scrub(ctx, l.pool, volumedriver.ScrubOptions{Grace: -1})
	}
	switch with {
	case "100 snapshots":
		for range reclaimMany {
			if err := overwrite(reclaimBytes / 4 / reclaimMany); err != nil {
				return got, err
			}
			if _, err := l.snapshot(ctx, v); err != nil {
				return got, err
			}
		}
	case "100 clones":
		id, err := l.snapshot(ctx, v)
		if err != nil {
			return got, err
		}
		if err := l.d.Drain(ctx); err != nil {
			return got, err
		}
		for range reclaimMany {
			if _, err := l.d.Clone(ctx, v.ID(), id, l.spec(reclaimBytes)); err != nil {
				return got, err
			}
		}
	}
	measured := func(bytes int64) (report volumedriver.ScrubReport, err error) {
		for range bytes / reclaimPass {
			if err := overwrite(reclaimPass); err != nil {
				return report, err
			}
			held := store.heldNow()
			if report, err = pass(); err != nil {
				return report, err
			}
			got.most = max(got.most, float64(held)/float64(report.LiveBytes))
			got.space = float64(store.heldNow()) / float64(report.LiveBytes)
		}
		return report, nil
	}
	if _, err := measured(2 * reclaimBytes); err != nil {
		return got, err
	}
	before := store.putBytes.Load()
	got = reclaimed{}
	if _, err := measured(2 * reclaimBytes); err != nil {
		return got, err
	}
	got.amplification = float64(store.putBytes.Load()-before) / (2 * reclaimBytes)
	return got, nil
}

func (b *tally) heldNow() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.held
}

// requestRows are S9, S10 and S11.
func requestRows(ctx context.Context, r *recorder, dir string) error {
	for _, row := range []struct {
		name string
		run  func(context.Context, string) error
	}{{"S9", putsPerGiB}, {"S10", hotOverwrite}, {"S11", logAmplification}} {
		if !r.settings.wantsRow(row.name) {
			continue
		}
		sub := filepath.Join(dir, row.name)
		if err := errors.Join(row.run(ctx, sub), os.RemoveAll(sub)); err != nil {
			return fmt.Errorf("%s: %w", row.name, err)
		}
	}
	return nil
}

// putsPerGiB writes in order and at random, and then nothing.
func putsPerGiB(ctx context.Context, dir string) error {
	for _, load := range []struct {
		name   string
		random bool
		bytes  int64
	}{{"1 MiB in order", false, 1 << 30}, {"4 KiB at random", true, 256 << 20}} {
		store := newTally(backendtest.NewMem())
		store.forget = true
		l, err := openLab(ctx, volumedriver.Config{LogBytes: 1 << 30, ScrubEvery: 100 * time.Millisecond}, filepath.Join(dir, load.name), uuid.New(), store)
		if err != nil {
			return err
		}
		if err := errors.Join(puts(ctx, l, store, load.name, load.random, load.bytes), l.stop()); err != nil {
			return err
		}
	}
	return nil
}

func puts(ctx context.Context, l *lab, store *tally, name string, random bool, bytes int64) error {
	v, err := l.d.Create(ctx, l.spec(4<<30))
	if err != nil {
		return err
	}
	if random {
		w, r, p := newWriter(v, 32), rand.New(rand.NewPCG(9, 1)), make([]byte, blockio.BlockSize)
		for _, i := range r.Perm(int(bytes / blockio.BlockSize)) { // each once: what is overwritten in the log is not put at all
			fillRandom(r, p)
			if err := w.write(ctx, p, int64(i)*4*blockio.BlockSize, 0); err != nil {
				return err
			}
		}
		if err := w.wait(); err != nil {
			return err
		}
	} else if err := l.fillOrdered(ctx, v, 0, bytes); err != nil {
		return err
	}
	if err := l.d.Drain(ctx); err != nil {
		return err
	}
	perGiB := float64(store.puts.Load()) * (1 << 30) / float64(bytes)
	overhead := float64(store.putBytes.Load()-bytes) / float64(store.putBytes.Load())
	line("S9", fmt.Sprintf("%s, %d MiB: %.1f PUTs for each GiB, %.2f %% of the bytes are metadata", name, bytes>>20, perGiB, 100*overhead),
		"<= 68, <= 1.5 %", perGiB <= 68 && overhead <= 0.015)
	before, idle := store.requests.Load(), 3*time.Second
	select {
	case <-time.After(idle):
	case <-ctx.Done():
		return ctx.Err()
	}
	n := store.requests.Load() - before
	line("S9", fmt.Sprintf("idle afterwards, with the scrub looking every 100 ms instead of every 10 min: %d requests in %s", n, idle), "0", n == 0)
	return nil
}

// hotOverwrite is scaled 1:8: a log of 512 MiB and SCOs of 2 MiB stand for 4 GiB and 16 MiB.
func hotOverwrite(ctx context.Context, dir string) error {
	for _, load := range []struct {
		name   string
		random bool
	}{{"at random", true}, {"in order", false}} {
		const region, times = 8 << 20, 100
		store := newTally(backendtest.NewMem())
		store.forget = true
		l, err := openLab(ctx, volumedriver.Config{LogBytes: 512 << 20, SegmentBytes: 8 << 20, SCOBytes: 2 << 20}, filepath.Join(dir, load.name),
			uuid.New(), store)
		if err != nil {
			return err
		}
		v, err := l.d.Create(ctx, l.spec(1<<30))
		if err != nil {
			return errors.Join(err, l.stop())
		}
		w, r, p := newWriter(v, 32), rand.New(rand.NewPCG(10, 1)), make([]byte, blockio.BlockSize)
		for i := range int64(times * region / blockio.BlockSize) {
			fillRandom(r, p)
			at := i % (region / blockio.BlockSize)
			if load.random {
				at = r.Int64N(region / blockio.BlockSize)
			}
			if err = w.write(ctx, p, at*blockio.BlockSize, 0); err != nil {
				break
			}
		}
		if err := errors.Join(err, w.wait(), l.d.Drain(ctx), l.stop()); err != nil {
			return err
		}
		share := float64(store.putBytes.Load()) / (times * region)
		line("S10", fmt.Sprintf("%d MiB overwritten %d times %s within the log (1:8 of 64 MiB, 4 GiB of log, SCOs of 16 MiB): %.3f of it uploaded",
			region>>20, times, load.name, share), "<= 0.1", share <= 0.1)
	}
	return nil
}

// logAmplification counts what goes to the log's files.
func logAmplification(ctx context.Context, dir string) error {
	for _, load := range []struct {
		depth int
		goal  float64
	}{{1, 2.05}, {32, 1.10}} {
		l, err := openLab(ctx, volumedriver.Config{LogBytes: 1 << 30}, filepath.Join(dir, fmt.Sprint(load.depth)), uuid.New(), nil)
		if err != nil {
			return err
		}
		v, err := l.d.Create(ctx, l.spec(1<<30))
		if err != nil {
			return errors.Join(err, l.stop())
		}
		before := l.d.Stats().Log
		w, r, p := newWriter(v, load.depth), rand.New(rand.NewPCG(11, 1)), make([]byte, blockio.BlockSize)
		fillRandom(r, p)
		n := int64(0)
		for end := time.Now().Add(2 * time.Second); time.Now().Before(end) && err == nil && n < 1<<17; n++ {
			err = w.write(ctx, p, r.Int64N(1<<18)*blockio.BlockSize, blockio.FUA)
		}
		err = errors.Join(err, w.wait())
		after := l.d.Stats().Log
		if err := errors.Join(err, l.stop()); err != nil {
			return err
		}
		factor := float64(after.BytesWritten-before.BytesWritten) / float64(n*blockio.BlockSize)
		line("S11", fmt.Sprintf("4 KiB FUA writes, %d in flight: %.2f bytes to the log for each written, %d writes in %d batches", load.depth, factor, n,
			after.Batches-before.Batches), fmt.Sprintf("<= %.2f", load.goal), factor <= load.goal)
	}
	return nil
}
