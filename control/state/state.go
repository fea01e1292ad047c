// Package state is the cluster's metadata as a pure state machine: vPools, names, volumes, owners, nodes. It imports no
// clock, no randomness, no files and no network, so the same commands in the same order give the same bytes on every
// node and at every replay. raft (package control/raft) orders the commands; this package only applies them.
//
// # What others call
//
//	s := state.New()
//	s.Apply(index, entry) (Result, error)           // only raft calls it, one call at a time
//	s.View() *View                                   // a consistent, immutable picture; cheap; any goroutine
//	s.Doomed() (volumes []Doomed, changed <-chan struct{})
//	s.Changes(after) (changes []Change, gap bool, more <-chan struct{})    which objects changed, for caches and the console
//	Encode(cmd, id, at) ([]byte, error)              // refuses what Apply would have to halt on
//	(*Snapshot).WriteTo, (*Store).Restore, (*Store).Hash, (*View).Check
//
//	View: Cluster Nodes Node VPools VPool VPoolByID VPoolByFSID Inode Lookup ReadDir Path Resolve ResolveDisk
//	      Volume VolumesOf VolumesUnder Disks Usage Token Tokens
//	Commands: InitCluster RegisterNode CreateVPool UpdateVPool DeleteVPool CreateInode RemoveInode RemoveDir Rename SetAttr
//	      ActivateVolume DeleteVolumeDone SetToken DeleteToken
//	Disk names: IsDisk(file name), DiskName(path), DiskFile(disk path), SplitName("pool/path")
//
// # Model
//
// An inode has exactly one name (no hard links), so parent, name and directory cookie are fields of the inode and a
// lookup is one step in one index. Inode numbers are given once per vPool and never again; number 1 is the root. A file
// always has a volume, made by the same command; the bytes, the size and the mtime live with the volume's owner
// (Volume.Size is the size asked for at creation). A removed file's volume stays in the doomed table until the engine has
// confirmed that nothing of it is left, so a crash between the two leaks nothing.
//
// Cookies are given by a counter per directory, starting at 3 (a gateway uses 1 and 2 for "." and ".."), never reused. A
// rename inside a directory keeps the entry's cookie, so a reader that goes through the directory meanwhile sees each file
// that stayed exactly once, under its old or its new name; a rename into another directory gives a new cookie.
//
// A vDisk is a file named `x.raw` or `x-flat.vmdk` (see IsDisk). Its disk name is the path without the suffix, and state
// keeps disk names unique: beside `x.raw` no `x-flat.vmdk` can be made, ErrExist. A rename that gives or takes the suffix
// changes the volume's kind.
//
// # Entry in the raft log
//
//	| crc32c of the rest, 4 bytes LE | {"v":version,"t":type,"id":uuid,"at":unix ns,"p":{…}} |
//
// The checksum is there because the log store has none per entry. An entry that does not decode, or whose type or version
// this binary does not know, halts the store: nothing is applied or snapshotted any more, since skipping it would make
// this node's state differ from the others'. A command that succeeds is remembered by id for the next ReplayWindow
// successes; the same id again returns the first result and changes nothing. An entry names the index that its proposer had
// seen ("b"): a repetition that comes so late that the first one may have been forgotten is refused, ErrForgotten.
//
// # Adding an object
//
// One file per kind of object, one line in the list of objects.go; snapshot, restore, hash, watch and decoding follow:
//
//	type Domain struct { ID uuid.UUID; Name string; …; Rev uint64 }     the row: plain JSON, no maps, no pointers to shared data
//	type SetDomain struct { … }                                         a command: kind, check, apply
//	func (*SetDomain) kind() (string, int)                              its name in the log and version
//	func (c *SetDomain) check() error                                   what is wrong whatever the state is; all limits
//	func (c *SetDomain) apply(t *tx) (Result, error)                    t.put(table, *fresh* row); no clock but t.at; rev t.index
//	func (v *View) Domain(…), Domains()                                 copies
//	func domainTable(frame byte) object                                 rowObject or secretObject + commands, check, points
//	objects: domainTable(17)                                            a frame number never used before, ascending
//
// A row is never changed in place: copy, change, put. Rows of a slice field are cloned before a change. Before a deletion
// t.free(Ref{"domain", id}, …) asks every object's points who refers to it. t.emit publishes an event with the command.
// A new table, a new command and a new optional field are no new Format: a newer binary reads what an older one wrote,
// and an older one refuses what it does not know instead of losing it.
//
// # Rules of an apply
//
// One transaction per command: an error leaves no trace. Errors are *Error around one of the sentinels. ctime and a
// directory's mtime strictly grow, also when the proposer's clock steps back, because clients take them for a version.
package state

import (
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/google/uuid"
	"github.com/hashicorp/go-memdb"
)

// Format is the version of everything this package writes; a store of another format is refused.
const Format = 1

// Limits. The engine's maximum file is 64 TiB (FSINFO says so too).
const (
	NameBytesMax      = 255
	TargetBytesMax    = 4095
	DepthMax          = 256
	InodesMax         = 1 << 20 // per vPool: bounds memory (about 1 KiB each) against a client that creates without end
	VolumeBytesMax    = 64 << 40
	ClientsMax        = 256
	ReplayWindow      = 4096
	EntryBytesMax     = 256 << 10
	FirstCookie       = 3
	RootIno           = 1
	blockersListedMax = 10
)

