package retention_test

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"varve/control/retention"
	"varve/control/state"
)

func zone(t testing.TB, name string) *time.Location {
	t.Helper()
	z, err := time.LoadLocation(name)
	if err != nil {
		t.Fatal(err)
	}
	return z
}

func at(t testing.TB, z *time.Location, s string) time.Time {
	t.Helper()
	when, err := time.ParseInLocation("2006-01-02 15:04", s, z)
	if err != nil {
		t.Fatal(err)
	}
	return when
}

// snaps reads "2026-03-01 10:00 c" lines: c consistent, s sticky, k has a clone, b a base, m by hand.
func snaps(t testing.TB, z *time.Location, lines string) []retention.Snapshot {
	t.Helper()
	var out []retention.Snapshot
	for line := range strings.Lines(lines) {
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		flags := ""
		if len(line) > 16 {
			flags = line[17:]
		}
		s := retention.Snapshot{Name: line[:16], Created: at(t, z, line[:16]), Automatic: !strings.Contains(flags, "m"),
			Consistent: strings.Contains(flags, "c"), Sticky: strings.Contains(flags, "s"), Base: strings.Contains(flags, "b")}
		if strings.Contains(flags, "k") {
			s.Clones = 2
		}
		binary.BigEndian.PutUint32(s.ID[:], uint32(len(out)+1))
		out = append(out, s)
	}
	return out
}

func names(d []retention.Decision) string {
	var out []string
	for _, x := range d {
		out = append(out, x.Name)
	}
	return strings.Join(out, "\n")
}

func trim(s string) string {
	var out []string
	for line := range strings.Lines(s) {
		if line = strings.TrimSpace(line); line != "" {
			out = append(out, line)
		}
	}
	return strings.Join(out, "\n")
}

