package blockmap

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

func drawRun(t *rapid.T) run {
	start := rapid.IntRange(0, LeafBlocks-1).Draw(t, "start")
	n := rapid.IntRange(1, LeafBlocks-start).Draw(t, "n")
	r := run{start: uint16(start), blocks: uint16(n)}
	if rapid.IntRange(0, 3).Draw(t, "hole") != 0 {
		r.ref = MakeRef(rapid.Uint32Range(1, 3).Draw(t, "ordinal"), rapid.Uint32Range(0, uint32(4096-n)).Draw(t, "index"))
	}
	return r
}

// expand gives a leaf's refs one by one, and checks that runs are as they should be: ascending, disjoint, merged.
func expand(t *rapid.T, runs []run) [LeafBlocks]Ref {
	var refs [LeafBlocks]Ref
	end := uint16(0)
	for i, r := range runs {
		if r.start < end || r.blocks == 0 || !validRef(r.ref, uint64(r.blocks)) {
			t.Fatalf("run %+v after %d", r, end)
		}
		if i > 0 && len(emit(slices.Clone(runs[i-1:i]), r)) != 2 {
			t.Fatalf("run %+v could be part of %+v", r, runs[i-1])
		}
		for k := range r.blocks {
			refs[r.start+k] = r.ref + Ref(k)
		}
		end = r.end()
	}
	return refs
}

// TestSplice applies changes to a leaf and to an array, and passes the leaf through its stored and its resident forms.
func TestSplice(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var want [LeafBlocks]Ref
		var runs []run
		for range rapid.IntRange(0, 60).Draw(t, "changes") {
			r := drawRun(t)
			for k := range r.blocks {
				want[r.start+k] = 0
				if r.ref != 0 {
					want[r.start+k] = r.ref + Ref(k)
				}
			}
			runs = splice(nil, runs, r)
		}
		if expand(t, runs) != want {
			t.Fatalf("leaf differs from the array")
		}
		key := leafKey(7, 9, 1)
		got, err := decodeLeaf(nil, key, appendLeaf([]byte("before"), key, runs)[6:])
		if err != nil || !slices.Equal(got, runs) {
			t.Fatalf("stored form: %v %+v", err, got)
		}
		for class := classFor(len(runs)); class <= classArray; class++ {
			p := make(slot, slotBytes[class])
			p[15] = byte(class)
			p.store(runs)
			if got := p.runs(nil); !slices.Equal(got, runs) {
				t.Fatalf("class %d: %+v", class, got)
			}
			off := rapid.IntRange(0, LeafBlocks-1).Draw(t, "off")
			refs := make([]Ref, rapid.IntRange(1, LeafBlocks-off).Draw(t, "read"))
			if p.read(off, refs); !slices.Equal(refs, want[off:off+len(refs)]) {
				t.Fatalf("class %d: read from %d", class, off)
			}
		}
	})
}

// sampleLeaves gives stored leaves of both forms.
func sampleLeaves() [][]byte {
	key := leafKey(1, 2, 1)
	var scattered []run
	for i := range uint16(400) {
		scattered = append(scattered, run{i, 1, MakeRef(uint32(400-i), 5)})
	}
	return [][]byte{appendLeaf(nil, key, nil), appendLeaf(nil, key, []run{{0, 512, MakeRef(1, 0)}}),
		appendLeaf(nil, key, []run{{3, 5, MakeRef(1, 9)}, {100, 2, MakeRef(2, 9)}}), appendLeaf(nil, key, scattered)}
}

// TestDamagedLeaf flips every bit, cuts everywhere, and reads a leaf as another: all is noticed.
func TestDamagedLeaf(t *testing.T) {
	key := leafKey(1, 2, 1)
	for _, b := range sampleLeaves() {
		for bit := range len(b) * 8 {
			b[bit/8] ^= 1 << (bit % 8)
			if _, err := decodeLeaf(nil, key, b); !errors.Is(err, ErrCorrupt) {
				t.Fatalf("bit %d of %d bytes: %v", bit, len(b), err)
			}
			b[bit/8] ^= 1 << (bit % 8)
		}
		for n := range b {
			if _, err := decodeLeaf(nil, key, b[:n]); err == nil {
				t.Fatalf("%d of %d bytes accepted", n, len(b))
			}
		}
		if _, err := decodeLeaf(nil, leafKey(1, 3, 1), b); err == nil {
			t.Fatal("leaf of another place accepted")
		}
		if _, err := decodeLeaf(nil, key, b); err != nil {
			t.Fatal(err)
		}
	}
}

