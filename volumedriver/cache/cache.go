// Package cache keeps lines of backend objects in RAM and on an SSD, between the volume driver and a slow backend.
//
// Objects never change, so a line, 64 KiB of an object as the backend stores it (compressed and encrypted bytes stay so), is
// right for ever and needs no invalidation. What shares objects, such as clones, shares their lines. The invariant: a read through the cache
// gives the bytes that the backend would give, or an error that the backend gave. The cache's own trouble (a full, failing or
// lying SSD, a torn or old index, a power cut) costs misses only.
//
//	ReadAt:  each line in RAM? -> on the SSD? -> missing: one flight for each run of adjacent missing lines
//	flight:  one ranged GET of at most 1 MiB, shared by all who want those lines meanwhile; what it brings goes to RAM and,
//	         through a bounded queue, to the SSD
//
// # What stays
//
// Both tiers choose by S3-FIFO (policy.go). Three rules go with it:
//   - A hit counts only if it is not the next read of a sequential stream: sixteen 4 KiB reads of a line are one use of it.
//   - A scan (a sequential run of 64 MiB and more, which continues over objects) is not written to the SSD, and its lines leave
//     RAM when they were read to their end. A backup evicts nothing.
//   - While lines are fetched for little use (more than twice as many bytes fetched than read, over 64 MiB), a small read of a line
//     that was not asked for lately fetches just its own bytes; the second read fetches the line.
//
// Calls of the classes scrub and replication go to the backend itself: a scrub verifies what is there, and neither should evict.
//
// Reading ahead: each open object has a detector of sequential streams (stream.go), which asks for 256 KiB to 16 MiB ahead. Such
// flights have their own, smaller share of the requests in flight. Near an object's end they go on with its successor, if the Config names
// one. The core, which knows what comes after an object's end, can ask for more by
// Prefetch. A Recorder notes what is read in a time, such as a boot; PrefetchTrace fetches it for the next clone.
//
// # On the SSD
//
// DIR/lines is one file of slots, preallocated in steps of 256 MiB as long as a twentieth of the file system stays free, with a line in each,
// as cells:
//
//	| data 4096 | hash of vPool and object name 16 | line 4 | cell in line 2 | magic 2 | 0 4 | crc32c of all before it 4 |
//
// A cell that does not name what was asked for, or fails its CRC, is a miss: the line is dropped and fetched again. So writes need no
// order and no sync, and the index may be of any age. DIR/index is written (to a new name, synced, renamed) at Close and every few minutes:
//
//	| "VARVECI1" | line bytes 4 | slots 4 | objects 4 | entries 4 | 0 4 | crc32c 4 |
//	  objects × | hash 16 | size 8 |   entries × | slot 4 | object 4 | line 4 | state 4 |   | crc32c of objects and entries 4 |
//
// DIR/traces/UUID are boot traces (trace.go). A write or too many reads of the SSD that fail switch that tier off until the next start;
// Stats and the metric varve_cache_disk_off tell.
//
// Memory beside the RAM tier: about 48 bytes for each line of the SSD, 80 MiB for 100 GiB.
//
// # Locks
//
// store.mu (flights) before a tier's lock before registry.mu; none is held over I/O. An object that is deleted, or found to have another
// size, gets a new number in the registry, so that nothing read before can serve its name again.
package cache

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"

	"varve/volumedriver/backend"
	"varve/volumedriver/vfs"
)

const (
	lineBytesDef  = 64 << 10
	lineBytesMin  = cellData
	lineBytesMax  = 1 << 20
	fetchBytesMax = 1 << 20 // of one ranged GET
	fetchesMax    = 64      // ranged GETs in flight because somebody waits for them
	aheadMax      = 8       // ranged GETs in flight ahead of need
	aheadWaiting  = 64      // flights ahead of need that may wait for their turn
	indexEveryDef = 5 * time.Minute

	wasteWindow = 64 << 20 // fetched bytes after which the use of fetches is judged anew
	wasteRatio  = 2
)

// Config of a Cache. A tier without bytes is left out.
type Config struct {
	FS        vfs.FS
	Dir       string // of the SSD tier
	Bytes     int64  // of the SSD tier
	RAMBytes  int64
	LineBytes int   // 64 KiB; a power of two from 4 KiB to 1 MiB
	ScanBytes int64 // 64 MiB
	// KeepWrites puts objects on the SSD when they are put on the backend, as far as the SSD keeps up.
	KeepWrites bool
	IndexEvery time.Duration // 5 min
	// Successor names the object that a sequential reader will most likely go on with when it comes to the end of another, "" if
	// that is not known. nil: never known.
	Successor func(name string) string

	Log     *slog.Logger
	Metrics prometheus.Registerer // may be nil
}

// Cache is one node's read cache, for all its vPools. Methods may be called concurrently.
type Cache struct {
	cfg    Config
	line   int64
	log    *slog.Logger
	reg    *registry
	ram    *memory
	ssd    *disk
	demand chan struct{} // slots for fetches that somebody waits for
	spare  chan struct{} // slots for fetches ahead of need
	ahead  atomic.Int64  // flights ahead of need that are not done

	metrics []prometheus.Collector
	stop    chan struct{}
	wg      sync.WaitGroup
	closed  atomic.Bool

	seenMu sync.Mutex
	seen   ghost // lines read in part while fetches were of little use

	fetches, fetchErrors, fetched, read, misses, shared, prefetched, exact atomic.Int64
	discarded                                                              atomic.Int64
	wasteFetched, wasteRead                                                atomic.Int64
	wasteful                                                               atomic.Bool
}

