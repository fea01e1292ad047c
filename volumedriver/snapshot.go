package volumedriver

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver/blockio"
	"varve/volumedriver/blockmap"
	"varve/volumedriver/sco"
	"varve/volumedriver/writelog"
)

// # Snapshots
//
// A snapshot is a mark in the volume's log: it holds every write accepted before the mark, and none after. Taking one costs
// a small record in the map store and a sync of the log, whatever the size of the volume.
//
//	Snapshot   record {id, name, …} -> map store, synced; mark with the record's token -> log, synced: it exists
//	cut        a snapshot ends an SCO's range, and is sealed at once
//	install    map := SCO; then at once, durably: generation of the map g frozen, root.Backed = the mark, record.Gen = g
//	           from here on it can be read and cloned (it is "backed")
//	crash      a record whose mark is not in the log and that has no generation was never acknowledged: it is dropped
//
// The generation is frozen together with the root that has everything up to the mark, so redo after a crash never meets a
// leaf of a later generation than the root's.
//
// releaseKey records say what is still to be given back after a crash: a generation, or with generation 0 the head of a line
// that a rollback has left.
//
// A map handle is a line of generations. A rollback and a clone fork a new line from a frozen generation, O(1). A generation
// stays as long as a snapshot, a fork of this volume (root.Branches), or an open reader needs it; a clone's parent snapshot
// cannot be deleted.

// ErrInUse: the snapshot or volume still has clones.
var ErrInUse = errors.New("in use by clones")

// ErrSnapshotExists: the volume has a snapshot of that name or identity.
var ErrSnapshotExists = errors.New("snapshot exists")

// ErrUnknownSnapshot: the volume has no such snapshot.
var ErrUnknownSnapshot = errors.New("unknown snapshot")

// SnapshotSpec is what people say of a snapshot.
type SnapshotSpec struct {
	ID         uuid.UUID         `json:"id"`
	Name       string            `json:"name"` // unique in its volume, [A-Za-z0-9._:+-], at most 255 bytes
	Created    time.Time         `json:"created"`
	Consistent bool              `json:"consistent,omitempty"` // the guest's file systems were quiet
	Automatic  bool              `json:"automatic,omitempty"`  // by a schedule
	Sticky     bool              `json:"sticky,omitempty"`     // retention leaves it alone
	Labels     map[string]string `json:"labels,omitempty"`
	Base       bool              `json:"base,omitempty"` // of the rewind window: the driver's own, which nobody sees
}

// Snapshot is a snapshot of a volume.
type Snapshot struct {
	SnapshotSpec
	Seq    uint64 // the volume's log sequence that it stands at
	Size   int64  // of the volume then, in bytes
	Used   int64  // bytes that storage stands behind, when Backed
	Backed bool   // all of it is on the backend: it can be read and cloned
	Clones int
}

const (
	snapshotsMax     = 65536
	snapshotSpecMax  = 3 << 10
	snapshotTriesFor = 10 * time.Second
)

func (s *SnapshotSpec) check() error {
	if s.ID == uuid.Nil {
		return errors.New("snapshot without an id")
	}
	if !s.Base && !validSnapshotName(s.Name) {
		return fmt.Errorf("snapshot name %q: 1 to 255 of A-Z a-z 0-9 . _ : + -, not beginning with a dot", s.Name)
	}
	b, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("snapshot %s: %w", s.Name, err)
	}
	if len(s.Labels) > sco.MaxLabels || len(b) > snapshotSpecMax {
		return fmt.Errorf("snapshot %s: %d labels and %d bytes in all, more than %d or %d", s.Name, len(s.Labels), len(b), sco.MaxLabels, snapshotSpecMax)
	}
	return nil
}

func validSnapshotName(s string) bool {
	if s == "" || len(s) > 255 || s[0] == '.' {
		return false
	}
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '.', c == '_', c == ':', c == '+', c == '-':
		default:
			return false
		}
	}
	return true
}

// token names the snapshot in its log record.
func (s *SnapshotSpec) token() uint64 { return binary.LittleEndian.Uint64(s.ID[:8]) }

// snapshot is the record of a snapshot in the map store. It is never changed in memory, only replaced.
type snapshot struct {
	SnapshotSpec
	Seq        uint64          `json:"seq,omitempty"` // 0: not known to be logged
	Size       int64           `json:"size,omitempty"`
	ModTime    int64           `json:"mod_time,omitempty"`
	UsedBlocks int64           `json:"used_blocks,omitempty"`
	Handle     blockmap.Handle `json:"handle,omitempty"`
	Gen        uint32          `json:"gen,omitempty"`     // 0: not yet in the map
	Rewound    bool            `json:"rewound,omitempty"` // made by a rewind, without a mark: nothing descends from it but what was cloned from it
}

