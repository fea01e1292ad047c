package cache

import (
	"container/list"

	"varve/volumedriver/backend"
)

// idleMax is how many objects of a backend stay open that nobody uses.
const idleMax = 128

// opened is an object that is open on the backend, shared by all handles of it, so that each object is looked up there once. It
// keeps the object's number in the registry from being given to another. store.mu guards it.
type opened struct {
	id    uint32
	inner backend.Object
	users int
	gone  bool          // the object was deleted: it goes with its last user
	idle  *list.Element // while it has none
}

// share makes an object that was just opened, with one user, the one that all handles use, unless there is one already.
func (s *store) share(id uint32, inner backend.Object) *opened {
	s.mu.Lock()
	in := s.opened[id]
	if in == nil {
		in = &opened{id: id, inner: inner, users: 1}
		s.c.reg.use(id)
		s.opened[id] = in
		s.mu.Unlock()
		return in
	}
	s.useLocked(in)
	s.mu.Unlock()
	_ = inner.Close()
	return in
}

// private makes an object that was just opened one for a single handle: a scrub must not be given what was opened before.
func (s *store) private(id uint32, inner backend.Object) *opened {
	s.c.reg.use(id)
	return &opened{id: id, inner: inner, users: 1, gone: true}
}

// use gives the open object of a number, if there is one, with one more user.
func (s *store) use(id uint32) *opened {
	s.mu.Lock()
	defer s.mu.Unlock()
	in := s.opened[id]
	if in != nil {
		s.useLocked(in)
	}
	return in
}

func (s *store) useLocked(in *opened) {
	in.users++
	if in.idle != nil {
		s.idle.Remove(in.idle)
		in.idle = nil
	}
}

// unuse ends one use. What nobody uses stays open for a while.
func (s *store) unuse(in *opened) error {
	s.mu.Lock()
	in.users--
	var out *opened
	switch {
	case in.users > 0:
	case in.gone || s.closed:
		out = in
		s.removeLocked(in)
	default:
		in.idle = s.idle.PushFront(in)
		if s.idle.Len() > idleMax {
			out = s.idle.Back().Value.(*opened)
			s.removeLocked(out)
		}
	}
	s.mu.Unlock()
	if out == nil {
		return nil
	}
	s.c.reg.close(out.id)
	return out.inner.Close()
}

func (s *store) removeLocked(in *opened) {
	if in.idle != nil {
		s.idle.Remove(in.idle)
		in.idle = nil
	}
	if s.opened[in.id] == in {
		delete(s.opened, in.id)
	}
}

// dismiss closes the open object of a number, now or with its last user.
func (s *store) dismiss(id uint32) {
	s.mu.Lock()
	in := s.opened[id]
	if in != nil {
		in.gone = true
		delete(s.opened, id)
		if in.users > 0 {
			in = nil
		} else {
			s.removeLocked(in)
		}
	}
	s.mu.Unlock()
	if in != nil {
		s.c.reg.close(in.id)
		_ = in.inner.Close()
	}
}

// closeIdle closes all that nobody uses.
func (s *store) closeIdle() (err error) {
	for {
		s.mu.Lock()
		e := s.idle.Back()
		if e == nil {
			s.mu.Unlock()
			return err
		}
		in := e.Value.(*opened)
		s.removeLocked(in)
		s.mu.Unlock()
		s.c.reg.close(in.id)
		if cerr := in.inner.Close(); err == nil {
			err = cerr
		}
	}
}
