package cache

import "sync"

const (
	streamsMax     = 8
	streamSlack    = 32 << 10 // how far out of order the reads of one stream may come; four times its size for a large read
	streamForward  = 2        // what a read that goes forward adds to a stream's score, twice that if it is large; another takes 1
	streamScore    = 8        // from here on a stream is sequential, if it is dense too
	streamScoreMax = 16
	streamLarge    = 64 << 10
	streamDense    = 0.6     // part of the bytes passed over that must have been read
	streamRecent   = 1 << 20 // bytes over which density is judged
	windowMin      = 256 << 10
	windowMax      = 16 << 20  // twice what is in flight: the other half has come and waits for its reader
	windowSteps    = 16        // in so many steps a window moves on
	beyondFrom     = 1 << 20   // bytes after which a stream is expected to go on beyond the limit
	endSlack       = 64 << 10  // a stream that comes this near the end has reached it: objects may end with what is not read
	earlyStart     = 256 << 10 // a stream that starts this near an object's start may go on where another object ended
)

// Streams finds sequential readers among the reads of one object, or of one volume: up to eight at a time, whose reads may
// come somewhat out of order, as those of an operating system with several requests in flight do, while random reads of a small hot
// region are none. For each it says how far ahead to read: 256 KiB first, twice as much each time, up to 16 MiB. The zero value is
// ready. Methods may be called concurrently.
type Streams struct {
	// ScanBytes is how long a stream gets before it counts as a scan, which should leave no traces in caches. 0: 64 MiB.
	ScanBytes int64
	// WindowBytes bounds what is read ahead. 0: 16 MiB.
	WindowBytes int64

	mu    sync.Mutex
	clock uint32
	all   [streamsMax]stream
}

type stream struct {
	next        int64 // where it goes on
	run         int64 // bytes so far
	span, bytes int64 // lately passed over, and read
	ahead       int64 // up to where reading ahead was asked for
	window      int64
	score       int
	used        uint32 // clock of the last read; 0: no stream
	early       bool   // it began near the start
	found       bool
	ended       bool
	beyond      int // how often what follows was asked for
}

// near tells whether a read may belong to the stream.
func (t *stream) near(off, n int64) bool {
	slack := min(max(streamSlack, 4*n), windowMax)
	return off <= t.next+slack && off+n >= t.next-slack
}

// distance is how far a read is from where the stream goes on.
func (t *stream) distance(off int64) int64 { return max(off-t.next, t.next-off) }

// add takes a read that is near.
func (t *stream) add(off, n int64) {
	t.bytes += n
	if forward := off + n - t.next; forward > 0 {
		t.run += forward
		t.span += forward
		t.next = off + n
		t.score += streamForward
		if n >= streamLarge {
			t.score += streamForward
		}
		t.score = min(t.score, streamScoreMax)
	} else {
		t.score = max(t.score-1, 0)
	}
	if t.bytes = min(t.bytes, t.span); t.span > streamRecent {
		t.span, t.bytes = t.span/2, t.bytes/2
	}
}

func (t *stream) sequential() bool {
	return t.score >= streamScore && float64(t.bytes) >= streamDense*float64(t.span)
}

// Hint is what Touch says of a read.
type Hint struct {
	Sequential bool
	Scan       bool  // part of a long sequential run
	From, To   int64 // what to read ahead now; nothing if equal
	Beyond     int64 // how much to read ahead of what follows the limit; told twice of a stream

	run   int64
	found bool // a stream that began near the start is sequential, as is seen now
	ended bool // a sequential stream reached the end
}

const scanBytesDef = 64 << 20

// Touch tells of a read of n bytes at off; nothing is read ahead beyond limit.
func (s *Streams) Touch(off, n, limit int64) Hint {
	s.mu.Lock()
	defer s.mu.Unlock()
	scan := s.ScanBytes
	if scan == 0 {
		scan = scanBytesDef
	}
	s.clock++
	if s.clock == 0 {
		s.clock = 1
	}
	t, oldest := (*stream)(nil), &s.all[0]
	for i := range s.all {
		c := &s.all[i]
		if c.used == 0 {
			oldest = c
			continue
		}
		if c.near(off, n) && (t == nil || c.distance(off) < t.distance(off)) {
			t = c
		}
		if oldest.used != 0 && s.clock-c.used > s.clock-oldest.used {
			oldest = c
		}
	}
	if t == nil {
		*oldest = stream{next: off, ahead: off + n, used: s.clock, early: off <= earlyStart}
		oldest.add(off, n)
		return Hint{}
	}
	t.used = s.clock
	t.add(off, n)
	if !t.sequential() {
		return Hint{}
	}
	h := Hint{Sequential: true, Scan: t.run >= scan, run: t.run, found: t.early && !t.found}
	t.found = true
	if t.next >= limit-endSlack && !t.ended {
		t.ended, h.ended = true, true
	}
	t.ahead = max(t.ahead, t.next)
	if left := t.ahead - t.next; left <= t.window-min(t.window, max(windowMin, t.window/windowSteps)) && t.ahead < limit || t.window == 0 {
		most := s.WindowBytes
		if most == 0 {
			most = windowMax
		}
		if left <= t.window/2 { // it catches up
			t.window *= 2
		}
		t.window = min(max(windowMin, t.window, t.run), most)
		h.From, h.To = t.ahead, min(t.next+t.window, limit)
		if h.To <= h.From {
			h.From, h.To = 0, 0
		} else {
			t.ahead = h.To
		}
	}
	// First only the start of what follows, so that it has been looked up when the rest is wanted.
	if t.run >= beyondFrom {
		switch left := limit - t.next; {
		case left < t.window && t.beyond < 2:
			t.beyond, h.Beyond = 2, t.window
		case left < 2*t.window && t.beyond < 1:
			t.beyond, h.Beyond = 1, 1
		}
	}
	return h
}

// inherit tells that the stream that has just been found goes on from elsewhere, where it had run that many bytes. It need not work
// its way up to a large window again.
func (s *Streams) inherit(run int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.all {
		if t := &s.all[i]; t.used == s.clock && t.found {
			t.run += run
			if run >= beyondFrom {
				t.window = windowMax
				if s.WindowBytes > 0 {
					t.window = min(windowMax, s.WindowBytes)
				}
			}
			return
		}
	}
}
