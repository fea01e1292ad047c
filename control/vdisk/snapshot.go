package vdisk

import (
	"context"
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"varve/control/events"
	"varve/control/state"
)

// SnapshotEngine is what the controller needs of the volume driver for snapshots and clones. Errors that a caller can act
// upon are state's: ErrNotFound, ErrExist, ErrConflict (in use, busy), ErrInvalid.
type SnapshotEngine interface {
	Snapshot(ctx context.Context, v state.Volume, s SnapshotSpec) (Snapshot, error)
	// SnapshotGroup takes one snapshot of each volume, all at one point in time.
	SnapshotGroup(ctx context.Context, vs []state.Volume, s []SnapshotSpec) ([]Snapshot, error)
	// Snapshots lists them, oldest first.
	Snapshots(ctx context.Context, v state.Volume) ([]Snapshot, error)
	EditSnapshot(ctx context.Context, v state.Volume, id uuid.UUID, edit func(*SnapshotSpec) error) error
	DeleteSnapshot(ctx context.Context, v state.Volume, id uuid.UUID) error
	// SnapshotSpace says how many bytes only this snapshot holds, and how many it shares.
	SnapshotSpace(ctx context.Context, v state.Volume, id uuid.UUID) (unique, shared int64, err error)
	Rollback(ctx context.Context, v state.Volume, id uuid.UUID, saveAs SnapshotSpec) error
	// RolledBack says whether the rollback that kept what the volume was as snapshot saved has been done; ErrNotFound without that snapshot.
	RolledBack(ctx context.Context, v state.Volume, saved uuid.UUID) (bool, error)
	// Parent says what a volume is a clone of. A rollback can change it, once there was a promotion.
	Parent(ctx context.Context, v state.Volume) (*state.VolumeParent, error)
	// Clone opens a volume whose state names its parent, which makes it.
	Clone(ctx context.Context, v state.Volume) error
	SetTemplate(ctx context.Context, v state.Volume, on bool) error
	// Flatten gives a clone data of its own, until its parent is needed no more; ErrConflict while its snapshots need it. progress is told
	// blocks. It can be cut off at any time and called again.
	Flatten(ctx context.Context, v state.Volume, progress func(done, total int64)) error
	// Promote makes a clone the owner of its parent's snapshots up to the one that it is a clone of, and its parent a clone of it; again,
	// after that, it does nothing. It gives what the volume is a clone of now, and the volumes that are clones of it.
	Promote(ctx context.Context, v state.Volume) ([]state.NewParent, error)
	// Rewind takes a snapshot of the volume as it was when a second began; ErrInvalid if its window does not reach back so far.
	Rewind(ctx context.Context, v state.Volume, at time.Time, s SnapshotSpec, progress func(done, total int64)) (Snapshot, error)
	// RewindRange says how far back that can be.
	RewindRange(ctx context.Context, v state.Volume) (RewindRange, error)
	// Ledger says how safe what was written is.
	Ledger(ctx context.Context, v state.Volume) (Ledger, error)
	// WaitLevel waits until everything accepted until now is "logged" or "backed".
	WaitLevel(ctx context.Context, v state.Volume, level string) error
}

// SnapshotSpec is what people say of a snapshot.
type SnapshotSpec struct {
	ID         uuid.UUID
	Name       string
	Created    time.Time
	Consistent bool // the guest's file systems were quiet
	Automatic  bool // by a schedule
	Sticky     bool // retention leaves it alone
	Labels     map[string]string
}

// Snapshot is one of a vDisk.
type Snapshot struct {
	SnapshotSpec
	Seq    uint64 // of the volume's log
	Size   int64  // of the vDisk then, in bytes
	Used   int64  // bytes stored, when Backed
	Backed bool   // all of it is on the backend
	Clones int
}

// RewindRange is what a vDisk's rewind window covers. From is zero while there is nothing to go back to.
type RewindRange struct {
	From    time.Time
	Window  time.Duration
	History int64 // bytes that only the window holds, as of the last scrub
}

// Ledger is how far what was accepted has come. Bytes and ages are of what has not come that far.
type Ledger struct {
	Accepted, Logged, Backed uint64 // sequence numbers
	UnloggedBytes            int64
	UnbackedBytes            int64
	UnbackedAge              time.Duration
}

// snapshotName is what a snapshot may be called: it is part of an export's name and of a path.
var snapshotName = regexp.MustCompile(`^[A-Za-z0-9_:+-][A-Za-z0-9._:+-]{0,254}$`)

