package vmconfig

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// device is the key of something that can be a disk.
var device = regexp.MustCompile(`^(scsi|sata|ide|nvme)([0-9]{1,2}):([0-9]{1,3})\.(filename|devicetype|present)$`)

// setting reads a line of a .vmx; ok is false for comments and for what is none.
func setting(line string) (key, value string, ok bool) {
	line = strings.TrimSpace(line)
	if line == "" || line[0] == '#' {
		return "", "", false
	}
	key, value, ok = strings.Cut(line, "=")
	key, value = strings.TrimSpace(key), strings.TrimSpace(value)
	if !ok || key == "" || len(key) > nameBytesMax || strings.ContainsAny(key, " \t\"") || len(value) < 2 || value[0] != '"' || value[len(value)-1] != '"' {
		return "", "", false
	}
	return strings.ToLower(key), unescape(value[1 : len(value)-1]), true
}

// unescape undoes |XX. Bytes that are not UTF-8 are taken for Windows-1252's Latin part, the other encoding of these files.
func unescape(s string) string {
	var b []byte
	for i := 0; i < len(s); i++ {
		if s[i] == '|' && i+2 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+3], 16, 8); err == nil {
				b = append(b, byte(n))
				i += 2
				continue
			}
		}
		b = append(b, s[i])
	}
	if utf8.Valid(b) {
		return string(b)
	}
	var out strings.Builder
	for _, c := range b {
		out.WriteRune(rune(c))
	}
	return out.String()
}

