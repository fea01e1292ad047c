// Package vdisk is the controller of vDisks: the plain Go API that the HTTP API, the CLI and event consumers call. A vDisk is
// called "vpool/path" without the disk suffix ("default/vm/a"); the name of its file ("default/vm/a.raw") serves as well.
//
//	c := vdisk.New(vdisk.Config{Raft: node, Store: node.State(), Engine: engine, Log: log})
//	go c.Run(ctx)                                              // has the engine delete what has no name any more
//	c.Create(ctx, name, size) · c.List(ctx, pool) · c.Get(ctx, name) · c.Resize(ctx, name, size, shrink)
//	c.Rename(ctx, from, to) · c.Delete(ctx, name, force) · c.Explain(ctx, name, offset)
//	c.Adopt(ctx, pool, path, volume, size, epoch)              // a rebuild found this volume on the backend
//	c.Snapshot · c.Snapshots · c.EditSnapshot · c.DeleteSnapshot · c.Clone · c.Rollback · c.SetTemplate · c.FromTemplate
//	c.Trash · c.Restore · c.EmptyTrash
//
// Snapshots live with the volume's owner, in the engine: it is the truth about them, and state has no copy. A clone's volume
// names its parent in state, so that any node can tell who hangs on whom and the first opening makes it a clone.
//
// Order of the steps, so that a crash between them loses and leaks nothing:
//
//	create   commit the name with its volume; the engine makes the volume when it is first opened
//	delete   commit (the name is gone, the volume is doomed) -> engine deletes -> commit that it is done
//	rename   commit -> tell the engine, which writes the new path into the volume's root; every open tells it too
//	resize   the engine's alone: it owns the size
//	clone    commit the name with its volume and its parent -> the engine makes it; if it can't, the name goes again
//	trash    commit (the name is gone, the volume is in the trash) -> when its time is over: doomed, as by a delete
//
// Run does the second and third step of a delete, whoever removed the name (NFS, API, a rename over it), and again at
// every start, until the engine has succeeded.
package vdisk

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path"
	"strings"
	"time"

	"github.com/google/uuid"

	"varve/control/bytesize"
	"varve/control/events"
	"varve/control/state"
)

// Proposer commits a command and returns what it did. raft.Node is one.
type Proposer interface {
	Apply(ctx context.Context, cmd state.Command) (state.Result, error)
}

// Engine is what the controller needs of the volume driver.
type Engine interface {
	// Info tells of a volume without opening it; ok is false while the engine has nothing of it.
	Info(id uuid.UUID) (i Info, ok bool)
	// Resize opens the volume if need be and sets its size, durably.
	Resize(ctx context.Context, v state.Volume, size int64) error
	// Renamed says that the volume's vPool or path is another one now.
	Renamed(ctx context.Context, v state.Volume, pool, path string) error
	// Delete frees what log, map and backend hold of a volume. It is nil where nothing is left or ever was, and may be called again.
	Delete(ctx context.Context, d state.Doomed) error
	// Clients counts the connections that have the volume open.
	Clients(id uuid.UUID) int
	// Explain says where the block at a byte offset is.
	Explain(ctx context.Context, v state.Volume, offset int64) (Explanation, error)
	SnapshotEngine
}

// Info is what the engine knows of a volume. Used is allocated bytes, Pending those not yet on the backend.
type Info struct {
	Size, Used, Pending int64
	Modified            time.Time
	Open                bool
	// Template says that it takes no writes.
	Template bool
	// AsOf is when this was said, where who knows does not answer now; else zero.
	AsOf time.Time `json:"-"`
}

// Explanation says where a block is. State is "log", "object" or "hole".
type Explanation struct {
	State  string
	LBA    uint64
	Seq    uint64
	Object string
	Index  int
	CRC    uint32
	Detail string
	// Copies says where it is: "write log", "backend", "cache RAM", "cache SSD".
	Copies []string
}

