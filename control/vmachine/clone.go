package vmachine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/google/uuid"

	"varve/control/jobs"
	"varve/control/state"
	"varve/control/vdisk"
	"varve/control/vmachine/vmconfig"
)

// ClonesMax bounds how many VMs are made at once.
const ClonesMax = 200

// CloneSpec says what to make of a VM.
type CloneSpec struct {
	VMachine uuid.UUID `json:"vmachine"`
	// Snapshot is the group to begin at; Nil takes one now.
	Snapshot uuid.UUID `json:"snapshot,omitzero"`
	Names    []string  `json:"names"`
}

// CanClone refuses what Clone would refuse.
func (c *Controller) CanClone(ctx context.Context, s CloneSpec) (VMachine, error) {
	m, err := c.Get(ctx, s.VMachine.String())
	if err != nil {
		return m, err
	}
	if len(s.Names) == 0 || len(s.Names) > ClonesMax {
		return m, &state.Error{Err: state.ErrInvalid, Object: m.object(), Field: "names", Detail: fmt.Sprintf("%d names", len(s.Names)),
			Remedy: fmt.Sprintf("give 1 to %d", ClonesMax)}
	}
	if err := m.whole(false); err != nil {
		return m, err
	}
	v := c.cfg.Store.View()
	pool, _, err := c.dirOf(v, m.VMachine)
	if err != nil {
		return m, err
	}
	for i, name := range s.Names {
		if err := CheckName(name); err != nil {
			return m, err
		}
		if slices.Contains(s.Names[:i], name) {
			return m, &state.Error{Err: state.ErrInvalid, Object: "vmachine " + name, Field: "names", Detail: "is named twice"}
		}
		if _, err := v.Resolve(pool.FSID, "/"+name); err == nil {
			return m, &state.Error{Err: state.ErrExist, Object: "directory " + pool.Name + "/" + name}
		}
	}
	if s.Snapshot != uuid.Nil {
		snap, err := c.snapshotOf(ctx, m, s.Snapshot.String())
		if err != nil {
			return m, err
		}
		if !snap.Complete() {
			return m, &state.Error{Err: state.ErrConflict, Object: "snapshot " + snap.Name + " of " + m.object(),
				Detail: fmt.Sprintf("has %d of the VM's %d disks", snap.Disks, snap.Of)}
		}
	}
	return m, nil
}

// clone makes VMs. marker names the snapshot that is taken for them, so that a second attempt finds it.
func (c *Controller) clone(ctx context.Context, s CloneSpec, marker string, progress func(done, total int)) ([]uuid.UUID, error) {
	m, err := c.Get(ctx, s.VMachine.String())
	if err != nil {
		return nil, err
	}
	if err := m.whole(false); err != nil {
		return nil, err
	}
	from := s.Snapshot.String()
	if s.Snapshot == uuid.Nil {
		from = marker
		_, err := c.snapshotOf(ctx, m, marker)
		if errors.Is(err, state.ErrNotFound) {
			_, err = c.snapshot(ctx, m, vdisk.SnapshotSpec{Name: marker, Automatic: true, Sticky: true, Labels: map[string]string{"for": "clones"}})
		}
		if err != nil {
			return nil, err
		}
	}
	snap, err := c.snapshotOf(ctx, m, from)
	if err != nil {
		return nil, err
	}
	var made []uuid.UUID
	for i, name := range s.Names {
		id, err := c.cloneOne(ctx, m, snap, name)
		if err != nil {
			return made, fmt.Errorf("clone %s to %s: %w", m.object(), name, err)
		}
		made = append(made, id)
		c.cfg.Log.Info("VM cloned", "from", m.Name, "snapshot", snap.Name, "to", name)
		c.event(EventClone, m, snap.Name, map[string]any{"to": name, "id": id})
		progress(i+1, len(s.Names))
	}
	return made, nil
}

// copied is one disk of a copy.
type copied struct {
	disk   Disk
	to     string // name of the vDisk
	ref    string // as the new describing file names it
	flat   string // path of its file
	text   string // path of its descriptor, "" where it has none
	source []byte // that of the original's
	old    []string
}

