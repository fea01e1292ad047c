package state

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/google/uuid"
)

// Task is one piece of work: what is to be done, where it stands and what became of it.
//
//	queued --start--> running --finish--> succeeded | failed | cancelled
//	   ^                 |                    |
//	   +---- retry ------+      (lease ran out, nack; after the last delivery: failed)
//	   +------------------ RetryTask ---------+
//
// Only the holder of the lease may report and finish; a start gives a new one, so that a worker that was thought dead
// changes nothing any more.
type Task struct {
	ID uuid.UUID `json:"id"`
	TaskSpec
	State TaskState `json:"state"`
	// Serial orders tasks of one queue and priority.
	Serial uint64 `json:"serial"`
	// Deliveries counts the starts since the task was queued by somebody.
	Deliveries int `json:"deliveries"`
	// Worker and Lease are those of the delivery that runs.
	Worker uuid.UUID `json:"worker,omitzero"`
	Lease  uuid.UUID `json:"lease,omitzero"`
	// Cancel says that somebody wants the task to stop at its next step.
	Cancel     bool            `json:"cancel,omitempty"`
	Done       int64           `json:"done,omitempty"`
	Total      int64           `json:"total,omitempty"`
	Steps      []TaskStep      `json:"steps,omitempty"`
	Log        []TaskLine      `json:"log,omitempty"`
	Checkpoint json.RawMessage `json:"checkpoint,omitempty"`
	Result     json.RawMessage `json:"result,omitempty"`
	Problem    *Problem        `json:"problem,omitempty"`
	Created    Time            `json:"created"`
	Started    Time            `json:"started,omitempty"`
	Ended      Time            `json:"ended,omitempty"`
	Rev        uint64          `json:"rev"`
}

// TaskSpec is what a submitter says.
type TaskSpec struct {
	// Type names the code that does it ("vdisk.snapshot").
	Type string `json:"type"`
	// Queue is "generic", "masters" or "node:<uuid>".
	Queue string `json:"queue"`
	// Object is what the task is about, as its user knows it ("vdisk default/disk1").
	Object string          `json:"object,omitempty"`
	Args   json.RawMessage `json:"args,omitempty"`
	Ensure EnsureMode      `json:"ensure,omitempty"`
	// Key is what Ensure compares; the type where it is empty.
	Key string `json:"key,omitempty"`
	// Priority: higher first.
	Priority uint8 `json:"priority,omitempty"`
	// NotBefore is when it may start at the earliest.
	NotBefore Time `json:"not_before,omitempty"`
	// DeliveriesMax is how often it is started before it counts as failed; 0 means DeliveriesDefault.
	DeliveriesMax int `json:"deliveries_max,omitempty"`
	// By says who wanted it ("user admin", "schedule snapshot", "event volume_create").
	By string `json:"by,omitempty"`
}

// TaskState says how far a task has come.
type TaskState string

// States of a task.
const (
	TaskQueued    TaskState = "queued"
	TaskRunning   TaskState = "running"
	TaskSucceeded TaskState = "succeeded"
	TaskFailed    TaskState = "failed"
	TaskCancelled TaskState = "cancelled"
)

// EnsureMode says what a submission does when there is such a task already.
type EnsureMode string

// Ensure-single modes. Single: one of a key, running or waiting, any other is discarded. Deduped: of a key and arguments one
// runs and one waits. Chained: as deduped, and of a key one runs at a time whatever its arguments.
const (
	EnsureNone    EnsureMode = ""
	EnsureSingle  EnsureMode = "default"
	EnsureDeduped EnsureMode = "deduped"
	EnsureChained EnsureMode = "chained"
)

// TaskStep is a part of a task; the last one of a running task is running.
type TaskStep struct {
	Name    string `json:"name"`
	Started Time   `json:"started"`
	Ended   Time   `json:"ended,omitempty"`
}

// TaskLine is a line of a task's log.
type TaskLine struct {
	At   Time   `json:"at"`
	Text string `json:"text"`
}

// Problem is why a task did not succeed: what went wrong, what that means, what helps.
type Problem struct {
	Code        string `json:"code"`
	Cause       string `json:"cause"`
	Consequence string `json:"consequence"`
	Remedy      string `json:"remedy"`
}

// Limits of tasks.
const (
	TaskArgsBytesMax   = 64 << 10 // a thousand names of vDisks
	TaskResultBytesMax = 16 << 10
	TaskStepsMax       = 64
	TaskLinesMax       = 100
	TaskTextBytesMax   = 400
	TasksActiveMax     = 20000
	TasksTrimmedMax    = 512
	DeliveriesDefault  = 5
	deliveriesMax      = 1000
)

