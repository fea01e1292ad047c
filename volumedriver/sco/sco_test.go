package sco

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/google/uuid"
	"pgregory.net/rapid"

	"varve/volumedriver/blockio"
)

var volume = uuid.MustParse("6f0a4c0e-2a5e-4c1d-9a77-0f5b1c2d3e4f")

func fillBlock(p []byte, seed uint64) uint32 {
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], seed*0x9e3779b97f4a7c15+uint64(i))
	}
	return Checksum(p)
}

func sample(t testing.TB, lbas []uint64, zeros []Range) []byte {
	t.Helper()
	b := New(Header{Volume: volume, Epoch: 3, Seq: 0x1234, FirstLog: 100, LastLog: 250, PrevEpoch: 2, PrevSeq: 0x1233,
		Size: 1 << 40, ModTime: 17, Created: 18}, len(lbas))
	for _, z := range zeros {
		if err := b.AddZero(z.LBA, z.Blocks); err != nil {
			t.Fatal(err)
		}
	}
	for _, lba := range lbas {
		p := make([]byte, blockio.BlockSize)
		if err := b.Add(lba, p, fillBlock(p, lba)); err != nil {
			t.Fatal(err)
		}
	}
	parts, err := b.Finish()
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Join(parts, nil)
}

func TestNames(t *testing.T) {
	name := Name(volume, 7, 0xabcd12, 2)
	if want := "v/6f0a4c0e-2a5e-4c1d-9a77-0f5b1c2d3e4f/12/00000007-0000000000abcd12-2"; name != want {
		t.Fatalf("name %q, want %q", name, want)
	}
	v, e, s, a, err := ParseName(name)
	if err != nil || v != volume || e != 7 || s != 0xabcd12 || a != 2 {
		t.Fatal(v, e, s, a, err)
	}
	for _, bad := range []string{"", "v", name + "0x", name + "/", "x" + name[1:], name[:len(name)-1], name[:len(name)-1] + "-1",
		name[:len(name)-1] + "+2", name[:len(name)-1] + "02", "v/6F0A4C0E-2a5e-4c1d-9a77-0f5b1c2d3e4f/12/00000007-0000000000abcd12-2",
		"v/6f0a4c0e-2a5e-4c1d-9a77-0f5b1c2d3e4f/13/00000007-0000000000abcd12-2"} {
		if _, _, _, _, err := ParseName(bad); err == nil {
			t.Errorf("ParseName(%q) accepted", bad)
		}
	}
	v, e, n, err := ParseRootName(RootName(volume, 1, 5))
	if err != nil || v != volume || e != 1 || n != 5 {
		t.Fatal(v, e, n, err)
	}
	for _, bad := range []string{"", RootName(volume, 1, 5) + "0", RootName(volume, 1, 5)[1:], "r/x/1-2"} {
		if _, _, _, err := ParseRootName(bad); err == nil {
			t.Errorf("ParseRootName(%q) accepted", bad)
		}
	}
}

// TestRoundTrip builds random objects and reads them back.
func TestRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(0, 40).Draw(t, "blocks")
		h := Header{Volume: volume, Epoch: rapid.Uint64().Draw(t, "epoch"), Seq: rapid.Uint64().Draw(t, "seq"),
			FirstLog: 5, LastLog: 5 + rapid.Uint64Max(1000).Draw(t, "log"), Size: rapid.Uint64().Draw(t, "size"),
			ModTime: rapid.Int64().Draw(t, "mtime"), Created: rapid.Int64().Draw(t, "created")}
		b := New(h, n)
		zero := map[uint64]bool{}
		for range rapid.IntRange(0, 10).Draw(t, "zeros") {
			lba, k := rapid.Uint64Max(200).Draw(t, "zlba"), rapid.Uint64Max(20).Draw(t, "zn")
			if err := b.AddZero(lba, k); err != nil {
				t.Fatal(err)
			}
			for i := range k {
				zero[lba+i] = true
			}
		}
		var lbas []uint64
		lba := rapid.Uint64Max(MaxLBA-1000).Draw(t, "lba")
		for range n {
			p := make([]byte, blockio.BlockSize)
			if err := b.Add(lba, p, fillBlock(p, lba)); err != nil {
				t.Fatal(err)
			}
			lbas = append(lbas, lba)
			lba += rapid.Uint64Range(1, 3).Draw(t, "gap")
		}
		if err := b.Add(lba, make([]byte, blockio.BlockSize), 0); !errors.Is(err, ErrFull) {
			t.Fatal(err)
		}
		parts, err := b.Finish()
		if err != nil {
			t.Fatal(err)
		}
		object := bytes.Join(parts, nil)
		if hb, err := HeaderBytes(object[:min(len(object), 4096)]); err != nil || hb != len(parts[0]) {
			t.Fatal(hb, err)
		}
		got, err := Verify(object)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(b.Header(), got, cmp.AllowUnexported(Header{}), cmpopts.EquateEmpty()); diff != "" {
			t.Fatal(diff)
		}
		for _, z := range got.Zeros {
			for i := range z.Blocks {
				if !zero[z.LBA+i] {
					t.Fatalf("zeroed %d", z.LBA+i)
				}
				delete(zero, z.LBA+i)
			}
		}
		if len(zero) != 0 {
			t.Fatalf("not zeroed: %v", zero)
		}
		table := got.Table()
		for i, want := range lbas {
			lba, ok := table.LBA(uint32(i))
			crc, ok2 := table.CRCOf(uint32(i))
			off := table.DataOffset(uint32(i))
			if !ok || !ok2 || lba != want || crc != got.CRCOf(uint32(i)) || Checksum(object[off:off+4096]) != crc {
				t.Fatalf("block %d: lba %d %v, want %d", i, lba, ok, want)
			}
		}
		if _, ok := table.LBA(uint32(n)); ok || table.Blocks() != n || got.Blocks() != n {
			t.Fatal("table has more blocks than the object")
		}
	})
}

