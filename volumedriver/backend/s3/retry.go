package s3

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/minio/minio-go/v7"
)

const (
	firstWait     = 25 * time.Millisecond
	slowFirstWait = 400 * time.Millisecond
	askAttempts   = 6
	putAttempts   = 6
)

// The library's own repetition is off, but it would still sleep after its only attempt, with a place in the budget held. Nothing
// else in this program uses it.
func init() { minio.DefaultRetryUnit = 0 }

// policy says how long a call goes on.
type policy struct {
	attempts int       // 0: any number
	until    time.Time // zero: for ever
	stubborn bool      // also after a refusal
}

func (s *Store) ask() policy { return policy{attempts: askAttempts} }

func (s *Store) read() policy { return policy{until: time.Now().Add(s.cfg.Patience), stubborn: true} }

// goesOn says whether one more attempt makes sense.
func (p policy) goesOn(n int, err error) bool {
	if p.attempts > 0 && n >= p.attempts || !p.until.IsZero() && time.Now().After(p.until) {
		return false
	}
	switch kindOf(err) {
	case transient, slow, conflict:
		return true
	case refusal, full:
		return p.stubborn
	}
	return false
}

// attempt carries out one request for a call: in its turn and within a time that allows for its bytes.
func (s *Store) attempt(ctx context.Context, l *lane, size int64, do func(ctx context.Context) error) error {
	if err := l.enter(ctx); err != nil {
		return classify(ctx, err)
	}
	defer l.leave()
	limit := s.cfg.Attempt + time.Duration(size/bytesPerWait)*time.Second
	short, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err := do(short)
	if err != nil && ctx.Err() == nil && short.Err() != nil {
		return &Error{Detail: fmt.Sprintf("no answer within %s", limit), remedy: "check that the endpoint is up and reachable from this node", err: err}
	}
	err = classify(ctx, err)
	if e, ok := errors.AsType[*Error](err); ok {
		e.addSkew(l.date.Load(), time.Now())
	}
	return err
}

// retry makes attempts as long as the policy says. The request that do makes is the nth, from 0.
func (s *Store) retry(ctx context.Context, l *lane, p policy, size int64, do func(ctx context.Context, n int) error) error {
	for n := 0; ; n++ {
		err := s.attempt(ctx, l, size, func(ctx context.Context) error { return do(ctx, n) })
		if e, ok := errors.AsType[*Error](err); err == nil {
			s.answered()
		} else if ok && e.kind == transient && e.Status == 0 && ctx.Err() == nil {
			s.away()
		}
		if err == nil || ctx.Err() != nil || !p.goesOn(n+1, err) {
			if k := kindOf(err); err != nil && (k == refusal || k == full) {
				s.refusals.Add(1)
			}
			return err
		}
		s.retries.Add(1)
		if e := s.pause(ctx, n, err); e != nil {
			return errors.Join(classify(ctx, e), err)
		}
	}
}

// pause waits before attempt n+1: up to a limit that doubles.
func (s *Store) pause(ctx context.Context, n int, err error) error {
	first := firstWait
	if k := kindOf(err); k == slow || k == refusal || k == full {
		first = slowFirstWait
	}
	limit := min(s.cfg.Backoff, first<<min(n, 16))
	back := s.back.Load()
	if k := kindOf(err); k != transient {
		back = nil // the store is there
	}
	t := time.NewTimer(rand.N(limit) + time.Millisecond)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-back.waits():
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// comeback lets those who wait for a store that is away go on as soon as one of them has reached it.
type comeback struct{ reached chan struct{} }

func (c *comeback) waits() <-chan struct{} {
	if c == nil {
		return nil
	}
	return c.reached
}

// away notes that the store was not reached, answered that it was.
func (s *Store) away() { s.back.CompareAndSwap(nil, &comeback{make(chan struct{})}) }

func (s *Store) answered() {
	if c := s.back.Load(); c != nil && s.back.CompareAndSwap(c, nil) {
		close(c.reached)
	}
}
