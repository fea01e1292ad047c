package blockmap

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"varve/volumedriver/blockio"
	"varve/volumedriver/vfs"
)

// faultWork changes the map until something fails; it gives all changes since the last checkpoint that returned nil (the last
// of them may have failed), and the model at the end. Each change touches enough to flush and compact often.
func faultWork(s *Store, r *rand.Rand, checkpoints int) (since []op, m model, round int, err error) {
	m = model{}
	for range 3 {
		h, err := s.NewHandle()
		if err != nil {
			return nil, model{}, 0, err
		}
		m[h] = make([]Ref, modelBlocks)
	}
	for round = range checkpoints {
		for range 60 {
			o := randomOp(r, len(m))
			if o.n > 1 && o.n < 100 { // scatter, so that leaves are large
				o.n = 1
				for range 100 {
					o.lba, o.ref = r.Uint64N(modelBlocks), MakeRef(1+r.Uint32N(1e6), 9)
					since = append(since, o)
					m.do(o)
					if err := o.do(s); err != nil {
						return since, m, round, err
					}
				}
			}
			since = append(since, o)
			m.do(o)
			if err := o.do(s); err != nil {
				return since, m, round, err
			}
		}
		if err := s.Checkpoint([]KV{{[]byte("round"), []byte(fmt.Sprint(round + 1))}}, nil); err != nil {
			return since, m, round, err
		}
		since = since[:0]
	}
	return since, m, checkpoints, nil
}

// TestFailingCalls fails mutating calls, each one, once or from then on. Nobody may hang, the store
// must end, and the disk after a power cut plus redo must be right.
func TestFailingCalls(t *testing.T) {
	failures, opens, last := 0, 0, int64(0)
	for n := int64(1); ; n++ {
		for _, times := range []int64{1, 0} {
			mem := vfs.NewMem(n)
			e := vfs.NewErrors(mem)
			hit := e.Inject(vfs.Fault{Op: vfs.OpMutating, From: n, Times: times, Err: syscall.EIO})
			s, err := Open(Config{FS: e, Dir: "/map", memTableBytes: 64 << 10})
			if err != nil {
				opens++
				continue
			}
			since, m, round, err := faultWork(s, rand.New(rand.NewPCG(uint64(n), 9)), 4)
			cut := mem.Crash(n, float64(n%3)/2)
			begin := time.Now()
			_ = s.Close() // it may complain, but must end
			if took := time.Since(begin); took > 5*time.Second {
				t.Fatalf("close took %v", took)
			}
			if fired, failed := hit.Fired() > 0, s.failure.Load() != nil; failed != fired || err != nil && !failed {
				t.Fatalf("call %d failed: %v, error %v, store failed: %v", n, fired, err, failed)
			}
			if hit.Fired() == 0 {
				t.Logf("%d calls failed in Open, %d later, of %d", opens, failures, last)
				if failures < 100 {
					t.Fatal("too few")
				}
				return
			}
			failures++
			last = n
			checkRedo(t, cut, since, m, round)
		}
	}
}

func checkRedo(t *testing.T, fs vfs.FS, since []op, m model, round int) {
	t.Helper()
	s, err := Open(Config{FS: fs, Dir: "/map"})
	if err != nil {
		t.Fatal(err)
	}
	defer closeStore(t, s)
	ok(t, s.Check())
	v, err := s.Get([]byte("round"))
	if round == 0 {
		if len(v) != 0 && string(v) != "0" && string(v) != "1" { // the attempt that failed may have been written all the same
			t.Fatalf("round %q", v)
		}
		if err != nil {
			return // nothing was ever confirmed, the handles need not be there
		}
	} else if err != nil || string(v) != fmt.Sprint(round) && string(v) != fmt.Sprint(round+1) {
		t.Fatalf("round %q %v, want %d", v, err, round)
	}
	if string(v) != fmt.Sprint(round+1) { // else the checkpoint has all of them
		for _, o := range since {
			ok(t, o.do(s))
		}
	}
	m.compare(t, s)
}

// TestFailedSync: the kernel forgets what a failed sync should have written, and says nothing the next time. The checkpoint
// must fail, also when asked again.
func TestFailedSync(t *testing.T) {
	for seed := range uint64(6) {
		mem := vfs.NewMem(int64(seed))
		s := openStore(t, mem, 0)
		_, m, round, err := faultWork(s, rand.New(rand.NewPCG(seed, 1)), 1)
		ok(t, err)
		var since []op
		r := rand.New(rand.NewPCG(seed, 2))
		for range 50 {
			o := randomOp(r, len(m))
			ok(t, o.do(s))
			m.do(o)
			since = append(since, o)
		}
		mem.FailSync("", 1)
		for range 2 {
			if err := s.Checkpoint([]KV{{[]byte("round"), []byte("2")}}, nil); !errors.Is(err, syscall.EIO) {
				t.Fatalf("checkpoint: %v", err)
			}
		}
		cut := mem.Crash(int64(seed), float64(seed%3)/2)
		closeStore(t, s)
		checkRedo(t, cut, since, m, round)
	}
}

