package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/google/uuid"

	"varve/appliance/exports"
	"varve/control/cluster"
	"varve/control/peer"
	"varve/control/pki"
	"varve/control/raft"
	"varve/control/replica"
	"varve/control/secrets"
	"varve/control/state"
	"varve/control/vpool"
)

// network is the node port while it runs.
type network struct {
	*cluster.Cluster
	stop context.CancelFunc
	done chan struct{}
	err  error // set before done is closed
}

// openControl opens this node's part of the cluster and returns when it has caught up. Where there is no node port, as in a
// rebuild, the node has to be a cluster of one.
func (b *base) openControl(ctx context.Context) error {
	if b.cfg.Unit == UnitGateway {
		return b.followControl(ctx)
	}
	dir := filepath.Join(b.cfg.Data, controlName)
	id, self, err := raft.Identify(dir)
	if err != nil {
		return err
	}
	b.cfg.Log = b.cfg.Log.With("component", component(id, self, "appliance"))
	b.newPeers(self)
	conf := pki.Config{Dir: filepath.Join(b.cfg.Data, tlsName), Name: id.String(), Hosts: pki.LocalHosts, Cluster: id, Node: self}
	if cluster.HasPeers(dir) { // else a lost authority's key is not somebody else's to use
		conf.Sign = func(ctx context.Context, r pki.Request) ([]byte, error) { return b.network.Sign(ctx, r) }
	}
	if b.tls, err = pki.Open(conf); err != nil {
		return err
	}
	open := raft.Config{Dir: dir, Log: b.cfg.ControlLog.With("component", component(id, self, "control"))}
	if b.doors != nil && len(b.doors.node) > 0 {
		ln := b.doors.node[0]
		c, err := cluster.New(cluster.Config{Dir: dir, Cluster: id, Self: self, PKI: b.tls, Listener: ln,
			Advertise: func() string { return b.nodeSpec(b.doors).Peer }, Version: b.cfg.Version,
			Secrets: func() ([]byte, error) { return secrets.BundleOf(b.cfg.Data) },
			Log:     b.cfg.Log.With("component", component(id, self, "cluster"))})
		if err != nil {
			return err
		}
		c.Handle(peer.Protocol, b.acceptPeer)
		b.network = &network{Cluster: c, done: make(chan struct{})}
		open.Network = c
	} else if cluster.HasPeers(dir) {
		return &UsageError{"this node is one of several and has no node port", "free it, or give --node ADDR"}
	}
	if b.node, err = raft.Open(open); err != nil {
		return err
	}
	b.raft = b.node
	if b.network == nil {
		return nil
	}
	b.network.Attach(b.node)
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	b.network.stop = stop
	go func() {
		defer close(b.network.done)
		b.network.err = b.network.Run(run)
	}()
	return b.caughtUp(ctx)
}

// caughtUp waits for the rest of the cluster as long as it takes: without a majority nobody knows who owns what.
func (b *base) caughtUp(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for {
		err := b.node.Ready(ctx)
		switch {
		case err == nil:
			return nil
		case b.node.Err() != nil:
			return b.node.Err()
		case ctx.Err() != nil:
			return ctx.Err()
		case !errors.Is(err, raft.ErrUnavailable):
			return err
		}
		b.cfg.Log.Warn("waiting for a majority of the control cluster", "err", err)
		select {
		case <-b.network.done:
			return b.network.err
		case <-time.After(time.Second):
		case <-ctx.Done():
		}
	}
}

// runNetwork reports the end of the node port, until ctx ends.
func (b *base) runNetwork(ctx context.Context) error {
	if b.network == nil {
		return nil
	}
	select {
	case <-ctx.Done():
		return nil
	case <-b.network.done:
		return b.network.err
	}
}

const handOnTimeout = 2 * time.Second

// handOn gives the lead to another voter, so that the cluster need not notice that this node is gone.
func (b *base) handOn() {
	if b.node == nil {
		return
	}
	servers, err := b.node.Servers()
	voters := 0
	for _, s := range servers {
		if s.Voter {
			voters++
		}
	}
	if err != nil || voters < 2 || !b.node.IsLeader() || b.node.Err() != nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), handOnTimeout)
	defer cancel()
	if err := b.node.TransferLeadership(ctx); err != nil {
		b.cfg.Log.Warn("the lead could not be handed on", "err", err)
	}
}

func (b *base) closeNetwork() {
	if b.network != nil && b.network.stop != nil {
		b.network.stop()
		<-b.network.done
	}
}

// mine says whether a deleted volume is this node's to clean up: its owner's, or, where nobody ever opened it, that of the node
// with the backend, or the leader's.
func (b *base) mine(d state.Doomed) bool {
	if d.Owner != uuid.Nil {
		return d.Owner == b.raft.ID()
	}
	p, err := b.raft.State().View().VPoolByID(d.Pool)
	if err == nil && p.Backend.Node != uuid.Nil {
		return p.Backend.Node == b.raft.ID()
	}
	return b.raft.IsLeader()
}

// ControlSocket is where other processes of the appliance, and administration of the cluster, reach control.
func ControlSocket(data string) string { return filepath.Join(data, controlSocketName) }

const controlSocketName = "control.sock"

// TokenRequest asks for a join token.
type TokenRequest struct {
	Role string        `json:"role"`
	TTL  time.Duration `json:"ttl"`
}

// TokenAnswer is one. The token is shown once.
type TokenAnswer struct {
	Token   string    `json:"token"`
	Role    string    `json:"role"`
	Expires time.Time `json:"expires"`
}

