// Package upkeep is what a cluster does by itself at its times: automatic snapshots, their retention, scrubbing, verifying,
// and the checks that raise alerts. Each is a type of task; package schedule starts them.
//
// # Where a task runs
//
// A volume's snapshots and its storage are its owner's. So a scheduled task (any node) finds the owners of the vDisks of its
// scope and queues one task on each owner's node; that one does the work for the volumes that are its own by then. A node
// that is away leaves its task waiting, and further ones join that.
//
//	snapshot.automatic  -> snapshot.node      one snapshot of each vDisk that is no template
//	snapshot.retention  -> retention.node     retention.Plan by each vDisk's policy, removed oldest first
//	vpool.scrub         -> scrub.node         one pass per vPool down to the policy's space overhead
//	vpool.verify        -> verify.node        each vPool's turn comes once in the policy's days
//	vpool.verify.now                          one vPool, when somebody asks
//	cluster.orphans     -> audit.node         the backend's list against the volumes
//	cluster.health      -> health.node        local checks -> alerts
//	cluster.reality     -> reality.node       the state's volumes against the engine's -> alerts
//	cluster.certificates-> certificates.node
//
// # Once
//
// An automatic snapshot's id and name follow from its vDisk and the time it was due, so a task that is delivered again adds
// none. Removal and scrubbing are idempotent by nature.
//
// Nothing is skipped in silence: a vDisk that could not be snapshotted is an event (snapshot_skipped), a line of the task's
// log, and makes the task fail when the others are done.
package upkeep

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"varve/control/events"
	"varve/control/jobs"
	"varve/control/policy"
	"varve/control/retention"
	"varve/control/schedule"
	"varve/control/state"
)

// Proposer commits a command and returns what it did. raft.Node is one.
type Proposer interface {
	Apply(ctx context.Context, cmd state.Command) (state.Result, error)
}

// Engine is what upkeep needs of this node's volume driver. Errors that are acted upon are state's: ErrExist, ErrNotFound,
// ErrConflict.
type Engine interface {
	// Template says that a volume takes no writes.
	Template(v state.Volume) bool
	// Snapshots lists them, oldest first.
	Snapshots(ctx context.Context, v state.Volume) ([]retention.Snapshot, error)
	// Snapshot takes an automatic one.
	Snapshot(ctx context.Context, v state.Volume, id uuid.UUID, name string, at time.Time) error
	DeleteSnapshot(ctx context.Context, v state.Volume, id uuid.UUID) error
	// Scrub makes one pass over what this node has of a vPool.
	Scrub(ctx context.Context, pool uuid.UUID, o ScrubOptions) (ScrubReport, error)
	// Has says whether the driver has a volume.
	Has(volume uuid.UUID) bool
}

// ScrubOptions say what a pass does.
type ScrubOptions struct {
	// OverheadPercent is the space overhead to reclaim down to: 35 is 1.35x.
	OverheadPercent int
	Verify          bool
	Audit           bool
}

// ScrubReport is what a pass found and did.
type ScrubReport struct {
	HeldBytes   int64 `json:"held_bytes"`
	LiveBytes   int64 `json:"live_bytes"`
	MovedBytes  int64 `json:"moved_bytes"`
	FreedBytes  int64 `json:"freed_bytes"`
	Deleted     int   `json:"deleted"`
	Orphans     int   `json:"orphans"`
	OrphanBytes int64 `json:"orphan_bytes"`
	// Unknown counts objects of volumes that this node does not have: another node's, or nobody's.
	Unknown      int      `json:"unknown"`
	Verified     int      `json:"verified"`
	VerifyErrors []string `json:"verify_errors,omitempty"`
}

// Publisher takes events without waiting; events.Publisher is one.
type Publisher interface {
	Emit(typ, topic, key string, data any)
}

// Config wires the tasks.
type Config struct {
	Raft   Proposer
	Store  *state.Store
	Node   uuid.UUID
	Engine Engine
	Events Publisher
	// Health finds what is wrong with this node.
	Health func(ctx context.Context) []state.AlertSpec
	// Renew makes new certificates where they are due.
	Renew func(ctx context.Context) error
	Log   *slog.Logger
	Now   func() time.Time
}

// Upkeep does the tasks of a node.
type Upkeep struct{ cfg Config }

