//go:build e2e

// Package automation tests what a cluster does by itself with the parts that do it: a raft log on the disk, the volume driver
// on a real vPool, schedules and tasks under a clock that the test moves; and event sinks with the programs that users have.
package automation

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"encoding/json"

	"github.com/google/uuid"

	"varve/appliance/exports"
	"varve/control/events"
	"varve/control/jobs"
	"varve/control/node"
	"varve/control/raft"
	"varve/control/retention"
	"varve/control/schedule"
	"varve/control/state"
	"varve/control/upkeep"
	"varve/control/vdisk"
	"varve/control/vpool"
	"varve/test/harness"
	"varve/volumedriver"
	"varve/volumedriver/backend"
	"varve/volumedriver/backend/local"
	"varve/volumedriver/vfs"
)

var silence = slog.New(slog.NewTextHandler(io.Discard, nil))

// clock is one that the test moves.
type clock struct{ ns atomic.Int64 }

func (c *clock) Now() time.Time { return time.Unix(0, c.ns.Load()).UTC() }

func (c *clock) Set(t time.Time) { c.ns.Store(t.UnixNano()) }

// box is an appliance's control and volume driver on a directory.
type box struct {
	t       *testing.T
	clock   *clock
	raft    *raft.Node
	driver  *volumedriver.Driver
	volumes *exports.Volumes
	vdisks  *vdisk.Controller
	types   jobs.Types
	events  *events.Publisher
	broker  *jobs.Broker
}

