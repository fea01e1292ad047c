package replica

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"go.uber.org/goleak"

	"varve/control/raft"
	"varve/control/state"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var silence = slog.New(slog.DiscardHandler)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// control is a node with its socket; stop ends both.
func control(t *testing.T, dir string) (n *raft.Node, stop func()) {
	t.Helper()
	n, err := raft.Open(raft.Config{Dir: dir})
	must(t, err)
	ln, err := net.Listen("unix", filepath.Join(dir, "sock"))
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- NewServer(n, silence).Serve(ctx, ln) }()
	return n, sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		must(t, n.Close())
	})
}

func follow(t *testing.T, dir string) *Client {
	t.Helper()
	c := Open(filepath.Join(dir, "sock"), silence)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	wait, end := context.WithTimeout(t.Context(), 10*time.Second)
	defer end()
	must(t, c.Ready(wait))
	return c
}

// A copy reads its own writes and those of others, keeps what it has while control is away, and catches up after.
func TestCopyOverRestarts(t *testing.T) {
	dir := t.TempDir()
	n, stop := control(t, dir)
	c := follow(t, dir)
	if c.ID() != n.ID() || c.Cluster() != n.Cluster() {
		t.Fatalf("%s of %s", c.ID(), c.Cluster())
	}
	set := func(a interface {
		Apply(context.Context, state.Command) (state.Result, error)
	}, name string) error {
		_, err := a.Apply(t.Context(), &state.SetDomain{ID: uuid.New(), Name: name})
		return err
	}
	has := func(name string) bool { _, err := c.State().View().DomainByName(name); return err == nil }
	must(t, set(c, "mine"))
	if !has("mine") {
		t.Fatal("own write is not there")
	}
	must(t, set(n, "theirs"))
	must(t, c.Sync(t.Context()))
	if !has("theirs") {
		t.Fatal("another's write is not there after Sync")
	}
	if err := set(c, "mine"); !errors.Is(err, state.ErrExist) {
		t.Fatalf("refusal: %v", err)
	}

	stop()
	if !has("mine") || !has("theirs") {
		t.Fatal("control is away and names are gone")
	}
	short, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := c.Apply(short, &state.SetDomain{ID: uuid.New(), Name: "never"}); !errors.Is(err, raft.ErrUnavailable) {
		t.Fatalf("while control is away: %v", err)
	}
	waited := make(chan error, 1)
	go func() { waited <- set(c, "later") }()
	n, stop = control(t, dir)
	defer stop()
	must(t, <-waited)
	if !has("later") || !has("mine") {
		t.Fatal("after the restart")
	}
	for i := range 50 {
		must(t, set(n, fmt.Sprint("d", i)))
	}
	must(t, c.Sync(t.Context()))
	mine, err := c.State().Hash()
	must(t, err)
	theirs, err := n.State().Hash()
	must(t, err)
	if mine != theirs {
		t.Fatal("the copy differs")
	}
}

// A copy does not follow another node's control.
func TestAnotherNodesControl(t *testing.T) {
	dir := t.TempDir()
	_, stop := control(t, dir)
	c := Open(filepath.Join(dir, "sock"), silence)
	done := make(chan error, 1)
	go func() { done <- c.Run(t.Context()) }()
	must(t, c.Ready(t.Context()))
	stop()
	other := t.TempDir()
	n, err := raft.Open(raft.Config{Dir: other})
	must(t, err)
	defer n.Close()
	ln, err := net.Listen("unix", filepath.Join(dir, "sock"))
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- NewServer(n, silence).Serve(ctx, ln) }()
	select {
	case err := <-done:
		if err == nil {
			t.Error("it follows another node")
		}
	case <-time.After(10 * time.Second):
		t.Error("it goes on")
	}
	cancel()
	must(t, <-served)
	c.client.CloseIdleConnections()
}
