package state

import (
	"fmt"
	"unicode/utf8"

	"github.com/google/uuid"
)

// How says how a create treats a name that is taken, as in RFC 1813.
type How string

// Ways to create. An unchecked create of a file finds the file that is there; an exclusive one succeeds again with the
// same verifier; a guarded one refuses. Directories and links are always guarded.
const (
	Unchecked How = "unchecked"
	Guarded   How = "guarded"
	Exclusive How = "exclusive"
)

// CreateInode makes a file with its volume, a directory or a symbolic link. Volume, chosen by the proposer, is for files
// alone; Epoch is that of a volume found on its backend by a rebuild, else 0.
type CreateInode struct {
	FSID     uint64    `json:"fsid"`
	Parent   uint64    `json:"parent"`
	Name     string    `json:"name"`
	Kind     Kind      `json:"kind"`
	How      How       `json:"how"`
	Verifier uint64    `json:"verifier,omitempty"`
	Mode     uint32    `json:"mode"`
	UID      uint32    `json:"uid"`
	GID      uint32    `json:"gid"`
	Target   string    `json:"target,omitempty"`
	Volume   uuid.UUID `json:"volume"`
	Size     int64     `json:"size,omitempty"`
	Epoch    uint64    `json:"epoch,omitempty"`
	// Clone says that the volume begins as a snapshot of another one of the vPool.
	Clone *VolumeParent `json:"clone,omitempty"`
}

func (*CreateInode) kind() (string, int) { return "create_inode", 1 }

func (c *CreateInode) check() error {
	if err := checkName(c.Name); err != nil {
		return err
	}
	object := "name " + quote(c.Name)
	if c.Mode > 0o7777 {
		return invalid(object, fmt.Sprintf("mode %o", c.Mode))
	}
	if c.How != Guarded && c.How != Unchecked && c.How != Exclusive || c.How != Guarded && c.Kind != File {
		return invalid(object, fmt.Sprintf("%s create of a %s", c.How, c.Kind))
	}
	if c.Kind != File && (c.Volume != uuid.Nil || c.Size != 0 || c.Epoch != 0 || c.Clone != nil) || c.Kind != Symlink && c.Target != "" {
		return invalid(object, "a volume is a file's, a target a link's")
	}
	switch c.Kind {
	case File:
		if c.Volume == uuid.Nil {
			return invalid(object, "no volume id")
		}
		if c.Size < 0 || c.Size > VolumeBytesMax {
			return &Error{Err: ErrInvalid, Object: object, Detail: fmt.Sprintf("size %d", c.Size), Remedy: "use 0 to 64 TiB"}
		}
	case Symlink:
		if c.Target == "" || len(c.Target) > TargetBytesMax || !utf8.ValidString(c.Target) {
			return invalid(object, "target is empty, longer than 4095 bytes or not UTF-8")
		}
	case Dir:
	default:
		return invalid(object, "kind "+quote(string(c.Kind)))
	}
	return nil
}

