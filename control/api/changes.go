package api

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"time"

	"varve/control/api/internal"
	"varve/control/state"
)

// StreamChanges tells a console which objects change, so that it reads those again and no others.
func (a internalAPI) StreamChanges(ctx context.Context, r internal.StreamChangesRequestObject) (internal.StreamChangesResponseObject, error) {
	after, err := resume(a.cfg.Store.Index(), r.Params.Since, r.Params.LastEventID)
	if err != nil {
		return nil, err
	}
	c := &changes{store: a.cfg.Store, after: after, secrets: callOf(ctx).who.Has(state.RoleAdmin, state.RoleSecurityAdmin)}
	s, err := a.stream(ctx, fmt.Sprintf("id: %d\nevent: start\ndata: {\"index\":%d}\n", after, after),
		func(b *bytes.Buffer) error { return c.next(ctx, b) })
	return changeStream{s}, err
}

type changeStream struct{ *feed }

// VisitStreamChangesResponse implements the generated interface.
func (e changeStream) VisitStreamChangesResponse(w http.ResponseWriter) error { return e.write(w) }

// changes are those after an index, as a caller may see them.
type changes struct {
	store   *state.Store
	after   uint64
	secrets bool
	said    time.Time
}

// guardedKinds are told to those who may read them.
var guardedKinds = []string{"user", "group", "api_client", "token", "audit"}

// changesEvery bounds how often a stream writes: what changes in between comes together.
const changesEvery = 100 * time.Millisecond

// next waits for changes, for a while.
func (c *changes) next(ctx context.Context, b *bytes.Buffer) error {
	sleep := func(d time.Duration, more <-chan struct{}) {
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-ctx.Done():
		case <-more:
		case <-t.C:
		}
	}
	if left := changesEvery - time.Since(c.said); left > 0 {
		sleep(left, nil)
	}
	list, gap, more := c.store.Changes(c.after)
	if len(list) == 0 && !gap {
		sleep(rightsEvery, more)
		list, gap, _ = c.store.Changes(c.after)
	}
	if gap {
		c.after = c.store.Index()
		fmt.Fprintf(b, "id: %d\nevent: gap\ndata: {\"index\":%d}\n\n", c.after, c.after)
		list = nil
	}
	if len(list) > 0 {
		c.after = list[len(list)-1].Index
		if !c.secrets {
			list = slices.DeleteFunc(list, func(one state.Change) bool { return slices.Contains(guardedKinds, one.Kind) })
		}
	}
	if len(list) > 0 {
		data, err := json.Marshal(list)
		if err != nil {
			return fmt.Errorf("changes: %w", err)
		}
		fmt.Fprintf(b, "id: %d\nevent: change\ndata: %s\n\n", c.after, data)
	}
	if b.Len() > 0 {
		c.said = time.Now()
	}
	return nil
}
