package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pojntfx/go-nbd/pkg/protocol"

	"varve/gateway/seat"
	"varve/volumedriver/blockio"
)

func pattern(seed uint64, n int) []byte {
	p := make([]byte, n)
	r := rand.NewPCG(seed, 1)
	for i := 0; i+8 <= n; i += 8 {
		binary.LittleEndian.PutUint64(p[i:], r.Uint64())
	}
	return p
}

// serveOne starts a server with m as export "d" and attaches to it.
func serveOne(t testing.TB, m Device, structured bool, limits Limits) (*client, *Server, net.Addr) {
	t.Helper()
	cfg := Config{Exports: newExports(map[string]Device{"d": m}), Limits: limits}
	if structured {
		cfg.Seats = seat.New(1<<10, eager)
	}
	s, addr, _ := listen(t, "tcp", cfg)
	return attach(t, addr, "d", structured), s, addr
}

// eager gives every connection a seat at its third burst: clients with structured replies are served so in these tests.
var eager = seat.Rules{Bursts: 1, Within: time.Hour}

// everyWay runs f with simple and with structured replies.
func everyWay(t *testing.T, f func(t *testing.T, structured bool)) {
	for _, structured := range []bool{false, true} {
		t.Run(fmt.Sprintf("structured=%t", structured), func(t *testing.T) { f(t, structured) })
	}
}

func TestReadWriteFlush(t *testing.T) {
	for _, network := range []string{"tcp", "unix"} {
		everyWay(t, func(t *testing.T, structured bool) {
			m := newMemory(64 << 20)
			cfg := Config{Exports: newExports(map[string]Device{"d": m})}
			if structured {
				cfg.Seats = seat.New(1<<10, eager)
			}
			_, addr, _ := listen(t, network, cfg)
			c := attach(t, addr, "d", structured)
			if c.size != 64<<20 {
				t.Fatalf("size %d", c.size)
			}
			for _, n := range []int{512, 4096, inlineReadMax, inlineReadMax + 512, burstBytes - 512, burstBytes, burstBytes + 512, 1 << 20, 3<<20 + 7} {
				data := pattern(uint64(n), n)
				c.pwrite(uint64(n), data)
				if !bytes.Equal(c.pread(uint64(n), uint32(n)), data) {
					t.Fatalf("%d bytes differ", n)
				}
			}
			data := pattern(1, 4096)
			c.pwrite(0, data)
			c.pwrite(1537, bytes.Repeat([]byte("Q"), 777))
			want := cat(data[1536:1537], bytes.Repeat([]byte("Q"), 777), data[1537+777:1537+778])
			if !bytes.Equal(c.pread(1536, 779), want) {
				t.Fatal("unaligned write differs")
			}
			c.ok(cmdWrite, cmdFlagFUA, 4096, 65536, pattern(4, 65536))
			c.ok(cmdFlush, 0, 0, 0, nil)
			c.ok(cmdFlush, 0, 0, 0, nil)
			if n := m.flushCount(); n < 2 {
				t.Fatalf("%d flushes", n)
			}
			c.request(cmdDisc, 0, 1, 0, 0, nil)
			c.closed()
		})
	}
}

// TestPayloadLimit: 32 MiB go through, a longer read is refused, a longer write ends the connection.
func TestPayloadLimit(t *testing.T) {
	everyWay(t, func(t *testing.T, structured bool) {
		c, _, addr := serveOne(t, newMemory(1<<40), structured, Limits{})
		big := pattern(2, payloadMax)
		c.pwrite(8<<20, big)
		if !bytes.Equal(c.pread(8<<20, payloadMax), big) {
			t.Fatal("32 MiB differ")
		}
		for _, n := range []uint32{payloadMax + 1, 1<<31 - 1, 1<<32 - 1} {
			c.fails(cmdRead, 0, 0, n, nil, errnoInval)
			if structured {
				c.fails(cmdRead, cmdFlagDF, 0, n, nil, errnoOverflow)
			}
			d := attach(t, addr, "d", structured)
			d.request(cmdWrite, 0, 1, 0, n, nil)
			d.closed()
		}
		c.ok(cmdFlush, 0, 0, 0, nil)
	})
}

func TestErrorsOfRange(t *testing.T) {
	everyWay(t, func(t *testing.T, structured bool) {
		const size = 1<<20 + 512
		c, _, _ := serveOne(t, newMemory(size), structured, Limits{})
		for _, r := range []struct{ off, n uint64 }{
			{size - 1, 2}, {size, 1}, {size + 1, 0}, {0, size + 1}, {1<<63 - 4096, 4096}, {math.MaxUint64, 1}, {math.MaxUint64 - 4095, 4096}, {1 << 63, 1},
		} {
			c.fails(cmdRead, 0, r.off, uint32(r.n), nil, errnoInval)
			c.fails(cmdTrim, 0, r.off, uint32(r.n), nil, errnoInval)
			c.fails(cmdCache, 0, r.off, uint32(r.n), nil, errnoInval)
			c.fails(cmdWriteZeroes, 0, r.off, uint32(r.n), nil, errnoNoSpace)
			c.fails(cmdWrite, 0, r.off, uint32(r.n), make([]byte, r.n), errnoNoSpace)
			c.fails(cmdBlockStatus, 0, r.off, uint32(r.n), nil, errnoInval)
		}
		c.fails(cmdWriteZeroes, 0, 0, math.MaxUint32, nil, errnoNoSpace)
		c.fails(cmdTrim, 0, 0, math.MaxUint32, nil, errnoInval)
		if got := c.pread(size-512, 512); len(got) != 512 {
			t.Fatal("last sector")
		}
		// nothing to do is done
		for _, cmd := range []uint16{cmdRead, cmdWrite, cmdTrim, cmdWriteZeroes, cmdCache} {
			c.ok(cmd, 0, size, 0, nil)
		}
		c.fails(cmdBlockStatus, 0, 0, 0, nil, errnoInval)
	})
}

