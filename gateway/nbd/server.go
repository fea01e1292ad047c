package nbd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"varve/gateway/seat"
)

// TLSMode says what STARTTLS is to a server.
type TLSMode int

const (
	// TLSOff: STARTTLS is not supported.
	TLSOff TLSMode = iota
	// TLSOptional: clients choose. Exports may insist, by ErrTLSRequired.
	TLSOptional
	// TLSRequired: nothing but STARTTLS and ABORT is answered before it.
	TLSRequired
)

// Config of a Server. Exports is required, the rest has defaults.
type Config struct {
	Exports Exports

	// TLS is the mode; TLSConfig brings the certificate (or GetCertificate, to change it while serving). Only x509:
	// Go's crypto/tls has no pre-shared keys.
	TLS       TLSMode
	TLSConfig *tls.Config
	// ClientCAs, when set, makes every TLS client show a certificate that one of them signed.
	ClientCAs *x509.CertPool
	// Identify names the client of a finished TLS handshake, for Peer.Identity; an error ends the connection. Without
	// it the common name of a verified client certificate is taken.
	Identify func(tls.ConnectionState) (string, error)

	Limits Limits
	// Seats, when set, are for busy connections.
	Seats *seat.Seats
	// Quirks accepts what the client of pojntfx/go-nbd sends: client flags of 0, and GO with a length of 0 before its
	// data. Meant for a local socket that serves only that client.
	Quirks bool

	Log     *slog.Logger
	Metrics prometheus.Registerer
}

// Limits on what clients can make the server spend. Zero values take the defaults named.
type Limits struct {
	Connections      int           // 1,024 connections; more are closed at once
	Handshakes       int           // 256 of them not yet in transmission
	HandshakesPerIP  int           // 16 of those from one address are served at a time, the others wait their turn
	HandshakeTimeout time.Duration // 10 s from accept to transmission
	InFlight         int           // 128 requests per connection; then it is not read
	PayloadBytes     int64         // 256 MiB of request and reply data outside the connections' own small buffers
	StuckTimeout     time.Duration // 60 s without progress of a write, or of a payload being read
	StuckTimeoutLow  time.Duration // 5 s, for those that hold payload memory which others wait for
	DrainTimeout     time.Duration // 10 s for requests in flight when the server stops
}

const (
	payloadMax      = 32 << 20 // longest READ and WRITE, announced as maximum block size
	optionMax       = 8 << 10  // longest option payload
	optionSkipMax   = 64 << 10 // longest option payload that is read past; a longer one ends the connection
	nameMax         = 4096     // longest export name and metadata query (protocol)
	optionsMax      = 64       // options of one handshake
	blockMin        = 512      // smallest request to who negotiated block sizes
	blockPreferred  = 4096
	extentsMax      = 8192      // extents in one block status reply
	queuedMax       = 256 << 10 // unsent reply bytes at which a connection is not read any more
	outstandingMax  = 32 << 20  // payload memory of one connection, unless a single request needs more
	inlineReadMax   = 128 << 10 // longest read that shares a buffer with its neighbours
	acceptRetryMax  = time.Second
	lowMemoryPeriod = time.Second
)

func (l Limits) withDefaults() Limits {
	def := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	defTime := func(v *time.Duration, d time.Duration) {
		if *v <= 0 {
			*v = d
		}
	}
	def(&l.Connections, 1024)
	def(&l.Handshakes, 256)
	def(&l.HandshakesPerIP, 16)
	def(&l.InFlight, 128)
	l.InFlight = min(l.InFlight, 1<<16) // a slot's number has 16 bits
	if l.PayloadBytes <= 0 {
		l.PayloadBytes = 256 << 20
	}
	l.PayloadBytes = max(l.PayloadBytes, 2*payloadMax)
	defTime(&l.HandshakeTimeout, 10*time.Second)
	defTime(&l.StuckTimeout, 60*time.Second)
	defTime(&l.StuckTimeoutLow, 5*time.Second)
	defTime(&l.DrainTimeout, 10*time.Second)
	return l
}

