package sco

import (
	"sort"

	"varve/volumedriver/blockio"
)

// Table is what the read path needs of a Header in at most 12 bytes a block (4 a block and 8 an extent): where a block
// lies, what its checksum is, and which LBA it was written for.
type Table struct {
	headerBytes int64
	crc         []uint32
	first       []uint16 // index of each extent's first block
	lbaLow      []uint32
	lbaHigh     []uint16
}

// Table gives the compact form, which shares nothing with h.
func (h *Header) Table() *Table {
	t := &Table{
		headerBytes: int64(h.headerBytes),
		crc:         append([]uint32(nil), h.CRC...),
		first:       make([]uint16, len(h.Extents)),
		lbaLow:      make([]uint32, len(h.Extents)),
		lbaHigh:     make([]uint16, len(h.Extents)),
	}
	index := uint32(0)
	for i, e := range h.Extents {
		t.first[i], t.lbaLow[i], t.lbaHigh[i] = uint16(index), uint32(e.LBA), uint16(e.LBA>>32)
		index += e.Blocks
	}
	return t
}

// Blocks is the number of blocks in the object.
func (t *Table) Blocks() int { return len(t.crc) }

// DataOffset is where in the object the block begins.
func (t *Table) DataOffset(index uint32) int64 { return t.headerBytes + int64(index)*blockio.BlockSize }

// CRCOf is the CRC32C of the block; false if the object has no such block.
func (t *Table) CRCOf(index uint32) (uint32, bool) {
	if int(index) >= len(t.crc) {
		return 0, false
	}
	return t.crc[index], true
}

// LBA is the address that the block was written for; false if the object has no such block.
func (t *Table) LBA(index uint32) (uint64, bool) {
	if int(index) >= len(t.crc) {
		return 0, false
	}
	i := sort.Search(len(t.first), func(i int) bool { return uint32(t.first[i]) > index }) - 1
	return uint64(t.lbaHigh[i])<<32 | uint64(t.lbaLow[i]) + uint64(index) - uint64(t.first[i]), true
}

// Bytes is the memory that the table takes, for a cache's accounting.
func (t *Table) Bytes() int { return 128 + 4*len(t.crc) + 8*len(t.first) }
