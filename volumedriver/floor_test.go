package volumedriver

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"

	"varve/volumedriver/blockio"
	"varve/volumedriver/vfs"
)

// An older map under the log and the floor of today is refused, as what a damaged journal would bring back; one of the same
// age is not, and one that was lost whole knows no volume.
func TestOlderMapIsRefused(t *testing.T) {
	ctx := context.Background()
	mem, err := smallBase()
	must(t, err)
	older := mem.Kill()
	x, err := openSmall(mem, true)
	must(t, err)
	v, err := x.d.Volume(ctx, testVolume)
	must(t, err)
	must(t, v.Write(ctx, fill(2, 7), 0, 0))
	must(t, x.d.Drain(ctx))
	want, err := x.state(ctx)
	must(t, err)
	must(t, x.stop())

	same := mem.Kill()
	copyMap(t, same, mem)
	got, err := recoverSmall(ctx, same)
	must(t, err)
	if got != want {
		t.Errorf("with its own map the volume reads\n%s\nwant\n%s", got, want)
	}

	mixed := mem.Kill()
	copyMap(t, mixed, older)
	x, err = openSmall(mixed, false)
	if err == nil {
		got, _ := x.state(ctx)
		t.Fatalf("a map older than its floor was taken: %s", got)
	}
	if !errors.Is(err, blockio.ErrCorrupt) {
		t.Errorf("a map older than its floor: %v", err)
	}

	lost := mem.Kill()
	must(t, lost.RemoveAll("/data/map"))
	x, err = openSmall(lost, false)
	must(t, err)
	if _, err := x.d.Volume(ctx, testVolume); !errors.Is(err, ErrUnknownVolume) {
		t.Errorf("volume of a lost map: %v", err)
	}
	must(t, x.stop())
}

// copyMap makes the map of to that of from.
func copyMap(t *testing.T, to, from *vfs.Mem) {
	t.Helper()
	must(t, to.RemoveAll("/data/map"))
	must(t, to.MkdirAll("/data/map", 0o755))
	for name, size := range filesBelow(t, from, "/data/map") {
		if strings.Count(name, "/") != 3 {
			t.Fatalf("%s: a directory in the map", name)
		}
		p := make([]byte, size)
		r, err := from.OpenFile(name, os.O_RDONLY, 0)
		must(t, err)
		if size > 0 {
			_, err = r.ReadAt(p, 0)
			must(t, err)
		}
		w, err := to.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o644)
		must(t, err)
		_, err = w.WriteAt(p, 0)
		must(t, errors.Join(err, w.Sync(), r.Close(), w.Close()))
	}
	must(t, to.SyncDir("/data/map"))
}
