package volumedriver

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver/backend/local"
	"varve/volumedriver/blockio"
	"varve/volumedriver/sco"
	"varve/volumedriver/seal"
	"varve/volumedriver/vfs"
)

// The metamorphic test: the same kinds of random operations on a family of volumes, their snapshots and clones, under
// configurations that must not matter, against an oracle that keeps every blocks as one number per block.

// familyShape is a configuration of the metamorphic test.
type familyShape struct {
	shape
	options PoolOptions
}

var familyShapes = []familyShape{
	{shapes[0], PoolOptions{}},
	{shapes[1], PoolOptions{}},
	{shapes[2], PoolOptions{}},
	{shapes[3], PoolOptions{}},
	{shapes[4], PoolOptions{}},
	{shapes[5], PoolOptions{}},
	{shape{"eager-checkpoints-tiny-map", 64 << 20, 4 << 20, 256 << 10, 64 << 10, time.Nanosecond, 1}, PoolOptions{}},
	{shape{"large-objects", 64 << 20, 4 << 20, 8 << 20, 16 << 20, 5 * time.Millisecond, 4 << 20}, PoolOptions{}},
	{shape{"compressed", 64 << 20, 4 << 20, 8 << 20, 1 << 20, time.Nanosecond, 256 << 10}, PoolOptions{Codec: sco.S2}},
	{shape{"encrypted", 64 << 20, 4 << 20, 8 << 20, 512 << 10, time.Nanosecond, 256 << 10}, PoolOptions{Encrypt: true}},
	{shape{"compressed-and-encrypted", 64 << 20, 4 << 20, 256 << 10, 256 << 10, time.Millisecond, 1}, PoolOptions{Codec: sco.Zstd, Encrypt: true}},
}

// blocks is the content of a volume: one value per block, 0 for zeros.
type blocks []uint64

// change is a write (or zeroing) of blocks, or a new length.
type change struct {
	lba, n int
	value  uint64
	resize bool
}

func (im blocks) apply(c change) blocks {
	if c.resize {
		out := make(blocks, c.n)
		copy(out, im)
		return out
	}
	for i := range c.n {
		im[c.lba+i] = c.value
	}
	return im
}

// kin is a volume of the family as the oracle knows it.
type kin struct {
	id       uuid.UUID
	now      blocks   // what reads give
	base     blocks   // what is surely durable
	since    []change // accepted after it
	snaps    map[uuid.UUID]*kept
	parent   *kept
	template bool

	changes int           // how many there were
	settled int           // of them, up to base
	window  time.Duration // of the rewind
	from    time.Time     // since when it is whole
	moments []moment      // of the past, oldest first
}

// moment is what a volume was when a second began.
type moment struct {
	at      time.Time
	blocks  blocks
	changes int
}

type kept struct {
	of     *kin      // whose it is
	holder uuid.UUID // in whose log it stands
	id     uuid.UUID
	blocks blocks
	clones int
	seq    uint64
}

func (k *kin) change(c change) {
	k.now = k.now.apply(c)
	k.changes++
	k.since = append(k.since, c)
	if len(k.since) > 4096 {
		panic("the oracle is flushed too rarely")
	}
}

func (k *kin) durable() {
	k.base, k.since, k.settled = slices.Clone(k.now), nil, k.changes
}

// family drives the volumes and the oracle.
type family struct {
	t     *testing.T
	shape familyShape
	rng   *rand.Rand
	mem   *vfs.Mem
	d     *Driver
	ahead atomic.Int64 // the driver's clock, of the real one
	stop  func() error
	kin   []*kin
	value uint64
	epoch uint64
	what  string
	seed  uint64
	count map[string]int

	promoted bool // then rollbacks change whose clones others are
}

const (
	familyBlocks = 1300 // two leaves and a half
	familyMax    = 5
	familySnaps  = 8

	familyWindow  = 40 * time.Second
	familyMoments = 40
)

func (f *family) must(err error) {
	f.t.Helper()
	if err != nil {
		f.t.Fatalf("%s: %v", f.what, err)
	}
}

