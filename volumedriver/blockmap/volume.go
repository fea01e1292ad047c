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
	maxLeaves  = MaxBlocks / LeafBlocks
	pageMemory = bitmapMemory + 64 // with what surrounds it
)

// page says which of 4096 leaves may exist, and what is known of them beside that.
type page struct {
	present bitmap
	dirty   atomic.Bool // present or changed is newer than in Pebble

	// nil where nothing was noted. They come and go with volume.mu held.
	changed   atomic.Pointer[bitmap] // may differ from the generation before
	unflushed atomic.Pointer[bitmap] // may be dirty; every dirty leaf is here
	fresh     atomic.Pointer[bitmap] // present, but what Pebble has of the leaf, if anything, is not its content
}

// volume is what is in memory of a volume besides leaves.
type volume struct {
	releasing sync.Mutex // one Release, ReleaseHead or DropVolume at a time
	mu        sync.Mutex // one writer at a time
	handle    Handle
	view      bool // of a frozen generation; not in Pebble

	loaded    bool          // what follows is
	record    record        // guarded by mu
	gen       atomic.Uint32 // record.gen; changes with mu and Store.writes held
	ancestors []At          // nearest first

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

// leafKey names a version of a leaf. The newest version that is not newer than gen is the first key from this one on.
func leafKey(h Handle, leaf uint64, gen uint32) []byte {
	return binary.BigEndian.AppendUint32(numberKey('l', h, uint32(leaf)), ^gen)
}

func pageKey(h Handle, n, gen uint32) []byte {
	return binary.BigEndian.AppendUint32(numberKey('b', h, n), ^gen)
}

// numberKey comes before all versions of the leaf or page, and after those of the one before.
func numberKey(kind byte, h Handle, n uint32) []byte {
	k := make([]byte, 0, 13)
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(append(k, kind), uint32(h)), n)
}

// splitKey undoes leafKey and pageKey.
func splitKey(k []byte) (h Handle, n, gen uint32, ok bool) {
	if len(k) != 13 {
		return 0, 0, 0, false
	}
	return Handle(binary.BigEndian.Uint32(k[1:])), binary.BigEndian.Uint32(k[5:]), ^binary.BigEndian.Uint32(k[9:]), true
}

// memoryKey names a leaf in memory.
func memoryKey(h Handle, leaf uint64) uint64 { return uint64(h)<<32 | leaf }

