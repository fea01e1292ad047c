package blockmap

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"

	"pgregory.net/rapid"

	"varve/volumedriver/vfs"
)

// Worlds lie across the border of two pages.
const (
	worldLeaves = 36
	worldFirst  = pageLeaves - 25
	worldBlocks = worldLeaves * LeafBlocks
	worldBase   = worldFirst * LeafBlocks
)

// lineage is what a handle should hold, in each generation that can be read.
type lineage struct {
	gen      uint32
	head     []Ref // nil: given up
	frozen   map[uint32][]Ref
	base     []Ref // of a fork: what the parent held
	parent   At
	children map[uint32]int // forks and views, by generation
}

func (l *lineage) live() []uint32 { return slices.Sorted(maps.Keys(l.frozen)) }

func (l *lineage) at(gen uint32) []Ref {
	switch {
	case gen == 0 && l.base == nil:
		return make([]Ref, worldBlocks)
	case gen == 0:
		return l.base
	case gen == l.gen:
		return l.head
	}
	return l.frozen[gen]
}

// note is a release or a drop.
type note struct {
	h  Handle
	do func() error
}

// world is a store, and what should be in it.
type world struct {
	t interface {
		Helper()
		Fatal(...any)
		Fatalf(string, ...any)
	}
	r         *rand.Rand
	sparse    int // one in so many changes is of many single blocks of a leaf
	fs        *vfs.Mem
	s         *Store
	budget    int64
	vols      map[Handle]*lineage
	views     map[Handle]At
	ordinal   uint32
	since     []op   // changes that are not durable yet
	notes     []note // what the core repeats after a crash: releases and drops since the last checkpoint
	doing     string
	doneKey   []byte // what says, after a crash, that the operation happened: this key with this value
	doneValue string
	counts    map[string]int
}

func (w *world) open() {
	w.t.Helper()
	s, err := Open(Config{FS: w.fs, Dir: "/map", BudgetBytes: w.budget, memTableBytes: 128 << 10})
	ok(w.t, err)
	w.s, w.views = s, map[Handle]At{}
	for _, l := range w.vols {
		l.children = map[uint32]int{}
	}
	for _, l := range w.vols {
		if p := w.vols[l.parent.Handle]; p != nil {
			p.children[l.parent.Gen]++
		}
	}
}

func newWorld(t interface {
	Helper()
	Fatal(...any)
	Fatalf(string, ...any)
}, seed uint64, budget int64) *world {
	w := &world{t: t, r: rand.New(rand.NewPCG(seed, 3)), fs: vfs.NewMem(int64(seed)), budget: budget, vols: map[Handle]*lineage{},
		counts: map[string]int{}}
	w.sparse = 1 + w.r.IntN(6)
	w.open()
	for range 2 {
		h, err := w.s.NewHandle()
		ok(t, err)
		w.vols[h] = &lineage{gen: 1, head: make([]Ref, worldBlocks), frozen: map[uint32][]Ref{}, children: map[uint32]int{}}
	}
	w.checkpoint()
	return w
}

func (w *world) pick(fit func(h Handle, l *lineage) bool) (Handle, *lineage) {
	var fits []Handle
	for _, h := range slices.Sorted(maps.Keys(w.vols)) {
		if fit(h, w.vols[h]) {
			fits = append(fits, h)
		}
	}
	if len(fits) == 0 {
		return 0, nil
	}
	h := fits[w.r.IntN(len(fits))]
	return h, w.vols[h]
}

func (w *world) pickGen(gens []uint32) uint32 { return gens[w.r.IntN(len(gens))] }

// change sets or clears blocks of a head. Every set has an ordinal of its own, so that no two versions of a leaf are alike.
func (w *world) change() {
	h, l := w.pick(func(_ Handle, l *lineage) bool { return l.head != nil })
	o := randomOp(w.r, 1)
	o.h, o.lba = h, min(o.lba%worldBlocks, worldBlocks-min(o.n, worldBlocks))
	o.n = min(o.n, worldBlocks)
	if o.n >= LeafBlocks && w.r.IntN(2) == 0 { // whole leaves
		o.lba -= o.lba % LeafBlocks
		o.n -= o.n % LeafBlocks
	}
	if w.r.IntN(40) == 0 {
		o.lba, o.n, o.ref = 0, worldBlocks, 0
	}
	n := 1
	if w.r.IntN(w.sparse) == 0 {
		n = 150 // an array of a leaf
	}
	for range n {
		if n > 1 {
			o.n, o.lba = 1, o.lba/LeafBlocks*LeafBlocks+w.r.Uint64N(LeafBlocks)
		}
		if o.ref != 0 {
			w.ordinal++
			o.ref = MakeRef(w.ordinal, w.r.Uint32N(4097-uint32(o.n)))
		}
		w.apply(o, l)
	}
}

