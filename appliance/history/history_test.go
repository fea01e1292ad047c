package history

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// clock is a time that the test moves.
type clock struct{ at int64 }

func (c *clock) now() time.Time { return time.Unix(c.at, 0) }

func open(t testing.TB, dir string, c *clock) *Store {
	t.Helper()
	s, err := Open(Config{Dir: dir, Collect: func() map[Object]*Sample { return nil }, Now: c.now})
	must(t, err)
	return s
}

var disk, quiet = Object{VDisk, uuid.MustParse("11111111-1111-4111-8111-111111111111")}, Object{VDisk, uuid.MustParse("22222222-2222-4222-8222-222222222222")}

// busy is a step with n writes of 4 KiB that took 1 ms, and of them the hundredth part 100 ms.
func busy(n uint64) *Sample {
	s := &Sample{Writes: n, BytesWrite: n * 4096, Gauges: map[Gauge]float64{Used: float64(n)}}
	s.WriteTime[Bucket(time.Millisecond)] = uint32(n - n/50)
	s.WriteTime[Bucket(100*time.Millisecond)] = uint32(n / 50)
	return s
}

func TestBucketsCoverTime(t *testing.T) {
	for d := 4 * time.Microsecond; d < 16*time.Second; d += d/50 + 1 {
		b := Bucket(d)
		if m := middle(b); m < d.Seconds()*0.75 || m > d.Seconds()*1.3 {
			t.Fatalf("%s is in bucket %d, whose middle is %g s", d, b, m)
		}
		if Bucket(d+d/50+1) < b {
			t.Fatalf("buckets go back at %s", d)
		}
	}
	if Bucket(0) != 0 || Bucket(time.Hour) != Buckets-1 {
		t.Fatal(Bucket(0), Bucket(time.Hour))
	}
}

// A day and more of steps: each tier tells the same totals, the coarser ones true percentiles, idle objects their gauges, and what is before
// the first step or after the last is unknown.
func TestTiersAgree(t *testing.T) {
	const begin = 1_800_000_000 / 900 * 900
	c := &clock{begin}
	s := open(t, t.TempDir(), c)
	const steps = 26 * 360
	for i := range int64(steps) {
		c.at = begin + (i+1)*10
		step := map[Object]*Sample{disk: busy(100), quiet: {Gauges: map[Gauge]float64{Used: 7}}}
		must(t, s.Add(c.at, step))
	}
	check := func(back time.Duration, points int, wantStep int64) {
		t.Helper()
		got, err := s.Query(disk, c.now().Add(-back), c.now(), points)
		must(t, err)
		if got.Step != wantStep {
			t.Fatalf("%s in %d points has steps of %d s, want %d", back, points, got.Step, wantStep)
		}
		for i, sample := range got.Steps {
			if from := got.From + int64(i)*got.Step; from < c.at-int64(back.Seconds()) {
				continue // the first step is a whole one
			}
			if sample == nil || got.Known[i] != got.Step {
				t.Fatalf("%s: step %d of %d: %v, known for %d of %d s", back, i, len(got.Steps), sample, got.Known[i], got.Step)
			}
			rate, p50, p99 := float64(sample.Writes)/float64(got.Step), sample.WriteTime.Quantile(0.5), sample.WriteTime.Quantile(0.99)
			if rate != 10 || p50 < 0.0008 || p50 > 0.0013 || p99 < 0.08 || p99 > 0.13 || sample.Gauges[Used] != 100 {
				t.Fatalf("%s: step %d: %g writes/s, p50 %g, p99 %g, used %g", back, i, rate, p50, p99, sample.Gauges[Used])
			}
		}
		idle, err := s.Query(quiet, c.now().Add(-back), c.now(), points)
		must(t, err)
		for i, sample := range idle.Steps {
			if idle.Known[i] > 0 && (sample == nil || sample.Gauges[Used] != 7 || sample.Writes != 0) {
				t.Fatalf("%s: step %d of the idle one: %v", back, i, sample)
			}
		}
	}
	check(time.Hour, 400, 10)
	check(20*time.Minute, 60, 20)
	check(24*time.Hour, 400, 240)
	check(25*time.Hour, 2000, 60)
	before, err := s.Query(disk, time.Unix(begin-7200, 0), time.Unix(begin-3600, 0), 10)
	must(t, err)
	if i := slices.IndexFunc(before.Steps, func(s *Sample) bool { return s != nil }); i >= 0 {
		t.Fatal("something is known of the time before the first step", i)
	}
	none, err := s.Query(Object{VDisk, uuid.New()}, c.now().Add(-time.Hour), c.now(), 10)
	must(t, err)
	for i, sample := range none.Steps {
		if sample != nil {
			t.Fatal("something is known of an object that there is not", i)
		}
	}
}

// A restart in the middle of a quarter of an hour loses nothing of the coarser tiers, and the gap is a gap.
func TestRestart(t *testing.T) {
	const begin = 1_800_000_000 / 900 * 900
	dir := t.TempDir()
	c := &clock{begin}
	s := open(t, dir, c)
	for i := range int64(180) {
		if i == 60 {
			must(t, s.close())
			s = open(t, dir, c)
		}
		c.at = begin + (i+1)*10
		if i >= 120 && i < 132 { // two minutes away
			continue
		}
		must(t, s.Add(c.at, map[Object]*Sample{disk: busy(100)}))
	}
	got, err := s.Query(disk, time.Unix(begin, 0), time.Unix(begin+1800, 0), 400)
	must(t, err)
	for i, sample := range got.Steps {
		if away := i >= 120 && i < 132; away != (got.Known[i] == 0) || away != (sample == nil) {
			t.Fatalf("step %d: known for %d s: %v", i, got.Known[i], sample)
		}
	}
	coarse := uint64(0)
	must(t, s.read(tiers[2], begin, begin+1800, func(_ int64, o Object, sample *Sample) {
		if o == disk {
			coarse += sample.Writes
		}
	}, nil))
	if coarse != 168*100 {
		t.Fatalf("quarters of an hour have %d writes, want %d", coarse, 168*100)
	}
}

