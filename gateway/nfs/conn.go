package nfs

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"varve/gateway/nfs/rpc"
	"varve/gateway/seat"
)

// conn is one client connection. Its reader goroutine runs serve, its sender goroutine runs send; calls that wait for
// storage have a goroutine each, at most Config.Inflight of them.
type conn struct {
	s        *Server
	ctx      context.Context // of its calls; of what Settle answers
	peer     netip.Addr
	accepted time.Time
	spoke    atomic.Bool // made a call that was not denied, as a client of some export
	stopping atomic.Bool

	// Of the reader alone.
	in        rpc.Records
	table     *exportTable
	now       time.Time
	began     time.Time // of the record that is not whole yet
	pace      seat.Pace
	timed     bool        // nc has a read deadline, unless stop has set one
	replies   []byte      // of this burst
	touched   []*openFile // to be kicked at the end of the burst
	request   request     // the call at hand
	contact   *contact    // of contactOf, what was written to last
	contactOf uint64
	mixed     bool // the burst has calls that do not wait for a sync, and for nothing else
	syncOnly  int  // bursts in a row that were not; below 0, so many more must come first

	// Calls in flight. mu is taken inside Done, so nothing is called with it held.
	mu       sync.Mutex
	changed  sync.Cond // inflight, waitingBytes, done or abandoned
	slots    []*pending
	free     []uint32
	done     []*pending
	spare    []*pending
	inflight int
	waiting  int64 // bytes of calls that wait for storage
	settling bool  // Settle answers what is done, with settled
	settled  []byte
	reading  bool // the reader is in a burst and will look at done before it waits
	lost     bool // an outcome is unknown, or the socket failed: nothing more is answered
	forsaken bool // do not wait for calls in flight

	// What is to be sent.
	outMu   sync.Mutex
	nc      net.Conn        // nil while seated
	seat    *seat.Seat      // changed by the reader alone, as nc and raw, and only while state is sendIdle
	raw     syscall.RawConn // of nc or the seat; nil when nc is not a socket
	drained sync.Cond
	out     net.Buffers
	owned   [][]byte // large buffers that out has parts of
	unsent  int      // bytes in out
	state   sendState
	write   directWrite
	wake    chan struct{} // for the sender: done, or out handed over
}

// sendState says who may write to the socket.
type sendState uint8

const (
	sendIdle   sendState = iota // nobody does
	sendDirect                  // a goroutine tries without waiting
	sendHanded                  // the sender does, until out is empty
)

// pending is a WRITE or COMMIT that was submitted to its file and not answered yet.
type pending struct {
	tag     uint64
	xid     uint32
	proc    uint32
	object  object
	file    *openFile
	change  change
	pre     Attr
	count   uint32
	stable  uint32
	verf    [8]byte
	started time.Time
	err     error
}

func newConn(s *Server, nc net.Conn, peer netip.Addr, now time.Time) *conn {
	c := &conn{s: s, nc: nc, peer: peer, accepted: now, wake: make(chan struct{}, 1)}
	c.changed.L = &c.mu
	c.drained.L = &c.outMu
	if sc, ok := nc.(syscall.Conn); ok {
		c.raw, _ = sc.SyscallConn()
	}
	c.write.init()
	return c
}

// serve reads until the client closes, breaks a limit, or stop was called; then it waits for the calls in flight, sends
// their replies and closes.
func (c *conn) serve(ctx context.Context) {
	quit := make(chan struct{})
	c.ctx = ctx
	var sender sync.WaitGroup
	sender.Go(func() { c.send(ctx, quit) })

	if err := c.read(ctx); err != nil {
		c.s.log.Debug("nfs connection ended", "client", c.peer, "err", err)
	}
	c.mu.Lock()
	for (c.inflight > 0 || c.settling) && !c.forsaken {
		c.changed.Wait()
	}
	c.mu.Unlock()
	close(quit)
	sender.Wait()
	c.closeSocket()
}

// stop makes the reader end as if the client had closed.
func (c *conn) stop() {
	c.stopping.Store(true)
	c.outMu.Lock()
	defer c.outMu.Unlock()
	if c.nc != nil { // a seated reader looks every few milliseconds
		c.nc.SetReadDeadline(time.Unix(1, 0))
	}
}

// lose closes the socket: replies cannot or must not be sent any more.
func (c *conn) lose() {
	c.mu.Lock()
	c.lost = true
	c.mu.Unlock()
	c.stopping.Store(true)
	c.outMu.Lock()
	c.severLocked()
	c.drained.Broadcast()
	c.outMu.Unlock()
}

