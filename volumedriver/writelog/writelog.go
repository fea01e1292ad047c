// Package writelog is the node's durable log of writes that are not yet on a backend. All volumes of the node share it,
// so that one fdatasync pays for every VM on the host.
//
// # What holds
//
// Records lie in the log in the order in which they were appended. After any crash Open hands back a prefix of that order
// which contains every record for which a sync was acknowledged. A record is told to its Sink, and then acknowledged, only
// when its batch is in the file. A failed write or sync is never retried: the log is fenced, nothing is acknowledged any more.
//
// # Files
//
//	log.meta      identity, format, boot id, verifier, whether the last stop was clean (meta.go)
//	seg-000.log   a slot: a file of SegmentBytes written once with zeros and then recycled for ever
//	fenced        exists after a write or sync failed: no page of the log can be trusted to be on the disk
//	lock          held while a process has the log open
//
// A slot holds one generation at a time. Generations count from 1 without gaps; those from the low-water mark to the
// newest are live and every one of them must be found. All integers are little endian, all checksums CRC32C.
//
//	block 0       segment header: magic 8 | format 4 | slot 4 | log 16 | generation 8 | low-water generation 8
//	              | last batch of the generation before 8 | its chain 4 | salt 4 | segment bytes 8 | reserved 4 | crc 4
//	              | key salt 16
//	block 1 …     batches, each directly behind the one before
//
//	batch header  magic 8 | log 16 | generation 8 | batch number 8 | durable batch 8 | low-water generation 8 | time ns 8
//	              | chain: crc of the header before 4 | salt 4 | records 4 | payload blocks 4 | header bytes 4 | flags 4 | crc 4 | 0 4
//	 records      volume 16 | seq 8 | lba 8 | blocks 8 | value 8 | kind 1 | flags 1 | key 2 | 0 4
//	 checksums    4 for each payload block
//	              zeros up to a multiple of 4 KiB
//	payload       4 KiB blocks, in the order of the records
//
// The first chain of a generation is the crc of its segment header. That header also says where the generation before
// ended, so a stale batch behind a torn one can never come back to life: recovery never appends to a segment that it found,
// it starts a generation. The salt is new each time, so that a header that was written, lost and written again differs.
//
// # Commit
//
//	Append     under mu: copy the payload and its checksums into the open batch
//	Kick       if nobody commits: until no kicked batch is left
//	             under mu: place the open batch behind the one before, maybe at the head of a free slot; open the spare one
//	             if in a free slot: seal the old segment with an empty batch, sync it, write the new header, sync that
//	             one pwritev; Sink.Logged for each record; publish Written; Done for those who do not wait for a sync
//	syncer     if someone waits: fdatasync, publish Durable, Done for all waiters up to it; appends and commits go on meanwhile
//	           before it begins it may wait a moment for requests that are about to come (gather.go)
//	KickSync   Kick, then what the syncer would do, on the same goroutine
//	KickAhead  Kick; the device begins with the batch before anybody asks for a sync
//
// Only one goroutine at a time commits (committing) and only one syncs (syncing). A roll syncs as well, so it waits for
// a running sync: of two syncs of one file descriptor only one may be told of an error.
//
// The seal carries the low-water mark and is durable before the header of a recycled slot is overwritten, so a torn
// header never leaves a hole in the live range.
//
// Each batch header says which batch was durable when it was written. Recovery uses it twice. A break in the newest
// generation is a torn tail, and cut, unless a later batch proves that the broken one had been durable: then it is
// corruption. And what no sync vouches for is written once more in place before anything else, since after a failed sync,
// of which the process may have died before it could say so, a page can be clean in memory and not on the disk.
//
// # Space
//
// Segments are recycled strictly oldest first: when sealed, and when each volume has released what it has in there.
// Appends are refused with ErrBusy while no slot is free; zeroes, sizes and marks may use one slot that data may not.
//
// Lock order: rmu, then mu. smu is taken alone. None is held over I/O.
package writelog

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver/blockio"
	"varve/volumedriver/seal"
	"varve/volumedriver/vfs"
)

