// Package schedule starts recurring tasks. It takes the place of Celery beat.
//
// An entry is a name with a default; a row of the state overrides or disables it on the cluster, a vPool or a vDisk. Every
// scope that has a row runs on its own, for the vDisks that have no nearer row: a task gets its scope as an argument and
// asks Members who that is at the moment it runs. So ten thousand vDisks cost one task an hour, and a vDisk that is made,
// moved or given its own schedule meanwhile is neither missed nor served twice.
//
//	while this node leads:
//	  for every entry and every scope that has it:
//	    due = the last time of its cron that is not after now and later than the last run       (missed runs become one)
//	    commit DispatchSchedule(last, due, task): sets the last run and queues the task in one step,
//	                                              refused where another leader was faster
//
// Times are local: an entry with fixed hours runs once a day also on the days when the clock changes, at the moment of the
// change if its time is skipped, at the first of the two if it comes twice. An entry for every hour goes by real time, so
// it runs 23 or 25 times on those days. (robfig/cron, whose parser this uses, leaves skipped times out and runs doubled
// ones twice.)
package schedule

import (
	"fmt"
	"math/bits"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/robfig/cron/v3"

	"varve/control/policy"
	"varve/control/state"
)

const cronBytesMax = 200

// Cron is when something runs.
type Cron struct {
	zone *time.Location
	s    cron.Schedule
	// fixed: it names hours, so it goes by the clock on the wall.
	fixed bool
}

// ParseCron reads five fields (minute hour day month weekday), @hourly, @daily, @weekly, @monthly, @yearly or @every DURATION
// of at least a minute; zone is an IANA name, "" is UTC.
func ParseCron(text, zone string) (Cron, error) {
	refuse := func(detail string) (Cron, error) {
		return Cron{}, &state.Error{Err: state.ErrInvalid, Object: fmt.Sprintf("schedule %.60q", text), Field: "cron", Detail: detail,
			Remedy: "write minute hour day month weekday, such as \"30 2 * * *\", or @hourly, @daily, @every 5m"}
	}
	if len(text) > cronBytesMax || strings.Contains(text, "TZ=") {
		return refuse("too long, or with a time zone in it")
	}
	if zone == "" {
		zone = "UTC"
	}
	if err := policy.CheckZone(zone); err != nil {
		return Cron{}, err
	}
	loc, err := time.LoadLocation(zone)
	if err != nil {
		return Cron{}, fmt.Errorf("time zone of schedule: %w", err)
	}
	s, err := cron.NewParser(cron.Minute | cron.Hour | cron.Dom | cron.Month | cron.Dow | cron.Descriptor).Parse(text)
	if err != nil {
		return refuse(err.Error())
	}
	c := Cron{zone: loc, s: s}
	switch k := s.(type) {
	case *cron.SpecSchedule:
		// Its own zone decides what "every hour" means; a spec with fixed hours is asked in UTC and read as wall clock.
		const hours = 1<<24 - 1
		c.fixed = bits.OnesCount64(k.Hour&hours) != 24
		k.Location = loc
		if c.fixed {
			k.Location = time.UTC
		}
	case cron.ConstantDelaySchedule:
		if k.Delay < time.Minute {
			return refuse("more often than once a minute")
		}
	default:
		return refuse("of an unknown kind")
	}
	return c, nil
}

// Next is the first time after t; the zero time where there is none within five years.
func (c Cron) Next(t time.Time) time.Time {
	if !c.fixed {
		return c.s.Next(t.In(c.zone))
	}
	local := t.In(c.zone)
	wall := time.Date(local.Year(), local.Month(), local.Day(), local.Hour(), local.Minute(), local.Second(), 0, time.UTC)
	// A time that was passed already when the clock was set back is not taken again; that is at most a day of them.
	for range 24 * 60 {
		wall = c.s.Next(wall)
		if wall.IsZero() {
			return time.Time{}
		}
		if at := c.instant(wall); at.After(t) {
			return at
		}
	}
	return time.Time{}
}

// instant is when the clock on the wall first shows a time, or where it leaps over it.
func (c Cron) instant(wall time.Time) time.Time {
	at := time.Date(wall.Year(), wall.Month(), wall.Day(), wall.Hour(), wall.Minute(), 0, 0, c.zone)
	if at.Hour() != wall.Hour() || at.Minute() != wall.Minute() {
		before := at.Add(-3 * time.Hour)
		if _, leap := before.ZoneBounds(); !leap.IsZero() {
			return leap
		}
		return at
	}
	for _, back := range []time.Duration{time.Hour, 30 * time.Minute} {
		if e := at.Add(-back); e.Hour() == wall.Hour() && e.Minute() == wall.Minute() && e.Day() == wall.Day() {
			return e
		}
	}
	return at
}

// missedFrom bounds how far back missed times are counted one by one.
const missedFrom = 48 * time.Hour

