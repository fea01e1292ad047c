package nfstest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"varve/gateway/nfs"
	"varve/gateway/nfs/rpc"
	"varve/gateway/nfs/xdr"
)

// Programs and their version.
const (
	NFS     = 100003
	Mount   = 100005
	Version = 3
)

// Client is a raw NFS client on one connection. It checks that every reply is exactly as long as its results. It is not for
// concurrent use.
type Client struct {
	Conn net.Conn
	Cred rpc.Credentials
	XID  uint32
}

// Dial connects as root.
func Dial(addr string) (*Client, error) {
	nc, err := net.DialTimeout("tcp", addr, 5*time.Second)
	if err != nil {
		return nil, err
	}
	return &Client{Conn: nc, Cred: rpc.Credentials{Flavour: rpc.FlavourSys, Machine: []byte("test")}, XID: 1000}, nil
}

// Close closes the connection.
func (c *Client) Close() error { return c.Conn.Close() }

// Record is a call as it goes over the wire.
func (c *Client) Record(xid, prog, vers, proc uint32, args []byte) []byte {
	b, start := rpc.BeginRecord(nil)
	b = rpc.AppendCall(b, xid, prog, vers, proc, c.Cred)
	return rpc.EndRecord(append(b, args...), start)
}

// Send sends a call and returns its xid.
func (c *Client) Send(prog, vers, proc uint32, args []byte) (uint32, error) {
	c.XID++
	_, err := c.Conn.Write(c.Record(c.XID, prog, vers, proc, args))
	return c.XID, err
}