// TestLoadOvertaken: what a load has read before a Clear or a Set of the whole leaf must not come back.
func TestLoadOvertaken(t *testing.T) {
	for name, overtake := range map[string]struct {
		stored uint32 // mapped before; 0 for a bit without a leaf
		do     func(s *Store, h Handle) error
		want   Ref
	}{
		"clear":           {10, func(s *Store, h Handle) error { return s.Clear(h, 0, LeafBlocks) }, 0},
		"clear of a TiB":  {10, func(s *Store, h Handle) error { return s.Clear(h, 0, 1<<28) }, 0},
		"drop":            {10, func(s *Store, h Handle) error { return s.DropVolume(h) }, 0},
		"set":             {10, func(s *Store, h Handle) error { return s.Set(h, 0, MakeRef(2, 0), LeafBlocks) }, MakeRef(2, 0)},
		"set where empty": {0, func(s *Store, h Handle) error { return s.Set(h, 0, MakeRef(2, 0), LeafBlocks) }, MakeRef(2, 0)},
	} {
		t.Run(name, func(t *testing.T) {
			fs := vfs.NewMem(1)
			s := openStore(t, fs, 0)
			h := handle(t, s)
			ok(t, s.Set(h, 0, MakeRef(1, 0), 10))
			for leaf := uint64(1); leaf < 2000; leaf++ { // enough for a clear to walk the shards
				ok(t, s.Set(h, leaf*LeafBlocks, MakeRef(1, 0), 1))
			}
			ok(t, s.Checkpoint(nil, nil))
			if overtake.stored == 0 {
				ok(t, s.db.Delete(leafKey(h, 0, 1), nil))
			}
			closeStore(t, s)
			s = openStore(t, fs, 0)
			defer closeStore(t, s)
			v, err := s.opened(h)
			ok(t, err)
			key := memoryKey(h, 0)
			sh, l := s.shard(key), &load{done: make(chan struct{})}
			sh.loading[key] = l
			runs, err := s.fetch(v, 0)
			ok(t, err)
			ok(t, overtake.do(s, h))
			ok(t, s.settle(sh, v, 0, l, runs, nil))
			<-l.done
			refs := make([]Ref, 1)
			ok(t, s.Lookup(h, 0, refs))
			if refs[0] != overtake.want {
				t.Fatalf("%x, want %x", refs[0], overtake.want)
			}
			ok(t, s.Check())
		})
	}
}

// TestChangedWhileWritten: a leaf that changes between having been encoded and having been committed stays dirty.
func TestChangedWhileWritten(t *testing.T) {
	for name, first := range map[string]func(s *Store, h Handle) error{
		"mapped": func(s *Store, h Handle) error { return s.Set(h, 7, MakeRef(1, 0), 1) },
		"empty":  func(s *Store, h Handle) error { return errors.Join(s.Set(h, 7, MakeRef(1, 0), 1), s.Clear(h, 7, 1)) },
	} {
		t.Run(name, func(t *testing.T) {
			fs := vfs.NewMem(1)
			s := openStore(t, fs, 0)
			h := handle(t, s)
			ok(t, first(s, h))
			key := memoryKey(h, 0)
			sh, f := s.shard(key), flush{b: s.db.NewBatch()}
			s.writes.Lock()
			sh.mu.Lock()
			id, _ := sh.find(key)
			err := s.encode(&f, sh, sh.slot(id))
			sh.mu.Unlock()
			ok(t, err)
			ok(t, s.Set(h, 8, MakeRef(2, 0), 1))
			ok(t, s.finish(&f, nil))
			s.writes.Unlock()
			if st := s.Stats(); st.Leaves != 1 || st.Dirty != 1 {
				t.Fatalf("%d leaves, %d dirty", st.Leaves, st.Dirty)
			}
			ok(t, s.Checkpoint(nil, nil))
			ok(t, s.Check())
			closeStore(t, s)
			s = openStore(t, fs, 0)
			defer closeStore(t, s)
			refs := make([]Ref, 1)
			ok(t, s.Lookup(h, 8, refs))
			if refs[0] != MakeRef(2, 0) {
				t.Fatalf("%x", refs[0])
			}
		})
	}
}

