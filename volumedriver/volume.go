// Package volumedriver turns random writes to many volumes into one sequential log and, later, into large immutable objects.
//
// # One write, one read, one flush
//
//	Write   order lock: sequence number, record appended to the node's write log (package writelog)
//	        commit:     one pwritev for the whole batch; for each record, in log order: Logged -> index; then the request ends
//	        FUA:        ends after the batch's fdatasync
//	Read    index (what is in the log) -> block map -> object; every block is checked against the CRC taken when it was written
//	Flush   fdatasync of every batch that holds a write replied to before, on any connection
//	Destage cut a prefix of the volume's logged records -> newest version of each block, by LBA -> SCO -> Put
//	        -> in order of sequence: block map, then the index forgets, then (after a checkpoint) the log is released
//
// # Watermarks
//
// Each volume counts its records with a sequence number. At all times
//
//	accepted >= logged >= sealed >= backed >= checkpointed,  and backed <= durable in the log
//
// Only records that are durable in the log are packed into an SCO. So the block map and the backend never hold
// something that a power cut could take back from the log, and after any crash
//
//	volume = SCOs up to `checkpointed` (the root and the map) + log records after it
//
// is a prefix of the writes that contains every write acknowledged as durable. A log segment is released only when a
// synced checkpoint covers all its records, so recovery needs the log and the map alone, not the backend.
//
// # What shadows what
//
// index.data and index.zeros hold every record in (backed, logged]; they shadow the map. A map entry of a block changes
// only while the index holds that block (with the same or a newer version), so installing an SCO needs no lock against
// readers: map first, index after. Records are redone in order after a crash; redoing one twice changes nothing.
//
// An SCO holds, for (FirstLog, LastLog], the newest version of each block *within that range*, even when a newer one is
// already in the log: leaving it out would absorb more writes but would break the prefix rule for a rebuild from the backend.
//
// # Locks, in order
//
//	Volume.order   sequence numbers, appends, read-modify-write claims; held over an append (memory only), never over I/O
//	Volume.mu      index, watermarks, queue; readers hold it shared while they plan a read, never over I/O
//
// # Sub-block requests
//
// The log, the map and the objects know 4 KiB blocks. A request that covers part of a block claims the block (Volume.claims),
// waits until what was accepted before is readable, reads, merges and appends the whole block. A full-block write to a claimed
// block waits. Bytes of the last block beyond the volume's end are zero, always.
//
// # Further on
//
// Each of these begins with its concept, its order of steps and what a crash between them leaves: snapshot.go (snapshots are
// marks in the log, frozen generations of the map), clone.go (clones, rollback, reading a snapshot), flatten.go, promote.go (whose a
// snapshot is), scrub.go (space, checksums, orphans), keys.go (compression, encryption), rewind.go (any second of a window), boot.go (what clones read first), limits.go,
// floor.go (a map must not be older than its log), claim.go.
package volumedriver

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver/blockio"
	"varve/volumedriver/qos"
	"varve/volumedriver/writelog"
)

const (
	blockSize = blockio.BlockSize
	// recordBlocksMax is the largest write that is one record, and so all or nothing after a crash: 1 MiB.
	recordBlocksMax = 256
	// RequestBytesMax is the largest request.
	RequestBytesMax = 32 << 20
	// VolumeBytesMax is the largest volume: 2^28 SCOs would allow more, NFS and NBD clients need no more.
	VolumeBytesMax = int64(64) << 40
)

// flags of writelog.Record as this package uses them.
const (
	recordExtends = 1 << 0 // Data: Value is the volume's size after this write
	recordModTime = 1 << 0 // Mark: Value is the modification time in ns
	recordSnap    = 1 << 1 // Mark: a snapshot; Value is its token
	recordRevert  = 1 << 2 // Mark: the volume is what it was at the snapshot with sequence number Value
)

