package state

import (
	"encoding/binary"

	"github.com/google/uuid"
)

// Cluster is the one record that says which cluster this is.
type Cluster struct {
	ID      uuid.UUID `json:"id"`
	Format  int       `json:"format"`
	Created Time      `json:"created"`
	// Level is the data level; see level.go.
	Level int    `json:"level,omitempty"`
	Rev   uint64 `json:"rev"`
}

// Secret is key material: it has no printed form, in JSON neither.
type Secret [32]byte

// MarshalText keeps the key out of every encoder.
func (Secret) MarshalText() ([]byte, error) { return []byte("[secret]"), nil }

// String keeps the key out of logs and messages.
func (Secret) String() string { return "[secret]" }

// GoString keeps the key out of %#v.
func (Secret) GoString() string { return "[secret]" }

// ClassNone is the durability class of a one-node cluster: a flush is answered when the local disk has it.
const ClassNone = "none"

// VPool is a storage pool exported as one datastore.
type VPool struct {
	ID      uuid.UUID `json:"id"`
	Name    string    `json:"name"`
	FSID    uint64    `json:"fsid"`
	Backend Backend   `json:"backend"`
	// Findings are those of the last probe of the backend.
	Findings []Finding `json:"findings,omitempty"`
	// Compression of what is stored: "none", "s2" or "zstd".
	Compression string `json:"compression,omitempty"`
	// Encrypted: new volumes get a key, wrapped by the secret KEKOf(ID).
	Encrypted bool `json:"encrypted,omitempty"`
	// Key signs NFS file handles.
	Key Secret `json:"-"`
	// Clients are the CIDRs that may mount over NFS; empty means nobody.
	Clients []string `json:"clients"`
	Class   string   `json:"class"`
	NextIno uint64   `json:"next_ino"`
	Inodes  uint64   `json:"inodes"`
	Created Time     `json:"created"`
	Rev     uint64   `json:"rev"`
}

// FSIDOf is the file system id that clients of a vPool see, the same on every node.
func FSIDOf(pool uuid.UUID) uint64 { return binary.BigEndian.Uint64(pool[:8]) }

// DefaultClients are the NFS clients of a vPool for which none were named: this host and the private networks.
func DefaultClients() []string {
	return []string{"127.0.0.0/8", "::1/128", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"}
}

// Kind of an inode.
type Kind string

// Kinds of inodes.
const (
	File    Kind = "file"
	Dir     Kind = "dir"
	Symlink Kind = "symlink"
)

// Inode is a named object of a vPool: what it is called and what it is, not what it holds.
type Inode struct {
	FSID   uint64 `json:"fsid"`
	Ino    uint64 `json:"ino"`
	Gen    uint32 `json:"gen"`
	Parent uint64 `json:"parent"`
	Name   string `json:"name"`
	Cookie uint64 `json:"cookie"`
	Kind   Kind   `json:"kind"`
	Mode   uint32 `json:"mode"`
	UID    uint32 `json:"uid"`
	GID    uint32 `json:"gid"`
	Nlink  uint32 `json:"nlink"`
	// Volume holds a file's bytes.
	Volume uuid.UUID `json:"volume"`
	Target string    `json:"target,omitempty"`
	// Verifier is that of the exclusive create that made the file, 0 if it was made otherwise.
	Verifier uint64 `json:"verifier,omitempty"`
	Atime    Time   `json:"atime"`
	// Mtime of a file is that of its creation: the volume knows the true one.
	Mtime Time `json:"mtime"`
	Ctime Time `json:"ctime"`
	Birth Time `json:"birth"`
	// Entries and NextCookie are those of a directory.
	Entries    uint64 `json:"entries,omitempty"`
	NextCookie uint64 `json:"next_cookie,omitempty"`
	Rev        uint64 `json:"rev"`
}

// VolumeKind tells a vDisk from any other file.
type VolumeKind string

// Kinds of volumes.
const (
	DiskVolume VolumeKind = "disk"
	FileVolume VolumeKind = "file"
)

// VolumeState says how far a volume has come.
type VolumeState string

// States of a volume: made in the namespace only, or activated by an owner at least once.
const (
	VolumeNew    VolumeState = "new"
	VolumeActive VolumeState = "active"
)

// Volume is the engine's object behind a file.
type Volume struct {
	ID   uuid.UUID `json:"id"`
	Pool uuid.UUID `json:"pool"`
	FSID uint64    `json:"fsid"`
	Ino  uint64    `json:"ino"`
	// Owner and Epoch are those of the last activation; an epoch fences every earlier owner.
	Owner uuid.UUID   `json:"owner"`
	Epoch uint64      `json:"epoch"`
	Kind  VolumeKind  `json:"kind"`
	State VolumeState `json:"state"`
	// Size is the one asked for at creation; the owner knows the present one.
	Size    int64  `json:"size"`
	Created Time   `json:"created"`
	Rev     uint64 `json:"rev"`
	// Parent is what it is a clone of.
	Parent *VolumeParent `json:"parent,omitempty"`
}

// Doomed is a volume that has no name any more and waits for the engine to delete what it holds.
type Doomed struct {
	Volume
	Path    string `json:"path"`
	Removed Time   `json:"removed"`
}
