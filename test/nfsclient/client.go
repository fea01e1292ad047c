// Package nfsclient is a pipelined NFSv3 client for tests and load: one RPC per operation, nothing cached, nothing
// retried, so that what a server answered is exactly what the caller sees. RFC 1813 and RFC 5531 over one TCP connection.
package nfsclient

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Procedures of NFS version 3.
const (
	Null uint32 = iota
	GetAttr
	SetAttr
	Lookup
	Access
	ReadLink
	Read
	Write
	Create
	MkDir
	SymLink
	MkNod
	Remove
	RmDir
	Rename
	Link
	ReadDir
	ReadDirPlus
	FSStat
	FSInfo
	PathConf
	Commit
)

// How a WRITE asks to be stored.
const (
	Unstable uint32 = iota
	DataSync
	FileSync
)

const (
	programNFS   = 100003
	programMount = 100005
	replyMax     = 4 << 20
)

// ErrDisconnected: the connection ended before the reply; whether the call was carried out is unknown.
var ErrDisconnected = errors.New("nfs connection ended before the reply")

// Status is nfsstat3 when it is not NFS3_OK.
type Status uint32

func (s Status) Error() string { return fmt.Sprintf("nfs status %d", uint32(s)) }

// Statuses that tests ask for.
const (
	NoEnt    Status = 2
	Exist    Status = 17
	NotEmpty Status = 66
	Stale    Status = 70
)

// Handle is an opaque file handle.
type Handle string

// Attr is the part of fattr3 that tests look at.
type Attr struct {
	Type   uint32
	Mode   uint32
	Nlink  uint32
	Size   int64
	Used   int64
	FSID   uint64
	FileID uint64
}

// Client is one connection to an NFS server.
type Client struct {
	conn net.Conn
	auth []byte

	sending sync.Mutex
	out     *bufio.Writer
	corks   bool // Cork was called
	corked  bool // replies are being looked at, at whose end what was submitted meanwhile is sent

	mu      sync.Mutex // guards pending, xid, failed
	pending map[uint32]func(*Decoder, error)
	xid     uint32
	failed  error
	ended   chan struct{}
}

// Dial connects to addr, where both NFS and MOUNT may be served.
func Dial(addr string) (*Client, error) {
	conn, err := net.DialTimeout("tcp", addr, 10*time.Second)
	if err != nil {
		return nil, err
	}
	c := &Client{conn: conn, out: bufio.NewWriterSize(conn, 256<<10), pending: map[uint32]func(*Decoder, error){},
		xid: uint32(time.Now().UnixNano()), ended: make(chan struct{})}
	var body Encoder
	body.Uint32(0)
	body.Opaque([]byte("test"))
	body.Uint32(0) // uid
	body.Uint32(0) // gid
	body.Uint32(0) // no further groups
	var e Encoder
	e.Uint32(1) // AUTH_SYS
	e.Opaque(body)
	e.Uint32(0) // verifier: AUTH_NONE
	e.Uint32(0)
	c.auth = e
	go c.readReplies()
	return c, nil
}

// Close ends the connection; calls without a reply end with ErrDisconnected.
func (c *Client) Close() {
	c.conn.Close()
	<-c.ended
}

// Submit sends a call; done runs on the reader goroutine with the decoder standing behind the RPC header.
func (c *Client) Submit(program, proc uint32, args []byte, done func(*Decoder, error)) {
	c.sending.Lock()
	defer c.sending.Unlock()
	c.mu.Lock()
	if c.failed != nil {
		c.mu.Unlock()
		done(nil, ErrDisconnected)
		return
	}
	c.xid++
	xid := c.xid
	c.pending[xid] = done
	c.mu.Unlock()
	var head Encoder
	head.Uint32(1<<31 | uint32(24+len(c.auth)+len(args)))
	for _, v := range []uint32{xid, 0, 2, program, 3, proc} {
		head.Uint32(v)
	}
	c.out.Write(head)
	c.out.Write(c.auth)
	c.out.Write(args)
	if !c.corked {
		c.flushLocked()
	}
}

// Cork makes the client send what is submitted while it looks at replies when it has seen all that have arrived, in one piece. Linux's
// client does so: it corks its socket while calls wait to be sent. A done must not wait for other calls then.
func (c *Client) Cork() {
	c.sending.Lock()
	defer c.sending.Unlock()
	c.corks = true
}

// flushLocked sends what is in out; sending is held.
func (c *Client) flushLocked() {
	if err := c.out.Flush(); err != nil {
		c.conn.Close()
	}
}

// cork is told before each reply is read, and how much of the replies has arrived.
func (c *Client) cork(arrived int) {
	c.sending.Lock()
	defer c.sending.Unlock()
	if more := c.corks && arrived > 0; more != c.corked {
		c.corked = more
		c.flushLocked()
	}
}

func (c *Client) readReplies() {
	err := c.readAll()
	c.conn.Close()
	c.mu.Lock()
	c.failed = err
	lost := c.pending
	c.pending = nil
	c.mu.Unlock()
	for _, done := range lost {
		done(nil, ErrDisconnected)
	}
	close(c.ended)
}

