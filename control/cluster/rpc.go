package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/google/uuid"

	"varve/control/pki"
	"varve/control/raft"
	"varve/control/state"
	"varve/control/wire"
)

// Bounds of a call between nodes.
const (
	answerBytesMax = 4 << 20
	callTimeout    = 5 * time.Second
	pingTimeout    = time.Second
)

// pong is how a node is.
type pong struct {
	Node    uuid.UUID `json:"node"`
	Leader  uuid.UUID `json:"leader"`
	Applied uint64    `json:"applied"`
	Log     uint64    `json:"log"`
	Version string    `json:"version"`
	Signs   bool      `json:"signs"` // has the authority's key
	Expires time.Time `json:"expires"`
}

// hello says where who asks is.
type hello struct {
	Address string `json:"address"`
}

type keyAnswer struct {
	Key []byte `json:"key"`
}

type certAnswer struct {
	Cert []byte `json:"cert"`
}

// call asks a node. body is JSON, or nil.
func (c *Cluster) call(ctx context.Context, to uuid.UUID, name string, body, answer any) error {
	var b []byte
	var err error
	if body != nil {
		if b, err = json.Marshal(body); err != nil {
			return fmt.Errorf("encode call %s: %w", name, err)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return c.callRaw(ctx, to, name, b, answer)
}

func (c *Cluster) callRaw(ctx context.Context, to uuid.UUID, name string, body []byte, answer any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+to.String()+"/rpc/"+name, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("call %s: %w", name, err)
	}
	res, err := c.client.Do(req)
	if err != nil {
		return fmt.Errorf("%w: call %s of node %s: %w", raft.ErrUnavailable, name, to, err)
	}
	defer res.Body.Close()
	err = wire.Read(res, answerBytesMax, answer)
	if err != nil {
		return fmt.Errorf("call %s of node %s: %w", name, to, err)
	}
	return nil
}

// Propose implements raft.Network.
func (c *Cluster) Propose(ctx context.Context, to uuid.UUID, entry []byte) (raft.Outcome, error) {
	var o wire.Outcome
	if err := c.callRaw(ctx, to, "propose", entry, &o); err != nil {
		return raft.Outcome{}, err
	}
	return o.Unpack(), nil
}

// ReadIndex implements raft.Network.
func (c *Cluster) ReadIndex(ctx context.Context, to uuid.UUID) (uint64, error) {
	var index uint64
	err := c.callRaw(ctx, to, "read-index", nil, &index)
	return index, err
}

func (c *Cluster) ping(ctx context.Context, id uuid.UUID) (pong, error) {
	ctx, cancel := context.WithTimeout(ctx, pingTimeout)
	defer cancel()
	var p pong
	err := c.call(ctx, id, "ping", hello{Address: c.cfg.Advertise()}, &p)
	return p, err
}

// rpcHandler answers the other nodes. Who asks is known by certificate.
func (c *Cluster) rpcHandler() http.Handler {
	mux := http.NewServeMux()
	handle := func(name string, limit int64, f func(ctx context.Context, n *raft.Node, from uuid.UUID, body []byte) (any, error)) {
		mux.HandleFunc("POST /rpc/"+name, func(w http.ResponseWriter, r *http.Request) {
			wire.Serve(w, r, limit, func(ctx context.Context, body []byte) (any, error) {
				n := c.raft()
				if n == nil {
					return nil, fmt.Errorf("%w: the node is starting", raft.ErrUnavailable)
				}
				return f(ctx, n, fromOf(ctx), body)
			})
		})
	}
	handle("propose", state.EntryBytesMax, func(ctx context.Context, n *raft.Node, _ uuid.UUID, body []byte) (any, error) {
		o, err := n.Propose(ctx, body)
		if err != nil {
			return nil, err
		}
		return wire.Pack(o), nil
	})
	handle("read-index", 0, func(ctx context.Context, n *raft.Node, _ uuid.UUID, _ []byte) (any, error) {
		return n.ReadIndex(ctx)
	})
	handle("ping", 1<<10, func(_ context.Context, n *raft.Node, from uuid.UUID, body []byte) (any, error) {
		var h hello
		if err := json.Unmarshal(body, &h); err != nil {
			return nil, &state.Error{Err: state.ErrInvalid, Object: "ping", Detail: err.Error()}
		}
		c.mu.Lock()
		c.told[from] = h.Address
		c.mu.Unlock()
		return c.pong(n), nil
	})
	handle("hashes", 0, func(_ context.Context, n *raft.Node, _ uuid.UUID, _ []byte) (any, error) {
		return n.Hashes(), nil
	})
	handle("ca-key", 0, func(ctx context.Context, n *raft.Node, from uuid.UUID, _ []byte) (any, error) {
		if err := n.Sync(ctx); err != nil { // a role that was taken away counts at once
			return nil, err
		}
		m, err := n.State().View().Node(from)
		if err != nil {
			return nil, err
		}
		if m.Role != state.RoleMaster {
			return nil, &state.Error{Err: state.ErrConflict, Object: "node " + m.Name, Detail: "is not a master"}
		}
		key, err := c.cfg.PKI.CAKey()
		if errors.Is(err, pki.ErrNoKey) {
			return nil, fmt.Errorf("%w: %w", raft.ErrUnavailable, err)
		}
		return keyAnswer{Key: key}, err
	})
	handle("sign", 2*pki.RequestBytesMax, func(_ context.Context, _ *raft.Node, from uuid.UUID, body []byte) (any, error) {
		var r pki.Request
		if err := json.Unmarshal(body, &r); err != nil {
			return nil, &state.Error{Err: state.ErrInvalid, Object: "signing request", Detail: err.Error()}
		}
		r.Node = from // whatever it says
		der, err := c.sign(r)
		return certAnswer{Cert: der}, err
	})
	handle("join", joinBytesMax, func(ctx context.Context, n *raft.Node, _ uuid.UUID, body []byte) (any, error) {
		return c.admit(ctx, n, body)
	})
	return mux
}

func (c *Cluster) pong(n *raft.Node) pong {
	log, _, applied := n.Indexes()
	return pong{Node: c.cfg.Self, Leader: n.Leader(), Applied: applied, Log: log, Version: c.cfg.Version,
		Signs: c.cfg.PKI.HasCAKey(), Expires: c.cfg.PKI.NodeExpires()}
}

// sign makes a certificate if this node can.
func (c *Cluster) sign(r pki.Request) ([]byte, error) {
	der, err := c.cfg.PKI.SignRequest(r)
	if errors.Is(err, pki.ErrNoKey) {
		return nil, fmt.Errorf("%w: %w", raft.ErrUnavailable, err)
	}
	if err != nil {
		return nil, &state.Error{Err: state.ErrInvalid, Object: "signing request", Detail: err.Error()}
	}
	return der, nil
}

// Sign has a request of this node signed by a master: what pki.Config.Sign needs.
func (c *Cluster) Sign(ctx context.Context, r pki.Request) ([]byte, error) {
	var errs []error
	for _, id := range c.Peers() {
		var a certAnswer
		err := c.call(ctx, id, "sign", r, &a)
		if err == nil {
			return a.Cert, nil
		}
		errs = append(errs, err)
	}
	if len(errs) == 0 {
		errs = append(errs, io.EOF)
	}
	return nil, fmt.Errorf("no master could sign: %w", errors.Join(errs...))
}

// Member is a node with what this one knows of it.
type Member struct {
	state.Node
	Voter     bool
	Leader    bool
	Reachable bool
	// Lag is how many entries it is behind.
	Lag     uint64
	Err     string
	Expires time.Time // of its certificate
}

// Status asks every node how it is, at once. It needs no majority.
func (c *Cluster) Status(ctx context.Context) ([]Member, error) {
	n := c.raft()
	if n == nil {
		return nil, fmt.Errorf("%w: the node is starting", raft.ErrUnavailable)
	}
	servers, err := n.Servers()
	if err != nil {
		return nil, err
	}
	nodes := n.State().View().Nodes()
	log, _, _ := n.Indexes()
	leader := n.Leader()
	out := make([]Member, len(nodes))
	done := make(chan struct{})
	for i, m := range nodes {
		out[i] = Member{Node: m, Leader: m.ID == leader}
		for _, s := range servers {
			out[i].Voter = out[i].Voter || s.ID == m.ID && s.Voter
		}
		go func() {
			defer func() { done <- struct{}{} }()
			p, err := c.pong(n), error(nil)
			if m.ID != c.cfg.Self {
				p, err = c.ping(ctx, m.ID)
			}
			if err != nil {
				out[i].Err = err.Error()
				return
			}
			out[i].Reachable, out[i].Expires = true, p.Expires
			if log > p.Applied {
				out[i].Lag = log - p.Applied
			}
		}()
	}
	for range nodes {
		<-done
	}
	return out, nil
}