func checkSnapshotName(object, name string) error {
	if !snapshotName.MatchString(name) {
		return &state.Error{Err: state.ErrInvalid, Object: object, Field: "name", Detail: "not a name a snapshot can have",
			Remedy: "use up to 255 of A-Z a-z 0-9 . _ : + -, not beginning with a dot"}
	}
	return nil
}

// SplitSnapshot takes "vpool/disk@snapshot" apart; a snapshot's id serves as its name.
func SplitSnapshot(name string) (disk, snapshot string, err error) {
	disk, snapshot, ok := strings.Cut(name, "@")
	if !ok || disk == "" || snapshot == "" {
		return "", "", &state.Error{Err: state.ErrInvalid, Object: fmt.Sprintf("snapshot %.80q", name), Detail: "not a name",
			Remedy: "write vpool/disk@snapshot, such as default/disk1@monday"}
	}
	return disk, snapshot, nil
}

// Snapshot takes one. Without an ID it gets one, without a name that of the moment.
func (c *Controller) Snapshot(ctx context.Context, name string, s SnapshotSpec) (Snapshot, error) {
	d, err := c.Get(ctx, name)
	if err != nil {
		return Snapshot{}, err
	}
	if err := c.fill(&s); err != nil {
		return Snapshot{}, err
	}
	out, err := c.cfg.Engine.Snapshot(ctx, d.Volume, s)
	if err != nil {
		return Snapshot{}, fmt.Errorf("snapshot %s@%s: %w", name, s.Name, err)
	}
	c.cfg.Log.Info("snapshot taken", "vdisk", name, "snapshot", s.Name)
	c.snapshotEvent(events.SnapshotCreate, d, out)
	return out, nil
}

func (c *Controller) snapshotEvent(typ string, d VDisk, s Snapshot) {
	c.cfg.Emit(typ, events.TopicSnapshot, d.Volume.ID.String(), map[string]any{"vdisk": d.FullName(), "snapshot": s.Name, "id": s.ID,
		"automatic": s.Automatic})
}

func (c *Controller) fill(s *SnapshotSpec) error {
	if s.ID == uuid.Nil {
		s.ID = uuid.New()
	}
	if s.Created.IsZero() {
		s.Created = time.Now()
	}
	if s.Name == "" {
		s.Name = s.Created.UTC().Format("2006-01-02T15:04:05.000Z")
	}
	return checkSnapshotName("snapshot "+s.Name, s.Name)
}

// SnapshotGroup takes a snapshot of several vDisks at one point in time; all get the same name and say of which group they are.
func (c *Controller) SnapshotGroup(ctx context.Context, names []string, s SnapshotSpec) ([]Snapshot, error) {
	group := uuid.New()
	s.ID = group
	if err := c.fill(&s); err != nil {
		return nil, err
	}
	var volumes []state.Volume
	var specs []SnapshotSpec
	var disks []VDisk
	for _, name := range names {
		d, err := c.Get(ctx, name)
		if err != nil {
			return nil, err
		}
		one := s
		one.ID = uuid.New()
		one.Labels = map[string]string{"group": group.String()}
		for k, v := range s.Labels {
			one.Labels[k] = v
		}
		volumes, specs, disks = append(volumes, d.Volume), append(specs, one), append(disks, d)
	}
	out, err := c.cfg.Engine.SnapshotGroup(ctx, volumes, specs)
	if err != nil {
		return nil, fmt.Errorf("snapshot %s of %d vDisks: %w", s.Name, len(names), err)
	}
	c.cfg.Log.Info("snapshot of a group taken", "vdisks", names, "snapshot", s.Name)
	for i := range out {
		c.snapshotEvent(events.SnapshotCreate, disks[i], out[i])
	}
	return out, nil
}

// Snapshots lists those of a vDisk, oldest first.
func (c *Controller) Snapshots(ctx context.Context, name string) ([]Snapshot, error) {
	d, err := c.Get(ctx, name)
	if err != nil {
		return nil, err
	}
	out, err := c.cfg.Engine.Snapshots(ctx, d.Volume)
	if err != nil {
		return nil, fmt.Errorf("snapshots of vdisk %s: %w", name, err)
	}
	return out, nil
}

