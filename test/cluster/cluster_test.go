//go:build e2e

// Package cluster runs three real appliances in network namespaces of their own and takes things from them: the leader's
// process, its network, its time, its disk. Meanwhile clients on all three create, remove and rename objects and write and read
// registers through control's socket, as a gateway does. Afterwards nothing acknowledged is missing, nothing removed is back,
// the histories of the registers are linearizable (porcupine), and the three states are equal.
//
// It needs root and ip(8); every namespace is named after this process and deleted at the end.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/google/uuid"

	"varve/appliance/server"
	"varve/control/raft"
	"varve/control/replica"
	"varve/control/state"
	"varve/control/wire"
	"varve/test/harness"
)

// lab is three nodes on a bridge.
type lab struct {
	t     *testing.T
	base  string
	nodes []*node
}

type node struct {
	name, ns, data, addr string
	proc                 *harness.Process
	client               *replica.Client
}

func ip(t *testing.T, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if out, err := exec.CommandContext(ctx, "ip", args...).CombinedOutput(); err != nil {
		t.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

func newLab(t *testing.T) *lab {
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	l := &lab{t: t, base: t.TempDir()}
	prefix := fmt.Sprintf("vc%d", os.Getpid())
	hub := prefix + "-hub"
	ip(t, "netns", "add", hub)
	t.Cleanup(func() { exec.Command("ip", "netns", "del", hub).Run() })
	ip(t, "-n", hub, "link", "add", "name", "hub0", "type", "bridge")
	ip(t, "-n", hub, "link", "set", "dev", "hub0", "up")
	for i := range 3 {
		n := &node{name: fmt.Sprintf("n%d", i+1), ns: fmt.Sprintf("%s-%d", prefix, i+1), addr: fmt.Sprintf("10.99.0.%d", i+1)}
		n.data = filepath.Join(l.base, n.name)
		ip(t, "netns", "add", n.ns)
		t.Cleanup(func() { exec.Command("ip", "netns", "del", n.ns).Run() })
		port := fmt.Sprintf("p%d", i+1)
		ip(t, "-n", hub, "link", "add", "name", port, "type", "veth", "peer", "name", "eth0", "netns", n.ns)
		ip(t, "-n", hub, "link", "set", "dev", port, "master", "hub0", "up")
		ip(t, "-n", n.ns, "addr", "add", n.addr+"/24", "dev", "eth0")
		ip(t, "-n", n.ns, "link", "set", "eth0", "up")
		ip(t, "-n", n.ns, "link", "set", "lo", "up")
		l.nodes = append(l.nodes, n)
	}
	return l
}

// start runs a node's process.
func (l *lab) start(n *node) {
	l.t.Helper()
	p, err := harness.Start("ip", "netns", "exec", n.ns, harness.Binary(), "serve", "--data", n.data, "--node", n.addr+":7443",
		"--nbd", "off", "--nfs", "off", "--https", "off", "--log-size", "256MiB", "--log-level", "info")
	if err != nil {
		l.t.Fatal(err)
	}
	n.proc = p
}

func (n *node) cli(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	args = append([]string{"netns", "exec", n.ns, harness.Binary(), "--data", n.data}, args...)
	out, err := exec.CommandContext(ctx, "ip", args...).Output()
	return strings.TrimSpace(string(out)), err
}

// form makes the cluster: the first node serves, the others join it.
func (l *lab) form() {
	l.t.Helper()
	for i, n := range l.nodes {
		if i > 0 {
			tok, err := l.nodes[0].cli("cluster", "token", "create")
			if err != nil {
				l.t.Fatalf("token: %v\n%s", err, l.nodes[0].proc.Log())
			}
			if out, err := n.cli("cluster", "join", tok); err != nil {
				l.t.Fatalf("join: %v: %s", err, out)
			}
		}
		l.start(n)
		n.client = replica.Open(server.ControlSocket(n.data), slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- n.client.Run(ctx) }()
		l.t.Cleanup(func() {
			cancel()
			if err := <-done; err != nil {
				l.t.Errorf("the copy of %s ended: %v", n.name, err)
			}
			n.proc.Kill()
			if l.t.Failed() {
				lines := strings.Split(n.proc.Log(), "\n")
				l.t.Logf("%s printed last:\n%s", n.name, strings.Join(lines[max(0, len(lines)-40):], "\n"))
			}
		})
		wait, end := context.WithTimeout(context.Background(), 30*time.Second)
		err := n.client.Ready(wait)
		end()
		if err != nil {
			l.t.Fatalf("%s is not ready: %v\n%s", n.name, err, n.proc.Log())
		}
	}
	l.eventually("three voters", func() bool {
		s, err := l.status(l.nodes[0])
		return err == nil && s.Voters == 3 && len(s.Problems) == 0
	})
}

func (l *lab) eventually(what string, f func() bool) {
	l.t.Helper()
	l.within(30*time.Second, what, f)
}

func (l *lab) within(limit time.Duration, what string, f func() bool) {
	l.t.Helper()
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if f() {
			return
		}
	}
	l.t.Fatalf("%s: not within %s", what, limit)
}

func (l *lab) status(n *node) (server.ClusterStatus, error) {
	var s server.ClusterStatus
	client := replica.NewHTTP(server.ControlSocket(n.data))
	defer client.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	err := wire.Call(ctx, client, "status", nil, &s)
	return s, err
}

// leader asks until a majority names one.
func (l *lab) leader() *node {
	l.t.Helper()
	var leader *node
	l.eventually("a leader", func() bool {
		count := make(map[uuid.UUID]int)
		for _, n := range l.nodes {
			if s, err := l.status(n); err == nil && s.Leader != uuid.Nil {
				count[s.Leader]++
			}
		}
		for _, n := range l.nodes {
			if count[n.client.ID()] >= 2 {
				leader = n
				return true
			}
		}
		return false
	})
	return leader
}

// workload is what the clients do and remember.
type workload struct {
	l    *lab
	stop chan struct{}
	wg   sync.WaitGroup

	mu      sync.Mutex // guards what is below
	kept    map[string]bool
	removed map[string]bool
	acks    []time.Time
	history []porcupine.Operation
	unknown int
}

const registers = 4

type registerOp struct {
	register int
	write    bool
	value    string
}

// registerModel: a register holds the value written last; a write of unknown outcome may take effect at any time after its
// call, or never.
var registerModel = porcupine.Model{
	Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
		parts := make([][]porcupine.Operation, registers)
		for _, o := range history {
			r := o.Input.(registerOp).register
			parts[r] = append(parts[r], o)
		}
		return parts
	},
	Init: func() any { return "" },
	Step: func(s, in, out any) (bool, any) {
		op := in.(registerOp)
		if op.write {
			return true, op.value
		}
		return out.(string) == s.(string), s
	},
	Equal: func(a, b any) bool { return a == b },
}

