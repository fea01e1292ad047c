package api

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	v1 "varve/control/api/customer"
	"varve/control/api/internal"
	"varve/control/auth"
	"varve/control/jobs"
	"varve/control/raft"
	"varve/control/state"
)

// fakeAppliance has two vPools' worth of everything.
type fakeAppliance struct{}

func (fakeAppliance) Cluster(context.Context) (v1.Cluster, error) {
	return v1.Cluster{Voters: 1, Nodes: []v1.ClusterNode{{Name: "n1", Leader: true}}, Problems: []string{}}, nil
}

func (fakeAppliance) JoinToken(_ context.Context, role string, ttl time.Duration) (v1.JoinToken, error) {
	return v1.JoinToken{Token: "varve_join_x", Role: role, Expires: time.Unix(0, 0).Add(ttl)}, nil
}

func (fakeAppliance) Joinable() error { return nil }

func (fakeAppliance) Join(_ context.Context, token string) (v1.ClusterJoined, error) {
	if token != "varve_join_right" {
		return v1.ClusterJoined{}, &state.Error{Err: state.ErrInvalid, Object: "join token"}
	}
	return v1.ClusterJoined{Fingerprint: "AA:BB"}, nil
}

func (fakeAppliance) Updates(context.Context) (v1.Updates, error) {
	return v1.Updates{Nodes: []v1.UpdateNode{{Name: "one", Version: "1"}}, Bundles: []v1.UpdateBundle{}}, nil
}

func (fakeAppliance) TakeUpdate(_ context.Context, bundle io.Reader) (v1.UpdateBundle, error) {
	n, err := io.Copy(io.Discard, bundle)
	return v1.UpdateBundle{Version: "2", Size: v1.Size(n)}, err
}

func (fakeAppliance) Rollout(_ context.Context, sum string, _ bool, by string) (state.TaskSpec, error) {
	if sum == "" {
		return state.TaskSpec{}, &state.Error{Err: state.ErrNotFound, Object: "update bundle"}
	}
	return state.TaskSpec{Type: "update.rollout", Queue: state.QueueGeneric, By: by}, nil
}

func (fakeAppliance) Health(context.Context) (v1.Health, error) {
	return v1.Health{State: "ok", Checks: []v1.HealthCheck{}, Unreachable: []string{}}, nil
}

func (fakeAppliance) Disks(context.Context) ([]v1.Disk, error) {
	return []v1.Disk{{ID: "n1/sda", Roles: []string{"log"}}, {ID: "n1/sdb", Roles: []string{}}}, nil
}

func (fakeAppliance) Backends(context.Context) ([]v1.Backend, error) {
	return []v1.Backend{{VPool: "default", ID: uuid.UUID{1}, State: "ok", Findings: map[string]string{}}, {VPool: "other", ID: uuid.UUID{2}, Findings: map[string]string{}}}, nil
}

func (fakeAppliance) TestBackend(_ context.Context, p state.VPool) (v1.BackendTest, error) {
	return v1.BackendTest{OK: true, Findings: map[string]string{"of": p.Name}}, nil
}

func (fakeAppliance) Protection(context.Context) ([]v1.Protection, error) {
	return []v1.Protection{{VDisk: "default/a", VPool: "default", ID: uuid.UUID{1}, Unbacked: 5}, {VDisk: "other/b", VPool: "other", ID: uuid.UUID{2}}}, nil
}

func (fakeAppliance) Capacity(context.Context) ([]v1.Capacity, error) {
	return []v1.Capacity{{VPool: "default", ID: uuid.UUID{1}}, {VPool: "other", ID: uuid.UUID{2}}}, nil
}

func (fakeAppliance) Logs(_ context.Context, q LogQuery) (v1.LogLines, error) {
	return v1.LogLines{Items: []v1.LogLine{{Node: "n1", Unit: "gateway", Seq: 7, At: q.Until, Level: "INFO", Message: q.Match}}, Unreachable: []string{}}, nil
}

func (fakeAppliance) History(_ context.Context, q HistoryQuery) (v1.History, error) {
	return v1.History{Object: q.Name, From: q.From.Unix(), To: q.To.Unix(), Step: int64(q.Points), Series: []v1.HistorySeries{}}, nil
}