func (s *snapshot) point() mapPoint { return mapPoint{s.Handle, s.Gen} }

// mapPoint is a frozen generation of a handle.
type mapPoint struct {
	handle blockmap.Handle
	gen    uint32
}

// mark is a snapshot in a job.
type mark struct {
	seq   uint64
	token uint64
	data  []byte // for the SCO
}

func (s *snapshot) encode(volume uuid.UUID) blockmap.KV {
	b, err := json.Marshal(s)
	if err != nil {
		panic(fmt.Sprintf("encode snapshot %s: %v", s.ID, err)) // strings and numbers
	}
	return blockmap.KV{Key: snapshotKey(volume, s.ID), Value: b}
}

// open makes the volume of a root, with its snapshots.
func (d *Driver) open(r root) (*Volume, error) {
	v := newVolume(d, r)
	err := d.maps.Scan(snapshotsKey(r.ID), func(_, value []byte) error {
		s := new(snapshot)
		if err := json.Unmarshal(value, s); err != nil {
			return fmt.Errorf("snapshot of volume %s: %w", r.ID, err)
		}
		v.snaps = append(v.snaps, s)
		return nil
	})
	if err != nil {
		return nil, err
	}
	v.sortSnapshots()
	return v, nil
}

// sortSnapshots puts them in the order of their age; those not logged yet last.
func (v *Volume) sortSnapshots() {
	slices.SortStableFunc(v.snaps, func(a, b *snapshot) int { return cmp.Compare(a.Seq-1, b.Seq-1) })
}

// settleSnapshots ends, after the log was replayed, what a crash has interrupted.
func (d *Driver) settleSnapshots() error {
	for _, v := range d.volumes {
		if err := v.dropAborted(); err != nil {
			return err
		}
	}
	return d.settleReleases(context.Background())
}

// settleReleases gives back what release records tell of.
func (d *Driver) settleReleases(ctx context.Context) error {
	var rest []mapPoint
	var of []uuid.UUID
	err := d.maps.Scan([]byte(releasePrefix), func(key, value []byte) error {
		id, err := uuid.FromBytes(value)
		k := bytes.TrimPrefix(key, []byte(releasePrefix))
		if err != nil || len(k) != 8 {
			return fmt.Errorf("release record %q: %w", key, blockio.ErrCorrupt)
		}
		rest = append(rest, mapPoint{blockmap.Handle(binary.BigEndian.Uint32(k)), binary.BigEndian.Uint32(k[4:])})
		of = append(of, id)
		return nil
	})
	if err != nil {
		return err
	}
	for i, p := range rest {
		v, err := d.volume(ctx, of[i])
		if errors.Is(err, ErrUnknownVolume) {
			err = d.maps.Update(nil, [][]byte{releaseKey(p)}) // the volume was deleted
		} else if err == nil {
			v.snapping.Lock()
			err = v.release(p)
			v.snapping.Unlock()
		}
		if err != nil {
			return fmt.Errorf("release what deleted snapshots of volume %s held: %w", of[i], err)
		}
	}
	return nil
}

// dropAborted drops the records of snapshots that never were: they have no mark in the log.
func (v *Volume) dropAborted() error {
	var gone [][]byte
	v.mu.Lock()
	v.snaps = slices.DeleteFunc(v.snaps, func(s *snapshot) bool {
		if s.Seq == 0 {
			gone = append(gone, snapshotKey(v.id, s.ID))
		}
		return s.Seq == 0
	})
	v.mu.Unlock()
	if gone == nil {
		return nil
	}
	return v.d.maps.Update(nil, gone)
}

// replaceLocked puts s in place of the snapshot of the same identity. mu is held.
func (v *Volume) replaceLocked(s *snapshot) {
	for i, old := range v.snaps {
		if old.ID == s.ID {
			v.snaps[i] = s
		}
	}
}

// snapshotLoggedLocked notes where a snapshot stands. mu is held.
func (v *Volume) snapshotLoggedLocked(l *writelog.Logged, size int64) {
	v.destage.marks++
	for i := len(v.snaps) - 1; i >= 0; i-- {
		s := v.snaps[i]
		if s.token() != l.Value || s.Seq != 0 {
			continue
		}
		now := *s
		now.Seq, now.Size, now.ModTime = l.Seq, size, v.modTime
		v.snaps[i] = &now
		v.sortSnapshots()
		return
	}
}

