package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	v1 "varve/control/api/customer"
	"varve/control/state"
)

// Appliance is what the API asks of the appliance that serves it: things that are not in the replicated state. What is about the whole cluster
// it collects from the other nodes, and leaves out, or marks, what does not answer in time.
type Appliance interface {
	// Cluster says how the nodes are, as this one sees them.
	Cluster(ctx context.Context) (v1.Cluster, error)
	// JoinToken makes a token that admits one node.
	JoinToken(ctx context.Context, role string, ttl time.Duration) (v1.JoinToken, error)
	// Joinable says why this appliance cannot join a cluster: what it holds. Join has it admitted by the cluster of a token, after which it
	// restarts.
	Joinable() error
	Join(ctx context.Context, token string) (v1.ClusterJoined, error)
	// Updates says what each node runs and which bundles there are; the rollout is the task queue's.
	Updates(ctx context.Context) (v1.Updates, error)
	// TakeUpdate checks a bundle and keeps it on this node.
	TakeUpdate(ctx context.Context, bundle io.Reader) (v1.UpdateBundle, error)
	// Rollout is the task that updates all nodes with a bundle that one of them has.
	Rollout(ctx context.Context, sha256 string, finalise bool, by string) (state.TaskSpec, error)
	// Health says what every node has checked, worst first.
	Health(ctx context.Context) (v1.Health, error)
	// Disks are those of all nodes, by id.
	Disks(ctx context.Context) ([]v1.Disk, error)
	// Backends are those of all vPools, by name; Stored and Pending are this node's.
	Backends(ctx context.Context) ([]v1.Backend, error)
	// TestBackend probes one.
	TestBackend(ctx context.Context, pool state.VPool) (v1.BackendTest, error)
	// Protection says of every vDisk how much is at stake, most first.
	Protection(ctx context.Context) ([]v1.Protection, error)
	// Capacity says how full vPools are and will be, by name.
	Capacity(ctx context.Context) ([]v1.Capacity, error)
	// Logs are log lines of all nodes, or of one.
	Logs(ctx context.Context, q LogQuery) (v1.LogLines, error)
	// History is how figures of an object were.
	History(ctx context.Context, q HistoryQuery) (v1.History, error)
}

// HistoryQuery asks for figures over time.
type HistoryQuery struct {
	// Kind is "node", "vpool" or "vdisk"; ID that of the node, vPool or volume; Name as the answer gives it.
	Kind string
	ID   uuid.UUID
	Name string
	// Metrics; empty for all.
	Metrics  []string
	From, To time.Time
	// Points is the most values of a metric.
	Points int
}

var errNoAppliance = refuse(http.StatusServiceUnavailable, "unavailable", "this server knows nothing of its appliance", "")

func (s *Server) appliance() (Appliance, error) {
	if s.cfg.Appliance == nil {
		return nil, errNoAppliance
	}
	return s.cfg.Appliance, nil
}

func (a customerAPI) GetCluster(ctx context.Context, _ v1.GetClusterRequestObject) (v1.GetClusterResponseObject, error) {
	of, err := a.appliance()
	if err != nil {
		return nil, err
	}
	c, err := of.Cluster(ctx)
	return v1.GetCluster200JSONResponse(c), err
}

func (a customerAPI) CreateJoinToken(ctx context.Context, r v1.CreateJoinTokenRequestObject) (v1.CreateJoinTokenResponseObject, error) {
	of, err := a.appliance()
	if err != nil {
		return nil, err
	}
	role, ttl := orElse(r.Body.Role, state.RoleMaster), time.Duration(r.Body.TTL)*time.Second
	if role != state.RoleMaster && role != state.RoleExtra {
		return nil, refuse(http.StatusBadRequest, "invalid", "role "+clip(role)+" is none", "send master or extra")
	}
	about(ctx, "join token of a "+role)
	if r.Params.DryRun {
		return nil, wouldDo("makes a token that lets one appliance join as "+role, nil, nil, nil, "")
	}
	t, err := of.JoinToken(ctx, role, ttl)
	return v1.CreateJoinToken201JSONResponse(t), err
}

