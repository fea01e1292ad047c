package jobs_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"

	"varve/control/jobs"
	"varve/control/state"
)

// cluster is a state with a log in memory, and brokers of which one leads.
type cluster struct {
	t     *testing.T
	store *state.Store

	mu    sync.Mutex
	index uint64
	// fail says of a command whether its proposal fails: "" no, "before" without effect, "after" with its effect done.
	fail func(state.Command) string
	down bool
}

var errNoQuorum = errors.New("no quorum")

func newCluster(t *testing.T) *cluster {
	c := &cluster{t: t, store: state.New()}
	c.must(&state.InitCluster{ID: uuid.New(), Format: state.Format})
	return c
}

func (c *cluster) Apply(ctx context.Context, cmd state.Command) (state.Result, error) {
	if err := ctx.Err(); err != nil {
		return state.Result{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	how := ""
	if c.fail != nil {
		how = c.fail(cmd)
	}
	if c.down || how == "before" {
		return state.Result{}, errNoQuorum
	}
	entry, err := state.Encode(cmd, uuid.New(), state.Time(time.Now().UnixNano()))
	if err != nil {
		return state.Result{}, err
	}
	c.index++
	res, err := c.store.Apply(c.index, entry)
	if err := c.store.Halted(); err != nil {
		c.t.Error(err)
	}
	if how == "after" {
		return state.Result{}, errNoQuorum
	}
	return res, err
}

func (c *cluster) must(cmd state.Command) state.Result {
	c.t.Helper()
	res, err := c.Apply(context.Background(), cmd)
	if err != nil {
		c.t.Fatal(err)
	}
	return res
}

func (c *cluster) task(id uuid.UUID) state.Task {
	c.t.Helper()
	t, err := c.store.View().Task(id)
	if err != nil {
		c.t.Fatal(err)
	}
	return t
}

// leader is a worker's way to its broker, which may be cut, or lead nowhere while nobody leads.
type leader struct {
	mu sync.Mutex
	b  *jobs.Broker
	// cut is set for a worker that reaches nobody.
	cut bool
}

func (l *leader) now() (*jobs.Broker, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cut || l.b == nil {
		return nil, errNoQuorum
	}
	return l.b, nil
}

func (l *leader) set(b *jobs.Broker, cut bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b, l.cut = b, cut
}

func (l *leader) Dequeue(ctx context.Context, w jobs.WorkerInfo) (jobs.Delivery, error) {
	b, err := l.now()
	if err != nil {
		return jobs.Delivery{}, err
	}
	return b.Dequeue(ctx, w)
}

func (l *leader) Renew(ctx context.Context, task, lease uuid.UUID) (bool, error) {
	b, err := l.now()
	if err != nil {
		return false, err
	}
	return b.Renew(ctx, task, lease)
}

func (l *leader) Report(ctx context.Context, r state.ReportTask) error {
	b, err := l.now()
	if err != nil {
		return err
	}
	return b.Report(ctx, r)
}

func (l *leader) Finish(ctx context.Context, f state.FinishTask) error {
	b, err := l.now()
	if err != nil {
		return err
	}
	return b.Finish(ctx, f)
}

func newTypes(t *testing.T, do map[string]jobs.Handler) jobs.Types {
	t.Helper()
	var all []jobs.Type
	for name, h := range do {
		all = append(all, jobs.Type{Name: name, Do: h, Consequence: "it is not done", Remedy: "do it by hand"})
	}
	types, err := jobs.NewTypes(all...)
	if err != nil {
		t.Fatal(err)
	}
	return types
}

// running starts f and returns what ends and waits for it.
func running(f func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = f(ctx) })
	return func() { cancel(); wg.Wait() }
}

func submit(t *testing.T, b *jobs.Broker, spec state.TaskSpec) uuid.UUID {
	t.Helper()
	if spec.Queue == "" {
		spec.Queue = state.QueueGeneric
	}
	id, _, err := b.Submit(context.Background(), spec)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func wait(t *testing.T, b *jobs.Broker, id uuid.UUID) state.Task {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 24*time.Hour)
	defer cancel()
	task, err := b.Wait(ctx, id)
	if err != nil {
		t.Fatalf("task %+v: %v", task, err)
	}
	return task
}

