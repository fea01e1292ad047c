package volumedriver

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver/backend"
	"varve/volumedriver/backend/local"
	"varve/volumedriver/blockio"
	"varve/volumedriver/blockmap"
	"varve/volumedriver/seal"
	"varve/volumedriver/vfs"
)

// promoted is a parent with two snapshots, a clone of the younger, and one of the older.
type promoted struct {
	*testing.T
	mem     *vfs.Mem
	options PoolOptions
	d       *Driver
	stop    func() error

	parent, young, old uuid.UUID // volumes
	s1, s2             uuid.UUID
}

func (p *promoted) open() {
	d, err := Open(Config{FS: p.mem, Dir: "/data", LogBytes: 64 << 20, SegmentBytes: 4 << 20, NoPrewrite: true, sealAge: time.Millisecond, sealAnyAge: time.Millisecond,
		retryMax: 10 * time.Millisecond, ScrubEvery: -1, ScrubBytesPerSecond: -1, RewindEvery: -1})
	must(p, err)
	b, err := local.Open(p.mem, "/backend")
	must(p, err)
	d.SetPoolOptions(testPool, p.options)
	d.AddPool(testPool, b)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx) }()
	p.d, p.stop = d, func() error {
		cancel()
		return errors.Join(<-ended, d.Close())
	}
}

func (p *promoted) spec(id uuid.UUID) Spec {
	return Spec{ID: id, Pool: testPool, Epoch: 1, Size: 8 * blockSize, PoolName: "default", Path: id.String() + ".raw", Kind: "disk"}
}

func (p *promoted) volume(id uuid.UUID) *Volume {
	p.Helper()
	v, err := p.d.Volume(p.Context(), id)
	must(p, err)
	return v
}

func (p *promoted) write(id uuid.UUID, lba int, n int, value uint64) {
	p.Helper()
	must(p, p.volume(id).Write(p.Context(), fill(n, value), int64(lba)*blockSize, blockio.FUA))
}

func (p *promoted) snapshot(of uuid.UUID, name string) uuid.UUID {
	p.Helper()
	s, err := p.volume(of).Snapshot(p.Context(), SnapshotSpec{ID: uuid.New(), Name: name, Created: time.Unix(1, 0)})
	must(p, err)
	return s.ID
}

// newPromoted: 1 everywhere, s1, 2 over the first half, s2, 3 over the first block; the clones write 4 and 5 to their last block.
func newPromoted(t *testing.T, o PoolOptions) *promoted {
	p := &promoted{T: t, mem: vfs.NewMem(1), options: o, parent: uuid.New(), young: uuid.New(), old: uuid.New()}
	p.open()
	_, err := p.d.Create(t.Context(), p.spec(p.parent))
	must(t, err)
	p.write(p.parent, 0, 8, 1)
	p.s1 = p.snapshot(p.parent, "s1")
	p.write(p.parent, 0, 4, 2)
	p.s2 = p.snapshot(p.parent, "s2")
	p.write(p.parent, 0, 1, 3)
	_, err = p.d.Clone(t.Context(), p.parent, p.s2, p.spec(p.young))
	must(t, err)
	_, err = p.d.Clone(t.Context(), p.parent, p.s1, p.spec(p.old))
	must(t, err)
	p.write(p.young, 7, 1, 4)
	p.write(p.old, 7, 1, 5)
	return p
}

// holds compares a volume's content, what it is a clone of, and its snapshots: "name:content clones".
func (p *promoted) holds(id uuid.UUID, want string, parent uuid.UUID, snaps ...string) {
	p.Helper()
	v := p.volume(id)
	if got, err := contentOf(v.Size(), func(b []byte) error { return v.Read(p.Context(), b, 0) }); err != nil || got != want {
		p.Fatalf("volume holds %s (%v), want %s", got, err, want)
	}
	if of, _, _ := v.Parent(); of != parent {
		p.Fatalf("a clone of %s, want %s", of, parent)
	}
	var got []string
	for _, s := range v.Snapshots() {
		r, err := p.d.OpenSnapshot(p.Context(), id, s.ID)
		must(p, err)
		c, err := contentOf(r.Size(), func(b []byte) error { return r.Read(p.Context(), b, 0) })
		must(p, errors.Join(err, r.Close()))
		got = append(got, s.Name+":"+c+strings.Repeat("+", s.Clones))
	}
	if strings.Join(got, " ") != strings.Join(snaps, " ") {
		p.Fatalf("snapshots %q, want %q", got, snaps)
	}
}