func (a customerAPI) JoinCluster(ctx context.Context, r v1.JoinClusterRequestObject) (v1.JoinClusterResponseObject, error) {
	about(ctx, "this appliance")
	of, err := a.appliance()
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		if err := of.Joinable(); err != nil {
			return nil, err
		}
		return nil, wouldDo("makes this appliance a node of another cluster", []string{"it restarts; its users, tokens and certificates are those of the cluster"},
			[]string{"its own users, tokens, settings, tasks, events and audit log"}, nil, "")
	}
	j, err := of.Join(ctx, r.Body.Token)
	return v1.JoinCluster202JSONResponse(j), err
}

// node finds one by name or id, and says which it is for the audit log.
func (s *Server) node(ctx context.Context, given string) (state.Node, error) {
	n, err := s.cfg.Nodes.Get(given)
	if err == nil {
		about(ctx, "node "+n.Name)
	}
	return n, err
}

func (a customerAPI) PatchNode(ctx context.Context, r v1.PatchNodeRequestObject) (v1.PatchNodeResponseObject, error) {
	n, err := a.node(ctx, r.Node)
	if err != nil {
		return nil, err
	}
	rev, err := based(r.Params.IfMatch, "node "+n.Name, n.Rev)
	if err != nil {
		return nil, err
	}
	cmd := &state.SetNode{ID: n.ID, Rev: rev, Offline: r.Body.Offline}
	var changes, affected []string
	if role := r.Body.Role; role != "" {
		cmd.Role = &role
		if role == state.RoleMaster {
			changes = append(changes, "it votes when it has a place")
		} else {
			changes = append(changes, "it votes no more")
		}
	}
	if r.Body.Offline != nil {
		if *r.Body.Offline {
			changes = append(changes, "nothing is expected of it, a spare master takes its vote")
			affected = append(affected, "vDisks that it owns are served when it is back")
		} else {
			changes = append(changes, "it is expected again")
		}
	}
	if len(changes) == 0 {
		return nil, refuse(http.StatusBadRequest, "invalid", "nothing to change", "send role or offline")
	}
	if r.Params.DryRun {
		return nil, wouldDo("changes node "+n.Name, changes, nil, affected, "")
	}
	if _, err := a.cfg.Raft.Apply(ctx, cmd); err != nil {
		return nil, err
	}
	n, err = a.cfg.Nodes.Get(n.ID.String())
	return v1.PatchNode200JSONResponse{Body: a.toNode(n), Headers: v1.PatchNode200ResponseHeaders{ETag: etag(n.Rev)}}, err
}

func (a customerAPI) RemoveNode(ctx context.Context, r v1.RemoveNodeRequestObject) (v1.RemoveNodeResponseObject, error) {
	n, err := a.node(ctx, r.Node)
	if err != nil {
		return nil, err
	}
	rev, err := based(r.Params.IfMatch, "node "+n.Name, n.Rev)
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		owned, names := a.ownedBy(n.ID)
		lost := []string{"the node's place in the cluster; it joins again with an empty data directory"}
		if owned > 0 {
			lost = append(lost, fmt.Sprintf("%d vPools and volumes that it owns, which only force gives up", owned))
		}
		return nil, wouldDo("takes node "+n.Name+" out of the cluster", []string{"the appliance stops", "its certificate is refused from now on"}, lost, names, n.Name)
	}
	if err := confirm(r.Params.Confirm, n.Name); err != nil {
		return nil, err
	}
	_, err = a.cfg.Raft.Apply(ctx, &state.RemoveNode{ID: n.ID, Rev: rev, Force: r.Params.Force})
	return v1.RemoveNode204Response{}, err
}

const ownedNamed = 10

