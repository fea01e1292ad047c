package volumedriver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver/blockio"
	"varve/volumedriver/blockmap"
)

// # Clones and rollback
//
// A clone is a volume whose map begins as a fork of a snapshot's generation. It numbers its SCOs from above every number
// its parent has reserved, and its root says for each span of numbers who wrote it and in which epoch; so an ordinal in its
// map names one SCO, and nobody asks the parent. Making one costs two records, whatever the size.
//
// A rollback is a record in the volume's log, so that it happens in order or not at all:
//
//	gate        no more writes; what is accepted is taken as a snapshot of the old head and goes to the backend
//	mark        Revert to the snapshot's sequence -> log, synced: from here it will happen, after a crash too
//	cut         the mark is an SCO of its own, which tells a rebuild
//	install     map := fork of the snapshot's generation; root with the new handle, durably; gate opens

// owners gives volumes that wrote SCOs short numbers, for the cache of open objects.
type owners struct {
	mu     sync.Mutex
	number map[uuid.UUID]uint32
}

// ownerSpan is an epochSpan ready for use: SCO numbers from From on.
type ownerSpan struct {
	From   uint64
	Epoch  uint64
	Volume uuid.UUID
	Number uint32 // of Volume, on this node
}

func (o *owners) spans(r *root) *[]ownerSpan {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.number == nil {
		o.number = make(map[uuid.UUID]uint32)
	}
	out := make([]ownerSpan, 0, len(r.Epochs))
	for _, s := range r.Epochs {
		w := ownerSpan{From: s.From, Epoch: s.Epoch, Volume: s.Volume}
		if w.Volume == uuid.Nil {
			w.Volume = r.ID
		}
		n, ok := o.number[w.Volume]
		if !ok {
			n = uint32(len(o.number)) + 1
			o.number[w.Volume] = n
		}
		w.Number = n
		out = append(out, w)
	}
	return &out
}

// writer gives who wrote SCO number seq.
func (v *Volume) writer(seq uint64) ownerSpan {
	spans := *v.span.Load()
	for i := len(spans) - 1; i > 0; i-- {
		if seq >= spans[i].From {
			return spans[i]
		}
	}
	return spans[0]
}