// abandon ends the connection without waiting for its calls.
func (c *conn) abandon() {
	c.lose()
	c.mu.Lock()
	c.forsaken = true
	c.changed.Broadcast()
	c.mu.Unlock()
}

func (c *conn) read(ctx context.Context) error {
	c.now = c.accepted
	for {
		n, err := c.receive()
		c.now = time.Now()
		c.setReading(true)
		c.in.Filled(n)
		burstErr := c.burst(ctx)
		c.endBurst(ctx)
		switch {
		case burstErr != nil:
			return burstErr
		case err == nil:
		case c.stopping.Load():
			return nil
		case errors.Is(err, os.ErrDeadlineExceeded) && c.large() && !c.in.Partial():
			c.in.Shrink()
			c.s.giveBuffer(c.replies)
			c.replies, c.touched = nil, nil
			c.request = request{} // parts of it lie in the buffer given up
		default:
			return err
		}
	}
}

// nextDeadline is when waiting for the client's next bytes ends. A record once begun must end, a stranger must speak, and
// large buffers are given up after a while.
func (c *conn) nextDeadline() time.Time {
	switch {
	case c.in.Partial():
		if c.began.IsZero() {
			c.began = c.now
		}
		return c.began.Add(recordTimeout)
	case !c.spoke.Load():
		return c.accepted.Add(strangerTimeout)
	case c.large():
		return c.now.Add(largeBufferIdle)
	default:
		return time.Time{}
	}
}

// large tells that the connection holds more memory than one at rest should.
func (c *conn) large() bool { return c.in.Large() || cap(c.replies) > largeBytes }

// burst takes every call that has arrived.
func (c *conn) burst(ctx context.Context) error {
	if table := c.s.exports(c.now); table != c.table {
		c.table = table
		c.in.BytesMax = 0
		if !table.allows(c.peer) {
			c.in.BytesMax = strangerRecordBytesMax
		}
	}
	for {
		record, ok, err := c.in.Next()
		if err != nil {
			return err
		}
		if !ok {
			return nil
		}
		c.began = time.Time{}
		if err := c.take(ctx, record); err != nil {
			return err
		}
		if len(c.replies) > burstBytesMax {
			c.flushReplies()
		}
	}
}

// endBurst commits what was submitted and sends what can be sent, then leaves completions to the sender.
func (c *conn) endBurst(ctx context.Context) {
	for {
		c.settle(ctx)
		c.mu.Lock()
		if len(c.done) == 0 {
			c.reading = false
			c.mu.Unlock()
			return
		}
		c.mu.Unlock()
	}
}

func (c *conn) setReading(v bool) {
	c.mu.Lock()
	c.reading = v
	c.mu.Unlock()
}

// settle kicks the files that were submitted to and sends the replies there are.
func (c *conn) settle(ctx context.Context) {
	if len(c.touched) > 0 {
		c.kick()
	}
	for i, f := range c.touched {
		c.s.files.put(f)
		c.touched[i] = nil
	}
	c.touched = c.touched[:0]
	c.replies = c.answerDone(ctx, c.replies)
	c.flushReplies()
}

const (
	// syncOnlyMin is after how many bursts of durable writes alone the reader is taken to have nothing else to do than to sync.
	syncOnlyMin = 8
	// syncInlineMax is how long a sync may keep the reader from the next calls; after one that takes longer it syncs none for
	// slowSyncBursts.
	syncInlineMax  = time.Millisecond
	slowSyncBursts = 16
)

// kick commits what was submitted. A client that only waits for durable writes is best served by one goroutine: the reader, which
// syncs as well then. That spares two switches between threads for each sync. Where there are other calls, or syncs are slow, it
// goes on reading instead.
func (c *conn) kick() {
	c.syncOnly++
	if c.mixed {
		c.syncOnly = min(c.syncOnly, 0)
	}
	c.mixed = false
	if c.syncOnly < syncOnlyMin || c.in.Partial() {
		for _, f := range c.touched {
			f.Kick()
		}
		return
	}
	began := time.Now()
	for _, f := range c.touched {
		f.KickSync()
	}
	if time.Since(began) > syncInlineMax {
		c.syncOnly = -slowSyncBursts
	}
}

func (c *conn) flushReplies() {
	if len(c.replies) > 0 {
		c.replies = c.flush(c.replies)
	}
	c.outMu.Lock()
	for c.unsent > unsentBytesMax && !c.stopping.Load() {
		c.drained.Wait()
	}
	c.outMu.Unlock()
}

