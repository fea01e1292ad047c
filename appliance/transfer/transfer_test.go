package transfer

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"varve/appliance/nbdclient"
	"varve/gateway/nbd"
	"varve/volumedriver/blockio"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// ram is a device in memory that knows its allocation by 64 KiB and can be made to fail writes beyond an offset.
type ram struct {
	mu       sync.Mutex
	data     []byte
	written  []bool
	failFrom int64 // 0: never
	writes   int
	flushed  bool
}

const grain = 64 << 10

func newRAM(size int64) *ram {
	return &ram{data: make([]byte, size), written: make([]bool, (size+grain-1)/grain)}
}

func (r *ram) Size() int64                              { return int64(len(r.data)) }
func (r *ram) ReadOnly() bool                           { return false }
func (r *ram) TryRead([]byte, int64) error              { return blockio.ErrBusy }
func (r *ram) TryFlush(blockio.Completer, uint64) error { return blockio.ErrBusy }
func (r *ram) Kick()                                    {}
func (r *ram) KickSync()                                {}
func (r *ram) KickAhead()                               {}
func (r *ram) FlushInline() error                       { return r.Flush(context.Background()) }
func (r *ram) TryZero(int64, int64, blockio.Flags, blockio.Completer, uint64) error {
	return blockio.ErrBusy
}
func (r *ram) TryWrite([]byte, int64, blockio.Flags, blockio.Completer, uint64) error {
	return blockio.ErrBusy
}

func (r *ram) Read(_ context.Context, p []byte, off int64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	copy(p, r.data[off:])
	return nil
}

func (r *ram) Write(_ context.Context, p []byte, off int64, _ blockio.Flags) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.failFrom > 0 && off+int64(len(p)) > r.failFrom {
		return blockio.ErrNoSpace
	}
	r.writes++
	r.flushed = false
	for i := off / grain; i <= (off+int64(len(p))-1)/grain; i++ {
		r.written[i] = true
	}
	copy(r.data[off:], p)
	return nil
}

func (r *ram) Zero(_ context.Context, off, n int64, _ blockio.Flags) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.data[off : off+n])
	return nil
}

func (r *ram) Flush(context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.flushed = true
	return nil
}

func (r *ram) Extents(_ context.Context, off, n int64, max int) ([]blockio.Extent, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []blockio.Extent
	for end := off + n; off < end && len(out) < max; {
		step := min((off/grain+1)*grain, end) - off
		hole := !r.written[off/grain]
		if k := len(out) - 1; k >= 0 && out[k].Hole == hole {
			out[k].Length += step
		} else {
			out = append(out, blockio.Extent{Length: step, Hole: hole, Zero: hole})
		}
		off += step
	}
	return out, nil
}

// content is what the device holds, and whether nothing was written since its last flush.
func (r *ram) content() (data []byte, flushed bool, writes int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return bytes.Clone(r.data), r.flushed, r.writes
}

func (r *ram) equal(want []byte) bool {
	data, _, _ := r.content()
	return bytes.Equal(data, want)
}

// rack serves devices over NBD and stands in for the appliance.
type rack struct {
	addr    string
	mu      sync.Mutex
	disks   map[string]*ram
	prepare func(*ram)
}

func (k *rack) Open(_ context.Context, name string, _ nbd.Peer) (nbd.Device, func(), error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	d, ok := k.disks[name]
	if !ok {
		return nil, nil, nbd.ErrUnknownExport
	}
	return d, func() {}, nil
}

func (k *rack) List(context.Context, nbd.Peer) ([]nbd.ExportInfo, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var list []nbd.ExportInfo
	for name := range k.disks {
		list = append(list, nbd.ExportInfo{Name: name})
	}
	return list, nil
}

func (k *rack) Create(_ context.Context, name string, size int64) error {
	d := newRAM(size)
	if k.prepare != nil {
		k.prepare(d)
	}
	return k.add(name, d)
}

