package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver/backend"
	"varve/volumedriver/vfs"
)

const (
	chainsMax  = 256
	windowPart = 32 // of the RAM tier may be read ahead for one stream
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
}

// Put puts. What was known of an object of that name was of another that is gone. If the cache keeps writes, what was put goes to
// the SSD.
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
	o.streams.ScanBytes, o.streams.WindowBytes = s.c.cfg.ScanBytes, min(windowMax, s.c.cfg.RAMBytes/windowPart)
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
	o.inner.Store(&inner)
	o.size = inner.Size()
	o.id = s.c.reg.add(h, o.size)
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
	return s.inner.Close()
}

// Unwrap gives the backend that the cache reads.
func (s *store) Unwrap() backend.Backend { return s.inner }

// Prefetch implements Prefetcher.
func (s *store) Prefetch(name string, off, n int64) {
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
			s.ahead(o, off, min(off+n, o.size), false)
		}
	})
}

func (s *store) roomAhead() bool { return s.c.ram != nil && s.c.ahead.Load() < aheadWaiting }

// ahead starts flights for what is not cached of a range inside an object.
func (s *store) ahead(o *object, from, to int64, scan bool) {
	if !s.roomAhead() || to <= from {
		return
	}
	last := s.c.lineAt(to - 1)
	for line := s.c.lineAt(from); line <= last; line++ {
		n := uint32(0)
		for line+n <= last && !s.cached(o, line+n) {
			n++
		}
		if n == 0 {
			continue
		}
		if _, covered, err := s.fly(o, line, n, scan, false, false); err != nil || covered < n {
			return
		}
		line += n
	}
}

func (s *store) cached(o *object, line uint32) bool {
	key := keyOf(o.id, line)
	return s.c.ram.has(key) || s.c.ssd.has(key)
}

// object is an object read through the cache.
type object struct {
	s       *store
	name    string
	hash    objectHash
	id      uint32
	size    int64
	refs    atomic.Int32 // its user, and flights
	streams Streams
	traced  atomic.Pointer[traced]

	opening chan struct{} // held by who opens inner
	inner   atomic.Pointer[backend.Object]
}

