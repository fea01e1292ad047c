package state

import (
	"fmt"

	"github.com/google/uuid"
)

// Trashed is a vDisk that was deleted and can still be had back: its volume has no name, and the engine keeps it as it was.
type Trashed struct {
	Volume
	Path    string `json:"path"` // that it had
	Mode    uint32 `json:"mode"`
	UID     uint32 `json:"uid"`
	GID     uint32 `json:"gid"`
	Removed Time   `json:"removed"`
	// Until is when the deletion becomes final.
	Until Time `json:"until"`
}

const (
	tTrash = "trash"
	// TrashMax bounds what a vPool keeps; beyond it the oldest goes.
	TrashMax = 4096
)

func trashTable(frame byte) object {
	o := rowObject[Trashed](frame, tTrash, map[string]index{
		byID:   always(func(d *Trashed) []byte { return d.ID[:] }),
		byPool: always(func(d *Trashed) []byte { return keyPool(d.FSID, d.ID) }),
	})
	o.commands = []func() Command{command[RestoreTrash], command[EmptyTrash], command[SetParents]}
	o.check = func(v *View) (err error) {
		rows(v, tTrash, byID, nil, func(d *Trashed) bool {
			if _, named := first[Volume](v, tVolume, byID, d.ID[:]); named {
				err = fmt.Errorf("trashed volume %s: still named", d.ID)
			}
			if _, pool := first[VPool](v, tVPool, byID, d.Pool[:]); err == nil && !pool {
				err = fmt.Errorf("trashed volume %s: no vpool %s", d.ID, d.Pool)
			}
			return err == nil
		})
		return err
	}
	return o
}

// dispose dooms a volume, or, where keep says until when, moves it to the trash.
func (t *tx) dispose(v Volume, n *Inode, path string, keep Time) {
	v.Rev = t.index
	if keep == 0 {
		t.put(tDoomed, &Doomed{Volume: v, Path: path, Removed: t.at})
		return
	}
	if count[Trashed](&t.View, tTrash, byPool, keyFSID(v.FSID)) >= TrashMax {
		var oldest *Trashed
		rows(&t.View, tTrash, byPool, keyFSID(v.FSID), func(d *Trashed) bool {
			if oldest == nil || d.Removed < oldest.Removed {
				oldest = d
			}
			return true
		})
		t.discard(oldest)
	}
	t.put(tTrash, &Trashed{Volume: v, Path: path, Mode: n.Mode, UID: n.UID, GID: n.GID, Removed: t.at, Until: keep})
}

// discard makes a deletion final.
func (t *tx) discard(d *Trashed) {
	t.del(tTrash, d)
	v := d.Volume
	v.Rev = t.index
	t.put(tDoomed, &Doomed{Volume: v, Path: d.Path, Removed: d.Removed})
}

// RestoreTrash gives a trashed vDisk a name again, in an existing directory.
type RestoreTrash struct {
	Volume uuid.UUID `json:"volume"`
	Parent uint64    `json:"parent"`
	Name   string    `json:"name"`
}

func (*RestoreTrash) kind() (string, int) { return "restore_trash", 1 }

func (c *RestoreTrash) check() error { return checkName(c.Name) }

func (c *RestoreTrash) apply(t *tx) (Result, error) {
	d, err := t.Trashed(c.Volume)
	if err != nil {
		return Result{}, err
	}
	t.del(tTrash, &d)
	made, err := (&CreateInode{FSID: d.FSID, Parent: c.Parent, Name: c.Name, Kind: File, How: Guarded, Mode: d.Mode, UID: d.UID,
		GID: d.GID, Volume: d.ID, Size: d.Size}).apply(t)
	if err != nil {
		return Result{}, err
	}
	v, err := t.Volume(d.ID)
	if err != nil {
		panic(err) // made just now
	}
	v.Owner, v.Epoch, v.State, v.Created, v.Parent = d.Owner, d.Epoch, d.State, d.Created, d.Volume.Parent
	t.put(tVolume, &v)
	return made, nil
}

