package blockmap

import (
	"errors"
	"fmt"

	"github.com/cockroachdb/pebble/v2"
)

// How much a checkpoint commits at a time, about.
const (
	chunkBytes = 1 << 20
	chunkPages = 1024
)

// flush is a batch of leaves and pages on its way to Pebble. Store.writes is held from its first leaf to its end.
type flush struct {
	b     *pebble.Batch
	marks []mark
	pages []touchedPage
}

// mark remembers a leaf as it was encoded.
type mark struct {
	sh      *shard
	v       *volume
	key     uint64
	version uint32
	empty   bool
	fresh   bool
}

type touchedPage struct {
	v      *volume
	pg     *page
	number uint32
	done   bool
}

// flushWanted writes the dirty leaves of the slab that the shard needs for eviction.
func (s *Store) flushWanted(sh *shard) error {
	s.writes.Lock()
	defer s.writes.Unlock()
	f := flush{b: s.db.NewBatch()}
	var err error
	sh.mu.Lock()
	if sh.wanted < len(sh.slabs) {
		sh.each(sh.wanted, func(id uint32, p slot) {
			if p.is(flagDirty) && err == nil {
				err = s.encode(&f, sh, p)
			}
		})
	}
	sh.mu.Unlock()
	if err = s.finish(&f, err); err != nil {
		return fmt.Errorf("write leaves of the block map: %w", err)
	}
	return nil
}

// Checkpoint makes durable all changes made before the call, then puts and deletes, these all together. Lookups and changes
// go on meanwhile; what they change may or may not be included (the redo rule).
func (s *Store) Checkpoint(puts []KV, deletes [][]byte) error {
	if err := s.Err(); err != nil {
		return err
	}
	if err := s.flushDirty(); err != nil {
		return fmt.Errorf("checkpoint block map: %w", err)
	}
	b := s.db.NewBatch()
	err := b.LogData(nil, nil) // a batch that is never empty, so that Sync covers what went before
	for _, kv := range puts {
		err = errors.Join(err, b.Set(metadataKey(kv.Key), kv.Value, nil))
	}
	for _, k := range deletes {
		err = errors.Join(err, b.Delete(metadataKey(k), nil))
	}
	if err == nil {
		err = s.commit(b, pebble.Sync)
	}
	if err != nil {
		return fmt.Errorf("checkpoint block map: %w", err)
	}
	return nil
}

// flushDirty writes all leaves that are dirty now, and all bits.
func (s *Store) flushDirty() error {
	var keys []uint64
	for i := range s.shards {
		keys = s.shards[i].dirtyKeys(keys[:0])
		if err := s.flushKeys(keys); err != nil {
			return err
		}
	}
	s.volumesMu.RLock()
	volumes := make([]*volume, 0, len(s.volumes))
	for _, v := range s.volumes {
		volumes = append(volumes, v)
	}
	s.volumesMu.RUnlock()
	for _, v := range volumes {
		if err := s.flushPages(v); err != nil {
			return err
		}
		if v.mu.TryLock() { // else it is being written to, and will need them again
			s.writes.Lock()
			s.trimLocked(v)
			s.writes.Unlock()
			v.mu.Unlock()
		}
	}
	s.unloadOthers(nil)
	return nil
}

// flushLocked writes the leaves of a volume that are dirty, and its bits. mu is held, so nothing becomes dirty meanwhile.
func (s *Store) flushLocked(v *volume) error {
	var keys []uint64
	for n, pg := range *v.pages.Load() {
		if pg == nil {
			continue
		}
		set := pg.unflushed.Load().copy()
		err := set.each(uint32(n), func(leaf uint64) error {
			keys = append(keys, memoryKey(v.handle, leaf))
			return nil
		})
		if err == nil && len(keys) >= 4096 {
			err = s.flushKeys(keys)
			keys = keys[:0]
		}
		if err != nil {
			return err
		}
	}
	if err := s.flushKeys(keys); err != nil {
		return err
	}
	return s.flushPages(v)
}

