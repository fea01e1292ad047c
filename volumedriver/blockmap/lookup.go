package blockmap

import (
	"errors"
	"fmt"

	"github.com/cockroachdb/pebble/v2"

	"varve/volumedriver/blockio"
)

// Lookup fills refs with those of the blocks from lba on. It may read Pebble.
func (s *Store) Lookup(h Handle, lba uint64, refs []Ref) error { return s.lookup(h, lba, refs, true) }

// TryLookup is Lookup, but fails with blockio.ErrBusy where that would read Pebble. Then refs holds nothing of use.
func (s *Store) TryLookup(h Handle, lba uint64, refs []Ref) error {
	return s.lookup(h, lba, refs, false)
}

func (s *Store) lookup(h Handle, lba uint64, refs []Ref, wait bool) error {
	if err := s.Err(); err != nil {
		return err
	}
	if err := s.known(h); err != nil {
		return err
	}
	for len(refs) > 0 {
		if lba >= MaxBlocks {
			clear(refs)
			return nil
		}
		leaf, off := lba/LeafBlocks, int(lba%LeafBlocks)
		n := min(LeafBlocks-off, len(refs))
		if !s.readResident(memoryKey(h, leaf), off, refs[:n]) {
			if err := s.readAway(h, leaf, off, refs[:n], wait); err != nil {
				return err
			}
		}
		lba, refs = lba+uint64(n), refs[n:]
	}
	return nil
}

func (s *Store) readResident(key uint64, off int, refs []Ref) bool {
	sh := s.shard(key)
	sh.mu.Lock()
	id, ok := sh.find(key)
	if ok {
		p := sh.slot(id)
		p.set(flagRef)
		p.read(off, refs)
		sh.hits++
	}
	sh.mu.Unlock()
	return ok
}

// readAway reads from a leaf that was not resident a moment ago.
func (s *Store) readAway(h Handle, leaf uint64, off int, refs []Ref, wait bool) error {
	v := s.peek(h)
	if v != nil && v.presence(leaf) == absent {
		clear(refs)
		return nil
	}
	if !wait {
		return blockio.ErrBusy
	}
	v, err := s.opened(h)
	if err != nil {
		return err
	}
	sh, id, ok, err := s.acquire(v, leaf)
	if err != nil {
		return err
	}
	if ok {
		sh.slot(id).read(off, refs)
	} else {
		clear(refs)
	}
	sh.mu.Unlock()
	return nil
}

// acquire makes the leaf resident, or finds that it has no mapped block, and returns with its shard locked.
func (s *Store) acquire(v *volume, leaf uint64) (sh *shard, id uint32, ok bool, err error) {
	key := memoryKey(v.handle, leaf)
	sh = s.shard(key)
	for {
		if err := s.Err(); err != nil {
			return nil, none, false, err
		}
		sh.mu.Lock()
		if id, ok := sh.find(key); ok {
			sh.slot(id).set(flagRef)
			return sh, id, true, nil
		}
		switch v.presence(leaf) {
		case absent:
			return sh, none, false, nil
		case unknown: // dropped by unloadOthers; a writer holds v.mu and never gets here
			sh.mu.Unlock()
			if _, err := s.opened(v.handle); err != nil {
				return nil, none, false, err
			}
			continue
		}
		if l := sh.loading[key]; l != nil {
			sh.mu.Unlock()
			<-l.done
			continue
		}
		l := &load{done: make(chan struct{})}
		sh.loading[key] = l
		sh.misses++
		sh.mu.Unlock()
		runs, err := s.fetch(v, leaf)
		if err = s.settle(sh, v, leaf, l, runs, err); err != nil {
			return nil, none, false, fmt.Errorf("read block map of volume %d, leaf %d: %w", v.handle, leaf, err)
		}
	}
}