func TestBuckets(t *testing.T) {
	const now = "2026-06-15 12:00" // a Monday
	for name, c := range map[string]struct {
		policy  state.Retention
		snaps   string
		removed string
	}{
		"all of today and yesterday stay": {retention.Default(), `
			2026-06-14 00:00
			2026-06-14 23:59
			2026-06-15 00:00
			2026-06-15 11:00`, ``},
		"first bucket: the newest": {retention.Default(), `
			2026-06-13 00:00
			2026-06-13 12:00
			2026-06-13 23:59`, `
			2026-06-13 00:00
			2026-06-13 12:00`},
		"first bucket: consistent before inconsistent": {retention.Default(), `
			2026-06-13 01:00 c
			2026-06-13 12:00 c
			2026-06-13 23:59`, `
			2026-06-13 01:00
			2026-06-13 23:59`},
		"other day buckets: the oldest, consistent or not": {retention.Default(), `
			2026-06-12 03:00
			2026-06-12 04:00 c
			2026-06-07 00:00
			2026-06-07 01:00 c`, `
			2026-06-12 04:00
			2026-06-07 01:00`},
		"week buckets: the oldest": {retention.Default(), `
			2026-05-31 00:00
			2026-06-03 00:00
			2026-06-06 23:59
			2026-05-17 00:00
			2026-05-23 23:59
			2026-05-24 00:00`, `
			2026-05-23 23:59
			2026-06-03 00:00
			2026-06-06 23:59`},
		"none older than 28 days": {retention.Default(), `
			2026-05-16 23:59
			2026-01-01 00:00
			2026-05-17 00:00`, `
			2026-01-01 00:00
			2026-05-16 23:59`},
		"never removed": {retention.Default(), `
			2020-01-01 00:00 s
			2020-01-01 01:00 k
			2020-01-01 02:00 b
			2020-01-01 03:00 m
			2020-01-01 04:00`, `
			2020-01-01 04:00`},
		"a sticky one does not stand in for its bucket's": {retention.Default(), `
			2026-06-12 01:00 s
			2026-06-12 02:00
			2026-06-12 03:00`, `
			2026-06-12 03:00`},
		"one from the future stays": {retention.Default(), `
			2026-06-15 13:00
			2027-01-01 00:00`, ``},
		"the newest n": {state.Retention{Last: 2}, `
			2026-06-01 00:00
			2026-06-02 00:00
			2026-06-03 00:00 s
			2026-06-04 00:00`, `
			2026-06-01 00:00`},
		"count cap over all rules": {state.Retention{AllDays: 2, CountMax: 3}, `
			2026-06-14 01:00
			2026-06-14 02:00
			2026-06-14 03:00 s
			2026-06-15 01:00
			2026-06-15 02:00`, `
			2026-06-14 01:00`},
		"age cap over all rules": {state.Retention{Last: 100, AgeDaysMax: 3}, `
			2026-06-11 23:59
			2026-06-12 00:00
			2026-06-11 00:00 m`, `
			2026-06-11 23:59`},
		"fridays for three weeks": {state.Retention{AllDays: 1, Weekdays: []state.RetentionWeekday{{Day: 5, Weeks: 3}}}, `
			2026-05-22 10:00
			2026-05-29 01:00
			2026-05-29 10:00 c
			2026-05-29 23:00
			2026-06-05 23:59
			2026-06-06 00:00
			2026-06-12 10:00
			2026-06-14 10:00`, `
			2026-05-22 10:00
			2026-05-29 01:00
			2026-05-29 23:00
			2026-06-06 00:00
			2026-06-14 10:00`},
		"today is such a weekday": {state.Retention{Weekdays: []state.RetentionWeekday{{Day: 1, Weeks: 2}}}, `
			2026-06-01 10:00
			2026-06-08 10:00
			2026-06-15 10:00
			2026-06-15 11:00`, `
			2026-06-01 10:00
			2026-06-15 10:00`},
		"no whole days: the first bucket is today": {state.Retention{Buckets: []state.RetentionBucket{{Days: 1, Count: 2}}}, `
			2026-06-13 10:00
			2026-06-14 10:00
			2026-06-14 11:00
			2026-06-15 10:00
			2026-06-15 11:00`, `
			2026-06-13 10:00
			2026-06-14 11:00
			2026-06-15 10:00`},
	} {
		for _, z := range []string{"UTC", "Europe/Brussels", "Pacific/Kiritimati", "Asia/Kathmandu"} {
			t.Run(name+" "+z, func(t *testing.T) {
				loc := zone(t, z)
				in := snaps(t, loc, c.snaps)
				keep, remove := retention.Plan(at(t, loc, now), loc, c.policy, in)
				removed := strings.Split(trim(c.removed), "\n")
				slices.Sort(removed)
				if got := names(remove); got != strings.Join(removed, "\n") {
					t.Errorf("removed\n%s\nwant\n%s", got, trim(c.removed))
				}
				if len(keep)+len(remove) != len(in) {
					t.Errorf("%d kept, %d removed of %d", len(keep), len(remove), len(in))
				}
				for _, d := range slices.Concat(keep, remove) {
					if d.Reason == "" {
						t.Errorf("%s: no reason", d.Name)
					}
				}
			})
		}
	}
}

// Days begin at the local midnight, whatever the clock does that night.
func TestDaysAtClockChanges(t *testing.T) {
	for name, c := range map[string]struct {
		zone, now     string
		kept, removed string // UTC instants
	}{
		"spring, a day of 23 hours": {"Europe/Brussels", "2026-03-30T10:00:00Z", "2026-03-28T23:00:00Z", "2026-03-28T22:59:59Z"},
		"autumn, a day of 25 hours": {"Europe/Brussels", "2026-10-26T10:00:00Z", "2026-10-24T22:00:00Z", "2026-10-24T21:59:59Z"},
		"south":                     {"Australia/Sydney", "2026-10-05T00:00:00Z", "2026-10-03T14:00:00Z", "2026-10-03T13:59:59Z"},
		"half an hour":              {"Australia/Lord_Howe", "2026-04-06T00:00:00Z", "2026-04-04T13:00:00Z", "2026-04-04T12:59:59Z"},
		"midnight does not exist":   {"Africa/Cairo", "2026-04-25T10:00:00Z", "2026-04-23T22:00:00Z", "2026-04-23T21:59:59Z"},
		"midnight comes twice":      {"America/Havana", "2026-11-02T15:00:00Z", "2026-11-01T04:00:00Z", "2026-11-01T03:59:59Z"},
		"a day that never was":      {"Pacific/Apia", "2012-01-01T00:00:00Z", "2011-12-30T10:00:00Z", "2011-12-30T09:59:59Z"},
	} {
		t.Run(name, func(t *testing.T) {
			utc := func(s string) time.Time {
				when, err := time.Parse(time.RFC3339, s)
				if err != nil {
					t.Fatal(err)
				}
				return when
			}
			in := []retention.Snapshot{{ID: uuid.UUID{1}, Automatic: true, Created: utc(c.removed)}, {ID: uuid.UUID{2}, Automatic: true, Created: utc(c.kept)}}
			_, remove := retention.Plan(utc(c.now), zone(t, c.zone), state.Retention{AllDays: 2}, in)
			if len(remove) != 1 || remove[0].ID != in[0].ID {
				t.Errorf("removed %+v", remove)
			}
		})
	}
}