// How a task ends follows from what its handler returns, with everything it told on the way.
func TestOutcomes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		var mu sync.Mutex
		tries := 0
		types := newTypes(t, map[string]jobs.Handler{
			"good": func(_ context.Context, r *jobs.Run) error {
				var args struct{ Name string }
				if err := r.Args(&args); err != nil {
					return err
				}
				for _, s := range []string{"first", "second", "third"} {
					if err := r.Step(s); err != nil {
						return err
					}
				}
				r.Progress(7, 9)
				r.Log("hello %s", args.Name)
				return r.Result(map[string]int{"answer": 42})
			},
			"bad":    func(context.Context, *jobs.Run) error { return errors.New("the disk is on fire") },
			"panics": func(context.Context, *jobs.Run) error { panic("no") },
			"typed": func(context.Context, *jobs.Run) error {
				return &jobs.Problem{Problem: state.Problem{Code: "no_space", Cause: "backend is full", Consequence: "writes stop", Remedy: "add a disk"}}
			},
			"refused": func(context.Context, *jobs.Run) error {
				return fmt.Errorf("snapshot: %w", &state.Error{Err: state.ErrConflict, Object: "vdisk a", Remedy: "detach it"})
			},
			"flaky": func(context.Context, *jobs.Run) error {
				mu.Lock()
				defer mu.Unlock()
				if tries++; tries < 4 {
					return &jobs.Retry{Err: errors.New("not yet")}
				}
				return nil
			},
			"hopeless": func(context.Context, *jobs.Run) error { return &jobs.Retry{Err: errors.New("never")} },
		})
		b := jobs.NewBroker(jobs.BrokerConfig{Raft: c, Store: c.store, Types: types})
		w := jobs.NewWorker(jobs.WorkerConfig{Node: uuid.New(), Queues: []string{state.QueueGeneric}, Types: types, Source: b})
		defer running(b.Run)()
		defer running(w.Run)()
		run := func(typ string) state.Task {
			return wait(t, b, submit(t, b, state.TaskSpec{Type: typ, Args: []byte(`{"Name":"x"}`), DeliveriesMax: 4}))
		}
		good := run("good")
		if good.State != state.TaskSucceeded || string(good.Result) != `{"answer":42}` || len(good.Steps) != 3 || good.Steps[2].Ended == 0 ||
			good.Done != 7 || good.Total != 9 || len(good.Log) != 1 || good.Log[0].Text != "hello x" {
			t.Errorf("good: %+v", good)
		}
		for typ, want := range map[string]state.Problem{
			"bad":     {Code: jobs.CodeFailed, Cause: "the disk is on fire", Consequence: "it is not done", Remedy: "do it by hand"},
			"panics":  {Code: jobs.CodePanic, Cause: "internal error: no", Consequence: "it is not done", Remedy: "report it with a support bundle"},
			"typed":   {Code: "no_space", Cause: "backend is full", Consequence: "writes stop", Remedy: "add a disk"},
			"refused": {Code: jobs.CodeFailed, Cause: "snapshot: vdisk a: conflict", Consequence: "it is not done", Remedy: "detach it"},
		} {
			if got := run(typ); got.State != state.TaskFailed || got.Problem == nil || *got.Problem != want || got.Deliveries != 1 {
				t.Errorf("%s: %+v %+v", typ, got, got.Problem)
			}
		}
		start := time.Now()
		if got := run("flaky"); got.State != state.TaskSucceeded || got.Deliveries != 4 {
			t.Errorf("flaky: %+v", got)
		}
		if took := time.Since(start); took < 61*time.Second || took > 63*time.Second { // 1 + 20 + 40
			t.Errorf("three retries took %s", took)
		}
		if got := run("hopeless"); got.State != state.TaskFailed || got.Deliveries != 4 || got.Problem.Cause != "never" {
			t.Errorf("hopeless: %+v", got)
		}
		if _, _, err := b.Submit(context.Background(), state.TaskSpec{Type: "unheard-of", Queue: state.QueueGeneric}); !errors.Is(err, state.ErrInvalid) {
			t.Errorf("a type that nobody knows: %v", err)
		}
	})
}

// A cancelled task stops at its next step; one that waits never starts.
func TestCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		types := newTypes(t, map[string]jobs.Handler{"long": func(ctx context.Context, r *jobs.Run) error {
			for i := range 1000 {
				if err := r.Step(fmt.Sprint("step ", i)); err != nil {
					return err
				}
				select {
				case <-ctx.Done():
					return ctx.Err()
				case <-time.After(time.Minute):
				}
			}
			return nil
		}})
		b := jobs.NewBroker(jobs.BrokerConfig{Raft: c, Store: c.store, Types: types})
		w := jobs.NewWorker(jobs.WorkerConfig{Node: uuid.New(), Queues: []string{state.QueueGeneric}, Types: types, Source: b, Parallel: 1})
		defer running(b.Run)()
		defer running(w.Run)()
		a := submit(t, b, state.TaskSpec{Type: "long"})
		waits := submit(t, b, state.TaskSpec{Type: "long"})
		time.Sleep(150 * time.Second)
		for _, id := range []uuid.UUID{waits, a} {
			if err := b.Cancel(context.Background(), id); err != nil {
				t.Fatal(err)
			}
		}
		began := time.Now()
		if got := wait(t, b, a); got.State != state.TaskCancelled || len(got.Steps) != 3 {
			t.Errorf("%+v", got)
		}
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("cancel took %s", took)
		}
		if got := wait(t, b, waits); got.State != state.TaskCancelled || got.Started != 0 {
			t.Errorf("%+v", got)
		}
	})
}

