package nbd

import (
	"bufio"
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"varve/gateway/seat"
)

// Why a connection ended that had not asked to.
var (
	errForced    = errors.New("cut: the drain timeout has passed")
	errShed      = errors.New("cut: the client stands still and holds memory that others wait for")
	errBadMagic  = errors.New("bad request magic")
	errOversized = errors.New("write payload is too long")
	errDrained   = errors.New("drained")
	errGone      = errors.New("connection is over")
)

// aloneBursts is after how many bursts of a single request a connection is taken for one of queue depth 1.
const aloneBursts = 2

// foreseenPairs is how many lone writes in a row have to be followed by a lone flush before the next flush is foreseen.
const foreseenPairs = 4

// conn is a connection in transmission. The reader goroutine runs transmit and owns the fields of the first group; the
// rest of the world reaches it through Done, Settle, drain and fail.
type conn struct {
	srv     *Server
	nc      net.Conn        // nil while seated
	raw     syscall.RawConn // of nc or the seat; nil over TLS
	seat    *seat.Seat
	tls     bool // or whatever else is not a socket of ours to read
	dev     Device
	release func()
	ctx     context.Context // ends when the connection is cut: for the blocking calls made in its name
	cancel  func()

	export     string
	peer       Peer
	since      time.Time
	structured bool
	allocation bool   // base:allocation was set
	diffSince  string // the snapshot of which varve:changed/ was set
	readOnly   bool
	minBlock   uint32

	// The reader's own.
	early     *bufio.Reader // what the handshake's buffer still holds, at first
	in        *buffer       // input: data[r:w] is read and not decoded; nil while idle
	r, w      int
	replies   *buffer  // read replies gathered in this burst
	slotCache []uint16 // free slots nobody else knows of
	submitted bool     // something was submitted since the last Kick
	durable   bool     // and some of it has to reach the disk
	decoded   int      // requests in this burst
	alone     int      // bursts in a row that were one request
	last      uint16   // command of the last request
	loneWrite bool     // the last burst was one write
	pairs     int      // bursts of one write, in a row, that were followed by one of one flush
	foreseen  bool     // the next request is expected to be a flush
	tally     tally
	readFn    func(fd uintptr) bool
	payload   []byte // where payloadFn reads to
	payloadFn func(fd uintptr) bool
	readN     int
	readErr   error
	pace      seat.Pace

	held     atomic.Int64 // bytes of the node's payload budget
	inStuck  atomic.Int64 // unix nanoseconds since which a payload has not grown, or 0
	outStuck atomic.Int64 // the same for replies the client does not take
	flying   atomic.Int64 // slots in use
	workers  sync.WaitGroup
	slots    []slot

	outbox
}

// slot is a request that was accepted and not yet answered. Its index is the tag it was submitted with.
type slot struct {
	cookie uint64
	cmd    uint16
}

func newConn(s *Server, nc net.Conn, dev Device, release func()) *conn {
	c := &conn{srv: s, nc: nc, dev: dev, release: release, minBlock: 1}
	if sc, ok := nc.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			c.raw = raw
		}
	}
	c.tls = c.raw == nil
	c.readFn, c.payloadFn = c.readOnce, c.readPayloadOnce
	c.slots = make([]slot, s.cfg.Limits.InFlight)
	c.slotCache = make([]uint16, len(c.slots))
	for i := range c.slotCache {
		c.slotCache[i] = uint16(i)
	}
	c.outbox.init(len(c.slots))
	return c
}

// transmissionFlags are what this connection is told about its export. CAN_MULTI_CONN is the truth: a flush covers what
// any connection was told is written.
func (c *conn) transmissionFlags() uint16 {
	flags := flagHasFlags | flagCanMultiConn | flagSendFlush | flagSendCache
	if c.structured {
		flags |= flagSendDF
	}
	if c.readOnly {
		return flags | flagReadOnly
	}
	return flags | flagSendFUA | flagSendTrim | flagSendWriteZeroes | flagSendFastZero
}

// transmit serves requests until the client leaves, the connection fails or is drained. It returns what ended it, nil
// for a client that said goodbye, after everything it started is over.
func (c *conn) transmit() error {
	c.srv.metrics.attached.Inc()
	c.start()
	err := c.read()
	clean := err == nil || errors.Is(err, errDrained)
	if failure := c.finish(clean); failure != nil {
		return failure
	}
	if clean {
		return nil
	}
	return err
}

// start takes over from the handshake: what its buffer holds, and its deadline.
func (c *conn) start() {
	size := burstBytes
	if c.tls {
		size = burstBytesTLS
	}
	c.in = c.srv.pool.get(size)
	c.in.data = c.in.data[:cap(c.in.data)]
	if n := c.early.Buffered(); n > 0 {
		early, err := c.early.Peek(n)
		if err == nil {
			c.w = copy(c.in.data, early)
		}
	}
	c.early = nil
	c.mu.Lock()
	if !c.stopping {
		c.nc.SetDeadline(time.Time{}) // an error here comes back from the first read
	}
	c.mu.Unlock()
	c.running.Go(c.write)
}

// read is the reader's loop: a burst of all requests that have arrived, then what became of them, then the socket.
func (c *conn) read() error {
	for {
		c.beginBurst()
		more, err := c.burst()
		c.endBurst()
		if err != nil || !more {
			return err
		}
		if c.foreseen {
			c.foreseen = false
			_ = c.dev.FlushInline() // who asks for it is told how it went
		}
		if err := c.fill(); err != nil {
			return err
		}
	}
}

