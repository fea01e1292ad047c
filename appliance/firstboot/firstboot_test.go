package firstboot

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// machine is a host whose disks are files below dev/ and whose mounts are directories that a file system keeps between mounts.
type machine struct {
	t        *testing.T
	dir      string
	hostname string
	// contents are the roots of what lies on devices, by device.
	contents map[string]string
	// broken devices do not mount.
	broken map[string]bool
	guest  map[string]string
	// cut ends the test's boot at a program, as a power cut would.
	cut string
}

var errCut = errors.New("power is cut")

func newMachine(t *testing.T) *machine {
	m := &machine{t: t, dir: t.TempDir(), contents: map[string]string{}, broken: map[string]bool{}, guest: map[string]string{}}
	for _, d := range []string{"sys/block", "sys/class/net", "dev", "run"} {
		m.write(d+"/.keep", "")
	}
	os.Remove(filepath.Join(m.dir, "sys/block/.keep"))
	return m
}

func (m *machine) config() Config {
	at := func(p string) string { return filepath.Join(m.dir, p) }
	return Config{Host: m, Log: slog.New(slog.DiscardHandler), Paths: Paths{State: at("state"), Data: at("data"), Run: at("run/varve"),
		Network: at("run/systemd/network"), Chrony: at("run/chrony-sources"), Sys: at("sys"), Dev: at("dev"), Credentials: []string{at("cred")}}}
}

func (m *machine) write(path, text string) {
	m.t.Helper()
	path = filepath.Join(m.dir, path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) read(path string) string {
	m.t.Helper()
	b, err := os.ReadFile(filepath.Join(m.dir, path))
	if err != nil {
		m.t.Fatal(err)
	}
	return string(b)
}

func (m *machine) nic(name, mac, index string) {
	m.write("sys/class/net/"+name+"/device/x", "")
	for file, text := range map[string]string{"type": "1", "address": mac, "carrier": "1", "ifindex": index} {
		m.write("sys/class/net/"+name+"/"+file, text+"\n")
	}
}

const testDiskBytes = 5 << 30 // sparse

// disk attaches a blank one.
func (m *machine) disk(name string) string {
	m.t.Helper()
	m.write("sys/block/"+name+"/size", "10485760\n")
	m.write("sys/block/"+name+"/serial", "serial-"+name+"\n")
	m.write("dev/"+name, "")
	dev := filepath.Join(m.dir, "dev", name)
	if err := os.Truncate(dev, testDiskBytes); err != nil {
		m.t.Fatal(err)
	}
	return dev
}

func (m *machine) detach(name string) {
	os.RemoveAll(filepath.Join(m.dir, "sys/block", name))
}

func (m *machine) Run(ctx context.Context, name string, args ...string) ([]byte, error) {
	switch name {
	case "vmware-rpctool":
		return []byte(m.guest[strings.TrimPrefix(args[0], "info-get ")]), nil
	case "vmtoolsd", "xfs_growfs":
		return nil, nil
	case "blkid":
		if args[0] != "-p" { // looks in the system's own /dev
			return nil, errors.New("nothing")
		}
	case m.cut:
		return nil, errCut
	}
	b, err := System{}.Run(ctx, name, args...)
	if name == "mkfs.xfs" {
		delete(m.contents, args[len(args)-1])
		m.broken[args[len(args)-1]] = false
	}
	return b, err
}

func (m *machine) SetHostname(name string) error { m.hostname = name; return nil }

func (m *machine) Mount(source, target, fstype string, readOnly bool) error {
	if m.broken[source] {
		return errors.New("wrong fs type, bad superblock")
	}
	root, ok := m.contents[source]
	if !ok {
		root = filepath.Join(m.dir, "contents", filepath.Base(source))
		os.RemoveAll(root)
		if err := os.MkdirAll(root, 0o755); err != nil {
			return err
		}
		m.contents[source] = root
	}
	if err := os.Remove(target); err != nil {
		return err
	}
	return os.Symlink(root, target)
}

func (m *machine) Unmount(target string) error {
	if err := os.Remove(target); err != nil {
		return err
	}
	return os.Mkdir(target, 0o700)
}

// look is one round of WaitForData.
func (m *machine) look() (DiskReport, error) {
	cfg := m.config()
	for _, d := range []string{cfg.Paths.State, cfg.Paths.Run} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			m.t.Fatal(err)
		}
	}
	return findData(m.t.Context(), cfg)
}

