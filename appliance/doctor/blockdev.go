package doctor

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// BlockDevice is a disk of this machine. Used and Free are those of the file systems that are mounted from it.
type BlockDevice struct {
	Device, Kind, Model, Serial string
	Size, Used, Free            int64
	Roles, Mounts               []string
}

// Use says what a path is for.
type Use struct{ Path, Role string }

const (
	sysBlock       = "/sys/block"
	mountInfo      = "/proc/self/mountinfo"
	mountsMax      = 4096
	textBytesMax   = 256
	sectorBytes    = 512
	virtualDevices = "loop ram zram nbd fd sr dm- md"
)

// Disks lists this machine's disks and which of them the paths are on. Loop devices and the like are left out; a path that is on none of the
// disks (a network file system, a memory file system, a volume manager's device) makes an entry of its file system's own.
func Disks(uses []Use) ([]BlockDevice, error) {
	entries, err := os.ReadDir(sysBlock)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list disks: %w", err)
	}
	var out []*BlockDevice
	byName := make(map[string]*BlockDevice)
	for _, e := range entries {
		name := e.Name()
		if slices.ContainsFunc(strings.Fields(virtualDevices), func(p string) bool { return strings.HasPrefix(name, p) }) {
			continue
		}
		at := filepath.Join(sysBlock, name)
		sectors, err := strconv.ParseInt(sysText(at, "size"), 10, 64)
		if err != nil || sectors == 0 {
			continue // no medium
		}
		d := &BlockDevice{Device: name, Kind: "hdd", Size: sectors * sectorBytes, Model: sysText(at, "device/model"), Serial: sysText(at, "device/serial")}
		switch {
		case strings.HasPrefix(name, "nvme"):
			d.Kind = "nvme"
		case strings.HasPrefix(name, "vd"), strings.HasPrefix(name, "xvd"), strings.Contains(strings.ToLower(d.Model), "virtual"), strings.HasPrefix(d.Model, "QEMU"):
			d.Kind = "virtual"
		case sysText(at, "queue/rotational") == "0":
			d.Kind = "ssd"
		}
		out = append(out, d)
		byName[name] = d
	}
	on := func(dev uint64, source string) *BlockDevice {
		for _, name := range diskOf(dev) {
			if d := byName[name]; d != nil {
				return d
			}
		}
		if byName[source] == nil {
			d := &BlockDevice{Device: source, Kind: "virtual"}
			out = append(out, d)
			byName[source] = d
		}
		return byName[source]
	}
	mounts, err := mountsOf()
	if err != nil {
		return nil, err
	}
	seen := make(map[uint64]bool)
	for _, m := range mounts {
		if len(diskOf(m.dev)) == 0 {
			continue // not of a disk; told below if it is used
		}
		d := on(m.dev, m.source)
		if !slices.Contains(d.Mounts, m.point) {
			d.Mounts = append(d.Mounts, m.point)
		}
		room(d, m.dev, m.point, seen)
	}
	for _, u := range uses {
		var st unix.Stat_t
		if unix.Stat(u.Path, &st) != nil {
			continue // not there yet
		}
		source := "unknown"
		for _, m := range mounts {
			if m.dev == st.Dev {
				source = m.source
			}
		}
		d := on(st.Dev, source)
		if !slices.Contains(d.Roles, u.Role) {
			d.Roles = append(d.Roles, u.Role)
		}
		room(d, st.Dev, u.Path, seen)
	}
	list := make([]BlockDevice, len(out))
	for i, d := range out {
		slices.Sort(d.Roles)
		list[i] = *d
	}
	slices.SortFunc(list, func(a, b BlockDevice) int { return strings.Compare(a.Device, b.Device) })
	return list, nil
}

// room adds a file system's figures to its disk's, once.
func room(d *BlockDevice, dev uint64, path string, seen map[uint64]bool) {
	var st unix.Statfs_t
	if seen[dev] || unix.Statfs(path, &st) != nil {
		return
	}
	seen[dev] = true
	d.Used += int64(st.Blocks-st.Bfree) * st.Bsize
	d.Free += int64(st.Bavail) * st.Bsize
	if d.Size < d.Used+d.Free {
		d.Size = d.Used + d.Free
	}
}

func sysText(dir, name string) string {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return ""
	}
	return strings.ToValidUTF8(strings.TrimSpace(string(b[:min(len(b), textBytesMax)])), "?")
}

// diskOf names the disks that a device number stands for: those below a partition, or a device of a volume manager.
func diskOf(dev uint64) []string {
	at, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(dev), unix.Minor(dev)))
	if err != nil {
		return nil
	}
	if _, err := os.Stat(filepath.Join(at, "partition")); err == nil {
		at = filepath.Dir(at)
	}
	names := []string{filepath.Base(at)}
	below, err := os.ReadDir(filepath.Join(at, "slaves"))
	if err != nil {
		return names
	}
	for _, s := range below {
		names = append(names, s.Name())
		if parent, err := filepath.EvalSymlinks(filepath.Join("/sys/class/block", s.Name(), "..")); err == nil {
			names = append(names, filepath.Base(parent)) // of a partition
		}
	}
	return names
}

type mountPoint struct {
	dev           uint64
	point, source string
}

// mountsOf reads /proc/self/mountinfo, proc(5).
func mountsOf() ([]mountPoint, error) {
	f, err := os.Open(mountInfo)
	if err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	defer f.Close()
	var out []mountPoint
	in := bufio.NewScanner(f)
	for in.Scan() && len(out) < mountsMax {
		before, after, ok := strings.Cut(in.Text(), " - ")
		fields, rest := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 5 || len(rest) < 2 {
			continue
		}
		major, minor, _ := strings.Cut(fields[2], ":")
		a, err1 := strconv.ParseUint(major, 10, 32)
		b, err2 := strconv.ParseUint(minor, 10, 32)
		if err1 != nil || err2 != nil {
			continue
		}
		out = append(out, mountPoint{unix.Mkdev(uint32(a), uint32(b)), strings.ReplaceAll(fields[4], `\040`, " "), rest[1]})
	}
	return out, in.Err()
}
