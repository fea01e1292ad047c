package jobs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/google/uuid"

	"varve/control/state"
)

// Defaults of a broker.
const (
	leaseDefault   = 30 * time.Second
	keepEnded      = 10000
	keepEndedFor   = 14 * 24 * time.Hour
	trimEvery      = 10 * time.Minute
	proposeTimeout = 20 * time.Second
	candidatesMax  = 20000
)

// BrokerConfig wires a broker.
type BrokerConfig struct {
	Raft  Proposer
	Store *state.Store
	Types Types
	Log   *slog.Logger
	Now   func() time.Time
	NewID func() uuid.UUID
	// LeaseTTL is how long a worker may be silent; 0 is 30 s.
	LeaseTTL time.Duration
}

// Broker gives tasks to this node's workers, and ends silent workers' leases while it runs.
type Broker struct{ cfg BrokerConfig }

// lease is what the leader knows of a running task: the row as last seen, and until when it may stay so.
type lease struct {
	rev   uint64
	until time.Time
}

// NewBroker wires a broker and starts nothing.
func NewBroker(cfg BrokerConfig) *Broker {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.NewID == nil {
		cfg.NewID = uuid.New
	}
	if cfg.LeaseTTL == 0 {
		cfg.LeaseTTL = leaseDefault
	}
	return &Broker{cfg: cfg}
}

// Submit queues a task of a type that this node knows. created is false where the ensure mode found one that stands for it.
func (b *Broker) Submit(ctx context.Context, spec state.TaskSpec) (id uuid.UUID, created bool, err error) {
	return b.SubmitAs(ctx, b.cfg.NewID(), spec)
}

// SubmitAs is Submit with an id: the same one never makes two tasks.
func (b *Broker) SubmitAs(ctx context.Context, id uuid.UUID, spec state.TaskSpec) (uuid.UUID, bool, error) {
	if _, ok := b.cfg.Types[spec.Type]; !ok {
		return uuid.Nil, false, &state.Error{Err: state.ErrInvalid, Object: fmt.Sprintf("task %q", spec.Type), Detail: "no such type of task"}
	}
	res, err := b.cfg.Raft.Apply(ctx, &state.SubmitTask{ID: id, Spec: spec})
	if err != nil {
		return uuid.Nil, false, fmt.Errorf("submit task %s: %w", spec.Type, err)
	}
	return res.Object, res.Created, nil
}

// Cancel ends a task that waits and asks one that runs to stop at its next step.
func (b *Broker) Cancel(ctx context.Context, id uuid.UUID) error {
	if _, err := b.cfg.Raft.Apply(ctx, &state.CancelTask{ID: id}); err != nil {
		return fmt.Errorf("cancel task: %w", err)
	}
	return nil
}

// Retry queues a task again that failed or was cancelled.
func (b *Broker) Retry(ctx context.Context, id uuid.UUID) error {
	if _, err := b.cfg.Raft.Apply(ctx, &state.RetryTask{ID: id}); err != nil {
		return fmt.Errorf("retry task: %w", err)
	}
	return nil
}

// Wait returns the task when it has ended, or as it is when ctx ends, with ctx's error.
func (b *Broker) Wait(ctx context.Context, id uuid.UUID) (state.Task, error) {
	for {
		v, changed, err := b.cfg.Store.Watch("task")
		if err != nil {
			return state.Task{}, err
		}
		t, err := v.Task(id)
		if err != nil || !t.Active() {
			return t, err
		}
		select {
		case <-ctx.Done():
			return t, ctx.Err()
		case <-changed:
		}
	}
}

// Run leads until ctx ends: it gives back the tasks whose workers are silent, and forgets old ones.
func (b *Broker) Run(ctx context.Context) error {
	leases := make(map[uuid.UUID]lease)
	trimmed := b.cfg.Now()
	b.trim(ctx)
	for ctx.Err() == nil {
		v, changed, err := b.cfg.Store.Watch("task")
		if err != nil {
			return err
		}
		for _, t := range b.silent(v, leases) {
			b.expire(ctx, t)
		}
		if b.cfg.Now().Sub(trimmed) >= trimEvery {
			b.trim(ctx)
			trimmed = b.cfg.Now()
		}
		timer := time.NewTimer(b.nextExpiry(leases))
		select {
		case <-ctx.Done():
		case <-changed:
		case <-timer.C:
		}
		timer.Stop()
	}
	return nil
}

// silent brings leases up to date and returns the tasks whose leases have run out.
func (b *Broker) silent(v *state.View, leases map[uuid.UUID]lease) (out []state.Task) {
	now := b.cfg.Now()
	running := v.RunningTasks()
	live := make(map[uuid.UUID]bool, len(running))
	for _, t := range running {
		live[t.ID] = true
		l, ok := leases[t.ID]
		if !ok || l.rev != t.Rev {
			leases[t.ID] = lease{rev: t.Rev, until: now.Add(b.cfg.LeaseTTL)}
		} else if !l.until.After(now) {
			out = append(out, t)
			leases[t.ID] = lease{rev: t.Rev, until: now.Add(b.cfg.LeaseTTL / 4)} // should ending it fail
		}
	}
	for id := range leases {
		if !live[id] {
			delete(leases, id)
		}
	}
	return out
}

// nextExpiry is how long until the first lease may run out.
func (b *Broker) nextExpiry(leases map[uuid.UUID]lease) time.Duration {
	next := trimEvery
	for _, l := range leases {
		next = min(next, l.until.Sub(b.cfg.Now()))
	}
	return max(next, time.Millisecond)
}

