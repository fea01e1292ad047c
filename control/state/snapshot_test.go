package state

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"testing"

	"github.com/google/uuid"
)

// busy is a machine with something in every table.
func busy(t testing.TB) *machine {
	m := newMachine(t)
	m.must(&CreateVPool{ID: poolB, Name: "fast", Backend: Backend{Kind: "local", Dir: "/b"}, Key: key, Clients: DefaultClients()})
	m.must(&SetToken{Name: "admin", Hash: key, Role: RoleAdmin})
	d := m.must(m.dir(RootIno, "vm"))
	for i := range 20 {
		f := m.must(m.file(d.Ino, fmt.Sprintf("disk %d é <&>\u2028.raw", i)))
		m.must(&ActivateVolume{Volume: f.Volume, Node: node1})
	}
	m.must(&CreateInode{FSID: m.fsid, Parent: RootIno, Name: "l", Kind: Symlink, How: Guarded, Target: "vm"})
	for i := range 5 {
		m.must(&RemoveInode{FSID: m.fsid, Dir: d.Ino, Name: fmt.Sprintf("disk %d é <&>\u2028.raw", i)})
	}
	m.must(&SetDomain{ID: m.id(), Name: "rack-1"})
	m.must(&PublishEvents{Events: []NewEvent{m.event("volume_create"), m.event("volume_resize")}})
	m.must(&MoveCursor{Name: "reader", Seq: 1})
	busyTasks(m)
	m.must(m.rename(d.Ino, "disk 7 é <&>\u2028.raw", RootIno, "seven"))
	return m
}

// busyTasks puts rows into the tables around tasks.
func busyTasks(m *machine) {
	for _, o := range []Outcome{OutcomeSucceeded, OutcomeFailed, OutcomeRetry} {
		id, _ := m.submit(TaskSpec{Type: "x", Args: []byte(`{"a":"<é>"}`)})
		lease, err := m.start(id)
		if err != nil || m.finish(id, lease, o) != nil {
			m.t.Fatal(err)
		}
	}
	m.must(&SetSchedule{Name: "own", Scope: ScopeOfCluster(), Spec: ScheduleSpec{Cron: "@daily", Task: "x", Args: []byte(`{}`)}})
	m.must(&DispatchSchedule{Name: "own", Scope: ScopeOfCluster(), Due: 9})
	m.must(&SetPolicy{Scope: ScopeOfCluster(), Spec: PolicySpec{Retention: &Retention{Last: 3}}})
	m.must(&SetConfig{Key: "k", Value: "v"})
	m.must(&SetBranding{ID: m.id(), Name: "ours", Product: "Ours"})
	m.must(&SetSink{ID: m.id(), Spec: SinkSpec{Name: "s", Kind: SinkAMQP, URL: "amqp://h", CA: "x"}})
}

func TestSnapshotRestore(t *testing.T) {
	m := busy(t)
	m.check()
	want := snapshotBytes(t, m.s)
	if again := snapshotBytes(t, m.s); !bytes.Equal(again, want) {
		t.Fatal("two snapshots of one state differ")
	}
	s := New()
	if err := s.Restore(bytes.NewReader(want)); err != nil {
		t.Fatal(err)
	}
	if got := snapshotBytes(t, s); !bytes.Equal(got, want) {
		t.Fatal("restored state differs")
	}
	p, err := s.View().VPool("fast")
	if err != nil || !bytes.Equal(p.Key[:], key) {
		t.Fatalf("key lost: %v", err)
	}
	if tok, err := s.View().Token("admin"); err != nil || !bytes.Equal(tok.Hash[:], key) {
		t.Fatalf("token hash lost: %v", err)
	}
	// Both go on alike, and remember the same commands.
	m2 := &machine{t: t, s: s, index: m.index, fsid: m.fsid, ids: m.ids}
	for _, x := range []*machine{m, m2} {
		x.must(x.file(RootIno, "after"))
	}
	a, _ := m.s.Hash()
	if b, _ := s.Hash(); a != b {
		t.Fatal("states drift apart after a restore")
	}
}

