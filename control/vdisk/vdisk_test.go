package vdisk_test

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"github.com/google/uuid"
	"go.uber.org/goleak"

	"varve/control/enginetest"
	"varve/control/state"
	"varve/control/vdisk"
	"varve/control/vpool"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type world struct {
	*testing.T
	log    *enginetest.Log
	engine *enginetest.Engine
	pools  *vpool.Controller
	disks  *vdisk.Controller
}

func newWorld(t *testing.T) *world {
	w := &world{T: t, log: enginetest.NewLog(), engine: &enginetest.Engine{}}
	w.pools = vpool.New(vpool.Config{Raft: w.log, Store: w.log.Store, Engine: w.engine})
	w.disks = vdisk.New(vdisk.Config{Raft: w.log, Store: w.log.Store, Engine: w.engine})
	if _, err := w.pools.Create(t.Context(), vpool.Spec{Name: "default", Backend: "local:///a"}); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) create(name string) vdisk.VDisk {
	w.Helper()
	d, err := w.disks.Create(w.Context(), name, 1<<30)
	if err != nil {
		w.Fatal(err)
	}
	return d
}

func (w *world) want(err, want error, remedy bool) {
	w.Helper()
	if !errors.Is(err, want) {
		w.Fatalf("%v, want %v", err, want)
	}
	if e, ok := errors.AsType[*state.Error](err); !ok || e.Object == "" || remedy && e.Remedy == "" {
		w.Fatalf("error without object or remedy: %#v", err)
	}
}

