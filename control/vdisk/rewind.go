package vdisk

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

	"varve/control/events"
	"varve/control/jobs"
	"varve/control/state"
)

// FlattenTask gives a clone data of its own; its arguments are FlattenArgs.
const FlattenTask = "vdisk.flatten"

// FlattenArgs name the clone.
type FlattenArgs struct {
	VDisk string `json:"vdisk"`
}

// RewindTask makes a vDisk that begins as another one was at a moment of the past; its arguments are RewindArgs.
const RewindTask = "vdisk.rewind"

// RewindArgs say of which vDisk, to when, and what is made: a vDisk, unless To is empty, and a snapshot of the old one, under a
// name of its own if none is given.
type RewindArgs struct {
	VDisk    string    `json:"vdisk"`
	At       time.Time `json:"at"`
	To       string    `json:"to,omitempty"`
	Snapshot string    `json:"snapshot,omitempty"`
}

// Flatten makes a clone stand by itself.
func (c *Controller) Flatten(ctx context.Context, name string, progress func(done, total int64)) error {
	d, err := c.Get(ctx, name)
	if err != nil {
		return err
	}
	if d.Volume.Parent == nil {
		return nil
	}
	if err := c.cfg.Engine.Flatten(ctx, d.Volume, progress); err != nil {
		return fmt.Errorf("flatten vdisk %s: %w", name, err)
	}
	if _, err := c.cfg.Raft.Apply(ctx, &state.SetParents{Volumes: []state.NewParent{{Volume: d.Volume.ID}}}); err != nil {
		return fmt.Errorf("flatten vdisk %s: note that it has no parent: %w", name, err)
	}
	c.cfg.Log.Info("vdisk flattened", "vdisk", name)
	return nil
}

// Promote makes a clone the owner of the snapshots that it shares with its parent, and the parent a clone of it. It copies nothing.
func (c *Controller) Promote(ctx context.Context, name string) (VDisk, error) {
	d, err := c.Get(ctx, name)
	if err != nil {
		return VDisk{}, err
	}
	if d.Volume.Parent == nil {
		return VDisk{}, &state.Error{Err: state.ErrConflict, Object: "vdisk " + name, Detail: "is no clone", Remedy: "there is nothing to take over"}
	}
	parents, err := c.cfg.Engine.Promote(ctx, d.Volume)
	if err != nil {
		c.noteParent(ctx, d) // the answer may be that it is a clone of something else by now
		return VDisk{}, fmt.Errorf("promote vdisk %s: %w", name, err)
	}
	if _, err := c.cfg.Raft.Apply(ctx, &state.SetParents{Volumes: parents}); err != nil {
		return VDisk{}, fmt.Errorf("promote vdisk %s: note who is a clone of whom: %w", name, err)
	}
	c.cfg.Log.Info("vdisk promoted", "vdisk", name, "of", d.Volume.Parent.Volume)
	return c.Get(ctx, name)
}

func (c *Controller) flattenTask(ctx context.Context, r *jobs.Run) error {
	var args FlattenArgs
	if err := r.Args(&args); err != nil {
		return err
	}
	if err := c.Flatten(ctx, args.VDisk, r.Progress); err != nil {
		return err
	}
	return r.Result(map[string]any{"vdisk": args.VDisk})
}

// RewindRange says how far back a vDisk can be had.
func (c *Controller) RewindRange(ctx context.Context, name string) (RewindRange, error) {
	d, err := c.Get(ctx, name)
	if err != nil {
		return RewindRange{}, err
	}
	w, err := c.cfg.Engine.RewindRange(ctx, d.Volume)
	if err != nil {
		return RewindRange{}, fmt.Errorf("rewind window of vdisk %s: %w", name, err)
	}
	return w, nil
}

// CheckRewind says whether a rewind can be begun.
func (c *Controller) CheckRewind(ctx context.Context, args RewindArgs) error {
	object := "vdisk " + args.VDisk
	if args.Snapshot != "" {
		if err := checkSnapshotName("snapshot "+args.VDisk+"@"+args.Snapshot, args.Snapshot); err != nil {
			return err
		}
	}
	w, err := c.RewindRange(ctx, args.VDisk)
	switch {
	case err != nil:
		return err
	case w.From.IsZero():
		return &state.Error{Err: state.ErrConflict, Object: object, Detail: "has no rewind window", Remedy: "set rewind_seconds in its policy or its vPool's; what is written from then on can be had back"}
	case args.At.Before(w.From) || args.At.After(time.Now()):
		return &state.Error{Err: state.ErrInvalid, Object: object, Detail: "can be had as it was from " + w.From.UTC().Format(time.RFC3339) + " until now",
			Remedy: "name a moment between"}
	case args.To == "":
		return nil
	}
	if _, err := c.Get(ctx, args.To); !errors.Is(err, state.ErrNotFound) {
		if err == nil {
			err = &state.Error{Err: state.ErrExist, Object: "vdisk " + args.To}
		}
		return err
	}
	return nil
}

// Rewind does what RewindArgs say. id makes it the same snapshot when it is called again.
func (c *Controller) Rewind(ctx context.Context, id uuid.UUID, args RewindArgs, progress func(done, total int64)) (Snapshot, error) {
	d, s, err := c.find(ctx, args.VDisk, id.String())
	if errors.Is(err, state.ErrNotFound) {
		if d, err = c.Get(ctx, args.VDisk); err != nil {
			return Snapshot{}, err
		}
		at := args.At.Truncate(time.Second)
		spec := SnapshotSpec{ID: id, Name: args.Snapshot, Created: at, Automatic: args.Snapshot == "", Labels: map[string]string{"rewound-to": at.UTC().Format(time.RFC3339)}}
		if spec.Name == "" {
			spec.Name = "rewind-" + at.UTC().Format("2006-01-02T15:04:05Z") + "-" + id.String()[:8]
		}
		if s, err = c.cfg.Engine.Rewind(ctx, d.Volume, at, spec, progress); err == nil {
			c.cfg.Log.Info("vdisk rewound", "vdisk", args.VDisk, "to", at, "snapshot", s.Name)
			c.snapshotEvent(events.SnapshotCreate, d, s)
		}
	}
	if err != nil {
		return Snapshot{}, fmt.Errorf("rewind vdisk %s: %w", args.VDisk, err)
	}
	if args.To == "" {
		return s, nil
	}
	made, err := c.Get(ctx, args.To)
	switch {
	case errors.Is(err, state.ErrNotFound):
		_, err = c.Clone(ctx, args.VDisk+"@"+s.ID.String(), args.To)
	case err == nil && (made.Volume.Parent == nil || made.Volume.Parent.Snapshot != s.ID):
		err = &state.Error{Err: state.ErrExist, Object: "vdisk " + args.To, Detail: "is not made from the rewind; the snapshot " + s.Name + " is"}
	}
	return s, err
}

func (c *Controller) rewindTask(ctx context.Context, r *jobs.Run) error {
	var args RewindArgs
	if err := r.Args(&args); err != nil {
		return err
	}
	s, err := c.Rewind(ctx, r.ID(), args, r.Progress)
	if err != nil {
		return err
	}
	return r.Result(map[string]any{"vdisk": args.VDisk, "snapshot": s.Name, "to": args.To})
}
