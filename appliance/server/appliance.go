// Package server is a running appliance: it opens what is on the disk, wires gateways, volume driver and control to each
// other, and takes them down in the order that loses nothing.
//
//	DATA/lock            held while a process has the directory; DATA/control.lock while one has the control unit (units.go)
//	DATA/control/        raft log, snapshots, identity (package control/raft)
//	DATA/log/ DATA/map/  the volume driver's log and block map
//	DATA/level.json      the data level of what is here: a binary that does not know it opens nothing (level.go)
//	DATA/config.cluster.json  what the cluster's configuration sets for this node's next start (fleet.go)
//	DATA/logs/           log lines of the units (package logbook)
//	DATA/crash/          reports of processes that crashed (crash.go)     DATA/update/  bundles and the update agent's exchange (rollout.go)
//	DATA/lost.json       volumes whose log or map is gone and that no rebuild has settled yet (lost.go)
//	DATA/ledger.json     how far the log was, for a rebuild to say what is lost with it
//	DATA/history/        what was measured (package history)
//	DATA/cache/          the read cache of vPools whose backend is remote
//	DATA/secrets.key     the key that seals credentials in control's state (package control/secrets)
//	DATA/backend/NAME    local backends of vPools that name no other place
//	DATA/tls/            CA and server certificate          DATA/admin.token  the administrator's API token
//	DATA/varve.sock      API for local programs             DATA/nbd.sock     NBD for local programs
//	DATA/control.sock, gateway.sock, peer.sock, dial.sock   between the units, where they are two processes (units.go, gateway.go, peers.go)
//
// # Start
//
//	lock -> open the doors (clients wait in the kernel's queue) -> control -> driver -> vPools' backends
//	fresh: vPool default, admin token, certificate; the node's own record comes last and says that this is done
//	-> gateways and API serve -> ready
//
// If control says that volumes were active but the log or the map is gone, the start is refused: opening them would make
// them empty. `varve rebuild` is the way on; a volume that it has not settled is refused by itself.
//
// # Stop
//
// Two groups of goroutines. The outer one serves clients; it ends first, each part draining within its own limit. The
// inner one (driver, raft) runs until then, so that what drains can still be committed. Then the driver syncs its log and
// checkpoints, control closes, the lock goes. If the inner group fails (fenced log, raft that cannot persist) the outer one is
// ended and the process exits with the error: only a restart can tell what is on the disk.
package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"varve/appliance/exports"
	"varve/control/api"
	"varve/control/events"
	"varve/control/node"
	"varve/control/peer"
	"varve/control/pki"
	"varve/control/properties"
	"varve/control/raft"
	"varve/control/secrets"
	"varve/control/state"
	"varve/control/vdisk"
	"varve/control/vpool"
	"varve/volumedriver"
	"varve/volumedriver/backend"
	"varve/volumedriver/backend/local"
	"varve/volumedriver/backend/s3"
	"varve/volumedriver/cache"
	"varve/volumedriver/vfs"
)

// DefaultPool is the vPool that a fresh appliance has.
const DefaultPool = "default"

// LockedError: another process has the data directory.
type LockedError struct{ Data string }

func (e *LockedError) Error() string {
	return fmt.Sprintf("data directory %s is in use by another varve; stop that one, or give another --data", e.Data)
}

// LostError: control knows volumes whose log or map is gone.
type LostError struct {
	Data    string
	Missing string
	Volumes int
}

func (e *LostError) Error() string {
	return fmt.Sprintf("%s is missing but %d volumes had data in it; put it back, or run: varve rebuild --data %s", e.Missing, e.Volumes, e.Data)
}

// base is what serve and rebuild have in common: the locked directory, control and the driver, opened but not running.
type base struct {
	cfg     Config
	lock    io.Closer
	doors   *listeners // nil in a rebuild
	metrics *prometheus.Registry
	tls     *pki.Server
	network *network   // nil without a node port
	node    *raft.Node // nil in the gateway unit
	raft    controlNode
	driver  *volumedriver.Driver
	volumes *exports.Volumes
	secrets *secrets.Store
	pools   *exports.Pools
	cache   *exports.ReadCache
	engine  *exports.Engine
	vpools  *vpool.Controller
	vdisks  *vdisk.Controller
	events  *events.Publisher
	nodes   *node.Controller
	peers   *peer.Peers // calls of and to other nodes
	remote  *exports.Remote
	// properties are what nodes said of themselves and their volumes last; shared is where they are besides this process, or nil.
	properties *properties.Cache
	shared     *properties.Memcached

	openBackend exports.OpenBackend
}

