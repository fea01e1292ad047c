// Package raft orders the commands of package state on disk: hashicorp/raft over a write-ahead log of its own files. A
// command is acknowledged when a majority of the voters has fsynced it and it is applied here. A cluster of one has one
// voter and needs no network; with Config.Network the same node grows into a cluster of many.
//
//	n, err := raft.Open(raft.Config{Dir: dir, Log: log})    // without a network: ready when it returns
//	n.Ready(ctx)                                             // with one: knows a leader, everything committed is applied here
//	go n.Run(ctx)                                            // error = a persist failed or the state halted: end the process
//	res, err := n.Apply(ctx, &state.CreateInode{…})          // on any node; many callers at once share one fsync
//	n.State().View() …                                       // reads, as far as this node has come
//	n.Sync(ctx)                                              // a View taken after it has everything acknowledged before it
//	n.Follow()                                               // the state and every entry after it, for a copy (control/replica)
//	n.Failed() <-chan struct{}, n.Err(), n.ID(), n.Cluster(), n.Snapshot(), n.Close()
//	members.go: Leader, IsLeader, Servers, AddNonvoter, Promote, Demote, Remove, TransferLeadership
//
// # A command on any node
//
//	encode once, with an id and the index that this node had seen
//	repeat until answered or out of time:
//	    leader here?  hand it to raft, wait until it is applied
//	    leader known? send the entry there, wait until this node has applied it too (so that callers read their writes)
//	    neither?      wait for an election
//
// The outcome of an attempt may be unknown; the id makes a repetition harmless (state's replay window).
//
// # A read that is linearizable
//
//	the leader proves that it still leads (a round of heartbeats), then names the last command in its log;
//	the node that asked waits until it has applied that one
//
// Whatever was acknowledged before the read began is in the log of whoever leads during it.
//
// # Addresses
//
// Raft's server address is the node's id. Network finds the present host and port, so a node may move.
//
// # Files
//
//	DIR/lock                 held by the process that works here
//	DIR/node.json            {format, cluster, node, phase}: who this is; phases in identity.go
//	DIR/raft/wal-meta.db …   log segments and votes (raft-wal)
//	DIR/raft/snapshots/      state.Snapshot bytes
//	DIR/raft/watermark       an index that the log is known to have reached
//
// # Forming a cluster of one, each step repeatable after a crash
//
//	choose ids, write node.json phase forming -> bootstrap raft -> commit InitCluster -> write node.json phase member
//
// A node that joins has its ids from the cluster (WriteJoining), bootstraps nothing and becomes a member when the leader has
// sent it the cluster's record.
//
// # What Open refuses (ErrIdentity), because going on would forget votes or committed state
//
// A member whose raft directory is empty or lost its metadata; raft files without node.json; a log that ends before its
// watermark or starts after the last intact snapshot; a state of another cluster than node.json's; an unknown format; a node
// that was removed from its cluster.
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
	"reflect"
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
	electionTimeout        = time.Second
	aloneTimeout           = 50 * time.Millisecond // without a network an election only waits for this node's own disk
	commitTimeouts         = 50                    // in an election timeout: how long a follower may lag when nothing follows
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
	// Network connects the nodes; nil is a cluster of one for ever.
	Network Network
	// ElectionTimeout is after what silence of the leader a node asks for votes; 0 is a second.
	ElectionTimeout time.Duration

	// faults, for tests: the files of the log, and the log as raft sees it.
	vfs  types.VFS
	wrap func(logStore) logStore
}

type logStore interface {
	raft.LogStore
	raft.StableStore
}

// Node is this process's part of the cluster.
type Node struct {
	cfg       Config
	dir       string
	id        identity
	store     *state.Store
	fsm       *fsm
	commands  *commandMark
	lock      *os.File
	meta      metadb.BoltMetaDB // of log, which does not close it
	log       *wal.WAL
	raft      *raft.Raft
	transport transport
	kick      chan raft.RPC
	failure   *failure

	// waiting counts goroutines that wait for raft: one per Apply and the one that shuts raft down after a failure.
	waiting sync.WaitGroup
	closing chan struct{}
	down    chan struct{} // closed when raft is down and answers no more
	close   sync.Once
	closed  error

	stopping sync.Once
	stopped  raft.Future
}