// ownedBy counts what a node alone has, and names some of it.
func (s *Server) ownedBy(node uuid.UUID) (n int, names []string) {
	v := s.cfg.Store.View()
	for _, p := range v.VPools() {
		if p.Backend.Node == node {
			n++
			names = append(names, "vpool "+p.Name)
		}
		for _, d := range v.Disks(p.FSID) {
			if d.Volume.Owner != node {
				continue
			}
			if n++; len(names) < ownedNamed {
				names = append(names, "vdisk "+p.Name+"/"+d.Name)
			}
		}
	}
	return n, names
}

// shown is a page of what the appliance tells of things, those on vPools that the caller may see; vpool is nil where they are on none.
func shown[T any](ctx context.Context, s *Server, tell func(Appliance, context.Context) ([]T, error), vpool, id func(T) string) (page[T], error) {
	of, err := s.appliance()
	if err != nil {
		return page[T]{}, err
	}
	all, err := tell(of, ctx)
	if err != nil {
		return page[T]{}, err
	}
	if who := callOf(ctx).who; vpool != nil {
		all = slices.DeleteFunc(all, func(one T) bool { return !who.Sees(vpool(one)) })
	}
	return listPage(ctx, all, id)
}

func (a customerAPI) ListDisks(ctx context.Context, _ v1.ListDisksRequestObject) (v1.ListDisksResponseObject, error) {
	p, err := shown(ctx, a.Server, Appliance.Disks, nil, func(d v1.Disk) string { return d.ID })
	return v1.ListDisks200JSONResponse{Items: p.items, Next: p.next, Count: p.count}, err
}

func (a customerAPI) ListBackends(ctx context.Context, _ v1.ListBackendsRequestObject) (v1.ListBackendsResponseObject, error) {
	p, err := shown(ctx, a.Server, Appliance.Backends, func(b v1.Backend) string { return b.VPool }, func(b v1.Backend) string { return b.ID.String() })
	return v1.ListBackends200JSONResponse{Items: p.items, Next: p.next, Count: p.count}, err
}

func (a customerAPI) GetBackend(ctx context.Context, r v1.GetBackendRequestObject) (v1.GetBackendResponseObject, error) {
	name, err := a.vpoolName(ctx, r.Vpool)
	if err != nil {
		return nil, err
	}
	of, err := a.appliance()
	if err != nil {
		return nil, err
	}
	all, err := of.Backends(ctx)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(all, func(b v1.Backend) bool { return b.VPool == name })
	if i < 0 {
		return nil, unseen("vpool " + name)
	}
	return v1.GetBackend200JSONResponse(all[i]), nil
}

func (a customerAPI) TestBackend(ctx context.Context, r v1.TestBackendRequestObject) (v1.TestBackendResponseObject, error) {
	name, err := a.vpoolName(ctx, r.Vpool)
	if err != nil {
		return nil, err
	}
	of, err := a.appliance()
	if err != nil {
		return nil, err
	}
	p, err := a.cfg.Store.View().VPool(name)
	if err != nil {
		return nil, err
	}
	t, err := of.TestBackend(ctx, p)
	return v1.TestBackend200JSONResponse(t), err
}

func (a customerAPI) GetHealth(ctx context.Context, _ v1.GetHealthRequestObject) (v1.GetHealthResponseObject, error) {
	of, err := a.appliance()
	if err != nil {
		return nil, err
	}
	h, err := of.Health(ctx)
	return v1.GetHealth200JSONResponse(h), err
}

func (a customerAPI) ListProtection(ctx context.Context, _ v1.ListProtectionRequestObject) (v1.ListProtectionResponseObject, error) {
	p, err := shown(ctx, a.Server, Appliance.Protection, func(p v1.Protection) string { return p.VPool }, func(p v1.Protection) string { return p.ID.String() })
	return v1.ListProtection200JSONResponse{Items: p.items, Next: p.next, Count: p.count}, err
}