// Volume is an array of bytes with a size, kept as 4 KiB blocks. Methods may be called concurrently.
type Volume struct {
	d    *Driver
	id   uuid.UUID
	head atomic.Uint32 // the handle in the block map that reads and installs go to; it changes with a rollback
	span atomic.Pointer[[]ownerSpan]
	// firstSCO is the first SCO number that this run of the program may use.
	firstSCO uint64

	order  sync.Mutex
	seq    uint64              // last sequence number given out: accepted
	size   int64               // after every accepted record
	claims map[uint64]struct{} // blocks under read-modify-write
	gated  bool                // a rollback is under way: as if every block were claimed
	closed bool
	freed  sync.Cond // on order: a claim ended

	encrypted  atomic.Bool                  // has keys
	logKey     *logKey                      // for new records, once it is known; guarded by order
	limiter    atomic.Pointer[qos.Limiter]  // nil: no limit
	share      *qos.Limiter                 // its share of the log when that is contended
	limiting   sync.Mutex                   // guards limitGate and the change of limiter
	limitGate  *qos.Gate                    // the vPool's, in limiter
	template   atomic.Bool                  // takes no writes
	husk       atomic.Bool                  // takes no requests: it is deleted, and holds snapshots for others (promote.go)
	reverting  atomic.Bool                  // a rollback is in the log and not yet in the map: nothing can be read
	hurry      atomic.Uint64                // somebody waits until records up to this one are on the backend
	boot       atomic.Pointer[bootRecorder] // nil: nothing to record
	flattening atomic.Bool                  // no bases of a rewind window are taken
	snapping   sync.Mutex                   // one change of the list of snapshots at a time; taken before order

	lastBatch atomic.Uint64 // log batch of the last logged record: what a flush must cover
	logged    atomic.Uint64
	visible   atomic.Int64 // size after every logged record
	failure   atomic.Pointer[error]

	dirty   atomic.Bool           // the destager knows that there is something to do
	running atomic.Int32          // SCOs under way
	pending atomic.Int64          // payload bytes logged, not yet on the backend
	stuck   atomic.Pointer[error] // why nothing more of this volume can go to the backend

	installing sync.Mutex // jobs are installed one at a time
	recount    bool       // root.UsedBlocks is as of another moment than the map; guarded by installing
	rooting    sync.Mutex // the root object is being put
	storing    sync.Mutex // guards stored
	stored     root       // what the map store holds, as of the last checkpoint

	mu      sync.RWMutex
	index   index
	snaps   []*snapshot // by age; entries are replaced, never changed
	pins    map[mapPoint]*pin
	queue   recordQueue // logged, not yet backed
	modTime int64
	grown   sync.Cond // on mu (shared side): logged moved, or the volume failed
	destage destageState
	forgets uint64 // how often the index has forgotten what the map has taken over
	root    root   // as of Backed
}

func newVolume(d *Driver, r root) *Volume {
	v := &Volume{d: d, id: r.ID, seq: r.Backed, size: r.Size, modTime: r.ModTime, root: r, stored: r}
	v.firstSCO = r.NextSCO
	v.share = d.pace.share()
	v.head.Store(uint32(r.Handle))
	v.span.Store(d.owners.spans(&r))
	v.template.Store(r.Template)
	v.husk.Store(r.Options.Husk)
	v.encrypted.Store(len(r.Keys) > 0)
	v.freed.L = &v.order
	v.grown.L = v.mu.RLocker()
	v.logged.Store(r.Backed)
	v.visible.Store(r.Size)
	v.destage.sealed = r.Backed
	v.destage.sealedSize, v.destage.sealedTime = r.Size, r.ModTime
	v.destage.next = r.NextSCO
	v.destage.prev = r.Prev
	return v
}

// ID is the volume's identity, for ever.
func (v *Volume) ID() uuid.UUID { return v.id }

// Size is the volume's size in bytes after every write that can be read.
func (v *Volume) Size() int64 { return v.visible.Load() }

// ModTime is the time of the last change.
func (v *Volume) ModTime() time.Time {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return time.Unix(0, v.modTime)
}

// Used is the number of bytes that storage stands behind: exact for what is on the backend, an upper bound while
// overwrites are still in the log.
func (v *Volume) Used() int64 {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.usedLocked()
}

