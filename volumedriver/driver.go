package volumedriver

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"varve/volumedriver/backend"
	"varve/volumedriver/blockio"
	"varve/volumedriver/blockmap"
	"varve/volumedriver/sco"
	"varve/volumedriver/vfs"
	"varve/volumedriver/writelog"
)

// ErrUnknownVolume: this node has no volume of that identity.
var ErrUnknownVolume = errors.New("unknown volume")

// Config is what a Driver needs. Zero sizes get the defaults named.
type Config struct {
	FS   vfs.FS
	Dir  string // log/ and map/ are made in it
	Log  *slog.Logger
	Now  func() time.Time
	Boot func() (string, error) // identity of this boot of the machine, for the write verifier; nil: the kernel's

	LogBytes       int64 // 4 GiB
	SegmentBytes   int64 // 64 MiB
	BatchBytes     int   // 4 MiB
	MapBudgetBytes int64 // 256 MiB
	SCOBytes       int64 // 16 MiB, the largest too
	NoPrewrite     bool  // do not write log segments ahead: tests
	// Ledger is a file, best on another disk than Dir, in which the driver notes every few seconds how far each volume's
	// log was, so that a rebuild can say how much was lost with the log. Empty: none.
	Ledger string

	// CheckpointBytes and CheckpointEvery bound what recovery replays: 256 MiB, 30 s.
	CheckpointBytes int64
	CheckpointEvery time.Duration
	// DrainDeadline is how long a write waits for a full log that does not drain: 20 s.
	DrainDeadline time.Duration

	// ScrubEvery is how often the scrub looks whether there is something to reclaim: 10 min, negative: never by itself. It
	// reclaims until a volume's objects hold ScrubTarget times what is live: 1.35; moves up to ScrubBytesPerSecond: 64 MiB, no
	// limit if negative; and deletes what it has replaced after ScrubGrace: 10 min.
	ScrubEvery          time.Duration
	ScrubTarget         float64
	ScrubBytesPerSecond int64
	ScrubGrace          time.Duration

	// RewindEvery is how often the driver looks whether a rewind window needs another base: 5 s, negative: never by itself.
	RewindEvery time.Duration

	Metrics prometheus.Registerer // may be nil

	sealAge, sealAnyAge time.Duration
	retryMax            time.Duration
}

// segmentBytesMin: a batch is at most a quarter of a segment, and holds at least one record.
const segmentBytesMin = 4 * recordBlocksMax * blockSize

