// Package namespace offers the names of vPools to gateways: what an NFS server asks, in terms of inodes, on top of the
// replicated state. Reads come from this node's state and touch no disk; changes return when raft has committed them.
// Bytes, sizes and mtimes of files are the volume driver's; whoever wires a gateway merges them (see Attr rules below).
//
//	ns := namespace.New(raftNode, raftNode.State())
//	ns.VPools() []state.VPool                                               // exports: FSID, Name, Clients, Key
//	ns.Inode(fsid, ino, gen) (state.Inode, error)                           // gen 0 = any; state.ErrNotFound = stale handle
//	ns.Lookup(fsid, dir, name) (state.Inode, error)                         // also "." and ".."
//	ns.ReadDir(fsid, dir, after, limit) ([]state.Inode, eof, error)         // Inode.Cookie, Inode.Name; cookies start at 3
//	ns.Readlink(fsid, ino) (string, error)
//	ns.Create(ctx, fsid, dir, name, Spec) (state.Inode, created bool, error)
//	ns.SetAttr(ctx, fsid, ino, Change) (state.Inode, error)
//	ns.Remove(ctx, fsid, dir, name) (state.Inode, error)                    // the inode that is gone, with its volume
//	ns.Rmdir(ctx, fsid, dir, name) error
//	ns.Rename(ctx, fsid, fromDir, from, toDir, to) (Renamed, error)
//	ns.Files(fsid) (used, limit uint64)
//	namespace.Stamp(time.Time) state.Time, namespace.Time(state.Time) time.Time
//
// Attr rules. Of a file: size, used and mtime come from the engine if it knows the volume, else from Volume.Size and
// Inode.Mtime; ctime is the later of Inode.Ctime and the engine's mtime; a guard on ctime is therefore checked by whoever
// merges. Of a directory or link: all from the inode, size is conventional. A file's volume is opened under the next
// epoch (state.ActivateVolume) once per process. A removed file's volume needs nothing from the gateway: it is doomed in
// state and vdisk.Controller.Run has the engine delete it.
//
// Errors are *state.Error: ErrNotFound ErrExist ErrNotEmpty ErrIsDir ErrNotDir ErrInvalid ErrNameTooLong ErrLoop ErrNoSpace,
// and raft's ErrUnavailable, after which the outcome of a change is unknown.
package namespace

import (
	"context"
	"encoding/binary"
	"errors"
	"time"

	"github.com/google/uuid"

	"varve/control/state"
)

// Proposer commits a command and returns what it did. raft.Node is one.
type Proposer interface {
	Apply(ctx context.Context, cmd state.Command) (state.Result, error)
}

// Namespace serves all vPools.
type Namespace struct {
	raft  Proposer
	store *state.Store
}

// New wires a namespace to the state and to what changes it.
func New(raft Proposer, store *state.Store) *Namespace {
	return &Namespace{raft: raft, store: store}
}

// Stamp turns a clock's time into the state's.
func Stamp(t time.Time) state.Time { return state.Time(t.UnixNano()) }

// Time turns the state's time into a clock's.
func Time(t state.Time) time.Time { return time.Unix(0, int64(t)) }

// VPools returns all vPools, by name.
func (n *Namespace) VPools() []state.VPool { return n.store.View().VPools() }

// Inode returns an inode; ErrNotFound where it is gone or its generation is not gen. gen 0 asks for any.
func (n *Namespace) Inode(fsid, ino uint64, gen uint32) (state.Inode, error) {
	i, err := n.store.View().Inode(fsid, ino)
	if err == nil && gen != 0 && i.Gen != gen {
		return state.Inode{}, &state.Error{Err: state.ErrNotFound, Object: "inode", Detail: "of that generation"}
	}
	return i, err
}

// Lookup returns a directory's entry, the directory itself for "." and its parent (at the root: the root) for "..".
func (n *Namespace) Lookup(fsid, dir uint64, name string) (state.Inode, error) {
	v := n.store.View()
	if name != "." && name != ".." {
		return v.Lookup(fsid, dir, name)
	}
	d, err := v.Inode(fsid, dir)
	switch {
	case err != nil:
		return state.Inode{}, err
	case d.Kind != state.Dir:
		return state.Inode{}, &state.Error{Err: state.ErrNotDir, Object: "inode"}
	case name == ".":
		return d, nil
	}
	return v.Inode(fsid, d.Parent)
}

// ReadDir returns up to limit entries with cookies greater than after, 0 being the start. Cookies ascend, belong to one
// entry for as long as it is in the directory and are never given again.
func (n *Namespace) ReadDir(fsid, dir, after uint64, limit int) ([]state.Inode, bool, error) {
	return n.store.View().ReadDir(fsid, dir, after, limit)
}

// Readlink returns a symbolic link's target.
func (n *Namespace) Readlink(fsid, ino uint64) (string, error) {
	i, err := n.store.View().Inode(fsid, ino)
	if err != nil {
		return "", err
	}
	if i.Kind != state.Symlink {
		return "", &state.Error{Err: state.ErrInvalid, Object: "inode", Detail: "is a " + string(i.Kind) + ", not a link"}
	}
	return i.Target, nil
}

