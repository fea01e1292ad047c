package volumedriver

import (
	"context"
	"fmt"
	"sync"
	"time"

	"varve/volumedriver/blockmap"
)

// checkpointer makes what is on the backends part of what the map store says, and so lets the log go.
//
//	roots of the volumes that moved on are copied, then all dirty leaves and these roots are written at once, synced;
//	then the log may recycle what the roots cover.
//
// A leaf in the store may be newer than the roots: the records that made it so are still in the log and are redone.
type checkpointer struct {
	d    *Driver
	wake chan struct{}
	one  sync.Mutex // one checkpoint at a time

	mu      sync.Mutex
	changed map[*Volume]struct{}
	bytes   int64
}

func newCheckpointer(d *Driver) *checkpointer {
	return &checkpointer{d: d, wake: make(chan struct{}, 1), changed: make(map[*Volume]struct{})}
}

// add notes that the volume's root has moved on by an SCO of so many bytes.
func (c *checkpointer) add(v *Volume, bytes int64) {
	c.mu.Lock()
	c.changed[v] = struct{}{}
	c.bytes += bytes
	due := c.bytes >= c.d.cfg.CheckpointBytes
	c.mu.Unlock()
	if due || c.d.wal.Stats().Occupancy >= eagerOccupancy {
		select {
		case c.wake <- struct{}{}:
		default:
		}
	}
}

func (c *checkpointer) drop(v *Volume) {
	c.mu.Lock()
	delete(c.changed, v)
	c.mu.Unlock()
}

func (c *checkpointer) run(ctx context.Context) error {
	tick := time.NewTicker(c.d.cfg.CheckpointEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-c.wake:
		}
		if err := c.checkpoint(); err != nil {
			return err
		}
	}
}

func (c *checkpointer) checkpoint() error {
	c.one.Lock()
	defer c.one.Unlock()
	c.mu.Lock()
	changed := c.changed
	c.changed, c.bytes = make(map[*Volume]struct{}), 0
	c.mu.Unlock()
	if len(changed) == 0 {
		return nil
	}
	start := c.d.now()
	puts := make([]blockmap.KV, 0, len(changed))
	backed := make(map[*Volume]uint64, len(changed))
	for v := range changed {
		v.storing.Lock() // until the checkpoint is written: stored is what the store holds
		defer v.storing.Unlock()
		v.mu.RLock()
		r := v.root
		deleted := v.closed && v.err() != nil
		v.mu.RUnlock()
		if deleted {
			continue
		}
		r.keepEdited(&v.stored)
		puts = append(puts, r.encode())
		backed[v] = r.Backed
		v.stored = r
	}
	if err := c.d.maps.Checkpoint(append(puts, c.d.floor.next()), nil); err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	if err := c.d.floor.raise(); err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	for v, seq := range backed {
		c.d.wal.Release(v.id, seq)
	}
	c.d.metrics.checkpoint.Observe(c.d.now().Sub(start).Seconds())
	c.d.destager.notify()
	return nil
}
