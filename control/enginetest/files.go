package enginetest

import (
	"context"
	"slices"
	"time"

	"github.com/google/uuid"

	"varve/control/state"
)

// Stat implements vmachine.Files.
func (e *Engine) Stat(id uuid.UUID) (size int64, modified time.Time, ok bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	b, ok := e.files[id]
	return int64(len(b)), time.Unix(e.writes[id], 0), ok
}

// Read implements vmachine.Files.
func (e *Engine) Read(_ context.Context, v state.Volume, _ int64) ([]byte, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.files[v.ID]), e.fail["Read"]
}

// Write implements vmachine.Files.
func (e *Engine) Write(_ context.Context, v state.Volume, b []byte) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.fail["Write"]; err != nil {
		return err
	}
	if e.files == nil {
		e.files, e.writes = make(map[uuid.UUID][]byte), make(map[uuid.UUID]int64)
	}
	e.files[v.ID] = slices.Clone(b)
	e.writes[v.ID]++
	return nil
}
