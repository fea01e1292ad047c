package volumedriver

import (
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver/backend"
	"varve/volumedriver/blockio"
	"varve/volumedriver/blockmap"
	"varve/volumedriver/sco"
)

// # Scrub
//
// The scrub gives back the space of blocks that nothing can reach any more, checks what is stored, and finds what should not
// be there. It never changes a map: an SCO keeps its number and its blocks keep their indexes, only the place of the SCO
// changes. So its cost is the bytes it moves, however many snapshots and clones share them.
//
//	mark     for each volume that wrote SCOs: walk every stored version of every leaf of all volumes whose maps can name them
//	         (its own, its clones', theirs), and set a bit for each block that is named. One walk, whatever the number of
//	         snapshots: a leaf that many snapshots share is stored once.
//	choose   objects with dead blocks, best first by (1-u)*log(age)/(1+u), u = live/held, until the volume's held/live is below target
//	move     victims' live blocks -> compacted SCOs (same number, log range, zeros, snapshots) -> one container -> Put
//	         -> their places, durably -> the old objects are deleted after a grace period
//
// Dead blocks stay dead: a map entry is only ever made for a new SCO, or copied from a frozen generation that the walk has
// seen. So a mark that is minutes old is still safe; SCOs that were not in the map when it began are left alone. What a walk
// sees too much of (a generation that is being released) is given back by the next one.
//
// A compacted SCO without any blocks stays in the chain: its zeros and log range are part of the volume's history, from
// which a rebuild replays it. The history replayed from compacted SCOs is right at every snapshot and at the head, because
// whoever wrote a block last before such a point is live there, and zeros are never dropped.
//
// The audit compares the list of objects with the places. An object that no place names is an orphan: a try of a Put whose
// outcome was unknown, or left over by a crash between Put and the checkpoint. It is deleted when it has been one for the
// grace period, is of this owner's epoch or an earlier one, and the volume is not fenced. Objects of volumes that this node
// does not know are only counted.

const (
	scrubStop     = 0.75 // victims have at most this share of live blocks
	scrubWindow   = 1 << 17
	containerSCOs = 256
	scrubTries    = 8 // of a Put
)

// ScrubOptions say what one pass does. The zero value reclaims down to the target.
type ScrubOptions struct {
	Target float64       // held/live at which to stop reclaiming; 0: the driver's
	Grace  time.Duration // before replaced and orphaned objects are deleted; 0: the driver's; negative: none
	Audit  bool          // list the backend and look for orphans
	Verify bool          // read and check everything
}

// ScrubReport is what a pass found and did.
type ScrubReport struct {
	Volumes      int
	SCOs         int
	HeldBytes    int64 // on the backend before, by what the places say
	LiveBytes    int64 // blocks that something can reach
	Moved        int   // SCOs
	MovedBytes   int64 // live bytes that were copied
	Containers   int
	FreedBytes   int64 // of objects deleted, now or from earlier passes
	Deleted      int
	Waiting      int // objects in their grace period
	Orphans      []string
	OrphanBytes  int64
	Unknown      int // objects of volumes that this node does not know
	Verified     int // SCOs
	VerifyErrors []string
}

// scrubber is the driver's scrub: one pass at a time.
type scrubber struct {
	d   *Driver
	one sync.Mutex

	mu      sync.Mutex
	graves  map[uuid.UUID]map[string]grave // by vPool, object name
	orphans map[uuid.UUID]map[string]time.Time
	last    map[uuid.UUID]scrubState
	reports map[uuid.UUID]ScrubReport
	space   map[uuid.UUID]VolumeSpace
}

// grave is an object that was replaced and is deleted after a while.
type grave struct {
	since  time.Time
	bytes  int64
	volume uuid.UUID
}

type scrubState struct {
	at      time.Time // its end
	took    time.Duration
	changes uint64
}

// VolumeSpace is what a volume's SCOs take and hold, as of a scrub pass.
type VolumeSpace struct {
	Held int64 // bytes on the backend
	Live int64 // bytes of blocks that the volume, its snapshots, or clones of them can reach
	// History is bytes of blocks beside those that only the rewind window holds.
	History int64
	At      time.Time
}

