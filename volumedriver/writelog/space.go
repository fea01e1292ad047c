package writelog

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver/blockio"
)

// volumeState is what the log knows of a volume that pins a segment.
type volumeState struct {
	released uint64
	segments int // how many it pins
}

// Release says that the volume's records up to seq are needed no more.
func (l *Log) Release(volume uuid.UUID, seq uint64) {
	l.rmu.Lock()
	defer l.rmu.Unlock()
	st := l.volumes[volume]
	if st == nil {
		return // it has nothing here
	}
	if seq > st.released {
		st.released = seq
		l.recycleLocked()
	}
}

// Forget says that the volume is deleted: it needs nothing, and appends no more.
func (l *Log) Forget(volume uuid.UUID) {
	l.rmu.Lock()
	defer l.rmu.Unlock()
	st := l.volumes[volume]
	if st == nil {
		return
	}
	st.released = math.MaxUint64
	l.recycleLocked()
}

// recycleLocked frees sealed segments from the oldest on until one is needed. rmu is held.
func (l *Log) recycleLocked() {
	freed := 0
	for freed < len(l.live)-1 && l.unpinnedLocked(l.live[freed]) {
		freed++
	}
	if freed == 0 {
		return
	}
	l.mu.Lock()
	l.ready = append(l.ready, l.live[:freed]...)
	l.low += uint64(freed)
	l.fedLocked()
	l.mu.Unlock()
	n := copy(l.live, l.live[freed:])
	clear(l.live[n:])
	l.live = l.live[:n]
}

// unpinnedLocked drops the pins of s that are released, and reports whether none is left.
func (l *Log) unpinnedLocked(s *segment) bool {
	for v, seq := range s.pins {
		st := l.volumes[v]
		if st.released < seq {
			return false
		}
		delete(s.pins, v)
		if st.segments--; st.segments == 0 {
			delete(l.volumes, v)
		}
	}
	return true
}

// Oldest names the oldest live generation and the volumes that keep it: whom to destage when space is short.
func (l *Log) Oldest() (gen uint64, volumes []uuid.UUID) {
	l.rmu.Lock()
	defer l.rmu.Unlock()
	s := l.live[0]
	for v, seq := range s.pins {
		if l.volumes[v].released < seq {
			volumes = append(volumes, v)
		}
	}
	return s.gen.Load(), volumes
}

// fedLocked follows each addition to the free slots.
func (l *Log) fedLocked() {
	if len(l.ready) > l.limits.reserve {
		l.starved = false
	}
	l.wakeSpaceLocked()
}

func (l *Log) wakeSpaceLocked() {
	if l.waiting > 0 {
		l.space.Broadcast()
	}
}

func (l *Log) waitSpaceLocked() {
	l.waiting++
	l.space.Wait()
	l.waiting--
}

// WaitSpace is for who was refused with ErrBusy: it returns when it makes sense to try again. It commits a full batch, and
// while no slot is free it waits for Release. The error is ctx's, ErrFenced or ErrClosed.
func (l *Log) WaitSpace(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.space.Broadcast()
	})
	defer stop()
	l.mu.Lock()
	number := l.open.number
	l.mu.Unlock()
	l.Kick()
	l.mu.Lock()
	defer l.mu.Unlock()
	for {
		if err := l.Err(); err != nil {
			return err
		}
		if l.closed {
			return fmt.Errorf("write log: %w", blockio.ErrClosed)
		}
		if ctx.Err() != nil {
			return fmt.Errorf("wait for space in the write log: %w", context.Cause(ctx))
		}
		if !l.starved && (l.open.number != number || l.open.empty()) {
			return nil
		}
		l.waitSpaceLocked()
	}
}

func (l *Log) wakePreparer() {
	select {
	case l.prepare <- struct{}{}:
	default:
	}
}

// prepareRetry is how long the preparer waits after it could not make a slot.
const prepareRetry = 500 * time.Millisecond

// errStopped: the log is being closed.
var errStopped = errors.New("stopped")