func (v *Volume) usedLocked() int64 {
	used := (v.root.UsedBlocks + int64(v.index.blocks())) * blockSize
	return min(used, roundUp(v.visible.Load()))
}

// Attr is the volume's size and Used in bytes and the time of its last change, which is zero before the first. Unlike Info it takes no
// lock that anybody holds while the log calls a Completer.
func (v *Volume) Attr() (size, used int64, changed time.Time) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	if v.logged.Load() > 0 {
		changed = time.Unix(0, v.modTime)
	}
	return v.visible.Load(), v.usedLocked(), changed
}

// Info is a volume's state for people and metrics. Sequence numbers are those of architecture.md: accepted >= logged >= backed.
type Info struct {
	Size          int64
	ModTime       time.Time
	Used          int64 // bytes
	Accepted      uint64
	Logged        uint64
	Durable       uint64 // survives a power cut
	Backed        uint64
	UnsyncedBytes int64         // logged, not yet durable
	UnsyncedAge   time.Duration // of the oldest of them
	PendingBytes  int64         // logged, not yet on the backend
	PendingAge    time.Duration // of the oldest of them
	Epoch         uint64
	Template      bool
	Failure       string
}

// Info describes the volume now.
func (v *Volume) Info() Info {
	v.order.Lock()
	accepted := v.seq
	v.order.Unlock()
	v.mu.RLock()
	defer v.mu.RUnlock()
	i := Info{Size: v.visible.Load(), ModTime: time.Unix(0, v.modTime), Used: v.usedLocked(), Accepted: accepted,
		Logged: v.logged.Load(), Backed: v.root.Backed, PendingBytes: v.queue.bytes, Epoch: v.root.epoch(), Template: v.root.Template}
	if t, ok := v.queue.oldest(); ok {
		i.PendingAge = max(0, v.d.now().Sub(time.Unix(0, t)))
	}
	var since int64
	i.Durable, i.UnsyncedBytes, since = v.queue.undurable(v.d.wal.Durable(), i.Logged)
	if since != 0 {
		i.UnsyncedAge = max(0, v.d.now().Sub(time.Unix(0, since)))
	}
	if err := v.err(); err != nil {
		i.Failure = err.Error()
	} else if p := v.stuck.Load(); p != nil {
		i.Failure = (*p).Error()
	}
	return i
}

func (v *Volume) backed() uint64 {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.root.Backed
}

func roundUp(n int64) int64 { return (n + blockSize - 1) &^ (blockSize - 1) }

// err is what makes the volume unusable, nil if nothing does.
func (v *Volume) err() error {
	if p := v.failure.Load(); p != nil {
		return *p
	}
	return nil
}

// fail makes the volume refuse everything from now on and wakes whoever waits.
func (v *Volume) fail(err error) {
	if v.failure.CompareAndSwap(nil, &err) && !errors.Is(err, blockio.ErrClosed) {
		v.d.log.Error("volume stops", "volume", v.id, "err", err)
	}
	v.mu.Lock()
	v.grown.Broadcast()
	v.mu.Unlock()
	v.order.Lock()
	v.freed.Broadcast()
	v.order.Unlock()
}

// check refuses a request that is out of range. extend allows the end to lie beyond the volume's.
func checkRange(off, n, size int64, extend bool) error {
	switch {
	case off < 0 || n < 0 || off > VolumeBytesMax || n > VolumeBytesMax-off:
		return fmt.Errorf("range %d+%d: %w", off, n, blockio.ErrBeyondEnd)
	case !extend && off+n > size:
		return fmt.Errorf("range %d+%d of %d bytes: %w", off, n, size, blockio.ErrBeyondEnd)
	}
	return nil
}

// usableLocked says why the volume takes no more records.
func (v *Volume) usableLocked() error {
	if v.closed || v.husk.Load() {
		return blockio.ErrClosed
	}
	if v.template.Load() {
		return fmt.Errorf("volume %s is a template: %w", v.id, blockio.ErrReadOnly)
	}
	return v.err()
}

