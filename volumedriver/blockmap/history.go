package blockmap

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/cockroachdb/pebble/v2"
)

// image reads generations as Pebble has them at one moment.
type image struct {
	leaves, pages *pebble.Iterator
}

func (s *Store) newImage() (*image, error) {
	snapshot := s.db.NewSnapshot()
	leaves, err := snapshot.NewIter(nil)
	if err != nil {
		return nil, errors.Join(err, snapshot.Close())
	}
	pages, err := snapshot.NewIter(nil)
	if err != nil {
		return nil, errors.Join(err, leaves.Close(), snapshot.Close())
	}
	if err := snapshot.Close(); err != nil { // the iterators keep what they need
		return nil, errors.Join(err, leaves.Close(), pages.Close())
	}
	return &image{leaves, pages}, nil
}

func (m *image) close() error { return errors.Join(m.leaves.Close(), m.pages.Close()) }

// past reads one generation.
type past struct {
	*image
	lineage []At
	page    uint32 // whose bits present has, if known
	known   bool
	present leafSet
}

// bits gives the leaves of a page that exist.
func (p *past) bits(page uint32) (*leafSet, error) {
	if p.known && p.page == page {
		return &p.present, nil
	}
	p.page, p.known, p.present = page, true, leafSet{}
	for _, at := range p.lineage {
		k := pageKey(at.Handle, page, at.Gen)
		p.pages.SetBounds(k, numberKey('b', at.Handle, page+1))
		if !p.pages.First() {
			if err := p.pages.Error(); err != nil {
				return nil, err
			}
			continue
		}
		value, err := p.pages.ValueAndErr()
		if err == nil {
			p.present, _, err = decodePage(p.pages.Key(), value)
		}
		return &p.present, err
	}
	return &p.present, nil
}

// refs gives a leaf's content.
func (p *past) refs(leaf uint64, refs *[LeafBlocks]Ref) error {
	clear(refs[:])
	present, err := p.bits(uint32(leaf / pageLeaves))
	if err != nil || !present.has(leaf) {
		return err
	}
	for _, at := range p.lineage {
		if value, err := newestLeaf(p.leaves, at, leaf); value != nil || err != nil {
			if err != nil {
				return err
			}
			return decodeRefs(refs, p.leaves.Key(), value)
		}
	}
	return nil
}

// changes has, by number of page, leaves that may differ.
type changes map[uint32]*leafSet

func (c changes) add(page uint32, set *leafSet) {
	if *set == (leafSet{}) {
		return
	}
	if c[page] == nil {
		c[page] = &leafSet{}
	}
	c[page].add(set)
}

func (c changes) each(fn func(leaf uint64) error) error {
	for _, page := range slices.Sorted(maps.Keys(c)) {
		if err := c[page].each(page, fn); err != nil {
			return err
		}
	}
	return nil
}

// and leaves only what is in both.
func (c changes) and(other changes) {
	for page, set := range c {
		o := other[page]
		if o == nil {
			delete(c, page)
			continue
		}
		for i := range set {
			set[i] &= o[i]
		}
	}
}

// addChanged adds the leaves that h changed in its generations (from,to].
func (c changes) addChanged(m *image, h Handle, from, to uint32) error {
	it := m.pages
	it.SetBounds(numberKey('b', h, 0), numberKey('b', h+1, 0))
	for ok := it.First(); ok; {
		_, n, gen, valid := splitKey(it.Key())
		switch {
		case !valid:
			return fmt.Errorf("page key %x: %w", it.Key(), ErrCorrupt)
		case gen > to:
			ok = it.SeekGE(pageKey(h, n, to))
		case gen <= from:
			ok = it.SeekGE(numberKey('b', h, n+1))
		default:
			value, err := it.ValueAndErr()
			if err != nil {
				return err
			}
			_, changed, err := decodePage(it.Key(), value)
			if err != nil {
				return err
			}
			c.add(n, &changed)
			ok = it.Next()
		}
	}
	return it.Error()
}

