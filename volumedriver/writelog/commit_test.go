package writelog

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"varve/volumedriver/blockio"
	"varve/volumedriver/vfs"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// order notes the order in which things are told.
type order struct {
	mu   sync.Mutex
	said []string
}

func (o *order) say(format string, a ...any) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.said = append(o.said, fmt.Sprintf(format, a...))
}

func (o *order) Logged(g *Logged)              { o.say("logged %d in %d", g.Seq, g.Batch) }
func (o *order) LogFailed(seq uint64, _ error) { o.say("failed %d", seq) }
func (o *order) Done(tag uint64, err error)    { o.say("done %d %v", tag, err) }
func (o *order) Settle(bool)                   { o.say("settle") }

func (o *order) is(t *testing.T, want ...string) {
	t.Helper()
	o.mu.Lock()
	defer o.mu.Unlock()
	if !slices.Equal(o.said, want) {
		t.Fatalf("got %q, want %q", o.said, want)
	}
}

// zeroRecord is a record without payload.
func zeroRecord(seq uint64) Record {
	return Record{Volume: volumeA, Seq: seq, Kind: Zero, LBA: seq, Blocks: 1}
}

func TestSinksThenEndsThenOneSettle(t *testing.T) {
	l := mustOpen(t, testConfig(vfs.NewMem(1)))
	defer closeLog(t, l)
	o := &order{}
	for seq := uint64(1); seq <= 2; seq++ {
		if err := l.Append(zeroRecord(seq), nil, o, false, o, seq); err != nil {
			t.Fatal(err)
		}
	}
	o.is(t)
	l.Kick()
	o.is(t, "logged 1 in 1", "logged 2 in 1", "done 1 <nil>", "done 2 <nil>", "settle")
	l.Kick()
	if l.Written() != 1 || l.OpenBatch() != 2 || l.Durable() != 0 {
		t.Fatal(l.Written(), l.OpenBatch(), l.Durable())
	}
}

func TestSyncRequestEndsWhenDurable(t *testing.T) {
	l := mustOpen(t, testConfig(vfs.NewMem(1)))
	defer closeLog(t, l)
	e, m := newEnds(), &order{}
	if err := l.Append(zeroRecord(1), nil, m, true, e, 7); err != nil {
		t.Fatal(err)
	}
	l.Kick()
	if err := e.wait(t, 7); err != nil || l.Durable() != 1 {
		t.Fatal(err, l.Durable())
	}
	if !l.SyncAsync(1, e, 8) {
		t.Fatal("durable already")
	}
	// A flush of a batch that is still open ends after that batch is kicked.
	if err := l.Append(zeroRecord(2), nil, m, false, nil, 0); err != nil {
		t.Fatal(err)
	}
	if l.SyncAsync(l.OpenBatch(), e, 9) {
		t.Fatal("not durable yet")
	}
	l.Kick()
	if err := e.wait(t, 9); err != nil || l.Durable() != 2 {
		t.Fatal(err, l.Durable())
	}
	// Nothing is in the open batch: nothing to wait for.
	for _, upto := range []uint64{0, 2, 3, 100} {
		if err := l.Sync(testContext, upto); err != nil {
			t.Fatal(err)
		}
		if err := l.SyncInline(upto); err != nil {
			t.Fatal(err)
		}
	}
	// Sync commits what is open.
	if err := l.Append(zeroRecord(3), nil, m, false, nil, 0); err != nil {
		t.Fatal(err)
	}
	if err := l.Sync(testContext, 3); err != nil || l.Durable() != 3 {
		t.Fatal(err, l.Durable())
	}
}

