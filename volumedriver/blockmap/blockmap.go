// Package blockmap says where every block of every volume of the node lies: (volume, LBA) -> Ref, the ordinal of an SCO and
// the index of a block in it. It keeps what is in use in memory under one hard budget for the whole node, and the rest in
// Pebble on the log disk. Opening it, or a volume, reads no leaves. It keeps snapshots and clones as well: each costs what it has
// changed, and reading never depends on how many there are.
//
// # What survives: the redo rule
//
// The map is not a log. Its user, the volume core, keeps a log of changes (the contents of SCOs) and re-applies, in their
// order, all changes after the last checkpoint when it starts; redo is idempotent. Hence:
//
//   - After Checkpoint returned nil, every change made before it was called is durable, and so are the metadata keys that
//     were given to it: they appear all together, and never before the changes.
//   - A dirty leaf may go to Pebble, unsynced, at any time between checkpoints (eviction). After a crash some leaves are as
//     of the last checkpoint and some are newer. Redo of everything after the checkpoint makes all of them right: each block
//     gets the value of the last change that touched it, or, if none did, has kept the value of the checkpoint.
//   - Pebble's write-ahead log keeps order: what is written later never survives without what was written earlier.
//
// # Leaves
//
// A leaf maps 512 blocks (2 MiB of LBA). It lives in a slot of one of four size classes: up to 5, 26 or 112 runs, or an
// array of 512 refs; it changes class by itself. Slots lie in slabs outside the Go heap and are named by numbers, so the
// garbage collector has nothing to follow.
//
//	slot  | handle 4 | leaf 4 | version 4 | count 2 | flags 1 | class 1 | runs x 9, or 512 x 5 |
//	run   | start 2 | blocks 2 | ref 5 |      ascending, disjoint; block start+i is at ref's index + i
//	ref   | ordinal 28 bits | index 12 bits | in 5 bytes, 0 is a hole
//
// Slots are spread by hash over shards, each with a lock, a table, slabs and a clock hand, and an equal part of the budget;
// lookups of different leaves hardly meet. The budget counts slabs, tables and the pages of the next paragraph.
//
// Which leaves exist is known without asking Pebble: an open volume has a page of bits for each 8 GiB in which anything was
// ever written. A clear bit means "all holes", whatever Pebble has; a set bit, "maybe something". NextMapped walks these bits, so
// a TiB of nothing costs 8192 words at most, usually nothing. Pages are stored beside the leaves and read as a whole at the first
// use of a volume; a page goes to Pebble before, or with, the first leaf that needs it. A second bitmap says which leaves may be
// dirty, so that one volume can be flushed without a look at all the others'.
//
// # Generations
//
// A handle has a current generation, its head, numbered from 1. Freeze writes what is dirty and begins the next; the frozen one
// stays as it is: a snapshot. Leaves and pages go to Pebble as versions under the generation in which they are written, and a
// generation sees the newest versions that are not newer than itself: one seek, with one snapshot or ten thousand. Memory holds
// the newest version only. That no version is newer than what the handle's record says is kept by the order of writing, so redo
// cannot meet one.
//
// A fork begins with the generation of another handle as its base: what it has no versions of, it takes from there. Its own changes
// are under its own handle. A view is a fork that exists in memory only and cannot be changed. So however a volume came to be,
// reading what is in memory is the same, and what is not costs a seek for each handle up to the one that has it.
//
//	fetch(volume, leaf):
//	  for each (handle, gen) of the volume, its parent, the parent's parent ...:
//	    the first key from "l" handle, leaf, ^gen on, if it is of the same leaf: that
//	  else holes
//
// Clear only clears bits where something is frozen. A leaf that is cleared and then written again is fresh: until it has been
// written to Pebble its stored bit stays clear, else the version from before could come back after a crash.
//
// A page also has the set of leaves that its generation has changed (written, or cleared). The union of these sets over (a,b] are
// the leaves that may differ between generations a and b: that is what Changed, Diff, Unique and Release go by. Generation 1
// of a handle without a parent notes none.
//
// Release deletes what only one generation could see. With prev and next the live generations beside it, versions in
// (prev,next] are seen by next alone, or by nobody any more:
//
//	for each leaf changed in (gen,next]:
//	  of its versions in (prev,next], delete all but the newest, and that too if next has no bit for the leaf
//	likewise for pages; the newest takes over what the others have noted as changed
//
// If next is the head, its own later versions will supersede some in (prev,gen]. So the record notes the floor prev; the Release
// after the next Freeze does the same for the leaves that the head's generation changed, first.
//
// # Pebble keys
//
//	"f"                            format version
//	"n"                            the next handle, 4 bytes
//	"m" key                        the core's metadata
//	"h" handle 4                   generation, parent and what is left to do for releases: see record
//	"c" handle 4, gen 4, child 4   the generation has this fork
//	"b" handle 4, page 4, ^gen 4   | version 1 | set of leaves present | set of leaves changed | crc32c of key and value so far 4 |
//	"l" handle 4, leaf 4, ^gen 4   | version 1 | form 1 | count 2 | runs, or array | crc32c of key and value so far 4 |
//
// # Locks, in the order in which they are taken
//
//	volume.releasing  one Release, ReleaseHead or DropVolume of a volume
//	volume.mu    one writer of a volume (Set, Clear, Freeze, DropVolume), and loading its bits; of several volumes, ascending
//	Store.writes from encoding leaves to having committed them to Pebble and marked them clean; Clear and DropVolume as well.
//	             So leaves and pages reach Pebble in the order in which they were encoded, and nothing returns from the dead.
//	shard.mu     never held over I/O
//
// A miss reads Pebble outside all locks:
//
//	shard.mu { not resident, bit set: register a load of this key }       others who want the leaf wait for the load
//	v = fetch
//	shard.mu { if the load was marked stale by Clear: again; else make it resident, end the load }
//
// A disk that is nearly full is told from one that is broken: while less than 32 MiB are free, what would have to write fails
// with blockio.ErrNoSpace before it has asked Pebble, which does not survive a full disk, and may be tried again. Any failed
// write is the end of the store (Err): what Pebble has in memory is then not what is on disk (freeze.go).
//
// An operation that needs a slot when nothing can be evicted without writing drops the shard lock, flushes the dirty leaves
// of one slab, and begins again.
package blockmap

