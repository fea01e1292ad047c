package exports

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"varve/control/namespace"
	"varve/control/state"
	"varve/gateway/nfs"
	"varve/volumedriver/backend"
	"varve/volumedriver/blockio"
)

const dirBytes = 4096 // size and space that a directory is said to have

// Backends gives the opened backend of a vPool.
type Backends interface {
	Backend(pool uuid.UUID) (backend.Backend, bool)
}

// NFS offers every vPool as an export of its own; it implements nfs.Namespace.
type NFS struct {
	ns       *namespace.Namespace
	store    *state.Store
	volumes  *Volumes
	backends Backends
	clients  *clients
	log      *slog.Logger
	now      func() time.Time
}

// NewNFS wires the tree.
func NewNFS(raft Proposer, store *state.Store, volumes *Volumes, backends Backends, log *slog.Logger) *NFS {
	return &NFS{ns: namespace.New(raft, store), store: store, volumes: volumes, backends: backends, clients: newClients(),
		log: log, now: time.Now}
}

// clients keeps parsed allow lists, since a vPool's is looked at on every call.
type clients struct {
	mu   sync.Mutex
	sets map[string][]netip.Prefix // by the list, joined
}

func newClients() *clients { return &clients{sets: make(map[string][]netip.Prefix)} }

const clientSetsMax = 1024

func (c *clients) of(pool state.VPool) []netip.Prefix {
	key := strings.Join(pool.Clients, " ")
	c.mu.Lock()
	defer c.mu.Unlock()
	if set, ok := c.sets[key]; ok {
		return set
	}
	var set []netip.Prefix
	for _, s := range pool.Clients {
		if p, err := netip.ParsePrefix(s); err == nil { // state refuses others
			set = append(set, p)
		}
	}
	if len(c.sets) >= clientSetsMax {
		clear(c.sets)
	}
	c.sets[key] = set
	return set
}

// Exports implements nfs.Namespace. Root is not squashed: hypervisors act as root, and the allow list says which may.
func (n *NFS) Exports() []nfs.Export {
	pools := n.ns.VPools()
	list := make([]nfs.Export, len(pools))
	for i, p := range pools {
		list[i] = nfs.Export{FSID: p.FSID, Path: "/" + p.Name, Root: state.RootIno, Clients: n.clients.of(p), Key: p.Key}
	}
	return list
}

// status turns control's refusals into the gateway's.
func status(err error) error {
	for _, m := range [...]struct{ from, to error }{
		{state.ErrNotFound, nfs.ErrNotFound},
		{state.ErrExist, nfs.ErrExist},
		{state.ErrNotEmpty, nfs.ErrNotEmpty},
		{state.ErrIsDir, nfs.ErrIsDir},
		{state.ErrNotDir, nfs.ErrNotDir},
		{state.ErrInvalid, nfs.ErrInvalid},
		{state.ErrNameTooLong, nfs.ErrInvalid},
		{state.ErrLoop, nfs.ErrInvalid},
		{state.ErrNoSpace, blockio.ErrNoSpace},
	} {
		if errors.Is(err, m.from) {
			return fmt.Errorf("%w: %w", m.to, err)
		}
	}
	return err
}

// staleOr is status for calls that name an inode by its handle: what is not found is stale.
func staleOr(err error) error {
	if errors.Is(err, state.ErrNotFound) {
		return fmt.Errorf("%w: %w", nfs.ErrStale, err)
	}
	return status(err)
}

var kinds = map[state.Kind]nfs.Kind{state.File: nfs.Regular, state.Dir: nfs.Dir, state.Symlink: nfs.Symlink}

// attr merges what state and the engine know.
func (n *NFS) attr(i state.Inode) nfs.Attr {
	a := nfs.Attr{
		Inode: i.Ino, Generation: i.Gen, Kind: kinds[i.Kind], Mode: i.Mode, UID: i.UID, GID: i.GID, Nlink: i.Nlink, FSID: i.FSID,
		Atime: namespace.Time(i.Atime), Mtime: namespace.Time(i.Mtime), Ctime: namespace.Time(i.Ctime),
	}
	switch i.Kind {
	case state.Dir:
		a.Size, a.Used = dirBytes, dirBytes
	case state.Symlink:
		a.Size, a.Used = int64(len(i.Target)), int64(len(i.Target))
	case state.File:
		if size, used, changed, ok := n.volumes.Attr(i.Volume); ok {
			a.Size, a.Used = size, used
			if !changed.IsZero() {
				a.Mtime = changed
			}
			if a.Mtime.After(a.Ctime) {
				a.Ctime = a.Mtime
			}
		} else if vol, err := n.store.View().Volume(i.Volume); err == nil {
			a.Size = vol.Size
		}
	}
	return a
}

