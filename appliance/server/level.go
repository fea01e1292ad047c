package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"varve/control/durable"
	"varve/control/state"
)

const (
	levelName     = "level.json"
	levelEvery    = time.Second
	levelBytesMax = 4 << 10
)

// levelStamp is DATA/level.json: the data level that what lies in DATA may be of. It is on disk before anything of that level is.
type levelStamp struct {
	Level   int    `json:"level"`
	Version string `json:"version"` // that wrote it
}

// LevelError: the data is of a level that this binary does not know. Nothing of it was opened or changed.
type LevelError struct {
	Data    string
	Level   int
	Version string
}

func (e *LevelError) Error() string {
	return fmt.Sprintf("%s holds data of level %d, written by version %s; this binary knows levels %d to %d and has not touched it", e.Data, e.Level, e.Version,
		state.LevelMin, state.LevelMax)
}

// DataLevel reads the stamp of a data directory; a directory without one is of the first level.
func DataLevel(data string) (int, error) {
	s, err := readLevel(data)
	return s.Level, err
}

func readLevel(data string) (levelStamp, error) {
	f, err := os.Open(filepath.Join(data, levelName))
	if errors.Is(err, fs.ErrNotExist) {
		return levelStamp{Level: state.LevelMin}, nil
	}
	if err != nil {
		return levelStamp{}, fmt.Errorf("read data level: %w", err)
	}
	defer f.Close()
	b := make([]byte, levelBytesMax)
	n, err := f.Read(b)
	if err != nil {
		return levelStamp{}, fmt.Errorf("read data level: %w", err)
	}
	var s levelStamp
	if err := json.Unmarshal(b[:n], &s); err != nil || s.Level < 1 {
		return s, fmt.Errorf("read data level: %s does not read; restore it", filepath.Join(data, levelName))
	}
	return s, nil
}

// KnowsLevel says whether this binary reads data of a level.
func KnowsLevel(level int) bool { return level >= state.LevelMin && level <= state.LevelMax }

// checkLevel refuses a directory whose data this binary does not know, before anything in it is opened.
func checkLevel(data string) error {
	s, err := readLevel(data)
	if err != nil {
		return err
	}
	if !KnowsLevel(s.Level) {
		return &LevelError{Data: data, Level: s.Level, Version: s.Version}
	}
	return nil
}

// stampLevel puts the cluster's level beside the data.
func (b *base) stampLevel() error {
	have, err := readLevel(b.cfg.Data)
	if err != nil {
		return err
	}
	now := b.raft.State().View().Level()
	if _, err := os.Stat(filepath.Join(b.cfg.Data, levelName)); err == nil && have.Level >= now {
		return nil
	}
	text, err := json.Marshal(levelStamp{Level: max(now, have.Level), Version: b.cfg.Version})
	if err != nil {
		return fmt.Errorf("encode data level: %w", err)
	}
	return durable.Replace(b.cfg.Data, levelName, append(text, '\n'), 0o644)
}

// followLevel keeps the stamp up with the cluster until ctx ends.
func (b *base) followLevel(ctx context.Context) error {
	return tick(ctx, levelEvery, func() {
		if err := b.stampLevel(); err != nil {
			b.cfg.Log.Error("the data level could not be recorded", "err", err)
		}
	})
}
