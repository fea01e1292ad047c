package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/uuid"
)

func (m *machine) submit(spec TaskSpec) (uuid.UUID, bool) {
	m.t.Helper()
	if spec.Queue == "" {
		spec.Queue = QueueGeneric
	}
	res := m.must(&SubmitTask{ID: m.id(), Spec: spec})
	return res.Object, res.Created
}

func (m *machine) start(id uuid.UUID) (lease uuid.UUID, err error) {
	lease = m.id()
	_, err = m.apply(&StartTask{ID: id, Lease: lease, Worker: node1})
	return lease, err
}

func (m *machine) finish(id, lease uuid.UUID, o Outcome) error {
	f := &FinishTask{ReportTask: ReportTask{ID: id, Lease: lease}, Outcome: o}
	if o == OutcomeFailed || o == OutcomeRetry {
		f.Problem = &Problem{Code: "c", Cause: "it broke", Consequence: "nothing works", Remedy: "mend it"}
	}
	_, err := m.apply(f)
	return err
}

func (m *machine) task(id uuid.UUID) Task {
	m.t.Helper()
	t, err := m.s.View().Task(id)
	if err != nil {
		m.t.Fatal(err)
	}
	return t
}

// What each ensure mode lets be submitted beside a waiting and beside a running task, and what it lets run together.
func TestEnsureModes(t *testing.T) {
	a, b := json.RawMessage(`{"v":1}`), json.RawMessage(`{"v":2}`)
	for _, c := range []struct {
		mode                                       EnsureMode
		besideWaiting, otherWaiting, besideRunning bool // is a second task made?
		sameRunsBeside, otherRunsBeside            bool
	}{
		{EnsureNone, true, true, true, true, true},
		{EnsureSingle, false, false, false, false, false},
		{EnsureDeduped, false, true, true, false, true},
		{EnsureChained, false, true, true, false, false},
	} {
		m := newMachine(t)
		spec := func(args json.RawMessage) TaskSpec { return TaskSpec{Type: "x", Ensure: c.mode, Args: args} }
		first, made := m.submit(spec(a))
		if !made {
			t.Fatal(c.mode, "the first was not made")
		}
		second, made := m.submit(spec(a))
		if made != c.besideWaiting || !made && second != first {
			t.Errorf("%q: the same beside a waiting one: made %v", c.mode, made)
		}
		other, made := m.submit(spec(b))
		if made != c.otherWaiting || !made && other != first {
			t.Errorf("%q: another beside a waiting one: made %v", c.mode, made)
		}
		lease, err := m.start(first)
		if err != nil {
			t.Fatal(err)
		}
		third, made := m.submit(spec(a))
		wantThird := c.besideRunning
		if made != wantThird {
			t.Errorf("%q: the same beside a running one: made %v", c.mode, made)
		}
		if c.besideRunning {
			if _, err := m.start(third); (err == nil) != c.sameRunsBeside {
				t.Errorf("%q: the same beside a running one: started %v", c.mode, err)
			}
		}
		if other != first {
			if _, err := m.start(other); (err == nil) != c.otherRunsBeside {
				t.Errorf("%q: another beside a running one: started %v", c.mode, err)
			}
		}
		m.check()
		if err := m.finish(first, lease, OutcomeSucceeded); err != nil {
			t.Fatal(err)
		}
		if _, made := m.submit(spec(json.RawMessage(`{"v":3}`))); !made {
			t.Errorf("%q: an ended task still stands in the way", c.mode)
		}
		m.check()
	}
}

// A task runs for the holder of its last lease alone, and ends once.
func TestTaskLease(t *testing.T) {
	m := newMachine(t)
	id, _ := m.submit(TaskSpec{Type: "x", DeliveriesMax: 2})
	old, err := m.start(id)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.start(id); !errors.Is(err, ErrConflict) {
		t.Fatalf("started twice: %v", err)
	}
	m.must(&ReportTask{ID: id, Lease: old, Done: 3, Total: 10, Steps: []TaskStep{{Name: "one", Started: 5}, {Name: "two", Started: 9}},
		Checkpoint: json.RawMessage(`{"at":7}`)})
	if row := m.task(id); len(row.Steps) != 2 || row.Steps[0].Ended != 9 || row.Steps[1].Ended != 0 || row.Done != 3 {
		t.Fatalf("%+v", row)
	}
	if err := m.finish(id, old, OutcomeRetry); err != nil {
		t.Fatal(err)
	}
	if row := m.task(id); row.State != TaskQueued || row.Deliveries != 1 || string(row.Checkpoint) != `{"at":7}` {
		t.Fatalf("%+v", row)
	}
	if err := m.finish(id, old, OutcomeSucceeded); !errors.Is(err, ErrLease) {
		t.Fatalf("an old lease finished the task: %v", err)
	}
	lease, err := m.start(id)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.apply(&ReportTask{ID: id, Lease: old}); !errors.Is(err, ErrLease) {
		t.Fatalf("an old lease reported: %v", err)
	}
	if err := m.finish(id, lease, OutcomeRetry); err != nil {
		t.Fatal(err)
	}
	row := m.task(id)
	if row.State != TaskFailed || row.Problem == nil || row.Problem.Remedy != "mend it" || row.Ended == 0 || row.Lease != uuid.Nil {
		t.Fatalf("after the last delivery: %+v", row)
	}
	m.must(&RetryTask{ID: id})
	if row := m.task(id); row.State != TaskQueued || row.Deliveries != 0 {
		t.Fatalf("retried: %+v", row)
	}
	m.check()
}

