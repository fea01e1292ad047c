package volumedriver

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver/backend"
	"varve/volumedriver/blockio"
	"varve/volumedriver/blockmap"
	"varve/volumedriver/sco"
)

// Rebuilt is a volume that was made again from its backend alone.
type Rebuilt struct {
	Spec
	LastLog uint64    // the volume equals the prefix of its records up to this one
	ModTime time.Time // of that record
	Objects int       // SCOs that make it up
	Ignored int       // SCOs beyond a hole, or left over by an owner that was replaced
	// Snapshots are those that were found again; Parent and ParentSnapshot are of what this one is a clone.
	Snapshots      int
	Parent         uuid.UUID
	ParentSnapshot uuid.UUID
	// Lost is how many records after LastLog the node had logged when it last wrote its ledger, LostAt when that was; zero
	// time: there is no ledger, so nobody knows.
	Lost   uint64
	LostAt time.Time
	Used   int64 // bytes
	Err    error // why this volume could not be rebuilt
}

// rebuilding is a vPool on its way back.
type rebuilding struct {
	d       *Driver
	store   backend.Backend
	roots   map[uuid.UUID]sco.Root
	objects map[uuid.UUID]map[scoID]found
	done    map[uuid.UUID]*rebuiltVolume
}

// found is an SCO on the backend.
type found struct {
	header *sco.Header
	at     place
}

// rebuiltVolume is what clones need of their parent.
type rebuiltVolume struct {
	root  root
	snaps map[uuid.UUID]*snapshot
	left  []mapPoint // what rollbacks have left and only they needed: given back when all is there
	err   error
}

// Rebuild makes the volumes of a vPool again from its backend, with their snapshots and as clones of each other. This node
// must not know them. Each is an exact prefix of its history: SCOs count up to the first that does not follow its predecessor.
func (d *Driver) Rebuild(ctx context.Context, pool uuid.UUID) ([]Rebuilt, error) {
	store, err := d.backendOf(pool)
	if err != nil {
		return nil, err
	}
	b := &rebuilding{d: d, store: store, done: make(map[uuid.UUID]*rebuiltVolume)}
	if b.roots, err = findRoots(ctx, store, pool); err != nil {
		return nil, fmt.Errorf("rebuild: %w", err)
	}
	names, err := findSCOs(ctx, store)
	if err != nil {
		return nil, fmt.Errorf("rebuild: %w", err)
	}
	for id := range names {
		if _, ok := b.roots[id]; !ok { // its root object is lost: the data is not
			b.roots[id] = sco.Root{Volume: id, Pool: pool, Path: "lost+found/" + id.String() + ".raw", Kind: "disk"}
		}
	}
	ids := make([]uuid.UUID, 0, len(b.roots))
	for id := range b.roots {
		ids = append(ids, id)
	}
	slices.SortFunc(ids, func(x, y uuid.UUID) int { return cmp.Compare(b.roots[x].Path, b.roots[y].Path) })
	ledger := d.readLedger()
	var out []Rebuilt
	for len(ids) > 0 {
		later := ids[:0]
		for _, id := range ids {
			o := b.roots[id]
			if p := o.Parent; p != nil && b.done[p.Volume] == nil && p.Volume != id {
				if _, ok := b.roots[p.Volume]; ok {
					later = append(later, id)
					continue
				}
			}
			r, v, err := b.volume(ctx, o, names[id])
			if ctx.Err() != nil {
				return out, ctx.Err()
			}
			v.err, r.Err = err, err
			b.done[id] = v
			if e, ok := ledger[id]; ok {
				r.LostAt, r.Lost = time.Unix(0, e.Time), max(e.Logged, r.LastLog)-r.LastLog
			}
			out = append(out, r)
		}
		if len(later) == len(ids) {
			return out, fmt.Errorf("rebuild: %d clones are each other's parents: %w", len(ids), blockio.ErrCorrupt)
		}
		ids = later
	}
	if err := errors.Join(b.settleOwners(ctx), d.settleReleases(ctx)); err != nil {
		return out, fmt.Errorf("rebuild: %w", err)
	}
	return b.described(out), nil
}

