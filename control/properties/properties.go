// Package properties is what the cluster knows of objects beyond its state: status, statistics, stored bytes, the state of a
// log's copy. Their truth is with the owner; this is a cache of it, in the place of Memcached and in front of it.
//
//	Get: fresh in the store                      -> that
//	     else ask the owner, one caller at a time for all that wait
//	       it answers                            -> keep it with its time, return it
//	       it does not                           -> the last known value with its age and the reason; the owner is left
//	                                                alone for a moment, so that a list of its ten thousand vDisks
//	                                                costs one timeout and not ten thousand
//
// Where a list shows many objects of an owner, one question brings them all, and Run asks it again while somebody looks (Property.All):
// Get then waits for nobody, once anything is known. Where Run runs, it also is Run that tries owners again that did not answer, so that a
// slow or dead node costs whoever asks first one timeout, and nobody after that.
//
// So a value is never silently zero and an owner that is away is never an error of the whole answer: a Value says whether
// it is known, how old it is, and why it is not newer.
//
// The store is this process's memory, or memcached with the memory behind it for when that is away.
package properties

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

// Property is a kind of value that objects have.
type Property struct {
	Name string
	// TTL is how long a value counts as fresh.
	TTL time.Duration
	// Timeout bounds one question; 0 is 2 s.
	Timeout time.Duration
	// Fetch asks the owner of an object. Its answer is JSON.
	Fetch func(ctx context.Context, object string) (json.RawMessage, error)
	// All, in the place of Fetch, asks an owner for all of its objects. Run does so every TTL while they are looked at; Owner is needed.
	All func(ctx context.Context, owner string) (map[string]json.RawMessage, error)
	// Owner names who answers for an object, "" where nobody is known: questions to an owner that just did not answer are
	// not repeated for RetryAfter.
	Owner func(object string) string
}

// Value is what is known of a property.
type Value struct {
	// Known is false where nobody ever said.
	Known bool            `json:"known"`
	JSON  json.RawMessage `json:"value,omitempty"`
	At    time.Time       `json:"at,omitzero"`
	// Stale says that it is older than its TTL, and Err why there is no newer one.
	Stale bool   `json:"stale,omitempty"`
	Err   string `json:"error,omitempty"`
}

// Age is how old a value is.
func (v Value) Age(now time.Time) time.Duration { return max(0, now.Sub(v.At)) }

// Decode reads a known value; false where it is not known or does not fit.
func (v Value) Decode(into any) bool { return v.Known && json.Unmarshal(v.JSON, into) == nil }

// Entry is a value as a store keeps it.
type Entry struct {
	At   time.Time       `json:"at"`
	JSON json.RawMessage `json:"v"`
	told time.Time       // to the shared store
}

// Store keeps entries, and may forget them.
type Store interface {
	Get(ctx context.Context, key string) (Entry, bool, error)
	Set(ctx context.Context, key string, e Entry) error
	Delete(ctx context.Context, key string) error
}

// Limits and defaults.
const (
	ValueBytesMax  = 512 << 10
	timeoutDefault = 2 * time.Second
	RetryAfter     = 3 * time.Second
	parallelMax    = 16
	awayMax        = 4096
	ownersMax      = 1024
	probesMax      = 64
	// wantedFor is how long an owner is asked for all of its objects after somebody has looked at one.
	wantedFor = time.Minute
	// knownWait is how long a first look waits for something newer than what is known.
	knownWait = time.Second
	// sharedEvery is how often a value that stays the same is told to the shared store again.
	sharedEvery = 30 * time.Second
)

// Cache answers for properties.
type Cache struct {
	props  map[string]Property
	memory *Memory
	shared Store // nil: memory alone
	log    *slog.Logger
	now    func() time.Time

	mu    sync.Mutex
	calls map[string]*call
	// away are owners and objects that did not answer, with when to ask again.
	away map[string]awayEntry
	// kept are the owners of properties with All that somebody looks at.
	kept map[string]*owner
	// sharedAway is until when the shared store is left alone.
	sharedAway time.Time
	running    bool

	kick   chan struct{}
	probes chan probe
}

// owner is what is known of one that is asked for all of its objects.
type owner struct {
	prop   Property
	name   string
	since  time.Time // when the first one looked
	wanted time.Time
	next   time.Time     // when to ask again
	at     time.Time     // of its last answer
	first  chan struct{} // closed when it has answered or failed for the first time
	asking bool
	err    error
}

// probe is a question that Run asks in the background.
type probe struct {
	prop        Property
	object, key string
}

