// Package peer lets the appliances of a cluster ask each other for what only one of them has: the engine of a volume's owner, figures,
// findings, disks, keys. What all have to agree upon goes through raft instead.
//
//	p := peer.New(peer.Config{Self, Dial, Log})              // starts nothing
//	p.Handle("health", 1<<10, func(ctx, body) (any, error))  // before Run
//	go p.Run(ctx); p.Accept(ctx, conn)                        // connections that the node port, or a local socket, hands over
//	p.Call(ctx, node, "health", args, &answer)                // this node's own handlers are called without a connection
//	peer.Each[T](ctx, p, nodes, "health", args)               // all at once; who does not answer has an error
//
// A call is an HTTP/1.1 request, POST /peer/NAME with JSON both ways (package wire), over a connection of the node port with ALPN
// varve-peer/1, so both ends have proved by certificate that they are nodes of this cluster. Every node may make every call: a node that
// was taken over can do to the others what a handler does, and no more than that, so handlers check what they are given.
//
// Where control is a process of its own it has the node port; it passes connections on, in both directions, as they are, and asks the
// other process of its own node in the same way (DialSelf).
package peer

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/google/uuid"

	"varve/control/raft"
	"varve/control/wire"
)

// Protocol is the ALPN of the connections.
const Protocol = "varve-peer/1"

// Limits.
const (
	answerBytesMax    = 64 << 20
	readHeaderTimeout = 10 * time.Second
	idleTimeout       = 2 * time.Minute
	drainTimeout      = 3 * time.Second
	unknownBytesMax   = 1 << 20
	// EachTimeout is how long Each waits for a node.
	EachTimeout = 4 * time.Second
)

// Config wires Peers.
type Config struct {
	Self uuid.UUID
	// Dial connects to a node for Protocol; nil where there are no others.
	Dial func(ctx context.Context, node uuid.UUID) (net.Conn, error)
	// DialSelf says that what this process does not answer itself another process of this node does: Dial reaches it.
	DialSelf bool
	Log      *slog.Logger
}

type handler struct {
	limit int64
	do    func(ctx context.Context, body []byte) (any, error)
}

// Peers calls other nodes, and is called by them.
type Peers struct {
	cfg    Config
	client *http.Client
	in     *inbox

	mu       sync.Mutex // guards handlers
	handlers map[string]handler
}

// New wires it and starts nothing.
func New(cfg Config) *Peers {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	p := &Peers{cfg: cfg, in: newInbox(), handlers: make(map[string]handler)}
	p.client = &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			host, _, err := net.SplitHostPort(addr)
			if err != nil {
				return nil, err
			}
			id, err := uuid.Parse(host)
			if err != nil {
				return nil, err
			}
			if cfg.Dial == nil {
				return nil, errors.New("this node has no node port")
			}
			return cfg.Dial(ctx, id)
		},
		MaxIdleConnsPerHost: 8, IdleConnTimeout: time.Minute, DisableCompression: true, MaxResponseHeaderBytes: 16 << 10,
	}}
	return p
}

// Handle answers calls of a name. body is at most limit bytes. Errors of the state arrive as what they are, others as unavailability.
func (p *Peers) Handle(name string, limit int64, f func(ctx context.Context, body []byte) (any, error)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.handlers[name] = handler{limit, f}
}

// Handle1 is Handle for a call whose arguments are JSON of one type.
func Handle1[T any](p *Peers, name string, limit int64, f func(ctx context.Context, in T) (any, error)) {
	p.Handle(name, limit, func(ctx context.Context, body []byte) (any, error) {
		var in T
		if err := json.Unmarshal(body, &in); err != nil {
			return nil, fmt.Errorf("arguments of call %s: %w", name, err)
		}
		return f(ctx, in)
	})
}

func (p *Peers) handler(name string) (handler, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	h, ok := p.handlers[name]
	return h, ok
}

