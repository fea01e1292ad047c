package state

import (
	"fmt"
	"slices"
	"unicode/utf8"

	"github.com/google/uuid"
)

// Policy is what an operator set on a scope. What it leaves nil is inherited: the nearest scope wins, field by field.
type Policy struct {
	Scope Ref `json:"scope"`
	PolicySpec
	Modified Time   `json:"modified"`
	Rev      uint64 `json:"rev"`
}

// PolicySpec is the fields of a policy.
type PolicySpec struct {
	// Retention says which automatic snapshots are kept, ReplicaRetention those of a replica.
	Retention        *Retention `json:"retention,omitempty"`
	ReplicaRetention *Retention `json:"replica_retention,omitempty"`
	// Zone is the IANA time zone of the retention's days.
	Zone *string `json:"zone,omitempty"`
	// SpaceOverheadPercent is how much more than its live bytes a vPool may hold before it is scrubbed: 35 is 1.35x.
	SpaceOverheadPercent *int `json:"space_overhead_percent,omitempty"`
	// VerifyDays is in how many days every checksum is read once.
	VerifyDays *int `json:"verify_days,omitempty"`
	// Class is the durability class: none, async or sync. PeerLoss says what follows when the peer is lost: preferred or required.
	Class    *string `json:"class,omitempty"`
	PeerLoss *string `json:"peer_loss,omitempty"`
	// IOPSMax and BytesMax limit a vDisk per second; 0 is no limit.
	IOPSMax  *int64 `json:"iops_max,omitempty"`
	BytesMax *int64 `json:"bytes_max,omitempty"`
	// RewindSeconds is how far back a vDisk can be had as it was at any second; 0 is not at all.
	RewindSeconds *int64 `json:"rewind_seconds,omitempty"`
}

// Retention is which automatic snapshots stay. A snapshot stays when a rule wants it and no cap forbids it; sticky ones,
// parents of clones and the base of a replication stay in any case. Package control/retention applies it.
type Retention struct {
	// AllDays keeps all of today and of the AllDays-1 days before.
	AllDays int `json:"all_days,omitempty"`
	// Buckets follow one another back in time and keep one snapshot each.
	Buckets []RetentionBucket `json:"buckets,omitempty"`
	// Last keeps the newest ones.
	Last int `json:"last,omitempty"`
	// Weekdays keep one of each such day.
	Weekdays []RetentionWeekday `json:"weekdays,omitempty"`
	// CountMax and AgeDaysMax are the caps; 0 is none.
	CountMax   int `json:"count_max,omitempty"`
	AgeDaysMax int `json:"age_days_max,omitempty"`
}

// RetentionBucket is Count spans of Days days.
type RetentionBucket struct {
	Days  int `json:"days"`
	Count int `json:"count"`
}

// RetentionWeekday keeps the best snapshot of a day of the week (0 is Sunday) for that many weeks.
type RetentionWeekday struct {
	Day   int `json:"day"`
	Weeks int `json:"weeks"`
}

const (
	tPolicy            = "policy"
	retentionDaysMax   = 36600
	retentionCountMax  = 100000
	retentionRulesMax  = 32
	policyPercentMax   = 1000
	policyRateMax      = int64(1) << 50
	policyRewindMax    = int64(31 * 24 * 3600)
	policyVerifyDayMax = 3650
)

func policyTable(frame byte) object {
	o := rowObject[Policy](frame, tPolicy, map[string]index{byID: always(func(p *Policy) []byte { return keyScope(p.Scope) })})
	o.commands = []func() Command{command[SetPolicy], command[DeletePolicy]}
	o.gone = func(t *tx, at Ref) {
		if p, ok := first[Policy](&t.View, tPolicy, byID, keyScope(at)); ok {
			row := *p
			t.del(tPolicy, &row)
		}
	}
	return o
}

func (r *Retention) check(object string) error {
	if r == nil {
		return nil
	}
	ok := len(r.Buckets) <= retentionRulesMax && len(r.Weekdays) <= retentionRulesMax &&
		0 <= r.AllDays && r.AllDays <= retentionDaysMax && 0 <= r.Last && r.Last <= retentionCountMax &&
		0 <= r.CountMax && r.CountMax <= retentionCountMax && 0 <= r.AgeDaysMax && r.AgeDaysMax <= retentionDaysMax
	days := r.AllDays
	for _, b := range r.Buckets {
		ok = ok && 1 <= b.Days && b.Days <= retentionDaysMax && 1 <= b.Count && b.Count <= retentionDaysMax
		if ok {
			days += b.Days * b.Count
		}
	}
	for _, w := range r.Weekdays {
		ok = ok && 0 <= w.Day && w.Day <= 6 && 1 <= w.Weeks && w.Weeks <= retentionDaysMax/7
	}
	if !ok || days > retentionDaysMax {
		return &Error{Err: ErrInvalid, Object: object, Detail: fmt.Sprintf("retention %+v", *r),
			Remedy: "use days, counts and weeks from 1, weekdays 0 (Sunday) to 6, and at most 100 years"}
	}
	if r.AllDays == 0 && len(r.Buckets) == 0 && r.Last == 0 && len(r.Weekdays) == 0 {
		return &Error{Err: ErrInvalid, Object: object, Detail: "retention that keeps nothing",
			Remedy: "give it at least one of all_days, buckets, last and weekdays"}
	}
	return nil
}

