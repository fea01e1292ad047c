package blockmap

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"time"

	"github.com/cockroachdb/pebble/v2"
	pebblevfs "github.com/cockroachdb/pebble/v2/vfs"
)

const (
	formatVersion = "1"
	cacheBytes    = 8 << 20
	memTableBytes = 8 << 20
	// closeWait is how long Close waits for a Pebble that has failed: it may hang on a lock that it died with.
	closeWait = 2 * time.Second
)

func (s *Store) options(fs pebblevfs.FS) *pebble.Options {
	o := &pebble.Options{
		FS:                          fs,
		Cache:                       s.cache,
		FormatMajorVersion:          pebble.FormatValueSeparation,
		MemTableSize:                memTableBytes,
		MemTableStopWritesThreshold: 3,
		MaxOpenFiles:                256,
		L0CompactionThreshold:       4,
		L0StopWritesThreshold:       24,
		CompactionConcurrencyRange:  func() (int, int) { return 1, 1 },
		Logger:                      pebbleLog{s},
		EventListener: &pebble.EventListener{
			BackgroundError: func(err error) { s.log.Warn("block map store cannot write, trying again", "err", err) },
		},
	}
	for i := range o.TargetFileSizes {
		o.TargetFileSizes[i] = 16 << 20
	}
	return o
}

func (s *Store) openPebble(fs pebblevfs.FS) (err error) {
	s.cache = pebble.NewCache(cacheBytes)
	defer func() {
		if err != nil {
			s.cache.Unref()
		}
	}()
	if s.db, err = pebble.Open("", s.options(fs)); err != nil {
		return err
	}
	if err = s.readHead(); err != nil {
		return errors.Join(err, s.db.Close())
	}
	return nil
}

// readHead reads format and handle counter, or writes them if the store is new.
func (s *Store) readHead() error {
	format, closer, err := s.db.Get([]byte("f"))
	if errors.Is(err, pebble.ErrNotFound) {
		s.nextHandle.Store(1)
		b := s.db.NewBatch()
		if err := b.Set([]byte("f"), []byte(formatVersion), nil); err != nil {
			return err
		}
		return s.commit(b, pebble.Sync)
	}
	if err != nil {
		return err
	}
	if string(format) != formatVersion {
		return errors.Join(fmt.Errorf("format %q; this program knows %q", format, formatVersion), closer.Close())
	}
	if err := closer.Close(); err != nil {
		return err
	}
	next, closer, err := s.db.Get([]byte("n"))
	if errors.Is(err, pebble.ErrNotFound) {
		s.nextHandle.Store(1)
		return nil
	}
	if err != nil {
		return err
	}
	defer closer.Close()
	if len(next) != 4 || binary.BigEndian.Uint32(next) == 0 {
		return fmt.Errorf("handle counter %x: %w", next, ErrCorrupt)
	}
	s.nextHandle.Store(binary.BigEndian.Uint32(next))
	return nil
}

// commit applies b and frees it. Pebble does not live on after a failed write: it panics, or calls Fatalf, which records
// the failure. Either way the store has failed and the batch is not confirmed.
func (s *Store) commit(b *pebble.Batch, o *pebble.WriteOptions) (err error) {
	if err := s.Err(); err != nil {
		return err
	}
	defer func() {
		if r := recover(); r != nil {
			if bug, ok := r.(runtime.Error); ok {
				panic(bug)
			}
			err = s.fail(fmt.Errorf("write to pebble: %v", r))
		}
	}()
	if err := b.Commit(o); err != nil {
		return s.fail(fmt.Errorf("write to pebble: %w", err))
	}
	if err := s.Err(); err != nil {
		return err
	}
	return b.Close()
}

func (s *Store) closePebble() error {
	defer s.cache.Unref()
	if s.failure.Load() == nil {
		return s.db.Close()
	}
	done := make(chan error, 1)
	go func() {
		defer func() {
			if r := recover(); r != nil {
				done <- fmt.Errorf("close pebble: %v", r)
			}
		}()
		done <- s.db.Close()
	}()
	select {
	case err := <-done:
		return err
	case <-time.After(closeWait):
		return errors.New("close pebble: it hangs after its failure")
	}
}

// pebbleLog takes what Pebble has to say.
type pebbleLog struct{ s *Store }

func (l pebbleLog) Infof(format string, args ...any) {
	if l.s.log.Enabled(context.Background(), slog.LevelDebug) {
		l.s.log.Debug("pebble", "text", fmt.Sprintf(format, args...))
	}
}

func (l pebbleLog) Errorf(format string, args ...any) {
	l.s.log.Warn("pebble", "text", fmt.Sprintf(format, args...))
}

// Fatalf returns, though Pebble expects an exit: the store refuses all work from here on.
func (l pebbleLog) Fatalf(format string, args ...any) {
	l.s.fail(fmt.Errorf("pebble: "+format, args...))
}