func (f *family) open() {
	s := f.shape
	cfg := Config{FS: f.mem, Dir: "/data", LogBytes: s.log, SegmentBytes: s.seg, BatchBytes: int(s.seg / 4), MapBudgetBytes: s.mapBudget,
		SCOBytes: s.sco, CheckpointBytes: s.cp, NoPrewrite: true, sealAge: s.sealAge, sealAnyAge: max(s.sealAge, 10*time.Millisecond),
		retryMax: 10 * time.Millisecond, CheckpointEvery: 50 * time.Millisecond, ScrubEvery: -1, ScrubBytesPerSecond: -1,
		RewindEvery: -1, Now: f.now}
	d, err := Open(cfg)
	f.must(err)
	b, err := local.Open(f.mem, "/backend")
	f.must(err)
	d.SetPoolOptions(testPool, s.options)
	d.AddPool(testPool, b)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx) }()
	f.d, f.stop = d, func() error {
		cancel()
		return errors.Join(<-ended, d.Close())
	}
}

func (f *family) volume(k *kin) *Volume {
	f.t.Helper()
	v, err := f.d.Volume(context.Background(), k.id)
	f.must(err)
	return v
}

func (f *family) id() uuid.UUID {
	var id uuid.UUID
	binary.LittleEndian.PutUint64(id[:], f.rng.Uint64())
	binary.LittleEndian.PutUint64(id[8:], f.rng.Uint64())
	return id
}

func (f *family) spec(id uuid.UUID, size int) Spec {
	return Spec{ID: id, Pool: testPool, Epoch: 1, Size: int64(size) * blockSize, PoolName: "default", Path: id.String() + ".raw", Kind: "disk"}
}

func (f *family) create() {
	k := &kin{id: f.id(), snaps: make(map[uuid.UUID]*kept)}
	n := 1 + f.rng.IntN(familyBlocks)
	_, err := f.d.Create(context.Background(), f.spec(k.id, n))
	f.must(err)
	k.now = make(blocks, n)
	k.durable()
	f.kin = append(f.kin, k)
}

// check compares a range read by read with what it should be.
func (f *family) check(read func(p []byte, off int64) error, want blocks, lba, n int) {
	f.t.Helper()
	p := make([]byte, n*blockSize)
	f.must(read(p, int64(lba)*blockSize))
	for i := range n {
		got, err := valueOf(p[i*blockSize : (i+1)*blockSize])
		if err != nil || got != want[lba+i] {
			f.t.Fatalf("%s: block %d holds %#x (%v), want %#x", f.what, lba+i, got, err, want[lba+i])
		}
	}
}

func (f *family) some(n int) (lba, count int) {
	if n == 0 {
		return 0, 0
	}
	lba = f.rng.IntN(n)
	return lba, min(n-lba, 1+f.rng.IntN([]int{1, 4, 32, 200}[f.rng.IntN(4)]))
}

func pickOf[K comparable, V any](rng *rand.Rand, m map[K]V, less func(a, b V) int) (out V) {
	vs := slices.SortedFunc(maps.Values(m), less)
	if len(vs) == 0 {
		return out
	}
	return vs[rng.IntN(len(vs))]
}

func (f *family) snapshotOf(k *kin) *kept {
	return pickOf(f.rng, k.snaps, func(a, b *kept) int { return cmp.Or(int(a.seq)-int(b.seq), bytes.Compare(a.id[:], b.id[:])) })
}

func (f *family) now() time.Time { return time.Now().Add(time.Duration(f.ahead.Load())) }

// pass lets time go by between two operations, and notes what the volumes are when a second begins meanwhile.
func (f *family) pass() {
	before := f.now()
	f.ahead.Add(f.rng.Int64N(int64(1500 * time.Millisecond)))
	second := f.now().Truncate(time.Second)
	if !second.After(before) {
		return
	}
	for _, k := range f.kin {
		if n := len(k.moments); k.window == 0 || n > 0 && k.moments[n-1].changes == k.changes {
			continue
		}
		k.moments = append(k.moments, moment{second, slices.Clone(k.now), k.changes})
		k.moments = k.moments[max(0, len(k.moments)-familyMoments):]
	}
}

