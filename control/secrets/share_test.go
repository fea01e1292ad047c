package secrets

import (
	"context"
	"errors"
	"testing"

	"varve/control/enginetest"
)

// A node that joins has the keys of the one that admits it; one that meets an unknown key takes it from another; and a key that did not reach
// all nodes seals nothing.
func TestKeysOfACluster(t *testing.T) {
	log := enginetest.NewLog()
	first, second, third := t.TempDir(), t.TempDir(), t.TempDir()
	if b, err := BundleOf(second); err != nil || b != nil {
		t.Fatal("keys where there are none:", err)
	}
	a := open(t, first, log)
	bundle, err := BundleOf(first)
	if err != nil {
		t.Fatal(err)
	}
	if err := Adopt(second, bundle); err != nil {
		t.Fatal(err)
	}
	b := open(t, second, log)
	if b.keys.current.id != a.keys.current.id || len(b.keys.all) != 1 {
		t.Fatal("the joined node seals by a key of its own")
	}
	if err := b.Set(t.Context(), "s", []byte("plain")); err != nil {
		t.Fatal(err)
	}
	want(t, a, "s", "plain")

	c := open(t, third, log) // has a key of its own alone
	if !c.Missing() || a.Missing() {
		t.Fatal(c.Missing(), a.Missing())
	}
	if bundle, err = a.Bundle(); err != nil {
		t.Fatal(err)
	}
	if err := c.Add(bundle); err != nil || c.Missing() {
		t.Fatal(err, c.Missing())
	}
	want(t, c, "s", "plain")

	before := a.keys.current.id
	away := errors.New("a node is away")
	a.Share(func(context.Context, []byte) error { return away })
	if n, err := a.Rotate(t.Context()); !errors.Is(err, away) || n != 0 || a.keys.current.id != before {
		t.Fatalf("rotated %d with a node away: %v", n, err)
	}
	if open(t, first, log).keys.current.id != before {
		t.Fatal("a key that not all nodes have is the current one after a restart")
	}
	shared := 0
	a.Share(func(_ context.Context, bundle []byte) error {
		if sealed, err := a.state.View().Secret("s"); err != nil || sealed.Key != before {
			t.Error("a secret was sealed by a key before it was everywhere")
		}
		shared++
		return errors.Join(b.Add(bundle), c.Add(bundle))
	})
	if n, err := a.Rotate(t.Context()); err != nil || n != 1 || shared != 1 {
		t.Fatal(n, shared, err)
	}
	for _, s := range []*Store{a, b, c, open(t, second, log)} {
		want(t, s, "s", "plain")
		if s.keys.current.id != a.keys.current.id || s.Missing() {
			t.Error("a node seals by another key")
		}
	}
}
