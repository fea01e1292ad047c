package events

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"varve/control/state"
)

// Vault keeps the secrets of sinks sealed in the state; secrets.Store is one.
type Vault interface {
	Set(ctx context.Context, name string, plain []byte) error
	Get(name string) ([]byte, error)
	Delete(ctx context.Context, name string) error
}

// Sinks changes where events are sent, and sends them while this node leads.
type Sinks struct {
	raft  Proposer
	store *state.Store
	vault Vault
	pub   *Publisher
	log   *slog.Logger

	mu     sync.Mutex
	status map[uuid.UUID]SinkStatus
}

// SinkStatus is how a sink does, as the leader knows it.
type SinkStatus struct {
	// Sent counts the events since this leader began. Failing is since when none goes through; zero where all is well.
	Sent    uint64    `json:"sent"`
	Failing time.Time `json:"failing,omitzero"`
	// Error is the last one, Missed counts the times that the log was trimmed before the sink had taken all.
	Error  string `json:"error,omitempty"`
	Missed int    `json:"missed,omitempty"`
}

const (
	sinkWaitFirst  = time.Second
	sinkWaitMax    = 2 * time.Minute
	sinkAlertAfter = 5 * time.Minute
	cursorPause    = time.Second
	secretBytesMax = 1024
)

// NewSinks wires the sinks and starts nothing.
func NewSinks(raft Proposer, store *state.Store, vault Vault, pub *Publisher, log *slog.Logger) *Sinks {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Sinks{raft: raft, store: store, vault: vault, pub: pub, log: log, status: make(map[uuid.UUID]SinkStatus)}
}

// Set makes a sink (id Nil) or changes one. secret nil keeps the one there is; a new webhook without one gets a key, which
// is returned once.
func (s *Sinks) Set(ctx context.Context, id uuid.UUID, rev uint64, spec state.SinkSpec, secret []byte) (uuid.UUID, string, error) {
	object := fmt.Sprintf("sink %q", spec.Name)
	if err := checkURL(object, spec); err != nil {
		return uuid.Nil, "", err
	}
	if len(secret) > secretBytesMax {
		return uuid.Nil, "", &state.Error{Err: state.ErrInvalid, Object: object, Field: "secret", Detail: "secret is too long"}
	}
	fresh, shown := id == uuid.Nil, ""
	if fresh {
		id = uuid.New()
		switch {
		case secret == nil && spec.Kind == state.SinkWebhook:
			key := make([]byte, 32)
			if _, err := rand.Read(key); err != nil {
				return uuid.Nil, "", fmt.Errorf("make a signing key: %w", err)
			}
			shown = hex.EncodeToString(key)
			secret = []byte(shown)
		case secret == nil:
			return uuid.Nil, "", &state.Error{Err: state.ErrInvalid, Object: object, Field: "secret", Detail: "no user and password", Remedy: "give user:password as its secret"}
		}
	}
	// The secret first: a sink that is seen is one that can send.
	if secret != nil {
		if err := s.vault.Set(ctx, state.CursorOf(id), secret); err != nil {
			return uuid.Nil, "", fmt.Errorf("keep the secret of %s: %w", object, err)
		}
	}
	if _, err := s.raft.Apply(ctx, &state.SetSink{ID: id, Rev: rev, Spec: spec}); err != nil {
		if fresh {
			err = errors.Join(err, s.vault.Delete(ctx, state.CursorOf(id)))
		}
		return uuid.Nil, "", fmt.Errorf("set sink: %w", err)
	}
	return id, shown, nil
}

func checkURL(object string, spec state.SinkSpec) error {
	u, err := url.Parse(spec.URL)
	ok := err == nil && u.Host != "" && u.User == nil && u.Fragment == ""
	remedy := "write http:// or https:// and a host, without user or password"
	switch spec.Kind {
	case state.SinkWebhook:
		ok = ok && (u.Scheme == "http" || u.Scheme == "https")
	case state.SinkAMQP:
		ok = ok && (u.Scheme == "amqp" || u.Scheme == "amqps")
		remedy = "write amqp:// or amqps://, host, port and virtual host, without user or password"
	}
	if !ok {
		return &state.Error{Err: state.ErrInvalid, Object: object, Field: "url", Detail: "URL does not fit", Remedy: remedy}
	}
	return nil
}

