package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/google/uuid"

	"varve/test/harness"
	"varve/volumedriver"
	"varve/volumedriver/backend/backendtest"
	"varve/volumedriver/blockio"
	"varve/volumedriver/blockmap"
	"varve/volumedriver/vfs"
)

// The rows S1, S2 and S16 ask what memory grows with. A TiB is a TiB in the block map (S1): its leaves are made as writes would make
// them, without the data. S16's hour is a minute at most here; `make soak` has the hours.

const memoryVolumes = 10000

func memoryRows(ctx context.Context, r *recorder, dir string) error {
	for _, row := range []struct {
		name string
		run  func(context.Context, string) error
	}{{"S1", mapMemory}, {"S2", idleVolumes}, {"S16", steadyMemory}} {
		if !r.settings.wantsRow(row.name) {
			continue
		}
		sub := filepath.Join(dir, row.name)
		if err := errors.Join(os.MkdirAll(sub, 0o755), row.run(ctx, sub), os.RemoveAll(sub)); err != nil {
			return fmt.Errorf("%s: %w", row.name, err)
		}
	}
	return nil
}

// mapMemory maps a TiB not at all, in order, and at random (the last for 64 GiB, with a budget that is as small in proportion).
func mapMemory(ctx context.Context, dir string) error {
	before := heap()
	l, err := openLab(ctx, volumedriver.Config{LogBytes: 256 << 20, NoPrewrite: true}, filepath.Join(dir, "untouched"), uuid.New(), backendtest.NewMem())
	if err != nil {
		return err
	}
	const tib, volumes = 1 << 40, 16
	empty := heap()
	for range volumes {
		if _, err := l.d.Create(ctx, l.spec(64*tib)); err != nil {
			return errors.Join(err, l.stop())
		}
	}
	each := max(0, heap()-empty) / (volumes * 64)
	if err := l.stop(); err != nil {
		return err
	}
	line("S1", fmt.Sprintf("%d untouched volumes of 64 TiB: %.3f MiB of RAM for each TiB (%.0f MiB the driver itself)", volumes, mib(each),
		mib(empty-before)), "<= 1 MiB", mib(each) <= 1)
	for _, load := range []struct {
		name   string
		bytes  int64
		run    uint64 // blocks that lie one after the other
		budget int64
		goal   float64 // MiB for each TiB
	}{{"in order", tib, blockmap.LeafBlocks * 8, 256 << 20, 16}, {"4 KiB at random", tib / 16, 1, 16 << 20, 256}} {
		if err := mappedMemory(ctx, filepath.Join(dir, load.name), load.name, load.bytes, load.run, load.budget, load.goal); err != nil {
			return err
		}
	}
	return nil
}

func mib(n int64) float64 { return float64(n) / (1 << 20) }

func mappedMemory(ctx context.Context, dir, name string, bytes int64, run uint64, budget int64, goal float64) error {
	s, err := blockmap.Open(blockmap.Config{FS: vfs.OS(), Dir: dir, BudgetBytes: budget})
	if err != nil {
		return err
	}
	h, err := s.NewHandle()
	if err != nil {
		return errors.Join(err, s.Close())
	}
	blocks := uint64(bytes / blockio.BlockSize)
	most := int64(0)
	for lba, n := uint64(0), 0; lba < blocks && err == nil; lba, n = lba+run, n+1 {
		ref := blockmap.MakeRef(uint32(1+n), 0)
		if run == 1 { // no block follows the one before it in its SCO
			ref = blockmap.MakeRef(uint32(1+n/4096), uint32(n*1031)%4096)
		}
		if err = s.Set(h, lba, ref, uint32(run)); n%4096 == 0 {
			most = max(most, s.Stats().Bytes)
			err = errors.Join(err, ctx.Err())
		}
	}
	if err = errors.Join(err, s.Checkpoint(nil, nil)); err != nil {
		return errors.Join(err, s.Close())
	}
	// A read of the map that is in no memory costs one of the disk.
	const lookups = 20000
	misses := s.Stats().Misses
	r := rand.New(rand.NewPCG(1, 2))
	refs := make([]blockmap.Ref, 1)
	start := time.Now()
	for range lookups {
		if err = errors.Join(err, s.Lookup(h, r.Uint64N(blocks), refs)); err != nil {
			return errors.Join(err, s.Close())
		}
	}
	took := time.Since(start) / lookups
	st := s.Stats()
	most = max(most, st.Bytes)
	perTiB := mib(most) * (1 << 40) / float64(bytes)
	line("S1", fmt.Sprintf("%d GiB mapped %s, budget %.0f MiB: at most %.1f MiB, %.1f MiB for each TiB, %.2f of the budget", bytes>>30, name,
		mib(budget), mib(most), perTiB, float64(most)/float64(budget)), fmt.Sprintf("<= %.0f MiB for each TiB, <= 1.05 of the budget", goal),
		perTiB <= goal*1.05 && float64(most) <= 1.05*float64(budget))
	note("S1", fmt.Sprintf("random look-ups there: %.2f read the map's disk, %.1f us each", float64(st.Misses-misses)/lookups, float64(took.Nanoseconds())/1e3))
	return s.Close()
}

