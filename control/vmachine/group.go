package vmachine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"varve/control/state"
	"varve/control/vdisk"
)

// Names of events that the controller publishes; the state emits vmachine_create, _rename, _disks, _power and _delete.
const (
	EventSnapshot       = "vmachine_snapshot"
	EventSnapshotDelete = "vmachine_snapshot_delete"
	EventRollback       = "vmachine_rollback"
	EventClone          = "vmachine_clone"
	topic               = "vmachine"
)

// labels of the members of a group snapshot. vdisk.SnapshotGroup sets the first.
const (
	labelGroup   = "group"
	labelMachine = "vmachine"
)

// Snapshot is one of a VM: of its disks, at one point in time.
type Snapshot struct {
	// ID is the group's.
	ID                            uuid.UUID
	Name                          string
	Created                       time.Time
	Consistent, Automatic, Sticky bool
	// Disks have a member, Of are the VM's. Backed: all is on the backend.
	Disks, Of int
	Backed    bool
	Clones    int
	Labels    map[string]string

	members map[uuid.UUID]vdisk.Snapshot // by volume
}

// Complete says that every disk of the VM has a member.
func (s Snapshot) Complete() bool { return s.Disks == s.Of }

func (c *Controller) event(typ string, m VMachine, snapshot string, more map[string]any) {
	data := map[string]any{"name": m.Name, "config": m.Config, "disks": m.names()}
	if snapshot != "" {
		data["snapshot"] = snapshot
	}
	for k, v := range more {
		data[k] = v
	}
	c.cfg.Emit(typ, topic, m.ID.String(), data)
}

// Snapshot takes one of all disks of a VM in one cut. With partial, also where some of its disks are on no vPool.
func (c *Controller) Snapshot(ctx context.Context, name string, s vdisk.SnapshotSpec, partial bool) (Snapshot, error) {
	m, err := c.Get(ctx, name)
	if err != nil {
		return Snapshot{}, err
	}
	if err := m.whole(partial); err != nil {
		return Snapshot{}, err
	}
	taken, err := c.snapshot(ctx, m, s)
	if err != nil {
		return Snapshot{}, err
	}
	return c.snapshotOf(ctx, m, taken)
}

// snapshot takes one and gives the group's id.
func (c *Controller) snapshot(ctx context.Context, m VMachine, s vdisk.SnapshotSpec) (group string, err error) {
	labels := map[string]string{labelMachine: m.ID.String()}
	for k, v := range s.Labels {
		labels[k] = v
	}
	s.Labels = labels
	taken, err := c.cfg.Disks.SnapshotGroup(ctx, m.names(), s)
	if err != nil {
		return "", fmt.Errorf("snapshot %s of %s: %w", s.Name, m.object(), err)
	}
	group = taken[0].Labels[labelGroup]
	c.cfg.Log.Info("snapshot of a VM taken", "vmachine", m.Name, "snapshot", taken[0].Name, "disks", len(taken))
	c.event(EventSnapshot, m, taken[0].Name, map[string]any{"id": group})
	return group, nil
}

// Snapshots lists those of a VM, oldest first: groups of snapshots of its disks.
func (c *Controller) Snapshots(ctx context.Context, name string) ([]Snapshot, error) {
	m, err := c.Get(ctx, name)
	if err != nil {
		return nil, err
	}
	return c.snapshots(ctx, m)
}

func (c *Controller) snapshots(ctx context.Context, m VMachine) ([]Snapshot, error) {
	groups := make(map[uuid.UUID]*Snapshot)
	disks := 0
	for _, d := range m.Disks {
		if d.Name == "" {
			continue
		}
		disks++
		all, err := c.cfg.Disks.Snapshots(ctx, d.Name)
		if err != nil {
			return nil, err
		}
		for _, s := range all {
			id, err := uuid.Parse(s.Labels[labelGroup])
			if err != nil {
				continue
			}
			g := groups[id]
			if g == nil {
				g = &Snapshot{ID: id, Name: s.Name, Created: s.Created, Consistent: s.Consistent, Automatic: s.Automatic, Sticky: s.Sticky, Backed: true,
					Labels: s.Labels, members: make(map[uuid.UUID]vdisk.Snapshot)}
				groups[id] = g
			}
			g.members[d.Volume] = s
			g.Disks++
			g.Backed = g.Backed && s.Backed
			g.Clones = max(g.Clones, s.Clones)
		}
	}
	var out []Snapshot
	for _, g := range groups {
		g.Of = disks
		out = append(out, *g)
	}
	slices.SortFunc(out, func(a, b Snapshot) int {
		if n := a.Created.Compare(b.Created); n != 0 {
			return n
		}
		return slices.Compare(a.ID[:], b.ID[:])
	})
	return out, nil
}

