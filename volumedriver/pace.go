package volumedriver

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"varve/volumedriver/blockio"
	"varve/volumedriver/qos"
)

// pace slows writers smoothly as the log fills, so that they meet the speed of the backend before the log is full:
//
//	occupancy   up to 0.5  free
//	            0.5 - 0.9  a rate that falls from eight times the drain rate to the drain rate
//	            0.9 - 1    a rate that falls from the drain rate to an eighth of it
//	            full       wait for room; an error only if nothing at all has drained for the drain deadline
//
// The drain rate is what has lately gone from the log to the backends. Writers pass a gate of package qos, which
// the volumes that wait share fairly; a Try method that would have to wait answers ErrBusy instead.
type pace struct {
	d       *Driver
	limited atomic.Bool
	last    atomic.Int64 // unix ns of the last time something went from the log to a backend
	freed   atomic.Int64 // bytes that went from the log to the backends

	gate *qos.Gate // lets written bytes into the log at the rate that is right now; the volumes that wait share it

	mu    sync.Mutex
	drain float64 // bytes per second that go from the log to the backends, smoothed
}

const (
	paceEvery    = 50 * time.Millisecond
	paceFloor    = 1 << 20 // bytes per second that are always let in while there is room
	paceFrom     = 0.5
	paceSteep    = 0.9
	paceFastest  = 8.0
	paceSlowest  = 1.0 / 8
	paceSmooth   = 0.1
	paceBurst    = 20 * time.Millisecond
	drainDefault = 64 << 20
)

func newPace(d *Driver) *pace {
	return &pace{d: d, drain: drainDefault, gate: qos.NewGate(qos.Limits{Burst: paceBurst})}
}

// share is a volume's way into the log.
func (p *pace) share() *qos.Limiter { return qos.NewLimiter(qos.Limits{}, p.gate) }

// over says whether writers have to be paced now.
func (p *pace) over() bool { return p.limited.Load() }

// drained notes that n bytes have gone to a backend.
func (p *pace) drained(n int64) {
	p.freed.Add(n)
	p.last.Store(p.d.now().UnixNano())
}

// run follows the log's occupancy until ctx ends.
func (p *pace) run(ctx context.Context) error {
	tick := time.NewTicker(paceEvery)
	defer tick.Stop()
	freed, at := p.freed.Load(), p.d.now()
	for {
		select {
		case <-ctx.Done():
			p.limited.Store(false)
			p.gate.SetWriteRate(0)
			return nil
		case <-tick.C:
		}
		total, now := p.freed.Load(), p.d.now()
		if dt := now.Sub(at).Seconds(); dt > 0 {
			p.follow(p.d.wal.Stats().Occupancy, float64(total-freed)/dt)
		}
		freed, at = total, now
	}
}

func (p *pace) follow(occupancy, drain float64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if occupancy > paceFrom || drain > 0 {
		p.drain += paceSmooth * (drain - p.drain)
	}
	rate := paceRate(occupancy, p.drain)
	p.limited.Store(rate > 0)
	p.gate.SetWriteRate(int64(rate))
}

// paceRate gives the bytes per second to let in, 0 for no limit.
func paceRate(occupancy, drain float64) float64 {
	switch {
	case occupancy <= paceFrom:
		return 0
	case occupancy <= paceSteep:
		x := (occupancy - paceFrom) / (paceSteep - paceFrom)
		return max(paceFloor, drain*(paceFastest+(1-paceFastest)*x))
	default:
		x := min(1, (occupancy-paceSteep)/(1-paceSteep))
		return max(paceFloor, drain*(1+(paceSlowest-1)*x))
	}
}

// stall is one writer's wait for room in the log.
type stall struct {
	d     *Driver
	since time.Time
}

func (d *Driver) newStall() *stall { return &stall{d: d} }

// wait waits until the log may have room. ErrNoSpace if nothing has drained for the drain deadline.
func (s *stall) wait(ctx context.Context) error {
	now := s.d.now()
	if s.since.IsZero() {
		s.since = now
	}
	progress := time.Unix(0, s.d.pace.last.Load())
	if progress.Before(s.since) {
		progress = s.since
	}
	left := s.d.cfg.DrainDeadline - now.Sub(progress)
	if left <= 0 {
		return fmt.Errorf("write log full, nothing drained for %s: %w", s.d.cfg.DrainDeadline, blockio.ErrNoSpace)
	}
	wait, cancel := context.WithTimeout(ctx, min(left, time.Second))
	defer cancel()
	err := s.d.wal.WaitSpace(wait)
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return nil
	}
	return err
}
