//go:build e2e

package image

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"varve/test/harness"
)

// A boot takes some twenty seconds on a quiet machine; these limits are for one that is neither quiet nor fast.
const (
	bootLimit = 12 * time.Minute
	offLimit  = 5 * time.Minute
)

// guestJob uses the datastore as a hypervisor does, and goes on through what happens to the appliance until the file `stop` is there.
const guestJob = `
set -e
load nfsv3; load nbd
MOUNT="/tools/mount.nfs -o vers=3,nolock,proto=tcp,port=NFSPORT,mountport=NFSPORT,mountproto=tcp,hard HOST:/default /mnt"
$MOUNT
/tools/fio --eta=never --name=nfs --directory=/mnt --rw=randwrite --bs=4k --size=12M --ioengine=psync --verify=crc32c --verify_fatal=1 --do_verify=1 --end_fsync=1 --output=/tmp/nfs.out || { cat /tmp/nfs.out; exit 1; }
truncate -s 128M /mnt/disk1.raw
/tools/nbd-client HOST NBDPORT -N default/disk1 -b 4096 -timeout 120 /dev/nbd0 >/dev/null
/tools/fio --eta=never --name=nbd --filename=/dev/nbd0 --rw=randwrite --bs=4k --size=12M --ioengine=psync --direct=1 --verify=crc32c --verify_fatal=1 --do_verify=1 --fsync=64 --output=/tmp/nbd.out || { cat /tmp/nbd.out; exit 1; }
/tools/mke2fs -q -t ext4 -F /dev/nbd0
mkdir /fs; mount -t ext4 /dev/nbd0 /fs
dd if=/dev/urandom of=/fs/blob bs=1M count=8 2>/dev/null; blob=$(sha256sum < /fs/blob)
umount /fs
/tools/nbd-client -d /dev/nbd0 >/dev/null
echo "SHOW image: a second guest mounted the datastore over NFS and attached a vDisk over NBD; fio --verify=crc32c on both: 0 errors"
echo "LOAD-BEGINS"
i=0
while [ ! -e /mnt/stop ] && [ $i -lt 4000 ]; do
	dd if=/dev/urandom of=/tmp/f bs=64k count=4 2>/dev/null
	cp /tmp/f /mnt/f$i; dd if=/dev/zero of=/mnt/f$i bs=1 count=0 conv=notrunc,fsync 2>/dev/null
	sha256sum < /tmp/f >> /tmp/sums
	i=$((i+1))
done
umount /mnt; $MOUNT
n=0
while read -r sum _; do
	[ "$(sha256sum < /mnt/f$n)" = "$sum  -" ] || { echo "file $n differs"; exit 1; }
	n=$((n+1))
done < /tmp/sums
/tools/nbd-client HOST NBDPORT -N default/disk1 -b 4096 -timeout 120 /dev/nbd0 >/dev/null
/tools/e2fsck -fn /dev/nbd0 >/tmp/fsck.out || { cat /tmp/fsck.out; exit 1; }
mount -t ext4 /dev/nbd0 /fs
[ "$blob" = "$(sha256sum < /fs/blob)" ]
umount /fs; /tools/nbd-client -d /dev/nbd0 >/dev/null; umount /mnt
echo "VERIFIED $n"
`

func image(t *testing.T) string {
	t.Helper()
	file := os.Getenv("VARVE_IMAGE")
	if file == "" {
		file = filepath.Join(harness.Root(), "build/image/varve.raw")
	}
	if _, err := os.Stat(file); err != nil {
		t.Fatalf("%v; `make image` makes it, or VARVE_IMAGE names one", err)
	}
	return file
}

func machine(t *testing.T) *Machine {
	t.Helper()
	harness.Need(t, "qemu-system-x86_64", "qemu-img")
	// 512 MiB is what an idle appliance has to do with.
	m := &Machine{Dir: t.TempDir(), Image: image(t), Megabytes: 512}
	for _, p := range []*int{&m.HTTPS, &m.NFS, &m.NBD} {
		n, err := harness.FreePort()
		must(t, err)
		*p = n
	}
	must(t, m.Deploy())
	t.Cleanup(m.Cut)
	return m
}

// start boots it, checks what its screen says against what it serves, and shows how long it took.
func start(t *testing.T, m *Machine, firmware string) {
	t.Helper()
	must(t, m.Start())
	took, err := m.Ready(bootLimit)
	must(t, err)
	harness.Show("image: %s to ready in %.0f s under emulation with %d MiB of memory (goal: 60 s)", firmware, took.Seconds(), m.Megabytes)
	c, err := tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", m.HTTPS), &tls.Config{InsecureSkipVerify: true})
	must(t, err)
	defer c.Close()
	// The screen may write it in groups and on two lines.
	print := sha256.Sum256(c.ConnectionState().PeerCertificates[0].Raw)
	fingerprint := strings.ToUpper(hex.EncodeToString(print[:]))
	must(t, harness.Poll(bootLimit, func() error {
		text := strings.Join(m.Screen(), "\n")
		plain := strings.ToUpper(regexp.MustCompile(`[^0-9A-Za-z]`).ReplaceAllString(text, ""))
		switch {
		case !strings.Contains(text, "https://10.0.2.15"):
			return fmt.Errorf("no URL on the screen:\n%s", text)
		case !strings.Contains(plain, fingerprint[:24]):
			return fmt.Errorf("fingerprint %s is not on the screen:\n%s", fingerprint, text)
		}
		return nil
	}))
}

var setupCode = regexp.MustCompile(`(?i)set-?up code\s+([0-9A-Za-z]{3,}(?:-[0-9A-Za-z]+)*)`)

