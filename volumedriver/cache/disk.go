package cache

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"os"
	"path"
	"sync"
	"sync/atomic"
	"syscall"

	"varve/volumedriver/vfs"
)

const (
	cellData    = 4096
	cellTrailer = 32
	cellBytes   = cellData + cellTrailer
	cellMagic   = 0x5643 // "VC"

	diskQueue     = 256       // lines that wait to be written
	diskErrorsMax = 16        // failed reads until the tier is given up
	diskGrowth    = 256 << 20 // bytes reserved at a time
	diskReserve   = 20        // one in so many bytes of the file system is left to others
	linesName     = "lines"
	indexName     = "index"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// disk is the tier on an SSD: one file of slots, a line in each, that grows to its size in steps. A line is kept in cells of 4 KiB, each with a trailer that names the
// line and vouches for the cell, so that a read of 4 KiB costs one read of 4128 bytes, and no index, torn write or slot in use again can pass
// off other bytes. Whatever fails here is a miss.
type disk struct {
	fs    vfs.FS
	dir   string
	line  int // bytes
	slots int
	reg   *registry
	log   *slog.Logger
	file  vfs.File

	queue  chan diskJob
	queued atomic.Int64           // jobs that are not done
	off    atomic.Pointer[string] // why the tier is off

	mu sync.RWMutex // guards f
	f  fifo

	step  int          // bytes to reserve at a time
	grown int          // slots for which there is room; only the writer uses it
	limit atomic.Int64 // slots that there will ever be, if fewer than planned

	hits, stale, corrupt, readErrors, written, dropped, evicted atomic.Int64
	dirty                                                       atomic.Bool // the index file is older than f

	buffers sync.Pool // *[]byte of a slot's size
}

// diskJob is a line to be written. The line is retained for it.
type diskJob struct {
	id, line, print uint32
	hash            objectHash
	data            []byte
	done            func() // data is no longer needed
}

// openDisk opens or makes the tier. What is wrong with the disk only switches the tier off.
func openDisk(fs vfs.FS, dir string, bytes int64, line int, reg *registry, log *slog.Logger) *disk {
	slotBytes := int64(line / cellData * cellBytes)
	d := &disk{fs: fs, dir: dir, line: line, slots: int(min(bytes/slotBytes, slotsMax)), reg: reg, log: log, step: diskGrowth,
		queue: make(chan diskJob, diskQueue)}
	d.buffers.New = func() any { b := make([]byte, slotBytes); return &b }
	d.f = newFIFO(d.slots)
	if d.slots == 0 {
		d.fail("too small for one line", nil)
		return d
	}
	if err := fs.MkdirAll(dir, 0o700); err != nil {
		d.fail("make directory", err)
		return d
	}
	file, err := fs.OpenFile(path.Join(dir, linesName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		d.fail("open file", err)
		return d
	}
	d.file = file
	size, err := file.Size()
	if err == nil && size > int64(d.slots)*slotBytes {
		size = int64(d.slots) * slotBytes
		err = file.Truncate(size)
	}
	if err != nil {
		d.fail("size of file", err)
		return d
	}
	d.grown = int((size + slotBytes - 1) / slotBytes)
	if err := d.load(); err != nil {
		log.Info("read cache on disk starts empty", "dir", dir, "err", err)
	}
	return d
}

// fail switches the tier off, for good.
func (d *disk) fail(what string, err error) {
	why := what
	if err != nil {
		why = fmt.Sprintf("%s: %v", what, err)
	}
	if d.off.CompareAndSwap(nil, &why) {
		d.log.Error("read cache on disk is off; reads go on without it", "dir", d.dir, "err", why)
	}
}

// grow reserves room for a slot and those after it, as long as the file system keeps something for others. If it cannot, the tier
// stays as large as it is. Only the writer calls it, so no other slot is taken meanwhile.
func (d *disk) grow(slot uint32) bool {
	if int(slot) < d.grown {
		return true
	}
	to := min(d.slots, int(slot)+max(1, d.step/d.slotBytes()))
	total, free, err := d.fs.Space(d.dir)
	if err == nil && free < total/diskReserve+uint64(to-d.grown)*uint64(d.slotBytes()) {
		err = syscall.ENOSPC
	}
	if err == nil {
		err = d.file.Preallocate(int64(to) * int64(d.slotBytes()))
	}
	if err == nil {
		d.grown = to
		return true
	}
	d.mu.Lock()
	d.f.limit(d.grown)
	d.mu.Unlock()
	d.limit.Store(int64(d.grown))
	if d.grown == 0 {
		d.fail("reserve room", err)
	} else {
		d.log.Warn("read cache on disk stays smaller than it might be", "dir", d.dir, "bytes", int64(d.grown)*int64(d.line), "err", err)
	}
	return false
}

// on tells whether there is a tier that works.
func (d *disk) on() bool { return d != nil && d.off.Load() == nil }

func (d *disk) slotBytes() int { return d.line / cellData * cellBytes }

func (d *disk) slotOff(slot uint32) int64 { return int64(slot) * int64(d.slotBytes()) }

// seal writes the trailer of a cell.
func seal(cell []byte, h objectHash, line uint32, index int) {
	t := cell[cellData:cellBytes]
	copy(t, h[:])
	binary.LittleEndian.PutUint32(t[16:], line)
	binary.LittleEndian.PutUint16(t[20:], uint16(index))
	binary.LittleEndian.PutUint16(t[22:], cellMagic)
	binary.LittleEndian.PutUint32(t[24:], 0)
	binary.LittleEndian.PutUint32(t[28:], crc32.Checksum(cell[:cellBytes-4], castagnoli))
}

type verdict uint8

const (
	intact verdict = iota
	foreign
	damaged
)

// judge tells whether a cell is what it should be, another's, or damaged.
func judge(cell []byte, h objectHash, line uint32, index int) verdict {
	t := cell[cellData:cellBytes]
	if crc32.Checksum(cell[:cellBytes-4], castagnoli) != binary.LittleEndian.Uint32(t[28:]) {
		return damaged
	}
	if objectHash(t[:16]) != h || binary.LittleEndian.Uint32(t[16:]) != line || int(binary.LittleEndian.Uint16(t[20:])) != index ||
		binary.LittleEndian.Uint16(t[22:]) != cellMagic {
		return foreign
	}
	return intact
}

// read copies bytes of a line from within on. With try it waits for no device, and blocked says that it would have had to.
// again says that the line was hit before, so that it is worth a place in memory.
func (d *disk) read(id uint32, h objectHash, line uint32, within int, p []byte, scan, try bool) (ok, again, blocked bool) {
	if !d.on() {
		return false, false, false
	}
	key := keyOf(id, line)
	d.mu.RLock()
	slot, ok := d.f.find(key)
	d.mu.RUnlock()
	if !ok {
		return false, false, false
	}
	first, last := within/cellData, (within+len(p)-1)/cellData
	b := d.buffers.Get().(*[]byte)
	defer d.buffers.Put(b)
	buf := (*b)[:(last-first+1)*cellBytes]
	off := d.slotOff(slot) + int64(first*cellBytes)
	var err error
	if try {
		err = d.file.TryReadAt(buf, off)
		if errors.Is(err, vfs.ErrWouldBlock) {
			return false, false, true
		}
	} else {
		_, err = d.file.ReadAt(buf, off)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		if d.readErrors.Add(1) >= diskErrorsMax {
			d.fail("read", err)
		}
		d.distrust(key, slot, nil)
		return false, false, false
	}
	if err != nil {
		d.distrust(key, slot, &d.stale)
		return false, false, false
	}
	for i := first; i <= last; i++ {
		cell := buf[(i-first)*cellBytes : (i-first+1)*cellBytes]
		switch judge(cell, h, line, i) {
		case foreign:
			d.distrust(key, slot, &d.stale)
			return false, false, false
		case damaged:
			d.distrust(key, slot, &d.corrupt)
			return false, false, false
		}
		from, to := max(within, i*cellData), min(within+len(p), (i+1)*cellData)
		copy(p[from-within:to-within], cell[from-i*cellData:to-i*cellData])
	}
	d.hits.Add(1)
	if !scan {
		d.mu.RLock()
		if at, ok := d.f.find(key); ok && at == slot {
			again = d.f.touch(slot) > 0
		}
		d.mu.RUnlock()
	}
	return true, again, false
}

// distrust forgets a line whose slot held something else, unless it was the slot that went to another line meanwhile.
func (d *disk) distrust(key uint64, slot uint32, counter *atomic.Int64) {
	d.mu.Lock()
	at, ok := d.f.find(key)
	ok = ok && at == slot
	if ok {
		d.f.remove(slot)
	}
	d.mu.Unlock()
	if !ok {
		return
	}
	if counter != nil {
		counter.Add(1)
	}
	d.dirty.Store(true)
	d.reg.release(objectOf(key))
}

func (d *disk) has(key uint64) bool {
	if !d.on() {
		return false
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	_, ok := d.f.find(key)
	return ok
}

// offer queues a line to be written; done is called when data is no longer needed. A queue that is full means that the disk
// is busy: the line is left out, unless there is room before late is closed.
func (d *disk) offer(id, line, print uint32, h objectHash, data []byte, done func(), late <-chan struct{}) {
	if !d.on() || d.has(keyOf(id, line)) || !d.reg.retain(id) {
		done()
		return
	}
	d.queued.Add(1)
	j := diskJob{id: id, line: line, print: print, hash: h, data: data, done: done}
	select {
	case d.queue <- j:
		return
	default:
	}
	queued := false
	if late != nil {
		select {
		case d.queue <- j:
			queued = true
		case <-late:
		}
	}
	if !queued {
		d.queued.Add(-1)
		d.dropped.Add(1)
		d.reg.release(id)
		done()
	}
}

// run writes lines until stop, and then those that are queued.
func (d *disk) run(stop <-chan struct{}) {
	for {
		select {
		case j := <-d.queue:
			d.take(j)
			continue
		default:
		}
		select {
		case j := <-d.queue:
			d.take(j)
		case <-stop:
			return
		}
	}
}

func (d *disk) take(j diskJob) {
	if !d.write(j) {
		d.reg.release(j.id)
	}
	j.done()
	d.queued.Add(-1)
}

// write puts one line into a slot, and then into the index; false if it did not.
func (d *disk) write(j diskJob) bool {
	if !d.on() {
		return false
	}
	key := keyOf(j.id, j.line)
	d.mu.Lock()
	if _, ok := d.f.find(key); ok {
		d.mu.Unlock()
		return false
	}
	slot, victim, evicted, ok := d.f.take()
	d.mu.Unlock()
	if evicted {
		d.evicted.Add(1)
		d.reg.release(objectOf(victim))
	}
	if !ok || !d.grow(slot) {
		return false
	}
	b := d.buffers.Get().(*[]byte)
	defer d.buffers.Put(b)
	cells := (len(j.data) + cellData - 1) / cellData
	buf := (*b)[:cells*cellBytes]
	for i := range cells {
		cell := buf[i*cellBytes : (i+1)*cellBytes]
		n := copy(cell[:cellData], j.data[i*cellData:])
		clear(cell[n:cellData])
		seal(cell, j.hash, j.line, i)
	}
	_, err := d.file.WriteAt(buf, d.slotOff(slot))
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != nil {
		d.f.giveBack(slot)
		d.fail("write", err)
		return false
	}
	d.f.publish(slot, key, j.print, false)
	d.written.Add(int64(len(buf)))
	d.dirty.Store(true)
	return true
}

// drop forgets a line.
func (d *disk) drop(key uint64) {
	if d == nil {
		return
	}
	d.mu.Lock()
	slot, ok := d.f.find(key)
	if ok {
		d.f.remove(slot)
	}
	d.mu.Unlock()
	if ok {
		d.dirty.Store(true)
		d.reg.release(objectOf(key))
	}
}
