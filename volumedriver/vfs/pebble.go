package vfs

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"sync"

	pebblevfs "github.com/cockroachdb/pebble/v2/vfs"
)

// Pebble lets a Pebble store work on fsys, so that power cuts and failing calls reach it too. The store's paths are below root.
func Pebble(fsys FS, root string) pebblevfs.FS { return pebbleFS{fsys, root} }

type pebbleFS struct {
	fs   FS
	root string
}

func (p pebbleFS) at(name string) string { return path.Join(p.root, path.Clean("/"+name)) }

func (p pebbleFS) open(name string, flag int, opts []pebblevfs.OpenOption) (pebblevfs.File, error) {
	full := p.at(name)
	f, err := p.fs.OpenFile(full, flag, 0o600)
	if err != nil {
		return nil, err
	}
	pf := &pebbleFile{f: f, name: full}
	for _, o := range opts {
		o.Apply(pf)
	}
	return pf, nil
}

// Create must give a new file, never a truncated old one that may have another name.
//
// A marker (package atomicfs) says which manifest counts. Pebble makes the manifest, makes the marker, removes the old marker,
// and only then syncs the directory. That relies on a file system that makes changes of names durable in order. Ours may be
// one that doesn't, so the manifest's name is made durable before the marker's, and the marker's before the old one goes.
func (p pebbleFS) Create(name string, _ pebblevfs.DiskWriteCategory) (pebblevfs.File, error) {
	if !strings.HasPrefix(path.Base(name), "marker.") {
		return p.create(name)
	}
	dir := path.Dir(p.at(name))
	if err := p.fs.SyncDir(dir); err != nil {
		return nil, err
	}
	f, err := p.create(name)
	if err != nil {
		return nil, err
	}
	if err := p.fs.SyncDir(dir); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func (p pebbleFS) create(name string) (pebblevfs.File, error) {
	for {
		f, err := p.open(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, nil)
		if !errors.Is(err, fs.ErrExist) {
			return f, err
		}
		if err := p.fs.Remove(p.at(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
}

func (p pebbleFS) Open(name string, opts ...pebblevfs.OpenOption) (pebblevfs.File, error) {
	return p.open(name, os.O_RDONLY, opts)
}

func (p pebbleFS) OpenReadWrite(name string, _ pebblevfs.DiskWriteCategory, opts ...pebblevfs.OpenOption) (pebblevfs.File, error) {
	return p.open(name, os.O_RDWR|os.O_CREATE, opts)
}

func (p pebbleFS) OpenDir(name string) (pebblevfs.File, error) {
	full := p.at(name)
	fi, err := p.fs.Stat(full)
	if err != nil {
		return nil, err
	}
	if !fi.IsDir() {
		return nil, &fs.PathError{Op: "opendir", Path: full, Err: fs.ErrInvalid}
	}
	return &pebbleDir{fs: p.fs, name: full}, nil
}

func (p pebbleFS) ReuseForWrite(from, to string, c pebblevfs.DiskWriteCategory) (pebblevfs.File, error) {
	if err := p.Rename(from, to); err != nil {
		return nil, err
	}
	return p.open(to, os.O_RDWR, nil)
}

func (p pebbleFS) Link(from, to string) error   { return p.fs.Link(p.at(from), p.at(to)) }
func (p pebbleFS) Remove(name string) error     { return p.fs.Remove(p.at(name)) }
func (p pebbleFS) RemoveAll(name string) error  { return p.fs.RemoveAll(p.at(name)) }
func (p pebbleFS) Rename(from, to string) error { return p.fs.Rename(p.at(from), p.at(to)) }
func (p pebbleFS) MkdirAll(name string, perm os.FileMode) error {
	return p.fs.MkdirAll(p.at(name), perm)
}
func (p pebbleFS) Lock(name string) (io.Closer, error) { return p.fs.Lock(p.at(name)) }
func (p pebbleFS) List(name string) ([]string, error)  { return p.fs.ReadDir(p.at(name)) }
func (p pebbleFS) PathJoin(elem ...string) string      { return path.Join(elem...) }
func (p pebbleFS) PathBase(name string) string         { return path.Base(name) }
func (p pebbleFS) PathDir(name string) string          { return path.Dir(name) }
func (p pebbleFS) Unwrap() pebblevfs.FS                { return nil }

func (p pebbleFS) Stat(name string) (pebblevfs.FileInfo, error) {
	fi, err := p.fs.Stat(p.at(name))
	if err != nil {
		return nil, err
	}
	return pebbleInfo{fi}, nil
}

func (p pebbleFS) GetDiskUsage(name string) (pebblevfs.DiskUsage, error) {
	total, available, err := p.fs.Space(p.at(name))
	if err != nil {
		return pebblevfs.DiskUsage{}, err
	}
	return pebblevfs.DiskUsage{AvailBytes: available, TotalBytes: total, UsedBytes: total - available}, nil
}

// pebbleInfo adds the device, which this seam does not know: all files are on one.
type pebbleInfo struct{ fs.FileInfo }

func (pebbleInfo) DeviceID() pebblevfs.DeviceID { return pebblevfs.DeviceID{} }

// pebbleFile adds a position for sequential reads and writes.
type pebbleFile struct {
	f    File
	name string

	mu  sync.Mutex
	pos int64
}

func (f *pebbleFile) Read(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := f.f.ReadAt(b, f.pos)
	f.pos += int64(n)
	if n > 0 && err == io.EOF {
		err = nil
	}
	return n, err
}

func (f *pebbleFile) Write(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := f.f.WriteAt(b, f.pos)
	f.pos += int64(n)
	return n, err
}

func (f *pebbleFile) ReadAt(b []byte, off int64) (int, error)  { return f.f.ReadAt(b, off) }
func (f *pebbleFile) WriteAt(b []byte, off int64) (int, error) { return f.f.WriteAt(b, off) }
func (f *pebbleFile) Close() error                             { return f.f.Close() }
func (f *pebbleFile) Sync() error                              { return f.f.Sync() }
func (f *pebbleFile) SyncData() error                          { return f.f.Datasync() }
func (f *pebbleFile) Prefetch(int64, int64) error              { return nil }
func (f *pebbleFile) Fd() uintptr                              { return pebblevfs.InvalidFd }
func (f *pebbleFile) Preallocate(off, length int64) error      { return f.f.Preallocate(off + length) }

// SyncTo is only a hint to start writing back; there is no call for that here.
func (f *pebbleFile) SyncTo(int64) (fullSync bool, err error) { return false, nil }

func (f *pebbleFile) Stat() (pebblevfs.FileInfo, error) {
	size, err := f.f.Size()
	if err != nil {
		return nil, err
	}
	return pebbleInfo{memInfo{name: path.Base(f.name), size: size, mode: 0o600}}, nil
}

// pebbleDir is a directory opened to be synced.
type pebbleDir struct {
	fs   FS
	name string
}

func (d *pebbleDir) fail(op string) error {
	return &fs.PathError{Op: op, Path: d.name, Err: errors.ErrUnsupported}
}

func (d *pebbleDir) Read([]byte) (int, error)           { return 0, d.fail("read") }
func (d *pebbleDir) Write([]byte) (int, error)          { return 0, d.fail("write") }
func (d *pebbleDir) ReadAt([]byte, int64) (int, error)  { return 0, d.fail("read") }
func (d *pebbleDir) WriteAt([]byte, int64) (int, error) { return 0, d.fail("write") }
func (d *pebbleDir) Close() error                       { return nil }
func (d *pebbleDir) Sync() error                        { return d.fs.SyncDir(d.name) }
func (d *pebbleDir) SyncData() error                    { return d.fs.SyncDir(d.name) }
func (d *pebbleDir) SyncTo(int64) (bool, error)         { return false, nil }
func (d *pebbleDir) Preallocate(_, _ int64) error       { return nil }
func (d *pebbleDir) Prefetch(int64, int64) error        { return nil }
func (d *pebbleDir) Fd() uintptr                        { return pebblevfs.InvalidFd }

func (d *pebbleDir) Stat() (pebblevfs.FileInfo, error) {
	fi, err := d.fs.Stat(d.name)
	if err != nil {
		return nil, err
	}
	return pebbleInfo{fi}, nil
}