// cloneOne makes one VM of a snapshot: all of it, or nothing.
func (c *Controller) cloneOne(ctx context.Context, m VMachine, snap Snapshot, name string) (uuid.UUID, error) {
	v := c.cfg.Store.View()
	pool, _, err := c.dirOf(v, m.VMachine)
	if err != nil {
		return uuid.Nil, err
	}
	config, err := v.Inode(m.FSID, m.Ino)
	if err != nil {
		return uuid.Nil, err
	}
	vol, err := v.Volume(config.Volume)
	if err != nil {
		return uuid.Nil, err
	}
	text, err := c.cfg.Files.Read(ctx, vol, vmconfig.FileBytesMax)
	if err != nil {
		return uuid.Nil, err
	}
	parsed, err := vmconfig.Parse(m.Format, text)
	if err != nil {
		return uuid.Nil, err
	}
	plan, err := c.plan(ctx, v, m, pool, parsed, name)
	if err != nil {
		return uuid.Nil, err
	}
	files := make(map[string]string)
	for _, p := range plan {
		files[p.disk.File] = p.ref
	}
	// The id follows from what is made, so that a second attempt writes the same file.
	own := uuid.NewSHA1(snap.ID, []byte(name))
	fresh, err := vmconfig.Rewrite(m.Format, text, vmconfig.Copy{Name: name, UUID: own, Files: files})
	if err != nil {
		return uuid.Nil, err
	}
	if id, there, err := c.whole(ctx, m.Format, pool, snap, plan, name, own); there || err != nil {
		return id, err
	}
	id, err := c.build(ctx, m, pool, snap, plan, name, fresh)
	if err != nil {
		if _, there, look := c.whole(ctx, m.Format, pool, snap, plan, name, own); !there && look == nil { // else it is somebody's VM by now
			c.undo(ctx, snap, pool, plan, name)
		}
		return uuid.Nil, err
	}
	return id, nil
}

// configName is the path of the describing file of a copy.
func configName(format, name string) string {
	suffix := ".xml"
	if format == state.FormatVMX {
		suffix = ".vmx"
	}
	return "/" + name + "/" + name + suffix
}

// whole gives the VM that an earlier attempt has made, if there is one, and changes nothing of it. The describing file is written last: from
// then on the copy is its user's. It may have run since, on another node, its hypervisor may have written that file anew, its disks may
// stand by themselves. One of another origin is refused.
func (c *Controller) whole(ctx context.Context, format string, pool state.VPool, snap Snapshot, plan []copied, name string, own uuid.UUID) (id uuid.UUID, there bool, err error) {
	v := c.cfg.Store.View()
	n, err := v.Resolve(pool.FSID, configName(format, name))
	if errors.Is(err, state.ErrNotFound) {
		return uuid.Nil, false, nil
	}
	if err != nil {
		return uuid.Nil, false, err
	}
	vm, known := v.VMachineOf(n.FSID, n.Ino)
	says := vm.UUID
	if !known {
		vol, err := v.Volume(n.Volume)
		if err != nil {
			return uuid.Nil, false, err
		}
		text, err := c.cfg.Files.Read(ctx, vol, vmconfig.FileBytesMax)
		if err != nil || len(text) == 0 {
			return uuid.Nil, false, err
		}
		if parsed, err := vmconfig.Parse(format, text); err == nil {
			says = parsed.UUID
		}
	}
	ours := says == own.String()
	for _, p := range plan {
		have, err := c.cfg.Disks.Get(ctx, p.to)
		ours = ours || err == nil && have.Volume.Parent != nil && have.Volume.Parent.Snapshot == snap.members[p.disk.Volume].ID
	}
	switch {
	case !ours:
		return uuid.Nil, true, &state.Error{Err: state.ErrExist, Object: "file " + pool.Name + configName(format, name)}
	case known:
		return vm.ID, true, nil
	}
	if id, err = c.ingest(ctx, n); err == nil && id == uuid.Nil {
		err = fmt.Errorf("its describing file %s is not one", n.Name)
	}
	return id, true, err
}