// addPresent adds the leaves that exist.
func (c changes) addPresent(p *past) error {
	seen := map[uint32]bool{}
	for _, at := range p.lineage {
		err := eachPage(p.pages, at, func(n, _ uint32, value []byte) error {
			if seen[n] {
				return nil
			}
			seen[n] = true
			present, _, err := decodePage(p.pages.Key(), value)
			if err == nil {
				c.add(n, &present)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// addDifference adds the leaves that may differ between two generations: what the handles changed on the way from the one to
// the other over the nearest generation that both descend from; if there is none, all that either has.
func (c changes) addDifference(a, b *past) error {
	for i, x := range a.lineage {
		for j, y := range b.lineage {
			if x.Handle != y.Handle {
				continue
			}
			err := c.addChanged(a.image, x.Handle, min(x.Gen, y.Gen), max(x.Gen, y.Gen))
			for _, at := range append(slices.Clone(a.lineage[:i]), b.lineage[:j]...) {
				err = errors.Join(err, c.addChanged(a.image, at.Handle, 0, at.Gen))
			}
			return err
		}
	}
	return errors.Join(c.addPresent(a), c.addPresent(b))
}

// nothing is a generation without any block.
func (m *image) nothing() *past { return &past{image: m} }

// at gives generations to read, as of one moment; heads are flushed first. An At with generation 0 is the parent's that the
// handle was forked from, or nothing.
func (s *Store) at(ats ...At) (out []*past, m *image, err error) {
	handles := make([]Handle, len(ats))
	for i, at := range ats {
		handles[i] = at.Handle
	}
	slices.Sort(handles) // the order in which to lock
	volumes := map[Handle]*volume{}
	defer func() {
		for _, v := range volumes {
			v.mu.Unlock()
		}
	}()
	for _, h := range slices.Compact(handles) {
		v, err := s.recorded(h)
		if err != nil {
			return nil, nil, err
		}
		volumes[h] = v
	}
	for _, at := range ats {
		v := volumes[at.Handle]
		if at.Gen > v.record.gen || v.view || v.record.headless && at.Gen == v.record.gen {
			return nil, nil, fmt.Errorf("generation %d of volume %d: %w", at.Gen, at.Handle, ErrGeneration)
		}
		if at.Gen == v.record.gen {
			if err := s.loadLocked(v); err != nil {
				return nil, nil, err
			}
			if err := s.flushLocked(v); err != nil {
				return nil, nil, err
			}
		}
	}
	if m, err = s.newImage(); err != nil {
		return nil, nil, err
	}
	for _, at := range ats {
		lineage := volumes[at.Handle].ancestors
		if at.Gen > 0 {
			lineage = append([]At{at}, lineage...)
		}
		out = append(out, &past{image: m, lineage: lineage})
	}
	return out, m, nil
}

// Changed calls fn, ascending, for the leaves that may differ between two generations of a handle, from < to; to may be the
// current one. From 0 is what the handle was forked from; without a parent, nothing. The cost is that of the leaves changed, and
// of a look at each 8 GiB in use.
func (s *Store) Changed(h Handle, from, to uint32, fn func(leaf uint64) error) (err error) {
	if from >= to {
		return fmt.Errorf("changed from generation %d to %d of volume %d: %w", from, to, h, ErrGeneration)
	}
	ats, m, err := s.at(At{h, to}, At{h, from})
	if err != nil {
		return fmt.Errorf("changed from generation %d to %d of volume %d: %w", from, to, h, err)
	}
	c := changes{}
	err = errors.Join(c.addDifference(ats[0], ats[1]), m.close())
	if err != nil {
		return fmt.Errorf("changed from generation %d to %d of volume %d: %w", from, to, h, err)
	}
	return c.each(fn)
}

// Diff calls fn, ascending, for the runs of blocks in [lba,end) that differ between two generations. old is that of the first
// block in a, new in b; each is 0 for holes, else those that follow ascend by one. Where both descend from one handle the cost
// is that of the leaves changed between them, else of all.
func (s *Store) Diff(a, b At, lba, end uint64, fn func(lba, n uint64, old, new Ref) error) (err error) {
	ats, m, err := s.at(a, b)
	if err != nil {
		return fmt.Errorf("compare volume %d generation %d with volume %d generation %d: %w", a.Handle, a.Gen, b.Handle, b.Gen, err)
	}
	defer func() { err = errors.Join(err, m.close()) }()
	c := changes{}
	if err := c.addDifference(ats[0], ats[1]); err != nil {
		return fmt.Errorf("compare volume %d generation %d with volume %d generation %d: %w", a.Handle, a.Gen, b.Handle, b.Gen, err)
	}
	var old, new [LeafBlocks]Ref
	var d difference
	err = c.each(func(leaf uint64) error {
		first, last := max(leaf*LeafBlocks, lba), min((leaf+1)*LeafBlocks, end)
		if first >= last {
			return nil
		}
		if err := errors.Join(ats[0].refs(leaf, &old), ats[1].refs(leaf, &new)); err != nil {
			return fmt.Errorf("compare leaf %d of volumes %d and %d: %w", leaf, a.Handle, b.Handle, err)
		}
		for at := first; at < last; at++ {
			i := at - leaf*LeafBlocks
			if err := d.add(at, old[i], new[i], fn); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return d.end(fn)
}

// difference joins blocks to runs.
type difference struct {
	lba, n   uint64
	old, new Ref
}

func (d *difference) add(lba uint64, old, new Ref, fn func(lba, n uint64, old, new Ref) error) error {
	if d.n > 0 && lba == d.lba+d.n && follows(d.old, d.n, old) && follows(d.new, d.n, new) && old != new {
		d.n++
		return nil
	}
	if err := d.end(fn); err != nil {
		return err
	}
	if old != new {
		*d = difference{lba, 1, old, new}
	}
	return nil
}

func (d *difference) end(fn func(lba, n uint64, old, new Ref) error) error {
	if d.n == 0 {
		return nil
	}
	n := d.n
	d.n = 0
	return fn(d.lba, n, d.old, d.new)
}

// follows tells whether ref is what a run of n blocks from first on continues with.
func follows(first Ref, n uint64, ref Ref) bool {
	if first == 0 || ref == 0 {
		return first == ref
	}
	return ref == first+Ref(n) && ref.Ordinal() == first.Ordinal()
}

// Unique counts the blocks of a generation whose refs neither of its neighbours has at the same place: what would be free
// without it. prev 0 stands for what the handle was forked from, or nothing; next 0 for nothing. next may be the current one.
func (s *Store) Unique(h Handle, gen, prev, next uint32) (blocks int64, err error) {
	fail := func(err error) (int64, error) {
		return 0, fmt.Errorf("blocks of volume %d that only generation %d has: %w", h, gen, err)
	}
	if prev >= gen || next != 0 && next <= gen {
		return fail(ErrGeneration)
	}
	neighbours := []At{{h, gen}, {h, prev}}
	if next != 0 {
		neighbours = append(neighbours, At{h, next})
	}
	ats, m, err := s.at(neighbours...)
	if err != nil {
		return fail(err)
	}
	defer func() { err = errors.Join(err, m.close()) }()
	if next == 0 {
		ats = append(ats, m.nothing())
	}
	before, after := changes{}, changes{}
	if err := errors.Join(before.addDifference(ats[1], ats[0]), after.addDifference(ats[0], ats[2])); err != nil {
		return fail(err)
	}
	before.and(after) // what one neighbour has as it is, is not unique
	var refs [3][LeafBlocks]Ref
	err = before.each(func(leaf uint64) error {
		for i, p := range ats {
			if err := p.refs(leaf, &refs[i]); err != nil {
				return err
			}
		}
		for i, ref := range refs[0] {
			if ref != 0 && ref != refs[1][i] && ref != refs[2][i] {
				blocks++
			}
		}
		return nil
	})
	if err != nil {
		return fail(err)
	}
	return blocks, nil
}

// Version is what a leaf held from generation Gen on. Refs is valid during the call that gives it.
type Version struct {
	Gen  uint32
	Refs *[LeafBlocks]Ref
}

const versionsAtOnce = 64

// EachVersion calls fn for the versions of each leaf that the handle itself has (not its ancestors), and that one of the live
// generations, or the head, sees: leaves ascending, versions of a leaf newest first, at most 64 in a call; a leaf that has more
// comes again. It is an image of one moment. Other generations must have been released or be about to be.
func (s *Store) EachVersion(ctx context.Context, h Handle, live []uint32,
	fn func(leaf uint64, versions []Version) error) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("versions of volume %d: %w", h, err)
		}
	}()
	v, err := s.recorded(h)
	if err != nil {
		return err
	}
	live = slices.Clone(live)
	if !v.view && !v.record.headless {
		live = append(live, v.record.gen)
		if err = s.loadLocked(v); err == nil {
			err = s.flushLocked(v)
		}
	}
	var m *image
	if err == nil {
		m, err = s.newImage()
	}
	v.mu.Unlock()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.close()) }()
	slices.Sort(live)
	w := versionWalk{past: past{image: m}, h: h, live: live, fn: fn, bits: map[uint32]*leafSet{}}
	return w.run(ctx)
}

type versionWalk struct {
	past
	h    Handle
	live []uint32
	fn   func(leaf uint64, versions []Version) error

	page     uint32
	bits     map[uint32]*leafSet // of page, by generation
	leaf     uint64
	newer    uint32 // generation of the version of leaf that came before, 0: none
	refs     [versionsAtOnce][LeafBlocks]Ref
	versions []Version
}

func (w *versionWalk) run(ctx context.Context) error {
	it := w.leaves
	it.SetBounds(numberKey('l', w.h, 0), numberKey('l', w.h+1, 0))
	n := 0
	for ok := it.First(); ok; ok = it.Next() {
		if n++; n%1024 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		_, number, gen, valid := splitKey(it.Key())
		if !valid || number >= maxLeaves {
			return fmt.Errorf("leaf key %x: %w", it.Key(), ErrCorrupt)
		}
		if leaf := uint64(number); leaf != w.leaf || len(w.versions) == versionsAtOnce {
			if err := w.give(); err != nil {
				return err
			}
			if leaf != w.leaf {
				w.leaf, w.newer = leaf, 0
			}
		}
		seen, err := w.seen(gen)
		if err != nil {
			return err
		}
		w.newer = gen
		if !seen {
			continue
		}
		value, err := it.ValueAndErr()
		if err != nil {
			return err
		}
		refs := &w.refs[len(w.versions)]
		if err := decodeRefs(refs, it.Key(), value); err != nil {
			return fmt.Errorf("leaf %d at generation %d: %w", w.leaf, gen, err)
		}
		w.versions = append(w.versions, Version{gen, refs})
	}
	return errors.Join(it.Error(), w.give())
}

func (w *versionWalk) give() error {
	if len(w.versions) == 0 {
		return nil
	}
	err := w.fn(w.leaf, w.versions)
	w.versions = w.versions[:0]
	return err
}

// seen tells whether a live generation sees the version gen of the current leaf. The first one from gen on decides: once the
// leaf is cleared, only a newer version can bring it back.
func (w *versionWalk) seen(gen uint32) (bool, error) {
	i, _ := slices.BinarySearch(w.live, gen)
	if i == len(w.live) || w.newer != 0 && w.live[i] >= w.newer {
		return false, nil
	}
	page := uint32(w.leaf / pageLeaves)
	if page != w.page {
		w.page = page
		clear(w.bits)
	}
	at := w.live[i]
	if w.bits[at] == nil {
		p := past{image: w.image, lineage: []At{{w.h, at}}}
		present, err := p.bits(page)
		if err != nil {
			return false, err
		}
		w.bits[at] = present
	}
	return w.bits[at].has(w.leaf), nil
}

// decodeRefs is decodeLeaf into an array.
func decodeRefs(refs *[LeafBlocks]Ref, key, b []byte) error {
	if len(b) == 4+arrayBytes+4 && b[0] == leafVersion && b[1] == formArray &&
		valueCRC(key, b[:len(b)-4]) == binary.LittleEndian.Uint32(b[len(b)-4:]) {
		for i := range refs {
			refs[i] = getRef(b[4+i*refBytes:])
			if refs[i] != 0 && !validRef(refs[i], 1) {
				return fmt.Errorf("block %d of a leaf: %w", i, ErrCorrupt)
			}
		}
		return nil
	}
	runs, err := decodeLeaf(nil, key, b)
	if err != nil {
		return err
	}
	clear(refs[:])
	for _, r := range runs {
		for i := range r.blocks {
			refs[r.start+i] = r.ref + Ref(i)
		}
	}
	return nil
}
