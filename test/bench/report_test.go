package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestJudge(t *testing.T) {
	l := load{row: "G1", name: "x", unit: "op/s"}
	r := &recorder{settings: settings{repeat: 3}}
	add := func(server string, rates ...float64) {
		for i, rate := range rates {
			r.samples = append(r.samples, sample{Row: "G1", Load: "x", Server: server, Repetition: i, Rate: rate, CPUus: 10 * rate})
		}
	}
	add(ours, 100, 300, 200)
	add("slow", 10, 10, 10)
	add("fast", 100, 100, 400)
	for _, c := range []struct {
		name    string
		unit    string
		goal    goal
		peer    string
		ratio   spread
		verdict string
	}{
		// The ratio is of one repetition's figures, so its median is not the ratio of the medians.
		{"best of two", "op/s", goal{peers: []string{"slow", "fast"}, atLeast: 1.5}, "fast", spread{1, 0.5, 3}, "below"},
		{"met", "op/s", goal{peers: []string{"fast"}, atLeast: 1}, "fast", spread{1, 0.5, 3}, "met"},
		{"no such peer", "op/s", goal{peers: []string{"none"}, atLeast: 1}, "none", spread{}, "not measured"},
		{"at most", "us", goal{atMost: 2000}, "", spread{}, "met"},
		{"too much", "us", goal{atMost: 1999}, "", spread{}, "below"},
	} {
		l.unit = c.unit
		v := r.judge(l, c.goal)
		if v.Peer != c.peer || v.Ratio != c.ratio || v.Verdict != c.verdict {
			t.Errorf("%s: %+v", c.name, v)
		}
	}
	if v := (&recorder{}).judge(l, goal{atMost: 1}); v.Verdict != "not measured" {
		t.Errorf("nothing measured: %+v", v)
	}
	l.unit, l.goals = "op/s", []goal{{peers: []string{"fast"}, atLeast: 1, issue: true}, {peers: []string{"none"}, atLeast: 1}}
	r.loads = []load{l}
	var out bytes.Buffer
	r.print(&out)
	for _, want := range []string{"200 (100-300)", "1.00 (0.50-3.00)", ">= 1.00 *", "1 met, 0 below, 1 not measured"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
}

func TestSettings(t *testing.T) {
	env := func(pairs ...string) func(string) string {
		return func(name string) string {
			for i := 0; i < len(pairs); i += 2 {
				if pairs[i] == name {
					return pairs[i+1]
				}
			}
			return ""
		}
	}
	s, err := readSettings(env("BENCH_TIME", "2", "BENCH_REPEAT", "7", "BENCH_ROWS", "G1,G13", "BENCH_PEERS", "nbdkit file, nfs-ganesha"))
	if err != nil || s.runTime != 2*time.Second || s.repeat != 7 || !s.wantsRow("G13") || s.wantsRow("G2") ||
		!s.wantsPeer(kitFile) || s.wantsPeer(kitMem) {
		t.Errorf("%+v %v", s, err)
	}
	if s, err := readSettings(env()); err != nil || s.repeat != 5 || !s.wantsRow("G7") || !s.wantsPeer(qemuWB) {
		t.Errorf("defaults: %+v %v", s, err)
	}
	for _, bad := range [][]string{{"BENCH_TIME", "0"}, {"BENCH_TIME", "long"}, {"BENCH_REPEAT", "0"}, {"BENCH_ROWS", "G99"}, {"BENCH_PEERS", "none"}} {
		if _, err := readSettings(env(bad...)); err == nil {
			t.Errorf("%v is accepted", bad)
		}
	}
}

// Each load has a row that can be asked for and a goal, and no two of a row have the same name.
func TestLoads(t *testing.T) {
	s := settings{runTime: time.Second, repeat: 1}
	seen := map[string]bool{}
	of := map[string]int{}
	for _, l := range append(nbdLoads(s), nfsLoads(s)...) {
		if id := l.row + l.name; seen[id] || len(l.goals) == 0 || l.run == nil {
			t.Errorf("%s %s: twice, without a goal, or without a run", l.row, l.name)
		} else {
			seen[id] = true
		}
		of[l.row]++
	}
	for _, row := range rows {
		own := slices.Contains(s3Rows, row) || slices.Contains(scalingRows, row) || slices.Contains(controlRows, row) // lines of their own
		if of[row] == 0 && !own {
			t.Errorf("row %s has no load", row)
		}
		delete(of, row)
	}
	if len(of) > 0 {
		t.Errorf("loads of unknown rows: %v", of)
	}
}

// A pipeline never has more in flight than its depth, counts what it is told to, and stops at an error.
func TestPipeline(t *testing.T) {
	inFlight := make(chan struct{}, 4)
	work := func(i int, done func(error)) {
		select {
		case inFlight <- struct{}{}:
		default:
			t.Error("more than four in flight")
		}
		go func() {
			<-inFlight
			done(nil)
		}()
	}
	got, err := pipeline(4, upTo(context.Background(), 100), func(i int) bool { return i%10 != 0 }, work)
	if err != nil || got.ops != 90 || got.rate <= 0 || got.p99 < got.p50 {
		t.Errorf("%+v %v", got, err)
	}
	broken, calls := errors.New("broken"), 0
	_, err = pipeline(1, upTo(context.Background(), 100), nil, func(i int, done func(error)) {
		calls++
		if i == 2 {
			done(fmt.Errorf("call %d: %w", i, broken))
		} else {
			done(nil)
		}
	})
	if !errors.Is(err, broken) || calls != 3 {
		t.Errorf("%d calls, %v", calls, err)
	}
}

func TestFioResult(t *testing.T) {
	const result = `{"fio version": "fio-3.33", "jobs": [{"error": 0, "write": {"iops": 5, "total_ios": 7}}]}`
	for _, notes := range []string{"", "fio: connected to NBD server\n"} {
		j, got, err := fioResult(notes + result)
		if err != nil || got != notes || j.Write.IOPS != 5 || j.Write.TotalIOs != 7 {
			t.Errorf("after %q: %+v, %q, %v", notes, j, got, err)
		}
	}
	if _, _, err := fioResult(`{"jobs": [{"error": 5}]}`); !errors.Is(err, syscall.EIO) {
		t.Errorf("a failed job: %v", err)
	}
	for _, bad := range []string{"", "fio: no such engine\n", `{"jobs": []}`, `{"jobs": [`} {
		if _, _, err := fioResult(bad); err == nil {
			t.Errorf("%q is a result", bad)
		}
	}
}
