package vpool

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

	"varve/control/jobs"
	"varve/control/state"
)

// # Rotation
//
//	NewKEK      a new key encryption key before the former ones, durably; what they have wrapped can still be read
//	RekeyTask   on each node that may have vDisks of the vPool: all their keys wrapped by the new one, here and on the backend; its result
//	            names the key encryption key that it was done for
//	forget      when each of those nodes has such a result, or joined after the rotation began: the former ones go
//
// forget is tried by each RekeyTask at its end, and by a task a little later, since of two that end at the same time neither sees the other.
// Every change of the key encryption keys is made at the revision that was looked at, so none is lost.

const (
	// RekeyTask changes the keys of one node's vDisks of a vPool; its arguments are RekeyArgs.
	RekeyTask = "vpool.rekey"

	forgetTask  = "vpool.forget-keys"
	forgetAfter = 5 * time.Second // the end of a RekeyTask
)

// RekeyArgs name the vPool, and the node, so that the tasks of several are different ones.
type RekeyArgs struct {
	VPool string    `json:"vpool"`
	Node  uuid.UUID `json:"node"`
}

// forgetArgs name the vPool.
type forgetArgs struct {
	Pool uuid.UUID `json:"pool"`
}

// rekeyed is the result of a RekeyTask, and, without KEK, of a forgetTask.
type rekeyed struct {
	VPool   string    `json:"vpool"`
	Pool    uuid.UUID `json:"pool"`
	KEK     string    `json:"kek,omitempty"` // that the node's keys are wrapped by, as kekName calls it
	Dropped bool      `json:"former_keys_dropped"`
	Waiting []string  `json:"waiting_for,omitempty"` // nodes that have not changed their keys
}

// kekName names a key encryption key and tells nothing of it.
func kekName(kek []byte) string {
	sum := sha256.Sum256(kek)
	return hex.EncodeToString(sum[:8])
}

// keyNodes are the nodes that may have vDisks of a vPool.
func keyNodes(v *state.View, p state.VPool) (out []state.Node) {
	for _, n := range v.Nodes() {
		if p.Backend.Node == uuid.Nil || n.ID == p.Backend.Node {
			out = append(out, n)
		}
	}
	return out
}

// NewKEK makes a key encryption key for an encrypted vPool and puts it in force; what the former ones have wrapped can still be read.
// The vDisks' keys are wrapped by it when RekeyTask has run on every node that it returns, of which this one is the first, if it is one of them.
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
	former, rev, err := c.keks(v, p.ID)
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
	if err := c.setKEKs(ctx, p.ID, keks, rev); err != nil {
		return nil, err
	}
	c.cfg.Log.Info("a vpool has a new key encryption key", "vpool", name)
	for _, n := range keyNodes(v, p) {
		if nodes = append(nodes, n.ID); n.ID == c.cfg.Node {
			nodes[0], nodes[len(nodes)-1] = nodes[len(nodes)-1], nodes[0]
		}
	}
	if len(nodes) == 0 { // the node is not registered yet
		nodes = []uuid.UUID{c.cfg.Node}
	}
	return nodes, nil
}

// keks gives the key encryption keys, and the revision at which they may be changed. The caller clears them.
func (c *Controller) keks(v *state.View, pool uuid.UUID) (keks []byte, rev uint64, err error) {
	sealed, err := v.Secret(state.KEKOf(pool))
	if err != nil {
		return nil, 0, err
	}
	keks, err = KEKOf(c.cfg.Vault, pool) // newer ones than in v are changed at an old revision, which is refused
	return keks, sealed.Rev, err
}

// setKEKs changes them, unless somebody else has since.
func (c *Controller) setKEKs(ctx context.Context, pool uuid.UUID, keks []byte, rev uint64) error {
	cmd := c.cfg.Vault.Seal(state.KEKOf(pool), keks)
	cmd.Rev = rev
	if _, err := c.cfg.Raft.Apply(ctx, cmd); err != nil {
		return fmt.Errorf("keep the key encryption keys of vPool %s: %w", pool, err)
	}
	return nil
}

