// Package vpool is the controller of vPools: the plain Go API that the HTTP API, the CLI and event consumers call.
//
//	c := vpool.New(vpool.Config{Raft: node, Store: node.State(), Engine: engine, Log: log})
//	c.Start(ctx)                                        // gives every vPool's backend to the engine, once, at start
//	c.Create(ctx, vpool.Spec{Name, Backend: "local:///srv/fast" or "s3://…", Clients, Keys}) (VPool, error)
//	c.SetKeys(ctx, name, Keys) · KeysOf(vault, pool)    // credentials of a bucket, sealed in state, changed without a restart
//	c.List(ctx) []VPool · c.Get(ctx, name) (VPool, error) · c.SetClients(ctx, name, rev, cidrs) · c.Delete(ctx, name)
//
// A create probes the backend, commits, then gives the backend to the engine; a crash between the two is made good by
// Start. A delete is refused while the vPool holds a name; it commits first and takes the backend from the engine after.
// The backend's directory is left where it is.
package vpool

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
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
	// what it found.
	ProbeBackend(ctx context.Context, b state.Backend, k Keys) (Probe, error)
	// TryKeys makes sure that credentials open the vPool's bucket, as far as that can be told now.
	TryKeys(ctx context.Context, p state.VPool, k Keys) error
	// KeysChanged has the vPool's backend go on with the credentials that KeysOf gives now.
	KeysChanged(ctx context.Context, pool uuid.UUID) error
	// Rekey has all keys of this node's vDisks of an encrypted vPool wrapped by the key that KEKOf gives first now, and gives each vDisk
	// a new key for what is written from then on. progress is told vDisks.
	Rekey(ctx context.Context, pool uuid.UUID, progress func(done, total int64)) error
	// AddPool gives a vPool's backend to the driver.
	AddPool(ctx context.Context, p state.VPool) error
	// RemovePool takes it away; no volume of it is open any more.
	RemovePool(ctx context.Context, id uuid.UUID) error
	// Space tells how much the backend holds and can hold. ok is false while that is unknown.
	Space(id uuid.UUID) (s Space, ok bool)
}

// Keys are the credentials of a bucket. They have no printed form.
type Keys struct {
	Access string `json:"access_key"`
	Secret string `json:"secret_key"`
}

// String keeps the keys out of logs and messages.
func (Keys) String() string { return "[keys]" }

// GoString keeps the keys out of %#v.
func (Keys) GoString() string { return "[keys]" }

// LogValue keeps the keys out of slog.
func (Keys) LogValue() slog.Value { return slog.StringValue("[keys]") }

const keyBytesMax = 1024

func (k Keys) check(object string) error {
	if k.Access == "" || k.Secret == "" {
		return &state.Error{Err: state.ErrInvalid, Object: object, Detail: "no credentials for its bucket",
			Remedy: "set VARVE_S3_ACCESS_KEY and VARVE_S3_SECRET_KEY, or give --credentials-file"}
	}
	if len(k.Access) > keyBytesMax || len(k.Secret) > keyBytesMax {
		return &state.Error{Err: state.ErrInvalid, Object: object, Detail: fmt.Sprintf("credentials of more than %d bytes", keyBytesMax)}
	}
	return nil
}

// Vault keeps secrets sealed; secrets.Store is one.
type Vault interface {
	Seal(name string, plain []byte) *state.SetSecret
	Set(ctx context.Context, name string, plain []byte) error
	Get(name string) ([]byte, error)
}

// KeysOf opens the credentials of a vPool's bucket.
func KeysOf(v Vault, pool uuid.UUID) (Keys, error) {
	plain, err := v.Get(state.S3KeysOf(pool))
	if err != nil {
		return Keys{}, err
	}
	defer clear(plain)
	var k Keys
	if json.Unmarshal(plain, &k) != nil { // its error may quote what it read
		return Keys{}, fmt.Errorf("credentials of vPool %s are not readable", pool)
	}
	return k, nil
}

// KEKBytes is the size of a vPool's key encryption key.
const KEKBytes = 32

// keksMax bounds how many key encryption keys of a vPool are kept: the one in force and former ones.
const keksMax = 8

