// Package vmachine is the controller of vMachines: VMs whose disks lie on vPools. It finds them by the files in which hypervisors
// describe them, and does to all the disks of one what package vdisk does to a single one.
//
//	c := vmachine.New(vmachine.Config{Raft, Store, Disks, Files, …})
//	go c.Run(ctx)                                                     // finds VMs, follows their files
//	c.List(ctx) · c.Get(ctx, name) · c.Snapshots(ctx, name)
//	c.Snapshot(ctx, name, spec, partial)                              // all disks in one cut
//	c.Rollback · c.Clone · c.SetTemplate · c.DeleteSnapshot · c.Delete    // long ones are tasks: TaskTypes
//
// # How a VM is found
//
// NFS has no close, so what counts is quiet: a file called *.vmx or *.xml whose size and time have been the same for a moment
// is read, by the node that owns its volume, and read again when they change. Names come from the replicated state, and so
// do renames and removals:
//
//	the inode table changed, or a second passed:
//	  for each *.vmx, *.xml of each vPool that this node owns:
//	    same stamp as the row's sources, every disk known  -> nothing
//	    stamp not seen for Quiet                           -> wait
//	    read, parse (package vmconfig), find the disks     -> SetVMachine, unless it says what the row says
//	  for each VM whose file is gone for Grace             -> DeleteVMachine
//
// A VM keeps its id when its file or directory is renamed (the inode is the same) and when a hypervisor writes a new file
// and renames it over the old one (the path is the same). What is no description of a VM makes none, and a description that
// cannot be read any more leaves the VM as it was, with the reason in Problem.
//
// # Which vDisk a path is
//
// Hypervisors write the paths that they see. A wrong guess would roll back somebody else's disk, so a path counts only if it is
// relative to the describing file; or has the name of the vPool that the describing file is on as an element, as in
// /mnt/default/vm/a.raw or /vmfs/volumes/default/vm/a.vmdk; or lies below where a pMachine says that it has a vPool mounted; or,
// for libvirt, lies in the describing file's own directory. A .vmdk is looked up in its descriptor. A VM that runs on layers of its hypervisor's
// own snapshots is Layered: its vDisks alone are not its disks, and snapshots and clones of it are refused.
//
// # Whole or not at all
//
//	snapshot  one cut through all disks (vdisk.SnapshotGroup); the members carry the label "group"
//	rollback  snapshot of now, then disk by disk; one that fails takes the others back to what they were
//	clone     disk by disk from one group snapshot into /NAME, descriptors, and the describing file last: it makes the VM
//	delete    disks into the trash, then what only describes them, and the describing file last
//
// A task that is delivered again goes on where it was: every step finds out whether it is done.
package vmachine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"varve/control/state"
	"varve/control/vdisk"
)

// Proposer commits a command and returns what it did. raft.Node is one.
type Proposer interface {
	Apply(ctx context.Context, cmd state.Command) (state.Result, error)
}

// Files are the bytes of small files on vPools.
type Files interface {
	// Stat tells of a volume without opening it; ok is false where this node has nothing of it.
	Stat(volume uuid.UUID) (size int64, modified time.Time, ok bool)
	// Read returns a file's bytes; one of more than most is an error.
	Read(ctx context.Context, v state.Volume, most int64) ([]byte, error)
	// Write makes these the file's bytes, durably.
	Write(ctx context.Context, v state.Volume, b []byte) error
}

// Config wires a controller.
type Config struct {
	Raft  Proposer
	Store *state.Store
	Disks *vdisk.Controller
	Files Files
	// Node is this one: it reads the files of volumes that it owns.
	Node uuid.UUID
	// Power asks the hypervisor what a VM does now; ok is false where none can be asked. May be nil.
	Power func(ctx context.Context, m state.VMachine) (power string, ok bool)
	// Emit publishes an event without waiting; nil where nobody listens.
	Emit func(typ, topic, key string, data any)
	Log  *slog.Logger
	// Quiet is how long a file must not have changed before it is read, Grace how long it may be gone before its VM is; 0 are
	// 2 s and 10 s.
	Quiet, Grace time.Duration
}

const (
	quietDefault = 2 * time.Second
	graceDefault = 10 * time.Second
)

