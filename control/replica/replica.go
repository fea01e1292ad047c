// Package replica is the socket of control on its own node: other processes of the appliance keep a copy of the state through
// it, and propose commands. So the gateway reads names from its own memory and goes on doing so while control is restarted.
//
//	s := replica.NewServer(node, log); s.Serve(ctx, ln)              // in control
//	c := replica.Open(path, log); go c.Run(ctx); c.Ready(ctx)         // in the gateway
//	c.State().View() … · c.Apply(ctx, cmd) · c.Sync(ctx)              // as raft.Node has them
//
// # Following
//
//	GET /follow
//	    | "varvefol" | cluster 16 | node 16 | then frames:   | kind 1 | index 8 BE | length 8 BE | bytes |
//	kind S   the state (state.Snapshot), first
//	kind E   a command that was applied after it, in order
//	kind H   control is alive, and leads (index 1) or not (0)
//
// A copy that fell behind, or whose connection broke, begins anew with S. Entries are applied by the same code as in control, so
// the copy has the same content at the same index.
//
// # Proposing
//
//	POST /call/propose · /call/sync      as between nodes (package wire); the answer carries the index to wait for
//
// While control is away, Apply tries again with the same command id, for as long as the caller waits and at most twenty
// seconds: a restart of control is a pause to whoever changes names, and nothing to whoever reads and writes open files.
//
// Whoever can open the socket may do everything: its file is for this user alone.
package replica

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/google/uuid"

	"varve/control/raft"
	"varve/control/state"
	"varve/control/wire"
)

const (
	magic         = "varvefol"
	kindState     = 'S'
	kindEntry     = 'E'
	kindAlive     = 'H'
	aliveEvery    = 2 * time.Second
	lookEvery     = 200 * time.Millisecond
	silenceMax    = 10 * time.Second
	stateBytesMax = 16 << 30
	drainTimeout  = 2 * time.Second
)

// Server answers on the socket.
type Server struct {
	node *raft.Node
	log  *slog.Logger
	mux  *http.ServeMux
}

// NewServer wires it.
func NewServer(node *raft.Node, log *slog.Logger) *Server {
	s := &Server{node: node, log: log, mux: http.NewServeMux()}
	s.mux.HandleFunc("GET /follow", s.follow)
	s.Handle("propose", state.EntryBytesMax, func(ctx context.Context, body []byte) (any, error) {
		o, err := node.Relay(ctx, body)
		if err != nil {
			return nil, err
		}
		return wire.Pack(o), nil
	})
	s.Handle("sync", 0, func(ctx context.Context, _ []byte) (any, error) {
		if err := node.Sync(ctx); err != nil {
			return nil, err
		}
		_, _, applied := node.Indexes()
		return applied, nil
	})
	return s
}

// Handle adds a call, before Serve.
func (s *Server) Handle(name string, limit int64, f func(ctx context.Context, body []byte) (any, error)) {
	s.mux.HandleFunc("POST /call/"+name, func(w http.ResponseWriter, r *http.Request) { wire.Serve(w, r, limit, f) })
}

// Serve answers until ctx ends.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	return Serve(ctx, ln, s.mux)
}