// open gives the backend's object, opened when it is first needed.
func (o *object) open(ctx context.Context) (backend.Object, error) {
	if p := o.inner.Load(); p != nil {
		return *p, nil
	}
	select {
	case o.opening <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	defer func() { <-o.opening }()
	if p := o.inner.Load(); p != nil {
		return *p, nil
	}
	inner, err := o.s.inner.Open(ctx, o.name)
	if err != nil {
		if errors.Is(err, backend.ErrNotExist) {
			o.s.forget(o.name)
		}
		return nil, err
	}
	if inner.Size() != o.size {
		o.s.forget(o.name)
		return nil, errors.Join(fmt.Errorf("object %s has %d bytes, and had %d when it was cached", o.name, inner.Size(), o.size), inner.Close())
	}
	o.inner.Store(&inner)
	return inner, nil
}

func (o *object) retain() { o.refs.Add(1) }

func (o *object) release() error {
	if o.refs.Add(-1) > 0 {
		return nil
	}
	o.s.c.reg.close(o.id)
	if p := o.inner.Load(); p != nil {
		return (*p).Close()
	}
	return nil
}

func (o *object) Size() int64  { return o.size }
func (o *object) Close() error { return o.release() }

func (o *object) inside(p []byte, off int64) error {
	if off < 0 || off > o.size || int64(len(p)) > o.size-off {
		return fmt.Errorf("read object %s: bytes %d+%d of %d: %w", o.name, off, len(p), o.size, io.ErrUnexpectedEOF)
	}
	return nil
}

// TryReadAt reads what is in RAM, or on the SSD and in the system's page cache.
func (o *object) TryReadAt(p []byte, off int64) error {
	if err := o.inside(p, off); err != nil {
		return err
	}
	if len(p) == 0 {
		return nil
	}
	h := o.touch(off, int64(len(p)), false)
	for at := off; at < off+int64(len(p)); {
		line, within, n := o.part(p, off, at)
		if hit, _ := o.cachedPart(line, within, p[at-off:at-off+n], h.Sequential, true); !hit {
			return vfs.ErrWouldBlock
		}
		at += n
	}
	o.readOK(p, off, h)
	return nil
}

// part gives the line at a position of a read, the position in it, and how many of the read's bytes it has from there.
func (o *object) part(p []byte, off, at int64) (line uint32, within int, n int64) {
	line = o.s.c.lineAt(at)
	start := int64(line) * o.s.c.line
	return line, int(at - start), min(off+int64(len(p)), start+o.s.c.line) - at
}

// cachedPart reads from RAM, else from the SSD.
func (o *object) cachedPart(line uint32, within int, p []byte, passing, try bool) (hit, again bool) {
	c := o.s.c
	if c.ram.read(keyOf(o.id, line), within, p, passing) {
		return true, false
	}
	if c.ssd == nil {
		return false, false
	}
	hit, again, _ = c.ssd.read(o.id, o.hash, line, within, p, passing, try)
	return hit, again
}

// touch tells the stream detector of a read, and passes sequential runs on from object to object.
func (o *object) touch(off, n int64, scan bool) Hint {
	h := o.streams.Touch(off, n, o.size)
	if h.found || h.ended {
		o.chain(h)
	}
	if scan {
		h.Scan, h.Sequential = true, true
	}
	if h.To > h.From {
		o.s.ahead(o, h.From, h.To, h.Scan)
	}
	return h
}

// chain notes that a sequential reader came to the object's end, or lets one go on from where it left the object before.
func (o *object) chain(h Hint) {
	prefix := volumePrefix(o.name)
	o.s.mu.Lock()
	run := int64(0)
	if h.found {
		run = o.s.chains[prefix]
		delete(o.s.chains, prefix)
	}
	if h.ended {
		if len(o.s.chains) >= chainsMax {
			clear(o.s.chains)
		}
		o.s.chains[prefix] = h.run + run
	}
	o.s.mu.Unlock()
	if run > 0 {
		o.streams.inherit(run)
	}
}

// volumePrefix is the part of an object's name that it has in common with others of its volume.
func volumePrefix(name string) string {
	if i := strings.IndexByte(name, '/'); i >= 0 {
		if j := strings.IndexByte(name[i+1:], '/'); j >= 0 {
			return name[:i+1+j]
		}
	}
	return name
}

// readOK follows a read that gave bytes: what a scan has read to its end leaves RAM.
func (o *object) readOK(p []byte, off int64, h Hint) {
	c := o.s.c
	c.read.Add(int64(len(p)))
	if t := o.traced.Load(); t != nil {
		o.trace(t, off, int64(len(p)))
	}
	if c.wasteFetched.Load() > 0 {
		c.judgeUse(0, int64(len(p)))
	}
	if !h.Scan {
		return
	}
	end := off + int64(len(p))
	for line := c.lineAt(off); int64(line)*c.line < end; line++ {
		if lineEnd := min(int64(line+1)*c.line, o.size); lineEnd <= end {
			c.ram.drop(keyOf(o.id, line), true)
		}
	}
}

// ReadAt reads through the cache.
func (o *object) ReadAt(ctx context.Context, p []byte, off int64) error {
	return o.read(ctx, p, off, false)
}

// ReadScanAt implements Scanner.
func (o *object) ReadScanAt(ctx context.Context, p []byte, off int64) error {
	return o.read(ctx, p, off, true)
}

func (o *object) read(ctx context.Context, p []byte, off int64, scan bool) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := o.inside(p, off); err != nil {
		return err
	}
	if len(p) == 0 {
		return nil
	}
	if backend.ClassOf(ctx) != backend.Foreground {
		return o.readThrough(ctx, p, off)
	}
	h := o.touch(off, int64(len(p)), scan)
	if err := o.fill(ctx, p, off, h); err != nil {
		return fmt.Errorf("read object %s: %w", o.name, err)
	}
	o.readOK(p, off, h)
	return nil
}