// Time is nanoseconds since 1970, always given by the proposer of a command.
type Time int64

// Store holds the state. Apply and Restore are for one goroutine; everything else may be called from any.
type Store struct {
	db     *memdb.MemDB
	window replayWindow
	index  atomic.Uint64
	halted atomic.Pointer[haltError]
	// changes tells who watches what has changed.
	changes changeLog
}

// New returns an empty store.
func New() *Store {
	return &Store{db: newDB()}
}

// Index is that of the last command applied.
func (s *Store) Index() uint64 { return s.index.Load() }

// Halted returns why the store applies nothing any more, or nil.
func (s *Store) Halted() error {
	if h := s.halted.Load(); h != nil {
		return h
	}
	return nil
}

// ErrHalted: an entry was met that cannot be applied and may not be skipped. The process must end.
var ErrHalted = errors.New("state machine is halted")

type haltError struct {
	index uint64
	cause error
}

func (h *haltError) Error() string {
	return fmt.Sprintf("state machine halted at entry %d: %v", h.index, h.cause)
}

func (h *haltError) Unwrap() []error { return []error{ErrHalted, h.cause} }

func (s *Store) halt(index uint64, cause error) error {
	h := &haltError{index: index, cause: cause}
	s.halted.CompareAndSwap(nil, h)
	return h
}

// Apply decodes and applies one entry. It never panics: a broken invariant inside a command halts the store.
func (s *Store) Apply(index uint64, entry []byte) (res Result, err error) {
	if err := s.Halted(); err != nil {
		return Result{}, err
	}
	cmd, env, err := decode(entry)
	if err != nil {
		return Result{}, s.halt(index, err)
	}
	if first, ok := s.window.get(env.ID); ok {
		s.index.Store(index)
		return first, nil
	}
	if env.Base != 0 && s.window.forgotten() > env.Base {
		s.index.Store(index)
		return Result{}, errForgotten
	}
	txn := s.db.Txn(true)
	txn.TrackChanges()
	defer func() {
		if p := recover(); p != nil {
			txn.Abort()
			res, err = Result{}, s.halt(index, fmt.Errorf("apply %s: panic: %v", env.Type, p))
		}
	}()
	res, err = cmd.apply(&tx{View: View{txn: txn}, index: index, at: env.At, id: env.ID})
	s.index.Store(index)
	if err != nil {
		txn.Abort()
		return Result{}, err
	}
	res.Rev = index
	changes := changesOf(index, txn.Changes())
	txn.Commit()
	s.window.add(env.ID, res)
	s.changes.add(index, changes)
	return res, nil
}

// Result is what a command did. Fields that a command has no use for stay zero.
type Result struct {
	// Rev is the raft index of the command, which is the rev of every object it changed.
	Rev uint64 `json:"rev"`
	// Pool is the vPool made.
	Pool uuid.UUID `json:"pool"`
	// Ino is the inode made, found (unchecked create) or moved.
	Ino uint64 `json:"ino,omitempty"`
	// Created tells a create from an unchecked or repeated exclusive one that found the file.
	Created bool `json:"created,omitempty"`
	// Volume is that of Ino, or the one activated.
	Volume uuid.UUID `json:"volume"`
	// Doomed is the volume of the file that was removed or replaced.
	Doomed uuid.UUID `json:"doomed"`
	// Object is what a command on another object made, found or changed.
	Object uuid.UUID `json:"object,omitzero"`
	// Seq is that of the last event published.
	Seq uint64 `json:"seq,omitempty"`
	// Epoch is the volume's new epoch.
	Epoch uint64 `json:"epoch,omitempty"`
}

// replayWindow remembers the results of the last commands that succeeded, oldest first from next.
type replayWindow struct {
	byID map[uuid.UUID]int
	ring []replayed
	next int
}

type replayed struct {
	ID     uuid.UUID `json:"id"`
	Result Result    `json:"result"`
}

func (w *replayWindow) get(id uuid.UUID) (Result, bool) {
	i, ok := w.byID[id]
	if !ok {
		return Result{}, false
	}
	return w.ring[i].Result, true
}

func (w *replayWindow) add(id uuid.UUID, r Result) {
	if w.byID == nil {
		w.byID = make(map[uuid.UUID]int)
	}
	if len(w.ring) < ReplayWindow {
		w.byID[id] = len(w.ring)
		w.ring = append(w.ring, replayed{ID: id, Result: r})
		return
	}
	delete(w.byID, w.ring[w.next].ID)
	w.ring[w.next] = replayed{ID: id, Result: r}
	w.byID[id] = w.next
	w.next = (w.next + 1) % ReplayWindow
}

// forgotten is an index up to which results may have left the window.
func (w *replayWindow) forgotten() uint64 {
	if len(w.ring) < ReplayWindow {
		return 0
	}
	return w.ring[w.next].Result.Rev - 1
}

// oldestFirst copies the window in the order the commands were applied.
func (w *replayWindow) oldestFirst() []replayed {
	out := make([]replayed, 0, len(w.ring))
	out = append(out, w.ring[w.next:]...)
	return append(out, w.ring[:w.next]...)
}
