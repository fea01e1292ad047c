package nfs

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"varve/gateway/nfs/rpc"
	"varve/volumedriver/blockio"
)

// Errors of a Namespace that have a status of their own. Errors of package blockio keep theirs; anything else is an I/O
// error of just that call. An error that wraps blockio.ErrFenced or a context's error is answered by silence and a closed
// connection, since its outcome is unknown.
var (
	ErrNotFound     = errors.New("no such file or directory")
	ErrExist        = errors.New("file exists")
	ErrStale        = errors.New("stale file handle")
	ErrNotDir       = errors.New("not a directory")
	ErrIsDir        = errors.New("is a directory")
	ErrNotEmpty     = errors.New("directory not empty")
	ErrInvalid      = errors.New("invalid argument")
	ErrPermission   = errors.New("operation not permitted")
	ErrReadOnly     = errors.New("read-only file system")
	ErrNotSupported = errors.New("operation not supported")
	// ErrNotSync: the guard of a SetAttr does not equal the object's ctime.
	ErrNotSync = errors.New("attributes changed since")
	ErrTooBig  = errors.New("file too large")
	ErrQuota   = errors.New("quota exceeded")
	// ErrLinks: too many links.
	ErrLinks = errors.New("too many links")
)

// Kind is what an inode is; the values are those of ftype3.
type Kind uint32

// RFC 1813 section 2.5.
const (
	Regular Kind = 1
	Dir     Kind = 2
	Symlink Kind = 5
	Socket  Kind = 6
	FIFO    Kind = 7
)

// Export is one exported vPool.
type Export struct {
	// FSID names the file system in handles and attributes; it is the same on every node and never reused.
	FSID uint64
	// Path is what a client mounts, "/default".
	Path string
	// Root is the inode of the root directory.
	Root uint64
	// Clients may use the export; none means nobody.
	Clients []netip.Prefix
	// ReadOnly refuses changes. RootSquash maps user 0, AllSquash every user, to AnonUID and AnonGID.
	ReadOnly, RootSquash, AllSquash bool
	AnonUID, AnonGID                uint32
	// Key authenticates the export's handles. It is the same on every node.
	Key [32]byte
}

// Attr is what is known of an inode at one instant.
type Attr struct {
	Inode uint64
	// Generation tells apart inodes that had the same number; it is at least 1.
	Generation uint32
	Kind       Kind
	// Mode holds the permission, set-id and sticky bits: 07777.
	Mode, UID, GID, Nlink uint32
	// Size in bytes; Used is what the inode takes of the vPool.
	Size, Used          int64
	Atime, Mtime, Ctime time.Time
	FSID                uint64
}

// CreateSpec is the object that Create makes.
type CreateSpec struct {
	Kind           Kind
	Mode, UID, GID uint32
	// Size of a new file; nil is 0.
	Size *int64
	// Guarded: an existing name is ErrExist. Otherwise Create of an existing *file* changes nothing and returns it.
	Guarded bool
	// Exclusive: Verf is stored with the inode; an existing file with the same Verf is returned as if it had been created
	// now, any other existing name is ErrExist.
	Exclusive bool
	Verf      [8]byte
	// Target of a symbolic link.
	Target string
}

// SetAttr is what to change of an inode, all or nothing.
type SetAttr struct {
	Mode, UID, GID *uint32
	Size           *int64
	// Atime and Mtime are given times; AtimeNow and MtimeNow ask for the server's.
	Atime, Mtime       *time.Time
	AtimeNow, MtimeNow bool
	// Guard: change only if the inode's ctime equals it (to the nanosecond), else ErrNotSync.
	Guard *time.Time
}

// Entry is one name of a directory.
type Entry struct {
	// Cookie is the name's place: unique in the directory, ascending along a listing, at least 1, at most 2^63.
	Cookie uint64
	Name   string
	Attr   Attr
}

