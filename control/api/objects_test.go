package api

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	v1 "varve/control/api/customer"
	"varve/control/auth"
	"varve/control/events"
	"varve/control/jobs"
	"varve/control/state"
)

// ask sends a request as the administrator, checks its status and decodes the answer.
func ask[T any](w *world, method, path, body string, status int) (out T) {
	w.Helper()
	rec := w.send(method, base+path, body, bearer(w.token))
	if rec.Code != status {
		w.Fatalf("%s %s %s: %d %s, want %d", method, path, body, rec.Code, rec.Body, status)
	}
	if rec.Body.Len() > 0 && status < 400 {
		d := json.NewDecoder(strings.NewReader(rec.Body.String()))
		d.DisallowUnknownFields()
		if err := d.Decode(&out); err != nil {
			w.Fatalf("%s %s: %v in %s", method, path, err, rec.Body)
		}
	}
	return out
}

// Snapshots, rollback, clones, templates and the trash by the API.
func TestSnapshotsAndClones(t *testing.T) {
	w := newWorld(t)
	ask[v1.VDisk](w, "POST", "/vdisks", `{"name":"default/d","size":"1MiB"}`, 201)
	at := "/vdisks/default%2Fd"
	s := ask[v1.Snapshot](w, "POST", at+"/snapshots", `{"name":"s1","consistent":true,"labels":{"a":"b"}}`, 201)
	if s.Name != "s1" || !s.Consistent || s.Labels["a"] != "b" || s.VDisk != "default/d" {
		t.Fatalf("%+v", s)
	}
	ask[v1.Problem](w, "POST", at+"/snapshots", `{"name":"s1"}`, 409)
	ask[v1.Problem](w, "POST", at+"/snapshots", `{"name":"../x"}`, 400)
	ask[v1.Effect](w, "POST", at+"/snapshots?dryRun=true", `{"name":"s9"}`, 200)
	ask[v1.Snapshot](w, "POST", at+"/snapshots", `{"name":"s2"}`, 201)
	if l := ask[v1.SnapshotList](w, "GET", at+"/snapshots?filter=consistent=true", "", 200); len(l.Items) != 1 || l.Items[0].ID != s.ID {
		t.Fatalf("%+v", l)
	}
	if d := ask[v1.SnapshotDetail](w, "GET", at+"/snapshots/"+s.ID.String(), "", 200); d.Snapshot.Name != "s1" {
		t.Fatalf("%+v", d)
	}
	if e := ask[v1.Snapshot](w, "PATCH", at+"/snapshots/s1", `{"sticky":true}`, 200); !e.Sticky || e.Labels["a"] != "b" {
		t.Fatalf("%+v", e)
	}
	w.problem("DELETE", base+at+"/snapshots/s1", "", 428, "confirmation_required")
	ask[v1.Problem](w, "DELETE", at+"/snapshots/s1?confirm=default/d@s1", "", 409)
	c := ask[v1.VDisk](w, "POST", at+"/clones", `{"name":"default/c","snapshot":"s1"}`, 201)
	if !strings.HasPrefix(c.Parent, "default/d@") {
		t.Fatalf("%+v", c)
	}
	ask[v1.Problem](w, "POST", at+"/clones", `{"name":"default/c","snapshot":"s1"}`, 409)
	ask[v1.Problem](w, "POST", at+"/clones", `{"name":"default/c2","snapshot":"nope"}`, 404)
	w.problem("POST", base+at+"/rollback", `{"snapshot":"s2"}`, 428, "confirmation_required")
	if e := ask[v1.Effect](w, "POST", at+"/rollback?dryRun=true", `{"snapshot":"s2"}`, 200); e.Confirm != "default/d" {
		t.Fatalf("%+v", e)
	}
	if saved := ask[v1.Snapshot](w, "POST", at+"/rollback?confirm=default/d", `{"snapshot":"s2"}`, 200); !saved.Automatic {
		t.Fatalf("%+v", saved)
	}
	group := ask[v1.SnapshotList](w, "POST", "/snapshots", `{"vdisks":["default/d","default/c"],"name":"together"}`, 201)
	if len(group.Items) != 2 || group.Items[1].VDisk != "default/c" {
		t.Fatalf("%+v", group)
	}
	ask[v1.Ledger](w, "GET", at+"/ledger", "", 200)
	ask[v1.Ledger](w, "POST", at+"/wait", `{"level":"backed","seconds":5}`, 200)
	ask[v1.Problem](w, "POST", at+"/wait", `{"level":"moon"}`, 400)

	// The trash: deleted, listed, brought back, and at last purged.
	ask[struct{}](w, "DELETE", "/vdisks/default%2Fc?confirm=default/c", "", 204)
	trash := ask[v1.TrashedList](w, "GET", "/trash", "", 200)
	if len(trash.Items) != 1 || trash.Items[0].Name != "default/c" || trash.Items[0].Until.Sub(trash.Items[0].Removed).Round(time.Minute) != 7*24*time.Hour {
		t.Fatalf("%+v", trash)
	}
	ask[v1.Problem](w, "GET", "/vdisks/default%2Fc", "", 404)
	ask[v1.VDisk](w, "POST", "/trash/"+c.ID.String()+"/restore", `{"name":"default/back"}`, 200)
	ask[struct{}](w, "DELETE", "/vdisks/default%2Fback?confirm=default/back&keep=3600", "", 204)
	w.problem("DELETE", base+"/trash/default%2Fback", "", 428, "confirmation_required")
	ask[struct{}](w, "DELETE", "/trash/default%2Fback?confirm=default/back", "", 204)
	if l := ask[v1.TrashedList](w, "GET", "/trash", "", 200); len(l.Items) != 0 {
		t.Fatalf("%+v", l)
	}
	ask[v1.Problem](w, "DELETE", "/vdisks/default%2Fd?confirm=default/d&keep=1", "", 400)
}