// Call asks a node. args become JSON, or are nil; answer is decoded into, or nil. raft.ErrUnavailable: it is not known whether the call was
// done.
func (p *Peers) Call(ctx context.Context, node uuid.UUID, name string, args, answer any) error {
	body := []byte("null")
	if args != nil {
		var err error
		if body, err = json.Marshal(args); err != nil {
			return fmt.Errorf("encode call %s: %w", name, err)
		}
	}
	if node == p.cfg.Self {
		if h, ok := p.handler(name); ok || !p.cfg.DialSelf {
			return p.callSelf(ctx, h, name, body, answer)
		}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+node.String()+"/peer/"+name, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("call %s: %w", name, err)
	}
	res, err := p.client.Do(req)
	if err != nil {
		return fmt.Errorf("%w: call %s of node %s: %w", raft.ErrUnavailable, name, node, err)
	}
	defer res.Body.Close()
	if err := wire.Read(res, answerBytesMax, answer); err != nil {
		return fmt.Errorf("call %s of node %s: %w", name, node, err)
	}
	return nil
}

func (p *Peers) callSelf(ctx context.Context, h handler, name string, body []byte, answer any) error {
	if h.do == nil {
		return fmt.Errorf("call %s: there is none", name)
	}
	out, err := h.do(ctx, body)
	if err != nil || answer == nil {
		return err
	}
	b, err := json.Marshal(out)
	if err == nil {
		err = json.Unmarshal(b, answer)
	}
	if err != nil {
		return fmt.Errorf("answer of call %s: %w", name, err)
	}
	return nil
}

// Answer is one node's.
type Answer[T any] struct {
	Node  uuid.UUID
	Value T
	Err   error
}

// Each asks nodes at once and waits EachTimeout for each. The answers are in the nodes' order.
func Each[T any](ctx context.Context, p *Peers, nodes []uuid.UUID, name string, args any) []Answer[T] {
	out := make([]Answer[T], len(nodes))
	ctx, cancel := context.WithTimeout(ctx, EachTimeout)
	defer cancel()
	var g sync.WaitGroup
	for i, node := range nodes {
		out[i].Node = node
		g.Go(func() { out[i].Err = p.Call(ctx, node, name, args, &out[i].Value) })
	}
	g.Wait()
	return out
}

// Accept hands a connection of another node over, which is closed in the end. It waits until Run takes it.
func (p *Peers) Accept(ctx context.Context, c net.Conn) { p.in.put(ctx, c) }

// Run answers calls until ctx ends.
func (p *Peers) Run(ctx context.Context) error {
	srv := &http.Server{Handler: http.HandlerFunc(p.serve), ReadHeaderTimeout: readHeaderTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: 16 << 10,
		BaseContext: func(net.Listener) context.Context { return ctx }, ErrorLog: slog.NewLogLogger(p.cfg.Log.Handler(), slog.LevelDebug)}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(p.in) }()
	var err error
	select {
	case err = <-done:
		err = fmt.Errorf("serve calls of other nodes: %w", err)
	case <-ctx.Done():
		drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
		if srv.Shutdown(drain) != nil {
			srv.Close()
		}
		cancel()
		<-done
	}
	p.client.CloseIdleConnections()
	return err
}

func (p *Peers) serve(w http.ResponseWriter, r *http.Request) {
	const prefix = "/peer/"
	if r.Method != http.MethodPost || len(r.URL.Path) <= len(prefix) || r.URL.Path[:len(prefix)] != prefix {
		http.NotFound(w, r)
		return
	}
	h, ok := p.handler(r.URL.Path[len(prefix):])
	if !ok { // an older version
		wire.Serve(w, r, unknownBytesMax, func(context.Context, []byte) (any, error) {
			return nil, errors.New("this node's version does not know the call")
		})
		return
	}
	wire.Serve(w, r, h.limit, h.do)
}

// inbox is a listener whose connections come from elsewhere.
type inbox struct {
	conns chan net.Conn
	stop  chan struct{}
	once  sync.Once
}

func newInbox() *inbox { return &inbox{conns: make(chan net.Conn), stop: make(chan struct{})} }

func (i *inbox) put(ctx context.Context, c net.Conn) {
	select {
	case i.conns <- c:
	case <-i.stop:
		c.Close()
	case <-ctx.Done():
		c.Close()
	}
}

// Accept implements net.Listener.
func (i *inbox) Accept() (net.Conn, error) {
	select {
	case c := <-i.conns:
		return c, nil
	case <-i.stop:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (i *inbox) Close() error {
	i.once.Do(func() { close(i.stop) })
	return nil
}

// Addr implements net.Listener.
func (i *inbox) Addr() net.Addr { return inboxAddr{} }

type inboxAddr struct{}

func (inboxAddr) Network() string { return Protocol }
func (inboxAddr) String() string  { return "node port" }
