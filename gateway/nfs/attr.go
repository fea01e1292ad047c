package nfs

import (
	"time"

	"varve/gateway/nfs/xdr"
)

// appendTime writes nfstime3, unsigned 32 bit seconds: times outside 1970 to 2106 are moved to the nearest end.
func appendTime(b []byte, t time.Time) []byte {
	s, ns := t.Unix(), t.Nanosecond()
	switch {
	case s < 0:
		s, ns = 0, 0
	case s > 1<<32-1:
		s, ns = 1<<32-1, 999_999_999
	}
	b = xdr.AppendUint32(b, uint32(s))
	return xdr.AppendUint32(b, uint32(ns))
}

func readTime(d *xdr.Decoder) time.Time {
	s, ns := d.Uint32(), d.Uint32()
	if ns > 999_999_999 {
		d.Fail()
		return time.Time{}
	}
	return time.Unix(int64(s), int64(ns))
}

// attrBytes is the length of fattr3.
const attrBytes = 84

// appendAttr writes fattr3.
func appendAttr(b []byte, fsid uint64, a *Attr) []byte {
	b = xdr.AppendUint32(b, uint32(a.Kind))
	b = xdr.AppendUint32(b, a.Mode&0o7777)
	b = xdr.AppendUint32(b, a.Nlink)
	b = xdr.AppendUint32(b, a.UID)
	b = xdr.AppendUint32(b, a.GID)
	b = xdr.AppendUint64(b, uint64(a.Size))
	b = xdr.AppendUint64(b, uint64(a.Used))
	b = xdr.AppendUint64(b, 0) // rdev: there are no device files
	b = xdr.AppendUint64(b, fsid)
	b = xdr.AppendUint64(b, a.Inode)
	b = appendTime(b, a.Atime)
	b = appendTime(b, a.Mtime)
	return appendTime(b, a.Ctime)
}

// appendPostOp writes post_op_attr; nil says that attributes do not follow.
func appendPostOp(b []byte, fsid uint64, a *Attr) []byte {
	if a == nil {
		return xdr.AppendBool(b, false)
	}
	return appendAttr(xdr.AppendBool(b, true), fsid, a)
}

// appendWcc writes wcc_data.
func appendWcc(b []byte, fsid uint64, pre, post *Attr) []byte {
	if pre == nil {
		b = xdr.AppendBool(b, false)
	} else {
		b = xdr.AppendBool(b, true)
		b = xdr.AppendUint64(b, uint64(pre.Size))
		b = appendTime(b, pre.Mtime)
		b = appendTime(b, pre.Ctime)
	}
	return appendPostOp(b, fsid, post)
}

// readSetAttr reads sattr3.
func readSetAttr(d *xdr.Decoder) (s SetAttr, sizeTooBig bool) {
	optional := func() *uint32 {
		if !d.Bool() {
			return nil
		}
		v := d.Uint32()
		return &v
	}
	s.Mode, s.UID, s.GID = optional(), optional(), optional()
	if s.Mode != nil {
		*s.Mode &= 0o7777
	}
	if d.Bool() {
		size := d.Uint64()
		sizeTooBig = size > FileBytesMax
		if !sizeTooBig {
			v := int64(size)
			s.Size = &v
		}
	}
	when := func(given **time.Time, now *bool) {
		switch d.Uint32() {
		case 0:
		case 1:
			*now = true
		case 2:
			t := readTime(d)
			*given = &t
		default:
			d.Fail()
		}
	}
	when(&s.Atime, &s.AtimeNow)
	when(&s.Mtime, &s.MtimeNow)
	return s, sizeTooBig
}