// find gives a vDisk and one of its snapshots, by name or id.
func (c *Controller) find(ctx context.Context, disk, snapshot string) (VDisk, Snapshot, error) {
	d, err := c.Get(ctx, disk)
	if err != nil {
		return VDisk{}, Snapshot{}, err
	}
	all, err := c.cfg.Engine.Snapshots(ctx, d.Volume)
	if err != nil {
		return VDisk{}, Snapshot{}, fmt.Errorf("snapshots of vdisk %s: %w", disk, err)
	}
	for _, s := range all {
		if s.Name == snapshot || s.ID.String() == snapshot {
			return d, s, nil
		}
	}
	return VDisk{}, Snapshot{}, &state.Error{Err: state.ErrNotFound, Object: "snapshot " + disk + "@" + snapshot}
}

// GetSnapshot returns one, with the bytes that only it holds and those that it shares.
func (c *Controller) GetSnapshot(ctx context.Context, disk, snapshot string) (s Snapshot, unique, shared int64, err error) {
	d, s, err := c.find(ctx, disk, snapshot)
	if err != nil {
		return Snapshot{}, 0, 0, err
	}
	if unique, shared, err = c.cfg.Engine.SnapshotSpace(ctx, d.Volume, s.ID); err != nil {
		return Snapshot{}, 0, 0, fmt.Errorf("space of snapshot %s@%s: %w", disk, snapshot, err)
	}
	return s, unique, shared, nil
}

// EditSnapshot renames a snapshot, keeps it, or changes its labels.
func (c *Controller) EditSnapshot(ctx context.Context, disk, snapshot string, edit func(*SnapshotSpec)) (Snapshot, error) {
	d, s, err := c.find(ctx, disk, snapshot)
	if err != nil {
		return Snapshot{}, err
	}
	err = c.cfg.Engine.EditSnapshot(ctx, d.Volume, s.ID, func(spec *SnapshotSpec) error {
		edit(spec)
		return checkSnapshotName("snapshot "+disk+"@"+spec.Name, spec.Name)
	})
	if err != nil {
		return Snapshot{}, fmt.Errorf("change snapshot %s@%s: %w", disk, snapshot, err)
	}
	_, s, err = c.find(ctx, disk, s.ID.String())
	return s, err
}

// DeleteSnapshot deletes one. A sticky one needs force.
func (c *Controller) DeleteSnapshot(ctx context.Context, disk, snapshot string, force bool) error {
	d, s, err := c.find(ctx, disk, snapshot)
	if err != nil {
		return err
	}
	object := "snapshot " + disk + "@" + s.Name
	if s.Sticky && !force {
		return &state.Error{Err: state.ErrConflict, Object: object, Detail: "is kept", Remedy: "take the mark off, or force the deletion"}
	}
	if s.Clones > 0 {
		return &state.Error{Err: state.ErrConflict, Object: object, Detail: fmt.Sprintf("%d clones hang on it", s.Clones),
			By: c.clonesOf(d, s.ID), Remedy: "delete or flatten the clones first"}
	}
	if err := c.cfg.Engine.DeleteSnapshot(ctx, d.Volume, s.ID); err != nil {
		return fmt.Errorf("delete %s: %w", object, err)
	}
	c.cfg.Log.Info("snapshot deleted", "vdisk", disk, "snapshot", s.Name)
	c.snapshotEvent(events.SnapshotDelete, d, s)
	return nil
}