// runPreparer makes slots ahead of need, until there are as many as configured, and notes new generations in log.meta.
func (l *Log) runPreparer() {
	defer l.wg.Done()
	var retry <-chan time.Time
	for {
		select {
		case <-l.prepare:
		case <-retry:
		case <-l.stop:
			return
		}
		retry = nil
		if err := l.noteGeneration(); err != nil {
			l.cfg.Log.Warn("write log generation not noted", "dir", l.cfg.Dir, "err", err)
		}
		for l.slotWanted() {
			if err := l.addSlot(); errors.Is(err, errStopped) {
				return
			} else if err != nil {
				l.cfg.Log.Warn("write log cannot grow", "dir", l.cfg.Dir, "err", err)
				retry = time.After(prepareRetry)
				break
			}
		}
	}
}

// noteGeneration records the newest generation, so that its segment cannot vanish unnoticed.
func (l *Log) noteGeneration() error {
	newest := l.newest.Load()
	if newest <= l.meta.generation || l.Err() != nil {
		return nil
	}
	m := l.meta
	m.generation = newest
	if err := writeMeta(l.cfg.FS, l.cfg.Dir, &m); err != nil {
		return err
	}
	l.meta.generation = newest
	return nil
}

func (l *Log) slotWanted() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.ready) < 2+l.limits.reserve && l.slotCount < l.cfg.Segments && l.Err() == nil
}

func (l *Log) addSlot() error {
	s, err := l.makeSlot()
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ready = append(l.ready, s)
	l.slotCount++
	l.fedLocked()
	return nil
}

func segmentPath(dir string, slot int) string {
	return path.Join(dir, fmt.Sprintf("%s%03d%s", segmentPrefix, slot, segmentSuffix))
}

// makeSlot makes the file of the first slot that has none, written with zeros and synced, name and all. One goroutine at
// a time: Open, then the preparer.
func (l *Log) makeSlot() (*segment, error) {
	slot := 0
	for slot < slotsMax && l.slots[slot].Load() != nil {
		slot++
	}
	if slot == slotsMax {
		return nil, fmt.Errorf("write log %s has %d slots", l.cfg.Dir, slot)
	}
	name := segmentPath(l.cfg.Dir, slot)
	f, err := l.cfg.FS.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("create log segment %s: %w", name, err)
	}
	s := &segment{slot: slot, path: name, file: f, pins: make(map[uuid.UUID]uint64)}
	err = l.prewrite(s)
	if err == nil {
		if err = l.cfg.FS.SyncDir(l.cfg.Dir); err != nil {
			err = fmt.Errorf("sync directory %s: %w", l.cfg.Dir, err)
		}
	}
	if err != nil {
		err = errors.Join(err, f.Close())
		if rerr := l.cfg.FS.Remove(name); rerr != nil {
			err = errors.Join(err, fmt.Errorf("remove %s: %w", name, rerr))
		}
		return nil, err
	}
	l.slots[slot].Store(s)
	return s, nil
}

func (l *Log) prewrite(s *segment) error {
	size := l.limits.segmentBytes
	if l.cfg.NoPrewrite {
		if err := s.file.Truncate(size); err != nil {
			return fmt.Errorf("extend log segment %s: %w", s.path, err)
		}
	} else {
		if err := s.file.Preallocate(size); err != nil {
			return fmt.Errorf("reserve log segment %s: %w", s.path, err)
		}
		zeros := make([]byte, min(size, 1<<20))
		for off := int64(0); off < size; off += int64(len(zeros)) {
			select {
			case <-l.stop:
				return errStopped
			default:
			}
			p := zeros[:min(int64(len(zeros)), size-off)]
			if _, err := s.file.WriteAt(p, off); err != nil {
				return fmt.Errorf("write log segment %s at %d: %w", s.path, off, err)
			}
		}
	}
	if err := s.file.Sync(); err != nil {
		return fmt.Errorf("sync log segment %s: %w", s.path, err)
	}
	return nil
}
