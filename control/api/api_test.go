package api

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"varve/control/api/client"
	v1 "varve/control/api/customer"
	"varve/control/auth"
	"varve/control/enginetest"
	"varve/control/events"
	"varve/control/jobs"
	"varve/control/node"
	"varve/control/pki"
	"varve/control/raft"
	"varve/control/schedule"
	"varve/control/state"
	"varve/control/vdisk"
	"varve/control/vpool"

	"github.com/google/uuid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type world struct {
	*testing.T
	dir    string
	log    *enginetest.Log
	engine *enginetest.Engine
	server *Server
	auth   *auth.Authenticator
	clock  *clock
	broker *jobs.Broker
	types  jobs.Types

	publisher *events.Publisher
	token     string
	logged    *lockedBuffer
	ready     error
	behind    error // what keeps reads from being fresh
	machinesWorld
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newWorld(t *testing.T) *world {
	w := &world{T: t, dir: t.TempDir(), log: enginetest.NewLog(), engine: &enginetest.Engine{}, logged: &lockedBuffer{}, clock: &clock{at: time.Now()}}
	w.log.Now = w.clock.now
	self := uuid.New()
	nodes := node.New(w.log, w.log.Store, self)
	pools := vpool.New(vpool.Config{Raft: w.log, Store: w.log.Store, Engine: w.engine})
	disks := vdisk.New(vdisk.Config{Raft: w.log, Store: w.log.Store, Engine: w.engine})
	if err := nodes.Register(t.Context(), state.NodeSpec{Name: "n1", Role: state.RoleMaster, Version: "test"}); err != nil {
		t.Fatal(err)
	}
	if _, err := pools.Create(t.Context(), vpool.Spec{Name: "default", Backend: "local:///a"}); err != nil {
		t.Fatal(err)
	}
	created, err := EnsureAdminToken(t.Context(), w.log, w.log.Store, w.dir)
	if err != nil || !created {
		t.Fatal(created, err)
	}
	if w.token, err = client.ReadToken(filepath.Join(w.dir, tokenFile)); err != nil {
		t.Fatal(err)
	}
	w.auth = auth.New(auth.Config{Raft: w.log, Store: w.log.Store, Vault: newVault(), Now: w.clock.now, Log: slog.New(slog.NewTextHandler(w.logged, nil))})
	w.machines(self, disks)
	types, err := jobs.NewTypes(slices.Concat(disks.TaskTypes(), disks.LongTypes(), w.vms.TaskTypes())...)
	if err != nil {
		t.Fatal(err)
	}
	w.broker = jobs.NewBroker(jobs.BrokerConfig{Raft: w.log, Store: w.log.Store, Types: types})
	schedules := schedule.New(schedule.Config{Raft: w.log, Store: w.log.Store, Entries: schedule.Defaults(),
		Task: func(typ, object, by string, args json.RawMessage) (state.TaskSpec, error) {
			return state.TaskSpec{Type: typ, Queue: state.QueueGeneric, Object: object, By: by, Args: args}, nil
		}})
	w.types, w.publisher = types, events.NewPublisher(w.log, self, nil)
	w.server, err = New(Config{Raft: w.log, Tasks: w.broker, Types: types, Schedules: schedules,
		Sinks: events.NewSinks(w.log, w.log.Store, newVault(), w.publisher, nil), Auth: w.auth, VPools: pools, VDisks: disks, Nodes: nodes, Store: w.log.Store, Version: "test",
		Appliance: fakeAppliance{}, Sync: func(context.Context) error { return w.behind },
		VMachines: w.vms, PMachines: w.hypervisors, Mounts: fakeMounts{},
		Log:     slog.New(slog.NewTextHandler(w.logged, nil)),
		Ready:   func() error { return w.ready },
		Metrics: http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) { io.WriteString(rw, "varve_up 1\n") }),
		Status:  func(_ context.Context, s *v1.Status) { s.Services = append(s.Services, v1.Service{Name: "nbd"}) },
		Rebuild: func(_ context.Context, r v1.RebuildRequest) (v1.RebuildReport, error) {
			return v1.RebuildReport{VPool: r.Name}, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// do sends a request with the admin token and returns status, body and headers.
func (w *world) do(method, path, body string) (int, string, http.Header) {
	w.Helper()
	r := httptest.NewRequest(method, path, strings.NewReader(body))
	r.Header.Set("Authorization", "Bearer "+w.token)
	r.Header.Set("If-Match", "*")
	rec := httptest.NewRecorder()
	w.server.Handler().ServeHTTP(rec, r)
	return rec.Code, rec.Body.String(), rec.Header()
}

func (w *world) problem(method, path, body string, status int, code string) v1.Problem {
	w.Helper()
	got, text, header := w.do(method, path, body)
	var p v1.Problem
	if err := json.Unmarshal([]byte(text), &p); err != nil {
		w.Fatalf("%s %s: %d %q: %v", method, path, got, text, err)
	}
	if got != status || p.Status != status || p.Code != code || header.Get("Content-Type") != "application/problem+json" ||
		p.Type != "urn:varve:problem:"+code || p.RequestID == "" ||
		p.RequestID != header.Get("X-Request-Id") || p.Title == "" || p.Detail == "" {
		w.Fatalf("%s %s: %d %s, want %d %s", method, path, got, text, status, code)
	}
	return p
}

const base = v1.Prefix

func TestEndpoints(t *testing.T) {
	w := newWorld(t)
	ok := func(method, path, body string, status int, into any) {
		t.Helper()
		got, text, _ := w.do(method, path, body)
		if got != status {
			t.Fatalf("%s %s: %d %s", method, path, got, text)
		}
		if into != nil {
			d := json.NewDecoder(strings.NewReader(text))
			d.DisallowUnknownFields()
			if err := d.Decode(into); err != nil {
				t.Fatalf("%s %s: %v in %s", method, path, err, text)
			}
		}
	}
	var p v1.VPool
	ok("POST", base+"/vpools", `{"name":"fast","backend":"local:///srv/fast","clients":["10.1.0.0/16"]}`, 201, &p)
	if p.Name != "fast" || p.Backend != "local:///srv/fast" || len(p.Clients) != 1 || p.Findings["create-only"] == "" || p.Free == 0 {
		t.Fatalf("%+v", p)
	}
	ok("PATCH", base+"/vpools/fast", `{"clients":[]}`, 200, &p)
	if len(p.Clients) != 0 {
		t.Fatalf("%+v", p)
	}
	var pools v1.VPoolList
	if ok("GET", base+"/vpools", "", 200, &pools); len(pools.Items) != 2 || pools.Items[0].Name != "default" || len(pools.Items[0].Clients) != 5 {
		t.Fatalf("%+v", pools)
	}
	ok("DELETE", base+"/vpools/fast?confirm=fast", "", 204, nil)

	var d v1.VDisk
	ok("POST", base+"/vdisks", `{"name":"default/vm/a b","size":"10GiB"}`, 201, &d)
	if d.Name != "default/vm/a b" || d.Size != 10<<30 || d.File != "/vm/a b.raw" || d.State != "new" {
		t.Fatalf("%+v", d)
	}
	at := base + "/vdisks/default%2Fvm%2Fa%20b"
	ok("GET", at, "", 200, &d)
	ok("PATCH", at, `{"size":21474836480}`, 200, &d)
	if d.Size != 20<<30 || !d.Open {
		t.Fatalf("%+v", d)
	}
	w.problem("PATCH", at, `{"size":"1GiB","shrink":true}`, 428, "confirmation_required")
	ok("PATCH", at+"?confirm=default/vm/a%20b", `{"size":"1GiB","shrink":true}`, 200, &d)
	ok("GET", base+"/vdisks/"+d.ID.String(), "", 200, &d)
	ok("PATCH", at, `{"name":"default/b"}`, 200, &d)
	if d.Name != "default/b" || d.Size != 1<<30 {
		t.Fatalf("%+v", d)
	}
	var disks v1.VDiskList
	if ok("GET", base+"/vdisks?vpool=default&count=true", "", 200, &disks); len(disks.Items) != 1 || *disks.Count != 1 {
		t.Fatalf("%+v", disks)
	}
	var e v1.Explanation
	if ok("GET", base+"/vdisks/default%2Fb/explain?lba=3", "", 200, &e); e.Offset != 12288 || e.LBA != 3 || e.State != "object" || e.CRC != "00000abc" {
		t.Fatalf("%+v", e)
	}
	ok("GET", base+"/vdisks/default%2Fb/explain?offset=4097", "", 200, &e)
	var s v1.Status
	if ok("GET", base+"/status", "", 200, &s); s.State != "ok" || s.VDisks != 1 || s.Node != "n1" || len(s.Services) != 1 || !s.Ready {
		t.Fatalf("%+v", s)
	}
	w.ready = errors.New("nfs is not open yet")
	if ok("GET", base+"/status", "", 200, &s); s.State != "degraded" || s.Ready {
		t.Fatalf("%+v", s)
	}
	w.problem("GET", "/readyz", "", 503, "unavailable")
	w.ready = nil
	ok("GET", "/readyz", "", 200, nil)
	var nodes v1.NodeList
	if ok("GET", base+"/nodes", "", 200, &nodes); len(nodes.Items) != 1 || !nodes.Items[0].Self {
		t.Fatalf("%+v", nodes)
	}
	var r v1.RebuildReport
	ok("POST", base+"/rebuild", `{"name":"x"}`, 200, &r)
	w.problem("DELETE", base+"/vdisks/default%2Fb", "", 428, "confirmation_required")
	ok("DELETE", base+"/vdisks/default%2Fb?force=false&purge=true&confirm=default/b", "", 204, nil)
	ok("GET", "/metrics", "", 200, nil)
}

func TestProblems(t *testing.T) {
	w := newWorld(t)
	d, err := w.server.cfg.VDisks.Create(t.Context(), "default/d", 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	if p := w.problem("GET", base+"/vdisks/default%2Fnope", "", 404, "not_found"); p.Object != "vdisk default/nope" {
		t.Fatalf("%+v", p)
	}
	w.problem("GET", base+"/vdisks/nope%2Fx", "", 404, "not_found")
	w.problem("GET", base+"/vdisks/default%2f..%2f..%2fetc", "", 400, "invalid")
	w.problem("GET", base+"/vpools/nope", "", 404, "not_found")
	w.problem("GET", base+"/nodes/nope", "", 404, "not_found")
	w.problem("GET", base+"/nope", "", 404, "not_found")
	w.problem("GET", "/", "", 404, "not_found")
	w.problem("PUT", base+"/vpools", "{}", 405, "method")
	w.problem("POST", base+"/vdisks", `{"name":"default/d","size":512}`, 409, "exists")
	w.problem("POST", base+"/vdisks", `{"name":"default/e","size":"10 parsecs"}`, 400, "invalid")
	w.problem("POST", base+"/vdisks", `{"name":"default/e","size":1e30}`, 400, "invalid")
	w.problem("POST", base+"/vpools", `{"name":"B","backend":"local:///b"}`, 400, "invalid")
	if p := w.problem("DELETE", base+"/vpools/default?confirm=default", "", 409, "not_empty"); len(p.By) != 1 || p.By[0] != "d" || p.Remedy == "" {
		t.Fatalf("%+v", p)
	}
	for _, c := range []struct {
		match  string
		status int
		code   string
	}{{`"999"`, 412, "stale"}, {"", 428, "precondition_required"}, {"x", 400, "invalid"}, {`"0"`, 400, "invalid"}} {
		r := httptest.NewRequest("PATCH", base+"/vpools/default", strings.NewReader(`{"clients":[]}`))
		r.Header.Set("Authorization", "Bearer "+w.token)
		if c.match != "" {
			r.Header.Set("If-Match", c.match)
		}
		rec := httptest.NewRecorder()
		w.server.Handler().ServeHTTP(rec, r)
		if rec.Code != c.status || !strings.Contains(rec.Body.String(), `"code":"`+c.code+`"`) || c.code == "stale" && !strings.Contains(rec.Body.String(), `"rev":`) {
			t.Errorf("If-Match %q: %d %s", c.match, rec.Code, rec.Body)
		}
	}
	w.problem("PATCH", base+"/vpools/default", `{}`, 400, "invalid")
	w.problem("PATCH", base+"/vdisks/default%2Fd", `{}`, 400, "invalid")
	w.problem("PATCH", base+"/vdisks/default%2Fd", `{"size":512,"name":"default/e"}`, 400, "invalid")
	w.problem("PATCH", base+"/vdisks/default%2Fd", `{"size":512}`, 409, "conflict")
	w.engine.SetClients(d.Volume.ID, 1)
	w.problem("DELETE", base+"/vdisks/default%2Fd?confirm=default/d", "", 409, "conflict")
	w.problem("DELETE", base+"/vdisks/default%2Fd?force=perhaps", "", 400, "invalid")
	for _, q := range []string{"", "?lba=1&offset=1", "?lba=-1", "?lba=x", "?lba=99999999999999999999",
		"?lba=1125899906842625", "?offset=1073741824"} {
		w.problem("GET", base+"/vdisks/default%2Fd/explain"+q, "", 400, "invalid")
	}
	w.log.Fail(fmt.Errorf("%w: planted", raft.ErrUnavailable))
	if p := w.problem("POST", base+"/vdisks", `{"name":"default/e","size":512}`, 503, "unavailable"); p.Remedy == "" {
		t.Fatalf("%+v", p)
	}
	w.log.Fail(&state.Error{Err: state.ErrNoSpace, Object: "vpool default"})
	w.problem("POST", base+"/vdisks", `{"name":"default/e","size":512}`, 507, "no_space")
	w.log.Fail(nil)
	w.engine.Fail("Resize", errors.New("disk on fire"))
	w.problem("PATCH", base+"/vdisks/default%2Fd", `{"size":2147483648}`, 500, "internal")
	if !strings.Contains(w.logged.String(), "disk on fire") {
		t.Fatal("an internal error is not in the log")
	}
}

func TestStrictJSON(t *testing.T) {
	w := newWorld(t)
	good := `{"name":"default/x","size":512}`
	for what, body := range map[string]string{
		"unknown field": `{"name":"default/x","size":512,"colour":"red"}`, "two values": good + good, "empty": "", "array": "[]",
		"cut": good[:10], "wrong type": `{"name":7}`, "deep": `{"name":` + strings.Repeat("[", 40) + strings.Repeat("]", 40) + `}`,
		"endless": strings.Repeat("[", 100000), "trailing": good + "x",
	} {
		t.Run(what, func(t *testing.T) { w.problem("POST", base+"/vdisks", body, 400, "invalid") })
	}
	pad := strings.Repeat(" ", bodyBytesMax-len(good))
	if got, text, _ := w.do("POST", base+"/vdisks", good+pad); got != 201 {
		t.Fatalf("a body at the limit: %d %s", got, text)
	}
	w.problem("POST", base+"/vdisks", good+pad+" ", 413, "too_large")
	r := httptest.NewRequest("POST", base+"/vdisks", strings.NewReader(good))
	r.Header.Set("Authorization", "Bearer "+w.token)
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	rec := httptest.NewRecorder()
	if w.server.Handler().ServeHTTP(rec, r); rec.Code != 415 {
		t.Fatalf("a form: %d", rec.Code)
	}
}

func TestAdminToken(t *testing.T) {
	w := newWorld(t)
	info, err := os.Stat(filepath.Join(w.dir, tokenFile))
	if err != nil || info.Mode().Perm() != 0o600 || len(w.token) < 40 || !strings.HasPrefix(w.token, auth.TokenPrefix) {
		t.Fatal(info, err)
	}
	if created, err := EnsureAdminToken(t.Context(), w.log, w.log.Store, w.dir); created || err != nil {
		t.Fatal(created, err)
	}
	w.do("POST", base+"/vdisks", `{"name":"default/x","size":512}`)
	if s := w.logged.String(); strings.Contains(s, w.token) || !strings.Contains(s, "api request") {
		t.Fatal("the log holds the token or no request: ", s)
	}
	if _, err := client.ReadToken(filepath.Join(w.dir, "nope")); err == nil {
		t.Fatal("read a token from nowhere")
	}
}

// serve runs a listener until the test ends.
func (w *world) serve(ln net.Listener, conf *tls.Config) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.server.Serve(ctx, ln, conf) }()
	w.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			w.Error(err)
		}
	})
}