func (c *Client) readAll() error {
	in := bufio.NewReaderSize(c.conn, 256<<10)
	for {
		c.cork(in.Buffered())
		var record []byte
		for last := false; !last; {
			var mark [4]byte
			if _, err := io.ReadFull(in, mark[:]); err != nil {
				return err
			}
			v := binary.BigEndian.Uint32(mark[:])
			last = v&(1<<31) != 0
			n := int(v &^ (1 << 31))
			if len(record)+n > replyMax {
				return fmt.Errorf("record of %d bytes", len(record)+n)
			}
			at := len(record)
			record = append(record, make([]byte, n)...)
			if _, err := io.ReadFull(in, record[at:]); err != nil {
				return err
			}
		}
		d := &Decoder{b: record}
		xid, kind, state := d.Uint32(), d.Uint32(), d.Uint32()
		c.mu.Lock()
		done, ok := c.pending[xid]
		delete(c.pending, xid)
		c.mu.Unlock()
		if !ok || kind != 1 {
			return fmt.Errorf("reply to no call: xid %d", xid)
		}
		if state != 0 {
			done(nil, fmt.Errorf("call denied: %d", d.Uint32()))
			continue
		}
		d.Uint32() // verifier
		d.Opaque()
		if accept := d.Uint32(); accept != 0 || d.err != nil {
			done(nil, fmt.Errorf("call not accepted: status %d", accept))
			continue
		}
		done(d, nil)
	}
}

// call waits for an NFS call's reply and takes its status off.
func (c *Client) call(proc uint32, args []byte) (*Decoder, error) {
	type reply struct {
		d   *Decoder
		err error
	}
	result := make(chan reply, 1)
	c.Submit(programNFS, proc, args, func(d *Decoder, err error) { result <- reply{d, err} })
	r := <-result
	if r.err != nil {
		return nil, r.err
	}
	if s := r.d.Uint32(); s != 0 {
		return nil, Status(s)
	}
	return r.d, nil
}

// Mount gives the root handle of an export.
func (c *Client) Mount(export string) (Handle, error) {
	type reply struct {
		h   Handle
		err error
	}
	var args Encoder
	args.String(export)
	result := make(chan reply, 1)
	c.Submit(programMount, 1, args, func(d *Decoder, err error) {
		if err == nil {
			if s := d.Uint32(); s != 0 {
				err = fmt.Errorf("mount of %s: status %d", export, s)
			}
		}
		if err != nil {
			result <- reply{err: err}
			return
		}
		h := Handle(d.Opaque())
		result <- reply{h, d.err}
	})
	r := <-result
	return r.h, r.err
}

func dirOp(dir Handle, name string) Encoder {
	var e Encoder
	e.Opaque([]byte(dir))
	e.String(name)
	return e
}

func handleOp(h Handle) Encoder {
	var e Encoder
	e.Opaque([]byte(h))
	return e
}

func (c *Client) GetAttr(h Handle) (Attr, error) {
	d, err := c.call(GetAttr, handleOp(h))
	if err != nil {
		return Attr{}, err
	}
	a := d.attr()
	return a, d.err
}

func (c *Client) Lookup(dir Handle, name string) (Handle, error) {
	d, err := c.call(Lookup, dirOp(dir, name))
	if err != nil {
		return "", err
	}
	h := Handle(d.Opaque())
	return h, d.err
}

// Create makes a file, GUARDED when it must not exist.
func (c *Client) Create(dir Handle, name string, guarded bool) (Handle, error) {
	e := dirOp(dir, name)
	e.Bool(guarded)
	e.sattr(0o644, -1)
	d, err := c.call(Create, e)
	if err != nil {
		return "", err
	}
	if !d.Bool() {
		return c.Lookup(dir, name)
	}
	h := Handle(d.Opaque())
	return h, d.err
}

func (c *Client) MkDir(dir Handle, name string) (Handle, error) {
	e := dirOp(dir, name)
	e.sattr(0o755, -1)
	d, err := c.call(MkDir, e)
	if err != nil {
		return "", err
	}
	if !d.Bool() {
		return c.Lookup(dir, name)
	}
	h := Handle(d.Opaque())
	return h, d.err
}

func (c *Client) Truncate(h Handle, size int64) error {
	e := handleOp(h)
	e.sattr(-1, size)
	e.Bool(false) // no guard
	_, err := c.call(SetAttr, e)
	return err
}

func (c *Client) Chmod(h Handle, mode int64) error {
	e := handleOp(h)
	e.sattr(mode, -1)
	e.Bool(false)
	_, err := c.call(SetAttr, e)
	return err
}

func (c *Client) Access(h Handle) error {
	e := handleOp(h)
	e.Uint32(0x3f)
	_, err := c.call(Access, e)
	return err
}

func (c *Client) Remove(dir Handle, name string) error {
	_, err := c.call(Remove, dirOp(dir, name))
	return err
}

func (c *Client) RmDir(dir Handle, name string) error {
	_, err := c.call(RmDir, dirOp(dir, name))
	return err
}

