package vfs

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// OS returns the file system of the operating system.
func OS() FS { return osFS{} }

type osFS struct{}

func (osFS) OpenFile(path string, flag int, perm fs.FileMode) (File, error) {
	f, err := os.OpenFile(path, flag, perm)
	if err != nil {
		return nil, err
	}
	return &osFile{f: f, fd: int(f.Fd())}, nil
}

func (osFS) MkdirAll(path string, perm fs.FileMode) error { return os.MkdirAll(path, perm) }
func (osFS) Remove(path string) error                     { return os.Remove(path) }
func (osFS) RemoveAll(path string) error                  { return os.RemoveAll(path) }
func (osFS) Rename(from, to string) error                 { return os.Rename(from, to) }
func (osFS) Link(from, to string) error                   { return os.Link(from, to) }
func (osFS) Stat(path string) (fs.FileInfo, error)        { return os.Stat(path) }

func (osFS) ReadDir(path string) ([]string, error) {
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil, err
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, nil
}

func (osFS) SyncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	err = d.Sync()
	if errors.Is(err, unix.EINVAL) && readOnly(d) {
		err = nil // an appliance's root: no change is there that could get lost, and no way to sync
	}
	return errors.Join(err, d.Close())
}

func readOnly(f *os.File) bool {
	var st unix.Statfs_t
	err := ignoringEINTR(func() error { return unix.Fstatfs(int(f.Fd()), &st) })
	return err == nil && st.Flags&unix.ST_RDONLY != 0
}

func (osFS) Lock(path string) (io.Closer, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	err = ignoringEINTR(func() error { return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) })
	if err != nil {
		return nil, errors.Join(&fs.PathError{Op: "lock", Path: path, Err: err}, f.Close())
	}
	return f, nil
}

func (osFS) Space(path string) (total, available uint64, err error) {
	var st unix.Statfs_t
	if err := ignoringEINTR(func() error { return unix.Statfs(path, &st) }); err != nil {
		return 0, 0, &fs.PathError{Op: "statfs", Path: path, Err: err}
	}
	unit := uint64(st.Frsize)
	if unit == 0 {
		unit = uint64(st.Bsize)
	}
	return st.Blocks * unit, st.Bavail * unit, nil
}

// osFile is an open file. Its own system calls hold mu shared, and Close holds it alone, so that a descriptor number that
// the kernel gave to another file after Close is never read or written.
type osFile struct {
	f  *os.File
	fd int

	mu     sync.RWMutex
	closed bool

	blocking atomic.Bool // the file system does not know RWF_NOWAIT
}

func (f *osFile) ReadAt(p []byte, off int64) (int, error)  { return f.f.ReadAt(p, off) }
func (f *osFile) WriteAt(p []byte, off int64) (int, error) { return f.f.WriteAt(p, off) }
func (f *osFile) Sync() error                              { return f.f.Sync() }
func (f *osFile) Truncate(size int64) error                { return f.f.Truncate(size) }

func (f *osFile) Size() (int64, error) {
	fi, err := f.f.Stat()
	if err != nil {
		return 0, err
	}
	return fi.Size(), nil
}

func (f *osFile) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	return f.f.Close()
}

func (f *osFile) fail(op string, err error) error {
	return &fs.PathError{Op: op, Path: f.f.Name(), Err: err}
}

// TryReadAt asks preadv2 for what is in the page cache. A short answer means that the rest is not, or is beyond the end of
// the file; ReadAt tells which.
func (f *osFile) TryReadAt(p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	if f.blocking.Load() {
		return ErrWouldBlock
	}
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.closed {
		return f.fail("read", fs.ErrClosed)
	}
	for {
		n, errno := preadNowait(f.fd, p, off)
		switch errno {
		case 0:
			if n == len(p) {
				return nil
			}
			if n == 0 {
				return io.EOF
			}
			return ErrWouldBlock
		case unix.EINTR:
		case unix.EAGAIN:
			return ErrWouldBlock
		case unix.EOPNOTSUPP, unix.ENOSYS, unix.EINVAL:
			f.blocking.Store(true)
			return ErrWouldBlock
		default:
			return f.fail("read", errno)
		}
	}
}

