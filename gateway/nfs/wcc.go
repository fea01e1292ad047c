package nfs

import "sync"

// A client drops its cache of a file or directory unless the reply to its own change shows, in wcc_data, the attributes
// before that change as the client knows them. Attributes from before are true for one change only when no other one ran
// meanwhile: else another client's change would hide between them. So the server counts the changes that are under way on
// each inode, and sends attributes from before only with a change that was alone; otherwise it says that they do not
// follow, which every client takes for "I cannot tell" (and a Linux client, for WRITE, for "nobody but you").
type changes struct {
	shards [16]struct {
		mu  sync.Mutex
		now map[inodeKey]*changing
	}
}

type inodeKey struct{ fsid, inode uint64 }

type changing struct {
	under int    // changes under way
	begun uint64 // changes begun since the entry was made
}

// change is one change under way.
type change struct {
	key   inodeKey
	begun uint64
	alone bool
}

func (c *changes) begin(k inodeKey) change {
	sh := &c.shards[k.inode%16]
	sh.mu.Lock()
	defer sh.mu.Unlock()
	e := sh.now[k]
	if e == nil {
		if sh.now == nil {
			sh.now = make(map[inodeKey]*changing)
		}
		e = new(changing)
		sh.now[k] = e
	}
	e.under++
	e.begun++
	return change{key: k, begun: e.begun, alone: e.under == 1}
}

// end tells whether the change was alone from begin to end.
func (c *changes) end(ch change) (alone bool) {
	sh := &c.shards[ch.key.inode%16]
	sh.mu.Lock()
	defer sh.mu.Unlock()
	e := sh.now[ch.key]
	e.under--
	alone = ch.alone && e.begun == ch.begun
	if e.under == 0 {
		delete(sh.now, ch.key)
	}
	return alone
}

// endIf ends a change that may never have begun: a call that changes nothing has the zero change.
func (c *changes) endIf(ch change) (alone bool) {
	if ch.begun == 0 {
		return false
	}
	return c.end(ch)
}
