package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"varve/control/node"
	"varve/control/pki"
	"varve/control/raft"
	"varve/control/replica"
	"varve/control/state"
	"varve/volumedriver/vfs"
)

const controlLockName = "control.lock"

// Units of an appliance that runs as two processes, so that control can be restarted, upgraded or crash while guests do I/O:
//
//	control   raft, the node port, the control socket
//	gateway   everything else: volume driver, NBD, NFS, API, tasks; it has a copy of control's state (package control/replica)
//
// Names, sizes and rights are read from the copy; what changes them waits for control, for twenty seconds at most. Reads and
// writes of open volumes need neither.
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

// followControl waits for control's process and copies its state.
func (b *base) followControl(ctx context.Context) error {
	f := follow(ctx, replica.Open(ControlSocket(b.cfg.Data), b.cfg.Log))
	b.raft = f
	for {
		wait, cancel := context.WithTimeout(ctx, 10*time.Second)
		err := f.Ready(wait)
		cancel()
		if err == nil {
			break
		}
		if failed := errors.Join(f.Err(), ctx.Err()); failed != nil {
			return failed
		}
		b.cfg.Log.Warn("waiting for control", "socket", ControlSocket(b.cfg.Data))
	}
	b.cfg.Log = b.cfg.Log.With("component", component(f.Cluster(), f.ID(), "appliance"))
	b.newPeers(f.ID())
	var err error
	b.tls, err = pki.Open(pki.Config{Dir: filepath.Join(b.cfg.Data, tlsName), Name: f.Cluster().String(), Hosts: pki.LocalHosts(),
		Sign: func(context.Context, pki.Request) ([]byte, error) { return nil, errors.New("control renews it") }})
	return err
}

// Control runs the control unit until ctx ends. ready is called when it has caught up with the cluster.
func Control(ctx context.Context, cfg Config, ready func()) error {
	cfg.Unit = UnitControl
	cfg, err := cfg.withDefaults()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(cfg.Data, 0o700); err != nil {
		return fmt.Errorf("make data directory: %w", err)
	}
	if err := checkLevel(cfg.Data); err != nil {
		return err
	}
	lock, err := lockControl(cfg)
	if err != nil {
		return err
	}
	doors, err := openListeners(cfg)
	if err != nil {
		return errors.Join(err, lock.Close())
	}
	b := &base{cfg: cfg, doors: doors, lock: lock}
	if err := b.openControl(ctx); err != nil {
		return errors.Join(err, b.close())
	}
	b.nodes = node.New(b.raft, b.raft.State(), b.raft.ID())
	g, run := errgroup.WithContext(ctx)
	g.Go(func() error { return named("control", b.raft.Run(run)) })
	g.Go(func() error { return named("node port", b.runNetwork(run)) })
	g.Go(func() error { return named("control socket", b.controlServer().Serve(run, doors.control)) })
	g.Go(func() error { return b.keepPeer(run) })
	g.Go(func() error { return named("calls of other nodes", b.runDial(run)) })
	g.Go(func() error { return watchdog(run, cfg.Log, func(context.Context) error { return b.raft.Err() }) })
	tell(cfg.Log, daemon.SdNotifyReady)
	ready()
	err = g.Wait()
	tell(cfg.Log, daemon.SdNotifyStopping)
	return errors.Join(err, b.close())
}

// keepPeer records where the node port is, once the gateway has registered the node.
func (b *base) keepPeer(ctx context.Context) error {
	if len(b.doors.node) == 0 {
		return nil
	}
	address := reachable(first(b.doors.node), hostAddress())
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		self, err := b.nodes.Self()
		if err == nil && self.Peer != address {
			spec := self.NodeSpec
			spec.Peer = address
			if err := b.nodes.Register(ctx, spec); err != nil && ctx.Err() == nil {
				b.cfg.Log.Warn("the node port's address could not be recorded, it is tried again", "err", err)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// peer is the node port's address for this node's record: the gateway leaves it as it is.
func (b *base) peer(address string) string {
	if b.cfg.Unit != UnitGateway {
		return address
	}
	if self, err := b.nodes.Self(); err == nil {
		return self.Peer
	}
	return ""
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
