package policy_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/uuid"

	"varve/control/policy"
	"varve/control/state"
)

// log applies commands in memory.
type log struct {
	store *state.Store
	index uint64
}

func (l *log) Apply(_ context.Context, cmd state.Command) (state.Result, error) {
	entry, err := state.Encode(cmd, uuid.New(), state.Time(time.Now().UnixNano()))
	if err != nil {
		return state.Result{}, err
	}
	l.index++
	return l.store.Apply(l.index, entry)
}

func p[T any](v T) *T { return &v }

// The nearest scope that sets a field wins, each field for itself.
func TestNearestWins(t *testing.T) {
	ctx := t.Context()
	l := &log{store: state.New()}
	c := &policy.Controller{Raft: l, Store: l.store}
	pool := uuid.MustParse("aaaaaaaa-0000-4000-8000-000000000001")
	if _, err := l.Apply(ctx, &state.CreateVPool{ID: pool, Name: "default", Backend: state.Backend{Kind: "local", Dir: "/a"}, Key: make([]byte, 32)}); err != nil {
		t.Fatal(err)
	}
	res, err := l.Apply(ctx, &state.CreateInode{FSID: state.FSIDOf(pool), Parent: state.RootIno, Name: "a.raw", Kind: state.File,
		How: state.Guarded, Volume: uuid.New(), Size: 512})
	if err != nil {
		t.Fatal(err)
	}
	set := func(at state.Ref, s state.PolicySpec) {
		t.Helper()
		if err := c.Set(ctx, at, 0, s); err != nil {
			t.Fatal(err)
		}
	}
	vol, err := l.store.View().Volume(res.Volume)
	if err != nil {
		t.Fatal(err)
	}
	scopes := state.ScopesOf(vol)
	set(scopes[2], state.PolicySpec{VerifyDays: p(10), IOPSMax: p(int64(100)), Zone: p("Europe/Brussels")})
	set(scopes[1], state.PolicySpec{VerifyDays: p(5), Retention: &state.Retention{Last: 3}})
	set(scopes[0], state.PolicySpec{IOPSMax: p(int64(0))})
	e := policy.OfVDisk(l.store.View(), vol)
	for what, ok := range map[string]bool{
		"days of the vpool":                  e.VerifyDays == policy.Value[int]{Value: 5, Source: "vpool"},
		"a zero set on the vdisk is set":     e.IOPSMax == policy.Value[int64]{Value: 0, Source: "vdisk"},
		"zone of the cluster":                e.Zone == policy.Value[string]{Value: "Europe/Brussels", Source: "cluster"},
		"retention of the vpool":             e.Retention.Source == "vpool" && e.Retention.Value.Last == 3 && e.Retention.Value.AllDays == 0,
		"overhead by default":                e.SpaceOverheadPercent == policy.Value[int]{Value: 35, Source: policy.SourceDefault},
		"a vpool does not look at its vdisk": policy.OfVPool(l.store.View(), pool).IOPSMax.Value == 100,
		"nor the cluster at its vpools":      policy.OfCluster(l.store.View()).VerifyDays.Value == 10,
	} {
		if !ok {
			t.Errorf("%s: %+v", what, e)
		}
	}
	if err := c.Inherit(ctx, scopes[1], 0); err != nil {
		t.Fatal(err)
	}
	if e := policy.OfVDisk(l.store.View(), vol); e.VerifyDays.Source != "cluster" || e.Retention.Source != policy.SourceDefault {
		t.Errorf("%+v", e)
	}
	// What this version does not do cannot be set.
	for name, s := range map[string]state.PolicySpec{"class": {Class: p("sync")}, "peer loss": {PeerLoss: p("required")},
		"replica": {ReplicaRetention: &state.Retention{Last: 1}}, "zone": {Zone: p("Local")}} {
		if err := c.Set(ctx, scopes[0], 0, s); !errors.Is(err, state.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