// Serve serves calls on a local socket until ctx ends.
func Serve(ctx context.Context, ln net.Listener, h http.Handler) error {
	srv := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, MaxHeaderBytes: 16 << 10,
		BaseContext: func(net.Listener) context.Context { return ctx }}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ln) }()
	select {
	case err := <-done:
		return fmt.Errorf("serve %s: %w", ln.Addr(), err)
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

func (s *Server) follow(w http.ResponseWriter, r *http.Request) {
	feed, err := s.node.Follow()
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	defer s.node.Unfollow(feed)
	cluster, node := s.node.Cluster(), s.node.ID()
	head := append(append([]byte(magic), cluster[:]...), node[:]...)
	out := http.NewResponseController(w)
	send := func(kind byte, index uint64, body []byte) error {
		frame := binary.BigEndian.AppendUint64([]byte{kind}, index)
		frame = binary.BigEndian.AppendUint64(frame, uint64(len(body)))
		if err := out.SetWriteDeadline(time.Now().Add(silenceMax)); err != nil {
			return err
		}
		if _, err := w.Write(append(frame, body...)); err != nil {
			return err
		}
		return out.Flush()
	}
	if _, err := w.Write(head); err != nil {
		return
	}
	if err := s.sendState(w, feed.Snapshot); err != nil {
		s.log.Debug("a copy of the state went away", "err", err)
		return
	}
	if err := out.Flush(); err != nil {
		return
	}
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	var told time.Time
	var leads uint64
	for err == nil {
		var now uint64
		if s.node.IsLeader() {
			now = 1
		}
		if now != leads || time.Since(told) > aliveEvery {
			leads, told = now, time.Now()
			if err := send(kindAlive, leads, nil); err != nil {
				return
			}
		}
		select {
		case u, ok := <-feed.Updates():
			if !ok {
				return
			}
			err = send(kindEntry, u.Index, u.Entry)
		case <-look.C:
		case <-r.Context().Done():
			return
		}
	}
}

// sendState writes the snapshot twice: to count it, then to send it.
func (s *Server) sendState(w io.Writer, snap *state.Snapshot) error {
	size, err := snap.WriteTo(io.Discard)
	if err != nil {
		return err
	}
	frame := binary.BigEndian.AppendUint64([]byte{kindState}, 0)
	if _, err := w.Write(binary.BigEndian.AppendUint64(frame, uint64(size))); err != nil {
		return err
	}
	_, err = snap.WriteTo(w)
	return err
}

// Client keeps a copy.
type Client struct {
	path   string
	log    *slog.Logger
	now    func() time.Time
	store  *state.Store
	client *http.Client

	// mu guards what is below.
	mu            sync.Mutex
	cluster, node uuid.UUID
	applied       uint64
	ready         bool
	connected     bool
	leads         bool
	changed       chan struct{}
}

// Open wires a copy of what is served at a socket.
func Open(path string, log *slog.Logger) *Client {
	return &Client{path: path, log: log, now: time.Now, store: state.New(), client: NewHTTP(path), changed: make(chan struct{})}
}

// NewHTTP gives a client of the calls on a local socket; URLs have any host.
func NewHTTP(path string) *http.Client {
	return &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 32, IdleConnTimeout: time.Minute, DisableCompression: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		}}}
}

// State is the copy. It is empty before Ready.
func (c *Client) State() *state.Store { return c.store }

// ID is the node's, Cluster the cluster's; known when ready.
func (c *Client) ID() uuid.UUID {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.node
}

// Cluster is the cluster's id.
func (c *Client) Cluster() uuid.UUID {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cluster
}

// Connected says whether control is there now.
func (c *Client) Connected() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.connected
}

// Run follows until ctx ends. The error says that the copy cannot be kept: the process has to end.
func (c *Client) Run(ctx context.Context) error {
	pause := 50 * time.Millisecond
	for ctx.Err() == nil {
		err := c.followOnce(ctx)
		if fatal, ok := errors.AsType[*fatalError](err); ok {
			return fatal.err
		}
		c.mu.Lock()
		was := c.connected
		c.connected = false
		c.mu.Unlock()
		if was && ctx.Err() == nil {
			c.log.Warn("control is away, names are as they were; it is looked for", "err", err)
			pause = 50 * time.Millisecond
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
			pause = min(2*pause, time.Second)
		}
	}
	c.client.CloseIdleConnections()
	return nil
}

// fatalError: going on would show something else than control has.
type fatalError struct{ err error }

func (f *fatalError) Error() string { return f.err.Error() }

