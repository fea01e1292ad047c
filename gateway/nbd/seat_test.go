package nbd

import (
	"bytes"
	"net"
	"testing"
	"time"

	"varve/gateway/seat"
)

// TestSeat: a busy connection is given the seat, keeps it while it is busy and whatever it asks for, and gives it back when it
// rests; then another one gets it.
func TestSeat(t *testing.T) {
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) {
			s, addr, _ := listen(t, network, Config{Exports: newExports(map[string]Device{"d": newMemory(64 << 20)}),
				Seats: seat.New(1, seat.Rules{Bursts: 8, Within: time.Hour})})
			taken := func(want int) func() bool { return func() bool { return s.cfg.Seats.Taken() == want } }
			first, second := attach(t, addr, "d", true), attach(t, addr, "d", false)
			for round := range 3 {
				var one, other []byte
				for i := range 40 {
					one, other = pattern(uint64(round*100+i), 4096), pattern(uint64(round*100+i+50), 8192)
					first.pwrite(uint64(i)*4096, one)
					second.pwrite(1<<20, other)
					if !bytes.Equal(first.pread(uint64(i)*4096, 4096), one) || !bytes.Equal(second.pread(1<<20, 8192), other) {
						t.Fatal("data differ")
					}
				}
				long := pattern(uint64(round), 3<<20) // longer than the input buffer, and than the socket's
				first.pwrite(4<<20, long)
				if !bytes.Equal(first.pread(4<<20, uint32(len(long))), long) {
					t.Fatal("long data differ")
				}
				waitFor(t, "the seat to be free", taken(0))
				first.pread(0, 512)
			}
			begun := time.Now()
			for s.cfg.Seats.Taken() == 0 {
				first.pread(0, 512)
				if time.Since(begun) > 30*time.Second {
					t.Fatal("no seat for a busy connection")
				}
			}
		})
	}
}

// TestSeatEnds: seated connections end as others do: with an answer to what was read when the server stops or their export is closed,
// when the client hangs up, says goodbye, or talks nonsense.
func TestSeatEnds(t *testing.T) {
	for name, end := range map[string]func(s *Server, c *client, stop func() error) error{
		"stop":         func(_ *Server, _ *client, stop func() error) error { return stop() },
		"close export": func(s *Server, _ *client, _ func() error) error { s.CloseExport("d"); return nil },
		"hang up":      func(_ *Server, c *client, _ func() error) error { return c.c.(*net.TCPConn).CloseWrite() },
		"goodbye":      func(_ *Server, c *client, _ func() error) error { c.request(cmdDisc, 0, 0, 0, 0, nil); return nil },
		"nonsense":     func(_ *Server, c *client, _ func() error) error { c.send(make([]byte, 64)); return nil },
	} {
		t.Run(name, func(t *testing.T) {
			e := newExports(map[string]Device{"d": newMemory(1 << 20)})
			s, addr, stop := listen(t, "tcp", Config{Exports: e, Seats: seat.New(1<<10, eager)})
			c := attach(t, addr, "d", true)
			for s.cfg.Seats.Taken() == 0 {
				c.pread(0, 512)
			}
			if err := end(s, c, stop); err != nil {
				t.Fatal(err)
			}
			c.closed()
			waitFor(t, "the export to be released", func() bool { return e.openNow() == 0 && s.cfg.Seats.Taken() == 0 })
		})
	}
}

// TestSeatNothingToSend: a seated connection whose writer is given nothing to send goes on.
func TestSeatNothingToSend(t *testing.T) {
	s, addr, _ := listen(t, "tcp", Config{Exports: newExports(map[string]Device{"d": newMemory(1 << 20)}),
		Seats: seat.New(1, seat.Rules{Bursts: 1, Within: time.Hour, Rest: time.Minute})})
	c := attach(t, addr, "d", true)
	for s.cfg.Seats.Taken() == 0 {
		c.pread(0, 512)
	}
	x := s.connections(func(*conn) bool { return true })[0]
	for range 10 {
		x.mu.Lock()
		for x.sending {
			x.changed.Wait()
		}
		x.sending = true
		empty := s.pool.get(burstBytes)
		empty.data = empty.data[:0]
		x.store = append(x.store[:0], empty)
		x.batch, x.sent = x.store, 0
		x.mu.Unlock()
		x.wake <- struct{}{}
		c.pread(0, 512)
	}
}