// Namespace is the tree of names, inodes and files behind all exports. It does not check permissions or the form of names:
// the gateway has done so. All methods may be called concurrently. Caller tells from ctx who asks.
//
// Exports, Attr, Lookup and Open of a file that is open are answered from memory: the gateway calls them on the goroutine
// that reads a connection. What changes anything is durable when it returns nil.
//
// Attr is the only source of attributes, so a File's writes must show in it (size, mtime, ctime, used) as soon as their
// Done was called, or the blocking method has returned. It is asked by Completers.
type Namespace interface {
	Exports() []Export
	// Attr returns the inode's attributes. Generation 0 asks for whatever generation there is. ErrStale when it is gone.
	Attr(ctx context.Context, fsid, inode uint64, generation uint32) (Attr, error)
	// Lookup finds a name; ".." is the parent directory, and of the root the root itself. ErrNotFound, ErrNotDir.
	Lookup(ctx context.Context, fsid, dir uint64, name string) (Attr, error)
	// Create makes an object of any kind. ErrExist, ErrNotDir, ErrNotSupported for a kind that it does not have, ErrInvalid
	// for a name that it cannot keep.
	Create(ctx context.Context, fsid, dir uint64, name string, spec CreateSpec) (a Attr, created bool, err error)
	// SetAttr returns the attributes after the change. ErrNotSync, ErrIsDir (size of a directory).
	SetAttr(ctx context.Context, fsid, inode uint64, set SetAttr) (Attr, error)
	// Remove unlinks anything but a directory (ErrIsDir), Rmdir an empty directory (ErrNotDir, ErrNotEmpty).
	Remove(ctx context.Context, fsid, dir uint64, name string) error
	Rmdir(ctx context.Context, fsid, dir uint64, name string) error
	// Rename replaces an existing target atomically: a file by a file (ErrIsDir, ErrNotDir otherwise), an empty directory by
	// a directory (ErrNotEmpty). The inode keeps its number and generation. ErrInvalid for a directory into itself.
	Rename(ctx context.Context, fsid, fromDir uint64, from string, toDir uint64, to string) error
	// Link gives a file another name; ErrNotSupported where there are no hard links.
	Link(ctx context.Context, fsid, inode, dir uint64, name string) error
	// Readlink returns a symbolic link's target; ErrInvalid for anything else.
	Readlink(ctx context.Context, fsid, inode uint64) (string, error)
	// ReadDir lists up to max names, without "." and "..", whose cookie is above after, in the order of cookies. A name
	// that exists throughout a whole listing appears in it exactly once, whatever happens to other names meanwhile.
	ReadDir(ctx context.Context, fsid, dir uint64, after uint64, max int) (entries []Entry, eof bool, err error)
	// Space of the file system in bytes and inodes; avail is what is left for an ordinary user.
	Space(ctx context.Context, fsid uint64) (total, free, avail uint64, files, ffree uint64, err error)
	// Open gives access to a regular file's volume until release is called, which waits for nothing.
	Open(ctx context.Context, fsid, inode uint64) (f File, release func(), err error)
}

// File is a regular file's bytes. The methods are those of volumedriver.Volume, whose contract holds; package blockio
// describes the loop they are made for.
type File interface {
	// TryRead fills p from off, which must lie within the file, or fails; blockio.ErrBusy asks for Read instead.
	TryRead(p []byte, off int64) error
	TryWrite(p []byte, off int64, f blockio.Flags, c blockio.Completer, tag uint64) error
	TryFlush(c blockio.Completer, tag uint64) error
	Kick()
	KickSync()
	FlushInline() error
	Read(ctx context.Context, p []byte, off int64) error
	Write(ctx context.Context, p []byte, off int64, f blockio.Flags) error
	Flush(ctx context.Context) error
}

// Identity is the user a call acts as, after squashing.
type Identity struct {
	UID, GID uint32
	Groups   []uint32
}

type callerKey struct{}

// Caller returns who asks for a change, of the context that a Namespace got with it.
func Caller(ctx context.Context) (Identity, bool) {
	id, ok := ctx.Value(callerKey{}).(Identity)
	return id, ok
}

func withCaller(ctx context.Context, cred *rpc.Credentials) context.Context {
	id := Identity{UID: cred.UID, GID: cred.GID, Groups: append([]uint32(nil), cred.Groups()...)}
	return context.WithValue(ctx, callerKey{}, id)
}
