package volumedriver

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"go.uber.org/goleak"

	"varve/volumedriver/backend"
	"varve/volumedriver/backend/backendtest"
	"varve/volumedriver/blockio"
	"varve/volumedriver/sco"
	"varve/volumedriver/vfs"
	"varve/volumedriver/writelog"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	lazy  = shapes[0]
	eager = shapes[1]
)

// startOn is start with a backend of the caller's.
func startOn(t *testing.T, fsys vfs.FS, s shape, b backend.Backend, deadline time.Duration) *Driver {
	t.Helper()
	d, err := Open(Config{FS: fsys, Dir: "/data", LogBytes: s.log, SegmentBytes: s.seg, BatchBytes: int(s.seg / 4), MapBudgetBytes: s.mapBudget,
		SCOBytes: s.sco, CheckpointBytes: s.cp, NoPrewrite: true, sealAge: s.sealAge, retryMax: 5 * time.Millisecond,
		CheckpointEvery: 20 * time.Millisecond, DrainDeadline: deadline})
	must(t, err)
	d.AddPool(testPool, b)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		<-ended
		_ = d.Close()
	})
	return d
}

func create(t *testing.T, d *Driver, id uuid.UUID, size int64) *Volume {
	t.Helper()
	v, err := d.Create(context.Background(), Spec{ID: id, Pool: testPool, Epoch: 1, Size: size, PoolName: "default", Path: id.String() + ".raw", Kind: "disk"})
	must(t, err)
	return v
}

func block(value uint64) []byte {
	p := make([]byte, blockSize)
	stampBlock(p, value)
	return p
}

// TestTrimWholeDevice: a trim of 1 TiB costs what is mapped, and block status over it is a few steps.
func TestTrimWholeDevice(t *testing.T) {
	ctx := context.Background()
	d := startOn(t, vfs.NewMem(1), eager, backendtest.NewMem(), time.Second)
	const size = 1 << 40
	v := create(t, d, testVolume, size)
	for i := range int64(64) {
		must(t, v.Write(ctx, block(7), i*(size/64), 0))
	}
	must(t, d.Drain(ctx))
	begin := time.Now()
	must(t, v.Zero(ctx, 0, size, blockio.FUA))
	if took := time.Since(begin); took > 100*time.Millisecond {
		t.Errorf("trim of 1 TiB took %s", took)
	}
	for _, drained := range []bool{false, true} {
		begin = time.Now()
		es, err := v.Extents(ctx, 0, size, 100)
		must(t, err)
		if len(es) != 1 || !es[0].Hole || es[0].Length != size {
			t.Errorf("after the trim (drained %v): %v", drained, es)
		}
		t.Logf("block status of 1 TiB of nothing (drained %v): %s", drained, time.Since(begin))
		must(t, d.Drain(ctx))
	}
	if used := v.Used(); used != 0 {
		t.Errorf("%d bytes used after the trim", used)
	}
	p := make([]byte, blockSize)
	must(t, v.Read(ctx, p, 5*(size/64)))
	if !bytes.Equal(p, make([]byte, blockSize)) {
		t.Error("data came back after a trim")
	}
}

