// Package logbook keeps a node's own log lines, numbered, so that they can be asked for across the cluster and a gap shows that some
// were lost.
//
//	DIR/UNIT.log     one JSON object a line: seq, at, level, component, msg, attrs     the newest
//	DIR/UNIT.log.1   the ones before; each file holds fileBytesMax at most
//
// The number goes on where the process before this one stopped, also one that was killed: it is read from the last whole line. The
// lines are written as they come and not synced: after a power cut the last of them may be missing, which the numbers show. A line
// that cannot be written is counted and told with the next one; logging never fails.
//
// One process writes a unit's files; any may read them.
package logbook

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// Limits.
const (
	fileBytesMax  = 8 << 20
	lineBytesMax  = 16 << 10
	textBytesMax  = 2 << 10
	LinesMax      = 5000
	suffix        = ".log"
	older         = ".1"
	componentAttr = "component"
)

// Line is one record.
type Line struct {
	Seq       uint64            `json:"seq"`
	At        time.Time         `json:"at"`
	Level     string            `json:"level"`
	Component string            `json:"component,omitempty"`
	Message   string            `json:"msg"`
	Attrs     map[string]string `json:"attrs,omitempty"`
	// Unit is the file's; Node is filled in where lines of several are put together.
	Unit string `json:"unit,omitempty"`
	Node string `json:"node,omitempty"`
}

// Book writes the lines of one unit.
type Book struct {
	dir, unit string

	// mu guards the fields below, and keeps lines in the order of their numbers.
	mu     sync.Mutex
	f      *os.File
	size   int64
	seq    uint64
	last   time.Time
	missed int
}

// Open opens a unit's book, or begins it.
func Open(dir, unit string) (*Book, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open log book: %w", err)
	}
	b := &Book{dir: dir, unit: unit}
	for _, name := range []string{unit + suffix + older, unit + suffix} {
		if err := read(filepath.Join(dir, name), func(l Line) { b.seq = max(b.seq, l.Seq) }); err != nil {
			return nil, fmt.Errorf("open log book: %w", err)
		}
	}
	if err := b.reopen(); err != nil {
		return nil, fmt.Errorf("open log book: %w", err)
	}
	return b, nil
}

func (b *Book) path() string { return filepath.Join(b.dir, b.unit+suffix) }

// reopen opens the file for more lines, ending one that was cut short.
func (b *Book) reopen() error {
	f, err := os.OpenFile(b.path(), os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err == nil && info.Size() > 0 {
		last := make([]byte, 1)
		if _, err = f.ReadAt(last, info.Size()-1); err == nil && last[0] != '\n' {
			_, err = f.WriteString("\n")
		}
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	b.f, b.size = f, info.Size()
	return nil
}

// Close ends writing.
func (b *Book) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.f == nil {
		return nil
	}
	err := b.f.Close()
	b.f = nil
	return err
}

// write numbers a line and keeps it; do is called with the number, in order.
func (b *Book) write(l Line, do func(seq uint64) error) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.seq++
	l.Seq = b.seq
	if l.At.Before(b.last) { // the order of the numbers is that of the times
		l.At = b.last
	}
	b.last = l.At
	if b.missed > 0 {
		l.Attrs["lines_not_kept"] = fmt.Sprint(b.missed)
	}
	if err := b.keepLocked(l); err != nil {
		b.missed++
	} else {
		b.missed = 0
	}
	return do(l.Seq)
}

func (b *Book) keepLocked(l Line) error {
	if b.f == nil {
		return os.ErrClosed
	}
	text, err := json.Marshal(l)
	if err != nil {
		return err
	}
	if len(text) > lineBytesMax {
		l.Attrs = map[string]string{"attributes": "too long to be kept"}
		if text, err = json.Marshal(l); err != nil {
			return err
		}
	}
	text = append(text, '\n')
	if b.size+int64(len(text)) > fileBytesMax {
		if err := b.f.Close(); err != nil {
			return err
		}
		b.f = nil
		if err := os.Rename(b.path(), b.path()+older); err != nil {
			return err
		}
		if err := b.reopen(); err != nil {
			return err
		}
	}
	n, err := b.f.Write(text)
	b.size += int64(n)
	return err
}

// Handler keeps what inner handles, and gives it the number as the attribute seq.
func (b *Book) Handler(inner slog.Handler) slog.Handler { return &handler{book: b, inner: inner} }

type handler struct {
	book      *Book
	inner     slog.Handler
	attrs     []slog.Attr // of With, their keys complete
	prefix    string
	component string // the last one given
}

// Enabled implements slog.Handler.
func (h *handler) Enabled(ctx context.Context, l slog.Level) bool { return h.inner.Enabled(ctx, l) }

