package nbd

import (
	"context"
	"errors"
	"net"
	"sync"
	"syscall"
	"time"
)

// Why a connection did not get to say anything.
var (
	errHandshakesFull = errors.New("too many handshakes")
	errHandshakesShut = errors.New("server stops")
)

// retryAccept tells a passing failure of accept from a broken listener.
func retryAccept(err error) bool {
	for _, passing := range []error{
		syscall.EMFILE, syscall.ENFILE, syscall.ECONNABORTED, syscall.ENOBUFS, syscall.ENOMEM, syscall.EINTR,
	} {
		if errors.Is(err, passing) {
			return true
		}
	}
	return false
}

// admission bounds the connections that have proved nothing yet: their number, how many of one address are served at a
// time, and their time. An address over its share waits in line, because a host that starts a hundred VMs at once is no
// attack; when all places are taken the oldest handshake of the busiest address makes room.
type admission struct {
	limits Limits

	mu     sync.Mutex
	shut   bool
	seq    uint64
	places map[*ticket]struct{}
	byAddr map[string]*gate
}

// gate is one address: how many of its handshakes are served, and who waits.
type gate struct {
	places, active int
	line           []*ticket
}

// ticket is the place of one connection.
type ticket struct {
	a     *admission
	addr  string
	local bool
	seq   uint64
	nc    net.Conn
	turn  chan struct{} // closed when it may go on
	serve bool          // counted in gate.active
}

func newAdmission(l Limits) *admission {
	return &admission{limits: l, places: make(map[*ticket]struct{}), byAddr: make(map[string]*gate)}
}

// enter gives nc its deadline and a place, and waits for its turn. The deadline covers the whole handshake.
func (a *admission) enter(ctx context.Context, peer Peer, nc net.Conn) (*ticket, error) {
	if err := nc.SetDeadline(time.Now().Add(a.limits.HandshakeTimeout)); err != nil {
		return nil, err
	}
	t, err := a.place(peer, nc)
	if err != nil {
		return nil, err
	}
	timeout := time.NewTimer(a.limits.HandshakeTimeout)
	defer timeout.Stop()
	select {
	case <-t.turn:
		return t, nil
	case <-ctx.Done():
		err = ctx.Err()
	case <-timeout.C:
		err = errHandshakesFull
	}
	t.leave()
	return nil, err
}

func (a *admission) place(peer Peer, nc net.Conn) (*ticket, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.shut {
		return nil, errHandshakesShut
	}
	t := &ticket{a: a, addr: addressOf(peer), local: peer.Local, nc: nc, seq: a.seq, turn: make(chan struct{})}
	a.seq++
	g := a.byAddr[t.addr]
	if g == nil {
		g = &gate{}
	}
	if len(a.places) >= a.limits.Handshakes && !a.evictLocked(g.places) {
		return nil, errHandshakesFull
	}
	a.byAddr[t.addr] = g
	a.places[t] = struct{}{}
	g.places++
	if t.local || g.active < a.limits.HandshakesPerIP {
		g.admit(t)
	} else {
		g.line = append(g.line, t)
	}
	return t, nil
}

// evictLocked hangs up on the oldest handshake of the address that has most, if that is more than own.
func (a *admission) evictLocked(own int) bool {
	var victim *ticket
	most := own
	for t := range a.places {
		n := a.byAddr[t.addr].places
		if n > most || n == most && victim != nil && t.seq < victim.seq {
			victim, most = t, n
		}
	}
	if victim == nil {
		return false
	}
	a.removeLocked(victim)
	victim.nc.Close()
	return true
}

func (g *gate) admit(t *ticket) {
	g.active++
	t.serve = true
	close(t.turn)
}

// leave gives the place back, to the next of the same address. A ticket that was evicted has none.
func (t *ticket) leave() {
	t.a.mu.Lock()
	defer t.a.mu.Unlock()
	t.a.removeLocked(t)
}

func (a *admission) removeLocked(t *ticket) {
	if _, ok := a.places[t]; !ok {
		return
	}
	delete(a.places, t)
	g := a.byAddr[t.addr]
	g.places--
	if t.serve {
		g.active--
	} else {
		for i, waiting := range g.line {
			if waiting == t {
				g.line = append(g.line[:i], g.line[i+1:]...)
				break
			}
		}
	}
	if len(g.line) > 0 && g.active < a.limits.HandshakesPerIP {
		next := g.line[0]
		g.line = g.line[1:]
		g.admit(next)
	}
	if g.places == 0 {
		delete(a.byAddr, t.addr)
	}
}

// close hangs up on every handshake, and on those that come later.
func (a *admission) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.shut = true
	for t := range a.places {
		t.nc.Close()
	}
}

// waiting returns the number of connections in handshake.
func (a *admission) waiting() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.places)
}

// addressOf is the address that a peer's handshakes are counted under.
func addressOf(p Peer) string {
	if tcp, ok := p.Addr.(*net.TCPAddr); ok {
		return tcp.IP.String()
	}
	return ""
}
