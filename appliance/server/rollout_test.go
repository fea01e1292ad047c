package server

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"varve/appliance/update"
	"varve/control/rollout"
)

// TestBundleBetweenNodes copies a bundle from one node's directory to another's in pieces, with a restart in between, and has the
// other's agent asked for it.
func TestBundleBetweenNodes(t *testing.T) {
	node := func() updates { return updates{&appliance{base: base{cfg: Config{Data: t.TempDir(), Version: "1.0"}}}} }
	from, to := node(), node()
	bundle := bytes.Repeat([]byte("0123456789"), rollout.PieceBytes/4)
	digest := sha256.Sum256(bundle)
	sum := hex.EncodeToString(digest[:])
	if err := os.MkdirAll(from.dir(), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(from.dir(), update.BundleName(sum)), bundle, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"", "../../etc/passwd", strings.Repeat("z", 64), strings.Repeat("/", 64)} {
		if _, err := from.Piece(bad, 0, 10); err == nil {
			t.Errorf("a piece of %q is handed out", bad)
		}
	}
	if _, err := from.Piece(sum, 0, rollout.PieceBytes+1); err == nil {
		t.Error("a piece may be of any size")
	}
	fetch := func(bytesMax int64, wrong bool) error {
		at, err := to.Have(sum)
		for err == nil && at < min(bytesMax, int64(len(bundle))) {
			n := int(min(rollout.PieceBytes, int64(len(bundle))-at))
			piece, e := from.Piece(sum, at, n)
			if e != nil || len(piece) != n {
				t.Fatal(len(piece), n, e)
			}
			if wrong {
				piece[0] ^= 1
			}
			err = to.Add(sum, at, piece, at+int64(n) == int64(len(bundle)))
			at += int64(n)
		}
		return err
	}
	if err := fetch(1<<40, true); err == nil {
		t.Fatal("a damaged bundle is taken")
	}
	if have, err := to.Have(sum); have != 0 || err != nil {
		t.Fatal("the damaged bundle stays", have, err)
	}
	if err := fetch(rollout.PieceBytes, false); err != nil {
		t.Fatal(err)
	}
	to = updates{&appliance{base: to.base}} // the process starts anew
	if have, err := to.Have(sum); have != rollout.PieceBytes || err != nil {
		t.Fatal(have, err)
	}
	if err := fetch(1<<40, false); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(to.dir(), update.BundleName(sum))); err != nil || !bytes.Equal(got, bundle) {
		t.Fatal("another bundle has arrived", err)
	}

	// Without an agent nothing is asked for; with one the request is there, once.
	if err := to.Request("id-1", sum); err == nil {
		t.Fatal("an appliance without slots takes an update")
	}
	if err := os.WriteFile(filepath.Join(to.dir(), "status.json"), []byte(`{"id":"","state":"","now":{"running":"a","version":"1.0","boot":{"slot":"a"},"slots":{}}}`), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := to.Request("id-1", sum); err != nil {
		t.Fatal(err)
	}
	if err := to.Request("id-2", sum); err == nil {
		t.Fatal("two updates at a time")
	}
	st, err := to.Status(t.Context())
	if err != nil || st.Request != "id-1" || !st.Busy || st.Version != "1.0" || st.Ready {
		t.Fatalf("%+v %v", st, err)
	}
	if r, pending, err := update.Asked(to.dir()); err != nil || !pending || r.Bundle != update.BundleName(sum) || !r.Reboot {
		t.Fatalf("%+v %v %v", r, pending, err)
	}
}
