package events_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"

	"varve/control/events"
	"varve/control/state"
)

// cluster is a state with a log in memory.
type cluster struct {
	store *state.Store
	mu    sync.Mutex
	index uint64
	fail  func() (before, after bool)
}

var errNoQuorum = errors.New("no quorum")

func newCluster(t *testing.T) *cluster {
	t.Helper()
	c := &cluster{store: state.New()}
	if _, err := c.Apply(t.Context(), &state.InitCluster{ID: uuid.New(), Format: state.Format}); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *cluster) Apply(_ context.Context, cmd state.Command) (state.Result, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var before, after bool
	if c.fail != nil {
		before, after = c.fail()
	}
	if before {
		return state.Result{}, errNoQuorum
	}
	entry, err := state.Encode(cmd, uuid.New(), state.Time(time.Now().UnixNano()))
	if err != nil {
		return state.Result{}, err
	}
	c.index++
	res, err := c.store.Apply(c.index, entry)
	if after {
		return state.Result{}, errNoQuorum
	}
	return res, err
}

func (c *cluster) failing(f func() (before, after bool)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fail = f
}

// vault keeps secrets in memory.
type vault struct {
	mu sync.Mutex
	m  map[string][]byte
}

func (v *vault) Set(_ context.Context, name string, plain []byte) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.m == nil {
		v.m = make(map[string][]byte)
	}
	v.m[name] = slices.Clone(plain)
	return nil
}

func (v *vault) Get(name string) ([]byte, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if s, ok := v.m[name]; ok {
		return s, nil
	}
	return nil, state.ErrNotFound
}

func (v *vault) Delete(_ context.Context, name string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.m, name)
	return nil
}

func running(f func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = f(ctx) })
	return func() { cancel(); wg.Wait() }
}

// What is published arrives in order and once, though proposals fail before and after their effect.
func TestPublisher(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		n := 0
		c.failing(func() (bool, bool) { n++; return n%3 == 1, n%3 == 2 })
		node := uuid.New()
		p := events.NewPublisher(c, node, nil)
		stop := running(p.Run)
		const count = 1000
		for i := range count {
			if i == 500 {
				p.Emit("not a valid name", "volume", "", nil) // costs nobody else anything
			}
			p.Emit(events.VolumeResize, events.TopicVolume, fmt.Sprint(i), map[string]int{"size": i})
			if i%100 == 0 {
				time.Sleep(time.Second)
			}
		}
		time.Sleep(time.Minute)
		stop()
		got := c.store.View().Events(0, 2*count)
		if len(got) != count {
			t.Fatalf("%d events", len(got))
		}
		for i, e := range got {
			if e.Key != fmt.Sprint(i) || e.Node != node {
				t.Fatalf("event %d is %+v", i, e)
			}
		}
	})
}

// A queue that nobody empties loses events, and says how many.
func TestPublisherOverflow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		p := events.NewPublisher(c, uuid.New(), nil)
		const count = 10000
		for i := range count {
			p.Emit(events.VolumeResize, events.TopicVolume, fmt.Sprint(i), nil)
		}
		stop := running(p.Run)
		time.Sleep(time.Minute)
		stop()
		kept, lost := 0, 0
		for _, e := range c.store.View().Events(0, 2*count) {
			var data struct{ Count int }
			if e.Type == events.EventsLost {
				if err := json.Unmarshal(e.Data, &data); err != nil {
					t.Fatal(err)
				}
				lost += data.Count
			} else {
				kept++
			}
		}
		if kept+lost != count || lost == 0 {
			t.Errorf("%d kept, %d told lost of %d", kept, lost, count)
		}
	})
}