func newScrubber(d *Driver) *scrubber {
	return &scrubber{d: d, graves: make(map[uuid.UUID]map[string]grave), orphans: make(map[uuid.UUID]map[string]time.Time),
		last: make(map[uuid.UUID]scrubState), reports: make(map[uuid.UUID]ScrubReport), space: make(map[uuid.UUID]VolumeSpace)}
}

// run makes passes over pools that have changed, until ctx ends: when it is time, and earlier where so much was written that its garbage
// would not fit under the target.
func (s *scrubber) run(ctx context.Context) error {
	if s.d.cfg.ScrubEvery < 0 {
		return nil
	}
	tick := time.NewTicker(max(s.d.cfg.ScrubEvery/scrubLooks, time.Millisecond))
	defer tick.Stop()
	began := s.d.now()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		s.d.mu.RLock()
		pools := make([]uuid.UUID, 0, len(s.d.pools))
		for id := range s.d.pools {
			pools = append(pools, id)
		}
		s.d.mu.RUnlock()
		for _, pool := range pools {
			start, changes := s.d.now(), s.changes(pool)
			if !s.due(pool, began, start, changes) {
				continue
			}
			if _, err := s.d.Scrub(ctx, pool, ScrubOptions{}); err != nil && ctx.Err() == nil {
				s.d.log.Warn("scrub", "vpool", pool, "err", err)
			}
			s.mu.Lock()
			s.last[pool] = scrubState{at: s.d.now(), took: s.d.now().Sub(start), changes: changes}
			s.mu.Unlock()
		}
	}
}

const (
	scrubLooks   = 60   // for one pass that is made because it is time
	scrubGrown   = 0.04 // part of what is held that has been written since the last pass, for an early one
	scrubObjects = 64   // at least so many SCOs
	scrubRest    = 5    // times as long as the last pass took, before an early one: the mark walks whole maps
)

// due says whether a pass is to be made.
func (s *scrubber) due(pool uuid.UUID, began, now time.Time, changes uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	last := s.last[pool]
	if last.at.IsZero() {
		last.at = began
	}
	since := now.Sub(last.at)
	if since >= s.d.cfg.ScrubEvery {
		return last.changes != changes || len(s.graves[pool]) > 0
	}
	if changes < last.changes { // a volume has gone
		return false
	}
	written := (changes - last.changes) * uint64(s.d.cfg.SCOBytes)
	return changes-last.changes >= scrubObjects && float64(written) >= scrubGrown*float64(s.reports[pool].HeldBytes) && since >= scrubRest*last.took
}

// changes is a number that grows with what happens to a pool's SCOs and snapshots.
func (s *scrubber) changes(pool uuid.UUID) uint64 {
	var n uint64
	for _, r := range s.d.rootsOf(pool) {
		n += r.Prev.Seq + r.Name.N
	}
	return n
}

// rootsOf gives the roots of a pool's volumes as they are now.
func (d *Driver) rootsOf(pool uuid.UUID) []root {
	d.mu.RLock()
	defer d.mu.RUnlock()
	var out []root
	for _, r := range d.roots {
		if r.Pool == pool {
			out = append(out, r)
		}
	}
	for _, v := range d.volumes {
		v.mu.RLock()
		if v.root.Pool == pool && v.err() == nil {
			out = append(out, v.root)
		}
		v.mu.RUnlock()
	}
	return out
}

// LastScrub is what the last pass over a vPool found.
func (d *Driver) LastScrub(pool uuid.UUID) (ScrubReport, bool) {
	d.scrubber.mu.Lock()
	defer d.scrubber.mu.Unlock()
	r, ok := d.scrubber.reports[pool]
	return r, ok
}

// SpaceOf is what the last scrub pass found of a volume.
func (d *Driver) SpaceOf(volume uuid.UUID) (VolumeSpace, bool) {
	d.scrubber.mu.Lock()
	defer d.scrubber.mu.Unlock()
	r, ok := d.scrubber.space[volume]
	return r, ok
}

