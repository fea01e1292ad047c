package blockmap

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cockroachdb/pebble/v2"
)

const (
	// firstView: handles from here on are of views. They live in memory only.
	firstView Handle = 1 << 31
	lastView  Handle = 1<<32 - 2

	maxGeneration = 1<<32 - 2

	recordVersion = 1
	recordBytes   = 1 + 6*4 + 1 + 4
	flagHeadless  = 1
	flagMerged    = 2
)

// At is a generation of a handle.
type At struct {
	Handle Handle
	Gen    uint32
}

// record is what a handle is. One that was never frozen and has no parent has none in Pebble.
//
//	| version 1 | generation 4 | parent 4, its generation 4 | flags 1 | floor 4 | pending at 4, its floor 4 |
//	| crc32c of key and value so far 4 |
type record struct {
	gen      uint32
	parent   At   // Handle 0: none
	headless bool // the generation gen cannot be read any more, those below can
	merged   bool // generations between floor and gen were released since gen began
	floor    uint32
	pending  At // Gen is a generation that froze when merged was set; Handle holds its floor
}

func recordKey(h Handle) []byte { return binary.BigEndian.AppendUint32([]byte{'h'}, uint32(h)) }

// childKey notes that a handle's generation has a fork.
func childKey(parent At, child Handle) []byte {
	k := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32([]byte{'c'}, uint32(parent.Handle)), parent.Gen)
	return binary.BigEndian.AppendUint32(k, uint32(child))
}

func (r *record) encode(key []byte) []byte {
	flags := byte(0)
	if r.headless {
		flags |= flagHeadless
	}
	if r.merged {
		flags |= flagMerged
	}
	b := make([]byte, 0, recordBytes)
	b = binary.BigEndian.AppendUint32(append(b, recordVersion), r.gen)
	b = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, uint32(r.parent.Handle)), r.parent.Gen)
	b = binary.BigEndian.AppendUint32(append(b, flags), r.floor)
	b = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, r.pending.Gen), uint32(r.pending.Handle))
	return binary.LittleEndian.AppendUint32(b, valueCRC(key, b))
}

func decodeRecord(key, b []byte) (r record, err error) {
	if len(b) != recordBytes || b[0] != recordVersion || valueCRC(key, b[:len(b)-4]) != binary.LittleEndian.Uint32(b[len(b)-4:]) {
		return r, fmt.Errorf("handle record %x: %w", b, ErrCorrupt)
	}
	u := func(off int) uint32 { return binary.BigEndian.Uint32(b[off:]) }
	r = record{gen: u(1), parent: At{Handle(u(5)), u(9)}, headless: b[13]&flagHeadless != 0, merged: b[13]&flagMerged != 0,
		floor: u(14), pending: At{Handle(u(22)), u(18)}}
	if r.gen == 0 || r.gen > maxGeneration || b[13] > flagHeadless|flagMerged || (r.parent.Handle == 0) != (r.parent.Gen == 0) {
		return r, fmt.Errorf("handle record %+v: %w", r, ErrCorrupt)
	}
	return r, nil
}

func (s *Store) readRecord(h Handle) (record, error) {
	k := recordKey(h)
	b, closer, err := s.db.Get(k)
	if errors.Is(err, pebble.ErrNotFound) {
		return record{gen: 1}, nil
	}
	if err != nil {
		return record{}, err
	}
	r, err := decodeRecord(k, b)
	return r, errors.Join(err, closer.Close())
}

// loadRecordLocked reads the handle's record, and the lineage above it.
func (s *Store) loadRecordLocked(v *volume) error {
	if v.loaded {
		return nil
	}
	if err := s.Err(); err != nil {
		return err
	}
	r, err := s.readRecord(v.handle)
	if err != nil {
		return err
	}
	ancestors, err := s.readAncestors(v.handle, r.parent)
	if err != nil {
		return err
	}
	v.setRecord(r)
	v.ancestors, v.loaded = ancestors, true
	return nil
}

func (v *volume) setRecord(r record) {
	v.record = r
	v.gen.Store(r.gen)
}

