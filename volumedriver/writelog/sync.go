package writelog

import (
	"context"
	"fmt"
	"path"
	"time"

	"varve/volumedriver/blockio"
)

// syncBehindBytes is how much may be written before a sync is begun that nobody asked for, so that a roll, which has to
// sync, does not stall writers for long.
const syncBehindBytes = 16 << 20

// publish makes a written batch known, and its requests that wait for a sync, unless the log is fenced by now.
func (l *Log) publish(b *batch) error {
	l.smu.Lock()
	defer l.smu.Unlock()
	if err := l.Err(); err != nil {
		return err
	}
	l.current = b.segment
	l.written.Store(b.number)
	l.unsynced += b.size(0, 0)
	for i := range b.waiters {
		if b.waiters[i].sync {
			l.pending = append(l.pending, b.waiters[i])
		}
	}
	if len(l.pending) > 0 || l.unsynced >= syncBehindBytes {
		l.want = b.number
		if l.purpose != kickedSync && !l.syncing && !l.gatherLocked() {
			l.work.Signal()
		}
	}
	l.wakeMovedLocked()
	return nil
}

func (l *Log) wakeMovedLocked() {
	if l.asleep > 0 {
		l.moved.Broadcast()
	}
}

func (l *Log) waitMovedLocked() {
	l.asleep++
	l.moved.Wait()
	l.asleep--
}

// runSyncer syncs when someone waits for it and nobody else does it.
func (l *Log) runSyncer() {
	defer l.wg.Done()
	l.smu.Lock()
	defer l.smu.Unlock()
	for {
		for !l.stopped && (l.syncing || l.want <= l.durable.Load() || l.Err() != nil || l.gatherLocked()) {
			l.work.Wait()
		}
		if l.stopped {
			return
		}
		l.syncLocked(l.current, l.written.Load())
	}
}

// syncLocked makes the batches up to upto, the last written, durable; they lie in s or are durable already. smu is held
// at the begin and at the end, not while syncing; l.syncing was false.
func (l *Log) syncLocked(s *segment, upto uint64) {
	l.syncing = true
	l.unsynced = 0
	l.gather.end(len(l.pending))
	l.smu.Unlock()
	began := time.Now()
	err := s.file.Datasync()
	took := time.Since(began)
	l.syncs.Add(1)
	if err != nil {
		l.fence(fmt.Errorf("sync log segment %s: %w", s.path, err))
	}
	l.smu.Lock()
	l.syncing = false
	l.wakeMovedLocked()
	if l.Err() != nil {
		return
	}
	l.durable.Store(upto)
	l.gather.synced(len(l.pending), took)
	due := l.takeDueLocked(upto)
	if l.want > upto && !l.gatherLocked() {
		l.work.Signal()
	}
	if len(due) == 0 {
		return
	}
	l.smu.Unlock()
	deliver(due, nil)
	clear(due)
	l.smu.Lock()
	l.spareBuf = due[:0]
}

// takeDueLocked removes from pending what a sync of the batches up to upto ends.
func (l *Log) takeDueLocked(upto uint64) []waiter {
	due := l.spareBuf
	l.spareBuf = nil
	keep := l.pending[:0]
	for _, w := range l.pending {
		if w.batch <= upto {
			due = append(due, w)
		} else {
			keep = append(keep, w)
		}
	}
	clear(l.pending[len(keep):])
	l.pending = keep
	if len(due) == 0 {
		l.spareBuf = due
	}
	return due
}

// syncWhole makes all of a full segment durable, on the committer.
func (l *Log) syncWhole(s *segment, upto uint64) error {
	l.smu.Lock()
	defer l.smu.Unlock()
	for l.syncing {
		l.waitMovedLocked()
	}
	if err := l.Err(); err != nil {
		return err
	}
	l.syncLocked(s, upto)
	return l.Err()
}

