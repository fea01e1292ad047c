package volumedriver

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver/backend"
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
	// Lost is how many records after LastLog the node had logged when it last wrote its ledger, LostAt when that was; zero
	// time: there is no ledger, so nobody knows.
	Lost   uint64
	LostAt time.Time
	Used   int64 // bytes
	Err    error // why this volume could not be rebuilt
}

// Rebuild makes the volumes of a vPool again from its backend. This node must not know them. Each is an exact prefix of its
// history: SCOs count up to the first that does not follow its predecessor.
func (d *Driver) Rebuild(ctx context.Context, pool uuid.UUID) ([]Rebuilt, error) {
	store, err := d.backendOf(pool)
	if err != nil {
		return nil, err
	}
	specs, err := findRoots(ctx, store, pool)
	if err != nil {
		return nil, fmt.Errorf("rebuild: %w", err)
	}
	objects, err := findSCOs(ctx, store)
	if err != nil {
		return nil, fmt.Errorf("rebuild: %w", err)
	}
	for id := range objects {
		if _, ok := specs[id]; !ok { // its root object is lost: the data is not
			specs[id] = Spec{ID: id, Pool: pool, Path: "lost+found/" + id.String() + ".raw", Kind: "disk"}
		}
	}
	ids := make([]uuid.UUID, 0, len(specs))
	for id := range specs {
		ids = append(ids, id)
	}
	slices.SortFunc(ids, func(a, b uuid.UUID) int { return cmp.Compare(specs[a].Path, specs[b].Path) })
	ledger := d.readLedger()
	var out []Rebuilt
	for _, id := range ids {
		r, err := d.rebuildVolume(ctx, store, specs[id], objects[id])
		if e, ok := ledger[id]; ok {
			r.LostAt, r.Lost = time.Unix(0, e.Time), max(e.Logged, r.LastLog)-r.LastLog
		}
		if ctx.Err() != nil {
			return out, ctx.Err()
		}
		r.Err = err
		out = append(out, r)
	}
	return out, nil
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
func findRoots(ctx context.Context, store backend.Backend, pool uuid.UUID) (map[uuid.UUID]Spec, error) {
	specs := make(map[uuid.UUID]Spec)
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
		specs[id] = Spec{ID: id, Pool: pool, Epoch: r.Epoch, Size: r.Size, PoolName: r.PoolName, Path: r.Path, Kind: r.Kind}
		return nil
	})
	return specs, err
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

// findSCOs lists the SCOs of each volume by name.
func findSCOs(ctx context.Context, store backend.Backend) (map[uuid.UUID][]string, error) {
	objects := make(map[uuid.UUID][]string)
	err := eachObject(ctx, store, "v/", func(i backend.Info) error {
		if id, _, _, _, err := sco.ParseName(i.Name); err == nil {
			objects[id] = append(objects[id], i.Name)
		}
		return nil
	})
	return objects, err
}

// rebuildVolume makes one volume from its SCOs.
func (d *Driver) rebuildVolume(ctx context.Context, store backend.Backend, s Spec, names []string) (Rebuilt, error) {
	out := Rebuilt{Spec: s}
	if _, known := d.Stat(s.ID); known {
		return out, fmt.Errorf("volume %s: this node has it already", s.ID)
	}
	headers := make(map[scoID]*sco.Header)
	for _, name := range names {
		o, err := store.Open(ctx, name)
		if err != nil {
			return out, err
		}
		h, err := readHeader(ctx, o)
		o.Close()
		if ctx.Err() != nil {
			return out, ctx.Err()
		}
		if err != nil || h.Volume != s.ID || o.Size() != h.ObjectBytes() {
			d.log.Warn("object left out of rebuild", "volume", s.ID, "sco", name, "err", err)
			continue
		}
		headers[scoID{h.Epoch, h.Seq}] = h
	}
	chain := newestChain(headers)
	out.Objects, out.Ignored = len(chain), len(names)-len(chain)
	h, err := d.maps.NewHandle()
	if err != nil {
		return out, err
	}
	r := root{ID: s.ID, Pool: s.Pool, Handle: h, Epochs: []epochSpan{{From: 1, Epoch: s.Epoch}}, Size: s.Size, ModTime: d.now().UnixNano(),
		NextSCO: 1, Name: rootObject{N: 1, PoolName: s.PoolName, Path: s.Path, Kind: s.Kind, Created: d.now().UnixNano()}}
	if len(chain) > 0 {
		r.Epochs = nil
	}
	for id := range headers {
		r.NextSCO = max(r.NextSCO, id.Seq+1)
	}
	for _, c := range chain {
		used, err := d.applySCO(h, uint32(c.Seq), c.Zeros, c.Extents)
		if err != nil {
			return out, err
		}
		if n := len(r.Epochs); n == 0 || r.Epochs[n-1].Epoch != c.Epoch {
			r.Epochs = append(r.Epochs, epochSpan{From: c.Seq, Epoch: c.Epoch})
		}
		r.UsedBlocks += used
		r.Size, r.ModTime, r.Backed, r.Prev = int64(c.Size), c.ModTime, c.LastLog, scoID{c.Epoch, c.Seq}
	}
	// The owner from now on has a higher epoch than any before.
	for id := range headers {
		s.Epoch = max(s.Epoch, id.Epoch)
	}
	s.Epoch++
	r.Epochs = append(r.Epochs, epochSpan{From: r.NextSCO, Epoch: s.Epoch})
	if err := d.maps.Checkpoint([]blockmap.KV{r.encode()}, nil); err != nil {
		return out, err
	}
	d.mu.Lock()
	d.roots[s.ID] = r
	d.mu.Unlock()
	s.Size = r.Size
	out.Spec, out.LastLog, out.ModTime, out.Used = s, r.Backed, time.Unix(0, r.ModTime), r.UsedBlocks*blockSize
	return out, nil
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