// TryWrite submits a write of p at byte off; see package blockio. Nothing is applied when it returns an error.
func (v *Volume) TryWrite(p []byte, off int64, f blockio.Flags, c blockio.Completer, tag uint64) error {
	if off&(blockSize-1) != 0 || len(p)&(blockSize-1) != 0 || len(p) > recordBlocksMax*blockSize || v.d.pace.over() {
		return v.tryEnd(len(p), off, f, c, tag)
	}
	if len(p) == 0 {
		return v.tryEnd(0, off, f, c, tag)
	}
	limit := v.limiter.Load()
	if !limit.Try(qos.Write, len(p)) {
		return v.tryEnd(len(p), off, f, c, tag)
	}
	v.order.Lock()
	err := v.appendLocked(p, off, f, c, tag)
	v.order.Unlock()
	if err == blockio.ErrBusy { // the batch is full: commit it, then there may be room
		v.d.wal.Kick()
		v.order.Lock()
		err = v.appendLocked(p, off, f, c, tag)
		v.order.Unlock()
	}
	if err != nil {
		limit.Refund(qos.Write, len(p))
	}
	return err
}

// tryEnd answers what TryWrite can tell at once of a request it can't submit: that it is wrong, or empty, else ErrBusy.
func (v *Volume) tryEnd(n int, off int64, f blockio.Flags, c blockio.Completer, tag uint64) error {
	v.order.Lock()
	err := v.usableLocked()
	if err == nil {
		err = checkRange(off, int64(n), v.size, f&blockio.Extend != 0)
	}
	v.order.Unlock()
	if err != nil {
		return err
	}
	if n > 0 {
		return blockio.ErrBusy
	}
	if f&blockio.FUA != 0 {
		return v.TryFlush(c, tag)
	}
	c.Done(tag, nil)
	return nil
}

// appendLocked appends one record of whole blocks. order is held.
func (v *Volume) appendLocked(p []byte, off int64, f blockio.Flags, c blockio.Completer, tag uint64) error {
	if err := v.usableLocked(); err != nil {
		return err
	}
	end := off + int64(len(p))
	if err := checkRange(off, int64(len(p)), v.size, f&blockio.Extend != 0); err != nil {
		return err
	}
	lba, n := uint64(off)/blockSize, uint64(len(p))/blockSize
	if v.claimedLocked(lba, n) {
		return blockio.ErrBusy
	}
	r := writelog.Record{Volume: v.id, Seq: v.seq + 1, Kind: writelog.Data, LBA: lba, Blocks: n}
	if v.encrypted.Load() {
		if err := v.useKeyLocked(&r); err != nil {
			return err
		}
	}
	if end > v.size && f&blockio.Extend != 0 {
		r.Flags, r.Value = recordExtends, uint64(end)
	}
	if err := v.d.wal.Append(r, p, v, f&blockio.FUA != 0, c, tag); err != nil {
		return err
	}
	v.seq++
	if r.Flags&recordExtends != 0 {
		v.size = end
	}
	return nil
}

// claimedLocked says whether a block of the range is under read-modify-write.
func (v *Volume) claimedLocked(lba, n uint64) bool {
	if v.gated {
		return true
	}
	if len(v.claims) == 0 {
		return false
	}
	if uint64(len(v.claims)) < n {
		for b := range v.claims {
			if b >= lba && b-lba < n {
				return true
			}
		}
		return false
	}
	for i := range n {
		if _, ok := v.claims[lba+i]; ok {
			return true
		}
	}
	return false
}

// TryZero submits that [off, off+n) reads as zeros from now on and gives back its storage.
func (v *Volume) TryZero(off, n int64, f blockio.Flags, c blockio.Completer, tag uint64) error {
	v.order.Lock()
	err := v.usableLocked()
	if err == nil {
		err = checkRange(off, n, v.size, false)
	}
	aligned := off&(blockSize-1) == 0 && (n&(blockSize-1) == 0 || off+n == v.size)
	switch {
	case err != nil:
	case n == 0 || !aligned || v.d.pace.over() || !v.limiter.Load().Try(qos.Write, 0):
		err = blockio.ErrBusy
	default:
		err = v.appendZeroLocked(uint64(off)/blockSize, uint64(roundUp(n))/blockSize, f, c, tag)
	}
	v.order.Unlock()
	return err
}