// WithAttrs implements slog.Handler.
func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	out := *h
	out.attrs = slices.Clone(h.attrs)
	var rest []slog.Attr
	for _, a := range attrs {
		if a.Key == componentAttr && h.prefix == "" { // the nearest one counts, and is told once
			out.component = a.Value.Resolve().String()
			continue
		}
		rest = append(rest, a)
		a.Key = h.prefix + a.Key
		out.attrs = append(out.attrs, a)
	}
	if len(rest) > 0 {
		out.inner = h.inner.WithAttrs(rest)
	}
	return &out
}

// WithGroup implements slog.Handler.
func (h *handler) WithGroup(name string) slog.Handler {
	out := *h
	out.inner, out.prefix = h.inner.WithGroup(name), h.prefix+name+"."
	return &out
}

// Handle implements slog.Handler.
func (h *handler) Handle(ctx context.Context, r slog.Record) error {
	l := Line{At: r.Time.UTC(), Level: r.Level.String(), Component: h.component, Message: clip(r.Message), Attrs: make(map[string]string)}
	add := func(a slog.Attr) {
		l.Attrs[a.Key] = clip(a.Value.Resolve().String())
	}
	for _, a := range h.attrs {
		add(a)
	}
	r.Attrs(func(a slog.Attr) bool {
		a.Key = h.prefix + a.Key
		add(a)
		return true
	})
	return h.book.write(l, func(seq uint64) error {
		out := r.Clone()
		if h.component != "" {
			out.AddAttrs(slog.String(componentAttr, h.component))
		}
		out.AddAttrs(slog.Uint64("seq", seq))
		return h.inner.Handle(ctx, out)
	})
}

func clip(s string) string {
	if len(s) > textBytesMax {
		s = s[:textBytesMax] + "…"
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

// Query asks for lines. Zero values leave open what they are about.
type Query struct {
	Since time.Time `json:"since,omitzero"`
	Until time.Time `json:"until,omitzero"`
	// Level is the least.
	Level slog.Level `json:"level,omitempty"`
	// Component and Match are parts of what they are compared with, whatever the case.
	Component string `json:"component,omitempty"`
	Match     string `json:"match,omitempty"`
	// Limit is how many of the newest are wanted, at most LinesMax.
	Limit int `json:"limit,omitempty"`
}

func (q Query) wants(l Line) bool {
	if !q.Since.IsZero() && l.At.Before(q.Since) || !q.Until.IsZero() && l.At.After(q.Until) {
		return false
	}
	var level slog.Level
	if level.UnmarshalText([]byte(l.Level)) == nil && level < q.Level {
		return false
	}
	if q.Component != "" && !has(l.Component, q.Component) {
		return false
	}
	if q.Match == "" || has(l.Message, q.Match) {
		return true
	}
	for k, v := range l.Attrs {
		if has(k+"="+v, q.Match) {
			return true
		}
	}
	return false
}

func has(s, part string) bool { return strings.Contains(strings.ToLower(s), strings.ToLower(part)) }

// Read gives the lines of all units of a node, the oldest first.
func Read(dir string, q Query) ([]Line, error) {
	q.Limit = min(cmp.Or(max(q.Limit, 0), LinesMax), LinesMax)
	list, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read logs: %w", err)
	}
	var out []Line
	for _, e := range list {
		unit, ours := strings.CutSuffix(strings.TrimSuffix(e.Name(), older), suffix)
		if !ours {
			continue
		}
		err := read(filepath.Join(dir, e.Name()), func(l Line) {
			if l.Unit = unit; q.wants(l) {
				if out = append(out, l); len(out) > 4*LinesMax {
					out = Merge(q.Limit, out)
				}
			}
		})
		if err != nil {
			return nil, fmt.Errorf("read logs: %w", err)
		}
	}
	return Merge(q.Limit, out), nil
}

// Merge puts lines in the order of their times and keeps the newest.
func Merge(limit int, lists ...[]Line) []Line {
	all := slices.Concat(lists...)
	slices.SortStableFunc(all, func(a, b Line) int {
		return cmp.Or(a.At.Compare(b.At), cmp.Compare(a.Node, b.Node), cmp.Compare(a.Unit, b.Unit), cmp.Compare(a.Seq, b.Seq))
	})
	return all[max(0, len(all)-limit):]
}

// read gives the whole lines of a file; those that make no sense are passed over.
func read(path string, do func(Line)) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	s := bufio.NewScanner(io.LimitReader(f, 2*fileBytesMax))
	s.Buffer(nil, 2*lineBytesMax)
	for s.Scan() {
		var l Line
		if json.Unmarshal(bytes.TrimSpace(s.Bytes()), &l) == nil && l.Seq > 0 {
			do(l)
		}
	}
	if errors.Is(s.Err(), bufio.ErrTooLong) {
		return nil // garbage from there on
	}
	return s.Err()
}
