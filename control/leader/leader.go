// Package leader runs what one node of the cluster does for all: the node that leads. Duties begin when this node has become
// the leader and has applied all that was committed before, and they end, and are waited for, when it leads no more. Two
// nodes may think for a moment that they lead; what duties do they do by commands that the log decides between.
package leader

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"golang.org/x/sync/errgroup"
)

// Leadership is what the package needs of raft. raft.Node has it.
type Leadership interface {
	IsLeader() bool
	// Sync returns when this node has applied everything that was committed before.
	Sync(ctx context.Context) error
}

// Duty is one that runs while this node leads, until its context ends.
type Duty struct {
	Name string
	Run  func(ctx context.Context) error
}

const (
	lookEvery   = 200 * time.Millisecond
	syncTimeout = 10 * time.Second
	againAfter  = 5 * time.Second
)

// Run looks after the duties until ctx ends. A duty that fails ends its term, which begins anew a little later.
func Run(ctx context.Context, l Leadership, log *slog.Logger, duties ...Duty) error {
	for ctx.Err() == nil {
		if !l.IsLeader() {
			pause(ctx, lookEvery)
			continue
		}
		if err := term(ctx, l, duties); err != nil && ctx.Err() == nil {
			log.Warn("duties of the leader were interrupted, they begin anew", "err", err)
			pause(ctx, againAfter)
		}
	}
	return nil
}

// term is one time of leading.
func term(ctx context.Context, l Leadership, duties []Duty) error {
	syncCtx, cancel := context.WithTimeout(ctx, syncTimeout)
	err := l.Sync(syncCtx)
	cancel()
	if err != nil {
		return fmt.Errorf("catch up as the leader: %w", err)
	}
	ctx, end := context.WithCancel(ctx)
	defer end()
	g, ctx := errgroup.WithContext(ctx)
	for _, d := range duties {
		g.Go(func() error {
			if err := d.Run(ctx); err != nil {
				return fmt.Errorf("%s: %w", d.Name, err)
			}
			return nil
		})
	}
	g.Go(func() error {
		for l.IsLeader() && ctx.Err() == nil {
			pause(ctx, lookEvery)
		}
		end()
		return nil
	})
	return g.Wait()
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