// TestBackendDown: while the backend is away the log takes writes until it is full; reads go on (reads_progress_while_log_full);
// then writes wait and, since nothing drains, fail with ErrNoSpace after the deadline; when the backend is back all drains
// (backend_down_30min_no_terminal_state) and nothing acknowledged is missing.
func TestBackendDown(t *testing.T) {
	ctx := context.Background()
	mem := backendtest.NewMem()
	fault := backendtest.NewFault(mem)
	tiny := shape{"down", 16 << 20, 4 << 20, 8 << 20, 1 << 20, time.Nanosecond, 1 << 20}
	d := startOn(t, vfs.NewMem(2), tiny, fault, 300*time.Millisecond)
	v := create(t, d, testVolume, 1<<30)
	must(t, v.Write(ctx, block(1), 0, blockio.FUA))
	must(t, d.Drain(ctx))
	fault.SetDown(true)
	written := int64(1)
	var full error
	for ; written < 5000; written++ {
		if full = v.Write(ctx, block(uint64(written+1)), written*blockSize, 0); full != nil {
			break
		}
	}
	if !errors.Is(full, blockio.ErrNoSpace) {
		t.Fatalf("after %d blocks into a log of 16 MiB: %v", written, full)
	}
	if h := d.PoolHealth(testPool); h.Err == "" || h.Since.IsZero() {
		t.Errorf("the outage does not show: %+v", h)
	}
	p := make([]byte, blockSize)
	for i := int64(1); i < written; i++ { // block 0 is on the backend
		must(t, v.Read(ctx, p, i*blockSize))
		if got, err := valueOf(p); err != nil || got != uint64(i+1) {
			t.Fatalf("block %d while the log is full: %d %v", i, got, err)
		}
	}
	if err := v.TryWrite(block(9), 0, 0, newWaiter(), 0); !errors.Is(err, blockio.ErrBusy) {
		t.Errorf("TryWrite into a full log: %v", err)
	}
	fault.SetDown(false)
	drain, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	must(t, d.Drain(drain))
	must(t, v.Write(ctx, block(4711), written*blockSize, blockio.FUA))
	for i := range written {
		must(t, v.Read(ctx, p, i*blockSize))
		if got, err := valueOf(p); err != nil || got != uint64(i+1) {
			t.Fatalf("block %d after the outage: %d %v", i, got, err)
		}
	}
	if h := d.PoolHealth(testPool); h.Err != "" {
		t.Errorf("the outage is over, yet %+v", h)
	}
}

// TestSlowBackendNoError: a backend slower than the writers slows them, and no write fails.
func TestSlowBackendNoError(t *testing.T) {
	ctx := context.Background()
	fault := backendtest.NewFault(backendtest.NewMem())
	fault.Add(backendtest.Spoil{Op: backendtest.OpPut, Delay: 20 * time.Millisecond})
	tiny := shape{"slow", 16 << 20, 4 << 20, 8 << 20, 1 << 20, time.Nanosecond, 1 << 20}
	d := startOn(t, vfs.NewMem(3), tiny, fault, 5*time.Second)
	v := create(t, d, testVolume, 1<<30)
	p := make([]byte, 256<<10)
	for i := range int64(240) { // 60 MiB through a log of 16
		stampBlock(p, uint64(i+1))
		must(t, v.Write(ctx, p, i*int64(len(p)), 0))
	}
	q := make([]byte, len(p))
	for i := range int64(240) {
		stampBlock(p, uint64(i+1))
		must(t, v.Read(ctx, q, i*int64(len(p))))
		if !bytes.Equal(p, q) {
			t.Fatalf("chunk %d differs", i)
		}
	}
}

// TestLostReplies: a Put whose outcome is unknown is tried under another name; the volume and its rebuild are right.
func TestLostReplies(t *testing.T) {
	ctx := context.Background()
	fault := backendtest.NewFault(backendtest.NewMem())
	fault.Add(backendtest.Spoil{Op: backendtest.OpPut, Prefix: "v/", Rate: 0.5, Lost: true})
	d := startOn(t, vfs.NewMem(4), eager, fault, time.Second)
	v := create(t, d, testVolume, 64<<20)
	for i := range int64(200) {
		must(t, v.Write(ctx, block(uint64(i+1)), i%50*blockSize, 0))
		if i%10 == 0 {
			must(t, d.Drain(ctx))
		}
	}
	must(t, d.Drain(ctx))
	check := func(v *Volume) {
		p := make([]byte, blockSize)
		for i := range int64(50) {
			must(t, v.Read(ctx, p, i*blockSize))
			if got, err := valueOf(p); err != nil || got != uint64(i+151) {
				t.Fatalf("block %d: %d %v", i, got, err)
			}
		}
	}
	check(v)
	other := startOn(t, vfs.NewMem(5), eager, fault, time.Second)
	got, err := other.Rebuild(ctx, testPool)
	must(t, err)
	if len(got) != 1 || got[0].Err != nil || got[0].Ignored == 0 {
		t.Fatalf("rebuilt %+v", got)
	}
	w, err := other.Volume(ctx, testVolume)
	must(t, err)
	check(w)
}

