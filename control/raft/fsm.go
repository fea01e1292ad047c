package raft

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/raft"

	"varve/control/state"
)

// fsm feeds committed entries to the store and to those who follow it. A store that halts fails the node.
type fsm struct {
	store   *state.Store
	failure *failure
	log     *slog.Logger

	// applied is the last command applied. It is written with mu held and read without: whoever has just committed a command would
	// queue for mu behind the commands that are being applied after it, and with it every other one.
	applied atomic.Uint64

	// mu orders applying with following. It guards what is below.
	mu        sync.Mutex
	changed   chan struct{} // closed and replaced when applied grows; nil while nobody waits
	followers map[*Feed]struct{}
	hashes    hashes
}

func newFSM(store *state.Store, failure *failure, log *slog.Logger) *fsm {
	return &fsm{store: store, failure: failure, log: log, followers: make(map[*Feed]struct{})}
}

type applied struct {
	index uint64
	res   state.Result
	err   error
}

// Apply implements raft.FSM.
func (f *fsm) Apply(l *raft.Log) any {
	f.mu.Lock()
	defer f.mu.Unlock()
	res, err := f.store.Apply(l.Index, l.Data)
	if halt := f.store.Halted(); halt != nil {
		f.failure.set(halt)
		return applied{index: l.Index, err: err}
	}
	f.advance(l.Index)
	for feed := range f.followers {
		if !feed.put(Update{Index: l.Index, Entry: l.Data}) {
			delete(f.followers, feed)
		}
	}
	f.hashes.at(l.Index, f.store)
	return applied{index: l.Index, res: res, err: err}
}

// advance tells whoever waits; mu is held.
func (f *fsm) advance(index uint64) {
	f.applied.Store(index)
	if f.changed != nil {
		close(f.changed)
		f.changed = nil
	}
}

// reach waits until the command at index is applied.
func (f *fsm) reach(ctx context.Context, index uint64) error {
	for f.applied.Load() < index {
		f.mu.Lock()
		if f.applied.Load() >= index {
			f.mu.Unlock()
			return nil
		}
		if f.changed == nil {
			f.changed = make(chan struct{})
		}
		changed := f.changed
		f.mu.Unlock()
		select {
		case <-changed:
		case <-f.failure.ch:
			return fmt.Errorf("%w: %w", ErrUnavailable, f.failure.Err())
		case <-ctx.Done():
			return fmt.Errorf("%w: this node has not caught up with entry %d: %w", ErrUnavailable, index, ctx.Err())
		}
	}
	return nil
}

// restored follows a store that was restored: followers have to begin anew.
func (f *fsm) restored() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.advance(f.store.Index())
	f.endFeeds()
}

// unfollow ends all feeds.
func (f *fsm) unfollow() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.endFeeds()
}

func (f *fsm) endFeeds() {
	for feed := range f.followers {
		close(feed.updates)
		delete(f.followers, feed)
	}
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
	f.mu.Lock()
	err := f.store.Restore(r)
	f.mu.Unlock()
	if cerr := r.Close(); err == nil && cerr != nil {
		err = fmt.Errorf("close snapshot: %w", cerr)
	}
	if err == nil {
		f.restored()
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
