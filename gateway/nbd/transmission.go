package nbd

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"varve/volumedriver/blockio"
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

// conn is a connection in transmission. The reader goroutine runs transmit and owns the fields of the first group; the
// rest of the world reaches it through Done, Settle, drain and fail.
type conn struct {
	srv     *Server
	nc      net.Conn
	raw     syscall.RawConn // nil over TLS
	dev     Device
	release func()
	ctx     context.Context // ends when the connection is cut: for the blocking calls made in its name
	cancel  func()

	export     string
	peer       Peer
	since      time.Time
	structured bool
	allocation bool // base:allocation was set
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
	tally     tally
	readFn    func(fd uintptr) bool
	payload   []byte // where payloadFn reads to
	payloadFn func(fd uintptr) bool
	readN     int
	readErr   error

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
	if c.raw == nil {
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
		if err := c.fill(); err != nil {
			return err
		}
	}
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

// refusal is the error number of a request that is wrong by itself, or 0.
func (c *conn) refusal(q request) uint32 {
	if q.cmd >= cmdCount || q.flags&^flagsAllowed(q.cmd, c.structured) != 0 {
		return errnoInval
	}
	if q.cmd == cmdFlush {
		return 0
	}
	writes := q.cmd == cmdWrite || q.cmd == cmdWriteZeroes || q.cmd == cmdTrim
	size := uint64(c.dev.Size())
	switch {
	case writes && c.readOnly:
		return errnoPerm
	case q.off%uint64(c.minBlock) != 0 || q.length%c.minBlock != 0:
		return errnoInval
	case q.off > size || uint64(q.length) > size-q.off:
		return beyondEnd(q.cmd)
	case q.cmd == cmdRead && q.length > payloadMax && q.flags&cmdFlagDF != 0:
		return errnoOverflow
	case q.cmd == cmdRead && q.length > payloadMax:
		return errnoInval
	case q.cmd == cmdBlockStatus && (!c.allocation || q.length == 0):
		return errnoInval
	}
	return 0
}

// plainRequest serves a request without payload; its header is consumed.
func (c *conn) plainRequest(q request) error {
	if errno := c.refusal(q); errno != 0 {
		c.refuse(q, errno)
		return nil
	}
	switch q.cmd {
	case cmdRead:
		return c.readRequest(q)
	case cmdFlush:
		return c.flushRequest(q)
	case cmdTrim, cmdWriteZeroes:
		return c.zeroRequest(q)
	case cmdCache:
		return c.cacheRequest(q)
	default:
		return c.blockStatusRequest(q)
	}
}

// readRequest answers from memory where it can: a short read into the buffer that the burst's replies share, a long
// one into its own.
func (c *conn) readRequest(q request) error {
	n := int(q.length)
	if n > inlineReadMax {
		return c.longRead(q)
	}
	b := c.replyRoom(dataHeaderBytes + n)
	start := len(b.data)
	b.data = appendDataHeader(b.data, c.structured, q.cookie, q.off, n)
	header := len(b.data)
	b.data = b.data[:header+n]
	if n == 0 {
		return nil
	}
	err := c.dev.TryRead(b.data[header:], int64(q.off))
	if err == nil {
		return nil
	}
	b.data = b.data[:start]
	if !errors.Is(err, blockio.ErrBusy) {
		return c.readFailed(q, err)
	}
	held, err := c.hold(n)
	if err != nil {
		return err
	}
	return c.readLater(q, held)
}

// longRead is readRequest for reads with a buffer of their own, paid from the payload budget.
func (c *conn) longRead(q request) error {
	b, err := c.hold(int(q.length))
	if err != nil {
		return err
	}
	b.data = appendDataHeader(b.data, c.structured, q.cookie, q.off, int(q.length))
	header := len(b.data)
	b.data = b.data[:header+int(q.length)]
	switch err = c.dev.TryRead(b.data[header:], int64(q.off)); {
	case err == nil:
		c.push(b)
		return nil
	case errors.Is(err, blockio.ErrBusy):
		return c.readLater(q, b)
	}
	c.srv.putBuffer(c, b)
	return c.readFailed(q, err)
}

// readLater hands a read that has to wait to a worker.
func (c *conn) readLater(q request, b *buffer) error {
	err := c.later(q, func() { c.finishRead(q, b) })
	if err != nil {
		c.srv.putBuffer(c, b)
	}
	return err
}

// finishRead is the blocking rest of a read, in a worker.
func (c *conn) finishRead(q request, b *buffer) {
	b.data = appendDataHeader(b.data[:0], c.structured, q.cookie, q.off, int(q.length))
	header := len(b.data)
	b.data = b.data[:header+int(q.length)]
	if err := c.dev.Read(c.ctx, b.data[header:], int64(q.off)); err != nil {
		c.srv.putBuffer(c, b)
		c.workerFailed(q, err)
		return
	}
	c.push(b)
}

// readFailed answers a failed read from the reader.
func (c *conn) readFailed(q request, err error) error {
	if errors.Is(err, blockio.ErrFenced) {
		return c.fenced(err)
	}
	c.srv.log.Debug("NBD request failed", "export", c.export, "command", commandNames[q.cmd], "offset", q.off, "length", q.length, "err", err)
	c.refuse(q, errnoOf(err, q.cmd))
	return nil
}

// writeRequest serves a write whose header is at c.r. complete is false when more of it has to arrive first: payloads that
// fit into the input buffer are submitted from there, longer ones are read into a buffer of their own.
func (c *conn) writeRequest(q request) (complete bool, err error) {
	n := int64(q.length)
	if n > payloadMax {
		return false, errOversized
	}
	errno := c.refusal(q)
	fits := requestBytes+n <= int64(cap(c.in.data))
	if errno == 0 && fits && int64(c.w-c.r) < requestBytes+n {
		return false, nil
	}
	c.r += requestBytes
	c.count(q)
	if errno != 0 {
		if err := c.discard(n); err != nil {
			return false, err
		}
		c.refuse(q, errno)
		return true, nil
	}
	tag, err := c.slot(q)
	if err != nil {
		return false, err
	}
	if !fits {
		return true, c.longWrite(q, tag)
	}
	p := c.in.data[c.r : c.r+int(n)]
	c.r += int(n)
	err = c.dev.TryWrite(p, int64(q.off), fua(q), c, uint64(tag))
	if err == nil {
		c.accepted(q)
		return true, nil
	}
	if !errors.Is(err, blockio.ErrBusy) {
		return true, c.notAccepted(q, tag, err)
	}
	b, err := c.hold(int(n))
	if err != nil {
		c.unslot(tag)
		return true, err
	}
	b.data = append(b.data, p...)
	c.finishWriteLater(q, tag, b)
	return true, nil
}

// longWrite reads the rest of a payload into its own buffer and submits it.
func (c *conn) longWrite(q request, tag uint16) error {
	b, err := c.hold(int(q.length))
	if err != nil {
		c.unslot(tag)
		return err
	}
	b.data = b.data[:q.length]
	if err := c.readPayload(b.data); err != nil {
		c.unslot(tag)
		c.srv.putBuffer(c, b)
		return err
	}
	err = c.dev.TryWrite(b.data, int64(q.off), fua(q), c, uint64(tag))
	if errors.Is(err, blockio.ErrBusy) {
		c.finishWriteLater(q, tag, b)
		return nil
	}
	c.srv.putBuffer(c, b)
	if err != nil {
		return c.notAccepted(q, tag, err)
	}
	c.accepted(q)
	return nil
}

func (c *conn) finishWriteLater(q request, tag uint16, b *buffer) {
	c.work(func() {
		err := c.dev.Write(c.ctx, b.data, int64(q.off), fua(q))
		c.srv.putBuffer(c, b)
		c.finished(tag, err)
	})
}

// zeroRequest serves TRIM and WRITE_ZEROES, which are the same to a log: both leave zeros, at once whatever the length.
// NO_HOLE asks for space to be kept, which a log never does nor needs to: a write to it may fail as any other.
func (c *conn) zeroRequest(q request) error {
	tag, err := c.slot(q)
	if err != nil {
		return err
	}
	if q.length == 0 {
		c.finished(tag, nil)
		return nil
	}
	err = c.dev.TryZero(int64(q.off), int64(q.length), fua(q), c, uint64(tag))
	switch {
	case err == nil:
		c.accepted(q)
		return nil
	case errors.Is(err, blockio.ErrBusy):
		c.work(func() { c.finished(tag, c.dev.Zero(c.ctx, int64(q.off), int64(q.length), fua(q))) })
		return nil
	}
	return c.notAccepted(q, tag, err)
}

// flushRequest flushes. A client that sends one request at a time is served on this goroutine, which saves it two
// switches; nothing of this connection is held up, since there is nothing.
func (c *conn) flushRequest(q request) error {
	if c.alone >= aloneBursts && c.decoded == 1 && c.r == c.w && c.flying.Load() == 0 {
		err := c.dev.FlushInline()
		if errors.Is(err, blockio.ErrFenced) {
			return c.fenced(err)
		}
		c.refuse(q, errnoOf(err, q.cmd))
		return nil
	}
	tag, err := c.slot(q)
	if err != nil {
		return err
	}
	err = c.dev.TryFlush(c, uint64(tag))
	switch {
	case err == nil:
		c.accepted(q)
		return nil
	case errors.Is(err, blockio.ErrBusy):
		c.work(func() { c.finished(tag, c.dev.Flush(c.ctx)) })
		return nil
	}
	return c.notAccepted(q, tag, err)
}

// cacheRequest brings a range nearer by reading it. Ranges beyond payloadMax are acknowledged and not read: it is a hint.
func (c *conn) cacheRequest(q request) error {
	n := int(min(q.length, payloadMax))
	if n == 0 || q.length > payloadMax {
		c.refuse(q, 0)
		return nil
	}
	b, err := c.hold(min(n, burstBytes))
	if err != nil {
		return err
	}
	tag, err := c.slot(q)
	if err != nil {
		c.srv.putBuffer(c, b)
		return err
	}
	c.work(func() {
		var err error
		for done := 0; done < n && err == nil; done += burstBytes {
			err = c.dev.Read(c.ctx, b.data[:min(burstBytes, n-done)], int64(q.off)+int64(done))
		}
		c.srv.putBuffer(c, b)
		c.finished(tag, err)
	})
	return nil
}

// blockStatusRequest may have to fetch cold parts of a map, so a worker does it.
func (c *conn) blockStatusRequest(q request) error {
	return c.later(q, func() {
		limit := extentsMax
		if q.flags&cmdFlagReqOne != 0 {
			limit = 1
		}
		extents, err := c.dev.Extents(c.ctx, int64(q.off), int64(q.length), limit)
		if err == nil && len(extents) == 0 {
			err = fmt.Errorf("no extents at %d", q.off)
		}
		if err != nil {
			c.workerFailed(q, err)
			return
		}
		b := c.srv.pool.get(chunkBytes + 4 + 8*len(extents))
		b.data = appendBlockStatus(b.data, q, extents, limit)
		c.push(b)
	})
}

// appendBlockStatus appends the reply for extents: merged, clipped to the request, at most limit of them.
func appendBlockStatus(b []byte, q request, extents []blockio.Extent, limit int) []byte {
	start := len(b)
	b = appendChunk(b, q.cookie, chunkBlockStatus, 0)
	b = binary.BigEndian.AppendUint32(b, allocationID)
	left, count, last := int64(q.length), 0, uint32(0)
	for _, e := range extents {
		n := min(e.Length, left)
		state := uint32(0)
		if e.Hole {
			state |= stateHole
		}
		if e.Zero {
			state |= stateZero
		}
		if n <= 0 {
			break
		}
		if count > 0 && state == last {
			at := len(b) - 8
			binary.BigEndian.PutUint32(b[at:], binary.BigEndian.Uint32(b[at:])+uint32(n))
		} else {
			if count == limit {
				break
			}
			b = binary.BigEndian.AppendUint32(b, uint32(n))
			b = binary.BigEndian.AppendUint32(b, state)
			count, last = count+1, state
		}
		left -= n
	}
	binary.BigEndian.PutUint32(b[start+16:], uint32(len(b)-start-chunkBytes))
	return b
}

func fua(q request) blockio.Flags {
	if q.flags&cmdFlagFUA != 0 {
		return blockio.FUA
	}
	return 0
}

// refuse answers q from the reader with errno, which is 0 for requests that are done without further ado.
func (c *conn) refuse(q request, errno uint32) {
	if errno != 0 && q.cmd < cmdCount {
		c.srv.metrics.errors[q.cmd].Inc()
	}
	b := c.replyRoom(dataHeaderBytes)
	if c.structured && (q.cmd == cmdRead || q.cmd == cmdBlockStatus) {
		b.data = appendChunkError(b.data, q.cookie, errno)
		return
	}
	b.data = appendSimple(b.data, q.cookie, errno)
}

// replyRoom returns the burst's reply buffer with room for n bytes more.
func (c *conn) replyRoom(n int) *buffer {
	if c.replies != nil && cap(c.replies.data)-len(c.replies.data) < n {
		c.push(c.replies)
		c.replies = nil
	}
	if c.replies == nil {
		c.replies = c.srv.pool.get(burstBytes)
	}
	return c.replies
}

// later runs f in a worker that holds a slot, for requests whose reply is not a simple one. f answers.
func (c *conn) later(q request, f func()) error {
	tag, err := c.slot(q)
	if err != nil {
		return err
	}
	c.work(func() {
		f()
		c.free(tag)
	})
	return nil
}

// work runs f on a goroutine of its own. There are as many at most as there are slots.
func (c *conn) work(f func()) {
	c.srv.metrics.busy.Inc()
	c.workers.Go(f)
}

// workerFailed answers a failed request whose slot its worker holds.
func (c *conn) workerFailed(q request, err error) {
	if c.over(err) {
		return
	}
	c.srv.log.Debug("NBD request failed", "export", c.export, "command", commandNames[q.cmd], "offset", q.off, "length", q.length, "err", err)
	c.srv.metrics.errors[q.cmd].Inc()
	b := c.srv.pool.get(dataHeaderBytes)
	if c.structured {
		b.data = appendChunkError(b.data, q.cookie, errnoOf(err, q.cmd))
	} else {
		b.data = appendSimple(b.data, q.cookie, errnoOf(err, q.cmd))
	}
	c.push(b)
}

// over says that err means the end of the connection, without an answer: the outcome is unknown.
func (c *conn) over(err error) bool {
	if errors.Is(err, blockio.ErrFenced) {
		c.fail(fmt.Errorf("export %q: %w", c.export, err))
		return true
	}
	return c.ctx.Err() != nil
}

// fenced fails the connection from the reader.
func (c *conn) fenced(err error) error {
	err = fmt.Errorf("export %q: %w", c.export, err)
	c.fail(err)
	return err
}

// accepted notes that the device has taken q and wants a Kick.
func (c *conn) accepted(q request) {
	c.submitted = true
	c.durable = c.durable || q.cmd == cmdFlush || q.flags&cmdFlagFUA != 0
}

// notAccepted answers a request that the device refused at once: nothing was applied.
func (c *conn) notAccepted(q request, tag uint16, err error) error {
	c.unslot(tag)
	return c.readFailed(q, err)
}

// unslot takes back a slot whose request was never submitted.
func (c *conn) unslot(tag uint16) {
	c.slotCache = append(c.slotCache, tag)
	c.flying.Add(-1)
}

// finished ends a request of a worker as Done and Settle end those of the device.
func (c *conn) finished(tag uint16, err error) {
	c.Done(uint64(tag), err)
	c.Settle()
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
	if c.durable {
		c.durable = false
		c.sendBurst()
	}
	if c.submitted {
		c.submitted = false
		c.dev.Kick()
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

// fill reads from the socket, and waits for something to come. While nothing is there the connection has no buffer.
func (c *conn) fill() error {
	if c.in != nil && c.r > 0 {
		c.w = copy(c.in.data[:c.w-c.r], c.in.data[c.r:c.w])
		c.r = 0
	}
	if c.raw == nil {
		return c.fillTLS()
	}
	if err := c.raw.Read(c.readFn); err != nil {
		return c.readError(err)
	}
	return c.readError(c.readErr)
}

// readOnce is one attempt to read into the input buffer; false means to wait for the socket.
func (c *conn) readOnce(fd uintptr) bool {
	if c.in == nil {
		c.in, c.r, c.w = c.srv.pool.get(burstBytes), 0, 0
		c.in.data = c.in.data[:cap(c.in.data)]
	}
	n, err := readSocket(fd, c.in.data[c.w:])
	if err == syscall.EAGAIN {
		if c.w == 0 {
			c.srv.pool.put(c.in)
			c.in = nil
		}
		return false
	}
	c.w += n
	c.readErr = err
	return true
}

func (c *conn) fillTLS() error {
	n, err := c.nc.Read(c.in.data[c.w:])
	c.w += n
	if n > 0 {
		return nil // an error comes again
	}
	return c.readError(err)
}

// readPayload fills p from the input buffer and then from the socket. The client may take its time, unless others wait
// for the memory, but it has to move.
func (c *conn) readPayload(p []byte) error {
	n := copy(p, c.in.data[c.r:c.w])
	c.r += n
	if n == len(p) {
		return nil
	}
	c.endBurst()
	defer c.beginBurst()
	defer c.inStuck.Store(0)
	for n < len(p) {
		if err := c.armRead(); err != nil {
			return err
		}
		m, err := c.readMore(p[n:])
		n += m
		if err != nil {
			return c.readError(err)
		}
	}
	return c.disarmRead()
}

// readMore reads at least a byte into p, past the input buffer, which is empty.
func (c *conn) readMore(p []byte) (int, error) {
	if c.raw == nil {
		return c.nc.Read(p)
	}
	c.payload, c.readN = p, 0
	if err := c.raw.Read(c.payloadFn); err != nil {
		return 0, err
	}
	return c.readN, c.readErr
}

func (c *conn) readPayloadOnce(fd uintptr) bool {
	n, err := readSocket(fd, c.payload)
	if err == syscall.EAGAIN {
		return false
	}
	c.readN, c.readErr = n, err
	return true
}

// discard reads past n bytes of a payload that nobody wants.
func (c *conn) discard(n int64) error {
	for {
		skip := min(n, int64(c.w-c.r))
		c.r += int(skip)
		n -= skip
		if n == 0 {
			return nil
		}
		c.endBurst()
		err := c.fill()
		c.beginBurst()
		if err != nil {
			return err
		}
	}
}

// readError says what the end of reading means.
func (c *conn) readError(err error) error {
	switch {
	case err == nil:
		return nil
	case c.stopReason() != nil:
		return c.stopReason()
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("client stopped in the middle of a payload: %w", err)
	case errors.Is(err, io.EOF):
		return io.EOF
	}
	return fmt.Errorf("read requests: %w", err)
}