// TestFailedSync: after a failed sync of the log nothing is acknowledged any more, the sync is not tried again, and what had
// been acknowledged as durable before is there after a power cut.
func TestFailedSync(t *testing.T) {
	ctx := context.Background()
	mem := vfs.NewMem(6)
	d := startOn(t, mem, lazy, backendtest.NewMem(), time.Second)
	v := create(t, d, testVolume, 1<<20)
	must(t, v.Write(ctx, block(1), 0, blockio.FUA))
	must(t, v.Write(ctx, block(2), blockSize, 0))
	mem.FailSync("/data/log/seg-000.log", 1) // the one in use: the next is being made meanwhile, and may be given up
	if err := v.Flush(ctx); !errors.Is(err, blockio.ErrFenced) {
		t.Fatalf("flush over a failed sync: %v", err)
	}
	for name, err := range map[string]error{
		"a second flush":  v.Flush(ctx),
		"a FUA write":     v.Write(ctx, block(3), 0, blockio.FUA),
		"a write":         v.Write(ctx, block(3), 0, 0),
		"an inline flush": v.FlushInline(),
	} {
		if !errors.Is(err, blockio.ErrFenced) {
			t.Errorf("%s after a failed sync: %v", name, err)
		}
	}
	select {
	case <-d.Failed():
	case <-time.After(5 * time.Second): // it is told by the log's own goroutine
		t.Error("the driver does not say that it has failed")
	}
	after, err := openDriver(mem.Crash(7, 0), lazy)
	must(t, err)
	defer after.Close()
	w, err := after.Volume(ctx, testVolume)
	must(t, err)
	got, err := image(w, 2)
	must(t, err)
	if got[0] != 1 {
		t.Errorf("the durable block is %d", got[0])
	}
}

// TestLogWriteErrors fails each write and sync of the log directory once: whatever was acknowledged as durable is there afterwards.
func TestLogWriteErrors(t *testing.T) {
	ctx := context.Background()
	for _, errno := range []syscall.Errno{syscall.EIO, syscall.ENOSPC} {
		for n := int64(1); ; n += 1 + n/8 {
			mem := vfs.NewMem(n)
			e := vfs.NewErrors(mem)
			hit := e.Inject(vfs.Fault{Op: vfs.OpWrite | vfs.OpSync | vfs.OpDatasync, Path: "/data/log/**", From: n, Times: 1, Err: errno})
			durable := uint64(0)
			r, err := start(e, lazy, 1<<20, 1)
			if err == nil {
				for i := range uint64(12) {
					if r.v.Write(ctx, block(i+1), 0, blockio.FUA) != nil {
						break
					}
					durable = i + 1
				}
				_ = r.stop()
			}
			if hit.Fired() == 0 {
				break
			}
			d, err := openDriver(mem.Crash(n, 0.5), lazy)
			if err != nil {
				t.Fatalf("%s at call %d: reopen: %v", errno, n, err)
			}
			v, err := d.Volume(ctx, testVolume)
			if err == nil {
				got, ierr := image(v, 1)
				if ierr != nil || got[0] < durable {
					t.Fatalf("%s at call %d: block %v, durable was %d: %v", errno, n, got, durable, ierr)
				}
			} else if durable > 0 {
				t.Fatalf("%s at call %d: %v", errno, n, err)
			}
			must(t, d.Close())
		}
	}
}

// TestCorruptObject: a changed bit in an SCO is an error for exactly the block it is in, unless it was changed on the way: then it
// is read again.
func TestCorruptObject(t *testing.T) {
	ctx := context.Background()
	fault := backendtest.NewFault(backendtest.NewMem())
	d := startOn(t, vfs.NewMem(8), eager, fault, time.Second)
	v := create(t, d, testVolume, 1<<20)
	for i := range int64(8) {
		must(t, v.Write(ctx, block(uint64(i+1)), i*blockSize, 0))
	}
	must(t, d.Drain(ctx))
	p := make([]byte, blockSize)
	must(t, v.Read(ctx, p, 0))                      // the header is read and kept
	for _, times := range []int64{rereads + 2, 2} { // one is tried without waiting
		flip := fault.Add(backendtest.Spoil{Op: backendtest.OpRead | backendtest.OpTryRead, Times: times, Flip: true})
		if err := v.TryRead(p, 3*blockSize); !errors.Is(err, blockio.ErrBusy) {
			t.Fatalf("a tried read of a block with a changed bit: %v", err)
		}
		err := v.Read(ctx, p, 3*blockSize)
		if times > rereads && !errors.Is(err, blockio.ErrCorrupt) {
			t.Fatalf("a block with a changed bit: %v", err)
		}
		if got, verr := valueOf(p); times == 2 && (err != nil || verr != nil || got != 4) {
			t.Fatalf("a block that was changed on the way once: %d %v %v", got, verr, err)
		}
		if flip.Fired() != times {
			t.Fatalf("%d reads were spoiled, want %d", flip.Fired(), times)
		}
	}
	for i := range int64(8) {
		must(t, v.Read(ctx, p, i*blockSize))
		if got, err := valueOf(p); err != nil || got != uint64(i+1) {
			t.Fatalf("block %d: %d %v", i, got, err)
		}
	}
}

