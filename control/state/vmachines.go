package state

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/google/uuid"
)

// VMachine is a VM whose disks lie on vPools. It is found by the file in which its hypervisor describes it, or, where that
// is not on a vPool, by what the hypervisor itself says.
type VMachine struct {
	ID uuid.UUID `json:"id"`
	// FSID and Ino are the describing file's, Path that file's path when it was last read. Ino is 0 where only the
	// hypervisor tells of the VM; then PMachine and UUID identify it.
	FSID uint64 `json:"fsid,omitempty"`
	Ino  uint64 `json:"ino,omitempty"`
	Path string `json:"path,omitempty"`
	VMachineSpec
	// PMachine is the hypervisor that knows the VM, Host where it is there, Power what it does: running, halted, paused, or
	// "" where nobody knows.
	PMachine uuid.UUID `json:"pmachine,omitzero"`
	Host     string    `json:"host,omitempty"`
	Power    string    `json:"power,omitempty"`
	Template bool      `json:"template,omitempty"`
	Created  Time      `json:"created"`
	Modified Time      `json:"modified"`
	Rev      uint64    `json:"rev"`
}

// VMachineSpec is what a describing file or a hypervisor says.
type VMachineSpec struct {
	Name   string `json:"name"`
	Format string `json:"format"`
	// UUID is the hypervisor's.
	UUID   string         `json:"uuid,omitempty"`
	Guest  string         `json:"guest,omitempty"`
	VCPUs  int            `json:"vcpus,omitempty"`
	Memory int64          `json:"memory,omitempty"`
	Disks  []VMachineDisk `json:"disks,omitempty"`
	// Sources are the files that this was read from, as they were then.
	Sources []VMachineSource `json:"sources,omitempty"`
	// Problem says why the file could not be read, or what limits what can be done with the VM.
	Problem string `json:"problem,omitempty"`
	// Layered: the hypervisor keeps snapshots of its own in files beside the vDisks, which alone are not the VM's disks.
	Layered bool `json:"layered,omitempty"`
}

// VMachineDisk is a disk as the hypervisor names it, and the volume it is on; Nil where it is on no vPool.
type VMachineDisk struct {
	Label  string    `json:"label"`
	File   string    `json:"file"`
	Volume uuid.UUID `json:"volume,omitzero"`
}

// VMachineSource is a file that was read.
type VMachineSource struct {
	Volume   uuid.UUID `json:"volume"`
	Size     int64     `json:"size"`
	Modified Time      `json:"modified"`
}

// What a VM does, as far as its hypervisor says.
const (
	PowerRunning = "running"
	PowerHalted  = "halted"
	PowerPaused  = "paused"
)

// Formats of describing files.
const (
	FormatVMX     = "vmx"
	FormatLibvirt = "libvirt"
)

// Limits of vMachines.
const (
	VMachinesMax        = 20_000
	VMachineDisksMax    = 256
	VMachineSourcesMax  = 1 + 4*VMachineDisksMax
	vmachineNameMax     = 255
	vmachineFileMax     = 1024
	vmachineTextMax     = 1024
	vmachineConfigsMost = 100_000
)

const (
	tVMachine = "vmachine"
	byConfig  = "config"
	byGuest   = "guest"
)

func keyGuest(pmachine uuid.UUID, guest string) []byte {
	return append(slices.Clone(pmachine[:]), strings.ToLower(guest)...)
}

func vmachineTable(frame byte) object {
	o := rowObject[VMachine](frame, tVMachine, map[string]index{
		byID: always(func(m *VMachine) []byte { return m.ID[:] }),
		byConfig: func(obj any) ([]byte, bool) {
			m := obj.(*VMachine)
			return key2(m.FSID, m.Ino), m.Ino != 0
		},
		byGuest: func(obj any) ([]byte, bool) {
			m := obj.(*VMachine)
			return keyGuest(m.PMachine, m.UUID), m.Ino == 0
		},
	})
	o.commands = []func() Command{command[SetVMachine], command[SetVMachinePower], command[SetVMachineTemplate], command[DeleteVMachine]}
	o.check = func(v *View) (err error) {
		rows(v, tVMachine, byID, nil, func(m *VMachine) bool {
			if m.PMachine != uuid.Nil {
				if _, ok := first[PMachine](v, tPMachine, byID, m.PMachine[:]); !ok {
					err = fmt.Errorf("vmachine %s: no pmachine %s", m.ID, m.PMachine)
				}
			} else if m.Ino == 0 {
				err = fmt.Errorf("vmachine %s: neither a file nor a hypervisor has it", m.ID)
			}
			return err == nil
		})
		return err
	}
	o.gone = func(t *tx, at Ref) {
		for _, m := range t.VMachines() {
			switch {
			case at.Kind == ScopeVPool && m.Ino != 0 && m.FSID == FSIDOf(at.ID), at.Kind == tPMachine && m.PMachine == at.ID && m.Ino == 0:
				t.dropVMachine(&m)
			case at.Kind == tPMachine && m.PMachine == at.ID:
				m.PMachine, m.Host, m.Power, m.Rev = uuid.Nil, "", "", t.index
				t.put(tVMachine, &m)
			}
		}
	}
	return o
}