func (p *promoted) scrub() {
	p.Helper()
	must(p, p.d.Drain(p.Context()))
	r, err := p.d.Scrub(p.Context(), testPool, ScrubOptions{Target: 1, Grace: -1, Audit: true, Verify: true})
	must(p, err)
	if len(r.VerifyErrors) > 0 {
		p.Fatalf("scrub: %q", r.VerifyErrors)
	}
}

// rebuild starts with the backend alone.
func (p *promoted) rebuild(volumes int) {
	p.Helper()
	must(p, p.d.Drain(p.Context()))
	must(p, p.stop())
	must(p, p.mem.RemoveAll("/data"))
	p.open()
	got, err := p.d.Rebuild(p.Context(), testPool)
	must(p, err)
	for _, r := range got {
		must(p, r.Err)
	}
	if len(got) != volumes {
		p.Fatalf("%d volumes rebuilt, want %d", len(got), volumes)
	}
}

func TestPromote(t *testing.T) {
	kek, err := seal.NewKEK()
	must(t, err)
	for name, o := range map[string]PoolOptions{"plain": {}, "encrypted": {Encrypt: true, KEK: kek}} {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			p := newPromoted(t, o)
			p.holds(p.parent, "32221111", uuid.Nil, "s1:11111111+", "s2:22221111+")
			if err := p.d.Delete(ctx, p.parent); !errors.Is(err, ErrInUse) {
				t.Fatalf("a parent was deleted: %v", err)
			}
			lines, err := p.d.Promote(ctx, p.volume(p.young), p.s2)
			must(t, err)
			if len(lines) != 3 {
				t.Fatalf("lineages %+v: of the promoted, the old parent, and the other clone", lines)
			}
			all := func() {
				t.Helper()
				p.holds(p.young, "22221114", uuid.Nil, "s1:11111111+", "s2:22221111+")
				p.holds(p.parent, "32221111", p.young)
				p.holds(p.old, "11111115", p.young)
			}
			all()
			p.snapshot(p.parent, "s1") // the name is free there
			must(t, p.volume(p.parent).DeleteSnapshot(ctx, p.volume(p.parent).Snapshots()[0].ID))
			if _, err := p.volume(p.young).Snapshot(ctx, SnapshotSpec{ID: uuid.New(), Name: "s2"}); !errors.Is(err, ErrSnapshotExists) {
				t.Fatalf("two snapshots of one name: %v", err)
			}
			for _, err := range []error{p.volume(p.young).DeleteSnapshot(ctx, p.s2), p.d.Delete(ctx, p.young)} {
				if !errors.Is(err, ErrInUse) {
					t.Fatalf("the parent's parent lost what it needs: %v", err)
				}
			}
			if err := p.volume(p.young).Rollback(ctx, p.s1, SnapshotSpec{ID: uuid.New(), Name: "x"}); !errors.Is(err, ErrTakenOver) {
				t.Fatalf("rolled back to what another volume holds: %v", err)
			}
			must(t, p.stop())
			p.open()
			all()
			p.rebuild(3)
			all()

			// The old parent goes; what it holds stays.
			was := p.volume(p.parent)
			must(t, p.d.Delete(ctx, p.parent))
			if _, err := p.d.Volume(ctx, p.parent); !errors.Is(err, ErrUnknownVolume) {
				t.Fatalf("deleted, and there: %v", err)
			}
			if err := was.Write(ctx, fill(1, 9), 0, 0); !errors.Is(err, blockio.ErrClosed) {
				t.Fatalf("a deleted volume takes writes: %v", err)
			}
			if err := was.Read(ctx, make([]byte, blockSize), 0); !errors.Is(err, blockio.ErrClosed) {
				t.Fatalf("a deleted volume is read: %v", err)
			}
			must(t, p.d.Delete(ctx, p.parent))
			left := func() {
				t.Helper()
				p.holds(p.young, "22221114", uuid.Nil, "s1:11111111+", "s2:22221111")
				p.holds(p.old, "11111115", p.young)
			}
			left()
			p.scrub()
			left()
			must(t, p.stop())
			p.open()
			left()
			p.rebuild(2)
			left()
			p.scrub()
			left()

			// A clone of what another volume holds, and promoted over the promoted one.
			third := uuid.New()
			_, err = p.d.Clone(ctx, p.young, p.s2, p.spec(third))
			must(t, err)
			_, err = p.d.Promote(ctx, p.volume(third), uuid.Nil)
			must(t, err)
			p.holds(third, "22221111", uuid.Nil, "s1:11111111+", "s2:22221111+")
			p.holds(p.young, "22221114", third)
			_, err = p.d.Promote(ctx, p.volume(p.young), uuid.Nil)
			must(t, err)
			p.holds(p.young, "22221114", uuid.Nil, "s1:11111111+", "s2:22221111+")
			p.holds(third, "22221111", p.young)
			p.rebuild(3)
			p.holds(third, "22221111", p.young)
			must(t, p.d.Delete(ctx, third))

			// What is deleted while maps hang on it stays for them, and goes with the last.
			must(t, p.volume(p.young).DeleteSnapshot(ctx, p.s2))
			p.holds(p.young, "22221114", uuid.Nil, "s1:11111111+")
			must(t, p.d.Flatten(ctx, p.volume(p.old), nil))
			p.holds(p.young, "22221114", uuid.Nil, "s1:11111111")
			must(t, p.volume(p.young).DeleteSnapshot(ctx, p.s1))
			p.rebuild(2)
			p.holds(p.young, "22221114", uuid.Nil)
			p.scrub()
			p.holds(p.young, "22221114", uuid.Nil)
			p.holds(p.old, "11111115", uuid.Nil)
			must(t, p.d.Delete(ctx, p.young))
			must(t, p.d.Delete(ctx, p.old))
			p.scrub()
			p.nothingLeft()
			must(t, p.stop())
		})
	}
}

