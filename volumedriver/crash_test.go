package volumedriver

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"varve/volumedriver/blockio"
	"varve/volumedriver/vfs"
)

// crashOp is one operation on whole blocks; writes fill each block with the operation's number.
type crashOp struct {
	lba, n uint64
	zero   bool
}

// history is what was done to a volume, in order, and how far it was acknowledged as durable.
type history struct {
	blocks  uint64
	ops     []crashOp
	base    []uint64      // the value of each block before the first op
	durable atomic.Int64  // ops acknowledged as durable
	begun   atomic.Int64  // ops submitted
	version atomic.Uint64 // makes values unique over continued histories
}

func stampBlock(p []byte, value uint64) {
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], value)
	}
}

// valueOf reads a block: its value, or an error if it isn't whole.
func valueOf(p []byte) (uint64, error) {
	v := binary.LittleEndian.Uint64(p)
	for i := 8; i < len(p); i += 8 {
		if binary.LittleEndian.Uint64(p[i:]) != v {
			return 0, fmt.Errorf("torn: %d at 0, %d at byte %d", v, binary.LittleEndian.Uint64(p[i:]), i)
		}
	}
	return v, nil
}

// prefix finds k in [durable, begun] such that the image is the state after the first k ops.
func (h *history) prefix(image []uint64, durable, begun int64) (int64, error) {
	width := begun - durable + 1
	fits := make([]int32, width+1) // difference array: blocks that fit k
	touched := make([][]int64, h.blocks)
	for i, op := range h.ops[:begun] {
		for b := op.lba; b < op.lba+op.n; b++ {
			touched[b] = append(touched[b], int64(i))
		}
	}
	worst := ""
	for b := range h.blocks {
		any := false
		value, from := h.base[b], int64(0)
		span := func(to int64) { // value holds for k in [from, to)
			lo, hi := max(from, durable)-durable, min(to, begun+1)-durable
			if value == image[b] && lo < hi {
				fits[lo]++
				fits[hi]--
				any = true
			}
		}
		for _, i := range touched[b] {
			span(i + 1)
			value, from = uint64(i)+1+h.version.Load()<<32, i+1
			if h.ops[i].zero {
				value = 0
			}
		}
		span(begun + 1)
		if !any {
			worst = fmt.Sprintf("block %d has value %d, which no state after op %d..%d has", b, image[b], durable, begun)
			break
		}
	}
	if worst != "" {
		return 0, errors.New(worst)
	}
	sum := int32(0)
	for k := range width {
		if sum += fits[k]; sum == int32(h.blocks) {
			return durable + k, nil
		}
	}
	return 0, fmt.Errorf("no prefix of ops %d..%d explains the image: a hole", durable, begun)
}

// run performs random operations, some in bursts without waiting, until n are done or the volume fails.
func (h *history) run(r *rig, rng *rand.Rand, n int) {
	ctx := context.Background()
	v := r.v
	var all sync.WaitGroup
	for range n {
		op := crashOp{lba: rng.Uint64N(h.blocks)}
		op.n = 1 + rng.Uint64N(min(h.blocks-op.lba, []uint64{1, 8, h.blocks}[rng.IntN(3)]))
		op.zero = rng.IntN(6) == 0
		if !op.zero {
			op.n = min(op.n, recordBlocksMax)
		}
		value := uint64(len(h.ops)) + 1 + h.version.Load()<<32
		h.ops = append(h.ops, op)
		h.begun.Store(int64(len(h.ops)))
		p := make([]byte, op.n*blockSize)
		stampBlock(p, value)
		var f blockio.Flags
		if rng.IntN(12) == 0 {
			f = blockio.FUA
		}
		here := int64(len(h.ops))
		var err error
		if rng.IntN(2) == 0 { // submit, and go on
			all.Add(1)
			done := &completion{func(err error) {
				defer all.Done()
				if err == nil && f != 0 {
					raise(&h.durable, here)
				}
			}}
			if op.zero {
				err = v.TryZero(int64(op.lba)*blockSize, int64(op.n)*blockSize, f, done, 0)
			} else {
				err = v.TryWrite(p, int64(op.lba)*blockSize, f, done, 0)
			}
			if err != nil {
				all.Done()
			} else {
				switch rng.IntN(6) {
				case 0:
					v.Kick()
				case 1:
					v.KickSync()
				}
				continue
			}
		}
		if op.zero {
			err = v.Zero(ctx, int64(op.lba)*blockSize, int64(op.n)*blockSize, f)
		} else {
			err = v.Write(ctx, p, int64(op.lba)*blockSize, f)
		}
		if err != nil {
			return
		}
		if f != 0 {
			raise(&h.durable, here)
		}
		if rng.IntN(8) == 0 {
			if v.Flush(ctx) != nil {
				return
			}
			raise(&h.durable, here)
		}
	}
	v.Kick()
	all.Wait()
	if v.Flush(ctx) == nil {
		raise(&h.durable, int64(len(h.ops)))
	}
}

