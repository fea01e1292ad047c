//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"varve/test/harness"
)

// guestNBD attaches an export with the kernel's client, verifies raw writes and an ext4 on it, trims, and attaches again.
const guestNBD = `
set -e
load nbd
/tools/nbd-client HOST PORT -N EXPORT -b 4096 -timeout 120 /dev/nbd0 >/dev/null
q=/sys/block/nbd0/queue
echo "SHOW guest nbd-client: size $(blockdev --getsize64 /dev/nbd0), write cache '$(cat $q/write_cache)', fua $(cat $q/fua), discard $(cat $q/discard_max_bytes)"
/tools/fio --eta=never --name=raw --filename=/dev/nbd0 --rw=randwrite --bs=4k --size=12M --ioengine=psync --direct=1 --verify=crc32c --verify_fatal=1 --do_verify=1 --fsync=64 --output=/tmp/raw.out || { cat /tmp/raw.out; exit 1; }
echo "SHOW guest nbd-client, raw: fio --verify=crc32c $(grep -c 'err= 0' /tmp/raw.out) job, 0 errors"
/tools/mke2fs -q -t ext4 -F /dev/nbd0
mount -t ext4 -o discard /dev/nbd0 /mnt
/tools/fio --eta=never --name=fs --directory=/mnt --rw=randwrite --bs=4k --size=12M --ioengine=psync --verify=crc32c --verify_fatal=1 --do_verify=1 --fsync=128 --output=/tmp/fs.out || { cat /tmp/fs.out; exit 1; }
dd if=/dev/urandom of=/mnt/blob bs=1M count=6 2>/dev/null
sum=$(sha256sum < /mnt/blob)
rm /mnt/fs*
/tools/fstrim -v /mnt
umount /mnt
/tools/e2fsck -fn /dev/nbd0 >/tmp/fsck.out || { cat /tmp/fsck.out; exit 1; }
/tools/nbd-client -d /dev/nbd0 >/dev/null
/tools/nbd-client HOST PORT -N EXPORT -b 4096 -timeout 120 /dev/nbd0 >/dev/null
mount -t ext4 /dev/nbd0 /mnt
[ "$sum" = "$(sha256sum < /mnt/blob)" ]
umount /mnt
/tools/nbd-client -d /dev/nbd0 >/dev/null
! dmesg | grep -E 'nbd0.*(error|timed)|I/O error'
echo "SHOW guest nbd-client, ext4: fio --verify=crc32c 0 errors, fstrim, e2fsck clean, data there after attaching again"
`

func TestGuestNBDClient(t *testing.T) {
	uri := export(t, 512<<20)
	_, rest, _ := strings.Cut(uri, "nbd://127.0.0.1:")
	port, name, _ := strings.Cut(rest, "/")
	job := strings.NewReplacer("HOST", harness.HostAddr, "PORT", port, "-N EXPORT", "-N '"+name+"'").Replace(guestNBD)
	harness.RunGuest(t, 4*time.Minute, job)
}

// guestMkfs formats a whole disk that QEMU attaches over NBD: a discard of all of it, then inode tables and a journal by
// write-zeroes. The time is the guest's own, under emulation.
const guestMkfs = `
set -e
size=$(blockdev --getsize64 /dev/vda)
start=$(cut -d' ' -f1 /proc/uptime)
/tools/mke2fs -q -t ext4 -F /dev/vda
sync
end=$(cut -d' ' -f1 /proc/uptime)
mount -t ext4 /dev/vda /mnt
echo hello > /mnt/hello
umount /mnt
mount -t ext4 /dev/vda /mnt
[ "$(cat /mnt/hello)" = hello ]
umount /mnt
echo "MKFS $size $start $end"
`

func TestGuestMkfsTebibyte(t *testing.T) {
	n := harness.StartNode(t)
	n.CreateDisk(t, "big", "1TiB")
	cpu := harness.CPU(n.PID())
	console := harness.RunGuest(t, 4*time.Minute, guestMkfs, "-drive", "file="+n.NBD("big")+",format=raw,if=virtio,cache=none,discard=unmap")
	var size int64
	var start, end float64
	if _, err := fmt.Sscanf(console[max(0, strings.LastIndex(console, "MKFS ")):], "MKFS %d %f %f", &size, &start, &end); err != nil || size != tib {
		t.Fatalf("size %d: %v\n%s", size, err, console)
	}
	harness.Show("mkfs.ext4 of 1 TiB on a disk that QEMU attached from nbd://: %.1f s in the emulated guest, %.2f s of it server CPU (goal: seconds)",
		end-start, (harness.CPU(n.PID()) - cpu).Seconds())
	if end-start > 60 {
		t.Errorf("mkfs.ext4 took %.0f s", end-start)
	}
}

