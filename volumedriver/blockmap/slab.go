package blockmap

import (
	"encoding/binary"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	slotHeader = 16

	flagUsed  = 1
	flagRef   = 2 // looked at since the clock hand passed
	flagDirty = 4

	classArray = 3
	none       = ^uint32(0)
	slotBits   = 10 // slots in a slab: 64 KiB / 64 B

	scratchBytes = 2 * LeafBlocks * 16
)

var (
	slotBytes = [4]int{64, 256, 1024, slotHeader + arrayBytes}
	maxRuns   = [3]int{(64 - slotHeader) / runBytes, (256 - slotHeader) / runBytes, (1024 - slotHeader) / runBytes}
)

// classFor is the smallest class for that many runs.
func classFor(runs int) int {
	for c, m := range maxRuns {
		if runs <= m {
			return c
		}
	}
	return classArray
}

// slot is the memory of one leaf; see the package comment.
type slot []byte

func (p slot) key() uint64 {
	return uint64(binary.LittleEndian.Uint32(p))<<32 | uint64(binary.LittleEndian.Uint32(p[4:]))
}

func (p slot) setKey(k uint64) {
	binary.LittleEndian.PutUint32(p, uint32(k>>32))
	binary.LittleEndian.PutUint32(p[4:], uint32(k))
}
func (p slot) next() uint32        { return binary.LittleEndian.Uint32(p) } // of a free slot: the next free one
func (p slot) setNext(id uint32)   { binary.LittleEndian.PutUint32(p, id) }
func (p slot) version() uint32     { return binary.LittleEndian.Uint32(p[8:]) }
func (p slot) setVersion(v uint32) { binary.LittleEndian.PutUint32(p[8:], v) }
func (p slot) count() int          { return int(binary.LittleEndian.Uint16(p[12:])) }
func (p slot) setCount(n int)      { binary.LittleEndian.PutUint16(p[12:], uint16(n)) }
func (p slot) class() int          { return int(p[15]) }
func (p slot) is(flag byte) bool   { return p[14]&flag != 0 }
func (p slot) set(flag byte)       { p[14] |= flag }
func (p slot) unset(flag byte)     { p[14] &^= flag }
func (p slot) body() []byte        { return p[slotHeader:] }

// runs appends the leaf's runs to dst.
func (p slot) runs(dst []run) []run {
	if p.class() == classArray {
		return arrayRuns(dst, p.body())
	}
	for i := range p.count() {
		dst = append(dst, getRun(p.body()[i*runBytes:]))
	}
	return dst
}

// store writes runs, which must fit the slot's class.
func (p slot) store(runs []run) {
	if p.class() == classArray {
		fillArray(p.body(), runs)
		return
	}
	for i, r := range runs {
		putRun(p.body()[i*runBytes:], r)
	}
	p.setCount(len(runs))
}

