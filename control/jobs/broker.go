package jobs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
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

// Broker hands out tasks while it runs. Submit, Cancel and Retry work in any case.
type Broker struct {
	cfg BrokerConfig

	mu sync.Mutex
	// leads is closed when Run returns; nil while this node does not lead.
	leads chan struct{}
	// leases are the deadlines of running tasks.
	leases map[uuid.UUID]lease
	// wake tells Run of a new, perhaps earlier deadline.
	wake chan struct{}
}

type lease struct {
	id    uuid.UUID
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
	return &Broker{cfg: cfg, wake: make(chan struct{}, 1)}
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

// Run leads until ctx ends: it starts the leases of what runs anew, gives back what runs out, and forgets old tasks.
func (b *Broker) Run(ctx context.Context) error {
	leads := make(chan struct{})
	b.mu.Lock()
	b.leads, b.leases = leads, make(map[uuid.UUID]lease)
	for _, t := range b.cfg.Store.View().RunningTasks() {
		b.leases[t.ID] = lease{id: t.Lease, until: b.cfg.Now().Add(b.cfg.LeaseTTL)}
	}
	b.mu.Unlock()
	defer func() {
		b.mu.Lock()
		b.leads, b.leases = nil, nil
		b.mu.Unlock()
		close(leads)
	}()
	trim := time.NewTicker(trimEvery)
	defer trim.Stop()
	b.trim(ctx)
	for {
		timer := time.NewTimer(b.nextExpiry())
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-trim.C:
			b.trim(ctx)
		case <-b.wake:
		case <-timer.C:
			b.expire(ctx)
		}
		timer.Stop()
	}
}

// nextExpiry is how long until the first lease runs out.
func (b *Broker) nextExpiry() time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	next := b.cfg.LeaseTTL
	for _, l := range b.leases {
		next = min(next, l.until.Sub(b.cfg.Now()))
	}
	return max(next, time.Millisecond)
}

// expire gives back the tasks whose workers were silent too long, and forgets leases of tasks that ended.
func (b *Broker) expire(ctx context.Context) {
	v := b.cfg.Store.View()
	now := b.cfg.Now()
	b.mu.Lock()
	var out []state.Task
	for id, l := range b.leases {
		t, err := v.Task(id)
		if err != nil || t.State != state.TaskRunning || t.Lease != l.id {
			delete(b.leases, id)
		} else if !l.until.After(now) {
			out = append(out, t)
		}
	}
	for _, t := range v.RunningTasks() {
		if l, ok := b.leases[t.ID]; !ok || l.id != t.Lease {
			b.leases[t.ID] = lease{id: t.Lease, until: now.Add(b.cfg.LeaseTTL)}
		}
	}
	b.mu.Unlock()
	for _, t := range out {
		b.cfg.Log.Warn("worker of a task is silent, its lease ends", "task", t.ID, "type", t.Type, "node", t.Worker, "deliveries", t.Deliveries)
		err := b.Finish(ctx, state.FinishTask{Outcome: state.OutcomeRetry,
			ReportTask: state.ReportTask{ID: t.ID, Lease: t.Lease, Done: t.Done, Total: t.Total},
			NotBefore:  state.Time(now.Add(backoff(t.Deliveries)).UnixNano()),
			Problem: &state.Problem{Code: CodeLeaseLost,
				Cause:       short(fmt.Sprintf("the worker on node %s was not heard of for %s, %d times in all", t.Worker, b.cfg.LeaseTTL, t.Deliveries)),
				Consequence: b.cfg.Types.consequence(t.Type),
				Remedy:      "look at that node's log, then retry the task"}})
		if err != nil && !errors.Is(err, state.ErrConflict) && ctx.Err() == nil {
			b.cfg.Log.Warn("lease of a task could not be ended", "task", t.ID, "err", err)
			b.setLease(t.ID, t.Lease) // once more after another TTL
		}
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

func (b *Broker) setLease(task, id uuid.UUID) {
	b.mu.Lock()
	if b.leases != nil {
		b.leases[task] = lease{id: id, until: b.cfg.Now().Add(b.cfg.LeaseTTL)}
	}
	b.mu.Unlock()
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

func (b *Broker) leading() chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.leads
}

// Dequeue implements Source.
func (b *Broker) Dequeue(ctx context.Context, w WorkerInfo) (Delivery, error) {
	types := make(map[string]bool, len(w.Types))
	for _, t := range w.Types {
		types[t] = true
	}
	for {
		leads := b.leading()
		if leads == nil {
			return Delivery{}, ErrNotLeader
		}
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
		case <-leads:
			timer.Stop()
			return Delivery{}, ErrNotLeader
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
	b.setLease(t.ID, id)
	started, err := b.cfg.Store.View().Task(t.ID)
	if err != nil {
		return Delivery{}, err
	}
	return Delivery{Task: started, Lease: id, TTL: b.cfg.LeaseTTL}, nil
}

// Renew implements Source.
func (b *Broker) Renew(_ context.Context, task, id uuid.UUID) (cancel bool, err error) {
	if b.leading() == nil {
		return false, ErrNotLeader
	}
	t, err := b.cfg.Store.View().Task(task)
	if err != nil {
		return false, err
	}
	if t.State != state.TaskRunning || t.Lease != id {
		return false, &state.Error{Err: state.ErrLease, Object: "task " + task.String(), Detail: "is " + string(t.State)}
	}
	b.setLease(task, id)
	return t.Cancel, nil
}

// Report implements Source.
func (b *Broker) Report(ctx context.Context, r state.ReportTask) error {
	if _, err := b.cfg.Raft.Apply(ctx, &r); err != nil {
		return fmt.Errorf("report on task: %w", err)
	}
	return nil
}

// Finish implements Source. Repeating it after it was committed is no error.
func (b *Broker) Finish(ctx context.Context, f state.FinishTask) error {
	ctx, cancel := context.WithTimeout(ctx, proposeTimeout)
	defer cancel()
	if _, err := b.cfg.Raft.Apply(ctx, &f); err != nil {
		return fmt.Errorf("finish task: %w", err)
	}
	b.mu.Lock()
	if l, ok := b.leases[f.ID]; ok && l.id == f.Lease {
		delete(b.leases, f.ID)
	}
	b.mu.Unlock()
	return nil
}

func toValid(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }
