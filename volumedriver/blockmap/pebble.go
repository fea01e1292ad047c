package blockmap

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"

	"github.com/cockroachdb/pebble/v2"
	pebblevfs "github.com/cockroachdb/pebble/v2/vfs"
)

const (
	formatVersion = "2"
	cacheBytes    = 8 << 20
	memTableBytes = 8 << 20
	// reserveBytes is room for Pebble to flush and compact what it has accepted.
	reserveBytes = 32 << 20
)

func (s *Store) options(fs pebblevfs.FS) *pebble.Options {
	memTable := uint64(memTableBytes)
	if s.cfg.memTableBytes > 0 {
		memTable = uint64(s.cfg.memTableBytes)
	}
	o := &pebble.Options{
		FS:                          fs,
		Cache:                       s.cache,
		FormatMajorVersion:          pebble.FormatValueSeparation,
		MemTableSize:                memTable,
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
	o.ApplyCompressionSettings(func() pebble.DBCompressionSettings {
		return pebble.DBCompressionNone // a leaf is packed as it is: a quarter of the CPU time would go to a few per cent of space
	})
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
	if err = s.Err(); err != nil {
		return errors.Join(err, s.db.Close())
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

// commit applies b and frees it. If the store has failed by the end of it, nothing is confirmed.
func (s *Store) commit(b *pebble.Batch, o *pebble.WriteOptions) error {
	if err := s.Err(); err != nil {
		return err
	}
	if err := s.checkSpace(int64(b.Len())); err != nil {
		return err
	}
	return s.apply(b, o)
}

// apply is commit without a look at the space.
func (s *Store) apply(b *pebble.Batch, o *pebble.WriteOptions) error {
	if err := b.Commit(o); err != nil {
		return s.fail(err)
	}
	if err := s.Err(); err != nil {
		return err
	}
	return b.Close()
}

// checkSpace looks at the free space once for each MiB, and at each attempt while there is too little.
func (s *Store) checkSpace(n int64) error {
	if s.unchecked.Add(-n) > 0 {
		return nil
	}
	total, available, err := s.cfg.FS.Space(s.cfg.Dir)
	if err != nil {
		return fmt.Errorf("free space of %s: %w", s.cfg.Dir, err)
	}
	if total > 0 && available < reserveBytes {
		s.unchecked.Store(0)
		return errSpace
	}
	s.unchecked.Store(1 << 20)
	return nil
}

func (s *Store) closePebble() error {
	defer s.cache.Unref()
	return s.db.Close()
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

// Fatalf returns, though Pebble expects an exit: the store refuses all work from here on, and the disk is left alone.
func (l pebbleLog) Fatalf(format string, args ...any) {
	l.s.fail(fmt.Errorf("pebble: "+format, args...))
	l.s.disk.frozen.Store(true)
}
