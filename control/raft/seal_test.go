package raft

import (
	"fmt"
	"testing"

	"github.com/hashicorp/raft"
	wal "github.com/hashicorp/raft-wal"
	"github.com/hashicorp/raft-wal/metadb"
)

// A log whose end was cut off reads back after a restart, cut once or again and again.
func TestTruncatedLogReadsBack(t *testing.T) {
	t.Parallel()
	for _, cuts := range [][]uint64{{6}, {2}, {6, 4}, {9, 8, 7}, {1}} {
		dir := t.TempDir()
		open := func() (*wal.WAL, *metadb.BoltMetaDB) {
			meta := &metadb.BoltMetaDB{}
			log, err := wal.Open(dir, wal.WithSegmentSize(1<<20), wal.WithMetaStore(newSealing(meta, dir)))
			must(t, err)
			return log, meta
		}
		log, meta := open()
		want := make(map[uint64]string)
		put := func(from uint64, what string) {
			var list []*raft.Log
			for i := from; i <= 10; i++ {
				want[i] = fmt.Sprintf("%s %d %0*d", what, i, 100*int(i), 0)
				list = append(list, &raft.Log{Index: i, Term: 1, Data: []byte(want[i])})
			}
			must(t, log.StoreLogs(list))
		}
		check := func(when string) {
			t.Helper()
			for i, data := range want {
				var l raft.Log
				if err := log.GetLog(i, &l); err != nil || string(l.Data) != data {
					t.Fatalf("cuts %v, %s: entry %d: %.20q, %v", cuts, when, i, l.Data, err)
				}
			}
		}
		put(1, "first")
		for _, at := range cuts {
			must(t, log.DeleteRange(at, 10))
			put(at, fmt.Sprint("after the cut at ", at))
			check("running")
		}
		for range 2 {
			must(t, log.Close())
			must(t, meta.Close())
			log, meta = open()
			check("restarted")
		}
		put2 := &raft.Log{Index: 11, Term: 2, Data: []byte("more")}
		must(t, log.StoreLogs([]*raft.Log{put2}))
		want[11] = "more"
		must(t, log.Close())
		must(t, meta.Close())
		log, meta = open()
		check("restarted again")
		must(t, log.Close())
		must(t, meta.Close())
	}
}