// GetSnapshot finds one by name or id.
func (c *Controller) GetSnapshot(ctx context.Context, name, snapshot string) (VMachine, Snapshot, error) {
	m, err := c.Get(ctx, name)
	if err != nil {
		return VMachine{}, Snapshot{}, err
	}
	s, err := c.snapshotOf(ctx, m, snapshot)
	return m, s, err
}

func (c *Controller) snapshotOf(ctx context.Context, m VMachine, snapshot string) (Snapshot, error) {
	all, err := c.snapshots(ctx, m)
	if err != nil {
		return Snapshot{}, err
	}
	for _, s := range all {
		if s.ID.String() == snapshot {
			return s, nil
		}
	}
	for _, s := range slices.Backward(all) {
		if s.Name == snapshot {
			return s, nil
		}
	}
	return Snapshot{}, &state.Error{Err: state.ErrNotFound, Object: fmt.Sprintf("snapshot %.80s of %s", snapshot, m.object())}
}

// DeleteSnapshot deletes a group. A sticky one needs force; one that a clone hangs on stays whole.
func (c *Controller) DeleteSnapshot(ctx context.Context, name, snapshot string, force bool) error {
	m, s, err := c.GetSnapshot(ctx, name, snapshot)
	if err != nil {
		return err
	}
	object := "snapshot " + s.Name + " of " + m.object()
	if s.Sticky && !force {
		return &state.Error{Err: state.ErrConflict, Object: object, Detail: "is kept", Remedy: "take the mark off, or force the deletion"}
	}
	if s.Clones > 0 {
		return &state.Error{Err: state.ErrConflict, Object: object, Detail: "clones hang on it", Remedy: "delete the clones first"}
	}
	for _, d := range m.Disks {
		member, ok := s.members[d.Volume]
		if !ok {
			continue
		}
		if err := c.cfg.Disks.DeleteSnapshot(ctx, d.Name, member.ID.String(), force); err != nil && !errors.Is(err, state.ErrNotFound) {
			return fmt.Errorf("delete %s: %w", object, err)
		}
	}
	c.event(EventSnapshotDelete, m, s.Name, map[string]any{"id": s.ID})
	return nil
}

// Rollback makes all disks of a VM what they were at a snapshot. What they were until now stays as a snapshot of the VM. If
// a disk cannot be rolled back, those that were are taken back to that.
func (c *Controller) Rollback(ctx context.Context, name, snapshot string, force bool, progress func(done, total int)) (saved string, err error) {
	m, s, err := c.CanRollback(ctx, name, snapshot, force)
	if err != nil {
		return "", err
	}
	now := time.Now()
	group, err := c.snapshot(ctx, m, vdisk.SnapshotSpec{Name: "vm-before-rollback-" + now.UTC().Format("2006-01-02T15:04:05.000000Z"), Created: now,
		Automatic: true, Labels: map[string]string{"rollback-to": s.Name}})
	if err != nil {
		return "", err
	}
	before, err := c.snapshotOf(ctx, m, group)
	if err != nil {
		return "", err
	}
	var done []Disk
	for _, d := range m.Disks {
		member, ok := s.members[d.Volume]
		if !ok {
			continue
		}
		if _, err := c.cfg.Disks.Rollback(ctx, d.Name, member.ID.String(), force); err != nil {
			return before.Name, errors.Join(fmt.Errorf("roll %s back to %s: %w", m.object(), s.Name, err), c.takeBack(ctx, m, before, done))
		}
		done = append(done, d)
		progress(len(done), s.Disks)
	}
	c.cfg.Log.Info("VM rolled back", "vmachine", m.Name, "snapshot", s.Name, "saved_as", before.Name)
	c.event(EventRollback, m, s.Name, map[string]any{"id": s.ID, "saved_as": before.Name})
	return before.Name, nil
}