// settleOwners gives the snapshots to whom the root objects say they belong. Where a volume would have two of one name, since it was
// told of one in its root object and of the other in its log, the younger is renamed.
func (b *rebuilding) settleOwners(ctx context.Context) error {
	d, set := b.d, make(map[uuid.UUID]ownership)
	var all []adopted
	for id, v := range b.done {
		for _, s := range v.snaps {
			if v.err == nil {
				all = append(all, adopted{&Volume{id: id}, s})
			}
		}
	}
	slices.SortFunc(all, func(a, b adopted) int {
		return cmp.Or(cmp.Compare(a.s.Handle, b.s.Handle), cmp.Compare(a.s.Seq, b.s.Seq))
	})
	holder := make(map[uuid.UUID]uuid.UUID, len(all))
	for _, a := range all {
		holder[a.s.ID] = a.holder.id
	}
	for _, o := range b.roots {
		for _, own := range o.Owns {
			h, ok := holder[own.Snapshot]
			if old := set[own.Snapshot]; ok && old.N < own.N {
				set[own.Snapshot] = ownership{Holder: h, Owner: o.Volume, N: own.N}
			}
		}
	}
	for _, o := range b.roots {
		for _, s := range o.Snapshots {
			if h, ok := holder[s.ID]; ok && s.Nobodys {
				set[s.ID] = ownership{Holder: h, N: set[s.ID].N + 1}
			}
		}
	}
	var puts []blockmap.KV
	type name struct {
		owner uuid.UUID
		name  string
	}
	names := make(map[name]bool, len(all))
	for _, a := range all {
		at := name{a.holder.id, a.s.Name}
		if o, ok := set[a.s.ID]; ok {
			at.owner = o.Owner
			puts = append(puts, o.encode(a.s.ID))
		}
		if names[at] && at.owner != uuid.Nil {
			a.s.Name = fmt.Sprintf("%.200s-found-%d", a.s.Name, a.s.Seq)
			puts = append(puts, a.s.encode(a.holder.id))
		}
		names[at] = true
	}
	if err := d.maps.Update(puts, nil); err != nil {
		return err
	}
	d.mu.Lock()
	for id, v := range b.done {
		if v.err == nil && v.root.Options.Husk {
			d.owned.husk(id)
		}
	}
	for id, o := range set {
		d.owned.set(id, o)
	}
	d.mu.Unlock()
	return d.openHolders(ctx)
}

// described says of each volume that people know what it is a clone of, and how many snapshots it has.
func (b *rebuilding) described(all []Rebuilt) []Rebuilt {
	d := b.d
	d.mu.RLock()
	defer d.mu.RUnlock()
	out := all[:0]
	for _, r := range all {
		v := b.done[r.ID]
		if r.Err == nil && v.root.Options.Husk {
			continue
		}
		if o, ok := d.originLocked(r.ID); ok {
			r.Parent, r.ParentSnapshot = d.owned.owner(o.holder, o.snapshot), o.snapshot
		}
		r.Snapshots = len(d.adoptedLocked(r.ID))
		for id := range v.snaps {
			if d.owned.owner(r.ID, id) == r.ID {
				r.Snapshots++
			}
		}
		out = append(out, r)
	}
	return out
}

// eachObject calls fn for every object below prefix.
func eachObject(ctx context.Context, store backend.Backend, prefix string, fn func(backend.Info) error) error {
	after := ""
	for {
		found, err := store.List(ctx, prefix, after, 1000)
		if err != nil {
			return err
		}
		for _, i := range found {
			if err := fn(i); err != nil {
				return err
			}
			after = i.Name
		}
		if len(found) == 0 {
			return nil
		}
	}
}

// findRoots reads the newest intact root object of each volume.
func findRoots(ctx context.Context, store backend.Backend, pool uuid.UUID) (map[uuid.UUID]sco.Root, error) {
	roots := make(map[uuid.UUID]sco.Root)
	err := eachObject(ctx, store, "r/", func(i backend.Info) error {
		id, _, _, err := sco.ParseRootName(i.Name)
		if err != nil {
			return nil // not ours
		}
		b, err := readObject(ctx, store, i.Name, sco.MaxRootBytes)
		if err != nil {
			return err
		}
		r, err := sco.ParseRoot(b)
		if err != nil || r.Volume != id {
			return nil // an older one may do, else the volume goes to lost+found
		}
		r.Pool = pool
		roots[id] = *r
		return nil
	})
	return roots, err
}

func readObject(ctx context.Context, store backend.Backend, name string, limit int64) ([]byte, error) {
	o, err := store.Open(ctx, name)
	if err != nil {
		return nil, err
	}
	defer o.Close()
	b := make([]byte, min(o.Size(), limit))
	return b, o.ReadAt(ctx, b, 0)
}

