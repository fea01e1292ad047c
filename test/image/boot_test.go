//go:build e2e

package image

import (
	"bufio"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"varve/appliance/firstboot"
	"varve/appliance/update"
	"varve/test/harness"
)

// A boot takes less than a minute on a quiet machine; these limits are for one that is neither quiet nor fast.
const (
	bootLimit  = 12 * time.Minute
	offLimit   = 5 * time.Minute
	shortLimit = 3 * time.Minute // of a command in the machine
	applyLimit = 15 * time.Minute
	password   = "a long enough passphrase"
)

// guestJob uses the datastore as a hypervisor does, and goes on through what happens to the appliance until the file `stop` is there.
const guestJob = `
set -e
load nfsv3; load nbd
MOUNT="/tools/mount.nfs -o vers=3,nolock,proto=tcp,port=NFSPORT,mountport=NFSPORT,mountproto=tcp,hard HOST:/default /mnt"
$MOUNT
/tools/fio --eta=never --name=nfs --directory=/mnt --rw=randwrite --bs=4k --size=4M --ioengine=psync --verify=crc32c --verify_fatal=1 --do_verify=1 --end_fsync=1 --output=/tmp/nfs.out || { cat /tmp/nfs.out; exit 1; }
truncate -s 128M /mnt/disk1.raw
/tools/nbd-client HOST NBDPORT -N default/disk1 -b 4096 -timeout 120 /dev/nbd0 >/dev/null
/tools/fio --eta=never --name=nbd --filename=/dev/nbd0 --rw=randwrite --bs=4k --size=4M --ioengine=psync --direct=1 --verify=crc32c --verify_fatal=1 --do_verify=1 --fsync=64 --output=/tmp/nbd.out || { cat /tmp/nbd.out; exit 1; }
/tools/mke2fs -q -t ext4 -F /dev/nbd0
mkdir /fs; mount -t ext4 /dev/nbd0 /fs
dd if=/dev/urandom of=/fs/blob bs=1M count=8 2>/dev/null; blob=$(sha256sum < /fs/blob)
umount /fs
/tools/nbd-client -d /dev/nbd0 >/dev/null
echo "SHOW image: a second guest mounted the datastore over NFS and attached a vDisk over NBD; fio --verify=crc32c on both: 0 errors"
echo "LOAD-BEGINS"
i=0
while [ ! -e /mnt/stop ]; do
	dd if=/dev/urandom of=/tmp/f bs=64k count=4 2>/dev/null
	n=$((i%40))
	cp /tmp/f /mnt/f$n; dd if=/dev/zero of=/mnt/f$n bs=1 count=0 conv=notrunc,fsync 2>/dev/null
	sha256sum < /tmp/f > /tmp/sum$n
	i=$((i+1))
	[ $((i%5)) -ne 0 ] || echo "SYNCED $i"
done
umount /mnt; $MOUNT
n=0
while [ -e /tmp/sum$n ]; do
	[ "$(sha256sum < /mnt/f$n)" = "$(cat /tmp/sum$n)" ] || { echo "file $n differs"; exit 1; }
	n=$((n+1))
done
/tools/nbd-client HOST NBDPORT -N default/disk1 -b 4096 -timeout 120 /dev/nbd0 >/dev/null
/tools/e2fsck -fn /dev/nbd0 >/tmp/fsck.out || { cat /tmp/fsck.out; exit 1; }
mount -t ext4 /dev/nbd0 /fs
[ "$blob" = "$(sha256sum < /fs/blob)" ]
umount /fs; /tools/nbd-client -d /dev/nbd0 >/dev/null; umount /mnt
echo "VERIFIED $n OF $i"
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

// newMachine has 512 MiB: what an idle appliance has to do with.
func newMachine(t *testing.T) *Machine {
	t.Helper()
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

// until asks a few times a second; what it asks is slow.
func until(t *testing.T, limit time.Duration, ok func() error) {
	t.Helper()
	for deadline := time.Now().Add(limit); ; time.Sleep(300 * time.Millisecond) {
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %v", limit, err)
		}
	}
}

// The appliance's first weeks, by one image on two emulated machines: whoever deploys it sets it up, puts load on it, updates it, loses
// power again and again, throws the system disk away, and adds a second appliance. A boot costs a minute, so that each serves several checks;
// `-run 'TestImage/(first_boot|…)'` runs some of the stages.
func TestImage(t *testing.T) {
	t.Setenv("PATH", harness.Cache("node/bin")+":"+os.Getenv("PATH"))
	harness.Need(t, "qemu-system-x86_64", "qemu-img", "nfs-cp", "nfs-ls", "xfs_repair", "e2fsck", "xorriso", "unsquashfs", "mksquashfs", "chromium", "node")
	tr := &trial{m: newMachine(t), shots: harness.Cache("image")}
	must(t, os.MkdirAll(tr.shots, 0o755))
	tr.second = newMachine(t)
	wire, err := harness.FreePort()
	must(t, err)
	tr.second.wire = wire
	t.Cleanup(func() {
		if tr.guest != nil && !tr.guest.Ended() {
			tr.guest.Kill()
		}
	})
	for _, s := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"first boot", tr.firstBoot},
		{"first run in a browser", tr.firstRun},
		{"a second guest", tr.secondGuest},
		{"services restarted", tr.restarts},
		{"update", tr.update},
		{"an update that fails", tr.brokenUpdate},
		{"power cuts", tr.powerCuts},
		{"verified", tr.verified},
		{"system disk redeployed", tr.redeployed},
		{"settings, join", tr.join},
	} {
		begin := time.Now()
		if !t.Run(s.name, s.run) && s.name == "first boot" {
			t.FailNow()
		}
		t.Logf("%s: %s", s.name, time.Since(begin).Round(time.Second))
	}
}

// trial is what the stages share.
type trial struct {
	m, second *Machine
	guest     *harness.Guest
	next      *versions
	shots     string
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

func (tr *trial) firstBoot(t *testing.T) {
	m := tr.m
	ova, err := filepath.Glob(filepath.Join(filepath.Dir(m.Image), "*.ova"))
	must(t, err)
	for _, f := range ova {
		info, err := os.Stat(f)
		must(t, err)
		harness.Show("image: OVA of %d MiB (goal: 400)", info.Size()>>20)
	}
	tr.next = nextVersions(t, m.Image, m.Dir)
	m.Arguments = []string{"-drive", "file=" + tr.next.disc + ",format=raw,if=virtio,readonly=on"}
	must(t, m.Start())
	took, err := m.Ready(bootLimit)
	must(t, err)
	harness.Show("image: BIOS, blank data disk, no settings: ready in %.0f s under emulation with %d MiB of memory (goal: 60 s)", took.Seconds(), m.Megabytes)
	tr.screenTellsWhoServes(t)
	harness.Show("image: the serial screen shows the URL, the fingerprint of the certificate that is served, and the set-up code")
	must(t, os.WriteFile(filepath.Join(tr.shots, "screen.txt"), []byte(strings.Join(m.Screen(), "\n")+"\n"), 0o644))
	report, err := m.Exec(shortLimit, `systemctl is-system-running --wait; systemd-analyze; systemd-analyze critical-chain varve-gateway.service; systemd-analyze blame | head -40