// nothingLeft: no object, no volume, no record.
func (p *promoted) nothingLeft() {
	p.Helper()
	store, err := p.d.backendOf(testPool)
	must(p, err)
	must(p, eachObject(p.Context(), store, "", func(i backend.Info) error {
		p.Errorf("object %s is left", i.Name)
		return nil
	}))
	for _, prefix := range []string{rootPrefix, snapshotPrefix, ownerPrefix, releasePrefix, objectPrefix, doomPrefix} {
		must(p, p.d.maps.Scan([]byte(prefix), func(key, _ []byte) error {
			p.Errorf("record %q is left", key)
			return nil
		}))
	}
	if n := p.d.Stats().Volumes; n != 0 {
		p.Errorf("%d volumes are left", n)
	}
}

func TestPromoteRefused(t *testing.T) {
	ctx := t.Context()
	p := newPromoted(t, PoolOptions{})
	if _, err := p.d.Promote(ctx, p.volume(p.parent), uuid.Nil); !errors.Is(err, ErrNoParent) {
		t.Errorf("what is no clone was promoted: %v", err)
	}
	if _, err := p.d.Promote(ctx, p.volume(p.young), p.s1); !errors.Is(err, ErrUnknownSnapshot) {
		t.Errorf("promoted over what it is no clone of: %v", err)
	}
	p.snapshot(p.young, "s1")
	if _, err := p.d.Promote(ctx, p.volume(p.young), uuid.Nil); !errors.Is(err, ErrSnapshotExists) {
		t.Errorf("promoted to two snapshots of one name: %v", err)
	}
	must(t, p.volume(p.parent).SetTemplate(ctx, true))
	if _, err := p.d.Promote(ctx, p.volume(p.old), uuid.Nil); !errors.Is(err, blockio.ErrReadOnly) {
		t.Errorf("promoted over a template: %v", err)
	}
	p.holds(p.parent, "32221111", uuid.Nil, "s1:11111111+", "s2:22221111+")
	must(t, p.stop())
}