func (c *CreateInode) apply(t *tx) (Result, error) {
	dir, err := t.dir(c.FSID, c.Parent)
	if err != nil {
		return Result{}, err
	}
	if have, ok := t.entry(c.FSID, c.Parent, c.Name); ok {
		return c.found(have)
	}
	if err := t.diskNameFree(c.FSID, c.Parent, c.Name, c.Kind, 0); err != nil {
		return Result{}, err
	}
	pool, err := t.vpoolByFSID(c.FSID)
	if err != nil {
		return Result{}, err
	}
	if pool.Inodes >= InodesMax {
		return Result{}, &Error{Err: ErrNoSpace, Object: "vpool " + quote(pool.Name), Detail: fmt.Sprintf("%d names", pool.Inodes)}
	}
	if t.depth(dir) >= DepthMax {
		return Result{}, &Error{Err: ErrNameTooLong, Object: "name " + quote(c.Name), Detail: "directories nested too deep"}
	}
	if _, err := t.Volume(c.Volume); c.Kind == File && (err == nil || t.isDoomed(c.Volume)) {
		return Result{}, &Error{Err: ErrExist, Object: "volume " + c.Volume.String()}
	}
	if c.Clone != nil {
		if of, err := t.Volume(c.Clone.Volume); err != nil || of.FSID != c.FSID {
			return Result{}, missing("volume " + c.Clone.Volume.String())
		}
	}
	p := *pool
	n := &Inode{FSID: c.FSID, Ino: p.NextIno, Gen: generation(t.index), Parent: c.Parent, Name: c.Name, Kind: c.Kind, Mode: c.Mode,
		UID: c.UID, GID: c.GID, Nlink: 1, Target: c.Target, Atime: t.at, Mtime: t.at, Ctime: t.at, Birth: t.at, Rev: t.index}
	p.NextIno++
	p.Inodes++
	t.put(tVPool, &p)
	switch c.Kind {
	case Dir:
		n.Nlink, n.NextCookie = 2, FirstCookie
	case File:
		n.Volume = c.Volume
		if c.How == Exclusive {
			n.Verifier = c.Verifier
		}
		t.put(tVolume, &Volume{ID: c.Volume, Pool: p.ID, FSID: c.FSID, Ino: n.Ino, Epoch: c.Epoch, Kind: volumeKind(c.Name),
			State: VolumeNew, Size: c.Size, Created: t.at, Rev: t.index, Parent: c.Clone})
	}
	t.link(*dir, n)
	t.put(tInode, n)
	t.fileEvent("create", &p, n, "")
	return Result{Pool: p.ID, Ino: n.Ino, Created: true, Volume: n.Volume}, nil
}

// found is a create whose name is taken by have.
func (c *CreateInode) found(have *Inode) (Result, error) {
	same := c.How == Unchecked || c.How == Exclusive && c.Verifier == have.Verifier && c.Verifier != 0
	if c.Kind == File && have.Kind == File && same {
		return Result{Ino: have.Ino, Volume: have.Volume}, nil
	}
	return Result{}, &Error{Err: ErrExist, Object: "name " + quote(c.Name)}
}

// Topics of events about names: a vDisk's are "volume", those of any other file or of a directory "file".
const (
	topicVolume = "volume"
	topicFile   = "file"
)

// fileEvent tells of a name, as it is now: volume_create, file_rename, … The key is the volume's id, of a directory its inode.
// Directories and links are told of when they move, because that moves what is below.
func (t *tx) fileEvent(what string, pool *VPool, n *Inode, was string) {
	topic, key := topicFile, n.Volume.String()
	switch {
	case n.Kind == File && volumeKind(n.Name) == DiskVolume:
		topic = topicVolume
	case n.Kind != File && what != "rename":
		return
	case n.Kind != File:
		key = fmt.Sprintf("%016x.%d", n.FSID, n.Ino)
	}
	path, err := t.Path(n.FSID, n.Ino)
	if err != nil {
		panic(err)
	}
	t.emit(topic+"_"+what, topic, key, struct {
		VPool string `json:"vpool"`
		Path  string `json:"path"`
		From  string `json:"from,omitempty"`
	}{pool.Name, path, was})
}

// link gives n a place in dir: the next cookie, unless it has one there already, and the directory's new times and counts.
// The caller puts n.
func (t *tx) link(dir Inode, n *Inode) {
	if n.Cookie == 0 {
		n.Cookie = dir.NextCookie
		dir.NextCookie++
	}
	dir.Entries++
	if n.Kind == Dir {
		dir.Nlink++
	}
	t.touch(dir)
}

// unlink takes n out of the counts of dir, the row as it is now. The caller deletes or moves n.
func (t *tx) unlink(dir Inode, n *Inode) {
	dir.Entries--
	if n.Kind == Dir {
		dir.Nlink--
	}
	t.touch(dir)
}

// touch puts a directory whose entries changed.
func (t *tx) touch(dir Inode) {
	dir.Mtime, dir.Ctime, dir.Rev = t.after(dir.Mtime), t.after(dir.Ctime), t.index
	t.put(tInode, &dir)
}

func generation(index uint64) uint32 { return max(uint32(index), 1) }

func volumeKind(name string) VolumeKind {
	if IsDisk(name) {
		return DiskVolume
	}
	return FileVolume
}