func (sh *shard) dirtyKeys(keys []uint64) []uint64 {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if sh.dirty == 0 {
		return keys
	}
	for i := range sh.slabs {
		sh.each(i, func(_ uint32, p slot) {
			if p.is(flagDirty) {
				keys = append(keys, p.key())
			}
		})
	}
	return keys
}

// flushKeys writes those of the leaves that are still dirty.
func (s *Store) flushKeys(keys []uint64) error {
	for len(keys) > 0 {
		n, err := s.flushChunk(keys)
		if err != nil {
			return err
		}
		keys = keys[n:]
	}
	return nil
}

// flushChunk is flushKeys up to chunkBytes; it gives how many keys it has done.
func (s *Store) flushChunk(keys []uint64) (n int, err error) {
	s.writes.Lock()
	defer s.writes.Unlock()
	f := flush{b: s.db.NewBatch()}
	for ; n < len(keys) && f.b.Len() < chunkBytes && err == nil; n++ {
		sh := s.shard(keys[n])
		sh.mu.Lock()
		if id, ok := sh.find(keys[n]); ok && sh.slot(id).is(flagDirty) {
			err = s.encode(&f, sh, sh.slot(id))
		} else if v := s.peek(Handle(keys[n] >> 32)); v != nil {
			if pg := v.page(keys[n] & (1<<32 - 1)); pg != nil {
				pg.unflushed.Load().unset(keys[n])
			}
		}
		sh.mu.Unlock()
	}
	return n, s.finish(&f, err)
}

// encode adds a leaf to f. writes and the shard are locked.
func (s *Store) encode(f *flush, sh *shard, p slot) error {
	key := p.key()
	h, leaf := Handle(key>>32), key&(1<<32-1)
	v := s.peek(h)
	if v == nil {
		return nil // dropped
	}
	k := leafKey(h, leaf, v.gen.Load())
	sh.scratch = p.runs(sh.scratch[:0])
	m := mark{sh: sh, v: v, key: key, version: p.version(), empty: len(sh.scratch) == 0}
	pg := v.page(leaf) // not unloaded, as the leaf is dirty
	if m.empty && !v.versioned() {
		f.marks = append(f.marks, m)
		return f.b.Delete(k, nil)
	}
	s.encoded = appendLeaf(s.encoded[:0], k, sh.scratch)
	if err := f.b.Set(k, s.encoded, nil); err != nil {
		return err
	}
	if pg.fresh.Load().unset(leaf) {
		m.fresh = true
		pg.dirty.Store(true)
	}
	f.marks = append(f.marks, m)
	if k := len(f.pages); pg.dirty.Load() && (k == 0 || f.pages[k-1].pg != pg) {
		f.pages = append(f.pages, touchedPage{v: v, pg: pg, number: uint32(leaf / pageLeaves)})
	}
	return nil
}

// encodePages adds the pages that f's leaves need, if they are newer than in Pebble.
func (s *Store) encodePages(f *flush) error {
	for i := range f.pages {
		t := &f.pages[i]
		if !t.pg.dirty.Swap(false) {
			continue
		}
		t.done = true
		changed := t.pg.changed.Load().copy()
		present := t.pg.present.copy() // before fresh: see setBit
		fresh := t.pg.fresh.Load().copy()
		for i := range present {
			present[i] &^= fresh[i]
		}
		k := pageKey(t.v.handle, t.number, t.v.gen.Load())
		s.encoded = appendPage(s.encoded[:0], k, &present, &changed)
		if err := f.b.Set(k, s.encoded, nil); err != nil {
			return err
		}
	}
	return nil
}

