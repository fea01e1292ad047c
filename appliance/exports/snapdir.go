package exports

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"

	"github.com/google/uuid"

	"varve/control/state"
	"varve/gateway/nfs"
	"varve/volumedriver"
)

// SnapshotDir is the name of the hidden directory in each directory of a datastore that shows the snapshots of the files in
// it, read-only, as "file@snapshot". It is in no listing: a client names it.
const SnapshotDir = ".snapshots"

// WithSnapshots gives the tree with a SnapshotDir in each directory.
//
// What is in there has no inode in state. Its number says what it is: the directory of directory d is snapDir|d; the snapshot
// of file f is snapFile, the low 30 bits of f, and 32 bits of the snapshot's identity. So handles live as long as the
// snapshot, over restarts and on every node. A number that two snapshots of a file share means the older of them.
func (n *NFS) WithSnapshots() nfs.Namespace { return &history{NFS: n} }

const (
	snapDir  = uint64(1) << 63
	snapFile = uint64(1) << 62
	fileBits = 30
)

type history struct{ *NFS }

func isSnap(inode uint64) bool { return inode&(snapDir|snapFile) != 0 }

// snapBits are those of a snapshot in its inode number.
func snapBits(id uuid.UUID) uint64 { return uint64(binary.BigEndian.Uint32(id[:4])) }

// dirAttr is that of the SnapshotDir in directory d.
func dirAttr(d nfs.Attr) nfs.Attr {
	d.Inode, d.Mode, d.Nlink = snapDir|d.Inode, 0o555, 2
	return d
}

// fileAttr is that of a file's snapshot.
func fileAttr(of nfs.Attr, s volumedriver.Snapshot) nfs.Attr {
	of.Inode = snapFile | of.Inode&(1<<fileBits-1)<<32 | snapBits(s.ID)
	of.Mode &^= 0o222
	of.Size, of.Used = s.Size, s.Used
	of.Atime, of.Mtime, of.Ctime = s.Created, s.Created, s.Created
	return of
}

// snapshots lists those of a file.
func (h *history) snapshots(ctx context.Context, i state.Inode) ([]volumedriver.Snapshot, error) {
	if i.Kind != state.File {
		return nil, nil
	}
	if _, ok := h.volumes.Info(i.Volume); !ok {
		return nil, nil
	}
	v, release, err := h.volumes.Open(ctx, i.Volume)
	if err != nil {
		return nil, staleOr(err)
	}
	defer release()
	return v.Snapshots(), nil
}

// file finds the snapshot of an inode number.
func (h *history) file(ctx context.Context, fsid, inode uint64) (state.Inode, volumedriver.Snapshot, error) {
	gone := func() (state.Inode, volumedriver.Snapshot, error) {
		return state.Inode{}, volumedriver.Snapshot{}, fmt.Errorf("snapshot with inode %#x: %w", inode, nfs.ErrStale)
	}
	i, err := h.ns.Inode(fsid, inode>>32&(1<<fileBits-1), 0)
	if err != nil {
		return gone()
	}
	all, err := h.snapshots(ctx, i)
	if err != nil {
		return state.Inode{}, volumedriver.Snapshot{}, err
	}
	for _, s := range all {
		if snapBits(s.ID) == inode&(1<<32-1) {
			return i, s, nil
		}
	}
	return gone()
}

// Attr implements nfs.Namespace.
func (h *history) Attr(ctx context.Context, fsid, inode uint64, generation uint32) (nfs.Attr, error) {
	switch {
	case inode&snapDir != 0:
		d, err := h.NFS.Attr(ctx, fsid, inode&^snapDir, generation)
		return dirAttr(d), err
	case inode&snapFile != 0:
		i, s, err := h.file(ctx, fsid, inode)
		if err != nil {
			return nfs.Attr{}, err
		}
		if generation != 0 && generation != i.Gen {
			return nfs.Attr{}, nfs.ErrStale
		}
		return fileAttr(h.attr(i), s), nil
	}
	return h.NFS.Attr(ctx, fsid, inode, generation)
}

// Lookup implements nfs.Namespace.
func (h *history) Lookup(ctx context.Context, fsid, dir uint64, name string) (nfs.Attr, error) {
	switch {
	case dir&snapFile != 0:
		return nfs.Attr{}, nfs.ErrNotDir
	case dir&snapDir != 0 && name == "..":
		return h.NFS.Attr(ctx, fsid, dir&^snapDir, 0)
	case dir&snapDir != 0:
		file, snap, ok := strings.Cut(name, "@")
		for ok {
			i, err := h.ns.Lookup(fsid, dir&^snapDir, file)
			if err == nil {
				all, err := h.snapshots(ctx, i)
				if err != nil {
					return nfs.Attr{}, err
				}
				for _, s := range all {
					if s.Name == snap {
						return fileAttr(h.attr(i), s), nil
					}
				}
			}
			var more string // the file's name may have an @ in it
			if more, snap, ok = strings.Cut(snap, "@"); ok {
				file += "@" + more
			}
		}
		return nfs.Attr{}, nfs.ErrNotFound
	}
	a, err := h.NFS.Lookup(ctx, fsid, dir, name)
	if err != nil && name == SnapshotDir {
		if d, e := h.NFS.Attr(ctx, fsid, dir, 0); e == nil && d.Kind == nfs.Dir {
			return dirAttr(d), nil
		}
	}
	return a, err
}

