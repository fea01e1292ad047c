package schedule

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/google/uuid"

	"varve/control/policy"
	"varve/control/state"
)

// Proposer commits a command and returns what it did. raft.Node is one.
type Proposer interface {
	Apply(ctx context.Context, cmd state.Command) (state.Result, error)
}

// TaskOf makes the task of a type, with the defaults of that type. jobs.Types does, through the appliance.
type TaskOf func(typ, object, by string, args json.RawMessage) (state.TaskSpec, error)

// Config wires a dispatcher.
type Config struct {
	Raft    Proposer
	Store   *state.Store
	Entries []Entry
	Task    TaskOf
	Log     *slog.Logger
	Now     func() time.Time
}

// Dispatcher starts what is due while it runs, and changes schedules at any time.
type Dispatcher struct{ cfg Config }

const (
	lookEvery  = 30 * time.Second
	futureSlip = time.Hour
)

// New wires a dispatcher and starts nothing.
func New(cfg Config) *Dispatcher {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Dispatcher{cfg: cfg}
}

// Run leads until ctx ends.
func (d *Dispatcher) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		v, changed, err := d.cfg.Store.Watch("schedule")
		if err != nil {
			return err
		}
		timer := time.NewTimer(d.look(ctx, v))
		select {
		case <-ctx.Done():
		case <-changed:
		case <-timer.C:
		}
		timer.Stop()
	}
	return nil
}

// Look dispatches what is due now and returns how long until something may be. Run does so by itself.
func (d *Dispatcher) Look(ctx context.Context) time.Duration { return d.look(ctx, d.cfg.Store.View()) }

func (d *Dispatcher) look(ctx context.Context, v *state.View) time.Duration {
	now := d.cfg.Now()
	wait := lookEvery
	for _, s := range settings(v, d.cfg.Entries) {
		if s.Spec.Disabled || s.Entry.Task == "" || ctx.Err() != nil {
			continue
		}
		next, err := d.one(ctx, v, s, now)
		if err != nil {
			if ctx.Err() == nil {
				d.cfg.Log.Warn("schedule could not be started, it is tried again", "schedule", s.Entry.Name, "scope", s.Scope, "err", err)
			}
			continue
		}
		if !next.IsZero() {
			wait = min(wait, next.Sub(now))
		}
	}
	return max(wait, time.Second)
}

// one dispatches a schedule on a scope if it is due, and returns when it is due next.
func (d *Dispatcher) one(ctx context.Context, v *state.View, s Setting, now time.Time) (time.Time, error) {
	c, err := ParseCron(s.Spec.Cron, s.Spec.Zone)
	if err != nil {
		return time.Time{}, err
	}
	run, ran := v.ScheduleRun(s.Entry.Name, s.Scope)
	if ran && time.Unix(0, int64(run.Due)).After(now.Add(futureSlip)) {
		// The clock was ahead when it ran last: counting starts anew, or it would not run for as long as the clock was ahead.
		d.cfg.Log.Warn("last run of schedule is in the future, counting starts anew", "schedule", s.Entry.Name, "scope", s.Scope,
			"last", time.Unix(0, int64(run.Due)))
		_, err := d.cfg.Raft.Apply(ctx, &state.DispatchSchedule{Name: s.Entry.Name, Scope: s.Scope, Last: run.Due, Due: state.Time(now.UnixNano())})
		return now.Add(time.Second), err
	}
	// A schedule that was set or changed after its last run counts from then.
	last := time.Unix(0, int64(max(run.Due, s.since)))
	due := c.Due(last, now)
	if due.IsZero() {
		return c.Next(now), nil
	}
	cmd := &state.DispatchSchedule{Name: s.Entry.Name, Scope: s.Scope, Last: run.Due, Due: state.Time(due.UnixNano())}
	if cmd.Task, err = d.task(s, cmd.Due); err != nil {
		return time.Time{}, err
	}
	res, err := d.cfg.Raft.Apply(ctx, cmd)
	switch {
	case errors.Is(err, state.ErrConflict), errors.Is(err, state.ErrNotFound):
		return now.Add(time.Second), nil // another leader was faster, or the scope is gone: the next look shows it
	case err != nil:
		return time.Time{}, fmt.Errorf("dispatch: %w", err)
	}
	d.cfg.Log.Info("schedule started", "schedule", s.Entry.Name, "scope", s.Scope, "due", due, "late", now.Sub(due).Round(time.Second),
		"task", res.Object, "new", res.Created)
	return c.Next(now), nil
}

func (d *Dispatcher) task(s Setting, due state.Time) (*state.SubmitTask, error) {
	args := s.Spec.Args
	if len(args) == 0 {
		b, err := json.Marshal(Args{Schedule: s.Entry.Name, Scope: s.Scope, Due: due})
		if err != nil {
			return nil, fmt.Errorf("arguments: %w", err)
		}
		args = b
	}
	spec, err := d.cfg.Task(s.Entry.Task, s.Scope.Kind, "schedule "+s.Entry.Name, args)
	if err != nil {
		return nil, err
	}
	// The id follows from the run: however often its dispatch is proposed, there is one task.
	id := uuid.NewSHA1(s.Scope.ID, fmt.Appendf(nil, "%s %s %d", s.Entry.Name, s.Scope.Kind, due))
	return &state.SubmitTask{ID: id, Spec: spec}, nil
}

