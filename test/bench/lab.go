package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver"
	"varve/volumedriver/backend"
	"varve/volumedriver/blockio"
	"varve/volumedriver/vfs"
)

// lab is a volume driver in this process, for the rows that ask how a cost grows.
type lab struct {
	d    *volumedriver.Driver
	pool uuid.UUID
	stop func() error // once
}

// openLab opens a driver below dir. The backend may be nil: then nothing leaves the log.
func openLab(ctx context.Context, cfg volumedriver.Config, dir string, pool uuid.UUID, store backend.Backend) (*lab, error) {
	if cfg.FS == nil {
		cfg.FS = vfs.OS()
	}
	cfg.Dir = filepath.Join(dir, "data")
	if cfg.ScrubEvery == 0 {
		cfg.ScrubEvery = -1
	}
	d, err := volumedriver.Open(cfg)
	if err != nil {
		return nil, err
	}
	if store != nil {
		d.AddPool(pool, store)
	}
	running, cancel := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- d.Run(running) }()
	return &lab{d: d, pool: pool, stop: sync.OnceValue(func() error {
		cancel()
		return errors.Join(<-ended, d.Close())
	})}, nil
}

// spec is that of one more volume.
func (l *lab) spec(size int64) volumedriver.Spec {
	id := uuid.New()
	return volumedriver.Spec{ID: id, Pool: l.pool, Epoch: 1, Size: size, PoolName: "bench", Path: id.String() + ".raw", Kind: "disk"}
}

// snapshot takes one more and gives its identity.
func (l *lab) snapshot(ctx context.Context, v *volumedriver.Volume) (uuid.UUID, error) {
	id := uuid.New()
	_, err := v.Snapshot(ctx, volumedriver.SnapshotSpec{ID: id, Name: id.String(), Created: time.Now()})
	return id, err
}

// fillOrdered writes [from,to) in order with bytes that do not compress, and waits until they are on the backend.
func (l *lab) fillOrdered(ctx context.Context, v *volumedriver.Volume, from, to int64) error {
	p := make([]byte, 1<<20)
	r := rand.New(rand.NewPCG(uint64(from), uint64(to)))
	for off := from; off < to; off += int64(len(p)) {
		fillRandom(r, p)
		if err := v.Write(ctx, p[:min(int64(len(p)), to-off)], off, 0); err != nil {
			return err
		}
	}
	return l.d.Drain(ctx)
}

// writer keeps up to depth writes of one volume in flight.
type writer struct {
	v     *volumedriver.Volume
	slots chan struct{}
	mu    sync.Mutex
	err   error
}

func newWriter(v *volumedriver.Volume, depth int) *writer {
	return &writer{v: v, slots: make(chan struct{}, depth)}
}

// Done implements blockio.Completer.
func (w *writer) Done(_ uint64, err error) {
	if err != nil {
		w.mu.Lock()
		w.err = errors.Join(w.err, err)
		w.mu.Unlock()
	}
	<-w.slots
}

// Settle implements blockio.Completer.
func (w *writer) Settle(bool) {}

// write submits one; what has to wait is written on the spot.
func (w *writer) write(ctx context.Context, p []byte, off int64, f blockio.Flags) error {
	select {
	case w.slots <- struct{}{}:
	default: // what is in flight begins now
		w.v.Kick()
		w.slots <- struct{}{}
	}
	err := w.v.TryWrite(p, off, f, w, 0)
	if err == nil {
		return nil
	}
	<-w.slots
	if errors.Is(err, blockio.ErrBusy) {
		err = w.v.Write(ctx, p, off, f)
	}
	return err
}

// wait waits for all that is in flight.
func (w *writer) wait() error {
	w.v.Kick()
	for range cap(w.slots) {
		w.slots <- struct{}{}
	}
	for range cap(w.slots) {
		<-w.slots
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

// tally is a backend that counts, and answers after a round trip.
type tally struct {
	backend.Backend
	rtt    time.Duration
	forget bool // objects of data are not kept: nobody is going to read them

	puts, requests atomic.Int64
	putBytes       atomic.Int64
	mu             sync.Mutex
	sizes          map[string]int64
	held           int64
}

func newTally(inner backend.Backend) *tally {
	return &tally{Backend: inner, sizes: make(map[string]int64)}
}

func (b *tally) request(ctx context.Context) error {
	b.requests.Add(1)
	if b.rtt == 0 {
		return ctx.Err()
	}
	select {
	case <-time.After(b.rtt):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (b *tally) Put(ctx context.Context, name string, parts ...[]byte) error {
	if err := b.request(ctx); err != nil {
		return err
	}
	n := int64(0)
	for _, p := range parts {
		n += int64(len(p))
	}
	data := strings.HasPrefix(name, "v/")
	if !b.forget || !data {
		if err := b.Backend.Put(ctx, name, parts...); err != nil {
			return err
		}
	}
	b.puts.Add(1)
	b.putBytes.Add(n)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sizes[name] = n
	b.held += n
	return nil
}

func (b *tally) Open(ctx context.Context, name string) (backend.Object, error) {
	if err := b.request(ctx); err != nil {
		return nil, err
	}
	o, err := b.Backend.Open(ctx, name)
	if err != nil {
		return nil, err
	}
	return &tallied{o, b}, nil
}

func (b *tally) Stat(ctx context.Context, name string) (backend.Info, error) {
	if err := b.request(ctx); err != nil {
		return backend.Info{}, err
	}
	return b.Backend.Stat(ctx, name)
}

func (b *tally) Delete(ctx context.Context, name string) error {
	if err := b.request(ctx); err != nil {
		return err
	}
	if err := b.Backend.Delete(ctx, name); err != nil {
		return err
	}
	b.mu.Lock()
	b.held -= b.sizes[name]
	delete(b.sizes, name)
	b.mu.Unlock()
	return nil
}

func (b *tally) List(ctx context.Context, prefix, after string, most int) ([]backend.Info, error) {
	if err := b.request(ctx); err != nil {
		return nil, err
	}
	return b.Backend.List(ctx, prefix, after, most)
}

// tallied counts reads as requests. Nothing of it is at hand.
type tallied struct {
	backend.Object
	b *tally
}

func (o *tallied) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := o.b.request(ctx); err != nil {
		return err
	}
	return o.Object.ReadAt(ctx, p, off)
}

func (o *tallied) TryReadAt(p []byte, off int64) error {
	if o.b.rtt > 0 {
		return vfs.ErrWouldBlock
	}
	return o.Object.TryReadAt(p, off)
}

// heap is what this process's objects take, after two collections.
func heap() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc + m.StackInuse)
}

// line prints a figure beside its goal.
func line(row, what string, goal string, reached bool) {
	fmt.Printf("%-4s %s (goal %s: %s)\n", row, what, goal, met(reached))
}

// note prints a figure that has no goal.
func note(row, what string) { fmt.Printf("%-4s %s\n", row, what) }
