package state

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/google/uuid"
)

// Event is one thing that happened, in the order of the raft log. Commands emit theirs in the same transaction as the
// change, so that no change is without its event and no event without its change; others are published by PublishEvents.
type Event struct {
	// Seq orders events: raft index << 12 | number within the entry. It is what a reader goes on from.
	Seq uint64 `json:"seq"`
	// ID tells an event that was published twice from two events.
	ID uuid.UUID `json:"id"`
	// At is the publisher's clock.
	At Time `json:"at"`
	// Type is the event's name ("volume_create"), Topic the kind of object it is about ("volume"), Key that object's id.
	Type  string `json:"type"`
	Topic string `json:"topic"`
	Key   string `json:"key,omitempty"`
	// Node is where it happened, Nil where the cluster's state itself changed.
	Node uuid.UUID `json:"node,omitzero"`
	// Data is a JSON object with what the type says.
	Data json.RawMessage `json:"data,omitempty"`
}

// Limits of the event log. Beyond the kept ones events go away, oldest first, except those that a cursor has not passed;
// beyond the max they go away in any case, and the reader that misses them finds so by View.EventsTrimmed.
const (
	EventDataBytesMax = 8 << 10
	EventsPerEntryMax = 256
	EventsKept        = 1 << 14
	EventsMax         = 1 << 17
	EventBytesKept    = 8 << 20
	EventBytesMax     = 64 << 20
	CursorsMax        = 64
	eventsTrimmedEach = 64 // per event published at most: bounds an apply
)

const (
	tEvent    = "event"
	tEventLog = "eventlog"
	tCursor   = "cursor"
	byEventID = "event_id"
)

// eventLog is the one row that counts the events.
type eventLog struct {
	Count   uint64 `json:"count"`
	Bytes   uint64 `json:"bytes"`
	Trimmed uint64 `json:"trimmed"`
}

// Cursor is how far a reader of the events has come: everything up to Seq is done with.
type Cursor struct {
	Name string `json:"name"`
	Seq  uint64 `json:"seq"`
	Rev  uint64 `json:"rev"`
}

func eventTable(frame byte) object {
	o := rowObject[Event](frame, tEvent, map[string]index{
		byID:      always(func(e *Event) []byte { return binary.BigEndian.AppendUint64(nil, e.Seq) }),
		byEventID: always(func(e *Event) []byte { return e.ID[:] }),
	})
	o.commands = []func() Command{command[PublishEvents]}
	o.check = func(v *View) error {
		var log eventLog
		var err error
		rows(v, tEvent, byID, nil, func(e *Event) bool {
			log.Count++
			log.Bytes += e.size()
			if !bytes.Equal(e.Data, canonical(e.Data)) {
				err = fmt.Errorf("event %d: its data is not as it was stored", e.Seq)
			}
			return err == nil
		})
		if err != nil {
			return err
		}
		if have := v.eventLog(); have.Count != log.Count || have.Bytes != log.Bytes {
			return fmt.Errorf("event log: %d events of %d bytes, counted %d of %d", have.Count, have.Bytes, log.Count, log.Bytes)
		}
		if n := uint64(count[Event](v, tEvent, byEventID, nil)); n != log.Count {
			return fmt.Errorf("event log: %d events, %d ids", log.Count, n)
		}
		return nil
	}
	return o
}

func eventLogTable(frame byte) object {
	return rowObject[eventLog](frame, tEventLog, map[string]index{byID: always(func(*eventLog) []byte { return clusterKey })})
}

func cursorTable(frame byte) object {
	o := rowObject[Cursor](frame, tCursor, map[string]index{byID: always(func(c *Cursor) []byte { return []byte(c.Name) })})
	o.commands = []func() Command{command[MoveCursor], command[DeleteCursor]}
	return o
}

func (e *Event) size() uint64 {
	return uint64(128 + len(e.Type) + len(e.Topic) + len(e.Key) + len(e.Data))
}

// NewEvent is an event before it has its place.
type NewEvent struct {
	ID    uuid.UUID       `json:"id"`
	At    Time            `json:"at"`
	Type  string          `json:"type"`
	Topic string          `json:"topic"`
	Key   string          `json:"key,omitempty"`
	Node  uuid.UUID       `json:"node,omitzero"`
	Data  json.RawMessage `json:"data,omitempty"`
}