func (w *world) apply(o op, l *lineage) {
	w.t.Helper()
	w.since = append(w.since, o)
	model{o.h: l.head}.do(o)
	o.lba += worldBase
	ok(w.t, o.do(w.s))
}

func (w *world) checkpoint() {
	w.t.Helper()
	ok(w.t, w.s.Checkpoint(nil, nil))
	w.since, w.notes = nil, nil
}

func frozenKey(h Handle) []byte { return fmt.Appendf(nil, "frozen/%d", h) }

func (w *world) freeze() {
	h, l := w.pick(func(_ Handle, l *lineage) bool { return l.head != nil })
	w.doneKey, w.doneValue = frozenKey(h), fmt.Sprint(l.gen)
	gen, err := w.s.Freeze(h, []KV{{frozenKey(h), []byte(w.doneValue)}})
	ok(w.t, err)
	if gen != l.gen {
		w.t.Fatalf("froze generation %d, want %d", gen, l.gen)
	}
	w.frozen(h, l)
}

func (w *world) frozen(h Handle, l *lineage) {
	l.frozen[l.gen] = slices.Clone(l.head)
	l.gen++
	if w.r.IntN(2) == 0 { // what was before is durable and need not be done again, but may be
		w.since = slices.DeleteFunc(w.since, func(o op) bool { return o.h == h })
	}
}

func (w *world) fork() {
	parent, l := w.pick(func(_ Handle, l *lineage) bool { return len(l.frozen) > 0 })
	if l == nil || len(w.vols) > 6 {
		return
	}
	gen := w.pickGen(l.live())
	child, err := w.s.Fork(parent, gen, func(child Handle) []KV {
		w.doneKey, w.doneValue = fmt.Appendf(nil, "fork/%d", child), fmt.Sprint(parent, gen)
		return []KV{{w.doneKey, []byte(w.doneValue)}}
	})
	ok(w.t, err)
	w.forked(child, At{parent, gen})
}

func (w *world) forked(child Handle, at At) {
	l := w.vols[at.Handle]
	l.children[at.Gen]++
	w.vols[child] = &lineage{gen: 1, head: slices.Clone(l.frozen[at.Gen]), base: slices.Clone(l.frozen[at.Gen]), parent: at,
		frozen: map[uint32][]Ref{}, children: map[uint32]int{}}
}

func (w *world) view() {
	h, l := w.pick(func(_ Handle, l *lineage) bool { return len(l.frozen) > 0 })
	if l == nil || len(w.views) > 5 {
		return
	}
	at := At{h, w.pickGen(l.live())}
	v, err := w.s.OpenView(h, at.Gen)
	ok(w.t, err)
	w.views[v] = at
	l.children[at.Gen]++
}

func (w *world) closeView() {
	for v, at := range w.views {
		ok(w.t, w.s.DropVolume(v))
		delete(w.views, v)
		w.vols[at.Handle].children[at.Gen]--
		if err := w.s.Lookup(v, worldBase, make([]Ref, 1)); !errors.Is(err, ErrHandle) {
			w.t.Fatalf("view that was dropped: %v", err)
		}
		return
	}
}

func (w *world) release() {
	h, l := w.pick(func(_ Handle, l *lineage) bool { return len(l.frozen) > 0 })
	if l == nil {
		return
	}
	live := l.live()
	i := w.r.IntN(len(live))
	gen, prev, next := live[i], uint32(0), uint32(0)
	if i > 0 {
		prev = live[i-1]
	}
	if i+1 < len(live) {
		next = live[i+1]
	} else if l.head != nil {
		next = l.gen
	}
	if l.head == nil && len(live) == 1 && w.r.IntN(2) == 0 {
		w.drop(h)
		return
	}
	do := func() error { return w.s.Release(h, gen, prev, next) }
	err := do()
	if l.children[gen] > 0 {
		if !errors.Is(err, ErrInUse) {
			w.t.Fatalf("release of a generation with forks: %v", err)
		}
		return
	}
	ok(w.t, err)
	w.notes = append(w.notes, note{h, do})
	delete(l.frozen, gen)
}

func (w *world) heads() (n int) {
	for _, l := range w.vols {
		if l.head != nil {
			n++
		}
	}
	return n
}

