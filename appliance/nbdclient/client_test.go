package nbdclient

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// saying is a server that says what it is told, whatever the client says, and then hangs up.
func saying(t testing.TB, b []byte) Target {
	t.Helper()
	return sayingInTurn(t, b, nil)
}

// sayingInTurn says the second part when the client has sent its first request: an answer that comes sooner is one to no request.
func sayingInTurn(t testing.TB, b, answer []byte) Target {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(5 * time.Second))
		c.Write(b)
		if answer != nil && readUntil(c, []byte{0x25, 0x60, 0x95, 0x13}) == nil {
			c.Write(answer)
		}
		c.(*net.TCPConn).CloseWrite()
		io.Copy(io.Discard, c)
	}()
	t.Cleanup(func() {
		ln.Close()
		<-done
	})
	return Target{Network: "tcp", Address: ln.Addr().String(), Export: "x"}
}

// readUntil reads from r up to and with what ends in mark.
func readUntil(r io.Reader, mark []byte) error {
	last := make([]byte, 0, len(mark)+1)
	for b := make([]byte, 1); !bytes.Equal(last, mark); {
		if _, err := r.Read(b); err != nil {
			return err
		}
		if last = append(last, b[0]); len(last) > len(mark) {
			last = last[1:]
		}
	}
	return nil
}

// script builds what a server says.
type script struct{ bytes.Buffer }

func (s *script) put(vs ...any) *script {
	for _, v := range vs {
		if b, ok := v.([]byte); ok {
			s.Write(b)
			continue
		}
		if err := binary.Write(s, binary.BigEndian, v); err != nil {
			panic(err)
		}
	}
	return s
}

func greeting() *script {
	return new(script).put([]byte("NBDMAGIC"), []byte("IHAVEOPT"), uint16(3))
}

func (s *script) reply(option, kind uint32, data ...byte) *script {
	return s.put(uint64(0x3e889045565a9), option, kind, uint32(len(data)), data)
}

// opened is a handshake with an export of size bytes, with structured replies and base:allocation as context 7.
func opened(size uint64) *script {
	info := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint64([]byte{0, 0}, size), 1|1<<2|1<<6)
	return greeting().reply(8, 1).
		reply(10, 4, append([]byte{0, 0, 0, 7}, "base:allocation"...)...).reply(10, 1).
		reply(7, 3, info...).reply(7, 1)
}

func (s *script) chunk(flags, kind uint16, handle uint64, data ...byte) *script {
	return s.put(uint32(0x668e33ef), flags, kind, handle, uint32(len(data)), data)
}

func at(off uint64, rest ...byte) []byte {
	return append(binary.BigEndian.AppendUint64(nil, off), rest...)
}

func TestRepliesOfAnOddServer(t *testing.T) {
	for name, c := range map[string]struct {
		says *script
		want error  // matched with errors.Is
		text string // or found in the text
		got  string
	}{
		"two chunks and a hole": {says: opened(4096).chunk(0, 1, 0, at(6, 'c', 'd')...).chunk(0, 2, 0, at(8, 0, 0, 0, 2)...).
			chunk(1, 1, 0, at(4, 'a', 'b')...), got: "abcd\x00\x00"},
		"error chunk":        {says: opened(4096).chunk(1, 1<<15|1, 0, 0, 0, 0, 28, 0, 0), want: syscall.ENOSPC},
		"a byte is missing":  {says: opened(4096).chunk(1, 1, 0, at(4, 'a', 'b', 'c', 'd', 'e')...), text: "5 of 6 bytes"},
		"before the request": {says: opened(4096).chunk(1, 1, 0, at(3, 'a')...), text: "outside"},
		"after the request":  {says: opened(4096).chunk(1, 1, 0, at(9, 'a', 'b')...), text: "outside"},
		"a huge hole":        {says: opened(4096).chunk(1, 2, 0, at(4, 255, 255, 255, 255)...), text: "outside"},
		"another request":    {says: opened(4096).chunk(1, 0, 99), text: "never sent"},
		"simple after structured": {says: opened(4096).put(uint32(0x67446698), uint32(0), uint64(0), []byte("abcdef")),
			text: "simple reply"},
		"garbage": {says: opened(4096).put([]byte("GET / HTTP/1.1\r\n")), text: "magic"},
		"hang up": {says: opened(4096), want: io.EOF},
	} {
		t.Run(name, func(t *testing.T) {
			says, handshake := c.says.Bytes(), opened(4096).Len()
			cl, err := Dial(t.Context(), sayingInTurn(t, says[:handshake], says[handshake:]))
			if err != nil {
				t.Fatal(err)
			}
			defer cl.Close()
			p := []byte("??????")
			err = cl.ReadAt(t.Context(), p, 4)
			if c.got != "" && (err != nil || string(p) != c.got) ||
				c.want != nil && !errors.Is(err, c.want) || c.text != "" && (err == nil || !strings.Contains(err.Error(), c.text)) {
				t.Errorf("read %q, %v", p, err)
			}
		})
	}
}

