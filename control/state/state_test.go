package state

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"go/parser"
	"go/token"
	"hash/crc32"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/google/uuid"
)

// machine applies commands to a store as raft would, and keeps the log.
type machine struct {
	t   testing.TB
	s   *Store
	log [][]byte
	// indexes are those of the entries in log: a command that Encode refuses takes one and is not there.
	indexes []uint64
	index   uint64
	fsid    uint64
	ids     uint64
}

func (m *machine) id() uuid.UUID {
	m.ids++
	var id uuid.UUID
	binary.BigEndian.PutUint64(id[:], m.ids)
	binary.BigEndian.PutUint64(id[8:], ^m.ids)
	return id
}

var (
	poolA = uuid.MustParse("aaaaaaaa-0000-4000-8000-000000000001")
	poolB = uuid.MustParse("bbbbbbbb-0000-4000-8000-000000000001")
	node1 = uuid.MustParse("11111111-0000-4000-8000-000000000001")
	key   = bytes.Repeat([]byte{7}, 32)
)

func newMachine(t testing.TB) *machine {
	m := &machine{t: t, s: New(), fsid: FSIDOf(poolA)}
	m.must(&InitCluster{ID: m.id(), Format: Format})
	m.must(&RegisterNode{ID: node1, Spec: NodeSpec{Name: "n1", Role: RoleMaster}})
	m.must(&CreateVPool{ID: poolA, Name: "default", Backend: Backend{Kind: "local", Dir: "/a"}, Key: key, Mode: 0o755})
	return m
}

func (m *machine) apply(cmd Command) (Result, error) { return m.applyAs(m.id(), cmd) }

func (m *machine) applyAs(id uuid.UUID, cmd Command) (Result, error) {
	m.index++
	entry, err := Encode(cmd, id, Time(1000*m.index))
	if err != nil {
		return Result{}, err
	}
	m.log, m.indexes = append(m.log, entry), append(m.indexes, m.index)
	return m.s.Apply(m.index, entry)
}

func (m *machine) must(cmd Command) Result {
	m.t.Helper()
	res, err := m.apply(cmd)
	if err != nil {
		m.t.Fatalf("%T %+v: %v", cmd, cmd, err)
	}
	return res
}

func (m *machine) fails(want error, cmd Command) *Error {
	m.t.Helper()
	index := m.s.Index()
	before, err := m.s.Hash()
	if err != nil {
		m.t.Fatal(err)
	}
	_, err = m.apply(cmd)
	if !errors.Is(err, want) {
		m.t.Fatalf("%T %+v: %v, want %v", cmd, cmd, err, want)
	}
	now := m.s.index.Swap(index) // a failed entry moves the index and nothing else
	after, _ := m.s.Hash()
	m.s.index.Store(now)
	if before != after {
		m.t.Fatalf("%T failed but changed the state", cmd)
	}
	e, _ := errors.AsType[*Error](err)
	return e
}

func (m *machine) file(dir uint64, name string) *CreateInode {
	return &CreateInode{FSID: m.fsid, Parent: dir, Name: name, Kind: File, How: Guarded, Mode: 0o644, Volume: m.id()}
}

func (m *machine) dir(dir uint64, name string) *CreateInode {
	return &CreateInode{FSID: m.fsid, Parent: dir, Name: name, Kind: Dir, How: Guarded, Mode: 0o755}
}

func (m *machine) rename(fromDir uint64, from string, toDir uint64, to string) *Rename {
	return &Rename{FSID: m.fsid, FromDir: fromDir, From: from, ToDir: toDir, To: to}
}

func (m *machine) lookup(dir uint64, name string) Inode {
	m.t.Helper()
	n, err := m.s.View().Lookup(m.fsid, dir, name)
	if err != nil {
		m.t.Fatalf("lookup %q: %v", name, err)
	}
	return n
}

func (m *machine) check() {
	m.t.Helper()
	if err := m.s.View().Check(); err != nil {
		m.t.Fatal(err)
	}
}