func (l *lab) load() *workload {
	w := &workload{l: l, stop: make(chan struct{}), kept: make(map[string]bool), removed: make(map[string]bool)}
	for i := range 6 {
		n := l.nodes[i%3]
		w.wg.Go(func() { w.objects(n, i) })
		w.wg.Go(func() { w.registers(n, i) })
	}
	return w
}

func registerID(i int) uuid.UUID { return uuid.NewSHA1(uuid.Nil, []byte(fmt.Sprint("register", i))) }

func (w *workload) ended() bool {
	select {
	case <-w.stop:
		return true
	default:
		return false
	}
}

func pause(d time.Duration) { time.Sleep(d) } // the pace of a client

// apply bounds a command; unknown says that it may have been done.
func apply(n *node, cmd state.Command) (unknown bool, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	_, err = n.client.Apply(ctx, cmd)
	return errors.Is(err, raft.ErrUnavailable) || errors.Is(err, state.ErrForgotten), err
}

// objects creates directories; every second one it removes again. A create that was applied twice would be refused.
func (w *workload) objects(n *node, who int) {
	var lastKept string
	pool, err := n.client.State().View().VPool(server.DefaultPool)
	if err != nil {
		w.l.t.Error(err)
		return
	}
	for i := 0; !w.ended(); i++ {
		name := fmt.Sprintf("o%d-%d", who, i)
		unknown, err := apply(n, &state.CreateInode{FSID: pool.FSID, Parent: state.RootIno, Name: name, Kind: state.Dir, How: state.Guarded})
		if err != nil && !unknown {
			w.l.t.Errorf("create %s: %v", name, err)
			return
		}
		w.mu.Lock()
		switch {
		case unknown:
			w.unknown++
		case i%2 == 0:
			w.kept[name] = true
			lastKept = name
		}
		if err == nil {
			w.acks = append(w.acks, time.Now())
		}
		w.mu.Unlock()
		if i%2 == 1 && !unknown {
			unknown, err := apply(n, &state.RemoveDir{FSID: pool.FSID, Dir: state.RootIno, Name: name})
			if err != nil && !unknown {
				w.l.t.Errorf("remove %s: %v", name, err)
				return
			}
			if !unknown {
				w.mu.Lock()
				w.removed[name] = true
				w.mu.Unlock()
			}
		}
		if lastKept != "" {
			if _, err := n.client.State().View().Lookup(pool.FSID, state.RootIno, lastKept); err != nil {
				w.l.t.Errorf("own write %s is not there on the same node: %v", lastKept, err)
				return
			}
		}
		pause(10 * time.Millisecond)
	}
}

