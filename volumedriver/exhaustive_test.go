package volumedriver

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver/backend/local"
	"varve/volumedriver/blockio"
	"varve/volumedriver/vfs"
)

// The exhaustive test: every program of one and of two operations that change a volume or its family, with the power cut
// before every call of the file system. After each cut the family must be as it was before or after the operation under way
// (or, within a rollback or flatten, between their documented steps).
//
//	VARVE_PROGRAMS=regexp runs some of them, by the names of their operations: "clone, scrub".

const exhaustiveBlocks = 6

var (
	cloneID   = uuid.MustParse("00000000-0000-4000-8000-00000000000c")
	snapFirst = uuid.MustParse("a0000000-0000-4000-8000-000000000001")

	snapRewound = uuid.MustParse("b0000000-0000-4000-8000-000000000001")
)

// small is a volume with a snapshot of an older state, and what may become a clone of it.
type small struct {
	d     *Driver
	stop  func() error
	next  byte         // names snapshots
	ahead atomic.Int64 // the driver's clock, of the real one
}

func openSmall(fsys vfs.FS, run bool) (*small, error) {
	s, x := shapes[1], &small{next: 1}
	d, err := Open(Config{FS: fsys, Dir: "/data", LogBytes: s.log, SegmentBytes: s.seg, BatchBytes: int(s.seg / 4), MapBudgetBytes: s.mapBudget,
		SCOBytes: s.sco, CheckpointBytes: s.cp, NoPrewrite: true, sealAge: time.Hour, sealAnyAge: time.Hour, retryMax: 5 * time.Millisecond,
		CheckpointEvery: time.Hour, ScrubEvery: -1, ScrubBytesPerSecond: -1, RewindEvery: -1,
		Now: func() time.Time { return time.Now().Add(time.Duration(x.ahead.Load())) }})
	if err != nil {
		return nil, err
	}
	b, err := local.Open(fsys, "/backend")
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	d.AddPool(testPool, b)
	x.d, x.stop = d, d.Close
	if run {
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() { ended <- d.Run(ctx) }()
		x.stop = func() error {
			cancel()
			return errors.Join(<-ended, d.Close())
		}
	}
	return x, nil
}

// state describes everything that can be read: volumes, snapshots, their content.
func (x *small) state(ctx context.Context) (string, error) {
	var out []string
	for _, id := range []uuid.UUID{testVolume, cloneID} {
		v, err := x.d.Volume(ctx, id)
		if errors.Is(err, ErrUnknownVolume) {
			continue
		}
		if err != nil {
			return "", err
		}
		head, err := contentOf(v.Size(), func(p []byte) error { return v.Read(ctx, p, 0) })
		if err != nil {
			return "", fmt.Errorf("head: %w", err)
		}
		_, parent, _ := v.Parent()
		line := fmt.Sprintf("%s template=%v parent=%.4s %s", id.String()[34:], v.Template(), parent, head)
		for _, s := range v.Snapshots() {
			r, err := x.d.OpenSnapshot(ctx, id, s.ID)
			if err != nil {
				return "", fmt.Errorf("snapshot %s: %w", s.Name, err)
			}
			c, err := contentOf(r.Size(), func(p []byte) error { return r.Read(ctx, p, 0) })
			if err := errors.Join(err, r.Close()); err != nil {
				return "", fmt.Errorf("snapshot %s: %w", s.Name, err)
			}
			line += fmt.Sprintf(" @%s:%s", s.Name, c)
		}
		out = append(out, line)
	}
	return strings.Join(out, "\n"), nil
}

func contentOf(size int64, read func(p []byte) error) (string, error) {
	p := make([]byte, size)
	if err := read(p); err != nil {
		return "", err
	}
	var b strings.Builder
	for at := 0; at < len(p); at += blockSize {
		v, err := valueOf(p[at : at+blockSize])
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&b, "%d", v)
	}
	return b.String(), nil
}

// smallOp is one operation of a program; partly lists what may be seen between its steps, given the states before and after.
type smallOp struct {
	name string
	do   func(ctx context.Context, x *small, v *Volume) error
	// steps says that states other than before and after may be seen: the snapshot that a rollback takes, blocks that a
	// flatten has copied already (which read the same).
	steps bool
}

func (x *small) spec() SnapshotSpec {
	x.next++
	return SnapshotSpec{ID: uuid.UUID{0xa0, x.next, 15: 1}, Name: fmt.Sprintf("s%d", x.next), Created: time.Unix(1, 0)}
}

func fill(n int, value uint64) []byte {
	p := make([]byte, n*blockSize)
	for i := range n {
		stampBlock(p[i*blockSize:(i+1)*blockSize], value)
	}
	return p
}

