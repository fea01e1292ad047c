package volumedriver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver/backend"
	"varve/volumedriver/blockio"
	"varve/volumedriver/blockmap"
	"varve/volumedriver/sco"
	"varve/volumedriver/writelog"
)

// Destaging policy. What is overwritten while it waits in the log is never uploaded, so a seal waits a little even when an
// SCO's worth is there; pressure on the log ends the wait.
const (
	sealAge         = 10 * time.Second // an SCO's worth older than this is sealed
	sealIdle        = 10 * time.Second // at least sealIdleBytes, and nothing new for so long: sealed
	sealIdleBytes   = 1 << 20
	sealAnyAge      = 60 * time.Second // anything older is sealed
	cachedIdle      = time.Second      // nothing new for so long: what is sealed stays in the page cache
	eagerOccupancy  = 0.2              // of the log: an SCO's worth is sealed at once
	urgentOccupancy = 0.5              // of the log: whatever holds the oldest segment is sealed, however little
	jobsMax         = 4                // SCOs being built or put, per node, on backends that are near
	farJobsMax      = 6                // on others too
	volumeJobsMax   = 2                // per volume
	farVolumeJobs   = 4                // per volume whose backend takes several at a time to be kept busy
	recordsPerSeal  = 16384            // looked at for one SCO
	putTimeout      = 2 * time.Minute
)

// destageState is a volume's progress from the log to the backend. It is guarded by Volume.mu.
type destageState struct {
	sealed     uint64 // last record that is in a job
	sealedSize int64  // size of the volume after it
	sealedTime int64  // modification time after it
	marks      int    // snapshots and rollbacks logged after it
	unsealed   int64  // payload bytes logged after it
	next       uint64 // number of the next SCO
	prev       scoID  // the SCO before it
	jobs       []*job // sealed, not yet installed, in order
	last       int64  // time of the last record logged
}

// job is one SCO on its way. Jobs of a volume are built and put in parallel, and installed in order.
type job struct {
	v           *Volume
	id          scoID
	prev        scoID
	first, last uint64 // log sequences (first, last]
	size        int64
	modTime     int64
	time        int64  // of the last record
	marks       []mark // snapshots at the end of the range
	revert      uint64 // the range is one rollback, to the snapshot with this sequence number
	picks       []pick
	zeros       []sco.Range
	cached      bool // it is put in a pause, so that it may stay in the page cache, as it was there in the log
	put         bool // durable on the backend, at
	at          place
	extents     []sco.Extent
	bytes       int64
}

// pick is a block that goes into an SCO.
type pick struct {
	lba uint64
	loc writelog.Loc
	crc uint32 // as it lies in the log
	key uint16
}

// due says whether the volume has something to seal now.
func (v *Volume) due(now time.Time, occupancy float64, pins bool) bool {
	most := v.jobsMax() // before mu: it takes the driver's lock
	v.mu.RLock()
	defer v.mu.RUnlock()
	s := &v.destage
	if len(s.jobs) >= most || v.logged.Load() == s.sealed || v.err() != nil || v.stuck.Load() != nil {
		return false
	}
	if v.d.draining.Load() > 0 || s.marks > 0 || v.hurry.Load() > s.sealed {
		return true
	}
	if occupancy >= urgentOccupancy && pins || s.unsealed >= v.d.cfg.SCOBytes && occupancy >= eagerOccupancy {
		return true
	}
	var oldest int64
	v.queue.after(s.sealed, func(r *record) bool { oldest = r.time; return false })
	age, idle := now.Sub(time.Unix(0, oldest)), now.Sub(time.Unix(0, s.last))
	return s.unsealed >= v.d.cfg.SCOBytes && age >= v.d.cfg.sealAge ||
		s.unsealed >= sealIdleBytes && idle >= v.d.cfg.sealAge ||
		age >= v.d.cfg.sealAnyAge
}