func TestUnknownCommandsAndFlags(t *testing.T) {
	everyWay(t, func(t *testing.T, structured bool) {
		c, _, _ := serveOne(t, newMemory(1<<20), structured, Limits{})
		for _, cmd := range []uint16{8, 9, 99, 0xffff} {
			c.fails(cmd, 0, 0, 4096, nil, errnoInval)
		}
		c.fails(cmdRead, 1<<14, 0, 512, nil, errnoInval)
		c.fails(cmdRead, cmdFlagReqOne, 0, 512, nil, errnoInval)
		c.fails(cmdWrite, cmdFlagNoHole, 0, 512, make([]byte, 512), errnoInval)
		c.fails(cmdWrite, 1<<15, 0, 1<<20, make([]byte, 1<<20), errnoInval)
		c.fails(cmdTrim, cmdFlagFastZero, 0, 512, nil, errnoInval)
		c.fails(cmdFlush, cmdFlagDF, 0, 0, nil, errnoInval)
		c.fails(cmdBlockStatus, cmdFlagDF, 0, 512, nil, errnoInval)
		df := errnoInval
		if structured {
			df = 0
		}
		c.fails(cmdRead, cmdFlagDF, 0, 512, nil, df)
		// FUA is legal everywhere
		c.ok(cmdRead, cmdFlagFUA, 0, 512, nil)
		c.ok(cmdFlush, cmdFlagFUA, 0, 0, nil)
		c.ok(cmdTrim, cmdFlagFUA, 0, 512, nil)
		c.ok(cmdCache, cmdFlagFUA, 0, 512, nil)
	})
}

func TestZeroes(t *testing.T) {
	c, _, _ := serveOne(t, newMemory(1<<40), true, Limits{})
	data := pattern(7, 1<<20)
	want := bytes.Clone(data)
	c.pwrite(0, data)
	for _, z := range []struct {
		cmd, flags uint16
		off, n     int
	}{
		{cmdWriteZeroes, 0, 4096, 100 << 10}, {cmdWriteZeroes, cmdFlagNoHole, 200 << 10, 64 << 10}, {cmdWriteZeroes, 0, 1537, 777},
		{cmdWriteZeroes, cmdFlagFastZero, 300 << 10, 8192}, {cmdTrim, 0, 405000, 3000}, {cmdTrim, cmdFlagFUA, 512 << 10, 4096},
		{cmdWriteZeroes, cmdFlagFastZero | cmdFlagNoHole | cmdFlagFUA, 900 << 10, 5},
	} {
		c.ok(z.cmd, z.flags, uint64(z.off), uint32(z.n), nil)
		clear(want[z.off : z.off+z.n])
	}
	if !bytes.Equal(c.pread(0, 1<<20), want) {
		t.Fatal("zeroed ranges or their neighbours differ")
	}
	// 1 TiB goes in 256 requests
	for off := uint64(0); off < 1<<40; off += 1<<32 - 4096 {
		c.ok(cmdTrim, 0, off, uint32(min(1<<32-4096, 1<<40-off)), nil)
	}
	if !bytes.Equal(c.pread(0, 1<<20), make([]byte, 1<<20)) {
		t.Fatal("not trimmed")
	}
}

func TestBlockStatus(t *testing.T) {
	c, _, _ := serveOne(t, newMemory(1<<40), true, Limits{})
	c.pwrite(0, make([]byte, 64<<10))
	c.pwrite(1<<20, make([]byte, 8192))
	check := func(flags uint16, off uint64, n uint32, want ...uint32) {
		t.Helper()
		a := c.do(cmdBlockStatus, flags, off, n, nil)
		if a.errno != 0 || len(a.data) != 4*len(want) {
			t.Fatalf("block status %d+%d: errno %d, %x", off, n, a.errno, a.data)
		}
		for i, w := range want {
			if got := binary.BigEndian.Uint32(a.data[4*i:]); got != w {
				t.Fatalf("block status %d+%d: word %d is %d, want %d", off, n, i, got, w)
			}
		}
	}
	hole := stateHole | stateZero
	check(0, 0, 8<<20, 64<<10, 0, 960<<10, hole, 8192, 0, 7<<20-8192, hole)
	check(0, 0, 100, 100, 0)
	check(0, 1<<30, math.MaxUint32, math.MaxUint32, hole)
	check(cmdFlagReqOne, 0, 8<<20, 64<<10, 0)
	check(cmdFlagReqOne, 65536, 8<<20, 960<<10, hole)
	// more than a reply holds is cut, not refused
	for i := range uint64(extentsMax) {
		c.pwrite(1<<32+i*8192, []byte{1})
	}
	a := c.do(cmdBlockStatus, 0, 1<<32, 1<<30, nil)
	if a.errno != 0 || len(a.data) != 8*extentsMax {
		t.Fatalf("errno %d, %d bytes", a.errno, len(a.data))
	}
}

