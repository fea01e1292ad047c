package raft

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/raft"
)

// failure is the first persist that failed. From then on the node is dead: nothing is committed, no vote is answered, and
// no fsync is tried again.
type failure struct {
	once sync.Once
	ch   chan struct{}
	err  error // set before ch is closed
}

func newFailure() *failure { return &failure{ch: make(chan struct{})} }

func (f *failure) set(err error) {
	f.once.Do(func() {
		f.err = err
		close(f.ch)
	})
}

// Err is nil until ch is closed.
func (f *failure) Err() error {
	select {
	case <-f.ch:
		return f.err
	default:
		return nil
	}
}

// failStop stands between hashicorp/raft and its stores. raft answers a failed append by stepping down and, alone in its
// cluster, electing itself again on the same broken log; it answers a failed vote or read with a panic. Here the first
// failure is recorded and the raft goroutine that met it ends there, so that nothing it would do next can happen.
type failStop struct {
	logs interface {
		raft.LogStore
		raft.StableStore
	}
	failure *failure
	// commands follows what is appended and cut.
	commands *commandMark
}

var (
	_ raft.LogStore          = failStop{}
	_ raft.StableStore       = failStop{}
	_ raft.MonotonicLogStore = failStop{}
)

// must returns only if err is nil, or one that raft expects.
func (s failStop) must(what string, err error) error {
	switch {
	case s.failure.Err() != nil:
		runtime.Goexit()
	case err == nil || errors.Is(err, raft.ErrLogNotFound):
		return err
	}
	s.failure.set(fmt.Errorf("raft log: %s: %w", what, err))
	runtime.Goexit()
	return err
}

// tell is for calls whose error raft hands to a caller that waits for it: the goroutine goes on to do so.
func (s failStop) tell(what string, err error) error {
	if err != nil {
		s.failure.set(fmt.Errorf("raft log: %s: %w", what, err))
	}
	return err
}

// alive ends the goroutine that wants to write after a failure.
func (s failStop) alive() {
	if s.failure.Err() != nil {
		runtime.Goexit()
	}
}

func (s failStop) IsMonotonic() bool { return true }

func (s failStop) FirstIndex() (uint64, error) {
	i, err := s.logs.FirstIndex()
	return i, s.tell("first index", err)
}

func (s failStop) LastIndex() (uint64, error) {
	i, err := s.logs.LastIndex()
	return i, s.tell("last index", err)
}

func (s failStop) GetLog(index uint64, log *raft.Log) error {
	return s.must(fmt.Sprintf("read entry %d", index), s.logs.GetLog(index, log))
}

func (s failStop) StoreLog(log *raft.Log) error { return s.StoreLogs([]*raft.Log{log}) }

func (s failStop) StoreLogs(logs []*raft.Log) error {
	s.alive()
	err := s.must("append", s.logs.StoreLogs(logs))
	s.commands.appended(logs)
	return err
}

func (s failStop) DeleteRange(first, last uint64) error {
	if err := s.failure.Err(); err != nil {
		return err
	}
	if err := s.tell("truncate", s.logs.DeleteRange(first, last)); err != nil {
		return err
	}
	return s.tell("find the last command", s.commands.find())
}

func (s failStop) Set(key, val []byte) error {
	s.alive()
	return s.must("store "+string(key), s.logs.Set(key, val))
}

func (s failStop) Get(key []byte) ([]byte, error) {
	b, err := s.logs.Get(key)
	return b, s.must("load "+string(key), err)
}

func (s failStop) SetUint64(key []byte, val uint64) error {
	s.alive()
	return s.must("store "+string(key), s.logs.SetUint64(key, val))
}

func (s failStop) GetUint64(key []byte) (uint64, error) {
	i, err := s.logs.GetUint64(key)
	return i, s.must("load "+string(key), err)
}

// commandMark is the index of the last command in the log: raft's own indexes count entries that the state never sees.
type commandMark struct {
	logs raft.LogStore
	last atomic.Uint64
}

func (c *commandMark) appended(logs []*raft.Log) {
	for _, l := range slices.Backward(logs) {
		if l.Type == raft.LogCommand {
			c.last.Store(l.Index)
			return
		}
	}
}

// find looks it up, from the end. Where there is none the snapshot before the log has all commands: 0.
func (c *commandMark) find() error {
	first, err := c.logs.FirstIndex()
	if err != nil {
		return err
	}
	last, err := c.logs.LastIndex()
	if err != nil {
		return err
	}
	var l raft.Log
	for i := last; i >= first && i > 0; i-- {
		if err := c.logs.GetLog(i, &l); err != nil {
			return err
		}
		if l.Type == raft.LogCommand {
			c.last.Store(i)
			return nil
		}
	}
	c.last.Store(0)
	return nil
}
