//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/find"
	"github.com/vmware/govmomi/simulator"

	"varve/control/hypervisor"
	"varve/control/state"
	"varve/test/harness"
	"varve/test/nfsclient"
)

const transferBytes = 256 << 10 // of one READ or WRITE

// hypervisorHost is what a host does on its mount.
type hypervisorHost struct {
	*testing.T
	c    *nfsclient.Client
	root nfsclient.Handle
}

func (n *hypervisorHost) must(err error) {
	n.Helper()
	if err != nil {
		n.Fatal(err)
	}
}

func mountAsHost(t *testing.T, n *harness.Node) *hypervisorHost {
	t.Helper()
	c, err := nfsclient.Dial(n.NFSAddr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	root, err := c.Mount("/default")
	if err != nil {
		t.Fatal(err)
	}
	return &hypervisorHost{t, c, root}
}

func (n *hypervisorHost) dir(name string) nfsclient.Handle {
	n.Helper()
	if name = strings.Trim(name, "/"); name == "" {
		return n.root
	}
	h, err := n.c.Lookup(n.root, name)
	if err != nil {
		h, err = n.c.MkDir(n.root, name)
	}
	n.must(err)
	return h
}

// put writes a file through NFS, as a hypervisor does.
func (n *hypervisorHost) put(file string, b []byte) {
	n.Helper()
	h, err := n.c.Create(n.dir(path.Dir(file)), path.Base(file), false)
	n.must(err)
	n.must(n.c.Truncate(h, int64(len(b))))
	for off := 0; off < len(b); off += transferBytes {
		_, err = n.c.Write(h, b[off:min(len(b), off+transferBytes)], int64(off), nfsclient.FileSync)
		n.must(err)
	}
}

func (n *hypervisorHost) read(file string, size int) []byte {
	n.Helper()
	h, err := n.c.Lookup(n.dir(path.Dir(file)), path.Base(file))
	n.must(err)
	b := make([]byte, size)
	for off := 0; off < size; off += transferBytes {
		n.must(n.c.Read(h, b[off:min(size, off+transferBytes)], int64(off)))
	}
	return b
}

type vmachine struct {
	ID, Name, Config, Power, Host, PMachine, Problem string
	Disks                                            []struct{ VDisk, Label, File string }
}

func (m vmachine) vdisks() string {
	var out []string
	for _, d := range m.Disks {
		out = append(out, d.VDisk)
	}
	return strings.Join(out, " ")
}

// waitVM waits until a VM is as wanted.
func waitVM(t *testing.T, n *harness.Node, name string, as func(vmachine) bool) vmachine {
	t.Helper()
	var m vmachine
	err := harness.Poll(90*time.Second, func() error {
		out, err := n.CLI("vmachine", "show", name, "-o", "json")
		if err != nil {
			return err
		}
		m = vmachine{}
		if err := json.Unmarshal([]byte(out), &m); err != nil {
			return err
		}
		if !as(m) {
			return fmt.Errorf("it is %+v", m)
		}
		return nil
	})
	if err != nil {
		t.Fatalf("vmachine %s: %v", name, err)
	}
	return m
}

func descriptorOf(flat string) []byte {
	return []byte("# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"vmfs\"\nRW 8192 VMFS \"" + flat + "\"\nddb.adapterType = \"lsilogic\"\n")
}

const webVMX = `.encoding = "UTF-8"
config.version = "8"
virtualHW.version = "13"
displayName = "web"
guestOS = "debian12-64"
memSize = "1024"
uuid.bios = "56 4d 9b 2a 51 1e 0f 7e-1c d0 11 22 33 44 55 66"
scsi0:0.present = "TRUE"
scsi0:0.fileName = "web.vmdk"
scsi0:1.present = "TRUE"
scsi0:1.fileName = "web_1.vmdk"
`

// writeWeb is what ESXi leaves of a VM with two disks of 4 MiB.
func writeWeb(h *hypervisorHost, fill byte) {
	for _, d := range []string{"web", "web_1"} {
		h.put("/web/"+d+"-flat.vmdk", bytes.Repeat([]byte{fill}, 1<<20))
		f, err := h.c.Lookup(h.dir("/web"), d+"-flat.vmdk")
		h.must(err)
		h.must(h.c.Truncate(f, 4<<20))
		h.put("/web/"+d+".vmdk", descriptorOf(d+"-flat.vmdk"))
	}
	h.put("/web/web.vmx", []byte(webVMX))
}

// A VM's life on a vPool: written by a hypervisor over NFS, found, snapshotted in one cut, rolled back, cloned, renamed, deleted.
func TestAPIMachines(t *testing.T) {
	n := harness.StartNode(t)
	h := mountAsHost(t, n)
	writeWeb(h, 1)
	m := waitVM(t, n, "web", func(m vmachine) bool { return m.vdisks() == "default/web/web default/web/web_1" && m.Problem == "" })
	n.MustCLI(t, "vmachine", "snapshot", "web", "--name", "one", "--consistent")
	for _, d := range []string{"web", "web_1"} {
		h.put("/web/"+d+"-flat.vmdk", bytes.Repeat([]byte{2}, 4<<20))
	}
	n.MustCLI(t, "vmachine", "rollback", "web@one", "--confirm", "web", "--force")
	for _, d := range []string{"web", "web_1"} {
		if got := h.read("/web/"+d+"-flat.vmdk", 2<<20); got[0] != 1 || got[1<<20-1] != 1 || got[1<<20] != 0 {
			t.Errorf("%s after the rollback begins with %d", d, got[0])
		}
	}
	n.MustCLI(t, "vmachine", "clone", "web@one", "--to", "web2", "--to", "web3")
	clone := waitVM(t, n, "web3", func(m vmachine) bool { return m.vdisks() == "default/web3/web3 default/web3/web3_1" })
	if clone.Config != "default/web3/web3.vmx" || h.read("/web3/web3_1-flat.vmdk", 4096)[0] != 1 {
		t.Errorf("%+v", clone)
	}
	if text := string(h.read("/web3/web3_1.vmdk", 115)); !strings.Contains(text, `"web3_1-flat.vmdk"`) {
		t.Errorf("descriptor of the clone: %s", text)
	}
	h.put("/web3/web3_1-flat.vmdk", bytes.Repeat([]byte{3}, 4<<20))
	if got := h.read("/web/web_1-flat.vmdk", 4096)[0]; got != 1 {
		t.Errorf("a write to the clone is seen in what it was cloned from: %d", got)
	}
	h.must(h.c.Rename(h.root, "web", h.root, "site"))
	moved := waitVM(t, n, m.ID, func(m vmachine) bool { return m.Config == "default/site/web.vmx" })
	if moved.vdisks() != "default/site/web default/site/web_1" {
		t.Errorf("%+v", moved)
	}
	n.MustCLI(t, "vmachine", "delete", "web2", "--confirm", "web2", "--force")
	if out, err := n.CLI("vmachine", "show", "web2"); err == nil {
		t.Errorf("a deleted VM: %s", out)
	}
	trash := strings.Fields(n.MustCLI(t, "vdisk", "trash", "list"))
	for _, name := range []string{"default/web2/web2", "default/web2/web2_1", "default/web2/web2.vmx", "default/web2/web2.vmdk", "default/web2/web2_1.vmdk"} {
		if !slices.Contains(trash, name) {
			t.Errorf("%s is not in the trash: %q", name, trash)
			continue
		}
		n.MustCLI(t, "vdisk", "trash", "restore", name)
	}
	if err := harness.Poll(90*time.Second, func() error { // it is found again, as what it was
		_, err := n.CLI("vmachine", "show", "web2")
		return err
	}); err != nil {
		t.Error(err)
	}
	h.put("/bad.vmx", bytes.Repeat([]byte("displayName = \"x\"\n"), 1<<17))
	h.put("/bad.xml", []byte("<domain>"+strings.Repeat("<a>", 1<<16)))
	h.must(h.c.Remove(h.dir("/web3"), "web3.vmx"))
	err := harness.Poll(90*time.Second, func() error {
		if out, err := n.CLI("vmachine", "show", "web3"); err == nil {
			return errors.New(out)
		}
		return nil
	})
	if err != nil {
		t.Errorf("a VM without its file is still there: %v", err)
	}
	harness.Show("vMachine of 2 disks found over NFS, snapshot in one cut, rolled back, cloned twice, renamed with its directory, deleted; hostile files make none")
}

// The mount of a vPool is proved from both ends.
func TestAPIMountTest(t *testing.T) {
	n := harness.StartNode(t)
	var r struct {
		OK     bool
		Checks []struct {
			Name, Detail string
			OK           bool
		}
	}
	if out := n.MustCLI(t, "mount", "test", "default"); strings.Contains(out, "FAILED") || !strings.Contains(out, "read back") {
		t.Fatalf("its own round trip:\n%s", out)
	}
	if out, err := n.CLI("mount", "test", "default", "--host", "127.0.0.9", "--wait", "1s", "-o", "json"); err == nil || !strings.Contains(out, `"ok": false`) {
		t.Errorf("a host that never came passes: %v\n%s", err, out)
	}
	done := make(chan error, 1)
	var out string
	go func() {
		var err error
		out, err = n.CLI("mount", "test", "default", "--host", "127.0.0.1", "--wait", "60s", "-o", "json")
		done <- err
	}()
	h := mountAsHost(t, n)
	for i := 0; ; i++ {
		h.put(fmt.Sprintf("/d/proof%d", i%10), []byte("x"))
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			if err := json.Unmarshal([]byte(out), &r); err != nil || !r.OK || len(r.Checks) != 8 {
				t.Fatalf("%v %+v", err, r)
			}
			for _, target := range []string{"esxi", "vcenter", "pve", "libvirt", "xcp", "qemu", "linux", "k8s"} {
				if help := n.MustCLI(t, "mount", "command", "default", "--for", target, "--address", "192.0.2.7"); !strings.Contains(help, "192.0.2.7") {
					t.Errorf("%s:\n%s", target, help)
				}
			}
			harness.Show("mount test: own round trip of NFS and a host's MOUNT and WRITE seen, %d checks; commands for 8 hypervisors", len(r.Checks))
			return
		case <-time.After(200 * time.Millisecond):
		}
		if i > 600 {
			t.Fatal("the test of the mount does not end")
		}
	}
}