// What the appliance tells goes through lists, roles and vPools like everything else.
func TestEstate(t *testing.T) {
	w := newWorld(t)
	w.user("u", state.RoleStorageAdmin)
	scoped := bearer(w.tokenOf("u", "scoped", auth.NewToken{VPools: []string{"default"}}))
	if c := ask[v1.Cluster](w, "GET", "/cluster", "", 200); c.Voters != 1 {
		t.Fatal(c)
	}
	if l := ask[v1.DiskList](w, "GET", "/disks?filter=id~sdb&count=true", "", 200); len(l.Items) != 1 || *l.Count != 1 {
		t.Fatal(l)
	}
	for path, want := range map[string]int{"/backends": 1, "/protection": 1, "/capacity": 1} {
		var l struct{ Items []json.RawMessage }
		w.must(json.Unmarshal(w.send("GET", base+path, "", scoped).Body.Bytes(), &l))
		if len(l.Items) != want {
			t.Errorf("%s shows credentials of one vPool %d", path, len(l.Items))
		}
	}
	if rec := w.send("GET", base+"/backends/other", "", scoped); rec.Code != 404 {
		t.Error("another vPool's backend:", rec.Code)
	}
	if b := ask[v1.BackendTest](w, "POST", "/backends/default/test", "", 200); b.Findings["of"] != "default" {
		t.Error(b)
	}
	if tok := ask[v1.JoinToken](w, "POST", "/cluster/tokens", `{"role":"extra","ttl":60}`, 201); tok.Role != "extra" || tok.Expires.Unix() != 60 {
		t.Error(tok)
	}
	ask[v1.Problem](w, "POST", "/cluster/tokens", `{"role":"boss"}`, 400)
	for query, want := range map[string]int{"object=node:n1": 200, "object=vpool:default&points=7": 200, "object=vpool:none": 404, "object=disk:x": 400,
		"object=node:n1&from=20&to=10": 400, "object=node:n1&points=99999": 400, "object=vdisk:default/none": 404, "": 400} {
		if rec := w.send("GET", base+"/metrics/history?"+query, "", bearer(w.token)); rec.Code != want {
			t.Errorf("history of %s: %d %s", query, rec.Code, rec.Body)
		}
	}
	if rec := w.send("GET", base+"/metrics/history?object=node:n1", "", scoped); rec.Code != 403 {
		t.Error("a node's figures with credentials of a vPool:", rec.Code)
	}
	h := ask[v1.History](w, "GET", "/metrics/history?object=vpool:default&from=100&to=160&points=7", "", 200)
	if h.Object != "vpool:default" || h.From != 100 || h.To != 160 || h.Step != 7 {
		t.Error(h)
	}
}

// Nodes change role and expectation, and go, by name, with what is asked before.
func TestNodes(t *testing.T) {
	w := newWorld(t)
	n := ask[v1.Node](w, "GET", "/nodes/n1", "", 200)
	if _, err := w.log.Apply(t.Context(), &state.RegisterNode{ID: uuid.New(), Spec: state.NodeSpec{Name: "n2", Role: state.RoleMaster}}); err != nil {
		t.Fatal(err)
	}
	if rec := w.send("PATCH", base+"/nodes/n1", `{"offline":true}`, bearer(w.token), header("If-Match", `"99"`)); rec.Code != 412 {
		t.Fatal("a stale rev:", rec.Code, rec.Body)
	}
	ask[v1.Effect](w, "PATCH", "/nodes/n1?dryRun=true", `{"role":"extra"}`, 200)
	if got := ask[v1.Node](w, "PATCH", "/nodes/n1", `{"offline":true}`, 200); !got.Offline || got.Role != n.Role {
		t.Fatal(got)
	}
	if got := ask[v1.Node](w, "PATCH", "/nodes/"+n.ID.String(), `{"offline":false}`, 200); got.Offline {
		t.Fatal(got)
	}
	ask[v1.Problem](w, "PATCH", "/nodes/n1", `{}`, 400)
	ask[v1.Problem](w, "PATCH", "/nodes/n1", `{"role":"king"}`, 400)
	ask[v1.Problem](w, "PATCH", "/nodes/none", `{"offline":true}`, 404)
	ask[v1.Problem](w, "DELETE", "/nodes/n1", "", 428)
	if e := ask[v1.Effect](w, "DELETE", "/nodes/n1?dryRun=true", "", 200); e.Confirm != "n1" || len(e.Lost) == 0 {
		t.Fatal(e)
	}
}