// openData makes and locks the data directory.
func openData(cfg Config) (io.Closer, error) {
	if err := checkLevel(cfg.Data); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.Data, 0o700); err != nil {
		return nil, fmt.Errorf("make data directory: %w", err)
	}
	lock, err := vfs.OS().Lock(filepath.Join(cfg.Data, lockName))
	if err != nil {
		if held(err) {
			return nil, &LockedError{cfg.Data}
		}
		return nil, fmt.Errorf("lock data directory: %w", err)
	}
	if cfg.Unit != UnitAll {
		return lock, nil
	}
	control, err := lockControl(cfg)
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return both{control, lock}, nil
}

func openBackend(b state.Backend, k vpool.Keys, log *slog.Logger) (backend.Backend, error) {
	switch b.Kind {
	case state.BackendLocal:
		return openLocal(b.Dir)
	case state.BackendS3:
		s, err := s3.Open(s3.Config{Endpoint: b.Endpoint, Region: b.Region, Bucket: b.Bucket, Prefix: b.Prefix, CA: []byte(b.CA),
			Credentials: s3.Credentials{AccessKey: k.Access, SecretKey: k.Secret}, Log: log})
		if err != nil {
			return nil, err
		}
		return s, nil
	}
	return nil, fmt.Errorf("backend kind %q is not known to this version", b.Kind)
}

func openLocal(dir string) (backend.Backend, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make backend directory: %w", err)
	}
	s, err := local.Open(vfs.OS(), dir)
	if err != nil {
		return nil, fmt.Errorf("open backend %s: %w", dir, err)
	}
	return s, nil
}

// OpenLocalBackend opens a local backend in a directory, for probes.
func OpenLocalBackend(dir string) (backend.Backend, error) { return openLocal(dir) }

// open opens control and the driver. guard says whether a lost log or map is an error, as it is for all but a rebuild.
func (b *base) open(ctx context.Context, guard bool) error {
	b.metrics = prometheus.NewRegistry()
	b.metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	var err error
	log := b.cfg.Log
	if err := b.openControl(ctx); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	named := func(service string) *slog.Logger {
		return log.With("component", component(b.raft.Cluster(), b.raft.ID(), service))
	}
	store := b.raft.State()
	lost, err := b.loadLost(guard)
	if err != nil {
		return err
	}
	if b.cfg.LogBytes == 0 {
		total, _, err := vfs.OS().Space(b.cfg.Data)
		if err != nil {
			return fmt.Errorf("size of the disk of %s: %w", b.cfg.Data, err)
		}
		b.cfg.LogBytes = logBytes(total)
	}
	b.driver, err = volumedriver.Open(volumedriver.Config{
		FS: vfs.OS(), Dir: b.cfg.Data, LogBytes: b.cfg.LogBytes, SegmentBytes: segmentBytes, MapBudgetBytes: b.cfg.MapBytes,
		SCOBytes: b.cfg.SCOBytes, Ledger: filepath.Join(b.cfg.Data, ledgerName), Log: named("volumedriver"), Metrics: b.metrics,
	})
	if err != nil {
		return fmt.Errorf("open volume driver: %w", err)
	}
	b.volumes = exports.NewVolumes(b.raft, store, b.driver, b.raft.ID(), lost)
	b.cache = exports.NewReadCache(b.cacheConfig, named("cache"))
	if err := b.openSecrets(); err != nil {
		return err
	}
	poolKeys := func(pool uuid.UUID) (vpool.Keys, error) { return vpool.KeysOf(b.secrets, pool) }
	b.openBackend = func(spec state.Backend, k vpool.Keys) (backend.Backend, error) {
		return openBackend(spec, k, named("vpool"))
	}
	b.pools = exports.NewPools(b.driver, b.openBackend, poolKeys, b.cache, named("vpool"))
	b.pools.UseKEKs(func(pool uuid.UUID) ([]byte, error) { return vpool.KEKOf(b.secrets, pool) })
	b.metrics.MustRegister(exports.NewS3Metrics(b.pools))
	b.engine = exports.NewEngine(store, b.volumes)
	b.remote = exports.NewRemote(b.engine, b.peers, b.raft.Sync, named("peers"))
	if err := b.openProperties(); err != nil {
		return err
	}
	b.shareSecrets()
	b.vpools = vpool.New(vpool.Config{Raft: b.raft, Store: store, Node: b.raft.ID(), Engine: poolsHere{b.pools, b}, Vault: b.secrets, Log: named("vpool")})
	b.events = events.NewPublisher(b.raft, b.raft.ID(), named("events"))
	b.vdisks = vdisk.New(vdisk.Config{Emit: b.events.Emit, Raft: b.raft, Store: store, Engine: b.remote, Mine: b.mine, Log: named("vdisk")})
	b.nodes = node.New(b.raft, store, b.raft.ID())
	return nil
}

