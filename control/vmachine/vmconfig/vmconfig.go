// Package vmconfig reads the files in which hypervisors describe VMs, and rewrites them for a copy of the VM: VMware's .vmx with
// the .vmdk descriptors that it names, and libvirt's domain XML. The files are a guest administrator's, so nothing about them
// is trusted: size, lines, depth, number of devices and length of texts are bounded, and a file that is none of these is
// ErrNoVM, not a VM without disks.
//
//	c, err := vmconfig.Parse(vmconfig.VMX or vmconfig.Libvirt, b)        Config: name, uuid, guest, cpus, memory, disks in their order
//	d, err := vmconfig.ParseDescriptor(b)                                the extents and the parent of a .vmdk
//	b, err = vmconfig.Rewrite(format, b, vmconfig.Copy{Name, UUID, Files})
//	b, err = vmconfig.RewriteDescriptor(b, files)
//
// Rewriting changes what makes a VM itself (name, ids, MAC addresses, paths of its disks) and keeps every other byte: elements
// and keys that this package does not know are the hypervisor's.
//
//	.vmx          lines of  key = "value"; | introduces two hex digits in a value; keys in any case; the last one of a key counts
//	.vmdk         text: "# Disk DescriptorFile", key=value lines, extents:  RW 20971520 VMFS "x-flat.vmdk" [offset]
//	domain XML    <domain type=…><name/><uuid/><memory unit=…/><vcpu/><devices><disk device="disk"><source …/><target dev=…/></disk>…
package vmconfig

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/google/uuid"
)

// Formats of files.
const (
	VMX     = "vmx"
	Libvirt = "libvirt"
)

// Limits of a file.
const (
	FileBytesMax       = 1 << 20
	DescriptorBytesMax = 64 << 10
	linesMax           = 20_000
	textBytesMax       = 1024
	nameBytesMax       = 255
	disksMax           = 256
	depthMax           = 64
	tokensMax          = 200_000
)

// ErrNoVM: the file does not describe a VM.
var ErrNoVM = errors.New("not a description of a VM")

// Config is what a file says of a VM.
type Config struct {
	Name   string
	UUID   string // canonical, "" where the file has none
	Guest  string
	VCPUs  int
	Memory int64 // bytes
	Disks  []Disk
}

// Kinds of places of a disk.
const (
	InFile    = "file"   // File is a path, absolute on the host or relative to the describing file
	OnNBD     = "nbd"    // File is an export's name
	InPool    = "pool"   // File is "pool/volume" of the hypervisor's storage
	Elsewhere = "device" // a device, or a protocol that no vPool speaks
)

// Disk is one of a VM: Label is how the VM sees it ("scsi0:0", "vda"), File where it is, read as Kind says.
type Disk struct {
	Label string
	Kind  string
	File  string
}

// Parse reads a describing file.
func Parse(format string, b []byte) (Config, error) {
	if len(b) > FileBytesMax {
		return Config{}, fmt.Errorf("%d bytes, more than %d: %w", len(b), FileBytesMax, ErrNoVM)
	}
	var c Config
	var err error
	switch format {
	case VMX:
		c, err = parseVMX(b)
	case Libvirt:
		c, err = parseDomain(b)
	default:
		err = fmt.Errorf("format %q: %w", format, ErrNoVM)
	}
	if err != nil {
		return Config{}, err
	}
	c.Name, c.Guest = text(c.Name, nameBytesMax), text(c.Guest, nameBytesMax)
	for i := range c.Disks {
		c.Disks[i].Label = text(c.Disks[i].Label, nameBytesMax)
	}
	return c, nil
}

// Copy says what is another in a copy of a VM.
type Copy struct {
	Name string
	UUID uuid.UUID
	// Files has the new places of disks by the old ones, as Disk.File has them.
	Files map[string]string
}

// Rewrite makes the describing file of a copy.
func Rewrite(format string, b []byte, c Copy) ([]byte, error) {
	if _, err := Parse(format, b); err != nil {
		return nil, err
	}
	if format == VMX {
		return rewriteVMX(b, c), nil
	}
	return rewriteDomain(b, c)
}

// text makes a printable line of at most a number of bytes of what a file says.
func text(s string, most int) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "\uFFFD"))
	s = strings.TrimSpace(s)
	for len(s) > most {
		_, n := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-n]
	}
	return s
}

// canonicalUUID reads a UUID in any form that hypervisors write: "56 4d 9b … - …" too. It is "" for what is none.
func canonicalUUID(s string) string {
	var hex []byte
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == ' ' || c == '-':
		case len(hex) == 32:
			return ""
		default:
			hex = append(hex, c)
		}
	}
	if len(hex) != 32 {
		return ""
	}
	id, err := uuid.ParseBytes(hex)
	if err != nil {
		return ""
	}
	return id.String()
}

// SameMachine compares ids of hypervisors. vSphere gives the first three fields of a UUID in the other byte order at times.
func SameMachine(a, b string) bool {
	x, errX := uuid.Parse(a)
	y, errY := uuid.Parse(b)
	if errX != nil || errY != nil {
		return false
	}
	if x == y {
		return true
	}
	y[0], y[1], y[2], y[3] = y[3], y[2], y[1], y[0]
	y[4], y[5], y[6], y[7] = y[5], y[4], y[7], y[6]
	return x == y
}

// lines yields the lines of a text file without their ends.
func lines(b []byte, f func(line string) error) error {
	for n := 0; len(b) > 0; n++ {
		if n == linesMax {
			return fmt.Errorf("more than %d lines: %w", linesMax, ErrNoVM)
		}
		line, rest, _ := bytes.Cut(b, []byte("\n"))
		b = rest
		if err := f(strings.TrimSuffix(string(line), "\r")); err != nil {
			return err
		}
	}
	return nil
}