// cut takes the next records of the volume, as many as fit an SCO, and makes a job of them; nil if there are none. Only
// the scheduler calls it, so there is one cut of a volume at a time.
//
// Within the range the newest version of a block counts; a zeroed range removes what was picked before. So applying the
// zeros first and then the data gives the state after the range. A snapshot ends the range, so that some SCO ends where the
// snapshot is; snapshots between which nothing was written share one. A rollback is a range of its own.
func (v *Volume) cut(limitBlocks int) *job {
	v.mu.RLock()
	s := &v.destage
	j := &job{v: v, first: s.sealed, size: s.sealedSize, modTime: s.sealedTime, prev: s.prev, last: s.sealed}
	j.cached = v.d.now().Sub(time.Unix(0, s.last)) >= cachedIdle
	newest := make(map[uint64]pick)
	records := 0
	seconds := v.root.Options.Rewind > 0 // then no SCO holds records of two
	var bytes int64
	v.queue.after(s.sealed, func(r *record) bool {
		if records == recordsPerSeal || len(j.zeros) == sco.MaxZeros || r.kind == writelog.Data && len(newest)+int(r.blocks) > limitBlocks {
			return false
		}
		snap, revert := r.kind == writelog.Mark && r.flags&recordSnap != 0, r.kind == writelog.Mark && r.flags&recordRevert != 0
		if len(j.marks) > 0 && !snap || revert && records > 0 {
			return false
		}
		if seconds && records > 0 && r.time/int64(time.Second) != j.time/int64(time.Second) {
			return false
		}
		j.time = r.time
		records++
		switch r.kind {
		case writelog.Data:
			for i := range r.blocks {
				newest[r.lba+i] = pick{r.lba + i, r.loc.Add(uint32(i)), r.crcOf(int(i)), r.key}
			}
			bytes += int64(r.blocks) * blockSize
			if r.value != 0 {
				j.size = max(j.size, int64(r.value))
			}
		case writelog.Zero:
			j.zero(newest, r.lba, r.blocks)
		case writelog.Size:
			if from, to := uint64(roundUp(int64(r.value)))/blockSize, uint64(roundUp(r.sizeBefore))/blockSize; from < to {
				j.zero(newest, from, to-from)
			}
			j.size = int64(r.value)
		case writelog.Mark:
			if snap {
				j.marks = append(j.marks, v.markLocked(r))
			}
			if revert {
				j.revert = r.value
				j.size = v.snapshotAtLocked(r.value).size(j.size)
			}
		}
		j.modTime = modTimeAfter(j.modTime, r.kind, r.flags, r.value, r.time)
		j.last = r.seq
		return !revert
	})
	v.mu.RUnlock()
	if records == 0 {
		return nil
	}
	j.picks = make([]pick, 0, len(newest))
	for _, p := range newest {
		j.picks = append(j.picks, p)
	}
	slices.SortFunc(j.picks, func(a, b pick) int { return cmp.Compare(a.lba, b.lba) })

	v.mu.Lock()
	defer v.mu.Unlock()
	j.id = scoID{v.root.epoch(), s.next}
	s.next++
	s.prev = j.id
	s.sealed, s.sealedSize, s.sealedTime = j.last, j.size, j.modTime
	s.marks -= len(j.marks)
	if j.revert != 0 {
		s.marks--
	}
	s.unsealed -= bytes
	s.jobs = append(s.jobs, j)
	return j
}

func (j *job) zero(newest map[uint64]pick, lba, n uint64) {
	j.zeros = append(j.zeros, sco.Range{LBA: lba, Blocks: n})
	if n < uint64(len(newest)) {
		for i := range n {
			delete(newest, lba+i)
		}
		return
	}
	for b := range newest {
		if b >= lba && b-lba < n {
			delete(newest, b)
		}
	}
}

// destager moves records from the log to the backends.
type destager struct {
	d        *Driver
	wake     chan struct{}
	mu       sync.Mutex
	dirty    map[*Volume]struct{} // have records in the log
	running  int
	builders []*sco.Builder
	wg       sync.WaitGroup
}

func newDestager(d *Driver) *destager {
	return &destager{d: d, wake: make(chan struct{}, 1), dirty: make(map[*Volume]struct{})}
}

