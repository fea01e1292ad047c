package nfs_test

import (
	"bytes"
	"net"
	"testing"
	"time"

	"varve/gateway/nfs"
	"varve/gateway/nfs/nfstest"
	"varve/gateway/seat"
	"varve/volumedriver/blockio"
)

// TestSeat: a busy connection is given the seat, keeps it whatever it asks for, and gives it back when it rests; then another one
// gets it.
func TestSeat(t *testing.T) {
	seats := seat.New(1, seat.Rules{Bursts: 8, Within: time.Hour, Rest: 100 * time.Millisecond})
	s := serve(t, nfs.Config{Seats: seats})
	first, second := s.mount("/default"), s.mount("/default")
	fh := first.create("f")
	for round := range 3 {
		data := bytes.Repeat([]byte{byte(round + 1)}, 1<<20) // longer than what the socket takes at once
		for i := range 40 {
			first.want(0, write, nfstest.WriteArgs(fh, uint64(i)*4096, data[:4096], 2))
			second.want(0, getattr, nfstest.HandleArgs(fh))
		}
		if seats.Taken() != 1 {
			t.Error("a busy connection has no seat")
		}
		first.want(0, write, nfstest.WriteArgs(fh, 0, data, 0))
		first.want(0, commit, nfstest.ReadArgs(fh, 0, 0))
		if r := first.want(0, read, nfstest.ReadArgs(fh, 0, 1<<20)); !bytes.Equal(r.Data, data) {
			t.Fatal("data differ")
		}
		waitFor(t, "the seat to be free", func() bool { return seats.Taken() == 0 })
		first.want(0, getattr, nfstest.HandleArgs(fh))
	}
	waitFor(t, "a seat for a busy connection", func() bool {
		first.want(0, getattr, nfstest.HandleArgs(fh))
		return seats.Taken() == 1
	})
}

// TestSeatEnds: seated connections end as others do, and leave their seat.
func TestSeatEnds(t *testing.T) {
	for name, end := range map[string]func(s *served, c *client){
		"stop":     func(s *served, _ *client) { s.stop() },
		"hang up":  func(_ *served, c *client) { c.Conn.(*net.TCPConn).CloseWrite() },
		"reset":    func(_ *served, c *client) { c.Conn.(*net.TCPConn).SetLinger(0); c.Conn.Close() },
		"nonsense": func(_ *served, c *client) { c.Conn.Write(bytes.Repeat([]byte{0xff}, 64)) },
		"unknown outcome": func(s *served, c *client) {
			s.failing(blockio.ErrFenced)
			c.Conn.Write(c.Record(9, nfstest.NFS, 3, write, nfstest.WriteArgs(c.root, 0, make([]byte, 512), 2)))
		},
	} {
		t.Run(name, func(t *testing.T) {
			seats := seat.New(8, seat.Rules{Bursts: 1, Within: time.Hour, Rest: time.Minute})
			s := serve(t, nfs.Config{Seats: seats})
			c := s.mount("/default")
			c.root = c.create("f")
			waitFor(t, "a seat", func() bool {
				c.want(0, getattr, nfstest.HandleArgs(c.root))
				return seats.Taken() == 1
			})
			end(s, c)
			waitFor(t, "the seat to be free", func() bool { return seats.Taken() == 0 && s.server.Stats().Connections == 0 })
		})
	}
}

// TestSeatSlowClient: a seated connection whose client does not read its replies stops nobody, and goes on when it does.
func TestSeatSlowClient(t *testing.T) {
	seats := seat.New(8, seat.Rules{Bursts: 1, Within: time.Hour, Rest: time.Minute})
	s := serve(t, nfs.Config{Seats: seats})
	slow, other := s.mount("/default"), s.mount("/default")
	fh := slow.create("f")
	slow.want(0, write, nfstest.WriteArgs(fh, 0, make([]byte, 1<<20), 2))
	waitFor(t, "a seat", func() bool {
		slow.want(0, getattr, nfstest.HandleArgs(fh))
		return seats.Taken() > 0
	})
	const calls = 64
	for xid := uint32(1); xid <= calls; xid++ {
		if _, err := slow.Conn.Write(slow.Record(xid, nfstest.NFS, 3, read, nfstest.ReadArgs(fh, 0, 1<<20))); err != nil {
			t.Fatal(err)
		}
	}
	for range 100 {
		other.want(0, getattr, nfstest.HandleArgs(fh))
	}
	for range calls {
		if _, _, err := slow.Receive(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestSyncOnly: who only waits for durable writes has them synced by the reader; who does other things as well, or whose syncs are
// slow, has not.
func TestSyncOnly(t *testing.T) {
	s := serve(t, nfs.Config{})
	c := s.mount("/default")
	fh := c.create("f")
	synced := func(calls int, each func(i int)) int64 {
		before := s.ns.Behave.KickSyncs.Load()
		for i := range calls {
			each(i)
		}
		return s.ns.Behave.KickSyncs.Load() - before
	}
	durable := func(int) { c.want(0, write, nfstest.WriteArgs(fh, 0, make([]byte, 4096), 2)) }
	if n := synced(40, durable); n < 30 || n > 36 {
		t.Errorf("%d of 40 durable writes were synced by the reader", n)
	}
	for name, other := range map[string]func(){
		"read":     func() { c.want(0, read, nfstest.ReadArgs(fh, 0, 4096)) },
		"getattr":  func() { c.want(0, getattr, nfstest.HandleArgs(fh)) },
		"unstable": func() { c.want(0, write, nfstest.WriteArgs(fh, 0, make([]byte, 4096), 0)) },
	} {
		other()
		if n := synced(40, func(i int) {
			durable(i)
			if i%4 == 3 {
				other()
			}
		}); n != 0 {
			t.Errorf("with %s in between: %d of 40 durable writes were synced by the reader", name, n)
		}
	}
	synced(40, durable)
	s.ns.Behave.Delay.Store(int64(20 * time.Millisecond))
	if n := synced(10, durable); n != 1 {
		t.Errorf("%d of 10 slow syncs were the reader's", n)
	}
}
