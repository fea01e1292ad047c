package state

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/hashicorp/go-memdb"
)

// Snapshot is the state at one index, ready to be written while the store goes on. Equal states give equal bytes:
//
//	"varvesnp" | format 4 LE | then frames:  | table 1 | length 4 LE | JSON row |        rows of a table by id
//	                           the last one: | 0 | 32 LE | SHA-256 of everything before this frame |
//
// The first frame is the header {index}; the replay window's rows come last, oldest first.
type Snapshot struct {
	index  uint64
	db     *memdb.MemDB
	window []replayed
}

const snapshotMagic = "varvesnp"

// Frame types, in the order they stand.
const (
	frameEnd = iota
	frameHeader
	frameCluster
	frameNode
	frameToken
	frameVPool
	frameInode
	frameVolume
	frameDoomed
	frameReplayed
)

const rowBytesMax = 64 << 10

type snapshotHeader struct {
	Index uint64 `json:"index"`
}

// Rows with a secret: its type has no encoding, on purpose.
type (
	vpoolRow struct {
		VPool
		Key []byte `json:"key"`
	}
	tokenRow struct {
		Token
		Hash []byte `json:"hash"`
	}
)

// Snapshot takes the state as it is. It costs the copy of the replay window. It must not run beside Apply.
func (s *Store) Snapshot() (*Snapshot, error) {
	if err := s.Halted(); err != nil {
		return nil, err
	}
	return &Snapshot{index: s.Index(), db: s.db.Load().Snapshot(), window: s.window.oldestFirst()}, nil
}

// Hash is the SHA-256 of the snapshot: equal on all nodes at an equal index.
func (s *Store) Hash() ([32]byte, error) {
	snap, err := s.Snapshot()
	if err != nil {
		return [32]byte{}, err
	}
	h := sha256.New()
	if _, err := snap.WriteTo(h); err != nil {
		return [32]byte{}, err
	}
	return [32]byte(h.Sum(nil)), nil
}

// WriteTo implements io.WriterTo.
func (p *Snapshot) WriteTo(w io.Writer) (int64, error) {
	f := &frameWriter{w: bufio.NewWriterSize(w, 64<<10), sum: sha256.New()}
	f.write([]byte(snapshotMagic))
	f.write(binary.LittleEndian.AppendUint32(nil, Format))
	f.frame(frameHeader, snapshotHeader{Index: p.index})
	v := &View{txn: p.db.Txn(false)}
	writeRows(f, v, frameCluster, tCluster, func(c *Cluster) any { return c })
	writeRows(f, v, frameNode, tNode, func(n *Node) any { return n })
	writeRows(f, v, frameToken, tToken, func(t *Token) any { return tokenRow{Token: *t, Hash: t.Hash[:]} })
	writeRows(f, v, frameVPool, tVPool, func(p *VPool) any { return vpoolRow{VPool: *p, Key: p.Key[:]} })
	writeRows(f, v, frameInode, tInode, func(n *Inode) any { return n })
	writeRows(f, v, frameVolume, tVolume, func(v *Volume) any { return v })
	writeRows(f, v, frameDoomed, tDoomed, func(d *Doomed) any { return d })
	for i := range p.window {
		f.frame(frameReplayed, &p.window[i])
	}
	f.raw(frameEnd, f.sum.Sum(nil))
	if f.err == nil {
		f.err = f.w.Flush()
	}
	if f.err != nil {
		return f.n, fmt.Errorf("write snapshot: %w", f.err)
	}
	return f.n, nil
}

func writeRows[T any](f *frameWriter, v *View, frame byte, table string, row func(*T) any) {
	rows(v, table, byID, nil, func(r *T) bool { f.frame(frame, row(r)); return f.err == nil })
}

type frameWriter struct {
	w   *bufio.Writer
	sum hash.Hash
	n   int64
	err error
}

func (f *frameWriter) write(b []byte) {
	if f.err != nil {
		return
	}
	f.sum.Write(b)
	n, err := f.w.Write(b)
	f.n, f.err = f.n+int64(n), err
}

func (f *frameWriter) raw(frame byte, body []byte) {
	f.write(binary.LittleEndian.AppendUint32([]byte{frame}, uint32(len(body))))
	f.write(body)
}

func (f *frameWriter) frame(frame byte, row any) {
	body, err := json.Marshal(row)
	if err == nil && len(body) > rowBytesMax {
		err = fmt.Errorf("row of %d bytes", len(body))
	}
	if f.err == nil {
		f.err = err
	}
	f.raw(frame, body)
}

// ErrCorruptSnapshot: bytes that WriteTo did not write, or a state that breaks an invariant.
var ErrCorruptSnapshot = errors.New("corrupt snapshot")

