package state

import (
	"bytes"
	"testing"

	"github.com/google/uuid"
)

// nodes gives a machine with three masters.
func nodes(t *testing.T) (m *machine, ids [3]uuid.UUID) {
	m = newMachine(t)
	ids[0] = node1
	for i := 1; i < 3; i++ {
		ids[i] = m.id()
		m.must(&RegisterNode{ID: ids[i], Spec: NodeSpec{Name: "n1", Role: RoleMaster, Peer: "h:7443"}})
	}
	return m, ids
}

func TestNodeNamesAreFree(t *testing.T) {
	m, ids := nodes(t)
	for i, want := range []string{"n1", "n1-2", "n1-3"} {
		if n, err := m.s.View().Node(ids[i]); err != nil || n.Name != want {
			t.Fatalf("%+v, %v; want %s", n, err, want)
		}
	}
	m.check()
}

func TestRoleAndOfflineStayOverRestarts(t *testing.T) {
	m, ids := nodes(t)
	extra, yes := RoleExtra, true
	m.must(&SetNode{ID: ids[1], Role: &extra, Offline: &yes})
	m.must(&RegisterNode{ID: ids[1], Spec: NodeSpec{Name: "other", Role: RoleMaster}})
	n, err := m.s.View().Node(ids[1])
	if err != nil || n.Role != RoleExtra || !n.Offline || n.Name != "n1-2" {
		t.Fatalf("%+v, %v", n, err)
	}
	if e := m.fails(ErrConflict, &SetNode{ID: ids[1], Rev: n.Rev - 1, Role: &extra}); e.Rev != n.Rev {
		t.Fatalf("%+v", e)
	}
	bad := "boss"
	m.fails(ErrInvalid, &SetNode{ID: ids[1], Role: &bad})
	m.fails(ErrNotFound, &SetNode{ID: m.id(), Role: &extra})
}

func TestLastMasterStays(t *testing.T) {
	m, ids := nodes(t)
	extra, yes := RoleExtra, true
	m.must(&SetNode{ID: ids[1], Role: &extra})
	m.must(&SetNode{ID: ids[2], Offline: &yes})
	m.fails(ErrConflict, &SetNode{ID: ids[0], Role: &extra})
	m.fails(ErrConflict, &SetNode{ID: ids[0], Offline: &yes})
	m.fails(ErrConflict, &RemoveNode{ID: ids[0], Force: true})
}

func TestRemoveNode(t *testing.T) {
	m, ids := nodes(t)
	pool := m.id()
	m.must(&CreateVPool{ID: pool, Name: "far", Backend: Backend{Kind: BackendLocal, Node: ids[1], Dir: "/a"}, Key: key})
	f := m.must(m.file(RootIno, "f.raw"))
	m.must(&ActivateVolume{Volume: f.Volume, Node: ids[1]})
	if e := m.fails(ErrConflict, &RemoveNode{ID: ids[1]}); len(e.By) != 2 {
		t.Fatalf("%+v", e)
	}
	m.must(&RemoveNode{ID: ids[1], Force: true})
	m.fails(ErrNotFound, &RemoveNode{ID: ids[1]})
	if !m.s.View().NodeRemoved(ids[1]) || len(m.s.View().RemovedNodes()) != 1 {
		t.Fatal("not on the list of the removed")
	}
	m.fails(ErrConflict, &RegisterNode{ID: ids[1], Spec: NodeSpec{Name: "n1", Role: RoleMaster}})
	m.check()
}

func TestJoinToken(t *testing.T) {
	m := newMachine(t)
	hash, pub := bytes.Repeat([]byte{1}, 32), bytes.Repeat([]byte{2}, 32)
	m.must(&AddJoinToken{Hash: hash, Role: RoleExtra, Expires: 1 << 40})
	id := m.id()
	use := &UseJoinToken{Hash: hash, Node: id, Key: pub, Spec: NodeSpec{Name: "n2", Role: RoleMaster}}
	wrong := *use
	wrong.Hash = pub
	m.fails(ErrNotFound, &wrong)
	m.must(use)
	m.must(use) // the answer was lost
	if n, err := m.s.View().Node(id); err != nil || n.Role != RoleExtra {
		t.Fatalf("the token gives the role: %+v, %v", n, err)
	}
	other := *use
	other.Node = m.id()
	m.fails(ErrConflict, &other)
	other = *use
	other.Key = hash
	m.fails(ErrConflict, &other)

	m.must(&AddJoinToken{Hash: pub, Role: RoleMaster, Expires: 1}) // of long ago
	late := &UseJoinToken{Hash: pub, Node: m.id(), Key: pub, Spec: NodeSpec{Name: "n3"}}
	m.fails(ErrNotFound, late)
	m.must(&RemoveNode{ID: id})
	m.fails(ErrConflict, use) // a removed node does not come back by its old token
	for _, bad := range []*AddJoinToken{{Hash: hash[:3], Role: RoleExtra}, {Hash: hash, Role: "boss"}} {
		m.fails(ErrInvalid, bad)
	}
	m.check()
}

func TestJoinTokensAreBounded(t *testing.T) {
	m := newMachine(t)
	for i := range JoinTokensMax {
		m.must(&AddJoinToken{Hash: bytes.Repeat([]byte{byte(i)}, 32), Role: RoleExtra, Expires: 1 << 50})
	}
	m.fails(ErrNoSpace, &AddJoinToken{Hash: bytes.Repeat([]byte{255}, 32), Role: RoleExtra, Expires: 1 << 50})
}

// A repetition after more commands than the window remembers is refused, not done again.
func TestForgottenRepetition(t *testing.T) {
	m := newMachine(t)
	id := m.id()
	propose := func(index uint64, id uuid.UUID, base uint64, name string) error {
		entry, err := EncodeAfter(&SetDomain{ID: id, Name: name}, id, 1, base)
		if err != nil {
			t.Fatal(err)
		}
		_, err = m.s.Apply(index, entry)
		return err
	}
	base := m.index
	if err := propose(base+1, id, base, "first"); err != nil {
		t.Fatal(err)
	}
	m.index++
	if err := propose(base+2, id, base, "first"); err != nil || m.s.Index() != base+2 {
		t.Fatalf("within the window: %v at %d", err, m.s.Index())
	}
	m.index++
	for range ReplayWindow + 10 {
		m.must(&SetDomain{ID: node1, Name: "other"})
	}
	err := propose(m.index+1, id, base, "first")
	if e, ok := err.(*Error); !ok || e.Err != ErrForgotten {
		t.Fatalf("beyond the window: %v", err)
	}
	if err := propose(m.index+2, m.id(), m.index, "third"); err != nil {
		t.Fatalf("a new command: %v", err)
	}
}
