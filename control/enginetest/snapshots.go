package enginetest

import (
	"context"
	"slices"
	"time"

	"github.com/google/uuid"

	"varve/control/state"
	"varve/control/vdisk"
)

// snapshots of one volume, and whether it is a template.
type volume struct {
	snaps    []vdisk.Snapshot
	template bool
	seq      uint64
	parent   *state.VolumeParent

	rolledBack []uuid.UUID // by what was kept
}

func (e *Engine) volumeLocked(id uuid.UUID) *volume {
	if e.family == nil {
		e.family = make(map[uuid.UUID]*volume)
	}
	if e.family[id] == nil {
		e.family[id] = &volume{}
	}
	return e.family[id]
}

// Snapshot implements vdisk.SnapshotEngine.
func (e *Engine) Snapshot(_ context.Context, v state.Volume, s vdisk.SnapshotSpec) (vdisk.Snapshot, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.fail["Snapshot"]; err != nil {
		return vdisk.Snapshot{}, err
	}
	return e.snapshotLocked(v, s)
}

func (e *Engine) snapshotLocked(v state.Volume, s vdisk.SnapshotSpec) (vdisk.Snapshot, error) {
	of := e.volumeLocked(v.ID)
	for _, have := range of.snaps {
		if have.Name == s.Name || have.ID == s.ID {
			return vdisk.Snapshot{}, &state.Error{Err: state.ErrExist, Object: "snapshot " + s.Name}
		}
	}
	of.seq++
	size := v.Size
	if i, ok := e.volumes[v.ID]; ok {
		size = i.Size
	}
	out := vdisk.Snapshot{SnapshotSpec: s, Seq: of.seq, Size: size, Backed: true}
	of.snaps = append(of.snaps, out)
	return out, nil
}

// SnapshotGroup implements vdisk.SnapshotEngine.
func (e *Engine) SnapshotGroup(_ context.Context, vs []state.Volume, s []vdisk.SnapshotSpec) ([]vdisk.Snapshot, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.fail["SnapshotGroup"]; err != nil {
		return nil, err
	}
	var out []vdisk.Snapshot
	for i, v := range vs {
		one, err := e.snapshotLocked(v, s[i])
		if err != nil {
			return nil, err
		}
		out = append(out, one)
	}
	return out, nil
}

// Snapshots implements vdisk.SnapshotEngine.
func (e *Engine) Snapshots(_ context.Context, v state.Volume) ([]vdisk.Snapshot, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.fail["Snapshots"]; err != nil {
		return nil, err
	}
	out := slices.Clone(e.volumeLocked(v.ID).snaps)
	for i := range out {
		for _, of := range e.family {
			if of.parent != nil && of.parent.Snapshot == out[i].ID {
				out[i].Clones++
			}
		}
	}
	return out, nil
}

func (e *Engine) atLocked(v state.Volume, id uuid.UUID) (*volume, int, error) {
	of := e.volumeLocked(v.ID)
	i := slices.IndexFunc(of.snaps, func(s vdisk.Snapshot) bool { return s.ID == id })
	if i < 0 {
		return of, i, &state.Error{Err: state.ErrNotFound, Object: "snapshot " + id.String()}
	}
	return of, i, nil
}

// EditSnapshot implements vdisk.SnapshotEngine.
func (e *Engine) EditSnapshot(_ context.Context, v state.Volume, id uuid.UUID, edit func(*vdisk.SnapshotSpec) error) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	of, i, err := e.atLocked(v, id)
	if err != nil {
		return err
	}
	now := of.snaps[i].SnapshotSpec
	if err := edit(&now); err != nil {
		return err
	}
	of.snaps[i].SnapshotSpec = now
	return nil
}

// DeleteSnapshot implements vdisk.SnapshotEngine.
func (e *Engine) DeleteSnapshot(_ context.Context, v state.Volume, id uuid.UUID) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.fail["DeleteSnapshot"]; err != nil {
		return err
	}
	of, i, err := e.atLocked(v, id)
	if err != nil {
		return err
	}
	of.snaps = slices.Delete(of.snaps, i, i+1)
	return nil
}

// SnapshotSpace implements vdisk.SnapshotEngine.
func (e *Engine) SnapshotSpace(_ context.Context, v state.Volume, id uuid.UUID) (unique, shared int64, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	_, _, err = e.atLocked(v, id)
	return 4096, 8192, err
}

// Rollback implements vdisk.SnapshotEngine.
func (e *Engine) Rollback(_ context.Context, v state.Volume, id uuid.UUID, saveAs vdisk.SnapshotSpec) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.fail["Rollback"]; err != nil {
		return err
	}
	if _, _, err := e.atLocked(v, id); err != nil {
		return err
	}
	if _, err := e.snapshotLocked(v, saveAs); err != nil {
		return err
	}
	if err := e.fail["RollbackMark"]; err != nil { // what the volume was is kept, and it is that still
		return err
	}
	of := e.volumeLocked(v.ID)
	of.rolledBack = append(of.rolledBack, saveAs.ID)
	return nil
}

