package harness

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// HostAddr is this machine's loopback as a guest sees it through QEMU's user network.
const HostAddr = "10.0.2.2"

// earlyModules are loaded by every guest, wantedModules may be loaded by a job; both with what they depend on.
var (
	earlyModules  = []string{"virtio_pci", "virtio_blk", "virtio_net", "virtio_rng", "crc32c_generic", "ext4"}
	wantedModules = []string{"nbd", "nfs", "nfsv3", "loop"}
)

// programs of the host that a guest's job may call; busybox gives the shell and the rest.
var guestPrograms = []string{"nbd-client", "fio", "mke2fs", "e2fsck", "mount.nfs", "fstrim", "nbdkit"}

const guestInit = `#!/bin/busybox sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
busybox mount -t proc p /proc; busybox mount -t sysfs s /sys; busybox mount -t devtmpfs d /dev
busybox mkdir -p /tmp /run /mnt /var/lib/nfs /dev/shm; busybox mount -t tmpfs t /dev/shm
busybox --install -s /bin
ln -sf /proc/self/fd /dev/fd
load() {
	while read -r m; do
		grep -q "^${m%.ko} " /proc/modules || insmod /modules/"$m" || echo "GUEST: insmod $m failed"
	done < "/modules/$1.order"
}
load early
ip link set lo up
if [ -e /sys/class/net/eth0 ]; then ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up; ip route add default via 10.0.2.2; fi
echo "GUEST-UP $(cut -d' ' -f1 /proc/uptime)"
( . /job.sh )
rc=$?
echo "GUEST-RC $rc"
poweroff -f
`

// moduleDependencies reads modules.dep of the guest's kernel.
func moduleDependencies() (map[string]string, map[string][]string, error) {
	f, err := os.Open(Cache("guest/modules/modules.dep"))
	if err != nil {
		return nil, nil, fmt.Errorf("%w; `make setup` fetches the guest's kernel", err)
	}
	defer f.Close()
	path, needs := map[string]string{}, map[string][]string{}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		file, rest, _ := strings.Cut(lines.Text(), ":")
		name := moduleName(file)
		path[name] = file
		for _, d := range strings.Fields(rest) {
			needs[name] = append(needs[name], moduleName(d))
		}
	}
	return path, needs, lines.Err()
}

func moduleName(file string) string {
	base := filepath.Base(file)
	return strings.ReplaceAll(base[:strings.IndexByte(base, '.')], "-", "_")
}

// modules stores the named modules and gives the order in which to load them. Those built into the kernel are left out.
func (c *cpio) modules(list, already []string) ([]string, error) {
	path, needs, err := moduleDependencies()
	if err != nil {
		return nil, err
	}
	order := slices.Clone(already)
	var add func(name string) error
	add = func(name string) error {
		if slices.Contains(order, name+".ko") || path[name] == "" {
			return nil
		}
		for _, d := range needs[name] {
			if err := add(d); err != nil {
				return err
			}
		}
		if !c.have["/modules/"+name+".ko"] {
			data, err := os.ReadFile(Cache("guest/modules/" + path[name]))
			if err != nil {
				return err
			}
			c.file("/modules/"+name+".ko", 0o644, data)
		}
		order = append(order, name+".ko")
		return nil
	}
	for _, name := range list {
		if err := add(name); err != nil {
			return nil, err
		}
	}
	return order[len(already):], nil
}

// base is what every initramfs here begins with: busybox and the early modules.
func base() (*cpio, []string, error) {
	c := newCPIO()
	for _, d := range []string{"/proc", "/sys", "/dev", "/bin", "/sbin", "/modules", "/etc", "/new"} {
		c.dir(d)
	}
	c.node("/dev/console", 0o020600, 5, 1, nil)
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return nil, nil, err
	}
	c.file("/bin/busybox", 0o755, busybox)
	c.symlink("/bin/sh", "busybox")
	order, err := c.modules(earlyModules, nil)
	if err != nil {
		return nil, nil, err
	}
	c.file("/modules/early.order", 0o644, []byte(strings.Join(order, "\n")+"\n"))
	return c, order, nil
}

// guestImage makes the initramfs that all guest jobs share and gives its path.
func guestImage(dir string) (string, error) {
	c, early, err := base()
	if err != nil {
		return "", err
	}
	for _, m := range wantedModules {
		order, err := c.modules([]string{m}, early)
		if err != nil {
			return "", err
		}
		c.file("/modules/"+m+".order", 0o644, []byte(strings.Join(order, "\n")+"\n"))
	}
	for _, p := range guestPrograms {
		if err := c.program(p); err != nil {
			return "", err
		}
	}
	if plugins, _ := filepath.Glob("/usr/lib/x86_64-linux-gnu/nbdkit/plugins/nbdkit-file-plugin.so"); len(plugins) == 1 {
		if err := c.copyELF(plugins[0], plugins[0]); err != nil {
			return "", err
		}
	}
	c.file("/etc/protocols", 0o644, []byte("ip 0 IP\nicmp 1 ICMP\ntcp 6 TCP\nudp 17 UDP\n"))
	c.file("/etc/services", 0o644, []byte("sunrpc 111/tcp\nnfs 2049/tcp\n"))
	c.file("/etc/netconfig", 0o644, []byte("tcp tpi_cots_ord v inet tcp - -\nudp tpi_clts v inet udp - -\n"))
	c.file("/etc/passwd", 0o644, []byte("root:x:0:0:root:/:/bin/sh\n"))
	c.file("/etc/group", 0o644, []byte("root:x:0:\n"))
	c.file("/etc/hosts", 0o644, []byte("127.0.0.1 localhost\n"+HostAddr+" host\n"))
	c.file("/etc/mke2fs.conf", 0o644, mke2fsConf())
	c.file("/init", 0o755, []byte(guestInit))
	path := filepath.Join(dir, "guest.initrd")
	return path, os.WriteFile(path, c.end(), 0o644)
}

