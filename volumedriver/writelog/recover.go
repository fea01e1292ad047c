package writelog

import (
	"cmp"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/google/uuid"
)

// Open recovers the log in cfg.Dir, or makes one. replay is called for each surviving record in append order; the record
// and its checksums are valid during the call, its payload can be read with ReadAt once Open has returned. All that was
// replayed is durable when Open returns. A replayed volume holds its segments until Release or Forget, unless replay
// answered Skip for a record that is needed no more: it is on the backend, or its volume was deleted.
//
// ErrCorrupt: something durable cannot be read back; the error names file and offset, and nothing was changed.
func Open(cfg Config, replay func(r *Logged, payloadBlocks int) error) (*Log, error) {
	l, err := openIdle(cfg, replay)
	if err != nil {
		return nil, err
	}
	l.wg.Add(3)
	go l.runCommitter()
	go l.runSyncer()
	go l.runPreparer()
	l.wakePreparer()
	return l, nil
}

// openIdle is Open without the goroutines.
func openIdle(cfg Config, replay func(r *Logged, payloadBlocks int) error) (*Log, error) {
	if err := cfg.fill(); err != nil {
		return nil, err
	}
	if err := cfg.FS.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make write log directory %s: %w", cfg.Dir, err)
	}
	lock, err := cfg.FS.Lock(path.Join(cfg.Dir, lockName))
	if err != nil {
		return nil, fmt.Errorf("lock write log %s: %w", cfg.Dir, err)
	}
	l := &Log{
		cfg:      cfg,
		lock:     lock,
		failed:   make(chan struct{}),
		volumes:  make(map[uuid.UUID]*volumeState),
		sealHead: make([]byte, blockSize),
		handover: make(chan struct{}, 1),
		prepare:  make(chan struct{}, 1),
		stop:     make(chan struct{}),
	}
	l.space.L, l.moved.L, l.work.L = &l.mu, &l.smu, &l.smu
	if err := l.recover(replay); err != nil {
		return nil, errors.Join(err, l.closeFiles())
	}
	l.open, l.spare = newBatch(l.limits), newBatch(l.limits)
	l.open.number = l.written.Load() + 1
	l.opened.Store(l.open.number)
	return l, nil
}

// recover is the start up to the point where the first batch can be placed. Its order matters:
//
//	read log.meta, the segment headers, the newest generation: tail and low-water mark; the live generations, replaying
//	write again what no sync vouches for, and sync
//	begin a generation, whose header says where the found ones ended
//	log.meta: not clean, this boot, the verifier
//	remove the marker of a fenced log
func (l *Log) recover(replay func(*Logged, int) error) error {
	names, err := l.cfg.FS.ReadDir(l.cfg.Dir)
	if err != nil {
		return fmt.Errorf("list write log %s: %w", l.cfg.Dir, err)
	}
	m, err := readMeta(l.cfg.FS, l.cfg.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		m, err = l.create(names)
	}
	if err != nil {
		return fmt.Errorf("write log %s: %w", l.cfg.Dir, err)
	}
	l.meta, l.id = m, m.id
	if m.segmentBytes != l.cfg.SegmentBytes {
		l.cfg.Log.Info("write log keeps its segment size", "dir", l.cfg.Dir, "bytes", m.segmentBytes)
		l.cfg.SegmentBytes = m.segmentBytes
	}
	l.limits = newLimits(&l.cfg)
	fenced, err := exists(l.cfg.FS, path.Join(l.cfg.Dir, fencedName))
	if err != nil {
		return fmt.Errorf("write log %s: look for %s: %w", l.cfg.Dir, fencedName, err)
	}

	r := &recovery{log: l, replay: replay, distrust: fenced}
	if err := r.run(names); err != nil {
		return fmt.Errorf("write log %s: %w", l.cfg.Dir, err)
	}
	if fenced || r.torn || !m.clean && m.bootID != l.cfg.BootID {
		rand.Read(l.meta.verifier[:])
	}
	l.meta.clean, l.meta.bootID, l.meta.generation = false, l.cfg.BootID, l.tailGen
	if err := writeMeta(l.cfg.FS, l.cfg.Dir, &l.meta); err != nil {
		return err
	}
	if fenced {
		if err := l.cfg.FS.Remove(path.Join(l.cfg.Dir, fencedName)); err != nil {
			return fmt.Errorf("remove %s of write log %s: %w", fencedName, l.cfg.Dir, err)
		}
		if err := l.cfg.FS.SyncDir(l.cfg.Dir); err != nil {
			return fmt.Errorf("sync directory %s: %w", l.cfg.Dir, err)
		}
	}
	return nil
}

