package vmconfig

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"
)

const esxi = `.encoding = "UTF-8"
config.version = "8"
virtualHW.version = "13"
displayName = "web |22one|22"
guestOS = "debian10-64"
memSize = "2048"
numvcpus = "2"
uuid.bios = "56 4d 9b 2a 51 1e 0f 7e-1c d0 11 22 33 44 55 66"
vc.uuid = "52 aa"
scsi0.present = "TRUE"
scsi0.virtualDev = "pvscsi"
scsi0:1.deviceType = "scsi-hardDisk"
scsi0:1.fileName = "/vmfs/volumes/other/web/data.vmdk"
scsi0:1.present = "TRUE"
scsi0:0.deviceType = "scsi-hardDisk"
scsi0:0.fileName = "web.vmdk"
scsi0:0.present = "TRUE"
ide0:0.deviceType = "cdrom-image"
ide0:0.fileName = "/vmfs/volumes/iso/debian.iso"
sata0:0.present = "FALSE"
sata0:0.fileName = "gone.vmdk"
ethernet0.present = "TRUE"
ethernet0.generatedAddress = "00:0c:29:11:22:33"
ethernet0.networkName = "VM Network"
nvram = "web.nvram"
sched.cpu.shares = "normal"
`

const domain = `<?xml version="1.0"?>
<!-- made by virsh -->
<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>db &amp; co</name>
  <uuid>c7a5fdbd-cdaf-9455-926a-d65c16db1809</uuid>
  <memory unit='MiB'>512</memory>
  <vcpu placement='static'>4</vcpu>
  <os><type arch='x86_64'>hvm</type><nvram>/var/lib/libvirt/nvram/db.fd</nvram></os>
  <devices>
    <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/mnt/default/db/db.raw'/><target dev='vda' bus='virtio'/></disk>
    <disk type='file' device='cdrom'><source file="/iso/debian.iso"/><target dev='sda'/></disk>
    <disk type='network' device='disk'><source protocol='nbd' name='default/db/log'><host name='127.0.0.1' port='10809'/></source><target dev='vdb'/></disk>
    <disk type='volume' device='disk'><source pool='varve' volume='db/tmp.raw'/><target dev='vdc'/></disk>
    <disk type='block'><source dev='/dev/sdz'/><target dev='vdd'/></disk>
    <interface type='network'><mac address='52:54:00:11:22:33'/><source network='default'/></interface>
  </devices>
  <qemu:commandline><qemu:arg value='-S'/></qemu:commandline>
</domain>
`

const descriptor = "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"vmfs\"\n\n# Extent description\n" +
	"RW 20971520 VMFS \"web-flat.vmdk\"\n\n# The Disk Data Base\nddb.adapterType = \"lsilogic\"\nddb.uuid = \"60 00\"\n"

func TestVMX(t *testing.T) {
	c, err := Parse(VMX, []byte(esxi))
	if err != nil {
		t.Fatal(err)
	}
	want := []Disk{{"scsi0:0", InFile, "web.vmdk"}, {"scsi0:1", InFile, "/vmfs/volumes/other/web/data.vmdk"}}
	if c.Name != `web "one"` || c.UUID != "564d9b2a-511e-0f7e-1cd0-112233445566" || c.Memory != 2<<30 || c.VCPUs != 2 || !slices.Equal(c.Disks, want) {
		t.Fatalf("%+v", c)
	}
	id := uuid.MustParse("01020304-0506-0708-090a-0b0c0d0e0f10")
	b, err := Rewrite(VMX, []byte(esxi), Copy{Name: "web|2", UUID: id, Files: map[string]string{"web.vmdk": "web2.vmdk"}})
	if err != nil {
		t.Fatal(err)
	}
	c, err = Parse(VMX, b)
	if err != nil || c.Name != "web|2" || c.UUID != id.String() || c.Disks[0].File != "web2.vmdk" || c.Disks[1] != want[1] {
		t.Fatalf("%+v %v\n%s", c, err, b)
	}
	for _, gone := range []string{"00:0c:29", "vc.uuid", "nvram"} {
		if strings.Contains(string(b), gone) {
			t.Errorf("%s is in the copy", gone)
		}
	}
	for _, kept := range []string{`sched.cpu.shares = "normal"`, `ethernet0.networkName = "VM Network"`, `scsi0.virtualDev = "pvscsi"`} {
		if !strings.Contains(string(b), kept) {
			t.Errorf("%s is not in the copy", kept)
		}
	}
}