// TestFullDisk: nearly full is an error that passes.
func TestFullDisk(t *testing.T) {
	mem := vfs.NewMem(1)
	mem.SetCapacity(reserveBytes + 200<<10)
	s := openStore(t, mem, 0)
	r := rand.New(rand.NewPCG(1, 1))
	var since []op
	m := model{}
	for range 6 {
		m[handle(t, s)] = make([]Ref, modelBlocks)
	}
	full := 0
	for i := range 60000 {
		o := op{h: Handle(1 + r.IntN(6)), lba: r.Uint64N(modelBlocks), n: 1, ref: MakeRef(1+r.Uint32N(1e6), 9)}
		since = append(since, o)
		m.do(o)
		err := o.do(s)
		if errors.Is(err, blockio.ErrNoSpace) {
			full++
			if err := s.Checkpoint(nil, nil); !errors.Is(err, blockio.ErrNoSpace) {
				t.Fatalf("checkpoint on a full disk: %v", err)
			}
			if err := s.Err(); err != nil {
				t.Fatal(err)
			}
			mem.SetCapacity(0)
			ok(t, o.do(s))
			ok(t, s.Checkpoint(nil, nil))
			break
		}
		if err != nil {
			t.Fatal(i, err)
		}
	}
	if full == 0 {
		t.Fatal("the disk never got full")
	}
	m.compare(t, s)
	ok(t, s.Check())
	closeStore(t, s)
	s = openStore(t, mem, 0) // also from disk
	m.compare(t, s)
	ok(t, s.Check())
	closeStore(t, s)
}

// TestConcurrent has one writer for each volume, readers everywhere, checkpoints, clears and volumes that come and go, under the
// smallest budget. Every block always carries a round that was begun and is not older than the last one completed.
func TestConcurrent(t *testing.T) {
	s, err := Open(Config{FS: vfs.NewMem(1), Dir: "/map", memTableBytes: 256 << 10})
	ok(t, err)
	const volumes, rounds, leaves = 4, 40, 30
	var begun, done [volumes][leaves]atomic.Uint32
	var writers, others sync.WaitGroup
	stop := make(chan struct{})
	handles := make([]Handle, volumes)
	for i := range handles {
		handles[i] = handle(t, s)
	}
	for i, h := range handles {
		writers.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 5))
			for round := uint32(1); round <= rounds; round++ {
				for leaf := range uint64(leaves) {
					begun[i][leaf].Store(round)
					write(t, s, r, h, leaf, round)
					done[i][leaf].Store(round)
				}
			}
		})
	}
	spawn := func(fn func(r *rand.Rand)) {
		others.Go(func() {
			r := rand.New(rand.NewPCG(6, 7))
			for {
				select {
				case <-stop:
					return
				default:
					fn(r)
				}
			}
		})
	}
	for range 2 {
		spawn(func(r *rand.Rand) {
			i, leaf := r.IntN(volumes), r.Uint64N(leaves)
			off := r.Uint64N(LeafBlocks)
			refs := make([]Ref, 1+r.Uint64N(LeafBlocks-off))
			oldest := done[i][leaf].Load()
			err := s.TryLookup(handles[i], leaf*LeafBlocks+off, refs)
			if errors.Is(err, blockio.ErrBusy) {
				err = s.Lookup(handles[i], leaf*LeafBlocks+off, refs)
			}
			newest := begun[i][leaf].Load()
			if err != nil {
				t.Error(err)
				return
			}
			for k, ref := range refs {
				index := off + uint64(k)
				if ref == 0 && oldest == newest && oldest > 0 || ref != 0 &&
					(ref.Ordinal() < oldest || ref.Ordinal() > newest || uint64(ref.Index()) != index) {
					t.Errorf("volume %d leaf %d block %d: %d/%d, want round %d to %d", i, leaf, index, ref.Ordinal(), ref.Index(),
						oldest, newest)
					return
				}
			}
		})
	}
	spawn(func(*rand.Rand) { check(t, s.Checkpoint(nil, nil)) })
	spawn(func(r *rand.Rand) {
		h, err := s.NewHandle()
		check(t, err)
		for range 50 {
			check(t, s.Set(h, r.Uint64N(1<<24), MakeRef(3, 0), 100))
		}
		check(t, s.DropVolume(h))
		_, found, err := s.NextMapped(h, 0, MaxBlocks)
		check(t, err)
		if found {
			t.Error("dropped volume has blocks")
		}
	})
	writers.Wait()
	close(stop)
	others.Wait()
	ok(t, s.Check())
	closeStore(t, s)
}

func check(t *testing.T, err error) {
	if err != nil {
		t.Error(err)
	}
}

// write brings a leaf to a round, as a whole, in pieces, or after a clear.
func write(t *testing.T, s *Store, r *rand.Rand, h Handle, leaf uint64, round uint32) {
	base := leaf * LeafBlocks
	switch r.IntN(3) {
	case 0:
		check(t, s.Set(h, base, MakeRef(round, 0), LeafBlocks))
	case 1:
		check(t, s.Clear(h, base, LeafBlocks))
		fallthrough
	case 2:
		for _, k := range r.Perm(64) {
			check(t, s.Set(h, base+uint64(k)*8, MakeRef(round, uint32(k)*8), 8))
		}
	}
}