// foresee says whether this burst, a lone write, will be followed by a flush: the client writes and flushes in turn, one request
// at a time. The disk then begins before the write is answered, and is flushed while the answer and the next request travel. Nobody
// is told of it; the flush, when it comes, finds everything durable, or waits as any other. A client that breaks the habit
// waits once for what it did not ask for.
func (c *conn) foresee() bool {
	switch {
	case c.decoded == 0: // a part of a request
	case c.decoded == 1 && c.last == cmdFlush && c.loneWrite:
		c.loneWrite = false
		c.pairs++
	case c.decoded != 1 || c.last != cmdWrite || c.loneWrite:
		c.loneWrite, c.pairs = false, 0
	default:
		c.loneWrite = true
		return c.pairs >= foreseenPairs && c.r == c.w && c.flying.Load() == 1
	}
	return false
}

// burst decodes and submits all that is complete in the input buffer. more is false after a goodbye.
func (c *conn) burst() (more bool, err error) {
	for {
		if c.dead.Load() {
			return false, c.stopReason()
		}
		if c.unsent() > queuedMax {
			if err := c.wait(func() bool { return c.queued.Load() <= queuedMax/2 }); err != nil {
				return false, err
			}
			continue
		}
		if c.w-c.r < requestBytes {
			return true, nil
		}
		q, ok := decodeRequest(c.in.data[c.r:c.w])
		switch {
		case !ok:
			return false, errBadMagic
		case q.cmd == cmdDisc:
			c.count(q)
			return false, nil
		case q.cmd == cmdWrite:
			complete, err := c.writeRequest(q)
			if err != nil || !complete {
				return true, err
			}
		default:
			c.r += requestBytes
			c.count(q)
			if err := c.plainRequest(q); err != nil {
				return false, err
			}
		}
	}
}

// unsent is how many reply bytes are queued, those of this burst included.
func (c *conn) unsent() int64 {
	n := c.queued.Load()
	if c.replies != nil {
		n += int64(len(c.replies.data))
	}
	return n
}

// count notes a request that is about to be served.
func (c *conn) count(q request) {
	c.decoded++
	c.last = q.cmd
	c.tally.any = true
	if q.cmd >= cmdCount {
		c.tally.unknown++
		return
	}
	c.tally.requests[q.cmd]++
	switch q.cmd {
	case cmdRead:
		c.tally.readBytes += uint64(q.length)
	case cmdWrite:
		c.tally.written += uint64(q.length)
	}
}

// slot takes a free slot for q and waits for one if need be.
func (c *conn) slot(q request) (uint16, error) {
	if len(c.slotCache) == 0 && !c.takeFreed() {
		if err := c.wait(c.takeFreedLocked); err != nil {
			return 0, err
		}
	}
	tag := c.slotCache[len(c.slotCache)-1]
	c.slotCache = c.slotCache[:len(c.slotCache)-1]
	c.slots[tag] = slot{cookie: q.cookie, cmd: q.cmd}
	c.flying.Add(1)
	return tag, nil
}

// takeFreed moves the slots that Done gave back to the reader.
func (c *conn) takeFreed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.takeFreedLocked()
}

func (c *conn) takeFreedLocked() bool {
	c.slotCache = append(c.slotCache, c.freed...)
	c.freed = c.freed[:0]
	return len(c.slotCache) > 0
}

// hold returns a buffer for n bytes of payload. It waits while the connection has its share, or the node has no more.
func (c *conn) hold(n int) (*buffer, error) {
	if held := c.held.Load(); held > 0 && held+int64(n) > outstandingMax {
		err := c.wait(func() bool { held := c.held.Load(); return held == 0 || held+int64(n) <= outstandingMax })
		if err != nil {
			return nil, err
		}
	}
	if !c.srv.payload.TryAcquire(int64(n)) {
		c.endBurst()
		err := c.srv.acquire(c.ctx, int64(n))
		c.beginBurst()
		if err != nil {
			return nil, err
		}
	}
	c.held.Add(int64(n))
	b := c.srv.pool.get(n)
	b.held = int64(n)
	return b, nil
}

// wait sends what there is and blocks until ok, which is called with the lock held, or until the connection has failed.
func (c *conn) wait(ok func() bool) error {
	c.endBurst()
	defer c.beginBurst()
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.failed == nil && !ok() {
		c.changed.Wait()
	}
	return c.failed
}

// beginBurst keeps others from sending: the reader will, when it has seen all that arrived.
func (c *conn) beginBurst() {
	c.mu.Lock()
	c.bursting = true
	c.mu.Unlock()
	c.decoded = 0
}

// endBurst commits what was submitted and sends what is answered. Reads do not wait for a commit that has to reach the
// disk: they are sent before it.
func (c *conn) endBurst() {
	lone := false
	if c.durable {
		c.durable = false
		c.sendBurst()
		lone = c.alone >= aloneBursts && c.decoded == 1 && c.r == c.w && c.flying.Load() == 1
	}
	c.foreseen = c.foresee()
	if c.submitted {
		c.submitted = false
		switch {
		case lone:
			c.dev.KickSync()
		case c.foreseen:
			c.dev.KickAhead()
		default:
			c.dev.Kick()
		}
	}
	switch {
	case c.decoded == 1:
		c.alone++
	case c.decoded > 1:
		c.alone = 0
	}
	c.srv.metrics.add(&c.tally)
	c.sendBurst()
}

// sendBurst lets everybody send again and sends what is answered.
func (c *conn) sendBurst() {
	c.mu.Lock()
	c.bursting = false
	if c.replies != nil {
		c.queueLocked(c.replies)
		c.replies = nil
	}
	c.sendLocked()
	c.mu.Unlock()
}
