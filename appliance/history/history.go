// Package history keeps what a node measured for thirty days, for charts: of itself, of what it serves of each vPool, and of each vDisk
// that it owns.
//
//	s, err := history.Open(history.Config{Dir, Collect, Log})      // starts nothing
//	go s.Run(ctx)                                                       // a step every ten seconds
//	s.Query(object, from, to, points) (Series, error)
//
// # Tiers
//
//	step    kept      a file holds      at most on disk
//	10 s    1 day     2 h               96 MiB
//	1 min   7 days    12 h              96 MiB
//	15 min  30 days   2 days            64 MiB
//
// The oldest file of a tier goes when its time is over or the tier is over its bytes, so the whole is bounded whatever there are of vDisks:
// a node with thousands of busy ones keeps its finest tier for less than a day. The coarser tiers add up the finest one, histograms
// bucket by bucket, so percentiles are true ones in each.
//
// # File: TIER-STARTSECONDS.hist, appended to
//
//	| "varvehis" | then frames: | crc32c of the rest 4 LE | length 4 LE | end of the step, unix seconds 8 LE | entries |
//	entry   | kind 1 | id 16 | uvarint reads, writes, bytes read, bytes written | histogram of reads | of writes | gauges |
//	histogram  | uvarint n | n times: uvarint bucket, uvarint count |      gauges | uvarint n | n times: 1 number, 8 float64 LE |
//
// A frame holds the objects that did something in its step or whose gauges changed, and all of them every hour and at the beginning of a
// file; so an idle vDisk costs nothing, and absence in a frame means zero for what is counted and "as before" for gauges.
//
// Nothing is synced: a power cut may take the last half minute of charts. A torn or damaged frame ends what is read of a file; Open cuts
// the newest file there. A disk without room costs history, never more: the step is dropped.
//
// # Lock
//
// mu guards the writer. Query lists files under it and reads them without it, up to the first frame that is not whole.
package history

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
)

// Kind of an object.
type Kind byte

// Kinds.
const (
	Node  Kind = 'n'
	VPool Kind = 'p'
	VDisk Kind = 'd'
)

// Object is what figures are of.
type Object struct {
	Kind Kind
	ID   uuid.UUID
}

// Gauge numbers a value that is what it is at the end of a step.
type Gauge byte

// Gauges. Their numbers are in the files: never another meaning.
const (
	Used        Gauge = iota // bytes that vDisks and files hold
	Provisioned              // bytes that vDisks may grow to
	Free                     // bytes of the backend
	Total
	Pending  // bytes that are on the log disk alone
	LogUsed  // share of the log
	Memory   // bytes that the process has
	CPU      // share of all processors
	Clients  // connections
	CacheHit // share of reads
	gauges
)

// Sample is what happened to an object in a step.
type Sample struct {
	Reads, Writes         uint64
	BytesRead, BytesWrite uint64
	ReadTime, WriteTime   Latency
	// Gauges that are known.
	Gauges map[Gauge]float64
}

func (s *Sample) idle() bool { return s.Reads|s.Writes|s.BytesRead|s.BytesWrite == 0 }

// add takes a later step in.
func (s *Sample) add(o *Sample) {
	s.Reads, s.Writes, s.BytesRead, s.BytesWrite = s.Reads+o.Reads, s.Writes+o.Writes, s.BytesRead+o.BytesRead, s.BytesWrite+o.BytesWrite
	s.ReadTime.add(&o.ReadTime)
	s.WriteTime.add(&o.WriteTime)
	if s.Gauges == nil {
		s.Gauges = make(map[Gauge]float64)
	}
	maps.Copy(s.Gauges, o.Gauges)
}

// Step of the finest tier.
const Step = 10 * time.Second

// tier is a resolution.
type tier struct {
	name  string
	step  int64 // seconds
	keep  int64
	file  int64
	bytes int64
}

