package state

import (
	"fmt"
	"slices"
	"strings"

	"github.com/google/uuid"
)

// PMachine is the way to a hypervisor: a vCenter, an ESXi host, a libvirt daemon. Its credentials are the secret
// PMachineSecret(ID).
type PMachine struct {
	ID   uuid.UUID `json:"id"`
	Name string    `json:"name"`
	PMachineSpec
	// Hosts and Mounts are those that it last told of.
	Hosts  []PMachineHost  `json:"hosts,omitempty"`
	Mounts []PMachineMount `json:"mounts,omitempty"`
	// Version is the hypervisor's. Error is why it could not be asked the last time, Since when that, or its absence, began.
	Version  string `json:"version,omitempty"`
	Error    string `json:"error,omitempty"`
	Since    Time   `json:"since,omitempty"`
	Checked  Time   `json:"checked,omitempty"`
	Created  Time   `json:"created"`
	Modified Time   `json:"modified"`
	Rev      uint64 `json:"rev"`
}

// PMachineSpec is what an operator sets.
type PMachineSpec struct {
	Kind string `json:"kind"`
	// Address is "https://host[:port]/sdk" of vSphere, or a libvirt URI.
	Address string `json:"address"`
	User    string `json:"user,omitempty"`
	// Thumbprint is the SHA-256 of the certificate that is trusted, in hex; CA, in PEM, who signs it. Neither: the system's.
	Thumbprint string `json:"thumbprint,omitempty"`
	CA         string `json:"ca,omitempty"`
}

// PMachineHost is a host of a hypervisor.
type PMachineHost struct {
	Name string `json:"name"`
	// Ref is the hypervisor's own name of it.
	Ref     string `json:"ref"`
	Address string `json:"address,omitempty"`
	State   string `json:"state"`
	Version string `json:"version,omitempty"`
}

// PMachineMount is a datastore of a host that lies on a vPool.
type PMachineMount struct {
	Host string    `json:"host"` // Ref of a PMachineHost
	Pool uuid.UUID `json:"pool"`
	// Name is the datastore's, Server and Export what is mounted, Path where the host has it.
	Name   string `json:"name"`
	Server string `json:"server"`
	Export string `json:"export"`
	Path   string `json:"path,omitempty"`
	// Usable says that the hypervisor can use it now; ReadOnly that it mounted it so.
	Usable   bool `json:"usable"`
	ReadOnly bool `json:"read_only,omitempty"`
}

// Kinds of pMachines.
const (
	KindVSphere = "vsphere"
	KindLibvirt = "libvirt"
)

// Limits of pMachines.
const (
	PMachinesMax      = 256
	PMachineHostsMax  = 1024
	PMachineMountsMax = 4096
	pmachineTextMax   = 512
	pmachineCAMax     = 16 << 10
)

const tPMachine = "pmachine"

// PMachineSecret names the secret with the credentials of a pMachine. It goes when the pMachine does.
func PMachineSecret(id uuid.UUID) string { return pmachineSecrets(id) + "credentials" }

func pmachineSecrets(id uuid.UUID) string { return "pmachine/" + id.String() + "/" }

func pmachineTable(frame byte) object {
	o := rowObject[PMachine](frame, tPMachine, map[string]index{
		byID:   always(func(p *PMachine) []byte { return p.ID[:] }),
		byName: always(func(p *PMachine) []byte { return []byte(p.Name) }),
	})
	o.commands = []func() Command{command[SetPMachine], command[ReportPMachine], command[DeletePMachine]}
	o.gone = func(t *tx, at Ref) {
		if at.Kind != ScopeVPool {
			return
		}
		for _, p := range t.PMachines() {
			kept := slices.DeleteFunc(slices.Clone(p.Mounts), func(m PMachineMount) bool { return m.Pool == at.ID })
			if len(kept) != len(p.Mounts) {
				p.Mounts, p.Rev = kept, t.index
				t.put(tPMachine, &p)
			}
		}
	}
	return o
}