// Files returns how many names a vPool holds and may hold.
func (n *Namespace) Files(fsid uint64) (used, limit uint64) {
	p, err := n.store.View().VPoolByFSID(fsid)
	if err != nil {
		return 0, 0
	}
	return p.Inodes, state.InodesMax
}

// Spec says what to create. Verifier is for exclusive creates of files; Size is a file's initial, sparse one.
type Spec struct {
	Kind           state.Kind
	How            state.How
	Verifier       [8]byte
	Mode, UID, GID uint32
	Size           int64
	Target         string
}

// Create makes an entry. created is false where an unchecked or repeated exclusive create found the file; its attributes
// are then untouched and a size that was asked for is the caller's to set.
func (n *Namespace) Create(ctx context.Context, fsid, dir uint64, name string, s Spec) (i state.Inode, created bool, err error) {
	if s.How == "" {
		s.How = state.Guarded
	}
	cmd := &state.CreateInode{FSID: fsid, Parent: dir, Name: name, Kind: s.Kind, How: s.How, Mode: s.Mode & 0o7777,
		UID: s.UID, GID: s.GID, Target: s.Target}
	if s.Kind == state.File {
		cmd.Volume, cmd.Size = uuid.New(), s.Size
	}
	if s.How == state.Exclusive {
		// 0 stands for "made otherwise" in state, so the all-zero verifier becomes another constant.
		cmd.Verifier = max(binary.BigEndian.Uint64(s.Verifier[:]), 1)
	}
	if s.How == state.Unchecked {
		have, err := n.store.View().Lookup(fsid, dir, name)
		if err == nil && have.Kind == state.File && s.Kind == state.File {
			return have, false, nil
		}
	}
	res, err := n.raft.Apply(ctx, cmd)
	if err != nil {
		return state.Inode{}, false, err
	}
	i, err = n.store.View().Inode(fsid, res.Ino)
	return i, res.Created, err
}

// Change lists the attributes to set; nil ones stay. Size is not among them: it is the volume's.
type Change struct {
	Mode, UID, GID *uint32
	Atime, Mtime   *time.Time
}

// SetAttr changes attributes and returns the inode as it is then. An empty change commits nothing.
func (n *Namespace) SetAttr(ctx context.Context, fsid, ino uint64, c Change) (state.Inode, error) {
	if c == (Change{}) {
		return n.store.View().Inode(fsid, ino)
	}
	cmd := &state.SetAttr{FSID: fsid, Ino: ino, Mode: c.Mode, UID: c.UID, GID: c.GID, Atime: stamp(c.Atime), Mtime: stamp(c.Mtime)}
	if c.Mode != nil {
		mode := *c.Mode & 0o7777
		cmd.Mode = &mode
	}
	if _, err := n.raft.Apply(ctx, cmd); err != nil {
		return state.Inode{}, err
	}
	return n.store.View().Inode(fsid, ino)
}

func stamp(t *time.Time) *state.Time {
	if t == nil {
		return nil
	}
	s := Stamp(*t)
	return &s
}

// Remove takes a file or link away and returns it as it was.
func (n *Namespace) Remove(ctx context.Context, fsid, dir uint64, name string) (i state.Inode, err error) {
	for range removeTries {
		if i, err = n.store.View().Lookup(fsid, dir, name); err != nil {
			return state.Inode{}, err
		}
		// The number says which file is meant: another one may take the name meanwhile.
		_, err = n.raft.Apply(ctx, &state.RemoveInode{FSID: fsid, Dir: dir, Name: name, Ino: i.Ino})
		if !errors.Is(err, state.ErrConflict) {
			break
		}
	}
	return i, err
}

const removeTries = 16

// Rmdir takes an empty directory away.
func (n *Namespace) Rmdir(ctx context.Context, fsid, dir uint64, name string) error {
	_, err := n.raft.Apply(ctx, &state.RemoveDir{FSID: fsid, Dir: dir, Name: name})
	return err
}

// Renamed says what a rename did.
type Renamed struct {
	Inode state.Inode
	// Replaced is the volume of the file that had the new name, or nil UUID.
	Replaced uuid.UUID
	// Moved are the volumes whose path is another one now: tell the engine, which writes it into their backend roots.
	Moved []state.Volume
}

// Rename moves an entry over whatever has the new name.
func (n *Namespace) Rename(ctx context.Context, fsid, fromDir uint64, from string, toDir uint64, to string) (Renamed, error) {
	res, err := n.raft.Apply(ctx, &state.Rename{FSID: fsid, FromDir: fromDir, From: from, ToDir: toDir, To: to})
	if err != nil {
		return Renamed{}, err
	}
	v := n.store.View()
	i, err := v.Inode(fsid, res.Ino)
	if err != nil {
		return Renamed{}, err
	}
	return Renamed{Inode: i, Replaced: res.Doomed, Moved: v.VolumesUnder(fsid, res.Ino)}, nil
}
