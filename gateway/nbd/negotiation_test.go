package nbd

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pojntfx/go-nbd/pkg/protocol"
)

// described is a Device with a description.
type described struct{ Device }

func (described) Description() string { return "fake d" }

func goldenExports() *exports {
	two := newMemory(1000)
	two.readOnly = true
	e := newExports(map[string]Device{"d": described{newMemory(1 << 20)}, "pool/two": two})
	e.refuse["secret"] = fmt.Errorf("peer may not: %w", ErrNotAllowed)
	e.refuse["broken"] = errors.New("owner is moving")
	e.describe = map[string]string{"pool/two": "two"}
	return e
}

// TestHandshakeScripts plays testdata/handshake: what the client says (C) and what the server answers (S), byte for
// byte, to the end of the connection.
func TestHandshakeScripts(t *testing.T) {
	scripts, err := filepath.Glob("testdata/handshake/*.golden")
	if err != nil || len(scripts) < 10 {
		t.Fatalf("%d scripts, %v", len(scripts), err)
	}
	e := goldenExports()
	_, addr, _ := listen(t, "tcp", Config{Exports: e})
	for _, path := range scripts {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".golden"), func(t *testing.T) {
			play(t, path, dial(t, addr))
			waitFor(t, "release of the exports", func() bool { return e.openNow() == 0 })
		})
	}
}

func play(t *testing.T, path string, c *client) {
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for i, line := range strings.Split(string(text), "\n") {
		if line == "" || line[0] == '#' {
			continue
		}
		b, err := scriptBytes(line[1:])
		if err != nil {
			t.Fatalf("%s:%d: %v", path, i+1, err)
		}
		if line[0] == 'C' {
			c.send(b)
			continue
		}
		if got := c.read(len(b)); !bytes.Equal(got, b) {
			t.Fatalf("%s:%d: got\n%q, want\n%q", path, i+1, got, b)
		}
	}
	c.closed()
}

// scriptBytes turns a line of "text", hex and zeros:N into bytes.
func scriptBytes(line string) ([]byte, error) {
	var b []byte
	for line = strings.TrimSpace(line); line != ""; line = strings.TrimSpace(line) {
		if line[0] == '"' {
			quoted, err := strconv.QuotedPrefix(line)
			if err != nil {
				return nil, err
			}
			b, line = append(b, quoted[1:len(quoted)-1]...), line[len(quoted):]
			continue
		}
		word, rest, _ := strings.Cut(line, " ")
		line = rest
		if n, ok := strings.CutPrefix(word, "zeros:"); ok {
			count, err := strconv.Atoi(n)
			if err != nil {
				return nil, err
			}
			b = append(b, make([]byte, count)...)
			continue
		}
		h, err := hex.DecodeString(word)
		if err != nil {
			return nil, err
		}
		b = append(b, h...)
	}
	return b, nil
}

// waitFor polls for what another goroutine will bring about.
func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("no %s in 10 s", what)
		}
	}
}

// TestNameLengths is C1: every combination of an option's length and the lengths inside it. The server answers
// each with an error, or serves it when it is right, and stays in step: LIST is answered after each.
func TestNameLengths(t *testing.T) {
	_, addr, _ := listen(t, "tcp", Config{Exports: goldenExports()})
	lengths := []uint32{0, 1, 2, 3, 4, 5, 1024, 1025, nameMax, nameMax + 1, optionMax - 4, optionMax, 1<<31 - 1, 1 << 31, 1<<32 - 4, 1<<32 - 1}
	present := []int{0, 1, 3, 4, 5, 6, 7, 1030, nameMax + 4, nameMax + 6, nameMax + 8, optionMax}
	ids := []uint32{protocol.NEGOTIATION_ID_OPTION_INFO, protocol.NEGOTIATION_ID_OPTION_GO, optListMetaContext, optSetMetaContext}
	var c *client
	used := optionsMax
	for _, id := range ids {
		for _, length := range lengths {
			for _, n := range present {
				if used+2 > optionsMax {
					if c != nil {
						c.c.Close()
					}
					c, used = hello(t, addr), 1
					c.option(optStructuredReply, nil)
					c.expect(optStructuredReply, protocol.NEGOTIATION_TYPE_REPLY_ACK)
				}
				data := cat(be(length), bytes.Repeat([]byte{0xff}, optionMax))[:n]
				c.option(id, data)
				gotID, kind, _ := c.reply()
				if gotID != id || kind&(1<<31) == 0 {
					t.Fatalf("option %d, name length %d in %d bytes: reply %#x", id, length, n, kind)
				}
				list(c)
				used += 2
			}
		}
	}
}