// readAncestors gives parent, its parent, and so on.
func (s *Store) readAncestors(child Handle, parent At) (out []At, err error) {
	for at := parent; at.Handle != 0; {
		r, err := s.readRecord(at.Handle)
		if err != nil {
			return nil, err
		}
		if at.Handle >= child || at.Gen >= r.gen { // parents are older, and were frozen
			return nil, fmt.Errorf("parent %d at generation %d of volume %d: %w", at.Handle, at.Gen, child, ErrCorrupt)
		}
		out = append(out, at)
		child, at = at.Handle, r.parent
	}
	return out, nil
}

// recorded gives the volume with mu held and its record loaded, but perhaps not its bits.
func (s *Store) recorded(h Handle) (*volume, error) {
	if err := s.Err(); err != nil {
		return nil, err
	}
	v, err := s.volume(h)
	if err != nil {
		return nil, err
	}
	v.mu.Lock()
	if err := s.loadRecordLocked(v); err != nil {
		v.mu.Unlock()
		return nil, fmt.Errorf("open block map of volume %d: %w", h, err)
	}
	return v, nil
}

// Generation gives the current generation of a handle, the one that changes go to. They begin at 1.
func (s *Store) Generation(h Handle) (uint32, error) {
	v, err := s.recorded(h)
	if err != nil {
		return 0, err
	}
	defer v.mu.Unlock()
	return v.record.gen, nil
}

// Parent gives what the handle was forked from, or is a view of.
func (s *Store) Parent(h Handle) (Handle, uint32, bool, error) {
	v, err := s.recorded(h)
	if err != nil {
		return 0, 0, false, err
	}
	defer v.mu.Unlock()
	if len(v.ancestors) == 0 {
		return 0, 0, false, nil
	}
	return v.ancestors[0].Handle, v.ancestors[0].Gen, true, nil
}

// newNumber gives the number of a new volume; that it is used is durable with whatever is written durably next.
func (s *Store) newNumber() (Handle, error) {
	s.handlesMu.Lock()
	defer s.handlesMu.Unlock()
	h := s.nextHandle.Load()
	if Handle(h) == firstView {
		return 0, fmt.Errorf("all handles are used: %w", ErrRange)
	}
	b := s.db.NewBatch()
	err := b.Set([]byte("n"), binary.BigEndian.AppendUint32(nil, h+1), nil)
	if err == nil {
		err = s.commit(b, pebble.NoSync)
	}
	if err != nil {
		return 0, err
	}
	s.nextHandle.Store(h + 1)
	return Handle(h), nil
}

// NewHandle gives a handle that was never given before. It is durable with the next Checkpoint or synced Put.
func (s *Store) NewHandle() (Handle, error) {
	h, err := s.newNumber()
	if err != nil {
		return 0, fmt.Errorf("new volume in the block map: %w", err)
	}
	v := &volume{handle: h, loaded: true}
	v.setRecord(record{gen: 1})
	v.pages.Store(&[]*page{})
	s.volumesMu.Lock()
	s.volumes[h] = v
	s.volumesMu.Unlock()
	return h, nil
}

// Freeze ends the handle's generation, gives its number, and begins the next. What the handle holds now is what OpenView and
// Fork will find under that number, for ever. It is durable when Freeze returns, as are puts: after a crash before that, all of
// it or nothing is there. The cost is that of writing the handle's dirty leaves, and one sync.
func (s *Store) Freeze(h Handle, puts []KV) (uint32, error) {
	v, err := s.head(h)
	if err != nil {
		return 0, err
	}
	defer v.mu.Unlock()
	r := v.record
	if r.gen == maxGeneration {
		return 0, fmt.Errorf("freeze volume %d: all generations are used: %w", h, ErrRange)
	}
	if err := s.flushLocked(v); err != nil {
		return 0, fmt.Errorf("freeze volume %d: %w", h, err)
	}
	if r.merged {
		r.pending = At{Handle(r.floor), r.gen}
		r.merged, r.floor = false, 0
	}
	r.gen++
	b := s.db.NewBatch()
	err = b.Set(recordKey(h), r.encode(recordKey(h)), nil)
	for _, kv := range puts {
		err = errors.Join(err, b.Set(metadataKey(kv.Key), kv.Value, nil))
	}
	if err == nil {
		err = s.commit(b, pebble.Sync) // nothing of h is dirty, and mu keeps it so
	}
	if err != nil {
		return 0, fmt.Errorf("freeze volume %d: %w", h, err)
	}
	s.writes.Lock()
	defer s.writes.Unlock()
	v.setRecord(r)
	for _, pg := range *v.pages.Load() {
		if pg != nil {
			if pg.changed.Swap(nil) != nil {
				s.pageBytes.Add(-bitmapMemory)
			}
		}
	}
	s.trimLocked(v)
	return r.gen - 1, nil
}

