package state

import (
	"errors"

	"github.com/google/uuid"
	"github.com/hashicorp/go-memdb"
)

// objects is the one list of everything that the state holds. A kind of object is a file of its own: its row type, its
// commands, its views and a function that returns its entry here. The frame numbers are the snapshot's: they ascend, are
// never used again for something else, and an object without a table in it (written before the object existed) is empty.
var objects = []object{
	clusterTable(2),
	nodeTable(3),
	tokenTable(4),
	vpoolTable(5),
	inodeTable(6),
	volumeTable(7),
	doomedTable(8),
	replayTable(9),
	domainTable(16),
	eventTable(17),
	eventLogTable(18),
	cursorTable(19),
	taskTable(20),
	scheduleTable(21),
	scheduleRunTable(22),
	policyTable(23),
	configTable(24),
	brandingTable(25),
	sinkTable(26),
	secretTable(27),
	trashTable(28),
	removedTable(30),
	joinTokenTable(31),
	alertTable(39),
	userTable(40),
	groupTable(41),
	apiClientTable(42),
	sessionTable(43),
	auditTable(44),
	answerTable(45),
	pmachineTable(50),
	vmachineTable(51),
}

// object is what the store needs to know of a kind of object.
type object struct {
	// frame is the type of its frames in a snapshot.
	frame byte
	table *memdb.TableSchema
	// commands that change it; command[T] makes an entry.
	commands []func() Command
	write    func(f *frameWriter, frame byte, s *Snapshot, v *View)
	load     func(l *loader, body []byte) error
	// check returns the first invariant that the table breaks; nil where each row stands by itself.
	check func(v *View) error
	// points names the rows that point at another object, for a deletion of that one to be refused; nil where none can.
	points func(v *View, at Ref, by func(name string))
	// gone takes away what means nothing without an object that was deleted; nil where nothing does.
	gone func(t *tx, at Ref)
}

// Ref names an object of any kind: its table, or "vdisk" with the id of a volume. The cluster's ID is Nil.
type Ref struct {
	Kind string    `json:"kind"`
	ID   uuid.UUID `json:"id"`
}

// rowObject is an object whose rows stand in the snapshot as their JSON, by id.
func rowObject[T any](frame byte, name string, indexes map[string]index) object {
	return object{
		frame: frame,
		table: table(name, indexes),
		write: func(f *frameWriter, frame byte, _ *Snapshot, v *View) {
			rows(v, name, byID, nil, func(r *T) bool { f.frame(frame, r); return f.err == nil })
		},
		load: func(l *loader, body []byte) error {
			row := new(T)
			if err := strict(body, row); err != nil {
				return err
			}
			l.put(name, row)
			return nil
		},
	}
}

// secretObject is an object whose rows hold a Secret, which has no encoding on purpose: pack makes the row S that the
// snapshot holds, unpack reads it.
func secretObject[T, S any](frame byte, name string, indexes map[string]index, pack func(T) S, unpack func(S) T) object {
	return object{
		frame: frame,
		table: table(name, indexes),
		write: func(f *frameWriter, frame byte, _ *Snapshot, v *View) {
			rows(v, name, byID, nil, func(r *T) bool { f.frame(frame, pack(*r)); return f.err == nil })
		},
		load: func(l *loader, body []byte) error {
			var packed S
			if err := strict(body, &packed); err != nil {
				return err
			}
			row := unpack(packed)
			l.put(name, &row)
			return nil
		},
	}
}

// blockers names what points at an object, at most blockersListedMax of it.
func (v *View) blockers(at Ref) []string {
	var names []string
	for _, o := range objects {
		if o.points == nil {
			continue
		}
		o.points(v, at, func(name string) {
			if len(names) < blockersListedMax {
				names = append(names, name)
			} else if len(names) == blockersListedMax {
				names = append(names, "…")
			}
		})
	}
	return names
}

// free refuses the deletion of an object that something points at.
func (t *tx) free(at Ref, object string) error {
	if by := t.blockers(at); len(by) > 0 {
		return &Error{Err: ErrConflict, Object: object, Detail: "is in use", By: by, Remedy: "change or delete what uses it first"}
	}
	return nil
}

// gone drops what belongs to an object that is deleted now.
func (t *tx) gone(at Ref) {
	for _, o := range objects {
		if o.gone != nil {
			o.gone(t, at)
		}
	}
}

// fresh refuses a change by somebody who has seen another rev than the present one. Rev 0 changes whatever is there.
func fresh(object string, given, present uint64) error {
	if given != 0 && given != present {
		return stale(object, present)
	}
	return nil
}

func clusterTable(frame byte) object {
	o := rowObject[Cluster](frame, tCluster, map[string]index{byID: always(func(*Cluster) []byte { return clusterKey })})
	o.commands = []func() Command{command[InitCluster], command[RaiseLevel]}
	return o
}

type vpoolRow struct {
	VPool
	Key []byte `json:"key"`
}

func vpoolTable(frame byte) object {
	o := secretObject(frame, tVPool, map[string]index{
		byID:   always(func(p *VPool) []byte { return p.ID[:] }),
		byName: always(func(p *VPool) []byte { return []byte(p.Name) }),
		byFSID: always(func(p *VPool) []byte { return keyFSID(p.FSID) }),
	},
		func(p VPool) vpoolRow { return vpoolRow{VPool: p, Key: p.Key[:]} },
		func(r vpoolRow) VPool { copy(r.VPool.Key[:], r.Key); return r.VPool })
	o.commands = []func() Command{command[CreateVPool], command[UpdateVPool], command[DeleteVPool], command[SetVPoolFindings]}
	o.check = checkNamespace
	return o
}

func inodeTable(frame byte) object {
	o := rowObject[Inode](frame, tInode, map[string]index{
		byID:     always(func(n *Inode) []byte { return key2(n.FSID, n.Ino) }),
		byName:   named(func(n *Inode) []byte { return keyName(n.FSID, n.Parent, n.Name) }),
		byCookie: named(func(n *Inode) []byte { return key3(n.FSID, n.Parent, n.Cookie) }),
	})
	o.commands = []func() Command{command[CreateInode], command[RemoveInode], command[RemoveDir], command[Rename], command[SetAttr]}
	return o
}

func volumeTable(frame byte) object {
	o := rowObject[Volume](frame, tVolume, map[string]index{
		byID:   always(func(v *Volume) []byte { return v.ID[:] }),
		byPool: always(func(v *Volume) []byte { return keyPool(v.FSID, v.ID) }),
	})
	o.commands = []func() Command{command[ActivateVolume]}
	return o
}

func doomedTable(frame byte) object {
	o := rowObject[Doomed](frame, tDoomed, map[string]index{
		byID:   always(func(d *Doomed) []byte { return d.ID[:] }),
		byPool: always(func(d *Doomed) []byte { return keyPool(d.FSID, d.ID) }),
	})
	o.commands = []func() Command{command[DeleteVolumeDone]}
	return o
}

// replayObject is the replay window, which is no table.
func replayTable(frame byte) object {
	return object{
		frame: frame,
		write: func(f *frameWriter, frame byte, s *Snapshot, _ *View) {
			for i := range s.window {
				f.frame(frame, &s.window[i])
			}
		},
		load: func(l *loader, body []byte) error {
			var r replayed
			if err := strict(body, &r); err != nil {
				return err
			}
			if _, twice := l.window.get(r.ID); twice || len(l.window.ring) >= ReplayWindow {
				return errors.New("replay window repeats an id or is too long")
			}
			l.window.add(r.ID, r.Result)
			return nil
		},
	}
}