var smallOps = []smallOp{
	{"write", func(ctx context.Context, x *small, v *Volume) error { return v.Write(ctx, fill(4, 3), 0, blockio.FUA) }, false},
	{"overwrite", func(ctx context.Context, x *small, v *Volume) error {
		return v.Write(ctx, fill(3, 4), 2*blockSize, blockio.FUA)
	}, false},
	{"zero", func(ctx context.Context, x *small, v *Volume) error {
		return v.Zero(ctx, blockSize, 3*blockSize, blockio.FUA)
	}, false},
	{"shrink", func(ctx context.Context, x *small, v *Volume) error { return v.Resize(ctx, 3*blockSize) }, false},
	{"snapshot", func(ctx context.Context, x *small, v *Volume) error {
		_, err := v.Snapshot(ctx, x.spec())
		return err
	}, false},
	{"delete snapshot", func(ctx context.Context, x *small, v *Volume) error {
		err := v.DeleteSnapshot(ctx, snapFirst)
		if errors.Is(err, ErrInUse) || errors.Is(err, ErrUnknownSnapshot) {
			return nil
		}
		return err
	}, false},
	{"clone", func(ctx context.Context, x *small, v *Volume) error {
		_, err := x.d.Clone(ctx, testVolume, snapFirst, Spec{ID: cloneID, Pool: testPool, Epoch: 1, PoolName: "default", Path: "clone.raw", Kind: "disk"})
		if errors.Is(err, ErrUnknownSnapshot) {
			return nil
		}
		return err
	}, false},
	{"write to the clone", func(ctx context.Context, x *small, _ *Volume) error {
		c, err := x.d.Volume(ctx, cloneID)
		if errors.Is(err, ErrUnknownVolume) {
			return nil
		}
		if err != nil {
			return err
		}
		return c.Write(ctx, fill(2, 5), blockSize, blockio.FUA)
	}, false},
	{"flatten", func(ctx context.Context, x *small, _ *Volume) error {
		c, err := x.d.Volume(ctx, cloneID)
		if errors.Is(err, ErrUnknownVolume) {
			return nil
		}
		if err != nil {
			return err
		}
		return x.d.Flatten(ctx, c, nil)
	}, false},
	{"delete the clone", func(ctx context.Context, x *small, _ *Volume) error { return x.d.Delete(ctx, cloneID) }, false},
	{"rollback", func(ctx context.Context, x *small, v *Volume) error {
		err := v.Rollback(ctx, snapFirst, x.spec())
		if errors.Is(err, ErrUnknownSnapshot) {
			return nil
		}
		return err
	}, true},
	{"template", func(ctx context.Context, x *small, v *Volume) error {
		if err := v.SetTemplate(ctx, true); err != nil {
			return err
		}
		return v.SetTemplate(ctx, false)
	}, true},
	{"drain", func(ctx context.Context, x *small, _ *Volume) error { return x.d.Drain(ctx) }, false},
	{"scrub", func(ctx context.Context, x *small, _ *Volume) error {
		if err := x.d.Drain(ctx); err != nil {
			return err
		}
		_, err := x.d.Scrub(ctx, testPool, ScrubOptions{Target: 1, Grace: -1, Audit: true})
		return err
	}, false},
}

// smallRewind takes a snapshot of what the volume was when its content was 2, which comes after a base and before a second overwrite.
var smallRewind = smallOp{"rewind", func(ctx context.Context, x *small, v *Volume) error {
	_, err := v.Rewind(ctx, smallEpoch.Add(4*time.Second), SnapshotSpec{ID: snapRewound, Name: "rewound", Created: time.Unix(1, 0)}, nil)
	return err
}, false}

// afterRewind are operations on what smallRewind has made.
var afterRewind = []smallOp{
	{"delete what was rewound to", func(ctx context.Context, _ *small, v *Volume) error { return v.DeleteSnapshot(ctx, snapRewound) }, false},
	{"rollback to it", func(ctx context.Context, x *small, v *Volume) error { return v.Rollback(ctx, snapRewound, x.spec()) }, true},
}

// deleteTaken deletes what the clone got by its promotion.
var deleteTaken = smallOp{"delete what it took over", func(ctx context.Context, x *small, _ *Volume) error {
	c, err := x.d.Volume(ctx, cloneID)
	if err == nil {
		err = c.DeleteSnapshot(ctx, snapFirst)
	}
	if errors.Is(err, ErrUnknownVolume) {
		return nil
	}
	return err
}, false}

// promoteOp promotes the clone; goneOp deletes what it was cloned from.
var promoteOp, goneOp = smallOp{"promote", func(ctx context.Context, x *small, _ *Volume) error {
	c, err := x.d.Volume(ctx, cloneID)
	if err == nil {
		_, err = x.d.Promote(ctx, c, snapFirst)
	}
	return err
}, false}, smallOp{"delete the old parent", func(ctx context.Context, x *small, _ *Volume) error { return x.d.Delete(ctx, testVolume) }, false}

