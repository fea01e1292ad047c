package properties

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func newCache(t *testing.T, shared Store, props ...Property) *Cache {
	t.Helper()
	c, err := New(props, shared, nil)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// A fresh value is not asked for again, an old one is, and those who ask together ask once.
func TestFreshAndTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int32
		c := newCache(t, nil, Property{Name: "stats", TTL: 10 * time.Second, Fetch: func(ctx context.Context, object string) (json.RawMessage, error) {
			time.Sleep(time.Second)
			return fmt.Appendf(nil, `{"n":%d}`, asked.Add(1)), nil
		}})
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				if v := c.Get(t.Context(), "a", "stats"); !v.Known || v.Stale || string(v.JSON) != `{"n":1}` {
					t.Errorf("%+v", v)
				}
			})
		}
		wg.Wait()
		time.Sleep(9 * time.Second)
		if v := c.Get(t.Context(), "a", "stats"); string(v.JSON) != `{"n":1}` || v.Age(time.Now()) != 9*time.Second {
			t.Errorf("%+v", v)
		}
		time.Sleep(time.Second)
		if v := c.Get(t.Context(), "a", "stats"); string(v.JSON) != `{"n":2}` {
			t.Errorf("%+v", v)
		}
		c.Forget(t.Context(), "a", "stats")
		if v := c.Get(t.Context(), "a", "stats"); string(v.JSON) != `{"n":3}` {
			t.Errorf("%+v", v)
		}
		if err := c.Push(t.Context(), "a", "stats", json.RawMessage(`{"n":100}`)); err != nil {
			t.Fatal(err)
		}
		if v := c.Get(t.Context(), "a", "stats"); string(v.JSON) != `{"n":100}` {
			t.Errorf("%+v", v)
		}
		if v := c.Get(t.Context(), "a", "colour"); v.Known || v.Err == "" {
			t.Errorf("a property that is not there: %+v", v)
		}
	})
}

// An owner that is away: the last known value with its age and the reason, never a zero, never many timeouts.
func TestOwnerAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var away atomic.Bool
		var asked atomic.Int32
		c := newCache(t, nil, Property{Name: "stats", TTL: 10 * time.Second, Owner: func(string) string { return "node-1" },
			Fetch: func(ctx context.Context, object string) (json.RawMessage, error) {
				asked.Add(1)
				if away.Load() {
					<-ctx.Done()
					return nil, ctx.Err()
				}
				return json.RawMessage(`{"used":7}`), nil
			}})
		objects := make([]string, 10_000)
		for i := range objects {
			objects[i] = fmt.Sprint("volume ", i)
		}
		for _, v := range c.GetAll(t.Context(), objects[:9_000], "stats") {
			if !v.Known {
				t.Fatal(v)
			}
		}
		away.Store(true)
		asked.Store(0)
		time.Sleep(time.Minute)
		began := time.Now()
		values := c.GetAll(t.Context(), objects, "stats")
		if took := time.Since(began); took > 3*time.Second {
			t.Errorf("ten thousand objects of an owner that is away took %s", took)
		}
		if n := asked.Load(); n > parallelMax {
			t.Errorf("it was asked %d times", n)
		}
		for i, v := range values {
			if known := i < 9_000; v.Known != known || v.Err == "" || known && (!v.Stale || string(v.JSON) != `{"used":7}` || v.Age(time.Now()) < time.Minute) {
				t.Fatalf("object %d: %+v", i, v)
			}
		}
		away.Store(false)
		time.Sleep(RetryAfter)
		if v := c.Get(t.Context(), objects[9_999], "stats"); !v.Known || v.Stale || v.Err != "" {
			t.Errorf("it is back: %+v", v)
		}
	})
}