// A read waits until this node knows what others have acknowledged; where it cannot, it says so, unless the caller does without.
func TestReadsAreFresh(t *testing.T) {
	w := newWorld(t)
	w.behind = fmt.Errorf("%w: no leader", raft.ErrUnavailable)
	if p := w.problem("GET", base+"/vdisks", "", 503, "unavailable"); !strings.Contains(p.Remedy, "consistency=stale") {
		t.Fatal(p)
	}
	for path, want := range map[string]int{"/vdisks?consistency=stale": 200, "/vdisks?consistency=linearizable": 503, "/vdisks?consistency=maybe": 400,
		"/status": 200, "/cluster": 200, "/health": 200, "/tasks": 503} {
		if rec := w.send("GET", base+path, "", bearer(w.token)); rec.Code != want {
			t.Errorf("%s: %d %s", path, rec.Code, rec.Body)
		}
	}
	w.behind = errors.New("other")
	w.problem("GET", base+"/vdisks", "", 503, "unavailable")
	w.behind = nil
	ask[v1.VDiskList](w, "GET", "/vdisks", "", 200)
}

// Clone and rollback answer with a task at once for those who prefer that; each is done once.
func TestRespondAsync(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 2)
	worker := jobs.NewWorker(jobs.WorkerConfig{Node: uuid.New(), Queues: []string{state.QueueGeneric}, Source: w.broker, Types: w.types})
	go func() { done <- w.broker.Run(ctx) }()
	go func() { done <- worker.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		for range 2 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	})
	ask[v1.VDisk](w, "POST", "/vdisks", `{"name":"default/a","size":"1MiB"}`, 201)
	ask[v1.Snapshot](w, "POST", "/vdisks/default%2Fa/snapshots", `{"name":"s1"}`, 201)
	do := func(path, body string) v1.Task {
		t.Helper()
		rec := w.send("POST", base+path, body, bearer(w.token), header("Prefer", "respond-async, wait=1"))
		var task v1.Task
		w.must(json.Unmarshal(rec.Body.Bytes(), &task))
		if rec.Code != 202 || rec.Header().Get("Location") != base+"/tasks/"+task.ID.String() {
			t.Fatal(rec.Code, rec.Header(), rec.Body)
		}
		return ask[v1.Task](w, "GET", "/tasks/"+task.ID.String()+"?wait=20", "", 200)
	}
	if task := do("/vdisks/default%2Fa/clones", `{"name":"default/b","snapshot":"s1"}`); task.State != "succeeded" || !strings.Contains(string(task.Result), "default/b") {
		t.Fatalf("%+v", task)
	}
	ask[v1.VDisk](w, "GET", "/vdisks/default%2Fb", "", 200)
	if task := do("/vdisks/default%2Fa/clones", `{"name":"default/b","snapshot":"s1"}`); task.State != "failed" || task.Problem == nil {
		t.Fatalf("%+v", task)
	}
	if task := do("/vdisks/default%2Fa/rollback?confirm=default/a", `{"snapshot":"s1"}`); task.State != "succeeded" {
		t.Fatalf("%+v", task)
	}
	if l := ask[v1.SnapshotList](w, "GET", "/vdisks/default%2Fa/snapshots", "", 200); len(l.Items) != 2 {
		t.Fatalf("%+v", l.Items)
	}

	// An attempt that kept what the vDisk was and did no more is no rollback: tried again, the task does it.
	a, b := ask[v1.VDisk](w, "GET", "/vdisks/default%2Fa", "", 200), ask[v1.VDisk](w, "GET", "/vdisks/default%2Fb", "", 200)
	w.engine.Fail("RollbackMark", errors.New("the backend is away"))
	task := do("/vdisks/default%2Fa/rollback?confirm=default/a", `{"snapshot":"s1"}`)
	if n := w.engine.RolledBackTimes(a.ID); task.State != "failed" || n != 1 {
		t.Fatalf("%+v, rolled back %d times", task, n)
	}
	w.engine.Fail("RollbackMark", nil)
	again := func() {
		t.Helper()
		ask[v1.Task](w, "POST", "/tasks/"+task.ID.String()+"/retry", "", 202)
		if task := ask[v1.Task](w, "GET", "/tasks/"+task.ID.String()+"?wait=20", "", 200); task.State != "succeeded" {
			t.Fatalf("%+v %+v", task, task.Problem)
		}
		if n := w.engine.RolledBackTimes(a.ID); n != 2 {
			t.Fatalf("rolled back %d times", n)
		}
	}
	again()

	// A rewind makes a vDisk, once; tried again, it takes no other vDisk for its own.
	at := time.Now().Add(-time.Minute).UTC().Format(time.RFC3339)
	w.engine.Fail("Clone", errors.New("the backend is away"))
	if task = do("/vdisks/default%2Fa/rewind", `{"at":"`+at+`","name":"default/was"}`); task.State != "failed" {
		t.Fatalf("%+v", task)
	}
	w.engine.Fail("Clone", nil)
	retry := func(want string) {
		t.Helper()
		ask[v1.Task](w, "POST", "/tasks/"+task.ID.String()+"/retry", "", 202)
		if task := ask[v1.Task](w, "GET", "/tasks/"+task.ID.String()+"?wait=20", "", 200); task.State != want {
			t.Fatalf("%+v %+v", task, task.Problem)
		}
	}
	ask[v1.VDisk](w, "POST", "/vdisks", `{"name":"default/was","size":"1MiB"}`, 201)
	retry("failed")
	w.send("DELETE", base+"/vdisks/default%2Fwas?confirm=default/was", "", bearer(w.token))
	retry("succeeded")
	if was := ask[v1.VDisk](w, "GET", "/vdisks/default%2Fwas", "", 200); !strings.HasPrefix(was.Parent, "default/a@") {
		t.Fatalf("%+v", was)
	}

	// A clone that cannot be made leaves no snapshot behind.
	w.engine.Fail("Clone", errors.New("the backend is away"))
	before := len(ask[v1.SnapshotList](w, "GET", "/vdisks/default%2Fa/snapshots", "", 200).Items)
	if task := do("/vdisks/default%2Fa/clones", `{"name":"default/c"}`); task.State != "failed" {
		t.Fatalf("%+v", task)
	}
	if l := ask[v1.SnapshotList](w, "GET", "/vdisks/default%2Fa/snapshots", "", 200); len(l.Items) != before {
		t.Fatalf("%+v", l.Items)
	}
	w.engine.Fail("Clone", nil)

	// A rollback may make of the vDisk a clone of something else.
	w.engine.SetParent(a.ID, &state.VolumeParent{Volume: b.ID, Snapshot: uuid.New()})
	if task := do("/vdisks/default%2Fa/rollback?confirm=default/a", `{"snapshot":"s1"}`); task.State != "succeeded" {
		t.Fatalf("%+v", task)
	}
	if a := ask[v1.VDisk](w, "GET", "/vdisks/default%2Fa", "", 200); !strings.HasPrefix(a.Parent, "default/b@") {
		t.Fatalf("a clone of %v", a.Parent)
	}
}

