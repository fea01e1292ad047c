package volumedriver

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"varve/volumedriver/blockio"
	"varve/volumedriver/blockmap"
	"varve/volumedriver/qos"
	"varve/volumedriver/writelog"
)

// # Flatten
//
// A clone that is to stand by itself gets what it has inherited as data of its own: each block that its map still names in
// an SCO of an ancestor is read and written again, with the block claimed, so that a guest's write is never overtaken. The
// copies go through the log like any write; a crash leaves a clone that has more of its own. When nothing inherited is left
// in the map, it is copied to a handle without a parent, and the root forgets the parent.

const flattenBlocks = recordBlocksMax

// Flatten copies what the clone has inherited and cuts it from its parent. progress is told blocks. The clone's own
// snapshots see the parent's blocks too: while it has any, its head is copied but it stays a clone (ErrInUse).
func (d *Driver) Flatten(ctx context.Context, v *Volume, progress func(done, total int64)) error {
	v.mu.RLock()
	parent := v.root.Parent
	v.mu.RUnlock()
	if parent == nil {
		if _, _, clone := v.Parent(); clone {
			return fmt.Errorf("flatten volume %s: a promotion has given its snapshots to another, and both share them: promote it, and flatten that one: %w",
				v.id, ErrInUse)
		}
		return nil
	}
	if v.template.Load() {
		return fmt.Errorf("flatten volume %s: it is a template: %w", v.id, blockio.ErrReadOnly)
	}
	v.flattening.Store(true) // no new bases until it is cut loose
	defer v.flattening.Store(false)
	for round := 0; ; round++ {
		left, err := v.copyInherited(ctx, parent.Base, progress)
		if err != nil {
			return fmt.Errorf("flatten volume %s: %w", v.id, err)
		}
		if left > 0 && round < 8 { // a rollback may have brought some back
			continue
		}
		if len(v.Snapshots()) == 0 {
			if err := v.dropBases(ctx); err != nil {
				return fmt.Errorf("flatten volume %s: %w", v.id, err)
			}
		}
		if err := v.cutLoose(ctx, parent.Base); err != nil {
			return fmt.Errorf("flatten volume %s: %w", v.id, err)
		}
		return d.sweep(ctx)
	}
}

// inherited calls fn for the runs of blocks that the head's map names in SCOs numbered below base.
func (v *Volume) inherited(ctx context.Context, base uint64, fn func(lba, n uint64) error) error {
	var refs [leafBlocks]blockmap.Ref
	end := uint64(blockmap.MaxBlocks)
	for lba := uint64(0); ; {
		if err := ctx.Err(); err != nil {
			return err
		}
		h := v.handle()
		at, ok, err := v.d.maps.NextMapped(h, lba, end)
		if err != nil || !ok {
			return err
		}
		n := leafBlocks - at%leafBlocks
		if err := v.d.maps.Lookup(h, at, refs[:n]); err != nil {
			return err
		}
		for i := uint64(0); i < n; {
			k := uint64(0)
			for i+k < n && refs[i+k] != 0 && uint64(refs[i+k].Ordinal()) < base {
				k++
			}
			if k > 0 {
				if err := fn(at+i, k); err != nil {
					return err
				}
			}
			i += max(k, 1)
		}
		lba = at + n
	}
}