// ErrFormat: written by a version whose format this binary does not know.
var ErrFormat = errors.New("unknown format")

// Restore replaces the state by a snapshot's, or changes nothing.
func (s *Store) Restore(r io.Reader) error {
	db := newDB()
	txn := db.Txn(true)
	defer txn.Abort()
	l := &loader{tx: tx{View: View{txn: txn}}}
	if err := l.load(r); err != nil {
		return fmt.Errorf("restore snapshot: %w", err)
	}
	if err := l.Check(); err != nil {
		return fmt.Errorf("restore snapshot: %w: %w", ErrCorruptSnapshot, err)
	}
	txn.Commit()
	s.db.Store(db)
	s.window = l.window
	s.index.Store(l.header.Index)
	return nil
}

type loader struct {
	tx
	header snapshotHeader
	window replayWindow
	last   byte
}

func (l *loader) load(r io.Reader) error {
	sum := sha256.New()
	in := bufio.NewReaderSize(r, 64<<10)
	head := make([]byte, len(snapshotMagic)+4)
	if _, err := io.ReadFull(in, head); err != nil || string(head[:8]) != snapshotMagic {
		return fmt.Errorf("%w: no header", ErrCorruptSnapshot)
	}
	if got := binary.LittleEndian.Uint32(head[8:]); got != Format {
		return fmt.Errorf("%w %d, this binary knows %d", ErrFormat, got, Format)
	}
	sum.Write(head)
	for {
		frame, body, err := readFrame(in)
		if err != nil {
			return err
		}
		if frame == frameEnd {
			if !bytes.Equal(body, sum.Sum(nil)) {
				return fmt.Errorf("%w: checksum", ErrCorruptSnapshot)
			}
			break
		}
		sum.Write(binary.LittleEndian.AppendUint32([]byte{frame}, uint32(len(body))))
		sum.Write(body)
		if frame < l.last || l.last == 0 && frame != frameHeader || frame == frameHeader && l.last != 0 {
			return fmt.Errorf("%w: frame %d after %d", ErrCorruptSnapshot, frame, l.last)
		}
		l.last = frame
		if err := l.row(frame, body); err != nil {
			return fmt.Errorf("%w: frame %d: %w", ErrCorruptSnapshot, frame, err)
		}
	}
	if _, err := in.ReadByte(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: bytes after the end", ErrCorruptSnapshot)
	}
	if l.last == 0 {
		return fmt.Errorf("%w: no header", ErrCorruptSnapshot)
	}
	return nil
}

func readFrame(in *bufio.Reader) (frame byte, body []byte, err error) {
	var head [5]byte
	if _, err := io.ReadFull(in, head[:]); err != nil {
		return 0, nil, fmt.Errorf("%w: cut short", ErrCorruptSnapshot)
	}
	n := binary.LittleEndian.Uint32(head[1:])
	if n > rowBytesMax {
		return 0, nil, fmt.Errorf("%w: row of %d bytes", ErrCorruptSnapshot, n)
	}
	body = make([]byte, n)
	if _, err := io.ReadFull(in, body); err != nil {
		return 0, nil, fmt.Errorf("%w: cut short", ErrCorruptSnapshot)
	}
	return head[0], body, nil
}

func (l *loader) row(frame byte, body []byte) error {
	switch frame {
	case frameHeader:
		return strict(body, &l.header)
	case frameCluster:
		return loadRow(l, tCluster, body, new(Cluster))
	case frameNode:
		return loadRow(l, tNode, body, new(Node))
	case frameToken:
		var row tokenRow
		if err := strict(body, &row); err != nil {
			return err
		}
		copy(row.Token.Hash[:], row.Hash)
		l.put(tToken, &row.Token)
		return nil
	case frameVPool:
		var row vpoolRow
		if err := strict(body, &row); err != nil {
			return err
		}
		copy(row.VPool.Key[:], row.Key)
		l.put(tVPool, &row.VPool)
		return nil
	case frameInode:
		return loadRow(l, tInode, body, new(Inode))
	case frameVolume:
		return loadRow(l, tVolume, body, new(Volume))
	case frameDoomed:
		return loadRow(l, tDoomed, body, new(Doomed))
	case frameReplayed:
		var r replayed
		if err := strict(body, &r); err != nil {
			return err
		}
		if _, twice := l.window.get(r.ID); twice || len(l.window.ring) >= ReplayWindow {
			return errors.New("replay window repeats an id or is too long")
		}
		l.window.add(r.ID, r.Result)
		return nil
	}
	return errors.New("unknown")
}

func loadRow[T any](l *loader, table string, body []byte, row *T) error {
	if err := strict(body, row); err != nil {
		return err
	}
	l.put(table, row)
	return nil
}
