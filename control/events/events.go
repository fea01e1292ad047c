// Package events is the cluster's event log: ordered, durable and replayable. It takes the place of the queue that the
// original's volume driver published to, and feeds consumers, the API's streams, webhooks and a real RabbitMQ.
//
//	state commands ── emit ──┐                                  ┌─ Subscription   API and console, from any point
//	Publisher (engine, …) ───┴─> state.Event rows, raft order ──┼─ Consumer       events become tasks; a cursor in the state
//	                                                            └─ Senders        webhooks and AMQP; a cursor in the state
//
// The log is bounded (state.EventsKept, and up to state.EventsMax while a cursor has not passed them). A reader that comes
// too late is told so: nothing is left out in silence.
//
// # Once
//
// An event has an id. Published twice it is one event. A consumer's task takes its id from the event's, so an event that is
// consumed again after a crash makes no second task. A webhook or AMQP message carries the id; it is sent again only where
// the receiver's answer was lost, so a receiver that ignores ids it has seen gets each event once, in order.
package events

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"varve/control/state"
)

// Proposer commits a command and returns what it did. raft.Node is one.
type Proposer interface {
	Apply(ctx context.Context, cmd state.Command) (state.Result, error)
}

// Names of events that are published outside the state; the state emits volume_create, volume_delete, volume_rename,
// file_create, file_delete, file_rename, owner_changed, task_* and config_changed itself.
const (
	VolumeResize        = "volume_resize"
	VolumeCreateFailed  = "volume_create_failed"
	FileWrite           = "file_write"
	UpAndRunning        = "up_and_running"
	RedirectTimeout     = "redirect_timeout_while_online"
	DTLStateTransition  = "dtl_state_transition"
	VolumeDriverError   = "volumedriver_error"
	SnapshotCreate      = "snapshot_create"
	SnapshotDelete      = "snapshot_delete"
	SnapshotRollback    = "snapshot_rollback"
	SnapshotSkipped     = "snapshot_skipped"
	ReplicationStarted  = "replication_started"
	ReplicationFinished = "replication_finished"
	ReplicationFailed   = "replication_failed"
	AlertRaised         = "alert_raised"
	AlertCleared        = "alert_cleared"
	EventsLost          = "events_lost"
)

// Topics.
const (
	TopicVolume   = "volume"
	TopicVPool    = "vpool"
	TopicFile     = "file"
	TopicNode     = "node"
	TopicSnapshot = "snapshot"
	TopicAlert    = "alert"
	TopicTask     = "task"
	TopicEvents   = "events"
)

// New makes an event of this moment. data is marshalled to a JSON object; nil is none.
func New(typ, topic, key string, data any) (state.NewEvent, error) {
	e := state.NewEvent{ID: uuid.New(), At: state.Time(time.Now().UnixNano()), Type: typ, Topic: topic, Key: key}
	if data != nil {
		b, err := json.Marshal(data)
		if err != nil {
			return e, fmt.Errorf("data of event %s: %w", typ, err)
		}
		e.Data = b
	}
	return e, nil
}

const (
	queueMax      = 8192
	batchBytesMax = state.EntryBytesMax / 4
	publishTry    = 10 * time.Second
	retryPause    = 500 * time.Millisecond
)

// Publisher commits events in the order they are given, several to an entry. Publish never waits, so the I/O path may call
// it; what does not fit the queue is counted, and told by an event of its own.
type Publisher struct {
	raft Proposer
	node uuid.UUID
	log  *slog.Logger

	mu    sync.Mutex
	queue []state.NewEvent
	lost  int
	wake  chan struct{}
}

// NewPublisher wires a publisher of a node's events and starts nothing.
func NewPublisher(raft Proposer, node uuid.UUID, log *slog.Logger) *Publisher {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Publisher{raft: raft, node: node, log: log, wake: make(chan struct{}, 1)}
}

// Emit is Publish of a new event of this moment.
func (p *Publisher) Emit(typ, topic, key string, data any) {
	e, err := New(typ, topic, key, data)
	if err != nil {
		p.log.Error("event could not be made", "type", typ, "err", err)
		return
	}
	p.Publish(e)
}

