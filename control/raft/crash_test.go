package raft

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/hashicorp/raft"
)

// stepping copies the directory before and after every call that persists something.
type stepping struct {
	logStore
	step func(what string)
}

func (s stepping) around(what string, f func() error) error {
	s.step("before " + what)
	err := f()
	s.step("after " + what)
	return err
}

func (s stepping) StoreLogs(l []*raft.Log) error {
	return s.around(fmt.Sprintf("append of %d", len(l)), func() error { return s.logStore.StoreLogs(l) })
}

func (s stepping) DeleteRange(a, b uint64) error {
	return s.around(fmt.Sprintf("truncation %d to %d", a, b), func() error { return s.logStore.DeleteRange(a, b) })
}

func (s stepping) Set(k, v []byte) error {
	return s.around("set "+string(k), func() error { return s.logStore.Set(k, v) })
}

func (s stepping) SetUint64(k []byte, v uint64) error {
	return s.around("set "+string(k), func() error { return s.logStore.SetUint64(k, v) })
}

// crashPoint is a directory as a crash at that step leaves it, and what had been acknowledged.
type crashPoint struct {
	what, dir string
	acked     int
}

// From every step of forming, appending, voting, snapshotting and trimming, a node starts and has what was acknowledged. Of a
// snapshot the steps are made from a finished one: not renamed yet, without its description, cut short.
func TestCrashAtEveryStep(t *testing.T) {
	t.Parallel()
	base := t.TempDir()
	dir := filepath.Join(base, "node")
	var mu sync.Mutex // guards what is below
	var points []crashPoint
	acked := 0
	step := func(what string) {
		mu.Lock()
		defer mu.Unlock()
		p := crashPoint{what: what, dir: filepath.Join(base, fmt.Sprint("crash", len(points))), acked: acked}
		must(t, os.CopyFS(p.dir, os.DirFS(dir)))
		points = append(points, p)
	}
	n := open(t, Config{Dir: dir, SnapshotEntries: 8, wrap: func(l logStore) logStore { return stepping{l, step} }})
	must(t, createPool(n))
	for i := range 24 {
		must(t, createFile(n, fmt.Sprint("f", i)))
		mu.Lock()
		acked = i + 1
		mu.Unlock()
		if i%8 == 7 {
			must(t, n.Snapshot(t.Context()))
			step("after a snapshot")
		}
	}
	must(t, n.Close())
	step("after the end")
	for _, p := range append([]crashPoint(nil), points...) {
		if strings.HasPrefix(p.what, "before truncation") {
			points = append(points, unfinished(t, base, p, len(points))...)
		}
	}
	for _, p := range points {
		c, err := Open(Config{Dir: p.dir})
		if err != nil {
			t.Fatalf("%s, %d acknowledged: %v", p.what, p.acked, err)
		}
		for i := range p.acked {
			if !has(c, fmt.Sprint("f", i)) {
				t.Fatalf("%s: f%d of %d is gone", p.what, i, p.acked)
			}
		}
		must(t, c.State().View().Check())
		must(t, c.Close())
		must(t, os.RemoveAll(p.dir))
	}
	fmt.Printf("» raft: a crash at each of %d steps of its store and snapshots: it starts, nothing acknowledged is gone\n", len(points))
	if len(points) < 50 {
		t.Fatalf("only %d steps", len(points))
	}
}

// unfinished makes from a directory with a finished newest snapshot those in which it was not finished.
func unfinished(t *testing.T, base string, p crashPoint, from int) []crashPoint {
	t.Helper()
	var out []crashPoint
	for i, damage := range []func(snap string) error{
		func(snap string) error { return os.Rename(snap, snap+".tmp") },
		func(snap string) error {
			if err := os.Remove(filepath.Join(snap, "meta.json")); err != nil {
				return err
			}
			return os.Rename(snap, snap+".tmp")
		},
		func(snap string) error {
			if err := os.Truncate(filepath.Join(snap, "state.bin"), 100); err != nil {
				return err
			}
			return os.Rename(snap, snap+".tmp")
		},
	} {
		q := p
		q.what = fmt.Sprintf("%s, snapshot unfinished %d", p.what, i)
		q.dir = filepath.Join(base, fmt.Sprintf("unfinished%d-%d", from, i))
		must(t, os.CopyFS(q.dir, os.DirFS(p.dir)))
		snaps, err := filepath.Glob(filepath.Join(q.dir, "raft", "snapshots", "*"))
		must(t, err)
		newest := ""
		for _, s := range snaps {
			if !strings.HasSuffix(s, ".tmp") {
				newest = max(newest, s)
			}
		}
		if newest == "" {
			continue
		}
		must(t, damage(newest))
		out = append(out, q)
	}
	return out
}
