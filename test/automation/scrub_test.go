//go:build e2e

package automation

import (
	"encoding/json"
	"math/rand/v2"
	"testing"
	"time"

	"varve/control/state"
	"varve/control/upkeep"
	"varve/test/harness"
	"varve/volumedriver"
	"varve/volumedriver/blockio"
)

// A scheduled scrub reclaims what overwriting left behind, a scheduled verification reads all that is there.
func TestScheduledScrub(t *testing.T) {
	const blocks, size = 2048, 4096
	ctx := t.Context()
	c := &clock{}
	c.Set(time.Now().UTC())
	b := openBox(t, c)
	d, err := b.vdisks.Create(ctx, "default/a", 64<<20)
	if err != nil {
		t.Fatal(err)
	}
	v, release, err := b.volumes.Open(ctx, d.Volume.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	rng := rand.New(rand.NewPCG(1, 1))
	p := make([]byte, 64*size)
	for round := range 6 {
		for off := int64(0); off < blocks*size; off += int64(len(p)) {
			if round > 0 && rng.IntN(3) == 0 {
				continue // stays, so that objects are sparse and not dead
			}
			for i := range p {
				p[i] = byte(rng.Uint32())
			}
			if err := v.Write(ctx, p, off, blockio.Flags(0)); err != nil {
				t.Fatal(err)
			}
		}
		if err := v.Flush(ctx); err != nil {
			t.Fatal(err)
		}
		if err := b.driver.Drain(ctx); err != nil {
			t.Fatal(err)
		}
	}
	leader := b.newDispatcher()
	one := 1
	if _, err := b.raft.Apply(ctx, &state.SetPolicy{Scope: state.ScopeOfCluster(), Spec: state.PolicySpec{VerifyDays: &one}}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"snapshot", "retention", "health", "reality", "certificates"} {
		if err := leader.Set(ctx, name, state.ScopeOfCluster(), 0, state.ScheduleSpec{Disabled: true}); err != nil {
			t.Fatal(err)
		}
	}
	var scrubbed, verified upkeep.ScrubReport
	for hour := range 26 {
		c.Set(c.Now().Add(time.Hour))
		leader.Look(ctx)
		b.idle()
		_ = hour
	}
	runs := make(map[string]int)
	b.raft.State().View().Tasks(func(task *state.Task) bool {
		var got upkeep.ScrubReport
		if task.State != state.TaskSucceeded {
			t.Errorf("%s is %s: %+v", task.Type, task.State, task.Problem)
		}
		if err := json.Unmarshal(task.Result, &got); err != nil {
			t.Error(err)
		}
		runs[task.Type]++
		switch task.Type {
		case "scrub.node":
			scrubbed.MovedBytes += got.MovedBytes
			scrubbed.HeldBytes = max(scrubbed.HeldBytes, got.HeldBytes)
			scrubbed.LiveBytes = max(scrubbed.LiveBytes, got.LiveBytes)
		case "verify.node":
			verified.Verified += got.Verified
			verified.VerifyErrors = append(verified.VerifyErrors, got.VerifyErrors...)
		}
		return true
	})
	if runs["scrub.node"] < 24 || runs["verify.node"] == 0 || runs["audit.node"] == 0 {
		t.Errorf("runs %v", runs)
	}
	if verified.Verified == 0 || len(verified.VerifyErrors) != 0 {
		t.Errorf("verified %+v", verified)
	}
	after, err := b.driver.Scrub(ctx, d.Volume.Pool, scrubNothing)
	if err != nil {
		t.Fatal(err)
	}
	overhead := float64(after.HeldBytes) / float64(max(after.LiveBytes, 1))
	if scrubbed.MovedBytes == 0 && scrubbed.HeldBytes <= after.HeldBytes {
		t.Errorf("nothing was reclaimed: at most %d held, now %d", scrubbed.HeldBytes, after.HeldBytes)
	}
	if overhead > 1.5 {
		t.Errorf("overhead is still %.2f", overhead)
	}
	harness.Show("schedules: a day of scheduled scrubs took a vPool from %.2fx to %.2fx of its live bytes; %d objects verified",
		float64(scrubbed.HeldBytes)/float64(max(scrubbed.LiveBytes, 1)), overhead, verified.Verified)
}

// scrubNothing makes a pass that only counts.
var scrubNothing = volumedriver.ScrubOptions{Target: 1000}