// vcenter is govmomi's simulator with three hosts, whose datastores are directories of dir.
func vcenter(t *testing.T, dir string) (u *url.URL, thumbprint string) {
	t.Helper()
	t.Chdir(dir)
	m := simulator.VPX()
	m.Host, m.ClusterHost, m.Machine = 0, 3, 1
	t.Cleanup(m.Remove)
	if err := m.Create(); err != nil {
		t.Fatal(err)
	}
	m.Service.TLS = &tls.Config{}
	m.Service.Listen = &url.URL{Host: "127.0.0.1:0", User: url.UserPassword("admin", "canary-vcenter-password")}
	s := m.Service.NewServer()
	t.Cleanup(s.Close)
	sum := sha256.Sum256(s.Certificate().Raw)
	return s.URL, hex.EncodeToString(sum[:])
}

// withInput runs a varve command with something to read.
func withInput(n *harness.Node, input string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, harness.Binary(), append([]string{"--data", n.Data}, args...)...)
	cmd.Stdin = strings.NewReader(input)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// A vCenter mounts a vPool on three hosts, tells of a VM that lies there, and what it does decides what may be done to it.
func TestAPIVSphere(t *testing.T) {
	n := harness.StartNode(t)
	writeWeb(mountAsHost(t, n), 1)
	waitVM(t, n, "web", func(m vmachine) bool { return len(m.Disks) == 2 })
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "default", "web"), 0o700); err != nil {
		t.Fatal(err)
	}
	// The simulator wants the files of a VM that is registered in a directory of its own.
	for _, name := range []string{"web.vmx", "web.nvram", "vmware.log"} {
		if err := os.WriteFile(filepath.Join(dir, "default", "web", name), []byte(webVMX), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	u, thumbprint := vcenter(t, dir)
	add := []string{"pmachine", "add", "vc", "--kind", "vsphere", "--address", "https://" + u.Host, "--user", "admin"}
	if out, err := withInput(n, "canary-vcenter-password\n", add...); err == nil || !strings.Contains(out, thumbprint) {
		t.Fatalf("a certificate of nobody known: %v %s", err, out)
	}
	if out, err := withInput(n, "canary-vcenter-password\n", append(add, "--thumbprint", thumbprint)...); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	if out := n.MustCLI(t, "mount", "apply", "default", "--pmachine", "vc", "--address", "127.0.0.1"); strings.Count(out, "mounted") != 3 || strings.Contains(out, "failed") {
		t.Fatalf("mount on three hosts:\n%s", out)
	}
	if out := n.MustCLI(t, "mount", "apply", "default", "--pmachine", "vc", "--address", "127.0.0.1"); strings.Count(out, "already mounted") != 3 {
		t.Errorf("a second time:\n%s", out)
	}
	var p struct {
		State  string
		Hosts  []struct{ Mounted int }
		Mounts []struct{ VPool, Warning string }
	}
	if err := json.Unmarshal([]byte(n.MustCLI(t, "pmachine", "show", "vc", "-o", "json")), &p); err != nil || len(p.Hosts) != 3 || len(p.Mounts) != 3 || p.Hosts[2].Mounted != 1 {
		t.Fatalf("%v %+v", err, p)
	}

	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	client, err := govmomi.NewClient(ctx, u, true)
	if err != nil {
		t.Fatal(err)
	}
	finder := find.NewFinder(client.Client)
	dc, err := finder.DefaultDatacenter(ctx)
	if err != nil {
		t.Fatal(err)
	}
	finder.SetDatacenter(dc)
	folders, err := dc.Folders(ctx)
	if err != nil {
		t.Fatal(err)
	}
	pool, err := finder.ResourcePool(ctx, "*/Resources")
	if err != nil {
		t.Fatal(err)
	}
	task, err := folders.VmFolder.RegisterVM(ctx, "[default] web/web.vmx", "web", false, pool, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := task.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	vm, err := finder.VirtualMachine(ctx, "web")
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct{ do, power string }{{"on", state.PowerRunning}, {"off", state.PowerHalted}} {
		run := vm.PowerOn
		if step.do == "off" {
			run = vm.PowerOff
		}
		if task, err = run(ctx); err == nil {
			err = task.Wait(ctx)
		}
		if err != nil {
			t.Fatal(err)
		}
		n.MustCLI(t, "pmachine", "test", "vc")
		m := waitVM(t, n, "web", func(m vmachine) bool { return m.Power == step.power && m.PMachine == "vc" && m.Host != "" })
		if step.do == "on" {
			n.MustCLI(t, "vmachine", "snapshot", "web", "--name", "running")
			out, err := n.CLI("vmachine", "rollback", "web@running", "--confirm", "web")
			if err == nil || !strings.Contains(err.Error()+out, "is running") {
				t.Errorf("rollback of a VM that runs on %s: %v %s", m.Host, err, out)
			}
		}
	}
	n.MustCLI(t, "pmachine", "remove", "vc", "--confirm", "vc")
	if bytes.Contains([]byte(n.Log()), []byte("canary")) {
		t.Error("the password is in the log")
	}
	found, err := harness.Run(time.Minute, "grep", "-rl", "canary-vcenter", n.Data)
	if err == nil {
		t.Errorf("the password is in %s", found)
	}
	harness.Show("vSphere (vcsim): certificate pinned, vPool mounted on 3 hosts, VM matched with its file, rollback refused while it runs")
}

// libvirtd runs Debian's libvirt with its test driver, which needs no virtualisation.
func libvirtd(t *testing.T) (address string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "lv") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	conf := fmt.Sprintf("listen_tls = 0\nlisten_tcp = 0\nunix_sock_dir = %q\nauth_unix_rw = \"none\"\nauth_unix_ro = \"none\"\nlog_outputs = \"3:stderr\"\n", dir)
	if err := os.WriteFile(filepath.Join(dir, "libvirtd.conf"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	// An empty directory of drivers: the test driver is built in, and the others look for hardware and users.
	p, err := harness.Start("env", "LIBVIRT_DRIVER_DIR="+dir, "libvirtd", "-f", filepath.Join(dir, "libvirtd.conf"), "-p", filepath.Join(dir, "pid"))
	if err != nil {
		t.Fatalf("%v; test/setup.sh packages installs it", err)
	}
	t.Cleanup(p.Kill)
	socket := filepath.Join(dir, "libvirt-sock")
	if err := harness.Poll(60*time.Second, func() error { _, err := os.Stat(socket); return err }); err != nil {
		t.Fatalf("%v\n%s", err, p.Log())
	}
	return "test+unix:///default?socket=" + socket
}

// libvirt mounts a vPool as a storage pool and tells of a VM whose XML is not on the vPool.
func TestAPILibvirt(t *testing.T) {
	n := harness.StartNode(t)
	n.CreateDisk(t, "kvm/disk", "8MiB")
	address := libvirtd(t)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	// The test driver forgets everything when nobody is connected.
	keep, err := hypervisor.Dial(ctx, hypervisor.Endpoint{Kind: state.KindLibvirt, Address: address})
	if err != nil {
		t.Fatal(err)
	}
	defer keep.Close()
	n.MustCLI(t, "pmachine", "add", "kvm1", "--kind", "libvirt", "--address", address)
	if out := n.MustCLI(t, "mount", "apply", "default", "--pmachine", "kvm1", "--address", "127.0.0.1", "--datastore", "varve"); !strings.Contains(out, "mounted") || strings.Contains(out, "failed") {
		t.Fatalf("mount:\n%s", out)
	}
	virsh := func(args ...string) string {
		t.Helper()
		out, err := harness.Run(30*time.Second, "virsh", append([]string{"-c", address}, args...)...)
		if err != nil {
			t.Fatalf("virsh %v: %v\n%s", args, err, out)
		}
		return out
	}
	if out := virsh("pool-dumpxml", "varve"); !strings.Contains(out, "<dir path='/default'/>") || !strings.Contains(out, "netfs") {
		t.Errorf("pool:\n%s", out)
	}
	xml := filepath.Join(t.TempDir(), "kvm.xml")
	const text = `<domain type='test'><name>kvm</name><uuid>c7a5fdbd-cdaf-9455-926a-d65c16db1809</uuid><memory unit='MiB'>256</memory><vcpu>1</vcpu><os><type>hvm</type></os>
<devices><disk type='file' device='disk'><source file='/var/lib/libvirt/images/varve/kvm/disk.raw'/><target dev='vda' bus='virtio'/></disk></devices></domain>`
	if err := os.WriteFile(xml, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	virsh("define", xml)
	virsh("start", "kvm")
	n.MustCLI(t, "pmachine", "test", "kvm1")
	m := waitVM(t, n, "kvm", func(m vmachine) bool { return m.Power == state.PowerRunning })
	if m.vdisks() != "default/kvm/disk" || m.PMachine != "kvm1" || m.Config != "" {
		t.Errorf("%+v", m)
	}
	n.MustCLI(t, "vmachine", "snapshot", "kvm", "--name", "one")
	if out, err := n.CLI("vmachine", "rollback", "kvm@one", "--confirm", "kvm"); err == nil {
		t.Errorf("rollback of a running VM: %s", out)
	}
	virsh("destroy", "kvm")
	n.MustCLI(t, "vmachine", "rollback", "kvm@one", "--confirm", "kvm") // asks whether it still runs
	virsh("undefine", "kvm")
	n.MustCLI(t, "pmachine", "test", "kvm1")
	if out, err := n.CLI("vmachine", "show", "kvm"); err == nil {
		t.Errorf("a VM that its hypervisor does not know any more: %s", out)
	}
	if out, err := n.CLI("vdisk", "show", "default/kvm/disk"); err != nil {
		t.Errorf("its vDisk: %v %s", err, out)
	}
	n.MustCLI(t, "mount", "remove", "default", "--pmachine", "kvm1", "--confirm", "default")
	if out := virsh("pool-list", "--all"); strings.Contains(out, "varve") {
		t.Errorf("pools:\n%s", out)
	}
	harness.Show("libvirt (its test driver): netfs pool defined, started and removed, a domain's vDisk found, its power asked before a rollback")
}
