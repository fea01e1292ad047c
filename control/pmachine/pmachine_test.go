package pmachine

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"varve/control/enginetest"
	"varve/control/hypervisor"
	"varve/control/node"
	"varve/control/secrets"
	"varve/control/state"
	"varve/control/vdisk"
	"varve/control/vmachine"
	"varve/control/vmachine/vmconfig"
	"varve/control/vpool"
)

type fake struct {
	inv    hypervisor.Inventory
	err    error
	dialed []hypervisor.Endpoint
}

func (f *fake) Inventory(context.Context) (hypervisor.Inventory, error) { return f.inv, f.err }
func (f *fake) Mount(context.Context, hypervisor.Mount) (already bool, err error) {
	return false, f.err
}
func (f *fake) Unmount(context.Context, string, string) error { return f.err }
func (f *fake) Close()                                        {}

type world struct {
	*testing.T
	log   *enginetest.Log
	disks *vdisk.Controller
	c     *Controller
	fake  *fake
}

func newWorld(t *testing.T) *world {
	w := &world{T: t, log: enginetest.NewLog(), fake: &fake{}}
	engine := &enginetest.Engine{}
	if _, err := vpool.New(vpool.Config{Raft: w.log, Store: w.log.Store, Engine: engine}).Create(t.Context(), vpool.Spec{Name: "default", Backend: "local:///a"}); err != nil {
		t.Fatal(err)
	}
	self := uuid.New()
	if err := node.New(w.log, w.log.Store, self).Register(t.Context(), state.NodeSpec{Name: "n1", Role: state.RoleMaster, NFS: "192.0.2.7:2049", Version: "t"}); err != nil {
		t.Fatal(err)
	}
	w.disks = vdisk.New(vdisk.Config{Raft: w.log, Store: w.log.Store, Engine: engine})
	keys, err := secrets.OpenKeys(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	machines := vmachine.New(vmachine.Config{Raft: w.log, Store: w.log.Store, Disks: w.disks, Files: engine, Node: self})
	w.c = New(Config{Raft: w.log, Store: w.log.Store, Vault: secrets.New(w.log, w.log.Store, keys), Machines: machines, Every: 10 * time.Millisecond,
		Dial: func(_ context.Context, e hypervisor.Endpoint) (hypervisor.Hypervisor, error) {
			w.fake.dialed = append(w.fake.dialed, e)
			return w.fake, w.fake.err
		}})
	return w
}

func (w *world) create() state.PMachine {
	w.Helper()
	p, err := w.c.Create(w.Context(), Spec{Name: "vc", PMachineSpec: state.PMachineSpec{Kind: state.KindVSphere, Address: "https://vc", User: "u"},
		Credentials: hypervisor.Credentials{Password: "canary"}})
	if err != nil {
		w.Fatal(err)
	}
	return p
}

// A datastore counts as a vPool's only if its server is ours: others may export a share of the same name.
func TestMountsThatAreOurs(t *testing.T) {
	w := newWorld(t)
	w.fake.inv = hypervisor.Inventory{Hosts: []hypervisor.Host{{Ref: "h1", Name: "esx1", State: "connected"}}, Mounts: []hypervisor.Mount{
		{Host: "h1", Name: "ours", Server: "192.0.2.7", Export: "/default", Usable: true},
		{Host: "h1", Name: "theirs", Server: "198.51.100.1", Export: "/default", Usable: true},
		{Host: "h1", Name: "other", Server: "192.0.2.7", Export: "/nothing", Usable: true},
	}}
	p := w.create()
	if len(p.Mounts) != 1 || p.Mounts[0].Name != "ours" {
		t.Fatalf("%+v", p.Mounts)
	}
	if w.fake.dialed[0].Credentials.Password != "canary" || strings.Contains(w.log.Entries(), "canary") {
		t.Error("the password did not reach the hypervisor, or is in the log")
	}
}

// A VM that only its hypervisor describes is known by its vDisks, follows what it does, and goes when its hypervisor forgets it.
func TestMachinesOfTheHypervisorAlone(t *testing.T) {
	w := newWorld(t)
	if _, err := w.disks.Create(t.Context(), "default/a/disk-flat.vmdk", 1<<20); err != nil {
		t.Fatal(err)
	}
	vm := hypervisor.Machine{UUID: "564d9b2a-511e-0f7e-1cd0-112233445566", Name: "a", Host: "esx1", Power: state.PowerRunning, Format: state.FormatVMX, Config: "local/a/a.vmx"}
	vm.Disks = []vmconfig.Disk{{Label: "disk-1000-0", Kind: vmconfig.InPool, File: "ours/a/disk.vmdk"}}
	foreign := vm
	foreign.UUID, foreign.Name = "564d9b2a-511e-0f7e-1cd0-112233445577", "foreign"
	foreign.Disks = nil
	w.fake.inv = hypervisor.Inventory{Hosts: []hypervisor.Host{{Ref: "h1", Name: "esx1", State: "connected"}}, Machines: []hypervisor.Machine{vm, foreign},
		Mounts: []hypervisor.Mount{{Host: "h1", Name: "ours", Server: "192.0.2.7", Export: "/default", Path: "/vmfs/volumes/ours", Usable: true}}}
	p := w.create()
	all := w.log.Store.View().VMachines()
	if len(all) != 1 || all[0].Name != "a" || all[0].Power != state.PowerRunning || all[0].Host != "esx1" || all[0].PMachine != p.ID ||
		strings.Join(w.log.Store.View().DiskNames(all[0]), "") != "default/a/disk" {
		t.Fatalf("%+v", all)
	}
	rev := all[0].Rev
	if _, err := w.c.Ask(t.Context(), "vc"); err != nil || w.log.Store.View().VMachines()[0].Rev != rev {
		t.Errorf("a second look changed what it saw: %v", err)
	}
	w.fake.inv.Machines[0].Power = state.PowerHalted
	if power, ok := w.c.Power(t.Context(), all[0]); !ok || power != state.PowerHalted {
		t.Errorf("%s %v", power, ok)
	}
	w.fake.err = errors.New("away")
	if _, ok := w.c.Power(t.Context(), all[0]); ok {
		t.Error("a hypervisor that is away knows what a VM does")
	}
	if p, _ = w.log.Store.View().PMachineByName("vc"); p.Error == "" || len(p.Hosts) != 1 || len(w.log.Store.View().VMachines()) != 1 {
		t.Errorf("what a hypervisor told is gone with it: %+v", p)
	}
	w.fake.err = nil
	w.fake.inv.Machines = nil
	if _, err := w.c.Ask(t.Context(), "vc"); err != nil || len(w.log.Store.View().VMachines()) != 0 {
		t.Errorf("%v, %d VMs", err, len(w.log.Store.View().VMachines()))
	}
	if err := w.log.Store.View().Check(); err != nil {
		t.Error(err)
	}
	var types []string
	for _, e := range w.log.Store.View().Events(0, 1000) {
		if e.Topic == "vmachine" || e.Topic == "pmachine" {
			types = append(types, e.Type)
		}
	}
	if got := strings.Join(types, " "); got != "pmachine_create pmachine_mount vmachine_create vmachine_power vmachine_power pmachine_failing pmachine_works_again vmachine_delete" {
		t.Errorf("events: %s", got)
	}
}

// Run asks by itself, and ends with its context.
func TestRun(t *testing.T) {
	w := newWorld(t)
	w.create()
	w.fake.inv = hypervisor.Inventory{Version: "later"}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.c.Run(ctx) }()
	deadline := time.Now().Add(time.Minute)
	for {
		if p, err := w.log.Store.View().PMachineByName("vc"); err == nil && p.Version == "later" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("not asked in a minute")
		}
		time.Sleep(5 * time.Millisecond)
	}
	stop()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