// Flush writes the handle's dirty leaves and bits to Pebble, not durably.
func (s *Store) Flush(h Handle) error {
	v, err := s.head(h)
	if err != nil {
		return err
	}
	defer v.mu.Unlock()
	if err := s.flushLocked(v); err != nil {
		return fmt.Errorf("flush volume %d of the block map: %w", h, err)
	}
	return nil
}

// Fork gives a new handle that holds what the parent held when gen was frozen. It is durable when Fork returns, together with
// what puts gives for it. The cost does not depend on what the parent holds.
func (s *Store) Fork(parent Handle, gen uint32, puts func(child Handle) []KV) (Handle, error) {
	at := At{parent, gen}
	ancestors, err := s.frozenLineage(at)
	if err != nil {
		return 0, fmt.Errorf("fork volume %d at generation %d: %w", parent, gen, err)
	}
	h, err := s.newNumber()
	if err != nil {
		return 0, fmt.Errorf("fork volume %d at generation %d: %w", parent, gen, err)
	}
	r := record{gen: 1, parent: at}
	b := s.db.NewBatch()
	err = errors.Join(b.Set(recordKey(h), r.encode(recordKey(h)), nil), b.Set(childKey(at, h), nil, nil))
	if puts != nil {
		for _, kv := range puts(h) {
			err = errors.Join(err, b.Set(metadataKey(kv.Key), kv.Value, nil))
		}
	}
	if err == nil {
		err = s.commit(b, pebble.Sync)
	}
	if err != nil {
		return 0, fmt.Errorf("fork volume %d at generation %d: %w", parent, gen, err)
	}
	v := &volume{handle: h, ancestors: ancestors, loaded: true}
	v.setRecord(r)
	s.volumesMu.Lock()
	s.volumes[h] = v
	s.volumesMu.Unlock()
	return h, nil
}

// frozenLineage gives at and its ancestors, if at is frozen.
func (s *Store) frozenLineage(at At) ([]At, error) {
	v, err := s.recorded(at.Handle)
	if err != nil {
		return nil, err
	}
	defer v.mu.Unlock()
	if v.view || at.Gen == 0 || at.Gen >= v.record.gen {
		return nil, ErrGeneration
	}
	return append([]At{at}, v.ancestors...), nil
}

// OpenView gives a handle in memory for reading what h held when gen was frozen. DropVolume frees it.
func (s *Store) OpenView(h Handle, gen uint32) (Handle, error) {
	ancestors, err := s.frozenLineage(At{h, gen})
	if err != nil {
		return 0, fmt.Errorf("view volume %d at generation %d: %w", h, gen, err)
	}
	s.volumesMu.Lock()
	defer s.volumesMu.Unlock()
	for s.volumes[s.nextView] != nil {
		s.nextView = nextView(s.nextView)
	}
	v := &volume{handle: s.nextView, view: true, ancestors: ancestors, loaded: true}
	s.nextView = nextView(s.nextView)
	s.volumes[v.handle] = v
	s.views[ancestors[0]]++
	return v.handle, nil
}

func nextView(h Handle) Handle {
	if h == lastView {
		return firstView
	}
	return h + 1
}