func (c Config) withDefaults() Config {
	def := func(p *int64, v int64) {
		if *p == 0 {
			*p = v
		}
	}
	dur := func(p *time.Duration, v time.Duration) {
		if *p == 0 {
			*p = v
		}
	}
	def(&c.LogBytes, 4<<30)
	def(&c.SegmentBytes, 64<<20)
	def(&c.MapBudgetBytes, 256<<20)
	def(&c.SCOBytes, sco.MaxBlocks*blockSize)
	def(&c.CheckpointBytes, 256<<20)
	dur(&c.CheckpointEvery, 30*time.Second)
	dur(&c.DrainDeadline, 20*time.Second)
	dur(&c.ScrubEvery, 10*time.Minute)
	dur(&c.ScrubGrace, 10*time.Minute)
	dur(&c.RewindEvery, 5*time.Second)
	def(&c.ScrubBytesPerSecond, 64<<20)
	if c.ScrubTarget == 0 {
		c.ScrubTarget = 1.35
	}
	dur(&c.sealAge, sealAge)
	dur(&c.sealAnyAge, sealAnyAge)
	dur(&c.retryMax, 10*time.Second)
	c.SCOBytes = max(recordBlocksMax*blockSize, min(c.SCOBytes, sco.MaxBlocks*blockSize)) // a record is never split
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// Driver is the volume driver of one node: one write log, one map store, any number of vPools and volumes.
type Driver struct {
	cfg      Config
	log      *slog.Logger
	now      func() time.Time
	wal      *writelog.Log
	maps     *blockmap.Store
	objects  *objectCache
	blocks   *blockBuffers
	metrics  *metrics
	pace     *pace
	health   health
	waiters  atomic.Int64 // in Volume.waitLogged, of all volumes
	draining atomic.Int32

	destager     *destager
	checkpointer *checkpointer
	scrubber     *scrubber
	rewinder     *rewinder
	boots        *boots
	floor        floor // guarded by checkpointer.one

	mu      sync.RWMutex
	pools   map[uuid.UUID]backend.Backend
	roots   map[uuid.UUID]root    // volumes that are not open
	volumes map[uuid.UUID]*Volume // open
	doomed  map[uuid.UUID]doomed
	closed  bool

	keyrings keyrings
	gates    poolGates
	children map[uuid.UUID]int // volumes whose map hangs on a snapshot; guarded by mu
	owned    ownerships        // guarded by mu
	owners   owners

	promoting sync.Mutex // one promotion, or decision that a volume becomes a husk, at a time; before Volume.snapping
	sweeping  sync.Mutex // one sweep at a time
}

// Open recovers the node's volumes from the log and the map. It needs no backend, and starts nothing but what the log needs.
func Open(cfg Config) (*Driver, error) {
	cfg = cfg.withDefaults()
	if cfg.SegmentBytes < segmentBytesMin {
		return nil, fmt.Errorf("log segments of %d bytes: at least %d, so that a record fits a batch", cfg.SegmentBytes, segmentBytesMin)
	}
	d := &Driver{cfg: cfg, log: cfg.Log, now: cfg.Now, objects: newObjectCache(), blocks: newBlockBuffers(), children: make(map[uuid.UUID]int),
		pools: make(map[uuid.UUID]backend.Backend), roots: make(map[uuid.UUID]root), volumes: make(map[uuid.UUID]*Volume),
		doomed: make(map[uuid.UUID]doomed)}
	d.metrics = newMetrics(d, cfg.Metrics)
	d.destager = newDestager(d)
	d.checkpointer = newCheckpointer(d)
	d.scrubber = newScrubber(d)
	d.rewinder = &rewinder{d: d}
	d.boots = newBoots(d)
	d.pace = newPace(d)
	if err := cfg.FS.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make %s: %w", cfg.Dir, err)
	}
	maps, err := blockmap.Open(blockmap.Config{FS: cfg.FS, Dir: path.Join(cfg.Dir, "map"), BudgetBytes: cfg.MapBudgetBytes, Log: cfg.Log})
	if err != nil {
		return nil, fmt.Errorf("open map: %w", err)
	}
	d.maps = maps
	if err := d.openFloor(); err != nil {
		return nil, errors.Join(err, d.floor.close(), maps.Close())
	}
	if err := d.loadRoots(); err != nil {
		return nil, errors.Join(err, d.floor.close(), maps.Close())
	}
	wal, err := writelog.Open(writelog.Config{FS: cfg.FS, Dir: path.Join(cfg.Dir, "log"), SegmentBytes: cfg.SegmentBytes,
		Segments: int(cfg.LogBytes / cfg.SegmentBytes), BatchBytes: cfg.BatchBytes, Log: cfg.Log, Now: cfg.Now, NoPrewrite: cfg.NoPrewrite}, d.replay)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open write log: %w", err), d.floor.close(), maps.Close())
	}
	d.wal = wal
	for _, v := range d.volumes {
		v.applyLimits()
		d.destager.add(v)
	}
	if err := errors.Join(d.openHolders(context.Background()), d.settleSnapshots()); err != nil {
		return nil, errors.Join(err, wal.Close(), d.floor.close(), maps.Close())
	}
	return d, nil
}

