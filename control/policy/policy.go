// Package policy resolves policies: what holds for a vDisk or a vPool, field by field, and where it was set. The nearest
// scope that sets a field wins: the vDisk, its vPool, the cluster, the default.
package policy

import (
	"context"
	"fmt"
	"time"
	_ "time/tzdata" // an appliance image has no zone files of its own

	"github.com/google/uuid"

	"varve/control/retention"
	"varve/control/state"
)

// SourceDefault is the source of what nobody set.
const SourceDefault = "default"

// Value is a field with the scope that set it: "vdisk", "vpool", "cluster" or "default".
type Value[T any] struct {
	Value  T      `json:"value"`
	Source string `json:"source"`
}

// Effective is what holds.
type Effective struct {
	Retention            Value[state.Retention] `json:"retention"`
	ReplicaRetention     Value[state.Retention] `json:"replica_retention"`
	Zone                 Value[string]          `json:"zone"`
	SpaceOverheadPercent Value[int]             `json:"space_overhead_percent"`
	VerifyDays           Value[int]             `json:"verify_days"`
	Class                Value[string]          `json:"class"`
	PeerLoss             Value[string]          `json:"peer_loss"`
	IOPSMax              Value[int64]           `json:"iops_max"`
	BytesMax             Value[int64]           `json:"bytes_max"`
	RewindSeconds        Value[int64]           `json:"rewind_seconds"`
}

// defaults where nobody set anything.
func defaults() Effective {
	return Effective{
		Retention:            def(retention.Default()),
		ReplicaRetention:     def(retention.Default()),
		Zone:                 def("UTC"),
		SpaceOverheadPercent: def(35),
		VerifyDays:           def(30),
		Class:                def(state.ClassNone),
		PeerLoss:             def("preferred"),
		IOPSMax:              def(int64(0)),
		BytesMax:             def(int64(0)),
		RewindSeconds:        def(int64(0)),
	}
}

func def[T any](v T) Value[T] { return Value[T]{Value: v, Source: SourceDefault} }

// OfVDisk is what holds for a volume.
func OfVDisk(v *state.View, vol state.Volume) Effective { return resolve(v, state.ScopesOf(vol)) }

// OfVPool is what a vDisk of a vPool inherits.
func OfVPool(v *state.View, pool uuid.UUID) Effective { return resolve(v, state.ScopesOfVPool(pool)) }

// OfCluster is what a vPool inherits.
func OfCluster(v *state.View) Effective { return resolve(v, []state.Ref{state.ScopeOfCluster()}) }

// resolve goes from the widest scope to the nearest; each sets what it names.
func resolve(v *state.View, nearestFirst []state.Ref) Effective {
	e := defaults()
	for i := len(nearestFirst) - 1; i >= 0; i-- {
		p, ok := v.Policy(nearestFirst[i])
		if !ok {
			continue
		}
		source := nearestFirst[i].Kind
		set(&e.Retention, p.Retention, source)
		set(&e.ReplicaRetention, p.ReplicaRetention, source)
		set(&e.Zone, p.Zone, source)
		set(&e.SpaceOverheadPercent, p.SpaceOverheadPercent, source)
		set(&e.VerifyDays, p.VerifyDays, source)
		set(&e.Class, p.Class, source)
		set(&e.PeerLoss, p.PeerLoss, source)
		set(&e.IOPSMax, p.IOPSMax, source)
		set(&e.BytesMax, p.BytesMax, source)
		set(&e.RewindSeconds, p.RewindSeconds, source)
	}
	return e
}

func set[T any](to *Value[T], v *T, source string) {
	if v != nil {
		*to = Value[T]{Value: *v, Source: source}
	}
}

// Location is the time zone of a policy's days.
func (e Effective) Location() (*time.Location, error) {
	loc, err := time.LoadLocation(e.Zone.Value)
	if err != nil {
		return nil, fmt.Errorf("time zone of policy from %s: %w", e.Zone.Source, err)
	}
	return loc, nil
}

// Proposer commits a command and returns what it did. raft.Node is one.
type Proposer interface {
	Apply(ctx context.Context, cmd state.Command) (state.Result, error)
}

// Controller changes policies.
type Controller struct {
	Raft  Proposer
	Store *state.Store
}

// Set replaces what a scope sets. rev 0 replaces whatever is there.
func (c *Controller) Set(ctx context.Context, scope state.Ref, rev uint64, spec state.PolicySpec) error {
	if spec.Zone != nil {
		if err := CheckZone(*spec.Zone); err != nil {
			return err
		}
	}
	// A setting that nothing obeys would be a promise that is not kept.
	if spec.Class != nil && *spec.Class != state.ClassNone || spec.PeerLoss != nil {
		return &state.Error{Err: state.ErrInvalid, Object: "policy of " + scope.Kind,
			Detail: "this version keeps no second copy of the write log: its durability class is none", Remedy: "leave class and peer_loss out"}
	}
	if spec.ReplicaRetention != nil {
		return &state.Error{Err: state.ErrInvalid, Object: "policy of " + scope.Kind, Detail: "this version replicates no snapshots",
			Remedy: "leave replica_retention out"}
	}
	if _, err := c.Raft.Apply(ctx, &state.SetPolicy{Scope: scope, Rev: rev, Spec: spec}); err != nil {
		return fmt.Errorf("set policy: %w", err)
	}
	return nil
}

// Inherit takes away what a scope sets.
func (c *Controller) Inherit(ctx context.Context, scope state.Ref, rev uint64) error {
	if _, err := c.Raft.Apply(ctx, &state.DeletePolicy{Scope: scope, Rev: rev}); err != nil {
		return fmt.Errorf("delete policy: %w", err)
	}
	return nil
}

// CheckZone refuses what is no time zone that every node knows: this host's own is none.
func CheckZone(name string) error {
	if _, err := time.LoadLocation(name); err != nil || name == "Local" {
		return &state.Error{Err: state.ErrInvalid, Object: fmt.Sprintf("time zone %q", name), Field: "zone", Detail: "is not known",
			Remedy: "use an IANA name such as Europe/Brussels"}
	}
	return nil
}
