package state

import (
	"bytes"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"
	"pgregory.net/rapid"
)

// model is the namespace as a map of paths: what a reader of RFC 1813 would write first.
type model struct {
	nodes map[string]*modelNode // by path; "/" is there
}

type modelNode struct {
	kind Kind
	ino  uint64
	vol  uuid.UUID
}

func (m *model) children(dir string) []string {
	var names []string
	for p := range m.nodes {
		if p != "/" && path.Dir(p) == dir {
			names = append(names, path.Base(p))
		}
	}
	return names
}

// sibling says whether name would be the same vDisk as another file of dir, not counting moving.
func (m *model) sibling(dir, name, moving string) bool {
	for _, suffixes := range [][2]string{{".raw", "-flat.vmdk"}, {"-flat.vmdk", ".raw"}} {
		stem, ok := strings.CutSuffix(name, suffixes[0])
		other := path.Join(dir, stem+suffixes[1])
		if ok && IsDisk(name) && m.nodes[other] != nil && m.nodes[other].kind == File && other != moving {
			return true
		}
	}
	return false
}

func (m *model) create(dir, name string, kind Kind) error {
	parent := m.nodes[dir]
	switch {
	case parent == nil:
		return ErrNotFound
	case parent.kind != Dir:
		return ErrNotDir
	case m.nodes[path.Join(dir, name)] != nil:
		return ErrExist
	case kind == File && m.sibling(dir, name, ""):
		return ErrExist
	}
	return nil
}

func (m *model) remove(p string, wantDir bool) error {
	n := m.nodes[p]
	switch {
	case m.nodes[path.Dir(p)] == nil || n == nil && m.nodes[path.Dir(p)].kind == Dir:
		return ErrNotFound
	case m.nodes[path.Dir(p)].kind != Dir:
		return ErrNotDir
	case wantDir && n.kind != Dir:
		return ErrNotDir
	case !wantDir && n.kind == Dir:
		return ErrIsDir
	case wantDir && len(m.children(p)) > 0:
		return ErrNotEmpty
	}
	return nil
}

func (m *model) rename(from, to string) error {
	if m.nodes[path.Dir(from)].kind != Dir || m.nodes[path.Dir(to)].kind != Dir && m.nodes[from] != nil {
		return ErrNotDir
	}
	n, old := m.nodes[from], m.nodes[to]
	switch {
	case n == nil:
		return ErrNotFound
	case from == to:
		return nil
	case old != nil && old.kind == Dir && n.kind != Dir:
		return ErrIsDir
	case old != nil && old.kind != Dir && n.kind == Dir:
		return ErrNotDir
	case old != nil && len(m.children(to)) > 0:
		return ErrNotEmpty
	case n.kind == Dir && strings.HasPrefix(to+"/", from+"/"):
		return ErrLoop
	case n.kind == File && m.sibling(path.Dir(to), path.Base(to), from):
		return ErrExist
	}
	delete(m.nodes, to)
	for p, node := range m.nodes {
		if p == from || strings.HasPrefix(p, from+"/") {
			delete(m.nodes, p)
			m.nodes[to+strings.TrimPrefix(p, from)] = node
		}
	}
	return nil
}