func (d *Driver) loadRoots() error {
	err := d.maps.Scan([]byte(rootPrefix), func(_, value []byte) error {
		r, err := decodeRoot(value)
		if err != nil {
			return err
		}
		d.roots[r.ID] = r
		if r.Parent != nil {
			d.children[r.Parent.Snapshot]++
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("load volume roots: %w", err)
	}
	if err := d.loadOwners(); err != nil {
		return err
	}
	return d.maps.Scan([]byte(doomPrefix), func(key, value []byte) error {
		id, err1 := uuid.Parse(strings.TrimPrefix(string(key), doomPrefix))
		var gone doomed
		if err := errors.Join(err1, json.Unmarshal(value, &gone)); err != nil {
			return fmt.Errorf("load doomed volumes: %w", err)
		}
		d.doomed[id] = gone
		return nil
	})
}

// replay takes one record of the log after a restart, in order.
func (d *Driver) replay(l *writelog.Logged, _ int) error {
	v := d.volumes[l.Volume]
	if v == nil {
		r, ok := d.roots[l.Volume]
		if !ok || l.Seq <= r.Backed {
			return writelog.Skip // deleted, or on the backend
		}
		var err error
		if v, err = d.open(r); err != nil {
			return err
		}
		v.recount = true
		d.volumes[l.Volume] = v
		delete(d.roots, l.Volume)
	}
	if l.Seq <= v.root.Backed {
		return writelog.Skip
	}
	if l.Seq != v.seq+1 {
		return fmt.Errorf("volume %s: log goes on at record %d after %d: %w", v.id, l.Seq, v.seq, blockio.ErrCorrupt)
	}
	v.mu.Lock()
	v.applyLocked(l)
	v.mu.Unlock()
	v.seq, v.size, v.gated = l.Seq, v.visible.Load(), v.reverting.Load()
	v.logged.Store(l.Seq)
	v.lastBatch.Store(l.Batch)
	return nil
}

// Run destages and checkpoints until ctx ends. An error means that this node's log or map is fenced: end the process.
func (d *Driver) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.destager.run(ctx) })
	g.Go(func() error { return d.checkpointer.run(ctx) })
	g.Go(func() error { return d.pace.run(ctx) })
	g.Go(func() error { return d.keepLedger(ctx) })
	g.Go(func() error { return d.scrubber.run(ctx) })
	g.Go(func() error { return d.rewinder.run(ctx) })
	g.Go(func() error { return d.boots.run(ctx) })
	g.Go(func() error {
		select {
		case <-ctx.Done():
			return nil
		case <-d.wal.Failed():
			return fmt.Errorf("write log: %w", d.wal.Err())
		}
	})
	return g.Wait()
}

// Close ends service after Run has ended: no more requests, log synced, map checkpointed.
func (d *Driver) Close() error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return nil
	}
	d.closed = true
	volumes := make([]*Volume, 0, len(d.volumes))
	for _, v := range d.volumes {
		volumes = append(volumes, v)
	}
	d.mu.Unlock()
	for _, v := range volumes {
		v.order.Lock()
		v.closed = true
		v.freed.Broadcast()
		v.order.Unlock()
	}
	err := d.wal.Close()
	if err == nil {
		err = d.checkpointer.checkpoint()
	}
	d.objects.forget(nil)
	d.metrics.unregister()
	return errors.Join(err, d.floor.close(), d.maps.Close())
}

// Failed is closed when the node can no longer keep its promises; Err says why.
func (d *Driver) Failed() <-chan struct{} { return d.wal.Failed() }

// Err is the reason of Failed, nil while all is well.
func (d *Driver) Err() error { return errors.Join(d.wal.Err(), d.maps.Err()) }

// Verifier is the NFS write verifier: it changes when accepted data that was not flushed may have been lost.
func (d *Driver) Verifier() [8]byte { return d.wal.Verifier() }

// AddPool gives the vPool's backend.
func (d *Driver) AddPool(pool uuid.UUID, b backend.Backend) {
	d.mu.Lock()
	d.pools[pool] = b
	d.mu.Unlock()
	d.health.good(pool)
	d.destager.notify()
}

// RemovePool takes it away. Its volumes keep what is in the log.
func (d *Driver) RemovePool(pool uuid.UUID) {
	d.mu.Lock()
	delete(d.pools, pool)
	d.mu.Unlock()
}

