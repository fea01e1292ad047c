// Package raft orders the commands of package state on disk: hashicorp/raft over a write-ahead log of its own files. A
// command is acknowledged when it is fsynced in the log and applied. On one node there is one voter and no listening
// port; the shape (entries, snapshots, identity) is that of a cluster of three.
//
//	n, err := raft.Open(raft.Config{Dir: dir, Log: log})    // ready: leads, everything committed is applied
//	go n.Run(ctx)                                            // error = a persist failed or the state halted: end the process
//	res, err := n.Apply(ctx, &state.CreateInode{…})          // many callers at once share one fsync
//	n.State().View() …                                       // reads
//	n.Failed() <-chan struct{}, n.Err(), n.ID(), n.Cluster(), n.Snapshot(), n.Close()
//
// # Files
//
//	DIR/lock                 held by the process that works here
//	DIR/node.json            {format, cluster, node, phase}: who this is
//	DIR/raft/wal-meta.db …   log segments and votes (raft-wal)
//	DIR/raft/snapshots/      state.Snapshot bytes
//	DIR/raft/watermark       an index that the log is known to have reached
//
// # Forming a cluster of one, each step repeatable after a crash
//
//	choose ids, write node.json phase forming -> bootstrap raft -> commit InitCluster -> write node.json phase member
//
// # What Open refuses (ErrIdentity), because going on would forget votes or committed state
//
// A member whose raft directory is empty or lost its metadata; raft files without node.json; a log that ends before its
// watermark or starts after the last intact snapshot; a state of another cluster than node.json's; an unknown format.
//
// # Failure
//
// A failed append, vote, truncation or read of the log ends the node at once (see failStop): Failed is closed, Apply
// returns ErrUnavailable, and the outcome of what was in flight is unknown until the restart. An entry that cannot be
// applied halts the state, with the same end.
package raft

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/raft"
	wal "github.com/hashicorp/raft-wal"
	walfs "github.com/hashicorp/raft-wal/fs"
	"github.com/hashicorp/raft-wal/metadb"
	"github.com/hashicorp/raft-wal/segment"
	"github.com/hashicorp/raft-wal/types"
	"golang.org/x/sys/unix"

	"varve/control/durable"
	"varve/control/state"
)

// ErrUnavailable: the command could not be committed now. Unless the caller's context ended before, its outcome is
// unknown.
var ErrUnavailable = errors.New("control is unavailable")

// ErrIdentity: the data directory is not what this node left.
var ErrIdentity = errors.New("data directory does not fit")

// Defaults and bounds.
const (
	snapshotEntriesDefault = 65536
	trailingEntries        = 8192
	segmentBytes           = 16 << 20
	batchEntriesMax        = 512
	snapshotsKept          = 2
	electionTimeout        = 50 * time.Millisecond
	startTimeout           = 60 * time.Second
	applySlow              = 2 * time.Second
	watermarkEvery         = 5 * time.Second
	lockTries              = 10
	lockPause              = 50 * time.Millisecond
)

// Config of a node. Dir is required; it is made if it is missing.
type Config struct {
	Dir string
	Log *slog.Logger
	Now func() time.Time
	// SnapshotEntries is after how many entries a snapshot is taken; 0 is 65536.
	SnapshotEntries uint64

	// faults, for tests: the files of the log, and the log as raft sees it.
	vfs  types.VFS
	wrap func(logStore) logStore
}

type logStore interface {
	raft.LogStore
	raft.StableStore
}

// Node is the one voter.
type Node struct {
	cfg     Config
	dir     string
	id      identity
	store   *state.Store
	lock    *os.File
	meta    metadb.BoltMetaDB // of log, which does not close it
	log     *wal.WAL
	raft    *raft.Raft
	failure *failure

	// waiting counts goroutines that wait for raft: one per Apply and the one that shuts raft down after a failure.
	waiting sync.WaitGroup
	closing chan struct{}
	close   sync.Once
	closed  error
}