func (m *machine) want(state, device string) DiskReport {
	m.t.Helper()
	r, err := m.look()
	if r.State != state || filepath.Base(r.Device) != device && device != "" {
		m.t.Fatalf("the data disk is %+v (%v), want %s %s", r, err, state, device)
	}
	return r
}

func needXFS(t *testing.T) {
	for _, tool := range []string{"mkfs.xfs", "blkid"} {
		if _, err := exec.LookPath(tool); err != nil {
			if os.Getenv("VARVE_REQUIRE_TOOLS") != "" {
				t.Fatal(err)
			}
			t.Skip(err)
		}
	}
}

func TestNoSettingsAtAll(t *testing.T) {
	m := newMachine(t)
	m.nic("ens192", "00:50:56:aa:bb:01", "2")
	m.nic("ens224", "00:50:56:aa:bb:02", "3")
	r, err := Boot(t.Context(), m.config())
	if err != nil || len(r.Problems) > 0 || len(r.Settings) > 0 {
		t.Fatalf("%+v %v", r, err)
	}
	if m.hostname != "varve-aabb01" {
		t.Errorf("host name %q", m.hostname)
	}
	if got := m.read("run/systemd/network/10-varve-mgmt.network"); !strings.Contains(got, "Name=ens192\n") || !strings.Contains(got, "DHCP=yes\n") ||
		!strings.Contains(got, "RequiredForOnline=routable\n") {
		t.Error(got)
	}
	if _, err := os.Stat(filepath.Join(m.dir, "run/systemd/network/10-varve-storage.network")); err == nil {
		t.Error("a second card that nobody spoke of has a file of its own")
	}
	if got := m.read("run/chrony-sources/varve.sources"); got != "pool 2.debian.pool.ntp.org iburst maxsources 4\n" {
		t.Error(got)
	}
}

func TestNoSettingsNoCard(t *testing.T) {
	m := newMachine(t)
	if r, err := Boot(t.Context(), m.config()); err != nil || len(r.Problems) > 0 || m.hostname != "varve" {
		t.Fatalf("%+v %v %q", r, err, m.hostname)
	}
}

const ovfDoc = `<?xml version="1.0" encoding="UTF-8"?>
<Environment xmlns="http://schemas.dmtf.org/ovf/environment/1" xmlns:oe="http://schemas.dmtf.org/ovf/environment/1" oe:id="">
 <PlatformSection><Kind>VMware ESXi</Kind></PlatformSection>
 <PropertySection>
  <Property oe:key="guestinfo.varve.hostname" oe:value="store1.example.com"/>
  <Property oe:key="guestinfo.varve.mgmt_ip" oe:value="10.1.2.3/24"/>
  <Property oe:key="guestinfo.varve.gateway" oe:value="10.1.2.1"/>
  <Property oe:key="guestinfo.varve.dns" oe:value="10.1.2.1, 10.1.2.2"/>
  <Property oe:key="guestinfo.varve.storage_ip" oe:value="192.168.50.3/24"/>
  <Property oe:key="guestinfo.varve.storage_mtu" oe:value="9000"/>
  <Property oe:key="guestinfo.varve.vlan" oe:value=""/>
  <Property oe:key="guestinfo.varve.ntp" oe:value="ntp.example.com"/>
  <Property oe:key="guestinfo.varve.admin_password" oe:value="pa&lt;ss&amp;word"/>
  <Property oe:key="vami.ip0" oe:value="1.1.1.1"/>
 </PropertySection>
 <Entity oe:id="other"><PropertySection><Property oe:key="guestinfo.varve.hostname" oe:value="notme"/></PropertySection></Entity>
</Environment>`

