package writelog

import "time"

// gather decides whether a sync waits a moment, so that it serves more requests.
//
// Clients that wait for their durable writes come back in bursts: when a sync ends, its requests are answered, and a little later
// as many new ones are here. If a sync begins for the first of them, the rest wait for the next one, and with n clients each
// sync serves n/2 or fewer. Where answering and asking again takes less time than a sync, it is better for everybody to wait
// for the burst.
//
//	at the end of a sync   expect = the requests that it served + those that wait already
//	before the next        hold until expect requests wait, at most for half the time that syncs take of late
//	the hold ran out       with less than 3/4 of what was expected: hold no more for the next 2, 4, … 256 syncs
//	                       so where it does not pay it costs nearly nothing
//
// A lone client is expected alone, and never held up. All is guarded by Log.smu.
type gather struct {
	expect int
	took   time.Duration // smoothed
	timer  *time.Timer
	armed  bool // a hold is on
	over   bool // it ran out
	misses int  // holds in a row that ran out
	skip   int  // syncs for which there is no hold
}

const (
	missesMax = 8
	// holdMax bounds a hold where syncs are slow; holdMin is less than it takes to ask for one.
	holdMax = 2 * time.Millisecond
	holdMin = 20 * time.Microsecond
)

// limit is how long a hold may last.
func (g *gather) limit() time.Duration { return min(g.took/2, holdMax) }

// hold says whether to wait for more than the requests that are waiting. The first time it starts the clock, which calls over.
func (g *gather) hold(waiting int, over func()) bool {
	switch {
	case waiting == 0 || waiting >= g.expect || g.over || g.skip > 0 || g.limit() < holdMin:
		return false
	case g.armed:
		return true
	case g.timer == nil:
		g.timer = time.AfterFunc(g.limit(), over)
	default:
		g.timer.Reset(g.limit())
	}
	g.armed = true
	return true
}

// end notes that a sync begins for so many requests.
func (g *gather) end(waiting int) {
	switch {
	case !g.armed:
		g.skip = max(0, g.skip-1)
	case g.over && waiting < g.expect*3/4:
		g.misses = min(g.misses+1, missesMax)
		g.skip = 1 << g.misses
	default:
		g.misses = 0
	}
	if g.armed && !g.over {
		g.timer.Stop()
	}
	g.armed, g.over = false, false
}

// synced notes that a sync has ended; waiting counts those it served as well.
func (g *gather) synced(waiting int, took time.Duration) {
	g.expect = waiting
	if g.took == 0 {
		g.took = took
	}
	g.took += (took - g.took) / 8
}

func (g *gather) stop() {
	if g.timer != nil {
		g.timer.Stop()
	}
}

// gatherLocked says whether a sync that is due should wait for more requests. If so, the syncer is woken when enough are there,
// or when the time for it is over.
func (l *Log) gatherLocked() bool {
	if l.stopped || l.unsynced >= syncBehindBytes {
		return false
	}
	return l.gather.hold(len(l.pending), l.gatherOver)
}

// gatherOver ends a hold. One that was ended otherwise, and perhaps another begun, may see it as well: that one is then shorter.
func (l *Log) gatherOver() {
	l.smu.Lock()
	defer l.smu.Unlock()
	if l.gather.armed {
		l.gather.over = true
		l.work.Signal()
	}
}
