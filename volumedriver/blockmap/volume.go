package blockmap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"
)

const (
	pageLeaves = 4096 // 8 GiB
	pageWords  = pageLeaves / 64
	maxLeaves  = MaxBlocks / LeafBlocks
	pageMemory = pageWords*8 + 32 // with what surrounds it
)

// page says which of 4096 leaves may exist.
type page struct {
	words [pageWords]atomic.Uint64
	dirty atomic.Bool // newer than in Pebble
}

// volume is what is in memory of a volume besides leaves.
type volume struct {
	mu     sync.Mutex // one writer at a time
	handle Handle
	// pages is nil until loaded. Bits are set with the shard lock of their leaf and mu held, and read without.
	pages atomic.Pointer[[]*page]
	used  atomic.Int64 // when last opened, by Store.clock
}

type presence int

const (
	unknown presence = iota
	absent
	possible
)

func leafKey(h Handle, leaf uint64) []byte { return numberKey('l', h, uint32(leaf)) }
func pageKey(h Handle, n uint32) []byte    { return numberKey('b', h, n) }

func numberKey(kind byte, h Handle, n uint32) []byte {
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32([]byte{kind}, uint32(h)), n)
}

// memoryKey names a leaf in memory.
func memoryKey(h Handle, leaf uint64) uint64 { return uint64(h)<<32 | leaf }

func (s *Store) known(h Handle) error {
	if h == 0 || uint32(h) >= s.nextHandle.Load() {
		return fmt.Errorf("block map of volume %d: %w", h, ErrHandle)
	}
	return nil
}

// peek gives the volume if it was used before.
func (s *Store) peek(h Handle) *volume {
	s.volumesMu.RLock()
	defer s.volumesMu.RUnlock()
	return s.volumes[h]
}

func (s *Store) volume(h Handle) (*volume, error) {
	if err := s.known(h); err != nil {
		return nil, err
	}
	if v := s.peek(h); v != nil {
		return v, nil
	}
	s.volumesMu.Lock()
	defer s.volumesMu.Unlock()
	v := s.volumes[h]
	if v == nil {
		v = &volume{handle: h}
		s.volumes[h] = v
	}
	return v, nil
}

// opened gives the volume with its bits loaded (they may be dropped again at once unless mu is held).
func (s *Store) opened(h Handle) (*volume, error) {
	v, err := s.volume(h)
	if err == nil && v.pages.Load() == nil {
		v.mu.Lock()
		err = s.loadLocked(v)
		v.mu.Unlock()
	}
	return v, err
}

// locked gives the volume with mu held and its bits loaded.
func (s *Store) locked(h Handle) (*volume, error) {
	if err := s.Err(); err != nil {
		return nil, err
	}
	v, err := s.volume(h)
	if err != nil {
		return nil, err
	}
	v.mu.Lock()
	if err := s.loadLocked(v); err != nil {
		v.mu.Unlock()
		return nil, err
	}
	return v, nil
}

// loadLocked reads the volume's pages: one short scan.
func (s *Store) loadLocked(v *volume) error {
	v.used.Store(s.clock.Add(1))
	if v.pages.Load() != nil {
		return nil
	}
	pages, err := s.readPages(v.handle)
	if err != nil {
		return fmt.Errorf("open block map of volume %d: %w", v.handle, err)
	}
	v.pages.Store(&pages)
	s.pageBytes.Add(v.memory())
	s.unloadOthers(v)
	return nil
}

func (s *Store) readPages(h Handle) (pages []*page, err error) {
	pages = []*page{}
	if err := s.Err(); err != nil {
		return nil, err
	}
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: pageKey(h, 0), UpperBound: pageKey(h+1, 0)})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, it.Close()) }()
	for ok := it.First(); ok; ok = it.Next() {
		value, err := it.ValueAndErr()
		if err != nil {
			return nil, err
		}
		number, p, err := decodePage(it.Key(), value)
		if err != nil {
			return nil, err
		}
		for uint32(len(pages)) <= number {
			pages = append(pages, nil)
		}
		pages[number] = p
	}
	return pages, it.Error()
}

func appendPage(b, key []byte, p *page) []byte {
	begin := len(b)
	b = append(b, 1)
	for i := range p.words {
		b = binary.LittleEndian.AppendUint64(b, p.words[i].Load())
	}
	return binary.LittleEndian.AppendUint32(b, valueCRC(key, b[begin:]))
}

func decodePage(key, b []byte) (uint32, *page, error) {
	const size = 1 + pageWords*8
	if len(key) != 9 || len(b) != size+4 || b[0] != 1 || valueCRC(key, b[:size]) != binary.LittleEndian.Uint32(b[size:]) {
		return 0, nil, fmt.Errorf("page of %d bytes: %w", len(b), ErrCorrupt)
	}
	number := binary.BigEndian.Uint32(key[5:])
	if number >= maxLeaves/pageLeaves {
		return 0, nil, fmt.Errorf("page %d: %w", number, ErrCorrupt)
	}
	p := &page{}
	for i := range p.words {
		p.words[i].Store(binary.LittleEndian.Uint64(b[1+8*i:]))
	}
	return number, p, nil
}

