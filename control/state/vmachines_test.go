package state

import (
	"testing"

	"github.com/google/uuid"
)

// A VM is the same one for as long as the same file, or one in its place, describes it; it goes with its file's vPool or the
// hypervisor that alone tells of it, and the credentials go with the hypervisor.
func TestVMachineRows(t *testing.T) {
	m := newMachine(t)
	ino := m.must(m.file(RootIno, "a.vmx")).Ino
	spec := VMachineSpec{Name: "a", Format: FormatVMX, UUID: "u", Disks: []VMachineDisk{{Label: "scsi0:0", File: "a.vmdk"}}}
	first := m.must(&SetVMachine{ID: m.id(), FSID: m.fsid, Ino: ino, Spec: spec})
	if !first.Created {
		t.Fatal("not made")
	}
	if again := m.must(&SetVMachine{ID: m.id(), FSID: m.fsid, Ino: ino, Spec: spec}); again.Object != first.Object {
		t.Errorf("the same file made another VM")
	}
	// Another file in its place, as hypervisors save.
	temp := m.must(m.file(RootIno, "a.vmx~")).Ino
	m.must(&Rename{FSID: m.fsid, FromDir: RootIno, From: "a.vmx~", ToDir: RootIno, To: "a.vmx"})
	spec.Name = "b"
	if again := m.must(&SetVMachine{ID: m.id(), FSID: m.fsid, Ino: temp, Spec: spec}); again.Object != first.Object {
		t.Errorf("a file in the place of the old one made another VM")
	}
	// A copy of the file is another VM, though it says the same.
	copied := m.must(m.file(RootIno, "copy.vmx")).Ino
	if other := m.must(&SetVMachine{ID: m.id(), FSID: m.fsid, Ino: copied, Spec: spec}); other.Object == first.Object {
		t.Errorf("a copy took the VM over")
	}
	m.fails(ErrConflict, &DeleteVMachine{ID: first.Object, Ino: ino})

	hv := uuid.New()
	m.fails(ErrNotFound, &SetVMachine{ID: m.id(), PMachine: hv, Spec: spec})
	secret := &SetSecret{Name: PMachineSecret(hv), Key: "k", Sealed: []byte("x")}
	m.must(&SetPMachine{ID: hv, Create: true, Name: "vc", Spec: PMachineSpec{Kind: KindVSphere, Address: "https://vc"}, Secret: secret})
	m.fails(ErrExist, &SetPMachine{ID: m.id(), Create: true, Name: "vc", Spec: PMachineSpec{Kind: KindVSphere, Address: "https://vc"}})
	m.fails(ErrInvalid, &SetPMachine{ID: hv, Name: "vc", Spec: PMachineSpec{Kind: KindVSphere, Address: "x"}, Secret: &SetSecret{Name: "vpool/x/kek", Key: "k", Sealed: []byte("x")}})
	m.must(&ReportPMachine{ID: hv, Hosts: []PMachineHost{{Name: "h", Ref: "h"}}, Mounts: []PMachineMount{{Host: "h", Pool: poolA, Name: "default"}, {Host: "h", Pool: uuid.New()}}})
	p, err := m.s.View().PMachine(hv)
	if err != nil || len(p.Mounts) != 1 {
		t.Fatalf("%+v %v", p, err)
	}
	alone := m.must(&SetVMachine{ID: m.id(), PMachine: hv, Spec: spec})
	m.must(&SetVMachinePower{ID: first.Object, From: hv, PMachine: hv, Host: "h", Power: PowerRunning})
	m.fails(ErrInvalid, &SetVMachinePower{ID: first.Object, From: hv, PMachine: uuid.New()})
	if _, err := m.s.View().VMachine(alone.Object); err != nil {
		t.Fatal(err)
	}
	m.must(&DeletePMachine{ID: hv})
	v := m.s.View()
	if _, err := v.VMachine(alone.Object); err == nil {
		t.Error("a VM that nobody tells of is left")
	}
	if vm, err := v.VMachine(first.Object); err != nil || vm.PMachine != uuid.Nil || vm.Power != "" {
		t.Errorf("%+v %v", vm, err)
	}
	if len(v.Secrets()) != 0 {
		t.Error("the credentials of a forgotten hypervisor are left")
	}
	if err := v.Check(); err != nil {
		t.Error(err)
	}
	for _, bad := range []*SetVMachine{
		{ID: uuid.New(), FSID: m.fsid, Ino: 99, Spec: spec},
		{ID: uuid.New(), Spec: spec},
		{ID: uuid.New(), FSID: m.fsid, Ino: temp, PMachine: hv, Spec: spec},
		{ID: uuid.New(), FSID: m.fsid, Ino: temp, Spec: VMachineSpec{Name: "x", Format: "ovf"}},
		{ID: uuid.New(), FSID: m.fsid, Ino: temp, Spec: VMachineSpec{Name: "x", Format: FormatVMX, Disks: make([]VMachineDisk, VMachineDisksMax+1)}},
		{ID: uuid.New(), FSID: m.fsid, Ino: temp, Spec: VMachineSpec{Name: "\xff", Format: FormatVMX}},
	} {
		if _, err := m.apply(bad); err == nil {
			t.Errorf("%+v was taken", bad)
		}
	}
}