// The namespace does what the model does, refuses what it refuses, and keeps its invariants; a replay of the log and a
// restored snapshot give the same bytes.
func TestNamespaceAgainstModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		m := newMachine(t)
		mod := &model{nodes: map[string]*modelNode{"/": {kind: Dir, ino: RootIno}}}
		doomed := make(map[uuid.UUID]bool)
		names := rapid.SampledFrom([]string{"a", "b", "c.raw", "c-flat.vmdk", "d.raw", "e"})
		anyPath := func(label string) string {
			var all []string
			for p := range mod.nodes {
				all = append(all, p)
			}
			slices.Sort(all)
			return rapid.SampledFrom(all).Draw(rt, label)
		}
		same := func(what string, got, want error) bool {
			if !errors.Is(got, want) || (got == nil) != (want == nil) {
				rt.Fatalf("%s: %v, the model says %v", what, got, want)
			}
			return got == nil
		}
		rt.Repeat(map[string]func(*rapid.T){
			"create": func(rt *rapid.T) {
				dir, name := anyPath("dir"), names.Draw(rt, "name")
				cmd := &CreateInode{FSID: m.fsid, Parent: mod.nodes[dir].ino, Name: name, How: Guarded,
					Kind: rapid.SampledFrom([]Kind{File, File, Dir, Symlink}).Draw(rt, "kind")}
				switch cmd.Kind {
				case File:
					cmd.Volume = m.id()
				case Symlink:
					cmd.Target = "t"
				}
				want := mod.create(dir, name, cmd.Kind)
				res, err := m.apply(cmd)
				if same("create "+path.Join(dir, name), err, want) {
					mod.nodes[path.Join(dir, name)] = &modelNode{kind: cmd.Kind, ino: res.Ino, vol: cmd.Volume}
				}
			},
			"remove": func(rt *rapid.T) {
				dir, name := anyPath("dir"), names.Draw(rt, "name")
				p := path.Join(dir, name)
				want := mod.remove(p, false)
				_, err := m.apply(&RemoveInode{FSID: m.fsid, Dir: mod.nodes[dir].ino, Name: name})
				if same("remove "+p, err, want) {
					if n := mod.nodes[p]; n.kind == File {
						doomed[n.vol] = true
					}
					delete(mod.nodes, p)
				}
			},
			"rmdir": func(rt *rapid.T) {
				dir, name := anyPath("dir"), names.Draw(rt, "name")
				p := path.Join(dir, name)
				want := mod.remove(p, true)
				_, err := m.apply(&RemoveDir{FSID: m.fsid, Dir: mod.nodes[dir].ino, Name: name})
				if same("rmdir "+p, err, want) {
					delete(mod.nodes, p)
				}
			},
			"rename": func(rt *rapid.T) {
				fromDir, from := anyPath("fromDir"), names.Draw(rt, "from")
				toDir, to := anyPath("toDir"), names.Draw(rt, "to")
				a, b := path.Join(fromDir, from), path.Join(toDir, to)
				cmd := &Rename{FSID: m.fsid, FromDir: mod.nodes[fromDir].ino, From: from, ToDir: mod.nodes[toDir].ino, To: to}
				replaced := mod.nodes[b]
				want := mod.rename(a, b)
				res, err := m.apply(cmd)
				if same("rename "+a+" to "+b, err, want) && a != b && replaced != nil && replaced.kind == File {
					if res.Doomed != replaced.vol {
						rt.Fatalf("rename %s over %s doomed %s, not %s", a, b, res.Doomed, replaced.vol)
					}
					doomed[replaced.vol] = true
				}
			},
			"deleted": func(rt *rapid.T) {
				rows, _ := m.s.Doomed()
				if len(rows) > 0 {
					m.must(&DeleteVolumeDone{Volumes: []uuid.UUID{rows[0].ID}})
					delete(doomed, rows[0].ID)
				}
			},
			"": func(rt *rapid.T) {
				compare(rt, m, mod, doomed)
			},
		})
		sameBytesAfterReplay(rt, m)
	})
}

// compare checks that state and model name the same things.
func compare(rt *rapid.T, m *machine, mod *model, doomed map[uuid.UUID]bool) {
	v := m.s.View()
	if err := v.Check(); err != nil {
		rt.Fatal(err)
	}
	if p, _ := v.VPool("default"); p.Inodes != uint64(len(mod.nodes)) {
		rt.Fatalf("%d inodes, the model has %d", p.Inodes, len(mod.nodes))
	}
	for p, want := range mod.nodes {
		n, err := v.Resolve(m.fsid, p)
		if err != nil || n.Ino != want.ino || n.Kind != want.kind || n.Volume != want.vol {
			rt.Fatalf("%s is %+v, %v; the model has %+v", p, n, err, *want)
		}
		if back, err := v.Path(m.fsid, n.Ino); err != nil || back != p {
			rt.Fatalf("path of %s is %s, %v", p, back, err)
		}
		if want.kind != Dir {
			continue
		}
		entries, eof, err := v.ReadDir(m.fsid, n.Ino, 0, 1000)
		if err != nil || !eof || len(entries) != len(mod.children(p)) {
			rt.Fatalf("directory %s has %d entries, %v, %v; the model %v", p, len(entries), eof, err, mod.children(p))
		}
	}
	rows, _ := m.s.Doomed()
	if len(rows) != len(doomed) {
		rt.Fatalf("%d doomed volumes, the model has %d", len(rows), len(doomed))
	}
	for _, d := range rows {
		if !doomed[d.ID] {
			rt.Fatalf("volume %s is doomed, the model has it alive", d.ID)
		}
	}
}

func sameBytesAfterReplay(rt *rapid.T, m *machine) {
	want := snapshotBytes(rt, m.s)
	replayed := New()
	for i, entry := range m.log {
		replayed.Apply(m.indexes[i], entry)
	}
	if got := snapshotBytes(rt, replayed); !bytes.Equal(got, want) {
		rt.Fatalf("replayed log differs\n%q\n%q", got, want)
	}
	restored := New()
	if err := restored.Restore(bytes.NewReader(want)); err != nil {
		rt.Fatal(err)
	}
	if got := snapshotBytes(rt, restored); !bytes.Equal(got, want) {
		rt.Fatalf("restored snapshot differs\n%q\n%q", got, want)
	}
}

func snapshotBytes(t interface{ Fatal(...any) }, s *Store) []byte {
	snap, err := s.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if n, err := snap.WriteTo(&b); err != nil || n != int64(b.Len()) {
		t.Fatal(fmt.Sprint(n, b.Len(), err))
	}
	return b.Bytes()
}