func (w *world) releaseHead() {
	h, l := w.pick(func(_ Handle, l *lineage) bool { return l.head != nil && len(l.frozen) > 0 })
	if l == nil || w.heads() < 2 {
		return
	}
	live := l.live()
	w.doneKey, w.doneValue = fmt.Appendf(nil, "headless/%d", h), "x"
	do := func() error {
		return w.s.ReleaseHead(h, live[len(live)-1], []KV{{fmt.Appendf(nil, "headless/%d", h), []byte("x")}}, nil)
	}
	ok(w.t, do())
	w.notes = append(w.notes, note{h, do})
	l.head = nil
	w.since = slices.DeleteFunc(w.since, func(o op) bool { return o.h == h })
	if err := w.s.Set(h, worldBase, MakeRef(1, 1), 1); !errors.Is(err, ErrReadOnly) {
		w.t.Fatalf("change without a head: %v", err)
	}
	if err := w.s.Lookup(h, worldBase, make([]Ref, 1)); !errors.Is(err, ErrHandle) {
		w.t.Fatalf("lookup without a head: %v", err)
	}
}

func (w *world) drop(h Handle) {
	l := w.vols[h]
	if l.head != nil && w.heads() < 2 {
		return
	}
	used := 0
	for _, n := range l.children {
		used += n
	}
	do := func() error { return w.s.DropVolume(h) }
	err := do()
	if used > 0 {
		if !errors.Is(err, ErrInUse) {
			w.t.Fatalf("drop with forks: %v", err)
		}
		return
	}
	ok(w.t, err)
	w.notes = append(slices.DeleteFunc(w.notes, func(n note) bool { return n.h == h }), note{h, do})
	if p := l.parent; p.Handle != 0 {
		w.vols[p.Handle].children[p.Gen]--
	}
	delete(w.vols, h)
	w.since = slices.DeleteFunc(w.since, func(o op) bool { return o.h == h })
}

func (w *world) step() {
	names := []struct {
		name   string
		weight int
		do     func()
	}{{"change", 60, w.change}, {"freeze", 8, w.freeze}, {"fork", 3, w.fork}, {"view", 4, w.view}, {"close view", 3, w.closeView},
		{"release", 7, w.release}, {"release head", 1, w.releaseHead}, {"checkpoint", 3, w.checkpoint},
		{"drop", 1, func() {
			if h, _ := w.pick(func(Handle, *lineage) bool { return true }); len(w.vols) > 3 {
				w.drop(h)
			}
		}},
		{"flush", 2, func() {
			if h, l := w.pick(func(_ Handle, l *lineage) bool { return l.head != nil }); l != nil {
				ok(w.t, w.s.Flush(h))
			}
		}}}
	n := w.r.IntN(92)
	for _, c := range names {
		if n -= c.weight; n < 0 {
			w.doing, w.doneKey = c.name, nil
			w.counts[c.name]++
			c.do()
			break
		}
	}
}

func (w *world) compare(h Handle, want []Ref, what string, args ...any) {
	w.t.Helper()
	got := make([]Ref, worldBlocks)
	ok(w.t, w.s.Lookup(h, worldBase, got))
	for i := range want {
		if got[i] != want[i] {
			w.t.Fatalf("%s, block %d of leaf %d: %x, want %x", fmt.Sprintf(what, args...), i%LeafBlocks, i/LeafBlocks, got[i], want[i])
		}
	}
}

// compareAll compares all that can be read.
func (w *world) compareAll() {
	w.t.Helper()
	for v, at := range w.views {
		w.compare(v, w.vols[at.Handle].frozen[at.Gen], "open view of volume %d at %d", at.Handle, at.Gen)
	}
	for _, h := range slices.Sorted(maps.Keys(w.vols)) {
		l := w.vols[h]
		gen, err := w.s.Generation(h)
		ok(w.t, err)
		if gen != l.gen {
			w.t.Fatalf("volume %d is at generation %d, want %d", h, gen, l.gen)
		}
		if l.head != nil {
			w.compare(h, l.head, "volume %d", h)
		}
		for _, gen := range l.live() {
			v, err := w.s.OpenView(h, gen)
			ok(w.t, err)
			w.compare(v, l.frozen[gen], "volume %d at %d", h, gen)
			ok(w.t, w.s.DropVolume(v))
		}
	}
}

