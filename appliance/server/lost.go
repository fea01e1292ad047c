package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/google/uuid"

	"varve/control/durable"
	"varve/control/state"
)

// A volume that the driver does not know is made, empty, when it is opened: that is how every volume begins. A volume whose
// log or map is gone must not begin again, so before a rebuild makes a new log and map it notes every volume that was active
// in lost.json, and takes each off when it is rebuilt, or known to be empty and said to be. What is left on the list, after
// an interrupted rebuild or because its objects are damaged, cannot be opened.
const lostName = "lost.json"

// active lists the volumes that have been opened by this node.
func (b *base) active() []uuid.UUID {
	var ids []uuid.UUID
	view := b.raft.State().View()
	for _, p := range view.VPools() {
		for _, v := range view.VolumesOf(p.FSID) {
			if v.State == state.VolumeActive && v.Owner == b.raft.ID() {
				ids = append(ids, v.ID)
			}
		}
	}
	return ids
}

// missing gives the directory of the log or the map if there is nothing in it.
func missing(data string) (string, error) {
	for _, dir := range []string{logName, mapName} {
		path := filepath.Join(data, dir)
		entries, err := os.ReadDir(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
		if len(entries) == 0 {
			return path, nil
		}
	}
	return "", nil
}

// loadLost reads the list, adding every active volume if the log or the map is gone now: which is an error under guard.
func (b *base) loadLost(guard bool) (map[uuid.UUID]bool, error) {
	lost := make(map[uuid.UUID]bool)
	raw, err := os.ReadFile(filepath.Join(b.cfg.Data, lostName))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if err == nil {
		var ids []uuid.UUID
		if err := json.Unmarshal(raw, &ids); err != nil {
			return nil, fmt.Errorf("read list of lost volumes: %w", err)
		}
		for _, id := range ids {
			lost[id] = true
		}
	}
	gone, err := missing(b.cfg.Data)
	if err != nil || gone == "" {
		return lost, err
	}
	active := b.active()
	switch {
	case len(active) == 0:
		return lost, nil
	case guard:
		return nil, &LostError{Data: b.cfg.Data, Missing: gone, Volumes: len(active)}
	}
	for _, id := range active {
		lost[id] = true
	}
	return lost, b.saveLost(lost)
}

func (b *base) saveLost(lost map[uuid.UUID]bool) error {
	ids := make([]uuid.UUID, 0, len(lost))
	for id := range lost {
		ids = append(ids, id)
	}
	slices.SortFunc(ids, func(x, y uuid.UUID) int { return slices.Compare(x[:], y[:]) })
	raw, err := json.Marshal(ids)
	if err == nil {
		err = durable.Replace(b.cfg.Data, lostName, append(raw, '\n'), 0o600)
	}
	if err != nil {
		return fmt.Errorf("write list of lost volumes: %w", err)
	}
	return nil
}
