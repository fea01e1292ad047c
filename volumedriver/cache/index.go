package cache

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"math"
	"os"
	"path"
	"sync/atomic"
)

const (
	indexMagic       = "VARVECI1"
	indexHeaderBytes = 32
	indexObjectBytes = 24
	indexEntryBytes  = 16
	indexBuffer      = 1 << 20
)

var errIndex = errors.New("index does not fit the cache")

// header of the index file; see the package comment.
type indexHeader struct{ line, slots, objects, entries uint32 }

func (h indexHeader) encode() []byte {
	b := append(make([]byte, 0, indexHeaderBytes), indexMagic...)
	for _, v := range []uint32{h.line, h.slots, h.objects, h.entries, 0} {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

func decodeIndexHeader(b []byte) (h indexHeader, err error) {
	n := indexHeaderBytes - 4
	if string(b[:8]) != indexMagic || binary.LittleEndian.Uint32(b[n:]) != crc32.Checksum(b[:n], castagnoli) {
		return h, fmt.Errorf("header: %w", errIndex)
	}
	return indexHeader{binary.LittleEndian.Uint32(b[8:]), binary.LittleEndian.Uint32(b[12:]), binary.LittleEndian.Uint32(b[16:]),
		binary.LittleEndian.Uint32(b[20:])}, nil
}

// size is that of the whole file.
func (h indexHeader) size() int64 {
	return indexHeaderBytes + int64(h.objects)*indexObjectBytes + int64(h.entries)*indexEntryBytes + 4
}

// entry of the index file.
type indexEntry struct{ slot, object, line, state uint32 }

// save writes the index file. The slots need not be durable before it: each cell speaks for itself.
func (d *disk) save() error {
	if !d.on() || !d.dirty.Swap(false) {
		return nil
	}
	if err := d.saveTo(path.Join(d.dir, indexName)); err != nil {
		d.dirty.Store(true)
		return fmt.Errorf("save index of the read cache: %w", err)
	}
	return nil
}

func (d *disk) saveTo(name string) error {
	entries := d.entries()
	numbers := make(map[uint32]uint32)
	var objects []known
	kept := entries[:0]
	for _, e := range entries {
		n, ok := numbers[e.object]
		if !ok {
			k, alive := d.reg.describe(e.object)
			n = math.MaxUint32
			if alive {
				n = uint32(len(objects))
				objects = append(objects, k)
			}
			numbers[e.object] = n
		}
		if n != math.MaxUint32 {
			e.object = n
			kept = append(kept, e)
		}
	}
	h := indexHeader{uint32(d.line), uint32(d.slots), uint32(len(objects)), uint32(len(kept))}
	tmp := name + ".new"
	f, err := d.fs.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	err = writeIndex(io.NewOffsetWriter(f, 0), h, objects, kept)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, d.fs.Remove(tmp))
	}
	if err := d.fs.Rename(tmp, name); err != nil {
		return err
	}
	return d.fs.SyncDir(d.dir)
}

// entries lists what the slots hold, those to leave first first, small queue before main.
func (d *disk) entries() []indexEntry {
	d.mu.RLock()
	defer d.mu.RUnlock()
	all := make([]indexEntry, 0, d.f.len())
	for _, q := range []queue{d.f.small, d.f.main} {
		for slot := q.tail; slot != none; slot = d.f.prev[slot] {
			key := d.f.keys[slot]
			all = append(all, indexEntry{slot, objectOf(key), lineOf(key), atomic.LoadUint32(&d.f.state[slot])})
		}
	}
	return all
}

