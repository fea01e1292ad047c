// Package nbdclient is a pipelined NBD client in user space, for import, export and self-checks.
//
// It speaks fixed newstyle negotiation (GO, LIST, STARTTLS), structured replies and base:allocation where the server has
// them. A Client is one connection. Its methods may be called concurrently; the requests of all callers share the wire and
// are answered in any order. A broken connection ends every request with the same error and is not dialled again: what was
// in flight has an unknown outcome, and only the caller knows what to do about that.
//
// Nothing a server says is trusted: option replies and chunks are bounded before memory is taken for them, and a read counts
// as good only when the chunks covered exactly the bytes that were asked for.
package nbdclient

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/pojntfx/go-nbd/pkg/protocol"

	"varve/volumedriver/blockio"
)

// Constants of the NBD protocol (NBD project, doc/proto.md) that package protocol does not have.
const (
	handshakeNoZeroes = 1 << 1

	optStartTLS        = 5
	optStructuredReply = 8
	optSetMetaContext  = 10

	repMetaContext = 4
	repErrorBit    = 1 << 31
	repErrPolicy   = 2 | repErrorBit
	repErrTLSReqd  = 5 | repErrorBit
	repErrShutdown = 7 | repErrorBit

	flagReadOnly       = 1 << 1
	flagSendFlush      = 1 << 2
	flagSendWriteZeros = 1 << 6

	cmdFlush       = 3
	cmdWriteZeroes = 6
	cmdBlockStatus = 7

	magicStructuredReply = 0x668e33ef
	chunkFlagDone        = 1
	chunkNone            = 0
	chunkOffsetData      = 1
	chunkOffsetHole      = 2
	chunkBlockStatus     = 5
	chunkErrorBit        = 1 << 15

	stateHole = 1
	stateZero = 2
)

const (
	handshakeTimeout    = 15 * time.Second
	optionReplyBytesMax = 64 << 10
	optionRepliesMax    = 1 << 16
	chunkExtentsMax     = 1 << 20
	errorTextBytesMax   = 4096 + 14

	// RequestBytesMax is the largest payload the client sends or asks for in one request.
	RequestBytesMax = 32 << 20
)

var (
	// ErrUnknownExport: the server has no export of that name.
	ErrUnknownExport = errors.New("the server has no such export")
	// ErrTLSRequired: the server wants TLS first.
	ErrTLSRequired = errors.New("the server asks for TLS")
	// ErrUnsupported: the server does not offer the request.
	ErrUnsupported = errors.New("the server does not support the request")
	// ErrClosed: the client was closed.
	ErrClosed = errors.New("the NBD connection is closed")
)

// Client is a connection to one export.
type Client struct {
	conn       net.Conn
	in         *bufio.Reader
	size       int64
	flags      uint16
	structured bool
	contextID  uint32
	hasStatus  bool

	sendMu sync.Mutex // orders requests on the wire

	mu      sync.Mutex // guards what follows
	calls   map[uint64]*call
	next    uint64
	err     error
	stopped chan struct{} // closed when the receiver has ended
}

// call is a request in flight. The receiver owns it until done is closed.
type call struct {
	read    []byte // bytes a read fills
	off     int64
	covered int64
	extents []blockio.Extent
	err     error
	done    chan struct{}
}