// TestBitFlips flips every bit of the header and the footer, and some of the data, and cuts the object anywhere.
func TestBitFlips(t *testing.T) {
	object := sample(t, []uint64{4, 5, 6, 1000, 1 << 47}, []Range{{0, 10}, {900, 1 << 30}})
	h, err := Verify(object)
	if err != nil {
		t.Fatal(err)
	}
	data := h.DataOffset(0)
	for off := range object {
		if int64(off) >= data && off < len(object)-FooterBytes && off%61 != 0 {
			continue
		}
		for bit := range 8 {
			object[off] ^= 1 << bit
			if _, err := Verify(object); !errors.Is(err, ErrFormat) && !errors.Is(err, ErrUnsupported) {
				t.Fatalf("bit %d of byte %d: %v", bit, off, err)
			}
			if _, err := Parse(object); int64(off) < data && err == nil {
				t.Fatalf("bit %d of header byte %d not noticed", bit, off)
			}
			object[off] ^= 1 << bit
		}
	}
	for n := 0; n < len(object); n += 1 + n/7 {
		if _, err := Verify(object[:n]); err == nil {
			t.Fatalf("object cut to %d bytes accepted", n)
		}
	}
	if _, err := Verify(append(object, 0)); err == nil {
		t.Fatal("object with a byte too many accepted")
	}
}

func TestUnsupported(t *testing.T) {
	object := sample(t, []uint64{1}, nil)
	for _, off := range []int{4, 6, 7} {
		b := bytes.Clone(object)
		b[off]++
		if _, err := Parse(b); !errors.Is(err, ErrUnsupported) {
			t.Errorf("byte %d: %v", off, err)
		}
	}
	root, err := (&Root{Volume: volume}).Encode()
	if err != nil {
		t.Fatal(err)
	}
	root[4]++
	if _, err := ParseRoot(root); !errors.Is(err, ErrUnsupported) {
		t.Error(err)
	}
}

func TestBuilderRefuses(t *testing.T) {
	block := make([]byte, blockio.BlockSize)
	crc := Checksum(block)
	b := New(Header{Volume: volume}, MaxBlocks+5)
	for i, add := range []func() error{
		func() error { return b.Add(9, block, crc) },
		func() error { return b.Add(9, block, crc) },
		func() error { return b.Add(8, block, crc) },
		func() error { return b.Add(10, block[1:], crc) },
		func() error { return b.Add(MaxLBA, block, crc) },
		func() error { return b.AddZero(MaxLBA-1, 2) },
		func() error { _, err := b.Reserve(10, make([]uint32, MaxBlocks)); return err },
	} {
		if err := add(); (err == nil) != (i == 0) {
			t.Errorf("add %d: %v", i, err)
		}
	}
	if b.Blocks() != 1 {
		t.Errorf("%d blocks", b.Blocks())
	}
	b.Reset(Header{Volume: volume}, 2)
	if err := b.Add(1, block, crc+1); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Finish(); !errors.Is(err, blockio.ErrCorrupt) {
		t.Errorf("block that does not match its checksum: %v", err)
	}
	for i := range MaxZeros + 1 {
		if err := b.AddZero(uint64(3*i), 2); i < MaxZeros && err != nil || i == MaxZeros && !errors.Is(err, ErrFull) {
			t.Fatal(i, err)
		}
	}
	b.Reset(Header{Volume: volume}, 0)
	for i := range 3 * MaxZeros { // what can be merged takes no room
		if err := b.AddZero(uint64(3*i%300), 2); err != nil {
			t.Fatal(i, err)
		}
	}
}

// TestLargest has every list at its limit.
func TestLargest(t *testing.T) {
	b := New(Header{Volume: volume, Seq: 1}, MaxBlocks)
	for i := range uint64(MaxZeros) {
		if err := b.AddZero(MaxLBA-2*i-1, 1); err != nil {
			t.Fatal(err)
		}
	}
	for i := range uint64(MaxBlocks) {
		p, err := b.Reserve(3*i, []uint32{0})
		if err != nil {
			t.Fatal(err)
		}
		b.h.CRC[i] = fillBlock(p, i)
	}
	parts, err := b.Finish()
	if err != nil {
		t.Fatal(err)
	}
	h, err := Verify(bytes.Join(parts, nil))
	if err != nil || len(parts[0]) != MaxHeaderBytes || h.ObjectBytes() != MaxHeaderBytes+16<<20+FooterBytes {
		t.Fatal(err, len(parts[0]))
	}
	if got := h.Table().Bytes(); got > 12*MaxBlocks+128 {
		t.Fatalf("table of %d bytes", got)
	}
}