func TestCluster(t *testing.T) {
	m := newMachine(t)
	c, ok := m.s.View().Cluster()
	if !ok {
		t.Fatal("no cluster")
	}
	m.must(&InitCluster{ID: c.ID, Format: Format})
	m.fails(ErrConflict, &InitCluster{ID: m.id(), Format: Format})
	if _, err := Encode(&InitCluster{ID: c.ID, Format: Format + 1}, m.id(), 0); !errors.Is(err, ErrInvalid) {
		t.Fatalf("foreign format: %v", err)
	}
	n, err := m.s.View().Node(node1)
	if err != nil || n.Name != "n1" || n.Joined != 2000 {
		t.Fatalf("node %+v, %v", n, err)
	}
	m.must(&RegisterNode{ID: node1, Spec: NodeSpec{Name: "n1b", Role: RoleMaster, NBD: "h:1"}})
	if n, _ = m.s.View().Node(node1); n.Name != "n1" || n.NBD != "h:1" || n.Joined != 2000 || n.Seen <= n.Joined {
		t.Fatalf("node %+v", n)
	}
	m.fails(ErrInvalid, &RegisterNode{ID: node1, Spec: NodeSpec{Name: "N1", Role: RoleMaster}})
	m.fails(ErrInvalid, &RegisterNode{ID: node1, Spec: NodeSpec{Name: "n1", Role: "boss"}})
	m.must(&SetToken{Name: "admin", Hash: key, Role: RoleAdmin})
	m.fails(ErrInvalid, &SetToken{Name: "admin", Hash: key[:5], Role: RoleAdmin})
	if tok, err := m.s.View().Token("admin"); err != nil || !bytes.Equal(tok.Hash[:], key) {
		t.Fatalf("token %v, %v", tok, err)
	}
	m.must(&DeleteToken{Name: "admin"})
	m.fails(ErrNotFound, &DeleteToken{Name: "admin"})
}

func TestVPool(t *testing.T) {
	m := newMachine(t)
	local := func(dir string) Backend { return Backend{Kind: "local", Dir: dir} }
	for _, bad := range []*CreateVPool{
		{ID: poolB, Name: "B", Backend: local("/b"), Key: key},
		{ID: poolB, Name: "", Backend: local("/b"), Key: key},
		{ID: poolB, Name: strings.Repeat("b", 64), Backend: local("/b"), Key: key},
		{ID: poolB, Name: "-b", Backend: local("/b"), Key: key},
		{ID: poolB, Name: "b", Backend: local("b"), Key: key},
		{ID: poolB, Name: "b", Backend: local("/b/../c"), Key: key},
		{ID: poolB, Name: "b", Backend: local("/"), Key: key},
		{ID: poolB, Name: "b", Backend: Backend{Kind: "ftp", Dir: "/b"}, Key: key},
		{ID: poolB, Name: "b", Backend: local("/b"), Key: key[:31]},
		{ID: uuid.Nil, Name: "b", Backend: local("/b"), Key: key},
		{ID: poolB, Name: "b", Backend: local("/b"), Key: key, Clients: []string{"10.0.0.1/8"}},
		{ID: poolB, Name: "b", Backend: local("/b"), Key: key, Clients: []string{"everybody"}},
	} {
		m.fails(ErrInvalid, bad)
	}
	m.fails(ErrExist, &CreateVPool{ID: poolB, Name: "default", Backend: local("/b"), Key: key})
	m.fails(ErrExist, &CreateVPool{ID: poolA, Name: "b", Backend: local("/b"), Key: key})
	m.fails(ErrConflict, &CreateVPool{ID: poolB, Name: "b", Backend: local("/a"), Key: key})
	m.fails(ErrConflict, &CreateVPool{ID: poolB, Name: "b", Backend: local("/a/sub"), Key: key})
	m.must(&CreateVPool{ID: poolB, Name: "b", Backend: local("/ab"), Key: key, Clients: DefaultClients()})
	p, err := m.s.View().VPool("b")
	if err != nil || p.FSID != FSIDOf(poolB) || p.Class != ClassNone || len(p.Clients) != 5 {
		t.Fatalf("%+v, %v", p, err)
	}
	m.must(&UpdateVPool{ID: poolB, Rev: p.Rev, Clients: []string{"192.0.2.7/32"}})
	if e := m.fails(ErrConflict, &UpdateVPool{ID: poolB, Rev: p.Rev}); e.Rev == 0 || e.Rev == p.Rev {
		t.Fatalf("stale rev: %+v", e)
	}
	m.fails(ErrInvalid, &UpdateVPool{ID: poolB, Clients: []string{"x"}})

	for i := range 12 {
		m.must(m.file(RootIno, fmt.Sprintf("d%02d.raw", i)))
	}
	if e := m.fails(ErrNotEmpty, &DeleteVPool{ID: poolA}); len(e.By) != 11 || e.By[0] != "d00" || e.By[10] != "…" {
		t.Fatalf("listed %v", e.By)
	}
	for i := range 12 {
		m.must(&RemoveInode{FSID: m.fsid, Dir: RootIno, Name: fmt.Sprintf("d%02d.raw", i)})
	}
	m.fails(ErrConflict, &DeleteVPool{ID: poolA}) // volumes still on the backend
	doomed, _ := m.s.Doomed()
	var ids []uuid.UUID
	for _, d := range doomed {
		ids = append(ids, d.ID)
	}
	m.must(&DeleteVolumeDone{Volumes: append(ids, m.id())})
	m.must(&DeleteVPool{ID: poolA})
	m.fails(ErrNotFound, &DeleteVPool{ID: poolA})
	if _, err := m.s.View().Inode(m.fsid, RootIno); !errors.Is(err, ErrNotFound) {
		t.Fatalf("root after delete: %v", err)
	}
	m.fails(ErrNotFound, m.file(RootIno, "x"))
	m.check()
}