func writeIndex(to io.Writer, h indexHeader, objects []known, entries []indexEntry) error {
	w := bufio.NewWriterSize(to, indexBuffer)
	crc := crc32.New(castagnoli)
	out := io.MultiWriter(w, crc)
	if _, err := w.Write(h.encode()); err != nil {
		return err
	}
	var b [indexObjectBytes]byte
	for _, k := range objects {
		copy(b[:], k.hash[:])
		binary.LittleEndian.PutUint64(b[16:], uint64(k.size))
		if _, err := out.Write(b[:]); err != nil {
			return err
		}
	}
	for _, e := range entries {
		binary.LittleEndian.PutUint32(b[0:], e.slot)
		binary.LittleEndian.PutUint32(b[4:], e.object)
		binary.LittleEndian.PutUint32(b[8:], e.line)
		binary.LittleEndian.PutUint32(b[12:], e.state)
		if _, err := out.Write(b[:indexEntryBytes]); err != nil {
			return err
		}
	}
	if _, err := w.Write(binary.LittleEndian.AppendUint32(nil, crc.Sum32())); err != nil {
		return err
	}
	return w.Flush()
}

// load fills the empty fifo from the index file. It is all or nothing.
func (d *disk) load() error {
	f, err := d.fs.OpenFile(path.Join(d.dir, indexName), os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	err = d.loadFrom(f)
	return errors.Join(err, f.Close())
}

func (d *disk) loadFrom(f interface {
	io.ReaderAt
	Size() (int64, error)
}) error {
	size, err := f.Size()
	if err != nil {
		return err
	}
	r := bufio.NewReaderSize(io.NewSectionReader(f, 0, size), indexBuffer)
	var b [indexHeaderBytes]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return err
	}
	h, err := decodeIndexHeader(b[:])
	if err != nil {
		return err
	}
	if h.line != uint32(d.line) || h.slots != uint32(d.slots) || h.entries > h.slots || h.objects > h.entries || h.size() != size {
		return fmt.Errorf("made for %d slots of %d bytes: %w", h.slots, h.line, errIndex)
	}
	crc := crc32.New(castagnoli)
	in := io.TeeReader(r, crc)
	objects := make([]known, h.objects)
	for i := range objects {
		if _, err := io.ReadFull(in, b[:indexObjectBytes]); err != nil {
			return err
		}
		objects[i] = known{hash: objectHash(b[:16]), size: int64(binary.LittleEndian.Uint64(b[16:]))}
	}
	entries := make([]indexEntry, h.entries)
	for i := range entries {
		if _, err := io.ReadFull(in, b[:indexEntryBytes]); err != nil {
			return err
		}
		entries[i] = indexEntry{binary.LittleEndian.Uint32(b[0:]), binary.LittleEndian.Uint32(b[4:]), binary.LittleEndian.Uint32(b[8:]),
			binary.LittleEndian.Uint32(b[12:])}
	}
	if err := checkTail(r, crc); err != nil {
		return err
	}
	return d.restore(objects, entries)
}

func checkTail(r io.Reader, crc hash.Hash32) error {
	var tail [4]byte
	if _, err := io.ReadFull(r, tail[:]); err != nil {
		return err
	}
	if binary.LittleEndian.Uint32(tail[:]) != crc.Sum32() {
		return fmt.Errorf("checksum: %w", errIndex)
	}
	return nil
}

// restore takes over what an index file says.
func (d *disk) restore(objects []known, entries []indexEntry) error {
	seen := make(map[uint64]bool, len(entries))
	used := make([]bool, d.slots)
	for _, e := range entries {
		if e.slot >= uint32(d.slots) || used[e.slot] || e.object >= uint32(len(objects)) || seen[keyOf(e.object, e.line)] ||
			int64(e.line)*int64(d.line) >= objects[e.object].size || e.state&queueMask != inSmall && e.state&queueMask != inMain {
			return fmt.Errorf("slot %d: %w", e.slot, errIndex)
		}
		used[e.slot] = true
		seen[keyOf(e.object, e.line)] = true
	}
	ids := make([]uint32, len(objects))
	for i, k := range objects {
		id, ok := d.reg.restore(k.hash, k.size)
		if !ok {
			for _, id := range ids[:i] {
				d.reg.close(id)
			}
			return fmt.Errorf("object twice: %w", errIndex)
		}
		ids[i] = id
	}
	for _, e := range entries {
		id := ids[e.object]
		d.reg.retain(id)
		d.f.restore(e.slot, keyOf(id, e.line), objects[e.object].hash.print(e.line), e.state)
	}
	d.f.refree()
	for _, id := range ids {
		d.reg.close(id)
	}
	return nil
}