// smallCloned is smallBase with a clone of the first snapshot, promoted or not.
func smallCloned(promote, gone bool) (*vfs.Mem, error) {
	ctx := context.Background()
	mem, err := smallBase()
	if err != nil {
		return nil, err
	}
	x, err := openSmall(mem, true)
	if err != nil {
		return nil, err
	}
	_, err = x.d.Clone(ctx, testVolume, snapFirst, Spec{ID: cloneID, Pool: testPool, Epoch: 1, PoolName: "default", Path: "clone.raw", Kind: "disk"})
	if err == nil && promote {
		err = promoteOp.do(ctx, x, nil)
	}
	if err == nil && gone {
		err = goneOp.do(ctx, x, nil)
	}
	if err == nil {
		err = x.d.Drain(ctx)
	}
	return mem, errors.Join(err, x.stop())
}

// smallEpoch is when smallWindow begins, by its clock.
var smallEpoch = time.Date(2033, 3, 3, 3, 3, 3, 0, time.UTC)

// smallWindow is smallBase with a rewind window: content 2 is written in one second, content 7 over it in another.
func smallWindow() (*vfs.Mem, error) {
	ctx := context.Background()
	mem, err := smallBase()
	if err != nil {
		return nil, err
	}
	x, err := openSmall(mem, true)
	if err != nil {
		return nil, err
	}
	x.at(time.Second)
	v, err := x.d.Volume(ctx, testVolume)
	if err == nil {
		err = v.SetRewind(ctx, time.Hour)
	}
	for i, value := range []uint64{8, 2, 7} {
		x.at(time.Duration(i+2) * time.Second)
		if err == nil {
			err = v.Write(ctx, fill(4-i, value), int64(i)*blockSize, blockio.FUA)
		}
	}
	if err == nil {
		x.at(5 * time.Second)
		err = x.d.Drain(ctx)
	}
	return mem, errors.Join(err, x.stop())
}

// at sets the clock to a moment after smallEpoch.
func (x *small) at(d time.Duration) {
	x.ahead.Store(int64(time.Until(smallEpoch.Add(d + time.Millisecond))))
}

// smallCut is a power cut in the middle of operation number op of a program.
type smallCut struct {
	fs   *vfs.Mem
	op   int
	what string
}

func TestExhaustivePrograms(t *testing.T) {
	if testing.Short() {
		t.Skip("minutes")
	}
	base, err := smallBase()
	must(t, err)
	window, err := smallWindow()
	must(t, err)
	type program struct {
		on  *vfs.Mem
		ops []smallOp
	}
	var programs []program
	only := regexp.MustCompile(os.Getenv("VARVE_PROGRAMS"))
	add := func(on *vfs.Mem, ops ...smallOp) {
		if only.MatchString(namesOf(ops)) {
			programs = append(programs, program{on, ops})
		}
	}
	for _, a := range smallOps {
		add(base, a)
		for _, b := range smallOps {
			add(base, a, b)
		}
		add(window, a, smallRewind)
		add(window, smallRewind, a)
	}
	for _, b := range afterRewind {
		add(window, smallRewind, b)
	}
	cloned, err := smallCloned(false, false)
	must(t, err)
	promoted, err := smallCloned(true, false)
	must(t, err)
	husk, err := smallCloned(true, true)
	must(t, err)
	for _, op := range smallOps {
		if op.name != "clone" && op.name != "delete the clone" && op.name != "flatten" {
			add(cloned, op, promoteOp)
			add(cloned, promoteOp, op)
			add(promoted, op, goneOp)
		}
	}
	add(promoted, goneOp, goneOp)
	add(husk, deleteTaken, smallOps[slices.IndexFunc(smallOps, func(o smallOp) bool { return o.name == "flatten" })])
	for _, name := range []string{"write to the clone", "drain", "scrub", "delete the clone"} {
		op := smallOps[slices.IndexFunc(smallOps, func(o smallOp) bool { return o.name == name })]
		add(husk, op, deleteTaken)
		add(husk, deleteTaken, op)
	}
	if len(programs) == 0 {
		t.Skipf("no program is called %s", only) // no failure: whoever plants a bug would take it for the bug found
	}
	var cuts atomic.Int64
	began := time.Now()
	var wg sync.WaitGroup
	for lane := range 2 {
		wg.Go(func() {
			for i := lane; i < len(programs) && !t.Failed(); i += 2 {
				n, err := runSmall(programs[i].on.Kill(), programs[i].ops, i)
				cuts.Add(int64(n))
				if err != nil {
					t.Errorf("program %d: %v", i, err)
				}
			}
		})
	}
	wg.Wait()
	if !t.Failed() {
		fmt.Printf("» %d programs of up to two of %d operations, with a rewind too, %d power cuts, one before every call of the file system, in %s: 0 violations\n",
			len(programs), len(smallOps), cuts.Load(), time.Since(began).Round(time.Second))
	}
}