// Open makes a cache, with what is left of an earlier one in Dir. It fails for a wrong Config or for want of memory only: an SSD
// that does not work leaves the cache without that tier.
func Open(cfg Config) (*Cache, error) {
	if cfg.LineBytes == 0 {
		cfg.LineBytes = lineBytesDef
	}
	if cfg.LineBytes < lineBytesMin || cfg.LineBytes > lineBytesMax || cfg.LineBytes&(cfg.LineBytes-1) != 0 {
		return nil, fmt.Errorf("cache lines of %d bytes: not a power of two from %d to %d", cfg.LineBytes, lineBytesMin, lineBytesMax)
	}
	if cfg.ScanBytes == 0 {
		cfg.ScanBytes = scanBytesDef
	}
	if cfg.IndexEvery == 0 {
		cfg.IndexEvery = indexEveryDef
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	c := &Cache{cfg: cfg, line: int64(cfg.LineBytes), log: cfg.Log, reg: newRegistry(), stop: make(chan struct{}),
		demand: make(chan struct{}, fetchesMax), spare: make(chan struct{}, aheadMax)}
	var err error
	if c.ram, err = newMemory(cfg.RAMBytes, cfg.LineBytes, c.reg); err != nil {
		return nil, err
	}
	lines := 1
	if c.ram != nil {
		_, room, _, _ := c.ram.count()
		lines += room
	}
	if cfg.Bytes > 0 {
		c.ssd = openDisk(cfg.FS, cfg.Dir, cfg.Bytes, cfg.LineBytes, c.reg, cfg.Log)
		lines += c.ssd.slots
		c.wg.Go(func() { c.ssd.run(c.stop) })
		c.wg.Go(c.keepIndex)
	}
	c.seen = newGhost(lines)
	if err := c.register(); err != nil {
		close(c.stop)
		c.wg.Wait()
		return nil, errors.Join(err, c.closeTiers())
	}
	return c, nil
}

// keepIndex saves the index every now and then.
func (c *Cache) keepIndex() {
	t := time.NewTicker(c.cfg.IndexEvery)
	defer t.Stop()
	for {
		select {
		case <-c.stop:
			return
		case <-t.C:
		}
		if err := c.ssd.save(); err != nil {
			c.log.Warn("index of the read cache not saved: a crash costs misses", "err", err)
		}
	}
}

// Close saves the index. The backends that Wrap gave must be closed.
func (c *Cache) Close() error {
	if c.closed.Swap(true) {
		return nil
	}
	close(c.stop)
	c.wg.Wait()
	c.unregister()
	var err error
	if c.ssd != nil {
		err = c.ssd.save()
	}
	return errors.Join(err, c.closeTiers())
}

func (c *Cache) closeTiers() error {
	err := c.ram.close()
	if c.ssd != nil && c.ssd.file != nil {
		err = errors.Join(err, c.ssd.file.Close())
	}
	return err
}

// Settle waits until what was fetched is on the SSD or left out, or ctx ends.
func (c *Cache) Settle(ctx context.Context) error {
	for c.ahead.Load() > 0 || c.ssd != nil && c.ssd.queued.Load() > 0 {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
	return nil
}

func keyOf(id, line uint32) uint64       { return uint64(id)<<32 | uint64(line) }
func objectOf(key uint64) uint32         { return uint32(key >> 32) }
func lineOf(key uint64) uint32           { return uint32(key) }
func (c *Cache) lineAt(off int64) uint32 { return uint32(off / c.line) }

// Wrap gives a backend that reads b through the cache. pool tells its objects from those of other backends. The result implements
// Prefetcher, Tracer and Holder, its objects Scanner and Discarder. Closing it closes b.
func (c *Cache) Wrap(pool uuid.UUID, b backend.Backend) backend.Backend {
	ctx, cancel := context.WithCancel(context.Background())
	return &store{c: c, inner: b, pool: pool, ctx: ctx, cancel: cancel, flights: make(map[uint64]*flight), chains: make(map[string]int64),
		opened: make(map[uint32]*opened), idle: list.New()}
}

// windowBytes is how far to read ahead at most.
func (c *Cache) windowBytes() int64 { return max(c.line, min(windowMax, c.cfg.RAMBytes/windowPart)) }

// Prefetcher fetches what will be read soon.
type Prefetcher interface {
	// Prefetch starts to fetch bytes of an object, as far as there is room for such fetches, and does not wait. What lies beyond
	// the object's end is left out.
	Prefetch(name string, off, n int64)
}

// Scanner reads as a scan does: nothing of it stays in the cache on its account.
type Scanner interface {
	ReadScanAt(ctx context.Context, p []byte, off int64) error
}

// Discarder is an object whose cached bytes can be thrown away, because whoever read them found them to be wrong.
type Discarder interface{ Discard(off, n int64) }

// Holder tells how many bytes of a part of an object are in each tier.
type Holder interface {
	Held(name string, off, n int64) (ram, disk int64)
}

// judgeUse notes what fetches brought and what was read, and decides whether small reads should fetch whole lines.
func (c *Cache) judgeUse(fetched, read int64) {
	if read > 0 {
		c.wasteRead.Add(read)
	}
	if fetched == 0 || c.wasteFetched.Add(fetched) < wasteWindow {
		return
	}
	f := c.wasteFetched.Swap(0)
	r := c.wasteRead.Swap(0)
	c.wasteful.Store(f > wasteRatio*r)
}

// seenLately tells whether a line was asked for not long ago, and notes that it is asked for now.
func (c *Cache) seenLately(print uint32) bool {
	c.seenMu.Lock()
	defer c.seenMu.Unlock()
	if c.seen.take(print) {
		return true
	}
	c.seen.add(print)
	return false
}