func (k *rack) add(name string, d *ram) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.disks[name] != nil {
		return fs.ErrExist
	}
	k.disks[name] = d
	return nil
}

func (k *rack) Delete(_ context.Context, name string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.disks, name)
	return nil
}

func (k *rack) Target(_ context.Context, name string) (nbdclient.Target, error) {
	return nbdclient.Target{Network: "tcp", Address: k.addr, Export: name}, nil
}

func (k *rack) disk(name string) *ram {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.disks[name]
}

func newRack(t *testing.T) *rack {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	k := &rack{addr: ln.Addr().String(), disks: map[string]*ram{}}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	srv := nbd.New(nbd.Config{Exports: k})
	go func() { done <- srv.Run(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return k
}

// sparse writes a raw file of size bytes with random data at the given offsets and gives its content.
func sparse(t *testing.T, path string, size int64, at ...int64) []byte {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	rng := rand.NewChaCha8([32]byte{1})
	for _, off := range at {
		p := make([]byte, min(200_000, size-off))
		rng.Read(p)
		if _, err := f.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	all, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestRawRoundTripKeepsBytesAndHoles(t *testing.T) {
	k, dir := newRack(t), t.TempDir()
	const size, padded = 40<<20 + 12345, 40<<20 + 12800 // a vDisk's size is whole sectors
	in, out := filepath.Join(dir, "in.raw"), filepath.Join(dir, "out.raw")
	want := sparse(t, in, size, 0, 5<<20+77, size-100_000)
	var last, total int64
	got, err := Import(t.Context(), k, in, "default/d", ImportOptions{Progress: func(d, n int64) { last, total = d, n }})
	if err != nil {
		t.Fatal(err)
	}
	want = append(want, make([]byte, padded-size)...)
	if got != (Imported{"default/d", Raw, padded}) || last != size || total != size {
		t.Errorf("imported %+v, progress %d of %d", got, last, total)
	}
	held, flushed, n := k.disk("default/d").content()
	if !bytes.Equal(held, want) {
		t.Error("the vDisk differs from the file")
	}
	if !flushed {
		t.Error("the import ended without a flush")
	}
	if n > 12 {
		t.Errorf("%d writes for three pieces of data", n)
	}
	target, _ := k.Target(t.Context(), "default/d")
	if n, err := Export(t.Context(), target, out, ExportOptions{}); err != nil || n != padded {
		t.Fatalf("export: %d bytes, %v", n, err)
	}
	back, err := os.ReadFile(out)
	if err != nil || !bytes.Equal(back, want) {
		t.Errorf("export differs from import (%v)", err)
	}
	if a, b := allocated(t, in), allocated(t, out); b > a+(1<<20) {
		t.Errorf("export takes %d bytes on disk, the source %d", b, a)
	}
}

func allocated(t *testing.T, path string) int64 {
	t.Helper()
	s, err := openRaw(path)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var n int64
	for off := int64(0); off < s.Size(); {
		e, err := s.Extents(t.Context(), off, s.Size()-off)
		if err != nil {
			t.Fatal(err)
		}
		if !e[0].Hole {
			n += e[0].Length
		}
		off += e[0].Length
	}
	return n
}

func TestFailedImportLeavesNothing(t *testing.T) {
	k, dir := newRack(t), t.TempDir()
	in := filepath.Join(dir, "in.raw")
	sparse(t, in, 8<<20, 0, 6<<20)
	k.prepare = func(d *ram) { d.failFrom = 4 << 20 }
	if _, err := Import(t.Context(), k, in, "default/d", ImportOptions{}); err == nil {
		t.Fatal("import succeeded on a full device")
	}
	if k.disk("default/d") != nil {
		t.Error("a half-made vDisk is left")
	}
	ctx, cancel := context.WithCancel(t.Context())
	k.prepare = func(*ram) { cancel() }
	if _, err := Import(ctx, k, in, "default/d", ImportOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled import: %v", err)
	}
	if k.disk("default/d") != nil {
		t.Error("a cancelled import leaves its vDisk")
	}
}

func TestImportKeepsAnExistingDisk(t *testing.T) {
	k, dir := newRack(t), t.TempDir()
	in := filepath.Join(dir, "in.raw")
	sparse(t, in, 1<<20, 0)
	old := newRAM(4096)
	if err := k.add("default/d", old); err != nil {
		t.Fatal(err)
	}
	if _, err := Import(t.Context(), k, in, "default/d", ImportOptions{}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("import over a disk: %v", err)
	}
	if k.disk("default/d") != old {
		t.Error("the existing disk is gone")
	}
}

func TestNBDToNBD(t *testing.T) {
	k := newRack(t)
	src, dst := newRAM(6<<20), newRAM(8<<20)
	rng := rand.NewChaCha8([32]byte{2})
	p := make([]byte, 300_000)
	rng.Read(p)
	src.Write(t.Context(), p, 3<<20, 0)
	rng.Read(dst.data)
	if err := errors.Join(k.add("default/src", src), k.add("default/dst", dst)); err != nil {
		t.Fatal(err)
	}
	uri := "nbd://" + k.addr + "/default/src"
	if _, err := Import(t.Context(), k, uri, "default/copy", ImportOptions{}); err != nil {
		t.Fatal(err)
	}
	if !k.disk("default/copy").equal(src.data) {
		t.Error("import from NBD differs")
	}
	target, _ := k.Target(t.Context(), "default/src")
	if _, err := Export(t.Context(), target, "nbd://"+k.addr+"/default/dst", ExportOptions{}); err != nil {
		t.Fatal(err)
	}
	if held, flushed, _ := dst.content(); !bytes.Equal(held[:6<<20], src.data) || !flushed {
		t.Error("export to NBD differs: old data shows through holes, or no flush")
	}
	if _, err := Export(t.Context(), nbdclient.Target{Network: "tcp", Address: k.addr, Export: "default/dst"}, uri, ExportOptions{}); err == nil {
		t.Error("export to a smaller export succeeded")
	}
}

func TestExportDoesNotReplaceUnasked(t *testing.T) {
	k, dir := newRack(t), t.TempDir()
	if err := k.add("default/d", newRAM(1<<20)); err != nil {
		t.Fatal(err)
	}
	target, _ := k.Target(t.Context(), "default/d")
	out := filepath.Join(dir, "out.raw")
	if err := os.WriteFile(out, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Export(t.Context(), target, out, ExportOptions{})
	if b, _ := os.ReadFile(out); !errors.Is(err, fs.ErrExist) || string(b) != "mine" {
		t.Errorf("export over a file: %v, content %q", err, b)
	}
	if _, err := Export(t.Context(), target, out, ExportOptions{Replace: true}); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	_, err = Export(ctx, target, filepath.Join(dir, "second"), ExportOptions{Progress: func(int64, int64) { cancel() }})
	left, _ := os.ReadDir(dir)
	if err == nil && len(left) == 2 { // the only chunk may be done before the cancel is seen
		return
	}
	if len(left) != 1 {
		t.Errorf("a cancelled export (%v) leaves %v", err, left)
	}
}

func TestConversionsByQemuImg(t *testing.T) {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Skip("SKIPPED: qemu-img is not installed, its formats are not covered")
	}
	k, dir := newRack(t), t.TempDir()
	raw := filepath.Join(dir, "in.raw")
	want := sparse(t, raw, 16<<20, 0, 9<<20)
	for _, f := range []Format{QCOW2, VMDK, VHDX} {
		img := filepath.Join(dir, "in."+string(f))
		if out, err := exec.Command("qemu-img", "convert", "-f", "raw", "-O", string(f), raw, img).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		name := "default/" + string(f)
		got, err := Import(t.Context(), k, img, name, ImportOptions{})
		if err != nil {
			t.Fatalf("import %s: %v", f, err)
		}
		if got.Format != f || got.Size != 16<<20 || !k.disk(name).equal(want) {
			t.Errorf("import %s: %+v, equal %v", f, got, k.disk(name).equal(want))
		}
		target, _ := k.Target(t.Context(), name)
		back := filepath.Join(dir, "out."+string(f))
		if _, err := Export(t.Context(), target, back, ExportOptions{Format: f}); err != nil {
			t.Fatalf("export %s: %v", f, err)
		}
		if out, err := exec.Command("qemu-img", "compare", "-f", "raw", "-F", string(f), raw, back).CombinedOutput(); err != nil {
			t.Errorf("compare %s: %v: %s", f, err, out)
		}
	}
}

func TestImagesThatReferToOtherFilesAreRefused(t *testing.T) {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Skip("SKIPPED: qemu-img is not installed")
	}
	k, dir := newRack(t), t.TempDir()
	base, secret := filepath.Join(dir, "base.raw"), filepath.Join(t.TempDir(), "secret")
	sparse(t, base, 1<<20, 0)
	sparse(t, secret, 1<<20, 0)
	overlay := filepath.Join(dir, "overlay.qcow2")
	if out, err := exec.Command("qemu-img", "create", "-f", "qcow2", "-b", base, "-F", "raw", overlay).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	descriptor := filepath.Join(dir, "d.vmdk")
	text := "# Disk DescriptorFile\nversion=1\nCID=00000001\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n" +
		"RW 2048 FLAT \"" + secret + "\" 0\nddb.adapterType = \"ide\"\n"
	if err := os.WriteFile(descriptor, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, img := range []string{overlay, descriptor} {
		_, err := Import(t.Context(), k, img, "default/d", ImportOptions{})
		if e, ok := errors.AsType[*Error](err); !ok || !strings.Contains(err.Error(), "refers to another file") || e.Help == "" {
			t.Errorf("%s: %v", filepath.Base(img), err)
		}
		if k.disk("default/d") != nil {
			t.Error("a vDisk was made")
		}
	}
	if _, err := Import(t.Context(), k, overlay, "default/d", ImportOptions{AllowBacking: true}); err != nil {
		t.Errorf("with leave to read it: %v", err)
	}
	// A flat extent beside its descriptor is what VMware writes.
	flat := filepath.Join(dir, "vm-flat.vmdk")
	want := sparse(t, flat, 1<<20, 0)
	text = strings.ReplaceAll(text, secret, "vm-flat.vmdk")
	if err := os.WriteFile(descriptor, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Import(t.Context(), k, descriptor, "default/vm", ImportOptions{}); err != nil || !k.disk("default/vm").equal(want) {
		t.Errorf("flat extent beside its descriptor: %v", err)
	}
}

func TestUnreadableSourcesSaySo(t *testing.T) {
	k, dir := newRack(t), t.TempDir()
	empty := filepath.Join(dir, "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for source, want := range map[string]string{
		filepath.Join(dir, "none"):          "no such file",
		dir:                                 "is a directory",
		empty:                               "is empty",
		"ftp://host/x":                      "unknown scheme",
		"nbd://" + k.addr + "/default/none": "no such export",
		"nbd://127.0.0.1:1/x":               "connection refused",
		"nbd+unix:///x":                     "socket=PATH is missing",
	} {
		if _, err := Import(t.Context(), k, source, "default/d", ImportOptions{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", source, err, want)
		}
	}
	if len(k.disks) != 0 {
		t.Errorf("disks %v", k.disks)
	}
}

func TestZeroRuns(t *testing.T) {
	for _, n := range []int{1, 4095, 4096, 4097, 70_000} {
		p := make([]byte, n)
		if !isZero(p) {
			t.Errorf("%d zeros", n)
		}
		for _, i := range slices.Compact([]int{0, n / 2, n - 1}) {
			p[i] = 1
			if isZero(p) {
				t.Errorf("%d bytes with a one at %d", n, i)
			}
			p[i] = 0
		}
	}
}
