package nfs

import (
	"context"

	"varve/gateway/nfs/xdr"
)

// Listings. Cookies of the wire are the namespace's plus two: 1 and 2 are "." and "..". A cookie stays good whatever
// happens to the directory and over restarts, so the cookie verifier is always zero and no cookie is ever refused.
const (
	cookieDot    = 1
	cookieDotDot = 2
	cookieFirst  = 2 // a namespace's cookie n is n+cookieFirst

	listBytesMax = 64 << 10
	// listHeadBytes is what a listing takes without entries: status, attributes, verifier, end of list, eof.
	listHeadBytes = 4 + 4 + attrBytes + 8 + 4 + 4
	// entryBytesMin is an entry of READDIR with a name of one to four bytes.
	entryBytesMin = 4 + 8 + 4 + 4 + 8
	plusBytes     = 4 + attrBytes + 4 + 4 + handleBytes
	entriesMax    = 1024
)

func (c *conn) readdir(ctx context.Context, q *request, b []byte) ([]byte, outcome) {
	o, s := c.open(q)
	cookie := q.d.Uint64()
	q.d.Fixed(8)
	count := q.d.Uint32()
	if q.d.Bad() {
		return b, garbage
	}
	l := listing{o: o, cookie: cookie, room: int(min(count, listBytesMax)), names: listBytesMax}
	return c.list(ctx, q, b, s, &l)
}

func (c *conn) readdirplus(ctx context.Context, q *request, b []byte) ([]byte, outcome) {
	o, s := c.open(q)
	cookie := q.d.Uint64()
	q.d.Fixed(8)
	names, count := q.d.Uint32(), q.d.Uint32()
	if q.d.Bad() {
		return b, garbage
	}
	l := listing{o: o, cookie: cookie, room: int(min(count, listBytesMax)), names: int(min(names, listBytesMax)), plus: true}
	return c.list(ctx, q, b, s, &l)
}

// listing is one READDIR or READDIRPLUS being answered.
type listing struct {
	o      object
	cookie uint64
	room   int // bytes of results left
	names  int // bytes of cookies, ids and names left: READDIRPLUS's dircount
	plus   bool
	any    bool
}

// add appends an entry if it fits. dircount may always be exceeded by the first entry: no larger reply would help.
func (l *listing) add(b []byte, cookie uint64, name string, a *Attr) ([]byte, bool) {
	padded := (len(name) + 3) &^ 3
	entry := 4 + 8 + 4 + padded + 8
	total := entry
	if l.plus {
		total += plusBytes
	}
	if total > l.room || l.any && entry > l.names {
		return b, false
	}
	l.room -= total
	l.names -= entry
	l.any = true
	b = xdr.AppendBool(b, true)
	b = xdr.AppendUint64(b, a.Inode)
	b = xdr.AppendString(b, name)
	b = xdr.AppendUint64(b, cookie)
	if l.plus {
		b = appendPostOp(b, l.o.x.FSID, a)
		b = xdr.AppendBool(b, true)
		b = l.o.x.appendHandle(b, a.Inode, a.Generation)
	}
	return b, true
}

func (c *conn) list(ctx context.Context, q *request, b []byte, s Status, l *listing) ([]byte, outcome) {
	if s != StatusOK {
		return appendPostOp(q.fail(b, s), 0, nil), answered
	}
	dir, s, _ := c.attr(ctx, l.o)
	if s != StatusOK {
		return appendPostOp(q.fail(b, s), 0, nil), answered
	}
	switch {
	case dir.Kind != Dir:
		s = StatusNotDir
	case !may(&dir, &q.Cred, wantRead):
		s = StatusAcces
	}
	if s != StatusOK {
		return appendPostOp(q.fail(b, s), l.o.x.FSID, &dir), answered
	}
	b = appendPostOp(q.fail(b, StatusOK), l.o.x.FSID, &dir)
	b = xdr.AppendUint64(b, 0) // cookie verifier
	l.room -= listHeadBytes
	b, eof, err := c.listEntries(ctx, b, l, &dir)
	if unknownOutcome(err) {
		return b, silent
	}
	s = toStatus(err)
	if s == StatusOK && !l.any && !eof {
		s = StatusTooSmall
	}
	if s != StatusOK {
		return appendPostOp(q.failAgain(b, s), l.o.x.FSID, &dir), answered
	}
	b = xdr.AppendBool(b, false) // no more entries here
	return xdr.AppendBool(b, eof), answered
}

// listEntries appends entries while they fit. eof tells that the last name of the directory is among them.
func (c *conn) listEntries(ctx context.Context, b []byte, l *listing, dir *Attr) (_ []byte, eof bool, err error) {
	fits := true
	if l.cookie < cookieDot {
		if b, fits = l.add(b, cookieDot, ".", dir); !fits {
			return b, false, nil
		}
	}
	if l.cookie < cookieDotDot {
		parent, s := c.resolve(ctx, l.o, dir, "..")
		if s != StatusOK {
			parent = *dir
		}
		if b, fits = l.add(b, cookieDotDot, "..", &parent); !fits {
			return b, false, nil
		}
	}
	after := max(l.cookie, cookieFirst) - cookieFirst
	for {
		entry := entryBytesMin
		if l.plus {
			entry += plusBytes
		}
		want := min(max(min(l.room/entry, l.names/entryBytesMin), 0)+1, entriesMax)
		entries, last, err := c.s.cfg.Namespace.ReadDir(ctx, l.o.x.FSID, l.o.inode, after, want)
		if err != nil {
			return b, false, err
		}
		for i := range entries {
			e := &entries[i]
			if b, fits = l.add(b, e.Cookie+cookieFirst, e.Name, &e.Attr); !fits {
				return b, false, nil
			}
			after = e.Cookie
		}
		if last || len(entries) == 0 {
			return b, true, nil
		}
	}
}
