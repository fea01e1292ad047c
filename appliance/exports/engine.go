package exports

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"varve/appliance/doctor"
	"varve/control/state"
	"varve/control/vdisk"
	"varve/control/vpool"
	"varve/volumedriver"
	"varve/volumedriver/backend"
	"varve/volumedriver/backend/s3"
	"varve/volumedriver/blockio"
	"varve/volumedriver/sco"
	"varve/volumedriver/seal"
)

// OpenBackend opens, and if need be makes, the store that a vPool's spec names. k are the credentials of a bucket.
type OpenBackend func(b state.Backend, k vpool.Keys) (backend.Backend, error)

// KeysOf gives the credentials of a vPool's bucket.
type KeysOf func(pool uuid.UUID) (vpool.Keys, error)

// Pools holds the opened backends of this process and gives them to the driver. It implements vpool.Engine.
//
// A backend that cannot be opened, or that does not hold the vPool's claim (its disk is not mounted), keeps nobody from
// starting: the vPool's writes go to the log and its state says why, and Run tries again until the backend is there.
// Run also takes over credentials that another node has changed.
type Pools struct {
	driver *volumedriver.Driver
	open   OpenBackend
	keys   KeysOf
	kek    func(pool uuid.UUID) ([]byte, error)
	cached *ReadCache
	log    *slog.Logger

	opening sync.Mutex // held while a backend is opened, claimed or given up; taken before mu
	mu      sync.Mutex // guards pools and away; not held over I/O
	pools   map[uuid.UUID]pool
	away    map[uuid.UUID]state.VPool
}

// pool is an open backend, as it is and as the driver uses it, with the credentials that it was given last.
type pool struct {
	vp    state.VPool
	store backend.Backend
	used  backend.Backend // store, or store behind the read cache
	keys  vpool.Keys
}

// rekeyed is a backend whose credentials can be changed while it is used.
type rekeyed interface{ SetCredentials(s3.Credentials) }

// prober is a backend that knows better than doctor.TryBackend what to try.
type prober interface {
	Probe(ctx context.Context) (s3.Verdict, error)
}

const (
	awayRetry  = 5 * time.Second
	openLimit  = 15 * time.Second // a vPool that is not there by then is away
	probeLimit = 50 * time.Second
	tryLimit   = 20 * time.Second
)

// NewPools wires the set, empty. Without a read cache backends are used as they are.
func NewPools(driver *volumedriver.Driver, open OpenBackend, keys KeysOf, cached *ReadCache, log *slog.Logger) *Pools {
	return &Pools{driver: driver, open: open, keys: keys, cached: cached, log: log, pools: make(map[uuid.UUID]pool), away: make(map[uuid.UUID]state.VPool)}
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
		away, open := slices.Collect(maps.Values(p.away)), slices.Collect(maps.Keys(p.pools))
		p.mu.Unlock()
		for _, vp := range away {
			if p.retry(ctx, vp) {
				p.log.Info("backend is back", "vpool", vp.Name)
			}
		}
		for _, id := range open {
			if err := errors.Join(p.KeysChanged(ctx, id), p.kekChanged(id)); err != nil {
				p.log.Warn("credentials of a vpool are not known", "vpool", id, "err", err)
			}
		}
	}
}

// retry opens a backend that was away, unless it is wanted no more.
func (p *Pools) retry(ctx context.Context, vp state.VPool) bool {
	p.opening.Lock()
	defer p.opening.Unlock()
	p.mu.Lock()
	_, wanted := p.away[vp.ID]
	p.mu.Unlock()
	return wanted && p.add(ctx, vp) == nil
}

// Backend implements Backends.
func (p *Pools) Backend(id uuid.UUID) (backend.Backend, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	b, ok := p.pools[id]
	return b.used, ok
}

// ProbeBackend implements vpool.Engine.
func (p *Pools) ProbeBackend(ctx context.Context, spec state.Backend, k vpool.Keys) (vpool.Probe, error) {
	ctx, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	b, err := p.open(spec, k)
	if err != nil {
		return vpool.Probe{}, err
	}
	out, err := probe(ctx, b)
	if cerr := b.Close(); err == nil {
		err = cerr
	}
	return out, err
}