// clonesOf names the vDisks that are clones of one snapshot of a vDisk, or, with Nil, of any; those in the trash too.
func (c *Controller) clonesOf(d VDisk, snapshot uuid.UUID) []string {
	v := c.cfg.Store.View()
	var out []string
	for _, vol := range v.ClonesOf(d.Pool.FSID, d.Volume.ID) {
		if snapshot != uuid.Nil && vol.Parent.Snapshot != snapshot {
			continue
		}
		name := "in the trash: " + vol.ID.String()
		if file, err := v.Path(vol.FSID, vol.Ino); err == nil {
			short, _ := state.DiskName(file)
			name = d.Pool.Name + "/" + short
		}
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}

// Rollback makes a vDisk what it was at a snapshot; what it was until now stays as an automatic snapshot, which is returned.
// Clients that have it open would not know: it needs force then.
func (c *Controller) Rollback(ctx context.Context, disk, snapshot string, force bool) (Snapshot, error) {
	return c.rollback(ctx, disk, snapshot, force, uuid.New())
}

// rollback keeps what the vDisk was under an id. Called again with the same, it does it once, and keeps the state that an attempt which
// came to nothing has kept, besides.
func (c *Controller) rollback(ctx context.Context, disk, snapshot string, force bool, keep uuid.UUID) (Snapshot, error) {
	d, kept, err := c.find(ctx, disk, keep.String())
	if err == nil {
		done, err := c.cfg.Engine.RolledBack(ctx, d.Volume, keep)
		if err != nil {
			return Snapshot{}, fmt.Errorf("roll back vdisk %s to %s: see what became of the attempt before: %w", disk, snapshot, err)
		}
		if done {
			c.noteParent(ctx, d)
			return kept, nil
		}
		keep = uuid.New()
	} else if !errors.Is(err, state.ErrNotFound) {
		return Snapshot{}, err
	}
	d, s, err := c.find(ctx, disk, snapshot)
	if err != nil {
		return Snapshot{}, err
	}
	if d.Clients > 0 && !force {
		return Snapshot{}, &state.Error{Err: state.ErrConflict, Object: "vdisk " + disk, Detail: fmt.Sprintf("%d clients have it open", d.Clients),
			Remedy: "shut its VM down, or force the rollback"}
	}
	now := time.Now()
	save := SnapshotSpec{ID: keep, Name: "before-rollback-" + now.UTC().Format("2006-01-02T15:04:05.000000Z"), Created: now, Automatic: true,
		Labels: map[string]string{"rollback-to": s.Name}}
	if err := c.cfg.Engine.Rollback(ctx, d.Volume, s.ID, save); err != nil && !c.rolledBack(ctx, d, keep) {
		return Snapshot{}, fmt.Errorf("roll back vdisk %s to %s: %w", disk, s.Name, err)
	}
	c.cfg.Log.Info("vdisk rolled back", "vdisk", disk, "snapshot", s.Name, "saved_as", save.Name)
	c.noteParent(ctx, d)
	c.snapshotEvent(events.SnapshotRollback, d, s)
	_, saved, err := c.find(ctx, disk, save.ID.String())
	return saved, err
}

const rolledBackWait = 5 * time.Second

// rolledBack says of a rollback that ended with an error whether it was done all the same: a caller that is away after the point of no
// return does not undo it.
func (c *Controller) rolledBack(ctx context.Context, d VDisk, keep uuid.UUID) bool {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), rolledBackWait)
	defer cancel()
	done, err := c.cfg.Engine.RolledBack(ctx, d.Volume, keep)
	return err == nil && done
}

// noteParent makes the cluster's state say of what a vDisk is a clone, as its engine does. What that does not succeed in is noted the next
// time; until then a list names the parent before.
func (c *Controller) noteParent(ctx context.Context, d VDisk) {
	p, err := c.cfg.Engine.Parent(ctx, d.Volume)
	if was := d.Volume.Parent; err == nil && (p == nil) == (was == nil) && (p == nil || *p == *was) {
		return
	}
	if err == nil {
		_, err = c.cfg.Raft.Apply(ctx, &state.SetParents{Volumes: []state.NewParent{{Volume: d.Volume.ID, Parent: p}}})
	}
	if err != nil {
		c.cfg.Log.Warn("of what the vdisk is a clone is not noted", "vdisk", d.FullName(), "err", err)
	}
}

// Clone makes a vDisk that begins as a snapshot of another one, without copying. from is "vpool/disk@snapshot", or
// "vpool/disk": then a snapshot is taken for it.
func (c *Controller) Clone(ctx context.Context, from, to string) (VDisk, error) {
	if strings.Contains(from, "@") {
		disk, snapshot, err := SplitSnapshot(from)
		if err != nil {
			return VDisk{}, err
		}
		return c.clone(ctx, disk, snapshot, to)
	}
	s, err := c.Snapshot(ctx, from, SnapshotSpec{Name: "for-clone-" + uuid.NewString(), Automatic: true, Sticky: true, Labels: map[string]string{"for": to}})
	if err != nil {
		return VDisk{}, err
	}
	made, err := c.clone(ctx, from, s.ID.String(), to)
	if err != nil {
		if undo := c.DeleteSnapshot(context.WithoutCancel(ctx), from, s.ID.String(), true); undo != nil {
			c.cfg.Log.Warn("snapshot for a clone that could not be made is left over", "vdisk", from, "snapshot", s.Name, "err", undo)
		}
	}
	return made, err
}