// diskNameFree keeps disk names unique: it refuses a disk file whose sibling has the same disk name. moving is an inode
// that leaves its place in the same command.
func (t *tx) diskNameFree(fsid, dir uint64, name string, kind Kind, moving uint64) error {
	sibling, ok := siblingDisk(name)
	if !ok || kind != File {
		return nil
	}
	if have, ok := t.entry(fsid, dir, sibling); ok && have.Kind == File && have.Ino != moving {
		return &Error{Err: ErrExist, Object: "name " + quote(name), Detail: "it would be the same vdisk", By: []string{sibling},
			Remedy: "choose another name before the suffix"}
	}
	return nil
}

func (t *tx) depth(n *Inode) int {
	depth := 0
	for n.Ino != RootIno {
		up, err := t.inode(n.FSID, n.Parent)
		if err != nil {
			panic(err) // every inode's parent exists
		}
		n = up
		depth++
	}
	return depth
}

func (t *tx) isDoomed(id uuid.UUID) bool {
	_, doomed := first[Doomed](&t.View, tDoomed, byID, id[:])
	_, trashed := first[Trashed](&t.View, tTrash, byID, id[:])
	return doomed || trashed
}

// RemoveInode takes a file or link away; the file's volume is doomed, or kept in the trash until Keep. Ino, unless 0, says
// which inode the caller means.
type RemoveInode struct {
	FSID uint64 `json:"fsid"`
	Dir  uint64 `json:"dir"`
	Name string `json:"name"`
	Ino  uint64 `json:"ino,omitempty"`
	Keep Time   `json:"keep,omitempty"`
}

func (*RemoveInode) kind() (string, int) { return "remove_inode", 1 }

func (c *RemoveInode) check() error { return checkName(c.Name) }

func (c *RemoveInode) apply(t *tx) (Result, error) {
	dir, n, err := t.named(c.FSID, c.Dir, c.Name, c.Ino)
	if err != nil {
		return Result{}, err
	}
	if n.Kind == Dir {
		return Result{}, &Error{Err: ErrIsDir, Object: "name " + quote(c.Name)}
	}
	t.unlink(*dir, n)
	return Result{Ino: n.Ino, Doomed: t.remove(n, c.Keep)}, nil
}

// RemoveDir takes an empty directory away.
type RemoveDir struct {
	FSID uint64 `json:"fsid"`
	Dir  uint64 `json:"dir"`
	Name string `json:"name"`
}

func (*RemoveDir) kind() (string, int) { return "remove_dir", 1 }

func (c *RemoveDir) check() error { return checkName(c.Name) }

func (c *RemoveDir) apply(t *tx) (Result, error) {
	dir, n, err := t.named(c.FSID, c.Dir, c.Name, 0)
	if err != nil {
		return Result{}, err
	}
	if n.Kind != Dir {
		return Result{}, &Error{Err: ErrNotDir, Object: "name " + quote(c.Name)}
	}
	if n.Entries > 0 {
		return Result{}, &Error{Err: ErrNotEmpty, Object: "name " + quote(c.Name), Detail: fmt.Sprintf("holds %d names", n.Entries)}
	}
	t.unlink(*dir, n)
	t.remove(n, 0)
	return Result{Ino: n.Ino}, nil
}

// named returns a directory and its entry of this name.
func (t *tx) named(fsid, dirIno uint64, name string, ino uint64) (dir, n *Inode, err error) {
	if dir, err = t.dir(fsid, dirIno); err != nil {
		return nil, nil, err
	}
	n, ok := t.entry(fsid, dirIno, name)
	if !ok {
		return nil, nil, missing("name " + quote(name))
	}
	if ino != 0 && n.Ino != ino {
		return nil, nil, stale("name "+quote(name), n.Rev)
	}
	return dir, n, nil
}

// remove deletes the row of an inode that is out of its directory, dooms its volume, or keeps it in the trash until then, and
// returns the volume's id.
func (t *tx) remove(n *Inode, keep Time) uuid.UUID {
	pool, err := t.vpoolByFSID(n.FSID)
	if err != nil {
		panic(err) // every inode's vpool exists
	}
	p := *pool
	p.Inodes--
	t.put(tVPool, &p)
	if n.Kind == File {
		v, err := t.Volume(n.Volume)
		if err != nil {
			panic(err) // every file has its volume
		}
		path, err := t.Path(n.FSID, n.Ino)
		if err != nil {
			panic(err)
		}
		t.del(tVolume, &v)
		t.dispose(v, n, path, keep)
		t.gone(Ref{Kind: ScopeVDisk, ID: v.ID})
		t.fileEvent("delete", &p, n, "")
	}
	t.del(tInode, n)
	return n.Volume
}