// Scrub makes one pass over a vPool.
func (d *Driver) Scrub(ctx context.Context, pool uuid.UUID, o ScrubOptions) (ScrubReport, error) {
	s := d.scrubber
	s.one.Lock()
	defer s.one.Unlock()
	ctx = backend.WithClass(ctx, backend.Scrub)
	if o.Target == 0 {
		o.Target = d.cfg.ScrubTarget
	}
	switch {
	case o.Grace == 0:
		o.Grace = d.cfg.ScrubGrace
	case o.Grace < 0:
		o.Grace = 0
	}
	store, err := d.backendOf(pool)
	if err != nil {
		return ScrubReport{}, fmt.Errorf("scrub: %w", err)
	}
	p := &scrubPass{d: d, s: s, o: o, pool: pool, store: store, roots: d.rootsOf(pool), limit: newByteRate(d)}
	p.report.Volumes = len(p.roots)
	var errs []error
	if err := p.bury(ctx); err != nil { // first, so that there is room for what follows
		errs = append(errs, fmt.Errorf("delete replaced objects of vPool %s: %w", pool, err))
	}
	p.report.Waiting = 0 // counted again at the end
	if err := d.sweep(ctx); err != nil {
		errs = append(errs, err)
	}
	for i := range p.roots {
		if ctx.Err() != nil {
			return p.report, ctx.Err()
		}
		if err := p.volume(ctx, &p.roots[i]); err != nil {
			errs = append(errs, fmt.Errorf("scrub volume %s: %w", p.roots[i].ID, err))
		}
	}
	if o.Audit {
		if err := p.audit(ctx); err != nil {
			errs = append(errs, fmt.Errorf("audit of vPool %s: %w", pool, err))
		}
	}
	if err := p.bury(ctx); err != nil {
		errs = append(errs, fmt.Errorf("delete replaced objects of vPool %s: %w", pool, err))
	}
	s.mu.Lock()
	s.reports[pool] = p.report
	s.mu.Unlock()
	return p.report, errors.Join(errs...)
}

// scrubPass is one pass over one pool.
type scrubPass struct {
	d      *Driver
	s      *scrubber
	o      ScrubOptions
	pool   uuid.UUID
	store  backend.Backend
	roots  []root
	limit  *byteRate
	report ScrubReport
	places map[string]bool // names of objects in use, of the volumes seen so far
	buf    []byte          // planBlocks blocks, of the SCO that is being verified
}

// stored is an SCO that the volume's history is made of.
type stored struct {
	seq  uint64
	at   place
	live int
}

