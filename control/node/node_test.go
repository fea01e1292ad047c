package node_test

import (
	"errors"
	"testing"

	"github.com/google/uuid"

	"varve/control/enginetest"
	"varve/control/node"
	"varve/control/state"
)

func TestNodes(t *testing.T) {
	log, self := enginetest.NewLog(), uuid.New()
	c := node.New(log, log.Store, self)
	if _, err := c.Self(); !errors.Is(err, state.ErrNotFound) {
		t.Fatal(err)
	}
	spec := state.NodeSpec{Name: node.HostName(), Role: state.RoleMaster, NBD: "127.0.0.1:10809", Version: "1"}
	for range 2 {
		if err := c.Register(t.Context(), spec); err != nil {
			t.Fatal(err)
		}
	}
	n, err := c.Self()
	if err != nil || n.NodeSpec != spec || n.Seen <= n.Joined || len(c.List()) != 1 {
		t.Fatal(n, err)
	}
	for _, name := range []string{spec.Name, self.String()} {
		if got, err := c.Get(name); err != nil || got.ID != self {
			t.Fatal(name, got, err)
		}
	}
	if _, err := c.Get("nope"); !errors.Is(err, state.ErrNotFound) {
		t.Fatal(err)
	}
}
