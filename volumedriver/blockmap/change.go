package blockmap

import (
	"fmt"

	"github.com/cockroachdb/pebble/v2"
)

// Set maps the n blocks from lba on to first and those after it in the same SCO.
func (s *Store) Set(h Handle, lba uint64, first Ref, n uint32) error {
	if lba > MaxBlocks-uint64(n) || !validRef(first, uint64(n)) {
		return fmt.Errorf("map blocks %d+%d to %d/%d: %w", lba, n, first.Ordinal(), first.Index(), ErrRange)
	}
	v, err := s.locked(h)
	if err != nil {
		return err
	}
	defer v.mu.Unlock()
	for n > 0 {
		off := lba % LeafBlocks
		k := min(LeafBlocks-off, uint64(n))
		if err := s.change(v, lba/LeafBlocks, run{uint16(off), uint16(k), first}); err != nil {
			return err
		}
		lba, first, n = lba+k, first+Ref(k), n-uint32(k)
	}
	return nil
}

// Clear makes n blocks from lba on holes. Its cost depends on the leaves that exist in the range, not on n.
func (s *Store) Clear(h Handle, lba, n uint64) error {
	v, err := s.locked(h)
	if err != nil {
		return err
	}
	defer v.mu.Unlock()
	end := MaxBlocks - min(MaxBlocks, lba)
	end = lba + min(n, end)
	for lba < end {
		off := lba % LeafBlocks
		if off == 0 && end-lba >= LeafBlocks {
			to := end / LeafBlocks
			if err := s.clearLeaves(v, lba/LeafBlocks, to, false); err != nil {
				return err
			}
			lba = to * LeafBlocks
			continue
		}
		k := min(LeafBlocks-off, end-lba)
		if err := s.change(v, lba/LeafBlocks, run{uint16(off), uint16(k), 0}); err != nil {
			return err
		}
		lba += k
	}
	return nil
}

// DropVolume forgets all that is mapped for the handle, which must not be used any more. The core makes its own record
// of the volume go away first, with Checkpoint or Put.
func (s *Store) DropVolume(h Handle) error {
	v, err := s.locked(h)
	if err != nil {
		return err
	}
	defer v.mu.Unlock()
	if err := s.clearLeaves(v, 0, maxLeaves, true); err != nil {
		return err
	}
	s.pageBytes.Add(-v.memory())
	v.pages.Store(&[]*page{})
	s.volumesMu.Lock()
	delete(s.volumes, h)
	s.volumesMu.Unlock()
	return nil
}

// change applies r to a leaf of a volume whose mu is held.
func (s *Store) change(v *volume, leaf uint64, r run) error {
	if r.ref != 0 {
		s.ensure(v, leaf)
	}
	for {
		sh, id, ok, err := s.forChange(v, leaf, r)
		if err != nil {
			return err
		}
		done := sh.apply(v, leaf, id, ok, r)
		sh.mu.Unlock()
		if done {
			return nil
		}
		if err := s.flushWanted(sh); err != nil {
			return err
		}
	}
}

// forChange is acquire, but a change of the whole leaf need not read it.
func (s *Store) forChange(v *volume, leaf uint64, r run) (*shard, uint32, bool, error) {
	if r.blocks < LeafBlocks {
		return s.acquire(v, leaf)
	}
	key := memoryKey(v.handle, leaf)
	sh := s.shard(key)
	sh.mu.Lock()
	if l := sh.loading[key]; l != nil {
		l.stale = true
	}
	id, ok := sh.find(key)
	return sh, id, ok, nil
}

// apply changes a leaf, which is in slot id if resident is true, else has no mapped block or is replaced as a whole. It
// gives false if there is no slot for it without writing first.
func (sh *shard) apply(v *volume, leaf uint64, id uint32, resident bool, r run) bool {
	if !resident {
		return r.ref == 0 || sh.put(v, leaf, none, emit(sh.scratch2[:0], r))
	}
	p := sh.slot(id)
	if p.class() == classArray && r.blocks < 64 {
		for i := range int(r.blocks) {
			ref := r.ref
			if ref != 0 {
				ref += Ref(i)
			}
			putRef(p.body()[(int(r.start)+i)*refBytes:], ref)
		}
		sh.markDirty(p)
		return true
	}
	sh.scratch = p.runs(sh.scratch[:0])
	sh.scratch2 = splice(sh.scratch2[:0], sh.scratch, r)
	return sh.put(v, leaf, id, sh.scratch2)
}

// put stores runs as the leaf's content, in slot id or, if it has none or does not suit, another.
func (sh *shard) put(v *volume, leaf uint64, id uint32, runs []run) bool {
	class := classFor(len(runs))
	if id != none {
		p := sh.slot(id)
		smaller, ok := none, false
		if class < p.class() {
			smaller, ok = sh.pop(class) // not worth an eviction
		}
		switch {
		case ok:
			sh.move(id, smaller, runs)
			return true
		case class <= p.class():
			p.store(runs)
			sh.markDirty(p)
			return true
		}
	}
	to, ok := sh.alloc(class, id)
	if !ok {
		return false
	}
	if id != none {
		sh.move(id, to, runs)
		return true
	}
	v.setBit(leaf)
	p := sh.slot(to)
	p.setKey(memoryKey(v.handle, leaf))
	p.store(runs)
	sh.insert(to)
	sh.markDirty(p)
	return true
}

// move gives the leaf in slot from a new slot and content.
func (sh *shard) move(from, to uint32, runs []run) {
	key := sh.slot(from).key()
	sh.remove(from)
	p := sh.slot(to)
	p.setKey(key)
	p.store(runs)
	sh.insert(to)
	sh.markDirty(p)
}

// clearLeaves drops leaves [from,to) of a volume whose mu is held, and with all also the stored bits.
func (s *Store) clearLeaves(v *volume, from, to uint64, all bool) error {
	s.writes.Lock()
	defer s.writes.Unlock()
	n, leaves := v.clearBits(from, to, 1024)
	if n == 0 && !all {
		return nil
	}
	if n == len(leaves) {
		for _, leaf := range leaves {
			key := memoryKey(v.handle, leaf)
			s.shard(key).drop(key)
		}
	} else {
		for i := range s.shards {
			s.shards[i].dropRange(memoryKey(v.handle, from), memoryKey(v.handle, to))
		}
	}
	if all {
		for _, p := range *v.pages.Load() {
			if p != nil {
				p.dirty.Store(false) // not to be stored any more
			}
		}
	}
	b := s.db.NewBatch()
	err := b.DeleteRange(leafKey(v.handle, from), leafKey(v.handle, to), nil)
	if err == nil && all {
		err = b.DeleteRange(pageKey(v.handle, 0), pageKey(v.handle+1, 0), nil)
	}
	if err == nil {
		err = s.commit(b, pebble.NoSync)
	}
	if err != nil {
		return fmt.Errorf("clear leaves %d to %d of volume %d: %w", from, to, v.handle, err)
	}
	return nil
}

func (sh *shard) drop(key uint64) {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if id, ok := sh.find(key); ok {
		sh.remove(id)
	}
	if l := sh.loading[key]; l != nil {
		l.stale = true
	}
}

func (sh *shard) dropRange(from, to uint64) {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	for i := range sh.slabs {
		sh.each(i, func(id uint32, p slot) {
			if k := p.key(); from <= k && k < to {
				sh.remove(id)
			}
		})
	}
	for k, l := range sh.loading {
		if from <= k && k < to {
			l.stale = true
		}
	}
}
