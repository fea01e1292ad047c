package vmachine

import (
	"context"
	"path"
	"slices"
	"strings"

	"github.com/google/uuid"

	"varve/control/state"
	"varve/control/vmachine/vmconfig"
)

const layersMax = 64 // of a chain of descriptors

// finder finds the vDisks that a description names.
type finder struct {
	c      *Controller
	v      *state.View
	fsid   uint64
	dir    string
	format string
	mounts []mount

	taken   []uuid.UUID
	sources []state.VMachineSource
	layered bool
}

// mount is where some host has a vPool.
type mount struct {
	path, name string
	fsid       uint64
}

func (c *Controller) finder(v *state.View, fsid uint64, dir, format string) *finder {
	return &finder{c: c, v: v, fsid: fsid, dir: dir, format: format, mounts: mountsOf(v)}
}

// mountsOf lists where pMachines say that they have vPools. A path or name that means two vPools means none.
func mountsOf(v *state.View) []mount {
	var out []mount
	for _, p := range v.PMachines() {
		for _, m := range p.Mounts {
			pool, err := v.VPoolByID(m.Pool)
			if err != nil {
				continue
			}
			out = append(out, mount{strings.TrimSuffix(m.Path, "/"), m.Name, pool.FSID})
		}
	}
	clash := func(i int, same func(a, b mount) bool) bool {
		return slices.ContainsFunc(out, func(o mount) bool { return o.fsid != out[i].fsid && same(o, out[i]) })
	}
	kept := make([]mount, 0, len(out))
	for i, m := range out {
		if m.path != "" && clash(i, func(a, b mount) bool { return a.path == b.path }) {
			m.path = ""
		}
		if m.name != "" && clash(i, func(a, b mount) bool { return a.name == b.name }) {
			m.name = ""
		}
		kept = append(kept, m)
	}
	return kept
}

// place is a file on a vPool.
type place struct {
	fsid uint64
	path string
}

// disk gives the volume of a disk, Nil where it is on no vPool. A vDisk is a VM's once.
func (f *finder) disk(ctx context.Context, d vmconfig.Disk) uuid.UUID {
	for _, p := range f.places(d) {
		if id := f.at(ctx, p, 0); id != uuid.Nil && !slices.Contains(f.taken, id) {
			f.taken = append(f.taken, id)
			return id
		}
	}
	return uuid.Nil
}

// places are where a disk may be, the likeliest first.
func (f *finder) places(d vmconfig.Disk) []place {
	switch d.Kind {
	case vmconfig.OnNBD:
		pool, name, ok := state.SplitName(d.File)
		if p, err := f.v.VPool(pool); ok && err == nil {
			return []place{{p.FSID, "/" + name}}
		}
	case vmconfig.InPool:
		store, volume, _ := strings.Cut(d.File, "/")
		for _, m := range f.mounts {
			if m.name == store {
				return []place{{m.fsid, path.Clean("/" + volume)}}
			}
		}
	case vmconfig.InFile:
		return f.filePlaces(d.File)
	}
	return nil
}

func (f *finder) filePlaces(file string) []place {
	if !strings.HasPrefix(file, "/") {
		return []place{{f.fsid, path.Join("/", f.dir, path.Clean("/"+file))}}
	}
	file = path.Clean(file)
	var out []place
	for _, m := range f.mounts {
		if rest, ok := strings.CutPrefix(file, m.path+"/"); ok && m.path != "" {
			out = append(out, place{m.fsid, "/" + rest})
		}
	}
	rest := file
	for {
		element, after, ok := strings.Cut(strings.TrimPrefix(rest, "/"), "/")
		if !ok {
			break
		}
		if p, err := f.v.VPool(element); err == nil && p.FSID == f.fsid {
			out = append(out, place{p.FSID, "/" + after})
		}
		rest = "/" + after
	}
	if f.format == state.FormatLibvirt && f.dir != "/" {
		if i := strings.LastIndex(file, f.dir+"/"); i >= 0 {
			out = append(out, place{f.fsid, file[i:]})
		}
	}
	return out
}

// at gives the volume of the vDisk at a place, following descriptors.
func (f *finder) at(ctx context.Context, p place, depth int) uuid.UUID {
	if disk, err := f.v.ResolveDisk(p.fsid, p.path); err == nil && (state.IsDisk(p.path) || !strings.HasSuffix(p.path, ".vmdk")) {
		return disk.Volume
	}
	stem, isDescriptor := strings.CutSuffix(p.path, ".vmdk")
	if !isDescriptor || depth == layersMax {
		return uuid.Nil
	}
	flat := place{p.fsid, stem + "-flat.vmdk"}
	d, ok := f.descriptor(ctx, p)
	if !ok { // it is not there, or cannot be read: by convention
		return f.flat(flat)
	}
	if d.Parent != "" {
		f.layered = true
		for _, up := range f.beside(p, d.Parent) {
			if id := f.at(ctx, up, depth+1); id != uuid.Nil {
				return id
			}
		}
		return uuid.Nil
	}
	for _, e := range d.Extents {
		for _, up := range f.beside(p, e) {
			if id := f.flat(up); id != uuid.Nil {
				f.layered = f.layered || len(d.Extents) > 1 || !d.Flat
				return id
			}
		}
	}
	return uuid.Nil
}

// beside is what a descriptor at p means by a name.
func (f *finder) beside(p place, name string) []place {
	in := *f
	in.fsid, in.dir = p.fsid, path.Dir(p.path)
	return in.filePlaces(name)
}

func (f *finder) flat(p place) uuid.UUID {
	n, err := f.v.Resolve(p.fsid, p.path)
	if err != nil || n.Kind != state.File || !state.IsDisk(n.Name) {
		return uuid.Nil
	}
	return n.Volume
}

// descriptor reads a .vmdk that is text, and notes it as a source.
func (f *finder) descriptor(ctx context.Context, p place) (vmconfig.Descriptor, bool) {
	n, err := f.v.Resolve(p.fsid, p.path)
	if err != nil || n.Kind != state.File {
		return vmconfig.Descriptor{}, false
	}
	vol, err := f.v.Volume(n.Volume)
	if err != nil {
		return vmconfig.Descriptor{}, false
	}
	stamp, ok := f.c.stamp(vol.ID)
	if !ok || stamp.Size == 0 || stamp.Size > vmconfig.DescriptorBytesMax || len(f.sources) >= state.VMachineSourcesMax {
		return vmconfig.Descriptor{}, false
	}
	f.sources = append(f.sources, stamp)
	b, err := f.c.cfg.Files.Read(ctx, vol, vmconfig.DescriptorBytesMax)
	if err != nil {
		return vmconfig.Descriptor{}, false
	}
	d, err := vmconfig.ParseDescriptor(b)
	return d, err == nil
}

// KnownDisks finds the volumes of a VM's disks as a hypervisor tells of them, without a file of the VM's.
func (c *Controller) KnownDisks(ctx context.Context, format string, disks []vmconfig.Disk) (found []state.VMachineDisk, layered bool) {
	f := c.finder(c.cfg.Store.View(), 0, "/", format)
	for _, d := range disks {
		if d.Kind == vmconfig.InFile && !strings.HasPrefix(d.File, "/") {
			found = append(found, state.VMachineDisk{Label: d.Label, File: d.File})
			continue
		}
		found = append(found, state.VMachineDisk{Label: d.Label, File: d.File, Volume: f.disk(ctx, d)})
	}
	return found, f.layered
}
