package ova

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"varve/image/vmdk"
)

// Limits on what Lint takes into memory.
const (
	textBytesMax = 1 << 20
	filesMax     = 16
	nodesMax     = 10000
)

// entry is a file of the archive; at is where its bytes begin.
type entry struct {
	name     string
	at, size int64
}

// Lint reads the OVA of length bytes in r as importers do and returns what would make one of them fail or misread it. An error means
// that it could not be read at all.
func Lint(r io.ReaderAt, length int64) ([]string, error) {
	l := &lint{r: r}
	if err := l.archive(length); err != nil {
		return nil, err
	}
	if len(l.files) == 0 || !strings.HasSuffix(l.files[0].name, ".ovf") {
		return append(l.found, "the first file is not the descriptor"), nil
	}
	text, err := l.text(l.files[0])
	if err != nil {
		return nil, err
	}
	root, err := parse(text)
	if err != nil {
		return append(l.found, fmt.Sprintf("the descriptor is not XML: %v", err)), nil
	}
	if err := l.manifest(); err != nil {
		return nil, err
	}
	l.references(root)
	l.proxmox(root)
	l.xenOrchestra(root)
	l.vsphere(root)
	return l.found, nil
}

type lint struct {
	r     io.ReaderAt
	files []entry
	found []string
}

func (l *lint) add(format string, args ...any) {
	l.found = append(l.found, fmt.Sprintf(format, args...))
}

func (l *lint) want(ok bool, format string, args ...any) {
	if !ok {
		l.add(format, args...)
	}
}

// archive lists the files and checks that their headers are plain ustar.
func (l *lint) archive(length int64) error {
	section := io.NewSectionReader(l.r, 0, length)
	t := tar.NewReader(section)
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read the archive: %w", err)
		}
		at, err := section.Seek(0, io.SeekCurrent)
		if err != nil {
			return err
		}
		if len(l.files) == filesMax {
			return fmt.Errorf("more than %d files in the archive", filesMax)
		}
		l.files = append(l.files, entry{h.Name, at, h.Size})
		raw := make([]byte, 512)
		if _, err := l.r.ReadAt(raw, at-512); err != nil {
			return fmt.Errorf("read the header of %s: %w", h.Name, err)
		}
		l.want(string(raw[257:265]) == "ustar\x0000" && (raw[156] == '0'), "%s: no plain ustar header", h.Name)
		l.want(h.Uid == 0 && h.Gid == 0, "%s belongs to %d:%d", h.Name, h.Uid, h.Gid)
		l.want(!strings.HasPrefix(h.Name, ".") && !strings.Contains(h.Name, "/"), "%s: Xen Orchestra passes over such a name", h.Name)
	}
}

func (l *lint) text(e entry) ([]byte, error) {
	if e.size > textBytesMax {
		return nil, fmt.Errorf("%s has %d bytes", e.name, e.size)
	}
	b := make([]byte, e.size)
	if _, err := io.ReadFull(io.NewSectionReader(l.r, e.at, e.size), b); err != nil {
		return nil, fmt.Errorf("read %s: %w", e.name, err)
	}
	return b, nil
}

func (l *lint) file(name string) (entry, bool) {
	i := slices.IndexFunc(l.files, func(e entry) bool { return e.name == name })
	if i < 0 {
		return entry{}, false
	}
	return l.files[i], true
}

var manifestLine = regexp.MustCompile(`^SHA256\(([^()]+)\)= ([0-9a-f]{64})$`)