// Delete takes a sink away.
func (s *Sinks) Delete(ctx context.Context, id uuid.UUID, rev uint64) error {
	if _, err := s.raft.Apply(ctx, &state.DeleteSink{ID: id, Rev: rev}); err != nil {
		return fmt.Errorf("delete sink: %w", err)
	}
	if err := s.vault.Delete(ctx, state.CursorOf(id)); err != nil && !errors.Is(err, state.ErrNotFound) {
		return fmt.Errorf("delete the secret of a sink: %w", err)
	}
	return nil
}

// Status is how a sink does; the zero value where this node does not lead.
func (s *Sinks) Status(id uuid.UUID) SinkStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.status[id]
}

func (s *Sinks) change(id uuid.UUID, f func(*SinkStatus)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.status[id]
	f(&st)
	s.status[id] = st
}

// Run sends while this node leads: a goroutine per sink, a new one when the sink is changed.
func (s *Sinks) Run(ctx context.Context) error {
	type run struct {
		rev  uint64
		stop func()
	}
	runs := make(map[uuid.UUID]run)
	defer func() {
		for _, r := range runs {
			r.stop()
		}
		s.mu.Lock()
		clear(s.status)
		s.mu.Unlock()
	}()
	for ctx.Err() == nil {
		v, changed, err := s.store.Watch("sink")
		if err != nil {
			return err
		}
		live := make(map[uuid.UUID]bool)
		for _, sink := range v.Sinks() {
			live[sink.ID] = true
			if r, ok := runs[sink.ID]; ok && r.rev == sink.Rev {
				continue
			} else if ok {
				r.stop()
				delete(runs, sink.ID)
			}
			if sink.Disabled {
				continue
			}
			sinkCtx, cancel := context.WithCancel(ctx)
			var wg sync.WaitGroup
			wg.Go(func() { s.serve(sinkCtx, sink) })
			runs[sink.ID] = run{rev: sink.Rev, stop: func() { cancel(); wg.Wait() }}
		}
		for id, r := range runs {
			if !live[id] {
				r.stop()
				delete(runs, id)
			}
		}
		select {
		case <-ctx.Done():
		case <-changed:
		}
	}
	return nil
}

// sender sends a batch in order and calls done with each event that the receiver has taken.
type sender interface {
	send(ctx context.Context, batch []state.Event, done func(state.Event)) error
	close()
}

func (s *Sinks) connect(ctx context.Context, sink state.Sink) (sender, error) {
	secret, err := s.vault.Get(state.CursorOf(sink.ID))
	if err != nil {
		return nil, fmt.Errorf("secret of sink %s: %w", sink.Name, err)
	}
	if sink.Kind == state.SinkAMQP {
		a, err := newAMQP(ctx, sink, secret)
		if err != nil {
			return nil, err
		}
		return a, nil
	}
	w, err := newWebhook(sink, secret)
	if err != nil {
		return nil, err
	}
	return w, nil
}

// serve sends to one sink until ctx ends.
func (s *Sinks) serve(ctx context.Context, sink state.Sink) {
	log := s.log.With("sink", sink.Name)
	at, ok := s.store.View().Cursor(state.CursorOf(sink.ID))
	if !ok {
		return // deleted
	}
	sub := Subscribe(s.store, Filter{Topics: sink.Topics, Types: sink.Types}, at)
	p := &progress{sinks: s, sink: sink, log: log, kept: at, at: at, keptAt: time.Now()}
	defer p.keep(context.WithoutCancel(ctx))
	var out sender
	defer func() {
		if out != nil {
			out.close()
		}
	}()
	for ctx.Err() == nil {
		batch, err := p.next(ctx, sub)
		if err != nil {
			return
		}
		for wait := sinkWaitFirst; len(batch) > 0 && ctx.Err() == nil; {
			if out == nil {
				out, err = s.connect(ctx, sink)
			}
			if err == nil {
				n := 0
				err = out.send(ctx, batch, func(e state.Event) { n++; p.sent(ctx, e) })
				batch = batch[n:]
				if n > 0 {
					wait = sinkWaitFirst
				}
			}
			if err == nil {
				break
			}
			if ctx.Err() != nil {
				return
			}
			p.failed(err)
			if out != nil {
				out.close()
				out = nil
			}
			p.keep(ctx)
			pause(ctx, wait)
			wait = min(2*wait, sinkWaitMax)
			err = nil
		}
	}
}