import (
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"path"
	"sync"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"

	"varve/volumedriver/blockio"
	"varve/volumedriver/vfs"
)

const (
	// LeafBlocks is how many blocks a leaf maps.
	LeafBlocks = 512
	// MaxBlocks bounds LBAs: 256 TiB for a volume.
	MaxBlocks = 1 << 36
	// MaxOrdinal bounds SCO ordinals; they begin at 1.
	MaxOrdinal = 1<<28 - 1
	// MinBudgetBytes is the smallest budget; less is taken as this.
	MinBudgetBytes = 256 << 10

	indexBits = 12
	indexMask = 1<<indexBits - 1
)

var (
	// ErrRange: an LBA or a ref that the map cannot hold.
	ErrRange = errors.New("outside the range of the block map")
	// ErrCorrupt: what was read from the store is not what was written.
	ErrCorrupt = errors.New("block map is corrupt")
	// ErrHandle: the store never gave out this handle.
	ErrHandle = errors.New("unknown handle")
	// ErrNotFound: no metadata under this key.
	ErrNotFound = errors.New("no such key")
	// ErrClosed: the store is closed.
	ErrClosed = errors.New("block map is closed")

	// ErrReadOnly: a view, or a volume whose head was given up, cannot be changed.
	ErrReadOnly = errors.New("volume is read-only")
	// ErrGeneration: the generation was not frozen.
	ErrGeneration = errors.New("no such frozen generation")
	// ErrInUse: a fork or a view depends on it.
	ErrInUse = errors.New("generation is in use")

	errSpace = fmt.Errorf("log disk has less than %d MiB left for the block map: %w", reserveBytes>>20, blockio.ErrNoSpace)
)

// Ref says where a block lies; 0 is a hole.
type Ref uint64

// MakeRef makes a Ref of an ordinal from 1 to MaxOrdinal and an index below 4096.
func MakeRef(ordinal, index uint32) Ref { return Ref(ordinal)<<indexBits | Ref(index) }

// Ordinal is the number of the SCO in its volume.
func (r Ref) Ordinal() uint32 { return uint32(r >> indexBits) }

// Index is the number of the block in the SCO.
func (r Ref) Index() uint32 { return uint32(r & indexMask) }

// Handle is a volume's short name inside the store. It is never used again. 0 is not a handle.
type Handle uint32

// KV is a metadata record.
type KV struct{ Key, Value []byte }

// Config configures a Store.
type Config struct {
	FS          vfs.FS
	Dir         string
	BudgetBytes int64 // for leaves, tables and bits; Pebble takes up to 40 MiB of Go heap beside it
	Log         *slog.Logger

	memTableBytes int // tests make it small, to see flushes and compactions
}