// rewinds opens and closes windows, lets the driver look after them, and rewinds.
func (f *family) rewinds(ctx context.Context, k *kin) {
	v := f.volume(k)
	switch p := f.rng.IntN(100); {
	case p < 14 && k.window == 0:
		k.window = familyWindow
		f.must(v.SetRewind(ctx, k.window))
		k.from = f.now()
		if k.template {
			k.from = f.now().Add(time.Hour)
		}
		f.count["rewind window"]++
	case p < 7:
		k.window, k.moments = 0, nil
		f.must(v.SetRewind(ctx, 0))
	case p < 30:
		f.must(f.d.rewinder.keep(ctx))
		for _, k := range f.kin {
			if !k.template && k.from.After(f.now()) && f.d.lookup(k.id) != nil { // what nobody has opened is not looked after
				k.from = f.now()
			}
		}
	default:
		if len(k.moments) == 0 || len(k.snaps) >= familySnaps {
			return
		}
		f.rewind(ctx, k, k.moments[f.rng.IntN(len(k.moments))])
	}
}

func (f *family) rewind(ctx context.Context, k *kin, m moment) {
	s, err := f.volume(k).Rewind(ctx, m.at, f.snapSpec(), nil)
	if errors.Is(err, ErrRewind) && (m.at.Before(k.from) || m.at.Before(f.now().Add(-k.window))) {
		return
	}
	f.must(err)
	if s.Size != int64(len(m.blocks))*blockSize {
		f.t.Fatalf("%s: rewound to %d bytes, the volume had %d blocks", f.what, s.Size, len(m.blocks))
	}
	kept := &kept{of: k, holder: k.id, id: s.ID, blocks: m.blocks, seq: s.Seq}
	k.snaps[s.ID] = kept
	k.durable()
	f.readSnapshot(ctx, kept)
	f.count["rewind"]++
}

