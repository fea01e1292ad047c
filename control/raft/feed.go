package raft

import (
	"crypto/sha256"
	"errors"
	"sync"

	"varve/control/state"
)

// feedEntries is how far a follower of the state may lag before it has to begin anew.
const feedEntries = 4096

// Update is one command that was applied, with its index in the log.
type Update struct {
	Index uint64
	Entry []byte
}

// Feed is a copy's source: the state at one moment, then every command applied after it, in order. The channel is closed when
// the copy fell too far behind, the state was replaced by a leader's snapshot, or the node closes; follow again then.
type Feed struct {
	Snapshot *state.Snapshot
	updates  chan Update
}

// Updates are the commands after Snapshot.
func (f *Feed) Updates() <-chan Update { return f.updates }

// put never waits: a follower that does not keep up is let go.
func (f *Feed) put(u Update) bool {
	select {
	case f.updates <- u:
		return true
	default:
		close(f.updates)
		return false
	}
}

// Follow begins a feed; Unfollow ends it.
func (n *Node) Follow() (*Feed, error) {
	n.fsm.mu.Lock()
	defer n.fsm.mu.Unlock()
	snap, err := n.store.Snapshot()
	if err != nil {
		return nil, err
	}
	f := &Feed{Snapshot: snap, updates: make(chan Update, feedEntries)}
	n.fsm.followers[f] = struct{}{}
	return f, nil
}

// Unfollow ends a feed. It may have ended before.
func (n *Node) Unfollow(f *Feed) {
	n.fsm.mu.Lock()
	defer n.fsm.mu.Unlock()
	if _, ok := n.fsm.followers[f]; ok {
		delete(n.fsm.followers, f)
		close(f.updates)
	}
}

// Hashes of the state are taken at the same indexes on every node, so that nodes can compare them: at the first command at or
// after each multiple of 1,000 entries, of more where the state is large, since a hash reads all of it.
const (
	hashEvery   = 1000
	hashesKept  = 16
	hashInodes  = 10000 // so many inodes more make the stride a thousand longer
	hashRunning = 1     // at a time; an index that comes while one runs is left out
)

// StateHash is the hash of the state after the command at Index.
type StateHash struct {
	Index uint64   `json:"index"`
	Hash  [32]byte `json:"hash"`
}

type hashes struct {
	next    uint64
	wg      sync.WaitGroup
	mu      sync.Mutex // guards what is below
	running int
	kept    []StateHash
}

// at is called in the order of the entries. The snapshot is a moment's work; hashing it is another goroutine's.
func (h *hashes) at(index uint64, store *state.Store) {
	inodes := uint64(0)
	if index < h.next {
		return
	}
	for _, p := range store.View().VPools() {
		inodes += p.Inodes
	}
	stride := hashEvery * (1 + inodes/hashInodes)
	due := h.next != 0 && index >= h.next
	h.next = (index/stride + 1) * stride
	if !due {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.running >= hashRunning {
		return
	}
	snap, err := store.Snapshot()
	if err != nil {
		return // halted: the node ends
	}
	h.running++
	h.wg.Go(func() {
		sum := sha256.New()
		_, err := snap.WriteTo(sum)
		h.mu.Lock()
		defer h.mu.Unlock()
		h.running--
		if err == nil {
			h.kept = append(h.kept[max(0, len(h.kept)-hashesKept+1):], StateHash{Index: index, Hash: [32]byte(sum.Sum(nil))})
		}
	})
}

// Hashes are the newest ones of this node's state, oldest first.
func (n *Node) Hashes() []StateHash {
	h := &n.fsm.hashes
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]StateHash(nil), h.kept...)
}

// ErrDiverged: this node's state is not what the other nodes have.
var ErrDiverged = errors.New("state differs from the other nodes'")

// Fail ends the node for a reason that was found outside: its state diverged, or it was removed.
func (n *Node) Fail(err error) { n.failure.set(err) }
