// Package nbdclient is a pipelined NBD client for tests and load: fixed newstyle, GO, simple replies.
//
// Submit sends a request and returns at once; its callback runs on the connection's reader goroutine when the reply has
// come, or with an error when the connection ends before that, in which case the outcome is unknown. Do waits.
package nbdclient

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Requests of the transmission phase (NBD protocol, "Request types").
const (
	Read        uint16 = 0
	Write       uint16 = 1
	Flush       uint16 = 3
	Trim        uint16 = 4
	WriteZeroes uint16 = 6
)

// FUA asks that a request be durable when it is answered.
const FUA uint16 = 1

const (
	magicInit     = 0x4e42444d41474943 // NBDMAGIC
	magicOption   = 0x49484156454f5054 // IHAVEOPT
	magicOptReply = 0x0003e889045565a9
	magicRequest  = 0x25609513
	magicReply    = 0x67446698
	optGo         = 7
	repAck        = 1
	repInfo       = 3
	infoExport    = 0
)

// ErrDisconnected: the connection ended before the reply; whether the request was carried out is unknown.
var ErrDisconnected = errors.New("nbd connection ended before the reply")

// Error is the server's definite answer to one request.
type Error uint32

func (e Error) Error() string { return fmt.Sprintf("nbd error %d", uint32(e)) }

// Client is one connection to one export.
type Client struct {
	conn  net.Conn
	Size  int64
	Flags uint16

	sending sync.Mutex // one request on the wire at a time
	out     *bufio.Writer

	mu      sync.Mutex // guards pending, next, failed
	pending map[uint64]call
	next    uint64
	failed  error
	ended   chan struct{}
}

type call struct {
	into []byte
	done func(error)
}

// Dial connects to an export.
func Dial(network, addr, export string) (*Client, error) {
	conn, err := net.DialTimeout(network, addr, 10*time.Second)
	if err != nil {
		return nil, err
	}
	c := &Client{conn: conn, out: bufio.NewWriterSize(conn, 256<<10), pending: map[uint64]call{}, ended: make(chan struct{})}
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	if err := c.negotiate(export); err != nil {
		conn.Close()
		return nil, fmt.Errorf("nbd export %q at %s: %w", export, addr, err)
	}
	conn.SetDeadline(time.Time{})
	go c.readReplies()
	return c, nil
}

func (c *Client) negotiate(export string) error {
	var hello [18]byte
	if _, err := io.ReadFull(c.conn, hello[:]); err != nil {
		return err
	}
	be := binary.BigEndian
	if be.Uint64(hello[:]) != magicInit || be.Uint64(hello[8:]) != magicOption {
		return errors.New("not a newstyle NBD server")
	}
	msg := be.AppendUint32(nil, 3) // fixed newstyle, no zeroes
	msg = be.AppendUint64(msg, magicOption)
	msg = be.AppendUint32(msg, optGo)
	msg = be.AppendUint32(msg, uint32(4+len(export)+2))
	msg = be.AppendUint32(msg, uint32(len(export)))
	msg = append(msg, export...)
	msg = be.AppendUint16(msg, 0)
	if _, err := c.conn.Write(msg); err != nil {
		return err
	}
	for range 32 {
		var head [20]byte
		if _, err := io.ReadFull(c.conn, head[:]); err != nil {
			return err
		}
		kind, length := be.Uint32(head[12:]), be.Uint32(head[16:])
		if be.Uint64(head[:]) != magicOptReply || length > 64<<10 {
			return errors.New("malformed option reply")
		}
		body := make([]byte, length)
		if _, err := io.ReadFull(c.conn, body); err != nil {
			return err
		}
		switch {
		case kind == repInfo && length >= 12 && be.Uint16(body) == infoExport:
			c.Size, c.Flags = int64(be.Uint64(body[2:])), be.Uint16(body[10:])
		case kind == repAck:
			return nil
		case kind&(1<<31) != 0:
			return fmt.Errorf("refused with %#x: %s", kind, body)
		}
	}
	return errors.New("no end of option replies")
}

// Submit sends a request. data is the payload of a write, or where a read puts its bytes; otherwise give length by n.
// done may be called before Submit returns when the connection has ended.
func (c *Client) Submit(kind, flags uint16, off int64, n int, data []byte, done func(error)) {
	if data != nil {
		n = len(data)
	}
	var into []byte
	if kind == Read {
		into = data
	}
	c.sending.Lock()
	defer c.sending.Unlock()
	c.mu.Lock()
	if c.failed != nil {
		c.mu.Unlock()
		done(ErrDisconnected)
		return
	}
	c.next++
	cookie := c.next
	c.pending[cookie] = call{into, done}
	c.mu.Unlock()
	var head [28]byte
	be := binary.BigEndian
	be.PutUint32(head[:], magicRequest)
	be.PutUint16(head[4:], flags)
	be.PutUint16(head[6:], kind)
	be.PutUint64(head[8:], cookie)
	be.PutUint64(head[16:], uint64(off))
	be.PutUint32(head[24:], uint32(n))
	c.out.Write(head[:])
	if kind == Write {
		c.out.Write(data)
	}
	if err := c.out.Flush(); err != nil {
		c.conn.Close() // the reader then tells all callers
	}
}

// Do sends a request and waits for its reply.
func (c *Client) Do(kind, flags uint16, off int64, n int, data []byte) error {
	result := make(chan error, 1)
	c.Submit(kind, flags, off, n, data, func(err error) { result <- err })
	return <-result
}

func (c *Client) readReplies() {
	in := bufio.NewReaderSize(c.conn, 256<<10)
	err := c.readAll(in)
	c.conn.Close()
	c.mu.Lock()
	c.failed = err
	lost := c.pending
	c.pending = nil
	c.mu.Unlock()
	for _, p := range lost {
		p.done(ErrDisconnected)
	}
	close(c.ended)
}

func (c *Client) readAll(in *bufio.Reader) error {
	be := binary.BigEndian
	for {
		var head [16]byte
		if _, err := io.ReadFull(in, head[:]); err != nil {
			return err
		}
		if be.Uint32(head[:]) != magicReply {
			return fmt.Errorf("reply begins with %#x", be.Uint32(head[:]))
		}
		c.mu.Lock()
		p, ok := c.pending[be.Uint64(head[8:])]
		delete(c.pending, be.Uint64(head[8:]))
		c.mu.Unlock()
		if !ok {
			return fmt.Errorf("reply to no request: cookie %d", be.Uint64(head[8:]))
		}
		if code := be.Uint32(head[4:]); code != 0 {
			p.done(Error(code))
			continue
		}
		if p.into != nil {
			if _, err := io.ReadFull(in, p.into); err != nil {
				p.done(ErrDisconnected)
				return err
			}
		}
		p.done(nil)
	}
}

// Err is why the connection ended, nil while it lives.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.failed
}

// Close ends the connection; requests without a reply end with ErrDisconnected.
func (c *Client) Close() {
	c.conn.Close()
	<-c.ended
}