func (t *tx) dropVMachine(m *VMachine) {
	t.del(tVMachine, m)
	t.emit("vmachine_delete", tVMachine, m.ID.String(), vmachineEvent{Name: m.Name, Config: t.ConfigOf(*m)})
}

type vmachineEvent struct {
	Name   string   `json:"name"`
	Was    string   `json:"was,omitempty"`
	Config string   `json:"config,omitempty"`
	Disks  []string `json:"disks,omitempty"`
	Power  string   `json:"power,omitempty"`
	Host   string   `json:"host,omitempty"`
}

// ConfigOf is "vpool/path" of the file that describes a VM, "" where none on a vPool does.
func (v *View) ConfigOf(m VMachine) string {
	p, err := v.VPoolByFSID(m.FSID)
	if m.Ino == 0 || err != nil {
		return ""
	}
	if path, err := v.Path(m.FSID, m.Ino); err == nil {
		return p.Name + path
	}
	return p.Name + m.Path
}

// DiskNames are the vDisks of a VM, "vpool/name"; those that are on no vPool are left out.
func (v *View) DiskNames(m VMachine) []string {
	var out []string
	for _, d := range m.Disks {
		if name, ok := v.DiskNameOf(d.Volume); ok {
			out = append(out, name)
		}
	}
	return out
}

// DiskNameOf is the name of the vDisk on a volume, "vpool/name".
func (v *View) DiskNameOf(volume uuid.UUID) (string, bool) {
	vol, err := v.Volume(volume)
	if err != nil {
		return "", false
	}
	p, err := v.VPoolByFSID(vol.FSID)
	if err != nil {
		return "", false
	}
	path, err := v.Path(vol.FSID, vol.Ino)
	if err != nil {
		return "", false
	}
	name, ok := DiskName(path)
	return p.Name + "/" + name, ok
}

// SetVMachine records what a describing file, or, with Ino 0, a hypervisor says of a VM. A VM is the same one if it is
// described by the same file, by a file that has taken the place of that one, or, without a file, under the same UUID.
// ID is for one that is new.
type SetVMachine struct {
	ID       uuid.UUID    `json:"id"`
	FSID     uint64       `json:"fsid,omitempty"`
	Ino      uint64       `json:"ino,omitempty"`
	PMachine uuid.UUID    `json:"pmachine,omitzero"`
	Spec     VMachineSpec `json:"spec"`
}

func (*SetVMachine) kind() (string, int) { return "set_vmachine", 1 }

func checkLength(object, what, s string, most int) error {
	if len(s) > most || !utf8.ValidString(s) {
		return invalid(object, what+" is too long or not UTF-8")
	}
	return nil
}

func (c *SetVMachine) check() error {
	object := "vmachine " + c.ID.String()
	switch {
	case c.ID == uuid.Nil:
		return invalid(object, "no id")
	case (c.Ino == 0) == (c.PMachine == uuid.Nil), c.Ino == 0 && c.Spec.UUID == "":
		return invalid(object, "either a file or a hypervisor tells of it")
	case c.Spec.Format != FormatVMX && c.Spec.Format != FormatLibvirt:
		return invalid(object, "format "+quote(c.Spec.Format))
	case len(c.Spec.Disks) > VMachineDisksMax || len(c.Spec.Sources) > VMachineSourcesMax:
		return invalid(object, fmt.Sprintf("%d disks, more than %d", len(c.Spec.Disks), VMachineDisksMax))
	case c.Spec.Name == "" || c.Spec.VCPUs < 0 || c.Spec.Memory < 0:
		return invalid(object, "no name, or less than nothing")
	}
	texts := []string{c.Spec.Name, c.Spec.UUID, c.Spec.Guest}
	for _, d := range c.Spec.Disks {
		texts = append(texts, d.Label)
		if err := checkLength(object, "file of a disk", d.File, vmachineFileMax); err != nil {
			return err
		}
	}
	for _, s := range texts {
		if err := checkLength(object, "name", s, vmachineNameMax); err != nil {
			return err
		}
	}
	return checkLength(object, "problem", c.Spec.Problem, vmachineTextMax)
}

