// Package rollout takes a cluster from one version to the next, one appliance after the other.
//
//	update.rollout   for each node that does not run the version yet: see that all others are ready; have update.node done there;
//	                 see that it has come back ready. What does not succeed ends the rollout: at most one node is ever away, and the
//	                 nodes after it keep what they run.
//	update.node      on the node: fetch the bundle from the node that has it, in pieces; ask the machine's agent to write it into
//	                 the slot that does not run and to restart; after the restart: is it confirmed?
//
// Both can be started again at any point: they look at what is, and do what is missing. A rollout whose own node restarts goes on
// elsewhere, or there afterwards.
//
// A node that restarts does not serve its vDisks for that time: hypervisors wait and connect again. The formats of data stay the old
// ones (control/state, RaiseLevel) until every node runs the new version and the rollout was asked to finalise, or somebody does
// later; until then each node can go back by itself.
package rollout

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"varve/control/jobs"
	"varve/control/state"
)

// Args of a rollout: which bundle, and the node that has it.
type Args struct {
	Version string    `json:"version"`
	SHA256  string    `json:"sha256"` // of the bundle
	Size    int64     `json:"size"`
	Source  uuid.UUID `json:"source"`
	// Finalise raises the data level when all nodes run the version.
	Finalise bool `json:"finalise,omitempty"`
}

func (a Args) check() error {
	if a.Version == "" || len(a.Version) > 100 || len(a.SHA256) != 64 || strings.Trim(a.SHA256, "0123456789abcdef") != "" || a.Size <= 0 || a.Source == uuid.Nil {
		return &jobs.Problem{Problem: state.Problem{Code: jobs.CodeBadArgs, Cause: "the arguments name no bundle",
			Consequence: "nothing was updated", Remedy: "start it with: varve update rollout FILE"}}
	}
	return nil
}

// NodeStatus is how a node is with respect to updates.
type NodeStatus struct {
	Version string `json:"version"`
	// Ready: its exports are open.
	Ready bool `json:"ready"`
	// Updatable: it has slots and an agent.
	Updatable bool `json:"updatable,omitempty"`
	// Trying: it runs, or is about to run, a version that is not confirmed.
	Trying bool `json:"trying,omitempty"`
	// Request is the update that its agent works at, or has last worked at; Busy tells which.
	Request string `json:"request,omitempty"`
	Busy    bool   `json:"busy,omitempty"`
	Error   string `json:"error,omitempty"` // of that request
	Done    int64  `json:"done,omitempty"`
	Total   int64  `json:"total,omitempty"`
	// Failed is the version that did not prove itself last, at FailedAt.
	Failed   string    `json:"failed,omitempty"`
	FailedAt time.Time `json:"failed_at,omitzero"`
	Why      string    `json:"why,omitempty"`
}

// Machine is this node's side: the exchange with its update agent.
type Machine interface {
	Status(ctx context.Context) (NodeStatus, error)
	// Request asks the agent to apply a bundle and to restart. The same id again is no error.
	Request(id, sha256 string) error
	// Have says how much of a bundle is here, Add appends to it and, with the last byte, checks it.
	Have(sha256 string) (int64, error)
	Add(sha256 string, at int64, piece []byte, whole bool) error
	// Piece reads from a bundle that is here.
	Piece(sha256 string, at int64, n int) ([]byte, error)
}

// Nodes asks any node, this one too.
type Nodes interface {
	Status(ctx context.Context, node uuid.UUID) (NodeStatus, error)
	Piece(ctx context.Context, node uuid.UUID, sha256 string, at int64, n int) ([]byte, error)
}

// Submitter queues tasks and waits for them. jobs.Broker is one.
type Submitter interface {
	SubmitAs(ctx context.Context, id uuid.UUID, spec state.TaskSpec) (uuid.UUID, bool, error)
}

// Config of rollouts on a node.
type Config struct {
	Self  uuid.UUID
	Store *state.Store
	Raft  interface {
		Apply(ctx context.Context, cmd state.Command) (state.Result, error)
	}
	Machine Machine
	Nodes   Nodes
	// Tasks is set before the first task runs.
	Tasks Submitter
	// Poll is how often it looks; 2 s.
	Poll time.Duration
	// Patience is how long a node may take to be ready, or its agent to do something; 30 min.
	Patience time.Duration
}

// Rollout does both tasks.
type Rollout struct{ cfg Config }

// Types of tasks.
const (
	TaskRollout = "update.rollout"
	TaskNode    = "update.node"
)

const (
	// PieceBytes is how much of a bundle a call between nodes carries.
	PieceBytes      = 1 << 20
	pollDefault     = 2 * time.Second
	patienceDefault = 30 * time.Minute
	deliveries      = 100
)