// What is cut anywhere, or damaged anywhere, is read up to there; the next run appends behind it.
func TestTornFile(t *testing.T) {
	const begin = 1_800_000_000 / 900 * 900
	dir := t.TempDir()
	c := &clock{begin}
	s := open(t, dir, c)
	for i := range int64(6) {
		c.at = begin + (i+1)*10
		must(t, s.Add(c.at, map[Object]*Sample{disk: busy(100)}))
	}
	must(t, s.close())
	files, err := list(dir, tiers[0])
	must(t, err)
	whole, err := os.ReadFile(files[0].path)
	must(t, err)
	count := func() (n int) {
		must(t, decodeFile(files[0].path, func(int64, func(func(Object, *Sample)) bool) bool { n++; return true }))
		return n
	}
	for cutAt := range len(whole) {
		must(t, os.WriteFile(files[0].path, whole[:cutAt], 0o600))
		n := count()
		must(t, cut(files[0].path))
		if info, err := os.Stat(files[0].path); err != nil || info.Size() > int64(cutAt) || count() != n {
			t.Fatal("cut at", cutAt, err)
		}
		damaged := slices.Clone(whole)
		damaged[cutAt] ^= 0x41
		must(t, os.WriteFile(files[0].path, damaged, 0o600))
		if n := count(); n > 5 {
			t.Fatalf("damage at %d of %d is not noticed", cutAt, len(whole))
		}
	}
}

// Whatever happens, the whole stays within its bytes and days.
func TestBounded(t *testing.T) {
	defer func(was []tier) { tiers = was }(tiers)
	tiers = []tier{{"10s", 10, 3600, 600, 64 << 10}, {"1m", 60, 2 * 3600, 1200, 32 << 10}, {"15m", 900, 24 * 3600, 7200, 32 << 10}}
	const begin = 1_800_000_000 / 900 * 900
	dir := t.TempDir()
	c := &clock{begin}
	s := open(t, dir, c)
	r := rand.New(rand.NewPCG(1, 2))
	ids := make([]uuid.UUID, 64)
	for i := range ids {
		ids[i] = uuid.New()
	}
	most := int64(0)
	for i := range int64(3000) {
		c.at = begin + (i+1)*10
		step := make(map[Object]*Sample)
		for _, id := range ids[:r.IntN(len(ids))] {
			step[Object{VDisk, id}] = busy(uint64(50 + r.IntN(1000)))
		}
		must(t, s.Add(c.at, step))
		if i%50 != 0 {
			continue
		}
		total := int64(0)
		for _, tr := range tiers {
			files, err := list(dir, tr)
			must(t, err)
			for _, f := range files {
				total += f.size
				if c.at-f.start > tr.keep+2*tr.file {
					t.Fatalf("%s is of %d s ago", f.path, c.at-f.start)
				}
			}
		}
		most = max(most, total)
	}
	if most > 160<<10 {
		t.Fatalf("the history took %d bytes, more than its %d", most, 128<<10)
	}
	fmt.Printf("» history: 8 h of 64 vDisks under a limit of 128 KiB took %d KiB at most\n", most>>10)
}

// A directory with other things in it, and a disk without room, are no end of the appliance.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "10s-x.hist"), nil, 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "10s-5.hist"), []byte("short"), 0o600))
	c := &clock{1_800_000_000}
	s := open(t, dir, c)
	must(t, os.Chmod(dir, 0o500))
	t.Cleanup(func() { _ = os.Chmod(dir, 0o700) })
	must(t, os.RemoveAll(dir))
	if err := s.Add(c.at, map[Object]*Sample{disk: busy(1)}); err == nil {
		t.Fatal("a step was kept nowhere")
	}
	must(t, os.MkdirAll(dir, 0o700))
	must(t, s.Add(c.at+10, map[Object]*Sample{disk: busy(1)}))
}

// FuzzDecode: any bytes are entries or are not, and what encode made is what it was made of.
func FuzzDecode(f *testing.F) {
	step := map[Object]*Sample{disk: busy(100), quiet: {Gauges: map[Gauge]float64{Used: math.Inf(1)}}}
	f.Add(encode(1, []Object{disk, quiet}, step)[headBytes:])
	f.Add(binary.AppendUvarint(make([]byte, 17), math.MaxUint64))
	f.Fuzz(func(t *testing.T, b []byte) {
		decode(b, func(_ Object, s *Sample) {
			if q := s.ReadTime.Quantile(0.99); !math.IsNaN(q) && (q <= 0 || q > 40) {
				t.Fatal(q)
			}
		})
	})
}

func TestEncodeDecode(t *testing.T) {
	step := map[Object]*Sample{disk: busy(100), quiet: {Reads: 3, BytesRead: 1 << 40, Gauges: map[Gauge]float64{}}}
	step[quiet].ReadTime[Buckets-1] = math.MaxUint32
	body, end, ok := frameAt(encode(77, []Object{disk, quiet}, step))
	if !ok || end != 77 {
		t.Fatal(end, ok)
	}
	seen := 0
	if !decode(body, func(o Object, s *Sample) {
		seen++
		want := step[o]
		if s.Reads != want.Reads || s.BytesRead != want.BytesRead || s.ReadTime != want.ReadTime || s.WriteTime != want.WriteTime || s.Gauges[Used] != want.Gauges[Used] {
			t.Fatal(o, s)
		}
	}) || seen != 2 {
		t.Fatal(seen)
	}
}