func TestOVFEnvironment(t *testing.T) {
	m := newMachine(t)
	m.write("sys/class/dmi/id/sys_vendor", "VMware, Inc.\n")
	m.guest["guestinfo.ovfEnv"] = ovfDoc
	m.guest["guestinfo.varve.hostname"] = "weaker"
	m.guest["guestinfo.varve.timezone"] = "Europe/Brussels"
	m.nic("ens192", "00:50:56:aa:bb:01", "2")
	m.nic("ens224", "00:50:56:aa:bb:02", "3")
	r, err := Boot(t.Context(), m.config())
	if err != nil || len(r.Problems) > 0 {
		t.Fatalf("%+v %v", r, err)
	}
	if v := r.Settings[Hostname]; v != (Value{"store1.example.com", SourceOVF}) || r.Settings[Timezone].Source != SourceGuestInfo {
		t.Errorf("settings %v", r.Settings)
	}
	if got := m.read("run/systemd/network/10-varve-mgmt.network"); !strings.Contains(got, "Address=10.1.2.3/24\nDHCP=no\n") ||
		!strings.Contains(got, "[Route]\nGateway=10.1.2.1\n") || !strings.Contains(got, "DNS=10.1.2.1\nDNS=10.1.2.2\n") {
		t.Error(got)
	}
	if got := m.read("run/systemd/network/10-varve-storage.network"); !strings.Contains(got, "Name=ens224\n") || !strings.Contains(got, "MTUBytes=9000\n") ||
		strings.Contains(got, "Gateway") || !strings.Contains(got, "RequiredForOnline=no") {
		t.Error(got)
	}
	// The password is kept for its one use, and nowhere else.
	if p, err := Pending(m.config().Paths, AdminPassword); p != "pa<ss&word" || err != nil {
		t.Errorf("pending password %q %v", p, err)
	}
	for _, file := range []string{"state/settings.json", "run/varve/firstboot.json"} {
		if strings.Contains(m.read(file), "pa<ss") || strings.Contains(m.read(file), "ss\\u0026word") {
			t.Errorf("%s holds the password", file)
		}
	}
	if err := Used(m.config().Paths, AdminPassword); err != nil {
		t.Fatal(err)
	}
	if r, err = Boot(t.Context(), m.config()); err != nil || len(r.Pending) > 0 || strings.Contains(m.read("state/pending.json"), "u0026word") {
		t.Errorf("a used password came back: %+v %v", r.Pending, err)
	}
}

func TestWhatTheAdministratorSetsStays(t *testing.T) {
	m := newMachine(t)
	m.nic("eth0", "52:54:00:00:00:01", "2")
	m.write("cred/varve.hostname", "from-smbios")
	m.write("cred/varve.mgmt_ip", "10.0.0.5/24")
	if _, err := Boot(t.Context(), m.config()); err != nil {
		t.Fatal(err)
	}
	if _, err := Change(t.Context(), m.config(), map[string]string{Hostname: "By-Hand", NTP: "10.0.0.9"}); err != nil {
		t.Fatal(err)
	}
	m.write("cred/varve.hostname", "another")
	m.write("cred/varve.mgmt_ip", "10.0.0.6/24")
	r, err := Boot(t.Context(), m.config())
	if err != nil || m.hostname != "by-hand" || r.Settings.Get(MgmtIP) != "10.0.0.6/24" || r.Settings.Get(NTP) != "10.0.0.9" {
		t.Fatalf("%q %+v %v", m.hostname, r.Settings, err)
	}
	os.Remove(filepath.Join(m.dir, "cred/varve.mgmt_ip"))
	if r, err = Boot(t.Context(), m.config()); err != nil || r.Settings.Get(MgmtIP) != "10.0.0.6/24" {
		t.Fatalf("a value that its source gives no longer: %+v %v", r.Settings, err)
	}
	if _, err := Change(t.Context(), m.config(), map[string]string{Hostname: ""}); err != nil {
		t.Fatal(err)
	}
	if r, err = Boot(t.Context(), m.config()); err != nil || r.Settings[Hostname] != (Value{"another", SourceCredential}) {
		t.Fatalf("left to the sources again: %+v %v", r.Settings, err)
	}
}