// ask compares answers about differences with the model.
func (w *world) ask() {
	w.t.Helper()
	h, l := w.pick(func(Handle, *lineage) bool { return true })
	gens := append([]uint32{0}, l.live()...)
	if l.head != nil {
		gens = append(gens, l.gen)
	}
	a, b := At{h, w.pickGen(gens)}, At{h, w.pickGen(gens)}
	x := l.at(a.Gen)
	if a.Gen < b.Gen {
		w.askChanged(h, a.Gen, b.Gen)
	}
	if i := w.r.IntN(len(gens)); i > 0 {
		w.askUnique(h, gens, i)
	}
	if w.r.IntN(2) == 0 {
		b.Handle, l = w.pick(func(Handle, *lineage) bool { return true })
		gens = append([]uint32{0}, l.live()...)
		if l.head != nil {
			gens = append(gens, l.gen)
		}
		b.Gen = w.pickGen(gens)
	}
	w.askDiff(a, b, x, l.at(b.Gen))
	w.askVersions()
}

func (w *world) askChanged(h Handle, from, to uint32) {
	w.t.Helper()
	x, y := w.vols[h].at(from), w.vols[h].at(to)
	last, seen := int64(-1), map[uint64]bool{}
	ok(w.t, w.s.Changed(h, from, to, func(leaf uint64) error {
		if int64(leaf) <= last {
			w.t.Fatalf("leaf %d after %d", leaf, last)
		}
		last = int64(leaf)
		seen[leaf-worldFirst] = true
		return nil
	}))
	for i := range x {
		if x[i] != y[i] && !seen[uint64(i/LeafBlocks)] {
			w.t.Fatalf("leaf %d of volume %d differs between %d and %d", i/LeafBlocks, h, from, to)
		}
	}
}

func (w *world) askUnique(h Handle, gens []uint32, i int) {
	w.t.Helper()
	l := w.vols[h]
	next := uint32(0)
	after := make([]Ref, worldBlocks)
	if i+1 < len(gens) {
		next = gens[i+1]
		after = l.at(next)
	}
	want := int64(0)
	before, x := l.at(gens[i-1]), l.at(gens[i])
	for k, ref := range x {
		if ref != 0 && ref != before[k] && ref != after[k] {
			want++
		}
	}
	got, err := w.s.Unique(h, gens[i], gens[i-1], next)
	ok(w.t, err)
	if got != want {
		w.t.Fatalf("volume %d at %d, between %d and %d: %d unique, want %d", h, gens[i], gens[i-1], next, got, want)
	}
}

func (w *world) askDiff(a, b At, x, y []Ref) {
	w.t.Helper()
	first := w.r.Uint64N(worldBlocks)
	end := first + 1 + w.r.Uint64N(worldBlocks-first)
	at := first
	ok(w.t, w.s.Diff(a, b, worldBase+first, worldBase+end, func(lba, n uint64, old, new Ref) error {
		for ; at < lba-worldBase; at++ {
			if x[at] != y[at] {
				w.t.Fatalf("block %d differs between %v and %v: %x, %x", at, a, b, x[at], y[at])
			}
		}
		for i := range n {
			o, q := old, new
			if o != 0 {
				o += Ref(i)
			}
			if q != 0 {
				q += Ref(i)
			}
			if x[at] != o || y[at] != q || o == q {
				w.t.Fatalf("block %d between %v and %v: %x, %x, given %x, %x", at, a, b, x[at], y[at], o, q)
			}
			at++
		}
		return nil
	}))
	for ; at < end; at++ {
		if x[at] != y[at] {
			w.t.Fatalf("block %d differs between %v and %v: %x, %x", at, a, b, x[at], y[at])
		}
	}
}

// askVersions: the versions have exactly the blocks that can be read in one of the generations and do not come from an ancestor.
func (w *world) askVersions() {
	w.t.Helper()
	h, l := w.pick(func(Handle, *lineage) bool { return true })
	want, inherited := map[Ref]bool{}, map[Ref]bool{}
	for _, ref := range l.base {
		inherited[ref] = true
	}
	for _, gen := range append(l.live(), l.gen) {
		for _, ref := range l.at(gen) {
			want[ref] = true
		}
	}
	delete(want, 0)
	got := map[Ref]bool{}
	last := At{}
	ok(w.t, w.s.EachVersion(context.Background(), h, l.live(), func(leaf uint64, versions []Version) error {
		for _, v := range versions {
			if at := (At{Handle(leaf), v.Gen}); last.Handle > at.Handle || last.Handle == at.Handle && last.Gen <= at.Gen {
				w.t.Fatalf("leaf %d at %d after %v", leaf, v.Gen, last)
			} else {
				last = at
			}
			for _, ref := range v.Refs {
				if ref != 0 && !want[ref] {
					w.t.Fatalf("version of leaf %d of volume %d at %d has %x, which nobody sees", leaf, h, v.Gen, ref)
				}
				got[ref] = true
			}
		}
		return nil
	}))
	for ref := range want {
		if !got[ref] && !inherited[ref] {
			w.t.Fatalf("no version of volume %d has %x", h, ref)
		}
	}
}