// Config wires a controller.
type Config struct {
	Raft   Proposer
	Store  *state.Store
	Engine Engine
	Log    *slog.Logger
	// Emit publishes an event without waiting; nil where nobody listens. events.Publisher's is one.
	Emit func(typ, topic, key string, data any)
	// Mine says which deleted volumes this node cleans up; nil is all.
	Mine func(d state.Doomed) bool
}

// Controller of vDisks.
type Controller struct {
	cfg   Config
	names names
}

// New wires a controller and starts nothing.
func New(cfg Config) *Controller {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Emit == nil {
		cfg.Emit = func(string, string, string, any) {}
	}
	return &Controller{cfg: cfg}
}

// VDisk is one with what the engine knows of it.
type VDisk struct {
	state.Disk
	Pool state.VPool
	Info Info
	// Clients counts the connections that have it open.
	Clients int
}

// FullName is "vpool/path" without the suffix, which also is the NBD export's name.
func (d VDisk) FullName() string { return d.Pool.Name + "/" + d.Name }

const (
	sectorBytes  = 512
	nameBytesMax = 4096
)

func checkSize(object string, size int64) error {
	if size < sectorBytes || size > state.VolumeBytesMax || size%sectorBytes != 0 {
		return &state.Error{Err: state.ErrInvalid, Field: "size", Object: object, Detail: "size " + bytesize.Format(size),
			Remedy: "use a multiple of 512 bytes up to 64 TiB"}
	}
	return nil
}

// split takes a vDisk's name apart and finds its vPool.
func split(v *state.View, name string) (pool state.VPool, disk string, err error) {
	p, disk, ok := state.SplitName(name)
	if !ok || len(name) > nameBytesMax || path.Clean("/"+disk) != "/"+disk {
		if len(name) > 80 {
			name = name[:80] + "…"
		}
		return pool, "", &state.Error{Err: state.ErrInvalid, Field: "name", Object: fmt.Sprintf("vdisk %q", name), Detail: "not a name",
			Remedy: "write vpool/name, such as default/disk1"}
	}
	pool, err = v.VPool(p)
	return pool, disk, err
}

// Create makes a sparse vDisk, and the directories above it.
func (c *Controller) Create(ctx context.Context, name string, size int64) (VDisk, error) {
	pool, disk, err := split(c.cfg.Store.View(), name)
	if err != nil {
		return VDisk{}, err
	}
	if err := checkSize("vdisk "+name, size); err != nil {
		return VDisk{}, err
	}
	file := state.DiskFile(disk)
	if !state.IsDisk(file) {
		return VDisk{}, &state.Error{Err: state.ErrInvalid, Object: "vdisk " + name, Field: "name", Detail: "not a name a disk can have",
			Remedy: "leave the .raw or -flat.vmdk out"}
	}
	dir, err := c.makeDirs(ctx, pool.FSID, path.Dir(file))
	if err != nil {
		return VDisk{}, err
	}
	_, err = c.cfg.Raft.Apply(ctx, &state.CreateInode{FSID: pool.FSID, Parent: dir, Name: path.Base(file), Kind: state.File,
		How: state.Guarded, Mode: 0o644, Volume: uuid.New(), Size: size})
	if err != nil {
		return VDisk{}, naming("vdisk "+name, err)
	}
	c.cfg.Log.Info("vdisk created", "vdisk", name, "size", size)
	return c.Get(ctx, name)
}

// Adopt gives a volume that a rebuild found on its backend its name again: any file, not only a disk. epoch is the highest
// that its objects bear, so that the next activation fences whoever wrote them. A volume that has its name already is left.
func (c *Controller) Adopt(ctx context.Context, pool state.VPool, file string, volume uuid.UUID, size int64, epoch uint64) error {
	if have, err := c.cfg.Store.View().Resolve(pool.FSID, file); err == nil && have.Volume == volume {
		return nil
	}
	dir, err := c.makeDirs(ctx, pool.FSID, path.Dir(file))
	if err != nil {
		return err
	}
	_, err = c.cfg.Raft.Apply(ctx, &state.CreateInode{FSID: pool.FSID, Parent: dir, Name: path.Base(file), Kind: state.File,
		How: state.Guarded, Mode: 0o644, Volume: volume, Size: size, Epoch: epoch})
	if err != nil {
		return naming("file "+pool.Name+file, err)
	}
	return nil
}