// TestCorruptLog: a changed bit in what is read from the log is an error, never wrong data.
func TestCorruptLog(t *testing.T) {
	ctx := context.Background()
	e := vfs.NewErrors(vfs.NewMem(9))
	d := startOn(t, e, lazy, backendtest.NewMem(), time.Second)
	v := create(t, d, testVolume, 1<<20)
	must(t, v.Write(ctx, block(5), 0, 0))
	e.Inject(vfs.Fault{Op: vfs.OpRead | vfs.OpTryRead, Path: "/data/log/**", Times: 1, Flip: true})
	p := make([]byte, blockSize)
	if err := v.Read(ctx, p, 0); !errors.Is(err, blockio.ErrCorrupt) {
		t.Fatalf("a logged block with a changed bit: %v", err)
	}
	must(t, v.Read(ctx, p, 0))
}

// TestLostObject: a referenced SCO that is gone gives errors, not zeros, and only for its blocks.
func TestLostObject(t *testing.T) {
	ctx := context.Background()
	mem := backendtest.NewMem()
	d := startOn(t, vfs.NewMem(10), eager, mem, time.Second)
	v := create(t, d, testVolume, 1<<20)
	must(t, v.Write(ctx, block(1), 0, 0))
	must(t, d.Drain(ctx))
	lost, err := mem.List(ctx, sco.Prefix(testVolume), "", 10)
	must(t, err)
	must(t, v.Write(ctx, block(2), blockSize, 0))
	must(t, d.Drain(ctx))
	for _, i := range lost {
		must(t, mem.Delete(ctx, i.Name))
	}
	d.objects.forget(nil)
	p := make([]byte, blockSize)
	if err := v.Read(ctx, p, 0); !errors.Is(err, blockio.ErrCorrupt) {
		t.Fatalf("a block of a lost object: %v", err)
	}
	must(t, v.Read(ctx, p, blockSize))
}

// TestDelete: a deleted volume leaves nothing in the log, the map or the backend, also when the first try was interrupted.
func TestDelete(t *testing.T) {
	ctx := context.Background()
	fsys := vfs.NewMem(11)
	store := backendtest.NewMem()
	fault := backendtest.NewFault(store)
	d := startOn(t, fsys, eager, fault, time.Second)
	v := create(t, d, testVolume, 1<<20)
	keep := create(t, d, uuid.New(), 1<<20)
	must(t, v.Write(ctx, block(1), 0, 0))
	must(t, keep.Write(ctx, block(2), 0, 0))
	must(t, d.Drain(ctx))
	must(t, v.Write(ctx, block(3), blockSize, 0))
	fault.Add(backendtest.Spoil{Op: backendtest.OpDelete, Times: 1})
	if err := d.Delete(ctx, testVolume); err == nil {
		t.Fatal("Delete does not say that the backend refused")
	}
	if err := v.Write(ctx, block(4), 0, 0); !errors.Is(err, blockio.ErrClosed) {
		t.Errorf("write to a deleted volume: %v", err)
	}
	if err := v.Read(ctx, make([]byte, 1), 0); !errors.Is(err, blockio.ErrClosed) {
		t.Errorf("read of a deleted volume: %v", err)
	}
	if _, err := d.Create(ctx, Spec{ID: testVolume, Pool: testPool}); !errors.Is(err, blockio.ErrClosed) {
		t.Errorf("create of a volume under deletion: %v", err)
	}
	// The second try, after a crash.
	after := startOn(t, fsys.Crash(12, 0.5), eager, fault, time.Second)
	must(t, after.Delete(ctx, testVolume))
	must(t, after.Delete(ctx, testVolume))
	if _, err := after.Volume(ctx, testVolume); !errors.Is(err, ErrUnknownVolume) {
		t.Errorf("the deleted volume: %v", err)
	}
	for _, prefix := range []string{sco.Prefix(testVolume), sco.RootPrefix(testVolume)} {
		if left, err := store.List(ctx, prefix, "", 10); err != nil || len(left) > 0 {
			t.Errorf("left on the backend: %v %v", left, err)
		}
	}
	w, err := after.Volume(ctx, keep.ID())
	must(t, err)
	if got, err := image(w, 1); err != nil || got[0] != 2 {
		t.Errorf("the other volume: %v %v", got, err)
	}
}

