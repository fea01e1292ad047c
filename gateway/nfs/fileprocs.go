package nfs

import (
	"context"
	"errors"

	"varve/gateway/nfs/rpc"
	"varve/gateway/nfs/xdr"
	"varve/volumedriver/blockio"
)

// stable_how of WRITE.
const (
	unstable = 0
	fileSync = 2
)

func (c *conn) getattr(ctx context.Context, q *request, b []byte) ([]byte, outcome) {
	o, s := c.open(q)
	if q.d.Bad() {
		return b, garbage
	}
	var a Attr
	if s == StatusOK {
		a, s, _ = c.attr(ctx, o)
	}
	b = q.fail(b, s)
	if s == StatusOK {
		b = appendAttr(b, o.x.FSID, &a)
	}
	return b, answered
}

func (c *conn) setattr(ctx context.Context, q *request, b []byte) ([]byte, outcome) {
	o, s := c.open(q)
	set, tooBig := readSetAttr(&q.d)
	if q.d.Bool() {
		guard := readTime(&q.d)
		set.Guard = &guard
	}
	if q.d.Bad() {
		return b, garbage
	}
	if s != StatusOK {
		return appendWcc(q.fail(b, s), 0, nil, nil), answered
	}
	ch := c.s.changes.begin(o.key())
	pre, s, _ := c.attr(ctx, o)
	switch {
	case s != StatusOK:
	case o.x.ReadOnly:
		s = StatusROFS
	case tooBig:
		s = StatusFBig
	case set.Size != nil && pre.Kind == Dir:
		s = StatusIsDir
	case set.Size != nil && pre.Kind != Regular:
		s = StatusInval
	default:
		s = maySet(&pre, &q.Cred, &set)
	}
	var err error
	if s == StatusOK {
		_, err = c.s.cfg.Namespace.SetAttr(withCaller(ctx, &q.Cred), o.x.FSID, o.inode, set)
		s = toStatus(err)
	}
	post := c.postOp(ctx, o)
	alone := c.s.changes.end(ch)
	if unknownOutcome(err) {
		return b, silent
	}
	b = q.fail(b, s)
	return appendWcc(b, o.x.FSID, preIf(alone, &pre), post), answered
}

// preIf returns the attributes from before a change that was alone.
func preIf(alone bool, pre *Attr) *Attr {
	if alone && pre.Generation != 0 {
		return pre
	}
	return nil
}

func (c *conn) access(ctx context.Context, q *request, b []byte) ([]byte, outcome) {
	o, s := c.open(q)
	asked := q.d.Uint32()
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
	b = appendPostOp(q.fail(b, StatusOK), o.x.FSID, &a)
	return xdr.AppendUint32(b, accessBits(o.x, &a, &q.Cred, asked)), answered
}

// file returns the open file of a regular object. On the reader's goroutine it is nil when the file is not open yet.
func (c *conn) file(ctx context.Context, q *request, o object) (*openFile, error) {
	k := fileKey{o.x.FSID, o.inode, o.generation}
	if !q.mayWait {
		return c.s.files.get(k, q.now), nil
	}
	return c.s.files.open(ctx, k, q.now)
}

// fileStatus is toStatus of an error of a file's. A file that is closed or deleted below us is opened anew next time.
func (c *conn) fileStatus(err error, f *openFile) Status {
	if errors.Is(err, blockio.ErrClosed) {
		c.s.files.forget(f.key)
	}
	return toStatus(err)
}

// clip tells how much of [off, off+count) a READ gives of a file of size bytes, and whether that reaches its end.
func clip(off uint64, count uint32, size int64) (n int, eof bool) {
	if off >= uint64(size) {
		return 0, true
	}
	left := uint64(size) - off
	n = int(min(uint64(count), TransferBytesMax, left))
	return n, uint64(n) == left
}

func (c *conn) readFile(ctx context.Context, q *request, b []byte) ([]byte, outcome) {
	o, s := c.open(q)
	off, count := q.d.Uint64(), q.d.Uint32()
	if q.d.Bad() {
		return b, garbage
	}
	if s != StatusOK {
		return appendPostOp(q.fail(b, s), 0, nil), answered
	}
	a, s, _ := c.attr(ctx, o)
	switch {
	case s != StatusOK:
		return appendPostOp(q.fail(b, s), 0, nil), answered
	case a.Kind == Dir:
		s = StatusIsDir
	case a.Kind != Regular:
		s = StatusInval
	case !mayReadData(&a, &q.Cred):
		s = StatusAcces
	}
	if s != StatusOK {
		return appendPostOp(q.fail(b, s), o.x.FSID, &a), answered
	}
	n, eof := clip(off, count, a.Size)
	b = appendPostOp(q.fail(b, StatusOK), o.x.FSID, &a)
	b = xdr.AppendUint32(b, uint32(n))
	b = xdr.AppendBool(b, eof)
	b = xdr.AppendUint32(b, uint32(n))
	q.bytes = n
	if n == 0 {
		return b, answered
	}
	f, err := c.file(ctx, q, o)
	if f == nil && err == nil {
		return b, busy
	}
	if f != nil {
		defer c.s.files.put(f)
		padded := (n + 3) &^ 3
		b = c.grow(b, padded)
		data := b[len(b) : len(b)+n]
		clear(b[len(b)+n : len(b)+padded])
		b = b[:len(b)+padded]
		if q.mayWait {
			err = f.Read(ctx, data, int64(off))
		} else if err = f.TryRead(data, int64(off)); errors.Is(err, blockio.ErrBusy) {
			return b, busy
		}
		if errors.Is(err, blockio.ErrBeyondEnd) {
			return c.readShrunk(q, b)
		}
	}
	if unknownOutcome(err) {
		return b, silent
	}
	if err != nil {
		s = toStatus(err)
		if f != nil {
			s = c.fileStatus(err, f)
		}
		b = q.failAgain(b, s)
		return appendPostOp(b, o.x.FSID, c.postOp(ctx, o)), answered
	}
	return b, answered
}

