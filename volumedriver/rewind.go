package volumedriver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"varve/volumedriver/blockio"
	"varve/volumedriver/blockmap"
	"varve/volumedriver/sco"
)

// # Rewind
//
// A volume with a retention window can be had as it was at any second of it: as a snapshot, which is then read, cloned or rolled
// back to like any other. Three things make that so:
//
//	seconds   while there is a window, an SCO never holds records of two seconds (cut), so each second ends with an SCO
//	bases     every eighth of the window (at most every 15 minutes), if something was written, the driver takes a snapshot of its own,
//	          a base, which nobody sees; one goes when the next is older than the window
//	history   the scrub leaves SCOs that are newer than the oldest base as they are: what was overwritten since is still in them
//
// The state at a second is then the nearest base before it, and the SCOs after that up to the last of the second:
//
//	Rewind   everything accepted until now goes to the backend
//	target   the newest SCO whose last record is older than the second; a checkpoint, if the durable root is older than it: else a
//	         crash would cut the log after the root anew, and the SCO would have another number
//	base     the newest snapshot, base or not, at or before the target; or, if a rollback lies between, what was rolled back to
//	fork     a line of the map from the base's generation, durably a branch of the volume, with a release record for the case of a crash
//	apply    base < SCO <= target, in order
//	freeze   the line's generation and the record of the snapshot, durably together; then the line's head is given up
//
// A snapshot that was made so has no mark in any SCO. It stands where its SCO ends, and the root object on the backend lists it: a
// rebuild makes it there. It is no ancestor of anything (promote.go).
//
// What a window costs: an SCO for each second in which something is written, and the space of what was overwritten within it
// (VolumeSpace.History) and of what the bases hold. After a rebuild, and after a flatten, the window begins anew.

// ErrRewind: the window does not reach back so far.
var ErrRewind = errors.New("not within the rewind window")

const (
	rewindShare   = 8 // bases in a window
	rewindStepMax = 15 * time.Minute
	rewindStepMin = time.Second
	// RewindMax is the longest window.
	RewindMax = 31 * 24 * time.Hour
	// rewindFetches is how many headers are read at a time.
	rewindFetches = 8
	baseName      = "~rewind-" // no name that people can give
)

// rewinder takes and drops the bases of the volumes that have a window.
type rewinder struct {
	d       *Driver
	running atomic.Int32 // rewinds under way: no base goes meanwhile
}

// run looks after the bases until ctx ends.
func (w *rewinder) run(ctx context.Context) error {
	if w.d.cfg.RewindEvery < 0 {
		return nil
	}
	tick := time.NewTicker(w.d.cfg.RewindEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := w.keep(ctx); err != nil && ctx.Err() == nil {
			w.d.log.Warn("rewind window", "err", err)
		}
	}
}

// keep takes the bases that are due and drops those that the window no longer needs, of all open volumes. A volume that nobody has
// opened has written nothing.
func (w *rewinder) keep(ctx context.Context) error {
	w.d.mu.RLock()
	volumes := make([]*Volume, 0, len(w.d.volumes))
	for _, v := range w.d.volumes {
		volumes = append(volumes, v)
	}
	w.d.mu.RUnlock()
	var errs []error
	for _, v := range volumes {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := v.keepBases(ctx); err != nil && v.err() == nil {
			errs = append(errs, fmt.Errorf("bases of volume %s: %w", v.id, err))
		}
	}
	return errors.Join(errs...)
}

// SetRewind makes the volume's window so long, durably; 0: none. What was written before cannot be had back. RewindRange tells
// whether the window has begun.
func (v *Volume) SetRewind(ctx context.Context, window time.Duration) error {
	if window < 0 || window > RewindMax {
		return fmt.Errorf("rewind window of %s (at most %s): %w", window, RewindMax, blockio.ErrBeyondEnd)
	}
	if v.rewindWindow() == window {
		return nil
	}
	if err := v.editRoot(func(r *root) { r.Options.Rewind = window }); err != nil {
		return fmt.Errorf("rewind window of volume %s: %w", v.id, err)
	}
	if err := v.keepBases(ctx); err != nil { // a full log, for one: it is tried again
		v.d.log.Warn("the rewind window does not begin yet", "volume", v.id, "err", err)
	}
	return nil
}

