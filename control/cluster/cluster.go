// Package cluster connects the nodes of a cluster: one port with mutual TLS for everything between them, the way in for a new
// node, and the care for raft's membership.
//
//	c, err := cluster.New(cluster.Config{…})       // starts nothing
//	node, err := raft.Open(raft.Config{Network: c, …})
//	c.Attach(node); go c.Run(ctx)                   // before node.Ready: others have to be let in
//	c.Status(ctx) · c.CreateToken(ctx, role, ttl)
//	cluster.Join(ctx, token, JoinConfig{…})         // makes a data directory that of a new node of the cluster
//
// # The node port
//
// TLS 1.3. ALPN says what a connection is for; both ends show a certificate of the cluster's authority that names cluster and
// node (package pki), and both check the other's: same cluster, the node that was meant, not one that was removed.
//
//	varve-raft/1   raft's messages
//	varve-rpc/1    HTTP/1.1: POST /rpc/NAME, JSON answers; commands to the leader, read indexes, pings, hashes, signing
//	varve-join/1   HTTP/1.1: POST /join; the one protocol without a client certificate
//	others         Handle: DTL, forwarded I/O
//
// # Joining
//
//	varve_join_ + base64url(JSON {a: addresses, h: SHA-256 of the CA certificate, s: secret})
//
//	joiner: connect, compare the CA certificate's hash with the token's, only then send the secret and two signing requests
//	any node: hand it to the leader
//	leader: commit UseJoinToken (secret's hash known, not expired, not used by another) -> the node has a record and a role
//	        sign the requests; the answer is certificates, cluster id and the addresses of the nodes
//	joiner: write certificates, keys of sealed secrets, peers and identity (phase joining); the next start follows the leader's log
//
// The secret is 256 random bits, state holds its SHA-256, and using it is one command, so two joiners cannot both win. The same
// joiner may ask again with the same key.
//
// # Membership: every second, on the leader, one change at a time
//
//	raft server without a record        remove (a leader that is to go hands on the lead first)
//	record without a raft server        add, without a vote
//	voter whose role is extra           take the vote
//	masters that follow closely         get a vote, two at a time, so that voters are 1, 3 or 5
//	voter that is marked offline        its vote goes to a spare master, if there is one
//
// Votes are not taken just because a voter is silent: an operator says who is gone.
//
// # Every node, every few seconds
//
// compares hashes of its state with the others' (the minority halts), fetches the authority's key if it is a master without it,
// renews certificates, keeps peers.json, and ends when it finds itself removed.
package cluster

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"varve/control/durable"
	"varve/control/pki"
	"varve/control/raft"
	"varve/control/state"
)

const (
	peersFile  = "peers.json"
	careEvery  = time.Second
	hashEvery  = 5 * time.Second
	renewEvery = time.Hour
	// peersBytesMax bounds what is read of peers.json.
	peersBytesMax = 1 << 20
)

// Config of the node's part.
type Config struct {
	// Dir is the control directory.
	Dir           string
	Cluster, Self uuid.UUID
	PKI           *pki.Server
	// Listener is the node port; Advertise is its address as other nodes reach it at the moment.
	Listener  net.Listener
	Advertise func() string
	Version   string
	// Secrets gives the keys of sealed secrets for a node that joins; nil where there are none.
	Secrets func() ([]byte, error)
	Log     *slog.Logger
}

// Cluster is this node's connection to the others.
type Cluster struct {
	cfg    Config
	stream *stream
	client *http.Client
	rpc    *handOver
	joins  *handOver
	kick   chan struct{}

	// mu guards what is below.
	mu       sync.Mutex
	node     *raft.Node
	peers    map[uuid.UUID]string
	told     map[uuid.UUID]string // what nodes said of themselves since this one started
	conns    map[*peerConn]struct{}
	handlers map[string]func(context.Context, net.Conn, uuid.UUID)
	joined   []time.Time // of join requests, for their rate
}

// New loads the peers of the last run.
func New(cfg Config) (*Cluster, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	c := &Cluster{cfg: cfg, kick: make(chan struct{}, 1), peers: make(map[uuid.UUID]string), told: make(map[uuid.UUID]string), conns: make(map[*peerConn]struct{}),
		handlers: make(map[string]func(context.Context, net.Conn, uuid.UUID))}
	c.stream = &stream{c: c, in: newHandOver(cfg.Self.String())}
	c.rpc, c.joins = newHandOver(cfg.Self.String()), newHandOver(cfg.Self.String())
	c.client = &http.Client{Transport: &http.Transport{
		DialTLSContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			host, _, err := net.SplitHostPort(addr)
			if err != nil {
				return nil, err
			}
			id, err := uuid.Parse(host)
			if err != nil {
				return nil, err
			}
			return c.Dial(ctx, id, protoRPC)
		},
		MaxIdleConnsPerHost: 32, IdleConnTimeout: time.Minute, DisableCompression: true, MaxResponseHeaderBytes: 16 << 10,
	}}
	var err error
	c.peers, err = loadPeers(cfg.Dir)
	return c, err
}