var epoch = time.Now()

func (w *workload) registers(n *node, who int) {
	rng := rand.New(rand.NewPCG(uint64(who), 1))
	for i := 0; !w.ended(); i++ {
		op := registerOp{register: rng.IntN(registers), write: rng.IntN(2) == 0}
		call := time.Since(epoch).Nanoseconds()
		out := ""
		unknown := false
		if op.write {
			op.value = fmt.Sprintf("r%d-%d-%d", op.register, who, i)
			var err error
			unknown, err = apply(n, &state.SetDomain{ID: registerID(op.register), Name: op.value})
			if err != nil && !unknown {
				w.l.t.Errorf("write register: %v", err)
				return
			}
		} else {
			ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
			err := n.client.Sync(ctx)
			cancel()
			if err != nil {
				continue // a read that was not answered says nothing
			}
			if d, err := n.client.State().View().Domain(registerID(op.register)); err == nil {
				out = d.Name
			}
		}
		o := porcupine.Operation{ClientId: who, Input: op, Call: call, Output: out, Return: time.Since(epoch).Nanoseconds()}
		if unknown {
			o.Return = int64(1) << 62
		}
		w.mu.Lock()
		w.history = append(w.history, o)
		if unknown {
			w.unknown++
		}
		w.mu.Unlock()
		pause(20 * time.Millisecond)
	}
}

// firstAckAfter waits for a command that was acknowledged after a moment.
func (w *workload) firstAckAfter(at time.Time, limit time.Duration) (time.Duration, bool) {
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		w.mu.Lock()
		i, _ := slices.BinarySearchFunc(w.acks, at, func(a, b time.Time) int { return a.Compare(b) })
		found := i < len(w.acks)
		var d time.Duration
		if found {
			d = w.acks[i].Sub(at)
		}
		w.mu.Unlock()
		if found {
			return d, true
		}
	}
	return 0, false
}

func (w *workload) finish() {
	t := w.l.t
	t.Helper()
	close(w.stop)
	w.wg.Wait()
	for _, n := range w.l.nodes {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		err := n.client.Sync(ctx)
		cancel()
		if err != nil {
			t.Fatalf("read on %s at the end: %v", n.name, err)
		}
	}
	for _, n := range w.l.nodes {
		view := n.client.State().View()
		if err := view.Check(); err != nil {
			t.Errorf("%s: %v", n.name, err)
		}
		lost, back := 0, 0
		pool, err := view.VPool(server.DefaultPool)
		if err != nil {
			t.Fatal(err)
		}
		for name := range w.kept {
			if _, err := view.Lookup(pool.FSID, state.RootIno, name); err != nil {
				lost++
			}
		}
		for name := range w.removed {
			if _, err := view.Lookup(pool.FSID, state.RootIno, name); err == nil {
				back++
			}
		}
		if lost+back > 0 {
			t.Errorf("%s: of %d kept objects %d are lost, of %d removed ones %d are back", n.name, len(w.kept), lost, len(w.removed), back)
		}
	}
	// A schedule that is due at this moment commits between two looks: then another look is taken.
	var hashes []string
	same := func() bool {
		hashes = nil
		for _, n := range w.l.nodes {
			h, err := n.client.State().Hash()
			if err != nil {
				t.Fatal(err)
			}
			hashes = append(hashes, fmt.Sprintf("%x at %d", h[:6], n.client.State().Index()))
		}
		return hashes[0] == hashes[1] && hashes[0] == hashes[2]
	}
	for end := time.Now().Add(10 * time.Second); !same() && time.Now().Before(end); {
		time.Sleep(200 * time.Millisecond)
	}
	if hashes[0] != hashes[1] || hashes[0] != hashes[2] {
		t.Errorf("states differ: %v", hashes)
	}
	res := porcupine.CheckOperationsTimeout(registerModel, w.history, 30*time.Second)
	if res != porcupine.Ok {
		t.Errorf("registers are not linearizable: %s, %d operations", res, len(w.history))
	}
	harness.Show("cluster: %d objects kept, %d removed, %d register operations linearizable, %d outcomes unknown, states equal", len(w.kept),
		len(w.removed), len(w.history), w.unknown)
}

