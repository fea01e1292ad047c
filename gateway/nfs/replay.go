package nfs

import (
	"context"
	"hash/crc32"
	"net/netip"
	"sync"
	"time"

	"varve/gateway/nfs/rpc"
)

// replays is the duplicate request cache. A client that got no reply, because the connection broke, sends the call again
// with the same xid; a REMOVE that ran already must then be answered by the first reply, not by NOENT. A retransmission
// that overtakes its original waits for it.
//
// Two clients behind one address may use the same xid, so user, machine name and arguments belong to the key, and an entry
// is kept only as long as a client may still be retransmitting.
type replays struct {
	mu    sync.Mutex
	m     map[replayKey]*replay
	order []*replay // by the time they began
}

const (
	replaysMax  = 4096
	replayLasts = 120 * time.Second
)

type replayKey struct {
	peer      netip.Addr
	xid, proc uint32
	uid, gid  uint32
	bytes     int
	sum       uint64
}

type replay struct {
	key   replayKey
	began time.Time
	ended chan struct{}
	reply []byte // after ended; nil if the call had no reply
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func newReplayKey(peer netip.Addr, c *rpc.Call) replayKey {
	args := crc32.Update(crc32.ChecksumIEEE(c.Cred.Machine), crc32.IEEETable, c.Args)
	return replayKey{
		peer: peer, xid: c.XID, proc: c.Proc, uid: c.Cred.UID, gid: c.Cred.GID, bytes: len(c.Args),
		sum: uint64(args)<<32 | uint64(crc32.Checksum(c.Args, castagnoli)),
	}
}

// once runs the call, or returns the reply of the run there was.
func (r *replays) once(ctx context.Context, k replayKey, s *Server, run func() ([]byte, outcome)) ([]byte, outcome) {
	e, first := r.begin(k, time.Now())
	if !first {
		s.replayed.Add(1)
		select {
		case <-e.ended:
			return e.reply, answered
		case <-ctx.Done():
			return nil, silent
		}
	}
	b, end := run()
	if end == answered || end == garbage {
		e.reply = b
	} else {
		r.forget(e)
	}
	close(e.ended)
	return b, end
}

func (r *replays) begin(k replayKey, now time.Time) (e *replay, first bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for len(r.order) > 0 && (len(r.order) >= replaysMax || now.Sub(r.order[0].began) > replayLasts) {
		old := r.order[0]
		r.order[0] = nil
		r.order = r.order[1:]
		if r.m[old.key] == old {
			delete(r.m, old.key)
		}
	}
	if e := r.m[k]; e != nil {
		return e, false
	}
	e = &replay{key: k, began: now, ended: make(chan struct{})}
	if r.m == nil {
		r.m = make(map[replayKey]*replay)
	}
	r.m[k] = e
	r.order = append(r.order, e)
	return e, true
}

func (r *replays) forget(e *replay) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.m[e.key] == e {
		delete(r.m, e.key)
	}
}