// Dial connects and opens the export.
func Dial(ctx context.Context, t Target) (*Client, error) {
	var c *Client
	err := negotiate(ctx, t, func(h *handshake) error {
		var err error
		c, err = h.open(t.Export)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open NBD %s: %w", t, err)
	}
	go c.receive()
	return c, nil
}

// List gives the names of a server's exports.
func List(ctx context.Context, t Target) ([]string, error) {
	var names []string
	err := negotiate(ctx, t, func(h *handshake) error {
		defer h.conn.Close()
		var err error
		names, err = h.list()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list NBD exports at %s: %w", t.Address, err)
	}
	return names, nil
}

// negotiate dials and runs the handshake up to and including f, within handshakeTimeout and ctx. The connection is closed
// on any error; otherwise it is f's.
func negotiate(ctx context.Context, t Target, f func(*handshake) error) (err error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	conn, err := t.dial(ctx)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer func() {
		if !stop() && err == nil {
			err = ctx.Err()
		}
		if err != nil {
			conn.Close()
		}
	}()
	h := &handshake{conn: conn, in: bufio.NewReaderSize(conn, 128<<10)}
	if err := h.greet(); err != nil {
		return err
	}
	if t.TLS != nil {
		if err := h.startTLS(ctx, t.TLS); err != nil {
			return err
		}
	}
	return f(h)
}

// handshake is a connection in the option phase.
type handshake struct {
	conn net.Conn
	in   *bufio.Reader
}

func (h *handshake) greet() error {
	var b [18]byte
	if _, err := io.ReadFull(h.in, b[:]); err != nil {
		return fmt.Errorf("read greeting: %w", err)
	}
	if binary.BigEndian.Uint64(b[:]) != protocol.NEGOTIATION_MAGIC_OLDSTYLE ||
		binary.BigEndian.Uint64(b[8:]) != protocol.NEGOTIATION_MAGIC_OPTION {
		return errors.New("the peer is no newstyle NBD server")
	}
	flags := binary.BigEndian.Uint16(b[16:])
	if flags&protocol.NEGOTIATION_HANDSHAKE_FLAG_FIXED_NEWSTYLE == 0 {
		return errors.New("the server does not speak fixed newstyle")
	}
	return writeAll(h.conn, binary.BigEndian.AppendUint32(nil, uint32(flags)&(1|handshakeNoZeroes)))
}

func (h *handshake) option(id uint32, data []byte) error {
	b := binary.BigEndian.AppendUint64(nil, protocol.NEGOTIATION_MAGIC_OPTION)
	b = binary.BigEndian.AppendUint32(b, id)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return writeAll(h.conn, append(b, data...))
}

// reply reads one reply to option id. An error reply comes back as an error.
func (h *handshake) reply(id uint32) (kind uint32, data []byte, err error) {
	var b [20]byte
	if _, err := io.ReadFull(h.in, b[:]); err != nil {
		return 0, nil, fmt.Errorf("read option reply: %w", err)
	}
	if binary.BigEndian.Uint64(b[:]) != protocol.NEGOTIATION_MAGIC_REPLY || binary.BigEndian.Uint32(b[8:]) != id {
		return 0, nil, errors.New("option reply is out of step")
	}
	kind = binary.BigEndian.Uint32(b[12:])
	n := binary.BigEndian.Uint32(b[16:])
	if n > optionReplyBytesMax {
		return 0, nil, fmt.Errorf("option reply of %d bytes is too long", n)
	}
	data = make([]byte, n)
	if _, err := io.ReadFull(h.in, data); err != nil {
		return 0, nil, fmt.Errorf("read option reply: %w", err)
	}
	switch {
	case kind&repErrorBit == 0:
		return kind, data, nil
	case kind == protocol.NEGOTIATION_TYPE_REPLY_ERR_UNKNOWN:
		return kind, nil, ErrUnknownExport
	case kind == repErrTLSReqd:
		return kind, nil, ErrTLSRequired
	case kind == protocol.NEGOTIATION_TYPE_REPLY_ERR_UNSUPPORTED:
		return kind, nil, ErrUnsupported
	case kind == repErrPolicy:
		return kind, nil, fmt.Errorf("refused by the server's policy: %q", clip(data))
	case kind == repErrShutdown:
		return kind, nil, errors.New("the server is shutting down")
	}
	return kind, nil, fmt.Errorf("option %d refused with %#x: %q", id, kind, clip(data))
}

func (h *handshake) startTLS(ctx context.Context, cfg *tls.Config) error {
	if err := h.option(optStartTLS, nil); err != nil {
		return err
	}
	if _, _, err := h.reply(optStartTLS); err != nil {
		return fmt.Errorf("start TLS: %w", err)
	}
	if h.in.Buffered() > 0 {
		return errors.New("the server sent plain bytes after STARTTLS")
	}
	c := tls.Client(h.conn, cfg)
	if err := c.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("start TLS: %w", err)
	}
	h.conn, h.in = c, bufio.NewReaderSize(c, 128<<10)
	return nil
}

func (h *handshake) list() ([]string, error) {
	if err := h.option(protocol.NEGOTIATION_ID_OPTION_LIST, nil); err != nil {
		return nil, err
	}
	var names []string
	for range optionRepliesMax {
		kind, data, err := h.reply(protocol.NEGOTIATION_ID_OPTION_LIST)
		if err != nil {
			return nil, err
		}
		if kind == protocol.NEGOTIATION_TYPE_REPLY_ACK {
			return names, h.option(protocol.NEGOTIATION_ID_OPTION_ABORT, nil)
		}
		if kind != protocol.NEGOTIATION_TYPE_REPLY_SERVER || len(data) < 4 {
			return nil, fmt.Errorf("unexpected reply %#x to LIST", kind)
		}
		n := binary.BigEndian.Uint32(data)
		if int64(n) > int64(len(data)-4) {
			return nil, errors.New("export name is longer than its reply")
		}
		names = append(names, string(data[4:4+n]))
	}
	return nil, fmt.Errorf("more than %d exports", optionRepliesMax)
}

// open negotiates what the client can use and goes to transmission.
func (h *handshake) open(export string) (*Client, error) {
	c := &Client{calls: make(map[uint64]*call), stopped: make(chan struct{})}
	err := h.ask(optStructuredReply, nil)
	c.structured = err == nil
	if err != nil && !errors.Is(err, ErrUnsupported) {
		return nil, err
	}
	if c.structured {
		if err := h.allocationContext(export, c); err != nil {
			return nil, err
		}
	}
	body := binary.BigEndian.AppendUint32(nil, uint32(len(export)))
	body = append(append(body, export...), 0, 0)
	if err := h.option(protocol.NEGOTIATION_ID_OPTION_GO, body); err != nil {
		return nil, err
	}
	seen := false
	for range optionRepliesMax {
		kind, data, err := h.reply(protocol.NEGOTIATION_ID_OPTION_GO)
		if err != nil {
			return nil, err
		}
		if kind == protocol.NEGOTIATION_TYPE_REPLY_ACK {
			if !seen {
				return nil, errors.New("the server gave no size")
			}
			c.conn, c.in = h.conn, h.in
			return c, nil
		}
		if kind == protocol.NEGOTIATION_TYPE_REPLY_INFO && len(data) >= 12 &&
			binary.BigEndian.Uint16(data) == protocol.NEGOTIATION_TYPE_INFO_EXPORT {
			c.size = int64(binary.BigEndian.Uint64(data[2:]))
			c.flags = binary.BigEndian.Uint16(data[10:])
			if c.size < 0 {
				return nil, errors.New("the export's size is beyond 2^63")
			}
			seen = true
		}
	}
	return nil, errors.New("GO is never acknowledged")
}

// ask sends an option whose only good answer is an acknowledgement.
func (h *handshake) ask(id uint32, data []byte) error {
	if err := h.option(id, data); err != nil {
		return err
	}
	kind, _, err := h.reply(id)
	if err == nil && kind != protocol.NEGOTIATION_TYPE_REPLY_ACK {
		err = fmt.Errorf("unexpected reply %#x to option %d", kind, id)
	}
	return err
}

func (h *handshake) allocationContext(export string, c *Client) error {
	const name = "base:allocation"
	b := binary.BigEndian.AppendUint32(nil, uint32(len(export)))
	b = append(b, export...)
	b = binary.BigEndian.AppendUint32(b, 1)
	b = binary.BigEndian.AppendUint32(b, uint32(len(name)))
	if err := h.option(optSetMetaContext, append(b, name...)); err != nil {
		return err
	}
	for range optionRepliesMax {
		kind, data, err := h.reply(optSetMetaContext)
		if errors.Is(err, ErrUnsupported) {
			return nil
		}
		if err != nil {
			return err
		}
		if kind == protocol.NEGOTIATION_TYPE_REPLY_ACK {
			return nil
		}
		if kind == repMetaContext && len(data) == 4+len(name) && string(data[4:]) == name {
			c.contextID, c.hasStatus = binary.BigEndian.Uint32(data), true
		}
	}
	return errors.New("SET_META_CONTEXT is never acknowledged")
}

// Size gives the export's size in bytes.
func (c *Client) Size() int64 { return c.size }

// ReadOnly says that the export takes no writes.
func (c *Client) ReadOnly() bool { return c.flags&flagReadOnly != 0 }

// ReadAt fills p from off.
func (c *Client) ReadAt(ctx context.Context, p []byte, off int64) error {
	k := &call{read: p, off: off}
	if err := c.do(ctx, k, protocol.TRANSMISSION_TYPE_REQUEST_READ, 0, off, len(p), nil); err != nil {
		return fmt.Errorf("NBD read of %d bytes at %d: %w", len(p), off, err)
	}
	return nil
}

// WriteAt writes p at off. It is durable after the next Flush.
func (c *Client) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := c.do(ctx, &call{}, protocol.TRANSMISSION_TYPE_REQUEST_WRITE, 0, off, len(p), p); err != nil {
		return fmt.Errorf("NBD write of %d bytes at %d: %w", len(p), off, err)
	}
	return nil
}