systemctl --failed --no-legend; journalctl -b -p warning --no-pager | tail -60; free -m; ps -eo rss,etimes,time,args --sort=-rss | head -20`)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(tr.shots, "boot.txt"), []byte(report), 0o644))
	failed, err := m.Exec(shortLimit, "systemctl --failed --no-legend --plain")
	must(t, err)
	if strings.TrimSpace(failed) != "" {
		t.Errorf("units have failed:\n%s", failed)
	}
}

// screenTellsWhoServes compares what the screen says with what is served.
func (tr *trial) screenTellsWhoServes(t *testing.T) {
	t.Helper()
	c, err := tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", tr.m.HTTPS), &tls.Config{InsecureSkipVerify: true})
	must(t, err)
	defer c.Close()
	sum := sha256.Sum256(c.ConnectionState().PeerCertificates[0].Raw)
	fingerprint := strings.ToUpper(hex.EncodeToString(sum[:]))
	until(t, bootLimit, func() error {
		text := strings.Join(tr.m.Screen(), "\n")
		// The screen may write it in groups and on two lines.
		plain := strings.ToUpper(regexp.MustCompile(`[^0-9A-Za-z]`).ReplaceAllString(text, ""))
		switch {
		case !strings.Contains(text, "https://"+firstAddr):
			return fmt.Errorf("no URL on the screen:\n%s", text)
		case !strings.Contains(plain, fingerprint[:24]):
			return fmt.Errorf("fingerprint %s is not on the screen:\n%s", fingerprint, text)
		case setupCode.FindString(text) == "":
			return fmt.Errorf("no set-up code on the screen:\n%s", text)
		}
		return nil
	})
}

var setupCode = regexp.MustCompile(`(?i)set-?up code\s+([0-9A-Za-z]{3,}(?:-[0-9A-Za-z]+)*)`)

func (tr *trial) firstRun(t *testing.T) {
	code := setupCode.FindStringSubmatch(strings.Join(tr.m.Screen(), "\n"))
	tr.browser(t, "first-run", "VARVE_CODE="+code[1])
	harness.Show("image: a browser completed the first run with the code from the screen, up to the overview")
	var used, all int
	text, err := tr.m.Exec(shortLimit, `sleep 20; awk '/^MemTotal/{t=$2} /^MemAvailable/{a=$2} END{print int((t-a)/1024), int(t/1024)}' /proc/meminfo`)
	must(t, err)
	if _, err := fmt.Sscan(text, &used, &all); err != nil {
		t.Fatalf("%q: %v", text, err)
	}
	harness.Show("image: idle, %d of %d MiB of memory are in use (goal: a machine of 512 MiB)", used, all)
}

// browser runs a part of browser.mjs.
func (tr *trial) browser(t *testing.T, part string, env ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), bootLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "node", filepath.Join(harness.Root(), "test/image/browser.mjs"), part)
	cmd.Env = append(append(os.Environ(), "VARVE_URL="+tr.m.URL(""), "VARVE_PASSWORD="+password, "VARVE_SHOTS="+tr.shots), env...)
	// The browser's processes are the script's: they end with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 10 * time.Second
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	lines := bufio.NewScanner(out)
	said := false
	for lines.Scan() {
		var s struct{ Step, Error string }
		if json.Unmarshal(lines.Bytes(), &s) == nil && s.Step == part {
			said = true
			if s.Error != "" {
				t.Error(s.Error)
			}
		}
	}
	if err := cmd.Wait(); err != nil || !said {
		t.Fatalf("browser.mjs %s: %v", part, err)
	}
}

func (tr *trial) secondGuest(t *testing.T) {
	job := strings.NewReplacer("HOST", harness.HostAddr, "NFSPORT", strconv.Itoa(tr.m.NFS), "NBDPORT", strconv.Itoa(tr.m.NBD)).Replace(guestJob)
	dir, err := os.MkdirTemp(tr.m.Dir, "guest")
	must(t, err)
	guest, err := harness.StartGuest(dir, job, nil)
	must(t, err)
	tr.guest = guest
	if line, err := guest.WaitFor(bootLimit, `^(LOAD-BEGINS|GUEST-RC \d+)$`); err != nil || line != "LOAD-BEGINS" {
		t.Fatalf("%s %v\n%s", line, err, guest.Serial())
	}
	for text := range strings.SplitSeq(guest.Serial(), "\n") {
		if text, ok := strings.CutPrefix(text, "SHOW "); ok {
			harness.Show("%s", text)
		}
	}
}

// load skips a stage that is about a guest's load where there is none.
func (tr *trial) load(t *testing.T) {
	t.Helper()
	if tr.guest == nil || tr.guest.Ended() {
		t.Skip("no guest writes")
	}
}

var progress = regexp.MustCompile(`(?m)^SYNCED (\d+)$`)

// synced is how many files the guest has written and synced.
func (tr *trial) synced() int {
	n := 0
	if all := progress.FindAllStringSubmatch(tr.guest.Serial(), -1); len(all) > 0 {
		n, _ = strconv.Atoi(all[len(all)-1][1])
	}
	return n
}

// writes waits until the guest has written and synced more than it had.
func (tr *trial) writes(t *testing.T, before int) {
	t.Helper()
	until(t, bootLimit, func() error {
		if tr.guest.Ended() {
			t.Fatalf("the guest has ended:\n%s", tr.guest.Serial())
		}
		if n := tr.synced(); n <= before {
			return fmt.Errorf("the guest has written %d files, and none since", n)
		}
		return nil
	})
}

// filesOfLoad is how many the guest writes in turn: from then on it makes no new ones.
const filesOfLoad = 40

// restarts takes away what a guest's writes do not need, and then what they do, as an upgrade of a package or a hand does.
func (tr *trial) restarts(t *testing.T) {
	tr.load(t)
	m := tr.m
	exec := func(script string) string {
		t.Helper()
		text, err := m.Exec(shortLimit, script)
		must(t, err)
		return text
	}
	tr.writes(t, filesOfLoad)
	exec("systemctl stop varve-control.service")
	without := tr.synced()
	tr.writes(t, without+10)
	without = tr.synced() - without
	exec("systemctl start varve-control.service")
	_, err := m.Ready(shortLimit)
	must(t, err)
	begin := time.Now()
	exec("systemctl restart varve-gateway.service")
	took := time.Since(begin)
	tr.writes(t, tr.synced())
	_, err = m.Ready(shortLimit)
	must(t, err)
	if text := exec("systemctl show -P NRestarts varve-control varve-gateway; systemctl --failed --no-legend --plain; varve crashes -o json | tr -d '[] \\n'"); strings.Trim(text, "0\n") != "" {
		t.Fatalf("restarts by the service manager, failed units, crash reports: %q", text)
	}
	harness.Show("image: %d files were synced while varve-control was stopped; varve-gateway restarted in %.1f s and the guest's writes went on; nothing failed", without, took.Seconds())
}

// status is `varve update status` in the machine.
func (tr *trial) status() (update.Status, error) {
	var st update.Status
	text, err := tr.m.Exec(shortLimit, "varve update status -o json")
	if err == nil {
		err = json.Unmarshal([]byte(text), &st)
	}
	return st, err
}

// apply has the machine update itself and restart, and says when it was told to restart. The image has the keys of whoever made it; here it is told the test's for this one start.
func (tr *trial) apply(t *testing.T, bundle string) (written time.Time) {
	t.Helper()
	_, err := tr.m.Exec(applyLimit, `set -e