// settle ends a load: it makes resident what fetch has given, unless l has become stale.
func (s *Store) settle(sh *shard, v *volume, leaf uint64, l *load, runs []run, err error) error {
	key := memoryKey(v.handle, leaf)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	defer close(l.done)
	defer delete(sh.loading, key)
	if err != nil {
		return err
	}
	if len(runs) == 0 && !l.stale {
		v.clearBit(leaf)
		return nil
	}
	for !l.stale {
		id, ok := sh.alloc(classFor(len(runs)), none)
		if ok {
			p := sh.slot(id)
			p.setKey(key)
			p.store(runs)
			sh.insert(id)
			return nil
		}
		sh.mu.Unlock()
		err := s.flushWanted(sh)
		sh.mu.Lock()
		if err != nil {
			return err
		}
	}
	return nil
}

// fetch reads a leaf from Pebble; no runs if it is not there.
func (s *Store) fetch(v *volume, leaf uint64) (runs []run, err error) {
	if !v.view && !v.versioned() {
		return s.fetchOnly(leafKey(v.handle, leaf, 1))
	}
	it, err := s.db.NewIter(nil)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, it.Close()) }()
	if !v.view {
		if value, err := newestLeaf(it, At{v.handle, v.gen.Load()}, leaf); value != nil || err != nil {
			return decodeFound(it, value, err)
		}
	}
	for _, at := range v.ancestors {
		if value, err := newestLeaf(it, at, leaf); value != nil || err != nil {
			return decodeFound(it, value, err)
		}
	}
	return nil, nil
}

// fetchOnly reads a leaf of which there is at most one version.
func (s *Store) fetchOnly(k []byte) ([]run, error) {
	value, closer, err := s.db.Get(k)
	if errors.Is(err, pebble.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	runs, err := decodeLeaf(nil, k, value)
	return runs, errors.Join(err, closer.Close())
}

// newestLeaf moves the iterator to the version of a leaf that is seen at a generation, and gives its value, or nil.
func newestLeaf(it *pebble.Iterator, at At, leaf uint64) ([]byte, error) {
	k := leafKey(at.Handle, leaf, at.Gen)
	it.SetBounds(k, numberKey('l', at.Handle, uint32(leaf+1)))
	if !it.First() {
		return nil, it.Error()
	}
	return it.ValueAndErr()
}

func decodeFound(it *pebble.Iterator, value []byte, err error) ([]run, error) {
	if err != nil {
		return nil, err
	}
	return decodeLeaf(nil, it.Key(), value)
}

// NextMapped gives the first mapped block at or after lba and before end.
func (s *Store) NextMapped(h Handle, lba, end uint64) (uint64, bool, error) {
	if err := s.Err(); err != nil {
		return 0, false, err
	}
	var refs [LeafBlocks]Ref
	end = min(end, MaxBlocks)
	for lba < end {
		v, err := s.opened(h)
		if err != nil {
			return 0, false, err
		}
		leaf, ok, loaded := v.nextLeaf(lba/LeafBlocks, (end+LeafBlocks-1)/LeafBlocks)
		if !loaded {
			continue
		}
		if !ok {
			return 0, false, nil
		}
		lba = max(lba, leaf*LeafBlocks)
		part := refs[:min(LeafBlocks-lba%LeafBlocks, end-lba)]
		if err := s.lookup(h, lba, part, true); err != nil {
			return 0, false, err
		}
		for i, r := range part {
			if r != 0 {
				return lba + uint64(i), true, nil
			}
		}
		lba += uint64(len(part))
	}
	return 0, false, nil
}

// Run gives the length of the run of blocks from lba on, up to end, that are all mapped or all holes, and which.
func (s *Store) Run(h Handle, lba, end uint64) (n uint64, mapped bool, err error) {
	if lba >= end {
		return 0, false, nil
	}
	first, ok, err := s.NextMapped(h, lba, end)
	if err != nil {
		return 0, false, err
	}
	if !ok {
		return end - lba, false, nil
	}
	if first > lba {
		return first - lba, false, nil
	}
	var refs [LeafBlocks]Ref
	end = min(end, MaxBlocks)
	for at := lba; at < end; {
		part := refs[:min(LeafBlocks-at%LeafBlocks, end-at)]
		if err := s.lookup(h, at, part, true); err != nil {
			return 0, false, err
		}
		for i, r := range part {
			if r == 0 {
				return at + uint64(i) - lba, true, nil
			}
		}
		at += uint64(len(part))
	}
	return end - lba, true, nil
}
