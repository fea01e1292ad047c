package volumedriver

import (
	"slices"

	"varve/volumedriver/writelog"
)

// leafBlocks is the granularity in which the index knows where it has anything: as the map's leaves, 2 MiB.
const leafBlocks = 512

// where is the newest logged version of a block. Loc 0 with zero set: it reads as zeros.
type where struct {
	loc  writelog.Loc
	seq  uint64
	crc  uint32 // as it lies in the log
	key  uint16 // of the volume's keys, that it is encrypted with in the log; 0: it is not
	zero bool
}

// zeroRange is a large trim or write-zeroes. Blocks in index.data inside it are newer.
type zeroRange struct{ from, to, seq uint64 }

// index finds what is in the log and not yet on the backend, by block. It shadows the block map: a block that is in
// data or in zeros is never looked up there. Ranges of up to a leaf of zeros are kept per block; larger ones as a range,
// so that a trim of a whole disk costs what the index holds, not what the disk could hold.
type index struct {
	data   map[uint64]where
	zeros  []zeroRange // sorted by from, not overlapping
	leaves presence
}

// blocks counts the data blocks.
func (x *index) blocks() int { return len(x.data) }

func (x *index) empty() bool { return len(x.data) == 0 && len(x.zeros) == 0 }

func (x *index) set(lba uint64, w where) {
	if x.data == nil {
		x.data = make(map[uint64]where)
	}
	before := len(x.data)
	x.data[lba] = w
	if len(x.data) > before {
		x.leaves.add(lba / leafBlocks)
	}
}

func (x *index) remove(lba uint64) {
	if _, ok := x.data[lba]; ok {
		delete(x.data, lba)
		x.leaves.drop(lba / leafBlocks)
	}
}

// put notes a write of len(crc) blocks that lie one after the other in the log.
func (x *index) put(lba uint64, loc writelog.Loc, seq uint64, crc []uint32, key uint16) {
	for i, c := range crc {
		x.set(lba+uint64(i), where{loc: loc.Add(uint32(i)), seq: seq, crc: c, key: key})
	}
}

// zero notes that n blocks read as zeros.
func (x *index) zero(lba, n, seq uint64) {
	if n <= leafBlocks {
		for i := range n {
			x.set(lba+i, where{seq: seq, zero: true})
		}
		return
	}
	x.removeRange(lba, lba+n)
	x.zeros = insertRange(x.zeros, zeroRange{lba, lba + n, seq})
}

func (x *index) removeRange(from, to uint64) {
	if to-from <= uint64(len(x.data)) {
		for b := from; b < to; b++ {
			x.remove(b)
		}
		return
	}
	for b := range x.data {
		if b >= from && b < to {
			x.remove(b)
		}
	}
}

// insertRange puts r over what is there: older ranges keep only what r leaves of them.
func insertRange(zs []zeroRange, r zeroRange) []zeroRange {
	lo, _ := slices.BinarySearchFunc(zs, r.from, func(z zeroRange, from uint64) int {
		if z.to <= from {
			return -1
		}
		return 1
	})
	hi := lo
	var keep [3]zeroRange
	n := 0
	if lo < len(zs) && zs[lo].from < r.from {
		keep[n] = zeroRange{zs[lo].from, r.from, zs[lo].seq}
		n++
	}
	keep[n] = r
	n++
	for hi < len(zs) && zs[hi].from < r.to {
		if zs[hi].to > r.to {
			keep[n] = zeroRange{r.to, zs[hi].to, zs[hi].seq}
			n++
		}
		hi++
	}
	return slices.Replace(zs, lo, hi, keep[:n]...)
}

// zeroAt gives the range that covers lba.
func (x *index) zeroAt(lba uint64) (zeroRange, bool) {
	if len(x.zeros) == 0 {
		return zeroRange{}, false
	}
	i, _ := slices.BinarySearchFunc(x.zeros, lba, func(z zeroRange, lba uint64) int {
		if z.to <= lba {
			return -1
		}
		return 1
	})
	if i < len(x.zeros) && x.zeros[i].from <= lba {
		return x.zeros[i], true
	}
	return zeroRange{}, false
}

// forgetZeros drops the ranges that were noted up to seq.
func (x *index) forgetZeros(seq uint64) {
	x.zeros = slices.DeleteFunc(x.zeros, func(z zeroRange) bool { return z.seq <= seq })
}

// nextEvent gives the first block in [lba, end) about which the index may know something, end if there is none. It is
// exact for zero ranges and to the leaf for data.
func (x *index) nextEvent(lba, end uint64) uint64 {
	if leaf, ok := x.leaves.next(lba / leafBlocks); ok {
		end = min(end, max(lba, leaf*leafBlocks))
	}
	for _, z := range x.zeros {
		if z.to > lba {
			return min(end, max(lba, z.from))
		}
	}
	return end
}

// presence counts indexed blocks by leaf, and finds the next leaf that has any: a bitmap in chunks, made on demand.
type presence struct {
	count  map[uint64]uint16
	chunks map[uint64]*[chunkWords]uint64
	sorted []uint64 // keys of chunks
}

const chunkWords = 64 // 4,096 leaves, 8 GiB of volume