// readShrunk: the file was truncated between its size and its data; the client asks again.
func (c *conn) readShrunk(q *request, b []byte) ([]byte, outcome) {
	if !q.mayWait {
		return b, busy
	}
	b = q.failAgain(b, StatusOK)
	b = appendPostOp(b, 0, nil)
	b = xdr.AppendUint32(b, 0)
	b = xdr.AppendBool(b, false)
	return xdr.AppendUint32(b, 0), answered
}

// failAgain replaces results that were begun: it cuts b back to what runProcedure began with.
func (q *request) failAgain(b []byte, s Status) []byte {
	q.bytes = 0
	return q.fail(b[:q.results], s)
}

// grow makes room for n more bytes.
func (c *conn) grow(b []byte, n int) []byte {
	need := len(b) + n
	if cap(b) >= need {
		return b
	}
	var bigger []byte
	if need > largeBytes && need <= bufferBytes {
		if bigger = c.s.takeBuffer(); bigger == nil {
			bigger = new([bufferBytes]byte)[:0]
		}
	} else {
		bigger = make([]byte, 0, max(2*cap(b), need+512))
	}
	bigger = append(bigger, b...)
	c.s.giveBuffer(b)
	return bigger
}

type writeArgs struct {
	off           uint64
	count, stable uint32
	data          []byte
}

// readWriteArgs reads WRITE's arguments after the handle.
func readWriteArgs(d *xdr.Decoder) (w writeArgs) {
	w.off, w.count, w.stable = d.Uint64(), d.Uint32(), d.Uint32()
	w.data = d.Opaque(rpc.RecordBytesMax)
	if w.stable > fileSync || uint64(w.count) > uint64(len(w.data)) {
		d.Fail()
	}
	if !d.Bad() {
		w.count = min(w.count, TransferBytesMax)
		w.data = w.data[:w.count]
	}
	return w
}

// flags asks for durability as the client does. Both other kinds of stable_how are the same to a log.
func (w *writeArgs) flags() blockio.Flags {
	if w.stable == unstable {
		return blockio.Extend
	}
	return blockio.Extend | blockio.FUA
}

func (w *writeArgs) committed() uint32 {
	if w.stable == unstable {
		return unstable
	}
	return fileSync
}

func (c *conn) writeFile(ctx context.Context, q *request, b []byte) ([]byte, outcome) {
	o, s := c.open(q)
	w := readWriteArgs(&q.d)
	if q.d.Bad() {
		return b, garbage
	}
	if s != StatusOK {
		return appendWcc(q.fail(b, s), 0, nil, nil), answered
	}
	ch := c.s.changes.begin(o.key())
	verf := c.s.cfg.Verifier() // before the data is accepted: if it is lost, COMMIT shows another
	pre, s, _ := c.attr(ctx, o)
	switch {
	case s != StatusOK:
	case o.x.ReadOnly:
		s = StatusROFS
	case pre.Kind == Dir:
		s = StatusIsDir
	case pre.Kind != Regular:
		s = StatusInval
	case !mayWriteData(&pre, &q.Cred):
		s = StatusAcces
	case w.off > FileBytesMax || w.off+uint64(w.count) > FileBytesMax:
		s = StatusFBig
	}
	q.bytes = int(w.count)
	p := pending{
		proc: 7, xid: q.XID, object: o, change: ch, pre: pre, count: w.count, stable: w.committed(), verf: verf,
		started: q.now,
	}
	if s == StatusOK && w.count > 0 {
		if !q.mayWait {
			c.wrote(o.x.FSID)
		}
		f, err := c.file(ctx, q, o)
		switch {
		case f == nil && err == nil:
			c.s.changes.end(ch)
			return b, busy
		case err != nil:
			s = toStatus(err)
		case q.mayWait:
			err = f.Write(ctx, w.data, int64(w.off), w.flags())
			s = c.fileStatus(err, f)
			c.s.files.put(f)
		default:
			return c.submitWrite(ctx, q, b, p, f, &w)
		}
		if unknownOutcome(err) {
			c.s.changes.end(ch)
			return b, silent
		}
	}
	post := c.postOp(ctx, o)
	return c.appendWrite(b, q, &p, c.s.changes.end(ch), s, post), answered
}