var (
	// ErrStale: the segment of a Loc has been recycled since; look the block up again.
	ErrStale = errors.New("log segment was recycled")
	// ErrCorrupt: records that were durable, or that lie before such, cannot be read back. The log refuses to open.
	ErrCorrupt = errors.New("write log is corrupt")
	// ErrTooLarge: the records do not fit in a batch, ever.
	ErrTooLarge = errors.New("records exceed a log batch")
	// Skip is what replay answers for a record that nobody needs: it does not hold its segment.
	Skip = errors.New("record is not needed")
)

// Kind says what a record does to its range.
type Kind uint8

const (
	// Data: the payload is the new content of [LBA, LBA+Blocks).
	Data Kind = 1
	// Zero: [LBA, LBA+Blocks) reads as zeros from now on (write zeroes and trim).
	Zero Kind = 2
	// Size: Value is the volume's new size in bytes; what lay beyond it is gone.
	Size Kind = 3
	// Mark: no effect on data; Value is the core's.
	Mark Kind = 4
)

// RecordBlocksMax is the most blocks that one Data record carries.
const RecordBlocksMax = 256

// Record is one change of one volume.
type Record struct {
	Volume uuid.UUID
	Seq    uint64 // the volume's sequence number, ascending
	Kind   Kind
	Flags  uint8 // the core's
	LBA    uint64
	Blocks uint64 // a payload of that many blocks goes with Data only
	Value  uint64
	Time   int64 // unix ns of the batch; set by the log
	// Key says which of the volume's keys the payload of a Data record is encrypted with, in the core's own count; 0: it is
	// not encrypted. SealKey is that key, for Append alone; it is not stored.
	Key     uint16
	SealKey *seal.Key
}

// Logged is a record that is in the log.
type Logged struct {
	Record
	Loc   Loc      // of the first payload block
	CRC   []uint32 // per payload block as it lies in the log; valid during the call
	Batch uint64
}

// Sink is the volume that a record belongs to. Its methods are never called concurrently for one log, and must not call
// the log's Append, Kick, Sync or Close.
type Sink interface {
	// Logged is called once per record, in append order, after its batch is in the file and before the request is ended.
	Logged(*Logged)
	// LogFailed is called instead when the log was fenced before the record was in the file.
	LogFailed(seq uint64, err error)
}

// Loc says where a block lies: slot 12 bits, low 20 bits of the generation, block index in the segment 32 bits.
type Loc uint64

func makeLoc(slot int, gen uint64, block uint32) Loc {
	return Loc(uint64(slot)<<52 | gen&genMask<<32 | uint64(block))
}

// Add gives the block n further on in the same record.
func (l Loc) Add(n uint32) Loc { return l + Loc(n) }

// Distance gives how many blocks after l the block at m lies; false if that is before l, or in another segment.
func (l Loc) Distance(m Loc) (blocks int, ok bool) {
	return int(uint32(m) - uint32(l)), l>>32 == m>>32 && m >= l
}

func (l Loc) slot() int     { return int(l >> 52) }
func (l Loc) gen() uint64   { return uint64(l>>32) & genMask }
func (l Loc) offset() int64 { return int64(uint32(l)) * blockSize }

const (
	genMask   = 1<<20 - 1
	slotsMax  = 1 << 12
	blockSize = blockio.BlockSize
)

// Config of a log. FS and Dir are required.
type Config struct {
	FS  vfs.FS
	Dir string
	// SegmentBytes is the size of a segment, 64 MiB by default. An existing log keeps the size that it was made with.
	SegmentBytes int64
	// Segments is how many slots the log may grow to, at least 2, by default 16.
	Segments int
	// BatchBytes caps the payload of a batch: 4 MiB by default, at most a quarter of a segment.
	BatchBytes int
	Log        *slog.Logger
	Now        func() time.Time
	// BootID tells one boot of the machine from the next; by default the kernel's.
	BootID string
	// NoPrewrite leaves new slots sparse (tests).
	NoPrewrite bool
}