// markLocked describes the snapshot of a log record for its SCO. mu is held.
func (v *Volume) markLocked(r *record) mark {
	m := mark{seq: r.seq, token: r.value}
	for _, s := range v.snaps {
		if s.Seq == r.seq {
			b, err := json.Marshal(&s.SnapshotSpec)
			if err == nil {
				m.data = b
			}
		}
	}
	return m
}

// snapshotAtLocked finds the snapshot that stands at a log sequence; nil if there is none. mu is held.
func (v *Volume) snapshotAtLocked(seq uint64) *snapshot {
	for _, s := range v.snaps {
		if s.Seq == seq {
			return s
		}
	}
	return nil
}

// size is the volume's at the snapshot, or what it was if there is no snapshot.
func (s *snapshot) size(otherwise int64) int64 {
	if s == nil {
		return otherwise
	}
	return s.Size
}

// installCut ends the installation of a job that ends with snapshots, or is a rollback: what the map says now is frozen.
func (v *Volume) installCut(j *job, used int64) error {
	v.storing.Lock()
	v.mu.RLock()
	r, old := v.root, v.root.Handle
	r.Backed, r.Size, r.ModTime, r.Prev = j.last, j.size, j.modTime, j.id
	r.UsedBlocks += used
	r.keepEdited(&v.stored)
	r.Name.N++ // the root object lists the snapshots
	r.Name.Put = false
	var now []*snapshot
	for _, m := range j.marks {
		if s := v.snapshotAtLocked(m.seq); s != nil {
			frozen := *s
			frozen.Handle, frozen.UsedBlocks = r.Handle, r.UsedBlocks
			now = append(now, &frozen)
		}
	}
	target := v.snapshotAtLocked(j.revert)
	v.mu.RUnlock()
	var err error
	if j.revert != 0 {
		err = v.fork(&r, target)
	} else {
		err = v.freeze(&r, now)
	}
	if err != nil {
		v.storing.Unlock()
		return fmt.Errorf("freeze sco %d-%d: %w", j.id.Epoch, j.id.Seq, err)
	}
	v.stored = r
	v.mu.Lock()
	v.installedLocked(j, used)
	v.root.Handle, v.root.Branches, v.root.UsedBlocks, v.root.Name = r.Handle, r.Branches, r.UsedBlocks, r.Name
	for _, s := range now {
		v.replaceLocked(s)
	}
	v.head.Store(uint32(r.Handle))
	clean := v.logged.Load() == j.last
	v.mu.Unlock()
	v.storing.Unlock()
	if j.revert != 0 {
		v.endRevert(j.size)
		if err := v.behead(mapPoint{handle: old}); err != nil {
			return err
		}
	}
	v.installEnd(j, clean)
	v.d.destager.add(v)
	return nil
}

// freeze makes the map of the volume, the root r and the snapshots durable together, as a generation that stays.
func (v *Volume) freeze(r *root, now []*snapshot) error {
	gen, err := v.d.maps.Generation(r.Handle) // only installs move it, one at a time
	if err != nil {
		return err
	}
	puts := []blockmap.KV{r.encode()}
	for _, s := range now {
		s.Gen = gen
		puts = append(puts, s.encode(v.id))
	}
	_, err = v.d.maps.Freeze(r.Handle, puts)
	return err
}

// rootObject is what the backend is told of the volume.
func (v *Volume) rootObject(r *root) sco.Root {
	o := sco.Root{Volume: v.id, Epoch: r.epoch(), N: r.Name.N, Pool: r.Pool, PoolName: r.Name.PoolName, Path: r.Name.Path,
		Kind: r.Name.Kind, Size: v.Size(), Created: r.Name.Created, BlockSize: blockSize, Template: r.Template,
		Keys: r.Keys, Options: r.Options.encode()}
	if p := r.Parent; p != nil {
		o.Parent = &sco.RootParent{Volume: p.Volume, Snapshot: p.Snapshot, Seq: p.Seq, Base: p.Base}
	}
	for _, e := range r.Epochs {
		s := sco.RootSpan{From: e.From, Epoch: e.Epoch, Volume: e.Volume}
		if s.Volume == uuid.Nil {
			s.Volume = v.id
		}
		o.Spans = append(o.Spans, s)
	}
	v.d.mu.RLock()
	defer v.d.mu.RUnlock()
	for id := range v.d.owned.owners[v.id] {
		o.Owns = append(o.Owns, sco.RootOwned{Snapshot: id, N: v.d.owned.of[id].N})
	}
	v.mu.RLock()
	defer v.mu.RUnlock()
	o.AtLog = v.logged.Load()
	for _, s := range v.snaps {
		if s.Seq != 0 && !s.Base {
			o.Snapshots = append(o.Snapshots, sco.RootSnapshot{ID: s.ID, Name: s.Name, Seq: s.Seq, Created: s.Created.UnixNano(),
				Size: s.Size, Consistent: s.Consistent, Automatic: s.Automatic, Sticky: s.Sticky, Labels: s.Labels,
				Nobodys: v.d.owned.owner(v.id, s.ID) == uuid.Nil})
		}
	}
	return o
}