func TestDomain(t *testing.T) {
	c, err := Parse(Libvirt, []byte(domain))
	if err != nil {
		t.Fatal(err)
	}
	want := []Disk{{"vda", InFile, "/mnt/default/db/db.raw"}, {"vdb", OnNBD, "default/db/log"}, {"vdc", InPool, "varve/db/tmp.raw"}, {"vdd", Elsewhere, "/dev/sdz"}}
	if c.Name != "db & co" || c.UUID != "c7a5fdbd-cdaf-9455-926a-d65c16db1809" || c.Memory != 512<<20 || c.VCPUs != 4 || !slices.Equal(c.Disks, want) {
		t.Fatalf("%+v", c)
	}
	id := uuid.New()
	b, err := Rewrite(Libvirt, []byte(domain), Copy{Name: "b<2>", UUID: id, Files: map[string]string{
		"/mnt/default/db/db.raw": "/mnt/default/b2/b'2.raw", "default/db/log": "default/b2/log", "varve/db/tmp.raw": "varve/b2/tmp.raw"}})
	if err != nil {
		t.Fatal(err)
	}
	c, err = Parse(Libvirt, b)
	want = []Disk{{"vda", InFile, "/mnt/default/b2/b'2.raw"}, {"vdb", OnNBD, "default/b2/log"}, {"vdc", InPool, "varve/b2/tmp.raw"}, {"vdd", Elsewhere, "/dev/sdz"}}
	if err != nil || c.Name != "b<2>" || c.UUID != id.String() || !slices.Equal(c.Disks, want) {
		t.Fatalf("%+v %v\n%s", c, err, b)
	}
	if s := string(b); strings.Contains(s, "52:54:00") || strings.Contains(s, "nvram") || !strings.Contains(s, "<qemu:arg value='-S'/>") ||
		!strings.Contains(s, `<source file="/iso/debian.iso"/>`) || !strings.Contains(s, "<host name='127.0.0.1' port='10809'/>") {
		t.Errorf("copy:\n%s", b)
	}
}

func TestDescriptor(t *testing.T) {
	d, err := ParseDescriptor([]byte(descriptor))
	if err != nil || !slices.Equal(d.Extents, []string{"web-flat.vmdk"}) || !d.Flat || d.Parent != "" {
		t.Fatalf("%+v %v", d, err)
	}
	b, err := RewriteDescriptor([]byte(descriptor), map[string]string{"web-flat.vmdk": "new-flat.vmdk"})
	if err != nil || !strings.Contains(string(b), `RW 20971520 VMFS "new-flat.vmdk"`) || strings.Contains(string(b), "ddb.uuid") {
		t.Fatalf("%s %v", b, err)
	}
	delta := strings.Replace(strings.Replace(descriptor, "VMFS \"web-flat", "VMFSSPARSE \"web-000001-delta", 1), "createType", "parentFileNameHint=\"web.vmdk\"\ncreateType", 1)
	d, err = ParseDescriptor([]byte(delta))
	if err != nil || d.Flat || d.Parent != "web.vmdk" {
		t.Fatalf("%+v %v", d, err)
	}
	if _, err := RewriteDescriptor([]byte(descriptor), nil); err == nil {
		t.Error("an extent without a copy was left as it is")
	}
}