// TestPromoteAfterRollback: the parent stands on a line of its own, which begins at what is handed over.
func TestPromoteAfterRollback(t *testing.T) {
	p := newPromoted(t, PoolOptions{})
	must(t, p.volume(p.parent).Rollback(t.Context(), p.s2, SnapshotSpec{ID: uuid.New(), Name: "before"}))
	lines, err := p.d.Promote(t.Context(), p.volume(p.young), p.s2)
	must(t, err)
	if len(lines) != 3 {
		t.Errorf("lineages %+v", lines)
	}
	p.holds(p.parent, "22221111", p.young, "before:32221111")
	p.holds(p.young, "22221114", uuid.Nil, "s1:11111111+", "s2:22221111+")
	must(t, p.stop())
}

// TestMutualClones: two volumes are clones of one another after promotions from two lines and a rollback; a promotion ends it.
func TestMutualClones(t *testing.T) {
	ctx := t.Context()
	p := newPromoted(t, PoolOptions{})
	must(t, p.d.Delete(ctx, p.old))
	x2 := p.snapshot(p.parent, "x2")
	must(t, p.volume(p.parent).Rollback(ctx, p.s1, SnapshotSpec{ID: uuid.New(), Name: "before"}))
	p.snapshot(p.parent, "x3")
	for _, id := range []uuid.UUID{p.young, p.parent} {
		_, err := p.d.Promote(ctx, p.volume(id), uuid.Nil)
		must(t, err)
	}
	p.holds(p.parent, "11111111", uuid.Nil, "s1:11111111+", "x2:32221111", "before:32221111", "x3:11111111")
	p.holds(p.young, "22221114", p.parent, "s2:22221111")
	must(t, p.volume(p.parent).Rollback(ctx, x2, SnapshotSpec{ID: uuid.New(), Name: "mutual"}))
	l, err := p.d.Lineage(ctx, p.volume(p.parent))
	if must(t, err); l != (Lineage{p.parent, p.young, p.s2}) {
		t.Fatalf("%+v", l)
	}
	mutual := func() {
		t.Helper()
		p.holds(p.parent, "32221111", p.young, "s1:11111111+", "x2:32221111", "before:32221111", "x3:11111111", "mutual:11111111")
		p.holds(p.young, "22221114", p.parent, "s2:22221111+")
		for _, id := range []uuid.UUID{p.parent, p.young} {
			if err := p.d.Delete(ctx, id); !errors.Is(err, ErrInUse) {
				t.Fatalf("deleted, and another is a clone of it: %v", err)
			}
		}
	}
	mutual()
	p.scrub()
	must(t, p.stop())
	p.open()
	mutual()
	p.rebuild(2)
	mutual()
	_, err = p.d.Promote(ctx, p.volume(p.parent), p.s2)
	must(t, err)
	p.holds(p.parent, "32221111", uuid.Nil, "s1:11111111", "s2:22221111+", "x2:32221111", "before:32221111", "x3:11111111", "mutual:11111111")
	p.holds(p.young, "22221114", p.parent)
	must(t, p.d.Delete(ctx, p.young))
	p.scrub()
	must(t, p.d.Delete(ctx, p.parent))
	p.scrub()
	p.nothingLeft()
	must(t, p.stop())
}

