package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"varve/appliance/doctor"
	"varve/appliance/history"
	"varve/control/api"
	v1 "varve/control/api/customer"
	"varve/control/peer"
	"varve/control/replica"
	"varve/control/state"
	"varve/control/vpool"
	"varve/control/wire"
)

// estate tells the API of nodes, disks, backends and figures: what this node knows, and what it asks the others for.
type estate struct{ *appliance }

var _ api.Appliance = estate{}

const (
	callHealth   = "health"
	callDisks    = "disks"
	callBackends = "backends"
	callTest     = "backend/test"
	callHistory  = "history"
	smallCall    = 64 << 10
)

// answer answers the other nodes' questions.
func (e estate) answer() {
	e.peers.Handle(callHealth, 16, func(ctx context.Context, _ []byte) (any, error) { return e.checks(ctx), nil })
	e.peers.Handle(callDisks, 16, func(context.Context, []byte) (any, error) { return e.ownDisks() })
	e.peers.Handle(callBackends, 16, func(context.Context, []byte) (any, error) { return e.ownBackends(), nil })
	peer.Handle1(e.peers, callTest, smallCall, func(ctx context.Context, pool uuid.UUID) (any, error) { return e.testHere(ctx, pool) })
	peer.Handle1(e.peers, callHistory, smallCall, func(_ context.Context, q api.HistoryQuery) (any, error) { return e.ownHistory(q) })
}

// nodeName is a node's name, or its id where it has none.
func (e estate) nodeName(id uuid.UUID) string {
	if n, err := e.raft.State().View().Node(id); err == nil {
		return n.Name
	}
	return id.String()
}

// all are this node and the others that are expected to answer.
func (e estate) all() []uuid.UUID { return append([]uuid.UUID{e.raft.ID()}, e.others()...) }

// askControl is a call of the control unit.
func (b *base) askControl(ctx context.Context, name string, body []byte, answer any) error {
	client := replica.NewHTTP(ControlSocket(b.cfg.Data))
	defer client.CloseIdleConnections()
	return wire.Call(ctx, client, name, body, answer)
}

// Cluster implements api.Appliance.
func (e estate) Cluster(ctx context.Context) (v1.Cluster, error) {
	var st ClusterStatus
	var err error
	if e.node != nil {
		st, err = e.clusterStatus(ctx)
	} else {
		err = e.askControl(ctx, "status", nil, &st)
	}
	if err != nil {
		return v1.Cluster{}, err
	}
	out := v1.Cluster{ID: st.Cluster, Self: e.nodeName(st.Self), Voters: st.Voters, Nodes: []v1.ClusterNode{}, Problems: append([]string{}, st.Problems...)}
	if st.Leader != uuid.Nil {
		out.Leader = e.nodeName(st.Leader)
	}
	for _, n := range st.Nodes {
		one := v1.ClusterNode{Name: n.Name, ID: n.ID, Role: n.Role, Offline: n.Offline, Voter: n.Voter, Leader: n.Leader, Reachable: n.Reachable,
			Lag: n.Lag, Error: n.Error, Peer: n.Peer, Version: n.Version}
		if !n.Expires.IsZero() {
			until := n.Expires.UTC()
			one.CertificateExpires = &until
		}
		out.Nodes = append(out.Nodes, one)
	}
	return out, nil
}

// JoinToken implements api.Appliance.
func (e estate) JoinToken(ctx context.Context, role string, ttl time.Duration) (v1.JoinToken, error) {
	var a TokenAnswer
	err := e.askControl(ctx, "token", fmt.Appendf(nil, `{"role":%q,"ttl":%d}`, role, ttl), &a)
	return v1.JoinToken{Token: a.Token, Role: a.Role, Expires: a.Expires.UTC()}, err
}