func (v *Volume) appendZeroLocked(lba, n uint64, f blockio.Flags, c blockio.Completer, tag uint64) error {
	if v.claimedLocked(lba, n) {
		return blockio.ErrBusy
	}
	r := writelog.Record{Volume: v.id, Seq: v.seq + 1, Kind: writelog.Zero, LBA: lba, Blocks: n}
	if err := v.d.wal.Append(r, nil, v, f&blockio.FUA != 0, c, tag); err != nil {
		return err
	}
	v.seq++
	return nil
}

// TryFlush submits a flush: it ends when every write that was replied to before, on any connection, is durable.
func (v *Volume) TryFlush(c blockio.Completer, tag uint64) error {
	if err := v.err(); err != nil {
		return err
	}
	if v.d.wal.SyncAsync(v.lastBatch.Load(), c, tag) {
		c.Done(tag, nil)
	}
	return nil
}

// FlushInline flushes on the calling goroutine, for a connection that has nothing else in flight.
func (v *Volume) FlushInline() error {
	if err := v.err(); err != nil {
		return err
	}
	return v.d.wal.SyncInline(v.lastBatch.Load())
}

// Kick commits what was submitted to the node's log.
func (v *Volume) Kick() { v.d.wal.Kick() }

// KickSync is Kick that also syncs, on the calling goroutine, what of it has to be durable: for a connection that has nothing
// else to do meanwhile.
func (v *Volume) KickSync() { v.d.wal.KickSync() }

// KickAhead is Kick for writes that a flush is going to follow.
func (v *Volume) KickAhead() { v.d.wal.KickAhead() }

// Logged implements writelog.Sink: the record is in the log's file.
func (v *Volume) Logged(l *writelog.Logged) {
	v.mu.Lock()
	v.applyLocked(l)
	v.lastBatch.Store(l.Batch)
	v.logged.Store(l.Seq)
	v.mu.Unlock()
	v.d.destager.add(v)
	v.wake()
}

// LogFailed implements writelog.Sink: the record's outcome is unknown, the log is fenced.
func (v *Volume) LogFailed(_ uint64, err error) {
	v.fail(fmt.Errorf("write log: %w", errors.Join(blockio.ErrFenced, err)))
}

// applyLocked makes a record visible; it is the same for a new record and for one replayed after a crash.
func (v *Volume) applyLocked(l *writelog.Logged) {
	size := v.visible.Load()
	switch l.Kind {
	case writelog.Data:
		v.index.put(l.LBA, l.Loc, l.Seq, l.CRC, l.Key)
		if l.Flags&recordExtends != 0 {
			size = max(size, int64(l.Value))
		}
	case writelog.Zero:
		v.index.zero(l.LBA, l.Blocks, l.Seq)
	case writelog.Size:
		if cut, end := uint64(roundUp(int64(l.Value)))/blockSize, uint64(roundUp(size))/blockSize; cut < end {
			v.index.zero(cut, end-cut, l.Seq)
		}
		size = int64(l.Value)
	case writelog.Mark:
		switch {
		case l.Flags&recordSnap != 0:
			v.snapshotLoggedLocked(l, size)
		case l.Flags&recordRevert != 0:
			size = v.revertLoggedLocked(l.Value, size)
		}
	}
	v.queue.push(l, v.visible.Load())
	v.pending.Store(v.queue.bytes)
	v.destage.last = l.Time
	if l.Kind == writelog.Data {
		v.destage.unsealed += int64(l.Blocks) * blockSize
	}
	v.modTime = modTimeAfter(v.modTime, l.Kind, l.Flags, l.Value, l.Time)
	v.visible.Store(size)
}