// Probe tries the backend of a vPool that is open here, beside the work that it does.
func (p *Pools) Probe(ctx context.Context, id uuid.UUID) (vpool.Probe, error) {
	ctx, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	p.mu.Lock()
	b, ok := p.pools[id]
	away := p.away[id]
	p.mu.Unlock()
	if ok {
		return probe(ctx, b.store)
	}
	if away.ID == uuid.Nil {
		return vpool.Probe{}, fmt.Errorf("backend of vPool %s is another node's", id)
	}
	k, err := vpool.Keys{}, error(nil)
	if away.Backend.Kind == state.BackendS3 {
		if k, err = p.keys(id); err != nil {
			return vpool.Probe{}, fmt.Errorf("credentials of vPool %s: %w", away.Name, err)
		}
	}
	return p.ProbeBackend(ctx, away.Backend, k)
}

func probe(ctx context.Context, b backend.Backend) (vpool.Probe, error) {
	if s, ok := b.(prober); ok {
		v, err := s.Probe(ctx)
		if err != nil {
			return vpool.Probe{}, err
		}
		out := vpool.Probe{Unsafe: v.Unsafe}
		for _, check := range slices.Sorted(maps.Keys(v.Findings)) {
			out.Findings = append(out.Findings, state.Finding{Check: check, Found: v.Findings[check]})
		}
		return out, nil
	}
	if err := doctor.TryBackend(ctx, b); err != nil {
		return vpool.Probe{}, err
	}
	return vpool.Probe{Findings: []state.Finding{{Check: "create-only", Found: "refuses an existing name"}, {Check: "delete", Found: "gone"},
		{Check: "list after write", Found: "complete"}, {Check: "read back", Found: "equal"}}}, nil
}

// TryKeys implements vpool.Engine: credentials must show the vPool's claim, or that there is none.
func (p *Pools) TryKeys(ctx context.Context, vp state.VPool, k vpool.Keys) error {
	ctx, cancel := context.WithTimeout(ctx, tryLimit)
	defer cancel()
	b, err := p.open(vp.Backend, k)
	if err != nil {
		return err
	}
	_, err = b.List(ctx, "", "", 1)
	if cerr := b.Close(); err == nil {
		err = cerr
	}
	return err
}

// KeysChanged implements vpool.Engine. A backend that is away takes its credentials when it is opened.
func (p *Pools) KeysChanged(_ context.Context, id uuid.UUID) error {
	p.mu.Lock()
	have, ok := p.pools[id]
	p.mu.Unlock()
	s, can := have.store.(rekeyed)
	if !ok || !can {
		return nil
	}
	k, err := p.keys(id)
	if err != nil {
		return err
	}
	if k == have.keys {
		return nil
	}
	s.SetCredentials(s3.Credentials{AccessKey: k.Access, SecretKey: k.Secret})
	p.mu.Lock()
	defer p.mu.Unlock()
	if now, ok := p.pools[id]; ok && now.store == have.store {
		now.keys = k
		p.pools[id] = now
	}
	return nil
}

// AddPool implements vpool.Engine. A backend that is away is no error.
func (p *Pools) AddPool(ctx context.Context, vp state.VPool) error {
	p.opening.Lock()
	defer p.opening.Unlock()
	if _, ok := p.Backend(vp.ID); ok {
		return nil
	}
	if err := p.add(ctx, vp); err != nil {
		p.log.Error("backend is away: writes stay in the log", "vpool", vp.Name, "err", err)
		p.mu.Lock()
		p.away[vp.ID] = vp
		p.mu.Unlock()
	}
	return nil
}

// add opens a backend. opening is held.
func (p *Pools) add(ctx context.Context, vp state.VPool) error {
	ctx, cancel := context.WithTimeout(ctx, openLimit)
	defer cancel()
	b, k, err := p.openPool(vp)
	if err == nil {
		if err = p.driver.Claim(ctx, vp.ID, b); err != nil {
			err = errors.Join(err, b.Close())
		}
	}
	if err != nil {
		p.driver.PoolAway(vp.ID, err)
		return err
	}
	o, err := p.options(vp)
	if err != nil {
		p.driver.PoolAway(vp.ID, err)
		return errors.Join(err, b.Close())
	}
	p.driver.SetPoolOptions(vp.ID, o)
	used := p.cached.Wrap(vp.ID, vp.Backend, b)
	p.mu.Lock()
	delete(p.away, vp.ID)
	p.pools[vp.ID] = pool{vp, b, used, k}
	p.mu.Unlock()
	p.driver.AddPool(vp.ID, used)
	return nil
}