func TestMergeOfWhatDoesNotFit(t *testing.T) {
	kept := Settings{MgmtIP: {"10.0.0.5/24", SourceOVF}, Gateway: {"10.0.0.1", SourceOVF}, Hostname: {"a", SourceConsole}}
	got := Merge(kept, Settings{MgmtIP: {"172.16.0.5/24", SourceNoCloud}})
	if diff := cmp.Diff(Settings{MgmtIP: {"172.16.0.5/24", SourceNoCloud}, Hostname: {"a", SourceConsole}}, got); diff != "" {
		t.Error("a new network keeps no old gateway", diff)
	}
	got = Merge(Settings{MgmtIP: {"10.0.0.5/24", SourceConsole}}, Settings{Gateway: {"172.16.0.1", SourceOVF}})
	if diff := cmp.Diff(Settings{MgmtIP: {"10.0.0.5/24", SourceConsole}}, got); diff != "" {
		t.Error("a gateway out of reach is not taken", diff)
	}
}

func TestRefusedValues(t *testing.T) {
	for name, bad := range map[string][]string{
		Hostname: {"", "-a", "a..b", "a_b", strings.Repeat("x", 64), "a\nb", "héllo"}, MgmtIP: {"10.0.0.1", "10.0.0.0/24", "10.0.0.255/24", "0.0.0.0/0",
			"127.0.0.1/8", "10.0.0.1/24 10.0.0.2/24", "10.0.0.1/24; rm -rf /", "::1/64"},
		Gateway: {"x", "0.0.0.0", "fe80::1%eth0"}, VLAN: {"0", "4095", "-1", "1e3"}, MTU: {"100", "70000"}, Timezone: {"../etc/passwd", "/etc", "a b"},
		MgmtNIC: {"..", "a/b", "eth0\n[Network]", "0123456789abcdef"}, NTP: {"a b c d e f g h i", "-x", "a;b\nserver evil/"}, Mode: {"evil"},
		SSHKeys: {"hello", "ssh-ed25519", "command=\"x\" ssh-ed25519 AAAAAAAAAAAAAAAAAAAA"}, AdminPassword: {"short", strings.Repeat("x", 300)}, "nosuch": {"x"},
		ClusterName: {"a\x00b"}, DNS: {"resolver", "1.1.1.1\n[Route]"},
	} {
		for _, v := range bad {
			if got, err := normal(name, v); err == nil && (strings.ContainsAny(got, "\n[") || name != NTP && name != DNS) {
				t.Errorf("%s=%q is taken as %q", name, v, got)
			} else if err != nil && name == AdminPassword && strings.Contains(err.Error(), v) {
				t.Errorf("the message repeats the secret: %v", err)
			}
		}
	}
}

func TestNoCloudOfProxmox(t *testing.T) {
	got, err := parseSeed(seed{
		meta: []byte("instance-id: 1234\n"),
		user: []byte("#cloud-config\nhostname: store2\nmanage_etc_hosts: true\nfqdn: store2.lab\nuser: root\nssh_authorized_keys:\n  - ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA me\nchpasswd:\n  expire: False\nusers:\n  - default\nvarve:\n  join_token: abcdefghijklmnopqrst\n"),
		network: []byte(`version: 1
config:
    - type: physical
      name: eth0
      mac_address: 'bc:24:11:00:00:01'
      subnets:
      - type: static
        address: '192.168.7.20'
        netmask: '255.255.255.0'
        gateway: '192.168.7.1'
    - type: physical
      name: eth1
      mac_address: 'bc:24:11:00:00:02'
      subnets:
      - type: static
        address: '10.9.9.20'
        netmask: '255.255.0.0'
    - type: nameserver
      address:
      - '192.168.7.1'
      search:
      - 'lab'
`)})
	want := map[string]string{Hostname: "store2.lab", SSHKeys: "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA me", JoinToken: "abcdefghijklmnopqrst", MgmtNIC: "bc:24:11:00:00:01",
		MgmtIP: "192.168.7.20/24", Gateway: "192.168.7.1", StorageNIC: "bc:24:11:00:00:02", StorageIP: "10.9.9.20/16", DNS: "192.168.7.1", Search: "lab"}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Error(diff, err)
	}
}