type call struct {
	done  chan struct{}
	entry Entry
	err   error
}

type awayEntry struct {
	until time.Time
	why   string
}

// New wires a cache. shared may be nil.
func New(props []Property, shared Store, log *slog.Logger) (*Cache, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	c := &Cache{props: make(map[string]Property), memory: NewMemory(), shared: shared, log: log, now: time.Now,
		calls: make(map[string]*call), away: make(map[string]awayEntry), kept: make(map[string]*owner), kick: make(chan struct{}, 1),
		probes: make(chan probe, probesMax)}
	for _, p := range props {
		if _, twice := c.props[p.Name]; twice || p.Name == "" || p.TTL <= 0 || (p.Fetch == nil) == (p.All == nil) || p.All != nil && p.Owner == nil {
			return nil, fmt.Errorf("property %q: given twice, or without name, TTL or one source", p.Name)
		}
		if p.Timeout == 0 {
			p.Timeout = timeoutDefault
		}
		c.props[p.Name] = p
	}
	return c, nil
}

func keyOf(object, property string) string { return property + "/" + object }

// Get returns what is known of an object's property, fetched anew where it is not fresh.
func (c *Cache) Get(ctx context.Context, object, property string) Value {
	p, ok := c.props[property]
	if !ok {
		return Value{Err: fmt.Sprintf("property %q is not known", property)}
	}
	key := keyOf(object, property)
	if p.All != nil {
		return c.look(ctx, p, object, key)
	}
	last, known := c.last(ctx, key, p.TTL)
	if known && c.now().Sub(last.At) < p.TTL {
		return Value{Known: true, JSON: last.JSON, At: last.At}
	}
	entry, err := c.fetch(ctx, p, object, key)
	if err == nil {
		return Value{Known: true, JSON: entry.JSON, At: entry.At}
	}
	v := Value{Known: known, Stale: known, Err: err.Error()}
	if known {
		v.JSON, v.At = last.JSON, last.At
	}
	return v
}

// GetAll is Get for many objects, some at a time, in their order.
func (c *Cache) GetAll(ctx context.Context, objects []string, property string) []Value {
	out := make([]Value, len(objects))
	var wg sync.WaitGroup
	next := make(chan int)
	for range min(parallelMax, len(objects)) {
		wg.Go(func() {
			for i := range next {
				out[i] = c.Get(ctx, objects[i], property)
			}
		})
	}
	for i := range objects {
		next <- i
	}
	close(next)
	wg.Wait()
	return out
}

// Push is an owner's own word on a property.
func (c *Cache) Push(ctx context.Context, object, property string, value json.RawMessage) error {
	p, ok := c.props[property]
	if !ok || len(value) > ValueBytesMax || !json.Valid(value) {
		return fmt.Errorf("push property %q of %s: not known, not JSON or longer than %d bytes", property, object, ValueBytesMax)
	}
	c.keep(ctx, keyOf(object, property), Entry{At: c.now(), JSON: value})
	c.mu.Lock()
	c.isBack(p, object, keyOf(object, property))
	c.mu.Unlock()
	return nil
}

// Forget drops what is known of a property, because it has just been changed.
func (c *Cache) Forget(ctx context.Context, object, property string) {
	key := keyOf(object, property)
	_ = c.memory.Delete(ctx, key) // memory does not fail
	if c.shared != nil {
		if err := c.shared.Delete(ctx, key); err != nil {
			c.log.Debug("shared property cache does not answer", "err", err)
		}
	}
}

// last is the newest that the stores know; the shared one is asked where this process's has nothing fresh.
func (c *Cache) last(ctx context.Context, key string, ttl time.Duration) (Entry, bool) {
	entry, known, _ := c.memory.Get(ctx, key) // memory does not fail
	if c.shared == nil || known && c.now().Sub(entry.At) < ttl || c.leaveShared() {
		return entry, known
	}
	other, ok, err := c.shared.Get(ctx, key)
	c.sharedFailed(err)
	if ok && (!known || other.At.After(entry.At)) {
		return other, true
	}
	return entry, known
}

func (c *Cache) keep(ctx context.Context, key string, e Entry) {
	was, known, _ := c.memory.Get(ctx, key) // memory does not fail
	e.told = e.At
	same := known && string(was.JSON) == string(e.JSON) && e.At.Sub(was.told) < sharedEvery
	if same {
		e.told = was.told
	}
	_ = c.memory.Set(ctx, key, e) // memory does not fail
	if c.shared != nil && !same && !c.leaveShared() {
		c.sharedFailed(c.shared.Set(ctx, key, e))
	}
}

