package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pojntfx/go-nbd/pkg/protocol"

	"varve/volumedriver/blockio"
)

// sockets returns both ends of a unix socket pair: the raw path of the server, and no ports used up.
func sockets(t testing.TB) (server, client net.Conn) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		ends[i], err = net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
	}
	ends[1].SetDeadline(time.Now().Add(20 * time.Second))
	return ends[0], ends[1]
}

// serveConn runs a whole connection of s and returns a channel that is closed when it is over.
func serveConn(s *Server, nc net.Conn) <-chan struct{} {
	over := make(chan struct{})
	s.accepted.Add(1)
	go func() {
		defer close(over)
		defer s.accepted.Add(-1)
		s.serve(context.Background(), nc)
	}()
	return over
}

func await(t testing.TB, over <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-over:
	case <-time.After(10 * time.Second):
		buf := make([]byte, 1<<20)
		t.Fatalf("%s is not over in 10 s\n%s", what, buf[:runtime.Stack(buf, true)])
	}
}

// FuzzNegotiation (Z1) throws bytes at a handshake. Whatever they are the connection ends soon after them, every
// export it opened is released, and if it opened none, what it allocated is bounded by what it sent.
func FuzzNegotiation(f *testing.F) {
	scripts, err := filepath.Glob("testdata/handshake/*.golden")
	if err != nil {
		f.Fatal(err)
	}
	for _, path := range scripts {
		text, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		var said []byte
		for _, line := range strings.Split(string(text), "\n") {
			if strings.HasPrefix(line, "C") {
				b, err := scriptBytes(line[1:])
				if err != nil {
					f.Fatal(err)
				}
				said = append(said, b...)
			}
		}
		f.Add(said)
	}
	f.Add(cat(be(uint32(3)), []byte("IHAVEOPT"), be(protocol.NEGOTIATION_ID_OPTION_GO), be(uint32(8)), be(uint32(1<<32-1)), be(uint32(0))))
	f.Add(cat(be(uint32(3)), []byte("IHAVEOPT"), be(optStartTLS), be(uint32(0)), []byte("\x16\x03\x01\x00\x05hello")))
	e := goldenExports()
	s := New(Config{Exports: e, TLS: TLSOptional, TLSConfig: serverTLS(f)})
	f.Fuzz(func(t *testing.T, said []byte) {
		var before, after runtime.MemStats
		opened := e.openedEver()
		runtime.ReadMemStats(&before)
		server, client := sockets(t)
		defer client.Close()
		over := serveConn(s, server)
		go func() {
			client.Write(said)
			client.(*net.UnixConn).CloseWrite()
		}()
		heard, err := io.ReadAll(client)
		if err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Fatalf("server hangs: %v", err)
		}
		await(t, over, "connection")
		if e.openNow() != 0 {
			t.Fatalf("%d exports left open", e.openNow())
		}
		if len(heard) >= 18 && !bytes.HasPrefix(heard, []byte("NBDMAGICIHAVEOPT\x00\x03")) {
			t.Fatalf("greeting %q", heard[:18])
		}
		runtime.ReadMemStats(&after)
		if grown := after.TotalAlloc - before.TotalAlloc; e.openedEver() == opened && grown > uint64(4*len(said)+2<<20) {
			t.Fatalf("%d bytes allocated for %d bytes of input", grown, len(said))
		}
	})
}

const fuzzSize = 1<<20 + 512

// script turns fuzz bytes into requests, right and wrong ones, and knows what has to come back for each.
type script struct {
	in         []byte
	structured bool
	aligned    bool
	model      []byte
	out        []byte
	answers    map[uint64]answer
	lengths    map[uint64]int
	ends       bool // the last request ends the connection without an answer
}

func (s *script) byte() byte {
	if len(s.in) == 0 {
		return 0
	}
	b := s.in[0]
	s.in = s.in[1:]
	return b
}

// offset picks one that is likely to be interesting.
func (s *script) offset() uint64 {
	b := s.byte()
	switch b >> 5 {
	case 0:
		return uint64(b) * 4096
	case 1:
		return uint64(s.byte()) * 512
	case 2:
		return fuzzSize - uint64(b&31)
	case 3:
		return fuzzSize + uint64(b&31)
	case 4:
		return 1<<63 - uint64(b&31)
	case 5:
		return -uint64(b & 31)
	}
	return uint64(b)<<12 ^ uint64(s.byte())
}

func (s *script) length() uint32 {
	b := s.byte()
	switch b >> 5 {
	case 0:
		return uint32(b) * 512
	case 1:
		return uint32(b & 31)
	case 2:
		return inlineReadMax + uint32(b&31) - 16
	case 3:
		return burstBytes + uint32(b&31) - 16
	case 4:
		return payloadMax + uint32(b&31)
	case 5:
		return -uint32(b & 31)
	}
	return uint32(b) << 4
}