// Attr implements nfs.Namespace.
func (n *NFS) Attr(_ context.Context, fsid, inode uint64, generation uint32) (nfs.Attr, error) {
	i, err := n.ns.Inode(fsid, inode, generation)
	if err != nil {
		return nfs.Attr{}, staleOr(err)
	}
	return n.attr(i), nil
}

// Lookup implements nfs.Namespace.
func (n *NFS) Lookup(_ context.Context, fsid, dir uint64, name string) (nfs.Attr, error) {
	i, err := n.ns.Lookup(fsid, dir, name)
	if err != nil {
		return nfs.Attr{}, n.inDir(fsid, dir, err)
	}
	return n.attr(i), nil
}

// inDir tells a directory that is gone from a name that is not there.
func (n *NFS) inDir(fsid, dir uint64, err error) error {
	if errors.Is(err, state.ErrNotFound) {
		if _, e := n.ns.Inode(fsid, dir, 0); e != nil {
			return staleOr(e)
		}
	}
	return status(err)
}

// Create implements nfs.Namespace. A file found by an unchecked create is left alone, also where a size was asked for.
func (n *NFS) Create(ctx context.Context, fsid, dir uint64, name string, c nfs.CreateSpec) (nfs.Attr, bool, error) {
	spec := namespace.Spec{Mode: c.Mode, UID: c.UID, GID: c.GID, Target: c.Target, Verifier: c.Verf, How: state.Unchecked}
	switch c.Kind {
	case nfs.Regular:
		spec.Kind = state.File
		if c.Size != nil {
			spec.Size = *c.Size
		}
	case nfs.Dir:
		spec.Kind = state.Dir
	case nfs.Symlink:
		spec.Kind = state.Symlink
	default:
		return nfs.Attr{}, false, fmt.Errorf("create %q of kind %d: %w", name, c.Kind, nfs.ErrNotSupported)
	}
	if spec.Size < 0 || spec.Size > state.VolumeBytesMax {
		return nfs.Attr{}, false, fmt.Errorf("create %q of %d bytes: %w", name, spec.Size, nfs.ErrTooBig)
	}
	switch {
	case c.Exclusive:
		spec.How = state.Exclusive
	case c.Guarded || spec.Kind != state.File:
		spec.How = state.Guarded
	}
	i, created, err := n.ns.Create(ctx, fsid, dir, name, spec)
	if err != nil {
		return nfs.Attr{}, false, n.inDir(fsid, dir, err)
	}
	return n.attr(i), created, nil
}

// SetAttr implements nfs.Namespace. Size and mtime go to the volume and are durable before the rest is committed.
func (n *NFS) SetAttr(ctx context.Context, fsid, inode uint64, set nfs.SetAttr) (nfs.Attr, error) {
	i, err := n.ns.Inode(fsid, inode, 0)
	if err != nil {
		return nfs.Attr{}, staleOr(err)
	}
	if set.Guard != nil && !n.attr(i).Ctime.Equal(*set.Guard) {
		return nfs.Attr{}, nfs.ErrNotSync
	}
	now := n.now()
	change := namespace.Change{Mode: set.Mode, UID: set.UID, GID: set.GID, Atime: set.Atime, Mtime: set.Mtime}
	if set.AtimeNow {
		change.Atime = &now
	}
	if set.MtimeNow {
		change.Mtime = &now
	}
	if set.Size != nil && i.Kind != state.File {
		return nfs.Attr{}, fmt.Errorf("set the size of inode %d: %w", inode, nfs.ErrIsDir)
	}
	if i.Kind == state.File {
		if err := n.setBytes(ctx, i, set.Size, change.Mtime); err != nil {
			return nfs.Attr{}, staleOr(err)
		}
	}
	if i, err = n.ns.SetAttr(ctx, fsid, inode, change); err != nil {
		return nfs.Attr{}, staleOr(err)
	}
	return n.attr(i), nil
}