func TestNoCloudVersion2(t *testing.T) {
	got, err := parseSeed(seed{
		meta: []byte("instance-id: i\nlocal-hostname: n1\n"),
		network: []byte(`network:
  version: 2
  ethernets:
    storage:
      match: {macaddress: "52:54:00:00:00:02"}
      addresses: [10.10.0.4/24]
      mtu: 9000
    lan:
      match: {name: enp1s0}
      dhcp4: false
    other: {dhcp4: false}
  vlans:
    mgmt:
      id: 42
      link: lan
      addresses: [192.168.1.4/24, "2001:db8::4/64"]
      routes:
        - {to: default, via: 192.168.1.1}
        - {to: "::/0", via: "2001:db8::1"}
      nameservers: {addresses: [9.9.9.9], search: [lab]}
`)})
	want := map[string]string{Hostname: "n1", MgmtNIC: "enp1s0", VLAN: "42", MgmtIP: "192.168.1.4/24 2001:db8::4/64", Gateway: "192.168.1.1 2001:db8::1",
		StorageNIC: "52:54:00:00:00:02", StorageIP: "10.10.0.4/24", StorageMTU: "9000", DNS: "9.9.9.9", Search: "lab"}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Error(diff, err)
	}
	m := newMachine(t)
	m.nic("enp1s0", "52:54:00:00:00:01", "2")
	m.nic("enp2s0", "52:54:00:00:00:02", "3")
	m.write("sys/firmware/qemu_fw_cfg/by_name/opt/varve/config/raw", "{hostname: n1, mgmt_ip: [192.168.1.4/24], vlan: 42, gateway: 192.168.1.1, mgmt_nic: enp1s0}\n")
	if r, err := Boot(t.Context(), m.config()); err != nil || len(r.Problems) > 0 || r.Settings.Get(VLAN) != "42" {
		t.Fatalf("%+v %v", r, err)
	}
	if got := m.read("run/systemd/network/10-varve-mgmt.network"); !strings.Contains(got, "Name=vlan42\n") {
		t.Error(got)
	}
	if got := m.read("run/systemd/network/10-varve-mgmt-vlan.netdev"); !strings.Contains(got, "Id=42\n") {
		t.Error(got)
	}
	if _, err := Change(t.Context(), m.config(), map[string]string{VLAN: ""}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(m.dir, "run/systemd/network/10-varve-mgmt-vlan.netdev")); err == nil {
		t.Error("the VLAN's file is still there")
	}
}

func TestOneBadValueLeavesTheOthers(t *testing.T) {
	m := newMachine(t)
	m.write("cred/varve.hostname", "good")
	m.write("cred/varve.mgmt_ip", "bad")
	r, err := Boot(t.Context(), m.config())
	if err != nil || m.hostname != "good" || len(r.Sources) != 1 || !strings.Contains(r.Sources[0].Error, "mgmt_ip") {
		t.Fatalf("%+v %v", r, err)
	}
}

func TestBlankDiskIsFormattedOnce(t *testing.T) {
	needXFS(t)
	m := newMachine(t)
	if r := m.want(DataNone, "."); !strings.Contains(r.Advice, "attach") {
		t.Error(r.Advice)
	}
	m.disk("vdb")
	if r := m.want(DataReady, "vdb"); !r.Formatted {
		t.Error("not formatted")
	}
	m.contents[filepath.Join(m.dir, "dev/vdb")] = filepath.Join(m.dir, "contents/vdb")
	m.write("contents/vdb/control/precious", "x")
	if r := m.want(DataReady, "vdb"); r.Formatted {
		t.Error("formatted twice")
	}
	if m.read("contents/vdb/control/precious") != "x" {
		t.Error("the file is gone")
	}
	// Beside it a second, blank disk changes nothing; without it the blank one does not take its place.
	m.disk("vdc")
	m.want(DataReady, "vdb")
	m.detach("vdb")
	m.want(DataMissing, "")
	// Until somebody says so.
	if err := Choose(m.config().Paths, "/dev/vdc"); err != nil {
		t.Fatal(err)
	}
	m.want(DataReady, "vdc")
}