// Health implements api.Appliance.
func (e estate) Health(ctx context.Context) (v1.Health, error) {
	out := v1.Health{State: "ok", At: time.Now().UTC(), Checks: []v1.HealthCheck{}, Unreachable: []string{}}
	for _, a := range tellAll[[]v1.HealthCheck](ctx, &e.base, e.all(), callHealth) {
		if a.Err != nil {
			name := e.nodeName(a.Node)
			out.Unreachable = append(out.Unreachable, name)
			if a.Node == e.raft.ID() { // this is the control unit, and its gateway is away
				f := &findings{e: e, node: name, now: out.At}
				f.add("node.ready", stateError, "node "+name, errGatewayAway.Error(), "look at the log of varve-gateway, and at systemctl status varve-gateway")
				out.Checks = append(out.Checks, f.out...)
				continue
			}
			out.Checks = append(out.Checks, e.since(v1.HealthCheck{Code: "node.reachable", Title: "node answers", State: "error", Node: name,
				Object: "node " + name, Evidence: shortText(a.Err.Error()), At: out.At,
				Remedy: "see that the appliance runs and that port 7443 is open between the nodes; if it is gone for good: varve node offline " + name}))
			continue
		}
		out.Checks = append(out.Checks, a.Value...)
	}
	out.Checks = append(out.Checks, e.clusterChecks(ctx)...)
	rank := map[string]int{"error": 0, "warning": 1, "ok": 2}
	slices.SortStableFunc(out.Checks, func(a, b v1.HealthCheck) int {
		return cmp.Or(cmp.Compare(rank[a.State], rank[b.State]), cmp.Compare(a.Code, b.Code), cmp.Compare(a.Node, b.Node), cmp.Compare(a.Object, b.Object))
	})
	for _, c := range out.Checks {
		if rank[c.State] < rank[out.State] {
			out.State = c.State
		}
	}
	return out, nil
}

// Disks implements api.Appliance.
func (e estate) Disks(ctx context.Context) ([]v1.Disk, error) {
	var out []v1.Disk
	for _, a := range tellAll[[]v1.Disk](ctx, &e.base, e.all(), callDisks) {
		if a.Err != nil {
			e.cfg.Log.Debug("disks of a node are as it said last", "peer", a.Node, "err", a.Err)
			for i := range a.Value {
				a.Value[i].AsOf = sinceTime(a.At)
			}
		}
		out = append(out, a.Value...)
	}
	slices.SortFunc(out, func(a, b v1.Disk) int { return strings.Compare(a.ID, b.ID) })
	return out, nil
}

// ownDisks are those of this node.
func (e estate) ownDisks() ([]v1.Disk, error) {
	roles := map[string]string{logName: "log", mapName: "map", controlName: "control", cacheName: "cache", backendName: "backend"}
	var used []doctor.Use
	for name, role := range roles {
		used = append(used, doctor.Use{Path: e.cfg.Data + "/" + name, Role: role})
	}
	if e.cfg.CacheDir != "" {
		used = append(used, doctor.Use{Path: e.cfg.CacheDir, Role: "cache"})
	}
	for _, p := range e.raft.State().View().VPools() {
		if p.Backend.Kind == state.BackendLocal && p.Backend.Node == e.raft.ID() {
			used = append(used, doctor.Use{Path: p.Backend.Dir, Role: "backend"})
		}
	}
	found, err := doctor.Disks(append(used, doctor.Use{Path: "/", Role: "system"}))
	if err != nil {
		return nil, err
	}
	name := e.nodeName(e.raft.ID())
	out := []v1.Disk{}
	for _, d := range found {
		one := v1.Disk{ID: name + "/" + d.Device, Node: name, Device: d.Device, Kind: d.Kind, Model: d.Model, Serial: d.Serial, Size: v1.Size(d.Size),
			Roles: d.Roles, Mounts: d.Mounts, Used: v1.Size(d.Used), Free: v1.Size(d.Free), State: "ok"}
		switch {
		case len(d.Mounts) == 0 && len(d.Roles) == 0:
			one.State = "unused"
		case d.Used > 0 && float64(d.Free) < diskFull*float64(d.Used+d.Free):
			one.State = "full"
		}
		if one.Roles == nil {
			one.Roles = []string{}
		}
		out = append(out, one)
	}
	return out, nil
}

