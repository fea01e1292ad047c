package vpool

import (
	"context"
	"crypto/rand"
	"fmt"

	"github.com/google/uuid"

	"varve/control/jobs"
	"varve/control/state"
)

// RekeyTask changes the keys of one node's vDisks of a vPool; its arguments are RekeyArgs.
const RekeyTask = "vpool.rekey"

// RekeyArgs name the vPool, and the node, so that the tasks of several are different ones.
type RekeyArgs struct {
	VPool string    `json:"vpool"`
	Node  uuid.UUID `json:"node"`
}

// NewKEK makes a key encryption key for an encrypted vPool and puts it in force; what the former ones have wrapped can still be read.
// The vDisks' keys are wrapped by it when RekeyTask has run on every node that it returns, of which this one is the first.
func (c *Controller) NewKEK(ctx context.Context, name string) (nodes []uuid.UUID, err error) {
	v := c.cfg.Store.View()
	p, err := v.VPool(name)
	if err != nil {
		return nil, err
	}
	object := "vpool " + name
	if !p.Encrypted {
		return nil, &state.Error{Err: state.ErrConflict, Object: object, Detail: "is not encrypted", Remedy: "make an encrypted one, and move the vDisks there"}
	}
	former, err := KEKOf(c.cfg.Vault, p.ID)
	if err != nil {
		return nil, err
	}
	defer clear(former)
	if len(former) >= keksMax*KEKBytes {
		return nil, &state.Error{Err: state.ErrConflict, Object: object, Detail: fmt.Sprintf("%d former keys are still in use", keksMax-1),
			Remedy: "see that the tasks of earlier changes have succeeded on every node"}
	}
	keks := make([]byte, KEKBytes, KEKBytes+len(former))
	rand.Read(keks)
	keks = append(keks, former...)
	defer clear(keks)
	if err := c.cfg.Vault.Set(ctx, state.KEKOf(p.ID), keks); err != nil {
		return nil, err
	}
	c.cfg.Log.Info("a vpool has a new key encryption key", "vpool", name)
	nodes = []uuid.UUID{c.cfg.Node} // this one first
	for _, n := range v.Nodes() {
		if n.ID != c.cfg.Node {
			nodes = append(nodes, n.ID)
		}
	}
	return nodes, nil
}

// TaskTypes are the controller's long operations.
func (c *Controller) TaskTypes() []jobs.Type {
	return []jobs.Type{{
		Name: RekeyTask, Title: "change the keys of a vPool", Do: c.rekeyTask, Queue: state.QueueGeneric, Ensure: state.EnsureDeduped,
		Consequence: "some vDisks keep the key that they had, and it is wrapped by a former key of the vPool, which is kept",
		Remedy:      "start the task again: it goes on with those that are left",
	}}
}

func (c *Controller) rekeyTask(ctx context.Context, r *jobs.Run) error {
	var args RekeyArgs
	if err := r.Args(&args); err != nil {
		return err
	}
	p, err := c.cfg.Store.View().VPool(args.VPool)
	if err != nil {
		return err
	}
	before, err := KEKOf(c.cfg.Vault, p.ID)
	if err != nil {
		return err
	}
	defer clear(before)
	if err := c.cfg.Engine.Rekey(ctx, p.ID, r.Progress); err != nil {
		return fmt.Errorf("change the keys of vpool %s: %w", args.VPool, err)
	}
	dropped, err := c.dropFormer(ctx, p.ID, before)
	if err != nil {
		return err
	}
	return r.Result(map[string]any{"vpool": args.VPool, "former_keys_dropped": dropped})
}

// dropFormer forgets the former key encryption keys where no other node can have anything that they wrap, and nobody has made another one
// since before was read.
func (c *Controller) dropFormer(ctx context.Context, pool uuid.UUID, before []byte) (bool, error) {
	if len(c.cfg.Store.View().Nodes()) > 1 {
		return false, nil
	}
	now, err := KEKOf(c.cfg.Vault, pool)
	if err != nil {
		return false, err
	}
	defer clear(now)
	if len(now) == KEKBytes || string(now) != string(before) {
		return false, nil
	}
	if err := c.cfg.Vault.Set(ctx, state.KEKOf(pool), now[:KEKBytes]); err != nil {
		return false, fmt.Errorf("forget the former keys of vPool %s: %w", pool, err)
	}
	return true, nil
}