func loadPeers(dir string) (map[uuid.UUID]string, error) {
	peers := make(map[uuid.UUID]string)
	path := filepath.Join(dir, peersFile)
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return peers, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read peers: %w", err)
	}
	if info.Size() > peersBytesMax {
		return nil, fmt.Errorf("read peers: %s has %d bytes", path, info.Size())
	}
	b, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(b, &peers)
	}
	if err != nil {
		return nil, fmt.Errorf("read peers from %s (an object of node id to host:port): %w", path, err)
	}
	return peers, nil
}

func savePeers(dir string, peers map[uuid.UUID]string) error {
	b, err := json.MarshalIndent(peers, "", " ")
	if err != nil {
		return fmt.Errorf("encode peers: %w", err)
	}
	return durable.Replace(dir, peersFile, append(b, '\n'), 0o600)
}

// Attach gives it the raft node, whose messages it carries.
func (c *Cluster) Attach(n *raft.Node) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.node = n
}

func (c *Cluster) raft() *raft.Node {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.node
}

// Handle lets f serve the incoming connections of one more protocol. f closes the connection. Call it before Run.
func (c *Cluster) Handle(protocol string, f func(ctx context.Context, conn net.Conn, from uuid.UUID)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.handlers[protocol] = f
}

// Run serves the node port and cares for the cluster until ctx ends.
func (c *Cluster) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return c.accept(ctx) })
	g.Go(func() error { return c.serveHTTP(ctx, c.rpc, c.rpcHandler()) })
	g.Go(func() error { return c.serveHTTP(ctx, c.joins, c.joinHandler()) })
	g.Go(func() error { return c.care(ctx) })
	err := g.Wait()
	c.client.CloseIdleConnections()
	return err
}

// care is what a node does for the cluster all the time.
func (c *Cluster) care(ctx context.Context) error {
	tick := time.NewTicker(careEvery)
	defer tick.Stop()
	var hashed, renewed time.Time
	compared := make(map[uint64]bool)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.kick:
		case <-tick.C:
		}
		n := c.raft()
		if n == nil {
			continue
		}
		if n.State().View().NodeRemoved(c.cfg.Self) {
			return c.leave(ctx, n)
		}
		if n.Leader() == uuid.Nil {
			c.announce(ctx)
		}
		if err := c.keepPeers(n); err != nil {
			return err
		}
		c.dropRemoved(n)
		if n.IsLeader() {
			if err := c.arrange(ctx, n); err != nil && ctx.Err() == nil {
				c.cfg.Log.Warn("membership of the control cluster could not be changed, it is tried again", "err", err)
			}
		}
		if err := c.keepKey(ctx, n); err != nil && ctx.Err() == nil {
			c.cfg.Log.Warn("the authority's key could not be fetched, it is tried again", "err", err)
		}
		if time.Since(hashed) > hashEvery {
			hashed = time.Now()
			c.compareHashes(ctx, n, compared)
		}
		if time.Since(renewed) > renewEvery {
			renewed = time.Now()
			if err := c.cfg.PKI.Renew(ctx); err != nil && ctx.Err() == nil {
				c.cfg.Log.Warn("certificates could not be renewed, it is tried again", "err", err,
					"expires", c.cfg.PKI.NodeExpires())
			}
		}
	}
}

// announce tells the others where this node is: a leader that knows only its old address cannot reach it, and it can register
// nothing before that.
func (c *Cluster) announce(ctx context.Context) {
	for _, id := range c.Peers() {
		if _, err := c.ping(ctx, id); err != nil {
			c.cfg.Log.Debug("a node does not answer", "peer", id, "err", err)
		}
	}
}

// ErrRemoved: the cluster has taken this node out.
var ErrRemoved = errors.New("this node was removed from its cluster")

