package raft

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
)

func TestLoggerWritesFormats(t *testing.T) {
	var out bytes.Buffer
	l := newLogger(slog.New(slog.NewTextHandler(&out, nil)))
	args := []any{"servers", hclog.Fmt("%+v", []string{"a", "b"}), "index", 7}
	l.Info("initial configuration", args...)
	l.Debug("not written", "x", hclog.Fmt("%d", 1))
	if s := out.String(); !strings.Contains(s, `servers="[a b]" index=7`) || strings.Contains(s, "not written") {
		t.Error(s)
	}
	if _, ok := args[1].(hclog.Format); !ok {
		t.Error("the caller's arguments were changed")
	}
}