func escape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if c := s[i]; c < ' ' || c == '"' || c == '|' || c == 0x7f {
			fmt.Fprintf(&b, "|%02X", c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

type vmxDevice struct {
	bus       string
	ctrl, num int
	values    map[string]string
}

func parseVMX(b []byte) (Config, error) {
	var c Config
	devices := make(map[string]*vmxDevice)
	settings := 0
	known := false
	err := lines(b, func(line string) error {
		key, value, ok := setting(line)
		if !ok {
			return nil
		}
		settings++
		switch key {
		case "config.version", "virtualhw.version", "displayname", "guestos":
			known = true
		}
		switch key {
		case "displayname":
			c.Name = value
		case "guestos":
			c.Guest = value
		case "uuid.bios":
			c.UUID = canonicalUUID(value)
		case "memsize":
			if n, err := strconv.ParseInt(value, 10, 64); err == nil && n >= 0 && n < 1<<30 {
				c.Memory = n << 20
			}
		case "numvcpus":
			if n, err := strconv.Atoi(value); err == nil && n >= 0 && n < 1<<16 {
				c.VCPUs = n
			}
		}
		m := device.FindStringSubmatch(key)
		if m == nil {
			return nil
		}
		name := m[1] + m[2] + ":" + m[3]
		d := devices[name]
		if d == nil {
			if len(devices) == 4*disksMax {
				return fmt.Errorf("more than %d devices: %w", 4*disksMax, ErrNoVM)
			}
			d = &vmxDevice{bus: m[1], values: make(map[string]string)}
			d.ctrl, _ = strconv.Atoi(m[2])
			d.num, _ = strconv.Atoi(m[3])
			devices[name] = d
		}
		d.values[m[4]] = value
		return nil
	})
	if err != nil {
		return Config{}, err
	}
	if settings == 0 || !known {
		return Config{}, fmt.Errorf("no line of it is a VM's: %w", ErrNoVM)
	}
	if c.VCPUs == 0 {
		c.VCPUs = 1 // what a missing line means
	}
	for _, d := range sorted(devices) {
		if !d.disk() {
			continue
		}
		file := d.values["filename"]
		if len(file) > textBytesMax || len(c.Disks) == disksMax {
			return Config{}, fmt.Errorf("more than %d disks, or a path of more than %d bytes: %w", disksMax, textBytesMax, ErrNoVM)
		}
		c.Disks = append(c.Disks, Disk{Label: fmt.Sprintf("%s%d:%d", d.bus, d.ctrl, d.num), Kind: InFile, File: file})
	}
	return c, nil
}

func sorted(devices map[string]*vmxDevice) []*vmxDevice {
	var out []*vmxDevice
	for _, d := range devices {
		out = append(out, d)
	}
	bus := []string{"scsi", "nvme", "sata", "ide"}
	slices.SortFunc(out, func(a, b *vmxDevice) int {
		if a.bus != b.bus {
			return slices.Index(bus, a.bus) - slices.Index(bus, b.bus)
		}
		if a.ctrl != b.ctrl {
			return a.ctrl - b.ctrl
		}
		return a.num - b.num
	})
	return out
}

// disk tells a disk from a drive for CDs and from a device that is only prepared.
func (d *vmxDevice) disk() bool {
	file, typ := strings.ToLower(d.values["filename"]), strings.ToLower(d.values["devicetype"])
	if strings.EqualFold(d.values["present"], "false") || file == "" || strings.Contains(typ, "cdrom") || strings.Contains(typ, "passthru") {
		return false
	}
	return strings.HasSuffix(file, ".vmdk") || strings.HasSuffix(file, ".raw")
}

// what a copy must not share with the VM that it is made from: ids, addresses, names of files that the hypervisor makes anew.
var ofTheOriginal = regexp.MustCompile(`^(uuid\.bios|uuid\.location|vc\.uuid|vm\.genid|vm\.genidx|migrate\.hostlog|sched\.swap\.derivedname|` +
	`extendedconfigfile|nvram|vmotion\.checkpoint.*|checkpoint\.vmstate|ethernet[0-9]+\.(generatedaddress|generatedaddressoffset|address|addresstype))$`)

func rewriteVMX(b []byte, c Copy) []byte {
	var out strings.Builder
	named := false
	put := func(key, value string) { fmt.Fprintf(&out, "%s = \"%s\"\n", key, escape(value)) }
	_ = lines(b, func(line string) error { // Parse has been through it
		key, value, ok := setting(line)
		m := device.FindStringSubmatch(key)
		switch {
		case !ok:
			out.WriteString(line + "\n")
		case key == "displayname":
			named = true
			put("displayName", c.Name)
		case key == "uuid.action":
		case ofTheOriginal.MatchString(key):
		case m != nil && m[4] == "filename" && c.Files[value] != "":
			name, _, _ := strings.Cut(strings.TrimSpace(line), "=")
			put(strings.TrimSpace(name), c.Files[value])
		default:
			out.WriteString(line + "\n")
		}
		return nil
	})
	if !named {
		put("displayName", c.Name)
	}
	put("uuid.bios", vmxUUID(c.UUID[:]))
	put("uuid.location", vmxUUID(c.UUID[:]))
	put("uuid.action", "keep")
	for i := range 10 {
		// A card without an address gets a fresh one at the next start.
		if strings.Contains(strings.ToLower(string(b)), fmt.Sprintf("ethernet%d.present", i)) {
			put(fmt.Sprintf("ethernet%d.addressType", i), "generated")
		}
	}
	return []byte(out.String())
}

// vmxUUID writes "56 4d 9b 2a 51 1e 0f 7e-1c d0 …".
func vmxUUID(id []byte) string {
	var b strings.Builder
	for i, c := range id {
		switch {
		case i == 8:
			b.WriteByte('-')
		case i > 0:
			b.WriteByte(' ')
		}
		fmt.Fprintf(&b, "%02x", c)
	}
	return b.String()
}

// Descriptor is what a .vmdk that is text says.
type Descriptor struct {
	// Extents are the files with the disk's bytes.
	Extents []string
	// Flat says that they are nothing but bytes: what a vDisk is.
	Flat bool
	// Parent is the descriptor that this one is a layer on, "" where it is none.
	Parent string
}

var extent = regexp.MustCompile(`^\s*(RW|RDONLY|NOACCESS)\s+([0-9]{1,19})\s+([A-Z0-9]{1,20})\s+"([^"]+)"(\s+[0-9]+)?\s*$`)

// ParseDescriptor reads a .vmdk descriptor.
func ParseDescriptor(b []byte) (Descriptor, error) {
	var d Descriptor
	if len(b) > DescriptorBytesMax {
		return d, fmt.Errorf("descriptor of %d bytes, more than %d: %w", len(b), DescriptorBytesMax, ErrNoVM)
	}
	first, isDescriptor := true, false
	d.Flat = true
	err := lines(b, func(line string) error {
		if first && strings.TrimSpace(line) != "" {
			first = false
			isDescriptor = strings.EqualFold(strings.TrimSpace(line), "# Disk DescriptorFile")
			if !isDescriptor {
				return fmt.Errorf("its first line is none of a descriptor: %w", ErrNoVM)
			}
		}
		if m := extent.FindStringSubmatch(line); m != nil {
			if len(d.Extents) == disksMax || len(m[4]) > textBytesMax {
				return fmt.Errorf("more than %d extents, or a path of more than %d bytes: %w", disksMax, textBytesMax, ErrNoVM)
			}
			d.Extents = append(d.Extents, strings.ToValidUTF8(m[4], "\uFFFD"))
			d.Flat = d.Flat && (m[3] == "VMFS" || m[3] == "FLAT")
			return nil
		}
		key, value, ok := strings.Cut(line, "=")
		if ok && strings.EqualFold(strings.TrimSpace(key), "parentFileNameHint") {
			d.Parent = strings.ToValidUTF8(strings.Trim(strings.TrimSpace(value), `"`), "\uFFFD")
			if len(d.Parent) > textBytesMax {
				return fmt.Errorf("its parent's name has %d bytes: %w", len(d.Parent), ErrNoVM)
			}
		}
		return nil
	})
	if err == nil && !isDescriptor {
		err = fmt.Errorf("empty: %w", ErrNoVM)
	}
	if err != nil {
		return Descriptor{}, err
	}
	return d, nil
}

// RewriteDescriptor makes the descriptor of a copy of a disk, whose extents are other files.
func RewriteDescriptor(b []byte, files map[string]string) ([]byte, error) {
	if _, err := ParseDescriptor(b); err != nil {
		return nil, err
	}
	var out strings.Builder
	err := lines(b, func(line string) error {
		key, _, _ := strings.Cut(line, "=")
		if strings.EqualFold(strings.TrimSpace(key), "ddb.uuid") {
			return nil // the hypervisor gives it one of its own
		}
		if at := extent.FindStringSubmatchIndex(line); at != nil {
			to, ok := files[line[at[8]:at[9]]]
			if !ok || strings.ContainsAny(to, "\"\r\n") {
				return fmt.Errorf("extent %.80q has no copy", line[at[8]:at[9]])
			}
			line = line[:at[8]] + to + line[at[9]:]
		}
		out.WriteString(line + "\n")
		return nil
	})
	if err != nil {
		return nil, err
	}
	return []byte(out.String()), nil
}