func TestCreate(t *testing.T) {
	m := newMachine(t)
	res := m.must(m.file(RootIno, "f"))
	if !res.Created || res.Ino != 2 || res.Volume == uuid.Nil {
		t.Fatalf("%+v", res)
	}
	// Unchecked finds, guarded refuses, exclusive needs its verifier.
	again := m.file(RootIno, "f")
	again.How = Unchecked
	if r := m.must(again); r.Created || r.Ino != res.Ino || r.Volume != res.Volume {
		t.Fatalf("unchecked: %+v", r)
	}
	m.fails(ErrExist, m.file(RootIno, "f"))
	ex := m.file(RootIno, "f")
	ex.How, ex.Verifier = Exclusive, 0
	m.fails(ErrExist, ex)
	ex = m.file(RootIno, "ex")
	ex.How, ex.Verifier = Exclusive, 42
	first := m.must(ex)
	ex.Volume = m.id()
	if r := m.must(ex); r.Created || r.Ino != first.Ino || r.Volume != first.Volume {
		t.Fatalf("exclusive again: %+v", r)
	}
	ex.Verifier = 43
	m.fails(ErrExist, ex)
	m.fails(ErrExist, m.dir(RootIno, "f"))

	d := m.must(m.dir(RootIno, "d"))
	un := m.file(RootIno, "d")
	un.How = Unchecked
	m.fails(ErrExist, un)
	m.must(&CreateInode{FSID: m.fsid, Parent: d.Ino, Name: "l", Kind: Symlink, How: Guarded, Mode: 0o777, Target: "../f"})
	if l := m.lookup(d.Ino, "l"); l.Target != "../f" || l.Nlink != 1 || l.Volume != uuid.Nil {
		t.Fatalf("%+v", l)
	}
	if n := m.lookup(RootIno, "d"); n.Nlink != 2 || n.Entries != 1 {
		t.Fatalf("%+v", n)
	}
	if root, _ := m.s.View().Inode(m.fsid, RootIno); root.Nlink != 3 || root.Entries != 3 {
		t.Fatalf("%+v", root)
	}
	m.fails(ErrNotDir, m.file(res.Ino, "x"))
	m.fails(ErrNotFound, m.file(999, "x"))
	for _, name := range []string{"", ".", "..", "a/b", "a\x00", "\xff"} {
		m.fails(ErrInvalid, m.file(RootIno, name))
	}
	m.fails(ErrNameTooLong, m.file(RootIno, strings.Repeat("é", 128)))
	m.must(m.file(RootIno, strings.Repeat("x", 255)))
	m.must(m.file(RootIno, "trailing space "))
	for _, bad := range []*CreateInode{
		{Name: "n", Kind: File, How: Guarded}, // no volume
		{Name: "n", Kind: File, How: "maybe", Volume: poolA}, {Name: "n", Kind: File, How: Guarded, Volume: poolA, Size: -1},
		{Name: "n", Kind: File, How: Guarded, Volume: poolA, Size: VolumeBytesMax + 1},
		{Name: "n", Kind: Dir, How: Unchecked}, {Name: "n", Kind: Dir, How: Guarded, Volume: poolA}, {Name: "n", Kind: "fifo", How: Guarded},
		{Name: "n", Kind: Symlink, How: Guarded}, {Name: "n", Kind: Symlink, How: Guarded, Target: strings.Repeat("x", 4096)},
		{Name: "n", Kind: File, How: Guarded, Volume: poolA, Target: "x"}, {Name: "n", Kind: Dir, How: Guarded, Mode: 0o10000},
	} {
		bad.FSID, bad.Parent = m.fsid, RootIno
		m.fails(ErrInvalid, bad)
	}
	twice := m.file(RootIno, "twice")
	twice.Volume = res.Volume
	m.fails(ErrExist, twice)

	// Numbers are never given again, also not after a removal.
	last := m.must(m.file(RootIno, "last"))
	m.must(&RemoveInode{FSID: m.fsid, Dir: RootIno, Name: "last"})
	if next := m.must(m.file(RootIno, "last")); next.Ino <= last.Ino {
		t.Fatalf("inode %d after %d", next.Ino, last.Ino)
	}
	twice.Volume = last.Volume // still doomed
	m.fails(ErrExist, twice)
	m.check()
}

