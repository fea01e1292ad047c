package blockmap

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"sync/atomic"

	"varve/volumedriver/vfs"
)

// frozenFS is what stands between Pebble and the disk. Pebble panics, hangs or ends the process when a write fails. So a
// failed write is not shown to it: from the first failure on, nothing more is written, the disk stays as a power cut at that
// moment would have left it, and Pebble is told that all is well. The store has failed by then and confirms nothing more.
type frozenFS struct {
	vfs.FS
	frozen atomic.Bool
	fail   func(error) error
}

// do carries out a call that changes the disk, unless frozen.
func (f *frozenFS) do(call func() error) error {
	if f.frozen.Load() {
		return nil
	}
	err := call()
	if err == nil || errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrExist) {
		return err // an answer, not a failure
	}
	f.fail(err) // first: whoever finds it frozen must also find the store failed
	f.frozen.Store(true)
	return nil
}

func (f *frozenFS) OpenFile(path string, flag int, perm fs.FileMode) (vfs.File, error) {
	if flag&(os.O_CREATE|os.O_TRUNC|os.O_RDWR|os.O_WRONLY) == 0 {
		file, err := f.FS.OpenFile(path, flag, perm)
		if err != nil {
			return nil, err
		}
		return &frozenFile{file, f}, nil
	}
	var file vfs.File
	err := f.do(func() (err error) {
		file, err = f.FS.OpenFile(path, flag, perm)
		return err
	})
	if err != nil {
		return nil, err
	}
	if file == nil {
		file = noFile{}
	}
	return &frozenFile{file, f}, nil
}

func (f *frozenFS) MkdirAll(path string, perm fs.FileMode) error {
	return f.do(func() error { return f.FS.MkdirAll(path, perm) })
}
func (f *frozenFS) Remove(path string) error { return f.do(func() error { return f.FS.Remove(path) }) }
func (f *frozenFS) RemoveAll(path string) error {
	return f.do(func() error { return f.FS.RemoveAll(path) })
}
func (f *frozenFS) Rename(from, to string) error {
	return f.do(func() error { return f.FS.Rename(from, to) })
}
func (f *frozenFS) Link(from, to string) error {
	return f.do(func() error { return f.FS.Link(from, to) })
}
func (f *frozenFS) SyncDir(path string) error {
	return f.do(func() error { return f.FS.SyncDir(path) })
}

type frozenFile struct {
	vfs.File
	f *frozenFS
}

func (f *frozenFile) WriteAt(p []byte, off int64) (int, error) {
	return len(p), f.f.do(func() error { _, err := f.File.WriteAt(p, off); return err })
}

func (f *frozenFile) WritevAt(bufs [][]byte, off int64) (int, error) {
	n := 0
	for _, b := range bufs {
		n += len(b)
	}
	return n, f.f.do(func() error { _, err := f.File.WritevAt(bufs, off); return err })
}

func (f *frozenFile) Sync() error     { return f.f.do(f.File.Sync) }
func (f *frozenFile) Datasync() error { return f.f.do(f.File.Datasync) }
func (f *frozenFile) Truncate(size int64) error {
	return f.f.do(func() error { return f.File.Truncate(size) })
}

// Close closes the file even when frozen.
func (f *frozenFile) Close() error {
	if err := f.File.Close(); err != nil {
		return f.f.do(func() error { return err })
	}
	return nil
}

func (f *frozenFile) Preallocate(size int64) error {
	return f.f.do(func() error { return f.File.Preallocate(size) })
}

// noFile stands for a file that was not created any more.
type noFile struct{ vfs.File }

func (noFile) ReadAt([]byte, int64) (int, error) { return 0, io.EOF }
func (noFile) TryReadAt([]byte, int64) error     { return io.EOF }
func (noFile) Size() (int64, error)              { return 0, nil }
func (noFile) Close() error                      { return nil }
