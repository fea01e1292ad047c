package nfs

import (
	"context"

	"varve/gateway/nfs/xdr"
)

// FSINFO's properties.
const (
	fsSymlink     = 0x02
	fsHomogeneous = 0x08
	fsCanSetTime  = 0x10
)

// fsObject reads the one argument of FSSTAT, FSINFO and PATHCONF.
func (c *conn) fsObject(ctx context.Context, q *request) (o object, a *Attr, s Status) {
	o, s = c.open(q)
	if s != StatusOK || q.d.Bad() {
		return object{}, nil, s
	}
	got, s, _ := c.attr(ctx, o)
	if s != StatusOK {
		return object{}, nil, s
	}
	return o, &got, StatusOK
}

func (c *conn) fsstat(ctx context.Context, q *request, b []byte) ([]byte, outcome) {
	o, a, s := c.fsObject(ctx, q)
	if q.d.Bad() {
		return b, garbage
	}
	if s != StatusOK {
		return appendPostOp(q.fail(b, s), 0, nil), answered
	}
	total, free, avail, files, ffree, err := c.s.cfg.Namespace.Space(ctx, o.x.FSID)
	if unknownOutcome(err) {
		return b, silent
	}
	b = appendPostOp(q.fail(b, toStatus(err)), o.x.FSID, a)
	if err != nil {
		return b, answered
	}
	for _, v := range []uint64{total, free, avail, files, ffree, ffree} {
		b = xdr.AppendUint64(b, v)
	}
	return xdr.AppendUint32(b, 0), answered // invarsec: may change at any time
}

func (c *conn) fsinfo(ctx context.Context, q *request, b []byte) ([]byte, outcome) {
	o, a, s := c.fsObject(ctx, q)
	if q.d.Bad() {
		return b, garbage
	}
	if s != StatusOK {
		return appendPostOp(q.fail(b, s), 0, nil), answered
	}
	b = appendPostOp(q.fail(b, StatusOK), o.x.FSID, a)
	for _, v := range []uint32{
		TransferBytesMax, TransferBytesMax, 4096, // READ: max, preferred, multiple
		TransferBytesMax, TransferBytesMax, 4096, // WRITE
		listBytesMax, // READDIR preferred
	} {
		b = xdr.AppendUint32(b, v)
	}
	b = xdr.AppendUint64(b, FileBytesMax)
	b = xdr.AppendUint32(b, 0) // times are kept to 0 s and
	b = xdr.AppendUint32(b, 1) // 1 ns
	return xdr.AppendUint32(b, fsSymlink|fsHomogeneous|fsCanSetTime), answered
}

func (c *conn) pathconf(ctx context.Context, q *request, b []byte) ([]byte, outcome) {
	o, a, s := c.fsObject(ctx, q)
	if q.d.Bad() {
		return b, garbage
	}
	if s != StatusOK {
		return appendPostOp(q.fail(b, s), 0, nil), answered
	}
	b = appendPostOp(q.fail(b, StatusOK), o.x.FSID, a)
	b = xdr.AppendUint32(b, 1) // links
	b = xdr.AppendUint32(b, nameBytesMax)
	b = xdr.AppendBool(b, true)              // longer names are refused, not cut
	b = xdr.AppendBool(b, true)              // only root may give files away
	b = xdr.AppendBool(b, false)             // names differ by case
	return xdr.AppendBool(b, true), answered // and keep it
}
