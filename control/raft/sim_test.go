package raft

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"

	"varve/control/state"
)

// wires connects the nodes of a simulated cluster in memory.
type wires struct {
	mu    sync.Mutex // guards what is below
	trans map[uuid.UUID]*raft.InmemTransport
	nodes map[uuid.UUID]*Node
	cut   map[uuid.UUID]bool
}

// end is a node's end of them; it is the node's Network.
type end struct {
	w    *wires
	self uuid.UUID
}

func (e end) Transport(hclog.Logger) (raft.Transport, error) {
	_, t := raft.NewInmemTransportWithTimeout(raft.ServerAddress(e.self.String()), time.Second)
	e.w.mu.Lock()
	defer e.w.mu.Unlock()
	e.w.trans[e.self] = t
	e.w.connect()
	return t, nil
}

// connect makes the links what cut says; mu is held.
func (w *wires) connect() {
	for a, ta := range w.trans {
		for b, tb := range w.trans {
			if a == b {
				continue
			}
			if w.cut[a] || w.cut[b] {
				ta.Disconnect(raft.ServerAddress(b.String()))
			} else {
				ta.Connect(raft.ServerAddress(b.String()), tb)
			}
		}
	}
}

func (w *wires) isolate(id uuid.UUID, cut bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cut[id] = cut
	w.connect()
}

func (e end) peer(to uuid.UUID) (*Node, error) {
	e.w.mu.Lock()
	defer e.w.mu.Unlock()
	n := e.w.nodes[to]
	if n == nil || e.w.cut[to] || e.w.cut[e.self] {
		return nil, fmt.Errorf("%w: cut off", ErrUnavailable)
	}
	return n, nil
}

func (e end) Propose(ctx context.Context, to uuid.UUID, entry []byte) (Outcome, error) {
	n, err := e.peer(to)
	if err != nil {
		return Outcome{}, err
	}
	o, err := n.Propose(ctx, entry)
	if _, perr := e.peer(to); perr != nil { // cut meanwhile: the answer is lost
		return Outcome{}, perr
	}
	return o, err
}

func (e end) ReadIndex(ctx context.Context, to uuid.UUID) (uint64, error) {
	n, err := e.peer(to)
	if err != nil {
		return 0, err
	}
	i, err := n.ReadIndex(ctx)
	if _, perr := e.peer(to); perr != nil {
		return 0, perr
	}
	return i, err
}

func (e end) Peers() []uuid.UUID {
	e.w.mu.Lock()
	defer e.w.mu.Unlock()
	var out []uuid.UUID
	for id := range e.w.trans {
		if id != e.self {
			out = append(out, id)
		}
	}
	return out
}

// sim is a cluster of three in a bubble of simulated time.
type sim struct {
	t    *testing.T
	base string
	w    *wires
	ids  []uuid.UUID
	dirs []string
	gen  int
}

func (s *sim) open(i int) *Node {
	s.t.Helper()
	n, err := Open(Config{Dir: s.dirs[i], Network: end{s.w, s.ids[i]}, ElectionTimeout: 5 * time.Second, SnapshotEntries: 200})
	must(s.t, err)
	s.w.mu.Lock()
	s.w.nodes[s.ids[i]] = n
	s.w.mu.Unlock()
	return n
}

func (s *sim) node(i int) *Node {
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	return s.w.nodes[s.ids[i]]
}

func (s *sim) form() {
	s.t.Helper()
	s.w = &wires{trans: make(map[uuid.UUID]*raft.InmemTransport), nodes: make(map[uuid.UUID]*Node), cut: make(map[uuid.UUID]bool)}
	for i := range 3 {
		s.dirs = append(s.dirs, filepath.Join(s.base, fmt.Sprint("n", i)))
	}
	cluster, first, err := Identify(s.dirs[0])
	must(s.t, err)
	s.ids = []uuid.UUID{first, uuid.New(), uuid.New()}
	one := s.open(0)
	must(s.t, one.Ready(s.t.Context()))
	must(s.t, createPool(one))
	for i := 1; i < 3; i++ {
		must(s.t, WriteJoining(s.dirs[i], cluster, s.ids[i]))
		n := s.open(i)
		must(s.t, one.AddNonvoter(s.t.Context(), s.ids[i]))
		must(s.t, n.Ready(s.t.Context()))
		must(s.t, one.Promote(s.t.Context(), s.ids[i]))
	}
}

// crash restarts a node from what was in its directory at a moment; what it did after that nobody has heard of.
func (s *sim) crash(i int) {
	s.t.Helper()
	old := s.node(i)
	s.w.isolate(s.ids[i], true)
	s.gen++
	copied := filepath.Join(s.base, fmt.Sprintf("n%d-%d", i, s.gen))
	must(s.t, os.CopyFS(copied, os.DirFS(s.dirs[i])))
	must(s.t, old.Close())
	must(s.t, os.RemoveAll(s.dirs[i]))
	s.dirs[i] = copied
	s.open(i)
	s.w.isolate(s.ids[i], false)
}

