package namespace_test

import (
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"varve/control/enginetest"
	"varve/control/namespace"
	"varve/control/state"
)

var pool = uuid.MustParse("aaaaaaaa-0000-4000-8000-000000000001")

func newNamespace(t *testing.T) (*namespace.Namespace, *enginetest.Log, uint64) {
	log := enginetest.NewLog()
	_, err := log.Apply(t.Context(), &state.CreateVPool{ID: pool, Name: "default", Backend: state.Backend{Kind: "local", Dir: "/a"},
		Key: make([]byte, 32), Mode: 0o755})
	if err != nil {
		t.Fatal(err)
	}
	return namespace.New(log, log.Store), log, state.FSIDOf(pool)
}

var file = namespace.Spec{Kind: state.File, Mode: 0o100644}

func TestCreate(t *testing.T) {
	ns, log, fsid := newNamespace(t)
	a, created, err := ns.Create(t.Context(), fsid, state.RootIno, "a", file)
	if err != nil || !created || a.Mode != 0o644 || a.Volume == uuid.Nil {
		t.Fatal(a, created, err)
	}
	if _, _, err := ns.Create(t.Context(), fsid, state.RootIno, "a", file); !errors.Is(err, state.ErrExist) {
		t.Fatal(err)
	}
	un := file
	un.How, un.Mode = state.Unchecked, 0o600
	index := log.Store.Index()
	if b, created, err := ns.Create(t.Context(), fsid, state.RootIno, "a", un); err != nil || created || b != a || log.Store.Index() != index {
		t.Fatal(b, created, err)
	}
	for _, verf := range [][8]byte{{}, {1, 2, 3}} {
		ex := file
		ex.How, ex.Verifier = state.Exclusive, verf
		name := fmt.Sprint("ex", verf[0])
		b, created, err := ns.Create(t.Context(), fsid, state.RootIno, name, ex)
		if err != nil || !created {
			t.Fatal(created, err)
		}
		if c, created, err := ns.Create(t.Context(), fsid, state.RootIno, name, ex); err != nil || created || c != b {
			t.Fatal(c, created, err)
		}
		ex.Verifier = [8]byte{9}
		if _, _, err := ns.Create(t.Context(), fsid, state.RootIno, name, ex); !errors.Is(err, state.ErrExist) {
			t.Fatal(err)
		}
		if _, _, err := ns.Create(t.Context(), fsid, state.RootIno, name, file); !errors.Is(err, state.ErrExist) {
			t.Fatal(err)
		}
	}
	if used, limit := ns.Files(fsid); used != 4 || limit != state.InodesMax {
		t.Fatal(used, limit)
	}
}

func TestLookupAndHandles(t *testing.T) {
	ns, _, fsid := newNamespace(t)
	d, _, err := ns.Create(t.Context(), fsid, state.RootIno, "d", namespace.Spec{Kind: state.Dir, Mode: 0o755})
	if err != nil {
		t.Fatal(err)
	}
	l, _, err := ns.Create(t.Context(), fsid, d.Ino, "l", namespace.Spec{Kind: state.Symlink, Target: "../x", Mode: 0o777})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		dir  uint64
		name string
		want uint64
	}{{d.Ino, ".", d.Ino}, {d.Ino, "..", state.RootIno}, {state.RootIno, "..", state.RootIno}, {d.Ino, "l", l.Ino}} {
		if n, err := ns.Lookup(fsid, c.dir, c.name); err != nil || n.Ino != c.want {
			t.Fatal(c, n, err)
		}
	}
	if _, err := ns.Lookup(fsid, l.Ino, ".."); !errors.Is(err, state.ErrNotDir) {
		t.Fatal(err)
	}
	if target, err := ns.Readlink(fsid, l.Ino); err != nil || target != "../x" {
		t.Fatal(target, err)
	}
	if _, err := ns.Readlink(fsid, d.Ino); !errors.Is(err, state.ErrInvalid) {
		t.Fatal(err)
	}
	if _, err := ns.Inode(fsid, l.Ino, l.Gen); err != nil {
		t.Fatal(err)
	}
	if _, err := ns.Inode(fsid, l.Ino, l.Gen+1); !errors.Is(err, state.ErrNotFound) {
		t.Fatal(err)
	}
	if _, err := ns.Remove(t.Context(), fsid, d.Ino, "l"); err != nil {
		t.Fatal(err)
	}
	if _, err := ns.Inode(fsid, l.Ino, 0); !errors.Is(err, state.ErrNotFound) {
		t.Fatal(err)
	}
	if err := ns.Rmdir(t.Context(), fsid, state.RootIno, "d"); err != nil {
		t.Fatal(err)
	}
	if got, eof, err := ns.ReadDir(fsid, state.RootIno, 0, 10); err != nil || !eof || len(got) != 0 {
		t.Fatal(got, eof, err)
	}
}

