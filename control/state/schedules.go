package state

import (
	"encoding/json"
	"fmt"
	"unicode/utf8"

	"github.com/google/uuid"
)

// Scopes that schedules and policies are set on. A vDisk is named by its volume.
const (
	ScopeCluster = "cluster"
	ScopeVPool   = "vpool"
	ScopeVDisk   = "vdisk"
)

// ScopeOfCluster is the widest scope.
func ScopeOfCluster() Ref { return Ref{Kind: ScopeCluster} }

// Schedule says when a recurring task runs, for the objects of a scope that have no nearer schedule of that name. The
// names that this version knows have a default each (package control/schedule); others are an operator's own and bring
// their task.
type Schedule struct {
	Name  string `json:"name"`
	Scope Ref    `json:"scope"`
	ScheduleSpec
	Created  Time   `json:"created"`
	Modified Time   `json:"modified"`
	Rev      uint64 `json:"rev"`
}

// ScheduleSpec is what an operator sets.
type ScheduleSpec struct {
	// Cron has five fields, in the time zone Zone (IANA name; "" is UTC).
	Cron     string          `json:"cron"`
	Zone     string          `json:"zone,omitempty"`
	Disabled bool            `json:"disabled,omitempty"`
	Task     string          `json:"task,omitempty"`
	Args     json.RawMessage `json:"args,omitempty"`
}

// ScheduleRun is the last run of a schedule on a scope.
type ScheduleRun struct {
	Name  string `json:"name"`
	Scope Ref    `json:"scope"`
	// Due is the time the run was scheduled for, not that of its dispatch.
	Due  Time      `json:"due"`
	At   Time      `json:"at"`
	Task uuid.UUID `json:"task,omitzero"`
	Rev  uint64    `json:"rev"`
}

// SchedulesMax bounds the rows of a cluster.
const SchedulesMax = 20000

const (
	tSchedule    = "schedule"
	tScheduleRun = "schedule_run"
	byScope      = "scope"
)

func keyScope(at Ref) []byte { return append(append([]byte(at.Kind), 0), at.ID[:]...) }

func keyNamed(name string, at Ref) []byte { return append(append([]byte(name), 0), keyScope(at)...) }

func keyScoped(at Ref, name string) []byte { return append(keyScope(at), name...) }

func scheduleTable(frame byte) object {
	o := rowObject[Schedule](frame, tSchedule, map[string]index{
		byID:    always(func(s *Schedule) []byte { return keyNamed(s.Name, s.Scope) }),
		byScope: always(func(s *Schedule) []byte { return keyScoped(s.Scope, s.Name) }),
	})
	o.commands = []func() Command{command[SetSchedule], command[DeleteSchedule]}
	o.gone = func(t *tx, at Ref) {
		for _, s := range all[Schedule](&t.View, tSchedule, byScope, keyScope(at)) {
			t.del(tSchedule, &s)
		}
	}
	return o
}

func scheduleRunTable(frame byte) object {
	o := rowObject[ScheduleRun](frame, tScheduleRun, map[string]index{
		byID:    always(func(s *ScheduleRun) []byte { return keyNamed(s.Name, s.Scope) }),
		byScope: always(func(s *ScheduleRun) []byte { return keyScoped(s.Scope, s.Name) }),
	})
	o.commands = []func() Command{command[DispatchSchedule]}
	o.gone = func(t *tx, at Ref) {
		for _, s := range all[ScheduleRun](&t.View, tScheduleRun, byScope, keyScope(at)) {
			t.del(tScheduleRun, &s)
		}
	}
	return o
}

// checkScopeRef refuses what is no scope.
func checkScopeRef(object string, at Ref) error {
	if at.Kind != ScopeCluster && at.Kind != ScopeVPool && at.Kind != ScopeVDisk || (at.Kind == ScopeCluster) != (at.ID == uuid.Nil) {
		return invalid(object, fmt.Sprintf("scope %s %s", quote(at.Kind), at.ID))
	}
	return nil
}

// scopeExists refuses a scope whose object is not there.
func (v *View) scopeExists(at Ref) error {
	var err error
	switch at.Kind {
	case ScopeVPool:
		_, err = v.VPoolByID(at.ID)
	case ScopeVDisk:
		_, err = v.Volume(at.ID)
	}
	return err
}

// SetSchedule sets a schedule on a scope. The proposer has checked Cron and Zone, which need a clock's knowledge.
type SetSchedule struct {
	Name  string       `json:"name"`
	Scope Ref          `json:"scope"`
	Rev   uint64       `json:"rev,omitempty"`
	Spec  ScheduleSpec `json:"spec"`
}

// scheduleArgsBytesMax is less than a task's: schedules stay.
const scheduleArgsBytesMax = 16 << 10

func (*SetSchedule) kind() (string, int) { return "set_schedule", 1 }

