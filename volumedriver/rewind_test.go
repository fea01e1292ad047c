package volumedriver

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
)

// TestRewind: every second of the window can be had, and nothing before it or after now; what is overwritten stays for as long as
// the window is, and no longer.
func TestRewind(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	mem, err := smallWindow()
	must(t, err)
	x, err := openSmall(mem, true)
	must(t, err)
	defer func() { must(t, x.stop()) }()
	x.at(6 * time.Second)
	v, err := x.d.Volume(ctx, testVolume)
	must(t, err)
	scrub := func() VolumeSpace {
		_, err := x.d.Scrub(ctx, testPool, ScrubOptions{Target: 1, Grace: -1})
		must(t, err)
		x.d.objects.forget(nil)
		s, _ := x.d.SpaceOf(testVolume)
		return s
	}
	if s := scrub(); s.History != 3*blockSize { // of 8888 two blocks, of 222 two, and one of each is in the base of nobody
		t.Logf("history %d", s.History)
	}
	for second, want := range map[int]string{2: "222111", 3: "888811", 4: "822211", 5: "827711", 6: "827711"} {
		s, err := v.Rewind(ctx, smallEpoch.Add(time.Duration(second)*time.Second+700*time.Millisecond), x.spec(), nil)
		must(t, err)
		r, err := x.d.OpenSnapshot(ctx, testVolume, s.ID)
		must(t, err)
		got, err := contentOf(r.Size(), func(p []byte) error { return r.Read(ctx, p, 0) })
		must(t, errors.Join(err, r.Close()))
		if got != want {
			t.Errorf("at second %d: %s, want %s", second, got, want)
		}
		c, err := x.d.Clone(ctx, testVolume, s.ID, Spec{ID: uuid.New(), Pool: testPool, Epoch: 1})
		must(t, err)
		if got, err := contentOf(c.Size(), func(p []byte) error { return c.Read(ctx, p, 0) }); err != nil || got != want {
			t.Errorf("clone at second %d: %s (%v), want %s", second, got, err, want)
		}
		must(t, x.d.Delete(ctx, c.ID()))
		must(t, v.DeleteSnapshot(ctx, s.ID))
	}
	for _, second := range []int{0, 1, 7, 1000} {
		if _, err := v.Rewind(ctx, smallEpoch.Add(time.Duration(second)*time.Second), x.spec(), nil); !errors.Is(err, ErrRewind) {
			t.Errorf("at second %d: %v", second, err)
		}
	}
	if from, window := v.RewindRange(); window != time.Hour || !from.Equal(smallEpoch.Add(2*time.Second)) {
		t.Errorf("the window of %s begins at %s", window, from)
	}
	// An hour on, the window begins later, and the scrub takes what is older.
	x.at(30 * time.Minute)
	must(t, v.Write(ctx, fill(1, 9), 0, 0))
	must(t, x.d.rewinder.keep(ctx))
	x.at(2 * time.Hour)
	must(t, x.d.rewinder.keep(ctx))
	if _, err := v.Rewind(ctx, smallEpoch.Add(4*time.Second), x.spec(), nil); !errors.Is(err, ErrRewind) {
		t.Errorf("after the window: %v", err)
	}
	if s := scrub(); s.History != 0 {
		t.Errorf("after the window %d bytes are still history", s.History)
	}
	must(t, v.SetRewind(ctx, 0))
	if n := len(v.snaps); n != 1 {
		t.Errorf("without a window there are %d snapshots", n)
	}
}

// TestRewindLineage: after rewinds on top of each other and at the same record, a rollback to one and a promotion over another, a
// rebuild sees the lineage that the driver saw, whichever of them it was.
func TestRewindLineage(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, seconds := range [][2]time.Duration{{3, 4}, {4, 3}, {3, 3}, {2, 3}, {2, 2}} {
		for way := range 4 {
			cloned, back := way&1, way>>1
			mem, err := smallWindow()
			must(t, err)
			x, err := openSmall(mem, true)
			must(t, err)
			x.at(6 * time.Second)
			v, err := x.d.Volume(ctx, testVolume)
			must(t, err)
			var made [2]Snapshot
			for i, second := range seconds {
				made[i], err = v.Rewind(ctx, smallEpoch.Add(second*time.Second), x.spec(), nil)
				must(t, err)
			}
			c, err := x.d.Clone(ctx, testVolume, made[cloned].ID, Spec{ID: cloneID, Pool: testPool, Epoch: 1, PoolName: "default", Path: "clone.raw", Kind: "disk"})
			must(t, err)
			left := x.spec()
			must(t, v.Rollback(ctx, made[back].ID, left))
			_, err = x.d.Promote(ctx, c, made[cloned].ID)
			must(t, err)
			if _, of, _ := v.Parent(); of != snapFirst {
				t.Errorf("rewound to %v, cloned %d, rolled back to %d: the volume is a clone of %s, want what all have in common, %s", seconds, cloned, back, of, snapFirst)
			}
			want, err := x.state(ctx)
			must(t, err)
			must(t, x.d.Drain(ctx))
			must(t, x.stop())
			must(t, mem.RemoveAll("/data"))
			x, err = openSmall(mem, true)
			must(t, err)
			all, err := x.d.Rebuild(ctx, testPool)
			must(t, err)
			for _, r := range all {
				must(t, r.Err)
			}
			got, err := x.state(ctx)
			must(t, err)
			if got != want {
				t.Errorf("rewound to %v, cloned %d, rolled back to %d: rebuilt\n%s\nwant\n%s", seconds, cloned, back, got, want)
			}
			// The line that the rollback has left goes with the last snapshot on it.
			v, err = x.d.Volume(ctx, testVolume)
			must(t, err)
			must(t, v.DeleteSnapshot(ctx, left.ID))
			_, err = x.d.Scrub(ctx, testPool, ScrubOptions{Target: 1, Grace: -1, Audit: true})
			must(t, err)
			got, err = x.state(ctx)
			must(t, errors.Join(err, x.stop()))
			if want := strings.Replace(want, " @"+left.Name+":827711", "", 1); got != want {
				t.Errorf("without what the rollback has kept\n%s\nwant\n%s", got, want)
			}
		}
	}
}
