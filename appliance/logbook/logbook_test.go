package logbook

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

func open(t *testing.T, dir, unit string) (*Book, *slog.Logger, *bytes.Buffer) {
	t.Helper()
	b, err := Open(dir, unit)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	var out bytes.Buffer
	return b, slog.New(b.Handler(slog.NewTextHandler(&out, nil))), &out
}

func TestNumbersGoOn(t *testing.T) {
	dir := t.TempDir()
	_, log, out := open(t, dir, "gateway")
	log.With("component", "c1.n1.appliance").With("component", "c1.n1.nbd").Info("one", "volume", "v1")
	log.Debug("not wanted by the handler below")
	log.WithGroup("g").With("a", 1).Warn("two", "b", 2)
	if got := out.String(); !strings.Contains(got, "msg=one") || !strings.Contains(got, "seq=1") || !strings.Contains(got, "g.b=2 g.seq=2") ||
		strings.Count(got, "component=") != 1 {
		t.Error(got)
	}
	// Killed in the middle of a line.
	f, err := os.OpenFile(filepath.Join(dir, "gateway.log"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteString(`{"seq":3,"msg":"hal`)
	f.Close()
	_, log, _ = open(t, dir, "gateway")
	log.Error("three")
	_, other, _ := open(t, dir, "control")
	other.Info("mine")
	lines, err := Read(dir, Query{})
	if err != nil || len(lines) != 4 {
		t.Fatalf("%+v %v", lines, err)
	}
	for i, want := range []struct {
		seq       uint64
		msg, unit string
	}{{1, "one", "gateway"}, {2, "two", "gateway"}, {3, "three", "gateway"}, {1, "mine", "control"}} {
		if l := lines[i]; l.Seq != want.seq || l.Message != want.msg || l.Unit != want.unit {
			t.Errorf("line %d is %+v, want %+v", i, l, want)
		}
	}
	if l := lines[0]; l.Component != "c1.n1.nbd" || l.Attrs["volume"] != "v1" || lines[1].Attrs["g.a"] != "1" {
		t.Errorf("%+v", lines[:2])
	}
	for q, want := range map[Query]int{{Level: slog.LevelWarn}: 2, {Component: "NBD"}: 1, {Match: "volume=V1"}: 1, {Match: "T"}: 2, {Limit: 1}: 1, {Since: time.Now().Add(time.Hour)}: 0,
		{Until: time.Now().Add(-time.Hour)}: 0} {
		if got, err := Read(dir, q); len(got) != want || err != nil {
			t.Errorf("%+v: %d lines, %v, want %d", q, len(got), err, want)
		}
	}
}

func TestFilesStayBounded(t *testing.T) {
	dir := t.TempDir()
	b, log, _ := open(t, dir, "gateway")
	var g sync.WaitGroup
	for range 4 {
		g.Go(func() {
			for i := range 800 {
				log.Info("line", "i", i, "text", strings.Repeat("x", 9000), "more", strings.Repeat("y", 9000), "and", strings.Repeat("z", 9000))
			}
		})
	}
	g.Wait()
	for i := range 20 { // far too long together
		log.Info("long", "a", strings.Repeat("é", 1000), fmt.Sprint("k", i), strings.Repeat("x", 9000), "b", strings.Repeat("\x00", 2000), "c", strings.Repeat("\x01", 2000))
	}
	list, err := os.ReadDir(dir)
	if err != nil || len(list) != 2 {
		t.Fatal(list, err)
	}
	for _, e := range list {
		if info, err := e.Info(); err != nil || info.Size() > fileBytesMax {
			t.Error(e.Name(), info.Size(), err)
		}
	}
	lines, err := Read(dir, Query{})
	if err != nil || len(lines) == 0 || lines[len(lines)-1].Seq != 3220 {
		t.Fatal(len(lines), err)
	}
	for i := 1; i < len(lines); i++ {
		if lines[i].Seq != lines[i-1].Seq+1 {
			t.Fatalf("line %d follows %d", lines[i].Seq, lines[i-1].Seq)
		}
	}
	b.Close()
	log.Info("after the end") // no panic, no loss of what is there
	if again, err := Read(dir, Query{}); err != nil || len(again) != len(lines) {
		t.Fatal(len(again), err)
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte("{\"seq\":1,\"at\":\"2026-01-02T03:04:05Z\",\"level\":\"WARN\",\"msg\":\"x\",\"attrs\":{\"a\":\"b\"}}\n{\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "gateway.log"), text, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Read(dir, Query{Match: "a", Level: slog.LevelInfo}); err != nil {
			t.Fatal(err)
		}
		b, err := Open(dir, "gateway")
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
	})
}