func (c *SetVMachine) apply(t *tx) (Result, error) {
	m, found, err := c.find(t)
	if err != nil {
		return Result{}, err
	}
	if !found {
		if n := count[VMachine](&t.View, tVMachine, byID, nil); n >= VMachinesMax {
			return Result{}, &Error{Err: ErrNoSpace, Object: "vmachine " + quote(c.Spec.Name), Detail: fmt.Sprintf("there are %d", n)}
		}
		m = VMachine{ID: c.ID, Created: t.at}
	}
	was := m
	m.VMachineSpec = c.Spec
	m.Disks, m.Sources = slices.Clone(c.Spec.Disks), slices.Clone(c.Spec.Sources)
	if m.Ino, m.FSID, m.Path = c.Ino, c.FSID, ""; c.Ino == 0 {
		m.PMachine = c.PMachine
	} else if m.Path, err = t.Path(c.FSID, c.Ino); err != nil {
		return Result{}, err
	}
	m.Modified, m.Rev = t.at, t.index
	t.put(tVMachine, &m)
	e := vmachineEvent{Name: m.Name, Config: t.ConfigOf(m), Disks: t.DiskNames(m)}
	switch {
	case !found:
		t.emit("vmachine_create", tVMachine, m.ID.String(), e)
	case was.Name != m.Name:
		e.Was = was.Name
		t.emit("vmachine_rename", tVMachine, m.ID.String(), e)
	case !slices.Equal(was.Disks, m.Disks):
		t.emit("vmachine_disks", tVMachine, m.ID.String(), e)
	}
	return Result{Object: m.ID, Created: !found}, nil
}

func (c *SetVMachine) find(t *tx) (m VMachine, found bool, err error) {
	if c.Ino == 0 {
		if _, err := t.PMachine(c.PMachine); err != nil {
			return m, false, err
		}
		have, ok := first[VMachine](&t.View, tVMachine, byGuest, keyGuest(c.PMachine, c.Spec.UUID))
		if ok {
			m = *have
		}
		return m, ok, nil
	}
	n, err := t.inode(c.FSID, c.Ino)
	if err != nil {
		return m, false, err
	}
	if n.Kind != File {
		return m, false, invalid("vmachine "+quote(c.Spec.Name), "is not described by a file")
	}
	if have, ok := first[VMachine](&t.View, tVMachine, byConfig, key2(c.FSID, c.Ino)); ok {
		return *have, true, nil
	}
	path, err := t.Path(c.FSID, c.Ino)
	if err != nil {
		return m, false, err
	}
	// Hypervisors write a new file and rename it over the old one.
	rows(&t.View, tVMachine, byConfig, keyFSID(c.FSID), func(r *VMachine) bool {
		if r.Path == path {
			if _, err := t.inode(r.FSID, r.Ino); err != nil {
				m, found = *r, true
			}
		}
		return !found
	})
	return m, found, nil
}

// SetVMachinePower records where a VM is and what it does. A hypervisor that does not know it any more says so with PMachine
// Nil, From being itself.
type SetVMachinePower struct {
	ID       uuid.UUID `json:"id"`
	From     uuid.UUID `json:"from"`
	PMachine uuid.UUID `json:"pmachine,omitzero"`
	Host     string    `json:"host,omitempty"`
	Power    string    `json:"power,omitempty"`
}

func (*SetVMachinePower) kind() (string, int) { return "set_vmachine_power", 1 }

func (c *SetVMachinePower) check() error {
	object := "vmachine " + c.ID.String()
	if !slices.Contains([]string{"", PowerRunning, PowerHalted, PowerPaused}, c.Power) {
		return invalid(object, "power "+quote(c.Power))
	}
	if c.PMachine != uuid.Nil && c.PMachine != c.From {
		return invalid(object, "one hypervisor speaks for another")
	}
	return checkLength(object, "host", c.Host, vmachineNameMax)
}