// Due is the last time after last that is not after now; the zero time where there is none.
func (c Cron) Due(last, now time.Time) time.Time {
	from := last
	if near := now.Add(-missedFrom); near.After(last) {
		if first := c.Next(near); !first.IsZero() && !first.After(now) {
			from = near
		}
	}
	var due time.Time
	for range 2 * 48 * 60 {
		next := c.Next(from)
		if next.IsZero() || next.After(now) {
			break
		}
		due, from = next, next
	}
	return due
}

// Entry is a recurring task that this version knows.
type Entry struct {
	Name string
	// Task is the type of task that runs.
	Task string
	Cron string
	// PerVDisk: it can be set on a vPool and a vDisk, else on the cluster alone.
	PerVDisk bool
	// Why says what the schedule is for.
	Why string
}

// Defaults are the entries of a cluster where no row says otherwise.
func Defaults() []Entry {
	return []Entry{
		{"snapshot", "snapshot.automatic", "0 * * * *", true, "a snapshot of every vDisk that is no template"},
		{"retention", "snapshot.retention", "30 0 * * *", true, "removal of the automatic snapshots that the policy does not keep"},
		{"scrub", "vpool.scrub", "15 * * * *", true, "reclaiming dead blocks where the space overhead passes its target"},
		{"verify", "vpool.verify", "45 1 * * *", true, "reading a part of all checksums, so that all are read in the policy's time"},
		{"health", "cluster.health", "*/5 * * * *", false, "the health check"},
		{"reality", "cluster.reality", "50 * * * *", false, "comparing what the state says with what is there"},
		{"orphans", "cluster.orphans", "20 3 * * *", false, "comparing the backends with what the volumes refer to"},
		{"certificates", "cluster.certificates", "40 4 * * *", false, "renewing certificates that end soon"},
	}
}

// Args is what a scheduled task gets.
type Args struct {
	Schedule string    `json:"schedule"`
	Scope    state.Ref `json:"scope"`
	// Due is the time it was scheduled for.
	Due state.Time `json:"due"`
	// Only is the one vPool that somebody asked for, whatever the schedules.
	Only uuid.UUID `json:"only,omitzero"`
}

// Setting is what holds for an entry on a scope.
type Setting struct {
	Entry Entry
	Scope state.Ref
	Spec  state.ScheduleSpec
	// Default says that no row was set.
	Default bool
	since   state.Time
	rev     uint64
}

// settings returns every scope on which an entry runs or is disabled: the cluster's, and each row's.
func settings(v *state.View, entries []Entry) []Setting {
	byName := make(map[string]Entry, len(entries))
	cluster, _ := v.Cluster()
	var out []Setting
	for _, e := range entries {
		byName[e.Name] = e
		if _, ok := v.Schedule(e.Name, state.ScopeOfCluster()); !ok {
			out = append(out, Setting{Entry: e, Scope: state.ScopeOfCluster(), Spec: state.ScheduleSpec{Cron: e.Cron, Zone: clusterZone(v)},
				Default: true, since: cluster.Created})
		}
	}
	for _, row := range v.Schedules() {
		e, known := byName[row.Name]
		if !known {
			e = Entry{Name: row.Name, Task: row.Task, Cron: row.Cron, Why: "set by an operator"}
		}
		s := Setting{Entry: e, Scope: row.Scope, Spec: row.ScheduleSpec, since: row.Modified, rev: row.Rev}
		if s.Spec.Cron == "" {
			s.Spec.Cron = e.Cron
		}
		if s.Spec.Zone == "" {
			s.Spec.Zone = clusterZone(v)
		}
		out = append(out, s)
	}
	return out
}

// ZoneKey is the config key of the time zone of schedules that name none.
const ZoneKey = "cluster.time_zone"

func clusterZone(v *state.View) string {
	if k, err := v.Config(ZoneKey); err == nil {
		return k.Value
	}
	return ""
}

// ScopeOf is the scope whose row, or default, of an entry holds for a volume.
func ScopeOf(v *state.View, name string, vol state.Volume) state.Ref {
	for _, at := range state.ScopesOf(vol) {
		if _, ok := v.Schedule(name, at); ok {
			return at
		}
	}
	return state.ScopeOfCluster()
}

// Members returns the volumes of vDisks that a run of an entry on a scope is for: those that no nearer row takes.
func Members(v *state.View, name string, scope state.Ref) []state.Volume {
	var pools []state.VPool
	switch scope.Kind {
	case state.ScopeCluster:
		pools = v.VPools()
	case state.ScopeVPool:
		if p, err := v.VPoolByID(scope.ID); err == nil {
			pools = []state.VPool{p}
		}
	case state.ScopeVDisk:
		if vol, err := v.Volume(scope.ID); err == nil {
			return []state.Volume{vol}
		}
	}
	var out []state.Volume
	for _, p := range pools {
		for _, vol := range v.VolumesOf(p.FSID) {
			if vol.Kind == state.DiskVolume && ScopeOf(v, name, vol) == scope {
				out = append(out, vol)
			}
		}
	}
	return out
}
