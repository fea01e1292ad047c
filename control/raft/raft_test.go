package raft

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/raft"
	walfs "github.com/hashicorp/raft-wal/fs"
	"github.com/hashicorp/raft-wal/types"
	"go.uber.org/goleak"

	"varve/control/state"
)

const killedEnv = "VARVE_RAFT_TEST_KILLED_DIR"

// TestMain runs the process that TestKilledProcess kills: it creates files for ever and prints each when it is acknowledged.
func TestMain(m *testing.M) {
	if dir := os.Getenv(killedEnv); dir != "" {
		if err := createForEver(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

var pool = uuid.MustParse("aaaaaaaa-0000-4000-8000-000000000001")

func open(t testing.TB, cfg Config) *Node {
	t.Helper()
	n, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}

func createPool(n *Node) error {
	_, err := n.Apply(context.Background(), &state.CreateVPool{ID: pool, Name: "default", Backend: state.Backend{Kind: "local", Dir: "/a"},
		Key: make([]byte, 32)})
	return err
}

func createFile(n *Node, name string) error {
	_, err := n.Apply(context.Background(), &state.CreateInode{FSID: state.FSIDOf(pool), Parent: state.RootIno, Name: name,
		Kind: state.File, How: state.Guarded, Volume: uuid.New()})
	return err
}

func has(n *Node, name string) bool {
	_, err := n.State().View().Lookup(state.FSIDOf(pool), state.RootIno, name)
	return err == nil
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func hash(t testing.TB, n *Node) [32]byte {
	t.Helper()
	h, err := n.State().Hash()
	must(t, err)
	return h
}

func TestRestartKeepsEverything(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	n := open(t, Config{Dir: dir})
	id, cluster := n.ID(), n.Cluster()
	must(t, createPool(n))
	for i := range 50 {
		must(t, createFile(n, fmt.Sprint("f", i)))
	}
	if err := createFile(n, "f1"); !errors.Is(err, state.ErrExist) {
		t.Fatalf("refusal: %v", err)
	}
	if err := createFile(n, "a/b"); !errors.Is(err, state.ErrInvalid) {
		t.Fatalf("refusal before the log: %v", err)
	}
	want := hash(t, n)
	for range 2 { // once from the log, once from a snapshot and the log
		must(t, n.Close())
		n = open(t, Config{Dir: dir})
		if n.ID() != id || n.Cluster() != cluster {
			t.Fatalf("node %s of %s was %s of %s", n.ID(), n.Cluster(), id, cluster)
		}
		if got := hash(t, n); got != want {
			t.Fatal("state differs after a restart")
		}
		must(t, n.Snapshot(t.Context()))
	}
	must(t, createFile(n, "later"))
}

func TestApplyAsOnce(t *testing.T) {
	n := open(t, Config{Dir: t.TempDir()})
	must(t, createPool(n))
	id, cmd := uuid.New(), &state.CreateInode{FSID: state.FSIDOf(pool), Parent: state.RootIno, Name: "f", Kind: state.File,
		How: state.Guarded, Volume: uuid.New()}
	first, err := n.ApplyAs(t.Context(), id, cmd)
	must(t, err)
	if again, err := n.ApplyAs(t.Context(), id, cmd); err != nil || again != first {
		t.Fatalf("%+v, %v; first %+v", again, err, first)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := n.Apply(ctx, cmd); !errors.Is(err, ErrUnavailable) || !errors.Is(err, context.Canceled) {
		t.Fatalf("ended context: %v", err)
	}
}

// Snapshots are taken by themselves, the log is trimmed, and a restart goes on from there.
func TestSnapshotsTrimTheLog(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	n := open(t, Config{Dir: dir, SnapshotEntries: 50})
	must(t, createPool(n))
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := range 50 {
				if err := createFile(n, fmt.Sprintf("f%d-%d", w, i)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	must(t, n.Snapshot(t.Context()))
	first, err := n.log.FirstIndex()
	must(t, err)
	if first < 200 {
		t.Fatalf("log still starts at %d", first)
	}
	want := hash(t, n)
	must(t, n.Close())
	n = open(t, Config{Dir: dir})
	if hash(t, n) != want {
		t.Fatal("state differs")
	}
}

// A copy of the directory taken while commands are applied, as after a kill, holds everything acknowledged before.
func TestCopyOfALiveDirectory(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	n := open(t, Config{Dir: dir})
	must(t, createPool(n))
	var acked atomic.Int64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := int64(0); ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			if err := createFile(n, fmt.Sprint("f", i)); err != nil {
				t.Error(err)
				return
			}
			acked.Store(i + 1)
		}
	})
	for round := range 5 {
		for before := acked.Load(); acked.Load() < before+20; {
			time.Sleep(time.Millisecond)
		}
		want := acked.Load()
		copied := t.TempDir()
		must(t, os.CopyFS(copied, os.DirFS(dir)))
		c := open(t, Config{Dir: copied})
		for i := range want {
			if !has(c, fmt.Sprint("f", i)) {
				t.Fatalf("round %d: f%d of %d was acknowledged and is gone", round, i, want)
			}
		}
		must(t, c.State().View().Check())
		must(t, c.Close())
	}
	close(stop)
	wg.Wait()
}

func createForEver(dir string) error {
	n, err := Open(Config{Dir: dir, SnapshotEntries: 64})
	if err != nil {
		return err
	}
	if _, err := n.State().View().VPool("default"); err != nil {
		if err := createPool(n); err != nil {
			return err
		}
	}
	names := make(chan string)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for name := range names {
				if err := createFile(n, name); err != nil {
					panic(err)
				}
				os.Stdout.WriteString(name + "\n") // one write: whole or not at all
			}
		})
	}
	for range 1 << 20 {
		names <- uuid.NewString()
	}
	close(names)
	wg.Wait()
	return n.Close()
}

// kill -9 at any moment, again and again on one directory, also while it recovers: whatever was acknowledged is there.
func TestKilledProcess(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var acked []string
	for round := range 8 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), killedEnv+"="+dir)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		lines := make(chan string, 1<<16)
		go func() {
			for s := bufio.NewScanner(out); s.Scan(); {
				lines <- s.Text()
			}
			close(lines)
		}()
		if round%3 == 2 {
			time.Sleep(time.Duration(20*round) * time.Millisecond) // perhaps before it is up
		} else {
			for range 40 + 97*round {
				name, ok := <-lines
				if !ok {
					t.Fatalf("round %d: it ended by itself: %s", round, stderr.String())
				}
				acked = append(acked, name)
			}
		}
		must(t, cmd.Process.Kill())
		for name := range lines {
			if len(name) == 36 {
				acked = append(acked, name)
			}
		}
		cmd.Wait()
		if strings.Contains(stderr.String(), "panic") {
			t.Fatalf("round %d: %s", round, stderr.String())
		}
	}
	n := open(t, Config{Dir: dir})
	for _, name := range acked {
		if !has(n, name) {
			t.Fatalf("%s of %d names was acknowledged and is gone", name, len(acked))
		}
	}
	must(t, n.State().View().Check())
	t.Logf("%d acknowledged, all there", len(acked))
}

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	formed := func(t *testing.T, snapshot bool) string {
		dir := t.TempDir()
		n := open(t, Config{Dir: dir})
		must(t, createPool(n))
		for i := range 10 {
			must(t, createFile(n, fmt.Sprint("f", i)))
		}
		if snapshot {
			must(t, n.Snapshot(t.Context()))
			must(t, createFile(n, "last"))
		}
		must(t, n.Close())
		return dir
	}
	rewrite := func(t *testing.T, path, old, new string) {
		b, err := os.ReadFile(path)
		must(t, err)
		if !bytes.Contains(b, []byte(old)) {
			t.Fatalf("%s has no %q: %s", path, old, b)
		}
		must(t, os.WriteFile(path, bytes.Replace(b, []byte(old), []byte(new), 1), 0o600))
	}
	segments := func(t *testing.T, dir string) string {
		found, err := filepath.Glob(filepath.Join(dir, "raft", "*.wal"))
		must(t, err)
		if len(found) != 1 {
			t.Fatalf("segments %v", found)
		}
		return found[0]
	}
	for name, c := range map[string]struct {
		snapshot bool
		damage   func(t *testing.T, dir string)
	}{
		"emptied raft directory": {false, func(t *testing.T, dir string) {
			must(t, os.RemoveAll(filepath.Join(dir, "raft")))
		}},
		"lost metadata": {true, func(t *testing.T, dir string) {
			must(t, os.Remove(filepath.Join(dir, "raft", metaFile)))
		}},
		"lost segment": {false, func(t *testing.T, dir string) {
			must(t, os.Remove(segments(t, dir)))
		}},
		"emptied segment": {true, func(t *testing.T, dir string) {
			must(t, os.Truncate(segments(t, dir), 0))
		}},
		"zeroed entries": {false, func(t *testing.T, dir string) {
			f, err := os.OpenFile(segments(t, dir), os.O_WRONLY, 0)
			must(t, err)
			_, err = f.WriteAt(make([]byte, 512), 2048)
			must(t, err)
			must(t, f.Close())
		}},
		"lost identity": {false, func(t *testing.T, dir string) {
			must(t, os.Remove(filepath.Join(dir, identityFile)))
		}},
		"broken identity": {false, func(t *testing.T, dir string) {
			must(t, os.Truncate(filepath.Join(dir, identityFile), 10))
		}},
		"unknown format": {false, func(t *testing.T, dir string) {
			rewrite(t, filepath.Join(dir, identityFile), `"format":1`, `"format":2`)
		}},
		"foreign cluster": {false, func(t *testing.T, dir string) {
			n := open(t, Config{Dir: t.TempDir()})
			must(t, n.Close())
			b, err := os.ReadFile(filepath.Join(dir, identityFile))
			must(t, err)
			i := bytes.Index(b, []byte(`"cluster":"`)) + len(`"cluster":"`)
			rewrite(t, filepath.Join(dir, identityFile), string(b[i:i+36]), n.Cluster().String())
		}},
		"broken watermark": {false, func(t *testing.T, dir string) {
			must(t, os.Truncate(filepath.Join(dir, "raft", watermarkFile), 3))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := formed(t, c.snapshot)
			c.damage(t, dir)
			var log bytes.Buffer
			n, err := Open(Config{Dir: dir, Log: slog.New(slog.NewTextHandler(&log, nil))})
			if err == nil {
				n.Close()
				t.Fatalf("opened a damaged directory\n%s", log.String())
			}
			if !errors.Is(err, ErrIdentity) {
				t.Fatalf("refused for another reason: %v", err)
			}
			if again, err := Open(Config{Dir: dir}); err == nil {
				again.Close()
				t.Fatal("the second attempt opened it")
			}
		})
	}
}

