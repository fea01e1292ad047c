package schedule_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"

	"varve/control/schedule"
	"varve/control/state"
)

func parse(t testing.TB, spec, zone string) schedule.Cron {
	t.Helper()
	c, err := schedule.ParseCron(spec, zone)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// The runs of a day on which the clock changes, in local time.
func TestClockChanges(t *testing.T) {
	for name, c := range map[string]struct{ spec, zone, after, want string }{
		"every day":                        {"30 0 * * *", "Europe/Brussels", "2026-06-01T12:00:00+02:00", "02 00:30 CEST|03 00:30 CEST"},
		"skipped time: when it leaps":      {"30 2 * * *", "Europe/Brussels", "2026-03-28T12:00:00+01:00", "29 03:00 CEST|30 02:30 CEST|31 02:30 CEST"},
		"doubled time: the first":          {"30 2 * * *", "Europe/Brussels", "2026-10-24T12:00:00+02:00", "25 02:30 CEST|26 02:30 CET|27 02:30 CET"},
		"from between the two":             {"30 2 * * *", "Europe/Brussels", "2026-10-25T02:45:00+02:00", "26 02:30 CET"},
		"from the second":                  {"30 2 * * *", "Europe/Brussels", "2026-10-25T02:45:00+01:00", "26 02:30 CET"},
		"every hour in spring":             {"0 * * * *", "Europe/Brussels", "2026-03-29T00:30:00+01:00", "29 01:00 CET|29 03:00 CEST|29 04:00 CEST"},
		"every hour in autumn":             {"0 * * * *", "Europe/Brussels", "2026-10-25T01:30:00+02:00", "25 02:00 CEST|25 02:00 CET|25 03:00 CET"},
		"every other hour in spring":       {"0 */2 * * *", "Europe/Brussels", "2026-03-29T00:30:00+01:00", "29 03:00 CEST|29 04:00 CEST"},
		"midnight that does not exist":     {"0 0 * * *", "Africa/Cairo", "2026-04-23T12:00:00+02:00", "24 01:00 EEST|25 00:00 EEST"},
		"midnight that comes twice":        {"0 0 * * *", "America/Havana", "2026-10-31T12:00:00-04:00", "01 00:00 CDT|02 00:00 CST"},
		"half an hour":                     {"15 2 * * *", "Australia/Lord_Howe", "2026-10-03T12:00:00+10:30", "04 02:30 +11|05 02:15 +11"},
		"only on mondays":                  {"0 1 * * 1", "UTC", "2026-06-13T00:00:00Z", "15 01:00 UTC|22 01:00 UTC"},
		"the last of february":             {"0 0 29 2 *", "UTC", "2026-06-13T00:00:00Z", "29 00:00 UTC"},
		"never":                            {"0 0 31 2 *", "UTC", "2026-06-13T00:00:00Z", ""},
		"every five minutes over a change": {"*/5 * * * *", "Europe/Brussels", "2026-03-29T01:53:00+01:00", "29 01:55 CET|29 03:00 CEST"},
	} {
		t.Run(name, func(t *testing.T) {
			at, err := time.Parse(time.RFC3339, c.after)
			if err != nil {
				t.Fatal(err)
			}
			loc, _ := time.LoadLocation(c.zone)
			cron := parse(t, c.spec, c.zone)
			want := strings.Split(c.want, "|")
			if c.want == "" {
				if next := cron.Next(at); !next.IsZero() {
					t.Fatalf("next is %s", next)
				}
				return
			}
			for _, w := range want {
				next := cron.Next(at)
				if got := next.In(loc).Format("02 15:04 MST"); got != w {
					t.Fatalf("after %s: %s, want %s", at.In(loc), got, w)
				}
				at = next
			}
		})
	}
}

// Next is always later, and everything between is reached: no run is passed over from one nanosecond to the next.
func TestNextGrows(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for _, zone := range []string{"UTC", "Europe/Brussels", "Africa/Cairo", "America/Havana", "Australia/Lord_Howe"} {
		for _, spec := range []string{"0 * * * *", "30 2 * * *", "*/5 * * * *", "0 0 * * *", "15,45 1-3 * * *", "@every 90m"} {
			c := parse(t, spec, zone)
			for range 200 {
				at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC).Add(time.Duration(rng.Int64N(int64(366 * 24 * time.Hour))))
				next := c.Next(at)
				if !next.After(at) || next.Sub(at) > 50*time.Hour {
					t.Fatalf("%s %s: after %s comes %s", spec, zone, at, next)
				}
				if spec[0] == '@' {
					continue
				}
				if between := at.Add(time.Duration(rng.Int64N(int64(next.Sub(at))))); !c.Next(between).Equal(next) {
					t.Fatalf("%s %s: after %s comes %s, after %s %s", spec, zone, at, next, between, c.Next(between))
				}
			}
		}
	}
}