// TestBlockStatusMerges: what the device says piecemeal is told in one run, and nothing beyond the request.
func TestBlockStatusMerges(t *testing.T) {
	q := request{cookie: 3, length: 10000}
	runs := []blockio.Extent{{Length: 1000}, {Length: 2000}, {Length: 3000, Hole: true, Zero: true}, {Length: 1000, Zero: true}, {Length: 1 << 50}}
	b := appendBlockStatus(nil, q, allocationID, runs, 10)
	want := cat(be(structuredMagic), be(chunkDone), be(chunkBlockStatus), be(uint64(3)), be(uint32(4+32)), be(allocationID),
		be(uint32(3000)), be(uint32(0)), be(uint32(3000)), be(stateHole|stateZero), be(uint32(1000)), be(stateZero), be(uint32(3000)), be(uint32(0)))
	if !bytes.Equal(b, want) {
		t.Fatalf("got\n%x, want\n%x", b, want)
	}
}

func TestReadOnly(t *testing.T) {
	m := newMemory(1 << 20)
	m.readOnly = true
	c, _, _ := serveOne(t, m, true, Limits{})
	if c.flags&flagReadOnly == 0 || c.flags&(flagSendTrim|flagSendWriteZeroes|flagSendFUA) != 0 {
		t.Fatalf("flags %#x", c.flags)
	}
	c.fails(cmdWrite, 0, 0, 512, make([]byte, 512), errnoPerm)
	c.fails(cmdWrite, 0, 0, 1<<20, make([]byte, 1<<20), errnoPerm)
	c.fails(cmdTrim, 0, 0, 512, nil, errnoPerm)
	c.fails(cmdWriteZeroes, 0, 0, 512, nil, errnoPerm)
	c.ok(cmdFlush, 0, 0, 0, nil)
	c.pread(0, 4096)
}

// TestDeviceErrors: each error of a device has its number, wherever it arises, ends only its request, and is counted.
func TestDeviceErrors(t *testing.T) {
	everyWay(t, func(t *testing.T, structured bool) {
		for _, e := range []struct {
			err   error
			errno uint32
		}{
			{errors.New("medium error"), errnoIO}, {blockio.ErrCorrupt, errnoIO}, {fmt.Errorf("log: %w", blockio.ErrNoSpace), errnoNoSpace},
			{blockio.ErrReadOnly, errnoPerm}, {blockio.ErrClosed, errnoShutdown},
		} {
			for _, late := range []bool{false, true} {
				m := newMemory(1 << 20)
				m.hook = func(ctx context.Context, op string, off, n int64, blocking bool) error {
					if off != 8192 {
						return nil
					}
					if late && !blocking {
						return blockio.ErrBusy
					}
					return e.err
				}
				c, _, _ := serveOne(t, m, structured, Limits{})
				for _, n := range []uint32{4096, 512 << 10} {
					c.fails(cmdRead, 0, 8192, n, nil, e.errno)
					c.fails(cmdWrite, 0, 8192, n, make([]byte, n), e.errno)
				}
				c.fails(cmdTrim, 0, 8192, 4096, nil, e.errno)
				if structured {
					c.fails(cmdBlockStatus, 0, 8192, 4096, nil, e.errno)
				}
				c.pwrite(0, make([]byte, 4096))
				c.pread(0, 4096)
			}
		}
	})
}

// TestCompletionErrors: an error told to Done reaches the client of that request alone.
func TestCompletionErrors(t *testing.T) {
	m := newMemory(1 << 20)
	m.commits = make(chan []completion, 16)
	c, _, _ := serveOne(t, m, true, Limits{})
	c.send(cat(rawRequest(cmdWrite, 0, 1, 0, 512, make([]byte, 512)), rawRequest(cmdWrite, 0, 2, 0, 512, make([]byte, 512)), rawRequest(cmdFlush, 0, 3, 0, 0, nil)))
	want := map[uint64]uint32{1: 0, 2: errnoNoSpace, 3: errnoIO}
	for n := 0; n < 3; {
		run := <-m.commits
		for i := range run {
			n++
			if n == 2 {
				run[i].err = blockio.ErrNoSpace
			}
			if n == 3 {
				run[i].err = errors.New("medium error")
			}
		}
		m.complete(run)
	}
	for range want {
		a, err := readAnswer(c.c, func(uint64) int { return 0 })
		if err != nil || a.errno != want[a.cookie] {
			t.Fatalf("%+v, %v", a, err)
		}
	}
}

