package image

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"varve/test/harness"
)

// Machine is an appliance's VM: a system disk over the image, which stays as it was made, and a data disk.
type Machine struct {
	Dir             string // of its disks and its serial log
	Image           string // the raw system disk
	UEFI            bool
	Megabytes       int
	HTTPS, NFS, NBD int      // ports of this machine's loopback that lead to it
	Second          *Machine // another one, to which a wire leads
	Arguments       []string // for QEMU, besides

	process *harness.Process
	wire    int // of the second machine: port of the loopback that is the wire
	boots   int
	began   time.Time
}

// Files of a UEFI machine's firmware, from Debian's ovmf.
const (
	uefiCode = "/usr/share/OVMF/OVMF_CODE.fd"
	uefiVars = "/usr/share/OVMF/OVMF_VARS.fd"
)

const dataBytes = 20 << 30

// cpu is what costs an emulator least. Without erms and fsrm the kernel copies and clears by words: a byte string instruction is emulated byte by
// byte. An Atom of that model has an even clock that every CPU reads for itself, where that of QEMU's own model is found unsteady and each look at the
// time is one at a device, behind a lock: on a host that is short of time a tick then takes longer than its period, and the machine stands still. And
// it needs no retpolines.
const cpu = "max,vendor=GenuineIntel,family=6,model=28,stepping=10,la57=off,erms=off,fsrm=off"

func (m *Machine) system() string { return filepath.Join(m.Dir, "system.qcow2") }
func (m *Machine) data() string   { return filepath.Join(m.Dir, "data.raw") }
func (m *Machine) serial() string { return filepath.Join(m.Dir, fmt.Sprintf("serial-%d", m.boots)) }
func (m *Machine) monitor() string {
	return filepath.Join(m.Dir, "monitor")
}
func (m *Machine) variables() string { return filepath.Join(m.Dir, "vars.fd") }
func (m *Machine) agent() string     { return filepath.Join(m.Dir, "agent") }

// Addresses of the machines. Each has a network of its own with QEMU's emulated router, by which the ports of the loopback lead to it, and gets the
// same address there. Two machines reach each other by a wire between them: the router takes whatever it sees for its own, so it must not see that.
const (
	firstAddr   = "10.0.2.15"
	firstOnWire = "10.9.0.15"
	secondAddr  = "10.9.0.16"
	wireGateway = "10.9.0.2" // nobody: a default route is what an appliance finds its own address by
	wireCard    = "52:54:00:56:00:02"
)

// network gives QEMU's arguments. A machine has two cards, as the OVF has.
func (m *Machine) network() []string {
	forward := func(port int, guest int) string {
		if port == 0 {
			return ""
		}
		return fmt.Sprintf(",hostfwd=tcp:127.0.0.1:%d-%s:%d", port, firstAddr, guest)
	}
	router := "user,id=n0" + forward(m.HTTPS, 443) + forward(m.NFS, 2049) + forward(m.NBD, 10809)
	card := func(netdev, mac string) []string {
		return []string{"-device", "virtio-net-pci,romfile=,netdev=" + netdev + ",mac=" + mac}
	}
	first, other := card("n0", "52:54:00:56:00:01"), "user,id=n1,net=10.0.3.0/24"
	switch {
	case m.Second != nil:
		other = fmt.Sprintf("socket,id=n1,listen=127.0.0.1:%d", m.Second.wire)
	case m.wire != 0:
		other = fmt.Sprintf("socket,id=n1,connect=127.0.0.1:%d", m.wire)
		first = card("n0", "52:54:00:56:00:04")
		return slices.Concat([]string{"-netdev", router, "-netdev", other}, card("n1", "52:54:00:56:00:03"), first)
	}
	return slices.Concat([]string{"-netdev", router, "-netdev", other}, first, card("n1", wireCard))
}