// New wires it and starts nothing.
func New(cfg Config) *Upkeep {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Upkeep{cfg: cfg}
}

// volumesAtOnce bounds how many volumes a task works on at a time.
const (
	volumesAtOnce = 16
	failuresNamed = 5
)

// VerifyTask reads all checksums of the vPool that its arguments name alone (schedule.Args, Only), as far as they are its node's.
const VerifyTask = "vpool.verify.now"

// Types are the types of task that upkeep does.
func (u *Upkeep) Types() []jobs.Type {
	parent := func(name, title, child, consequence string) jobs.Type {
		return jobs.Type{Name: name, Title: title, Queue: state.QueueGeneric, Ensure: state.EnsureDeduped, Consequence: consequence,
			Remedy: "look at the cluster's health and retry the task",
			Do:     func(ctx context.Context, r *jobs.Run) error { return u.spread(ctx, r, child) }}
	}
	child := func(name, title string, do jobs.Handler, consequence, remedy string) jobs.Type {
		return jobs.Type{Name: name, Title: title, Ensure: state.EnsureDeduped, Consequence: consequence, Remedy: remedy, Do: do}
	}
	const noSnapshots = "these vDisks have no snapshot of this time; their older ones are untouched"
	const noRemoval = "old snapshots stay and hold space"
	const noScrub = "dead blocks stay and hold space; no data is at risk"
	const noVerify = "it is not known whether all data of this vPool can be read"
	const noCheck = "problems of this node may not be shown"
	return []jobs.Type{
		parent("snapshot.automatic", "snapshots of all vDisks of a schedule", "snapshot.node", noSnapshots),
		child("snapshot.node", "automatic snapshots on a node", u.snapshots, noSnapshots, "mend what the task's log names, then retry the task"),
		parent("snapshot.retention", "removal of automatic snapshots by policy", "retention.node", noRemoval),
		child("retention.node", "removal of automatic snapshots on a node", u.retain, noRemoval, "mend what the task's log names, then retry the task"),
		parent("vpool.scrub", "reclaiming dead blocks", "scrub.node", noScrub),
		child("scrub.node", "reclaiming dead blocks on a node", u.scrub, noScrub, "check that the backend answers and has room"),
		parent("vpool.verify", "reading checksums", "verify.node", noVerify),
		child("verify.node", "reading checksums on a node", u.verify, noVerify, "check that the backend answers, then retry the task"),
		child(VerifyTask, "reading all checksums of a vPool on a node", u.verify, noVerify, "check that the backend answers, then retry the task"),
		parent("cluster.orphans", "audit of the backends", "audit.node", noScrub),
		child("audit.node", "audit of the backends on a node", u.audit, noScrub, "check that the backend answers"),
		parent("cluster.health", "health check", "health.node", noCheck),
		child("health.node", "health check of a node", u.health, noCheck, "look at the node's log"),
		parent("cluster.reality", "state against reality", "reality.node", noCheck),
		child("reality.node", "state against reality on a node", u.reality, noCheck, "look at the node's log"),
		parent("cluster.certificates", "renewal of certificates", "certificates.node", "certificates end, then nodes and clients refuse each other"),
		child("certificates.node", "renewal of a node's certificates", u.certificates, "its certificates end, then others refuse this node",
			"check that a master with the authority's key can be reached"),
	}
}

// perVolume are the children whose work is some volumes' owner's, not every node's.
var perVolume = []string{"snapshot.node", "retention.node"}