// The stream of changes begins where it is asked to, tells what changes, keeps what not everybody may know, and ends with the session.
func TestChangeStream(t *testing.T) {
	w := newWorld(t)
	srv := httptest.NewServer(w.server.Handler())
	t.Cleanup(srv.Close)
	w.user("v", state.RoleViewer)
	w.user("a", state.RoleAdmin)
	follow := func(name string, since uint64) *bufio.Scanner {
		t.Helper()
		as, _ := w.session(name)
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, fmt.Sprintf("%s%s/changes?since=%d", srv.URL, internal.Prefix, since), nil)
		w.must(err)
		as(req)
		res, err := http.DefaultClient.Do(req)
		w.must(err)
		t.Cleanup(func() { res.Body.Close() })
		if res.StatusCode != 200 || res.Header.Get("Content-Type") != "text/event-stream" {
			t.Fatal(res.Status)
		}
		return bufio.NewScanner(res.Body)
	}
	next := func(s *bufio.Scanner, event string) string {
		t.Helper()
		for s.Scan() {
			if s.Text() == "event: "+event && s.Scan() {
				return strings.TrimPrefix(s.Text(), "data: ")
			}
		}
		t.Fatal("the stream ended without", event, s.Err())
		return ""
	}
	at := w.log.Store.Index()
	viewer, admin := follow("v", at), follow("a", at)
	next(viewer, "start")
	next(admin, "start")
	disk := ask[v1.VDisk](w, "POST", "/vdisks", `{"name":"default/seen","size":"1MiB"}`, 201)
	for _, s := range []*bufio.Scanner{viewer, admin} {
		for {
			if text := next(s, "change"); strings.Contains(text, `"kind":"vdisk","id":"`+disk.ID.String()+`"`) {
				break
			}
		}
	}
	w.user("later", state.RoleViewer)
	ask[v1.VDisk](w, "POST", "/vdisks", `{"name":"default/last","size":"1MiB"}`, 201)
	sawUser := func(s *bufio.Scanner) (seen bool) {
		for range 20 {
			text := next(s, "change")
			seen = seen || strings.Contains(text, `"kind":"user"`)
			if strings.Contains(text, `"kind":"vdisk"`) {
				return seen
			}
		}
		t.Fatal("no change of the vDisk")
		return false
	}
	if sawUser(viewer) || !sawUser(admin) {
		t.Error("users are told to a viewer, or not to an administrator")
	}
	next(follow("a", 1<<40), "gap")
}
