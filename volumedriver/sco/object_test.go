package sco

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/google/uuid"
	"pgregory.net/rapid"

	"varve/volumedriver/blockio"
	"varve/volumedriver/seal"
)

const bs = blockio.BlockSize

func newKey(t testing.TB) *seal.Key {
	t.Helper()
	k, err := seal.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func ringOf(keys ...*seal.Key) *seal.Ring {
	r := &seal.Ring{}
	for _, k := range keys {
		r.Add(k)
	}
	return r
}

// fill makes a block of one of several kinds, from nothing to random.
func fill(p []byte, kind int, seed uint64) uint32 {
	r := rand.New(rand.NewPCG(seed, uint64(kind)))
	switch kind {
	case 0:
		clear(p)
		p[int(seed%bs)] = 1
	case 1: // text-like
		for i := 0; i < bs; {
			i += copy(p[i:], words[r.IntN(len(words))])
		}
	case 2: // half random
		for i := 0; i < bs/2; i += 8 {
			binary.LittleEndian.PutUint64(p[i:], r.Uint64())
		}
		clear(p[bs/2:])
		p[bs-1] = byte(seed)
	default:
		for i := 0; i < bs; i += 8 {
			binary.LittleEndian.PutUint64(p[i:], r.Uint64())
		}
	}
	return Checksum(p)
}

var words = strings.SplitAfter("the volume driver turns random writes of a virtual machine into large immutable objects, kernel: error=0 "+
	"status 200 user@example.org /var/log/messages 2026-11-22T21:48:50 [info] GET POST 0x7f3a", " ")

// reader gives what Table.Read reads with.
func reader(object []byte) func(p []byte, off int64) error {
	return func(p []byte, off int64) error {
		if off < 0 || off+int64(len(p)) > int64(len(object)) {
			return fmt.Errorf("read of %d bytes at %d beyond the object of %d", len(p), off, len(object))
		}
		copy(p, object[off:])
		return nil
	}
}

// model is what an SCO must give back.
type model struct {
	lba   map[uint32]uint64
	block map[uint32][]byte
	zeros map[uint64]bool
	marks []Mark
}

// check reads the object in every way there is and compares with the model.
func (m *model) check(t *rapid.T, object []byte, base int64, keys KeySource) *Header {
	t.Helper()
	image := object[base:]
	n, err := HeaderBytes(image[:16])
	if err != nil {
		t.Fatal(err)
	}
	h, err := Parse(image[:n], keys)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(m.marks, h.Marks, cmpopts.EquateEmpty()); diff != "" {
		t.Fatal(diff)
	}
	zeros := 0
	for _, z := range h.Zeros {
		for i := range z.Blocks {
			if !m.zeros[z.LBA+i] {
				t.Fatalf("zeroed %d", z.LBA+i)
			}
			zeros++
		}
	}
	if zeros != len(m.zeros) || h.Blocks() != len(m.lba) {
		t.Fatalf("%d zeros, %d blocks, want %d, %d", zeros, h.Blocks(), len(m.zeros), len(m.lba))
	}
	table := h.Table().Within(base)
	read := reader(object)
	for x := range uint32(MaxBlocks + 1) {
		lba, sum, ok := table.Block(x)
		want, live := m.lba[x]
		if ok != live || ok && lba != want {
			t.Fatalf("index %d: lba %d %v, want %d %v", x, lba, ok, want, live)
		}
		crc, ok := table.CRCOf(x)
		if ok && crc != sum {
			t.Fatalf("index %d: checksums %#x and %#x", x, crc, sum)
		}
		f, at, ok2 := table.Frame(x)
		_, _, direct := table.Direct(x, 1)
		if ok != live || ok2 != live || direct && !live {
			t.Fatalf("index %d: crc %v, frame %v, direct %v, want %v", x, ok, ok2, direct, live)
		}
		if !live {
			if err := table.Read(make([]byte, bs), x, read); !errors.Is(err, ErrFormat) {
				t.Fatalf("index %d that is not there: %v", x, err)
			}
			continue
		}
		if Checksum(m.block[x]) != crc {
			t.Fatalf("index %d: wrong checksum", x)
		}
		p := make([]byte, f.Blocks*bs)
		if err := table.Decode(p, object[f.Off:f.Off+int64(f.Stored)], f); err != nil || !bytes.Equal(p[at*bs:(at+1)*bs], m.block[x]) {
			t.Fatalf("index %d in frame %+v: %v", x, f, err)
		}
		if off, k, ok := table.Direct(x, 40); ok {
			for i := range k {
				if b := object[off+int64(i)*bs:][:bs]; !bytes.Equal(b, m.block[x+uint32(i)]) {
					t.Fatalf("index %d, %d further directly: wrong bytes", x, i)
				}
			}
		}
	}
	for range 20 { // runs
		x := rapid.Uint32Max(MaxBlocks).Draw(t, "index")
		k := uint32(0)
		for most := rapid.Uint32Range(1, 600).Draw(t, "run"); k < most && m.block[x+k] != nil; k++ {
		}
		p := make([]byte, k*bs)
		if err := table.Read(p, x, read); err != nil {
			t.Fatalf("read %d from index %d: %v", k, x, err)
		}
		for i := range k {
			if !bytes.Equal(p[i*bs:(i+1)*bs], m.block[x+i]) {
				t.Fatalf("read %d from index %d: block %d is wrong", k, x, i)
			}
		}
	}
	return h
}

// TestRoundTrip builds random objects under all codecs, keys and alignments, compacts them again and again, puts them into
// containers, and reads every block back each time.
func TestRoundTrip(t *testing.T) {
	keys := []*seal.Key{nil, newKey(t), newKey(t)}
	ring := ringOf(keys[1:]...)
	var b, other Builder
	var containers ContainerBuilder
	rapid.Check(t, func(t *rapid.T) {
		options := rapid.Custom(func(t *rapid.T) Options {
			return Options{rapid.SampledFrom([]Codec{None, S2, Zstd}).Draw(t, "codec"), rapid.SampledFrom(keys).Draw(t, "key"),
				rapid.SampledFrom([]int{0, 1, 2, 4, 8, 16}).Draw(t, "frame"), rapid.SampledFrom([]int{0, 1, 8, 512, 4096}).Draw(t, "align")}
		})
		h := Header{Volume: volume, Epoch: rapid.Uint64().Draw(t, "epoch"), Seq: rapid.Uint64().Draw(t, "seq"),
			FirstLog: 5, LastLog: 5 + rapid.Uint64Max(1000).Draw(t, "log"), Size: rapid.Uint64().Draw(t, "size"),
			Revert: rapid.Uint64Max(5).Draw(t, "revert"), ModTime: rapid.Int64().Draw(t, "mtime"), Created: rapid.Int64().Draw(t, "created")}
		n := rapid.OneOf(rapid.IntRange(0, 40), rapid.IntRange(0, 400)).Draw(t, "blocks")
		b.Reset(h, n, options.Draw(t, "options"))
		m := &model{lba: map[uint32]uint64{}, block: map[uint32][]byte{}, zeros: map[uint64]bool{}}
		for range rapid.IntRange(0, 10).Draw(t, "zeros") {
			lba, k := rapid.Uint64Max(200).Draw(t, "zlba"), rapid.Uint64Max(20).Draw(t, "zn")
			if err := b.AddZero(lba, k); err != nil {
				t.Fatal(err)
			}
			for i := range k {
				m.zeros[lba+i] = true
			}
		}
		for seq := h.FirstLog; ; {
			seq += rapid.Uint64Range(1, 400).Draw(t, "mark")
			if seq > h.LastLog {
				break
			}
			data := rapid.SliceOfN(rapid.Byte(), 0, 30).Draw(t, "data")
			if err := b.AddMark(seq, data); err != nil {
				t.Fatal(err)
			}
			m.marks = append(m.marks, Mark{seq, data})
		}
		kinds := rapid.SampledFrom([][]int{{0}, {1}, {2}, {3}, {0, 1, 2, 3}, {3, 3, 3, 3, 3, 3, 3, 3, 1}}).Draw(t, "kinds")
		gap := rapid.SampledFrom([]uint64{1, 1, 2, 5, 1 << 30}).Draw(t, "gaps")
		seed := rapid.Uint64().Draw(t, "seed")
		r := rand.New(rand.NewPCG(seed, 1))
		lba := rapid.Uint64Max(MaxLBA-(400<<30)).Draw(t, "lba")
		for i := range n {
			p := make([]byte, bs)
			if err := b.Add(lba, p, 0); err != nil {
				t.Fatal(err)
			}
			crc := fill(p, kinds[i/16%len(kinds)], seed+uint64(i)/2)
			copy(b.data[i*bs:], p)
			b.h.CRC[i] = crc
			m.lba[uint32(i)], m.block[uint32(i)] = lba, p
			lba += 1 + r.Uint64N(gap)
		}
		if err := b.Add(lba, make([]byte, bs), 0); !errors.Is(err, ErrFull) {
			t.Fatal(err)
		}
		parts, err := b.Finish()
		if err != nil {
			t.Fatal(err)
		}
		object := bytes.Join(parts, nil)
		src := m.check(t, object, 0, ring)
		if diff := cmp.Diff(b.Header(), src, cmp.AllowUnexported(Header{}, frames{}), cmpopts.EquateEmpty(),
			cmpopts.IgnoreFields(frames{}, "seal")); diff != "" {
			t.Fatal(diff)
		}
		if _, err := Verify(object, ring); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			src = m.compactOnce(t, &other, object, src, options.Draw(t, "options"), ring)
			if parts, err = other.Finish(); err != nil {
				t.Fatal(err)
			}
			object = bytes.Join(parts, nil)
			got := m.check(t, object, 0, ring)
			if _, err := Verify(object, ring); err != nil {
				t.Fatal(err)
			}
			src = got
			containers.Reset(Container{Volume: volume, Epoch: 9, N: 77, Created: 5})
			lead := sample(t, []uint64{1}, nil)
			leadHeader, _ := Parse(lead, nil)
			leadHeader.Seq = h.Seq ^ 1
			if err := errors.Join(containers.Add(leadHeader, [][]byte{lead}), containers.Add(other.Header(), parts)); err != nil {
				t.Fatal(err)
			}
			whole := bytes.Join(containers.Finish(), nil)
			c, err := ParseContainer(whole)
			if err != nil {
				t.Fatal(err)
			}
			e, ok := c.Find(h.Epoch, h.Seq)
			if !ok || e.Live != uint32(src.Blocks()) {
				t.Fatal("not in its container")
			}
			m.check(t, whole[:e.Offset+e.Bytes], e.Offset, ring)
		}
	})
}