func (c *Client) followOnce(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	silence := time.AfterFunc(silenceMax, cancel)
	defer silence.Stop()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://control/follow", nil)
	if err != nil {
		return err
	}
	res, err := c.client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("follow control: status %s", res.Status)
	}
	in := res.Body
	var head [len(magic) + 32]byte
	if _, err := io.ReadFull(in, head[:]); err != nil || string(head[:len(magic)]) != magic {
		return fmt.Errorf("follow control: no header: %w", err)
	}
	cluster, node := uuid.UUID(head[len(magic):len(magic)+16]), uuid.UUID(head[len(magic)+16:])
	if c.Cluster() != uuid.Nil && (c.Cluster() != cluster || c.ID() != node) {
		return &fatalError{fmt.Errorf("control is node %s of cluster %s now, this process serves node %s of %s", node, cluster, c.ID(), c.Cluster())}
	}
	for {
		silence.Reset(silenceMax)
		var frame [17]byte
		if _, err := io.ReadFull(in, frame[:]); err != nil {
			return fmt.Errorf("follow control: %w", err)
		}
		index, n := binary.BigEndian.Uint64(frame[1:]), binary.BigEndian.Uint64(frame[9:])
		switch frame[0] {
		case kindAlive:
			c.mu.Lock()
			c.leads = index == 1
			c.mu.Unlock()
		case kindState:
			if n > stateBytesMax {
				return fmt.Errorf("follow control: a state of %d bytes", n)
			}
			if err := c.restore(in, int64(n), silence); err != nil {
				return err
			}
			c.mu.Lock()
			c.cluster, c.node, c.ready, c.connected = cluster, node, true, true
			c.advance(c.store.Index())
			c.mu.Unlock()
		case kindEntry:
			if n > state.EntryBytesMax {
				return fmt.Errorf("follow control: an entry of %d bytes", n)
			}
			entry := make([]byte, n)
			if _, err := io.ReadFull(in, entry); err != nil {
				return fmt.Errorf("follow control: %w", err)
			}
			c.store.Apply(index, entry) // a refusal is the proposer's; see Halted
			if err := c.store.Halted(); err != nil {
				return &fatalError{err}
			}
			c.mu.Lock()
			c.advance(index)
			c.mu.Unlock()
		default:
			return fmt.Errorf("follow control: frame %q", frame[0])
		}
	}
}

func (c *Client) restore(in io.Reader, n int64, silence *time.Timer) error {
	body := &io.LimitedReader{R: touching{in, silence}, N: n}
	if err := c.store.Restore(body); err != nil {
		return fmt.Errorf("follow control: %w", err)
	}
	if body.N != 0 {
		return fmt.Errorf("follow control: %d bytes after the state", body.N)
	}
	return nil
}

// touching puts the end of patience off while bytes come.
type touching struct {
	io.Reader
	silence *time.Timer
}

func (t touching) Read(p []byte) (int, error) {
	t.silence.Reset(silenceMax)
	return t.Reader.Read(p)
}

// advance tells whoever waits; mu is held.
func (c *Client) advance(index uint64) {
	c.applied = index
	close(c.changed)
	c.changed = make(chan struct{})
}

// until waits until cond, which is called with mu held.
func (c *Client) until(ctx context.Context, cond func() bool) error {
	for {
		c.mu.Lock()
		if cond() {
			c.mu.Unlock()
			return nil
		}
		changed := c.changed
		c.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("%w: the copy of the state lags: %w", raft.ErrUnavailable, ctx.Err())
		}
	}
}

// Ready waits until there is a copy.
func (c *Client) Ready(ctx context.Context) error {
	return c.until(ctx, func() bool { return c.ready })
}

const (
	patience   = 20 * time.Second
	retryPause = 50 * time.Millisecond
)

// Apply commits a command and returns when the copy has it.
func (c *Client) Apply(ctx context.Context, cmd state.Command) (state.Result, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	c.mu.Lock()
	base := c.applied
	c.mu.Unlock()
	entry, err := state.EncodeAfter(cmd, uuid.New(), state.Time(c.now().UnixNano()), base)
	if err != nil {
		return state.Result{}, err
	}
	var o wire.Outcome
	if err := c.patient(ctx, "propose", entry, &o); err != nil {
		return state.Result{}, err
	}
	out := o.Unpack()
	if err := c.until(ctx, func() bool { return c.applied >= out.Index }); err != nil {
		return state.Result{}, err
	}
	return out.Result, out.Refusal
}

// Sync returns when the copy has everything that was acknowledged anywhere before the call.
func (c *Client) Sync(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var index uint64
	if err := c.patient(ctx, "sync", nil, &index); err != nil {
		return err
	}
	return c.until(ctx, func() bool { return c.applied >= index })
}

// patient repeats a call while control is away.
func (c *Client) patient(ctx context.Context, name string, body []byte, answer any) error {
	for {
		err := wire.Call(ctx, c.client, name, body, answer)
		if err == nil || !errors.Is(err, raft.ErrUnavailable) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w (%w)", err, ctx.Err())
		case <-time.After(retryPause):
		}
	}
}

// IsLeader says whether this node's control leads, as far as is known.
func (c *Client) IsLeader() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.connected && c.leads
}
