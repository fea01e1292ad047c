package state

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/uuid"
)

// InitCluster makes the cluster's record. A second one with another id is refused: two bootstraps would be two clusters.
type InitCluster struct {
	ID     uuid.UUID `json:"id"`
	Format int       `json:"format"`
}

func (*InitCluster) kind() (string, int) { return "init_cluster", 1 }

func (c *InitCluster) check() error {
	if c.ID == uuid.Nil || c.Format != Format {
		return invalid("cluster "+c.ID.String(), fmt.Sprintf("format %d, this binary knows %d", c.Format, Format))
	}
	return nil
}

func (c *InitCluster) apply(t *tx) (Result, error) {
	if have, ok := t.Cluster(); ok {
		if have.ID == c.ID {
			return Result{}, nil
		}
		return Result{}, &Error{Err: ErrConflict, Object: "cluster " + have.ID.String(),
			Detail: "is not " + c.ID.String(), Remedy: "start the node with the data directory it was made with"}
	}
	t.put(tCluster, &Cluster{ID: c.ID, Format: c.Format, Created: t.at, Rev: t.index})
	return Result{}, nil
}

// CreateVPool makes a vPool with an empty root directory.
type CreateVPool struct {
	ID      uuid.UUID `json:"id"`
	Name    string    `json:"name"`
	Backend Backend   `json:"backend"`
	Key     []byte    `json:"key"`
	Clients []string  `json:"clients"`
	Mode    uint32    `json:"mode"`
	UID     uint32    `json:"uid"`
	GID     uint32    `json:"gid"`
	// Findings are those of the probe of the backend.
	Findings []Finding `json:"findings,omitempty"`
	// Keys are the backend's sealed credentials, of the name S3KeysOf(ID).
	Keys *SetSecret `json:"keys,omitempty"`
	// Compression and KEK, of the name KEKOf(ID), say how what is stored is made; no KEK: it is not encrypted.
	Compression string     `json:"compression,omitempty"`
	KEK         *SetSecret `json:"kek,omitempty"`
}

func checkCompression(object, c string) error {
	switch c {
	case "", "none", "s2", "zstd":
		return nil
	}
	return &Error{Err: ErrInvalid, Object: object, Field: "compression", Detail: "compression " + quote(c), Remedy: "use none, s2 or zstd"}
}

func (*CreateVPool) kind() (string, int) { return "create_vpool", 1 }

func (c *CreateVPool) check() error {
	object := "vpool " + quote(c.Name)
	if err := checkLabel("vpool", c.Name); err != nil {
		return err
	}
	if FSIDOf(c.ID) == 0 {
		return invalid(object, "no id")
	}
	if len(c.Key) != len(Secret{}) {
		return invalid(object, "no handle key")
	}
	if c.Mode > 0o7777 {
		return invalid(object, fmt.Sprintf("mode %o", c.Mode))
	}
	if err := checkClients(object, c.Clients); err != nil {
		return err
	}
	if err := checkFindings(object, c.Findings); err != nil {
		return err
	}
	if (c.Keys != nil) != (c.Backend.Kind == BackendS3) || c.Keys != nil && c.Keys.Name != S3KeysOf(c.ID) {
		return invalid(object, "a bucket needs credentials, and only that")
	}
	if c.Keys != nil {
		if err := c.Keys.check(); err != nil {
			return err
		}
	}
	if err := checkCompression(object, c.Compression); err != nil {
		return err
	}
	if c.KEK != nil {
		if c.KEK.Name != KEKOf(c.ID) {
			return invalid(object, "the key is not this vPool's")
		}
		if err := c.KEK.check(); err != nil {
			return err
		}
	}
	return c.Backend.Check(object)
}

func checkClients(object string, clients []string) error {
	if len(clients) > ClientsMax {
		return invalid(object, fmt.Sprintf("%d NFS clients, more than %d", len(clients), ClientsMax))
	}
	for _, c := range clients {
		p, err := netip.ParsePrefix(c)
		if err != nil || p.Masked() != p {
			return &Error{Err: ErrInvalid, Object: object, Field: "clients", Detail: "NFS client " + quote(c) + " is not a network",
				Remedy: "use CIDR with host bits zero, such as 10.0.0.0/8 or 192.0.2.7/32"}
		}
	}
	return nil
}

