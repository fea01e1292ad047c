package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"time"

	"github.com/google/uuid"

	"varve/control/pki"
	"varve/control/raft"
	"varve/control/replica"
	"varve/control/state"
	"varve/volumedriver/vfs"
)

const controlLockName = "control.lock"

// Units of an appliance that runs as two processes, so that control can be restarted, upgraded or crash while guests do I/O:
//
//	control   raft, the node port, both APIs, the console, sign-in, the task queue, schedules, events and their sinks (control.go)
//	gateway   volume driver, NBD, NFS, and the worker that runs this node's tasks, beside the data that they are about; it has a copy of
//	          control's state (package control/replica)
//
// Names, sizes and rights are read from the copy; what changes them waits for control, for twenty seconds at most. Reads and writes of
// open volumes need neither, and neither does a task while it works. While the gateway is away the API goes on: what is in the state is
// answered and changed, what only a data path knows is as it was said last or unavailable (gateway.go), and tasks wait for it.
const (
	UnitAll     = ""
	UnitGateway = "gateway"
	UnitControl = "control"
)

// controlNode is control as the rest of the process uses it: the raft node itself, or the copy.
type controlNode interface {
	Apply(ctx context.Context, cmd state.Command) (state.Result, error)
	Sync(ctx context.Context) error
	State() *state.Store
	ID() uuid.UUID
	Cluster() uuid.UUID
	IsLeader() bool
	// Err is why it cannot go on.
	Err() error
	Run(ctx context.Context) error
	Close() error
}

var (
	_ controlNode = &raft.Node{}
	_ controlNode = &follower{}
)

// follower is a copy that follows from its making to Close.
type follower struct {
	*replica.Client
	stop context.CancelFunc
	done chan struct{}
	err  error // set before done is closed
}

func follow(ctx context.Context, c *replica.Client) *follower {
	ctx, stop := context.WithCancel(context.WithoutCancel(ctx))
	f := &follower{Client: c, stop: stop, done: make(chan struct{})}
	go func() {
		defer close(f.done)
		f.err = c.Run(ctx)
	}()
	return f
}

// Err implements controlNode.
func (f *follower) Err() error {
	select {
	case <-f.done:
		return f.err
	default:
		return nil
	}
}

// Run reports the end of following, until ctx ends.
func (f *follower) Run(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-f.done:
		return f.err
	}
}

// Close ends it.
func (f *follower) Close() error {
	f.stop()
	<-f.done
	return nil
}

const controlWait = 10 * time.Second

// followControl waits for control's process and copies its state.
func (b *base) followControl(ctx context.Context) error {
	f := follow(ctx, replica.Open(ControlSocket(b.cfg.Data), b.cfg.Log))
	b.raft = f
	for {
		wait, cancel := context.WithTimeout(ctx, controlWait)
		err := f.Ready(wait)
		cancel()
		if err == nil {
			break
		}
		if failed := errors.Join(f.Err(), ctx.Err()); failed != nil {
			return failed
		}
		if joinIsReady(b.cfg.Data) { // control waits for this process to give way
			return ErrRestart
		}
		b.cfg.Log.Warn("waiting for control", "socket", ControlSocket(b.cfg.Data))
	}
	b.cfg.Log = b.cfg.Log.With("component", component(f.Cluster(), f.ID(), "appliance"))
	b.newPeers(f.ID())
	var err error
	b.tls, err = pki.Open(pki.Config{Dir: filepath.Join(b.cfg.Data, tlsName), Name: f.Cluster().String(), Hosts: pki.LocalHosts,
		Sign: func(context.Context, pki.Request) ([]byte, error) { return nil, errors.New("control renews it") }})
	return err
}

// lockControl keeps a second control unit, or an appliance in one piece, away.
func lockControl(cfg Config) (io.Closer, error) {
	lock, err := vfs.OS().Lock(filepath.Join(cfg.Data, controlLockName))
	if err != nil {
		if held(err) {
			return nil, &LockedError{cfg.Data}
		}
		return nil, fmt.Errorf("lock control: %w", err)
	}
	return lock, nil
}

// both are two locks.
type both struct{ control, data io.Closer }

func (b both) Close() error { return errors.Join(b.control.Close(), b.data.Close()) }