// spread queues a child on every node that has to do with the scope.
func (u *Upkeep) spread(ctx context.Context, r *jobs.Run, child string) error {
	var args schedule.Args
	if err := r.Args(&args); err != nil {
		return err
	}
	v := u.cfg.Store.View()
	nodes := make(map[uuid.UUID]bool)
	if slices.Contains(perVolume, child) {
		for _, vol := range schedule.Members(v, args.Schedule, args.Scope) {
			nodes[u.ownerOf(v, vol)] = true
		}
	} else {
		for _, n := range v.Nodes() {
			if !n.Offline {
				nodes[n.ID] = true
			}
		}
	}
	for _, node := range slices.SortedFunc(mapsKeys(nodes), func(a, b uuid.UUID) int { return slices.Compare(a[:], b[:]) }) {
		// Of one schedule and scope a node has one task waiting at most: what is missed becomes one.
		spec, err := jobs.Type{Name: child, Queue: state.QueueOf(node), Ensure: state.EnsureSingle}.Spec(args.Scope.Kind, "task "+r.ID().String(), args)
		if err != nil {
			return err
		}
		spec.Key = fmt.Sprintf("%s %s %s %s %s", child, node, args.Schedule, args.Scope.Kind, args.Scope.ID)
		res, err := u.cfg.Raft.Apply(ctx, &state.SubmitTask{ID: uuid.NewSHA1(r.ID(), fmt.Appendf(nil, "%s %d", node, r.Task().Serial)), Spec: spec})
		if err != nil {
			return &jobs.Retry{Err: fmt.Errorf("queue %s on node %s: %w", child, node, err)}
		}
		r.Log("node %s: task %s", node, res.Object)
	}
	return r.Result(map[string]int{"nodes": len(nodes)})
}

// ownerOf is the node that works on a volume: its owner, and for one that has none yet, or one that is gone, this node.
func (u *Upkeep) ownerOf(v *state.View, vol state.Volume) uuid.UUID {
	if _, err := v.Node(vol.Owner); err != nil {
		return u.cfg.Node
	}
	return vol.Owner
}

// own returns the volumes of a task's scope that are this node's to work on.
func (u *Upkeep) own(r *jobs.Run) (*state.View, schedule.Args, []state.Volume, error) {
	var args schedule.Args
	if err := r.Args(&args); err != nil {
		return nil, args, nil, err
	}
	v := u.cfg.Store.View()
	all := schedule.Members(v, args.Schedule, args.Scope)
	mine := all[:0]
	for _, vol := range all {
		if u.ownerOf(v, vol) == u.cfg.Node {
			mine = append(mine, vol)
		}
	}
	return v, args, mine, nil
}

// pathOf is a vDisk's name for people.
func pathOf(v *state.View, vol state.Volume) string {
	pool, err := v.VPoolByID(vol.Pool)
	if err != nil {
		return vol.ID.String()
	}
	path, err := v.Path(vol.FSID, vol.Ino)
	if err != nil {
		return vol.ID.String()
	}
	name, _ := state.DiskName(path)
	return pool.Name + "/" + name
}

// each calls do for some volumes at a time, and returns the failures. It stops at the task's end.
func each(ctx context.Context, r *jobs.Run, volumes []state.Volume, do func(ctx context.Context, vol state.Volume) error) (failed map[uuid.UUID]error) {
	var mu sync.Mutex
	failed = make(map[uuid.UUID]error)
	done := int64(0)
	next := make(chan state.Volume)
	var wg sync.WaitGroup
	for range min(volumesAtOnce, len(volumes)) {
		wg.Go(func() {
			for vol := range next {
				err := do(ctx, vol)
				mu.Lock()
				if err != nil {
					failed[vol.ID] = err
				}
				done++
				r.Progress(done, int64(len(volumes)))
				mu.Unlock()
			}
		})
	}
	for _, vol := range volumes {
		if ctx.Err() != nil {
			break
		}
		next <- vol
	}
	close(next)
	wg.Wait()
	return failed
}

// failure is the task's error for volumes that failed, after the others were done.
func failure(ctx context.Context, r *jobs.Run, v *state.View, volumes []state.Volume, failed map[uuid.UUID]error, what string) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if len(failed) == 0 {
		return nil
	}
	var first error
	for _, vol := range volumes {
		err, ok := failed[vol.ID]
		if !ok {
			continue
		}
		if first == nil {
			first = fmt.Errorf("%d of %d vDisks %s, the first %s: %w", len(failed), len(volumes), what, pathOf(v, vol), err)
		}
		r.Log("%s: %v", pathOf(v, vol), err)
	}
	return first
}

// snapshotID is an automatic snapshot's: it follows from its volume and the time it was due.
func snapshotID(volume uuid.UUID, due time.Time) uuid.UUID {
	return uuid.NewSHA1(volume, []byte("automatic snapshot "+due.UTC().Format(time.RFC3339)))
}

// SnapshotName is what an automatic snapshot is called.
func SnapshotName(due time.Time) string { return "auto-" + due.UTC().Format("2006-01-02T15:04:05Z") }

