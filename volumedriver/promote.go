package volumedriver

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver/blockio"
	"varve/volumedriver/blockmap"
	"varve/volumedriver/writelog"
)

// # Promote
//
// A promoted clone takes over the snapshots of its parent up to the one that it began as, and the parent becomes a clone of it, so
// that the parent can be deleted. What lies where does not change: SCOs bear the name of the volume that wrote them, and are
// sealed under its key; frozen generations belong to its line of the map; its log tells a rebuild of the snapshots. Handing all that over
// would mean to write it anew. So a snapshot has a holder, the volume whose log and map it stands in, for ever, and an owner, the
// volume that people find it at:
//
//	owner record   snapshot -> holder, owner, number of the promotion; none: the holder owns it
//	clone of       the nearest snapshot that the head's line of the map descends from (through the holders, up to the oldest ancestor)
//	               that the volume does not own. It is computed, nowhere written.
//	Promote        the origin's owner gives the clone everything it owns among the ancestors of the origin, and the origin:
//	               owner records and the clone's root, in one durable update of the map store. Cost: the number of snapshots.
//
// A volume may be deleted as soon as no other is a clone of what it owns. What it holds for others stays:
//
//	nobody's   a snapshot that is deleted while a volume's map hangs on its generation gets an owner record without an owner; it goes
//	           with the last such volume
//	husk       a volume that is deleted while it holds snapshots of others, or nobody's, takes no more requests, has no size, and no
//	           name; it goes with the last snapshot that it holds. Its root object and its keys stay till then: crypto-erase of what
//	           a clone still shares cannot come sooner. It is a volume like any other for the scrub, for the audit, and for a change of keys.
//
// Snapshots descend from each other in no circle, but two volumes can be clones of one another: after A, which holds x1, y1, x2 on one line
// and x3 beside it behind x1, has given x1 and y1 to B, has got x1 back from x3, and is rolled back to x2, A is a clone of B's y1, and B of
// A's x1. Both is true, so neither can be deleted until one of them is promoted, which ends it, or flattened. To refuse the rollback
// would bar the way back to data that is there.
//
// Deleting is done by steps that sweep repeats, whenever something was deleted and before each scrub, until nothing is left to do.
//
// A rebuild finds in the root object of each volume the snapshots that it owns by a promotion, with the number of that: the highest
// counts, so it takes one object, the promoted clone's, to tell of a promotion. A root object of a holder says which snapshots are nobody's.
//
// What a rewind has made is a leaf among the snapshots of its volume: only what was cloned from it descends from it, through its name. Where
// its map lies does not count: neither another rewind that began with it descends from it, nor a head that was rolled back to it. Both
// descend from the same snapshots as it does. So a snapshot that a rewind puts among older ones becomes nobody's ancestor afterwards, whose
// parent would otherwise change, and a rebuild, which sees of a rewind and of a rollback only a position in the log, finds the same lineage.
//
// A snapshot held by another volume can be read, cloned, diffed against, renamed and deleted like any other, but not rolled back to: a
// rollback names a position in the volume's own log. A clone of it does the same.

// ErrNoParent: the volume is not a clone.
var ErrNoParent = errors.New("not a clone")

// ErrTakenOver: the snapshot came to the volume by a promotion, so the volume can't be rolled back to it.
var ErrTakenOver = errors.New("a promotion has taken the snapshot over from another volume")

const ownerPrefix = "owner/" // snapshot -> ownership

func ownerKey(snapshot uuid.UUID) []byte { return []byte(ownerPrefix + snapshot.String()) }

// ownership says whose a snapshot is.
type ownership struct {
	Holder uuid.UUID `json:"holder"`
	Owner  uuid.UUID `json:"owner,omitzero"` // Nil: nobody
	N      uint64    `json:"n"`
}

func (o ownership) encode(snapshot uuid.UUID) blockmap.KV {
	b, err := json.Marshal(o)
	if err != nil {
		panic(fmt.Sprintf("encode the owner of snapshot %s: %v", snapshot, err)) // two names and a number
	}
	return blockmap.KV{Key: ownerKey(snapshot), Value: b}
}

