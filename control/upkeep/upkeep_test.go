package upkeep_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"

	"varve/control/events"
	"varve/control/jobs"
	"varve/control/retention"
	"varve/control/schedule"
	"varve/control/state"
	"varve/control/upkeep"
)

// cluster is a state with a log in memory, two nodes and a vPool.
type cluster struct {
	t     *testing.T
	store *state.Store
	mu    sync.Mutex
	index uint64
}

var (
	pool  = uuid.MustParse("aaaaaaaa-0000-4000-8000-000000000001")
	nodeA = uuid.MustParse("11111111-0000-4000-8000-000000000001")
	nodeB = uuid.MustParse("22222222-0000-4000-8000-000000000002")
)

func newCluster(t *testing.T) *cluster {
	t.Helper()
	c := &cluster{t: t, store: state.New()}
	c.must(&state.InitCluster{ID: uuid.New(), Format: state.Format})
	c.must(&state.RegisterNode{ID: nodeA, Spec: state.NodeSpec{Name: "a", Role: state.RoleMaster}})
	c.must(&state.RegisterNode{ID: nodeB, Spec: state.NodeSpec{Name: "b", Role: state.RoleMaster}})
	c.must(&state.CreateVPool{ID: pool, Name: "default", Backend: state.Backend{Kind: "local", Dir: "/a"}, Key: make([]byte, 32), Mode: 0o755})
	return c
}

func (c *cluster) Apply(_ context.Context, cmd state.Command) (state.Result, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	entry, err := state.Encode(cmd, uuid.New(), state.Time(time.Now().UnixNano()))
	if err != nil {
		return state.Result{}, err
	}
	c.index++
	return c.store.Apply(c.index, entry)
}

func (c *cluster) must(cmd state.Command) state.Result {
	c.t.Helper()
	res, err := c.Apply(context.Background(), cmd)
	if err != nil {
		c.t.Fatal(err)
	}
	return res
}

func (c *cluster) disk(name string, owner uuid.UUID) state.Volume {
	c.t.Helper()
	res := c.must(&state.CreateInode{FSID: state.FSIDOf(pool), Parent: state.RootIno, Name: name, Kind: state.File, How: state.Guarded,
		Mode: 0o644, Volume: uuid.New(), Size: 1 << 20})
	if owner != uuid.Nil {
		c.must(&state.ActivateVolume{Volume: res.Volume, Node: owner})
	}
	v, err := c.store.View().Volume(res.Volume)
	if err != nil {
		c.t.Fatal(err)
	}
	return v
}

// engine is a node's volume driver in memory.
type engine struct {
	mu        sync.Mutex
	snaps     map[uuid.UUID][]retention.Snapshot
	templates map[uuid.UUID]bool
	broken    map[uuid.UUID]error
	missing   map[uuid.UUID]bool
	scrubs    []upkeep.ScrubOptions
	report    upkeep.ScrubReport
	scrubErr  error
}

func newEngine() *engine {
	return &engine{snaps: make(map[uuid.UUID][]retention.Snapshot), templates: make(map[uuid.UUID]bool), broken: make(map[uuid.UUID]error),
		missing: make(map[uuid.UUID]bool)}
}

func (e *engine) Template(v state.Volume) bool { return e.templates[v.ID] }

func (e *engine) Has(id uuid.UUID) bool { return !e.missing[id] }

func (e *engine) Snapshots(_ context.Context, v state.Volume) ([]retention.Snapshot, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.snaps[v.ID]), e.broken[v.ID]
}

func (e *engine) Snapshot(_ context.Context, v state.Volume, id uuid.UUID, name string, at time.Time) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.broken[v.ID]; err != nil {
		return err
	}
	for _, s := range e.snaps[v.ID] {
		if s.Name == name {
			return &state.Error{Err: state.ErrExist, Object: name}
		}
	}
	e.snaps[v.ID] = append(e.snaps[v.ID], retention.Snapshot{ID: id, Name: name, Created: at, Automatic: true})
	return nil
}

