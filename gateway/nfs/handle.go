package nfs

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"net/netip"
	"path"
	"strings"
	"sync"
	"time"
)

// A file handle names an inode for ever and on every node:
//
//	| "VRV3" 4 | fsid 8 | inode 8 | generation 4 | HMAC-SHA256 of the 24 bytes before, its first 16 |
//
// The key is the export's, so a client cannot make up the handle of a file it was not led to, nor turn one export's handle
// into another's.
const (
	handleBytes    = 40
	handleSigned   = 24
	handleMagic    = "VRV3"
	handleBytesMax = 64 // of nfs_fh3
)

// export is an Export as the server uses it.
type export struct {
	Export
	macs sync.Pool // of *mac
}

// mac is HMAC-SHA256 with an export's key, and room for a sum, which would otherwise be allocated for each call.
type mac struct {
	hash.Hash
	sum [sha256.Size]byte
}

func newExport(e Export) *export {
	x := &export{Export: e}
	x.Path = cleanExportPath(e.Path)
	x.macs.New = func() any { return &mac{Hash: hmac.New(sha256.New, x.Key[:])} }
	return x
}

func cleanExportPath(p string) string { return path.Clean("/" + strings.TrimSpace(p)) }

func (x *export) allows(client netip.Addr) bool {
	for _, p := range x.Clients {
		if p.Contains(client) {
			return true
		}
	}
	return false
}

// sign computes what must follow the signed part of a handle. The mac goes back to x.macs after use.
func (m *mac) sign(signed []byte) []byte {
	m.Reset()
	m.Write(signed)
	return m.Sum(m.sum[:0])[:handleBytes-handleSigned]
}

// appendHandle writes nfs_fh3 of an inode.
func (x *export) appendHandle(b []byte, inode uint64, generation uint32) []byte {
	b = append(b, 0, 0, 0, handleBytes)
	start := len(b)
	b = append(b, handleMagic...)
	b = binary.BigEndian.AppendUint64(b, x.FSID)
	b = binary.BigEndian.AppendUint64(b, inode)
	b = binary.BigEndian.AppendUint32(b, generation)
	m := x.macs.Get().(*mac)
	b = append(b, m.sign(b[start:])...)
	x.macs.Put(m)
	return b
}

// object is what a verified handle names.
type object struct {
	x          *export
	inode      uint64
	generation uint32
}

// openHandle verifies a handle and that the client may use its export.
func (t *exportTable) openHandle(fh []byte, client netip.Addr) (object, Status) {
	if len(fh) != handleBytes || string(fh[:4]) != handleMagic {
		return object{}, StatusBadHandle
	}
	x := t.byFSID[binary.BigEndian.Uint64(fh[4:])]
	if x == nil {
		return object{}, StatusStale // of an export that is no more
	}
	m := x.macs.Get().(*mac)
	good := hmac.Equal(m.sign(fh[:handleSigned]), fh[handleSigned:])
	x.macs.Put(m)
	if !good {
		return object{}, StatusBadHandle
	}
	if !x.allows(client) {
		return object{}, StatusAcces
	}
	return object{x, binary.BigEndian.Uint64(fh[12:]), binary.BigEndian.Uint32(fh[20:])}, StatusOK
}

// exportTable is the exports at one instant; it is not changed after it was made.
type exportTable struct {
	made   time.Time
	list   []*export
	byFSID map[uint64]*export
}

// allows tells whether the client may use any export.
func (t *exportTable) allows(client netip.Addr) bool {
	for _, x := range t.list {
		if x.allows(client) {
			return true
		}
	}
	return false
}

// find returns the export of which p is the path or a path below, the longest, and the names that follow it.
func (t *exportTable) find(p string) (x *export, rest []string) {
	p = cleanExportPath(p)
	for _, y := range t.list {
		within := p == y.Path || y.Path == "/" || strings.HasPrefix(p, y.Path+"/")
		if within && (x == nil || len(y.Path) > len(x.Path)) {
			x = y
		}
	}
	if x == nil {
		return nil, nil
	}
	if tail := strings.Trim(strings.TrimPrefix(p, x.Path), "/"); tail != "" {
		rest = strings.Split(tail, "/")
	}
	return x, rest
}

// exportsFresh is how long a change of exports or of an allow list may take to reach calls with handles.
const exportsFresh = 250 * time.Millisecond

// exports returns the export table, made anew when it is no longer fresh.
func (s *Server) exports(now time.Time) *exportTable {
	t := s.table.Load()
	if t != nil && now.Sub(t.made) < exportsFresh {
		return t
	}
	return s.readExports(now)
}

func (s *Server) readExports(now time.Time) *exportTable {
	list := s.cfg.Namespace.Exports()
	t := &exportTable{made: now, byFSID: make(map[uint64]*export, len(list))}
	old := s.table.Load()
	for _, e := range list {
		var x *export
		if old != nil {
			x = old.byFSID[e.FSID]
		}
		if x == nil || !x.same(e) {
			x = newExport(e)
		}
		t.list = append(t.list, x)
		t.byFSID[x.FSID] = x
	}
	s.table.Store(t)
	return t
}

// same tells that an export did not change, so that its keyed hashes can be kept.
func (x *export) same(e Export) bool {
	if len(x.Clients) != len(e.Clients) || x.Path != cleanExportPath(e.Path) {
		return false
	}
	for i := range e.Clients {
		if x.Clients[i] != e.Clients[i] {
			return false
		}
	}
	return x.Root == e.Root && x.ReadOnly == e.ReadOnly && x.RootSquash == e.RootSquash && x.AllSquash == e.AllSquash &&
		x.AnonUID == e.AnonUID && x.AnonGID == e.AnonGID && x.Key == e.Key
}
