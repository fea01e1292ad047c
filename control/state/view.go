package state

import (
	"bytes"
	"fmt"
	"strings"

	"github.com/google/uuid"
	"github.com/hashicorp/go-memdb"
)

// View is a consistent picture of the state as it was when View was called. What it returns are copies.
type View struct{ txn *memdb.Txn }

// View returns the present picture.
func (s *Store) View() *View { return &View{txn: s.db.Txn(false)} }

// Watch returns the present picture and a channel that is closed when the table changes after it. Tables bear the name of
// their object: "task", "event", "node", …
func (s *Store) Watch(table string) (v *View, changed <-chan struct{}, err error) {
	v = s.View()
	it, err := v.txn.Get(table, byID)
	if err != nil {
		return nil, nil, fmt.Errorf("watch table %s: %w", table, err)
	}
	return v, it.WatchCh(), nil
}

// first returns the row with this key in the given unique index. The indexes are constants of this package, so an error
// is a broken invariant.
func first[T any](v *View, table, index string, key []byte) (*T, bool) {
	obj, err := v.txn.First(table, index, key)
	if err != nil {
		panic(err)
	}
	row, ok := obj.(*T)
	return row, ok
}

// rows walks the rows whose key in the index starts with prefix, in key order, until f returns false.
func rows[T any](v *View, table, index string, prefix []byte, f func(*T) bool) {
	it, err := v.txn.Get(table, index+"_prefix", prefix)
	if err != nil {
		panic(err)
	}
	for obj := it.Next(); obj != nil; obj = it.Next() {
		if !f(obj.(*T)) {
			return
		}
	}
}

func all[T any](v *View, table, index string, prefix []byte) []T {
	var out []T
	rows(v, table, index, prefix, func(r *T) bool { out = append(out, *r); return true })
	return out
}

func count[T any](v *View, table, index string, prefix []byte) int {
	n := 0
	rows(v, table, index, prefix, func(*T) bool { n++; return true })
	return n
}

// Cluster returns the cluster's record; ok is false before InitCluster.
func (v *View) Cluster() (Cluster, bool) {
	c, ok := first[Cluster](v, tCluster, byID, clusterKey)
	if !ok {
		return Cluster{}, false
	}
	return *c, true
}

// VPools returns all vPools, by name.
func (v *View) VPools() []VPool { return all[VPool](v, tVPool, byName, nil) }

// VPool returns the vPool of this name.
func (v *View) VPool(name string) (VPool, error) {
	p, ok := first[VPool](v, tVPool, byName, []byte(name))
	if !ok {
		return VPool{}, missing("vpool " + quote(name))
	}
	return *p, nil
}

// VPoolByID returns the vPool with this id.
func (v *View) VPoolByID(id uuid.UUID) (VPool, error) {
	p, ok := first[VPool](v, tVPool, byID, id[:])
	if !ok {
		return VPool{}, missing("vpool " + id.String())
	}
	return *p, nil
}

// VPoolByFSID returns the vPool with this file system id.
func (v *View) VPoolByFSID(fsid uint64) (VPool, error) {
	p, err := v.vpoolByFSID(fsid)
	if err != nil {
		return VPool{}, err
	}
	return *p, nil
}

func (v *View) vpoolByFSID(fsid uint64) (*VPool, error) {
	p, ok := first[VPool](v, tVPool, byFSID, keyFSID(fsid))
	if !ok {
		return nil, missing(fmt.Sprintf("vpool with fsid %016x", fsid))
	}
	return p, nil
}

// Inode returns an inode by number; ErrNotFound once it is removed, for ever.
func (v *View) Inode(fsid, ino uint64) (Inode, error) {
	n, err := v.inode(fsid, ino)
	if err != nil {
		return Inode{}, err
	}
	return *n, nil
}

func (v *View) inode(fsid, ino uint64) (*Inode, error) {
	n, ok := first[Inode](v, tInode, byID, key2(fsid, ino))
	if !ok {
		return nil, missing(inodeObject(fsid, ino))
	}
	return n, nil
}