func (p *Pools) openPool(vp state.VPool) (b backend.Backend, k vpool.Keys, err error) {
	if vp.Backend.Kind == state.BackendS3 {
		if k, err = p.keys(vp.ID); err != nil {
			return nil, k, fmt.Errorf("credentials of vPool %s: %w", vp.Name, err)
		}
	}
	b, err = p.open(vp.Backend, k)
	return b, k, err
}

// options say how a vPool's objects are made.
func (p *Pools) options(vp state.VPool) (o volumedriver.PoolOptions, err error) {
	if vp.Compression != "" {
		if o.Codec, err = sco.ParseCodec(vp.Compression); err != nil {
			return o, fmt.Errorf("vPool %s: %w", vp.Name, err)
		}
	}
	if !vp.Encrypted {
		return o, nil
	}
	o.Encrypt = true
	if p.kek == nil {
		return o, fmt.Errorf("vPool %s is encrypted, and this process keeps no secrets", vp.Name)
	}
	secret, err := p.kek(vp.ID)
	if err != nil {
		return o, fmt.Errorf("key of vPool %s: %w", vp.Name, err)
	}
	defer clear(secret)
	for at := 0; at+seal.SecretBytes <= len(secret); at += seal.SecretBytes { // the one in force, then former ones
		k, err := seal.KEKFrom(secret[at : at+seal.SecretBytes])
		if err != nil {
			return o, fmt.Errorf("key of vPool %s: %w", vp.Name, err)
		}
		if o.KEK == nil {
			o.KEK = k
			continue
		}
		o.OldKEKs = append(o.OldKEKs, k)
	}
	return o, nil
}

// kekChanged has a vPool's keys wrapped by the key encryption key that is in force now.
func (p *Pools) kekChanged(id uuid.UUID) error {
	p.opening.Lock()
	defer p.opening.Unlock()
	p.mu.Lock()
	have, ok := p.pools[id]
	p.mu.Unlock()
	if !ok || !have.vp.Encrypted {
		return nil
	}
	o, err := p.options(have.vp)
	if err == nil {
		p.driver.SetPoolOptions(id, o)
	}
	return err
}

// Rekey implements vpool.Engine.
func (p *Pools) Rekey(ctx context.Context, id uuid.UUID, progress func(done, total int64)) error {
	if err := p.kekChanged(id); err != nil {
		return err
	}
	if _, ok := p.Backend(id); !ok {
		return fmt.Errorf("change the keys of vPool %s: its backend is away", id)
	}
	if err := p.driver.RewrapKeys(ctx, id); err != nil {
		return err
	}
	return p.driver.RotateKeys(ctx, id, progress)
}

// UseKEKs says where the key encryption keys of encrypted vPools come from: one after the other, the one in force first. It is called before any vPool is added.
func (p *Pools) UseKEKs(kek func(pool uuid.UUID) ([]byte, error)) { p.kek = kek }

// RemovePool implements vpool.Engine.
func (p *Pools) RemovePool(_ context.Context, id uuid.UUID) error {
	p.opening.Lock()
	defer p.opening.Unlock()
	p.mu.Lock()
	delete(p.away, id)
	b, ok := p.pools[id]
	delete(p.pools, id)
	p.mu.Unlock()
	if !ok {
		return nil
	}
	p.driver.RemovePool(id)
	return b.used.Close()
}

// Space implements vpool.Engine. Stored is what the last scrub has counted, 0 before the first one.
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
	s := vpool.Space{Total: int64(total), Free: int64(available)}
	if last, ok := p.driver.LastScrub(id); ok {
		s.Stored = last.HeldBytes
	}
	return s, true
}

// Close closes every backend. The driver must not use them any more.
func (p *Pools) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	for id, b := range p.pools {
		errs = append(errs, b.used.Close())
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
	return vdisk.Info{Size: i.Size, Used: i.Used, Pending: i.PendingBytes, Modified: modified, Open: open, Template: i.Template}, true
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
	return vdisk.Explanation{State: x.State, LBA: lba, Seq: x.Seq, Object: x.Object, Index: int(x.Index), CRC: x.CRC, Detail: x.Detail,
		Copies: x.Copies}, nil
}
