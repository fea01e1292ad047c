package server

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"varve/control/state"
)

// files are the names, sizes and times of everything below dir.
func files(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := make(map[string]string)
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		out[p] = info.Mode().String() + " " + info.ModTime().Format(time.RFC3339Nano)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestDataOfANewerLevelIsNotTouched(t *testing.T) {
	dir := t.TempDir()
	cfg := Config{Data: dir, NBD: "127.0.0.1:0", NFS: Off, HTTPS: Off, Node: Off, LogBytes: logBytesMin, Version: "1.0"}
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	if err := Serve(ctx, cfg, func(Summary) { stop() }); err != nil {
		t.Fatal(err)
	}
	if level, err := DataLevel(dir); level != state.LevelMin || err != nil {
		t.Fatalf("a fresh appliance's data is of level %d, %v", level, err)
	}
	if err := os.WriteFile(filepath.Join(dir, levelName), []byte(`{"level":7,"version":"9.0"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	before := files(t, dir)
	refused := func(what string, err error) {
		t.Helper()
		if newer, ok := errors.AsType[*LevelError](err); !ok || newer.Level != 7 || newer.Version != "9.0" {
			t.Errorf("%s: %v", what, err)
		}
	}
	refused("serve", Serve(t.Context(), cfg, func(Summary) { t.Error("it serves") }))
	gateway := cfg
	gateway.Unit = UnitGateway
	refused("gateway", Serve(t.Context(), gateway, func(Summary) { t.Error("it serves") }))
	refused("control", Control(t.Context(), cfg, func(Summary) { t.Error("it serves") }))
	_, err := Rebuild(t.Context(), cfg, RebuildOptions{})
	refused("rebuild", err)
	_, err = Join(t.Context(), cfg, JoinOptions{Token: "x"})
	refused("join", err)
	if diff := cmp.Diff(before, files(t, dir)); diff != "" {
		t.Errorf("the refusals touched something: %s", diff)
	}
}