// All objects of an owner come by one question, again and again while somebody looks. When the owner falls silent, who looks waits for nobody
// and is told how old it is; when it is back, so are its values.
func TestKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var silent atomic.Bool
		var asked, n atomic.Int32
		shared := NewMemory()
		c := newCache(t, shared, Property{Name: "volume", TTL: 2 * time.Second, Owner: func(object string) string { return object[:1] },
			All: func(ctx context.Context, owner string) (map[string]json.RawMessage, error) {
				if owner == "b" || silent.Load() {
					<-ctx.Done() // what a node that lost its power does
					return nil, ctx.Err()
				}
				asked.Add(1)
				out := make(map[string]json.RawMessage)
				for i := range 2_000 {
					out[fmt.Sprint("a", i)] = fmt.Appendf(nil, `{"n":%d}`, n.Load())
				}
				if n.Load() > 0 {
					delete(out, "a7")
				}
				return out, nil
			}})
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { _ = c.Run(ctx) })
		look := func(what string, atMost time.Duration, right func(v Value) bool) {
			t.Helper()
			began := time.Now()
			for i := range 2_000 {
				if v := c.Get(t.Context(), fmt.Sprint("a", i), "volume"); !right(v) && i != 7 {
					t.Fatalf("%s: %d: %+v", what, i, v)
				}
			}
			if took := time.Since(began); took > atMost {
				t.Errorf("%s: a list took %s", what, took)
			}
		}
		look("first", 0, func(v Value) bool { return v.Known && !v.Stale })
		n.Store(1)
		time.Sleep(3 * time.Second)
		look("later", 0, func(v Value) bool { return v.Known && !v.Stale && string(v.JSON) == `{"n":1}` })
		if asks := asked.Load(); asks > 4 {
			t.Errorf("asked %d times in 3 s", asks)
		}
		if v := c.Get(t.Context(), "a7", "volume"); v.Known {
			t.Errorf("what the owner has no more: %+v", v)
		}
		silent.Store(true)
		time.Sleep(30 * time.Second)
		look("silent", 0, func(v Value) bool {
			return v.Stale && string(v.JSON) == `{"n":1}` && v.Age(time.Now()) > 20*time.Second && v.Err != ""
		})
		began := time.Now()
		if v := c.Get(t.Context(), "b1", "volume"); v.Known || v.Err == "" || time.Since(began) > timeoutDefault {
			t.Errorf("an owner that never answered: %+v after %s", v, time.Since(began))
		}
		began = time.Now()
		if v := c.Get(t.Context(), "b2", "volume"); v.Known || v.Err == "" || time.Since(began) > 0 {
			t.Errorf("again: %+v after %s", v, time.Since(began))
		}
		silent.Store(false)
		n.Store(2)
		time.Sleep(5 * time.Second)
		look("back", 0, func(v Value) bool { return !v.Stale && string(v.JSON) == `{"n":2}` })
		before := asked.Load()
		time.Sleep(10 * time.Minute)
		if asks := asked.Load() - before; asks > int32(wantedFor/time.Second) {
			t.Errorf("asked %d times while nobody looked", asks)
		}
		// Another node that has the shared store knows what this one heard.
		other := newCache(t, shared, Property{Name: "volume", TTL: 2 * time.Second, Owner: func(object string) string { return object[:1] },
			All: func(context.Context, string) (map[string]json.RawMessage, error) {
				return nil, errors.New("no way there")
			}})
		wg.Go(func() { _ = other.Run(ctx) })
		if v := other.Get(t.Context(), "a5", "volume"); !v.Known || !v.Stale || string(v.JSON) != `{"n":2}` {
			t.Errorf("by the shared store: %+v", v)
		}
		cancel()
		wg.Wait()
	})
}

// Where Run runs, an owner that is away costs one timeout: whoever asks later gets the last known value at once, until Run has found it back.
func TestTriedInBackground(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var away atomic.Bool
		c := newCache(t, nil, Property{Name: "disks", TTL: 5 * time.Second, Owner: func(o string) string { return o },
			Fetch: func(ctx context.Context, _ string) (json.RawMessage, error) {
				if away.Load() {
					<-ctx.Done()
					return nil, ctx.Err()
				}
				return json.RawMessage(`1`), nil
			}})
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { _ = c.Run(ctx) })
		c.Get(t.Context(), "n", "disks")
		away.Store(true)
		time.Sleep(10 * time.Second)
		c.Get(t.Context(), "n", "disks")
		for range 20 {
			time.Sleep(time.Second)
			began := time.Now()
			if v := c.Get(t.Context(), "n", "disks"); !v.Stale || time.Since(began) > 0 {
				t.Fatalf("%+v after %s", v, time.Since(began))
			}
		}
		away.Store(false)
		time.Sleep(RetryAfter)
		c.Get(t.Context(), "n", "disks") // has it tried
		time.Sleep(RetryAfter)
		if v := c.Get(t.Context(), "n", "disks"); v.Stale || !v.Known {
			t.Errorf("it is back: %+v", v)
		}
		cancel()
		wg.Wait()
	})
}