func (e NewEvent) check() error {
	object := "event " + quote(e.Type)
	if e.ID == uuid.Nil {
		return invalid(object, "no id")
	}
	if err := checkLabel("event", e.Type); err != nil {
		return err
	}
	if err := checkLabel("event topic", e.Topic); err != nil {
		return err
	}
	if len(e.Key) > NameBytesMax || !utf8.ValidString(e.Key) {
		return invalid(object, "key is too long or not UTF-8")
	}
	return checkJSON(object, "data", e.Data, EventDataBytesMax)
}

// checkJSON refuses what is no JSON object, or longer than bytesMax as it will be stored.
func checkJSON(object, what string, b json.RawMessage, bytesMax int) error {
	if len(b) == 0 {
		return nil
	}
	stored := canonical(b)
	if len(stored) == 0 || stored[0] != '{' || !utf8.Valid(stored) {
		return invalid(object, what+" is not a JSON object")
	}
	if len(stored) > bytesMax {
		return invalid(object, fmt.Sprintf("%s of %d bytes, more than %d", what, len(stored), bytesMax))
	}
	return nil
}

// canonical is JSON as encoding/json writes it, without white space and with < > & escaped: what a snapshot would make of
// it anyway. It is nil for what is no JSON.
func canonical(b json.RawMessage) json.RawMessage {
	if len(b) == 0 {
		return nil
	}
	c, err := json.Marshal(b)
	if err != nil {
		return nil
	}
	return c
}

// PublishEvents appends events. One whose id is in the log already is left out, so a publisher may repeat what it is not
// sure of.
type PublishEvents struct {
	Events []NewEvent `json:"events"`
}

func (*PublishEvents) kind() (string, int) { return "publish_events", 1 }

func (c *PublishEvents) check() error {
	if len(c.Events) > EventsPerEntryMax {
		return invalid("events", fmt.Sprintf("%d, more than %d", len(c.Events), EventsPerEntryMax))
	}
	for _, e := range c.Events {
		if err := e.check(); err != nil {
			return err
		}
	}
	return nil
}

func (c *PublishEvents) apply(t *tx) (Result, error) {
	for _, e := range c.Events {
		t.publish(e)
	}
	return Result{Seq: t.lastSeq}, nil
}

// emit publishes an event of the command's own. data is marshalled as JSON and must be an object; one that is longer than an
// event may be is left out, since what it says is in the state.
func (t *tx) emit(typ, topic, key string, data any) {
	b, err := json.Marshal(data)
	if err != nil {
		panic(fmt.Sprintf("event %s: %v", typ, err)) // plain structs marshal
	}
	if len(b) > EventDataBytesMax || string(b) == "null" {
		b = nil
	}
	t.derived++
	t.publish(NewEvent{ID: t.deriveID("event", t.derived), At: t.at, Type: typ, Topic: topic, Key: key, Data: b})
}

// deriveID makes an id that follows from the command's, the same on every node.
func (t *tx) deriveID(what string, n int) uuid.UUID {
	return uuid.NewSHA1(t.id, fmt.Appendf(nil, "%s %d", what, n))
}

func (t *tx) publish(e NewEvent) {
	if _, known := first[Event](&t.View, tEvent, byEventID, e.ID[:]); known {
		return
	}
	row := Event{Seq: t.index<<12 | uint64(t.published), ID: e.ID, At: e.At, Type: e.Type, Topic: e.Topic, Key: e.Key, Node: e.Node, Data: canonical(e.Data)}
	if t.published++; t.published > 1<<12 {
		panic("more events in one entry than numbers")
	}
	t.lastSeq = row.Seq
	t.put(tEvent, &row)
	log := t.eventLog()
	log.Count++
	log.Bytes += row.size()
	t.trimEvents(&log)
	t.put(tEventLog, &log)
}

