package blockmap

import (
	"errors"
	"fmt"

	"github.com/cockroachdb/pebble/v2"
)

// Release says that a generation will not be read any more, and which ones that can be read are its neighbours: prev below it, 0
// for none, and next above it, which may be the current one; 0 if there is none because the head was given up. What only gen
// could see is deleted. It is durable with the next Checkpoint or synced Put, and may be repeated; the core keeps a note of
// what it released until then. The cost is that of the leaves changed between gen and next. ErrInUse while gen has forks or views.
func (s *Store) Release(h Handle, gen, prev, next uint32) error {
	if err := s.release(h, gen, prev, next); err != nil {
		return fmt.Errorf("release generation %d of volume %d: %w", gen, h, err)
	}
	return nil
}

func (s *Store) release(h Handle, gen, prev, next uint32) error {
	v, err := s.volume(h)
	if err != nil {
		return err
	}
	v.releasing.Lock()
	defer v.releasing.Unlock()
	r, err := s.checkRelease(v, gen, prev, next)
	if err != nil {
		return err
	}
	if r.headless && next == r.gen {
		next = 0 // the head was given up since
	}
	at := At{h, gen}
	if err := s.unused(childKey(at, 0)[:9], func(a At) bool { return a == at }); err != nil {
		return err
	}
	if next == 0 {
		return s.deleteAbove(h, prev, gen)
	}
	if p := r.pending; p.Gen != 0 {
		if err := s.settleMerge(v, uint32(p.Handle), p.Gen); err != nil {
			return err
		}
	}
	if next == r.gen {
		if err := s.merge(v, prev, next); err != nil {
			return err
		}
	}
	if err := s.prune(h, prev, gen, next, next == r.gen); err != nil {
		return err
	}
	return s.foldPages(v, prev, next)
}

// checkRelease gives the volume's record, if what Release is asked makes sense.
func (s *Store) checkRelease(v *volume, gen, prev, next uint32) (record, error) {
	if _, err := s.recorded(v.handle); err != nil {
		return record{}, err
	}
	defer v.mu.Unlock()
	r := v.record
	if v.view || gen == 0 || prev >= gen || gen >= r.gen || next != 0 && next <= gen || next > r.gen ||
		!r.headless && next == 0 {
		return r, fmt.Errorf("between %d and %d, current %d: %w", prev, next, r.gen, ErrGeneration)
	}
	return r, nil
}

// merge notes that the head, of generation gen, is what comes after generation prev now: versions between them that the head sees
// today will be of no use once it has newer ones of these leaves. They are deleted after the head was frozen, by settleMerge. What
// is dirty is written, so that prune knows of it.
func (s *Store) merge(v *volume, prev, gen uint32) error {
	if _, err := s.locked(v.handle); err != nil {
		return err
	}
	defer v.mu.Unlock()
	r := v.record
	if r.gen != gen || r.headless {
		return nil // it was frozen since, and will not have newer ones
	}
	if err := s.flushLocked(v); err != nil {
		return err
	}
	if r.merged && r.floor <= prev {
		prev = r.floor // Release was repeated, or comes late
	}
	r.merged, r.floor = true, prev
	return s.storeRecordLocked(v, r)
}

func (s *Store) storeRecordLocked(v *volume, r record) error {
	if r == v.record {
		return nil
	}
	k := recordKey(v.handle)
	b := s.db.NewBatch()
	err := b.Set(k, r.encode(k), nil)
	if err == nil {
		err = s.commit(b, pebble.NoSync)
	}
	if err == nil {
		v.record = r
	}
	return err
}

// settleMerge deletes the versions between floor and gen, a frozen generation, that gen does not see.
func (s *Store) settleMerge(v *volume, floor, gen uint32) error {
	if err := s.prune(v.handle, floor, gen-1, gen, false); err != nil {
		return err
	}
	if err := s.foldPages(v, floor, gen); err != nil {
		return err
	}
	if _, err := s.recorded(v.handle); err != nil {
		return err
	}
	defer v.mu.Unlock()
	r := v.record
	r.pending = At{}
	return s.storeRecordLocked(v, r)
}

// deletes is a batch that is committed whenever it is large.
type deletes struct {
	s *Store
	b *pebble.Batch
}

func (d *deletes) delete(k []byte) error {
	if d.b == nil {
		d.b = d.s.db.NewBatch()
	}
	if err := d.b.Delete(k, nil); err != nil {
		return err
	}
	if d.b.Len() < chunkBytes {
		return nil
	}
	return d.commit()
}

