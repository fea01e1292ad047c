package writelog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver/blockio"
	"varve/volumedriver/seal"
	"varve/volumedriver/vfs"
)

var volumeA, volumeB = uuid.UUID{1}, uuid.UUID{2}

var testContext = context.Background()

func testConfig(fs vfs.FS) Config {
	return Config{FS: fs, Dir: "data/log", SegmentBytes: 32 * blockSize, Segments: 5, BootID: "boot-1", NoPrewrite: true}
}

// payloadOf makes the payload that the record with that sequence number has in tests.
func payloadOf(r *Record) []byte {
	if r.Kind != Data {
		return nil
	}
	p := make([]byte, r.Blocks*blockSize)
	for b := 0; b < len(p); b += blockSize {
		at := (r.Seq*31 + uint64(b>>12)*7) % blockSize
		copy(p[b:b+blockSize], noise[at:])
		copy(p[b:], r.Volume[:])
		le.PutUint64(p[b+16:], r.Seq)
		le.PutUint64(p[b+24:], r.LBA+uint64(b>>12))
	}
	return p
}

var noise = func() []byte {
	p := make([]byte, 2*blockSize)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
	return p
}()

// testKeys are the keys that records are encrypted with, by their number; 0 is none.
var testKeys = func() (keys [3]*seal.Key) {
	for i := 1; i < len(keys); i++ {
		var err error
		if keys[i], err = seal.NewKey(); err != nil {
			panic(err)
		}
	}
	return keys
}()

// model knows what was appended, in order, and what the log owes.
type model struct {
	mu       sync.Mutex
	issued   []Record
	written  int // how many of issued were told to the sink
	durable  int // how many a sync has vouched for
	released int // how many were released
	logged   []Logged
	failed   int
	bad      error
}

func (m *model) Logged(g *Logged) {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := *g
	c.CRC = bytes32(g.CRC)
	m.logged = append(m.logged, c)
	if m.bad == nil {
		m.bad = sameRecord(&m.issued[m.written], g)
	}
	m.written++
}

func bytes32(c []uint32) []uint32 { return append([]uint32(nil), c...) }

func (m *model) LogFailed(uint64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.failed++
}

func sameRecord(want *Record, got *Logged) error {
	r := got.Record
	r.Time, r.SealKey = 0, nil
	w := *want
	w.SealKey = nil
	if r != w {
		return fmt.Errorf("record %+v, want %+v", r, w)
	}
	p := payloadOf(want)
	if len(p)/blockSize != len(got.CRC) {
		return fmt.Errorf("record %+v has %d checksums", r, len(got.CRC))
	}
	for i, c := range got.CRC {
		if (crc32.Checksum(p[i*blockSize:(i+1)*blockSize], castagnoli) == c) != (r.Key == 0) {
			return fmt.Errorf("record %+v: checksum of block %d", r, i)
		}
	}
	return nil
}

// snapshot copies the counters; issued is only ever appended to.
func (m *model) snapshot() model {
	m.mu.Lock()
	defer m.mu.Unlock()
	return model{issued: m.issued[:len(m.issued):len(m.issued)], written: m.written, durable: m.durable, released: m.released}
}

// check that what was replayed is issued[k:n] with k no later than the first record needed, and n after the last one durable.
func (m *model) check(replayed []Logged, least int) error {
	if len(replayed) == 0 {
		if least > m.released {
			return fmt.Errorf("nothing replayed, want records up to %d", least)
		}
		return nil
	}
	k := int(replayed[0].Seq) - 1 // the model counts one sequence over all volumes
	if k > m.released {
		return fmt.Errorf("replay begins with record %d, but only %d were released", k+1, m.released)
	}
	if k+len(replayed) < least {
		return fmt.Errorf("replay ends with record %d, want at least up to %d", k+len(replayed), least)
	}
	if k+len(replayed) > len(m.issued) {
		return fmt.Errorf("replay of %d records from %d, only %d were appended", len(replayed), k+1, len(m.issued))
	}
	for i := range replayed {
		if err := sameRecord(&m.issued[k+i], &replayed[i]); err != nil {
			return fmt.Errorf("record %d of the replay: %w", i, err)
		}
	}
	return nil
}