// list sends LIST and reads to its ACK.
func list(c *client) (names []string) {
	c.t.Helper()
	c.option(protocol.NEGOTIATION_ID_OPTION_LIST, nil)
	for {
		id, kind, data := c.reply()
		switch {
		case id == protocol.NEGOTIATION_ID_OPTION_LIST && kind == protocol.NEGOTIATION_TYPE_REPLY_ACK:
			return names
		case id == protocol.NEGOTIATION_ID_OPTION_LIST && kind == protocol.NEGOTIATION_TYPE_REPLY_SERVER:
			names = append(names, string(data[4:]))
		default:
			c.t.Fatalf("LIST: option %d reply %#x", id, kind)
		}
	}
}

// TestInfoCounts: the number of information requests and of queries has to match what follows.
func TestInfoCounts(t *testing.T) {
	_, addr, _ := listen(t, "tcp", Config{Exports: goldenExports()})
	for _, count := range []uint16{1, 2, 3, 0x7fff, 0x8000, 0xffff} {
		c := hello(t, addr)
		c.option(protocol.NEGOTIATION_ID_OPTION_GO, cat(str("d"), be(count), make([]byte, 3)))
		c.expect(protocol.NEGOTIATION_ID_OPTION_GO, repErrInvalid)
		list(c)
	}
	for _, count := range []uint32{1, 2, 3, 1 << 30, 1<<30 + 1, 1<<31 - 1, 1<<32 - 1} {
		c := hello(t, addr)
		c.option(optStructuredReply, nil)
		c.expect(optStructuredReply, protocol.NEGOTIATION_TYPE_REPLY_ACK)
		c.option(optSetMetaContext, cat(str("d"), be(count), make([]byte, 3)))
		c.expect(optSetMetaContext, repErrInvalid)
		c.option(optSetMetaContext, cat(str("d"), be(uint32(1)), str("base:allocation"), []byte("more")))
		c.expect(optSetMetaContext, repErrInvalid)
		list(c)
	}
}

// TestNameAtLimit: 4,096 bytes are a name like any other.
func TestNameAtLimit(t *testing.T) {
	long := strings.Repeat("n", nameMax)
	_, addr, _ := listen(t, "tcp", Config{Exports: newExports(map[string]Device{long: newMemory(4096)})})
	if c := attach(t, addr, long, true); c.size != 4096 {
		t.Fatalf("size %d", c.size)
	}
	c := hello(t, addr)
	c.option(optExportName, []byte(long))
	c.read(10)
	c.ok(cmdFlush, 0, 0, 0, nil)
	if names := list(hello(t, addr)); !slices.Equal(names, []string{long}) {
		t.Fatalf("%d names", len(names))
	}
}

// TestOptionLengths: up to the limit data is read; a little more is refused and skipped; absurd lengths end the
// connection with nothing read.
func TestOptionLengths(t *testing.T) {
	_, addr, _ := listen(t, "tcp", Config{Exports: goldenExports()})
	for _, n := range []int{optionMax, optionMax + 1, optionSkipMax} {
		c := hello(t, addr)
		c.option(0x7777, make([]byte, n))
		want := repErrTooBig
		if n <= optionMax {
			want = protocol.NEGOTIATION_TYPE_REPLY_ERR_UNSUPPORTED
		}
		c.expect(0x7777, want)
		list(c)
	}
	for _, n := range []uint32{optionSkipMax + 1, 1 << 30, 1<<31 - 1, 1<<32 - 1} {
		c := hello(t, addr)
		c.send(cat([]byte("IHAVEOPT"), be(uint32(0x7777)), be(n)))
		c.expect(0x7777, repErrTooBig)
		c.closed()
		c = hello(t, addr)
		c.send(cat([]byte("IHAVEOPT"), be(optExportName), be(n)))
		c.closed()
	}
}