// TestKickSyncIsDurableOnReturn: without a syncer, what a lone client waits for is durable and told when KickSync returns.
func TestKickSyncIsDurableOnReturn(t *testing.T) {
	l, err := openIdle(testConfig(vfs.NewMem(1)), func(*Logged, int) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	defer closeLog(t, l)
	o := &order{}
	if err := l.Append(zeroRecord(1), nil, o, true, o, 1); err != nil {
		t.Fatal(err)
	}
	l.KickSync()
	o.is(t, "logged 1 in 1", "done 1 <nil>", "settle")
	if l.Durable() != 1 || l.syncs.Load() != 1 {
		t.Fatal(l.Durable(), l.syncs.Load())
	}
	// What nobody waits for is not synced, and a Kick by others wakes the syncer again.
	if err := l.Append(zeroRecord(2), nil, o, false, nil, 0); err != nil {
		t.Fatal(err)
	}
	l.KickSync()
	l.KickSync()
	if l.Written() != 2 || l.Durable() != 1 || l.purpose != kicked {
		t.Fatal(l.Written(), l.Durable(), l.purpose)
	}
}

// TestKickSyncFails: the sync that KickSync carries out fails as any other, once.
func TestKickSyncFails(t *testing.T) {
	errs := vfs.NewErrors(vfs.NewMem(1))
	l := mustOpen(t, testConfig(errs))
	waitSlots(t, l)
	e, m := newEnds(), &order{}
	fault := errs.Inject(vfs.Fault{Op: vfs.OpDatasync | vfs.OpSync, Path: "seg-*", Err: syscall.EIO})
	if err := l.Append(zeroRecord(1), nil, m, true, e, 1); err != nil {
		t.Fatal(err)
	}
	l.KickSync()
	if err := e.wait(t, 1); !errors.Is(err, blockio.ErrFenced) || l.Durable() != 0 {
		t.Fatal(err, l.Durable())
	}
	if err := l.Close(); !errors.Is(err, blockio.ErrFenced) || fault.Fired() != 1 {
		t.Fatal(err, fault.Fired())
	}
}

// starting is a file system whose files note what StartWrite is told.
type starting struct {
	vfs.FS
	started chan [2]int64
}

func (s starting) OpenFile(name string, flag int, perm fs.FileMode) (vfs.File, error) {
	f, err := s.FS.OpenFile(name, flag, perm)
	return startingFile{f, s.started}, err
}

type startingFile struct {
	vfs.File
	started chan [2]int64
}

func (f startingFile) StartWrite(off, n int64) { f.started <- [2]int64{off, n} }

// TestDeviceBeginsBeforeTheSync: with what is waited for, or will be, and with nothing else.
func TestDeviceBeginsBeforeTheSync(t *testing.T) {
	began := make(chan [2]int64, 10)
	l := mustOpen(t, testConfig(starting{vfs.NewMem(1), began}))
	defer closeLog(t, l)
	o, e := &order{}, newEnds()
	at := func(want ...[2]int64) {
		t.Helper()
		for _, w := range want {
			if len(began) == 0 || <-began != w {
				t.Fatalf("the device did not begin with %v", w)
			}
		}
		if len(began) > 0 {
			t.Fatalf("the device began with %v", <-began)
		}
	}
	append1 := func(seq uint64, sync bool) {
		t.Helper()
		if err := l.Append(zeroRecord(seq), nil, o, sync, e, seq); err != nil {
			t.Fatal(err)
		}
	}
	append1(1, false)
	l.Kick()
	at()
	append1(2, false)
	l.KickAhead()
	at([2]int64{2 * blockSize, blockSize})
	append1(3, true)
	l.Kick()
	if err := e.wait(t, 3); err != nil {
		t.Fatal(err)
	}
	at([2]int64{3 * blockSize, blockSize})
	append1(4, false)
	l.Kick()
	at()
}

func TestAppendAllIsOneBatch(t *testing.T) {
	mem := vfs.NewMem(1)
	cfg := testConfig(mem)
	m := &model{}
	l, _, err := m.recover(cfg, 0)
	if err != nil {
		t.Fatal(err)
	}
	m.issued = []Record{
		{Volume: volumeA, Seq: 1, Kind: Data, LBA: 4, Blocks: 2},
		{Volume: volumeA, Seq: 2, Kind: Zero, LBA: 9, Blocks: 3},
		{Volume: volumeA, Seq: 3, Kind: Mark, Value: 5},
		{Volume: volumeA, Seq: 4, Kind: Data, LBA: 7, Blocks: 1},
	}
	payload := append(payloadOf(&m.issued[0]), payloadOf(&m.issued[3])...)
	e := newEnds()
	if err := l.AppendAll(m.issued, payload, m, false, e, 1); err != nil {
		t.Fatal(err)
	}
	l.Kick()
	if err := e.wait(t, 1); err != nil || m.bad != nil || m.written != 4 || m.logged[3].Batch != 1 {
		t.Fatal(err, m.bad, m.written)
	}
	closeLog(t, l)
	l, _, err = m.recover(cfg, 4)
	if err != nil {
		t.Fatal(err)
	}
	closeLog(t, l)
}

func TestRefusals(t *testing.T) {
	l := mustOpen(t, testConfig(vfs.NewMem(1)))
	o := &order{}
	block := make([]byte, blockSize)
	for name, c := range map[string]struct {
		r       Record
		payload []byte
	}{
		"kind 0":          {Record{}, nil},
		"kind 9":          {Record{Kind: 9}, nil},
		"no blocks":       {Record{Kind: Data}, nil},
		"too many blocks": {Record{Kind: Data, Blocks: RecordBlocksMax + 1}, make([]byte, (RecordBlocksMax+1)*blockSize)},
		"short payload":   {Record{Kind: Data, Blocks: 2}, block},
		"zero's payload":  {Record{Kind: Zero, Blocks: 1}, block},
		"overflow":        {Record{Kind: Zero, LBA: 2, Blocks: ^uint64(0)}, nil},
		"over a batch":    {Record{Kind: Data, Blocks: 200}, make([]byte, 200*blockSize)},
	} {
		for _, err := range []error{
			l.Append(c.r, c.payload, o, false, o, 1),
			l.AppendAll([]Record{c.r}, c.payload, o, false, o, 1),
		} {
			if err == nil || errors.Is(err, blockio.ErrBusy) || errors.Is(err, blockio.ErrFenced) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	if err := l.AppendAll(nil, nil, o, false, o, 1); err == nil {
		t.Error("no records")
	}
	l.Kick()
	o.is(t)
	closeLog(t, l)
	if err := l.Append(zeroRecord(1), nil, o, false, o, 1); !errors.Is(err, blockio.ErrClosed) {
		t.Error(err)
	}
	if err := l.WaitSpace(testContext); !errors.Is(err, blockio.ErrClosed) {
		t.Error(err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

func TestFullBatchIsBusyUntilCommitted(t *testing.T) {
	l := mustOpen(t, testConfig(vfs.NewMem(1)))
	defer closeLog(t, l)
	m, rng := &model{}, rand.New(rand.NewPCG(1, 1))
	for {
		ok, err := m.append(l, rng, 1)
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			break
		}
	}
	if err := l.WaitSpace(testContext); err != nil {
		t.Fatal(err)
	}
	if ok, err := m.append(l, rng, 1); !ok || err != nil || l.Written() != 1 || m.bad != nil {
		t.Fatal(ok, err, l.Written(), m.bad)
	}
}

// fill appends and commits until the log is full.
func fill(t *testing.T, l *Log, m *model, rng *rand.Rand) {
	t.Helper()
	for busy := 0; busy < 2; {
		r := Record{Volume: volumeA, Seq: uint64(len(m.issued) + 1), Kind: Data, Blocks: 1 + rng.Uint64N(3)}
		if rng.IntN(2) == 0 {
			r.Volume = volumeB
		}
		m.mu.Lock()
		m.issued = append(m.issued, r)
		m.mu.Unlock()
		err := l.Append(r, payloadOf(&r), m, false, nil, 0)
		l.Kick()
		switch {
		case errors.Is(err, blockio.ErrBusy):
			m.mu.Lock()
			m.issued = m.issued[:len(m.issued)-1]
			m.mu.Unlock()
			if l.Stats().SegmentsUsed < l.cfg.Segments-l.limits.reserve {
				if err := l.WaitSpace(testContext); err != nil { // a slot is being made
					t.Fatal(err)
				}
				continue
			}
			busy++
		case err != nil:
			t.Fatal(err)
		}
	}
}

func TestFullLogAndRelease(t *testing.T) {
	mem := vfs.NewMem(1)
	cfg := testConfig(mem)
	m, rng := &model{}, rand.New(rand.NewPCG(1, 1))
	l, _, err := m.recover(cfg, 0)
	if err != nil {
		t.Fatal(err)
	}
	fill(t, l, m, rng)
	if s := l.Stats(); s.SegmentsUsed != 4 || s.SegmentsTotal != 5 || s.Occupancy < 0.7 {
		t.Fatalf("%+v", s)
	}
	if gen, volumes := l.Oldest(); gen != 1 || len(volumes) != 2 {
		t.Fatal(gen, volumes)
	}
	ctx, cancel := context.WithTimeoutCause(testContext, 20*time.Millisecond, errors.New("patience"))
	defer cancel()
	if err := l.WaitSpace(ctx); err == nil {
		t.Fatal("space in a full log")
	}
	// What frees space may go on for a while.
	for range 5 {
		m.mu.Lock()
		r := zeroRecord(uint64(len(m.issued) + 1))
		m.issued = append(m.issued, r)
		m.mu.Unlock()
		if err := l.Append(r, nil, m, false, nil, 0); err != nil {
			t.Fatal(err)
		}
		l.Kick()
	}
	// One volume alone does not free the segments.
	half := uint64(len(m.issued) / 2)
	l.Release(volumeA, half)
	if gen, volumes := l.Oldest(); gen != 1 || len(volumes) != 1 || volumes[0] != volumeB {
		t.Fatal(gen, volumes)
	}
	woken := make(chan error)
	go func() { woken <- l.WaitSpace(testContext) }()
	l.Release(volumeB, half)
	if err := <-woken; err != nil {
		t.Fatal(err)
	}
	m.released = int(half)
	// The freed segments' Locs go stale when they are written again, and never give other bytes.
	for round := range 6 {
		fill(t, l, m, rng)
		for i := range m.logged {
			err := readBack(l, &m.logged[i])
			if err != nil && (!errors.Is(err, ErrStale) || int(m.logged[i].Seq) > m.released) {
				t.Fatalf("round %d: record %d of %d: %v", round, m.logged[i].Seq, len(m.issued), err)
			}
			if round > 1 && i == 0 && !errors.Is(err, ErrStale) {
				t.Fatal("the first record's segment was recycled, but is not stale")
			}
		}
		m.release(l, len(m.issued)-10)
	}
	if m.bad != nil {
		t.Fatal(m.bad)
	}
	closeLog(t, l)
	if l, _, err = m.recover(cfg, m.written); err != nil {
		t.Fatal(err)
	}
	// After a restart the survivors hold their segments until they are released.
	fill(t, l, m, rng)
	l.Forget(volumeA)
	if _, volumes := l.Oldest(); len(volumes) > 1 {
		t.Fatal(volumes)
	}
	l.Forget(volumeB)
	if s := l.Stats(); s.SegmentsUsed != 1 {
		t.Fatalf("%+v", s)
	}
	if len(l.volumes) > 2 {
		t.Fatal("forgotten volumes are kept")
	}
	closeLog(t, l)
}

func TestSkippedRecordsHoldNothing(t *testing.T) {
	mem := vfs.NewMem(1)
	cfg := testConfig(mem)
	m, rng := &model{}, rand.New(rand.NewPCG(1, 1))
	l, _, err := m.recover(cfg, 0)
	if err != nil {
		t.Fatal(err)
	}
	fill(t, l, m, rng)
	closeLog(t, l)
	l, err = Open(cfg, func(*Logged, int) error { return Skip })
	if err != nil {
		t.Fatal(err)
	}
	l.Release(volumeA, 1)
	for range 3 {
		fill(t, l, m, rng)
		m.release(l, len(m.issued))
	}
	closeLog(t, l)
	boom := errors.New("boom")
	if _, err := Open(cfg, func(*Logged, int) error { return boom }); !errors.Is(err, boom) {
		t.Fatal(err)
	}
	closeLog(t, mustOpen(t, cfg))
}

// TestDiskFullWhileGrowing: no space for a new slot is a full log, not a broken one.
func TestDiskFullWhileGrowing(t *testing.T) {
	mem := vfs.NewMem(1)
	cfg := testConfig(mem)
	cfg.NoPrewrite = false
	errs := vfs.NewErrors(mem)
	cfg.FS = errs
	full := errs.Inject(vfs.Fault{Op: vfs.OpPreallocate | vfs.OpWrite, Path: "seg-002.log", Err: syscall.ENOSPC})
	m, rng := &model{}, rand.New(rand.NewPCG(1, 1))
	l, _, err := m.recover(cfg, 0)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(testContext, 50*time.Millisecond)
	defer cancel()
	for ctx.Err() == nil {
		ok, err := m.append(l, rng, 2)
		if err != nil {
			t.Fatal(err)
		}
		l.Kick()
		if !ok {
			if err := l.WaitSpace(ctx); err != nil && !errors.Is(err, context.DeadlineExceeded) {
				t.Fatal(err)
			}
		}
	}
	if l.Err() != nil || full.Fired() == 0 {
		t.Fatal(l.Err(), full.Fired())
	}
	if err := m.sync(l); err != nil {
		t.Fatal(err)
	}
	full.Remove()
	if err := l.WaitSpace(testContext); err != nil { // the preparer tries again by itself
		t.Fatal(err)
	}
	if ok, err := m.append(l, rng, 2); !ok || err != nil {
		t.Fatal(ok, err)
	}
	closeLog(t, l)
	if l, _, err = m.recover(cfg, m.written); err != nil {
		t.Fatal(err)
	}
	closeLog(t, l)
}

// TestFenceEndsAllRequests: after a failed sync all that wait are told, in order, and nothing is acknowledged.
func TestFenceEndsAllRequests(t *testing.T) {
	mem := vfs.NewMem(1)
	errs := vfs.NewErrors(mem)
	l := mustOpen(t, testConfig(errs))
	waitSlots(t, l)
	e, m := newEnds(), &order{}
	fault := errs.Inject(vfs.Fault{Op: vfs.OpDatasync | vfs.OpSync, Path: "seg-*", Err: syscall.EIO, Delay: 20 * time.Millisecond})
	for seq := uint64(1); seq <= 3; seq++ {
		if err := l.Append(zeroRecord(seq), nil, m, true, e, seq); err != nil {
			t.Fatal(err)
		}
	}
	l.Kick()
	if err := l.Append(zeroRecord(4), nil, m, false, e, 4); err != nil {
		t.Fatal(err)
	}
	for tag := uint64(1); tag <= 4; tag++ {
		if err := e.wait(t, tag); !errors.Is(err, blockio.ErrFenced) || !errors.Is(err, syscall.EIO) {
			t.Fatal(tag, err)
		}
	}
	<-l.Failed()
	if l.SyncAsync(1, e, 5) {
		t.Fatal("durable")
	}
	if err := e.wait(t, 5); !errors.Is(err, blockio.ErrFenced) {
		t.Fatal(err)
	}
	for _, err := range []error{l.SyncInline(1), l.Sync(testContext, 1), l.WaitSpace(testContext), l.Close()} {
		if !errors.Is(err, blockio.ErrFenced) {
			t.Fatal(err)
		}
	}
	m.is(t, "logged 1 in 1", "logged 2 in 1", "logged 3 in 1", "failed 4")
	if fault.Fired() != 1 {
		t.Fatalf("%d syncs after the failed one", fault.Fired()-1)
	}
}

func TestConcurrent(t *testing.T) {
	mem := vfs.NewMem(1)
	cfg := testConfig(mem)
	cfg.SegmentBytes, cfg.Segments = 1<<20, 6
	l := mustOpen(t, cfg)
	const writers, each = 6, 150
	var wg sync.WaitGroup
	var mu sync.Mutex
	sinks := make([]*model, writers)
	for w := range writers {
		m := &model{}
		sinks[w] = m
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 9))
			volume := volumeA
			volume[15] = byte(w)
			e := newEnds()
			buf := make([]byte, blockSize)
			for i := range each {
				r := Record{Volume: volume, Seq: uint64(i + 1), Kind: Data, LBA: rng.Uint64N(100), Blocks: 1 + rng.Uint64N(4)}
				m.mu.Lock()
				m.issued = append(m.issued, r)
				m.mu.Unlock()
				wait := i%3 == 0
				for {
					err := l.Append(r, payloadOf(&r), m, wait, e, r.Seq)
					if err == nil {
						break
					}
					if !errors.Is(err, blockio.ErrBusy) {
						t.Error(err)
						return
					}
					l.Release(volume, uint64(i)) // as a destager would: all but this one has been written by now
					if err := l.WaitSpace(testContext); err != nil {
						t.Error(err)
						return
					}
				}
				[]func(){l.Kick, l.KickSync, l.KickAhead}[i%3]()
				switch i % 4 {
				case 0:
					if err := e.wait(t, r.Seq); err != nil {
						t.Error(err)
						return
					}
					m.mu.Lock()
					g := m.logged[i]
					m.mu.Unlock()
					if wait && l.Durable() < g.Batch {
						t.Error("ended before it was durable")
					}
					if err := readBack(l, &g); err != nil && !errors.Is(err, ErrStale) {
						t.Error(err)
					}
				case 1:
					if err := l.SyncInline(l.Written()); err != nil {
						t.Error(err)
					}
				case 2:
					if err := l.Sync(testContext, l.OpenBatch()); err != nil {
						t.Error(err)
					}
				case 3:
					if err := l.TryReadAt(buf, m.snapshotLoc()); err != nil && !errors.Is(err, ErrStale) && !errors.Is(err, vfs.ErrWouldBlock) {
						t.Error(err)
					}
				}
				if i%10 == 9 {
					l.Release(volume, uint64(i-5))
					mu.Lock()
					_ = l.Stats()
					_, _ = l.Oldest()
					mu.Unlock()
				}
			}
			for i := range each {
				if err := e.wait(t, uint64(i+1)); err != nil {
					t.Error(err)
				}
			}
			l.Release(volume, each)
		})
	}
	wg.Wait()
	closeLog(t, l)
	for w, m := range sinks {
		if m.bad != nil || m.written != each {
			t.Fatal(w, m.bad, m.written)
		}
	}
}

func (m *model) snapshotLoc() Loc {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.logged) == 0 {
		return makeLoc(0, 0, 1)
	}
	return m.logged[0].Loc
}