// A flipped bit in a committed entry halts the node; it never becomes state.
func TestBitRotInTheLog(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	n := open(t, Config{Dir: dir})
	must(t, createPool(n))
	must(t, createFile(n, "precious-name"))
	must(t, createFile(n, "another"))
	must(t, n.Close())
	segment, err := filepath.Glob(filepath.Join(dir, "raft", "*.wal"))
	must(t, err)
	b, err := os.ReadFile(segment[0])
	must(t, err)
	i := bytes.Index(b, []byte("precious-name"))
	if i < 0 {
		t.Fatal("the name is not in the log")
	}
	f, err := os.OpenFile(segment[0], os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt([]byte{b[i] ^ 1}, int64(i))
	must(t, err)
	must(t, f.Close())
	n, err = Open(Config{Dir: dir})
	if err == nil {
		n.Close()
		t.Fatal("opened")
	}
	if !errors.Is(err, state.ErrHalted) && !errors.Is(err, ErrIdentity) {
		t.Fatal(err)
	}
}

// A damaged newest snapshot is passed over while the log still joins an older one.
func TestDamagedSnapshot(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	n := open(t, Config{Dir: dir})
	must(t, createPool(n))
	must(t, n.Snapshot(t.Context()))
	must(t, createFile(n, "f"))
	time.Sleep(2 * time.Millisecond) // snapshot names have milliseconds
	must(t, n.Snapshot(t.Context()))
	want := hash(t, n)
	must(t, n.Close())
	files, err := filepath.Glob(filepath.Join(dir, "raft", "snapshots", "*", "state.bin"))
	must(t, err)
	if len(files) != 2 {
		t.Fatalf("snapshots %v", files)
	}
	must(t, os.Truncate(files[1], 100))
	n = open(t, Config{Dir: dir})
	if hash(t, n) != want {
		t.Fatal("state differs")
	}
	must(t, n.Close())
	must(t, os.Truncate(files[0], 100))
	if n, err := Open(Config{Dir: dir}); err == nil {
		n.Close()
		if hash(t, n) != want {
			t.Fatal("opened with another state")
		}
	}
}

// Two processes, or one twice, never work in one directory.
func TestOpenLocks(t *testing.T) {
	dir := t.TempDir()
	n := open(t, Config{Dir: dir})
	if _, err := Open(Config{Dir: dir}); !errors.Is(err, ErrUnavailable) {
		t.Fatal(err)
	}
	must(t, createPool(n)) // the first is none the worse
}

// Forming is repeatable: a crash before node.json says member is made good.
func TestFormingIsRepeatable(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	n := open(t, Config{Dir: dir})
	cluster := n.Cluster()
	must(t, n.Close())
	id, err := loadIdentity(dir)
	must(t, err)
	id.Phase = forming
	must(t, id.save(dir))
	n = open(t, Config{Dir: dir})
	if c, ok := n.State().View().Cluster(); !ok || c.ID != cluster {
		t.Fatalf("%+v", c)
	}
	must(t, n.Close())
	// The ids were chosen and nothing else happened.
	fresh := t.TempDir()
	must(t, id.save(fresh))
	n = open(t, Config{Dir: fresh})
	if n.ID() != id.Node || n.Cluster() != id.Cluster {
		t.Fatal("other ids")
	}
}

// faults fails the n-th sync of a file of the log, once; later syncs would succeed, as a kernel's do.
type faults struct {
	types.VFS
	syncs  atomic.Int64
	failAt int64
	after  atomic.Int64 // syncs after the failed one
}

func (f *faults) Create(dir, name string, size uint64) (types.WritableFile, error) {
	w, err := f.VFS.Create(dir, name, size)
	return faultyFile{w, f}, err
}

func (f *faults) OpenWriter(dir, name string) (types.WritableFile, error) {
	w, err := f.VFS.OpenWriter(dir, name)
	return faultyFile{w, f}, err
}

type faultyFile struct {
	types.WritableFile
	f *faults
}

var errPlanted = errors.New("planted EIO")

func (w faultyFile) Sync() error {
	n := w.f.syncs.Add(1)
	if w.f.failAt > 0 && n > w.f.failAt {
		w.f.after.Add(1)
	}
	if n == w.f.failAt {
		return errPlanted
	}
	return w.WritableFile.Sync()
}

// A failed fsync ends the node: Failed closes, Run ends with the error, nothing is acknowledged or synced any more, and
// after a restart what was acknowledged is there.
func TestFailedSyncEndsTheNode(t *testing.T) {
	t.Parallel()
	for _, failAt := range []int64{4, 7, 12} {
		dir := t.TempDir()
		must(t, open(t, Config{Dir: dir}).Close())
		f := &faults{VFS: walfs.New(), failAt: failAt}
		n := open(t, Config{Dir: dir, vfs: f})
		ran := make(chan error, 1)
		go func() { ran <- n.Run(t.Context()) }()
		must(t, createPool(n))
		var acked []string
		var failed error
		for i := 0; failed == nil && i < 50; i++ {
			name := fmt.Sprint("f", i)
			if failed = createFile(n, name); failed == nil {
				acked = append(acked, name)
			}
		}
		if !errors.Is(failed, ErrUnavailable) || !errors.Is(failed, errPlanted) {
			t.Fatalf("sync %d: %v", failAt, failed)
		}
		select {
		case <-n.Failed():
		case <-time.After(5 * time.Second):
			t.Fatal("Failed is not closed")
		}
		if err := <-ran; !errors.Is(err, errPlanted) {
			t.Fatalf("Run ended with %v", err)
		}
		for range 3 {
			if err := createFile(n, "after"); !errors.Is(err, ErrUnavailable) {
				t.Fatalf("applied after the failure: %v", err)
			}
		}
		n.Close()
		if f.after.Load() > 0 {
			t.Fatalf("%d syncs after the failed one", f.after.Load())
		}
		n = open(t, Config{Dir: dir})
		for _, name := range acked {
			if !has(n, name) {
				t.Fatalf("%s was acknowledged and is gone", name)
			}
		}
	}
}

// failing fails the n-th call that persists or reads, whichever it is, in the log as raft sees it.
type failing struct {
	logStore
	calls  *atomic.Int64
	failAt int64
	past   *atomic.Int64 // writes let through after the failure
}

func (s failing) step(write bool) error {
	n := s.calls.Add(1)
	if write && n > s.failAt {
		s.past.Add(1)
	}
	if n == s.failAt {
		return errPlanted
	}
	return nil
}

func (s failing) StoreLogs(l []*raft.Log) error {
	return errors.Join(s.step(true), s.logStore.StoreLogs(l))
}
func (s failing) DeleteRange(a, b uint64) error {
	return errors.Join(s.step(true), s.logStore.DeleteRange(a, b))
}
func (s failing) Set(k, v []byte) error { return errors.Join(s.step(true), s.logStore.Set(k, v)) }
func (s failing) SetUint64(k []byte, v uint64) error {
	return errors.Join(s.step(true), s.logStore.SetUint64(k, v))
}
func (s failing) GetLog(i uint64, l *raft.Log) error {
	return errors.Join(s.step(false), s.logStore.GetLog(i, l))
}

// Every kind of future that is waited for can be given its end.
func TestFuturesEndWithRaft(t *testing.T) {
	n := open(t, Config{Dir: t.TempDir()})
	down := make(chan struct{})
	for _, f := range []raft.Future{n.raft.VerifyLeader(), n.raft.Snapshot(), n.raft.Barrier(0), n.raft.RemoveServer("nobody", 0, 0),
		n.raft.Apply([]byte{0}, 0)} {
		if !endWith(f, down) {
			t.Errorf("a %T cannot be ended", f)
		}
	}
	must(t, n.Close())
}

// A disk that hangs keeps nobody waiting longer than its context: neither who has handed a command over, nor who cannot.
func TestHangingDisk(t *testing.T) {
	var hang atomic.Bool
	hung, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	n := open(t, Config{Dir: t.TempDir(), wrap: func(l logStore) logStore {
		return stepping{l, func(what string) {
			if hang.Load() && strings.HasPrefix(what, "before append") {
				once.Do(func() { close(hung) })
				<-release
			}
		}}
	}})
	must(t, createPool(n))
	hang.Store(true)
	var all sync.WaitGroup
	all.Go(func() {
		if err := createFile(n, "before"); err != nil {
			t.Error(err)
		}
	})
	<-hung
	began := time.Now()
	var callers sync.WaitGroup
	for i := range 200 { // more than the channels of raft hold
		callers.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			var err error
			switch i % 3 {
			case 0:
				_, err = n.Apply(ctx, &state.CreateInode{FSID: state.FSIDOf(pool), Parent: state.RootIno, Name: fmt.Sprint(i), Kind: state.File, How: state.Guarded, Volume: uuid.New()})
			case 1:
				err = n.Sync(ctx)
			case 2:
				err = n.AddNonvoter(ctx, uuid.New())
			}
			if !errors.Is(err, ErrUnavailable) {
				t.Error(err)
			}
		})
	}
	callers.Wait()
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("callers with 200 ms waited %s", took)
	}
	close(release)
	all.Wait()
	must(t, createFile(n, "after"))
	must(t, n.Close())
}

