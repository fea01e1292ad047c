package vfs

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/cockroachdb/pebble/v2"
)

type quiet struct{}

func (quiet) Infof(string, ...any)              {}
func (quiet) Errorf(string, ...any)             {}
func (quiet) Fatalf(format string, args ...any) { panic(fmt.Sprintf(format, args...)) }

func openPebble(fsys FS) (*pebble.DB, error) {
	return pebble.Open("db", &pebble.Options{
		FS:                          Pebble(fsys, "/data"),
		Logger:                      quiet{},
		MemTableSize:                64 << 10,
		L0CompactionThreshold:       2,
		DisableAutomaticCompactions: false,
	})
}

// version is the value of key k after the i-th batch.
func version(i uint64) []byte { return binary.BigEndian.AppendUint64(make([]byte, 500), i) }

// TestPebbleKeepsSyncedBatchesOverPowerCuts writes batches, cuts the power at many calls, and opens what is left.
func TestPebbleKeepsSyncedBatchesOverPowerCuts(t *testing.T) {
	m := NewMem(1)
	check(t, m.MkdirAll("/data", 0o700))
	check(t, m.SyncDir("/"))

	type cut struct {
		m      *Mem
		seq    int64
		synced uint64 // batches that were acknowledged before
	}
	var cuts []cut
	const keys, batches = 64, 600
	rnd := rand.New(rand.NewPCG(1, 2))
	var synced atomic.Uint64
	var mu sync.Mutex
	m.OnCall(func(c Call) {
		mu.Lock()
		defer mu.Unlock()
		if c.Seq < 60 || c.Seq%5 == 0 {
			cuts = append(cuts, cut{m.Crash(c.Seq, []float64{0, 0.2, 0.5, 0.8, 1}[rnd.IntN(5)]), c.Seq, synced.Load()})
		}
	})
	db, err := openPebble(m)
	check(t, err)
	for i := uint64(1); i <= batches; i++ {
		if i%200 == 0 { // a restart
			check(t, db.Close())
			db, err = openPebble(m)
			check(t, err)
		}
		b := db.NewBatch()
		check(t, b.Set([]byte("last"), binary.BigEndian.AppendUint64(nil, i), nil))
		check(t, b.Set(fmt.Appendf(nil, "key%d", i%keys), version(i), nil))
		opts := pebble.NoSync
		if i%4 == 0 {
			opts = pebble.Sync
		}
		check(t, b.Commit(opts))
		if i%4 == 0 {
			synced.Store(i)
		}
	}
	check(t, db.Close())
	m.OnCall(nil)

	for i, c := range cuts {
		// While what the cut left is opened, the power is cut once more.
		var again *Mem
		nth := int64(1 + rnd.IntN(8))
		c.m.OnCall(func(call Call) {
			if call.Seq == nth {
				again = c.m.Crash(int64(i), 0.5)
			}
		})
		where := fmt.Sprintf("cut %d at call %d", i, c.seq)
		checkBatches(t, where, c.m, c.synced, keys)
		if again != nil {
			checkBatches(t, where+" and again", again, c.synced, keys)
		}
	}
	if len(cuts) < 50 {
		t.Errorf("only %d cuts", len(cuts))
	}
	t.Logf("%d power cuts over %d calls", len(cuts), m.Calls())
}

// checkBatches opens the store and finds all synced batches, and no hole among the others.
func checkBatches(t *testing.T, where string, m *Mem, synced, keys uint64) {
	t.Helper()
	db, err := openPebble(m)
	if err != nil {
		t.Fatalf("%s: %v", where, err)
	}
	defer func() { check(t, db.Close()) }()
	v, closer, err := db.Get([]byte("last"))
	if err != nil {
		if synced > 0 {
			t.Fatalf("%s: %d batches were synced: %v", where, synced, err)
		}
		return
	}
	last := binary.BigEndian.Uint64(v)
	check(t, closer.Close())
	if last < synced {
		t.Fatalf("%s: batch %d is the last one, %d was synced", where, last, synced)
	}
	for k := max(last, keys) - keys + 1; k <= last; k++ {
		v, closer, err := db.Get(fmt.Appendf(nil, "key%d", k%keys))
		if err != nil || binary.BigEndian.Uint64(v[500:]) != k {
			t.Fatalf("%s: key of batch %d: %v", where, k, err)
		}
		check(t, closer.Close())
	}
}

func TestPebbleOnOS(t *testing.T) {
	root := t.TempDir()
	for i := range 3 {
		db, err := pebble.Open("db", &pebble.Options{FS: Pebble(OS(), root), Logger: quiet{}})
		check(t, err)
		if i > 0 {
			_, closer, err := db.Get([]byte{byte(i - 1)})
			check(t, err)
			check(t, closer.Close())
		}
		if _, err := pebble.Open("db", &pebble.Options{FS: Pebble(OS(), root), Logger: quiet{}}); err == nil {
			t.Error("the store could be opened twice")
		}
		check(t, db.Set([]byte{byte(i)}, nil, pebble.Sync))
		check(t, db.Flush())
		check(t, db.Close())
	}
}

// TestPebbleStopsAtFailedSync checks that a failed sync of the store's log ends in its Fatalf, not in an acknowledgement.
func TestPebbleStopsAtFailedSync(t *testing.T) {
	m := NewMem(1)
	check(t, m.MkdirAll("/data", 0o700))
	e := NewErrors(m)
	db, err := openPebble(e)
	check(t, err)
	check(t, db.Set([]byte("a"), nil, pebble.Sync))
	hit := e.Inject(Fault{Op: OpSync | OpDatasync, Path: "*.log", Err: syscall.EIO})
	defer func() {
		if recover() == nil || hit.Fired() == 0 {
			t.Error("a write was acknowledged though its sync failed")
		}
	}()
	check(t, db.Set([]byte("b"), nil, pebble.Sync))
}