// Queues that are not a node's.
const (
	QueueGeneric = "generic"
	QueueMasters = "masters"
)

// QueueOf is the queue of one node.
func QueueOf(node uuid.UUID) string { return "node:" + node.String() }

const (
	tTask     = "task"
	byQueue   = "queue"
	byKey     = "key"
	byEnded   = "ended"
	byRunning = "running"
)

func taskTable(frame byte) object {
	active := func(t *Task) bool { return t.State == TaskQueued || t.State == TaskRunning }
	when := func(in func(*Task) bool, key func(*Task) []byte) index {
		return func(obj any) ([]byte, bool) {
			t := obj.(*Task)
			if !in(t) {
				return nil, false
			}
			return key(t), true
		}
	}
	o := rowObject[Task](frame, tTask, map[string]index{
		byID: always(func(t *Task) []byte { return t.ID[:] }),
		byQueue: when(func(t *Task) bool { return t.State == TaskQueued }, func(t *Task) []byte {
			k := append([]byte(t.Queue), 0, ^t.Priority)
			return append(binary.BigEndian.AppendUint64(k, t.Serial), t.ID[:]...)
		}),
		byKey: when(active, func(t *Task) []byte { return append(append([]byte(t.EnsureKey()), 0), t.ID[:]...) }),
		byEnded: when(func(t *Task) bool { return !active(t) }, func(t *Task) []byte {
			return append(binary.BigEndian.AppendUint64(nil, uint64(t.Ended)), t.ID[:]...)
		}),
		byRunning: when(func(t *Task) bool { return t.State == TaskRunning }, func(t *Task) []byte { return t.ID[:] }),
	})
	o.commands = []func() Command{command[SubmitTask], command[StartTask], command[RenewTask], command[ReportTask], command[FinishTask], command[CancelTask],
		command[RetryTask], command[TrimTasks]}
	o.check = checkTasks
	return o
}

func checkTasks(v *View) error {
	var err error
	rows(v, tTask, byID, nil, func(t *Task) bool {
		switch {
		case t.TaskSpec.check() != nil:
			err = t.TaskSpec.check()
		case !slices.Contains([]TaskState{TaskQueued, TaskRunning, TaskSucceeded, TaskFailed, TaskCancelled}, t.State):
			err = fmt.Errorf("task %s: state %q", t.ID, t.State)
		case (t.State == TaskRunning) != (t.Lease != uuid.Nil):
			err = fmt.Errorf("task %s: %s with lease %s", t.ID, t.State, t.Lease)
		case t.State == TaskFailed && t.Problem == nil:
			err = fmt.Errorf("task %s: failed without a problem", t.ID)
		case t.Ensure == EnsureSingle && t.Active() && t.alike(v, func(*Task) bool { return true }) != nil:
			err = fmt.Errorf("task %s: not the only one of key %q", t.ID, t.EnsureKey())
		case t.State == TaskRunning && v.startBlocked(t) != nil:
			err = fmt.Errorf("task %s: runs beside another of key %q", t.ID, t.EnsureKey())
		}
		return err == nil
	})
	return err
}

// Active says that the task waits or runs.
func (t *Task) Active() bool { return t.State == TaskQueued || t.State == TaskRunning }

// EnsureKey is what the ensure modes compare.
func (s TaskSpec) EnsureKey() string {
	if s.Key != "" {
		return s.Key
	}
	return s.Type
}

// alike returns another active task of the same key for which is says so.
func (t *Task) alike(v *View, is func(*Task) bool) *Task {
	var found *Task
	rows(v, tTask, byKey, append([]byte(t.EnsureKey()), 0), func(o *Task) bool {
		if o.ID != t.ID && o.Ensure == t.Ensure && is(o) {
			found = o
		}
		return found == nil
	})
	return found
}

// submitBlocked returns the task that stands for t already.
func (v *View) submitBlocked(t *Task) *Task {
	switch t.Ensure {
	case EnsureSingle:
		return t.alike(v, func(*Task) bool { return true })
	case EnsureDeduped, EnsureChained:
		return t.alike(v, func(o *Task) bool { return o.State == TaskQueued && bytes.Equal(o.Args, t.Args) })
	}
	return nil
}

