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
// The first frame is the header {index}; tables follow in the order of objects; the replay window's rows stand oldest first.
type Snapshot struct {
	index  uint64
	db     *memdb.MemDB
	window []replayed
}

const snapshotMagic = "varvesnp"

// Frames that are no rows; objects lists the others.
const (
	frameEnd    = 0
	frameHeader = 1
)

const rowBytesMax = 1 << 20

type snapshotHeader struct {
	Index uint64 `json:"index"`
}

// Snapshot takes the state as it is. It costs the copy of the replay window. It must not run beside Apply.
func (s *Store) Snapshot() (*Snapshot, error) {
	if err := s.Halted(); err != nil {
		return nil, err
	}
	return &Snapshot{index: s.Index(), db: s.db.Snapshot(), window: s.window.oldestFirst()}, nil
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
	for _, o := range objects {
		o.write(f, o.frame, p, v)
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

// Restore replaces the state by a snapshot's, or changes nothing. It wakes everyone who waits for a change.
func (s *Store) Restore(r io.Reader) error {
	txn := s.db.Txn(true)
	defer txn.Abort()
	for _, o := range objects {
		if o.table == nil {
			continue
		}
		if _, err := txn.DeleteAll(o.table.Name, byID); err != nil {
			return fmt.Errorf("restore snapshot: empty table %s: %w", o.table.Name, err)
		}
	}
	l := &loader{tx: tx{View: View{txn: txn}}}
	if err := l.load(r); err != nil {
		return fmt.Errorf("restore snapshot: %w", err)
	}
	if err := l.Check(); err != nil {
		return fmt.Errorf("restore snapshot: %w: %w", ErrCorruptSnapshot, err)
	}
	txn.Commit()
	s.window = l.window
	s.index.Store(l.header.Index)
	s.changes.reset(l.header.Index)
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
	if frame == frameHeader {
		return strict(body, &l.header)
	}
	for _, o := range objects {
		if o.frame == frame {
			return o.load(l, body)
		}
	}
	return errors.New("unknown")
}
