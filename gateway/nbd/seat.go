package nbd

import (
	"net"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"varve/gateway/seat"
)

// The reader alone changes where the socket is (package seat), with the lock held and while nobody sends.

// stallPoll is how often the writer of a seated connection, waiting for the client, looks whether it still should.
const stallPoll = 100 * time.Millisecond

// seize takes the socket off the poller, if there is a seat.
func (c *conn) seize() {
	old := c.sit()
	if old == nil {
		return
	}
	if err := old.Close(); err != nil {
		c.srv.log.Debug("NBD socket not taken off the poller cleanly", "peer", c.peer.Addr, "err", err)
	}
}

// sit puts a seat in the connection's place and gives the connection, which is to be closed. It is nil if it did not work.
func (c *conn) sit() (old net.Conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.sending || c.stopReasonLocked() != nil {
		return nil
	}
	s := c.srv.cfg.Seats.Take(c.raw)
	if s == nil {
		return nil
	}
	old = c.nc
	c.nc, c.raw, c.seat = nil, s.Raw(), s
	return old
}

// rest gives the socket back to the poller. If that has no room for it, or a reply is being sent, another pause will come.
func (c *conn) rest() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.sending || c.failed != nil {
		return
	}
	nc, err := c.seat.Leave()
	if err != nil {
		c.srv.log.Debug("NBD socket not given back to the poller", "peer", c.peer.Addr, "err", err)
		return
	}
	c.nc, c.seat = nc, nil
	raw, err := nc.(syscall.Conn).SyscallConn()
	if err != nil { // of a connection that is closed only; that of the seat says so as well
		c.failLocked(err)
		return
	}
	c.raw = raw
	if c.stopping {
		c.nc.SetReadDeadline(time.Unix(1, 0))
	}
}

// closeSocket closes the connection, wherever it is.
func (c *conn) closeSocket() {
	var err error
	if c.seat != nil {
		err = c.seat.Close()
		c.seat = nil
	} else {
		err = c.nc.Close()
	}
	if err != nil {
		c.srv.log.Debug("NBD connection not closed cleanly", "peer", c.peer.Addr, "err", err)
	}
}

// fillSeated reads from the socket and waits for something to come, or goes back to the poller; done is false then.
func (c *conn) fillSeated() (done bool, err error) {
	if err := c.stopReason(); err != nil {
		return true, err
	}
	n, err := c.seat.Read(c.in.data[c.w:])
	if err == seat.ErrIdle {
		c.pace = seat.Pace{}
		c.rest()
		return false, nil
	}
	c.w += n
	return true, c.readError(err)
}

// readMoreSeated reads at least a byte into p before the time for it is over.
func (c *conn) readMoreSeated(p []byte) (int, error) {
	for {
		n, err := c.seat.Read(p)
		switch {
		case err != seat.ErrIdle:
			return n, err
		case c.stopReason() != nil:
			return 0, c.stopReason()
		case c.overdue(c.inStuck.Load()):
			return 0, os.ErrDeadlineExceeded
		}
	}
}

// writeSomeSeated waits until the socket has taken something.
func (c *conn) writeSomeSeated() (int, error) {
	for {
		if n, err := c.tryWrite(); n > 0 || err != nil || c.werr != syscall.EAGAIN { // nothing to send is sent at once
			return n, err
		}
		if err := c.seat.AwaitSpace(stallPoll); err != nil {
			return 0, err
		}
		if c.dead.Load() || c.overdue(c.outStuck.Load()) {
			return 0, os.ErrDeadlineExceeded
		}
	}
}

// overdue says that the client has not moved since a time for longer than it may.
func (c *conn) overdue(since int64) bool {
	return time.Since(time.Unix(0, since)) > c.srv.cfg.Limits.StuckTimeout
}

// sendMessage sends what the socket takes of iovecs without waiting, also if it is one that waits.
func (o *outbox) sendMessage(fd uintptr) (int, error) {
	o.vector = o.vector[:0]
	for _, p := range o.iovecs {
		v := unix.Iovec{Base: unsafe.SliceData(p)}
		v.SetLen(len(p))
		o.vector = append(o.vector, v)
	}
	o.message.Iov = unsafe.SliceData(o.vector)
	o.message.SetIovlen(len(o.vector))
	n, _, errno := unix.Syscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&o.message)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	clear(o.vector)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}