// TestRolledBack: whatever becomes of a rollback whose caller went away, or whose host lost its power, it can be told whether it was done.
func TestRolledBack(t *testing.T) {
	ctx := t.Context()
	p := newPromoted(t, PoolOptions{})
	if _, err := p.volume(p.parent).RolledBack(ctx, uuid.New()); !errors.Is(err, ErrUnknownSnapshot) {
		t.Fatalf("nothing was kept: %v", err)
	}
	rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 1))
	seen := make(map[string]int)
	for i := 0; i < 60 || i < 600 && len(seen) < 3; i++ {
		v, kept := p.volume(p.parent), uuid.New()
		p.write(p.parent, 0, 8, 9)
		short, cancel := context.WithTimeout(ctx, time.Duration(rng.Int64N(int64(10*time.Millisecond))))
		err := v.Rollback(short, p.s1, SnapshotSpec{ID: kept, Name: kept.String()})
		cancel()
		if rng.IntN(2) == 0 {
			mem := p.mem.Crash(rng.Int64(), 0.3)
			_ = p.stop()
			p.mem = mem
			p.open()
			v = p.volume(p.parent)
		}
		done, asked := v.RolledBack(ctx, kept)
		what, want := "done", "11111111"
		switch {
		case errors.Is(asked, ErrUnknownSnapshot):
			what, want = "nothing kept", "99999999"
		case asked != nil:
			t.Fatal(asked)
		case !done:
			what, want = "kept, not done", "99999999"
		}
		got, read := contentOf(v.Size(), func(b []byte) error { return v.Read(ctx, b, 0) })
		if read != nil || got != want || err == nil && !done {
			t.Fatalf("round %d: %s, it holds %s (%v); the rollback ended with %v", i, what, got, read, err)
		}
		if asked == nil {
			must(t, v.DeleteSnapshot(ctx, kept))
		}
		seen[what]++
	}
	t.Log(seen)
	must(t, p.stop())
}

// fillDisk leaves the map store without room: what would change a record fails, and changes nothing.
func (p *promoted) fillDisk() {
	p.Helper()
	must(p, p.d.Drain(p.Context()))
	p.mem.SetCapacity(1 << 30)
	total, available, err := p.mem.Space("/data")
	must(p, err)
	p.mem.SetCapacity(int64(total-available) + 16<<20) // less than what the store keeps free, and room for the log
	filler := make([]byte, 64<<10)
	for range 64 {
		if err = p.d.maps.Put([]blockmap.KV{{Key: []byte("filler"), Value: filler}}, false); err != nil {
			break
		}
	}
	if !errors.Is(err, blockio.ErrNoSpace) {
		p.Fatalf("the disk is not full: %v", err)
	}
}

// TestPromoteFullDisk: where the record of a promotion, of a husk, of a deletion cannot be stored, nobody sees any of it, and the same
// succeeds when there is room.
func TestPromoteFullDisk(t *testing.T) {
	ctx := t.Context()
	p := newPromoted(t, PoolOptions{})
	refused := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, blockio.ErrNoSpace) {
			t.Errorf("%s on a full disk: %v", what, err)
		}
	}
	mine := p.snapshot(p.young, "mine")
	p.fillDisk()
	_, err := p.d.Promote(ctx, p.volume(p.young), p.s2)
	refused("promote", err)
	refused("delete a snapshot", p.volume(p.young).DeleteSnapshot(ctx, mine))
	p.holds(p.young, "22221114", p.parent, "mine:22221114")
	p.holds(p.parent, "32221111", uuid.Nil, "s1:11111111+", "s2:22221111+")
	p.mem.SetCapacity(0)
	must(t, p.volume(p.young).DeleteSnapshot(ctx, mine))
	_, err = p.d.Promote(ctx, p.volume(p.young), p.s2)
	must(t, err)

	p.fillDisk()
	refused("delete the old parent", p.d.Delete(ctx, p.parent))
	p.holds(p.parent, "32221111", p.young)
	p.holds(p.young, "22221114", uuid.Nil, "s1:11111111+", "s2:22221111+")
	p.mem.SetCapacity(0)
	p.write(p.parent, 0, 1, 6) // it is no husk
	p.holds(p.parent, "62221111", p.young)
	must(t, p.d.Delete(ctx, p.parent))

	p.fillDisk()
	refused("delete what only a map needs", p.volume(p.young).DeleteSnapshot(ctx, p.s2))
	p.holds(p.young, "22221114", uuid.Nil, "s1:11111111+", "s2:22221111")
	p.mem.SetCapacity(0)
	must(t, p.stop())
	p.open()
	p.holds(p.young, "22221114", uuid.Nil, "s1:11111111+", "s2:22221111")
	must(t, p.volume(p.young).DeleteSnapshot(ctx, p.s2))
	p.holds(p.young, "22221114", uuid.Nil, "s1:11111111+")
	must(t, p.d.Delete(ctx, p.old))
	must(t, p.d.Delete(ctx, p.young))
	p.scrub()
	p.nothingLeft()
	must(t, p.stop())
}
