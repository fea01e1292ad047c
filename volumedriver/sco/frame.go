package sco

import (
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"

	"varve/volumedriver/blockio"
	"varve/volumedriver/seal"
)

// MaxFrameBlocks is how many blocks may be compressed and encrypted together.
const MaxFrameBlocks = 16

const (
	frameBytes  = MaxFrameBlocks * blockio.BlockSize
	tagBytes    = 16
	listsFrame  = 1<<32 - 1
	aadBytes    = 16 + 8 + 8 + 4 + seal.SaltBytes
	minSaving   = 8 // a frame is compressed if that saves 1/8
	offEvery    = 16
	sampleBytes = 1024 // of a large frame, looked at before it is compressed
)

// Codec is how a frame is compressed.
type Codec uint8

// The codecs. Their numbers are part of the format.
const (
	None Codec = iota
	S2         // for objects as they are first written
	Zstd       // for what scrub writes: it is slower and the blocks have already lived long
)

// String gives the name that ParseCodec takes.
func (c Codec) String() string {
	switch c {
	case None:
		return "none"
	case S2:
		return "s2"
	case Zstd:
		return "zstd"
	}
	return fmt.Sprintf("codec %d", uint8(c))
}

// ParseCodec reads a codec's name.
func ParseCodec(name string) (Codec, error) {
	for c := None; c <= Zstd; c++ {
		if c.String() == name {
			return c, nil
		}
	}
	return None, fmt.Errorf("%q is no codec: none, s2 or zstd", name)
}

// FrameRef says where a frame lies and what it holds.
type FrameRef struct {
	Off    int64  // of the stored bytes in the object
	Stored int    // bytes
	Number uint32 // of the frame
	First  uint32 // position of its first block
	Blocks int
	Codec  Codec
}

// frames is the layout of an object's data.
type frames struct {
	header    int64 // bytes before the data
	bytes     int64 // of the data
	blocks    int
	log2      uint8    // of the blocks in a frame, all but the last
	alignLog2 uint8    // of the header's size
	stored    []uint32 // of each frame, the codec in the highest byte; nil: blocks lie directly one after the other
	off       []uint32 // of each offEvery-th frame from the beginning of the data; set by check
	seal      *sealer  // nil: not encrypted
	salt      [seal.SaltBytes]byte
}

func (f *frames) count() int { return (f.blocks + 1<<f.log2 - 1) >> f.log2 }

func (f *frames) end() int64 { return f.header + f.bytes }

func (f *frames) alignUp(n int) int { return (n + 1<<f.alignLog2 - 1) >> f.alignLog2 << f.alignLog2 }

func (f *frames) blocksOf(k int) int { return min(1<<f.log2, f.blocks-k<<f.log2) }

// of gives the frame that holds the block at a position.
func (f *frames) of(position int) int { return position >> f.log2 }

func (f *frames) flags() byte {
	switch {
	case f.seal != nil:
		return flagSealed | flagFramed
	case f.stored != nil:
		return flagFramed
	}
	return 0
}

// check sets the frames' offsets and tells whether they make up the data.
func (f *frames) check() error {
	if f.stored == nil {
		if f.bytes != int64(f.blocks)*blockio.BlockSize {
			return fmt.Errorf("SCO of %d blocks in %d bytes: %w", f.blocks, f.bytes, ErrFormat)
		}
		return nil
	}
	tag := 0
	if f.seal != nil {
		tag = tagBytes
	}
	f.off = make([]uint32, 0, (len(f.stored)+offEvery-1)/offEvery)
	at := 0
	for k, s := range f.stored {
		codec, n, plain := Codec(s>>24), int(s&(1<<24-1)), f.blocksOf(k)*blockio.BlockSize
		if codec > Zstd {
			return fmt.Errorf("SCO frame %d with codec %d: %w", k, codec, ErrUnsupported)
		}
		if codec == None && n != plain+tag || codec != None && (n <= tag || n >= plain+tag) {
			return fmt.Errorf("SCO frame %d of %d bytes in %d: %w", k, plain, n, ErrFormat)
		}
		if k%offEvery == 0 {
			f.off = append(f.off, uint32(at))
		}
		at += n
	}
	if int64(at) != f.bytes {
		return fmt.Errorf("SCO frames of %d bytes in %d: %w", at, f.bytes, ErrFormat)
	}
	return nil
}