func (a customerAPI) ListCapacity(ctx context.Context, _ v1.ListCapacityRequestObject) (v1.ListCapacityResponseObject, error) {
	p, err := shown(ctx, a.Server, Appliance.Capacity, func(c v1.Capacity) string { return c.VPool }, func(c v1.Capacity) string { return c.ID.String() })
	return v1.ListCapacity200JSONResponse{Items: p.items, Next: p.next, Count: p.count}, err
}

const (
	historyPoints    = 400
	historyPointsMax = 2000
	historyMetrics   = 32
)

func (a customerAPI) GetHistory(ctx context.Context, r v1.GetHistoryRequestObject) (v1.GetHistoryResponseObject, error) {
	of, err := a.appliance()
	if err != nil {
		return nil, err
	}
	q := HistoryQuery{Metrics: commaList(r.Params.Metric), Points: r.Params.Points, To: time.Now()}
	if len(q.Metrics) > historyMetrics {
		return nil, badQuery("metric", fmt.Sprintf("names more than %d", historyMetrics))
	}
	if q.Points == 0 {
		q.Points = historyPoints
	}
	if q.Points < 0 || q.Points > historyPointsMax {
		return nil, badQuery("points", fmt.Sprintf("is not a number from 1 to %d", historyPointsMax))
	}
	if r.Params.To != 0 {
		q.To = time.Unix(r.Params.To, 0)
	}
	q.From = q.To.Add(-time.Hour)
	if r.Params.From != 0 {
		q.From = time.Unix(r.Params.From, 0)
	}
	if !q.From.Before(q.To) {
		return nil, badQuery("from", "is not before to")
	}
	var name string
	q.Kind, name, _ = strings.Cut(r.Params.Object, ":")
	switch q.Kind {
	case "node":
		if callOf(ctx).who.VPools != nil {
			return nil, refuse(http.StatusForbidden, "forbidden", "these credentials are bound to some vPools", "")
		}
		n, err := a.cfg.Nodes.Get(name)
		if err != nil {
			return nil, err
		}
		q.ID, q.Name = n.ID, "node:"+n.Name
	case state.ScopeVPool:
		name, err := a.vpoolName(ctx, name)
		if err != nil {
			return nil, err
		}
		p, err := a.cfg.Store.View().VPool(name)
		if err != nil {
			return nil, err
		}
		q.ID, q.Name = p.ID, "vpool:"+p.Name
	case state.ScopeVDisk:
		d, err := a.vdisk(ctx, name)
		if err != nil {
			return nil, err
		}
		q.ID, q.Name = d.Volume.ID, "vdisk:"+d.FullName()
	default:
		return nil, badQuery("object", "is not node:NAME, vpool:NAME or vdisk:VPOOL/PATH")
	}
	h, err := of.History(ctx, q)
	return v1.GetHistory200JSONResponse(h), err
}

// syncWait is how long a read waits to become fresh.
const syncWait = 5 * time.Second

// fresh makes a read of the customer API see everything that any node has acknowledged before it, unless its caller does without, or
// it is about what this node sees.
func (s *Server) fresh(ctx context.Context, c *call) error {
	if s.cfg.Sync == nil || c.change() || c.LocalView || c.Internal || slices.Contains(c.Roles, anyone) {
		return nil
	}
	switch c.query.Get("consistency") {
	case "stale":
		return nil
	case "", "linearizable":
	default:
		return badQuery("consistency", "is neither stale nor linearizable")
	}
	ctx, cancel := context.WithTimeout(ctx, syncWait)
	defer cancel()
	if err := s.cfg.Sync(ctx); err != nil {
		if errors.Is(err, context.Canceled) {
			return err
		}
		p := problem(err)
		p.Status, p.Code, p.Title = http.StatusServiceUnavailable, "unavailable", "Unavailable"
		p.Detail = "this node cannot tell whether it knows the latest: " + p.Detail
		p.Remedy = "try again, ask another node, or add consistency=stale for what this one knew last"
		return p
	}
	return nil
}
