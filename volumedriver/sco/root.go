package sco

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/google/uuid"
)

// MaxRootBytes bounds a root object.
const MaxRootBytes = 64 << 10

const (
	rootFixedBytes = 16
	rootVersion    = 1
)

// Root says what a volume is. A new one, with the next N, is put when any of it changes; the greatest (Epoch, N) counts.
//
//	| "VROT" 4 | version 2 | 0 2 | length of the JSON 4 | crc32c of the 12 bytes before and the JSON 4 | JSON |
type Root struct {
	Volume    uuid.UUID `json:"volume"`
	Epoch     uint64    `json:"epoch"`
	N         uint64    `json:"n"`
	Pool      uuid.UUID `json:"pool"`
	PoolName  string    `json:"pool_name"`
	Path      string    `json:"path"`
	Kind      string    `json:"kind"` // "disk" or "file"
	Size      int64     `json:"size"` // when the root was put; an SCO's is newer
	Mode      uint32    `json:"mode,omitempty"`
	Created   int64     `json:"created"` // Unix nanoseconds
	BlockSize uint32    `json:"block_size"`
	Parent    string    `json:"parent,omitempty"` // reserved for clones
}

// RootName is the name of a root on the backend. Names of one volume order as (epoch, n).
func RootName(volume uuid.UUID, epoch, n uint64) string {
	return fmt.Sprintf("%s%08x-%016x", RootPrefix(volume), epoch, n)
}

// RootPrefix is what the names of all roots of the volume begin with.
func RootPrefix(volume uuid.UUID) string { return "r/" + volume.String() + "/" }

// ParseRootName undoes RootName.
func ParseRootName(name string) (volume uuid.UUID, epoch, n uint64, err error) {
	parts := strings.Split(name, "/")
	if len(parts) == 3 {
		if e, number, ok := strings.Cut(parts[2], "-"); ok {
			var err1, err2, err3 error
			volume, err1 = uuid.Parse(parts[1])
			epoch, err2 = strconv.ParseUint(e, 16, 64)
			n, err3 = strconv.ParseUint(number, 16, 64)
			if errors.Join(err1, err2, err3) == nil && RootName(volume, epoch, n) == name {
				return volume, epoch, n, nil
			}
		}
	}
	return uuid.Nil, 0, 0, fmt.Errorf("%q is not the name of a root", name)
}

// Encode gives the root's object.
func (r *Root) Encode() ([]byte, error) {
	body, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("encode root of %s: %w", r.Volume, err)
	}
	if len(body) > MaxRootBytes-rootFixedBytes {
		return nil, fmt.Errorf("encode root of %s: %d bytes exceed the limit of %d", r.Volume, len(body), MaxRootBytes)
	}
	le := binary.LittleEndian
	b := make([]byte, 0, rootFixedBytes+len(body))
	b = append(b, "VROT"...)
	b = le.AppendUint32(b, rootVersion)
	b = le.AppendUint32(b, uint32(len(body)))
	b = le.AppendUint32(b, rootCRC(b, body))
	return append(b, body...), nil
}

// ParseRoot reads a root's object.
func ParseRoot(b []byte) (*Root, error) {
	if len(b) < rootFixedBytes || len(b) > MaxRootBytes || string(b[:4]) != "VROT" {
		return nil, fmt.Errorf("root of %d bytes: %w", len(b), ErrFormat)
	}
	le := binary.LittleEndian
	if v := le.Uint32(b[4:]); v != rootVersion {
		return nil, fmt.Errorf("root version %d: %w", v, ErrUnsupported)
	}
	body := b[rootFixedBytes:]
	if uint64(le.Uint32(b[8:])) != uint64(len(body)) || le.Uint32(b[12:]) != rootCRC(b[:12], body) {
		return nil, fmt.Errorf("root length or checksum: %w", ErrFormat)
	}
	r := &Root{}
	if err := json.Unmarshal(body, r); err != nil {
		return nil, fmt.Errorf("root (%w): %w", err, ErrFormat)
	}
	if r.Volume == uuid.Nil || r.Size < 0 {
		return nil, fmt.Errorf("root of volume %s, size %d: %w", r.Volume, r.Size, ErrFormat)
	}
	return r, nil
}

func rootCRC(fixed, body []byte) uint32 {
	return Checksum(append(fixed[:len(fixed):len(fixed)], body...))
}
