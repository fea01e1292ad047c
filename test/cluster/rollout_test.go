//go:build e2e

package cluster

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"varve/appliance/update"
	"varve/control/state"
	"varve/test/harness"
	"varve/test/nbdclient"
)

// appliance is a node as it is in a VM of the image, but for the kernel: two slots in files, the boot loader's counter in its own format, the
// update agent. What lies in a slot is the program itself, and a restart of the machine is one of the process.
type appliance struct {
	t    *testing.T
	node *harness.Node
	dir  string
	cfg  update.Config
	grub update.Grub

	mu      sync.Mutex
	started []string // versions
}

const slotBytes = 256 << 20

func newAppliance(t *testing.T, name, keyFile string, keys []ed25519.PublicKey, installed update.System, program io.Reader) *appliance {
	t.Helper()
	a := &appliance{t: t, dir: filepath.Join(t.TempDir(), name)}
	must(t, os.MkdirAll(filepath.Join(a.dir, "state"), 0o700))
	port, err := harness.FreePort()
	must(t, err)
	a.node, err = harness.NewNode(a.dir, "--node", fmt.Sprintf("127.0.0.1:%d", port), "--log-size", "256MiB", "--log-level", "warn", "--update-keys", keyFile)
	must(t, err)
	a.grub = update.Grub{Env: filepath.Join(a.dir, "grubenv"), Devices: a.dir, Cmdline: filepath.Join(a.dir, "cmdline")}
	for _, slot := range []update.Slot{update.SlotA, update.SlotB} {
		must(t, os.WriteFile(filepath.Join(a.dir, "varve-"+string(slot)), nil, 0o600))
		must(t, os.Truncate(filepath.Join(a.dir, "varve-"+string(slot)), slotBytes))
	}
	env := "# GRUB Environment Block\nslot=a\ntry=\ntries=0\n"
	must(t, os.WriteFile(a.grub.Env, []byte(env+strings.Repeat("#", 1024-len(env))), 0o600))
	must(t, a.grub.Write(t.Context(), update.SlotA, program))
	a.cfg = update.Config{State: filepath.Join(a.dir, "state"), Slots: a.grub, Keys: keys, LevelMax: state.LevelMax, Level: state.LevelMin,
		Log: slog.New(slog.DiscardHandler)}
	record, err := json.Marshal(map[string]any{"slots": map[update.Slot]update.System{update.SlotA: installed}})
	must(t, err)
	must(t, os.WriteFile(filepath.Join(a.cfg.State, "update.json"), record, 0o600))
	return a
}

// boot does what grub.cfg does, starts what it has chosen, and settles the update as varve-health does.
func (a *appliance) boot(ctx context.Context) error {
	st, err := a.grub.Boot()
	if err != nil {
		return err
	}
	slot := st.Slot
	if st.Try != "" && st.Tries > 0 {
		slot, st.Tries = st.Try, st.Tries-1
		if err := a.grub.SetBoot(st); err != nil {
			return err
		}
	}
	if err := os.WriteFile(a.grub.Cmdline, []byte("ro varve.slot="+string(slot)+" quiet\n"), 0o600); err != nil {
		return err
	}
	known, err := a.cfg.Status()
	if err != nil {
		return err
	}
	var raw struct{ Slots map[update.Slot]update.System }
	text, err := os.ReadFile(filepath.Join(a.cfg.State, "update.json"))
	if err == nil {
		err = json.Unmarshal(text, &raw)
	}
	if err != nil {
		return err
	}
	a.cfg.Version = raw.Slots[slot].Version
	r, err := a.grub.Read(slot, raw.Slots[slot].Size)
	if err != nil {
		return err
	}
	defer r.Close()
	a.node.Program = filepath.Join(a.dir, "varve."+string(slot))
	if err := os.Remove(a.node.Program); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(a.node.Program, os.O_CREATE|os.O_WRONLY, 0o700)
	if err != nil {
		return err
	}
	if _, err = io.Copy(f, r); err != nil {
		return errors.Join(err, f.Close())
	}
	if err := f.Close(); err != nil {
		return err
	}
	a.mu.Lock()
	a.started = append(a.started, a.cfg.Version)
	a.mu.Unlock()
	failed := a.ready()
	if failed != nil && known.Boot.Try == "" {
		return failed
	}
	verdict, err := a.cfg.Confirm(ctx, func(context.Context) error { return failed })
	if err != nil {
		return err
	}
	if verdict == update.Bad {
		return a.boot(ctx)
	}
	return a.cfg.Tell(update.Dir(a.node.Data))
}

