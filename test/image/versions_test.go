//go:build e2e

package image

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"varve/appliance/update"
	"varve/control/state"
	"varve/test/harness"
)

const (
	nextBundle    = "next.varve"
	brokenBundle  = "broken.varve"
	brokenVersion = "9.9-broken"
)

// versions are what an image is updated to.
type versions struct {
	disc    string // an ISO 9660 file system labelled VARVE_UPDATES: the bundles, and the public key that they are signed with
	version string // of next.varve
}

// nextVersions makes them of the system in an image, into a directory: next.varve is the same with another number of the same length written over its own,
// broken.varve has a kernel and nothing that it could start.
func nextVersions(t *testing.T, image, into string) *versions {
	t.Helper()
	dir := t.TempDir()
	root, tree := filepath.Join(filepath.Dir(image), "root.squashfs"), filepath.Join(dir, "tree")
	asRoot(t, "unsquashfs", "-quiet", "-no-progress", "-d", tree, root)
	text, err := os.ReadFile(filepath.Join(tree, "usr/lib/varve/version"))
	must(t, err)
	old := strings.TrimSpace(string(text))
	last := "x"
	if strings.HasSuffix(old, last) {
		last = "y"
	}
	v := &versions{disc: filepath.Join(into, "updates.iso"), version: old[:len(old)-1] + last}
	program, err := os.ReadFile(filepath.Join(tree, "usr/bin/varve"))
	must(t, err)
	if !bytes.Contains(program, []byte(old)) {
		t.Fatalf("the program does not say that it is %s", old)
	}
	changed := filepath.Join(dir, "varve")
	must(t, os.WriteFile(changed, bytes.ReplaceAll(program, []byte(old), []byte(v.version)), 0o755))
	number := filepath.Join(dir, "version")
	must(t, os.WriteFile(number, []byte(v.version+"\n"), 0o644))
	asRoot(t, "install", "-m755", changed, filepath.Join(tree, "usr/bin/varve"))
	asRoot(t, "install", "-m644", number, filepath.Join(tree, "usr/lib/varve/version"))

	discs := filepath.Join(dir, "disc")
	must(t, os.Mkdir(discs, 0o755))
	private, public, err := update.NewKey()
	must(t, err)
	must(t, os.WriteFile(filepath.Join(discs, "update.pub"), []byte(public+"\n"), 0o644))
	pack := func(name, version string, what ...string) {
		t.Helper()
		squash := filepath.Join(dir, name+".squashfs")
		asRoot(t, "mksquashfs", append(what, squash, "-noappend", "-no-progress", "-quiet", "-comp", "gzip", "-noI", "-noId", "-noD", "-noF", "-noX", "-b", "128K",
			"-xattrs")...)
		system, err := os.Open(squash)
		must(t, err)
		defer system.Close()
		out, err := os.Create(filepath.Join(discs, name))
		must(t, err)
		key, err := update.ParsePrivateKey(private)
		must(t, err)
		_, err = update.Pack(out, update.Manifest{Version: version, Built: time.Unix(0, 0), LevelMin: state.LevelMin, LevelMax: state.LevelMax}, system, key)
		must(t, err)
		must(t, out.Close())
		asRoot(t, "rm", squash)
	}
	pack(nextBundle, v.version, tree)
	pack(brokenBundle, brokenVersion, filepath.Join(tree, "boot"), filepath.Join(tree, "vmlinuz"), filepath.Join(tree, "initrd.img"))
	asRoot(t, "rm", "-rf", tree)
	if out, err := harness.Run(shortLimit, "xorriso", "-as", "mkisofs", "-quiet", "-R", "-V", "VARVE_UPDATES", "-o", v.disc, discs); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return v
}

// asRoot runs a program that keeps the owners of files.
func asRoot(t *testing.T, name string, args ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		name, args = "sudo", append([]string{name}, args...)
	}
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}
