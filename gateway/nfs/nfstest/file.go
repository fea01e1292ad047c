package nfstest

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"varve/volumedriver/blockio"
)

const pageBytes = 64 << 10

// Behaviour changes how files behave. The zero value never waits and completes inside Kick.
type Behaviour struct {
	// Busy makes every Try method answer blockio.ErrBusy.
	Busy atomic.Bool
	// Background makes Kick complete requests from another goroutine.
	Background atomic.Bool
	// Delay is how long the blocking methods, and completions in the background, take: a time.Duration.
	Delay atomic.Int64
	// Hold, if it holds a channel, makes blocking methods wait until the channel is closed.
	Hold atomic.Pointer[chan struct{}]
	// HoldNames does the same to whatever changes names.
	HoldNames atomic.Pointer[chan struct{}]
	// Lie makes files claim durability without giving it.
	Lie atomic.Bool
	// Fail, if it holds an error, is how every write and flush ends.
	Fail atomic.Pointer[error]
	// Flushes, Kicks (of all kinds) and KickSyncs count.
	Flushes, Kicks, KickSyncs atomic.Int64
}

// File is a sparse file in memory in two versions: what reads see, and what would survive a power cut.
type File struct {
	n *Namespace

	mu      sync.Mutex
	live    image
	durable image
	dirty   map[int64]struct{} // pages that differ
	mtime   time.Time
	set     bool // mtime was set by hand after the last write
	queue   []request
}

type image struct {
	size  int64
	pages map[int64]*[pageBytes]byte
}

type request struct {
	c   blockio.Completer
	tag uint64
	run func() error
}

func newFile(n *Namespace) *File {
	return &File{n: n, dirty: make(map[int64]struct{}),
		live: image{pages: make(map[int64]*[pageBytes]byte)}, durable: image{pages: make(map[int64]*[pageBytes]byte)}}
}

func (m *image) write(p []byte, off int64) {
	m.size = max(m.size, off+int64(len(p)))
	for len(p) > 0 {
		number, at := off/pageBytes, off%pageBytes
		page := m.pages[number]
		if page == nil {
			page = new([pageBytes]byte)
			m.pages[number] = page
		}
		k := copy(page[at:], p)
		p, off = p[k:], off+int64(k)
	}
}

func (m *image) read(p []byte, off int64) {
	for len(p) > 0 {
		number, at := off/pageBytes, off%pageBytes
		k := min(len(p), int(pageBytes-at))
		if page := m.pages[number]; page != nil {
			copy(p[:k], page[at:])
		} else {
			clear(p[:k])
		}
		p, off = p[k:], off+int64(k)
	}
}

func (m *image) truncate(size int64) {
	if size < m.size {
		for number, page := range m.pages {
			switch start := number * pageBytes; {
			case start >= size:
				delete(m.pages, number)
			case start+pageBytes > size:
				clear(page[size-start:])
			}
		}
	}
	m.size = size
}

func (f *File) state() (size, used int64, mtime time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.live.size, int64(len(f.live.pages)) * pageBytes, f.mtime
}

func (f *File) timeSet() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.set
}

func (f *File) setTime() {
	f.mu.Lock()
	f.set = true
	f.mu.Unlock()
}

func (f *File) resize(size int64, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.live.truncate(size)
	f.syncLocked()
	f.durable.truncate(size)
	f.mtime, f.set = now, false
}

func (f *File) syncLocked() {
	for number := range f.dirty {
		if page := f.live.pages[number]; page != nil {
			saved := *page
			f.durable.pages[number] = &saved
		}
	}
	clear(f.dirty)
	f.durable.size = f.live.size
}

func (f *File) crash() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for number := range f.dirty {
		if page := f.durable.pages[number]; page != nil {
			back := *page
			f.live.pages[number] = &back
		} else {
			delete(f.live.pages, number)
		}
	}
	clear(f.dirty)
	f.live.size = f.durable.size
}

// Bytes returns the file's content.
func (f *File) Bytes() []byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	b := make([]byte, f.live.size)
	f.live.read(b, 0)
	return b
}