// SetPMachine makes a pMachine, or changes it. Without a Secret the one that there is stays.
type SetPMachine struct {
	ID     uuid.UUID    `json:"id"`
	Rev    uint64       `json:"rev,omitempty"`
	Create bool         `json:"create,omitempty"`
	Name   string       `json:"name"`
	Spec   PMachineSpec `json:"spec"`
	Secret *SetSecret   `json:"secret,omitempty"`
}

func (*SetPMachine) kind() (string, int) { return "set_pmachine", 1 }

func (c *SetPMachine) check() error {
	object := "pmachine " + quote(c.Name)
	if c.ID == uuid.Nil {
		return invalid(object, "no id")
	}
	if err := checkLabel("pmachine", c.Name); err != nil {
		return err
	}
	if c.Spec.Kind != KindVSphere && c.Spec.Kind != KindLibvirt {
		return &Error{Err: ErrInvalid, Object: object, Field: "kind", Detail: "kind " + quote(c.Spec.Kind), Remedy: "use vsphere or libvirt"}
	}
	if c.Spec.Address == "" {
		return invalid(object, "no address")
	}
	for _, s := range []string{c.Spec.Address, c.Spec.User, c.Spec.Thumbprint} {
		if err := checkLength(object, "address, user or thumbprint", s, pmachineTextMax); err != nil {
			return err
		}
	}
	if c.Secret != nil {
		if c.Secret.Name != PMachineSecret(c.ID) {
			return invalid(object, "its credentials are another's")
		}
		if err := c.Secret.check(); err != nil {
			return err
		}
	}
	return checkLength(object, "certificate authority", c.Spec.CA, pmachineCAMax)
}

func (c *SetPMachine) apply(t *tx) (Result, error) {
	object := "pmachine " + quote(c.Name)
	p := PMachine{ID: c.ID, Created: t.at}
	have, found := first[PMachine](&t.View, tPMachine, byID, c.ID[:])
	switch {
	case found && c.Create:
		return Result{}, &Error{Err: ErrExist, Object: object}
	case found:
		p = *have
		if err := fresh(object, c.Rev, p.Rev); err != nil {
			return Result{}, err
		}
	case !c.Create:
		return Result{}, missing(object)
	case count[PMachine](&t.View, tPMachine, byID, nil) >= PMachinesMax:
		return Result{}, &Error{Err: ErrNoSpace, Object: object, Detail: fmt.Sprintf("%d pMachines", PMachinesMax)}
	}
	if other, ok := first[PMachine](&t.View, tPMachine, byName, []byte(c.Name)); ok && other.ID != c.ID {
		return Result{}, &Error{Err: ErrExist, Object: object}
	}
	if c.Secret != nil {
		if _, err := c.Secret.apply(t); err != nil {
			return Result{}, err
		}
	}
	p.Name, p.PMachineSpec, p.Modified, p.Rev = c.Name, c.Spec, t.at, t.index
	t.put(tPMachine, &p)
	if !found {
		t.emit("pmachine_create", tPMachine, p.ID.String(), map[string]string{"name": p.Name, "kind": p.Kind})
	}
	return Result{Object: p.ID, Created: !found}, nil
}

// ReportPMachine records what a pMachine told when it was asked, or why it could not be.
type ReportPMachine struct {
	ID      uuid.UUID       `json:"id"`
	Hosts   []PMachineHost  `json:"hosts,omitempty"`
	Mounts  []PMachineMount `json:"mounts,omitempty"`
	Version string          `json:"version,omitempty"`
	Error   string          `json:"error,omitempty"`
}

func (*ReportPMachine) kind() (string, int) { return "report_pmachine", 1 }

func (c *ReportPMachine) check() error {
	object := "pmachine " + c.ID.String()
	if len(c.Hosts) > PMachineHostsMax || len(c.Mounts) > PMachineMountsMax {
		return invalid(object, "more hosts or mounts than are kept")
	}
	texts := []string{c.Version, c.Error}
	for _, h := range c.Hosts {
		texts = append(texts, h.Name, h.Ref, h.Address, h.State, h.Version)
	}
	for _, m := range c.Mounts {
		texts = append(texts, m.Host, m.Name, m.Server, m.Export, m.Path)
	}
	for _, s := range texts {
		if err := checkLength(object, "text", s, pmachineTextMax); err != nil {
			return err
		}
	}
	return nil
}

