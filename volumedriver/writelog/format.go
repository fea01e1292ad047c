package writelog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/google/uuid"

	"varve/volumedriver/seal"
)

// The layout is drawn in the package comment.
const (
	formatVersion   = 2
	segmentMagic    = "varvseg\x01"
	batchMagic      = "varvbat\x01"
	segmentHdrBytes = 96
	segmentCRCAt    = 76
	batchHdrBytes   = 96
	batchCRCAt      = 88
	recordBytes     = 56

	// What a header may claim, whatever this node's own limits: a segment of 4 GiB holds no more.
	recordsMax       = 1 << 20
	payloadBlocksMax = 1 << 20

	flagSeal = 1 // an empty batch with the number of the one before: the generation ends here
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

var le = binary.LittleEndian

// crcAround is the checksum of b with the four bytes at the given offset taken as zero.
func crcAround(b []byte, at int) uint32 {
	var zero [4]byte
	c := crc32.Update(0, castagnoli, b[:at])
	c = crc32.Update(c, castagnoli, zero[:])
	return crc32.Update(c, castagnoli, b[at+4:])
}

// headerBytes is the size of the header of a batch with that many records and payload blocks.
func headerBytes(records, payloadBlocks int) int {
	n := batchHdrBytes + records*recordBytes + payloadBlocks*4
	return (n + blockSize - 1) / blockSize * blockSize
}

type segmentHeader struct {
	slot         uint32
	log          uuid.UUID
	gen          uint64
	low          uint64
	prevLast     uint64 // last batch of the generations before
	prevChain    uint32
	salt         uint32
	segmentBytes uint64
	crc          uint32
	keySalt      [seal.SaltBytes]byte
}

// encode fills a block and sets h.crc.
func (h *segmentHeader) encode(b []byte) {
	clear(b[:blockSize])
	copy(b, segmentMagic)
	le.PutUint32(b[8:], formatVersion)
	le.PutUint32(b[12:], h.slot)
	copy(b[16:32], h.log[:])
	le.PutUint64(b[32:], h.gen)
	le.PutUint64(b[40:], h.low)
	le.PutUint64(b[48:], h.prevLast)
	le.PutUint32(b[56:], h.prevChain)
	le.PutUint32(b[60:], h.salt)
	le.PutUint64(b[64:], h.segmentBytes)
	copy(b[80:], h.keySalt[:])
	h.crc = crcAround(b[:blockSize], segmentCRCAt)
	le.PutUint32(b[segmentCRCAt:], h.crc)
}

// errNoHeader: the block is not an intact segment header. A slot that was never used, or a torn write.
var errNoHeader = errors.New("no segment header")

func parseSegmentHeader(b []byte) (segmentHeader, error) {
	if len(b) < blockSize || string(b[:8]) != segmentMagic {
		return segmentHeader{}, errNoHeader
	}
	h := segmentHeader{
		slot:         le.Uint32(b[12:]),
		log:          uuid.UUID(b[16:32]),
		gen:          le.Uint64(b[32:]),
		low:          le.Uint64(b[40:]),
		prevLast:     le.Uint64(b[48:]),
		prevChain:    le.Uint32(b[56:]),
		salt:         le.Uint32(b[60:]),
		segmentBytes: le.Uint64(b[64:]),
		crc:          le.Uint32(b[segmentCRCAt:]),
		keySalt:      [seal.SaltBytes]byte(b[80:96]),
	}
	if crcAround(b[:blockSize], segmentCRCAt) != h.crc {
		return segmentHeader{}, errNoHeader
	}
	if v := le.Uint32(b[8:]); v != formatVersion {
		return segmentHeader{}, fmt.Errorf("log segment has format %d, this version knows %d", v, formatVersion)
	}
	if h.gen == 0 || h.low == 0 || h.low > h.gen {
		return segmentHeader{}, fmt.Errorf("%w: segment header of generation %d has low-water mark %d", ErrCorrupt, h.gen, h.low)
	}
	return h, nil
}

type batchHeader struct {
	log           uuid.UUID
	gen           uint64
	number        uint64
	durable       uint64
	low           uint64
	time          int64
	chain         uint32
	salt          uint32
	records       uint32
	payloadBlocks uint32
	flags         uint32
	crc           uint32
}

func (h *batchHeader) bytes() int { return headerBytes(int(h.records), int(h.payloadBlocks)) }

// encode fills the fixed part of b, whose tables are in place and which is h.bytes() long, and sets h.crc.
func (h *batchHeader) encode(b []byte) {
	copy(b, batchMagic)
	copy(b[8:24], h.log[:])
	le.PutUint64(b[24:], h.gen)
	le.PutUint64(b[32:], h.number)
	le.PutUint64(b[40:], h.durable)
	le.PutUint64(b[48:], h.low)
	le.PutUint64(b[56:], uint64(h.time))
	le.PutUint32(b[64:], h.chain)
	le.PutUint32(b[68:], h.salt)
	le.PutUint32(b[72:], h.records)
	le.PutUint32(b[76:], h.payloadBlocks)
	le.PutUint32(b[80:], uint32(len(b)))
	le.PutUint32(b[84:], h.flags)
	le.PutUint32(b[88:], 0)
	le.PutUint32(b[92:], 0)
	h.crc = crc32.Checksum(b, castagnoli)
	le.PutUint32(b[batchCRCAt:], h.crc)
}

// errBreak: what lies here is not the batch that should.
var errBreak = errors.New("not the next batch")

// parseBatchHeader reads the fixed part. Its checksum can be checked once h.bytes() are there: see batchHeaderIntact.
func parseBatchHeader(b []byte) (batchHeader, error) {
	if len(b) < batchHdrBytes || string(b[:8]) != batchMagic {
		return batchHeader{}, errBreak
	}
	h := batchHeader{
		log:           uuid.UUID(b[8:24]),
		gen:           le.Uint64(b[24:]),
		number:        le.Uint64(b[32:]),
		durable:       le.Uint64(b[40:]),
		low:           le.Uint64(b[48:]),
		time:          int64(le.Uint64(b[56:])),
		chain:         le.Uint32(b[64:]),
		salt:          le.Uint32(b[68:]),
		records:       le.Uint32(b[72:]),
		payloadBlocks: le.Uint32(b[76:]),
		flags:         le.Uint32(b[84:]),
		crc:           le.Uint32(b[batchCRCAt:]),
	}
	if h.records > recordsMax || h.payloadBlocks > payloadBlocksMax || le.Uint32(b[80:]) != uint32(h.bytes()) {
		return batchHeader{}, errBreak
	}
	return h, nil
}

func batchHeaderIntact(h *batchHeader, b []byte) bool {
	return len(b) == h.bytes() && crcAround(b, batchCRCAt) == h.crc
}

func putRecord(b []byte, r *Record) {
	copy(b[:16], r.Volume[:])
	le.PutUint64(b[16:], r.Seq)
	le.PutUint64(b[24:], r.LBA)
	le.PutUint64(b[32:], r.Blocks)
	le.PutUint64(b[40:], r.Value)
	le.PutUint64(b[48:], 0)
	b[48], b[49] = byte(r.Kind), r.Flags
	le.PutUint16(b[50:], r.Key)
}

// getRecord reads one record and says how many payload blocks it has.
func getRecord(b []byte, r *Record) (payloadBlocks int, err error) {
	*r = Record{
		Volume: uuid.UUID(b[:16]),
		Seq:    le.Uint64(b[16:]),
		LBA:    le.Uint64(b[24:]),
		Blocks: le.Uint64(b[32:]),
		Value:  le.Uint64(b[40:]),
		Kind:   Kind(b[48]),
		Flags:  b[49],
		Key:    le.Uint16(b[50:]),
	}
	return r.check()
}

// check says how many payload blocks go with the record, or what is wrong with it.
func (r *Record) check() (payloadBlocks int, err error) {
	switch r.Kind {
	case Data:
		if r.Blocks == 0 || r.Blocks > RecordBlocksMax {
			return 0, fmt.Errorf("log record %d of volume %s: %d blocks, want 1 to %d", r.Seq, r.Volume, r.Blocks, RecordBlocksMax)
		}
		payloadBlocks = int(r.Blocks)
	case Zero, Size, Mark:
	default:
		return 0, fmt.Errorf("log record %d of volume %s: unknown kind %d", r.Seq, r.Volume, r.Kind)
	}
	if r.Key != 0 && r.Kind != Data {
		return 0, fmt.Errorf("log record %d of volume %s: kind %d with key %d", r.Seq, r.Volume, r.Kind, r.Key)
	}
	if r.Kind != Size && r.Kind != Mark && r.LBA+r.Blocks < r.LBA {
		return 0, fmt.Errorf("log record %d of volume %s: %d blocks from %d overflow", r.Seq, r.Volume, r.Blocks, r.LBA)
	}
	return payloadBlocks, nil
}