func openBox(t *testing.T, c *clock) *box {
	t.Helper()
	dir := t.TempDir()
	b := &box{t: t, clock: c}
	var err error
	if b.raft, err = raft.Open(raft.Config{Dir: filepath.Join(dir, "control"), Log: silence, Now: c.Now}); err != nil {
		t.Fatal(err)
	}
	if err := b.raft.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.driver, err = volumedriver.Open(volumedriver.Config{FS: vfs.OS(), Dir: dir, LogBytes: 64 << 20, SegmentBytes: 8 << 20,
		MapBudgetBytes: 8 << 20, NoPrewrite: true, Log: silence})
	if err != nil {
		t.Fatal(err)
	}
	store := b.raft.State()
	b.volumes = exports.NewVolumes(b.raft, store, b.driver, b.raft.ID(), nil)
	pools := exports.NewPools(b.driver, func(s state.Backend, _ vpool.Keys) (backend.Backend, error) { return local.Open(vfs.OS(), s.Dir) }, nil, nil, silence)
	engine := exports.NewEngine(store, b.volumes)
	vpools := vpool.New(vpool.Config{Raft: b.raft, Store: store, Engine: pools})
	b.vdisks = vdisk.New(vdisk.Config{Raft: b.raft, Store: store, Engine: engine})
	spec := state.NodeSpec{Name: "test", Role: state.RoleMaster, Version: "test"}
	if err := errors.Join(node.New(b.raft, store, b.raft.ID()).Register(t.Context(), spec), vpools.Start(t.Context())); err != nil {
		t.Fatal(err)
	}
	if _, err := vpools.Create(t.Context(), vpool.Spec{Name: "default", Backend: "local://" + filepath.Join(dir, "backend")}); err != nil {
		t.Fatal(err)
	}
	b.events = events.NewPublisher(b.raft, b.raft.ID(), silence)
	u := upkeep.New(upkeep.Config{Raft: b.raft, Store: store, Node: b.raft.ID(), Engine: exports.UpkeepEngine{Engine: engine}, Events: b.events,
		Health: func(context.Context) []state.AlertSpec { return nil }, Renew: func(context.Context) error { return nil }, Log: silence, Now: c.Now})
	if b.types, err = jobs.NewTypes(u.Types()...); err != nil {
		t.Fatal(err)
	}
	b.broker = b.newBroker()
	w := jobs.NewWorker(jobs.WorkerConfig{Node: b.raft.ID(), Queues: []string{state.QueueGeneric, state.QueueOf(b.raft.ID())}, Types: b.types,
		Source: b.broker, Log: silence})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, run := range []func(context.Context) error{b.driver.Run, b.vdisks.Run, w.Run, b.events.Run} {
		wg.Go(func() {
			if err := run(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		if err := errors.Join(b.driver.Close(), pools.Close(), b.raft.Close()); err != nil {
			t.Error(err)
		}
	})
	return b
}

// newBroker is that of a leader. Its clock is the test's, which decides what is due; leases go by the time that passes.
func (b *box) newBroker() *jobs.Broker {
	return jobs.NewBroker(jobs.BrokerConfig{Raft: b.raft, Store: b.raft.State(), Types: b.types, Log: silence, Now: b.clock.Now})
}

func (b *box) newDispatcher() *schedule.Dispatcher {
	return schedule.New(schedule.Config{Raft: b.raft, Store: b.raft.State(), Entries: schedule.Defaults(), Log: silence, Now: b.clock.Now,
		Task: func(typ, object, by string, args json.RawMessage) (state.TaskSpec, error) {
			t, ok := b.types[typ]
			if !ok {
				return state.TaskSpec{}, state.ErrInvalid
			}
			return t.Spec(object, by, args)
		}})
}

// idle waits until no task waits or runs.
func (b *box) idle() {
	b.t.Helper()
	end := time.After(time.Minute)
	for {
		v, changed, err := b.raft.State().Watch("task")
		if err != nil {
			b.t.Fatal(err)
		}
		if active, _ := v.CountTasks(); active == 0 {
			return
		}
		select {
		case <-changed:
		case <-end:
			v.Tasks(func(t *state.Task) bool {
				if t.Active() {
					b.t.Logf("%s %s, delivery %d, %+v, log %+v", t.Type, t.State, t.Deliveries, t.Problem, t.Log)
				}
				return true
			})
			b.t.Fatal("tasks do not end")
		}
	}
}

func (b *box) write(disk string, hour uint64) {
	b.t.Helper()
	d, err := b.vdisks.Get(b.t.Context(), disk)
	if err != nil {
		b.t.Fatal(err)
	}
	v, release, err := b.volumes.Open(b.t.Context(), d.Volume.ID)
	if err != nil {
		b.t.Fatal(err)
	}
	defer release()
	p := make([]byte, 4096)
	binary.LittleEndian.PutUint64(p, hour)
	if err := v.Write(b.t.Context(), p, 0, 0); err != nil {
		b.t.Fatal(err)
	}
}

// stamp reads the hour that a snapshot holds.
func (b *box) stamp(volume, snapshot uuid.UUID) uint64 {
	b.t.Helper()
	r, err := b.driver.OpenSnapshot(b.t.Context(), volume, snapshot)
	if err != nil {
		b.t.Fatal(err)
	}
	defer r.Close()
	p := make([]byte, 4096)
	if err := r.Read(b.t.Context(), p, 0); err != nil {
		b.t.Fatal(err)
	}
	return binary.LittleEndian.Uint64(p)
}

// model is what the policy says should be there: the hours of a vDisk's snapshots.
type model map[uint64]retention.Snapshot

// retain applies the default retention as its words say, without the package that the product uses: all of today and
// yesterday, the newest of the day before, the oldest of the six days before that, the oldest of three weeks before those.
func (m model) retain(now time.Time) {
	today := time.Date(now.Year(), now.Month(), now.Day(), 0, 0, 0, 0, time.UTC)
	yesterday := today.AddDate(0, 0, -1)
	type span struct {
		from, to time.Time
		newest   bool
	}
	spans := []span{{yesterday.AddDate(0, 0, -1), yesterday, true}}
	for day := 2; day <= 7; day++ {
		spans = append(spans, span{yesterday.AddDate(0, 0, -day), yesterday.AddDate(0, 0, -day+1), false})
	}
	for week := 1; week <= 3; week++ {
		spans = append(spans, span{yesterday.AddDate(0, 0, -7-7*week), yesterday.AddDate(0, 0, -7*week), false})
	}
	keep := make(map[uint64]bool)
	for hour, s := range m {
		keep[hour] = !s.Created.Before(yesterday) || s.Sticky || s.Clones > 0 || !s.Automatic
	}
	for _, sp := range spans {
		var best retention.Snapshot
		var at uint64
		for hour, s := range m {
			if s.Sticky || s.Clones > 0 || !s.Automatic || s.Created.Before(sp.from) || !s.Created.Before(sp.to) {
				continue
			}
			if best.Created.IsZero() || sp.newest == s.Created.After(best.Created) {
				best, at = s, hour
			}
		}
		if !best.Created.IsZero() {
			keep[at] = true
		}
	}
	for hour := range m {
		if !keep[hour] {
			delete(m, hour)
		}
	}
}

// Five weeks of hourly snapshots and nightly retention on a real vPool, with leaders that change and overlap: at the end of
// every day each vDisk has exactly the snapshots that the policy names, each holding what was written at its time.
func TestWeeksOfSnapshots(t *testing.T) {
	const weeks = 5
	ctx := t.Context()
	c := &clock{}
	start := time.Date(2026, 5, 4, 0, 5, 0, 0, time.UTC)
	c.Set(start)
	b := openBox(t, c)
	began := time.Now()
	for _, d := range []string{"default/a", "default/vm/b", "default/rare", "default/golden"} {
		if _, err := b.vdisks.Create(ctx, d, 1<<30); err != nil {
			t.Fatal(err)
		}
	}
	b.write("default/golden", 1)
	if err := b.vdisks.SetTemplate(ctx, "default/golden", true, true); err != nil {
		t.Fatal(err)
	}
	rare, err := b.vdisks.Get(ctx, "default/rare")
	if err != nil {
		t.Fatal(err)
	}
	leaders := []*schedule.Dispatcher{b.newDispatcher(), b.newDispatcher()}
	if err := leaders[0].Set(ctx, "snapshot", state.Ref{Kind: state.ScopeVDisk, ID: rare.Volume.ID}, 0, state.ScheduleSpec{Cron: "0 */6 * * *"}); err != nil {
		t.Fatal(err)
	}
	// Only what this test is about.
	for _, name := range []string{"health", "reality", "certificates", "scrub", "verify", "orphans"} {
		if err := leaders[0].Set(ctx, name, state.ScopeOfCluster(), 0, state.ScheduleSpec{Disabled: true}); err != nil {
			t.Fatal(err)
		}
	}
	models := map[string]model{"default/a": {}, "default/vm/b": {}, "default/rare": {}}
	taken := 0
	for hour := uint64(1); hour < weeks*7*24; hour++ {
		now := start.Truncate(time.Hour).Add(time.Duration(hour) * time.Hour)
		if hour == 200 { // a vDisk that is made later, and one that goes
			if _, err := b.vdisks.Create(ctx, "default/later", 1<<30); err != nil {
				t.Fatal(err)
			}
			models["default/later"] = model{}
		}
		if hour == 400 {
			if err := b.vdisks.Delete(ctx, "default/vm/b", true); err != nil {
				t.Fatal(err)
			}
			delete(models, "default/vm/b")
		}
		for d := range models {
			b.write(d, hour)
		}
		c.Set(now.Add(10 * time.Second))
		b.lead(leaders, hour)
		for d, m := range models {
			if d != "default/rare" || now.Hour()%6 == 0 {
				m[hour] = retention.Snapshot{Created: now.Add(10 * time.Second), Automatic: true}
				taken++
			}
		}
		if hour%24 != 0 {
			continue
		}
		c.Set(now.Add(30*time.Minute + 5*time.Second)) // the time of the retention
		b.lead(leaders, hour)
		if hour == 240 { // one is pinned, one gets a clone
			b.pin("default/a", models["default/a"], 222, 230)
		}
		for d, m := range models {
			m.retain(c.Now())
			b.compare(d, m, hour)
		}
	}
	if n := countTasks(b, state.TaskFailed); n != 0 {
		t.Errorf("%d tasks failed", n)
	}
	for _, list := range []string{"default/golden"} {
		if s, err := b.vdisks.Snapshots(ctx, list); err != nil || len(s) != 0 {
			t.Errorf("template %s has %d automatic snapshots, %v", list, len(s), err)
		}
	}
	left := 0
	for d, m := range models {
		for hour := range m {
			_ = hour
			left++
		}
		_ = d
	}
	harness.Show("schedules: %d weeks, %d automatic snapshots of a real vPool taken and %d left, as the policy says, in %s", weeks, taken, left,
		time.Since(began).Round(time.Second))
}

// lead lets one leader, or both at a time, look at what is due, and waits for the tasks.
func (b *box) lead(leaders []*schedule.Dispatcher, hour uint64) {
	b.t.Helper()
	ctx := b.t.Context()
	switch hour % 3 {
	case 0:
		var wg sync.WaitGroup
		for _, l := range leaders {
			wg.Go(func() { l.Look(ctx) })
		}
		wg.Wait()
	case 1:
		leaders[0].Look(ctx)
	case 2:
		leaders[1] = b.newDispatcher() // a leader that has just begun
		leaders[1].Look(ctx)
		leaders[0].Look(ctx)
	}
	b.idle()
}

func countTasks(b *box, s state.TaskState) (n int) {
	b.raft.State().View().Tasks(func(t *state.Task) bool {
		if t.State == s {
			n++
			b.t.Logf("%s: %+v", t.Type, t.Problem)
		}
		return true
	})
	return n
}

// pin makes one snapshot sticky and another the parent of a clone.
func (b *box) pin(disk string, m model, sticky, parent uint64) {
	b.t.Helper()
	ctx := b.t.Context()
	name := func(hour uint64) string { return upkeep.SnapshotName(m[hour].Created.Truncate(time.Hour)) }
	if _, err := b.vdisks.EditSnapshot(ctx, disk, name(sticky), func(s *vdisk.SnapshotSpec) { s.Sticky = true }); err != nil {
		b.t.Fatal(err)
	}
	if _, err := b.vdisks.Clone(ctx, disk+"@"+name(parent), "default/clone"); err != nil {
		b.t.Fatal(err)
	}
	s := m[sticky]
	s.Sticky = true
	m[sticky] = s
	p := m[parent]
	p.Clones = 1
	m[parent] = p
	// The clone is a vDisk like any other from now on; it is not looked at here.
	if _, err := b.vdisks.Get(ctx, "default/clone"); err != nil {
		b.t.Fatal(err)
	}
}

// compare checks that a vDisk has exactly the model's snapshots.
func (b *box) compare(disk string, m model, hour uint64) {
	b.t.Helper()
	all, err := b.vdisks.Snapshots(b.t.Context(), disk)
	if err != nil {
		b.t.Fatal(err)
	}
	d, err := b.vdisks.Get(b.t.Context(), disk)
	if err != nil {
		b.t.Fatal(err)
	}
	var want, got []string
	for _, s := range m {
		want = append(want, upkeep.SnapshotName(s.Created.Truncate(time.Hour)))
	}
	for _, s := range all {
		got = append(got, s.Name)
	}
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(want, got) {
		b.t.Fatalf("%s at hour %d has\n%s\nwant\n%s", disk, hour, strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	// A few of them are read: the newest, the oldest and one between.
	for _, i := range []int{0, len(all) / 2, len(all) - 1} {
		if len(all) == 0 {
			break
		}
		at := uint64(all[i].Created.Sub(time.Date(2026, 5, 4, 0, 0, 0, 0, time.UTC)) / time.Hour)
		if held := b.stamp(d.Volume.ID, all[i].ID); held != at {
			b.t.Fatalf("%s@%s holds what was written at hour %d, not %d", disk, all[i].Name, held, at)
		}
	}
}