const diskFull = 0.05

// Backends implements api.Appliance: what this node cannot say of one, the node says that has it.
func (e estate) Backends(ctx context.Context) ([]v1.Backend, error) {
	known := make(map[uuid.UUID]v1.Backend)
	var said []v1.Backend
	if err := e.peers.Call(ctx, e.raft.ID(), callBackends, nil, &said); err != nil { // the gateway of this node is away
		e.cfg.Log.Debug("backends are as they were said last", "err", err)
	}
	ask := e.others()
	if len(said) == 0 {
		ask = e.all()
	}
	for _, p := range e.raft.State().View().VPools() {
		for _, node := range ask {
			if b, ok := e.backendAt(ctx, node, p.ID); ok {
				said = append(said, b)
			}
		}
	}
	for _, b := range said {
		have, ok := known[b.ID]
		switch {
		case !ok:
			known[b.ID] = b
			continue
		case have.State == "unknown" || b.State == "failing" && have.State == "ok":
			b.Pending += have.Pending
			b.Stored += have.Stored
			have = b
		default:
			have.Pending += b.Pending
			have.Stored += b.Stored
		}
		known[b.ID] = have
	}
	out := make([]v1.Backend, 0, len(known))
	for _, b := range known {
		out = append(out, b)
	}
	slices.SortFunc(out, func(a, b v1.Backend) int { return strings.Compare(a.VPool, b.VPool) })
	return out, nil
}

// sinceTime is nil for the zero time.
func sinceTime(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC()
	return &t
}

func (e estate) ownBackends() []v1.Backend {
	view := e.raft.State().View()
	pending := make(map[uuid.UUID]int64)
	for _, p := range view.VPools() {
		for _, vol := range view.VolumesOf(p.FSID) {
			if i, ok := e.engine.Info(vol.ID); ok {
				pending[p.ID] += i.Pending
			}
		}
	}
	out := []v1.Backend{}
	for _, p := range view.VPools() {
		space, _ := e.spaceHere(p.ID)
		b := v1.Backend{VPool: p.Name, ID: p.ID, Kind: p.Backend.Kind, URL: vpool.URL(p.Backend), State: "ok", Total: v1.Size(space.Total),
			Free: v1.Size(space.Free), Stored: v1.Size(space.Stored), Pending: v1.Size(pending[p.ID]), Encrypted: p.Encrypted,
			Compression: cmp.Or(p.Compression, "none"), Findings: make(map[string]string, len(p.Findings))}
		for _, f := range p.Findings {
			b.Findings[f.Check] = f.Found
		}
		if p.Backend.Node != uuid.Nil {
			b.Node = e.nodeName(p.Backend.Node)
		}
		if h := e.driver.PoolHealth(p.ID); h.Err != "" {
			b.State, b.Error = "failing", shortText(h.Err)
			if since := h.Since.UTC(); !since.IsZero() {
				b.Since = &since
			}
		} else if p.Backend.Node != uuid.Nil && p.Backend.Node != e.raft.ID() {
			b.State = "unknown"
		}
		out = append(out, b)
	}
	return out
}

// TestBackend implements api.Appliance.
func (e estate) TestBackend(ctx context.Context, pool state.VPool) (v1.BackendTest, error) {
	node := e.raft.ID()
	if pool.Backend.Node != uuid.Nil {
		node = pool.Backend.Node
	}
	var t v1.BackendTest
	err := e.peers.Call(ctx, node, callTest, pool.ID, &t)
	return t, err
}

