package vmdk

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// disk is a buffer that can be written at.
type disk []byte

func (d disk) WriteAt(p []byte, at int64) (int, error) { return copy(d[at:], p), nil }

// samples are disks whose ends, holes and contents differ.
func samples() map[string][]byte {
	rng := rand.NewChaCha8([32]byte{7})
	random := func(n int) []byte {
		b := make([]byte, n)
		rng.Read(b)
		return b
	}
	holes := make([]byte, 80<<20) // more than two tables
	for _, at := range []int{0, 40 << 20, 80<<20 - 512} {
		copy(holes[at:], random(512))
	}
	copy(holes[33<<20-100:], bytes.Repeat([]byte("varve "), 40000))
	return map[string][]byte{
		"zeros":       make([]byte, 1<<20),
		"random":      random(3 << 20),
		"one sector":  random(512),
		"holes":       holes,
		"short grain": append(make([]byte, Grain), random(1536)...),
	}
}

func TestWhatIsWrittenIsRead(t *testing.T) {
	for name, raw := range samples() {
		var b, again bytes.Buffer
		o := Options{ID: [16]byte{1, 2, 3}, Name: "disk.vmdk"}
		n, err := Write(&b, bytes.NewReader(raw), int64(len(raw)), o)
		if err != nil || n != int64(b.Len()) {
			t.Fatalf("%s: %d of %d bytes, %v", name, n, b.Len(), err)
		}
		if _, err := Write(&again, bytes.NewReader(raw), int64(len(raw)), o); err != nil || !bytes.Equal(again.Bytes(), b.Bytes()) {
			t.Errorf("%s: a second file differs, %v", name, err)
		}
		got := make(disk, len(raw))
		l, err := Inspect(bytes.NewReader(b.Bytes()), n, got)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if !bytes.Equal(got, raw) {
			t.Errorf("%s: the disk read back differs", name)
		}
		if l.EndAt != n-Sector || !bytes.Equal(b.Bytes()[l.EndAt:], make([]byte, Sector)) || n%Sector != 0 {
			t.Errorf("%s: the end marker is at %d of %d", name, l.EndAt, n)
		}
		if l.Capacity != int64(len(raw)) || !strings.Contains(l.Descriptor, "CID=01020300\n") {
			t.Errorf("%s: %+v", name, l)
		}
	}
}

// qemu-img reads by the tables, from the end: the other way of reading than Inspect's.
func TestQemuReadsTheSame(t *testing.T) {
	tool, err := exec.LookPath("qemu-img")
	if err != nil {
		if os.Getenv("VARVE_REQUIRE_TOOLS") != "" {
			t.Fatal(err)
		}
		t.Skip("no qemu-img")
	}
	for name, raw := range samples() {
		dir := t.TempDir()
		rawFile, file := filepath.Join(dir, "raw"), filepath.Join(dir, "disk.vmdk")
		if err := os.WriteFile(rawFile, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Create(file)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Write(f, bytes.NewReader(raw), int64(len(raw)), Options{Name: "disk.vmdk"}); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		for _, args := range [][]string{{"check", "-f", "vmdk", file}, {"compare", "-f", "vmdk", "-F", "raw", file, rawFile}} {
			if out, err := exec.Command(tool, args...).CombinedOutput(); err != nil {
				t.Errorf("%s: qemu-img %s: %v\n%s", name, args[0], err, out)
			}
		}
	}
}

// What qemu-img writes is refused: it is the file whose end importers stumble over.
func TestQemusOwnFileIsRefused(t *testing.T) {
	tool, err := exec.LookPath("qemu-img")
	if err != nil {
		t.Skip("no qemu-img")
	}
	dir := t.TempDir()
	rawFile, file := filepath.Join(dir, "raw"), filepath.Join(dir, "disk.vmdk")
	if err := os.WriteFile(rawFile, samples()["random"], 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(tool, "convert", "-O", "vmdk", "-o", "subformat=streamOptimized", rawFile, file).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Inspect(bytes.NewReader(b), int64(len(b)), nil); err == nil {
		t.Error("accepted")
	}
}

func TestDamageIsFound(t *testing.T) {
	raw := samples()["holes"]
	var b bytes.Buffer
	if _, err := Write(&b, bytes.NewReader(raw), int64(len(raw)), Options{Name: "d"}); err != nil {
		t.Fatal(err)
	}
	for name, damage := range map[string]func([]byte) []byte{
		"a sector behind the end":   func(f []byte) []byte { return append(f, make([]byte, Sector)...) },
		"no end":                    func(f []byte) []byte { return f[:len(f)-Sector] },
		"a grain's data":            func(f []byte) []byte { f[overhead+40] ^= 1; return f },
		"a grain's place":           func(f []byte) []byte { f[overhead] = 1; return f },
		"a table's entry":           func(f []byte) []byte { f[len(f)-5*Sector-1] ^= 1; return f },
		"the footer":                func(f []byte) []byte { f[len(f)-2*Sector+12]++; return f },
		"the directory's place":     func(f []byte) []byte { f[len(f)-2*Sector+56]++; return f },
		"sent as text":              func(f []byte) []byte { f[75] = '\n'; return f },
		"a directory at the header": func(f []byte) []byte { binary.LittleEndian.PutUint64(f[56:], 21); return f },
		"nothing":                   func([]byte) []byte { return nil },
	} {
		f := damage(bytes.Clone(b.Bytes()))
		if _, err := Inspect(bytes.NewReader(f), int64(len(f)), nil); err == nil {
			t.Errorf("%s: not found", name)
		}
	}
}

func TestSizesThatCannotBe(t *testing.T) {
	for _, size := range []int64{0, -512, 511, 2<<40 + 512} {
		if _, err := Write(&bytes.Buffer{}, bytes.NewReader(nil), size, Options{}); err == nil {
			t.Errorf("%d bytes are accepted", size)
		}
	}
}

func FuzzInspect(f *testing.F) {
	var b bytes.Buffer
	raw := samples()["short grain"]
	if _, err := Write(&b, bytes.NewReader(raw), int64(len(raw)), Options{Name: "d"}); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, file []byte) {
		l, err := Inspect(bytes.NewReader(file), int64(len(file)), nil)
		if err == nil && l.EndAt+Sector != int64(len(file)) {
			t.Fatalf("accepted with the end at %d of %d", l.EndAt, len(file))
		}
	})
}
