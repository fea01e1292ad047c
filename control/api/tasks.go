package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	v1 "varve/control/api/customer"
	"varve/control/events"
	"varve/control/jobs"
	"varve/control/state"
)

// Tasks is the task queue; jobs.Broker is one.
type Tasks interface {
	Submit(ctx context.Context, spec state.TaskSpec) (id uuid.UUID, created bool, err error)
	Cancel(ctx context.Context, id uuid.UUID) error
	Retry(ctx context.Context, id uuid.UUID) error
	Wait(ctx context.Context, id uuid.UUID) (state.Task, error)
}

// async says whether the caller wants a task instead of the answer (RFC 7240).
func (s *Server) async(prefer string) bool {
	return s.cfg.Tasks != nil && slices.ContainsFunc(strings.Split(prefer, ","), func(p string) bool { return strings.EqualFold(strings.TrimSpace(p), "respond-async") })
}

// submit queues a task of a type for the caller.
func (s *Server) submit(ctx context.Context, typ, object string, args any) (v1.Task, error) {
	t, ok := s.cfg.Types[typ]
	if !ok {
		return v1.Task{}, fmt.Errorf("task type %s is not known to this node", typ)
	}
	spec, err := t.Spec(object, callOf(ctx).who.Who(), args)
	if err != nil {
		return v1.Task{}, err
	}
	return s.queue(ctx, spec)
}

// submitAt is submit for what the owner of a volume does, if it has one.
func (s *Server) submitAt(ctx context.Context, owner uuid.UUID, typ, object string, args any) (v1.Task, error) {
	t, ok := s.cfg.Types[typ]
	if !ok {
		return v1.Task{}, fmt.Errorf("task type %s is not known to this node", typ)
	}
	if owner != uuid.Nil {
		t.Queue = state.QueueOf(owner)
	}
	spec, err := t.Spec(object, callOf(ctx).who.Who(), args)
	if err != nil {
		return v1.Task{}, err
	}
	return s.queue(ctx, spec)
}

func (s *Server) queue(ctx context.Context, spec state.TaskSpec) (v1.Task, error) {
	id, _, err := s.cfg.Tasks.Submit(ctx, spec)
	if err != nil {
		return v1.Task{}, err
	}
	task, err := s.cfg.Store.View().Task(id)
	return s.toTask(task), err
}

func optionalTime(t state.Time) *time.Time {
	if t == 0 {
		return nil
	}
	at := utc(t)
	return &at
}

func (s *Server) toTask(t state.Task) v1.Task {
	out := v1.Task{ID: t.ID, Type: t.Type, Title: t.Type, State: string(t.State), Queue: t.Queue, Object: t.Object, By: t.By, Done: t.Done, Total: t.Total,
		Steps: []v1.TaskStep{}, Log: []v1.TaskLine{}, Result: t.Result, Created: utc(t.Created), Started: optionalTime(t.Started),
		Ended: optionalTime(t.Ended), Rev: t.Rev, CanCancel: t.State == state.TaskQueued || t.State == state.TaskRunning && !t.Cancel}
	if typ, ok := s.cfg.Types[t.Type]; ok && typ.Title != "" {
		out.Title = typ.Title
	}
	for _, step := range t.Steps {
		out.Steps = append(out.Steps, v1.TaskStep{Name: step.Name, Started: utc(step.Started), Ended: optionalTime(step.Ended)})
	}
	for _, l := range t.Log {
		out.Log = append(out.Log, v1.TaskLine{At: utc(l.At), Text: l.Text})
	}
	if t.Problem != nil {
		out.Problem = &v1.TaskProblem{Code: t.Problem.Code, Cause: t.Problem.Cause, Consequence: t.Problem.Consequence, Remedy: t.Problem.Remedy}
	}
	if n, err := s.cfg.Store.View().Node(t.Worker); err == nil {
		out.Node = n.Name
	}
	return out
}

func (a customerAPI) ListTasks(ctx context.Context, _ v1.ListTasksRequestObject) (v1.ListTasksResponseObject, error) {
	var all []v1.Task
	a.cfg.Store.View().Tasks(func(t *state.Task) bool { all = append(all, a.toTask(*t)); return true })
	slices.SortStableFunc(all, func(x, y v1.Task) int { return y.Created.Compare(x.Created) })
	page, err := listPage(ctx, all, func(t v1.Task) string { return t.ID.String() })
	return v1.ListTasks200JSONResponse{Items: page.items, Next: page.next, Count: page.count}, err
}

func taskID(ctx context.Context, given string) (uuid.UUID, error) {
	id, err := uuid.Parse(given)
	if err != nil {
		return id, unseen("task " + clip(given))
	}
	about(ctx, "task "+id.String())
	return id, nil
}

const taskWaitMax = 50

