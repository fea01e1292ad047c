package s3

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/minio/minio-go/v7"

	"varve/volumedriver/backend"
)

// Verdict is what a probe found out about a store.
type Verdict struct {
	Findings map[string]string // what was tried -> what came of it, for people
	Unsafe   []string          // what the store does not do that a vPool should have; empty for a sound one
}

const (
	probeWriters = 16
	probeRounds  = 3
	probeObjects = 12
	probeBytes   = 100_000
	probeTries   = 5 // of 4 KiB, for the latencies
)

// ErrBroken: the store does not keep the contract of package backend at all.
var ErrBroken = errors.New("the store does not keep what it was given, as it was given")

// UnsafeText says what is lost with a store that ignores If-None-Match.
const UnsafeText = "ignores If-None-Match: an owner that was set back to an earlier state (restored VM snapshot, copied data " +
	"directory) would silently replace objects instead of being refused; normal service, restarts and failover never reuse a name"

// Probe tries the store with objects of its own below PREFIX/probe/, which it removes again. An error means that the store cannot be
// used: not reached, not allowed, or not keeping its promises.
func (s *Store) Probe(ctx context.Context) (Verdict, error) {
	id := make([]byte, 8)
	rand.Read(id)
	p := &probe{s: s, dir: "probe/" + hex.EncodeToString(id) + "/", v: Verdict{Findings: map[string]string{}}}
	err := p.run(ctx)
	clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
	defer cancel()
	if err == nil {
		err = p.remove(clean)
	} else if e := p.remove(clean); e != nil && kindOf(err) != refusal {
		err = errors.Join(err, e)
	}
	if err != nil {
		return Verdict{}, fmt.Errorf("probe %s/%s: %w", s.cfg.Endpoint, s.cfg.Bucket, err)
	}
	return p.v, nil
}

type probe struct {
	s     *Store
	dir   string
	v     Verdict
	names []string
}

func (p *probe) note(what, found string) { p.v.Findings[what] = found }

func (p *probe) run(ctx context.Context) error {
	for _, step := range []func(context.Context) error{p.latency, p.createOnly, p.list, p.ranges, p.absent, p.checksum, p.versions} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (p *probe) name(i int) string {
	name := fmt.Sprintf("%s%03d", p.dir, i)
	p.names = append(p.names, name)
	return name
}

func pattern(seed byte, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = seed + byte(i*7) + byte(i>>8)
	}
	return b
}

func (p *probe) read(ctx context.Context, name string) ([]byte, error) {
	o, err := p.s.Open(ctx, name)
	if err != nil {
		return nil, err
	}
	b := make([]byte, o.Size())
	return b, errors.Join(o.ReadAt(ctx, b, 0), o.Close())
}

// latency also is the first to be refused, with the operator's mistakes.
func (p *probe) latency(ctx context.Context) error {
	var puts, gets []time.Duration
	for i := range probeTries {
		name, want := p.name(900+i), pattern(byte(i), 4096)
		start := time.Now()
		if err := p.s.Put(ctx, name, want); err != nil {
			return err
		}
		puts = append(puts, time.Since(start))
		start = time.Now()
		got, err := p.read(ctx, name)
		if err != nil {
			return err
		}
		gets = append(gets, time.Since(start))
		if !bytes.Equal(got, want) {
			return fmt.Errorf("an object read back right after it was put differs: %w", ErrBroken)
		}
	}
	slices.Sort(puts)
	slices.Sort(gets)
	p.note("latency of 4 KiB", fmt.Sprintf("put %s, get %s (median of %d)", puts[len(puts)/2].Round(10*time.Microsecond),
		gets[len(gets)/2].Round(10*time.Microsecond), probeTries))
	return nil
}

// createOnly lets many race for a name, and then one more come late.
func (p *probe) createOnly(ctx context.Context) error {
	for round := range probeRounds {
		name := p.name(round)
		won := make([]bool, probeWriters)
		errs := make([]error, probeWriters)
		var wg sync.WaitGroup
		for i := range probeWriters {
			wg.Go(func() {
				err := p.s.Put(ctx, name, pattern(byte(i), 1000+i))
				won[i] = err == nil
				if !errors.Is(err, backend.ErrExist) {
					errs[i] = err
				}
			})
		}
		wg.Wait()
		winner, winners := -1, 0
		for i, w := range won {
			if w {
				winner, winners = i, winners+1
			}
		}
		late := p.s.Put(ctx, name, pattern(99, 999))
		got, err := p.read(ctx, name)
		if err != nil {
			return errors.Join(err, errors.Join(errs...))
		}
		if winners == 1 && errors.Is(late, backend.ErrExist) && errors.Join(errs...) == nil {
			if !bytes.Equal(got, pattern(byte(winner), 1000+winner)) {
				return fmt.Errorf("of %d racing puts one was acknowledged, and another's bytes are there: %w", probeWriters, ErrBroken)
			}
			continue
		}
		if winners <= 1 && late != nil {
			if err := errors.Join(append(errs, late)...); err != nil && !errors.Is(late, backend.ErrExist) {
				return fmt.Errorf("create-only put: %w", err)
			}
		}
		p.note("create-only", fmt.Sprintf("NOT SAFE: %d of %d racing writers were told that they made the object, a late one %s; the store %s",
			winners, probeWriters, outcome(late), UnsafeText))
		p.v.Unsafe = append(p.v.Unsafe, "create-only")
		return nil
	}
	p.note("create-only", fmt.Sprintf("If-None-Match is honoured: one of %d racing writers won, %d times", probeWriters, probeRounds))
	return nil
}