// step does one operation.
func (f *family) step() {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	f.pass()
	k := f.kin[f.rng.IntN(len(f.kin))]
	v := f.volume(k)
	did := func(name string) { f.count[name]++ }
	if f.rng.IntN(50) == 0 {
		f.rewinds(ctx, k)
		return
	}
	switch p := f.rng.IntN(1000); {
	case p < 420:
		lba, n := f.some(len(k.now))
		if n == 0 {
			return
		}
		f.value++
		b := make([]byte, n*blockSize)
		for i := range n {
			stampBlock(b[i*blockSize:(i+1)*blockSize], f.value)
		}
		flags := blockio.Flags(0)
		if f.rng.IntN(16) == 0 {
			flags = blockio.FUA
		}
		err := v.Write(ctx, b, int64(lba)*blockSize, flags)
		if k.template {
			if !errors.Is(err, blockio.ErrReadOnly) {
				f.t.Fatalf("%s: a template took a write: %v", f.what, err)
			}
			return
		}
		f.must(err)
		k.change(change{lba: lba, n: n, value: f.value})
		if flags != 0 {
			k.durable()
		}
		did("write")
	case p < 480:
		lba, n := f.some(len(k.now))
		if f.rng.IntN(8) == 0 {
			lba, n = 0, len(k.now)
		}
		if n == 0 || k.template {
			return
		}
		f.must(v.Zero(ctx, int64(lba)*blockSize, int64(n)*blockSize, 0))
		k.change(change{lba: lba, n: n})
		did("zero")
	case p < 760:
		lba, n := f.some(len(k.now))
		f.check(func(p []byte, off int64) error { return v.Read(ctx, p, off) }, k.now, lba, n)
		did("read")
	case p < 800 || len(k.since) > 200:
		f.must(v.Flush(ctx))
		k.durable()
		did("flush")
	case p < 830:
		if len(k.snaps) >= familySnaps {
			return
		}
		f.snapshot(ctx, k)
		did("snapshot")
	case p < 860:
		if s := f.snapshotOf(k); s != nil {
			f.readSnapshot(ctx, s)
			did("read snapshot")
		}
	case p < 878:
		if s := f.snapshotOf(k); s != nil {
			err := v.DeleteSnapshot(ctx, s.id)
			if s.clones > 0 {
				if !errors.Is(err, ErrInUse) {
					f.t.Fatalf("%s: deleting a snapshot with %d clones: %v", f.what, s.clones, err)
				}
				return
			}
			f.must(err)
			delete(k.snaps, s.id)
			did("delete snapshot")
		}
	case p < 890:
		if s := f.snapshotOf(k); s != nil && len(f.kin) < familyMax {
			f.clone(ctx, s)
			did("clone")
		}
	case p < 900:
		if s := f.snapshotOf(k); s != nil && !k.template && len(k.snaps) < familySnaps {
			f.rollback(ctx, k, s)
			did("rollback")
		}
	case p < 906:
		f.delete(ctx, k)
		did("delete")
	case p < 912:
		if k.template {
			return
		}
		n := 1 + f.rng.IntN(familyBlocks)
		f.must(v.Resize(ctx, int64(n)*blockSize))
		k.change(change{n: n, resize: true})
		k.durable()
		did("resize")
	case p < 930:
		_, err := f.d.Scrub(ctx, testPool, ScrubOptions{Target: 1, Grace: -1, Audit: f.rng.IntN(3) == 0, Verify: f.rng.IntN(6) == 0})
		f.must(err)
		did("scrub")
	case p < 936:
		f.must(f.d.Drain(ctx))
		did("drain")
	case p < 944:
		f.restart()
		did("restart")
	case p < 952:
		f.crash()
		did("crash")
	case p < 960:
		f.d.objects.forget(nil)
		did("evict")
	case p < 972:
		if s := f.snapshotOf(k); s != nil {
			f.changed(ctx, k, s)
			did("changed since")
		}
	case p < 980:
		if s := f.snapshotOf(k); s != nil {
			unique, shared, err := v.SnapshotSpace(ctx, s.id)
			f.must(err)
			used := 0
			for _, x := range s.blocks {
				if x != 0 {
					used++
				}
			}
			if unique < 0 || shared < 0 || unique+shared < int64(used)*blockSize {
				f.t.Fatalf("%s: snapshot of %d blocks that are not zero: unique %d, shared %d bytes", f.what, used, unique, shared)
			}
			did("space")
		}
	case p < 986:
		if f.shape.options.Encrypt && f.rng.IntN(2) == 0 {
			f.must(v.RotateKey())
			did("rotate key")
			return
		}
		on := !k.template && f.rng.IntN(4) == 0
		f.must(v.SetTemplate(ctx, on))
		k.template = on
		did("template")
	case p < 990:
		if k.parent == nil || k.template {
			return
		}
		err := f.d.Flatten(ctx, v, nil)
		if len(k.snaps) == 0 {
			k.from = f.now().Add(time.Hour) // until there is a base again
		}
		if len(k.snaps) > 0 || errors.Is(err, ErrInUse) {
			if !errors.Is(err, ErrInUse) {
				f.t.Fatalf("%s: flattening a clone with %d snapshots: %v", f.what, len(k.snaps), err)
			}
			return
		}
		f.must(err)
		k.parent.clones--
		k.parent = nil
		did("flatten")
	case p < 992:
		if k.parent != nil {
			f.promote(ctx, k)
		}
	case p < 994:
		f.group(ctx)
		did("group snapshot")
	case p < 996:
		f.rebuilt()
		did("rebuild")
	default:
		f.checkAll()
		did("check all")
	}
}

func (f *family) snapSpec() SnapshotSpec {
	f.value++
	return SnapshotSpec{ID: f.id(), Name: fmt.Sprintf("s%d", f.value), Created: time.Unix(int64(f.value), 0), Automatic: f.rng.IntN(2) == 0}
}

func (f *family) keep(k *kin, s Snapshot) {
	f.t.Helper()
	if s.Size != int64(len(k.now))*blockSize {
		f.t.Fatalf("%s: snapshot of %d bytes, the volume has %d blocks", f.what, s.Size, len(k.now))
	}
	k.snaps[s.ID] = &kept{of: k, holder: k.id, id: s.ID, blocks: slices.Clone(k.now), seq: s.Seq}
	k.durable()
}

func (f *family) snapshot(ctx context.Context, k *kin) {
	s, err := f.volume(k).Snapshot(ctx, f.snapSpec())
	f.must(err)
	f.keep(k, s)
}