func (d *deletes) commit() error {
	if d.b == nil {
		return nil
	}
	b := d.b
	d.b = nil
	return d.s.commit(b, pebble.NoSync)
}

// prune looks at the leaves changed in (from,next] and deletes their versions in (prev,next] that next does not see; nobody else
// sees them. What a head may write at this moment, versions of next itself, is let alone.
func (s *Store) prune(h Handle, prev, from, next uint32, isHead bool) (err error) {
	m, err := s.newImage()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.close()) }()
	c := changes{}
	if err := c.addChanged(m, h, from, next); err != nil {
		return err
	}
	p := past{image: m, lineage: []At{{h, next}}}
	d := deletes{s: s}
	err = c.each(func(leaf uint64) error {
		present, err := p.bits(uint32(leaf / pageLeaves))
		if err != nil {
			return err
		}
		visible := present.has(leaf)
		return m.eachStored(h, leaf, prev, next, func(k []byte, gen uint32) error {
			if visible { // the newest
				visible = false
				return nil
			}
			if isHead && gen == next {
				return nil
			}
			return d.delete(k)
		})
	})
	return errors.Join(err, d.commit())
}

// eachStored calls fn for the versions (prev,to] of a leaf, newest first.
func (m *image) eachStored(h Handle, leaf uint64, prev, to uint32, fn func(k []byte, gen uint32) error) error {
	it := m.leaves
	it.SetBounds(leafKey(h, leaf, to), leafKey(h, leaf, prev))
	for ok := it.First(); ok; ok = it.Next() {
		_, _, gen, valid := splitKey(it.Key())
		if !valid {
			return fmt.Errorf("leaf key %x: %w", it.Key(), ErrCorrupt)
		}
		if err := fn(it.Key(), gen); err != nil {
			return err
		}
	}
	return it.Error()
}

// foldPages deletes the versions (prev,next] of pages that next does not see. What they say was changed, the one that stays says
// from now on.
func (s *Store) foldPages(v *volume, prev, next uint32) error {
	pages, err := s.pagesToFold(v.handle, prev, next)
	for err == nil && len(pages) > 0 {
		n := min(len(pages), foldAtOnce)
		err = s.foldSome(v, prev, next, pages[:n])
		pages = pages[n:]
	}
	return err
}

const foldAtOnce = 64

// pagesToFold gives the pages that have more than one version in (prev,next].
func (s *Store) pagesToFold(h Handle, prev, next uint32) (pages []uint32, err error) {
	it, err := s.db.NewIter(nil)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, it.Close()) }()
	it.SetBounds(numberKey('b', h, 0), numberKey('b', h+1, 0))
	last, count := uint32(0), 0
	for ok := it.First(); ok; {
		_, n, gen, valid := splitKey(it.Key())
		if !valid {
			return nil, fmt.Errorf("page key %x: %w", it.Key(), ErrCorrupt)
		}
		if n != last {
			last, count = n, 0
		}
		switch {
		case gen > next:
			ok = it.SeekGE(pageKey(h, n, next))
			continue
		case gen > prev:
			if count++; count == 1 {
				ok = it.Next()
				continue
			}
			pages = append(pages, n)
		}
		ok = it.SeekGE(numberKey('b', h, n+1))
	}
	return pages, it.Error()
}

// foldSome does foldPages for some pages. Pages are written with Store.writes held, so what it reads is the newest.
func (s *Store) foldSome(v *volume, prev, next uint32, pages []uint32) (err error) {
	if _, err := s.locked(v.handle); err != nil {
		return err
	}
	defer v.mu.Unlock()
	s.writes.Lock()
	defer s.writes.Unlock()
	it, err := s.db.NewIter(nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, it.Close()) }()
	f := flush{b: s.db.NewBatch()}
	for _, n := range pages {
		if err := s.foldPage(&f, it, v, prev, next, n); err != nil {
			return errors.Join(err, f.b.Close())
		}
	}
	return s.finish(&f, nil)
}

