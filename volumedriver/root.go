package volumedriver

import (
	"encoding/json"
	"fmt"

	"github.com/google/uuid"

	"varve/volumedriver/blockmap"
)

// scoID names an SCO of a volume. The zero value: none.
type scoID struct {
	Epoch uint64 `json:"epoch"`
	Seq   uint64 `json:"seq"`
}

// epochSpan says that SCOs numbered From and above were written in Epoch.
type epochSpan struct {
	From  uint64 `json:"from"`
	Epoch uint64 `json:"epoch"`
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

const (
	rootPrefix = "volume/"
	doomPrefix = "doomed/"
)

func rootKey(id uuid.UUID) []byte { return []byte(rootPrefix + id.String()) }
func doomKey(id uuid.UUID) []byte { return []byte(doomPrefix + id.String()) }

func (r *root) epoch() uint64 {
	if len(r.Epochs) == 0 {
		return 0
	}
	return r.Epochs[len(r.Epochs)-1].Epoch
}

// epochOf gives the epoch in which SCO seq was written.
func epochOf(spans []epochSpan, seq uint64) uint64 {
	for i := len(spans) - 1; i >= 0; i-- {
		if seq >= spans[i].From {
			return spans[i].Epoch
		}
	}
	return 0
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
