package qos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// load keeps depth requests of n bytes in flight through l until ctx ends, and counts those that passed.
func load(ctx context.Context, wg *sync.WaitGroup, l *Limiter, k Kind, depth, n int) *int64 {
	var mu sync.Mutex
	passed := new(int64)
	for range depth {
		wg.Go(func() {
			for l.Wait(ctx, k, n) == nil {
				mu.Lock()
				*passed++
				mu.Unlock()
			}
		})
	}
	return passed
}

// TestRates holds each limit for a minute of constant load and finds it used to the full and never exceeded.
func TestRates(t *testing.T) {
	const n = 8192
	for _, c := range []struct {
		limits      Limits
		read, write float64 // requests per second; 0: not limited, not tried
	}{
		{Limits{IOPS: 500}, 250, 250},
		{Limits{ReadIOPS: 500}, 500, 0},
		{Limits{WriteIOPS: 70, ReadIOPS: 7}, 7, 70},
		{Limits{Bytes: 100 * n}, 50, 50},
		{Limits{WriteBytes: 333 * n}, 0, 333},
		{Limits{ReadIOPS: 100, Bytes: 1000 * n, WriteIOPS: 10_000}, 100, 900},
		{Limits{IOPS: 3}, 1.5, 1.5},
		{Limits{Bytes: n / 4}, 0.125, 0.125}, // a request is more than a second's worth
		{Limits{ReadIOPS: 1000, Burst: 10 * time.Second}, 70_000.0 / 60, 0},
	} {
		t.Run(fmt.Sprintf("%+v", c.limits), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := NewLimiter(c.limits)
				defer l.Close()
				const length = time.Minute
				ctx, cancel := context.WithTimeout(t.Context(), length)
				defer cancel()
				var wg sync.WaitGroup
				var got [2]*int64
				for k, want := range []float64{c.read, c.write} {
					if want > 0 {
						got[k] = load(ctx, &wg, l, Kind(k), 3, n)
					}
				}
				wg.Wait()
				for k, want := range []float64{c.read, c.write} {
					if want == 0 {
						continue
					}
					have := float64(*got[k]) / length.Seconds()
					if have < want*0.98-0.05 || have > want*1.02+0.05 {
						t.Errorf("kind %d: %.2f requests per second, want %.2f", k, have, want)
					}
				}
			})
		})
	}
}

// TestBurst saves up while nothing is asked for, up to the burst, and lets that pass at once.
func TestBurst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLimiter(Limits{WriteIOPS: 100, Burst: 2 * time.Second})
		defer l.Close()
		count := func() (n int) {
			for l.Try(Write, 4096) {
				n++
			}
			return n
		}
		for i, c := range []struct {
			pause time.Duration
			want  int
		}{{time.Hour, 201}, {0, 0}, {time.Second, 100}, {9 * time.Millisecond, 0}, {time.Millisecond, 1}, {10 * time.Second, 201}} {
			time.Sleep(c.pause)
			if n := count(); n != c.want {
				t.Errorf("%d: %d requests at once after %v, want %d", i, n, c.pause, c.want)
			}
		}
		if !l.Try(Read, 1<<30) {
			t.Error("reads are not limited, but one did not pass")
		}
	})
}

// TestFairShare has 64 volumes of all kinds beside one hog at a gate of 100 MB/s: each gets its share of bytes, and together they get all.
func TestFairShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const rate = 100_000_000
		g := NewGate(Limits{WriteBytes: rate})
		defer g.Close()
		const length = 20 * time.Second
		ctx, cancel := context.WithTimeout(t.Context(), length)
		defer cancel()
		var wg sync.WaitGroup
		hog := load(ctx, &wg, NewLimiter(Limits{}, g), Write, 128, 1<<20)
		var all []*int64
		var sizes []int
		for i := range 63 {
			size := 4096 << (i % 6)
			sizes = append(sizes, size)
			all = append(all, load(ctx, &wg, NewLimiter(Limits{}, g), Write, 2+i%7, size))
		}
		wg.Wait()
		share := float64(rate) / 64 * length.Seconds()
		total, worst := float64(*hog)*(1<<20), 1e9
		for i, n := range all {
			got := float64(*n) * float64(sizes[i])
			total += got
			worst = min(worst, got/share)
		}
		hogShare := float64(*hog) * (1 << 20) / share
		t.Logf("64 volumes: together %.3f of the rate, the worst %.2f of its fair share, the hog %.2f", total/(rate*length.Seconds()), worst, hogShare)
		if worst < 0.5 || total < 0.9*rate*length.Seconds() || hogShare > 2 {
			t.Error("not shared fairly")
		}
	})
}