func TestTwoBlankDisksAreAskedAbout(t *testing.T) {
	needXFS(t)
	m := newMachine(t)
	m.disk("sdb")
	m.disk("sdc")
	m.want(DataAsk, "")
	m.want(DataAsk, "")
	if err := Choose(m.config().Paths, "sdc"); err != nil {
		t.Fatal(err)
	}
	m.want(DataReady, "sdc")
}

// TestDisksWithAnythingOnThemAreLeftAlone writes one trace of use at a time on the only disk there is, and looks whether every
// byte of it is still there after a boot and after somebody has chosen that disk.
func TestDisksWithAnythingOnThemAreLeftAlone(t *testing.T) {
	needXFS(t)
	tool := func(name string, args ...string) func(*testing.T, *machine, string) {
		return func(t *testing.T, _ *machine, dev string) {
			if _, err := exec.LookPath(name); err != nil {
				t.Skip(err)
			}
			if out, err := exec.Command(name, append(args, dev)...).CombinedOutput(); err != nil {
				t.Fatalf("%v %s", err, out)
			}
		}
	}
	at := func(off int64) func(*testing.T, *machine, string) {
		return func(t *testing.T, _ *machine, dev string) {
			f, err := os.OpenFile(dev, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.WriteAt([]byte("x"), off); err != nil {
				t.Fatal(err)
			}
		}
	}
	sys := func(file, text string) func(*testing.T, *machine, string) {
		return func(_ *testing.T, m *machine, _ string) { m.write("sys/block/vdb/"+file, text) }
	}
	for name, use := range map[string]func(*testing.T, *machine, string){
		"ext4": tool("mkfs.ext4", "-q", "-F"),
		"xfs":  tool("mkfs.xfs", "-q"),
		"swap": tool("mkswap"),
		"partition table": func(t *testing.T, _ *machine, dev string) {
			cmd := exec.Command("sfdisk", "-q", dev)
			cmd.Stdin = strings.NewReader("label: gpt\n,1M\n")
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v %s", err, out)
			}
		},
		"a byte at the start":  at(0),
		"a byte at 12 MiB":     at(12 << 20),
		"a byte at the end":    at(testDiskBytes - 1),
		"a byte in the middle": at(testDiskBytes / 2),
		"partitions":           sys("vdb1/uevent", "PARTN=1\nPARTNAME=data\n"),
		"the system":           sys("vdb1/uevent", "PARTN=3\nPARTNAME=varve-a\n"),
		"a holder":             sys("holders/dm-0", ""),
		"read-only":            sys("ro", "1\n"),
		"too small":            sys("size", "1048576\n"),
		"our label, other files": func(t *testing.T, m *machine, dev string) {
			tool("mkfs.xfs", "-q", "-L", diskLabel)(t, m, dev)
			m.contents[dev] = filepath.Join(m.dir, "contents/vdb")
			m.write("contents/vdb/photos/1.jpg", "x")
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			dev := m.disk("vdb")
			use(t, m, dev)
			before := sum(t, dev)
			for range 2 {
				if r, err := m.look(); r.State == DataReady {
					t.Fatalf("it is taken: %+v %v", r, err)
				}
				if err := Choose(m.config().Paths, "vdb"); err != nil {
					t.Fatal(err)
				}
			}
			if r, err := m.look(); r.State == DataReady || err == nil {
				t.Fatalf("it is taken when chosen: %+v %v", r, err)
			}
			if sum(t, dev) != before {
				t.Error("it was written to")
			}
		})
	}
}