func TestTaskCancel(t *testing.T) {
	m := newMachine(t)
	waits, _ := m.submit(TaskSpec{Type: "x"})
	runs, _ := m.submit(TaskSpec{Type: "x"})
	lease, err := m.start(runs)
	if err != nil {
		t.Fatal(err)
	}
	m.must(&CancelTask{ID: waits})
	m.must(&CancelTask{ID: runs})
	if m.task(waits).State != TaskCancelled || m.task(runs).State != TaskRunning || !m.task(runs).Cancel {
		t.Fatalf("%+v %+v", m.task(waits), m.task(runs))
	}
	// Its worker dies: a cancelled task is not started again.
	if err := m.finish(runs, lease, OutcomeRetry); err != nil {
		t.Fatal(err)
	}
	if m.task(runs).State != TaskCancelled {
		t.Fatalf("%+v", m.task(runs))
	}
	m.fails(ErrConflict, &CancelTask{ID: runs})
	m.fails(ErrNotFound, &CancelTask{ID: m.id()})
}

// The same id submits once, also after the replay window has forgotten it.
func TestSubmitIsIdempotent(t *testing.T) {
	m := newMachine(t)
	id := m.id()
	for range 3 {
		if res := m.must(&SubmitTask{ID: id, Spec: TaskSpec{Type: "x", Queue: QueueMasters}}); res.Object != id {
			t.Fatal(res)
		}
	}
	if active, _ := m.s.View().CountTasks(); active != 1 {
		t.Fatal(active)
	}
	var order []uuid.UUID
	hot, _ := m.submit(TaskSpec{Type: "y", Queue: QueueMasters, Priority: 5})
	m.s.View().QueuedTasks(QueueMasters, func(t *Task) bool { order = append(order, t.ID); return true })
	if len(order) != 2 || order[0] != hot {
		t.Fatal("priority is not first", order)
	}
}

func TestTrimTasks(t *testing.T) {
	m := newMachine(t)
	for range 10 {
		id, _ := m.submit(TaskSpec{Type: "x"})
		m.must(&CancelTask{ID: id})
	}
	keep, _ := m.submit(TaskSpec{Type: "x"})
	m.must(&TrimTasks{Keep: 4})
	if active, ended := m.s.View().CountTasks(); active != 1 || ended != 4 {
		t.Fatal(active, ended)
	}
	m.must(&TrimTasks{Before: 1 << 60, Keep: 100})
	if active, ended := m.s.View().CountTasks(); active != 1 || ended != 0 {
		t.Fatal(active, ended)
	}
	m.task(keep)
	m.check()
}

// The largest task that the limits allow fits a snapshot's row and comes back.
func TestLargestTaskFitsASnapshot(t *testing.T) {
	m := newMachine(t)
	bad := strings.Repeat("<", TaskTextBytesMax)
	args := json.RawMessage(`{"a":"` + strings.Repeat("x", TaskArgsBytesMax-8) + `"}`)
	checkpoint := json.RawMessage(`{"a":"` + strings.Repeat("x", TaskResultBytesMax-8) + `"}`)
	id, _ := m.submit(TaskSpec{Type: "x", Object: bad, Key: bad, By: bad, Args: args})
	lease, err := m.start(id)
	if err != nil {
		t.Fatal(err)
	}
	lines := make([]TaskLine, 40)
	for i := range lines {
		lines[i] = TaskLine{At: 1 << 62, Text: bad}
	}
	for i := range TaskStepsMax {
		m.must(&ReportTask{ID: id, Lease: lease, Log: lines, Steps: []TaskStep{{Name: fmt.Sprint(i) + bad[3:], Started: 1 << 62}}, Checkpoint: checkpoint})
	}
	m.must(&FinishTask{ReportTask: ReportTask{ID: id, Lease: lease}, Outcome: OutcomeFailed,
		Problem: &Problem{Code: bad, Cause: bad, Consequence: bad, Remedy: bad}})
	restored := New()
	if err := restored.Restore(strings.NewReader(string(snapshotBytes(t, m.s)))); err != nil {
		t.Fatal(err)
	}
	if row, err := restored.View().Task(id); err != nil || len(row.Log) != TaskLinesMax || len(row.Steps) != TaskStepsMax {
		t.Fatal(len(row.Log), len(row.Steps), err)
	}
}

