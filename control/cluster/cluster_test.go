package cluster

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"go.uber.org/goleak"

	"varve/control/pki"
	"varve/control/raft"
	"varve/control/state"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// appliance is one node over loopback.
type appliance struct {
	t    testing.TB
	dir  string
	addr string
	c    *Cluster
	raft *raft.Node
	stop context.CancelFunc
	done chan error
}

func logger(t testing.TB) *slog.Logger {
	if os.Getenv("VARVE_TEST_LOG") != "" {
		return slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	return slog.New(slog.DiscardHandler)
}

// start opens the node in dir and waits until it is ready.
func start(t testing.TB, dir string) *appliance {
	t.Helper()
	a := open(t, dir)
	a.ready()
	return a
}

func open(t testing.TB, dir string) *appliance {
	t.Helper()
	a := &appliance{t: t, dir: dir, done: make(chan error, 1)}
	control := filepath.Join(dir, "control")
	cluster, self, err := raft.Identify(control)
	must(t, err)
	p, err := pki.Open(pki.Config{Dir: filepath.Join(dir, "tls"), Name: cluster.String(), Hosts: func() []string { return []string{"127.0.0.1"} }, Cluster: cluster,
		Node: self, Sign: func(ctx context.Context, r pki.Request) ([]byte, error) { return a.c.Sign(ctx, r) }})
	must(t, err)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	a.addr = ln.Addr().String()
	log := logger(t).With("node", filepath.Base(dir))
	a.c, err = New(Config{Dir: control, Cluster: cluster, Self: self, PKI: p, Listener: ln, Advertise: func() string { return a.addr }, Log: log})
	must(t, err)
	a.raft, err = raft.Open(raft.Config{Dir: control, Network: a.c, Log: log, ElectionTimeout: 300 * time.Millisecond})
	must(t, err)
	a.c.Attach(a.raft)
	ctx, cancel := context.WithCancel(context.Background())
	a.stop = cancel
	go func() { a.done <- a.c.Run(ctx) }()
	t.Cleanup(a.close)
	return a
}

func (a *appliance) ready() {
	a.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for {
		err := a.raft.Ready(ctx)
		if err == nil {
			break
		}
		if ctx.Err() != nil || !errors.Is(err, raft.ErrUnavailable) {
			a.t.Fatal(err)
		}
	}
	_, err := a.raft.Apply(ctx, &state.RegisterNode{ID: a.raft.ID(), Spec: state.NodeSpec{Name: filepath.Base(a.dir),
		Role: state.RoleMaster, Peer: a.addr}})
	must(a.t, err)
}

func (a *appliance) close() {
	if a.stop == nil {
		return
	}
	a.stop()
	a.stop = nil
	<-a.done
	if err := a.raft.Close(); err != nil {
		a.t.Log(err)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (a *appliance) join(dir, role string) *appliance {
	a.t.Helper()
	tok, _, err := a.c.CreateToken(a.t.Context(), role, 0)
	must(a.t, err)
	_, err = Join(a.t.Context(), tok, JoinConfig{ControlDir: filepath.Join(dir, "control"), TLSDir: filepath.Join(dir, "tls"),
		Spec: state.NodeSpec{Name: filepath.Base(dir)}, Hosts: []string{"127.0.0.1"}})
	must(a.t, err)
	return start(a.t, dir)
}

func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if f() {
			return
		}
	}
	t.Fatalf("%s: not within 20 s", what)
}

func voters(a *appliance) (n int) {
	list, err := a.raft.Servers()
	if err != nil {
		return -1
	}
	for _, s := range list {
		if s.Voter {
			n++
		}
	}
	return n
}

func three(t *testing.T) []*appliance {
	base := t.TempDir()
	one := start(t, filepath.Join(base, "n1"))
	all := []*appliance{one, one.join(filepath.Join(base, "n2"), state.RoleMaster), one.join(filepath.Join(base, "n3"), state.RoleMaster)}
	eventually(t, "three voters", func() bool { return voters(one) == 3 })
	return all
}

func setDomain(a *appliance, name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	_, err := a.raft.Apply(ctx, &state.SetDomain{ID: uuid.New(), Name: name})
	return err
}

// Three nodes join, any of them takes commands and reads what was written elsewhere; the lead survives the loss of one.
func TestThreeNodes(t *testing.T) {
	all := three(t)
	for i, a := range all {
		must(t, setDomain(a, fmt.Sprintf("d%d", i)))
		for _, b := range all {
			must(t, b.raft.Sync(t.Context()))
			if _, err := b.raft.State().View().DomainByName(fmt.Sprintf("d%d", i)); err != nil {
				t.Fatalf("read on %s what was written on %s: %v", b.dir, a.dir, err)
			}
		}
	}
	if err := setDomain(all[2], "d0"); !errors.Is(err, state.ErrExist) {
		t.Fatalf("refusal from afar: %v", err)
	}
	eventually(t, "every master can sign", func() bool {
		return !slices.ContainsFunc(all, func(a *appliance) bool { return !a.c.cfg.PKI.HasCAKey() })
	})
	status, err := all[1].c.Status(t.Context())
	must(t, err)
	for _, m := range status {
		if !m.Voter || !m.Reachable {
			t.Fatalf("%+v", m)
		}
	}

	leader := slices.IndexFunc(all, func(a *appliance) bool { return a.raft.IsLeader() })
	all[leader].close()
	rest := slices.Delete(slices.Clone(all), leader, leader+1)
	must(t, setDomain(rest[0], "without"))
	must(t, rest[1].raft.Sync(t.Context()))
	if _, err := rest[1].raft.State().View().DomainByName("without"); err != nil {
		t.Fatal(err)
	}
	again := start(t, all[leader].dir) // at another port
	must(t, setDomain(again, "back"))
	eventually(t, "its new address is known", func() bool {
		s, err := rest[0].c.Status(t.Context())
		return err == nil && !slices.ContainsFunc(s, func(m Member) bool { return !m.Reachable })
	})
	hash := func(a *appliance) [32]byte {
		must(t, a.raft.Sync(t.Context()))
		h, err := a.raft.State().Hash()
		must(t, err)
		return h
	}
	if hash(again) != hash(rest[0]) || hash(again) != hash(rest[1]) {
		t.Fatal("states differ")
	}
}

func TestExtraPromoteDemoteRemove(t *testing.T) {
	base := t.TempDir()
	one := start(t, filepath.Join(base, "n1"))
	two := one.join(filepath.Join(base, "n2"), state.RoleExtra)
	three := one.join(filepath.Join(base, "n3"), state.RoleExtra)
	must(t, setDomain(two, "by-an-extra"))
	set := func(a *appliance, role string) {
		_, err := one.raft.Apply(t.Context(), &state.SetNode{ID: a.raft.ID(), Role: &role})
		must(t, err)
	}
	if voters(one) != 1 {
		t.Fatalf("%d voters", voters(one))
	}
	set(two, state.RoleMaster)
	time.Sleep(2 * careEvery)
	if voters(one) != 1 {
		t.Fatal("two voters survive no more than one does")
	}
	set(three, state.RoleMaster)
	eventually(t, "three voters", func() bool { return voters(one) == 3 })
	set(three, state.RoleExtra)
	eventually(t, "two voters", func() bool { return voters(one) == 2 })
	eventually(t, "an extra does not keep the authority's key", func() bool { return !three.c.cfg.PKI.HasCAKey() })

	_, err := one.raft.Apply(t.Context(), &state.RemoveNode{ID: three.raft.ID()})
	must(t, err)
	select {
	case err := <-three.done:
		if !errors.Is(err, ErrRemoved) {
			t.Fatalf("a removed node ends with %v", err)
		}
		three.done <- err
	case <-time.After(10 * time.Second):
		t.Fatal("a removed node goes on")
	}
	eventually(t, "raft without it", func() bool { s, err := one.raft.Servers(); return err == nil && len(s) == 2 })
	if _, err := one.c.Dial(t.Context(), three.raft.ID(), protoRPC); err == nil {
		t.Fatal("a removed node is talked to")
	}
	three.close()
	if _, _, err := raft.Identify(filepath.Join(three.dir, "control")); !errors.Is(err, raft.ErrIdentity) {
		t.Fatalf("a removed node starts again: %v", err)
	}
	must(t, setDomain(two, "after"))
}

func TestTokens(t *testing.T) {
	base := t.TempDir()
	one := start(t, filepath.Join(base, "n1"))
	other := start(t, filepath.Join(base, "o1"))
	conf := func(name string) JoinConfig {
		return JoinConfig{ControlDir: filepath.Join(base, name, "control"), TLSDir: filepath.Join(base, name, "tls"),
			Spec: state.NodeSpec{Name: name}}
	}
	tok, _, err := one.c.CreateToken(t.Context(), state.RoleMaster, time.Minute)
	must(t, err)
	_, err = Join(t.Context(), tok, conf("n2"))
	must(t, err)
	if _, err := Join(t.Context(), tok, conf("n3")); !errors.Is(err, state.ErrConflict) {
		t.Fatalf("a token used twice: %v", err)
	}
	if _, err := Join(t.Context(), tok[:len(tok)-5], conf("n3")); !errors.Is(err, state.ErrInvalid) {
		t.Fatalf("a token cut short: %v", err)
	}
	if _, _, err := one.c.CreateToken(t.Context(), "boss", 0); !errors.Is(err, state.ErrInvalid) {
		t.Fatalf("an unknown role: %v", err)
	}
	if _, _, err := one.c.CreateToken(t.Context(), state.RoleMaster, TokenTTLMax+1); !errors.Is(err, state.ErrInvalid) {
		t.Fatalf("a long life: %v", err)
	}
	// A token whose addresses lead to another cluster: the secret is not sent.
	tok, _, err = one.c.CreateToken(t.Context(), state.RoleMaster, 0)
	must(t, err)
	parsed, err := parseToken(tok)
	must(t, err)
	parsed.Addresses = []string{other.addr}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := Join(ctx, parsed.String(), conf("n4")); err == nil || !strings.Contains(err.Error(), "another cluster") {
		t.Fatalf("joined elsewhere: %v", err)
	}
	// A guessed secret.
	parsed, err = parseToken(tok)
	must(t, err)
	parsed.Secret = make([]byte, 32)
	if _, err := Join(t.Context(), parsed.String(), conf("n4")); !errors.Is(err, state.ErrNotFound) {
		t.Fatalf("a guessed secret: %v", err)
	}
	if strings.Contains(fmt.Sprintf("%+v %#v", one.raft.State().View().JoinTokens(), one.raft.State().View().JoinTokens()), string(parsed.Secret)) {
		t.Fatal("the secret is kept")
	}
	if _, err := Join(t.Context(), tok, JoinConfig{ControlDir: filepath.Join(one.dir, "control"), TLSDir: filepath.Join(base, "x"),
		Spec: state.NodeSpec{Name: "n5"}}); !errors.Is(err, raft.ErrIdentity) {
		t.Fatalf("joined over a node's state: %v", err)
	}
}

// Whoever has no certificate of this cluster gets nowhere.
func TestStrangers(t *testing.T) {
	base := t.TempDir()
	one := start(t, filepath.Join(base, "n1"))
	other := start(t, filepath.Join(base, "o1"))
	dial := func(conf *tls.Config) error {
		conn, err := tls.Dial("tcp", one.addr, conf)
		if err != nil {
			return err
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := conn.Write([]byte("POST /rpc/ping HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")); err != nil {
			return err
		}
		_, err = conn.Read(make([]byte, 1))
		return err
	}
	if err := dial(&tls.Config{InsecureSkipVerify: true, NextProtos: []string{protoRPC}}); err == nil {
		t.Fatal("without a certificate")
	}
	foreign := other.c.cfg.PKI.NodeTLS()
	foreign.InsecureSkipVerify, foreign.NextProtos = true, []string{protoRPC}
	if err := dial(foreign); err == nil {
		t.Fatal("with another cluster's certificate")
	}
	ours := one.c.cfg.PKI.NodeTLS()
	ours.ServerName, ours.NextProtos = one.raft.ID().String(), []string{protoRPC}
	if err := dial(ours); err != nil {
		t.Fatalf("with ours: %v", err)
	}
	for _, protos := range [][]string{nil, {"h2"}, {protoJoin, protoRPC}} {
		c := &tls.Config{InsecureSkipVerify: true, NextProtos: protos}
		if err := dial(c); err == nil {
			t.Fatalf("protocols %v without a certificate", protos)
		}
	}
	old := one.c.cfg.PKI.NodeTLS()
	old.ServerName, old.NextProtos, old.MaxVersion, old.MinVersion = one.raft.ID().String(), []string{protoRPC}, tls.VersionTLS12, tls.VersionTLS12
	if err := dial(old); err == nil {
		t.Fatal("TLS 1.2")
	}
}

func TestPlan(t *testing.T) {
	ids := make([]uuid.UUID, 8)
	for i := range ids {
		ids[i][15] = byte(i + 1)
	}
	type n struct {
		role          string
		offline, vote bool
		server        bool
		away, removed bool
	}
	const m, e = state.RoleMaster, state.RoleExtra
	for _, c := range []struct {
		name  string
		nodes []n
		want  change
	}{
		{"one is enough", []n{{role: m, vote: true, server: true}}, change{}},
		{"a new node follows", []n{{role: m, vote: true, server: true}, {role: m}}, change{add, ids[1]}},
		{"two do not vote", []n{{role: m, vote: true, server: true}, {role: m, server: true}}, change{}},
		{"three do", []n{{role: m, vote: true, server: true}, {role: m, server: true}, {role: m, server: true}}, change{promote, ids[1]}},
		{"and the third", []n{{role: m, vote: true, server: true}, {role: m, vote: true, server: true}, {role: m, server: true}}, change{promote, ids[2]}},
		{"not one that lags", []n{{role: m, vote: true, server: true}, {role: m, server: true, away: true}, {role: m, server: true}}, change{}},
		{"extras never", []n{{role: m, vote: true, server: true}, {role: e, server: true}, {role: e, server: true}}, change{}},
		{"an extra loses its vote", []n{{role: m, vote: true, server: true}, {role: e, vote: true, server: true}}, change{demote, ids[1]}},
		{"a removed one goes", []n{{role: m, vote: true, server: true}, {role: m, server: true, removed: true}}, change{remove, ids[1]}},
		{"a spare takes an absent one's place", []n{{role: m, vote: true, server: true}, {role: m, vote: true, server: true},
			{role: m, vote: true, server: true, offline: true}, {role: m, server: true}}, change{promote, ids[3]}},
		{"then the absent one loses its vote", []n{{role: m, vote: true, server: true}, {role: m, vote: true, server: true},
			{role: m, vote: true, server: true, offline: true}, {role: m, server: true, vote: true}}, change{demote, ids[2]}},
		{"without a spare it keeps it", []n{{role: m, vote: true, server: true}, {role: m, vote: true, server: true},
			{role: m, vote: true, server: true, offline: true}}, change{}},
		{"five are enough", []n{{role: m, vote: true, server: true}, {role: m, vote: true, server: true}, {role: m, vote: true, server: true},
			{role: m, vote: true, server: true}, {role: m, vote: true, server: true}, {role: m, server: true}, {role: m, server: true}}, change{}},
	} {
		var nodes []state.Node
		var servers []raft.Server
		for i, x := range c.nodes {
			if !x.removed {
				nodes = append(nodes, state.Node{ID: ids[i], NodeSpec: state.NodeSpec{Role: x.role}, Offline: x.offline, Joined: state.Time(i)})
			}
			if x.server {
				servers = append(servers, raft.Server{ID: ids[i], Voter: x.vote})
			}
		}
		got, ok := plan(nodes, servers, func(id uuid.UUID) bool { return c.nodes[id[15]-1].removed },
			func(id uuid.UUID) bool { return !c.nodes[id[15]-1].away })
		if got != c.want || ok != (c.want != change{}) {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
}
