package raft

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"

	"github.com/hashicorp/raft-wal/types"
)

// sealing is raft-wal's metadata store with what raft-wal v0.4.0 leaves out: when the end of the log is cut off, as a follower
// does whose entries lost an election, the segment that was written last becomes a sealed one without an index, and after the
// next start nothing in it can be read ("sealed segment has no index block"). Here the index is written, behind everything else
// in the segment's file, before the metadata says that the segment is sealed:
//
//	| offset of entry BaseIndex, 4 LE | … | offset of entry MaxIndex, 4 LE |
//
// A crash between the two leaves a tail segment with some bytes far behind its end, which recovery does not look at.
type sealing struct {
	types.MetaStore
	dir     string
	indexed map[uint64]uint64 // index's place by segment; raft-wal goes on committing zero for it
}

func newSealing(meta types.MetaStore, dir string) *sealing {
	return &sealing{MetaStore: meta, dir: dir, indexed: make(map[uint64]uint64)}
}

// CommitState implements types.MetaStore.
func (s *sealing) CommitState(ps types.PersistentState) error {
	for i := range ps.Segments {
		seg := &ps.Segments[i]
		if seg.SealTime.IsZero() || seg.IndexStart != 0 {
			continue
		}
		at, ok := s.indexed[seg.ID]
		if !ok {
			var err error
			if at, err = writeIndex(s.dir, *seg); err != nil {
				return fmt.Errorf("seal segment %d of the raft log: %w", seg.BaseIndex, err)
			}
			s.indexed[seg.ID] = at
		}
		seg.IndexStart = at
	}
	return s.MetaStore.CommitState(ps)
}

// raft-wal's file format (its segment/format.go).
const (
	segmentHeaderBytes = 32
	frameHeaderBytes   = 8
	frameEntry         = 1
	frameIndex         = 2
	frameCommit        = 3
	entryBytesMax      = 64 << 20
)

// writeIndex finds the entries of a segment and writes their offsets at the end of its file.
func writeIndex(dir string, seg types.SegmentInfo) (at uint64, err error) {
	f, err := os.OpenFile(filepath.Join(dir, fmt.Sprintf("%020d-%016x.wal", seg.BaseIndex, seg.ID)), os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
	}()
	var index []byte
	var head [frameHeaderBytes]byte
	offset := int64(segmentHeaderBytes)
	for want := seg.MaxIndex - seg.BaseIndex + 1; uint64(len(index)) < 4*want; {
		if _, err := f.ReadAt(head[:], offset); err != nil {
			return 0, fmt.Errorf("read frame at %d: %w", offset, err)
		}
		n := int64(binary.LittleEndian.Uint32(head[4:]))
		switch head[0] {
		case frameEntry:
			index = binary.LittleEndian.AppendUint32(index, uint32(offset))
		case frameIndex:
		case frameCommit:
			n = 0 // it has a checksum there
		default:
			return 0, fmt.Errorf("frame of type %d at %d", head[0], offset)
		}
		if n > entryBytesMax {
			return 0, fmt.Errorf("frame of %d bytes at %d", n, offset)
		}
		offset += frameHeaderBytes + (n+frameHeaderBytes-1)/frameHeaderBytes*frameHeaderBytes
	}
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	end := max(info.Size(), offset)
	if _, err := f.WriteAt(index, end); err != nil {
		return 0, err
	}
	return uint64(end), f.Sync()
}