func (c *CreateVPool) apply(t *tx) (Result, error) {
	for _, p := range t.VPools() {
		switch {
		case p.Name == c.Name:
			return Result{}, &Error{Err: ErrExist, Object: "vpool " + quote(c.Name)}
		case p.ID == c.ID || p.FSID == FSIDOf(c.ID):
			return Result{}, &Error{Err: ErrExist, Object: "vpool id " + c.ID.String(), By: []string{p.Name}}
		case p.Backend.Overlaps(c.Backend):
			return Result{}, &Error{Err: ErrConflict, Object: "vpool " + quote(c.Name),
				Detail: "its backend overlaps that of another vpool",
				By:     []string{p.Name}, Remedy: "give every vpool a directory or prefix of its own"}
		}
	}
	if c.Keys != nil {
		if _, err := c.Keys.apply(t); err != nil {
			return Result{}, err
		}
	}
	if c.KEK != nil {
		if _, err := c.KEK.apply(t); err != nil {
			return Result{}, err
		}
	}
	p := &VPool{ID: c.ID, Compression: c.Compression, Encrypted: c.KEK != nil, Name: c.Name, FSID: FSIDOf(c.ID), Backend: c.Backend, Findings: slices.Clone(c.Findings), Clients: slices.Clone(c.Clients),
		Class: ClassNone, NextIno: RootIno + 1, Inodes: 1, Created: t.at, Rev: t.index}
	copy(p.Key[:], c.Key)
	t.put(tVPool, p)
	t.put(tInode, &Inode{FSID: p.FSID, Ino: RootIno, Gen: generation(t.index), Parent: RootIno, Kind: Dir, Mode: c.Mode,
		UID: c.UID, GID: c.GID, Nlink: 2, Atime: t.at, Mtime: t.at, Ctime: t.at, Birth: t.at, NextCookie: FirstCookie, Rev: t.index})
	return Result{Pool: c.ID, Ino: RootIno, Created: true}, nil
}

// UpdateVPool changes who may mount. Rev 0 changes whatever is there.
type UpdateVPool struct {
	ID      uuid.UUID `json:"id"`
	Rev     uint64    `json:"rev"`
	Clients []string  `json:"clients"`
}

func (*UpdateVPool) kind() (string, int) { return "update_vpool", 1 }

func (c *UpdateVPool) check() error { return checkClients("vpool "+c.ID.String(), c.Clients) }

func (c *UpdateVPool) apply(t *tx) (Result, error) {
	p, err := t.VPoolByID(c.ID)
	if err != nil {
		return Result{}, err
	}
	if c.Rev != 0 && c.Rev != p.Rev {
		return Result{}, stale("vpool "+quote(p.Name), p.Rev)
	}
	p.Clients, p.Rev = slices.Clone(c.Clients), t.index
	t.put(tVPool, &p)
	return Result{Pool: p.ID}, nil
}

// DeleteVPool takes an empty vPool away: no name in it, no deleted volume still on its backend.
type DeleteVPool struct {
	ID  uuid.UUID `json:"id"`
	Rev uint64    `json:"rev"`
}

func (*DeleteVPool) kind() (string, int) { return "delete_vpool", 1 }

func (c *DeleteVPool) check() error { return nil }

func (c *DeleteVPool) apply(t *tx) (Result, error) {
	p, err := t.VPoolByID(c.ID)
	if err != nil {
		return Result{}, err
	}
	if c.Rev != 0 && c.Rev != p.Rev {
		return Result{}, stale("vpool "+quote(p.Name), p.Rev)
	}
	if p.Inodes > 1 {
		return Result{}, &Error{Err: ErrNotEmpty, Object: "vpool " + quote(p.Name), Detail: fmt.Sprintf("holds %d names", p.Inodes-1),
			By: t.someNames(p.FSID), Remedy: "delete what it holds first"}
	}
	if n := t.DoomedOf(p.FSID); n > 0 {
		return Result{}, &Error{Err: ErrConflict, Object: "vpool " + quote(p.Name),
			Detail: fmt.Sprintf("%d deleted volumes are still being removed from its backend", n), Remedy: "try again in a moment"}
	}
	if trash := t.Trash(p.FSID); len(trash) > 0 {
		return Result{}, &Error{Err: ErrNotEmpty, Object: "vpool " + quote(p.Name), Detail: fmt.Sprintf("%d vDisks are in its trash", len(trash)),
			Remedy: "empty the trash first"}
	}
	root, err := t.inode(p.FSID, RootIno)
	if err != nil {
		return Result{}, err
	}
	t.del(tInode, root)
	t.del(tVPool, &p)
	t.gone(Ref{Kind: ScopeVPool, ID: p.ID})
	return Result{Pool: p.ID}, nil
}

// someNames lists the first entries of a vPool's root for a message.
func (t *tx) someNames(fsid uint64) []string {
	entries, eof, err := t.ReadDir(fsid, RootIno, 0, blockersListedMax)
	if err != nil {
		return nil
	}
	names := make([]string, 0, len(entries)+1)
	for _, e := range entries {
		name, disk := DiskName(e.Name)
		if e.Kind != File || !disk {
			name = e.Name
		}
		names = append(names, name)
	}
	if !eof {
		names = append(names, "…")
	}
	return names
}