// ready starts the program and waits until it serves. One that ends is not waited for.
func (a *appliance) ready() error {
	if err := a.node.Launch(); err != nil {
		return err
	}
	for deadline := time.Now().Add(time.Minute); ; {
		err := a.node.WaitReady(100 * time.Millisecond)
		if err == nil || a.node.Ended() || time.Now().After(deadline) {
			return err
		}
	}
}

// agent serves requests until ctx ends, as varve-update.path and its service do.
func (a *appliance) agent(ctx context.Context) error {
	for ctx.Err() == nil {
		err := a.cfg.Serve(ctx, update.Dir(a.node.Data), func(ctx context.Context) error {
			if err := a.node.Stop(); err != nil {
				return err
			}
			return a.boot(ctx)
		})
		if err != nil && ctx.Err() == nil && !errors.Is(err, update.ErrRefused) {
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
	return nil
}

// writer writes a vDisk of an appliance block by block, each with FUA, and connects again when the appliance has been away. What was
// answered has to be there.
type writer struct {
	address, export string
	blocks          [64]uint64 // what was last acknowledged of each
	written         int
	longest         time.Duration
}

const writerBlock = 4096

func (w *writer) content(seq uint64) []byte {
	b := make([]byte, 8)
	binary.BigEndian.PutUint64(b, seq)
	return bytes.Repeat(b, writerBlock/len(b))
}

func (w *writer) run(ctx context.Context) error {
	var c *nbdclient.Client
	defer func() {
		if c != nil {
			c.Close()
		}
	}()
	last := time.Now()
	for seq := uint64(1); ctx.Err() == nil; {
		err := error(nil)
		if c == nil {
			c, err = nbdclient.Dial("tcp", w.address, w.export)
		}
		at := seq % uint64(len(w.blocks))
		if err == nil {
			if err = c.Do(nbdclient.Write, nbdclient.FUA, int64(at)*writerBlock, writerBlock, w.content(seq)); err != nil {
				c.Close()
			}
		}
		if err != nil {
			c = nil
			if time.Since(last) > 2*time.Minute {
				return fmt.Errorf("%s is away for %s: %w", w.export, time.Since(last).Round(time.Second), err)
			}
			time.Sleep(20 * time.Millisecond)
			continue // the same again, as a hypervisor does
		}
		w.blocks[at] = seq
		w.longest = max(w.longest, time.Since(last))
		last = time.Now()
		w.written++
		seq++
		time.Sleep(5 * time.Millisecond) // the pace of a guest that does other things too
	}
	return nil
}

// check reads everything back.
func (w *writer) check() error {
	c, err := nbdclient.Dial("tcp", w.address, w.export)
	if err != nil {
		return err
	}
	defer c.Close()
	for at, seq := range w.blocks {
		if seq == 0 {
			continue
		}
		got := make([]byte, writerBlock)
		if err := c.Do(nbdclient.Read, 0, int64(at)*writerBlock, writerBlock, got); err != nil {
			return err
		}
		// The one after it may have been written and not answered when the test ended.
		if !bytes.Equal(got, w.content(seq)) && !bytes.Equal(got, w.content(seq+uint64(len(w.blocks)))) {
			return fmt.Errorf("%s block %d holds %x, %d was acknowledged", w.export, at, got[:8], seq)
		}
	}
	return nil
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A cluster of three is taken to the next version from the command line while a guest writes at each of them, then to one that does not start.
func TestClusterRollout(t *testing.T) {
	const next, broken = "77.1.0-rolling", "77.2.0-broken"
	dir := t.TempDir()
	newer := filepath.Join(dir, "varve")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w -X main.version="+next, "-o", newer, "./appliance/varve")
	build.Dir, build.Env = harness.Root(), append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	private, public, err := update.NewKey()
	must(t, err)
	key, err := update.ParsePrivateKey(private)
	must(t, err)
	keys, err := update.ParseKeys(public)
	must(t, err)
	keyFile := filepath.Join(dir, "update.pub")
	must(t, os.WriteFile(keyFile, []byte(public+"\n"), 0o644))
	bundle := func(version string, system io.ReadSeeker) string {
		name := filepath.Join(dir, version+".varve")
		f, err := os.Create(name)
		must(t, err)
		_, err = update.Pack(f, update.Manifest{Version: version, Built: time.Unix(0, 0), LevelMin: state.LevelMin, LevelMax: state.LevelMax}, system, key)
		must(t, err)
		must(t, f.Close())
		return name
	}
	program, err := os.Open(newer)
	must(t, err)
	defer program.Close()
	good := bundle(next, program)
	bad := bundle(broken, strings.NewReader("#!/bin/sh\necho it does not start\nexit 1\n"))

	version, err := harness.Run(30*time.Second, harness.Binary(), "version")
	must(t, err)
	before := strings.TrimPrefix(strings.TrimSpace(version), "varve ")
	info, err := os.Stat(harness.Binary())
	must(t, err)
	var nodes []*appliance
	agents, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for i := range 3 {
		old, err := os.Open(harness.Binary())
		must(t, err)
		a := newAppliance(t, fmt.Sprintf("n%d", i+1), keyFile, keys, update.System{Version: before, LevelMax: state.LevelMax, Size: info.Size()}, old)
		must(t, old.Close())
		if i > 0 {
			token := strings.TrimSpace(nodes[0].node.MustCLI(t, "cluster", "token", "create"))
			a.node.MustCLI(t, "cluster", "join", token)
		}
		must(t, a.boot(t.Context()))
		nodes = append(nodes, a)
		running.Go(func() {
			if err := a.agent(agents); err != nil {
				t.Errorf("agent: %v", err)
			}
		})
		t.Cleanup(func() {
			if t.Failed() {
				t.Logf("%s printed last:\n%s", a.dir, a.node.Log())
			}
			a.node.Kill()
		})
	}
	t.Cleanup(func() { stop(); running.Wait() })

	writing, enough := context.WithCancel(context.Background())
	var writers []*writer
	var writes sync.WaitGroup
	for i, a := range nodes {
		// A vPool in a directory belongs to the node whose directory it is.
		pool := fmt.Sprintf("p%d", i+1)
		a.node.MustCLI(t, "vpool", "create", pool, "--backend", "local://"+filepath.Join(a.dir, "backend"))
		a.node.MustCLI(t, "vdisk", "create", pool+"/d", "--size", "64MiB")
		w := &writer{address: a.node.NBDAddr(), export: pool + "/d"}
		writers = append(writers, w)
		writes.Go(func() {
			if err := w.run(writing); err != nil {
				t.Error(err)
			}
		})
	}
	defer func() { enough(); writes.Wait() }()

	rollout := func(file string) (took time.Duration, problem string) {
		t.Helper()
		var answer struct{ ID string }
		must(t, json.Unmarshal([]byte(nodes[0].node.MustCLI(t, "update", "rollout", file, "-o", "json")), &answer))
		began := time.Now()
		for deadline := time.Now().Add(5 * time.Minute); ; time.Sleep(300 * time.Millisecond) {
			var task struct {
				State   string
				Problem struct{ Cause string }
			}
			out, err := nodes[0].node.CLI("task", "show", answer.ID, "-o", "json")
			if err == nil {
				err = json.Unmarshal([]byte(out), &task)
			}
			switch {
			case task.State == string(state.TaskSucceeded):
				return time.Since(began), ""
			case task.State == string(state.TaskFailed):
				return time.Since(began), task.Problem.Cause
			case time.Now().After(deadline):
				t.Fatalf("the rollout is not over: %+v %v\n%s", task, err, nodes[0].node.Log())
			}
		}
	}
	runs := func(what string) {
		t.Helper()
		for i, a := range nodes {
			st, err := a.cfg.Status()
			if err != nil || st.Version != what || st.Boot.Try != "" {
				t.Errorf("node %d runs %+v %v, not %s", i, st, err, what)
			}
		}
		if err := harness.Poll(time.Minute, func() error {
			out, err := nodes[0].node.CLI("node", "list", "-o", "json")
			if err == nil && strings.Count(out, what) != len(nodes) {
				err = errors.New(out)
			}
			return err
		}); err != nil {
			t.Errorf("not all nodes say that they run %s: %v", what, err)
		}
	}
	took, problem := rollout(good)
	if problem != "" {
		t.Fatalf("rollout: %s", problem)
	}
	runs(next)
	failed, problem := rollout(bad)
	if !strings.Contains(problem, broken) {
		t.Errorf("a version that does not start: %q", problem)
	}
	runs(next)
	enough()
	writes.Wait()
	total, longest := 0, time.Duration(0)
	for _, w := range writers {
		if err := w.check(); err != nil {
			t.Error(err)
		}
		total, longest = total+w.written, max(longest, w.longest)
	}
	tried := 0
	for _, a := range nodes {
		for _, v := range a.started {
			if v == broken {
				tried++
			}
		}
	}
	if tried != 1 {
		t.Errorf("the broken version was started %d times, not once on one node", tried)
	}
	if !t.Failed() {
		harness.Show("rollout: `varve update rollout` took three appliances to the next version in %.1f s, one after the other, %d writes acknowledged meanwhile and all there; "+
			"a guest waited %.1f s at most; a version that does not start was tried on one node, which went back, and ended the rollout after %.1f s",
			took.Seconds(), total, longest.Seconds(), failed.Seconds())
	}
}
