package doctor

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"varve/control/bytesize"
)

// Layout is where an appliance's parts lie, for the checks that what is put together does not lose data or come to a halt.
type Layout struct {
	Data  string
	Cache string
	// Backends are the directories of local backends.
	Backends []string
	// Budgets are what map and cache may take of the memory.
	Budgets int64
}

// Sizes of the sizing page (README): below them guests notice.
const (
	layoutMemoryFail = 2 << 30
	layoutMemoryWarn = 4 << 30
	layoutHeadroom   = 1 << 30 // beside map and cache: requests in flight, destaging, the system
	layoutDiskWarn   = 32 << 30
)

// Layouts gives the checks of a layout.
func Layouts(l Layout) []Check {
	const limit = 10 * time.Second
	return []Check{
		{"layout.self", "the appliance does not lie on what it serves", limit, func(context.Context) Finding { return servesItself(l) }},
		{"layout.disk", "disks of log, cache and backends", limit, func(context.Context) Finding { return disksOf(l) }},
		{"layout.memory", "memory for the budgets that are set", limit, func(context.Context) Finding {
			total, err := memTotal()
			if err != nil {
				return Finding{Warn, err.Error(), "mount /proc"}
			}
			return memoryOf(l, total)
		}},
	}
}

func memTotal() (int64, error) {
	var s unix.Sysinfo_t
	if err := unix.Sysinfo(&s); err != nil {
		return 0, fmt.Errorf("sysinfo: %w", err)
	}
	return int64(s.Totalram) * int64(s.Unit), nil
}

func memoryOf(l Layout, total int64) Finding {
	need := l.Budgets + layoutHeadroom
	f := Finding{OK, fmt.Sprintf("%s of memory; map and cache may take %s of it", bytesize.Format(total), bytesize.Format(l.Budgets)), ""}
	switch {
	case total < need:
		f.Status, f.Remedy = Fail, fmt.Sprintf("lower --map-size and --cache-ram, or give the appliance %s", bytesize.Format(need))
	case total < layoutMemoryFail:
		f.Status, f.Remedy = Fail, "an appliance needs 2 GiB, and 4 GiB to be quick: see Sizing in the README"
	case total < layoutMemoryWarn:
		f.Status, f.Remedy = Warn, "give it 4 GiB: see Sizing in the README"
	}
	return f
}

// disksOf judges on which disks the parts lie.
func disksOf(l Layout) Finding {
	uses := []Use{{l.Data, "log"}}
	if l.Cache != "" {
		uses = append(uses, Use{l.Cache, "cache"})
	}
	for _, b := range l.Backends {
		uses = append(uses, Use{b, "backend"})
	}
	disks, err := Disks(uses)
	if err != nil {
		return Finding{Warn, err.Error(), "mount /proc and /sys"}
	}
	return judge(disks)
}

// judge looks at disks with their roles.
func judge(disks []BlockDevice) Finding {
	f := Finding{Status: OK}
	worse := func(s Status, evidence, remedy string) {
		if s == Fail || f.Status == OK {
			f.Status = s
		}
		f.Evidence = strings.TrimPrefix(f.Evidence+"; "+evidence, "; ")
		f.Remedy = strings.TrimPrefix(f.Remedy+"; "+remedy, "; ")
	}
	var plain []string
	for _, d := range disks {
		if len(d.Roles) == 0 {
			continue
		}
		has := func(role string) bool { return slices.Contains(d.Roles, role) }
		what := fmt.Sprintf("%s (%s, %s) has %s", d.Device, d.Kind, bytesize.Format(d.Size), strings.Join(d.Roles, ", "))
		switch {
		case d.Kind == "hdd" && has("log") && has("backend"):
			worse(Fail, what, "log and backend on one rotating disk move its heads between them with every flush: put the log (--data) on an SSD")
		case d.Kind == "hdd" && has("log"):
			worse(Warn, what, "put the log (--data) on an SSD: every flush of every guest waits for it")
		case d.Kind == "hdd" && has("cache"):
			worse(Warn, what, "a cache on a rotating disk is slower than most backends: give --cache-dir on an SSD, or --cache-bytes 0")
		case has("log") && d.Size < layoutDiskWarn:
			worse(Warn, what, "give the data disk 64 GiB or more: log, map and cache lie there")
		default:
			plain = append(plain, what)
		}
	}
	if f.Status == OK {
		f.Evidence = strings.Join(plain, "; ")
		if f.Evidence == "" {
			f.Evidence = "nothing is there yet"
		}
	}
	return f
}

// servesItself finds parts on a mount of NFS, or an NBD device, of this very machine: it would wait for itself.
func servesItself(l Layout) Finding {
	own, err := ownAddresses()
	if err != nil {
		return Finding{Warn, err.Error(), "mount /proc"}
	}
	mounts, err := nfsMounts("/proc/self/mounts")
	if err != nil {
		return Finding{Warn, err.Error(), "mount /proc"}
	}
	return circle(append([]string{l.Data, l.Cache}, l.Backends...), mounts, own)
}

// nfsMount is a mount of a server's export.
type nfsMount struct{ host, point, source string }

func circle(paths []string, mounts []nfsMount, own []string) Finding {
	for _, p := range paths {
		if p == "" {
			continue
		}
		abs, err := filepath.Abs(p)
		if err != nil {
			return failed(err, "give another directory")
		}
		best := nfsMount{}
		for _, m := range mounts {
			if (abs == m.point || strings.HasPrefix(abs, strings.TrimSuffix(m.point, "/")+"/")) && len(m.point) > len(best.point) {
				best = m
			}
		}
		if best.point != "" && (strings.HasPrefix(best.source, "/dev/nbd") || slices.Contains(own, best.host)) {
			return Finding{Fail, fmt.Sprintf("%s lies on %s, which this machine serves itself", p, best.source),
				"put it on a disk of this machine: it would wait for itself at the first flush, and could not start without itself"}
		}
	}
	return Finding{OK, "on disks of its own", ""}
}

func ownAddresses() ([]string, error) {
	list, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	out := []string{"localhost"}
	if name, err := os.Hostname(); err == nil {
		out = append(out, name)
	}
	for _, a := range list {
		if n, ok := a.(*net.IPNet); ok {
			out = append(out, n.IP.String())
		}
	}
	return out, nil
}

// nfsMounts are the mounts that come over NFS or from an NBD device, and all others, which may lie on top of them.
func nfsMounts(path string) ([]nfsMount, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var out []nfsMount
	s := bufio.NewScanner(f)
	for s.Scan() && len(out) < mountsMax {
		w := strings.Fields(s.Text())
		if len(w) < 3 {
			continue
		}
		m := nfsMount{source: w[0], point: strings.ReplaceAll(w[1], `\040`, " ")}
		if strings.HasPrefix(w[2], "nfs") {
			if i := strings.LastIndex(w[0], ":/"); i > 0 {
				m.host = strings.Trim(w[0][:i], "[]")
			}
		}
		out = append(out, m)
	}
	return out, s.Err()
}