// TestGenerations runs random changes, freezes, forks, views and releases under the smallest budget, with restarts, against
// slices that keep every generation.
func TestGenerations(t *testing.T) {
	counts := map[string]int{}
	evictions := int64(0)
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t, rapid.Uint64().Draw(t, "seed"), rapid.SampledFrom([]int64{0, 0, 5 << 20}).Draw(t, "budget"))
		w.counts = counts
		for i := range rapid.IntRange(1, 300).Draw(t, "steps") {
			w.step()
			switch {
			case i%20 == 19:
				w.ask()
			case i%90 == 89:
				w.compareAll()
				ok(t, w.s.Check())
			case i%70 == 69:
				w.checkpoint()
				evictions += w.s.Stats().Evictions
				ok(t, w.s.Close())
				w.open()
			}
		}
		w.compareAll()
		ok(t, w.s.Check())
		evictions += w.s.Stats().Evictions
		ok(t, w.s.Close())
	})
	t.Logf("%v, %d evictions", counts, evictions)
}

// fromEnv gives the number that the environment has under this name, or n.
func fromEnv(t *testing.T, name string, n int) int {
	t.Helper()
	if v := os.Getenv(name); v != "" {
		var err error
		if n, err = strconv.Atoi(v); err != nil {
			t.Fatal(err)
		}
	}
	return n
}

// TestGenerationsCrash cuts the power in the middle of operations. The core's part is played as it is meant: changes since the last
// checkpoint are applied again, releases repeated; freezes, forks and heads given up happened or did not, with their metadata.
func TestGenerationsCrash(t *testing.T) {
	counts := map[string]int{}
	for seed := range uint64(fromEnv(t, "VARVE_MAP_SEEDS", 24)) {
		w := newWorld(t, seed, 0)
		w.counts = counts
		for range 6 {
			for range 10 + w.r.IntN(60) {
				w.step()
			}
			for range 100 { // until one that writes
				if !w.crash() {
					continue
				}
				break
			}
			w.compareAll()
			ok(t, w.s.Check())
			w.ask()
		}
		closeStore(t, w.s)
	}
	t.Logf("%v", counts)
}

// crash does a step, cuts the power at a random call of it, if it calls at all, and starts again from what is left.
func (w *world) crash() bool {
	w.t.Helper()
	vols, since, notes := w.cloneVols(), slices.Clone(w.since), slices.Clone(w.notes)
	cut := cutAt(w.fs, w.r.IntN(4), w.r.Int64(), float64(w.r.IntN(3))/2)
	w.step()
	disk := cut()
	if disk == nil {
		if slices.Contains([]string{"checkpoint", "freeze", "fork", "release head"}, w.doing) || w.r.IntN(8) > 0 {
			return false
		}
		disk = w.fs.Crash(w.r.Int64(), float64(w.r.IntN(4))/3) // after something that is not synced
	}
	ok(w.t, w.s.Close())
	w.fs = disk
	s, err := Open(Config{FS: disk, Dir: "/map"})
	ok(w.t, err)
	happened := true
	switch w.doing {
	case "checkpoint":
		w.since, w.notes = since, notes
	case "freeze", "fork", "release head":
		if w.doneKey == nil { // it could not do anything
			break
		}
		v, err := s.Get(w.doneKey)
		happened = err == nil && string(v) == w.doneValue
	}
	if !happened {
		w.vols, w.since, w.notes = vols, since, notes
	}
	w.counts[fmt.Sprintf("%s: %v", w.doing, happened)]++
	ok(w.t, s.Close())
	w.open()
	ok(w.t, w.s.Check())
	redo := []func(){func() {
		for _, o := range w.since {
			o.lba += worldBase
			ok(w.t, o.do(w.s))
		}
	}, func() {
		for _, n := range w.notes {
			ok(w.t, n.do())
		}
	}}
	if w.r.IntN(2) == 0 {
		slices.Reverse(redo)
	}
	for _, do := range redo {
		do()
	}
	return true
}

func (w *world) cloneVols() map[Handle]*lineage {
	out := map[Handle]*lineage{}
	for h, l := range w.vols {
		c := *l
		c.head, c.frozen, c.children = slices.Clone(l.head), maps.Clone(l.frozen), maps.Clone(l.children)
		out[h] = &c
	}
	return out
}
