package exports

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"varve/control/state"
	"varve/control/vdisk"
	"varve/gateway/nbd"
	"varve/gateway/nfs"
	"varve/volumedriver/blockio"
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
	_, err = b.vdisks.Promote(ctx, "default/b")
	must(err)
	_, err = b.vdisks.Rollback(ctx, "default/b", "one", true)
	if said, ok := errors.AsType[*state.Error](err); !ok || !errors.Is(err, state.ErrConflict) || !strings.HasPrefix(said.Remedy, "clone the snapshot") {
		t.Fatalf("rolled back to what a promotion has taken over: %v", err)
	}
	holds("default/b", 3)
	_, err = b.vdisks.Promote(ctx, "default/a") // whose it was
	must(err)
	_, err = b.vdisks.Rollback(ctx, "default/a", "one", true)
	must(err)
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

// TestSnapshotDir: the hidden directory of a datastore shows the snapshots of its files and takes no change.
func TestSnapshotDir(t *testing.T) {
	b := openBox(t, t.TempDir())
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	tree, fsid := b.nfs.WithSnapshots(), b.fsid()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	size := int64(64 << 10)
	f := b.file("a.raw", &size)
	b.file("empty.txt", nil)
	b.write(f.Inode, bytes.Repeat([]byte{1}, 8192), 0)
	for _, name := range []string{"one", "two"} {
		_, err := b.vdisks.Snapshot(ctx, "default/a", vdisk.SnapshotSpec{Name: name})
		must(err)
		b.write(f.Inode, bytes.Repeat([]byte{2}, 8192), 0)
	}
	d, err := tree.Lookup(ctx, fsid, state.RootIno, SnapshotDir)
	must(err)
	var names []string
	for after, eof := uint64(0), false; !eof; {
		var es []nfs.Entry
		es, eof, err = tree.ReadDir(ctx, fsid, d.Inode, after, 1)
		must(err)
		for _, e := range es {
			names, after = append(names, e.Name), e.Cookie
		}
	}
	if len(names) != 2 || names[0] != "a.raw@one" || names[1] != "a.raw@two" {
		t.Fatalf("snapshots listed: %q", names)
	}
	s, err := tree.Lookup(ctx, fsid, d.Inode, "a.raw@one")
	must(err)
	if s.Size != size || s.Mode&0o222 != 0 || s.Kind != nfs.Regular {
		t.Fatalf("attributes of a snapshot: %+v", s)
	}
	again, err := tree.Attr(ctx, fsid, s.Inode, s.Generation)
	must(err)
	if again != s {
		t.Fatalf("attributes by handle: %+v, want %+v", again, s)
	}
	file, release, err := tree.Open(ctx, fsid, s.Inode)
	must(err)
	p := make([]byte, 8192)
	must(file.Read(ctx, p, 0))
	if !bytes.Equal(p, bytes.Repeat([]byte{1}, 8192)) {
		t.Fatalf("snapshot one holds %d", p[0])
	}
	if err := file.Write(ctx, p, 0, 0); !errors.Is(err, blockio.ErrReadOnly) {
		t.Fatalf("write to a snapshot: %v", err)
	}
	release()
	if up, err := tree.Lookup(ctx, fsid, d.Inode, ".."); err != nil || up.Inode != state.RootIno {
		t.Fatalf("..: %+v, %v", up, err)
	}
	for what, err := range map[string]error{
		"create in it":      second(tree.Create(ctx, fsid, d.Inode, "x", nfs.CreateSpec{Kind: nfs.Regular})),
		"create over it":    second(tree.Create(ctx, fsid, state.RootIno, SnapshotDir, nfs.CreateSpec{Kind: nfs.Dir})),
		"remove":            tree.Remove(ctx, fsid, d.Inode, "a.raw@one"),
		"rename":            tree.Rename(ctx, fsid, d.Inode, "a.raw@one", state.RootIno, "b.raw"),
		"change attributes": func() error { _, err := tree.SetAttr(ctx, fsid, s.Inode, nfs.SetAttr{}); return err }(),
	} {
		if !errors.Is(err, nfs.ErrReadOnly) {
			t.Fatalf("%s: %v", what, err)
		}
	}
	must(b.vdisks.DeleteSnapshot(ctx, "default/a", "one", false))
	if _, err := tree.Attr(ctx, fsid, s.Inode, 0); !errors.Is(err, nfs.ErrStale) {
		t.Fatalf("handle of a deleted snapshot: %v", err)
	}
}

func second(_ nfs.Attr, _ bool, err error) error { return err }

// TestChangedContext: a backup tool asks over NBD what has changed since a snapshot.
func TestChangedContext(t *testing.T) {
	tool, err := exec.LookPath("nbdinfo")
	if err != nil {
		t.Skip("nbdinfo is not installed")
	}
	b := openBox(t, t.TempDir())
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	size := int64(1 << 20)
	f := b.file("a.raw", &size)
	b.write(f.Inode, bytes.Repeat([]byte{1}, 128<<10), 0)
	if _, err := b.vdisks.Snapshot(ctx, "default/a", vdisk.SnapshotSpec{Name: "monday"}); err != nil {
		t.Fatal(err)
	}
	b.write(f.Inode, bytes.Repeat([]byte{2}, 8192), 64<<10)
	server := nbd.New(nbd.Config{Exports: b.nbd, Log: silence})
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "nbd"))
	if err != nil {
		t.Fatal(err)
	}
	serving, stop := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- server.Run(serving, l) }()
	defer func() { stop(); <-done }()
	out, err := exec.CommandContext(ctx, tool, "--map=varve:changed/monday", "nbd+unix:///default/a?socket="+l.Addr().String()).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if got := strings.Join(strings.Fields(string(out)), " "); got != "0 65536 0 65536 8192 1 73728 974848 0" {
		t.Fatalf("map: %s", out)
	}
}
