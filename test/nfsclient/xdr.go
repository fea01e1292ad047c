package nfsclient

import (
	"encoding/binary"
	"errors"
)

// Encoder appends XDR (RFC 4506).
type Encoder []byte

func (e *Encoder) Uint32(v uint32) { *e = binary.BigEndian.AppendUint32(*e, v) }
func (e *Encoder) Uint64(v uint64) { *e = binary.BigEndian.AppendUint64(*e, v) }

func (e *Encoder) Bool(v bool) {
	if v {
		e.Uint32(1)
	} else {
		e.Uint32(0)
	}
}

func (e *Encoder) Opaque(p []byte) {
	e.Uint32(uint32(len(p)))
	*e = append(*e, p...)
	*e = append(*e, make([]byte, -len(p)&3)...)
}

func (e *Encoder) String(s string) { e.Opaque([]byte(s)) }

// sattr appends sattr3; a negative value is one that is not set.
func (e *Encoder) sattr(mode, size int64) {
	e.Bool(mode >= 0)
	if mode >= 0 {
		e.Uint32(uint32(mode))
	}
	e.Bool(false) // uid
	e.Bool(false) // gid
	e.Bool(size >= 0)
	if size >= 0 {
		e.Uint64(uint64(size))
	}
	e.Uint32(0) // atime: don't change
	e.Uint32(0) // mtime
}

// Decoder reads XDR. After the first piece that is missing it gives zero values and keeps the error.
type Decoder struct {
	b   []byte
	err error
}

var errShort = errors.New("reply is cut short")

func (d *Decoder) take(n int) []byte {
	if d.err != nil || n < 0 || n > len(d.b) {
		d.err = errShort
		return nil
	}
	p := d.b[:n]
	d.b = d.b[n:]
	return p
}

func (d *Decoder) Uint32() uint32 {
	if p := d.take(4); p != nil {
		return binary.BigEndian.Uint32(p)
	}
	return 0
}

func (d *Decoder) Uint64() uint64 {
	if p := d.take(8); p != nil {
		return binary.BigEndian.Uint64(p)
	}
	return 0
}

func (d *Decoder) Bool() bool { return d.Uint32() != 0 }

func (d *Decoder) Opaque() []byte {
	n := int(d.Uint32())
	p := d.take(n)
	d.take(-n & 3)
	return p
}

func (d *Decoder) attr() Attr {
	a := Attr{Type: d.Uint32(), Mode: d.Uint32(), Nlink: d.Uint32()}
	d.take(8) // uid, gid
	a.Size, a.Used = int64(d.Uint64()), int64(d.Uint64())
	d.take(8) // device
	a.FSID, a.FileID = d.Uint64(), d.Uint64()
	d.take(24) // times
	return a
}

func (d *Decoder) postAttr() {
	if d.Bool() {
		d.attr()
	}
}

func (d *Decoder) wcc() {
	if d.Bool() {
		d.take(24)
	}
	d.postAttr()
}