// startBlocked returns the running task that t has to wait for.
func (v *View) startBlocked(t *Task) *Task {
	switch t.Ensure {
	case EnsureSingle, EnsureChained:
		return t.alike(v, func(o *Task) bool { return o.State == TaskRunning })
	case EnsureDeduped:
		return t.alike(v, func(o *Task) bool { return o.State == TaskRunning && bytes.Equal(o.Args, t.Args) })
	}
	return nil
}

func (s TaskSpec) check() error {
	object := "task " + quote(s.Type)
	if err := checkLabel("task", s.Type); err != nil {
		return err
	}
	node, isNode := strings.CutPrefix(s.Queue, "node:")
	if isNode {
		if id, err := uuid.Parse(node); err != nil || QueueOf(id) != s.Queue {
			return invalid(object, "queue "+quote(s.Queue))
		}
	} else if s.Queue != QueueGeneric && s.Queue != QueueMasters {
		return invalid(object, "queue "+quote(s.Queue))
	}
	switch s.Ensure {
	case EnsureNone, EnsureSingle, EnsureDeduped, EnsureChained:
	default:
		return invalid(object, "ensure mode "+quote(string(s.Ensure)))
	}
	for _, text := range []string{s.Object, s.Key, s.By} {
		if err := checkText(object, text); err != nil {
			return err
		}
	}
	if s.DeliveriesMax < 0 || s.DeliveriesMax > deliveriesMax || s.NotBefore < 0 || strings.ContainsRune(s.Key, 0) {
		return invalid(object, "deliveries, time or key")
	}
	return checkJSON(object, "arguments", s.Args, TaskArgsBytesMax)
}

// checkText refuses text that is too long to keep or not UTF-8.
func checkText(object, text string) error {
	if len(text) > TaskTextBytesMax || !utf8.ValidString(text) {
		return invalid(object, fmt.Sprintf("text of %d bytes, more than %d, or not UTF-8", len(text), TaskTextBytesMax))
	}
	return nil
}

func (s TaskSpec) deliveries() int {
	if s.DeliveriesMax == 0 {
		return DeliveriesDefault
	}
	return s.DeliveriesMax
}

// SubmitTask queues a task. Result.Object is the task that stands for it and Created says whether that is this one: the
// ensure mode may find one that is active, and the same ID finds the task it made before.
type SubmitTask struct {
	ID   uuid.UUID `json:"id"`
	Spec TaskSpec  `json:"spec"`
}

func (*SubmitTask) kind() (string, int) { return "submit_task", 1 }

func (c *SubmitTask) check() error {
	if c.ID == uuid.Nil {
		return invalid("task "+quote(c.Spec.Type), "no id")
	}
	return c.Spec.check()
}

func (c *SubmitTask) apply(t *tx) (Result, error) { return t.submit(c.ID, c.Spec) }

func (t *tx) submit(id uuid.UUID, spec TaskSpec) (Result, error) {
	if _, ok := first[Task](&t.View, tTask, byID, id[:]); ok {
		return Result{Object: id}, nil
	}
	spec.Args = canonical(spec.Args)
	row := &Task{ID: id, TaskSpec: spec, State: TaskQueued, Serial: t.index, Created: t.at, Rev: t.index}
	if have := t.submitBlocked(row); have != nil {
		return Result{Object: have.ID}, nil
	}
	if n := count[Task](&t.View, tTask, byKey, nil); n >= TasksActiveMax {
		return Result{}, &Error{Err: ErrNoSpace, Object: "task " + quote(spec.Type), Detail: fmt.Sprintf("%d tasks wait or run", n),
			Remedy: "wait for them or cancel some"}
	}
	t.put(tTask, row)
	t.taskEvent("task_queued", row)
	return Result{Object: id, Created: true}, nil
}

func (t *tx) taskEvent(typ string, task *Task) {
	data := struct {
		Type    string   `json:"type"`
		Object  string   `json:"object,omitempty"`
		By      string   `json:"by,omitempty"`
		Problem *Problem `json:"problem,omitempty"`
	}{task.Type, task.Object, task.By, nil}
	if task.State == TaskFailed {
		data.Problem = task.Problem
	}
	t.emit(typ, tTask, task.ID.String(), data)
}

// StartTask gives a queued task to a worker. ErrConflict where it cannot start now: somebody was faster, or the ensure mode
// says so.
type StartTask struct {
	ID     uuid.UUID `json:"id"`
	Lease  uuid.UUID `json:"lease"`
	Worker uuid.UUID `json:"worker"`
}

