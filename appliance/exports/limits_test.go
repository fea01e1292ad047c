package exports

import (
	"context"
	"sync"
	"testing"
	"time"

	"varve/control/state"
	"varve/volumedriver/qos"
)

// A policy's limits are in force from the next opening, and at once for what is open; the nearest scope wins.
func TestPolicyLimits(t *testing.T) {
	b := openBox(t, t.TempDir())
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := b.volumes.FollowPolicies(ctx, silence); err != nil {
			t.Error(err)
		}
	})
	defer wg.Wait()
	defer cancel()
	set := func(at state.Ref, iops int64) {
		t.Helper()
		if _, err := b.raft.Apply(t.Context(), &state.SetPolicy{Scope: at, Spec: state.PolicySpec{IOPSMax: &iops}}); err != nil {
			t.Fatal(err)
		}
	}
	set(state.ScopeOfCluster(), 500)
	d, err := b.vdisks.Create(t.Context(), "default/a", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	v, release, err := b.volumes.Open(t.Context(), d.Volume.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	if got := v.Limits(); got != (qos.Limits{IOPS: 500}) {
		t.Fatalf("opened with %+v", got)
	}
	follows := func(want qos.Limits) {
		t.Helper()
		for end := time.Now().Add(10 * time.Second); v.Limits() != want; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("limits are %+v, want %+v", v.Limits(), want)
			}
		}
	}
	set(state.Ref{Kind: state.ScopeVDisk, ID: d.Volume.ID}, 70)
	follows(qos.Limits{IOPS: 70})
	if _, err := b.raft.Apply(t.Context(), &state.DeletePolicy{Scope: state.Ref{Kind: state.ScopeVDisk, ID: d.Volume.ID}}); err != nil {
		t.Fatal(err)
	}
	follows(qos.Limits{IOPS: 500})
	set(state.ScopeOfCluster(), 0)
	follows(qos.Limits{})
}