// step appends one request. It returns false when the connection is over after it.
func (s *script) step(cookie uint64) bool {
	kind := s.byte()
	q := request{cmd: uint16(kind & 15), cookie: cookie, off: s.offset(), length: s.length()}
	if kind&0x80 != 0 {
		q.flags = uint16(s.byte() & 31)
	}
	if kind&0x70 == 0x70 {
		q.flags |= 1 << (s.byte() & 15)
	}
	var payload []byte
	if q.cmd == cmdWrite && q.length <= payloadMax {
		payload = bytes.Repeat([]byte{kind ^ byte(cookie)}, int(q.length))
	}
	s.out = append(s.out, rawRequest(q.cmd, q.flags, q.cookie, q.off, q.length, payload)...)
	if q.cmd == cmdDisc || q.cmd == cmdWrite && q.length > payloadMax {
		s.ends = q.cmd != cmdDisc
		return false
	}
	a := answer{cookie: cookie, errno: s.expect(q)}
	if a.errno == 0 {
		switch q.cmd {
		case cmdRead:
			a.data = bytes.Clone(s.model[q.off : q.off+uint64(q.length)])
		case cmdWrite:
			copy(s.model[q.off:], payload)
		case cmdTrim, cmdWriteZeroes:
			clear(s.model[q.off : q.off+uint64(q.length)])
		}
	}
	s.answers[cookie], s.lengths[cookie] = a, len(a.data)
	return true
}

// expect is the protocol's word on q, written down a second time.
func (s *script) expect(q request) uint32 {
	allowed := map[uint16]uint16{cmdRead: 1, cmdWrite: 1, cmdFlush: 1, cmdTrim: 1, cmdCache: 1, cmdWriteZeroes: 1 | 2 | 16, cmdBlockStatus: 1 | 8}
	if s.structured {
		allowed[cmdRead] |= 4
	}
	mask, known := allowed[q.cmd]
	beyond := q.off > fuzzSize || uint64(q.length) > fuzzSize-q.off
	switch {
	case !known || q.flags&^mask != 0:
		return 22
	case q.cmd == cmdFlush:
		return 0
	case s.aligned && (q.off%512 != 0 || q.length%512 != 0):
		return 22
	case beyond && (q.cmd == cmdWrite || q.cmd == cmdWriteZeroes):
		return 28
	case beyond:
		return 22
	case q.cmd == cmdBlockStatus && (q.length == 0 || !s.structured):
		return 22
	}
	return 0
}

// FuzzTransmission (Z2) plays a stream of requests against a model of the export: every reply matches it, the stream stays in
// step, and all memory comes back. Each request is answered before the next, since overlapping ones have no order; bursts
// are for TestManyClientsVerify.
func FuzzTransmission(f *testing.F) {
	f.Add([]byte{}, byte(0))
	f.Add([]byte{1, 0, 1, 0, 0, 1, 3, 0, 0, 4, 0, 4, 0, 0, 9, 7, 0, 1}, byte(1))
	f.Add([]byte{1, 0, 0x40, 0, 0, 0x41, 1, 0, 0x65, 0, 0, 0x65, 2, 0, 0}, byte(3))
	f.Add([]byte{1, 0x41, 0x21, 0, 0x42, 0x22, 6, 0x60, 0x22, 0x81, 0, 1, 1, 0x86, 0, 9, 31, 0xf0, 0, 1, 4, 9, 0, 0x80, 0x20, 1, 0, 0xa0}, byte(6))
	f.Add([]byte{1, 0, 0x80}, byte(0))
	f.Add([]byte{15, 0, 0, 5, 0, 0x70, 7, 0, 0x70, 0x87, 0, 1, 8}, byte(5))
	f.Fuzz(func(t *testing.T, in []byte, mode byte) {
		m := newMemory(fuzzSize)
		n := 0
		if mode&4 != 0 { // every third attempt is busy
			m.hook = func(_ context.Context, _ string, _, _ int64, blocking bool) error {
				if !blocking {
					if n++; n%3 == 0 {
						return blockio.ErrBusy
					}
				}
				return nil
			}
		}
		s := New(Config{Exports: newExports(map[string]Device{"d": m})})
		server, nc := sockets(t)
		defer nc.Close()
		over := serveConn(s, server)
		c := &client{t: t, c: nc}
		c.greet(clientFixedNewstyle | clientNoZeroes)
		sc := &script{in: in, structured: mode&1 != 0, aligned: mode&2 != 0, model: make([]byte, fuzzSize), answers: map[uint64]answer{}, lengths: map[uint64]int{}}
		if sc.structured {
			c.option(optStructuredReply, nil)
			c.expect(optStructuredReply, protocol.NEGOTIATION_TYPE_REPLY_ACK)
			c.option(optSetMetaContext, cat(str("d"), be(uint32(1)), str(allocationContext)))
			c.expect(optSetMetaContext, repMetaContext)
			c.expect(optSetMetaContext, protocol.NEGOTIATION_TYPE_REPLY_ACK)
		}
		infos := be(uint16(0))
		if sc.aligned {
			infos = cat(be(uint16(1)), be(protocol.NEGOTIATION_TYPE_INFO_BLOCKSIZE))
		}
		c.option(protocol.NEGOTIATION_ID_OPTION_GO, cat(str("d"), infos))
		c.exportInfo(c.expect(protocol.NEGOTIATION_ID_OPTION_GO, protocol.NEGOTIATION_TYPE_REPLY_INFO))
		if sc.aligned {
			c.expect(protocol.NEGOTIATION_ID_OPTION_GO, protocol.NEGOTIATION_TYPE_REPLY_INFO)
		}
		c.expect(protocol.NEGOTIATION_ID_OPTION_GO, protocol.NEGOTIATION_TYPE_REPLY_ACK)
		goOn := true
		for cookie := uint64(1); goOn && len(sc.in) > 0 && cookie < 200; cookie++ {
			goOn = sc.step(cookie)
			if _, err := nc.Write(sc.out); err != nil && !sc.ends {
				t.Fatal(err)
			}
			sc.out = sc.out[:0]
			if err := sc.collect(nc); err != nil {
				t.Fatalf("request %d: %v", cookie, err)
			}
		}
		if goOn {
			c.request(cmdDisc, 0, 0, 0, 0, nil)
		}
		if rest, err := io.ReadAll(nc); len(rest) > 0 || isTimeout(err) {
			t.Fatalf("after the end: %d bytes, %v", len(rest), err)
		}
		await(t, over, "connection")
		if !s.payload.TryAcquire(s.cfg.Limits.PayloadBytes) {
			t.Fatal("payload memory was not given back")
		}
	})
}