func (f *File) write(p []byte, off int64, flags blockio.Flags) error {
	if fail := f.n.Behave.Fail.Load(); fail != nil {
		return *fail
	}
	now := f.n.now()
	f.mu.Lock()
	defer f.mu.Unlock()
	if flags&blockio.Extend == 0 && off+int64(len(p)) > f.live.size {
		return blockio.ErrBeyondEnd
	}
	f.live.write(p, off)
	if flags&blockio.FUA != 0 && !f.n.Behave.Lie.Load() {
		f.durable.write(p, off)
	} else {
		for number := off / pageBytes; number*pageBytes < off+int64(len(p)); number++ {
			f.dirty[number] = struct{}{}
		}
	}
	f.mtime, f.set = now, false
	return nil
}

func (f *File) read(p []byte, off int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if off+int64(len(p)) > f.live.size {
		return blockio.ErrBeyondEnd
	}
	f.live.read(p, off)
	return nil
}

// flush makes everything written so far durable.
func (f *File) flush() error {
	f.n.Behave.Flushes.Add(1)
	if fail := f.n.Behave.Fail.Load(); fail != nil {
		return *fail
	}
	if f.n.Behave.Lie.Load() {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.syncLocked()
	return nil
}

// TryRead implements nfs.File.
func (f *File) TryRead(p []byte, off int64) error {
	if f.n.Behave.Busy.Load() {
		return blockio.ErrBusy
	}
	return f.read(p, off)
}

func (f *File) submit(r request) error {
	if f.n.Behave.Busy.Load() {
		return blockio.ErrBusy
	}
	f.mu.Lock()
	f.queue = append(f.queue, r)
	f.mu.Unlock()
	return nil
}

// TryWrite implements nfs.File.
func (f *File) TryWrite(p []byte, off int64, flags blockio.Flags, c blockio.Completer, tag uint64) error {
	p = append([]byte(nil), p...)
	return f.submit(request{c, tag, func() error { return f.write(p, off, flags) }})
}

// TryFlush implements nfs.File.
func (f *File) TryFlush(c blockio.Completer, tag uint64) error {
	return f.submit(request{c, tag, f.flush})
}

// Kick implements nfs.File.
func (f *File) Kick() {
	f.n.Behave.Kicks.Add(1)
	f.mu.Lock()
	queue := f.queue
	f.queue = nil
	f.mu.Unlock()
	complete := func() {
		told := make(map[blockio.Completer]struct{})
		for _, r := range queue {
			r.c.Done(r.tag, r.run())
			told[r.c] = struct{}{}
		}
		for c := range told {
			c.Settle(len(told) == 1)
		}
	}
	if f.n.Behave.Background.Load() {
		go func() { // ends with the delay; its completer waits for it
			f.wait(context.Background())
			complete()
		}()
		return
	}
	complete()
}

// KickSync implements nfs.File.
func (f *File) KickSync() {
	f.n.Behave.KickSyncs.Add(1)
	f.wait(context.Background())
	f.Kick()
}

// FlushInline implements nfs.File.
func (f *File) FlushInline() error { return f.flush() }

// await waits until the channel, if there is one, is closed.
func await(ctx context.Context, hold *atomic.Pointer[chan struct{}]) error {
	c := hold.Load()
	if c == nil {
		return nil
	}
	select {
	case <-*c:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (f *File) wait(ctx context.Context) error {
	if err := await(ctx, &f.n.Behave.Hold); err != nil {
		return err
	}
	if d := time.Duration(f.n.Behave.Delay.Load()); d > 0 {
		select {
		case <-time.After(d):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// Read implements nfs.File.
func (f *File) Read(ctx context.Context, p []byte, off int64) error {
	if err := f.wait(ctx); err != nil {
		return err
	}
	return f.read(p, off)
}

// Write implements nfs.File.
func (f *File) Write(ctx context.Context, p []byte, off int64, flags blockio.Flags) error {
	if err := f.wait(ctx); err != nil {
		return err
	}
	return f.write(p, off, flags)
}

// Flush implements nfs.File.
func (f *File) Flush(ctx context.Context) error {
	if err := f.wait(ctx); err != nil {
		return err
	}
	return f.flush()
}