func TestDepth(t *testing.T) {
	m := newMachine(t)
	at := uint64(RootIno)
	for range DepthMax {
		at = m.must(m.dir(at, "d")).Ino
	}
	m.fails(ErrNameTooLong, m.dir(at, "d"))
	m.must(m.dir(RootIno, "e"))
	m.fails(ErrNameTooLong, m.rename(RootIno, "e", at, "e"))
	m.check()
}

func TestRemove(t *testing.T) {
	m := newMachine(t)
	d := m.must(m.dir(RootIno, "d")).Ino
	f := m.must(m.file(d, "f.raw"))
	m.fails(ErrIsDir, &RemoveInode{FSID: m.fsid, Dir: RootIno, Name: "d"})
	m.fails(ErrNotEmpty, &RemoveDir{FSID: m.fsid, Dir: RootIno, Name: "d"})
	m.fails(ErrNotDir, &RemoveDir{FSID: m.fsid, Dir: d, Name: "f.raw"})
	m.fails(ErrNotFound, &RemoveInode{FSID: m.fsid, Dir: d, Name: "g"})
	m.fails(ErrNotFound, &RemoveDir{FSID: m.fsid, Dir: d, Name: "g"})
	m.fails(ErrNotDir, &RemoveInode{FSID: m.fsid, Dir: f.Ino, Name: "g"})
	m.fails(ErrInvalid, &RemoveInode{FSID: m.fsid, Dir: d, Name: ".."})
	m.fails(ErrConflict, &RemoveInode{FSID: m.fsid, Dir: d, Name: "f.raw", Ino: f.Ino + 1})
	before, _ := m.s.Doomed()
	_, changed := m.s.Doomed()
	res := m.must(&RemoveInode{FSID: m.fsid, Dir: d, Name: "f.raw", Ino: f.Ino})
	select {
	case <-changed:
	default:
		t.Fatal("nobody was told of a doomed volume")
	}
	doomed, _ := m.s.Doomed()
	if len(before) != 0 || len(doomed) != 1 || doomed[0].ID != f.Volume || res.Doomed != f.Volume || doomed[0].Path != "/d/f.raw" ||
		doomed[0].Kind != DiskVolume {
		t.Fatalf("doomed %+v, result %+v", doomed, res)
	}
	if _, err := m.s.View().Inode(m.fsid, f.Ino); !errors.Is(err, ErrNotFound) {
		t.Fatalf("removed inode: %v", err)
	}
	if _, err := m.s.View().Volume(f.Volume); !errors.Is(err, ErrNotFound) {
		t.Fatalf("removed volume: %v", err)
	}
	m.must(&RemoveDir{FSID: m.fsid, Dir: RootIno, Name: "d"})
	m.must(&DeleteVolumeDone{Volumes: []uuid.UUID{f.Volume}})
	if doomed, _ := m.s.Doomed(); len(doomed) != 0 {
		t.Fatalf("doomed %+v", doomed)
	}
	m.check()
}

func TestRename(t *testing.T) {
	m := newMachine(t)
	d := m.must(m.dir(RootIno, "d")).Ino
	e := m.must(m.dir(d, "e")).Ino
	f := m.must(m.file(RootIno, "f"))
	g := m.must(m.file(d, "g"))

	m.fails(ErrNotFound, m.rename(RootIno, "nope", d, "x"))
	m.fails(ErrNotFound, m.rename(RootIno, "f", 999, "x"))
	m.fails(ErrNotDir, m.rename(RootIno, "f", f.Ino, "x"))
	m.fails(ErrIsDir, m.rename(RootIno, "f", RootIno, "d"))
	m.fails(ErrNotDir, m.rename(d, "e", RootIno, "f"))
	m.fails(ErrNotEmpty, m.rename(d, "e", RootIno, "d"))
	m.fails(ErrLoop, m.rename(RootIno, "d", e, "x"))
	m.fails(ErrLoop, m.rename(RootIno, "d", d, "x"))
	m.fails(ErrInvalid, m.rename(RootIno, "f", d, ".."))
	no := m.rename(RootIno, "f", d, "g")
	no.NoReplace = true
	m.fails(ErrExist, no)
	wrong := m.rename(RootIno, "f", d, "h")
	wrong.Ino = g.Ino
	m.fails(ErrConflict, wrong)
	if r := m.must(m.rename(RootIno, "f", RootIno, "f")); r.Ino != f.Ino || r.Doomed != uuid.Nil {
		t.Fatalf("onto itself: %+v", r)
	}
	r := m.must(m.rename(RootIno, "f", d, "g")) // over g, into d
	if r.Doomed != g.Volume || r.Ino != f.Ino || r.Volume != f.Volume {
		t.Fatalf("over: %+v", r)
	}
	if n := m.lookup(d, "g"); n.Ino != f.Ino || n.Parent != d {
		t.Fatalf("%+v", n)
	}
	m.must(m.dir(RootIno, "empty"))
	m.must(m.rename(d, "e", RootIno, "empty")) // directory over an empty one, out of d
	if n := m.lookup(RootIno, "empty"); n.Ino != e {
		t.Fatalf("%+v", n)
	}
	if n := m.lookup(RootIno, "d"); n.Nlink != 2 || n.Entries != 1 {
		t.Fatalf("%+v", n)
	}
	m.check()
}

