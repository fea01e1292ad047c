package rpc

import (
	"encoding/binary"
	"errors"
)

// Limits of one record. Anything beyond them ends the connection: the stream can no longer be followed.
const (
	// RecordBytesMax is a WRITE of 1 MiB with the largest header.
	RecordBytesMax = 1<<20 + 4<<10
	// FragmentsMax is how many fragments, also empty ones, a record may have.
	FragmentsMax = 64
	// BufferBytesMin is what an idle connection holds.
	BufferBytesMin = 4 << 10
	// idleBufferBytesMax is the largest buffer that Shrink leaves alone.
	idleBufferBytesMax = 64 << 10
	// burstBufferBytesMax is how long the buffer gets only because more has arrived than it held.
	burstBufferBytesMax = 256 << 10
)

var (
	// ErrRecordTooLong: a record beyond RecordBytesMax.
	ErrRecordTooLong = errors.New("rpc record is too long")
	// ErrTooManyFragments: a record of more than FragmentsMax fragments.
	ErrTooManyFragments = errors.New("rpc record has too many fragments")
)

// Records cuts a stream of bytes into records. The reader of a socket reads into Space, tells Filled, and takes records
// with Next until there is none. Memory follows what has arrived, at most doubled, never what a mark claims.
type Records struct {
	// BytesMax is the longest record taken, when it is not RecordBytesMax.
	BytesMax  int
	buf       []byte
	r, w      int
	joined    []byte // fragments before the last one of the record being received
	fragments int
}

// Space returns where to read into; it is never empty. A buffer that the last read has filled is doubled, up to
// burstBufferBytesMax: more is waiting, and records that are taken together are committed and answered together.
func (s *Records) Space() []byte {
	switch {
	case s.buf == nil:
		s.buf = make([]byte, BufferBytesMin)
	case s.w == len(s.buf) && len(s.buf) < burstBufferBytesMax:
		grown := make([]byte, 2*len(s.buf))
		s.w = copy(grown, s.buf[s.r:s.w])
		s.r, s.buf = 0, grown
	case s.r == s.w:
		s.r, s.w = 0, 0
	case s.w == len(s.buf) && (s.r > len(s.buf)/2 || s.r > 0 && len(s.buf) > RecordBytesMax):
		s.w = copy(s.buf, s.buf[s.r:s.w])
		s.r = 0
	case s.w == len(s.buf):
		grown := make([]byte, 2*len(s.buf))
		s.w = copy(grown, s.buf[s.r:s.w])
		s.r, s.buf = 0, grown
	}
	return s.buf[s.w:]
}

// Filled tells that n bytes were read into Space.
func (s *Records) Filled(n int) { s.w += n }

// Partial tells that a record has begun and not ended.
func (s *Records) Partial() bool { return s.r != s.w || s.fragments > 0 }

// Large tells that the buffers are larger than a connection at rest should keep.
func (s *Records) Large() bool {
	return len(s.buf) > idleBufferBytesMax || cap(s.joined) > idleBufferBytesMax
}

// Shrink gives up buffers of a connection at rest; it does nothing while a record is in them.
func (s *Records) Shrink() {
	if !s.Partial() {
		*s = Records{BytesMax: s.BytesMax}
	}
}

// Next returns the next whole record, or ok false when more bytes are needed. The record stays valid until the next call
// of Next, Space or Shrink.
func (s *Records) Next() (record []byte, ok bool, err error) {
	max := RecordBytesMax
	if s.BytesMax > 0 {
		max = s.BytesMax
	}
	if s.fragments == 0 {
		s.joined = s.joined[:0]
	}
	for {
		have := s.buf[s.r:s.w]
		if len(have) < markBytes {
			return nil, false, nil
		}
		mark := binary.BigEndian.Uint32(have)
		n := int(mark &^ lastBit)
		if n+len(s.joined) > max {
			return nil, false, ErrRecordTooLong
		}
		if s.fragments == FragmentsMax {
			return nil, false, ErrTooManyFragments
		}
		if len(have)-markBytes < n {
			return nil, false, nil
		}
		fragment := have[markBytes : markBytes+n : markBytes+n]
		s.r += markBytes + n
		last := mark&lastBit != 0
		if last && s.fragments == 0 {
			return fragment, true, nil
		}
		s.joined = append(s.joined, fragment...)
		s.fragments++
		if last {
			s.fragments = 0
			return s.joined, true, nil
		}
	}
}
