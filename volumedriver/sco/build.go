package sco

import (
	"bytes"
	"cmp"
	"fmt"
	"math/bits"
	"slices"

	"github.com/google/uuid"

	"varve/volumedriver/blockio"
	"varve/volumedriver/seal"
)

// Options say how an object's bytes are made. The zero value: neither compressed nor encrypted, aligned for direct reads.
type Options struct {
	Codec Codec
	// Key encrypts the object; nil: it is not encrypted.
	Key *seal.Key
	// FrameBlocks is how many blocks are compressed and encrypted together, a power of two up to MaxFrameBlocks; 0: as the
	// codec likes it, see DefaultFrameBlocks. Reading one block costs decoding so many.
	FrameBlocks int
	// Align is a power of two up to MaxAlign of which the header's size is a multiple; 0: MaxAlign, so that blocks that are
	// stored as they are lie in pages. A small one saves space in a container.
	Align int
}

// DefaultFrameBlocks is the size of a codec's frames. Measured on text-like data, one core of an EPYC: the object's size
// relative to the data, building it, and reading one block of it from memory (BenchmarkFrameSize).
//
//	       | s2                      | zstd                    | none, under a key
//	 4 KiB | 0.31  230 MB/s    4 us  | 0.24  130 MB/s   11 us  | 1.006   810 MB/s   2.5 us
//	 8 KiB | 0.29  380 MB/s    8 us  | 0.21  120 MB/s   12 us  | 1.004  1650 MB/s   4.4 us
//	16 KiB | 0.27  470 MB/s   15 us  | 0.20  200 MB/s   20 us  | 1.002  1660 MB/s   8.2 us
//	32 KiB | 0.25  520 MB/s   29 us  | 0.19  210 MB/s   30 us  | 1.002  1680 MB/s    14 us
//	64 KiB | 0.25  570 MB/s   57 us  | 0.18  250 MB/s   73 us  | 1.001  1760 MB/s    27 us
//
// What a guest has just written is read in small pieces more often than what scrub has moved.
func DefaultFrameBlocks(c Codec) int {
	switch c {
	case None:
		return 2
	case S2:
		return 4
	}
	return 8
}

// Builder makes one SCO after the other in the same memory.
type Builder struct {
	h    Header
	key  *seal.Key
	data []byte // the blocks
	pack packer

	header []byte // as built
	out    []byte // the frames as built, if they are not data itself
}

// New begins an SCO of at most capacity blocks. Of h, the lists are ignored.
func New(h Header, capacity int, o Options) *Builder {
	b := &Builder{}
	b.Reset(h, capacity, o)
	return b
}

// Reset begins another SCO in the memory of the last, whose parts are then no longer valid.
func (b *Builder) Reset(h Header, capacity int, o Options) {
	capacity = max(0, min(capacity, MaxBlocks))
	h.Zeros, h.Extents, h.CRC, h.Marks = b.h.Zeros[:0], b.h.Extents[:0], b.h.CRC[:0], b.h.Marks[:0]
	h.KeyID, h.frames = uuid.Nil, frames{stored: b.h.frames.stored[:0]}
	align := o.Align
	if align <= 0 || align > MaxAlign || align&(align-1) != 0 {
		align = MaxAlign
	}
	h.frames.alignLog2 = uint8(bits.TrailingZeros(uint(align)))
	blocks := o.FrameBlocks
	if blocks <= 0 || blocks > MaxFrameBlocks || blocks&(blocks-1) != 0 {
		blocks = DefaultFrameBlocks(o.Codec)
	}
	h.frames.log2 = uint8(bits.TrailingZeros(uint(blocks)))
	b.h, b.key, b.pack.codec = h, o.Key, o.Codec
	if cap(b.data) < capacity*blockio.BlockSize {
		b.data = make([]byte, 0, capacity*blockio.BlockSize)
	}
	b.data = b.data[: 0 : capacity*blockio.BlockSize]
}

// Blocks is how many blocks were added so far.
func (b *Builder) Blocks() int { return len(b.h.CRC) }

// AddZero makes n blocks from lba read as zeros, except where the SCO has data. Any order, overlaps are merged.
func (b *Builder) AddZero(lba, n uint64) error {
	if lba > MaxLBA || n > MaxLBA-lba {
		return fmt.Errorf("zero range %d+%d in an SCO: beyond the address limit", lba, n)
	}
	if n == 0 {
		return nil
	}
	if k := len(b.h.Zeros); k > 0 && b.h.Zeros[k-1].LBA+b.h.Zeros[k-1].Blocks == lba {
		b.h.Zeros[k-1].Blocks += n
		return nil
	}
	if len(b.h.Zeros) == MaxZeros {
		b.mergeZeros()
		if len(b.h.Zeros) == MaxZeros {
			return fmt.Errorf("zero range %d+%d: %w", lba, n, ErrFull)
		}
	}
	b.h.Zeros = append(b.h.Zeros, Range{lba, n})
	return nil
}