// Each call to the log and the stable store fails once, start and votes included: the node never goes on, never hangs and
// never takes the process down by a panic.
func TestEveryStoreCallFails(t *testing.T) {
	t.Parallel()
	base := t.TempDir()
	n := open(t, Config{Dir: base})
	must(t, createPool(n))
	must(t, n.Close())
	failures := 0
	for failAt := int64(1); failAt < 60; failAt++ {
		dir := t.TempDir()
		must(t, os.CopyFS(dir, os.DirFS(base)))
		var calls, past atomic.Int64
		n, err := Open(Config{Dir: dir, wrap: func(l logStore) logStore {
			return failing{logStore: l, calls: &calls, failAt: failAt, past: &past}
		}})
		var acked []string
		for i := 0; err == nil && i < 8; i++ {
			name := fmt.Sprint("f", i)
			if err = createFile(n, name); err == nil {
				acked = append(acked, name)
			}
		}
		if err == nil {
			err = n.Snapshot(t.Context()) // truncates the log
		}
		if n != nil {
			n.Close()
		}
		if calls.Load() >= failAt {
			failures++
			if err == nil && n.Err() == nil {
				t.Fatalf("call %d failed and nobody noticed", failAt)
			}
		}
		if past.Load() > 0 {
			t.Fatalf("call %d failed and %d writes followed", failAt, past.Load())
		}
		n = open(t, Config{Dir: dir})
		for _, name := range acked {
			if !has(n, name) {
				t.Fatalf("call %d: %s was acknowledged and is gone", failAt, name)
			}
		}
		must(t, n.Close())
		if calls.Load() < failAt {
			break
		}
	}
	if failures < 10 {
		t.Fatalf("only %d calls failed", failures)
	}
}

