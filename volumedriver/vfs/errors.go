package vfs

import (
	"io"
	"io/fs"
	"os"
	"slices"
	"sync"
	"time"
)

// Errors passes calls on to another file system, apart from those that an injected Fault spoils.
//
// To fail each call of some work once:
//
//	for n := int64(1); ; n++ {
//		e := NewErrors(fresh())
//		hit := e.Inject(Fault{Op: OpWrite | OpSync, From: n, Times: 1, Err: syscall.EIO})
//		work(e) // must fail cleanly
//		if hit.Fired() == 0 {
//			break
//		}
//	}
type Errors struct {
	inner FS

	mu     sync.Mutex
	faults []*Injected
}

// Fault says which calls to spoil, and how. The calls that match Op and Path are counted from Inject on.
type Fault struct {
	Op    Op     // set of calls; 0 for all
	Path  string // pattern as for Mem.LieSync: "" all, "name", "/whole/path*", "/dir/**"
	From  int64  // the first call to spoil; 0 and 1 are the first that matches
	Times int64  // how many calls to spoil; 0 for all further ones

	Delay time.Duration // wait first
	Err   error         // fail with this, as a *fs.PathError
	After int           // with Err: transfer that many bytes of a read or write first
	Done  bool          // with Err: carry out the call all the same
	Flip  bool          // change one bit of what a read returns or a write stores
	Drop  bool          // claim that the call was carried out; a read leaves its buffer as it was
	Shift int64         // add to the offset of a read or write
}

// Injected is a fault in effect.
type Injected struct {
	e     *Errors
	f     Fault
	seen  int64
	fired int64
}

// NewErrors wraps inner; without faults all calls go through.
func NewErrors(inner FS) *Errors { return &Errors{inner: inner} }