// Vdisks from a template are made by a task, whose id the answer names and which can be waited for.
func TestFromTemplateIsATask(t *testing.T) {
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
	ask[v1.VDisk](w, "POST", "/vdisks", `{"name":"default/golden","size":"1MiB"}`, 201)
	body := `{"names":["default/vm1","default/vm2","default/vm3"]}`
	ask[v1.Problem](w, "POST", "/vdisks/default%2Fgolden/copies", body, 409)
	if d := ask[v1.VDisk](w, "PUT", "/vdisks/default%2Fgolden/template", `{"template":true}`, 200); !d.Template {
		t.Fatalf("%+v", d)
	}
	if l := ask[v1.VDiskList](w, "GET", "/templates", "", 200); len(l.Items) != 1 {
		t.Fatalf("%+v", l)
	}
	ask[v1.Problem](w, "POST", "/vdisks/default%2Fgolden/copies", `{"names":["default/vm1","default/vm1"]}`, 400)
	rec := w.send("POST", base+"/vdisks/default%2Fgolden/copies", body, bearer(w.token))
	var task v1.Task
	w.must(json.Unmarshal(rec.Body.Bytes(), &task))
	if rec.Code != 202 || rec.Header().Get("Location") != base+"/tasks/"+task.ID.String() || task.By != "token/admin" {
		t.Fatal(rec.Code, rec.Header(), rec.Body)
	}
	task = ask[v1.Task](w, "GET", "/tasks/"+task.ID.String()+"?wait=20", "", 200)
	if task.State != "succeeded" || task.Done != 3 || task.Total != 3 || !strings.Contains(string(task.Result), "default/vm3") || task.Ended == nil {
		t.Fatalf("%+v", task)
	}
	if l := ask[v1.VDiskList](w, "GET", "/vdisks?filter=name~vm", "", 200); len(l.Items) != 3 {
		t.Fatalf("%+v", l)
	}
	ask[v1.Problem](w, "GET", "/tasks/"+uuid.NewString(), "", 404)
	ask[v1.Problem](w, "GET", "/tasks/nope", "", 404)
	ask[v1.Problem](w, "GET", "/tasks/"+task.ID.String()+"?wait=999", "", 400)
	ask[v1.Problem](w, "DELETE", "/tasks/"+task.ID.String(), "", 409)
	if l := ask[v1.TaskList](w, "GET", "/tasks?filter=state=succeeded", "", 200); len(l.Items) != 1 {
		t.Fatalf("%+v", l)
	}

	// Tried again, the task takes no other vDisk for its own.
	w.engine.Fail("Clone", errors.New("the backend is away"))
	at := "/tasks/" + ask[v1.Task](w, "POST", "/vdisks/default%2Fgolden/copies", `{"names":["default/vm4"]}`, 202).ID.String()
	if task := ask[v1.Task](w, "GET", at+"?wait=20", "", 200); task.State != "failed" {
		t.Fatalf("%+v", task)
	}
	w.engine.Fail("Clone", nil)
	ask[v1.VDisk](w, "POST", "/vdisks", `{"name":"default/vm4","size":"1MiB"}`, 201)
	ask[v1.Task](w, "POST", at+"/retry", "", 202)
	if task := ask[v1.Task](w, "GET", at+"?wait=20", "", 200); task.State != "failed" || !strings.Contains(task.Problem.Cause, "not made from") {
		t.Fatalf("%+v", task)
	}
}