// finish commits f, unless err says that it is incomplete, and marks clean what has not changed since it was encoded; leaves
// without blocks go away.
func (s *Store) finish(f *flush, err error) error {
	if err == nil {
		err = s.encodePages(f)
	}
	if err == nil && !f.b.Empty() {
		err = s.commit(f.b, pebble.NoSync)
	} else {
		err = errors.Join(err, f.b.Close())
	}
	if err != nil {
		s.abandon(f)
		return err
	}
	s.flushed.Add(int64(len(f.marks)))
	for _, m := range f.marks {
		m.sh.mu.Lock()
		if id, ok := m.sh.find(m.key); ok && m.sh.slot(id).version() == m.version {
			m.sh.markClean(m.sh.slot(id))
			leaf := m.key & (1<<32 - 1)
			if pg := m.v.page(leaf); pg != nil {
				pg.unflushed.Load().unset(leaf)
			}
			if m.empty {
				m.sh.remove(id)
				m.v.clearBit(leaf)
			}
		}
		m.sh.mu.Unlock()
	}
	return nil
}

// abandon undoes what encode has noted: the disk may have been full, and f will be tried again.
func (s *Store) abandon(f *flush) {
	for _, m := range f.marks {
		leaf := m.key & (1<<32 - 1)
		if pg := m.v.page(leaf); m.fresh && pg != nil {
			if fresh := pg.fresh.Load(); fresh != nil {
				fresh.set(leaf)
			}
		}
	}
	for _, t := range f.pages {
		if t.done {
			t.pg.dirty.Store(true)
		}
	}
}

// flushPages writes the bits of a volume that are not in Pebble yet.
func (s *Store) flushPages(v *volume) error {
	s.writes.Lock()
	defer s.writes.Unlock()
	p := v.pages.Load()
	if p == nil || v.view || s.peek(v.handle) != v {
		return nil
	}
	f := flush{b: s.db.NewBatch()}
	for i, pg := range *p {
		if pg == nil || !pg.dirty.Load() {
			continue
		}
		f.pages = append(f.pages, touchedPage{v: v, pg: pg, number: uint32(i)})
		if len(f.pages) == chunkPages {
			if err := s.finish(&f, nil); err != nil {
				return err
			}
			f = flush{b: s.db.NewBatch()}
		}
	}
	return s.finish(&f, nil)
}

func metadataKey(k []byte) []byte { return append([]byte{'m'}, k...) }

// Get gives a metadata record, or ErrNotFound.
func (s *Store) Get(key []byte) ([]byte, error) {
	if err := s.Err(); err != nil {
		return nil, err
	}
	v, closer, err := s.db.Get(metadataKey(key))
	if errors.Is(err, pebble.ErrNotFound) {
		return nil, ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("get %q from the block map: %w", key, err)
	}
	return append([]byte{}, v...), closer.Close()
}

// Scan calls fn for the metadata records whose keys begin with prefix, in their order; k and v are valid during the call.
func (s *Store) Scan(prefix []byte, fn func(k, v []byte) error) (err error) {
	if err := s.Err(); err != nil {
		return err
	}
	lower := metadataKey(prefix)
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: lower, UpperBound: successor(lower)})
	if err != nil {
		return fmt.Errorf("scan %q in the block map: %w", prefix, err)
	}
	defer func() { err = errors.Join(err, it.Close()) }()
	for ok := it.First(); ok; ok = it.Next() {
		v, err := it.ValueAndErr()
		if err != nil {
			return fmt.Errorf("scan %q in the block map: %w", prefix, err)
		}
		if err := fn(it.Key()[1:], v); err != nil {
			return err
		}
	}
	return it.Error()
}

// successor is the smallest key greater than all that begin with prefix, whose first byte is not 0xff.
func successor(prefix []byte) []byte {
	out := append([]byte{}, prefix...)
	for out[len(out)-1] == 0xff {
		out = out[:len(out)-1]
	}
	out[len(out)-1]++
	return out
}

// Put writes metadata records, all together, and with sync durably, along with all that was written before.
func (s *Store) Put(puts []KV, sync bool) error {
	if err := s.Err(); err != nil {
		return err
	}
	b := s.db.NewBatch()
	var err error
	for _, kv := range puts {
		err = errors.Join(err, b.Set(metadataKey(kv.Key), kv.Value, nil))
	}
	o := pebble.NoSync
	if sync {
		o = pebble.Sync
	}
	if err == nil {
		err = s.commit(b, o)
	}
	if err != nil {
		return fmt.Errorf("put in the block map: %w", err)
	}
	return nil
}
