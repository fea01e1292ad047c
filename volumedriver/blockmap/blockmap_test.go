package blockmap

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"varve/volumedriver/blockio"
	"varve/volumedriver/vfs"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func openStore(t testing.TB, fs vfs.FS, budget int64) *Store {
	t.Helper()
	s, err := Open(Config{FS: fs, Dir: "/map", BudgetBytes: budget})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func closeStore(t testing.TB, s *Store) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if n := s.mapped.Load(); n != 0 {
		t.Fatalf("%d bytes of slabs leaked", n)
	}
}

func handle(t testing.TB, s *Store) Handle {
	t.Helper()
	h, err := s.NewHandle()
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func ok(t interface {
	Helper()
	Fatal(...any)
}, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// op is a change of the map. Set if ref is not 0, else Clear.
type op struct {
	h   Handle
	lba uint64
	n   uint64
	ref Ref
}

func (o op) do(s *Store) error {
	if o.ref != 0 {
		return s.Set(o.h, o.lba, o.ref, uint32(o.n))
	}
	return s.Clear(o.h, o.lba, o.n)
}

// model is what the map should hold: the blocks of each volume, up to a size.
type model map[Handle][]Ref

func (m model) do(o op) {
	refs := m[o.h]
	for i := o.lba; i < min(o.lba+o.n, uint64(len(refs))); i++ {
		refs[i] = 0
		if o.ref != 0 {
			refs[i] = o.ref + Ref(i-o.lba)
		}
	}
}

func (m model) compare(t interface {
	Helper()
	Fatalf(string, ...any)
}, s *Store) {
	t.Helper()
	for h, want := range m {
		got := make([]Ref, len(want))
		if err := s.Lookup(h, 0, got); err != nil {
			t.Fatalf("%v", err)
		}
		for i := range want {
			if got[i] != want[i] {
				t.Fatalf("volume %d block %d: %x, want %x", h, i, got[i], want[i])
			}
		}
	}
}

const modelBlocks = 40 * LeafBlocks

func randomOp(r *rand.Rand, handles int) op {
	o := op{h: Handle(1 + r.IntN(handles)), n: 1}
	switch r.IntN(10) {
	case 0, 1, 2, 3, 4:
	case 5, 6, 7:
		o.n = 1 + r.Uint64N(100)
	case 8:
		o.n = 1 + r.Uint64N(3000)
	case 9:
		o.n = LeafBlocks * (1 + r.Uint64N(4))
	}
	o.lba = r.Uint64N(modelBlocks - o.n)
	if o.n%LeafBlocks == 0 {
		o.lba -= o.lba % LeafBlocks
	}
	if r.IntN(4) != 0 {
		o.ref = MakeRef(1+r.Uint32N(MaxOrdinal), r.Uint32N(4097-uint32(o.n)))
	}
	return o
}

// TestModel runs random operations on a few volumes under the smallest budget, so that leaves come and go all the time, with
// checkpoints and restarts, against plain slices.
func TestModel(t *testing.T) {
	evictions := int64(0)
	defer func() { t.Logf("%d evictions", evictions) }()
	rapid.Check(t, func(t *rapid.T) {
		fs := vfs.NewMem(1)
		seed := rapid.Uint64().Draw(t, "seed")
		r := rand.New(rand.NewPCG(seed, 0))
		budget := rapid.SampledFrom([]int64{0, 0, 5 << 20}).Draw(t, "budget")
		open := func() *Store {
			s, err := Open(Config{FS: fs, Dir: "/map", BudgetBytes: budget, memTableBytes: 128 << 10})
			ok(t, err)
			return s
		}
		s := open()
		defer func() { ok(t, s.Close()) }()
		m := model{}
		for range 12 {
			h, err := s.NewHandle()
			ok(t, err)
			m[h] = make([]Ref, modelBlocks)
		}
		dense := r.IntN(2) == 0
		for i := range rapid.IntRange(1, 1200).Draw(t, "ops") {
			o := randomOp(r, len(m))
			if dense { // many one-block runs: all leaves become arrays
				for range 200 {
					o := op{h: o.h, lba: o.lba/LeafBlocks*LeafBlocks + r.Uint64N(LeafBlocks), n: 1, ref: MakeRef(1+r.Uint32N(1e6), 7)}
					ok(t, o.do(s))
					m.do(o)
				}
			}
			ok(t, o.do(s))
			m.do(o)
			probe(t, s, m, r)
			if i%300 == 299 {
				ok(t, s.Checkpoint(nil, nil))
				if r.IntN(2) == 0 {
					ok(t, s.Check())
					ok(t, s.Close())
					s = open()
				}
			}
		}
		m.compare(t, s)
		ok(t, s.Check())
		evictions += s.Stats().Evictions
		if st := s.Stats(); st.Bytes > st.Budget*105/100 {
			t.Fatalf("%d bytes with a budget of %d", st.Bytes, st.Budget)
		}
	})
}

// probe compares one random answer of each kind with the model.
func probe(t *rapid.T, s *Store, m model, r *rand.Rand) {
	h := Handle(1 + r.IntN(len(m)))
	want := m[h]
	lba := r.Uint64N(modelBlocks)
	end := lba + 1 + r.Uint64N(modelBlocks-lba)
	if r.IntN(2) == 0 {
		end = min(end, lba+20)
	}
	refs := make([]Ref, end-lba)
	if err := s.TryLookup(h, lba, refs); errors.Is(err, blockio.ErrBusy) {
		ok(t, s.Lookup(h, lba, refs))
	} else {
		ok(t, err)
	}
	for i, got := range refs {
		if got != want[lba+uint64(i)] {
			t.Fatalf("volume %d block %d: %x, want %x", h, lba+uint64(i), got, want[lba+uint64(i)])
		}
	}
	next := lba
	for next < end && want[next] == 0 {
		next++
	}
	got, found, err := s.NextMapped(h, lba, end)
	ok(t, err)
	if found != (next < end) || found && got != next {
		t.Fatalf("next mapped of volume %d in %d to %d: %d %v, want %d", h, lba, end, got, found, next)
	}
	stop := lba
	for stop < end && (want[stop] != 0) == (want[lba] != 0) {
		stop++
	}
	n, mapped, err := s.Run(h, lba, end)
	ok(t, err)
	if n != stop-lba || mapped != (want[lba] != 0) {
		t.Fatalf("run of volume %d from %d to %d: %d %v, want %d", h, lba, end, n, mapped, stop-lba)
	}
}

// TestCrash cuts the power at random points of random work, and applies again what came after the last checkpoint, as the core
// does. Then the map must be as if nothing had happened, and all metadata of the checkpoint there.
func TestCrash(t *testing.T) {
	for seed := range uint64(8) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { crashRun(t, seed) })
	}
}