// Publish queues an event. Its ID makes it happen once, however often it is published.
func (p *Publisher) Publish(e state.NewEvent) {
	if e.Node == uuid.Nil {
		e.Node = p.node
	}
	p.mu.Lock()
	if len(p.queue) < queueMax {
		p.queue = append(p.queue, e)
	} else {
		p.lost++
	}
	p.mu.Unlock()
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// Run commits what is queued until ctx ends, then what is left if that goes at once.
func (p *Publisher) Run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
			defer cancel()
			p.drain(last)
			return nil
		case <-p.wake:
			p.drain(ctx)
		}
	}
}

// drain commits until the queue is empty or ctx ends.
func (p *Publisher) drain(ctx context.Context) {
	for ctx.Err() == nil {
		batch := p.batch()
		if len(batch) == 0 {
			return
		}
		callCtx, cancel := context.WithTimeout(ctx, publishTry)
		_, err := p.raft.Apply(callCtx, &state.PublishEvents{Events: batch})
		cancel()
		switch {
		case errors.Is(err, state.ErrInvalid):
			p.refused(batch, err)
		case err != nil:
			// Their ids make the repetition harmless whatever became of the first.
			p.log.Debug("events are not committed yet", "events", len(batch), "err", err)
			pause(ctx, retryPause)
			continue
		}
		p.mu.Lock()
		p.queue = slices.Delete(p.queue, 0, min(len(batch), len(p.queue)))
		p.mu.Unlock()
	}
}

// refused drops the events of a batch that no log takes, and keeps the others.
func (p *Publisher) refused(batch []state.NewEvent, cause error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	good := make([]state.NewEvent, 0, len(batch))
	for _, e := range batch {
		if _, err := state.Encode(&state.PublishEvents{Events: []state.NewEvent{e}}, e.ID, e.At); err != nil {
			p.log.Error("event is refused", "type", e.Type, "topic", e.Topic, "err", cause)
			continue
		}
		good = append(good, e)
	}
	// drain deletes as many as the batch had: stand the good ones behind them, in front of the rest.
	p.queue = slices.Concat(p.queue[:len(batch)], good, p.queue[len(batch):])
}

