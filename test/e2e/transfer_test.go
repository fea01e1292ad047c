//go:build e2e

package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"varve/test/harness"
)

// Images of every format come in and go out again as the same disk; what is not an image leaves nothing behind.
func TestNBDImportExport(t *testing.T) {
	harness.Need(t, "qemu-img")
	n := harness.StartNode(t)
	dir := t.TempDir()
	raw := filepath.Join(dir, "in.raw")
	writeFile(t, raw, random(21, 12<<20))
	must(t, os.Truncate(raw, 96<<20))
	qemu := func(args ...string) { t.Helper(); harness.Qemu(t, time.Minute, "qemu-img", args...) }
	formats := []string{"raw", "qcow2", "vmdk", "vhdx"}
	for _, format := range formats {
		in, out := filepath.Join(dir, "in."+format), filepath.Join(dir, "out."+format)
		if format != "raw" {
			qemu("convert", "-f", "raw", "-O", format, raw, in)
		}
		n.MustCLI(t, "vdisk", "import", in, "default/from-"+format)
		qemu("compare", "-f", "raw", "-F", "raw", raw, n.NBD("from-"+format))
		n.MustCLI(t, "vdisk", "export", "default/from-"+format, out, "--format", format)
		qemu("compare", "-f", "raw", "-F", format, raw, out)
	}
	n.MustCLI(t, "vdisk", "import", n.NBD("from-raw"), "default/from-nbd")
	qemu("compare", "-f", "raw", "-F", "raw", raw, n.NBD("from-nbd"))
	st, err := harness.Run(time.Minute, "du", "-m", filepath.Join(dir, "out.raw"))
	must(t, err)
	if mb := strings.Fields(st)[0]; mb != "12" && mb != "13" {
		t.Errorf("the exported raw image takes %s MiB on disk, 12 are written", mb)
	}
	broken := filepath.Join(dir, "broken.qcow2")
	writeFile(t, broken, strings.NewReader("QFI\xfb\x00\x00\x00\x03 and no more"))
	if out, err := n.CLI("vdisk", "import", broken, "default/broken"); err == nil {
		t.Errorf("a broken image was imported:\n%s", out)
	}
	if list := n.MustCLI(t, "vdisk", "list"); strings.Contains(list, "broken") {
		t.Errorf("a failed import leaves a vDisk behind:\n%s", list)
	}
	harness.Show("import and export of %s, and import from an NBD URI: the same disk each time, raw stays sparse; a broken image leaves nothing",
		strings.Join(formats, ", "))
}
