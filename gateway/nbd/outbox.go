package nbd

import (
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"varve/volumedriver/blockio"
)

const (
	sendRounds = 4  // how often one goroutine sends what others queued meanwhile before the writer takes over
	iovecsMax  = 64 // buffers in one write
)

// outbox is the sending half of a connection: what is answered and not yet sent, and who sends it. At any time at most
// one goroutine does, the one that set sending; it alone owns batch and sent. Whoever queues a reply sends it with one
// write that does not block, and what the socket does not take at once is left to the writer goroutine, so that a client
// that does not read stops nobody but itself.
type outbox struct {
	running sync.WaitGroup // the writer
	wake    chan struct{}  // tells the writer that it has become the sender
	dead    atomic.Bool    // failed is set
	queued  atomic.Int64   // bytes in small, queue and batch

	batch   []*buffer // being sent; a tail of store
	store   []*buffer
	sent    int // bytes of batch[0] that are
	iovecs  [][]byte
	vector  []unix.Iovec // iovecs as the kernel takes them
	message unix.Msghdr
	writeFn func(fd uintptr) bool
	blockFn func(fd uintptr) bool
	writeN  int
	werr    error

	mu       sync.Mutex
	changed  sync.Cond // a slot was freed, something was sent, or the connection failed
	bursting bool      // the reader is in a burst and will send when it ends
	sending  bool      // somebody owns batch
	stopping bool      // drained: no more requests are read
	failed   error     // why nothing is sent or read any more
	small    *buffer   // replies without data
	queue    []*buffer // replies with data
	freed    []uint16  // slots given back
}

func (o *outbox) init(slots int) {
	o.wake = make(chan struct{}, 1)
	o.changed.L = &o.mu
	o.freed = make([]uint16, 0, slots)
}

// Done implements blockio.Completer: it queues the reply to the request in slot tag.
func (c *conn) Done(tag uint64, err error) {
	if err != nil && c.over(err) {
		c.free(uint16(tag))
		return
	}
	errno := errnoOf(err, c.slots[tag].cmd)
	if errno != 0 {
		s := c.slots[tag]
		c.srv.metrics.errors[s.cmd].Inc()
		c.srv.log.Debug("NBD request failed", "export", c.export, "command", commandNames[s.cmd], "err", err)
	}
	c.mu.Lock()
	if c.failed == nil {
		if c.small == nil {
			c.small = c.srv.pool.get(0)
		}
		c.small.data = appendSimple(c.small.data, c.slots[tag].cookie, errno)
		c.queued.Add(simpleBytes)
	}
	c.freeLocked(uint16(tag))
	c.mu.Unlock()
}

// Settle implements blockio.Completer: it sends what Done queued, unless the reader is about to.
func (c *conn) Settle(bool) {
	c.mu.Lock()
	if !c.bursting {
		c.sendLocked()
	}
	c.mu.Unlock()
}

// free gives a slot back without an answer.
func (c *conn) free(tag uint16) {
	c.mu.Lock()
	c.freeLocked(tag)
	c.mu.Unlock()
}

func (c *conn) freeLocked(tag uint16) {
	c.freed = append(c.freed, tag)
	c.flying.Add(-1)
	c.changed.Broadcast()
}

// push queues a reply with data and sends it, unless the reader is about to.
func (c *conn) push(b *buffer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.queueLocked(b)
	if !c.bursting {
		c.sendLocked()
	}
}

func (c *conn) queueLocked(b *buffer) {
	if c.failed != nil || len(b.data) == 0 { // as of a burst whose reads all have to wait
		c.srv.putBuffer(c, b)
		c.changed.Broadcast()
		return
	}
	c.queue = append(c.queue, b)
	c.queued.Add(int64(len(b.data)))
}

// takeLocked makes all that is queued the batch, which is empty; false if there is nothing.
func (c *conn) takeLocked() bool {
	c.store = c.store[:0]
	if c.small != nil {
		c.store = append(c.store, c.small)
		c.small = nil
	}
	c.store = append(c.store, c.queue...)
	clear(c.queue)
	c.queue = c.queue[:0]
	c.batch, c.sent = c.store, 0
	return len(c.batch) > 0
}

