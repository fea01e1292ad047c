package nfs

import (
	"context"
	"errors"
	"time"

	"varve/gateway/nfs/rpc"
	"varve/gateway/nfs/xdr"
)

// Programs served.
const (
	nfsProgram   = 100003
	nfsVersion   = 3
	mountProgram = 100005
	mountVersion = 3
)

// outcome is how a procedure ended.
type outcome uint8

const (
	// answered: the results were appended.
	answered outcome = iota
	// garbage: the arguments do not decode.
	garbage
	// busy: not without waiting; the call is run again where it may wait. Nothing was done.
	busy
	// submitted: the reply follows when Done is called.
	submitted
	// silent: no reply is right; the connection is closed.
	silent
)

// request is one call on its way through a procedure.
type request struct {
	rpc.Call
	d     xdr.Decoder // of the arguments
	table *exportTable
	now   time.Time
	// mayWait: on a goroutine of its own. Otherwise on the reader's, where nothing may wait.
	mayWait bool

	results int // where results begin in the buffer that run appends to

	// set on the way, for Observe:
	status Status
	bytes  int
}

// procedure is one procedure of a program. run appends the results to b.
type procedure struct {
	name string
	run  func(c *conn, ctx context.Context, q *request, b []byte) ([]byte, outcome)
	// waits: it always may have to wait.
	waits bool
	// once: it must not run twice for one call, so replies are kept for retransmissions.
	once bool
}

var nfsProcedures = [...]procedure{
	0:  {name: "NULL", run: null},
	1:  {name: "GETATTR", run: (*conn).getattr},
	2:  {name: "SETATTR", run: (*conn).setattr, waits: true, once: true},
	3:  {name: "LOOKUP", run: (*conn).lookup},
	4:  {name: "ACCESS", run: (*conn).access},
	5:  {name: "READLINK", run: (*conn).readlink, waits: true},
	6:  {name: "READ", run: (*conn).readFile},
	7:  {name: "WRITE", run: (*conn).writeFile},
	8:  {name: "CREATE", run: (*conn).create, waits: true, once: true},
	9:  {name: "MKDIR", run: (*conn).mkdir, waits: true, once: true},
	10: {name: "SYMLINK", run: (*conn).symlink, waits: true, once: true},
	11: {name: "MKNOD", run: (*conn).mknod, waits: true, once: true},
	12: {name: "REMOVE", run: (*conn).remove, waits: true, once: true},
	13: {name: "RMDIR", run: (*conn).rmdir, waits: true, once: true},
	14: {name: "RENAME", run: (*conn).rename, waits: true, once: true},
	15: {name: "LINK", run: (*conn).link, waits: true, once: true},
	16: {name: "READDIR", run: (*conn).readdir, waits: true},
	17: {name: "READDIRPLUS", run: (*conn).readdirplus, waits: true},
	18: {name: "FSSTAT", run: (*conn).fsstat, waits: true},
	19: {name: "FSINFO", run: (*conn).fsinfo},
	20: {name: "PATHCONF", run: (*conn).pathconf},
	21: {name: "COMMIT", run: (*conn).commit},
}

var mountProcedures = [...]procedure{
	0: {name: "MOUNT.NULL", run: null},
	1: {name: "MOUNT.MNT", run: (*conn).mnt, waits: true},
	2: {name: "MOUNT.DUMP", run: (*conn).dump},
	3: {name: "MOUNT.UMNT", run: (*conn).umnt},
	4: {name: "MOUNT.UMNTALL", run: (*conn).umntall},
	5: {name: "MOUNT.EXPORT", run: (*conn).exportList},
}

var errNotRPC = errors.New("not an rpc call")

// take decodes one record and runs or starts its call. An error ends the connection.
func (c *conn) take(ctx context.Context, record []byte) error {
	q := &c.request
	*q = request{table: c.table, now: c.now}
	if !rpc.DecodeCall(record, &q.Call) {
		return errNotRPC
	}
	c.s.calls.Add(1)
	c.room(ctx, 0)
	p, refused := c.find(q)
	if p == nil {
		c.s.denied.Add(1)
		var start int
		c.replies, start = rpc.BeginRecord(c.replies)
		c.replies = rpc.EndRecord(append(c.replies, refused...), start)
		return nil
	}
	if c.in.BytesMax == 0 {
		c.spoke.Store(true)
	}
	end := busy
	if !p.waits {
		c.replies, end = c.runProcedure(ctx, p, q, c.replies)
	}
	if end != submitted {
		c.mixed = true
	}
	switch end {
	case silent:
		c.lose()
	case busy:
		c.takeWaiting(ctx, p, *q)
	}
	return nil
}