func (e estate) testHere(ctx context.Context, id uuid.UUID) (v1.BackendTest, error) {
	start := time.Now()
	p, err := e.pools.Probe(ctx, id)
	t := v1.BackendTest{OK: err == nil, Findings: make(map[string]string), DurationMS: time.Since(start).Milliseconds()}
	if err != nil {
		t.Error = shortText(err.Error())
	}
	for _, f := range p.Findings {
		t.Findings[f.Check] = f.Found
	}
	return t, ctx.Err()
}

// Protection implements api.Appliance.
func (e estate) Protection(context.Context) ([]v1.Protection, error) {
	view := e.raft.State().View()
	out := []v1.Protection{}
	for _, p := range view.VPools() {
		for _, d := range view.Disks(p.FSID) {
			i, owner, known := e.remote.Look(d.Volume)
			one := v1.Protection{VDisk: p.Name + "/" + d.Name, ID: d.Volume.ID, VPool: p.Name, Class: p.Class, Known: known,
				Unlogged: v1.Size(i.Ledger.UnloggedBytes), Unbacked: v1.Size(i.Ledger.UnbackedBytes), UnbackedAge: int64(i.Ledger.UnbackedAge / time.Second)}
			if owner != uuid.Nil {
				one.Owner = e.nodeName(owner)
			}
			one.AsOf = sinceTime(i.AsOf)
			out = append(out, one)
		}
	}
	slices.SortStableFunc(out, func(a, b v1.Protection) int {
		return cmp.Or(cmp.Compare(b.UnbackedAge, a.UnbackedAge), cmp.Compare(b.Unbacked, a.Unbacked), cmp.Compare(a.VDisk, b.VDisk))
	})
	return out, nil
}

const (
	forecastDays = 30
	forecastMax  = 10 * 365
	forecastMin  = 1.0 / 24 // of a day: less says nothing
)

// Capacity implements api.Appliance.
func (e estate) Capacity(ctx context.Context) ([]v1.Capacity, error) {
	backends, err := e.Backends(ctx)
	if err != nil {
		return nil, err
	}
	view := e.raft.State().View()
	out := []v1.Capacity{}
	now := time.Now()
	for _, b := range backends {
		c := v1.Capacity{VPool: b.VPool, ID: b.ID, Total: b.Total, Free: b.Free}
		p, err := view.VPoolByID(b.ID)
		if err != nil {
			continue
		}
		for _, d := range view.Disks(p.FSID) {
			i, _, _ := e.remote.Look(d.Volume)
			c.Used += v1.Size(i.Used)
			c.Provisioned += v1.Size(max(i.Size, d.Volume.Size))
		}
		h, err := e.History(ctx, api.HistoryQuery{Kind: "vpool", ID: b.ID, Name: "vpool:" + b.VPool, Metrics: []string{"used"},
			From: now.Add(-forecastDays * 24 * time.Hour), To: now, Points: 500})
		if err == nil && len(h.Series) == 1 {
			if growth, days, ok := trend(h.Series[0].Values, h.Step); ok {
				c.Growth, c.Days = &growth, &days
				if left := float64(c.Free) / float64(growth); growth > 0 && c.Total > 0 && left < forecastMax {
					full := now.Add(time.Duration(left * 24 * float64(time.Hour))).UTC().Truncate(time.Minute)
					c.Full = &full
				}
			}
		}
		out = append(out, c)
	}
	return out, nil
}

// trend is the slope of a straight line through values, per day, by least squares, and over how many days they are known.
func trend(values []*float64, step int64) (perDay float32, days float32, ok bool) {
	var n, sx, sy, sxx, sxy float64
	first, last := -1, 0
	for i, v := range values {
		if v == nil {
			continue
		}
		if first < 0 {
			first = i
		}
		last = i
		x := float64(i) * float64(step) / 86400
		n, sx, sy, sxx, sxy = n+1, sx+x, sy+*v, sxx+x*x, sxy+x**v
	}
	known := float64(last-first) * float64(step) / 86400
	d := n*sxx - sx*sx
	if first < 0 || known < forecastMin || d <= 0 {
		return 0, 0, false
	}
	return float32((n*sxy - sx*sy) / d), float32(known), true
}

