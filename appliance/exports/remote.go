package exports

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"varve/control/peer"
	"varve/control/properties"
	"varve/control/state"
	"varve/control/vdisk"
)

// Remote is the engine of all volumes: what is about another node's volume is asked of that node. What it says of a volume's size and
// clients is at most infoEvery old (package properties); while it does not answer, what it said last counts.
//
//	call: owner of the volume, as this node knows it -> there: wait until its state is as new as the caller's -> its own engine
//
// A node that is asked about a volume that is not its own refuses, as it refuses a client.
//
// In the control unit, which has no engine, the gateway of its own node is one more that is asked (NewDistant).
type Remote struct {
	*Engine // nil in the control unit
	store   *state.Store
	node    uuid.UUID
	peers   *peer.Peers
	sync    func(context.Context) error
	log     *slog.Logger
	told    *properties.Cache
}

// RemoteInfo is what a node says of one of its volumes.
type RemoteInfo struct {
	vdisk.Info
	Known   bool         `json:"known"` // the engine has something of it
	Clients int          `json:"clients"`
	Ledger  vdisk.Ledger `json:"ledger"`
}

const (
	infoEvery      = 2 * time.Second
	infoWait       = 4 * time.Second
	propertyVolume = "volume"
	engineLimit    = 1 << 20
	callInfos      = "engine/infos"
	callEngine     = "engine/"
)

// NewRemote wires it, and answers the other nodes' calls. sync brings this node's state up to date.
func NewRemote(e *Engine, peers *peer.Peers, sync func(context.Context) error, log *slog.Logger) *Remote {
	r := &Remote{Engine: e, store: e.store, node: e.volumes.node, peers: peers, sync: sync, log: log}
	r.answer()
	return r
}

// NewDistant wires it for a process without an engine: peers reaches the one of this node as well.
func NewDistant(store *state.Store, node uuid.UUID, peers *peer.Peers, log *slog.Logger) *Remote {
	return &Remote{store: store, node: node, peers: peers, log: log}
}

// Property is what nodes say of their volumes: NODE/VOLUME, as JSON of RemoteInfo.
func (r *Remote) Property() properties.Property {
	return properties.Property{Name: propertyVolume, TTL: infoEvery, Timeout: infoWait, Owner: NodeOf,
		All: func(ctx context.Context, node string) (map[string]json.RawMessage, error) {
			id, err := uuid.Parse(node)
			if err != nil {
				return nil, err
			}
			var all map[string]json.RawMessage
			if err := r.peers.Call(ctx, id, callInfos, nil, &all); err != nil {
				return nil, err
			}
			out := make(map[string]json.RawMessage, len(all))
			for volume, info := range all {
				out[node+"/"+volume] = info
			}
			return out, nil
		}}
}

// Use sets the cache that has Property, before anything is asked of another node.
func (r *Remote) Use(c *properties.Cache) { r.told = c }

// ObjectOf is the name of what a node says of something, NodeOf the node of such a name.
func ObjectOf(node, of uuid.UUID) string { return node.String() + "/" + of.String() }

// NodeOf is the node that says something of an object.
func NodeOf(object string) string {
	node, _, _ := strings.Cut(object, "/")
	return node
}

// Told is what a volume's owner said last; AsOf says when, where it does not answer now. false: nothing is known of it.
func (r *Remote) Told(node, volume uuid.UUID) (i RemoteInfo, fresh bool) {
	v := r.told.Get(context.Background(), ObjectOf(node, volume), propertyVolume)
	if v.Known && !v.Decode(&i) {
		i = RemoteInfo{}
	}
	if v.Stale {
		i.AsOf = v.At
	}
	return i, !v.Stale && v.Err == ""
}

// refresh asks for one volume at once, after it was changed.
func (r *Remote) refresh(ctx context.Context, node uuid.UUID, vol state.Volume) {
	var i json.RawMessage
	if err := r.peers.Call(ctx, node, callEngine+"info", engineCall{Volume: vol, Index: r.store.Index()}, &i); err != nil {
		return
	}
	if err := r.told.Push(ctx, ObjectOf(node, vol.ID), propertyVolume, i); err != nil {
		r.log.Debug("what a node says of a volume is not kept", "volume", vol.ID, "err", err)
	}
}

// Look is what the owner of a vDisk says of it, who that is, and whether it answers. uuid.Nil: nobody has opened it yet.
func (r *Remote) Look(vol state.Volume) (i RemoteInfo, owner uuid.UUID, known bool) {
	node, away := r.away(vol)
	if !away {
		return r.info(vol), node, true
	}
	i, known = r.Told(node, vol.ID)
	return i, holder(r.store.View(), vol), known
}

