// Package jobs is the cluster's task queue: tasks are rows of the state, and every node's Worker takes those that it can do.
// It takes the place of Celery.
//
//	broker.Submit(ctx, spec) -> task id           any node: a committed command, deduplicated by the ensure mode
//	worker.Run(ctx)                                on every node: takes, runs the handler, renews the lease, reports, finishes
//	broker.Run(ctx)                                while this node leads: ends the leases of workers that are silent
//
// # What is promised
//
// A submitted task is started at least once, and ends: succeeded, failed with cause, consequence and remedy, or cancelled.
// It is started again only where a delivery gave it back or its worker was silent for LeaseTTL; each start takes a new
// lease, and whoever holds an older one can neither report nor finish any more. A worker that cannot renew stops the
// handler before the lease is given to another. So two handlers of one task run at a time only if one of them ignores its
// context; handlers are idempotent by the task's id all the same.
//
// # Leases
//
// Everything that a worker says is a committed command, so workers need no leader of their own: a worker picks from its own
// copy of the state, and of two that pick the same task the log refuses one. The leader alone measures silence, by its own
// clock, from when it saw the task's row change. A new leader gives every running task a whole LeaseTTL. So a change of
// leaders neither loses a task nor starts one twice, and no two clocks are compared.
//
//	Dequeue: candidate = first in queue order that is due, that the worker knows and that its ensure mode lets start
//	         commit StartTask(lease)        refused: another was faster, look again
//	Renew:   commit RenewTask every TTL/4   refused: the lease is another's, the worker stops
//	         3/4 TTL without one            the worker stops
//	leader:  the row has not changed for LeaseTTL -> commit FinishTask(retry), NotBefore = now + backoff(deliveries);
//	         at the limit it fails
//
// A task that failed stays, with its problem, until it is retried by hand or forgotten: that is the failed queue.
package jobs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

	"varve/control/state"
)

// Proposer commits a command and returns what it did. raft.Node is one.
type Proposer interface {
	Apply(ctx context.Context, cmd state.Command) (state.Result, error)
}

// Source is where a worker gets its tasks. The node's Broker is one.
type Source interface {
	// Dequeue waits for a task that the worker can do. It returns ctx's error when that ends.
	Dequeue(ctx context.Context, w WorkerInfo) (Delivery, error)
	// Renew keeps a lease; cancel says that the task is to stop at its next step. state.ErrLease: stop, it is another's.
	Renew(ctx context.Context, task, lease uuid.UUID) (cancel bool, err error)
	// Report and Finish commit what a delivery says.
	Report(ctx context.Context, r state.ReportTask) error
	Finish(ctx context.Context, f state.FinishTask) error
}

// WorkerInfo says what a worker can do.
type WorkerInfo struct {
	Node   uuid.UUID `json:"node"`
	Queues []string  `json:"queues"`
	Types  []string  `json:"types"`
}

// Delivery is a task given to a worker.
type Delivery struct {
	Task  state.Task    `json:"task"`
	Lease uuid.UUID     `json:"lease"`
	TTL   time.Duration `json:"ttl"`
}

// ErrCancelled is what a handler returns, or wraps, when it stopped because the task was cancelled.
var ErrCancelled = errors.New("task was cancelled")

// Handler does a task. It returns nil, ErrCancelled, a *Problem, a Retry, or any other error, which the type's Consequence
// and Remedy make a problem of.
type Handler func(ctx context.Context, r *Run) error

// Type is a kind of task.
type Type struct {
	Name string
	// Title says in a few words what it does.
	Title string
	Do    Handler
	// Queue, Ensure and Deliveries are the defaults of its tasks.
	Queue      string
	Ensure     state.EnsureMode
	Deliveries int
	// PerObject: Ensure is about tasks of the same object, not about all of the type.
	PerObject bool
	// Consequence and Remedy complete an error that has none of its own.
	Consequence string
	Remedy      string
}

// Spec fills in a task of this type. args is marshalled to a JSON object.
func (t Type) Spec(object, by string, args any) (state.TaskSpec, error) {
	s := state.TaskSpec{Type: t.Name, Queue: t.Queue, Ensure: t.Ensure, DeliveriesMax: t.Deliveries, Object: object, By: by}
	if s.Queue == "" {
		s.Queue = state.QueueGeneric
	}
	if t.PerObject {
		s.Key = t.Name + " " + object
	}
	if args != nil {
		b, err := json.Marshal(args)
		if err != nil {
			return state.TaskSpec{}, fmt.Errorf("arguments of task %s: %w", t.Name, err)
		}
		s.Args = b
	}
	return s, nil
}

// Types are the kinds of task that a node knows, by name.
type Types map[string]Type

// NewTypes refuses a type twice, or one that could end without saying what that means.
func NewTypes(types ...Type) (Types, error) {
	m := make(Types, len(types))
	for _, t := range types {
		if _, twice := m[t.Name]; twice || t.Do == nil || t.Consequence == "" || t.Remedy == "" {
			return nil, fmt.Errorf("task type %q: given twice, or without handler, consequence or remedy", t.Name)
		}
		m[t.Name] = t
	}
	return m, nil
}

// Problem is a failure with what follows from it. A handler returns one where the type's words do not fit.
type Problem struct {
	state.Problem
	Err error
}

func (p *Problem) Error() string {
	if p.Err != nil {
		return p.Cause + ": " + p.Err.Error()
	}
	return p.Cause
}

func (p *Problem) Unwrap() error { return p.Err }

// Retry is a failure that may pass by itself: the task is given back and waits for After, or for the usual backoff if that
// is 0.
type Retry struct {
	Err   error
	After time.Duration
}

func (r *Retry) Error() string { return r.Err.Error() }

func (r *Retry) Unwrap() error { return r.Err }

// Codes of problems that this package itself finds.
const (
	CodeFailed     = "failed"
	CodeLeaseLost  = "worker_lost"
	CodePanic      = "panic"
	CodeUnknown    = "unknown_type"
	CodeBadArgs    = "bad_arguments"
	CodeRestart    = "worker_stopped"
	backoffFirst   = time.Second
	backoffSecond  = 20 * time.Second
	backoffLongest = 10 * time.Minute
)

// backoff is how long a task waits after its n-th delivery went wrong: 1 s, 20 s, then twice as long each time.
func backoff(deliveries int) time.Duration {
	if deliveries <= 1 {
		return backoffFirst
	}
	d := backoffSecond
	for range deliveries - 2 {
		if d *= 2; d >= backoffLongest {
			return backoffLongest
		}
	}
	return d
}

// short cuts text to what the state keeps.
func short(text string) string {
	if len(text) <= state.TaskTextBytesMax {
		return toValid(text)
	}
	return toValid(text[:state.TaskTextBytesMax-4]) + "…"
}
