package exports

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	figures "varve/appliance/history"
	"varve/volumedriver"
	"varve/volumedriver/blockio"
)

// meter counts what clients do with a volume. Requests and bytes are all counted. How long one took is of the first exactMax after a look at
// the meter, and then, of those that go through without waiting, of one in sampleEvery, which counts for as many, so that the clock
// costs little where there is much to count.
type meter struct {
	turn                  atomic.Uint32
	exact                 atomic.Int32
	reads, writes         atomic.Uint64
	bytesRead, bytesWrite atomic.Uint64
	readTime, writeTime   [figures.Buckets]atomic.Uint32
	flushes               atomic.Uint64
}

const (
	sampleEvery = 16
	exactMax    = 256
)

// sampled says for how many requests this one's time counts; 0: it is not taken.
func (m *meter) sampled() uint32 {
	if m.exact.Load() > 0 && m.exact.Add(-1) >= 0 {
		return 1
	}
	if m.turn.Add(1)%sampleEvery == 0 {
		return sampleEvery
	}
	return 0
}

func took(l *[figures.Buckets]atomic.Uint32, since time.Time, times uint32) {
	l[figures.Bucket(time.Since(since))].Add(times)
}

// Load is what a meter has counted since the volume was opened first.
type Load struct {
	Reads, Writes, Flushes uint64
	BytesRead, BytesWrite  uint64
	ReadTime, WriteTime    figures.Latency
}

func (m *meter) load() Load {
	l := Load{Reads: m.reads.Load(), Writes: m.writes.Load(), Flushes: m.flushes.Load(), BytesRead: m.bytesRead.Load(), BytesWrite: m.bytesWrite.Load()}
	for i := range l.ReadTime {
		l.ReadTime[i], l.WriteTime[i] = m.readTime[i].Load(), m.writeTime[i].Load()
	}
	return l
}

// meters are those of the volumes that were opened. The zero value is ready.
type meters struct {
	mu sync.Mutex
	by map[uuid.UUID]*meter
}

func (m *meters) of(id uuid.UUID) *meter {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.by == nil {
		m.by = make(map[uuid.UUID]*meter)
	}
	one := m.by[id]
	if one == nil {
		one = &meter{}
		m.by[id] = one
	}
	return one
}

// Loads gives what every volume that was opened has done. Volumes that exist no more are forgotten by keep.
func (s *Volumes) Loads(keep func(uuid.UUID) bool) map[uuid.UUID]Load {
	s.meters.mu.Lock()
	defer s.meters.mu.Unlock()
	out := make(map[uuid.UUID]Load, len(s.meters.by))
	for id, m := range s.meters.by {
		if !keep(id) {
			delete(s.meters.by, id)
			continue
		}
		out[id] = m.load()
		m.exact.Store(exactMax)
	}
	return out
}

// Peek is Loads without forgetting, and without what a look changes of how times are taken.
func (s *Volumes) Peek() map[uuid.UUID]Load {
	s.meters.mu.Lock()
	defer s.meters.mu.Unlock()
	out := make(map[uuid.UUID]Load, len(s.meters.by))
	for id, m := range s.meters.by {
		out[id] = m.load()
	}
	return out
}

// metered is a volume as gateways have it: it counts.
type metered struct {
	*volumedriver.Volume
	m *meter
}

func (s *Volumes) metered(id uuid.UUID, v *volumedriver.Volume) metered {
	return metered{v, s.meters.of(id)}
}

func (v metered) counted(reads bool, n int) {
	if reads {
		v.m.reads.Add(1)
		v.m.bytesRead.Add(uint64(n))
		return
	}
	v.m.writes.Add(1)
	v.m.bytesWrite.Add(uint64(n))
}

// TryRead implements nbd.Device and nfs.File.
func (v metered) TryRead(p []byte, off int64) error {
	times := v.m.sampled()
	if times == 0 {
		err := v.Volume.TryRead(p, off)
		if err == nil {
			v.counted(true, len(p))
		}
		return err
	}
	start := time.Now()
	err := v.Volume.TryRead(p, off)
	if err == nil {
		v.counted(true, len(p))
		took(&v.m.readTime, start, times)
	}
	return err
}

// Read implements nbd.Device and nfs.File.
func (v metered) Read(ctx context.Context, p []byte, off int64) error {
	start := time.Now()
	err := v.Volume.Read(ctx, p, off)
	v.counted(true, len(p))
	took(&v.m.readTime, start, 1)
	return err
}

// TryWrite implements nbd.Device and nfs.File.
func (v metered) TryWrite(p []byte, off int64, f blockio.Flags, c blockio.Completer, tag uint64) error {
	if times := v.m.sampled(); times > 0 {
		c = &timed{c, v.m, time.Now(), times}
	}
	err := v.Volume.TryWrite(p, off, f, c, tag)
	if err == nil {
		v.counted(false, len(p))
	}
	return err
}

// Write implements nbd.Device and nfs.File.
func (v metered) Write(ctx context.Context, p []byte, off int64, f blockio.Flags) error {
	start := time.Now()
	err := v.Volume.Write(ctx, p, off, f)
	v.counted(false, len(p))
	took(&v.m.writeTime, start, 1)
	return err
}

// TryZero implements nbd.Device and nfs.File. Zeroes are written without their bytes.
func (v metered) TryZero(off, n int64, f blockio.Flags, c blockio.Completer, tag uint64) error {
	err := v.Volume.TryZero(off, n, f, c, tag)
	if err == nil {
		v.counted(false, 0)
	}
	return err
}

// Zero implements nbd.Device and nfs.File.
func (v metered) Zero(ctx context.Context, off, n int64, f blockio.Flags) error {
	err := v.Volume.Zero(ctx, off, n, f)
	v.counted(false, 0)
	return err
}

// TryFlush implements nbd.Device.
func (v metered) TryFlush(c blockio.Completer, tag uint64) error {
	err := v.Volume.TryFlush(c, tag)
	if err == nil {
		v.m.flushes.Add(1)
	}
	return err
}

// timed is a Completer that notes when its one request ends.
type timed struct {
	blockio.Completer
	m     *meter
	start time.Time
	times uint32
}

// Done implements blockio.Completer.
func (t *timed) Done(tag uint64, err error) {
	took(&t.m.writeTime, t.start, t.times)
	t.Completer.Done(tag, err)
}

// Failure says why an open volume is not served, "" if it is.
func (s *Volumes) Failure(id uuid.UUID) string {
	i, ok := s.Info(id)
	if !ok {
		return ""
	}
	return i.Failure
}