func (e *engine) DeleteSnapshot(_ context.Context, v state.Volume, id uuid.UUID) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i, s := range e.snaps[v.ID] {
		if s.ID == id {
			if strings.HasPrefix(s.Name, "in-use") {
				return &state.Error{Err: state.ErrConflict, Object: s.Name}
			}
			e.snaps[v.ID] = slices.Delete(e.snaps[v.ID], i, i+1)
			return nil
		}
	}
	return &state.Error{Err: state.ErrNotFound, Object: id.String()}
}

func (e *engine) Scrub(_ context.Context, _ uuid.UUID, o upkeep.ScrubOptions) (upkeep.ScrubReport, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.scrubs = append(e.scrubs, o)
	return e.report, e.scrubErr
}

func (e *engine) count(v state.Volume) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.snaps[v.ID])
}

// member is a node with its engine and its worker.
type member struct {
	engine *engine
	broker *jobs.Broker
	stop   func()
	health []state.AlertSpec
}

func (c *cluster) node(id uuid.UUID) *member {
	c.t.Helper()
	m := &member{engine: newEngine()}
	pub := events.NewPublisher(c, id, nil)
	u := upkeep.New(upkeep.Config{Raft: c, Store: c.store, Node: id, Engine: m.engine, Events: pub,
		Health: func(context.Context) []state.AlertSpec { return slices.Clone(m.health) }, Renew: func(context.Context) error { return nil }})
	types, err := jobs.NewTypes(u.Types()...)
	if err != nil {
		c.t.Fatal(err)
	}
	m.broker = jobs.NewBroker(jobs.BrokerConfig{Raft: c, Store: c.store, Types: types})
	w := jobs.NewWorker(jobs.WorkerConfig{Node: id, Queues: []string{state.QueueGeneric, state.QueueOf(id)}, Types: types, Source: m.broker})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = w.Run(ctx) })
	wg.Go(func() { _ = pub.Run(ctx) })
	m.stop = func() { cancel(); wg.Wait() }
	return m
}

func (c *cluster) run(b *jobs.Broker, typ string, args schedule.Args) {
	c.t.Helper()
	raw, err := json.Marshal(args)
	if err != nil {
		c.t.Fatal(err)
	}
	if _, _, err := b.Submit(context.Background(), state.TaskSpec{Type: typ, Queue: state.QueueGeneric, Args: raw}); err != nil {
		c.t.Fatal(err)
	}
	time.Sleep(time.Minute)
	synctest.Wait()
}

func (c *cluster) tasks(typ string) (out []state.Task) {
	c.store.View().Tasks(func(t *state.Task) bool {
		if t.Type == typ {
			out = append(out, *t)
		}
		return true
	})
	return out
}

func (c *cluster) events(typ string) (n int) {
	for _, e := range c.store.View().Events(0, 1<<20) {
		if e.Type == typ {
			n++
		}
	}
	return n
}

func due(h int) schedule.Args {
	return schedule.Args{Schedule: "snapshot", Scope: state.ScopeOfCluster(), Due: state.Time(time.Date(2026, 1, 1, h, 0, 0, 0, time.UTC).UnixNano())}
}