// What is none is told from a VM without disks.
func TestNoVM(t *testing.T) {
	deep := strings.Repeat("<a>", 100)
	for _, c := range []struct{ format, text string }{
		{VMX, ""}, {VMX, "hello\nworld = 1\n"}, {VMX, "a = \"b\"\n"}, {VMX, strings.Repeat("x", FileBytesMax+1)},
		{VMX, "displayName = \"x\"\n" + strings.Repeat("\n", linesMax)},
		{Libvirt, ""}, {Libvirt, "<pool/>"}, {Libvirt, "<domain>"}, {Libvirt, "<domain></name></domain>"}, {Libvirt, "<domain>" + deep},
		{Libvirt, `<!DOCTYPE d [<!ENTITY a "b">]><domain><name>&a;</name></domain>`}, {Libvirt, "<domain><name>&lol;</name></domain>"},
		{Libvirt, `<?xml version="1.0" encoding="UTF-16"?><domain/>`}, {Libvirt, "<domain/><domain/>"}, {"ovf", "<domain/>"},
	} {
		if got, err := Parse(c.format, []byte(c.text)); !errors.Is(err, ErrNoVM) {
			t.Errorf("%s %.60q: %+v, %v", c.format, c.text, got, err)
		}
	}
}

func TestSameMachine(t *testing.T) {
	for _, c := range []struct {
		a, b string
		same bool
	}{
		{"564d9b2a-511e-0f7e-1cd0-112233445566", "564D9B2A-511E-0F7E-1CD0-112233445566", true},
		{"564d9b2a-511e-0f7e-1cd0-112233445566", "2a9b4d56-1e51-7e0f-1cd0-112233445566", true},
		{"564d9b2a-511e-0f7e-1cd0-112233445566", "564d9b2a-511e-0f7e-1cd0-112233445567", false},
		{"", "", false},
	} {
		if got := SameMachine(c.a, c.b); got != c.same {
			t.Errorf("%s %s: %v", c.a, c.b, got)
		}
	}
}

// Whatever the files hold, what is read is bounded and printable, and a copy that can be made has the new name and id.
func FuzzParse(f *testing.F) {
	for _, s := range []string{esxi, domain, descriptor, "scsi0:0.fileName = \"a.vmdk\"\ndisplayname=\"|0a|\"", "<domain><devices><disk><source file=''/></disk></devices></domain>"} {
		f.Add(s)
	}
	id := uuid.MustParse("01020304-0506-0708-090a-0b0c0d0e0f10")
	f.Fuzz(func(t *testing.T, s string) {
		for _, format := range []string{VMX, Libvirt} {
			c, err := Parse(format, []byte(s))
			if err != nil {
				if !errors.Is(err, ErrNoVM) {
					t.Fatalf("%s: %v", format, err)
				}
				continue
			}
			if len(c.Name) > nameBytesMax || len(c.Disks) > disksMax || c.Memory < 0 || c.VCPUs < 0 || strings.ContainsAny(c.Name, "\n\x00") {
				t.Fatalf("%+v", c)
			}
			files := make(map[string]string)
			for _, d := range c.Disks {
				if len(d.File) > 4*textBytesMax {
					t.Fatalf("path of %d bytes", len(d.File))
				}
				files[d.File] = "new/" + d.Label + ".vmdk"
			}
			b, err := Rewrite(format, []byte(s), Copy{Name: "copy", UUID: id, Files: files})
			if err != nil {
				continue
			}
			again, err := Parse(format, b)
			if err != nil || len(b) < FileBytesMax/2 && (again.UUID != id.String() || len(again.Disks) != len(c.Disks)) {
				if len(b) < FileBytesMax/2 {
					t.Fatalf("the copy is not what was asked for: %v %+v\n%q", err, again, b)
				}
			}
		}
		if d, err := ParseDescriptor([]byte(s)); err == nil {
			files := make(map[string]string)
			for _, e := range d.Extents {
				files[e] = "x-flat.vmdk"
			}
			if b, err := RewriteDescriptor([]byte(s), files); err == nil {
				if again, err := ParseDescriptor(b); err != nil || len(again.Extents) != len(d.Extents) {
					t.Fatalf("%v %+v", err, again)
				}
			}
		}
	})
}
