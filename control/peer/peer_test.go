package peer

import (
	"context"
	"errors"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/google/uuid"
	"go.uber.org/goleak"

	"varve/control/raft"
	"varve/control/state"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// mesh is a number of nodes that reach each other by pipes; away ones cannot be reached.
func mesh(t *testing.T, n int, away map[int]bool) []*Peers {
	t.Helper()
	ids := make([]uuid.UUID, n)
	all := make([]*Peers, n)
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, n)
	for i := range ids {
		ids[i] = uuid.UUID{byte(i + 1)}
		all[i] = New(Config{Self: ids[i], Dial: func(ctx context.Context, node uuid.UUID) (net.Conn, error) {
			at := int(node[0]) - 1
			if away[at] {
				return nil, errors.New("no route")
			}
			a, b := net.Pipe()
			go all[at].Accept(ctx, b)
			return a, nil
		}})
	}
	for _, p := range all {
		go func() { done <- p.Run(ctx) }()
	}
	t.Cleanup(func() {
		stop()
		for range all {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	})
	return all
}

func TestCalls(t *testing.T) {
	all := mesh(t, 3, map[int]bool{2: true})
	for i, p := range all {
		Handle1(p, "twice", 1<<10, func(_ context.Context, n int) (any, error) { return 2*n + 100*i, nil })
		p.Handle("refuse", 16, func(context.Context, []byte) (any, error) {
			return nil, &state.Error{Err: state.ErrNotFound, Object: "vdisk x", Remedy: "look"}
		})
	}
	ctx := t.Context()
	var got int
	for node, want := range map[uuid.UUID]int{all[0].cfg.Self: 10, all[1].cfg.Self: 110} { // itself, and another one
		if err := all[0].Call(ctx, node, "twice", 5, &got); err != nil || got != want {
			t.Fatal(node, got, err)
		}
	}
	for _, node := range []uuid.UUID{all[0].cfg.Self, all[1].cfg.Self} {
		err := all[0].Call(ctx, node, "refuse", nil, nil)
		if e, ok := errors.AsType[*state.Error](err); !ok || !errors.Is(err, state.ErrNotFound) || e.Remedy != "look" {
			t.Fatal("a refusal arrives as", err)
		}
	}
	if err := all[0].Call(ctx, all[2].cfg.Self, "twice", 5, &got); !errors.Is(err, raft.ErrUnavailable) {
		t.Fatal("a node that is away:", err)
	}
	if err := all[0].Call(ctx, all[1].cfg.Self, "unknown", nil, nil); !errors.Is(err, raft.ErrUnavailable) {
		t.Fatal("a call of a later version:", err)
	}
	if err := all[0].Call(ctx, all[1].cfg.Self, "refuse", "more than sixteen bytes of arguments", nil); !errors.Is(err, state.ErrInvalid) {
		t.Fatal("arguments over the limit:", err)
	}
	answers := Each[int](ctx, all[0], []uuid.UUID{all[2].cfg.Self, all[1].cfg.Self, all[0].cfg.Self}, "twice", 1)
	if answers[0].Err == nil || answers[1].Value != 102 || answers[2].Value != 2 {
		t.Fatal(answers)
	}
}

// Who gives up waiting ends the work at the other end, and a node that stops is waited for.
func TestCallEnds(t *testing.T) {
	all := mesh(t, 2, nil)
	ended := make(chan error, 1)
	all[1].Handle("hang", 16, func(ctx context.Context, _ []byte) (any, error) {
		<-ctx.Done()
		ended <- ctx.Err()
		return nil, ctx.Err()
	})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := all[0].Call(ctx, all[1].cfg.Self, "hang", nil, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Fatal("the handler goes on")
	}
}

func ExampleEach() {
	p := New(Config{Self: uuid.UUID{1}})
	Handle1(p, "add", 64, func(_ context.Context, n [2]int) (any, error) { return n[0] + n[1], nil })
	for _, a := range Each[int](context.Background(), p, []uuid.UUID{{1}}, "add", [2]int{1, 2}) {
		fmt.Println(a.Value, a.Err)
	}
	// Output: 3 <nil>
}