func TestSubscription(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := t.Context()
		c := newCluster(t)
		publish := func(topic, key string) {
			e, err := events.New("x", topic, key, nil)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := c.Apply(ctx, &state.PublishEvents{Events: []state.NewEvent{e}}); err != nil {
				t.Fatal(err)
			}
		}
		publish("volume", "a")
		publish("node", "b")
		sub := events.Subscribe(c.store, events.Filter{Topics: []string{"volume"}}, 0)
		got, err := sub.Next(ctx)
		if err != nil || len(got) != 1 || got[0].Key != "a" {
			t.Fatal(got, err)
		}
		woken := make(chan []state.Event)
		go func() {
			got, err := sub.Next(ctx)
			if err != nil {
				t.Error(err)
			}
			woken <- got
		}()
		synctest.Wait()
		publish("node", "c")
		publish("volume", "d")
		if got := <-woken; len(got) != 1 || got[0].Key != "d" {
			t.Fatal(got)
		}
		// Replay from where another reader stood.
		again := events.Subscribe(c.store, events.Filter{}, got[0].Seq)
		if rest, err := again.Next(ctx); err != nil || len(rest) != 3 || rest[0].Key != "b" {
			t.Fatal(rest, err)
		}
		short, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		if _, err := again.Next(short); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		// A reader that comes too late is told, and goes on.
		first := got[0].Seq
		for range state.EventsKept/state.EventsPerEntryMax + 4 {
			batch := make([]state.NewEvent, state.EventsPerEntryMax)
			for i := range batch {
				batch[i] = state.NewEvent{ID: uuid.New(), Type: "x", Topic: "volume"}
			}
			if _, err := c.Apply(ctx, &state.PublishEvents{Events: batch}); err != nil {
				t.Fatal(err)
			}
		}
		late := events.Subscribe(c.store, events.Filter{}, first)
		var missed *events.MissedError
		if _, err := late.Next(ctx); !errors.As(err, &missed) || missed.From <= first {
			t.Fatal(err)
		}
		if got, err := late.Next(ctx); err != nil || got[0].Seq <= missed.From {
			t.Fatal(err)
		}
	})
}

// A consumer makes one task of each event, whatever fails, and wherever it is stopped.
func TestConsumerMakesTasksOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		n := 0
		c.failing(func() (bool, bool) { n++; return n%5 == 0, n%5 == 3 })
		p := events.NewPublisher(c, uuid.New(), nil)
		defer running(p.Run)()
		rule := func(e state.Event) (state.TaskSpec, bool, error) {
			return state.TaskSpec{Type: "vmachine.discover", Queue: state.QueueGeneric, Object: e.Key}, e.Type == events.FileWrite, nil
		}
		consumer := &events.Consumer{Name: "vmx", Raft: c, Store: c.store, Filter: events.Filter{Topics: []string{events.TopicFile}},
			Handle: events.Tasks(c, rule)}
		const count = 300
		for i := range count {
			p.Emit(events.FileWrite, events.TopicFile, fmt.Sprint(i), nil)
			p.Emit(events.VolumeResize, events.TopicVolume, "", nil)
			if i%20 == 0 {
				stop := running(consumer.Run)
				time.Sleep(3 * time.Second)
				stop()
			}
		}
		stop := running(consumer.Run)
		time.Sleep(10 * time.Minute)
		stop()
		keys := make(map[string]int)
		c.store.View().Tasks(func(task *state.Task) bool { keys[task.Object]++; return true })
		if len(keys) != count {
			t.Errorf("%d tasks of %d events", len(keys), count)
		}
		for key, n := range keys {
			if n != 1 {
				t.Errorf("event %s has %d tasks", key, n)
			}
		}
	})
}

// receiver is a webhook's other end that can be out of order.
type receiver struct {
	t    *testing.T
	key  []byte
	down atomic.Bool

	mu     sync.Mutex
	ids    []uuid.UUID
	again  int
	refuse int
}

func (r *receiver) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	body, err := io.ReadAll(req.Body)
	if err != nil {
		r.t.Error(err)
	}
	if !events.Verify(r.key, body, req.Header.Get(events.HeaderSignature), time.Now()) {
		r.t.Errorf("signature %q does not fit", req.Header.Get(events.HeaderSignature))
	}
	if r.down.Load() {
		http.Error(w, "down", http.StatusServiceUnavailable)
		return
	}
	var m events.Message
	if err := json.Unmarshal(body, &m); err != nil || m.ID.String() != req.Header.Get(events.HeaderID) {
		r.t.Errorf("message %s: %v", body, err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if slices.Contains(r.ids, m.ID) {
		r.again++
	} else {
		r.ids = append(r.ids, m.ID)
	}
	// Now and then the answer is lost.
	if r.refuse++; r.refuse%50 == 0 {
		panic(http.ErrAbortHandler)
	}
}

func (r *receiver) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.ids)
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(60 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("%s did not come", what)
}