// batch looks at the first events of the queue.
func (p *Publisher) batch() []state.NewEvent {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.lost > 0 && len(p.queue) < queueMax {
		data := fmt.Appendf(nil, `{"count":%d}`, p.lost)
		p.queue = append(p.queue, state.NewEvent{ID: uuid.New(), At: state.Time(time.Now().UnixNano()), Type: EventsLost, Topic: TopicEvents,
			Node: p.node, Data: data})
		p.lost = 0
	}
	n, size := 0, 0
	for n < len(p.queue) && n < state.EventsPerEntryMax {
		size += 512 + 2*len(p.queue[n].Data)
		if n > 0 && size > batchBytesMax {
			break
		}
		n++
	}
	return slices.Clone(p.queue[:n])
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// Filter chooses events; what is empty chooses all.
type Filter struct {
	Topics []string
	Types  []string
	Key    string
}

// Takes says whether the filter chooses an event.
func (f Filter) Takes(e state.Event) bool {
	return (len(f.Topics) == 0 || slices.Contains(f.Topics, e.Topic)) && (len(f.Types) == 0 || slices.Contains(f.Types, e.Type)) &&
		(f.Key == "" || f.Key == e.Key)
}

// MissedError: events before From are not kept any more, so a reader that went on from an older one has missed some.
type MissedError struct{ From uint64 }

func (e *MissedError) Error() string {
	return fmt.Sprintf("events before %d are not kept any more", e.From)
}

// Subscription reads the log from a point on. It is for one goroutine.
type Subscription struct {
	store  *state.Store
	filter Filter
	after  uint64
}

const readMax = 256

// Subscribe reads the events after a seq: 0 is all that are kept. The seq of the last event read is what a client goes on
// from (SSE's Last-Event-ID).
func Subscribe(store *state.Store, f Filter, after uint64) *Subscription {
	return &Subscription{store: store, filter: f, after: after}
}

// Next waits for events that the filter chooses and returns up to 256 of them, in order. After a *MissedError it goes on
// with what is kept. ctx's end is its error.
func (s *Subscription) Next(ctx context.Context) ([]state.Event, error) {
	for {
		v, changed, err := s.store.Watch("event")
		if err != nil {
			return nil, err
		}
		if trimmed := v.EventsTrimmed(); s.after != 0 && s.after < trimmed {
			s.after = trimmed
			return nil, &MissedError{From: trimmed}
		}
		if s.after > v.EventsLast() {
			// From the future: the log was restored to an earlier point. What there is is new to the reader.
			s.after = v.EventsTrimmed()
			return nil, &MissedError{From: s.after}
		}
		batch := v.Events(s.after, readMax)
		var out []state.Event
		for _, e := range batch {
			s.after = e.Seq
			if s.filter.Takes(e) {
				out = append(out, e)
			}
		}
		if len(out) > 0 {
			return out, nil
		}
		if len(batch) > 0 {
			continue
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-changed:
		}
	}
}

// After is where the subscription stands.
func (s *Subscription) After() uint64 { return s.after }

// Consumer handles every event once in effect: Handle may see one again after a crash, and must be idempotent by its id.
type Consumer struct {
	// Name is its cursor's.
	Name   string
	Raft   Proposer
	Store  *state.Store
	Filter Filter
	// Handle does what follows from an event. An error is tried again, and those behind it wait.
	Handle func(ctx context.Context, e state.Event) error
	Log    *slog.Logger
}

const (
	handleWaitMax = time.Minute
	cursorEvery   = 64
)

// Run consumes while this node leads.
func (c *Consumer) Run(ctx context.Context) error {
	log := c.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	log = log.With("consumer", c.Name)
	at, ok := c.Store.View().Cursor(c.Name)
	if !ok {
		at = 0
	}
	sub := Subscribe(c.Store, c.Filter, at)
	for ctx.Err() == nil {
		batch, err := sub.Next(ctx)
		if missed, ok := errors.AsType[*MissedError](err); ok {
			log.Error("events were not kept long enough, some are missed", "from", missed.From)
			continue
		}
		if err != nil {
			break
		}
		for i, e := range batch {
			if !c.handle(ctx, log, e) {
				return nil
			}
			if i%cursorEvery == cursorEvery-1 || i == len(batch)-1 {
				c.move(ctx, log, e.Seq)
			}
		}
	}
	return nil
}

// handle tries until it succeeds; false when ctx ended.
func (c *Consumer) handle(ctx context.Context, log *slog.Logger, e state.Event) bool {
	wait := time.Second
	for {
		err := c.Handle(ctx, e)
		if err == nil {
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		log.Warn("event could not be handled, it is tried again", "event", e.ID, "type", e.Type, "err", err)
		pause(ctx, wait)
		if wait *= 2; wait > handleWaitMax {
			wait = handleWaitMax
		}
	}
}

// move keeps the cursor. A failure is no harm: the events are handled again.
func (c *Consumer) move(ctx context.Context, log *slog.Logger, seq uint64) {
	if _, err := c.Raft.Apply(ctx, &state.MoveCursor{Name: c.Name, Seq: seq}); err != nil && ctx.Err() == nil {
		log.Debug("cursor could not be kept", "seq", seq, "err", err)
	}
}

// TaskRule makes a task of an event; ok is false where none follows.
type TaskRule func(e state.Event) (spec state.TaskSpec, ok bool, err error)

// Tasks is the Handle of a consumer that turns events into tasks. The task's id follows from the event's and the type's.
func Tasks(raft Proposer, rules ...TaskRule) func(ctx context.Context, e state.Event) error {
	return func(ctx context.Context, e state.Event) error {
		for _, rule := range rules {
			spec, ok, err := rule(e)
			if err != nil {
				return fmt.Errorf("task of event %s: %w", e.Type, err)
			}
			if !ok {
				continue
			}
			spec.By = "event " + e.Type
			if _, err := raft.Apply(ctx, &state.SubmitTask{ID: uuid.NewSHA1(e.ID, []byte(spec.Type)), Spec: spec}); err != nil {
				return fmt.Errorf("submit task %s of event %s: %w", spec.Type, e.Type, err)
			}
		}
		return nil
	}
}