// A snapshot shows the state of its moment while the store goes on.
func TestSnapshotIsOfItsMoment(t *testing.T) {
	m := busy(t)
	want := snapshotBytes(t, m.s)
	snap, err := m.s.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	m.must(m.file(RootIno, "later"))
	var b bytes.Buffer
	if _, err := snap.WriteTo(&b); err != nil || !bytes.Equal(b.Bytes(), want) {
		t.Fatalf("snapshot moved on: %v", err)
	}
}

// Damage anywhere is found, and a failed restore changes nothing.
func TestRestoreRefusesDamage(t *testing.T) {
	good := snapshotBytes(t, busy(t).s)
	m := newMachine(t)
	before := snapshotBytes(t, m.s)
	refuse := func(what string, b []byte) {
		t.Helper()
		if err := m.s.Restore(bytes.NewReader(b)); !errors.Is(err, ErrCorruptSnapshot) && !errors.Is(err, ErrFormat) {
			t.Fatalf("%s: %v", what, err)
		}
	}
	for i := 0; i < len(good); i += 1 + len(good)/150 {
		b := bytes.Clone(good)
		b[i] ^= 0x40
		refuse(fmt.Sprint("flip at ", i), b)
		refuse(fmt.Sprint("cut at ", i), good[:i])
	}
	refuse("more", append(bytes.Clone(good), 0))
	refuse("empty", nil)
	zeroed := bytes.Clone(good)
	clear(zeroed[len(good)/2 : len(good)/2+512])
	refuse("512 zeros", zeroed)
	if !bytes.Equal(snapshotBytes(t, m.s), before) {
		t.Fatal("a failed restore changed the state")
	}
	if err := m.s.Restore(&broken{b: good[:100]}); err == nil {
		t.Fatal("restored from a reader that fails")
	}
}

type broken struct{ b []byte }

func (r *broken) Read(p []byte) (int, error) {
	if len(r.b) == 0 {
		return 0, errors.New("EIO")
	}
	n := copy(p, r.b)
	r.b = r.b[n:]
	return n, nil
}

// Check finds each broken invariant, planted past the commands.
func TestCheckFinds(t *testing.T) {
	for name, plant := range map[string]func(*tx, Inode){
		"no volume":    func(x *tx, f Inode) { v, _ := x.Volume(f.Volume); x.del(tVolume, &v) },
		"stray volume": func(x *tx, f Inode) { v, _ := x.Volume(f.Volume); v.ID = poolB; x.put(tVolume, &v) },
		"wrong kind":   func(x *tx, f Inode) { v, _ := x.Volume(f.Volume); v.Kind = FileVolume; x.put(tVolume, &v) },
		"orphan":       func(x *tx, f Inode) { f.Parent = 77; x.put(tInode, &f) },
		"in a file": func(x *tx, f Inode) {
			g := f
			g.Ino, g.Parent, g.Kind, g.Volume = 3, f.Ino, Symlink, uuid.Nil
			x.put(tInode, &g)
		},
		"entries":       func(x *tx, _ Inode) { r, _ := x.Inode(FSIDOf(poolA), RootIno); r.Entries++; x.put(tInode, &r) },
		"nlink":         func(x *tx, _ Inode) { r, _ := x.Inode(FSIDOf(poolA), RootIno); r.Nlink++; x.put(tInode, &r) },
		"cookie":        func(x *tx, _ Inode) { r, _ := x.Inode(FSIDOf(poolA), RootIno); r.NextCookie = 3; x.put(tInode, &r) },
		"count":         func(x *tx, _ Inode) { p, _ := x.VPool("default"); p.Inodes++; x.put(tVPool, &p) },
		"next number":   func(x *tx, _ Inode) { p, _ := x.VPool("default"); p.NextIno = 2; x.put(tVPool, &p) },
		"no pool":       func(x *tx, _ Inode) { p, _ := x.VPool("default"); x.del(tVPool, &p) },
		"name":          func(x *tx, f Inode) { f.Name = "a/b.raw"; x.put(tInode, &f) },
		"doomed, named": func(x *tx, f Inode) { v, _ := x.Volume(f.Volume); x.put(tDoomed, &Doomed{Volume: v}) },
		"loop":          func(x *tx, _ Inode) { d, _ := x.Inode(FSIDOf(poolA), 3); d.Parent = d.Ino; x.put(tInode, &d) },
	} {
		m := newMachine(t)
		m.must(m.file(RootIno, "f.raw"))
		m.must(m.dir(RootIno, "d"))
		m.check()
		txn := m.s.db.Txn(true)
		plant(&tx{View: View{txn: txn}}, m.lookup(RootIno, "f.raw"))
		txn.Commit()
		if err := m.s.View().Check(); err == nil {
			t.Errorf("%s: not found", name)
		}
	}
}