func (*StartTask) kind() (string, int) { return "start_task", 1 }

func (c *StartTask) check() error {
	if c.Lease == uuid.Nil || c.Worker == uuid.Nil {
		return invalid("task "+c.ID.String(), "no lease or worker")
	}
	return nil
}

func (c *StartTask) apply(t *tx) (Result, error) {
	row, err := t.Task(c.ID)
	if err != nil {
		return Result{}, err
	}
	object := "task " + c.ID.String()
	if row.State != TaskQueued {
		return Result{}, &Error{Err: ErrConflict, Object: object, Detail: "is " + string(row.State)}
	}
	if row.NotBefore > t.at { // it was tried, and put back, since the proposer looked
		return Result{}, &Error{Err: ErrConflict, Object: object, Detail: "may not start yet"}
	}
	if other := t.startBlocked(&row); other != nil {
		return Result{}, &Error{Err: ErrConflict, Object: object, Detail: "waits for another of its kind", By: []string{other.ID.String()}}
	}
	row.State, row.Lease, row.Worker, row.Started, row.Rev = TaskRunning, c.Lease, c.Worker, t.at, t.index
	row.Deliveries++
	t.put(tTask, &row)
	t.taskEvent("task_started", &row)
	return Result{Object: c.ID}, nil
}

// ErrLease: the caller does not hold the task's lease any more, and stops.
var ErrLease = fmt.Errorf("lease is another's: %w", ErrConflict)

// leased returns the running task if the lease is the present one.
func (t *tx) leased(id, lease uuid.UUID) (Task, error) {
	row, err := t.Task(id)
	if err != nil {
		return Task{}, err
	}
	if row.State != TaskRunning || row.Lease != lease {
		return Task{}, &Error{Err: ErrLease, Object: "task " + id.String(), Detail: "is " + string(row.State)}
	}
	return row, nil
}

// RenewTask keeps a lease: the leader sees that the row has changed. The row then says whether the task is to stop.
type RenewTask struct {
	ID    uuid.UUID `json:"id"`
	Lease uuid.UUID `json:"lease"`
}

func (*RenewTask) kind() (string, int) { return "renew_task", 1 }

func (c *RenewTask) check() error { return nil }

func (c *RenewTask) apply(t *tx) (Result, error) {
	row, err := t.leased(c.ID, c.Lease)
	if err != nil {
		return Result{}, err
	}
	row.Rev = t.index
	t.put(tTask, &row)
	return Result{Object: c.ID}, nil
}

// ReportTask is a worker's word on how far it is. Steps are those it began since its last word; each ends the one before.
type ReportTask struct {
	ID         uuid.UUID       `json:"id"`
	Lease      uuid.UUID       `json:"lease"`
	Steps      []TaskStep      `json:"steps,omitempty"`
	Done       int64           `json:"done,omitempty"`
	Total      int64           `json:"total,omitempty"`
	Log        []TaskLine      `json:"log,omitempty"`
	Checkpoint json.RawMessage `json:"checkpoint,omitempty"`
}

func (*ReportTask) kind() (string, int) { return "report_task", 1 }

func (c *ReportTask) check() error {
	object := "task " + c.ID.String()
	if len(c.Log) > TaskLinesMax || c.Done < 0 || c.Total < 0 {
		return invalid(object, "progress below 0 or too many lines")
	}
	for _, l := range c.Log {
		if err := checkText(object, l.Text); err != nil {
			return err
		}
	}
	if len(c.Steps) > TaskStepsMax {
		return invalid(object, fmt.Sprintf("%d steps, more than %d", len(c.Steps), TaskStepsMax))
	}
	for _, s := range c.Steps {
		if err := checkText(object, s.Name); err != nil {
			return err
		}
	}
	return checkJSON(object, "checkpoint", c.Checkpoint, TaskResultBytesMax)
}

func (c *ReportTask) apply(t *tx) (Result, error) {
	row, err := t.leased(c.ID, c.Lease)
	if err != nil {
		return Result{}, err
	}
	row.tell(c)
	row.Rev = t.index
	t.put(tTask, &row)
	return Result{Object: c.ID}, nil
}