func (s *Store) known(h Handle) error {
	if h == 0 || uint32(h) >= s.nextHandle.Load() && h < firstView {
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
	if h >= firstView {
		return nil, fmt.Errorf("block map of view %d: %w", h, ErrHandle)
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
		if err == nil && v.record.headless {
			err = fmt.Errorf("block map of volume %d, which has frozen generations only: %w", h, ErrHandle)
		}
		v.mu.Unlock()
	}
	return v, err
}

// locked gives the volume with mu held and, if it has a head, its bits loaded.
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

// head is locked, but gives only what can be written to.
func (s *Store) head(h Handle) (*volume, error) {
	v, err := s.locked(h)
	if err != nil {
		return nil, err
	}
	if v.view || v.record.headless {
		v.mu.Unlock()
		return nil, fmt.Errorf("change volume %d of the block map: %w", h, ErrReadOnly)
	}
	return v, nil
}

// loadLocked reads the volume's record and pages: one short scan.
func (s *Store) loadLocked(v *volume) error {
	v.used.Store(s.clock.Add(1))
	if v.pages.Load() != nil {
		return nil
	}
	if err := s.loadRecordLocked(v); err != nil {
		return fmt.Errorf("open block map of volume %d: %w", v.handle, err)
	}
	if v.record.headless {
		return nil
	}
	pages, err := s.readPages(v.lineage(), !v.view)
	if err != nil {
		return fmt.Errorf("open block map of volume %d: %w", v.handle, err)
	}
	v.pages.Store(&pages)
	s.pageBytes.Add(v.memory())
	s.unloadOthers(v)
	return nil
}

// lineage says where to look for what the volume holds: in its own versions, then in those of its ancestors.
func (v *volume) lineage() []At {
	if v.view {
		return v.ancestors
	}
	return append([]At{{v.handle, v.gen.Load()}}, v.ancestors...)
}

// versioned tells whether a leaf that has a clear bit may have versions in Pebble that somebody can see.
func (v *volume) versioned() bool { return v.gen.Load() > 1 || len(v.ancestors) > 0 }

// frozen tells whether there are generations below the head that somebody may read; mu is held.
func (v *volume) frozen() bool { return v.record.gen > 1 && !(v.record.merged && v.record.floor == 0) }

// readPages gives the pages of the first of the lineage, and where it has none those of the next; with head, also what the
// first has changed in its generation.
func (s *Store) readPages(lineage []At, head bool) (pages []*page, err error) {
	pages = []*page{}
	if err := s.Err(); err != nil {
		return nil, err
	}
	it, err := s.db.NewIter(nil)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, it.Close()) }()
	for i, at := range lineage {
		err := eachPage(it, at, func(n uint32, gen uint32, value []byte) error {
			if uint64(n) < uint64(len(pages)) && pages[n] != nil {
				return nil
			}
			present, changed, err := decodePage(it.Key(), value)
			if err != nil {
				return err
			}
			for uint32(len(pages)) <= n {
				pages = append(pages, nil)
			}
			p := &page{}
			p.present.load(&present)
			if head && i == 0 && gen == at.Gen && changed != (leafSet{}) {
				p.changed.Store(new(bitmap))
				p.changed.Load().load(&changed)
			}
			pages[n] = p
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return pages, nil
}

// eachPage calls fn for the newest version of each page that is not newer than at.
func eachPage(it *pebble.Iterator, at At, fn func(n, gen uint32, value []byte) error) error {
	it.SetBounds(numberKey('b', at.Handle, 0), numberKey('b', at.Handle+1, 0))
	for ok := it.First(); ok; {
		_, n, gen, valid := splitKey(it.Key())
		if !valid || n >= maxLeaves/pageLeaves {
			return fmt.Errorf("page key %x: %w", it.Key(), ErrCorrupt)
		}
		if gen > at.Gen {
			ok = it.SeekGE(pageKey(at.Handle, n, at.Gen))
			continue
		}
		value, err := it.ValueAndErr()
		if err != nil {
			return err
		}
		if err := fn(n, gen, value); err != nil {
			return err
		}
		ok = it.SeekGE(numberKey('b', at.Handle, n+1))
	}
	return it.Error()
}

// unloadOthers drops the bits of volumes that were opened longest ago, roughly, if bits take more than a quarter of the
// budget, until it is an eighth. Volumes that are being written to, or have bits or leaves that are not in Pebble yet, stay.
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
		if pg != nil && (pg.dirty.Load() || !pg.unflushed.Load().empty() || !pg.fresh.Load().empty()) {
			return
		}
	}
	s.pageBytes.Add(-v.memory())
	v.pages.Store(nil)
}

// trimLocked frees notes in which nothing is noted.
func (s *Store) trimLocked(v *volume) {
	p := v.pages.Load()
	if p == nil {
		return
	}
	for _, pg := range *p {
		if pg == nil {
			continue
		}
		for _, m := range [...]*atomic.Pointer[bitmap]{&pg.changed, &pg.unflushed, &pg.fresh} {
			if b := m.Load(); b != nil && b.empty() {
				m.Store(nil)
				s.pageBytes.Add(-bitmapMemory)
			}
		}
	}
}