// TestFencedClosesWithoutReply: when the outcome is unknown nothing is answered, neither that request nor what else is
// in flight, and the connection ends at once.
func TestFencedClosesWithoutReply(t *testing.T) {
	for _, how := range []string{"try", "blocking", "done", "inline"} {
		t.Run(how, func(t *testing.T) {
			m := newMemory(1 << 20)
			blocked := make(chan struct{})
			m.hook = func(ctx context.Context, op string, off, n int64, blocking bool) error {
				switch {
				case op == "read" && !blocking:
					return blockio.ErrBusy
				case op == "read": // stays in flight until the connection is cut
					close(blocked)
					<-ctx.Done()
					return ctx.Err()
				case how == "try" && op == "write":
					return blockio.ErrFenced
				case how == "blocking" && op == "write" && blocking:
					return blockio.ErrFenced
				case how == "blocking" && op == "write":
					return blockio.ErrBusy
				case how == "inline" && op == "flush":
					return fmt.Errorf("log: %w", blockio.ErrFenced)
				}
				return nil
			}
			if how == "done" {
				m.commits = make(chan []completion, 1)
			}
			c, s, _ := serveOne(t, m, true, Limits{})
			c.request(cmdRead, 0, 1, 0, 4096, nil)
			<-blocked
			if how == "inline" {
				for range 4 {
					c.ok(cmdWriteZeroes, 0, 0, 512, nil)
				}
				c.request(cmdFlush, 0, 2, 0, 0, nil)
			} else {
				c.request(cmdWrite, 0, 2, 0, 512, make([]byte, 512))
			}
			if how == "done" {
				run := <-m.commits
				run[0].err = blockio.ErrFenced
				m.complete(run)
			}
			c.closed()
			waitFor(t, "end of the connection", func() bool { return s.accepted.Load() == 0 })
		})
	}
}

// TestOutOfOrder: a read that waits holds up nothing behind it.
func TestOutOfOrder(t *testing.T) {
	m := newMemory(1 << 20)
	release := make(chan struct{})
	m.hook = func(ctx context.Context, op string, off, n int64, blocking bool) error {
		switch {
		case op == "read" && off == 0 && !blocking:
			return blockio.ErrBusy
		case op == "read" && off == 0:
			<-release
		}
		return nil
	}
	c, _, _ := serveOne(t, m, true, Limits{})
	c.request(cmdRead, 0, 1, 0, 4096, nil)
	c.pread(4096, 4096)
	c.pwrite(8192, make([]byte, 4096))
	c.ok(cmdFlush, 0, 0, 0, nil)
	close(release)
	c.next(1, cmdRead, 4096)
}

// TestInFlightLimit: the reader stops at InFlight requests, counts them right, and goes on when one ends.
func TestInFlightLimit(t *testing.T) {
	m := newMemory(1 << 20)
	var now, most atomic.Int64
	release := make(chan struct{})
	m.hook = func(ctx context.Context, op string, off, n int64, blocking bool) error {
		if !blocking {
			return blockio.ErrBusy
		}
		if v := now.Add(1); v > most.Load() {
			most.Store(v)
		}
		<-release
		now.Add(-1)
		return nil
	}
	c, _, _ := serveOne(t, m, true, Limits{InFlight: 8})
	for i := range uint64(100) {
		if i%2 == 0 {
			c.request(cmdRead, 0, i, i*4096, 4096, nil)
		} else {
			c.request(cmdWrite, 0, i, i*4096, 4096, make([]byte, 4096))
		}
	}
	waitFor(t, "full table", func() bool { return now.Load() == 8 })
	time.Sleep(20 * time.Millisecond)
	close(release)
	seen := map[uint64]bool{}
	for range 100 {
		a, err := readAnswer(c.c, func(uint64) int { return 0 })
		if err != nil || a.errno != 0 || seen[a.cookie] {
			t.Fatalf("%+v, %v", a, err)
		}
		seen[a.cookie] = true
	}
	if most.Load() > 8 {
		t.Fatalf("%d requests in flight", most.Load())
	}
}

// TestFlushInline: a client of queue depth 1 is flushed on the reader's goroutine; one with more in flight is not.
func TestFlushInline(t *testing.T) {
	m := newMemory(1 << 20)
	c, _, _ := serveOne(t, m, true, Limits{})
	for range 10 {
		c.pwrite(0, make([]byte, 4096))
		c.ok(cmdFlush, 0, 0, 0, nil)
	}
	m.mu.Lock()
	inline := m.inline
	m.mu.Unlock()
	if inline < 7 {
		t.Fatalf("%d of 10 flushes inline", inline)
	}
	for range 10 {
		c.send(cat(rawRequest(cmdWrite, 0, 1, 0, 512, make([]byte, 512)), rawRequest(cmdWrite, 0, 1, 0, 512, make([]byte, 512)), rawRequest(cmdFlush, 0, 1, 0, 0, nil)))
		for range 3 {
			c.next(1, cmdFlush, 0)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.inline != inline {
		t.Fatalf("%d flushes of bursts were inline", m.inline-inline)
	}
}

// TestForeseenFlush: a client that writes and flushes in turn is flushed before it asks. Any other habit ends that.
func TestForeseenFlush(t *testing.T) {
	m := newMemory(1 << 20)
	c, _, _ := serveOne(t, m, true, Limits{})
	counts := func() (ahead, inline int) {
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.ahead, m.inline
	}
	for range 10 {
		c.pwrite(0, make([]byte, 4096))
		c.ok(cmdFlush, 0, 0, 0, nil)
	}
	if ahead, _ := counts(); ahead != 10-foreseenPairs {
		t.Fatalf("%d of 10 flushes foreseen", ahead)
	}
	// The flush goes out without being asked for, and the write it covers was answered before.
	_, before := counts()
	c.pwrite(0, make([]byte, 4096))
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, inline := counts(); inline == before+1 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("nothing was flushed ahead")
		}
	}
	m.mu.Lock()
	if m.flushed != m.replied {
		t.Errorf("flushed %d of %d answered writes", m.flushed, m.replied)
	}
	m.mu.Unlock()
	c.pread(0, 4096)
	foreseen, _ := counts()
	for range foreseenPairs {
		c.pwrite(0, make([]byte, 4096))
		c.pread(0, 4096)
		c.ok(cmdFlush, 0, 0, 0, nil)
	}
	if ahead, _ := counts(); ahead != foreseen {
		t.Fatalf("%d flushes foreseen of a client that reads in between", ahead-foreseen)
	}
}

