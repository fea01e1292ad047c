package local

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
)

// directory is what a Store knows of one directory below objects.
type directory struct {
	made    atomic.Bool // it exists, and so it will after a power cut
	settled atomic.Bool // all names in it that were there when the Store was opened are durable

	asked atomic.Int64 // syncs that were asked for
	mu    sync.Mutex   // held during a sync
	done  int64        // every ask up to this one is served
}

// directoriesMax bounds what is remembered; forgetting costs a sync.
const directoriesMax = 1 << 16

// directory gives the state of a directory; "." is objects itself.
func (s *Store) directory(rel string) *directory {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := s.dirs[rel]
	if d == nil {
		if len(s.dirs) >= directoriesMax {
			clear(s.dirs)
		}
		d = &directory{}
		s.dirs[rel] = d
	}
	return d
}

// forget drops what is known of a directory and those above it.
func (s *Store) forget(rel string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for ; rel != "."; rel = path.Dir(rel) {
		delete(s.dirs, rel)
	}
}

// syncDir makes the names durable that are in a directory now. A sync that began before the call does not do; one sync serves
// all who called before it began.
func (s *Store) syncDir(rel string) error {
	d := s.directory(rel)
	ask := d.asked.Add(1)
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := s.failure(); err != nil {
		return err
	}
	if d.done >= ask {
		return nil
	}
	upTo := d.asked.Load()
	if err := s.fs.SyncDir(path.Join(s.objects, rel)); err != nil {
		if !beforeSync(err) {
			s.fail(err)
		}
		return err
	}
	d.done = upTo
	return nil
}

// beforeSync tells an error of opening the directory, which loses nothing, from one of syncing it.
func beforeSync(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.ENOTDIR) ||
		errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE)
}

func (s *Store) failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failed
}

func (s *Store) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed == nil {
		s.failed = fmt.Errorf("a directory's sync failed before, its names are uncertain until the store is opened anew: %w", err)
	}
}

// prefixes yields a directory's parents below objects and itself: a, a/b, a/b/c.
func prefixes(rel string, yield func(string) error) error {
	if rel == "." {
		return nil
	}
	for i := range len(rel) + 1 {
		if i == len(rel) || rel[i] == '/' {
			if err := yield(rel[:i]); err != nil {
				return err
			}
		}
	}
	return nil
}

// makeParents makes a directory and its parents, each durable in its parent.
func (s *Store) makeParents(rel string) error {
	if s.directory(rel).made.Load() {
		return nil
	}
	return prefixes(rel, func(p string) error {
		d := s.directory(p)
		if d.made.Load() {
			return nil
		}
		if err := s.fs.MkdirAll(path.Join(s.objects, p), 0o700); err != nil {
			return err
		}
		if err := s.syncDir(path.Dir(p)); err != nil {
			return err
		}
		d.made.Store(true)
		return nil
	})
}

// settle makes the names durable that another process may have left in a directory and on the path to it.
func (s *Store) settle(rel string) error {
	if err := s.failure(); err != nil {
		return err
	}
	if s.directory(rel).settled.Load() {
		return nil // and so are those above
	}
	one := func(p string) error {
		d := s.directory(p)
		if d.settled.Load() {
			return nil
		}
		if err := s.syncDir(p); err != nil {
			return err
		}
		d.settled.Store(true)
		return nil
	}
	if err := one("."); err != nil {
		return err
	}
	return prefixes(rel, one)
}

// removeEmptyDirs removes a directory and its parents as far as they are empty, unless a Put is using any. It need not be
// durable, nor succeed: an empty directory only costs space.
func (s *Store) removeEmptyDirs(rel string) {
	if !s.shape.TryLock() {
		return
	}
	defer s.shape.Unlock()
	for ; rel != "."; rel = path.Dir(rel) {
		s.mu.Lock()
		delete(s.dirs, rel)
		s.mu.Unlock()
		if err := s.fs.Remove(path.Join(s.objects, rel)); err != nil {
			return
		}
	}
}

// under tells whether name lies below the directory dir.
func under(name, dir string) bool { return strings.HasPrefix(name, dir+"/") }
