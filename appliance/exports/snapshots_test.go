package exports

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"varve/control/state"
	"varve/control/vdisk"
	"varve/gateway/nbd"
)

// TestSnapshotsCloneTrash: what the controller offers, on a real driver, over a restart.
func TestSnapshotsCloneTrash(t *testing.T) {
	dir := t.TempDir()
	b := openBox(t, dir)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	write := func(name string, value byte) {
		t.Helper()
		dev, release, err := b.nbd.Open(ctx, name, nbd.Peer{Local: true})
		must(err)
		defer release()
		must(dev.Write(ctx, bytes.Repeat([]byte{value}, 64<<10), 0, 0))
	}
	holds := func(name string, value byte) {
		t.Helper()
		p := make([]byte, 64<<10)
		dev, release, err := b.nbd.Open(ctx, name, nbd.Peer{Local: true})
		must(err)
		defer release()
		must(dev.Read(ctx, p, 0))
		if !bytes.Equal(p, bytes.Repeat([]byte{value}, len(p))) {
			t.Fatalf("%s holds %d, want %d", name, p[0], value)
		}
	}
	_, err := b.vdisks.Create(ctx, "default/a", 1<<20)
	must(err)
	write("default/a", 1)
	_, err = b.vdisks.Snapshot(ctx, "default/a", vdisk.SnapshotSpec{Name: "one"})
	must(err)
	write("default/a", 2)
	if _, err := b.vdisks.Snapshot(ctx, "default/a", vdisk.SnapshotSpec{Name: "one"}); !errors.Is(err, state.ErrExist) {
		t.Fatalf("second snapshot of the same name: %v", err)
	}
	holds("default/a@one", 1)
	_, err = b.vdisks.Clone(ctx, "default/a@one", "default/b")
	must(err)
	holds("default/b", 1)
	write("default/b", 3)
	for what, err := range map[string]error{
		"snapshot with a clone": b.vdisks.DeleteSnapshot(ctx, "default/a", "one", false),
		"vDisk with a clone":    b.vdisks.Delete(ctx, "default/a", true),
	} {
		if !errors.Is(err, state.ErrConflict) {
			t.Fatalf("deleting a %s: %v", what, err)
		}
	}
	saved, err := b.vdisks.Rollback(ctx, "default/a", "one", true)
	must(err)
	holds("default/a", 1)
	holds("default/b", 3)
	s, unique, shared, err := b.vdisks.GetSnapshot(ctx, "default/a", saved.Name)
	must(err)
	if !s.Backed || unique != 64<<10 || shared != 0 {
		t.Fatalf("the head before the rollback: %+v, unique %d, shared %d", s, unique, shared)
	}
	b.stop()

	b = openBox(t, dir)
	holds("default/a", 1)
	holds("default/b", 3)
	must(b.vdisks.SetTemplate(ctx, "default/b", true, true))
	made, err := b.vdisks.FromTemplate(ctx, "default/b", []string{"default/vm/1", "default/vm/2", "default/vm/3"}, nil)
	must(err)
	if len(made) != 3 {
		t.Fatalf("made %d vDisks of 3", len(made))
	}
	holds("default/vm/2", 3)
	write("default/vm/2", 4)
	holds("default/vm/3", 3)
	vm2, err := b.vdisks.Get(ctx, "default/vm/2")
	must(err)
	must(b.vdisks.Trash(ctx, "default/vm/2", 0, true))
	if _, err := b.vdisks.Get(ctx, "default/vm/2"); !errors.Is(err, state.ErrNotFound) {
		t.Fatalf("a vDisk in the trash is still there: %v", err)
	}
	trash, err := b.vdisks.Trashed(ctx, "default")
	must(err)
	if len(trash) != 1 || trash[0].Path != "/vm/2.raw" {
		t.Fatalf("trash: %+v", trash)
	}
	_, err = b.vdisks.Restore(ctx, vm2.Volume.ID, "default/back")
	must(err)
	holds("default/back", 4)
	must(b.vdisks.Trash(ctx, "default/back", time.Nanosecond, true))
	must(b.vdisks.EmptyTrash(ctx))
	if trash, err := b.vdisks.Trashed(ctx, ""); err != nil || len(trash) != 0 {
		t.Fatalf("trash after its time: %+v, %v", trash, err)
	}
}
