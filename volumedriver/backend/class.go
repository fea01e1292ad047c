package backend

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
)

// Class says for whom a call works. A backend whose capacity is shared over a network gives each class its own share, so that
// none can starve those before it: reads of guests, then uploads of the log, then scrub, then replication.
type Class uint8

const (
	// Foreground is what a context without a class is: reads and uploads that guests wait for, or that free the log.
	Foreground Class = iota
	// Scrub reclaims and verifies.
	Scrub
	// Replication copies to other clusters.
	Replication
)

type classKey struct{}

// WithClass marks calls as those of a class.
func WithClass(ctx context.Context, c Class) context.Context {
	return context.WithValue(ctx, classKey{}, c)
}

// ClassOf gives the class that a context was marked with.
func ClassOf(ctx context.Context) Class {
	c, _ := ctx.Value(classKey{}).(Class)
	return c
}

type cachedKey struct{}

// WithCached marks a Put of bytes that are in the machine's memory because they were written lately, and that are likely to be
// read: a backend with a page cache keeps them there. Without it an object is taken for one that nobody will read soon.
func WithCached(ctx context.Context) context.Context {
	return context.WithValue(ctx, cachedKey{}, true)
}

// Cached says whether a context was marked so.
func Cached(ctx context.Context) bool {
	on, _ := ctx.Value(cachedKey{}).(bool)
	return on
}

// turns are as many as half of the processors.
var turns = make(chan struct{}, max(1, runtime.GOMAXPROCS(0)/2))

// TakeTurn waits for leave to keep a processor busy for milliseconds, with hashing or packing, until end is called. While every
// processor is busy, the runtime looks only every 10 ms whether a guest's request has come. An error is that of ctx.
func TakeTurn(ctx context.Context) (end func(), err error) {
	select {
	case turns <- struct{}{}:
		return func() { <-turns }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Distant says whether a backend is reached over a network, so that several Puts have to be under way at a time to make use of it.
func Distant(b Backend) bool {
	d, ok := b.(interface{ Distant() bool })
	return ok && d.Distant()
}

// BatchDeleter is a backend that deletes many objects in one call. As with Delete, objects that are not there are no error;
// when it fails, any of them may be gone.
type BatchDeleter interface {
	DeleteAll(ctx context.Context, names []string) error
}

const deletersMax = 8

// DeleteAll deletes many objects, in batches where the backend can, else several at a time.
func DeleteAll(ctx context.Context, b Backend, names []string) error {
	if d, ok := b.(BatchDeleter); ok {
		return d.DeleteAll(ctx, names)
	}
	var wg sync.WaitGroup
	errs := make([]error, min(deletersMax, len(names)))
	for w := range errs {
		wg.Go(func() {
			for i := w; i < len(names); i += len(errs) {
				if err := b.Delete(ctx, names[i]); err != nil {
					errs[w] = fmt.Errorf("delete %d objects: %w", len(names), err)
					return
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}