func (c *SetVMachinePower) apply(t *tx) (Result, error) {
	m, err := t.VMachine(c.ID)
	if err != nil {
		return Result{}, err
	}
	if _, err := t.PMachine(c.From); err != nil {
		return Result{}, err
	}
	if c.PMachine == uuid.Nil {
		if m.PMachine != c.From { // another one has it by now
			return Result{}, nil
		}
		if m.Ino == 0 {
			t.dropVMachine(&m)
			return Result{}, nil
		}
	}
	changed := m.Power != c.Power || m.Host != c.Host || m.PMachine != c.PMachine
	if !changed {
		return Result{Object: m.ID}, nil
	}
	m.PMachine, m.Host, m.Power, m.Modified, m.Rev = c.PMachine, c.Host, c.Power, t.at, t.index
	t.put(tVMachine, &m)
	t.emit("vmachine_power", tVMachine, m.ID.String(), vmachineEvent{Name: m.Name, Power: m.Power, Host: m.Host})
	return Result{Object: m.ID}, nil
}

// SetVMachineTemplate marks a VM as one that others are made from.
type SetVMachineTemplate struct {
	ID       uuid.UUID `json:"id"`
	Rev      uint64    `json:"rev,omitempty"`
	Template bool      `json:"template"`
}

func (*SetVMachineTemplate) kind() (string, int) { return "set_vmachine_template", 1 }

func (c *SetVMachineTemplate) check() error { return nil }

func (c *SetVMachineTemplate) apply(t *tx) (Result, error) {
	m, err := t.VMachine(c.ID)
	if err != nil {
		return Result{}, err
	}
	if err := fresh("vmachine "+quote(m.Name), c.Rev, m.Rev); err != nil {
		return Result{}, err
	}
	m.Template, m.Modified, m.Rev = c.Template, t.at, t.index
	t.put(tVMachine, &m)
	return Result{Object: m.ID}, nil
}

// DeleteVMachine forgets a VM; its files are not touched. Ino, unless 0, is the file that it is described by as far as the
// proposer knows.
type DeleteVMachine struct {
	ID  uuid.UUID `json:"id"`
	Ino uint64    `json:"ino,omitempty"`
}

func (*DeleteVMachine) kind() (string, int) { return "delete_vmachine", 1 }

func (c *DeleteVMachine) check() error { return nil }

func (c *DeleteVMachine) apply(t *tx) (Result, error) {
	m, err := t.VMachine(c.ID)
	if err != nil {
		return Result{}, err
	}
	if c.Ino != 0 && c.Ino != m.Ino {
		return Result{}, stale("vmachine "+quote(m.Name), m.Rev)
	}
	t.dropVMachine(&m)
	return Result{Object: m.ID}, nil
}

// VMachine returns one.
func (v *View) VMachine(id uuid.UUID) (VMachine, error) {
	m, ok := first[VMachine](v, tVMachine, byID, id[:])
	if !ok {
		return VMachine{}, missing("vmachine " + id.String())
	}
	return *m, nil
}

// VMachineOf returns the VM that a file describes.
func (v *View) VMachineOf(fsid, ino uint64) (VMachine, bool) {
	m, ok := first[VMachine](v, tVMachine, byConfig, key2(fsid, ino))
	if !ok {
		return VMachine{}, false
	}
	return *m, true
}

// VMachines returns all of them, by id.
func (v *View) VMachines() []VMachine { return all[VMachine](v, tVMachine, byID, nil) }

// ConfigFiles returns the files of a vPool that may describe VMs, by their names: at most vmachineConfigsMost.
func (v *View) ConfigFiles(fsid uint64) []Inode {
	var out []Inode
	rows(v, tInode, byID, keyFSID(fsid), func(n *Inode) bool {
		if n.Kind == File && FormatOf(n.Name) != "" {
			out = append(out, *n)
		}
		return len(out) < vmachineConfigsMost
	})
	return out
}

// FormatOf is the format of a describing file of this name, "" where it has none.
func FormatOf(name string) string {
	if len(name) <= len(".vmx") || name[0] == '.' {
		return ""
	}
	switch suffix := []byte(name[len(name)-len(".vmx"):]); {
	case bytes.EqualFold(suffix, []byte(".vmx")):
		return FormatVMX
	case bytes.EqualFold(suffix, []byte(".xml")):
		return FormatLibvirt
	}
	return ""
}