func (v *Volume) rewindWindow() time.Duration {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.root.Options.Rewind
}

// RewindRange says how far back the volume can be had, and how long its window is; from is zero while there is none.
func (v *Volume) RewindRange() (from time.Time, window time.Duration) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	if b := v.basesLocked(); len(b) > 0 {
		from = b[0].Created.Truncate(time.Second).Add(time.Second)
	}
	return from, v.root.Options.Rewind
}

// basesLocked gives the volume's bases, oldest first. mu is held.
func (v *Volume) basesLocked() []*snapshot {
	var out []*snapshot
	for _, s := range v.snaps {
		if s.Base && s.Seq != 0 {
			out = append(out, s)
		}
	}
	return out
}

// keepBases takes a base if one is due, and drops what is older than the window needs.
func (v *Volume) keepBases(ctx context.Context) error {
	v.mu.RLock()
	window, bases, reverting := v.root.Options.Rewind, v.basesLocked(), v.reverting.Load()
	v.mu.RUnlock()
	if reverting || v.flattening.Load() || window == 0 && len(bases) == 0 {
		return nil
	}
	now := v.d.now()
	step := min(max(window/rewindShare, rewindStepMin), rewindStepMax)
	n := len(bases)
	if window > 0 && !v.Template() && (n == 0 || now.Sub(bases[n-1].Created) >= step && v.logged.Load() > bases[n-1].Seq) {
		if err := v.takeBase(ctx); err != nil {
			return err
		}
		v.mu.RLock()
		bases = v.basesLocked()
		v.mu.RUnlock()
	}
	for i, b := range bases {
		last := i+1 == len(bases)
		if window > 0 && (last || bases[i+1].Created.After(now.Add(-window))) || v.d.rewinder.running.Load() > 0 {
			return nil
		}
		if err := v.DeleteSnapshot(ctx, b.ID); err != nil && !errors.Is(err, ErrUnknownSnapshot) {
			return err
		}
	}
	return nil
}

func (v *Volume) takeBase(ctx context.Context) error {
	now := v.d.now()
	id := uuid.New()
	_, err := v.Snapshot(ctx, SnapshotSpec{ID: id, Name: baseName + id.String(), Created: now, Base: true})
	return err
}

// dropBases ends the window until the next base is taken.
func (v *Volume) dropBases(ctx context.Context) error {
	if v.d.rewinder.running.Load() > 0 {
		return fmt.Errorf("a rewind is under way: %w", blockio.ErrBusy)
	}
	v.mu.RLock()
	bases := v.basesLocked()
	v.mu.RUnlock()
	for _, b := range bases {
		if err := v.DeleteSnapshot(ctx, b.ID); err != nil && !errors.Is(err, ErrUnknownSnapshot) {
			return err
		}
	}
	return nil
}

// historyFrom is the log sequence from which on the scrub has to leave a volume's SCOs as they are; ok is false if it may do as
// it likes.
func (d *Driver) historyFrom(r *root) (seq uint64, ok bool, err error) {
	if v := d.lookup(r.ID); v != nil {
		v.mu.RLock()
		defer v.mu.RUnlock()
		if b := v.basesLocked(); len(b) > 0 {
			return b[0].Seq, true, nil
		}
		return 0, false, nil
	}
	err = d.maps.Scan(snapshotsKey(r.ID), func(_, value []byte) error {
		var s snapshot
		if err := json.Unmarshal(value, &s); err != nil {
			return errors.Join(blockio.ErrCorrupt, err)
		}
		if s.Base && s.Gen != 0 && (!ok || s.Seq < seq) {
			seq, ok = s.Seq, true
		}
		return nil
	})
	return seq, ok, err
}

// Rewind takes a snapshot of the volume as it was when the second of at began: of every write that was logged before. The
// snapshot is durable and on the backend when it returns. progress may be nil; it is told SCOs. ErrRewind if the window does
// not reach back so far.
func (v *Volume) Rewind(ctx context.Context, at time.Time, spec SnapshotSpec, progress func(done, total int64)) (Snapshot, error) {
	out, err := v.rewind(ctx, at.Truncate(time.Second), spec, progress)
	if err != nil {
		return Snapshot{}, fmt.Errorf("rewind volume %s to %s: %w", v.id, at.UTC().Format(time.RFC3339), err)
	}
	return out, nil
}

