package nfs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"varve/gateway/nfs/portmap"
	"varve/gateway/seat"
)

// Limits of the server; Config can lower or raise those that it names.
const (
	// FileBytesMax is FSINFO's maxfilesize.
	FileBytesMax = 64 << 40
	// TransferBytesMax is rtmax and wtmax.
	TransferBytesMax = 1 << 20

	connectionsMax = 1024
	inflightMax    = 128
	// waitingBytesMax bounds the data of all READs and WRITEs that wait for storage, of one connection and of all.
	waitingBytesMax       = 16 << 20
	waitingBytesServerMax = 256 << 20
	// unsentBytesMax: a connection whose client does not take its replies is not read from while it has more than this.
	unsentBytesMax = 4 << 20
	// burstBytesMax: replies of one burst are sent when they have come to this.
	burstBytesMax = 256 << 10

	stuckWriteTimeout = 60 * time.Second
	recordTimeout     = 30 * time.Second
	strangerTimeout   = 30 * time.Second
	largeBufferIdle   = 2 * time.Second
	drainTimeout      = 10 * time.Second
	// strangerRecordBytesMax is the longest record taken from a client that may use no export.
	strangerRecordBytesMax = 16 << 10
)

// Config of a Server. Namespace and Verifier must be set.
type Config struct {
	Namespace Namespace
	// Verifier is the write verifier: it changes whenever accepted, not yet durable data may have been lost.
	Verifier func() [8]byte
	Log      *slog.Logger
	// Observe, if not nil, is told every answered call. It must be quick and may be called from several goroutines.
	Observe func(Observation)
	// Connections and Inflight (per connection) replace their limits if they are above 0.
	Connections, Inflight int
	// Seats, when set, are for busy connections.
	Seats *seat.Seats
	// Drain, if above 0, is how long Run waits at its end for calls in flight, instead of 10 s.
	Drain time.Duration
}

// Observation is one answered call.
type Observation struct {
	// Procedure is "READ", "MOUNT.MNT" and so on.
	Procedure string
	Status    Status
	// Bytes of data read or written.
	Bytes    int
	Duration time.Duration
}

// Stats are counts since the server was made, but for Connections, which are open now.
type Stats struct {
	Connections, Accepted, Refused int64
	// Calls answered; Denied for credentials or RPC version; Replayed from the duplicate request cache.
	Calls, Denied, Replayed int64
	// Waited counts calls that could not be answered without waiting for storage.
	Waited int64
}

// Server serves NFS version 3 and MOUNT version 3.
type Server struct {
	cfg      Config
	log      *slog.Logger
	table    atomic.Pointer[exportTable]
	port     atomic.Uint32 // that Run listens on
	files    files
	changes  changes
	replays  replays
	mounts   mounts
	contacts contacts
	forward  forward
	waiting  *semaphore.Weighted // bytes of calls that wait for storage
	buffers  sync.Pool           // of *[bufferBytes]byte

	mu    sync.Mutex
	conns map[*conn]struct{}

	accepted, refused, calls, denied, replayed, waited atomic.Int64
}

// New makes a server. It starts nothing.
func New(cfg Config) *Server {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Connections <= 0 {
		cfg.Connections = connectionsMax
	}
	if cfg.Inflight <= 0 {
		cfg.Inflight = inflightMax
	}
	if cfg.Drain <= 0 {
		cfg.Drain = drainTimeout
	}
	s := &Server{
		cfg:     cfg,
		log:     cfg.Log,
		waiting: semaphore.NewWeighted(waitingBytesServerMax),
		conns:   make(map[*conn]struct{}),
	}
	s.files.ns = cfg.Namespace
	s.forward.init(s)
	return s
}

// Stats returns the server's counts.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	open := len(s.conns)
	s.mu.Unlock()
	return Stats{
		Connections: int64(open), Accepted: s.accepted.Load(), Refused: s.refused.Load(), Calls: s.calls.Load(),
		Denied: s.denied.Load(), Replayed: s.replayed.Load(), Waited: s.waited.Load(),
	}
}

