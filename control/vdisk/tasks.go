package vdisk

import (
	"context"
	"errors"

	"varve/control/jobs"
	"varve/control/state"
)

// FromTemplateTask makes vDisks from a template; its arguments are FromTemplateArgs.
const FromTemplateTask = "vdisk.from_template"

// FromTemplateArgs name the template and the vDisks to make.
type FromTemplateArgs struct {
	Template string   `json:"template"`
	Names    []string `json:"names"`
}

// TaskTypes are the controller's long operations.
func (c *Controller) TaskTypes() []jobs.Type {
	return []jobs.Type{{
		Name: FromTemplateTask, Title: "make vDisks from a template", Do: c.fromTemplateTask, Queue: state.QueueGeneric,
		Consequence: "some of the vDisks are not made", Remedy: "see which there are, and start the task again: it makes those that are missing",
	}, {
		Name: FlattenTask, Title: "make a clone stand by itself", Do: c.flattenTask, Queue: state.QueueGeneric, Ensure: state.EnsureDeduped,
		Consequence: "the vDisk is still a clone; what was copied stays", Remedy: "delete its snapshots if they are named as the cause, and start the task again: it copies what is missing",
	}, {
		Name: RewindTask, Title: "make a vDisk as it was", Do: c.rewindTask, Queue: state.QueueGeneric,
		Consequence: "nothing is made, or the snapshot without the vDisk", Remedy: "see which snapshots the vDisk has, and start the task again",
	}}
}

// fromTemplateTask makes the vDisks that are not there yet: it may have been started before.
func (c *Controller) fromTemplateTask(ctx context.Context, r *jobs.Run) error {
	var args FromTemplateArgs
	if err := r.Args(&args); err != nil {
		return err
	}
	template, err := c.Get(ctx, args.Template)
	if err != nil {
		return err
	}
	var missing []string
	for _, name := range args.Names {
		made, err := c.Get(ctx, name)
		switch {
		case errors.Is(err, state.ErrNotFound):
			missing = append(missing, name)
		case err != nil:
			return err
		case made.Volume.Parent == nil || made.Volume.Parent.Volume != template.Volume.ID:
			return &state.Error{Err: state.ErrExist, Object: "vdisk " + name, Detail: "is not made from " + args.Template}
		}
	}
	made, total := len(args.Names)-len(missing), int64(len(args.Names))
	r.Progress(int64(made), total)
	if len(missing) > 0 {
		if _, err := c.FromTemplate(ctx, args.Template, missing, func(done int) { r.Progress(int64(made+done), total) }); err != nil {
			return err
		}
	}
	return r.Result(map[string]any{"template": args.Template, "vdisks": args.Names})
}