// A webhook receiver gets each event once by id and in order, through an outage, lost answers and a change of leaders.
func TestWebhook(t *testing.T) {
	ctx := t.Context()
	c := newCluster(t)
	v := &vault{}
	p := events.NewPublisher(c, uuid.New(), nil)
	defer running(p.Run)()
	r := &receiver{t: t}
	srv := httptest.NewServer(r)
	defer srv.Close()
	sinks := events.NewSinks(c, c.store, v, p, nil)
	id, key, err := sinks.Set(ctx, uuid.Nil, 0, state.SinkSpec{Name: "hook", Kind: state.SinkWebhook, URL: srv.URL + "/x", Topics: []string{"volume"}, Local: true}, nil)
	if err != nil || len(key) != 64 {
		t.Fatal(key, err)
	}
	r.key = []byte(key)
	stop := running(sinks.Run)
	const count = 400
	emit := func(from, to int) {
		for i := from; i < to; i++ {
			p.Emit(events.VolumeResize, events.TopicVolume, fmt.Sprint(i), nil)
			p.Emit(events.UpAndRunning, events.TopicNode, "other", nil)
		}
	}
	emit(0, 200)
	eventually(t, "the first events", func() bool { return r.count() >= 20 })
	r.down.Store(true)
	emit(200, 300)
	eventually(t, "the failure", func() bool { return !sinks.Status(id).Failing.IsZero() })
	stop()
	r.down.Store(false)
	other := events.NewSinks(c, c.store, v, p, nil)
	stop = running(other.Run)
	emit(300, count)
	eventually(t, "all events", func() bool { return r.count() == count })
	stop()
	sub := events.Subscribe(c.store, events.Filter{Topics: []string{"volume"}}, 0)
	var want []uuid.UUID
	for len(want) < count {
		batch, err := sub.Next(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range batch {
			want = append(want, e.ID)
		}
	}
	if !slices.Equal(r.ids, want) {
		t.Error("not in the order of the log")
	}
	if at, _ := c.store.View().Cursor(state.CursorOf(id)); at < c.store.View().Events(0, 1<<20)[0].Seq {
		t.Error("the cursor did not move")
	}
	if r.again > 30 {
		t.Errorf("%d events came again", r.again)
	}
	// A changed secret and a deletion.
	if _, _, err := sinks.Set(ctx, id, 0, state.SinkSpec{Name: "hook", Kind: state.SinkWebhook, URL: srv.URL, Local: true, Disabled: true}, []byte("k")); err != nil {
		t.Fatal(err)
	}
	if err := sinks.Delete(ctx, id, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := v.Get(state.CursorOf(id)); !errors.Is(err, state.ErrNotFound) {
		t.Error("the secret stays")
	}
}

// Events do not go where only this host or its cloud can answer, also by a redirect.
func TestWebhookAddresses(t *testing.T) {
	ctx := t.Context()
	c := newCluster(t)
	v := &vault{}
	sinks := events.NewSinks(c, c.store, v, nil, nil)
	for _, bad := range []string{"ftp://example.org", "https://user:pass@example.org/", "https://", "/x", "amqp://example.org", "https://example.org/#x"} {
		if _, _, err := sinks.Set(ctx, uuid.Nil, 0, state.SinkSpec{Name: "bad", Kind: state.SinkWebhook, URL: bad}, nil); !errors.Is(err, state.ErrInvalid) {
			t.Errorf("%s: %v", bad, err)
		}
	}
	var hits atomic.Int32
	target := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { hits.Add(1) }))
	defer target.Close()
	redirect := httptest.NewServer(http.RedirectHandler(target.URL, http.StatusTemporaryRedirect))
	defer redirect.Close()
	port := target.URL[strings.LastIndex(target.URL, ":"):]
	urls := []string{target.URL, "http://localhost" + port, "http://[::1]" + port, "http://[::ffff:127.0.0.1]" + port, "http://0.0.0.0" + port,
		"http://[64:ff9b::127.0.0.1]" + port, "http://169.254.169.254/latest/meta-data", "http://[fd00:ec2::254]/", "http://[fe80::1%25lo]" + port}
	var ids []uuid.UUID
	for i, u := range urls {
		id, _, err := sinks.Set(ctx, uuid.Nil, 0, state.SinkSpec{Name: fmt.Sprint("s", i), Kind: state.SinkWebhook, URL: u}, nil)
		if err != nil {
			t.Fatal(u, err)
		}
		ids = append(ids, id)
	}
	follows, _, err := sinks.Set(ctx, uuid.Nil, 0, state.SinkSpec{Name: "redirected", Kind: state.SinkWebhook, URL: redirect.URL, Local: true}, nil)
	if err != nil {
		t.Fatal(err)
	}
	p := events.NewPublisher(c, uuid.New(), nil)
	defer running(p.Run)()
	defer running(sinks.Run)()
	p.Emit("x", "volume", "", nil)
	for i, id := range ids {
		eventually(t, "the refusal of "+urls[i], func() bool { return sinks.Status(id).Error != "" })
		if e := sinks.Status(id).Error; !strings.Contains(e, "this host's") {
			t.Errorf("%s: %s", urls[i], e)
		}
	}
	eventually(t, "the refusal of a redirect", func() bool { return strings.Contains(sinks.Status(follows).Error, "307") })
	if hits.Load() != 0 {
		t.Errorf("%d requests went through", hits.Load())
	}
}

