package api

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/google/uuid"

	v1 "varve/control/api/customer"
	"varve/control/hypervisor"
	"varve/control/mount"
	"varve/control/pmachine"
	"varve/control/state"
	"varve/control/vdisk"
	"varve/control/vmachine"
)

func toVMachine(m vmachine.VMachine) v1.VMachine {
	size, used := m.Sizes()
	out := v1.VMachine{Name: m.Name, ID: m.ID, Config: m.Config, Format: m.Format, UUID: m.UUID, Guest: m.Guest, VCPUs: m.VCPUs, Memory: v1.Size(m.Memory),
		Disks: []v1.VMachineDisk{}, Size: v1.Size(size), Used: v1.Size(used), Clients: m.Clients(), PMachine: m.PMachineName, Host: m.Host,
		Power: orElse(m.Power, "unknown"), Template: m.Template, Layered: m.Layered, Problem: m.Problem, Created: utc(m.Created), Modified: utc(m.Modified), Rev: m.Rev}
	for _, d := range m.Disks {
		out.Disks = append(out.Disks, v1.VMachineDisk{Label: d.Label, File: d.File, VDisk: d.Name, Size: v1.Size(d.Info.Size), Used: v1.Size(d.Info.Used)})
	}
	return out
}

func toVMachineSnapshot(s vmachine.Snapshot) v1.VMachineSnapshot {
	return v1.VMachineSnapshot{Name: s.Name, ID: s.ID, Created: s.Created.UTC(), Consistent: s.Consistent, Automatic: s.Automatic, Sticky: s.Sticky,
		Disks: s.Disks, Of: s.Of, Complete: s.Complete(), Backed: s.Backed, Clones: s.Clones, Labels: s.Labels}
}

// seesAll says whether a caller may see every vPool that a VM touches.
func seesAll(ctx context.Context, m vmachine.VMachine) bool {
	return !slices.ContainsFunc(m.Pools(), func(p string) bool { return !callOf(ctx).who.Sees(p) }) && len(m.Pools()) > 0
}

// vmachine finds a VM that the caller may see.
func (s *Server) vmachine(ctx context.Context, given string) (vmachine.VMachine, error) {
	about(ctx, "vmachine "+clip(given))
	m, err := s.cfg.VMachines.Get(ctx, given)
	if err == nil && !seesAll(ctx, m) {
		err = unseen("vmachine " + clip(given))
	}
	if err != nil {
		return m, err
	}
	about(ctx, "vmachine "+m.Name)
	return m, nil
}

func (a customerAPI) ListVMachines(ctx context.Context, _ v1.ListVMachinesRequestObject) (v1.ListVMachinesResponseObject, error) {
	all := []v1.VMachine{}
	for _, m := range a.cfg.VMachines.List(ctx) {
		if seesAll(ctx, m) || len(m.Pools()) == 0 && callOf(ctx).who.Sees("") {
			all = append(all, toVMachine(m))
		}
	}
	page, err := listPage(ctx, all, func(m v1.VMachine) string { return m.ID.String() })
	return v1.ListVMachines200JSONResponse{Items: page.items, Next: page.next, Count: page.count}, err
}

func (a customerAPI) GetVMachine(ctx context.Context, r v1.GetVMachineRequestObject) (v1.GetVMachineResponseObject, error) {
	m, err := a.vmachine(ctx, r.Vmachine)
	return v1.GetVMachine200JSONResponse{Body: toVMachine(m), Headers: v1.GetVMachine200ResponseHeaders{ETag: etag(m.Rev)}}, err
}

