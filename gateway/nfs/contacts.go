package nfs

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// Contact is what a client did last with an export: when it mounted it and when it wrote, as far as this server has seen. It
// decides nothing; it tells an administrator that a mount works from both ends.
type Contact struct {
	Client         netip.Addr
	FSID           uint64
	Mounted, Wrote time.Time
}

type contactKey struct {
	client netip.Addr
	fsid   uint64
}

// contact has times in nanoseconds, 0 for never.
type contact struct{ mounted, wrote atomic.Int64 }

// contacts are those of the server. A connection keeps the one that it used last, so that a write costs no lookup.
type contacts struct {
	mu  sync.Mutex
	all map[contactKey]*contact
}

const contactsMax = 4096

func (t *contacts) of(client netip.Addr, fsid uint64) *contact {
	t.mu.Lock()
	defer t.mu.Unlock()
	k := contactKey{client, fsid}
	if c := t.all[k]; c != nil {
		return c
	}
	if t.all == nil || len(t.all) >= contactsMax {
		t.all = make(map[contactKey]*contact)
	}
	c := &contact{}
	t.all[k] = c
	return c
}

// wrote notes a write. It is the reader's alone to call.
func (c *conn) wrote(fsid uint64) {
	if c.contact == nil || c.contactOf != fsid {
		c.contact, c.contactOf = c.s.contacts.of(c.peer, fsid), fsid
	}
	c.contact.wrote.Store(c.now.UnixNano())
}

// Contacts lists what clients did.
func (s *Server) Contacts() []Contact {
	s.contacts.mu.Lock()
	defer s.contacts.mu.Unlock()
	at := func(n int64) time.Time {
		if n == 0 {
			return time.Time{}
		}
		return time.Unix(0, n)
	}
	out := make([]Contact, 0, len(s.contacts.all))
	for k, c := range s.contacts.all {
		out = append(out, Contact{Client: k.client, FSID: k.fsid, Mounted: at(c.mounted.Load()), Wrote: at(c.wrote.Load())})
	}
	return out
}