// Weeks of hourly snapshots with the plan carried out every night: the shape that the policy names, at every moment, in
// every zone; and what a plan keeps, the same plan keeps again.
func TestWeeksOfSnapshots(t *testing.T) {
	for _, z := range []string{"UTC", "Europe/Brussels", "America/Sao_Paulo", "Australia/Lord_Howe"} {
		loc := zone(t, z)
		rng := rand.New(rand.NewPCG(3, uint64(len(z))))
		now := time.Date(2026, 2, 20, 0, 30, 0, 0, loc)
		end := now.AddDate(0, 0, 75)
		var live []retention.Snapshot
		for n := uint64(1); now.Before(end); n++ {
			s := retention.Snapshot{Created: now, Automatic: true, Consistent: rng.IntN(3) == 0}
			binary.BigEndian.PutUint64(s.ID[:], n)
			live = append(live, s)
			now = now.Add(time.Hour)
			if now.Hour() != 2 {
				continue
			}
			keep, _ := retention.Plan(now, loc, retention.Default(), live)
			live = live[:0]
			perDay := make(map[string]int)
			for _, k := range keep {
				live = append(live, k.Snapshot)
				perDay[k.Created.In(loc).Format(time.DateOnly)]++
			}
			if again, gone := retention.Plan(now, loc, retention.Default(), live); len(gone) != 0 || len(again) != len(live) {
				t.Fatalf("%s at %s: a second plan removes %d more", z, now, len(gone))
			}
			if now.Before(end.AddDate(0, 0, -30)) {
				continue // not filled yet
			}
			yesterday, old, weeks := now.AddDate(0, 0, -1).Format(time.DateOnly), 0, 0
			for day, count := range perDay {
				ago := int(now.Sub(at(t, loc, day+" 12:00")).Hours()+12) / 24
				switch {
				case day >= yesterday:
				case count != 1:
					t.Errorf("%s at %s: %d of day %s", z, now, count, day)
				case ago <= 8:
					old++
				default:
					weeks++
				}
				if ago > 30 {
					t.Errorf("%s at %s: %s is too old", z, now, day)
				}
			}
			if old != 7 || weeks < 3 || weeks > 4 || perDay[yesterday] < 23 {
				t.Errorf("%s at %s: %d of yesterday, %d single days, %d weeks", z, now, perDay[yesterday], old, weeks)
			}
		}
	}
}

func ExamplePlan() {
	day := func(n int) time.Time { return time.Date(2026, 6, n, 12, 0, 0, 0, time.UTC) }
	_, remove := retention.Plan(day(15), time.UTC, retention.Default(), []retention.Snapshot{
		{ID: uuid.UUID{1}, Name: "may", Created: day(15).AddDate(0, 0, -40), Automatic: true},
		{ID: uuid.UUID{2}, Name: "golden", Created: day(15).AddDate(-1, 0, 0), Automatic: true, Clones: 3},
		{ID: uuid.UUID{3}, Name: "new", Created: day(15), Automatic: true},
	})
	for _, d := range remove {
		fmt.Println(d.Name, "-", d.Reason)
	}
	// Output: may - no rule keeps it
}