// EmptyTrash makes deletions final: of these volumes, and of those whose time is over at the proposer's clock.
type EmptyTrash struct {
	Volumes []uuid.UUID `json:"volumes,omitempty"`
	Due     bool        `json:"due,omitempty"`
}

func (*EmptyTrash) kind() (string, int) { return "empty_trash", 1 }

func (c *EmptyTrash) check() error {
	if len(c.Volumes) > TrashMax {
		return invalid("trash", fmt.Sprintf("%d volumes, more than %d", len(c.Volumes), TrashMax))
	}
	return nil
}

func (c *EmptyTrash) apply(t *tx) (Result, error) {
	var gone []*Trashed
	for _, id := range c.Volumes {
		d, ok := first[Trashed](&t.View, tTrash, byID, id[:])
		if !ok {
			return Result{}, missing("trashed volume " + id.String())
		}
		gone = append(gone, d)
	}
	if c.Due {
		rows(&t.View, tTrash, byID, nil, func(d *Trashed) bool {
			if d.Until <= t.at {
				gone = append(gone, d)
			}
			return true
		})
	}
	for _, d := range gone {
		if _, ok := first[Trashed](&t.View, tTrash, byID, d.ID[:]); ok {
			t.discard(d)
		}
	}
	return Result{}, nil
}

// Trashed returns one deleted vDisk.
func (v *View) Trashed(id uuid.UUID) (Trashed, error) {
	d, ok := first[Trashed](v, tTrash, byID, id[:])
	if !ok {
		return Trashed{}, missing("trashed volume " + id.String())
	}
	return *d, nil
}

// Trash returns the deleted vDisks of a vPool that can still be had back.
func (v *View) Trash(fsid uint64) []Trashed { return all[Trashed](v, tTrash, byPool, keyFSID(fsid)) }

// VolumeParent says of which snapshot a volume is a clone.
type VolumeParent struct {
	Volume   uuid.UUID `json:"volume"`
	Snapshot uuid.UUID `json:"snapshot"`
}

// SetParents says anew what volumes are clones of, after a flatten or a promotion. One that is gone is left out.
type SetParents struct {
	Volumes []NewParent `json:"volumes"`
}

// NewParent is what a volume is a clone of from now on; nil: of nothing.
type NewParent struct {
	Volume uuid.UUID     `json:"volume"`
	Parent *VolumeParent `json:"parent,omitempty"`
}

const newParentsMax = 100000

func (*SetParents) kind() (string, int) { return "set_parents", 1 }

func (c *SetParents) check() error {
	if len(c.Volumes) == 0 || len(c.Volumes) > newParentsMax {
		return invalid("parents", fmt.Sprintf("of %d volumes", len(c.Volumes)))
	}
	for _, n := range c.Volumes {
		if n.Parent != nil && (n.Parent.Volume == n.Volume || n.Parent.Volume == uuid.Nil || n.Parent.Snapshot == uuid.Nil) {
			return invalid("volume "+n.Volume.String(), "such a parent")
		}
	}
	return nil
}

func (c *SetParents) apply(t *tx) (Result, error) {
	for _, n := range c.Volumes {
		if v, err := t.Volume(n.Volume); err == nil {
			v.Parent, v.Rev = n.Parent, t.index
			t.put(tVolume, &v)
		} else if d, err := t.Trashed(n.Volume); err == nil {
			d.Volume.Parent = n.Parent
			t.put(tTrash, &d)
		}
	}
	return Result{}, nil
}

// ClonesOf returns the volumes of a vPool that are clones of a volume's snapshots, also those in the trash.
func (v *View) ClonesOf(fsid uint64, parent uuid.UUID) []Volume {
	var out []Volume
	rows(v, tVolume, byPool, keyFSID(fsid), func(vol *Volume) bool {
		if vol.Parent != nil && vol.Parent.Volume == parent {
			out = append(out, *vol)
		}
		return true
	})
	rows(v, tTrash, byPool, keyFSID(fsid), func(d *Trashed) bool {
		if d.Volume.Parent != nil && d.Volume.Parent.Volume == parent {
			out = append(out, d.Volume)
		}
		return true
	})
	return out
}
