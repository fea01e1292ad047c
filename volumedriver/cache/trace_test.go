package cache

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver/backend"
	"varve/volumedriver/backend/backendtest"
)

// TestSecondCloneBootsFromTheCache records what a first clone reads and prefetches it in a node that has nothing cached.
func TestSecondCloneBootsFromTheCache(t *testing.T) {
	mem := &counting{Backend: backendtest.NewMem()}
	const objects, size = 8, 4 * mib
	var all [][]byte
	for i := range objects {
		all = append(all, put(t, mem, fmt.Sprintf("v/template/%d", i), size))
	}
	boot := func(b backend.Backend, r *Recorder) {
		rnd := rand.New(rand.NewPCG(3, 3)) // the same reads each time
		for range 400 {
			i := rnd.IntN(objects - 1)
			o, err := b.(Tracer).OpenTraced(t.Context(), fmt.Sprintf("v/template/%d", i), r)
			check(t, err)
			want(t, o, all[i], rnd.IntN(size/4)&^4095, 4096*(1+rnd.IntN(8)))
			check(t, o.Close())
		}
	}
	first := mustOpen(t, Config{RAMBytes: 64 * mib, Bytes: 64 * mib})
	b := first.Wrap(poolID, keepOpen{mem})
	r := NewRecorder(time.Minute)
	boot(b, r)
	r.Stop()
	trace := r.Trace()
	template := uuid.New()
	check(t, first.SaveTrace(template, trace))
	saved, err := first.LoadTrace(template)
	check(t, err)
	if !bytes.Equal(saved, trace) || len(trace) == 0 || len(trace) > 4096 {
		t.Fatalf("a trace of %d bytes is loaded with %d", len(trace), len(saved))
	}
	if none, err := first.LoadTrace(uuid.New()); none != nil || err != nil {
		t.Errorf("the trace of an unknown template: %v, %v", none, err)
	}
	before := first.Stats()
	boot(b, nil)
	settle(t, first)
	if after := first.Stats(); after.Fetches != before.Fetches {
		t.Errorf("the second clone fetched %d times", after.Fetches-before.Fetches)
	}
	check(t, b.Close())
	check(t, first.Close())

	other := mustOpen(t, Config{RAMBytes: 64 * mib})
	b = other.Wrap(poolID, keepOpen{mem})
	n, err := b.(Tracer).PrefetchTrace(t.Context(), saved)
	check(t, err)
	settle(t, other)
	before = other.Stats()
	boot(b, nil)
	after := other.Stats()
	misses, lines := after.Misses-before.Misses, after.RAMHits-before.RAMHits
	t.Logf("boot trace of %d bytes for %d KiB; then %d of %d lines hit", len(trace), n>>10, lines, lines+misses)
	if misses*20 > lines {
		t.Errorf("%d misses, %d hits after the prefetch", misses, lines)
	}
	check(t, b.Close())
	check(t, other.Close())
}

func FuzzTrace(f *testing.F) {
	r := NewRecorder(time.Hour)
	defer r.Stop()
	o := &object{name: "v/a/1", size: 5 * mib}
	o.trace(r.object("v/a/1", o.size), 100_000, 300_000)
	f.Add(r.Trace())
	f.Add([]byte("VTR1\x01\x01a\x01\x00\x01\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		runs, err := parseTrace(b)
		if err != nil {
			return
		}
		for _, r := range runs {
			if r.off < 0 || r.n < 0 || r.off+r.n > traceObjectBytes || backend.CheckName(r.name) != nil {
				t.Errorf("%+v", r)
			}
		}
	})
}
