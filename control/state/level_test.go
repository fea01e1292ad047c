package state

import (
	"errors"
	"testing"

	"github.com/google/uuid"
)

// TestLevelIsRaisedWhenAllNodesKnowIt has a cluster of two, one of which is updated later than the other.
func TestLevelIsRaisedWhenAllNodesKnowIt(t *testing.T) {
	levelMax = 2
	defer func() { levelMax = LevelMax }()
	s, at := New(), Time(1)
	var log [][]byte
	do := func(c Command) error {
		t.Helper()
		at++
		entry, err := Encode(c, uuid.New(), at)
		if err != nil {
			return err
		}
		log = append(log, entry)
		_, err = s.Apply(uint64(len(log)), entry)
		return err
	}
	a, b := uuid.New(), uuid.New()
	register := func(id uuid.UUID, name string, level int) {
		t.Helper()
		if err := do(&RegisterNode{ID: id, Spec: NodeSpec{Name: name, Role: RoleMaster, Version: "1", LevelMax: level}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := do(&InitCluster{ID: uuid.New(), Format: Format}); err != nil {
		t.Fatal(err)
	}
	register(a, "a", 2)
	register(b, "b", 0) // of before there were levels
	if level, behind := s.View().LevelReady(); level != 1 || len(behind) != 1 || behind[0] != "b" {
		t.Fatal(level, behind)
	}
	if err := do(&RaiseLevel{To: 2}); !errors.Is(err, ErrConflict) {
		t.Fatalf("raised before all nodes know it: %v", err)
	}
	register(b, "b", 2)
	if level, behind := s.View().LevelReady(); level != 2 || behind != nil {
		t.Fatal(level, behind)
	}
	for range 2 {
		if err := do(&RaiseLevel{To: 2}); err != nil || s.View().Level() != 2 {
			t.Fatal(err, s.View().Level())
		}
	}
	if err := do(&RaiseLevel{To: 1}); !errors.Is(err, ErrConflict) {
		t.Fatal(err)
	}
	if err := do(&RaiseLevel{To: 3}); !errors.Is(err, ErrInvalid) {
		t.Fatal(err)
	}
	register(uuid.New(), "c", 2)
	if err := do(&RegisterNode{ID: uuid.New(), Spec: NodeSpec{Name: "d", Role: RoleMaster, Version: "0", LevelMax: 1}}); !errors.Is(err, ErrConflict) {
		t.Fatalf("a node that cannot read the data is let in: %v", err)
	}

	// The binary of before halts at the command, and changes nothing from there on.
	levelMax = 1
	old := New()
	var err error
	for i, entry := range log {
		if _, err = old.Apply(uint64(i+1), entry); errors.Is(err, ErrHalted) {
			break
		}
	}
	if !errors.Is(err, ErrHalted) || old.View().Level() != 1 {
		t.Fatalf("a binary that knows level 1 goes on with data of level 2: %v", err)
	}
}