// Open starts the node and returns when everything committed is applied.
func Open(cfg Config) (*Node, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.SnapshotEntries == 0 {
		cfg.SnapshotEntries = snapshotEntriesDefault
	}
	n := &Node{cfg: cfg, dir: filepath.Join(cfg.Dir, "raft"), store: state.New(), failure: newFailure(), closing: make(chan struct{})}
	if err := n.open(); err != nil {
		return nil, errors.Join(fmt.Errorf("open control state in %s: %w", cfg.Dir, err), n.Close())
	}
	cfg.Log.Info("control state is ready", "node", n.id.Node, "cluster", n.id.Cluster, "index", n.store.Index())
	return n, nil
}

func (n *Node) open() error {
	if err := durable.MakeDir(n.cfg.Dir); err != nil {
		return err
	}
	if err := n.lockDir(); err != nil {
		return err
	}
	id, err := loadIdentity(n.cfg.Dir)
	if err != nil {
		return err
	}
	n.id = id
	if err := durable.MakeDir(n.dir); err != nil {
		return err
	}
	if err := id.checkRaftDir(n.dir); err != nil {
		return err
	}
	logger := newLogger(n.cfg.Log)
	if n.log, err = n.openLog(); err != nil {
		return err
	}
	files, err := raft.NewFileSnapshotStoreWithLogger(n.dir, snapshotsKept, logger)
	if err != nil {
		return fmt.Errorf("open raft snapshots: %w", err)
	}
	snaps, from, err := newestIntact(files, n.log, n.store)
	if err != nil {
		return err
	}
	if err := n.checkLog(from); err != nil {
		return err
	}
	var logs logStore = n.log
	if n.cfg.wrap != nil {
		logs = n.cfg.wrap(logs)
	}
	_, transport := raft.NewInmemTransport(raft.ServerAddress(id.Node.String()))
	conf := n.raftConfig()
	conf.Logger = logger
	if err := n.bootstrap(conf, logs, snaps, transport); err != nil {
		return err
	}
	if err := n.startRaft(conf, failStop{logs: logs, failure: n.failure}, snaps, transport); err != nil {
		return err
	}
	return n.join()
}

