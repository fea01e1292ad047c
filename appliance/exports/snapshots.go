package exports

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

	"varve/control/state"
	"varve/control/vdisk"
	"varve/volumedriver"
	"varve/volumedriver/blockio"
)

// spoken gives an error of the driver the words of control, for exit codes and HTTP statuses.
func spoken(object string, err error) error {
	for _, w := range []struct {
		from, to error
		remedy   string
	}{
		{volumedriver.ErrUnknownSnapshot, state.ErrNotFound, ""},
		{volumedriver.ErrSnapshotExists, state.ErrExist, ""},
		{volumedriver.ErrInUse, state.ErrConflict, ""},
		{volumedriver.ErrTakenOver, state.ErrConflict, "clone the snapshot and use the clone: a vDisk is rolled back only to what was taken of itself"},
		{blockio.ErrReadOnly, state.ErrConflict, ""},
		{blockio.ErrBusy, state.ErrConflict, ""},
		{volumedriver.ErrRewind, state.ErrInvalid, ""},
		{volumedriver.ErrNoParent, state.ErrConflict, ""},
	} {
		if errors.Is(err, w.from) {
			return &state.Error{Err: w.to, Object: object, Detail: err.Error(), Remedy: w.remedy}
		}
	}
	return err
}

// with opens a volume for one call.
func (e *Engine) with(ctx context.Context, vol state.Volume, do func(*volumedriver.Volume) error) error {
	v, release, err := e.volumes.Open(ctx, vol.ID)
	if err != nil {
		return err
	}
	defer release()
	return spoken("volume "+vol.ID.String(), do(v))
}

func specFor(s vdisk.SnapshotSpec) volumedriver.SnapshotSpec {
	return volumedriver.SnapshotSpec{ID: s.ID, Name: s.Name, Created: s.Created, Consistent: s.Consistent, Automatic: s.Automatic,
		Sticky: s.Sticky, Labels: s.Labels}
}

func specFrom(s volumedriver.SnapshotSpec) vdisk.SnapshotSpec {
	return vdisk.SnapshotSpec{ID: s.ID, Name: s.Name, Created: s.Created, Consistent: s.Consistent, Automatic: s.Automatic,
		Sticky: s.Sticky, Labels: s.Labels}
}

func snapshotFrom(s volumedriver.Snapshot) vdisk.Snapshot {
	return vdisk.Snapshot{SnapshotSpec: specFrom(s.SnapshotSpec), Seq: s.Seq, Size: s.Size, Used: s.Used, Backed: s.Backed, Clones: s.Clones}
}

// Snapshot implements vdisk.SnapshotEngine.
func (e *Engine) Snapshot(ctx context.Context, vol state.Volume, s vdisk.SnapshotSpec) (out vdisk.Snapshot, err error) {
	err = e.with(ctx, vol, func(v *volumedriver.Volume) error {
		got, err := v.Snapshot(ctx, specFor(s))
		out = snapshotFrom(got)
		return err
	})
	return out, err
}

// SnapshotGroup implements vdisk.SnapshotEngine.
func (e *Engine) SnapshotGroup(ctx context.Context, vs []state.Volume, s []vdisk.SnapshotSpec) ([]vdisk.Snapshot, error) {
	group := make([]volumedriver.GroupMember, len(vs))
	for i, vol := range vs {
		_, release, err := e.volumes.Open(ctx, vol.ID)
		if err != nil {
			return nil, err
		}
		defer release()
		group[i] = volumedriver.GroupMember{Volume: vol.ID, Spec: specFor(s[i])}
	}
	got, err := e.volumes.driver.SnapshotGroup(ctx, group)
	if err != nil {
		return nil, spoken("snapshot of a group", err)
	}
	out := make([]vdisk.Snapshot, len(got))
	for i := range got {
		out[i] = snapshotFrom(got[i])
	}
	return out, nil
}

// Snapshots implements vdisk.SnapshotEngine. A volume that was never opened has none.
func (e *Engine) Snapshots(ctx context.Context, vol state.Volume) (out []vdisk.Snapshot, err error) {
	if _, ok := e.volumes.Info(vol.ID); !ok && vol.Parent == nil {
		return nil, nil
	}
	err = e.with(ctx, vol, func(v *volumedriver.Volume) error {
		for _, s := range v.Snapshots() {
			out = append(out, snapshotFrom(s))
		}
		return nil
	})
	return out, err
}

// EditSnapshot implements vdisk.SnapshotEngine.
func (e *Engine) EditSnapshot(ctx context.Context, vol state.Volume, id uuid.UUID, edit func(*vdisk.SnapshotSpec) error) error {
	return e.with(ctx, vol, func(v *volumedriver.Volume) error {
		return v.EditSnapshot(ctx, id, func(s *volumedriver.SnapshotSpec) error {
			now := specFrom(*s)
			if err := edit(&now); err != nil {
				return err
			}
			*s = specFor(now)
			return nil
		})
	})
}

// DeleteSnapshot implements vdisk.SnapshotEngine.
func (e *Engine) DeleteSnapshot(ctx context.Context, vol state.Volume, id uuid.UUID) error {
	return e.with(ctx, vol, func(v *volumedriver.Volume) error { return v.DeleteSnapshot(ctx, id) })
}