// preadNowait is unix.Preadv2 for one buffer, without its allocation.
func preadNowait(fd int, p []byte, off int64) (int, syscall.Errno) {
	iov := unix.Iovec{Base: unsafe.SliceData(p)}
	iov.SetLen(len(p))
	n, _, errno := unix.Syscall6(unix.SYS_PREADV2, uintptr(fd), uintptr(unsafe.Pointer(&iov)), 1,
		uintptr(off), uintptr(uint64(off)>>32), unix.RWF_NOWAIT)
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

// iovMax is the kernel's UIO_MAXIOV: more buffers than this go in several calls.
const iovMax = 1024

var iovecPool = sync.Pool{New: func() any { s := make([]unix.Iovec, 0, 64); return &s }}

func (f *osFile) WritevAt(bufs [][]byte, off int64) (int, error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.closed {
		return 0, f.fail("write", fs.ErrClosed)
	}
	iov := iovecPool.Get().(*[]unix.Iovec)
	defer func() {
		clear((*iov)[:cap(*iov)])
		iovecPool.Put(iov)
	}()
	total, skip := 0, 0 // skip bytes of bufs[0] are written
	for {
		*iov = (*iov)[:0]
		for i, b := range bufs {
			if i == 0 {
				b = b[skip:]
			}
			if len(b) == 0 {
				continue
			}
			if len(*iov) == iovMax {
				break
			}
			v := unix.Iovec{Base: unsafe.SliceData(b)}
			v.SetLen(len(b))
			*iov = append(*iov, v)
		}
		if len(*iov) == 0 {
			return total, nil
		}
		n, errno := pwritev(f.fd, *iov, off)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return total, f.fail("write", errno)
		}
		if n == 0 {
			return total, f.fail("write", io.ErrShortWrite)
		}
		total += n
		off += int64(n)
		for n += skip; len(bufs) > 0 && n >= len(bufs[0]); bufs = bufs[1:] {
			n -= len(bufs[0])
		}
		skip = n
	}
}

func pwritev(fd int, iov []unix.Iovec, off int64) (int, syscall.Errno) {
	n, _, errno := unix.Syscall6(unix.SYS_PWRITEV, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(iov))), uintptr(len(iov)),
		uintptr(off), uintptr(uint64(off)>>32), 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

// DropCache implements CacheDropper.
func (f *osFile) DropCache() {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if !f.closed {
		_ = unix.Fadvise(f.fd, 0, 0, unix.FADV_DONTNEED) // a hint
	}
}

// StartWrite implements WriteStarter. Without the flags that wait, sync_file_range does not take note of an error in the
// descriptor's stead.
func (f *osFile) StartWrite(off, n int64) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if !f.closed {
		_ = unix.SyncFileRange(f.fd, off, n, unix.SYNC_FILE_RANGE_WRITE) // a hint
	}
}

func (f *osFile) Datasync() error {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.closed {
		return f.fail("fdatasync", fs.ErrClosed)
	}
	// EINTR says that the call was not carried out; any other failure is final.
	if err := ignoringEINTR(func() error { return unix.Fdatasync(f.fd) }); err != nil {
		return f.fail("fdatasync", err)
	}
	return nil
}

// Preallocate keeps the file's size. Where the file system cannot reserve, it does nothing: the space is then found, or not, by
// the writes.
func (f *osFile) Preallocate(size int64) error {
	if size <= 0 {
		return nil
	}
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.closed {
		return f.fail("fallocate", fs.ErrClosed)
	}
	err := ignoringEINTR(func() error { return unix.Fallocate(f.fd, unix.FALLOC_FL_KEEP_SIZE, 0, size) })
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		return nil
	}
	if err != nil {
		return f.fail(fmt.Sprintf("fallocate %d bytes", size), err)
	}
	return nil
}

func ignoringEINTR(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}

// BootID tells one boot of this machine from the next. If the kernel does not say, every call counts as another boot.
func BootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return rand.Text()
	}
	return strings.TrimSpace(string(b))
}