// RolledBack implements vdisk.SnapshotEngine.
func (e *Engine) RolledBack(_ context.Context, v state.Volume, saved uuid.UUID) (bool, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	of, _, err := e.atLocked(v, saved)
	return err == nil && slices.Contains(of.rolledBack, saved), err
}

// RolledBackTimes says how often a volume was rolled back.
func (e *Engine) RolledBackTimes(id uuid.UUID) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.volumeLocked(id).rolledBack)
}

// Parent implements vdisk.SnapshotEngine.
func (e *Engine) Parent(_ context.Context, v state.Volume) (*state.VolumeParent, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.volumeLocked(v.ID).parent, nil
}

// SetParent is what a rollback makes of a volume's parent.
func (e *Engine) SetParent(id uuid.UUID, p *state.VolumeParent) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.volumeLocked(id).parent = p
}

// Clone implements vdisk.SnapshotEngine.
func (e *Engine) Clone(_ context.Context, v state.Volume) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.fail["Clone"]; err != nil {
		return err
	}
	e.volumeLocked(v.ID).parent = v.Parent
	return nil
}

// SetTemplate implements vdisk.SnapshotEngine.
func (e *Engine) SetTemplate(_ context.Context, v state.Volume, on bool) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.volumeLocked(v.ID).template = on
	if e.volumes == nil {
		e.volumes = make(map[uuid.UUID]vdisk.Info)
	}
	i, ok := e.volumes[v.ID]
	if !ok {
		i.Size = v.Size
	}
	i.Template = on
	e.volumes[v.ID] = i
	return nil
}

// Ledger implements vdisk.SnapshotEngine.
func (e *Engine) Ledger(_ context.Context, v state.Volume) (vdisk.Ledger, error) {
	return vdisk.Ledger{Accepted: 9, Logged: 9, Backed: 7, UnbackedBytes: 8192}, nil
}

// WaitLevel implements vdisk.SnapshotEngine.
func (e *Engine) WaitLevel(context.Context, state.Volume, string) error { return nil }

// Flatten implements vdisk.SnapshotEngine.
func (e *Engine) Flatten(_ context.Context, v state.Volume, progress func(done, total int64)) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.fail["Flatten"]; err != nil {
		return err
	}
	of := e.volumeLocked(v.ID)
	if len(of.snaps) > 0 {
		return &state.Error{Err: state.ErrConflict, Object: "volume " + v.ID.String(), Detail: "its snapshots need the parent"}
	}
	progress(1, 1)
	of.parent = nil
	return nil
}

// Promote implements vdisk.SnapshotEngine, for a family of two.
func (e *Engine) Promote(_ context.Context, v state.Volume) ([]state.NewParent, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.fail["Promote"]; err != nil {
		return nil, err
	}
	of, old := e.volumeLocked(v.ID), e.volumeLocked(v.Parent.Volume)
	i := slices.IndexFunc(old.snaps, func(s vdisk.Snapshot) bool { return s.ID == v.Parent.Snapshot })
	if i < 0 {
		return nil, &state.Error{Err: state.ErrNotFound, Object: "snapshot " + v.Parent.Snapshot.String()}
	}
	of.snaps, old.snaps = append(slices.Clone(old.snaps[:i+1]), of.snaps...), slices.Clone(old.snaps[i+1:])
	of.parent, old.parent = old.parent, &state.VolumeParent{Volume: v.ID, Snapshot: v.Parent.Snapshot}
	return []state.NewParent{{Volume: v.ID, Parent: of.parent}, {Volume: v.Parent.Volume, Parent: old.parent}}, nil
}

// Rewind implements vdisk.SnapshotEngine. The window is an hour.
func (e *Engine) Rewind(_ context.Context, v state.Volume, at time.Time, s vdisk.SnapshotSpec, progress func(done, total int64)) (vdisk.Snapshot, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.fail["Rewind"]; err != nil {
		return vdisk.Snapshot{}, err
	}
	if time.Since(at) > time.Hour {
		return vdisk.Snapshot{}, &state.Error{Err: state.ErrInvalid, Object: "volume " + v.ID.String(), Detail: "before its window"}
	}
	progress(1, 1)
	return e.snapshotLocked(v, s)
}

// RewindRange implements vdisk.SnapshotEngine.
func (e *Engine) RewindRange(context.Context, state.Volume) (vdisk.RewindRange, error) {
	return vdisk.RewindRange{From: time.Now().Add(-time.Hour), Window: time.Hour}, nil
}

// Rekey implements vpool.Engine.
func (e *Engine) Rekey(_ context.Context, _ uuid.UUID, progress func(done, total int64)) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.fail["Rekey"]; err != nil {
		return err
	}
	progress(1, 1)
	return nil
}
