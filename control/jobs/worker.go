package jobs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"varve/control/state"
)

// WorkerConfig wires a worker.
type WorkerConfig struct {
	Node   uuid.UUID
	Queues []string
	Types  Types
	Source Source
	Log    *slog.Logger
	Now    func() time.Time
	// Parallel is how many tasks run at a time; 0 is 4.
	Parallel int
}

// Worker runs tasks of one node.
type Worker struct{ cfg WorkerConfig }

const (
	parallelDefault = 4
	sourcePause     = 500 * time.Millisecond
	reportEvery     = time.Second
	finishTries     = 20
	stopGrace       = 5 * time.Second
)

// NewWorker wires a worker and starts nothing.
func NewWorker(cfg WorkerConfig) *Worker {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Parallel == 0 {
		cfg.Parallel = parallelDefault
	}
	return &Worker{cfg: cfg}
}

// Run works until ctx ends. What runs then is told to stop and given back.
func (w *Worker) Run(ctx context.Context) error {
	info := WorkerInfo{Node: w.cfg.Node, Queues: w.cfg.Queues, Types: slices.Sorted(maps.Keys(w.cfg.Types))}
	var all sync.WaitGroup
	for range w.cfg.Parallel {
		all.Go(func() { w.loop(ctx, info) })
	}
	all.Wait()
	return nil
}