// The log of hashicorp's goes to slog with its keys.
func TestLogger(t *testing.T) {
	var b bytes.Buffer
	l := newLogger(slog.New(slog.NewTextHandler(&b, &slog.HandlerOptions{Level: slog.LevelInfo})))
	l.With("a", 1).Named("x").Warn("hello", "b", 2)
	l.Debug("quiet")
	if s := b.String(); !strings.Contains(s, "level=WARN msg=hello a=1 b=2") || strings.Contains(s, "quiet") {
		t.Fatal(s)
	}
	if l.IsDebug() || !l.IsInfo() {
		t.Fatal("levels")
	}
	if _, err := io.WriteString(l.StandardWriter(nil), "line\n"); err != nil || !strings.Contains(b.String(), "line") {
		t.Fatal(err, b.String())
	}
}

func BenchmarkApply(b *testing.B) {
	for _, callers := range []int{1, 64} {
		b.Run(fmt.Sprint(callers), func(b *testing.B) {
			n := open(b, Config{Dir: b.TempDir()})
			must(b, createPool(n))
			var next atomic.Int64
			b.ResetTimer()
			var wg sync.WaitGroup
			for range callers {
				wg.Go(func() {
					for i := next.Add(1); i <= int64(b.N); i = next.Add(1) {
						if err := createFile(n, fmt.Sprint("f", i)); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "applies/s")
		})
	}
}