const takeBackMax = 5 * time.Minute

// takeBack undoes half a rollback.
func (c *Controller) takeBack(ctx context.Context, m VMachine, before Snapshot, done []Disk) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), takeBackMax)
	defer cancel()
	var errs []error
	for _, d := range done {
		if _, err := c.cfg.Disks.Rollback(ctx, d.Name, before.members[d.Volume].ID.String(), true); err != nil {
			errs = append(errs, fmt.Errorf("disk %s stays at the older snapshot, what it was is its snapshot %s: %w", d.Name, before.Name, err))
		}
	}
	return errors.Join(errs...)
}

// CanRollback refuses what Rollback would refuse.
func (c *Controller) CanRollback(ctx context.Context, name, snapshot string, force bool) (VMachine, Snapshot, error) {
	m, s, err := c.GetSnapshot(ctx, name, snapshot)
	if err != nil {
		return m, s, err
	}
	if !s.Complete() {
		return m, s, &state.Error{Err: state.ErrConflict, Object: "snapshot " + s.Name + " of " + m.object(),
			Detail: fmt.Sprintf("has %d of the VM's %d disks", s.Disks, s.Of), Remedy: "roll its vDisks back one by one"}
	}
	if err := m.whole(true); err != nil {
		return m, s, err
	}
	return m, s, c.stopped(ctx, m, force, "rollback")
}

// SetTemplate makes a VM one that takes no writes and that others are made from, or a VM like any other again.
func (c *Controller) SetTemplate(ctx context.Context, name string, on, force bool) (VMachine, error) {
	m, err := c.Get(ctx, name)
	if err != nil {
		return VMachine{}, err
	}
	if on {
		if err := m.whole(false); err != nil {
			return VMachine{}, err
		}
		if _, _, err := c.dirOf(c.cfg.Store.View(), m.VMachine); err != nil {
			return VMachine{}, err
		}
		if err := c.stopped(ctx, m, force, "template"); err != nil {
			return VMachine{}, err
		}
	}
	var done []Disk
	for _, d := range m.Disks {
		if d.Name == "" {
			continue
		}
		if err := c.cfg.Disks.SetTemplate(ctx, d.Name, on, force); err != nil {
			for _, d := range done {
				err = errors.Join(err, c.cfg.Disks.SetTemplate(context.WithoutCancel(ctx), d.Name, !on, true))
			}
			return VMachine{}, err
		}
		done = append(done, d)
	}
	if _, err := c.cfg.Raft.Apply(ctx, &state.SetVMachineTemplate{ID: m.ID, Template: on}); err != nil {
		return VMachine{}, err
	}
	return c.Get(ctx, m.ID.String())
}

// Satellites are the files of a VM that only describe it: they go with it. disks are descriptors.
func (c *Controller) satellites(v *state.View, m VMachine) (pool state.VPool, dir string, files []string, err error) {
	pool, dir, err = c.dirOf(v, m.VMachine)
	if err != nil {
		return pool, dir, nil, err
	}
	config, err := v.Path(m.FSID, m.Ino)
	if err != nil {
		return pool, dir, nil, err
	}
	d, err := v.Resolve(pool.FSID, dir)
	if err != nil {
		return pool, dir, nil, err
	}
	entries, _, err := v.ReadDir(pool.FSID, d.Ino, 0, entriesMax)
	if err != nil {
		return pool, dir, nil, err
	}
	stem := nameFrom(config)
	alone := dir != "/"
	for _, e := range entries {
		alone = alone && (state.FormatOf(e.Name) == "" || e.Name == path.Base(config))
	}
	described := make(map[string]bool)
	for _, s := range m.Sources {
		if vol, err := v.Volume(s.Volume); err == nil && vol.FSID == pool.FSID {
			if p, err := v.Path(vol.FSID, vol.Ino); err == nil && strings.HasSuffix(p, ".vmdk") {
				described[path.Base(p)] = path.Dir(p) == dir
			}
		}
	}
	for _, e := range entries {
		own := slices.Contains([]string{".nvram", ".vmsd", ".vmxf", ".vmx~", ".vmx.lck", ".vswp"}, strings.TrimPrefix(e.Name, stem)) && strings.HasPrefix(e.Name, stem)
		log := alone && strings.HasPrefix(e.Name, "vmware") && strings.HasSuffix(e.Name, ".log")
		if e.Kind == state.File && (own || log || described[e.Name]) {
			files = append(files, path.Join(dir, e.Name))
		}
	}
	return pool, dir, append(files, config), nil
}