// Own is what this node itself knows of a volume.
func (r *Remote) Own(vol state.Volume) RemoteInfo { return r.info(vol) }

// Owner is the node that has a volume's bytes, uuid.Nil where any may take it.
func (r *Remote) Owner(vol state.Volume) uuid.UUID { return holder(r.store.View(), vol) }

// away is the node that is to be asked about a volume, and whether another process than this one is.
func (r *Remote) away(vol state.Volume) (uuid.UUID, bool) {
	node := holder(r.store.View(), vol)
	if r.Engine != nil {
		return node, node != uuid.Nil && node != r.node
	}
	if node == uuid.Nil {
		node = r.node
	}
	return node, true
}

// engineCall is what any of the engine's calls takes.
type engineCall struct {
	Volume state.Volume `json:"volume"`
	// Index is how new the caller's state is.
	Index   uint64               `json:"index"`
	ID      uuid.UUID            `json:"id,omitzero"`
	N       int64                `json:"n,omitempty"`
	Text    string               `json:"text,omitempty"`
	On      bool                 `json:"on,omitempty"`
	Spec    vdisk.SnapshotSpec   `json:"spec,omitzero"`
	Before  vdisk.SnapshotSpec   `json:"before,omitzero"`
	Volumes []state.Volume       `json:"volumes,omitempty"`
	Specs   []vdisk.SnapshotSpec `json:"specs,omitempty"`
}

// ask makes a call of the node that has the volume. changed says that the volume is another one afterwards.
func (r *Remote) ask(ctx context.Context, node uuid.UUID, name string, c engineCall, answer any, changed bool) error {
	c.Index = r.store.Index()
	if err := r.peers.Call(ctx, node, callEngine+name, c, answer); err != nil {
		return err
	}
	if changed {
		r.refresh(ctx, node, c.Volume)
	}
	return nil
}

// answer is the other end of ask.
func (r *Remote) answer() {
	e := r.Engine
	r.peers.Handle(callInfos, 16, func(context.Context, []byte) (any, error) { return r.infos(), nil })
	on := func(name string, f func(ctx context.Context, c engineCall) (any, error)) {
		r.peers.Handle(callEngine+name, engineLimit, func(ctx context.Context, body []byte) (any, error) {
			var c engineCall
			if err := json.Unmarshal(body, &c); err != nil {
				return nil, &state.Error{Err: state.ErrInvalid, Object: "call of the engine", Detail: err.Error()}
			}
			if r.store.Index() < c.Index {
				if err := r.sync(ctx); err != nil {
					return nil, err
				}
			}
			return f(ctx, c)
		})
	}
	nothing := func(err error) (any, error) { return struct{}{}, err }
	on("info", func(_ context.Context, c engineCall) (any, error) { return r.info(c.Volume), nil })
	on("resize", func(ctx context.Context, c engineCall) (any, error) { return nothing(e.Resize(ctx, c.Volume, c.N)) })
	on("renamed", func(ctx context.Context, c engineCall) (any, error) { return nothing(e.Renamed(ctx, c.Volume, "", "")) })
	on("explain", func(ctx context.Context, c engineCall) (any, error) { return e.Explain(ctx, c.Volume, c.N) })
	on("snapshot", func(ctx context.Context, c engineCall) (any, error) { return e.Snapshot(ctx, c.Volume, c.Spec) })
	on("snapshot-group", func(ctx context.Context, c engineCall) (any, error) { return e.SnapshotGroup(ctx, c.Volumes, c.Specs) })
	on("snapshots", func(ctx context.Context, c engineCall) (any, error) { return e.Snapshots(ctx, c.Volume) })
	on("edit-snapshot", func(ctx context.Context, c engineCall) (any, error) {
		return nothing(e.EditSnapshot(ctx, c.Volume, c.ID, func(s *vdisk.SnapshotSpec) error {
			if !sameSpec(*s, c.Before) {
				return &state.Error{Err: state.ErrConflict, Object: "snapshot " + s.Name, Detail: "changed meanwhile", Remedy: "try again"}
			}
			*s = c.Spec
			return nil
		}))
	})
	on("delete-snapshot", func(ctx context.Context, c engineCall) (any, error) {
		return nothing(e.DeleteSnapshot(ctx, c.Volume, c.ID))
	})
	on("snapshot-space", func(ctx context.Context, c engineCall) (any, error) {
		unique, shared, err := e.SnapshotSpace(ctx, c.Volume, c.ID)
		return [2]int64{unique, shared}, err
	})
	on("rollback", func(ctx context.Context, c engineCall) (any, error) {
		return nothing(e.Rollback(ctx, c.Volume, c.ID, c.Spec))
	})
	on("rolled-back", func(ctx context.Context, c engineCall) (any, error) { return e.RolledBack(ctx, c.Volume, c.ID) })
	on("parent", func(ctx context.Context, c engineCall) (any, error) { return e.Parent(ctx, c.Volume) })
	on("clone", func(ctx context.Context, c engineCall) (any, error) { return nothing(e.Clone(ctx, c.Volume)) })
	on("promote", func(ctx context.Context, c engineCall) (any, error) { return e.Promote(ctx, c.Volume) })
	on("template", func(ctx context.Context, c engineCall) (any, error) {
		return nothing(e.SetTemplate(ctx, c.Volume, c.On))
	})
	on("ledger", func(ctx context.Context, c engineCall) (any, error) { return e.Ledger(ctx, c.Volume) })
	on("rewind-range", func(ctx context.Context, c engineCall) (any, error) { return e.RewindRange(ctx, c.Volume) })
	on("wait", func(ctx context.Context, c engineCall) (any, error) {
		return nothing(e.WaitLevel(ctx, c.Volume, c.Text))
	})
}

