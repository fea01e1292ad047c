package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/uuid"

	"varve/control/state"
	"varve/control/vpool"
	"varve/volumedriver"
	"varve/volumedriver/backend"
	"varve/volumedriver/sco"
)

// RebuildOptions says what to rebuild. Pool and Backend name a vPool that this appliance does not know yet; Pool alone one
// that it does; neither means every vPool that it knows.
type RebuildOptions struct{ Pool, Backend string }

// RebuiltVolume is a volume after a rebuild: an exact prefix of its writes.
type RebuiltVolume struct {
	VPool string    `json:"vpool"`
	Path  string    `json:"path"`
	ID    uuid.UUID `json:"id"`
	// State is "rebuilt"; "kept" for one that this node still has; "empty" for one of which nothing had reached the backend;
	// "failed", and then Error says why.
	State string `json:"state"`
	Size  int64  `json:"size"`
	Used  int64  `json:"used"`
	// Seq is the last write that the volume holds, Written when that was logged; zero and null where nothing of it had
	// reached the backend.
	Seq     uint64     `json:"seq"`
	Written *time.Time `json:"written"`
	Objects int        `json:"objects"`
	Ignored int        `json:"ignored"`
	// LostRecords is how many writes after Seq the node had logged when it last noted that, at NotedAt; null: not known.
	LostRecords *uint64    `json:"lost_records"`
	NotedAt     *time.Time `json:"noted_at,omitempty"`
	Error       string     `json:"error,omitempty"`
}

// States of a RebuiltVolume.
const (
	StateRebuilt = "rebuilt"
	StateKept    = "kept"
	StateEmpty   = "empty"
	StateFailed  = "failed"
)

// lostFound is where volumes go whose name is taken or unknown.
const lostFound = "lost+found"

// Rebuild makes the volumes of vPools again from their backends alone. The appliance must not be running: the data
// directory is locked for the time. What is left of a lost log or map is moved aside, not removed.
func Rebuild(ctx context.Context, cfg Config, opt RebuildOptions) (volumes []RebuiltVolume, err error) {
	cfg, err = cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	if opt.Backend != "" && opt.Pool == "" {
		return nil, &UsageError{"--backend needs a name for the vPool", "give --pool NAME as well"}
	}
	b := &base{cfg: cfg}
	if b.lock, err = openData(cfg); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	if err := setAside(cfg.Data); err != nil {
		return nil, err
	}
	if err := b.open(ctx, false); err != nil {
		return nil, err
	}
	pools, err := b.poolsToRebuild(ctx, opt)
	if err != nil {
		return nil, err
	}
	if err := b.nodes.Register(ctx, b.nodeSpec(&listeners{})); err != nil {
		return nil, fmt.Errorf("register node: %w", err)
	}
	for _, p := range pools {
		some, err := b.rebuildPool(ctx, p)
		volumes = append(volumes, some...)
		if e := b.settled(some); e != nil {
			return volumes, e
		}
		if err != nil {
			return volumes, fmt.Errorf("rebuild vPool %s: %w", p.Name, err)
		}
	}
	return volumes, nil
}

// settled takes the volumes that a rebuild has dealt with off the list of lost ones.
func (b *base) settled(volumes []RebuiltVolume) error {
	lost, err := b.loadLost(false)
	if err != nil || len(lost) == 0 {
		return err
	}
	for _, v := range volumes {
		if v.State != StateFailed {
			delete(lost, v.ID)
		}
	}
	return b.saveLost(lost)
}

// setAside moves what is left of the log or the map away where the other one is missing: neither is of use alone.
func setAside(data string) error {
	there := make(map[string]bool)
	for _, dir := range []string{logName, mapName} {
		entries, err := os.ReadDir(filepath.Join(data, dir))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		there[dir] = len(entries) > 0
	}
	if there[logName] == there[mapName] {
		return nil
	}
	for dir, full := range there {
		if !full {
			continue
		}
		aside := filepath.Join(data, dir+".lost-"+time.Now().UTC().Format("20060102T150405"))
		if err := os.Rename(filepath.Join(data, dir), aside); err != nil {
			return fmt.Errorf("move the rest of the %s aside: %w", dir, err)
		}
	}
	return nil
}

// localURL names a directory as a vPool's backend.
func localURL(dir string) string { return (&url.URL{Scheme: state.BackendLocal, Path: dir}).String() }