// naming gives a refusal that speaks of one path element the name of the whole object.
func naming(object string, err error) error {
	e, ok := errors.AsType[*state.Error](err)
	if !ok {
		return err
	}
	named := *e
	named.Object = object
	return &named
}

// makeDirs returns the directory at a path, made where it is missing.
func (c *Controller) makeDirs(ctx context.Context, fsid uint64, dir string) (uint64, error) {
	at := uint64(state.RootIno)
	for name := range strings.SplitSeq(dir, "/") {
		if name == "" {
			continue
		}
		n, err := c.cfg.Store.View().Lookup(fsid, at, name)
		if errors.Is(err, state.ErrNotFound) {
			_, err = c.cfg.Raft.Apply(ctx, &state.CreateInode{FSID: fsid, Parent: at, Name: name, Kind: state.Dir,
				How: state.Guarded, Mode: 0o755})
			if err == nil || errors.Is(err, state.ErrExist) {
				n, err = c.cfg.Store.View().Lookup(fsid, at, name)
			}
		}
		if err != nil {
			return 0, naming("directory "+dir, err)
		}
		if n.Kind != state.Dir {
			return 0, &state.Error{Err: state.ErrNotDir, Object: "directory " + dir, By: []string{name}}
		}
		at = n.Ino
	}
	return at, nil
}

// List returns the vDisks of one vPool, or of all where pool is "", by name.
func (c *Controller) List(_ context.Context, pool string) ([]VDisk, error) {
	list, err := c.Names(pool)
	if err != nil {
		return nil, err
	}
	return c.Describe(list), nil
}

// Get returns one vDisk.
func (c *Controller) Get(_ context.Context, name string) (VDisk, error) {
	v := c.cfg.Store.View()
	p, disk, err := split(v, name)
	if err != nil {
		return VDisk{}, err
	}
	n, err := v.ResolveDisk(p.FSID, disk)
	if err != nil {
		return VDisk{}, naming("vdisk "+name, err)
	}
	vol, err := v.Volume(n.Volume)
	if err != nil {
		return VDisk{}, err
	}
	file, err := v.Path(p.FSID, n.Ino)
	if err != nil {
		return VDisk{}, err
	}
	short, _ := state.DiskName(file)
	return c.with(p, state.Disk{Name: short, Path: file, Inode: n, Volume: vol}), nil
}

func (c *Controller) with(p state.VPool, d state.Disk) VDisk {
	out := VDisk{Disk: d, Pool: p, Info: Info{Size: d.Volume.Size, Modified: time.Unix(0, int64(d.Inode.Mtime))}}
	if i, ok := c.cfg.Engine.Info(d.Volume.ID); ok {
		out.Info = i
	}
	out.Clients = c.cfg.Engine.Clients(d.Volume.ID)
	return out
}

// Resize sets a vDisk's size. A smaller one loses what lies beyond and needs shrink.
func (c *Controller) Resize(ctx context.Context, name string, size int64, shrink bool) (VDisk, error) {
	d, err := c.Get(ctx, name)
	if err != nil {
		return VDisk{}, err
	}
	if err := checkSize("vdisk "+name, size); err != nil {
		return VDisk{}, err
	}
	if size < d.Info.Size && !shrink {
		return VDisk{}, &state.Error{Err: state.ErrConflict, Object: "vdisk " + name,
			Detail: fmt.Sprintf("is %s, %s would cut data off", bytesize.Format(d.Info.Size), bytesize.Format(size)),
			Remedy: "allow shrinking if that is meant"}
	}
	if err := c.cfg.Engine.Resize(ctx, d.Volume, size); err != nil {
		return VDisk{}, fmt.Errorf("resize vdisk %s: %w", name, err)
	}
	c.cfg.Log.Info("vdisk resized", "vdisk", name, "size", size)
	c.cfg.Emit(events.VolumeResize, events.TopicVolume, d.Volume.ID.String(), map[string]any{"vdisk": d.FullName(), "from": d.Info.Size, "size": size})
	return c.Get(ctx, name)
}