mkdir -p /run/bundles /run/keys; cp /etc/varve/* /run/keys/
mount -o ro /dev/disk/by-label/VARVE_UPDATES /run/bundles; cp /run/bundles/update.pub /run/keys/
mount --bind /run/keys /etc/varve
varve update apply /run/bundles/`+bundle+` >&2`)
	must(t, err)
	written = time.Now()
	// It may be gone before it has answered; whether it restarted is seen in what runs then.
	if _, err := tr.m.Exec(shortLimit, "systemctl --no-block reboot"); err != nil {
		t.Logf("reboot: %v", err)
	}
	return written
}

func (tr *trial) update(t *testing.T) {
	tr.load(t)
	before := tr.synced()
	st, err := tr.status()
	must(t, err)
	begin := time.Now()
	written := tr.apply(t, nextBundle)
	until(t, bootLimit, func() error {
		now, err := tr.status()
		if err == nil && (now.Running == st.Running || now.Version != tr.next.version || now.Boot.Try != "" || now.Boot.Slot != now.Running) {
			err = fmt.Errorf("%+v", now)
		}
		return err
	})
	confirmed := time.Now()
	tr.writes(t, max(before, tr.synced()))
	harness.Show("image: update from %s to %s while a guest writes: %.0f s to write the slot, %.0f s to restart, be healthy for half a minute and be kept; %d files were synced meanwhile",
		st.Version, tr.next.version, written.Sub(begin).Seconds(), confirmed.Sub(written).Seconds(), tr.synced()-before)
}

func (tr *trial) brokenUpdate(t *testing.T) {
	tr.load(t)
	before := tr.synced()
	st, err := tr.status()
	must(t, err)
	slot := "Varve: slot " + string(st.Running.Other())
	started := func() int {
		text, err := os.ReadFile(tr.m.serial())
		must(t, err)
		return strings.Count(string(text), slot)
	}
	already := started()
	begin := tr.apply(t, brokenBundle)
	until(t, bootLimit, func() error {
		now, err := tr.status()
		if err == nil && (now.Running != st.Running || now.Version != st.Version || now.Boot.Try != "" || now.Last == nil || now.Last.Version != brokenVersion || now.Last.Done) {
			err = fmt.Errorf("%+v", now)
		}
		return err
	})
	tries := started() - already
	if tries != update.TriesMax {
		t.Errorf("the loader started the broken system %d times, not %d", tries, update.TriesMax)
	}
	tr.writes(t, max(before, tr.synced()))
	harness.Show("image: an update whose kernel panics was started %d times and then left by itself, %.0f s after the restart; the guest's writes went on", tries, time.Since(begin).Seconds())
}

func (tr *trial) powerCuts(t *testing.T) {
	tr.load(t)
	cuts := 10
	if n, err := strconv.Atoi(os.Getenv("VARVE_IMAGE_CUTS")); err == nil {
		cuts = n
	}
	st, err := tr.status()
	must(t, err)
	var boots []string
	for i := range cuts {
		tr.writes(t, tr.synced())
		time.Sleep(time.Duration(i%5) * 300 * time.Millisecond) // at another moment of the load each time
		tr.m.Cut()
		tr.m.UEFI = i >= cuts/2
		must(t, tr.m.Start())
		took, err := tr.m.Ready(bootLimit)
		must(t, err)
		boots = append(boots, fmt.Sprintf("%.0f", took.Seconds()))
		now, err := tr.status()
		must(t, err)
		if now.Running != st.Running || now.Version != st.Version || now.Boot != st.Boot {
			t.Fatalf("UEFI %t: after a power cut %+v runs, before it %+v", tr.m.UEFI, now, st)
		}
	}
	tr.writes(t, tr.synced())
	harness.Show("image: %d power cuts while a guest writes, %d of them started by BIOS and %d by UEFI: ready again after %s s", cuts, cuts/2, cuts-cuts/2, strings.Join(boots, " "))
}

func (tr *trial) verified(t *testing.T) {
	tr.load(t)
	m := tr.m
	stop := filepath.Join(t.TempDir(), "stop")
	must(t, os.WriteFile(stop, []byte("stop\n"), 0o644))
	if out, err := harness.Run(shortLimit, "nfs-cp", stop, fmt.Sprintf("nfs://127.0.0.1/default/stop?nfsport=%d&mountport=%d", m.NFS, m.NFS)); err != nil {
		t.Fatalf("nfs-cp: %v\n%s", err, out)
	}
	line, err := tr.guest.WaitFor(bootLimit, `^GUEST-RC \d+$`)
	if err != nil || line != "GUEST-RC 0" {
		t.Fatalf("%s %v\n%s", line, err, tr.guest.Serial())
	}
	files := regexp.MustCompile(`(?m)^VERIFIED (\d+) OF (\d+)$`).FindStringSubmatch(tr.guest.Serial())
	if files == nil || files[1] == "0" {
		t.Fatalf("nothing verified:\n%s", tr.guest.Serial())
	}
	must(t, m.PowerOff(offLimit))
	checkDisks(t, m)
	if !t.Failed() {
		harness.Show("image: afterwards the %s files that hold the last of %s synced ones are whole, e2fsck of the guest's disk over NBD is clean, its contents are; "+
			"e2fsck and xfs_repair -n of the appliance's own disks are clean", files[1], files[2])
	}
}

func (tr *trial) redeployed(t *testing.T) {
	m := tr.m
	m.Cut()
	m.UEFI = true
	must(t, m.Deploy())
	file := filepath.Join(m.Dir, "config")
	must(t, os.WriteFile(file, []byte("mgmt_nic: "+wireCard+"\nmgmt_ip: "+firstOnWire+"/24\ngateway: "+wireGateway+"\n"), 0o600))
	m.Arguments, m.Second = []string{"-fw_cfg", "name=opt/varve/config,file=" + file}, tr.second
	must(t, m.Start())
	took, err := m.Ready(bootLimit)
	must(t, err)
	out, err := harness.Run(shortLimit, "nfs-ls", fmt.Sprintf("nfs://127.0.0.1/default?nfsport=%d&mountport=%d", m.NFS, m.NFS))
	if err != nil || !strings.Contains(out, "disk1.raw") || !strings.Contains(out, "f0") {
		t.Errorf("after a redeploy of the system disk: %v\n%s", err, out)
	}
	answer, err := m.Client().Post(m.URL("/api/internal/setup"), "application/json", strings.NewReader(`{"code":"x","name":"y","password":"`+password+`"}`))
	must(t, err)
	answer.Body.Close()
	if answer.StatusCode/100 == 2 {
		t.Errorf("an appliance that has an administrator answers set-up with %s", answer.Status)
	}
	if !t.Failed() {
		harness.Show("image: a fresh system disk (by UEFI) on the old data disk serves its vDisks and knows its administrator, ready in %.0f s", took.Seconds())
	}
}

// What each source gives the second appliance. Where two give the same, the OVF environment counts more than the seed, and that more than fw_cfg.
const (
	secondName = "shelf-two"
	ovfXML     = `<?xml version="1.0" encoding="UTF-8"?>
<Environment xmlns="http://schemas.dmtf.org/ovf/environment/1" xmlns:oe="http://schemas.dmtf.org/ovf/environment/1" oe:id="">
  <PropertySection>
    <Property oe:key="guestinfo.varve.hostname" oe:value="` + secondName + `"/>
    <Property oe:key="guestinfo.varve.mgmt_ip" oe:value="` + secondAddr + `/24"/>
    <Property oe:key="guestinfo.varve.gateway" oe:value="` + wireGateway + `"/>
    <Property oe:key="guestinfo.varve.ntp" oe:value=""/>
  </PropertySection>
</Environment>
`
	seedMeta = "local-hostname: not-this\n"
	seedUser = "#cloud-config\ntimezone: Europe/Brussels\nvarve:\n  search: lab.example\n"
)

func (tr *trial) join(t *testing.T) {
	m, second := tr.m, tr.second
	token, err := m.Exec(shortLimit, "varve cluster token create")
	must(t, err)
	file := func(name, text string) string {
		path := filepath.Join(second.Dir, name)
		must(t, os.MkdirAll(filepath.Dir(path), 0o755))
		must(t, os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	file("ovf/ovf-env.xml", ovfXML)
	file("seed/meta-data", seedMeta)
	file("seed/user-data", seedUser)
	config := file("config", "mode: join\njoin_token: "+strings.TrimSpace(token)+"\nntp: [192.0.2.1]\ntimezone: UTC\nhostname: nor-this\n")
	disc := func(name, label string) string {
		iso := filepath.Join(second.Dir, name+".iso")
		if out, err := harness.Run(shortLimit, "xorriso", "-as", "mkisofs", "-quiet", "-R", "-V", label, "-o", iso, filepath.Join(second.Dir, name)); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return iso
	}
	second.Arguments = []string{"-drive", "file=" + disc("ovf", "OVF_ENV") + ",format=raw,if=ide,media=cdrom,readonly=on",
		"-drive", "file=" + disc("seed", "CIDATA") + ",format=raw,if=virtio,readonly=on", "-fw_cfg", "name=opt/varve/config,file=" + config}
	must(t, second.Start())
	took, err := second.Ready(bootLimit)
	if err != nil {
		log, e := second.Exec(shortLimit, "systemctl --failed; journalctl -b --no-pager | tail -80")
		t.Fatalf("%v\n%s %v", err, log, e)
	}
	text, err := second.Exec(shortLimit, "varve firstboot show -o json")
	must(t, err)
	var report firstboot.Report
	must(t, json.Unmarshal([]byte(text), &report))
	for key, want := range map[string]firstboot.Value{
		firstboot.Hostname: {Text: secondName, Source: firstboot.SourceOVF}, firstboot.MgmtIP: {Text: secondAddr + "/24", Source: firstboot.SourceOVF},
		firstboot.Timezone: {Text: "Europe/Brussels", Source: firstboot.SourceNoCloud}, firstboot.Search: {Text: "lab.example", Source: firstboot.SourceNoCloud},
		firstboot.NTP: {Text: "192.0.2.1", Source: firstboot.SourceFWCfg}, firstboot.Mode: {Text: "join", Source: firstboot.SourceFWCfg},
	} {
		if report.Settings[key] != want {
			t.Errorf("%s is %+v, not %+v", key, report.Settings[key], want)
		}
	}
	for _, p := range report.Problems {
		t.Errorf("problem: %s", p)
	}
	inForce, err := second.Exec(shortLimit, "hostname; readlink /run/varve/localtime; ip -4 -br addr; cat /run/chrony-sources/varve.sources; resolvectl domain")
	must(t, err)
	for _, want := range []string{secondName + "\n", "/Europe/Brussels\n", secondAddr + "/24", "192.0.2.1", "lab.example"} {
		if !strings.Contains(inForce, want) {
			t.Errorf("%q is not in force:\n%s", want, inForce)
		}
	}
	tr.browser(t, "nodes", "VARVE_NODE="+secondName)
	if !t.Failed() {
		harness.Show("image: a second appliance had its settings from OVF CD-ROM (name, address), NoCloud seed (time zone, domain) and fw_cfg (NTP, join token), "+
			"joined, ready in %.0f s, and is in the first one's console", took.Seconds())
	}
	must(t, second.PowerOff(offLimit))
}
