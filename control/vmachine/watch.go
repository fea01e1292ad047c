package vmachine

import (
	"context"
	"errors"
	"path"
	"slices"
	"time"

	"github.com/google/uuid"

	"varve/control/state"
	"varve/control/vmachine/vmconfig"
)

const (
	pollEvery  = time.Second
	gather     = 200 * time.Millisecond // lets a burst of new names be looked at once
	againEvery = 15 * time.Second       // a VM some of whose disks are not known is read again this often
	scanShare  = 20                     // of the time, at most a twentieth goes into looking at names
	readsAtOne = 200                    // files read in one round; the others wait for the next
)

// watch is what Run remembers between rounds.
type watch struct {
	// seen has, by volume, the stamp that a file had when it was last looked at, and since when.
	seen map[uuid.UUID]sighting
	// gone has, by VM, since when its file is.
	gone map[uuid.UUID]time.Time
}

type sighting struct {
	stamp state.VMachineSource
	since time.Time
	// read is when it was last read with this stamp; zero if it was not.
	read time.Time
}

func newWatch() watch {
	return watch{seen: make(map[uuid.UUID]sighting), gone: make(map[uuid.UUID]time.Time)}
}

// Run finds VMs and follows their files until ctx ends.
func (c *Controller) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		v, changed, err := c.cfg.Store.Watch("inode")
		if err != nil {
			return err
		}
		began := time.Now()
		files := c.files(v)
		took := time.Since(began)
		earliest := time.Now().Add(max(gather, scanShare*took))
		for again := false; !again && ctx.Err() == nil; {
			c.round(ctx, files, time.Now())
			select {
			case <-ctx.Done():
			case <-changed:
				pause(ctx, time.Until(earliest))
				again = true
			case <-time.After(pollEvery):
			}
		}
	}
	return nil
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// files are those that may describe VMs.
func (c *Controller) files(v *state.View) []state.Inode {
	var out []state.Inode
	for _, p := range v.VPools() {
		out = append(out, v.ConfigFiles(p.FSID)...)
	}
	return out
}

// round looks at the files once.
func (c *Controller) round(ctx context.Context, files []state.Inode, now time.Time) {
	v := c.cfg.Store.View()
	seen := make(map[uuid.UUID]sighting, len(files))
	reads := 0
	for _, n := range files {
		vol, err := v.Volume(n.Volume)
		if err != nil || vol.Owner != c.cfg.Node {
			continue
		}
		stamp, ok := c.stamp(n.Volume)
		if !ok || stamp.Size == 0 {
			continue
		}
		s := c.watch.seen[n.Volume]
		if s.stamp != stamp {
			s = sighting{stamp: stamp, since: now}
			if m, known := v.VMachineOf(n.FSID, n.Ino); known && c.current(v, m) {
				s.read = now
			}
		}
		if reads < readsAtOne && now.Sub(s.since) >= c.cfg.Quiet && c.due(v, n, s, now) {
			reads++
			if _, err := c.ingest(ctx, n); err != nil && ctx.Err() == nil {
				c.cfg.Log.Warn("a file that may describe a VM could not be read", "file", n.Name, "volume", n.Volume, "err", err)
			}
			s.read = now
		}
		seen[n.Volume] = s
	}
	c.watch.seen = seen
	c.forget(ctx, v, now)
}

// stamp is a file as it is now.
func (c *Controller) stamp(volume uuid.UUID) (state.VMachineSource, bool) {
	size, modified, ok := c.cfg.Files.Stat(volume)
	return state.VMachineSource{Volume: volume, Size: size, Modified: state.Time(modified.UnixNano())}, ok
}

// due says whether a quiet file is to be read.
func (c *Controller) due(v *state.View, n state.Inode, s sighting, now time.Time) bool {
	m, known := v.VMachineOf(n.FSID, n.Ino)
	switch {
	case s.read.IsZero():
		return true
	case !known:
		return false // it was read, and is no VM
	case c.current(v, m):
		return false
	}
	return now.Sub(s.read) >= againEvery
}

// current says whether what is known of a VM is what its files say, and all its disks are there.
func (c *Controller) current(v *state.View, m state.VMachine) bool {
	for _, s := range m.Sources {
		if now, ok := c.stamp(s.Volume); !ok || now != s {
			return false
		}
	}
	for _, d := range m.VMachineSpec.Disks {
		if _, err := v.Volume(d.Volume); err != nil {
			return false
		}
	}
	return len(m.Sources) > 0
}