func TestMissedRunsBecomeOne(t *testing.T) {
	at := func(s string) time.Time {
		when, err := time.Parse(time.RFC3339, s)
		if err != nil {
			t.Fatal(err)
		}
		return when
	}
	for _, c := range []struct{ spec, last, now, want string }{
		{"0 * * * *", "2026-06-01T10:00:00Z", "2026-06-01T10:59:59Z", ""},
		{"0 * * * *", "2026-06-01T10:00:00Z", "2026-06-01T11:00:00Z", "2026-06-01T11:00:00Z"},
		{"0 * * * *", "2026-06-01T10:00:00Z", "2026-06-01T15:30:00Z", "2026-06-01T15:00:00Z"},
		{"0 * * * *", "2020-06-01T10:00:00Z", "2026-06-01T15:30:00Z", "2026-06-01T15:00:00Z"},
		{"0 0 1 1 *", "1970-01-01T00:00:00Z", "2026-06-01T15:30:00Z", "2026-01-01T00:00:00Z"},
		{"0 0 1 1 *", "2026-01-01T00:00:00Z", "2026-06-01T15:30:00Z", ""},
	} {
		got := parse(t, c.spec, "").Due(at(c.last), at(c.now))
		if c.want == "" && !got.IsZero() || c.want != "" && !got.Equal(at(c.want)) {
			t.Errorf("%+v: due %s", c, got)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for _, c := range [][2]string{{"", ""}, {"* * * *", ""}, {"61 * * * *", ""}, {"TZ=UTC 0 * * * *", ""}, {"CRON_TZ=0", ""}, {"@every 1s", ""},
		{"@every -5m", ""}, {"@reboot", ""}, {"0 * * * *", "Mars/Olympus"}, {"0 * * * *", "Local"}, {"0 * * * *", "../etc/passwd"},
		{strings.Repeat("1,", 200) + "1 * * * *", ""}} {
		if _, err := schedule.ParseCron(c[0], c[1]); !errors.Is(err, state.ErrInvalid) {
			t.Errorf("%q %q: %v", c[0], c[1], err)
		}
	}
}

func FuzzParseCron(f *testing.F) {
	for _, s := range []string{"0 * * * *", "*/5 1-3 * * 1", "@daily", "@every 5m", "TZ=0"} {
		f.Add(s, "Europe/Brussels")
	}
	f.Fuzz(func(t *testing.T, spec, zone string) {
		c, err := schedule.ParseCron(spec, zone)
		if err != nil {
			return
		}
		now := time.Date(2026, 3, 29, 1, 30, 0, 0, time.UTC)
		if next := c.Next(now); !next.IsZero() && !next.After(now) {
			t.Fatalf("%q: next %s", spec, next)
		}
	})
}

// cluster is a state with a log in memory.
type cluster struct {
	store *state.Store
	mu    sync.Mutex
	index uint64
	down  bool
	// ambiguous makes some proposals fail after their effect.
	ambiguous func() bool
}

func newCluster(t *testing.T) *cluster {
	t.Helper()
	c := &cluster{store: state.New()}
	c.must(t, &state.InitCluster{ID: uuid.New(), Format: state.Format})
	return c
}

var errNoQuorum = errors.New("no quorum")

func (c *cluster) Apply(_ context.Context, cmd state.Command) (state.Result, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.down {
		return state.Result{}, errNoQuorum
	}
	entry, err := state.Encode(cmd, uuid.New(), state.Time(time.Now().UnixNano()))
	if err != nil {
		return state.Result{}, err
	}
	c.index++
	res, err := c.store.Apply(c.index, entry)
	if c.ambiguous != nil && c.ambiguous() {
		return state.Result{}, errNoQuorum
	}
	return res, err
}

func (c *cluster) must(t *testing.T, cmd state.Command) state.Result {
	t.Helper()
	res, err := c.Apply(context.Background(), cmd)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

func (c *cluster) setDown(down bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.down = down
}

func taskOf(typ, object, by string, args json.RawMessage) (state.TaskSpec, error) {
	if strings.HasPrefix(typ, "unknown") {
		return state.TaskSpec{}, &state.Error{Err: state.ErrInvalid, Object: typ}
	}
	return state.TaskSpec{Type: typ, Queue: state.QueueGeneric, Object: object, By: by, Args: args}, nil
}

func dispatcher(c *cluster, entries []schedule.Entry) *schedule.Dispatcher {
	return schedule.New(schedule.Config{Raft: c, Store: c.store, Entries: entries, Task: taskOf})
}

func running(f func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = f(ctx) })
	return func() { cancel(); wg.Wait() }
}

// dues are the due times of all tasks of a schedule.
func dues(t *testing.T, c *cluster, name string) map[time.Time]int {
	t.Helper()
	out := make(map[time.Time]int)
	c.store.View().Tasks(func(task *state.Task) bool {
		var args schedule.Args
		if err := json.Unmarshal(task.Args, &args); err != nil {
			t.Error(err)
		}
		if args.Schedule == name {
			out[time.Unix(0, int64(args.Due)).UTC()]++
		}
		return true
	})
	return out
}

// Three weeks of an hourly schedule while leaders change, overlap, and lose answers: each hour has one task.
func TestNothingLostOrDoubled(t *testing.T) {
	for seed := range uint64(6) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const hours = 21 * 24
				rng := rand.New(rand.NewPCG(seed, 9))
				c := newCluster(t)
				var mu sync.Mutex
				c.ambiguous = func() bool { mu.Lock(); defer mu.Unlock(); return rng.IntN(4) == 0 }
				roll := func(n int) int { mu.Lock(); defer mu.Unlock(); return rng.IntN(n) }
				entries := []schedule.Entry{{Name: "snapshot", Task: "x", Cron: "0 * * * *", PerVDisk: true, Why: "test"}}
				began := time.Now()
				stop := running(dispatcher(c, entries).Run)
				for time.Since(began) < hours*time.Hour-time.Minute {
					time.Sleep(time.Duration(1+roll(9*3600)) * time.Second)
					// The next leader starts before the old one has noticed, or a while after it has stopped.
					if roll(2) == 0 {
						next := running(dispatcher(c, entries).Run)
						time.Sleep(time.Duration(roll(200)) * time.Second)
						stop()
						stop = next
					} else {
						stop()
						time.Sleep(time.Duration(roll(50)) * time.Minute)
						stop = running(dispatcher(c, entries).Run)
					}
				}
				// The last leader has to have had time to look.
				time.Sleep(max(began.Add(hours*time.Hour+time.Minute).Sub(time.Now()), 2*time.Minute))
				stop()
				got := dues(t, c, "snapshot")
				for h := 1; h <= hours; h++ {
					if n := got[began.UTC().Add(time.Duration(h)*time.Hour)]; n != 1 {
						t.Errorf("seed %d: hour %d has %d tasks", seed, h, n)
					}
				}
			})
		})
	}
}

