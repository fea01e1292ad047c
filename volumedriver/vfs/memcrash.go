package vfs

import "maps"

// Crash gives what a power cut now leaves. survive is the probability that an unsynced block or name survives; 0 and 1 lose
// and keep them all. Files open on m go on changing m alone.
func (m *Mem) Crash(seed int64, survive float64) *Mem {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := &cloner{to: m.heirLocked(seed), seen: map[*inode]*inode{}, dice: dice{uint64(seed), survive}}
	c.names = m.survivingNamesLocked(c.dice)
	c.to.root = c.crashed(m.root)
	return c.to
}

// Kill gives what the end of the process leaves: all that was written, durable or not. Locks are free again.
func (m *Mem) Kill() *Mem {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := &cloner{to: m.heirLocked(int64(m.seed)), seen: map[*inode]*inode{}}
	c.to.root = c.killed(m.root)
	for _, op := range m.pending {
		changes := make([]nameChange, len(op.changes))
		for i, ch := range op.changes {
			changes[i] = nameChange{c.killed(ch.dir), ch.name, c.killed(ch.to)}
		}
		c.to.pending = append(c.to.pending, nameOp{op.id, changes, c.killed(op.rmdir)})
	}
	return c.to
}

// heirLocked gives an empty Mem for a clone, and takes from m the right to change in place what both will share.
func (m *Mem) heirLocked(seed int64) *Mem {
	m.owner = new(owner)
	return &Mem{seed: uint64(seed), owner: new(owner), locks: map[string]bool{}, lastID: m.lastID, clock: m.clock,
		capacity: m.capacity}
}

// survivingNamesLocked gives the names of the directories that have pending changes, as the power cut leaves them.
func (m *Mem) survivingNamesLocked(d dice) map[*inode]map[string]*inode {
	if len(m.pending) == 0 {
		return nil
	}
	views := map[*inode]map[string]*inode{}
	journaled := d.roll(m.pending[0].id, 0, saltOrder)%2 == 0
	kept := len(m.pending)
	if journaled && d.survive < 1 {
		// The longer prefixes are the likelier the more survives.
		for kept = 0; kept < len(m.pending) && d.survives(m.pending[kept].id, 0, saltName); {
			kept++
		}
		if d.survive > 0 && d.roll(m.pending[0].id, 1, saltOrder)%2 == 0 {
			kept = int(d.roll(m.pending[0].id, 2, saltOrder) % uint64(len(m.pending)+1))
		}
	}
	unmade, uneven := map[*inode]bool{}, map[*inode]bool{} // directories not made; those in which something did not survive
	for i, op := range m.pending {
		survives := i < kept
		if !journaled {
			// Also without a journal nothing goes into a directory that was not made, and none is removed that is not empty.
			survives = d.survives(op.id, 0, saltName) && !uneven[op.rmdir]
			for _, ch := range op.changes {
				survives = survives && !unmade[ch.dir]
			}
		}
		for _, ch := range op.changes {
			if !survives {
				uneven[ch.dir] = true
			}
			if ch.to != nil && ch.to.isDir() {
				unmade[ch.to] = !survives && (len(op.changes) == 1 || unmade[ch.to])
			}
			view := views[ch.dir]
			if view == nil {
				view = maps.Clone(ch.dir.durable)
				views[ch.dir] = view
			}
			if survives {
				ch.apply(view)
			}
		}
	}
	return views
}

// cloner copies inodes, each once however many names it has.
type cloner struct {
	to    *Mem
	seen  map[*inode]*inode
	names map[*inode]map[string]*inode // of directories with pending changes
	dice  dice
}

// begin copies what all inodes have; done says that n was copied before.
func (c *cloner) begin(n *inode) (k *inode, done bool) {
	if k := c.seen[n]; k != nil {
		return k, true
	}
	k = &inode{id: n.id, perm: n.perm, mtime: n.mtime}
	c.seen[n] = k
	return k, false
}

func (c *cloner) crashed(n *inode) *inode {
	k, done := c.begin(n)
	if done {
		return k
	}
	if !n.isDir() {
		k.file = n.file.crashed(n.id, c.dice, c.to.owner)
		c.to.used += k.charged
		return k
	}
	names, changed := c.names[n]
	if !changed {
		names = n.names
	}
	k.names = make(map[string]*inode, len(names))
	for name, below := range names {
		b := c.crashed(below)
		b.links++
		k.names[name] = b
	}
	return k
}

func (c *cloner) killed(n *inode) *inode {
	if n == nil {
		return nil
	}
	k, done := c.begin(n)
	if done {
		return k
	}
	if !n.isDir() {
		k.file = n.file.clone()
		k.links = n.links
		if k.links > 0 {
			c.to.used += k.charged
		} else {
			k.charged = 0
		}
		return k
	}
	k.links = n.links
	k.names = c.killedNames(n.names)
	k.durable = c.killedNames(n.durable)
	return k
}

