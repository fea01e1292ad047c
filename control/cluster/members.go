package cluster

import (
	"context"
	"fmt"
	"slices"

	"github.com/google/uuid"

	"varve/control/raft"
	"varve/control/state"
)

const (
	votersMax = 5
	// closeEntries is how far behind a node may be to get a vote.
	closeEntries = 200
)

// change is one step of raft's membership.
type change struct {
	what string
	node uuid.UUID
}

// Steps.
const (
	add     = "add"
	promote = "promote"
	demote  = "demote"
	remove  = "remove"
)

// plan gives the next step, or none. gone says which nodes were removed; a server that is neither known nor removed has not
// registered yet. close says which nodes follow closely; it is asked only where it matters.
func plan(nodes []state.Node, servers []raft.Server, gone, close func(uuid.UUID) bool) (change, bool) {
	byID := make(map[uuid.UUID]state.Node)
	for _, n := range nodes {
		byID[n.ID] = n
	}
	voters, nonvoters := 0, make(map[uuid.UUID]bool)
	known := make(map[uuid.UUID]bool)
	var away []uuid.UUID
	for _, s := range servers {
		known[s.ID] = true
		n, ok := byID[s.ID]
		if gone(s.ID) {
			return change{remove, s.ID}, true
		}
		if !s.Voter {
			nonvoters[s.ID] = true
			continue
		}
		if ok && n.Role != state.RoleMaster {
			return change{demote, s.ID}, true
		}
		voters++
		if n.Offline {
			away = append(away, s.ID)
		}
	}
	slices.SortFunc(nodes, func(a, b state.Node) int {
		if a.Joined != b.Joined {
			return int(min(max(a.Joined-b.Joined, -1), 1))
		}
		return slices.Compare(a.ID[:], b.ID[:])
	})
	var spares []uuid.UUID
	for _, n := range nodes {
		switch {
		case !known[n.ID]:
			return change{add, n.ID}, true
		case nonvoters[n.ID] && n.Role == state.RoleMaster && !n.Offline && close(n.ID):
			spares = append(spares, n.ID)
		}
	}
	odd := voters%2 == 1
	switch {
	case !odd && len(away) > 0:
		return change{demote, away[0]}, true
	case !odd && len(spares) > 0 && voters < votersMax,
		odd && len(spares) > 1 && voters < votersMax,
		odd && len(spares) > 0 && len(away) > 0:
		return change{promote, spares[0]}, true
	}
	return change{}, false
}

// arrange makes the next step of the membership, on the leader.
func (c *Cluster) arrange(ctx context.Context, n *raft.Node) error {
	servers, err := n.Servers()
	if err != nil {
		return err
	}
	log, _, _ := n.Indexes()
	view := n.State().View()
	step, ok := plan(view.Nodes(), servers, view.NodeRemoved, func(id uuid.UUID) bool {
		p, err := c.ping(ctx, id)
		return err == nil && p.Applied+closeEntries > log
	})
	if !ok {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if step.node == c.cfg.Self && (step.what == demote || step.what == remove) {
		return n.TransferLeadership(ctx)
	}
	switch step.what {
	case add:
		err = n.AddNonvoter(ctx, step.node)
	case promote:
		err = n.Promote(ctx, step.node)
	case demote:
		err = n.Demote(ctx, step.node)
	case remove:
		err = n.Remove(ctx, step.node)
	}
	if err != nil {
		return fmt.Errorf("%s node %s: %w", step.what, step.node, err)
	}
	c.cfg.Log.Info("control membership changed", "step", step.what, "node", step.node)
	return nil
}