// setBytes changes what the engine keeps of a file. An mtime alone stays in state while nothing was written to the file.
func (n *NFS) setBytes(ctx context.Context, i state.Inode, size *int64, mtime *time.Time) error {
	info, _ := n.volumes.Info(i.Volume)
	if size == nil && (mtime == nil || info.Accepted == 0) {
		return nil
	}
	if size != nil && (*size < 0 || *size > state.VolumeBytesMax) {
		return nfs.ErrTooBig
	}
	v, release, err := n.volumes.Open(ctx, i.Volume)
	if err != nil {
		return err
	}
	defer release()
	if size != nil && *size != v.Size() {
		if err := v.Resize(ctx, *size); err != nil {
			return err
		}
	} else if size != nil && mtime == nil {
		now := n.now()
		mtime = &now // a truncate to the same size still counts as a change
	}
	if mtime != nil {
		if err := v.SetModTime(ctx, *mtime); err != nil {
			return err
		}
	}
	return v.Flush(ctx)
}

// Remove implements nfs.Namespace. The file's volume is deleted in the background.
func (n *NFS) Remove(ctx context.Context, fsid, dir uint64, name string) error {
	if _, err := n.ns.Remove(ctx, fsid, dir, name); err != nil {
		return n.inDir(fsid, dir, err)
	}
	return nil
}

// Rmdir implements nfs.Namespace.
func (n *NFS) Rmdir(ctx context.Context, fsid, dir uint64, name string) error {
	if err := n.ns.Rmdir(ctx, fsid, dir, name); err != nil {
		return n.inDir(fsid, dir, err)
	}
	return nil
}

// Rename implements nfs.Namespace. The names are committed first; the roots on the backend follow and are put right when
// the volume is next opened, if the process ends in between.
func (n *NFS) Rename(ctx context.Context, fsid, fromDir uint64, from string, toDir uint64, to string) error {
	done, err := n.ns.Rename(ctx, fsid, fromDir, from, toDir, to)
	if err != nil {
		if _, e := n.ns.Inode(fsid, toDir, 0); e != nil {
			return staleOr(e)
		}
		return n.inDir(fsid, fromDir, err)
	}
	if err := n.volumes.Renamed(ctx, done.Moved); err != nil {
		n.log.Warn("backend keeps an old path for now", "fsid", fsid, "inode", done.Inode.Ino, "err", err)
	}
	return nil
}

// Link implements nfs.Namespace: an inode has one name.
func (n *NFS) Link(context.Context, uint64, uint64, uint64, string) error { return nfs.ErrNotSupported }

// Readlink implements nfs.Namespace.
func (n *NFS) Readlink(_ context.Context, fsid, inode uint64) (string, error) {
	target, err := n.ns.Readlink(fsid, inode)
	if err != nil {
		return "", staleOr(err)
	}
	return target, nil
}

// ReadDir implements nfs.Namespace.
func (n *NFS) ReadDir(_ context.Context, fsid, dir uint64, after uint64, max int) ([]nfs.Entry, bool, error) {
	inodes, eof, err := n.ns.ReadDir(fsid, dir, after, max)
	if err != nil {
		return nil, false, staleOr(err)
	}
	entries := make([]nfs.Entry, len(inodes))
	for k, i := range inodes {
		entries[k] = nfs.Entry{Cookie: i.Cookie, Name: i.Name, Attr: n.attr(i)}
	}
	return entries, eof, nil
}

// Space implements nfs.Namespace: that of the backend, which is what can still be written for good.
func (n *NFS) Space(ctx context.Context, fsid uint64) (total, free, avail, files, ffree uint64, err error) {
	pool, err := n.store.View().VPoolByFSID(fsid)
	if err != nil {
		return 0, 0, 0, 0, 0, staleOr(err)
	}
	b, ok := n.backends.Backend(pool.ID)
	if !ok {
		return 0, 0, 0, 0, 0, fmt.Errorf("backend of vPool %s is not open", pool.Name)
	}
	total, avail, err = b.Space(ctx)
	if err != nil {
		return 0, 0, 0, 0, 0, fmt.Errorf("space of vPool %s: %w", pool.Name, err)
	}
	if total == 0 { // a store without a limit: the largest that common clients show rightly
		total, avail = 1<<60, 1<<60
	}
	used, limit := n.ns.Files(fsid)
	return total, avail, avail, limit, limit - min(used, limit), nil
}

// Open implements nfs.Namespace.
func (n *NFS) Open(ctx context.Context, fsid, inode uint64) (nfs.File, func(), error) {
	i, err := n.ns.Inode(fsid, inode, 0)
	if err != nil {
		return nil, nil, staleOr(err)
	}
	if i.Kind != state.File {
		return nil, nil, fmt.Errorf("open inode %d: %w", inode, nfs.ErrInvalid)
	}
	v, release, err := n.volumes.Open(ctx, i.Volume)
	if err != nil {
		return nil, nil, staleOr(err)
	}
	return n.volumes.metered(i.Volume, v), release, nil
}

var _ nfs.File = metered{}