func (f *family) group(ctx context.Context) {
	var members []GroupMember
	var of []*kin
	for _, k := range f.kin {
		if len(k.snaps) < familySnaps && f.rng.IntN(2) == 0 {
			members = append(members, GroupMember{k.id, f.snapSpec()})
			of = append(of, k)
		}
	}
	if members == nil {
		return
	}
	got, err := f.d.SnapshotGroup(ctx, members)
	f.must(err)
	for i, k := range of {
		f.keep(k, got[i])
	}
}

func (f *family) readSnapshot(ctx context.Context, s *kept) {
	r, err := f.d.OpenSnapshot(ctx, s.of.id, s.id)
	f.must(err)
	if r.Size() != int64(len(s.blocks))*blockSize {
		f.t.Fatalf("%s: snapshot has %d bytes, want %d blocks", f.what, r.Size(), len(s.blocks))
	}
	lba, n := f.some(len(s.blocks))
	f.check(func(p []byte, off int64) error { return r.Read(ctx, p, off) }, s.blocks, lba, n)
	for off := int64(0); off < r.Size(); {
		es, err := r.Extents(ctx, off, r.Size()-off, 5)
		f.must(err)
		for _, e := range es {
			for b := off / blockSize; e.Hole && b < (off+e.Length)/blockSize; b++ {
				if s.blocks[b] != 0 {
					f.t.Fatalf("%s: block %d of the snapshot is called a hole and holds %#x", f.what, b, s.blocks[b])
				}
			}
			off += e.Length
		}
	}
	f.must(r.Close())
}

func (f *family) clone(ctx context.Context, s *kept) {
	k := &kin{id: f.id(), snaps: make(map[uuid.UUID]*kept), parent: s, now: slices.Clone(s.blocks)}
	v, err := f.d.Clone(ctx, s.of.id, s.id, f.spec(k.id, 0))
	f.must(err)
	if v.Size() != int64(len(s.blocks))*blockSize {
		f.t.Fatalf("%s: clone of %d bytes, want %d blocks", f.what, v.Size(), len(s.blocks))
	}
	s.clones++
	k.durable()
	f.kin = append(f.kin, k)
}

// promote makes k the owner of what it began as. Which snapshots come along the engine says: some of the old owner's, and no one else's.
func (f *family) promote(ctx context.Context, k *kin) {
	v, from, old := f.volume(k), k.parent, k.parent.of
	_, err := f.d.Promote(ctx, v, from.id)
	if old.template {
		if !errors.Is(err, blockio.ErrReadOnly) {
			f.t.Fatalf("%s: promoted over a template: %v", f.what, err)
		}
		return
	}
	f.must(err)
	had := len(k.snaps)
	for _, s := range v.Snapshots() {
		if moved := old.snaps[s.ID]; moved != nil {
			moved.of, k.snaps[s.ID] = k, moved
			delete(old.snaps, s.ID)
		}
	}
	if k.snaps[from.id] == nil || len(k.snaps) == had {
		f.t.Fatalf("%s: the promoted volume does not own what it began as", f.what)
	}
	f.promoted = true
	f.lineage()
	if k.parent != nil && k.parent.of == old {
		f.t.Fatalf("%s: the promoted volume is still a clone of the one that it was a clone of", f.what)
	}
	if _, err := f.d.Promote(ctx, v, from.id); err != nil { // the same once more
		f.must(err)
	}
	f.checkAll()
	f.count["promote"]++
}

// lineage notes who is a clone of what, as the engine says, after what changes that for others than the volume at hand.
func (f *family) lineage() {
	if !f.promoted {
		return
	}
	all := make(map[uuid.UUID]*kept)
	for _, k := range f.kin {
		for id, s := range k.snaps {
			s.clones, all[id] = 0, s
		}
	}
	for _, k := range f.kin {
		k.parent = nil
		if of, id, ok := f.volume(k).Parent(); ok {
			if k.parent = all[id]; k.parent == nil || k.parent.of.id != of || of == k.id {
				f.t.Fatalf("%s: volume %s is a clone of snapshot %s of volume %s, which is not there", f.what, k.id, id, of)
			}
			k.parent.clones++
		}
	}
}

