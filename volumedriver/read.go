package volumedriver

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"varve/volumedriver/backend"
	"varve/volumedriver/blockio"
	"varve/volumedriver/blockmap"
	"varve/volumedriver/qos"
	"varve/volumedriver/sco"
	"varve/volumedriver/vfs"
	"varve/volumedriver/writelog"
)

// planBlocks is how much of a read is planned under one hold of the volume's lock.
const planBlocks = 256

// plan says where each block of a read is.
type plan struct {
	at   [planBlocks]where // seq 0: not in the log
	refs [planBlocks]blockmap.Ref
	crcs [planBlocks]uint32 // scratch
	edge [blockSize]byte    // for the blocks of which only a part is wanted
}

var plans = sync.Pool{New: func() any { return new(plan) }}

// TryRead reads p at byte off if nothing has to be waited for, else ErrBusy.
func (v *Volume) TryRead(p []byte, off int64) error {
	limit := v.limiter.Load()
	if !limit.Try(qos.Read, len(p)) {
		return blockio.ErrBusy
	}
	err := v.read(nil, p, off)
	if err != nil {
		limit.Refund(qos.Read, len(p))
	}
	return err
}

// Read reads p at byte off.
func (v *Volume) Read(ctx context.Context, p []byte, off int64) error {
	if err := v.limiter.Load().Wait(ctx, qos.Read, len(p)); err != nil {
		return err
	}
	return v.read(ctx, p, off)
}