// collect reads the answers that are due and compares them.
func (s *script) collect(r io.Reader) error {
	for len(s.answers) > 0 {
		a, err := readAnswer(r, func(cookie uint64) int { return s.lengths[cookie] })
		if err != nil {
			return err
		}
		want, ok := s.answers[a.cookie]
		delete(s.answers, a.cookie)
		switch {
		case !ok:
			return fmt.Errorf("answer to nobody: %+v", a.cookie)
		case a.errno != want.errno:
			return fmt.Errorf("errno %d, want %d", a.errno, want.errno)
		case want.data != nil && !bytes.Equal(a.data, want.data):
			return errors.New("data differ")
		}
	}
	return nil
}

// FuzzRequestStream throws raw bytes at the transmission phase: the connection ends or answers, never hangs, and every
// answer parses.
func FuzzRequestStream(f *testing.F) {
	f.Add(rawRequest(cmdRead, 0, 1, 0, 512, nil))
	f.Add(rawRequest(cmdWrite, 0, 1, 0, 1<<20, make([]byte, 100)))
	f.Add(cat(rawRequest(cmdFlush, 0, 1, 0, 0, nil), []byte{1, 2, 3}))
	f.Add(cat(rawRequest(cmdBlockStatus, 0, 1, 0, 1<<20, nil), rawRequest(cmdDisc, 0, 1, 0, 0, nil)))
	f.Fuzz(func(t *testing.T, in []byte) {
		s := New(Config{Exports: newExports(map[string]Device{"d": newMemory(1 << 20)})})
		server, nc := sockets(t)
		defer nc.Close()
		over := serveConn(s, server)
		c := &client{t: t, c: nc}
		c.greet(clientFixedNewstyle | clientNoZeroes)
		c.option(optExportName, []byte("d"))
		c.read(10)
		go func() {
			nc.Write(in)
			nc.(*net.UnixConn).CloseWrite()
		}()
		heard, err := io.ReadAll(nc)
		if err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Fatalf("server hangs: %v", err)
		}
		await(t, over, "connection")
		reads := map[uint64]int{}
		for rest := in; len(rest) >= requestBytes; rest = rest[requestBytes:] {
			if q, ok := decodeRequest(rest); ok && q.cmd == cmdRead {
				reads[q.cookie] = int(q.length)
			} else if !ok || q.cmd == cmdWrite {
				return // what follows is data: not for this simple a reader
			}
		}
		for r := bytes.NewReader(heard); r.Len() >= simpleBytes; {
			if binary.BigEndian.Uint32(heard[len(heard)-r.Len():]) != protocol.TRANSMISSION_MAGIC_REPLY {
				t.Fatal("answers out of step")
			}
			if _, err := readAnswer(r, func(cookie uint64) int { return reads[cookie] }); err != nil && err != io.ErrUnexpectedEOF && err != io.EOF {
				t.Fatal(err)
			}
		}
	})
}
