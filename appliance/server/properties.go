package server

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"varve/appliance/exports"
	v1 "varve/control/api/customer"
	"varve/control/properties"
	"varve/control/vpool"
)

// What only one node knows and others show, by package properties: a node that is slow or gone costs a list nothing, and what it said last is
// shown with its time.
//
//	volume    NODE/VOLUME   exports.RemoteInfo    all of a node's by one call
//	backend   NODE/VPOOL    v1.Backend            the same
//	disks, health, updates  NODE                  what the call of that name answers
//
// What this node itself knows it asks itself, anew each time. The control unit asks its own gateway as it asks others where many objects are
// concerned.
const (
	propertyBackend = "backend"
	backendTTL      = 2 * time.Second
)

// asked are the calls whose answers are properties of nodes.
var asked = map[string]time.Duration{callDisks: 10 * time.Second, callHealth: time.Second, callUpdateHeld: time.Second}

// MemcachedKey is the config key with the memcached servers of the property cache, "host:port host:port"; it counts from the
// next start on.
const MemcachedKey = "properties.memcached"

// openProperties wires them and starts nothing.
func (b *base) openProperties() error {
	log := b.cfg.Log.With("component", component(b.raft.Cluster(), b.raft.ID(), "properties"))
	if k, err := b.raft.State().View().Config(MemcachedKey); err == nil && k.Value != "" {
		if b.shared, err = properties.NewMemcached(b.raft.Cluster().String(), splitFields(k.Value)...); err != nil {
			log.Warn("memcached is not used", "err", err)
		}
	}
	props := []properties.Property{b.remote.Property(), {Name: propertyBackend, TTL: backendTTL, Owner: exports.NodeOf, All: b.askBackends}}
	for call, ttl := range asked {
		props = append(props, properties.Property{Name: call, TTL: ttl, Owner: exports.NodeOf, Fetch: func(ctx context.Context, node string) (json.RawMessage, error) {
			id, err := uuid.Parse(node)
			if err != nil {
				return nil, err
			}
			var answer json.RawMessage
			err = b.peers.Call(ctx, id, call, nil, &answer)
			return answer, err
		}})
	}
	var shared properties.Store
	if b.shared != nil {
		shared = b.shared
	}
	var err error
	if b.properties, err = properties.New(props, shared, log); err != nil {
		return err
	}
	b.remote.Use(b.properties)
	return nil
}

func splitFields(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ' ' || r == ',' })
}

func (b *base) askBackends(ctx context.Context, node string) (map[string]json.RawMessage, error) {
	id, err := uuid.Parse(node)
	if err != nil {
		return nil, err
	}
	var all []v1.Backend
	if err := b.peers.Call(ctx, id, callBackends, nil, &all); err != nil {
		return nil, err
	}
	out := make(map[string]json.RawMessage, len(all))
	for _, one := range all {
		if out[exports.ObjectOf(id, one.ID)], err = json.Marshal(one); err != nil {
			return nil, fmt.Errorf("backend of vPool %s: %w", one.VPool, err)
		}
	}
	return out, nil
}

// told is what a node said. Without an error it has just said so; with one it does not answer, and Value is what it said at At, if it ever did.
type told[T any] struct {
	Node  uuid.UUID
	Value T
	At    time.Time
	Err   error
}

// tellAll asks nodes at once.
func tellAll[T any](ctx context.Context, b *base, nodes []uuid.UUID, call string) []told[T] {
	out := make([]told[T], len(nodes))
	var g sync.WaitGroup
	for i, node := range nodes {
		out[i].Node = node
		g.Go(func() {
			if node == b.raft.ID() {
				out[i].Err = b.peers.Call(ctx, node, call, nil, &out[i].Value)
				return
			}
			v := b.properties.Get(ctx, node.String(), call)
			if v.Known && !v.Decode(&out[i].Value) {
				v.Err = "its answer does not read"
			}
			if v.Err != "" {
				out[i].At, out[i].Err = v.At, &silentNode{v.Err}
			}
		})
	}
	g.Wait()
	return out
}

// silentNode says why a node's answer is not a new one.
type silentNode struct{ why string }

func (e *silentNode) Error() string { return e.why }

// backendAt is what a node said of a vPool's backend; AsOf says when, where it does not answer now.
func (b *base) backendAt(ctx context.Context, node, pool uuid.UUID) (out v1.Backend, ok bool) {
	v := b.properties.Get(ctx, exports.ObjectOf(node, pool), propertyBackend)
	if !v.Decode(&out) {
		return out, false
	}
	if v.Stale {
		at := v.At.UTC()
		out.AsOf = &at
	}
	return out, true
}

// spaceHere is what this process's own driver knows of a backend.
func (b *base) spaceHere(id uuid.UUID) (vpool.Space, bool) {
	s, ok := b.pools.Space(id)
	if !ok || s.Stored > 0 {
		return s, ok
	}
	view := b.raft.State().View()
	p, err := view.VPoolByID(id)
	if err != nil {
		return s, ok
	}
	for _, vol := range view.VolumesOf(p.FSID) {
		if i, known := b.engine.Info(vol.ID); known {
			s.Stored += max(0, i.Used-i.Pending)
		}
	}
	return s, ok
}

// space is that of a vPool's backend, from the nodes that know: the one whose disk it is; of a bucket, each knows what it has stored.
func (b *base) space(id uuid.UUID) (out vpool.Space, ok bool) {
	p, err := b.raft.State().View().VPoolByID(id)
	if err != nil {
		return out, false
	}
	nodes := []uuid.UUID{p.Backend.Node}
	if p.Backend.Node == uuid.Nil {
		nodes = append(b.others(), b.raft.ID())
	}
	for _, node := range nodes {
		var s vpool.Space
		known := false
		if node == b.raft.ID() && b.pools != nil {
			s, known = b.spaceHere(id)
		} else if one, told := b.backendAt(context.Background(), node, id); told {
			s, known = vpool.Space{Total: int64(one.Total), Free: int64(one.Free), Stored: int64(one.Stored)}, true
			if one.AsOf != nil {
				s.AsOf = *one.AsOf
			}
		}
		if !known {
			continue
		}
		stored := out.Stored + s.Stored
		if !ok || node == b.raft.ID() {
			out, ok = s, true
		}
		out.Stored = stored
	}
	return out, ok
}
