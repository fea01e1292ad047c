package raft

import (
	"fmt"
	"io"

	"github.com/hashicorp/raft"

	"varve/control/state"
)

// fsm feeds committed entries to the store. A store that halts fails the node.
type fsm struct {
	store   *state.Store
	failure *failure
}

type applied struct {
	res state.Result
	err error
}

// Apply implements raft.FSM.
func (f *fsm) Apply(l *raft.Log) any {
	res, err := f.store.Apply(l.Index, l.Data)
	if halt := f.store.Halted(); halt != nil {
		f.failure.set(halt)
	}
	return applied{res: res, err: err}
}

// Snapshot implements raft.FSM.
func (f *fsm) Snapshot() (raft.FSMSnapshot, error) {
	s, err := f.store.Snapshot()
	if err != nil {
		return nil, err
	}
	return snapshot{s}, nil
}

// Restore implements raft.FSM. At start Open has restored already and raft is told not to.
func (f *fsm) Restore(r io.ReadCloser) error {
	err := f.store.Restore(r)
	if cerr := r.Close(); err == nil && cerr != nil {
		err = fmt.Errorf("close snapshot: %w", cerr)
	}
	return err
}

type snapshot struct{ *state.Snapshot }

// Persist implements raft.FSMSnapshot. The sink's Close syncs the file and its directory.
func (s snapshot) Persist(sink raft.SnapshotSink) error {
	if _, err := s.WriteTo(sink); err != nil {
		if cerr := sink.Cancel(); cerr != nil {
			return fmt.Errorf("%w (and cancel: %w)", err, cerr)
		}
		return err
	}
	return sink.Close()
}

// Release implements raft.FSMSnapshot.
func (snapshot) Release() {}

// newestIntact restores the newest snapshot that reads back whole and returns a store that lists none newer. An older one
// serves only if the log still holds everything after it.
func newestIntact(snaps raft.SnapshotStore, logs raft.LogStore, store *state.Store) (raft.SnapshotStore, uint64, error) {
	list, err := snaps.List()
	if err != nil {
		return nil, 0, fmt.Errorf("list raft snapshots: %w", err)
	}
	firstLog, err := logs.FirstIndex()
	if err != nil {
		return nil, 0, fmt.Errorf("read raft log: %w", err)
	}
	skip := make(map[string]bool)
	var cause error
	for _, meta := range list {
		if firstLog > meta.Index+1 {
			break
		}
		if err := restore(snaps, meta.ID, store); err != nil {
			cause = err
			skip[meta.ID] = true
			continue
		}
		return intact{SnapshotStore: snaps, skip: skip}, meta.Index, nil
	}
	if cause != nil || len(list) > 0 {
		return nil, 0, fmt.Errorf("no raft snapshot is intact and joins the log, which starts at %d: %w", firstLog, cause)
	}
	if firstLog > 1 {
		return nil, 0, fmt.Errorf("%w: the raft log starts at %d and the snapshot before it is missing", ErrIdentity, firstLog)
	}
	return intact{SnapshotStore: snaps}, 0, nil
}

func restore(snaps raft.SnapshotStore, id string, store *state.Store) error {
	_, r, err := snaps.Open(id)
	if err != nil {
		return fmt.Errorf("open raft snapshot %s: %w", id, err)
	}
	err = store.Restore(r)
	if cerr := r.Close(); err == nil && cerr != nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("raft snapshot %s: %w", id, err)
	}
	return nil
}

// intact hides snapshots that did not read back.
type intact struct {
	raft.SnapshotStore
	skip map[string]bool
}

func (s intact) List() ([]*raft.SnapshotMeta, error) {
	list, err := s.SnapshotStore.List()
	var out []*raft.SnapshotMeta
	for _, m := range list {
		if !s.skip[m.ID] {
			out = append(out, m)
		}
	}
	return out, err
}
