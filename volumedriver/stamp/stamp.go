// Package stamp tells, after a crash, whether a volume still holds what it promised.
//
// A test writes blocks that carry a Stamp: which volume, which address, who wrote it and the how-many-th operation it was. The
// Oracle keeps the order of operations and what was acknowledged, and later reads the volume. Its answer is either the prefix
// of the order that the volume equals, or a Violation that names the block, what should be there and what is.
//
// # Block
//
// Each 512 B sector carries the stamp, so that a block torn anywhere is told from a whole one:
//
//	| magic 8 | volume 16 | LBA 8 | seq 8 | writer 4 | sector 4 | crc32c of the 48 bytes before 4 | zero 4 | filler 456 |
//
// Integers are little-endian. The filler's words follow from the CRC, so that every bit of a block is checked.
//
// # Which prefixes fit
//
// Let op s be what a block shows, and n the next operation on that block. The block fits the prefixes s … n-1. A block of
// zeros fits all before its first operation, and z … n-1 for each zeroing or trim z on it. The image equals the prefixes that fit
// all blocks; one of them must contain every operation that was acknowledged as durable.
package stamp

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/google/uuid"
)

const (
	// BlockSize is what one stamp fills.
	BlockSize = 4096

	sectorSize = 512
	sectors    = BlockSize / sectorSize
	headSize   = 56
	magic      = 0x504d415453565256 // "VRVSTAMP"
)

// Stamp identifies one version of one block.
type Stamp struct {
	Volume uuid.UUID
	LBA    uint64
	Writer uint32
	Seq    uint64
}

func (s Stamp) String() string {
	return fmt.Sprintf("op %d of writer %d for block %d of volume %s", s.Seq, s.Writer, s.LBA, s.Volume)
}

// Verdict says what a block is, compared with what it should be.
type Verdict int

const (
	Right       Verdict = iota // the version looked for
	Old                        // an older version of the block
	New                        // a newer version of the block
	Zero                       // all zeros
	Torn                       // sectors of several versions, or of a version and zeros
	Misdirected                // a block of this volume that belongs elsewhere
	Foreign                    // a block of another volume
	Corrupt                    // no stamp, or a damaged one
)

var verdictNames = [...]string{"right", "old", "new", "zero", "torn", "misdirected", "foreign", "corrupt"}

func (v Verdict) String() string { return verdictNames[v] }

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Fill stamps p, whole blocks, from the stamp's LBA on.
func (s Stamp) Fill(p []byte) {
	if len(p)%BlockSize != 0 {
		panic(fmt.Sprintf("stamp %d bytes: no whole blocks", len(p)))
	}
	for ; len(p) > 0; p = p[BlockSize:] {
		for i := range uint32(sectors) {
			s.fillSector(p[i*sectorSize:][:sectorSize], i)
		}
		s.LBA++
	}
}

func (s Stamp) fillSector(p []byte, i uint32) {
	le := binary.LittleEndian
	le.PutUint64(p, magic)
	copy(p[8:], s.Volume[:])
	le.PutUint64(p[24:], s.LBA)
	le.PutUint64(p[32:], s.Seq)
	le.PutUint32(p[40:], s.Writer)
	le.PutUint32(p[44:], i)
	crc := crc32.Checksum(p[:48], castagnoli)
	le.PutUint32(p[48:], crc)
	le.PutUint32(p[52:], 0)
	word := filler(crc)
	for at := headSize; at < sectorSize; at += 8 {
		word += fillerStep
		le.PutUint64(p[at:], word)
	}
}

const fillerStep = 0x9e3779b97f4a7c15

func filler(crc uint32) uint64 { return uint64(crc) * 0xbf58476d1ce4e5b9 }

// readSector gives the stamp of a sector, and whether it is intact.
func readSector(p []byte, i uint32) (s Stamp, ok bool) {
	le := binary.LittleEndian
	crc := le.Uint32(p[48:])
	if le.Uint64(p) != magic || le.Uint32(p[44:]) != i || le.Uint32(p[52:]) != 0 || crc32.Checksum(p[:48], castagnoli) != crc {
		return Stamp{}, false
	}
	word := filler(crc)
	for at := headSize; at < sectorSize; at += 8 {
		word += fillerStep
		if le.Uint64(p[at:]) != word {
			return Stamp{}, false
		}
	}
	copy(s.Volume[:], p[8:])
	s.LBA, s.Seq, s.Writer = le.Uint64(p[24:]), le.Uint64(p[32:]), le.Uint32(p[40:])
	return s, true
}

var zeros [BlockSize]byte

// Read gives the stamp of a block: Right if it is whole, else Zero, Torn or Corrupt, with the stamp of the first intact sector
// if there is one.
func Read(p []byte) (Stamp, Verdict) {
	p = p[:BlockSize]
	if bytes.Equal(p, zeros[:]) {
		return Stamp{}, Zero
	}
	var first Stamp
	intact, blank := 0, 0
	verdict := Right
	for i := range uint32(sectors) {
		sector := p[i*sectorSize:][:sectorSize]
		switch s, ok := readSector(sector, i); {
		case ok && intact == 0:
			first = s
			intact++
		case ok:
			intact++
			if s != first {
				verdict = Torn
			}
		case bytes.Equal(sector, zeros[:sectorSize]):
			blank++
		}
	}
	switch {
	case intact+blank < sectors:
		return first, Corrupt
	case blank > 0:
		return first, Torn
	}
	return first, verdict
}

// Check compares a block with the version that should be there.
func Check(p []byte, want Stamp) (Stamp, Verdict) {
	got, v := Read(p)
	switch {
	case v != Right:
		return got, v
	case got.Volume != want.Volume:
		return got, Foreign
	case got.LBA != want.LBA:
		return got, Misdirected
	case got.Seq < want.Seq:
		return got, Old
	case got.Seq > want.Seq:
		return got, New
	case got.Writer != want.Writer:
		return got, Foreign
	}
	return got, Right
}