// sum is a fingerprint of a sparse file: its allocated parts.
func sum(t *testing.T, path string) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", "cp --sparse=always "+path+" "+path+".copy && tar -cSf - -C "+filepath.Dir(path)+" --mtime=@0 --transform 's/.*/x/' "+
		filepath.Base(path)+".copy | sha256sum; rm -f "+path+".copy").Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func TestFormatCutShortIsDoneAgain(t *testing.T) {
	needXFS(t)
	t.Run("before mkfs", func(t *testing.T) {
		m := newMachine(t)
		m.disk("vdb")
		m.cut = "mkfs.xfs"
		if _, err := m.look(); !errors.Is(err, errCut) {
			t.Fatal(err)
		}
		m.cut = ""
		m.want(DataReady, "vdb")
	})
	t.Run("in mkfs", func(t *testing.T) { // what is there shows the label and does not mount
		m := newMachine(t)
		dev := m.disk("vdb")
		m.cut = "mkfs.xfs"
		m.look()
		m.cut = ""
		if _, err := m.Run(t.Context(), "mkfs.xfs", "-q", "-L", diskLabel, dev); err != nil {
			t.Fatal(err)
		}
		m.broken[dev] = true
		if r := m.want(DataReady, "vdb"); !r.Formatted {
			t.Error("not formatted again")
		}
	})
	t.Run("another disk in its place", func(t *testing.T) {
		m := newMachine(t)
		m.disk("vdb")
		m.cut = "mkfs.xfs"
		m.look()
		m.cut = ""
		m.write("sys/block/vdb/serial", "other\n")
		dev := filepath.Join(m.dir, "dev/vdb")
		if out, err := exec.Command("mkfs.xfs", "-q", "-L", diskLabel, dev).CombinedOutput(); err != nil {
			t.Fatalf("%v %s", err, out)
		}
		m.contents[dev] = filepath.Join(m.dir, "contents/vdb")
		m.write("contents/vdb/"+markFile, `{"id":"4b1f8a54-5a7e-4f4e-8a0e-0d3b6b1c9a55"}`)
		m.write("contents/vdb/control/x", "")
		if r := m.want(DataReady, "vdb"); r.Formatted {
			t.Error("another disk was formatted")
		}
	})
}

func TestNewSystemDiskWithOldDataDisk(t *testing.T) {
	needXFS(t)
	m := newMachine(t)
	m.nic("eth0", "52:54:00:00:00:01", "2")
	m.write("cred/varve.hostname", "old-name")
	if _, err := Boot(t.Context(), m.config()); err != nil {
		t.Fatal(err)
	}
	if _, err := Change(t.Context(), m.config(), map[string]string{MgmtIP: "10.0.0.5/24"}); err != nil {
		t.Fatal(err)
	}
	m.disk("vdb")
	m.want(DataReady, "vdb")
	os.RemoveAll(filepath.Join(m.dir, "state"))
	os.RemoveAll(filepath.Join(m.dir, "cred"))
	r, err := Boot(t.Context(), m.config())
	if err != nil || m.hostname != "old-name" || r.Settings[MgmtIP] != (Value{"10.0.0.5/24", SourceConsole}) {
		t.Fatalf("%+v %v", r, err)
	}
	if r := m.want(DataReady, "vdb"); r.Formatted {
		t.Error("formatted")
	}
}

func TestSettingsFileOfAnotherVersionStays(t *testing.T) {
	m := newMachine(t)
	const file = `{"hostname":{"value":"under_score","source":"console"}}`
	m.write("state/settings.json", file)
	m.write("cred/varve.timezone", "UTC")
	if r, err := Boot(t.Context(), m.config()); err != nil || len(r.Problems) != 1 {
		t.Fatalf("%+v %v", r, err)
	}
	if got := m.read("state/settings.json"); got != file {
		t.Errorf("it is now %s", got)
	}
}

func FuzzOVF(f *testing.F) {
	f.Add([]byte(ovfDoc))
	f.Add([]byte(`<!DOCTYPE a [<!ENTITY x "y">]><Environment xmlns="http://schemas.dmtf.org/ovf/environment/1">&x;</Environment>`))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := parseOVF(b)
		if err == nil {
			safe(t, got)
		}
	})
}