// find returns the procedure that a call asks for, or the reply that refuses it.
func (c *conn) find(q *request) (p *procedure, refused []byte) {
	if q.RPCVersion != rpc.Version {
		return nil, rpc.AppendRPCMismatch(nil, q.XID)
	}
	if q.Auth != rpc.AuthOK {
		return nil, rpc.AppendAuthError(nil, q.XID, q.Auth)
	}
	var procedures []procedure
	switch q.Program {
	case nfsProgram:
		procedures = nfsProcedures[:]
	case mountProgram:
		procedures = mountProcedures[:]
	default:
		return nil, rpc.AppendAccepted(nil, q.XID, rpc.ProgUnavail)
	}
	if q.Version != nfsVersion { // MOUNT has the same
		return nil, rpc.AppendProgMismatch(nil, q.XID, nfsVersion, nfsVersion)
	}
	if q.Proc >= uint32(len(procedures)) {
		return nil, rpc.AppendAccepted(nil, q.XID, rpc.ProcUnavail)
	}
	return &procedures[q.Proc], nil
}

// runProcedure runs p and appends the whole reply, if there is one.
func (c *conn) runProcedure(ctx context.Context, p *procedure, q *request, b []byte) ([]byte, outcome) {
	q.d = xdr.NewDecoder(q.Args)
	before := len(b)
	b, start := rpc.BeginRecord(b)
	b = rpc.AppendAccepted(b, q.XID, rpc.Success)
	q.results = len(b)
	b, end := p.run(c, ctx, q, b)
	switch end {
	case answered:
		b = rpc.EndRecord(b, start)
		c.observe(p, q)
	case garbage:
		b = rpc.AppendAccepted(b[:start+4], q.XID, rpc.GarbageArgs)
		b = rpc.EndRecord(b, start)
	default:
		b = b[:before]
	}
	return b, end
}

func (c *conn) observe(p *procedure, q *request) {
	if c.s.cfg.Observe != nil {
		c.s.cfg.Observe(Observation{p.name, q.status, q.bytes, time.Since(q.now)})
	}
}

// takeWaiting runs a call on a goroutine of its own. The record is the reader's, so what is needed of it is copied.
func (c *conn) takeWaiting(ctx context.Context, p *procedure, q request) {
	var key replayKey
	if p.once {
		key = newReplayKey(c.peer, &q.Call)
	}
	q.Args = append([]byte(nil), q.Args...)
	q.Cred.Machine = nil
	q.mayWait = true
	bytes := int64(len(q.Args))
	if p.name == "READ" {
		bytes += int64(q.bytes)
	}
	c.wait(ctx, bytes, func() []byte {
		run := func() ([]byte, outcome) { return c.runProcedure(ctx, p, &q, nil) }
		var b []byte
		var end outcome
		if p.once {
			b, end = c.s.replays.once(ctx, key, c.s, run)
		} else {
			b, end = run()
		}
		if end == silent {
			c.lose()
			return nil
		}
		return b
	})
}

// null answers NULL: no arguments, no results.
func null(_ *conn, _ context.Context, _ *request, b []byte) ([]byte, outcome) { return b, answered }

// fail ends a call with a status; append whatever the procedure's failure arm carries after it.
func (q *request) fail(b []byte, s Status) []byte {
	q.status = s
	return xdr.AppendUint32(b, uint32(s))
}

// open reads and verifies a handle and squashes the credentials for its export.
func (c *conn) open(q *request) (object, Status) {
	fh := q.d.Opaque(handleBytesMax)
	if q.d.Bad() {
		return object{}, StatusBadHandle
	}
	o, s := q.table.openHandle(fh, c.peer)
	if s == StatusOK {
		o.x.squash(&q.Cred)
	}
	return o, s
}

// attr returns an object's attributes.
func (c *conn) attr(ctx context.Context, o object) (Attr, Status, error) {
	a, err := c.s.cfg.Namespace.Attr(ctx, o.x.FSID, o.inode, o.generation)
	return a, toStatus(err), err
}

// postOp returns the attributes after a call, nil if they cannot be had.
func (c *conn) postOp(ctx context.Context, o object) *Attr {
	if o.x == nil {
		return nil
	}
	a, err := c.s.cfg.Namespace.Attr(ctx, o.x.FSID, o.inode, o.generation)
	if err != nil {
		return nil
	}
	return &a
}

func (o object) fsid() uint64 {
	if o.x == nil {
		return 0
	}
	return o.x.FSID
}

func (o object) key() inodeKey { return inodeKey{o.fsid(), o.inode} }