// add notes that the volume has something to destage. Never called with Volume.mu held.
func (s *destager) add(v *Volume) {
	if v.dirty.Swap(true) {
		return
	}
	s.mu.Lock()
	s.dirty[v] = struct{}{}
	s.mu.Unlock()
}

func (s *destager) drop(v *Volume) {
	s.mu.Lock()
	delete(s.dirty, v)
	s.mu.Unlock()
}

func (s *destager) notify() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// run seals and puts until ctx ends, then waits for the jobs under way.
func (s *destager) run(ctx context.Context) error {
	defer s.wg.Wait()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		s.schedule(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-s.wake:
		case <-tick.C:
		}
	}
}

// schedule starts as many jobs as are due and allowed.
func (s *destager) schedule(ctx context.Context) {
	occupancy := s.d.wal.Stats().Occupancy
	var pinning map[*Volume]bool
	if occupancy >= urgentOccupancy {
		pinning = make(map[*Volume]bool)
		_, ids := s.d.wal.Oldest()
		for _, id := range ids {
			if v := s.d.lookup(id); v != nil {
				pinning[v] = true
			}
		}
	}
	now := s.d.now()
	s.mu.Lock()
	candidates := make([]*Volume, 0, len(s.dirty))
	for v := range pinning {
		candidates = append(candidates, v)
	}
	for v := range s.dirty {
		if !pinning[v] {
			candidates = append(candidates, v)
		}
	}
	s.mu.Unlock()
	for _, v := range candidates {
		for v.due(now, occupancy, pinning[v]) {
			if !s.begin(v) {
				break
			}
			j := v.cut(int(s.d.cfg.SCOBytes / blockSize))
			if j == nil {
				s.finished(v)
				break
			}
			s.wg.Go(func() {
				defer s.finished(v)
				if err := s.process(ctx, j); err != nil && ctx.Err() == nil && v.err() == nil {
					// What is readable stays readable. The records stay in the log, and nothing of this volume may pass them.
					v.stuck.Store(&err)
					s.d.log.Error("volume no longer goes to its backend", "volume", v.id, "err", err)
				}
			})
		}
		v.putRoot(ctx)
	}
}