// specOf undoes rootObject for one snapshot.
func specOf(s sco.RootSnapshot) SnapshotSpec {
	return SnapshotSpec{ID: s.ID, Name: s.Name, Created: time.Unix(0, s.Created).UTC(), Consistent: s.Consistent,
		Automatic: s.Automatic, Sticky: s.Sticky, Labels: s.Labels}
}

// member is a volume of which a snapshot is taken.
type member struct {
	v    *Volume
	spec SnapshotSpec
}

// GroupMember says which snapshot of which volume is part of a consistent cut.
type GroupMember struct {
	Volume uuid.UUID
	Spec   SnapshotSpec
}

// Snapshot takes a snapshot of what was accepted until now. It is durable when it returns.
func (v *Volume) Snapshot(ctx context.Context, s SnapshotSpec) (Snapshot, error) {
	out, err := v.d.snapshot(ctx, []member{{v, s}})
	if err != nil {
		return Snapshot{}, fmt.Errorf("snapshot %s of volume %s: %w", s.Name, v.id, err)
	}
	return out[0], nil
}

// SnapshotGroup takes a snapshot of each volume, all at one point in time: a write that is in one of them, and everything
// that was acknowledged before it on any of the volumes, is in. After a crash in between some may exist and others not.
func (d *Driver) SnapshotGroup(ctx context.Context, group []GroupMember) ([]Snapshot, error) {
	members := make([]member, len(group))
	for i, g := range group {
		v, err := d.Volume(ctx, g.Volume)
		if err != nil {
			return nil, fmt.Errorf("snapshot of a group: %w", err)
		}
		members[i] = member{v, g.Spec}
	}
	out, err := d.snapshot(ctx, members)
	if err != nil {
		return nil, fmt.Errorf("snapshot of a group of %d volumes: %w", len(group), err)
	}
	return out, nil
}

// snapshot takes snapshots at one point in time, in the order given.
func (d *Driver) snapshot(ctx context.Context, members []member) ([]Snapshot, error) {
	order := slices.Clone(members)
	slices.SortFunc(order, func(a, b member) int { return bytes.Compare(a.v.id[:], b.v.id[:]) })
	for i := range order {
		if i > 0 && order[i].v == order[i-1].v {
			return nil, fmt.Errorf("volume %s is in the group twice", order[i].v.id)
		}
	}
	for _, m := range order {
		m.v.snapping.Lock()
		defer m.v.snapping.Unlock()
	}
	var puts []blockmap.KV
	for _, m := range order {
		s, err := m.v.newSnapshot(m.spec)
		if err != nil {
			return nil, err
		}
		puts = append(puts, s.encode(m.v.id))
	}
	if err := d.maps.Put(puts, true); err != nil {
		return nil, err
	}
	for _, m := range order {
		m.v.mu.Lock()
		m.v.snaps = append(m.v.snaps, &snapshot{SnapshotSpec: m.spec})
		m.v.mu.Unlock()
	}
	if err := d.appendMarks(ctx, order); err != nil {
		for _, m := range order {
			m.v.mu.Lock()
			m.v.snaps = slices.DeleteFunc(m.v.snaps, func(s *snapshot) bool { return s.ID == m.spec.ID && s.Gen == 0 })
			m.v.mu.Unlock()
		}
		var keys [][]byte
		for _, m := range order {
			keys = append(keys, snapshotKey(m.v.id, m.spec.ID))
		}
		return nil, errors.Join(err, d.maps.Update(nil, keys))
	}
	out := make([]Snapshot, len(members))
	for i, m := range members {
		s, err := m.v.findSnapshot(m.spec.ID)
		if err != nil {
			return nil, err
		}
		out[i] = m.v.describe(s)
	}
	return out, nil
}