// SnapshotSpace implements vdisk.SnapshotEngine.
func (e *Engine) SnapshotSpace(ctx context.Context, vol state.Volume, id uuid.UUID) (unique, shared int64, err error) {
	err = e.with(ctx, vol, func(v *volumedriver.Volume) error {
		unique, shared, err = v.SnapshotSpace(ctx, id)
		return err
	})
	return unique, shared, err
}

// Rollback implements vdisk.SnapshotEngine.
func (e *Engine) Rollback(ctx context.Context, vol state.Volume, id uuid.UUID, saveAs vdisk.SnapshotSpec) error {
	return e.with(ctx, vol, func(v *volumedriver.Volume) error { return v.Rollback(ctx, id, specFor(saveAs)) })
}

// RolledBack implements vdisk.SnapshotEngine.
func (e *Engine) RolledBack(ctx context.Context, vol state.Volume, saved uuid.UUID) (done bool, err error) {
	err = e.with(ctx, vol, func(v *volumedriver.Volume) error {
		done, err = v.RolledBack(ctx, saved)
		return err
	})
	return done, err
}

// Parent implements vdisk.SnapshotEngine.
func (e *Engine) Parent(ctx context.Context, vol state.Volume) (p *state.VolumeParent, err error) {
	err = e.with(ctx, vol, func(v *volumedriver.Volume) error {
		l, err := e.volumes.driver.Lineage(ctx, v)
		p = parentOf(l)
		return err
	})
	return p, err
}

func parentOf(l volumedriver.Lineage) *state.VolumeParent {
	if l.Parent == uuid.Nil {
		return nil
	}
	return &state.VolumeParent{Volume: l.Parent, Snapshot: l.Snapshot}
}

// Flatten implements vdisk.SnapshotEngine.
func (e *Engine) Flatten(ctx context.Context, vol state.Volume, progress func(done, total int64)) error {
	return e.with(ctx, vol, func(v *volumedriver.Volume) error { return e.volumes.driver.Flatten(ctx, v, progress) })
}

// Promote implements vdisk.SnapshotEngine.
func (e *Engine) Promote(ctx context.Context, vol state.Volume) (out []state.NewParent, err error) {
	from := uuid.Nil
	if vol.Parent != nil {
		from = vol.Parent.Snapshot
	}
	err = e.with(ctx, vol, func(v *volumedriver.Volume) error {
		lines, err := e.volumes.driver.Promote(ctx, v, from)
		for _, l := range lines {
			out = append(out, state.NewParent{Volume: l.Volume, Parent: parentOf(l)})
		}
		return err
	})
	return out, err
}

// Rewind implements vdisk.SnapshotEngine.
func (e *Engine) Rewind(ctx context.Context, vol state.Volume, at time.Time, s vdisk.SnapshotSpec, progress func(done, total int64)) (out vdisk.Snapshot, err error) {
	err = e.with(ctx, vol, func(v *volumedriver.Volume) error {
		got, err := v.Rewind(ctx, at, specFor(s), progress)
		out = snapshotFrom(got)
		return err
	})
	return out, err
}

// RewindRange implements vdisk.SnapshotEngine.
func (e *Engine) RewindRange(ctx context.Context, vol state.Volume) (out vdisk.RewindRange, err error) {
	err = e.with(ctx, vol, func(v *volumedriver.Volume) error {
		out.From, out.Window = v.RewindRange()
		return nil
	})
	if s, ok := e.volumes.driver.SpaceOf(vol.ID); ok {
		out.History = s.History
	}
	return out, err
}

// Clone implements vdisk.SnapshotEngine: opening makes it. The parent has to be open here for that.
func (e *Engine) Clone(ctx context.Context, vol state.Volume) error {
	if vol.Parent == nil {
		return fmt.Errorf("clone volume %s: it has no parent", vol.ID)
	}
	_, release, err := e.volumes.Open(ctx, vol.Parent.Volume)
	if err != nil {
		return err
	}
	defer release()
	return e.with(ctx, vol, func(*volumedriver.Volume) error { return nil })
}

// SetTemplate implements vdisk.SnapshotEngine.
func (e *Engine) SetTemplate(ctx context.Context, vol state.Volume, on bool) error {
	return e.with(ctx, vol, func(v *volumedriver.Volume) error { return v.SetTemplate(ctx, on) })
}

// Ledger implements vdisk.SnapshotEngine.
func (e *Engine) Ledger(_ context.Context, vol state.Volume) (vdisk.Ledger, error) {
	i, ok := e.volumes.Info(vol.ID)
	if !ok {
		return vdisk.Ledger{}, nil
	}
	return vdisk.Ledger{Accepted: i.Accepted, Logged: i.Durable, Backed: i.Backed, UnloggedBytes: i.UnsyncedBytes,
		UnbackedBytes: i.PendingBytes, UnbackedAge: i.PendingAge}, nil
}

// WaitLevel implements vdisk.SnapshotEngine.
func (e *Engine) WaitLevel(ctx context.Context, vol state.Volume, level string) error {
	return e.with(ctx, vol, func(v *volumedriver.Volume) error { return v.WaitLevel(ctx, level) })
}