// TestSubBlockWriters: writers of 512 bytes in the same blocks, and of whole blocks beside them, lose nothing of each other.
func TestSubBlockWriters(t *testing.T) {
	ctx := context.Background()
	d := startOn(t, vfs.NewMem(13), eager, backendtest.NewMem(), time.Second)
	const blocks = 4
	v := create(t, d, testVolume, blocks*2*blockSize)
	var wg sync.WaitGroup
	final := make([]uint64, blocks*8)
	for sector := range blocks * 8 {
		wg.Go(func() {
			p := make([]byte, 512)
			for i := range uint64(60) {
				stampBlock(p, uint64(sector)<<32|i)
				if err := v.Write(ctx, p, int64(sector)*512, 0); err != nil {
					t.Error(err)
					return
				}
				q := make([]byte, 512)
				if err := v.Read(ctx, q, int64(sector)*512); err != nil || !bytes.Equal(p, q) {
					t.Errorf("sector %d round %d: read %x %v", sector, i, q[:8], err)
					return
				}
			}
			final[sector] = uint64(sector)<<32 | 59
		})
	}
	wg.Go(func() {
		for i := range uint64(200) {
			if err := v.Write(ctx, block(i), (blocks+int64(i)%blocks)*blockSize, 0); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Wait()
	p := make([]byte, blocks*blockSize)
	must(t, v.Read(ctx, p, 0))
	for sector, want := range final {
		if got := binary.LittleEndian.Uint64(p[sector*512:]); got != want {
			t.Errorf("sector %d: %x, want %x", sector, got, want)
		}
	}
}

// TestFullWriteOverClaimed: a whole-block write beside a sub-block one in the same block is never undone by the merge.
func TestFullWriteOverClaimed(t *testing.T) {
	ctx := context.Background()
	d := startOn(t, vfs.NewMem(14), lazy, backendtest.NewMem(), time.Second)
	v := create(t, d, testVolume, blockSize)
	for i := range uint64(300) {
		var wg sync.WaitGroup
		wg.Go(func() { must(t, v.Write(ctx, block(i), 0, 0)) })
		wg.Go(func() { must(t, v.Write(ctx, []byte{1, 2, 3}, 1000, 0)) })
		wg.Wait()
		p := make([]byte, blockSize)
		must(t, v.Read(ctx, p, 0))
		if got := binary.LittleEndian.Uint64(p); got != i {
			t.Fatalf("round %d: the whole-block write is gone, block begins with %d", i, got)
		}
	}
}

// TestConcurrentStripes: many writers and readers on their own stripes, over destaging, checkpoints and a tiny map.
func TestConcurrentStripes(t *testing.T) {
	ctx := context.Background()
	d := startOn(t, vfs.NewMem(15), shapes[2], backendtest.NewMem(), time.Second)
	const stripes, rows = 6, 300
	v := create(t, d, testVolume, 1<<34)
	var wg sync.WaitGroup
	for s := range uint64(stripes) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(s, 4))
			have := make(map[uint64]uint64)
			p := make([]byte, blockSize)
			for i := range uint64(500) {
				row := rng.Uint64N(rows)
				off := int64((row*997*stripes + s) * blockSize)
				switch rng.IntN(5) {
				case 0:
					must(t, v.Zero(ctx, off, blockSize, 0))
					have[row] = 0
				case 1, 2:
					must(t, v.Write(ctx, block(s<<32|i), off, 0))
					have[row] = s<<32 | i
				default:
					must(t, v.Read(ctx, p, off))
					if got, err := valueOf(p); err != nil || got != have[row] {
						t.Errorf("stripe %d row %d: %x, want %x: %v", s, row, got, have[row], err)
						return
					}
				}
			}
		})
	}
	wg.Wait()
}