// cutAt cuts the power at the n-th mutating call from now, 0 is the next, and gives what gives the disk of that moment, or nil.
func cutAt(fs *vfs.Mem, n int, seed int64, survive float64) func() *vfs.Mem {
	var mu sync.Mutex // Pebble calls from several goroutines
	var cut *vfs.Mem
	fs.OnCall(func(vfs.Call) {
		mu.Lock()
		defer mu.Unlock()
		if n--; n == -1 {
			cut = fs.Crash(seed, survive)
		}
	})
	return func() *vfs.Mem {
		fs.OnCall(nil)
		mu.Lock()
		defer mu.Unlock()
		return cut
	}
}

func crashRun(t *testing.T, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 1))
	fs := vfs.NewMem(int64(seed))
	s := openStore(t, fs, 0)
	m, evicted := model{}, int64(0)
	for range 8 {
		m[handle(t, s)] = make([]Ref, modelBlocks)
	}
	ok(t, s.Checkpoint([]KV{{[]byte("round"), []byte("0")}}, nil))
	for round := range 6 {
		var since []op
		checkpointed := fmt.Sprint(round)
		taken := func() *vfs.Mem { return nil }
		at := r.IntN(800)
		for i := range 800 {
			o := randomOp(r, len(m))
			since = append(since, o)
			if i == at { // in the middle of whatever this operation calls
				taken = cutAt(fs, r.IntN(8), r.Int64(), float64(round%3)/2)
			}
			ok(t, o.do(s))
			m.do(o)
			if i%4 == 0 { // make an array of a leaf
				for range 150 {
					o := op{o.h, o.lba/LeafBlocks*LeafBlocks + r.Uint64N(LeafBlocks), 1, MakeRef(1+r.Uint32N(1e6), 9)}
					since = append(since, o)
					ok(t, o.do(s))
					m.do(o)
				}
			}
			if i > at+20 {
				break
			}
		}
		evicted += s.Stats().Evictions
		cut := taken()
		if cut == nil {
			cut = fs.Crash(r.Int64(), float64(round%3)/2)
		}
		ok(t, s.Close())
		fs = cut
		s = openStore(t, fs, 0)
		ok(t, s.Check())
		if v, err := s.Get([]byte("round")); err != nil || string(v) != checkpointed {
			t.Fatalf("metadata after the crash: %q %v, want %q", v, err, checkpointed)
		}
		for _, o := range since {
			ok(t, o.do(s))
		}
		m.compare(t, s)
		during := cutAt(fs, r.IntN(6), r.Int64(), float64(r.IntN(3))/2)
		ok(t, s.Checkpoint([]KV{{[]byte("round"), []byte(fmt.Sprint(round + 1))}}, nil))
		if cut := during(); cut != nil {
			checkRedo(t, cut, since, m, round)
		}
		cut = fs.Crash(r.Int64(), 0) // and nothing is needed after a checkpoint
		ok(t, s.Close())
		fs = cut
		s = openStore(t, fs, 0)
		m.compare(t, s)
	}
	if evicted += s.Stats().Evictions; evicted < 10 {
		t.Errorf("only %d evictions", evicted)
	}
	ok(t, s.Check())
	closeStore(t, s)
}

