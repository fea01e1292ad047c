package blockmap

import (
	"errors"
	"fmt"
	"math/bits"

	"github.com/cockroachdb/pebble/v2"
)

// dropEach: up to so many leaves are dropped from memory one by one, more by a walk over all there are.
const dropEach = 1024

// Set maps the n blocks from lba on to first and those after it in the same SCO.
func (s *Store) Set(h Handle, lba uint64, first Ref, n uint32) error {
	if lba > MaxBlocks-uint64(n) || !validRef(first, uint64(n)) {
		return fmt.Errorf("map blocks %d+%d to %d/%d: %w", lba, n, first.Ordinal(), first.Index(), ErrRange)
	}
	v, err := s.head(h)
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
	v, err := s.head(h)
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
			if err := s.clearLeaves(v, lba/LeafBlocks, to); err != nil {
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

// DropVolume forgets all that is mapped for the handle, in all its generations; it must not be used any more. The core makes
// its own record of the volume go away first, with Checkpoint or Put. For a view it forgets the view. It is refused with
// ErrInUse while there are forks or views of a generation of the handle.
func (s *Store) DropVolume(h Handle) error {
	v, err := s.volume(h)
	if err != nil {
		return err
	}
	v.releasing.Lock()
	defer v.releasing.Unlock()
	if v, err = s.recorded(h); err != nil {
		return err
	}
	defer v.mu.Unlock()
	if err := s.unused(numberKey('c', h, 0)[:5], func(at At) bool { return at.Handle == h }); err != nil {
		return fmt.Errorf("drop volume %d of the block map: %w", h, err)
	}
	s.writes.Lock()
	defer s.writes.Unlock()
	s.forget(v)
	if !v.view {
		b := s.db.NewBatch()
		err := errors.Join(b.DeleteRange(numberKey('l', h, 0), numberKey('l', h+1, 0), nil),
			b.DeleteRange(numberKey('b', h, 0), numberKey('b', h+1, 0), nil), b.Delete(recordKey(h), nil))
		if v.record.parent.Handle != 0 {
			err = errors.Join(err, b.Delete(childKey(v.record.parent, h), nil))
		}
		if err == nil {
			err = s.commit(b, pebble.NoSync)
		}
		if err != nil {
			return fmt.Errorf("drop volume %d of the block map: %w", h, err)
		}
	}
	s.volumesMu.Lock()
	defer s.volumesMu.Unlock()
	delete(s.volumes, h)
	if v.view {
		if at := v.ancestors[0]; s.views[at] > 1 {
			s.views[at]--
		} else {
			delete(s.views, at)
		}
	}
	return nil
}

// unused gives ErrInUse if a fork has its childKey below prefix, or there is a view of a generation that matches.
func (s *Store) unused(prefix []byte, match func(at At) bool) (err error) {
	s.volumesMu.RLock()
	for at := range s.views {
		if match(at) {
			err = fmt.Errorf("generation %d has a view: %w", at.Gen, ErrInUse)
		}
	}
	s.volumesMu.RUnlock()
	if err != nil {
		return err
	}
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: prefix, UpperBound: successor(prefix)})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, it.Close()) }()
	if it.First() {
		return fmt.Errorf("fork %x: %w", it.Key()[1:], ErrInUse)
	}
	return it.Error()
}

// forget drops what is in memory of the volume: bits and leaves, clean or dirty. mu and writes are held.
func (s *Store) forget(v *volume) {
	if v.pages.Load() == nil {
		if v.used.Load() > 0 && !v.record.headless { // its bits were unloaded, its leaves perhaps not
			s.dropLeaves(v, 0, maxLeaves, 1, nil)
		}
		return
	}
	n, leaves := v.countBits(0, maxLeaves), []uint64(nil)
	if n <= dropEach {
		v.eachWord(0, maxLeaves, func(_ *page, leaf, set uint64) {
			for ; set != 0; set &= set - 1 {
				leaves = append(leaves, leaf+uint64(bits.TrailingZeros64(set)))
			}
		})
	}
	s.pageBytes.Add(-v.memory())
	if v.record.headless {
		v.pages.Store(nil)
	} else {
		v.pages.Store(&[]*page{}) // holes, to who still asks
	}
	s.dropLeaves(v, 0, maxLeaves, n, leaves)
}

// dropLeaves drops leaves [from,to) from memory. There are n of them, which leaves names if they are few.
func (s *Store) dropLeaves(v *volume, from, to uint64, n int, leaves []uint64) {
	if n == len(leaves) {
		for _, leaf := range leaves {
			key := memoryKey(v.handle, leaf)
			s.shard(key).drop(key)
		}
		return
	}
	for i := range s.shards {
		s.shards[i].dropRange(memoryKey(v.handle, from), memoryKey(v.handle, to))
	}
}

// change applies r to a leaf of a volume whose mu is held.
func (s *Store) change(v *volume, leaf uint64, r run) error {
	s.prepare(v, leaf, r.ref != 0)
	for {
		sh, id, ok, err := s.forChange(v, leaf, r)
		if err != nil {
			return err
		}
		done := sh.apply(v, leaf, id, ok, r)
		if done {
			v.note(leaf)
		}
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
	sh.s.setBit(v, leaf)
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

// clearLeaves makes holes of leaves [from,to) of a volume whose mu is held. Where frozen generations may need what Pebble has,
// it stays, and the bits alone say that there is nothing any more.
func (s *Store) clearLeaves(v *volume, from, to uint64) error {
	s.writes.Lock()
	defer s.writes.Unlock()
	if v.countBits(from, to) == 0 {
		return nil
	}
	keep := v.frozen()
	if !keep { // a full disk is noticed before anything has happened
		if err := errors.Join(s.Err(), s.checkSpace(0)); err != nil {
			return fmt.Errorf("clear leaves %d to %d of volume %d: %w", from, to, v.handle, err)
		}
	}
	n, leaves := s.clearBits(v, from, to, dropEach)
	s.dropLeaves(v, from, to, n, leaves)
	if keep {
		return nil
	}
	b := s.db.NewBatch()
	err := b.DeleteRange(numberKey('l', v.handle, uint32(from)), numberKey('l', v.handle, uint32(to)), nil)
	if err == nil {
		err = s.apply(b, pebble.NoSync)
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