// sendLocked sends what is queued without blocking. It lets go of the lock while it writes.
func (c *conn) sendLocked() {
	for round := 0; ; round++ {
		if c.sending || c.failed != nil || !c.takeLocked() {
			return
		}
		c.sending = true
		if c.tls || round == sendRounds {
			c.wake <- struct{}{}
			return
		}
		c.mu.Unlock()
		n, err := c.tryWrite()
		c.sentBytes(n)
		c.mu.Lock()
		if err != nil {
			c.failLocked(fmt.Errorf("send replies: %w", err))
		}
		if len(c.batch) > 0 && c.failed == nil {
			c.wake <- struct{}{} // sending stays set: the writer is the sender now
			return
		}
		c.sending = false
		c.changed.Broadcast()
	}
}

// write is the writer goroutine: it sends, blocking, whenever it was made the sender, until wake is closed.
func (c *conn) write() {
	for range c.wake {
		for more := true; more; {
			err := c.writeBatch()
			more = c.wrote(err)
		}
	}
}

// writeBatch sends the batch. A client that takes no byte for the stuck timeout ends it.
func (c *conn) writeBatch() error {
	for len(c.batch) > 0 {
		if err := c.armWrite(); err != nil {
			return err
		}
		n, err := c.writeSome()
		c.sentBytes(n)
		if err != nil {
			return fmt.Errorf("send replies: %w", err)
		}
		c.mu.Lock()
		c.changed.Broadcast()
		c.mu.Unlock()
	}
	return nil
}

// wrote follows a batch of the writer. It takes the next, or ends the writer's being the sender.
func (c *conn) wrote(err error) (more bool) {
	c.outStuck.Store(0)
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		c.failLocked(err)
	}
	if c.failed == nil {
		if c.takeLocked() {
			return true
		}
		c.deadline((net.Conn).SetWriteDeadline, time.Time{}) // for the attempts that do not block; an error comes back from the next of them
	}
	c.sending = false
	c.changed.Broadcast()
	return false
}

// sentBytes advances the batch by n bytes and frees what is sent.
func (c *conn) sentBytes(n int) {
	c.queued.Add(-int64(n))
	for len(c.batch) > 0 {
		left := len(c.batch[0].data) - c.sent
		if n < left {
			c.sent += n
			return
		}
		n -= left
		c.srv.putBuffer(c, c.batch[0])
		c.batch[0] = nil
		c.batch, c.sent = c.batch[1:], 0
	}
}

// tryWrite makes one attempt that does not block.
func (c *conn) tryWrite() (int, error) {
	c.gather()
	if c.writeFn == nil {
		c.writeFn = func(fd uintptr) bool { c.writeOnce(fd); return true }
	}
	if err := c.raw.Write(c.writeFn); err != nil {
		return 0, err
	}
	if c.werr == syscall.EAGAIN {
		return 0, nil
	}
	return c.writeN, c.werr
}

// writeSome waits until the socket takes something.
func (c *conn) writeSome() (int, error) {
	if c.tls {
		return c.nc.Write(c.batch[0].data[c.sent:])
	}
	if c.seat != nil {
		return c.writeSomeSeated()
	}
	c.gather()
	if c.blockFn == nil {
		c.blockFn = func(fd uintptr) bool { c.writeOnce(fd); return c.werr != syscall.EAGAIN }
	}
	if err := c.raw.Write(c.blockFn); err != nil {
		return 0, err
	}
	return c.writeN, c.werr
}

// gather lists what is to be written next.
func (c *conn) gather() {
	c.iovecs = c.iovecs[:0]
	for i, b := range c.batch[:min(len(c.batch), iovecsMax)] {
		if i == 0 {
			c.iovecs = append(c.iovecs, b.data[c.sent:])
			continue
		}
		c.iovecs = append(c.iovecs, b.data)
	}
}

func (c *conn) writeOnce(fd uintptr) {
	for {
		c.writeN, c.werr = c.sendMessage(fd)
		if c.werr != syscall.EINTR {
			c.writeN = max(c.writeN, 0)
			return
		}
	}
}

// readSocket reads what is there; the end is io.EOF.
func readSocket(fd uintptr, p []byte) (int, error) {
	for {
		n, err := unix.Read(int(fd), p)
		switch {
		case err == syscall.EINTR:
			continue
		case err != nil:
			return 0, err
		case n == 0:
			return 0, io.EOF
		}
		return n, nil
	}
}

// deadline sets one of the connection's deadlines. A socket that the poller does not know has none: who waits for it looks at the
// clock.
func (c *conn) deadline(set func(net.Conn, time.Time) error, at time.Time) error {
	if c.nc == nil {
		return nil
	}
	return set(c.nc, at)
}