func (l *lint) manifest() error {
	if len(l.files) < 2 || l.files[1].name != strings.TrimSuffix(l.files[0].name, ".ovf")+".mf" {
		l.add("the manifest does not follow the descriptor by its name")
		return nil
	}
	text, err := l.text(l.files[1])
	if err != nil {
		return err
	}
	named := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		m := manifestLine.FindStringSubmatch(strings.TrimSuffix(line, "\n"))
		if m == nil {
			l.add("manifest: %q is not SHA256(name)= hex", line)
			continue
		}
		e, ok := l.file(m[1])
		if !ok {
			l.add("manifest: there is no %s", m[1])
			continue
		}
		named[e.name] = true
		sum := sha256.New()
		if _, err := io.Copy(sum, io.NewSectionReader(l.r, e.at, e.size)); err != nil {
			return fmt.Errorf("read %s: %w", e.name, err)
		}
		l.want(hex.EncodeToString(sum.Sum(nil)) == m[2], "manifest: the digest of %s differs", e.name)
	}
	for _, e := range l.files {
		l.want(named[e.name] || strings.HasSuffix(e.name, ".mf"), "manifest: %s is not in it", e.name)
	}
	return nil
}

// Namespaces of a descriptor of OVF 1.x.
const (
	nsOVF  = "http://schemas.dmtf.org/ovf/envelope/1"
	nsRASD = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
	nsVSSD = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData"
	nsVMW  = "http://www.vmware.com/schema/ovf"
)

// node is an element.
type node struct {
	name     xml.Name
	attr     []xml.Attr
	text     string
	children []*node
}

func parse(text []byte) (*node, error) {
	d := xml.NewDecoder(bytes.NewReader(text))
	stack := []*node{{}}
	for count := 0; ; {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		top := stack[len(stack)-1]
		switch v := token.(type) {
		case xml.StartElement:
			if count++; count > nodesMax {
				return nil, fmt.Errorf("more than %d elements", nodesMax)
			}
			n := &node{name: v.Name, attr: slices.Clone(v.Attr)}
			top.children = append(top.children, n)
			stack = append(stack, n)
		case xml.EndElement:
			stack = stack[:len(stack)-1]
		case xml.CharData:
			top.text += string(v)
		}
	}
	if len(stack[0].children) != 1 {
		return nil, errors.New("there is no root element")
	}
	return stack[0].children[0], nil
}

// all gives the elements at the end of a path of local names.
func (n *node) all(path ...string) []*node {
	if len(path) == 0 {
		return []*node{n}
	}
	var out []*node
	for _, c := range n.children {
		if c.name.Local == path[0] {
			out = append(out, c.all(path[1:]...)...)
		}
	}
	return out
}

// value is the text of the first element at a path, "" if there is none.
func (n *node) value(path ...string) string {
	if f := n.all(path...); len(f) > 0 {
		return strings.TrimSpace(f[0].text)
	}
	return ""
}

// get is an attribute in a namespace.
func (n *node) get(space, local string) string {
	for _, a := range n.attr {
		if a.Name.Space == space && a.Name.Local == local {
			return a.Value
		}
	}
	return ""
}

func items(root *node, kind string) []*node {
	var out []*node
	for _, i := range root.all("VirtualSystem", "VirtualHardwareSection", "Item") {
		if i.value("ResourceType") == kind {
			out = append(out, i)
		}
	}
	return out
}

// disk finds the DiskSection's entry that an item means.
func disk(root, item *node) *node {
	id := hostResource.FindStringSubmatch(item.value("HostResource"))
	for _, d := range root.all("DiskSection", "Disk") {
		if id != nil && d.get(nsOVF, "diskId") == id[1] {
			return d
		}
	}
	return nil
}

