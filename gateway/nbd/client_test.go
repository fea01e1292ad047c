package nbd

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"github.com/pojntfx/go-nbd/pkg/protocol"
)

// client speaks the wire: it sends what it is told to, right or wrong.
type client struct {
	t          testing.TB
	c          net.Conn
	structured bool
	size       uint64
	flags      uint16
}

// dial connects and reads the greeting; the client's flags are not sent yet.
func dial(t testing.TB, addr net.Addr) *client {
	t.Helper()
	nc, err := net.Dial(addr.Network(), addr.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(60 * time.Second))
	return &client{t: t, c: nc}
}

// hello is dial with the handshake's flags exchanged.
func hello(t testing.TB, addr net.Addr) *client {
	t.Helper()
	c := dial(t, addr)
	c.greet(clientFixedNewstyle | clientNoZeroes)
	return c
}

func (c *client) greet(flags uint32) {
	c.t.Helper()
	if got := c.read(18); !bytes.Equal(got, []byte("NBDMAGICIHAVEOPT\x00\x03")) {
		c.t.Fatalf("greeting %q", got)
	}
	c.send(be(flags))
}

// attach is hello and GO for export, with structured replies and base:allocation if asked.
func attach(t testing.TB, addr net.Addr, export string, structured bool) *client {
	t.Helper()
	c := hello(t, addr)
	if structured {
		c.option(optStructuredReply, nil)
		c.expect(optStructuredReply, protocol.NEGOTIATION_TYPE_REPLY_ACK)
		c.structured = true
		c.option(optSetMetaContext, cat(str(export), be(uint32(1)), str(allocationContext)))
		c.expect(optSetMetaContext, repMetaContext)
		c.expect(optSetMetaContext, protocol.NEGOTIATION_TYPE_REPLY_ACK)
	}
	c.option(protocol.NEGOTIATION_ID_OPTION_GO, cat(str(export), be(uint16(0))))
	c.exportInfo(c.expect(protocol.NEGOTIATION_ID_OPTION_GO, protocol.NEGOTIATION_TYPE_REPLY_INFO))
	c.expect(protocol.NEGOTIATION_ID_OPTION_GO, protocol.NEGOTIATION_TYPE_REPLY_ACK)
	return c
}

func (c *client) exportInfo(data []byte) {
	c.t.Helper()
	if len(data) != 12 || binary.BigEndian.Uint16(data) != protocol.NEGOTIATION_TYPE_INFO_EXPORT {
		c.t.Fatalf("not an export information: %x", data)
	}
	c.size, c.flags = binary.BigEndian.Uint64(data[2:]), binary.BigEndian.Uint16(data[10:])
}

func (c *client) send(b []byte) {
	c.t.Helper()
	if _, err := c.c.Write(b); err != nil {
		c.t.Fatalf("send: %v", err)
	}
}

func (c *client) read(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(c.c, b); err != nil {
		c.t.Fatalf("read %d bytes: %v", n, err)
	}
	return b
}

// closed checks that the server has hung up without another byte.
func (c *client) closed() {
	c.t.Helper()
	if n, err := c.c.Read(make([]byte, 1)); n != 0 || isTimeout(err) {
		c.t.Fatalf("connection is not closed: %d bytes, %v", n, err)
	}
}

func isTimeout(err error) bool {
	ne, ok := err.(net.Error)
	return ok && ne.Timeout()
}

func (c *client) option(id uint32, data []byte) {
	c.t.Helper()
	c.send(cat([]byte("IHAVEOPT"), be(id), be(uint32(len(data))), data))
}

// reply reads one option reply.
func (c *client) reply() (id, kind uint32, data []byte) {
	c.t.Helper()
	h := c.read(20)
	if binary.BigEndian.Uint64(h) != protocol.NEGOTIATION_MAGIC_REPLY {
		c.t.Fatalf("bad option reply %x", h)
	}
	return binary.BigEndian.Uint32(h[8:]), binary.BigEndian.Uint32(h[12:]), c.read(int(binary.BigEndian.Uint32(h[16:])))
}

func (c *client) expect(id, kind uint32) []byte {
	c.t.Helper()
	gotID, gotKind, data := c.reply()
	if gotID != id || gotKind != kind {
		c.t.Fatalf("option %d: reply %#x for option %d (%q), want %#x", id, gotKind, gotID, data, kind)
	}
	return data
}

// request is the header of a request, and its payload.
func (c *client) request(cmd, flags uint16, cookie, off uint64, length uint32, payload []byte) {
	c.t.Helper()
	c.send(rawRequest(cmd, flags, cookie, off, length, payload))
}

