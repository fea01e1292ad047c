package nfs

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/go-git/go-billy/v5"
	gonfs "github.com/willscott/go-nfs"
	gofile "github.com/willscott/go-nfs/file"

	"varve/gateway/nfs/rpc"
	"varve/gateway/nfs/xdr"
)

// forward runs MKDIR, SYMLINK, MKNOD and READLINK in go-nfs, over connections in memory. The front has verified the handle,
// the name and the caller's permission before. go-nfs gets the call with a handle that is good for this one call: the number
// under which forward finds what the call is about, a forwarded, which is the file system that go-nfs then works on.
//
// go-nfs's replies carry neither our handles nor our attributes, and it turns most errors of a file system into ACCES, so of
// a reply only the status and a link's target are used: an error that the namespace gave decides the status, and the
// attributes come from where all others come from.
type forward struct {
	s     *Server
	mu    sync.Mutex
	next  uint64
	calls map[uint64]*forwarded
	idle  []net.Conn
	made  chan net.Conn // to go-nfs's Accept
	ended chan struct{} // run has ended
	once  sync.Once
}

const (
	forwardsIdleMax = 8
	forwardTimeout  = 30 * time.Second
)

func (f *forward) init(s *Server) {
	f.s = s
	f.calls = make(map[uint64]*forwarded)
	f.made = make(chan net.Conn)
	f.ended = make(chan struct{})
}

// quietGoNFS keeps go-nfs from writing to stderr: its logger is one for the process.
var quietGoNFS sync.Once

// run is go-nfs's server. It ends with ctx.
func (f *forward) run(ctx context.Context) {
	quietGoNFS.Do(func() { gonfs.Log.SetLevel(gonfs.PanicLevel) })
	server := &gonfs.Server{Handler: goHandler{f}, ID: f.s.cfg.Verifier(), Context: ctx}
	stop := context.AfterFunc(ctx, func() { f.Close() })
	defer stop()
	err := server.Serve(f)
	f.Close()
	if err != nil && !errors.Is(err, net.ErrClosed) {
		f.s.log.Error("go-nfs ended", "err", err)
	}
	f.mu.Lock()
	idle := f.idle
	f.idle = nil
	f.mu.Unlock()
	for _, nc := range idle {
		nc.Close()
	}
}

