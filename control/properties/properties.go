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
}

// Store keeps entries, and may forget them.
type Store interface {
	Get(ctx context.Context, key string) (Entry, bool, error)
	Set(ctx context.Context, key string, e Entry) error
	Delete(ctx context.Context, key string) error
}

// Limits and defaults.
const (
	ValueBytesMax  = 64 << 10
	timeoutDefault = 2 * time.Second
	RetryAfter     = 3 * time.Second
	parallelMax    = 16
	awayMax        = 4096
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
		calls: make(map[string]*call), away: make(map[string]awayEntry)}
	for _, p := range props {
		if _, twice := c.props[p.Name]; twice || p.Name == "" || p.TTL <= 0 || p.Fetch == nil {
			return nil, fmt.Errorf("property %q: given twice, or without name, TTL or source", p.Name)
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
	last, known := c.last(ctx, key)
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
	delete(c.away, "object "+keyOf(object, property))
	if p.Owner != nil {
		delete(c.away, "owner "+p.Owner(object))
	}
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

// last is the newest that the stores know.
func (c *Cache) last(ctx context.Context, key string) (Entry, bool) {
	entry, known, _ := c.memory.Get(ctx, key) // memory does not fail
	if c.shared == nil {
		return entry, known
	}
	other, ok, err := c.shared.Get(ctx, key)
	if err != nil {
		c.log.Debug("shared property cache does not answer", "err", err)
	}
	if ok && (!known || other.At.After(entry.At)) {
		return other, true
	}
	return entry, known
}

func (c *Cache) keep(ctx context.Context, key string, e Entry) {
	_ = c.memory.Set(ctx, key, e) // memory does not fail
	if c.shared != nil {
		if err := c.shared.Set(ctx, key, e); err != nil {
			c.log.Debug("shared property cache does not answer", "err", err)
		}
	}
}

// fetch asks the owner, unless somebody asks it just now, whose answer then serves, or it just did not answer.
func (c *Cache) fetch(ctx context.Context, p Property, object, key string) (Entry, error) {
	for {
		c.mu.Lock()
		if why, is := c.isAway(p, object, key); is {
			c.mu.Unlock()
			return Entry{}, errors.New(why)
		}
		running, ok := c.calls[key]
		if !ok {
			running = &call{done: make(chan struct{})}
			c.calls[key] = running
			c.mu.Unlock()
			c.ask(ctx, p, object, key, running)
			return running.entry, running.err
		}
		c.mu.Unlock()
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
	if err != nil && !errors.Is(err, context.Canceled) {
		c.setAway(p, object, key, err)
	}
	c.mu.Unlock()
	close(running.done)
}

// AwayError says that an owner cannot be reached at all, so that its other objects need not be asked for either.
type AwayError struct{ Err error }

func (e *AwayError) Error() string { return e.Err.Error() }

func (e *AwayError) Unwrap() error { return e.Err }

// isAway says why there is no use in asking. c.mu is held.
func (c *Cache) isAway(p Property, object, key string) (string, bool) {
	names := []string{"object " + key}
	if p.Owner != nil {
		names = append(names, "owner "+p.Owner(object))
	}
	for _, name := range names {
		if a, ok := c.away[name]; ok {
			if c.now().Before(a.until) {
				return a.why, true
			}
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