// trimEvents removes the oldest events beyond the limits.
func (t *tx) trimEvents(log *eventLog) {
	if log.Count <= EventsKept && log.Bytes <= EventBytesKept {
		return
	}
	passed := ^uint64(0)
	rows(&t.View, tCursor, byID, nil, func(c *Cursor) bool { passed = min(passed, c.Seq); return true })
	var old []*Event
	count, bytes := log.Count, log.Bytes
	rows(&t.View, tEvent, byID, nil, func(e *Event) bool {
		over := count > EventsKept || bytes > EventBytesKept
		full := count > EventsMax || bytes > EventBytesMax
		if len(old) == eventsTrimmedEach || !over || e.Seq > passed && !full {
			return false
		}
		old = append(old, e)
		count, bytes = count-1, bytes-e.size()
		return true
	})
	for _, e := range old {
		log.Trimmed = e.Seq
		t.del(tEvent, e)
	}
	log.Count, log.Bytes = count, bytes
}

func (v *View) eventLog() eventLog {
	if log, ok := first[eventLog](v, tEventLog, byID, clusterKey); ok {
		return *log
	}
	return eventLog{}
}

// Events returns up to limit events after seq, in order.
func (v *View) Events(after uint64, limit int) []Event {
	if after == ^uint64(0) {
		return nil
	}
	it, err := v.txn.LowerBound(tEvent, byID, binary.BigEndian.AppendUint64(nil, after+1))
	if err != nil {
		panic(err)
	}
	var out []Event
	for obj := it.Next(); obj != nil && len(out) < limit; obj = it.Next() {
		out = append(out, *obj.(*Event))
	}
	return out
}

// EventsTrimmed is the seq of the newest event that is not kept any more: who has not come past it has missed some.
func (v *View) EventsTrimmed() uint64 { return v.eventLog().Trimmed }

// EventsLast is the seq of the newest event, 0 where there is none.
func (v *View) EventsLast() uint64 {
	it, err := v.txn.GetReverse(tEvent, byID)
	if err != nil {
		panic(err)
	}
	if e, ok := it.Next().(*Event); ok {
		return e.Seq
	}
	return v.EventsTrimmed()
}

// MoveCursor records that a reader is done with everything up to Seq. A cursor never moves back; a reader of its own makes
// it with the first move.
type MoveCursor struct {
	Name string `json:"name"`
	Seq  uint64 `json:"seq"`
}

func (*MoveCursor) kind() (string, int) { return "move_cursor", 1 }

func (c *MoveCursor) check() error { return checkLabel("cursor", c.Name) }

func (c *MoveCursor) apply(t *tx) (Result, error) {
	have, ok := first[Cursor](&t.View, tCursor, byID, []byte(c.Name))
	if !ok && strings.HasPrefix(c.Name, sinkCursor) {
		return Result{}, missing("cursor " + quote(c.Name))
	}
	if !ok && count[Cursor](&t.View, tCursor, byID, nil) >= CursorsMax {
		return Result{}, &Error{Err: ErrNoSpace, Object: "cursor " + quote(c.Name), Detail: fmt.Sprintf("%d cursors", CursorsMax)}
	}
	if ok && have.Seq >= c.Seq {
		return Result{Seq: have.Seq}, nil
	}
	t.put(tCursor, &Cursor{Name: c.Name, Seq: c.Seq, Rev: t.index})
	return Result{Seq: c.Seq}, nil
}

// DeleteCursor forgets a reader.
type DeleteCursor struct {
	Name string `json:"name"`
}

func (*DeleteCursor) kind() (string, int) { return "delete_cursor", 1 }

func (c *DeleteCursor) check() error {
	if strings.HasPrefix(c.Name, sinkCursor) {
		return invalid("cursor "+quote(c.Name), "goes with its sink")
	}
	return nil
}

func (c *DeleteCursor) apply(t *tx) (Result, error) {
	have, ok := first[Cursor](&t.View, tCursor, byID, []byte(c.Name))
	if !ok {
		return Result{}, missing("cursor " + quote(c.Name))
	}
	row := *have
	t.del(tCursor, &row)
	return Result{}, nil
}

// Cursor returns how far a reader has come; ok is false where it has none yet.
func (v *View) Cursor(name string) (seq uint64, ok bool) {
	c, ok := first[Cursor](v, tCursor, byID, []byte(name))
	if !ok {
		return 0, false
	}
	return c.Seq, true
}