// Stats are a moment's figures.
type Stats struct {
	Leaves, Dirty           int64 // resident
	Bytes, Budget           int64
	PageBytes               int64 // of Bytes, for the bits of open volumes
	Volumes                 int64 // used since the start, and views
	Hits, Misses, Evictions int64
	Flushed                 int64 // leaves written to Pebble
	PebbleBytes             int64
}

// Store is the block map of a node.
type Store struct {
	cfg    Config
	log    *slog.Logger
	db     *pebble.DB
	disk   *frozenFS
	cache  *pebble.Cache
	budget int64

	shards    []shard
	shardBits int
	slabBytes int
	pageBytes atomic.Int64
	mapped    atomic.Int64 // bytes of slabs

	writes  sync.Mutex // see the package comment
	encoded []byte     // guarded by writes
	flushed atomic.Int64

	volumesMu sync.RWMutex
	volumes   map[Handle]*volume
	views     map[At]int // how many there are
	nextView  Handle
	clock     atomic.Int64 // counts openings of volumes

	handlesMu  sync.Mutex
	nextHandle atomic.Uint32

	failure atomic.Pointer[error]
	closed  atomic.Bool

	unchecked atomic.Int64 // bytes written since the free space was looked at
}

// Open opens the map in cfg.Dir, or makes an empty one.
func Open(cfg Config) (*Store, error) {
	if cfg.FS == nil || cfg.Dir == "" {
		return nil, errors.New("open block map: no file system or directory given")
	}
	if err := cfg.FS.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("open block map in %s: %w", cfg.Dir, err)
	}
	if err := cfg.FS.SyncDir(path.Dir(cfg.Dir)); err != nil {
		return nil, fmt.Errorf("open block map in %s: %w", cfg.Dir, err)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Store{cfg: cfg, log: cfg.Log, budget: max(cfg.BudgetBytes, MinBudgetBytes), volumes: map[Handle]*volume{},
		views: map[At]int{}, nextView: firstView}
	s.disk = &frozenFS{FS: cfg.FS, fail: s.fail}
	s.layOut()
	if err := s.openPebble(vfs.Pebble(s.disk, cfg.Dir)); err != nil {
		return nil, fmt.Errorf("open block map in %s: %w", cfg.Dir, err)
	}
	return s, nil
}

// layOut divides the budget: about 2 MiB for each shard, at least 16 slabs in each.
func (s *Store) layOut() {
	n := max(1, min(s.budget>>21, 1024))
	s.shardBits = bits.Len64(uint64(n)) - 1
	n = 1 << s.shardBits
	s.slabBytes = 64 << 10
	if s.budget/n < 16*int64(s.slabBytes) {
		s.slabBytes = 16 << 10
	}
	s.shards = make([]shard, n)
	for i := range s.shards {
		s.shards[i].init(s)
	}
}

// Err is the failure after which the store serves nothing more, nil while all is well. The process must then restart.
func (s *Store) Err() error {
	if p := s.failure.Load(); p != nil {
		return *p
	}
	if s.closed.Load() {
		return ErrClosed
	}
	return nil
}

func (s *Store) fail(err error) error {
	err = fmt.Errorf("block map in %s failed: %w", s.cfg.Dir, err)
	if s.failure.CompareAndSwap(nil, &err) {
		s.log.Error("block map failed; restart needed", "err", err)
	}
	return s.Err()
}

// Close frees everything. It does not checkpoint. No other call may be under way.
func (s *Store) Close() error {
	if s.closed.Swap(true) {
		return nil
	}
	err := s.closePebble()
	for i := range s.shards {
		s.shards[i].release()
	}
	if n := s.mapped.Load(); n != 0 {
		panic(fmt.Sprintf("block map closed with %d bytes of slabs", n))
	}
	return err
}

// Stats gives the figures of the moment.
func (s *Store) Stats() Stats {
	st := Stats{Budget: s.budget, PageBytes: s.pageBytes.Load(), Flushed: s.flushed.Load()}
	for i := range s.shards {
		sh := &s.shards[i]
		sh.mu.Lock()
		st.Leaves += int64(sh.used)
		st.Dirty += int64(sh.dirty)
		st.Bytes += sh.bytes
		st.Hits += sh.hits
		st.Misses += sh.misses
		st.Evictions += sh.evictions
		sh.mu.Unlock()
	}
	st.Bytes += st.PageBytes
	s.volumesMu.RLock()
	st.Volumes = int64(len(s.volumes))
	s.volumesMu.RUnlock()
	if s.Err() == nil {
		st.PebbleBytes = int64(s.db.Metrics().DiskSpaceUsage())
	}
	return st
}
