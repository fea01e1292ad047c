package nbd

import (
	"context"
	"errors"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"varve/volumedriver/blockio"
)

const fakeBlock = 4096

// memory is a Device in memory that works: blocks exist once written, accepted requests end at Kick or, with a
// committer, on another goroutine. Hooks make it slow or broken.
type memory struct {
	size     int64
	readOnly bool

	mu       sync.Mutex
	blocks   map[int64]*[fakeBlock]byte
	pending  []completion
	replied  int // writes whose Done has been called
	flushed  int // writes covered by a flush
	accepted int
	flushes  int
	inline   int
	ahead    int // KickAhead
	synced   int // KickSync

	// hook, when set, is asked before each operation; blocking says that it may wait.
	hook func(ctx context.Context, op string, off, n int64, blocking bool) error
	// commits, when set, gets the completions that Kick would run.
	commits chan []completion
}

type completion struct {
	c     blockio.Completer
	tag   uint64
	flush bool
	err   error
}

func newMemory(size int64) *memory {
	return &memory{size: size, blocks: make(map[int64]*[fakeBlock]byte)}
}

func (m *memory) Size() int64    { return m.size }
func (m *memory) ReadOnly() bool { return m.readOnly }

func (m *memory) ask(ctx context.Context, op string, off, n int64, blocking bool) error {
	if m.hook == nil {
		return nil
	}
	return m.hook(ctx, op, off, n, blocking)
}

func (m *memory) each(off, n int64, f func(block, from, to, at int64)) {
	for at := int64(0); at < n; {
		block, from := (off+at)/fakeBlock, (off+at)%fakeBlock
		to := min(fakeBlock, from+n-at)
		f(block, from, to, at)
		at += to - from
	}
}

func (m *memory) read(p []byte, off int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.each(off, int64(len(p)), func(block, from, to, at int64) {
		if b := m.blocks[block]; b != nil {
			copy(p[at:], b[from:to])
		} else {
			clear(p[at : at+to-from])
		}
	})
}

func (m *memory) writeLocked(p []byte, off int64) {
	m.accepted++
	m.each(off, int64(len(p)), func(block, from, to, at int64) {
		b := m.blocks[block]
		if b == nil {
			b = new([fakeBlock]byte)
			m.blocks[block] = b
		}
		copy(b[from:to], p[at:])
	})
}

func (m *memory) zeroLocked(off, n int64) {
	m.accepted++
	if n/fakeBlock > int64(len(m.blocks)) {
		for block, b := range m.blocks {
			from, to := max(off-block*fakeBlock, 0), min(off+n-block*fakeBlock, fakeBlock)
			if from == 0 && to == fakeBlock {
				delete(m.blocks, block)
			} else if from < to {
				clear(b[from:to])
			}
		}
		return
	}
	m.each(off, n, func(block, from, to, at int64) {
		if b := m.blocks[block]; b != nil && to-from == fakeBlock {
			delete(m.blocks, block)
		} else if b != nil {
			clear(b[from:to])
		}
	})
}

func (m *memory) TryRead(p []byte, off int64) error {
	if err := m.ask(nil, "read", off, int64(len(p)), false); err != nil {
		return err
	}
	m.read(p, off)
	return nil
}

func (m *memory) TryWrite(p []byte, off int64, f blockio.Flags, c blockio.Completer, tag uint64) error {
	if err := m.ask(nil, "write", off, int64(len(p)), false); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.writeLocked(p, off)
	m.pending = append(m.pending, completion{c: c, tag: tag})
	return nil
}

func (m *memory) TryZero(off, n int64, f blockio.Flags, c blockio.Completer, tag uint64) error {
	if err := m.ask(nil, "zero", off, n, false); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.zeroLocked(off, n)
	m.pending = append(m.pending, completion{c: c, tag: tag})
	return nil
}

func (m *memory) TryFlush(c blockio.Completer, tag uint64) error {
	if err := m.ask(nil, "flush", 0, 0, false); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.flushes++
	m.pending = append(m.pending, completion{c: c, tag: tag, flush: true})
	return nil
}

func (m *memory) Kick() {
	m.mu.Lock()
	run := m.pending
	m.pending = nil
	m.mu.Unlock()
	if m.commits != nil {
		m.commits <- run
		return
	}
	m.complete(run)
	m.mu.Lock()
	if m.pending == nil {
		m.pending = run[:0] // keeps the memory: a burst costs no allocation
	}
	m.mu.Unlock()
}

func (m *memory) KickSync() {
	m.mu.Lock()
	m.synced++
	m.mu.Unlock()
	m.Kick()
}

func (m *memory) KickAhead() {
	m.mu.Lock()
	m.ahead++
	m.mu.Unlock()
	m.Kick()
}