// A caller that gives up is not the owner's silence: who waited with it asks for itself.
func TestCallerGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCache(t, nil, Property{Name: "p", TTL: time.Second, Fetch: func(ctx context.Context, _ string) (json.RawMessage, error) {
			select {
			case <-ctx.Done():
				return nil, ctx.Err()
			case <-time.After(time.Second):
				return json.RawMessage(`1`), nil
			}
		}})
		first, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { c.Get(first, "a", "p") })
		synctest.Wait()
		wg.Go(func() {
			if v := c.Get(t.Context(), "a", "p"); !v.Known {
				t.Errorf("%+v", v)
			}
		})
		synctest.Wait()
		cancel()
		wg.Wait()
	})
}

// Answers that are no JSON or without end are not kept, and one object's failure is not its owner's.
func TestBadAnswers(t *testing.T) {
	c := newCache(t, nil, Property{Name: "p", TTL: time.Minute, Owner: func(string) string { return "n" },
		Fetch: func(_ context.Context, object string) (json.RawMessage, error) {
			switch object {
			case "no json":
				return json.RawMessage(`{`), nil
			case "long":
				return json.RawMessage(`"` + strings.Repeat("x", ValueBytesMax) + `"`), nil
			case "broken":
				return nil, errors.New("no such volume")
			}
			return json.RawMessage(`1`), nil
		}})
	for _, o := range []string{"no json", "long", "broken"} {
		if v := c.Get(t.Context(), o, "p"); v.Known || v.Err == "" {
			t.Errorf("%s: %+v", o, v)
		}
	}
	if v := c.Get(t.Context(), "good", "p"); !v.Known {
		t.Errorf("%+v", v)
	}
	if err := c.Push(t.Context(), "a", "p", json.RawMessage(`{`)); err == nil {
		t.Error("pushed what is no JSON")
	}
}

func TestMemoryIsBounded(t *testing.T) {
	m := NewMemory()
	e := Entry{At: time.Unix(1, 0), JSON: json.RawMessage(`"` + strings.Repeat("x", 32<<10) + `"`)}
	for i := range 4000 {
		e.At = e.At.Add(time.Second)
		if err := m.Set(t.Context(), fmt.Sprint(i), e); err != nil {
			t.Fatal(err)
		}
	}
	if m.bytes > memoryBytesMax || len(m.m) > memoryBytesMax/(32<<10) {
		t.Errorf("%d bytes, %d entries", m.bytes, len(m.m))
	}
	for key := range m.m {
		_ = m.Delete(t.Context(), key)
	}
	if m.bytes != 0 {
		t.Errorf("%d bytes in nothing", m.bytes)
	}
}

// memcached, when it is there, shares what two nodes know; when it goes away, each goes on with what it knows itself.
func TestMemcached(t *testing.T) {
	path, err := exec.LookPath("memcached")
	if err != nil {
		t.Skip("SKIPPED: memcached is not installed")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	_, port, _ := net.SplitHostPort(addr)
	cmd := exec.Command(path, "-l", "127.0.0.1", "-p", port, "-U", "0", "-u", "nobody", "-m", "16")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := false
	stop := func() {
		if !ended {
			ended = true
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	}
	defer stop()
	var asked atomic.Int32
	node := func(cluster string) (*Cache, *Memcached) {
		s, err := NewMemcached(cluster, addr)
		if err != nil {
			t.Fatal(err)
		}
		return newCache(t, s, Property{Name: "p", TTL: time.Hour, Fetch: func(context.Context, string) (json.RawMessage, error) {
			return fmt.Appendf(nil, "%d", asked.Add(1)), nil
		}}), s
	}
	a, storeA := node("one")
	b, storeB := node("one")
	other, storeOther := node("two")
	defer func() { storeA.Close(); storeB.Close(); storeOther.Close() }()
	up := false
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end) && !up; time.Sleep(20 * time.Millisecond) {
		_, _, err := storeA.Get(t.Context(), "probe")
		up = err == nil
	}
	if !up {
		t.Fatal("memcached does not answer")
	}
	const object = "a vDisk with a näme / of its own\n"
	if v := a.Get(t.Context(), object, "p"); string(v.JSON) != "1" {
		t.Fatalf("%+v", v)
	}
	if v := b.Get(t.Context(), object, "p"); string(v.JSON) != "1" || asked.Load() != 1 {
		t.Errorf("the second node asked again: %+v", v)
	}
	if v := other.Get(t.Context(), object, "p"); string(v.JSON) != "2" {
		t.Errorf("another cluster's value: %+v", v)
	}
	stop()
	if v := a.Get(t.Context(), object, "p"); !v.Known || v.Stale || string(v.JSON) != "1" {
		t.Errorf("without memcached: %+v", v)
	}
	if v := b.Get(t.Context(), "new", "p"); !v.Known || v.Stale {
		t.Errorf("without memcached: %+v", v)
	}
}