// No bytes in the log may panic, and what they do must be the same everywhere.
func FuzzApply(f *testing.F) {
	seed := busy(f)
	start := snapshotBytes(f, seed.s)
	for _, entry := range seed.log {
		f.Add(entry[4:], true)
	}
	f.Add([]byte(`{"v":1,"t":"rename","id":"aaaaaaaa-0000-4000-8000-000000000009","at":1,`+
		`"p":{"fsid":12297829379609722880,"from_dir":1,"from":"vm","to_dir":2,"to":"vm"}}`), true)
	f.Add([]byte("not json"), false)
	f.Fuzz(func(t *testing.T, body []byte, sum bool) {
		entry := append([]byte{0, 0, 0, 0}, body...)
		if sum {
			entry = append(le32(crc(string(body))), body...)
		}
		var hashes [2][32]byte
		for i := range hashes {
			s := New()
			if err := s.Restore(bytes.NewReader(start)); err != nil {
				t.Fatal(err)
			}
			_, err := s.Apply(seed.index+1, entry)
			if halted := s.Halted(); halted != nil {
				if !errors.Is(err, ErrHalted) {
					t.Fatalf("halted but said %v", err)
				}
				if !errors.Is(err, ErrCorruptEntry) && !errors.Is(err, ErrUnknownCommand) {
					t.Fatalf("a valid entry panicked: %v", err)
				}
				return
			}
			if err := s.View().Check(); err != nil {
				t.Fatal(err)
			}
			var herr error
			if hashes[i], herr = s.Hash(); herr != nil {
				t.Fatal(herr)
			}
		}
		if hashes[0] != hashes[1] {
			t.Fatal("one entry, two states")
		}
	})
}

// No bytes in a snapshot may panic; what restores is whole and snapshots again to something that restores.
func FuzzRestore(f *testing.F) {
	good := snapshotBytes(f, busy(f).s)
	f.Add(good, false)
	f.Add(snapshotBytes(f, New()), false)
	f.Add(good[12:len(good)-37], true)
	f.Fuzz(func(t *testing.T, b []byte, seal bool) {
		if seal {
			b = sealed(b)
		}
		s := New()
		if err := s.Restore(bytes.NewReader(b)); err != nil {
			return
		}
		if err := s.View().Check(); err != nil {
			t.Fatal(err)
		}
		again := New()
		if err := again.Restore(bytes.NewReader(snapshotBytes(t, s))); err != nil {
			t.Fatalf("its own snapshot does not restore: %v", err)
		}
	})
}

func le32(n uint32) []byte { return binary.LittleEndian.AppendUint32(nil, n) }

// sealed puts a right header and checksum around frames, so that fuzzing reaches the rows.
func sealed(frames []byte) []byte {
	b := append([]byte(snapshotMagic), le32(Format)...)
	b = append(b, frames...)
	sum := sha256.Sum256(b)
	b = append(b, frameEnd)
	b = append(b, le32(32)...)
	return append(b, sum[:]...)
}
