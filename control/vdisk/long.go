package vdisk

import (
	"context"
	"errors"
	"strings"

	"github.com/google/uuid"

	"varve/control/jobs"
	"varve/control/state"
)

// Tasks for who does not want to wait. A rollback waits until what is in the log is on the backend, which may be away.
const (
	RollbackTask = "vdisk.rollback"
	CloneTask    = "vdisk.clone"
)

// RollbackArgs say which vDisk goes back to which of its snapshots.
type RollbackArgs struct {
	VDisk    string `json:"vdisk"`
	Snapshot string `json:"snapshot"` // its id
	Force    bool   `json:"force,omitempty"`
}

// CloneArgs say what is made of what; From is as in Clone.
type CloneArgs struct {
	From string `json:"from"`
	To   string `json:"to"`
}

// LongTypes are the tasks of operations that also can be waited for.
func (c *Controller) LongTypes() []jobs.Type {
	return []jobs.Type{{
		Name: RollbackTask, Title: "roll a vDisk back", Do: c.rollbackTask, Queue: state.QueueGeneric, Ensure: state.EnsureDeduped,
		Consequence: "the vDisk is as it was before", Remedy: "see that its backend answers and that no client has it open, then start the task again",
	}, {
		Name: CloneTask, Title: "clone a vDisk", Do: c.cloneTask, Queue: state.QueueGeneric,
		Consequence: "the vDisk is not made", Remedy: "see that its vPool's backend answers, then start the task again",
	}}
}

// rollbackTask is done once: what the vDisk was is kept under an id that follows from the task's.
func (c *Controller) rollbackTask(ctx context.Context, r *jobs.Run) error {
	var args RollbackArgs
	if err := r.Args(&args); err != nil {
		return err
	}
	id := uuid.NewSHA1(r.ID(), []byte("what was there before the rollback"))
	saved, err := c.rollback(ctx, args.VDisk, args.Snapshot, args.Force, id)
	if err != nil {
		return err
	}
	return r.Result(map[string]string{"vdisk": args.VDisk, "saved": saved.Name})
}

// cloneTask finds the clone that it has made before.
func (c *Controller) cloneTask(ctx context.Context, r *jobs.Run) error {
	var args CloneArgs
	if err := r.Args(&args); err != nil {
		return err
	}
	made, err := c.Get(ctx, args.To)
	switch {
	case errors.Is(err, state.ErrNotFound):
		made, err = c.Clone(ctx, args.From, args.To)
	case err == nil && r.Task().Deliveries <= 1:
		err = &state.Error{Err: state.ErrExist, Object: "vdisk " + args.To}
	case err == nil:
		err = c.cloneOf(ctx, made, args.From)
	}
	if err != nil {
		return err
	}
	return r.Result(map[string]string{"vdisk": made.FullName()})
}

// cloneOf refuses a vDisk that is not a clone of another, or of a snapshot of it.
func (c *Controller) cloneOf(ctx context.Context, made VDisk, from string) error {
	disk, _, _ := strings.Cut(from, "@")
	source, err := c.Get(ctx, disk)
	if err == nil && (made.Volume.Parent == nil || made.Volume.Parent.Volume != source.Volume.ID) {
		err = &state.Error{Err: state.ErrExist, Object: "vdisk " + made.FullName(), Detail: "is no clone of " + disk}
	}
	return err
}