// progress is how far a sink has come, and how it does.
type progress struct {
	sinks   *Sinks
	sink    state.Sink
	log     *slog.Logger
	at      uint64
	kept    uint64
	keptAt  time.Time
	since   time.Time // failing since
	alerted bool
}

// next waits for events; while there are none for the sink, its cursor follows the log all the same.
func (p *progress) next(ctx context.Context, sub *Subscription) ([]state.Event, error) {
	for {
		waitCtx, cancel := context.WithTimeout(ctx, cursorPause)
		batch, err := sub.Next(waitCtx)
		cancel()
		if missed, ok := errors.AsType[*MissedError](err); ok {
			p.log.Error("sink was away too long, events that are not kept any more do not reach it", "from", missed.From)
			p.sinks.change(p.sink.ID, func(st *SinkStatus) { st.Missed++ })
			p.alert(AlertRaised, "event_sink_missed", "events were not kept until the sink could take them")
			continue
		}
		if err == nil || ctx.Err() != nil {
			return batch, err
		}
		if p.at = max(p.at, sub.After()); p.at>>12 > p.kept>>12+1024 {
			p.keep(ctx) // a filter that takes little must not hold the log
		} else if p.unkept() {
			p.keep(ctx)
		}
	}
}

// unkept says that events were sent that the cursor does not know of.
func (p *progress) unkept() bool {
	return p.at > p.kept && time.Since(p.keptAt) >= cursorPause
}

func (p *progress) sent(ctx context.Context, e state.Event) {
	p.at = e.Seq
	p.sinks.change(p.sink.ID, func(st *SinkStatus) { st.Sent++; st.Failing, st.Error = time.Time{}, "" })
	if p.alerted {
		p.alerted = false
		p.alert(AlertCleared, "event_sink_failing", "events go through again")
	}
	if !p.since.IsZero() {
		p.log.Info("sink takes events again", "after", time.Since(p.since).Round(time.Second))
		p.since = time.Time{}
	}
	if time.Since(p.keptAt) >= cursorPause {
		p.keep(ctx)
	}
}

// keep commits the cursor. It lags what was sent by a second at most, and by nothing where a leader steps down in order.
func (p *progress) keep(ctx context.Context) {
	if p.at <= p.kept {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, publishTry)
	defer cancel()
	if _, err := p.sinks.raft.Apply(ctx, &state.MoveCursor{Name: state.CursorOf(p.sink.ID), Seq: p.at}); err != nil {
		if !errors.Is(err, state.ErrNotFound) && ctx.Err() == nil {
			p.log.Warn("cursor of sink could not be kept", "err", err)
		}
		return
	}
	p.kept, p.keptAt = p.at, time.Now()
}

func (p *progress) failed(err error) {
	if p.since.IsZero() {
		p.since = time.Now()
		p.log.Warn("sink does not take events, they wait", "err", err)
	}
	text := err.Error()
	p.sinks.change(p.sink.ID, func(st *SinkStatus) { st.Failing, st.Error = p.since, text })
	if !p.alerted && time.Since(p.since) >= sinkAlertAfter {
		p.alerted = true
		p.alert(AlertRaised, "event_sink_failing", text)
	}
}

func (p *progress) alert(typ, code, text string) {
	if p.sinks.pub == nil {
		return
	}
	if len(text) > 500 {
		text = strings.ToValidUTF8(text[:500], "") + "…"
	}
	p.sinks.pub.Emit(typ, TopicAlert, code+"."+p.sink.Name, map[string]string{"code": code, "object": "sink " + p.sink.Name, "detail": text})
}
