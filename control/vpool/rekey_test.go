package vpool_test

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"

	"varve/control/enginetest"
	"varve/control/jobs"
	"varve/control/secrets"
	"varve/control/state"
	"varve/control/vpool"
)

// rekeyNode is a node of a cluster that changes keys.
type rekeyNode struct {
	c      *vpool.Controller
	broker *jobs.Broker
	stop   func()
}

// TestFormerKEKs: the former key encryption key of a vPool goes when every node has wrapped its keys anew, and not before; a node that
// joined afterwards is not waited for, and nobody forgets a key that another rotation has made meanwhile.
func TestFormerKEKs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := enginetest.NewLog()
		keys, err := secrets.OpenKeys(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		vault := secrets.New(log, log.Store, keys)
		ids := map[string]uuid.UUID{"n1": uuid.New(), "n2": uuid.New(), "n3": uuid.New()}
		join := func(name string) {
			t.Helper()
			if _, err := log.Apply(t.Context(), &state.RegisterNode{ID: ids[name], Spec: state.NodeSpec{Name: name, Role: state.RoleMaster, Version: "t"}}); err != nil {
				t.Fatal(err)
			}
		}
		start := func(name string) rekeyNode {
			t.Helper()
			n := rekeyNode{c: vpool.New(vpool.Config{Raft: log, Store: log.Store, Engine: &enginetest.Engine{}, Vault: vault, Node: ids[name]})}
			types, err := jobs.NewTypes(n.c.TaskTypes()...)
			if err != nil {
				t.Fatal(err)
			}
			n.broker = jobs.NewBroker(jobs.BrokerConfig{Raft: log, Store: log.Store, Types: types})
			w := jobs.NewWorker(jobs.WorkerConfig{Node: ids[name], Queues: []string{state.QueueGeneric, state.QueueOf(ids[name])}, Types: types, Source: n.broker})
			ctx, cancel := context.WithCancel(context.Background())
			var wg sync.WaitGroup
			wg.Go(func() { _ = w.Run(ctx) })
			n.stop = func() { cancel(); wg.Wait() }
			return n
		}
		join("n1")
		join("n2")
		n1 := start("n1")
		defer n1.stop()
		p, err := n1.c.Create(t.Context(), vpool.Spec{Name: "safe", Backend: "s3://bucket/safe?endpoint=https://s3.example.com", Keys: vpool.Keys{Access: "a", Secret: "s"}, Encrypt: true})
		if err != nil {
			t.Fatal(err)
		}
		keks := func() (out []string) {
			t.Helper()
			b, err := vpool.KEKOf(vault, p.ID)
			if err != nil {
				t.Fatal(err)
			}
			for k := range slices.Chunk(b, vpool.KEKBytes) {
				out = append(out, string(k))
			}
			return out
		}
		rotate := func() {
			t.Helper()
			nodes, err := n1.c.NewKEK(t.Context(), "safe")
			if err != nil {
				t.Fatal(err)
			}
			if nodes[0] != ids["n1"] {
				t.Errorf("node %s comes first", nodes[0])
			}
			for _, id := range nodes {
				raw, _ := json.Marshal(vpool.RekeyArgs{VPool: "safe", Node: id})
				if _, _, err := n1.broker.Submit(t.Context(), state.TaskSpec{Type: vpool.RekeyTask, Queue: state.QueueOf(id), Args: raw}); err != nil {
					t.Fatal(err)
				}
			}
		}
		wait := func() {
			time.Sleep(time.Minute)
			synctest.Wait()
		}
		first := keks()
		rotate()
		wait()
		if got := keks(); len(got) != 2 || got[1] != first[0] {
			t.Fatalf("node n2 is away, and there are %d keys", len(got))
		}
		join("n3") // after the rotation: it has nothing under the former key
		second := keks()[0]
		n2 := start("n2")
		wait()
		if got := keks(); len(got) != 1 || got[0] != second {
			t.Fatalf("all nodes have changed their keys, and there are %d", len(got))
		}
		n3 := start("n3")
		rotate()
		wait()
		if got := keks(); len(got) != 1 || got[0] == second {
			t.Fatalf("all nodes at the same time: %d keys", len(got))
		}
		n2.stop()
		n3.stop()
		rotate()
		wait()
		rotate() // once more, while two nodes are away: what they have done last is of an older key
		wait()
		if got := keks(); len(got) != 3 {
			t.Fatalf("two rotations wait for two nodes, and there are %d keys", len(got))
		}
		n2, n3 = start("n2"), start("n3")
		defer n2.stop()
		defer n3.stop()
		wait()
		if got := keks(); len(got) != 1 {
			t.Fatalf("they are back, and there are %d keys", len(got))
		}
		log.Store.View().Tasks(func(task *state.Task) bool {
			if task.State != state.TaskSucceeded {
				t.Errorf("task %s is %s: %+v", task.Type, task.State, task.Problem)
			}
			return true
		})
		// What was looked at is what is changed.
		now, err := log.Store.View().Secret(state.KEKOf(p.ID))
		if err != nil {
			t.Fatal(err)
		}
		stale := vault.Seal(state.KEKOf(p.ID), []byte(keks()[0]))
		stale.Rev = now.Rev - 1
		if _, err := log.Apply(t.Context(), stale); !errors.Is(err, state.ErrConflict) {
			t.Errorf("keys changed at an old revision: %v", err)
		}
	})
}