// ownerships are those that differ from the holder, or once did. Driver.mu guards it.
type ownerships struct {
	of     map[uuid.UUID]ownership              // by snapshot
	owners map[uuid.UUID]map[uuid.UUID]struct{} // by owner
	held   map[uuid.UUID]int                    // by holder
	husks  map[uuid.UUID]struct{}
}

func (s *ownerships) none() bool { return len(s.of) == 0 && len(s.husks) == 0 }

func (s *ownerships) set(snapshot uuid.UUID, o ownership) {
	if s.of == nil {
		s.of, s.owners, s.held = make(map[uuid.UUID]ownership), make(map[uuid.UUID]map[uuid.UUID]struct{}), make(map[uuid.UUID]int)
	}
	s.remove(snapshot)
	s.of[snapshot] = o
	if s.owners[o.Owner] == nil {
		s.owners[o.Owner] = make(map[uuid.UUID]struct{})
	}
	s.owners[o.Owner][snapshot] = struct{}{}
	s.held[o.Holder]++
}

func (s *ownerships) remove(snapshot uuid.UUID) {
	o, ok := s.of[snapshot]
	if !ok {
		return
	}
	delete(s.of, snapshot)
	if delete(s.owners[o.Owner], snapshot); len(s.owners[o.Owner]) == 0 {
		delete(s.owners, o.Owner)
	}
	if s.held[o.Holder]--; s.held[o.Holder] == 0 {
		delete(s.held, o.Holder)
	}
}

// restore undoes set or remove.
func (s *ownerships) restore(snapshot uuid.UUID, was ownership, moved bool) {
	s.remove(snapshot)
	if moved {
		s.set(snapshot, was)
	}
}

func (s *ownerships) husk(id uuid.UUID) {
	if s.husks == nil {
		s.husks = make(map[uuid.UUID]struct{})
	}
	s.husks[id] = struct{}{}
}

// owner of a snapshot.
func (s *ownerships) owner(holder, snapshot uuid.UUID) uuid.UUID {
	if o, ok := s.of[snapshot]; ok {
		return o.Owner
	}
	return holder
}

// loadOwners reads the owner records, after the roots.
func (d *Driver) loadOwners() error {
	for id, r := range d.roots {
		if r.Options.Husk {
			d.owned.husk(id)
		}
	}
	return d.maps.Scan([]byte(ownerPrefix), func(key, value []byte) error {
		id, err := uuid.Parse(strings.TrimPrefix(string(key), ownerPrefix))
		var o ownership
		if err := errors.Join(err, json.Unmarshal(value, &o)); err != nil {
			return fmt.Errorf("load the owner of snapshot %s: %w", key, errors.Join(blockio.ErrCorrupt, err))
		}
		if _, ok := d.roots[o.Holder]; ok { // else it is being deleted, and the record with it
			d.owned.set(id, o)
		}
		return nil
	})
}

