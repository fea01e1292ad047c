//go:build e2e

package image

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"varve/test/harness"
)

// exposureMax is what `systemd-analyze security` may give a unit, of ten.
const exposureMax = "20" // 2.0

// rootShells are services that exist to give an administrator the whole machine.
var rootShells = map[string]bool{"varve-ssh.service": true}

var exposure = regexp.MustCompile(`Overall exposure level for \S+: ([0-9.]+)`)

func units(t *testing.T, pattern string) []string {
	t.Helper()
	var all []string
	for _, dir := range []string{"systemd", "systemd/appliance"} {
		found, err := filepath.Glob(filepath.Join(harness.Root(), dir, pattern))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, found...)
	}
	if len(all) == 0 {
		t.Fatalf("no %s", pattern)
	}
	return all
}

func TestUnitsAreSandboxed(t *testing.T) {
	harness.Need(t, "systemd-analyze")
	worst := "0"
	for _, unit := range units(t, "*.service") {
		name := filepath.Base(unit)
		if rootShells[name] {
			continue
		}
		out, err := exec.Command("systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold="+exposureMax, unit).CombinedOutput()
		m := exposure.FindSubmatch(out)
		if m == nil {
			t.Errorf("%s: %v\n%s", name, err, out)
			continue
		}
		if err != nil {
			var open []string
			for line := range strings.Lines(string(out)) {
				if strings.HasPrefix(line, "✗") {
					open = append(open, line)
				}
			}
			t.Errorf("%s: exposure %s, more than 2.0:\n%s", name, m[1], strings.Join(open, ""))
		}
		worst = max(worst, string(m[1]))
	}
	harness.Show("units: %d services, the most exposed has %s of 10 by systemd-analyze security (gate: 2.0)", len(units(t, "*.service"))-len(rootShells), worst)
}

// The units are read by systemd itself in a root of their own, with the programs they name: nothing it does not know, no
// reference that leads nowhere, no loop in the order.
func TestUnitsAreUnderstood(t *testing.T) {
	harness.Need(t, "systemd-analyze")
	root := t.TempDir()
	dir := filepath.Join(root, "usr/lib/systemd/system")
	must(t, os.MkdirAll(dir, 0o755))
	var names []string
	for _, pattern := range []string{"*.service", "*.socket", "*.slice", "*.mount", "*.path"} {
		for _, unit := range units(t, pattern) {
			text, err := os.ReadFile(unit)
			must(t, err)
			name := filepath.Base(unit)
			must(t, os.WriteFile(filepath.Join(dir, name), text, 0o644))
			for _, m := range regexp.MustCompile(`(?m)^Exec\w+=[-+]?(/\S+)`).FindAllSubmatch(text, -1) {
				program := filepath.Join(root, string(m[1]))
				must(t, os.MkdirAll(filepath.Dir(program), 0o755))
				must(t, os.WriteFile(program, []byte("#!/bin/sh\n"), 0o755))
			}
			names = append(names, strings.Replace(name, "@.", "@tty1.", 1))
		}
	}
	// What Debian brings and the units refer to.
	for _, u := range []string{"sysinit.target", "basic.target", "multi-user.target", "network.target", "network-pre.target", "network-online.target", "local-fs.target",
		"time-sync.target", "sockets.target", "shutdown.target", "umount.target", "slices.target", "getty.target", "nss-user-lookup.target", "paths.target"} {
		must(t, os.WriteFile(filepath.Join(dir, u), []byte("[Unit]\nDescription="+u+"\n"), 0o644))
	}
	out, err := exec.Command("systemd-analyze", append([]string{"verify", "--man=no", "--recursive-errors=no", "--root=" + root}, names...)...).CombinedOutput()
	if err != nil {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		if regexp.MustCompile(`(?i)unknown|invalid|failed to parse|ignoring|cycle|not executable`).MatchString(line) {
			t.Error(strings.TrimSpace(line))
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
