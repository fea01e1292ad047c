package exports

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/google/uuid"

	"varve/appliance/doctor"
	"varve/control/state"
	"varve/control/vdisk"
	"varve/control/vpool"
	"varve/volumedriver"
	"varve/volumedriver/backend"
	"varve/volumedriver/blockio"
)

// OpenBackend opens, and if need be makes, the store that a vPool's spec names.
type OpenBackend func(b state.Backend) (backend.Backend, error)

// Pools holds the opened backends of this process and gives them to the driver. It implements vpool.Engine.
//
// A backend that cannot be opened, or that does not hold the vPool's claim (its disk is not mounted), keeps nobody from
// starting: the vPool's writes go to the log and its state says why, and Run tries again until the backend is there.
type Pools struct {
	driver *volumedriver.Driver
	open   OpenBackend
	cached *ReadCache
	log    *slog.Logger

	mu    sync.Mutex // guards pools and away
	pools map[uuid.UUID]backend.Backend
	away  map[uuid.UUID]state.VPool
}

const awayRetry = 5 * time.Second

// NewPools wires the set, empty. Without a read cache backends are used as they are.
func NewPools(driver *volumedriver.Driver, open OpenBackend, cached *ReadCache, log *slog.Logger) *Pools {
	return &Pools{driver: driver, open: open, cached: cached, log: log, pools: make(map[uuid.UUID]backend.Backend), away: make(map[uuid.UUID]state.VPool)}
}

// Run opens, as soon as they are there, the backends that were away, until ctx ends.
func (p *Pools) Run(ctx context.Context) error {
	t := time.NewTicker(awayRetry)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		p.mu.Lock()
		for _, pool := range p.away {
			if p.addLocked(ctx, pool) == nil {
				p.log.Info("backend is back", "vpool", pool.Name)
			}
		}
		p.mu.Unlock()
	}
}

// Backend implements Backends.
func (p *Pools) Backend(pool uuid.UUID) (backend.Backend, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	b, ok := p.pools[pool]
	return b, ok
}

// ProbeBackend implements vpool.Engine.
func (p *Pools) ProbeBackend(ctx context.Context, spec state.Backend) (map[string]string, error) {
	b, err := p.open(spec)
	if err != nil {
		return nil, err
	}
	err = doctor.TryBackend(ctx, b)
	if err := errors.Join(err, b.Close()); err != nil {
		return nil, err
	}
	return map[string]string{"create-only": "refuses an existing name", "read back": "equal", "list after write": "complete",
		"delete": "gone"}, nil
}

// AddPool implements vpool.Engine. A backend that is away is no error.
func (p *Pools) AddPool(ctx context.Context, pool state.VPool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, ok := p.pools[pool.ID]; ok {
		return nil
	}
	if err := p.addLocked(ctx, pool); err != nil {
		p.log.Error("backend is away: writes stay in the log", "vpool", pool.Name, "err", err)
		p.away[pool.ID] = pool
	}
	return nil
}

func (p *Pools) addLocked(ctx context.Context, pool state.VPool) error {
	b, err := p.open(pool.Backend)
	if err == nil {
		if err = p.driver.Claim(ctx, pool.ID, b); err != nil {
			err = errors.Join(err, b.Close())
		}
	}
	if err != nil {
		p.driver.PoolAway(pool.ID, err)
		return err
	}
	b = p.cached.Wrap(pool.ID, pool.Backend, b)
	delete(p.away, pool.ID)
	p.pools[pool.ID] = b
	p.driver.AddPool(pool.ID, b)
	return nil
}

// RemovePool implements vpool.Engine.
func (p *Pools) RemovePool(_ context.Context, id uuid.UUID) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.away, id)
	b, ok := p.pools[id]
	if !ok {
		return nil
	}
	delete(p.pools, id)
	p.driver.RemovePool(id)
	return b.Close()
}

// Space implements vpool.Engine. Stored is not known: it would take a walk through the whole backend.
func (p *Pools) Space(id uuid.UUID) (vpool.Space, bool) {
	b, ok := p.Backend(id)
	if !ok {
		return vpool.Space{}, false
	}
	total, available, err := b.Space(context.Background())
	if err != nil {
		p.log.Warn("space of a backend is not known", "vpool", id, "err", err)
		return vpool.Space{}, false
	}
	return vpool.Space{Total: int64(total), Free: int64(available)}, true
}

// Close closes every backend. The driver must not use them any more.
func (p *Pools) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	for id, b := range p.pools {
		errs = append(errs, b.Close())
		delete(p.pools, id)
	}
	return errors.Join(errs...)
}

// Engine is the volume driver as control's vDisk controller sees it.
type Engine struct {
	store   *state.Store
	volumes *Volumes
}

// NewEngine wires it.
func NewEngine(store *state.Store, volumes *Volumes) *Engine {
	return &Engine{store: store, volumes: volumes}
}

// Info implements vdisk.Engine.
func (e *Engine) Info(id uuid.UUID) (vdisk.Info, bool) {
	i, ok := e.volumes.Info(id)
	if !ok {
		return vdisk.Info{}, false
	}
	_, open := e.volumes.opened(id)
	modified := i.ModTime
	if i.Accepted == 0 { // nothing was written: the engine's time is that of the first opening
		view := e.store.View()
		if vol, err := view.Volume(id); err == nil {
			if n, err := view.Inode(vol.FSID, vol.Ino); err == nil {
				modified = time.Unix(0, int64(n.Mtime))
			}
		}
	}
	return vdisk.Info{Size: i.Size, Used: i.Used, Pending: i.PendingBytes, Modified: modified, Open: open}, true
}

// Resize implements vdisk.Engine.
func (e *Engine) Resize(ctx context.Context, vol state.Volume, size int64) error {
	v, release, err := e.volumes.Open(ctx, vol.ID)
	if err != nil {
		return err
	}
	defer release()
	if err := v.Resize(ctx, size); err != nil {
		return err
	}
	return v.Flush(ctx)
}

// Renamed implements vdisk.Engine.
func (e *Engine) Renamed(ctx context.Context, vol state.Volume, _, _ string) error {
	return e.volumes.Renamed(ctx, []state.Volume{vol})
}

// Delete implements vdisk.Engine.
func (e *Engine) Delete(ctx context.Context, d state.Doomed) error {
	return e.volumes.Delete(ctx, d.ID)
}

// Clients implements vdisk.Engine.
func (e *Engine) Clients(id uuid.UUID) int { return e.volumes.Users(id) }

// Explain implements vdisk.Engine.
func (e *Engine) Explain(ctx context.Context, vol state.Volume, offset int64) (vdisk.Explanation, error) {
	v, release, err := e.volumes.Open(ctx, vol.ID)
	if err != nil {
		return vdisk.Explanation{}, err
	}
	defer release()
	lba := uint64(offset / blockio.BlockSize)
	x, err := v.Explain(ctx, lba)
	if err != nil {
		return vdisk.Explanation{}, fmt.Errorf("block %d: %w", lba, err)
	}
	return vdisk.Explanation{State: x.State, LBA: lba, Seq: x.Seq, Object: x.Object, Index: int(x.Index), CRC: x.CRC, Detail: x.Detail}, nil
}