func (f *family) rollback(ctx context.Context, k *kin, s *kept) {
	v := f.volume(k)
	spec := f.snapSpec()
	if s.holder != k.id {
		if err := v.Rollback(ctx, s.id, spec); !errors.Is(err, ErrTakenOver) {
			f.t.Fatalf("%s: rolled back to what another volume holds: %v", f.what, err)
		}
		return
	}
	f.must(v.Rollback(ctx, s.id, spec))
	defer f.lineage()
	saved, err := v.findSnapshot(spec.ID)
	f.must(err)
	f.keep(k, v.describe(saved))
	k.now = slices.Clone(s.blocks)
	k.changes++
	k.durable()
}

func (f *family) delete(ctx context.Context, k *kin) {
	clones := 0
	for _, s := range k.snaps {
		clones += s.clones
	}
	err := f.d.Delete(ctx, k.id)
	if clones > 0 {
		if !errors.Is(err, ErrInUse) {
			f.t.Fatalf("%s: deleting a volume with %d clones: %v", f.what, clones, err)
		}
		return
	}
	f.must(err)
	if k.parent != nil {
		k.parent.clones--
	}
	f.kin = slices.DeleteFunc(f.kin, func(o *kin) bool { return o == k })
	if len(f.kin) == 0 {
		f.create()
	}
}

// changed: what is said not to have changed since the snapshot is the same.
func (f *family) changed(ctx context.Context, k *kin, s *kept) {
	v := f.volume(k)
	for off, size := int64(0), int64(len(k.now))*blockSize; off < size; {
		es, err := v.Changed(ctx, s.id, off, size-off, 9)
		f.must(err)
		if len(es) == 0 {
			f.t.Fatalf("%s: no extents at %d of %d", f.what, off, size)
		}
		for _, e := range es {
			for b := int(off / blockSize); e.Hole && b < int((off+e.Length)/blockSize); b++ {
				if b >= len(s.blocks) || s.blocks[b] != k.now[b] {
					f.t.Fatalf("%s: block %d is said not to have changed since the snapshot", f.what, b)
				}
			}
			off += e.Length
		}
	}
}

func (f *family) restart() {
	f.must(f.stop())
	f.open()
	for _, k := range f.kin {
		k.durable()
	}
}

// crash cuts the power: each volume is then a prefix of its history that has at least what was durable.
func (f *family) crash() {
	mem := f.mem.Crash(int64(f.rng.Uint64()>>1), []float64{0, 0.3, 0.9}[f.rng.IntN(3)])
	_ = f.stop()
	f.mem = mem
	f.open()
	for _, k := range f.kin {
		f.settle(k)
	}
}

// settle finds which prefix a volume has come back as.
func (f *family) settle(k *kin) {
	v := f.volume(k)
	size := int(v.Size() / blockSize)
	p := make([]byte, size*blockSize)
	f.must(v.Read(context.Background(), p, 0))
	got := make(blocks, size)
	for i := range got {
		x, err := valueOf(p[i*blockSize : (i+1)*blockSize])
		f.must(err)
		got[i] = x
	}
	at := slices.Clone(k.base)
	for i := 0; ; i++ {
		if slices.Equal(at, got) {
			k.now, k.changes = at, k.settled+i
			k.moments = slices.DeleteFunc(k.moments, func(m moment) bool { return m.changes > k.changes })
			k.durable()
			return
		}
		if i == len(k.since) {
			break
		}
		at = at.apply(k.since[i])
	}
	f.t.Fatalf("%s: after the crash volume %s is no prefix of its history: %d blocks, %d changes since the last flush", f.what, k.id, size, len(k.since))
}

