package blockmap

import (
	"errors"
	"fmt"
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
	} else if pg := v.page(leaf); p.is(flagDirty) && (pg == nil || !pg.unflushed.Load().has(leaf)) {
		return fmt.Errorf("leaf %d of volume %d is dirty without a note", leaf, h)
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

// checkStored decodes all that is in Pebble, and looks for what each version needs: a record of its generation, and a page that
// tells of it.
func (s *Store) checkStored() (err error) {
	m, err := s.newImage()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.close()) }()
	records, noted := map[Handle]record{}, map[At]changes{}
	it := m.leaves
	it.SetBounds([]byte("l"), []byte("m"))
	for ok := it.First(); ok; ok = it.Next() {
		value, err := it.ValueAndErr()
		if err != nil {
			return err
		}
		h, leaf, gen, valid := splitKey(it.Key())
		if !valid || leaf >= maxLeaves {
			return fmt.Errorf("leaf key %x: %w", it.Key(), ErrCorrupt)
		}
		if _, err := decodeLeaf(nil, it.Key(), value); err != nil {
			return fmt.Errorf("stored leaf %x: %w", it.Key(), err)
		}
		r, ok := records[h]
		if !ok {
			if r, err = s.readRecord(h); err != nil {
				return err
			}
			if _, err := s.readAncestors(h, r.parent); err != nil {
				return err
			}
			records[h] = r
		}
		if err := s.checkVersion(m, r, At{h, gen}, uint64(leaf), noted); err != nil {
			return fmt.Errorf("stored leaf %d of volume %d at generation %d, current %d: %w", leaf, h, gen, r.gen, err)
		}
	}
	return it.Error()
}

func (s *Store) checkVersion(m *image, r record, at At, leaf uint64, noted map[At]changes) error {
	if at.Gen > r.gen {
		return errors.New("is newer than its volume")
	}
	v := s.peek(at.Handle)
	if r.gen == 1 && r.parent.Handle == 0 {
		present, err := (&past{image: m, lineage: []At{at}}).bits(uint32(leaf / pageLeaves))
		if err == nil && (!present.has(leaf) || v != nil && v.presence(leaf) == absent) {
			err = errors.New("has no bit")
		}
		return err
	}
	if at.Gen == 1 && r.parent.Handle == 0 {
		return nil // of that generation nobody notes what it changed
	}
	c := noted[at]
	if c == nil {
		c = changes{}
		if err := c.addChanged(m, at.Handle, at.Gen-1, r.gen); err != nil {
			return err
		}
		noted[at] = c
	}
	if set := c[uint32(leaf/pageLeaves)]; set == nil || !set.has(leaf) {
		return errors.New("was never changed")
	}
	return nil
}
