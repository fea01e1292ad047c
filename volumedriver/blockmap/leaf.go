package blockmap

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

const (
	refBytes   = 5
	runBytes   = 4 + refBytes
	arrayBytes = LeafBlocks * refBytes

	leafVersion = 1
	formRuns    = 0
	formArray   = 1
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// run is a stretch of a leaf whose refs ascend by one.
type run struct {
	start, blocks uint16
	ref           Ref
}

func (r run) end() uint16 { return r.start + r.blocks }

func getRef(b []byte) Ref {
	_ = b[4]
	return Ref(b[0]) | Ref(b[1])<<8 | Ref(b[2])<<16 | Ref(b[3])<<24 | Ref(b[4])<<32
}

func putRef(b []byte, r Ref) {
	_ = b[4]
	b[0], b[1], b[2], b[3], b[4] = byte(r), byte(r>>8), byte(r>>16), byte(r>>24), byte(r>>32)
}

func getRun(b []byte) run {
	return run{binary.LittleEndian.Uint16(b), binary.LittleEndian.Uint16(b[2:]), getRef(b[4:])}
}

func putRun(b []byte, r run) {
	binary.LittleEndian.PutUint16(b, r.start)
	binary.LittleEndian.PutUint16(b[2:], r.blocks)
	putRef(b[4:], r.ref)
}

// validRef tells whether blocks refs from first on exist.
func validRef(first Ref, blocks uint64) bool {
	return first.Ordinal() != 0 && first>>40 == 0 && uint64(first.Index())+blocks <= 1<<indexBits
}

// emit appends r to runs, as a part of the last one if it continues that.
func emit(runs []run, r run) []run {
	if r.blocks == 0 {
		return runs
	}
	if k := len(runs); k > 0 {
		last := &runs[k-1]
		if next := last.ref + Ref(last.blocks); last.end() == r.start && next == r.ref && next>>indexBits == last.ref>>indexBits {
			last.blocks += r.blocks
			return runs
		}
	}
	return append(runs, r)
}

// splice gives src with the blocks of change replaced; its ref 0 makes them holes. dst must not share memory with src.
func splice(dst, src []run, change run) []run {
	placed := change.ref == 0
	for _, r := range src {
		if r.end() <= change.start {
			dst = emit(dst, r)
			continue
		}
		if r.start < change.start {
			dst = emit(dst, run{r.start, change.start - r.start, r.ref})
		}
		if !placed {
			dst, placed = emit(dst, change), true
		}
		if r.start >= change.end() {
			dst = emit(dst, r)
		} else if r.end() > change.end() {
			cut := change.end() - r.start
			dst = emit(dst, run{change.end(), r.blocks - cut, r.ref + Ref(cut)})
		}
	}
	if !placed {
		dst = emit(dst, change)
	}
	return dst
}

// arrayRuns appends the runs of an array leaf to dst.
func arrayRuns(dst []run, array []byte) []run {
	for i := range LeafBlocks {
		if r := getRef(array[i*refBytes:]); r != 0 {
			dst = emit(dst, run{uint16(i), 1, r})
		}
	}
	return dst
}

// fillArray writes runs as an array leaf.
func fillArray(array []byte, runs []run) {
	clear(array[:arrayBytes])
	for _, r := range runs {
		for i := range int(r.blocks) {
			putRef(array[(int(r.start)+i)*refBytes:], r.ref+Ref(i))
		}
	}
}

// appendLeaf appends the stored form of a leaf (without runs, of an empty one) to b.
func appendLeaf(b, key []byte, runs []run) []byte {
	begin := len(b)
	form, size := byte(formRuns), len(runs)*runBytes
	if size > arrayBytes {
		form, size = formArray, arrayBytes
	}
	b = append(b, leafVersion, form)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(runs)))
	body := len(b)
	b = append(b, make([]byte, size)...)
	if form == formArray {
		fillArray(b[body:], runs)
	} else {
		for i, r := range runs {
			putRun(b[body+i*runBytes:], r)
		}
	}
	return binary.LittleEndian.AppendUint32(b, valueCRC(key, b[begin:]))
}

// decodeLeaf undoes appendLeaf.
func decodeLeaf(dst []run, key, b []byte) ([]run, error) {
	if len(b) < 8 || valueCRC(key, b[:len(b)-4]) != binary.LittleEndian.Uint32(b[len(b)-4:]) {
		return nil, fmt.Errorf("leaf of %d bytes, checksum: %w", len(b), ErrCorrupt)
	}
	if b[0] != leafVersion {
		return nil, fmt.Errorf("leaf version %d: %w", b[0], ErrCorrupt)
	}
	count, body := int(binary.LittleEndian.Uint16(b[2:])), b[4:len(b)-4]
	switch {
	case b[1] == formRuns && count <= LeafBlocks && len(body) == count*runBytes:
		end := 0
		for i := range count {
			r := getRun(body[i*runBytes:])
			if r.blocks == 0 || int(r.start) < end || int(r.start)+int(r.blocks) > LeafBlocks || !validRef(r.ref, uint64(r.blocks)) {
				return nil, fmt.Errorf("run %d of a leaf: %w", i, ErrCorrupt)
			}
			end = int(r.end())
			dst = emit(dst, r)
		}
	case b[1] == formArray && len(body) == arrayBytes:
		for i := range LeafBlocks {
			if r := getRef(body[i*refBytes:]); r != 0 && !validRef(r, 1) {
				return nil, fmt.Errorf("block %d of a leaf: %w", i, ErrCorrupt)
			}
		}
		dst = arrayRuns(dst, body)
	default:
		return nil, fmt.Errorf("leaf form %d with %d runs in %d bytes: %w", b[1], count, len(body), ErrCorrupt)
	}
	return dst, nil
}

func valueCRC(key, value []byte) uint32 {
	return crc32.Update(crc32.Checksum(key, castagnoli), castagnoli, value)
}
