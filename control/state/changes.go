package state

import (
	"slices"
	"strconv"
	"sync"

	"github.com/hashicorp/go-memdb"
)

// Change says that an object was made, changed or deleted. It carries no content: who hears of it reads what it may see.
type Change struct {
	// Index is the command's, and the object's rev unless it was deleted.
	Index uint64 `json:"index"`
	// Kind is "vdisk", "vpool", "node", "task", "alert", …; a kind without a case in changed is its table's name.
	Kind string `json:"kind"`
	// ID is the object's id, or its name where that is its key; "" says that any of the kind may have changed.
	ID      string `json:"id,omitempty"`
	Deleted bool   `json:"deleted,omitempty"`
	// Topic and Key are those of an event.
	Topic string `json:"topic,omitempty"`
	Key   string `json:"key,omitempty"`
}

// changesKept is how many changes can be read again. Each is about 150 bytes.
const changesKept = 8192

// unseen are the tables whose changes nobody hears of: bookkeeping, and what a session leaves at every request.
var unseen = []string{tSession, tAnswer, tCursor, tEventLog, tSecret, tJoinToken, tDoomed, tRemoved}

// changeLog holds the latest changes in memory. A node that starts, or takes a snapshot over, begins with none.
type changeLog struct {
	mu    sync.Mutex // guards what is below
	kept  []Change   // a ring once it is full
	next  int
	from  uint64 // changes up to this index are not kept
	until uint64
	wake  chan struct{}
}

// add appends the changes of one command.
func (l *changeLog) add(index uint64, changes []Change) {
	if len(changes) == 0 {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range changes {
		if len(l.kept) < changesKept {
			l.kept = append(l.kept, c)
			continue
		}
		l.from = max(l.from, l.kept[l.next].Index)
		l.kept[l.next] = c
		l.next = (l.next + 1) % changesKept
	}
	l.until = index
	l.broadcastLocked()
}

// reset forgets all: the state was replaced.
func (l *changeLog) reset(index uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.kept, l.next, l.from, l.until = nil, 0, index, index
	l.broadcastLocked()
}

func (l *changeLog) broadcastLocked() {
	if l.wake != nil {
		close(l.wake)
		l.wake = nil
	}
}

// Changes returns what changed after an index, oldest first. gap says that some of it is not kept any more: what the caller has read
// may be old. If nothing changed, more is closed when something does.
func (s *Store) Changes(after uint64) (changes []Change, gap bool, more <-chan struct{}) {
	l := &s.changes
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.wake == nil {
		l.wake = make(chan struct{})
	}
	gap = after < l.from || after > s.Index() // from another life of this node
	for i := range l.kept {
		c := l.kept[(l.next+i)%len(l.kept)]
		if c.Index > after || gap {
			changes = append(changes, c)
		}
	}
	return changes, gap, l.wake
}

// changesOf makes changes of the rows that a transaction has touched.
func changesOf(index uint64, rows memdb.Changes) []Change {
	var out []Change
	for _, r := range rows {
		if slices.Contains(unseen, r.Table) {
			continue
		}
		row := r.After
		if row == nil {
			row = r.Before
		}
		c := Change{Index: index, Kind: r.Table, Deleted: r.Deleted()}
		if !c.describe(row) || slices.Contains(out, c) {
			continue
		}
		out = append(out, c)
	}
	return out
}

// describe fills in what row is; false where nobody needs to hear of it.
func (c *Change) describe(row any) bool {
	switch r := row.(type) {
	case *Node:
		c.ID = r.ID.String()
	case *VPool:
		c.ID = r.ID.String()
	case *Inode:
		if r.Kind != File || !IsDisk(r.Name) {
			return false
		}
		c.Kind, c.ID = ScopeVDisk, r.Volume.String()
	case *Volume:
		if r.Kind != DiskVolume {
			return false
		}
		c.Kind, c.ID = ScopeVDisk, r.ID.String()
	case *Task:
		c.ID = r.ID.String()
	case *Alert:
		c.ID = r.Code
	case *Domain:
		c.ID = r.ID.String()
	case *VMachine:
		c.ID = r.ID.String()
	case *PMachine:
		c.ID = r.ID.String()
	case *Branding:
		c.ID = r.ID.String()
	case *ConfigKey:
		c.ID = r.Key
	case *ScheduleRun:
		c.Kind = tSchedule
	case *Sink:
		c.ID = r.Name
	case *User:
		c.ID = r.ID.String()
	case *Group:
		c.ID = r.ID.String()
	case *APIClient:
		c.ID = r.ID.String()
	case *Token:
		c.ID = r.Name
	case *Event:
		c.ID, c.Topic, c.Key = strconv.FormatUint(r.Seq, 10), r.Topic, r.Key
	case *AuditEntry:
		c.ID = strconv.FormatUint(r.Seq, 10)
	}
	return true
}
