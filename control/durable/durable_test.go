package durable_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"varve/control/durable"
)

func TestReplace(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	if err := durable.MakeDir(dir); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Fatal(info, err)
	}
	// What a crash left under the temporary name has neither its content nor its mode in the new file.
	if err := os.WriteFile(filepath.Join(dir, "f.new"), []byte("a longer leftover"), 0o666); err != nil {
		t.Fatal(err)
	}
	for _, content := range []string{"one", "2"} {
		if err := durable.Replace(dir, "f", []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(filepath.Join(dir, "f")); err != nil || string(b) != content {
			t.Fatal(string(b), err)
		}
	}
	if info, err := os.Stat(filepath.Join(dir, "f")); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatal(info, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "f.new")); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal("the temporary file is still there")
	}
	if err := durable.Replace(filepath.Join(dir, "nope"), "f", nil, 0o600); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
}