var tiers = []tier{
	{"10s", 10, 24 * 3600, 2 * 3600, 96 << 20},
	{"1m", 60, 7 * 24 * 3600, 12 * 3600, 96 << 20},
	{"15m", 900, 30 * 24 * 3600, 2 * 24 * 3600, 64 << 20},
}

const (
	suffix     = ".hist"
	allEvery   = 3600
	objectsMax = 20000 // in a frame; the busiest count
)

// Config wires a Store.
type Config struct {
	Dir string
	// Collect tells what happened since it was called last. It is called every Step.
	Collect func() map[Object]*Sample
	Log     *slog.Logger
	Now     func() time.Time
}

// Store of one node.
type Store struct {
	cfg Config

	mu    sync.Mutex // guards what is below
	tiers []*writer
}

// writer is a tier's newest file and what is not in it yet.
type writer struct {
	tier
	file    *os.File
	started int64
	size    int64
	told    map[Object]map[Gauge]float64 // gauges as the file has them
	all     int64                        // when all objects were written last
	sum     map[Object]*Sample           // of a coarser tier's step
	until   int64                        // end of that step
}

// Open finds what is kept, and takes up the sums of the coarser tiers where the last run left them.
func Open(cfg Config) (*Store, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of the history: %w", err)
	}
	s := &Store{cfg: cfg}
	for _, t := range tiers {
		w := &writer{tier: t, sum: make(map[Object]*Sample)}
		files, err := list(cfg.Dir, t)
		if err != nil {
			return nil, err
		}
		if len(files) > 0 {
			if err := cut(files[len(files)-1].path); err != nil {
				return nil, err
			}
		}
		s.tiers = append(s.tiers, w)
	}
	now := cfg.Now().Unix()
	for _, w := range s.tiers[1:] {
		w.until = (now/w.step + 1) * w.step
		err := s.read(tiers[0], w.until-w.step, now, func(_ int64, o Object, sample *Sample) { w.take(o, sample) }, nil)
		if err != nil {
			return nil, err
		}
	}
	return s, nil
}

// Run takes a step every ten seconds, at whole tens, until ctx ends.
func (s *Store) Run(ctx context.Context) error {
	s.cfg.Collect() // what happened before counts from here
	for {
		now := s.cfg.Now()
		t := time.NewTimer(now.Truncate(Step).Add(Step).Sub(now))
		select {
		case <-ctx.Done():
			t.Stop()
			return s.close()
		case <-t.C:
		}
		if err := s.Add(s.cfg.Now().Truncate(Step).Unix(), s.cfg.Collect()); err != nil {
			s.cfg.Log.Warn("a step of the history could not be kept", "err", err)
		}
	}
}

func (s *Store) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, w := range s.tiers {
		if w.file != nil {
			errs = append(errs, w.file.Close())
			w.file = nil
		}
	}
	return errors.Join(errs...)
}

// Add keeps a step that ended at a time.
func (s *Store) Add(end int64, step map[Object]*Sample) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	errs = append(errs, s.append(s.tiers[0], end, step))
	for _, w := range s.tiers[1:] {
		if w.until == 0 {
			w.until = ((end-1)/w.step + 1) * w.step
		}
		if end > w.until { // the clock went on without us
			errs = append(errs, s.flush(w))
			w.until = ((end-1)/w.step + 1) * w.step
		}
		for o, sample := range step {
			w.take(o, sample)
		}
		if end == w.until {
			errs = append(errs, s.flush(w))
			w.until += w.step
		}
	}
	return errors.Join(errs...)
}

func (w *writer) take(o Object, sample *Sample) {
	have := w.sum[o]
	if have == nil {
		have = &Sample{}
		w.sum[o] = have
	}
	have.add(sample)
}

func (s *Store) flush(w *writer) error {
	sum := w.sum
	w.sum = make(map[Object]*Sample)
	if len(sum) == 0 {
		return nil
	}
	return s.append(w, w.until, sum)
}