// Lookup returns the entry of a directory with this name. "." and ".." are the gateway's business: see Inode.Parent.
func (v *View) Lookup(fsid, dir uint64, name string) (Inode, error) {
	if n, ok := first[Inode](v, tInode, byName, keyName(fsid, dir, name)); ok {
		return *n, nil
	}
	if _, err := v.dir(fsid, dir); err != nil {
		return Inode{}, err
	}
	return Inode{}, missing("name " + quote(name))
}

func (v *View) entry(fsid, dir uint64, name string) (*Inode, bool) {
	return first[Inode](v, tInode, byName, keyName(fsid, dir, name))
}

func (v *View) dir(fsid, ino uint64) (*Inode, error) {
	n, err := v.inode(fsid, ino)
	if err != nil {
		return nil, err
	}
	if n.Kind != Dir {
		return nil, &Error{Err: ErrNotDir, Object: inodeObject(fsid, ino)}
	}
	return n, nil
}

// ReadDir returns up to limit entries of a directory with cookies greater than after, in cookie order; eof says that
// nothing follows them.
func (v *View) ReadDir(fsid, dir, after uint64, limit int) (entries []Inode, eof bool, err error) {
	d, err := v.dir(fsid, dir)
	if err != nil {
		return nil, false, err
	}
	if after >= d.NextCookie {
		return nil, true, nil
	}
	it, err := v.txn.LowerBound(tInode, byCookie, key3(fsid, dir, after+1))
	if err != nil {
		panic(err)
	}
	for obj := it.Next(); obj != nil; obj = it.Next() {
		n := obj.(*Inode)
		if n.FSID != fsid || n.Parent != dir {
			break
		}
		if len(entries) >= limit {
			return entries, false, nil
		}
		entries = append(entries, *n)
	}
	return entries, true, nil
}

// Path returns an inode's path in its vPool; the root's is "/".
func (v *View) Path(fsid, ino uint64) (string, error) {
	var parts []string
	for ino != RootIno {
		n, err := v.inode(fsid, ino)
		if err != nil {
			return "", err
		}
		parts = append(parts, n.Name)
		ino = n.Parent
	}
	var b bytes.Buffer
	for i := len(parts) - 1; i >= 0; i-- {
		b.WriteByte('/')
		b.WriteString(parts[i])
	}
	if b.Len() == 0 {
		return "/", nil
	}
	return b.String(), nil
}

// Resolve returns the inode at a path of a vPool. Empty elements are skipped, symbolic links are not followed.
func (v *View) Resolve(fsid uint64, path string) (Inode, error) {
	at, err := v.Inode(fsid, RootIno)
	for name := range strings.SplitSeq(path, "/") {
		if err != nil {
			return Inode{}, err
		}
		if name != "" {
			at, err = v.Lookup(fsid, at.Ino, name)
		}
	}
	return at, err
}

// ResolveDisk returns the vDisk called "vm/a" or, by its file, "vm/a.raw".
func (v *View) ResolveDisk(fsid uint64, name string) (Inode, error) {
	paths := []string{name}
	if !IsDisk(name) {
		paths = []string{name + rawSuffix, name + flatSuffix}
	}
	for _, p := range paths {
		if n, err := v.Resolve(fsid, p); err == nil && n.Kind == File && IsDisk(n.Name) {
			return n, nil
		}
	}
	return Inode{}, missing("vdisk " + quote(name))
}

// Volume returns a volume that still has a name.
func (v *View) Volume(id uuid.UUID) (Volume, error) {
	r, ok := first[Volume](v, tVolume, byID, id[:])
	if !ok {
		return Volume{}, missing("volume " + id.String())
	}
	return *r, nil
}

// VolumesOf returns all volumes of a vPool, by id.
func (v *View) VolumesOf(fsid uint64) []Volume { return all[Volume](v, tVolume, byPool, keyFSID(fsid)) }