// newSnapshot checks a spec against what the volume has. snapping is held.
func (v *Volume) newSnapshot(s SnapshotSpec) (*snapshot, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	if err := v.err(); err != nil {
		return nil, err
	}
	if v.husk.Load() {
		return nil, blockio.ErrClosed
	}
	v.d.mu.RLock()
	defer v.d.mu.RUnlock()
	taken := slices.ContainsFunc(v.d.adoptedLocked(v.id), func(a adopted) bool { return a.s.Name == s.Name })
	v.mu.RLock()
	defer v.mu.RUnlock()
	if len(v.snaps) >= snapshotsMax {
		return nil, fmt.Errorf("volume %s has %d snapshots, the most there can be", v.id, len(v.snaps))
	}
	for _, old := range v.snaps {
		same := old.Name == s.Name && v.d.owned.owner(v.id, old.ID) == v.id
		if same || old.ID == s.ID || old.token() == s.token() {
			return nil, fmt.Errorf("%s of volume %s: %w", s.Name, v.id, ErrSnapshotExists)
		}
	}
	if taken {
		return nil, fmt.Errorf("%s of volume %s: %w", s.Name, v.id, ErrSnapshotExists)
	}
	return &snapshot{SnapshotSpec: s}, nil
}

// appendMarks appends the snapshots' marks while no volume of the group takes a write, and syncs them.
func (d *Driver) appendMarks(ctx context.Context, order []member) error {
	for _, m := range order {
		m.v.order.Lock()
	}
	var waiters []*waiter
	err := func() error {
		for _, m := range order {
			v := m.v
			w := newWaiter()
			if err := v.appendMarkLocked(ctx, recordSnap, m.spec.token(), w); err != nil {
				return err
			}
			waiters = append(waiters, w)
		}
		return nil
	}()
	for _, m := range order {
		m.v.order.Unlock()
	}
	d.wal.Kick()
	for _, w := range waiters {
		err = errors.Join(err, w.wait())
	}
	if err != nil {
		return err
	}
	for _, m := range order {
		if err := m.v.Flush(ctx); err != nil {
			return err
		}
		d.destager.add(m.v)
	}
	d.destager.notify()
	return nil
}

// appendMarkLocked appends a mark, claims or gate or not. order is held, also over a short wait for room in the open batch.
func (v *Volume) appendMarkLocked(ctx context.Context, flags uint8, value uint64, c blockio.Completer) error {
	for end := time.Now().Add(snapshotTriesFor); ; {
		if v.closed {
			return blockio.ErrClosed
		}
		if err := v.err(); err != nil {
			return err
		}
		r := writelog.Record{Volume: v.id, Seq: v.seq + 1, Kind: writelog.Mark, Flags: flags, Value: value}
		err := v.d.wal.Append(r, nil, v, false, c, 0)
		if err == nil {
			v.seq++
			return nil
		}
		if !errors.Is(err, blockio.ErrBusy) || ctx.Err() != nil || time.Now().After(end) {
			return errors.Join(err, ctx.Err())
		}
		v.d.wal.Kick()
		time.Sleep(time.Millisecond)
	}
}

// Snapshots lists the volume's snapshots, oldest first: those that others hold are the oldest.
func (v *Volume) Snapshots() []Snapshot {
	v.d.mu.RLock()
	defer v.d.mu.RUnlock()
	clones := v.d.clonesLocked()
	var out []Snapshot
	for _, a := range v.d.adoptedLocked(v.id) {
		out = append(out, a.s.describe(clones[a.s.ID]))
	}
	v.mu.RLock()
	defer v.mu.RUnlock()
	for _, s := range v.snaps {
		if s.Seq != 0 && !s.Base && v.d.owned.owner(v.id, s.ID) == v.id {
			out = append(out, s.describe(clones[s.ID]))
		}
	}
	return out
}

func (v *Volume) describe(s *snapshot) Snapshot {
	v.d.mu.RLock()
	defer v.d.mu.RUnlock()
	return s.describe(v.d.clonesLocked()[s.ID])
}

func (s *snapshot) describe(clones int) Snapshot {
	out := Snapshot{SnapshotSpec: s.SnapshotSpec, Seq: s.Seq, Size: s.Size, Used: s.UsedBlocks * blockSize, Backed: s.Gen != 0, Clones: clones}
	out.Labels = maps.Clone(s.Labels)
	return out
}