// append writes a frame to a tier's file, which is a new one when that is due.
func (s *Store) append(w *writer, end int64, step map[Object]*Sample) error {
	if w.file == nil || end-w.started > w.tier.file || end < w.started || w.size > w.bytes/4 {
		if err := s.roll(w, end); err != nil {
			return err
		}
	}
	all := end-w.all >= allEvery
	var objects []Object
	for o, sample := range step {
		if all || !sample.idle() || !maps.Equal(w.told[o], sample.Gauges) {
			objects = append(objects, o)
		}
	}
	if len(objects) > objectsMax {
		slices.SortFunc(objects, func(a, b Object) int {
			return cmp.Compare(step[b].Reads+step[b].Writes, step[a].Reads+step[a].Writes)
		})
		objects = objects[:objectsMax]
	}
	frame := encode(end, objects, step)
	if _, err := w.file.WriteAt(frame, w.size); err != nil {
		return fmt.Errorf("write the history: %w", err)
	}
	w.size += int64(len(frame))
	if all {
		w.all = end
		clear(w.told)
	}
	for _, o := range objects {
		w.told[o] = step[o].Gauges
	}
	return nil
}

// roll begins a new file and removes what is too old, or too much.
func (s *Store) roll(w *writer, now int64) error {
	if w.file != nil {
		if err := w.file.Close(); err != nil {
			s.cfg.Log.Warn("a file of the history could not be closed", "err", err)
		}
		w.file = nil
	}
	files, err := list(s.cfg.Dir, w.tier)
	if err != nil {
		return err
	}
	total := int64(0)
	for i, f := range slices.Backward(files) {
		total += f.size
		last := now // when the file ended: the next one's beginning
		if i+1 < len(files) {
			last = files[i+1].start
		}
		if last < now-w.keep || total > w.bytes*3/4 || f.start > now+w.tier.file { // or of a clock that was wrong
			if err := os.Remove(f.path); err != nil {
				return fmt.Errorf("remove old history: %w", err)
			}
		}
	}
	path := filepath.Join(s.cfg.Dir, w.name+"-"+strconv.FormatInt(now, 10)+suffix)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("make a file of the history: %w", err)
	}
	if _, err := f.WriteString(magic); err != nil {
		return errors.Join(fmt.Errorf("begin a file of the history: %w", err), f.Close())
	}
	w.file, w.started, w.size, w.told, w.all = f, now, int64(len(magic)), make(map[Object]map[Gauge]float64), 0
	return nil
}

type kept struct {
	path  string
	start int64
	size  int64
}

// list gives a tier's files, oldest first.
func list(dir string, t tier) ([]kept, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list the history: %w", err)
	}
	var out []kept
	for _, e := range entries {
		rest, ok := strings.CutPrefix(e.Name(), t.name+"-")
		rest, is := strings.CutSuffix(rest, suffix)
		start, err := strconv.ParseInt(rest, 10, 64)
		if !ok || !is || err != nil {
			continue
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list the history: %w", err)
		}
		out = append(out, kept{filepath.Join(dir, e.Name()), start, info.Size()})
	}
	slices.SortFunc(out, func(a, b kept) int { return cmp.Compare(a.start, b.start) })
	return out, nil
}