// racing is a file whose segment is recycled while it is read.
type racing struct {
	vfs.File
	during func()
}

func (f racing) ReadAt(p []byte, off int64) (int, error) {
	defer f.during()
	return f.File.ReadAt(p, off)
}

func (f racing) TryReadAt(p []byte, off int64) error {
	defer f.during()
	return f.File.TryReadAt(p, off)
}

func TestReadDuringRecycle(t *testing.T) {
	l := mustOpen(t, testConfig(vfs.NewMem(1)))
	defer closeLog(t, l)
	s, p := l.tail, make([]byte, blockSize)
	loc := makeLoc(s.slot, 1, 2)
	s.file = racing{s.file, func() { s.gen.Add(1) }}
	if err := l.ReadAt(p, loc); !errors.Is(err, ErrStale) {
		t.Fatal(err)
	}
	loc = makeLoc(s.slot, 2, 2)
	if err := l.TryReadAt(p, loc); !errors.Is(err, ErrStale) {
		t.Fatal(err)
	}
	if err := l.ReadAt(p, loc); !errors.Is(err, ErrStale) {
		t.Fatal(err)
	}
	for _, loc := range []Loc{makeLoc(s.slot, 3, 0), makeLoc(s.slot, 3, 32), makeLoc(77, 3, 2)} {
		if err := l.ReadAt(p, loc); err == nil {
			t.Fatalf("read outside of a segment at %x", uint64(loc))
		}
	}
}