// Rename moves an entry, over an existing one unless NoReplace. Ino, unless 0, says which inode the caller means.
type Rename struct {
	FSID      uint64 `json:"fsid"`
	FromDir   uint64 `json:"from_dir"`
	From      string `json:"from"`
	ToDir     uint64 `json:"to_dir"`
	To        string `json:"to"`
	NoReplace bool   `json:"no_replace,omitempty"`
	Ino       uint64 `json:"ino,omitempty"`
}

func (*Rename) kind() (string, int) { return "rename", 1 }

func (c *Rename) check() error {
	if err := checkName(c.From); err != nil {
		return err
	}
	return checkName(c.To)
}

func (c *Rename) apply(t *tx) (Result, error) {
	_, n, err := t.named(c.FSID, c.FromDir, c.From, c.Ino)
	if err != nil {
		return Result{}, err
	}
	to, err := t.dir(c.FSID, c.ToDir)
	if err != nil {
		return Result{}, err
	}
	old, taken := t.entry(c.FSID, c.ToDir, c.To)
	if taken && old.Ino == n.Ino {
		return Result{Ino: n.Ino, Volume: n.Volume}, nil
	}
	if err := c.allowed(t, n, to, old); err != nil {
		return Result{}, err
	}
	res := Result{Ino: n.Ino, Volume: n.Volume}
	if taken {
		t.unlink(*to, old)
		res.Doomed = t.remove(old, 0)
	}
	t.move(n, c.FromDir, c.ToDir, c.To)
	return res, nil
}

// allowed refuses what a rename may not do; old is nil where the new name is free.
func (c *Rename) allowed(t *tx, n, to, old *Inode) error {
	object := "name " + quote(c.To)
	if old != nil {
		switch {
		case c.NoReplace:
			return &Error{Err: ErrExist, Object: object}
		case old.Kind == Dir && n.Kind != Dir:
			return &Error{Err: ErrIsDir, Object: object}
		case old.Kind != Dir && n.Kind == Dir:
			return &Error{Err: ErrNotDir, Object: object}
		case old.Entries > 0:
			return &Error{Err: ErrNotEmpty, Object: object, Detail: fmt.Sprintf("holds %d names", old.Entries)}
		}
	}
	if n.Kind == Dir {
		for at := to; ; {
			if at.Ino == n.Ino {
				return &Error{Err: ErrLoop, Object: "name " + quote(c.From)}
			}
			if at.Ino == RootIno {
				break
			}
			up, err := t.inode(c.FSID, at.Parent)
			if err != nil {
				panic(err) // every inode's parent exists
			}
			at = up
		}
	}
	if t.depth(to) >= DepthMax {
		return &Error{Err: ErrNameTooLong, Object: object, Detail: "directories nested too deep"}
	}
	return t.diskNameFree(c.FSID, c.ToDir, c.To, n.Kind, n.Ino)
}

// move gives n its new place. Directory rows are read here, after whatever the command did to them before.
func (t *tx) move(n *Inode, fromDir, toDir uint64, name string) {
	pool, err := t.vpoolByFSID(n.FSID)
	if err != nil {
		panic(err) // every inode's vpool exists
	}
	was, err := t.Path(n.FSID, n.Ino)
	if err != nil {
		panic(err)
	}
	moved := *n
	moved.Name, moved.Ctime, moved.Rev = name, t.after(n.Ctime), t.index
	from, err := t.inode(n.FSID, fromDir)
	if err != nil {
		panic(err)
	}
	if fromDir == toDir {
		t.touch(*from)
	} else {
		to, err := t.inode(n.FSID, toDir)
		if err != nil {
			panic(err)
		}
		t.unlink(*from, n)
		moved.Parent, moved.Cookie = toDir, 0
		t.link(*to, &moved)
	}
	t.put(tInode, &moved)
	t.fileEvent("rename", pool, &moved, was)
	if moved.Kind != File {
		return
	}
	v, err := t.Volume(moved.Volume)
	if err != nil {
		panic(err) // every file has its volume
	}
	if kind := volumeKind(name); kind != v.Kind {
		v.Kind, v.Rev = kind, t.index
		t.put(tVolume, &v)
	}
}