// Controller of vMachines.
type Controller struct {
	cfg Config
	// watch is Run's alone.
	watch watch
}

// New wires a controller and starts nothing.
func New(cfg Config) *Controller {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Emit == nil {
		cfg.Emit = func(string, string, string, any) {}
	}
	if cfg.Power == nil {
		cfg.Power = func(context.Context, state.VMachine) (string, bool) { return "", false }
	}
	if cfg.Quiet == 0 {
		cfg.Quiet = quietDefault
	}
	if cfg.Grace == 0 {
		cfg.Grace = graceDefault
	}
	return &Controller{cfg: cfg, watch: newWatch()}
}

// VMachine is one with what the engine knows of its disks.
type VMachine struct {
	state.VMachine
	// Config is "vpool/path" of its describing file, "" where only a hypervisor tells of it.
	Config string
	Disks  []Disk
	// PMachineName is the hypervisor that knows it.
	PMachineName string
}

// Disk is a disk of a VM.
type Disk struct {
	state.VMachineDisk
	// Name is "vpool/name" of the vDisk, "" where it is on no vPool.
	Name    string
	Info    vdisk.Info
	Clients int
}

// Pools are the vPools that the VM touches, by name.
func (m VMachine) Pools() []string {
	var out []string
	add := func(name string) {
		if pool, _, ok := strings.Cut(name, "/"); ok && !slices.Contains(out, pool) {
			out = append(out, pool)
		}
	}
	add(m.Config)
	for _, d := range m.Disks {
		add(d.Name)
	}
	return out
}

// Clients counts who has its disks open.
func (m VMachine) Clients() int {
	n := 0
	for _, d := range m.Disks {
		n += d.Clients
	}
	return n
}

// Sizes sums its disks up.
func (m VMachine) Sizes() (size, used int64) {
	for _, d := range m.Disks {
		size, used = size+d.Info.Size, used+d.Info.Used
	}
	return size, used
}

// names are those of its vDisks.
func (m VMachine) names() []string {
	var out []string
	for _, d := range m.Disks {
		if d.Name != "" {
			out = append(out, d.Name)
		}
	}
	return out
}

func (m VMachine) object() string { return "vmachine " + m.Name }

func (c *Controller) with(ctx context.Context, v *state.View, m state.VMachine) VMachine {
	out := VMachine{VMachine: m, Config: v.ConfigOf(m)}
	if p, err := v.PMachine(m.PMachine); err == nil {
		out.PMachineName = p.Name
	}
	for _, d := range m.VMachineSpec.Disks {
		disk := Disk{VMachineDisk: d}
		if name, ok := v.DiskNameOf(d.Volume); ok {
			disk.Name = name
			if have, err := c.cfg.Disks.Get(ctx, name); err == nil {
				disk.Info, disk.Clients = have.Info, have.Clients
			}
		}
		out.Disks = append(out.Disks, disk)
	}
	return out
}

// List returns all VMs, by name.
func (c *Controller) List(ctx context.Context) []VMachine {
	v := c.cfg.Store.View()
	var out []VMachine
	for _, m := range v.VMachines() {
		out = append(out, c.with(ctx, v, m))
	}
	slices.SortFunc(out, func(a, b VMachine) int {
		if n := strings.Compare(a.Name, b.Name); n != 0 {
			return n
		}
		return slices.Compare(a.ID[:], b.ID[:])
	})
	return out
}

// Get returns one by its id, the path of its describing file ("vpool/vm/vm.vmx"), or its name, if that is only one's.
func (c *Controller) Get(ctx context.Context, name string) (VMachine, error) {
	v := c.cfg.Store.View()
	if id, err := uuid.Parse(name); err == nil {
		m, err := v.VMachine(id)
		if err != nil {
			return VMachine{}, err
		}
		return c.with(ctx, v, m), nil
	}
	var found []VMachine
	for _, m := range v.VMachines() {
		if m.Name == name || strings.Contains(name, "/") && v.ConfigOf(m) == name {
			found = append(found, c.with(ctx, v, m))
		}
	}
	if len(name) > 80 {
		name = strings.ToValidUTF8(name[:80], "") + "…"
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return VMachine{}, &state.Error{Err: state.ErrNotFound, Object: "vmachine " + name}
	}
	e := &state.Error{Err: state.ErrConflict, Object: "vmachine " + name, Detail: fmt.Sprintf("%d VMs are called so", len(found)),
		Remedy: "give the id, or the path of the file that describes it"}
	for _, m := range found[:min(len(found), 5)] {
		e.By = append(e.By, m.ID.String()+" ("+m.Config+")")
	}
	return VMachine{}, e
}