func rawRequest(cmd, flags uint16, cookie, off uint64, length uint32, payload []byte) []byte {
	return cat(be(protocol.TRANSMISSION_MAGIC_REQUEST), be(flags), be(cmd), be(cookie), be(off), be(length), payload)
}

// answer is a reply of the transmission phase with its data: read bytes, or the descriptors of a block status.
type answer struct {
	cookie uint64
	errno  uint32
	data   []byte
}

// answer reads one reply. want gives the length of a simple reply's data by cookie.
func readAnswer(r io.Reader, want func(cookie uint64) int) (answer, error) {
	magic := make([]byte, 4)
	if _, err := io.ReadFull(r, magic); err != nil {
		return answer{}, err
	}
	switch binary.BigEndian.Uint32(magic) {
	case protocol.TRANSMISSION_MAGIC_REPLY:
		h := make([]byte, 12)
		if _, err := io.ReadFull(r, h); err != nil {
			return answer{}, err
		}
		a := answer{errno: binary.BigEndian.Uint32(h), cookie: binary.BigEndian.Uint64(h[4:])}
		if a.errno == 0 {
			a.data = make([]byte, want(a.cookie))
		}
		_, err := io.ReadFull(r, a.data)
		return a, err
	case structuredMagic:
		h := make([]byte, 16)
		if _, err := io.ReadFull(r, h); err != nil {
			return answer{}, err
		}
		data := make([]byte, binary.BigEndian.Uint32(h[12:]))
		if _, err := io.ReadFull(r, data); err != nil {
			return answer{}, err
		}
		a := answer{cookie: binary.BigEndian.Uint64(h[4:])}
		switch kind := binary.BigEndian.Uint16(h[2:]); kind {
		case chunkNone:
		case chunkOffsetData:
			a.data = data[8:]
		case chunkBlockStatus:
			a.data = data[4:]
		case chunkError:
			a.errno = binary.BigEndian.Uint32(data)
		default:
			return a, fmt.Errorf("chunk of type %d", kind)
		}
		if binary.BigEndian.Uint16(h) != chunkDone {
			return a, fmt.Errorf("chunk flags %#x", h[:2])
		}
		return a, nil
	}
	return answer{}, fmt.Errorf("bad reply magic %x", magic)
}

// do sends one request and waits for its answer, which must be the next.
func (c *client) do(cmd, flags uint16, off uint64, length uint32, payload []byte) answer {
	c.t.Helper()
	const cookie = 0xfeedface12345678
	c.request(cmd, flags, cookie, off, length, payload)
	return c.next(cookie, cmd, length)
}

func (c *client) next(cookie uint64, cmd uint16, length uint32) answer {
	c.t.Helper()
	a, err := readAnswer(c.c, func(uint64) int {
		if cmd == cmdRead {
			return int(length)
		}
		return 0
	})
	if err != nil {
		c.t.Fatalf("answer to command %d: %v", cmd, err)
	}
	if a.cookie != cookie {
		c.t.Fatalf("answer to command %d: cookie %#x, want %#x", cmd, a.cookie, cookie)
	}
	return a
}

func (c *client) pread(off uint64, n uint32) []byte {
	c.t.Helper()
	a := c.do(cmdRead, 0, off, n, nil)
	if a.errno != 0 || len(a.data) != int(n) {
		c.t.Fatalf("read %d+%d: errno %d, %d bytes", off, n, a.errno, len(a.data))
	}
	return a.data
}

func (c *client) pwrite(off uint64, p []byte) {
	c.t.Helper()
	c.ok(cmdWrite, 0, off, uint32(len(p)), p)
}

func (c *client) ok(cmd, flags uint16, off uint64, length uint32, payload []byte) {
	c.t.Helper()
	c.fails(cmd, flags, off, length, payload, 0)
}

func (c *client) fails(cmd, flags uint16, off uint64, length uint32, payload []byte, errno uint32) {
	c.t.Helper()
	if a := c.do(cmd, flags, off, length, payload); a.errno != errno {
		c.t.Fatalf("command %d flags %#x at %d+%d: errno %d, want %d", cmd, flags, off, length, a.errno, errno)
	}
}

// be encodes integers in network order.
func be[T uint16 | uint32 | uint64](v T) []byte {
	var b bytes.Buffer
	if err := binary.Write(&b, binary.BigEndian, v); err != nil {
		panic(err)
	}
	return b.Bytes()
}

// str encodes a string after its length.
func str(s string) []byte { return append(be(uint32(len(s))), s...) }

func cat(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