func TestTaskChecks(t *testing.T) {
	m := newMachine(t)
	for name, s := range map[string]TaskSpec{
		"queue":    {Type: "x", Queue: "elsewhere"},
		"node":     {Type: "x", Queue: "node:1"},
		"type":     {Type: "Not a type", Queue: QueueGeneric},
		"mode":     {Type: "x", Queue: QueueGeneric, Ensure: "sometimes"},
		"args":     {Type: "x", Queue: QueueGeneric, Args: json.RawMessage(`[]`)},
		"key":      {Type: "x", Queue: QueueGeneric, Key: "a\x00b"},
		"too long": {Type: "x", Queue: QueueGeneric, Object: strings.Repeat("a", TaskTextBytesMax+1)},
	} {
		if _, err := m.apply(&SubmitTask{ID: m.id(), Spec: s}); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	id, _ := m.submit(TaskSpec{Type: "x"})
	lease, _ := m.start(id)
	m.fails(ErrInvalid, &FinishTask{ReportTask: ReportTask{ID: id, Lease: lease}, Outcome: OutcomeFailed})
	m.fails(ErrInvalid, &FinishTask{ReportTask: ReportTask{ID: id, Lease: lease}, Outcome: OutcomeFailed, Problem: &Problem{Code: "x"}})
}

func TestSchedulesAndPolicies(t *testing.T) {
	m := newMachine(t)
	pool := Ref{Kind: ScopeVPool, ID: poolA}
	f := m.must(m.file(RootIno, "a.raw"))
	disk := Ref{Kind: ScopeVDisk, ID: f.Volume}
	for _, at := range []Ref{ScopeOfCluster(), pool, disk} {
		m.must(&SetSchedule{Name: "snapshot", Scope: at, Spec: ScheduleSpec{Cron: "0 * * * *", Zone: "Europe/Brussels"}})
		m.must(&DispatchSchedule{Name: "snapshot", Scope: at, Due: 50})
		days := 3
		m.must(&SetPolicy{Scope: at, Spec: PolicySpec{VerifyDays: &days, Retention: &Retention{AllDays: 2}}})
	}
	m.fails(ErrNotFound, &SetSchedule{Name: "snapshot", Scope: Ref{Kind: ScopeVPool, ID: poolB}, Spec: ScheduleSpec{Cron: "@hourly"}})
	m.fails(ErrInvalid, &SetSchedule{Name: "snapshot", Scope: Ref{Kind: "planet"}})
	m.fails(ErrInvalid, &SetPolicy{Scope: pool, Spec: PolicySpec{Retention: &Retention{}}})
	m.fails(ErrInvalid, &SetPolicy{Scope: pool, Spec: PolicySpec{Retention: &Retention{Weekdays: []RetentionWeekday{{Day: 7, Weeks: 1}}}}})
	m.fails(ErrInvalid, &SetPolicy{Scope: pool, Spec: PolicySpec{Retention: &Retention{Buckets: []RetentionBucket{{Days: 30000, Count: 30000}}}}})
	m.fails(ErrConflict, &SetSchedule{Name: "snapshot", Scope: pool, Rev: 1, Spec: ScheduleSpec{Cron: "@daily"}})

	// Of two leaders that dispatch one run, one is refused, and its task with it.
	run := func(last, due Time) *DispatchSchedule {
		return &DispatchSchedule{Name: "snapshot", Scope: pool, Last: last, Due: due,
			Task: &SubmitTask{ID: m.id(), Spec: TaskSpec{Type: "vdisk.snapshot", Queue: QueueGeneric}}}
	}
	m.must(run(50, 100))
	m.fails(ErrConflict, run(50, 100))
	m.fails(ErrInvalid, run(100, 100))
	if active, _ := m.s.View().CountTasks(); active != 1 {
		t.Fatalf("%d tasks", active)
	}
	m.check()

	// What was set on a vDisk goes with it.
	m.must(&RemoveInode{FSID: m.fsid, Dir: RootIno, Name: "a.raw"})
	v := m.s.View()
	if _, ok := v.Schedule("snapshot", disk); ok || len(v.Schedules()) != 2 || len(v.Policies()) != 2 {
		t.Fatalf("%v %v", v.Schedules(), v.Policies())
	}
	if _, ok := v.ScheduleRun("snapshot", disk); ok {
		t.Fatal("the last run of a vdisk that is gone stays")
	}
	m.must(&DeleteSchedule{Name: "snapshot", Scope: pool})
	m.must(&DeletePolicy{Scope: pool})
	m.check()
}

func TestConfigVersions(t *testing.T) {
	m := newMachine(t)
	for i := range configFormerMax + 5 {
		m.must(&SetConfig{Key: "cluster.name", Value: fmt.Sprint(i), By: "admin"})
	}
	k, err := m.s.View().Config("cluster.name")
	if err != nil || k.Value != fmt.Sprint(configFormerMax+4) || k.Version != configFormerMax+5 || len(k.Former) != configFormerMax ||
		k.Former[0].Value != fmt.Sprint(configFormerMax+3) {
		t.Fatalf("%+v %v", k, err)
	}
	m.fails(ErrConflict, &SetConfig{Key: "cluster.name", Value: "x", Rev: 3})
	m.must(&DeleteConfig{Key: "cluster.name", Rev: k.Rev})
	m.fails(ErrNotFound, &DeleteConfig{Key: "cluster.name"})
	png := []byte("\x89PNG\r\n\x1a\n…")
	a, b := m.id(), m.id()
	m.must(&SetBranding{ID: a, Name: "ours", Product: "Ours", Colour: "#00ff7f", Logo: png, Default: true})
	m.must(&SetBranding{ID: b, Name: "theirs", Product: "Theirs", Default: true})
	if x, _ := m.s.View().Branding(a); x.Default {
		t.Fatal("two defaults")
	}
	m.fails(ErrInvalid, &SetBranding{ID: a, Name: "ours", Logo: []byte("<svg onload=alert(1)>")})
	m.fails(ErrInvalid, &SetBranding{ID: a, Name: "ours", Colour: "red;"})
	m.fails(ErrExist, &SetBranding{ID: a, Name: "theirs"})
	m.must(&DeleteBranding{ID: a})
	m.check()
}

func TestSinks(t *testing.T) {
	m := newMachine(t)
	id := m.id()
	m.must(m.file(RootIno, "before.raw"))
	m.must(&SetSink{ID: id, Spec: SinkSpec{Name: "hook", Kind: SinkWebhook, URL: "https://example.org/x", Topics: []string{"volume"}}})
	at, ok := m.s.View().Cursor(CursorOf(id))
	if !ok || at == 0 {
		t.Fatal("a new sink starts before what happened before it")
	}
	m.fails(ErrInvalid, &DeleteCursor{Name: CursorOf(id)})
	m.fails(ErrNotFound, &MoveCursor{Name: CursorOf(m.id()), Seq: 1})
	m.fails(ErrExist, &SetSink{ID: m.id(), Spec: SinkSpec{Name: "hook", Kind: SinkAMQP, URL: "amqp://h"}})
	m.fails(ErrInvalid, &SetSink{ID: m.id(), Spec: SinkSpec{Name: "other", Kind: "carrier-pigeon", URL: "x:"}})
	m.check()
	m.must(&DeleteSink{ID: id})
	if _, ok := m.s.View().Cursor(CursorOf(id)); ok {
		t.Fatal("its cursor stays and keeps the log")
	}
	m.check()
}

// Names tell of themselves, in the transaction that changes them.
func TestNameEvents(t *testing.T) {
	m := newMachine(t)
	from := m.s.View().EventsLast()
	d := m.must(m.dir(RootIno, "vm"))
	f := m.must(m.file(d.Ino, "a.raw"))
	m.must(m.file(d.Ino, "a.vmx"))
	m.must(m.rename(d.Ino, "a.raw", RootIno, "b.raw"))
	m.must(m.rename(RootIno, "vm", RootIno, "vm2"))
	m.must(&RemoveInode{FSID: m.fsid, Dir: RootIno, Name: "b.raw"})
	m.must(&RemoveInode{FSID: m.fsid, Dir: d.Ino, Name: "a.vmx"})
	var got []string
	for _, e := range m.s.View().Events(from, 100) {
		var data struct{ VPool, Path, From string }
		if err := json.Unmarshal(e.Data, &data); err != nil {
			t.Fatal(err)
		}
		got = append(got, strings.TrimSpace(e.Type+" "+data.VPool+data.Path+" "+data.From))
		if e.Topic == "volume" && e.Key != f.Volume.String() {
			t.Errorf("%s has key %s", e.Type, e.Key)
		}
	}
	want := []string{"volume_create default/vm/a.raw", "file_create default/vm/a.vmx", "volume_rename default/b.raw /vm/a.raw",
		"file_rename default/vm2 /vm", "volume_delete default/b.raw", "file_delete default/vm2/a.vmx"}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Fatalf("events\n%s", strings.Join(got, "\n"))
	}
}