// read reads; ctx nil means: do not wait.
func (v *Volume) read(ctx context.Context, p []byte, off int64) error {
	if err := v.err(); err != nil {
		return err
	}
	if v.husk.Load() {
		return blockio.ErrClosed
	}
	if v.reverting.Load() {
		if err := v.waitReverted(ctx); err != nil {
			return err
		}
	}
	if err := checkRange(off, int64(len(p)), v.visible.Load(), false); err != nil {
		return err
	}
	if len(p) == 0 {
		return nil
	}
	if b := v.boot.Load(); b != nil {
		v.noteBoot(b, off, len(p))
	}
	pl := plans.Get().(*plan)
	defer plans.Put(pl)
	for len(p) > 0 {
		head := int(off & (blockSize - 1))
		n := min(len(p), planBlocks*blockSize-head)
		for tries := 0; ; tries++ {
			err := v.readPlanned(ctx, pl, p[:n], off)
			if err == nil {
				break
			}
			// The log recycled a segment between plan and read: the block is on the backend now, so plan again.
			if !errors.Is(err, writelog.ErrStale) || tries > 100 {
				return err
			}
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// readPlanned reads at most planBlocks blocks: plan under the lock, then I/O without it.
func (v *Volume) readPlanned(ctx context.Context, pl *plan, p []byte, off int64) error {
	lba := uint64(off) / blockSize
	n := int((uint64(off)+uint64(len(p))-1)/blockSize - lba + 1)
	if err := v.plan(pl, lba, n, ctx != nil); err != nil {
		return err
	}
	return v.readPlan(ctx, pl, p, off, lba, n)
}

// readPlan reads the n blocks from lba on that were planned, of which p at off is wanted.
func (v *Volume) readPlan(ctx context.Context, pl *plan, p []byte, off int64, lba uint64, n int) error {
	head := int(off & (blockSize - 1))
	for i := 0; i < n; {
		run := pl.run(i, n)
		from, to := i*blockSize-head, (i+run)*blockSize-head
		// Whole blocks go straight to p; a block of which only a part is wanted goes through the edge buffer.
		switch {
		case from < 0 || to > len(p):
			if from < 0 || run == 1 {
				run = 1
				to = from + blockSize
				if err := v.readRun(ctx, pl, i, 1, lba, pl.edge[:]); err != nil {
					return err
				}
				a, b := max(0, -from), min(blockSize, len(p)-from)
				copy(p[from+a:from+b], pl.edge[a:b])
			} else { // the last block of the run is partly wanted: first the whole ones
				run--
				if err := v.readRun(ctx, pl, i, run, lba, p[from:to-blockSize]); err != nil {
					return err
				}
			}
		default:
			if err := v.readRun(ctx, pl, i, run, lba, p[from:to]); err != nil {
				return err
			}
		}
		i += run
	}
	return nil
}

// plan finds each block: in the index, else in the map. With wait it may read map leaves from the disk, which must not
// happen under the lock, since the log's committer needs it. The look-up outside is good if the index has forgotten nothing
// meanwhile: an entry of the map changes only while the index shadows its block.
func (v *Volume) plan(pl *plan, lba uint64, n int, wait bool) error {
	for {
		v.mu.RLock()
		var err error
		forgets := v.forgets
		if v.planLocked(pl, lba, n) {
			err = v.d.maps.TryLookup(v.handle(), lba, pl.refs[:n])
		}
		h := v.handle()
		v.mu.RUnlock()
		if err == nil || !wait || !errors.Is(err, blockio.ErrBusy) {
			return err
		}
		if err := v.d.maps.Lookup(h, lba, pl.refs[:n]); err != nil {
			return err
		}
		v.mu.RLock()
		same := forgets == v.forgets
		v.mu.RUnlock()
		if same {
			return nil
		}
	}
}

// planLocked finds each block in the index; true if the map is needed for some.
func (v *Volume) planLocked(pl *plan, lba uint64, n int) bool {
	if v.index.empty() {
		clear(pl.at[:n])
		return true
	}
	fromMap := false
	for i := range n {
		w, ok := v.index.data[lba+uint64(i)]
		if !ok {
			if z, zero := v.index.zeroAt(lba + uint64(i)); zero {
				w, ok = where{seq: z.seq, zero: true}, true
			}
		}
		pl.at[i] = w
		fromMap = fromMap || !ok
	}
	return fromMap
}

// run gives how many blocks from i on lie one after the other in the same place.
func (pl *plan) run(i, n int) int {
	k := 1
	switch w := pl.at[i]; {
	case w.seq != 0 && w.zero:
		for i+k < n && pl.at[i+k].seq != 0 && pl.at[i+k].zero {
			k++
		}
	case w.seq != 0:
		for i+k < n && pl.at[i+k].seq != 0 && !pl.at[i+k].zero && pl.at[i+k].loc == w.loc.Add(uint32(k)) && pl.at[i+k].key == w.key {
			k++
		}
	case pl.refs[i] == 0:
		for i+k < n && pl.at[i+k].seq == 0 && pl.refs[i+k] == 0 {
			k++
		}
	default:
		o, x := pl.refs[i].Ordinal(), pl.refs[i].Index()
		for i+k < n && pl.at[i+k].seq == 0 && pl.refs[i+k] != 0 && pl.refs[i+k].Ordinal() == o && pl.refs[i+k].Index() == x+uint32(k) {
			k++
		}
	}
	return k
}

// readRun reads k blocks that lie one after the other, from planned block i on, and checks each.
func (v *Volume) readRun(ctx context.Context, pl *plan, i, k int, lba uint64, p []byte) error {
	w := pl.at[i]
	switch {
	case w.seq != 0 && w.zero, w.seq == 0 && pl.refs[i] == 0:
		clear(p)
		return nil
	case w.seq != 0:
		var err error
		if ctx == nil {
			err = v.d.wal.TryReadAt(p, w.loc)
		} else {
			err = v.d.wal.ReadAt(p, w.loc)
		}
		if errors.Is(err, vfs.ErrWouldBlock) {
			return blockio.ErrBusy
		}
		if err != nil {
			return err
		}
		if w.key != 0 {
			crcs := pl.crcs[:k]
			for j := range crcs {
				crcs[j] = pl.at[i+j].crc
			}
			if err := v.unseal(p, crcs, w.loc, w.key); err != nil {
				return err
			}
			for j := range crcs {
				pl.at[i+j].crc = crcs[j] // of the plaintext now; the plan is read once
			}
		}
		for j := range k {
			if sco.Checksum(p[j*blockSize:(j+1)*blockSize]) != pl.at[i+j].crc {
				v.d.metrics.corrupt.Inc()
				return fmt.Errorf("volume %s block %d in the log (seq %d): %w", v.id, lba+uint64(i+j), pl.at[i+j].seq, blockio.ErrCorrupt)
			}
		}
		return nil
	default:
		return v.readObject(ctx, pl.refs[i], p, lba+uint64(i))
	}
}

// handle is where reads and installs go in the block map.
func (v *Volume) handle() blockmap.Handle { return blockmap.Handle(v.head.Load()) }

// readObject reads consecutive blocks of one SCO and checks them against the CRCs of its header. The scrub may move the SCO
// between the look at where it is and the read; then it is looked up again.
func (v *Volume) readObject(ctx context.Context, ref blockmap.Ref, p []byte, lba uint64) error {
	for tries := 0; ; tries++ {
		o, err := v.d.objects.acquire(ctx, v, ref.Ordinal())
		if errors.Is(err, backend.ErrNotExist) && tries < 3 {
			continue
		}
		if err != nil {
			return err
		}
		err = v.readOpen(ctx, o, ref.Index(), p, lba)
		moved := err != nil && errors.Is(err, backend.ErrNotExist) && tries < 3
		if moved {
			v.d.objects.drop(o)
		}
		wrong := ctx != nil && !moved && errors.Is(err, blockio.ErrCorrupt) && tries < rereads
		if wrong {
			discard(o.object)
		}
		v.d.objects.release(o)
		if ctx == nil && errors.Is(err, blockio.ErrCorrupt) {
			return blockio.ErrBusy // whoever may wait reads it again
		}
		if !moved && !wrong {
			return err
		}
	}
}

// rereads is how often bytes that fail their check are read again before the error is the guest's: they may have been changed on
// the way here, or in a cache.
const rereads = 2

// discard has a cache, if the object is read through one, forget what it holds of it.
func discard(o backend.Object) {
	if c, ok := o.(interface{ Discard(off, n int64) }); ok {
		c.Discard(0, o.Size())
	}
}

// readOpen reads consecutive blocks of an open SCO and checks each.
func (v *Volume) readOpen(ctx context.Context, o *openObject, index uint32, p []byte, lba uint64) error {
	var err error
	if off, n, ok := o.table.Direct(index, len(p)/blockSize); ok && n == len(p)/blockSize {
		if ctx == nil {
			err = o.object.TryReadAt(p, off)
		} else {
			err = o.object.ReadAt(ctx, p, off)
		}
	} else if ctx == nil {
		err = o.table.Read(p, index, o.object.TryReadAt)
	} else {
		err = o.table.Read(p, index, func(p []byte, off int64) error { return o.object.ReadAt(ctx, p, off) })
	}
	if err != nil {
		if ctx == nil && errors.Is(err, vfs.ErrWouldBlock) {
			return blockio.ErrBusy
		}
		if errors.Is(err, backend.ErrNotExist) || errors.Is(err, sco.ErrFormat) {
			err = errors.Join(blockio.ErrCorrupt, err)
		}
		return fmt.Errorf("read %s: %w", o.name, err)
	}
	for j := range len(p) / blockSize {
		x := index + uint32(j)
		if !o.table.vouches(x, lba+uint64(j), p[j*blockSize:(j+1)*blockSize]) {
			v.d.metrics.corrupt.Inc()
			return fmt.Errorf("volume %s block %d in %s at %d: %w", v.id, lba+uint64(j), o.name, x, blockio.ErrCorrupt)
		}
	}
	return nil
}

// Extents describes [off, off+n), in order, in at most limit runs; what it returns may end before off+n.
func (v *Volume) Extents(ctx context.Context, off, n int64, limit int) ([]blockio.Extent, error) {
	if err := checkRange(off, n, v.Size(), false); err != nil {
		return nil, err
	}
	if err := v.waitReverted(ctx); err != nil {
		return nil, err
	}
	return extents(ctx, off, n, limit, v.extent)
}

// extents describes [off, off+n) in at most limit runs, asking run for a run from lba on that ends at the latest at end.
func extents(ctx context.Context, off, n int64, limit int, run func(lba, end uint64) (uint64, bool, error)) ([]blockio.Extent, error) {
	var out []blockio.Extent
	add := func(length int64, hole bool) bool {
		if k := len(out); k > 0 && out[k-1].Hole == hole {
			out[k-1].Length += length
			return true
		}
		if len(out) == limit {
			return false
		}
		out = append(out, blockio.Extent{Length: length, Hole: hole, Zero: hole})
		return true
	}
	lba, end := uint64(off)/blockSize, uint64(roundUp(off+n))/blockSize
	pos, last := off, off+n
	for lba < end {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		k, hole, err := run(lba, end)
		if err != nil {
			return nil, err
		}
		lba += k
		to := min(int64(lba)*blockSize, last)
		if !add(to-pos, hole) {
			break
		}
		pos = to
	}
	return out, nil
}

// extent gives a run from lba on in which every block is a hole, or none is.
func (v *Volume) extent(lba, end uint64) (n uint64, hole bool, err error) {
	v.mu.RLock()
	zero, inZeros := v.index.zeroAt(lba)
	next, forgets, h := v.index.nextEvent(lba, end), v.forgets, v.handle()
	leaf, hasLeaf := v.index.leaves.next(lba / leafBlocks)
	v.mu.RUnlock()
	if hasLeaf {
		end = min(end, max(lba, leaf*leafBlocks))
	}
	switch {
	case inZeros && end > lba:
		return min(end, zero.to) - lba, true, nil
	case next > lba:
		n, mapped, err := v.d.maps.Run(h, lba, next)
		v.mu.RLock()
		same := forgets == v.forgets
		v.mu.RUnlock()
		if err != nil || same {
			return n, !mapped, err
		}
		return v.extent(lba, next)
	}
	// A leaf about which the index knows something: block by block.
	pl := plans.Get().(*plan)
	defer plans.Put(pl)
	k := int(min(planBlocks, leafBlocks-lba%leafBlocks))
	if err := v.plan(pl, lba, k, true); err != nil {
		return 0, false, err
	}
	hole = pl.hole(0)
	i := 1
	for i < k && pl.hole(i) == hole {
		i++
	}
	return uint64(i), hole, nil
}

// hole says whether no storage stands behind planned block i.
func (pl *plan) hole(i int) bool {
	if pl.at[i].seq != 0 {
		return pl.at[i].zero
	}
	return pl.refs[i] == 0
}

// Explanation says where the newest version of a block is.
type Explanation struct {
	State  string `json:"state"` // "log", "object", "hole"
	Seq    uint64 `json:"seq,omitempty"`
	Object string `json:"object,omitempty"`
	Index  uint32 `json:"index,omitempty"`
	CRC    uint32 `json:"crc,omitempty"`
	Detail string `json:"detail"`
	// Copies says where the block is besides: "backend", "cache RAM", "cache SSD"; "write log" where State is that.
	Copies []string `json:"copies,omitempty"`
}

// Explain says where block lba is and what vouches for it.
func (v *Volume) Explain(ctx context.Context, lba uint64) (Explanation, error) {
	if err := checkRange(int64(lba)*blockSize, 1, v.Size(), false); err != nil {
		return Explanation{}, err
	}
	pl := new(plan)
	if err := v.plan(pl, lba, 1, true); err != nil {
		return Explanation{}, err
	}
	v.mu.RLock()
	backed := v.root.Backed
	v.mu.RUnlock()
	w, ref := pl.at[0], pl.refs[0]
	switch {
	case w.seq != 0 && w.zero:
		return Explanation{State: "hole", Seq: w.seq, Detail: "zeroed or trimmed, recorded in the write log"}, nil
	case w.seq != 0:
		return Explanation{State: "log", Seq: w.seq, CRC: w.crc, Copies: []string{"write log"},
			Detail: fmt.Sprintf("write log location %#x, on the backend up to sequence %d", uint64(w.loc), backed)}, nil
	case ref == 0:
		return Explanation{State: "hole", Detail: "never written, or trimmed"}, nil
	}
	o, err := v.d.objects.acquire(ctx, v, ref.Ordinal())
	if err != nil {
		return Explanation{}, err
	}
	defer v.d.objects.release(o)
	crc, _ := o.table.CRCOf(ref.Index())
	return Explanation{State: "object", Object: o.name, Index: ref.Index(), CRC: crc, Seq: o.lastLog, Copies: v.copies(o, ref.Index()),
		Detail: fmt.Sprintf("object holds log records up to sequence %d", o.lastLog)}, nil
}

// copies says where the bytes of a block of an SCO are.
func (v *Volume) copies(o *openObject, index uint32) []string {
	out := []string{"backend"}
	f, _, ok := o.table.Frame(index)
	b, err := v.d.backendOf(v.root.Pool)
	if !ok || err != nil {
		return out
	}
	held, ok := b.(interface {
		Held(name string, off, n int64) (ram, disk int64)
	})
	if !ok {
		return out
	}
	ram, disk := held.Held(o.name, f.Off, int64(f.Stored))
	if ram == int64(f.Stored) {
		out = append(out, "cache RAM")
	}
	if disk == int64(f.Stored) {
		out = append(out, "cache SSD")
	}
	return out
}
