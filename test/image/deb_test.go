//go:build e2e

package image

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"varve/test/harness"
)

// The package is made twice and must be the same; then dpkg installs it into a directory, upgrades it, and removes it, and what an
// administrator changed and what the volumes hold stays.
func TestDebInstallsIntoADirectory(t *testing.T) {
	harness.Need(t, "dpkg", "dpkg-deb", "systemd-sysusers", "systemctl")
	dir := t.TempDir()
	binary := filepath.Join(dir, "varve")
	must(t, os.WriteFile(binary, []byte("#!/bin/sh\necho varve\n"), 0o755))
	build := func(version, name string) string {
		deb := filepath.Join(dir, name)
		c := exec.Command(filepath.Join(harness.Root(), "systemd/deb.sh"), version, deb)
		c.Env = append(os.Environ(), "BIN="+binary, "SOURCE_DATE_EPOCH=1700000000")
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("deb.sh: %v\n%s", err, out)
		}
		return deb
	}
	first, second := build("1.0.0", "a.deb"), build("1.0.0", "b.deb")
	a, err := os.ReadFile(first)
	must(t, err)
	b, err := os.ReadFile(second)
	must(t, err)
	if !bytes.Equal(a, b) {
		t.Error("two packages of the same differ")
	}

	root := filepath.Join(dir, "root")
	must(t, os.MkdirAll(filepath.Join(root, "var/lib/dpkg/info"), 0o755))
	must(t, os.MkdirAll(filepath.Join(root, "var/lib/dpkg/updates"), 0o755))
	must(t, os.MkdirAll(filepath.Join(root, "etc"), 0o755))
	must(t, os.WriteFile(filepath.Join(root, "var/lib/dpkg/status"), nil, 0o644))
	dpkg := func(args ...string) string {
		t.Helper()
		c := exec.Command("dpkg", append([]string{"--root=" + root, "--force-script-chrootless", "--force-depends", "--force-not-root", "--log=/dev/null"}, args...)...)
		out, err := c.CombinedOutput()
		if err != nil {
			t.Fatalf("dpkg %s: %v\n%s", args, err, out)
		}
		return string(out)
	}
	dpkg("-i", first)
	for file, mode := range map[string]os.FileMode{
		"usr/bin/varve": 0o755, "lib/systemd/system/varve-control.service": 0o644, "lib/systemd/system/varve-gateway.service": 0o644,
		"lib/systemd/system/varve-nfs.socket": 0o644, "lib/systemd/system/varve.slice": 0o644, "usr/lib/sysusers.d/varve.conf": 0o644, "etc/varve/varve.env": 0o644,
	} {
		info, err := os.Stat(filepath.Join(root, file))
		if err != nil || info.Mode() != mode {
			t.Errorf("%s: %v %v", file, info, err)
		}
	}
	for _, wanted := range []string{"multi-user.target.wants/varve-control.service", "multi-user.target.wants/varve-gateway.service",
		"sockets.target.wants/varve-https.socket", "sockets.target.wants/varve-portmap.socket"} {
		if _, err := os.Lstat(filepath.Join(root, "etc/systemd/system", wanted)); err != nil {
			t.Errorf("not enabled: %v", err)
		}
	}
	passwd, err := os.ReadFile(filepath.Join(root, "etc/passwd"))
	if err != nil || !strings.Contains(string(passwd), "varve:x:950:950:") || !strings.Contains(string(passwd), "nologin") {
		t.Errorf("user: %v %s", err, passwd)
	}
	if out := dpkg("--verify", "varve"); out != "" {
		t.Errorf("dpkg --verify: %s", out)
	}

	env := filepath.Join(root, "etc/varve/varve.env")
	must(t, os.WriteFile(env, []byte("VARVE_LOG_SIZE=8GiB\n"), 0o644))
	data := filepath.Join(root, "var/lib/varve/log")
	must(t, os.MkdirAll(data, 0o700))
	dpkg("--force-confold", "-i", build("1.0.1", "c.deb"))
	if text, err := os.ReadFile(env); err != nil || string(text) != "VARVE_LOG_SIZE=8GiB\n" {
		t.Errorf("settings after an upgrade: %q %v", text, err)
	}
	dpkg("--purge", "varve")
	if _, err := os.Stat(data); err != nil {
		t.Errorf("the data is gone: %v", err)
	}
	if _, err := os.Stat(filepath.Join(root, "usr/bin/varve")); err == nil {
		t.Error("the program is still there")
	}
	harness.Show("deb: made twice byte-identical (%d KiB without the binary); installed, upgraded and purged with dpkg --root: units enabled, settings and data kept", len(a)>>10)
}
