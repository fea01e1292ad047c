package cache

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"math/bits"
	"os"
	"path"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver/backend"
)

const (
	traceMagic       = "VTR1"
	traceUnit        = 64 << 10 // bytes that a bit of a trace stands for
	traceObjectsMax  = 4096
	traceObjectBytes = 64 << 20 // what lies behind it is not recorded
	traceBytesMax    = 4 << 20
	tracesDir        = "traces"
	tracesMax        = 4096
)

var errTrace = errors.New("not a boot trace")

// Tracer records what is read, and fetches what was recorded.
type Tracer interface {
	// OpenTraced is Open; what is read of the object goes to the recorder until that stops.
	OpenTraced(ctx context.Context, name string, r *Recorder) (backend.Object, error)
	// PrefetchTrace fetches what a trace names and is not cached, in its order, and returns how many bytes it started to fetch. It
	// waits for room for fetches ahead of need, until ctx ends.
	PrefetchTrace(ctx context.Context, trace []byte) (int64, error)
}

// Recorder notes which parts of objects were read, in the order in which the objects were. One belongs to the attachment of one volume.
type Recorder struct {
	done  atomic.Bool
	timer *time.Timer

	mu      sync.Mutex
	objects []*traced
	byName  map[string]*traced
}

// traced are the parts of one object that were read.
type traced struct {
	r     *Recorder
	name  string
	parts []atomic.Uint64
}

// NewRecorder records for that long, or until Stop.
func NewRecorder(length time.Duration) *Recorder {
	r := &Recorder{byName: make(map[string]*traced)}
	r.timer = time.AfterFunc(length, func() { r.done.Store(true) })
	return r
}

// Stop ends the recording.
func (r *Recorder) Stop() {
	r.timer.Stop()
	r.done.Store(true)
}

// Done tells whether the recording has ended.
func (r *Recorder) Done() bool { return r.done.Load() }

// object gives the notes on an object, nil if there is no room for more.
func (r *Recorder) object(name string, size int64) *traced {
	r.mu.Lock()
	defer r.mu.Unlock()
	if t := r.byName[name]; t != nil {
		return t
	}
	if len(r.objects) == traceObjectsMax {
		return nil
	}
	units := (min(size, traceObjectBytes) + traceUnit - 1) / traceUnit
	t := &traced{r: r, name: name, parts: make([]atomic.Uint64, (units+63)/64)}
	r.byName[name] = t
	r.objects = append(r.objects, t)
	return t
}

// trace notes a read.
func (o *object) trace(t *traced, off, n int64) {
	if t.r.done.Load() {
		o.traced.CompareAndSwap(t, nil)
		return
	}
	for u := off / traceUnit; u*traceUnit < off+n && u < int64(len(t.parts)*64); u++ {
		if bit := uint64(1) << (u & 63); t.parts[u/64].Load()&bit == 0 {
			t.parts[u/64].Or(bit)
		}
	}
}

// Trace gives what was recorded, in a compact form, nil if nothing was:
//
//	| "VTR1" | objects uvarint | objects × | name length uvarint, name | runs uvarint | runs × | gap uvarint | length uvarint | | crc32c 4 |
//
// gap and length count units of 64 KiB; a gap is from the end of the run before.
func (r *Recorder) Trace() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	var body []byte
	count := 0
	for _, t := range r.objects {
		runs := t.runs()
		if len(runs) == 0 {
			continue
		}
		count++
		body = binary.AppendUvarint(body, uint64(len(t.name)))
		body = append(body, t.name...)
		body = binary.AppendUvarint(body, uint64(len(runs)))
		at := int64(0)
		for _, run := range runs {
			body = binary.AppendUvarint(body, uint64(run[0]-at))
			body = binary.AppendUvarint(body, uint64(run[1]))
			at = run[0] + run[1]
		}
	}
	if count == 0 {
		return nil
	}
	b := append(binary.AppendUvarint([]byte(traceMagic), uint64(count)), body...)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// runs lists start and length of what was read.
func (t *traced) runs() (runs [][2]int64) {
	for i := range t.parts {
		for w := t.parts[i].Load(); w != 0; w &= w - 1 {
			u := int64(i*64 + bits.TrailingZeros64(w))
			if k := len(runs); k > 0 && runs[k-1][0]+runs[k-1][1] == u {
				runs[k-1][1]++
				continue
			}
			runs = append(runs, [2]int64{u, 1})
		}
	}
	return runs
}

// tracedRun is a part of a trace.
type tracedRun struct {
	name   string
	off, n int64
}