func TestOptionCount(t *testing.T) {
	_, addr, _ := listen(t, "tcp", Config{Exports: goldenExports()})
	c := hello(t, addr)
	for range optionsMax {
		c.option(0x7777, nil)
		c.expect(0x7777, protocol.NEGOTIATION_TYPE_REPLY_ERR_UNSUPPORTED)
	}
	c.option(0x7777, nil)
	c.closed()
}

func TestHandshakeTimeout(t *testing.T) {
	_, addr, _ := listen(t, "tcp", Config{Exports: goldenExports(), Limits: Limits{HandshakeTimeout: 100 * time.Millisecond}})
	dial(t, addr) // says nothing at all
	slow := hello(t, addr)
	begun := time.Now()
	for time.Since(begun) < 5*time.Second {
		// a byte now and then does not buy time
		if _, err := slow.c.Write([]byte{'I'}); err != nil {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if spent := time.Since(begun); spent > 3*time.Second {
		t.Fatalf("handshake ended after %v", spent)
	}
	// Transmission has no such limit.
	c := attach(t, addr, "d", true)
	time.Sleep(200 * time.Millisecond)
	c.ok(cmdFlush, 0, 0, 0, nil)
}

// TestHandshakesOfOneAddress: those over an address's share wait for their turn and get it.
func TestHandshakesOfOneAddress(t *testing.T) {
	s, addr, _ := listen(t, "tcp", Config{Exports: goldenExports(), Limits: Limits{HandshakesPerIP: 2}})
	first, second := hello(t, addr), hello(t, addr)
	third := dial(t, addr)
	waitFor(t, "third handshake", func() bool { return s.admit.waiting() == 3 })
	third.c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if _, err := third.c.Read(make([]byte, 1)); !isTimeout(err) {
		t.Fatalf("a third handshake is served: %v", err)
	}
	third.c.SetReadDeadline(time.Now().Add(10 * time.Second))
	first.c.Close()
	third.greet(clientFixedNewstyle)
	list(third)
	list(second)
}

// TestHandshakesFull: when all places are taken by one address, it loses the oldest to another.
func TestHandshakesFull(t *testing.T) {
	s, addr, _ := listen(t, "tcp", Config{Exports: goldenExports(), Limits: Limits{Handshakes: 3}})
	var greedy []*client
	for range 3 {
		greedy = append(greedy, hello(t, addr))
	}
	refused := dial(t, addr)
	refused.closed()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 9)}}
	nc, err := d.Dial("tcp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(10 * time.Second))
	other := &client{t: t, c: nc}
	other.greet(clientFixedNewstyle)
	list(other)
	greedy[0].closed()
	list(greedy[1])
	list(greedy[2])
	if n := s.admit.waiting(); n != 3 {
		t.Fatalf("%d handshakes", n)
	}
}

func TestConnectionCap(t *testing.T) {
	_, addr, _ := listen(t, "tcp", Config{Exports: goldenExports(), Limits: Limits{Connections: 2}})
	a := attach(t, addr, "d", true)
	attach(t, addr, "d", true)
	dial(t, addr).closed()
	a.request(cmdDisc, 0, 0, 0, 0, nil)
	a.closed()
	waitFor(t, "free place", func() bool {
		nc, err := net.Dial("tcp", addr.String())
		if err != nil {
			return false
		}
		defer nc.Close()
		nc.SetDeadline(time.Now().Add(time.Second))
		_, err = io.ReadFull(nc, make([]byte, 18))
		return err == nil
	})
}

