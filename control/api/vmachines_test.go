package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	v1 "varve/control/api/customer"
	"varve/control/hypervisor"
	"varve/control/mount"
	"varve/control/pmachine"
	"varve/control/secrets"
	"varve/control/state"
	"varve/control/vdisk"
	"varve/control/vmachine"
)

// machinesWorld is what newWorld has for VMs and hypervisors.
type machinesWorld struct {
	vms         *vmachine.Controller
	hypervisors *pmachine.Controller
	fake        *fakeHypervisor
}

// fakeHypervisor has one host, and keeps what it mounts.
type fakeHypervisor struct {
	mounts []hypervisor.Mount
	vms    []hypervisor.Machine
	fail   error
}

func (f *fakeHypervisor) Inventory(context.Context) (hypervisor.Inventory, error) {
	return hypervisor.Inventory{Version: "fake 1", Hosts: []hypervisor.Host{{Ref: "host-1", Name: "esx1", State: "connected"}}, Mounts: f.mounts, Machines: f.vms}, f.fail
}

func (f *fakeHypervisor) Mount(_ context.Context, m hypervisor.Mount) (bool, error) {
	for _, have := range f.mounts {
		if have.Name == m.Name {
			return true, nil
		}
	}
	m.Usable = true
	f.mounts = append(f.mounts, m)
	return false, f.fail
}

func (f *fakeHypervisor) Unmount(context.Context, string, string) error {
	f.mounts = nil
	return f.fail
}

func (f *fakeHypervisor) Close() {}

type fakeMounts struct{}

func (fakeMounts) Export(p state.VPool) mount.Export {
	return mount.Export{VPool: p.Name, Address: "192.0.2.7", Port: 2049, NBDPort: 10809, Portmap: true, Clients: p.Clients}
}

func (fakeMounts) Test(_ context.Context, _ state.VPool, host string, _ time.Duration) ([]mount.Check, error) {
	return []mount.Check{{Name: "mount", OK: true, Took: time.Millisecond}, {Name: "written by host", OK: host != "192.0.2.66"}}, nil
}

func (w *world) machines(self uuid.UUID, disks *vdisk.Controller) {
	keys, err := secrets.OpenKeys(w.TempDir())
	w.must(err)
	w.fake = &fakeHypervisor{}
	w.hypervisors = pmachine.New(pmachine.Config{Raft: w.log, Store: w.log.Store, Vault: secrets.New(w.log, w.log.Store, keys),
		Dial: func(_ context.Context, e hypervisor.Endpoint) (hypervisor.Hypervisor, error) {
			if e.Credentials.Password == "wrong" {
				return nil, errors.New("no such user")
			}
			return w.fake, nil
		}})
	w.vms = vmachine.New(vmachine.Config{Raft: w.log, Store: w.log.Store, Disks: disks, Files: w.engine, Node: self, Power: w.hypervisors.Power, Quiet: time.Nanosecond})
}

// vm makes a VM of one disk, described by domain XML beside it.
func (w *world) vm(name string) v1.VMachine {
	w.Helper()
	w.call("POST", v1.Prefix+"/vdisks", fmt.Sprintf(`{"name":"default/%s/disk","size":"1MiB"}`, name), 201, nil)
	view := w.log.Store.View()
	p, err := view.VPool("default")
	w.must(err)
	dir, err := view.Resolve(p.FSID, "/"+name)
	w.must(err)
	res, err := w.log.Apply(w.Context(), &state.CreateInode{FSID: p.FSID, Parent: dir.Ino, Name: name + ".xml", Kind: state.File, How: state.Guarded, Mode: 0o644, Volume: uuid.New()})
	w.must(err)
	n, err := w.log.Store.View().Inode(p.FSID, res.Ino)
	w.must(err)
	vol, err := w.log.Store.View().Volume(n.Volume)
	w.must(err)
	nodes := w.log.Store.View().Nodes()
	_, err = w.log.Apply(w.Context(), &state.ActivateVolume{Volume: vol.ID, Node: nodes[0].ID, Epoch: vol.Epoch})
	w.must(err)
	w.must(w.engine.Write(w.Context(), vol, []byte(fmt.Sprintf(`<domain><name>%s</name><uuid>%s</uuid><devices><disk type='file'><source file='disk.raw'/>`+
		`<target dev='vda'/></disk></devices></domain>`, name, uuid.NewString()))))
	ctx, stop := context.WithCancel(w.Context())
	done := make(chan error, 1)
	go func() { done <- w.vms.Run(ctx) }()
	defer func() { stop(); w.must(<-done) }()
	var m v1.VMachine
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if status, body, _ := w.do("GET", v1.Prefix+"/vmachines/"+name, ""); status == 200 {
			w.must(json.Unmarshal([]byte(body), &m))
			return m
		}
	}
	w.Fatal("no VM in a minute")
	return m
}

