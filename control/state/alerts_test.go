package state

import "testing"

func TestAlerts(t *testing.T) {
	m := newMachine(t)
	types := func(from uint64) (out []string) {
		for _, e := range m.s.View().Events(from, 100) {
			out = append(out, e.Type+" "+e.Key)
		}
		return out
	}
	full := AlertSpec{Code: "log_full", Severity: "warning", Detail: "85 %", Remedy: "look at the backend"}
	away := AlertSpec{Code: "backend_away", Object: "vpool default", Severity: "error", Detail: "refused", Remedy: "start it"}
	from := m.s.View().EventsLast()
	m.must(&SetAlerts{Source: "health/n1", Alerts: []AlertSpec{full, away}})
	m.must(&SetAlerts{Source: "health/n2", Alerts: []AlertSpec{full}})
	since := m.s.View().AlertsOf("health/n1")[0].Since
	if got := types(from); len(got) != 3 {
		t.Fatal(got)
	}
	// The same again says nothing; a change of the words is no new alert.
	from = m.s.View().EventsLast()
	full.Detail = "90 %"
	m.must(&SetAlerts{Source: "health/n1", Alerts: []AlertSpec{away, full}})
	if got := m.s.View().AlertsOf("health/n1"); len(types(from)) != 0 || len(got) != 2 || got[1].Detail != "90 %" || got[1].Since != since {
		t.Fatal(types(from), got)
	}
	m.must(&SetAlerts{Source: "health/n1", Alerts: []AlertSpec{away}})
	if got := types(from); len(got) != 1 || got[0] != "alert_cleared log_full" || len(m.s.View().Alerts()) != 2 {
		t.Fatal(got, m.s.View().Alerts())
	}
	m.fails(ErrInvalid, &SetAlerts{Source: "x", Alerts: make([]AlertSpec, AlertsMax+1)})
	m.fails(ErrInvalid, &SetAlerts{Source: "", Alerts: nil})
	m.fails(ErrInvalid, &SetAlerts{Source: "x", Alerts: []AlertSpec{{Code: "c", Severity: "fatal"}}})
	m.check()
}