// leave ends a node that finds itself removed. A leader hands on the lead, so that another one takes it out of raft.
func (c *Cluster) leave(ctx context.Context, n *raft.Node) error {
	for n.IsLeader() && ctx.Err() == nil {
		if err := n.TransferLeadership(ctx); err != nil {
			c.cfg.Log.Warn("the lead could not be handed on, it is tried again", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(careEvery / 4):
		}
	}
	if err := n.MarkRemoved(); err != nil {
		return err
	}
	n.Fail(ErrRemoved)
	return ErrRemoved
}

// keepPeers writes the nodes' addresses down: a restarted node knows its state only when it has found the others.
func (c *Cluster) keepPeers(n *raft.Node) error {
	now := make(map[uuid.UUID]string)
	for _, m := range n.State().View().Nodes() {
		if m.ID != c.cfg.Self && m.Peer != "" {
			now[m.ID] = m.Peer
		}
	}
	if len(now) == 0 {
		return nil // alone, or not told yet
	}
	c.mu.Lock()
	same := maps.Equal(now, c.peers)
	c.peers = now
	c.mu.Unlock()
	if same {
		return nil
	}
	return savePeers(c.cfg.Dir, now)
}

// address is where a node's port is.
func (c *Cluster) address(id uuid.UUID) (string, error) {
	c.mu.Lock()
	told := c.told[id]
	c.mu.Unlock()
	if told != "" {
		return told, nil
	}
	if n := c.raft(); n != nil {
		if m, err := n.State().View().Node(id); err == nil && m.Peer != "" {
			return m.Peer, nil
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if a := c.peers[id]; a != "" {
		return a, nil
	}
	return "", fmt.Errorf("address of node %s is not known", id)
}

// Peers implements raft.Network.
func (c *Cluster) Peers() []uuid.UUID {
	ids := make(map[uuid.UUID]bool)
	if n := c.raft(); n != nil {
		for _, m := range n.State().View().Nodes() {
			ids[m.ID] = true
		}
	}
	c.mu.Lock()
	for id := range c.peers {
		ids[id] = true
	}
	c.mu.Unlock()
	delete(ids, c.cfg.Self)
	out := make([]uuid.UUID, 0, len(ids))
	for id := range ids {
		out = append(out, id)
	}
	return out
}

// keepKey makes masters able to sign, and extras not.
func (c *Cluster) keepKey(ctx context.Context, n *raft.Node) error {
	view := n.State().View()
	self, err := view.Node(c.cfg.Self)
	if err != nil {
		return nil // not registered yet
	}
	has := c.cfg.PKI.HasCAKey()
	switch {
	case self.Role == state.RoleMaster && !has:
		var errs []error
		for _, m := range view.Nodes() {
			if m.ID == c.cfg.Self || m.Role != state.RoleMaster || m.Offline {
				continue
			}
			var answer keyAnswer
			if err := c.call(ctx, m.ID, "ca-key", nil, &answer); err != nil {
				errs = append(errs, err)
				continue
			}
			return c.cfg.PKI.TakeCAKey(answer.Key)
		}
		return errors.Join(errs...)
	case self.Role == state.RoleExtra && has:
		for _, m := range view.Nodes() {
			if m.ID == c.cfg.Self || m.Role != state.RoleMaster {
				continue
			}
			if pong, err := c.ping(ctx, m.ID); err == nil && pong.Signs {
				return c.cfg.PKI.DropCAKey()
			}
		}
	}
	return nil
}

// compareHashes halts this node if its state is not that of the majority of those that answer.
func (c *Cluster) compareHashes(ctx context.Context, n *raft.Node, compared map[uint64]bool) {
	mine := n.Hashes()
	open := false
	for _, h := range mine {
		open = open || !compared[h.Index]
	}
	if !open {
		return
	}
	type votes struct{ same, other int }
	count := make(map[uint64]*votes)
	for _, id := range c.Peers() {
		var theirs []raft.StateHash
		if err := c.call(ctx, id, "hashes", nil, &theirs); err != nil {
			continue
		}
		for _, t := range theirs {
			for _, m := range mine {
				if m.Index != t.Index || compared[m.Index] {
					continue
				}
				v := count[m.Index]
				if v == nil {
					v = &votes{}
					count[m.Index] = v
				}
				if m.Hash == t.Hash {
					v.same++
				} else {
					v.other++
				}
			}
		}
	}
	for index, v := range count {
		if v.other > 0 {
			c.cfg.Log.Error("the state of the nodes differs", "index", index, "same", v.same, "other", v.other)
		}
		// Of two that differ the leader's counts.
		if v.other > v.same+1 || v.other == v.same+1 && !n.IsLeader() {
			n.Fail(fmt.Errorf("%w at entry %d: %d agree, %d do not; move %s away and join again", raft.ErrDiverged, index, v.same,
				v.other, c.cfg.Dir))
			return
		}
		compared[index] = true
	}
	if len(compared) > 1024 {
		clear(compared)
	}
}

// clientTLS is for a connection to one node.
func (c *Cluster) clientTLS(id uuid.UUID, protocol string) *tls.Config {
	conf := c.cfg.PKI.NodeTLS()
	conf.ServerName, conf.NextProtos = id.String(), []string{protocol}
	conf.VerifyConnection = func(cs tls.ConnectionState) error {
		peer, err := c.check(cs)
		if err == nil && peer != id {
			err = fmt.Errorf("node %s answers where %s was expected", peer, id)
		}
		return err
	}
	return conf
}

// check says who is at the other end, if that one may be talked to.
func (c *Cluster) check(cs tls.ConnectionState) (uuid.UUID, error) {
	if len(cs.PeerCertificates) == 0 {
		return uuid.Nil, errors.New("no certificate")
	}
	peer, err := pki.PeerOf(cs.PeerCertificates[0])
	if err != nil {
		return uuid.Nil, err
	}
	if peer.Cluster != c.cfg.Cluster {
		return uuid.Nil, fmt.Errorf("node %s is of cluster %s", peer.Node, peer.Cluster)
	}
	if n := c.raft(); n != nil && n.State().View().NodeRemoved(peer.Node) {
		return uuid.Nil, fmt.Errorf("node %s was removed", peer.Node)
	}
	return peer.Node, nil
}

// HasPeers says whether the node with this control directory is one of several.
func HasPeers(dir string) bool {
	peers, err := loadPeers(dir)
	return err != nil || len(peers) > 0
}