// A broker that cannot be reached and a CA that is none are failures that are shown, tried again and survive a stop.
func TestSinkThatCannotConnect(t *testing.T) {
	ctx := t.Context()
	c := newCluster(t)
	p := events.NewPublisher(c, uuid.New(), nil)
	defer running(p.Run)()
	sinks := events.NewSinks(c, c.store, &vault{}, p, nil)
	closed := httptest.NewServer(nil)
	closed.Close()
	addr := strings.TrimPrefix(closed.URL, "http://")
	var ids []uuid.UUID
	for _, s := range []state.SinkSpec{
		{Name: "broker", Kind: state.SinkAMQP, URL: "amqp://" + addr, Local: true},
		{Name: "ca", Kind: state.SinkWebhook, URL: "https://" + addr, CA: "no certificate", Local: true},
	} {
		id, _, err := sinks.Set(ctx, uuid.Nil, 0, s, []byte("user:secret"))
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	stop := running(sinks.Run)
	p.Emit("x", "volume", "", nil)
	for _, id := range ids {
		eventually(t, "the failure", func() bool { return sinks.Status(id).Error != "" })
		if strings.Contains(sinks.Status(id).Error, "secret") && !strings.Contains(sinks.Status(id).Error, "secret of sink") {
			t.Errorf("the password is in the error: %s", sinks.Status(id).Error)
		}
	}
	stop()
}

func TestSignature(t *testing.T) {
	now := time.Unix(1800000000, 0)
	sig := events.Sign([]byte("key"), []byte("body"), now)
	for _, c := range []struct {
		what      string
		key, body string
		sig       string
		at        time.Time
		ok        bool
	}{
		{"as signed", "key", "body", sig, now, true},
		{"a little later", "key", "body", sig, now.Add(4 * time.Minute), true},
		{"replayed later", "key", "body", sig, now.Add(6 * time.Minute), false},
		{"another body", "key", "bodY", sig, now, false},
		{"another key", "keY", "body", sig, now, false},
		{"another time", "key", "body", strings.Replace(sig, "t=18", "t=17", 1), now, false},
		{"nothing", "key", "body", "", now, false},
		{"half", "key", "body", sig[:40], now, false},
	} {
		if got := events.Verify([]byte(c.key), []byte(c.body), c.sig, c.at); got != c.ok {
			t.Errorf("%s: %v", c.what, got)
		}
	}
}