// Clone makes a volume that begins as a snapshot of another one, without copying anything. It waits until the snapshot is on
// the backend. The size and vPool in the Spec are ignored: they are those of the parent.
func (d *Driver) Clone(ctx context.Context, parent, snapshot uuid.UUID, s Spec) (*Volume, error) {
	of, err := d.Volume(ctx, parent)
	if err != nil {
		return nil, fmt.Errorf("clone: %w", err)
	}
	p, err := d.holder(ctx, parent, snapshot)
	if err != nil {
		return nil, fmt.Errorf("clone: %w", err)
	}
	if _, err := p.frozenSnapshot(ctx, snapshot); err != nil {
		return nil, fmt.Errorf("clone: %w", err)
	}
	p.storing.Lock()
	base := p.stored.NextSCO // the snapshot is in the map, so its SCOs are below
	epochs := slices.Clone(p.stored.Epochs)
	p.storing.Unlock()
	for i := range epochs {
		if epochs[i].Volume == uuid.Nil {
			epochs[i].Volume = p.id
		}
	}
	epochs = slices.DeleteFunc(epochs, func(e epochSpan) bool { return e.From >= base })
	keys, err := d.newKey(p.root.Pool, s.ID)
	if err != nil {
		return nil, fmt.Errorf("clone to volume %s: %w", s.ID, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if v := d.volumes[s.ID]; v != nil {
		return v, v.cloneOf(p.id, snapshot)
	}
	_, doomed := d.doomed[s.ID]
	if _, closed := d.roots[s.ID]; closed || doomed || d.closed {
		return nil, fmt.Errorf("clone to volume %s: it exists, or is being deleted: %w", s.ID, blockio.ErrClosed)
	}
	sn, err := p.findSnapshot(snapshot) // it may have been deleted meanwhile; from here on it cannot be
	if err == nil && d.owned.owner(p.id, snapshot) == uuid.Nil || of.husk.Load() {
		err = fmt.Errorf("snapshot %s of volume %s: %w", snapshot, parent, ErrUnknownSnapshot)
	}
	if err != nil {
		return nil, fmt.Errorf("clone: %w", err)
	}
	of.mu.RLock()
	options := of.root.Options
	of.mu.RUnlock()
	now := d.now().UnixNano()
	options.Rewind = 0
	r := root{ID: s.ID, Pool: p.root.Pool, Epochs: append(epochs, epochSpan{From: base, Epoch: s.Epoch}), Size: sn.Size, ModTime: sn.ModTime,
		NextSCO: base, UsedBlocks: sn.UsedBlocks, Keys: keys, Options: options, Parent: &parentRef{Volume: p.id, Snapshot: snapshot, Seq: sn.Seq, Base: base},
		Name: rootObject{N: 1, PoolName: s.PoolName, Path: s.Path, Kind: s.Kind, Created: now}}
	_, err = d.maps.Fork(sn.Handle, sn.Gen, func(h blockmap.Handle) []blockmap.KV {
		r.Handle, r.Branches = h, []branch{{Handle: h, Parent: sn.Handle, Gen: sn.Gen}}
		return []blockmap.KV{r.encode()}
	})
	if err != nil {
		return nil, fmt.Errorf("clone snapshot %s of volume %s: %w", sn.Name, parent, err)
	}
	v := newVolume(d, r)
	v.applyLimits()
	d.volumes[s.ID] = v
	d.children[snapshot]++
	d.destager.add(v)
	d.boots.beginLocked(v, r.Parent)
	return v, nil
}

// cloneOf is nil if the volume is a clone of that snapshot.
func (v *Volume) cloneOf(parent, snapshot uuid.UUID) error {
	v.mu.RLock()
	defer v.mu.RUnlock()
	if p := v.root.Parent; p == nil || p.Volume != parent || p.Snapshot != snapshot {
		return fmt.Errorf("volume %s exists and is no clone of snapshot %s: %w", v.id, snapshot, blockio.ErrClosed)
	}
	return nil
}

// Parent says of which volume and snapshot this one is a clone.
func (v *Volume) Parent() (volume, snapshot uuid.UUID, ok bool) {
	v.d.mu.RLock()
	defer v.d.mu.RUnlock()
	o, ok := v.d.originLocked(v.id)
	if !ok {
		return uuid.Nil, uuid.Nil, false
	}
	return v.d.owned.owner(o.holder, o.snapshot), o.snapshot, true
}

// SetTemplate makes the volume refuse writes, or take them again. It is durable when it returns.
func (v *Volume) SetTemplate(ctx context.Context, on bool) error {
	if on {
		v.template.Store(true) // first, so that nothing is accepted after the flush
		if err := v.Flush(ctx); err != nil {
			v.template.Store(v.Template())
			return err
		}
	}
	err := v.editRoot(func(r *root) { r.Template = on })
	v.template.Store(v.Template())
	return err
}

// Template says whether the volume refuses writes.
func (v *Volume) Template() bool {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.root.Template
}

// Rollback makes the volume what it was at the snapshot; what it was until now stays as snapshot saveAs. Writes wait
// meanwhile. When it fails, either nothing has changed but that saveAs may exist, or ctx has ended after the point of no
// return: then the rollback goes on by itself and the volume serves nothing until it is done.
func (v *Volume) Rollback(ctx context.Context, id uuid.UUID, saveAs SnapshotSpec) error {
	h, err := v.d.holder(ctx, v.id, id)
	if err == nil && h != v {
		err = fmt.Errorf("snapshot %s stands in the log of volume %s: %w", id, h.id, ErrTakenOver)
	}
	var target *snapshot
	if err == nil {
		target, err = v.frozenSnapshot(ctx, id)
	}
	if err != nil {
		return fmt.Errorf("roll back volume %s: %w", v.id, err)
	}
	v.order.Lock()
	if v.gated || v.template.Load() {
		v.order.Unlock()
		return fmt.Errorf("roll back volume %s: a template, or rolled back just now: %w", v.id, blockio.ErrReadOnly)
	}
	v.gated = true
	v.order.Unlock()
	if err := v.rollback(ctx, target, saveAs); err != nil {
		return fmt.Errorf("roll back volume %s to snapshot %s: %w", v.id, target.Name, err)
	}
	if v.rewindWindow() > 0 { // so that what comes now can be had back when the snapshot is gone
		if err := v.takeBase(ctx); err != nil {
			v.d.log.Warn("no base for the rewind window after a rollback", "volume", v.id, "err", err)
		}
	}
	return nil
}

// RolledBack says whether the rollback that kept what the volume was as snapshot saved has been done, if need be when it is: a caller that
// does not know how its Rollback ended asks so, as saved may be there though the rollback is not. ErrUnknownSnapshot if it is not there.
func (v *Volume) RolledBack(ctx context.Context, saved uuid.UUID) (bool, error) {
	if _, err := v.findSnapshot(saved); err != nil {
		return false, err
	}
	v.order.Lock()
	seq := v.seq
	v.order.Unlock()
	if err := errors.Join(v.Flush(ctx), v.WaitBacked(ctx, seq)); err != nil { // a rollback that is in the log is in the map then
		return false, fmt.Errorf("see whether volume %s has been rolled back: %w", v.id, err)
	}
	s, err := v.findSnapshot(saved)
	if err != nil {
		return false, err
	}
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.root.Handle != s.Handle, nil // the snapshot was taken on the line that the rollback leaves
}

// rollback does it, with the gate closed; install opens it, or a failure before the mark is in the log.
func (v *Volume) rollback(ctx context.Context, target *snapshot, saveAs SnapshotSpec) error {
	open := func(err error) error {
		v.order.Lock()
		v.gated = false
		v.freed.Broadcast()
		v.order.Unlock()
		return err
	}
	if err := v.waitClaims(ctx); err != nil {
		return open(err)
	}
	saved, err := v.Snapshot(ctx, saveAs)
	if err == nil {
		err = v.WaitBacked(ctx, saved.Seq)
	}
	if err != nil {
		return open(err)
	}
	v.snapping.Lock()
	defer v.snapping.Unlock()
	if _, err := v.findSnapshot(target.ID); err != nil || !v.owns(target.ID) {
		return open(cmp.Or(err, ErrUnknownSnapshot))
	}
	w := newWaiter()
	v.order.Lock()
	err = v.appendMarkLocked(ctx, recordRevert, target.Seq, w)
	seq := v.seq
	v.order.Unlock()
	if err != nil {
		return open(err)
	}
	v.d.wal.Kick()
	if err := w.wait(); err != nil {
		return err // the log is fenced, and with it the volume
	}
	if err := v.Flush(ctx); err != nil {
		return err
	}
	return v.WaitBacked(ctx, seq)
}

// waitClaims waits until nobody holds a block for read-modify-write: whoever does has been let in before the gate closed.
func (v *Volume) waitClaims(ctx context.Context) error {
	for {
		v.order.Lock()
		n := len(v.claims)
		v.order.Unlock()
		if n == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
}

// revertLoggedLocked notes that a rollback is in the log, and gives the size of the volume after it. mu is held.
func (v *Volume) revertLoggedLocked(seq uint64, size int64) int64 {
	v.destage.marks++
	v.reverting.Store(true)
	return v.snapshotAtLocked(seq).size(size)
}

// waitReverted waits until a rollback is done.
func (v *Volume) waitReverted(ctx context.Context) error {
	if ctx == nil {
		return blockio.ErrBusy
	}
	for v.reverting.Load() {
		if err := v.err(); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(2 * time.Millisecond):
		}
	}
	return nil
}

// fork makes r's map that of a snapshot, durably with r, on a new handle. storing is held.
func (v *Volume) fork(r *root, target *snapshot) error {
	if target == nil || target.Gen == 0 {
		return fmt.Errorf("the snapshot to go back to is not there: %w", blockio.ErrCorrupt)
	}
	old := r.Handle
	_, err := v.d.maps.Fork(target.Handle, target.Gen, func(h blockmap.Handle) []blockmap.KV {
		r.Handle = h
		r.Branches = append(slices.Clone(r.Branches), branch{Handle: h, Parent: target.Handle, Gen: target.Gen})
		r.UsedBlocks = target.UsedBlocks
		return []blockmap.KV{r.encode(), {Key: releaseKey(mapPoint{handle: old}), Value: v.id[:]}}
	})
	return err
}

// endRevert lets readers and writers go on.
func (v *Volume) endRevert(size int64) {
	v.order.Lock()
	v.size = size
	v.gated = false
	v.reverting.Store(false)
	v.freed.Broadcast()
	v.order.Unlock()
}

// pin counts the readers of a generation.
type pin struct {
	readers int
	view    blockmap.Handle
}

// SnapshotReader reads a snapshot. Methods may be called concurrently; Close ends it.
type SnapshotReader struct {
	v    *Volume
	s    *snapshot
	view blockmap.Handle
	once sync.Once
}

// OpenSnapshot gives access to what a snapshot holds. It waits until the snapshot is on the backend. The snapshot may be
// deleted meanwhile; what it holds is given back when the last reader is closed.
func (d *Driver) OpenSnapshot(ctx context.Context, volume, id uuid.UUID) (*SnapshotReader, error) {
	v, err := d.holder(ctx, volume, id)
	if err != nil {
		return nil, fmt.Errorf("open snapshot: %w", err)
	}
	if _, err := v.frozenSnapshot(ctx, id); err != nil {
		return nil, fmt.Errorf("open snapshot: %w", err)
	}
	v.snapping.Lock()
	defer v.snapping.Unlock()
	s, err := v.findSnapshot(id)
	if err != nil {
		return nil, fmt.Errorf("open snapshot: %w", err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	p := v.pins[s.point()]
	if p == nil {
		view, err := d.maps.OpenView(s.Handle, s.Gen)
		if err != nil {
			return nil, fmt.Errorf("open snapshot %s of volume %s: %w", s.Name, v.id, err)
		}
		p = &pin{view: view}
		if v.pins == nil {
			v.pins = make(map[mapPoint]*pin)
		}
		v.pins[s.point()] = p
	}
	p.readers++
	return &SnapshotReader{v: v, s: s, view: p.view}, nil
}

// Close ends the reader.
func (r *SnapshotReader) Close() error {
	var err error
	r.once.Do(func() {
		v := r.v
		v.snapping.Lock()
		defer v.snapping.Unlock()
		at := r.s.point()
		v.mu.Lock()
		p := v.pins[at]
		p.readers--
		last := p.readers == 0
		if last {
			delete(v.pins, at)
		}
		v.mu.Unlock()
		if !last || v.d.isClosed() {
			return
		}
		err = v.d.maps.DropVolume(r.view)
		if _, gone := v.findSnapshot(r.s.ID); errors.Is(gone, ErrUnknownSnapshot) && v.err() == nil {
			err = errors.Join(err, v.release(at))
		}
	})
	return err
}

func (d *Driver) isClosed() bool {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.closed
}

// Size is that of the volume when the snapshot was taken, in bytes.
func (r *SnapshotReader) Size() int64 { return r.s.Size }

// Snapshot describes it, as it was when it was opened.
func (r *SnapshotReader) Snapshot() Snapshot { return r.v.describe(r.s) }

// TryRead reads p at byte off if nothing has to be waited for, else ErrBusy.
func (r *SnapshotReader) TryRead(p []byte, off int64) error { return r.read(nil, p, off) }

// Read reads p at byte off.
func (r *SnapshotReader) Read(ctx context.Context, p []byte, off int64) error {
	return r.read(ctx, p, off)
}

func (r *SnapshotReader) read(ctx context.Context, p []byte, off int64) error {
	if err := r.v.err(); err != nil {
		return err
	}
	if err := checkRange(off, int64(len(p)), r.s.Size, false); err != nil {
		return err
	}
	pl := plans.Get().(*plan)
	defer plans.Put(pl)
	for len(p) > 0 {
		head := int(off & (blockSize - 1))
		n := min(len(p), planBlocks*blockSize-head)
		lba := uint64(off) / blockSize
		blocks := int((uint64(off)+uint64(n)-1)/blockSize - lba + 1)
		clear(pl.at[:blocks])
		err := r.v.d.maps.TryLookup(r.view, lba, pl.refs[:blocks])
		if errors.Is(err, blockio.ErrBusy) && ctx != nil {
			err = r.v.d.maps.Lookup(r.view, lba, pl.refs[:blocks])
		}
		if err == nil {
			err = r.v.readPlan(ctx, pl, p[:n], off, lba, blocks)
		}
		if err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// Extents describes [off, off+n), in order, in at most limit runs; what it returns may end before off+n.
func (r *SnapshotReader) Extents(ctx context.Context, off, n int64, limit int) ([]blockio.Extent, error) {
	if err := checkRange(off, n, r.s.Size, false); err != nil {
		return nil, err
	}
	return extents(ctx, off, n, limit, func(lba, end uint64) (uint64, bool, error) {
		k, mapped, err := r.v.d.maps.Run(r.view, lba, end)
		return k, !mapped, err
	})
}

// Changed describes what of [off, off+n) may differ from the snapshot, as extents of which Hole says that nothing has
// changed; what it returns may end before off+n.
func (v *Volume) Changed(ctx context.Context, since uuid.UUID, off, n int64, limit int) ([]blockio.Extent, error) {
	if err := checkRange(off, n, v.Size(), false); err != nil {
		return nil, err
	}
	h, err := v.d.holder(ctx, v.id, since)
	if err != nil {
		return nil, err
	}
	s, err := h.frozenSnapshot(ctx, since)
	if err != nil {
		return nil, err
	}
	lba, end := uint64(off)/blockSize, uint64(roundUp(off+n))/blockSize
	v.mu.RLock()
	changed := v.index.rangesIn(lba, end)
	head := v.handle()
	v.mu.RUnlock()
	gen, err := v.d.maps.Generation(head)
	if err != nil {
		return nil, err
	}
	err = v.d.maps.Diff(blockmap.At{Handle: s.Handle, Gen: s.Gen}, blockmap.At{Handle: head, Gen: gen}, lba, end,
		func(lba, n uint64, _, _ blockmap.Ref) error {
			changed = append(changed, zeroRange{from: lba, to: lba + n})
			return ctx.Err()
		})
	if err != nil {
		return nil, fmt.Errorf("what changed in volume %s since snapshot %s: %w", v.id, s.Name, err)
	}
	if from := uint64(s.Size) / blockSize; from < end { // what the snapshot did not have
		changed = append(changed, zeroRange{from: max(from, lba), to: end})
	}
	changed = mergeRanges(changed)
	return extents(ctx, off, n, limit, func(lba, end uint64) (uint64, bool, error) {
		for _, c := range changed {
			if c.to <= lba {
				continue
			}
			if c.from > lba {
				return min(end, c.from) - lba, true, nil
			}
			return min(end, c.to) - lba, false, nil
		}
		return end - lba, true, nil
	})
}

// rangesIn gives what of [lba, end) the index knows something about.
func (x *index) rangesIn(lba, end uint64) []zeroRange {
	var out []zeroRange
	for b := range x.data {
		if b >= lba && b < end {
			out = append(out, zeroRange{from: b, to: b + 1})
		}
	}
	for _, z := range x.zeros {
		if from, to := max(z.from, lba), min(z.to, end); from < to {
			out = append(out, zeroRange{from: from, to: to})
		}
	}
	return mergeRanges(out)
}

// mergeRanges sorts ranges and joins those that touch.
func mergeRanges(zs []zeroRange) []zeroRange {
	slices.SortFunc(zs, func(a, b zeroRange) int {
		switch {
		case a.from < b.from:
			return -1
		case a.from > b.from:
			return 1
		}
		return 0
	})
	out := zs[:0]
	for _, z := range zs {
		if k := len(out); k > 0 && z.from <= out[k-1].to {
			out[k-1].to = max(out[k-1].to, z.to)
			continue
		}
		out = append(out, z)
	}
	return out
}
