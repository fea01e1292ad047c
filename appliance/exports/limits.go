package exports

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/google/uuid"

	"varve/control/policy"
	"varve/control/state"
	"varve/volumedriver"
	"varve/volumedriver/qos"
)

// limit gives a vDisk's volume the limits and the rewind window that its policy names: when it is opened, and when policies change.
func limit(ctx context.Context, view *state.View, vol state.Volume, v *volumedriver.Volume) error {
	if vol.Kind != state.DiskVolume {
		return nil
	}
	p := policy.OfVDisk(view, vol)
	want := qos.Limits{IOPS: p.IOPSMax.Value, Bytes: p.BytesMax.Value}
	if v.Limits() != want {
		if err := v.SetLimits(want); err != nil {
			return fmt.Errorf("limit volume %s: %w", vol.ID, err)
		}
	}
	return v.SetRewind(ctx, time.Duration(p.RewindSeconds.Value)*time.Second)
}

// FollowPolicies brings changed policies to the volumes that are open, until ctx ends.
func (s *Volumes) FollowPolicies(ctx context.Context, log *slog.Logger) error {
	for ctx.Err() == nil {
		view, changed, err := s.store.Watch("policy")
		if err != nil {
			return err
		}
		for id, v := range s.allOpen() {
			vol, err := view.Volume(id)
			if err != nil {
				continue // deleted
			}
			if err := limit(ctx, view, vol, v); err != nil {
				log.Warn("limits of a vDisk's policy are not in force", "volume", id, "err", err)
			}
		}
		select {
		case <-ctx.Done():
		case <-changed:
		}
	}
	return nil
}

func (s *Volumes) allOpen() map[uuid.UUID]*volumedriver.Volume {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make(map[uuid.UUID]*volumedriver.Volume, len(s.slots))
	for id, sl := range s.slots {
		if sl.volume != nil {
			out[id] = sl.volume
		}
	}
	return out
}
