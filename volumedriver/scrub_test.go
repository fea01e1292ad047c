package volumedriver

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"varve/volumedriver/backend"
	"varve/volumedriver/backend/local"
	"varve/volumedriver/sco"
	"varve/volumedriver/vfs"
)

// full is a backend without room for containers.
type full struct{ backend.Backend }

func (f full) Put(ctx context.Context, name string, parts ...[]byte) error {
	if strings.HasPrefix(name, "c/") {
		return backend.ErrNoSpace
	}
	return f.Backend.Put(ctx, name, parts...)
}

// TestScrubOfFullBackend: a pass that finds no room ends, says so, and leaves everything readable; the next one that finds
// room does the work.
func TestScrubOfFullBackend(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	mem := vfs.NewMem(1)
	x, err := openSmall(mem, true)
	must(t, err)
	defer func() { must(t, x.stop()) }()
	store, err := local.Open(mem, "/backend")
	must(t, err)
	x.d.AddPool(testPool, full{store})
	v := create(t, x.d, testVolume, 64*blockSize)
	must(t, v.Write(ctx, fill(64, 1), 0, 0))
	must(t, x.d.Drain(ctx))
	must(t, v.Write(ctx, fill(40, 2), 0, 0))
	must(t, x.d.Drain(ctx))
	began := time.Now()
	if _, err := x.d.Scrub(ctx, testPool, ScrubOptions{Target: 1, Grace: -1}); !errors.Is(err, backend.ErrNoSpace) {
		t.Fatalf("scrub of a full backend: %v", err)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Fatalf("it took %s", took)
	}
	x.d.AddPool(testPool, store)
	r, err := x.d.Scrub(ctx, testPool, ScrubOptions{Target: 1, Grace: -1})
	must(t, err)
	if r.Moved != 1 || r.Deleted != 1 {
		t.Fatalf("with room again: %+v", r)
	}
	got, err := contentOf(64*blockSize, func(p []byte) error { return v.Read(ctx, p, 0) })
	must(t, err)
	if want := strings.Repeat("2", 40) + strings.Repeat("1", 24); got != want {
		t.Fatalf("it reads %s", got)
	}
}

// TestMarkAsksClonesThemselves: what leaves of a clone's own name stays, also if the record of the snapshot that it began as is lost.
// The scrub asks every volume whose map may name an SCO, not only the one that wrote it.
func TestMarkAsksClonesThemselves(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	mem, err := smallBase()
	must(t, err)
	x, err := openSmall(mem, true)
	must(t, err)
	defer func() { must(t, x.stop()) }()
	parent, err := x.d.Volume(ctx, testVolume)
	must(t, err)
	clone, err := x.d.Clone(ctx, testVolume, snapFirst, Spec{ID: cloneID, Pool: testPool, Epoch: 1, PoolName: "default", Path: "clone.raw", Kind: "disk"})
	must(t, err)
	must(t, clone.Write(ctx, fill(1, 5), 0, 0))
	must(t, x.d.Drain(ctx))
	parent.mu.Lock()
	parent.snaps = nil
	parent.mu.Unlock()
	must(t, parent.Write(ctx, fill(exhaustiveBlocks, 9), 0, 0))
	must(t, x.d.Drain(ctx))
	r, err := x.d.Scrub(ctx, testPool, ScrubOptions{Target: 1, Grace: -1})
	must(t, err)
	x.d.objects.forget(nil)
	got, err := contentOf(clone.Size(), func(p []byte) error { return clone.Read(ctx, p, 0) })
	if want := "5" + strings.Repeat("1", exhaustiveBlocks-1); err != nil || got != want {
		t.Fatalf("after a scrub that moved %d SCOs the clone reads %q (%v), want %q", r.Moved, got, err, want)
	}
}

// TestContainersMoveWhole: of a container that stays, all SCOs are in use. One that was left in part would hold its space for as long as
// any of it is live, and the scrub would not know.
func TestContainersMoveWhole(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	mem := vfs.NewMem(1)
	x, err := openSmall(mem, true)
	must(t, err)
	defer func() { must(t, x.stop()) }()
	store, err := local.Open(mem, "/backend")
	must(t, err)
	x.d.AddPool(testPool, store)
	const blocks = 64
	v := create(t, x.d, testVolume, blocks*blockSize)
	r := rand.New(rand.NewPCG(1, 1))
	must(t, v.Write(ctx, fill(blocks, 1), 0, 0))
	containers, shared := 0, 0
	for range 25 {
		for range 12 {
			must(t, v.Write(ctx, fill(1, 2), r.Int64N(blocks)*blockSize, 0))
		}
		must(t, x.d.Drain(ctx))
		_, err := x.d.Scrub(ctx, testPool, ScrubOptions{Target: 1.2, Grace: -1})
		must(t, err)
		must(t, eachObject(ctx, store, "c/", func(i backend.Info) error {
			containers++
			members := 0
			err := x.d.eachSCO(ctx, store, i.Name, func(h *sco.Header, _ place) error {
				members++
				at, err := x.d.placeOf(testVolume, h.Seq)
				if err == nil && at.Container != i.Name {
					t.Fatalf("SCO %d has left %s, which is still there, for %s", h.Seq, i.Name, at.Container)
				}
				return err
			})
			if members > 1 {
				shared++
			}
			return err
		}))
	}
	if shared == 0 {
		t.Fatalf("%d containers, none with several SCOs", containers)
	}
}

// TestScrubDue: a pass is made when it is time and something has changed, and before that when much was written.
func TestScrubDue(t *testing.T) {
	began := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	const held = 1 << 40
	grown := uint64(held / 20 / (16 << 20))
	for _, c := range []struct {
		name    string
		last    scrubState
		graves  bool
		after   time.Duration // since began
		changes uint64
		want    bool
	}{
		{"not yet", scrubState{}, false, 9 * time.Minute, 1, false},
		{"time, the first pass", scrubState{}, false, 10 * time.Minute, 1, true},
		{"time, and nothing changed", scrubState{at: began, changes: 7}, false, 10 * time.Minute, 7, false},
		{"time, and something is to be deleted", scrubState{at: began, changes: 7}, true, 10 * time.Minute, 7, true},
		{"early: a twentieth of what is held", scrubState{at: began, changes: 7}, false, time.Minute, 7 + grown, true},
		{"a hundredth", scrubState{at: began, changes: 7}, false, time.Minute, 7 + grown/5, false},
		{"the last pass took long", scrubState{at: began, took: time.Minute, changes: 7}, false, 2 * time.Minute, 7 + grown, false},
		{"it has rested since", scrubState{at: began, took: time.Minute, changes: 7}, false, 5 * time.Minute, 7 + grown, true},
		{"a volume was deleted", scrubState{at: began, changes: 1 << 40}, false, time.Minute, 7, false},
	} {
		d := &Driver{cfg: Config{}.withDefaults()}
		s := newScrubber(d)
		if s.last[testPool] = c.last; c.last.at.IsZero() {
			delete(s.last, testPool)
		}
		s.reports[testPool] = ScrubReport{HeldBytes: held}
		if c.graves {
			s.graves[testPool] = map[string]grave{"x": {}}
		}
		if got := s.due(testPool, began, began.Add(c.after), c.changes); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}
