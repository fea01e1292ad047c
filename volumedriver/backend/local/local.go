// Package local keeps objects as files below a directory.
//
//	DIR/objects/v/0a1b/3f/7-12-0    an object, under its name
//	DIR/tmp/4be7…/                  the objects that one open Store is writing, and the lock that it holds
//
// An object appears whole and durable, or not at all:
//
//	write DIR/tmp/ID/N, sync it                     its bytes are durable
//	make each missing directory, sync its parent    so is the path to it
//	link DIR/tmp/ID/N to DIR/objects/NAME           fails if there is such an object
//	sync the directory of DIR/objects/NAME          its name is durable; one sync serves all that wait for it
//	remove DIR/tmp/ID/N
//
// A name that is found may come from a process that was killed before it synced the directory. Whoever relies on it would
// lose it in a power cut, so a Store syncs each directory once before the first name from there is shown.
//
// A directory whose sync failed may have lost names that are still shown. The Store refuses all that would rely on them from
// then on, until it is opened anew.
//
// Several processes may use one directory. What a killed one left in tmp is removed at the next Open, by the sign of its
// lock, which ended with it.
package local

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"sync"
	"sync/atomic"
	"syscall"

	"varve/volumedriver/backend"
	"varve/volumedriver/vfs"
)

// Store is a backend in a directory.
type Store struct {
	fs      vfs.FS
	dir     string
	objects string
	tmp     string // of this Store alone
	lock    io.Closer
	seq     atomic.Int64 // numbers temporary files

	life   sync.RWMutex // held shared by every call, alone by Close
	closed bool

	// Held shared from making a directory until a name in it is linked, alone to remove an empty directory.
	shape sync.RWMutex

	mu     sync.Mutex
	dirs   map[string]*directory
	failed error // the first failed sync of a directory
}

// Open opens the store in dir, and makes it if there is none.
func Open(fsys vfs.FS, dir string) (*Store, error) {
	s := &Store{fs: fsys, dir: path.Clean(dir), dirs: map[string]*directory{}}
	s.objects = path.Join(s.dir, "objects")
	tmp := path.Join(s.dir, "tmp")
	for _, d := range []string{s.objects, tmp} {
		if err := makeDirs(fsys, d); err != nil {
			return nil, fmt.Errorf("open backend directory %s: %w", dir, err)
		}
	}
	if err := s.removeLeftovers(tmp); err != nil {
		return nil, fmt.Errorf("open backend directory %s: %w", dir, err)
	}
	if err := s.claimTmp(tmp); err != nil {
		return nil, fmt.Errorf("open backend directory %s: %w", dir, err)
	}
	return s, nil
}

// makeDirs makes dir and its missing parents, each durable before the next. A kill may have left the last of them not durable,
// so the deepest one that exists is synced in its parent too.
func makeDirs(fsys vfs.FS, dir string) error {
	fi, err := fsys.Stat(dir)
	parent := path.Dir(dir)
	switch {
	case err == nil && !fi.IsDir():
		return &fs.PathError{Op: "mkdir", Path: dir, Err: syscall.ENOTDIR}
	case err == nil:
		if err := fsys.SyncDir(parent); err != nil && !errors.Is(err, fs.ErrPermission) {
			return err // a parent that we may not even open was not made by us
		}
		return nil
	case !errors.Is(err, fs.ErrNotExist) || parent == dir:
		return err
	}
	if err := makeDirs(fsys, parent); err != nil {
		return err
	}
	if err := fsys.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return fsys.SyncDir(parent)
}

// removeLeftovers removes the temporary files of Stores that are no more.
func (s *Store) removeLeftovers(tmp string) error {
	ids, err := s.fs.ReadDir(tmp)
	if err != nil {
		return err
	}
	for _, id := range ids {
		if !isTmpID(id) {
			continue // not ours
		}
		dead := path.Join(tmp, id)
		lock, err := s.fs.Lock(path.Join(dead, "lock"))
		if err != nil {
			continue // in use, or being removed by another
		}
		err = s.fs.RemoveAll(dead)
		if err := errors.Join(err, lock.Close()); err != nil {
			return fmt.Errorf("remove what a killed process left in %s: %w", dead, err)
		}
	}
	return nil
}

const tmpIDBytes = 8

func isTmpID(id string) bool {
	b, err := hex.DecodeString(id)
	return err == nil && len(b) == tmpIDBytes
}