func (c *Controller) clone(ctx context.Context, disk, snapshot, to string) (VDisk, error) {
	from := disk + "@" + snapshot
	d, s, err := c.find(ctx, disk, snapshot)
	if err != nil {
		return VDisk{}, err
	}
	pool, short, err := split(c.cfg.Store.View(), to)
	if err != nil {
		return VDisk{}, err
	}
	if pool.ID != d.Pool.ID {
		return VDisk{}, &state.Error{Err: state.ErrXDev, Object: "vdisk " + to, Detail: "a clone stays in the vPool of " + from,
			Remedy: "export it and import it there"}
	}
	file := state.DiskFile(short)
	if !state.IsDisk(file) {
		return VDisk{}, &state.Error{Err: state.ErrInvalid, Object: "vdisk " + to, Field: "name", Detail: "not a name a disk can have",
			Remedy: "leave the .raw or -flat.vmdk out"}
	}
	dir, err := c.makeDirs(ctx, pool.FSID, path.Dir(file))
	if err != nil {
		return VDisk{}, err
	}
	id := uuid.New()
	made, err := c.cfg.Raft.Apply(ctx, &state.CreateInode{FSID: pool.FSID, Parent: dir, Name: path.Base(file), Kind: state.File,
		How: state.Guarded, Mode: 0o644, Volume: id, Size: s.Size, Clone: &state.VolumeParent{Volume: d.Volume.ID, Snapshot: s.ID}})
	if err != nil {
		return VDisk{}, naming("vdisk "+to, err)
	}
	vol, err := c.cfg.Store.View().Volume(id)
	if err == nil {
		err = c.cfg.Engine.Clone(ctx, vol)
	}
	if err != nil {
		_, undo := c.cfg.Raft.Apply(context.WithoutCancel(ctx), &state.RemoveInode{FSID: pool.FSID, Dir: dir, Name: path.Base(file), Ino: made.Ino})
		if undo != nil {
			c.cfg.Log.Warn("name of a clone that could not be made is left over", "vdisk", to, "err", undo)
		}
		return VDisk{}, fmt.Errorf("clone %s to %s: %w", from, to, err)
	}
	c.cfg.Log.Info("vdisk cloned", "from", from, "to", to)
	return c.Get(ctx, to)
}

// SetTemplate makes a vDisk refuse writes and serve as what others are made from, or makes it a vDisk like any other again.
func (c *Controller) SetTemplate(ctx context.Context, name string, on, force bool) error {
	d, err := c.Get(ctx, name)
	if err != nil {
		return err
	}
	if on && d.Clients > 0 && !force {
		return &state.Error{Err: state.ErrConflict, Object: "vdisk " + name, Detail: fmt.Sprintf("%d clients have it open", d.Clients),
			Remedy: "shut its VM down, or force it"}
	}
	if err := c.cfg.Engine.SetTemplate(ctx, d.Volume, on); err != nil {
		return fmt.Errorf("template %s: %w", name, err)
	}
	c.cfg.Log.Info("vdisk is a template", "vdisk", name, "template", on)
	return nil
}

// FromTemplateMax bounds how many vDisks are made at once.
const FromTemplateMax = 1000

// FromTemplate makes vDisks from a template, all clones of one snapshot of it. It stops at the first that can't be made.
func (c *Controller) FromTemplate(ctx context.Context, template string, names []string, progress func(done int)) ([]VDisk, error) {
	d, err := c.Get(ctx, template)
	if err != nil {
		return nil, err
	}
	object := "template " + template
	switch {
	case !d.Info.Template:
		return nil, &state.Error{Err: state.ErrConflict, Object: object, Detail: "is no template", Remedy: "make it one, or clone it"}
	case len(names) == 0 || len(names) > FromTemplateMax:
		return nil, &state.Error{Err: state.ErrInvalid, Object: object, Field: "names", Detail: fmt.Sprintf("%d names", len(names)),
			Remedy: fmt.Sprintf("give 1 to %d", FromTemplateMax)}
	}
	const name = "template"
	_, s, err := c.find(ctx, template, name)
	if err != nil {
		if s, err = c.Snapshot(ctx, template, SnapshotSpec{Name: name, Consistent: true, Sticky: true}); err != nil {
			return nil, err
		}
	}
	var out []VDisk
	for i, to := range names {
		v, err := c.Clone(ctx, template+"@"+s.ID.String(), to)
		if err != nil {
			return out, err
		}
		out = append(out, v)
		if progress != nil {
			progress(i + 1)
		}
	}
	return out, nil
}

// TrashKeep is how long a deleted vDisk can be had back.
const TrashKeep = 7 * 24 * time.Hour