// leaveShared says that the shared store did not answer a moment ago: its timeouts are not waited for again and again.
func (c *Cache) leaveShared() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now().Before(c.sharedAway)
}

func (c *Cache) sharedFailed(err error) {
	if err == nil {
		return
	}
	c.log.Debug("shared property cache does not answer", "err", err)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sharedAway = c.now().Add(RetryAfter)
}

// look gives what the owner of an object said last, and has it asked again and again from now on. It waits for the first answer alone.
func (c *Cache) look(ctx context.Context, p Property, object, key string) Value {
	name := p.Owner(object)
	c.mu.Lock()
	o := c.kept[p.Name+"/"+name]
	if o == nil {
		if len(c.kept) >= ownersMax {
			c.mu.Unlock()
			return Value{Err: "too many owners are looked at"}
		}
		o = &owner{prop: p, name: name, since: c.now(), first: make(chan struct{})}
		c.kept[p.Name+"/"+name] = o
	}
	o.wanted = c.now()
	c.mu.Unlock()
	entry, known, _ := c.memory.Get(ctx, key) // memory does not fail
	select {
	case <-o.first:
	default:
		select {
		case c.kick <- struct{}{}:
		default:
		}
		if !known {
			entry, known = c.last(ctx, key, p.TTL)
		}
		if wait := p.Timeout; !known || c.now().Sub(entry.At) >= p.TTL {
			if known {
				wait = min(wait, knownWait)
			}
			t := time.NewTimer(wait - c.now().Sub(o.since)) // of all who look, counted once
			select {
			case <-o.first:
			case <-ctx.Done():
			case <-t.C:
			}
			t.Stop()
			if e, heard, _ := c.memory.Get(ctx, key); heard {
				entry, known = e, true
			}
		}
	}
	c.mu.Lock()
	at, err := o.at, o.err
	c.mu.Unlock()
	v := Value{Known: known, JSON: entry.JSON, At: entry.At}
	switch {
	case err != nil:
		v.Stale, v.Err = known, err.Error()
	case at.IsZero() && (!known || c.now().Sub(entry.At) >= p.TTL):
		v.Stale, v.Err = known, "it has not answered yet"
	case known && entry.At.Before(at): // it told of its objects without this one
		return Value{}
	}
	return v
}

// Renew asks an owner for all of its objects at once, after they were changed.
func (c *Cache) Renew(ctx context.Context, property, name string) {
	p, ok := c.props[property]
	if !ok || p.All == nil {
		return
	}
	c.mu.Lock()
	o := c.kept[p.Name+"/"+name]
	c.mu.Unlock()
	if o == nil {
		return // nobody has looked: the first who does asks
	}
	c.askAll(ctx, o)
}

// Run keeps what is looked at fresh, and tries again what did not answer, until ctx ends.
func (c *Cache) Run(ctx context.Context) error {
	c.mu.Lock()
	c.running = true
	c.mu.Unlock()
	var asking sync.WaitGroup
	defer func() {
		c.mu.Lock()
		c.running = false
		c.mu.Unlock()
		asking.Wait()
	}()
	for {
		wait := wantedFor
		now := c.now()
		c.mu.Lock()
		for key, o := range c.kept {
			switch {
			case o.asking:
				wait = min(wait, max(o.next.Sub(now), o.prop.TTL/2))
			case now.Sub(o.wanted) > wantedFor:
				delete(c.kept, key)
			case now.Before(o.next):
				wait = min(wait, o.next.Sub(now))
			default:
				o.asking, o.next = true, now.Add(o.prop.TTL)
				wait = min(wait, o.prop.TTL)
				asking.Go(func() {
					c.askAll(ctx, o)
					c.mu.Lock()
					o.asking = false
					c.mu.Unlock()
				})
			}
		}
		c.mu.Unlock()
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-c.kick:
		case <-t.C:
		case p := <-c.probes:
			asking.Go(func() {
				if running, mine := c.begin(p.key); mine {
					c.ask(ctx, p.prop, p.object, p.key, running)
				}
			})
		}
		t.Stop()
	}
}