func (b *base) poolsToRebuild(ctx context.Context, opt RebuildOptions) ([]state.VPool, error) {
	view := b.raft.State().View()
	if opt.Pool == "" {
		pools := view.VPools()
		if len(pools) == 0 {
			return nil, &UsageError{fmt.Sprintf("%s knows no vPool to rebuild", b.cfg.Data),
				"name it and its backend: --pool NAME --backend local:///DIR or s3://…"}
		}
		for _, p := range pools {
			if err := b.mounted(ctx, p); err != nil {
				return nil, err
			}
		}
		return pools, b.vpools.Start(ctx)
	}
	have, err := view.VPool(opt.Pool)
	switch {
	case err == nil:
		if opt.Backend != "" {
			want, err := vpool.ParseBackend(opt.Backend)
			if err != nil {
				return nil, err
			}
			if want.Unsafe, want.CA, want.Node = have.Backend.Unsafe, have.Backend.CA, have.Backend.Node; want != have.Backend {
				return nil, &state.Error{Err: state.ErrConflict, Object: "vpool " + opt.Pool,
					Detail: "is known here with the backend " + vpool.URL(have.Backend), Remedy: "leave --backend out or give another --pool"}
			}
		}
		if err := b.mounted(ctx, have); err != nil {
			return nil, err
		}
		return []state.VPool{have}, b.pools.AddPool(ctx, have)
	case !errors.Is(err, state.ErrNotFound):
		return nil, err
	case opt.Backend == "":
		return nil, &state.Error{Err: state.ErrNotFound, Object: "vpool " + opt.Pool, Detail: "not known here",
			Remedy: "say where its objects are: --backend local:///DIR or s3://…"}
	}
	spec, err := vpool.ParseBackend(opt.Backend)
	if err != nil {
		return nil, err
	}
	if err := present(spec); err != nil {
		return nil, fmt.Errorf("backend of vPool %s: %w", opt.Pool, err)
	}
	made, err := b.vpools.Create(ctx, vpool.Spec{Name: opt.Pool, Backend: opt.Backend, Keys: b.cfg.S3.Keys, CA: b.cfg.S3.CA,
		AllowUnsafe: b.cfg.S3.AllowUnsafe})
	if err != nil {
		return nil, err
	}
	return []state.VPool{made.VPool}, nil
}

// present refuses a directory that is not there, before anything makes it.
func present(spec state.Backend) error {
	if spec.Kind != state.BackendLocal {
		return nil
	}
	_, err := os.Stat(spec.Dir)
	return err
}

// mounted refuses a backend that holds none of the vPool's volumes. In use it has at least their roots, but the empty
// directory where its disk is not mounted has nothing, and a rebuild from that would make every volume empty.
func (b *base) mounted(ctx context.Context, p state.VPool) error {
	if err := present(p.Backend); err != nil {
		return fmt.Errorf("backend of vPool %s: %w", p.Name, err)
	}
	var k vpool.Keys
	if p.Backend.Kind == state.BackendS3 {
		var err error
		if k, err = vpool.KeysOf(b.secrets, p.ID); err != nil {
			return fmt.Errorf("credentials of vPool %s: %w", p.Name, err)
		}
	}
	store, err := b.openBackend(p.Backend, k)
	if err != nil {
		return err
	}
	holds, err := b.holdsAny(ctx, store, p)
	if err := errors.Join(err, store.Close()); err != nil {
		return fmt.Errorf("list backend of vPool %s: %w", p.Name, err)
	}
	if !holds {
		return &state.Error{Err: state.ErrConflict, Object: "vpool " + p.Name, Detail: "its backend " + vpool.URL(p.Backend) + " holds none of its volumes",
			Remedy: "mount its disk there, or put the directory or bucket back"}
	}
	return nil
}

// holdsAny says whether a store has an object of any active volume of the vPool, or there is no such volume.
func (b *base) holdsAny(ctx context.Context, store backend.Backend, p state.VPool) (bool, error) {
	none := true
	for _, v := range b.raft.State().View().VolumesOf(p.FSID) {
		if v.State != state.VolumeActive {
			continue
		}
		none = false
		for _, prefix := range []string{sco.RootPrefix(v.ID), sco.Prefix(v.ID)} {
			if found, err := store.List(ctx, prefix, "", 1); err != nil || len(found) > 0 {
				return len(found) > 0, err
			}
		}
	}
	return none, nil
}