// nothing is a sink and completer that does nothing.
type nothing struct{}

func (*nothing) Logged(*Logged)          {}
func (*nothing) LogFailed(uint64, error) {}
func (*nothing) Done(uint64, error)      {}
func (*nothing) Settle(bool)             {}

// discard is a file system whose writes go nowhere.
type discard struct{ vfs.File }

func (discard) WritevAt(bufs [][]byte, _ int64) (int, error) {
	n := 0
	for _, b := range bufs {
		n += len(b)
	}
	return n, nil
}

func TestAppendAllocatesNothing(t *testing.T) {
	cfg := testConfig(vfs.NewMem(1))
	cfg.SegmentBytes, cfg.BatchBytes = 64<<20, 1<<20
	l := mustOpen(t, cfg)
	l.tail.file = discard{l.tail.file}
	s, p := &nothing{}, make([]byte, blockSize)
	r := Record{Volume: volumeA, Kind: Data, Blocks: 1}
	allocs := testing.AllocsPerRun(1000, func() {
		r.Seq++
		if err := l.Append(r, p, s, false, s, r.Seq); err != nil {
			t.Fatal(err)
		}
		l.Kick()
	})
	if allocs != 0 {
		t.Fatalf("%v allocations per append", allocs)
	}
	closeLog(t, l)
}