// Receive returns the next reply: its xid and what follows the message type.
func (c *Client) Receive() (xid uint32, body []byte, err error) {
	if err := c.Conn.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return 0, nil, err
	}
	var mark [4]byte
	if _, err := io.ReadFull(c.Conn, mark[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(mark[:])
	if n>>31 == 0 || n&^(1<<31) > 4<<20 || n&^(1<<31) < 12 {
		return 0, nil, fmt.Errorf("bad record mark %#x", n)
	}
	b := make([]byte, n&^(1<<31))
	if _, err := io.ReadFull(c.Conn, b); err != nil {
		return 0, nil, err
	}
	if kind := binary.BigEndian.Uint32(b[4:]); kind != 1 {
		return 0, nil, fmt.Errorf("message type %d is not a reply", kind)
	}
	return binary.BigEndian.Uint32(b), b[8:], nil
}

// ErrNotAccepted is wrapped by Call's errors for replies without results.
var ErrNotAccepted = errors.New("call not accepted")

// Results returns the results in a reply's body.
func Results(body []byte) ([]byte, error) {
	d := xdr.NewDecoder(body)
	denied, _, _, stat := d.Uint32(), d.Uint32(), d.Uint32(), d.Uint32()
	if d.Bad() || denied != 0 || stat != 0 {
		return nil, fmt.Errorf("%w: % x", ErrNotAccepted, body)
	}
	return d.Rest(), nil
}

// Call makes one call and returns its results.
func (c *Client) Call(prog, vers, proc uint32, args []byte) ([]byte, error) {
	xid, err := c.Send(prog, vers, proc, args)
	if err != nil {
		return nil, err
	}
	got, body, err := c.Receive()
	if err != nil {
		return nil, err
	}
	if got != xid {
		return nil, fmt.Errorf("reply to %d, want %d", got, xid)
	}
	return Results(body)
}

// Wcc is wcc_data.
type Wcc struct {
	HasPre  bool
	PreSize uint64
	Mtime   time.Time
	Ctime   time.Time
	Post    nfs.Attr
	HasPost bool
}

// Reply is the results of any procedure; only what the procedure returns is set.
type Reply struct {
	Status   nfs.Status
	Handle   []byte
	Attr     nfs.Attr
	HasAttr  bool
	Wcc      Wcc
	Wcc2     Wcc
	Count    uint32
	EOF      bool
	Data     []byte
	Stable   uint32
	Verifier [8]byte
	Access   uint32
	Entries  []Entry
	Numbers  []uint64
	Target   string
}

// Entry is one entry of a listing.
type Entry struct {
	Cookie  uint64
	FileID  uint64
	Name    string
	HasAttr bool
	Attr    nfs.Attr
	Handle  []byte
}

// ReadAttr reads fattr3.
func ReadAttr(d *xdr.Decoder) (a nfs.Attr) {
	a.Kind = nfs.Kind(d.Uint32())
	a.Mode, a.Nlink, a.UID, a.GID = d.Uint32(), d.Uint32(), d.Uint32(), d.Uint32()
	a.Size, a.Used = int64(d.Uint64()), int64(d.Uint64())
	d.Uint64()
	a.FSID, a.Inode = d.Uint64(), d.Uint64()
	a.Atime, a.Mtime, a.Ctime = readTime(d), readTime(d), readTime(d)
	return a
}

func readTime(d *xdr.Decoder) time.Time {
	s, ns := d.Uint32(), d.Uint32()
	return time.Unix(int64(s), int64(ns))
}

func readPostOp(d *xdr.Decoder) (a nfs.Attr, ok bool) {
	if !d.Bool() {
		return a, false
	}
	return ReadAttr(d), true
}

func readWcc(d *xdr.Decoder) (w Wcc) {
	if w.HasPre = d.Bool(); w.HasPre {
		w.PreSize = d.Uint64()
		w.Mtime, w.Ctime = readTime(d), readTime(d)
	}
	w.Post, w.HasPost = readPostOp(d)
	return w
}

// Decode reads the results of an NFS procedure, every arm of RFC 1813, to the last byte.
func Decode(proc uint32, results []byte) (r Reply, err error) {
	d := xdr.NewDecoder(results)
	r.Status = nfs.Status(d.Uint32())
	decodeArm(proc, &d, &r, r.Status == nfs.StatusOK)
	if d.Bad() || len(d.Rest()) > 0 {
		return r, fmt.Errorf("results of procedure %d do not decode (%d bytes left): % x", proc, len(d.Rest()), results)
	}
	return r, nil
}

func decodeArm(proc uint32, d *xdr.Decoder, r *Reply, ok bool) {
	handle := func() { r.Handle = d.Opaque(64) }
	postOp := func() { r.Attr, r.HasAttr = readPostOp(d) }
	switch proc {
	case 1: // GETATTR
		if ok {
			r.Attr, r.HasAttr = ReadAttr(d), true
		}
	case 2, 12, 13: // SETATTR REMOVE RMDIR
		r.Wcc = readWcc(d)
	case 3: // LOOKUP
		if ok {
			handle()
			postOp()
		}
		r.Wcc.Post, r.Wcc.HasPost = readPostOp(d)
	case 4: // ACCESS
		postOp()
		if ok {
			r.Access = d.Uint32()
		}
	case 5: // READLINK
		postOp()
		if ok {
			r.Target = string(d.Opaque(1 << 20))
		}
	case 6: // READ
		postOp()
		if ok {
			r.Count = d.Uint32()
			r.EOF = d.Bool()
			r.Data = d.Opaque(1 << 21)
			if int(r.Count) != len(r.Data) {
				d.Fail()
			}
		}
	case 7: // WRITE
		r.Wcc = readWcc(d)
		if ok {
			r.Count, r.Stable = d.Uint32(), d.Uint32()
			copy(r.Verifier[:], d.Fixed(8))
		}
	case 8, 9, 10, 11: // CREATE MKDIR SYMLINK MKNOD
		if ok {
			if d.Bool() {
				handle()
			}
			postOp()
		}
		r.Wcc = readWcc(d)
	case 14: // RENAME
		r.Wcc, r.Wcc2 = readWcc(d), readWcc(d)
	case 15: // LINK
		postOp()
		r.Wcc = readWcc(d)
	case 16, 17: // READDIR READDIRPLUS
		postOp()
		if ok {
			copy(r.Verifier[:], d.Fixed(8))
			for d.Bool() {
				e := Entry{FileID: d.Uint64(), Name: string(d.Opaque(1024)), Cookie: d.Uint64()}
				if proc == 17 {
					e.Attr, e.HasAttr = readPostOp(d)
					if d.Bool() {
						e.Handle = d.Opaque(64)
					}
				}
				r.Entries = append(r.Entries, e)
			}
			r.EOF = d.Bool()
		}
	case 18, 19, 20: // FSSTAT FSINFO PATHCONF
		postOp()
		if ok {
			for range map[uint32]int{18: 6, 19: 0, 20: 0}[proc] {
				r.Numbers = append(r.Numbers, d.Uint64())
			}
			words := map[uint32]int{18: 1, 19: 7, 20: 6}[proc]
			for range words {
				r.Numbers = append(r.Numbers, uint64(d.Uint32()))
			}
			if proc == 19 {
				r.Numbers = append(r.Numbers, d.Uint64(), uint64(d.Uint32()), uint64(d.Uint32()), uint64(d.Uint32()))
			}
		}
	case 21: // COMMIT
		r.Wcc = readWcc(d)
		if ok {
			copy(r.Verifier[:], d.Fixed(8))
		}
	}
}

// Do makes an NFS call and decodes its results.
func (c *Client) Do(proc uint32, args []byte) (Reply, error) {
	results, err := c.Call(NFS, Version, proc, args)
	if err != nil {
		return Reply{}, err
	}
	return Decode(proc, results)
}

// MountExport mounts a path and returns the root's handle.
func (c *Client) MountExport(path string) ([]byte, nfs.Status, error) {
	results, err := c.Call(Mount, Version, 1, xdr.AppendString(nil, path))
	if err != nil {
		return nil, 0, err
	}
	d := xdr.NewDecoder(results)
	s := nfs.Status(d.Uint32())
	if s != nfs.StatusOK {
		return nil, s, nil
	}
	fh := d.Opaque(64)
	for range d.Uint32() {
		d.Uint32()
		if d.Bad() {
			break
		}
	}
	if d.Bad() {
		return nil, s, errors.New("mount results do not decode")
	}
	return fh, s, nil
}

// Args of the procedures.

// HandleArgs is a handle alone, or the first argument.
func HandleArgs(fh []byte) []byte { return xdr.AppendOpaque(nil, fh) }

// NameArgs is a directory and a name.
func NameArgs(dir []byte, name string) []byte { return xdr.AppendString(HandleArgs(dir), name) }

// ReadArgs is READ.
func ReadArgs(fh []byte, off uint64, count uint32) []byte {
	return xdr.AppendUint32(xdr.AppendUint64(HandleArgs(fh), off), count)
}

// WriteArgs is WRITE; stable is 0 UNSTABLE, 1 DATA_SYNC, 2 FILE_SYNC.
func WriteArgs(fh []byte, off uint64, data []byte, stable uint32) []byte {
	b := xdr.AppendUint64(HandleArgs(fh), off)
	b = xdr.AppendUint32(b, uint32(len(data)))
	return xdr.AppendOpaque(xdr.AppendUint32(b, stable), data)
}

// SetArgs is sattr3 with an optional mode and size.
func SetArgs(mode *uint32, size *uint64) []byte {
	b := xdr.AppendBool(nil, mode != nil)
	if mode != nil {
		b = xdr.AppendUint32(b, *mode)
	}
	b = append(b, make([]byte, 8)...)
	b = xdr.AppendBool(b, size != nil)
	if size != nil {
		b = xdr.AppendUint64(b, *size)
	}
	return append(b, make([]byte, 8)...)
}

// CreateArgs is CREATE with mode 0 UNCHECKED or 1 GUARDED.
func CreateArgs(dir []byte, name string, how uint32, size *uint64) []byte {
	mode := uint32(0o644)
	return append(xdr.AppendUint32(NameArgs(dir, name), how), SetArgs(&mode, size)...)
}

// ExclusiveArgs is CREATE EXCLUSIVE.
func ExclusiveArgs(dir []byte, name string, verf [8]byte) []byte {
	return append(xdr.AppendUint32(NameArgs(dir, name), 2), verf[:]...)
}

// ListArgs is READDIR, or READDIRPLUS when dircount is not 0.
func ListArgs(dir []byte, cookie uint64, dircount, count uint32) []byte {
	b := xdr.AppendUint64(HandleArgs(dir), cookie)
	b = append(b, make([]byte, 8)...)
	if dircount > 0 {
		b = xdr.AppendUint32(b, dircount)
	}
	return xdr.AppendUint32(b, count)
}
