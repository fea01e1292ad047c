package cache

import "sync/atomic"

const (
	none = ^uint32(0)

	freqMask  = 3       // of a state: how often the line was hit since it came or was last passed over, up to 3
	scanFlag  = 1 << 2  // came by a scan and was not hit otherwise
	queueMask = 3 << 3  // which queue holds it
	inSmall   = 1 << 3  //
	inMain    = 2 << 3  //
	promoteAt = 2       // hits that move a line from the small queue to the main one
	smallPart = 10      // the small queue gets one slot in ten
	ghostWays = 4       // entries in a bucket of a ghost
	slotsMax  = 1 << 30 // of one fifo
)

// fifo decides which lines stay, by S3-FIFO (Yang et al., SOSP 2023): a new line goes to a small queue; if it is hit there it
// moves on to the main queue, else it leaves early and a ghost remembers it, so that a line which comes back soon goes to the main queue
// at once. The main queue gives a line one more round for each hit, up to three. A hit changes one counter and no order, so hits
// need the owner's lock only shared.
//
// Memory for each slot: key 8, links 8, state 4, fingerprint 4, hash table 6 to 11, ghost 8 to 16 bytes. No pointers.
type fifo struct {
	keys       []uint64 // object id and line
	prints     []uint32 // what the ghost remembers the line by
	next, prev []uint32
	state      []uint32 // freqMask | scanFlag | queueMask; the first two change with the lock shared, atomically
	table      []uint32 // slot + 1, open addressing with linear probing; 0 is free
	mask       uint32
	free       uint32 // first free slot, linked by next
	small      queue
	main       queue
	smallMax   int
	ghost      ghost
}

// queue is a list of slots: new ones at the head.
type queue struct {
	head, tail uint32
	n          int
}

func newFIFO(slots int) fifo {
	f := fifo{keys: make([]uint64, slots), prints: make([]uint32, slots), next: make([]uint32, slots), prev: make([]uint32, slots),
		state: make([]uint32, slots), table: make([]uint32, powerOfTwo(slots*4/3+1)), free: none,
		small: queue{head: none, tail: none}, main: queue{head: none, tail: none}, smallMax: max(1, slots/smallPart), ghost: newGhost(slots)}
	f.mask = uint32(len(f.table) - 1)
	for i := slots - 1; i >= 0; i-- {
		f.next[i] = f.free
		f.free = uint32(i)
	}
	return f
}

func powerOfTwo(atLeast int) int {
	n := 1
	for n < atLeast {
		n *= 2
	}
	return n
}

func mix(key uint64) uint64 {
	key ^= key >> 33
	key *= 0xff51afd7ed558ccd
	key ^= key >> 33
	key *= 0xc4ceb9fe1a85ec53
	return key ^ key>>33
}

// find gives the slot of a line.
func (f *fifo) find(key uint64) (uint32, bool) {
	for i := uint32(mix(key)) & f.mask; ; i = (i + 1) & f.mask {
		v := f.table[i]
		if v == 0 {
			return none, false
		}
		if f.keys[v-1] == key {
			return v - 1, true
		}
	}
}

// touch counts a hit; it may be called with the lock shared. It gives how often the line was hit before.
func (f *fifo) touch(slot uint32) uint32 {
	p := &f.state[slot]
	for {
		s := atomic.LoadUint32(p)
		if s&freqMask == freqMask {
			return freqMask
		}
		if atomic.CompareAndSwapUint32(p, s, s&^uint32(scanFlag)+1) {
			return s & freqMask
		}
	}
}

// take gives a slot for a new line: a free one, or that of the line which leaves for it.
func (f *fifo) take() (slot uint32, victim uint64, evicted, ok bool) {
	if slot = f.free; slot != none {
		f.free = f.next[slot]
		return slot, 0, false, true
	}
	for f.small.n+f.main.n > 0 {
		if f.small.n >= f.smallMax || f.main.n == 0 {
			slot = f.small.tail
			s := f.state[slot]
			f.unlink(slot)
			if s&freqMask >= promoteAt {
				f.link(slot, inMain, 0)
				continue
			}
			if s&scanFlag == 0 {
				f.ghost.add(f.prints[slot])
			}
		} else {
			slot = f.main.tail
			s := f.state[slot]
			f.unlink(slot)
			if freq := s & freqMask; freq > 0 {
				f.link(slot, inMain, freq-1)
				continue
			}
		}
		victim = f.keys[slot]
		f.untable(slot)
		return slot, victim, true, true
	}
	return none, 0, false, false
}

// publish makes a slot that was taken the line's. A line that was here not long ago goes to the main queue.
func (f *fifo) publish(slot uint32, key uint64, print uint32, scan bool) {
	f.keys[slot], f.prints[slot] = key, print
	f.enter(slot)
	switch {
	case f.ghost.take(print):
		f.link(slot, inMain, 0)
	case scan:
		f.link(slot, inSmall, scanFlag)
	default:
		f.link(slot, inSmall, 0)
	}
}