func (a customerAPI) DeleteVMachine(ctx context.Context, r v1.DeleteVMachineRequestObject) (v1.DeleteVMachineResponseObject, error) {
	m, err := a.vmachine(ctx, r.Vmachine)
	if err != nil {
		return nil, err
	}
	if _, err := based(r.Params.IfMatch, "vmachine "+m.Name, m.Rev); err != nil {
		return nil, err
	}
	spec := vmachine.DeleteSpec{VMachine: m.ID, Force: r.Params.Force, Purge: r.Params.Purge, Keep: time.Duration(r.Params.Keep) * time.Second}
	_, files, err := a.cfg.VMachines.CanDelete(ctx, m.ID.String(), spec)
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		var changes, lost []string
		for _, f := range files {
			if spec.Purge {
				lost = append(lost, f)
			} else {
				changes = append(changes, f+" goes into the trash")
			}
		}
		for _, d := range m.Disks {
			switch {
			case d.Name == "":
				changes = append(changes, "disk "+d.Label+" stays: "+d.File+" is on no vPool")
			case spec.Purge:
				lost = append(lost, "vDisk "+d.Name+" with its snapshots")
			default:
				changes = append(changes, "vDisk "+d.Name+" goes into the trash")
			}
		}
		return nil, wouldDo("deletes VM "+m.Name, changes, lost, nil, m.Name)
	}
	if err := confirm(r.Params.Confirm, m.Name); err != nil {
		return nil, err
	}
	t, err := a.submitFor(ctx, m, vmachine.DeleteTask, spec)
	return v1.DeleteVMachine202JSONResponse{Body: t, Headers: v1.DeleteVMachine202ResponseHeaders{Location: location("tasks", t.ID.String())}}, err
}

// submitFor queues a task about a VM on the node that has its disks.
func (a customerAPI) submitFor(ctx context.Context, m vmachine.VMachine, typ string, args any) (v1.Task, error) {
	owner := uuid.Nil
	for _, d := range m.Disks {
		if vol, err := a.cfg.Store.View().Volume(d.Volume); err == nil && vol.Owner != uuid.Nil {
			owner = vol.Owner
			break
		}
	}
	return a.submitAt(ctx, owner, typ, "vmachine "+m.Name, args)
}

func (a customerAPI) ListVMachineSnapshots(ctx context.Context, r v1.ListVMachineSnapshotsRequestObject) (v1.ListVMachineSnapshotsResponseObject, error) {
	m, err := a.vmachine(ctx, r.Vmachine)
	if err != nil {
		return nil, err
	}
	snaps, err := a.cfg.VMachines.Snapshots(ctx, m.ID.String())
	if err != nil {
		return nil, err
	}
	all := []v1.VMachineSnapshot{}
	for _, s := range snaps {
		all = append(all, toVMachineSnapshot(s))
	}
	page, err := listPage(ctx, all, func(s v1.VMachineSnapshot) string { return s.ID.String() })
	return v1.ListVMachineSnapshots200JSONResponse{Items: page.items, Next: page.next, Count: page.count}, err
}

func (a customerAPI) CreateVMachineSnapshot(ctx context.Context, r v1.CreateVMachineSnapshotRequestObject) (v1.CreateVMachineSnapshotResponseObject, error) {
	m, err := a.vmachine(ctx, r.Vmachine)
	if err != nil {
		return nil, err
	}
	in := *r.Body
	if r.Params.DryRun {
		var disks []string
		for _, d := range m.Disks {
			disks = append(disks, d.Label+" "+orElse(d.Name, "is on no vPool"))
		}
		return nil, wouldDo("takes a snapshot of all disks of VM "+m.Name+" at one point in time", disks, nil, nil, "")
	}
	s, err := a.cfg.VMachines.Snapshot(ctx, m.ID.String(), vdisk.SnapshotSpec{Name: in.Name, Consistent: in.Consistent, Sticky: in.Sticky, Labels: in.Labels}, in.Partial)
	return v1.CreateVMachineSnapshot201JSONResponse{Body: toVMachineSnapshot(s), Headers: v1.CreateVMachineSnapshot201ResponseHeaders{
		Location: location("vmachines", m.ID.String(), "snapshots", s.ID.String())}}, err
}

func (a customerAPI) GetVMachineSnapshot(ctx context.Context, r v1.GetVMachineSnapshotRequestObject) (v1.GetVMachineSnapshotResponseObject, error) {
	m, err := a.vmachine(ctx, r.Vmachine)
	if err != nil {
		return nil, err
	}
	_, s, err := a.cfg.VMachines.GetSnapshot(ctx, m.ID.String(), r.Snapshot)
	return v1.GetVMachineSnapshot200JSONResponse(toVMachineSnapshot(s)), err
}

