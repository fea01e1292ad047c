package state

import (
	"fmt"
	"slices"

	"github.com/google/uuid"
)

// Alert is something that needs an operator's attention and lasts: it is raised once, stays while it holds, and is cleared.
type Alert struct {
	// Source is who looks after it ("health/<node>"): it tells all that holds, and what it tells no more is cleared.
	Source string `json:"source"`
	AlertSpec
	Since Time   `json:"since"`
	Rev   uint64 `json:"rev"`
}

// AlertSpec is what a check says. Code and Object tell one alert from another.
type AlertSpec struct {
	Code   string `json:"code"`
	Object string `json:"object,omitempty"`
	// Severity is "warning" (degraded yet serving) or "error" (an operator must act).
	Severity string    `json:"severity"`
	Detail   string    `json:"detail"`
	Remedy   string    `json:"remedy"`
	Node     uuid.UUID `json:"node,omitzero"`
}

// AlertsMax bounds the alerts of a source.
const (
	AlertsMax       = 100
	alertsInAllMax  = 10000
	severityWarning = "warning"
	severityError   = "error"
)

const tAlert = "alert"

func alertKey(source, code, object string) []byte {
	return []byte(source + "\x00" + code + "\x00" + object)
}

func alertTable(frame byte) object {
	o := rowObject[Alert](frame, tAlert, map[string]index{byID: always(func(a *Alert) []byte { return alertKey(a.Source, a.Code, a.Object) })})
	o.commands = []func() Command{command[SetAlerts]}
	return o
}

// SetAlerts says all that holds at a source. What it said before and says no more is cleared.
type SetAlerts struct {
	Source string      `json:"source"`
	Alerts []AlertSpec `json:"alerts"`
}

func (*SetAlerts) kind() (string, int) { return "set_alerts", 1 }

func (c *SetAlerts) check() error {
	object := "alerts of " + quote(c.Source)
	if len(c.Alerts) > AlertsMax {
		return invalid(object, fmt.Sprintf("%d, more than %d", len(c.Alerts), AlertsMax))
	}
	texts := []string{c.Source}
	for _, a := range c.Alerts {
		if err := checkLabel("alert", a.Code); err != nil {
			return err
		}
		if a.Severity != severityWarning && a.Severity != severityError {
			return invalid(object, "severity "+quote(a.Severity))
		}
		texts = append(texts, a.Object, a.Detail, a.Remedy)
	}
	for _, text := range texts {
		if err := checkText(object, text); err != nil {
			return err
		}
		if slices.Contains([]byte(text), 0) {
			return invalid(object, "a zero byte")
		}
	}
	if c.Source == "" {
		return invalid(object, "no source")
	}
	return nil
}

func (c *SetAlerts) apply(t *tx) (Result, error) {
	before := all[Alert](&t.View, tAlert, byID, []byte(c.Source+"\x00"))
	holds := make(map[string]bool)
	for _, a := range c.Alerts {
		holds[string(alertKey(c.Source, a.Code, a.Object))] = true
	}
	for _, a := range before {
		if !holds[string(alertKey(c.Source, a.Code, a.Object))] {
			t.del(tAlert, &a)
			t.emit("alert_cleared", tAlert, a.Code, a.AlertSpec)
		}
	}
	for _, a := range c.Alerts {
		row := Alert{Source: c.Source, AlertSpec: a, Since: t.at, Rev: t.index}
		if have, ok := first[Alert](&t.View, tAlert, byID, alertKey(c.Source, a.Code, a.Object)); ok {
			if have.AlertSpec == a {
				continue
			}
			row.Since = have.Since
			t.put(tAlert, &row)
			continue
		}
		if count[Alert](&t.View, tAlert, byID, nil) >= alertsInAllMax {
			return Result{}, &Error{Err: ErrNoSpace, Object: "alerts of " + quote(c.Source), Detail: fmt.Sprintf("%d alerts", alertsInAllMax)}
		}
		t.put(tAlert, &row)
		t.emit("alert_raised", tAlert, a.Code, a)
	}
	return Result{}, nil
}

// Alerts returns all that hold, by source.
func (v *View) Alerts() []Alert { return all[Alert](v, tAlert, byID, nil) }

// AlertsOf returns what holds at a source.
func (v *View) AlertsOf(source string) []Alert {
	return all[Alert](v, tAlert, byID, []byte(source+"\x00"))
}
