package vfs

import (
	"errors"
	"io"
	"io/fs"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// directAlign is what the addresses, offsets and lengths of direct writes are multiples of. Every device in use takes 4 KiB.
const directAlign = 4096

// bounceBytes is how much is gathered for one direct write of memory that is not aligned.
const bounceBytes = 1 << 20

// bounces are aligned: the allocator gives pieces of this size whole pages, which TestWriteDirect checks.
var bounces = sync.Pool{New: func() any { return new([bounceBytes]byte) }}

// errNotDirect: the file system or the device does not take the write as a direct one.
var errNotDirect = errors.New("no direct write")

// WriteDirect implements DirectWriter with O_DIRECT for all whole blocks from an aligned offset on; what is left is written
// through the page cache, and so is everything where the file system has no such thing.
func (f *osFile) WriteDirect(bufs [][]byte, off int64) (int, error) {
	done, err := f.writeAligned(bufs, off)
	if err != nil && !errors.Is(err, errNotDirect) {
		return done, err
	}
	rest := make([][]byte, 0, len(bufs))
	skip := done
	for _, b := range bufs {
		n := min(skip, len(b))
		skip -= n
		if n < len(b) {
			rest = append(rest, b[n:])
		}
	}
	n, err := f.WritevAt(rest, off+int64(done))
	return done + n, err
}

// writeAligned writes as many whole blocks as there are, and tells how many bytes that were. The descriptor must not be in
// use for other writes meanwhile that need the page cache.
func (f *osFile) writeAligned(bufs [][]byte, off int64) (done int, err error) {
	if off%directAlign != 0 {
		return 0, nil
	}
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.closed {
		return 0, f.fail("write", fs.ErrClosed)
	}
	if err := f.setDirect(true); err != nil {
		return 0, errNotDirect
	}
	defer func() {
		if cerr := f.setDirect(false); cerr != nil && (err == nil || errors.Is(err, errNotDirect)) {
			err = f.fail("end direct writes", cerr)
		}
	}()
	bounce := bounces.Get().(*[bounceBytes]byte)
	defer bounces.Put(bounce)
	held := 0 // bytes in bounce
	flush := func() error {
		whole := held &^ (directAlign - 1)
		if err := f.pwriteDirect(bounce[:whole], off+int64(done)); err != nil {
			return err
		}
		done += whole
		held = copy(bounce[:], bounce[whole:held])
		return nil
	}
	for _, b := range bufs {
		for len(b) > 0 {
			if held == 0 && len(b) >= directAlign && uintptr(unsafe.Pointer(unsafe.SliceData(b)))%directAlign == 0 {
				whole := len(b) &^ (directAlign - 1)
				if err := f.pwriteDirect(b[:whole], off+int64(done)); err != nil {
					return done, err
				}
				done += whole
				b = b[whole:]
				continue
			}
			n := copy(bounce[held:], b)
			held, b = held+n, b[n:]
			if held == bounceBytes || held%directAlign == 0 && len(b) == 0 {
				if err := flush(); err != nil {
					return done, err
				}
			}
		}
	}
	return done, flush()
}

// pwriteDirect writes all of p. A refusal of the first bytes for their alignment is errNotDirect.
func (f *osFile) pwriteDirect(p []byte, off int64) error {
	for len(p) > 0 {
		n, err := unix.Pwrite(f.fd, p, off)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EINVAL || err == unix.EOPNOTSUPP:
			return errNotDirect
		case err != nil:
			return f.fail("write", err)
		case n == 0:
			return f.fail("write", io.ErrShortWrite)
		}
		p, off = p[n:], off+int64(n)
		if n%directAlign != 0 {
			return errNotDirect // the page cache takes the rest of the block
		}
	}
	return nil
}

func (f *osFile) setDirect(on bool) error {
	flags, err := unix.FcntlInt(uintptr(f.fd), syscall.F_GETFL, 0)
	if err != nil {
		return err
	}
	want := flags &^ unix.O_DIRECT
	if on {
		want |= unix.O_DIRECT
	}
	if want == flags {
		return nil
	}
	_, err = unix.FcntlInt(uintptr(f.fd), syscall.F_SETFL, want)
	return err
}
