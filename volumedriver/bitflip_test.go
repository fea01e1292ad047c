package volumedriver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"

	"varve/volumedriver/blockio"
	"varve/volumedriver/blockmap"
	"varve/volumedriver/vfs"
	"varve/volumedriver/writelog"
)

// filesBelow lists the files below a directory with their sizes.
func filesBelow(t *testing.T, fsys vfs.FS, dir string) map[string]int64 {
	t.Helper()
	out := make(map[string]int64)
	names, err := fsys.ReadDir(dir)
	must(t, err)
	for _, name := range names {
		p := path.Join(dir, name)
		info, err := fsys.Stat(p)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		must(t, err)
		if info.IsDir() {
			for k, v := range filesBelow(t, fsys, p) {
				out[k] = v
			}
			continue
		}
		out[p] = info.Size()
	}
	return out
}

// flip changes one bit of a file.
func flip(t *testing.T, fsys vfs.FS, name string, off int64, bit uint) {
	t.Helper()
	f, err := fsys.OpenFile(name, os.O_RDWR, 0)
	must(t, err)
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, off); err != nil {
		t.Fatalf("read %s at %d: %v", name, off, err)
	}
	b[0] ^= 1 << bit
	_, err = f.WriteAt(b, off)
	must(t, errors.Join(err, f.Sync(), f.Close()))
}

// TestBitFlips flips bits in every kind of file. Whatever is read afterwards is right, or an error of just the blocks that
// the bit is of; a file that all depends on is refused at the start. A verifying scrub names the object.
func TestBitFlips(t *testing.T) {
	const blocks = 256
	ctx := context.Background()
	mem := vfs.NewMem(1)
	x, err := openSmall(mem, true)
	must(t, err)
	v, err := x.d.Create(ctx, Spec{ID: testVolume, Pool: testPool, Epoch: 1, Size: blocks * blockSize, PoolName: "default", Path: "disk.raw", Kind: "disk"})
	must(t, err)
	want := make([]uint64, blocks)
	put := func(lba, n int, value uint64) {
		must(t, v.Write(ctx, fill(n, value), int64(lba)*blockSize, 0))
		for i := range n {
			want[lba+i] = value
		}
	}
	put(0, blocks, 1)
	_, err = v.Snapshot(ctx, SnapshotSpec{ID: uuid.New(), Name: "s"})
	must(t, err)
	must(t, x.d.Drain(ctx))
	for i := range 16 {
		put(i*8, 4, uint64(10+i))
	}
	must(t, x.d.Drain(ctx))
	for i := range 4 {
		put(i*20, 10, uint64(50+i)) // makes the second SCO sparse
	}
	must(t, x.d.Drain(ctx))
	r, err := x.d.Scrub(ctx, testPool, ScrubOptions{Target: 1, Grace: -1})
	must(t, err)
	if r.Containers == 0 {
		t.Fatalf("the scrub made no container: %+v", r)
	}
	put(200, 20, 90) // stays in the log
	must(t, v.Flush(ctx))
	must(t, x.stop())

	files := filesBelow(t, mem, "/")
	kind := func(name string) string {
		switch {
		case strings.HasPrefix(name, "/backend/") && strings.Contains(name, "/v/"):
			return "SCO"
		case strings.Contains(name, "/c/"):
			return "container"
		case strings.Contains(name, "/r/"):
			return "root object"
		case strings.HasPrefix(name, "/data/log/seg"):
			return "log segment"
		case strings.HasPrefix(name, "/data/map/") && strings.HasSuffix(name, ".sst"):
			return "map table"
		case strings.HasPrefix(name, "/data/map/") && strings.HasSuffix(name, ".log"):
			return "map journal"
		}
		return ""
	}
	tries := map[string]int{"SCO": 150, "container": 150, "root object": 30, "log segment": 200, "map table": 60, "map journal": 100}
	type tally struct{ flips, right, refused, blocks, named int }
	got := make(map[string]*tally)
	rng := rand.New(rand.NewPCG(1, 2))
	names := make([]string, 0, len(files))
	for name := range files {
		if files[name] > 0 && kind(name) != "" {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, what := range []string{"SCO", "container", "root object", "log segment", "map table", "map journal"} {
		of := slices.DeleteFunc(slices.Clone(names), func(n string) bool { return kind(n) != what })
		if len(of) == 0 {
			continue // Pebble may have no table yet
		}
		n := &tally{}
		got[what] = n
		for range tries[what] {
			name := of[rng.IntN(len(of))]
			limit := files[name]
			if what == "log segment" {
				limit = min(limit, 400<<10) // what is in use; the rest is zeros that nobody looks at
			}
			fsys := mem.Kill()
			off, bit := rng.Int64N(limit), uint(rng.IntN(8))
			flip(t, fsys, name, off, bit)
			n.flips++
			x, err := openSmall(fsys, false)
			if err != nil {
				if !errors.Is(err, blockio.ErrCorrupt) && !errors.Is(err, blockmap.ErrCorrupt) && !errors.Is(err, writelog.ErrCorrupt) &&
					!strings.Contains(err.Error(), "pebble") && !strings.Contains(err.Error(), "block map") {
					t.Fatalf("%s: bit %d of byte %d of %s: %v", what, bit, off, name, err)
				}
				n.refused++
				continue
			}
			wrong := flipped(t, fmt.Sprintf("%s: bit %d of byte %d of %s", what, bit, off, name), x.d, want)
			if what == "SCO" || what == "container" {
				r, err := x.d.Scrub(ctx, testPool, ScrubOptions{Verify: true, Target: 100})
				must(t, err)
				if len(r.VerifyErrors) > 0 {
					n.named++
					if !strings.Contains(strings.Join(r.VerifyErrors, "\n"), strings.TrimPrefix(name, "/backend/objects/")) {
						t.Fatalf("%s is damaged, the scrub names %q", name, r.VerifyErrors)
					}
				} else if wrong > 0 {
					t.Fatalf("%s is damaged, and the scrub finds nothing", name)
				}
			}
			if wrong == 0 {
				n.right++
			}
			n.blocks += wrong
			must(t, x.d.Close())
		}
	}
	for _, what := range slices.Sorted(func(yield func(string) bool) {
		for k := range got {
			if !yield(k) {
				return
			}
		}
	}) {
		n := got[what]
		fmt.Printf("» bit flips in a %s: %d; %d read right, %d refused at the start, %d blocks with an error, %d named by the scrub; no wrong byte\n",
			what, n.flips, n.right, n.refused, n.blocks, n.named)
	}
}

// flipped reads a volume block by block: each is right or an error. It counts the errors.
func flipped(t *testing.T, what string, d *Driver, want []uint64) (wrong int) {
	t.Helper()
	ctx := context.Background()
	v, err := d.Volume(ctx, testVolume)
	if errors.Is(err, ErrUnknownVolume) { // the map is lost whole
		return len(want)
	}
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	if v.Size() != int64(len(want))*blockSize {
		t.Fatalf("%s: volume of %d bytes", what, v.Size())
	}
	p := make([]byte, blockSize)
	for b := range want {
		if err := v.Read(ctx, p, int64(b)*blockSize); err != nil {
			if !errors.Is(err, blockio.ErrCorrupt) && !errors.Is(err, blockmap.ErrCorrupt) {
				t.Fatalf("%s: block %d: %v", what, b, err)
			}
			wrong++
			continue
		}
		if got, err := valueOf(p); err != nil || got != want[b] {
			t.Fatalf("%s: block %d holds %d (%v), want %d", what, b, got, err, want[b])
		}
	}
	return wrong
}