// A day without a leader is one run, not twenty-four.
func TestOutageCoalesces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		entries := []schedule.Entry{{Name: "snapshot", Task: "x", Cron: "0 * * * *", Why: "test"}}
		stop := running(dispatcher(c, entries).Run)
		time.Sleep(150 * time.Minute)
		c.setDown(true)
		time.Sleep(24 * time.Hour)
		c.setDown(false)
		time.Sleep(5 * time.Minute)
		stop()
		if got := dues(t, c, "snapshot"); len(got) != 3 {
			t.Errorf("runs %v", got)
		}
	})
}

// A clock that was ahead does not stop a schedule for as long as it was.
func TestClockSetBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		entries := []schedule.Entry{{Name: "snapshot", Task: "x", Cron: "0 * * * *", Why: "test"}}
		ahead := schedule.New(schedule.Config{Raft: c, Store: c.store, Entries: entries, Task: taskOf,
			Now: func() time.Time { return time.Now().AddDate(5, 0, 0) }})
		stop := running(ahead.Run)
		time.Sleep(time.Minute)
		stop()
		before := len(dues(t, c, "snapshot"))
		stop = running(dispatcher(c, entries).Run)
		time.Sleep(3 * time.Hour)
		stop()
		if got := len(dues(t, c, "snapshot")) - before; got != 3 {
			t.Errorf("%d runs in three hours", got)
		}
	})
}

var pool = uuid.MustParse("aaaaaaaa-0000-4000-8000-000000000001")

func (c *cluster) disk(t *testing.T, name string) state.Volume {
	t.Helper()
	res := c.must(t, &state.CreateInode{FSID: state.FSIDOf(pool), Parent: state.RootIno, Name: name, Kind: state.File, How: state.Guarded,
		Mode: 0o644, Volume: uuid.New(), Size: 1 << 20})
	vol, err := c.store.View().Volume(res.Volume)
	if err != nil {
		t.Fatal(err)
	}
	return vol
}

