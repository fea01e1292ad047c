package local

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"

	"varve/volumedriver/backend"
)

// List walks the directories in the order of object names. It reads only directories that can hold a name it looks for.
func (s *Store) List(ctx context.Context, prefix, after string, max int) ([]backend.Info, error) {
	if err := s.begin(ctx); err != nil {
		return nil, err
	}
	defer s.end()
	w := walk{s: s, ctx: ctx, prefix: prefix, after: after, max: max}
	start := "."
	if i := strings.LastIndexByte(prefix, '/'); i >= 0 {
		start = prefix[:i]
		if backend.CheckName(start) != nil {
			return nil, nil // no object can have such a name
		}
	}
	if err := w.dir(start); err != nil {
		return nil, fmt.Errorf("list objects from %q after %q: %w", prefix, after, err)
	}
	return w.found, nil
}

type walk struct {
	s             *Store
	ctx           context.Context
	prefix, after string
	max           int
	found         []backend.Info
}

// dir adds the objects below a directory.
//
// The order of names is not that of directory entries: a directory d stands for names that start with "d/", and "d-1" and
// "d.1" come before those. So a directory is held back until no entry that begins with its name and a byte below '/' is left.
func (w *walk) dir(rel string) error {
	if err := w.ctx.Err(); err != nil {
		return err
	}
	if err := w.s.settle(rel); err != nil {
		return ignoreAbsent(err)
	}
	entries, err := w.s.fs.ReadDir(path.Join(w.s.objects, rel))
	if err != nil {
		return ignoreAbsent(err)
	}
	var held []string
	release := func(next string) error {
		for len(held) > 0 && len(w.found) < w.max {
			d := held[len(held)-1]
			if strings.HasPrefix(next, d) && len(next) > len(d) && next[len(d)] < '/' {
				return nil
			}
			held = held[:len(held)-1]
			if err := w.dir(d); err != nil {
				return err
			}
		}
		return nil
	}
	for _, entry := range entries {
		name := path.Join(rel, entry)
		if err := release(name); err != nil {
			return err
		}
		if len(w.found) >= w.max {
			return nil
		}
		if !w.wanted(name) {
			continue
		}
		fi, err := w.s.fs.Stat(path.Join(w.s.objects, name))
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return err
		case fi.IsDir():
			held = append(held, name)
		case name > w.after && strings.HasPrefix(name, w.prefix):
			w.found = append(w.found, backend.Info{Name: name, Size: fi.Size()})
		}
	}
	return release("")
}

// wanted tells whether name, or a name below it if it is a directory, can be part of the answer.
func (w *walk) wanted(name string) bool {
	if backend.CheckName(name) != nil {
		return false // not an object: somebody else put it there
	}
	if !strings.HasPrefix(name, w.prefix) && !under(w.prefix, name) {
		return false
	}
	return name > w.after || name+"/" > w.after || under(w.after, name)
}

func ignoreAbsent(err error) error {
	if errors.Is(absent(err), backend.ErrNotExist) {
		return nil
	}
	return err
}
