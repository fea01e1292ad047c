package exports

import (
	"errors"
	"testing"

	"github.com/google/uuid"

	"varve/control/state"
	"varve/volumedriver/backend/backendtest"
	"varve/volumedriver/cache"
	"varve/volumedriver/sco"
	"varve/volumedriver/vfs"
)

func TestReadCacheIsForRemoteBackends(t *testing.T) {
	opened := 0
	r := NewReadCache(func() (cache.Config, error) {
		opened++
		return cache.Config{FS: vfs.NewMem(1), Dir: "/cache", RAMBytes: 1 << 20, Bytes: 1 << 20}, nil
	}, silence)
	b := backendtest.NewMem()
	if got := r.Wrap(uuid.New(), state.Backend{Kind: state.BackendLocal}, b); got != b || opened != 0 {
		t.Error("a local backend is read through the cache")
	}
	if _, ok := r.Stats(); ok {
		t.Error("the cache is open before it is needed")
	}
	for range 2 {
		w := r.Wrap(uuid.New(), state.Backend{Kind: state.BackendS3}, backendtest.NewMem())
		if _, ok := w.(cache.Prefetcher); !ok || opened != 1 {
			t.Errorf("a remote backend is not read through the one cache, opened %d times", opened)
		}
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}
	if s, ok := r.Stats(); !ok || s.RAMBytes == 0 || s.DiskBytes == 0 {
		t.Errorf("%+v, %v", s, ok)
	}
	if err := errors.Join(r.Close(), r.Close()); err != nil {
		t.Error(err)
	}

	failing := NewReadCache(func() (cache.Config, error) { return cache.Config{}, errors.New("no disk") }, silence)
	if got := failing.Wrap(uuid.New(), state.Backend{Kind: state.BackendS3}, b); got != b {
		t.Error("without a cache the backend must be used as it is")
	}
	var none *ReadCache
	if got := none.Wrap(uuid.New(), state.Backend{Kind: state.BackendS3}, b); got != b || none.Close() != nil {
		t.Error("no cache does something")
	}
}

func TestNextSCO(t *testing.T) {
	id := uuid.New()
	if got, want := nextSCO(sco.Name(id, 3, 255, 2)), sco.Name(id, 3, 256, 0); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if got := nextSCO("r/" + id.String() + "/1"); got != "" {
		t.Errorf("a root is followed by %s", got)
	}
}