func (s *Store) foldPage(f *flush, it *pebble.Iterator, v *volume, prev, next, n uint32) error {
	it.SetBounds(pageKey(v.handle, n, next), pageKey(v.handle, n, prev))
	var kept []byte
	var present, changed leafSet
	for ok := it.First(); ok; ok = it.Next() {
		value, err := it.ValueAndErr()
		if err != nil {
			return err
		}
		has, did, err := decodePage(it.Key(), value)
		if err != nil {
			return err
		}
		changed.add(&did)
		if kept == nil {
			kept, present = append(kept, it.Key()...), has
		} else if err := f.b.Delete(it.Key(), nil); err != nil {
			return err
		}
	}
	if err := it.Error(); err != nil || kept == nil {
		return err
	}
	if _, _, gen, _ := splitKey(kept); gen < v.record.gen || v.record.headless {
		s.encoded = appendPage(s.encoded[:0], kept, &present, &changed)
		return f.b.Set(kept, s.encoded, nil)
	}
	pg := v.page(uint64(n) * pageLeaves) // the head has it in memory, and perhaps newer
	s.provide(&pg.changed)
	for i, w := range changed {
		pg.changed.Load()[i].Or(w)
	}
	pg.dirty.Store(true)
	f.pages = append(f.pages, touchedPage{v: v, pg: pg, number: n})
	return nil
}

// ReleaseHead says that the current generation of a handle will not be read or changed any more, only those frozen before it, the
// newest of which is prev. That is durable when it returns, together with puts of metadata: all of it or nothing. Then it deletes
// what only the head could see, and last, not durably by itself, the metadata keys in del: a note there has the core call it
// again after a crash in between. A handle without frozen generations is dropped instead.
func (s *Store) ReleaseHead(h Handle, prev uint32, puts []KV, del [][]byte) error {
	if err := s.releaseHead(h, prev, puts, del); err != nil {
		return fmt.Errorf("release the head of volume %d: %w", h, err)
	}
	return nil
}

func (s *Store) releaseHead(h Handle, prev uint32, puts []KV, del [][]byte) error {
	v, err := s.volume(h)
	if err != nil {
		return err
	}
	v.releasing.Lock()
	defer v.releasing.Unlock()
	gen, err := s.behead(v, prev, puts)
	if err != nil {
		return err
	}
	if err := s.deleteAbove(h, prev, gen); err != nil {
		return err
	}
	d := deletes{s: s}
	for _, k := range del {
		if err := d.delete(metadataKey(k)); err != nil {
			return err
		}
	}
	return d.commit()
}

// behead makes the handle headless, and gives the generation that was its head's.
func (s *Store) behead(v *volume, prev uint32, puts []KV) (uint32, error) {
	if _, err := s.recorded(v.handle); err != nil {
		return 0, err
	}
	defer v.mu.Unlock()
	r := v.record
	if v.view {
		return 0, ErrReadOnly
	}
	if prev == 0 || prev >= r.gen {
		return 0, fmt.Errorf("newest frozen %d, current %d: %w", prev, r.gen, ErrGeneration)
	}
	r.headless = true
	k := recordKey(v.handle)
	b := s.db.NewBatch()
	err := b.Set(k, r.encode(k), nil)
	for _, kv := range puts {
		err = errors.Join(err, b.Set(metadataKey(kv.Key), kv.Value, nil))
	}
	if err == nil {
		err = s.commit(b, pebble.Sync)
	}
	if err != nil {
		return 0, err
	}
	s.writes.Lock()
	defer s.writes.Unlock()
	if !v.record.headless {
		v.record.headless = true
		s.forget(v)
	}
	return r.gen, nil
}

// deleteAbove deletes all versions (prev,to] of a handle that has no newer ones.
func (s *Store) deleteAbove(h Handle, prev, to uint32) (err error) {
	if prev == 0 {
		b := s.db.NewBatch()
		err := errors.Join(b.DeleteRange(numberKey('l', h, 0), numberKey('l', h+1, 0), nil),
			b.DeleteRange(numberKey('b', h, 0), numberKey('b', h+1, 0), nil))
		if err != nil {
			return err
		}
		return s.commit(b, pebble.NoSync)
	}
	m, err := s.newImage()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.close()) }()
	c, d := changes{}, deletes{s: s}
	if err := c.addChanged(m, h, prev, to); err != nil {
		return err
	}
	err = c.each(func(leaf uint64) error {
		return m.eachStored(h, leaf, prev, to, func(k []byte, _ uint32) error { return d.delete(k) })
	})
	if err != nil {
		return err
	}
	it := m.pages // after the leaves: they say which these are
	it.SetBounds(numberKey('b', h, 0), numberKey('b', h+1, 0))
	for ok := it.First(); ok; {
		_, n, gen, valid := splitKey(it.Key())
		switch {
		case !valid:
			return fmt.Errorf("page key %x: %w", it.Key(), ErrCorrupt)
		case gen <= prev:
			ok = it.SeekGE(numberKey('b', h, n+1))
			continue
		case gen <= to:
			if err := d.delete(it.Key()); err != nil {
				return err
			}
		}
		ok = it.Next()
	}
	return errors.Join(it.Error(), d.commit())
}