func (v *Volume) findSnapshot(id uuid.UUID) (*snapshot, error) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	for _, s := range v.snaps {
		if s.ID == id && s.Seq != 0 {
			return s, nil
		}
	}
	return nil, fmt.Errorf("snapshot %s of volume %s: %w", id, v.id, ErrUnknownSnapshot)
}

// EditSnapshot changes what is said of a snapshot: name, labels, sticky. It is durable when it returns.
func (v *Volume) EditSnapshot(ctx context.Context, id uuid.UUID, edit func(*SnapshotSpec) error) error {
	h, err := v.d.holder(ctx, v.id, id)
	if err != nil {
		return err
	}
	defer lockSnapping(v, h)()
	return h.editSnapshot(id, v, edit)
}

// editSnapshot does it at the volume that holds the snapshot, for the one that owns it. snapping of both is held.
func (v *Volume) editSnapshot(id uuid.UUID, owner *Volume, edit func(*SnapshotSpec) error) error {
	for {
		v.d.mu.RLock()
		names, theirs := v.d.namesLocked(owner), v.d.owned.owner(v.id, id) != owner.id
		v.d.mu.RUnlock()
		if theirs {
			return fmt.Errorf("snapshot %s of volume %s: %w", id, owner.id, ErrUnknownSnapshot)
		}
		s, err := v.findSnapshot(id)
		if err != nil {
			return err
		}
		now := *s
		now.Labels = maps.Clone(s.Labels)
		if err := edit(&now.SnapshotSpec); err != nil {
			return err
		}
		now.ID = s.ID
		if err := now.check(); err != nil {
			return err
		}
		if now.Name != s.Name && names[now.Name] {
			return fmt.Errorf("%s of volume %s: %w", now.Name, owner.id, ErrSnapshotExists)
		}
		// An install writes the same record: it holds storing as well.
		v.storing.Lock()
		v.mu.Lock()
		same := slices.Contains(v.snaps, s)
		if same {
			v.replaceLocked(&now)
		}
		v.mu.Unlock()
		if same {
			if err = v.d.maps.Put([]blockmap.KV{now.encode(v.id)}, true); err != nil {
				err = fmt.Errorf("store snapshot %s of volume %s: %w", id, v.id, err)
			}
		}
		v.storing.Unlock()
		if same {
			if err == nil {
				v.d.rootChanged(v)
			}
			return err
		}
	}
}

// WaitBacked waits until every record up to seq is on the backend and in the map.
func (v *Volume) WaitBacked(ctx context.Context, seq uint64) error {
	for {
		if old := v.hurry.Load(); old >= seq || v.hurry.CompareAndSwap(old, seq) {
			break
		}
	}
	v.d.destager.add(v)
	v.d.destager.notify()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for v.backed() < seq {
		if err := v.err(); err != nil {
			return err
		}
		if p := v.stuck.Load(); p != nil {
			return *p
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait until record %d of volume %s is on the backend: %w", seq, v.id, ctx.Err())
		case <-tick.C:
		}
	}
	return nil
}

// frozenSnapshot gives the snapshot when it is in the map, and waits for that.
func (v *Volume) frozenSnapshot(ctx context.Context, id uuid.UUID) (*snapshot, error) {
	s, err := v.findSnapshot(id)
	if err != nil || s.Gen != 0 {
		return s, err
	}
	if err := v.WaitBacked(ctx, s.Seq); err != nil {
		return nil, err
	}
	return v.findSnapshot(id)
}

// DeleteSnapshot forgets a snapshot and gives back what only it held; that takes time in proportion to what changed after
// it. ErrInUse while clones hang on it. If only the map of a volume does that owns it, or of a husk, it is nobody's from then on.
func (v *Volume) DeleteSnapshot(ctx context.Context, id uuid.UUID) error {
	h, err := v.d.holder(ctx, v.id, id)
	if err != nil {
		return err
	}
	if err := h.dropSnapshot(ctx, id, v.id); err != nil || h == v {
		return err
	}
	return v.d.sweep(ctx) // the holder may be a husk that holds nothing now
}