// armWrite gives the client the stuck timeout to take something.
func (c *conn) armWrite() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failed != nil {
		return c.failed
	}
	now := time.Now()
	c.outStuck.Store(now.UnixNano())
	return c.deadline((net.Conn).SetWriteDeadline, now.Add(c.srv.cfg.Limits.StuckTimeout))
}

// armRead gives the client the stuck timeout to send more of a payload.
func (c *conn) armRead() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failed != nil || c.stopping {
		return c.stopReasonLocked()
	}
	now := time.Now()
	c.inStuck.Store(now.UnixNano())
	return c.deadline((net.Conn).SetReadDeadline, now.Add(c.srv.cfg.Limits.StuckTimeout))
}

// disarmRead lets the client be silent again.
func (c *conn) disarmRead() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failed != nil || c.stopping {
		return nil
	}
	return c.deadline((net.Conn).SetReadDeadline, time.Time{})
}

// stuckFor is how long the client of a connection that holds payload memory has not moved a byte that we wait for.
func (c *conn) stuckFor(now time.Time) time.Duration {
	since := c.inStuck.Load()
	if out := c.outStuck.Load(); out != 0 && (since == 0 || out < since) {
		since = out
	}
	if since == 0 || c.held.Load() == 0 {
		return 0
	}
	return now.Sub(time.Unix(0, since))
}

// drain ends the connection after the requests that have been read are answered.
func (c *conn) drain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopping || c.failed != nil {
		return
	}
	c.stopping = true
	c.deadline((net.Conn).SetReadDeadline, time.Unix(1, 0)) // an error means that the socket is closed, which ends it as well
}

// fail ends the connection without answering what is in flight. It may be called from anywhere, with no lock held.
func (c *conn) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.failLocked(err)
}

func (c *conn) failLocked(err error) {
	if c.failed != nil {
		return
	}
	c.failed = err
	c.dead.Store(true)
	c.deadline((net.Conn).SetDeadline, time.Unix(1, 0)) // an error means that the socket is closed, which ends it as well
	c.cancel()
	c.changed.Broadcast()
}

// stopReason is why no more requests are read, or nil.
func (c *conn) stopReason() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stopReasonLocked()
}

func (c *conn) stopReasonLocked() error {
	switch {
	case c.failed != nil:
		return c.failed
	case c.stopping:
		return errDrained
	}
	return nil
}

// finish ends all that transmit started. After a goodbye or a drain it first waits until everything is answered and
// sent. It returns why the connection failed, if it did.
func (c *conn) finish(clean bool) error {
	c.mu.Lock()
	for clean && c.failed == nil && !c.answeredLocked() {
		c.changed.Wait()
	}
	failure := c.failed
	c.failLocked(errGone)
	for c.sending {
		c.changed.Wait()
	}
	c.mu.Unlock()
	c.closeSocket()
	c.workers.Wait()
	c.awaitDevice()
	close(c.wake)
	c.running.Wait()
	c.putAll()
	return failure
}

// answeredLocked says that nothing is left to wait for.
func (c *conn) answeredLocked() bool {
	return c.flying.Load() == 0 && !c.sending && c.small == nil && len(c.queue) == 0
}

// awaitDevice waits for the requests that the device has accepted, since it is not to be released under them. One that
// does not come back within the drain timeout is left behind.
func (c *conn) awaitDevice() {
	deadline := time.Now().Add(c.srv.cfg.Limits.DrainTimeout)
	t := time.AfterFunc(c.srv.cfg.Limits.DrainTimeout, func() {
		c.mu.Lock()
		c.changed.Broadcast()
		c.mu.Unlock()
	})
	defer t.Stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.flying.Load() > 0 {
		if !time.Now().Before(deadline) {
			c.srv.log.Error("NBD requests were never ended by the volume", "export", c.export, "requests", c.flying.Load())
			return
		}
		c.changed.Wait()
	}
}

// putAll gives every buffer back.
func (c *conn) putAll() {
	c.mu.Lock()
	defer c.mu.Unlock()
	left := append(append(c.batch, c.queue...), c.small, c.replies)
	c.batch, c.queue, c.small, c.replies = nil, nil, nil, nil
	for _, b := range left {
		if b != nil {
			c.srv.putBuffer(c, b)
		}
	}
	if c.in != nil {
		c.srv.pool.put(c.in)
		c.in = nil
	}
}

var _ blockio.Completer = (*conn)(nil)