func (s PolicySpec) check(object string) error {
	for _, r := range []*Retention{s.Retention, s.ReplicaRetention} {
		if err := r.check(object); err != nil {
			return err
		}
	}
	within := func(v *int, low, high int) bool { return v == nil || low <= *v && *v <= high }
	rate := func(v *int64) bool { return v == nil || 0 <= *v && *v <= policyRateMax }
	switch {
	case s.Zone != nil && (len(*s.Zone) > NameBytesMax || !utf8.ValidString(*s.Zone)):
		return invalid(object, "zone")
	case !within(s.SpaceOverheadPercent, 1, policyPercentMax):
		return invalid(object, fmt.Sprintf("space overhead %d %%", *s.SpaceOverheadPercent))
	case !within(s.VerifyDays, 1, policyVerifyDayMax):
		return invalid(object, fmt.Sprintf("checksums read in %d days", *s.VerifyDays))
	case s.Class != nil && !slices.Contains([]string{ClassNone, "async", "sync"}, *s.Class):
		return invalid(object, "durability class "+quote(*s.Class))
	case s.PeerLoss != nil && *s.PeerLoss != "preferred" && *s.PeerLoss != "required":
		return invalid(object, "peer loss "+quote(*s.PeerLoss))
	case !rate(s.IOPSMax) || !rate(s.BytesMax):
		return invalid(object, "limit below 0 or too large")
	case s.RewindSeconds != nil && (*s.RewindSeconds < 0 || *s.RewindSeconds > policyRewindMax):
		return invalid(object, fmt.Sprintf("rewind window of %d seconds, more than 31 days", *s.RewindSeconds))
	}
	return nil
}

// SetPolicy sets all that a scope sets: what the spec leaves nil is inherited from now on.
type SetPolicy struct {
	Scope Ref        `json:"scope"`
	Rev   uint64     `json:"rev,omitempty"`
	Spec  PolicySpec `json:"spec"`
}

func (*SetPolicy) kind() (string, int) { return "set_policy", 1 }

func (c *SetPolicy) check() error {
	object := "policy of " + c.Scope.Kind
	if err := checkScopeRef(object, c.Scope); err != nil {
		return err
	}
	return c.Spec.check(object)
}

func (c *SetPolicy) apply(t *tx) (Result, error) {
	object := "policy of " + c.Scope.Kind
	if err := t.scopeExists(c.Scope); err != nil {
		return Result{}, err
	}
	have, found := first[Policy](&t.View, tPolicy, byID, keyScope(c.Scope))
	if found {
		if err := fresh(object, c.Rev, have.Rev); err != nil {
			return Result{}, err
		}
	} else if c.Rev != 0 {
		return Result{}, missing(object)
	}
	t.put(tPolicy, &Policy{Scope: c.Scope, PolicySpec: c.Spec, Modified: t.at, Rev: t.index})
	t.emit("config_changed", tPolicy, c.Scope.ID.String(), c.Scope)
	return Result{Created: !found}, nil
}

// DeletePolicy takes away all that a scope sets.
type DeletePolicy struct {
	Scope Ref    `json:"scope"`
	Rev   uint64 `json:"rev,omitempty"`
}

func (*DeletePolicy) kind() (string, int) { return "delete_policy", 1 }

func (c *DeletePolicy) check() error { return nil }

func (c *DeletePolicy) apply(t *tx) (Result, error) {
	object := "policy of " + c.Scope.Kind
	have, ok := first[Policy](&t.View, tPolicy, byID, keyScope(c.Scope))
	if !ok {
		return Result{}, missing(object)
	}
	row := *have
	if err := fresh(object, c.Rev, row.Rev); err != nil {
		return Result{}, err
	}
	t.del(tPolicy, &row)
	t.emit("config_changed", tPolicy, c.Scope.ID.String(), c.Scope)
	return Result{}, nil
}

// Policy returns what exactly this scope sets.
func (v *View) Policy(scope Ref) (Policy, bool) {
	p, ok := first[Policy](v, tPolicy, byID, keyScope(scope))
	if !ok {
		return Policy{}, false
	}
	return *p, true
}

// Policies returns all policies, by scope.
func (v *View) Policies() []Policy { return all[Policy](v, tPolicy, byID, nil) }

// ScopesOf returns the scopes of a vDisk's volume, the nearest first.
func ScopesOf(vol Volume) []Ref {
	return []Ref{{Kind: ScopeVDisk, ID: vol.ID}, {Kind: ScopeVPool, ID: vol.Pool}, ScopeOfCluster()}
}

// ScopesOfVPool returns the scopes of a vPool, the nearest first.
func ScopesOfVPool(pool uuid.UUID) []Ref {
	return []Ref{{Kind: ScopeVPool, ID: pool}, ScopeOfCluster()}
}
