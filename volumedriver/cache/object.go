package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"

	"varve/volumedriver/backend"
	"varve/volumedriver/vfs"
)

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
	inner   atomic.Pointer[opened]
}

// open gives the backend's object, opened when it is first needed.
func (o *object) open(ctx context.Context) (backend.Object, error) {
	if in := o.inner.Load(); in != nil {
		return in.inner, nil
	}
	select {
	case o.opening <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	defer func() { <-o.opening }()
	if in := o.inner.Load(); in != nil {
		return in.inner, nil
	}
	if in := o.s.use(o.id); in != nil {
		o.inner.Store(in)
		return in.inner, nil
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
	in := o.s.share(o.id, inner)
	o.inner.Store(in)
	return in.inner, nil
}

func (o *object) retain() { o.refs.Add(1) }

func (o *object) release() error {
	if o.refs.Add(-1) > 0 {
		return nil
	}
	defer o.s.c.reg.close(o.id)
	if in := o.inner.Load(); in != nil {
		return o.s.unuse(in)
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
	if h.Beyond > 0 && o.s.c.cfg.Successor != nil {
		if next := o.s.c.cfg.Successor(o.name); next != "" {
			o.s.prefetch(next, 0, min(h.Beyond, o.s.c.windowBytes()), h.Scan)
		}
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