// A task that waits is cancelled and started again.
func TestCancelAndRetryTask(t *testing.T) {
	w := newWorld(t)
	id, _, err := w.broker.Submit(t.Context(), state.TaskSpec{Type: "vdisk.from_template", Queue: state.QueueGeneric, Object: "vdisk default/x", By: "test"})
	w.must(err)
	at := "/tasks/" + id.String()
	ask[v1.Effect](w, "DELETE", at+"?dryRun=true", "", 200)
	if task := ask[v1.Task](w, "DELETE", at, "", 202); task.State != "cancelled" || task.CanCancel {
		t.Fatalf("%+v", task)
	}
	if task := ask[v1.Task](w, "POST", at+"/retry", "", 202); task.State != "queued" || !task.CanCancel {
		t.Fatalf("%+v", task)
	}
}

// Policies, schedules, settings, domains, brandings and sinks: set, shown with where they come from, taken away.
func TestSettings(t *testing.T) {
	w := newWorld(t)
	ask[v1.VDisk](w, "POST", "/vdisks", `{"name":"default/d","size":"1MiB"}`, 201)
	const vdisk = "/policies/vdisk:default%2Fd"
	p := ask[v1.PolicyView](w, "GET", vdisk, "", 200)
	if p.Rev != 0 || p.Effective.VerifyDays.Source != "default" {
		t.Fatalf("%+v", p)
	}
	ask[v1.PolicyView](w, "PUT", "/policies/cluster", `{"verify_days":10}`, 200)
	ask[v1.PolicyView](w, "PUT", "/policies/vpool:default", `{"iops_max":500,"retention":{"all_days":3}}`, 200)
	ask[v1.PolicyView](w, "PUT", vdisk, `{"iops_max":100}`, 200)
	p = ask[v1.PolicyView](w, "GET", vdisk, "", 200)
	if p.Effective.IOPSMax.Value != 100 || p.Effective.IOPSMax.Source != "vdisk" || p.Effective.Retention.Source != "vpool" ||
		p.Effective.VerifyDays.Value != 10 || p.Effective.VerifyDays.Source != "cluster" || *p.Set.IOPSMax != 100 {
		t.Fatalf("%+v", p)
	}
	ask[v1.Problem](w, "PUT", vdisk, `{"zone":"Nowhere"}`, 400)
	ask[v1.Problem](w, "PUT", vdisk, `{"colour":1}`, 400)
	ask[v1.Problem](w, "PUT", "/policies/moon", `{}`, 400)
	ask[v1.Problem](w, "GET", "/policies/vpool:nope", "", 404)
	ask[struct{}](w, "DELETE", vdisk, "", 204)
	ask[v1.Problem](w, "DELETE", vdisk, "", 404)
	if l := ask[v1.PolicyList](w, "GET", "/policies", "", 200); len(l.Items) != 2 {
		t.Fatalf("%+v", l)
	}

	if l := ask[v1.ScheduleList](w, "GET", "/schedules", "", 200); len(l.Items) < 8 || !l.Items[0].Inherited {
		t.Fatalf("%+v", l)
	}
	ask[struct{}](w, "PUT", "/schedules/snapshot?scope=vdisk:default%2Fd", `{"cron":"*/10 * * * *","zone":"Europe/Brussels"}`, 204)
	ask[struct{}](w, "PUT", "/schedules/scrub", `{"disabled":true}`, 204)
	ask[v1.Problem](w, "PUT", "/schedules/snapshot", `{"cron":"whenever"}`, 400)
	ask[v1.Effect](w, "PUT", "/schedules/snapshot?dryRun=true", `{"disabled":true}`, 200)
	l := ask[v1.ScheduleList](w, "GET", `/schedules?filter=name=snapshot%20or%20name=scrub`, "", 200)
	if len(l.Items) != 3 || !slices.ContainsFunc(l.Items, func(s v1.Schedule) bool {
		return s.Scope == "vdisk:default/d" && s.Cron == "*/10 * * * *" && s.Next != nil && !s.Inherited
	}) || !slices.ContainsFunc(l.Items, func(s v1.Schedule) bool { return s.Name == "scrub" && !s.Enabled && s.Next == nil }) {
		t.Fatalf("%+v", l)
	}
	if task := ask[v1.Task](w, "POST", "/schedules/snapshot/run?scope=vdisk:default%2Fd", "", 202); task.Type != "snapshot.automatic" || task.By != "token/admin" {
		t.Fatalf("%+v", task)
	}
	ask[struct{}](w, "DELETE", "/schedules/snapshot?scope=vdisk:default%2Fd", "", 204)

	ask[v1.ConfigKey](w, "PUT", "/config/console.motd", `{"value":"one"}`, 200)
	k := ask[v1.ConfigKey](w, "PUT", "/config/console.motd", `{"value":"two"}`, 200)
	if k.Value != "two" || k.By != "token/admin" || len(k.Former) != 1 || k.Former[0].Value != "one" {
		t.Fatalf("%+v", k)
	}
	rec := w.send("PUT", base+"/config/console.motd", `{"value":"three"}`, bearer(w.token), header("If-Match", `"1"`))
	if rec.Code != 412 {
		t.Fatal(rec.Code, rec.Body)
	}
	ask[struct{}](w, "DELETE", "/config/console.motd", "", 204)
	ask[v1.Problem](w, "GET", "/config/console.motd", "", 404)

	d := ask[v1.Domain](w, "POST", "/domains", `{"name":"rack1"}`, 201)
	ask[v1.Domain](w, "PATCH", "/domains/rack1", `{"name":"rack2"}`, 200)
	w.problem("DELETE", base+"/domains/"+d.ID.String(), "", 428, "confirmation_required")
	ask[struct{}](w, "DELETE", "/domains/rack2?confirm=rack2", "", 204)

	ask[v1.Branding](w, "POST", "/brandings", `{"name":"acme","product":"Acme Store","colour":"#ff0000","default":true}`, 201)
	ask[v1.Problem](w, "POST", "/brandings", `{"name":"bad","product":"x","colour":"red"}`, 400)
	if b := ask[v1.Branding](w, "PUT", "/brandings/acme", `{"name":"acme","product":"Acme"}`, 200); b.Product != "Acme" || b.Default {
		t.Fatalf("%+v", b)
	}
	ask[struct{}](w, "DELETE", "/brandings/acme?confirm=acme", "", 204)

	made := ask[v1.SinkSecret](w, "POST", "/sinks", `{"name":"hook","kind":"webhook","url":"https://hooks.example/x","topics":["volume"]}`, 201)
	if len(made.Secret) != 64 || made.Sink.URL == "" {
		t.Fatalf("%+v", made)
	}
	ask[v1.Problem](w, "POST", "/sinks", `{"name":"bad","kind":"webhook","url":"https://user:pass@hooks.example/"}`, 400)
	ask[v1.Problem](w, "POST", "/sinks", `{"name":"bad","kind":"webhook","url":"file:///etc/passwd"}`, 400)
	if k := ask[v1.Sink](w, "PUT", "/sinks/hook", `{"name":"hook","kind":"webhook","url":"https://hooks.example/y","disabled":true}`, 200); k.Enabled {
		t.Fatalf("%+v", k)
	}
	ask[struct{}](w, "DELETE", "/sinks/hook?confirm=hook", "", 204)
}