func (w *Worker) loop(ctx context.Context, info WorkerInfo) {
	for ctx.Err() == nil {
		d, err := w.cfg.Source.Dequeue(ctx, info)
		if err != nil {
			if ctx.Err() == nil {
				w.cfg.Log.Warn("no task could be fetched", "err", err)
			}
			pause(ctx, sourcePause)
			continue
		}
		w.deliver(ctx, d)
	}
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// deliver runs one delivery: the handler, and beside it the renewals, which also carry its reports.
func (w *Worker) deliver(ctx context.Context, d Delivery) {
	log := w.cfg.Log.With("task", d.Task.ID, "type", d.Task.Type)
	log.Info("task started", "object", d.Task.Object, "delivery", d.Task.Deliveries)
	taskCtx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	r := &Run{task: d.Task, now: w.cfg.Now, kick: make(chan struct{}, 1), done: d.Task.Done, total: d.Task.Total}
	var beside sync.WaitGroup
	renewing, renewed := context.WithCancel(context.WithoutCancel(ctx))
	beside.Go(func() { w.keep(renewing, d, r, stop) })
	err := w.do(taskCtx, d, r)
	renewed()
	beside.Wait()
	if errors.Is(context.Cause(taskCtx), state.ErrLease) {
		log.Warn("task is another worker's now, what it did here does not count")
		return
	}
	f := w.outcome(ctx, d, r, err)
	log.Info("task ended", "outcome", f.Outcome, "err", err)
	w.finish(ctx, log, f, d.TTL)
}

// do calls the handler; a panic in it is its error.
func (w *Worker) do(ctx context.Context, d Delivery, r *Run) (err error) {
	t, ok := w.cfg.Types[d.Task.Type]
	if !ok {
		return &Problem{Problem: state.Problem{Code: CodeUnknown, Cause: "this node does not know tasks of type " + d.Task.Type,
			Consequence: "what it should have done is not done", Remedy: "upgrade all nodes to one version"}}
	}
	if d.Task.Cancel {
		return ErrCancelled
	}
	defer func() {
		if p := recover(); p != nil {
			w.cfg.Log.Error("task panicked", "task", d.Task.ID, "type", d.Task.Type, "panic", p, "stack", string(debug.Stack()))
			err = &Problem{Problem: state.Problem{Code: CodePanic, Cause: short(fmt.Sprint("internal error: ", p)), Consequence: t.Consequence,
				Remedy: "report it with a support bundle"}}
		}
	}()
	return t.Do(ctx, r)
}

// keep renews the lease and sends reports until ctx ends. It stops the handler when the task is cancelled, the lease is
// lost, or it could not renew for so long that the lease may be another's soon.
func (w *Worker) keep(ctx context.Context, d Delivery, r *Run, stop context.CancelCauseFunc) {
	lost := fmt.Errorf("lease of task %s could not be renewed: %w", d.Task.ID, state.ErrLease)
	tick := time.NewTicker(d.TTL / 4)
	defer tick.Stop()
	// The calls below may each take as long as they are allowed to: what ends the handler in time is a clock of its own.
	silent := d.TTL - d.TTL/4
	deadline := time.AfterFunc(silent, func() { stop(lost) })
	defer deadline.Stop()
	for {
		renew := false
		select {
		case <-ctx.Done():
			return
		case <-r.kick:
		case <-tick.C:
			renew = true
		}
		if renew {
			sent := w.cfg.Now()
			callCtx, cancel := context.WithTimeout(ctx, d.TTL/4)
			asked, err := w.cfg.Source.Renew(callCtx, d.Task.ID, d.Lease)
			cancel()
			switch {
			case ctx.Err() != nil:
				return
			case errors.Is(err, state.ErrLease) || errors.Is(err, state.ErrNotFound):
				stop(lost)
				return
			case err == nil:
				if !deadline.Stop() {
					return // too late: the handler has been told to stop
				}
				deadline.Reset(silent - w.cfg.Now().Sub(sent))
				if asked {
					r.cancel()
					stop(ErrCancelled)
				}
			}
		}
		if report, ok := r.report(d.Lease); ok {
			callCtx, cancel := context.WithTimeout(ctx, d.TTL/4)
			err := w.cfg.Source.Report(callCtx, report)
			cancel()
			if errors.Is(err, state.ErrLease) {
				stop(lost)
				return
			}
			if err != nil { // also when the handler has ended meanwhile: the outcome then carries it
				r.unsent(report)
			}
		}
		// Reports are at most one a second; a kick that came meanwhile is served by the next round.
		pause(ctx, min(reportEvery, d.TTL/8))
	}
}

// outcome says how a delivery ended.
func (w *Worker) outcome(ctx context.Context, d Delivery, r *Run, err error) state.FinishTask {
	t := w.cfg.Types[d.Task.Type]
	f := r.finish(d.Lease)
	again := func(after time.Duration) {
		f.Outcome, f.NotBefore = state.OutcomeRetry, state.Time(w.cfg.Now().Add(after).UnixNano())
	}
	problem := state.Problem{Code: CodeFailed, Consequence: t.Consequence, Remedy: t.Remedy}
	if err != nil {
		problem.Cause = short(err.Error())
	}
	if p, ok := errors.AsType[*Problem](err); ok {
		problem = p.Problem
		problem.Cause = short(p.Error())
	}
	if e, ok := errors.AsType[*state.Error](err); ok && problem.Remedy == t.Remedy && e.Remedy != "" {
		problem.Remedy = short(e.Remedy)
	}
	retry, temporary := errors.AsType[*Retry](err)
	switch {
	case err == nil:
		f.Outcome = state.OutcomeSucceeded
		return f
	case errors.Is(err, ErrCancelled) || r.Cancelled():
		f.Outcome = state.OutcomeCancelled
		return f
	case ctx.Err() != nil:
		problem.Code, problem.Cause = CodeRestart, "its node was stopped"
		again(0)
		f.Uncounted = true
	case temporary:
		after := retry.After
		if after == 0 {
			after = backoff(d.Task.Deliveries)
		}
		again(after)
	default:
		f.Outcome = state.OutcomeFailed
	}
	f.Problem = &problem
	return f
}

// finish commits the outcome: for as long as the lease holds, also while the node stops.
func (w *Worker) finish(ctx context.Context, log *slog.Logger, f state.FinishTask, ttl time.Duration) {
	limit := ttl
	if ctx.Err() != nil {
		limit = min(ttl, stopGrace)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
	defer cancel()
	for range finishTries {
		err := w.cfg.Source.Finish(ctx, f)
		switch {
		case err == nil:
			return
		case errors.Is(err, state.ErrConflict), errors.Is(err, state.ErrNotFound), errors.Is(err, state.ErrInvalid):
			log.Warn("outcome of task is refused", "outcome", f.Outcome, "err", err)
			return
		case ctx.Err() != nil:
			log.Warn("outcome of task could not be told, its lease will end", "outcome", f.Outcome, "err", err)
			return
		}
		pause(ctx, ttl/finishTries)
	}
}

// Run is what a handler sees of its task.
type Run struct {
	task state.Task
	now  func() time.Time
	// kick asks for a report soon.
	kick chan struct{}

	mu         sync.Mutex
	steps      []state.TaskStep
	done       int64
	total      int64
	lines      []state.TaskLine
	checkpoint json.RawMessage
	result     json.RawMessage
	changed    bool
	cancelled  bool
}

// ID is the task's: what makes a handler idempotent.
func (r *Run) ID() uuid.UUID { return r.task.ID }

// Task is the task as it was delivered.
func (r *Run) Task() state.Task { return r.task }

// Args decodes the arguments.
func (r *Run) Args(into any) error {
	args := r.task.Args
	if len(args) == 0 {
		args = json.RawMessage("{}")
	}
	if err := json.Unmarshal(args, into); err != nil {
		return &Problem{Problem: state.Problem{Code: CodeBadArgs, Cause: "the task's arguments do not fit its type",
			Consequence: "nothing was done", Remedy: "submit it again with the arguments that its type has"}, Err: err}
	}
	return nil
}

// Step begins the next part of the work. It returns ErrCancelled where the task is to stop.
func (r *Run) Step(name string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.cancelled {
		return ErrCancelled
	}
	if len(r.steps) < state.TaskStepsMax {
		r.steps = append(r.steps, state.TaskStep{Name: short(name), Started: state.Time(r.now().UnixNano())})
	}
	r.changed = true
	r.kicks()
	return nil
}

// Progress says how much of a total is done.
func (r *Run) Progress(done, total int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if done < 0 || total < 0 || done == r.done && total == r.total {
		return
	}
	r.done, r.total, r.changed = done, total, true
	r.kicks()
}

// Log adds a line to the task's log.
func (r *Run) Log(format string, args ...any) {
	line := state.TaskLine{At: state.Time(r.now().UnixNano()), Text: short(fmt.Sprintf(format, args...))}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lines = append(r.lines, line)
	r.lines = r.lines[max(0, len(r.lines)-state.TaskLinesMax):]
	r.changed = true
	r.kicks()
}

// Checkpoint keeps what the next delivery needs to go on from here, should this one end early.
func (r *Run) Checkpoint(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("checkpoint of task %s: %w", r.task.ID, err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.checkpoint, r.changed = b, true
	r.kicks()
	return nil
}

// Resume decodes the last checkpoint; false where there is none.
func (r *Run) Resume(into any) bool {
	return len(r.task.Checkpoint) > 0 && json.Unmarshal(r.task.Checkpoint, into) == nil
}

// Result is what the task gives back: a JSON object of at most state.TaskResultBytesMax.
func (r *Run) Result(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("result of task %s: %w", r.task.ID, err)
	}
	if len(b) > state.TaskResultBytesMax {
		return fmt.Errorf("result of task %s: %d bytes, more than %d", r.task.ID, len(b), state.TaskResultBytesMax)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.result = b
	return nil
}

// Cancelled says whether somebody wants the task to stop.
func (r *Run) Cancelled() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.cancelled
}

func (r *Run) cancel() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cancelled = true
}

func (r *Run) kicks() {
	select {
	case r.kick <- struct{}{}:
	default:
	}
}

// report takes what is new since the last one.
func (r *Run) report(lease uuid.UUID) (state.ReportTask, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.changed {
		return state.ReportTask{}, false
	}
	return r.take(lease), true
}

func (r *Run) take(lease uuid.UUID) state.ReportTask {
	out := state.ReportTask{ID: r.task.ID, Lease: lease, Steps: r.steps, Done: r.done, Total: r.total, Log: r.lines, Checkpoint: r.checkpoint}
	r.changed, r.steps, r.lines, r.checkpoint = false, nil, nil, nil
	return out
}

// unsent takes back a report that did not get through.
func (r *Run) unsent(out state.ReportTask) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.steps = append(out.Steps, r.steps...)
	r.steps = r.steps[:min(len(r.steps), state.TaskStepsMax)]
	r.lines = append(out.Log, r.lines...)
	r.lines = r.lines[max(0, len(r.lines)-state.TaskLinesMax):]
	if r.checkpoint == nil {
		r.checkpoint = out.Checkpoint
	}
	r.changed = true
}

func (r *Run) finish(lease uuid.UUID) state.FinishTask {
	r.mu.Lock()
	defer r.mu.Unlock()
	return state.FinishTask{ReportTask: r.take(lease), Result: r.result}
}