// Zero makes n bytes from off read as zeros, without storage behind them where the server can do that.
// Without write zeroes on the server it is ErrUnsupported.
func (c *Client) Zero(ctx context.Context, off int64, n int) error {
	if c.flags&flagSendWriteZeros == 0 {
		return ErrUnsupported
	}
	if err := c.do(ctx, &call{}, cmdWriteZeroes, 0, off, n, nil); err != nil {
		return fmt.Errorf("NBD write zeroes of %d bytes at %d: %w", n, off, err)
	}
	return nil
}

// Flush makes every write that was answered before durable. Servers without flush make writes durable by themselves.
func (c *Client) Flush(ctx context.Context) error {
	if c.flags&flagSendFlush == 0 {
		return nil
	}
	if err := c.do(ctx, &call{}, cmdFlush, 0, 0, 0, nil); err != nil {
		return fmt.Errorf("NBD flush: %w", err)
	}
	return nil
}

// Extents gives the allocation of [off,off+n), or of a shorter range from off on: at least one extent. A server without
// block status gets one extent of data.
func (c *Client) Extents(ctx context.Context, off, n int64) ([]blockio.Extent, error) {
	n = min(n, 1<<31)
	if !c.hasStatus {
		return []blockio.Extent{{Length: n}}, nil
	}
	k := &call{}
	if err := c.do(ctx, k, cmdBlockStatus, 0, off, int(n), nil); err != nil {
		return nil, fmt.Errorf("NBD block status of %d bytes at %d: %w", n, off, err)
	}
	if len(k.extents) == 0 {
		return nil, fmt.Errorf("NBD block status of %d bytes at %d: the answer is empty", n, off)
	}
	return k.extents, nil
}

