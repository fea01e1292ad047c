package writelog

import (
	"fmt"
	"hash/crc32"

	"github.com/google/uuid"
)

// scanner reads the batches of one generation, in order, and accepts nothing that its checksum and the chain do not prove.
type scanner struct {
	seg  *segment
	log  uuid.UUID
	gen  uint64
	salt uint32
	size int64

	off     int64  // of the next batch
	number  uint64 // of the last one
	chain   uint32
	durable uint64 // the newest batch that one of them called durable
	low     uint64 // likewise the low-water mark
	sealed  bool

	head    []byte // the header of the last one
	crcs    []uint32
	payload int64 // offset of its payload

	win    []byte // a piece of the file
	winOff int64
	winLen int
}

const windowBytes = 1 << 20

func newScanner(s *segment, h *segmentHeader) *scanner {
	return &scanner{
		seg: s, log: h.log, gen: h.gen, salt: h.salt, size: int64(h.segmentBytes),
		off: blockSize, number: h.prevLast, chain: h.crc,
	}
}

// window gives the n bytes at off, n at most windowBytes, until the next call.
func (s *scanner) window(off int64, n int) ([]byte, error) {
	if off < s.winOff || off+int64(n) > s.winOff+int64(s.winLen) {
		if s.win == nil {
			s.win = make([]byte, min(windowBytes, s.size))
		}
		p := s.win[:min(int64(len(s.win)), s.size-off)]
		s.winLen = 0
		if got, err := s.seg.file.ReadAt(p, off); got < len(p) {
			return nil, fmt.Errorf("read log segment %s at %d: %w", s.seg.path, off, err)
		}
		s.winOff, s.winLen = off, len(p)
	}
	at := int(off - s.winOff)
	return s.win[at : at+n], nil
}

// next moves over the next batch. errBreak: it is not there.
func (s *scanner) next() (batchHeader, error) {
	if s.sealed {
		return batchHeader{}, fmt.Errorf("%w: the segment was sealed before", errBreak)
	}
	h, ok, err := s.header(s.off)
	if err != nil {
		return h, err
	}
	number := s.number + 1
	seal := h.flags&flagSeal != 0
	if seal {
		number--
	}
	if !ok || h.number != number || h.chain != s.chain {
		return h, fmt.Errorf("%w: no batch %d behind batch %d", errBreak, s.number+1, s.number)
	}
	payload := s.off + int64(h.bytes())
	tables := batchHdrBytes + int(h.records)*recordBytes
	s.crcs = s.crcs[:0]
	for i := range int(h.payloadBlocks) {
		want := le.Uint32(s.head[tables+4*i:])
		block, err := s.window(payload+int64(i)*blockSize, blockSize)
		if err != nil {
			return h, err
		}
		if crc32.Checksum(block, castagnoli) != want {
			return h, fmt.Errorf("%w: checksum of payload block %d of batch %d", errBreak, i, h.number)
		}
		s.crcs = append(s.crcs, want)
	}
	s.number, s.chain, s.sealed, s.payload = h.number, h.crc, seal, payload
	s.off = payload + int64(h.payloadBlocks)*blockSize
	s.durable, s.low = max(s.durable, h.durable), max(s.low, h.low)
	return h, nil
}

// header reads an intact batch header of this generation into head. The batch fits in the segment.
func (s *scanner) header(off int64) (h batchHeader, ok bool, err error) {
	if off+blockSize > s.size {
		return h, false, nil
	}
	block, err := s.window(off, blockSize)
	if err != nil {
		return h, false, err
	}
	h, err = parseBatchHeader(block)
	if err != nil || h.log != s.log || h.gen != s.gen || h.salt != s.salt {
		return h, false, nil
	}
	n := h.bytes()
	if off+int64(n)+int64(h.payloadBlocks)*blockSize > s.size {
		return h, false, nil
	}
	s.head = s.head[:0]
	for len(s.head) < n {
		p, err := s.window(off+int64(len(s.head)), min(n-len(s.head), blockSize))
		if err != nil {
			return h, false, err
		}
		s.head = append(s.head, p...)
	}
	intact := batchHeaderIntact(&h, s.head)
	return h, intact, nil
}

// beyond looks behind the break at s.off for headers of batches that come later in this generation: the number of one, 0
// if there is none, and the highest batch that any of them calls durable.
func (s *scanner) beyond() (number, durable uint64, err error) {
	for off := s.off; off+blockSize <= s.size; off += blockSize {
		h, ok, err := s.header(off)
		if err != nil {
			return 0, 0, err
		}
		if ok && h.number > s.number {
			if number == 0 || h.durable > durable {
				number = h.number
			}
			durable = max(durable, h.durable)
		}
	}
	return number, durable, nil
}
