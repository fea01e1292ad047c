package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestFirstThread(t *testing.T) {
	for _, c := range []struct {
		pid, want int
		tasks     []int
	}{
		{100, 101, []int{100, 101, 102}},
		{100, 180, []int{100, 200, 180}},
		{4194300, 310, []int{4194300, 310, 320}},
		{4194300, 4194302, []int{4194300, 310, 4194302}},
		{100, 0, []int{100}},
	} {
		dir := t.TempDir()
		for _, tid := range c.tasks {
			if err := os.Mkdir(filepath.Join(dir, strconv.Itoa(tid)), 0o700); err != nil {
				t.Fatal(err)
			}
		}
		got, err := firstThread(dir, c.pid)
		if got != c.want || (err != nil) != (c.want == 0) {
			t.Errorf("process %d with threads %v: %d, %v; want %d", c.pid, c.tasks, got, err, c.want)
		}
	}
}

// TestRelaxMonitor: the thread that is given the slack is the one that sleeps for ever shorter and longer times, which no other
// thread of a Go program does.
func TestRelaxMonitor(t *testing.T) {
	err := relaxMonitor("/proc/self/task", "/proc")
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, fs.ErrNotExist) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	tid, err := firstThread("/proc/self/task", os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/timerslack_ns", tid))
	if err != nil || strings.TrimSpace(string(b)) != strconv.Itoa(monitorSlack) {
		t.Fatalf("thread %d has a slack of %q, %v", tid, b, err)
	}
	switches := func() int64 {
		b, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/status", tid))
		if err != nil {
			t.Fatal(err)
		}
		var n int64
		for line := range strings.Lines(string(b)) {
			if s, ok := strings.CutPrefix(line, "voluntary_ctxt_switches:"); ok {
				n, err = strconv.ParseInt(strings.TrimSpace(s), 10, 64)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	// A goroutine that computes gives the monitor reason to look, and no other thread a reason to sleep.
	before, deadline := switches(), time.Now().Add(30*time.Second)
	for x := uint64(1); switches()-before < 50; {
		for range 1 << 20 {
			x = x*6364136223846793005 + 1
		}
		if x == 0 || time.Now().After(deadline) {
			t.Fatalf("thread %d does not look after the others: it slept %d times", tid, switches()-before)
		}
	}
}