// openSecrets opens this node's keys.
func (b *base) openSecrets() error {
	keys, err := secrets.OpenKeys(b.cfg.Data)
	if err != nil {
		return err
	}
	b.secrets = secrets.New(b.raft, b.raft.State(), keys)
	return nil
}

// cacheConfig sizes the read cache. On the disk it takes an eighth, of what is free at most half, and 64 GiB at most, unless told
// otherwise.
func (b *base) cacheConfig() (cache.Config, error) {
	c := cache.Config{FS: vfs.OS(), Dir: b.cfg.CacheDir, Bytes: max(0, b.cfg.CacheBytes), RAMBytes: max(0, b.cfg.CacheRAM), KeepWrites: true,
		Log: b.cfg.Log.With("component", component(b.raft.Cluster(), b.raft.ID(), "cache")), Metrics: b.metrics}
	if b.cfg.CacheBytes == 0 {
		if err := os.MkdirAll(c.Dir, 0o700); err != nil {
			return c, err
		}
		total, free, err := vfs.OS().Space(c.Dir)
		if err != nil {
			return c, err
		}
		c.Bytes = cacheBytes(total, free)
	}
	return c, nil
}

// close takes down what open made, newest first. Nothing uses it any more.
func (b *base) close() error {
	var errs []error
	if b.driver != nil {
		if err := b.driver.Close(); err != nil {
			errs = append(errs, fmt.Errorf("close volume driver: %w", err))
		}
	}
	if b.pools != nil {
		errs = append(errs, b.pools.Close(), b.cache.Close())
	}
	if b.raft != nil {
		b.handOn()
		errs = append(errs, b.raft.Close())
	}
	if b.shared != nil {
		errs = append(errs, b.shared.Close())
	}
	b.closeNetwork()
	// Closing a unix socket removes its file, so it must not happen to the next process's: first the doors, then the lock.
	if b.doors != nil {
		b.doors.close()
	}
	if b.lock != nil {
		errs = append(errs, b.lock.Close())
	}
	return errors.Join(errs...)
}

// initialise makes what a fresh appliance has, and registers the node, which says that it has been made.
func (b *base) initialise(ctx context.Context, spec state.NodeSpec) error {
	if _, err := b.nodes.Self(); errors.Is(err, state.ErrNotFound) {
		if len(b.raft.State().View().VPools()) == 0 {
			spec := vpool.Spec{Name: DefaultPool, Backend: localURL(filepath.Join(b.cfg.Data, backendName, DefaultPool))}
			if b.cfg.S3.URL != "" {
				spec.Backend = b.cfg.S3.URL
				spec.Keys, spec.CA, spec.AllowUnsafe = b.cfg.S3.Keys, b.cfg.S3.CA, b.cfg.S3.AllowUnsafe
			}
			if _, err := b.vpools.Create(ctx, spec); err != nil {
				return fmt.Errorf("make vPool %s: %w", DefaultPool, err)
			}
		}
	} else if err := b.sameBucket(); err != nil {
		return err
	}
	if b.cfg.Unit == UnitAll { // else control does
		if _, err := api.EnsureAdminToken(ctx, b.raft, b.raft.State(), b.cfg.Data); err != nil {
			return err
		}
	}
	if err := b.nodes.Register(ctx, spec); err != nil {
		return fmt.Errorf("register node: %w", err)
	}
	return nil
}

// sameBucket refuses a --s3 that names another place than vPool default's: it says where a fresh appliance begins, and moves nothing.
func (b *base) sameBucket() error {
	if b.cfg.S3.URL == "" {
		return nil
	}
	want, err := vpool.ParseBackend(b.cfg.S3.URL)
	if err != nil {
		return err
	}
	have, err := b.raft.State().View().VPool(DefaultPool)
	if err == nil && vpool.URL(have.Backend) == vpool.URL(want) {
		return nil
	}
	return &UsageError{fmt.Sprintf("--s3 names %s, which is not where vPool %s of this appliance is", vpool.URL(want), DefaultPool),
		"leave --s3 out; make another vPool with varve vpool create"}
}

// component is the id that this process's log lines carry: cluster, node, service.
func component(cluster, node uuid.UUID, service string) string {
	return cluster.String()[:8] + "." + node.String()[:8] + "." + service
}
