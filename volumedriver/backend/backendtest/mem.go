package backendtest

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
	"sync"

	"varve/volumedriver/backend"
)

// Mem is a backend in memory. It outlives whoever uses it: Close only ends its use until Reopen.
type Mem struct {
	mu      sync.Mutex
	objects map[string][]byte
	sorted  []string // names in order, nil if to be made
	closed  bool
}

// NewMem gives an empty backend.
func NewMem() *Mem { return &Mem{objects: map[string][]byte{}} }

// Reopen allows use after Close.
func (m *Mem) Reopen() *Mem {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = false
	return m
}

// Clone copies the store as it is now; the objects' bytes are shared.
func (m *Mem) Clone() *Mem {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := &Mem{objects: make(map[string][]byte, len(m.objects))}
	for name, p := range m.objects {
		c.objects[name] = p
	}
	return c
}

// Names lists all objects.
func (m *Mem) Names() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.sortedLocked())
}

// Corrupt replaces an object's bytes by what change makes of a copy of them, as a rotten store would.
func (m *Mem) Corrupt(name string, change func([]byte) []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p, ok := m.objects[name]
	if !ok {
		panic("no object " + name)
	}
	m.objects[name] = change(slices.Clone(p))
}

func (m *Mem) sortedLocked() []string {
	if m.sorted == nil {
		m.sorted = make([]string, 0, len(m.objects))
		for name := range m.objects {
			m.sorted = append(m.sorted, name)
		}
		slices.Sort(m.sorted)
	}
	return m.sorted
}

// ready checks what every call checks first, and leaves m locked if there is no error.
func (m *Mem) ready(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return fmt.Errorf("backend in memory: %w", fs.ErrClosed)
	}
	return nil
}

func (m *Mem) Put(ctx context.Context, name string, parts ...[]byte) error {
	if err := backend.CheckName(name); err != nil {
		return err
	}
	if err := m.ready(ctx); err != nil {
		return err
	}
	defer m.mu.Unlock()
	if _, ok := m.objects[name]; ok {
		return fmt.Errorf("put object %s: %w", name, backend.ErrExist)
	}
	m.objects[name] = slices.Concat(parts...)
	m.sorted = nil
	return nil
}

func (m *Mem) Open(ctx context.Context, name string) (backend.Object, error) {
	if err := backend.CheckName(name); err != nil {
		return nil, err
	}
	if err := m.ready(ctx); err != nil {
		return nil, err
	}
	defer m.mu.Unlock()
	p, ok := m.objects[name]
	if !ok {
		return nil, fmt.Errorf("open object %s: %w", name, backend.ErrNotExist)
	}
	return memObject{name, p}, nil
}

func (m *Mem) Stat(ctx context.Context, name string) (backend.Info, error) {
	if err := backend.CheckName(name); err != nil {
		return backend.Info{}, err
	}
	if err := m.ready(ctx); err != nil {
		return backend.Info{}, err
	}
	defer m.mu.Unlock()
	p, ok := m.objects[name]
	if !ok {
		return backend.Info{}, fmt.Errorf("stat object %s: %w", name, backend.ErrNotExist)
	}
	return backend.Info{Name: name, Size: int64(len(p))}, nil
}

func (m *Mem) Delete(ctx context.Context, name string) error {
	if err := backend.CheckName(name); err != nil {
		return err
	}
	if err := m.ready(ctx); err != nil {
		return err
	}
	defer m.mu.Unlock()
	if _, ok := m.objects[name]; ok {
		delete(m.objects, name)
		m.sorted = nil
	}
	return nil
}

func (m *Mem) List(ctx context.Context, prefix, after string, limit int) ([]backend.Info, error) {
	if err := m.ready(ctx); err != nil {
		return nil, err
	}
	defer m.mu.Unlock()
	names := m.sortedLocked()
	var found []backend.Info
	for i, _ := slices.BinarySearch(names, max(prefix, after)); i < len(names) && len(found) < limit; i++ {
		if !strings.HasPrefix(names[i], prefix) {
			break
		}
		if names[i] > after {
			found = append(found, backend.Info{Name: names[i], Size: int64(len(m.objects[names[i]]))})
		}
	}
	return found, nil
}

// Space knows no limit.
func (m *Mem) Space(ctx context.Context) (total, available uint64, err error) {
	if err := m.ready(ctx); err != nil {
		return 0, 0, err
	}
	m.mu.Unlock()
	return 0, 0, nil
}

func (m *Mem) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	return nil
}

type memObject struct {
	name string
	p    []byte
}

func (o memObject) Size() int64  { return int64(len(o.p)) }
func (o memObject) Close() error { return nil }

func (o memObject) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return o.TryReadAt(p, off)
}

func (o memObject) TryReadAt(p []byte, off int64) error {
	if off < 0 || off > o.Size() || int64(len(p)) > o.Size()-off {
		return fmt.Errorf("read object %s: bytes %d+%d of %d: %w", o.name, off, len(p), o.Size(), io.ErrUnexpectedEOF)
	}
	copy(p, o.p[off:])
	return nil
}
