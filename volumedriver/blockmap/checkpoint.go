package blockmap

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cockroachdb/pebble/v2"
)

// chunkBytes is about how much a checkpoint commits at a time.
const chunkBytes = 1 << 20

// mark remembers a leaf as it was encoded.
type mark struct {
	sh      *shard
	key     uint64
	version uint32
	empty   bool
}

// flushWanted writes the dirty leaves of the slab that the shard needs for eviction.
func (s *Store) flushWanted(sh *shard) error {
	s.writes.Lock()
	defer s.writes.Unlock()
	b := s.db.NewBatch()
	var marks []mark
	var err error
	sh.mu.Lock()
	if sh.wanted < len(sh.slabs) {
		sh.each(sh.wanted, func(id uint32, p slot) {
			if p.is(flagDirty) && err == nil {
				var m mark
				m, err = s.encode(b, sh, p)
				marks = append(marks, m)
			}
		})
	}
	sh.mu.Unlock()
	if err == nil {
		err = s.finish(b, marks, pebble.NoSync)
	}
	if err != nil {
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
		sh := &s.shards[i]
		keys = sh.dirtyKeys(keys[:0])
		for len(keys) > 0 {
			n, err := s.flushChunk(sh, keys)
			if err != nil {
				return err
			}
			keys = keys[n:]
		}
	}
	err := s.flushPages()
	s.unloadOthers(nil)
	return err
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

// flushChunk writes leaves of the shard that are still dirty, up to chunkBytes, and gives how many keys it has done.
func (s *Store) flushChunk(sh *shard, keys []uint64) (int, error) {
	s.writes.Lock()
	defer s.writes.Unlock()
	b := s.db.NewBatch()
	var marks []mark
	n := 0
	for ; n < len(keys) && b.Len() < chunkBytes; n++ {
		sh.mu.Lock()
		if id, ok := sh.find(keys[n]); ok && sh.slot(id).is(flagDirty) {
			m, err := s.encode(b, sh, sh.slot(id))
			if err != nil {
				sh.mu.Unlock()
				return n, err
			}
			marks = append(marks, m)
		}
		sh.mu.Unlock()
	}
	return n, s.finish(b, marks, pebble.NoSync)
}

// encode adds a leaf, and its page of bits if that is not in Pebble yet, to b. writes and the shard are locked.
func (s *Store) encode(b *pebble.Batch, sh *shard, p slot) (mark, error) {
	key := p.key()
	h, leaf := Handle(key>>32), key&(1<<32-1)
	k := leafKey(h, leaf)
	sh.scratch = p.runs(sh.scratch[:0])
	m := mark{sh, key, p.version(), len(sh.scratch) == 0}
	if m.empty {
		return m, b.Delete(k, nil)
	}
	s.encoded = appendLeaf(s.encoded[:0], k, sh.scratch)
	if err := b.Set(k, s.encoded, nil); err != nil {
		return m, err
	}
	v := s.peek(h)
	if v == nil {
		return m, nil // dropped
	}
	pg := v.page(leaf)
	if pg == nil {
		return m, nil // its bits were unloaded, so they are stored
	}
	return m, s.encodePage(b, h, uint32(leaf/pageLeaves), pg)
}

func (s *Store) encodePage(b *pebble.Batch, h Handle, number uint32, pg *page) error {
	if !pg.dirty.Swap(false) {
		return nil
	}
	k := pageKey(h, number)
	s.encoded = appendPage(s.encoded[:0], k, pg)
	return b.Set(k, s.encoded, nil)
}

// finish commits b and marks clean what has not changed since it was encoded; leaves without blocks go away. writes is locked.
func (s *Store) finish(b *pebble.Batch, marks []mark, o *pebble.WriteOptions) error {
	if b.Empty() {
		return b.Close()
	}
	if err := s.commit(b, o); err != nil {
		return err
	}
	s.flushed.Add(int64(len(marks)))
	for _, m := range marks {
		m.sh.mu.Lock()
		if id, ok := m.sh.find(m.key); ok && m.sh.slot(id).version() == m.version {
			m.sh.markClean(m.sh.slot(id))
			if m.empty {
				m.sh.remove(id)
				if v := s.peek(Handle(m.key >> 32)); v != nil {
					v.clearBit(m.key & (1<<32 - 1))
				}
			}
		}
		m.sh.mu.Unlock()
	}
	return nil
}

// flushPages writes all bits that are not in Pebble yet, so that volumes can be unloaded.
func (s *Store) flushPages() error {
	s.volumesMu.RLock()
	volumes := make([]*volume, 0, len(s.volumes))
	for _, v := range s.volumes {
		volumes = append(volumes, v)
	}
	s.volumesMu.RUnlock()
	s.writes.Lock()
	defer s.writes.Unlock()
	b := s.db.NewBatch()
	for _, v := range volumes {
		p := v.pages.Load()
		if p == nil || s.peek(v.handle) != v {
			continue
		}
		for i, pg := range *p {
			if pg == nil {
				continue
			}
			if err := s.encodePage(b, v.handle, uint32(i), pg); err != nil {
				return err
			}
		}
		if b.Len() > chunkBytes {
			if err := s.commit(b, pebble.NoSync); err != nil {
				return err
			}
			b = s.db.NewBatch()
		}
	}
	return s.finish(b, nil, pebble.NoSync)
}

// NewHandle gives a handle that was never given before. It is durable with the next Checkpoint or synced Put.
func (s *Store) NewHandle() (Handle, error) {
	s.handlesMu.Lock()
	defer s.handlesMu.Unlock()
	h := s.nextHandle.Load()
	if h == 1<<32-2 {
		return 0, fmt.Errorf("new volume in the block map: all handles are used: %w", ErrRange)
	}
	b := s.db.NewBatch()
	err := b.Set([]byte("n"), binary.BigEndian.AppendUint32(nil, h+1), nil)
	if err == nil {
		err = s.commit(b, pebble.NoSync)
	}
	if err != nil {
		return 0, fmt.Errorf("new volume in the block map: %w", err)
	}
	v := &volume{handle: Handle(h)}
	v.pages.Store(&[]*page{})
	s.volumesMu.Lock()
	s.volumes[Handle(h)] = v
	s.volumesMu.Unlock()
	s.nextHandle.Store(h + 1)
	return Handle(h), nil
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
