// Package enginetest is an engine in memory for tests of controllers and of the API: it keeps volumes' sizes, counts
// clients, and fails where a test says so.
package enginetest

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/google/uuid"

	"varve/control/state"
	"varve/control/vdisk"
	"varve/control/vpool"
)

var (
	_ vpool.Engine = (*Engine)(nil)
	_ vdisk.Engine = (*Engine)(nil)
)

// Engine in memory. The zero value is ready.
type Engine struct {
	// mu guards everything below.
	mu      sync.Mutex
	pools   map[uuid.UUID]state.VPool
	volumes map[uuid.UUID]vdisk.Info
	clients map[uuid.UUID]int
	paths   map[uuid.UUID]string
	family  map[uuid.UUID]*volume
	deleted []uuid.UUID
	fail    map[string]error
	files   map[uuid.UUID][]byte
	writes  map[uuid.UUID]int64
	asked   int
}

// Asked counts the calls of Info so far.
func (e *Engine) Asked() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.asked
}

// Fail makes the named method fail until err is nil.
func (e *Engine) Fail(method string, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.fail == nil {
		e.fail = make(map[string]error)
	}
	e.fail[method] = err
}

// SetClients says how many connections have a volume open.
func (e *Engine) SetClients(id uuid.UUID, n int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.clients == nil {
		e.clients = make(map[uuid.UUID]int)
	}
	e.clients[id] = n
}

// Deleted lists the volumes deleted so far.
func (e *Engine) Deleted() []uuid.UUID {
	e.mu.Lock()
	defer e.mu.Unlock()
	return append([]uuid.UUID(nil), e.deleted...)
}

// Pools lists the names of the vPools that the engine has.
func (e *Engine) Pools() map[string]bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	out := make(map[string]bool)
	for _, p := range e.pools {
		out[p.Name] = true
	}
	return out
}

// Path is the last one that the engine was told of.
func (e *Engine) Path(id uuid.UUID) string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.paths[id]
}

// ProbeBackend implements vpool.Engine.
func (e *Engine) ProbeBackend(context.Context, state.Backend, vpool.Keys) (vpool.Probe, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	p := vpool.Probe{Findings: []state.Finding{{Check: "create-only", Found: "refuses an existing name"}}}
	if e.fail["Unsafe"] != nil {
		p.Unsafe = []string{"create-only"}
	}
	return p, e.fail["ProbeBackend"]
}

// TryKeys implements vpool.Engine.
func (e *Engine) TryKeys(context.Context, state.VPool, vpool.Keys) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.fail["TryKeys"]
}

// KeysChanged implements vpool.Engine.
func (e *Engine) KeysChanged(context.Context, uuid.UUID) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.fail["KeysChanged"]
}

// AddPool implements vpool.Engine.
func (e *Engine) AddPool(_ context.Context, p state.VPool) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.fail["AddPool"]; err != nil {
		return err
	}
	if e.pools == nil {
		e.pools = make(map[uuid.UUID]state.VPool)
	}
	e.pools[p.ID] = p
	return nil
}

// RemovePool implements vpool.Engine.
func (e *Engine) RemovePool(_ context.Context, id uuid.UUID) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.pools, id)
	return e.fail["RemovePool"]
}

// Space implements vpool.Engine.
func (e *Engine) Space(id uuid.UUID) (vpool.Space, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	_, ok := e.pools[id]
	return vpool.Space{Total: 1 << 40, Free: 1 << 39, Stored: 1 << 30}, ok
}

// Info implements vdisk.Engine.
func (e *Engine) Info(id uuid.UUID) (vdisk.Info, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.asked++
	i, ok := e.volumes[id]
	return i, ok
}

// Resize implements vdisk.Engine.
func (e *Engine) Resize(_ context.Context, v state.Volume, size int64) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.fail["Resize"]; err != nil {
		return err
	}
	if e.volumes == nil {
		e.volumes = make(map[uuid.UUID]vdisk.Info)
	}
	e.volumes[v.ID] = vdisk.Info{Size: size, Modified: time.Unix(1, 0), Open: true}
	return nil
}

// Renamed implements vdisk.Engine.
func (e *Engine) Renamed(_ context.Context, v state.Volume, pool, path string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.paths == nil {
		e.paths = make(map[uuid.UUID]string)
	}
	e.paths[v.ID] = pool + path
	return e.fail["Renamed"]
}

// Delete implements vdisk.Engine.
func (e *Engine) Delete(_ context.Context, d state.Doomed) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.fail["Delete"]; err != nil {
		return err
	}
	delete(e.volumes, d.ID)
	delete(e.family, d.ID)
	e.deleted = append(e.deleted, d.ID)
	return nil
}

// Clients implements vdisk.Engine.
func (e *Engine) Clients(id uuid.UUID) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.clients[id]
}

// Explain implements vdisk.Engine.
func (e *Engine) Explain(_ context.Context, v state.Volume, offset int64) (vdisk.Explanation, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	lba := uint64(offset) / 4096
	return vdisk.Explanation{State: "object", LBA: lba, Seq: 7, Object: fmt.Sprintf("v/%s/1-7-1", v.ID), CRC: 0xabc}, e.fail["Explain"]
}

// Log applies commands to a store at once, in the place of raft. Err, if set, is what every Apply answers.
type Log struct {
	Store *state.Store
	// Now is the proposer's clock; nil is the real one.
	Now func() time.Time

	// mu guards the fields below.
	mu      sync.Mutex
	index   uint64
	err     error
	entries []byte
}

// Entries are the bytes of all entries so far, one after the other.
func (l *Log) Entries() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.entries)
}

// NewLog returns a log with an empty store.
func NewLog() *Log { return &Log{Store: state.New()} }

// Fail makes Apply answer err until it is nil.
func (l *Log) Fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.err = err
}

// Apply commits a command.
func (l *Log) Apply(ctx context.Context, cmd state.Command) (state.Result, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return state.Result{}, err
	}
	if l.err != nil {
		return state.Result{}, l.err
	}
	l.index++
	now := time.Now
	if l.Now != nil {
		now = l.Now
	}
	entry, err := state.Encode(cmd, uuid.New(), state.Time(now().UnixNano()))
	if err != nil {
		return state.Result{}, err
	}
	l.entries = append(l.entries, entry...)
	return l.Store.Apply(l.index, entry)
}