// Run serves NFS and MOUNT on ln until ctx ends; then it answers what is in flight, closes, and returns nil. It is called
// once.
func (s *Server) Run(ctx context.Context, ln net.Listener) error {
	if a, ok := ln.Addr().(*net.TCPAddr); ok {
		s.port.Store(uint32(a.Port))
		defer s.port.Store(0)
	}
	// Calls go on while the server drains, so they have a context of their own.
	calls, stopCalls := context.WithCancel(context.WithoutCancel(ctx))
	defer stopCalls()
	var forwards sync.WaitGroup
	forwards.Go(func() { s.forward.run(calls) })

	var serving sync.WaitGroup
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.accept(ctx, calls, ln, &serving) })
	g.Go(func() error {
		<-ctx.Done()
		return ln.Close()
	})
	g.Go(func() error {
		s.sweep(ctx)
		return nil
	})
	err := g.Wait()
	if errors.Is(err, net.ErrClosed) {
		err = nil
	}

	s.each(func(c *conn) { c.stop() })
	drained := make(chan struct{})
	go func() {
		serving.Wait()
		close(drained)
	}()
	select {
	case <-drained:
	case <-time.After(s.cfg.Drain):
		s.log.Warn("nfs calls did not end in time", "timeout", s.cfg.Drain)
		stopCalls()
		s.each(func(c *conn) { c.abandon() })
		<-drained
	}
	stopCalls()
	forwards.Wait()
	s.files.close()
	return err
}

// RunPortmap answers portmapper calls on TCP and UDP at addr ("10.0.0.1:111") until ctx ends.
func (s *Server) RunPortmap(ctx context.Context, addr string) error {
	return portmap.Run(ctx, addr, s.mappings)
}

// ServePortmap is RunPortmap on sockets that are open already, which it closes.
func (s *Server) ServePortmap(ctx context.Context, tcp []net.Listener, udp []net.PacketConn) error {
	return portmap.Serve(ctx, tcp, udp, s.mappings)
}

func (s *Server) mappings() []portmap.Mapping {
	port := s.port.Load()
	if port == 0 {
		return nil
	}
	return []portmap.Mapping{
		{Program: nfsProgram, Version: nfsVersion, Protocol: portmap.TCP, Port: port},
		{Program: mountProgram, Version: mountVersion, Protocol: portmap.TCP, Port: port},
	}
}

func (s *Server) each(f func(*conn)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		f(c)
	}
}

func (s *Server) accept(ctx, calls context.Context, ln net.Listener, serving *sync.WaitGroup) error {
	for {
		nc, err := ln.Accept()
		if ctx.Err() != nil {
			if err == nil {
				nc.Close()
			}
			return nil
		}
		if err != nil {
			var temporary net.Error
			if !errors.As(err, &temporary) || errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("accept nfs connection on %s: %w", ln.Addr(), err)
			}
			// Out of descriptors, most likely: give connections time to end.
			s.log.Warn("cannot accept nfs connection", "err", err)
			select {
			case <-time.After(50 * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		}
		c := s.admit(nc)
		if c == nil {
			s.refused.Add(1)
			nc.Close()
			continue
		}
		s.accepted.Add(1)
		serving.Go(func() {
			c.serve(calls)
			s.mu.Lock()
			delete(s.conns, c)
			s.mu.Unlock()
		})
	}
}

// admit takes a connection if there is room. When there is none, the connection that has been silent longest since it was
// accepted gives way, so that idle connections cannot keep others out; one that has made a call never does.
func (s *Server) admit(nc net.Conn) *conn {
	peer := peerAddr(nc)
	c := newConn(s, nc, peer, time.Now())
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.conns) >= s.cfg.Connections {
		var oldest *conn
		for o := range s.conns {
			if !o.spoke.Load() && !o.stopping.Load() && (oldest == nil || o.accepted.Before(oldest.accepted)) {
				oldest = o
			}
		}
		if oldest == nil || len(s.conns) >= s.cfg.Connections+s.cfg.Connections/8 {
			return nil
		}
		oldest.stop()
	}
	s.conns[c] = struct{}{}
	return c
}

// sweep releases files that nobody uses.
func (s *Server) sweep(ctx context.Context) {
	t := time.NewTicker(fileIdle / 3)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-t.C:
			s.files.sweep(now.Add(-fileIdle))
		}
	}
}

func peerAddr(nc net.Conn) netip.Addr {
	a, ok := nc.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return netip.Addr{}
	}
	return a.AddrPort().Addr().Unmap().WithZone("")
}