// dropSnapshot deletes a snapshot that the volume holds, if it is owner's.
func (v *Volume) dropSnapshot(ctx context.Context, id, owner uuid.UUID) error {
	v.snapping.Lock()
	defer v.snapping.Unlock()
	s, err := v.frozenSnapshot(ctx, id)
	if err != nil {
		return err
	}
	if v.reverting.Load() {
		return fmt.Errorf("delete snapshot %s: a rollback is under way: %w", s.Name, blockio.ErrBusy)
	}
	// Clones are made with d.mu held over the look at the snapshot, so none can appear between this look and the removal.
	v.d.mu.Lock()
	if v.d.owned.owner(v.id, id) != owner {
		v.d.mu.Unlock()
		return fmt.Errorf("snapshot %s of volume %s: %w", id, owner, ErrUnknownSnapshot)
	}
	if n := v.d.clonesLocked()[id]; n > 0 {
		v.d.mu.Unlock()
		return fmt.Errorf("snapshot %s of volume %s has %d clones: %w", s.Name, owner, n, ErrInUse)
	}
	was, moved := v.d.owned.of[id]
	if v.d.children[id] > 0 {
		o := ownership{Holder: v.id, N: was.N + 1}
		v.d.owned.set(id, o)
		v.d.mu.Unlock()
		if err := v.d.maps.Update([]blockmap.KV{o.encode(id)}, nil); err != nil {
			v.d.mu.Lock()
			v.d.owned.restore(id, was, moved)
			v.d.mu.Unlock()
			return fmt.Errorf("delete snapshot %s of volume %s: %w", s.Name, owner, err)
		}
		v.d.rootChanged(v)
		return nil
	}
	v.d.owned.remove(id)
	v.mu.Lock()
	v.snaps = slices.DeleteFunc(slices.Clone(v.snaps), func(o *snapshot) bool { return o.ID == id })
	v.mu.Unlock()
	v.d.mu.Unlock()
	p := s.point()
	err = v.d.maps.Update([]blockmap.KV{{Key: releaseKey(p), Value: v.id[:]}}, [][]byte{snapshotKey(v.id, id), traceKey(id), ownerKey(id)})
	if err != nil { // a full disk: it is still there
		v.d.mu.Lock()
		v.d.owned.restore(id, was, moved)
		v.mu.Lock()
		v.snaps = append(slices.Clone(v.snaps), s)
		v.sortSnapshots()
		v.mu.Unlock()
		v.d.mu.Unlock()
		return fmt.Errorf("delete snapshot %s of volume %s: %w", s.Name, v.id, err)
	}
	v.d.rootChanged(v)
	return v.release(p)
}

func releaseKey(p mapPoint) []byte {
	k := binary.BigEndian.AppendUint32([]byte(releasePrefix), uint32(p.handle))
	return binary.BigEndian.AppendUint32(k, p.gen)
}

// liveLocked gives the generations of a handle that something of this volume needs, ascending. mu is held.
func (v *Volume) liveLocked(h blockmap.Handle) []uint32 {
	var gens []uint32
	for _, s := range v.snaps {
		if s.Handle == h && s.Gen != 0 {
			gens = append(gens, s.Gen)
		}
	}
	for _, b := range v.root.Branches {
		if b.Parent == h {
			gens = append(gens, b.Gen)
		}
	}
	for p := range v.pins {
		if p.handle == h {
			gens = append(gens, p.gen)
		}
	}
	slices.Sort(gens)
	return slices.Compact(gens)
}

// line gives the frozen generations of a handle that something of this volume needs, ascending, and the generation that
// is written now. They are of one moment: a generation that an install is freezing is either among the first or is the second.
// Whoever looks at one after the other takes a snapshot for none, and what it holds for garbage.
func (v *Volume) line(h blockmap.Handle) (live []uint32, current uint32, err error) {
	v.storing.Lock() // over a freeze and the note of it
	defer v.storing.Unlock()
	v.mu.RLock()
	live = v.liveLocked(h)
	v.mu.RUnlock()
	current, err = v.d.maps.Generation(h)
	return live, current, err
}

// release gives back what only generation p could see, unless something still needs it: then whoever needed it last calls
// again. snapping is held, or the volume is not in use yet.
func (v *Volume) release(p mapPoint) error {
	live, current, err := v.line(p.handle)
	if err != nil && !errors.Is(err, blockmap.ErrHandle) { // a crash may have come after it was dropped
		return fmt.Errorf("release generation %d of volume %s: %w", p.gen, v.id, err)
	}
	v.mu.RLock()
	ours := slices.ContainsFunc(v.root.Branches, func(b branch) bool { return b.Handle == p.handle })
	isHead := v.root.Handle == p.handle
	v.mu.RUnlock()
	i, needed := slices.BinarySearch(live, p.gen)
	if needed && ours {
		return nil
	}
	switch {
	case !ours: // the root has let go of the whole handle, and a crash came before it was dropped
		err = v.d.maps.DropVolume(p.handle)
	case p.gen == 0:
		return v.behead(p)
	case !isHead && len(live) == 0:
		return v.dropBranch(p)
	default:
		prev, next := uint32(0), uint32(0)
		if i > 0 {
			prev = live[i-1]
		}
		if i < len(live) {
			next = live[i]
		} else if isHead {
			next = current
		}
		err = v.d.maps.Release(p.handle, p.gen, prev, next)
	}
	if err == nil {
		err = v.d.maps.Update(nil, [][]byte{releaseKey(p)})
	}
	if err != nil {
		return fmt.Errorf("release generation %d of volume %s: %w", p.gen, v.id, err)
	}
	return nil
}