// Each owner takes its own vDisks' snapshots; templates have none; what cannot be snapshotted is told, and the others are
// done; the same run again adds nothing.
func TestSnapshotsOnOwners(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		a, b := c.node(nodeA), c.node(nodeB)
		defer a.stop()
		defer b.stop()
		onA, onB, golden, broken := c.disk("a.raw", nodeA), c.disk("b.raw", nodeB), c.disk("golden.raw", nodeB), c.disk("broken.raw", nodeB)
		var many []state.Volume
		for i := range 40 {
			many = append(many, c.disk(fmt.Sprintf("m%d.raw", i), nodeB))
		}
		c.disk("no-disk.vmx", nodeA)
		b.engine.templates[golden.ID] = true
		b.engine.broken[broken.ID] = errors.New("log is full")
		c.run(a.broker, "snapshot.automatic", due(1))
		if a.engine.count(onA) != 1 || b.engine.count(onB) != 1 || b.engine.count(onA) != 0 || b.engine.count(golden) != 0 {
			t.Error("snapshots are not where they belong")
		}
		for _, v := range many {
			if b.engine.count(v) != 1 {
				t.Errorf("%s has %d", v.ID, b.engine.count(v))
			}
		}
		failed := 0
		for _, task := range c.tasks("snapshot.node") {
			if task.State == state.TaskFailed {
				failed++
				if p := task.Problem; !strings.Contains(p.Cause, "1 of 43 vDisks have no snapshot, the first default/broken: log is full") ||
					p.Consequence == "" || p.Remedy == "" {
					t.Errorf("%+v", p)
				}
			}
		}
		if failed != 1 || c.events(events.SnapshotSkipped) != 1 || c.events(events.SnapshotCreate) != 42 {
			t.Errorf("%d failed, %d skipped, %d created", failed, c.events(events.SnapshotSkipped), c.events(events.SnapshotCreate))
		}
		// Mended and retried: only the one that is missing comes.
		b.engine.mu.Lock()
		delete(b.engine.broken, broken.ID)
		b.engine.mu.Unlock()
		for _, task := range c.tasks("snapshot.node") {
			if task.State == state.TaskFailed {
				if err := a.broker.Retry(t.Context(), task.ID); err != nil {
					t.Fatal(err)
				}
			}
		}
		c.run(a.broker, "snapshot.automatic", due(1))
		if b.engine.count(broken) != 1 || b.engine.count(onB) != 1 || a.engine.count(onA) != 1 {
			t.Error("a second run of one time adds snapshots, or a retry none")
		}
	})
}

// A node that is away has one task waiting, however many hours pass, and serves it when it is back.
func TestNodeAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		a := c.node(nodeA)
		defer a.stop()
		onB := c.disk("b.raw", nodeB)
		for h := range 10 {
			c.run(a.broker, "snapshot.automatic", due(h))
		}
		if waiting := c.tasks("snapshot.node"); len(waiting) != 1 || waiting[0].State != state.TaskQueued {
			t.Fatalf("%d tasks wait", len(waiting))
		}
		b := c.node(nodeB)
		defer b.stop()
		time.Sleep(time.Minute)
		if b.engine.count(onB) != 1 {
			t.Errorf("%d snapshots", b.engine.count(onB))
		}
	})
}

func TestRetention(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		a := c.node(nodeA)
		defer a.stop()
		plain, long := c.disk("plain.raw", nodeA), c.disk("long.raw", nodeA)
		last := state.Retention{Last: 1000}
		c.must(&state.SetPolicy{Scope: state.Ref{Kind: state.ScopeVDisk, ID: long.ID}, Spec: state.PolicySpec{Retention: &last}})
		now := time.Now()
		for _, v := range []state.Volume{plain, long} {
			for i := range 100 {
				s := retention.Snapshot{ID: uuid.New(), Name: fmt.Sprint("auto-", i), Created: now.AddDate(0, 0, -i), Automatic: true}
				if i == 90 {
					s.Name = "in-use"
				}
				a.engine.snaps[v.ID] = append(a.engine.snaps[v.ID], s)
			}
		}
		args := due(1)
		args.Schedule = "retention"
		c.run(a.broker, "snapshot.retention", args)
		// Today, yesterday, seven days, three weeks, and the one that is in use.
		if got := a.engine.count(plain); got != 2+7+3+1 {
			t.Errorf("%d stay", got)
		}
		if got := a.engine.count(long); got != 100 {
			t.Errorf("its own policy keeps %d", got)
		}
		if got := c.events(events.SnapshotDelete); got != 87 {
			t.Errorf("%d events", got)
		}
		for _, task := range c.tasks("retention.node") {
			if task.State != state.TaskSucceeded {
				t.Errorf("%+v", task.Problem)
			}
		}
	})
}