// TestHogDoesNotDelayOthers: a volume with one request at a time, well below its share, beside a volume with hundreds of large ones.
func TestHogDoesNotDelayOthers(t *testing.T) {
	p99 := func(hog int) time.Duration {
		var waits []time.Duration
		synctest.Test(t, func(t *testing.T) {
			g := NewGate(Limits{WriteBytes: 100_000_000})
			defer g.Close()
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			var wg sync.WaitGroup
			load(ctx, &wg, NewLimiter(Limits{}, g), Write, hog, 64<<10)
			wg.Go(func() {
				l := NewLimiter(Limits{}, g)
				for ctx.Err() == nil {
					time.Sleep(3 * time.Millisecond)
					at := time.Now()
					if l.Wait(ctx, Write, 4096) == nil {
						waits = append(waits, time.Since(at))
					}
				}
			})
			wg.Wait()
		})
		slices.Sort(waits)
		return waits[len(waits)*99/100]
	}
	few, many := p99(1), p99(256)
	t.Logf("p99 wait of a small volume at a gate that is full: %v beside one large request at a time, %v beside 256", few, many)
	if many > 2*time.Millisecond {
		t.Errorf("p99 %v beside a hog", many)
	}
}

// TestHierarchy: what the vPool allows holds for its volumes together, what a volume may holds for it alone, and others are not
// charged for what one of both refuses.
func TestHierarchy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pool := NewGate(Limits{IOPS: 1000})
		defer pool.Close()
		slow, fast := NewLimiter(Limits{IOPS: 100}, pool), NewLimiter(Limits{}, pool)
		defer slow.Close()
		defer fast.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		var wg sync.WaitGroup
		a := load(ctx, &wg, slow, Write, 20, 4096)
		b := load(ctx, &wg, fast, Read, 20, 4096)
		wg.Wait()
		if *a < 2950 || *a > 3050 || *a+*b < 29_700 || *a+*b > 30_300 {
			t.Errorf("the limited volume did %d requests, both %d", *a, *a+*b)
		}
		// The pool is dry; a try of the slow volume must not cost its own gate anything.
		time.Sleep(time.Second)
		for fast.Try(Read, 1) {
		}
		for range 1000 {
			if slow.Try(Write, 1) {
				t.Fatal("the pool had nothing left")
			}
		}
		time.Sleep(50 * time.Millisecond)
		n := 0
		for slow.Try(Write, 1) {
			n++
		}
		if n < 10 {
			t.Errorf("%d requests after refused ones, want the burst of 11", n)
		}
	})
}

// TestNobodyOvertakes: while a request waits, Try is refused, also one of the other kind that shares the rate.
func TestNobodyOvertakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLimiter(Limits{IOPS: 10, ReadBytes: 1})
		defer l.Close()
		for l.Try(Write, 1) {
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := l.Wait(t.Context(), Write, 1); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		for range 50 {
			time.Sleep(time.Millisecond)
			if l.Try(Write, 1) || l.Try(Read, 0) {
				t.Fatal("a try overtook")
			}
		}
		wg.Wait()
	})
}

// TestGivenUp: requests whose context ends leave, cost nothing, and hold up nobody.
func TestGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pool := NewGate(Limits{WriteIOPS: 10})
		defer pool.Close()
		l, other := NewLimiter(Limits{}, pool), NewLimiter(Limits{}, pool)
		for l.Try(Write, 1) {
		}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				if err := l.Wait(ctx, Write, 1); !errors.Is(err, context.Canceled) {
					t.Errorf("given up: %v", err)
				}
			})
		}
		synctest.Wait()
		cancel()
		wg.Wait()
		at := time.Now()
		if err := other.Wait(t.Context(), Write, 1); err != nil {
			t.Error(err)
		}
		if d := time.Since(at); d > 100*time.Millisecond {
			t.Errorf("the next one waited %v behind those that had left", d)
		}
		if s := pool.Stats(); s.Waiting != 0 {
			t.Errorf("%+v", s)
		}
		if err := l.Wait(ctx, Write, 1); !errors.Is(err, context.Canceled) {
			t.Errorf("a context that had ended: %v", err)
		}
	})
}