func TestMetadata(t *testing.T) {
	fs := vfs.NewMem(1)
	s := openStore(t, fs, 0)
	kv := func(k, v string) KV { return KV{[]byte(k), []byte(v)} }
	ok(t, s.Put([]KV{kv("a", "1"), kv("b/1", "x"), kv("b/2", "y"), kv("b\xff", "z"), kv("c", "2")}, true))
	ok(t, s.Checkpoint([]KV{kv("b/3", "w")}, [][]byte{[]byte("b/1"), []byte("gone")}))
	scan := func(s *Store) string {
		var out bytes.Buffer
		ok(t, s.Scan([]byte("b"), func(k, v []byte) error { _, err := fmt.Fprintf(&out, "%q=%s ", k, v); return err }))
		return out.String()
	}
	const want = `"b/2"=y "b/3"=w "b\xff"=z `
	if got := scan(s); got != want {
		t.Fatal(got)
	}
	stop := errors.New("stop")
	if err := s.Scan(nil, func(k, v []byte) error { return stop }); !errors.Is(err, stop) {
		t.Fatal(err)
	}
	if _, err := s.Get([]byte("b/1")); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
	again := openStore(t, fs.Crash(1, 0), 0)
	if got := scan(again); got != want {
		t.Fatal(got)
	}
	closeStore(t, again)
	closeStore(t, s)
	if _, err := s.Get([]byte("a")); !errors.Is(err, ErrClosed) {
		t.Fatal(err)
	}
}

func TestHandlesAreNotUsedAgain(t *testing.T) {
	fs := vfs.NewMem(1)
	s := openStore(t, fs, 0)
	seen := map[Handle]bool{}
	for range 5 {
		h := handle(t, s)
		if seen[h] || h == 0 {
			t.Fatalf("handle %d again", h)
		}
		seen[h] = true
		ok(t, s.DropVolume(h))
	}
	ok(t, s.Checkpoint(nil, nil))
	cut := fs.Crash(1, 0)
	closeStore(t, s)
	s = openStore(t, cut, 0)
	if h := handle(t, s); seen[h] {
		t.Fatalf("handle %d again after a crash", h)
	}
	for _, h := range []Handle{0, 7, 1 << 31} {
		if err := s.Lookup(h, 0, make([]Ref, 1)); !errors.Is(err, ErrHandle) {
			t.Errorf("lookup in volume %d: %v", h, err)
		}
		if err := s.Set(h, 0, MakeRef(1, 1), 1); !errors.Is(err, ErrHandle) {
			t.Errorf("set in volume %d: %v", h, err)
		}
	}
	closeStore(t, s)
}

