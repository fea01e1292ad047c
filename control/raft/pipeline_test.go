package raft

import (
	"io"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// A pipeline whose answers nobody takes any more keeps nobody who sends: raft's taker ends at an answer that ends the pipeline, and its
// sender comes to hear of it only when its append returns.
func TestPipelineWithoutATaker(t *testing.T) {
	listen := func() *raft.NetworkTransport {
		tr, err := raft.NewTCPTransport("127.0.0.1:0", nil, 2, 10*time.Second, io.Discard)
		must(t, err)
		t.Cleanup(func() { tr.Close() })
		return tr
	}
	peer, own := listen(), listen()
	go func() {
		for {
			select {
			case rpc := <-peer.Consumer():
				rpc.Respond(&raft.AppendEntriesResponse{Term: 2}, nil)
			case <-t.Context().Done():
				return
			}
		}
	}()
	tr := insert(own, nil)
	defer tr.Close()
	p, err := tr.AppendEntriesPipeline("peer", peer.LocalAddr())
	must(t, err)
	send := func() {
		_, err := p.AppendEntries(&raft.AppendEntriesRequest{RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax}, Term: 1}, new(raft.AppendEntriesResponse))
		must(t, err)
	}
	send()
	if f := <-p.Consumer(); f.Error() != nil || f.Response().Term != 2 {
		t.Fatal(f.Error(), f.Response())
	}
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		for range 1000 {
			send()
		}
	}()
	select {
	case <-sent:
	case <-time.After(10 * time.Second):
		t.Fatal("the sender waits for one who takes the answers")
	}
	for range 1000 {
		if f := <-p.Consumer(); f.Error() != nil || f.Response().Term != 2 {
			t.Fatal(f.Error(), f.Response())
		}
	}
	must(t, p.Close())
}