// KEKOf opens the key encryption keys of an encrypted vPool: one after the other, the one in force first; the former ones stay until
// nothing is wrapped by them any more. The caller clears it.
func KEKOf(v Vault, pool uuid.UUID) ([]byte, error) {
	if v == nil {
		return nil, fmt.Errorf("key of vPool %s: this process keeps no secrets", pool)
	}
	k, err := v.Get(state.KEKOf(pool))
	if err == nil && (len(k) == 0 || len(k)%KEKBytes != 0) {
		clear(k)
		return nil, fmt.Errorf("key of vPool %s is not readable", pool)
	}
	return k, err
}

// NotSafe is the finding of a vPool whose operator has accepted a store that lacks something.
const NotSafe = "not safe"

// Probe is what the probe of a backend found. Unsafe names what it lacks that a vPool should have.
type Probe struct {
	Findings []state.Finding
	Unsafe   []string
}

// Space of a backend, in bytes. Total 0: without a known limit. Stored is what this vPool's objects take, as the last scrub has counted; before
// the first one, what is used of its volumes. AsOf is when this was said, where who knows does not answer now; else zero.
type Space struct {
	Total, Free, Stored int64
	AsOf                time.Time
}

// Config wires a controller.
type Config struct {
	Raft   Proposer
	Store  *state.Store
	Engine Engine
	Vault  Vault     // nil: no buckets
	Node   uuid.UUID // this one, whose disk a local backend is on
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
	Backend string // ParseBackend reads it
	Clients []string
	// Compression of what is stored: "none", "s2" or "zstd"; "" for none on a directory and s2 in a bucket.
	Compression string
	Encrypt     bool // vDisks get keys of their own

	// For a bucket:
	Keys        Keys
	CA          string // PEM of the only authorities to trust; "" for those of the system
	AllowUnsafe bool   // take a store that lacks what a vPool should have
}

// Create makes a vPool.
func (c *Controller) Create(ctx context.Context, s Spec) (VPool, error) {
	b, err := ParseBackend(s.Backend)
	if err != nil {
		return VPool{}, err
	}
	if b.Kind == state.BackendLocal {
		b.Node = c.cfg.Node
	}
	b.CA, b.Unsafe = s.CA, s.AllowUnsafe && b.Kind == state.BackendS3
	if _, err := c.cfg.Store.View().VPool(s.Name); err == nil {
		return VPool{}, &state.Error{Err: state.ErrExist, Object: "vpool " + s.Name}
	}
	if s.Clients == nil {
		s.Clients = state.DefaultClients()
	}
	key := make([]byte, len(state.Secret{}))
	rand.Read(key)
	cmd := &state.CreateVPool{ID: uuid.New(), Name: s.Name, Backend: b, Key: key, Clients: s.Clients, Mode: 0o755}
	if b.Kind == state.BackendS3 {
		if cmd.Keys, err = c.seal(cmd.ID, s.Name, s.Keys); err != nil {
			return VPool{}, err
		}
	}
	if cmd.Compression = s.Compression; cmd.Compression == "" && b.Kind == state.BackendS3 {
		cmd.Compression = "s2"
	}
	if s.Encrypt {
		if c.cfg.Vault == nil {
			return VPool{}, &state.Error{Err: state.ErrInvalid, Object: "vpool " + s.Name, Detail: "this appliance keeps no secrets, so it can't encrypt"}
		}
		kek := make([]byte, KEKBytes)
		rand.Read(kek)
		cmd.KEK = c.cfg.Vault.Seal(state.KEKOf(cmd.ID), kek)
		clear(kek)
	}
	// Encoding checks the command before the probe touches the backend.
	if _, err := state.Encode(cmd, cmd.ID, 0); err != nil {
		return VPool{}, err
	}
	for _, p := range c.cfg.Store.View().VPools() {
		if p.Backend.Overlaps(b) {
			return VPool{}, &state.Error{Err: state.ErrConflict, Object: "vpool " + s.Name, Detail: "its backend overlaps that of another vpool",
				By: []string{p.Name}, Remedy: "give every vpool a directory or prefix of its own"}
		}
	}
	probe, err := c.cfg.Engine.ProbeBackend(ctx, b, s.Keys)
	if err != nil {
		return VPool{}, unusable(s.Name, b, err)
	}
	if len(probe.Unsafe) > 0 && !b.Unsafe {
		return VPool{}, tooWeak(s.Name, probe)
	}
	cmd.Findings = clipFindings(probe.Findings)
	if len(probe.Unsafe) > 0 {
		cmd.Findings = append(cmd.Findings, state.Finding{Check: NotSafe, Found: strings.Join(probe.Unsafe, ", ") + ": accepted when the vPool was made"})
	}
	if _, err := c.cfg.Raft.Apply(ctx, cmd); err != nil {
		return VPool{}, err
	}
	c.cfg.Log.Info("vpool created", "vpool", s.Name, "backend", URL(b))
	p, err := c.Get(ctx, s.Name)
	if err != nil {
		return VPool{}, err
	}
	if err := c.cfg.Engine.AddPool(ctx, p.VPool); err != nil {
		return p, fmt.Errorf("open vpool %s, which is created: %w", s.Name, err)
	}
	return p, nil
}

