package cli

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"

	"varve/appliance/firstboot"
)

// An appliance that is to join waits for a cluster that does not answer, says so, and keeps its token; what is no token is forgotten.
func TestBootJoinWaits(t *testing.T) {
	vars := map[string]string{"VARVE_ROOT": t.TempDir()}
	paths := firstboot.SystemPaths(func(k string) string { return vars[k] })
	if err := os.MkdirAll(paths.State, 0o700); err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(map[string]any{"a": []string{"127.0.0.1:1"}, "h": make([]byte, 32), "s": make([]byte, 32)})
	if err != nil {
		t.Fatal(err)
	}
	pending := func() string {
		t.Helper()
		text, err := firstboot.Pending(paths, firstboot.JoinToken)
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	if err := firstboot.Ask(paths, firstboot.JoinToken, "varve_join_"+base64.RawURLEncoding.EncodeToString(b)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan ran, 1)
	data := t.TempDir()
	go func() { ended <- varve(ctx, vars, "--data", data, "firstboot", "join") }()
	for end := time.Now().Add(time.Minute); firstboot.IsJoining(paths) == ""; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the screen is not told")
		}
	}
	select {
	case r := <-ended:
		t.Fatalf("it does not wait: %+v", r)
	case <-time.After(500 * time.Millisecond):
	}
	cancel()
	if r := <-ended; r.code == ExitDone || pending() == "" || firstboot.IsJoining(paths) != "" {
		t.Errorf("stopped while it waited: %+v, token kept %t, joining %q", r, pending() != "", firstboot.IsJoining(paths))
	}

	if err := firstboot.Ask(paths, firstboot.JoinToken, "varve_join_"+strings.Repeat("x", 40)); err != nil {
		t.Fatal(err)
	}
	if r := varve(t.Context(), vars, "--data", data, "firstboot", "join"); r.code == ExitDone || pending() != "" {
		t.Errorf("what is no token: %+v, kept %t", r, pending() != "")
	}
}