// modTimeAfter is the volume's modification time after a record: a snapshot changes nothing.
func modTimeAfter(before int64, kind writelog.Kind, flags uint8, value uint64, at int64) int64 {
	switch {
	case kind != writelog.Mark || flags&recordRevert != 0:
		return at
	case flags&recordModTime != 0:
		return int64(value)
	}
	return before
}

func (v *Volume) wake() {
	if v.d.waiters.Load() == 0 {
		return
	}
	v.mu.Lock()
	v.grown.Broadcast()
	v.mu.Unlock()
}

// waitLogged waits until every record up to seq can be read.
func (v *Volume) waitLogged(seq uint64) error {
	if v.logged.Load() >= seq {
		return v.err()
	}
	v.d.waiters.Add(1)
	defer v.d.waiters.Add(-1)
	v.d.wal.Kick()
	v.mu.RLock()
	defer v.mu.RUnlock()
	for v.logged.Load() < seq && v.err() == nil && v.d.wal.Err() == nil {
		v.grown.Wait()
	}
	if err := v.err(); err != nil {
		return err
	}
	return v.d.wal.Err()
}

// Write writes p at byte off and returns when it is as durable as asked. It waits while the log is full, and fails with
// ErrNoSpace only when nothing has been drained for the drain deadline.
func (v *Volume) Write(ctx context.Context, p []byte, off int64, f blockio.Flags) error {
	if err := v.checkWrite(len(p), off, f); err != nil || len(p) == 0 {
		return err
	}
	if err := v.limiter.Load().Wait(ctx, qos.Write, len(p)); err != nil {
		return err
	}
	if err := v.share.Wait(ctx, qos.Write, len(p)); err != nil {
		return err
	}
	for len(p) > 0 {
		n := min(len(p), recordBlocksMax*blockSize)
		if head := int(off & (blockSize - 1)); head != 0 || n < blockSize {
			n = min(n, blockSize-head)
			if err := v.merge(ctx, p[:n], off, f&^blockio.FUA); err != nil {
				return err
			}
		} else {
			n &^= blockSize - 1
			if err := v.append(ctx, uint64(off)/blockSize, uint64(n)/blockSize, func(c blockio.Completer) error {
				return v.appendLocked(p[:n], off, f&^blockio.FUA, c, 0)
			}); err != nil {
				return err
			}
		}
		p, off = p[n:], off+int64(n)
	}
	if f&blockio.FUA != 0 {
		return v.Flush(ctx)
	}
	return nil
}

func (v *Volume) checkWrite(n int, off int64, f blockio.Flags) error {
	v.order.Lock()
	defer v.order.Unlock()
	if err := v.usableLocked(); err != nil {
		return err
	}
	return checkRange(off, int64(n), v.size, f&blockio.Extend != 0)
}

// append runs submit, which appends a record with order held, until there is room, and waits for the record to be logged.
func (v *Volume) append(ctx context.Context, lba, n uint64, submit func(blockio.Completer) error) error {
	w := newWaiter()
	stall := v.d.newStall()
	for {
		v.order.Lock()
		for v.claimedLocked(lba, n) && v.usableLocked() == nil {
			v.freed.Wait()
		}
		err := submit(w)
		v.order.Unlock()
		if err == nil {
			v.d.wal.Kick()
			return w.wait()
		}
		if !errors.Is(err, blockio.ErrBusy) {
			return err
		}
		v.d.wal.Kick()
		if err := stall.wait(ctx); err != nil {
			return err
		}
	}
}

// claim reserves a block for read-modify-write and returns once everything accepted before can be read.
func (v *Volume) claim(lba uint64) error {
	v.order.Lock()
	for v.claimedLocked(lba, 1) && v.usableLocked() == nil {
		v.freed.Wait()
	}
	if err := v.usableLocked(); err != nil {
		v.order.Unlock()
		return err
	}
	if v.claims == nil {
		v.claims = make(map[uint64]struct{})
	}
	v.claims[lba] = struct{}{}
	seq := v.seq
	v.order.Unlock()
	if err := v.waitLogged(seq); err != nil {
		v.unclaim(lba)
		return err
	}
	return nil
}