// Inject adds a fault. Faults are tried in order; the first that spoils a call is the only one to do so.
func (e *Errors) Inject(f Fault) *Injected {
	if f.Op == 0 {
		f.Op = OpAny
	}
	if f.From == 0 {
		f.From = 1
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	i := &Injected{e: e, f: f}
	e.faults = append(e.faults, i)
	return i
}

// Seen is the number of calls that matched.
func (i *Injected) Seen() int64 {
	i.e.mu.Lock()
	defer i.e.mu.Unlock()
	return i.seen
}

// Fired is the number of calls that were spoiled.
func (i *Injected) Fired() int64 {
	i.e.mu.Lock()
	defer i.e.mu.Unlock()
	return i.fired
}

// Remove ends the fault.
func (i *Injected) Remove() {
	i.e.mu.Lock()
	defer i.e.mu.Unlock()
	i.e.faults = slices.DeleteFunc(i.e.faults, func(o *Injected) bool { return o == i })
}

// verdict is what happens to one call.
type verdict struct {
	Fault
	nth int64 // which matching call it is
}

// spoils tells whether to skip the call.
func (v verdict) spoils() bool { return v.Drop || v.Err != nil && !v.Done }

func (e *Errors) judge(op Op, name string) verdict {
	e.mu.Lock()
	var v verdict
	for _, i := range e.faults {
		if i.f.Op&op == 0 || !matchPath(i.f.Path, name) {
			continue
		}
		i.seen++
		if v.nth == 0 && i.seen >= i.f.From && (i.f.Times == 0 || i.seen < i.f.From+i.f.Times) {
			i.fired++
			v = verdict{i.f, i.seen}
		}
	}
	e.mu.Unlock()
	if v.Delay > 0 {
		time.Sleep(v.Delay)
	}
	if v.Err != nil {
		v.Err = &fs.PathError{Op: op.String(), Path: name, Err: v.Err}
	}
	return v
}

// do carries out a call that only has an error for a result.
func (e *Errors) do(op Op, name string, call func() error) error {
	v := e.judge(op, name)
	if v.spoils() {
		return v.Err
	}
	if err := call(); err != nil {
		return err
	}
	return v.Err
}

func (e *Errors) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	op := OpOpen
	if flag&os.O_CREATE != 0 {
		op = OpCreate
	} else if flag&os.O_TRUNC != 0 {
		op = OpTruncate
	}
	var f File
	err := e.do(op, name, func() (err error) {
		f, err = e.inner.OpenFile(name, flag, perm)
		return err
	})
	switch {
	case err != nil && f != nil:
		_ = f.Close() // the call was carried out, but its caller is told that it failed
		return nil, err
	case err != nil:
		return nil, err
	case f == nil: // dropped: there is no file that could be claimed to be open
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	return &errorsFile{e: e, f: f, name: name}, nil
}

func (e *Errors) MkdirAll(name string, perm fs.FileMode) error {
	return e.do(OpMkdir, name, func() error { return e.inner.MkdirAll(name, perm) })
}

func (e *Errors) Remove(name string) error {
	return e.do(OpRemove, name, func() error { return e.inner.Remove(name) })
}

func (e *Errors) RemoveAll(name string) error {
	return e.do(OpRemove, name, func() error { return e.inner.RemoveAll(name) })
}

func (e *Errors) Rename(from, to string) error {
	return e.do(OpRename, to, func() error { return e.inner.Rename(from, to) })
}

func (e *Errors) Link(from, to string) error {
	return e.do(OpLink, to, func() error { return e.inner.Link(from, to) })
}

func (e *Errors) SyncDir(name string) error {
	return e.do(OpSyncDir, name, func() error { return e.inner.SyncDir(name) })
}

func (e *Errors) ReadDir(name string) (names []string, err error) {
	err = e.do(OpReadDir, name, func() (err error) {
		names, err = e.inner.ReadDir(name)
		return err
	})
	return names, err
}

func (e *Errors) Stat(name string) (fi fs.FileInfo, err error) {
	if v := e.judge(OpStat, name); v.Err != nil {
		return nil, v.Err
	}
	return e.inner.Stat(name)
}

func (e *Errors) Lock(name string) (io.Closer, error) {
	if v := e.judge(OpLock, name); v.Err != nil {
		return nil, v.Err
	}
	return e.inner.Lock(name)
}

func (e *Errors) Space(name string) (total, available uint64, err error) {
	err = e.do(OpSpace, name, func() (err error) {
		total, available, err = e.inner.Space(name)
		return err
	})
	return total, available, err
}

type errorsFile struct {
	e    *Errors
	f    File
	name string
}

func (f *errorsFile) ReadAt(p []byte, off int64) (int, error) {
	v := f.e.judge(OpRead, f.name)
	switch {
	case v.Drop:
		return len(p), nil
	case v.Err != nil && !v.Done:
		n, err := f.f.ReadAt(p[:min(v.After, len(p))], off)
		if err != nil {
			return n, err
		}
		return n, v.Err
	}
	n, err := f.f.ReadAt(p, off+v.Shift)
	if v.Flip {
		flipBit(p[:n], v.nth)
	}
	if err == nil {
		err = v.Err
	}
	return n, err
}

func (f *errorsFile) TryReadAt(p []byte, off int64) error {
	v := f.e.judge(OpTryRead, f.name)
	if v.spoils() {
		return v.unwrapped()
	}
	if err := f.f.TryReadAt(p, off+v.Shift); err != nil {
		return err
	}
	if v.Flip {
		flipBit(p, v.nth)
	}
	return v.unwrapped()
}

// unwrapped gives ErrWouldBlock bare, as TryReadAt returns it.
func (v verdict) unwrapped() error {
	if pe, ok := v.Err.(*fs.PathError); ok && pe.Err == ErrWouldBlock {
		return ErrWouldBlock
	}
	return v.Err
}

func (f *errorsFile) WriteAt(p []byte, off int64) (int, error) {
	return f.WritevAt([][]byte{p}, off)
}

func (f *errorsFile) WritevAt(bufs [][]byte, off int64) (int, error) {
	v := f.e.judge(OpWrite, f.name)
	total := 0
	for _, b := range bufs {
		total += len(b)
	}
	if v.Drop {
		return total, nil
	}
	if v.Err != nil && !v.Done {
		n, err := f.f.WritevAt([][]byte{slices.Concat(bufs...)[:min(v.After, total)]}, off)
		if err != nil {
			return n, err
		}
		return n, v.Err
	}
	if v.Flip {
		flipped := slices.Concat(bufs...)
		flipBit(flipped, v.nth)
		bufs = [][]byte{flipped}
	}
	n, err := f.f.WritevAt(bufs, off+v.Shift)
	if err == nil {
		err = v.Err
	}
	return n, err
}

// flipBit changes one bit of p, another one for each call.
func flipBit(p []byte, nth int64) {
	if len(p) > 0 {
		bit := mix(uint64(nth), uint64(len(p)), 0) % uint64(len(p)*8)
		p[bit/8] ^= 1 << (bit % 8)
	}
}

func (f *errorsFile) Sync() error     { return f.e.do(OpSync, f.name, f.f.Sync) }
func (f *errorsFile) Datasync() error { return f.e.do(OpDatasync, f.name, f.f.Datasync) }

// Close closes the file in any case, as close(2) does.
func (f *errorsFile) Close() error {
	v := f.e.judge(OpClose, f.name)
	if err := f.f.Close(); err != nil {
		return err
	}
	return v.Err
}

func (f *errorsFile) Truncate(size int64) error {
	return f.e.do(OpTruncate, f.name, func() error { return f.f.Truncate(size) })
}

func (f *errorsFile) Preallocate(size int64) error {
	return f.e.do(OpPreallocate, f.name, func() error { return f.f.Preallocate(size) })
}

func (f *errorsFile) Size() (int64, error) {
	if v := f.e.judge(OpStat, f.name); v.Err != nil {
		return 0, v.Err
	}
	return f.f.Size()
}
