package auth

import (
	"net/netip"
	"sync"
	"time"
)

// Back-off of failed sign-ins: after some free tries each failure doubles the wait, up to backoffMax; nobody is ever locked out for
// good. An account is counted by itself with many free tries, so that a stranger cannot keep its owner out, and together
// with the address with few.
const (
	backoffFirst   = 15 * time.Second
	backoffMax     = 15 * time.Minute
	backoffForgets = time.Hour
	freePair       = 5
	freeAddress    = 20
	freeAccount    = 50
	backoffKeysMax = 16_384
)

type tries struct {
	failures int
	until    time.Time
	last     time.Time
}

// backoff counts on this node alone and in memory: a restart forgets.
type backoff struct {
	now func() time.Time

	// mu guards by.
	mu sync.Mutex
	by map[string]*tries
}

func newBackoff(now func() time.Time) *backoff {
	return &backoff{now: now, by: make(map[string]*tries)}
}

type backoffKey struct {
	key  string
	free int
}

// addressKey is an IPv4 address or an IPv6 /64, which one host can have all of.
func addressKey(from string) string {
	ip, err := netip.ParseAddr(from)
	if err != nil {
		return from
	}
	ip = ip.Unmap()
	if ip.Is6() {
		p, err := ip.WithZone("").Prefix(64)
		if err == nil {
			return p.String()
		}
	}
	return ip.String()
}

func backoffKeys(account, from string) [3]backoffKey {
	at := addressKey(from)
	return [3]backoffKey{{"pair " + account + " " + at, freePair}, {"from " + at, freeAddress}, {"account " + account, freeAccount}}
}

// wait is how long the account must not be tried from there; 0 if it may be now.
func (b *backoff) wait(account, from string) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	now, longest := b.now(), time.Duration(0)
	for _, k := range backoffKeys(account, from) {
		if t := b.by[k.key]; t != nil {
			longest = max(longest, t.until.Sub(now))
		}
	}
	return longest
}

// failed counts a failure.
func (b *backoff) failed(account, from string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := b.now()
	for _, k := range backoffKeys(account, from) {
		t := b.by[k.key]
		if t == nil || now.Sub(t.last) > backoffForgets {
			b.makeRoomLocked(now)
			t = &tries{}
			b.by[k.key] = t
		}
		t.failures++
		t.last = now
		if over := t.failures - k.free; over >= 0 {
			t.until = now.Add(min(backoffFirst<<min(over, 10), backoffMax))
		}
	}
}

// succeeded forgets the account's failures from there.
func (b *backoff) succeeded(account, from string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, k := range backoffKeys(account, from) {
		if k.free != freeAddress { // whoever has one account could otherwise try the others' without end
			delete(b.by, k.key)
		}
	}
}

// makeRoomLocked drops an eighth of the counters once there are too many, those that make nobody wait first, so that strangers can
// fill neither the memory nor the time of whoever signs in.
func (b *backoff) makeRoomLocked(now time.Time) {
	if len(b.by) < backoffKeysMax {
		return
	}
	for _, all := range []bool{false, true} {
		for k, t := range b.by {
			if len(b.by) <= backoffKeysMax-backoffKeysMax/8 {
				return
			}
			if all || now.Sub(t.last) > backoffForgets || !now.Before(t.until) {
				delete(b.by, k)
			}
		}
	}
}