// Close says goodbye and ends the connection. Requests in flight end with ErrClosed.
func (c *Client) Close() error {
	c.mu.Lock()
	idle := len(c.calls) == 0 && c.err == nil
	c.mu.Unlock()
	if idle {
		c.conn.SetWriteDeadline(time.Now().Add(time.Second))
		c.send(header(protocol.TRANSMISSION_TYPE_REQUEST_DISC, 0, 0, 0, 0), nil)
	}
	c.fail(ErrClosed)
	<-c.stopped
	return nil
}

func header(cmd, flags uint16, handle uint64, off int64, n int) []byte {
	b := make([]byte, 0, 28)
	b = binary.BigEndian.AppendUint32(b, protocol.TRANSMISSION_MAGIC_REQUEST)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, cmd)
	b = binary.BigEndian.AppendUint64(b, handle)
	b = binary.BigEndian.AppendUint64(b, uint64(off))
	return binary.BigEndian.AppendUint32(b, uint32(n))
}

func (c *Client) send(head, payload []byte) error {
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	bufs := net.Buffers{head}
	if len(payload) > 0 {
		bufs = append(bufs, payload)
	}
	_, err := bufs.WriteTo(c.conn)
	return err
}

// do sends a request and waits for its end. When ctx ends first the connection is given up, because the receiver may be
// about to fill the caller's buffer.
func (c *Client) do(ctx context.Context, k *call, cmd, flags uint16, off int64, n int, payload []byte) error {
	if off < 0 || n < 0 || off > c.size || int64(n) > c.size-off {
		return blockio.ErrBeyondEnd
	}
	if (len(k.read) > 0 || len(payload) > 0) && n > RequestBytesMax {
		return fmt.Errorf("more than %d bytes in one request", RequestBytesMax)
	}
	k.done = make(chan struct{})
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return c.err
	}
	handle := c.next
	c.next++
	c.calls[handle] = k
	c.mu.Unlock()
	if err := c.send(header(cmd, flags, handle, off, n), payload); err != nil {
		c.fail(err)
	}
	select {
	case <-k.done:
	case <-ctx.Done():
		c.fail(ctx.Err())
		<-k.done
	}
	return k.err
}