// TaskTypes are the controller's long operations.
func (c *Controller) TaskTypes() []jobs.Type {
	return []jobs.Type{{
		Name: RekeyTask, Title: "change the keys of a vPool", Do: c.rekeyTask, Queue: state.QueueGeneric, Ensure: state.EnsureDeduped,
		Consequence: "some vDisks keep the key that they had, and it is wrapped by a former key of the vPool, which is kept",
		Remedy:      "start the task again: it goes on with those that are left",
	}, {
		Name: forgetTask, Title: "forget the former keys of a vPool", Do: c.forgetTask, Queue: state.QueueGeneric,
		Consequence: "former key encryption keys of the vPool are kept, which nothing needs",
		Remedy:      "nothing has to be done: the next change of keys forgets them too",
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
	before, _, err := c.keks(c.cfg.Store.View(), p.ID)
	if err != nil {
		return err
	}
	out := rekeyed{VPool: p.Name, Pool: p.ID, KEK: kekName(before[:KEKBytes])}
	clear(before)
	if err := c.cfg.Engine.Rekey(ctx, p.ID, r.Progress); err != nil {
		return fmt.Errorf("change the keys of vpool %s: %w", args.VPool, err)
	}
	out.Dropped, out.Waiting, err = c.forget(ctx, p, args.Node, out.KEK)
	if err != nil {
		return err
	}
	if len(out.Waiting) > 0 {
		spec, err := jobs.Type{Name: forgetTask, Queue: state.QueueGeneric}.Spec("vpool "+p.Name, "task "+r.ID().String(), forgetArgs{Pool: p.ID})
		if err != nil {
			return err
		}
		spec.NotBefore = state.Time(time.Now().Add(forgetAfter).UnixNano())
		if _, err := c.cfg.Raft.Apply(ctx, &state.SubmitTask{ID: uuid.NewSHA1(r.ID(), []byte(forgetTask)), Spec: spec}); err != nil {
			return &jobs.Retry{Err: fmt.Errorf("queue %s: %w", forgetTask, err)}
		}
	}
	return r.Result(out)
}

func (c *Controller) forgetTask(ctx context.Context, r *jobs.Run) error {
	var args forgetArgs
	if err := r.Args(&args); err != nil {
		return err
	}
	p, err := c.cfg.Store.View().VPoolByID(args.Pool)
	if err != nil {
		return err
	}
	out := rekeyed{VPool: p.Name, Pool: p.ID}
	if out.Dropped, out.Waiting, err = c.forget(ctx, p, uuid.Nil, ""); err != nil {
		return err
	}
	for _, n := range out.Waiting {
		r.Log("node %s has not changed its keys yet", n)
	}
	return r.Result(out)
}

// forget drops the former key encryption keys of a vPool if nothing is wrapped by them any more; else it names the nodes that may have
// something. Node done is known to have changed to the key called kek.
func (c *Controller) forget(ctx context.Context, p state.VPool, done uuid.UUID, kek string) (dropped bool, waiting []string, err error) {
	v := c.cfg.Store.View()
	keks, rev, err := c.keks(v, p.ID)
	if err != nil {
		return false, nil, err
	}
	defer clear(keks)
	if len(keks) == KEKBytes {
		return false, nil, nil
	}
	now := kekName(keks[:KEKBytes])
	ok := map[uuid.UUID]bool{done: kek == now}
	var began state.Time // the rotation
	v.Tasks(func(t *state.Task) bool {
		var args RekeyArgs
		var out rekeyed
		if t.Type != RekeyTask || t.State != state.TaskSucceeded || json.Unmarshal(t.Args, &args) != nil || json.Unmarshal(t.Result, &out) != nil ||
			out.Pool != p.ID || out.KEK != now {
			return true
		}
		ok[args.Node] = true
		if began == 0 || t.Created < began {
			began = t.Created
		}
		return true
	})
	for _, n := range keyNodes(v, p) {
		if !ok[n.ID] && (began == 0 || n.Joined <= began) {
			waiting = append(waiting, n.Name)
		}
	}
	if len(waiting) > 0 {
		return false, waiting, nil
	}
	switch err := c.setKEKs(ctx, p.ID, keks[:KEKBytes], rev); {
	case errors.Is(err, state.ErrConflict): // another task forgot them, or a rotation has begun: look again
		return false, nil, &jobs.Retry{Err: fmt.Errorf("forget the former keys: %w", err), After: time.Second}
	case err != nil:
		return false, nil, fmt.Errorf("forget the former keys: %w", err)
	}
	c.cfg.Log.Info("the former key encryption keys of a vpool are forgotten", "vpool", p.Name)
	return true, nil, nil
}