// ClusterStatus is what a node knows of its cluster.
type ClusterStatus struct {
	Cluster uuid.UUID    `json:"cluster"`
	Self    uuid.UUID    `json:"self"`
	Leader  uuid.UUID    `json:"leader"`
	Voters  int          `json:"voters"`
	Nodes   []NodeStatus `json:"nodes"`
	// Problems an operator should know of.
	Problems []string `json:"problems,omitempty"`
}

// NodeStatus is one node of it.
type NodeStatus struct {
	state.Node
	Voter     bool      `json:"voter"`
	Leader    bool      `json:"leader"`
	Reachable bool      `json:"reachable"`
	Lag       uint64    `json:"lag"`
	Error     string    `json:"error,omitempty"`
	Expires   time.Time `json:"certificate_expires,omitzero"`
}

// controlServer serves the control socket.
func (b *base) controlServer() *replica.Server {
	s := replica.NewServer(b.node, b.cfg.Log.With("component", component(b.raft.Cluster(), b.raft.ID(), "control")))
	const small = 4 << 10
	s.Handle("token", small, func(ctx context.Context, body []byte) (any, error) {
		var r TokenRequest
		if err := json.Unmarshal(body, &r); err != nil {
			return nil, &state.Error{Err: state.ErrInvalid, Object: "join token", Detail: err.Error()}
		}
		if b.network == nil {
			return nil, &state.Error{Err: state.ErrConflict, Object: "join token", Detail: "this appliance has no node port",
				Remedy: "start it with --node ADDR"}
		}
		tok, expires, err := b.network.CreateToken(ctx, r.Role, r.TTL)
		return TokenAnswer{Token: tok, Role: r.Role, Expires: expires}, err
	})
	s.Handle("status", 0, func(ctx context.Context, _ []byte) (any, error) { return b.clusterStatus(ctx) })
	return s
}

func (b *base) clusterStatus(ctx context.Context) (ClusterStatus, error) {
	st := ClusterStatus{Cluster: b.raft.Cluster(), Self: b.raft.ID(), Leader: b.node.Leader()}
	var members []cluster.Member
	if b.network != nil {
		var err error
		if members, err = b.network.Status(ctx); err != nil {
			return st, err
		}
	} else if self, err := b.nodes.Self(); err == nil {
		members = []cluster.Member{{Node: self, Voter: true, Leader: true, Reachable: true}}
	}
	masters := 0
	for _, m := range members {
		if m.Voter {
			st.Voters++
		}
		if m.Role == state.RoleMaster && !m.Offline {
			masters++
		}
		if !m.Reachable && !m.Offline {
			st.Problems = append(st.Problems, "node "+m.Name+" does not answer")
		}
		st.Nodes = append(st.Nodes, NodeStatus{Node: m.Node, Voter: m.Voter, Leader: m.Leader, Reachable: m.Reachable, Lag: m.Lag,
			Error: m.Err, Expires: m.Expires})
	}
	switch {
	case st.Leader == uuid.Nil:
		st.Problems = append(st.Problems, "the cluster has no leader: nothing can be changed until a majority of the voters is back")
	case len(members) > 1 && masters < 3:
		st.Problems = append(st.Problems, fmt.Sprintf("%d masters: the loss of one stops control; three survive it", masters))
	}
	return st, nil
}

// InitCluster makes a cluster of one in an empty data directory.
func InitCluster(_ context.Context, cfg Config) (st ClusterStatus, err error) {
	cfg, err = cfg.withDefaults()
	if err != nil {
		return st, err
	}
	lock, err := openData(cfg)
	if err != nil {
		return st, err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	dir := filepath.Join(cfg.Data, controlName)
	if _, err := os.Stat(filepath.Join(dir, "node.json")); !errors.Is(err, fs.ErrNotExist) {
		return st, &NotEmptyError{cfg.Data, "a node"}
	}
	n, err := raft.Open(raft.Config{Dir: dir, Log: cfg.ControlLog})
	if err != nil {
		return st, err
	}
	st.Cluster, st.Self = n.Cluster(), n.ID()
	if err := n.Close(); err != nil {
		return st, err
	}
	_, err = pki.Open(pki.Config{Dir: filepath.Join(cfg.Data, tlsName), Name: st.Cluster.String(), Hosts: pki.LocalHosts, Cluster: st.Cluster,
		Node: st.Self})
	return st, err
}

// poolsHere gives the driver the backends that this node can reach: other nodes' disks are theirs.
type poolsHere struct {
	*exports.Pools
	b *base
}

// Space implements vpool.Engine.
func (p poolsHere) Space(id uuid.UUID) (vpool.Space, bool) { return p.b.space(id) }

// AddPool implements vpool.Engine.
func (p poolsHere) AddPool(ctx context.Context, vp state.VPool) error {
	if vp.Backend.Node != uuid.Nil && vp.Backend.Node != p.b.raft.ID() {
		return nil
	}
	return p.Pools.AddPool(ctx, vp)
}

const poolsEvery = 2 * time.Second

// followPools takes over vPools that other nodes made and gives up those that are gone, until ctx ends.
func (b *base) followPools(ctx context.Context) error {
	here := poolsHere{b.pools, b}
	known := make(map[uuid.UUID]bool)
	tick := time.NewTicker(poolsEvery)
	defer tick.Stop()
	for {
		now := make(map[uuid.UUID]bool)
		for _, p := range b.raft.State().View().VPools() {
			now[p.ID] = true
			if known[p.ID] {
				continue
			}
			if err := here.AddPool(ctx, p); err != nil {
				b.cfg.Log.Warn("backend of a vPool could not be opened, it is tried again", "vpool", p.Name, "err", err)
				delete(now, p.ID)
			}
		}
		for id := range known {
			if !now[id] {
				if err := here.RemovePool(ctx, id); err != nil {
					b.cfg.Log.Warn("backend of a deleted vPool could not be closed", "vpool", id, "err", err)
				}
			}
		}
		known = now
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
