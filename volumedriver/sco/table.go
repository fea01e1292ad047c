package sco

import (
	"fmt"
	"slices"
	"sort"

	"varve/volumedriver/blockio"
)

// Table is what the read path needs of a Header: where a block lies, what its checksum is, and which LBA it was written for.
// It takes 4 bytes a block, 8 an extent (10 in a compacted SCO) and 8 a frame. Methods may be called concurrently.
type Table struct {
	base    int64 // of the SCO in its object
	crc     []uint32
	first   []uint16 // position of each extent's first block
	index   []uint16 // its index; nil: all positions are indexes
	lbaLow  []uint32
	lbaHigh []uint16
	frames  frames
}

// Table gives the compact form, which shares nothing with h.
func (h *Header) Table() *Table {
	t := &Table{
		crc:     slices.Clone(h.CRC),
		first:   make([]uint16, len(h.Extents)),
		lbaLow:  make([]uint32, len(h.Extents)),
		lbaHigh: make([]uint16, len(h.Extents)),
		frames:  h.frames,
	}
	t.frames.stored, t.frames.off = slices.Clone(h.frames.stored), slices.Clone(h.frames.off)
	position := uint32(0)
	for i, e := range h.Extents {
		t.first[i], t.lbaLow[i], t.lbaHigh[i] = uint16(position), uint32(e.LBA), uint16(e.LBA>>32)
		position += e.Blocks
	}
	if h.Compacted() {
		t.index = make([]uint16, len(h.Extents))
		for i, e := range h.Extents {
			t.index[i] = uint16(e.Index)
		}
	}
	return t
}

// Within says that the SCO begins at offset base of its object: it lies in a container. Call it before any other method.
func (t *Table) Within(base int64) *Table {
	t.base = base
	return t
}

// Blocks is the number of blocks in the object.
func (t *Table) Blocks() int { return len(t.crc) }

// Position is the block's place among those that the object holds; false if it holds no such block.
func (t *Table) Position(index uint32) (uint32, bool) {
	if t.index == nil {
		return index, int(index) < len(t.crc)
	}
	i := t.extentAt(index)
	if i < 0 {
		return 0, false
	}
	position := uint32(t.first[i]) + index - uint32(t.index[i])
	return position, position < t.end(i)
}

// extentAt gives the last extent of a compacted SCO that begins at or before index, -1 if there is none.
func (t *Table) extentAt(index uint32) int {
	return sort.Search(len(t.index), func(i int) bool { return uint32(t.index[i]) > index }) - 1
}

// end is the position after the extent's last block.
func (t *Table) end(extent int) uint32 {
	if extent+1 < len(t.first) {
		return uint32(t.first[extent+1])
	}
	return uint32(len(t.crc))
}

// CRCOf is the CRC32C of the block's plaintext; false if the object has no such block.
func (t *Table) CRCOf(index uint32) (uint32, bool) {
	p, ok := t.Position(index)
	if !ok {
		return 0, false
	}
	return t.crc[p], true
}

// LBA is the address that the block was written for; false if the object has no such block.
func (t *Table) LBA(index uint32) (uint64, bool) {
	p, ok := t.Position(index)
	if !ok {
		return 0, false
	}
	i := sort.Search(len(t.first), func(i int) bool { return uint32(t.first[i]) > p }) - 1
	return uint64(t.lbaHigh[i])<<32 | uint64(t.lbaLow[i]) + uint64(p) - uint64(t.first[i]), true
}

// run gives the position of block index and how many of the n blocks from it on lie one after the other; 0: none is there.
func (t *Table) run(index uint32, n int) (position uint32, blocks int) {
	if t.index == nil {
		return index, max(0, min(n, len(t.crc)-int(index)))
	}
	i := t.extentAt(index)
	if i < 0 {
		return 0, 0
	}
	position = uint32(t.first[i]) + index - uint32(t.index[i])
	k := int(t.end(i)) - int(position)
	for i++; k > 0 && k < n && i < len(t.index) && uint32(t.index[i]) == index+uint32(k); i++ {
		k = int(t.end(i)) - int(position)
	}
	return position, max(0, min(n, k))
}