// Trash deletes a vDisk so that Restore can bring it back for a while. One that a client has open needs force.
func (c *Controller) Trash(ctx context.Context, name string, keep time.Duration, force bool) error {
	d, err := c.Get(ctx, name)
	if err != nil {
		return err
	}
	if d.Clients > 0 && !force {
		return &state.Error{Err: state.ErrConflict, Object: "vdisk " + name, Detail: fmt.Sprintf("%d clients have it open", d.Clients),
			Remedy: "detach it or shut its VM down, or force the deletion"}
	}
	if keep <= 0 {
		keep = TrashKeep
	}
	_, err = c.cfg.Raft.Apply(ctx, &state.RemoveInode{FSID: d.Pool.FSID, Dir: d.Inode.Parent, Name: d.Inode.Name, Ino: d.Inode.Ino,
		Keep: state.Time(time.Now().Add(keep).UnixNano())})
	if err != nil {
		return naming("vdisk "+name, err)
	}
	c.cfg.Log.Info("vdisk in the trash", "vdisk", name, "volume", d.Volume.ID, "keep", keep)
	return nil
}

// Trashed lists the deleted vDisks of a vPool, or of all with "", newest first.
func (c *Controller) Trashed(_ context.Context, pool string) ([]state.Trashed, error) {
	v := c.cfg.Store.View()
	pools := v.VPools()
	if pool != "" {
		p, err := v.VPool(pool)
		if err != nil {
			return nil, err
		}
		pools = []state.VPool{p}
	}
	var out []state.Trashed
	for _, p := range pools {
		out = append(out, v.Trash(p.FSID)...)
	}
	slices.SortFunc(out, func(a, b state.Trashed) int { return int(b.Removed - a.Removed) })
	return out, nil
}

// Restore brings a deleted vDisk back, under its old name or, unless that is "", another one of the same vPool. A file that went with a VM
// comes back in the same way; it is named by its path in the vPool.
func (c *Controller) Restore(ctx context.Context, volume uuid.UUID, to string) (VDisk, error) {
	v := c.cfg.Store.View()
	d, err := v.Trashed(volume)
	if err != nil {
		return VDisk{}, err
	}
	pool, err := v.VPoolByID(d.Pool)
	if err != nil {
		return VDisk{}, err
	}
	file := d.Path
	if to != "" {
		p, short, err := split(v, to)
		if err != nil {
			return VDisk{}, err
		}
		if p.ID != pool.ID {
			return VDisk{}, &state.Error{Err: state.ErrXDev, Object: "vdisk " + to, Remedy: "restore it into vPool " + pool.Name}
		}
		if state.IsDisk(d.Path) {
			short = state.DiskFile(short)
		}
		file = "/" + strings.TrimPrefix(short, "/")
	}
	dir, err := c.makeDirs(ctx, pool.FSID, path.Dir(file))
	if err != nil {
		return VDisk{}, err
	}
	if _, err := c.cfg.Raft.Apply(ctx, &state.RestoreTrash{Volume: volume, Parent: dir, Name: path.Base(file)}); err != nil {
		return VDisk{}, naming("file "+pool.Name+file, err)
	}
	short, disk := state.DiskName(file)
	if !disk {
		short = strings.TrimPrefix(file, "/")
	}
	name := pool.Name + "/" + short
	c.cfg.Log.Info("vdisk restored", "vdisk", name, "volume", volume)
	if vol, err := c.cfg.Store.View().Volume(volume); err == nil {
		if err := c.cfg.Engine.Renamed(ctx, vol, pool.Name, file); err != nil {
			c.cfg.Log.Warn("name of vdisk is not on its backend yet, its next opening writes it", "vdisk", name, "err", err)
		}
	}
	if disk {
		return c.Get(ctx, name)
	}
	v = c.cfg.Store.View()
	n, err := v.Resolve(pool.FSID, file)
	if err != nil {
		return VDisk{}, err
	}
	vol, err := v.Volume(volume)
	if err != nil {
		return VDisk{}, err
	}
	return c.with(pool, state.Disk{Name: short, Path: file, Inode: n, Volume: vol}), nil
}

// EmptyTrash makes deletions final: of these volumes, or, with none given, of those whose time is over.
func (c *Controller) EmptyTrash(ctx context.Context, volumes ...uuid.UUID) error {
	_, err := c.cfg.Raft.Apply(ctx, &state.EmptyTrash{Volumes: volumes, Due: len(volumes) == 0})
	return err
}