// tell adds a report to a row.
func (t *Task) tell(r *ReportTask) {
	t.Steps = slices.Clone(t.Steps)
	for _, s := range r.Steps {
		if n := len(t.Steps); n == TaskStepsMax || n > 0 && t.Steps[n-1].Name == s.Name && t.Steps[n-1].Ended == 0 {
			continue
		}
		t.endStep(s.Started)
		t.Steps = append(t.Steps, TaskStep{Name: s.Name, Started: s.Started})
	}
	t.addLog(r.Log)
	t.Done, t.Total = r.Done, r.Total
	if len(r.Checkpoint) > 0 {
		t.Checkpoint = canonical(r.Checkpoint)
	}
}

// endStep ends the running step of a row whose steps are its own.
func (t *Task) endStep(at Time) {
	if n := len(t.Steps); n > 0 && t.Steps[n-1].Ended == 0 {
		t.Steps[n-1].Ended = max(at, 1)
	}
}

// addLog keeps the newest lines.
func (t *Task) addLog(lines []TaskLine) {
	all := slices.Concat(t.Log, lines)
	t.Log = all[max(0, len(all)-TaskLinesMax):]
}

// Outcome is how a delivery ended.
type Outcome string

// Outcomes. Retry gives the task back: it waits until NotBefore, or fails where it was delivered often enough.
const (
	OutcomeSucceeded Outcome = "succeeded"
	OutcomeFailed    Outcome = "failed"
	OutcomeCancelled Outcome = "cancelled"
	OutcomeRetry     Outcome = "retry"
)

// FinishTask ends a delivery, with its last report. Uncounted says that the delivery ended for a reason that is not the
// task's, such as a node that restarts, and does not bring it nearer to its limit.
type FinishTask struct {
	ReportTask
	Outcome   Outcome         `json:"outcome"`
	Result    json.RawMessage `json:"result,omitempty"`
	Problem   *Problem        `json:"problem,omitempty"`
	NotBefore Time            `json:"not_before,omitempty"`
	Uncounted bool            `json:"uncounted,omitempty"`
}

func (*FinishTask) kind() (string, int) { return "finish_task", 1 }

func (c *FinishTask) check() error {
	object := "task " + c.ID.String()
	if c.Lease == uuid.Nil || c.NotBefore < 0 {
		return invalid(object, "no lease, or a time before 1970")
	}
	switch c.Outcome {
	case OutcomeSucceeded, OutcomeCancelled:
	case OutcomeFailed, OutcomeRetry:
		if c.Problem == nil {
			return invalid(object, "no problem told")
		}
	default:
		return invalid(object, "outcome "+quote(string(c.Outcome)))
	}
	if p := c.Problem; p != nil {
		if p.Code == "" || p.Cause == "" || p.Consequence == "" || p.Remedy == "" {
			return invalid(object, "a problem has a code, a cause, a consequence and a remedy")
		}
		for _, text := range []string{p.Code, p.Cause, p.Consequence, p.Remedy} {
			if err := checkText(object, text); err != nil {
				return err
			}
		}
	}
	if err := c.ReportTask.check(); err != nil {
		return err
	}
	return checkJSON(object, "result", c.Result, TaskResultBytesMax)
}

func (c *FinishTask) apply(t *tx) (Result, error) {
	row, err := t.leased(c.ID, c.Lease)
	if err != nil {
		return Result{}, err
	}
	row.tell(&c.ReportTask)
	row.Lease, row.Worker, row.Rev = uuid.Nil, uuid.Nil, t.index
	row.Problem = c.Problem
	if c.Uncounted {
		row.Deliveries--
	}
	if c.Outcome == OutcomeRetry && !row.Cancel && row.Deliveries < row.deliveries() {
		row.State, row.NotBefore = TaskQueued, c.NotBefore
		t.put(tTask, &row)
		t.taskEvent("task_requeued", &row)
		return Result{Object: c.ID}, nil
	}
	switch {
	case c.Outcome == OutcomeSucceeded:
		row.State, row.Problem, row.Result = TaskSucceeded, nil, canonical(c.Result)
		row.Checkpoint = nil
	case c.Outcome == OutcomeCancelled, c.Outcome == OutcomeRetry && row.Cancel:
		row.State = TaskCancelled
	default:
		row.State = TaskFailed
	}
	row.Ended = max(t.at, 1)
	row.endStep(t.at)
	t.put(tTask, &row)
	t.taskEvent("task_"+string(row.State), &row)
	return Result{Object: c.ID}, nil
}

// CancelTask ends a task that waits, and asks one that runs to stop at its next step.
type CancelTask struct {
	ID uuid.UUID `json:"id"`
}

func (*CancelTask) kind() (string, int) { return "cancel_task", 1 }

