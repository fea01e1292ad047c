package volumedriver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver/backend/local"
	"varve/volumedriver/blockio"
	"varve/volumedriver/vfs"
)

var (
	testPool   = uuid.MustParse("00000000-0000-4000-8000-000000000001")
	testVolume = uuid.MustParse("00000000-0000-4000-8000-000000000002")
)

// shape is a configuration under which the same operations must give the same bytes.
type shape struct {
	name      string
	log, seg  int64
	mapBudget int64
	sco       int64
	sealAge   time.Duration
	cp        int64
}

var shapes = []shape{
	{"default-like", 64 << 20, 4 << 20, 8 << 20, 1 << 20, time.Hour, 8 << 20},
	{"eager", 64 << 20, 4 << 20, 8 << 20, 256 << 10, time.Nanosecond, 1},
	{"tiny-map", 64 << 20, 4 << 20, 256 << 10, 128 << 10, time.Nanosecond, 256 << 10},
	{"tiny-log", 12 << 20, 4 << 20, 8 << 20, 256 << 10, time.Nanosecond, 256 << 10},
	{"one-block-objects", 64 << 20, 4 << 20, 8 << 20, 1 << 20, time.Nanosecond, 64 << 10},
	{"rare-checkpoints", 64 << 20, 4 << 20, 8 << 20, 512 << 10, time.Millisecond, 1 << 40},
}

// rig is a driver on a file system, running, with one volume's backend on the same file system.
type rig struct {
	d    *Driver
	v    *Volume
	stop func() error
}

func openDriver(fsys vfs.FS, s shape) (*Driver, error) {
	d, err := Open(Config{FS: fsys, Dir: "/data", LogBytes: s.log, SegmentBytes: s.seg, BatchBytes: int(s.seg / 4), MapBudgetBytes: s.mapBudget,
		SCOBytes: s.sco, CheckpointBytes: s.cp, NoPrewrite: true, sealAge: s.sealAge, sealAnyAge: max(s.sealAge, 10*time.Millisecond),
		retryMax: 10 * time.Millisecond, CheckpointEvery: 50 * time.Millisecond})
	if err != nil {
		return nil, err
	}
	b, err := local.Open(fsys, "/backend")
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	d.AddPool(testPool, b)
	return d, nil
}

// start opens a driver and its volume and runs it.
func start(fsys vfs.FS, s shape, size int64, epoch uint64) (*rig, error) {
	d, err := openDriver(fsys, s)
	if err != nil {
		return nil, err
	}
	v, err := d.Create(context.Background(), Spec{ID: testVolume, Pool: testPool, Epoch: epoch, Size: size, PoolName: "default", Path: "disk.raw", Kind: "disk"})
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx) }()
	return &rig{d: d, v: v, stop: func() error {
		cancel()
		return errors.Join(<-ended, d.Close())
	}}, nil
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestModel runs random operations against a plain byte slice, under every shape.
func TestModel(t *testing.T) {
	ops := 400
	if s := os.Getenv("VARVE_MODEL_OPS"); s != "" {
		ops, _ = strconv.Atoi(s)
	}
	for _, s := range shapes {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			seed := uint64(time.Now().UnixNano())
			if v := os.Getenv("VARVE_SEED"); v != "" {
				seed, _ = strconv.ParseUint(v, 10, 64)
			}
			runModel(t, s, seed, ops)
		})
	}
}

