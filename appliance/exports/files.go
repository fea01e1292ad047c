package exports

import (
	"context"
	"fmt"
	"time"

	"github.com/google/uuid"

	"varve/control/state"
	"varve/volumedriver"
)

// Stat implements vmachine.Files.
func (e *Engine) Stat(id uuid.UUID) (size int64, modified time.Time, ok bool) {
	i, ok := e.volumes.Info(id)
	return i.Size, i.ModTime, ok
}

// Read implements vmachine.Files.
func (e *Engine) Read(ctx context.Context, vol state.Volume, most int64) (p []byte, err error) {
	err = e.with(ctx, vol, func(v *volumedriver.Volume) error {
		size := v.Size()
		if size > most {
			return fmt.Errorf("read volume %s: %d bytes, more than %d", vol.ID, size, most)
		}
		p = make([]byte, size)
		if size == 0 {
			return nil
		}
		return v.Read(ctx, p, 0)
	})
	return p, err
}

// Write implements vmachine.Files.
func (e *Engine) Write(ctx context.Context, vol state.Volume, p []byte) error {
	return e.with(ctx, vol, func(v *volumedriver.Volume) error {
		if err := v.Resize(ctx, int64(len(p))); err != nil {
			return err
		}
		if len(p) > 0 {
			if err := v.Write(ctx, p, 0, 0); err != nil {
				return err
			}
		}
		return v.Flush(ctx)
	})
}
