package raft

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"

	"varve/control/state"
)

// Network is what a node needs of the wire between nodes.
type Network interface {
	// Transport carries raft's own messages; server addresses are node ids. Closing the node closes it if it can be.
	Transport(log hclog.Logger) (raft.Transport, error)
	// Propose hands an encoded command to another node's Node.Propose.
	Propose(ctx context.Context, to uuid.UUID, entry []byte) (Outcome, error)
	// ReadIndex asks another node's Node.ReadIndex.
	ReadIndex(ctx context.Context, to uuid.UUID) (uint64, error)
	// Peers are the other nodes that may know who leads.
	Peers() []uuid.UUID
}

// Outcome of a command that was committed and applied: what it did, or why it was refused. Term is that of its entry; 0: not known.
type Outcome struct {
	Index   uint64
	Term    uint64
	Result  state.Result
	Refusal error
}

// NotLeaderError says who may be: uuid.Nil where nobody is known.
type NotLeaderError struct{ Leader uuid.UUID }

func (e *NotLeaderError) Error() string { return "not the leader, which is " + e.Leader.String() }

// Unwrap makes it a case of ErrUnavailable for whoever does not follow the hint.
func (e *NotLeaderError) Unwrap() error { return ErrUnavailable }

// Bounds of a command or read that meets a change of leader.
const (
	proposeTimeout = 20 * time.Second
	heardPause     = 100 * time.Microsecond
	attemptTimeout = 5 * time.Second // of one try at one node: its leader may have been cut off without knowing
	leaderLook     = 50 * time.Millisecond
	retryPause     = 25 * time.Millisecond
	retryPauseMax  = 250 * time.Millisecond
)

// transport is what raft gets: with a way to close it and to slip a message in.
type transport interface {
	raft.Transport
	Close() error
}

// inserting adds messages of this node to those that come over the wire.
type inserting struct {
	raft.Transport
	rpcs chan raft.RPC
	stop chan struct{}
	done chan struct{}
	once sync.Once
	err  error
}

// The interfaces that raft looks for beyond Transport.
var (
	_ raft.WithPreVote = &inserting{}
	_ transport        = &inserting{}
)

func insert(t raft.Transport, extra <-chan raft.RPC) *inserting {
	i := &inserting{Transport: t, rpcs: make(chan raft.RPC), stop: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(i.done)
		for {
			var rpc raft.RPC
			select {
			case rpc = <-t.Consumer():
			case rpc = <-extra:
			case <-i.stop:
				return
			}
			select {
			case i.rpcs <- rpc:
			case <-i.stop:
				return
			}
		}
	}()
	return i
}

// Consumer implements raft.Transport.
func (i *inserting) Consumer() <-chan raft.RPC { return i.rpcs }

// RequestPreVote implements raft.WithPreVote.
func (i *inserting) RequestPreVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestPreVoteRequest,
	resp *raft.RequestPreVoteResponse) error {
	p, ok := i.Transport.(raft.WithPreVote)
	if !ok {
		return errors.New("transport knows no pre-vote")
	}
	return p.RequestPreVote(id, target, args, resp)
}

// Close ends the goroutine and the transport below. Raft closes it when it stops, the node if raft did not start.
func (i *inserting) Close() error {
	i.once.Do(func() {
		close(i.stop)
		<-i.done
		if c, ok := i.Transport.(raft.WithClose); ok {
			i.err = c.Close()
		}
	})
	return i.err
}

func (n *Node) connect(log hclog.Logger) (transport, error) {
	if n.cfg.Network == nil {
		_, t := raft.NewInmemTransport(raft.ServerAddress(n.id.Node.String()))
		return insert(t, n.kick), nil
	}
	t, err := n.cfg.Network.Transport(log)
	if err != nil {
		return nil, fmt.Errorf("open raft transport: %w", err)
	}
	return insert(t, n.kick), nil
}

// hurry lets the only voter stand for election at once instead of listening for a leader that cannot be.
func (n *Node) hurry() error {
	servers, err := n.Servers()
	if err != nil {
		return err
	}
	for _, s := range servers {
		if s.Voter != (s.ID == n.id.Node) {
			return nil // another voter, or not one itself
		}
	}
	if len(servers) == 0 {
		return nil
	}
	answer := make(chan raft.RPCResponse, 1)
	select {
	case n.kick <- raft.RPC{Command: &raft.TimeoutNowRequest{RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax}},
		RespChan: answer}:
	case <-n.failure.ch:
	case <-time.After(n.cfg.ElectionTimeout):
	}
	return n.failure.Err()
}