const entriesMax = 10_000

// DeleteSpec says how a VM is deleted.
type DeleteSpec struct {
	VMachine uuid.UUID     `json:"vmachine"`
	Force    bool          `json:"force,omitempty"`
	Purge    bool          `json:"purge,omitempty"`
	Keep     time.Duration `json:"keep,omitempty"`
}

// CanDelete refuses what Delete would refuse, and names the files that go with the VM.
func (c *Controller) CanDelete(ctx context.Context, name string, s DeleteSpec) (m VMachine, files []string, err error) {
	if m, err = c.Get(ctx, name); err != nil {
		return m, nil, err
	}
	if err := c.stopped(ctx, m, s.Force, "deletion"); err != nil {
		return m, nil, err
	}
	v := c.cfg.Store.View()
	for _, d := range m.Disks {
		vol, err := v.Volume(d.Volume)
		if err != nil || !s.Purge {
			continue
		}
		if n := len(v.ClonesOf(vol.FSID, vol.ID)); n > 0 {
			return m, nil, &state.Error{Err: state.ErrConflict, Object: m.object(), Detail: fmt.Sprintf("%d clones hang on snapshots of its disk %s", n, d.Name),
				Remedy: "delete the clones first, or let the disks go into the trash"}
		}
	}
	_, _, files, err = c.satellites(v, m)
	return m, files, err
}

// Delete takes a VM away: its disks into the trash, or for good with Purge, then the files that describe it the same way: what is restored
// from there is found as the VM again. Other files of its directory stay, and the directory with them.
func (c *Controller) Delete(ctx context.Context, s DeleteSpec, progress func(done, total int)) error {
	m, _, err := c.CanDelete(ctx, s.VMachine.String(), s)
	if err != nil {
		return err
	}
	for i, d := range m.Disks {
		if d.Name == "" {
			continue
		}
		if s.Purge {
			err = c.cfg.Disks.Delete(ctx, d.Name, s.Force)
		} else {
			err = c.cfg.Disks.Trash(ctx, d.Name, s.Keep, s.Force)
		}
		if err != nil && !errors.Is(err, state.ErrNotFound) {
			return fmt.Errorf("delete %s: %w", m.object(), err)
		}
		progress(i+1, len(m.Disks)+1)
	}
	v := c.cfg.Store.View()
	pool, dir, files, err := c.satellites(v, m)
	if err != nil {
		return fmt.Errorf("delete %s: %w", m.object(), err)
	}
	var keep state.Time // with the disks
	if !s.Purge {
		keep = state.Time(time.Now().Add(cmp.Or(max(0, s.Keep), vdisk.TrashKeep)).UnixNano())
	}
	for _, f := range files { // the describing file is the last
		if err := c.remove(ctx, pool.FSID, f, keep); err != nil {
			return fmt.Errorf("delete %s: %w", m.object(), err)
		}
	}
	if d, err := c.cfg.Store.View().Resolve(pool.FSID, dir); err == nil && dir != "/" && d.Entries == 0 {
		_, err := c.cfg.Raft.Apply(ctx, &state.RemoveDir{FSID: pool.FSID, Dir: d.Parent, Name: d.Name})
		if err != nil && !errors.Is(err, state.ErrNotFound) && !errors.Is(err, state.ErrNotEmpty) {
			return fmt.Errorf("delete directory of %s: %w", m.object(), err)
		}
	}
	if _, err := c.cfg.Raft.Apply(ctx, &state.DeleteVMachine{ID: m.ID}); err != nil && !errors.Is(err, state.ErrNotFound) {
		return fmt.Errorf("delete %s: %w", m.object(), err)
	}
	c.cfg.Log.Info("VM deleted", "vmachine", m.Name, "disks", m.names(), "purged", s.Purge)
	return nil
}