// behead gives back what only the head of a line saw, after a rollback has left it.
func (v *Volume) behead(p mapPoint) error {
	v.mu.RLock()
	live := v.liveLocked(p.handle)
	v.mu.RUnlock()
	if len(live) == 0 {
		return v.dropBranch(p)
	}
	if err := v.d.maps.ReleaseHead(p.handle, live[len(live)-1], nil, [][]byte{releaseKey(p)}); err != nil {
		return fmt.Errorf("give up a head of volume %s: %w", v.id, err)
	}
	return nil
}

// dropBranch gives back a line of the map on which nothing lives any more, and what its parent held for it.
func (v *Volume) dropBranch(p mapPoint) error {
	v.storing.Lock()
	r := v.stored
	var gone branch
	r.Branches = slices.DeleteFunc(slices.Clone(r.Branches), func(b branch) bool {
		if b.Handle == p.handle {
			gone = b
		}
		return b.Handle == p.handle
	})
	puts := []blockmap.KV{r.encode()}
	parent := mapPoint{gone.Parent, gone.Gen}
	own := slices.ContainsFunc(r.Branches, func(b branch) bool { return b.Handle == gone.Parent })
	if own {
		puts = append(puts, blockmap.KV{Key: releaseKey(parent), Value: v.id[:]})
	}
	err := v.d.maps.Put(puts, true)
	if err == nil {
		v.stored = r
		v.mu.Lock()
		v.root.Branches = r.Branches
		v.mu.Unlock()
	}
	v.storing.Unlock()
	if err == nil {
		err = v.d.maps.DropVolume(p.handle)
	}
	if err == nil {
		err = v.d.maps.Update(nil, [][]byte{releaseKey(p)})
	}
	if err != nil {
		return fmt.Errorf("drop a branch of volume %s: %w", v.id, err)
	}
	if own {
		return v.release(parent)
	}
	return nil
}

// SnapshotSpace says how many bytes would become free if only this snapshot were deleted, and how many it shares.
func (v *Volume) SnapshotSpace(ctx context.Context, id uuid.UUID) (unique, shared int64, err error) {
	h, err := v.d.holder(ctx, v.id, id)
	if err != nil {
		return 0, 0, err
	}
	return h.snapshotSpace(ctx, id)
}

func (v *Volume) snapshotSpace(ctx context.Context, id uuid.UUID) (unique, shared int64, err error) {
	s, err := v.frozenSnapshot(ctx, id)
	if err != nil {
		return 0, 0, err
	}
	v.snapping.Lock()
	defer v.snapping.Unlock()
	live, current, err := v.line(s.Handle)
	if err != nil {
		return 0, 0, fmt.Errorf("space of snapshot %s of volume %s: %w", s.Name, v.id, err)
	}
	v.mu.RLock()
	others := 0
	for _, o := range v.snaps {
		if o.point() == s.point() {
			others++
		}
	}
	pinned := slices.ContainsFunc(v.root.Branches, func(b branch) bool { return mapPoint{b.Parent, b.Gen} == s.point() })
	v.mu.RUnlock()
	v.d.mu.RLock()
	needed := v.d.children[id] > 0 || v.d.clonesLocked()[id] > 0
	v.d.mu.RUnlock()
	if needed || others > 1 || pinned {
		return 0, s.UsedBlocks * blockSize, nil
	}
	i, _ := slices.BinarySearch(live, s.Gen)
	prev, next := uint32(0), uint32(0)
	if i > 0 {
		prev = live[i-1]
	}
	if i+1 < len(live) {
		next = live[i+1]
	} else if s.Handle == v.handle() {
		next = current
	}
	n, err := v.d.maps.Unique(s.Handle, s.Gen, prev, next)
	if err != nil {
		return 0, 0, fmt.Errorf("space of snapshot %s of volume %s: %w", s.Name, v.id, err)
	}
	return n * blockSize, (s.UsedBlocks - n) * blockSize, nil
}