// New wires it.
func New(cfg Config) *Rollout {
	if cfg.Poll == 0 {
		cfg.Poll = pollDefault
	}
	if cfg.Patience == 0 {
		cfg.Patience = patienceDefault
	}
	return &Rollout{cfg}
}

// Use sets what queues tasks, which knows the types of this package.
func (o *Rollout) Use(s Submitter) { o.cfg.Tasks = s }

// Types for the node's worker.
func (o *Rollout) Types() []jobs.Type {
	return []jobs.Type{{
		Name: TaskRollout, Title: "update the appliances, one after the other", Do: o.rollout, Queue: state.QueueGeneric,
		Ensure: state.EnsureSingle, Deliveries: deliveries,
		Consequence: "the nodes that were not reached keep the version they run; all of them serve",
		Remedy:      "mend what is named, then start the task again: it goes on where it stopped",
	}, {
		Name: TaskNode, Title: "update an appliance", Do: o.node, Ensure: state.EnsureDeduped, Deliveries: deliveries,
		Consequence: "the appliance runs what it ran before", Remedy: "look at varve update status and at the logs there",
	}}
}

// Spec of a rollout.
func (o *Rollout) Spec(a Args, by string) (state.TaskSpec, error) {
	if err := a.check(); err != nil {
		return state.TaskSpec{}, err
	}
	return o.Types()[0].Spec("update "+a.Version, by, a)
}

// problem is a failure in this package's words.
func problem(code, remedy, format string, args ...any) error {
	return &jobs.Problem{Problem: state.Problem{Code: code, Cause: fmt.Sprintf(format, args...),
		Consequence: "the nodes that were not reached keep the version they run", Remedy: remedy}}
}

