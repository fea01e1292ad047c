package volumedriver

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"varve/volumedriver/backend"
	"varve/volumedriver/backend/backendtest"
	"varve/volumedriver/vfs"
)

// cachedPuts counts the SCOs that are put, and those of them that are to stay in the page cache.
type cachedPuts struct {
	backend.Backend
	all, cached atomic.Int64
}

func (c *cachedPuts) Put(ctx context.Context, name string, parts ...[]byte) error {
	if strings.HasPrefix(name, "v/") {
		c.all.Add(1)
		if backend.Cached(ctx) {
			c.cached.Add(1)
		}
	}
	return c.Backend.Put(ctx, name, parts...)
}

// TestDestageInPauseStaysCached: what is destaged while the volume is written goes past the page cache; what is destaged in a pause
// stays in it, since it was written last and came from there.
func TestDestageInPauseStaysCached(t *testing.T) {
	store := &cachedPuts{Backend: backendtest.NewMem()}
	d := startOn(t, vfs.NewMem(1), lazy, store, time.Second)
	v := create(t, d, testVolume, 64*blockSize)
	for i, last := range []time.Duration{time.Hour, -cachedIdle} { // of the last write, from now
		must(t, v.Write(t.Context(), fill(4, uint64(i+1)), 0, 0))
		v.mu.Lock()
		v.destage.last = d.now().Add(last).UnixNano()
		v.mu.Unlock()
		all, cached := store.all.Load(), store.cached.Load()
		must(t, d.Drain(t.Context()))
		all, cached = store.all.Load()-all, store.cached.Load()-cached
		if want := all * int64(i); all == 0 || cached != want {
			t.Errorf("last write %s from now: %d SCOs put, %d of them cached, want %d", last, all, cached, want)
		}
	}
}