func (d *Driver) backendOf(pool uuid.UUID) (backend.Backend, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if b, ok := d.pools[pool]; ok {
		return b, nil
	}
	return nil, fmt.Errorf("vPool %s: %w", pool, errNoPool)
}

// Spec says what a volume is. Path is inside the vPool and, like PoolName and Kind ("disk" or "file"), is kept on the
// backend for a rebuild.
type Spec struct {
	ID, Pool       uuid.UUID
	Epoch          uint64
	Size           int64
	PoolName, Path string
	Kind           string
}

// Create makes a volume, or opens it if it exists; then a higher epoch of the Spec is taken over and a lower one refused.
// The volume is durable when Create returns.
func (d *Driver) Create(ctx context.Context, s Spec) (*Volume, error) {
	if s.Size < 0 || s.Size > VolumeBytesMax {
		return nil, fmt.Errorf("create volume %s of %d bytes (at most %d): %w", s.ID, s.Size, VolumeBytesMax, blockio.ErrBeyondEnd)
	}
	v, err := d.Volume(ctx, s.ID)
	if err == nil {
		return v, v.activate(s.Epoch)
	}
	if !errors.Is(err, ErrUnknownVolume) {
		return nil, err
	}
	keys, err := d.newKey(s.Pool, s.ID)
	if err != nil {
		return nil, fmt.Errorf("create volume %s: %w", s.ID, err)
	}
	h, err := d.maps.NewHandle()
	if err != nil {
		return nil, fmt.Errorf("create volume %s: %w", s.ID, err)
	}
	now := d.now().UnixNano()
	r := root{ID: s.ID, Pool: s.Pool, Handle: h, Branches: []branch{{Handle: h}}, Epochs: []epochSpan{{From: 1, Epoch: s.Epoch}},
		Size: s.Size, ModTime: now, NextSCO: 1, Keys: keys,
		Name: rootObject{N: 1, PoolName: s.PoolName, Path: s.Path, Kind: s.Kind, Created: now}}
	d.mu.Lock()
	defer d.mu.Unlock()
	if v := d.volumes[s.ID]; v != nil {
		if v.husk.Load() {
			return nil, fmt.Errorf("create volume %s: being deleted: %w", s.ID, blockio.ErrClosed)
		}
		return v, nil
	}
	if _, ok := d.doomed[s.ID]; ok {
		return nil, fmt.Errorf("create volume %s: being deleted: %w", s.ID, blockio.ErrClosed)
	}
	if err := d.maps.Put([]blockmap.KV{r.encode()}, true); err != nil {
		return nil, fmt.Errorf("create volume %s: %w", s.ID, err)
	}
	v = newVolume(d, r)
	v.applyLimits()
	d.volumes[s.ID] = v
	d.destager.add(v)
	return v, nil
}

// activate takes over a higher epoch.
func (v *Volume) activate(epoch uint64) error {
	v.storing.Lock()
	defer v.storing.Unlock()
	v.mu.RLock()
	current, next := v.root.epoch(), v.destage.next
	v.mu.RUnlock()
	switch {
	case epoch == current:
		return nil
	case epoch < current:
		return fmt.Errorf("volume %s is at epoch %d, not %d: %w", v.id, current, epoch, blockio.ErrFenced)
	}
	r := v.stored
	before := r.Epochs
	r.Epochs = withEpoch(before, next, epoch)
	if err := v.storeLocked(r); err != nil {
		return err
	}
	v.mu.Lock()
	// A cut may have taken numbers meanwhile; those are of the old epoch.
	r.Epochs = withEpoch(before, v.destage.next, epoch)
	v.root.Epochs = r.Epochs
	v.span.Store(v.d.owners.spans(&v.root))
	v.mu.Unlock()
	return v.storeLocked(r)
}

// Volume opens a volume of this node.
func (d *Driver) Volume(ctx context.Context, id uuid.UUID) (*Volume, error) {
	v, err := d.volume(ctx, id)
	if err == nil && v.husk.Load() {
		return nil, fmt.Errorf("volume %s: %w", id, ErrUnknownVolume)
	}
	return v, err
}