// read tells of every entry of a tier that ends in (from, to], in order, and of every frame. Entries of a file's beginning, before from, are
// told too, for their gauges.
func (s *Store) read(t tier, from, to int64, entry func(end int64, o Object, sample *Sample), frame func(end int64)) error {
	files, err := list(s.cfg.Dir, t)
	if err != nil {
		return err
	}
	for i, f := range files {
		if f.start > to || i+1 < len(files) && files[i+1].start <= from {
			continue
		}
		err := decodeFile(f.path, func(end int64, entries func(func(Object, *Sample)) bool) bool {
			if end > to {
				return false
			}
			if end > from && frame != nil {
				frame(end)
			}
			return entries(func(o Object, sample *Sample) {
				if end <= from {
					sample = &Sample{Gauges: sample.Gauges}
				}
				entry(end, o, sample)
			})
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // removed meanwhile: too old
			return err
		}
	}
	return nil
}

// Series is how an object was.
type Series struct {
	From, Step int64 // unix seconds, seconds
	// Steps are the samples; nil where nothing is known. Known is the seconds of each that are.
	Steps []*Sample
	Known []int64
}

// Query gives at most points steps of an object, from a time to another one.
func (s *Store) Query(of Object, from, to time.Time, points int) (Series, error) {
	start, end := from.Unix(), to.Unix()
	oldest := s.cfg.Now().Unix() - start
	points = max(points, 1)
	if end <= start || end-start > 400*24*3600 {
		return Series{}, fmt.Errorf("history from %s to %s", from, to)
	}
	t := tiers[len(tiers)-1]
	for _, candidate := range tiers {
		if oldest <= candidate.keep && (end-start)/candidate.step <= int64(points)*4 {
			t = candidate
			break
		}
	}
	step := t.step * max(1, (end-start+int64(points)*t.step-1)/(int64(points)*t.step))
	start = start / step * step
	n := (end - start + step - 1) / step
	out := Series{From: start, Step: step, Steps: make([]*Sample, n), Known: make([]int64, n)}
	at := func(end int64) int64 { return (end - 1 - start) / step }
	gauges := make(map[Gauge]float64)
	told := false
	err := s.read(t, start, end, func(e int64, o Object, sample *Sample) {
		if o != of {
			return
		}
		told = true
		maps.Copy(gauges, sample.Gauges)
		if e <= start {
			return
		}
		i := at(e)
		if out.Steps[i] == nil {
			out.Steps[i] = &Sample{}
		}
		out.Steps[i].add(sample)
	}, func(e int64) {
		// Called before the frame's entries: what is known until then holds on.
		i := at(e)
		out.Known[i] += t.step
		if out.Steps[i] == nil && told {
			out.Steps[i] = &Sample{}
		}
		if out.Steps[i] != nil {
			out.Steps[i].add(&Sample{Gauges: gauges})
		}
	})
	return out, err
}

// Metrics are the names of what a series has, with units.
var Metrics = []struct {
	Name, Unit string
	Of         func(s *Sample, seconds float64) float64 // NaN: not known
}{
	{"read_iops", "1/s", func(s *Sample, d float64) float64 { return float64(s.Reads) / d }},
	{"write_iops", "1/s", func(s *Sample, d float64) float64 { return float64(s.Writes) / d }},
	{"read_bytes", "bytes/s", func(s *Sample, d float64) float64 { return float64(s.BytesRead) / d }},
	{"write_bytes", "bytes/s", func(s *Sample, d float64) float64 { return float64(s.BytesWrite) / d }},
	{"read_p50", "seconds", func(s *Sample, _ float64) float64 { return s.ReadTime.Quantile(0.5) }},
	{"read_p99", "seconds", func(s *Sample, _ float64) float64 { return s.ReadTime.Quantile(0.99) }},
	{"write_p50", "seconds", func(s *Sample, _ float64) float64 { return s.WriteTime.Quantile(0.5) }},
	{"write_p99", "seconds", func(s *Sample, _ float64) float64 { return s.WriteTime.Quantile(0.99) }},
	{"used", "bytes", gauge(Used)}, {"provisioned", "bytes", gauge(Provisioned)}, {"free", "bytes", gauge(Free)}, {"total", "bytes", gauge(Total)},
	{"pending", "bytes", gauge(Pending)}, {"log_used", "ratio", gauge(LogUsed)}, {"memory", "bytes", gauge(Memory)}, {"cpu", "ratio", gauge(CPU)},
	{"clients", "1", gauge(Clients)}, {"cache_hit", "ratio", gauge(CacheHit)},
}

func gauge(g Gauge) func(*Sample, float64) float64 {
	return func(s *Sample, _ float64) float64 {
		if v, ok := s.Gauges[g]; ok {
			return v
		}
		return math.NaN()
	}
}