func TestHandshakesThatFail(t *testing.T) {
	for name, c := range map[string]struct {
		says *script
		want error
		text string
	}{
		"not NBD":        {says: new(script).put([]byte("SSH-2.0-OpenSSH_9.2p1 Debian")), text: "no newstyle"},
		"old style":      {says: new(script).put([]byte("NBDMAGIC"), []byte("IHAVEOPT"), uint16(0)), text: "fixed newstyle"},
		"unknown export": {says: greeting().reply(8, 1<<31|1).reply(7, 1<<31|6), want: ErrUnknownExport},
		"TLS":            {says: greeting().reply(8, 1<<31|5), want: ErrTLSRequired},
		"no size":        {says: greeting().reply(8, 1<<31|1).reply(7, 1), text: "no size"},
		"size of 2^63":   {says: opened(1 << 63), text: "2^63"},
		"long reply":     {says: greeting().put(uint64(0x3e889045565a9), uint32(8), uint32(1), uint32(1<<31)), text: "too long"},
		"wrong option":   {says: greeting().reply(3, 1), text: "out of step"},
		"hang up":        {says: greeting(), want: io.EOF},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Dial(t.Context(), saying(t, c.says.Bytes()))
			if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestDialEndsWithItsContext(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close() // nobody accepts: the greeting never comes
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := Dial(ctx, Target{Network: "tcp", Address: ln.Addr().String()}); err == nil {
		t.Error("dialled a server that says nothing")
	}
}

func TestURIs(t *testing.T) {
	for uri, want := range map[string]Target{
		"nbd://host/default/disk1":                   {Network: "tcp", Address: "host:10809", Export: "default/disk1"},
		"nbd://[::1]:7/":                             {Network: "tcp", Address: "[::1]:7"},
		"nbd+unix:///a/b?socket=/run/x.sock":         {Network: "unix", Address: "/run/x.sock", Export: "a/b"},
		"nbd+unix:///with%20space?socket=/run/a%26b": {Network: "unix", Address: "/run/a&b", Export: "with space"},
	} {
		got, err := ParseURI(uri)
		if err != nil || got != want {
			t.Errorf("%s: %+v %v", uri, got, err)
			continue
		}
		back, err := got.URI()
		if err != nil {
			t.Error(err)
		}
		if again, err := ParseURI(back); err != nil || again != want {
			t.Errorf("%s came back as %s: %+v %v", uri, back, again, err)
		}
	}
	for _, uri := range []string{"http://host/x", "nbd:///x", "nbd+unix:///x", "nbd://%zz"} {
		if got, err := ParseURI(uri); err == nil {
			t.Errorf("%s gives %+v", uri, got)
		}
	}
	if got, err := ParseURI("nbds://host/x"); err != nil || got.TLS == nil || got.TLS.ServerName != "host" {
		t.Errorf("nbds: %+v %v", got, err)
	}
	if IsURI("/some/file") || IsURI("ftp://x/y") || !IsURI("nbds+unix:///x?socket=/y") {
		t.Error("IsURI")
	}
}

// FuzzServer lets a server say anything: the client must end, without a panic and without taking memory that the bytes do
// not stand for.
func FuzzServer(f *testing.F) {
	f.Add([]byte{})
	f.Add(greeting().reply(8, 1<<31|1).reply(7, 1<<31|6).Bytes())
	f.Add(opened(4096).chunk(1, 1, 0, at(0, 'a', 'b')...).Bytes())
	f.Add(opened(1<<40).chunk(0, 5, 0, 0, 0, 0, 7, 0, 0, 16, 0, 0, 0, 0, 3).chunk(1, 0, 0).chunk(1, 1<<15|2, 1, 0, 0, 0, 5, 0, 0).Bytes())
	f.Fuzz(func(t *testing.T, says []byte) {
		c, err := Dial(t.Context(), saying(t, says))
		if err != nil {
			return
		}
		defer c.Close()
		n := min(c.Size(), 6)
		p := make([]byte, n)
		if c.ReadAt(t.Context(), p, 0) == nil {
			c.Extents(t.Context(), 0, c.Size())
		}
	})
}
