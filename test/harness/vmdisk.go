package harness

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// The VM's disk: a BIOS boot record, a FAT partition with the boot loader, the kernel and its initramfs, and an ext4 root.
//
//	| MBR 1 MiB | FAT16 48 MiB: ldlinux.sys vmlinuz initrd | ext4 256 MiB: / |
//
// It is made without mounting anything: mtools fills the one, mke2fs -d the other.
const (
	bootStart = 1 << 20
	bootBytes = 48 << 20
	RootStart = bootStart + bootBytes
	RootBytes = 256 << 20
	// VMDiskBytes is the size of the whole disk.
	VMDiskBytes = RootStart + RootBytes
)

const vmInitramfs = `#!/bin/busybox sh
busybox mount -t proc p /proc; busybox mount -t sysfs s /sys; busybox mount -t devtmpfs d /dev
busybox --install -s /bin
while read -r m; do insmod "/modules/$m"; done < /modules/early.order
i=0; while [ ! -b /dev/vda2 ] && [ $i -lt 400 ]; do sleep 0.05; i=$((i+1)); done
/tools/e2fsck -p /dev/vda2; echo "VM-FSCK $?"
mount -t ext4 -o discard /dev/vda2 /new || { echo VM-MOUNT-FAILED; poweroff -f; }
mount --move /proc /new/proc; mount --move /sys /new/sys; mount --move /dev /new/dev
exec switch_root /new /sbin/init
`

// The VM's own init runs from the disk's root. What it has made durable it says on the console, with a checksum; what it
// finds after the next boot it says as well. The machine's serial number tells it whether to write or to check and end.
const vmRootInit = `#!/bin/busybox sh
export PATH=/bin
echo "VM-UP $(cut -d' ' -f1 /proc/uptime)"
mode=$(cat /sys/class/dmi/id/product_serial)
for f in /data/w*; do [ -e "$f" ] && echo "VM-HAS ${f#/data/w} $(sha256sum < "$f" | cut -c1-64)"; done
if [ "$mode" = check ]; then
	echo "VM-CHECKED"
	sync; mount -o remount,ro /; poweroff -f
fi
n=$(cat /data/last 2>/dev/null || echo 0)
while :; do
	n=$((n+1))
	dd if=/dev/urandom of=/data/w$n bs=64k count=3 conv=fsync 2>/dev/null
	sum=$(sha256sum < /data/w$n | cut -c1-64)
	echo "VM-WROTE $n $sum"
	rm -f /data/w$((n-40))
	echo $n > /data/last
done
`

// MakeVMDisk makes the disk image in dir and gives its path.
func MakeVMDisk(dir string) (string, error) {
	initrd, _, err := base()
	if err != nil {
		return "", err
	}
	if err := initrd.program("e2fsck"); err != nil {
		return "", err
	}
	initrd.file("/init", 0o755, []byte(vmInitramfs))
	boot, root := filepath.Join(dir, "boot.img"), filepath.Join(dir, "root.img")
	write := func(name string, data []byte, perm os.FileMode) string {
		path := filepath.Join(dir, name)
		err = errors.Join(err, os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, data, perm))
		return path
	}
	busybox, readErr := os.ReadFile("/bin/busybox")
	err = errors.Join(err, readErr)
	write("initrd", initrd.end(), 0o644)
	write("syslinux.cfg", []byte("default v\nprompt 0\nlabel v\n kernel vmlinuz\n initrd initrd\n"+
		" append console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable audit=0\n"), 0o644)
	write("root/bin/busybox", busybox, 0o755)
	write("root/sbin/init", []byte(vmRootInit), 0o755)
	for _, applet := range []string{"cat", "cut", "dd", "rm", "mount", "poweroff", "sync", "sha256sum", "sh"} {
		err = errors.Join(err, os.Symlink("busybox", filepath.Join(dir, "root/bin", applet)))
	}
	for _, d := range []string{"proc", "sys", "dev", "data"} {
		err = errors.Join(err, os.MkdirAll(filepath.Join(dir, "root", d), 0o755))
	}
	if err != nil {
		return "", err
	}
	for _, c := range [][]string{
		{"mkfs.fat", "-F", "16", "-h", fmt.Sprint(bootStart / 512), "-C", boot, fmt.Sprint(bootBytes / 1024)},
		{"mcopy", "-i", boot, Cache("guest/vmlinuz"), filepath.Join(dir, "initrd"), filepath.Join(dir, "syslinux.cfg"), "::/"},
		{"syslinux", "--install", boot},
		{"mke2fs", "-q", "-t", "ext4", "-E", "root_owner=0:0", "-d", filepath.Join(dir, "root"), root, fmt.Sprintf("%dk", RootBytes/1024)},
	} {
		if path := "/usr/sbin/" + c[0]; fileExists(path) {
			c[0] = path
		}
		if _, err := Run(time.Minute, c[0], c[1:]...); err != nil {
			return "", err
		}
	}
	return joinDisk(filepath.Join(dir, "vm.raw"), boot, root)
}

// joinDisk writes the boot record and both partitions into one image, sparsely.
func joinDisk(path, boot, root string) (string, error) {
	mbr := make([]byte, 512)
	code, err := os.ReadFile("/usr/lib/syslinux/mbr/mbr.bin")
	if err != nil {
		return "", err
	}
	copy(mbr[:440], code)
	for i, p := range []struct {
		active, kind byte
		start, size  int64
	}{{0x80, 0x0e, bootStart, bootBytes}, {0, 0x83, RootStart, RootBytes}} {
		e := mbr[446+16*i:]
		e[0], e[4] = p.active, p.kind
		binary.LittleEndian.PutUint32(e[8:], uint32(p.start/512))
		binary.LittleEndian.PutUint32(e[12:], uint32(p.size/512))
	}
	mbr[510], mbr[511] = 0x55, 0xaa
	disk, err := os.Create(path)
	if err != nil {
		return "", err
	}
	defer disk.Close()
	if err := disk.Truncate(VMDiskBytes); err != nil {
		return "", err
	}
	if _, err := disk.WriteAt(mbr, 0); err != nil {
		return "", err
	}
	for _, p := range []struct {
		from string
		at   int64
	}{{boot, bootStart}, {root, RootStart}} {
		if err := copySparse(disk, p.at, p.from); err != nil {
			return "", err
		}
	}
	return path, disk.Close()
}

func copySparse(to io.WriterAt, at int64, from string) error {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	p := make([]byte, 64<<10)
	for {
		n, err := io.ReadFull(f, p)
		if n > 0 && strings.Trim(string(p[:n]), "\x00") != "" {
			if _, err := to.WriteAt(p[:n], at); err != nil {
				return err
			}
		}
		at += int64(n)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// StartVM boots a machine from the disk at url by its own boot record. mode is "write" or "check".
func StartVM(dir, url, mode string) (*Guest, error) {
	f, err := os.CreateTemp(dir, "vm*.serial")
	if err != nil {
		return nil, err
	}
	f.Close()
	p, err := Start("qemu-system-x86_64", append(qemuArgs(f.Name(), 512), "-smbios", "type=1,serial="+mode, "-drive",
		"file="+url+",format=raw,if=virtio,cache=none,discard=unmap")...)
	if err != nil {
		return nil, err
	}
	return &Guest{Process: p, serial: f.Name()}, nil
}
