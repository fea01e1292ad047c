package cluster

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"

	varveraft "varve/control/raft"
)

// Protocols of the node port.
const (
	protoRaft = "varve-raft/1"
	protoRPC  = "varve-rpc/1"
	protoJoin = "varve-join/1"
)

// Limits of the port.
const (
	handshakeTimeout = 10 * time.Second
	handshakesMax    = 64 // at a time
	connectionsMax   = 2048
	dialTimeout      = 3 * time.Second
	drainTimeout     = 3 * time.Second
	raftTimeout      = 10 * time.Second
)

// peerConn is a connection whose other end is known; uuid.Nil for one that joins.
type peerConn struct {
	net.Conn
	from   uuid.UUID
	closed func()
	once   sync.Once
}

func (p *peerConn) Close() error {
	p.once.Do(p.closed)
	return p.Conn.Close()
}

// accept takes connections until ctx ends, then closes all of them.
func (c *Cluster) accept(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { c.cfg.Listener.Close() })
	defer stop()
	var g sync.WaitGroup
	defer g.Wait()
	defer c.closeAll()
	conf := c.serverTLS()
	handshakes := make(chan struct{}, handshakesMax)
	var pause time.Duration
	for {
		raw, err := c.cfg.Listener.Accept()
		if ctx.Err() != nil {
			if err == nil {
				raw.Close()
			}
			return nil
		}
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("accept on the node port: %w", err)
			}
			pause = min(max(2*pause, 5*time.Millisecond), time.Second) // out of descriptors: others close some
			c.cfg.Log.Warn("accepting on the node port did not work, it is tried again", "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
			continue
		}
		pause = 0
		select {
		case handshakes <- struct{}{}:
		default:
			raw.Close() // too many unknown ones at once
			continue
		}
		g.Go(func() { c.receive(ctx, raw, conf, func() { <-handshakes }) })
	}
}

// receive finds out who connects and what for, and hands the connection over.
func (c *Cluster) receive(ctx context.Context, raw net.Conn, conf *tls.Config, known func()) {
	t := tls.Server(raw, conf)
	hctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	err := t.HandshakeContext(hctx)
	cancel()
	known()
	if err != nil {
		c.cfg.Log.Debug("connection refused on the node port", "from", raw.RemoteAddr(), "err", err)
		raw.Close()
		return
	}
	cs := t.ConnectionState()
	var from uuid.UUID
	if cs.NegotiatedProtocol != protoJoin {
		if from, err = c.check(cs); err != nil {
			raw.Close()
			return
		}
	}
	p, ok := c.track(t, from)
	if !ok {
		raw.Close()
		return
	}
	c.mu.Lock()
	handler := c.handlers[cs.NegotiatedProtocol]
	c.mu.Unlock()
	switch {
	case cs.NegotiatedProtocol == protoRaft:
		c.stream.in.put(ctx, newBounded(p))
	case cs.NegotiatedProtocol == protoRPC:
		c.rpc.put(ctx, p)
	case cs.NegotiatedProtocol == protoJoin:
		c.joins.put(ctx, p)
	case handler != nil:
		handler(ctx, p, from)
	default:
		p.Close()
	}
}

func (c *Cluster) serverTLS() *tls.Config {
	conf := c.cfg.PKI.NodeTLS()
	conf.SessionTicketsDisabled = true
	conf.NextProtos = []string{protoRaft, protoRPC}
	c.mu.Lock()
	for p := range c.handlers {
		conf.NextProtos = append(conf.NextProtos, p)
	}
	c.mu.Unlock()
	conf.VerifyConnection = func(cs tls.ConnectionState) error {
		if cs.NegotiatedProtocol == "" {
			return errors.New("no protocol was asked for")
		}
		_, err := c.check(cs)
		return err
	}
	join := c.cfg.PKI.NodeTLS()
	join.SessionTicketsDisabled, join.ClientAuth, join.NextProtos = true, tls.NoClientCert, []string{protoJoin}
	withCA := join.GetCertificate
	join.GetCertificate = func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
		cert, err := withCA(h)
		if err != nil {
			return nil, err
		}
		chain := *cert
		chain.Certificate = [][]byte{cert.Certificate[0], c.cfg.PKI.CACert()}
		return &chain, nil
	}
	conf.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		if slices.Equal(h.SupportedProtos, []string{protoJoin}) {
			return join, nil
		}
		return nil, nil
	}
	return conf
}

func (c *Cluster) track(conn net.Conn, from uuid.UUID) (*peerConn, bool) {
	p := &peerConn{Conn: conn, from: from}
	p.closed = func() {
		c.mu.Lock()
		delete(c.conns, p)
		c.mu.Unlock()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.conns) >= connectionsMax {
		return nil, false
	}
	c.conns[p] = struct{}{}
	return p, true
}

func (c *Cluster) closeAll() { c.closeIf(func(*peerConn) bool { return true }) }

func (c *Cluster) closeIf(which func(*peerConn) bool) {
	c.mu.Lock()
	var list []*peerConn
	for p := range c.conns {
		if which(p) {
			list = append(list, p)
		}
	}
	c.mu.Unlock()
	for _, p := range list {
		p.Close()
	}
}

