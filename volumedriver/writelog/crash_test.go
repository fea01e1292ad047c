package writelog

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"varve/volumedriver/blockio"
	"varve/volumedriver/vfs"
)

// workload is a run of one submitter: appends, kicks, syncs, releases, so that segments are recycled several times. It
// returns at the first error.
func workload(l *Log, m *model, rng *rand.Rand, steps int) error {
	for range steps {
		for range 1 + rng.IntN(3) {
			ok, err := m.append(l, rng, 3)
			if err != nil {
				return err
			}
			if ok {
				continue
			}
			l.Kick()
			m.release(l, m.snapshot().written)
			if err := l.WaitSpace(testContext); err != nil {
				return err
			}
		}
		switch k := rng.IntN(8); {
		case k > 4:
			l.KickSync()
		case k > 0:
			l.Kick()
		}
		if rng.IntN(3) == 0 {
			if err := m.sync(l); err != nil {
				return err
			}
		}
		if rng.IntN(10) == 0 {
			m.release(l, max(0, m.snapshot().written-rng.IntN(30)))
		}
	}
	l.Kick()
	return nil
}

// crashRuns is how many histories the power-cut test plays; VARVE_CRASH_RUNS makes it more.
func crashRuns(t *testing.T) int {
	runs := 2
	if s := os.Getenv("VARVE_CRASH_RUNS"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatalf("VARVE_CRASH_RUNS=%s: %v", s, err)
		}
		runs = n
	}
	return runs
}

// TestPowerCutAtEveryCall cuts the power before each call that changes the file system, with several survival rates, and
// for some of the cuts once more before each call of the recovery. What comes back is a prefix that holds all that was durable.
func TestPowerCutAtEveryCall(t *testing.T) {
	var points atomic.Int64
	for seed := range int64(crashRuns(t)) {
		cutHistory(t, seed, &points)
		if t.Failed() {
			break
		}
	}
	t.Logf("%d crash points", points.Load())
}

func cutHistory(t *testing.T, seed int64, points *atomic.Int64) {
	rates := []float64{0, 0.3, 0.5, 0.8, 1}
	mem := vfs.NewMem(seed)
	cfg := testConfig(mem)
	cfg.NoPrewrite = seed%2 == 0
	m := &model{}
	var hookMu sync.Mutex
	mem.OnCall(func(c vfs.Call) {
		hookMu.Lock()
		defer hookMu.Unlock()
		if t.Failed() {
			return
		}
		s := m.snapshot()
		for i, rate := range rates {
			if (c.Seq+int64(i))%2 == 0 {
				continue
			}
			cut := mem.Crash(seed<<20+c.Seq*8+int64(i), rate)
			points.Add(1)
			if err := recoverCut(cut, cfg, &s, s.durable, (c.Seq*5+int64(i))%13 == 0, points); err != nil {
				t.Errorf("seed %d, call %d (%s %s), survival %v: %v", seed, c.Seq, c.Op, c.Path, rate, err)
			}
		}
	})
	l, _, err := m.recover(cfg, 0)
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(uint64(seed), 2))
	if err := workload(l, m, rng, 45); err != nil {
		t.Fatal(err)
	}
	closeLog(t, l)
	mem.OnCall(nil)
	if m.bad != nil {
		t.Fatal(m.bad)
	}
}

// recoverCut opens what a crash left and checks it, then writes on and checks again after a clean stop. With again, it cuts
// the power once more before each call of all that.
func recoverCut(cut *vfs.Mem, cfg Config, s *model, least int, again bool, points *atomic.Int64) error {
	cfg.FS, cfg.BootID = cut, cfg.BootID+"+"
	var inner error
	var mu sync.Mutex
	now := *newModelOf(s)
	if again {
		cut.OnCall(func(c vfs.Call) {
			mu.Lock()
			defer mu.Unlock()
			if inner != nil {
				return
			}
			second := now.snapshot()
			points.Add(1)
			image := cut.Crash(c.Seq, 0.5)
			// Before the first recovery ended nothing more was promised than before it.
			if err := recoverCut(image, cfg, &second, second.durable, false, points); err != nil {
				inner = fmt.Errorf("cut again before call %d (%s %s): %w", c.Seq, c.Op, c.Path, err)
			}
		})
	}
	l, replayed, err := now.recover(cfg, least)
	if err != nil {
		return err
	}
	// The survivors are the history now, and durable.
	n := s.released
	if len(replayed) > 0 {
		n = int(replayed[len(replayed)-1].Seq)
	}
	now.mu.Lock()
	now.issued = now.issued[:n:n]
	now.written, now.durable = n, n
	now.mu.Unlock()
	rng := rand.New(rand.NewPCG(uint64(n), 3))
	for range 4 {
		ok, err := now.append(l, rng, 2)
		if err != nil {
			return errors.Join(err, l.Close())
		}
		if !ok { // full since the crash, or a slot is being made: as the core would do after a checkpoint
			now.release(l, now.snapshot().written)
			if err := l.WaitSpace(testContext); err != nil {
				return errors.Join(err, l.Close())
			}
		}
		l.Kick()
	}
	if err := now.sync(l); err != nil {
		return errors.Join(err, l.Close())
	}
	if err := errors.Join(now.bad, l.Close(), inner); err != nil {
		return err
	}
	cut.OnCall(nil)
	l, _, err = now.recover(cfg, now.durable)
	if err != nil {
		return fmt.Errorf("after writing on: %w", err)
	}
	return l.Close()
}