// A rename inside one directory over another entry keeps the mover's cookie and drops the other's.
func TestRenameCookies(t *testing.T) {
	m := newMachine(t)
	m.must(m.file(RootIno, "a"))
	m.must(m.file(RootIno, "b"))
	a, b := m.lookup(RootIno, "a"), m.lookup(RootIno, "b")
	m.must(m.rename(RootIno, "a", RootIno, "b"))
	if n := m.lookup(RootIno, "b"); n.Cookie != a.Cookie || n.Ino != a.Ino {
		t.Fatalf("%+v", n)
	}
	d := m.must(m.dir(RootIno, "d"))
	m.must(m.rename(RootIno, "b", d.Ino, "b"))
	m.must(m.rename(d.Ino, "b", RootIno, "b"))
	if n := m.lookup(RootIno, "b"); n.Cookie <= b.Cookie {
		t.Fatalf("cookie %d given again, last was %d", n.Cookie, b.Cookie)
	}
	m.check()
}

func TestDiskKind(t *testing.T) {
	m := newMachine(t)
	kind := func(id uuid.UUID) VolumeKind {
		v, err := m.s.View().Volume(id)
		if err != nil {
			t.Fatal(err)
		}
		return v.Kind
	}
	f := m.must(m.file(RootIno, "vm.tmp"))
	if kind(f.Volume) != FileVolume {
		t.Fatal("a file is a disk")
	}
	m.must(m.rename(RootIno, "vm.tmp", RootIno, "vm.raw"))
	if kind(f.Volume) != DiskVolume {
		t.Fatal("a disk is a file")
	}
	m.fails(ErrExist, m.file(RootIno, "vm-flat.vmdk"))
	m.must(m.dir(RootIno, "x.raw")) // a directory is no disk
	m.must(m.file(RootIno, "x-flat.vmdk"))
	m.must(m.file(RootIno, "y"))
	m.fails(ErrExist, m.rename(RootIno, "y", RootIno, "vm-flat.vmdk"))
	m.must(m.rename(RootIno, "vm.raw", RootIno, "vm-flat.vmdk")) // its own sibling leaves
	m.must(m.rename(RootIno, "vm-flat.vmdk", RootIno, "vm.bak"))
	if kind(f.Volume) != FileVolume {
		t.Fatal("still a disk")
	}
	v := m.s.View()
	if n, err := v.ResolveDisk(m.fsid, "x"); err != nil || n.Name != "x-flat.vmdk" {
		t.Fatalf("%+v, %v", n, err)
	}
	if n, err := v.ResolveDisk(m.fsid, "x-flat.vmdk"); err != nil || n.Name != "x-flat.vmdk" {
		t.Fatalf("%+v, %v", n, err)
	}
	if _, err := v.ResolveDisk(m.fsid, "y"); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
	if disks := v.Disks(m.fsid); len(disks) != 1 || disks[0].Name != "x" {
		t.Fatalf("%+v", disks)
	}
	m.check()
}

func TestDiskNames(t *testing.T) {
	for path, want := range map[string]string{
		"/disk1.raw": "disk1", "/vm/vm-flat.vmdk": "vm/vm", "vm/a.raw": "vm/a", "/a.b.raw": "a.b", "/x-flat.raw": "x-flat",
		"/disk1": "", "/.raw": "", "/-flat.vmdk": "", "/a/.raw": "", "/a.raw.raw": "", "/a-flat.vmdk.raw": "", "/a.raw-flat.vmdk": "",
		"/a.vmdk": "", "/a.RAW": "", "": "", "/": "", "/d.raw/f": "",
	} {
		got, ok := DiskName(path)
		if got != want || ok != (want != "") || IsDisk(path) != ok {
			t.Errorf("DiskName(%q) = %q, %v", path, got, ok)
		}
	}
	for name, want := range map[string]string{"a": "/a.raw", "vm/a": "/vm/a.raw", "a.raw": "/a.raw", "vm/a-flat.vmdk": "/vm/a-flat.vmdk"} {
		if got := DiskFile(name); got != want {
			t.Errorf("DiskFile(%q) = %q", name, got)
		}
	}
}