// Accept, Close and Addr make forward the listener of go-nfs.
func (f *forward) Accept() (net.Conn, error) {
	select {
	case nc := <-f.made:
		return nc, nil
	case <-f.ended:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (f *forward) Close() error {
	f.once.Do(func() { close(f.ended) })
	return nil
}

// Addr implements net.Listener.
func (f *forward) Addr() net.Addr { return &net.UnixAddr{Name: "go-nfs", Net: "pipe"} }

// conn returns a connection to go-nfs that nobody else uses.
func (f *forward) conn(ctx context.Context) (net.Conn, error) {
	f.mu.Lock()
	if n := len(f.idle); n > 0 {
		nc := f.idle[n-1]
		f.idle = f.idle[:n-1]
		f.mu.Unlock()
		return nc, nil
	}
	f.mu.Unlock()
	ours, theirs := net.Pipe()
	select {
	case f.made <- theirs:
		return ours, nil
	case <-f.ended:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (f *forward) put(nc net.Conn) {
	f.mu.Lock()
	select {
	case <-f.ended:
	default:
		if len(f.idle) < forwardsIdleMax {
			f.idle = append(f.idle, nc)
			nc = nil
		}
	}
	f.mu.Unlock()
	if nc != nil {
		nc.Close()
	}
}

// do has go-nfs run a procedure on w, whose arguments after the handle are args. It returns the status and what follows it.
func (f *forward) do(ctx context.Context, w *forwarded, proc uint32, args []byte) (Status, []byte, error) {
	f.mu.Lock()
	f.next++
	number := f.next
	f.calls[number] = w
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		delete(f.calls, number)
		f.mu.Unlock()
	}()
	nc, err := f.conn(ctx)
	if err != nil {
		return 0, nil, fmt.Errorf("reach go-nfs: %w", err)
	}
	reply, err := exchange(ctx, nc, uint32(number), number, proc, args)
	if err != nil {
		nc.Close()
		return 0, nil, fmt.Errorf("procedure %d in go-nfs: %w", proc, err)
	}
	f.put(nc)
	d := xdr.NewDecoder(reply)
	s := Status(d.Uint32())
	if w.err != nil {
		s = toStatus(w.err)
	}
	return s, d.Rest(), w.err
}

var errGoNFS = errors.New("not the reply expected")

// exchange makes one call and returns the results.
func exchange(ctx context.Context, nc net.Conn, xid uint32, handle uint64, proc uint32, args []byte) ([]byte, error) {
	stop := context.AfterFunc(ctx, func() { nc.Close() })
	defer stop()
	nc.SetDeadline(time.Now().Add(forwardTimeout))
	b, start := rpc.BeginRecord(nil)
	b = rpc.AppendCall(b, xid, nfsProgram, nfsVersion, proc, rpc.Credentials{})
	b = xdr.AppendOpaque(b, binary.BigEndian.AppendUint64(nil, handle))
	b = rpc.EndRecord(append(b, args...), start)
	if _, err := nc.Write(b); err != nil {
		return nil, err
	}
	var mark [4]byte
	if _, err := io.ReadFull(nc, mark[:]); err != nil {
		return nil, err
	}
	reply := make([]byte, min(binary.BigEndian.Uint32(mark[:])&^(1<<31), rpc.RecordBytesMax))
	if _, err := io.ReadFull(nc, reply); err != nil {
		return nil, err
	}
	accepted := rpc.AppendAccepted(nil, xid, rpc.Success)
	if len(reply) < len(accepted)+4 || string(reply[:len(accepted)]) != string(accepted) {
		return nil, errGoNFS
	}
	return reply[len(accepted):], nil
}

// mkdir, symlink and mknod make an object by way of go-nfs.

func (c *conn) mkdir(ctx context.Context, q *request, b []byte) ([]byte, outcome) {
	n := c.readNamed(q, newName)
	set, _ := readSetAttr(&q.d)
	if q.d.Bad() {
		return b, garbage
	}
	return c.forwardNew(ctx, q, b, n, set, &forwarded{kind: Dir, mode: 0o755}, sattrUnset)
}

func (c *conn) symlink(ctx context.Context, q *request, b []byte) ([]byte, outcome) {
	n := c.readNamed(q, newName)
	set, _ := readSetAttr(&q.d)
	target := q.d.Opaque(rpc.RecordBytesMax)
	if q.d.Bad() {
		return b, garbage
	}
	if len(target) > pathBytesMax && n.status == StatusOK {
		n.status = StatusNameTooLong
	}
	if len(target) == 0 && n.status == StatusOK {
		n.status = StatusInval
	}
	target = target[:min(len(target), pathBytesMax)]
	args := xdr.AppendOpaque(append([]byte(nil), sattrUnset...), target)
	return c.forwardNew(ctx, q, b, n, set, &forwarded{kind: Symlink, mode: 0o777, target: string(target)}, args)
}

func (c *conn) mknod(ctx context.Context, q *request, b []byte) ([]byte, outcome) {
	n := c.readNamed(q, newName)
	const blockDevice, charDevice = 3, 4
	kind := q.d.Uint32()
	var set SetAttr
	s := StatusOK
	switch kind {
	case blockDevice, charDevice:
		set, _ = readSetAttr(&q.d)
		q.d.Uint64()
		s = StatusNotSupp // nobody keeps device files on a datastore, and go-nfs answers OK without making one
	case uint32(Socket), uint32(FIFO):
		set, _ = readSetAttr(&q.d)
	default:
		s = StatusBadType
	}
	if q.d.Bad() {
		return b, garbage
	}
	if n.status == StatusOK {
		n.status = s
	}
	args := append(xdr.AppendUint32(nil, kind), sattrUnset...)
	return c.forwardNew(ctx, q, b, n, set, &forwarded{kind: Kind(kind), mode: 0o644}, args)
}

// sattrUnset is an sattr3 that sets nothing: the namespace creates an object with its attributes, go-nfs would set them later.
var sattrUnset = make([]byte, 6*4)

// forwardNew checks what every new object needs, has go-nfs make w, and answers.
func (c *conn) forwardNew(
	ctx context.Context, q *request, b []byte, n named, set SetAttr, w *forwarded, args []byte,
) ([]byte, outcome) {
	if n.status != StatusOK {
		return noWcc(q.fail(b, n.status)), answered
	}
	d := c.beginDir(ctx, q, n.dir)
	s := d.status
	if s == StatusOK {
		w.spec, s = newOwner(q, &d.pre, &set, w.kind, w.mode)
	}
	var err error
	if s == StatusOK {
		w.spec.Target, w.spec.Guarded = w.target, true
		w.ctx, w.ns, w.dir, w.at, w.name = withCaller(ctx, &q.Cred), c.s.cfg.Namespace, n.dir, d.pre, n.name
		proc := map[Kind]uint32{Dir: 9, Symlink: 10, Socket: 11, FIFO: 11}[w.kind]
		s, _, err = c.s.forward.do(ctx, w, proc, append(xdr.AppendString(nil, n.name), args...))
		if err != nil && w.err == nil && w.created.Generation == 0 {
			s = StatusServerFault
		}
	}
	if s == StatusOK && err == nil && w.created.Generation == 0 {
		s = StatusServerFault
	}
	if after, change := times(set); s == StatusOK && change {
		w.created, err = c.s.cfg.Namespace.SetAttr(withCaller(ctx, &q.Cred), n.dir.x.FSID, w.created.Inode, after)
		s = toStatus(err)
	}
	if unknownOutcome(err) {
		c.s.changes.end(d.ch)
		return b, silent
	}
	return c.appendCreated(ctx, q, b, &d, s, &w.created), answered
}

func (c *conn) readlink(ctx context.Context, q *request, b []byte) ([]byte, outcome) {
	o, s := c.open(q)
	if q.d.Bad() {
		return b, garbage
	}
	if s != StatusOK {
		return appendPostOp(q.fail(b, s), 0, nil), answered
	}
	a, s, _ := c.attr(ctx, o)
	if s != StatusOK {
		return appendPostOp(q.fail(b, s), 0, nil), answered
	}
	if a.Kind != Symlink {
		return appendPostOp(q.fail(b, StatusInval), o.x.FSID, &a), answered
	}
	w := &forwarded{ctx: ctx, ns: c.s.cfg.Namespace, dir: o, at: a}
	s, results, err := c.s.forward.do(ctx, w, 5, nil)
	switch {
	case unknownOutcome(err):
		return b, silent
	case err != nil && w.err == nil:
		s = StatusServerFault
	}
	b = appendPostOp(q.fail(b, s), o.x.FSID, &a)
	if s != StatusOK {
		return b, answered
	}
	d := xdr.NewDecoder(results)
	if d.Bool() {
		d.Fixed(attrBytes)
	}
	target := d.Opaque(pathBytesMax)
	if d.Bad() {
		return appendPostOp(q.failAgain(b, StatusServerFault), o.x.FSID, &a), answered
	}
	return xdr.AppendOpaque(b, target), answered
}

// goHandler is what go-nfs asks for a handle's file system.
type goHandler struct{ f *forward }

func (h goHandler) FromHandle(fh []byte) (billy.Filesystem, []string, error) {
	if len(fh) != 8 {
		return nil, nil, ErrStale
	}
	h.f.mu.Lock()
	w := h.f.calls[binary.BigEndian.Uint64(fh)]
	h.f.mu.Unlock()
	if w == nil {
		return nil, nil, ErrStale
	}
	return w, []string{}, nil
}

// Mount is never forwarded. It may not return a nil file system all the same.
func (h goHandler) Mount(context.Context, net.Conn, gonfs.MountRequest) (gonfs.MountStatus, billy.Filesystem, []gonfs.AuthFlavor) {
	return gonfs.MountStatusErrAcces, &forwarded{}, nil
}

func (h goHandler) Change(fs billy.Filesystem) billy.Change {
	w, ok := fs.(*forwarded)
	if !ok {
		return nil
	}
	return w
}

func (h goHandler) FSStat(context.Context, billy.Filesystem, *gonfs.FSStat) error {
	return billy.ErrNotSupported
}
func (h goHandler) ToHandle(billy.Filesystem, []string) []byte      { return []byte{0, 0, 0, 0} }
func (h goHandler) InvalidateHandle(billy.Filesystem, []byte) error { return nil }
func (h goHandler) HandleLimit() int                                { return 1 << 30 }

// forwarded is one call, as the file system that go-nfs sees. The path "" is the inode that the call's handle names, a path
// of one name is the new object.
type forwarded struct {
	ctx    context.Context // of this one call
	ns     Namespace
	dir    object
	at     Attr
	name   string
	kind   Kind
	mode   uint32
	target string
	spec   CreateSpec

	created Attr
	err     error
}

func (w *forwarded) make(kind Kind) error {
	if w.spec.Kind != kind {
		w.err = ErrInvalid
		return w.err
	}
	a, _, err := w.ns.Create(w.ctx, w.dir.x.FSID, w.dir.inode, w.name, w.spec)
	if err != nil {
		w.err = err
		return err
	}
	w.created = a
	return nil
}

// Stat implements billy.Basic.
func (w *forwarded) Stat(path string) (os.FileInfo, error) { return w.Lstat(path) }

// Lstat implements billy.Symlink.
func (w *forwarded) Lstat(path string) (os.FileInfo, error) {
	switch {
	case path == "":
		return forwardedInfo{"", w.at}, nil
	case path != w.name:
		return nil, os.ErrNotExist
	case w.created.Generation != 0:
		return forwardedInfo{path, w.created}, nil
	}
	a, err := w.ns.Lookup(w.ctx, w.dir.x.FSID, w.dir.inode, path)
	switch {
	case errors.Is(err, ErrNotFound):
		return nil, os.ErrNotExist
	case err != nil:
		w.err = err
		return nil, err
	}
	return forwardedInfo{path, a}, nil
}

// MkdirAll implements billy.Dir.
func (w *forwarded) MkdirAll(string, os.FileMode) error { return w.make(Dir) }

// Symlink implements billy.Symlink.
func (w *forwarded) Symlink(string, string) error { return w.make(Symlink) }

// Mkfifo and Socket implement gonfs.UnixChange.
func (w *forwarded) Mkfifo(string, uint32) error { return w.make(FIFO) }

// Socket implements gonfs.UnixChange.
func (w *forwarded) Socket(string) error { return w.make(Socket) }

// Readlink implements billy.Symlink.
func (w *forwarded) Readlink(string) (string, error) {
	target, err := w.ns.Readlink(w.ctx, w.dir.x.FSID, w.dir.inode)
	w.err = err
	return target, err
}

// Join implements billy.Basic.
func (w *forwarded) Join(elem ...string) string {
	if len(elem) == 0 {
		return ""
	}
	return elem[len(elem)-1]
}

// The rest of billy.Filesystem and gonfs.UnixChange is never reached by what is forwarded.

func (w *forwarded) Root() string                      { return "" }
func (w *forwarded) Create(string) (billy.File, error) { return nil, billy.ErrNotSupported }
func (w *forwarded) Open(string) (billy.File, error)   { return nil, billy.ErrNotSupported }
func (w *forwarded) OpenFile(string, int, os.FileMode) (billy.File, error) {
	return nil, billy.ErrNotSupported
}
func (w *forwarded) Rename(string, string) error                 { return billy.ErrNotSupported }
func (w *forwarded) Remove(string) error                         { return billy.ErrNotSupported }
func (w *forwarded) TempFile(string, string) (billy.File, error) { return nil, billy.ErrNotSupported }
func (w *forwarded) ReadDir(string) ([]os.FileInfo, error)       { return nil, billy.ErrNotSupported }
func (w *forwarded) Chroot(string) (billy.Filesystem, error)     { return nil, billy.ErrNotSupported }
func (w *forwarded) Chmod(string, os.FileMode) error             { return billy.ErrNotSupported }
func (w *forwarded) Lchown(string, int, int) error               { return billy.ErrNotSupported }
func (w *forwarded) Chown(string, int, int) error                { return billy.ErrNotSupported }
func (w *forwarded) Chtimes(string, time.Time, time.Time) error  { return billy.ErrNotSupported }
func (w *forwarded) Mknod(string, uint32, uint32, uint32) error  { return billy.ErrNotSupported }
func (w *forwarded) Link(string, string) error                   { return billy.ErrNotSupported }

var _ gonfs.UnixChange = (*forwarded)(nil)

// forwardedInfo is Attr as os.FileInfo.
type forwardedInfo struct {
	name string
	a    Attr
}

func (i forwardedInfo) Name() string       { return i.name }
func (i forwardedInfo) Size() int64        { return i.a.Size }
func (i forwardedInfo) ModTime() time.Time { return i.a.Mtime }
func (i forwardedInfo) IsDir() bool        { return i.a.Kind == Dir }

func (i forwardedInfo) Mode() os.FileMode {
	m := os.FileMode(i.a.Mode & 0o777)
	switch i.a.Kind {
	case Dir:
		m |= os.ModeDir
	case Symlink:
		m |= os.ModeSymlink
	case Socket:
		m |= os.ModeSocket
	case FIFO:
		m |= os.ModeNamedPipe
	}
	return m
}

func (i forwardedInfo) Sys() any {
	return gofile.FileInfo{Nlink: i.a.Nlink, UID: i.a.UID, GID: i.a.GID, Fileid: i.a.Inode}
}