// create makes log.meta of a new log. Segments come later, so where one is found a log.meta has been lost.
func (l *Log) create(names []string) (meta, error) {
	for _, n := range names {
		if _, ok := slotOf(n); ok {
			return meta{}, fmt.Errorf("%w: %s is missing, but there is %s", ErrCorrupt, metaName, n)
		}
	}
	m := meta{id: uuid.New(), segmentBytes: l.cfg.SegmentBytes, bootID: l.cfg.BootID}
	rand.Read(m.verifier[:])
	// MkdirAll may have made more than one directory, in this start or one that was cut short.
	for dir := l.cfg.Dir; dir != path.Dir(dir); dir = path.Dir(dir) {
		if err := l.cfg.FS.SyncDir(path.Dir(dir)); err != nil && (dir == l.cfg.Dir || !errors.Is(err, fs.ErrPermission)) {
			return meta{}, fmt.Errorf("sync directory %s: %w", path.Dir(dir), err)
		}
	}
	err := writeMeta(l.cfg.FS, l.cfg.Dir, &m)
	return m, err
}

func slotOf(name string) (int, bool) {
	digits, ok := strings.CutPrefix(name, segmentPrefix)
	if !ok {
		return 0, false
	}
	digits, ok = strings.CutSuffix(digits, segmentSuffix)
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(digits, 10, 16)
	if err != nil || n >= slotsMax || path.Base(segmentPath("", int(n))) != name {
		return 0, false
	}
	return int(n), true
}

// found is a slot with an intact header of a generation.
type found struct {
	seg  *segment
	hdr  segmentHeader
	scan *scanner
}

type recovery struct {
	log      *Log
	replay   func(*Logged, int) error
	distrust bool // no sync of the last run counts
	torn     bool // behind the tail lay more
	found    []*found
	free     []*segment
	low      uint64
}

func (r *recovery) run(names []string) error {
	l := r.log
	if err := r.openSlots(names); err != nil {
		return err
	}
	if len(r.found) == 0 {
		if l.meta.generation > 0 {
			return fmt.Errorf("%w: no segment found, but generation %d existed", ErrCorrupt, l.meta.generation)
		}
		return r.begin(segmentHeader{gen: 1, low: 1})
	}
	newest := r.found[len(r.found)-1]
	if newest.hdr.gen < l.meta.generation {
		return fmt.Errorf("%w: the newest segment found is %s of generation %d, but generation %d existed",
			ErrCorrupt, newest.seg.path, newest.hdr.gen, l.meta.generation)
	}
	if err := r.findTail(newest); err != nil {
		return err
	}
	if err := r.checkLive(newest.hdr.gen); err != nil {
		return err
	}
	for i := range r.found {
		if err := r.replaySegment(i); err != nil {
			return err
		}
	}
	end := newest.scan
	if !l.meta.clean || r.distrust {
		if err := r.harden(end.durable); err != nil {
			return err
		}
	}
	l.written.Store(end.number)
	l.durable.Store(end.number)
	if end.off == blockSize && !r.torn {
		// Nothing was ever written behind its header: go on there, rather than take a slot more at each start.
		return r.adopt(newest.seg, newest.hdr)
	}
	return r.begin(segmentHeader{gen: newest.hdr.gen + 1, low: r.low, prevLast: end.number, prevChain: end.chain})
}

