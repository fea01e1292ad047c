package nfs

import (
	"context"
	"net"
	"os"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"varve/gateway/nfs/rpc"
	"varve/gateway/seat"
)

// receive reads what has come, and waits for something to come; where it waits is said in package seat.
func (c *conn) receive() (int, error) {
	deadline := c.nextDeadline()
	if c.seat == nil && c.spoke.Load() && c.s.cfg.Seats.Brisk(&c.pace) {
		c.seize()
	}
	for c.seat != nil {
		if c.stopping.Load() || c.in.Partial() && c.now.After(deadline) {
			return 0, os.ErrDeadlineExceeded
		}
		n, err := c.seat.Read(c.in.Space())
		if err != seat.ErrIdle {
			return n, err
		}
		c.rest()
	}
	if c.timed || !deadline.IsZero() {
		c.nc.SetReadDeadline(deadline)
		c.timed = !deadline.IsZero()
	}
	if c.stopping.Load() {
		return 0, os.ErrDeadlineExceeded
	}
	return c.nc.Read(c.in.Space())
}

// seize takes the socket off the poller, if there is a seat and nobody sends.
func (c *conn) seize() {
	c.outMu.Lock()
	defer c.outMu.Unlock()
	if c.raw == nil || c.state != sendIdle || c.stopping.Load() {
		return
	}
	s := c.s.cfg.Seats.Take(c.raw)
	if s == nil {
		return
	}
	c.nc.Close() // of one of two descriptors
	c.nc, c.seat, c.raw = nil, s, s.Raw()
}

// rest gives the socket back to the poller. If that has no room for it, or somebody sends, another pause will come.
func (c *conn) rest() {
	c.outMu.Lock()
	defer c.outMu.Unlock()
	c.pace = seat.Pace{}
	if c.state != sendIdle {
		return
	}
	nc, err := c.seat.Leave()
	if err != nil {
		c.s.log.Debug("nfs socket not given back to the poller", "client", c.peer, "err", err)
		return
	}
	c.nc, c.seat, c.timed = nc, nil, false
	c.raw, _ = nc.(syscall.Conn).SyscallConn() // fails for a connection that is closed only
}

// severLocked ends the connection, wherever it is: who reads or writes it comes back.
func (c *conn) severLocked() {
	switch {
	case c.seat != nil:
		c.seat.Sever()
	case c.nc != nil:
		c.nc.Close()
	}
}

// closeSocket closes the connection, for the last time.
func (c *conn) closeSocket() {
	c.outMu.Lock()
	defer c.outMu.Unlock()
	if c.seat != nil {
		c.seat.Close()
		c.seat = nil
	} else {
		c.nc.Close()
	}
}

// flush sends b, or leaves to the sender what the socket does not take now. It returns the buffer to go on with: b's, or
// another one when b's is large and was left to the sender.
func (c *conn) flush(b []byte) []byte {
	c.outMu.Lock()
	if c.state != sendIdle {
		b = c.leaveLocked(b, b, len(c.out))
		c.outMu.Unlock()
		return b
	}
	c.state = sendDirect
	c.outMu.Unlock()

	n, err := c.writeNow(b)
	if err != nil {
		c.lose()
		n = len(b)
	}

	c.outMu.Lock()
	defer c.outMu.Unlock()
	if n < len(b) {
		b = c.leaveLocked(b, b[n:], 0)
	}
	if len(c.out) == 0 {
		c.state = sendIdle
		return b[:0]
	}
	c.state = sendHanded
	c.wakeSender()
	return b[:0]
}

// largeBytes: a buffer that holds as much is handed over instead of copied.
const largeBytes = 64 << 10

// leaveLocked puts rest, the end of b, into out at place at, and returns the buffer to go on with.
func (c *conn) leaveLocked(b, rest []byte, at int) []byte {
	c.unsent += len(rest)
	last := len(c.out) - 1
	if len(rest) < largeBytes && at > 0 && at > last && cap(c.out[last])-len(c.out[last]) >= len(rest) {
		c.out[last] = append(c.out[last], rest...)
		return b[:0]
	}
	if len(rest) < largeBytes {
		rest = append(make([]byte, 0, max(rpc.BufferBytesMin, len(rest))), rest...)
		c.out = slices.Insert(c.out, at, rest)
		return b[:0]
	}
	c.out = slices.Insert(c.out, at, rest)
	c.owned = append(c.owned, b)
	return c.s.takeBuffer()
}