// copyInherited writes every inherited block again and waits until that is in the map; it gives how many were found.
func (v *Volume) copyInherited(ctx context.Context, base uint64, progress func(done, total int64)) (int64, error) {
	var total, done int64
	if err := v.inherited(ctx, base, func(_, n uint64) error { total += int64(n); return nil }); err != nil {
		return 0, err
	}
	buf := make([]byte, flattenBlocks*blockSize)
	err := v.inherited(ctx, base, func(lba, n uint64) error {
		for n > 0 {
			k := min(n, flattenBlocks)
			if err := v.rewrite(ctx, lba, k, buf); err != nil {
				return err
			}
			lba, n, done = lba+k, n-k, done+int64(k)
			if progress != nil {
				progress(done, total)
			}
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	v.order.Lock()
	seq := v.seq
	v.order.Unlock()
	return total, v.WaitBacked(ctx, seq)
}

// rewrite reads n blocks and writes the same again, unless the volume is shorter by now.
func (v *Volume) rewrite(ctx context.Context, lba, n uint64, buf []byte) error {
	if err := v.share.Wait(ctx, qos.Write, int(n)*blockSize); err != nil {
		return err
	}
	seq, err := v.claimRun(lba, n)
	if err != nil {
		return err
	}
	release := func(err error) error {
		v.order.Lock()
		for i := range n {
			delete(v.claims, lba+i)
		}
		v.freed.Broadcast()
		v.order.Unlock()
		return err
	}
	if err := v.waitLogged(seq); err != nil {
		return release(err)
	}
	size := v.Size()
	if int64(lba)*blockSize >= size {
		return release(nil)
	}
	n2 := min(n, uint64(roundUp(size))/blockSize-lba)
	p := buf[:n2*blockSize]
	clear(p)
	whole := min(int64(len(p)), size-int64(lba)*blockSize)
	if err := v.read(ctx, p[:whole], int64(lba)*blockSize); err != nil {
		return release(err)
	}
	w := newWaiter()
	stall := v.d.newStall()
	for {
		v.order.Lock()
		err := v.usableLocked()
		if err == nil {
			r := writelog.Record{Volume: v.id, Seq: v.seq + 1, Kind: writelog.Data, LBA: lba, Blocks: n2}
			if err = v.useKeyLocked(&r); err == nil {
				err = v.d.wal.Append(r, p, v, false, w, 0)
			}
			if err == nil {
				v.seq++
			}
		}
		v.order.Unlock()
		v.d.wal.Kick()
		switch {
		case err == nil:
			return release(w.wait())
		case !errors.Is(err, blockio.ErrBusy):
			return release(err)
		}
		if err := stall.wait(ctx); err != nil {
			return release(err)
		}
	}
}

// claimRun claims n blocks, and gives what has to be logged before they can be read.
func (v *Volume) claimRun(lba, n uint64) (seq uint64, err error) {
	v.order.Lock()
	defer v.order.Unlock()
	for v.claimedLocked(lba, n) && v.usableLocked() == nil {
		v.freed.Wait()
	}
	if err := v.usableLocked(); err != nil {
		return 0, err
	}
	if v.claims == nil {
		v.claims = make(map[uint64]struct{})
	}
	for i := range n {
		v.claims[lba+i] = struct{}{}
	}
	return v.seq, nil
}

// cutLoose moves the map to a handle without a parent and forgets the parent, durably. No SCO is installed meanwhile.
func (v *Volume) cutLoose(ctx context.Context, base uint64) error {
	v.d.scrubber.one.Lock() // its mark walks over handles: none may be swapped for another meanwhile
	defer v.d.scrubber.one.Unlock()
	v.snapping.Lock()
	defer v.snapping.Unlock()
	v.installing.Lock()
	defer v.installing.Unlock()
	v.mu.RLock()
	snaps, branches := len(v.snaps), len(v.root.Branches)
	parent := v.root.Parent
	v.mu.RUnlock()
	v.d.mu.RLock()
	snaps += len(v.d.adoptedLocked(v.id))
	v.d.mu.RUnlock()
	if parent == nil {
		return nil
	}
	if snaps > 0 || branches > 1 {
		return fmt.Errorf("its head is its own now, its %d snapshots are not: delete them to cut it from its parent: %w", snaps, ErrInUse)
	}
	if err := v.inherited(ctx, base, func(lba, n uint64) error {
		return fmt.Errorf("%d blocks from %d are inherited again: %w", n, lba, blockio.ErrBusy)
	}); err != nil {
		return err
	}
	h, err := v.d.maps.NewHandle()
	if err != nil {
		return err
	}
	old := v.handle()
	if err := v.d.copyMap(ctx, old, h); err != nil {
		return errors.Join(err, v.d.maps.DropVolume(h))
	}
	v.storing.Lock()
	v.mu.RLock()
	r := v.root
	v.mu.RUnlock()
	r.keepEdited(&v.stored)
	r.Handle, r.Branches, r.Parent = h, []branch{{Handle: h}}, nil
	r.Epochs = slices.DeleteFunc(slices.Clone(r.Epochs), func(e epochSpan) bool { return e.From < base })
	r.Name.N++
	r.Name.Put = false
	note := releaseKey(mapPoint{handle: old})
	err = v.d.maps.Checkpoint([]blockmap.KV{r.encode(), {Key: note, Value: v.id[:]}}, nil)
	if err != nil {
		v.storing.Unlock()
		return err
	}
	v.stored = r
	v.mu.Lock()
	v.root.Handle, v.root.Branches, v.root.Parent, v.root.Epochs, v.root.Name = r.Handle, r.Branches, nil, r.Epochs, r.Name
	v.head.Store(uint32(h))
	v.span.Store(v.d.owners.spans(&r))
	v.forgets++
	v.mu.Unlock()
	v.storing.Unlock()
	v.d.mu.Lock()
	if v.d.children[parent.Snapshot]--; v.d.children[parent.Snapshot] == 0 {
		delete(v.d.children, parent.Snapshot)
	}
	v.d.mu.Unlock()
	v.d.destager.add(v)
	if err := v.d.maps.DropVolume(old); err != nil {
		return err
	}
	return v.d.maps.Update(nil, [][]byte{note})
}

// copyMap sets what one handle holds in another.
func (d *Driver) copyMap(ctx context.Context, from, to blockmap.Handle) error {
	var refs [leafBlocks]blockmap.Ref
	for lba := uint64(0); ; {
		if err := ctx.Err(); err != nil {
			return err
		}
		at, ok, err := d.maps.NextMapped(from, lba, blockmap.MaxBlocks)
		if err != nil || !ok {
			return err
		}
		n := leafBlocks - at%leafBlocks
		if err := d.maps.Lookup(from, at, refs[:n]); err != nil {
			return err
		}
		for i := uint64(0); i < n; {
			k := uint64(1)
			for i+k < n && refs[i] != 0 && refs[i+k] == refs[i]+blockmap.Ref(k) && refs[i+k].Ordinal() == refs[i].Ordinal() {
				k++
			}
			if refs[i] != 0 {
				if err := d.maps.Set(to, at+i, refs[i], uint32(k)); err != nil {
					return err
				}
			}
			i += k
		}
		lba = at + n
	}
}