// History implements api.Appliance. A vPool's figures are the sum of what its nodes have; percentiles are of the worst one.
func (e estate) History(ctx context.Context, q api.HistoryQuery) (v1.History, error) {
	for _, m := range q.Metrics {
		if !slices.ContainsFunc(history.Metrics, func(known metric) bool { return known.Name == m }) {
			var names []string
			for _, known := range history.Metrics {
				names = append(names, known.Name)
			}
			return v1.History{}, &state.Error{Err: state.ErrInvalid, Object: "metric " + shortText(m), Detail: "is not kept", Remedy: "there are " + strings.Join(names, ", ")}
		}
	}
	ask := []uuid.UUID{e.raft.ID()}
	switch q.Kind {
	case "node":
		ask = []uuid.UUID{q.ID}
	case "vdisk":
		vol, err := e.raft.State().View().Volume(q.ID)
		if err != nil {
			return v1.History{}, err
		}
		if owner := e.remote.Owner(vol); owner != uuid.Nil {
			ask = []uuid.UUID{owner}
		}
	case "vpool":
		ask = e.all()
	}
	var out *v1.History
	var errs []error
	for _, a := range peer.Each[v1.History](ctx, e.peers, ask, callHistory, q) {
		if a.Err != nil {
			errs = append(errs, a.Err)
			continue
		}
		if out == nil {
			out = &a.Value
			continue
		}
		out.Node = ""
		merge(out, a.Value)
	}
	if out == nil {
		return v1.History{}, errors.Join(errs...)
	}
	if len(q.Metrics) == 0 { // what the object has none of is left out
		out.Series = slices.DeleteFunc(out.Series, func(s v1.HistorySeries) bool {
			return !slices.ContainsFunc(s.Values, func(v *float64) bool { return v != nil }) && s.Unit != "1/s" && s.Unit != "bytes/s"
		})
	}
	return *out, nil
}

type metric = struct {
	Name, Unit string
	Of         func(s *history.Sample, seconds float64) float64
}

// merge adds another node's figures of the same time.
func merge(into *v1.History, other v1.History) {
	for i := range into.Series {
		if i >= len(other.Series) || other.From != into.From || other.Step != into.Step {
			return
		}
		s := into.Series[i]
		for j, v := range other.Series[i].Values {
			switch have := s.Values[j]; {
			case v == nil:
			case have == nil:
				s.Values[j] = v
			case s.Unit == "seconds", s.Unit == "ratio", s.Metric == "free", s.Metric == "total":
				*have = max(*have, *v)
			default:
				*have += *v
			}
		}
	}
}

func (e estate) ownHistory(q api.HistoryQuery) (v1.History, error) {
	kinds := map[string]history.Kind{"node": history.Node, "vpool": history.VPool, "vdisk": history.VDisk}
	s, err := e.figures.Query(history.Object{Kind: kinds[q.Kind], ID: q.ID}, q.From, q.To, q.Points)
	if err != nil {
		return v1.History{}, err
	}
	out := v1.History{Object: q.Name, From: s.From, Step: s.Step, To: s.From + s.Step*int64(len(s.Steps)), Series: []v1.HistorySeries{},
		Node: e.nodeName(e.raft.ID())}
	for _, m := range history.Metrics {
		if len(q.Metrics) > 0 && !slices.Contains(q.Metrics, m.Name) {
			continue
		}
		one := v1.HistorySeries{Metric: m.Name, Unit: m.Unit, Values: make([]*float64, len(s.Steps))}
		for i, sample := range s.Steps {
			if sample == nil || s.Known[i] == 0 {
				continue
			}
			if v := m.Of(sample, float64(s.Known[i])); !math.IsNaN(v) && !math.IsInf(v, 0) {
				one.Values[i] = &v
			}
		}
		out.Series = append(out.Series, one)
	}
	return out, nil
}