// checkAll reads everything.
func (f *family) checkAll() {
	ctx := context.Background()
	for _, k := range f.kin {
		v := f.volume(k)
		if v.Size() != int64(len(k.now))*blockSize {
			f.t.Fatalf("%s: volume %s has %d bytes, want %d blocks", f.what, k.id, v.Size(), len(k.now))
		}
		f.check(func(p []byte, off int64) error { return v.Read(ctx, p, off) }, k.now, 0, len(k.now))
		parent := uuid.Nil
		if k.parent != nil {
			parent = k.parent.id
		}
		if _, of, _ := v.Parent(); of != parent {
			f.t.Fatalf("%s: volume %s is a clone of snapshot %s, want %s; promoted %t", f.what, k.id, of, parent, f.promoted)
		}
		list := v.Snapshots()
		if len(list) != len(k.snaps) {
			f.t.Fatalf("%s: volume %s has %d snapshots, want %d", f.what, k.id, len(list), len(k.snaps))
		}
		for _, s := range list {
			want := k.snaps[s.ID]
			if want == nil {
				f.t.Fatalf("%s: nobody knows snapshot %s", f.what, s.Name)
			}
			if s.Clones != want.clones {
				f.t.Fatalf("%s: snapshot %s has %d clones, want %d of %d; promoted %t", f.what, s.Name, s.Clones, want.clones, len(k.snaps), f.promoted)
			}
			r, err := f.d.OpenSnapshot(ctx, k.id, s.ID)
			f.must(err)
			f.check(func(p []byte, off int64) error { return r.Read(ctx, p, off) }, want.blocks, 0, len(want.blocks))
			f.must(r.Close())
		}
	}
}

// rebuilt: the backend alone gives back the family: heads, snapshots, who is a clone of whom. It goes on with what came back.
func (f *family) rebuilt() {
	f.must(f.d.Drain(context.Background()))
	f.must(f.stop())
	f.mem = f.mem.Kill()
	f.must(f.mem.RemoveAll("/data"))
	f.open()
	got, err := f.d.Rebuild(context.Background(), testPool)
	f.must(err)
	if len(got) != len(f.kin) {
		f.t.Fatalf("%s: rebuilt %d volumes, want %d", f.what, len(got), len(f.kin))
	}
	for _, r := range got {
		f.must(r.Err)
	}
	f.what += " rebuilt"
	for _, k := range f.kin {
		k.durable()
		k.from = f.now().Add(time.Hour) // until there is a base again
	}
	f.checkAll()
}

func TestFamily(t *testing.T) {
	ops := 18500 // of each shape: more than 200,000 in all
	if testing.Short() {
		ops = 400
	}
	if minutes, err := strconv.Atoi(os.Getenv("VARVE_SOAK_MINUTES")); err == nil {
		ops = minutes * 4500 // what two cores do in a minute
	}
	if s := os.Getenv("VARVE_FAMILY_OPS"); s != "" {
		ops, _ = strconv.Atoi(s)
	}
	var mu sync.Mutex
	total, began := make(map[string]int), time.Now()
	t.Cleanup(func() {
		if t.Failed() {
			return
		}
		var parts []string
		for _, name := range slices.Sorted(maps.Keys(total)) {
			parts = append(parts, fmt.Sprintf("%s %d", name, total[name]))
		}
		fmt.Printf("» %d operations on families of volumes under %d configurations in %s, all reads as the oracle has them (%s)\n",
			ops*len(familyShapes), len(familyShapes), time.Since(began).Round(time.Second), strings.Join(parts, ", "))
	})
	for _, s := range familyShapes {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			seed := uint64(time.Now().UnixNano())
			if v := os.Getenv("VARVE_SEED"); v != "" {
				seed, _ = strconv.ParseUint(v, 10, 64)
			}
			count := runFamily(t, s, seed, ops)
			mu.Lock()
			defer mu.Unlock()
			for name, n := range count {
				total[name] += n
			}
		})
	}
}

func runFamily(t *testing.T, s familyShape, seed uint64, ops int) map[string]int {
	if s.options.Encrypt {
		kek, err := seal.NewKEK()
		must(t, err)
		s.options.KEK = kek
	}
	f := &family{t: t, shape: s, rng: rand.New(rand.NewPCG(seed, 7)), mem: vfs.NewMem(int64(seed)), seed: seed, count: make(map[string]int)}
	f.open()
	f.what = fmt.Sprintf("seed %d begin", seed)
	f.create()
	f.create()
	for i := range ops {
		f.what = fmt.Sprintf("seed %d op %d", seed, i)
		f.step()
	}
	f.what = fmt.Sprintf("seed %d end", seed)
	f.checkAll()
	f.rebuilt()
	f.must(f.stop())
	return f.count
}