// A worker that dies holds its task no longer than the lease; one that is only cut off stops before another starts it.
func TestLostWorkers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		var mu sync.Mutex
		inside, most, starts := 0, 0, 0
		types := newTypes(t, map[string]jobs.Handler{"work": func(ctx context.Context, r *jobs.Run) error {
			mu.Lock()
			starts++
			inside++
			most = max(most, inside)
			mu.Unlock()
			defer func() { mu.Lock(); inside--; mu.Unlock() }()
			var at struct{ N int }
			r.Resume(&at)
			for ; at.N < 100; at.N++ {
				if err := r.Checkpoint(at); err != nil {
					return err
				}
				select {
				case <-ctx.Done():
					return ctx.Err()
				case <-time.After(time.Second):
				}
			}
			return nil
		}})
		b := jobs.NewBroker(jobs.BrokerConfig{Raft: c, Store: c.store, Types: types})
		defer running(b.Run)()
		link := &leader{b: b}
		cutOff := jobs.NewWorker(jobs.WorkerConfig{Node: uuid.New(), Queues: []string{state.QueueGeneric}, Types: types, Source: link, Parallel: 1})
		stopCutOff := running(cutOff.Run)
		id := submit(t, b, state.TaskSpec{Type: "work", Ensure: state.EnsureSingle})
		synctest.Wait()
		time.Sleep(40 * time.Second)
		link.set(nil, true)
		other := jobs.NewWorker(jobs.WorkerConfig{Node: uuid.New(), Queues: []string{state.QueueGeneric}, Types: types, Source: b, Parallel: 1})
		defer running(other.Run)()
		began := time.Now()
		got := wait(t, b, id)
		stopCutOff()
		if got.State != state.TaskSucceeded || got.Deliveries != 2 || starts != 2 {
			t.Errorf("%d starts, %+v", starts, got)
		}
		if most != 1 {
			t.Errorf("%d handlers of one task at a time", most)
		}
		if took := time.Since(began); took > 30*time.Second+time.Second+65*time.Second {
			t.Errorf("took %s: it did not go on from its checkpoint", took)
		}
		// Nothing stays stuck: the key is free.
		if _, created, err := b.Submit(context.Background(), state.TaskSpec{Type: "work", Queue: state.QueueGeneric, Ensure: state.EnsureSingle}); err != nil || !created {
			t.Errorf("the key is still taken: %v %v", created, err)
		}
	})
}

// A node that is shut down gives its tasks back at once, and they are not nearer to their limit.
func TestWorkerStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		types := newTypes(t, map[string]jobs.Handler{"sleep": func(ctx context.Context, _ *jobs.Run) error {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(time.Hour):
				return nil
			}
		}})
		b := jobs.NewBroker(jobs.BrokerConfig{Raft: c, Store: c.store, Types: types})
		defer running(b.Run)()
		id := submit(t, b, state.TaskSpec{Type: "sleep", DeliveriesMax: 1})
		for range 5 {
			w := jobs.NewWorker(jobs.WorkerConfig{Node: uuid.New(), Queues: []string{state.QueueGeneric}, Types: types, Source: b})
			stop := running(w.Run)
			time.Sleep(time.Minute)
			if got := c.task(id); got.State != state.TaskRunning {
				t.Fatalf("%+v", got)
			}
			began := time.Now()
			stop()
			if took := time.Since(began); took > time.Second {
				t.Errorf("stop took %s", took)
			}
			if got := c.task(id); got.State != state.TaskQueued || got.Deliveries != 0 {
				t.Fatalf("%+v", got)
			}
		}
	})
}

// Leaders change, proposals fail before and after their effect, workers die: every task ends exactly once, no two handlers of
// one run together, and chained tasks never overlap.
func TestLeadersAndFaults(t *testing.T) {
	for seed := range uint64(12) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { simulate(t, seed) })
		})
	}
}

