package doctor

import (
	"os"
	"path/filepath"
	"testing"
)

func TestUnsafeLayouts(t *testing.T) {
	const big = 100 << 30
	for name, c := range map[string]struct {
		disks []BlockDevice
		want  Status
	}{
		"all on an SSD":              {[]BlockDevice{{Kind: "ssd", Size: big, Roles: []string{"backend", "cache", "log"}}}, OK},
		"log on SSD, backend on HDD": {[]BlockDevice{{Kind: "nvme", Size: big, Roles: []string{"log"}}, {Kind: "hdd", Size: big, Roles: []string{"backend"}}}, OK},
		"log and backend on one HDD": {[]BlockDevice{{Kind: "hdd", Size: big, Roles: []string{"backend", "log"}}}, Fail},
		"log on an HDD":              {[]BlockDevice{{Kind: "hdd", Size: big, Roles: []string{"log"}}}, Warn},
		"cache on an HDD":            {[]BlockDevice{{Kind: "ssd", Size: big, Roles: []string{"log"}}, {Kind: "hdd", Size: big, Roles: []string{"cache"}}}, Warn},
		"small":                      {[]BlockDevice{{Kind: "virtual", Size: 20 << 30, Roles: []string{"log"}}}, Warn},
		"a warning beside the fault": {[]BlockDevice{{Kind: "hdd", Size: big, Roles: []string{"cache"}}, {Kind: "hdd", Size: big, Roles: []string{"backend", "log"}}}, Fail},
		"a fault beside the warning": {[]BlockDevice{{Kind: "hdd", Size: big, Roles: []string{"backend", "log"}}, {Kind: "hdd", Size: big, Roles: []string{"cache"}}}, Fail},
		"disks that are not ours":    {[]BlockDevice{{Kind: "hdd", Size: 1}}, OK},
	} {
		if f := judge(c.disks); f.Status != c.want || (f.Remedy == "") != (c.want == OK) || f.Evidence == "" {
			t.Errorf("%s: %+v, want %s", name, f, c.want)
		}
	}
	for _, c := range []struct {
		budgets, total int64
		want           Status
	}{{512 << 20, 8 << 30, OK}, {512 << 20, 3 << 30, Warn}, {512 << 20, 1800 << 20, Fail}, {8 << 30, 8 << 30, Fail}} {
		if f := memoryOf(Layout{Budgets: c.budgets}, c.total); f.Status != c.want {
			t.Errorf("%+v: %+v", c, f)
		}
	}
}

func TestAnApplianceOnWhatItServes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mounts")
	text := "/dev/sda1 / ext4 rw 0 0\n10.0.0.1:/default /mnt/own\\040pool nfs rw 0 0\n10.0.0.2:/x /mnt/other nfs rw 0 0\n[fd00::1]:/d /mnt/six nfs4 rw 0 0\n" +
		"/dev/nbd0 /mnt/nbd xfs rw 0 0\n/dev/sdb /mnt/nbd/inside xfs rw 0 0\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	mounts, err := nfsMounts(path)
	if err != nil {
		t.Fatal(err)
	}
	own := []string{"localhost", "10.0.0.1", "fd00::1"}
	for p, want := range map[string]Status{"/srv": OK, "/mnt/own pool/data": Fail, "/mnt/own pool": Fail, "/mnt/own poolside": OK, "/mnt/other/d": OK, "/mnt/six": Fail,
		"/mnt/nbd/d": Fail, "/mnt/nbd/inside/d": OK, "": OK} {
		if f := circle([]string{p}, mounts, own); f.Status != want {
			t.Errorf("%q: %+v", p, f)
		}
	}
}
