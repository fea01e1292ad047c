package state

import (
	"bytes"
	"fmt"
	"slices"
	"testing"

	"github.com/google/uuid"
)

// Who follows changes hears of every object that a command touched, once, in order, and of gaps.
func TestChanges(t *testing.T) {
	s := New()
	index := uint64(0)
	apply := func(cmd Command) Result {
		t.Helper()
		index++
		entry, err := Encode(cmd, uuid.New(), Time(index))
		if err != nil {
			t.Fatal(err)
		}
		res, err := s.Apply(index, entry)
		if err != nil {
			t.Fatal(err)
		}
		return res
	}
	apply(&InitCluster{ID: uuid.New(), Format: Format})
	node := uuid.New()
	apply(&RegisterNode{ID: node, Spec: NodeSpec{Name: "n", Role: RoleMaster}})
	apply(&RegisterNode{ID: uuid.New(), Spec: NodeSpec{Name: "other", Role: RoleMaster}})
	after := index
	_, gap, more := s.Changes(after)
	if gap {
		t.Fatal("a gap where nothing is missing")
	}
	role := RoleExtra
	apply(&SetNode{ID: node, Role: &role})
	select {
	case <-more:
	default:
		t.Fatal("nobody is woken")
	}
	changes, gap, _ := s.Changes(after)
	if gap || !slices.ContainsFunc(changes, func(c Change) bool {
		return c.Kind == "node" && c.ID == node.String() && c.Index == index && !c.Deleted
	}) {
		t.Fatal(changes, gap)
	}
	apply(&SetDomain{ID: uuid.New(), Name: "rack"})
	at := s.View().Domains()[0]
	apply(&DeleteDomain{ID: at.ID})
	changes, _, _ = s.Changes(index - 2)
	var domain []bool
	for _, c := range changes {
		if c.Kind == "domain" && c.ID == at.ID.String() {
			domain = append(domain, c.Deleted)
		}
	}
	if !slices.Equal(domain, []bool{false, true}) {
		t.Fatal("a domain that came and went:", changes)
	}
	// A command that is refused changes nothing.
	entry, err := Encode(&DeleteDomain{ID: uuid.New()}, uuid.New(), 9)
	if err != nil {
		t.Fatal(err)
	}
	index++
	if _, err := s.Apply(index, entry); err == nil {
		t.Fatal("deleted what there is not")
	}
	if changes, gap, _ := s.Changes(index - 1); len(changes) != 0 || gap {
		t.Fatal(changes, gap)
	}
	// What is no longer kept is a gap; so is an index of another life, and a state that was replaced.
	for i := range changesKept {
		apply(&SetDomain{ID: uuid.New(), Name: fmt.Sprintf("d%d", i%100)[:2] + fmt.Sprint(i)})
		if i > 40 {
			d := s.View().Domains()[0]
			apply(&DeleteDomain{ID: d.ID})
		}
	}
	if _, gap, _ := s.Changes(after); !gap {
		t.Fatal("no gap after more changes than are kept")
	}
	if changes, gap, _ := s.Changes(index - 1); gap || len(changes) == 0 {
		t.Fatal("the last change is not there", gap)
	}
	if _, gap, _ := s.Changes(index + 100); !gap {
		t.Fatal("no gap for an index that has not been")
	}
	snap, err := s.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if _, err := snap.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	other := New()
	if err := other.Restore(&b); err != nil {
		t.Fatal(err)
	}
	if _, gap, _ := other.Changes(index - 1); !gap {
		t.Fatal("no gap after a restore")
	}
	if changes, gap, _ := other.Changes(index); gap || len(changes) != 0 {
		t.Fatal(changes, gap)
	}
}