func (u *Upkeep) snapshots(ctx context.Context, r *jobs.Run) error {
	v, args, volumes, err := u.own(r)
	if err != nil {
		return err
	}
	due := time.Unix(0, int64(args.Due))
	var mu sync.Mutex
	taken, templates := 0, 0
	failed := each(ctx, r, volumes, func(ctx context.Context, vol state.Volume) error {
		if u.cfg.Engine.Template(vol) {
			mu.Lock()
			defer mu.Unlock()
			templates++
			return nil
		}
		id, name := snapshotID(vol.ID, due), SnapshotName(due)
		err := u.cfg.Engine.Snapshot(ctx, vol, id, name, u.cfg.Now())
		switch {
		case errors.Is(err, state.ErrExist):
			return nil // this task was delivered before
		case err != nil:
			if _, gone := u.cfg.Store.View().Volume(vol.ID); gone != nil {
				return nil // deleted meanwhile
			}
			if ctx.Err() == nil {
				u.cfg.Events.Emit(events.SnapshotSkipped, events.TopicSnapshot, vol.ID.String(),
					map[string]string{"vdisk": pathOf(v, vol), "snapshot": name, "cause": cut(err.Error())})
			}
			return err
		}
		u.cfg.Events.Emit(events.SnapshotCreate, events.TopicSnapshot, vol.ID.String(),
			map[string]any{"vdisk": pathOf(v, vol), "snapshot": name, "id": id, "automatic": true})
		mu.Lock()
		defer mu.Unlock()
		taken++
		return nil
	})
	if err := r.Result(map[string]int{"taken": taken, "templates": templates, "failed": len(failed)}); err != nil {
		return err
	}
	return failure(ctx, r, v, volumes, failed, "have no snapshot")
}

func cut(s string) string {
	const most = 1000
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}

func (u *Upkeep) retain(ctx context.Context, r *jobs.Run) error {
	v, _, volumes, err := u.own(r)
	if err != nil {
		return err
	}
	now := u.cfg.Now()
	var mu sync.Mutex
	removed, kept := 0, 0
	failed := each(ctx, r, volumes, func(ctx context.Context, vol state.Volume) error {
		p := policy.OfVDisk(v, vol)
		zone, err := p.Location()
		if err != nil {
			return err
		}
		have, err := u.cfg.Engine.Snapshots(ctx, vol)
		if err != nil {
			return err
		}
		keep, remove := retention.Plan(now, zone, p.Retention.Value, have)
		for _, s := range remove {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			err := u.cfg.Engine.DeleteSnapshot(ctx, vol, s.ID)
			switch {
			case errors.Is(err, state.ErrNotFound):
				continue
			case errors.Is(err, state.ErrConflict):
				r.Log("%s@%s stays, it is in use", pathOf(v, vol), s.Name) // a clone that came meanwhile
				continue
			case err != nil:
				return fmt.Errorf("remove snapshot %s: %w", s.Name, err)
			}
			u.cfg.Events.Emit(events.SnapshotDelete, events.TopicSnapshot, vol.ID.String(),
				map[string]any{"vdisk": pathOf(v, vol), "snapshot": s.Name, "id": s.ID, "reason": s.Reason})
			mu.Lock()
			removed++
			mu.Unlock()
		}
		mu.Lock()
		kept += len(keep)
		mu.Unlock()
		return nil
	})
	if err := r.Result(map[string]int{"removed": removed, "kept": kept, "failed": len(failed)}); err != nil {
		return err
	}
	return failure(ctx, r, v, volumes, failed, "keep old snapshots")
}

// Plan shows what retention would do to a vDisk now.
func (u *Upkeep) Plan(ctx context.Context, volume uuid.UUID) (keep, remove []retention.Decision, err error) {
	v := u.cfg.Store.View()
	vol, err := v.Volume(volume)
	if err != nil {
		return nil, nil, err
	}
	p := policy.OfVDisk(v, vol)
	zone, err := p.Location()
	if err != nil {
		return nil, nil, err
	}
	have, err := u.cfg.Engine.Snapshots(ctx, vol)
	if err != nil {
		return nil, nil, fmt.Errorf("snapshots of vdisk %s: %w", pathOf(v, vol), err)
	}
	keep, remove = retention.Plan(u.cfg.Now(), zone, p.Retention.Value, have)
	return keep, remove, nil
}