// Three nodes live through an hour of cut links, crashes, snapshots and handed-on leads, for each seed. Nothing acknowledged is
// lost, no read is older than what was acknowledged before it, and the states are equal in the end.
func TestSimulatedHours(t *testing.T) {
	seeds := 2
	if testing.Short() {
		seeds = 1
	}
	for seed := range seeds {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			base := t.TempDir()
			synctest.Test(t, func(t *testing.T) { simulate(t, base, uint64(seed)) })
		})
	}
}

// A node that is told by the leader that its command is committed does not wait for the leader's next message, also where
// the answer overtakes the entry itself, which the other follower and the leader have committed: as the simulated links have it, for none to
// a third of a run's commands.
func TestFollowerHearsOfItsCommitAtOnce(t *testing.T) {
	base := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := &sim{t: t, base: base}
		s.form()
		const writes = 40
		least := (5 * time.Second) / commitTimeouts
		began := time.Now()
		for i := range writes {
			n := s.node(1 + i%2)
			if n.IsLeader() {
				t.Fatal("a follower leads")
			}
			name := fmt.Sprint("f", i)
			must(t, createFile(n, name))
			if !has(n, name) {
				t.Errorf("%s is acknowledged and not there", name)
			}
		}
		took := time.Since(began)
		if took > writes*least/4 {
			t.Errorf("%d commands took %s; the leader's next message alone comes after %s", writes, took, least)
		}
		for i := range 3 {
			must(t, s.node(i).Close())
		}
		fmt.Printf("» raft: %d commands by followers took %s each, where the leader's next message comes after %s\n", writes, (took / writes).Round(time.Microsecond), least)
	})
}

func simulate(t *testing.T, base string, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 7))
	s := &sim{t: t, base: base}
	s.form()
	begin := time.Now()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var mu sync.Mutex // guards what is below
	acked := make(map[string]bool)
	counter, unknown := 0, 0
	counterID := uuid.New()
	ended := func() bool {
		select {
		case <-stop:
			return true
		case <-time.After(20 * time.Second):
			return false
		}
	}
	for i := range 3 {
		wg.Go(func() { // creates files
			for k := 0; !ended(); k++ {
				name := fmt.Sprintf("f%d-%d", i, k)
				err := createFile(s.node(i), name)
				mu.Lock()
				switch {
				case err == nil:
					acked[name] = true
				case errors.Is(err, ErrUnavailable):
					unknown++
				default:
					t.Errorf("create %s: %v", name, err)
				}
				mu.Unlock()
			}
		})
		wg.Go(func() { // reads the counter
			for !ended() {
				mu.Lock()
				least := counter
				mu.Unlock()
				n := s.node(i)
				if err := n.Sync(t.Context()); err != nil {
					continue
				}
				have := 0
				if d, err := n.State().View().Domain(counterID); err == nil {
					fmt.Sscanf(d.Name, "c%d", &have)
				}
				if have < least {
					t.Errorf("read %d on node %d after %d was acknowledged", have, i, least)
				}
			}
		})
	}
	wg.Go(func() { // counts, on whichever node
		for k := 1; !ended(); k++ {
			_, err := s.node(k%3).Apply(t.Context(), &state.SetDomain{ID: counterID, Name: fmt.Sprint("c", k)})
			if err == nil {
				mu.Lock()
				counter = k
				mu.Unlock()
			}
		}
	})
	for time.Since(begin) < time.Hour {
		time.Sleep(time.Duration(10+rng.IntN(110)) * time.Second)
		i := rng.IntN(3)
		switch rng.IntN(5) {
		case 0, 1:
			s.w.isolate(s.ids[i], true)
			time.Sleep(time.Duration(1+rng.IntN(60)) * time.Second)
			s.w.isolate(s.ids[i], false)
		case 2:
			s.crash(i)
		case 3:
			if err := s.node(i).Snapshot(t.Context()); err != nil {
				t.Errorf("snapshot: %v", err)
			}
		case 4:
			if n := s.node(i); n.IsLeader() {
				n.TransferLeadership(t.Context()) // may fail: then it goes on leading
			}
		}
	}
	close(stop)
	wg.Wait()
	var first [32]byte
	for i := range 3 {
		n := s.node(i)
		must(t, n.Sync(t.Context()))
		lost := 0
		for name := range acked {
			if !has(n, name) {
				lost++
			}
		}
		if lost > 0 {
			t.Errorf("node %d lost %d of %d acknowledged files", i, lost, len(acked))
		}
		must(t, n.State().View().Check())
	}
	for i := range 3 {
		if h := hash(t, s.node(i)); i == 0 {
			first = h
		} else if h != first {
			t.Errorf("node %d differs from node 0", i)
		}
	}
	for i := range 3 {
		must(t, s.node(i).Close())
	}
	if len(acked) < 100 {
		t.Errorf("only %d files were acknowledged", len(acked))
	}
	fmt.Printf("» raft: seed %d, %s simulated, %d crashes, %d commands acknowledged, %d unknown, %d counted; nothing lost, no stale read\n", seed,
		time.Since(begin).Round(time.Minute), s.gen, len(acked), unknown, counter)
}