func raise(a *atomic.Int64, to int64) {
	for {
		if old := a.Load(); old >= to || a.CompareAndSwap(old, to) {
			return
		}
	}
}

type completion struct{ end func(error) }

func (c *completion) Done(_ uint64, err error) { c.end(err) }
func (c *completion) Settle(bool)              {}

// image reads a recovered volume.
func image(v *Volume, blocks uint64) ([]uint64, error) {
	p := make([]byte, blocks*blockSize)
	if err := v.Read(context.Background(), p, 0); err != nil {
		return nil, err
	}
	out := make([]uint64, blocks)
	for b := range out {
		var err error
		if out[b], err = valueOf(p[b*blockSize : (b+1)*blockSize]); err != nil {
			return nil, fmt.Errorf("block %d: %w", b, err)
		}
	}
	return out, nil
}

// crashPoint is a file system as a crash left it, with what had been promised before and begun after.
type crashPoint struct {
	fs             *vfs.Mem
	durable, begun int64
	what           string
}

// recoverAndCheck opens the volume on what a crash left and checks the promise. With again, the power fails once more
// during recovery first.
func (h *history) recoverAndCheck(c crashPoint, s shape, rng *rand.Rand, again bool) (int64, error) {
	fsys := c.fs
	if again {
		var second *vfs.Mem
		at, n := rng.Int64N(30), int64(0)
		var mu sync.Mutex
		fsys.OnCall(func(vfs.Call) {
			mu.Lock()
			defer mu.Unlock()
			if n++; n > at && second == nil {
				second = fsys.Crash(rng.Int64(), rng.Float64())
			}
		})
		d, err := openDriver(fsys, s)
		fsys.OnCall(nil)
		if err == nil {
			err = d.Close()
		}
		if err != nil {
			return 0, fmt.Errorf("first recovery: %w", err)
		}
		mu.Lock()
		if second != nil {
			fsys = second
		}
		mu.Unlock()
	}
	d, err := openDriver(fsys, s)
	if err != nil {
		return 0, fmt.Errorf("recovery: %w", err)
	}
	defer d.Close()
	v, err := d.Volume(context.Background(), testVolume)
	if err != nil {
		return 0, err
	}
	got, err := image(v, h.blocks)
	if err != nil {
		return 0, err
	}
	return h.prefix(got, c.durable, c.begun)
}