const (
	segmentBytesMin = 16 * blockSize
	segmentBytesMax = 1 << 32
)

func (c *Config) fill() error {
	if c.SegmentBytes == 0 {
		c.SegmentBytes = 64 << 20
	}
	if c.Segments == 0 {
		c.Segments = 16
	}
	if c.BatchBytes == 0 {
		c.BatchBytes = 4 << 20
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.BootID == "" {
		c.BootID = vfs.BootID()
	}
	c.BootID = c.BootID[:min(len(c.BootID), bootIDMax)]
	switch {
	case c.SegmentBytes < segmentBytesMin || c.SegmentBytes > segmentBytesMax || c.SegmentBytes%blockSize != 0:
		return fmt.Errorf("write log segments of %d bytes: want a multiple of %d from %d to %d",
			c.SegmentBytes, blockSize, segmentBytesMin, int64(segmentBytesMax))
	case c.Segments < 2 || c.Segments > slotsMax/2:
		return fmt.Errorf("write log of %d segments: want 2 to %d", c.Segments, slotsMax/2)
	case c.BatchBytes < blockSize:
		return fmt.Errorf("write log batches of %d bytes: want at least %d", c.BatchBytes, blockSize)
	}
	return nil
}

// segment is a slot with its file.
type segment struct {
	slot int
	path string
	file vfs.File
	gen  atomic.Uint64 // whose blocks it holds; changed before the first of the next is written

	sealing atomic.Pointer[sealing] // of the generation whose header it has

	pins map[uuid.UUID]uint64 // rmu: the highest sequence number of each volume in it
}

// Log is an open write log. All methods may be called concurrently.
type Log struct {
	cfg     Config
	id      uuid.UUID
	limits  limits
	lock    io.Closer
	slots   [slotsMax]atomic.Pointer[segment]
	err     atomic.Pointer[error]
	failed  chan struct{}
	written atomic.Uint64
	durable atomic.Uint64
	opened  atomic.Uint64 // number of the open batch

	mu         sync.Mutex // the open batch, and where it will go
	open       *batch
	spare      *batch // nil while it is being committed
	committing bool
	kicked     uint64 // the highest batch that someone wants committed
	closed     bool
	tail       *segment // in which the last placed batch lies
	tailGen    uint64
	end        int64      // where the next batch goes
	ready      []*segment // free slots
	slotCount  int
	low        uint64 // oldest live generation
	starved    bool   // an append was refused for lack of a slot
	space      sync.Cond
	waiting    int // on space

	smu      sync.Mutex // what is written and who waits for a sync
	syncing  bool
	current  *segment // in which the last written batch lies
	unsynced int64    // bytes written since the last sync began
	want     uint64   // a batch that someone waits for
	pending  []waiter
	spareBuf []waiter
	gather   gather
	stopped  bool
	moved    sync.Cond // written, durable or syncing changed
	asleep   int       // on moved
	work     sync.Cond // the syncer's

	rmu     sync.Mutex // what must be kept
	live    []*segment // oldest first; the last one is being written
	volumes map[uuid.UUID]*volumeState

	// owned by whoever commits
	chain    uint32
	salt     uint32
	logged   Logged
	settles  []blockio.Completer
	sealHead []byte
	purpose  purpose

	meta     meta // owned by Open, the preparer, then Close
	handover chan struct{}
	prepare  chan struct{}
	newest   atomic.Uint64 // the newest generation with a durable header
	stop     chan struct{}
	wg       sync.WaitGroup

	batches, syncs, bytesWritten, records atomic.Uint64
}

// limits of a batch, from the configuration.
type limits struct {
	segmentBytes  int64
	payloadBlocks int
	records       int
	headBytes     int
	reserve       int // free slots that data may not take
}

func newLimits(cfg *Config) limits {
	payload := min(int64(cfg.BatchBytes), cfg.SegmentBytes/4) / blockSize
	records := int(max(16, min(4096, payload*4)))
	l := limits{
		segmentBytes:  cfg.SegmentBytes,
		payloadBlocks: int(payload),
		records:       records,
		headBytes:     headerBytes(records, int(payload)),
	}
	if cfg.Segments >= 4 {
		l.reserve = 1
	}
	return l
}

// Written is the number of the last batch that is in the file.
func (l *Log) Written() uint64 { return l.written.Load() }

// Durable is the number of the last batch that survives a power cut.
func (l *Log) Durable() uint64 { return l.durable.Load() }

// OpenBatch is the number that the batch now being filled will have.
func (l *Log) OpenBatch() uint64 { return l.opened.Load() }

// Verifier is the NFS write verifier. It changes only when accepted data may have been lost: after an unclean stop in an
// earlier boot of the machine, after a failed write or sync, and after a tail that was torn or had a hole.
func (l *Log) Verifier() [8]byte { return l.meta.verifier }

// Err is the error that fenced the log, or nil.
func (l *Log) Err() error {
	if p := l.err.Load(); p != nil {
		return *p
	}
	return nil
}

// Failed is closed when the log has been fenced.
func (l *Log) Failed() <-chan struct{} { return l.failed }

// ReadAt fills p from the payload at loc. ErrStale when the segment has been recycled since.
func (l *Log) ReadAt(p []byte, loc Loc) error { return l.read(p, loc, false) }

// TryReadAt is ReadAt if that needs no device access, else vfs.ErrWouldBlock.
func (l *Log) TryReadAt(p []byte, loc Loc) error { return l.read(p, loc, true) }

func (l *Log) read(p []byte, loc Loc, try bool) error {
	s := l.slots[loc.slot()].Load()
	if s == nil || s.gen.Load()&genMask != loc.gen() {
		return ErrStale
	}
	off := loc.offset()
	if off < blockSize || off+int64(len(p)) > l.limits.segmentBytes {
		return fmt.Errorf("read %d bytes of log segment %s at %d: outside", len(p), s.path, off)
	}
	var err error
	if try {
		err = s.file.TryReadAt(p, off)
	} else {
		_, err = s.file.ReadAt(p, off)
	}
	if s.gen.Load()&genMask != loc.gen() {
		return ErrStale
	}
	if err != nil && !errors.Is(err, vfs.ErrWouldBlock) {
		return fmt.Errorf("read %d bytes of log segment %s at %d: %w", len(p), s.path, off, err)
	}
	return err
}

// Stats are figures for metrics and for backpressure.
type Stats struct {
	SegmentsUsed  int // live
	SegmentsTotal int // that the log may grow to
	SegmentBytes  int64
	Bytes         int64   // that live segments take
	Occupancy     float64 // of the whole log, 0..1
	Batches       uint64
	Syncs         uint64
	BytesWritten  uint64
	Records       uint64
}

// Stats of now.
func (l *Log) Stats() Stats {
	l.rmu.Lock()
	used := len(l.live)
	l.rmu.Unlock()
	l.mu.Lock()
	end := l.end
	l.mu.Unlock()
	bytes := int64(used-1)*l.limits.segmentBytes + end
	return Stats{
		SegmentsUsed:  used,
		SegmentsTotal: l.cfg.Segments,
		SegmentBytes:  l.limits.segmentBytes,
		Bytes:         bytes,
		Occupancy:     min(1, float64(bytes)/float64(int64(l.cfg.Segments)*l.limits.segmentBytes)),
		Batches:       l.batches.Load(),
		Syncs:         l.syncs.Load(),
		BytesWritten:  l.bytesWritten.Load(),
		Records:       l.records.Load(),
	}
}

func newSalt() uint32 {
	var b [4]byte
	rand.Read(b[:]) // never fails
	return binary.LittleEndian.Uint32(b[:])
}