func simulate(t *testing.T, seed uint64) {
	const tasks, hours = 60, 3
	rng := rand.New(rand.NewPCG(seed, 1))
	var rngMu sync.Mutex
	roll := func(n int) int { rngMu.Lock(); defer rngMu.Unlock(); return rng.IntN(n) }
	c := newCluster(t)
	faults := true
	c.fail = func(cmd state.Command) string {
		if _, submits := cmd.(*state.SubmitTask); submits || !faults {
			return ""
		}
		switch roll(12) {
		case 0:
			return "before"
		case 1:
			return "after"
		}
		return ""
	}
	var mu sync.Mutex
	ran := make(map[uuid.UUID]int) // completed handlers
	inside := make(map[uuid.UUID]int)
	chained := 0
	work := func(chain bool) jobs.Handler {
		return func(ctx context.Context, r *jobs.Run) error {
			mu.Lock()
			inside[r.ID()]++
			if inside[r.ID()] > 1 {
				t.Errorf("task %s runs twice at a time", r.ID())
			}
			if chain {
				if chained++; chained > 1 {
					t.Error("two chained tasks run together")
				}
			}
			mu.Unlock()
			defer func() {
				mu.Lock()
				defer mu.Unlock()
				inside[r.ID()]--
				if chain {
					chained--
				}
			}()
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(time.Duration(1+roll(60)) * time.Second):
			}
			if roll(5) == 0 {
				return &jobs.Retry{Err: errors.New("again")}
			}
			mu.Lock()
			ran[r.ID()]++
			mu.Unlock()
			return nil
		}
	}
	types := newTypes(t, map[string]jobs.Handler{"free": work(false), "chain": work(true)})
	newBroker := func() *jobs.Broker { return jobs.NewBroker(jobs.BrokerConfig{Raft: c, Store: c.store, Types: types}) }

	// Three nodes, each with a broker and a worker; one leads at a time.
	brokers := []*jobs.Broker{newBroker(), newBroker(), newBroker()}
	links := []*leader{{}, {}, {}}
	var stops []func()
	for i := range links {
		w := jobs.NewWorker(jobs.WorkerConfig{Node: uuid.New(), Queues: []string{state.QueueGeneric}, Types: types, Source: links[i], Parallel: 2})
		stops = append(stops, running(w.Run))
	}
	lead := func(i int) (stop func()) {
		for _, l := range links {
			l.set(brokers[i], l.cut)
		}
		return running(brokers[i].Run)
	}
	stop := lead(0)
	var ids []uuid.UUID
	for n := range tasks {
		spec := state.TaskSpec{Type: "free", DeliveriesMax: 500}
		if n%3 == 0 {
			spec = state.TaskSpec{Type: "chain", Ensure: state.EnsureChained, Args: fmt.Appendf(nil, `{"n":%d}`, n), DeliveriesMax: 500}
		}
		ids = append(ids, submit(t, brokers[0], spec))
	}
	for began := time.Now(); time.Since(began) < hours*time.Hour; {
		time.Sleep(time.Duration(5+roll(200)) * time.Second)
		switch roll(4) {
		case 0: // the leader changes, with a gap
			stop()
			for _, l := range links {
				l.set(nil, l.cut)
			}
			time.Sleep(time.Duration(roll(8)) * time.Second)
			stop = lead(roll(3))
		case 1: // a worker is cut off, or comes back
			l := links[roll(3)]
			l.mu.Lock()
			l.cut = !l.cut
			l.mu.Unlock()
		case 2: // a node restarts
			i := roll(3)
			stops[i]()
			w := jobs.NewWorker(jobs.WorkerConfig{Node: uuid.New(), Queues: []string{state.QueueGeneric}, Types: types, Source: links[i], Parallel: 2})
			stops[i] = running(w.Run)
		}
	}
	c.mu.Lock()
	faults = false
	c.mu.Unlock()
	for _, l := range links {
		l.mu.Lock()
		l.cut = false
		l.mu.Unlock()
	}
	for _, id := range ids {
		got := wait(t, brokers[0], id)
		if got.State != state.TaskSucceeded {
			t.Errorf("seed %d: %+v %+v", seed, got, got.Problem)
		}
		if ran[id] < 1 {
			t.Errorf("seed %d: task %s succeeded without having run", seed, id)
		}
	}
	ended := 0
	for _, e := range c.store.View().Events(0, 1<<20) {
		if e.Type == "task_succeeded" && slices.ContainsFunc(ids, func(id uuid.UUID) bool { return id.String() == e.Key }) {
			ended++
		}
	}
	if ended != tasks {
		t.Errorf("seed %d: %d tasks ended %d times", seed, tasks, ended)
	}
	if err := c.store.View().Check(); err != nil {
		t.Error(err)
	}
	for _, s := range stops {
		s()
	}
	stop()
}