// parseTrace checks all of a trace before it gives anything of it.
func parseTrace(b []byte) ([]tracedRun, error) {
	if len(b) > traceBytesMax || len(b) < len(traceMagic)+5 || string(b[:len(traceMagic)]) != traceMagic {
		return nil, errTrace
	}
	tail := len(b) - 4
	if crc32.Checksum(b[:tail], castagnoli) != binary.LittleEndian.Uint32(b[tail:]) {
		return nil, fmt.Errorf("checksum: %w", errTrace)
	}
	b = b[len(traceMagic):tail]
	bad := false
	number := func(most uint64) uint64 {
		v, n := binary.Uvarint(b)
		if n <= 0 || v > most {
			bad = true
			return 0
		}
		b = b[n:]
		return v
	}
	const unitsMax = traceObjectBytes / traceUnit
	var runs []tracedRun
	for objects := number(traceObjectsMax); objects > 0 && !bad; objects-- {
		n := number(uint64(len(b)))
		name := string(b[:n])
		b = b[n:]
		if bad || backend.CheckName(name) != nil {
			return nil, fmt.Errorf("object name: %w", errTrace)
		}
		at := uint64(0)
		for k := number(unitsMax); k > 0 && !bad; k-- {
			at += number(unitsMax)
			length := number(unitsMax)
			if bad || at+length > unitsMax {
				return nil, fmt.Errorf("run: %w", errTrace)
			}
			runs = append(runs, tracedRun{name, int64(at) * traceUnit, int64(length) * traceUnit})
			at += length
		}
	}
	if bad || len(b) > 0 {
		return nil, fmt.Errorf("length: %w", errTrace)
	}
	return runs, nil
}

// OpenTraced implements Tracer.
func (s *store) OpenTraced(ctx context.Context, name string, r *Recorder) (backend.Object, error) {
	o, err := s.openObject(ctx, name)
	if err != nil {
		return nil, err
	}
	if r != nil && !r.Done() {
		o.traced.Store(r.object(name, o.size))
	}
	return o, nil
}

// PrefetchTrace implements Tracer.
func (s *store) PrefetchTrace(ctx context.Context, trace []byte) (int64, error) {
	runs, err := parseTrace(trace)
	if err != nil {
		return 0, fmt.Errorf("prefetch: %w", err)
	}
	var o *object
	defer func() {
		if o != nil {
			_ = o.release()
		}
	}()
	started := int64(0)
	for _, r := range runs {
		if o == nil || o.name != r.name {
			if o != nil {
				_ = o.release()
			}
			if o, err = s.openObject(ctx, r.name); errors.Is(err, backend.ErrNotExist) {
				o = nil
				continue // scrubbed since
			} else if err != nil {
				o = nil
				return started, fmt.Errorf("prefetch object %s: %w", r.name, err)
			}
		}
		for off, end := r.off, min(r.off+r.n, o.size); off < end; off += fetchBytesMax {
			if err := s.waitAhead(ctx); err != nil {
				return started, err
			}
			to := min(off+fetchBytesMax, end)
			s.ahead(o, off, to, false)
			started += to - off
		}
	}
	return started, nil
}

// waitAhead waits until no more than half the flights ahead of need that there may be are under way.
func (s *store) waitAhead(ctx context.Context) error {
	for s.c.ahead.Load() >= aheadWaiting/2 {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.ctx.Done():
			return errClosed
		case <-time.After(2 * time.Millisecond):
		}
	}
	return ctx.Err()
}

// SaveTrace keeps a template's trace beside the SSD tier. Without that tier it is not kept.
func (c *Cache) SaveTrace(template uuid.UUID, trace []byte) error {
	if !c.ssd.on() {
		return nil
	}
	if len(trace) > traceBytesMax {
		return fmt.Errorf("save boot trace of %s: %d bytes are more than %d", template, len(trace), traceBytesMax)
	}
	if err := c.writeTrace(template, trace); err != nil {
		return fmt.Errorf("save boot trace of %s: %w", template, err)
	}
	return nil
}

func (c *Cache) writeTrace(template uuid.UUID, trace []byte) error {
	vfs, dir := c.cfg.FS, path.Join(c.cfg.Dir, tracesDir)
	if err := vfs.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	names, err := vfs.ReadDir(dir)
	if err != nil {
		return err
	}
	if len(names) >= tracesMax { // any may go: it is recorded anew at the next attach
		if err := vfs.Remove(path.Join(dir, names[0])); err != nil {
			return err
		}
	}
	name := path.Join(dir, template.String())
	f, err := vfs.OpenFile(name+".new", os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(trace, 0)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := vfs.Rename(name+".new", name); err != nil {
		return err
	}
	return vfs.SyncDir(dir)
}

// LoadTrace gives a template's trace, nil if there is none.
func (c *Cache) LoadTrace(template uuid.UUID) ([]byte, error) {
	if !c.ssd.on() {
		return nil, nil
	}
	f, err := c.cfg.FS.OpenFile(path.Join(c.cfg.Dir, tracesDir, template.String()), os.O_RDONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("load boot trace of %s: %w", template, err)
	}
	size, err := f.Size()
	var b []byte
	if err == nil && size <= traceBytesMax {
		b = make([]byte, size)
		_, err = f.ReadAt(b, 0)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("load boot trace of %s: %w", template, err)
	}
	if _, err := parseTrace(b); err != nil {
		return nil, nil // damaged: it is recorded anew
	}
	return b, nil
}