func (c *cloner) killedNames(names map[string]*inode) map[string]*inode {
	if names == nil {
		return nil
	}
	k := make(map[string]*inode, len(names))
	for name, below := range names {
		k[name] = c.killed(below)
	}
	return k
}

// crashed gives the file as the power cut leaves it, all of it durable.
//
// A truncation comes first: did it survive? If not, the blocks from the cut on are all as they were synced, with the synced
// size. If it did, they are new or holes, never old.
func (f *file) crashed(id int64, d dice, o *owner) *file {
	if len(f.dirty) == 0 && len(f.lost) == 0 && f.cut < 0 && f.size == f.durableSize {
		c := *f
		c.chunks = append([]*chunk(nil), f.chunks...)
		c.dirty, c.lost = nil, nil
		return &c
	}
	c := &file{chunks: append([]*chunk(nil), f.chunks...), cut: -1, reserved: f.reserved, charged: f.charged}
	cutSurvives := f.cut >= 0 && d.survives(id, 0, saltCut)
	for b, u := range f.dirty {
		p := f.page(b)
		switch beyond := f.cut >= 0 && (b+1)*memBlock > f.cut; {
		case beyond && !cutSurvives:
			p = u.old
		case beyond:
			old := u.old
			if b*memBlock >= f.cut {
				old = nil
			} else if old != nil {
				zeroed := &page{owner: o, b: old.b}
				clear(zeroed.b[f.cut-b*memBlock:])
				old = zeroed
			}
			p = d.block(id, b, p, unsynced{old: old}, o)
		default:
			p = d.block(id, b, p, u, o)
		}
		c.setPage(o, b, p)
	}
	for b, p := range f.lost {
		c.setPage(o, b, p)
	}
	c.size = f.crashedSize(id, d, cutSurvives)
	c.durableSize = c.size
	c.trim(o)
	return c
}

func (f *file) crashedSize(id int64, d dice, cutSurvives bool) int64 {
	from := f.durableSize
	if f.cut >= 0 {
		if !cutSurvives {
			return from
		}
		from = min(from, f.cut)
	}
	switch {
	case d.survives(id, 0, saltSize):
		return f.size
	case f.size > from && d.survive > 0 && d.roll(id, 1, saltSize)%2 == 0:
		return from + int64(d.roll(id, 2, saltSize)%uint64(f.size-from))
	}
	return from
}

// trim zeroes what lies beyond the size.
func (f *file) trim(o *owner) {
	b, tail := f.size/memBlock, f.size%memBlock
	if p := f.page(b); tail != 0 && p != nil {
		for _, v := range p.b[tail:] {
			if v != 0 {
				zeroed := &page{owner: o, b: p.b}
				clear(zeroed.b[tail:])
				f.setPage(o, b, zeroed)
				break
			}
		}
	}
	if tail != 0 {
		b++
	}
	f.dropBeyond(o, b, nil)
}

// dice takes every random decision of a crash from its seed and from what is decided about, so that the order of asking
// does not matter.
type dice struct {
	seed    uint64
	survive float64
}

const (
	saltName = iota + 1
	saltOrder
	saltCut
	saltSize
	saltBlock
	saltSector
)

func (d dice) roll(id, which int64, salt uint64) uint64 {
	return mix(d.seed+salt*0x9e3779b97f4a7c15, uint64(id), uint64(which))
}

func (d dice) survives(id, which int64, salt uint64) bool {
	return float64(d.roll(id, which, salt)>>11)/(1<<53) < d.survive
}

// block decides what the disk holds of a block with newest bytes cur.
func (d dice) block(id, b int64, cur *page, u unsynced, o *owner) *page {
	if d.survive <= 0 {
		return u.old
	}
	if d.survive >= 1 {
		return cur
	}
	r := d.roll(id, b, saltBlock+100)
	if u.mid != nil && r&3 == 0 {
		u.old = u.mid
	}
	if r>>2&3 == 0 {
		return d.torn(id, b, cur, u.old, o)
	}
	if d.survives(id, b, saltBlock) {
		return cur
	}
	return u.old
}

// torn mixes sectors of two versions.
func (d dice) torn(id, b int64, cur, old *page, o *owner) *page {
	t := &page{owner: o}
	if old != nil {
		t.b = old.b
	}
	for s := range int64(memBlock / memSector) {
		if !d.survives(id, b*(memBlock/memSector)+s, saltSector) {
			continue
		}
		sector := t.b[s*memSector:][:memSector]
		if cur == nil {
			clear(sector)
		} else {
			copy(sector, cur.b[s*memSector:])
		}
	}
	return t
}

// mix hashes three words (splitmix64's finalizer after each).
func mix(a, b, c uint64) uint64 {
	h := uint64(0)
	for _, v := range [3]uint64{a, b, c} {
		h += v + 0x9e3779b97f4a7c15
		h = (h ^ h>>30) * 0xbf58476d1ce4e5b9
		h = (h ^ h>>27) * 0x94d049bb133111eb
		h ^= h >> 31
	}
	return h
}