// ref describes frame k.
func (f *frames) ref(k int) FrameRef {
	r := FrameRef{Number: uint32(k), First: uint32(k << f.log2), Blocks: f.blocksOf(k)}
	if f.stored == nil {
		r.Off, r.Stored = f.header+int64(k)<<f.log2*blockio.BlockSize, r.Blocks*blockio.BlockSize
		return r
	}
	r.Off, r.Stored, r.Codec = f.header+int64(f.off[k/offEvery]), int(f.stored[k]&(1<<24-1)), Codec(f.stored[k]>>24)
	for _, s := range f.stored[k-k%offEvery : k] {
		r.Off += int64(s & (1<<24 - 1))
	}
	return r
}

// direct says whether the frame's blocks can be read as they lie.
func (f *frames) direct(k int) bool {
	return f.stored == nil || f.seal == nil && Codec(f.stored[k]>>24) == None
}

// scratch is memory for one frame on its way.
type scratch struct {
	nonce  [12]byte
	aad    [aadBytes + fixedBytes]byte
	packed []byte // a compressed frame
	plain  []byte // a decoded frame
	stored []byte // frames as read from the object
}

var scratches = sync.Pool{New: func() any {
	return &scratch{packed: make([]byte, 0, s2.MaxEncodedLen(frameBytes)), plain: make([]byte, frameBytes)}
}}

var zstdDecoders = sync.Pool{New: func() any {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(frameBytes), zstd.WithDecoderLowmem(true))
	if err != nil {
		panic(fmt.Sprintf("zstd decoder: %v", err)) // of constant options
	}
	return d
}}

// decode makes the frame's blocks in dst, which is as long as they are, from its stored bytes. No checksum of a block is
// checked here.
func (f *frames) decode(dst, stored []byte, r FrameRef) error {
	if len(dst) != r.Blocks*blockio.BlockSize || len(stored) != r.Stored {
		return fmt.Errorf("frame %d: %d bytes from %d, not %d from %d: %w", r.Number, len(dst), len(stored),
			r.Blocks*blockio.BlockSize, r.Stored, ErrFormat)
	}
	if f.seal == nil {
		return decompress(dst, stored, r)
	}
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	plain := s.packed
	if r.Codec == None {
		plain = dst
	}
	plain, err := f.seal.aead.Open(plain[:0], f.seal.prepare(s, r.Number), stored, s.aad[:aadBytes])
	if err != nil {
		return fmt.Errorf("frame %d does not authenticate: %w", r.Number, ErrFormat)
	}
	if r.Codec == None {
		return nil
	}
	return decompress(dst, plain, r)
}

func decompress(dst, packed []byte, r FrameRef) error {
	var got []byte
	var err error
	switch r.Codec {
	case None:
		copy(dst, packed)
		return nil
	case S2:
		var n int
		if n, err = s2.DecodedLen(packed); err == nil && n == len(dst) {
			got, err = s2.Decode(dst, packed)
		}
	case Zstd:
		d := zstdDecoders.Get().(*zstd.Decoder)
		got, err = d.DecodeAll(packed, dst[:0])
		zstdDecoders.Put(d)
	}
	if err != nil || len(got) != len(dst) {
		return fmt.Errorf("decompress frame %d (%w): %w", r.Number, errors.Join(err, errLength), ErrFormat)
	}
	if &got[0] != &dst[0] {
		copy(dst, got)
	}
	return nil
}

var errLength = errors.New("not the length that it should have")

// sealer encrypts or decrypts the frames of one object.
type sealer struct {
	aead cipher.AEAD
	id   [aadBytes]byte // | volume | epoch | seq | 0 4 | salt |
}