// nameOf is what a new VM may be called: it is a directory and a file, and a line of a .vmx.
var nameOf = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._ -]{0,79}$`)

// CheckName refuses what a new VM cannot be called.
func CheckName(name string) error {
	if !nameOf.MatchString(name) || strings.HasSuffix(name, " ") || strings.HasSuffix(name, ".") {
		return &state.Error{Err: state.ErrInvalid, Object: fmt.Sprintf("vmachine %.80q", name), Field: "name", Detail: "not a name a new VM can have",
			Remedy: "use up to 80 of A-Z a-z 0-9 . _ - and spaces, beginning with a letter or digit"}
	}
	return nil
}

// stopped refuses what must not be done to a VM that runs.
func (c *Controller) stopped(ctx context.Context, m VMachine, force bool, what string) error {
	if force {
		return nil
	}
	power := m.Power
	if now, ok := c.cfg.Power(ctx, m.VMachine); ok {
		power = now
	}
	if power == state.PowerRunning || power == state.PowerPaused {
		return &state.Error{Err: state.ErrConflict, Object: m.object(), Detail: "is " + power,
			Remedy: "shut it down on its hypervisor, or force the " + what}
	}
	if n := m.Clients(); n > 0 {
		return &state.Error{Err: state.ErrConflict, Object: m.object(), Detail: fmt.Sprintf("%d clients have its disks open", n),
			Remedy: "shut it down (a disk counts as open for half a minute after its last use), or force the " + what}
	}
	return nil
}

// whole refuses what cannot be done to all of a VM.
func (m VMachine) whole(partial bool) error {
	names := m.names()
	switch {
	case len(names) == 0:
		return &state.Error{Err: state.ErrConflict, Object: m.object(), Detail: "has no disk on a vPool"}
	case m.Layered:
		return &state.Error{Err: state.ErrConflict, Object: m.object(), Detail: "runs on snapshots of its hypervisor, which vDisks alone do not hold",
			Remedy: "delete them there (consolidate), then try again"}
	case len(names) < len(m.Disks) && !partial:
		e := &state.Error{Err: state.ErrConflict, Object: m.object(), Detail: "has disks that are on no vPool", Remedy: "allow it for some of its disks"}
		for _, d := range m.Disks {
			if d.Name == "" {
				e.By = append(e.By, d.Label+" "+d.File)
			}
		}
		return e
	}
	return nil
}

// dirOf is the directory that a VM's describing file is in.
func (c *Controller) dirOf(v *state.View, m state.VMachine) (pool state.VPool, dir string, err error) {
	if m.Ino == 0 {
		return pool, "", &state.Error{Err: state.ErrConflict, Object: "vmachine " + m.Name, Detail: "is described by its hypervisor alone, not by a file on a vPool",
			Remedy: "do it on the hypervisor, or with its vDisks one by one"}
	}
	if pool, err = v.VPoolByFSID(m.FSID); err != nil {
		return pool, "", err
	}
	file, err := v.Path(m.FSID, m.Ino)
	return pool, path.Dir(file), err
}

// remove takes a file away, if it is there.
func (c *Controller) remove(ctx context.Context, fsid uint64, file string, keep state.Time) error {
	n, err := c.cfg.Store.View().Resolve(fsid, file)
	if errors.Is(err, state.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove %s: %w", file, err)
	}
	if n.Kind == state.Dir {
		return nil
	}
	_, err = c.cfg.Raft.Apply(ctx, &state.RemoveInode{FSID: fsid, Dir: n.Parent, Name: n.Name, Ino: n.Ino, Keep: keep})
	if err != nil && !errors.Is(err, state.ErrNotFound) {
		return fmt.Errorf("remove %s: %w", file, err)
	}
	return nil
}
