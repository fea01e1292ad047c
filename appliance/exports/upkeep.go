package exports

import (
	"context"
	"time"

	"github.com/google/uuid"

	"varve/control/retention"
	"varve/control/state"
	"varve/control/upkeep"
	"varve/control/vdisk"
	"varve/volumedriver"
)

// UpkeepEngine is the volume driver as package upkeep sees it.
type UpkeepEngine struct{ Engine *Engine }

// Template implements upkeep.Engine.
func (u UpkeepEngine) Template(v state.Volume) bool {
	i, ok := u.Engine.volumes.Info(v.ID)
	return ok && i.Template
}

// Has implements upkeep.Engine.
func (u UpkeepEngine) Has(id uuid.UUID) bool {
	_, ok := u.Engine.volumes.Info(id)
	return ok
}

// Snapshots implements upkeep.Engine.
func (u UpkeepEngine) Snapshots(ctx context.Context, v state.Volume) ([]retention.Snapshot, error) {
	all, err := u.Engine.Snapshots(ctx, v)
	if err != nil {
		return nil, err
	}
	out := make([]retention.Snapshot, len(all))
	for i, s := range all {
		out[i] = retention.Snapshot{ID: s.ID, Name: s.Name, Created: s.Created, Consistent: s.Consistent, Automatic: s.Automatic,
			Sticky: s.Sticky, Clones: s.Clones}
	}
	return out, nil
}

// Snapshot implements upkeep.Engine.
func (u UpkeepEngine) Snapshot(ctx context.Context, v state.Volume, id uuid.UUID, name string, at time.Time) error {
	_, err := u.Engine.Snapshot(ctx, v, vdisk.SnapshotSpec{ID: id, Name: name, Created: at, Automatic: true})
	return err
}

// DeleteSnapshot implements upkeep.Engine.
func (u UpkeepEngine) DeleteSnapshot(ctx context.Context, v state.Volume, id uuid.UUID) error {
	return u.Engine.DeleteSnapshot(ctx, v, id)
}

// Scrub implements upkeep.Engine.
func (u UpkeepEngine) Scrub(ctx context.Context, pool uuid.UUID, o upkeep.ScrubOptions) (upkeep.ScrubReport, error) {
	got, err := u.Engine.volumes.driver.Scrub(ctx, pool, volumedriver.ScrubOptions{Target: 1 + float64(o.OverheadPercent)/100,
		Verify: o.Verify, Audit: o.Audit})
	return upkeep.ScrubReport{HeldBytes: got.HeldBytes, LiveBytes: got.LiveBytes, MovedBytes: got.MovedBytes, FreedBytes: got.FreedBytes,
		Deleted: got.Deleted, Orphans: len(got.Orphans), OrphanBytes: got.OrphanBytes, Unknown: got.Unknown, Verified: got.Verified, VerifyErrors: got.VerifyErrors}, err
}
