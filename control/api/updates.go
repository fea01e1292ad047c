package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strconv"

	v1 "varve/control/api/customer"
	"varve/control/rollout"
	"varve/control/state"
)

// lastRollout is the newest one, nil if there was none.
func (s *Server) lastRollout() *state.Task {
	var last *state.Task
	s.cfg.Store.View().Tasks(func(t *state.Task) bool {
		if t.Type == rollout.TaskRollout && (last == nil || t.Created >= last.Created) {
			one := *t
			last = &one
		}
		return true
	})
	return last
}

func (a customerAPI) GetUpdates(ctx context.Context, _ v1.GetUpdatesRequestObject) (v1.GetUpdatesResponseObject, error) {
	of, err := a.appliance()
	if err != nil {
		return nil, err
	}
	u, err := of.Updates(ctx)
	if err != nil {
		return nil, err
	}
	if t := a.lastRollout(); t != nil {
		task := a.toTask(*t)
		u.Rollout = &task
	}
	return v1.GetUpdates200JSONResponse(u), nil
}

func (a customerAPI) UploadUpdate(ctx context.Context, r v1.UploadUpdateRequestObject) (v1.UploadUpdateResponseObject, error) {
	about(ctx, "update bundle")
	of, err := a.appliance()
	if err != nil {
		return nil, err
	}
	if t := a.lastRollout(); t != nil && t.Active() {
		return nil, &state.Error{Err: state.ErrConflict, Object: "update bundle", Detail: "a rollout is under way", By: []string{t.ID.String()},
			Remedy: "wait for its task, or cancel it"}
	}
	b, err := of.TakeUpdate(ctx, r.Body)
	if _, over := errors.AsType[*http.MaxBytesError](err); over {
		return nil, refuse(http.StatusRequestEntityTooLarge, "too_large", fmt.Sprintf("the bundle has more than %d bytes", callOf(ctx).BodyMax), "")
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil, refuse(http.StatusRequestTimeout, "invalid", fmt.Sprintf("nothing of the bundle came for %s", readTimeout), "send it again")
	}
	if err == nil {
		about(ctx, "update bundle "+b.Version)
	}
	return v1.UploadUpdate201JSONResponse(b), err
}

func (a customerAPI) StartRollout(ctx context.Context, r v1.StartRolloutRequestObject) (v1.StartRolloutResponseObject, error) {
	about(ctx, "update "+clip(r.Body.SHA256))
	of, err := a.appliance()
	if err != nil {
		return nil, err
	}
	if a.cfg.Tasks == nil {
		return nil, errNoAppliance
	}
	spec, err := of.Rollout(ctx, r.Body.SHA256, r.Body.Finalise, callOf(ctx).who.Who())
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		u, err := of.Updates(ctx)
		if err != nil {
			return nil, err
		}
		changes, affected, lost := []string{}, []string{}, []string(nil)
		for _, n := range u.Nodes {
			changes = append(changes, n.Name+" runs "+n.Version+" and restarts, if that is another version")
			affected = append(affected, "guests that are served by "+n.Name+" wait while it restarts")
		}
		if r.Body.Finalise {
			lost = []string{"the way back to the versions before"}
		}
		return nil, wouldDo("updates all appliances, one after the other", changes, lost, affected, "")
	}
	t, err := a.queue(ctx, spec)
	return v1.StartRollout202JSONResponse{Body: t, Headers: v1.StartRollout202ResponseHeaders{Location: location("tasks", t.ID.String())}}, err
}

// finaliseConfirm is what has to be repeated: what is finalised is no object.
const finaliseConfirm = "finalise"

func (a customerAPI) FinaliseUpdate(ctx context.Context, r v1.FinaliseUpdateRequestObject) (v1.FinaliseUpdateResponseObject, error) {
	about(ctx, "data formats")
	view := a.cfg.Store.View()
	to, behind := view.LevelReady()
	if to <= view.Level() {
		return nil, &state.Error{Err: state.ErrConflict, Object: "data formats", By: behind, Remedy: "update the nodes first",
			Detail: "are at level " + strconv.Itoa(view.Level()) + ", the highest that all nodes know"}
	}
	if r.Params.DryRun {
		return nil, wouldDo(fmt.Sprintf("has all nodes write data formats of level %d instead of %d", to, view.Level()), nil,
			[]string{"the way back to the versions before"}, nil, finaliseConfirm)
	}
	if err := confirm(r.Params.Confirm, finaliseConfirm); err != nil {
		return nil, err
	}
	_, err := a.cfg.Raft.Apply(ctx, &state.RaiseLevel{To: to})
	return v1.FinaliseUpdate204Response{}, err
}
