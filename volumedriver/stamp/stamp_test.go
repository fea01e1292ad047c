package stamp

import (
	"bytes"
	"testing"

	"github.com/google/uuid"
)

var (
	vol   = uuid.MustParse("6ba7b810-9dad-11d1-80b4-00c04fd430c8")
	other = uuid.MustParse("6ba7b811-9dad-11d1-80b4-00c04fd430c8")
)

func TestCheck(t *testing.T) {
	want := Stamp{vol, 7, 3, 100}
	block := func(s Stamp) []byte {
		p := make([]byte, BlockSize)
		s.Fill(p)
		return p
	}
	mixed := func(a, b []byte, at int) []byte { return append(bytes.Clone(a[:at]), b[at:]...) }
	flipped := func(at int) []byte {
		p := block(want)
		p[at] ^= 4
		return p
	}
	for what, c := range map[string]struct {
		p    []byte
		want Verdict
	}{
		"itself":                {block(want), Right},
		"older":                 {block(Stamp{vol, 7, 3, 99}), Old},
		"newer":                 {block(Stamp{vol, 7, 4, 101}), New},
		"other writer":          {block(Stamp{vol, 7, 4, 100}), Foreign},
		"other address":         {block(Stamp{vol, 8, 3, 100}), Misdirected},
		"other volume":          {block(Stamp{other, 7, 3, 100}), Foreign},
		"zeros":                 {make([]byte, BlockSize), Zero},
		"two versions":          {mixed(block(want), block(Stamp{vol, 7, 3, 99}), 512), Torn},
		"zeros at the end":      {mixed(block(want), make([]byte, BlockSize), 3584), Torn},
		"zeros at the start":    {mixed(make([]byte, BlockSize), block(want), 3584), Torn},
		"noise":                 {bytes.Repeat([]byte{1}, BlockSize), Corrupt},
		"torn inside a sector":  {mixed(block(want), block(Stamp{vol, 7, 3, 99}), 700), Corrupt},
		"swapped sectors":       {mixed(block(want)[512:], block(want), 512), Corrupt},
		"flipped bit, header":   {flipped(512 + 33), Corrupt},
		"flipped bit, reserved": {flipped(512 + 53), Corrupt},
		"flipped bit, filler":   {flipped(4095), Corrupt},
	} {
		if len(c.p) != BlockSize {
			c.p = c.p[:BlockSize]
		}
		if got, v := Check(c.p, want); v != c.want {
			t.Errorf("%s: %v (%v), want %v", what, v, got, c.want)
		}
	}
}

func TestEveryBitCounts(t *testing.T) {
	want := Stamp{vol, 7, 3, 100}
	p := make([]byte, BlockSize)
	want.Fill(p)
	for bit := range BlockSize * 8 {
		p[bit/8] ^= 1 << (bit % 8)
		if _, v := Check(p, want); v != Corrupt {
			t.Fatalf("bit %d flipped: %v", bit, v)
		}
		p[bit/8] ^= 1 << (bit % 8)
	}
}

func TestFillCountsBlocks(t *testing.T) {
	p := make([]byte, 3*BlockSize)
	Stamp{vol, 10, 1, 2}.Fill(p)
	for i := range uint64(3) {
		if got, v := Check(p[i*BlockSize:], Stamp{vol, 10 + i, 1, 2}); v != Right {
			t.Errorf("block %d: %v %v", i, v, got)
		}
	}
}

func BenchmarkCheck(b *testing.B) {
	p := make([]byte, BlockSize)
	want := Stamp{vol, 7, 3, 100}
	want.Fill(p)
	b.SetBytes(BlockSize)
	for b.Loop() {
		if _, v := Check(p, want); v != Right {
			b.Fatal(v)
		}
	}
}
