package sco

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/google/uuid"

	"varve/volumedriver/blockio"
)

var volume = uuid.MustParse("6f0a4c0e-2a5e-4c1d-9a77-0f5b1c2d3e4f")

func fillBlock(p []byte, seed uint64) uint32 {
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], seed*0x9e3779b97f4a7c15+uint64(i))
	}
	return Checksum(p)
}

func sample(t interface {
	Helper()
	Fatal(...any)
}, lbas []uint64, zeros []Range) []byte {
	t.Helper()
	b := New(Header{Volume: volume, Epoch: 3, Seq: 0x1234, FirstLog: 100, LastLog: 250, PrevEpoch: 2, PrevSeq: 0x1233,
		Size: 1 << 40, ModTime: 17, Created: 18}, len(lbas), Options{})
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

func TestUnsupported(t *testing.T) {
	object := sample(t, []uint64{1}, nil)
	for _, off := range []int{4, 6, 7} {
		b := bytes.Clone(object)
		b[off] += 4
		if _, err := Parse(b, nil); !errors.Is(err, ErrUnsupported) {
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
	b := New(Header{Volume: volume}, MaxBlocks+5, Options{})
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
	b.Reset(Header{Volume: volume}, 2, Options{})
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
	b.Reset(Header{Volume: volume}, 0, Options{})
	for i := range 3 * MaxZeros { // what can be merged takes no room
		if err := b.AddZero(uint64(3*i%300), 2); err != nil {
			t.Fatal(i, err)
		}
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