// TestWatermarks: accepted >= logged >= backed at all times, and each only grows.
func TestWatermarks(t *testing.T) {
	ctx := context.Background()
	d := startOn(t, vfs.NewMem(16), eager, backendtest.NewMem(), time.Second)
	v := create(t, d, testVolume, 1<<24)
	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		var last Info
		for !stop.Load() {
			i := v.Info()
			if i.Backed > i.Logged || i.Backed < last.Backed || i.Logged < last.Logged || i.Accepted < last.Accepted {
				t.Errorf("watermarks %+v after %+v", i, last)
				return
			}
			last = i
		}
	})
	for i := range int64(500) {
		must(t, v.Write(ctx, block(uint64(i)), i%1000*blockSize, 0))
	}
	must(t, d.Drain(ctx))
	stop.Store(true)
	wg.Wait()
}

// TestEpochs: a higher epoch is taken over, a lower one refused, and objects of both are read.
func TestEpochs(t *testing.T) {
	ctx := context.Background()
	d := startOn(t, vfs.NewMem(17), eager, backendtest.NewMem(), time.Second)
	for epoch := uint64(1); epoch <= 3; epoch++ {
		v, err := d.Create(ctx, Spec{ID: testVolume, Pool: testPool, Epoch: epoch, Size: 1 << 20, PoolName: "default", Path: "d.raw", Kind: "disk"})
		must(t, err)
		must(t, v.Write(ctx, block(epoch), int64(epoch)*blockSize, 0))
		must(t, d.Drain(ctx))
	}
	if _, err := d.Create(ctx, Spec{ID: testVolume, Pool: testPool, Epoch: 2}); !errors.Is(err, blockio.ErrFenced) {
		t.Errorf("a lower epoch: %v", err)
	}
	d.objects.forget(nil)
	v, err := d.Volume(ctx, testVolume)
	must(t, err)
	got, err := image(v, 4)
	must(t, err)
	if !slices.Equal(got, []uint64{0, 1, 2, 3}) {
		t.Errorf("blocks %v", got)
	}
}

// TestRestartManyVolumes: idle volumes cost nothing at a restart, and all are there.
func TestRestartManyVolumes(t *testing.T) {
	ctx := context.Background()
	fsys := vfs.NewMem(18)
	store := backendtest.NewMem()
	const n = 300
	ids := make([]uuid.UUID, n)
	func() {
		d, err := Open(Config{FS: fsys, Dir: "/data", LogBytes: 64 << 20, SegmentBytes: 4 << 20, NoPrewrite: true})
		must(t, err)
		d.AddPool(testPool, store)
		for i := range ids {
			ids[i] = uuid.New()
			v, err := d.Create(ctx, Spec{ID: ids[i], Pool: testPool, Epoch: 1, Size: 1 << 40, PoolName: "default", Path: fmt.Sprint(i, ".raw"), Kind: "disk"})
			must(t, err)
			if i%10 == 0 {
				must(t, v.Write(ctx, block(uint64(i+1)), 1<<39, 0))
			}
		}
		must(t, d.Close())
	}()
	d := startOn(t, fsys.Kill(), lazy, store, time.Second)
	if s := d.Stats(); s.Volumes != n || s.Open != n/10 {
		t.Errorf("%d volumes, %d open, want %d and the %d with records in the log", s.Volumes, s.Open, n, n/10)
	}
	p := make([]byte, blockSize)
	for i := 0; i < n; i += 10 {
		v, err := d.Volume(ctx, ids[i])
		must(t, err)
		must(t, v.Read(ctx, p, 1<<39))
		if got, err := valueOf(p); err != nil || got != uint64(i+1) {
			t.Fatalf("volume %d: %d %v", i, got, err)
		}
	}
}