func (a customerAPI) DeleteVMachineSnapshot(ctx context.Context, r v1.DeleteVMachineSnapshotRequestObject) (v1.DeleteVMachineSnapshotResponseObject, error) {
	m, err := a.vmachine(ctx, r.Vmachine)
	if err != nil {
		return nil, err
	}
	_, s, err := a.cfg.VMachines.GetSnapshot(ctx, m.ID.String(), r.Snapshot)
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		return nil, wouldDo("deletes snapshot "+s.Name+" of VM "+m.Name, nil, []string{fmt.Sprintf("what its %d disks were at %s", s.Disks, s.Created.UTC().Format(time.RFC3339))},
			nil, s.Name)
	}
	if err := confirm(r.Params.Confirm, s.Name); err != nil {
		return nil, err
	}
	return v1.DeleteVMachineSnapshot204Response{}, a.cfg.VMachines.DeleteSnapshot(ctx, m.ID.String(), s.ID.String(), r.Params.Force)
}

func (a customerAPI) RollbackVMachine(ctx context.Context, r v1.RollbackVMachineRequestObject) (v1.RollbackVMachineResponseObject, error) {
	m, err := a.vmachine(ctx, r.Vmachine)
	if err != nil {
		return nil, err
	}
	_, s, err := a.cfg.VMachines.CanRollback(ctx, m.ID.String(), r.Body.Snapshot, r.Body.Force)
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		return nil, wouldDo(fmt.Sprintf("rolls %d disks of VM %s back to %s", s.Disks, m.Name, s.Name), []string{"what they are now stays as a snapshot of the VM"}, nil, nil, m.Name)
	}
	if err := confirm(r.Params.Confirm, m.Name); err != nil {
		return nil, err
	}
	t, err := a.submitFor(ctx, m, vmachine.RollbackTask, vmachine.RollbackSpec{VMachine: m.ID, Snapshot: s.ID, Force: r.Body.Force})
	return v1.RollbackVMachine202JSONResponse{Body: t, Headers: v1.RollbackVMachine202ResponseHeaders{Location: location("tasks", t.ID.String())}}, err
}

func (a customerAPI) CloneVMachine(ctx context.Context, r v1.CloneVMachineRequestObject) (v1.CloneVMachineResponseObject, error) {
	m, err := a.vmachine(ctx, r.Vmachine)
	if err != nil {
		return nil, err
	}
	spec := vmachine.CloneSpec{VMachine: m.ID, Names: r.Body.Names}
	if r.Body.Snapshot != "" {
		_, s, err := a.cfg.VMachines.GetSnapshot(ctx, m.ID.String(), r.Body.Snapshot)
		if err != nil {
			return nil, err
		}
		spec.Snapshot = s.ID
	}
	if _, err := a.cfg.VMachines.CanClone(ctx, spec); err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		return nil, wouldDo(fmt.Sprintf("makes %d VMs of %s", len(spec.Names), m.Name), spec.Names, nil, nil, "")
	}
	t, err := a.submitFor(ctx, m, vmachine.CloneTask, spec)
	return v1.CloneVMachine202JSONResponse{Body: t, Headers: v1.CloneVMachine202ResponseHeaders{Location: location("tasks", t.ID.String())}}, err
}

func (a customerAPI) SetVMachineTemplate(ctx context.Context, r v1.SetVMachineTemplateRequestObject) (v1.SetVMachineTemplateResponseObject, error) {
	m, err := a.vmachine(ctx, r.Vmachine)
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		what := "lets the disks of VM " + m.Name + " take writes again"
		if r.Body.Template {
			what = "makes VM " + m.Name + " a template, whose disks take no writes"
		}
		return nil, wouldDo(what, nil, nil, nil, "")
	}
	m, err = a.cfg.VMachines.SetTemplate(ctx, m.ID.String(), r.Body.Template, r.Body.Force)
	return v1.SetVMachineTemplate200JSONResponse{Body: toVMachine(m), Headers: v1.SetVMachineTemplate200ResponseHeaders{ETag: etag(m.Rev)}}, err
}

