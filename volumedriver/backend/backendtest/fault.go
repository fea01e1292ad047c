package backendtest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"varve/volumedriver/backend"
	"varve/volumedriver/vfs"
)

var (
	// ErrInjected is the error of spoiled calls that name no other.
	ErrInjected = errors.New("injected fault")
	// ErrDown is the error of every call while the backend is down.
	ErrDown = errors.New("backend is down")
)

// Op names a call. Values can be or-ed to a set.
type Op uint8

const (
	OpPut Op = 1 << iota
	OpOpen
	OpStat
	OpDelete
	OpList
	OpSpace
	OpRead
	OpTryRead

	OpAny Op = 1<<iota - 1
)

// Spoil says which calls a Fault spoils, and how. The calls that match Op and Prefix are counted from Add on.
type Spoil struct {
	Op     Op      // set of calls; 0 for all
	Prefix string  // of the object's name
	From   int64   // the first call to spoil; 0 and 1 are the first that matches
	Times  int64   // how many calls from there; 0 for all further ones
	Rate   float64 // spoil only this part of them, at random; 0 for all

	Delay   time.Duration // wait first, or until the context ends; a tried read would block
	Err     error         // fail with this; nil stands for ErrInjected, or for none with Delay or Flip alone
	Applied bool          // carry out the call, and then fail: its reply is lost
	Lost    bool          // fail, with the call carried out or not at random
	Flip    bool          // change one bit of what is read
}

// fails tells whether the call is to return an error.
func (s Spoil) fails() bool { return s.Err != nil || s.Applied || s.Lost || s.Delay == 0 && !s.Flip }

// Fault passes calls on to another backend, apart from those that it spoils. All its choices come from a seed.
type Fault struct {
	inner backend.Backend

	mu     sync.Mutex
	rnd    *rand.Rand
	spoils []*Added
	down   bool
	full   bool
}

// Added is a Spoil in effect.
type Added struct {
	f     *Fault
	s     Spoil
	seen  int64
	fired int64
}

// NewFault wraps inner, with seed 1.
func NewFault(inner backend.Backend) *Fault {
	f := &Fault{inner: inner}
	f.Seed(1)
	return f
}

// Seed starts the random choices anew.
func (f *Fault) Seed(seed int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rnd = rand.New(rand.NewPCG(uint64(seed), 0))
}

// SetDown makes every call fail with ErrDown, or ends that.
func (f *Fault) SetDown(down bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.down = down
}

// SetFull makes every Put fail with backend.ErrNoSpace, or ends that.
func (f *Fault) SetFull(full bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.full = full
}