func TestSetAttr(t *testing.T) {
	ns, log, fsid := newNamespace(t)
	a, _, err := ns.Create(t.Context(), fsid, state.RootIno, "a", file)
	if err != nil {
		t.Fatal(err)
	}
	index := log.Store.Index()
	if b, err := ns.SetAttr(t.Context(), fsid, a.Ino, namespace.Change{}); err != nil || b != a || log.Store.Index() != index {
		t.Fatal(b, err)
	}
	mode, when := uint32(0o100600), time.Unix(5, 7)
	b, err := ns.SetAttr(t.Context(), fsid, a.Ino, namespace.Change{Mode: &mode, Mtime: &when})
	if err != nil || b.Mode != 0o600 || !namespace.Time(b.Mtime).Equal(when) || b.Ctime <= a.Ctime || mode != 0o100600 {
		t.Fatal(b, err)
	}
}

func TestRename(t *testing.T) {
	ns, _, fsid := newNamespace(t)
	d, _, err := ns.Create(t.Context(), fsid, state.RootIno, "d", namespace.Spec{Kind: state.Dir})
	if err != nil {
		t.Fatal(err)
	}
	var volumes []uuid.UUID
	for _, name := range []string{"a.raw", "b.raw"} {
		n, _, err := ns.Create(t.Context(), fsid, d.Ino, name, file)
		if err != nil {
			t.Fatal(err)
		}
		volumes = append(volumes, n.Volume)
	}
	r, err := ns.Rename(t.Context(), fsid, state.RootIno, "d", state.RootIno, "e")
	if err != nil || len(r.Moved) != 2 || r.Replaced != uuid.Nil {
		t.Fatal(r, err)
	}
	r, err = ns.Rename(t.Context(), fsid, d.Ino, "a.raw", d.Ino, "b.raw")
	if err != nil || r.Replaced != volumes[1] || len(r.Moved) != 1 || r.Moved[0].ID != volumes[0] || r.Inode.Name != "b.raw" {
		t.Fatal(r, err)
	}
}

// Removals of one name race with creations under it: every file that was made is removed once, none twice.
func TestRemoveRace(t *testing.T) {
	ns, log, fsid := newNamespace(t)
	var mu sync.Mutex
	removed := make(map[uuid.UUID]int)
	created := make(map[uuid.UUID]bool)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 200 {
				n, _, err := ns.Create(t.Context(), fsid, state.RootIno, "x", file)
				mu.Lock()
				if err == nil || errors.Is(err, state.ErrNotFound) { // made, and perhaps removed before it was read
					created[n.Volume] = true
				}
				mu.Unlock()
				n, err = ns.Remove(t.Context(), fsid, state.RootIno, "x")
				mu.Lock()
				if err == nil {
					removed[n.Volume]++
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	doomed, _ := log.Store.Doomed()
	if len(doomed) != len(removed) {
		t.Fatalf("%d doomed, %d removals reported", len(doomed), len(removed))
	}
	for _, d := range doomed {
		if removed[d.ID] != 1 {
			t.Fatalf("%s reported %d times", d.ID, removed[d.ID])
		}
	}
	if len(created) == 0 {
		t.Fatal("nothing was made")
	}
}