// The nearest scope that has a row takes a vDisk, runs at its own times, and a disabled one at none.
func TestOverrides(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := context.Background()
		c := newCluster(t)
		c.must(t, &state.CreateVPool{ID: pool, Name: "default", Backend: state.Backend{Kind: "local", Dir: "/a"}, Key: make([]byte, 32), Mode: 0o755})
		plain, often, never := c.disk(t, "plain.raw"), c.disk(t, "often.raw"), c.disk(t, "never.raw")
		c.disk(t, "no-disk.vmx")
		d := dispatcher(c, []schedule.Entry{{Name: "snapshot", Task: "x", Cron: "0 * * * *", PerVDisk: true, Why: "test"},
			{Name: "health", Task: "y", Cron: "*/5 * * * *", Why: "test"}})
		stop := running(d.Run)
		scope := func(v state.Volume) state.Ref { return state.Ref{Kind: state.ScopeVDisk, ID: v.ID} }
		if err := d.Set(ctx, "snapshot", scope(often), 0, state.ScheduleSpec{Cron: "*/10 * * * *"}); err != nil {
			t.Fatal(err)
		}
		if err := d.Set(ctx, "snapshot", scope(never), 0, state.ScheduleSpec{Disabled: true}); err != nil {
			t.Fatal(err)
		}
		members := func(at state.Ref) (names []uuid.UUID) {
			for _, v := range schedule.Members(c.store.View(), "snapshot", at) {
				names = append(names, v.ID)
			}
			return names
		}
		if got := members(state.ScopeOfCluster()); len(got) != 1 || got[0] != plain.ID {
			t.Errorf("the cluster's are %v", got)
		}
		if got := members(scope(often)); len(got) != 1 || got[0] != often.ID {
			t.Errorf("the disk's are %v", got)
		}
		time.Sleep(2*time.Hour + time.Minute)
		runs := make(map[uuid.UUID]int)
		c.store.View().Tasks(func(task *state.Task) bool {
			var args schedule.Args
			if json.Unmarshal(task.Args, &args) == nil && args.Schedule == "snapshot" {
				runs[args.Scope.ID]++
			}
			return true
		})
		if runs[uuid.Nil] != 2 || runs[often.ID] != 12 || runs[never.ID] != 0 {
			t.Errorf("runs %v", runs)
		}
		// The vPool's row takes what the cluster's had.
		atPool := state.Ref{Kind: state.ScopeVPool, ID: pool}
		if err := d.Set(ctx, "snapshot", atPool, 0, state.ScheduleSpec{Cron: "30 1 * * *", Zone: "Europe/Brussels"}); err != nil {
			t.Fatal(err)
		}
		if got := members(atPool); len(got) != 1 || got[0] != plain.ID || len(members(state.ScopeOfCluster())) != 0 {
			t.Errorf("the vpool's are %v", got)
		}
		if err := d.Inherit(ctx, "snapshot", scope(never), 0); err != nil || len(members(atPool)) != 2 {
			t.Errorf("%v, %v", err, members(atPool))
		}
		for _, bad := range []struct {
			name string
			at   state.Ref
			spec state.ScheduleSpec
		}{
			{"snapshot", atPool, state.ScheduleSpec{Cron: "nonsense"}},
			{"snapshot", atPool, state.ScheduleSpec{Task: "y"}},
			{"health", atPool, state.ScheduleSpec{Cron: "@hourly"}},
			{"own", atPool, state.ScheduleSpec{Cron: "@hourly", Task: "y"}},
			{"own", state.ScopeOfCluster(), state.ScheduleSpec{Cron: "@hourly"}},
			{"own", state.ScopeOfCluster(), state.ScheduleSpec{Cron: "@hourly", Task: "unknown"}},
			{"own", state.ScopeOfCluster(), state.ScheduleSpec{Cron: "@hourly", Task: "y", Zone: "Nowhere"}},
		} {
			if err := d.Set(ctx, bad.name, bad.at, 0, bad.spec); !errors.Is(err, state.ErrInvalid) {
				t.Errorf("%+v: %v", bad, err)
			}
		}
		if err := d.Set(ctx, "own", state.ScopeOfCluster(), 0, state.ScheduleSpec{Cron: "@hourly", Task: "y", Args: json.RawMessage(`{"a":1}`)}); err != nil {
			t.Fatal(err)
		}
		if id, err := d.RunNow(ctx, "own", state.ScopeOfCluster(), "user admin"); err != nil || id == uuid.Nil {
			t.Error(id, err)
		}
		stop()
		list := d.List()
		if len(list) != 5 { // health, own, snapshot on the cluster, the vpool and the disk
			t.Errorf("%d schedules: %+v", len(list), list)
		}
		for _, s := range list {
			if s.Next.IsZero() || s.Err != nil {
				t.Errorf("%+v", s)
			}
		}
	})
}