// Deploy makes the disks, as an import does: a fresh system disk, and a blank data disk unless there is one. What the firmware remembered of the
// machine of before goes with it.
func (m *Machine) Deploy() error {
	if err := errors.Join(os.RemoveAll(m.system()), os.RemoveAll(m.variables())); err != nil {
		return err
	}
	if out, err := harness.Run(time.Minute, "qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", m.Image, m.system()); err != nil {
		return fmt.Errorf("make the system disk: %w\n%s", err, out)
	}
	f, err := os.OpenFile(m.data(), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Truncate(dataBytes)
}

// Start switches it on.
func (m *Machine) Start() error {
	m.boots++
	if err := errors.Join(os.RemoveAll(m.monitor()), os.RemoveAll(m.agent())); err != nil {
		return err
	}
	args := []string{"-accel", "tcg,thread=multi", "-cpu", cpu, "-M", "pc", "-smp", "2", "-m", fmt.Sprint(m.Megabytes), "-display", "none", "-vga", "std",
		"-serial", "file:" + m.serial(), "-monitor", "unix:" + m.monitor() + ",server,nowait",
		"-device", "virtio-serial-pci", "-chardev", "socket,id=ga,server=on,wait=off,path=" + m.agent(),
		"-device", "virtserialport,chardev=ga,name=org.qemu.guest_agent.0",
		"-drive", "file=" + m.system() + ",format=qcow2,if=virtio", "-drive", "file=" + m.data() + ",format=raw,if=virtio,discard=unmap",
		"-device", "virtio-rng-pci"}
	args = append(args, m.network()...)
	if m.UEFI {
		vars := m.variables()
		if _, err := os.Stat(vars); err != nil {
			text, err := os.ReadFile(uefiVars)
			if err != nil {
				return err
			}
			if err := os.WriteFile(vars, text, 0o600); err != nil {
				return err
			}
		}
		args = append(args, "-drive", "if=pflash,format=raw,readonly=on,file="+uefiCode, "-drive", "if=pflash,format=raw,file="+vars)
	}
	var err error
	m.began = time.Now()
	m.process, err = harness.Start("qemu-system-x86_64", append(args, m.Arguments...)...)
	return err
}

// Cut takes the power away.
func (m *Machine) Cut() {
	if m.process != nil {
		m.process.Kill()
	}
}

// PowerOff presses the button and waits until the appliance has stopped by itself.
func (m *Machine) PowerOff(limit time.Duration) error {
	c, err := net.Dial("unix", m.monitor())
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := io.WriteString(c, "system_powerdown\n"); err != nil {
		return err
	}
	for deadline := time.Now().Add(limit); !m.process.Ended(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("not off after %s; its screen:\n%s", limit, strings.Join(m.Screen(), "\n"))
		}
	}
	return nil
}

// Screen is what the serial screen shows.
func (m *Machine) Screen() []string {
	text, err := os.ReadFile(m.serial())
	if err != nil {
		return []string{err.Error()}
	}
	return Screen(string(text))
}

// Client talks to its HTTPS port. Its certificate is not checked: the test compares its fingerprint with the screen's.
func (m *Machine) Client() *http.Client {
	return &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
}

// URL is a path on it.
func (m *Machine) URL(path string) string {
	return fmt.Sprintf("https://127.0.0.1:%d%s", m.HTTPS, path)
}

// Ready waits until the appliance says that its exports are open, and says how long after it was switched on.
func (m *Machine) Ready(limit time.Duration) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	var last error
	for ctx.Err() == nil {
		if m.process.Ended() {
			return 0, fmt.Errorf("the machine has ended: %s", m.process.Log())
		}
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, m.URL("/readyz"), nil)
		if err != nil {
			return 0, err
		}
		answer, err := m.Client().Do(r)
		if err == nil {
			answer.Body.Close()
			if answer.StatusCode == http.StatusOK {
				return time.Since(m.began), nil
			}
			err = fmt.Errorf("readyz: %s", answer.Status)
		}
		last = err
		time.Sleep(250 * time.Millisecond)
	}
	return 0, fmt.Errorf("not ready after %s (%w); its screen:\n%s", limit, last, strings.Join(m.Screen(), "\n"))
}

// OnScreen waits until every pattern's text is on the screen at once.
func (m *Machine) OnScreen(limit time.Duration, wanted ...string) error {
	for deadline := time.Now().Add(limit); ; time.Sleep(250 * time.Millisecond) {
		all, missing := strings.Join(m.Screen(), "\n"), ""
		for _, w := range wanted {
			if !strings.Contains(all, w) {
				missing = w
			}
		}
		if missing == "" {
			return nil
		}
		if time.Now().After(deadline) || m.process.Ended() {
			return fmt.Errorf("%q is not on the screen:\n%s", missing, all)
		}
	}
}