// fail ends the connection with err; the receiver then ends every call.
func (c *Client) fail(err error) {
	c.mu.Lock()
	if c.err == nil {
		c.err = err
	}
	c.mu.Unlock()
	c.conn.Close()
}

func (c *Client) receive() {
	defer close(c.stopped)
	for {
		if err := c.receiveOne(); err != nil {
			c.fail(fmt.Errorf("NBD connection: %w", err))
			break
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for handle, k := range c.calls {
		delete(c.calls, handle)
		if k.err == nil {
			k.err = c.err
		}
		close(k.done)
	}
}

func (c *Client) lookup(handle uint64) (*call, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k := c.calls[handle]
	if k == nil {
		return nil, fmt.Errorf("reply to a request %d that was never sent", handle)
	}
	return k, nil
}

// finish ends a call that the server answered completely.
func (c *Client) finish(handle uint64, k *call) {
	c.mu.Lock()
	delete(c.calls, handle)
	c.mu.Unlock()
	if k.err == nil && k.covered != int64(len(k.read)) {
		k.err = fmt.Errorf("the server sent %d of %d bytes", k.covered, len(k.read))
	}
	close(k.done)
}

func (c *Client) receiveOne() error {
	var b [20]byte
	if _, err := io.ReadFull(c.in, b[:16]); err != nil {
		return err
	}
	switch binary.BigEndian.Uint32(b[:]) {
	case protocol.TRANSMISSION_MAGIC_REPLY:
		return c.simpleReply(binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint64(b[8:]))
	case magicStructuredReply:
		if _, err := io.ReadFull(c.in, b[16:]); err != nil {
			return err
		}
		flags, kind := binary.BigEndian.Uint16(b[4:]), binary.BigEndian.Uint16(b[6:])
		return c.chunk(flags, kind, binary.BigEndian.Uint64(b[8:]), binary.BigEndian.Uint32(b[16:]))
	}
	return fmt.Errorf("unknown reply magic %#x", b[:4])
}

func (c *Client) simpleReply(code uint32, handle uint64) error {
	k, err := c.lookup(handle)
	if err != nil {
		return err
	}
	if code != 0 {
		k.err = status(code)
	} else if len(k.read) > 0 {
		if c.structured {
			return errors.New("simple reply to a read after structured replies were agreed")
		}
		if _, err := io.ReadFull(c.in, k.read); err != nil {
			return err
		}
		k.covered = int64(len(k.read))
	}
	c.finish(handle, k)
	return nil
}

func (c *Client) chunk(flags, kind uint16, handle uint64, n uint32) error {
	k, err := c.lookup(handle)
	if err != nil {
		return err
	}
	switch {
	case kind == chunkNone && n == 0:
	case kind == chunkOffsetData && n > 8:
		err = c.dataChunk(k, int64(n)-8)
	case kind == chunkOffsetHole && n == 12:
		err = c.holeChunk(k)
	case kind == chunkBlockStatus && n >= 12 && (n-4)%8 == 0 && (n-4)/8 <= chunkExtentsMax:
		err = c.statusChunk(k, int(n-4)/8)
	case kind&chunkErrorBit != 0 && n >= 6 && n <= errorTextBytesMax:
		err = c.errorChunk(k, int(n))
	default:
		err = fmt.Errorf("chunk of kind %#x with %d bytes", kind, n)
	}
	if err != nil {
		return err
	}
	if flags&chunkFlagDone != 0 {
		c.finish(handle, k)
	}
	return nil
}

// window gives the part of the caller's buffer that a chunk speaks of.
func (k *call) window(off uint64, n int64) ([]byte, error) {
	rel := int64(off) - k.off
	if int64(off) < 0 || rel < 0 || n < 0 || rel > int64(len(k.read)) || n > int64(len(k.read))-rel {
		return nil, errors.New("read chunk lies outside of its request")
	}
	k.covered += n
	return k.read[rel : rel+n], nil
}

func (c *Client) dataChunk(k *call, n int64) error {
	var b [8]byte
	if _, err := io.ReadFull(c.in, b[:]); err != nil {
		return err
	}
	w, err := k.window(binary.BigEndian.Uint64(b[:]), n)
	if err != nil {
		return err
	}
	_, err = io.ReadFull(c.in, w)
	return err
}

func (c *Client) holeChunk(k *call) error {
	var b [12]byte
	if _, err := io.ReadFull(c.in, b[:]); err != nil {
		return err
	}
	w, err := k.window(binary.BigEndian.Uint64(b[:]), int64(binary.BigEndian.Uint32(b[8:])))
	clear(w)
	return err
}

func (c *Client) statusChunk(k *call, count int) error {
	var b [8]byte
	if _, err := io.ReadFull(c.in, b[:4]); err != nil {
		return err
	}
	mine := binary.BigEndian.Uint32(b[:]) == c.contextID
	for range count {
		if _, err := io.ReadFull(c.in, b[:]); err != nil {
			return err
		}
		if n := binary.BigEndian.Uint32(b[:]); mine && n > 0 {
			s := binary.BigEndian.Uint32(b[4:])
			k.extents = append(k.extents, blockio.Extent{Length: int64(n), Hole: s&stateHole != 0, Zero: s&stateZero != 0})
		}
	}
	return nil
}

func (c *Client) errorChunk(k *call, n int) error {
	b := make([]byte, n)
	if _, err := io.ReadFull(c.in, b); err != nil {
		return err
	}
	k.err = status(binary.BigEndian.Uint32(b))
	return nil
}

// status turns an NBD error number into an error that keeps it: errors.Is(err, syscall.ENOSPC) and the like hold.
func status(code uint32) error {
	switch code {
	case 1, 5, 12, 22, 28, 75, 95, 108: // the numbers of NBD are those of Linux
		return syscall.Errno(code)
	}
	return fmt.Errorf("NBD error %d", code)
}

func writeAll(w io.Writer, b []byte) error {
	_, err := w.Write(b)
	return err
}

func clip(b []byte) []byte { return b[:min(len(b), 200)] }