// Apply commits a command and returns what it did: nil error means it is durable and applied, here too. Errors are the
// command's own (*state.Error: nothing was changed) or ErrUnavailable.
func (n *Node) Apply(ctx context.Context, cmd state.Command) (state.Result, error) {
	return n.ApplyAs(ctx, uuid.New(), cmd)
}

// ApplyAs is Apply with the caller's command id: proposing the same id again, after an unknown outcome, does the command
// once (within state.ReplayWindow commands).
func (n *Node) ApplyAs(ctx context.Context, id uuid.UUID, cmd state.Command) (state.Result, error) {
	if err := ctx.Err(); err != nil {
		return state.Result{}, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	start := n.cfg.Now()
	entry, err := state.EncodeAfter(cmd, id, state.Time(start.UnixNano()), n.seen())
	if err != nil {
		return state.Result{}, err
	}
	out, err := n.Relay(ctx, entry)
	if err != nil {
		return state.Result{}, err
	}
	if took := n.cfg.Now().Sub(start); took > applySlow {
		n.cfg.Log.Warn("committing took long, the disk or the network of the control state is slow", "took", took)
	}
	if out.Refusal != nil {
		return state.Result{}, out.Refusal
	}
	return out.Result, nil
}

// Relay takes an encoded command to the leader, wherever that is, and returns when this node has applied it.
func (n *Node) Relay(ctx context.Context, entry []byte) (out Outcome, err error) {
	err = n.atLeader(ctx, func(ctx context.Context, leader uuid.UUID) error {
		if leader == n.id.Node {
			out, err = n.propose(ctx, entry)
		} else {
			if out, err = n.cfg.Network.Propose(ctx, leader, entry); err == nil {
				n.heard(ctx, leader, out)
			}
		}
		return err
	})
	if err != nil {
		return Outcome{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, proposeTimeout)
	defer cancel()
	return out, n.fsm.reach(ctx, out.Index)
}

// heard tells raft of a commit that the leader has told us of. Else it would hear of it with the leader's next message, which comes with the next
// entry or after CommitTimeout. What it gets is what a leader of that term may have sent after its commit: an append of no entries. Raft takes
// it only if it has the entry, of that term, and has not seen a later term since. The answer may overtake the entry, when the leader and
// others have committed it; raft would refuse the message then, so it is waited for, no longer than the leader's next message takes.
func (n *Node) heard(ctx context.Context, leader uuid.UUID, out Outcome) {
	if out.Term == 0 {
		return
	}
	pause := heardPause
	for end := time.Now().Add(n.cfg.ElectionTimeout / commitTimeouts); n.raft.LastIndex() < out.Index; pause *= 2 {
		if time.Now().After(end) {
			return
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		case <-n.failure.ch:
			return
		case <-n.closing:
			return
		}
	}
	if n.fsm.applied.Load() >= out.Index {
		return
	}
	id := raft.ServerID(leader.String())
	req := &raft.AppendEntriesRequest{RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(id),
		Addr: n.transport.EncodePeer(id, raft.ServerAddress(leader.String()))}, Term: out.Term, PrevLogEntry: out.Index, PrevLogTerm: out.Term,
		LeaderCommitIndex: out.Index}
	select {
	case n.kick <- raft.RPC{Command: req, RespChan: make(chan raft.RPCResponse, 1)}:
	case <-ctx.Done():
	case <-n.failure.ch:
	case <-n.closing:
	}
}

// Propose commits another node's encoded command if this node leads: else *NotLeaderError.
func (n *Node) Propose(ctx context.Context, entry []byte) (Outcome, error) {
	out, err := n.propose(ctx, entry)
	if err == nil {
		out.Term = n.termOf(out.Index)
	}
	return out, err
}

func (n *Node) propose(ctx context.Context, entry []byte) (Outcome, error) {
	if err := state.CheckEntry(entry); err != nil {
		return Outcome{}, err
	}
	var f raft.ApplyFuture
	err := n.wait(ctx, func() raft.Future {
		f = n.raft.Apply(entry, proposeTimeout)
		return f
	})
	if err != nil {
		return Outcome{}, err
	}
	a := f.Response().(applied)
	if errors.Is(a.err, state.ErrHalted) {
		return Outcome{}, fmt.Errorf("%w: %w", ErrUnavailable, a.err)
	}
	return Outcome{Index: a.index, Result: a.res, Refusal: a.err}, nil
}

// termOf is an entry's term, 0 where the log does not have it any more.
func (n *Node) termOf(index uint64) uint64 {
	var l raft.Log
	if err := n.log.GetLog(index, &l); err != nil {
		return 0
	}
	return l.Term
}

// Sync returns when this node has applied everything that was acknowledged anywhere before the call.
func (n *Node) Sync(ctx context.Context) error {
	return n.atLeader(ctx, func(ctx context.Context, leader uuid.UUID) (err error) {
		var index uint64
		if leader == n.id.Node {
			index, err = n.ReadIndex(ctx)
		} else {
			index, err = n.cfg.Network.ReadIndex(ctx, leader)
		}
		if err != nil {
			return err
		}
		return n.fsm.reach(ctx, index)
	})
}

// ReadIndex is the index of the last command that may have been acknowledged, if this node leads: else *NotLeaderError. The
// proof comes first: what is in the log of one who led after the question was asked includes all that was acknowledged before.
func (n *Node) ReadIndex(ctx context.Context) (uint64, error) {
	if err := n.wait(ctx, func() raft.Future { return n.raft.VerifyLeader() }); err != nil {
		return 0, err
	}
	return n.commands.last.Load(), nil
}

// atLeader tries f at who leads until it succeeds or time is up. It may have succeeded although an error is returned.
func (n *Node) atLeader(ctx context.Context, f func(context.Context, uuid.UUID) error) error {
	ctx, cancel := context.WithTimeout(ctx, proposeTimeout)
	defer cancel()
	pause := retryPause
	var hint uuid.UUID
	var last error = &NotLeaderError{}
	for turn := 0; ; turn++ {
		leader := hint
		if leader == uuid.Nil {
			leader = n.Leader()
		}
		if leader == uuid.Nil && n.cfg.Network != nil {
			if peers := n.cfg.Network.Peers(); len(peers) > 0 {
				leader = peers[turn%len(peers)] // it will say who leads
			}
		}
		hint = uuid.Nil
		if leader != uuid.Nil {
			attempt, done := n.attempt(ctx, leader)
			err := f(attempt, leader)
			done()
			if err == nil {
				return nil
			}
			last = err
			if other, ok := errors.AsType[*NotLeaderError](err); ok && other.Leader != leader && other.Leader != uuid.Nil {
				hint = other.Leader
			} else if !errors.Is(err, ErrUnavailable) {
				return err
			}
		}
		if failed := n.failure.Err(); failed != nil {
			return fmt.Errorf("%w: %w", ErrUnavailable, failed)
		}
		select {
		case <-n.closing:
			return fmt.Errorf("%w: the node is closing: %w", ErrUnavailable, last)
		case <-n.failure.ch:
			return fmt.Errorf("%w: %w", ErrUnavailable, n.failure.Err())
		case <-ctx.Done():
			if errors.Is(last, ErrUnavailable) {
				return fmt.Errorf("%w (%w)", last, ctx.Err())
			}
			return fmt.Errorf("%w: no leader: %w: %w", ErrUnavailable, ctx.Err(), last)
		case <-time.After(pause):
			pause = min(2*pause, retryPauseMax)
		}
	}
}

// attempt bounds one try at one node: it ends with its time, or when this node hears that another one leads by now. Who was cut off
// answers nobody, and its followers have elected another one long before its time is up.
func (n *Node) attempt(ctx context.Context, at uuid.UUID) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	if at == n.id.Node {
		return ctx, cancel
	}
	before := n.Leader()
	var look *time.Timer
	var mu sync.Mutex // of look
	mu.Lock()
	defer mu.Unlock()
	look = time.AfterFunc(leaderLook, func() {
		if now := n.Leader(); now != before && now != at && now != uuid.Nil {
			cancel()
			return
		}
		mu.Lock()
		defer mu.Unlock()
		if ctx.Err() == nil {
			look.Reset(leaderLook)
		}
	})
	return ctx, func() {
		cancel()
		mu.Lock()
		defer mu.Unlock()
		look.Stop()
	}
}

// seen is the index of the last command that this node has applied.
func (n *Node) seen() uint64 { return n.fsm.applied.Load() }