// claimTmp makes a directory for temporary files and locks it. Another process that opens the directory just now may take it
// for a leftover before it is locked; then another one is made.
func (s *Store) claimTmp(tmp string) error {
	var errs error
	for range 10 {
		id := make([]byte, tmpIDBytes)
		rand.Read(id)
		s.tmp = path.Join(tmp, hex.EncodeToString(id))
		if err := s.fs.MkdirAll(s.tmp, 0o700); err != nil {
			return err
		}
		name := path.Join(s.tmp, "lock")
		lock, err := s.fs.Lock(name)
		if err == nil {
			if _, err = s.fs.Stat(name); err == nil {
				s.lock = lock
				return nil
			}
			err = errors.Join(err, lock.Close())
		}
		errs = err
	}
	return fmt.Errorf("lock a directory for temporary files: %w", errs)
}

// begin lets a call use the Store until end.
func (s *Store) begin(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s.life.RLock()
	if s.closed {
		s.life.RUnlock()
		return fmt.Errorf("backend directory %s: %w", s.dir, fs.ErrClosed)
	}
	return nil
}

func (s *Store) end() { s.life.RUnlock() }

func (s *Store) Close() error {
	s.life.Lock()
	defer s.life.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	err := s.fs.RemoveAll(s.tmp)
	if err := errors.Join(err, s.lock.Close()); err != nil {
		return fmt.Errorf("close backend directory %s: %w", s.dir, err)
	}
	return nil
}

func (s *Store) Put(ctx context.Context, name string, parts ...[]byte) error {
	if err := backend.CheckName(name); err != nil {
		return err
	}
	if err := s.begin(ctx); err != nil {
		return err
	}
	defer s.end()
	if err := s.put(ctx, name, parts); err != nil {
		return fmt.Errorf("put object %s: %w", name, err)
	}
	return nil
}

func (s *Store) put(ctx context.Context, name string, parts [][]byte) error {
	final := path.Join(s.objects, name)
	if err := s.refuseExisting(name, final); err != nil {
		return err
	}
	tmp := fmt.Sprintf("%s/%d", s.tmp, s.seq.Add(1))
	err := outOfSpace(s.writeTmp(tmp, parts, backend.Cached(ctx)))
	if err == nil {
		err = ctx.Err()
	}
	if err == nil {
		err = s.publish(tmp, name, final)
	}
	if rerr := s.fs.Remove(tmp); err == nil && rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
		// The object is there and durable; what cannot be removed now is removed at the next Open.
		return nil
	}
	return err
}

// refuseExisting spares the writing of an object that is there already. That one is durable when ErrExist is returned.
func (s *Store) refuseExisting(name, final string) error {
	switch fi, err := s.fs.Stat(final); {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case fi.IsDir():
		return &fs.PathError{Op: "create", Path: final, Err: syscall.EISDIR}
	}
	if err := s.settle(path.Dir(name)); err != nil {
		return err
	}
	return backend.ErrExist
}

// writeTmp writes a new file and makes its bytes durable; cached: it stays in the page cache, whatever its size.
func (s *Store) writeTmp(tmp string, parts [][]byte, cached bool) error {
	size := int64(0)
	for _, p := range parts {
		size += int64(len(p))
	}
	f, err := s.fs.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	past := size >= directBytes && !cached
	err = f.Preallocate(size)
	if err == nil {
		write := f.WritevAt
		if d, ok := f.(vfs.DirectWriter); ok && past {
			write = d.WriteDirect
		}
		_, err = write(parts, 0)
	}
	if err == nil {
		err = f.Sync()
	}
	if d, ok := f.(vfs.CacheDropper); ok && err == nil && past {
		d.DropCache() // where the file system knows no direct writes
	}
	return errors.Join(err, f.Close())
}

// directBytes: objects this large are written past the page cache, unless the caller says that they are likely to be read
// (backend.WithCached). What is read again comes into it. Measured on a 2-core VM, 16 MiB objects: 2,500 us of system time for each
// MiB written into ever new pages, 245 us into pages that were just given back, 67 us without pages.
const directBytes = 1 << 20

// publish gives the durable file tmp its object's name, durably.
func (s *Store) publish(tmp, name, final string) error {
	s.shape.RLock()
	defer s.shape.RUnlock()
	parent := path.Dir(name)
	err := s.makeParents(parent)
	if err == nil {
		err = s.fs.Link(tmp, final)
	}
	if errors.Is(err, fs.ErrNotExist) {
		// Another process has removed the directory, empty as it was.
		s.forget(parent)
		if err = s.makeParents(parent); err == nil {
			err = s.fs.Link(tmp, final)
		}
	}
	if errors.Is(err, fs.ErrExist) {
		if err := s.refuseExisting(name, final); err != nil {
			return err
		}
		return fmt.Errorf("object of the same name was there and is gone: %w", err)
	}
	if err != nil {
		return outOfSpace(err)
	}
	return s.syncDir(parent) // if this fails, even for want of space, the object may be there
}

