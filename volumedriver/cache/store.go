package cache

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver/backend"
)

const (
	chainsMax  = 256
	windowPart = 16 // of the RAM tier may be read ahead for one stream
	keepPutMax = 500 * time.Millisecond
)

var errClosed = fmt.Errorf("read cache: %w", fs.ErrClosed)

// store is a backend read through the cache.
type store struct {
	c      *Cache
	inner  backend.Backend
	pool   uuid.UUID
	ctx    context.Context // of the flights
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex
	flights map[uint64]*flight // by line
	chains  map[string]int64   // volume prefix -> bytes that a sequential reader had read when it reached an object's end
	closed  bool
	opened  map[uint32]*opened // open on the backend, by number
	idle    *list.List         // of those that nobody uses, the latest first
}

// Distant tells what the backend tells.
func (s *store) Distant() bool { return backend.Distant(s.inner) }

// Put puts. What was known of an object of that name was of another that is gone. If the cache keeps writes, what was put goes to
// the SSD, but not before it is known to be there: cells name their object and not its bytes, so those of a put that the backend
// refuses would be taken for the ones of the object that it has, by an index older than they are.
func (s *store) Put(ctx context.Context, name string, parts ...[]byte) error {
	err := s.inner.Put(ctx, name, parts...)
	if !errors.Is(err, backend.ErrExist) {
		s.forget(name)
	}
	if err != nil {
		return err
	}
	if s.c.cfg.KeepWrites && s.c.ssd.on() && backend.ClassOf(ctx) == backend.Foreground {
		s.keepPut(ctx, name, parts)
	}
	return nil
}

// keepPut offers an object's lines to the SSD. Its queue holds less than some objects have, so the caller waits a while for room.
func (s *store) keepPut(ctx context.Context, name string, parts [][]byte) {
	size := int64(0)
	for _, p := range parts {
		size += int64(len(p))
	}
	h := hashOf(s.pool, name)
	id := s.c.reg.add(h, size)
	defer s.c.reg.close(id)
	ctx, cancel := context.WithTimeout(ctx, keepPutMax)
	defer cancel()
	part, at := 0, 0
	for line := uint32(0); int64(line)*s.c.line < size; line++ {
		f := new(flight)
		f.refs.Store(1)
		f.getBuffer(int(min(s.c.line, size-int64(line)*s.c.line)))
		for n := 0; n < len(f.buf); {
			k := copy(f.buf[n:], parts[part][at:])
			n += k
			if at += k; at == len(parts[part]) {
				part, at = part+1, 0
			}
		}
		s.c.ssd.offer(id, line, h.print(line), h, f.buf, f.release, ctx.Done())
	}
}

// Open gives an object. One of which something is cached is not looked up on the backend until more of it is needed, so that what
// is cached can be read while the backend is away.
func (s *store) Open(ctx context.Context, name string) (backend.Object, error) {
	o, err := s.openObject(ctx, name)
	if err != nil {
		return nil, err
	}
	return o, nil
}

func (s *store) openObject(ctx context.Context, name string) (*object, error) {
	if err := backend.CheckName(name); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	closed := s.closed
	s.mu.Unlock()
	if closed {
		return nil, errClosed
	}
	h := hashOf(s.pool, name)
	o := &object{s: s, name: name, hash: h, opening: make(chan struct{}, 1)}
	o.refs.Store(1)
	o.streams.ScanBytes, o.streams.WindowBytes = s.c.cfg.ScanBytes, s.c.windowBytes()
	if backend.ClassOf(ctx) == backend.Foreground {
		if id, size, ok := s.c.reg.open(h); ok {
			o.id, o.size = id, size
			return o, nil
		}
	}
	inner, err := s.inner.Open(ctx, name)
	if err != nil {
		if errors.Is(err, backend.ErrNotExist) {
			s.forget(name)
		}
		return nil, err
	}
	o.size = inner.Size()
	o.id = s.c.reg.add(h, o.size)
	if backend.ClassOf(ctx) == backend.Foreground {
		o.inner.Store(s.share(o.id, inner))
	} else {
		o.inner.Store(s.private(o.id, inner))
	}
	return o, nil
}

