package qos

// waiter is one request that waits.
type waiter struct {
	n      int
	passed chan struct{}
	gone   bool // it passed, or its context ended
	next   *waiter
}

// flow is what a volume has waiting at one gate. The gate's lock guards it.
type flow struct {
	first, last [kinds]*waiter
	deficit     [kinds]int64
	next        [kinds]*flow
	inRing      [kinds]bool
}

// ring holds the flows that wait for one kind, in the order of service, and flows that have lately waited.
type ring struct {
	fresh, freshLast *flow // started to wait since they were last in the ring; served first
	first, last      *flow
	waiting          int
}

// push adds a request to its flow. A flow that was not in the ring goes first.
func (r *ring) push(f *flow, k Kind, w *waiter) {
	if f.last[k] != nil {
		f.last[k].next = w
	} else {
		f.first[k] = w
	}
	f.last[k] = w
	r.waiting++
	if f.inRing[k] {
		return
	}
	f.inRing[k], f.deficit[k], f.next[k] = true, quantum, nil
	if r.freshLast != nil {
		r.freshLast.next[k] = f
	} else {
		r.fresh = f
	}
	r.freshLast = f
}

// head gives the flow that is next, and whether it is a fresh one.
func (r *ring) head() (*flow, bool) {
	if r.fresh != nil {
		return r.fresh, true
	}
	return r.first, false
}

// shift takes the head out.
func (r *ring) shift(k Kind) *flow {
	f, fresh := r.head()
	if fresh {
		if r.fresh = f.next[k]; r.fresh == nil {
			r.freshLast = nil
		}
	} else if r.first = f.next[k]; r.first == nil {
		r.last = nil
	}
	f.next[k] = nil
	return f
}

// back puts a flow to the end of those that are not fresh.
func (r *ring) back(f *flow, k Kind) {
	if r.last != nil {
		r.last.next[k] = f
	} else {
		r.first = f
	}
	r.last = f
}

// pop takes the request that is next; there must be one. The caller charges the flow's deficit.
func (r *ring) pop(k Kind) (*flow, *waiter) {
	for {
		f, fresh := r.head()
		f.skipGone(k)
		switch {
		case f.first[k] == nil && fresh:
			r.back(r.shift(k), k) // it stays a round, so that it cannot come first again by waiting anew
		case f.first[k] == nil:
			r.shift(k).inRing[k] = false
		case f.deficit[k] <= 0:
			if f.deficit[k] += quantum; r.alone(f) {
				f.deficit[k] = quantum
			}
			r.back(r.shift(k), k)
		default:
			w := f.first[k]
			if f.first[k] = w.next; f.first[k] == nil {
				f.last[k] = nil
			}
			w.next, w.gone = nil, true
			r.waiting--
			return f, w
		}
	}
}

// alone tells whether a flow is the only one in the ring.
func (r *ring) alone(f *flow) bool {
	return r.fresh == f && r.freshLast == f && r.first == nil || r.fresh == nil && r.first == f && r.last == f
}

// skipGone takes out requests that were given up.
func (f *flow) skipGone(k Kind) {
	for w := f.first[k]; w != nil && w.gone; w = f.first[k] {
		if f.first[k] = w.next; f.first[k] == nil {
			f.last[k] = nil
		}
	}
}

// clear empties a ring in which nothing waits.
func (r *ring) clear(k Kind) {
	for f, _ := r.head(); f != nil; f, _ = r.head() {
		f = r.shift(k)
		f.inRing[k], f.first[k], f.last[k] = false, nil, nil
	}
}