// idleVolumes makes volumes, and attaches them after a restart.
func idleVolumes(ctx context.Context, dir string) error {
	pool, store := uuid.New(), backendtest.NewMem()
	cfg := volumedriver.Config{LogBytes: 256 << 20, NoPrewrite: true}
	l, err := openLab(ctx, cfg, dir, pool, store)
	if err != nil {
		return err
	}
	ids := make([]uuid.UUID, 0, memoryVolumes)
	start := time.Now()
	for range memoryVolumes {
		s := l.spec(1 << 40)
		if _, err := l.d.Create(ctx, s); err != nil {
			return errors.Join(err, l.stop())
		}
		ids = append(ids, s.ID)
	}
	made := time.Since(start)
	if err := errors.Join(l.d.Drain(ctx), l.stop()); err != nil {
		return err
	}
	l = nil
	before := heap()
	start = time.Now()
	if l, err = openLab(ctx, cfg, dir, pool, store); err != nil {
		return err
	}
	opened := time.Since(start)
	p := make([]byte, blockio.BlockSize)
	for _, id := range ids {
		v, err := l.d.Volume(ctx, id)
		if err == nil {
			err = v.Read(ctx, p, 0)
		}
		if err != nil {
			return errors.Join(err, l.stop())
		}
	}
	attached := time.Since(start)
	each := (heap() - before + l.d.Stats().Map.Bytes) / memoryVolumes
	line("S2", fmt.Sprintf("%d volumes of 1 TiB: %.1f KiB of RAM each when attached and idle", memoryVolumes, float64(each)/1024), "<= 256 KiB", each <= 256<<10)
	line("S2", fmt.Sprintf("they are made in %.1f s; after a restart (driver open after %.2f s) all are attached and read in %.1f s", made.Seconds(),
		opened.Seconds(), attached.Seconds()), "<= 60 s", attached <= time.Minute)
	return l.stop()
}

// steadyMemory runs a mixed load and looks at memory, goroutines, and what an operation allocates.
func steadyMemory(ctx context.Context, dir string) error {
	store := newTally(backendtest.NewMem())
	l, err := openLab(ctx, volumedriver.Config{LogBytes: 256 << 20, ScrubEvery: time.Second, ScrubGrace: time.Second, ScrubBytesPerSecond: -1}, dir,
		uuid.New(), store)
	if err != nil {
		return err
	}
	const size, took = 64 << 20, 40 * time.Second
	v, err := l.d.Create(ctx, l.spec(size))
	if err == nil {
		err = l.fillOrdered(ctx, v, 0, size)
	}
	if err != nil {
		return errors.Join(err, l.stop())
	}
	w, r, p := newWriter(v, 16), rand.New(rand.NewPCG(16, 1)), make([]byte, blockio.BlockSize)
	var half, halfHeap int64
	var goroutines [2]int
	begin := time.Now()
	for n := 0; time.Since(begin) < took && err == nil; n++ {
		fillRandom(r, p)
		off := r.Int64N(size/blockio.BlockSize) * blockio.BlockSize
		if n%3 == 0 {
			err = v.Read(ctx, p, off)
		} else {
			err = w.write(ctx, p, off, 0)
		}
		if n%64 == 0 {
			time.Sleep(time.Millisecond) // so that the disk does not fill, and the scrub keeps up
		}
		if half == 0 && time.Since(begin) > took/2 {
			halfHeap, goroutines[0] = heap()-store.heldNow(), runtime.NumGoroutine()
			half = harness.RSS(os.Getpid())
		}
	}
	err = errors.Join(err, w.wait(), ctx.Err())
	end, endHeap := harness.RSS(os.Getpid()), heap()-store.heldNow()
	goroutines[1] = runtime.NumGoroutine()
	if err != nil {
		return errors.Join(err, l.stop())
	}
	growth := float64(endHeap)/float64(halfHeap) - 1
	line("S16", fmt.Sprintf("%s of reads, writes, uploads and scrub: live memory without the store's %.1f MiB half-way, %.1f MiB at the end (%+.1f %%), RSS %.0f then %.0f MiB,"+
		" goroutines %d then %d", took, mib(halfHeap), mib(endHeap), 100*growth, mib(half), mib(end), goroutines[0], goroutines[1]), "<= 2 % in an hour",
		growth <= 0.02 && goroutines[1] <= goroutines[0]+8)
	err = l.allocations(ctx, v, p)
	return errors.Join(err, l.stop())
}

// nothing is a Completer that nobody asks.
type nothing struct{ ended chan struct{} }

func (n *nothing) Done(uint64, error) { n.ended <- struct{}{} }
func (*nothing) Settle(bool)          {}

// allocations counts them, whoever makes them, for each read of a block that is at hand and each write into the log.
func (l *lab) allocations(ctx context.Context, v *volumedriver.Volume, p []byte) error {
	if err := l.d.Drain(ctx); err != nil {
		return err
	}
	c := &nothing{make(chan struct{}, 1)}
	read := func() error {
		err := v.TryRead(p, 0)
		if errors.Is(err, blockio.ErrBusy) {
			err = v.Read(ctx, p, 0)
		}
		return err
	}
	write := func() error {
		if err := v.TryWrite(p, 0, 0, c, 0); err != nil {
			return err
		}
		v.Kick()
		<-c.ended
		return nil
	}
	for _, op := range []struct {
		name string
		do   func() error
	}{{"read", read}, {"write", write}} {
		const n = 2000
		var before, after runtime.MemStats
		for range 200 {
			if err := op.do(); err != nil {
				return err
			}
		}
		runtime.ReadMemStats(&before)
		for range n {
			if err := op.do(); err != nil {
				return err
			}
		}
		runtime.ReadMemStats(&after)
		each := float64(after.Mallocs-before.Mallocs) / n
		line("S16", fmt.Sprintf("4 KiB %s: %.2f allocations", op.name, each), "0", each < 0.5)
	}
	return nil
}
