package properties

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/bradfitz/gomemcache/memcache"
)

// Memory is a store in this process, bounded in entries and bytes.
type Memory struct {
	mu    sync.Mutex
	m     map[string]Entry
	bytes int
}

const (
	memoryEntriesMax = 200_000
	memoryBytesMax   = 64 << 20
	entryOverhead    = 128
	evictSample      = 8
)

// NewMemory returns an empty store.
func NewMemory() *Memory { return &Memory{m: make(map[string]Entry)} }

// Get implements Store.
func (s *Memory) Get(_ context.Context, key string) (Entry, bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e, ok := s.m[key]
	return e, ok, nil
}

// Set implements Store.
func (s *Memory) Set(_ context.Context, key string, e Entry) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dropLocked(key)
	s.m[key] = e
	s.bytes += cost(key, e)
	for len(s.m) > memoryEntriesMax || s.bytes > memoryBytesMax {
		s.evictLocked()
	}
	return nil
}

// Delete implements Store.
func (s *Memory) Delete(_ context.Context, key string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dropLocked(key)
	return nil
}

func cost(key string, e Entry) int { return entryOverhead + len(key) + len(e.JSON) }

func (s *Memory) dropLocked(key string) {
	if e, ok := s.m[key]; ok {
		s.bytes -= cost(key, e)
		delete(s.m, key)
	}
}

// evictLocked drops the oldest of a few; Go's map order makes the sample a random one.
func (s *Memory) evictLocked() {
	victim, n := "", 0
	var oldest time.Time
	for key, e := range s.m {
		if n == 0 || e.At.Before(oldest) {
			victim, oldest = key, e.At
		}
		if n++; n == evictSample {
			break
		}
	}
	s.dropLocked(victim)
}

// Memcached is a store in external memcached servers, shared by all nodes.
type Memcached struct {
	client *memcache.Client
	prefix string
}

const (
	memcachedTimeout = 200 * time.Millisecond
	memcachedKeep    = 24 * time.Hour
)

// NewMemcached uses the servers (host:port) under a prefix of the cluster's own. It connects when it is first used.
func NewMemcached(cluster string, servers ...string) (*Memcached, error) {
	list := new(memcache.ServerList)
	if len(servers) == 0 {
		return nil, errors.New("no memcached server named")
	}
	if err := list.SetServers(servers...); err != nil {
		return nil, fmt.Errorf("memcached servers: %w", err)
	}
	c := memcache.NewFromSelector(list)
	c.Timeout = memcachedTimeout
	return &Memcached{client: c, prefix: "varve:" + cluster + ":"}, nil
}

// key is one that memcached takes whatever the object is called: its own limit is 250 bytes without spaces.
func (s *Memcached) key(key string) string {
	sum := sha256.Sum256([]byte(s.prefix + key))
	return "varve:" + hex.EncodeToString(sum[:])
}

// stored has the key in it, so that a hash or a server that mixes things up is found.
type stored struct {
	Key string `json:"k"`
	Entry
}

// Get implements Store.
func (s *Memcached) Get(_ context.Context, key string) (Entry, bool, error) {
	item, err := s.client.Get(s.key(key))
	if errors.Is(err, memcache.ErrCacheMiss) {
		return Entry{}, false, nil
	}
	if err != nil {
		return Entry{}, false, fmt.Errorf("ask memcached: %w", err)
	}
	var e stored
	if len(item.Value) > 2*ValueBytesMax || json.Unmarshal(item.Value, &e) != nil || e.Key != s.prefix+key {
		return Entry{}, false, fmt.Errorf("ask memcached: answer for %s is not its entry", key)
	}
	return e.Entry, true, nil
}

// Set implements Store.
func (s *Memcached) Set(_ context.Context, key string, e Entry) error {
	b, err := json.Marshal(stored{Key: s.prefix + key, Entry: e})
	if err != nil {
		return fmt.Errorf("entry for memcached: %w", err)
	}
	if err := s.client.Set(&memcache.Item{Key: s.key(key), Value: b, Expiration: int32(memcachedKeep / time.Second)}); err != nil {
		return fmt.Errorf("tell memcached: %w", err)
	}
	return nil
}

// Delete implements Store.
func (s *Memcached) Delete(_ context.Context, key string) error {
	if err := s.client.Delete(s.key(key)); err != nil && !errors.Is(err, memcache.ErrCacheMiss) {
		return fmt.Errorf("tell memcached: %w", err)
	}
	return nil
}

// Close ends the connections.
func (s *Memcached) Close() error { return s.client.Close() }
