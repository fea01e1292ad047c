package xdr

import (
	"bytes"
	"math"
	"testing"
)

func TestRoundTrip(t *testing.T) {
	for n := range 9 {
		data := bytes.Repeat([]byte{7}, n)
		b := AppendUint32(nil, math.MaxUint32)
		b = AppendUint64(b, math.MaxUint64-1)
		b = AppendBool(AppendBool(b, true), false)
		b = AppendOpaque(b, data)
		b = AppendString(b, string(data))
		b = AppendPad(append(b, data...), n)
		if len(b)%4 != 0 {
			t.Fatalf("%d bytes are not padded to words", len(b))
		}
		d := NewDecoder(b)
		if d.Uint32() != math.MaxUint32 || d.Uint64() != math.MaxUint64-1 || !d.Bool() || d.Bool() ||
			!bytes.Equal(d.Opaque(n), data) || !bytes.Equal(d.Opaque(100), data) || !bytes.Equal(d.Fixed(n), data) {
			t.Fatalf("%d bytes do not come back", n)
		}
		if d.Bad() || len(d.Rest()) > 0 {
			t.Fatalf("bad %v, %d bytes left", d.Bad(), len(d.Rest()))
		}
	}
}

func TestLengthsBeyondTheMessage(t *testing.T) {
	for _, n := range []uint32{5, 8, 1 << 20, math.MaxInt32, math.MaxInt32 + 1, math.MaxUint32 - 2, math.MaxUint32} {
		d := NewDecoder(append(AppendUint32(nil, n), 1, 2, 3, 4))
		if v := d.Opaque(math.MaxInt); v != nil || !d.Bad() {
			t.Errorf("length %d with 4 bytes gives %d", n, len(v))
		}
		if d.Uint32() != 0 || d.Uint64() != 0 || d.Bool() || d.Fixed(1) != nil || d.Opaque(1) != nil {
			t.Error("a bad decoder goes on")
		}
	}
	d := NewDecoder(AppendOpaque(nil, make([]byte, 65)))
	if d.Opaque(64); !d.Bad() {
		t.Error("65 bytes where 64 are allowed")
	}
	d = NewDecoder(AppendUint32(nil, 2))
	if d.Bool(); !d.Bad() {
		t.Error("2 is no boolean")
	}
	d = NewDecoder(nil)
	if d.Fixed(-1); !d.Bad() {
		t.Error("negative length")
	}
}

func FuzzXDR(f *testing.F) {
	f.Add([]byte{0, 1, 2, 3, 4}, AppendOpaque(AppendUint64(nil, 9), []byte("hello")))
	f.Fuzz(func(t *testing.T, script, message []byte) {
		d := NewDecoder(message)
		used := 0
		for _, op := range script {
			before := len(d.Rest())
			var again []byte
			switch op % 5 {
			case 0:
				again = AppendUint32(nil, d.Uint32())
			case 1:
				again = AppendUint64(nil, d.Uint64())
			case 2:
				again = AppendBool(nil, d.Bool())
			case 3:
				again = AppendOpaque(nil, d.Opaque(int(op)*4))
			case 4:
				v := d.Fixed(int(op))
				again = AppendPad(append([]byte(nil), v...), len(v))
			}
			if d.Bad() {
				if len(d.Rest()) != 0 {
					t.Fatal("a bad decoder has bytes left")
				}
				return
			}
			n := before - len(d.Rest())
			if n != len(again) {
				t.Fatalf("op %d took %d bytes and writes %d", op%5, n, len(again))
			}
			// Padding may hold anything; the rest must come back as it was.
			was := message[used : used+n]
			for i := range was {
				if was[i] != again[i] && i < n-3 {
					t.Fatalf("op %d: % x became % x", op%5, was, again)
				}
			}
			used += n
		}
	})
}
