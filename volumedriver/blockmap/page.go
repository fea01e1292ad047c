package blockmap

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"sync/atomic"
)

const (
	pageLeaves   = 4096 // 8 GiB
	pageWords    = pageLeaves / 64
	bitmapMemory = pageWords * 8

	pageVersion = 2
	setRuns     = 0
	setBitmap   = 1
	setRunsMax  = 127 // more take more room than a bitmap
)

// bitmap has a bit for each leaf of a page; leaves are given by their number in the volume. A nil one is empty.
type bitmap [pageWords]atomic.Uint64

// leafSet is a bitmap that one goroutine has for itself.
type leafSet [pageWords]uint64

func (m *bitmap) has(leaf uint64) bool {
	return m != nil && m[leaf%pageLeaves/64].Load()&(1<<(leaf%64)) != 0
}

// set tells whether the bit was clear.
func (m *bitmap) set(leaf uint64) bool {
	bit := uint64(1) << (leaf % 64)
	return m[leaf%pageLeaves/64].Or(bit)&bit == 0
}

// unset tells whether the bit was set.
func (m *bitmap) unset(leaf uint64) bool {
	if m == nil {
		return false
	}
	bit := uint64(1) << (leaf % 64)
	return m[leaf%pageLeaves/64].And(^bit)&bit != 0
}

func (m *bitmap) empty() bool {
	if m != nil {
		for i := range m {
			if m[i].Load() != 0 {
				return false
			}
		}
	}
	return true
}

func (m *bitmap) load(set *leafSet) {
	for i := range m {
		m[i].Store(set[i])
	}
}

func (m *bitmap) copy() (set leafSet) {
	if m != nil {
		for i := range m {
			set[i] = m[i].Load()
		}
	}
	return set
}

func (t *leafSet) has(leaf uint64) bool { return t[leaf%pageLeaves/64]&(1<<(leaf%64)) != 0 }

func (t *leafSet) add(other *leafSet) {
	for i := range t {
		t[i] |= other[i]
	}
}

// each calls fn for the leaves of the set, which is that of a page, ascending.
func (t *leafSet) each(page uint32, fn func(leaf uint64) error) error {
	for i, w := range t {
		for ; w != 0; w &= w - 1 {
			if err := fn(uint64(page)*pageLeaves + uint64(i*64+bits.TrailingZeros64(w))); err != nil {
				return err
			}
		}
	}
	return nil
}

// runs counts the stretches of leaves.
func (t *leafSet) runs() (n int) {
	carry := uint64(0)
	for _, w := range t {
		n += bits.OnesCount64(w &^ (w<<1 | carry))
		carry = w >> 63
	}
	return n
}

// appendSet appends the shorter of a set's two forms: | 0 | runs 1 | first 2, last 2 | … |, or | 1 | 512 bytes of bits |.
func appendSet(b []byte, t *leafSet) []byte {
	n := t.runs()
	if n > setRunsMax {
		b = append(b, setBitmap)
		for _, w := range t {
			b = binary.LittleEndian.AppendUint64(b, w)
		}
		return b
	}
	b = append(b, setRuns, byte(n))
	for leaf := 0; n > 0; n-- {
		first := t.next(leaf, 0)
		leaf = t.next(first, ^uint64(0))
		b = binary.LittleEndian.AppendUint16(binary.LittleEndian.AppendUint16(b, uint16(first)), uint16(leaf-1))
	}
	return b
}

// next gives the first leaf from that on whose bit differs from those of same, or pageLeaves.
func (t *leafSet) next(leaf int, same uint64) int {
	for leaf < pageLeaves {
		if w := (t[leaf/64] ^ same) >> (leaf % 64); w != 0 {
			return leaf + bits.TrailingZeros64(w)
		}
		leaf = leaf&^63 + 64
	}
	return pageLeaves
}

// decodeSet undoes appendSet and gives what follows. It takes nothing that appendSet does not make.
func decodeSet(b []byte) (t leafSet, rest []byte, err error) {
	switch {
	case len(b) >= 1+bitmapMemory && b[0] == setBitmap:
		for i := range t {
			t[i] = binary.LittleEndian.Uint64(b[1+8*i:])
		}
		if t.runs() > setRunsMax {
			return t, b[1+bitmapMemory:], nil
		}
	case len(b) >= 2 && b[0] == setRuns && int(b[1]) <= setRunsMax && len(b) >= 2+4*int(b[1]):
		least := 0
		for i := range int(b[1]) {
			first, last := int(binary.LittleEndian.Uint16(b[2+4*i:])), int(binary.LittleEndian.Uint16(b[4+4*i:]))
			if first < least || last < first || last >= pageLeaves {
				return t, nil, fmt.Errorf("leaves %d to %d after %d: %w", first, last, least, ErrCorrupt)
			}
			for leaf := first; leaf <= last; leaf++ {
				t[leaf/64] |= 1 << (leaf % 64)
			}
			least = last + 2
		}
		return t, b[2+4*int(b[1]):], nil
	}
	return t, nil, fmt.Errorf("set of leaves in %d bytes: %w", len(b), ErrCorrupt)
}

// appendPage appends the stored form of a version of a page to b.
func appendPage(b, key []byte, present, changed *leafSet) []byte {
	begin := len(b)
	b = appendSet(appendSet(append(b, pageVersion), present), changed)
	return binary.LittleEndian.AppendUint32(b, valueCRC(key, b[begin:]))
}

// decodePage undoes appendPage.
func decodePage(key, b []byte) (present, changed leafSet, err error) {
	size := len(b) - 4
	if size < 1 || valueCRC(key, b[:size]) != binary.LittleEndian.Uint32(b[size:]) {
		return present, changed, fmt.Errorf("page of %d bytes, checksum: %w", len(b), ErrCorrupt)
	}
	if b[0] != pageVersion {
		return present, changed, fmt.Errorf("page version %d: %w", b[0], ErrCorrupt)
	}
	present, rest, err := decodeSet(b[1:size])
	if err == nil {
		changed, rest, err = decodeSet(rest)
	}
	if err == nil && len(rest) > 0 {
		err = fmt.Errorf("page of %d bytes, %d too many: %w", len(b), len(rest), ErrCorrupt)
	}
	return present, changed, err
}