// compactOnce leaves out blocks of the model and builds what is left.
func (m *model) compactOnce(t *rapid.T, b *Builder, object []byte, src *Header, o Options, keys KeySource) *Header {
	drop := rapid.SampledFrom([]int{0, 1, 10, 100}).Draw(t, "live")
	seed := rapid.Uint64().Draw(t, "seed")
	r := rand.New(rand.NewPCG(seed, 3))
	for x := range uint32(MaxBlocks) {
		if drop == 100 || r.IntN(100) < drop {
			delete(m.lba, x)
			delete(m.block, x)
		}
	}
	table := src.Table()
	err := b.Compact(src, 99, o, func(x uint32) bool { return m.block[x] != nil }, func(p []byte, x uint32) error {
		return table.Read(p, x, reader(object))
	})
	if err != nil {
		t.Fatal(err)
	}
	return src
}

// TestBitFlips flips every bit of the header, the lists, the padding and the footer, and many of the data, and cuts the
// object anywhere: it is noticed, and a read that does not notice gives the right bytes.
func TestBitFlips(t *testing.T) {
	key := newKey(t)
	ring := ringOf(key)
	for name, o := range map[string]Options{
		"plain": {}, "s2": {Codec: S2}, "zstd": {Codec: Zstd, Align: 64}, "sealed": {Key: key}, "s2 sealed": {Codec: S2, Key: key, Align: 1},
	} {
		t.Run(name, func(t *testing.T) {
			b := New(Header{Volume: volume, Epoch: 3, Seq: 7, LastLog: 20}, 40, o)
			blocks := make([][]byte, 35)
			for i := range blocks {
				blocks[i] = make([]byte, bs)
				crc := fill(blocks[i], []int{1, 3, 2}[i/16], uint64(i))
				if err := b.Add(uint64(i)*3, blocks[i], crc); err != nil {
					t.Fatal(err)
				}
			}
			if err := errors.Join(b.AddZero(500, 1<<30), b.AddMark(3, []byte("a snapshot")), b.AddMark(20, nil)); err != nil {
				t.Fatal(err)
			}
			parts, err := b.Finish()
			if err != nil {
				t.Fatal(err)
			}
			object := bytes.Join(parts, nil)
			h, err := Verify(object, ring)
			if err != nil {
				t.Fatal(err)
			}
			data := int(h.DataOffset())
			table := h.Table()
			buf, want := make([]byte, 35*bs), bytes.Join(blocks, nil)
			for off := 0; off < len(object); off++ {
				if off > data+2000 && off < len(object)-FooterBytes && off%211 != 0 {
					continue
				}
				for bit := range 8 {
					if off > fixedBytes && off%5 != bit%5 {
						continue
					}
					object[off] ^= 1 << bit
					_, err := Verify(object, ring)
					if !errors.Is(err, ErrFormat) && !errors.Is(err, ErrUnsupported) {
						// A codec may have bits that mean nothing. Then the bytes must be right.
						if off < data || o.Codec == None || o.Key != nil || table.Read(buf, 0, reader(object)) != nil || !bytes.Equal(buf, want) {
							t.Fatalf("bit %d of byte %d: %v", bit, off, err)
						}
					}
					if _, err := Parse(object, ring); off < data && err == nil {
						t.Fatalf("bit %d of header byte %d not noticed", bit, off)
					}
					if off >= data && table.Read(buf, 0, reader(object)) == nil {
						for i, want := range blocks {
							got := buf[i*bs : (i+1)*bs]
							if crc, _ := table.CRCOf(uint32(i)); Checksum(got) == crc && !bytes.Equal(got, want) {
								t.Fatalf("bit %d of byte %d: wrong bytes under a right checksum", bit, off)
							}
						}
					}
					object[off] ^= 1 << bit
				}
			}
			for n := 0; n < len(object); n += 1 + n/7 {
				if _, err := Verify(object[:n], ring); err == nil {
					t.Fatalf("object cut to %d bytes accepted", n)
				}
			}
			if _, err := Verify(append(object, 0), ring); err == nil {
				t.Fatal("object with a byte too many accepted")
			}
		})
	}
}

