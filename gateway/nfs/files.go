package nfs

import (
	"context"
	"sync"
	"time"
)

// files keeps regular files open between calls: NFS has no open, and opening a volume for each call would cost more than
// the call. A file that nobody used for fileIdle is released.
type files struct {
	ns Namespace
	mu sync.Mutex
	m  map[fileKey]*openFile
}

type fileKey struct {
	fsid, inode uint64
	generation  uint32
}

type openFile struct {
	File
	key     fileKey
	release func()
	// under files.mu:
	users int
	used  time.Time
	gone  bool // no longer in the map: the last user releases it
}

const (
	fileIdle = 30 * time.Second
	// openFilesMax is how many files are kept open while nobody uses them.
	openFilesMax = 4096
)

// get returns an open file, or nil if it is not open. The caller puts it back.
func (fs *files) get(k fileKey, now time.Time) *openFile {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	f := fs.m[k]
	if f != nil {
		f.users++
		f.used = now
	}
	return f
}

// open returns the file, opening it if needed.
func (fs *files) open(ctx context.Context, k fileKey, now time.Time) (*openFile, error) {
	if f := fs.get(k, now); f != nil {
		return f, nil
	}
	file, release, err := fs.ns.Open(ctx, k.fsid, k.inode)
	if err != nil {
		return nil, err
	}
	f := &openFile{File: file, key: k, release: release, users: 1, used: now}
	fs.mu.Lock()
	other := fs.m[k]
	if other != nil {
		other.users++
		other.used = now
	} else {
		if fs.m == nil {
			fs.m = make(map[fileKey]*openFile)
		}
		fs.m[k] = f
	}
	fs.mu.Unlock()
	if other != nil {
		release()
		return other, nil
	}
	return f, nil
}

// hold takes one more use of a file in use.
func (fs *files) hold(f *openFile) {
	fs.mu.Lock()
	f.users++
	fs.mu.Unlock()
}

func (fs *files) put(f *openFile) {
	fs.mu.Lock()
	f.users--
	last := f.gone && f.users == 0
	fs.mu.Unlock()
	if last {
		f.release()
	}
}

// forget makes the next use of the file open it anew.
func (fs *files) forget(k fileKey) {
	fs.mu.Lock()
	f := fs.m[k]
	if f != nil {
		delete(fs.m, k)
		f.gone = true
	}
	release := f != nil && f.users == 0
	fs.mu.Unlock()
	if release {
		f.release()
	}
}

// sweep releases files that were idle since before, and any idle ones above openFilesMax.
func (fs *files) sweep(before time.Time) {
	var old []*openFile
	fs.mu.Lock()
	excess := len(fs.m) - openFilesMax
	for k, f := range fs.m {
		if f.users == 0 && (excess > len(old) || f.used.Before(before)) {
			delete(fs.m, k)
			f.gone = true
			old = append(old, f)
		}
	}
	fs.mu.Unlock()
	for _, f := range old {
		f.release()
	}
}

// close releases what nobody uses and lets the users release the rest.
func (fs *files) close() {
	var old []*openFile
	fs.mu.Lock()
	for k, f := range fs.m {
		delete(fs.m, k)
		f.gone = true
		if f.users == 0 {
			old = append(old, f)
		}
	}
	fs.mu.Unlock()
	for _, f := range old {
		f.release()
	}
}