func TestSetAttr(t *testing.T) {
	m := newMachine(t)
	f := m.must(m.file(RootIno, "f"))
	before := m.lookup(RootIno, "f")
	mode, uid, at := uint32(0o600), uint32(107), Time(5)
	m.must(&SetAttr{FSID: m.fsid, Ino: f.Ino, Mode: &mode, UID: &uid, Atime: &at, Ctime: before.Ctime})
	n := m.lookup(RootIno, "f")
	if n.Mode != mode || n.UID != uid || n.GID != before.GID || n.Atime != at || n.Mtime != before.Mtime || n.Ctime <= before.Ctime ||
		n.Cookie != before.Cookie {
		t.Fatalf("%+v", n)
	}
	m.fails(ErrConflict, &SetAttr{FSID: m.fsid, Ino: f.Ino, Mode: &mode, Ctime: before.Ctime})
	m.fails(ErrNotFound, &SetAttr{FSID: m.fsid, Ino: 99, Mode: &mode})
	bad := uint32(0o17777)
	m.fails(ErrInvalid, &SetAttr{FSID: m.fsid, Ino: f.Ino, Mode: &bad})
}

// The proposer's clock may step back; what clients compare may not.
func TestTimesGrow(t *testing.T) {
	m := newMachine(t)
	put := func(at Time, cmd Command) {
		m.index++
		entry, err := Encode(cmd, m.id(), at)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.s.Apply(m.index, entry); err != nil {
			t.Fatal(err)
		}
	}
	last, _ := m.s.View().Inode(m.fsid, RootIno)
	for i, at := range []Time{1 << 60, 0, -5, 1 << 60, 1} {
		put(at, m.file(RootIno, fmt.Sprint("f", i)))
		root, _ := m.s.View().Inode(m.fsid, RootIno)
		if root.Ctime <= last.Ctime || root.Mtime <= last.Mtime {
			t.Fatalf("ctime %d mtime %d after %d %d", root.Ctime, root.Mtime, last.Ctime, last.Mtime)
		}
		last = root
	}
}

func TestActivate(t *testing.T) {
	m := newMachine(t)
	f := m.must(m.file(RootIno, "f.raw"))
	if r := m.must(&ActivateVolume{Volume: f.Volume, Node: node1}); r.Epoch != 1 {
		t.Fatalf("%+v", r)
	}
	m.fails(ErrConflict, &ActivateVolume{Volume: f.Volume, Node: node1})
	m.fails(ErrNotFound, &ActivateVolume{Volume: f.Volume, Node: m.id(), Epoch: 1})
	m.fails(ErrNotFound, &ActivateVolume{Volume: m.id(), Node: node1})
	m.must(&ActivateVolume{Volume: f.Volume, Node: node1, Epoch: 1})
	v, err := m.s.View().Volume(f.Volume)
	if err != nil || v.Epoch != 2 || v.Owner != node1 || v.State != VolumeActive {
		t.Fatalf("%+v, %v", v, err)
	}
	found := m.file(RootIno, "found.raw")
	found.Epoch, found.Size = 7, 4096
	r := m.must(found)
	if r := m.must(&ActivateVolume{Volume: r.Volume, Node: node1, Epoch: 7}); r.Epoch != 8 {
		t.Fatalf("%+v", r)
	}
}

func TestReplay(t *testing.T) {
	m := newMachine(t)
	id, cmd := m.id(), m.file(RootIno, "f")
	first, err := m.applyAs(id, cmd)
	if err != nil {
		t.Fatal(err)
	}
	m.must(&RemoveInode{FSID: m.fsid, Dir: RootIno, Name: "f"})
	again, err := m.applyAs(id, cmd)
	if err != nil || again != first {
		t.Fatalf("%+v, %v; first %+v", again, err, first)
	}
	if _, err := m.s.View().Lookup(m.fsid, RootIno, "f"); !errors.Is(err, ErrNotFound) {
		t.Fatal("a repeated command was done twice")
	}
	for range ReplayWindow {
		m.must(&DeleteVolumeDone{})
	}
	cmd.Volume = m.id()
	if r, err := m.applyAs(id, cmd); err != nil || r == first {
		t.Fatalf("beyond the window: %+v, %v", r, err)
	}
	if len(m.s.window.ring) != ReplayWindow || len(m.s.window.byID) != ReplayWindow {
		t.Fatalf("window %d, %d", len(m.s.window.ring), len(m.s.window.byID))
	}
	// A command that failed may be tried again under its id.
	id = m.id()
	if _, err := m.applyAs(id, m.file(999, "g")); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
	if _, err := m.applyAs(id, m.file(RootIno, "g")); err != nil {
		t.Fatal(err)
	}
}

