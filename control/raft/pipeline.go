package raft

import (
	"sync"

	"github.com/hashicorp/raft"
)

// Raft sends appends to a peer in a pipeline: one goroutine sends, another takes the answers, and ends when one says that the peer knows
// a later term or has not the entry before. The sender hears of that only between two appends, and cannot end an append that waits for
// room: with enough of them under way the transport waits for someone who takes the answers, the sender for the transport, and nobody for
// either. From then on this node sends that peer nothing more, though it may still lead and its heartbeats arrive, and cannot shut down
// (hashicorp/raft, issue 612; the transport's default of two appends under way has no room at all).
//
// So answers are always taken here, and kept until raft takes them. There are no more of them than appends under way, and a few.

// draining is a pipeline that takes its answers.
type draining struct {
	raft.AppendPipeline
	answers chan raft.AppendFuture
	closed  chan struct{}
	once    sync.Once
}

// AppendEntriesPipeline implements raft.Transport.
func (i *inserting) AppendEntriesPipeline(id raft.ServerID, target raft.ServerAddress) (raft.AppendPipeline, error) {
	p, err := i.Transport.AppendEntriesPipeline(id, target)
	if err != nil {
		return nil, err // raft compares it with ErrPipelineReplicationNotSupported
	}
	d := &draining{AppendPipeline: p, answers: make(chan raft.AppendFuture), closed: make(chan struct{})}
	go d.run()
	return d, nil
}

func (d *draining) run() {
	var kept []raft.AppendFuture
	for {
		var to chan<- raft.AppendFuture
		var next raft.AppendFuture
		if len(kept) > 0 {
			to, next = d.answers, kept[0]
		}
		select {
		case f := <-d.AppendPipeline.Consumer():
			kept = append(kept, f)
		case to <- next:
			kept = kept[1:]
		case <-d.closed:
			return
		}
	}
}

// Consumer implements raft.AppendPipeline.
func (d *draining) Consumer() <-chan raft.AppendFuture { return d.answers }

// Close implements raft.AppendPipeline.
func (d *draining) Close() error {
	d.once.Do(func() { close(d.closed) })
	return d.AppendPipeline.Close()
}