// touch remembers to kick the file at the end of the burst.
func (c *conn) touch(f *openFile) {
	for _, t := range c.touched {
		if t == f {
			return
		}
	}
	c.s.files.hold(f)
	c.touched = append(c.touched, f)
}

// room waits until the connection may have one more call in flight, with n bytes of data that wait for storage.
func (c *conn) room(ctx context.Context, n int64) {
	fits := func() bool {
		return c.inflight < c.s.cfg.Inflight && (n == 0 || c.waiting == 0 || c.waiting+n <= waitingBytesMax)
	}
	c.mu.Lock()
	if fits() {
		c.mu.Unlock()
		return
	}
	c.mu.Unlock()
	for {
		c.settle(ctx)
		c.mu.Lock()
		for !fits() && len(c.done) == 0 && !c.forsaken {
			c.changed.Wait()
		}
		ok := fits() || c.forsaken
		c.mu.Unlock()
		if ok {
			return
		}
	}
}

// submit makes a slot for a call that is about to be submitted; its tag goes with it.
func (c *conn) submit() *pending {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.inflight++
	if n := len(c.free); n > 0 {
		p := c.slots[c.free[n-1]]
		c.free = c.free[:n-1]
		return p
	}
	p := &pending{tag: uint64(len(c.slots))}
	c.slots = append(c.slots, p)
	return p
}

// retire frees the slot.
func (c *conn) retire(p *pending) {
	*p = pending{tag: p.tag}
	c.mu.Lock()
	c.inflight--
	c.free = append(c.free, uint32(p.tag))
	c.changed.Broadcast()
	c.mu.Unlock()
}

// Done implements blockio.Completer.
func (c *conn) Done(tag uint64, err error) {
	c.mu.Lock()
	p := c.slots[tag]
	p.err = err
	c.done = append(c.done, p)
	c.mu.Unlock()
}

// Settle implements blockio.Completer. What the reader does not answer is answered here, unless that keeps others waiting: then by
// the sender, at the price of waking it.
func (c *conn) Settle(alone bool) {
	c.mu.Lock()
	reading, here := c.reading, alone && !c.reading && !c.settling
	if here {
		c.settling = true
	}
	c.changed.Broadcast()
	c.mu.Unlock()
	switch {
	case reading:
	case here:
		c.settleHere()
	default:
		c.wakeSender()
	}
}

// settleHere answers what is done; c.settling is true.
func (c *conn) settleHere() {
	b := c.answerDone(c.ctx, c.settled[:0])
	if len(b) > 0 {
		b = c.flush(b)
	}
	if c.settled = b; cap(b) > largeBytes {
		c.settled = nil
	}
	c.mu.Lock()
	c.settling = false
	c.changed.Broadcast()
	c.mu.Unlock()
}

func (c *conn) wakeSender() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// answerDone appends the replies to what Done reported.
func (c *conn) answerDone(ctx context.Context, b []byte) []byte {
	c.mu.Lock()
	if len(c.done) == 0 {
		c.mu.Unlock()
		return b
	}
	done := c.done
	c.done, c.spare = c.spare[:0], nil
	lost := c.lost
	c.mu.Unlock()

	for i, p := range done {
		if !lost && unknownOutcome(p.err) {
			c.s.log.Warn("nfs call has an unknown outcome, connection closed", "client", c.peer, "err", p.err)
			c.lose()
			lost = true
		}
		if lost {
			c.s.changes.endIf(p.change)
		} else {
			b = c.answerPending(ctx, b, p)
		}
		c.s.files.put(p.file)
		c.retire(p)
		done[i] = nil
	}
	c.mu.Lock()
	if c.spare == nil {
		c.spare = done[:0]
	}
	c.mu.Unlock()
	return b
}

// wait runs a call that may wait for storage on a goroutine of its own. n is how many bytes of data it moves.
func (c *conn) wait(ctx context.Context, n int64, run func() []byte) {
	c.s.waited.Add(1)
	c.room(ctx, n)
	if !c.s.waiting.TryAcquire(n) {
		c.settle(ctx)
		if c.s.waiting.Acquire(ctx, n) != nil {
			return
		}
	}
	c.mu.Lock()
	c.inflight++
	c.waiting += n
	c.mu.Unlock()
	go func() {
		if b := run(); len(b) > 0 {
			c.s.giveBuffer(c.flush(b))
		}
		c.s.waiting.Release(n)
		c.mu.Lock()
		c.inflight--
		c.waiting -= n
		c.changed.Broadcast()
		c.mu.Unlock()
	}()
}
