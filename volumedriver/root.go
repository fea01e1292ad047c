package volumedriver

import (
	"encoding/json"
	"fmt"
	"slices"

	"github.com/google/uuid"

	"varve/volumedriver/blockmap"
	"varve/volumedriver/seal"
)

// scoID names an SCO of a volume. The zero value: none.
type scoID struct {
	Epoch uint64 `json:"epoch"`
	Seq   uint64 `json:"seq"`
}

// epochSpan says that SCOs numbered From and above, up to the next span, were written in Epoch by Volume, or by the volume
// itself if that is nil. A clone goes on with the numbers of its parent, so an ordinal in its map names one SCO whoever wrote it.
type epochSpan struct {
	From   uint64    `json:"from"`
	Epoch  uint64    `json:"epoch"`
	Volume uuid.UUID `json:"volume,omitzero"`
}

// branch is a handle of the volume in the block map. The first has no parent, or, in a clone, the parent volume's snapshot;
// each rollback begins another one.
type branch struct {
	Handle blockmap.Handle `json:"handle"`
	Parent blockmap.Handle `json:"parent,omitempty"` // forked from it, at
	Gen    uint32          `json:"gen,omitempty"`
}

// parentRef says of which snapshot a volume is a clone.
type parentRef struct {
	Volume   uuid.UUID `json:"volume"`
	Snapshot uuid.UUID `json:"snapshot"`
	Seq      uint64    `json:"seq"`  // of the snapshot, in the parent's log
	Base     uint64    `json:"base"` // number of the clone's first own SCO
}

// root is what the node keeps of a volume beside its map leaves, in the same store and checkpointed with them: the state
// as of log sequence Backed. NextSCO is an upper bound of the SCO numbers ever used, raised before they are.
type root struct {
	ID         uuid.UUID       `json:"id"`
	Pool       uuid.UUID       `json:"pool"`
	Handle     blockmap.Handle `json:"handle"`
	Epochs     []epochSpan     `json:"epochs"`
	Size       int64           `json:"size"`
	ModTime    int64           `json:"mod_time"`
	Backed     uint64          `json:"backed"`
	NextSCO    uint64          `json:"next_sco"`
	Prev       scoID           `json:"prev"`
	UsedBlocks int64           `json:"used_blocks"`
	Branches   []branch        `json:"branches"` // with that of Handle; none before the one that it was forked from
	Parent     *parentRef      `json:"parent,omitempty"`
	Template   bool            `json:"template,omitempty"`
	Keys       []seal.Wrapped  `json:"keys,omitempty"` // the last is the one for new SCOs
	Options    volumeOptions   `json:"options,omitzero"`
	Name       rootObject      `json:"name"`
}

// rootObject is what the volume's root on the backend says, and whether it has been put there.
type rootObject struct {
	N        uint64 `json:"n"`
	PoolName string `json:"pool_name"`
	Path     string `json:"path"`
	Kind     string `json:"kind"`
	Created  int64  `json:"created"`
	Put      bool   `json:"put"` // version N is on the backend
}

// scoReserve is how many SCO numbers are reserved at a time.
const scoReserve = 512

// Keys in the metadata of the map store.
const (
	rootPrefix     = "volume/"   // id -> root
	doomPrefix     = "doomed/"   // id -> vPool: its objects are to be deleted
	snapshotPrefix = "snapshot/" // volume/id -> snapshot
	releasePrefix  = "release/"  // handle, generation -> volume: what a deleted snapshot leaves behind is to be given back
	objectPrefix   = "object/"   // volume/number -> where the SCO is
)

func rootKey(id uuid.UUID) []byte             { return []byte(rootPrefix + id.String()) }
func doomKey(id uuid.UUID) []byte             { return []byte(doomPrefix + id.String()) }
func snapshotsKey(volume uuid.UUID) []byte    { return []byte(snapshotPrefix + volume.String() + "/") }
func objectsKey(volume uuid.UUID) []byte      { return []byte(objectPrefix + volume.String() + "/") }
func snapshotKey(volume, id uuid.UUID) []byte { return append(snapshotsKey(volume), id.String()...) }

func (r *root) epoch() uint64 {
	if len(r.Epochs) == 0 {
		return 0
	}
	return r.Epochs[len(r.Epochs)-1].Epoch
}

// withEpoch begins an epoch at SCO number from. Spans that no SCO was written in go.
func withEpoch(spans []epochSpan, from, epoch uint64) []epochSpan {
	spans = slices.DeleteFunc(slices.Clone(spans), func(s epochSpan) bool { return s.From >= from })
	return append(spans, epochSpan{From: from, Epoch: epoch})
}

// spanOf gives the span that SCO number seq lies in: who wrote it, in which epoch.
func spanOf(spans []epochSpan, seq uint64) epochSpan {
	for i := len(spans) - 1; i >= 0; i-- {
		if seq >= spans[i].From {
			return spans[i]
		}
	}
	return epochSpan{}
}

// owner is the volume that wrote SCO number seq of the volume with root r.
func (r *root) owner(seq uint64) (volume uuid.UUID, epoch uint64) {
	s := spanOf(r.Epochs, seq)
	if s.Volume == uuid.Nil {
		return r.ID, s.Epoch
	}
	return s.Volume, s.Epoch
}

func (r *root) encode() blockmap.KV {
	b, err := json.Marshal(r)
	if err != nil {
		panic(fmt.Sprintf("encode root of volume %s: %v", r.ID, err)) // a struct of numbers and strings
	}
	return blockmap.KV{Key: rootKey(r.ID), Value: b}
}

func decodeRoot(b []byte) (root, error) {
	var r root
	if err := json.Unmarshal(b, &r); err != nil {
		return root{}, fmt.Errorf("decode volume root: %w", err)
	}
	return r, nil
}
