package ova

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vmware/govmomi/find"
	"github.com/vmware/govmomi/ovf"
	"github.com/vmware/govmomi/ovf/importer"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25"

	"varve/image/vmdk"
)

// holes is a disk of 1 GiB that is zeros but for its beginning, middle and end.
type holes struct{}

func (holes) ReadAt(p []byte, at int64) (int, error) {
	clear(p)
	if at == 0 || at == 300<<20 || at == 1<<30-vmdk.Grain {
		rand.NewChaCha8([32]byte{9, byte(at >> 20)}).Read(p)
	}
	return len(p), nil
}

// sample is a small appliance and its disk.
func sample(t *testing.T) (Appliance, []byte) {
	t.Helper()
	var disk bytes.Buffer
	if _, err := vmdk.Write(&disk, holes{}, 1<<30, vmdk.Options{Name: "varve-1.vmdk"}); err != nil {
		t.Fatal(err)
	}
	return Appliance{Name: "varve", Version: "1.0 <&>", Vendor: "Varve", URL: "https://varve.invalid/", CPUs: 4, MemoryMB: 8192, SystemDisk: "varve-1.vmdk",
		SystemBytes: 1 << 30, SystemFile: int64(disk.Len()), DataGB: 64, Properties: Properties()}, disk.Bytes()
}