// openSlots sorts the files into generations, ascending, and free slots.
func (r *recovery) openSlots(names []string) error {
	l := r.log
	block := make([]byte, blockSize)
	for _, name := range names {
		slot, ok := slotOf(name)
		if !ok {
			continue
		}
		s := &segment{slot: slot, path: segmentPath(l.cfg.Dir, slot), pins: make(map[uuid.UUID]uint64)}
		f, err := l.cfg.FS.OpenFile(s.path, os.O_RDWR, 0)
		if err != nil {
			return fmt.Errorf("open log segment %s: %w", s.path, err)
		}
		s.file = f
		l.slots[slot].Store(s)
		l.slotCount++
		size, err := f.Size()
		if err != nil {
			return fmt.Errorf("size of log segment %s: %w", s.path, err)
		}
		h, err := segmentHeader{}, errNoHeader
		if size >= blockSize {
			if _, err := f.ReadAt(block, 0); err != nil {
				return fmt.Errorf("read header of log segment %s: %w", s.path, err)
			}
			h, err = parseSegmentHeader(block)
		}
		switch {
		case errors.Is(err, errNoHeader):
			if size != l.limits.segmentBytes { // its making was cut short
				l.slots[slot].Store(nil)
				l.slotCount--
				if err := f.Close(); err != nil {
					return fmt.Errorf("close log segment %s: %w", s.path, err)
				}
				continue
			}
			r.free = append(r.free, s)
		case err != nil:
			return fmt.Errorf("log segment %s: %w", s.path, err)
		case h.log != l.id || int(h.slot) != slot || h.segmentBytes != uint64(l.limits.segmentBytes):
			return fmt.Errorf("%w: %s belongs to slot %d of log %s with segments of %d bytes, this is log %s",
				ErrCorrupt, s.path, h.slot, h.log, h.segmentBytes, l.id)
		case size != l.limits.segmentBytes:
			return fmt.Errorf("%w: log segment %s has %d bytes, want %d", ErrCorrupt, s.path, size, l.limits.segmentBytes)
		default:
			s.gen.Store(h.gen)
			s.sealing.Store(&sealing{log: l.id, gen: h.gen, salt: h.keySalt})
			r.found = append(r.found, &found{seg: s, hdr: h})
		}
	}
	slices.SortFunc(r.found, func(a, b *found) int { return cmp.Compare(a.hdr.gen, b.hdr.gen) })
	return nil
}

// findTail reads the newest generation to its end. A break there is a torn write, unless what lies behind says otherwise.
func (r *recovery) findTail(f *found) error {
	l := r.log
	sc := newScanner(f.seg, &f.hdr)
	r.low = f.hdr.low
	var broken error
	for !sc.sealed && broken == nil {
		_, err := sc.next()
		switch {
		case errors.Is(err, errBreak):
			broken = err
		case err != nil:
			return err
		}
	}
	r.low = max(r.low, sc.low)
	f.scan = sc
	if !sc.sealed {
		number, durable, err := sc.beyond()
		if err != nil {
			return err
		}
		r.torn = number > 0
		if durable > sc.number {
			return fmt.Errorf("%w: segment %s at offset %d: %w, but batch %d was durable when batch %d was written",
				ErrCorrupt, f.seg.path, sc.off, broken, durable, number)
		}
		if r.torn {
			l.cfg.Log.Warn("write log had a torn tail", "dir", l.cfg.Dir, "segment", f.seg.path, "offset", sc.off,
				"last", sc.number, "beyond", number)
		}
	}
	if !l.meta.clean {
		return nil
	}
	if sc.number < l.meta.last || f.hdr.gen == l.meta.generation && sc.number == l.meta.last && sc.chain != l.meta.chain {
		return fmt.Errorf("%w: segment %s ends at offset %d with batch %d, but the clean stop was after batch %d",
			ErrCorrupt, f.seg.path, sc.off, sc.number, l.meta.last)
	}
	l.meta.clean = sc.number == l.meta.last
	return nil
}

// checkLive keeps in found the live generations, which must be complete, and moves the older ones to the free slots.
func (r *recovery) checkLive(newest uint64) error {
	if r.low == 0 || r.low > newest {
		return fmt.Errorf("%w: low-water mark %d of generation %d", ErrCorrupt, r.low, newest)
	}
	live := r.found[:0]
	want := r.low
	for _, f := range r.found {
		if f.hdr.gen < r.low {
			r.free = append(r.free, f.seg)
			continue
		}
		if f.hdr.gen != want {
			return fmt.Errorf("%w: generation %d of the segments %d to %d: found %s of generation %d in its place",
				ErrCorrupt, want, r.low, newest, f.seg.path, f.hdr.gen)
		}
		live = append(live, f)
		want++
	}
	r.found = live
	return nil
}

