package raft

import (
	"context"
	"fmt"

	"github.com/google/uuid"
	"github.com/hashicorp/raft"
)

// Server is a node in raft's configuration.
type Server struct {
	ID    uuid.UUID
	Voter bool
}

// Servers is the newest configuration that this node knows.
func (n *Node) Servers() ([]Server, error) {
	f := n.raft.GetConfiguration()
	if err := f.Error(); err != nil {
		return nil, fmt.Errorf("read raft configuration: %w", err)
	}
	var out []Server
	for _, s := range f.Configuration().Servers {
		id, err := uuid.Parse(string(s.ID))
		if err != nil {
			return nil, fmt.Errorf("raft configuration names server %q: %w", s.ID, err)
		}
		out = append(out, Server{ID: id, Voter: s.Suffrage == raft.Voter})
	}
	return out, nil
}

// Leader is the node that leads as far as this one knows; uuid.Nil while there is none.
func (n *Node) Leader() uuid.UUID {
	_, id := n.raft.LeaderWithID()
	leader, err := uuid.Parse(string(id))
	if err != nil {
		return uuid.Nil
	}
	return leader
}

// IsLeader says whether this node takes itself for the leader.
func (n *Node) IsLeader() bool { return n.raft.State() == raft.Leader }

// Leadership tells of every change of IsLeader, true or false. It has one reader.
func (n *Node) Leadership() <-chan bool { return n.raft.LeaderCh() }

// Indexes are how far this node's log and state have come.
func (n *Node) Indexes() (log, committed, applied uint64) {
	return n.raft.LastIndex(), n.raft.CommitIndex(), n.fsm.applied.Load()
}

func (n *Node) change(ctx context.Context, what string, id uuid.UUID, submit func() raft.Future) error {
	if err := n.wait(ctx, submit); err != nil {
		return fmt.Errorf("%s node %s: %w", what, id, err)
	}
	return nil
}

// AddNonvoter lets a node follow the log.
func (n *Node) AddNonvoter(ctx context.Context, id uuid.UUID) error {
	s := id.String()
	return n.change(ctx, "add", id, func() raft.Future {
		return n.raft.AddNonvoter(raft.ServerID(s), raft.ServerAddress(s), 0, attemptTimeout)
	})
}

// Promote makes a node that follows a voter.
func (n *Node) Promote(ctx context.Context, id uuid.UUID) error {
	s := id.String()
	return n.change(ctx, "promote", id, func() raft.Future {
		return n.raft.AddVoter(raft.ServerID(s), raft.ServerAddress(s), 0, attemptTimeout)
	})
}

// Demote takes a node's vote.
func (n *Node) Demote(ctx context.Context, id uuid.UUID) error {
	return n.change(ctx, "demote", id, func() raft.Future { return n.raft.DemoteVoter(raft.ServerID(id.String()), 0, attemptTimeout) })
}

// Remove takes a node out of the configuration.
func (n *Node) Remove(ctx context.Context, id uuid.UUID) error {
	return n.change(ctx, "remove", id, func() raft.Future { return n.raft.RemoveServer(raft.ServerID(id.String()), 0, attemptTimeout) })
}

// TransferLeadership hands the lead to whichever voter is furthest.
func (n *Node) TransferLeadership(ctx context.Context) error {
	return n.change(ctx, "hand on the lead of", n.id.Node, func() raft.Future { return n.raft.LeadershipTransfer() })
}

// MarkRemoved makes this data directory one that does not start again: the cluster has taken the node out.
func (n *Node) MarkRemoved() error {
	id := n.id
	id.Phase = removed
	return id.save(n.cfg.Dir)
}