// Rename moves a vDisk inside its vPool, to a name that is free.
func (c *Controller) Rename(ctx context.Context, from, to string) (VDisk, error) {
	d, err := c.Get(ctx, from)
	if err != nil {
		return VDisk{}, err
	}
	pool, disk, err := split(c.cfg.Store.View(), to)
	if err != nil {
		return VDisk{}, err
	}
	if pool.ID != d.Pool.ID {
		return VDisk{}, &state.Error{Err: state.ErrXDev, Object: "vdisk " + to, Remedy: "export it and import it there"}
	}
	file := state.DiskFile(disk)
	if !state.IsDisk(disk) && strings.HasSuffix(d.Path, "-flat.vmdk") {
		file = "/" + strings.TrimPrefix(disk, "/") + "-flat.vmdk"
	}
	if !state.IsDisk(file) {
		return VDisk{}, &state.Error{Err: state.ErrInvalid, Object: "vdisk " + to, Field: "name", Detail: "not a name a disk can have",
			Remedy: "leave the .raw or -flat.vmdk out"}
	}
	dir, err := c.makeDirs(ctx, pool.FSID, path.Dir(file))
	if err != nil {
		return VDisk{}, err
	}
	_, err = c.cfg.Raft.Apply(ctx, &state.Rename{FSID: pool.FSID, FromDir: d.Inode.Parent, From: d.Inode.Name, ToDir: dir,
		To: path.Base(file), NoReplace: true, Ino: d.Inode.Ino})
	if err != nil {
		return VDisk{}, naming("vdisk "+to, err)
	}
	c.cfg.Log.Info("vdisk renamed", "vdisk", from, "to", to)
	if err := c.cfg.Engine.Renamed(ctx, d.Volume, pool.Name, file); err != nil {
		c.cfg.Log.Warn("new name of vdisk is not on its backend yet, its next opening writes it", "vdisk", to, "err", err)
	}
	return c.Get(ctx, to)
}

// Delete takes a vDisk away; its storage is freed in the background. One that a client has open needs force.
func (c *Controller) Delete(ctx context.Context, name string, force bool) error {
	d, err := c.Get(ctx, name)
	if err != nil {
		return err
	}
	if d.Clients > 0 && !force {
		return &state.Error{Err: state.ErrConflict, Object: "vdisk " + name, Detail: fmt.Sprintf("%d clients have it open", d.Clients),
			Remedy: "detach it or shut its VM down, or force the deletion"}
	}
	if clones := c.clonesOf(d, uuid.Nil); len(clones) > 0 {
		return &state.Error{Err: state.ErrConflict, Object: "vdisk " + name, Detail: fmt.Sprintf("%d clones hang on its snapshots", len(clones)),
			By: clones[:min(len(clones), 10)], Remedy: "promote, delete or flatten the clones first"}
	}
	_, err = c.cfg.Raft.Apply(ctx, &state.RemoveInode{FSID: d.Pool.FSID, Dir: d.Inode.Parent, Name: d.Inode.Name, Ino: d.Inode.Ino})
	if err != nil {
		return naming("vdisk "+name, err)
	}
	c.cfg.Log.Info("vdisk deleted", "vdisk", name, "volume", d.Volume.ID)
	return nil
}

// Explain says where the block at a byte offset of a vDisk is.
func (c *Controller) Explain(ctx context.Context, name string, offset int64) (Explanation, error) {
	d, err := c.Get(ctx, name)
	if err != nil {
		return Explanation{}, err
	}
	if offset < 0 || offset >= d.Info.Size {
		return Explanation{}, &state.Error{Err: state.ErrInvalid, Object: "vdisk " + name,
			Detail: fmt.Sprintf("offset %d is beyond its %d bytes", offset, d.Info.Size), Remedy: "use a smaller offset or LBA"}
	}
	e, err := c.cfg.Engine.Explain(ctx, d.Volume, offset)
	if err != nil {
		return Explanation{}, fmt.Errorf("explain vdisk %s at %d: %w", name, offset, err)
	}
	return e, nil
}
