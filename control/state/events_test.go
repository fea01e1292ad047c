package state

import (
	"encoding/json"
	"strings"
	"testing"
)

func (m *machine) event(typ string) NewEvent {
	return NewEvent{ID: m.id(), At: Time(m.index), Type: typ, Topic: "volume", Key: "k"}
}

func TestEventsOrderedAndOnce(t *testing.T) {
	m := newMachine(t)
	from := m.s.View().EventsLast()
	a, b, c := m.event("volume_create"), m.event("volume_resize"), m.event("volume_delete")
	a.Data = json.RawMessage(`{ "size": 1, "name": "<x>" }`)
	m.must(&PublishEvents{Events: []NewEvent{a, b}})
	m.must(&PublishEvents{Events: []NewEvent{b, c, a}})
	v := m.s.View()
	got := v.Events(from, 100)
	if len(got) != 3 || got[0].Type != a.Type || got[1].Type != b.Type || got[2].Type != c.Type {
		t.Fatalf("events %+v", got)
	}
	if string(got[0].Data) != `{"size":1,"name":"\u003cx\u003e"}` {
		t.Fatalf("data %s", got[0].Data)
	}
	if got[1].Seq <= got[0].Seq || got[2].Seq <= got[1].Seq || v.EventsLast() != got[2].Seq {
		t.Fatalf("seqs %d %d %d, last %d", got[0].Seq, got[1].Seq, got[2].Seq, v.EventsLast())
	}
	if rest := v.Events(got[1].Seq, 100); len(rest) != 1 || rest[0].ID != c.ID {
		t.Fatalf("after the second: %+v", rest)
	}
	m.check()
}

// What escapes make too long for Apply is refused before it enters the log.
func TestEventThatGrowsIsRefused(t *testing.T) {
	m := newMachine(t)
	e := m.event("x")
	e.Data = json.RawMessage(`{"a":"` + strings.Repeat("<", EventDataBytesMax/2) + `"}`)
	m.fails(ErrInvalid, &PublishEvents{Events: []NewEvent{e}})
	e.Data = json.RawMessage(`[1]`)
	m.fails(ErrInvalid, &PublishEvents{Events: []NewEvent{e}})
	e.Data, e.Topic = nil, "Not a label"
	m.fails(ErrInvalid, &PublishEvents{Events: []NewEvent{e}})
	m.fails(ErrInvalid, &PublishEvents{Events: make([]NewEvent, EventsPerEntryMax+1)})
}

// The log stays bounded, and keeps what a cursor has not passed as long as it can.
func TestEventsTrim(t *testing.T) {
	m := newMachine(t)
	publish := func(n int) {
		for n > 0 {
			k := min(n, EventsPerEntryMax)
			events := make([]NewEvent, k)
			for i := range events {
				events[i] = m.event("volume_create")
			}
			m.must(&PublishEvents{Events: events})
			n -= k
		}
	}
	publish(EventsKept + 100)
	v := m.s.View()
	if log := v.eventLog(); log.Count != EventsKept || v.EventsTrimmed() == 0 || v.Events(0, 1)[0].Seq <= v.EventsTrimmed() {
		t.Fatalf("%+v", log)
	}
	held := v.Events(0, 1)[0].Seq
	m.must(&MoveCursor{Name: "webhook-a", Seq: held})
	m.must(&MoveCursor{Name: "webhook-a", Seq: held - 5})
	if at, ok := m.s.View().Cursor("webhook-a"); !ok || at != held {
		t.Fatal("a cursor moved back")
	}
	publish(2000)
	if log := m.s.View().eventLog(); log.Count != EventsKept+2000-1 || log.Trimmed != held {
		t.Fatalf("events that a cursor has not passed went away: %+v", log)
	}
	m.must(&DeleteCursor{Name: "webhook-a"})
	publish(200)
	if log := m.s.View().eventLog(); log.Count != EventsKept {
		t.Fatalf("%+v", log)
	}
	m.check()
}

func TestDomains(t *testing.T) {
	m := newMachine(t)
	rack := m.id()
	m.must(&SetDomain{ID: rack, Name: "rack-1"})
	m.fails(ErrExist, &SetDomain{ID: m.id(), Name: "rack-1"})
	m.fails(ErrInvalid, &SetDomain{ID: m.id(), Name: "Rack 1"})
	d, err := m.s.View().DomainByName("rack-1")
	if err != nil || d.ID != rack {
		t.Fatal(d, err)
	}
	m.must(&SetDomain{ID: rack, Name: "rack-a", Rev: d.Rev})
	if e := m.fails(ErrConflict, &SetDomain{ID: rack, Name: "rack-b", Rev: d.Rev}); e.Rev <= d.Rev {
		t.Fatal("the refusal does not name the present rev", e.Rev)
	}
	m.fails(ErrNotFound, &SetDomain{ID: m.id(), Name: "rack-c", Rev: 3})
	m.must(&DeleteDomain{ID: rack})
	m.fails(ErrNotFound, &DeleteDomain{ID: rack})
	m.check()
}

func TestWatch(t *testing.T) {
	m := newMachine(t)
	_, changed, err := m.s.Watch("event")
	if err != nil {
		t.Fatal(err)
	}
	m.must(&SetDomain{ID: m.id(), Name: "elsewhere"})
	select {
	case <-changed:
		t.Fatal("woken by another table")
	default:
	}
	m.must(&PublishEvents{Events: []NewEvent{m.event("x")}})
	select {
	case <-changed:
	default:
		t.Fatal("not woken")
	}
	if _, _, err := m.s.Watch("nothing"); err == nil {
		t.Fatal("a table that does not exist was watched")
	}
}

// Whoever waits on the state wakes when a snapshot replaces it.
func TestRestoreWakes(t *testing.T) {
	m := newMachine(t)
	m.must(&PublishEvents{Events: []NewEvent{m.event("x")}})
	_, changed, err := m.s.Watch("event")
	if err != nil {
		t.Fatal(err)
	}
	other := newMachine(t)
	if err := m.s.Restore(strings.NewReader(string(snapshotBytes(t, other.s)))); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
	default:
		t.Fatal("not woken")
	}
	if len(m.s.View().Events(0, 1)) != 0 {
		t.Fatal("the snapshot did not replace the state")
	}
}
