// Package vpool is the controller of vPools: the plain Go API that the HTTP API, the CLI and event consumers call.
//
//	c := vpool.New(vpool.Config{Raft: node, Store: node.State(), Engine: engine, Log: log})
//	c.Start(ctx)                                        // gives every vPool's backend to the engine, once, at start
//	c.Create(ctx, vpool.Spec{Name, Backend: "local:///srv/fast", Clients}) (VPool, error)
//	c.List(ctx) []VPool · c.Get(ctx, name) (VPool, error) · c.SetClients(ctx, name, rev, cidrs) · c.Delete(ctx, name)
//
// A create probes the backend, commits, then gives the backend to the engine; a crash between the two is made good by
// Start. A delete is refused while the vPool holds a name; it commits first and takes the backend from the engine after.
// The backend's directory is left where it is.
package vpool

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"path"
	"strings"
	"time"

	"github.com/google/uuid"

	"varve/control/state"
)

// Proposer commits a command and returns what it did. raft.Node is one.
type Proposer interface {
	Apply(ctx context.Context, cmd state.Command) (state.Result, error)
}

// Engine is what the controller needs of the volume driver. All methods may be called again with the same arguments.
type Engine interface {
	// ProbeBackend makes sure that a vPool's objects can be kept there, making the directory if it is missing, and says
	// what it found ("create-only": "refuses an existing name").
	ProbeBackend(ctx context.Context, b state.Backend) (findings map[string]string, err error)
	// AddPool gives a vPool's backend to the driver.
	AddPool(ctx context.Context, p state.VPool) error
	// RemovePool takes it away; no volume of it is open any more.
	RemovePool(ctx context.Context, id uuid.UUID) error
	// Space tells how much the backend holds and can hold. ok is false while that is unknown.
	Space(id uuid.UUID) (s Space, ok bool)
}

// Space of a backend, in bytes. Stored is what this vPool's objects take.
type Space struct{ Total, Free, Stored int64 }

// Config wires a controller.
type Config struct {
	Raft   Proposer
	Store  *state.Store
	Engine Engine
	Log    *slog.Logger
}

// Controller of vPools.
type Controller struct{ cfg Config }

// New wires a controller and starts nothing.
func New(cfg Config) *Controller {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Controller{cfg: cfg}
}

// VPool is one with what the engine knows of it.
type VPool struct {
	state.VPool
	Disks, Files int
	Deleting     int // volumes whose deletion is not finished
	Space        Space
	SpaceKnown   bool
	Findings     map[string]string // of the probe, from Create alone
}

// Start gives the backends of all vPools to the engine.
func (c *Controller) Start(ctx context.Context) error {
	var errs []error
	for _, p := range c.cfg.Store.View().VPools() {
		if err := c.cfg.Engine.AddPool(ctx, p); err != nil {
			errs = append(errs, fmt.Errorf("open vpool %s: %w", p.Name, err))
		}
	}
	return errors.Join(errs...)
}

// Spec of a vPool to make. Clients nil stands for state.DefaultClients; empty for nobody.
type Spec struct {
	Name    string
	Backend string // "local:///directory"
	Clients []string
}

// ParseBackend reads "local:///directory".
func ParseBackend(s string) (state.Backend, error) {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != state.BackendLocal || u.Host != "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil ||
		!path.IsAbs(u.Path) {
		return state.Backend{}, &state.Error{Err: state.ErrInvalid, Object: "backend " + clip(s), Detail: "not a backend",
			Remedy: "use local:///absolute/directory"}
	}
	return state.Backend{Kind: state.BackendLocal, Dir: path.Clean(u.Path)}, nil
}

func clip(s string) string {
	if len(s) > 80 {
		s = s[:80] + "…"
	}
	return fmt.Sprintf("%q", s)
}