// readThrough reads from the backend itself, as a scrub must, which verifies what is there.
func (o *object) readThrough(ctx context.Context, p []byte, off int64) error {
	inner, err := o.open(ctx)
	if err != nil {
		return fmt.Errorf("read object %s: %w", o.name, err)
	}
	return inner.ReadAt(ctx, p, off)
}

// fill reads line by line; runs of missing lines are fetched, all at once.
func (o *object) fill(ctx context.Context, p []byte, off int64, h Hint) error {
	var flights []*flight
	var failed error
	tries := 0
	for at := off; at < off+int64(len(p)) && failed == nil; {
		line, within, n := o.part(p, off, at)
		if hit, again := o.cachedPart(line, within, p[at-off:at-off+n], h.Sequential, false); hit {
			if again {
				o.promote(line)
			}
			at += n
			continue
		}
		end := at + n
		for end < off+int64(len(p)) && !o.s.cached(o, o.s.c.lineAt(end)) {
			_, _, n := o.part(p, off, end)
			end += n
		}
		if o.exact(line, at, end, h) {
			failed = o.readExact(ctx, p[at-off:end-off], at)
			at = end
			continue
		}
		more, covered, err := o.s.fly(o, line, o.s.c.lineAt(end-1)-line+1, h.Scan, true, tries > 2)
		if flights, failed = append(flights, more...), err; covered == 0 {
			tries++ // it came meanwhile
			continue
		}
		at = min(end, int64(line+covered)*o.s.c.line)
	}
	for _, f := range flights {
		if failed != nil {
			o.s.leave(f)
			continue
		}
		err := o.s.await(ctx, f, p, off)
		if err != nil && f.ahead && ctx.Err() == nil {
			err = o.again(ctx, f, p, off) // it was not for us; now it is
		}
		failed = err
	}
	return failed
}

// again fetches for a reader what a flight ahead of need failed to bring.
func (o *object) again(ctx context.Context, f *flight, p []byte, off int64) error {
	c := o.s.c
	from, to := max(off, f.off), min(off+int64(len(p)), f.off+f.n)
	more, _, err := o.s.fly(o, c.lineAt(from), c.lineAt(to-1)-c.lineAt(from)+1, f.scan, true, true)
	for _, f := range more {
		err = errors.Join(err, o.s.await(ctx, f, p, off))
	}
	return err
}

// exact tells whether to fetch just the bytes asked for.
func (o *object) exact(line uint32, from, to int64, h Hint) bool {
	c := o.s.c
	if c.ram == nil && !c.ssd.on() {
		return true
	}
	return to-from <= c.line/2 && !h.Sequential && c.wasteful.Load() && !c.seenLately(o.hash.print(line))
}

// readExact reads from the backend and keeps nothing.
func (o *object) readExact(ctx context.Context, p []byte, off int64) error {
	c := o.s.c
	select {
	case c.demand <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-c.demand }()
	inner, err := o.open(ctx)
	if err == nil {
		c.exact.Add(1)
		c.fetches.Add(1)
		err = inner.ReadAt(ctx, p, off)
	}
	if err != nil {
		c.fetchErrors.Add(1)
		return err
	}
	c.fetched.Add(int64(len(p)))
	c.judgeUse(int64(len(p)), 0)
	return nil
}

// promote copies a line that is used again from the SSD to RAM.
func (o *object) promote(line uint32) {
	c := o.s.c
	if c.ram == nil {
		return
	}
	f := new(flight)
	f.refs.Store(1)
	defer f.release()
	start := int64(line) * c.line
	f.getBuffer(int(min(c.line, o.size-start)))
	if ok, _, _ := c.ssd.read(o.id, o.hash, line, 0, f.buf, true, false); ok {
		c.ram.put(o.id, line, o.hash.print(line), f.buf, false)
	}
}

// Discard implements Discarder.
func (o *object) Discard(off, n int64) {
	if off < 0 || n <= 0 || off >= o.size {
		return
	}
	c := o.s.c
	for line := c.lineAt(off); int64(line)*c.line < min(off+n, o.size); line++ {
		key := keyOf(o.id, line)
		if o.s.cached(o, line) {
			c.discarded.Add(1)
		}
		c.ram.drop(key, false)
		c.ssd.drop(key)
	}
}