// dropRemoved closes what removed nodes still have open.
func (c *Cluster) dropRemoved(n *varveraft.Node) {
	view := n.State().View()
	if len(view.RemovedNodes()) == 0 {
		return
	}
	c.closeIf(func(p *peerConn) bool { return view.NodeRemoved(p.from) })
}

// Dial connects to a node for one protocol.
func (c *Cluster) Dial(ctx context.Context, id uuid.UUID, protocol string) (net.Conn, error) {
	address, err := c.address(id)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	raw, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("connect to node %s: %w", id, err)
	}
	t := tls.Client(raw, c.clientTLS(id, protocol))
	if err := t.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, fmt.Errorf("connect to node %s at %s: %w", id, address, err)
	}
	if t.ConnectionState().NegotiatedProtocol != protocol {
		raw.Close()
		return nil, fmt.Errorf("node %s at %s does not speak %s", id, address, protocol)
	}
	p, ok := c.track(t, id)
	if !ok {
		raw.Close()
		return nil, fmt.Errorf("connect to node %s: %d connections are open", id, connectionsMax)
	}
	return p, nil
}

// handOver is a listener whose connections the port accepts.
type handOver struct {
	conns chan net.Conn
	stop  chan struct{}
	once  sync.Once
	name  string
}

func newHandOver(name string) *handOver {
	return &handOver{conns: make(chan net.Conn), stop: make(chan struct{}), name: name}
}

func (h *handOver) put(ctx context.Context, c net.Conn) {
	select {
	case h.conns <- c:
	case <-h.stop:
		c.Close()
	case <-ctx.Done():
		c.Close()
	}
}

// Accept implements net.Listener.
func (h *handOver) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.stop:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (h *handOver) Close() error {
	h.once.Do(func() { close(h.stop) })
	return nil
}

// Addr implements net.Listener: raft's address of a node is its id.
func (h *handOver) Addr() net.Addr { return nodeAddr(h.name) }

type nodeAddr string

func (nodeAddr) Network() string  { return "varve" }
func (a nodeAddr) String() string { return string(a) }

// stream is raft's view of the port.
type stream struct {
	c  *Cluster
	in *handOver
}

var _ raft.StreamLayer = &stream{}

func (s *stream) Accept() (net.Conn, error) { return s.in.Accept() }
func (s *stream) Close() error              { return s.in.Close() }
func (s *stream) Addr() net.Addr            { return s.in.Addr() }

// Dial implements raft.StreamLayer.
func (s *stream) Dial(address raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	id, err := uuid.Parse(string(address))
	if err != nil {
		return nil, fmt.Errorf("raft address %q: %w", address, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return s.c.Dial(ctx, id, protoRaft)
}

// Transport implements varveraft.Network.
func (c *Cluster) Transport(log hclog.Logger) (raft.Transport, error) {
	return raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{Stream: c.stream, MaxPool: 4, Timeout: raftTimeout, Logger: log}), nil
}

// Bounds of raft's messages, which its codec does not have. A snapshot is bounded by the state's own limits; its message is the
// only one that streams.
const (
	raftMessageMax  = 160 << 20 // 512 entries of 256 KiB, and some
	raftSnapshotMax = 64 << 30
	installSnapshot = 2
)

// bounded closes a raft connection whose peer sends more than a message may have before it gets an answer.
type bounded struct {
	net.Conn
	r     *bufio.Reader
	left  int64
	fresh bool // the next byte is a message's type
}

func newBounded(c net.Conn) *bounded {
	return &bounded{Conn: c, r: bufio.NewReaderSize(c, 64<<10), fresh: true}
}

func (b *bounded) Read(p []byte) (int, error) {
	if b.fresh {
		kind, err := b.r.Peek(1)
		if err != nil {
			return 0, err
		}
		b.left, b.fresh = raftMessageMax, false
		if kind[0] == installSnapshot {
			b.left = raftSnapshotMax
		}
	}
	if b.left <= 0 {
		return 0, io.ErrUnexpectedEOF
	}
	n, err := b.r.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	return n, err
}

// Write is an answer: the next message begins.
func (b *bounded) Write(p []byte) (int, error) {
	b.fresh = true
	return b.Conn.Write(p)
}

// serveHTTP serves what is handed over until ctx ends.
func (c *Cluster) serveHTTP(ctx context.Context, l *handOver, h http.Handler) error {
	srv := &http.Server{Handler: h, ReadHeaderTimeout: handshakeTimeout, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10,
		ReadTimeout: 30 * time.Second, WriteTimeout: time.Minute,
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			if p, ok := conn.(*peerConn); ok {
				return context.WithValue(ctx, fromKey{}, p.from)
			}
			return ctx
		}}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	select {
	case err := <-done:
		return fmt.Errorf("serve the node port: %w", err)
	case <-ctx.Done():
	}
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
	defer cancel()
	if err := srv.Shutdown(drain); err != nil {
		srv.Close()
	}
	<-done
	return nil
}

type fromKey struct{}

func fromOf(ctx context.Context) uuid.UUID {
	id, _ := ctx.Value(fromKey{}).(uuid.UUID)
	return id
}