// seal makes the command that keeps a bucket's credentials.
func (c *Controller) seal(pool uuid.UUID, name string, k Keys) (*state.SetSecret, error) {
	if err := k.check("vpool " + name); err != nil {
		return nil, err
	}
	if c.cfg.Vault == nil {
		return nil, &state.Error{Err: state.ErrInvalid, Object: "vpool " + name, Detail: "this appliance keeps no secrets, so it can use no bucket"}
	}
	plain, err := json.Marshal(k)
	if err != nil {
		return nil, err
	}
	defer clear(plain)
	return c.cfg.Vault.Seal(state.S3KeysOf(pool), plain), nil
}

// unusable says why a backend cannot be used, with what the engine knows to do about it.
func unusable(name string, b state.Backend, err error) error {
	e := &state.Error{Err: state.ErrInvalid, Object: "vpool " + name, Field: "backend", Detail: "its backend does not work: " + err.Error()}
	if r, ok := errors.AsType[interface {
		error
		Remedy() string
	}](err); ok {
		e.Remedy = r.Remedy()
		e.Detail = strings.TrimSuffix(e.Detail, "; "+e.Remedy)
	}
	if e.Remedy == "" && b.Kind == state.BackendLocal {
		e.Remedy = "make " + b.Dir + " a directory that this process may write to, on a local file system"
	}
	return e
}

func tooWeak(name string, p Probe) error {
	var text []string
	for _, f := range p.Findings {
		if slices.Contains(p.Unsafe, f.Check) {
			text = append(text, f.Check+": "+f.Found)
		}
	}
	return &state.Error{Err: state.ErrInvalid, Object: "vpool " + name, Field: "backend", Detail: "its backend is not safe: " + strings.Join(text, "; "),
		Remedy: "use a store that honours If-None-Match, or accept the risk with --allow-unsafe-backend"}
}

// clipFindings keeps findings within what state takes.
func clipFindings(all []state.Finding) []state.Finding {
	out := slices.Clone(all)
	for i := range out {
		out[i].Found = strings.ToValidUTF8(out[i].Found, "?")
		if over := len(out[i].Check) + len(out[i].Found) - state.FindingBytesMax; over > 0 {
			out[i].Found = strings.ToValidUTF8(out[i].Found[:len(out[i].Found)-over], "")
		}
	}
	return out[:min(len(out), state.FindingsMax)]
}

// SetKeys changes the credentials of a vPool's bucket, from the next request on. They are tried first, unless force is set.
func (c *Controller) SetKeys(ctx context.Context, name string, k Keys, force bool) error {
	p, err := c.cfg.Store.View().VPool(name)
	if err != nil {
		return err
	}
	if p.Backend.Kind != state.BackendS3 {
		return &state.Error{Err: state.ErrInvalid, Object: "vpool " + name, Detail: "its backend is no bucket and has no credentials"}
	}
	cmd, err := c.seal(p.ID, name, k)
	if err != nil {
		return err
	}
	if !force {
		if err := c.cfg.Engine.TryKeys(ctx, p, k); err != nil {
			e := unusable(name, p.Backend, err).(*state.Error)
			e.Detail = strings.Replace(e.Detail, "its backend does not work", "these credentials do not work", 1)
			e.Remedy = "nothing is changed. " + e.Remedy + "; --force keeps them all the same"
			return e
		}
	}
	if _, err := c.cfg.Raft.Apply(ctx, cmd); err != nil {
		return err
	}
	c.cfg.Log.Info("credentials of a vpool changed", "vpool", name)
	if err := c.cfg.Engine.KeysChanged(ctx, p.ID); err != nil {
		return fmt.Errorf("use the new credentials of vpool %s, which are kept: %w", name, err)
	}
	return nil
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