var (
	hostResource = regexp.MustCompile(`^ovf:/disk/(\w+)$`)
	units        = regexp.MustCompile(`^byte \* 2\^([0-9]{1,2})$`)
	vmName       = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?$`)
)

// capacity is a disk's in bytes, -1 if it cannot be read.
func capacity(d *node) int64 {
	m := units.FindStringSubmatch(d.get(nsOVF, "capacityAllocationUnits"))
	n, err := strconv.ParseInt(d.get(nsOVF, "capacity"), 10, 32)
	if m == nil || err != nil || n <= 0 {
		return -1
	}
	shift, err := strconv.Atoi(m[1])
	if err != nil || shift > 31 {
		return -1
	}
	return n << shift
}

// references: every file is there, in order, as long as said, and a disk is a VMDK of the size said.
func (l *lint) references(root *node) {
	for i, f := range root.all("References", "File") {
		name := f.get(nsOVF, "href")
		e, ok := l.file(name)
		if !ok {
			l.add("file %s is referred to and not there", name)
			continue
		}
		l.want(strconv.FormatInt(e.size, 10) == f.get(nsOVF, "size"), "%s has %d bytes, the descriptor says %s", name, e.size, f.get(nsOVF, "size"))
		l.want(i+2 < len(l.files) && l.files[i+2].name == name, "%s is not in the order of the references", name)
		for _, d := range root.all("DiskSection", "Disk") {
			if d.get(nsOVF, "fileRef") != f.get(nsOVF, "id") {
				continue
			}
			layout, err := vmdk.Inspect(io.NewSectionReader(l.r, e.at, e.size), e.size, nil)
			if err != nil {
				l.add("%s: %v", name, err)
			} else {
				l.want(layout.Capacity == capacity(d), "%s is a disk of %d bytes, the descriptor says %d", name, layout.Capacity, capacity(d))
			}
		}
	}
}

// proxmox replays PVE::GuestImport::OVF.
func (l *lint) proxmox(root *node) {
	say := func(ok bool, format string, args ...any) { l.want(ok, "Proxmox VE: "+format, args...) }
	say(vmName.MatchString(root.value("VirtualSystem", "Name")), "%q is no name of a VM", root.value("VirtualSystem", "Name"))
	// findvalue joins the text of every match.
	for kind, what := range map[string]string{"3": "CPU", "4": "memory"} {
		joined := ""
		for _, i := range items(root, kind) {
			joined += i.value("VirtualQuantity")
		}
		n, err := strconv.Atoi(joined)
		say(err == nil && len(items(root, kind)) == 1 && n > 0, "%d items of %s read as %q", len(items(root, kind)), what, joined)
		if kind == "4" && len(items(root, kind)) > 0 {
			say(items(root, kind)[0].value("AllocationUnits") == "byte * 2^20", "memory is taken as MB whatever its unit")
		}
	}
	id := ""
	for _, s := range root.all("VirtualSystem", "OperatingSystemSection") {
		id = s.get(nsOVF, "id")
	}
	say(id == "96" || id == "101", "operating system %q is not known as Linux", id)
	parents := map[string]string{}
	for _, kind := range []string{"5", "6", "20"} {
		for _, i := range items(root, kind) {
			parents[i.value("InstanceID")] = kind
		}
	}
	kept := 0
	for _, i := range items(root, "17") {
		say(parents[i.value("Parent")] != "", "the controller of %s is none of IDE, SCSI, SATA", i.value("ElementName"))
		d := disk(root, i)
		if d == nil {
			say(false, "%s: HostResource %q leads to no disk", i.value("ElementName"), i.value("HostResource"))
			continue
		}
		say(capacity(d) > 0, "capacity of %s %s is not understood", d.get(nsOVF, "capacity"), d.get(nsOVF, "capacityAllocationUnits"))
		if d.get(nsOVF, "fileRef") == "" {
			say(i.get(nsOVF, "required") == "false", "%s has no file and is left out, but is required", i.value("ElementName"))
			continue
		}
		kept++
	}
	say(kept == 1, "%d disks with files", kept)
	for _, i := range items(root, "10") {
		say(slices.Contains([]string{"e1000", "e1000e", "vmxnet3"}, strings.ToLower(i.value("ResourceSubType"))), "network card %s becomes an e1000",
			i.value("ResourceSubType"))
	}
}

// xenOrchestra replays @xen-orchestra/vmdk-to-vhd's reading of an OVA.
func (l *lint) xenOrchestra(root *node) {
	say := func(ok bool, format string, args ...any) { l.want(ok, "Xen Orchestra: "+format, args...) }
	say(root.value("VirtualSystem", "VirtualHardwareSection", "System", "VirtualSystemIdentifier") != "", "the VM has no name (VirtualSystemIdentifier)")
	for _, i := range items(root, "10") {
		say(i.value("AutomaticAllocation") == "true", "%s is left out: it is not allocated by itself", i.value("ElementName"))
	}
	positions := map[string]bool{}
	for _, i := range items(root, "17") {
		at := i.value("Parent") + "/" + i.value("AddressOnParent")
		_, err := strconv.Atoi(i.value("AddressOnParent"))
		say(err == nil && !positions[at], "position %q of %s", at, i.value("ElementName"))
		positions[at] = true
	}
	var walk func(n *node)
	walk = func(n *node) {
		for _, a := range n.attr {
			say(a.Name.Space != "" || a.Name.Local == "xmlns" || n.name.Space != nsOVF, "attribute %s of %s has no prefix", a.Name.Local, n.name.Local)
		}
		for _, c := range n.children {
			walk(c)
		}
	}
	walk(root)
}

// vsphere is what vSphere, ESXi and ovftool are known to refuse.
func (l *lint) vsphere(root *node) {
	say := func(ok bool, format string, args ...any) { l.want(ok, "vSphere: "+format, args...) }
	say(root.name == xml.Name{Space: nsOVF, Local: "Envelope"}, "%v is no OVF 1.x", root.name)
	say(len(root.all("DeploymentOptionSection")) == 0, "sizes to choose from make other importers add them up")
	hardware := root.all("VirtualSystem", "VirtualHardwareSection")
	if len(hardware) != 1 {
		say(false, "%d hardware sections", len(hardware))
		return
	}
	transport := strings.Fields(hardware[0].get(nsOVF, "transport"))
	say(slices.Contains(transport, "com.vmware.guestInfo") && slices.Contains(transport, "iso"), "properties do not reach the guest by %v", transport)
	say(regexp.MustCompile(`^vmx-1[345]$`).MatchString(hardware[0].value("System", "VirtualSystemType")), "hardware version %q",
		hardware[0].value("System", "VirtualSystemType"))
	say(len(hardware[0].all("ExtraConfig")) == 0, "ExtraConfig is refused as a risk")
	for _, c := range hardware[0].all("Config") {
		say(c.name.Space == nsVMW && c.get(nsOVF, "required") == "false", "setting %s is not optional", c.get(nsVMW, "key"))
	}
	networks := map[string]int{}
	for _, n := range root.all("NetworkSection", "Network") {
		networks[n.get(nsOVF, "name")] = 0
	}
	for _, i := range items(root, "10") {
		if _, ok := networks[i.value("Connection")]; !ok {
			say(false, "%s is on the network %q, which is not declared", i.value("ElementName"), i.value("Connection"))
		}
		networks[i.value("Connection")]++
	}
	say(len(networks) == 2, "%d networks", len(networks))
	instances := map[string]bool{}
	for _, i := range hardware[0].all("Item") {
		id := i.value("InstanceID")
		say(id != "" && !instances[id], "instance id %q twice or empty", id)
		instances[id] = true
		last := ""
		for _, c := range i.children {
			say(c.name.Space == nsRASD && c.name.Local > last, "the elements of %s are not in the schema's order at %s", i.value("ElementName"), c.name.Local)
			last = c.name.Local
		}
	}
	for _, c := range hardware[0].all("System") {
		for _, e := range c.children {
			say(e.name.Space == nsVSSD, "%s in another namespace", e.name.Local)
		}
	}
	for _, p := range root.all("VirtualSystem", "ProductSection", "Property") {
		key := p.get(nsOVF, "key")
		say(p.get(nsOVF, "type") == "string" && p.get(nsOVF, "value") == "" && p.get(nsOVF, "qualifiers") == "" && p.get(nsOVF, "userConfigurable") == "true",
			"property %s must be an optional string that is set when it is deployed", key)
		say(strings.HasPrefix(key, "guestinfo.varve."), "property %s is not found by the appliance", key)
	}
}