func (v *Volume) unclaim(lba uint64) {
	v.order.Lock()
	delete(v.claims, lba)
	v.freed.Broadcast()
	v.order.Unlock()
}

// merge writes p inside one block: claim, read, merge, append.
func (v *Volume) merge(ctx context.Context, p []byte, off int64, f blockio.Flags) error {
	lba, at := uint64(off)/blockSize, int(off&(blockSize-1))
	if err := v.claim(lba); err != nil {
		return err
	}
	block := v.d.blocks.get()
	defer v.d.blocks.put(block)
	if err := v.readBlock(ctx, lba, block); err != nil {
		v.unclaim(lba)
		return err
	}
	copy(block[at:], p)
	end := off + int64(len(p))
	return v.appendClaimed(ctx, lba, func(c blockio.Completer) error {
		if err := checkRange(off, int64(len(p)), v.size, f&blockio.Extend != 0); err != nil {
			return err
		}
		r := writelog.Record{Volume: v.id, Seq: v.seq + 1, Kind: writelog.Data, LBA: lba, Blocks: 1}
		if err := v.useKeyLocked(&r); err != nil {
			return err
		}
		if end > v.size {
			r.Flags, r.Value = recordExtends, uint64(end)
		}
		if err := v.d.wal.Append(r, block, v, false, c, 0); err != nil {
			return err
		}
		v.seq++
		v.size = max(v.size, end)
		return nil
	})
}

// appendClaimed is append for the holder of the claim on lba, which ends with the append.
func (v *Volume) appendClaimed(ctx context.Context, lba uint64, submit func(blockio.Completer) error) error {
	w := newWaiter()
	stall := v.d.newStall()
	for {
		v.order.Lock()
		err := v.usableLocked()
		if err == nil {
			err = submit(w)
		}
		if !errors.Is(err, blockio.ErrBusy) {
			delete(v.claims, lba)
			v.freed.Broadcast()
		}
		v.order.Unlock()
		switch {
		case err == nil:
			v.d.wal.Kick()
			return w.wait()
		case !errors.Is(err, blockio.ErrBusy):
			return err
		}
		v.d.wal.Kick()
		if err := stall.wait(ctx); err != nil {
			v.unclaim(lba)
			return err
		}
	}
}

// readBlock reads a whole block; what lies beyond the volume's end is zero.
func (v *Volume) readBlock(ctx context.Context, lba uint64, block []byte) error {
	n := min(int64(blockSize), v.Size()-int64(lba)*blockSize)
	if n <= 0 {
		clear(block)
		return nil
	}
	clear(block[n:])
	return v.read(ctx, block[:n], int64(lba)*blockSize)
}

// Zero makes [off, off+n) read as zeros and gives back its storage.
func (v *Volume) Zero(ctx context.Context, off, n int64, f blockio.Flags) error {
	if err := v.checkRangeNow(off, n); err != nil {
		return err
	}
	if n > 0 {
		if err := v.limiter.Load().Wait(ctx, qos.Write, 0); err != nil {
			return err
		}
		if err := v.share.Wait(ctx, qos.Write, blockSize); err != nil {
			return err
		}
	}
	zeros := v.d.blocks.zeros
	end := off + n
	if head := off & (blockSize - 1); head != 0 && n > 0 {
		k := min(blockSize-head, n)
		if err := v.merge(ctx, zeros[:k], off, 0); err != nil {
			return err
		}
		off += k
	}
	tail := int64(0)
	if end > off && end != v.Size() {
		tail = end & (blockSize - 1)
	}
	if whole := roundUp(end - tail - off); whole > 0 {
		lba, blocks := uint64(off)/blockSize, uint64(whole)/blockSize
		if err := v.append(ctx, lba, blocks, func(c blockio.Completer) error {
			if err := v.usableLocked(); err != nil {
				return err
			}
			return v.appendZeroLocked(lba, blocks, 0, c, 0)
		}); err != nil {
			return err
		}
	}
	if tail > 0 {
		if err := v.merge(ctx, zeros[:tail], end-tail, 0); err != nil {
			return err
		}
	}
	if f&blockio.FUA != 0 {
		return v.Flush(ctx)
	}
	return nil
}

