package volumedriver

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver/blockio"
	"varve/volumedriver/blockmap"
)

// # Boot traces
//
// Machines that are made from one template read the same few per cent of it when they start. So what the first clone of a
// snapshot reads is noted, and fetched into the read cache for those that come later:
//
//	record   a clone whose parent snapshot has no trace: from its first read on for a minute, as units of 64 KiB of LBA, at
//	         most 1 GiB; then the trace is kept in the map store, until the snapshot is deleted
//	fetch    a clone is made, or opened after a restart, and its parent snapshot has a trace: its units are read, a few at a
//	         time, through the cache, unless the vPool's backend has none
//
// A trace is a hint: it is not synced, and what is not there, or wrong, costs misses. It names LBAs and not objects, so it
// outlives the scrub.

const (
	bootUnit     = 64 << 10
	bootTime     = time.Minute
	bootUnitsMax = 1 << 30 / bootUnit
	bootFetches  = 4
	bootQueueMax = 256 // clones that wait for their fetch; one more goes without

	tracePrefix = "trace/" // snapshot -> what a clone of it has read first
)

func traceKey(snapshot uuid.UUID) []byte { return []byte(tracePrefix + snapshot.String()) }

// bootRun is units of a trace, one after the other.
type bootRun struct {
	First uint64 `json:"f"`
	Units uint64 `json:"n"`
}

// bootRecorder notes what a volume reads first.
type bootRecorder struct {
	mu    sync.Mutex
	until time.Time // zero: nothing was read yet
	units map[uint64]struct{}
}

// boots fetches traces, in the order in which clones come.
type boots struct {
	d     *Driver
	queue chan *Volume
}

func newBoots(d *Driver) *boots { return &boots{d: d, queue: make(chan *Volume, bootQueueMax)} }

// beginLocked has a clone's boot recorded, or what it will read fetched, if the vPool's backend is read through a cache. The
// volume has just been made or opened. Driver.mu is held.
func (s *boots) beginLocked(v *Volume, parent *parentRef) {
	if _, cached := s.d.pools[v.root.Pool].(interface {
		Prefetch(name string, off, n int64)
	}); parent == nil || !cached {
		return
	}
	if _, err := s.d.maps.Get(traceKey(parent.Snapshot)); errors.Is(err, blockmap.ErrNotFound) {
		v.boot.Store(&bootRecorder{units: make(map[uint64]struct{})})
		return
	} else if err != nil {
		return
	}
	select {
	case s.queue <- v:
	default:
	}
}

// note notes a read, and after a while ends the recording.
func (v *Volume) noteBoot(b *bootRecorder, off int64, n int) {
	now := v.d.now()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.until.IsZero() {
		b.until = now.Add(bootTime)
	}
	if now.Before(b.until) && len(b.units) < bootUnitsMax {
		for u := uint64(off) / bootUnit; u*bootUnit < uint64(off)+uint64(n); u++ {
			b.units[u] = struct{}{}
		}
		return
	}
	if v.boot.CompareAndSwap(b, nil) {
		v.keepTrace(b)
	}
}

// keepTrace stores what was noted. b.mu is held.
func (v *Volume) keepTrace(b *bootRecorder) {
	v.mu.RLock()
	parent := v.root.Parent
	v.mu.RUnlock()
	if parent == nil || len(b.units) == 0 {
		return
	}
	value, err := json.Marshal(bootRuns(b.units))
	if err == nil {
		err = v.d.maps.Put([]blockmap.KV{{Key: traceKey(parent.Snapshot), Value: value}}, false)
	}
	if err != nil {
		v.d.log.Warn("boot trace not kept", "volume", v.id, "err", err)
		return
	}
	v.d.log.Debug("boot trace kept", "volume", v.id, "snapshot", parent.Snapshot, "units", len(b.units))
}

func bootRuns(units map[uint64]struct{}) []bootRun {
	all := make([]uint64, 0, len(units))
	for u := range units {
		all = append(all, u)
	}
	slices.Sort(all)
	var runs []bootRun
	for _, u := range all {
		if k := len(runs); k > 0 && runs[k-1].First+runs[k-1].Units == u {
			runs[k-1].Units++
			continue
		}
		runs = append(runs, bootRun{u, 1})
	}
	return runs
}

// run fetches until ctx ends.
func (s *boots) run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case v := <-s.queue:
			n, err := s.fetch(ctx, v)
			s.d.metrics.bootBytes.Add(float64(n))
			if err != nil && ctx.Err() == nil && v.err() == nil {
				s.d.log.Warn("boot trace not fetched", "volume", v.id, "err", err)
			}
		}
	}
}

// fetch reads what a trace names, and gives how many bytes that were.
func (s *boots) fetch(ctx context.Context, v *Volume) (int64, error) {
	v.mu.RLock()
	parent := v.root.Parent
	v.mu.RUnlock()
	if parent == nil {
		return 0, nil
	}
	b, err := s.d.maps.Get(traceKey(parent.Snapshot))
	if err != nil {
		return 0, err
	}
	var runs []bootRun
	if err := json.Unmarshal(b, &runs); err != nil {
		return 0, errors.Join(blockio.ErrCorrupt, err)
	}
	type part struct{ off, n int64 }
	parts := make(chan part)
	var wg sync.WaitGroup
	errs := make([]error, bootFetches)
	for i := range errs {
		wg.Go(func() {
			p := make([]byte, recordBlocksMax*blockSize)
			for x := range parts {
				if errs[i] == nil {
					errs[i] = v.read(ctx, p[:x.n], x.off)
				}
			}
		})
	}
	var total int64
	size := v.Size()
	for _, r := range runs {
		off, end := int64(min(r.First, uint64(size)))*bootUnit, int64(min(r.First+r.Units, uint64(size)))*bootUnit
		for end = min(end, size); off < end; {
			n := min(end-off, recordBlocksMax*blockSize)
			parts <- part{off, n}
			off, total = off+n, total+n
		}
	}
	close(parts)
	wg.Wait()
	return total, errors.Join(errs...)
}