// TestLimitsChange while requests wait: higher ones let them pass sooner, none and a closed gate at once.
func TestLimitsChange(t *testing.T) {
	for name, change := range map[string]func(*Limiter){
		"higher":  func(l *Limiter) { l.SetLimits(Limits{WriteIOPS: 1000}) },
		"none":    func(l *Limiter) { l.SetLimits(Limits{}) },
		"reads":   func(l *Limiter) { l.SetLimits(Limits{ReadIOPS: 1}) },
		"closed":  func(l *Limiter) { l.Close() },
		"by rate": func(l *Limiter) { l.SetLimits(Limits{WriteBytes: 1}); l.own.SetWriteRate(1 << 30) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := NewLimiter(Limits{WriteIOPS: 1})
				defer l.Close()
				var wg sync.WaitGroup
				at := time.Now()
				for range 50 {
					wg.Go(func() {
						if err := l.Wait(t.Context(), Write, 1); err != nil {
							t.Error(err)
						}
					})
				}
				time.Sleep(1500 * time.Millisecond)
				change(l)
				wg.Wait()
				if d := time.Since(at); d > 1600*time.Millisecond {
					t.Errorf("50 requests took %v", d)
				}
			})
		})
	}
}

// TestRandom drives a tree of gates at random and holds each gate to its bound: never more than rate × time + burst + one request.
func TestRandom(t *testing.T) {
	for seed := range uint64(20) {
		synctest.Test(t, func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(seed, 1))
			poolRate := int64(1+rnd.IntN(50)) * 100_000
			pool := NewGate(Limits{Bytes: poolRate})
			defer pool.Close()
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			var wg sync.WaitGroup
			var mu sync.Mutex
			total := int64(0)
			const most = 64 << 10
			for i := range 1 + rnd.IntN(8) {
				iops := int64(rnd.IntN(300))
				l := NewLimiter(Limits{IOPS: iops}, pool)
				r := rand.New(rand.NewPCG(seed, uint64(i)))
				passed := int64(0)
				for range 1 + rnd.IntN(6) {
					wg.Go(func() {
						for ctx.Err() == nil {
							mu.Lock()
							k, n, try := Kind(r.IntN(2)), 1+r.IntN(most), r.IntN(3) == 0
							stay := time.Duration(1+r.IntN(300)) * time.Millisecond
							mu.Unlock()
							ok := try && l.Try(k, n)
							if !ok {
								short, end := context.WithTimeout(ctx, stay)
								ok = l.Wait(short, k, n) == nil
								end()
							}
							if ok {
								mu.Lock()
								total += int64(n)
								passed++
								mu.Unlock()
							}
						}
					})
				}
				defer func() {
					if bound := float64(iops)*10.1 + 1; iops > 0 && float64(passed) > bound {
						t.Errorf("seed %d: volume %d did %d requests, bound %.0f", seed, i, passed, bound)
					}
				}()
			}
			wg.Wait()
			if bound := float64(poolRate)*10.1 + most; float64(total) > bound {
				t.Errorf("seed %d: %d bytes, bound %.0f", seed, total, bound)
			}
			if s := pool.Stats(); s.Waiting != 0 {
				t.Errorf("seed %d: %+v", seed, s)
			}
		})
	}
}

func TestTryAllocatesNothing(t *testing.T) {
	pool := NewGate(Limits{})
	defer pool.Close()
	free, limited := NewLimiter(Limits{}, pool), NewLimiter(Limits{IOPS: 1 << 40}, pool)
	if n := testing.AllocsPerRun(1000, func() {
		if !free.Try(Write, 4096) || !limited.Try(Read, 4096) {
			t.Fatal("did not pass")
		}
		if free.Wait(context.Background(), Write, 1) != nil {
			t.Fatal("waited")
		}
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
	var none *Limiter
	if !none.Try(Read, 1) || none.Wait(context.Background(), Write, 1) != nil {
		t.Error("no limiter limits")
	}
	none.Refund(Read, 1)
	none.Close()
}

func BenchmarkTryWithoutLimits(b *testing.B) {
	l := NewLimiter(Limits{}, NewGate(Limits{}), NewGate(Limits{}))
	for b.Loop() {
		l.Try(Write, 4096)
	}
}

func BenchmarkTryWithLimits(b *testing.B) {
	l := NewLimiter(Limits{IOPS: 1 << 40, Bytes: 1 << 60}, NewGate(Limits{Bytes: 1 << 60}))
	for b.Loop() {
		l.Try(Write, 4096)
	}
}
