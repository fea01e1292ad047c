// Package node is the controller of nodes, the appliances in their role of storage routers.
//
//	c := node.New(raftNode, raftNode.State(), raftNode.ID())
//	c.Register(ctx, state.NodeSpec{Name, Role: state.RoleMaster, NBD, NFS, HTTPS, Version})   // at every start
//	c.List() []state.Node · c.Self() (state.Node, error) · c.Get("name or id") (state.Node, error)
package node

import (
	"context"
	"os"
	"strings"

	"github.com/google/uuid"

	"varve/control/state"
)

// Proposer commits a command and returns what it did. raft.Node is one.
type Proposer interface {
	Apply(ctx context.Context, cmd state.Command) (state.Result, error)
}

// Controller of nodes.
type Controller struct {
	raft  Proposer
	store *state.Store
	self  uuid.UUID
}

// New wires a controller for the node with id self.
func New(raft Proposer, store *state.Store, self uuid.UUID) *Controller {
	return &Controller{raft: raft, store: store, self: self}
}

// Register records this node's name and addresses. Volumes can be activated on registered nodes only.
func (c *Controller) Register(ctx context.Context, s state.NodeSpec) error {
	_, err := c.raft.Apply(ctx, &state.RegisterNode{ID: c.self, Spec: s})
	return err
}

// HostName is this host's name in the form that a node's name needs.
func HostName() string {
	name, err := os.Hostname()
	if err != nil {
		return "node"
	}
	name, _, _ = strings.Cut(strings.ToLower(name), ".")
	name = strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-' {
			return r
		}
		return -1
	}, name)
	name = strings.TrimLeft(name, "-")
	if name == "" {
		return "node"
	}
	return name[:min(len(name), 63)]
}

// List returns all nodes, by id.
func (c *Controller) List() []state.Node { return c.store.View().Nodes() }

// Self returns this node.
func (c *Controller) Self() (state.Node, error) { return c.store.View().Node(c.self) }

// Get returns the node with this name or id.
func (c *Controller) Get(name string) (state.Node, error) {
	for _, n := range c.List() {
		if n.Name == name || n.ID.String() == name {
			return n, nil
		}
	}
	return state.Node{}, &state.Error{Err: state.ErrNotFound, Object: "node " + name}
}