// findSCOs lists the SCOs of each volume, and the containers that hold some, by name.
func findSCOs(ctx context.Context, store backend.Backend) (map[uuid.UUID][]string, error) {
	objects := make(map[uuid.UUID][]string)
	err := eachObject(ctx, store, "v/", func(i backend.Info) error {
		if id, _, _, _, err := sco.ParseName(i.Name); err == nil {
			objects[id] = append(objects[id], i.Name)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	err = eachObject(ctx, store, "c/", func(i backend.Info) error {
		if id, _, _, _, err := sco.ParseContainerName(i.Name); err == nil {
			objects[id] = append(objects[id], i.Name)
		}
		return nil
	})
	return objects, err
}

// headers reads the headers of a volume's SCOs. Where an SCO is there in its own object it counts, else the newest
// container that has it: each later one holds at least what was still needed then.
func (b *rebuilding) headers(ctx context.Context, id uuid.UUID, names []string) (headers map[scoID]found, seen int, err error) {
	headers = make(map[scoID]found)
	for _, name := range names {
		err := b.d.eachSCO(ctx, b.store, name, func(h *sco.Header, at place) error {
			if h.Volume != id {
				return fmt.Errorf("it is of volume %s: %w", h.Volume, blockio.ErrCorrupt)
			}
			seen++
			key := scoID{h.Epoch, h.Seq}
			if old, ok := headers[key]; !ok || !old.at.own() && (at.own() || at.after(old.at)) {
				headers[key] = found{h, at}
			}
			return nil
		})
		if ctx.Err() != nil {
			return nil, 0, ctx.Err()
		}
		if err != nil {
			if !errors.Is(err, blockio.ErrCorrupt) && !errors.Is(err, backend.ErrNotExist) {
				return nil, 0, err
			}
			seen++
			b.d.log.Warn("object left out of rebuild", "volume", id, "object", name, "err", err)
		}
	}
	return headers, seen, nil
}

// volume makes one volume from its SCOs; its parent has been made before.
func (b *rebuilding) volume(ctx context.Context, o sco.Root, names []string) (Rebuilt, *rebuiltVolume, error) {
	d := b.d
	s := Spec{ID: o.Volume, Pool: o.Pool, Epoch: o.Epoch, Size: o.Size, PoolName: o.PoolName, Path: o.Path, Kind: o.Kind}
	out, v := Rebuilt{Spec: s}, &rebuiltVolume{snaps: make(map[uuid.UUID]*snapshot)}
	if _, known := d.Stat(s.ID); known {
		return out, v, fmt.Errorf("volume %s: this node has it already", s.ID)
	}
	pool := d.poolOptions(s.Pool)
	ring, err := pool.unwrap(s.Pool, s.ID, o.Keys)
	if err != nil {
		return out, v, err
	}
	d.keyrings.mu.Lock()
	d.keyrings.holdLocked(s.ID, ring)
	d.keyrings.mu.Unlock()
	all, seen, err := b.headers(ctx, s.ID, names)
	if err != nil {
		return out, v, err
	}
	headers := make(map[scoID]*sco.Header, len(all))
	for id, f := range all {
		headers[id] = f.header
	}
	chain := newestChain(headers)
	out.Objects, out.Ignored = len(chain), seen-len(chain)
	now := d.now().UnixNano()
	r := root{ID: s.ID, Pool: s.Pool, Size: s.Size, ModTime: now, NextSCO: 1, Template: o.Template,
		Name: rootObject{N: 1, PoolName: s.PoolName, Path: s.Path, Kind: s.Kind, Created: now}}
	r.Keys = o.Keys
	if len(o.Options) > 0 {
		if err := json.Unmarshal(o.Options, &r.Options); err != nil {
			d.log.Warn("options of volume left out of rebuild", "volume", s.ID, "err", err)
		}
	}
	if err := b.begin(&r, o.Parent); err != nil {
		return out, v, err
	}
	for id := range headers {
		r.NextSCO = max(r.NextSCO, id.Seq+1)
	}
	var puts []blockmap.KV
	inherited := len(r.Epochs)
	for _, c := range chain {
		id := scoID{c.Epoch, c.Seq}
		if err := b.apply(&r, v, c); err != nil {
			return out, v, err
		}
		if n := len(r.Epochs); n == inherited || r.Epochs[n-1].Epoch != c.Epoch {
			r.Epochs = withEpoch(r.Epochs, c.Seq, c.Epoch)
		}
		r.Size, r.ModTime, r.Backed, r.Prev = int64(c.Size), c.ModTime, c.LastLog, id
		at := all[id].at
		at.Prev = c.PrevSeq
		puts = append(puts, at.encode(s.ID, c.Seq))
		if err := b.cut(&r, v, o, chain, c); err != nil {
			return out, v, err
		}
	}
	// The owner from now on has a higher epoch than any before.
	for id := range headers {
		s.Epoch = max(s.Epoch, id.Epoch)
	}
	s.Epoch++
	r.Epochs = withEpoch(r.Epochs, r.NextSCO, s.Epoch)
	for id, sn := range v.snaps {
		if sn.Name == "" { // only a rollback needed it
			v.left = append(v.left, sn.point())
			delete(v.snaps, id)
			continue
		}
		puts = append(puts, sn.encode(s.ID))
	}
	for _, p := range v.left {
		puts = append(puts, blockmap.KV{Key: releaseKey(p), Value: s.ID[:]})
	}
	if err := d.maps.Checkpoint(append(puts, r.encode()), nil); err != nil {
		return out, v, err
	}
	d.mu.Lock()
	d.roots[s.ID] = r
	if r.Parent != nil {
		d.children[r.Parent.Snapshot]++
	}
	d.mu.Unlock()
	v.root = r
	s.Size = r.Size
	out.Spec, out.LastLog, out.ModTime, out.Used, out.Snapshots = s, r.Backed, time.Unix(0, r.ModTime), r.UsedBlocks*blockSize, len(v.snaps)
	return out, v, nil
}

// begin gives the root the map that its history begins with: nothing, or what the parent's snapshot held.
func (b *rebuilding) begin(r *root, parent *sco.RootParent) error {
	if parent == nil {
		h, err := b.d.maps.NewHandle()
		r.Handle, r.Branches = h, []branch{{Handle: h}}
		return err
	}
	p := b.done[parent.Volume]
	if p == nil || p.err != nil {
		return fmt.Errorf("volume %s: its parent %s could not be rebuilt", r.ID, parent.Volume)
	}
	sn := p.snaps[parent.Snapshot]
	if sn == nil {
		return fmt.Errorf("volume %s: its parent %s has no snapshot %s any more", r.ID, parent.Volume, parent.Snapshot)
	}
	for _, e := range p.root.Epochs {
		if e.Volume == uuid.Nil {
			e.Volume = parent.Volume
		}
		if e.From < parent.Base {
			r.Epochs = append(r.Epochs, e)
		}
	}
	r.NextSCO = parent.Base
	r.Size, r.ModTime, r.UsedBlocks = sn.Size, sn.ModTime, sn.UsedBlocks
	r.Parent = &parentRef{Volume: parent.Volume, Snapshot: parent.Snapshot, Seq: parent.Seq, Base: parent.Base}
	h, err := b.d.maps.Fork(sn.Handle, sn.Gen, nil)
	r.Handle, r.Branches = h, []branch{{Handle: h, Parent: sn.Handle, Gen: sn.Gen}}
	return err
}

// apply puts one SCO of the chain into the map.
func (b *rebuilding) apply(r *root, v *rebuiltVolume, c *sco.Header) error {
	if c.Revert != 0 {
		var target *snapshot
		for _, sn := range v.snaps {
			if sn.Seq == c.Revert {
				target = sn
			}
		}
		if target == nil {
			return fmt.Errorf("volume %s was rolled back to log record %d, where there is no snapshot: %w", r.ID, c.Revert, blockio.ErrCorrupt)
		}
		h, err := b.d.maps.Fork(target.Handle, target.Gen, nil)
		if err != nil {
			return err
		}
		v.left = append(v.left, mapPoint{handle: r.Handle})
		r.Handle, r.UsedBlocks = h, target.UsedBlocks
		r.Branches = append(r.Branches, branch{Handle: h, Parent: target.Handle, Gen: target.Gen})
	}
	used, err := b.d.applySCO(r.Handle, uint32(c.Seq), c.Zeros, c.Extents)
	r.UsedBlocks += used
	return err
}

// cut makes the snapshots with which an SCO ends: those that the root object lists or is too old to know, and, without a
// name, those to which the volume was later rolled back.
func (b *rebuilding) cut(r *root, v *rebuiltVolume, o sco.Root, chain []*sco.Header, c *sco.Header) error {
	var keep []*snapshot
	for _, m := range c.Marks {
		sn := &snapshot{Seq: m.Seq, Size: r.Size, ModTime: r.ModTime, Handle: r.Handle, UsedBlocks: r.UsedBlocks}
		if err := json.Unmarshal(m.Data, &sn.SnapshotSpec); err != nil || sn.check() != nil {
			sn.SnapshotSpec = SnapshotSpec{ID: uuid.New(), Name: fmt.Sprintf("found-%d", m.Seq), Created: time.Unix(0, c.Created)}
		}
		if sn.Base { // the window begins anew
			continue
		}
		listed := false
		for _, l := range o.Snapshots {
			if l.ID == sn.ID {
				listed = true
				sn.SnapshotSpec = specOf(l)
			}
		}
		if !listed && m.Seq <= o.AtLog {
			if !slices.ContainsFunc(chain, func(h *sco.Header) bool { return h.Revert == m.Seq }) {
				continue
			}
			sn.SnapshotSpec.Name = ""
		}
		keep = append(keep, sn)
	}
	for _, l := range o.Snapshots { // a rewind has made it afterwards: no mark tells of it
		if l.Seq == c.LastLog && !slices.ContainsFunc(keep, func(sn *snapshot) bool { return sn.ID == l.ID }) {
			keep = append(keep, &snapshot{SnapshotSpec: specOf(l), Seq: l.Seq, Size: r.Size, ModTime: r.ModTime, Handle: r.Handle,
				UsedBlocks: r.UsedBlocks, Rewound: true})
		}
	}
	back := func(sn *snapshot) bool { return sn.Seq == c.LastLog }
	if !slices.ContainsFunc(keep, back) && slices.ContainsFunc(chain, func(h *sco.Header) bool { return h.Revert == c.LastLog }) {
		// The volume was rolled back to what a rewind had made, and that is deleted.
		keep = append(keep, &snapshot{SnapshotSpec: SnapshotSpec{ID: uuid.New()}, Seq: c.LastLog, Size: r.Size, ModTime: r.ModTime,
			Handle: r.Handle, UsedBlocks: r.UsedBlocks})
	}
	if len(keep) == 0 {
		return nil
	}
	gen, err := b.d.maps.Freeze(r.Handle, nil)
	if err != nil {
		return err
	}
	for _, sn := range keep {
		sn.Gen = gen
		v.snaps[sn.ID] = sn
	}
	return nil
}

// newestChain gives the SCOs that make up the volume, oldest first: from the highest (epoch, seq) from which the chain of
// predecessors is whole. What an owner put beyond the point where the next one began is in no chain that ends later.
func newestChain(headers map[scoID]*sco.Header) []*sco.Header {
	tips := make([]scoID, 0, len(headers))
	for id := range headers {
		tips = append(tips, id)
	}
	slices.SortFunc(tips, func(a, b scoID) int {
		return cmp.Or(cmp.Compare(b.Epoch, a.Epoch), cmp.Compare(b.Seq, a.Seq))
	})
	broken := make(map[scoID]bool) // the way down from here misses an SCO
	for _, tip := range tips {
		if chain, ok := chainFrom(headers, tip, broken); ok {
			return chain
		}
	}
	return nil
}

// chainFrom follows the predecessors of tip; what turns out not to lead to the beginning is noted in broken.
func chainFrom(headers map[scoID]*sco.Header, tip scoID, broken map[scoID]bool) ([]*sco.Header, bool) {
	var chain []*sco.Header
	for id := tip; id != (scoID{}); {
		h := headers[id]
		if h == nil || broken[id] || len(chain) > len(headers) {
			for _, h := range chain {
				broken[scoID{h.Epoch, h.Seq}] = true
			}
			return nil, false
		}
		chain = append(chain, h)
		id = scoID{h.PrevEpoch, h.PrevSeq}
	}
	slices.Reverse(chain)
	var prev *sco.Header
	for i, h := range chain {
		if h.Follow(prev) != nil {
			for _, h := range chain[i:] {
				broken[scoID{h.Epoch, h.Seq}] = true
			}
			return nil, false
		}
		prev = h
	}
	return chain, true
}
