package nfs

import (
	"context"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"varve/gateway/nfs/rpc"
	"varve/gateway/nfs/xdr"
)

// mountstat3, RFC 1813 section 5.1.5.
const (
	mountOK          = 0
	mountNoEnt       = 2
	mountAcces       = 13
	mountNotDir      = 20
	mountServerFault = 10006
	mountPathMax     = 1024 // MNTPATHLEN
)

// mounts is what DUMP shows: who mounted what, as far as clients tell. It decides nothing. It also slows down a client
// that asks for mounts as fast as it can.
type mounts struct {
	mu    sync.Mutex
	list  []mounted
	rates map[netip.Addr]*rate.Limiter
}

type mounted struct {
	client netip.Addr
	path   string
}

const (
	mountsMax     = 1024
	mountsPerS    = 50
	mountsBurst   = 200
	mountDelayMax = 5 * time.Second
	mountersMax   = 4096
)

func (m *mounts) add(client netip.Addr, path string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, x := range m.list {
		if x == (mounted{client, path}) {
			return
		}
	}
	if len(m.list) == mountsMax {
		m.list = append(m.list[:0], m.list[1:]...)
	}
	m.list = append(m.list, mounted{client, path})
}

// drop forgets a client's mounts of path, or all of them if path is "".
func (m *mounts) drop(client netip.Addr, path string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	kept := m.list[:0]
	for _, x := range m.list {
		if x.client != client || path != "" && x.path != path {
			kept = append(kept, x)
		}
	}
	m.list = kept
}

func (m *mounts) all() []mounted {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]mounted(nil), m.list...)
}

// slow waits until the client may ask for one more mount; false when that would be too long.
func (m *mounts) slow(ctx context.Context, client netip.Addr) bool {
	m.mu.Lock()
	l := m.rates[client]
	if l == nil {
		if m.rates == nil || len(m.rates) >= mountersMax {
			m.rates = make(map[netip.Addr]*rate.Limiter)
		}
		l = rate.NewLimiter(mountsPerS, mountsBurst)
		m.rates[client] = l
	}
	m.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, mountDelayMax)
	defer cancel()
	return l.Wait(ctx) == nil
}

func (c *conn) mnt(ctx context.Context, q *request, b []byte) ([]byte, outcome) {
	path := q.d.Opaque(mountPathMax)
	if q.d.Bad() {
		return b, garbage
	}
	if !c.s.mounts.slow(ctx, c.peer) {
		return q.fail(b, mountServerFault), answered
	}
	table := c.s.readExports(time.Now())
	x, rest := table.find(string(path))
	if x == nil {
		return q.fail(b, mountNoEnt), answered
	}
	if !x.allows(c.peer) {
		c.s.log.Info("nfs mount refused", "client", c.peer, "export", x.Path)
		return q.fail(b, mountAcces), answered
	}
	x.squash(&q.Cred)
	a, s := c.walk(ctx, q, x, rest)
	switch {
	case s == StatusOK && a.Kind != Dir:
		s = mountNotDir
	case s == StatusNoEnt || s == StatusAcces || s == StatusNotDir || s == StatusOK:
	default:
		s = mountServerFault
	}
	b = q.fail(b, s)
	if s != mountOK {
		return b, answered
	}
	c.s.mounts.add(c.peer, cleanExportPath(string(path)))
	c.s.contacts.of(c.peer, x.FSID).mounted.Store(time.Now().UnixNano())
	c.s.log.Info("nfs mounted", "client", c.peer, "export", x.Path)
	b = x.appendHandle(b, a.Inode, a.Generation)
	b = xdr.AppendUint32(b, 1)
	return xdr.AppendUint32(b, rpc.FlavourSys), answered
}

// walk follows names from an export's root: a client may mount a directory below it.
func (c *conn) walk(ctx context.Context, q *request, x *export, names []string) (Attr, Status) {
	a, err := c.s.cfg.Namespace.Attr(ctx, x.FSID, x.Root, 0)
	for _, name := range names {
		if err != nil {
			break
		}
		if a.Kind != Dir {
			return a, StatusNotDir
		}
		if !may(&a, &q.Cred, wantExec) {
			return a, StatusAcces
		}
		a, err = c.s.cfg.Namespace.Lookup(ctx, x.FSID, a.Inode, name)
	}
	return a, toStatus(err)
}

func (c *conn) dump(_ context.Context, _ *request, b []byte) ([]byte, outcome) {
	if !c.table.allows(c.peer) {
		return xdr.AppendBool(b, false), answered
	}
	for _, m := range c.s.mounts.all() {
		b = xdr.AppendBool(b, true)
		b = xdr.AppendString(b, m.client.String())
		b = xdr.AppendString(b, m.path)
	}
	return xdr.AppendBool(b, false), answered
}

func (c *conn) umnt(_ context.Context, q *request, b []byte) ([]byte, outcome) {
	path := q.d.Opaque(mountPathMax)
	if q.d.Bad() {
		return b, garbage
	}
	c.s.mounts.drop(c.peer, cleanExportPath(string(path)))
	return b, answered
}

func (c *conn) umntall(_ context.Context, _ *request, b []byte) ([]byte, outcome) {
	c.s.mounts.drop(c.peer, "")
	return b, answered
}

// exportList answers EXPORT with the exports that the client may use, and for whom they are.
func (c *conn) exportList(_ context.Context, _ *request, b []byte) ([]byte, outcome) {
	for _, x := range c.s.readExports(c.now).list {
		if !x.allows(c.peer) {
			continue
		}
		b = xdr.AppendBool(b, true)
		b = xdr.AppendString(b, x.Path)
		for _, p := range x.Clients {
			b = xdr.AppendBool(b, true)
			b = xdr.AppendString(b, p.String())
		}
		b = xdr.AppendBool(b, false)
	}
	return xdr.AppendBool(b, false), answered
}
