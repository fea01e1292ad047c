package blockmap

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cockroachdb/pebble/v2"
)

// Check walks everything and reports what does not fit together. No other call may be under way. It reads the whole map.
func (s *Store) Check() error {
	var errs []error
	bytes := int64(0)
	for i := range s.shards {
		errs = append(errs, s.shards[i].check())
		bytes += s.shards[i].bytes
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	pages := int64(0)
	for _, v := range s.volumes {
		pages += v.memory()
	}
	if pages != s.pageBytes.Load() {
		return fmt.Errorf("bits take %d bytes, counted %d", pages, s.pageBytes.Load())
	}
	return s.checkStored()
}

func (sh *shard) check() error {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	bytes := int64(len(sh.table))*4 + scratchBytes
	used, dirty := 0, 0
	var errs []error
	for i := range sh.slabs {
		sl := &sh.slabs[i]
		if sl.mem == nil {
			continue
		}
		bytes += int64(len(sl.mem))
		live := 0
		sh.each(i, func(id uint32, p slot) {
			live++
			if p.is(flagDirty) {
				dirty++
			}
			errs = append(errs, sh.checkSlot(id, p))
		})
		free := 0
		for id := sl.free; id != none && free <= 1<<slotBits; id = sh.slot(id).next() {
			free++
		}
		if total := sh.s.slabBytes / slotBytes[sl.class]; live != sl.live || live+free != total {
			errs = append(errs, fmt.Errorf("slab %d: %d live, counted %d, %d free of %d", i, live, sl.live, free, total))
		}
		used += live
	}
	if used != sh.used || dirty != sh.dirty || bytes != sh.bytes || len(sh.loading) != 0 {
		errs = append(errs, fmt.Errorf("shard has %d leaves, %d dirty, %d bytes, %d loads; counted %d, %d, %d",
			used, dirty, bytes, len(sh.loading), sh.used, sh.dirty, sh.bytes))
	}
	return errors.Join(errs...)
}

func (sh *shard) checkSlot(id uint32, p slot) error {
	h, leaf := Handle(p.key()>>32), p.key()&(1<<32-1)
	at, ok := sh.find(p.key())
	if !ok || at != id || sh.s.shard(p.key()) != sh {
		return fmt.Errorf("leaf %d of volume %d in slot %x is not found", leaf, h, id)
	}
	if v := sh.s.peek(h); v == nil || v.presence(leaf) == absent {
		return fmt.Errorf("leaf %d of volume %d is resident without its bit", leaf, h)
	}
	end := uint16(0)
	for _, r := range p.runs(nil) {
		if r.start < end || r.blocks == 0 || r.end() > LeafBlocks || !validRef(r.ref, uint64(r.blocks)) {
			return fmt.Errorf("leaf %d of volume %d has a bad run %+v", leaf, h, r)
		}
		end = r.end()
	}
	return nil
}

// checkStored decodes all leaves in Pebble and looks for their bits there and in memory.
func (s *Store) checkStored() (err error) {
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: []byte("l"), UpperBound: []byte("m")})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, it.Close()) }()
	volumes := map[Handle]*volume{}
	for ok := it.First(); ok; ok = it.Next() {
		value, err := it.ValueAndErr()
		if err != nil {
			return err
		}
		k := it.Key()
		if _, err := decodeLeaf(nil, k, value); err != nil {
			return fmt.Errorf("stored leaf %x: %w", k, err)
		}
		h, leaf := Handle(binary.BigEndian.Uint32(k[1:])), uint64(binary.BigEndian.Uint32(k[5:]))
		stored := volumes[h]
		if stored == nil {
			pages, err := s.readPages(h)
			if err != nil {
				return err
			}
			stored = &volume{handle: h}
			stored.pages.Store(&pages)
			volumes[h] = stored
		}
		if v := s.peek(h); stored.presence(leaf) != possible || v != nil && v.presence(leaf) == absent {
			return fmt.Errorf("stored leaf %d of volume %d has no bit", leaf, h)
		}
	}
	return it.Error()
}