// complete ends a run the way a committer does.
func (m *memory) complete(run []completion) {
	for i, e := range run {
		m.mu.Lock()
		if e.flush {
			m.flushed = m.replied
		} else {
			m.replied++
		}
		m.mu.Unlock()
		e.c.Done(e.tag, e.err)
		if i == len(run)-1 || run[i+1].c != e.c {
			e.c.Settle(true)
		}
	}
}

func (m *memory) FlushInline() error {
	m.mu.Lock()
	m.inline++
	m.mu.Unlock()
	return m.Flush(context.Background())
}

func (m *memory) Read(ctx context.Context, p []byte, off int64) error {
	if err := m.ask(ctx, "read", off, int64(len(p)), true); err != nil {
		return err
	}
	m.read(p, off)
	return nil
}

func (m *memory) Write(ctx context.Context, p []byte, off int64, f blockio.Flags) error {
	if err := m.ask(ctx, "write", off, int64(len(p)), true); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.writeLocked(p, off)
	m.replied++
	return nil
}

func (m *memory) Zero(ctx context.Context, off, n int64, f blockio.Flags) error {
	if err := m.ask(ctx, "zero", off, n, true); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.zeroLocked(off, n)
	m.replied++
	return nil
}

func (m *memory) Flush(ctx context.Context) error {
	if err := m.ask(ctx, "flush", 0, 0, true); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.flushes++
	m.flushed = m.replied
	return nil
}

func (m *memory) flushCount() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.flushes
}

// Extents reports runs by walking the blocks, skipping holes by the nearest written one.
func (m *memory) Extents(ctx context.Context, off, n int64, max int) ([]blockio.Extent, error) {
	if err := m.ask(ctx, "extents", off, n, true); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var list []blockio.Extent
	for end := off + n; off < end && len(list) < max; {
		hole := m.blocks[off/fakeBlock] == nil
		to := (off/fakeBlock + 1) * fakeBlock
		if hole {
			to = m.nextLocked(off/fakeBlock, end)
		}
		for !hole && to < end && m.blocks[to/fakeBlock] != nil {
			to += fakeBlock
		}
		list = append(list, blockio.Extent{Length: min(to, end) - off, Hole: hole, Zero: hole})
		off = to
	}
	return list, nil
}

// nextLocked is the offset of the first written block after block, or end.
func (m *memory) nextLocked(block, end int64) int64 {
	for range 64 {
		if block++; block*fakeBlock >= end || m.blocks[block] != nil {
			return min(block*fakeBlock, end)
		}
	}
	for b := range m.blocks {
		if b > block {
			end = min(end, b*fakeBlock)
		}
	}
	return end
}

// exports serves a fixed set of devices and counts what is open.
type exports struct {
	mu      sync.Mutex
	devices map[string]Device
	refuse  map[string]error
	// describe is the description of an export in lists.
	describe map[string]string
	opened   map[string]int
	open     int
	peers    []Peer
}

func newExports(devices map[string]Device) *exports {
	return &exports{devices: devices, refuse: map[string]error{}, opened: map[string]int{}}
}

func (e *exports) Open(ctx context.Context, name string, peer Peer) (Device, func(), error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.refuse[name]; err != nil && !(errors.Is(err, ErrTLSRequired) && peer.TLS) {
		return nil, nil, err
	}
	d, ok := e.devices[name]
	if !ok {
		return nil, nil, ErrUnknownExport
	}
	e.opened[name]++
	e.open++
	e.peers = append(e.peers, peer)
	return d, func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.open--
	}, nil
}

func (e *exports) List(ctx context.Context, peer Peer) ([]ExportInfo, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	var list []ExportInfo
	for name := range e.devices {
		if err := e.refuse[name]; err != nil && !(errors.Is(err, ErrTLSRequired) && peer.TLS) {
			continue
		}
		list = append(list, ExportInfo{Name: name, Description: e.describe[name]})
	}
	slices.SortFunc(list, func(a, b ExportInfo) int { return strings.Compare(a.Name, b.Name) })
	return list, nil
}

func (e *exports) openNow() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.open
}

func (e *exports) openedEver() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.peers)
}

// listen starts a server on a loopback TCP port (or a unix socket) and ends it with the test.
func listen(t testing.TB, network string, cfg Config) (s *Server, addr net.Addr, stop func() error) {
	t.Helper()
	where := "127.0.0.1:0"
	if network == "unix" {
		where = t.TempDir() + "/nbd.sock"
	}
	l, err := net.Listen(network, where)
	if err != nil {
		t.Fatal(err)
	}
	s = New(cfg)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx, l) }()
	var once sync.Once
	var result error
	stop = func() error {
		once.Do(func() {
			cancel()
			select {
			case result = <-ended:
			case <-time.After(30 * time.Second):
				result = errors.New("server did not stop in 30 s")
			}
		})
		return result
	}
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Errorf("run: %v", err)
		}
	})
	return s, l.Addr(), stop
}