// sameSpec compares what a change of a snapshot is based on; times as they are on the wire.
func sameSpec(a, b vdisk.SnapshotSpec) bool {
	if !a.Created.Equal(b.Created) {
		return false
	}
	a.Created, b.Created = time.Time{}, time.Time{}
	if len(a.Labels) == 0 && len(b.Labels) == 0 {
		a.Labels, b.Labels = nil, nil
	}
	return reflect.DeepEqual(a, b)
}

func (r *Remote) info(vol state.Volume) RemoteInfo {
	i := RemoteInfo{Clients: r.Engine.Clients(vol.ID)}
	i.Info, i.Known = r.Engine.Info(vol.ID)
	if l, err := r.Engine.Ledger(context.Background(), vol); err == nil { // it reads memory
		i.Ledger = l
	}
	return i
}

// infos tells of all volumes of vDisks that are this node's.
func (r *Remote) infos() map[uuid.UUID]RemoteInfo {
	v := r.store.View()
	out := make(map[uuid.UUID]RemoteInfo)
	for _, p := range v.VPools() {
		for _, d := range v.Disks(p.FSID) {
			if holder(v, d.Volume) == r.node {
				out[d.Volume.ID] = r.info(d.Volume)
			}
		}
	}
	return out
}

// Info implements vdisk.Engine.
func (r *Remote) Info(id uuid.UUID) (vdisk.Info, bool) {
	vol, err := r.store.View().Volume(id)
	if err != nil {
		if r.Engine == nil {
			return vdisk.Info{}, false
		}
		return r.Engine.Info(id)
	}
	node, away := r.away(vol)
	if !away {
		return r.Engine.Info(id)
	}
	i, _ := r.Told(node, id)
	return i.Info, i.Known
}

// Clients implements vdisk.Engine.
func (r *Remote) Clients(id uuid.UUID) int {
	vol, err := r.store.View().Volume(id)
	if err != nil {
		if r.Engine == nil {
			return 0
		}
		return r.Engine.Clients(id)
	}
	node, away := r.away(vol)
	if !away {
		return r.Engine.Clients(id)
	}
	i, _ := r.Told(node, id)
	return i.Clients
}

// Resize implements vdisk.Engine.
func (r *Remote) Resize(ctx context.Context, vol state.Volume, size int64) error {
	if node, away := r.away(vol); away {
		return r.ask(ctx, node, "resize", engineCall{Volume: vol, N: size}, nil, true)
	}
	return r.Engine.Resize(ctx, vol, size)
}

// Renamed implements vdisk.Engine.
func (r *Remote) Renamed(ctx context.Context, vol state.Volume, pool, path string) error {
	if node, away := r.away(vol); away {
		return r.ask(ctx, node, "renamed", engineCall{Volume: vol}, nil, false)
	}
	return r.Engine.Renamed(ctx, vol, pool, path)
}

// Explain implements vdisk.Engine.
func (r *Remote) Explain(ctx context.Context, vol state.Volume, offset int64) (out vdisk.Explanation, err error) {
	if node, away := r.away(vol); away {
		err := r.ask(ctx, node, "explain", engineCall{Volume: vol, N: offset}, &out, false)
		return out, err
	}
	return r.Engine.Explain(ctx, vol, offset)
}