// TestCrashPoints cuts the power after calls of the file system at random, recovers, sometimes with another cut during the
// recovery, and checks that the volume is a prefix of its writes that holds every durable one, and that no block is torn.
// Some recovered volumes are written on and cut again, so that what was lost once would be seen if it came back.
func TestCrashPoints(t *testing.T) {
	points := 10000
	if testing.Short() {
		points = 200
	}
	if v := os.Getenv("VARVE_CRASH_POINTS"); v != "" {
		points, _ = strconv.Atoi(v)
	}
	seed := uint64(time.Now().UnixNano())
	if v := os.Getenv("VARVE_SEED"); v != "" {
		seed, _ = strconv.ParseUint(v, 10, 64)
	}
	const lanes = 2
	var done, twice, continued atomic.Int64
	began := time.Now()
	var wg sync.WaitGroup
	for lane := range uint64(lanes) {
		wg.Go(func() {
			for i := uint64(0); done.Load() < int64(points) && !t.Failed(); i++ {
				crashRun(t, seed+lane<<32+i, shapes[i%uint64(len(shapes))], &done, &twice, &continued)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	fmt.Printf("» %d crash points (%d with a second crash during recovery, %d written on and crashed again) in %s, 0 violations\n",
		done.Load(), twice.Load(), continued.Load(), time.Since(began).Round(time.Second))
}

// crashRun makes one history, takes crash points on its way and checks each.
func crashRun(t *testing.T, seed uint64, s shape, done, twice, continued *atomic.Int64) {
	rng := rand.New(rand.NewPCG(seed, 2))
	mem := vfs.NewMem(int64(seed))
	h := &history{blocks: []uint64{16, 64, 700}[rng.IntN(3)]}
	h.base = make([]uint64, h.blocks)
	fail := func(c crashPoint, err error) {
		t.Errorf("seed %d shape %s %s: durable %d begun %d: %v\nVARVE_SEED=%d go test ./volumedriver -run TestCrashPoints", seed, s.name, c.what,
			c.durable, c.begun, err, seed)
	}
	for round := range 2 {
		points, err := collect(mem, s, h, rng, round == 0)
		if err != nil {
			fail(crashPoint{what: "start"}, err)
			return
		}
		for _, c := range points {
			again := rng.IntN(4) == 0
			if _, err := h.recoverAndCheck(c, s, rng, again); err != nil {
				fail(c, err)
				return
			}
			done.Add(1)
			if again {
				twice.Add(1)
			}
		}
		if round == 1 || len(points) == 0 || rng.IntN(2) == 0 {
			return
		}
		// Go on from one of them: its state is the base of a new history.
		c := points[rng.IntN(len(points))]
		d, err := openDriver(c.fs, s)
		if err != nil {
			fail(c, err)
			return
		}
		v, err := d.Volume(context.Background(), testVolume)
		if err == nil {
			h.base, err = image(v, h.blocks)
		}
		if err := errors.Join(err, d.Close()); err != nil {
			fail(c, err)
			return
		}
		h.ops = nil
		h.durable.Store(0)
		h.begun.Store(0)
		h.version.Add(1)
		mem = c.fs
		continued.Add(1)
	}
}

// collect runs a history on fsys and takes crash points at random calls.
func collect(fsys *vfs.Mem, s shape, h *history, rng *rand.Rand, create bool) ([]crashPoint, error) {
	r, err := start(fsys, s, int64(h.blocks)*blockSize, h.version.Load()+1)
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex
	var points []crashPoint
	pick := rand.New(rand.NewPCG(rng.Uint64(), 3))
	const most = 40
	fsys.OnCall(func(c vfs.Call) {
		mu.Lock()
		defer mu.Unlock()
		if len(points) == most || pick.IntN(6) != 0 {
			return
		}
		p := crashPoint{durable: h.durable.Load()}
		survive := []float64{0, 0.1, 0.5, 0.9, 1}[pick.IntN(5)]
		p.what = fmt.Sprintf("cut before %v %s, %.1f survives", c.Op, c.Path, survive)
		p.fs = fsys.Crash(pick.Int64(), survive)
		p.begun = h.begun.Load()
		points = append(points, p)
	})
	h.run(r, rng, 30+rng.IntN(60))
	if rng.IntN(2) == 0 {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		_ = r.d.Drain(ctx)
		cancel()
	}
	fsys.OnCall(nil)
	return points, r.stop()
}