func (s *store) Stat(ctx context.Context, name string) (backend.Info, error) {
	return s.inner.Stat(ctx, name)
}

// Delete deletes, and drops what is cached, whatever came of it.
func (s *store) Delete(ctx context.Context, name string) error {
	err := s.inner.Delete(ctx, name)
	s.forget(name)
	return err
}

// DeleteAll implements backend.BatchDeleter.
func (s *store) DeleteAll(ctx context.Context, names []string) error {
	err := backend.DeleteAll(ctx, s.inner, names)
	for _, name := range names {
		s.forget(name)
	}
	return err
}

// forget drops an object's lines; who has it open reads on from the backend.
func (s *store) forget(name string) {
	id, size, ok := s.c.reg.kill(hashOf(s.pool, name))
	if !ok {
		return
	}
	for off := int64(0); off < size; off += s.c.line {
		key := keyOf(id, s.c.lineAt(off))
		s.c.ram.drop(key, false)
		s.c.ssd.drop(key)
	}
	s.dismiss(id)
	s.c.reg.close(id)
}

func (s *store) List(ctx context.Context, prefix, after string, max int) ([]backend.Info, error) {
	return s.inner.List(ctx, prefix, after, max)
}

func (s *store) Space(ctx context.Context) (total, available uint64, err error) {
	return s.inner.Space(ctx)
}

// Close ends what is under way and closes the backend.
func (s *store) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel()
	s.wg.Wait()
	return errors.Join(s.closeIdle(), s.inner.Close())
}

// Held implements Holder.
func (s *store) Held(name string, off, n int64) (ram, disk int64) {
	id, size, ok := s.c.reg.open(hashOf(s.pool, name))
	if !ok {
		return 0, 0
	}
	defer s.c.reg.close(id)
	for at, end := max(0, off), min(off+n, size); at < end; {
		line := s.c.lineAt(at)
		next := min(int64(line+1)*s.c.line, end)
		if s.c.ram.has(keyOf(id, line)) {
			ram += next - at
		}
		if s.c.ssd.has(keyOf(id, line)) {
			disk += next - at
		}
		at = next
	}
	return ram, disk
}

// Unwrap gives the backend that the cache reads.
func (s *store) Unwrap() backend.Backend { return s.inner }

// Prefetch implements Prefetcher.
func (s *store) Prefetch(name string, off, n int64) { s.prefetch(name, off, n, false) }

func (s *store) prefetch(name string, off, n int64, scan bool) {
	if off < 0 || n <= 0 || backend.CheckName(name) != nil || !s.roomAhead() {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.c.ahead.Add(1)
	s.wg.Go(func() {
		defer s.c.ahead.Add(-1)
		o, err := s.openObject(s.ctx, name)
		if err != nil {
			return // who reads it will learn why
		}
		defer o.release()
		if off < o.size {
			s.ahead(o, off, min(off+n, o.size), scan)
		}
	})
}

func (s *store) roomAhead() bool { return s.c.ram != nil && s.c.ahead.Load() < aheadWaiting }

// ahead starts flights for what is not cached of a range inside an object.
func (s *store) ahead(o *object, from, to int64, scan bool) {
	if to <= from {
		return
	}
	last := s.c.lineAt(to - 1)
	for line := s.c.lineAt(from); line <= last && s.roomAhead(); {
		n := uint32(0)
		for line+n <= last && !s.cached(o, line+n) {
			n++
		}
		if n == 0 {
			line++
			continue
		}
		_, covered, err := s.fly(o, line, n, scan, false, false)
		if err != nil {
			return
		}
		line += covered // 0 if it came meanwhile, or there is no room
	}
}

func (s *store) cached(o *object, line uint32) bool {
	key := keyOf(o.id, line)
	return s.c.ram.has(key) || s.c.ssd.has(key)
}