func outcome(err error) string {
	if err == nil {
		return "replaced it"
	}
	return "was refused"
}

// list looks for what was just put.
func (p *probe) list(ctx context.Context) error {
	var want []string
	for i := range probeObjects {
		name := p.name(100 + i)
		if err := p.s.Put(ctx, name, pattern(1, i)); err != nil {
			return err
		}
		want = append(want, name)
	}
	for from := range want {
		after := p.dir + "0zz"
		if from > 0 {
			after = want[from-1]
		}
		infos, err := p.s.List(ctx, p.dir+"1", after, 5)
		if err != nil {
			return err
		}
		for i, name := range want[from:min(from+5, len(want))] {
			if i >= len(infos) || infos[i].Name != name || infos[i].Size != int64(from+i) {
				return fmt.Errorf("a list right after the puts lacks %s or shows it with another size: %w", name, ErrBroken)
			}
		}
	}
	p.note("list after write", "complete, in order, from any start")
	return nil
}

// ranges reads parts of an object.
func (p *probe) ranges(ctx context.Context) error {
	name, want := p.name(200), pattern(3, probeBytes)
	if err := p.s.Put(ctx, name, want[:1], nil, want[1:]); err != nil {
		return err
	}
	o, err := p.s.Open(ctx, name)
	if err != nil {
		return err
	}
	if o.Size() != probeBytes {
		return fmt.Errorf("an object of %d bytes is shown with %d: %w", probeBytes, o.Size(), ErrBroken)
	}
	for _, r := range [][2]int{{0, 1}, {probeBytes - 1, 1}, {40_000, 4096}, {1, probeBytes - 2}, {0, probeBytes}} {
		b := make([]byte, r[1])
		if err := o.ReadAt(ctx, b, int64(r[0])); err != nil {
			return err
		}
		if !bytes.Equal(b, want[r[0]:r[0]+r[1]]) {
			return fmt.Errorf("bytes %d+%d of an object differ from those put: %w", r[0], r[1], ErrBroken)
		}
	}
	p.note("ranged read", "exact")
	return nil
}

// absent looks for what was just deleted.
func (p *probe) absent(ctx context.Context) error {
	name := p.name(300)
	if err := p.s.Put(ctx, name, pattern(5, 10)); err != nil {
		return err
	}
	for range 2 {
		if err := p.s.Delete(ctx, name); err != nil {
			return err
		}
	}
	_, serr := p.s.Stat(ctx, name)
	_, oerr := p.s.Open(ctx, name)
	infos, lerr := p.s.List(ctx, name, "", 1)
	for _, err := range []error{serr, oerr} {
		if err != nil && !errors.Is(err, backend.ErrNotExist) {
			return err
		}
	}
	if lerr != nil {
		return lerr
	}
	if serr == nil || oerr == nil || len(infos) > 0 {
		p.note("read after delete", "a deleted object is still shown for a while; nothing relies on that")
		return nil
	}
	p.note("read after delete", "gone at once")
	return nil
}

// checksum sends an object with a checksum that is not its own.
func (p *probe) checksum(ctx context.Context) error {
	name := p.name(400)
	key, err := p.s.key(name)
	if err != nil {
		return err
	}
	u := newUpload(key, [][]byte{pattern(6, 5000)}, p.s.secure)
	sound, wrong := u.crc, newUpload(key, [][]byte{pattern(7, 5000)}, true).crc
	u.crc = wrong
	l := p.s.lane(ctx, laneUpload)
	err = p.s.attempt(ctx, l, u.size, func(ctx context.Context) error {
		_, err := p.s.putOnce(ctx, l.core, u)
		return err
	})
	if err == nil {
		p.note("checksum of uploads", "not verified by the store: what is put is confirmed by one more request, and verified when it is read")
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	u.crc = sound
	err = p.s.attempt(ctx, l, u.size, func(ctx context.Context) error {
		echoed, err := p.s.putOnce(ctx, l.core, u)
		if err == nil && !echoed {
			p.note("checksum of uploads", "verified by the store, which does not say so in its reply")
		} else if err == nil {
			p.note("checksum of uploads", "CRC32C is verified by the store")
		}
		return err
	})
	return err
}

// versions asks whether deleted objects keep their space. Not every store or user can answer that.
func (p *probe) versions(ctx context.Context) error {
	l := p.s.lane(ctx, laneRead)
	var status string
	err := p.s.attempt(ctx, l, 0, func(ctx context.Context) error {
		c, err := l.core.GetBucketVersioning(ctx, p.s.cfg.Bucket)
		status = c.Status
		return err
	})
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		p.note("versioning", "not known: "+oneLine(err))
	case status == minio.Enabled:
		p.note("versioning", "ON: what is deleted keeps its space until a lifecycle rule removes noncurrent versions")
	default:
		p.note("versioning", "off")
	}
	return nil
}

func oneLine(err error) string {
	text := strings.Join(strings.Fields(err.Error()), " ")
	if len(text) > 120 {
		text = text[:120] + "…"
	}
	return text
}

func (p *probe) remove(ctx context.Context) error { return p.s.DeleteAll(ctx, p.names) }