// newSealer derives the object's subkey from the salt in h.
func newSealer(h *Header, key *seal.Key) (*sealer, error) {
	s := &sealer{}
	copy(s.id[:], h.Volume[:])
	binary.LittleEndian.PutUint64(s.id[16:], h.Epoch)
	binary.LittleEndian.PutUint64(s.id[24:], h.Seq)
	copy(s.id[36:], h.frames.salt[:])
	var err error
	s.aead, err = key.AEAD("sco", h.frames.salt, s.id[:32])
	return s, err
}

// prepare puts the frame's additional data into x.aad and gives its nonce.
func (s *sealer) prepare(x *scratch, frame uint32) (nonce []byte) {
	copy(x.aad[:], s.id[:])
	binary.LittleEndian.PutUint32(x.aad[32:], frame)
	binary.LittleEndian.PutUint32(x.nonce[:], frame)
	return x.nonce[:]
}

// prepareLists is prepare for the lists of the header that begins with fixed.
func (s *sealer) prepareLists(x *scratch, fixed []byte) (nonce []byte) {
	copy(x.aad[aadBytes:], fixed[:fixedBytes])
	clear(x.aad[aadBytes+12 : aadBytes+16]) // the crc
	return s.prepare(x, listsFrame)
}

// sealLists encrypts the lists at the end of the header b in place.
func (s *sealer) sealLists(b []byte) []byte {
	x := scratches.Get().(*scratch)
	defer scratches.Put(x)
	nonce := s.prepareLists(x, b)
	return s.aead.Seal(b[:fixedBytes], nonce, b[fixedBytes:], x.aad[:])
}

func (s *sealer) openLists(fixed, lists []byte) ([]byte, error) {
	x := scratches.Get().(*scratch)
	defer scratches.Put(x)
	plain, err := s.aead.Open(nil, s.prepareLists(x, fixed), lists, x.aad[:])
	if err != nil {
		return nil, fmt.Errorf("not authentic: %w", ErrFormat)
	}
	return plain, nil
}

// packer makes frames of blocks.
type packer struct {
	codec Codec
	zstd  *zstd.Encoder
}

// compress gives the frame compressed into dst's memory, or nil if that does not pay. crcs are those of its blocks.
func (p *packer) compress(dst, plain []byte, crcs []uint32) ([]byte, error) {
	if p.codec == None || looksRandom(plain) && !repeats(crcs) {
		return nil, nil
	}
	var packed []byte
	if p.codec == S2 {
		packed = s2.Encode(dst[:cap(dst)], plain)
	} else {
		if p.zstd == nil {
			var err error
			p.zstd, err = zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false), zstd.WithSingleSegment(true),
				zstd.WithWindowSize(frameBytes), zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithLowerEncoderMem(true))
			if err != nil {
				return nil, fmt.Errorf("make a zstd encoder: %w", err)
			}
		}
		packed = p.zstd.EncodeAll(plain, dst[:0])
	}
	if len(packed) > len(plain)-len(plain)/minSaving {
		return nil, nil
	}
	return packed, nil
}

// looksRandom says whether a sample of the bytes has nearly as few collisions as random bytes have, which are compressed or
// encrypted already. The expected number of equal pairs in a sample of n bytes with 256 equally likely values is
// n(n-1)/2/256; a third more stands for a collision entropy of 7.6 bits.
func looksRandom(plain []byte) bool {
	var count [256]uint16
	const pieces = 16
	sample := sampleBytes
	if len(plain) <= frameBytes/4 {
		sample /= 2
	}
	piece, step := sample/pieces, len(plain)/pieces
	for i := range pieces {
		at := i*step + i*1237%(step-piece) // not always the beginning of a block, where headers are
		for _, c := range plain[at : at+piece] {
			count[c]++
		}
	}
	pairs := 0
	for _, n := range count {
		pairs += int(n) * (int(n) - 1) / 2
	}
	return pairs < sample*(sample-1)/2/256*4/3
}

// repeats says whether two blocks of a frame are probably equal: then also random ones compress.
func repeats(crcs []uint32) bool {
	for i, c := range crcs {
		for _, d := range crcs[:i] {
			if c == d {
				return true
			}
		}
	}
	return false
}