func (c *Client) Rename(from Handle, old string, to Handle, name string) error {
	e := dirOp(from, old)
	e = append(e, dirOp(to, name)...)
	_, err := c.call(Rename, e)
	return err
}

// Read fills p from off; it fails when the server gives less.
func (c *Client) Read(h Handle, p []byte, off int64) error {
	d, err := c.call(Read, readArgs(h, off, len(p)))
	if err != nil {
		return err
	}
	return d.readReply(p)
}

func readArgs(h Handle, off int64, n int) Encoder {
	e := handleOp(h)
	e.Uint64(uint64(off))
	e.Uint32(uint32(n))
	return e
}

func (d *Decoder) readReply(p []byte) error {
	d.postAttr()
	n := d.Uint32()
	d.Bool() // end of file
	data := d.Opaque()
	if d.err != nil {
		return d.err
	}
	if int(n) != len(p) || len(data) != len(p) {
		return fmt.Errorf("read of %d bytes gave %d", len(p), len(data))
	}
	copy(p, data)
	return nil
}

// SubmitRead sends a READ of len(p) bytes into p.
func (c *Client) SubmitRead(h Handle, p []byte, off int64, done func(error)) {
	c.Submit(programNFS, Read, readArgs(h, off, len(p)), func(d *Decoder, err error) {
		if err == nil {
			if s := d.Uint32(); s != 0 {
				err = Status(s)
			} else {
				err = d.readReply(p)
			}
		}
		done(err)
	})
}

// Written is the answer to a WRITE or COMMIT. Verifier changes when the server may have lost unstable data.
type Written struct {
	Committed uint32
	Verifier  [8]byte
}

// SubmitWrite sends a WRITE. A short write is an error.
func (c *Client) SubmitWrite(h Handle, p []byte, off int64, stable uint32, done func(Written, error)) {
	e := make(Encoder, 0, len(h)+len(p)+64)
	e.Opaque([]byte(h))
	e.Uint64(uint64(off))
	e.Uint32(uint32(len(p)))
	e.Uint32(stable)
	e.Opaque(p)
	c.Submit(programNFS, Write, e, func(d *Decoder, err error) {
		var w Written
		if err == nil {
			w, err = d.writeReply(len(p), stable)
		}
		done(w, err)
	})
}

func (d *Decoder) writeReply(n int, stable uint32) (Written, error) {
	if s := d.Uint32(); s != 0 {
		return Written{}, Status(s)
	}
	d.wcc()
	count := d.Uint32()
	w := Written{Committed: d.Uint32()}
	copy(w.Verifier[:], d.take(8))
	if d.err != nil {
		return w, d.err
	}
	if int(count) != n {
		return w, fmt.Errorf("write of %d bytes took %d", n, count)
	}
	if w.Committed < stable {
		return w, fmt.Errorf("write asked for stability %d and got %d", stable, w.Committed)
	}
	return w, nil
}

// Write sends a WRITE and waits.
func (c *Client) Write(h Handle, p []byte, off int64, stable uint32) (Written, error) {
	type reply struct {
		w   Written
		err error
	}
	result := make(chan reply, 1)
	c.SubmitWrite(h, p, off, stable, func(w Written, err error) { result <- reply{w, err} })
	r := <-result
	return r.w, r.err
}

// SubmitCommit sends a COMMIT of the whole file.
func (c *Client) SubmitCommit(h Handle, done func(Written, error)) {
	e := handleOp(h)
	e.Uint64(0)
	e.Uint32(0)
	c.Submit(programNFS, Commit, e, func(d *Decoder, err error) {
		var w Written
		if err == nil {
			if s := d.Uint32(); s != 0 {
				err = Status(s)
			} else {
				d.wcc()
				w.Committed = FileSync
				copy(w.Verifier[:], d.take(8))
				err = d.err
			}
		}
		done(w, err)
	})
}

// Commit sends a COMMIT of the whole file and waits.
func (c *Client) Commit(h Handle) (Written, error) {
	type reply struct {
		w   Written
		err error
	}
	result := make(chan reply, 1)
	c.SubmitCommit(h, func(w Written, err error) { result <- reply{w, err} })
	r := <-result
	return r.w, r.err
}

// Names lists a directory by READDIRPLUS, without "." and "..".
func (c *Client) Names(dir Handle) ([]string, error) {
	var names []string
	var cookie uint64
	var verifier [8]byte
	for range 100000 {
		e := handleOp(dir)
		e.Uint64(cookie)
		e = append(e, verifier[:]...)
		e.Uint32(8 << 10)
		e.Uint32(64 << 10)
		d, err := c.call(ReadDirPlus, e)
		if err != nil {
			return nil, err
		}
		d.postAttr()
		copy(verifier[:], d.take(8))
		for d.Bool() {
			d.Uint64() // file id
			name := string(d.Opaque())
			cookie = d.Uint64()
			d.postAttr()
			if d.Bool() {
				d.Opaque()
			}
			if name != "." && name != ".." {
				names = append(names, name)
			}
		}
		eof := d.Bool()
		if d.err != nil {
			return nil, d.err
		}
		if eof {
			return names, nil
		}
	}
	return nil, errors.New("directory has no end")
}