func mke2fsConf() []byte {
	text, err := os.ReadFile("/etc/mke2fs.conf")
	if err != nil {
		return []byte("[defaults]\n\tbase_features = sparse_super,large_file,filetype,resize_inode,dir_index,ext_attr\n")
	}
	return text
}

// Guest is a running Linux machine under QEMU's TCG: no KVM, any machine can run it.
type Guest struct {
	*Process
	serial string
}

// Serial is what the guest has written to its console.
func (g *Guest) Serial() string {
	text, _ := os.ReadFile(g.serial)
	return strings.ReplaceAll(string(text), "\r", "")
}

// WaitFor waits until the console holds a line that matches.
func (g *Guest) WaitFor(limit time.Duration, pattern string) (string, error) {
	re := regexp.MustCompile("(?m)" + pattern)
	deadline := time.Now().Add(limit)
	for {
		ended := g.Ended() // before the console is read, so that its last lines count
		if found := re.FindString(g.Serial()); found != "" {
			return found, nil
		}
		if ended || time.Now().After(deadline) {
			return "", fmt.Errorf("guest: %q not printed (ended: %v, limit %s); its console ends:\n%s\n%s",
				pattern, ended, limit, lastLines(g.Serial(), 40), lastLines(g.Log(), 10))
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// qemuArgs is the machine that all guests share.
func qemuArgs(serial string, megabytes int) []string {
	return []string{"-accel", "tcg,thread=multi", "-cpu", "max", "-M", "pc", "-smp", "2", "-m", strconv.Itoa(megabytes), "-display", "none",
		"-nodefaults", "-no-reboot", "-serial", "file:" + serial, "-monitor", "none", "-device", "virtio-rng-pci"}
}

// StartGuest boots the shared guest with a job, a shell script. forward maps a port of this machine's loopback to one of
// the guest; further arguments go to QEMU.
func StartGuest(dir, job string, forward map[int]int, more ...string) (*Guest, error) {
	initrd := filepath.Join(dir, "guest.initrd")
	if !fileExists(initrd) {
		if _, err := guestImage(dir); err != nil {
			return nil, fmt.Errorf("make the guest's initramfs: %w", err)
		}
	}
	shared, err := os.ReadFile(initrd)
	if err != nil {
		return nil, err
	}
	c := newCPIO()
	c.file("/job.sh", 0o755, []byte(job))
	own, err := os.CreateTemp(dir, "job*.initrd")
	if err != nil {
		return nil, err
	}
	if _, err := own.Write(append(shared, c.end()...)); err != nil {
		return nil, err
	}
	if err := own.Close(); err != nil {
		return nil, err
	}
	serial := own.Name() + ".serial"
	network := "user,id=n0,restrict=off"
	for host, guest := range forward {
		network += fmt.Sprintf(",hostfwd=tcp:127.0.0.1:%d-:%d", host, guest)
	}
	args := append(qemuArgs(serial, 1024), "-kernel", Cache("guest/vmlinuz"), "-initrd", own.Name(),
		"-append", "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable audit=0",
		"-netdev", network, "-device", "virtio-net-pci,netdev=n0,romfile=")
	p, err := Start("qemu-system-x86_64", append(args, more...)...)
	if err != nil {
		return nil, err
	}
	return &Guest{Process: p, serial: serial}, nil
}

// RunGuest runs a job to its end; a job that ends with another status than 0, or not within limit, fails the test. Lines
// that the job prints with the prefix "SHOW " are shown.
func RunGuest(t testing.TB, limit time.Duration, job string, more ...string) string {
	t.Helper()
	Need(t, "qemu-system-x86_64", "/bin/busybox")
	g, err := StartGuest(t.TempDir(), job, nil, more...)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if !g.Ended() {
			g.Kill()
		}
	}()
	line, err := g.WaitFor(limit, `^GUEST-RC \d+$`)
	if err != nil {
		t.Fatal(err)
	}
	console := g.Serial()
	if line != "GUEST-RC 0" {
		t.Fatalf("the guest's job ended with %s:\n%s", line, lastLines(console, 60))
	}
	for text := range strings.SplitSeq(console, "\n") {
		if text, ok := strings.CutPrefix(text, "SHOW "); ok {
			Show("%s", text)
		}
	}
	return console
}
