package exports

import (
	"fmt"
	"log/slog"
	"sync"

	"github.com/google/uuid"

	"varve/control/state"
	"varve/volumedriver/backend"
	"varve/volumedriver/cache"
	"varve/volumedriver/sco"
)

// ReadCache is the node's read cache for vPools whose backend is not on a disk of this node, where the system's page cache does
// as well. It is opened, and takes its memory and its room on the disk, when the first such vPool comes.
type ReadCache struct {
	config func() (cache.Config, error)
	log    *slog.Logger

	mu     sync.Mutex // guards the rest
	opened bool
	c      *cache.Cache
}

// NewReadCache gives a cache that asks for its config when it is needed.
func NewReadCache(config func() (cache.Config, error), log *slog.Logger) *ReadCache {
	return &ReadCache{config: config, log: log}
}

// Wrap gives the vPool's backend, read through the cache if that is of use. A cache that cannot be had is told once and done without.
func (r *ReadCache) Wrap(pool uuid.UUID, spec state.Backend, b backend.Backend) backend.Backend {
	if r == nil || spec.Kind == state.BackendLocal {
		return b
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.opened {
		r.opened = true
		c, err := r.open()
		if err != nil {
			r.log.Error("no read cache: every read of a remote vPool goes to its backend", "err", err)
		}
		r.c = c
	}
	if r.c == nil {
		return b
	}
	return r.c.Wrap(pool, b)
}

func (r *ReadCache) open() (*cache.Cache, error) {
	cfg, err := r.config()
	if err != nil {
		return nil, fmt.Errorf("size of the read cache: %w", err)
	}
	if cfg.RAMBytes <= 0 && cfg.Bytes <= 0 {
		return nil, nil
	}
	cfg.Successor = nextSCO
	c, err := cache.Open(cfg)
	if err != nil {
		return nil, fmt.Errorf("open read cache: %w", err)
	}
	r.log.Info("read cache opened", "ram", cfg.RAMBytes, "disk", cfg.Bytes, "dir", cfg.Dir)
	return c, nil
}

// nextSCO names the SCO that was most likely made right after another, with what was written right after.
func nextSCO(name string) string {
	volume, epoch, seq, _, err := sco.ParseName(name)
	if err != nil {
		return ""
	}
	return sco.Name(volume, epoch, seq+1, 0)
}

// Stats tells of the cache, if it is open.
func (r *ReadCache) Stats() (cache.Stats, bool) {
	if r == nil {
		return cache.Stats{}, false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.c == nil {
		return cache.Stats{}, false
	}
	return r.c.Stats(), true
}

// Close closes the cache. The backends that it wrapped must be closed.
func (r *ReadCache) Close() error {
	if r == nil {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.c == nil {
		return nil
	}
	c := r.c
	r.c = nil
	if err := c.Close(); err != nil {
		return fmt.Errorf("close read cache: %w", err)
	}
	return nil
}