func newModelOf(s *model) *model {
	return &model{issued: s.issued[:len(s.issued):len(s.issued)], written: s.written, durable: s.durable, released: s.released}
}

// TestKillLosesNothingWritten kills the process before each call: all that was told to the sinks is there.
func TestKillLosesNothingWritten(t *testing.T) {
	mem := vfs.NewMem(3)
	cfg := testConfig(mem)
	m := &model{}
	var hookMu sync.Mutex
	var points atomic.Int64
	mem.OnCall(func(c vfs.Call) {
		hookMu.Lock()
		defer hookMu.Unlock()
		s := m.snapshot()
		if c.Seq%3 != 0 || t.Failed() {
			return
		}
		points.Add(1)
		if err := recoverCut(mem.Kill(), cfg, &s, s.written, c.Seq%30 == 0, &points); err != nil {
			t.Errorf("kill before call %d (%s %s): %v", c.Seq, c.Op, c.Path, err)
		}
	})
	l, _, err := m.recover(cfg, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := workload(l, m, rand.New(rand.NewPCG(4, 4)), 100); err != nil {
		t.Fatal(err)
	}
	mem.OnCall(nil)
	closeLog(t, l)
	t.Logf("%d kills", points.Load())
}

// TestEveryCallFailsOnce fails each write and sync in turn, writes also half done: the log is fenced, says so, and what was
// durable comes back.
func TestEveryCallFailsOnce(t *testing.T) {
	for _, after := range []int{0, 40, 4196} {
		t.Run(fmt.Sprintf("after=%d", after), func(t *testing.T) { everyCallFailsOnce(t, after) })
	}
}

func everyCallFailsOnce(t *testing.T, after int) {
	fired := 0
	ops := vfs.OpWrite
	if after == 0 {
		ops |= vfs.OpSync | vfs.OpDatasync
	}
	for n := int64(1); ; n++ {
		mem := vfs.NewMem(n)
		errs := vfs.NewErrors(mem)
		cfg := testConfig(errs)
		if after == 40 {
			cfg.Segments = 3 // no slot in reserve: each roll overwrites the header of what has just been freed
		}
		hit := errs.Inject(vfs.Fault{Op: ops, From: n, Times: 1, Err: syscall.EIO, After: after})
		m := &model{}
		l, _, err := m.recover(cfg, 0)
		if err == nil {
			err = workload(l, m, rand.New(rand.NewPCG(5, 5)), 30)
			if err != nil && (!errors.Is(err, blockio.ErrFenced) || !errors.Is(err, syscall.EIO)) {
				t.Fatalf("call %d failed: %v", n, err)
			}
			if err != nil {
				<-l.Failed()
				for _, e := range []error{l.Err(), l.SyncInline(1), l.Append(m.next(rand.New(rand.NewPCG(1, 1)), 1), nil, m, true, nil, 0)} {
					if e == nil {
						t.Fatalf("call %d failed and the log goes on", n)
					}
				}
			}
			fenced := l.Err() != nil
			if cerr := l.Close(); fenced != (cerr != nil) && hit.Fired() == 0 {
				t.Fatalf("call %d: close: %v", n, cerr)
			}
		}
		if hit.Fired() == 0 {
			break
		}
		fired++
		for i, rate := range []float64{0, 0.5, 1} {
			s := m.snapshot()
			cut := mem.Crash(n*3+int64(i), rate)
			if err := recoverCut(cut, testConfig(cut), &s, s.durable, false, &atomic.Int64{}); err != nil {
				t.Fatalf("call %d failed, survival %v: %v", n, rate, err)
			}
		}
		s := m.snapshot()
		kill := mem.Kill()
		if err := recoverCut(kill, testConfig(kill), &s, s.durable, false, &atomic.Int64{}); err != nil {
			t.Fatalf("call %d failed, killed: %v", n, err)
		}
	}
	if fired < 25 {
		t.Fatalf("only %d calls failed", fired)
	}
	t.Logf("%d calls failed in turn", fired)
}

// TestFailedSyncIsNotTrustedAfterwards: the kernel forgets that the pages of a failed sync are dirty. The process dies, the
// next one finds all of them in memory, promises them, and then the power fails. Also when the marker could not be written.
func TestFailedSyncIsNotTrustedAfterwards(t *testing.T) {
	for seed := range int64(20) {
		mem := vfs.NewMem(seed)
		errs := vfs.NewErrors(mem)
		cfg := testConfig(errs)
		m := &model{}
		l, _, err := m.recover(cfg, 0)
		if err != nil {
			t.Fatal(err)
		}
		rng := rand.New(rand.NewPCG(uint64(seed), 6))
		if err := workload(l, m, rng, 10+int(seed)); err != nil {
			t.Fatal(err)
		}
		if seed%2 == 1 {
			errs.Inject(vfs.Fault{Path: fencedName, Err: syscall.EIO})
		}
		m.release(l, m.written)
		waitSlots(t, l)
		l.mu.Lock()
		tail := path.Base(l.tail.path) // the segment in use: a slot that is being made meanwhile may be given up
		l.mu.Unlock()
		mem.FailSync(tail, 1)
		if ok, err := m.append(l, rng, 2); err != nil || !ok {
			t.Fatal(ok, err)
		}
		l.Kick()
		if err := m.sync(l); !errors.Is(err, blockio.ErrFenced) {
			t.Fatal(err)
		}
		<-l.Failed()
		s := m.snapshot()
		killed := mem.Kill()
		cfg = testConfig(killed)
		next := newModelOf(&s)
		l2, replayed, err := next.recover(cfg, s.durable)
		if err != nil {
			t.Fatal(err)
		}
		if seed%2 == 0 && l2.Verifier() == l.Verifier() {
			t.Fatal("the verifier did not change after a failed sync")
		}
		n := s.released
		if len(replayed) > 0 {
			n = int(replayed[len(replayed)-1].Seq)
		}
		if n != s.written {
			t.Fatalf("the kill lost records after %d of %d", n, s.written)
		}
		cut := killed.Crash(seed, 0)
		if err := recoverCut(cut, testConfig(cut), &s, n, false, &atomic.Int64{}); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		closeLog(t, l2)
		if err := l.Close(); !errors.Is(err, blockio.ErrFenced) {
			t.Fatal(err)
		}
	}
}

// TestLyingSync: a sync that did nothing can lose what was promised, but never leaves a hole: a prefix or a refusal.
func TestLyingSync(t *testing.T) {
	refused, short, whole := 0, 0, 0
	for seed := range int64(120) {
		mem := vfs.NewMem(seed)
		cfg := testConfig(mem)
		m := &model{}
		l, _, err := m.recover(cfg, 0)
		if err != nil {
			t.Fatal(err)
		}
		rng := rand.New(rand.NewPCG(uint64(seed), 7))
		if err := workload(l, m, rng, 5+rng.IntN(20)); err != nil {
			t.Fatal(err)
		}
		mem.LieSync("seg-*", 1)
		if err := workload(l, m, rng, 2+rng.IntN(8)); err != nil {
			t.Fatal(err)
		}
		s := m.snapshot()
		cut := mem.Crash(seed, float64(seed%5)/4)
		closeLog(t, l)
		got := newModelOf(&s)
		l2, replayed, err := got.recover(testConfig(cut), 0)
		switch {
		case errors.Is(err, ErrCorrupt):
			refused++
			continue
		case err != nil:
			t.Fatalf("seed %d: %v", seed, err)
		case len(replayed) > 0 && int(replayed[len(replayed)-1].Seq) < s.durable:
			short++
		default:
			whole++
		}
		closeLog(t, l2)
	}
	if refused+short == 0 || whole == 0 {
		t.Fatalf("%d refused, %d short, %d whole: the test does not test", refused, short, whole)
	}
	t.Logf("%d refused, %d short, %d whole", refused, short, whole)
}

// waitSlots waits until the log has made all its slots.
func waitSlots(t *testing.T, l *Log) {
	t.Helper()
	for range 1000 {
		l.mu.Lock()
		n := l.slotCount
		l.mu.Unlock()
		if n >= 2+l.limits.reserve || n >= l.cfg.Segments {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatal("no slots")
}