// askAll asks an owner and keeps what it says.
func (c *Cache) askAll(ctx context.Context, o *owner) {
	ask, cancel := context.WithTimeout(ctx, o.prop.Timeout)
	defer cancel()
	all, err := o.prop.All(ask, o.name)
	if ctx.Err() != nil {
		return
	}
	at := c.now()
	for object, value := range all {
		if len(value) <= ValueBytesMax {
			c.keep(ctx, keyOf(object, o.prop.Name), Entry{At: at, JSON: value})
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if o.err = err; err == nil {
		o.at = at
	}
	select {
	case <-o.first:
	default:
		close(o.first)
	}
}

// begin makes a call of a key its caller's to do, unless somebody does it now.
func (c *Cache) begin(key string) (running *call, mine bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if running, ok := c.calls[key]; ok {
		return running, false
	}
	running = &call{done: make(chan struct{})}
	c.calls[key] = running
	return running, true
}

// fetch asks the owner, unless somebody asks it just now, whose answer then serves, or it just did not answer.
func (c *Cache) fetch(ctx context.Context, p Property, object, key string) (Entry, error) {
	for {
		c.mu.Lock()
		why, is := c.isAway(p, object, key)
		c.mu.Unlock()
		if is {
			return Entry{}, errors.New(why)
		}
		running, mine := c.begin(key)
		if mine {
			c.ask(ctx, p, object, key, running)
			return running.entry, running.err
		}
		select {
		case <-ctx.Done():
			return Entry{}, ctx.Err()
		case <-running.done:
		}
		// Its asker's end is not the owner's silence: ask for ourselves.
		if !errors.Is(running.err, context.Canceled) {
			return running.entry, running.err
		}
	}
}

// ask does the call and tells those who wait.
func (c *Cache) ask(ctx context.Context, p Property, object, key string, running *call) {
	askCtx, cancel := context.WithTimeout(ctx, p.Timeout)
	defer cancel()
	value, err := p.Fetch(askCtx, object)
	switch {
	case err == nil && (len(value) > ValueBytesMax || !json.Valid(value)):
		err = fmt.Errorf("property %s of %s: answer of %d bytes is too long or not JSON", p.Name, object, len(value))
	case err != nil && ctx.Err() != nil:
		err = fmt.Errorf("property %s of %s: %w", p.Name, object, context.Canceled)
	case err != nil:
		err = fmt.Errorf("property %s of %s: %w", p.Name, object, err)
	}
	if err == nil {
		running.entry = Entry{At: c.now(), JSON: value}
		c.keep(ctx, key, running.entry)
	}
	running.err = err
	c.mu.Lock()
	delete(c.calls, key)
	if err == nil {
		c.isBack(p, object, key)
	} else if !errors.Is(err, context.Canceled) {
		c.setAway(p, object, key, err)
	}
	c.mu.Unlock()
	close(running.done)
}

// AwayError says that an owner cannot be reached at all, so that its other objects need not be asked for either.
type AwayError struct{ Err error }

func (e *AwayError) Error() string { return e.Err.Error() }

func (e *AwayError) Unwrap() error { return e.Err }

// awayNames are those that an object's silence is noted by: its own, and its owner's.
func awayNames(p Property, object, key string) []string {
	names := []string{"object " + key}
	if p.Owner != nil {
		names = append(names, "owner "+p.Owner(object))
	}
	return names
}

// isBack forgets that an object or its owner did not answer. c.mu is held.
func (c *Cache) isBack(p Property, object, key string) {
	for _, name := range awayNames(p, object, key) {
		delete(c.away, name)
	}
}

// isAway says why there is no use in asking. When it is time to try again, Run does so, and until then the answer stays; without Run
// whoever asks tries. c.mu is held.
func (c *Cache) isAway(p Property, object, key string) (string, bool) {
	for _, name := range awayNames(p, object, key) {
		a, ok := c.away[name]
		switch {
		case !ok:
		case c.now().Before(a.until):
			return a.why, true
		case c.running:
			select {
			case c.probes <- probe{p, object, key}:
			default: // it is asked with another one
			}
			a.until = c.now().Add(RetryAfter)
			c.away[name] = a
			return a.why, true
		default:
			delete(c.away, name)
		}
	}
	return "", false
}

// setAway leaves an object alone for a moment, and its owner if that is what does not answer. c.mu is held.
func (c *Cache) setAway(p Property, object, key string, err error) {
	if len(c.away) >= awayMax {
		clear(c.away) // at worst some are asked again too early
	}
	a := awayEntry{until: c.now().Add(RetryAfter), why: err.Error()}
	c.away["object "+key] = a
	_, silent := errors.AsType[*AwayError](err)
	if p.Owner != nil && (silent || errors.Is(err, context.DeadlineExceeded)) {
		c.away["owner "+p.Owner(object)] = a
	}
}
