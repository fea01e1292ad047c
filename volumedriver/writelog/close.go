package writelog

import (
	"errors"
	"fmt"
)

// Close commits and syncs what was appended, notes a clean stop and closes the files. Nothing may use the log afterwards.
// A fenced log is closed without any of that, with the error that fenced it.
func (l *Log) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	l.space.Broadcast()
	l.mu.Unlock()

	l.Kick()
	l.mu.Lock()
	for l.committing {
		l.waitSpaceLocked()
	}
	l.mu.Unlock()
	err := l.SyncInline(l.Written())

	close(l.stop)
	l.smu.Lock()
	l.stopped = true
	l.gather.stop()
	l.work.Broadcast()
	l.smu.Unlock()
	l.wg.Wait()

	if err == nil {
		m := l.meta
		m.clean, m.generation, m.last, m.chain = true, l.tailGen, l.Written(), l.chain
		if err = writeMeta(l.cfg.FS, l.cfg.Dir, &m); err != nil {
			err = fmt.Errorf("note clean stop of write log %s: %w", l.cfg.Dir, err)
		}
	}
	return errors.Join(err, l.closeFiles())
}

func (l *Log) closeFiles() error {
	var errs []error
	for i := range l.slots {
		if s := l.slots[i].Load(); s != nil {
			if err := s.file.Close(); err != nil {
				errs = append(errs, fmt.Errorf("close log segment %s: %w", s.path, err))
			}
		}
	}
	if err := l.lock.Close(); err != nil {
		errs = append(errs, fmt.Errorf("unlock write log %s: %w", l.cfg.Dir, err))
	}
	return errors.Join(errs...)
}