// TestLargest has every list at its limit.
func TestLargest(t *testing.T) {
	for _, o := range []Options{{}, {Key: newKey(t)}} {
		b := New(Header{Volume: volume, Seq: 1, LastLog: MaxMarks}, MaxBlocks, o)
		for i := range uint64(MaxZeros) {
			if err := b.AddZero(MaxLBA-2*i-1, 1); err != nil {
				t.Fatal(err)
			}
		}
		for i := range uint64(MaxMarks) {
			if err := b.AddMark(i+1, make([]byte, MaxMarkBytes)); err != nil {
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
		h, err := Verify(bytes.Join(parts, nil), ringOf(b.keys()...))
		if err != nil || len(parts[0]) > MaxHeaderBytes || h.ObjectBytes() > MaxObjectBytes {
			t.Fatal(err, len(parts[0]))
		}
		if got := h.Table().Bytes(); got > 11*MaxBlocks {
			t.Fatalf("table of %d bytes", got)
		}
	}
}

// keys of the object being built.
func (b *Builder) keys() []*seal.Key {
	if b.key == nil {
		return nil
	}
	return []*seal.Key{b.key}
}

// TestNonceReuse: an SCO that is built again, or compacted, from the same blocks under the same key takes another subkey, so
// no (key, nonce) pair is used twice. With a salt that is not drawn anew, equal plaintexts show as equal bytes, and the XOR
// of two different frames is that of their plaintexts.
func TestNonceReuse(t *testing.T) {
	key := newKey(t)
	build := func(b *Builder) []byte {
		parts, err := b.Finish()
		if err != nil {
			t.Fatal(err)
		}
		return bytes.Join(parts, nil)
	}
	b := New(Header{Volume: volume, Epoch: 1, Seq: 1, LastLog: 1}, 48, Options{Key: key, FrameBlocks: 16})
	for i := range uint64(48) {
		p := make([]byte, bs)
		if err := b.Add(i, p, fill(p, 1, 7)); err != nil {
			t.Fatal(err)
		}
	}
	var objects [][]byte
	objects = append(objects, build(b), build(b))
	src, err := Parse(objects[0], ringOf(key))
	if err != nil {
		t.Fatal(err)
	}
	table := src.Table()
	var other Builder
	if err := other.Compact(src, 1, Options{Key: key, FrameBlocks: 16}, func(uint32) bool { return true }, func(p []byte, x uint32) error {
		return table.Read(p, x, reader(objects[0]))
	}); err != nil {
		t.Fatal(err)
	}
	objects = append(objects, build(&other), build(&other))
	salts, frames := map[[seal.SaltBytes]byte]bool{}, map[string]int{}
	for i, o := range objects {
		h, err := Parse(o, ringOf(key))
		if err != nil {
			t.Fatal(err)
		}
		if salts[h.frames.salt] {
			t.Errorf("object %d: the salt of another, so the same (key, nonce) pairs", i)
		}
		salts[h.frames.salt] = true
		for k := range h.frames.count() {
			f := h.frames.ref(k)
			// A frame's first 16 bytes of keystream, since all plaintexts are equal: it must never repeat, not in an object either.
			at := string(o[f.Off : f.Off+16])
			if n, ok := frames[at]; ok {
				t.Errorf("object %d frame %d: the keystream of object %d", i, k, n)
			}
			frames[at] = i
		}
	}
	if len(frames) != 12 {
		t.Errorf("%d frames looked at", len(frames))
	}
}

// TestSealedTellsNothing: neither blocks nor addresses nor checksums nor marks are in the object in clear.
func TestSealedTellsNothing(t *testing.T) {
	key := newKey(t)
	b := New(Header{Volume: volume, Epoch: 1, Seq: 1, LastLog: 9}, 20, Options{Codec: S2, Key: key})
	var secrets [][]byte
	for i := range uint64(20) {
		p := make([]byte, bs)
		crc := fill(p, 3, i)
		lba := 0x123456789a + i*0x1000001
		if err := b.Add(lba, p, crc); err != nil {
			t.Fatal(err)
		}
		secrets = append(secrets, p[:16], binary.LittleEndian.AppendUint64(nil, lba), binary.LittleEndian.AppendUint32(nil, crc))
	}
	if err := errors.Join(b.AddZero(0x98765432100, 0x7777777), b.AddMark(4, []byte("before the upgrade"))); err != nil {
		t.Fatal(err)
	}
	secrets = append(secrets, binary.LittleEndian.AppendUint64(nil, 0x98765432100), []byte("before the upgrade"))
	parts, err := b.Finish()
	if err != nil {
		t.Fatal(err)
	}
	object := bytes.Join(parts, nil)
	for i, s := range secrets {
		if bytes.Contains(object, s) {
			t.Errorf("secret %d is in clear", i)
		}
	}
	if _, err := Parse(object, nil); !errors.Is(err, seal.ErrNoKey) {
		t.Errorf("without keys: %v", err)
	}
	if _, err := Parse(object, ringOf(newKey(t))); !errors.Is(err, seal.ErrNoKey) {
		t.Errorf("with another key: %v", err)
	}
	h, err := ParseClear(object)
	if err != nil || h.Seq != 1 || h.KeyID != key.ID() || h.ObjectBytes() != int64(len(object)) || h.Blocks() != 0 {
		t.Errorf("in clear: %+v, %v", h, err)
	}
	key.Erase()
	if _, err := Parse(object, ringOf(key)); !errors.Is(err, seal.ErrNoKey) {
		t.Errorf("with an erased key: %v", err)
	}
	if _, err := b.Finish(); !errors.Is(err, seal.ErrNoKey) {
		t.Errorf("built with an erased key: %v", err)
	}
}

// TestForgedHeader: who can write to the backend but has no key can't change what the header says in clear, or swap frames.
func TestForgedHeader(t *testing.T) {
	key := newKey(t)
	b := New(Header{Volume: volume, Epoch: 1, Seq: 1, LastLog: 9}, 32, Options{Key: key})
	for i := range uint64(32) {
		p := make([]byte, bs)
		if err := b.Add(i, p, fill(p, 3, i)); err != nil {
			t.Fatal(err)
		}
	}
	parts, err := b.Finish()
	if err != nil {
		t.Fatal(err)
	}
	object := bytes.Join(parts, nil)
	for off := 16; off < fixedBytes; off++ {
		forged := bytes.Clone(object)
		forged[off] ^= 1
		binary.LittleEndian.PutUint32(forged[12:], headerCRC(forged[:len(parts[0])]))
		if _, err := Parse(forged, ringOf(key)); err == nil {
			t.Errorf("header byte %d forged", off)
		}
	}
	h, err := Parse(object, ringOf(key))
	if err != nil {
		t.Fatal(err)
	}
	f, g := h.frames.ref(0), h.frames.ref(1)
	if err := h.frames.decode(make([]byte, 16*bs), object[g.Off:g.Off+int64(g.Stored)], f); !errors.Is(err, ErrFormat) {
		t.Errorf("frame 1 taken for frame 0: %v", err)
	}
}

// TestUncompressedStaysDirect: what does not compress costs no frames, with any codec.
func TestUncompressedStaysDirect(t *testing.T) {
	for _, codec := range []Codec{None, S2, Zstd} {
		b := New(Header{Volume: volume, LastLog: 9}, 64, Options{Codec: codec})
		for i := range uint64(64) {
			p := make([]byte, bs)
			if err := b.Add(i, p, fill(p, 3, i)); err != nil {
				t.Fatal(err)
			}
		}
		parts, err := b.Finish()
		if err != nil {
			t.Fatal(err)
		}
		table := b.Header().Table()
		if off, n, ok := table.Direct(3, 100); !ok || n != 61 || off != int64(len(parts[0]))+3*bs || len(parts[0])%4096 != 0 {
			t.Errorf("%v: %d %d %v", codec, off, n, ok)
		}
	}
}

// TestRepeatedRandomBlocks: blocks that look random but are equal still compress.
func TestRepeatedRandomBlocks(t *testing.T) {
	b := New(Header{Volume: volume, LastLog: 9}, 64, Options{Codec: S2, FrameBlocks: 16})
	p := make([]byte, bs)
	crc := fill(p, 3, 1)
	for i := range uint64(64) {
		if err := b.Add(i, p, crc); err != nil {
			t.Fatal(err)
		}
	}
	parts, err := b.Finish()
	if err != nil || len(parts[1]) > 4*(bs+1024) {
		t.Fatal(err, len(parts[1]))
	}
}

func TestLooksRandom(t *testing.T) {
	p := make([]byte, frameBytes)
	for kind, want := range []bool{false, false, false, true} {
		for seed := range uint64(200) {
			for i := range MaxFrameBlocks {
				fill(p[i*bs:(i+1)*bs], kind, seed*100+uint64(i))
			}
			if looksRandom(p) != want {
				t.Fatalf("kind %d seed %d: random %v", kind, seed, !want)
			}
		}
	}
}

func TestCodecNames(t *testing.T) {
	for _, c := range []Codec{None, S2, Zstd} {
		if got, err := ParseCodec(c.String()); err != nil || got != c {
			t.Error(c, got, err)
		}
	}
	if _, err := ParseCodec("lz4"); err == nil {
		t.Error("lz4 accepted")
	}
}

// TestMarksRefused: marks out of order, outside the log range, too large, too many.
func TestMarksRefused(t *testing.T) {
	b := New(Header{Volume: volume, FirstLog: 10, LastLog: 10 + 2*MaxMarks}, 0, Options{})
	for _, seq := range []uint64{0, 10, 11 + 2*MaxMarks} {
		if b.AddMark(seq, nil) == nil {
			t.Errorf("mark at %d accepted", seq)
		}
	}
	if b.AddMark(11, make([]byte, MaxMarkBytes+1)) == nil {
		t.Error("mark that is too large accepted")
	}
	for i := range uint64(MaxMarks) {
		if err := b.AddMark(11+i, nil); err != nil {
			t.Fatal(err)
		}
		if b.AddMark(11+i, nil) == nil {
			t.Fatal("two marks at one place accepted")
		}
	}
	if err := b.AddMark(11+MaxMarks, nil); !errors.Is(err, ErrFull) {
		t.Error(err)
	}
	b.h.Marks = b.h.Marks[:0]
	b.h.Revert = 11
	if _, err := b.Finish(); err == nil {
		t.Error("revert beyond the beginning accepted")
	}
}

// TestAllocations: a length in a header is no reason to allocate.
func TestAllocations(t *testing.T) {
	object := sample(t, []uint64{1, 2, 3}, nil)
	for _, off := range []int{112, 116, 120, 124, 128, 132} {
		for _, v := range []uint32{1 << 31, 1<<32 - 1, 4096, 1024} {
			b := bytes.Clone(object[:4096])
			binary.LittleEndian.PutUint32(b[off:], v)
			binary.LittleEndian.PutUint32(b[12:], headerCRC(b))
			n := testing.AllocsPerRun(1, func() {
				if _, err := Parse(b, nil); !errors.Is(err, ErrFormat) {
					t.Fatalf("count %d at %d: %v", v, off, err)
				}
			})
			if n > 20 {
				t.Errorf("count %d at %d: %v allocations", v, off, n)
			}
		}
	}
}

// TestReadAllocatesNothing: neither a direct read nor one through a frame makes garbage.
func TestReadAllocatesNothing(t *testing.T) {
	key := newKey(t)
	for _, o := range []Options{{}, {Codec: S2}, {Key: key}, {Codec: S2, Key: key}} {
		b := New(Header{Volume: volume, LastLog: 9}, 64, o)
		for i := range uint64(64) {
			p := make([]byte, bs)
			if err := b.Add(i, p, fill(p, 1, i)); err != nil {
				t.Fatal(err)
			}
		}
		parts, err := b.Finish()
		if err != nil {
			t.Fatal(err)
		}
		object := bytes.Join(parts, nil)
		table := b.Header().Table()
		p := make([]byte, bs)
		n := testing.AllocsPerRun(200, func() {
			if err := table.Read(p, 21, func(p []byte, off int64) error { copy(p, object[off:]); return nil }); err != nil {
				t.Fatal(err)
			}
		})
		if n >= 1 && !raceEnabled {
			t.Errorf("%v, sealed %v: %v allocations", o.Codec, o.Key != nil, n)
		}
	}
}

func FuzzParseHeader(f *testing.F) {
	object := sample(f, []uint64{4, 5, 6, 1000}, []Range{{0, 10}})
	f.Add(object[:4096])
	f.Add([]byte("VSCO"))
	for _, o := range []Options{{Codec: S2, Align: 1}, {Codec: Zstd}} {
		b := New(Header{Volume: volume, LastLog: 9}, 20, o)
		for i := range uint64(20) {
			p := make([]byte, bs)
			if err := errors.Join(b.Add(i*2, p, fill(p, int(i%2), i))); err != nil {
				f.Fatal(err)
			}
		}
		if err := b.AddMark(3, []byte("x")); err != nil {
			f.Fatal(err)
		}
		parts, err := b.Finish()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(parts[0])
		h := *b.Header()
		var c Builder
		if err := c.Compact(&h, 1, o, func(x uint32) bool { return x%3 == 0 }, func(p []byte, x uint32) error {
			return h.Table().Read(p, x, reader(bytes.Join(parts, nil)))
		}); err != nil {
			f.Fatal(err)
		}
		if parts, err = c.Finish(); err != nil {
			f.Fatal(err)
		}
		f.Add(parts[0])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		b = bytes.Clone(b)
		if n, err := HeaderBytes(b); err == nil && n <= len(b) { // give the fuzzer a chance to get past the checksum
			binary.LittleEndian.PutUint32(b[12:], headerCRC(b[:n]))
		}
		h, err := Parse(b, nil)
		if err != nil {
			return
		}
		table := h.Table()
		p := make([]byte, bs)
		for i := range uint32(MaxBlocks) {
			lba, _, ok := table.Block(i)
			if r, _, ok2 := table.Frame(i); ok != ok2 || ok && (lba > MaxLBA || r.Off+int64(r.Stored) > h.ObjectBytes()) {
				t.Fatal(i, lba, ok, r)
			}
			if i%64 == 0 {
				_ = table.Read(p, i, func(p []byte, off int64) error {
					if off < h.DataOffset() || off+int64(len(p)) > h.ObjectBytes()-FooterBytes {
						t.Fatalf("read of %d at %d", len(p), off)
					}
					return nil
				})
			}
		}
		encoded, err := h.encode(nil)
		if err != nil {
			t.Fatal(err)
		}
		again, err := Parse(encoded, nil)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(h, again, cmp.AllowUnexported(Header{}, frames{})); diff != "" {
			t.Fatal(diff)
		}
	})
}

// FuzzDecode gives the decoders frames that nobody has made.
func FuzzDecode(f *testing.F) {
	p := make([]byte, bs) // small, since the fuzzer is slow on large seeds
	fill(p, 0, 1)
	for _, codec := range []Codec{S2, Zstd} {
		packed, err := (&packer{codec: codec}).compress(make([]byte, 0, 2*frameBytes), p, nil)
		if err != nil || packed == nil {
			f.Fatal(codec, err)
		}
		f.Add(byte(codec-1), byte(0), packed)
	}
	f.Fuzz(func(t *testing.T, codec, blocks byte, stored []byte) {
		r := FrameRef{Stored: len(stored), Blocks: 1 + int(blocks%MaxFrameBlocks), Codec: Codec(1 + codec%2)}
		dst := make([]byte, r.Blocks*bs+64)
		if err := new(frames).decode(dst[:r.Blocks*bs:r.Blocks*bs], stored, r); err != nil && !errors.Is(err, ErrFormat) {
			t.Fatal(err)
		}
		if !isZero(dst[r.Blocks*bs:]) {
			t.Fatal("wrote beyond the end")
		}
	})
}

func FuzzParseContainer(f *testing.F) {
	object := sample(f, []uint64{4, 5}, nil)
	h, err := Parse(object, nil)
	if err != nil {
		f.Fatal(err)
	}
	b := NewContainer(Container{Volume: volume, Epoch: 1, N: 2})
	if err := b.Add(h, [][]byte{object}); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Finish()[0])
	f.Add([]byte("VCON"))
	f.Fuzz(func(t *testing.T, b []byte) {
		b = bytes.Clone(b)
		if n, err := ContainerHeaderBytes(b); err == nil && n <= len(b) {
			binary.LittleEndian.PutUint32(b[n-4:], Checksum(b[:n-4]))
		}
		c, err := ParseContainer(b)
		if err != nil {
			return
		}
		again, err := ParseContainer(c.encode())
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(c, again, cmp.AllowUnexported(Container{})); diff != "" {
			t.Fatal(diff)
		}
	})
}