func (s *Store) Open(ctx context.Context, name string) (backend.Object, error) {
	if err := backend.CheckName(name); err != nil {
		return nil, err
	}
	if err := s.begin(ctx); err != nil {
		return nil, err
	}
	defer s.end()
	o, err := s.open(name)
	if err != nil {
		return nil, fmt.Errorf("open object %s: %w", name, absent(err))
	}
	return o, nil
}

func (s *Store) open(name string) (*object, error) {
	if err := s.settle(path.Dir(name)); err != nil {
		return nil, err
	}
	if _, err := s.stat(name); err != nil {
		return nil, err
	}
	f, err := s.fs.OpenFile(path.Join(s.objects, name), os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	size, err := f.Size()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &object{name: name, f: f, size: size}, nil
}

func (s *Store) Stat(ctx context.Context, name string) (backend.Info, error) {
	if err := backend.CheckName(name); err != nil {
		return backend.Info{}, err
	}
	if err := s.begin(ctx); err != nil {
		return backend.Info{}, err
	}
	defer s.end()
	err := s.settle(path.Dir(name))
	var info backend.Info
	if err == nil {
		info, err = s.stat(name)
	}
	if err != nil {
		return backend.Info{}, fmt.Errorf("stat object %s: %w", name, absent(err))
	}
	return info, nil
}

// stat describes an object. A directory is none.
func (s *Store) stat(name string) (backend.Info, error) {
	fi, err := s.fs.Stat(path.Join(s.objects, name))
	if err != nil {
		return backend.Info{}, err
	}
	if fi.IsDir() {
		return backend.Info{}, fs.ErrNotExist
	}
	return backend.Info{Name: name, Size: fi.Size()}, nil
}

// Delete removes the object durably.
func (s *Store) Delete(ctx context.Context, name string) error {
	if err := backend.CheckName(name); err != nil {
		return err
	}
	if err := s.begin(ctx); err != nil {
		return err
	}
	defer s.end()
	err := s.remove(name)
	if err != nil && !errors.Is(absent(err), backend.ErrNotExist) {
		return fmt.Errorf("delete object %s: %w", name, err)
	}
	return nil
}

func (s *Store) remove(name string) error {
	// What is gone already may be gone only for now, if a killed process removed it.
	if err := s.settle(path.Dir(name)); err != nil {
		return err
	}
	if _, err := s.stat(name); err != nil {
		return err
	}
	if err := s.fs.Remove(path.Join(s.objects, name)); err != nil {
		return err
	}
	if err := s.syncDir(path.Dir(name)); err != nil {
		return err
	}
	s.removeEmptyDirs(path.Dir(name))
	return nil
}

func (s *Store) Space(ctx context.Context) (total, available uint64, err error) {
	if err := s.begin(ctx); err != nil {
		return 0, 0, err
	}
	defer s.end()
	total, available, err = s.fs.Space(s.dir)
	if err != nil {
		return 0, 0, fmt.Errorf("space of backend directory %s: %w", s.dir, err)
	}
	return total, available, nil
}

// absent turns what a file system says of a missing file into the backend's word. A name that leads through an object is
// missing too.
func absent(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return backend.ErrNotExist
	}
	return err
}

func outOfSpace(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return errors.Join(backend.ErrNoSpace, err)
	}
	return err
}

// object reads an object's file.
type object struct {
	name string
	f    vfs.File
	size int64
}

func (o *object) Size() int64  { return o.size }
func (o *object) Close() error { return o.f.Close() }

func (o *object) inside(p []byte, off int64) error {
	if off < 0 || off > o.size || int64(len(p)) > o.size-off {
		return fmt.Errorf("read object %s: bytes %d+%d of %d: %w", o.name, off, len(p), o.size, io.ErrUnexpectedEOF)
	}
	return nil
}

func (o *object) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := o.inside(p, off); err != nil {
		return err
	}
	n, err := o.f.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF // the file was cut under us
	}
	return fmt.Errorf("read object %s: %w", o.name, err)
}

func (o *object) TryReadAt(p []byte, off int64) error {
	if err := o.inside(p, off); err != nil {
		return err
	}
	switch err := o.f.TryReadAt(p, off); err {
	case nil, vfs.ErrWouldBlock:
		return err
	default:
		return fmt.Errorf("read object %s: %w", o.name, err)
	}
}