// Create makes a vPool.
func (c *Controller) Create(ctx context.Context, s Spec) (VPool, error) {
	b, err := ParseBackend(s.Backend)
	if err != nil {
		return VPool{}, err
	}
	if _, err := c.cfg.Store.View().VPool(s.Name); err == nil {
		return VPool{}, &state.Error{Err: state.ErrExist, Object: "vpool " + s.Name}
	}
	if s.Clients == nil {
		s.Clients = state.DefaultClients()
	}
	key := make([]byte, len(state.Secret{}))
	rand.Read(key)
	cmd := &state.CreateVPool{ID: uuid.New(), Name: s.Name, Backend: b, Key: key, Clients: s.Clients, Mode: 0o755}
	// Encoding checks the command before the probe touches the backend.
	if _, err := state.Encode(cmd, cmd.ID, 0); err != nil {
		return VPool{}, err
	}
	findings, err := c.cfg.Engine.ProbeBackend(ctx, b)
	if err != nil {
		return VPool{}, &state.Error{Err: state.ErrInvalid, Object: "vpool " + s.Name,
			Detail: "its backend does not work: " + err.Error(),
			Remedy: "make " + b.Dir + " a directory that this process may write to, on a local file system"}
	}
	if _, err := c.cfg.Raft.Apply(ctx, cmd); err != nil {
		return VPool{}, err
	}
	c.cfg.Log.Info("vpool created", "vpool", s.Name, "backend", s.Backend)
	p, err := c.Get(ctx, s.Name)
	if err != nil {
		return VPool{}, err
	}
	p.Findings = findings
	if err := c.cfg.Engine.AddPool(ctx, p.VPool); err != nil {
		return p, fmt.Errorf("open vpool %s, which is created: %w", s.Name, err)
	}
	return p, nil
}

// List returns all vPools, by name.
func (c *Controller) List(context.Context) []VPool {
	v := c.cfg.Store.View()
	pools := v.VPools()
	out := make([]VPool, 0, len(pools))
	for _, p := range pools {
		out = append(out, c.with(v, p))
	}
	return out
}

// Get returns one vPool.
func (c *Controller) Get(_ context.Context, name string) (VPool, error) {
	v := c.cfg.Store.View()
	p, err := v.VPool(name)
	if err != nil {
		return VPool{}, err
	}
	return c.with(v, p), nil
}

func (c *Controller) with(v *state.View, p state.VPool) VPool {
	out := VPool{VPool: p, Deleting: v.DoomedOf(p.FSID)}
	out.Disks, out.Files = v.CountVolumes(p.FSID)
	out.Space, out.SpaceKnown = c.cfg.Engine.Space(p.ID)
	return out
}

// SetClients changes who may mount over NFS. rev 0 overwrites whatever is there.
func (c *Controller) SetClients(ctx context.Context, name string, rev uint64, clients []string) (VPool, error) {
	p, err := c.cfg.Store.View().VPool(name)
	if err != nil {
		return VPool{}, err
	}
	if _, err := c.cfg.Raft.Apply(ctx, &state.UpdateVPool{ID: p.ID, Rev: rev, Clients: clients}); err != nil {
		return VPool{}, err
	}
	c.cfg.Log.Info("vpool clients changed", "vpool", name, "clients", strings.Join(clients, ","))
	return c.Get(ctx, name)
}

const (
	drainPoll = 100 * time.Millisecond
	drainMax  = 30 * time.Second
)

// Delete takes an empty vPool away. Where only volumes deleted a moment ago stand in the way it waits for them a while.
func (c *Controller) Delete(ctx context.Context, name string) error {
	p, err := c.cfg.Store.View().VPool(name)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, drainMax)
	defer cancel()
	if err := c.drained(ctx, p); err != nil {
		return err
	}
	if _, err := c.cfg.Raft.Apply(ctx, &state.DeleteVPool{ID: p.ID}); err != nil {
		return err
	}
	c.cfg.Log.Info("vpool deleted", "vpool", name)
	if err := c.cfg.Engine.RemovePool(ctx, p.ID); err != nil {
		return fmt.Errorf("close vpool %s, which is deleted: %w", name, err)
	}
	return nil
}

// drained waits until no deleted volume is left on the vPool's backend; the command refuses if there still is one.
func (c *Controller) drained(ctx context.Context, p state.VPool) error {
	tick := time.NewTicker(drainPoll)
	defer tick.Stop()
	for p.Inodes == 1 && c.cfg.Store.View().DoomedOf(p.FSID) > 0 {
		select {
		case <-tick.C:
		case <-ctx.Done():
			if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return ctx.Err()
			}
			return &state.Error{Err: state.ErrConflict, Object: "vpool " + p.Name,
				Detail: "deleted volumes are still being removed from its backend", Remedy: "try again in a moment"}
		}
	}
	return nil
}