// history lists the SCOs of a volume that are in its map, oldest first, and drops the records of those that a crash has
// cut off: they were put, but the log was cut anew after the restart.
func (p *scrubPass) history(r *root) ([]stored, error) {
	prefix := objectsKey(r.ID)
	all := make(map[uint64]place)
	err := p.d.maps.Scan(prefix, func(key, value []byte) error {
		var at place
		if len(key) != len(prefix)+8 {
			return fmt.Errorf("record %q: %w", key, blockio.ErrCorrupt)
		}
		if err := json.Unmarshal(value, &at); err != nil {
			return fmt.Errorf("record %q: %w", key, errors.Join(err, blockio.ErrCorrupt))
		}
		all[binary.BigEndian.Uint64(key[len(prefix):])] = at
		return nil
	})
	if err != nil {
		return nil, err
	}
	var out []stored
	for seq := r.Prev.Seq; seq != 0; {
		at, ok := all[seq]
		if !ok {
			return nil, fmt.Errorf("no record of SCO %d: %w", seq, blockio.ErrCorrupt)
		}
		out = append(out, stored{seq: seq, at: at})
		delete(all, seq)
		seq = at.Prev
	}
	slices.Reverse(out)
	var stale [][]byte
	for seq := range all {
		if seq < r.Prev.Seq {
			stale = append(stale, objectRecordKey(r.ID, seq))
		}
	}
	if len(stale) > 0 {
		if err := p.d.maps.Update(nil, stale); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// volume marks, chooses and moves the SCOs that one volume wrote.
func (p *scrubPass) volume(ctx context.Context, r *root) error {
	scos, err := p.history(r)
	if err != nil || len(scos) == 0 {
		return err
	}
	p.report.SCOs += len(scos)
	var space VolumeSpace
	held, live := 0, 0
	for _, s := range scos {
		space.Held += s.at.Bytes
		held += s.at.Blocks
	}
	history, rewind, err := p.d.historyFrom(r) // before the mark, which sees what has been made of a base that goes meanwhile
	if err != nil {
		return err
	}
	marks := make(map[uint64]*liveBits)
	for from := 0; from < len(scos); from += scrubWindow {
		window := scos[from:min(from+scrubWindow, len(scos))]
		found, err := p.mark(ctx, r.ID, window[0].seq, window[len(window)-1].seq)
		if err != nil {
			return fmt.Errorf("mark: %w", err)
		}
		for i := range window {
			bits := found[window[i].seq]
			window[i].live = bits.count()
			space.Live += int64(window[i].live) * blockSize
			if rewind && window[i].at.Last > history {
				space.History += int64(window[i].at.Blocks-window[i].live) * blockSize
				window[i].live, bits = window[i].at.Blocks, &allLive
			}
			live += window[i].live
			switch { // nil: nothing of it is live
			case bits != nil && window[i].live == window[i].at.Blocks:
				marks[window[i].seq] = &allLive
			case bits != nil:
				marks[window[i].seq] = bits
			}
		}
	}
	space.At = p.d.now()
	p.report.HeldBytes += space.Held
	p.report.LiveBytes += space.Live
	p.s.mu.Lock()
	p.s.space[r.ID] = space
	p.s.mu.Unlock()
	if p.o.Verify {
		if err := p.verify(ctx, r.ID, scos); err != nil {
			return err
		}
	}
	return p.move(ctx, r, p.choose(scos, held, live), marks)
}

// liveBits says which blocks of an SCO can be reached.
type liveBits [sco.MaxBlocks / 64]uint64

// allLive stands for all SCOs of which every block is live.
var allLive = func() (b liveBits) {
	for i := range b {
		b[i] = ^uint64(0)
	}
	return b
}()

func (b *liveBits) set(i uint32) { b[i/64] |= 1 << (i % 64) }

func (b *liveBits) has(i uint32) bool { return b != nil && b[i/64]&(1<<(i%64)) != 0 }

func (b *liveBits) count() int {
	n := 0
	if b != nil {
		for _, w := range b {
			n += bits.OnesCount64(w)
		}
	}
	return n
}

// mark finds which blocks of the SCOs numbered from..to that a volume wrote any map can name.
func (p *scrubPass) mark(ctx context.Context, writer uuid.UUID, from, to uint64) (map[uint64]*liveBits, error) {
	out := make(map[uint64]*liveBits)
	var last uint64
	var bits *liveBits
	// The roots are looked at anew: a clone that appeared since has its parent's blocks, which are seen there too.
	for _, r := range p.d.rootsOf(p.pool) {
		spans := *p.d.owners.spans(&r)
		if !slices.ContainsFunc(spans, func(s ownerSpan) bool { return s.Volume == writer }) {
			continue
		}
		for _, b := range r.Branches {
			err := p.d.eachVersion(ctx, &r, b.Handle, func(refs *[blockmap.LeafBlocks]blockmap.Ref) {
				for _, ref := range refs {
					seq := uint64(ref.Ordinal())
					if seq < from || seq > to {
						continue
					}
					if seq != last {
						if bits, last = out[seq], seq; bits == nil && spanAt(spans, seq).Volume == writer {
							bits = new(liveBits)
							out[seq] = bits
						}
					}
					if bits != nil {
						bits.set(ref.Index())
					}
				}
			})
			if err != nil {
				return nil, err
			}
			last, bits = 0, nil // the next volume may know the number as somebody else's
		}
	}
	return out, nil
}

// freezesMax is how many snapshots may be taken of a volume during a walk over its map.
const freezesMax = 4096

// eachVersion calls fn for what every generation of a handle that can be read holds, each version of a leaf once. A
// generation that is frozen during the walk counts as well.
func (d *Driver) eachVersion(ctx context.Context, r *root, h blockmap.Handle, fn func(*[blockmap.LeafBlocks]blockmap.Ref)) error {
	live, from, err := d.liveGenerations(r, h)
	if err != nil {
		return err
	}
	for i := range uint32(freezesMax) {
		live = append(live, from+i)
	}
	err = d.maps.EachVersion(ctx, h, live, func(_ uint64, versions []blockmap.Version) error {
		for _, v := range versions {
			fn(v.Refs)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if now, err := d.maps.Generation(h); err != nil || now >= from+freezesMax {
		return errors.Join(err, fmt.Errorf("more than %d snapshots during the walk", freezesMax))
	}
	return nil
}

// liveGenerations gives the frozen generations of a handle that something needs, and the generation from which on any may be.
func (d *Driver) liveGenerations(r *root, h blockmap.Handle) (live []uint32, from uint32, err error) {
	if v := d.lookup(r.ID); v != nil {
		return v.line(h)
	}
	if from, err = d.maps.Generation(h); err != nil {
		return nil, 0, err
	}
	for _, b := range r.Branches {
		if b.Parent == h {
			live = append(live, b.Gen)
		}
	}
	err = d.maps.Scan(snapshotsKey(r.ID), func(_, value []byte) error {
		var s snapshot
		if err := json.Unmarshal(value, &s); err != nil {
			return errors.Join(blockio.ErrCorrupt, err)
		}
		if s.Handle == h && s.Gen != 0 {
			live = append(live, s.Gen)
		}
		return nil
	})
	return live, from, err
}

// spanAt is Volume.writer for spans that belong to no open volume.
func spanAt(spans []ownerSpan, seq uint64) ownerSpan {
	for i := len(spans) - 1; i > 0; i-- {
		if seq >= spans[i].From {
			return spans[i]
		}
	}
	return spans[0]
}

// unit is an object on the backend: an SCO's own, or a container. It is moved whole or not at all, since the space of a container is
// given back only when nothing in it is needed any more.
type unit struct {
	scos         []stored // oldest first
	blocks, live int
	written      float64 // when its live blocks were, on the average, in SCOs since the first
}

func units(scos []stored) []unit {
	var out []unit
	at := make(map[string]int)
	for _, s := range scos {
		i, ok := at[s.at.Container]
		if s.at.own() || !ok {
			i = len(out)
			out = append(out, unit{})
			if !s.at.own() {
				at[s.at.Container] = i
			}
		}
		u := &out[i]
		u.scos = append(u.scos, s)
		u.blocks += s.at.Blocks
		u.live += s.live
		u.written += float64(s.live) * float64(s.seq)
	}
	for i := range out {
		if u := &out[i]; u.live > 0 {
			u.written /= float64(u.live)
		}
	}
	return out
}

// choose gives the victims, oldest first.
func (p *scrubPass) choose(scos []stored, held, live int) []unit {
	target := max(1, p.o.Target)
	if float64(held) <= target*float64(live) {
		return nil
	}
	newest := float64(scos[len(scos)-1].seq)
	// Age itself (Rosenblum's cost-benefit) moves too much of what is old and nearly full: at 1.39 times the live bytes, simulated, 2.25
	// bytes are put for each one written uniformly at random and 1.42 for a zipf of 0.99; with its logarithm 1.98 and 1.27.
	score := func(o unit) float64 {
		u := float64(o.live) / float64(o.blocks)
		return (1 - u) * math.Log2(newest-o.written+2) / (1 + u)
	}
	var victims []unit
	for _, o := range units(scos) {
		if o.blocks > 0 && o.live < o.blocks && float64(o.live) <= scrubStop*float64(o.blocks) {
			victims = append(victims, o)
		}
	}
	slices.SortFunc(victims, func(a, b unit) int { return cmp.Compare(score(b), score(a)) })
	for i, o := range victims {
		if float64(held) <= target*float64(live) {
			victims = victims[:i]
			break
		}
		held -= o.blocks - o.live
	}
	slices.SortFunc(victims, func(a, b unit) int {
		return cmp.Or(cmp.Compare(a.written, b.written), cmp.Compare(a.scos[0].seq, b.scos[0].seq))
	})
	return victims
}

// move compacts the victims into containers of up to an SCO's worth of blocks each.
func (p *scrubPass) move(ctx context.Context, r *root, victims []unit, marks map[uint64]*liveBits) error {
	for len(victims) > 0 {
		n, scos, blocks := 0, 0, 0
		for n < len(victims) && (n == 0 || scos+len(victims[n].scos) <= containerSCOs && blocks+victims[n].live <= sco.MaxBlocks) {
			blocks += victims[n].live
			scos += len(victims[n].scos)
			n++
		}
		if err := p.container(ctx, r, victims[:n], marks); err != nil {
			return err
		}
		victims = victims[n:]
	}
	return nil
}

// container moves a few objects into one new object.
func (p *scrubPass) container(ctx context.Context, r *root, from []unit, marks map[uint64]*liveBits) error {
	d := p.d
	var victims []stored
	for _, o := range from {
		victims = append(victims, o.scos...)
	}
	number := uint64(d.now().UnixNano())
	c := sco.NewContainer(sco.Container{Volume: r.ID, Epoch: r.epoch(), N: number, Created: d.now().UnixNano()})
	places := make([]place, len(victims))
	b := new(sco.Builder)
	now, _, ok := d.rootNow(r.ID) // the key may have been rotated since the pass began
	if !ok {
		return fmt.Errorf("volume was deleted meanwhile: %w", blockio.ErrClosed)
	}
	options, err := d.sealOptions(&now)
	if err != nil {
		return err
	}
	if options.Codec != sco.None {
		options.Codec = sco.Zstd // what is moved is cold
	}
	options.Align = 512
	for i, s := range victims {
		if err := p.limit.wait(ctx, s.at.Bytes); err != nil {
			return err
		}
		at, err := p.compact(ctx, b, r.ID, s, marks[s.seq], options, c)
		if err != nil {
			return fmt.Errorf("compact sco %d: %w", s.seq, err)
		}
		places[i] = at
	}
	parts := c.Finish()
	var bytes int64
	for _, part := range parts {
		bytes += int64(len(part))
	}
	if err := p.limit.wait(ctx, bytes); err != nil {
		return err
	}
	name := ""
	// A store that is full or away for long ends the pass, which can be made again; what it has replaced is deleted all the same.
	var last error
	tries := 0
	giveUp := func() error {
		if tries++; tries >= scrubTries || errors.Is(last, backend.ErrNoSpace) {
			return cmp.Or(last, errNoPool)
		}
		return nil
	}
	err = d.retryPool(ctx, p.pool, giveUp, func(attempt int, store backend.Backend) error {
		name = sco.ContainerName(r.ID, r.epoch(), number, attempt)
		last = store.Put(ctx, name, parts...)
		return last
	})
	if err != nil {
		return err
	}
	if !d.owns(r) {
		return fmt.Errorf("volume was deleted or taken over meanwhile: %w", blockio.ErrFenced)
	}
	puts := make([]blockmap.KV, len(victims))
	for i, s := range victims {
		places[i].Container, places[i].Off = name, c.Container().Entries[i].Offset
		puts[i] = places[i].encode(r.ID, s.seq)
	}
	if err := d.maps.Update(puts, nil); err != nil {
		return err
	}
	spans := *d.owners.spans(r)
	for i, s := range victims {
		d.objects.forgetSCO(spans[len(spans)-1].Number, s.seq)
		p.report.MovedBytes += places[i].Bytes
	}
	for _, o := range from {
		bytes := int64(0)
		for _, s := range o.scos {
			bytes += s.at.Bytes
		}
		p.grave(r.ID, o.scos[0].at.name(r.ID, o.scos[0].seq), bytes)
	}
	p.report.Moved += len(victims)
	p.report.Containers++
	d.metrics.scrubMoved.Add(float64(len(victims)))
	return nil
}

// compact adds the live blocks of one SCO to a container.
func (p *scrubPass) compact(ctx context.Context, b *sco.Builder, volume uuid.UUID, s stored, live *liveBits, o sco.Options,
	c *sco.ContainerBuilder) (place, error) {
	object, h, err := p.d.openPlace(ctx, p.pool, volume, s.seq, s.at)
	if err != nil {
		return place{}, err
	}
	defer object.object.Close()
	err = b.Compact(h, p.d.now().UnixNano(), o, live.has, func(dst []byte, index uint32) error {
		return object.table.Read(dst, index, func(p []byte, off int64) error { return object.object.ReadAt(ctx, p, off) })
	})
	if err != nil {
		return place{}, err
	}
	parts, err := b.Finish()
	if err != nil {
		return place{}, err
	}
	if err := c.Add(b.Header(), parts); err != nil {
		return place{}, err
	}
	at := s.at
	at.Attempt, at.Container, at.Off, at.Bytes, at.Blocks = 0, "", 0, b.Header().ObjectBytes(), b.Header().Blocks()
	return at, nil
}

// owns says whether the volume is still this node's, in the same epoch.
func (d *Driver) owns(r *root) bool {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if v := d.volumes[r.ID]; v != nil {
		v.mu.RLock()
		defer v.mu.RUnlock()
		return v.err() == nil && v.root.epoch() == r.epoch()
	}
	now, ok := d.roots[r.ID]
	return ok && now.epoch() == r.epoch()
}

func (p *scrubPass) grave(volume uuid.UUID, name string, bytes int64) {
	p.s.mu.Lock()
	defer p.s.mu.Unlock()
	if p.s.graves[p.pool] == nil {
		p.s.graves[p.pool] = make(map[string]grave)
	}
	p.s.graves[p.pool][name] = grave{p.d.now(), bytes, volume}
}

// bury deletes the replaced objects whose grace period is over.
func (p *scrubPass) bury(ctx context.Context) error {
	now := p.d.now()
	p.s.mu.Lock()
	var names []string
	var bytes int64
	for name, g := range p.s.graves[p.pool] {
		if now.Sub(g.since) >= p.o.Grace {
			names = append(names, name)
			bytes += g.bytes
		} else {
			p.report.Waiting++
		}
	}
	p.s.mu.Unlock()
	if len(names) == 0 {
		return nil
	}
	if err := backend.DeleteAll(ctx, p.store, names); err != nil {
		return err
	}
	p.s.mu.Lock()
	for _, name := range names {
		delete(p.s.graves[p.pool], name)
	}
	p.s.mu.Unlock()
	p.report.Deleted += len(names)
	p.report.FreedBytes += bytes
	p.d.metrics.scrubFreed.Add(float64(bytes))
	return nil
}

// verify reads SCOs whole and checks every block.
func (p *scrubPass) verify(ctx context.Context, volume uuid.UUID, scos []stored) error {
	for _, s := range scos {
		if err := p.limit.wait(ctx, s.at.Bytes); err != nil {
			return err
		}
		err := p.verifySCO(ctx, volume, s)
		if errors.Is(err, backend.ErrNotExist) { // moved meanwhile, or gone
			if at, e := p.d.placeOf(volume, s.seq); e == nil && at != s.at {
				err = p.verifySCO(ctx, volume, stored{seq: s.seq, at: at})
			}
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		p.report.Verified++
		if err != nil {
			p.report.VerifyErrors = append(p.report.VerifyErrors, err.Error())
			p.d.metrics.corrupt.Inc()
			p.d.log.Error("stored object is damaged", "volume", volume, "sco", s.at.name(volume, s.seq), "err", err)
		}
	}
	return nil
}

func (p *scrubPass) verifySCO(ctx context.Context, volume uuid.UUID, s stored) error {
	o, h, err := p.d.openPlace(ctx, p.pool, volume, s.seq, s.at)
	if err != nil {
		return err
	}
	defer o.object.Close()
	if s.at.Off+h.ObjectBytes() > o.object.Size() {
		return fmt.Errorf("sco %s: cut off at %d of %d bytes: %w", o.name, o.object.Size(), s.at.Off+h.ObjectBytes(), blockio.ErrCorrupt)
	}
	foot := make([]byte, sco.FooterBytes)
	if err := o.object.ReadAt(ctx, foot, s.at.Off+h.ObjectBytes()-sco.FooterBytes); err != nil {
		return fmt.Errorf("sco %s: %w", o.name, err)
	}
	if err := h.CheckFooter(foot); err != nil {
		return fmt.Errorf("sco %s: %w", o.name, errors.Join(blockio.ErrCorrupt, err))
	}
	if p.buf == nil {
		p.buf = make([]byte, planBlocks*blockSize)
	}
	v := &Volume{d: p.d, id: volume}
	for _, e := range h.Extents {
		for at := uint32(0); at < e.Blocks; at += planBlocks {
			n := min(planBlocks, e.Blocks-at)
			if err := v.readOpen(ctx, o, e.Index+at, p.buf[:n*blockSize], e.LBA+uint64(at)); err != nil {
				return fmt.Errorf("sco %s: %w", o.name, err)
			}
		}
	}
	return nil
}

// audit looks for objects that no place names.
func (p *scrubPass) audit(ctx context.Context) error {
	now := p.d.now()
	found := make(map[string]int64)
	for _, prefix := range []string{"v/", "c/"} {
		if err := eachObject(ctx, p.store, prefix, func(i backend.Info) error {
			orphan, err := p.orphan(i.Name)
			if orphan {
				found[i.Name] = i.Size
			}
			return err
		}); err != nil {
			return err
		}
	}
	p.s.mu.Lock()
	defer p.s.mu.Unlock()
	seen := make(map[string]time.Time, len(found))
	for name, size := range found {
		since, ok := p.s.orphans[p.pool][name]
		if !ok {
			since = now
		}
		seen[name] = since
		p.report.Orphans = append(p.report.Orphans, name)
		p.report.OrphanBytes += size
		if now.Sub(since) >= p.o.Grace {
			if p.s.graves[p.pool] == nil {
				p.s.graves[p.pool] = make(map[string]grave)
			}
			p.s.graves[p.pool][name] = grave{since: since, bytes: size}
		}
	}
	slices.Sort(p.report.Orphans)
	p.s.orphans[p.pool] = seen
	return nil
}

// orphan says whether an object belongs to a volume of this node and nothing names it. The volume's state is looked at after
// the object was listed, so what was put before the listing and is still under way has a number that is not installed yet.
func (p *scrubPass) orphan(name string) (bool, error) {
	id, epoch, number, _, err := sco.ParseName(name)
	container := false
	if err != nil {
		if id, epoch, number, _, err = sco.ParseContainerName(name); err != nil {
			return false, nil // not ours to judge
		}
		container = true
	}
	p.s.mu.Lock()
	_, buried := p.s.graves[p.pool][name]
	p.s.mu.Unlock()
	if buried {
		return false, nil
	}
	r, first, ok := p.d.rootNow(id)
	switch {
	case !ok:
		p.report.Unknown++
		return false, nil
	case epoch > r.epoch():
		return false, nil // somebody else's, later than us
	case container:
		return p.unnamed(id, name)
	}
	at, err := p.d.placeOf(id, number)
	if err == nil {
		return at.name(id, number) != name, nil
	}
	if !errors.Is(err, blockmap.ErrNotFound) {
		return false, err
	}
	return number < first || number <= r.Prev.Seq, nil
}

// unnamed says whether no place of the volume names the container.
func (p *scrubPass) unnamed(id uuid.UUID, name string) (bool, error) {
	if p.places == nil {
		p.places = make(map[string]bool)
	}
	key := id.String()
	if !p.places[key] {
		p.places[key] = true
		err := p.d.maps.Scan(objectsKey(id), func(_, value []byte) error {
			var at place
			if err := json.Unmarshal(value, &at); err != nil {
				return errors.Join(blockio.ErrCorrupt, err)
			}
			if !at.own() {
				p.places[at.Container] = true
			}
			return nil
		})
		if err != nil {
			return false, err
		}
	}
	return !p.places[name], nil
}

// rootNow gives a volume's root, and the first SCO number that this run of the program may have used.
func (d *Driver) rootNow(id uuid.UUID) (r root, first uint64, ok bool) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if v := d.volumes[id]; v != nil {
		v.mu.RLock()
		defer v.mu.RUnlock()
		return v.root, v.firstSCO, v.err() == nil
	}
	r, ok = d.roots[id]
	return r, r.NextSCO, ok
}

// byteRate paces the scrub: so many bytes per second, less while guests' writes press on the log.
type byteRate struct {
	d    *Driver
	next time.Time
}

func newByteRate(d *Driver) *byteRate { return &byteRate{d: d} }

func (r *byteRate) wait(ctx context.Context, n int64) error {
	rate := r.d.cfg.ScrubBytesPerSecond
	if rate < 0 {
		return ctx.Err()
	}
	if r.d.wal.Stats().Occupancy >= urgentOccupancy {
		rate /= 4
	}
	now := time.Now()
	if r.next.Before(now) {
		r.next = now
	}
	r.next = r.next.Add(time.Duration(float64(n) / float64(rate) * float64(time.Second)))
	if pause := r.next.Sub(now) - time.Second; pause > 0 {
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
	return ctx.Err()
}