// Whatever cannot be applied halts the store: no later entry is applied, no snapshot hides it.
func TestHalt(t *testing.T) {
	good, err := Encode(&DeleteVolumeDone{}, poolA, 1)
	if err != nil {
		t.Fatal(err)
	}
	entry := func(body string) []byte {
		return append(binary.LittleEndian.AppendUint32(nil, crc(body)), body...)
	}
	flipped := bytes.Clone(good)
	flipped[len(flipped)/2] ^= 1
	id := poolA.String()
	for name, bad := range map[string][]byte{
		"empty": nil, "short": {1, 2}, "bit flip": flipped, "cut": good[:len(good)-1],
		"unknown type":    entry(`{"v":1,"t":"format_disks","id":"` + id + `","at":1,"p":{}}`),
		"later version":   entry(`{"v":2,"t":"delete_volume_done","id":"` + id + `","at":1,"p":{}}`),
		"unknown field":   entry(`{"v":1,"t":"delete_volume_done","id":"` + id + `","at":1,"p":{"force":true}}`),
		"no id":           entry(`{"v":1,"t":"delete_volume_done","at":1,"p":{}}`),
		"not json":        entry(`]`),
		"trailing":        entry(`{"v":1,"t":"delete_volume_done","id":"` + id + `","at":1,"p":{}} {}`),
		"null payload":    entry(`{"v":1,"t":"create_inode","id":"` + id + `","at":1,"p":null}`),
		"invalid command": entry(`{"v":1,"t":"remove_inode","id":"` + id + `","at":1,"p":{"name":".."}}`),
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			hash, _ := m.s.Hash()
			if _, err := m.s.Apply(100, bad); !errors.Is(err, ErrHalted) {
				t.Fatalf("applied: %v", err)
			}
			if _, err := m.s.Apply(101, good); !errors.Is(err, ErrHalted) {
				t.Fatalf("applied after: %v", err)
			}
			if _, err := m.s.Snapshot(); !errors.Is(err, ErrHalted) {
				t.Fatalf("snapshot: %v", err)
			}
			m.s.halted.Store(nil)
			if now, _ := m.s.Hash(); now != hash {
				t.Fatal("state changed")
			}
		})
	}
	if _, err := Encode(nil, poolA, 0); !errors.Is(err, ErrUnknownCommand) {
		t.Fatal(err)
	}
	if _, err := Encode(&DeleteVolumeDone{Volumes: make([]uuid.UUID, 10000)}, poolA, 0); !errors.Is(err, ErrInvalid) {
		t.Fatal("an entry beyond the limit was encoded")
	}
}

func crc(s string) uint32 { return crc32.Checksum([]byte(s), castagnoli) }

// Names of commands, tables and frames are each given once, and frames ascend: a snapshot is read in their order.
func TestObjects(t *testing.T) {
	last := byte(frameHeader)
	for _, o := range objects {
		if o.frame <= last {
			t.Errorf("frame %d after %d", o.frame, last)
		}
		last = o.frame
	}
	for name, kind := range kinds {
		if got, version := kind.new().kind(); got != name || version != kind.version {
			t.Errorf("%s: says %q, %d", name, got, version)
		}
	}
}

// Reading a big directory while its names change: every entry that stays is seen exactly once.
func TestReadDirWhileNamesChange(t *testing.T) {
	const entries = 10000
	m := newMachine(t)
	for i := range entries {
		m.must(m.file(RootIno, fmt.Sprintf("f%05d", i)))
	}
	d := m.must(m.dir(RootIno, "elsewhere"))
	seen := make(map[uint64]int)
	var after uint64
	for round := 0; ; round++ {
		got, eof, err := m.s.View().ReadDir(m.fsid, RootIno, after, 97)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range got {
			if n.Cookie <= after || n.Cookie < FirstCookie {
				t.Fatalf("cookie %d after %d", n.Cookie, after)
			}
			after = n.Cookie
			seen[n.Ino]++
		}
		if eof {
			break
		}
		i := round * 61 % (entries / 2)
		m.must(m.rename(RootIno, fmt.Sprintf("f%05d", i), RootIno, fmt.Sprintf("r%05d", round)))        // stays
		m.must(m.rename(RootIno, fmt.Sprintf("f%05d", entries/2+round), d.Ino, fmt.Sprint("m", round))) // leaves
		m.must(&RemoveInode{FSID: m.fsid, Dir: RootIno, Name: fmt.Sprintf("f%05d", entries-1-round)})
		m.must(m.file(RootIno, fmt.Sprintf("new%05d", round)))
	}
	v := m.s.View()
	stayed := 0
	for ino := uint64(2); ino < 2+entries; ino++ {
		n, err := v.Inode(m.fsid, ino)
		if err != nil || n.Parent != RootIno {
			if seen[ino] > 1 {
				t.Fatalf("inode %d seen %d times", ino, seen[ino])
			}
			continue
		}
		stayed++
		if seen[ino] != 1 {
			t.Fatalf("inode %d (%s) seen %d times", ino, n.Name, seen[ino])
		}
	}
	if stayed < entries/2 {
		t.Fatalf("only %d stayed: the test changed too much", stayed)
	}
	if _, eof, err := v.ReadDir(m.fsid, RootIno, ^uint64(0), 10); !eof || err != nil {
		t.Fatalf("cookie at the end of time: %v, %v", eof, err)
	}
	m.check()
}

