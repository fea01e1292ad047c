package vdisk

import (
	"context"
	"time"

	"github.com/google/uuid"

	"varve/control/state"
)

const (
	retryFirst   = time.Second
	retryMax     = time.Minute
	doneBatchMax = 256
)

type retry struct {
	after time.Time
	wait  time.Duration
}

// Run has the engine delete doomed volumes until ctx ends. A volume whose deletion fails is tried again later, ever more
// slowly, without holding up the others; the state remembers it over restarts.
func (c *Controller) Run(ctx context.Context) error {
	failed := make(map[uuid.UUID]retry)
	for ctx.Err() == nil {
		doomed, changed := c.cfg.Store.Doomed()
		next := c.reclaim(ctx, doomed, failed)
		var due <-chan time.Time
		if !next.IsZero() {
			due = time.After(time.Until(next))
		}
		select {
		case <-ctx.Done():
		case <-changed:
		case <-due:
		}
	}
	return nil
}

// reclaim deletes what is due and returns when the next of the rest is; zero if nothing is left.
func (c *Controller) reclaim(ctx context.Context, doomed []state.Doomed, failed map[uuid.UUID]retry) (next time.Time) {
	var done []uuid.UUID
	left := make(map[uuid.UUID]bool)
	later := func(d state.Doomed, r retry) {
		failed[d.ID], left[d.ID] = r, true
		if next.IsZero() || r.after.Before(next) {
			next = r.after
		}
	}
	for _, d := range doomed {
		r := failed[d.ID]
		if ctx.Err() != nil || time.Now().Before(r.after) {
			later(d, r)
			continue
		}
		if err := c.cfg.Engine.Delete(ctx, d); err != nil {
			r.wait = min(max(2*r.wait, retryFirst), retryMax)
			r.after = time.Now().Add(r.wait)
			c.cfg.Log.Warn("deleting a volume did not work, it is tried again", "volume", d.ID, "path", d.Path, "in", r.wait, "err", err)
			later(d, r)
			continue
		}
		done = append(done, d.ID)
		if len(done) == doneBatchMax {
			break // the commit changes the table, and the rest comes in the next round
		}
	}
	if len(done) > 0 {
		if _, err := c.cfg.Raft.Apply(ctx, &state.DeleteVolumeDone{Volumes: done}); err != nil {
			c.cfg.Log.Warn("recording deleted volumes did not work, it is tried again", "volumes", len(done), "err", err)
			next = time.Now().Add(retryFirst)
		}
	}
	for id := range failed {
		if !left[id] {
			delete(failed, id)
		}
	}
	return next
}