func (a customerAPI) toPMachine(p state.PMachine) v1.PMachine {
	v := a.cfg.Store.View()
	out := v1.PMachine{Name: p.Name, ID: p.ID, Kind: p.Kind, Address: p.Address, User: p.User, Thumbprint: p.Thumbprint, State: "ok", Error: p.Error, Version: p.Version,
		Hosts: []v1.PMachineHost{}, Mounts: []v1.PMachineMount{}, Created: utc(p.Created), Rev: p.Rev}
	switch {
	case p.Checked == 0:
		out.State = "unknown"
	case p.Error != "":
		out.State = "failing"
	}
	at := func(t state.Time) *time.Time {
		if t == 0 {
			return nil
		}
		u := utc(t)
		return &u
	}
	out.Since, out.Checked = at(p.Since), at(p.Checked)
	names := make(map[string]string)
	for _, h := range p.Hosts {
		names[h.Ref] = h.Name
		mounted := 0
		for _, m := range p.Mounts {
			if m.Host == h.Ref && m.Usable {
				mounted++
			}
		}
		out.Hosts = append(out.Hosts, v1.PMachineHost{Name: h.Name, Address: h.Address, State: h.State, Version: h.Version, Mounted: mounted})
	}
	for _, m := range p.Mounts {
		pool, err := v.VPoolByID(m.Pool)
		if err != nil {
			continue
		}
		out.Mounts = append(out.Mounts, v1.PMachineMount{Host: orElse(names[m.Host], m.Host), VPool: pool.Name, Datastore: m.Name, Server: m.Server, Export: m.Export,
			Path: m.Path, Usable: m.Usable, ReadOnly: m.ReadOnly, Warning: mountWarning(p.Mounts, m)})
	}
	for _, m := range v.VMachines() {
		if m.PMachine == p.ID {
			out.VMachines++
		}
	}
	return out
}

// mountWarning says what is not right with a mount.
func mountWarning(all []state.PMachineMount, m state.PMachineMount) string {
	switch {
	case !m.Usable:
		return "the host cannot use it now"
	case m.ReadOnly:
		return "it is mounted read-only"
	}
	for _, o := range all {
		if o.Pool == m.Pool && (o.Server != m.Server || o.Export != m.Export) {
			return fmt.Sprintf("another host mounts it as %s:%s: to the hypervisor these are two datastores", o.Server, o.Export)
		}
	}
	return ""
}

func (a customerAPI) ListPMachines(ctx context.Context, _ v1.ListPMachinesRequestObject) (v1.ListPMachinesResponseObject, error) {
	all := []v1.PMachine{}
	for _, p := range a.cfg.Store.View().PMachines() {
		all = append(all, a.toPMachine(p))
	}
	page, err := listPage(ctx, all, func(p v1.PMachine) string { return p.ID.String() })
	return v1.ListPMachines200JSONResponse{Items: page.items, Next: page.next, Count: page.count}, err
}

func (a customerAPI) GetPMachine(ctx context.Context, r v1.GetPMachineRequestObject) (v1.GetPMachineResponseObject, error) {
	about(ctx, "pmachine "+clip(r.Pmachine))
	p, err := a.cfg.Store.View().PMachineByName(r.Pmachine)
	return v1.GetPMachine200JSONResponse{Body: a.toPMachine(p), Headers: v1.GetPMachine200ResponseHeaders{ETag: etag(p.Rev)}}, err
}

func (a customerAPI) CreatePMachine(ctx context.Context, r v1.CreatePMachineRequestObject) (v1.CreatePMachineResponseObject, error) {
	in := *r.Body
	about(ctx, "pmachine "+in.Name)
	spec := pmachine.Spec{Name: in.Name, PMachineSpec: state.PMachineSpec{Kind: in.Kind, Address: in.Address, User: in.User, Thumbprint: in.Thumbprint, CA: in.CA},
		Credentials: hypervisor.Credentials{Password: in.Password, Certificate: in.Certificate, Key: in.Key, Insecure: in.Insecure}}
	if r.Params.DryRun {
		if err := a.cfg.PMachines.Check(spec); err != nil {
			return nil, err
		}
		return nil, wouldDo("adds hypervisor "+in.Name, []string{"asks " + in.Address + " about once a minute for its hosts, mounts and VMs"}, nil, nil, "")
	}
	p, err := a.cfg.PMachines.Create(ctx, spec)
	return v1.CreatePMachine201JSONResponse{Body: a.toPMachine(p), Headers: v1.CreatePMachine201ResponseHeaders{ETag: etag(p.Rev),
		Location: location("pmachines", p.Name)}}, err
}