// VolumesUnder returns the volumes of the files at and below an inode: those whose path a rename of it changes.
func (v *View) VolumesUnder(fsid, ino uint64) []Volume {
	n, err := v.inode(fsid, ino)
	if err != nil {
		return nil
	}
	var out []Volume
	queue := []*Inode{n}
	for len(queue) > 0 {
		n, queue = queue[0], queue[1:]
		if n.Kind == File {
			if vol, err := v.Volume(n.Volume); err == nil {
				out = append(out, vol)
			}
			continue
		}
		rows(v, tInode, byCookie, key2(fsid, n.Ino), func(c *Inode) bool { queue = append(queue, c); return true })
	}
	return out
}

// Disk is a vDisk: its name in its vPool, its file and its volume.
type Disk struct {
	Name   string // "vm/a"
	Path   string // "/vm/a.raw"
	Inode  Inode
	Volume Volume
}

// Disks returns the vDisks of a vPool, by inode number.
func (v *View) Disks(fsid uint64) []Disk {
	var out []Disk
	rows(v, tInode, byID, keyFSID(fsid), func(n *Inode) bool {
		if n.Kind != File || !IsDisk(n.Name) {
			return true
		}
		path, err := v.Path(fsid, n.Ino)
		if err != nil {
			return true
		}
		vol, err := v.Volume(n.Volume)
		if err != nil {
			return true
		}
		name, _ := DiskName(path)
		out = append(out, Disk{Name: name, Path: path, Inode: *n, Volume: vol})
		return true
	})
	return out
}

// NamedDisk is a vDisk by its name alone.
type NamedDisk struct {
	Name, Path string // "vm/a", "/vm/a.raw"
	Ino        uint64
	Volume     uuid.UUID
}

// NamedDisks returns the vDisks of a vPool, by inode number.
func (v *View) NamedDisks(fsid uint64) []NamedDisk {
	var out []NamedDisk
	dirs := map[uint64]string{RootIno: ""}
	dir := func(ino uint64) (string, bool) {
		path, ok := dirs[ino]
		if !ok {
			var err error
			if path, err = v.Path(fsid, ino); err != nil {
				return "", false
			}
			dirs[ino] = path
		}
		return path, true
	}
	rows(v, tInode, byID, keyFSID(fsid), func(n *Inode) bool {
		if n.Kind != File || !IsDisk(n.Name) {
			return true
		}
		if above, ok := dir(n.Parent); ok {
			path := above + "/" + n.Name
			name, _ := DiskName(path)
			out = append(out, NamedDisk{Name: name, Path: path, Ino: n.Ino, Volume: n.Volume})
		}
		return true
	})
	return out
}

// Token returns the token with this name.
func (v *View) Token(name string) (Token, error) {
	t, ok := first[Token](v, tToken, byID, []byte(name))
	if !ok {
		return Token{}, missing("token " + quote(name))
	}
	return *t, nil
}

// Tokens returns all tokens, by name.
func (v *View) Tokens() []Token { return all[Token](v, tToken, byID, nil) }

// DoomedOf counts the volumes of a vPool that wait for deletion.
func (v *View) DoomedOf(fsid uint64) int { return count[Doomed](v, tDoomed, byPool, keyFSID(fsid)) }

// Doomed returns the volumes that wait for deletion, by id, and a channel that is closed when that table changes.
func (s *Store) Doomed() (volumes []Doomed, changed <-chan struct{}) {
	v := s.View()
	it, err := v.txn.Get(tDoomed, byID)
	if err != nil {
		panic(err)
	}
	for obj := it.Next(); obj != nil; obj = it.Next() {
		volumes = append(volumes, *obj.(*Doomed))
	}
	return volumes, it.WatchCh()
}

// CountVolumes counts the vDisks and the other files of a vPool.
func (v *View) CountVolumes(fsid uint64) (disks, files int) {
	rows(v, tVolume, byPool, keyFSID(fsid), func(r *Volume) bool {
		if r.Kind == DiskVolume {
			disks++
		} else {
			files++
		}
		return true
	})
	return disks, files
}