// TestContainer: several SCOs, some under a key, in one object; a flip anywhere in it is noticed.
func TestContainer(t *testing.T) {
	key := newKey(t)
	b := NewContainer(Container{Volume: volume, Epoch: 4, N: 0x1ff, Created: 6})
	var c Builder
	for i := range uint64(5) {
		o := Options{Codec: S2, Align: 1}
		if i%2 == 1 {
			o.Key = key
		}
		c.Reset(Header{Volume: volume, Epoch: 1, Seq: i + 1, FirstLog: i, LastLog: i + 1}, 20, o)
		for j := range i * 4 {
			p := make([]byte, bs)
			if err := c.Add(j*5, p, fill(p, int(j%4), j)); err != nil {
				t.Fatal(err)
			}
		}
		parts, err := c.Finish()
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Add(c.Header(), parts); err != nil {
			t.Fatal(err)
		}
		if b.Add(c.Header(), parts) == nil {
			t.Fatal("the same SCO twice")
		}
	}
	object := bytes.Join(b.Finish(), nil)
	got, err := VerifyContainer(object, ringOf(key))
	if err != nil || got.ObjectBytes() != int64(len(object)) || got.ObjectBytes() != b.Bytes() || len(got.Entries) != 5 {
		t.Fatal(err)
	}
	if diff := cmp.Diff(b.Container(), got, cmp.AllowUnexported(Container{})); diff != "" {
		t.Fatal(diff)
	}
	for off := 0; off < len(object); off += 1 + off/300 {
		object[off] ^= 4
		if _, err := VerifyContainer(object, ringOf(key)); !errors.Is(err, ErrFormat) && !errors.Is(err, ErrUnsupported) {
			t.Fatalf("byte %d: %v", off, err)
		}
		object[off] ^= 4
	}
	name := ContainerName(volume, 4, 0x1ff, 3)
	if want := "c/6f0a4c0e-2a5e-4c1d-9a77-0f5b1c2d3e4f/ff/00000004-00000000000001ff-3"; name != want {
		t.Errorf("name %s", name)
	}
	if v, e, n, a, err := ParseContainerName(name); err != nil || v != volume || e != 4 || n != 0x1ff || a != 3 {
		t.Error(v, e, n, a, err)
	}
	if _, _, _, _, err := ParseContainerName(Name(volume, 4, 0x1ff, 3)); err == nil {
		t.Error("an SCO's name taken for a container's")
	}
	if _, _, _, _, err := ParseName(name); err == nil {
		t.Error("a container's name taken for an SCO's")
	}
	other := NewContainer(Container{Volume: uuid.New()})
	parts, err := c.Finish()
	if err != nil || other.Add(c.Header(), parts) == nil {
		t.Error("an SCO of another volume accepted", err)
	}
}