// replaySegment checks a live generation against the header of the next one and hands its records out.
func (r *recovery) replaySegment(i int) error {
	l, f := r.log, r.found[i]
	var last uint64
	var chain uint32
	if i+1 < len(r.found) {
		last, chain = r.found[i+1].hdr.prevLast, r.found[i+1].hdr.prevChain
	} else {
		last, chain = f.scan.number, f.scan.chain
	}
	sc := newScanner(f.seg, &f.hdr)
	var record Record
	var logged Logged
	for sc.number != last || sc.chain != chain {
		b, err := sc.next()
		if err == nil && b.number > last {
			err = fmt.Errorf("%w: batch %d, but the segment ended with batch %d", errBreak, b.number, last)
		}
		if errors.Is(err, errBreak) {
			return fmt.Errorf("%w: segment %s at offset %d: %w", ErrCorrupt, f.seg.path, sc.off, err)
		}
		if err != nil {
			return err
		}
		first := uint32(0)
		for n := range int(b.records) {
			blocks, err := getRecord(sc.head[batchHdrBytes+n*recordBytes:], &record)
			if err != nil {
				return fmt.Errorf("%w: segment %s, batch %d: %w", ErrCorrupt, f.seg.path, b.number, err)
			}
			if uint64(first)+uint64(blocks) > uint64(b.payloadBlocks) {
				return fmt.Errorf("%w: segment %s, batch %d: records exceed the payload", ErrCorrupt, f.seg.path, b.number)
			}
			record.Time = b.time
			logged = Logged{Record: record, Batch: b.number}
			if blocks > 0 {
				logged.Loc = makeLoc(f.seg.slot, f.hdr.gen, uint32(sc.payload/blockSize)+first)
				logged.CRC = sc.crcs[first : int(first)+blocks]
			}
			first += uint32(blocks)
			err = r.replay(&logged, blocks)
			if errors.Is(err, Skip) {
				continue
			}
			if err != nil {
				return fmt.Errorf("replay record %d of volume %s: %w", record.Seq, record.Volume, err)
			}
			l.pinLocked(f.seg, record.Volume, record.Seq)
		}
	}
	f.scan = sc
	l.live = append(l.live, f.seg)
	return nil
}

// harden writes again, in place and with the same bytes, what no sync vouches for: the batches after durable, or all if
// the log was fenced; and syncs that. All older segments were synced before the next one began.
func (r *recovery) harden(durable uint64) error {
	buf := make([]byte, min(windowBytes, r.log.limits.segmentBytes))
	for i, f := range r.found {
		if i+1 < len(r.found) && !r.distrust {
			continue
		}
		from := int64(0)
		if !r.distrust {
			var err error
			if from, err = offsetAfter(f, durable); err != nil {
				return err
			}
		}
		for off := from; off < f.scan.off; off += int64(len(buf)) {
			p := buf[:min(int64(len(buf)), f.scan.off-off)]
			if _, err := f.seg.file.ReadAt(p, off); err != nil {
				return fmt.Errorf("read log segment %s at %d: %w", f.seg.path, off, err)
			}
			if _, err := f.seg.file.WriteAt(p, off); err != nil {
				return fmt.Errorf("rewrite log segment %s at %d: %w", f.seg.path, off, err)
			}
		}
		if err := f.seg.file.Sync(); err != nil {
			return fmt.Errorf("sync log segment %s: %w", f.seg.path, err)
		}
	}
	return nil
}

// offsetAfter finds where the batches after durable begin; 0, the header, if that is not known to be durable either.
func offsetAfter(f *found, durable uint64) (int64, error) {
	if durable <= f.hdr.prevLast {
		return 0, nil
	}
	sc := newScanner(f.seg, &f.hdr)
	for sc.number < durable {
		if _, err := sc.next(); err != nil {
			return 0, fmt.Errorf("log segment %s at %d changed while it was read: %w", f.seg.path, sc.off, err)
		}
	}
	return sc.off, nil
}

// begin starts the generation of h in a free slot, or in a new one beyond the configured number if there is none.
func (r *recovery) begin(h segmentHeader) error {
	l := r.log
	var s *segment
	if len(r.free) > 0 {
		s, r.free = r.free[0], r.free[1:]
	} else {
		var err error
		if s, err = l.makeSlot(); err != nil {
			return err
		}
		l.slotCount++
	}
	s.gen.Store(h.gen)
	if err := l.begin(s, &h); err != nil {
		return err
	}
	l.live = append(l.live, s)
	r.low = h.low
	return r.adopt(s, h)
}

// adopt makes the last live segment the one to write to. It holds nothing yet. Free slots beyond the configured number,
// from a start that found none free or from another setting, are given back to the disk.
func (r *recovery) adopt(s *segment, h segmentHeader) error {
	l := r.log
	for len(r.free) > 0 && l.slotCount > l.cfg.Segments {
		last := r.free[len(r.free)-1]
		r.free = r.free[:len(r.free)-1]
		l.slots[last.slot].Store(nil)
		l.slotCount--
		if err := last.file.Close(); err != nil {
			return fmt.Errorf("close log segment %s: %w", last.path, err)
		}
		if err := l.cfg.FS.Remove(last.path); err != nil {
			return fmt.Errorf("remove log segment %s: %w", last.path, err)
		}
	}
	l.tail, l.current, l.tailGen, l.end = s, s, h.gen, blockSize
	l.salt, l.chain, l.low = h.salt, h.crc, r.low
	l.newest.Store(h.gen)
	l.ready = append(l.ready, r.free...)
	return nil
}
