package sco

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"strconv"
	"strings"

	"github.com/google/uuid"

	"varve/volumedriver/seal"
)

const (
	// MaxRootBytes bounds a root object: some 50,000 snapshots.
	MaxRootBytes = 16 << 20
	// MaxSnapshotNameBytes bounds a snapshot's name.
	MaxSnapshotNameBytes = 255
	// MaxLabels bounds a snapshot's labels.
	MaxLabels = 64

	rootFixedBytes = 16
	rootVersion    = 2
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
	Template  bool      `json:"template,omitempty"`

	// Snapshots are those of the volume when its log had reached AtLog, oldest first. SCOs with a later log range tell of
	// newer ones by their marks.
	Snapshots []RootSnapshot `json:"snapshots,omitempty"`
	AtLog     uint64         `json:"at_log,omitempty"`

	Owns []RootOwned `json:"owns,omitempty"`

	// Parent is what the volume was cloned from; nil: nothing.
	Parent *RootParent `json:"parent,omitempty"`
	// Spans say whose SCOs the ordinals belong to, ascending by From.
	Spans []RootSpan `json:"spans,omitempty"`

	Keys    []seal.Wrapped  `json:"keys,omitempty"`    // the last is the one for new objects
	Options json.RawMessage `json:"options,omitempty"` // per volume: codec, limits; the volume driver's own words
}

// RootSnapshot is a snapshot as a root tells of it.
type RootSnapshot struct {
	ID         uuid.UUID         `json:"id"`
	Name       string            `json:"name"`
	Seq        uint64            `json:"seq"`     // of the log
	Created    int64             `json:"created"` // Unix nanoseconds
	Size       int64             `json:"size"`    // of the volume then
	Consistent bool              `json:"consistent,omitempty"`
	Automatic  bool              `json:"automatic,omitempty"`
	Sticky     bool              `json:"sticky,omitempty"`
	Labels     map[string]string `json:"labels,omitempty"`
	Nobodys    bool              `json:"nobodys,omitempty"` // it was deleted, and is there for the maps of others
}

// RootOwned is a snapshot that a promotion has given to the volume, whichever volume's log it stands in. Of several volumes that say so
// of one snapshot the one with the highest N counts.
type RootOwned struct {
	Snapshot uuid.UUID `json:"snapshot"`
	N        uint64    `json:"n"`
}

// RootParent is the snapshot that a volume began as.
type RootParent struct {
	Volume   uuid.UUID `json:"volume"`
	Snapshot uuid.UUID `json:"snapshot"`
	Seq      uint64    `json:"seq"`  // of the parent's log
	Base     uint64    `json:"base"` // number of the volume's first own SCO: ordinals below belong to Spans of its ancestors
}

// RootSpan says that the SCOs numbered From and above, up to the next span's From, were written by Volume in Epoch.
type RootSpan struct {
	From   uint64    `json:"from"`
	Epoch  uint64    `json:"epoch"`
	Volume uuid.UUID `json:"volume"`
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
	if err := r.check(); err != nil {
		return nil, fmt.Errorf("encode root of %s: %w", r.Volume, err)
	}
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
		return nil, fmt.Errorf("root of version %d, this program reads version %d: %w", v, rootVersion, ErrUnsupported)
	}
	body := b[rootFixedBytes:]
	if uint64(le.Uint32(b[8:])) != uint64(len(body)) || le.Uint32(b[12:]) != rootCRC(b[:12], body) {
		return nil, fmt.Errorf("root length or checksum: %w", ErrFormat)
	}
	r := &Root{}
	if err := json.Unmarshal(body, r); err != nil {
		return nil, fmt.Errorf("root (%w): %w", err, ErrFormat)
	}
	if err := r.check(); err != nil {
		return nil, fmt.Errorf("root (%w): %w", err, ErrFormat)
	}
	return r, nil
}

// check refuses what would mislead a reader. It asks for no more, since a refused root is a lost name.
func (r *Root) check() error {
	if r.Volume == uuid.Nil || r.Size < 0 {
		return fmt.Errorf("volume %s of size %d", r.Volume, r.Size)
	}
	for i, s := range r.Snapshots {
		if s.ID == uuid.Nil || s.Name == "" || len(s.Name) > MaxSnapshotNameBytes || len(s.Labels) > MaxLabels || s.Size < 0 {
			return fmt.Errorf("snapshot %d: id %s, name of %d bytes, %d labels, size %d", i, s.ID, len(s.Name), len(s.Labels), s.Size)
		}
	}
	for i, s := range r.Owns {
		if s.Snapshot == uuid.Nil {
			return fmt.Errorf("snapshot %d that it owns", i)
		}
	}
	for i, s := range r.Spans {
		if s.Volume == uuid.Nil || i > 0 && s.From <= r.Spans[i-1].From {
			return fmt.Errorf("span %d from %d of volume %s", i, s.From, s.Volume)
		}
	}
	if r.Parent != nil && (r.Parent.Volume == uuid.Nil || r.Parent.Volume == r.Volume) {
		return fmt.Errorf("parent %s", r.Parent.Volume)
	}
	for i, k := range r.Keys {
		if k.KeyID == uuid.Nil || len(k.Wrapped) != seal.WrappedBytes {
			return fmt.Errorf("key %d of %d bytes", i, len(k.Wrapped))
		}
	}
	return nil
}

func rootCRC(fixed, body []byte) uint32 {
	return crc32.Update(Checksum(fixed), castagnoli, body)
}
