package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"varve/control/api"
	"varve/control/peer"
)

// Where control and gateway are two processes, control has the node port and the gateway what other nodes ask for. Two sockets between
// them carry connections as they are:
//
//	DATA/peer.sock   of the gateway: control passes on what other nodes open, and opens its own
//	DATA/dial.sock   of control: | node 16 | -> | 0 |, then the connection to that node; or | 1 | and the end: it cannot be reached
const (
	peerSocketName = "peer.sock"
	dialSocketName = "dial.sock"
	dialTimeout    = 5 * time.Second
)

// newPeers makes what carries calls between nodes.
func (b *base) newPeers(self uuid.UUID) {
	conf := peer.Config{Self: self, Log: b.cfg.Log}
	if b.cfg.Unit == UnitGateway {
		conf.Dial = b.dialThroughControl
	} else {
		conf.DialSelf = b.cfg.Unit == UnitControl
		conf.Dial = func(ctx context.Context, node uuid.UUID) (net.Conn, error) {
			if node == self {
				return b.dialGateway(ctx)
			}
			if b.network == nil {
				return nil, errors.New("this node has no node port")
			}
			return b.network.Dial(ctx, node, peer.Protocol)
		}
	}
	b.peers = peer.New(conf)
}

// acceptPeer takes a connection that another node has opened.
func (b *base) acceptPeer(ctx context.Context, conn net.Conn, _ uuid.UUID) {
	if b.cfg.Unit != UnitControl {
		b.peers.Accept(ctx, conn)
		return
	}
	defer conn.Close()
	inner, err := b.dialGateway(ctx)
	if err != nil {
		b.cfg.Log.Debug("another node's call has nobody to answer it: the gateway is away", "err", err)
		return
	}
	splice(ctx, conn, inner)
}

// dialGateway connects to the gateway of this node as other nodes do.
func (b *base) dialGateway(ctx context.Context) (net.Conn, error) {
	d := net.Dialer{Timeout: dialTimeout}
	return d.DialContext(ctx, "unix", filepath.Join(b.cfg.Data, peerSocketName))
}

// splice carries bytes between two connections until one of them ends, or ctx does.
func splice(ctx context.Context, a, b net.Conn) {
	closed := sync.OnceFunc(func() {
		a.Close()
		b.Close()
	})
	defer closed()
	defer context.AfterFunc(ctx, closed)()
	var g sync.WaitGroup
	for _, way := range [][2]net.Conn{{a, b}, {b, a}} {
		g.Go(func() {
			defer closed()
			_, _ = io.Copy(way[0], way[1]) // its end is what both ends see
		})
	}
	g.Wait()
}

