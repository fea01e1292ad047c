package state

import (
	"fmt"
	"slices"
	"unicode/utf8"

	"github.com/google/uuid"
)

// Sink is where events are sent: a webhook or an AMQP exchange. How far it has come is the cursor of its name.
type Sink struct {
	ID uuid.UUID `json:"id"`
	SinkSpec
	Created Time   `json:"created"`
	Rev     uint64 `json:"rev"`
}

// SinkSpec is what an operator sets.
type SinkSpec struct {
	Name string `json:"name"`
	Kind string `json:"kind"`
	// URL has no credentials in it: the signing key, or user and password, are the secret of the name CursorOf.
	URL string `json:"url"`
	// CA is the PEM of what the receiver's certificate is checked against beside the public ones.
	CA string `json:"ca,omitempty"`
	// Exchange is AMQP's.
	Exchange string `json:"exchange,omitempty"`
	// Topics and Types choose events; empty chooses all.
	Topics []string `json:"topics,omitempty"`
	Types  []string `json:"types,omitempty"`
	// Local allows addresses of this host and its link, where a cloud's metadata is too.
	Local    bool `json:"local,omitempty"`
	Disabled bool `json:"disabled,omitempty"`
}

// Kinds of sinks.
const (
	SinkWebhook = "webhook"
	SinkAMQP    = "amqp"
)

// Limits of sinks.
const (
	SinksMax        = 32
	sinkFiltersMax  = 64
	sinkCABytesMax  = 16 << 10
	sinkURLBytesMax = 2048
)

const (
	tSink      = "sink"
	sinkCursor = "sink-"
)

// CursorOf is the name of a sink's cursor.
func CursorOf(sink uuid.UUID) string { return sinkCursor + sink.String() }

func sinkTable(frame byte) object {
	o := rowObject[Sink](frame, tSink, map[string]index{
		byID:   always(func(s *Sink) []byte { return s.ID[:] }),
		byName: always(func(s *Sink) []byte { return []byte(s.Name) }),
	})
	o.commands = []func() Command{command[SetSink], command[DeleteSink]}
	o.check = func(v *View) error {
		for _, s := range v.Sinks() {
			if _, ok := v.Cursor(CursorOf(s.ID)); !ok {
				return fmt.Errorf("sink %s: no cursor", s.Name)
			}
		}
		return nil
	}
	return o
}

// SetSink makes or changes a sink. A new one gets the events that follow.
type SetSink struct {
	ID   uuid.UUID `json:"id"`
	Rev  uint64    `json:"rev,omitempty"`
	Spec SinkSpec  `json:"spec"`
}

func (*SetSink) kind() (string, int) { return "set_sink", 1 }

func (c *SetSink) check() error {
	object := "sink " + quote(c.Spec.Name)
	s := c.Spec
	switch {
	case c.ID == uuid.Nil:
		return invalid(object, "no id")
	case s.Kind != SinkWebhook && s.Kind != SinkAMQP:
		return invalid(object, "kind "+quote(s.Kind))
	case s.URL == "" || len(s.URL) > sinkURLBytesMax || !utf8.ValidString(s.URL):
		return invalid(object, "URL is missing, too long or not UTF-8")
	case len(s.CA) > sinkCABytesMax || !utf8.ValidString(s.CA) || len(s.Topics) > sinkFiltersMax || len(s.Types) > sinkFiltersMax:
		return invalid(object, "CA or filters too long")
	case len(s.Exchange) > NameBytesMax || !utf8.ValidString(s.Exchange):
		return invalid(object, "exchange too long or not UTF-8")
	}
	for _, f := range slices.Concat(s.Topics, s.Types) {
		if err := checkLabel("event", f); err != nil {
			return err
		}
	}
	return checkLabel("sink", s.Name)
}

func (c *SetSink) apply(t *tx) (Result, error) {
	object := "sink " + quote(c.Spec.Name)
	row := Sink{ID: c.ID, Created: t.at}
	have, found := first[Sink](&t.View, tSink, byID, c.ID[:])
	switch {
	case found:
		row = *have
		if err := fresh(object, c.Rev, row.Rev); err != nil {
			return Result{}, err
		}
	case c.Rev != 0:
		return Result{}, missing(object)
	case count[Sink](&t.View, tSink, byID, nil) >= SinksMax:
		return Result{}, &Error{Err: ErrNoSpace, Object: object, Detail: fmt.Sprintf("%d sinks", SinksMax)}
	}
	if other, ok := first[Sink](&t.View, tSink, byName, []byte(c.Spec.Name)); ok && other.ID != c.ID {
		return Result{}, &Error{Err: ErrExist, Object: object}
	}
	if !found {
		t.put(tCursor, &Cursor{Name: CursorOf(c.ID), Seq: t.EventsLast(), Rev: t.index})
	}
	row.SinkSpec, row.Rev = c.Spec, t.index
	row.Topics, row.Types = slices.Clone(row.Topics), slices.Clone(row.Types)
	t.put(tSink, &row)
	t.emit("config_changed", tSink, c.Spec.Name, nil)
	return Result{Object: c.ID, Created: !found}, nil
}

// DeleteSink takes a sink and its cursor away.
type DeleteSink struct {
	ID  uuid.UUID `json:"id"`
	Rev uint64    `json:"rev,omitempty"`
}

func (*DeleteSink) kind() (string, int) { return "delete_sink", 1 }

func (c *DeleteSink) check() error { return nil }

func (c *DeleteSink) apply(t *tx) (Result, error) {
	s, err := t.Sink(c.ID)
	if err != nil {
		return Result{}, err
	}
	if err := fresh("sink "+quote(s.Name), c.Rev, s.Rev); err != nil {
		return Result{}, err
	}
	if _, err := (&DeleteCursor{Name: CursorOf(c.ID)}).apply(t); err != nil {
		return Result{}, err
	}
	t.del(tSink, &s)
	t.emit("config_changed", tSink, s.Name, nil)
	return Result{Object: c.ID}, nil
}

// Sink returns one sink.
func (v *View) Sink(id uuid.UUID) (Sink, error) {
	s, ok := first[Sink](v, tSink, byID, id[:])
	if !ok {
		return Sink{}, missing("sink " + id.String())
	}
	return *s, nil
}

// SinkByName returns the sink of this name.
func (v *View) SinkByName(name string) (Sink, error) {
	s, ok := first[Sink](v, tSink, byName, []byte(name))
	if !ok {
		return Sink{}, missing("sink " + quote(name))
	}
	return *s, nil
}

// Sinks returns all sinks, by name.
func (v *View) Sinks() []Sink { return all[Sink](v, tSink, byName, nil) }