// expire gives a task back whose worker was silent too long.
func (b *Broker) expire(ctx context.Context, t state.Task) {
	b.cfg.Log.Warn("worker of a task is silent, its lease ends", "task", t.ID, "type", t.Type, "node", t.Worker, "deliveries", t.Deliveries)
	err := b.Finish(ctx, state.FinishTask{Outcome: state.OutcomeRetry,
		ReportTask: state.ReportTask{ID: t.ID, Lease: t.Lease, Done: t.Done, Total: t.Total},
		NotBefore:  state.Time(b.cfg.Now().Add(backoff(t.Deliveries)).UnixNano()),
		Problem: &state.Problem{Code: CodeLeaseLost,
			Cause:       short(fmt.Sprintf("the worker on node %s was not heard of for %s, at delivery %d", t.Worker, b.cfg.LeaseTTL, t.Deliveries)),
			Consequence: b.cfg.Types.consequence(t.Type),
			Remedy:      "look at that node's log, then retry the task"}})
	if err != nil && !errors.Is(err, state.ErrConflict) && ctx.Err() == nil {
		b.cfg.Log.Warn("lease of a task could not be ended, it is tried again", "task", t.ID, "err", err)
	}
}

func (t Types) consequence(name string) string {
	if k, ok := t[name]; ok {
		return k.Consequence
	}
	return "what it should have done is not done"
}

func (b *Broker) trim(ctx context.Context) {
	before := state.Time(b.cfg.Now().Add(-keepEndedFor).UnixNano())
	for range 64 { // bounds one round
		v := b.cfg.Store.View()
		oldest := v.OldestEnded()
		if _, ended := v.CountTasks(); ended <= keepEnded && (oldest == 0 || oldest >= before) {
			return
		}
		if _, err := b.cfg.Raft.Apply(ctx, &state.TrimTasks{Before: before, Keep: keepEnded}); err != nil {
			if ctx.Err() == nil {
				b.cfg.Log.Warn("ended tasks could not be forgotten", "err", err)
			}
			return
		}
	}
}

// Dequeue implements Source.
func (b *Broker) Dequeue(ctx context.Context, w WorkerInfo) (Delivery, error) {
	types := make(map[string]bool, len(w.Types))
	for _, t := range w.Types {
		types[t] = true
	}
	for {
		v, changed, err := b.cfg.Store.Watch("task")
		if err != nil {
			return Delivery{}, err
		}
		t, wait := b.candidate(v, w.Queues, types)
		if t != nil {
			d, err := b.start(ctx, t, w)
			if errors.Is(err, state.ErrConflict) || errors.Is(err, state.ErrNotFound) {
				continue // somebody was faster; the state has moved on, so this ends
			}
			return d, err
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return Delivery{}, ctx.Err()
		case <-changed:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// candidate returns the task that is next for a worker, or how long until one may be.
func (b *Broker) candidate(v *state.View, queues []string, types map[string]bool) (*state.Task, time.Duration) {
	now := state.Time(b.cfg.Now().UnixNano())
	wait := time.Minute
	var best *state.Task
	for _, q := range queues {
		looked := 0
		v.QueuedTasks(q, func(t *state.Task) bool {
			looked++
			switch {
			case best != nil && !before(t, best):
				return false
			case !types[t.Type] || !v.CanStart(t):
			case t.NotBefore > now:
				wait = min(wait, time.Duration(t.NotBefore-now))
			default:
				best = t
				return false
			}
			return looked < candidatesMax
		})
	}
	return best, wait
}

func before(a, b *state.Task) bool {
	if a.Priority != b.Priority {
		return a.Priority > b.Priority
	}
	return a.Serial < b.Serial
}

func (b *Broker) start(ctx context.Context, t *state.Task, w WorkerInfo) (Delivery, error) {
	id := b.cfg.NewID()
	if _, err := b.cfg.Raft.Apply(ctx, &state.StartTask{ID: t.ID, Lease: id, Worker: w.Node}); err != nil {
		return Delivery{}, fmt.Errorf("start task: %w", err)
	}
	started, err := b.cfg.Store.View().Task(t.ID)
	if err != nil {
		return Delivery{}, err
	}
	return Delivery{Task: started, Lease: id, TTL: b.cfg.LeaseTTL}, nil
}

// Renew implements Source.
func (b *Broker) Renew(ctx context.Context, task, id uuid.UUID) (cancel bool, err error) {
	if _, err := b.cfg.Raft.Apply(ctx, &state.RenewTask{ID: task, Lease: id}); err != nil {
		return false, fmt.Errorf("renew lease of task: %w", err)
	}
	t, err := b.cfg.Store.View().Task(task)
	if err != nil {
		return false, err
	}
	return t.Cancel, nil
}

// Report implements Source.
func (b *Broker) Report(ctx context.Context, r state.ReportTask) error {
	if _, err := b.cfg.Raft.Apply(ctx, &r); err != nil {
		return fmt.Errorf("report on task: %w", err)
	}
	return nil
}

// Finish implements Source.
func (b *Broker) Finish(ctx context.Context, f state.FinishTask) error {
	ctx, cancel := context.WithTimeout(ctx, proposeTimeout)
	defer cancel()
	if _, err := b.cfg.Raft.Apply(ctx, &f); err != nil {
		return fmt.Errorf("finish task: %w", err)
	}
	return nil
}

func toValid(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }
