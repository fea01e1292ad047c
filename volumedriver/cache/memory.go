package cache

import (
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	memoryShardsMax = 16
	shardLinesMin   = 64 // fewer lines than this do not make a shard of their own
)

// memory is the tier in RAM: lines in an arena that the garbage collector does not see, in shards by key. A reader copies with
// the shard's lock shared, so a line cannot be replaced under it.
type memory struct {
	line   int
	reg    *registry
	arena  []byte
	shards []memoryShard
}

type memoryShard struct {
	mu      sync.RWMutex
	f       fifo
	mem     []byte
	hits    atomic.Int64
	evicted int64
	_       [64]byte
}

// newMemory makes the tier; nil if there is room for no line.
func newMemory(bytes int64, line int, reg *registry) (*memory, error) {
	lines := int(min(bytes/int64(line), slotsMax))
	if lines == 0 {
		return nil, nil
	}
	shards := 1
	for shards < memoryShardsMax && lines/(2*shards) >= shardLinesMin {
		shards *= 2
	}
	perShard := lines / shards
	arena, err := unix.Mmap(-1, 0, shards*perShard*line, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes for the read cache: %w", shards*perShard*line, err)
	}
	m := &memory{line: line, reg: reg, arena: arena, shards: make([]memoryShard, shards)}
	for i := range m.shards {
		m.shards[i].f = newFIFO(perShard)
		m.shards[i].mem = arena[i*perShard*line : (i+1)*perShard*line]
	}
	return m, nil
}

func (m *memory) close() error {
	if m == nil {
		return nil
	}
	for i := range m.shards {
		s := &m.shards[i]
		s.mu.Lock()
		s.f, s.mem = newFIFO(0), nil
		s.mu.Unlock()
	}
	if err := unix.Munmap(m.arena); err != nil {
		return fmt.Errorf("unmap the read cache: %w", err)
	}
	return nil
}

func (m *memory) shard(key uint64) *memoryShard {
	return &m.shards[mix(key)>>40&uint64(len(m.shards)-1)]
}

// read copies bytes of a line from within on. A hit by a scan does not count as one.
func (m *memory) read(key uint64, within int, p []byte, scan bool) bool {
	if m == nil {
		return false
	}
	s := m.shard(key)
	s.mu.RLock()
	slot, ok := s.f.find(key)
	if ok {
		copy(p, s.mem[int(slot)*m.line+within:(int(slot)+1)*m.line])
		if !scan {
			s.f.touch(slot)
		}
	}
	s.mu.RUnlock()
	if ok {
		s.hits.Add(1)
	}
	return ok
}

func (m *memory) has(key uint64) bool {
	if m == nil {
		return false
	}
	s := m.shard(key)
	s.mu.RLock()
	defer s.mu.RUnlock()
	_, ok := s.f.find(key)
	return ok
}

// put admits a line of an object.
func (m *memory) put(id, line, print uint32, data []byte, scan bool) {
	if m == nil || !m.reg.retain(id) {
		return
	}
	key := keyOf(id, line)
	s := m.shard(key)
	s.mu.Lock()
	if _, ok := s.f.find(key); ok {
		s.mu.Unlock()
		m.reg.release(id)
		return
	}
	slot, victim, evicted, ok := s.f.take()
	if ok {
		copy(s.mem[int(slot)*m.line:(int(slot)+1)*m.line], data)
		s.f.publish(slot, key, print, scan)
	}
	if evicted {
		s.evicted++
	}
	s.mu.Unlock()
	if !ok {
		m.reg.release(id)
	}
	if evicted {
		m.reg.release(objectOf(victim))
	}
}

// drop forgets a line; with passed only if nothing but a scan has brought and read it.
func (m *memory) drop(key uint64, passed bool) {
	if m == nil {
		return
	}
	s := m.shard(key)
	if passed {
		s.mu.RLock()
		slot, ok := s.f.find(key)
		ok = ok && atomic.LoadUint32(&s.f.state[slot])&scanFlag != 0
		s.mu.RUnlock()
		if !ok {
			return
		}
	}
	s.mu.Lock()
	slot, ok := s.f.find(key)
	ok = ok && (!passed || s.f.state[slot]&scanFlag != 0)
	if ok {
		s.f.remove(slot)
	}
	s.mu.Unlock()
	if ok {
		m.reg.release(objectOf(key))
	}
}

// count gives the lines held, those that there is room for, hits and evictions.
func (m *memory) count() (lines, room int, hits, evicted int64) {
	if m == nil {
		return 0, 0, 0, 0
	}
	for i := range m.shards {
		s := &m.shards[i]
		s.mu.RLock()
		lines += s.f.len()
		room += len(s.f.keys)
		evicted += s.evicted
		s.mu.RUnlock()
		hits += s.hits.Load()
	}
	return lines, room, hits, evicted
}