// volume opens a volume, also one that is deleted and holds snapshots for others.
func (d *Driver) volume(_ context.Context, id uuid.UUID) (*Volume, error) {
	d.mu.RLock()
	v := d.volumes[id]
	d.mu.RUnlock()
	if v != nil {
		return v, nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if v := d.volumes[id]; v != nil {
		return v, nil
	}
	r, ok := d.roots[id]
	switch {
	case d.closed:
		return nil, blockio.ErrClosed
	case !ok:
		return nil, fmt.Errorf("volume %s: %w", id, ErrUnknownVolume)
	}
	v, err := d.open(r)
	if err == nil {
		err = v.dropAborted()
	}
	if err != nil {
		return nil, fmt.Errorf("open volume %s: %w", id, err)
	}
	d.volumes[id] = v
	delete(d.roots, id)
	v.applyLimits()
	if !r.Name.Put {
		d.destager.add(v)
	}
	d.boots.beginLocked(v, r.Parent)
	return v, nil
}

func (d *Driver) lookup(id uuid.UUID) *Volume {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.volumes[id]
}

// Stat describes a volume without opening it.
func (d *Driver) Stat(id uuid.UUID) (Info, bool) {
	d.mu.RLock()
	v, r, ok := d.volumes[id], root{}, false
	if v == nil {
		r, ok = d.roots[id]
	}
	d.mu.RUnlock()
	if v != nil {
		return v.Info(), !v.husk.Load()
	}
	return Info{Size: r.Size, ModTime: time.Unix(0, r.ModTime), Used: min(r.UsedBlocks*blockSize, roundUp(r.Size)), Accepted: r.Backed,
		Logged: r.Backed, Durable: r.Backed, Backed: r.Backed, Epoch: r.epoch(), Template: r.Template}, ok
}

// Rename notes the volume's name for a rebuild; the root object on the backend follows soon. It costs nothing if the name is
// the same.
func (d *Driver) Rename(ctx context.Context, id uuid.UUID, poolName, path string) error {
	v, err := d.Volume(ctx, id)
	if err != nil {
		return err
	}
	v.mu.RLock()
	same := v.root.Name.PoolName == poolName && v.root.Name.Path == path
	v.mu.RUnlock()
	if same {
		return nil
	}
	return v.changeRoot(func(o *rootObject) { o.PoolName, o.Path = poolName, path })
}

// changeRoot changes what the root object says, durably on this node.
func (v *Volume) changeRoot(change func(*rootObject)) error {
	v.storing.Lock()
	defer v.storing.Unlock()
	r := v.stored
	change(&r.Name)
	r.Name.N++
	r.Name.Put = false
	if err := v.storeLocked(r); err != nil {
		return err
	}
	v.mu.Lock()
	v.root.Name = r.Name
	v.mu.Unlock()
	v.d.destager.add(v)
	return nil
}

// rootChanged has the root object put again, since the size in it is old.
func (d *Driver) rootChanged(v *Volume) {
	if err := v.changeRoot(func(*rootObject) {}); err != nil {
		d.log.Warn("root object not renewed", "volume", v.id, "err", err)
	}
}

// Delete ends a volume with its snapshots and frees its log, map and backend objects; ErrInUse while one of its snapshots has
// clones. What snapshots of other volumes need stays with a husk (promote.go). When it fails otherwise, the volume is gone for readers and writers all the same, and Delete can be called again;
// nil if there is no such volume any more.
func (d *Driver) Delete(ctx context.Context, id uuid.UUID) error {
	husk, err := d.leaveHusk(ctx, id)
	if err == nil && !husk {
		err = d.deleteNow(ctx, id)
	}
	if err != nil {
		return err
	}
	return d.sweep(ctx)
}

// deleteNow deletes a volume that holds nothing for others.
func (d *Driver) deleteNow(ctx context.Context, id uuid.UUID) error {
	gone, ok, err := d.doom(ctx, id)
	if err != nil || !ok {
		return err
	}
	store, err := d.backendOf(gone.Pool)
	if err != nil {
		return fmt.Errorf("delete volume %s: %w", id, err)
	}
	for _, prefix := range []string{sco.Prefix(id), sco.ContainerPrefix(id), sco.RootPrefix(id)} {
		for {
			found, err := store.List(ctx, prefix, "", 1000)
			if err != nil {
				return fmt.Errorf("delete volume %s: %w", id, err)
			}
			names := make([]string, len(found))
			for i := range found {
				names[i] = found[i].Name
			}
			if err := backend.DeleteAll(ctx, store, names); err != nil {
				return fmt.Errorf("delete volume %s: %w", id, err)
			}
			if len(found) == 0 {
				break
			}
		}
	}
	for _, h := range slices.Backward(gone.Handles) { // forks before what they were forked from
		if err := d.maps.DropVolume(h); err != nil {
			return fmt.Errorf("delete volume %s: %w", id, err)
		}
	}
	keys := [][]byte{doomKey(id)}
	for _, prefix := range [][]byte{snapshotsKey(id), objectsKey(id)} {
		if err := d.maps.Scan(prefix, func(key, _ []byte) error {
			keys = append(keys, slices.Clone(key))
			if id, ok := bytes.CutPrefix(key, snapshotsKey(id)); ok {
				keys = append(keys, append([]byte(tracePrefix), id...), append([]byte(ownerPrefix), id...))
			}
			return nil
		}); err != nil {
			return fmt.Errorf("delete volume %s: %w", id, err)
		}
	}
	if err := d.maps.Update(nil, keys); err != nil {
		return fmt.Errorf("delete volume %s: %w", id, err)
	}
	d.mu.Lock()
	delete(d.doomed, id)
	d.mu.Unlock()
	return nil
}

// doomed is what is still to be given back of a volume that is gone.
type doomed struct {
	Pool    uuid.UUID         `json:"pool"`
	Handles []blockmap.Handle `json:"handles"`
}

// doom stops the volume and replaces its root by a note of what is to be given back.
func (d *Driver) doom(ctx context.Context, id uuid.UUID) (gone doomed, ok bool, err error) {
	d.mu.RLock()
	gone, ok = d.doomed[id]
	d.mu.RUnlock()
	if ok {
		return gone, true, nil
	}
	v, err := d.volume(ctx, id)
	if errors.Is(err, ErrUnknownVolume) {
		return doomed{}, false, nil
	}
	if err != nil {
		return doomed{}, false, err
	}
	v.snapping.Lock() // for ever, if it succeeds: no more snapshots
	holders, err := v.refuseParent()
	if err != nil {
		v.snapping.Unlock()
		return doomed{}, false, err
	}
	v.order.Lock()
	v.closed = true
	last := v.seq
	v.order.Unlock()
	if err := v.waitLogged(last); err != nil && v.err() == nil {
		v.snapping.Unlock()
		return doomed{}, false, err
	}
	v.fail(fmt.Errorf("deleted: %w", blockio.ErrClosed))
	v.snapping.Unlock() // whoever comes now finds that the volume has failed
	d.destager.drop(v)
	v.rooting.Lock() // for ever: no more root objects
	if err := v.waitJobs(ctx); err != nil {
		v.rooting.Unlock() // it is tried again; a volume that has failed puts none
		return doomed{}, false, err
	}
	v.storing.Lock()
	defer v.storing.Unlock()
	gone = doomed{Pool: v.root.Pool}
	for _, b := range v.stored.Branches {
		gone.Handles = append(gone.Handles, b.Handle)
	}
	note, err := json.Marshal(gone)
	if err != nil {
		return doomed{}, false, err
	}
	if err := d.maps.Update(append(d.nobodys(), blockmap.KV{Key: doomKey(id), Value: note}), [][]byte{rootKey(id)}); err != nil {
		return doomed{}, false, err
	}
	d.checkpointer.drop(v)
	d.mu.Lock()
	delete(d.volumes, id)
	delete(d.owned.husks, id)
	d.doomed[id] = gone
	if p := v.stored.Parent; p != nil {
		if d.children[p.Snapshot]--; d.children[p.Snapshot] == 0 {
			delete(d.children, p.Snapshot)
		}
	}
	d.mu.Unlock()
	d.wal.Forget(id)
	d.objects.forget(v)
	d.keyrings.forget(id)
	for _, h := range holders {
		d.rootChanged(h)
	}
	return gone, true, nil
}

// refuseParent fails if a clone hangs on a snapshot of the volume; else none will any more, and what it owns at other volumes is nobody's
// in memory; holders have that. snapping is held.
func (v *Volume) refuseParent() (holders []*Volume, err error) {
	v.d.mu.Lock()
	defer v.d.mu.Unlock()
	v.mu.RLock()
	snaps := slices.Clone(v.snaps)
	v.mu.RUnlock()
	for _, s := range snaps {
		if n := v.d.children[s.ID]; n > 0 {
			return nil, fmt.Errorf("delete volume %s: its snapshot %s has %d clones: %w", v.id, s.Name, n, ErrInUse)
		}
	}
	if holders, err = v.d.disownLocked(v.id); err != nil {
		return nil, err
	}
	for _, s := range snaps {
		v.d.owned.remove(s.ID)
	}
	v.mu.Lock()
	v.snaps = nil
	v.mu.Unlock()
	return holders, nil
}

// waitJobs waits until no SCO of the volume is under way.
func (v *Volume) waitJobs(ctx context.Context) error {
	for {
		if v.running.Load() == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// Stats is the driver's state for people and metrics.
type Stats struct {
	Log     writelog.Stats
	Map     blockmap.Stats
	Volumes int // of this node
	Open    int
	Pending int64 // bytes logged and not yet on a backend
}

// Stats counts.
func (d *Driver) Stats() Stats {
	s := Stats{Log: d.wal.Stats(), Map: d.maps.Stats()}
	d.mu.RLock()
	s.Volumes, s.Open = len(d.volumes)+len(d.roots), len(d.volumes)
	d.mu.RUnlock()
	d.destager.mu.Lock()
	defer d.destager.mu.Unlock()
	for v := range d.destager.dirty {
		s.Pending += v.pending.Load()
	}
	return s
}

// PoolHealth says how the vPool's backend answers.
func (d *Driver) PoolHealth(pool uuid.UUID) PoolHealth { return d.health.of(pool) }

// Drain destages everything that is in the log now, puts root objects that have changed, and checkpoints, or fails with ctx.
func (d *Driver) Drain(ctx context.Context) error {
	d.draining.Add(1)
	defer d.draining.Add(-1)
	if err := d.openUnput(ctx); err != nil {
		return err
	}
	for {
		d.destager.notify()
		d.destager.mu.Lock()
		n := 0
		for v := range d.destager.dirty {
			if (v.logged.Load() > v.backed() || v.rootWaits()) && v.err() == nil && v.stuck.Load() == nil {
				n++
			}
		}
		d.destager.mu.Unlock()
		if n == 0 {
			return d.checkpointer.checkpoint()
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// openUnput opens the volumes that nobody has opened since a restart, and whose root objects are to be put.
func (d *Driver) openUnput(ctx context.Context) error {
	d.mu.RLock()
	var ids []uuid.UUID
	for id, r := range d.roots {
		if !r.Name.Put && r.Name.Path != "" {
			ids = append(ids, id)
		}
	}
	d.mu.RUnlock()
	for _, id := range ids {
		if _, err := d.volume(ctx, id); err != nil && !errors.Is(err, ErrUnknownVolume) { // deleted meanwhile
			return err
		}
	}
	return nil
}

// blockBuffers are block-sized scratch buffers.
type blockBuffers struct {
	pool  sync.Pool
	zeros []byte
}

func newBlockBuffers() *blockBuffers {
	return &blockBuffers{pool: sync.Pool{New: func() any { b := make([]byte, blockSize); return &b }}, zeros: make([]byte, blockSize)}
}

func (b *blockBuffers) get() []byte  { return *b.pool.Get().(*[]byte) }
func (b *blockBuffers) put(p []byte) { b.pool.Put(&p) }