// read gives the refs of the blocks from off on.
func (p slot) read(off int, refs []Ref) {
	body := p.body()
	if p.class() == classArray {
		for i := range refs {
			refs[i] = getRef(body[(off+i)*refBytes:])
		}
		return
	}
	clear(refs)
	lo, hi := 0, p.count() // the first run that ends after off
	for lo < hi {
		mid := (lo + hi) / 2
		if r := getRun(body[mid*runBytes:]); int(r.end()) > off {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	for ; lo < p.count(); lo++ {
		r := getRun(body[lo*runBytes:])
		from, to := max(int(r.start), off), min(int(r.end()), off+len(refs))
		if from >= to {
			return
		}
		for i := from; i < to; i++ {
			refs[i-off] = r.ref + Ref(i-int(r.start))
		}
	}
}

// slab is memory for slots of one class.
type slab struct {
	mem   []byte
	class int
	live  int
	free  uint32 // first free slot in it
}

// shard holds the resident leaves whose keys hash to it.
type shard struct {
	mu    sync.Mutex
	s     *Store
	table []uint32 // slot id + 1, open addressing with linear probing; 0 is free
	slabs []slab
	hands [4]uint32 // clock hand of each class: a slot id
	steal int       // the next slab to look at when a class wants one of another

	loading map[uint64]*load
	change  uint32 // version of the latest change

	used, dirty             int
	bytes                   int64
	evicted                 [4]int
	hits, misses, evictions int64
	scratch, scratch2       []run
	wanted                  int // the slab to flush when alloc fails

	_ [64]byte
}

// load is a read of a leaf from Pebble that is under way.
type load struct {
	done  chan struct{}
	stale bool
}

func (sh *shard) init(s *Store) {
	sh.s = s
	sh.loading = map[uint64]*load{}
	sh.table = make([]uint32, 256)
	sh.scratch, sh.scratch2 = make([]run, 0, LeafBlocks), make([]run, 0, LeafBlocks)
	sh.bytes = int64(len(sh.table))*4 + scratchBytes
	for c := range sh.hands {
		sh.hands[c] = none
	}
}

func (sh *shard) release() {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	for _, sl := range sh.slabs {
		sh.s.unmapSlab(sl.mem)
	}
	sh.slabs, sh.table, sh.used, sh.dirty, sh.bytes = nil, nil, 0, 0, 0
}

// limit is the shard's part of the budget. The bits of volumes may take up to half of it.
func (sh *shard) limit() int64 {
	b := sh.s.budget
	return (b - min(sh.s.pageBytes.Load(), b/2)) >> sh.s.shardBits
}

func hash(key uint64) uint64 {
	key ^= key >> 33
	key *= 0xff51afd7ed558ccd
	key ^= key >> 33
	key *= 0xc4ceb9fe1a85ec53
	return key ^ key>>33
}

func (s *Store) shard(key uint64) *shard {
	return &s.shards[hash(key)>>32&(1<<s.shardBits-1)]
}

func (sh *shard) slot(id uint32) slot {
	sl := &sh.slabs[id>>slotBits]
	n := slotBytes[sl.class]
	off := int(id&(1<<slotBits-1)) * n
	return slot(sl.mem[off : off+n : off+n])
}

// find gives the slot of a resident leaf.
func (sh *shard) find(key uint64) (uint32, bool) {
	if len(sh.table) == 0 {
		return none, false
	}
	mask := uint32(len(sh.table) - 1)
	for i := uint32(hash(key)) & mask; ; i = (i + 1) & mask {
		v := sh.table[i]
		if v == 0 {
			return none, false
		}
		if sh.slot(v-1).key() == key {
			return v - 1, true
		}
	}
}

// insert enters a slot whose key is set and not in the table.
func (sh *shard) insert(id uint32) {
	if (sh.used+1)*4 > len(sh.table)*3 {
		sh.grow()
	}
	sh.place(id)
	sh.used++
}

func (sh *shard) place(id uint32) {
	mask := uint32(len(sh.table) - 1)
	i := uint32(hash(sh.slot(id).key())) & mask
	for sh.table[i] != 0 {
		i = (i + 1) & mask
	}
	sh.table[i] = id + 1
}

func (sh *shard) grow() {
	old := sh.table
	sh.table = make([]uint32, 2*len(old))
	sh.bytes += int64(len(old)) * 4
	for _, v := range old {
		if v != 0 {
			sh.place(v - 1)
		}
	}
}

// remove takes a leaf out of the table and frees its slot.
func (sh *shard) remove(id uint32) {
	mask := uint32(len(sh.table) - 1)
	i := uint32(hash(sh.slot(id).key())) & mask
	for sh.table[i] != id+1 {
		i = (i + 1) & mask
	}
	for j := (i + 1) & mask; sh.table[j] != 0; j = (j + 1) & mask { // close the gap
		home := uint32(hash(sh.slot(sh.table[j]-1).key())) & mask
		if (j-home)&mask >= (j-i)&mask {
			sh.table[i] = sh.table[j]
			i = j
		}
	}
	sh.table[i] = 0
	sh.used--
	sh.freeSlot(id)
}

func (sh *shard) freeSlot(id uint32) {
	p := sh.slot(id)
	if p.is(flagDirty) {
		sh.dirty--
	}
	sl := &sh.slabs[id>>slotBits]
	p[14] = 0
	p.setNext(sl.free)
	sl.free = id
	sl.live--
}

func (sh *shard) markDirty(p slot) {
	sh.change++
	p.setVersion(sh.change)
	if !p.is(flagDirty) {
		p.set(flagDirty)
		sh.dirty++
	}
}

func (sh *shard) markClean(p slot) {
	if p.is(flagDirty) {
		p.unset(flagDirty)
		sh.dirty--
	}
}

// alloc gives an unused slot of the class, evicting clean leaves if it must, but never keep, a leaf of another class that is to
// move there, or none. If it cannot without
// writing it gives false; the caller unlocks, calls flushWanted, and begins again.
func (sh *shard) alloc(class int, keep uint32) (uint32, bool) {
	if sh.bytes > sh.limit() && !sh.retire(keep) {
		return none, false
	}
	if id, ok := sh.pop(class); ok {
		return id, true
	}
	if sh.bytes+int64(sh.s.slabBytes) <= sh.limit() {
		i := sh.freeSlabIndex()
		sh.slabs[i].mem = sh.s.mapSlab()
		sh.bytes += int64(sh.s.slabBytes)
		sh.assign(i, class)
		return sh.pop(class)
	}
	return sh.evictFor(class, keep)
}

func (sh *shard) freeSlabIndex() int {
	for i := range sh.slabs {
		if sh.slabs[i].mem == nil {
			return i
		}
	}
	sh.slabs = append(sh.slabs, slab{})
	return len(sh.slabs) - 1
}

// assign gives an empty slab to a class.
func (sh *shard) assign(i, class int) {
	sl := &sh.slabs[i]
	sl.class, sl.live, sl.free = class, 0, none
	for n := sh.s.slabBytes / slotBytes[class]; n > 0; n-- {
		id := uint32(i)<<slotBits | uint32(n-1)
		p := sh.slot(id)
		clear(p[:slotHeader])
		p[15] = byte(class)
		p.setNext(sl.free)
		sl.free = id
	}
}

func (sh *shard) pop(class int) (uint32, bool) {
	for i := range sh.slabs {
		sl := &sh.slabs[i]
		if sl.mem == nil || sl.class != class || sl.free == none {
			continue
		}
		id := sl.free
		p := sh.slot(id)
		sl.free = p.next()
		sl.live++
		clear(p[:slotHeader])
		p[14], p[15] = flagUsed|flagRef, byte(class)
		return id, true
	}
	return none, false
}

// evictFor makes room by eviction. A class that has evicted a slab's worth of leaves since it last grew takes over a slab
// of another class that nobody looks at, so that slabs follow the work.
func (sh *shard) evictFor(class int, keep uint32) (uint32, bool) {
	perSlab := sh.s.slabBytes / slotBytes[class]
	own := 0
	for i := range sh.slabs {
		if sh.slabs[i].mem != nil && sh.slabs[i].class == class {
			own++
		}
	}
	if own == 0 || sh.evicted[class] >= perSlab {
		sh.evicted[class] = 0
		if i, ok := sh.takeSlab(class, keep, own == 0); ok {
			sh.assign(i, class)
			return sh.pop(class)
		} else if own == 0 {
			return none, false
		}
	}
	return sh.clock(class, own*perSlab) // keep is of another class
}

// clock evicts one clean leaf of the class that was not looked at since the hand last passed. slots is the class's size.
func (sh *shard) clock(class int, slots int) (uint32, bool) {
	dirty := none
	for steps := 0; steps < 2*slots; steps++ {
		if steps >= 256 && dirty != none {
			break
		}
		id := sh.advance(class)
		p := sh.slot(id)
		switch {
		case !p.is(flagUsed):
		case p.is(flagRef):
			p.unset(flagRef)
		case p.is(flagDirty):
			if dirty == none {
				dirty = id
			}
		default:
			sh.evictions++
			sh.evicted[class]++
			sh.remove(id)
			return sh.pop(class)
		}
	}
	if dirty == none { // all dirty and in use: any slab of the class
		dirty = sh.advance(class)
	}
	sh.wanted = int(dirty >> slotBits)
	return none, false
}

// advance moves the class's hand to the next slot.
func (sh *shard) advance(class int) uint32 {
	perSlab := uint32(sh.s.slabBytes / slotBytes[class])
	h := sh.hands[class]
	i, n := h>>slotBits, h&(1<<slotBits-1)+1
	if h == none || int(i) >= len(sh.slabs) || sh.slabs[i].mem == nil || sh.slabs[i].class != class || n >= perSlab {
		if h == none || int(i) >= len(sh.slabs) {
			i = uint32(len(sh.slabs) - 1)
		}
		n = 0
		for range sh.slabs {
			i = (i + 1) % uint32(len(sh.slabs))
			if sh.slabs[i].mem != nil && sh.slabs[i].class == class {
				break
			}
		}
	}
	sh.hands[class] = i<<slotBits | n
	return sh.hands[class]
}

// takeSlab empties a slab of another class: one that is hardly looked at, or, if it must, any.
func (sh *shard) takeSlab(class int, keep uint32, must bool) (int, bool) {
	best, bestRefs := -1, 0
	for range sh.slabs {
		sh.steal = (sh.steal + 1) % len(sh.slabs)
		sl := &sh.slabs[sh.steal]
		if sl.mem == nil || sl.class == class || (keep != none && int(keep>>slotBits) == sh.steal) {
			continue
		}
		refs := 0
		sh.each(sh.steal, func(_ uint32, p slot) {
			if p.is(flagRef) {
				refs++
				p.unset(flagRef)
			}
		})
		if refs*8 <= sh.s.slabBytes/slotBytes[sl.class] {
			best = sh.steal
			break
		}
		if best < 0 || refs < bestRefs {
			best, bestRefs = sh.steal, refs
		}
		if !must {
			return 0, false // one look at a time; its bits are clear now
		}
	}
	return best, best >= 0 && sh.empty(best)
}

// retire gives memory back until the shard is within its limit.
func (sh *shard) retire(keep uint32) bool {
	for sh.bytes > sh.limit() {
		victim := -1
		for range sh.slabs {
			sh.steal = (sh.steal + 1) % len(sh.slabs)
			if sh.slabs[sh.steal].mem != nil && (keep == none || int(keep>>slotBits) != sh.steal) {
				victim = sh.steal
				break
			}
		}
		if victim < 0 {
			return true // nothing to give
		}
		if !sh.empty(victim) {
			return false
		}
		sh.s.unmapSlab(sh.slabs[victim].mem)
		sh.slabs[victim] = slab{}
		sh.bytes -= int64(sh.s.slabBytes)
	}
	return true
}

// empty evicts all leaves of a slab, unless one is dirty.
func (sh *shard) empty(i int) bool {
	dirty := false
	sh.each(i, func(_ uint32, p slot) { dirty = dirty || p.is(flagDirty) })
	if dirty {
		sh.wanted = i
		sh.steal = (i + len(sh.slabs) - 1) % len(sh.slabs) // the same again after the flush
		return false
	}
	sh.each(i, func(id uint32, _ slot) {
		sh.evictions++
		sh.remove(id)
	})
	return true
}

// each calls fn for the used slots of a slab.
func (sh *shard) each(i int, fn func(id uint32, p slot)) {
	if sh.slabs[i].mem == nil || sh.slabs[i].live == 0 {
		return
	}
	for n := range sh.s.slabBytes / slotBytes[sh.slabs[i].class] {
		id := uint32(i)<<slotBits | uint32(n)
		if p := sh.slot(id); p.is(flagUsed) {
			fn(id, p)
		}
	}
}

// mapSlab gets memory for a slab. It panics when the system has none, as the Go runtime does.
func (s *Store) mapSlab() []byte {
	n := s.slabBytes
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		panic(fmt.Sprintf("map %d bytes of memory for the block map: %v", n, err))
	}
	s.mapped.Add(int64(n))
	return b
}

func (s *Store) unmapSlab(b []byte) {
	if b == nil {
		return
	}
	s.mapped.Add(-int64(len(b)))
	if err := unix.Munmap(b); err != nil {
		panic(fmt.Sprintf("unmap %d bytes of memory of the block map: %v", len(b), err))
	}
}