// bufferBytes is the capacity of the buffers kept for large replies: a READ of 1 MiB and small ones beside it.
const bufferBytes = TransferBytesMax + burstBytesMax + 4<<10

// takeBuffer returns an empty buffer, giveBuffer takes back one that nobody uses; only those of bufferBytes are kept.
func (s *Server) takeBuffer() []byte {
	if b, ok := s.buffers.Get().(*[bufferBytes]byte); ok {
		return b[:0]
	}
	return nil
}

func (s *Server) giveBuffer(b []byte) {
	if cap(b) == bufferBytes {
		s.buffers.Put((*[bufferBytes]byte)(b[:bufferBytes]))
	}
}

// directWrite writes to a socket without waiting, also if it is one that waits. The closure is made once, since making it for
// each write would allocate.
type directWrite struct {
	b   []byte
	n   int
	err error
	try func(fd uintptr) bool
}

func (w *directWrite) init() {
	w.try = func(fd uintptr) bool {
		for w.n < len(w.b) {
			n, err := unix.SendmsgN(int(fd), w.b[w.n:], nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
			if n > 0 {
				w.n += n
			}
			switch err {
			case nil, syscall.EINTR:
			case syscall.EAGAIN:
				return true
			default:
				w.err = err
				return true
			}
		}
		return true
	}
}

// writeNow writes what the socket takes without waiting; the caller has set state to sendDirect or sendHanded.
func (c *conn) writeNow(b []byte) (int, error) {
	if c.raw == nil {
		return 0, nil
	}
	w := &c.write
	w.b, w.n, w.err = b, 0, nil
	err := c.raw.Write(w.try)
	if err == nil {
		err = w.err
	}
	n := w.n
	w.b = nil
	return n, err
}

// send is the sender goroutine: it answers what completes while the reader waits for the client, and writes what the
// socket did not take at once.
func (c *conn) send(ctx context.Context, quit <-chan struct{}) {
	var b []byte
	for ended := false; !ended; {
		select {
		case <-c.wake:
		case <-quit:
			ended = true
		}
		b = c.answerDone(ctx, b[:0])
		if len(b) > 0 {
			b = c.flush(b)
		}
		c.writeOut()
		if cap(b) > rpc.BufferBytesMin {
			b = nil
		}
	}
}

// writeOut writes what was handed to the sender, waiting for the client.
func (c *conn) writeOut() {
	c.outMu.Lock()
	defer c.outMu.Unlock()
	for c.state == sendHanded {
		if len(c.out) == 0 {
			c.state = sendIdle
			return
		}
		out, owned := c.out, c.owned
		c.out, c.owned, c.unsent = nil, nil, 0
		c.drained.Broadcast()
		c.outMu.Unlock()
		err := c.writeAll(out)
		if err != nil {
			c.lose()
		}
		for _, b := range owned {
			c.s.giveBuffer(b)
		}
		c.outMu.Lock()
	}
}

// writeAll writes what was handed to the sender; the client has stuckWriteTimeout to take it.
func (c *conn) writeAll(out net.Buffers) error {
	if c.seat == nil {
		c.nc.SetWriteDeadline(time.Now().Add(stuckWriteTimeout))
		defer c.nc.SetWriteDeadline(time.Time{})
		_, err := out.WriteTo(c.nc)
		return err
	}
	end := time.Now().Add(stuckWriteTimeout)
	for _, b := range out {
		for len(b) > 0 {
			n, err := c.writeNow(b)
			if err == nil && n < len(b) {
				err = c.seat.AwaitSpace(stallPoll)
			}
			if err == nil && time.Now().After(end) {
				err = os.ErrDeadlineExceeded
			}
			if err != nil {
				return err
			}
			b = b[n:]
		}
	}
	return nil
}

// stallPoll is how often the sender of a seated connection, waiting for the client, looks whether it still should.
const stallPoll = 100 * time.Millisecond