func (v *Volume) rewind(ctx context.Context, at time.Time, spec SnapshotSpec, progress func(done, total int64)) (Snapshot, error) {
	if at.After(v.d.now()) {
		return Snapshot{}, fmt.Errorf("that has not been yet: %w", ErrRewind)
	}
	v.d.rewinder.running.Add(1)
	defer v.d.rewinder.running.Add(-1)
	v.order.Lock()
	accepted := v.seq
	v.order.Unlock()
	if err := v.waitLogged(accepted); err != nil {
		return Snapshot{}, err
	}
	if err := v.WaitBacked(ctx, accepted); err != nil {
		return Snapshot{}, err
	}
	steps, oldest, err := v.stepsTo(at)
	if err != nil {
		return Snapshot{}, err
	}
	target := steps[0].at
	if err := v.rootedTo(target.Last); err != nil {
		return Snapshot{}, err
	}
	line, base, err := v.forkLine(spec, steps, oldest)
	if err != nil {
		return Snapshot{}, err
	}
	s := &snapshot{SnapshotSpec: spec, Seq: target.Last, Size: base.Size, ModTime: base.ModTime, UsedBlocks: base.UsedBlocks,
		Handle: line.handle, Rewound: true}
	if err = v.applySteps(ctx, s, line.steps, progress); err == nil {
		err = v.keepLine(s)
	}
	if err != nil {
		return Snapshot{}, errors.Join(err, v.giveUpLine(mapPoint{handle: line.handle}))
	}
	v.d.rootChanged(v)
	return v.describe(s), nil
}

// rootedTo makes sure that a crash does not cut the log anew before record seq: that the SCOs up to there keep their numbers.
func (v *Volume) rootedTo(seq uint64) error {
	v.storing.Lock()
	rooted := v.stored.Backed >= seq
	v.storing.Unlock()
	if rooted {
		return nil
	}
	return v.d.checkpointer.checkpoint()
}

// stepsTo gives the SCOs from the newest whose last record is older than at down to the one at which the oldest base stands,
// and that base.
func (v *Volume) stepsTo(at time.Time) (steps []stored, oldest *snapshot, err error) {
	v.mu.RLock()
	bases, seq := v.basesLocked(), v.root.Prev.Seq
	v.mu.RUnlock()
	if len(bases) == 0 || bases[0].Gen == 0 {
		return nil, nil, fmt.Errorf("the volume has no window: %w", ErrRewind)
	}
	oldest = bases[0]
	for seq != 0 {
		p, err := v.d.placeOf(v.id, seq)
		if err != nil {
			return nil, nil, err
		}
		if len(steps) > 0 || p.Time < at.UnixNano() {
			steps = append(steps, stored{seq: seq, at: p})
		}
		if p.Last <= oldest.Seq {
			break
		}
		seq = p.Prev
	}
	if len(steps) == 0 {
		from, _ := v.RewindRange()
		return nil, nil, fmt.Errorf("the window begins at %s: %w", from.UTC().Format(time.RFC3339), ErrRewind)
	}
	return steps, oldest, nil
}

// rewindLine is a line of the map that is to become a snapshot: steps are to be applied to it, oldest first.
type rewindLine struct {
	handle blockmap.Handle
	steps  []stored
}