// restore puts a line into a given slot, which must be free, at the head of a queue. The list of free slots is wrong until refree.
func (f *fifo) restore(slot uint32, key uint64, print, state uint32) {
	f.keys[slot], f.prints[slot] = key, print
	f.enter(slot)
	f.link(slot, state&queueMask, state&(freqMask|scanFlag))
}

// refree rebuilds the list of free slots after restores.
func (f *fifo) refree() {
	f.free = none
	for i := len(f.keys) - 1; i >= 0; i-- {
		if f.state[i] == 0 {
			f.next[i] = f.free
			f.free = uint32(i)
		}
	}
}

// limit gives up the slots from n on, in which there must be no line, and none that is taken.
func (f *fifo) limit(n int) {
	f.smallMax = max(1, n/smallPart)
	f.free = none
	for i := n - 1; i >= 0; i-- {
		if f.state[i] == 0 {
			f.next[i] = f.free
			f.free = uint32(i)
		}
	}
}

// remove takes a line out and frees its slot.
func (f *fifo) remove(slot uint32) {
	f.unlink(slot)
	f.untable(slot)
	f.giveBack(slot)
}

// giveBack frees a slot that was taken and not published.
func (f *fifo) giveBack(slot uint32) {
	f.next[slot] = f.free
	f.free = slot
}

func (f *fifo) len() int { return f.small.n + f.main.n }

func (f *fifo) queueOf(state uint32) *queue {
	if state&queueMask == inMain {
		return &f.main
	}
	return &f.small
}

func (f *fifo) link(slot, queue, bits uint32) {
	f.state[slot] = queue | bits
	q := f.queueOf(queue)
	f.prev[slot], f.next[slot] = none, q.head
	if q.head != none {
		f.prev[q.head] = slot
	} else {
		q.tail = slot
	}
	q.head = slot
	q.n++
}

func (f *fifo) unlink(slot uint32) {
	q := f.queueOf(f.state[slot])
	if p := f.prev[slot]; p != none {
		f.next[p] = f.next[slot]
	} else {
		q.head = f.next[slot]
	}
	if n := f.next[slot]; n != none {
		f.prev[n] = f.prev[slot]
	} else {
		q.tail = f.prev[slot]
	}
	q.n--
	f.state[slot] = 0
}

func (f *fifo) enter(slot uint32) {
	i := uint32(mix(f.keys[slot])) & f.mask
	for f.table[i] != 0 {
		i = (i + 1) & f.mask
	}
	f.table[i] = slot + 1
}

// untable takes the slot out of the hash table and moves back what probing would no longer find.
func (f *fifo) untable(slot uint32) {
	i := uint32(mix(f.keys[slot])) & f.mask
	for f.table[i] != slot+1 {
		i = (i + 1) & f.mask
	}
	for j := i; ; {
		j = (j + 1) & f.mask
		v := f.table[j]
		if v == 0 {
			break
		}
		home := uint32(mix(f.keys[v-1])) & f.mask
		if (j-home)&f.mask >= (j-i)&f.mask {
			f.table[i] = v
			i = j
		}
	}
	f.table[i] = 0
}

// ghost remembers what left lately: a hash table in which the oldest of a bucket gives way. It forgets, and seldom mistakes one
// line for another; both cost only a worse choice.
type ghost struct {
	entries []uint64 // fingerprint << 32 | number of the entry; 0 is free
	mask    uint32
	last    uint32
	reach   uint32
}

func newGhost(lines int) ghost {
	n := powerOfTwo(max(ghostWays, lines))
	return ghost{entries: make([]uint64, n), mask: uint32(n/ghostWays - 1), reach: uint32(max(1, lines*9/10))}
}

func (g *ghost) bucket(print uint32) []uint64 {
	i := (print & g.mask) * ghostWays
	return g.entries[i : i+ghostWays]
}

func (g *ghost) add(print uint32) {
	g.last++
	b := g.bucket(print)
	oldest := 0
	for i, e := range b {
		if e == 0 || uint32(e>>32) == print {
			oldest = i
			break
		}
		if g.last-uint32(e) > g.last-uint32(b[oldest]) {
			oldest = i
		}
	}
	b[oldest] = uint64(print)<<32 | uint64(g.last)
}

// take tells whether the line is remembered, and forgets it.
func (g *ghost) take(print uint32) bool {
	b := g.bucket(print)
	for i, e := range b {
		if e != 0 && uint32(e>>32) == print {
			b[i] = 0
			return g.last-uint32(e) < g.reach
		}
	}
	return false
}
