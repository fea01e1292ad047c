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
	"time"

	"varve/control/api/internal"
	"varve/control/auth"
	"varve/control/state"
)

// StreamChanges tells a console which objects change, so that it reads those again and no others.
func (a internalAPI) StreamChanges(ctx context.Context, r internal.StreamChangesRequestObject) (internal.StreamChangesResponseObject, error) {
	c := callOf(ctx)
	after := a.cfg.Store.Index()
	if r.Params.Since != nil {
		after = uint64(*r.Params.Since)
	}
	if r.Params.LastEventID != "" {
		seen, err := strconv.ParseUint(r.Params.LastEventID, 10, 64)
		if err != nil {
			return nil, refuse(http.StatusBadRequest, "invalid", "Last-Event-ID is no index of this stream", "leave it out")
		}
		after = seen
	}
	if !a.streams.enter(c.who.Who()) {
		return nil, refuse(http.StatusTooManyRequests, "rate_limited", "too many event streams are open", "close some")
	}
	return &changeStream{ctx: ctx, server: a.Server, who: c.who, after: after}, nil
}

// changeStream is an answer that goes on.
type changeStream struct {
	ctx    context.Context // of the request, which the answer is part of
	server *Server
	who    auth.Principal
	after  uint64
}

// guardedKinds are told to those who may read them.
var guardedKinds = []string{"user", "group", "api_client", "token", "audit"}

// changesEvery bounds how often a stream writes: what changes in between comes together.
const changesEvery = 100 * time.Millisecond

// VisitStreamChangesResponse implements the generated interface.
func (e *changeStream) VisitStreamChangesResponse(w http.ResponseWriter) error {
	defer e.server.streams.leave(e.who.Who())
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("X-Accel-Buffering", "no")
	w.WriteHeader(http.StatusOK)
	rc := http.NewResponseController(w)
	send := func(b []byte) error {
		if err := rc.SetWriteDeadline(time.Now().Add(streamWrite)); err != nil && !errors.Is(err, http.ErrNotSupported) {
			return err
		}
		if _, err := w.Write(b); err != nil {
			return err
		}
		return rc.Flush()
	}
	if send(fmt.Appendf(nil, "retry: 2000\nid: %d\nevent: start\ndata: {\"index\":%d}\n\n", e.after, e.after)) != nil {
		return nil
	}
	secrets := e.who.Has(state.RoleAdmin, state.RoleSecurityAdmin)
	beat := time.Now()
	for e.ctx.Err() == nil && e.server.serving() && e.server.auth.Still(e.who) {
		changes, gap, more := e.server.cfg.Store.Changes(e.after)
		var b bytes.Buffer
		if gap {
			e.after = e.server.cfg.Store.Index()
			fmt.Fprintf(&b, "id: %d\nevent: gap\ndata: {\"index\":%d}\n\n", e.after, e.after)
			changes = nil
		}
		if len(changes) > 0 {
			e.after = changes[len(changes)-1].Index
			if !secrets {
				changes = slices.DeleteFunc(changes, func(c state.Change) bool { return slices.Contains(guardedKinds, c.Kind) })
			}
		}
		if len(changes) > 0 {
			data, err := json.Marshal(changes)
			if err != nil {
				return fmt.Errorf("changes: %w", err)
			}
			fmt.Fprintf(&b, "id: %d\nevent: change\ndata: %s\n\n", e.after, data)
		}
		if b.Len() == 0 && time.Since(beat) >= heartbeatEvery {
			b.WriteString(": alive\n\n")
		}
		wait := rightsEvery
		if b.Len() > 0 {
			beat, wait = time.Now(), changesEvery
			if send(b.Bytes()) != nil {
				return nil // the caller is gone
			}
			more = nil
		}
		t := time.NewTimer(wait)
		select {
		case <-e.ctx.Done():
		case <-more:
		case <-t.C:
		}
		t.Stop()
	}
	return nil
}