// forkLine finds the snapshot to begin with and forks it. steps are newest first.
func (v *Volume) forkLine(spec SnapshotSpec, steps []stored, oldest *snapshot) (line rewindLine, base *snapshot, err error) {
	v.snapping.Lock()
	defer v.snapping.Unlock()
	if _, err := v.newSnapshot(spec); err != nil {
		return line, nil, err
	}
	v.mu.RLock()
	snaps := v.snaps
	v.mu.RUnlock()
	for i, s := range steps {
		before := uint64(0)
		if i+1 < len(steps) {
			before = steps[i+1].at.Last
		}
		if base = frozenIn(snaps, max(before+1, oldest.Seq), s.at.Last); base != nil {
			line.steps = steps[:i]
			break
		}
		if s.at.Revert != 0 {
			if base = frozenIn(snaps, s.at.Revert, s.at.Revert); base == nil {
				return line, nil, fmt.Errorf("the volume was rolled back meanwhile, to a snapshot that is gone: %w", ErrRewind)
			}
			line.steps = steps[:i+1] // its own zeros are none; its size counts
			break
		}
	}
	if base == nil {
		return line, nil, fmt.Errorf("no snapshot to begin with: %w", ErrRewind)
	}
	line.steps = slices.Clone(line.steps)
	slices.Reverse(line.steps)
	v.storing.Lock()
	defer v.storing.Unlock()
	r := v.stored
	_, err = v.d.maps.Fork(base.Handle, base.Gen, func(h blockmap.Handle) []blockmap.KV {
		line.handle = h
		r.Branches = append(slices.Clone(r.Branches), branch{Handle: h, Parent: base.Handle, Gen: base.Gen})
		return []blockmap.KV{r.encode(), {Key: releaseKey(mapPoint{handle: h}), Value: v.id[:]}}
	})
	if err != nil {
		return line, nil, err
	}
	v.stored = r
	v.mu.Lock()
	v.root.Branches = r.Branches
	v.mu.Unlock()
	return line, base, nil
}

// frozenIn gives a snapshot that stands in from..to: at the end of the SCO with these records, since nothing but marks
// follows a mark in an SCO.
func frozenIn(snaps []*snapshot, from, to uint64) *snapshot {
	for _, s := range snaps {
		if s.Seq >= from && s.Seq <= to && s.Gen != 0 {
			return s
		}
	}
	return nil
}

// applySteps brings the line of s to where it stands. Headers are read a few at a time, and applied in order.
func (v *Volume) applySteps(ctx context.Context, s *snapshot, steps []stored, progress func(done, total int64)) error {
	headers := make([]*sco.Header, rewindFetches)
	for from := 0; from < len(steps); from += rewindFetches {
		some := steps[from:min(from+rewindFetches, len(steps))]
		g, gctx := errgroup.WithContext(ctx)
		for i, step := range some {
			g.Go(func() error {
				o, h, err := v.d.openPlace(gctx, v.root.Pool, v.id, step.seq, step.at)
				if err == nil {
					headers[i] = h
					o.object.Close()
				}
				return err
			})
		}
		if err := g.Wait(); err != nil {
			return err
		}
		for i, step := range some {
			h := headers[i]
			used, err := v.d.applySCO(s.Handle, uint32(step.seq), h.Zeros, h.Extents)
			if err != nil {
				return fmt.Errorf("apply sco %d: %w", step.seq, err)
			}
			s.UsedBlocks += used
			s.Size, s.ModTime = int64(h.Size), h.ModTime
			if progress != nil {
				progress(int64(from+i+1), int64(len(steps)))
			}
		}
	}
	return nil
}

// keepLine makes the snapshot durable, with its generation.
func (v *Volume) keepLine(s *snapshot) error {
	v.snapping.Lock()
	defer v.snapping.Unlock()
	if _, err := v.newSnapshot(s.SnapshotSpec); err != nil {
		return err
	}
	v.storing.Lock() // over the freeze and the note of it: whoever asks what lives on the line sees both or neither
	var err error
	if s.Gen, err = v.d.maps.Generation(s.Handle); err == nil {
		_, err = v.d.maps.Freeze(s.Handle, []blockmap.KV{s.encode(v.id)})
	}
	if err == nil {
		v.mu.Lock()
		v.snaps = append(slices.Clone(v.snaps), s)
		v.sortSnapshots()
		v.mu.Unlock()
	}
	v.storing.Unlock()
	if err != nil {
		return err
	}
	return v.behead(mapPoint{handle: s.Handle})
}

// giveUpLine gives back a line that has become nothing.
func (v *Volume) giveUpLine(p mapPoint) error {
	v.snapping.Lock()
	defer v.snapping.Unlock()
	return v.behead(p)
}