// call sends a request as the administrator, wants a status, and reads the answer.
func (w *world) call(method, path, body string, status int, into any) {
	w.Helper()
	got, text, _ := w.do(method, path, body)
	if got != status {
		w.Fatalf("%s %s: %d %s", method, path, got, text)
	}
	if into != nil {
		w.must(json.Unmarshal([]byte(text), into))
	}
}

func TestVMachines(t *testing.T) {
	w := newWorld(t)
	m := w.vm("web")
	base := v1.Prefix + "/vmachines/web"
	if m.Config != "default/web/web.xml" || len(m.Disks) != 1 || m.Disks[0].VDisk != "default/web/disk" || m.Power != "unknown" {
		t.Fatalf("%+v", m)
	}
	var snap v1.VMachineSnapshot
	w.call("POST", base+"/snapshots", `{"name":"one"}`, 201, &snap)
	if !snap.Complete || snap.Name != "one" {
		t.Errorf("%+v", snap)
	}
	var task v1.Task
	w.problem("POST", base+"/rollback", `{"snapshot":"one"}`, 428, "confirmation_required")
	w.problem("POST", base+"/rollback?confirm=web", `{"snapshot":"none"}`, 404, "not_found")
	w.call("POST", base+"/rollback?confirm=web", `{"snapshot":"one"}`, 202, &task)
	if task.Type != vmachine.RollbackTask {
		t.Errorf("%+v", task)
	}
	w.problem("POST", base+"/clones", `{"names":["../x"]}`, 400, "invalid")
	w.problem("POST", base+"/clones", `{"names":["web"]}`, 409, "exists")
	w.call("POST", base+"/clones", `{"names":["web2","web3"],"snapshot":"one"}`, 202, &task)
	var effect v1.Effect
	w.call("DELETE", base+"?dryRun=true", "", 200, &effect)
	changes := strings.Join(effect.Changes, ",")
	if effect.Confirm != "web" || !strings.Contains(changes, "default/web/disk goes into the trash") ||
		!strings.Contains(changes, "/web/web.xml goes into the trash") || len(effect.Lost) > 0 || !effect.Reversible {
		t.Errorf("%+v", effect)
	}
	w.call("DELETE", base+"?dryRun=true&purge=true", "", 200, &effect)
	if lost := strings.Join(effect.Lost, ","); !strings.Contains(lost, "/web/web.xml") || !strings.Contains(lost, "vDisk default/web/disk") {
		t.Errorf("%+v", effect)
	}
	w.problem("DELETE", base, "", 428, "confirmation_required")
	w.call("PUT", base+"/template", `{"template":true}`, 200, &m)
	if !m.Template {
		t.Errorf("%+v", m)
	}
	w.call("PUT", base+"/template", `{"template":false}`, 200, &m)
	w.call("DELETE", base+"/snapshots/one?confirm=one", "", 204, nil)
	w.call("DELETE", base+"?confirm=web", "", 202, &task)
	if task.Type != vmachine.DeleteTask || task.Object != "vmachine web" {
		t.Errorf("%+v", task)
	}
	w.problem("GET", v1.Prefix+"/vmachines/nobody", "", 404, "not_found")
}