// guestNFS mounts the datastore with the kernel's client and does what a hypervisor and an administrator do in it.
const guestNFS = `
set -e
load nfsv3
/tools/mount.nfs -o vers=3,nolock,proto=tcp,port=NFSPORT,mountport=MNTPORT,mountproto=tcp,hard HOST:EXPORT /mnt
mkdir /mnt/dir; cd /mnt/dir
/tools/fio --eta=never --name=buffered --directory=/mnt/dir --rw=randwrite --bs=4k --size=12M --ioengine=psync --verify=crc32c --verify_fatal=1 --do_verify=1 --end_fsync=1 --invalidate=1 --output=/tmp/b.out || { cat /tmp/b.out; exit 1; }
/tools/fio --eta=never --name=direct --directory=/mnt/dir --rw=randwrite --bs=8k --size=8M --ioengine=psync --direct=1 --verify=crc32c --verify_fatal=1 --do_verify=1 --output=/tmp/d.out || { cat /tmp/d.out; exit 1; }
echo "SHOW guest NFSv3 mount: fio --verify=crc32c buffered and O_DIRECT, 0 errors"
dd if=/dev/urandom of=a bs=1M count=4 2>/dev/null
cp a b; cmp a b
mv b c; [ ! -e b ]; cmp a c
cp a d; mv -f c d; [ ! -e c ]; cmp a d
ln -s d link; [ "$(readlink link)" = d ]; cmp a link
chmod 600 d; [ "$(stat -c %a d)" = 600 ]
truncate -s 1000000 d; [ "$(stat -c %s d)" = 1000000 ]
head -c 1000000 a | cmp - d
echo line >> log; echo line >> log; [ "$(wc -l < log)" = 2 ]
mkdir -p one/two; touch one/two/f; ! rmdir one 2>/dev/null; rm -r one; [ ! -e one ]
! cat absent 2>/dev/null
i=0; while [ $i -lt 300 ]; do : > "many-$i"; i=$((i+1)); done
[ "$(ls | grep -c '^many-')" = 300 ]
rm -f many-*; [ "$(ls | grep -c '^many-')" = 0 ] || exit 1
(exec 3<> held; rm held; echo kept >&3; sync) # removed while open: the client renames it
truncate -s 64M disk.raw; dd if=/dev/urandom of=disk.raw bs=64k count=16 seek=100 conv=notrunc 2>/dev/null
df /mnt | tail -1
cd /; sum=$(sha256sum < /mnt/dir/disk.raw)
umount /mnt
/tools/mount.nfs -o vers=3,nolock,proto=tcp,port=NFSPORT,mountport=MNTPORT,mountproto=tcp,hard HOST:EXPORT /mnt
[ "$sum" = "$(sha256sum < /mnt/dir/disk.raw)" ]
rm -r /mnt/dir; [ -z "$(ls /mnt | grep dir)" ]
umount /mnt
echo "SHOW guest NFSv3 mount: copy, rename over existing, symlink, chmod, truncate, append, 300 names, remove while open, remount: all as on a local disk"
`

func TestGuestNFSMount(t *testing.T) {
	host, nfsPort, mountPort, path := harness.HostAddr, 0, 0, "/default"
	if os.Getenv("VARVE_PEER") != "" {
		p, err := harness.StartGanesha(t.TempDir())
		must(t, err)
		t.Cleanup(p.Stop)
		nfsPort, mountPort, path = p.Port, p.Mnt, p.Path
	} else {
		n := harness.StartNode(t)
		nfsPort, mountPort = n.NFSPort, n.NFSPort
	}
	job := strings.NewReplacer("HOST", host, "NFSPORT", fmt.Sprint(nfsPort), "MNTPORT", fmt.Sprint(mountPort), "EXPORT", path).Replace(guestNFS)
	harness.RunGuest(t, 4*time.Minute, job)
}
