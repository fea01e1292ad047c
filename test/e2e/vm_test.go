//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"varve/test/harness"
)

var wrote = regexp.MustCompile(`(?m)^VM-(WROTE|HAS) (\d+) ([0-9a-f]{64})$`)

// durable gives, from a VM's console, the files that it said it had made durable ("WROTE") or found ("HAS").
func durable(console, kind string) map[string]string {
	files := map[string]string{}
	for _, m := range wrote.FindAllStringSubmatch(console, -1) {
		if m[1] == kind {
			files[m[2]] = m[3]
		}
	}
	return files
}

// crashAndCheck boots a VM from url, kills it while it writes, calls between, boots it again from the URL that this
// gives, and compares what it had made durable with what it finds. It returns how many files that were.
func crashAndCheck(t *testing.T, url string, between func() string) (files int, boots [2]time.Duration) {
	t.Helper()
	dir := t.TempDir()
	start := time.Now()
	vm, err := harness.StartVM(dir, url, "write")
	must(t, err)
	defer vm.Kill()
	_, err = vm.WaitFor(2*time.Minute, `^VM-UP`)
	must(t, err)
	boots[0] = time.Since(start)
	_, err = vm.WaitFor(2*time.Minute, `^VM-WROTE 12 `)
	must(t, err)
	vm.Kill()
	promised := durable(vm.Serial(), "WROTE")
	if between != nil {
		url = between()
	}
	start = time.Now()
	again, err := harness.StartVM(dir, url, "check")
	must(t, err)
	defer again.Kill()
	_, err = again.WaitFor(2*time.Minute, `^VM-UP`)
	must(t, err)
	boots[1] = time.Since(start)
	_, err = again.WaitFor(time.Minute, `^VM-CHECKED$`)
	must(t, err)
	must(t, again.Wait(time.Minute))
	console := again.Serial()
	if !regexp.MustCompile(`(?m)^VM-FSCK [01]$`).MatchString(console) {
		t.Fatalf("fsck of the root at boot:\n%s", console)
	}
	found := durable(console, "HAS")
	last := len(promised)
	for n, want := range promised {
		var i int
		fmt.Sscan(n, &i)
		if i > last-38 && found[n] != want {
			t.Errorf("file w%s was durable with checksum %s and is now %q", n, want, found[n])
		}
	}
	return len(promised), boots
}

// checkRoot copies the disk out and runs a full fsck over its root partition, which must find nothing.
func checkRoot(t *testing.T, uri string) {
	t.Helper()
	dir := t.TempDir()
	disk, root := filepath.Join(dir, "disk"), filepath.Join(dir, "root")
	harness.Qemu(t, time.Minute, "qemu-img", "convert", "-f", "raw", "-O", "raw", uri, disk)
	harness.Qemu(t, time.Minute, "dd", "if="+disk, "of="+root, "bs=1M", "conv=sparse",
		fmt.Sprintf("skip=%d", harness.RootStart>>20), fmt.Sprintf("count=%d", harness.RootBytes>>20))
	out := harness.Qemu(t, time.Minute, "/sbin/e2fsck", "-fn", root)
	if strings.Contains(out, "errors") {
		t.Fatalf("e2fsck:\n%s", out)
	}
}

func TestVMBootsFromNBD(t *testing.T) {
	harness.Need(t, "qemu-system-x86_64", "qemu-img", "syslinux", "mcopy")
	image, err := harness.MakeVMDisk(t.TempDir())
	must(t, err)
	uri := export(t, harness.VMDiskBytes)
	harness.Qemu(t, time.Minute, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, uri)
	files, boots := crashAndCheck(t, uri, nil)
	checkRoot(t, uri)
	harness.Show("VM with boot loader, kernel and root on %s: booted in %.0f s, killed while writing, booted again in %.0f s; "+
		"%d files it had fsynced are there, fsck clean", "nbd://", boots[0].Seconds(), boots[1].Seconds(), files)
}

// mounter is the job of a Linux guest whose kernel mounts the datastore over NFS and hands the disk file on that mount to QEMU
// on this machine: the VM's every block goes through that guest's NFS client. (QEMU inside the guest would be emulation
// within emulation.) The hand-over is nbdkit's file plugin, which turns the VM's flush into fsync on the mount.
const mounter = `
set -e
load nfsv3
/tools/mount.nfs -o vers=3,nolock,proto=tcp,port=NFSPORT,mountport=MNTPORT,mountproto=tcp,hard HOST:EXPORT /mnt
ls -l /mnt/vm.raw
echo "MOUNTER-MOUNTED $(grep ' /mnt nfs ' /proc/mounts | cut -c1-60)"
exec /tools/nbdkit -f -i 0.0.0.0 -p 10809 /usr/lib/x86_64-linux-gnu/nbdkit/plugins/nbdkit-file-plugin.so /mnt/vm.raw
`

func TestVMBootsFromNFSDatastore(t *testing.T) {
	harness.Need(t, "qemu-system-x86_64", "qemu-img", "syslinux", "mcopy", "nbdkit")
	dir := t.TempDir()
	image, err := harness.MakeVMDisk(dir)
	must(t, err)
	var disk string // where the disk file is read directly, past NFS
	nfsPort, mountPort, path := 0, 0, "/default"
	if os.Getenv("VARVE_PEER") != "" {
		p, err := harness.StartGanesha(t.TempDir())
		must(t, err)
		t.Cleanup(p.Stop)
		nfsPort, mountPort, path = p.Port, p.Mnt, p.Path
		disk = filepath.Join(p.Path, "vm.raw")
	} else {
		n := harness.StartNode(t)
		n.CreateDisk(t, "vm", fmt.Sprint(harness.VMDiskBytes))
		nfsPort, mountPort, disk = n.NFSPort, n.NFSPort, n.NBD("vm")
		harness.Qemu(t, time.Minute, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, disk)
	}
	if strings.HasPrefix(disk, "/") {
		harness.Qemu(t, time.Minute, "cp", "--sparse=always", image, disk)
	}
	var host *harness.Guest
	startHost := func() string {
		t.Helper()
		port, err := harness.FreePort()
		must(t, err)
		job := strings.NewReplacer("HOST", harness.HostAddr, "NFSPORT", fmt.Sprint(nfsPort), "MNTPORT", fmt.Sprint(mountPort),
			"EXPORT", path).Replace(mounter)
		host, err = harness.StartGuest(dir, job, map[int]int{port: 10809})
		must(t, err)
		t.Cleanup(host.Kill)
		_, err = host.WaitFor(2*time.Minute, `^MOUNTER-MOUNTED`)
		must(t, err)
		uri := fmt.Sprintf("nbd://127.0.0.1:%d", port)
		must(t, harness.Poll(time.Minute, func() error {
			_, err := harness.Run(10*time.Second, "nbdinfo", "--size", uri)
			return err
		}))
		return uri
	}
	uri := startHost()
	// The mounting guest dies with the VM, and with it its page cache: what was flushed has to be on the server.
	files, boots := crashAndCheck(t, uri, func() string {
		host.Kill()
		return startHost()
	})
	host.Kill()
	checkRoot(t, disk)
	harness.Show("VM with boot loader, kernel and root in vm.raw on the NFS datastore, through a Linux guest's NFSv3 mount (its blocks handed "+
		"from the mount to the VM's QEMU by nbdkit): booted in %.0f s, VM and mounting guest killed while writing, booted again in %.0f s; "+
		"%d files it had fsynced are there, fsck clean", boots[0].Seconds(), boots[1].Seconds(), files)
}
