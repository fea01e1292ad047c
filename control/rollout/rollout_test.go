package rollout

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"

	"varve/control/jobs"
	"varve/control/state"
)

// appliance is a node: a worker, an update agent and a machine that restarts.
type appliance struct {
	c       *fleet
	node    state.Node
	mu      sync.Mutex
	st      NodeStatus
	bundle  []byte
	broken  bool // the new version does not come up here
	away    bool
	stop    context.CancelFunc
	stopped chan struct{}
}

// fleet is a cluster in memory. The broker is on no node: it is the leader, wherever that is.
type fleet struct {
	t     *testing.T
	store *state.Store
	mu    sync.Mutex
	index uint64
	nodes []*appliance
	b     *jobs.Broker
	down  int
	most  int // nodes that were away at a time
	log   []string
}

func (c *fleet) Apply(_ context.Context, cmd state.Command) (state.Result, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	entry, err := state.Encode(cmd, uuid.New(), state.Time(time.Now().UnixNano()))
	if err != nil {
		return state.Result{}, err
	}
	c.index++
	return c.store.Apply(c.index, entry)
}

func (c *fleet) of(id uuid.UUID) *appliance {
	for _, a := range c.nodes {
		if a.node.ID == id {
			return a
		}
	}
	return nil
}

func (c *fleet) Status(_ context.Context, id uuid.UUID) (NodeStatus, error) {
	a := c.of(id)
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.away {
		return NodeStatus{}, errors.New("connection refused")
	}
	return a.st, nil
}

func (c *fleet) Piece(_ context.Context, id uuid.UUID, sha string, at int64, n int) ([]byte, error) {
	return c.of(id).Piece(sha, at, n)
}

type here struct{ *appliance }

func (a here) Status(ctx context.Context) (NodeStatus, error) { return a.c.Status(ctx, a.node.ID) }

func (a *appliance) Have(string) (int64, error) { return int64(len(a.bundle)), nil }

func (a *appliance) Add(sha string, at int64, piece []byte, whole bool) error {
	if at != int64(len(a.bundle)) {
		return fmt.Errorf("piece at %d of %d", at, len(a.bundle))
	}
	a.bundle = append(a.bundle, piece...)
	if sum := sha256.Sum256(a.bundle); whole && hex.EncodeToString(sum[:]) != sha {
		return errors.New("another bundle")
	}
	return nil
}

func (a *appliance) Piece(_ string, at int64, n int) ([]byte, error) {
	return bytes.Clone(a.bundle[at:min(at+int64(n), int64(len(a.bundle)))]), nil
}

// Request restarts the machine a little later; the version comes up, or the old one after three attempts.
func (a *appliance) Request(id, _ string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.st.Busy {
		return errors.New("busy")
	}
	a.st.Request, a.st.Busy, a.st.Error = id, true, ""
	go a.restart()
	return nil
}

func (a *appliance) restart() {
	time.Sleep(20 * time.Second) // writing
	a.c.mu.Lock()
	a.c.down++
	a.c.most = max(a.c.most, a.c.down)
	a.c.log = append(a.c.log, a.node.Name)
	a.c.mu.Unlock()
	a.mu.Lock()
	a.away, a.st.Busy = true, false
	a.mu.Unlock()
	a.stop()
	<-a.stopped
	time.Sleep(time.Minute)
	a.mu.Lock()
	a.away = false
	if a.broken {
		a.st.Failed, a.st.FailedAt, a.st.Why = "2.0", time.Now(), "it did not start"
	} else {
		a.st.Version, a.st.Trying = "2.0", true
	}
	a.mu.Unlock()
	a.run()
	time.Sleep(30 * time.Second)
	a.mu.Lock()
	a.st.Trying = false
	a.mu.Unlock()
	a.c.mu.Lock()
	a.c.down--
	a.c.mu.Unlock()
}

