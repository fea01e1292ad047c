package vdisk

import (
	"context"
	"sync"
	"time"

	"github.com/google/uuid"

	"varve/control/state"
)

const (
	// gather lets the removals of a burst be recorded as done by one commit.
	gather       = 50 * time.Millisecond
	deleters     = 4
	deleteMax    = 2 * time.Minute // of one attempt; the next goes on where it stopped
	retryFirst   = time.Second
	retryMax     = time.Minute
	doneBatchMax = 256
)

type retry struct {
	after time.Time
	wait  time.Duration
}

// Run has the engine delete doomed volumes until ctx ends, a few at a time. A volume whose deletion fails is tried again
// later, ever more slowly, without holding up the others; the state remembers it over restarts.
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
			select {
			case <-ctx.Done():
			case <-time.After(gather):
			}
		case <-due:
		}
	}
	return nil
}

// reclaim deletes what is due and returns when the next of the rest is; zero if nothing is left.
func (c *Controller) reclaim(ctx context.Context, doomed []state.Doomed, failed map[uuid.UUID]retry) (next time.Time) {
	now := time.Now()
	var due []state.Doomed
	waiting := make(map[uuid.UUID]retry, len(failed))
	for _, d := range doomed {
		if c.cfg.Mine != nil && !c.cfg.Mine(d) {
			continue
		}
		switch r := failed[d.ID]; {
		case now.Before(r.after):
			waiting[d.ID] = r
		case len(due) < doneBatchMax:
			due = append(due, d)
		default: // the commit of this batch changes the table, and the rest comes in the next round
			waiting[d.ID] = retry{after: now, wait: r.wait}
		}
	}
	done := c.deleteAll(ctx, due, failed, waiting)
	if len(done) > 0 {
		if _, err := c.cfg.Raft.Apply(ctx, &state.DeleteVolumeDone{Volumes: done}); err != nil {
			c.cfg.Log.Warn("recording deleted volumes did not work, it is tried again", "volumes", len(done), "err", err)
			next = now.Add(retryFirst)
		}
	}
	clear(failed)
	for id, r := range waiting {
		failed[id] = r
		if next.IsZero() || r.after.Before(next) {
			next = r.after
		}
	}
	return next
}

// deleteAll returns the volumes of which nothing is left; the others go to waiting.
func (c *Controller) deleteAll(ctx context.Context, due []state.Doomed, failed, waiting map[uuid.UUID]retry) (done []uuid.UUID) {
	var mu sync.Mutex // guards done and waiting
	var g sync.WaitGroup
	free := make(chan struct{}, deleters)
	for _, d := range due {
		r := failed[d.ID]
		free <- struct{}{}
		g.Go(func() {
			defer func() { <-free }()
			attempt, cancel := context.WithTimeout(ctx, deleteMax)
			defer cancel()
			err := c.cfg.Engine.Delete(attempt, d)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				done = append(done, d.ID)
				return
			}
			r.wait = min(max(2*r.wait, retryFirst), retryMax)
			r.after = time.Now().Add(r.wait)
			waiting[d.ID] = r
			if ctx.Err() == nil {
				c.cfg.Log.Warn("deleting a volume did not work, it is tried again", "volume", d.ID, "path", d.Path,
					"in", r.wait, "err", err)
			}
		})
	}
	g.Wait()
	return done
}