func FuzzSeed(f *testing.F) {
	f.Add([]byte("local-hostname: a"), []byte("#cloud-config\nhostname: x\nvarve: {ntp: [a, b]}"), []byte("version: 2\nethernets: {a: {addresses: [1.2.3.4/8]}}"))
	f.Add([]byte("a: &a [*a]"), []byte("#cloud-config\n- x"), []byte("version: 1\nconfig: [{type: physical, subnets: [{address: 1.2.3.4, netmask: 255.0.255.0}]}]"))
	f.Fuzz(func(t *testing.T, meta, user, network []byte) {
		got, _ := parseSeed(seed{meta, user, network})
		safe(t, got)
	})
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte(`{"hostname":"a","dns":["1.1.1.1","9.9.9.9"],"vlan":7}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if got, err := parseConfig(b); err == nil {
			safe(t, got)
		}
	})
}

// safe says that whatever came from outside renders to files that hold nothing but what the settings mean.
func safe(t *testing.T, got map[string]string) {
	s := make(Settings)
	for k, text := range got {
		v, err := normal(k, text)
		if err != nil {
			continue
		}
		if again, err := normal(k, v); err != nil || again != v {
			t.Fatalf("%s: %q is kept as %q, which reads as %q, %v", k, text, v, again, err)
		}
		if key, _ := keyOf(k); !key.secret {
			s[k] = Value{v, SourceOVF}
		}
	}
	s = Merge(nil, s)
	if err := s.check(); err != nil {
		t.Fatal(err)
	}
	if _, err := json.Marshal(s); err != nil {
		t.Fatal(err)
	}
	for name, text := range networkFiles(s, []NIC{{Name: "eth0", MAC: "52:54:00:00:00:01"}, {Name: "eth1", MAC: "52:54:00:00:00:02"}}) {
		for line := range strings.Lines(text) {
			line = strings.TrimSuffix(line, "\n")
			known := line == "" || strings.HasPrefix(line, "[") && strings.HasSuffix(line, "]") || strings.Contains(line, "=")
			if !known || strings.ContainsAny(line, "\r\x00") {
				t.Fatalf("%s has the line %q from %v", name, line, s)
			}
		}
	}
}

func TestFactoryReset(t *testing.T) {
	needXFS(t)
	m := newMachine(t)
	m.write("cred/varve.hostname", "store")
	if _, err := Boot(t.Context(), m.config()); err != nil {
		t.Fatal(err)
	}
	if _, err := Change(t.Context(), m.config(), map[string]string{Hostname: "by-hand"}); err != nil {
		t.Fatal(err)
	}
	m.disk("vdb")
	m.want(DataReady, "vdb")
	m.write("contents/vdb/secrets.key", "x")
	m.write("contents/vdb/control/node.json", "x")
	m.write("contents/vdb/backend/default/v/1", "x")
	if err := AskReset(m.config().Paths); err != nil {
		t.Fatal(err)
	}
	if _, err := Boot(t.Context(), m.config()); err != nil || m.hostname != "store" {
		t.Fatal(err, m.hostname)
	}
	if r := m.want(DataReady, "vdb"); r.Formatted {
		t.Error("formatted")
	}
	left, err := os.ReadDir(filepath.Join(m.dir, "contents/vdb"))
	var names []string
	for _, e := range left {
		names = append(names, e.Name())
	}
	if diff := cmp.Diff([]string{keptDir, markFile}, names); diff != "" || err != nil {
		t.Error(diff, err)
	}
	m.write("contents/vdb/control/node.json", "x")
	m.want(DataReady, "vdb")
	if m.read("contents/vdb/control/node.json") != "x" {
		t.Error("reset twice")
	}
}

func TestCopyOfTheDataDisk(t *testing.T) {
	needXFS(t)
	m := newMachine(t)
	dev := m.disk("vdb")
	m.want(DataReady, "vdb")
	if out, err := exec.Command("cp", "--sparse=always", dev, m.disk("vdc")).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	m.contents[filepath.Join(m.dir, "dev/vdc")] = filepath.Join(m.dir, "contents/vdb")
	m.want(DataAsk, "")
	if err := Choose(m.config().Paths, "vdc"); err != nil {
		t.Fatal(err)
	}
	m.want(DataReady, "vdc")
}