// run starts the node's worker.
func (a *appliance) run() {
	o := New(Config{Self: a.node.ID, Store: a.c.store, Raft: a.c, Machine: here{a}, Nodes: a.c, Tasks: a.c.b, Patience: 20 * time.Minute})
	types, err := jobs.NewTypes(o.Types()...)
	if err != nil {
		panic(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	a.stop, a.stopped = stop, make(chan struct{})
	w := jobs.NewWorker(jobs.WorkerConfig{Node: a.node.ID, Queues: []string{state.QueueOf(a.node.ID), state.QueueGeneric}, Types: types, Source: a.c.b})
	go func() {
		defer close(a.stopped)
		_ = w.Run(ctx)
	}()
}

// roll runs a rollout over nodes and returns its task as it ended.
func roll(t *testing.T, prepare func(c *fleet)) (c *fleet, task state.Task) {
	synctest.Test(t, func(t *testing.T) {
		c = &fleet{t: t, store: state.New()}
		must := func(_ state.Result, err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		must(c.Apply(t.Context(), &state.InitCluster{ID: uuid.New(), Format: state.Format}))
		for i, role := range []string{state.RoleMaster, state.RoleMaster, state.RoleExtra, state.RoleMaster} {
			id := uuid.New()
			must(c.Apply(t.Context(), &state.RegisterNode{ID: id, Spec: state.NodeSpec{Name: fmt.Sprintf("n%d", i), Role: role, Version: "1.0", LevelMax: 1}}))
			n, err := c.store.View().Node(id)
			if err != nil {
				t.Fatal(err)
			}
			c.nodes = append(c.nodes, &appliance{c: c, node: n, st: NodeStatus{Version: "1.0", Ready: true}})
		}
		bundle := bytes.Repeat([]byte("system"), PieceBytes/3)
		c.nodes[0].bundle = bundle
		sum := sha256.Sum256(bundle)
		args := Args{Version: "2.0", SHA256: hex.EncodeToString(sum[:]), Size: int64(len(bundle)), Source: c.nodes[0].node.ID, Finalise: true}
		o := New(Config{Store: c.store})
		types, err := jobs.NewTypes(o.Types()...)
		if err != nil {
			t.Fatal(err)
		}
		c.b = jobs.NewBroker(jobs.BrokerConfig{Raft: c, Store: c.store, Types: types})
		ctx, stop := context.WithCancel(t.Context())
		broker := make(chan struct{})
		go func() { defer close(broker); _ = c.b.Run(ctx) }()
		if prepare != nil {
			prepare(c)
		}
		for _, a := range c.nodes {
			a.run()
		}
		spec, err := o.Spec(args, "user admin")
		if err != nil {
			t.Fatal(err)
		}
		id, _, err := c.b.Submit(ctx, spec)
		if err != nil {
			t.Fatal(err)
		}
		wait, cancel := context.WithTimeout(ctx, 3*time.Hour)
		task, err = c.b.Wait(wait, id)
		cancel()
		if err != nil {
			t.Errorf("%v: %+v", err, task)
		}
		time.Sleep(5 * time.Minute)
		for _, a := range c.nodes {
			a.stop()
			<-a.stopped
		}
		stop()
		<-broker
	})
	return c, task
}

func (c *fleet) versions() string {
	var out []string
	for _, a := range c.nodes {
		out = append(out, a.st.Version)
	}
	return strings.Join(out, " ")
}

func TestOneAfterTheOther(t *testing.T) {
	c, task := roll(t, nil)
	if task.State != state.TaskSucceeded || c.versions() != "2.0 2.0 2.0 2.0" || c.most != 1 || len(c.log) != 4 ||
		c.log[0] != "n2" && c.log[3] != "n2" { // the extra first, unless the task runs there

		t.Fatalf("%+v %+v, versions %s, at most %d away, order %v", task, task.Problem, c.versions(), c.most, c.log)
	}
	var result struct{ Version string }
	if err := json.Unmarshal(task.Result, &result); err != nil || result.Version != "2.0" {
		t.Fatal(string(task.Result), err)
	}
}

func TestABrokenVersionStopsAtTheFirstNode(t *testing.T) {
	c, task := roll(t, func(c *fleet) {
		for _, a := range c.nodes {
			a.broken = true
		}
	})
	if task.State != state.TaskFailed || task.Problem == nil || !strings.Contains(task.Problem.Cause, "did not prove itself") || c.versions() != "1.0 1.0 1.0 1.0" || len(c.log) != 1 {
		t.Fatalf("%+v %+v, versions %s, restarted %v", task, task.Problem, c.versions(), c.log)
	}
}

func TestNothingIsUpdatedWhileANodeIsAway(t *testing.T) {
	c, task := roll(t, func(c *fleet) { c.nodes[3].away = true })
	if task.State != state.TaskFailed || task.Problem == nil || task.Problem.Code != "node_not_ready" || len(c.log) != 0 {
		t.Fatalf("%+v %+v, restarted %v", task, task.Problem, c.log)
	}
}

func TestARefusedBundle(t *testing.T) {
	c, task := roll(t, func(c *fleet) { c.nodes[0].bundle[17] ^= 1 })
	if task.State != state.TaskFailed || len(c.log) > 1 || c.versions() == "2.0 2.0 2.0 2.0" {
		t.Fatalf("%+v, restarted %v", task, c.log)
	}
}