// TestRebuildPrefix: with the log and the map lost, and objects missing at the end or in the middle, the volume is a prefix of
// what was written, and the ledger says how many records are missing.
func TestRebuildPrefix(t *testing.T) {
	ctx := context.Background()
	for name, lose := range map[string]func(n int) int{
		"nothing": func(int) int { return -1 },
		"last":    func(n int) int { return n - 1 },
		"middle":  func(n int) int { return n / 2 },
		"first":   func(int) int { return 0 },
	} {
		t.Run(name, func(t *testing.T) {
			fsys := vfs.NewMem(19)
			store := backendtest.NewMem()
			d, err := Open(Config{FS: fsys, Dir: "/data", Ledger: "/state/ledger.json", LogBytes: 64 << 20, SegmentBytes: 4 << 20, NoPrewrite: true,
				sealAge: time.Hour, sealAnyAge: time.Hour})
			must(t, err)
			d.AddPool(testPool, store)
			run, cancel := context.WithCancel(ctx)
			ended := make(chan error, 1)
			go func() { ended <- d.Run(run) }()
			v := create(t, d, testVolume, 1<<20)
			const rounds = 9
			for i := range uint64(rounds) {
				must(t, v.Write(ctx, block(i+1), int64(i%3)*blockSize, 0))
				must(t, d.Drain(ctx))
			}
			must(t, v.Write(ctx, block(100), 3*blockSize, blockio.FUA)) // only in the log
			cancel()
			must(t, errors.Join(<-ended, d.Close()))

			objects, err := store.List(ctx, sco.Prefix(testVolume), "", 100)
			must(t, err)
			slices.SortFunc(objects, func(a, b backend.Info) int { return strings.Compare(path.Base(a.Name), path.Base(b.Name)) })
			if len(objects) != rounds {
				t.Fatalf("%d objects", len(objects))
			}
			kept := rounds
			if i := lose(rounds); i >= 0 {
				must(t, store.Delete(ctx, objects[i].Name))
				kept = i
			}
			must(t, fsys.RemoveAll("/data"))
			again, err := Open(Config{FS: fsys, Dir: "/data", Ledger: "/state/ledger.json", LogBytes: 64 << 20, SegmentBytes: 4 << 20, NoPrewrite: true})
			must(t, err)
			defer again.Close()
			again.AddPool(testPool, store)
			got, err := again.Rebuild(ctx, testPool)
			must(t, err)
			if len(got) != 1 || got[0].Err != nil || got[0].LastLog != uint64(kept) || got[0].Lost != uint64(rounds+1-kept) || got[0].LostAt.IsZero() {
				t.Fatalf("rebuilt %+v, want the first %d records", got, kept)
			}
			w, err := again.Volume(ctx, testVolume)
			must(t, err)
			blocks, err := image(w, 4)
			must(t, err)
			want := make([]uint64, 4)
			for i := range kept {
				want[i%3] = uint64(i + 1)
			}
			if !slices.Equal(blocks, want) {
				t.Errorf("blocks %v, want %v", blocks, want)
			}
		})
	}
}