// Status is a schedule as an operator sees it.
type Status struct {
	Setting
	Rev  uint64
	Last time.Time
	// Task is that of the last run.
	Task uuid.UUID
	Next time.Time
	// Err says why it cannot run.
	Err error
}

// List returns every schedule on every scope that has one, by name.
func (d *Dispatcher) List() []Status {
	v, now := d.cfg.Store.View(), d.cfg.Now()
	var out []Status
	for _, s := range settings(v, d.cfg.Entries) {
		st := Status{Setting: s, Rev: s.rev}
		if run, ok := v.ScheduleRun(s.Entry.Name, s.Scope); ok && run.Task != uuid.Nil {
			st.Last, st.Task = time.Unix(0, int64(run.At)), run.Task
		}
		c, err := ParseCron(s.Spec.Cron, s.Spec.Zone)
		if err != nil {
			st.Err = err
		} else if !s.Spec.Disabled {
			st.Next = c.Next(now)
		}
		out = append(out, st)
	}
	slices.SortStableFunc(out, func(a, b Status) int {
		if a.Entry.Name != b.Entry.Name {
			if a.Entry.Name < b.Entry.Name {
				return -1
			}
			return 1
		}
		return 0
	})
	return out
}

// Set overrides or disables an entry on a scope, or sets one of the operator's own, which names its task. Where Cron is ""
// the entry's own holds.
func (d *Dispatcher) Set(ctx context.Context, name string, scope state.Ref, rev uint64, spec state.ScheduleSpec) error {
	object := fmt.Sprintf("schedule %q", name)
	entry, known := d.entry(name)
	switch {
	case known && (spec.Task != "" || len(spec.Args) != 0):
		return &state.Error{Err: state.ErrInvalid, Object: object, Detail: "has its own task", Remedy: "give a schedule of your own another name"}
	case known && !entry.PerVDisk && scope.Kind != state.ScopeCluster:
		return &state.Error{Err: state.ErrInvalid, Object: object, Detail: "is the cluster's alone"}
	case !known && (spec.Task == "" || scope.Kind != state.ScopeCluster):
		return &state.Error{Err: state.ErrInvalid, Object: object, Detail: "is not one of this version's", Remedy: "name its task, on the cluster"}
	case !known:
		if _, err := d.cfg.Task(spec.Task, "", "", spec.Args); err != nil {
			return err
		}
	}
	cron := spec.Cron
	if cron == "" {
		cron = entry.Cron
	}
	if _, err := ParseCron(cron, spec.Zone); err != nil {
		return err
	}
	if _, err := d.cfg.Raft.Apply(ctx, &state.SetSchedule{Name: name, Scope: scope, Rev: rev, Spec: spec}); err != nil {
		return fmt.Errorf("set schedule: %w", err)
	}
	return nil
}

func (d *Dispatcher) entry(name string) (Entry, bool) {
	for _, e := range d.cfg.Entries {
		if e.Name == name {
			return e, true
		}
	}
	return Entry{}, false
}

// Inherit takes a scope's row away.
func (d *Dispatcher) Inherit(ctx context.Context, name string, scope state.Ref, rev uint64) error {
	if _, err := d.cfg.Raft.Apply(ctx, &state.DeleteSchedule{Name: name, Scope: scope, Rev: rev}); err != nil {
		return fmt.Errorf("delete schedule: %w", err)
	}
	return nil
}

// RunNow queues an entry's task outside its times. It does not count as a run.
func (d *Dispatcher) RunNow(ctx context.Context, name string, scope state.Ref, by string) (uuid.UUID, error) {
	for _, s := range settings(d.cfg.Store.View(), d.cfg.Entries) {
		if s.Entry.Name != name || s.Scope != scope {
			continue
		}
		task, err := d.task(s, state.Time(d.cfg.Now().UnixNano()))
		if err != nil {
			return uuid.Nil, err
		}
		task.ID, task.Spec.By = uuid.New(), by
		res, err := d.cfg.Raft.Apply(ctx, task)
		if err != nil {
			return uuid.Nil, fmt.Errorf("run schedule %s now: %w", name, err)
		}
		return res.Object, nil
	}
	return uuid.Nil, &state.Error{Err: state.ErrNotFound, Object: fmt.Sprintf("schedule %q", name)}
}

// SetZone sets the time zone of schedules that name none.
func (d *Dispatcher) SetZone(ctx context.Context, zone, by string) error {
	if err := policy.CheckZone(zone); err != nil {
		return err
	}
	if _, err := d.cfg.Raft.Apply(ctx, &state.SetConfig{Key: ZoneKey, Value: zone, By: by}); err != nil {
		return fmt.Errorf("set time zone: %w", err)
	}
	return nil
}