func (c *ReportPMachine) apply(t *tx) (Result, error) {
	p, err := t.PMachine(c.ID)
	if err != nil {
		return Result{}, err
	}
	before, first := p, p.Checked == 0
	p.Checked = t.at
	if c.Error != "" {
		p.Error = c.Error // what was known of its hosts stays
	} else {
		p.Error, p.Version, p.Hosts = "", c.Version, slices.Clone(c.Hosts)
		p.Mounts = slices.DeleteFunc(slices.Clone(c.Mounts), func(m PMachineMount) bool { _, err := t.VPoolByID(m.Pool); return err != nil })
	}
	if first || (before.Error == "") != (p.Error == "") {
		p.Since = t.at
		if !first || p.Error != "" {
			typ := "pmachine_works_again"
			if p.Error != "" {
				typ = "pmachine_failing"
			}
			t.emit(typ, tPMachine, p.ID.String(), map[string]string{"name": p.Name, "error": p.Error})
		}
	}
	if before.Error == p.Error && slices.Equal(before.Hosts, p.Hosts) && slices.Equal(before.Mounts, p.Mounts) && before.Version == p.Version {
		t.put(tPMachine, &p) // seen again: nothing that an editor must know of
		return Result{Object: p.ID}, nil
	}
	p.Rev = t.index
	t.put(tPMachine, &p)
	for _, m := range p.Mounts {
		if !slices.ContainsFunc(before.Mounts, func(o PMachineMount) bool { return o.Host == m.Host && o.Pool == m.Pool }) {
			t.emit("pmachine_mount", tPMachine, p.ID.String(), m)
		}
	}
	for _, m := range before.Mounts {
		if !slices.ContainsFunc(p.Mounts, func(o PMachineMount) bool { return o.Host == m.Host && o.Pool == m.Pool }) {
			t.emit("pmachine_unmount", tPMachine, p.ID.String(), m)
		}
	}
	return Result{Object: p.ID}, nil
}

// DeletePMachine forgets a pMachine, its credentials and the VMs that nobody else tells of.
type DeletePMachine struct {
	ID  uuid.UUID `json:"id"`
	Rev uint64    `json:"rev,omitempty"`
}

func (*DeletePMachine) kind() (string, int) { return "delete_pmachine", 1 }

func (c *DeletePMachine) check() error { return nil }

func (c *DeletePMachine) apply(t *tx) (Result, error) {
	p, err := t.PMachine(c.ID)
	if err != nil {
		return Result{}, err
	}
	if err := fresh("pmachine "+quote(p.Name), c.Rev, p.Rev); err != nil {
		return Result{}, err
	}
	t.del(tPMachine, &p)
	for _, s := range all[SealedSecret](&t.View, tSecret, byID, []byte(pmachineSecrets(p.ID))) {
		t.del(tSecret, &s)
	}
	t.gone(Ref{Kind: tPMachine, ID: p.ID})
	t.emit("pmachine_delete", tPMachine, p.ID.String(), map[string]string{"name": p.Name})
	return Result{Object: p.ID}, nil
}

// PMachine returns one.
func (v *View) PMachine(id uuid.UUID) (PMachine, error) {
	p, ok := first[PMachine](v, tPMachine, byID, id[:])
	if !ok {
		return PMachine{}, missing("pmachine " + id.String())
	}
	return *p, nil
}

// PMachineByName returns the one of this name, or with this id.
func (v *View) PMachineByName(name string) (PMachine, error) {
	if p, ok := first[PMachine](v, tPMachine, byName, []byte(name)); ok {
		return *p, nil
	}
	if id, err := uuid.Parse(name); err == nil {
		return v.PMachine(id)
	}
	if len(name) > NameBytesMax {
		name = strings.ToValidUTF8(name[:80], "") + "…"
	}
	return PMachine{}, missing("pmachine " + quote(name))
}

// PMachines returns all of them, by name.
func (v *View) PMachines() []PMachine { return all[PMachine](v, tPMachine, byName, nil) }