func namesOf(program []smallOp) string {
	var names []string
	for _, op := range program {
		names = append(names, op.name)
	}
	return strings.Join(names, ", ")
}

// smallBase makes what every program begins with: content 1, a snapshot of it, content 2 over half of it, all on the backend.
func smallBase() (*vfs.Mem, error) {
	ctx := context.Background()
	mem := vfs.NewMem(1)
	x, err := openSmall(mem, true)
	if err != nil {
		return nil, err
	}
	v, err := x.d.Create(ctx, Spec{ID: testVolume, Pool: testPool, Epoch: 1, Size: exhaustiveBlocks * blockSize, PoolName: "default", Path: "disk.raw", Kind: "disk"})
	if err == nil {
		err = v.Write(ctx, fill(exhaustiveBlocks, 1), 0, blockio.FUA)
	}
	if err == nil {
		_, err = v.Snapshot(ctx, SnapshotSpec{ID: snapFirst, Name: "first", Created: time.Unix(1, 0)})
	}
	if err == nil {
		err = v.Write(ctx, fill(3, 2), 0, blockio.FUA)
	}
	if err == nil {
		err = x.d.Drain(ctx)
	}
	return mem, errors.Join(err, x.stop())
}

// runSmall runs one program, cuts the power on the way, and checks what each cut has left.
func runSmall(mem *vfs.Mem, program []smallOp, seed int) (int, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	what := namesOf(program)
	x, err := openSmall(mem, true)
	if err != nil {
		return 0, err
	}
	x.at(6 * time.Second)
	v, err := x.d.Volume(ctx, testVolume)
	if err != nil && !errors.Is(err, ErrUnknownVolume) { // a husk
		return 0, err
	}
	var mu sync.Mutex
	var cuts []smallCut
	at := 0
	rng := rand.New(rand.NewPCG(uint64(seed), 9))
	states := make([]string, 1, len(program)+1)
	if states[0], err = x.state(ctx); err != nil {
		return 0, err
	}
	mem.OnCall(func(c vfs.Call) {
		mu.Lock()
		defer mu.Unlock()
		cuts = append(cuts, smallCut{mem.Crash(rng.Int64(), []float64{0, 0.5, 1}[rng.IntN(3)]), at, fmt.Sprintf("%v %s", c.Op, c.Path)})
	})
	for i, op := range program {
		if err = op.do(ctx, x, v); err != nil && !errors.Is(err, blockio.ErrBeyondEnd) { // after a shrink
			err = fmt.Errorf("%s: %w", op.name, err)
			break
		}
		mu.Lock()
		at = i + 1
		mu.Unlock()
		s, e := x.state(ctx)
		if err = e; err != nil {
			break
		}
		states = append(states, s)
	}
	mem.OnCall(nil)
	if err := errors.Join(err, x.stop()); err != nil {
		return 0, fmt.Errorf("%s: %w", what, err)
	}
	for _, c := range cuts {
		got, err := recoverSmall(ctx, c.fs)
		if err != nil {
			return 0, fmt.Errorf("%s: cut in operation %d before %s: %w", what, c.op, c.what, err)
		}
		want := states[c.op:min(c.op+2, len(states))]
		if slices.Contains(want, got) {
			continue
		}
		if c.op < len(program) && program[c.op].steps && between(got, states[c.op]) {
			continue
		}
		return 0, fmt.Errorf("%s: cut in operation %d before %s left\n%s\nwant\n%s", what, c.op, c.what, got, strings.Join(want, "\nor\n"))
	}
	return len(cuts), nil
}

// between says whether a state is the one before with one more snapshot, or a template: what a rollback, and SetTemplate
// twice, may show on their way.
func between(got, before string) bool {
	if strings.Replace(got, "template=true", "template=false", 1) == before {
		return true
	}
	g, b := strings.Split(got, "\n"), strings.Split(before, "\n")
	if len(g) != len(b) || !slices.Equal(g[1:], b[1:]) {
		return false
	}
	rest, ok := strings.CutPrefix(g[0], b[0])
	return ok && strings.HasPrefix(rest, " @s") && strings.Count(rest, "@") == 1
}

// recoverSmall opens what a cut has left, lets it finish what it has begun, and describes it.
func recoverSmall(ctx context.Context, fsys *vfs.Mem) (string, error) {
	x, err := openSmall(fsys, true)
	if err != nil {
		return "", err
	}
	s, err := x.state(ctx)
	return s, errors.Join(err, x.stop())
}
