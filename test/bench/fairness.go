package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver"
	"varve/volumedriver/backend/local"
	"varve/volumedriver/blockio"
	"varve/volumedriver/vfs"
)

// The row S15 asks how volumes share a node. All of it is in this process, on real files, with uploads going on.

const (
	shareVolumes = 64
	shareTime    = 3 * time.Second
	shareBytes   = 64 << 20 // of each volume
)

func fairnessRows(ctx context.Context, _ *recorder, dir string) (err error) {
	store, err := local.Open(vfs.OS(), filepath.Join(dir, "backend"))
	if err != nil {
		return err
	}
	l, err := openLab(ctx, volumedriver.Config{LogBytes: 1 << 30}, dir, uuid.New(), store)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.stop()) }()
	volumes := make([]*volumedriver.Volume, shareVolumes)
	for i := range volumes {
		if volumes[i], err = l.d.Create(ctx, l.spec(shareBytes)); err != nil {
			return err
		}
	}
	one := make([]*volumedriver.Volume, shareVolumes)
	for i := range one {
		one[i] = volumes[0]
	}
	var rates [2][]float64 // one volume, many; of repetitions
	worst := 1.0
	for range 3 {
		for i, vs := range [][]*volumedriver.Volume{one, volumes} {
			counts, err := l.load(ctx, vs)
			if err != nil {
				return err
			}
			total, least := int64(0), counts[0]
			for _, n := range counts {
				total, least = total+n, min(least, n)
			}
			rates[i] = append(rates[i], float64(total)/shareTime.Seconds())
			if i == 1 {
				worst = min(worst, float64(least)*shareVolumes/float64(total))
			}
		}
	}
	a, b := spreadOf(rates[0]).Median, spreadOf(rates[1]).Median
	line("S15", fmt.Sprintf("%d writers of 4 KiB with FUA on as many volumes: %.0f/s, on one volume %.0f/s, %.2f of it; the worst volume has %.2f of its share",
		shareVolumes, b, a, b/a, worst), ">= 0.9, >= 0.5", b >= 0.9*a && worst >= 0.5)
	alone, err := l.others(ctx, volumes[1:17], nil)
	if err != nil {
		return err
	}
	beside, err := l.others(ctx, volumes[1:17], volumes[0])
	if err != nil {
		return err
	}
	m0, p0 := quantiles(alone)
	m1, p1 := quantiles(beside)
	line("S15", fmt.Sprintf("16 volumes, each one 4 KiB FUA write every 5 ms: median %.2f ms, p99 %.2f ms; beside one that writes 4 KiB at random, 256 in flight: median %.2f ms, p99 %.2f ms, %.1f times",
		millis(m0), millis(p0), millis(m1), millis(p1), float64(p1)/float64(p0)), "p99 <= 2 times", p1 <= 2*p0)
	return nil
}

// load has one writer for each entry write for a while, and counts what each did.
func (l *lab) load(ctx context.Context, vs []*volumedriver.Volume) ([]int64, error) {
	counts, errs := make([]int64, len(vs)), make([]error, len(vs))
	var wg sync.WaitGroup
	end := time.Now().Add(shareTime)
	for i, v := range vs {
		wg.Go(func() {
			r, p := rand.New(rand.NewPCG(uint64(i), 15)), make([]byte, blockio.BlockSize)
			fillRandom(r, p)
			for time.Now().Before(end) && errs[i] == nil {
				errs[i] = v.Write(ctx, p, r.Int64N(shareBytes/blockio.BlockSize)*blockio.BlockSize, blockio.FUA)
				counts[i]++
			}
		})
	}
	wg.Wait()
	return counts, errors.Join(append(errs, l.d.Drain(ctx))...)
}

// others gives what small writers wait, beside a hog if there is one.
func (l *lab) others(ctx context.Context, vs []*volumedriver.Volume, hog *volumedriver.Volume) ([]time.Duration, error) {
	var wg sync.WaitGroup
	var over atomic.Bool
	var hogErr error
	if hog != nil {
		wg.Go(func() {
			w, r, p := newWriter(hog, 256), rand.New(rand.NewPCG(1, 16)), make([]byte, blockio.BlockSize)
			fillRandom(r, p)
			for !over.Load() && hogErr == nil {
				hogErr = w.write(ctx, p, r.Int64N(shareBytes/blockio.BlockSize)*blockio.BlockSize, 0)
			}
			hogErr = errors.Join(hogErr, w.wait())
		})
	}
	times, errs := make([][]time.Duration, len(vs)), make([]error, len(vs))
	var small sync.WaitGroup
	end := time.Now().Add(shareTime)
	for i, v := range vs {
		small.Go(func() {
			r, p := rand.New(rand.NewPCG(uint64(i), 17)), make([]byte, blockio.BlockSize)
			for time.Now().Before(end) && errs[i] == nil {
				errs[i] = stopwatch(&times[i], func() error {
					return v.Write(ctx, p, r.Int64N(shareBytes/blockio.BlockSize)*blockio.BlockSize, blockio.FUA)
				})
				time.Sleep(5 * time.Millisecond) // a client's own pace
			}
		})
	}
	small.Wait()
	over.Store(true)
	wg.Wait()
	var all []time.Duration
	for _, t := range times {
		all = append(all, t...)
	}
	return all, errors.Join(append(errs, hogErr, l.d.Drain(ctx))...)
}