func FuzzDecodeLeaf(f *testing.F) {
	for _, b := range sampleLeaves() {
		f.Add(b[:len(b)-4], true)
		f.Add(b, false)
	}
	f.Fuzz(func(t *testing.T, b []byte, seal bool) {
		key := leafKey(1, 2, 1)
		if seal { // past the checksum
			b = binary.LittleEndian.AppendUint32(bytes.Clone(b), valueCRC(key, b))
		}
		runs, err := decodeLeaf(nil, key, b)
		if err != nil {
			return
		}
		again, err := decodeLeaf(nil, key, appendLeaf(nil, key, runs))
		if err != nil || !slices.Equal(runs, again) {
			t.Fatalf("%+v, again %+v, %v", runs, again, err)
		}
	})
}

// sampleSets gives sets of both stored forms, and those at the border between them.
func sampleSets() []leafSet {
	var full, sparse, most, many leafSet
	for leaf := range uint64(pageLeaves) {
		full[leaf/64] |= 1 << (leaf % 64)
		if leaf%67 == 3 || leaf == pageLeaves-1 {
			sparse[leaf/64] |= 1 << (leaf % 64)
		}
		if leaf%2 == 0 && leaf < 2*setRunsMax {
			most[leaf/64] |= 1 << (leaf % 64)
		}
		if leaf%2 == 1 && leaf < 2*setRunsMax+2 {
			many[leaf/64] |= 1 << (leaf % 64)
		}
	}
	return []leafSet{{}, full, sparse, most, many}
}

// TestPage passes pages through their stored form, and damages that.
func TestPage(t *testing.T) {
	key := pageKey(4, 5, 6)
	for i, present := range sampleSets() {
		for k, changed := range sampleSets() {
			b := appendPage(nil, key, &present, &changed)
			p, c, err := decodePage(key, b)
			if err != nil || p != present || c != changed {
				t.Fatalf("sets %d and %d in %d bytes: %v", i, k, len(b), err)
			}
			for n := range b {
				b[n] ^= 4
				if _, _, err := decodePage(key, b); !errors.Is(err, ErrCorrupt) {
					t.Fatalf("sets %d and %d, byte %d: %v", i, k, n, err)
				}
				b[n] ^= 4
				if _, _, err := decodePage(key, b[:n]); !errors.Is(err, ErrCorrupt) {
					t.Fatalf("sets %d and %d, %d of %d bytes: %v", i, k, n, len(b), err)
				}
			}
			if _, _, err := decodePage(pageKey(4, 5, 7), b); !errors.Is(err, ErrCorrupt) {
				t.Fatalf("page of another generation: %v", err)
			}
		}
	}
}

// seal makes a damaged value one with a valid checksum, so that what lies behind that is tested.
func seal(key, b []byte) []byte {
	b = bytes.Clone(b)
	if len(b) >= 4 {
		binary.LittleEndian.PutUint32(b[len(b)-4:], valueCRC(key, b[:len(b)-4]))
	}
	return b
}

func FuzzDecodePage(f *testing.F) {
	key := pageKey(4, 5, 1)
	for _, set := range sampleSets() {
		f.Add(appendPage(nil, key, &set, &leafSet{5}))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		b = seal(key, b)
		present, changed, err := decodePage(key, b)
		if err == nil && !bytes.Equal(appendPage(nil, key, &present, &changed), b) {
			t.Fatalf("%x is not what is written for it", b)
		}
	})
}

func FuzzDecodeRecord(f *testing.F) {
	key := recordKey(3)
	for _, r := range []record{{gen: 1}, {gen: 7, parent: At{2, 9}, headless: true},
		{gen: 9, merged: true, floor: 4, pending: At{1, 5}}} {
		f.Add(r.encode(key))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		b = seal(key, b)
		r, err := decodeRecord(key, b)
		if err == nil && !bytes.Equal(r.encode(key), b) {
			t.Fatalf("%x is not what is written for %+v", b, r)
		}
	})
}