// submitWrite gives a WRITE to its file without waiting.
func (c *conn) submitWrite(ctx context.Context, q *request, b []byte, as pending, f *openFile, w *writeArgs) ([]byte, outcome) {
	p := c.submit()
	as.tag, as.file = p.tag, f
	*p = as
	err := f.TryWrite(w.data, int64(w.off), w.flags(), c, p.tag)
	if err == nil {
		c.touch(f)
		if w.stable == unstable {
			c.mixed = true
		}
		return b, submitted
	}
	c.retire(p)
	s := c.fileStatus(err, f)
	c.s.files.put(f)
	if errors.Is(err, blockio.ErrBusy) {
		c.s.changes.end(as.change)
		return b, busy
	}
	if unknownOutcome(err) {
		c.s.changes.end(as.change)
		return b, silent
	}
	post := c.postOp(ctx, as.object)
	return c.appendWrite(b, q, &as, c.s.changes.end(as.change), s, post), answered
}

// appendWrite writes WRITE3res.
func (c *conn) appendWrite(b []byte, q *request, p *pending, alone bool, s Status, post *Attr) []byte {
	b = appendWcc(q.fail(b, s), p.object.x.FSID, preIf(alone, &p.pre), post)
	if s != StatusOK {
		q.bytes = 0
		return b
	}
	b = xdr.AppendUint32(b, p.count)
	b = xdr.AppendUint32(b, p.stable)
	return append(b, p.verf[:]...)
}

// answerPending appends the reply to a WRITE or COMMIT that has ended.
func (c *conn) answerPending(ctx context.Context, b []byte, p *pending) []byte {
	procedure := &nfsProcedures[p.proc]
	q := request{now: p.started, bytes: int(p.count)}
	b, start := rpc.BeginRecord(b)
	b = rpc.AppendAccepted(b, p.xid, rpc.Success)
	s := c.fileStatus(p.err, p.file)
	post := c.postOp(ctx, p.object)
	alone := c.s.changes.endIf(p.change)
	if p.proc == 7 {
		b = c.appendWrite(b, &q, p, alone, s, post)
	} else {
		b = c.appendCommit(b, &q, p.object, s, post)
	}
	c.observe(procedure, &q)
	return rpc.EndRecord(b, start)
}

func (c *conn) commit(ctx context.Context, q *request, b []byte) ([]byte, outcome) {
	o, s := c.open(q)
	q.d.Uint64() // offset and count: a log is flushed whole
	q.d.Uint32()
	if q.d.Bad() {
		return b, garbage
	}
	if s != StatusOK {
		return appendWcc(q.fail(b, s), 0, nil, nil), answered
	}
	a, s, _ := c.attr(ctx, o)
	switch {
	case s != StatusOK:
	case o.x.ReadOnly:
		s = StatusROFS
	case a.Kind == Dir:
		s = StatusIsDir
	case a.Kind != Regular:
		s = StatusInval
	case !mayWriteData(&a, &q.Cred):
		s = StatusAcces
	}
	if s == StatusOK {
		f, err := c.file(ctx, q, o)
		switch {
		case f == nil && err == nil:
			return b, busy
		case err != nil:
		case q.mayWait:
			err = f.Flush(ctx)
		case c.alone():
			err = f.FlushInline()
		default:
			return c.submitFlush(ctx, q, b, o, f)
		}
		s = toStatus(err)
		if f != nil {
			s = c.fileStatus(err, f)
			c.s.files.put(f)
		}
		if unknownOutcome(err) {
			return b, silent
		}
	}
	return c.appendCommit(b, q, o, s, c.postOp(ctx, o)), answered
}

// alone tells that the connection has nothing else to do than the call at hand.
func (c *conn) alone() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.inflight == 0 && !c.in.Partial() && len(c.replies) == 0
}

func (c *conn) submitFlush(ctx context.Context, q *request, b []byte, o object, f *openFile) ([]byte, outcome) {
	p := c.submit()
	*p = pending{tag: p.tag, proc: 21, xid: q.XID, object: o, file: f, started: q.now}
	err := f.TryFlush(c, p.tag)
	if err == nil {
		c.touch(f)
		return b, submitted
	}
	c.retire(p)
	s := c.fileStatus(err, f)
	c.s.files.put(f)
	switch {
	case errors.Is(err, blockio.ErrBusy):
		return b, busy
	case unknownOutcome(err):
		return b, silent
	}
	return c.appendCommit(b, q, o, s, c.postOp(ctx, o)), answered
}

// appendCommit writes COMMIT3res. A flush changes no attribute, so those after it are those before it; the verifier is read
// after the flush, so that it is another one if anything written before was lost.
func (c *conn) appendCommit(b []byte, q *request, o object, s Status, a *Attr) []byte {
	b = appendWcc(q.fail(b, s), o.x.FSID, a, a)
	if s == StatusOK {
		verf := c.s.cfg.Verifier()
		b = append(b, verf[:]...)
	}
	return b
}