// TestRefusedHeaders: what Finish would never write is refused, though the checksum is right.
func TestRefusedHeaders(t *testing.T) {
	good := func() *Header {
		b := New(Header{Volume: volume, Epoch: 1, Seq: 2, FirstLog: 10, LastLog: 20}, 40, Options{Codec: S2, Align: 64})
		for i := range uint64(40) {
			p := make([]byte, bs)
			if err := b.Add(i*3, p, fill(p, 1, i)); err != nil {
				t.Fatal(err)
			}
		}
		if err := errors.Join(b.AddZero(5, 2), b.AddZero(9, 2), b.AddMark(12, []byte("x")), b.AddMark(14, nil)); err != nil {
			t.Fatal(err)
		}
		parts, err := b.Finish()
		if err != nil {
			t.Fatal(err)
		}
		h, err := Parse(parts[0], nil)
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	for name, change := range map[string]func(h *Header){
		"log range":          func(h *Header) { h.LastLog = 9 },
		"revert":             func(h *Header) { h.Revert = 11 },
		"zeros empty":        func(h *Header) { h.Zeros[0].Blocks = 0 },
		"zeros adjacent":     func(h *Header) { h.Zeros[0].Blocks = 4 },
		"zeros order":        func(h *Header) { h.Zeros[0], h.Zeros[1] = h.Zeros[1], h.Zeros[0] },
		"zeros beyond":       func(h *Header) { h.Zeros[1].Blocks = MaxLBA },
		"zeros overflow":     func(h *Header) { h.Zeros[1].Blocks = 1<<64 - 1 },
		"extent empty":       func(h *Header) { h.Extents[3].Blocks = 0 },
		"extent order":       func(h *Header) { h.Extents[3].LBA = 1 },
		"extents adjacent":   func(h *Header) { h.Extents[3].LBA = 7 },
		"extent beyond":      func(h *Header) { h.Extents[39].LBA = MaxLBA },
		"extent too long":    func(h *Header) { h.Extents[39].Blocks = 2 },
		"index repeated":     func(h *Header) { h.Extents[3].Index = 2 },
		"index back":         func(h *Header) { h.Extents[3].Index = 0 },
		"index beyond":       func(h *Header) { h.Extents[39].Index = MaxBlocks },
		"index gap too wide": func(h *Header) { h.Extents[39].Index = 42 },
		"first index":        func(h *Header) { h.Extents[0].Index = 1; h.Extents[1].Index = 2 },
		"mark before":        func(h *Header) { h.Marks[0].Seq = 10 },
		"mark beyond":        func(h *Header) { h.Marks[1].Seq = 21 },
		"marks order":        func(h *Header) { h.Marks[0].Seq = 14 },
		"frame too long":     func(h *Header) { h.frames.stored[0] = uint32(S2)<<24 | 4*bs },
		"frame empty":        func(h *Header) { h.frames.stored[0] = uint32(S2) << 24 },
		"raw frame":          func(h *Header) { h.frames.stored[0] = 4*bs - 1 },
		"data bytes":         func(h *Header) { h.frames.bytes++ },
		"a checksum less":    func(h *Header) { h.CRC = h.CRC[:39]; h.frames.blocks = 39 },
	} {
		h := good()
		change(h)
		b, err := h.encode(nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Parse(b, nil); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
	h := good()
	h.frames.stored[0] |= 9 << 24
	b, err := h.encode(nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Parse(b, nil); !errors.Is(err, ErrUnsupported) {
		t.Errorf("codec 9: %v", err)
	}
	if b, err = good().encode(nil); err != nil || b[len(b)-1] != 0 {
		t.Fatal("no padding to try", err)
	}
	b[len(b)-1] = 1
	binary.LittleEndian.PutUint32(b[12:], headerCRC(b))
	if _, err := Parse(b, nil); !errors.Is(err, ErrFormat) {
		t.Errorf("padding: %v", err)
	}
}

// TestRefusedContainers: entries that do not lie one after the other, or do not say what they hold.
func TestRefusedContainers(t *testing.T) {
	good := func() ([]byte, *Container) {
		b := NewContainer(Container{Volume: volume, Epoch: 4, N: 2})
		for i := range uint64(3) {
			c := New(Header{Volume: volume, Epoch: 1, Seq: i + 1, FirstLog: i, LastLog: i + 1}, 1, Options{Align: 1})
			p := make([]byte, bs)
			if err := c.Add(7, p, fill(p, 1, i)); err != nil {
				t.Fatal(err)
			}
			parts, err := c.Finish()
			if err != nil {
				t.Fatal(err)
			}
			if err := b.Add(c.Header(), parts); err != nil {
				t.Fatal(err)
			}
		}
		return bytes.Join(b.Finish(), nil), b.Container()
	}
	for name, change := range map[string]func(c *Container){
		"offset":    func(c *Container) { c.Entries[1].Offset++ },
		"overlap":   func(c *Container) { c.Entries[1].Offset = c.Entries[0].Offset },
		"negative":  func(c *Container) { c.Entries[1].Offset = -1 },
		"too short": func(c *Container) { c.Entries[2].Bytes = 100 },
		"too long":  func(c *Container) { c.Entries[2].Bytes = MaxObjectBytes + 1 },
		"live":      func(c *Container) { c.Entries[2].Live = MaxBlocks + 1 },
		"other seq": func(c *Container) { c.Entries[2].Seq++ },
		"epoch":     func(c *Container) { c.Entries[2].Epoch++ },
		"fewer":     func(c *Container) { c.Entries[2].Live = 0 },
		"volume":    func(c *Container) { c.Volume[0]++ },
	} {
		object, c := good()
		change(c)
		forged := append(c.encode(), object[c.headerBytes():len(object)-FooterBytes]...)
		if _, err := VerifyContainer(append(forged, c.footer()...), nil); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