func runModel(t *testing.T, s shape, seed uint64, ops int) {
	ctx := context.Background()
	rng := rand.New(rand.NewPCG(seed, 1))
	mem := vfs.NewMem(int64(seed))
	const limit = 12 << 20
	model := make([]byte, 6<<20)
	epoch := uint64(1)
	r, err := start(mem, s, int64(len(model)), epoch)
	must(t, err)
	defer func() { must(t, r.stop()) }()
	noise := make([]byte, 2<<20)
	for i := range noise {
		noise[i] = byte(rng.Uint32())
	}
	pick := func(aligned bool) (off, n int) {
		off = rng.IntN(len(model) + 1)
		n = min(len(model)-off, []int{rng.IntN(5000), rng.IntN(100 << 10), rng.IntN(2 << 20)}[rng.IntN(3)])
		if aligned {
			off &^= blockSize - 1
			n &^= blockSize - 1
		}
		return
	}
	reopen := func(kill bool) {
		if kill {
			// What was acknowledged survives the death of the process, flushed or not.
			clone := mem.Kill()
			_ = r.stop()
			mem = clone
		} else {
			must(t, r.stop())
		}
		epoch++
		r, err = start(mem, s, 0, epoch)
		must(t, err)
	}
	for i := range ops {
		what := fmt.Sprintf("seed %d op %d", seed, i)
		switch k := rng.IntN(100); {
		case k < 45:
			off, n := pick(rng.IntN(3) > 0)
			p := noise[rng.IntN(len(noise)-n+1):][:n]
			f := blockio.Flags(rng.IntN(2))
			if rng.IntN(10) == 0 && off+n+4096 < limit {
				f |= blockio.Extend
				off = len(model) + rng.IntN(3)*1000
				if grow := off + n - len(model); grow > 0 && n > 0 {
					model = append(model, make([]byte, grow)...)
				}
			}
			if n == 0 && off > len(model) {
				continue
			}
			must(t, r.v.Write(ctx, p, int64(off), f))
			copy(model[min(off, len(model)):], p)
		case k < 55:
			off, n := pick(rng.IntN(2) == 0)
			must(t, r.v.Zero(ctx, int64(off), int64(n), blockio.Flags(rng.IntN(2))))
			clear(model[off : off+n])
		case k < 85:
			off, n := pick(false)
			p := make([]byte, n)
			must(t, r.v.Read(ctx, p, int64(off)))
			if !bytes.Equal(p, model[off:off+n]) {
				t.Fatalf("%s: read %d+%d differs at %d", what, off, n, firstDiff(p, model[off:off+n])+off)
			}
		case k < 88:
			must(t, r.v.Flush(ctx))
		case k < 91:
			size := rng.IntN(limit)
			must(t, r.v.Resize(ctx, int64(size)))
			if size < len(model) {
				model = model[:size:size]
			} else {
				model = append(model, make([]byte, size-len(model))...)
			}
		case k < 94:
			must(t, r.d.Drain(ctx))
			if got := r.v.Info(); got.Backed != got.Logged || got.PendingBytes != 0 {
				t.Fatalf("%s: drained, yet %+v", what, got)
			}
		case k < 96:
			reopen(false)
		case k < 98:
			reopen(true)
		default:
			checkExtents(t, what, r.v, model)
		}
		if got := r.v.Size(); got != int64(len(model)) {
			t.Fatalf("%s: size %d, want %d", what, got, len(model))
		}
	}
	p := make([]byte, len(model))
	must(t, r.v.Read(ctx, p, 0))
	if !bytes.Equal(p, model) {
		t.Fatalf("seed %d: final image differs at %d", seed, firstDiff(p, model))
	}
	must(t, r.d.Drain(ctx))
	checkRebuild(t, mem, s, model)
}

func firstDiff(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// checkExtents: runs are contiguous and whole, what is called a hole reads as zeros, and what is not zero is no hole.
func checkExtents(t *testing.T, what string, v *Volume, model []byte) {
	t.Helper()
	for off := int64(0); off < int64(len(model)); {
		es, err := v.Extents(context.Background(), off, int64(len(model))-off, 7)
		must(t, err)
		if len(es) == 0 {
			t.Fatalf("%s: no extents at %d", what, off)
		}
		for _, e := range es {
			if e.Length <= 0 {
				t.Fatalf("%s: extent of %d bytes at %d", what, e.Length, off)
			}
			if e.Hole {
				for i, b := range model[off : off+e.Length] {
					if b != 0 {
						t.Fatalf("%s: hole %d+%d has data at %d", what, off, e.Length, off+int64(i))
					}
				}
			}
			off += e.Length
		}
	}
}

// checkRebuild: from the backend alone comes the same image.
func checkRebuild(t *testing.T, mem *vfs.Mem, s shape, model []byte) {
	t.Helper()
	fsys := mem.Kill()
	must(t, fsys.RemoveAll("/data"))
	d, err := openDriver(fsys, s)
	must(t, err)
	defer func() { must(t, d.Close()) }()
	got, err := d.Rebuild(context.Background(), testPool)
	must(t, err)
	if len(got) != 1 || got[0].Err != nil || got[0].Path != "disk.raw" {
		t.Fatalf("rebuilt %+v", got)
	}
	v, err := d.Volume(context.Background(), testVolume)
	must(t, err)
	if v.Size() != int64(len(model)) {
		t.Fatalf("rebuilt size %d, want %d", v.Size(), len(model))
	}
	p := make([]byte, len(model))
	must(t, v.Read(context.Background(), p, 0))
	if !bytes.Equal(p, model) {
		t.Fatalf("rebuilt image differs at %d", firstDiff(p, model))
	}
}