// openHolders opens the volumes whose snapshots others own: whoever asks what is a clone of what needs to know them.
func (d *Driver) openHolders(ctx context.Context) error {
	d.mu.RLock()
	ids := make([]uuid.UUID, 0, len(d.owned.held))
	for id := range d.owned.held {
		ids = append(ids, id)
	}
	for id := range d.owned.husks {
		ids = append(ids, id)
	}
	d.mu.RUnlock()
	for _, id := range ids {
		if _, err := d.volume(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

// origin is a snapshot that a volume is a clone of.
type origin struct {
	holder, snapshot uuid.UUID
}

// snapshotsOn gives what a volume has on a handle up to a generation and log sequence, newest first, but for leaves.
func (v *Volume) snapshotsOn(at mapPoint, seq uint64) []*snapshot {
	v.mu.RLock()
	defer v.mu.RUnlock()
	var out []*snapshot
	for _, s := range v.snaps {
		if s.Handle == at.handle && s.Gen != 0 && !s.Base && !s.Rewound && (s.Gen < at.gen || s.Gen == at.gen && s.Seq <= seq) {
			out = append(out, s)
		}
	}
	slices.SortStableFunc(out, func(a, b *snapshot) int { return cmp.Or(cmp.Compare(b.Gen, a.Gen), cmp.Compare(b.Seq, a.Seq)) })
	return out
}

// ancestorsLocked calls fn for the snapshots that a point of a volume's map descends from, nearest first, until it gives false. Of a
// volume that is not open it knows the snapshot through which it came only; it owns all it holds. mu is held.
func (d *Driver) ancestorsLocked(id uuid.UUID, at mapPoint, seq uint64, fn func(holder uuid.UUID, snapshot uuid.UUID) bool) {
	first := uuid.Nil // of the equals at a point, the one that the child names
	for range len(d.volumes) + len(d.roots) + 1 {
		v, r, ok := d.volumes[id], root{}, false
		if v != nil {
			v.mu.RLock()
			r = v.root
			v.mu.RUnlock()
		} else if r, ok = d.roots[id]; !ok {
			return
		}
		if first != uuid.Nil && !fn(id, first) {
			return
		}
		for at.handle != 0 {
			i := slices.IndexFunc(r.Branches, func(b branch) bool { return b.Handle == at.handle })
			if i < 0 {
				break // it is the parent's
			}
			if v != nil {
				for _, s := range v.snapshotsOn(at, seq) {
					if s.ID != first && !fn(id, s.ID) {
						return
					}
				}
			}
			at, seq = mapPoint{r.Branches[i].Parent, r.Branches[i].Gen}, math.MaxUint64
		}
		if at.handle == 0 || r.Parent == nil {
			return
		}
		id, first, seq = r.Parent.Volume, r.Parent.Snapshot, r.Parent.Seq
	}
}

// originLocked says what a volume is a clone of. mu is held.
func (d *Driver) originLocked(id uuid.UUID) (o origin, ok bool) {
	v, r := d.volumes[id], root{}
	if v != nil {
		v.mu.RLock()
		r = v.root
		v.mu.RUnlock()
	} else if r, ok = d.roots[id]; !ok {
		return o, false
	}
	if d.owned.held[id] == 0 {
		if r.Parent == nil {
			return o, false
		}
		if _, moved := d.owned.of[r.Parent.Snapshot]; !moved {
			return origin{r.Parent.Volume, r.Parent.Snapshot}, true
		}
	}
	ok = false
	d.ancestorsLocked(id, mapPoint{r.Handle, math.MaxUint32}, math.MaxUint64, func(holder, snapshot uuid.UUID) bool {
		if owner := d.owned.owner(holder, snapshot); owner != id && owner != uuid.Nil {
			o, ok = origin{holder, snapshot}, true
		}
		return !ok
	})
	return o, ok
}

// clonesLocked counts, by snapshot, the volumes that are a clone of it. mu is held.
func (d *Driver) clonesLocked() map[uuid.UUID]int {
	if d.owned.none() {
		return d.children
	}
	out := make(map[uuid.UUID]int)
	count := func(id uuid.UUID) {
		if _, husk := d.owned.husks[id]; husk {
			return
		}
		if o, ok := d.originLocked(id); ok {
			out[o.snapshot]++
		}
	}
	for id := range d.volumes {
		count(id)
	}
	for id := range d.roots {
		count(id)
	}
	return out
}

// adopted is a snapshot that a volume owns and another one holds.
type adopted struct {
	holder *Volume
	s      *snapshot
}

// adoptedLocked gives those of a volume, oldest first. mu is held.
func (d *Driver) adoptedLocked(id uuid.UUID) []adopted {
	var out []adopted
	for sid := range d.owned.owners[id] {
		h := d.volumes[d.owned.of[sid].Holder]
		if h == nil || h.id == id {
			continue
		}
		h.mu.RLock()
		if i := slices.IndexFunc(h.snaps, func(s *snapshot) bool { return s.ID == sid }); i >= 0 {
			out = append(out, adopted{h, h.snaps[i]})
		}
		h.mu.RUnlock()
	}
	slices.SortFunc(out, func(a, b adopted) int { // an ancestor's map is older
		return cmp.Or(cmp.Compare(a.s.Handle, b.s.Handle), cmp.Compare(a.s.Gen, b.s.Gen), cmp.Compare(a.s.Seq, b.s.Seq), bytes.Compare(a.s.ID[:], b.s.ID[:]))
	})
	return out
}

// holder gives the volume that holds a snapshot which people find at volume id.
func (d *Driver) holder(ctx context.Context, id, snapshot uuid.UUID) (*Volume, error) {
	d.mu.RLock()
	o, moved := d.owned.of[snapshot]
	d.mu.RUnlock()
	if moved && o.Owner != id {
		return nil, fmt.Errorf("snapshot %s of volume %s: %w", snapshot, id, ErrUnknownSnapshot)
	}
	if moved {
		id = o.Holder
	}
	return d.volume(ctx, id)
}

// owns says whether the volume owns a snapshot that it holds.
func (v *Volume) owns(snapshot uuid.UUID) bool {
	v.d.mu.RLock()
	defer v.d.mu.RUnlock()
	return v.d.owned.owner(v.id, snapshot) == v.id
}

// lockSnapping keeps the lists of snapshots of volumes as they are until unlock is called.
func lockSnapping(vs ...*Volume) (unlock func()) {
	vs = slices.Clone(vs)
	slices.SortFunc(vs, func(a, b *Volume) int { return bytes.Compare(a.id[:], b.id[:]) })
	vs = slices.Compact(vs)
	for _, v := range vs {
		v.snapping.Lock()
	}
	return func() {
		for _, v := range vs {
			v.snapping.Unlock()
		}
	}
}

// Lineage says what a volume is a clone of.
type Lineage struct {
	Volume           uuid.UUID
	Parent, Snapshot uuid.UUID // Nil: of nothing
}

// Promote makes a clone the owner of its parent's snapshots up to the one that it began as, and its parent a clone of it. It copies
// nothing, and is durable when it returns. from is the snapshot that the volume is known to be a clone of: if the volume owns it by now,
// nothing is done. What is given is of what the volume is a clone now, and of the volumes that are clones of it. ErrNoParent if it is
// no clone; ErrSnapshotExists if it has a snapshot of the same name as one that it would get; ErrReadOnly if the parent is a template.
func (d *Driver) Promote(ctx context.Context, v *Volume, from uuid.UUID) ([]Lineage, error) {
	d.promoting.Lock()
	defer d.promoting.Unlock()
	out, err := d.promote(ctx, v, from)
	if err != nil {
		return nil, fmt.Errorf("promote volume %s: %w", v.id, err)
	}
	return out, nil
}

func (d *Driver) promote(ctx context.Context, v *Volume, from uuid.UUID) ([]Lineage, error) {
	if err := d.openAncestors(ctx, v); err != nil {
		return nil, err
	}
	d.mu.RLock()
	o, ok := d.originLocked(v.id)
	rec, moved := d.owned.of[from]
	owner := d.owned.owner(o.holder, o.snapshot)
	d.mu.RUnlock()
	switch {
	case moved && rec.Owner == v.id:
		return d.lineages(v.id), nil
	case !ok || v.husk.Load():
		return nil, ErrNoParent
	case from != uuid.Nil && from != o.snapshot:
		return nil, fmt.Errorf("it is a clone of snapshot %s, not %s: %w", o.snapshot, from, ErrUnknownSnapshot)
	}
	old, err := d.volume(ctx, owner)
	if err != nil {
		return nil, err
	}
	if old.Template() {
		return nil, fmt.Errorf("its parent %s is a template, which stays what others are made from: %w", owner, blockio.ErrReadOnly)
	}
	d.mu.RLock()
	volumes := []*Volume{v, old}
	for _, t := range d.takenLocked(o, owner) {
		volumes = append(volumes, d.volumes[t.holder])
	}
	d.mu.RUnlock()
	defer lockSnapping(volumes...)()
	err = v.changeOwners(func(*root) (map[uuid.UUID]ownership, error) { return d.handOverLocked(v, o, owner) })
	if err != nil {
		return nil, err
	}
	d.rootChanged(old)
	return d.lineages(v.id), nil
}

// changeOwners changes owner records and the volume's root, which look has edited, as one: durably first, then for all who ask. look gives
// the records, nil if nothing is to be changed; what it has seen with d.mu held stays so until the change is known.
func (v *Volume) changeOwners(look func(*root) (map[uuid.UUID]ownership, error)) error {
	d := v.d
	v.storing.Lock()
	defer v.storing.Unlock()
	d.mu.Lock()
	defer d.mu.Unlock()
	r := v.stored
	set, err := look(&r)
	if err != nil || set == nil {
		return err
	}
	r.Name.N++
	r.Name.Put = false
	puts := []blockmap.KV{r.encode()}
	for id, o := range set {
		puts = append(puts, o.encode(id))
	}
	if err := d.maps.Update(puts, nil); err != nil {
		return fmt.Errorf("store whose %d snapshots are: %w", len(set), err)
	}
	v.stored = r
	for id, o := range set {
		d.owned.set(id, o)
	}
	if r.Options.Husk {
		v.template.Store(false)
		v.husk.Store(true)
		d.owned.husk(v.id)
	}
	v.mu.Lock()
	v.root.Options, v.root.Template, v.root.Name = r.Options, r.Template, r.Name
	v.mu.Unlock()
	d.destager.add(v)
	return nil
}

// openAncestors opens the volumes that a volume's map descends from.
func (d *Driver) openAncestors(ctx context.Context, v *Volume) error {
	for range d.Stats().Volumes + 1 {
		v.mu.RLock()
		p := v.root.Parent
		v.mu.RUnlock()
		if p == nil {
			return nil
		}
		var err error
		if v, err = d.volume(ctx, p.Volume); err != nil {
			return err
		}
	}
	return nil
}

// takenLocked gives what a promotion over origin o, which owner owns, hands over. mu is held; the ancestors are open.
func (d *Driver) takenLocked(o origin, owner uuid.UUID) []origin {
	h := d.volumes[o.holder]
	s, err := h.findSnapshot(o.snapshot)
	if err != nil {
		return nil
	}
	out := []origin{o}
	d.ancestorsLocked(o.holder, s.point(), s.Seq, func(holder, snapshot uuid.UUID) bool {
		if snapshot != o.snapshot && d.volumes[holder] != nil && d.owned.owner(holder, snapshot) == owner {
			out = append(out, origin{holder, snapshot})
		}
		return true
	})
	return out
}

// handOverLocked gives the owner records that make v the owner. The lists of snapshots stand still; mu is held.
func (d *Driver) handOverLocked(v *Volume, o origin, owner uuid.UUID) (map[uuid.UUID]ownership, error) {
	if now, ok := d.originLocked(v.id); !ok || now != o || d.owned.owner(o.holder, o.snapshot) != owner {
		return nil, fmt.Errorf("its parent has changed meanwhile: %w", blockio.ErrBusy)
	}
	n := uint64(max(d.now().UnixNano(), 1))
	taken := d.takenLocked(o, owner)
	names := d.namesLocked(v)
	if len(taken) == 0 || len(names)+len(taken) > snapshotsMax {
		return nil, fmt.Errorf("%d snapshots to take over, it has %d, at most %d: %w", len(taken), len(names), snapshotsMax, blockio.ErrBusy)
	}
	for _, t := range taken {
		s, err := d.volumes[t.holder].findSnapshot(t.snapshot)
		if err != nil {
			return nil, err
		}
		if names[s.Name] {
			return nil, fmt.Errorf("it has a snapshot %s, and so has its parent: rename one: %w", s.Name, ErrSnapshotExists)
		}
		n = max(n, d.owned.of[t.snapshot].N+1)
	}
	set := make(map[uuid.UUID]ownership)
	for _, t := range taken {
		set[t.snapshot] = ownership{Holder: t.holder, Owner: v.id, N: n}
	}
	return set, nil
}

// namesLocked gives the names of the snapshots that a volume owns. mu is held.
func (d *Driver) namesLocked(v *Volume) map[string]bool {
	names := make(map[string]bool)
	v.mu.RLock()
	for _, s := range v.snaps {
		if d.owned.owner(v.id, s.ID) == v.id {
			names[s.Name] = true
		}
	}
	v.mu.RUnlock()
	for _, a := range d.adoptedLocked(v.id) {
		names[a.s.Name] = true
	}
	return names
}

// Lineage says what a volume is a clone of: a rollback may change it once there has been a promotion.
func (d *Driver) Lineage(ctx context.Context, v *Volume) (Lineage, error) {
	if err := d.openAncestors(ctx, v); err != nil {
		return Lineage{}, fmt.Errorf("lineage of volume %s: %w", v.id, err)
	}
	l := Lineage{Volume: v.id}
	l.Parent, l.Snapshot, _ = v.Parent()
	return l, nil
}

// lineages says of what a volume is a clone, and which are clones of it.
func (d *Driver) lineages(id uuid.UUID) []Lineage {
	d.mu.RLock()
	defer d.mu.RUnlock()
	var out []Lineage
	add := func(of uuid.UUID) {
		if _, husk := d.owned.husks[of]; husk {
			return
		}
		o, ok := d.originLocked(of)
		l := Lineage{Volume: of}
		if ok {
			l.Parent, l.Snapshot = d.owned.owner(o.holder, o.snapshot), o.snapshot
		}
		if of == id || l.Parent == id {
			out = append(out, l)
		}
	}
	for of := range d.volumes {
		add(of)
	}
	for of := range d.roots {
		add(of)
	}
	slices.SortFunc(out, func(a, b Lineage) int { return bytes.Compare(a.Volume[:], b.Volume[:]) })
	return out
}

// leaveHusk makes a husk of a volume that is to be deleted and holds what others need; left says that it has, or that it is one.
func (d *Driver) leaveHusk(ctx context.Context, id uuid.UUID) (left bool, err error) {
	d.promoting.Lock()
	defer d.promoting.Unlock()
	v, err := d.volume(ctx, id)
	if errors.Is(err, ErrUnknownVolume) {
		return false, nil
	}
	if err != nil || v.husk.Load() {
		return err == nil, err
	}
	volumes := []*Volume{v}
	d.mu.RLock()
	for _, a := range d.adoptedLocked(id) {
		volumes = append(volumes, a.holder)
	}
	d.mu.RUnlock()
	defer lockSnapping(volumes...)()
	err = v.changeOwners(func(r *root) (map[uuid.UUID]ownership, error) {
		need, set, err := d.huskLocked(v)
		if !need || err != nil {
			return nil, err
		}
		r.Options.Husk, r.Options.Rewind, r.Template = true, 0, false
		return set, nil
	})
	if err != nil {
		return false, fmt.Errorf("delete volume %s: %w", id, err)
	}
	if !v.husk.Load() {
		return false, nil
	}
	v.order.Lock()
	v.freed.Broadcast()
	v.order.Unlock()
	for _, h := range volumes[1:] {
		d.rootChanged(h)
	}
	return true, nil
}

// huskLocked says whether a volume that is to be deleted has to stay as a husk, and what is nobody's then. mu is held.
func (d *Driver) huskLocked(v *Volume) (need bool, set map[uuid.UUID]ownership, err error) {
	clones := d.clonesLocked()
	set = make(map[uuid.UUID]ownership)
	v.mu.RLock()
	for _, s := range v.snaps {
		switch {
		case s.Base:
		case d.owned.owner(v.id, s.ID) != v.id:
			need = true
		case clones[s.ID] > 0:
			err = fmt.Errorf("its snapshot %s has %d clones: %w", s.Name, clones[s.ID], ErrInUse)
		default:
			need = need || d.children[s.ID] > 0
			set[s.ID] = ownership{Holder: v.id, N: d.owned.of[s.ID].N + 1}
		}
	}
	v.mu.RUnlock()
	for _, a := range d.adoptedLocked(v.id) {
		if clones[a.s.ID] > 0 {
			err = fmt.Errorf("its snapshot %s has %d clones: %w", a.s.Name, clones[a.s.ID], ErrInUse)
		}
		set[a.s.ID] = ownership{Holder: a.holder.id, N: d.owned.of[a.s.ID].N + 1}
	}
	return need, set, err
}

// disownLocked makes what a volume owns at others nobody's, in memory, and gives who holds it; ErrInUse if there are clones of it. mu is
// held.
func (d *Driver) disownLocked(id uuid.UUID) (holders []*Volume, err error) {
	all := d.adoptedLocked(id)
	if len(all) == 0 {
		return nil, nil
	}
	clones := d.clonesLocked()
	for _, a := range all {
		if n := clones[a.s.ID]; n > 0 {
			return nil, fmt.Errorf("delete volume %s: its snapshot %s has %d clones: %w", id, a.s.Name, n, ErrInUse)
		}
	}
	for _, a := range all {
		d.owned.set(a.s.ID, ownership{Holder: a.holder.id, N: d.owned.of[a.s.ID].N + 1})
		holders = append(holders, a.holder)
	}
	return holders, nil
}

// nobodys gives the owner records of what is nobody's.
func (d *Driver) nobodys() []blockmap.KV {
	d.mu.RLock()
	defer d.mu.RUnlock()
	var puts []blockmap.KV
	for id := range d.owned.owners[uuid.Nil] {
		puts = append(puts, d.owned.of[id].encode(id))
	}
	return puts
}

// sweep gives back what is nobody's and not needed any more, and husks that hold nothing. It can be repeated at any time.
func (d *Driver) sweep(ctx context.Context) error {
	d.sweeping.Lock()
	defer d.sweeping.Unlock()
	for {
		d.mu.RLock()
		var volumes []*Volume
		for id, v := range d.volumes {
			if _, husk := d.owned.husks[id]; husk || d.owned.held[id] > 0 {
				volumes = append(volumes, v)
			}
		}
		d.mu.RUnlock()
		again := false
		for _, v := range volumes {
			did, err := v.sweep(ctx)
			if err != nil {
				return fmt.Errorf("give back what volume %s holds for nobody: %w", v.id, err)
			}
			again = again || did
		}
		if !again {
			return nil
		}
	}
}

// sweep does it for one volume, and says whether that may have set something else free.
func (v *Volume) sweep(ctx context.Context) (did bool, err error) {
	d, husk := v.d, v.husk.Load()
	if husk {
		if err := v.empty(ctx); err != nil {
			return false, err
		}
		if err := v.dropBases(ctx); err != nil {
			return false, err
		}
	}
	var free []uuid.UUID
	var stale [][]byte
	d.mu.Lock()
	for snapshot := range d.owned.owners[uuid.Nil] {
		switch {
		case d.owned.of[snapshot].Holder != v.id:
		case !v.has(snapshot):
			stale = append(stale, ownerKey(snapshot))
			d.owned.remove(snapshot)
		case d.children[snapshot] == 0:
			free = append(free, snapshot)
		}
	}
	d.mu.Unlock()
	if len(stale) > 0 {
		if err := d.maps.Update(nil, stale); err != nil {
			return false, err
		}
	}
	for _, snapshot := range free {
		if err := v.dropSnapshot(ctx, snapshot, uuid.Nil); err != nil && !errors.Is(err, ErrUnknownSnapshot) {
			return did, err
		}
		did = true
	}
	v.mu.RLock()
	holds := len(v.snaps)
	v.mu.RUnlock()
	if husk && holds == 0 {
		return true, d.deleteNow(ctx, v.id)
	}
	return did, nil
}

// has says whether the volume holds a snapshot, logged or not.
func (v *Volume) has(id uuid.UUID) bool {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return slices.ContainsFunc(v.snaps, func(s *snapshot) bool { return s.ID == id })
}

// empty makes a husk zero bytes long: whatever only its head has seen is garbage then.
func (v *Volume) empty(ctx context.Context) error {
	w := newWaiter()
	for end := time.Now().Add(snapshotTriesFor); ; {
		v.order.Lock()
		size, gated, closed := v.size, v.gated || len(v.claims) > 0, v.closed
		var err error
		if size > 0 && !gated && !closed {
			err = v.d.wal.Append(writelog.Record{Volume: v.id, Seq: v.seq + 1, Kind: writelog.Size}, nil, v, false, w, 0)
			if err == nil {
				v.seq++
				v.size = 0
			}
		}
		v.order.Unlock()
		switch {
		case size == 0:
			return nil
		case closed:
			return blockio.ErrClosed
		case !gated && err == nil:
			v.d.wal.Kick()
			if err := w.wait(); err != nil {
				return err
			}
			v.d.rootChanged(v)
			return v.Flush(ctx)
		case err != nil && !errors.Is(err, blockio.ErrBusy):
			return err
		case ctx.Err() != nil || time.Now().After(end):
			return errors.Join(blockio.ErrBusy, ctx.Err())
		}
		v.d.wal.Kick()
		time.Sleep(time.Millisecond)
	}
}