// Direct says where the block lies in the object, if it can be read as it is, and how many of the n blocks from index on lie
// there one after the other.
func (t *Table) Direct(index uint32, n int) (off int64, blocks int, ok bool) {
	position, k := t.run(index, n)
	if k == 0 {
		return 0, 0, false
	}
	if t.frames.stored == nil {
		return t.base + t.frames.header + int64(position)*blockio.BlockSize, k, true
	}
	f := t.frames.of(int(position))
	if !t.frames.direct(f) {
		return 0, 0, false
	}
	r := t.frames.ref(f)
	blocks = min(k, r.Blocks-int(position-r.First))
	for blocks < k && t.frames.direct(f+1) { // raw frames are full, so they lie one after the other
		f++
		blocks = min(k, blocks+t.frames.blocksOf(f))
	}
	return t.base + r.Off + int64(position-r.First)*blockio.BlockSize, blocks, true
}

// Frame gives the frame that holds the block, and the block's place in it.
func (t *Table) Frame(index uint32) (f FrameRef, at int, ok bool) {
	position, ok := t.Position(index)
	if !ok {
		return FrameRef{}, 0, false
	}
	f = t.frame(t.frames.of(int(position)))
	return f, int(position - f.First), true
}

func (t *Table) frame(k int) FrameRef {
	f := t.frames.ref(k)
	f.Off += t.base
	return f
}

// Decode makes the frame's blocks in dst, which is f.Blocks long, from its stored bytes, f.Stored long. The caller checks the
// blocks' checksums.
func (t *Table) Decode(dst, stored []byte, f FrameRef) error { return t.frames.decode(dst, stored, f) }

// readBlocksMax is how many blocks' frames are fetched in one read.
const readBlocksMax = 256

// Read fills p with the blocks from index on, which must all be in the object. read fills its argument from an offset of the
// object; its errors come back as they are. The caller checks the blocks' checksums.
func (t *Table) Read(p []byte, index uint32, read func(p []byte, off int64) error) error {
	for len(p) > 0 {
		n := len(p) / blockio.BlockSize
		position, k := t.run(index, min(n, readBlocksMax))
		if k == 0 {
			return fmt.Errorf("block %d is not in the SCO: %w", index, ErrFormat)
		}
		if t.frames.stored == nil {
			position, k = t.run(index, n)
			if err := read(p[:k*blockio.BlockSize], t.base+t.frames.header+int64(position)*blockio.BlockSize); err != nil {
				return err
			}
		} else if err := t.readFrames(p[:k*blockio.BlockSize], int(position), read); err != nil {
			return err
		}
		p, index = p[k*blockio.BlockSize:], index+uint32(k)
	}
	return nil
}

// readFrames reads the blocks from position on, at most readBlocksMax, with one read.
func (t *Table) readFrames(p []byte, position int, read func(p []byte, off int64) error) error {
	n := len(p) / blockio.BlockSize
	first, last := t.frame(t.frames.of(position)), t.frame(t.frames.of(position+n-1))
	from, to := first.Off, last.Off+int64(last.Stored)
	skip := position - int(first.First) // blocks of the first frame that are not wanted
	if t.frames.direct(int(first.Number)) {
		from += int64(skip) * blockio.BlockSize
	}
	if t.frames.direct(int(last.Number)) {
		to = last.Off + int64(position+n-int(last.First))*blockio.BlockSize
	}
	x := scratches.Get().(*scratch)
	defer scratches.Put(x)
	direct := true
	for k := first.Number; k <= last.Number; k++ {
		direct = direct && t.frames.direct(int(k))
	}
	if direct {
		return read(p, from)
	}
	if int64(cap(x.stored)) < to-from {
		x.stored = make([]byte, to-from)
	}
	stored := x.stored[:to-from]
	if err := read(stored, from); err != nil {
		return err
	}
	for k := int(first.Number); k <= int(last.Number); k++ {
		f := t.frame(k)
		lead, whole := max(0, position-int(f.First)), f.Blocks
		wanted := min(whole, position+n-int(f.First)) - lead
		dst := p[:wanted*blockio.BlockSize]
		p = p[len(dst):]
		if t.frames.direct(k) {
			copy(dst, stored[f.Off+int64(lead)*blockio.BlockSize-from:])
			continue
		}
		frame := stored[f.Off-from:][:f.Stored]
		if wanted == whole {
			if err := t.frames.decode(dst, frame, f); err != nil {
				return err
			}
			continue
		}
		plain := x.plain[:whole*blockio.BlockSize]
		if err := t.frames.decode(plain, frame, f); err != nil {
			return err
		}
		copy(dst, plain[lead*blockio.BlockSize:])
	}
	return nil
}

// Bytes is the memory that the table takes, for a cache's accounting.
func (t *Table) Bytes() int {
	n := 256 + 4*len(t.crc) + 8*len(t.first) + 2*len(t.index) + 8*len(t.frames.stored)
	if t.frames.seal != nil {
		n += 2048
	}
	return n
}
