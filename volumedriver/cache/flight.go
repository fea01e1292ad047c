package cache

import (
	"context"
	"sync"
	"sync/atomic"
)

// flight is one ranged read of an object that is under way, for whoever wants its lines.
//
// The goroutine that reads belongs to the store, which waits for it. It holds one reference to the buffer; so does each who waits and
// each line that is on its way to the SSD.
type flight struct {
	o      *object
	first  uint32
	off, n int64
	buf    []byte
	pooled *[]byte
	scan   bool
	ahead  bool // nobody waited when it started

	ctx    context.Context
	cancel context.CancelFunc
	done   chan struct{}
	err    error // once done

	waiters int           // guarded by store.mu
	urgent  chan struct{} // closed when somebody starts to wait for a flight ahead of need
	hurried bool          // urgent is closed; guarded by store.mu
	refs    atomic.Int32
}

// flightBuffers are the buffers of flights, by size.
var flightBuffers = [...]struct {
	bytes int
	pool  sync.Pool
}{{bytes: 64 << 10}, {bytes: 256 << 10}, {bytes: fetchBytesMax}}

func (f *flight) getBuffer(n int) {
	for i := range flightBuffers {
		if b := &flightBuffers[i]; n <= b.bytes {
			f.pooled, _ = b.pool.Get().(*[]byte)
			if f.pooled == nil {
				p := make([]byte, b.bytes)
				f.pooled = &p
			}
			f.buf = (*f.pooled)[:n]
			return
		}
	}
	f.buf = make([]byte, n)
}

// release gives up one reference to the buffer.
func (f *flight) release() {
	if f.refs.Add(-1) > 0 || f.pooled == nil {
		return
	}
	for i := range flightBuffers {
		if b := &flightBuffers[i]; len(*f.pooled) == b.bytes {
			b.pool.Put(f.pooled)
		}
	}
	f.buf, f.pooled = nil, nil
}

// lines is how many lines the flight brings.
func (f *flight) lines(line int64) uint32 { return uint32((f.n + line - 1) / line) }

// fly gives flights, under way or new, that together bring lines [first, first+covered) of an object. It ends before a line that has been
// cached meanwhile, unless it must not. With wait the caller waits for each by await; without, it gets none.
func (s *store) fly(o *object, first, n uint32, scan, wait, must bool) (all []*flight, covered uint32, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, 0, errClosed
	}
	most := uint32(max(1, fetchBytesMax/s.c.line))
	line := first
	for line < first+n {
		if f := s.flights[keyOf(o.id, line)]; f != nil {
			end := f.first + f.lines(s.c.line)
			if wait {
				s.joinLocked(f)
				all = append(all, f)
				s.c.shared.Add(int64(min(end, first+n) - line))
			}
			line = end
			continue
		}
		if !must && s.cached(o, line) || !wait && s.c.ahead.Load() >= aheadWaiting {
			break
		}
		k := uint32(1)
		for line+k < first+n && k < most && s.flights[keyOf(o.id, line+k)] == nil {
			k++
		}
		f := s.startLocked(o, line, k, scan, !wait)
		if wait {
			s.joinLocked(f)
			all = append(all, f)
			s.c.misses.Add(int64(k))
		} else {
			s.c.prefetched.Add(int64(k))
		}
		line += k
	}
	return all, line - first, nil
}

// startLocked starts a flight for lines that no other brings.
func (s *store) startLocked(o *object, first, n uint32, scan, ahead bool) *flight {
	off := int64(first) * s.c.line
	f := &flight{o: o, first: first, off: off, n: min(int64(n)*s.c.line, o.size-off), scan: scan, ahead: ahead,
		done: make(chan struct{}), urgent: make(chan struct{})}
	f.getBuffer(int(f.n))
	f.ctx, f.cancel = context.WithCancel(s.ctx)
	f.refs.Store(1)
	o.retain()
	for i := range n {
		s.flights[keyOf(o.id, first+i)] = f
	}
	if ahead {
		s.c.ahead.Add(1)
	}
	s.wg.Go(func() { s.carry(f) })
	return f
}

func (s *store) joinLocked(f *flight) {
	f.waiters++
	f.refs.Add(1)
	if f.ahead && !f.hurried {
		f.hurried = true
		close(f.urgent)
	}
}

// carry reads, keeps what it brought, and tells those who wait.
func (s *store) carry(f *flight) {
	f.err = s.fetch(f)
	if f.err == nil {
		s.keep(f)
	}
	s.mu.Lock()
	s.landLocked(f)
	s.mu.Unlock()
	close(f.done)
	f.cancel()
	if f.ahead {
		s.c.ahead.Add(-1)
	}
	f.o.release()
	f.release()
}

// landLocked lets nobody join the flight any more.
func (s *store) landLocked(f *flight) {
	for i := range f.lines(s.c.line) {
		if key := keyOf(f.o.id, f.first+i); s.flights[key] == f {
			delete(s.flights, key)
		}
	}
}

// fetch reads the flight's bytes when it is its turn. A flight ahead of need takes its turn among its like, until somebody waits for it.
func (s *store) fetch(f *flight) error {
	slots, urgent := s.c.demand, (<-chan struct{})(nil)
	if f.ahead {
		slots, urgent = s.c.spare, f.urgent
	}
	select {
	case slots <- struct{}{}:
	case <-urgent:
		slots = s.c.demand
		select {
		case slots <- struct{}{}:
		case <-f.ctx.Done():
			return f.ctx.Err()
		}
	case <-f.ctx.Done():
		return f.ctx.Err()
	}
	defer func() { <-slots }()
	inner, err := f.o.open(f.ctx)
	if err == nil {
		s.c.fetches.Add(1)
		err = inner.ReadAt(f.ctx, f.buf, f.off)
	}
	if err != nil {
		s.c.fetchErrors.Add(1)
		return err
	}
	s.c.fetched.Add(f.n)
	return nil
}

// keep admits the lines that a flight brought.
func (s *store) keep(f *flight) {
	for i := range f.lines(s.c.line) {
		line := f.first + i
		from := int64(i) * s.c.line
		data := f.buf[from:min(from+s.c.line, f.n)]
		print := f.o.hash.print(line)
		s.c.ram.put(f.o.id, line, print, data, f.scan)
		if s.c.ssd != nil && !f.scan {
			f.refs.Add(1)
			s.c.ssd.offer(f.o.id, line, print, f.o.hash, data, f.release, nil)
		}
	}
	if !f.ahead && !f.scan {
		s.c.judgeUse(f.n, 0)
	}
}

// await waits for a flight and copies what it brought of [off, off+len(p)) to p.
func (s *store) await(ctx context.Context, f *flight, p []byte, off int64) error {
	select {
	case <-f.done:
	default:
		select {
		case <-f.done:
		case <-ctx.Done():
			s.leave(f)
			return ctx.Err()
		}
	}
	err := f.err
	if err == nil {
		from, to := max(off, f.off), min(off+int64(len(p)), f.off+f.n)
		copy(p[from-off:to-off], f.buf[from-f.off:to-f.off])
	}
	s.leave(f)
	return err
}

// leave ends a wait. A flight that nobody waits for any more, and that was not started ahead of need, is given up.
func (s *store) leave(f *flight) {
	s.mu.Lock()
	f.waiters--
	if f.waiters == 0 && !f.ahead {
		s.landLocked(f)
		f.cancel()
	}
	s.mu.Unlock()
	f.release()
}