func (a customerAPI) GetTask(ctx context.Context, r v1.GetTaskRequestObject) (v1.GetTaskResponseObject, error) {
	id, err := taskID(ctx, r.Task)
	if err != nil {
		return nil, err
	}
	if r.Params.Wait < 0 || r.Params.Wait > taskWaitMax {
		return nil, badQuery("wait", "is not a number from 0 to 50")
	}
	if r.Params.Wait > 0 {
		wait, cancel := context.WithTimeout(ctx, time.Duration(r.Params.Wait)*time.Second)
		_, err := a.cfg.Tasks.Wait(wait, id)
		cancel()
		if err != nil && !errors.Is(err, context.DeadlineExceeded) {
			return nil, err
		}
	}
	t, err := a.cfg.Store.View().Task(id)
	if err != nil {
		return nil, err
	}
	return v1.GetTask200JSONResponse(a.toTask(t)), nil
}

func (a customerAPI) CancelTask(ctx context.Context, r v1.CancelTaskRequestObject) (v1.CancelTaskResponseObject, error) {
	id, err := taskID(ctx, r.Task)
	if err != nil {
		return nil, err
	}
	t, err := a.cfg.Store.View().Task(id)
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		return nil, wouldDo("has task "+t.Type+" stop at its next step", nil, nil, []string{t.Object}, "")
	}
	if err := a.cfg.Tasks.Cancel(ctx, id); err != nil {
		return nil, err
	}
	t, err = a.cfg.Store.View().Task(id)
	return v1.CancelTask202JSONResponse(a.toTask(t)), err
}

func (a customerAPI) RetryTask(ctx context.Context, r v1.RetryTaskRequestObject) (v1.RetryTaskResponseObject, error) {
	id, err := taskID(ctx, r.Task)
	if err != nil {
		return nil, err
	}
	t, err := a.cfg.Store.View().Task(id)
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		return nil, wouldDo("starts task "+t.Type+" again", nil, nil, []string{t.Object}, "")
	}
	if err := a.cfg.Tasks.Retry(ctx, id); err != nil {
		return nil, err
	}
	t, err = a.cfg.Store.View().Task(id)
	return v1.RetryTask202JSONResponse(a.toTask(t)), err
}

func toEvent(e state.Event) v1.Event {
	out := v1.Event{Seq: e.Seq, ID: e.ID, At: utc(e.At), Type: e.Type, Topic: e.Topic, Key: e.Key, Data: json.RawMessage(e.Data)}
	if e.Node != uuid.Nil {
		out.Node = e.Node.String()
	}
	return out
}

func commaList(s string) []string {
	if s == "" {
		return nil
	}
	return strings.Split(s, ",")
}

const eventsListed = 1 << 20 // bounded by what the state keeps

func (a customerAPI) ListEvents(ctx context.Context, r v1.ListEventsRequestObject) (v1.ListEventsResponseObject, error) {
	f := events.Filter{Topics: commaList(r.Params.Topic), Types: commaList(r.Params.Type), Key: r.Params.Key}
	kept := a.cfg.Store.View().Events(0, eventsListed)
	all := make([]v1.Event, 0, len(kept))
	for _, e := range slices.Backward(kept) {
		if f.Takes(e) {
			all = append(all, toEvent(e))
		}
	}
	page, err := listPage(ctx, all, func(e v1.Event) string { return strconv.FormatUint(e.Seq, 10) })
	return v1.ListEvents200JSONResponse{Items: page.items, Next: page.next, Count: page.count}, err
}

// StreamEvents sends events as they come, first those after the one that the caller saw last. It ends when the caller's rights do.
func (a customerAPI) StreamEvents(ctx context.Context, r v1.StreamEventsRequestObject) (v1.StreamEventsResponseObject, error) {
	after, err := resume(a.cfg.Store.View().EventsLast(), r.Params.Since, r.Params.LastEventID)
	if err != nil {
		return nil, err
	}
	f := events.Filter{Topics: commaList(r.Params.Topic), Types: commaList(r.Params.Type), Key: r.Params.Key}
	sub := events.Subscribe(a.cfg.Store, f, after)
	s, err := a.stream(ctx, "", func(b *bytes.Buffer) error { return nextEvents(ctx, sub, b) })
	return eventStream{s}, err
}

type eventStream struct{ *feed }

// VisitStreamEventsResponse implements the generated interface.
func (e eventStream) VisitStreamEventsResponse(w http.ResponseWriter) error { return e.write(w) }

// nextEvents waits for events, for a while.
func nextEvents(ctx context.Context, sub *events.Subscription, b *bytes.Buffer) error {
	wait, cancel := context.WithTimeout(ctx, rightsEvery)
	defer cancel()
	batch, err := sub.Next(wait)
	var missed *events.MissedError
	switch {
	case errors.As(err, &missed):
		fmt.Fprintf(b, "event: gap\ndata: {\"from\":%d}\n\n", missed.From)
	case errors.Is(err, context.DeadlineExceeded):
	case err != nil:
		return errStreamOver
	}
	for _, ev := range batch {
		e := toEvent(ev)
		data, err := json.Marshal(e)
		if err != nil {
			return fmt.Errorf("event %d: %w", e.Seq, err)
		}
		fmt.Fprintf(b, "id: %d\nevent: %s\ndata: %s\n\n", e.Seq, e.Type, data)
	}
	return nil
}

var _ Tasks = (*jobs.Broker)(nil)
