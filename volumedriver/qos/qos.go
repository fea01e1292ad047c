// Package qos limits and shares what volumes may do: requests and bytes per second of one vDisk, of all vDisks of a vPool, and of a
// resource of the node such as the write log.
//
// A Gate is something that lets requests through at a rate. A Limiter is one volume's way through its own gate and then those that it
// shares with others, in order:
//
//	volume's own gate -> vPool's gate -> write log's gate (its rate follows how fast the log drains)
//
// The invariants: over any time t a gate lets through at most what its rates and burst allow, plus one request; while requests wait, none
// overtakes them by Try; and of those that wait, each volume gets the same share, whatever the number and size of its requests.
//
// # Rates
//
// Each rate is a GCRA (ITU-T I.371): a time until which it is spent. A request passes if that lies at most the burst ahead of now, and pushes
// it on by its cost: 1/IOPS, or bytes/rate. Credit is what lies behind now, at most the burst. A request larger than all the burst passes too, and is paid off
// afterwards. A gate has six: requests and bytes, of reads, of writes and of both.
//
// # Sharing
//
// Those that wait stand in a queue for each volume, and the volumes in a ring for reads and one for writes, served by deficit round robin with
// the rule of fq_codel (RFC 8290): a volume that starts to wait goes first, once in a round. So a volume with one request at a time does not wait behind
// the many of another.
//
//	serve: volume at the front of the ring
//	       nothing waits            -> leaves the ring
//	       its deficit is used up   -> gets another quantum, goes to the back
//	       else                     -> its first request passes, its cost is taken from the deficit
//
// No goroutine of its own: a timer serves the rings when the next request may pass. Memory: a Limiter without limits costs about 300
// bytes, and its Try reads one word for each gate.
//
// Locks: each gate has one, none is held while another is taken.
package qos

import (
	"context"
	"math"
	"sync"
	"sync/atomic"
	"time"
)

// Kind of a request.
type Kind uint8

// The kinds.
const (
	Read Kind = iota
	Write
	kinds
)

// Limits are per second; 0 is no limit. What is for both kinds holds in addition to what is for one.
type Limits struct {
	IOPS, ReadIOPS, WriteIOPS    int64
	Bytes, ReadBytes, WriteBytes int64
	// Burst is how long a rate may be saved up while it is not used: after a pause of that long, that many seconds' worth passes at
	// once. 0: a tenth of a second.
	Burst time.Duration
}

const (
	burstDef = 100 * time.Millisecond
	burstMax = time.Hour
	quantum  = int64(time.Millisecond) // time of the gate that a volume gets in one round
	costMax  = 64 * quantum            // what one request takes from a deficit at most
)

// rate is one GCRA. Times are nanoseconds since the gate was made.
type rate struct {
	each  float64 // ns that a request, or a byte, costs; 0: no limit
	spent int64
}

// The rates of a gate: for each kind its own two, and then those for both.
const (
	opsOf    = iota // of Read; of Write is opsOf+2
	bytesOf         //
	opsAll   = 4
	bytesAll = 5
	ratesAll = 6
)

// Gate lets requests through at a rate. The zero value is not usable.
type Gate struct {
	limited atomic.Uint32 // bit of each kind that has a limit
	start   time.Time

	mu     sync.Mutex // guards all below and the queues of flows
	rates  [ratesAll]rate
	burst  int64
	rings  [kinds]ring
	turn   Kind // which ring is looked at first
	timer  *time.Timer
	closed bool

	passed, waited [kinds]int64
}

// NewGate makes a gate. Close it when nobody uses it any more.
func NewGate(l Limits) *Gate {
	g := &Gate{start: time.Now()}
	g.SetLimits(l)
	return g
}

// SetLimits changes the limits, also for those that wait.
func (g *Gate) SetLimits(l Limits) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if l.Burst <= 0 {
		l.Burst = burstDef
	}
	g.burst = int64(min(l.Burst, burstMax))
	for i, v := range [ratesAll]int64{l.ReadIOPS, l.ReadBytes, l.WriteIOPS, l.WriteBytes, l.IOPS, l.Bytes} {
		g.setRateLocked(i, v)
	}
	g.changedLocked()
}

// SetWriteRate changes the limit of written bytes only; 0 is none. It is for a rate that follows something.
func (g *Gate) SetWriteRate(bytesPerSecond int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.setRateLocked(bytesOf+2, bytesPerSecond)
	g.changedLocked()
}

func (g *Gate) setRateLocked(i int, perSecond int64) {
	r := &g.rates[i]
	if perSecond <= 0 {
		*r = rate{}
		return
	}
	each := float64(time.Second) / float64(perSecond)
	if debt := r.spent - g.now(); r.each > 0 && debt > 0 { // what is owed takes as long as the new rate says
		r.spent = g.now() + int64(min(float64(debt)*each/r.each, math.MaxInt64/4))
	}
	r.each = each
}

// changedLocked lets those pass that now may.
func (g *Gate) changedLocked() {
	var bits uint32
	for k := range kinds {
		for _, i := range g.ratesOf(k) {
			if g.rates[i].each > 0 {
				bits |= 1 << k
			}
		}
	}
	g.limited.Store(bits)
	g.serveLocked()
}

