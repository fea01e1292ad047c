// Package xdr reads and writes the external data representation of RFC 4506, by hand and without allocation.
//
// A Decoder walks over one message that lies wholly in memory. It never allocates and never looks past the message: an
// opaque is a slice of the message, and a claimed length is compared with the bytes that are there before it is used. The
// first thing that does not fit makes the decoder bad for good, everything read afterwards is zero, so that a caller checks
// once, at the end. The Append functions write.
package xdr

import "encoding/binary"

// Decoder reads from one message. The zero value is an empty message.
type Decoder struct {
	b   []byte
	bad bool
}

// NewDecoder reads from b, which must not change while slices of it are in use.
func NewDecoder(b []byte) Decoder { return Decoder{b: b} }

// Bad tells that something read did not fit into the message or broke its limit.
func (d *Decoder) Bad() bool { return d.bad }

// Fail makes the decoder bad: a value that was read is not one of those allowed.
func (d *Decoder) Fail() {
	d.bad = true
	d.b = nil
}

// Rest is what has not been read yet.
func (d *Decoder) Rest() []byte { return d.b }

// Uint32 reads an unsigned integer, an enum or a length.
func (d *Decoder) Uint32() uint32 {
	if len(d.b) < 4 {
		d.Fail()
		return 0
	}
	v := binary.BigEndian.Uint32(d.b)
	d.b = d.b[4:]
	return v
}

// Uint64 reads an unsigned hyper.
func (d *Decoder) Uint64() uint64 {
	if len(d.b) < 8 {
		d.Fail()
		return 0
	}
	v := binary.BigEndian.Uint64(d.b)
	d.b = d.b[8:]
	return v
}

// Bool reads a boolean; anything but 0 and 1 is bad.
func (d *Decoder) Bool() bool {
	v := d.Uint32()
	if v > 1 {
		d.Fail()
	}
	return v == 1
}

// Fixed reads n bytes of fixed length opaque data.
func (d *Decoder) Fixed(n int) []byte {
	padded := (n + 3) &^ 3
	if n < 0 || len(d.b) < padded {
		d.Fail()
		return nil
	}
	v := d.b[:n:n]
	d.b = d.b[padded:]
	return v
}

// Opaque reads variable length opaque data or a string of at most max bytes. The result is a part of the message.
func (d *Decoder) Opaque(max int) []byte {
	n := d.Uint32()
	if uint64(n) > uint64(max) || uint64(n) > uint64(len(d.b)) {
		d.Fail()
		return nil
	}
	return d.Fixed(int(n))
}

// AppendUint32 writes an unsigned integer, an enum or a length.
func AppendUint32(b []byte, v uint32) []byte { return binary.BigEndian.AppendUint32(b, v) }

// AppendUint64 writes an unsigned hyper.
func AppendUint64(b []byte, v uint64) []byte { return binary.BigEndian.AppendUint64(b, v) }

// AppendBool writes a boolean.
func AppendBool(b []byte, v bool) []byte {
	if v {
		return append(b, 0, 0, 0, 1)
	}
	return append(b, 0, 0, 0, 0)
}

// AppendOpaque writes variable length opaque data with its length and padding.
func AppendOpaque(b, v []byte) []byte {
	b = AppendUint32(b, uint32(len(v)))
	return AppendPad(append(b, v...), len(v))
}

// AppendString writes a string.
func AppendString(b []byte, v string) []byte {
	b = AppendUint32(b, uint32(len(v)))
	return AppendPad(append(b, v...), len(v))
}

// AppendPad writes the zeros that follow n bytes of opaque data.
func AppendPad(b []byte, n int) []byte {
	return append(b, "\x00\x00\x00"[:-n&3]...)
}