// SetAttr changes what is not nil. Size and mtime of a file are the volume's, so Mtime here is a directory's or a link's
// (a file's is kept as well, for a volume that the engine does not know yet). Ctime, unless 0, must be the present one.
type SetAttr struct {
	FSID  uint64  `json:"fsid"`
	Ino   uint64  `json:"ino"`
	Mode  *uint32 `json:"mode,omitempty"`
	UID   *uint32 `json:"uid,omitempty"`
	GID   *uint32 `json:"gid,omitempty"`
	Atime *Time   `json:"atime,omitempty"`
	Mtime *Time   `json:"mtime,omitempty"`
	Ctime Time    `json:"ctime,omitempty"`
}

func (*SetAttr) kind() (string, int) { return "set_attr", 1 }

func (c *SetAttr) check() error {
	if c.Mode != nil && *c.Mode > 0o7777 {
		return invalid(inodeObject(c.FSID, c.Ino), fmt.Sprintf("mode %o", *c.Mode))
	}
	return nil
}

func (c *SetAttr) apply(t *tx) (Result, error) {
	n, err := t.Inode(c.FSID, c.Ino)
	if err != nil {
		return Result{}, err
	}
	if c.Ctime != 0 && c.Ctime != n.Ctime {
		return Result{}, stale(inodeObject(c.FSID, c.Ino), n.Rev)
	}
	set(&n.Mode, c.Mode)
	set(&n.UID, c.UID)
	set(&n.GID, c.GID)
	set(&n.Atime, c.Atime)
	set(&n.Mtime, c.Mtime)
	n.Ctime, n.Rev = t.after(n.Ctime), t.index
	t.put(tInode, &n)
	return Result{Ino: n.Ino, Volume: n.Volume}, nil
}

func set[T any](field *T, to *T) {
	if to != nil {
		*field = *to
	}
}

// ActivateVolume makes Node the owner with the next epoch, if Epoch is still the present one.
type ActivateVolume struct {
	Volume uuid.UUID `json:"volume"`
	Node   uuid.UUID `json:"node"`
	Epoch  uint64    `json:"epoch"`
}

func (*ActivateVolume) kind() (string, int) { return "activate_volume", 1 }

func (c *ActivateVolume) check() error { return nil }

func (c *ActivateVolume) apply(t *tx) (Result, error) {
	v, err := t.Volume(c.Volume)
	if err != nil {
		return Result{}, err
	}
	if _, err := t.Node(c.Node); err != nil {
		return Result{}, err
	}
	if v.Epoch != c.Epoch {
		return Result{}, &Error{Err: ErrConflict, Object: "volume " + c.Volume.String(), Rev: v.Rev,
			Detail: fmt.Sprintf("is at epoch %d, not %d", v.Epoch, c.Epoch), Remedy: "read it again and repeat the change"}
	}
	was := v.Owner
	v.Owner, v.State, v.Rev = c.Node, VolumeActive, t.index
	v.Epoch++
	t.put(tVolume, &v)
	if was != uuid.Nil && was != c.Node {
		t.emit("owner_changed", topicVolume, v.ID.String(), struct {
			From  uuid.UUID `json:"from"`
			To    uuid.UUID `json:"to"`
			Epoch uint64    `json:"epoch"`
		}{was, c.Node, v.Epoch})
	}
	return Result{Volume: v.ID, Epoch: v.Epoch, Pool: v.Pool, Ino: v.Ino}, nil
}

// DeleteVolumeDone says that the engine holds nothing of these doomed volumes any more. Unknown ones are ignored.
type DeleteVolumeDone struct {
	Volumes []uuid.UUID `json:"volumes"`
}

func (*DeleteVolumeDone) kind() (string, int) { return "delete_volume_done", 1 }

func (c *DeleteVolumeDone) check() error { return nil }

func (c *DeleteVolumeDone) apply(t *tx) (Result, error) {
	for _, id := range c.Volumes {
		if d, ok := first[Doomed](&t.View, tDoomed, byID, id[:]); ok {
			t.del(tDoomed, d)
		}
	}
	return Result{}, nil
}
