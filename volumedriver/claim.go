package volumedriver

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/uuid"

	"varve/volumedriver/backend"
)

// ErrStrangeBackend: the store does not hold the vPool that was expected there.
var ErrStrangeBackend = errors.New("backend does not hold this vPool: is its disk mounted?")

func claimName(pool uuid.UUID) string { return "pool/" + pool.String() }

// Claim makes sure that a store is the vPool's: it must hold the object that the first claim puts there. Without it a
// store whose disk is not mounted would look like an empty one, and objects would go to the wrong disk. A new claim is
// made only while this node has nothing of the vPool on any backend.
func (d *Driver) Claim(ctx context.Context, pool uuid.UUID, store backend.Backend) error {
	name := claimName(pool)
	if _, err := store.Stat(ctx, name); err == nil || !errors.Is(err, backend.ErrNotExist) {
		return err
	}
	if d.hasBacked(pool) {
		return fmt.Errorf("vPool %s: no object %s: %w", pool, name, ErrStrangeBackend)
	}
	if err := store.Put(ctx, name, pool[:]); err != nil && !errors.Is(err, backend.ErrExist) {
		return fmt.Errorf("claim the backend of vPool %s: %w", pool, err)
	}
	return nil
}

// hasBacked says whether any volume of the vPool has objects on its backend.
func (d *Driver) hasBacked(pool uuid.UUID) bool {
	d.mu.RLock()
	defer d.mu.RUnlock()
	for _, r := range d.roots {
		if r.Pool == pool && (r.Backed > 0 || r.Name.Put) {
			return true
		}
	}
	for _, v := range d.volumes {
		v.mu.RLock()
		has := v.root.Pool == pool && (v.root.Backed > 0 || v.root.Name.Put)
		v.mu.RUnlock()
		if has {
			return true
		}
	}
	return false
}

// PoolAway notes why the vPool's backend cannot be used, for PoolHealth.
func (d *Driver) PoolAway(pool uuid.UUID, err error) { d.health.bad(pool, err, d.now()) }