// lockDir makes sure that one process works in the directory. The kernel drops the lock when the process ends.
func (n *Node) lockDir() error {
	f, err := os.OpenFile(filepath.Join(n.cfg.Dir, lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("lock control directory: %w", err)
	}
	n.lock = f
	// A process that was just killed may live on for a moment in a child between its fork and its exec.
	for range lockTries {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == nil {
			return nil
		}
		time.Sleep(lockPause)
	}
	return fmt.Errorf("%w: another process works in %s: %w", ErrUnavailable, n.cfg.Dir, err)
}

// unlock says so to the kernel, because closing alone would leave the lock to a child between its fork and its exec.
func (n *Node) unlock() error {
	if n.lock == nil {
		return nil
	}
	if err := errors.Join(unix.Flock(int(n.lock.Fd()), unix.LOCK_UN), n.lock.Close()); err != nil {
		return fmt.Errorf("unlock control directory: %w", err)
	}
	return nil
}

func (n *Node) openLog() (*wal.WAL, error) {
	logger := newLogger(n.cfg.Log)
	vfs := n.cfg.vfs
	if vfs == nil {
		vfs = walfs.New()
	}
	log, err := wal.Open(n.dir, wal.WithLogger(logger), wal.WithSegmentSize(segmentBytes), wal.WithMetaStore(&n.meta),
		wal.WithSegmentFiler(segment.NewFiler(n.dir, vfs)))
	if err != nil {
		return nil, fmt.Errorf("open raft log: %w", err)
	}
	return log, nil
}

// checkLog refuses a log that ends before what is known to have been in it.
func (n *Node) checkLog(snapshotIndex uint64) error {
	mark, err := loadWatermark(n.dir)
	if err != nil {
		return err
	}
	last, err := n.log.LastIndex()
	if err != nil {
		return fmt.Errorf("read raft log: %w", err)
	}
	if reached := max(last, snapshotIndex); reached < mark {
		return fmt.Errorf("%w: the raft log ends at entry %d but had reached %d: committed changes are lost; "+
			"check the disk and restore %s from a backup, or start in an empty data directory and rebuild the vpools "+
			"from their backends", ErrIdentity, reached, mark, n.dir)
	}
	return nil
}

// raftConfig has short time-outs: with one voter an election only waits for this node's own disk.
func (n *Node) raftConfig() *raft.Config {
	c := raft.DefaultConfig()
	c.LocalID = raft.ServerID(n.id.Node.String())
	c.HeartbeatTimeout, c.ElectionTimeout, c.LeaderLeaseTimeout = electionTimeout, electionTimeout, electionTimeout
	// Callers that wait to hand over a command are collected into one append. A buffered channel would let a command in
	// that nobody answers when raft stops.
	c.BatchApplyCh, c.MaxAppendEntries = false, batchEntriesMax
	c.SnapshotThreshold, c.TrailingLogs = n.cfg.SnapshotEntries, min(trailingEntries, n.cfg.SnapshotEntries)
	c.SnapshotInterval = 30 * time.Second
	c.NoSnapshotRestoreOnStart = true // newestIntact has done it
	c.NoLegacyTelemetry = true
	return c
}

func (n *Node) bootstrap(conf *raft.Config, logs logStore, snaps raft.SnapshotStore, t raft.Transport) error {
	has, err := raft.HasExistingState(logs, logs, snaps)
	if err != nil {
		return fmt.Errorf("look for raft state: %w", err)
	}
	if has {
		return nil
	}
	if n.id.Phase == member {
		return fmt.Errorf("%w: node %s was a member but %s holds no state; restore it from a backup, or start in an empty data "+
			"directory as a new node", ErrIdentity, n.id.Node, n.dir)
	}
	voters := raft.Configuration{Servers: []raft.Server{{ID: conf.LocalID, Address: t.LocalAddr()}}}
	if err := raft.BootstrapCluster(conf, logs, logs, snaps, t, voters); err != nil {
		return fmt.Errorf("bootstrap raft: %w", err)
	}
	return nil
}

// startRaft runs NewRaft in a goroutine of its own, since failStop ends the goroutine that meets a failure.
func (n *Node) startRaft(conf *raft.Config, logs failStop, snaps raft.SnapshotStore, t raft.Transport) error {
	type started struct {
		raft *raft.Raft
		err  error
	}
	ch := make(chan started, 1)
	n.waiting.Go(func() {
		r, err := raft.NewRaft(conf, &fsm{store: n.store, failure: n.failure}, logs, logs, snaps, t)
		ch <- started{r, err}
	})
	select {
	case s := <-ch:
		if s.err != nil {
			return fmt.Errorf("start raft: %w", s.err)
		}
		n.raft = s.raft
	case <-n.failure.ch:
		return n.failure.Err()
	}
	n.waiting.Go(func() {
		select {
		case <-n.failure.ch:
			n.cfg.Log.Error("control state failed, the process must end", "node", n.id.Node, "err", n.failure.Err())
			n.raft.Shutdown() // so that every future ends
		case <-n.closing:
		}
	})
	return nil
}

// join waits until this node leads and has applied everything, and checks or makes the cluster's record.
func (n *Node) join() error {
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	if err := n.lead(ctx); err != nil {
		return err
	}
	c, ok := n.store.View().Cluster()
	if ok && c.ID != n.id.Cluster {
		return fmt.Errorf("%w: its state is of cluster %s but %s says %s; put the files of one node together", ErrIdentity,
			c.ID, identityFile, n.id.Cluster)
	}
	if ok && n.id.Phase == member {
		return nil
	}
	if !ok && n.id.Phase == member {
		return fmt.Errorf("%w: node %s was a member but its state has no cluster record", ErrIdentity, n.id.Node)
	}
	if _, err := n.Apply(ctx, &state.InitCluster{ID: n.id.Cluster, Format: state.Format}); err != nil {
		return fmt.Errorf("make the cluster record: %w", err)
	}
	n.id.Phase = member
	return n.id.save(n.cfg.Dir)
}

func (n *Node) lead(ctx context.Context) error {
	watch := n.raft.LeaderCh()
	tick := time.NewTicker(electionTimeout)
	defer tick.Stop()
	for n.raft.State() != raft.Leader {
		select {
		case <-watch:
		case <-tick.C:
		case <-n.failure.ch:
			return n.failure.Err()
		case <-ctx.Done():
			return fmt.Errorf("%w: no leader: %w", ErrUnavailable, ctx.Err())
		}
	}
	return n.wait(ctx, n.raft.Barrier(startTimeout))
}

// wait ends with the future, the context or the node's failure, whichever is first.
func (n *Node) wait(ctx context.Context, f raft.Future) error {
	done := make(chan error, 1)
	n.waiting.Go(func() { done <- f.Error() })
	select {
	case err := <-done:
		if failed := n.failure.Err(); failed != nil {
			return fmt.Errorf("%w: %w", ErrUnavailable, failed)
		}
		if err != nil {
			return fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
		return nil
	case <-n.failure.ch:
		return fmt.Errorf("%w: %w", ErrUnavailable, n.failure.Err())
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", ErrUnavailable, ctx.Err())
	}
}

// Apply commits a command and returns what it did: nil error means it is durable and applied. Errors are the command's
// own (*state.Error: nothing was changed) or ErrUnavailable.
func (n *Node) Apply(ctx context.Context, cmd state.Command) (state.Result, error) {
	return n.ApplyAs(ctx, uuid.New(), cmd)
}

// ApplyAs is Apply with the caller's command id: proposing the same id again, after an unknown outcome, does the command
// once (within state.ReplayWindow commands).
func (n *Node) ApplyAs(ctx context.Context, id uuid.UUID, cmd state.Command) (state.Result, error) {
	if err := ctx.Err(); err != nil {
		return state.Result{}, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	start := n.cfg.Now()
	entry, err := state.Encode(cmd, id, state.Time(start.UnixNano()))
	if err != nil {
		return state.Result{}, err
	}
	f := n.raft.Apply(entry, startTimeout)
	if err := n.wait(ctx, f); err != nil {
		return state.Result{}, err
	}
	if took := n.cfg.Now().Sub(start); took > applySlow {
		n.cfg.Log.Warn("committing took long, the disk of the control state is slow", "took", took)
	}
	a := f.Response().(applied)
	if errors.Is(a.err, state.ErrHalted) {
		return state.Result{}, fmt.Errorf("%w: %w", ErrUnavailable, a.err)
	}
	return a.res, a.err
}

// State is what reads are made from.
func (n *Node) State() *state.Store { return n.store }

// ID is this node's.
func (n *Node) ID() uuid.UUID { return n.id.Node }

// Cluster is the cluster's id.
func (n *Node) Cluster() uuid.UUID { return n.id.Cluster }

// Failed is closed when the node can commit nothing any more.
func (n *Node) Failed() <-chan struct{} { return n.failure.ch }

// Err says why the node failed, or nil.
func (n *Node) Err() error { return n.failure.Err() }

// Snapshot writes a snapshot now and trims the log.
func (n *Node) Snapshot(ctx context.Context) error {
	err := n.wait(ctx, n.raft.Snapshot())
	if errors.Is(err, raft.ErrNothingNewToSnapshot) {
		return nil
	}
	return err
}

// Run keeps the watermark and returns nil when ctx ends, or the failure that means the process must end.
func (n *Node) Run(ctx context.Context) error {
	tick := time.NewTicker(watermarkEvery)
	defer tick.Stop()
	var last uint64
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-n.failure.ch:
			return n.failure.Err()
		case <-tick.C:
			if index := n.raft.AppliedIndex(); index > last {
				if err := saveWatermark(n.dir, index); err != nil {
					return fmt.Errorf("keep the raft watermark: %w", err)
				}
				last = index
			}
		}
	}
}

// Close stops raft and closes its files. Whatever was acknowledged is durable already. It may be called again.
func (n *Node) Close() error {
	n.close.Do(func() { n.closed = n.shutdown() })
	return n.closed
}

func (n *Node) shutdown() error {
	close(n.closing)
	var errs []error
	if n.raft != nil {
		if err := n.raft.Shutdown().Error(); err != nil {
			errs = append(errs, fmt.Errorf("stop raft: %w", err))
		}
		if index := n.raft.AppliedIndex(); n.failure.Err() == nil {
			errs = append(errs, saveWatermark(n.dir, index))
		}
	}
	n.waiting.Wait()
	if n.log != nil {
		if err := n.log.Close(); err != nil {
			errs = append(errs, fmt.Errorf("close raft log: %w", err))
		}
	}
	if err := n.meta.Close(); err != nil {
		errs = append(errs, fmt.Errorf("close raft log metadata: %w", err))
	}
	return errors.Join(append(errs, n.unlock())...)
}