// unloadOthers drops the bits of volumes that were opened longest ago, roughly, if bits take more than a quarter of the
// budget, until it is an eighth. Volumes that are being written to, or have bits that are not in Pebble yet, stay.
func (s *Store) unloadOthers(keep *volume) {
	if s.pageBytes.Load() <= s.budget/4 {
		return
	}
	s.writes.Lock() // no page is on its way to Pebble
	defer s.writes.Unlock()
	s.volumesMu.RLock()
	defer s.volumesMu.RUnlock()
	now := s.clock.Load()
	for _, age := range [...]int64{int64(len(s.volumes)), 0} {
		for _, v := range s.volumes {
			if v == keep || now-v.used.Load() < age || !v.mu.TryLock() {
				continue
			}
			s.unloadLocked(v)
			v.mu.Unlock()
			if s.pageBytes.Load() <= s.budget/8 {
				return
			}
		}
	}
}

func (s *Store) unloadLocked(v *volume) {
	p := v.pages.Load()
	if p == nil {
		return
	}
	for _, pg := range *p {
		if pg != nil && pg.dirty.Load() {
			return
		}
	}
	s.pageBytes.Add(-v.memory())
	v.pages.Store(nil)
}

// memory is what the volume's bits take.
func (v *volume) memory() int64 {
	p := v.pages.Load()
	if p == nil {
		return 0
	}
	n := int64(len(*p)) * 8
	for _, pg := range *p {
		if pg != nil {
			n += pageMemory
		}
	}
	return n
}

func (v *volume) page(leaf uint64) *page {
	p := v.pages.Load()
	if p == nil || leaf/pageLeaves >= uint64(len(*p)) {
		return nil
	}
	return (*p)[leaf/pageLeaves]
}

func (v *volume) presence(leaf uint64) presence {
	p := v.pages.Load()
	if p == nil {
		return unknown
	}
	if n := leaf / pageLeaves; n < uint64(len(*p)) && (*p)[n] != nil &&
		(*p)[n].words[leaf%pageLeaves/64].Load()&(1<<(leaf%64)) != 0 {
		return possible
	}
	return absent
}

// ensure makes the page for a leaf; mu is held.
func (s *Store) ensure(v *volume, leaf uint64) {
	if v.page(leaf) != nil {
		return
	}
	old := *v.pages.Load()
	pages := make([]*page, max(len(old), int(leaf/pageLeaves)+1))
	copy(pages, old)
	pages[leaf/pageLeaves] = &page{}
	v.pages.Store(&pages)
	s.pageBytes.Add(pageMemory + int64(len(pages)-len(old))*8)
}

// setBit needs the leaf's shard lock, and ensure before.
func (v *volume) setBit(leaf uint64) {
	p := v.page(leaf)
	w, bit := &p.words[leaf%pageLeaves/64], uint64(1)<<(leaf%64)
	if w.Load()&bit == 0 {
		w.Or(bit)
		p.dirty.Store(true)
	}
}

// clearBit needs the leaf's shard lock; nothing of the leaf may be in Pebble.
func (v *volume) clearBit(leaf uint64) {
	if p := v.page(leaf); p != nil {
		p.words[leaf%pageLeaves/64].And(^(uint64(1) << (leaf % 64)))
		p.dirty.Store(true)
	}
}

// clearBits clears those of leaves [from,to), gives their number, and the leaves themselves while they are at most limit.
func (v *volume) clearBits(from, to uint64, limit int) (n int, leaves []uint64) {
	for leaf := from; leaf < to; {
		p := v.page(leaf)
		if p == nil {
			if leaf/pageLeaves >= uint64(len(*v.pages.Load())) {
				return n, leaves
			}
			leaf = (leaf/pageLeaves + 1) * pageLeaves
			continue
		}
		base := leaf &^ 63
		mask := ^uint64(0) << (leaf % 64)
		if to-base < 64 {
			mask &= 1<<(to-base) - 1
		}
		w := &p.words[base%pageLeaves/64]
		if set := w.Load() & mask; set != 0 {
			w.And(^mask)
			p.dirty.Store(true)
			n += bits.OnesCount64(set)
			for ; set != 0 && n <= limit; set &= set - 1 {
				leaves = append(leaves, base+uint64(bits.TrailingZeros64(set)))
			}
		}
		leaf = base + 64
	}
	return n, leaves
}

// nextLeaf gives the first leaf >= from, below to, that may exist.
func (v *volume) nextLeaf(from, to uint64) (leaf uint64, ok, loaded bool) {
	p := v.pages.Load()
	if p == nil {
		return 0, false, false
	}
	for leaf := from; leaf < to; {
		n := leaf / pageLeaves
		if n >= uint64(len(*p)) {
			break
		}
		if (*p)[n] == nil {
			leaf = (n + 1) * pageLeaves
			continue
		}
		if set := (*p)[n].words[leaf%pageLeaves/64].Load() >> (leaf % 64); set != 0 {
			leaf += uint64(bits.TrailingZeros64(set))
			return leaf, leaf < to, true
		}
		leaf = leaf&^63 + 64
	}
	return 0, false, true
}