func (b *base) rebuildPool(ctx context.Context, pool state.VPool) ([]RebuiltVolume, error) {
	kept := make(map[uuid.UUID]bool)
	for _, vol := range b.raft.State().View().VolumesOf(pool.FSID) {
		if _, ok := b.driver.Stat(vol.ID); ok {
			kept[vol.ID] = true
		}
	}
	found, err := b.driver.Rebuild(ctx, pool.ID)
	if err != nil {
		return nil, err
	}
	var out []RebuiltVolume
	var clones []state.NewParent
	seen := make(map[uuid.UUID]bool)
	for _, r := range found {
		seen[r.ID] = true
		if kept[r.ID] {
			continue
		}
		name := clean(r.Path)
		if r.Err == nil {
			name, r.Err = b.name(ctx, pool, r)
		}
		if r.Err == nil && r.Parent != uuid.Nil {
			clones = append(clones, state.NewParent{Volume: r.ID, Parent: &state.VolumeParent{Volume: r.Parent, Snapshot: r.ParentSnapshot}})
		}
		v := RebuiltVolume{VPool: pool.Name, Path: name, ID: r.ID, State: StateRebuilt, Size: r.Size, Used: r.Used, Seq: r.LastLog, Objects: r.Objects, Ignored: r.Ignored}
		if r.LastLog > 0 {
			at := r.ModTime.UTC()
			v.Written = &at
		}
		if !r.LostAt.IsZero() {
			at := r.LostAt.UTC()
			v.LostRecords, v.NotedAt = &r.Lost, &at
		}
		if r.Err != nil {
			v.State, v.Error = StateFailed, r.Err.Error()
		}
		out = append(out, v)
	}
	if len(clones) > 0 {
		if _, err := b.raft.Apply(ctx, &state.SetParents{Volumes: clones}); err != nil {
			return out, fmt.Errorf("note of what the volumes of vPool %s are clones: %w", pool.Name, err)
		}
	}
	view := b.raft.State().View()
	for _, vol := range view.VolumesOf(pool.FSID) {
		if !kept[vol.ID] && (seen[vol.ID] || vol.State != state.VolumeActive) {
			continue
		}
		file, err := view.Path(pool.FSID, vol.Ino)
		if err != nil {
			return out, err
		}
		v := RebuiltVolume{VPool: pool.Name, Path: file, ID: vol.ID, State: StateEmpty, Size: vol.Size}
		if info, ok := b.driver.Stat(vol.ID); ok {
			v.State, v.Size, v.Used, v.Seq = StateKept, info.Size, info.Used, info.Accepted
		}
		out = append(out, v)
	}
	return out, nil
}

// clean makes a path that was read from a backend one of a vPool.
func clean(p string) string { return path.Clean("/" + p) }

// name gives a rebuilt volume its file, unless control knows it still, and returns its path.
func (b *base) name(ctx context.Context, pool state.VPool, r volumedriver.Rebuilt) (string, error) {
	view := b.raft.State().View()
	if vol, err := view.Volume(r.ID); err == nil {
		return view.Path(pool.FSID, vol.Ino)
	}
	file := clean(r.Path)
	err := b.makeFile(ctx, pool, file, r)
	if err == nil || ctx.Err() != nil || errors.Is(err, errDoomed) {
		return file, err
	}
	b.cfg.Log.Warn("the name of a rebuilt volume cannot be used", "vpool", pool.Name, "path", file, "volume", r.ID, "err", err)
	file = "/" + lostFound + "/" + r.ID.String() + ".raw"
	return file, b.makeFile(ctx, pool, file, r)
}

// errDoomed: the volume was deleted; its objects are removed when the appliance runs.
var errDoomed = errors.New("it was deleted, and its objects are still being removed")

func (b *base) makeFile(ctx context.Context, pool state.VPool, file string, r volumedriver.Rebuilt) error {
	doomed, _ := b.raft.State().Doomed()
	for _, d := range doomed {
		if d.ID == r.ID {
			return errDoomed
		}
	}
	dir := uint64(state.RootIno)
	for name := range strings.SplitSeq(strings.Trim(path.Dir(file), "/"), "/") {
		if name == "" {
			continue
		}
		have, err := b.raft.State().View().Lookup(pool.FSID, dir, name)
		if err == nil {
			dir = have.Ino
			continue
		}
		res, err := b.raft.Apply(ctx, &state.CreateInode{FSID: pool.FSID, Parent: dir, Name: name, Kind: state.Dir, How: state.Guarded, Mode: 0o755})
		if err != nil {
			return err
		}
		dir = res.Ino
	}
	_, err := b.raft.Apply(ctx, &state.CreateInode{FSID: pool.FSID, Parent: dir, Name: path.Base(file), Kind: state.File,
		How: state.Guarded, Mode: 0o644, Volume: r.ID, Size: r.Size, Epoch: r.Epoch})
	return err
}