// TestLoneDurableWrite: FUA of a client of queue depth 1 is synced by its reader; of one with more in flight it is not.
func TestLoneDurableWrite(t *testing.T) {
	m := newMemory(1 << 20)
	c, _, _ := serveOne(t, m, true, Limits{})
	for range 10 {
		c.ok(cmdWrite, cmdFlagFUA, 0, 4096, make([]byte, 4096))
	}
	m.mu.Lock()
	synced := m.synced
	m.mu.Unlock()
	if synced < 10-aloneBursts-1 {
		t.Fatalf("%d of 10 synced by the reader", synced)
	}
	two := rawRequest(cmdWrite, cmdFlagFUA, 1, 0, 512, make([]byte, 512))
	for range 10 {
		c.send(cat(two, two))
		for range 2 {
			c.next(1, cmdWrite, 0)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.synced != synced {
		t.Fatalf("%d bursts were synced by the reader", m.synced-synced)
	}
}

// flushOracle checks C6: a write answered on one connection is covered by a flush of any other.
func flushOracle(t *testing.T, device func() Device, covered func() bool) bool {
	e := newExports(map[string]Device{})
	_, addr, _ := listen(t, "tcp", Config{Exports: perConnection{e, device}})
	a, b := attach(t, addr, "d", true), attach(t, addr, "d", true)
	if a.flags&flagCanMultiConn == 0 {
		t.Fatal("CAN_MULTI_CONN is not announced")
	}
	for range 5 { // b passes for a client of queue depth 1: its flush is inline
		b.pread(0, 512)
	}
	a.pwrite(0, make([]byte, 4096))
	b.ok(cmdFlush, 0, 0, 0, nil)
	return covered()
}

// perConnection gives every connection a device of its own.
type perConnection struct {
	*exports
	device func() Device
}

func (p perConnection) Open(context.Context, string, Peer) (Device, func(), error) {
	return p.device(), func() {}, nil
}

// ownFlush is the planted bug: a flush covers the writes of its own connection only.
type ownFlush struct {
	*memory
	wrote bool
}

func (o *ownFlush) TryWrite(p []byte, off int64, f blockio.Flags, c blockio.Completer, tag uint64) error {
	o.wrote = true
	return o.memory.TryWrite(p, off, f, c, tag)
}

func (o *ownFlush) FlushInline() error {
	if !o.wrote {
		return nil
	}
	return o.memory.FlushInline()
}

func (o *ownFlush) TryFlush(c blockio.Completer, tag uint64) error {
	if !o.wrote {
		c.Done(tag, nil)
		c.Settle(true)
		return nil
	}
	return o.memory.TryFlush(c, tag)
}

func TestFlushCoversEveryConnection(t *testing.T) {
	m := newMemory(1 << 20)
	covered := func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.replied > 0 && m.flushed == m.replied
	}
	if !flushOracle(t, func() Device { return m }, covered) {
		t.Fatal("a flush missed a write that was answered on another connection")
	}
	m = newMemory(1 << 20)
	if flushOracle(t, func() Device { return &ownFlush{memory: m} }, covered) {
		t.Fatal("the planted bug, FLUSH of one connection only, was not caught")
	}
}

// TestDisconnectAnswersFirst: what was asked before a goodbye is answered before the connection closes.
func TestDisconnectAnswersFirst(t *testing.T) {
	m := newMemory(1 << 20)
	m.hook = func(ctx context.Context, op string, off, n int64, blocking bool) error {
		if !blocking {
			return blockio.ErrBusy
		}
		time.Sleep(20 * time.Millisecond)
		return nil
	}
	c, _, _ := serveOne(t, m, true, Limits{})
	c.send(cat(rawRequest(cmdRead, 0, 1, 0, 4096, nil), rawRequest(cmdWrite, 0, 1, 0, 512, make([]byte, 512)), rawRequest(cmdFlush, 0, 1, 0, 0, nil),
		rawRequest(cmdDisc, 0, 9, 0, 0, nil), rawRequest(cmdRead, 0, 2, 0, 512, nil)))
	for range 3 {
		c.next(1, cmdFlush, 0)
	}
	c.closed()
}

// TestBadStreams: a stream out of step, an oversized payload and a client that vanishes in the middle of one end that
// connection, and its half write is not applied.
func TestBadStreams(t *testing.T) {
	m := newMemory(1 << 20)
	c, s, addr := serveOne(t, m, true, Limits{})
	c.send(bytes.Repeat([]byte{0xde, 0xad, 0xbe, 0xef}, 7))
	c.closed()
	for _, n := range []uint32{65536, 1 << 20} {
		c = attach(t, addr, "d", true)
		c.request(cmdWrite, 0, 1, 0, n, bytes.Repeat([]byte("W"), 1000))
		c.c.Close()
	}
	waitFor(t, "end of the connections", func() bool { return s.accepted.Load() == 0 })
	c = attach(t, addr, "d", true)
	if !bytes.Equal(c.pread(0, 4096), make([]byte, 4096)) {
		t.Fatal("half a write was applied")
	}
}

// TestStopAnswersInFlight: a stop waits for requests that were read and answers them, and nothing is lost of them.
func TestStopAnswersInFlight(t *testing.T) {
	m := newMemory(1 << 20)
	started := make(chan struct{}, 3)
	m.hook = func(ctx context.Context, op string, off, n int64, blocking bool) error {
		if !blocking {
			return blockio.ErrBusy
		}
		started <- struct{}{}
		time.Sleep(50 * time.Millisecond)
		return nil
	}
	e := newExports(map[string]Device{"d": m})
	_, addr, stop := listen(t, "tcp", Config{Exports: e})
	c := attach(t, addr, "d", true)
	c.send(cat(rawRequest(cmdRead, 0, 1, 0, 4096, nil), rawRequest(cmdWrite, 0, 1, 0, 512, make([]byte, 512)), rawRequest(cmdFlush, 0, 1, 0, 0, nil)))
	for range 3 {
		<-started
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if a := c.next(1, cmdFlush, 0); a.errno != 0 {
			t.Fatalf("errno %d", a.errno)
		}
	}
	c.closed()
	if e.openNow() != 0 {
		t.Fatal("export is still open")
	}
	if _, err := net.Dial("tcp", addr.String()); err == nil {
		t.Fatal("still listening")
	}
}

// TestStopIsBounded: a device that never ends is left after the drain timeout; what is in flight is not answered.
func TestStopIsBounded(t *testing.T) {
	m := newMemory(1 << 20)
	m.hook = func(ctx context.Context, op string, off, n int64, blocking bool) error {
		if !blocking {
			return blockio.ErrBusy
		}
		<-ctx.Done()
		return ctx.Err()
	}
	lost := newMemory(1 << 20)
	lost.commits = make(chan []completion, 1) // accepted, and nobody commits
	_, addr, stop := listen(t, "tcp", Config{Exports: newExports(map[string]Device{"d": m, "lost": lost}), Limits: Limits{DrainTimeout: 100 * time.Millisecond}})
	c, l := attach(t, addr, "d", true), attach(t, addr, "lost", true)
	c.request(cmdRead, 0, 1, 0, 4096, nil)
	l.request(cmdWrite, 0, 1, 0, 512, make([]byte, 512))
	run := <-lost.commits
	begun := time.Now()
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if spent := time.Since(begun); spent > 5*time.Second {
		t.Fatalf("stop took %v", spent)
	}
	c.closed()
	l.closed()
	lost.complete(run) // comes too late and harms nobody
}

// TestCloseExport ends the clients of one export only.
func TestCloseExport(t *testing.T) {
	s, addr, _ := listen(t, "tcp", Config{Exports: newExports(map[string]Device{"a": newMemory(1 << 20), "b": newMemory(1 << 20)})})
	a, b := attach(t, addr, "a", true), attach(t, addr, "b", true)
	a.pread(0, 512)
	b.pread(0, 512)
	if list := s.Attachments(); len(list) != 2 {
		t.Fatalf("%d attachments", len(list))
	}
	if n := s.CloseExport("a"); n != 1 {
		t.Fatalf("%d connections", n)
	}
	a.closed()
	b.pread(0, 512)
}

// Test128ConnectionsSlowReaderNoHeadOfLine (128_connections_slow_reader_no_head_of_line): 127 clients ask for data and do not read it.
// The one that does is served, a commit that ends requests of all is not held up, and memory stays bounded.
func Test128ConnectionsSlowReaderNoHeadOfLine(t *testing.T) {
	m := newMemory(1 << 30)
	m.commits = make(chan []completion, 256)
	var committer, asking sync.WaitGroup
	committer.Go(func() {
		for run := range m.commits {
			m.complete(run)
		}
	})
	_, addr, stop := listen(t, "tcp", Config{Exports: newExports(map[string]Device{"d": m}), Limits: Limits{StuckTimeout: time.Minute}, Seats: seat.New(1<<10, eager)})
	defer func() {
		asking.Wait()
		if err := stop(); err != nil {
			t.Error(err)
		}
		close(m.commits)
		committer.Wait()
	}()
	var many []byte
	for i := range uint64(2000) {
		many = append(many, rawRequest(cmdRead, 0, i, 0, 64<<10, nil)...)
		many = append(many, rawRequest(cmdWrite, 0, i, 1<<29, 512, make([]byte, 512))...)
	}
	before := inUse()
	for range 127 {
		c := attach(t, addr, "d", true)
		c.c.(*net.TCPConn).SetReadBuffer(4096)
		asking.Go(func() {
			c.c.SetWriteDeadline(time.Now().Add(2 * time.Second))
			c.c.Write(many) // stops when the server stops reading
		})
		defer c.c.Close()
	}
	good := attach(t, addr, "d", true)
	data := pattern(5, 4096)
	worst := time.Duration(0)
	for i := range uint64(200) {
		begun := time.Now()
		good.pwrite(i*4096, data)
		good.ok(cmdFlush, 0, 0, 0, nil)
		if !bytes.Equal(good.pread(i*4096, 4096), data) {
			t.Fatal("data differ")
		}
		worst = max(worst, time.Since(begun))
	}
	if worst > 2*time.Second {
		t.Fatalf("slowest round took %v", worst)
	}
	if grown := int64(inUse()) - int64(before); grown > 160<<20 {
		t.Fatalf("%d MiB of memory for clients that do not read", grown>>20)
	}
}

// TestStuckWrite: a client that takes nothing for the stuck timeout is cut off, one that is merely silent is not.
func TestStuckWrite(t *testing.T) {
	m := newMemory(1 << 30)
	c, s, addr := serveOne(t, m, true, Limits{StuckTimeout: 100 * time.Millisecond})
	idle := attach(t, addr, "d", true)
	c.c.(*net.TCPConn).SetReadBuffer(4096)
	for i := range uint64(2) {
		c.request(cmdRead, 0, i, 0, payloadMax, nil)
	}
	waitFor(t, "end of the stuck connection", func() bool { return s.accepted.Load() == 1 })
	idle.pread(0, 512)
}

// TestStuckPayload is the same for a client that announces a payload and does not send it.
func TestStuckPayload(t *testing.T) {
	c, s, _ := serveOne(t, newMemory(1<<30), true, Limits{StuckTimeout: 100 * time.Millisecond})
	c.request(cmdWrite, 0, 1, 0, 1<<20, make([]byte, 1000))
	c.closed()
	waitFor(t, "end of the stuck connection", func() bool { return s.accepted.Load() == 0 })
}

// TestLowMemoryShedsTheStuck: clients that hold all payload memory and stand still lose it to one that works.
func TestLowMemoryShedsTheStuck(t *testing.T) {
	s, addr, _ := listen(t, "tcp", Config{Exports: newExports(map[string]Device{"d": newMemory(1 << 30)}),
		Limits: Limits{PayloadBytes: 64 << 20, StuckTimeoutLow: 200 * time.Millisecond}})
	for range 2 {
		c := attach(t, addr, "d", true)
		c.request(cmdWrite, 0, 1, 0, payloadMax, make([]byte, 1000))
	}
	waitFor(t, "use of all memory", func() bool {
		ok := s.payload.TryAcquire(1)
		if ok {
			s.payload.Release(1)
		}
		return !ok
	})
	good := attach(t, addr, "d", true)
	data := pattern(1, 1<<20)
	begun := time.Now()
	good.pwrite(0, data)
	if !bytes.Equal(good.pread(0, 1<<20), data) {
		t.Fatal("data differ")
	}
	if spent := time.Since(begun); spent > 5*time.Second {
		t.Fatalf("waited %v", spent)
	}
}

// TestBudgetComesBack: whatever way a request ends, its payload memory returns.
func TestBudgetComesBack(t *testing.T) {
	m := newMemory(1 << 30)
	var n atomic.Int64
	m.hook = func(ctx context.Context, op string, off, length int64, blocking bool) error {
		switch n.Add(1) % 5 {
		case 0, 1:
			if !blocking {
				return blockio.ErrBusy
			}
		case 2:
			return errors.New("medium error")
		}
		return nil
	}
	s, addr, stop := listen(t, "tcp", Config{Exports: newExports(map[string]Device{"d": m})})
	for range 8 {
		c := attach(t, addr, "d", true)
		go io.Copy(io.Discard, c.c)
		for i := range uint64(60) {
			c.request(cmdRead, 0, i, i<<20, 300<<10, nil)
			c.request(cmdWrite, 0, i, i<<20, 300<<10, make([]byte, 300<<10))
			c.request(cmdRead, 0, i, i<<20, 4096, nil)
			c.request(cmdWrite, 0, i, i<<20, 4096, make([]byte, 4096))
			c.request(cmdCache, 0, i, i<<20, 1<<20, nil)
		}
		c.c.Close() // in the middle of it
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if !s.payload.TryAcquire(s.cfg.Limits.PayloadBytes) {
		t.Fatal("payload memory was not given back")
	}
}

// TestNoAllocation: requests served from memory allocate nothing, on the raw path of sockets.
func TestNoAllocation(t *testing.T) {
	if testing.CoverMode() != "" || raceEnabled {
		t.Skip("instrumented")
	}
	resting, seated := seat.Rules{Bursts: 1 << 30}, eager
	seated.Rest = time.Second // a change allocates
	for _, rules := range []seat.Rules{resting, seated} {
		noAllocation(t, Config{Exports: newExports(map[string]Device{"d": newMemory(1 << 20)}), Seats: seat.New(1, rules)})
	}
}

func noAllocation(t *testing.T, cfg Config) {
	_, addr, _ := listen(t, "unix", cfg)
	c := attach(t, addr, "d", true)
	var burst []byte
	answers := 0
	for i := range uint64(16) {
		burst = append(burst, rawRequest(cmdWrite, cmdFlagFUA, i, i*4096, 4096, make([]byte, 4096))...)
		burst = append(burst, rawRequest(cmdRead, 0, i, i*4096, 4096, nil)...)
		burst = append(burst, rawRequest(cmdTrim, 0, i, 1<<19, 512, nil)...)
		answers += simpleBytes + dataHeaderBytes + 4096 + simpleBytes
	}
	burst = append(burst, rawRequest(cmdFlush, 0, 99, 0, 0, nil)...)
	answers += simpleBytes
	in := make([]byte, answers)
	round := func() {
		if _, err := c.c.Write(burst); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c.c, in); err != nil {
			t.Fatal(err)
		}
	}
	for range 100 {
		round()
	}
	// 49 requests a round; AllocsPerRun counts those of every goroutine
	if n := testing.AllocsPerRun(200, round); n >= 1 {
		t.Fatalf("%v allocations in a round of 49 requests", n)
	}
}

// TestManyClientsVerify: many clients at once, all verified, with a committer of its own goroutine and devices that are
// sometimes busy.
func TestManyClientsVerify(t *testing.T) {
	m := newMemory(1 << 30)
	m.commits = make(chan []completion, 1024)
	var committer sync.WaitGroup
	committer.Go(func() {
		for run := range m.commits {
			m.complete(run)
		}
	})
	var n atomic.Int64
	m.hook = func(ctx context.Context, op string, off, length int64, blocking bool) error {
		if !blocking && n.Add(1)%7 == 0 {
			return blockio.ErrBusy
		}
		return nil
	}
	_, addr, stop := listen(t, "tcp", Config{Exports: newExports(map[string]Device{"d": m}), Seats: seat.New(1<<10, eager)})
	var clients sync.WaitGroup
	for id := range uint64(16) {
		c := attach(t, addr, "d", id%2 == 0)
		clients.Go(func() {
			if err := verify(c, id, 12); err != nil {
				t.Errorf("client %d: %v", id, err)
			}
			c.c.Close()
		})
	}
	clients.Wait()
	if err := stop(); err != nil {
		t.Error(err)
	}
	close(m.commits)
	committer.Wait()
}

// verify writes stripes of its own in bursts of 8 and reads each back.
func verify(c *client, id uint64, rounds int) error {
	r := rand.New(rand.NewPCG(id, 9))
	for range rounds {
		var offs [8]uint64
		var data [8][]byte
		var burst []byte
		for i := range offs {
			n := 512 * (1 + r.IntN(16))
			if r.IntN(20) == 0 {
				n = 300 << 10
			}
			offs[i], data[i] = id<<25+uint64(i)<<20+uint64(r.IntN(100))*512, pattern(r.Uint64(), n)
			burst = append(burst, rawRequest(cmdWrite, 0, uint64(i), offs[i], uint32(n), data[i])...)
		}
		if err := exchange(c, burst, len(offs), func(answer) error { return nil }, nil); err != nil {
			return err
		}
		burst = burst[:0]
		for i := range offs {
			burst = append(burst, rawRequest(cmdRead, 0, uint64(i), offs[i], uint32(len(data[i])), nil)...)
		}
		check := func(a answer) error {
			if !bytes.Equal(a.data, data[a.cookie]) {
				return fmt.Errorf("read at %d differs", offs[a.cookie])
			}
			return nil
		}
		if err := exchange(c, burst, len(offs), check, func(cookie uint64) int { return len(data[cookie]) }); err != nil {
			return err
		}
	}
	return nil
}

// exchange sends a burst and gives every answer to check.
func exchange(c *client, burst []byte, answers int, check func(answer) error, want func(uint64) int) error {
	sent := make(chan error, 1)
	go func() {
		_, err := c.c.Write(burst)
		sent <- err
	}()
	if want == nil {
		want = func(uint64) int { return 0 }
	}
	for range answers {
		a, err := readAnswer(c.c, want)
		if err == nil && a.errno != 0 {
			err = fmt.Errorf("errno %d", a.errno)
		}
		if err == nil {
			err = check(a)
		}
		if err != nil {
			return err
		}
	}
	return <-sent
}

// TestEarlyRequests: what a client sends right behind GO, before its answer, is served.
func TestEarlyRequests(t *testing.T) {
	_, addr, _ := listen(t, "tcp", Config{Exports: newExports(map[string]Device{"d": newMemory(1 << 20)})})
	c := hello(t, addr)
	c.send(cat([]byte("IHAVEOPT"), be(protocol.NEGOTIATION_ID_OPTION_GO), be(uint32(7)), str("d"), be(uint16(0)),
		rawRequest(cmdWrite, 0, 4, 0, 2000, pattern(1, 2000)), rawRequest(cmdFlush, 0, 5, 0, 0, nil)[:10]))
	c.expect(protocol.NEGOTIATION_ID_OPTION_GO, protocol.NEGOTIATION_TYPE_REPLY_INFO)
	c.expect(protocol.NEGOTIATION_ID_OPTION_GO, protocol.NEGOTIATION_TYPE_REPLY_ACK)
	c.next(4, cmdWrite, 0)
	c.send(rawRequest(cmdFlush, 0, 5, 0, 0, nil)[10:])
	c.next(5, cmdFlush, 0)
}