// Server serves the exports of one node on any number of listeners.
type Server struct {
	cfg     Config
	log     *slog.Logger
	metrics *metrics
	tls     *tls.Config
	pool    buffers
	payload *semaphore.Weighted
	admit   *admission

	accepted atomic.Int64
	draining atomic.Bool
	wg       sync.WaitGroup // one per accepted connection

	mu    sync.Mutex
	conns map[*conn]struct{} // in transmission
}

// New wires a server. Run starts it.
func New(cfg Config) *Server {
	cfg.Limits = cfg.Limits.withDefaults()
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{
		cfg:     cfg,
		log:     cfg.Log,
		payload: semaphore.NewWeighted(cfg.Limits.PayloadBytes),
		admit:   newAdmission(cfg.Limits),
		conns:   make(map[*conn]struct{}),
	}
	if cfg.TLSConfig != nil {
		s.tls = cfg.TLSConfig.Clone()
		s.tls.MinVersion = max(s.tls.MinVersion, tls.VersionTLS12)
		if cfg.ClientCAs != nil {
			s.tls.ClientCAs, s.tls.ClientAuth = cfg.ClientCAs, tls.RequireAndVerifyClientCert
		}
	}
	s.metrics = newMetrics(s, cfg.Metrics)
	return s
}

// Run serves the listeners and closes them. When ctx ends it stops accepting, hangs up on handshakes, lets every
// connection finish and answer the requests it has read, for at most the drain timeout, and returns nil. A listener
// that fails for good ends Run with an error.
func (s *Server) Run(ctx context.Context, listeners ...net.Listener) error {
	if err := s.check(); err != nil {
		for _, l := range listeners {
			l.Close()
		}
		return err
	}
	forced, force := context.WithCancel(context.WithoutCancel(ctx))
	defer force()
	g, accepting := errgroup.WithContext(ctx)
	for _, l := range listeners {
		s.log.Info("serving NBD", "address", l.Addr().String(), "network", l.Addr().Network())
		g.Go(func() error { return s.accept(accepting, forced, l) })
	}
	g.Go(func() error {
		<-accepting.Done()
		for _, l := range listeners {
			l.Close()
		}
		return nil
	})
	err := g.Wait()
	s.drain(force)
	return err
}

func (s *Server) check() error {
	switch {
	case s.cfg.Exports == nil:
		return errors.New("nbd: no exports configured")
	case s.cfg.TLS != TLSOff && s.tls == nil:
		return errors.New("nbd: TLS is on and there is no certificate")
	}
	return nil
}

// accept takes connections from l until ctx ends. Those it starts live in the context forced.
func (s *Server) accept(ctx, forced context.Context, l net.Listener) error {
	var pause time.Duration
	for {
		nc, err := l.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				nc.Close()
			}
			return nil
		case err != nil && !retryAccept(err):
			return fmt.Errorf("accept on %s: %w", l.Addr(), err)
		case err != nil:
			pause = min(max(2*pause, 5*time.Millisecond), acceptRetryMax)
			s.log.Warn("accepting NBD connections is held up", "address", l.Addr().String(), "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
			continue
		}
		pause = 0
		if s.accepted.Add(1) > int64(s.cfg.Limits.Connections) {
			s.accepted.Add(-1)
			s.metrics.refused.WithLabelValues("connections").Inc()
			nc.Close()
			continue
		}
		s.wg.Go(func() {
			defer s.accepted.Add(-1)
			s.serve(forced, nc)
		})
	}
}