// Snapshot implements vdisk.SnapshotEngine.
func (r *Remote) Snapshot(ctx context.Context, vol state.Volume, s vdisk.SnapshotSpec) (out vdisk.Snapshot, err error) {
	if node, away := r.away(vol); away {
		err := r.ask(ctx, node, "snapshot", engineCall{Volume: vol, Spec: s}, &out, false)
		return out, err
	}
	return r.Engine.Snapshot(ctx, vol, s)
}

// SnapshotGroup implements vdisk.SnapshotEngine. One point in time needs one node.
func (r *Remote) SnapshotGroup(ctx context.Context, vs []state.Volume, s []vdisk.SnapshotSpec) (out []vdisk.Snapshot, err error) {
	var nodes []uuid.UUID
	for _, vol := range vs {
		node, away := r.away(vol)
		if !away {
			node = r.node
		}
		if !slices.Contains(nodes, node) {
			nodes = append(nodes, node)
		}
	}
	switch {
	case len(nodes) == 0:
		return out, nil
	case len(nodes) > 1:
		return nil, &state.Error{Err: state.ErrConflict, Object: "snapshot of a group", Detail: fmt.Sprintf("its vDisks are served by %d nodes", len(nodes)),
			Remedy: "take groups of vDisks that one node serves"}
	case len(nodes) == 1 && (nodes[0] != r.node || r.Engine == nil):
		err := r.ask(ctx, nodes[0], "snapshot-group", engineCall{Volumes: vs, Specs: s}, &out, false)
		return out, err
	}
	return r.Engine.SnapshotGroup(ctx, vs, s)
}

// Snapshots implements vdisk.SnapshotEngine.
func (r *Remote) Snapshots(ctx context.Context, vol state.Volume) (out []vdisk.Snapshot, err error) {
	if node, away := r.away(vol); away {
		err := r.ask(ctx, node, "snapshots", engineCall{Volume: vol}, &out, false)
		return out, err
	}
	return r.Engine.Snapshots(ctx, vol)
}

// EditSnapshot implements vdisk.SnapshotEngine: the change is made here and put there, if nobody has changed it meanwhile.
func (r *Remote) EditSnapshot(ctx context.Context, vol state.Volume, id uuid.UUID, edit func(*vdisk.SnapshotSpec) error) error {
	node, away := r.away(vol)
	if !away {
		return r.Engine.EditSnapshot(ctx, vol, id, edit)
	}
	all, err := r.Snapshots(ctx, vol)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(all, func(s vdisk.Snapshot) bool { return s.ID == id })
	if i < 0 {
		return &state.Error{Err: state.ErrNotFound, Object: "snapshot " + id.String()}
	}
	c := engineCall{Volume: vol, ID: id, Before: all[i].SnapshotSpec}
	b, err := json.Marshal(c.Before) // a copy that shares nothing
	if err == nil {
		err = json.Unmarshal(b, &c.Spec)
	}
	if err != nil {
		return fmt.Errorf("copy snapshot %s: %w", id, err)
	}
	if err := edit(&c.Spec); err != nil {
		return err
	}
	return r.ask(ctx, node, "edit-snapshot", c, nil, false)
}

// DeleteSnapshot implements vdisk.SnapshotEngine.
func (r *Remote) DeleteSnapshot(ctx context.Context, vol state.Volume, id uuid.UUID) error {
	if node, away := r.away(vol); away {
		return r.ask(ctx, node, "delete-snapshot", engineCall{Volume: vol, ID: id}, nil, false)
	}
	return r.Engine.DeleteSnapshot(ctx, vol, id)
}

// SnapshotSpace implements vdisk.SnapshotEngine.
func (r *Remote) SnapshotSpace(ctx context.Context, vol state.Volume, id uuid.UUID) (unique, shared int64, err error) {
	if node, away := r.away(vol); away {
		var both [2]int64
		err := r.ask(ctx, node, "snapshot-space", engineCall{Volume: vol, ID: id}, &both, false)
		return both[0], both[1], err
	}
	return r.Engine.SnapshotSpace(ctx, vol, id)
}

// Rollback implements vdisk.SnapshotEngine.
func (r *Remote) Rollback(ctx context.Context, vol state.Volume, id uuid.UUID, saveAs vdisk.SnapshotSpec) error {
	if node, away := r.away(vol); away {
		return r.ask(ctx, node, "rollback", engineCall{Volume: vol, ID: id, Spec: saveAs}, nil, true)
	}
	return r.Engine.Rollback(ctx, vol, id, saveAs)
}

