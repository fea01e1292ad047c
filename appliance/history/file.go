package history

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"math"
	"os"
	"slices"
)

const (
	magic         = "varvehis"
	headBytes     = 16
	frameBytesMax = 64 << 20
	fileBytesMax  = 256 << 20
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// encode makes a frame.
func encode(end int64, objects []Object, step map[Object]*Sample) []byte {
	b := make([]byte, headBytes, headBytes+64*len(objects))
	for _, o := range objects {
		s := step[o]
		b = append(b, byte(o.Kind))
		b = append(b, o.ID[:]...)
		for _, n := range []uint64{s.Reads, s.Writes, s.BytesRead, s.BytesWrite} {
			b = binary.AppendUvarint(b, n)
		}
		for _, l := range []*Latency{&s.ReadTime, &s.WriteTime} {
			used := 0
			for _, n := range l {
				if n > 0 {
					used++
				}
			}
			b = binary.AppendUvarint(b, uint64(used))
			for i, n := range l {
				if n > 0 {
					b = binary.AppendUvarint(binary.AppendUvarint(b, uint64(i)), uint64(n))
				}
			}
		}
		b = binary.AppendUvarint(b, uint64(len(s.Gauges)))
		for g := range gauges {
			if v, ok := s.Gauges[g]; ok {
				b = append(b, byte(g))
				b = binary.LittleEndian.AppendUint64(b, math.Float64bits(v))
			}
		}
	}
	binary.LittleEndian.PutUint32(b[4:], uint32(len(b)-headBytes))
	binary.LittleEndian.PutUint64(b[8:], uint64(end))
	binary.LittleEndian.PutUint32(b, crc32.Checksum(b[4:], castagnoli))
	return b
}

// frameAt gives the whole frame that b begins with, and its end; ok is false where there is none.
func frameAt(b []byte) (body []byte, end int64, ok bool) {
	if len(b) < headBytes {
		return nil, 0, false
	}
	n := binary.LittleEndian.Uint32(b[4:])
	if n > frameBytesMax || int(n) > len(b)-headBytes || crc32.Checksum(b[4:headBytes+int(n)], castagnoli) != binary.LittleEndian.Uint32(b) {
		return nil, 0, false
	}
	return b[headBytes : headBytes+int(n)], int64(binary.LittleEndian.Uint64(b[8:])), true
}

func readFile(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Size() > fileBytesMax {
		return nil, fmt.Errorf("history %s has %d bytes", path, info.Size())
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read the history: %w", err)
	}
	if len(b) < len(magic) || string(b[:len(magic)]) != magic {
		return nil, nil // not begun
	}
	return b, nil
}

// cut takes what is not whole off the end of a file.
func cut(path string) error {
	b, err := readFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	at := min(len(magic), len(b))
	for {
		body, _, ok := frameAt(b[at:])
		if !ok {
			break
		}
		at += headBytes + len(body)
	}
	if at < len(b) {
		if err := os.Truncate(path, int64(at)); err != nil {
			return fmt.Errorf("cut the history: %w", err)
		}
	}
	return nil
}

// decodeFile tells of each frame of a file until frame returns false. entries decodes those of the frame, and is false where they are not
// what encode makes.
func decodeFile(path string, frame func(end int64, entries func(func(Object, *Sample)) bool) bool) error {
	b, err := readFile(path)
	if err != nil || b == nil {
		return err
	}
	for b = b[len(magic):]; ; {
		body, end, ok := frameAt(b)
		if !ok {
			return nil
		}
		b = b[headBytes+len(body):]
		if !frame(end, func(f func(Object, *Sample)) bool { return decode(body, f) }) {
			return nil
		}
	}
}

// decode reads entries; false where b is not what encode makes. It takes any bytes. A sample is valid until f returns.
func decode(b []byte, f func(Object, *Sample)) bool {
	number := func() uint64 {
		n, used := binary.Uvarint(b)
		if used <= 0 {
			b = nil
			return math.MaxUint64
		}
		b = b[used:]
		return n
	}
	s, known := &Sample{}, make(map[Gauge]float64)
	for len(b) > 0 {
		if len(b) < 17 {
			return false
		}
		o := Object{Kind: Kind(b[0]), ID: [16]byte(b[1:17])}
		b = b[17:]
		clear(known)
		*s = Sample{Reads: number(), Writes: number(), BytesRead: number(), BytesWrite: number(), Gauges: known}
		for _, l := range []*Latency{&s.ReadTime, &s.WriteTime} {
			n := number()
			if n > Buckets {
				return false
			}
			for range n {
				i, count := number(), number()
				if i >= Buckets || count > math.MaxUint32 {
					return false
				}
				l[i] = uint32(count)
			}
		}
		n := number()
		if n > uint64(len(b))/9 {
			return false
		}
		for range n {
			s.Gauges[Gauge(b[0])] = math.Float64frombits(binary.LittleEndian.Uint64(b[1:]))
			b = b[9:]
		}
		if slices.Contains([]Kind{Node, VPool, VDisk}, o.Kind) { // others are a later version's
			f(o, s)
		}
	}
	return true
}