// forget drops the VMs whose file is gone for good.
func (c *Controller) forget(ctx context.Context, v *state.View, now time.Time) {
	gone := make(map[uuid.UUID]time.Time)
	for _, m := range v.VMachines() {
		if m.Ino == 0 {
			continue
		}
		if _, err := v.Inode(m.FSID, m.Ino); err == nil {
			continue
		}
		since, known := c.watch.gone[m.ID]
		if !known {
			since = now
		}
		if now.Sub(since) < c.cfg.Grace {
			gone[m.ID] = since
			continue
		}
		_, err := c.cfg.Raft.Apply(ctx, &state.DeleteVMachine{ID: m.ID, Ino: m.Ino})
		if err != nil && !errors.Is(err, state.ErrNotFound) && !errors.Is(err, state.ErrConflict) && ctx.Err() == nil {
			c.cfg.Log.Warn("a VM whose file is gone could not be forgotten", "vmachine", m.Name, "err", err)
			gone[m.ID] = since
		}
	}
	c.watch.gone = gone
}

// ingest reads a file and records the VM that it describes; Nil where it describes none.
func (c *Controller) ingest(ctx context.Context, n state.Inode) (uuid.UUID, error) {
	v := c.cfg.Store.View()
	vol, err := v.Volume(n.Volume)
	if err != nil {
		return uuid.Nil, nil // removed meanwhile
	}
	file, err := v.Path(n.FSID, n.Ino)
	if err != nil {
		return uuid.Nil, nil
	}
	have, known := v.VMachineOf(n.FSID, n.Ino)
	spec, err := c.read(ctx, v, vol, file)
	if err != nil {
		if !known {
			if errors.Is(err, vmconfig.ErrNoVM) {
				return uuid.Nil, nil
			}
			return uuid.Nil, err
		}
		spec = have.VMachineSpec
		spec.Problem = shortText(err.Error())
		if stamp, ok := c.stamp(vol.ID); ok {
			spec.Sources = []state.VMachineSource{stamp}
		}
	}
	if known && same(have.VMachineSpec, spec) {
		return have.ID, nil
	}
	res, err := c.cfg.Raft.Apply(ctx, &state.SetVMachine{ID: uuid.New(), FSID: n.FSID, Ino: n.Ino, Spec: spec})
	if errors.Is(err, state.ErrNotFound) {
		return uuid.Nil, nil
	}
	if err != nil {
		return uuid.Nil, err
	}
	c.cfg.Log.Info("vmachine recorded", "vmachine", spec.Name, "file", file, "disks", len(spec.Disks), "new", res.Created)
	return res.Object, nil
}

func same(a, b state.VMachineSpec) bool {
	return a.Name == b.Name && a.Format == b.Format && a.UUID == b.UUID && a.Guest == b.Guest && a.VCPUs == b.VCPUs && a.Memory == b.Memory &&
		a.Problem == b.Problem && a.Layered == b.Layered && slices.Equal(a.Disks, b.Disks) && slices.Equal(a.Sources, b.Sources)
}

// shortText fits a reason into a row.
func shortText(s string) string {
	const most = 500
	if len(s) > most {
		s = s[:most] + "…"
	}
	return string([]rune(s))
}

// read makes of a describing file what the state keeps of it.
func (c *Controller) read(ctx context.Context, v *state.View, vol state.Volume, file string) (state.VMachineSpec, error) {
	format := state.FormatOf(path.Base(file))
	stamp, _ := c.stamp(vol.ID)
	b, err := c.cfg.Files.Read(ctx, vol, vmconfig.FileBytesMax)
	if err != nil {
		return state.VMachineSpec{}, err
	}
	conf, err := vmconfig.Parse(format, b)
	if err != nil {
		return state.VMachineSpec{}, err
	}
	spec := state.VMachineSpec{Name: conf.Name, Format: format, UUID: conf.UUID, Guest: conf.Guest, VCPUs: conf.VCPUs, Memory: conf.Memory,
		Sources: []state.VMachineSource{stamp}}
	if spec.Name == "" {
		spec.Name = nameFrom(file)
	}
	find := c.finder(v, vol.FSID, path.Dir(file), format)
	for _, d := range conf.Disks {
		at := find.disk(ctx, d)
		spec.Disks = append(spec.Disks, state.VMachineDisk{Label: d.Label, File: d.File, Volume: at})
	}
	for _, s := range find.sources {
		if len(spec.Sources) < state.VMachineSourcesMax && !slices.Contains(spec.Sources, s) {
			spec.Sources = append(spec.Sources, s)
		}
	}
	spec.Layered = find.layered
	if spec.Layered {
		spec.Problem = "runs on snapshots of its hypervisor, which vDisks alone do not hold"
	}
	return spec, nil
}

// nameFrom is what a VM without a name is called: as its file.
func nameFrom(file string) string {
	base := path.Base(file)
	return base[:len(base)-len(path.Ext(base))]
}