// serve carries one connection from its first byte to its last.
func (s *Server) serve(ctx context.Context, nc net.Conn) {
	defer nc.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	peer := peerOf(nc)
	if tc, ok := nc.(*net.TCPConn); ok {
		if err := errors.Join(tc.SetNoDelay(true), tc.SetKeepAlive(true)); err != nil {
			s.log.Debug("socket options not set", "peer", peer.Addr, "err", err)
		}
	}
	ticket, err := s.admit.enter(ctx, peer, nc)
	if err != nil {
		s.metrics.refused.WithLabelValues("handshakes").Inc()
		s.log.Debug("NBD handshake refused", "peer", peer.Addr, "err", err)
		return
	}
	c, err := s.negotiate(ctx, cancel, nc, peer)
	ticket.leave()
	if err != nil {
		s.metrics.handshakeErrors.Inc()
		s.log.Debug("NBD handshake ended", "peer", peer.Addr, "err", err)
		return
	}
	if c == nil {
		return // the client left
	}
	defer c.release()
	if !s.register(c) {
		return
	}
	s.log.Info("NBD export attached", "export", c.export, "peer", c.peer.Addr, "tls", c.peer.TLS, "identity", c.peer.Identity)
	err = c.transmit()
	s.unregister(c)
	s.log.Info("NBD export detached", "export", c.export, "peer", c.peer.Addr, "err", err)
}

func peerOf(nc net.Conn) Peer {
	_, local := nc.(*net.UnixConn)
	return Peer{Addr: nc.RemoteAddr(), Local: local}
}

// register makes c known to drain; false means that the server is past it.
func (s *Server) register(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining.Load() {
		return false
	}
	s.conns[c] = struct{}{}
	return true
}

func (s *Server) unregister(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
}

// connections returns those in transmission that match.
func (s *Server) connections(match func(*conn) bool) []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	var found []*conn
	for c := range s.conns {
		if match(c) {
			found = append(found, c)
		}
	}
	return found
}

// drain ends every connection: gently, then by force.
func (s *Server) drain(force func()) {
	s.mu.Lock()
	s.draining.Store(true)
	s.mu.Unlock()
	s.admit.close()
	for _, c := range s.connections(func(*conn) bool { return true }) {
		c.drain()
	}
	t := time.AfterFunc(s.cfg.Limits.DrainTimeout, func() {
		s.log.Warn("NBD drain timed out, connections are cut")
		force()
		for _, c := range s.connections(func(*conn) bool { return true }) {
			c.fail(errForced)
		}
	})
	s.wg.Wait()
	t.Stop()
}

// CloseExport hangs up on every client of the export called name, once the requests that were read are answered. It
// returns how many there were; it does not wait for them. New clients are for Exports.Open to refuse.
func (s *Server) CloseExport(name string) int {
	conns := s.connections(func(c *conn) bool { return c.export == name })
	for _, c := range conns {
		c.drain()
	}
	return len(conns)
}

// Attachment is one client of one export.
type Attachment struct {
	Export string
	Peer   Peer
	Since  time.Time
}

// Attachments lists the clients in transmission.
func (s *Server) Attachments() []Attachment {
	var list []Attachment
	for _, c := range s.connections(func(*conn) bool { return true }) {
		list = append(list, Attachment{Export: c.export, Peer: c.peer, Since: c.since})
	}
	return list
}

// acquire takes n bytes of the payload budget for c. When there are none left it waits, and ends those connections
// that hold some while their client has not moved a byte for StuckTimeoutLow.
func (s *Server) acquire(ctx context.Context, n int64) error {
	for {
		if s.payload.TryAcquire(n) {
			return nil
		}
		wait, cancel := context.WithTimeout(ctx, lowMemoryPeriod)
		err := s.payload.Acquire(wait, n)
		cancel()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		now := time.Now()
		for _, c := range s.connections(func(c *conn) bool { return c.stuckFor(now) > s.cfg.Limits.StuckTimeoutLow }) {
			s.metrics.shed.Inc()
			c.fail(errShed)
		}
	}
}

// putBuffer gives b back, and what it holds of the budget.
func (s *Server) putBuffer(c *conn, b *buffer) {
	if b.held > 0 {
		c.held.Add(-b.held)
		s.payload.Release(b.held)
		b.held = 0
	}
	s.pool.put(b)
}