// stream reads server-sent events.
type stream struct {
	resp *http.Response
	in   *bufio.Scanner
}

func openStream(t *testing.T, url, token string, headers ...string) *stream {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), "GET", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+token)
	for i := 0; i+1 < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	resp, err := http.DefaultTransport.RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	return &stream{resp, bufio.NewScanner(resp.Body)}
}

// next returns the next event's id, type and data; ok is false at the end.
func (s *stream) next() (id, typ, data string, ok bool) {
	for s.in.Scan() {
		line := s.in.Text()
		switch {
		case line == "" && data != "":
			return id, typ, data, true
		case strings.HasPrefix(line, "id: "):
			id = line[4:]
		case strings.HasPrefix(line, "event: "):
			typ = line[7:]
		case strings.HasPrefix(line, "data: "):
			data = line[6:]
		}
	}
	return "", "", "", false
}

// Events come as they happen; whoever lost the connection goes on after the last one it saw; a stream ends with its caller's rights.
func TestEventStream(t *testing.T) {
	w := newWorld(t)
	w.user("viewer", state.RoleViewer)
	token := w.tokenOf("viewer", "v", auth.NewToken{})
	srv := httptest.NewServer(w.server.Handler())
	t.Cleanup(srv.Close)
	t.Cleanup(http.DefaultTransport.(*http.Transport).CloseIdleConnections)
	publish := func(typ, key string) {
		t.Helper()
		e, err := events.New(typ, "volume", key, map[string]string{"name": key})
		w.must(err)
		_, err = w.log.Apply(t.Context(), &state.PublishEvents{Events: []state.NewEvent{e}})
		w.must(err)
	}
	live := openStream(t, srv.URL+base+"/events/stream?topic=volume&type=test_a,test_b", token)
	if ct := live.resp.Header.Get("Content-Type"); live.resp.StatusCode != 200 || ct != "text/event-stream" {
		t.Fatal(live.resp.Status, ct)
	}
	publish("test_a", "one")
	publish("test_c", "not asked for")
	publish("test_b", "two")
	var seen []string
	last := ""
	for range 2 {
		id, typ, data, ok := live.next()
		if !ok {
			t.Fatal("the stream ended")
		}
		var e v1.Event
		w.must(json.Unmarshal([]byte(data), &e))
		seen, last = append(seen, typ+" "+e.Key), id
		if fmt.Sprint(e.Seq) != id || e.Topic != "volume" {
			t.Fatalf("%+v", e)
		}
	}
	if !slices.Equal(seen, []string{"test_a one", "test_b two"}) {
		t.Fatal(seen)
	}
	publish("test_a", "three")
	again := openStream(t, srv.URL+base+"/events/stream?type=test_a,test_b", token, "Last-Event-ID", last)
	if _, typ, data, ok := again.next(); !ok || typ != "test_a" || !strings.Contains(data, "three") {
		t.Fatal(typ, data)
	}
	future := openStream(t, srv.URL+base+"/events/stream?since=9999999999999", token)
	if _, typ, _, ok := future.next(); !ok || typ != "gap" {
		t.Fatal(typ)
	}
	if bad := openStream(t, srv.URL+base+"/events/stream", token, "Last-Event-ID", "x"); bad.resp.StatusCode != 400 {
		t.Fatal(bad.resp.Status)
	}
	if l := ask[v1.EventList](w, "GET", "/events?type=test_a&sort=seq", "", 200); len(l.Items) != 2 || l.Items[1].Key != "three" {
		t.Fatalf("%+v", l)
	}
	// The stream of a revoked token ends by itself, soon.
	w.must(w.auth.DeleteToken(t.Context(), root, "v", 0))
	publish("test_a", "wakes it")
	start := time.Now()
	for _, _, _, ok := live.next(); ok; _, _, _, ok = live.next() {
		if time.Since(start) > 15*time.Second {
			t.Fatal("a stream outlived its token")
		}
	}
}