func benchLog(b *testing.B) *Log {
	l := mustOpen(b, Config{FS: vfs.OS(), Dir: b.TempDir(), Segments: 4})
	b.Cleanup(func() {
		if err := l.Close(); err != nil {
			b.Fatal(err)
		}
	})
	b.SetBytes(blockSize)
	b.ReportAllocs()
	return l
}

func benchAppend(b *testing.B, l *Log, depth int, after func()) {
	s, p := &nothing{}, make([]byte, blockSize)
	r := Record{Volume: volumeA, Kind: Data, Blocks: 1}
	for b.Loop() {
		for range depth {
			r.Seq++
			for {
				err := l.Append(r, p, s, false, s, r.Seq)
				if err == nil {
					break
				}
				l.Release(volumeA, r.Seq)
				if err := l.WaitSpace(testContext); err != nil {
					b.Fatal(err)
				}
			}
		}
		l.Kick()
		after()
		if r.Seq%1024 == 0 {
			l.Release(volumeA, r.Seq)
		}
	}
	b.SetBytes(int64(depth) * blockSize)
}

func BenchmarkAppendKick(b *testing.B) {
	for _, depth := range []int{1, 16, 64} {
		b.Run(fmt.Sprintf("depth=%d", depth), func(b *testing.B) {
			benchAppend(b, benchLog(b), depth, func() {})
		})
	}
}

func BenchmarkAppendSync(b *testing.B) {
	for _, depth := range []int{1, 16} {
		b.Run(fmt.Sprintf("depth=%d", depth), func(b *testing.B) {
			l := benchLog(b)
			benchAppend(b, l, depth, func() {
				if err := l.SyncInline(l.Written()); err != nil {
					b.Fatal(err)
				}
			})
		})
	}
}