// settleTarget says which batch really has to be durable for upto, and sees to it that it gets written.
func (l *Log) settleTarget(upto uint64) uint64 {
	if upto <= l.written.Load() {
		return upto
	}
	l.mu.Lock()
	last := l.open.number
	if l.open.empty() {
		last--
	}
	l.mu.Unlock()
	upto = min(upto, last)
	if upto == last {
		l.Kick()
	}
	return upto
}

// SyncInline returns when the batches up to upto are durable. It syncs on the calling goroutine if nobody else is at it:
// no switch between goroutines for a lone client.
func (l *Log) SyncInline(upto uint64) error {
	upto = l.settleTarget(upto)
	l.smu.Lock()
	defer l.smu.Unlock()
	for {
		switch {
		case l.Err() != nil:
			return l.Err()
		case l.durable.Load() >= upto:
			return nil
		case l.syncing || l.written.Load() < upto:
			l.waitMovedLocked()
		default:
			l.syncLocked(l.current, l.written.Load())
		}
	}
}

// Sync returns when the batches up to upto are durable, or ctx ends.
func (l *Log) Sync(ctx context.Context, upto uint64) error {
	upto = l.settleTarget(upto)
	c := make(oneResult, 1)
	if l.SyncAsync(upto, c, 0) {
		return nil
	}
	select {
	case err := <-c:
		return err
	case <-ctx.Done():
		return fmt.Errorf("sync write log up to batch %d: %w", upto, context.Cause(ctx))
	}
}

// oneResult waits for a single request.
type oneResult chan error

func (c oneResult) Done(_ uint64, err error) { c <- err }
func (c oneResult) Settle(bool)              {}

// SyncAsync is for FLUSH: it reports true if the batches up to upto are durable, and else tells done when they are, or with
// ErrFenced. A batch that is still open has to be kicked by someone.
func (l *Log) SyncAsync(upto uint64, done blockio.Completer, tag uint64) (completedNow bool) {
	if upto > l.written.Load() {
		l.mu.Lock()
		last := l.open.number
		if l.open.empty() {
			last--
		}
		l.mu.Unlock()
		upto = min(upto, last)
	}
	l.smu.Lock()
	if err := l.Err(); err != nil {
		l.smu.Unlock()
		done.Done(tag, err)
		done.Settle(true)
		return false
	}
	defer l.smu.Unlock()
	if upto <= l.durable.Load() {
		return true
	}
	l.pending = append(l.pending, waiter{batch: upto, done: done, tag: tag, sync: true})
	if upto <= l.written.Load() {
		l.want = max(l.want, upto)
		if !l.syncing && !l.gatherLocked() { // the end of a sync looks again
			l.work.Signal()
		}
	}
	return false
}

// fence ends the log at its first failed write or sync: nothing is acknowledged from now on.
func (l *Log) fence(cause error) {
	l.smu.Lock()
	if l.Err() != nil {
		l.smu.Unlock()
		return
	}
	err := fmt.Errorf("write log %s: %w: %w", l.cfg.Dir, blockio.ErrFenced, cause)
	l.err.Store(&err)
	pending := l.pending
	l.pending = nil
	l.moved.Broadcast()
	l.work.Broadcast()
	l.smu.Unlock()

	deliver(pending, err)
	l.cfg.Log.Error("write log is fenced", "dir", l.cfg.Dir, "err", cause)
	l.markFenced(cause)
	close(l.failed)

	// What was appended meanwhile fails in order, through the committer.
	l.mu.Lock()
	defer l.mu.Unlock()
	l.space.Broadcast()
	if !l.committing && !l.open.empty() {
		l.committing = true
		l.handover <- struct{}{}
	}
}

// markFenced tells the next start not to trust what is in memory of the files. It may fail as well: see the package comment.
func (l *Log) markFenced(cause error) {
	name := path.Join(l.cfg.Dir, fencedName)
	err := writeFile(l.cfg.FS, name, []byte(cause.Error()+"\n"))
	if err == nil {
		err = l.cfg.FS.SyncDir(l.cfg.Dir)
	}
	if err != nil {
		l.cfg.Log.Warn("fenced write log could not be marked", "dir", l.cfg.Dir, "err", err)
	}
}