// Add spoils calls. The first of the Spoils added that picks a call is the only one to spoil it.
func (f *Fault) Add(s Spoil) *Added {
	if s.Op == 0 {
		s.Op = OpAny
	}
	if s.From == 0 {
		s.From = 1
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	a := &Added{f: f, s: s}
	f.spoils = append(f.spoils, a)
	return a
}

// Seen is the number of calls that matched.
func (a *Added) Seen() int64 {
	a.f.mu.Lock()
	defer a.f.mu.Unlock()
	return a.seen
}

// Fired is the number of calls that were spoiled.
func (a *Added) Fired() int64 {
	a.f.mu.Lock()
	defer a.f.mu.Unlock()
	return a.fired
}

// Remove ends it.
func (a *Added) Remove() {
	a.f.mu.Lock()
	defer a.f.mu.Unlock()
	a.f.spoils = slices.DeleteFunc(a.f.spoils, func(o *Added) bool { return o == a })
}

// verdict is what happens to one call.
type verdict struct {
	Spoil
	apply bool // carry it out
	err   error
	bit   uint64 // for Flip
}

func (f *Fault) judge(op Op, name string) verdict {
	f.mu.Lock()
	defer f.mu.Unlock()
	v := verdict{apply: true}
	if f.down {
		return verdict{err: ErrDown}
	}
	picked := false
	for _, a := range f.spoils {
		s := a.s
		if s.Op&op == 0 || !strings.HasPrefix(name, s.Prefix) {
			continue
		}
		a.seen++
		if picked || a.seen < s.From || s.Times > 0 && a.seen >= s.From+s.Times || s.Rate > 0 && f.rnd.Float64() >= s.Rate {
			continue
		}
		picked = true
		a.fired++
		v = verdict{Spoil: s, apply: !s.fails() || s.Applied || s.Lost && f.rnd.IntN(2) == 0, bit: f.rnd.Uint64()}
		if s.fails() {
			v.err = s.Err
			if v.err == nil {
				v.err = ErrInjected
			}
		}
	}
	if !picked && f.full && op == OpPut {
		return verdict{err: backend.ErrNoSpace}
	}
	return v
}

// do spoils or carries out a call.
func (f *Fault) do(ctx context.Context, op Op, what, name string, call func() error) error {
	return f.doWith(ctx, op, what, name, func(verdict) error { return call() })
}

func (f *Fault) doWith(ctx context.Context, op Op, what, name string, call func(verdict) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	v := f.judge(op, name)
	if v.Delay > 0 {
		t := time.NewTimer(v.Delay)
		defer t.Stop()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
	}
	if v.apply {
		if err := call(v); err != nil {
			return err
		}
	}
	if v.err != nil {
		return fmt.Errorf("%s %s: %w", what, name, v.err)
	}
	return nil
}

func (f *Fault) Put(ctx context.Context, name string, parts ...[]byte) error {
	if err := backend.CheckName(name); err != nil {
		return err
	}
	return f.do(ctx, OpPut, "put object", name, func() error { return f.inner.Put(ctx, name, parts...) })
}

func (f *Fault) Open(ctx context.Context, name string) (backend.Object, error) {
	var o backend.Object
	err := f.do(ctx, OpOpen, "open object", name, func() (err error) {
		o, err = f.inner.Open(ctx, name)
		return err
	})
	if err != nil {
		if o != nil {
			err = errors.Join(err, o.Close())
		}
		return nil, err
	}
	return &faultObject{f, name, o}, nil
}

func (f *Fault) Stat(ctx context.Context, name string) (info backend.Info, err error) {
	err = f.do(ctx, OpStat, "stat object", name, func() (err error) {
		info, err = f.inner.Stat(ctx, name)
		return err
	})
	return info, err
}

func (f *Fault) Delete(ctx context.Context, name string) error {
	return f.do(ctx, OpDelete, "delete object", name, func() error { return f.inner.Delete(ctx, name) })
}

func (f *Fault) List(ctx context.Context, prefix, after string, limit int) (infos []backend.Info, err error) {
	err = f.do(ctx, OpList, "list objects", prefix, func() (err error) {
		infos, err = f.inner.List(ctx, prefix, after, limit)
		return err
	})
	if err != nil {
		return nil, err
	}
	return infos, nil
}

func (f *Fault) Space(ctx context.Context) (total, available uint64, err error) {
	err = f.do(ctx, OpSpace, "space", "", func() (err error) {
		total, available, err = f.inner.Space(ctx)
		return err
	})
	return total, available, err
}

func (f *Fault) Close() error { return f.inner.Close() }

type faultObject struct {
	f    *Fault
	name string
	o    backend.Object
}

func (o *faultObject) Size() int64  { return o.o.Size() }
func (o *faultObject) Close() error { return o.o.Close() }

func (o *faultObject) ReadAt(ctx context.Context, p []byte, off int64) error {
	return o.f.doWith(ctx, OpRead, "read object", o.name, func(v verdict) error {
		if err := o.o.ReadAt(ctx, p, off); err != nil {
			return err
		}
		v.flip(p)
		return nil
	})
}

func (o *faultObject) TryReadAt(p []byte, off int64) error {
	v := o.f.judge(OpTryRead, o.name)
	switch {
	case v.Delay > 0:
		return vfs.ErrWouldBlock
	case v.err != nil:
		return fmt.Errorf("read object %s: %w", o.name, v.err)
	}
	if err := o.o.TryReadAt(p, off); err != nil {
		return err
	}
	v.flip(p)
	return nil
}

// flip changes one bit if the call is to read wrong bytes.
func (v verdict) flip(p []byte) {
	if v.Flip && len(p) > 0 {
		bit := v.bit % uint64(len(p)*8)
		p[bit/8] ^= 1 << (bit % 8)
	}
}
