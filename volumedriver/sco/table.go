package sco

import (
	"encoding/binary"
	"fmt"
	"slices"

	"varve/volumedriver/blockio"
)

// Table is what the read path needs of a Header: where a block lies, what its checksum is, and which LBA it was written for.
// It takes 4 bytes a block, some 4 an extent and 4 a frame. Methods may be called concurrently.
type Table struct {
	base   int64 // of the SCO in its object
	crc    []uint32
	frames frames

	// Extents in groups of groupExtents: where the first of a group begins, and how all of them are told in coded.
	groups []extentGroup
	coded  []byte
	moved  bool // positions and indexes differ: blocks were left out
}

const groupExtents = 16

// extentGroup is where a group of extents begins.
type extentGroup struct {
	lbaLow   uint32
	at       uint32 // in Table.coded
	lbaHigh  uint16
	position uint16
	index    uint16
}

// Table gives the compact form, which shares nothing with h.
//
// An extent is coded as varint(gap << 2 | 2 if it has more than one block | 1 if indexes were left out before it), then the
// number of blocks and of indexes left out, each as a varint if so announced. gap is the number of LBAs since the end of the
// extent before, 0 for the first of a group, whose LBA, position and index the group has.
func (h *Header) Table() *Table {
	t := &Table{crc: slices.Clone(h.CRC), frames: h.frames, moved: h.Compacted(),
		groups: make([]extentGroup, 0, (len(h.Extents)+groupExtents-1)/groupExtents)}
	t.frames.stored, t.frames.off = slices.Clone(h.frames.stored), slices.Clone(h.frames.off)
	coded := make([]byte, 0, 4*len(h.Extents))
	position, index, end := uint32(0), uint32(0), uint64(0)
	for i, e := range h.Extents {
		if i%groupExtents == 0 {
			t.groups = append(t.groups, extentGroup{uint32(e.LBA), uint32(len(coded)), uint16(e.LBA >> 32), uint16(position), uint16(e.Index)})
			end, index = e.LBA, e.Index
		}
		token := (e.LBA - end) << 2
		if e.Blocks > 1 {
			token |= 2
		}
		if e.Index > index {
			token |= 1
		}
		coded = binary.AppendUvarint(coded, token)
		if e.Blocks > 1 {
			coded = binary.AppendUvarint(coded, uint64(e.Blocks))
		}
		if e.Index > index {
			coded = binary.AppendUvarint(coded, uint64(e.Index-index))
		}
		position, index, end = position+e.Blocks, e.Index+e.Blocks, e.LBA+uint64(e.Blocks)
	}
	t.coded = slices.Clone(coded) // as long as needed
	return t
}

// extentWalk goes over extents. What it decodes was coded here, so it needs no checks.
type extentWalk struct {
	t                       *Table
	at, group, left         int // in coded, the next group, extents left in this one
	lba                     uint64
	position, index, blocks uint32
}

// next decodes the next extent into w; false after the last.
func (w *extentWalk) next() bool {
	if w.left == 0 {
		if w.group == len(w.t.groups) {
			return false
		}
		g := &w.t.groups[w.group]
		w.at, w.lba, w.position, w.index = int(g.at), uint64(g.lbaHigh)<<32|uint64(g.lbaLow), uint32(g.position), uint32(g.index)
		w.group++
		w.blocks, w.left = 0, groupExtents
	}
	if w.at == len(w.t.coded) {
		return false
	}
	token := w.varint()
	w.lba += uint64(w.blocks) + token>>2
	w.position += w.blocks
	w.index += w.blocks
	w.blocks = 1
	if token&2 != 0 {
		w.blocks = uint32(w.varint())
	}
	if token&1 != 0 {
		w.index += uint32(w.varint())
	}
	w.left--
	return true
}

func (w *extentWalk) varint() uint64 {
	coded := w.t.coded[w.at:]
	v := uint64(coded[0])
	if v < 0x80 {
		w.at++
		return v
	}
	v &= 0x7f
	for i, shift := 1, 7; ; i, shift = i+1, shift+7 {
		c := coded[i]
		v |= uint64(c&0x7f) << shift
		if c < 0x80 {
			w.at += i + 1
			return v
		}
	}
}

// groupWith finds the last group that begins at or before the block; -1 if there is none.
func (t *Table) groupWith(index uint32) int {
	lo, hi := 0, len(t.groups)
	for lo < hi {
		if mid := int(uint(lo+hi) >> 1); uint32(t.groups[mid].index) <= index {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return lo - 1
}

// extentWith makes w the extent with the block, false if there is none.
func (t *Table) extentWith(w *extentWalk, index uint32) bool {
	g := t.groupWith(index)
	if g < 0 {
		return false
	}
	w.t, w.group = t, g
	for w.next() {
		if w.index+w.blocks > index {
			return w.index <= index
		}
	}
	return false
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
	if !t.moved {
		return index, int(index) < len(t.crc)
	}
	var w extentWalk
	ok := t.extentWith(&w, index)
	return w.position + index - w.index, ok
}

// CRCOf is the CRC32C of the block's plaintext; false if the object has no such block.
func (t *Table) CRCOf(index uint32) (uint32, bool) {
	p, ok := t.Position(index)
	if !ok {
		return 0, false
	}
	return t.crc[p], true
}

// Block gives the address that the block was written for and its CRC32C; false if the object has no such block.
func (t *Table) Block(index uint32) (lba uint64, crc uint32, ok bool) {
	var w extentWalk
	if !t.extentWith(&w, index) {
		return 0, 0, false
	}
	return w.lba + uint64(index-w.index), t.crc[w.position+index-w.index], true
}

// run gives the position of block index and how many of the n blocks from it on lie one after the other; 0: none is there.
func (t *Table) run(index uint32, n int) (position uint32, blocks int) {
	if !t.moved {
		return index, max(0, min(n, len(t.crc)-int(index)))
	}
	var w extentWalk
	if !t.extentWith(&w, index) {
		return 0, 0
	}
	position = w.position + index - w.index
	end := w.index + w.blocks
	for int(end-index) < n && w.next() && w.index == end {
		end += w.blocks
	}
	return position, max(0, min(n, int(end-index)))
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
	n := 256 + 4*len(t.crc) + 16*len(t.groups) + len(t.coded) + 4*len(t.frames.stored) + 4*len(t.frames.off)
	if t.frames.seal != nil {
		n += 2048
	}
	return n
}