// begin takes a place for one more job of the volume, if there is one and the volume is not going away.
func (s *destager) begin(v *Volume) bool {
	limit := jobsMax
	if v.jobsMax() > volumeJobsMax {
		limit = farJobsMax
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.running >= limit {
		return false
	}
	v.running.Add(1)
	if v.err() != nil { // a deletion waits for running to be 0 after it has set this
		v.running.Add(-1)
		return false
	}
	s.running++
	return true
}

// jobsMax is how many SCOs of the volume may be under way at a time. Where each waits for a network they have to overlap; on a disk
// here, more than two only take memory.
func (v *Volume) jobsMax() int {
	store, err := v.d.backendOf(v.root.Pool)
	if err == nil && backend.Distant(store) {
		return farVolumeJobs
	}
	return volumeJobsMax
}

func (s *destager) finished(v *Volume) {
	s.mu.Lock()
	s.running--
	s.mu.Unlock()
	v.running.Add(-1)
	s.notify()
}

func (s *destager) builder(o sco.Options, h sco.Header, blocks int) *sco.Builder {
	s.mu.Lock()
	var b *sco.Builder
	if n := len(s.builders); n > 0 {
		b, s.builders = s.builders[n-1], s.builders[:n-1]
	}
	s.mu.Unlock()
	if b == nil {
		return sco.New(h, blocks, o)
	}
	b.Reset(h, blocks, o)
	return b
}

func (s *destager) keep(b *sco.Builder) {
	s.mu.Lock()
	if len(s.builders) < volumeJobsMax || len(s.builders) < s.running {
		s.builders = append(s.builders, b)
	}
	s.mu.Unlock()
}

// process builds, puts and installs one job. An error means that the volume can't go on: its log is unreadable.
func (s *destager) process(ctx context.Context, j *job) error {
	v := j.v
	if err := v.reserve(j.id.Seq); err != nil {
		return err
	}
	// Nothing goes to the backend that a power cut could take from the log.
	if err := s.d.wal.Sync(ctx, v.lastBatch.Load()); err != nil {
		return err
	}
	o, err := v.waitSealOptions(ctx)
	if err != nil {
		return err
	}
	b := s.builder(o, sco.Header{Volume: v.id, Epoch: j.id.Epoch, Seq: j.id.Seq, FirstLog: j.first, LastLog: j.last,
		PrevEpoch: j.prev.Epoch, PrevSeq: j.prev.Seq, Size: uint64(j.size), ModTime: j.modTime, Created: s.d.now().UnixNano(),
		Revert: j.revert}, len(j.picks))
	defer s.keep(b)
	parts, err := j.pack(ctx, b)
	if err != nil {
		return fmt.Errorf("build sco %d-%d: %w", j.id.Epoch, j.id.Seq, err)
	}
	if err := s.putSCO(ctx, j, parts); err != nil {
		return err
	}
	j.extents = slices.Clone(b.Header().Extents)
	for _, p := range parts {
		j.bytes += int64(len(p))
	}
	j.at.Bytes = j.bytes
	s.d.metrics.objects.Inc()
	s.d.metrics.objectBytes.Add(float64(j.bytes))
	return v.installReady(j)
}

// pack builds the SCO. Where several jobs of a volume overlap, they do that one after the other.
func (j *job) pack(ctx context.Context, b *sco.Builder) ([][]byte, error) {
	if j.v.jobsMax() > volumeJobsMax {
		leave, err := backend.TakeTurn(ctx)
		if err != nil {
			return nil, err
		}
		defer leave()
	}
	if err := j.build(b); err != nil {
		return nil, err
	}
	return b.Finish()
}

// build fills the SCO from the log.
func (j *job) build(b *sco.Builder) error {
	for _, z := range j.zeros {
		if err := b.AddZero(z.LBA, z.Blocks); err != nil {
			return err
		}
	}
	for _, m := range j.marks {
		if err := b.AddMark(m.seq, m.data); err != nil {
			return err
		}
	}
	var crcs []uint32
	var plain []byte
	reads := make([]logRead, 0, len(j.picks))
	for i := 0; i < len(j.picks); {
		first, k := j.picks[i], 1
		crcs = append(crcs[:0], first.crc)
		for i+k < len(j.picks) && j.picks[i+k].lba == first.lba+uint64(k) && j.picks[i+k].loc == first.loc.Add(uint32(k)) && j.picks[i+k].key == first.key {
			crcs = append(crcs, j.picks[i+k].crc)
			k++
		}
		if first.key != 0 {
			// Decrypted first: the checksums that go with the blocks are those of the plaintext.
			if cap(plain) < k*blockSize {
				plain = make([]byte, k*blockSize)
			}
			p := plain[:k*blockSize]
			err := j.v.d.wal.ReadAt(p, first.loc)
			if err == nil {
				err = j.v.unseal(p, crcs, first.loc, first.key)
			}
			if err != nil {
				return fmt.Errorf("read block %d from the log: %w", first.lba, err)
			}
			dst, err := b.Reserve(first.lba, crcs)
			if err != nil {
				return err
			}
			copy(dst, p)
			i += k
			continue
		}
		dst, err := b.Reserve(first.lba, crcs)
		if err != nil {
			return err
		}
		reads = append(reads, logRead{first.loc, dst})
		i += k
	}
	if err := readLogged(j.v.d.wal, reads); err != nil {
		return fmt.Errorf("read %d runs of blocks from the log: %w", len(reads), err)
	}
	return nil
}

// putSCO puts the object, for ever, each try under a new name since the outcome of a failed one is unknown. While guests write,
// objects go past the page cache, which costs least. In a pause they go through it: what was written last, which the log had in
// memory until now, is then not the only thing that has to be read from the disk.
func (s *destager) putSCO(ctx context.Context, j *job, parts [][]byte) error {
	if j.cached {
		ctx = backend.WithCached(ctx)
	}
	return s.d.retry(ctx, j.v, func(attempt int, store backend.Backend) error {
		err := store.Put(ctx, sco.Name(j.v.id, j.id.Epoch, j.id.Seq, attempt), parts...)
		j.at = place{Epoch: j.id.Epoch, Attempt: attempt, Prev: j.prev.Seq, Blocks: len(j.picks), Last: j.last, Time: j.time, Revert: j.revert}
		return err
	})
}

// retry calls try until it succeeds, ctx ends or the volume does.
func (d *Driver) retry(ctx context.Context, v *Volume, try func(attempt int, store backend.Backend) error) error {
	return d.retryPool(ctx, v.root.Pool, v.err, try)
}

// retryPool calls try until it succeeds, ctx ends or gone gives an error, with capped exponential backoff and full jitter, and keeps the driver's
// view of the backend's health. A long wait ends early, once in a call, when the backend answers a look again: what has gathered in the log while
// it was away should not wait for who drew the shortest lot.
func (d *Driver) retryPool(ctx context.Context, pool uuid.UUID, gone func() error, try func(attempt int, store backend.Backend) error) error {
	hurried := false
	for attempt := 0; ; attempt++ {
		store, err := d.backendOf(pool)
		if err == nil {
			if err = try(attempt, store); err == nil {
				d.health.good(pool)
				return nil
			}
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if gone := gone(); gone != nil {
			return gone
		}
		d.metrics.backendErrors.Inc()
		d.health.bad(pool, err, d.now())
		d.log.Warn("backend refuses, trying again", "vpool", pool, "attempt", attempt, "err", err)
		limit := min(d.cfg.retryMax, 50*time.Millisecond<<min(attempt, 10))
		wait := rand.N(limit) + time.Millisecond
		if store == nil || hurried || errors.Is(err, backend.ErrNoSpace) {
			err = sleep(ctx, wait)
		} else {
			hurried, err = d.sleepWhileAway(ctx, store, wait)
		}
		if err != nil {
			return err
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

const (
	lookEvery = 200 * time.Millisecond // at a backend that is away
	lookName  = "v/look"               // an object that no volume has
)

// sleepWhileAway sleeps, and looks now and then whether the backend answers; back says that it does.
func (d *Driver) sleepWhileAway(ctx context.Context, store backend.Backend, wait time.Duration) (back bool, err error) {
	for end := time.Now().Add(wait); ; {
		left := time.Until(end)
		if left <= lookEvery {
			return false, sleep(ctx, max(left, 0))
		}
		if err := sleep(ctx, lookEvery); err != nil {
			return false, err
		}
		if _, err := store.Stat(ctx, lookName); err == nil || errors.Is(err, backend.ErrNotExist) {
			return true, nil
		}
		if ctx.Err() != nil {
			return false, ctx.Err()
		}
	}
}

// installReady notes that the job's SCO is on the backend and installs every job that is next in order.
func (v *Volume) installReady(done *job) error {
	v.installing.Lock()
	defer v.installing.Unlock()
	done.put = true
	for {
		v.mu.RLock()
		var j *job
		if len(v.destage.jobs) > 0 && v.destage.jobs[0].put {
			j = v.destage.jobs[0]
		}
		v.mu.RUnlock()
		if j == nil {
			return nil
		}
		if err := v.install(j); err != nil {
			return err
		}
	}
}

// install makes the SCO what the map says, and then the index forget it.
func (v *Volume) install(j *job) error {
	if v.recount { // after a crash the map may be newer than the root, whose count is then wrong
		n, err := v.d.mappedIn(v.handle(), 0, blockmap.MaxBlocks)
		if err != nil {
			return fmt.Errorf("count the blocks of volume %s: %w", v.id, err)
		}
		v.recount = false
		v.mu.Lock()
		v.root.UsedBlocks = n
		v.mu.Unlock()
	}
	used, err := v.d.applySCO(v.handle(), uint32(j.id.Seq), j.zeros, j.extents)
	if err != nil {
		return fmt.Errorf("install sco %d-%d: %w", j.id.Epoch, j.id.Seq, err)
	}
	if err := v.d.maps.Put([]blockmap.KV{j.at.encode(v.id, j.id.Seq)}, false); err != nil {
		return fmt.Errorf("install sco %d-%d: %w", j.id.Epoch, j.id.Seq, err)
	}
	if len(j.marks) > 0 || j.revert != 0 {
		return v.installCut(j, used)
	}
	v.mu.Lock()
	v.installedLocked(j, used)
	clean := v.logged.Load() == j.last
	v.mu.Unlock()
	v.installEnd(j, clean)
	return nil
}

// installedLocked notes that the map holds the job's SCO. mu is held.
func (v *Volume) installedLocked(j *job, used int64) {
	for _, p := range j.picks {
		if w, ok := v.index.data[p.lba]; ok && w.seq <= j.last {
			v.index.remove(p.lba)
		}
	}
	for _, z := range j.zeros {
		v.index.forgetZeroed(z.LBA, z.Blocks, j.last)
	}
	v.index.forgetZeros(j.last)
	v.forgets++
	v.root.Backed, v.root.Size, v.root.ModTime, v.root.Prev = j.last, j.size, j.modTime, j.id
	v.root.UsedBlocks += used
	held := v.queue.bytes
	v.queue.drop(j.last)
	v.pending.Store(v.queue.bytes)
	v.d.pace.drained(held - v.queue.bytes)
	v.destage.jobs = v.destage.jobs[1:]
}

func (v *Volume) installEnd(j *job, clean bool) {
	if clean {
		v.d.destager.dropIfClean(v)
	}
	v.d.checkpointer.add(v, j.bytes)
	v.wake()
}

func (s *destager) dropIfClean(v *Volume) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v.dirty.Store(false) // before the look: a record logged after it adds the volume again
	v.mu.RLock()
	defer v.mu.RUnlock()
	if v.logged.Load() == v.root.Backed && v.root.Name.Put || v.err() != nil {
		delete(s.dirty, v)
		return
	}
	v.dirty.Store(true)
	s.dirty[v] = struct{}{} // it may have been taken out since, and who adds it finds it dirty
}

// forgetZeroed removes the zero marks of a range that were noted up to seq.
func (x *index) forgetZeroed(lba, n, seq uint64) {
	if n > leafBlocks {
		if x.zerosOnly() {
			return
		}
		for b, w := range x.data {
			if b >= lba && b-lba < n && w.seq <= seq {
				x.remove(b)
			}
		}
		return
	}
	for i := range n {
		if w, ok := x.data[lba+i]; ok && w.seq <= seq {
			x.remove(lba + i)
		}
	}
}

func (x *index) zerosOnly() bool { return len(x.data) == 0 }

// applySCO puts an SCO's content into the map and gives the change in mapped blocks. Doing it again changes nothing.
func (d *Driver) applySCO(h blockmap.Handle, ordinal uint32, zeros []sco.Range, extents []sco.Extent) (int64, error) {
	var used int64
	for _, z := range zeros {
		n, err := d.mappedIn(h, z.LBA, z.LBA+z.Blocks)
		if err != nil {
			return 0, err
		}
		used -= n
		if err := d.maps.Clear(h, z.LBA, z.Blocks); err != nil {
			return 0, err
		}
	}
	for _, e := range extents {
		n, err := d.mappedIn(h, e.LBA, e.LBA+uint64(e.Blocks))
		if err != nil {
			return 0, err
		}
		used += int64(e.Blocks) - n
		if err := d.maps.Set(h, e.LBA, blockmap.MakeRef(ordinal, e.Index), e.Blocks); err != nil {
			return 0, err
		}
	}
	return used, nil
}

// mappedIn counts the mapped blocks of a range.
func (d *Driver) mappedIn(h blockmap.Handle, lba, end uint64) (int64, error) {
	var n int64
	for lba < end {
		at, ok, err := d.maps.NextMapped(h, lba, end)
		if err != nil || !ok {
			return n, err
		}
		run, _, err := d.maps.Run(h, at, end)
		if err != nil {
			return n, err
		}
		n += int64(run)
		lba = at + run
	}
	return n, nil
}

// reserve makes sure that SCO number seq lies below what the stored root says is used.
func (v *Volume) reserve(seq uint64) error {
	v.storing.Lock()
	defer v.storing.Unlock()
	if seq < v.stored.NextSCO {
		return nil
	}
	r := v.stored
	r.NextSCO = seq + scoReserve
	return v.storeLocked(r)
}

// storeLocked makes r the stored root, durably. storing is held.
func (v *Volume) storeLocked(r root) error {
	if err := v.d.maps.Put([]blockmap.KV{r.encode()}, true); err != nil {
		return fmt.Errorf("store root of volume %s: %w", v.id, err)
	}
	v.stored = r
	return nil
}

// putRoot puts the volume's root object on the backend if it has changed; a failure is tried again at the next round.
func (v *Volume) putRoot(ctx context.Context) {
	v.mu.RLock()
	r := v.root
	v.mu.RUnlock()
	if r.Name.Put || v.err() != nil || r.Name.Path == "" || !v.rooting.TryLock() {
		return
	}
	v.d.destager.wg.Go(func() {
		defer v.rooting.Unlock()
		if err := v.putRootNow(ctx, r); err != nil {
			if ctx.Err() == nil {
				v.d.health.bad(r.Pool, err, v.d.now())
				v.d.log.Warn("root object not put, trying again", "volume", v.id, "err", err)
				select { // not at once
				case <-ctx.Done():
				case <-time.After(v.d.cfg.retryMax / 8):
				}
			}
			return
		}
		v.d.destager.dropIfClean(v)
	})
}

func (v *Volume) putRootNow(ctx context.Context, r root) error {
	store, err := v.d.backendOf(r.Pool)
	if err != nil {
		return err
	}
	o := v.rootObject(&r)
	b, err := o.Encode()
	if err != nil {
		return err
	}
	name := sco.RootName(v.id, o.Epoch, o.N)
	if err := store.Put(ctx, name, b); err != nil && !errors.Is(err, backend.ErrExist) {
		return err
	}
	v.mu.Lock()
	if v.root.Name.N == r.Name.N {
		v.root.Name.Put = true
	}
	v.mu.Unlock()
	v.storing.Lock()
	s := v.stored
	if s.Name.N == r.Name.N {
		s.Name.Put = true
		err = v.storeLocked(s)
	} else {
		err = nil
	}
	v.storing.Unlock()
	if err != nil {
		return err
	}
	old, err := store.List(ctx, sco.RootPrefix(v.id), "", 100)
	if err != nil {
		return err
	}
	for _, i := range old {
		if i.Name < name {
			if err := store.Delete(ctx, i.Name); err != nil {
				return err
			}
		}
	}
	return nil
}

// rootWaits says whether the root object is to be put.
func (v *Volume) rootWaits() bool {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return !v.root.Name.Put && v.root.Name.Path != ""
}

// health remembers for each pool whether its backend answers.
type health struct {
	mu    sync.Mutex
	pools map[string]PoolHealth
}

// PoolHealth is the state of a vPool's backend as seen from here.
type PoolHealth struct {
	Err   string    // last error, empty if the last call succeeded
	Since time.Time // first error of this outage
	full  bool
}

func (h *health) good(pool fmt.Stringer) {
	h.mu.Lock()
	delete(h.pools, pool.String())
	h.mu.Unlock()
}

func (h *health) bad(pool fmt.Stringer, err error, now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.pools == nil {
		h.pools = make(map[string]PoolHealth)
	}
	p := h.pools[pool.String()]
	if p.Err == "" {
		p.Since = now
	}
	p.Err, p.full = err.Error(), errors.Is(err, backend.ErrNoSpace)
	h.pools[pool.String()] = p
}

func (h *health) of(pool fmt.Stringer) PoolHealth {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.pools[pool.String()]
}

// errNoPool: the volume's vPool has no backend here.
var errNoPool = errors.Join(errors.New("vPool has no backend on this node"), blockio.ErrClosed)