// The credentials of a hypervisor are in no answer, log entry or error; changes of where they would go need them anew.
func TestPMachines(t *testing.T) {
	w := newWorld(t)
	base := v1.Prefix + "/pmachines"
	w.problem("POST", base, `{"name":"vc","kind":"vsphere","address":"http://vc"}`, 400, "invalid")
	w.problem("POST", base, `{"name":"vc","kind":"vsphere","address":"https://vc","user":"u","password":"wrong"}`, 409, "conflict")
	var p v1.PMachine
	w.call("POST", base, `{"name":"vc","kind":"vsphere","address":"https://vc","user":"u","password":"canary-credential"}`, 201, &p)
	if p.State != "ok" || len(p.Hosts) != 1 || p.Version != "fake 1" {
		t.Fatalf("%+v", p)
	}
	var effect v1.Effect
	w.call("POST", base+"/vc/mounts?dryRun=true", `{"vpool":"default","address":"192.0.2.7"}`, 200, &effect)
	var done v1.PMachineMountResult
	w.call("POST", base+"/vc/mounts", `{"vpool":"default","address":"192.0.2.7"}`, 201, &done)
	if len(done.Hosts) != 1 || done.Hosts[0].Done != pmachine.DoneMounted || done.Hosts[0].Host != "esx1" {
		t.Errorf("%+v", done)
	}
	w.problem("POST", base+"/vc/mounts", `{"vpool":"default","address":"$(reboot)"}`, 400, "invalid")
	w.problem("POST", base+"/vc/mounts", `{"vpool":"default","hosts":["nobody"],"address":"192.0.2.7"}`, 404, "not_found")
	w.call("GET", base+"/vc", "", 200, &p)
	if len(p.Mounts) != 1 || p.Mounts[0].VPool != "default" || p.Mounts[0].Server != "192.0.2.7" || !p.Mounts[0].Usable || p.Hosts[0].Mounted != 1 {
		t.Errorf("%+v", p.Mounts)
	}
	w.problem("PATCH", base+"/vc", `{"address":"https://evil"}`, 400, "invalid")
	w.call("PATCH", base+"/vc", `{"address":"https://vc2","password":"canary-credential"}`, 200, &p)
	w.fake.fail = errors.New("it is down")
	w.problem("POST", base+"/vc/test", "", 409, "conflict")
	w.call("GET", base+"/vc", "", 200, &p)
	if p.State != "failing" || p.Error == "" || len(p.Hosts) != 1 {
		t.Errorf("%+v", p)
	}
	w.fake.fail = nil
	w.problem("DELETE", base+"/vc/mounts/default", "", 428, "confirmation_required")
	w.call("DELETE", base+"/vc/mounts/default?confirm=default", "", 204, nil)
	w.call("DELETE", base+"/vc?confirm=vc", "", 204, nil)
	if n := len(w.log.Store.View().Secrets()); n != 0 {
		t.Errorf("%d secrets are left", n)
	}
	if strings.Contains(w.log.Entries(), "canary-credential") || strings.Contains(w.logged.String(), "canary-credential") {
		t.Error("a credential is in the log")
	}
}

func TestMountHelp(t *testing.T) {
	w := newWorld(t)
	base := v1.Prefix + "/vpools/default/mount"
	var h v1.MountHelp
	for _, target := range mount.Targets() {
		w.call("GET", base+"?for="+target+"&address=storage.example.com", "", 200, &h)
		if !strings.Contains(h.Script, "storage.example.com") || len(h.Steps) == 0 || len(h.Notes) == 0 {
			t.Errorf("%s: %+v", target, h)
		}
	}
	w.problem("GET", base+"?for=hyperv", "", 400, "invalid")
	w.problem("GET", base+"?for=linux&address=%24(reboot)", "", 400, "invalid")
	var r v1.MountTest
	w.call("POST", base+"-test", `{}`, 200, &r)
	if !r.OK || len(r.Checks) != 2 {
		t.Errorf("%+v", r)
	}
	w.call("POST", base+"-test", `{"host":"192.0.2.66","seconds":1}`, 200, &r)
	if r.OK {
		t.Errorf("%+v", r)
	}
}