// plan says what the disks of a copy are called.
func (c *Controller) plan(ctx context.Context, v *state.View, m VMachine, pool state.VPool, parsed vmconfig.Config, name string) ([]copied, error) {
	var out []copied
	for i, d := range m.Disks {
		if d.Name == "" {
			continue
		}
		at := slices.IndexFunc(parsed.Disks, func(p vmconfig.Disk) bool { return p.Label == d.Label && p.File == d.File })
		if at < 0 {
			return nil, &state.Error{Err: state.ErrConflict, Object: m.object(), Detail: "its describing file has just changed", Remedy: "try again"}
		}
		vol, err := v.Volume(d.Volume)
		if err != nil {
			return nil, err
		}
		file, err := v.Path(vol.FSID, vol.Ino)
		if err != nil {
			return nil, err
		}
		in, err := v.VPoolByFSID(vol.FSID)
		if err != nil {
			return nil, err
		}
		base := name
		if i > 0 {
			base = fmt.Sprintf("%s_%d", name, i)
		}
		p := copied{disk: d, flat: "/" + name + "/" + base + ".raw"}
		if strings.HasSuffix(file, "-flat.vmdk") {
			p.flat = "/" + name + "/" + base + "-flat.vmdk"
			if err := c.descriptorOf(ctx, v, vol.FSID, file, &p, base); err != nil {
				return nil, err
			}
		}
		p.to = in.Name + p.flat
		if p.ref, err = reference(parsed.Disks[at], file, p, in, pool); err != nil {
			return nil, fmt.Errorf("disk %s: %w", d.Label, err)
		}
		out = append(out, p)
	}
	return out, nil
}

