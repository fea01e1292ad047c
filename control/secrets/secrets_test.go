package secrets

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"varve/control/enginetest"
	"varve/control/state"
)

const canary = "canary-4711-topsecret"

func open(t *testing.T, dir string, log *enginetest.Log) *Store {
	t.Helper()
	k, err := OpenKeys(dir)
	if err != nil {
		t.Fatal(err)
	}
	return New(log, log.Store, k)
}

func want(t *testing.T, s *Store, name, plain string) {
	t.Helper()
	if got, err := s.Get(name); err != nil || string(got) != plain {
		t.Errorf("secret %s: %q %v", name, got, err)
	}
}

func TestSecretsSurviveARestartAndAreNowhereInClear(t *testing.T) {
	dir, log := t.TempDir(), enginetest.NewLog()
	s := open(t, dir, log)
	if err := s.Set(t.Context(), "vpool/x/s3", []byte(canary)); err != nil {
		t.Fatal(err)
	}
	if err := s.Set(t.Context(), "empty", nil); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir, log)
	want(t, s, "vpool/x/s3", canary)
	want(t, s, "empty", "")
	snap, err := log.Store.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if _, err := snap.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	row, err := log.Store.View().Secret("vpool/x/s3")
	if err != nil {
		t.Fatal(err)
	}
	for what, text := range map[string]string{"snapshot": b.String(), "row": fmt.Sprintf("%+v %q", row, row.Sealed), "keys": fmt.Sprintf("%v", s.keys.current)} {
		if strings.Contains(text, canary) || strings.Contains(text, string(s.keys.current.secret)) {
			t.Errorf("the secret or its key is in the %s", what)
		}
	}
	if info, err := os.Stat(filepath.Join(dir, fileName)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("key file: %v %v", info.Mode(), err)
	}
	if err := s.Delete(t.Context(), "empty"); err != nil {
		t.Error(err)
	}
	if err := s.Delete(t.Context(), "empty"); err != nil {
		t.Error(err)
	}
	if _, err := s.Get("empty"); !errors.Is(err, state.ErrNotFound) {
		t.Error(err)
	}
}

func TestWhatIsDamagedOrMovedDoesNotOpen(t *testing.T) {
	dir, log := t.TempDir(), enginetest.NewLog()
	s := open(t, dir, log)
	if err := s.Set(t.Context(), "a", []byte(canary)); err != nil {
		t.Fatal(err)
	}
	row, err := log.Store.View().Secret("a")
	if err != nil {
		t.Fatal(err)
	}
	for i := range row.Sealed {
		bad := row
		bad.Sealed = bytes.Clone(row.Sealed)
		bad.Sealed[i] ^= 1
		if _, err := s.keys.open(bad); !errors.Is(err, ErrSealed) {
			t.Errorf("byte %d changed: %v", i, err)
		}
		bad.Sealed = row.Sealed[:i]
		if _, err := s.keys.open(bad); !errors.Is(err, ErrSealed) {
			t.Errorf("cut after %d: %v", i, err)
		}
	}
	moved := row
	moved.Name = "b"
	if _, err := s.keys.open(moved); !errors.Is(err, ErrSealed) {
		t.Errorf("under another name: %v", err)
	}
	other := open(t, t.TempDir(), log)
	_, err = other.Get("a")
	if e, ok := errors.AsType[*state.Error](err); !ok || !errors.Is(err, ErrSealed) || e.Remedy == "" {
		t.Errorf("with another key: %v", err)
	}
	bundle, err := s.keys.Bundle()
	if err != nil {
		t.Fatal(err)
	}
	if err := other.keys.Add(bundle); err != nil {
		t.Fatal(err)
	}
	want(t, other, "a", canary)
	if other.keys.current.id != s.keys.current.id {
		t.Error("a node that was given the cluster's keys seals by another")
	}
}

func TestKeyFileOfOthersIsRefused(t *testing.T) {
	dir := t.TempDir()
	open(t, dir, enginetest.NewLog())
	path := filepath.Join(dir, fileName)
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenKeys(dir); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Error(err)
	}
	for _, text := range []string{"", "{}", `{"current":"x","keys":["AAAA"]}`, strings.Repeat("x", fileBytesMax+1)} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenKeys(dir); err == nil {
			t.Errorf("key file %.20q is taken", text)
		}
	}
}

func TestRotation(t *testing.T) {
	dir, log := t.TempDir(), enginetest.NewLog()
	s := open(t, dir, log)
	for i := range 20 {
		if err := s.Set(t.Context(), fmt.Sprintf("s/%d", i), []byte(fmt.Sprint("plain", i))); err != nil {
			t.Fatal(err)
		}
	}
	first := s.keys.current.id
	late := s.Seal("late", []byte("sealed before the rotation"))
	if n, err := s.Rotate(t.Context()); err != nil || n != 20 {
		t.Fatalf("%d sealed anew, %v", n, err)
	}
	if _, err := log.Apply(t.Context(), late); err != nil {
		t.Fatal(err)
	}
	for _, store := range []*Store{s, open(t, dir, log)} {
		want(t, store, "late", "sealed before the rotation")
		for i := range 20 {
			want(t, store, fmt.Sprintf("s/%d", i), fmt.Sprint("plain", i))
		}
	}
	// Cut in the middle: the key is there, not all secrets are sealed by it.
	log.Fail(errors.New("no quorum"))
	if _, err := s.Rotate(t.Context()); err == nil {
		t.Error("a rotation without a quorum succeeded")
	}
	log.Fail(nil)
	s = open(t, dir, log)
	if n, err := s.Rotate(t.Context()); err != nil || n != 21 {
		t.Fatalf("%d sealed anew, %v", n, err)
	}
	if _, err := s.Rotate(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s.keys.all[first] != nil || len(s.keys.all) != 2 {
		t.Errorf("%d keys are left", len(s.keys.all))
	}
	s = open(t, dir, log)
	want(t, s, "s/7", "plain7")
	want(t, s, "late", "sealed before the rotation")
}