func pack(t *testing.T, a Appliance, disk []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := Write(&b, a, "varve-1", bytes.NewReader(disk), time.Unix(1_700_000_000, 0)); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// packText is pack with another descriptor.
func packText(t *testing.T, text []byte, a Appliance, disk []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := writeArchive(&b, text, a, "varve-1", bytes.NewReader(disk), time.Unix(1_700_000_000, 0)); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestOurOVAHasNothingToFind(t *testing.T) {
	a, disk := sample(t)
	b := pack(t, a, disk)
	found, err := Lint(bytes.NewReader(b), int64(len(b)))
	if err != nil || len(found) > 0 {
		t.Fatalf("%v %q", err, found)
	}
	if !bytes.Equal(b, pack(t, a, disk)) {
		t.Error("a second one differs")
	}
}

// Each change to the descriptor breaks one importer, by the rule that is expected to say so.
func TestLintFindsWhatImportersStumbleOver(t *testing.T) {
	a, disk := sample(t)
	text, err := a.Descriptor()
	if err != nil {
		t.Fatal(err)
	}
	cpu := string(text[bytes.Index(text, []byte("<Item>")) : bytes.Index(text, []byte("</Item>"))+7])
	for _, c := range []struct{ old, with, says string }{
		{cpu, cpu + strings.NewReplacer(">1</rasd:InstanceID", ">77</rasd:InstanceID", ">4<", ">2<").Replace(cpu), `2 items of CPU read as "42"`},
		{"byte * 2^20", "MegaByte", "memory is taken as MB"},
		{"byte * 2^30", "GigaBytes", "is not understood"},
		{`ovf:id="96"`, `ovf:id="102"`, "not known as Linux"},
		{"ovf:/disk/vmdisk1", "/disk/vmdisk1", "leads to no disk"},
		{"<Name>varve</Name>", "<Name>my varve</Name>", "no name of a VM"},
		{"<rasd:Parent>3</rasd:Parent>", "<rasd:Parent>33</rasd:Parent>", "controller"},
		{"VmxNet3", "PCNet32", "becomes an e1000"},
		{"<rasd:AutomaticAllocation>true", "<rasd:AutomaticAllocation>false", "left out: it is not allocated"},
		{"<rasd:AddressOnParent>1<", "<rasd:AddressOnParent>0<", `position "3/0"`},
		{"<vssd:VirtualSystemIdentifier>varve</vssd:VirtualSystemIdentifier>", "", "has no name"},
		{`<File ovf:id="file1"`, `<File id="file1" ovf:id="file1"`, "attribute id of File has no prefix"},
		{"ovf/envelope/1", "ovf/envelope/2", "is no OVF 1.x"},
		{"com.vmware.guestInfo iso", "iso", "properties do not reach"},
		{"vmx-14", "virtualbox-2.2", "hardware version"},
		{`<vmw:Config ovf:required="false" vmw:key="firmware"`, `<vmw:Config vmw:key="firmware"`, "firmware is not optional"},
		{"<vmw:Config", `<vmw:ExtraConfig ovf:required="false" vmw:key="a" vmw:value="b"/><vmw:Config`, "ExtraConfig"},
		{`ovf:type="string"`, `ovf:type="ip"`, "optional string"},
		{"guestinfo.varve.hostname", "hostname", "not found by the appliance"},
		{`<Network ovf:name="storage">`, `<Network ovf:name="san">`, "not declared"},
		{"<NetworkSection>", "<DeploymentOptionSection/><NetworkSection>", "sizes to choose from"},
		{`ovf:size="`, `ovf:size="1`, "bytes, the descriptor says"},
		{`ovf:capacity="1"`, `ovf:capacity="2"`, "is a disk of 1073741824 bytes"},
		{"<rasd:Address>0</rasd:Address>", "<rasd:ResourceType>6</rasd:ResourceType>", "schema's order"},
		{"</Envelope>", "", "not XML"},
	} {
		if !bytes.Contains(text, []byte(c.old)) {
			t.Errorf("the descriptor has no %q", c.old)
			continue
		}
		changed := bytes.Replace(text, []byte(c.old), []byte(c.with), 1)
		b := packText(t, changed, a, disk)
		found, err := Lint(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			t.Errorf("%q: %v", c.with, err)
		}
		if !slices.ContainsFunc(found, func(f string) bool { return strings.Contains(f, c.says) }) {
			t.Errorf("%q for %q: %q, nothing says %q", c.with, c.old, found, c.says)
		}
	}
}

func TestLintFindsDamageOfTheArchive(t *testing.T) {
	a, disk := sample(t)
	good := pack(t, a, disk)
	for name, c := range map[string]struct {
		change func(b []byte) []byte
		says   string
	}{
		"disk": {func(b []byte) []byte { b[len(b)-1024-20*512] ^= 1; return b }, "digest of varve-1.vmdk differs"},
		"manifest": {func(b []byte) []byte {
			return bytes.Replace(b, []byte("SHA256(varve-1.ovf)= "), []byte("SHA256 (varve-1.ovf)="), 1)
		}, "is not SHA256(name)= hex"},
		"name": {func(b []byte) []byte { return bytes.ReplaceAll(b, []byte("varve-1.ovf)"), []byte("other-1.ovf)")) }, "there is no other-1.ovf"},
	} {
		b := c.change(bytes.Clone(good))
		found, err := Lint(bytes.NewReader(b), int64(len(b)))
		if err != nil || !slices.ContainsFunc(found, func(f string) bool { return strings.Contains(f, c.says) }) {
			t.Errorf("%s: %v %q", name, err, found)
		}
	}
	if _, err := Lint(bytes.NewReader(good[:700]), 700); err == nil {
		t.Error("a cut archive is accepted")
	}
}

func TestSettingsThatMakeNoOVA(t *testing.T) {
	a, disk := sample(t)
	odd, long, big := a, a, a
	odd.SystemBytes += 512
	long.SystemDisk = strings.Repeat("x", 120)
	big.SystemFile = 8 << 30
	for _, bad := range []Appliance{odd, long, big, {}} {
		if err := Write(&bytes.Buffer{}, bad, "varve", bytes.NewReader(disk), time.Unix(0, 0)); err == nil {
			t.Errorf("%+v is accepted", bad)
		}
	}
}

// govmomi's parser is a second reader of the descriptor: what it makes of it is a VM with the firmware and properties meant.
func TestGovmomiReadsTheDescriptor(t *testing.T) {
	a, _ := sample(t)
	text, err := a.Descriptor()
	if err != nil {
		t.Fatal(err)
	}
	e, err := ovf.Unmarshal(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	if e.VirtualSystem == nil || len(e.VirtualSystem.Product) != 1 || len(e.Disk.Disks) != 2 || len(e.Network.Networks) != 2 {
		t.Fatalf("%+v", e)
	}
	n := 0
	for _, p := range e.VirtualSystem.Product[0].Property {
		if p.Type != "string" || p.Default == nil || *p.Default != "" || !strings.HasPrefix(p.Key, "guestinfo.varve.") {
			t.Errorf("property %+v", p)
		}
		n++
	}
	want := 0
	for _, c := range Properties() {
		want += len(c.Properties)
	}
	if n != want {
		t.Errorf("%d of %d properties", n, want)
	}
	spec, err := e.ToConfigSpec()
	if err != nil {
		t.Fatal(err)
	}
	if spec.Firmware != "efi" || spec.NumCPUs != 4 || spec.MemoryMB != 8192 {
		t.Errorf("firmware %q, %d CPUs, %d MB", spec.Firmware, spec.NumCPUs, spec.MemoryMB)
	}
}

// The simulator of a vCenter imports the OVA as `govc import.ova` does. It cannot make a disk without a file, so that one is left out.
func TestGovmomiSimulatorImports(t *testing.T) {
	a, disk := sample(t)
	text, err := a.Descriptor()
	if err != nil {
		t.Fatal(err)
	}
	text = cut(t, cut(t, text, `    <Disk ovf:diskId="vmdisk2"`, "/>\n"), "      <Item ovf:required=\"false\">\n        <rasd:AddressOnParent>1<", "</Item>\n")
	file := filepath.Join(t.TempDir(), "varve.ova")
	if err := os.WriteFile(file, packText(t, text, a, disk), 0o600); err != nil {
		t.Fatal(err)
	}
	simulator.Test(func(ctx context.Context, c *vim25.Client) {
		finder := find.NewFinder(c)
		dc, err := finder.DefaultDatacenter(ctx)
		if err != nil {
			t.Fatal(err)
		}
		finder.SetDatacenter(dc)
		pool, err := finder.DefaultResourcePool(ctx)
		if err != nil {
			pool, err = finder.ResourcePool(ctx, "DC0_H0/Resources")
		}
		if err != nil {
			t.Fatal(err)
		}
		store, err := finder.DefaultDatastore(ctx)
		if err != nil {
			t.Fatal(err)
		}
		folders, err := dc.Folders(ctx)
		if err != nil {
			t.Fatal(err)
		}
		host, err := finder.HostSystem(ctx, "DC0_H0")
		if err != nil {
			t.Fatal(err)
		}
		im := importer.Importer{Client: c, Finder: finder, Datacenter: dc, Datastore: store, ResourcePool: pool, Host: host, Folder: folders.VmFolder,
			Name: "varve", Log: func(string) (int, error) { return 0, nil },
			Archive: &importer.TapeArchive{Path: file, Opener: importer.Opener{Client: c}}}
		if err := im.ReadManifest("*.ovf"); err != nil || len(im.Manifest) != 2 || im.Manifest["varve-1.vmdk"].Algorithm != "SHA256" {
			t.Errorf("manifest: %v %v", err, im.Manifest)
		}
		options := importer.Options{NetworkMapping: []importer.Network{{Name: "management", Network: "VM Network"}, {Name: "storage", Network: "VM Network"}}}
		vm, err := im.Import(ctx, "*.ovf", options)
		if err != nil {
			t.Fatal(err)
		}
		if vm == nil || vm.Type != "VirtualMachine" {
			t.Fatalf("imported %v", vm)
		}
	})
}

// cut takes the part of text from one marker to the end of the next.
func cut(t *testing.T, text []byte, from, to string) []byte {
	t.Helper()
	i := bytes.Index(text, []byte(from))
	if i < 0 {
		t.Fatalf("no %q", from)
	}
	j := bytes.Index(text[i:], []byte(to))
	return slices.Concat(text[:i], text[i+j+len(to):])
}