func TestCreateListShow(t *testing.T) {
	w := newWorld(t)
	d := w.create("default/vm/a/disk1")
	if d.FullName() != "default/vm/a/disk1" || d.Path != "/vm/a/disk1.raw" || d.Info.Size != 1<<30 || d.Volume.Kind != state.DiskVolume {
		t.Fatalf("%+v", d)
	}
	w.create("default/disk2.raw")
	w.create("default/vm/b-flat.vmdk")
	for _, name := range []string{"default/disk2", "default/disk2.raw", "/default/disk2", "default/vm/b", "default/vm/a/disk1.raw"} {
		if _, err := w.disks.Get(t.Context(), name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	list, err := w.disks.List(t.Context(), "")
	if err != nil || len(list) != 3 || list[0].Name != "disk2" || list[2].Name != "vm/b" {
		t.Fatalf("%v, %v", list, err)
	}
	for name, c := range map[string]struct {
		size int64
		want error
	}{
		"default/disk2": {1 << 30, state.ErrExist}, "default/vm/b": {1 << 30, state.ErrExist}, "nope/x": {1 << 30, state.ErrNotFound},
		"default": {1 << 30, state.ErrInvalid}, "default/": {1 << 30, state.ErrInvalid}, "default/x": {0, state.ErrInvalid},
		"default/y": {513, state.ErrInvalid}, "default/z": {state.VolumeBytesMax + 512, state.ErrInvalid},
		"default/n":         {-512, state.ErrInvalid},
		"default/x.raw.raw": {1 << 30, state.ErrInvalid}, "default/../x": {1 << 30, state.ErrInvalid},
		"default/a//x": {1 << 30, state.ErrInvalid}, "default/a/./x": {1 << 30, state.ErrInvalid},
		"default/x/": {1 << 30, state.ErrInvalid}, "default/disk2.raw/x": {1 << 30, state.ErrNotDir},
	} {
		_, err := w.disks.Create(t.Context(), name, c.size)
		if !errors.Is(err, c.want) {
			t.Errorf("create %s of %d: %v, want %v", name, c.size, err, c.want)
		}
	}
	if again, _ := w.disks.List(t.Context(), "default"); len(again) != 3 {
		t.Fatalf("a refused create left something: %v", again)
	}
	_, err = w.disks.List(t.Context(), "nope")
	w.want(err, state.ErrNotFound, false)
	if err := w.log.Store.View().Check(); err != nil {
		t.Fatal(err)
	}
}

func TestResize(t *testing.T) {
	w := newWorld(t)
	w.create("default/d")
	d, err := w.disks.Resize(t.Context(), "default/d", 2<<30, false)
	if err != nil || d.Info.Size != 2<<30 {
		t.Fatal(d, err)
	}
	_, err = w.disks.Resize(t.Context(), "default/d", 1<<30, false)
	w.want(err, state.ErrConflict, true)
	if d, err = w.disks.Resize(t.Context(), "default/d", 1<<30, true); err != nil || d.Info.Size != 1<<30 {
		t.Fatal(d, err)
	}
	_, err = w.disks.Resize(t.Context(), "default/d", 1, false)
	w.want(err, state.ErrInvalid, true)
	w.engine.Fail("Resize", os.ErrPermission)
	if _, err = w.disks.Resize(t.Context(), "default/d", 4<<30, false); !errors.Is(err, os.ErrPermission) {
		t.Fatal(err)
	}
}

func TestRename(t *testing.T) {
	w := newWorld(t)
	a := w.create("default/a")
	w.create("default/b")
	w.create("default/f-flat.vmdk")
	_, err := w.disks.Rename(t.Context(), "default/a", "default/b")
	w.want(err, state.ErrExist, false)
	_, err = w.disks.Rename(t.Context(), "default/a", "other/b")
	w.want(err, state.ErrNotFound, false)
	d, err := w.disks.Rename(t.Context(), "default/a", "default/dir/c")
	if err != nil || d.Path != "/dir/c.raw" || d.Volume.ID != a.Volume.ID || w.engine.Path(a.Volume.ID) != "default/dir/c.raw" {
		t.Fatal(d, err)
	}
	if d, err = w.disks.Rename(t.Context(), "default/f", "default/g"); err != nil || d.Path != "/g-flat.vmdk" {
		t.Fatal(d, err)
	}
	// What the engine cannot do at once does not undo a committed rename.
	w.engine.Fail("Renamed", os.ErrDeadlineExceeded)
	if d, err = w.disks.Rename(t.Context(), "default/g", "default/h"); err != nil || d.Path != "/h-flat.vmdk" {
		t.Fatal(d, err)
	}
	if _, err := w.pools.Create(t.Context(), vpool.Spec{Name: "other", Backend: "local:///o"}); err != nil {
		t.Fatal(err)
	}
	_, err = w.disks.Rename(t.Context(), "default/h", "other/h")
	w.want(err, state.ErrXDev, true)
}

func TestDeleteAndReclaim(t *testing.T) {
	w := newWorld(t)
	d := w.create("default/d")
	w.engine.SetClients(d.Volume.ID, 2)
	w.want(w.disks.Delete(t.Context(), "default/d", false), state.ErrConflict, true)
	if _, err := w.disks.Get(t.Context(), "default/d"); err != nil {
		t.Fatal("a refused delete deleted")
	}
	if err := w.disks.Delete(t.Context(), "default/d", true); err != nil {
		t.Fatal(err)
	}
	w.want(w.disks.Delete(t.Context(), "default/d", true), state.ErrNotFound, false)
	if doomed, _ := w.log.Store.Doomed(); len(doomed) != 1 {
		t.Fatalf("%+v", doomed)
	}

	// The vPool waits for what is left of its disks; nothing is forgotten while the engine fails.
	w.engine.Fail("Delete", os.ErrDeadlineExceeded)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.disks.Run(ctx) }()
	short, stop := context.WithTimeout(t.Context(), 150*time.Millisecond)
	w.want(w.pools.Delete(short, "default"), state.ErrConflict, true)
	stop()
	if doomed, _ := w.log.Store.Doomed(); len(doomed) != 1 {
		t.Fatalf("%+v", doomed)
	}
	w.engine.Fail("Delete", nil)
	if err := w.pools.Delete(t.Context(), "default"); err != nil {
		t.Fatal(err)
	}
	if got := w.engine.Deleted(); len(got) != 1 || got[0] != d.Volume.ID || len(w.engine.Pools()) != 0 {
		t.Fatal(got)
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// What was doomed before a restart is deleted after it, in batches.
func TestReclaimAtStart(t *testing.T) {
	w := newWorld(t)
	const disks = 600
	for range disks {
		d := w.create("default/" + uuid.NewString())
		if err := w.disks.Delete(t.Context(), d.FullName(), false); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.disks.Run(ctx) }()
	for {
		doomed, changed := w.log.Store.Doomed()
		if len(doomed) == 0 {
			break
		}
		<-changed
	}
	cancel()
	<-done
	if got := len(w.engine.Deleted()); got != disks {
		t.Fatalf("%d deletions for %d disks", got, disks)
	}
}

func TestAdopt(t *testing.T) {
	w := newWorld(t)
	pool, err := w.log.Store.View().VPool("default")
	if err != nil {
		t.Fatal(err)
	}
	id := uuid.New()
	for range 2 {
		if err := w.disks.Adopt(t.Context(), pool, "/vm/x.raw", id, 1<<20, 5); err != nil {
			t.Fatal(err)
		}
	}
	d, err := w.disks.Get(t.Context(), "default/vm/x")
	if err != nil || d.Volume.ID != id || d.Volume.Epoch != 5 {
		t.Fatalf("%+v, %v", d, err)
	}
	w.want(w.disks.Adopt(t.Context(), pool, "/vm/x.raw", uuid.New(), 1<<20, 5), state.ErrExist, false)
}

func TestVPools(t *testing.T) {
	w := newWorld(t)
	for _, c := range []struct {
		spec vpool.Spec
		want error
	}{
		{vpool.Spec{Name: "default", Backend: "local:///b"}, state.ErrExist},
		{vpool.Spec{Name: "b", Backend: "local:///a/sub"}, state.ErrConflict},
		{vpool.Spec{Name: "b", Backend: "s3://bucket"}, state.ErrInvalid},
		{vpool.Spec{Name: "b", Backend: "local://b"}, state.ErrInvalid},
		{vpool.Spec{Name: "b", Backend: "/b"}, state.ErrInvalid},
		{vpool.Spec{Name: "B!", Backend: "local:///b"}, state.ErrInvalid},
		{vpool.Spec{Name: "b", Backend: "local:///b", Clients: []string{"*"}}, state.ErrInvalid},
	} {
		_, err := w.pools.Create(t.Context(), c.spec)
		w.want(err, c.want, false)
	}
	w.engine.Fail("ProbeBackend", os.ErrPermission)
	_, err := w.pools.Create(t.Context(), vpool.Spec{Name: "b", Backend: "local:///b"})
	w.want(err, state.ErrInvalid, true)
	w.engine.Fail("ProbeBackend", nil)

	// A crash after the commit: the next start opens the vPool.
	w.engine.Fail("AddPool", os.ErrDeadlineExceeded)
	if _, err := w.pools.Create(t.Context(), vpool.Spec{Name: "b", Backend: "local:///b/./c/"}); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	if err := w.pools.Start(t.Context()); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	w.engine.Fail("AddPool", nil)
	if err := w.pools.Start(t.Context()); err != nil || !w.engine.Pools()["b"] {
		t.Fatal(err, w.engine.Pools())
	}
	p, err := w.pools.SetClients(t.Context(), "b", 0, []string{"192.0.2.0/24"})
	if err != nil || len(p.Clients) != 1 || p.Backend.Dir != "/b/c" {
		t.Fatal(p, err)
	}
	_, err = w.pools.SetClients(t.Context(), "b", p.Rev-1, nil)
	w.want(err, state.ErrConflict, true)
	w.create("default/d")
	w.want(w.pools.Delete(t.Context(), "default"), state.ErrNotEmpty, true)
	if err := w.pools.Delete(t.Context(), "b"); err != nil || w.engine.Pools()["b"] {
		t.Fatal(err)
	}
}