// AddMark notes a snapshot at log sequence seq; sequences must ascend within (FirstLog, LastLog]. data is copied.
func (b *Builder) AddMark(seq uint64, data []byte) error {
	after := b.h.FirstLog
	if k := len(b.h.Marks); k == MaxMarks {
		return fmt.Errorf("mark at log %d: %w", seq, ErrFull)
	} else if k > 0 {
		after = b.h.Marks[k-1].Seq
	}
	if seq <= after || seq > b.h.LastLog || len(data) > MaxMarkBytes {
		return fmt.Errorf("mark of %d bytes at log %d after log %d in an SCO of log %d to %d: out of order, or too large",
			len(data), seq, after, b.h.FirstLog, b.h.LastLog)
	}
	b.h.Marks = append(b.h.Marks, Mark{seq, bytes.Clone(data)})
	return nil
}

// Add appends one block; block addresses must ascend.
func (b *Builder) Add(lba uint64, block []byte, crc uint32) error {
	if len(block) != blockio.BlockSize {
		return fmt.Errorf("block %d of %d bytes in an SCO", lba, len(block))
	}
	dst, err := b.Reserve(lba, []uint32{crc})
	if err != nil {
		return err
	}
	copy(dst, block)
	return nil
}

// Reserve appends len(crcs) blocks from lba and returns the memory that the caller must fill with them before Finish.
func (b *Builder) Reserve(lba uint64, crcs []uint32) ([]byte, error) {
	index := uint32(0)
	if k := len(b.h.Extents); k > 0 {
		index = b.h.Extents[k-1].Index + b.h.Extents[k-1].Blocks
	}
	return b.reserve(lba, index, crcs)
}

// reserve is Reserve for blocks with indexes from index on.
func (b *Builder) reserve(lba uint64, index uint32, crcs []uint32) ([]byte, error) {
	n, k := len(crcs), len(b.h.Extents)
	off := len(b.data)
	if n == 0 || off+n*blockio.BlockSize > cap(b.data) || int(index)+n > MaxBlocks {
		return nil, fmt.Errorf("%d blocks from %d: %w", n, lba, ErrFull)
	}
	if lba > MaxLBA-uint64(n) {
		return nil, fmt.Errorf("block %d in an SCO: beyond the address limit", lba)
	}
	switch {
	case k > 0 && b.h.Extents[k-1].LBA+uint64(b.h.Extents[k-1].Blocks) > lba:
		return nil, fmt.Errorf("block %d in an SCO: after block %d", lba, b.h.Extents[k-1].LBA+uint64(b.h.Extents[k-1].Blocks)-1)
	case k > 0 && b.h.Extents[k-1].LBA+uint64(b.h.Extents[k-1].Blocks) == lba:
		b.h.Extents[k-1].Blocks += uint32(n)
	default:
		b.h.Extents = append(b.h.Extents, Extent{LBA: lba, Blocks: uint32(n), Index: index})
	}
	b.h.CRC = append(b.h.CRC, crcs...)
	b.data = b.data[:off+n*blockio.BlockSize]
	return b.data[off:], nil
}

func (b *Builder) mergeZeros() {
	z := b.h.Zeros
	slices.SortFunc(z, func(x, y Range) int { return cmp.Compare(x.LBA, y.LBA) })
	out := z[:0]
	for _, r := range z {
		if k := len(out); k > 0 && r.LBA <= out[k-1].LBA+out[k-1].Blocks {
			out[k-1].Blocks = max(out[k-1].Blocks, r.LBA+r.Blocks-out[k-1].LBA)
			continue
		}
		out = append(out, r)
	}
	b.h.Zeros = out
}