// recover opens the log, checks the replay and the payloads, and gives the open log and how many records there are.
func (m *model) recover(cfg Config, least int) (*Log, []Logged, error) {
	var replayed []Logged
	l, err := Open(cfg, func(g *Logged, blocks int) error {
		c := *g
		c.CRC = bytes32(g.CRC)
		if blocks != len(c.CRC) {
			return fmt.Errorf("%d blocks, %d checksums", blocks, len(c.CRC))
		}
		replayed = append(replayed, c)
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	err = m.check(replayed, least)
	for i := range replayed {
		if err != nil {
			break
		}
		err = readBack(l, &replayed[i])
	}
	if err != nil {
		return nil, nil, errors.Join(err, l.Close())
	}
	return l, replayed, nil
}

// readBack reads the payload of a record block by block.
func readBack(l *Log, g *Logged) error {
	want := payloadOf(&g.Record)
	got := make([]byte, blockSize)
	for i := range len(want) / blockSize {
		if err := l.ReadAt(got, g.Loc.Add(uint32(i))); err != nil {
			return fmt.Errorf("record %d: %w", g.Seq, err)
		}
		crc := []uint32{g.CRC[i]}
		if crc32.Checksum(got, castagnoli) != crc[0] {
			return fmt.Errorf("record %d block %d: checksum of what lies in the log", g.Seq, i)
		}
		if g.Key != 0 {
			if bytes.Contains(want, got[:64]) || bytes.Contains(want, got[blockSize-64:]) {
				return fmt.Errorf("record %d block %d: in clear", g.Seq, i)
			}
			if err := l.Unseal(got, crc, g.Loc.Add(uint32(i)), testKeys[g.Key]); err != nil {
				return fmt.Errorf("record %d: %w", g.Seq, err)
			}
		}
		if crc32.Checksum(got, castagnoli) != crc[0] {
			return fmt.Errorf("record %d block %d: checksum of the plaintext", g.Seq, i)
		}
		if !bytes.Equal(got, want[i*blockSize:(i+1)*blockSize]) {
			return fmt.Errorf("record %d block %d: wrong bytes", g.Seq, i)
		}
	}
	return nil
}

// next makes up the next record.
func (m *model) next(rng *rand.Rand, maxBlocks int) Record {
	r := Record{Volume: volumeA, Seq: uint64(len(m.issued) + 1), LBA: rng.Uint64N(1 << 20), Flags: uint8(rng.Uint32())}
	if rng.IntN(3) == 0 {
		r.Volume = volumeB
	}
	switch rng.IntN(10) {
	case 0:
		r.Kind, r.Blocks = Zero, rng.Uint64N(1<<20)+1
	case 1:
		r.Kind, r.Value = Size, rng.Uint64()
	default:
		r.Kind, r.Blocks = Data, rng.Uint64N(uint64(maxBlocks))+1
		r.Key = uint16(rng.IntN(len(testKeys)))
		r.SealKey = testKeys[r.Key]
	}
	return r
}

// append adds the next record. It reports false if the log is full.
func (m *model) append(l *Log, rng *rand.Rand, maxBlocks int) (bool, error) {
	m.mu.Lock()
	r := m.next(rng, maxBlocks)
	m.issued = append(m.issued, r)
	m.mu.Unlock()
	err := l.Append(r, payloadOf(&r), m, false, nil, 0)
	if err == nil {
		return true, nil
	}
	m.mu.Lock()
	m.issued = m.issued[:len(m.issued)-1]
	m.mu.Unlock()
	if errors.Is(err, blockio.ErrBusy) {
		return false, nil
	}
	return false, err
}

// sync makes all written records durable.
func (m *model) sync(l *Log) error {
	m.mu.Lock()
	n := m.written
	m.mu.Unlock()
	if err := l.SyncInline(l.Written()); err != nil {
		return err
	}
	m.mu.Lock()
	m.durable = max(m.durable, n)
	m.mu.Unlock()
	return nil
}

// release gives up the oldest records, up to n of them.
func (m *model) release(l *Log, n int) {
	m.mu.Lock()
	m.released = max(m.released, n)
	m.mu.Unlock()
	l.Release(volumeA, uint64(n))
	l.Release(volumeB, uint64(n))
}

func mustOpen(t testing.TB, cfg Config) *Log {
	t.Helper()
	l, err := Open(cfg, func(*Logged, int) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func closeLog(t testing.TB, l *Log) {
	t.Helper()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

// ends counts ends of requests.
type ends struct {
	mu      sync.Mutex
	done    map[uint64]error
	settled int
	changed chan struct{}
}

func newEnds() *ends { return &ends{done: map[uint64]error{}, changed: make(chan struct{}, 1)} }

func (e *ends) Done(tag uint64, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if _, twice := e.done[tag]; twice {
		panic(fmt.Sprintf("request %d ended twice", tag))
	}
	e.done[tag] = err
}

func (e *ends) Settle(bool) {
	e.mu.Lock()
	e.settled++
	e.mu.Unlock()
	select {
	case e.changed <- struct{}{}:
	default:
	}
}

func (e *ends) get(tag uint64) (error, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	err, ok := e.done[tag]
	return err, ok
}

func (e *ends) wait(t testing.TB, tag uint64) error {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		if err, ok := e.get(tag); ok {
			return err
		}
		select {
		case <-e.changed:
		case <-deadline:
			t.Fatalf("request %d never ended", tag)
		}
	}
}

func TestAppendReadReopen(t *testing.T) {
	mem := vfs.NewMem(1)
	cfg := testConfig(mem)
	m := &model{}
	rng := rand.New(rand.NewPCG(1, 1))
	l, _, err := m.recover(cfg, 0)
	if err != nil {
		t.Fatal(err)
	}
	for m.written < 20 {
		ok, err := m.append(l, rng, 2)
		if err != nil {
			t.Fatal(err)
		}
		if !ok { // the next slot is still being made
			if err := l.WaitSpace(testContext); err != nil {
				t.Fatal(err)
			}
		}
		l.Kick()
	}
	if m.bad != nil || m.written != 20 || l.Written() != 20 || l.OpenBatch() != 21 {
		t.Fatal(m.bad, m.written, l.Written(), l.OpenBatch())
	}
	for i := range m.logged {
		if err := readBack(l, &m.logged[i]); err != nil {
			t.Fatal(err)
		}
		if g := &m.logged[i]; g.Batch != uint64(i+1) || g.Time == 0 {
			t.Fatalf("%+v", g)
		}
	}
	if err := l.Sync(context.Background(), l.Written()); err != nil || l.Durable() != 20 {
		t.Fatal(err, l.Durable())
	}
	verifier := l.Verifier()
	closeLog(t, l)
	for range 3 {
		var replayed []Logged
		if l, replayed, err = m.recover(cfg, 20); err != nil {
			t.Fatal(err)
		}
		if len(replayed) != 20 || l.Written() != 20 || l.Durable() != 20 || l.Verifier() != verifier {
			t.Fatal(len(replayed), l.Written(), l.Durable())
		}
		closeLog(t, l)
	}
}