func TestRange(t *testing.T) {
	s := openStore(t, vfs.NewMem(1), 0)
	defer closeStore(t, s)
	h := handle(t, s)
	for _, c := range []struct {
		lba uint64
		ref Ref
		n   uint32
	}{{MaxBlocks, MakeRef(1, 0), 1}, {MaxBlocks - 1, MakeRef(1, 0), 2}, {0, 0, 1}, {0, MakeRef(0, 5), 1},
		{0, MakeRef(1, 4095), 2}, {0, MakeRef(1<<28, 0), 1}, {1<<64 - 1, MakeRef(1, 0), 1}} {
		if err := s.Set(h, c.lba, c.ref, c.n); !errors.Is(err, ErrRange) {
			t.Errorf("set %d+%d to %x: %v", c.lba, c.n, c.ref, err)
		}
	}
	ok(t, s.Set(h, MaxBlocks-1, MakeRef(MaxOrdinal, 4095), 1))
	refs := []Ref{9, 9, 9}
	ok(t, s.Lookup(h, MaxBlocks-1, refs))
	if refs[0] != MakeRef(MaxOrdinal, 4095) || refs[1] != 0 || refs[2] != 0 {
		t.Fatal(refs)
	}
	if at, found, err := s.NextMapped(h, 0, 1<<64-1); err != nil || !found || at != MaxBlocks-1 {
		t.Fatal(at, found, err)
	}
	if n, mapped, err := s.Run(h, MaxBlocks-1, MaxBlocks); err != nil || n != 1 || !mapped {
		t.Fatal(n, mapped, err)
	}
	ok(t, s.Clear(h, 5, 1<<64-1))
	if _, found, err := s.NextMapped(h, 0, MaxBlocks); err != nil || found {
		t.Fatal(found, err)
	}
}

func TestDropVolume(t *testing.T) {
	fs := vfs.NewMem(1)
	s := openStore(t, fs, 0)
	a, b := handle(t, s), handle(t, s)
	for i := range uint64(2000) {
		ok(t, s.Set(a, i*700, MakeRef(1, 1), 3))
		ok(t, s.Set(b, i*700, MakeRef(2, 1), 3))
	}
	ok(t, s.Checkpoint(nil, nil))
	ok(t, s.DropVolume(a))
	ok(t, s.Checkpoint(nil, nil))
	closeStore(t, s)
	s = openStore(t, fs, 0)
	if _, found, err := s.NextMapped(a, 0, MaxBlocks); err != nil || found {
		t.Fatal(found, err)
	}
	if at, found, err := s.NextMapped(b, 1999*700-5, MaxBlocks); err != nil || !found || at != 1999*700 {
		t.Fatal(at, found, err)
	}
	ok(t, s.Check())
	closeStore(t, s)
}

// TestTryLookup: never blocks on areas never written, even cold; never reads Pebble.
func TestTryLookup(t *testing.T) {
	fs := vfs.NewMem(1)
	s := openStore(t, fs, 0)
	h := handle(t, s)
	refs := make([]Ref, 1024)
	ok(t, s.TryLookup(h, 1<<35, refs)) // new: all known absent
	ok(t, s.Set(h, 1000, MakeRef(5, 5), 100))
	ok(t, s.TryLookup(h, 512, refs))
	if refs[488] != MakeRef(5, 5) || refs[587] != MakeRef(5, 104) || refs[588] != 0 || refs[487] != 0 {
		t.Fatal("wrong refs")
	}
	ok(t, s.Checkpoint(nil, nil))
	closeStore(t, s)
	s = openStore(t, fs, 0)
	defer closeStore(t, s)
	if err := s.TryLookup(h, 0, refs[:1]); !errors.Is(err, blockio.ErrBusy) {
		t.Fatalf("volume that was not opened: %v", err)
	}
	ok(t, s.Lookup(h, 0, refs[:1])) // opens the volume
	ok(t, s.TryLookup(h, 1<<30, refs))
	if err := s.TryLookup(h, 1000, refs[:1]); !errors.Is(err, blockio.ErrBusy) {
		t.Fatalf("leaf that is not resident: %v", err)
	}
	ok(t, s.Lookup(h, 1000, refs[:1]))
	ok(t, s.TryLookup(h, 1000, refs[:1]))
	if refs[0] != MakeRef(5, 5) {
		t.Fatal(refs[0])
	}
	if n := testing.AllocsPerRun(100, func() {
		if s.TryLookup(h, 1000, refs[:16]) != nil || s.TryLookup(h, 1<<30, refs[:16]) != nil {
			t.Fatal("not resident")
		}
	}); n != 0 {
		t.Fatalf("%v allocations", n)
	}
}
