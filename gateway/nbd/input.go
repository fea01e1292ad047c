package nbd

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
)

// fill reads from the socket, and waits for something to come. While nothing is there the connection has no buffer.
func (c *conn) fill() error {
	if c.in != nil && c.r > 0 {
		c.w = copy(c.in.data[:c.w-c.r], c.in.data[c.r:c.w])
		c.r = 0
	}
	if c.tls {
		return c.fillTLS()
	}
	if c.seat == nil && c.srv.cfg.Seats.Brisk(&c.pace) {
		c.seize()
	}
	for c.seat != nil {
		if done, err := c.fillSeated(); done {
			return err
		}
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
	if c.tls {
		return c.nc.Read(p)
	}
	if c.seat != nil {
		return c.readMoreSeated(p)
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