// claim makes the first administrator with the code from the screen, as the browser's first page does.
func claim(t *testing.T, m *Machine) {
	t.Helper()
	var code string
	must(t, harness.Poll(bootLimit, func() error {
		found := setupCode.FindStringSubmatch(strings.Join(m.Screen(), "\n"))
		if found == nil {
			return fmt.Errorf("no set-up code on the screen:\n%s", strings.Join(m.Screen(), "\n"))
		}
		code = found[1]
		return nil
	}))
	body, err := json.Marshal(map[string]string{"code": code, "name": "admin", "password": "a long enough passphrase"})
	must(t, err)
	answer, err := m.Client().Post(m.URL("/api/internal/setup"), "application/json", bytes.NewReader(body))
	must(t, err)
	defer answer.Body.Close()
	if answer.StatusCode/100 != 2 {
		t.Fatalf("set up with code %q: %s", code, answer.Status)
	}
	harness.Show("image: the serial screen shows the URL, the fingerprint of the certificate that is served, and the set-up code, which made the first administrator")
}

// checkDisks looks at both disks of a machine that is off.
func checkDisks(t *testing.T, m *Machine) {
	t.Helper()
	state := filepath.Join(m.Dir, "state.raw")
	const at, size = 3330 << 20, 4861 << 20
	options := fmt.Sprintf("driver=raw,offset=%d,size=%d,file.driver=qcow2,file.file.driver=file,file.file.filename=%s", at, size, m.system())
	out, err := harness.Run(2*time.Minute, "qemu-img", "convert", "--image-opts", "-O", "raw", options, state)
	if err != nil {
		t.Fatalf("read the state partition: %v\n%s", err, out)
	}
	if out, err := harness.Run(2*time.Minute, "e2fsck", "-fn", state); err != nil {
		t.Errorf("e2fsck of the state partition: %v\n%s", err, out)
	}
	if out, err := harness.Run(2*time.Minute, "xfs_repair", "-n", m.data()); err != nil {
		t.Errorf("xfs_repair -n of the data disk: %v\n%s", err, out)
	}
}

func TestImageServesThroughPowerCuts(t *testing.T) {
	harness.Need(t, "nfs-cp", "nfs-ls", "xfs_repair", "e2fsck")
	cuts := 3
	if n, err := strconv.Atoi(os.Getenv("VARVE_IMAGE_CUTS")); err == nil {
		cuts = n
	}
	m := machine(t)
	start(t, m, "BIOS")
	claim(t, m)

	job := strings.NewReplacer("HOST", harness.HostAddr, "NFSPORT", strconv.Itoa(m.NFS), "NBDPORT", strconv.Itoa(m.NBD)).Replace(guestJob)
	guest, err := harness.StartGuest(t.TempDir(), job, nil)
	must(t, err)
	defer func() {
		if !guest.Ended() {
			guest.Kill()
		}
	}()
	if line, err := guest.WaitFor(bootLimit, `^(LOAD-BEGINS|GUEST-RC \d+)$`); err != nil || line != "LOAD-BEGINS" {
		t.Fatalf("%s %v\n%s", line, err, guest.Serial())
	}
	for i := range cuts {
		time.Sleep(time.Duration(1+i) * time.Second) // at another moment of the load each time
		m.Cut()
		must(t, m.Start())
		_, err := m.Ready(bootLimit)
		must(t, err)
	}
	stop := filepath.Join(t.TempDir(), "stop")
	must(t, os.WriteFile(stop, []byte("stop\n"), 0o644))
	if out, err := harness.Run(2*time.Minute, "nfs-cp", stop, fmt.Sprintf("nfs://127.0.0.1/default/stop?nfsport=%d&mountport=%d", m.NFS, m.NFS)); err != nil {
		t.Fatalf("nfs-cp: %v\n%s", err, out)
	}
	line, err := guest.WaitFor(bootLimit, `^GUEST-RC \d+$`)
	if err != nil || line != "GUEST-RC 0" {
		t.Fatalf("%s %v\n%s", line, err, guest.Serial())
	}
	for text := range strings.SplitSeq(guest.Serial(), "\n") {
		if text, ok := strings.CutPrefix(text, "SHOW "); ok {
			harness.Show("%s", text)
		}
	}
	files := regexp.MustCompile(`(?m)^VERIFIED (\d+)$`).FindStringSubmatch(guest.Serial())
	if files == nil || files[1] == "0" {
		t.Fatalf("nothing verified:\n%s", guest.Serial())
	}
	must(t, m.PowerOff(offLimit))
	checkDisks(t, m)
	harness.Show("image: %d power cuts under load: all %s files that were synced are there, e2fsck of the guest's disk clean, the appliance's own disks clean", cuts, files[1])

	// The same disks by the other firmware, then a fresh system disk on the old data disk.
	m.UEFI = true
	start(t, m, "UEFI")
	must(t, m.PowerOff(offLimit))
	must(t, m.Deploy())
	must(t, m.Start())
	_, err = m.Ready(bootLimit)
	must(t, err)
	if out, err := harness.Run(2*time.Minute, "nfs-ls", fmt.Sprintf("nfs://127.0.0.1/default?nfsport=%d&mountport=%d", m.NFS, m.NFS)); err != nil || !strings.Contains(out, "disk1.raw") {
		t.Errorf("after a redeploy of the system disk: %v\n%s", err, out)
	}
	answer, err := m.Client().Post(m.URL("/api/internal/setup"), "application/json", strings.NewReader(`{"code":"x","name":"y","password":"a long enough passphrase"}`))
	must(t, err)
	answer.Body.Close()
	if answer.StatusCode/100 == 2 {
		t.Errorf("an appliance that has an administrator answers set-up with %s", answer.Status)
	}
	harness.Show("image: a redeployed system disk serves the vDisks of the old data disk")
}