func (b *base) dialThroughControl(ctx context.Context, node uuid.UUID) (net.Conn, error) {
	d := net.Dialer{Timeout: dialTimeout}
	conn, err := d.DialContext(ctx, "unix", filepath.Join(b.cfg.Data, dialSocketName))
	if err != nil {
		return nil, fmt.Errorf("reach control: %w", err)
	}
	answer := make([]byte, 1)
	err = conn.SetDeadline(time.Now().Add(dialTimeout))
	if err == nil {
		_, err = conn.Write(node[:])
	}
	if err == nil {
		_, err = io.ReadFull(conn, answer)
	}
	if err == nil && answer[0] != 0 {
		err = fmt.Errorf("node %s cannot be reached", node)
	}
	if err == nil {
		err = conn.SetDeadline(time.Time{})
	}
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

// each accepts connections until ctx ends and waits for what do does with them.
func each(ctx context.Context, ln net.Listener, do func(ctx context.Context, c net.Conn)) error {
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	var g sync.WaitGroup
	defer g.Wait()
	for {
		c, err := ln.Accept()
		if ctx.Err() != nil {
			if err == nil {
				c.Close()
			}
			return nil
		}
		if errors.Is(err, net.ErrClosed) {
			return fmt.Errorf("accept on %s: %w", ln.Addr(), err)
		}
		if err != nil {
			time.Sleep(50 * time.Millisecond) // out of descriptors
			continue
		}
		g.Go(func() { do(ctx, c) })
	}
}

// runDial serves DATA/dial.sock, in the control unit.
func (b *base) runDial(ctx context.Context) error {
	ln, err := api.ListenUnix(filepath.Join(b.cfg.Data, dialSocketName))
	if err != nil {
		return err
	}
	defer ln.Close()
	return each(ctx, ln, func(ctx context.Context, c net.Conn) {
		defer c.Close()
		var node uuid.UUID
		if c.SetDeadline(time.Now().Add(dialTimeout)) != nil {
			return
		}
		if _, err := io.ReadFull(c, node[:]); err != nil {
			return
		}
		if b.network == nil {
			_, _ = c.Write([]byte{1}) // the end follows either way
			return
		}
		out, err := b.network.Dial(ctx, node, peer.Protocol)
		if err != nil {
			b.cfg.Log.Debug("a node cannot be reached", "peer", node, "err", err)
			_, _ = c.Write([]byte{1}) // the end follows either way
			return
		}
		if _, err := c.Write([]byte{0}); err != nil || c.SetDeadline(time.Time{}) != nil {
			out.Close()
			return
		}
		splice(ctx, c, out)
	})
}

// runPeers answers other nodes' calls until ctx ends.
func (b *base) runPeers(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return b.peers.Run(ctx) })
	g.Go(func() error { return b.properties.Run(ctx) })
	g.Go(func() error { return b.followSecrets(ctx) })
	if b.cfg.Unit == UnitGateway {
		ln, err := api.ListenUnix(filepath.Join(b.cfg.Data, peerSocketName))
		if err != nil {
			return err
		}
		g.Go(func() error {
			defer ln.Close()
			return each(ctx, ln, b.peers.Accept)
		})
	}
	return g.Wait()
}

// others are the nodes that are expected to answer, besides this one.
func (b *base) others() []uuid.UUID {
	var out []uuid.UUID
	for _, n := range b.raft.State().View().Nodes() {
		if n.ID != b.raft.ID() && !n.Offline {
			out = append(out, n.ID)
		}
	}
	return out
}

const (
	callSecrets    = "secrets/keys"
	callAddSecrets = "secrets/add"
	secretsEvery   = 2 * time.Second
	keysBytesMax   = 64 << 10
)

// shareSecrets lets nodes give each other the keys of sealed secrets. Between the units of a node the gateway is asked as other nodes' are:
// both use the one file, which holds what either of them got.
func (b *base) shareSecrets() {
	if b.cfg.Unit != UnitControl {
		b.answerSecrets()
	}
	b.secrets.Share(func(ctx context.Context, bundle []byte) error {
		for _, n := range b.raft.State().View().Nodes() { // those that are marked offline too: they come back
			if n.ID == b.raft.ID() && b.cfg.Unit != UnitControl {
				continue
			}
			if err := b.peers.Call(ctx, n.ID, callAddSecrets, bundle, nil); err != nil {
				return fmt.Errorf("give the key to node %s: %w", n.Name, err)
			}
		}
		return nil
	})
}

func (b *base) answerSecrets() {
	b.peers.Handle(callSecrets, 16, func(context.Context, []byte) (any, error) { return b.secrets.Bundle() })
	b.peers.Handle(callAddSecrets, 2*keysBytesMax, func(_ context.Context, body []byte) (any, error) {
		var bundle []byte
		if err := json.Unmarshal(body, &bundle); err != nil {
			return nil, errors.New("that is no bundle of keys") // its error may quote parts of it
		}
		return struct{}{}, b.secrets.Add(bundle)
	})
}

// followSecrets fetches keys that this node lacks, until ctx ends.
func (b *base) followSecrets(ctx context.Context) error {
	tick := time.NewTicker(secretsEvery)
	defer tick.Stop()
	for {
		if b.secrets.Missing() {
			ask := b.others()
			if b.cfg.Unit == UnitControl {
				ask = append(ask, b.raft.ID())
			}
			for _, a := range peer.Each[[]byte](ctx, b.peers, ask, callSecrets, nil) {
				if a.Err != nil || !b.secrets.Missing() {
					continue
				}
				if err := b.secrets.Add(a.Value); err != nil {
					b.cfg.Log.Warn("keys of sealed secrets could not be kept", "from", a.Node, "err", err)
				}
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