// ReadDir implements nfs.Namespace: of a SnapshotDir, every snapshot of every file, in the order of the files' cookies and
// the snapshots' age. A cookie is the file's, and 24 bits for the place among its snapshots.
func (h *history) ReadDir(ctx context.Context, fsid, dir uint64, after uint64, max int) ([]nfs.Entry, bool, error) {
	if dir&snapFile != 0 {
		return nil, false, nfs.ErrNotDir
	}
	if dir&snapDir == 0 {
		return h.NFS.ReadDir(ctx, fsid, dir, after, max)
	}
	const place = 24
	var out []nfs.Entry
	from := uint64(0)
	if after >= 1<<place {
		from = after>>place - 1
	}
	for {
		inodes, eof, err := h.ns.ReadDir(fsid, dir&^snapDir, from, 64)
		if err != nil {
			return nil, false, staleOr(err)
		}
		for _, i := range inodes {
			from = i.Cookie
			all, err := h.snapshots(ctx, i)
			if err != nil {
				return nil, false, err
			}
			for k, s := range all {
				cookie := i.Cookie<<place | uint64(min(k, 1<<place-1))
				if cookie <= after {
					continue
				}
				if len(out) == max {
					return out, false, nil
				}
				out = append(out, nfs.Entry{Cookie: cookie, Name: i.Name + "@" + s.Name, Attr: fileAttr(h.attr(i), s)})
			}
		}
		if eof || len(inodes) == 0 {
			return out, true, nil
		}
	}
}

// readOnly refuses a change of what is in a SnapshotDir, or a name that hides one.
func readOnly(name string, inodes ...uint64) error {
	if name == SnapshotDir || slices.ContainsFunc(inodes, isSnap) {
		return nfs.ErrReadOnly
	}
	return nil
}

// Create implements nfs.Namespace.
func (h *history) Create(ctx context.Context, fsid, dir uint64, name string, c nfs.CreateSpec) (nfs.Attr, bool, error) {
	if err := readOnly(name, dir); err != nil {
		return nfs.Attr{}, false, err
	}
	return h.NFS.Create(ctx, fsid, dir, name, c)
}

// SetAttr implements nfs.Namespace.
func (h *history) SetAttr(ctx context.Context, fsid, inode uint64, set nfs.SetAttr) (nfs.Attr, error) {
	if err := readOnly("", inode); err != nil {
		return nfs.Attr{}, err
	}
	return h.NFS.SetAttr(ctx, fsid, inode, set)
}

// Remove implements nfs.Namespace.
func (h *history) Remove(ctx context.Context, fsid, dir uint64, name string) error {
	if err := readOnly("", dir); err != nil {
		return err
	}
	return h.NFS.Remove(ctx, fsid, dir, name)
}

// Rmdir implements nfs.Namespace.
func (h *history) Rmdir(ctx context.Context, fsid, dir uint64, name string) error {
	if err := readOnly("", dir); err != nil {
		return err
	}
	return h.NFS.Rmdir(ctx, fsid, dir, name)
}

// Rename implements nfs.Namespace.
func (h *history) Rename(ctx context.Context, fsid, fromDir uint64, from string, toDir uint64, to string) error {
	if err := readOnly(to, fromDir, toDir); err != nil {
		return err
	}
	return h.NFS.Rename(ctx, fsid, fromDir, from, toDir, to)
}

// Link implements nfs.Namespace.
func (h *history) Link(ctx context.Context, fsid, inode, dir uint64, name string) error {
	if err := readOnly(name, inode, dir); err != nil {
		return err
	}
	return h.NFS.Link(ctx, fsid, inode, dir, name)
}

// Readlink implements nfs.Namespace.
func (h *history) Readlink(ctx context.Context, fsid, inode uint64) (string, error) {
	if isSnap(inode) {
		return "", nfs.ErrInvalid
	}
	return h.NFS.Readlink(ctx, fsid, inode)
}

// Open implements nfs.Namespace.
func (h *history) Open(ctx context.Context, fsid, inode uint64) (nfs.File, func(), error) {
	switch {
	case inode&snapDir != 0:
		return nil, nil, fmt.Errorf("open inode %#x: %w", inode, nfs.ErrInvalid)
	case inode&snapFile == 0:
		return h.NFS.Open(ctx, fsid, inode)
	}
	i, s, err := h.file(ctx, fsid, inode)
	if err != nil {
		return nil, nil, err
	}
	r, err := h.volumes.driver.OpenSnapshot(ctx, i.Volume, s.ID)
	if err != nil {
		return nil, nil, err
	}
	return snapshot{r}, func() { _ = r.Close() }, nil
}

var (
	_ nfs.File      = snapshot{}
	_ nfs.Namespace = (*history)(nil)
)