func (a customerAPI) PatchPMachine(ctx context.Context, r v1.PatchPMachineRequestObject) (v1.PatchPMachineResponseObject, error) {
	about(ctx, "pmachine "+clip(r.Pmachine))
	p, err := a.cfg.Store.View().PMachineByName(r.Pmachine)
	if err != nil {
		return nil, err
	}
	rev, err := based(r.Params.IfMatch, "pmachine "+p.Name, p.Rev)
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		return nil, wouldDo("changes how hypervisor "+p.Name+" is reached", nil, nil, nil, "")
	}
	in := *r.Body
	p, err = a.cfg.PMachines.Change(ctx, p.ID.String(), rev, pmachine.Change{Address: in.Address, User: in.User, Password: in.Password, Thumbprint: in.Thumbprint,
		CA: in.CA, Certificate: in.Certificate, Key: in.Key, Insecure: in.Insecure})
	return v1.PatchPMachine200JSONResponse{Body: a.toPMachine(p), Headers: v1.PatchPMachine200ResponseHeaders{ETag: etag(p.Rev)}}, err
}

func (a customerAPI) DeletePMachine(ctx context.Context, r v1.DeletePMachineRequestObject) (v1.DeletePMachineResponseObject, error) {
	about(ctx, "pmachine "+clip(r.Pmachine))
	p, err := a.cfg.Store.View().PMachineByName(r.Pmachine)
	if err != nil {
		return nil, err
	}
	rev, err := based(r.Params.IfMatch, "pmachine "+p.Name, p.Rev)
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		return nil, wouldDo("forgets hypervisor "+p.Name, []string{"its hosts, mounts and VMs are left as they are"}, []string{"its credentials here"}, nil, p.Name)
	}
	if err := confirm(r.Params.Confirm, p.Name); err != nil {
		return nil, err
	}
	return v1.DeletePMachine204Response{}, a.cfg.PMachines.Delete(ctx, p.ID.String(), rev)
}

func (a customerAPI) TestPMachine(ctx context.Context, r v1.TestPMachineRequestObject) (v1.TestPMachineResponseObject, error) {
	about(ctx, "pmachine "+clip(r.Pmachine))
	p, err := a.cfg.PMachines.Ask(ctx, r.Pmachine)
	return v1.TestPMachine200JSONResponse(a.toPMachine(p)), err
}

func (a customerAPI) MountOnPMachine(ctx context.Context, r v1.MountOnPMachineRequestObject) (v1.MountOnPMachineResponseObject, error) {
	spec := pmachine.MountSpec{VPool: r.Body.VPool, Hosts: r.Body.Hosts, Address: r.Body.Address, Datastore: r.Body.Datastore}
	about(ctx, "vpool "+clip(spec.VPool)+" on pmachine "+clip(r.Pmachine))
	if spec.Address != "" {
		if err := mount.CheckAddress(spec.Address); err != nil {
			return nil, err
		}
	}
	p, hosts, m, err := a.cfg.PMachines.MountPlan(r.Pmachine, spec)
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		var lines []string
		for _, h := range hosts {
			lines = append(lines, fmt.Sprintf("host %s mounts %s:%s as %s", h.Name, m.Server, m.Export, m.Name))
		}
		return nil, wouldDo("mounts vPool "+spec.VPool+" on hypervisor "+p.Name, lines, nil, nil, "")
	}
	done, err := a.cfg.PMachines.Mount(ctx, p.ID.String(), spec)
	if err != nil {
		return nil, err
	}
	out := v1.MountOnPMachine201JSONResponse{Hosts: []v1.PMachineMountDone{}}
	for _, d := range done {
		one := v1.PMachineMountDone{Host: d.Host, Done: d.Done}
		if d.Err != nil {
			one.Error = clip(d.Err.Error())
		}
		out.Hosts = append(out.Hosts, one)
	}
	return out, nil
}