// Compact begins, as Reset does, an SCO that takes the place of the one described by src: the same effect, created at the
// given time, with only those blocks for which live says so, under the indexes that they have. read fills its argument with
// the blocks from index on (Table.Read); what it gives is checked by Finish.
func (b *Builder) Compact(src *Header, created int64, o Options, live func(index uint32) bool,
	read func(p []byte, index uint32) error) error {
	type run struct {
		lba      uint64
		index    uint32
		position int
		blocks   int
	}
	var runs []run
	total, position := 0, 0
	for _, e := range src.Extents {
		open := false
		for i := range e.Blocks {
			if !live(e.Index + i) {
				open = false
			} else if open {
				runs[len(runs)-1].blocks++
				total++
			} else {
				runs = append(runs, run{e.LBA + uint64(i), e.Index + i, position + int(i), 1})
				open = true
				total++
			}
		}
		position += int(e.Blocks)
	}
	h := *src
	h.Created = created
	b.Reset(h, total, o)
	b.h.Zeros = append(b.h.Zeros, src.Zeros...)
	for _, m := range src.Marks {
		b.h.Marks = append(b.h.Marks, Mark{m.Seq, bytes.Clone(m.Data)})
	}
	for _, r := range runs {
		dst, err := b.reserve(r.lba, r.index, src.CRC[r.position:r.position+r.blocks])
		if err != nil {
			return err
		}
		if err := read(dst, r.index); err != nil {
			return fmt.Errorf("compact sco %d-%d: read %d blocks at index %d: %w", src.Epoch, src.Seq, r.blocks, r.index, err)
		}
	}
	return nil
}

// Finish gives the object's bytes as parts (header, data, footer) that stay valid until Reset, after checking every block
// against its checksum. Under a key it gives other bytes each time.
func (b *Builder) Finish() ([][]byte, error) {
	b.mergeZeros()
	for i, crc := range b.h.CRC {
		if Checksum(b.data[i*blockio.BlockSize:(i+1)*blockio.BlockSize]) != crc {
			return nil, fmt.Errorf("build sco %d-%d: block at position %d does not match its checksum: %w",
				b.h.Epoch, b.h.Seq, i, blockio.ErrCorrupt)
		}
	}
	data, err := b.frame()
	if err != nil {
		return nil, fmt.Errorf("build sco %d-%d: %w", b.h.Epoch, b.h.Seq, err)
	}
	if err := b.h.check(); err != nil {
		return nil, err
	}
	if b.header, err = b.h.encode(b.header); err != nil {
		return nil, err
	}
	return [][]byte{b.header, data, b.h.footer()}, nil
}

// frame compresses and encrypts the blocks and describes the result in b.h.frames.
func (b *Builder) frame() ([]byte, error) {
	f := &b.h.frames
	f.blocks, f.seal, f.stored = len(b.h.CRC), nil, f.stored[:0]
	f.salt, b.h.KeyID = [seal.SaltBytes]byte{}, uuid.Nil
	if b.key != nil {
		var err error
		if f.salt, err = seal.Salt(); err != nil {
			return nil, err
		}
		b.h.KeyID = b.key.ID()
		if f.seal, err = newSealer(&b.h, b.key); err != nil {
			return nil, err
		}
	}
	packed := 0
	if b.pack.codec != None || f.seal != nil {
		var err error
		if packed, err = b.packFrames(); err != nil {
			return nil, err
		}
	}
	if packed == 0 && f.seal == nil {
		f.stored, f.off, f.log2, f.bytes = nil, nil, 0, int64(len(b.data))
		return b.data, nil
	}
	f.bytes = int64(len(b.out))
	return b.out, nil
}

// packFrames fills b.out and tells how many frames are compressed.
func (b *Builder) packFrames() (packed int, err error) {
	f := &b.h.frames
	x := scratches.Get().(*scratch)
	defer scratches.Put(x)
	if worst := len(b.data) + f.count()*tagBytes; cap(b.out) < worst {
		b.out = make([]byte, 0, worst)
	}
	out := b.out[:0]
	for k := range f.count() {
		from, n := k<<f.log2, f.blocksOf(k)
		plain := b.data[from*blockio.BlockSize : (from+n)*blockio.BlockSize]
		codec := b.pack.codec
		frame, err := b.pack.compress(x.packed, plain, b.h.CRC[from:from+n])
		if err != nil {
			return 0, err
		}
		if frame == nil {
			frame, codec = plain, None
		} else if packed++; packed == 1 && f.seal == nil {
			out = append(out, b.data[:from*blockio.BlockSize]...) // the raw frames so far
		}
		at, size := len(out), len(frame)
		if f.seal != nil {
			out = f.seal.aead.Seal(out, f.seal.prepare(x, uint32(k)), frame, x.aad[:aadBytes])
			size = len(out) - at
		} else if packed > 0 { // if none will be compressed, the blocks are the data as they are
			out = append(out, frame...)
		}
		f.stored = append(f.stored, uint32(codec)<<24|uint32(size))
	}
	b.out = out
	return packed, nil
}

// Header describes what Finish has built. It is valid until Reset; Table makes a lasting form.
func (b *Builder) Header() *Header { return &b.h }
