//go:build e2e

package e2e

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"varve/test/harness"
	"varve/test/nbdclient"
)

// TestRebuildFromBackendAlone loses the log disk and the block map. `varve rebuild` then serves the volume as it stood
// after exactly some number of the operations that were asked for, in their order, and says how many came after.
func TestRebuildFromBackendAlone(t *testing.T) {
	n := harness.StartNode(t, "--sco-size", "1MiB", "--log-level", "warn")
	n.CreateDisk(t, "lost", "4GiB")
	c := dial(t, n.NBD("lost"))

	const blocks, spread = 3000, 300 // block i lies at i*spread
	type op struct {
		block int
		zero  bool
	}
	var ops []op
	r := rand.New(rand.NewPCG(5, 6))
	// One request at a time, so that their order is known.
	write := func(count int) {
		p := make([]byte, block)
		for range count {
			o := op{block: r.IntN(blocks), zero: r.IntN(12) == 0}
			ops = append(ops, o)
			off := int64(o.block) * spread * block
			if o.zero {
				must(t, c.Do(nbdclient.Trim, 0, off, block, nil))
				continue
			}
			fill(p, 9, uint64(o.block), uint64(len(ops)))
			must(t, c.Do(nbdclient.Write, 0, off, 0, p))
		}
	}
	write(12000)
	must(t, c.Do(nbdclient.Flush, 0, 0, 0, nil))
	// All of it reaches the backend, which the destager does by itself after a while; then some more is written.
	must(t, harness.Poll(90*time.Second, func() error { return pendingBelow(n, 1) }))
	safe := len(ops)
	write(500)
	must(t, c.Do(nbdclient.Flush, 0, 0, 0, nil))
	// The ledger beside the log disk is what tells afterwards how much was lost; it is written every few seconds.
	last := time.Now()
	must(t, harness.Poll(20*time.Second, func() error {
		fi, err := os.Stat(filepath.Join(n.Data, "ledger.json"))
		if err == nil && fi.ModTime().Before(last) {
			err = errors.New("the ledger does not know of the last writes")
		}
		return err
	}))
	n.Kill()
	for _, d := range []string{"log", "map"} {
		must(t, os.RemoveAll(filepath.Join(n.Data, d)))
	}
	table := n.MustCLI(t, "rebuild")
	must(t, n.Start())

	c = dial(t, n.NBD("lost"))
	found := make([]uint64, blocks)
	p, want := make([]byte, block), make([]byte, block)
	for i := range found {
		must(t, c.Do(nbdclient.Read, 0, int64(i)*spread*block, 0, p))
		seq := binary.LittleEndian.Uint64(p[16:])
		if fill(want, 9, uint64(i), seq); !bytes.Equal(p, want) {
			t.Fatalf("block %d holds %s", i, describe(p))
		}
		found[i] = seq
	}
	// Replay the operations until what is found is what stands.
	state, differ := make([]uint64, blocks), 0
	for _, f := range found {
		if f != 0 {
			differ++
		}
	}
	prefix := -1
	for k, o := range ops {
		seq := uint64(k + 1)
		if o.zero {
			seq = 0
		}
		before, after := state[o.block] != found[o.block], seq != found[o.block]
		state[o.block] = seq
		if before && !after {
			differ--
		} else if !before && after {
			differ++
		}
		if differ == 0 {
			prefix = k + 1
		}
	}
	if prefix < 0 {
		t.Fatalf("what is found equals no prefix of the %d operations", len(ops))
	}
	if prefix < safe {
		t.Fatalf("prefix of %d operations, but %d were on the backend", prefix, safe)
	}
	if lost := fmt.Sprintf("%d writes", len(ops)-prefix); !strings.Contains(table, lost) {
		t.Errorf("no %q in:\n%s", lost, table)
	}
	harness.Show("log and map deleted, varve rebuild: the volume stands at exactly %d of %d operations; %d were on the backend; lost %d",
		prefix, len(ops), safe, len(ops)-prefix)
	for line := range bytes.Lines([]byte(table)) {
		if !bytes.HasPrefix(line, []byte("time=")) { // the log goes to stderr
			harness.Show("  %s", bytes.TrimRight(line, "\n"))
		}
	}
	// It goes on from there.
	must(t, c.Do(nbdclient.Write, nbdclient.FUA, 0, 0, bytes.Repeat([]byte{7}, block)))
	must(t, c.Do(nbdclient.Read, 0, 0, 0, p))
	if p[0] != 7 {
		t.Fatal("a write after the rebuild is not read back")
	}
}
