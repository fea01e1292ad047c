package doctor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	filesFail, filesWarn = 1024, 65_536
	memoryFail           = 256 << 20
	memoryWarn           = 1 << 30
)

// Host gives the checks of the machine.
func Host() []Check {
	const limit = 5 * time.Second
	return []Check{
		{"host.clock", "clock is kept by NTP", limit, func(context.Context) Finding { return clock() }},
		{"host.files", "limit of open files", limit, func(context.Context) Finding { return files() }},
		{"host.memory", "memory for maps and buffers", limit, func(context.Context) Finding { return memory() }},
	}
}

func clock() Finding {
	var t unix.Timex
	if _, err := unix.Adjtimex(&t); err != nil {
		return Finding{Warn, fmt.Sprintf("adjtimex: %v", err), "allow this process to read the clock's state"}
	}
	now := time.Now().UTC()
	if now.Year() < 2024 {
		return Finding{Fail, "the clock says " + now.Format(time.RFC3339), "set the clock; certificates and file times depend on it"}
	}
	if t.Status&unix.STA_UNSYNC != 0 {
		return Finding{Warn, "the kernel says that nothing keeps the clock", "run chrony or systemd-timesyncd"}
	}
	return Finding{OK, fmt.Sprintf("synchronised, estimated error %s", time.Duration(t.Esterror)*time.Microsecond), ""}
}

func files() Finding {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return failed(fmt.Errorf("getrlimit: %w", err), "allow this process to read its limits")
	}
	f := Finding{OK, fmt.Sprintf("up to %d open files", r.Max), ""}
	const remedy = "raise it: LimitNOFILE=1048576 in the unit, or ulimit -n; each connection and each object in use takes one"
	switch {
	case r.Max < filesFail:
		f.Status, f.Remedy = Fail, remedy
	case r.Max < filesWarn:
		f.Status, f.Remedy = Warn, remedy
	}
	return f
}

// memory takes the smaller of what the machine has available and what the control group still allows.
func memory() Finding {
	avail, err := memAvailable()
	if err != nil {
		return Finding{Warn, err.Error(), "mount /proc"}
	}
	where := "machine"
	if room, ok := cgroupRoom(); ok && room < avail {
		avail, where = room, "control group"
	}
	f := Finding{OK, fmt.Sprintf("%.1f GiB available in the %s", gib(avail), where), ""}
	const remedy = "give the appliance at least 1 GiB: it keeps up to 256 MiB of requests in flight beside the block map's budget"
	switch {
	case avail < memoryFail:
		f.Status, f.Remedy = Fail, remedy
	case avail < memoryWarn:
		f.Status, f.Remedy = Warn, remedy
	}
	return f
}

func memAvailable() (uint64, error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(b) {
		if fields := strings.Fields(string(line)); len(fields) >= 2 && fields[0] == "MemAvailable:" {
			n, err := strconv.ParseUint(fields[1], 10, 54)
			return n << 10, err
		}
	}
	return 0, errors.New("/proc/meminfo has no MemAvailable")
}

func cgroupRoom() (uint64, bool) {
	limit, ok := readNumber("/sys/fs/cgroup/memory.max")
	if !ok {
		return 0, false
	}
	used, ok := readNumber("/sys/fs/cgroup/memory.current")
	if !ok {
		return 0, false
	}
	return limit - min(used, limit), true
}

func readNumber(path string) (uint64, bool) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	return n, err == nil
}
