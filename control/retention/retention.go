// Package retention decides which automatic snapshots of a vDisk stay. It is a pure function of the time, the time zone, the
// policy and the snapshots, so a plan can be shown before it is carried out.
//
// Time is cut at local midnights, counted back from today; a day has 23, 24 or 25 hours as the zone says.
//
//	now ── today ── AllDays-1 days ──┬── first bucket ──┬── bucket ──┬── … ──┬── nothing is wanted
//	      every snapshot             │ the best         │ the oldest │       │
//
// The best is the newest consistent one, or the newest if none is consistent; the first bucket is where a snapshot passes
// from "all of them" to "one of them", so it is chosen by quality; what is older was chosen there already, and the oldest
// is the one that the next coarser bucket will want. The default keeps all of today and yesterday, then one per day for 7
// days, one per week for 3 weeks, and so none older than 28 days before yesterday's midnight.
//
// A snapshot stays when a rule wants it (a bucket, Last, Weekdays) and no cap (CountMax, AgeDaysMax) forbids it. Never
// removed: one made by hand, a sticky one, the parent of a clone, the newest common base of a replication. Such a snapshot
// does not stand in for the one that its bucket keeps, because it can lose its protection at any time.
package retention

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"varve/control/state"
)

// Snapshot is what a decision rests on.
type Snapshot struct {
	ID         uuid.UUID
	Name       string
	Created    time.Time
	Consistent bool
	Automatic  bool
	Sticky     bool
	// Clones counts the clones that hang on it; Base says that it is the newest common base of a replication.
	Clones int
	Base   bool
}

// Decision is what becomes of a snapshot, and why.
type Decision struct {
	Snapshot
	Reason string
}

// Default is the retention where no policy says otherwise.
func Default() state.Retention {
	return state.Retention{AllDays: 2, Buckets: []state.RetentionBucket{{Days: 1, Count: 7}, {Days: 7, Count: 3}}}
}

// Plan decides on every snapshot. Both lists are oldest first.
func Plan(now time.Time, zone *time.Location, p state.Retention, snaps []Snapshot) (keep, remove []Decision) {
	c := calendar{now: now.In(zone)}
	all := slices.Clone(snaps)
	slices.SortStableFunc(all, func(a, b Snapshot) int {
		return cmp.Or(a.Created.Compare(b.Created), slices.Compare(a.ID[:], b.ID[:]))
	})
	wanted := c.wanted(p, all)
	c.cap(p, all, wanted)
	for i, s := range all {
		reason := protection(s)
		if reason == "" {
			reason = wanted[i].keep
		}
		if reason != "" {
			keep = append(keep, Decision{Snapshot: s, Reason: reason})
			continue
		}
		remove = append(remove, Decision{Snapshot: s, Reason: cmp.Or(wanted[i].drop, "no rule keeps it")})
	}
	return keep, remove
}

func protection(s Snapshot) string {
	switch {
	case !s.Automatic:
		return "made by hand"
	case s.Sticky:
		return "sticky"
	case s.Clones > 0:
		return fmt.Sprintf("parent of %d clones", s.Clones)
	case s.Base:
		return "base of a replication"
	}
	return ""
}

// verdict on one snapshot: why a rule keeps it, or why it goes.
type verdict struct{ keep, drop string }

type calendar struct{ now time.Time }

// midnight is the start of the local day that many days before today; negative is in the future.
func (c calendar) midnight(daysAgo int) time.Time {
	y, m, d := c.now.Date()
	return startOfDay(y, m, d-daysAgo, c.now.Location())
}

// startOfDay is the first instant of a local day, also where its midnight does not exist or comes twice.
func startOfDay(y int, m time.Month, d int, zone *time.Location) time.Time {
	want := time.Date(y, m, d, 0, 0, 0, 0, time.UTC).Day()
	t := time.Date(y, m, d, 0, 0, 0, 0, zone)
	if t.Day() != want || t.Hour() != 0 || t.Minute() != 0 {
		// Midnight is skipped: the day starts where the clock leaps.
		before := t.Add(-2 * time.Hour)
		if _, leap := before.ZoneBounds(); !leap.IsZero() && leap.Sub(before) <= 4*time.Hour {
			return leap.In(zone)
		}
	}
	if earlier := t.Add(-time.Hour); earlier.Day() == want {
		return earlier
	}
	return t
}

// wanted applies the rules, each for itself.
func (c calendar) wanted(p state.Retention, all []Snapshot) []verdict {
	out := make([]verdict, len(all))
	want := func(i int, why string) {
		if i >= 0 && out[i].keep == "" {
			out[i].keep = why
		}
	}
	days := p.AllDays - 1
	edge := c.midnight(days)
	for i, s := range all {
		if p.AllDays > 0 && !s.Created.Before(edge) || s.Created.After(c.now) {
			want(i, "of the days that are kept whole")
		}
	}
	first := true
	for _, b := range p.Buckets {
		for range b.Count {
			days += b.Days
			start := c.midnight(days)
			chosen, why := oldest(all, start, edge), fmt.Sprintf("oldest of the %d days from %s", b.Days, start.Format(time.DateOnly))
			if first {
				chosen, why = best(all, start, edge), fmt.Sprintf("best of the %d days from %s", b.Days, start.Format(time.DateOnly))
			}
			want(chosen, why)
			edge, first = start, false
		}
	}
	for i, n := len(all)-1, p.Last; i >= 0 && n > 0; i-- {
		if candidate(all[i]) {
			want(i, fmt.Sprintf("one of the newest %d", p.Last))
			n--
		}
	}
	for _, w := range p.Weekdays {
		ago := (int(c.now.Weekday()) - w.Day + 7) % 7
		for range w.Weeks {
			want(best(all, c.midnight(ago), c.midnight(ago-1)), "of a "+time.Weekday(w.Day).String())
			ago += 7
		}
	}
	return out
}

// cap takes the keep from what is too old or too much.
func (c calendar) cap(p state.Retention, all []Snapshot, v []verdict) {
	edge := c.midnight(p.AgeDaysMax)
	left := p.CountMax
	for i := len(all) - 1; i >= 0; i-- {
		if v[i].keep == "" || !candidate(all[i]) {
			continue
		}
		if p.AgeDaysMax > 0 && all[i].Created.Before(edge) {
			v[i] = verdict{drop: fmt.Sprintf("older than %d days", p.AgeDaysMax)}
			continue
		}
		if p.CountMax > 0 {
			if left--; left < 0 {
				v[i] = verdict{drop: fmt.Sprintf("more than %d", p.CountMax)}
			}
		}
	}
}

// candidate says that rules and caps count a snapshot.
func candidate(s Snapshot) bool { return protection(s) == "" }

// oldest and best return the index of the one that [start, end) keeps, -1 where it holds none.
func oldest(all []Snapshot, start, end time.Time) int {
	return slices.IndexFunc(all, func(s Snapshot) bool { return candidate(s) && within(s, start, end) })
}

func best(all []Snapshot, start, end time.Time) int {
	found := -1
	for i, s := range all {
		if candidate(s) && within(s, start, end) && (found < 0 || s.Consistent || !all[found].Consistent) {
			found = i
		}
	}
	return found
}

func within(s Snapshot, start, end time.Time) bool {
	return !s.Created.Before(start) && s.Created.Before(end)
}