// Scrub takes the policy's target; a vPool's verification comes once in the policy's days; damage is a problem of its own.
func TestScrubAndVerify(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		a := c.node(nodeA)
		defer a.stop()
		percent, days := 80, 7
		c.must(&state.SetPolicy{Scope: state.Ref{Kind: state.ScopeVPool, ID: pool}, Spec: state.PolicySpec{SpaceOverheadPercent: &percent, VerifyDays: &days}})
		args := schedule.Args{Schedule: "scrub", Scope: state.ScopeOfCluster(), Due: state.Time(time.Now().UnixNano())}
		c.run(a.broker, "vpool.scrub", args)
		if len(a.engine.scrubs) != 1 || a.engine.scrubs[0] != (upkeep.ScrubOptions{OverheadPercent: 80}) {
			t.Fatalf("%+v", a.engine.scrubs)
		}
		a.engine.scrubs = nil
		a.engine.report = upkeep.ScrubReport{Verified: 5, VerifyErrors: []string{"v/1: block 7 is damaged"}}
		for day := range 14 {
			args.Schedule, args.Due = "verify", state.Time(time.Now().AddDate(0, 0, day).UnixNano())
			c.run(a.broker, "vpool.verify", args)
		}
		if len(a.engine.scrubs) != 2 || !a.engine.scrubs[0].Verify {
			t.Errorf("verified %d times in two weeks: %+v", len(a.engine.scrubs), a.engine.scrubs)
		}
		damaged := 0
		for _, task := range c.tasks("verify.node") {
			if task.State == state.TaskFailed && task.Problem.Code == "data_damaged" {
				damaged++
			}
		}
		if damaged != 2 {
			t.Errorf("%d tasks tell of the damage", damaged)
		}
		// Whoever asks for a vPool gets it, whatever its turn.
		a.engine.scrubs = nil
		for range 2 {
			c.run(a.broker, upkeep.VerifyTask, schedule.Args{Only: pool})
		}
		if list := c.tasks(upkeep.VerifyTask); len(a.engine.scrubs) != 2 || !a.engine.scrubs[0].Verify || len(list) != 2 || list[0].Problem == nil || list[0].Problem.Code != "data_damaged" {
			t.Errorf("%+v %+v", a.engine.scrubs, list)
		}
		c.run(a.broker, upkeep.VerifyTask, schedule.Args{Only: uuid.New()})
		if list := c.tasks(upkeep.VerifyTask); len(a.engine.scrubs) != 2 || len(list) != 3 {
			t.Errorf("a vPool that is not there: %+v %+v", a.engine.scrubs, list)
		}
	})
}

func TestHealthAndReality(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		a := c.node(nodeA)
		defer a.stop()
		gone, there := c.disk("gone.raw", nodeA), c.disk("there.raw", nodeA)
		c.disk("other.raw", nodeB)
		a.engine.missing[gone.ID] = true
		a.health = []state.AlertSpec{{Code: "write_log_full", Severity: "warning", Object: "node a", Detail: "90 %", Remedy: "wait"}}
		for _, typ := range []string{"cluster.health", "cluster.reality", "cluster.certificates"} {
			c.run(a.broker, typ, schedule.Args{Schedule: "x", Scope: state.ScopeOfCluster()})
		}
		alerts := c.store.View().Alerts()
		if len(alerts) != 2 || alerts[0].Code != "write_log_full" || alerts[0].Node != nodeA || alerts[1].Code != "volume_missing" ||
			alerts[1].Object != "default/gone" {
			t.Fatalf("%+v", alerts)
		}
		a.health = nil
		delete(a.engine.missing, gone.ID)
		for _, typ := range []string{"cluster.health", "cluster.reality"} {
			c.run(a.broker, typ, schedule.Args{Schedule: "x", Scope: state.ScopeOfCluster()})
		}
		if alerts := c.store.View().Alerts(); len(alerts) != 0 || c.events(events.AlertCleared) != 2 {
			t.Errorf("%+v", alerts)
		}
		_ = there
	})
}