// memory is what the volume's bits take.
func (v *volume) memory() int64 {
	p := v.pages.Load()
	if p == nil {
		return 0
	}
	n := int64(len(*p)) * 8
	for _, pg := range *p {
		if pg == nil {
			continue
		}
		n += pageMemory
		for _, m := range [...]*atomic.Pointer[bitmap]{&pg.changed, &pg.unflushed, &pg.fresh} {
			if m.Load() != nil {
				n += bitmapMemory
			}
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
	if n := leaf / pageLeaves; n < uint64(len(*p)) && (*p)[n] != nil && (*p)[n].present.has(leaf) {
		return possible
	}
	return absent
}

// prepare makes what a change of the leaf notes its traces in; with grow, also its page. mu is held.
func (s *Store) prepare(v *volume, leaf uint64, grow bool) {
	pg := v.page(leaf)
	if pg == nil {
		if !grow {
			return
		}
		old := *v.pages.Load()
		pages := make([]*page, max(len(old), int(leaf/pageLeaves)+1))
		copy(pages, old)
		pg = &page{}
		pages[leaf/pageLeaves] = pg
		v.pages.Store(&pages)
		s.pageBytes.Add(pageMemory + int64(len(pages)-len(old))*8)
	}
	s.provide(&pg.unflushed)
	if v.versioned() {
		s.provide(&pg.changed)
	}
}

func (s *Store) provide(m *atomic.Pointer[bitmap]) {
	if m.Load() == nil {
		m.Store(new(bitmap))
		s.pageBytes.Add(bitmapMemory)
	}
}

// setBit needs the leaf's shard lock, and prepare before.
func (s *Store) setBit(v *volume, leaf uint64) {
	p := v.page(leaf)
	if p.present.has(leaf) {
		return
	}
	if v.versioned() {
		s.provide(&p.fresh)
		p.fresh.Load().set(leaf) // first: who sees the leaf must see that it is fresh
	}
	p.present.set(leaf)
	p.dirty.Store(true)
}

// note needs the same, after a leaf has been changed.
func (v *volume) note(leaf uint64) {
	p := v.page(leaf)
	if p == nil || !p.present.has(leaf) {
		return // there was nothing to clear
	}
	p.unflushed.Load().set(leaf)
	if v.versioned() && p.changed.Load().set(leaf) {
		p.dirty.Store(true)
	}
}

// clearBit needs the leaf's shard lock; nothing but holes may be in Pebble for the leaf.
func (v *volume) clearBit(leaf uint64) {
	if p := v.page(leaf); p != nil {
		p.present.unset(leaf)
		if !v.view {
			p.dirty.Store(true)
		}
	}
}

// countBits counts leaves [from,to).
func (v *volume) countBits(from, to uint64) (n int) {
	v.eachWord(from, to, func(p *page, leaf uint64, set uint64) { n += bits.OnesCount64(set) })
	return n
}

// clearBits clears those of leaves [from,to), gives their number, and the leaves themselves while they are at most limit.
// mu and Store.writes are held.
func (s *Store) clearBits(v *volume, from, to uint64, limit int) (n int, leaves []uint64) {
	versioned := v.versioned() && !v.view
	v.eachWord(from, to, func(p *page, leaf uint64, set uint64) {
		i := leaf % pageLeaves / 64
		if versioned {
			s.provide(&p.changed)
			p.changed.Load()[i].Or(set)
		}
		p.present[i].And(^set)
		if m := p.unflushed.Load(); m != nil {
			m[i].And(^set)
		}
		if m := p.fresh.Load(); m != nil {
			m[i].And(^set)
		}
		if !v.view {
			p.dirty.Store(true)
		}
		n += bits.OnesCount64(set)
		for ; set != 0 && n <= limit; set &= set - 1 {
			leaves = append(leaves, leaf+uint64(bits.TrailingZeros64(set)))
		}
	})
	return n, leaves
}

// eachWord calls fn for the words of bits of leaves [from,to) that are not 0, with the number of the word's first leaf.
func (v *volume) eachWord(from, to uint64, fn func(p *page, leaf uint64, set uint64)) {
	for leaf := from; leaf < to; {
		p := v.page(leaf)
		if p == nil {
			if all := v.pages.Load(); all == nil || leaf/pageLeaves >= uint64(len(*all)) {
				return
			}
			leaf = (leaf/pageLeaves + 1) * pageLeaves
			continue
		}
		base := leaf &^ 63
		mask := ^uint64(0) << (leaf % 64)
		if to-base < 64 {
			mask &= 1<<(to-base) - 1
		}
		if set := p.present[base%pageLeaves/64].Load() & mask; set != 0 {
			fn(p, base, set)
		}
		leaf = base + 64
	}
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
		if set := (*p)[n].present[leaf%pageLeaves/64].Load() >> (leaf % 64); set != 0 {
			leaf += uint64(bits.TrailingZeros64(set))
			return leaf, leaf < to, true
		}
		leaf = leaf&^63 + 64
	}
	return 0, false, true
}