// descriptorOf reads the descriptor beside a flat file, whose copy becomes that of the copy.
func (c *Controller) descriptorOf(ctx context.Context, v *state.View, fsid uint64, flat string, p *copied, base string) error {
	n, err := v.Resolve(fsid, strings.TrimSuffix(flat, "-flat.vmdk")+".vmdk")
	if errors.Is(err, state.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	vol, err := v.Volume(n.Volume)
	if err != nil {
		return err
	}
	b, err := c.cfg.Files.Read(ctx, vol, vmconfig.DescriptorBytesMax)
	if err != nil {
		return err
	}
	d, err := vmconfig.ParseDescriptor(b)
	if err != nil {
		return fmt.Errorf("descriptor of %s: %w", flat, err)
	}
	p.source, p.text, p.old = b, "/"+path.Base(path.Dir(p.flat))+"/"+base+".vmdk", d.Extents
	return nil
}

// reference is how the describing file of a copy names a disk: as that of the original does, with the path in the vPool changed.
func reference(d vmconfig.Disk, file string, p copied, in, config state.VPool) (string, error) {
	now, was := p.flat, file
	if p.text != "" || strings.HasSuffix(d.File, ".vmdk") && !strings.HasSuffix(d.File, "-flat.vmdk") {
		now, was = strings.TrimSuffix(p.flat, "-flat.vmdk")+".vmdk", strings.TrimSuffix(file, "-flat.vmdk")+".vmdk"
	}
	switch d.Kind {
	case vmconfig.OnNBD:
		name, _ := state.DiskName(p.flat)
		return in.Name + "/" + name, nil
	case vmconfig.InPool:
		store, _, _ := strings.Cut(d.File, "/")
		return store + now, nil
	}
	if in.ID == config.ID && !strings.HasPrefix(d.File, "/") {
		return path.Base(now), nil
	}
	if prefix, ok := strings.CutSuffix(d.File, was); ok {
		return prefix + now, nil
	}
	return "", &state.Error{Err: state.ErrConflict, Object: "disk " + d.File, Detail: "is not called so on its vPool any more",
		Remedy: "have the hypervisor write its configuration anew, then try again"}
}

// build makes everything that the plan says, the describing file last. What an earlier attempt made is kept.
func (c *Controller) build(ctx context.Context, m VMachine, pool state.VPool, snap Snapshot, plan []copied, name string, config []byte) (uuid.UUID, error) {
	for _, p := range plan {
		member := snap.members[p.disk.Volume]
		if have, err := c.cfg.Disks.Get(ctx, p.to); err == nil {
			if have.Volume.Parent == nil || have.Volume.Parent.Snapshot != member.ID {
				return uuid.Nil, &state.Error{Err: state.ErrExist, Object: "vdisk " + p.to}
			}
		} else if _, err := c.cfg.Disks.Clone(ctx, p.disk.Name+"@"+member.ID.String(), p.to); err != nil {
			return uuid.Nil, err
		}
		if p.text == "" {
			continue
		}
		extents := make(map[string]string)
		for _, old := range p.old {
			extents[old] = path.Base(p.flat)
		}
		b, err := vmconfig.RewriteDescriptor(p.source, extents)
		if err != nil {
			return uuid.Nil, err
		}
		if _, err := c.write(ctx, p.disk.Name, p.text, b); err != nil {
			return uuid.Nil, err
		}
	}
	n, err := c.write(ctx, pool.Name+"/", configName(m.Format, name), config)
	if err != nil {
		return uuid.Nil, err
	}
	id, err := c.ingest(ctx, n)
	if err == nil && id == uuid.Nil {
		err = fmt.Errorf("its describing file %s is not one", n.Name)
	}
	return id, err
}

// write makes a file with these bytes on the vPool that a name begins with.
func (c *Controller) write(ctx context.Context, like, file string, b []byte) (state.Inode, error) {
	name, _, _ := strings.Cut(like, "/")
	pool, err := c.cfg.Store.View().VPool(name)
	if err != nil {
		return state.Inode{}, err
	}
	dir := path.Base(path.Dir(file))
	_, err = c.cfg.Raft.Apply(ctx, &state.CreateInode{FSID: pool.FSID, Parent: state.RootIno, Name: dir, Kind: state.Dir, How: state.Guarded, Mode: 0o755})
	if err != nil && !errors.Is(err, state.ErrExist) {
		return state.Inode{}, fmt.Errorf("make directory %s: %w", dir, err)
	}
	parent, err := c.cfg.Store.View().Lookup(pool.FSID, state.RootIno, dir)
	if err != nil {
		return state.Inode{}, err
	}
	made, err := c.cfg.Raft.Apply(ctx, &state.CreateInode{FSID: pool.FSID, Parent: parent.Ino, Name: path.Base(file), Kind: state.File, How: state.Unchecked,
		Mode: 0o644, Volume: uuid.New()})
	if err != nil {
		return state.Inode{}, fmt.Errorf("make file %s%s: %w", pool.Name, file, err)
	}
	v := c.cfg.Store.View()
	n, err := v.Inode(pool.FSID, made.Ino)
	if err != nil {
		return state.Inode{}, err
	}
	vol, err := v.Volume(n.Volume)
	if err != nil {
		return state.Inode{}, err
	}
	if size, _, ok := c.cfg.Files.Stat(vol.ID); ok && size > 0 {
		if have, err := c.cfg.Files.Read(ctx, vol, vmconfig.FileBytesMax); err != nil || !bytes.Equal(have, b) {
			return state.Inode{}, errors.Join(&state.Error{Err: state.ErrExist, Object: "file " + pool.Name + file}, err)
		}
		return n, nil
	}
	if err := c.cfg.Files.Write(ctx, vol, b); err != nil {
		return state.Inode{}, fmt.Errorf("write file %s%s: %w", pool.Name, file, err)
	}
	return n, nil
}

// undo takes away what a failed attempt made, and nothing else: disks are known by the snapshot that they are clones of.
func (c *Controller) undo(ctx context.Context, snap Snapshot, pool state.VPool, plan []copied, name string) {
	ctx = context.WithoutCancel(ctx)
	warn := func(what string, err error) {
		if err != nil && !errors.Is(err, state.ErrNotFound) {
			c.cfg.Log.Warn("part of a VM that could not be made is left over", "what", what, "err", err)
		}
	}
	dirs := map[uint64]bool{pool.FSID: true}
	mine := false
	for _, p := range plan {
		have, err := c.cfg.Disks.Get(ctx, p.to)
		if err != nil || have.Volume.Parent == nil || have.Volume.Parent.Snapshot != snap.members[p.disk.Volume].ID {
			continue
		}
		mine = true
		dirs[have.Pool.FSID] = true
		warn(p.to, c.cfg.Disks.Delete(ctx, p.to, false)) // not if somebody has it open
		if p.text != "" {
			warn(p.text, c.remove(ctx, have.Pool.FSID, p.text, 0))
		}
	}
	if !mine {
		return
	}
	for _, suffix := range []string{".vmx", ".xml"} {
		warn(name+suffix, c.remove(ctx, pool.FSID, "/"+name+"/"+name+suffix, 0))
	}
	for fsid := range dirs {
		d, err := c.cfg.Store.View().Resolve(fsid, "/"+name)
		if err == nil && d.Kind == state.Dir && d.Entries == 0 {
			_, err = c.cfg.Raft.Apply(ctx, &state.RemoveDir{FSID: fsid, Dir: d.Parent, Name: d.Name})
		}
		warn(name, err)
	}
}

// Types of task.
const (
	CloneTask    = "vmachine.clone"
	RollbackTask = "vmachine.rollback"
	DeleteTask   = "vmachine.delete"
)

// RollbackSpec says to where a VM is rolled back.
type RollbackSpec struct {
	VMachine uuid.UUID `json:"vmachine"`
	Snapshot uuid.UUID `json:"snapshot"`
	Force    bool      `json:"force,omitempty"`
}

// TaskTypes are the controller's long operations.
func (c *Controller) TaskTypes() []jobs.Type {
	counted := func(r *jobs.Run) func(done, total int) {
		return func(done, total int) { r.Progress(int64(done), int64(total)) }
	}
	return []jobs.Type{{
		// Those of one VM one after the other: each knows what an earlier attempt left by the snapshot that it makes VMs from.
		Name: CloneTask, Title: "make VMs from a VM", Queue: state.QueueGeneric, Ensure: state.EnsureChained, PerObject: true,
		Consequence: "some of the VMs are not made", Remedy: "mend what the cause says, then retry the task: it makes those that are missing",
		Do: func(ctx context.Context, r *jobs.Run) error {
			var s CloneSpec
			if err := r.Args(&s); err != nil {
				return err
			}
			made, err := c.clone(ctx, s, "for-clones-"+r.ID().String(), counted(r))
			if err != nil {
				return err
			}
			return r.Result(map[string]any{"vmachines": made, "names": s.Names})
		},
	}, {
		Name: RollbackTask, Title: "roll a VM back", Queue: state.QueueGeneric,
		Consequence: "the VM's disks are what they were before", Remedy: "mend what the cause says, then try again",
		Do: func(ctx context.Context, r *jobs.Run) error {
			var s RollbackSpec
			if err := r.Args(&s); err != nil {
				return err
			}
			saved, err := c.Rollback(ctx, s.VMachine.String(), s.Snapshot.String(), s.Force, counted(r))
			if err != nil {
				return err
			}
			return r.Result(map[string]string{"saved_as": saved})
		},
	}, {
		Name: DeleteTask, Title: "delete a VM", Queue: state.QueueGeneric,
		Consequence: "parts of the VM are still there", Remedy: "mend what the cause says, then retry the task",
		Do: func(ctx context.Context, r *jobs.Run) error {
			var s DeleteSpec
			if err := r.Args(&s); err != nil {
				return err
			}
			err := c.Delete(ctx, s, counted(r))
			if errors.Is(err, state.ErrNotFound) && r.Task().Deliveries > 1 {
				return nil // an earlier delivery did it
			}
			return err
		},
	}}
}