// TestRangeErrors: what lies beyond the end is refused and changes nothing; Extend grows.
func TestRangeErrors(t *testing.T) {
	ctx := context.Background()
	d := startOn(t, vfs.NewMem(20), lazy, backendtest.NewMem(), time.Second)
	v := create(t, d, testVolume, 10000)
	w := newWaiter()
	for name, err := range map[string]error{
		"read":       v.Read(ctx, make([]byte, 2), 9999),
		"try read":   v.TryRead(make([]byte, 2), 9999),
		"write":      v.Write(ctx, make([]byte, 2), 9999, 0),
		"try write":  v.TryWrite(make([]byte, blockSize), 8192, 0, w, 0),
		"zero":       v.Zero(ctx, 9999, 2, 0),
		"try zero":   v.TryZero(8192, 8192, 0, w, 0),
		"negative":   v.Read(ctx, make([]byte, 2), -1),
		"huge":       v.Write(ctx, make([]byte, 2), 1<<62, blockio.Extend),
		"resize":     v.Resize(ctx, VolumeBytesMax+1),
		"resize < 0": v.Resize(ctx, -1),
	} {
		if !errors.Is(err, blockio.ErrBeyondEnd) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if i := v.Info(); i.Accepted != 0 || i.Size != 10000 {
		t.Errorf("something changed: %+v", i)
	}
	must(t, v.Write(ctx, []byte("end"), 20000, blockio.Extend))
	if v.Size() != 20003 {
		t.Errorf("size %d", v.Size())
	}
}

// TestHotPathAllocations: a cached 4 KiB write or read allocates nothing.
func TestHotPathAllocations(t *testing.T) {
	d, err := Open(Config{FS: vfs.OS(), Dir: t.TempDir(), LogBytes: 256 << 20, SegmentBytes: 64 << 20, NoPrewrite: true})
	must(t, err)
	defer d.Close()
	d.AddPool(testPool, backendtest.NewMem())
	v := create(t, d, testVolume, 1<<30)
	p := block(3)
	c := &completion{func(err error) { must(t, err) }}
	write := func() {
		must(t, v.TryWrite(p, 4096, 0, c, 1))
		v.Kick()
	}
	for range 2 * queueChunk {
		write()
	}
	// The queue of records takes a chunk every 256 writes.
	if n := testing.AllocsPerRun(200, write); n > 0.1 {
		t.Errorf("%g allocations a write", n)
	}
	if n := testing.AllocsPerRun(200, func() { must(t, v.TryRead(p, 4096)) }); n > 0 {
		t.Errorf("%g allocations a read", n)
	}
}

// TestClaim: an empty store is claimed once; when volumes have objects somewhere and the store is empty, it is another one.
func TestClaim(t *testing.T) {
	ctx := context.Background()
	store := backendtest.NewMem()
	d := startOn(t, vfs.NewMem(21), eager, store, time.Second)
	must(t, d.Claim(ctx, testPool, store))
	must(t, d.Claim(ctx, testPool, store))
	v := create(t, d, testVolume, 1<<20)
	must(t, v.Write(ctx, block(1), 0, 0))
	must(t, d.Drain(ctx))
	must(t, d.Claim(ctx, testPool, store))
	if err := d.Claim(ctx, testPool, backendtest.NewMem()); !errors.Is(err, ErrStrangeBackend) {
		t.Errorf("an empty store in the place of a used one: %v", err)
	}
}

// asker asks for the volume's attributes in Settle, as an NFS connection does.
type asker struct {
	v    *Volume
	told atomic.Int64
}

func (a *asker) Done(uint64, error) { a.told.Add(1) }
func (a *asker) Settle(bool)        { a.v.Attr() }

// TestSettleAsksForAttributes: also where the log is kicked by somebody who holds the volume's order, as a snapshot does that finds
// the batch full.
func TestSettleAsksForAttributes(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	d := startOn(t, vfs.NewMem(1), lazy, backendtest.NewMem(), time.Second)
	a := &asker{v: create(t, d, testVolume, 1<<30)}
	for round := range 10 {
		given := int64(0)
		for i := range int64(1 << 20) { // until the batch is full; nobody kicks
			a.v.order.Lock()
			err := d.wal.Append(writelog.Record{Volume: testVolume, Seq: a.v.seq + 1, Kind: writelog.Zero, LBA: uint64(i), Blocks: 1}, nil, a.v, false, a, 0)
			if err == nil {
				a.v.seq++
			}
			a.v.order.Unlock()
			if err != nil {
				if !errors.Is(err, blockio.ErrBusy) {
					t.Fatal(err)
				}
				break
			}
			given++
		}
		if given == 0 {
			t.Fatal("no write was taken")
		}
		if _, err := a.v.Snapshot(ctx, SnapshotSpec{ID: uuid.New(), Name: fmt.Sprint(round)}); err != nil {
			t.Fatal(err)
		}
		must(t, a.v.Flush(ctx))
		if size, used, changed := a.v.Attr(); size != 1<<30 || used > size || changed.IsZero() || a.told.Swap(0) != given {
			t.Fatal(size, used, changed, given)
		}
		must(t, d.Drain(ctx))
	}
}