func (a customerAPI) UnmountFromPMachine(ctx context.Context, r v1.UnmountFromPMachineRequestObject) (v1.UnmountFromPMachineResponseObject, error) {
	about(ctx, "vpool "+clip(r.Vpool)+" on pmachine "+clip(r.Pmachine))
	v := a.cfg.Store.View()
	p, err := v.PMachineByName(r.Pmachine)
	if err != nil {
		return nil, err
	}
	pool, err := v.VPool(r.Vpool)
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		var hosts []string
		for _, m := range p.Mounts {
			if m.Pool == pool.ID {
				hosts = append(hosts, "host "+m.Host+" unmounts "+m.Name)
			}
		}
		return nil, wouldDo("unmounts vPool "+pool.Name+" from hypervisor "+p.Name, hosts, nil, []string{"VMs there whose disks lie on it: the hypervisor refuses while they run"}, pool.Name)
	}
	if err := confirm(r.Params.Confirm, pool.Name); err != nil {
		return nil, err
	}
	return v1.UnmountFromPMachine204Response{}, a.cfg.PMachines.Unmount(ctx, p.ID.String(), pool.Name)
}

// Mounts is what an appliance knows of how it is mounted.
type Mounts interface {
	// Export says where hypervisors find a vPool.
	Export(p state.VPool) mount.Export
	// Test mounts a vPool as a hypervisor does, writes, and reads back. With a host it then waits for that one to do so.
	Test(ctx context.Context, p state.VPool, host string, wait time.Duration) ([]mount.Check, error)
}

func (a customerAPI) GetMountHelp(ctx context.Context, r v1.GetMountHelpRequestObject) (v1.GetMountHelpResponseObject, error) {
	name, err := a.vpoolName(ctx, r.Vpool)
	if err != nil {
		return nil, err
	}
	p, err := a.cfg.Store.View().VPool(name)
	if err != nil {
		return nil, err
	}
	e := a.cfg.Mounts.Export(p)
	e.Address = orElse(r.Params.Address, e.Address)
	h, err := mount.Commands(r.Params.For, e)
	if err != nil {
		return nil, err
	}
	out := v1.GetMountHelp200JSONResponse{VPool: name, For: r.Params.For, Address: e.Address, Port: e.Port, Export: "/" + name, Steps: []v1.MountStep{}, Notes: h.Notes,
		Problems: h.Problems, Script: h.Script()}
	for _, s := range h.Steps {
		out.Steps = append(out.Steps, v1.MountStep{Title: s.Title, Where: s.Where, Command: s.Command})
	}
	return out, nil
}

const mountWaitDefault = 60 * time.Second

func (a customerAPI) TestMount(ctx context.Context, r v1.TestMountRequestObject) (v1.TestMountResponseObject, error) {
	name, err := a.vpoolName(ctx, r.Vpool)
	if err != nil {
		return nil, err
	}
	p, err := a.cfg.Store.View().VPool(name)
	if err != nil {
		return nil, err
	}
	wait := time.Duration(r.Body.Seconds) * time.Second
	if wait == 0 {
		wait = mountWaitDefault
	}
	if wait < 0 || wait > time.Hour {
		return nil, refuse(http.StatusBadRequest, "invalid", "seconds is out of range", "use 1 to 3600")
	}
	checks, err := a.cfg.Mounts.Test(ctx, p, r.Body.Host, wait)
	if err != nil {
		return nil, err
	}
	out := v1.TestMount200JSONResponse{OK: true, Checks: []v1.MountCheck{}}
	for _, c := range checks {
		out.OK = out.OK && c.OK
		out.Checks = append(out.Checks, v1.MountCheck{Name: c.Name, OK: c.OK, Detail: c.Detail, MS: float32(c.Took.Seconds() * 1000), Remedy: c.Remedy})
	}
	return out, nil
}