// pause waits for the next look.
func (o *Rollout) pause(ctx context.Context) error {
	t := time.NewTimer(o.cfg.Poll)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// order has the extras first, then the masters, this node last: most of the way the task stays where it is.
func (o *Rollout) order() []state.Node {
	nodes := slices.DeleteFunc(o.cfg.Store.View().Nodes(), func(n state.Node) bool { return n.Offline })
	rank := func(n state.Node) int {
		switch {
		case n.ID == o.cfg.Self:
			return 2
		case n.Role == state.RoleMaster:
			return 1
		}
		return 0
	}
	slices.SortStableFunc(nodes, func(a, b state.Node) int {
		if d := rank(a) - rank(b); d != 0 {
			return d
		}
		return strings.Compare(a.Name, b.Name)
	})
	return nodes
}

func (o *Rollout) rollout(ctx context.Context, r *jobs.Run) error {
	var args Args
	if err := r.Args(&args); err != nil {
		return err
	}
	if err := args.check(); err != nil {
		return err
	}
	for {
		nodes := o.order()
		done := 0
		next := -1
		for i, n := range nodes {
			st, err := o.cfg.Nodes.Status(ctx, n.ID)
			if err == nil && st.Version == args.Version && !st.Trying {
				done++
			} else if next < 0 {
				next = i
			}
		}
		r.Progress(int64(done), int64(len(nodes)))
		if next < 0 {
			break
		}
		n := nodes[next]
		if err := r.Step("update " + n.Name); err != nil {
			return err
		}
		if err := o.ready(ctx, r, n, nodes); err != nil {
			return err
		}
		if err := o.one(ctx, r, n, args); err != nil {
			return err
		}
	}
	if err := o.ready(ctx, r, state.Node{}, o.order()); err != nil {
		return err
	}
	result := map[string]any{"version": args.Version}
	if level, behind := o.cfg.Store.View().LevelReady(); args.Finalise && level > o.cfg.Store.View().Level() && len(behind) == 0 {
		if err := r.Step("finalise"); err != nil {
			return err
		}
		if _, err := o.cfg.Raft.Apply(ctx, &state.RaiseLevel{To: level}); err != nil {
			return err
		}
		result["level"] = level
	}
	return r.Result(result)
}

// ready waits until every node but one serves: two may not be away at once.
func (o *Rollout) ready(ctx context.Context, r *jobs.Run, but state.Node, nodes []state.Node) error {
	deadline := time.Now().Add(o.cfg.Patience)
	for said := ""; ; {
		missing := ""
		for _, n := range nodes {
			if n.ID == but.ID {
				continue
			}
			st, err := o.cfg.Nodes.Status(ctx, n.ID)
			switch {
			case err != nil:
				missing = n.Name + " does not answer: " + err.Error()
			case !st.Ready:
				missing = n.Name + " is not ready"
			case st.Trying:
				missing = n.Name + " is trying a version"
			}
		}
		if missing == "" {
			return nil
		}
		if missing != said {
			r.Log("waiting: %s", missing)
			said = missing
		}
		if time.Now().After(deadline) {
			return problem("node_not_ready", "see what is wrong with that node: varve cluster status, varve health", "%s", missing)
		}
		if r.Cancelled() {
			return context.Canceled
		}
		if err := o.pause(ctx); err != nil {
			return err
		}
	}
}

// one has a node updated and waits for it.
func (o *Rollout) one(ctx context.Context, r *jobs.Run, n state.Node, args Args) error {
	spec, err := o.Types()[1].Spec("node "+n.Name, r.Task().By, args)
	if err != nil {
		return err
	}
	spec.Queue, spec.Key = state.QueueOf(n.ID), TaskNode+" "+n.ID.String()
	// The id is made of the rollout's, its delivery by somebody and the node: a rollout that is started again finds its task.
	id := uuid.NewSHA1(r.ID(), fmt.Appendf(nil, "%s %s", n.ID, taskGeneration(r)))
	if id, _, err = o.cfg.Tasks.SubmitAs(ctx, id, spec); err != nil {
		return err
	}
	r.Log("%s: task %s", n.Name, id)
	for {
		t, err := o.cfg.Store.View().Task(id)
		switch {
		case errors.Is(err, state.ErrNotFound): // this node's copy is behind
		case err != nil:
			return err
		case t.State == state.TaskSucceeded:
			return nil
		case !t.Active():
			why := string(t.State)
			if t.Problem != nil {
				why = t.Problem.Cause
			}
			return problem("node_update_failed", "see the task of that node: varve task show "+id.String(), "node %s: %s", n.Name, why)
		}
		if r.Cancelled() {
			return context.Canceled
		}
		if err := o.pause(ctx); err != nil {
			return err
		}
	}
}

// taskGeneration changes when somebody starts a rollout again that had failed.
func taskGeneration(r *jobs.Run) string { return fmt.Sprint(r.Task().Serial) }

func (o *Rollout) node(ctx context.Context, r *jobs.Run) error {
	var args Args
	if err := r.Args(&args); err != nil {
		return err
	}
	if err := args.check(); err != nil {
		return err
	}
	id := r.ID().String()
	deadline := time.Now().Add(o.cfg.Patience)
	for {
		st, err := o.cfg.Machine.Status(ctx)
		mine := st.Request == id
		switch {
		case err != nil: // as while the machine goes down for the restart that this has asked for
			if ctx.Err() != nil || time.Now().After(deadline) {
				return err
			}
		case st.Version == args.Version && !st.Trying:
			return r.Result(map[string]string{"version": st.Version})
		case mine && !st.Busy && st.Error != "":
			return problem("update_refused", "see what is named; varve update verify FILE checks a bundle", "%s", st.Error)
		case mine && st.Failed == args.Version && st.FailedAt.After(time.Unix(0, int64(r.Task().Created))):
			return problem("update_went_back", "look at the logs of that start: varve logs", "version %s did not prove itself: %s", args.Version, st.Why)
		case st.Busy && !mine:
			return problem("update_busy", "wait for it, or cancel it there: varve update cancel", "another update is under way there")
		case !mine:
			if err := r.Step("fetch the bundle"); err != nil {
				return err
			}
			if err := o.fetch(ctx, r, args); err != nil {
				return err
			}
			if err := r.Step("write it and restart"); err != nil {
				return err
			}
			if err := o.cfg.Machine.Request(id, args.SHA256); err != nil {
				return err
			}
		case st.Busy && st.Total > 0:
			r.Progress(st.Done, st.Total)
		}
		if time.Now().After(deadline) {
			return problem("update_stuck", "see that varve-update.path runs there: systemctl status varve-update", "nothing happened for %s", o.cfg.Patience)
		}
		if err := o.pause(ctx); err != nil {
			return err
		}
	}
}

// fetch completes the bundle on this node.
func (o *Rollout) fetch(ctx context.Context, r *jobs.Run, args Args) error {
	at, err := o.cfg.Machine.Have(args.SHA256)
	if err != nil {
		return err
	}
	for at < args.Size {
		n := int(min(PieceBytes, args.Size-at))
		piece, err := o.cfg.Nodes.Piece(ctx, args.Source, args.SHA256, at, n)
		if err == nil && len(piece) != n {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return &jobs.Retry{Err: fmt.Errorf("fetch the bundle: %w", err), After: 10 * time.Second}
		}
		if err := o.cfg.Machine.Add(args.SHA256, at, piece, at+int64(n) == args.Size); err != nil {
			return err
		}
		at += int64(n)
		r.Progress(at, args.Size)
		if r.Cancelled() {
			return context.Canceled
		}
	}
	return nil
}