func (c *SetSchedule) check() error {
	object := "schedule " + quote(c.Name)
	if err := checkLabel("schedule", c.Name); err != nil {
		return err
	}
	for _, s := range []string{c.Spec.Cron, c.Spec.Zone} {
		if len(s) > NameBytesMax || !utf8.ValidString(s) {
			return invalid(object, "cron or zone too long or not UTF-8")
		}
	}
	if c.Spec.Task != "" {
		if err := checkLabel("task", c.Spec.Task); err != nil {
			return err
		}
	}
	if err := checkScopeRef(object, c.Scope); err != nil {
		return err
	}
	return checkJSON(object, "arguments", c.Spec.Args, scheduleArgsBytesMax)
}

func (c *SetSchedule) apply(t *tx) (Result, error) {
	object := "schedule " + quote(c.Name)
	if err := t.scopeExists(c.Scope); err != nil {
		return Result{}, err
	}
	row := Schedule{Name: c.Name, Scope: c.Scope, Created: t.at}
	have, found := first[Schedule](&t.View, tSchedule, byID, keyNamed(c.Name, c.Scope))
	switch {
	case found:
		row = *have
		if err := fresh(object, c.Rev, row.Rev); err != nil {
			return Result{}, err
		}
	case c.Rev != 0:
		return Result{}, missing(object)
	case count[Schedule](&t.View, tSchedule, byID, nil) >= SchedulesMax:
		return Result{}, &Error{Err: ErrNoSpace, Object: object, Detail: fmt.Sprintf("%d schedules", SchedulesMax)}
	}
	row.ScheduleSpec, row.Modified, row.Rev = c.Spec, t.at, t.index
	row.Args = canonical(row.Args)
	t.put(tSchedule, &row)
	t.emit("config_changed", tSchedule, c.Name, c.Scope)
	return Result{Created: !found}, nil
}

// DeleteSchedule takes a schedule away: what it was set on inherits again.
type DeleteSchedule struct {
	Name  string `json:"name"`
	Scope Ref    `json:"scope"`
	Rev   uint64 `json:"rev,omitempty"`
}

func (*DeleteSchedule) kind() (string, int) { return "delete_schedule", 1 }

func (c *DeleteSchedule) check() error { return nil }

func (c *DeleteSchedule) apply(t *tx) (Result, error) {
	object := "schedule " + quote(c.Name)
	have, ok := first[Schedule](&t.View, tSchedule, byID, keyNamed(c.Name, c.Scope))
	if !ok {
		return Result{}, missing(object)
	}
	row := *have
	if err := fresh(object, c.Rev, row.Rev); err != nil {
		return Result{}, err
	}
	t.del(tSchedule, &row)
	t.emit("config_changed", tSchedule, c.Name, c.Scope)
	return Result{}, nil
}

// DispatchSchedule records a run and queues its task in one step, if Last is the run before: of two leaders that both think
// it is time, one is refused. Without a Task it only sets where counting starts, which may be earlier.
type DispatchSchedule struct {
	Name  string      `json:"name"`
	Scope Ref         `json:"scope"`
	Last  Time        `json:"last"`
	Due   Time        `json:"due"`
	Task  *SubmitTask `json:"task,omitempty"`
}

func (*DispatchSchedule) kind() (string, int) { return "dispatch_schedule", 1 }

func (c *DispatchSchedule) check() error {
	object := "schedule " + quote(c.Name)
	if err := checkLabel("schedule", c.Name); err != nil {
		return err
	}
	if c.Due <= c.Last && c.Task != nil {
		return invalid(object, "a run before the last one")
	}
	if c.Task != nil {
		if err := c.Task.check(); err != nil {
			return err
		}
	}
	return checkScopeRef(object, c.Scope)
}

func (c *DispatchSchedule) apply(t *tx) (Result, error) {
	object := "schedule " + quote(c.Name)
	if err := t.scopeExists(c.Scope); err != nil {
		return Result{}, err
	}
	row := ScheduleRun{Name: c.Name, Scope: c.Scope}
	if have, ok := first[ScheduleRun](&t.View, tScheduleRun, byID, keyNamed(c.Name, c.Scope)); ok {
		row = *have
	}
	if row.Due != c.Last {
		return Result{}, stale(object, row.Rev)
	}
	var res Result
	if c.Task != nil {
		var err error
		if res, err = t.submit(c.Task.ID, c.Task.Spec); err != nil {
			return Result{}, err
		}
		row.Task = res.Object
	}
	row.Due, row.At, row.Rev = c.Due, t.at, t.index
	t.put(tScheduleRun, &row)
	return res, nil
}

// Schedule returns the schedule of this name on exactly this scope.
func (v *View) Schedule(name string, scope Ref) (Schedule, bool) {
	s, ok := first[Schedule](v, tSchedule, byID, keyNamed(name, scope))
	if !ok {
		return Schedule{}, false
	}
	return *s, true
}

// Schedules returns all schedules, by name.
func (v *View) Schedules() []Schedule { return all[Schedule](v, tSchedule, byID, nil) }

// ScheduleRun returns the last run of a schedule on a scope.
func (v *View) ScheduleRun(name string, scope Ref) (ScheduleRun, bool) {
	s, ok := first[ScheduleRun](v, tScheduleRun, byID, keyNamed(name, scope))
	if !ok {
		return ScheduleRun{}, false
	}
	return *s, true
}