func TestClientOverUnixSocket(t *testing.T) {
	w := newWorld(t)
	deep := filepath.Join(w.dir, strings.Repeat("long-directory-name/", 10))
	if err := os.MkdirAll(deep, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(deep, "varve.sock")
	if err := os.WriteFile(path, nil, 0o600); err != nil { // left by a killed process
		t.Fatal(err)
	}
	ln, err := ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 || info.Mode()&os.ModeSocket == 0 {
		t.Fatal(info, err)
	}
	w.serve(ln, nil)
	c, err := client.New(client.Config{Socket: path})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	useClient(t, c)
	ctx := t.Context()
	_, err = c.VDisk(ctx, "default/nope")
	if p, ok := errors.AsType[*v1.Problem](err); !ok || p.Status != 404 || p.RequestID == "" {
		t.Fatal(err)
	}
	nobody, err := client.New(client.Config{Socket: path + "x"})
	if err != nil {
		t.Fatal(err)
	}
	defer nobody.Close()
	if _, err := nobody.Status(ctx); !errors.Is(err, client.ErrUnreachable) {
		t.Fatal(err)
	}
}

func useClient(t *testing.T, c *client.Client) {
	t.Helper()
	ctx := t.Context()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(c.Ready(ctx))
	_, err := c.CreateVPool(ctx, v1.VPoolCreate{Name: "fast", Backend: "local:///fast"})
	check(err)
	_, err = c.PatchVPool(ctx, "fast", v1.VPoolPatch{Clients: []string{"10.0.0.0/8"}}, client.Change{})
	check(err)
	pools, err := c.VPools(ctx)
	check(err)
	_, err = c.VPool(ctx, "fast")
	check(err)
	check(c.DeleteVPool(ctx, "fast"))
	_, err = c.CreateVDisk(ctx, "default/vm/odd name?#%25é", 1<<20)
	check(err)
	d, err := c.ResizeVDisk(ctx, "default/vm/odd name?#%25é", 2<<20, false)
	check(err)
	_, err = c.RenameVDisk(ctx, d.Name, "default/plain")
	check(err)
	got, err := c.VDisk(ctx, "default/plain")
	check(err)
	disks, err := c.VDisks(ctx, "default", client.Select{})
	check(err)
	e, err := c.Explain(ctx, "default/plain", 8192)
	check(err)
	check(c.DeleteVDisk(ctx, "default/plain", true))
	nodes, err := c.Nodes(ctx)
	check(err)
	_, err = c.Node(ctx, "n1")
	check(err)
	s, err := c.Status(ctx)
	check(err)
	r, err := c.Rebuild(ctx, v1.RebuildRequest{Name: "x"})
	check(err)
	if len(pools) != 2 || got.Size != 2<<20 || len(disks) != 1 || e.LBA != 2 || len(nodes) != 1 || s.Node != "n1" || r.VPool != "x" {
		t.Fatal(pools, got, disks, e, nodes, s, r)
	}
}

func TestClientOverHTTPS(t *testing.T) {
	w := newWorld(t)
	keys, err := pki.Open(pki.Config{Dir: filepath.Join(w.dir, "tls"), Name: "test", Hosts: pki.LocalHosts})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w.serve(ln, keys.TLS())
	at := "https://" + ln.Addr().String()
	c, err := client.New(client.Config{URL: at, Token: w.token, CAFile: keys.CAFile()})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	useClient(t, c)

	// Without the CA nothing is sent; without the token nothing is done.
	foreign, err := client.New(client.Config{URL: at, Token: w.token})
	if err != nil {
		t.Fatal(err)
	}
	defer foreign.Close()
	if _, err := foreign.Status(t.Context()); !errors.Is(err, client.ErrUnreachable) {
		t.Fatal(err)
	}
	nobody, err := client.New(client.Config{URL: at, CAFile: keys.CAFile()})
	if err != nil {
		t.Fatal(err)
	}
	defer nobody.Close()
	_, err = nobody.Status(t.Context())
	if p, ok := errors.AsType[*v1.Problem](err); !ok || p.Status != 401 {
		t.Fatal(err)
	}
	if err := w.server.Serve(t.Context(), ln, nil); err == nil {
		t.Fatal("served TCP without TLS")
	}
	for _, bad := range []client.Config{{}, {Socket: "a", URL: "https://b"}, {URL: "http://b"}, {URL: "https://b/c"},
		{URL: "https://b", CAFile: "/nope"},
		{URL: "https://b", CAFile: filepath.Join(w.dir, tokenFile)}} {
		if _, err := client.New(bad); err == nil {
			t.Errorf("%+v was taken", bad)
		}
	}
}

// Connections beyond the caps are closed at once; the others are served, and a place that is left can be taken again.
func TestConnectionCaps(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln := newCappedListener(inner, 10, 3)
	defer ln.Close()
	accepted := make(chan net.Conn, 16)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	dial := func() net.Conn {
		c, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	var served []net.Conn
	for range 3 {
		dial()
		served = append(served, <-accepted)
	}
	over := dial()
	over.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := over.Read(make([]byte, 1)); !errors.Is(err, io.EOF) && !strings.Contains(fmt.Sprint(err), "reset") {
		t.Fatalf("the fourth connection of an address: %v", err)
	}
	served[0].Close()
	served[0].Close() // twice counts once
	dial()
	served = append(served, <-accepted)
	if ln.open != 3 || ln.by["127.0.0.1"] != 3 {
		t.Fatalf("%d open, %v", ln.open, ln.by)
	}
	for _, c := range served {
		c.Close()
	}
	if ln.open != 0 || len(ln.by) != 0 {
		t.Fatalf("%d open, %v", ln.open, ln.by)
	}
	ln.Close()
	<-done
}

// A header beyond the limit and a client that sends nothing are turned away.
func TestHeaderLimit(t *testing.T) {
	w := newWorld(t)
	ln, err := ListenUnix(filepath.Join(w.dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	w.serve(ln, nil)
	c, err := net.Dial("unix", filepath.Join(w.dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprintf(c, "GET /healthz HTTP/1.1\r\nHost: x\r\nX: %s\r\n\r\n", strings.Repeat("x", headerBytesMax+8192))
	c.SetReadDeadline(time.Now().Add(5 * time.Second))
	b, _ := io.ReadAll(c)
	if !bytes.Contains(b, []byte(" 431 ")) {
		t.Fatalf("answered %.100q", b)
	}
}

// No body may panic a handler or change more than it says.
func FuzzRequest(f *testing.F) {
	f.Add("POST", "/vdisks", `{"name":"default/x","size":"1GiB"}`)
	f.Add("PATCH", "/vdisks/default%2Fx", `{"size":512}`)
	f.Add("POST", "/groups", `{"name":"x","roles":["viewer"]}`)
	f.Add("GET", "/vdisks?filter=size>1GiB%20and%20not%20(name~%22x%22)&sort=-size,name&limit=3", "")
	f.Add("POST", "/vpools", `{"name":"x","backend":"local:///x","clients":["10.0.0.0/8"]}`)
	f.Add("GET", "/vdisks/default%2Fx/explain?lba=1", "")
	f.Fuzz(func(t *testing.T, method, path, body string) {
		w := newWorld(t)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second) // a stream does not end by itself
		defer cancel()
		r, err := http.NewRequestWithContext(ctx, method, "http://varve"+base+path, strings.NewReader(body))
		if err != nil {
			return
		}
		r.Header.Set("Authorization", "Bearer "+w.token)
		rec := httptest.NewRecorder()
		w.server.Handler().ServeHTTP(rec, r)
		if rec.Code == 500 {
			t.Fatalf("%s %q %q: %s", method, path, body, rec.Body)
		}
		if err := w.log.Store.View().Check(); err != nil {
			t.Fatal(err)
		}
	})
}