// Open starts the node. Without a network it returns when everything committed is applied; with one, see Ready.
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
	if cfg.ElectionTimeout == 0 {
		cfg.ElectionTimeout = electionTimeout
		if cfg.Network == nil {
			cfg.ElectionTimeout = aloneTimeout
		}
	}
	n := &Node{cfg: cfg, dir: filepath.Join(cfg.Dir, "raft"), store: state.New(), failure: newFailure(), closing: make(chan struct{}),
		down: make(chan struct{}), kick: make(chan raft.RPC)}
	n.fsm = newFSM(n.store, n.failure, cfg.Log)
	err := n.open()
	if err == nil && cfg.Network == nil {
		ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
		defer cancel()
		err = n.Ready(ctx)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open control state in %s: %w", cfg.Dir, err), n.Close())
	}
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
	n.fsm.restored()
	var logs logStore = n.log
	if n.cfg.wrap != nil {
		logs = n.cfg.wrap(logs)
	}
	n.commands = &commandMark{logs: logs}
	if err := n.commands.find(); err != nil {
		return fmt.Errorf("read raft log: %w", err)
	}
	if n.transport, err = n.connect(logger); err != nil {
		return err
	}
	conf := n.raftConfig()
	conf.Logger = logger
	if err := n.bootstrap(conf, logs, snaps, n.transport); err != nil {
		return err
	}
	if err := n.startRaft(conf, failStop{logs: logs, failure: n.failure, commands: n.commands}, snaps, n.transport); err != nil {
		return err
	}
	return n.hurry()
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
	log, err := wal.Open(n.dir, wal.WithLogger(logger), wal.WithSegmentSize(segmentBytes), wal.WithMetaStore(newSealing(&n.meta, n.dir)),
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

func (n *Node) raftConfig() *raft.Config {
	c := raft.DefaultConfig()
	c.ShutdownOnRemove = false // stop does it
	c.LocalID = raft.ServerID(n.id.Node.String())
	c.HeartbeatTimeout, c.ElectionTimeout = n.cfg.ElectionTimeout, n.cfg.ElectionTimeout
	c.LeaderLeaseTimeout = max(n.cfg.ElectionTimeout/2, aloneTimeout)
	c.CommitTimeout = max(n.cfg.ElectionTimeout/commitTimeouts, time.Millisecond)
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
	last, err := logs.LastIndex()
	if err != nil {
		return fmt.Errorf("look for raft state: %w", err)
	}
	list, err := snaps.List()
	if err != nil {
		return fmt.Errorf("list raft snapshots: %w", err)
	}
	empty := last == 0 && len(list) == 0
	if n.id.Phase == joining || has && !(empty && n.id.Phase == forming) {
		return nil
	}
	if n.id.Phase == member {
		return fmt.Errorf("%w: node %s was a member but %s holds no state; restore it from a backup, or start in an empty data "+
			"directory as a new node", ErrIdentity, n.id.Node, n.dir)
	}
	// As raft.BootstrapCluster, which cannot be repeated when it got no further than the term: alone and with an empty log
	// this node can have voted for nobody else.
	voters := raft.Configuration{Servers: []raft.Server{{ID: conf.LocalID, Address: t.LocalAddr()}}}
	if err := logs.SetUint64([]byte("CurrentTerm"), 1); err != nil {
		return fmt.Errorf("bootstrap raft: %w", err)
	}
	entry := &raft.Log{Index: 1, Term: 1, Type: raft.LogConfiguration, Data: raft.EncodeConfiguration(voters)}
	if err := logs.StoreLog(entry); err != nil {
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
		r, err := raft.NewRaft(conf, n.fsm, logs, logs, snaps, t)
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
			n.stop() // so that every future ends
		case <-n.closing:
		}
	})
	return nil
}

// Ready returns when this node has applied everything that was committed before, and checks or makes the cluster's record. It
// may be called again after an error. With several voters it waits for a majority of them.
func (n *Node) Ready(ctx context.Context) error {
	if n.id.Phase == forming {
		if _, err := n.Apply(ctx, &state.InitCluster{ID: n.id.Cluster, Format: state.Format}); err != nil {
			return fmt.Errorf("make the cluster record: %w", err)
		}
	}
	if err := n.Sync(ctx); err != nil {
		return err
	}
	c, ok := n.store.View().Cluster()
	switch {
	case !ok:
		return fmt.Errorf("%w: node %s was a member but its state has no cluster record", ErrIdentity, n.id.Node)
	case c.ID != n.id.Cluster:
		return fmt.Errorf("%w: its state is of cluster %s but %s says %s; put the files of one node together", ErrIdentity,
			c.ID, identityFile, n.id.Cluster)
	}
	if n.id.Phase != member {
		n.id.Phase = member
		if err := n.id.save(n.cfg.Dir); err != nil {
			return err
		}
	}
	n.cfg.Log.Info("control state is ready", "node", n.id.Node, "cluster", n.id.Cluster, "index", n.store.Index())
	return nil
}

// wait hands something over to raft, and ends with its future, the context or the node's failure, whichever is first. Raft takes things over
// in its own time: while its disk hangs it takes none, and some of its methods know no end of waiting for that but that raft goes down.
func (n *Node) wait(ctx context.Context, submit func() raft.Future) error {
	done := make(chan error, 1)
	n.waiting.Go(func() {
		f := submit()
		endWith(f, n.down)
		done <- f.Error()
	})
	select {
	case err := <-done:
		if failed := n.failure.Err(); failed != nil {
			return fmt.Errorf("%w: %w", ErrUnavailable, failed)
		}
		if errors.Is(err, raft.ErrNotLeader) {
			return &NotLeaderError{Leader: n.Leader()}
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

// endWith has a future end when raft is down. Raft answers some of those that it had taken when it went down, and never others:
// it gives only a few of them the channel that ends them, in a field of a type that it does not export.
func endWith(f raft.Future, down chan struct{}) bool {
	v := reflect.ValueOf(f)
	if v.Kind() != reflect.Pointer || v.Elem().Kind() != reflect.Struct {
		return false // an error, known already
	}
	field := v.Elem().FieldByName("ShutdownCh")
	if !field.IsValid() || !field.CanSet() || field.Type() != reflect.TypeOf(down) {
		return false
	}
	field.Set(reflect.ValueOf(down))
	return true
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
	err := n.wait(ctx, func() raft.Future { return n.raft.Snapshot() })
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

// stop has raft go down. Only the first of its futures waits until all of raft's goroutines have left the files, so all use that.
func (n *Node) stop() raft.Future {
	n.stopping.Do(func() { n.stopped = n.raft.Shutdown() })
	return n.stopped
}

func (n *Node) shutdown() error {
	close(n.closing)
	var errs []error
	if n.raft != nil {
		if err := n.stop().Error(); err != nil {
			errs = append(errs, fmt.Errorf("stop raft: %w", err))
		}
		close(n.down)
		n.fsm.unfollow()
		if index := n.raft.AppliedIndex(); n.failure.Err() == nil {
			errs = append(errs, saveWatermark(n.dir, index))
		}
	}
	if n.transport != nil {
		if err := n.transport.Close(); err != nil {
			errs = append(errs, fmt.Errorf("close raft transport: %w", err))
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