// RolledBack implements vdisk.SnapshotEngine.
func (r *Remote) RolledBack(ctx context.Context, vol state.Volume, saved uuid.UUID) (done bool, err error) {
	if node, away := r.away(vol); away {
		err := r.ask(ctx, node, "rolled-back", engineCall{Volume: vol, ID: saved}, &done, false)
		return done, err
	}
	return r.Engine.RolledBack(ctx, vol, saved)
}

// Parent implements vdisk.SnapshotEngine.
func (r *Remote) Parent(ctx context.Context, vol state.Volume) (p *state.VolumeParent, err error) {
	if node, away := r.away(vol); away {
		err := r.ask(ctx, node, "parent", engineCall{Volume: vol}, &p, false)
		return p, err
	}
	return r.Engine.Parent(ctx, vol)
}

// Clone implements vdisk.SnapshotEngine.
func (r *Remote) Clone(ctx context.Context, vol state.Volume) error {
	if node, away := r.away(vol); away {
		return r.ask(ctx, node, "clone", engineCall{Volume: vol}, nil, true)
	}
	return r.Engine.Clone(ctx, vol)
}

// SetTemplate implements vdisk.SnapshotEngine.
func (r *Remote) SetTemplate(ctx context.Context, vol state.Volume, on bool) error {
	if node, away := r.away(vol); away {
		return r.ask(ctx, node, "template", engineCall{Volume: vol, On: on}, nil, true)
	}
	return r.Engine.SetTemplate(ctx, vol, on)
}

// Ledger implements vdisk.SnapshotEngine.
func (r *Remote) Ledger(ctx context.Context, vol state.Volume) (out vdisk.Ledger, err error) {
	if node, away := r.away(vol); away {
		err := r.ask(ctx, node, "ledger", engineCall{Volume: vol}, &out, false)
		return out, err
	}
	return r.Engine.Ledger(ctx, vol)
}

// Promote implements vdisk.SnapshotEngine.
func (r *Remote) Promote(ctx context.Context, vol state.Volume) (out []state.NewParent, err error) {
	if node, away := r.away(vol); away {
		err := r.ask(ctx, node, "promote", engineCall{Volume: vol}, &out, true)
		return out, err
	}
	return r.Engine.Promote(ctx, vol)
}

// RewindRange implements vdisk.SnapshotEngine. Flatten and Rewind themselves are tasks of the owner.
func (r *Remote) RewindRange(ctx context.Context, vol state.Volume) (out vdisk.RewindRange, err error) {
	if node, away := r.away(vol); away {
		err := r.ask(ctx, node, "rewind-range", engineCall{Volume: vol}, &out, false)
		return out, err
	}
	return r.Engine.RewindRange(ctx, vol)
}

// WaitLevel implements vdisk.SnapshotEngine.
func (r *Remote) WaitLevel(ctx context.Context, vol state.Volume, level string) error {
	if node, away := r.away(vol); away {
		return r.ask(ctx, node, "wait", engineCall{Volume: vol, Text: level}, nil, false)
	}
	return r.Engine.WaitLevel(ctx, vol, level)
}

// elsewhere is the answer to what only a task of the owner does.
func elsewhere(what string) error {
	return fmt.Errorf("%s: this process has no volume driver", what)
}

// Delete implements vdisk.Engine: it is the owner's own to do.
func (r *Remote) Delete(ctx context.Context, d state.Doomed) error {
	if r.Engine == nil {
		return elsewhere("delete volume")
	}
	return r.Engine.Delete(ctx, d)
}

// Flatten implements vdisk.SnapshotEngine: it is a task of the owner's.
func (r *Remote) Flatten(ctx context.Context, vol state.Volume, progress func(done, total int64)) error {
	if r.Engine == nil {
		return elsewhere("flatten volume")
	}
	return r.Engine.Flatten(ctx, vol, progress)
}

// Rewind implements vdisk.SnapshotEngine: it is a task of the owner's.
func (r *Remote) Rewind(ctx context.Context, vol state.Volume, at time.Time, s vdisk.SnapshotSpec, progress func(done, total int64)) (vdisk.Snapshot, error) {
	if r.Engine == nil {
		return vdisk.Snapshot{}, elsewhere("rewind volume")
	}
	return r.Engine.Rewind(ctx, vol, at, s, progress)
}

var _ vdisk.Engine = (*Remote)(nil)
