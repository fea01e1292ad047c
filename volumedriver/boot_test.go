package volumedriver

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver/backend"
	"varve/volumedriver/backend/backendtest"
	"varve/volumedriver/cache"
	"varve/volumedriver/vfs"
)

// TestBootTrace: what the first clone of a snapshot reads in its first minute is in the cache when the next one is made; what it did not read
// is not. explain says where copies are.
func TestBootTrace(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	c, err := cache.Open(cache.Config{RAMBytes: 64 << 20})
	must(t, err)
	store := c.Wrap(testPool, backendtest.NewMem())
	t.Cleanup(func() { must(t, c.Close()) })
	t.Cleanup(func() { must(t, store.Close()) })
	d := startOn(t, vfs.NewMem(1), eager, store, 10*time.Second)
	const size = 8 << 20
	v := create(t, d, testVolume, size)
	for off := int64(0); off < size; off += 1 << 20 {
		must(t, v.Write(ctx, fill(256, uint64(off>>20)+1), off, 0))
	}
	s, err := v.Snapshot(ctx, SnapshotSpec{ID: snapFirst, Name: "golden"})
	must(t, err)
	must(t, d.Drain(ctx))
	cold := func() { // as if another cache had come
		must(t, c.Close())
		c, err = cache.Open(cache.Config{RAMBytes: 64 << 20})
		must(t, err)
		store = c.Wrap(testPool, store.(interface{ Unwrap() backend.Backend }).Unwrap())
		d.AddPool(testPool, store)
		d.objects.forget(nil)
	}
	clone := func() *Volume {
		v, err := d.Clone(ctx, testVolume, s.ID, Spec{ID: uuid.New(), Pool: testPool, Epoch: 1})
		must(t, err)
		return v
	}
	cold()
	first := clone()
	boot := []int64{0, 64 << 10, 3 << 20, 7<<20 + 128<<10}
	p := make([]byte, 16<<10)
	for _, off := range boot {
		must(t, first.Read(ctx, p, off))
	}
	b := first.boot.Load()
	if b == nil {
		t.Fatal("the first clone's boot is not recorded")
	}
	b.mu.Lock()
	b.until = d.now().Add(-time.Second)
	b.mu.Unlock()
	must(t, first.Read(ctx, p, 5<<20+128<<10)) // a minute later
	if first.boot.Load() != nil {
		t.Fatal("it is still recorded after its time")
	}
	cold()
	second := clone()
	if second.boot.Load() != nil {
		t.Fatal("the second clone's boot is recorded again")
	}
	held := func(off int64) []string {
		x, err := second.Explain(ctx, uint64(off)/blockSize)
		must(t, err)
		return x.Copies
	}
	for _, off := range boot {
		for !slices.Contains(held(off), "cache RAM") {
			if ctx.Err() != nil {
				t.Fatalf("block at %d was not fetched: %v", off, held(off))
			}
			time.Sleep(time.Millisecond)
		}
	}
	if got := held(5<<20 + 128<<10); slices.Contains(got, "cache RAM") || !slices.Contains(got, "backend") {
		t.Errorf("what was read after the boot is at %v", got)
	}
	must(t, second.Write(ctx, fill(1, 99), 0, 0))
	if got := held(0); !slices.Equal(got, []string{"write log"}) && !slices.Contains(got, "backend") {
		t.Errorf("what was written just now is at %v", got)
	}
	must(t, d.Delete(ctx, first.ID()))
	must(t, d.Delete(ctx, second.ID()))
	must(t, v.DeleteSnapshot(ctx, s.ID))
	if _, err := d.maps.Get(traceKey(s.ID)); err == nil {
		t.Error("the trace outlives its snapshot")
	}
	fmt.Printf("» boot trace: %d reads of one clone, in the cache when the next is made\n", len(boot))
}