func (p *presence) add(leaf uint64) {
	if p.count == nil {
		p.count = make(map[uint64]uint16)
		p.chunks = make(map[uint64]*[chunkWords]uint64)
	}
	if p.count[leaf]++; p.count[leaf] > 1 {
		return
	}
	key, word, bit := leaf/(chunkWords*64), leaf/64%chunkWords, leaf%64
	c := p.chunks[key]
	if c == nil {
		c = new([chunkWords]uint64)
		p.chunks[key] = c
		i, _ := slices.BinarySearch(p.sorted, key)
		p.sorted = slices.Insert(p.sorted, i, key)
	}
	c[word] |= 1 << bit
}

func (p *presence) drop(leaf uint64) {
	if p.count[leaf]--; p.count[leaf] > 0 {
		return
	}
	delete(p.count, leaf)
	key, word, bit := leaf/(chunkWords*64), leaf/64%chunkWords, leaf%64
	c := p.chunks[key]
	c[word] &^= 1 << bit
	if *c == ([chunkWords]uint64{}) {
		delete(p.chunks, key)
		i, _ := slices.BinarySearch(p.sorted, key)
		p.sorted = slices.Delete(p.sorted, i, i+1)
	}
}

// has says whether the leaf holds any indexed block.
func (p *presence) has(leaf uint64) bool { return p.count[leaf] > 0 }

// next gives the first leaf >= from that holds any indexed block.
func (p *presence) next(from uint64) (uint64, bool) {
	i, _ := slices.BinarySearch(p.sorted, from/(chunkWords*64))
	for ; i < len(p.sorted); i++ {
		key := p.sorted[i]
		c := p.chunks[key]
		for w := range uint64(chunkWords) {
			base := key*chunkWords*64 + w*64
			if base+63 < from || c[w] == 0 {
				continue
			}
			for b := range uint64(64) {
				if c[w]&(1<<b) != 0 && base+b >= from {
					return base + b, true
				}
			}
		}
	}
	return 0, false
}

// record is a logged record that is not yet on the backend.
type record struct {
	seq, lba, blocks uint64
	value            uint64 // Size: the new size; Data: the new size if it extends, else 0; Mark: the modification time
	sizeBefore       int64  // of the volume
	time             int64
	loc              writelog.Loc
	crc              uint32   // of the only block
	crcs             []uint32 // of each block, if more than one
	batch            uint64   // of the log
	kind             writelog.Kind
	flags            uint8
	key              uint16
}

func (r *record) crcOf(i int) uint32 {
	if r.crcs == nil {
		return r.crc
	}
	return r.crcs[i]
}

// recordQueue holds a volume's records in order, from the first that is not on the backend. It is kept in chunks so that
// it grows and shrinks without copying.
type recordQueue struct {
	chunks [][]record
	head   int   // records of chunks[0] that are gone
	bytes  int64 // payload of all records held
}

const queueChunk = 256

func (q *recordQueue) push(l *writelog.Logged, sizeBefore int64) {
	r := record{seq: l.Seq, lba: l.LBA, blocks: l.Blocks, value: l.Value, sizeBefore: sizeBefore, time: l.Time, loc: l.Loc, batch: l.Batch, kind: l.Kind, flags: l.Flags, key: l.Key}
	if l.Kind == writelog.Data {
		if len(l.CRC) == 1 {
			r.crc = l.CRC[0]
		} else {
			r.crcs = slices.Clone(l.CRC)
		}
		q.bytes += int64(l.Blocks) * blockSize
	}
	if n := len(q.chunks); n == 0 || len(q.chunks[n-1]) == cap(q.chunks[n-1]) {
		q.chunks = append(q.chunks, make([]record, 0, queueChunk))
	}
	last := &q.chunks[len(q.chunks)-1]
	*last = append(*last, r)
}

// oldest gives the time of the first record.
func (q *recordQueue) oldest() (int64, bool) {
	if len(q.chunks) == 0 {
		return 0, false
	}
	return q.chunks[0][q.head].time, true
}

// after calls fn for each record with a sequence number above seq, in order, until fn returns false.
func (q *recordQueue) after(seq uint64, fn func(*record) bool) {
	for i, c := range q.chunks {
		from := 0
		if i == 0 {
			from = q.head
		}
		if c[len(c)-1].seq <= seq {
			continue
		}
		for j := from; j < len(c); j++ {
			if c[j].seq > seq && !fn(&c[j]) {
				return
			}
		}
	}
}

// undurable describes the records that are in batches after the given one: the sequence number before the first, their
// payload, and the time of the first.
func (q *recordQueue) undurable(batch, last uint64) (before uint64, bytes, since int64) {
	before = last
	for i := len(q.chunks) - 1; i >= 0; i-- {
		from := 0
		if i == 0 {
			from = q.head
		}
		for j := len(q.chunks[i]) - 1; j >= from; j-- {
			r := &q.chunks[i][j]
			if r.batch <= batch {
				return before, bytes, since
			}
			before, since = r.seq-1, r.time
			if r.kind == writelog.Data {
				bytes += int64(r.blocks) * blockSize
			}
		}
	}
	return before, bytes, since
}

// drop forgets the records up to seq.
func (q *recordQueue) drop(seq uint64) {
	for len(q.chunks) > 0 {
		c := q.chunks[0]
		for q.head < len(c) && c[q.head].seq <= seq {
			if c[q.head].kind == writelog.Data {
				q.bytes -= int64(c[q.head].blocks) * blockSize
			}
			c[q.head].crcs = nil
			q.head++
		}
		if q.head < len(c) {
			return
		}
		q.chunks, q.head = q.chunks[1:], 0
	}
	q.chunks = nil
}