func (c *CancelTask) check() error { return nil }

func (c *CancelTask) apply(t *tx) (Result, error) {
	row, err := t.Task(c.ID)
	if err != nil {
		return Result{}, err
	}
	row.Rev = t.index
	switch row.State {
	case TaskQueued:
		row.State, row.Ended = TaskCancelled, max(t.at, 1)
		row.Steps = slices.Clone(row.Steps)
		row.endStep(t.at)
		t.put(tTask, &row)
		t.taskEvent("task_cancelled", &row)
	case TaskRunning:
		row.Cancel = true
		t.put(tTask, &row)
	default:
		return Result{}, &Error{Err: ErrConflict, Object: "task " + c.ID.String(), Detail: "has " + string(row.State) + " already"}
	}
	return Result{Object: c.ID}, nil
}

// RetryTask queues a task again that failed or was cancelled.
type RetryTask struct {
	ID uuid.UUID `json:"id"`
}

func (*RetryTask) kind() (string, int) { return "retry_task", 1 }

func (c *RetryTask) check() error { return nil }

func (c *RetryTask) apply(t *tx) (Result, error) {
	row, err := t.Task(c.ID)
	if err != nil {
		return Result{}, err
	}
	object := "task " + c.ID.String()
	if row.State != TaskFailed && row.State != TaskCancelled {
		return Result{}, &Error{Err: ErrConflict, Object: object, Detail: "is " + string(row.State),
			Remedy: "only what failed or was cancelled can be retried"}
	}
	if have := t.submitBlocked(&row); have != nil {
		return Result{}, &Error{Err: ErrConflict, Object: object, Detail: "another of its kind stands for it", By: []string{have.ID.String()}}
	}
	row.State, row.Serial, row.Deliveries, row.Ended, row.NotBefore, row.Cancel = TaskQueued, t.index, 0, 0, 0, false
	row.Rev = t.index
	t.put(tTask, &row)
	t.taskEvent("task_queued", &row)
	return Result{Object: c.ID}, nil
}

// TrimTasks forgets ended tasks, oldest first: those that ended before Before, and those beyond the newest Keep. It takes
// TasksTrimmedMax at a time.
type TrimTasks struct {
	Before Time `json:"before"`
	Keep   int  `json:"keep"`
}

func (*TrimTasks) kind() (string, int) { return "trim_tasks", 1 }

func (c *TrimTasks) check() error {
	if c.Keep < 0 {
		return invalid("tasks", fmt.Sprintf("keep %d", c.Keep))
	}
	return nil
}

func (c *TrimTasks) apply(t *tx) (Result, error) {
	over := count[Task](&t.View, tTask, byEnded, nil) - c.Keep
	var old []*Task
	rows(&t.View, tTask, byEnded, nil, func(r *Task) bool {
		if len(old) == TasksTrimmedMax || len(old) >= over && r.Ended >= c.Before {
			return false
		}
		old = append(old, r)
		return true
	})
	for _, r := range old {
		t.del(tTask, r)
	}
	return Result{}, nil
}

// Task returns one task.
func (v *View) Task(id uuid.UUID) (Task, error) {
	t, ok := first[Task](v, tTask, byID, id[:])
	if !ok {
		return Task{}, missing("task " + id.String())
	}
	return *t, nil
}

// Tasks calls f with every task, by id, until it returns false. f must not keep or change what the task points at.
func (v *View) Tasks(f func(*Task) bool) { rows(v, tTask, byID, nil, f) }

// QueuedTasks calls f with the tasks that wait in a queue, the next one first.
func (v *View) QueuedTasks(queue string, f func(*Task) bool) {
	rows(v, tTask, byQueue, append([]byte(queue), 0), f)
}

// RunningTasks returns the tasks that run.
func (v *View) RunningTasks() []Task { return all[Task](v, tTask, byRunning, nil) }

// CountTasks counts the tasks that wait or run, and those that ended.
func (v *View) CountTasks() (active, ended int) {
	return count[Task](v, tTask, byKey, nil), count[Task](v, tTask, byEnded, nil)
}

// OldestEnded is when the task ended that ended first; 0 where none has.
func (v *View) OldestEnded() (at Time) {
	rows(v, tTask, byEnded, nil, func(t *Task) bool { at = t.Ended; return false })
	return at
}

// CanStart says whether the ensure mode lets a waiting task start now.
func (v *View) CanStart(t *Task) bool { return v.startBlocked(t) == nil }