func median(d []time.Duration) time.Duration {
	s := slices.Sorted(slices.Values(d))
	return s[len(s)/2]
}

func TestClusterKillLeader(t *testing.T) {
	l := newLab(t)
	l.form()
	w := l.load()
	pause(time.Second)
	var took []time.Duration
	for i := range 20 {
		leader := l.leader()
		at := time.Now()
		leader.proc.Kill()
		d, ok := w.firstAckAfter(at, 30*time.Second)
		if !ok {
			t.Fatalf("kill %d: no command was acknowledged within 30 s", i)
		}
		took = append(took, d)
		l.start(leader)
		l.eventually("the killed node is back", func() bool {
			s, err := l.status(leader)
			return err == nil && s.Leader != uuid.Nil && !slices.ContainsFunc(s.Nodes, func(n server.NodeStatus) bool { return !n.Reachable || n.Lag > 500 })
		})
	}
	w.finish()
	harness.Show("cluster: leader killed %d times, the next command is acknowledged after %s (median), %s (longest)", len(took),
		median(took).Round(10*time.Millisecond), slices.Max(took).Round(10*time.Millisecond))
	if median(took) > 5*time.Second {
		t.Errorf("recovery takes %s", median(took))
	}
}

func TestClusterPartitionPauseFull(t *testing.T) {
	l := newLab(t)
	small := filepath.Join(l.nodes[2].data, "control")
	if err := os.MkdirAll(small, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", small, "tmpfs", 0, "size=80m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if p := l.nodes[2].proc; p != nil {
			p.Kill()
		}
		if err := syscall.Unmount(small, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	l.form()
	w := l.load()
	pause(time.Second)
	report := func(what string, n *node, begin, end func()) {
		var took []time.Duration
		for range 3 {
			victim := n
			if victim == nil {
				victim = l.leader()
			}
			current = victim
			at := time.Now()
			begin()
			d, ok := w.firstAckAfter(at.Add(50*time.Millisecond), 30*time.Second)
			if !ok {
				t.Fatalf("%s: no command was acknowledged within 30 s", what)
			}
			took = append(took, d)
			pause(2 * time.Second)
			end()
			l.eventually("all nodes are back after "+what, func() bool {
				s, err := l.status(victim)
				return err == nil && s.Leader != uuid.Nil && !slices.ContainsFunc(s.Nodes, func(n server.NodeStatus) bool { return !n.Reachable || n.Lag > 500 })
			})
		}
		harness.Show("cluster: %s, 3 times, the next command is acknowledged after %s (median), %s (longest)", what,
			median(took).Round(10*time.Millisecond), slices.Max(took).Round(10*time.Millisecond))
		if median(took) > 5*time.Second {
			t.Errorf("%s: recovery takes %s", what, median(took))
		}
	}
	report("leader cut off", nil, func() { ip(t, "-n", current.ns, "link", "set", "eth0", "down") },
		func() { ip(t, "-n", current.ns, "link", "set", "eth0", "up") })
	report("leader stopped (SIGSTOP)", nil, func() { syscall.Kill(current.proc.PID(), syscall.SIGSTOP) },
		func() { syscall.Kill(current.proc.PID(), syscall.SIGCONT) })

	full := l.nodes[2]
	ballast := filepath.Join(small, "ballast")
	f, err := os.Create(ballast)
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = f.Write(make([]byte, 64<<10))
	}
	f.Close()
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("fill the disk: %v", err)
	}
	at := time.Now() // the node may fail at its log at once, and does at the latest where it notes how far that reaches
	l.within(45*time.Second, "the node whose raft disk is full ends", full.proc.Ended)
	took := time.Since(at)
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	l.start(full)
	l.eventually("the node whose disk was full is back", func() bool {
		s, err := l.status(full)
		return err == nil && s.Leader != uuid.Nil && !slices.ContainsFunc(s.Nodes, func(n server.NodeStatus) bool { return !n.Reachable || n.Lag > 500 })
	})
	harness.Show("cluster: raft's disk filled on one node (its process ended after %s), the others went on", took.Round(10*time.Millisecond))
	w.finish()
}

// current is the node that the nemesis has chosen.
var current *node