// TestMemoryBeforeAttach: 200 clients that announce as much as they can and send some of it cost at most 64 KiB each.
func TestMemoryBeforeAttach(t *testing.T) {
	s, addr, _ := listen(t, "tcp", Config{Exports: goldenExports(), Limits: Limits{HandshakesPerIP: 256}})
	const clients = 200
	list(hello(t, addr)) // what is allocated once is not theirs
	before := inUse()
	for i := range clients {
		c := hello(t, addr)
		switch i % 3 {
		case 0:
			c.send(cat([]byte("IHAVEOPT"), be(protocol.NEGOTIATION_ID_OPTION_GO), be(uint32(optionMax)), be(uint32(1<<32-1)), make([]byte, 7000)))
		case 1:
			c.send(cat([]byte("IHAVEOPT"), be(protocol.NEGOTIATION_ID_OPTION_GO), be(uint32(optionSkipMax)), make([]byte, 60000)))
		case 2:
			c.send(cat([]byte("IHAVEOPT"), be(optExportName), be(uint32(nameMax)), make([]byte, 4000)))
		}
	}
	waitFor(t, "200 handshakes", func() bool { return s.admit.waiting() >= clients })
	if each := int64(inUse()-before) / clients; each > 64<<10 {
		t.Fatalf("%d bytes per connection in handshake", each)
	}
}

func inUse() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc + m.StackInuse
}

// TestStopWithHalfHandshaken is C5: 200 clients in the middle of a handshake hold up neither the stop nor anybody else.
func TestStopWithHalfHandshaken(t *testing.T) {
	s, addr, stop := listen(t, "tcp", Config{Exports: goldenExports(), TLS: TLSOptional, TLSConfig: serverTLS(t), Limits: Limits{HandshakesPerIP: 64}})
	var all []*client
	for i := range 200 {
		c := dial(t, addr)
		all = append(all, c)
		if i >= 64 {
			continue // waits for its turn
		}
		c.greet(clientFixedNewstyle)
		switch i % 4 {
		case 1:
			c.send([]byte("IHAVE"))
		case 2:
			c.send(cat([]byte("IHAVEOPT"), be(protocol.NEGOTIATION_ID_OPTION_GO), be(uint32(100)), make([]byte, 50)))
		case 3:
			c.option(optStartTLS, nil)
			c.expect(optStartTLS, protocol.NEGOTIATION_TYPE_REPLY_ACK)
		}
	}
	waitFor(t, "200 handshakes", func() bool { return s.admit.waiting() == 200 })
	begun := time.Now()
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if spent := time.Since(begun); spent > 3*time.Second {
		t.Fatalf("stop took %v", spent)
	}
	for _, c := range all {
		c.c.Close()
	}
}

// TestQuirks: what go-nbd's client sends is understood when asked for, and is refused else.
func TestQuirks(t *testing.T) {
	_, addr, _ := listen(t, "unix", Config{Exports: goldenExports(), Quirks: true})
	c := dial(t, addr)
	c.greet(0)
	c.send(cat([]byte("IHAVEOPT"), be(protocol.NEGOTIATION_ID_OPTION_GO), be(uint32(0)), str("d"), be(uint16(1)), be(protocol.NEGOTIATION_TYPE_INFO_BLOCKSIZE)))
	c.expect(protocol.NEGOTIATION_ID_OPTION_GO, protocol.NEGOTIATION_TYPE_REPLY_INFO)
	c.expect(protocol.NEGOTIATION_ID_OPTION_GO, protocol.NEGOTIATION_TYPE_REPLY_INFO)
	c.expect(protocol.NEGOTIATION_ID_OPTION_GO, protocol.NEGOTIATION_TYPE_REPLY_ACK)
	c.ok(cmdFlush, 0, 0, 0, nil)
	c = dial(t, addr)
	c.greet(0)
	c.send(cat([]byte("IHAVEOPT"), be(protocol.NEGOTIATION_ID_OPTION_GO), be(uint32(0)), be(uint32(1<<32-1))))
	c.closed()
}

// TestConfigErrors: what cannot work is said before anything starts.
func TestConfigErrors(t *testing.T) {
	for _, cfg := range []Config{{}, {Exports: goldenExports(), TLS: TLSRequired}} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		if err := New(cfg).Run(t.Context(), l); err == nil {
			t.Fatal("runs")
		}
	}
}