func (v *Volume) checkRangeNow(off, n int64) error {
	v.order.Lock()
	defer v.order.Unlock()
	if err := v.usableLocked(); err != nil {
		return err
	}
	return checkRange(off, n, v.size, false)
}

// Flush returns when every write that returned before is durable.
func (v *Volume) Flush(ctx context.Context) error {
	if err := v.err(); err != nil {
		return err
	}
	return v.d.wal.Sync(ctx, v.lastBatch.Load())
}

// WaitLevel waits until everything that was accepted until now is at least as safe as the level says: "logged" (it survives
// a power cut of this node) or "backed" (it is on the backend).
func (v *Volume) WaitLevel(ctx context.Context, level string) error {
	v.order.Lock()
	seq := v.seq
	v.order.Unlock()
	switch level {
	case "logged":
		if err := v.waitLogged(seq); err != nil {
			return err
		}
		return v.Flush(ctx)
	case "backed":
		return v.WaitBacked(ctx, seq)
	}
	return fmt.Errorf("level %q: logged or backed", level)
}

// Resize makes the volume size bytes long: what is cut off is gone, what is added reads as zeros. It is durable when it returns.
func (v *Volume) Resize(ctx context.Context, size int64) error {
	if size < 0 || size > VolumeBytesMax {
		return fmt.Errorf("resize to %d bytes (at most %d): %w", size, VolumeBytesMax, blockio.ErrBeyondEnd)
	}
	lba, at := uint64(size)/blockSize, size&(blockSize-1)
	block := v.d.blocks.get()
	defer v.d.blocks.put(block)
	// The partial last block goes into the same batch as the new size, cleared behind it.
	if err := v.claim(lba); err != nil {
		return err
	}
	shrink := at != 0 && size < v.Size()
	if shrink {
		if err := v.readBlock(ctx, lba, block); err != nil {
			v.unclaim(lba)
			return err
		}
		clear(block[at:])
	}
	err := v.appendClaimed(ctx, lba, func(c blockio.Completer) error {
		recs := []writelog.Record{{Volume: v.id, Seq: v.seq + 1, Kind: writelog.Size, Value: uint64(size)}}
		var payload []byte
		if shrink {
			recs = []writelog.Record{
				{Volume: v.id, Seq: v.seq + 1, Kind: writelog.Data, LBA: lba, Blocks: 1},
				{Volume: v.id, Seq: v.seq + 2, Kind: writelog.Size, Value: uint64(size)},
			}
			payload = block
		}
		if shrink {
			if err := v.useKeyLocked(&recs[0]); err != nil {
				return err
			}
		}
		if err := v.d.wal.AppendAll(recs, payload, v, false, c, 0); err != nil {
			return err
		}
		v.seq += uint64(len(recs))
		v.size = size
		return nil
	})
	if err != nil {
		return err
	}
	v.d.rootChanged(v)
	return v.Flush(ctx)
}

// SetModTime sets the modification time; it is as durable as a write.
func (v *Volume) SetModTime(ctx context.Context, t time.Time) error {
	return v.append(ctx, 0, 0, func(c blockio.Completer) error {
		if err := v.usableLocked(); err != nil {
			return err
		}
		r := writelog.Record{Volume: v.id, Seq: v.seq + 1, Kind: writelog.Mark, Flags: recordModTime, Value: uint64(t.UnixNano())}
		if err := v.d.wal.Append(r, nil, v, false, c, 0); err != nil {
			return err
		}
		v.seq++
		return nil
	})
}

// waiter is a Completer for one blocking request.
type waiter struct{ end chan error }

func newWaiter() *waiter { return &waiter{make(chan error, 1)} }

// Done implements blockio.Completer.
func (w *waiter) Done(_ uint64, err error) { w.end <- err }

// Settle implements blockio.Completer.
func (w *waiter) Settle(bool) {}

func (w *waiter) wait() error { return <-w.end }