func TestFollow(t *testing.T) {
	first := &Header{Volume: volume, Epoch: 1, Seq: 1, LastLog: 10}
	next := Header{Volume: volume, Epoch: 1, Seq: 2, PrevEpoch: 1, PrevSeq: 1, FirstLog: 10, LastLog: 20}
	if err := errors.Join(first.Follow(nil), next.Follow(first)); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Header){
		"no beginning": func(h *Header) { h.PrevSeq = 0 },
		"log hole":     func(h *Header) { h.FirstLog++ },
		"other volume": func(h *Header) { h.Volume[0]++ },
		"seq":          func(h *Header) { h.Seq = 1 },
		"epoch":        func(h *Header) { h.Epoch = 0 },
	} {
		h := next
		change(&h)
		if h.Follow(first) == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if next.Follow(nil) == nil {
		t.Error("second accepted as the first")
	}
}

func TestRoot(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := &Root{Volume: volume, Epoch: rapid.Uint64().Draw(t, "epoch"), N: rapid.Uint64().Draw(t, "n"), Pool: volume,
			PoolName: rapid.String().Draw(t, "pool"), Path: rapid.String().Draw(t, "path"), Kind: "disk",
			Size: rapid.Int64Min(0).Draw(t, "size"), Mode: 0o644, Created: rapid.Int64().Draw(t, "created"), BlockSize: 4096}
		b, err := r.Encode()
		if err != nil {
			t.Fatal(err)
		}
		got, err := ParseRoot(b)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(r, got); diff != "" {
			t.Fatal(diff)
		}
		bit := rapid.IntRange(0, len(b)*8-1).Draw(t, "bit")
		b[bit/8] ^= 1 << (bit % 8)
		if _, err := ParseRoot(b); err == nil {
			t.Fatalf("bit %d not noticed", bit)
		}
	})
	r := &Root{Volume: volume, Path: string(bytes.Repeat([]byte("x"), MaxRootBytes))}
	if _, err := r.Encode(); err == nil {
		t.Error("root beyond the limit encoded")
	}
}

func FuzzParseHeader(f *testing.F) {
	object := sample(f, []uint64{4, 5, 6, 1000}, []Range{{0, 10}})
	f.Add(object[:4096])
	f.Add([]byte("VSCO"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= 4096 { // give the fuzzer a chance to get past the checksum
			b = bytes.Clone(b)
			if n, err := HeaderBytes(b); err == nil && n <= len(b) {
				binary.LittleEndian.PutUint32(b[12:], headerCRC(b[:n]))
			}
		}
		h, err := Parse(b)
		if err != nil {
			return
		}
		table := h.Table()
		for i := range h.Blocks() {
			table.LBA(uint32(i))
		}
		again, err := Parse(h.encode())
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(h, again, cmp.AllowUnexported(Header{})); diff != "" {
			t.Fatal(diff)
		}
	})
}

func FuzzParseRoot(f *testing.F) {
	b, err := (&Root{Volume: volume, Path: "a/b.raw", Kind: "disk", Size: 1}).Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(b[:rootFixedBytes])
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= rootFixedBytes && len(b) <= MaxRootBytes {
			b = bytes.Clone(b)
			binary.LittleEndian.PutUint32(b[8:], uint32(len(b)-rootFixedBytes))
			binary.LittleEndian.PutUint32(b[12:], rootCRC(b[:12], b[rootFixedBytes:]))
		}
		if r, err := ParseRoot(b); err == nil {
			if _, err := r.Encode(); err != nil && len(b) < MaxRootBytes/8 {
				t.Fatal(err)
			}
		}
	})
}

func FuzzParseName(f *testing.F) {
	f.Add(Name(volume, 1, 2, 3))
	f.Add(RootName(volume, 1, 2))
	f.Fuzz(func(t *testing.T, s string) {
		if v, e, n, a, err := ParseName(s); err == nil && Name(v, e, n, a) != s {
			t.Fatal(s)
		}
		if v, e, n, err := ParseRootName(s); err == nil && RootName(v, e, n) != s {
			t.Fatal(s)
		}
	})
}

func BenchmarkFinish(b *testing.B) {
	builder := New(Header{}, MaxBlocks)
	order := rand.New(rand.NewPCG(1, 2))
	p := make([]byte, blockio.BlockSize)
	crc := fillBlock(p, 1)
	b.SetBytes(MaxBlocks * blockio.BlockSize)
	for b.Loop() {
		builder.Reset(Header{Volume: volume, Seq: 1}, MaxBlocks)
		lba := uint64(0)
		for range MaxBlocks {
			lba += 1 + order.Uint64N(3)
			if err := builder.Add(lba, p, crc); err != nil {
				b.Fatal(err)
			}
		}
		if _, err := builder.Finish(); err != nil {
			b.Fatal(err)
		}
	}
}