// ratesOf lists the rates that hold for a kind.
func (g *Gate) ratesOf(k Kind) [4]int {
	return [4]int{opsOf + 2*int(k), bytesOf + 2*int(k), opsAll, bytesAll}
}

func (g *Gate) now() int64 { return int64(time.Since(g.start)) }

// readyLocked gives when a request of that kind may pass.
func (g *Gate) readyLocked(k Kind) int64 {
	at := int64(math.MinInt64)
	for _, i := range g.ratesOf(k) {
		if r := &g.rates[i]; r.each > 0 {
			at = max(at, r.spent-g.burst)
		}
	}
	return at
}

// chargeLocked takes a request's cost from all its rates, and gives the largest.
func (g *Gate) chargeLocked(k Kind, n int, now int64) (cost int64) {
	for j, i := range g.ratesOf(k) {
		r := &g.rates[i]
		if r.each == 0 {
			continue
		}
		c := r.cost(j, n)
		r.spent = max(r.spent, now) + c
		cost = max(cost, c)
	}
	g.passed[k]++
	return cost
}

// cost of a request of n bytes; even places of ratesOf are of requests.
func (r *rate) cost(place, n int) int64 {
	if place%2 == 0 {
		n = 1
	}
	return int64(min(float64(n)*r.each, math.MaxInt64/4))
}

// refund gives back what a request was charged that a later gate did not let through.
func (g *Gate) refund(k Kind, n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for j, i := range g.ratesOf(k) {
		if r := &g.rates[i]; r.each > 0 {
			r.spent -= r.cost(j, n)
		}
	}
	g.passed[k]--
	g.serveLocked()
}

// try lets a request through if it may pass now and nobody waits.
func (g *Gate) try(k Kind, n int) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := g.now()
	if g.closed || g.limited.Load()&(1<<k) == 0 {
		return true
	}
	if g.behindLocked(k) || g.readyLocked(k) > now {
		return false
	}
	g.chargeLocked(k, n, now)
	return true
}

// behindLocked tells whether requests wait that one of this kind must not overtake.
func (g *Gate) behindLocked(k Kind) bool {
	return g.rings[k].waiting > 0 || g.rings[kinds-1-k].waiting > 0 && (g.rates[opsAll].each > 0 || g.rates[bytesAll].each > 0)
}

// wait lets a request through in its turn.
func (g *Gate) wait(ctx context.Context, f *flow, k Kind, n int) error {
	g.mu.Lock()
	if g.closed || g.limited.Load()&(1<<k) == 0 {
		g.mu.Unlock()
		return nil
	}
	if now := g.now(); !g.behindLocked(k) && g.readyLocked(k) <= now {
		g.chargeLocked(k, n, now)
		g.mu.Unlock()
		return nil
	}
	w := &waiter{n: n, passed: make(chan struct{})}
	g.rings[k].push(f, k, w)
	g.waited[k]++
	g.serveLocked()
	g.mu.Unlock()
	select {
	case <-w.passed:
		return nil
	case <-ctx.Done():
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if w.gone {
		return nil // it passed meanwhile
	}
	w.gone = true
	g.rings[k].waiting--
	g.serveLocked()
	return ctx.Err()
}

// serveLocked lets through who may pass, and sets the timer for the next.
func (g *Gate) serveLocked() {
	for {
		now := g.now()
		next := int64(math.MaxInt64)
		served := false
		for range kinds {
			k := g.turn
			g.turn = (g.turn + 1) % kinds
			r := &g.rings[k]
			if r.waiting == 0 {
				r.clear(k)
				continue
			}
			if at := g.readyLocked(k); !g.closed && g.limited.Load()&(1<<k) != 0 && at > now {
				next = min(next, at)
				continue
			}
			f, w := r.pop(k)
			f.deficit[k] -= min(g.chargeLocked(k, w.n, now), costMax)
			close(w.passed)
			served = true
			break
		}
		if served {
			continue
		}
		g.setTimerLocked(next, now)
		return
	}
}

func (g *Gate) setTimerLocked(next, now int64) {
	if next == math.MaxInt64 {
		if g.timer != nil {
			g.timer.Stop()
		}
		return
	}
	d := time.Duration(next - now)
	if g.timer == nil {
		g.timer = time.AfterFunc(d, g.serve)
		return
	}
	g.timer.Reset(d)
}

func (g *Gate) serve() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.serveLocked()
}

// Close lets everybody pass, from now on.
func (g *Gate) Close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
	g.limited.Store(0)
	g.serveLocked()
}

// Stats of a gate, since it was made.
type Stats struct {
	Passed, Waited [2]int64 // requests, by kind; Waited are those of Passed that had to wait, or that gave up
	Waiting        int      // now
}

// Stats counts. Requests that pass while there is no limit are not counted.
func (g *Gate) Stats() Stats {
	g.mu.Lock()
	defer g.mu.Unlock()
	return Stats{Passed: g.passed, Waited: g.waited, Waiting: g.rings[Read].waiting + g.rings[Write].waiting}
}