func TestResolveAndPath(t *testing.T) {
	m := newMachine(t)
	d := m.must(m.dir(RootIno, "vm"))
	f := m.must(m.file(d.Ino, "a.raw"))
	v := m.s.View()
	for _, path := range []string{"/vm/a.raw", "vm/a.raw", "//vm//a.raw"} {
		if n, err := v.Resolve(m.fsid, path); err != nil || n.Ino != f.Ino {
			t.Fatalf("%q: %+v, %v", path, n, err)
		}
	}
	for path, want := range map[string]error{"/vm/b": ErrNotFound, "/vm/a.raw/x": ErrNotDir, "/../vm": ErrNotFound} {
		if _, err := v.Resolve(m.fsid, path); !errors.Is(err, want) {
			t.Fatalf("%q: %v", path, err)
		}
	}
	if p, err := v.Path(m.fsid, f.Ino); p != "/vm/a.raw" || err != nil {
		t.Fatal(p, err)
	}
	if p, err := v.Path(m.fsid, RootIno); p != "/" || err != nil {
		t.Fatal(p, err)
	}
	if n := v.VolumesUnder(m.fsid, d.Ino); len(n) != 1 || n[0].ID != f.Volume {
		t.Fatalf("%+v", n)
	}
}

// A view stays as it was.
func TestViewIsImmutable(t *testing.T) {
	m := newMachine(t)
	v := m.s.View()
	m.must(m.file(RootIno, "f"))
	if _, err := v.Lookup(m.fsid, RootIno, "f"); !errors.Is(err, ErrNotFound) {
		t.Fatal("an old view shows a new name")
	}
}

// Keys must not reach a log or an answer by accident.
func TestSecretsHaveNoPrintedForm(t *testing.T) {
	m := newMachine(t)
	p, _ := m.s.View().VPool("default")
	if s := fmt.Sprintf("%v %+v %#v %s %x", p, p, p, p.Key, p.Key); strings.Contains(s, "7 7 7") || strings.Contains(s, "0x7, 0x7") ||
		strings.Contains(s, "0707") {
		t.Fatalf("printed: %s", s)
	}
}

// The package is pure: what it imports cannot make two nodes differ.
func TestImports(t *testing.T) {
	allowed := map[string]bool{"net/netip": true, "github.com/google/uuid": true, "github.com/hashicorp/go-memdb": true}
	for _, std := range []string{"bufio", "bytes", "crypto/sha256", "encoding/binary", "encoding/json", "errors", "fmt", "hash", "hash/crc32",
		"io", "path", "slices", "strconv", "strings", "sync", "sync/atomic", "unicode/utf8"} {
		allowed[std] = true
	}
	files, err := fs.Glob(os.DirFS("."), "*.go")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		for _, imp := range f.Imports {
			if path, _ := strconv.Unquote(imp.Path.Value); !allowed[path] {
				t.Errorf("%s imports %s", file, path)
			}
		}
	}
}

func BenchmarkLookup(b *testing.B) {
	m := newMachine(b)
	for i := range 10000 {
		m.must(m.file(RootIno, fmt.Sprintf("disk-%05d.raw", i)))
	}
	names := make([]string, 64)
	for i := range names {
		names[i] = fmt.Sprintf("disk-%05d.raw", i*151)
	}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if _, err := m.s.View().Lookup(m.fsid, RootIno, names[i&63]); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkInode(b *testing.B) {
	m := newMachine(b)
	f := m.must(m.file(RootIno, "f"))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := m.s.View().Inode(m.fsid, f.Ino); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCreateRemove(b *testing.B) {
	m := newMachine(b)
	b.ReportAllocs()
	for b.Loop() {
		r := m.must(m.file(RootIno, "f"))
		m.must(&RemoveInode{FSID: m.fsid, Dir: RootIno, Name: "f"})
		m.must(&DeleteVolumeDone{Volumes: []uuid.UUID{r.Volume}})
		m.log, m.indexes = m.log[:0], m.indexes[:0]
	}
}
