package seat

import (
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pair returns both ends of a connection; ours also as what Take takes.
func pair(t *testing.T) (ours net.Conn, raw syscall.RawConn, theirs net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if theirs, err = net.Dial("tcp", ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { theirs.Close() })
	if ours, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ours.Close() })
	if raw, err = ours.(syscall.Conn).SyscallConn(); err != nil {
		t.Fatal(err)
	}
	return ours, raw, theirs
}

func sitDown(t *testing.T, s *Seats) (*Seat, net.Conn) {
	t.Helper()
	ours, raw, theirs := pair(t)
	seat := s.Take(raw)
	if seat == nil {
		t.Fatal("no seat")
	}
	ours.Close()
	return seat, theirs
}

// send sends what the socket takes of p at once.
func send(s *Seat, p []byte) (n int, err error) {
	werr := s.Raw().Write(func(fd uintptr) bool {
		n, err = unix.SendmsgN(int(fd), p, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		return true
	})
	return n, errors.Join(werr, err)
}

func TestSeat(t *testing.T) {
	s := New(1, Rules{Rest: 5 * time.Millisecond})
	seat, theirs := sitDown(t, s)
	p := make([]byte, 64)
	begun := time.Now()
	if n, err := seat.Read(p); n != 0 || err != ErrIdle || time.Since(begun) < 4*time.Millisecond {
		t.Fatal(n, err, time.Since(begun))
	}
	for range 2 * yieldReads {
		theirs.Write([]byte("ping"))
		if n, err := seat.Read(p); err != nil || string(p[:n]) != "ping" {
			t.Fatal(n, err)
		}
		if n, err := send(seat, []byte("pong")); n != 4 || err != nil {
			t.Fatal(n, err)
		}
		if _, err := io.ReadFull(theirs, p[:4]); err != nil || string(p[:4]) != "pong" {
			t.Fatal(err)
		}
	}
	// There is one only.
	_, raw, _ := pair(t)
	if s.Take(raw) != nil || s.Taken() != 1 {
		t.Fatal("a second seat")
	}
	// What comes while the connection moves is not lost.
	theirs.Write([]byte("more"))
	nc, err := seat.Leave()
	if err != nil || s.Taken() != 0 {
		t.Fatal(err)
	}
	defer nc.Close()
	if n, err := nc.Read(p); err != nil || string(p[:n]) != "more" {
		t.Fatal(n, err)
	}
	nc.SetReadDeadline(time.Now().Add(time.Millisecond)) // of the poller again
	var timeout net.Error
	if _, err := nc.Read(p); !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Fatal(err)
	}
	theirs.Close()
	nc.SetReadDeadline(time.Time{})
	if _, err := nc.Read(p); err != io.EOF {
		t.Fatal(err)
	}
}

func TestEnds(t *testing.T) {
	s := New(8, Rules{Rest: time.Minute})
	for name, x := range map[string]struct {
		end  func(seat *Seat, theirs net.Conn)
		want error
	}{
		"closed by the client": {func(_ *Seat, theirs net.Conn) { theirs.Close() }, io.EOF},
		"severed":              {func(seat *Seat, _ net.Conn) { seat.Sever() }, io.EOF},
	} {
		t.Run(name, func(t *testing.T) {
			seat, theirs := sitDown(t, s)
			ended := make(chan error, 1)
			go func() {
				_, err := seat.Read(make([]byte, 1))
				ended <- err
			}()
			time.Sleep(10 * time.Millisecond)
			x.end(seat, theirs)
			select {
			case err := <-ended:
				if err != x.want {
					t.Error(err)
				}
			case <-time.After(10 * time.Second):
				t.Fatal("still reading")
			}
			if err := seat.Close(); err != nil || s.Taken() != 0 {
				t.Error(err, s.Taken())
			}
			seat.Sever() // also afterwards
			if _, err := send(seat, []byte("x")); err == nil {
				t.Error("sent after the end")
			}
		})
	}
}

func TestAwaitSpace(t *testing.T) {
	seat, theirs := sitDown(t, New(1, Rules{}))
	defer seat.Close()
	p := make([]byte, 1<<20)
	sent := 0
	for {
		n, err := send(seat, p)
		if errors.Is(err, syscall.EAGAIN) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		sent += n
	}
	begun := time.Now()
	if err := seat.AwaitSpace(20 * time.Millisecond); err != nil || time.Since(begun) < 15*time.Millisecond {
		t.Fatal(err, time.Since(begun))
	}
	go io.CopyN(io.Discard, theirs, int64(sent))
	if err := seat.AwaitSpace(10 * time.Second); err != nil || time.Since(begun) > 9*time.Second {
		t.Fatal(err)
	}
	if n, err := send(seat, p); n == 0 || err != nil {
		t.Fatal(n, err)
	}
}

func TestBrisk(t *testing.T) {
	var none *Seats
	var p Pace
	if none.Brisk(&p) || none.Take(nil) != nil {
		t.Fatal("seats where there are none")
	}
	s := New(1, Rules{Bursts: 4, Within: 50 * time.Millisecond})
	count := func(pause time.Duration) (n int) {
		for range 40 {
			if s.Brisk(&p) {
				n++
			}
			time.Sleep(pause)
		}
		return n
	}
	if n := count(0); n < 8 {
		t.Errorf("brisk %d times of 10", n)
	}
	if n := count(20 * time.Millisecond); n > 1 {
		t.Errorf("brisk %d times of 10 at 20 ms each", n)
	}
}
