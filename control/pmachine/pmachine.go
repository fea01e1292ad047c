// Package pmachine is the controller of pMachines: the hypervisors that run the VMs whose disks lie on vPools.
//
//	c := pmachine.New(pmachine.Config{Raft, Store, Vault, Dial, …})
//	c.Run(ctx)                                     // while this node leads: asks every pMachine, about once a minute
//	c.Create(ctx, spec) · c.Change · c.Delete · c.Get · c.List · c.Ask(ctx, name)
//	c.Mount(ctx, name, MountSpec) · c.Unmount(ctx, name, vpool)
//	c.Power(ctx, vmachine)                         // what a VM does now
//
// Credentials are sealed (package secrets) and go out with nothing but a connection to the address that they were given for:
// a change of the address or of who is trusted there needs them anew. A pMachine that cannot be asked keeps what it told last,
// with the reason and since when.
//
// # One round
//
//	Dial, Inventory                                          an answer, or the reason: ReportPMachine
//	mounts    those whose server is one of our addresses, or that a mount by us made, and whose export is a vPool
//	machines  described by a file on a vPool (same place, or same UUID)     -> its power and host: SetVMachinePower
//	          with disks on vPools                                          -> SetVMachine without a file
//	          neither                                                       -> not ours
//	VMs that it knew and knows no more                                      -> SetVMachinePower with none
package pmachine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"varve/control/hypervisor"
	"varve/control/state"
	"varve/control/vmachine/vmconfig"
)

// Proposer commits a command and returns what it did. raft.Node is one.
type Proposer interface {
	Apply(ctx context.Context, cmd state.Command) (state.Result, error)
}

// Vault keeps secrets sealed; secrets.Store is one.
type Vault interface {
	Seal(name string, plain []byte) *state.SetSecret
	Get(name string) ([]byte, error)
}

// Machines finds the vDisks that a hypervisor's VM has; vmachine.Controller does.
type Machines interface {
	KnownDisks(ctx context.Context, format string, disks []vmconfig.Disk) (found []state.VMachineDisk, layered bool)
}

// Config wires a controller.
type Config struct {
	Raft     Proposer
	Store    *state.Store
	Vault    Vault
	Machines Machines
	// Dial is hypervisor.Dial unless a test has another.
	Dial func(ctx context.Context, e hypervisor.Endpoint) (hypervisor.Hypervisor, error)
	// Address is that of this node as hypervisors reach it, for mounts.
	Address func() string
	Log     *slog.Logger
	// Every is how often Run asks; 0 is a minute.
	Every time.Duration
}

const (
	everyDefault = time.Minute
	askMax       = 45 * time.Second
	powerMax     = 10 * time.Second
	mountMax     = 50 * time.Second
	atOnce       = 4
)

// Controller of pMachines.
type Controller struct {
	cfg Config
	// asking has a lock for each pMachine, so that two rounds do not mix.
	mu     sync.Mutex
	asking map[uuid.UUID]*sync.Mutex
}

// New wires a controller and starts nothing.
func New(cfg Config) *Controller {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Dial == nil {
		cfg.Dial = hypervisor.Dial
	}
	if cfg.Address == nil {
		cfg.Address = func() string { return "" }
	}
	if cfg.Every == 0 {
		cfg.Every = everyDefault
	}
	return &Controller{cfg: cfg, asking: make(map[uuid.UUID]*sync.Mutex)}
}

// Spec is what an operator says of a pMachine.
type Spec struct {
	Name string
	state.PMachineSpec
	Credentials hypervisor.Credentials
}

func (s Spec) endpoint() hypervisor.Endpoint {
	return hypervisor.Endpoint{Kind: s.Kind, Address: s.Address, User: s.User, Thumbprint: s.Thumbprint, CA: s.CA, Credentials: s.Credentials}
}

// refusal gives errors of a hypervisor the words of control.
func refusal(name string, err error) error {
	object := "pmachine " + name
	if e, ok := errors.AsType[*hypervisor.CertificateError](err); ok {
		remedy := "make sure that it is the right one, then repeat with that thumbprint, or give the certificate of its authority"
		return &state.Error{Err: state.ErrConflict, Object: object, Detail: e.Error(), Remedy: remedy, By: []string{e.Thumbprint}}
	}
	if errors.Is(err, hypervisor.ErrAddress) {
		return &state.Error{Err: state.ErrInvalid, Object: object, Field: "address", Detail: err.Error()}
	}
	return &state.Error{Err: state.ErrConflict, Object: object, Detail: text(err), Remedy: "check its address, the account, and that nothing filters the way there"}
}

// text is an error as it may be kept and shown.
func text(err error) string {
	s := strings.ToValidUTF8(strings.Join(strings.Fields(err.Error()), " "), "?")
	if len(s) > 400 {
		s = strings.ToValidUTF8(s[:400], "") + "…"
	}
	return s
}

// Create adds a pMachine that can be asked.
func (c *Controller) Create(ctx context.Context, s Spec) (state.PMachine, error) {
	if _, err := c.cfg.Store.View().PMachineByName(s.Name); err == nil {
		return state.PMachine{}, &state.Error{Err: state.ErrExist, Object: "pmachine " + s.Name}
	}
	return c.set(ctx, uuid.New(), 0, s, true)
}

// Check refuses a pMachine that cannot be one, without asking it.
func (c *Controller) Check(s Spec) error {
	if err := hypervisor.Check(s.endpoint()); err != nil {
		return refusal(s.Name, err)
	}
	return nil
}

// set asks a hypervisor as the spec says, and records the spec and what it told.
func (c *Controller) set(ctx context.Context, id uuid.UUID, rev uint64, s Spec, create bool) (state.PMachine, error) {
	if err := c.Check(s); err != nil {
		return state.PMachine{}, err
	}
	ask, cancel := context.WithTimeout(ctx, askMax)
	defer cancel()
	inv, err := c.inventory(ask, s.endpoint())
	if err != nil {
		return state.PMachine{}, refusal(s.Name, err)
	}
	plain, err := json.Marshal(s.Credentials)
	if err != nil {
		return state.PMachine{}, fmt.Errorf("credentials of pmachine %s: %w", s.Name, err)
	}
	_, err = c.cfg.Raft.Apply(ctx, &state.SetPMachine{ID: id, Rev: rev, Create: create, Name: s.Name, Spec: s.PMachineSpec,
		Secret: c.cfg.Vault.Seal(state.PMachineSecret(id), plain)})
	if err != nil {
		return state.PMachine{}, err
	}
	c.cfg.Log.Info("pmachine set", "pmachine", s.Name, "kind", s.Kind, "hosts", len(inv.Hosts))
	if err := c.record(ctx, id, inv); err != nil {
		return state.PMachine{}, err
	}
	return c.cfg.Store.View().PMachine(id)
}

// Change is what is to be another of a pMachine; nil stays.
type Change struct {
	Address                                          string
	User, Password, Thumbprint, CA, Certificate, Key *string
	Insecure                                         bool
}

// Change changes how a pMachine is reached. Other addresses and other trust need the password anew.
func (c *Controller) Change(ctx context.Context, name string, rev uint64, in Change) (state.PMachine, error) {
	p, err := c.cfg.Store.View().PMachineByName(name)
	if err != nil {
		return p, err
	}
	s := Spec{Name: p.Name, PMachineSpec: p.PMachineSpec}
	if s.Credentials, err = c.credentials(p); err != nil {
		return p, err
	}
	moved := in.Address != "" && in.Address != s.Address || in.Thumbprint != nil && *in.Thumbprint != s.Thumbprint || in.CA != nil && *in.CA != s.CA
	if moved && in.Password == nil && in.Key == nil && (s.Credentials.Password != "" || s.Credentials.Key != "") {
		return p, &state.Error{Err: state.ErrInvalid, Object: "pmachine " + p.Name, Detail: "its credentials are for the address and certificate that it has",
			Remedy: "give the password, or certificate and key, together with them"}
	}
	if in.Address != "" {
		s.Address = in.Address
	}
	for _, f := range []struct{ to, from *string }{{&s.User, in.User}, {&s.Thumbprint, in.Thumbprint}, {&s.CA, in.CA}, {&s.Credentials.Password, in.Password},
		{&s.Credentials.Certificate, in.Certificate}, {&s.Credentials.Key, in.Key}} {
		if f.from != nil {
			*f.to = *f.from
		}
	}
	s.Credentials.Insecure = s.Credentials.Insecure || in.Insecure
	return c.set(ctx, p.ID, rev, s, false)
}

// Delete forgets a pMachine; nothing on it changes.
func (c *Controller) Delete(ctx context.Context, name string, rev uint64) error {
	p, err := c.cfg.Store.View().PMachineByName(name)
	if err != nil {
		return err
	}
	if _, err := c.cfg.Raft.Apply(ctx, &state.DeletePMachine{ID: p.ID, Rev: rev}); err != nil {
		return err
	}
	c.cfg.Log.Info("pmachine forgotten", "pmachine", p.Name)
	return nil
}

func (c *Controller) credentials(p state.PMachine) (hypervisor.Credentials, error) {
	var k hypervisor.Credentials
	plain, err := c.cfg.Vault.Get(state.PMachineSecret(p.ID))
	if err != nil {
		return k, fmt.Errorf("credentials of pmachine %s: %w", p.Name, err)
	}
	if json.Unmarshal(plain, &k) != nil { // its text might have parts of them
		return k, fmt.Errorf("credentials of pmachine %s are not readable", p.Name)
	}
	return k, nil
}

// dial begins a session with a pMachine.
func (c *Controller) dial(ctx context.Context, p state.PMachine) (hypervisor.Hypervisor, error) {
	k, err := c.credentials(p)
	if err != nil {
		return nil, err
	}
	return c.cfg.Dial(ctx, Spec{Name: p.Name, PMachineSpec: p.PMachineSpec, Credentials: k}.endpoint())
}

func (c *Controller) inventory(ctx context.Context, e hypervisor.Endpoint) (hypervisor.Inventory, error) {
	h, err := c.cfg.Dial(ctx, e)
	if err != nil {
		return hypervisor.Inventory{}, err
	}
	defer h.Close()
	return h.Inventory(ctx)
}

// Run asks every pMachine again and again until ctx ends.
func (c *Controller) Run(ctx context.Context) error {
	t := time.NewTicker(c.cfg.Every)
	defer t.Stop()
	for {
		free := make(chan struct{}, atOnce)
		var all sync.WaitGroup
		for _, p := range c.cfg.Store.View().PMachines() {
			select {
			case free <- struct{}{}:
			case <-ctx.Done():
			}
			if ctx.Err() != nil {
				break
			}
			all.Go(func() {
				defer func() { <-free }()
				if _, err := c.ask(ctx, p.ID); err != nil && ctx.Err() == nil && !errors.Is(err, state.ErrNotFound) {
					c.cfg.Log.Warn("pmachine cannot be asked", "pmachine", p.Name, "err", text(err))
				}
			})
		}
		all.Wait()
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

// Ask asks a pMachine now.
func (c *Controller) Ask(ctx context.Context, name string) (state.PMachine, error) {
	p, err := c.cfg.Store.View().PMachineByName(name)
	if err != nil {
		return p, err
	}
	return c.ask(ctx, p.ID)
}

func (c *Controller) lock(id uuid.UUID) *sync.Mutex {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.asking[id] == nil {
		c.asking[id] = &sync.Mutex{}
	}
	return c.asking[id]
}

func (c *Controller) ask(ctx context.Context, id uuid.UUID) (state.PMachine, error) {
	one := c.lock(id)
	one.Lock()
	defer one.Unlock()
	p, err := c.cfg.Store.View().PMachine(id)
	if err != nil {
		return p, err
	}
	k, err := c.credentials(p)
	if err != nil {
		return p, err
	}
	bound, cancel := context.WithTimeout(ctx, askMax)
	defer cancel()
	inv, err := c.inventory(bound, Spec{Name: p.Name, PMachineSpec: p.PMachineSpec, Credentials: k}.endpoint())
	if err != nil {
		if ctx.Err() != nil {
			return p, ctx.Err()
		}
		if now, gone := c.cfg.Store.View().PMachine(id); gone != nil || now.Modified != p.Modified {
			return p, refusal(p.Name, err) // it was changed meanwhile: this is about what it was
		}
		_, saved := c.cfg.Raft.Apply(ctx, &state.ReportPMachine{ID: id, Error: text(err)})
		return p, errors.Join(refusal(p.Name, err), saved)
	}
	if err := c.record(ctx, id, inv); err != nil {
		return p, err
	}
	return c.cfg.Store.View().PMachine(id)
}

// record commits what a hypervisor told.
func (c *Controller) record(ctx context.Context, id uuid.UUID, inv hypervisor.Inventory) error {
	report := &state.ReportPMachine{ID: id, Version: inv.Version}
	for _, h := range inv.Hosts {
		report.Hosts = append(report.Hosts, state.PMachineHost{Name: h.Name, Ref: h.Ref, Address: h.Address, State: h.State, Version: h.Version})
	}
	v := c.cfg.Store.View()
	ours := c.addresses(v)
	for _, m := range inv.Mounts {
		pool, err := v.VPool(strings.Trim(m.Export, "/"))
		if err != nil || !ours[m.Server] {
			continue
		}
		report.Mounts = append(report.Mounts, state.PMachineMount{Host: m.Host, Pool: pool.ID, Name: m.Name, Server: m.Server, Export: m.Export, Path: m.Path,
			Usable: m.Usable, ReadOnly: m.ReadOnly})
	}
	if _, err := c.cfg.Raft.Apply(ctx, report); err != nil {
		return err
	}
	return c.machines(ctx, id, inv)
}

// addresses are those by which hypervisors may know this cluster: its nodes', and the servers of mounts that are known.
func (c *Controller) addresses(v *state.View) map[string]bool {
	out := make(map[string]bool)
	for _, n := range v.Nodes() {
		if host, _, err := net.SplitHostPort(n.NFS); err == nil {
			out[host] = true
		}
		out[n.Name] = true
	}
	for _, p := range v.PMachines() {
		for _, m := range p.Mounts {
			out[m.Server] = true
		}
	}
	if a := c.cfg.Address(); a != "" {
		out[a] = true
	}
	delete(out, "")
	return out
}

// machines matches a hypervisor's VMs with ours.
func (c *Controller) machines(ctx context.Context, id uuid.UUID, inv hypervisor.Inventory) error {
	v := c.cfg.Store.View()
	p, err := v.PMachine(id)
	if err != nil {
		return err
	}
	stores := make(map[string]string) // datastore -> vPool
	for _, m := range p.Mounts {
		if pool, err := v.VPoolByID(m.Pool); err == nil {
			stores[m.Name] = pool.Name
		}
	}
	seen := make(map[uuid.UUID]bool)
	var errs []error
	apply := func(cmd state.Command) (state.Result, error) {
		res, err := c.cfg.Raft.Apply(ctx, cmd)
		if err != nil && !errors.Is(err, state.ErrNotFound) {
			errs = append(errs, err)
		}
		return res, err
	}
	known := v.VMachines()
	for _, m := range inv.Machines {
		if len(errs) > 0 || ctx.Err() != nil {
			break
		}
		have, ok := described(v, known, stores, p.Kind, m)
		if !ok {
			spec, mine := c.spec(ctx, m)
			if !mine {
				continue
			}
			old := slices.IndexFunc(known, func(k state.VMachine) bool {
				return k.Ino == 0 && k.PMachine == id && strings.EqualFold(k.UUID, spec.UUID)
			})
			if old >= 0 {
				have = known[old]
			}
			if old < 0 || !same(have.VMachineSpec, spec) {
				res, err := apply(&state.SetVMachine{ID: uuid.New(), PMachine: id, Spec: spec})
				if err != nil {
					continue
				}
				have.ID = res.Object
			}
		}
		seen[have.ID] = true
		if have.PMachine != id || have.Power != m.Power || have.Host != m.Host {
			_, _ = apply(&state.SetVMachinePower{ID: have.ID, From: id, PMachine: id, Host: m.Host, Power: m.Power})
		}
	}
	for _, k := range known {
		if k.PMachine == id && !seen[k.ID] && len(errs) == 0 && ctx.Err() == nil {
			_, _ = apply(&state.SetVMachinePower{ID: k.ID, From: id})
		}
	}
	return errors.Join(errs...)
}

// described finds the VM that a file on a vPool describes: the file that the hypervisor names, or, where it names none on a
// vPool, one with the same UUID.
func described(v *state.View, known []state.VMachine, stores map[string]string, kind string, m hypervisor.Machine) (state.VMachine, bool) {
	store, file, _ := strings.Cut(m.Config, "/")
	for _, k := range known {
		if k.Ino == 0 {
			continue
		}
		if pool, ok := stores[store]; ok && file != "" && v.ConfigOf(k) == pool+"/"+file {
			return k, true
		}
		if kind == state.KindLibvirt && k.Format == state.FormatLibvirt && vmconfig.SameMachine(k.UUID, m.UUID) {
			return k, true
		}
	}
	return state.VMachine{}, false
}

// spec is a VM as only its hypervisor describes it; ours is false where none of its disks is on a vPool.
func (c *Controller) spec(ctx context.Context, m hypervisor.Machine) (s state.VMachineSpec, ours bool) {
	if m.UUID == "" || m.Name == "" || c.cfg.Machines == nil {
		return s, false
	}
	s = state.VMachineSpec{Name: m.Name, Format: m.Format, UUID: m.UUID, Guest: m.Guest, VCPUs: m.VCPUs, Memory: m.Memory}
	s.Disks, s.Layered = c.cfg.Machines.KnownDisks(ctx, m.Format, m.Disks)
	for _, d := range s.Disks {
		ours = ours || d.Volume != uuid.Nil
	}
	return s, ours
}

func same(a, b state.VMachineSpec) bool {
	return a.Name == b.Name && a.Guest == b.Guest && a.VCPUs == b.VCPUs && a.Memory == b.Memory && a.Layered == b.Layered && slices.Equal(a.Disks, b.Disks)
}

// Power asks what a VM does now; ok is false where no hypervisor that can be asked knows it.
func (c *Controller) Power(ctx context.Context, m state.VMachine) (power string, ok bool) {
	if m.PMachine == uuid.Nil {
		return "", false
	}
	ctx, cancel := context.WithTimeout(ctx, powerMax)
	defer cancel()
	if _, err := c.ask(ctx, m.PMachine); err != nil {
		return "", false
	}
	now, err := c.cfg.Store.View().VMachine(m.ID)
	return now.Power, err == nil && now.PMachine == m.PMachine && now.Power != ""
}

// MountSpec says what hosts are to mount.
type MountSpec struct {
	VPool string
	// Hosts by name or Ref; none means all that are connected.
	Hosts []string
	// Address of the appliance as the hosts reach it, Datastore what they are to call it; "" are this node's, and the vPool's name.
	Address, Datastore string
}

// Mounted is what a host did.
type Mounted struct {
	Host string
	Done string
	Err  error
}

// What a host did.
const (
	DoneMounted = "mounted"
	DoneAlready = "already mounted"
	DoneFailed  = "failed"
)

// MountPlan says which hosts would mount what.
func (c *Controller) MountPlan(name string, s MountSpec) (p state.PMachine, hosts []state.PMachineHost, m hypervisor.Mount, err error) {
	v := c.cfg.Store.View()
	if p, err = v.PMachineByName(name); err != nil {
		return p, nil, m, err
	}
	pool, err := v.VPool(s.VPool)
	if err != nil {
		return p, nil, m, err
	}
	m = hypervisor.Mount{Name: s.Datastore, Server: s.Address, Export: "/" + pool.Name}
	if m.Name == "" {
		m.Name = pool.Name
	}
	if m.Server == "" {
		m.Server = c.cfg.Address()
	}
	if m.Server == "" || strings.ContainsAny(m.Server, "/ \t\"'<>") || strings.ContainsAny(m.Name, "/ \t\"'<>") {
		return p, nil, m, &state.Error{Err: state.ErrInvalid, Object: "pmachine " + p.Name, Detail: fmt.Sprintf("address %.80q or datastore %.80q", m.Server, m.Name),
			Remedy: "give the appliance's address as the hosts reach it, and a plain name"}
	}
	for _, h := range s.Hosts {
		i := slices.IndexFunc(p.Hosts, func(k state.PMachineHost) bool { return k.Name == h || k.Ref == h })
		if i < 0 {
			return p, nil, m, &state.Error{Err: state.ErrNotFound, Object: fmt.Sprintf("host %.80s of pmachine %s", h, p.Name)}
		}
		hosts = append(hosts, p.Hosts[i])
	}
	if len(s.Hosts) == 0 {
		for _, h := range p.Hosts {
			if h.State != "disconnected" && h.State != "notResponding" {
				hosts = append(hosts, h)
			}
		}
	}
	if len(hosts) == 0 {
		return p, nil, m, &state.Error{Err: state.ErrConflict, Object: "pmachine " + p.Name, Detail: "has no host that is connected"}
	}
	return p, hosts, m, nil
}

// Mount has hosts mount a vPool, one after the other; one that fails does not keep the others from it.
func (c *Controller) Mount(ctx context.Context, name string, s MountSpec) ([]Mounted, error) {
	p, hosts, m, err := c.MountPlan(name, s)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, mountMax)
	defer cancel()
	h, err := c.dial(ctx, p)
	if err != nil {
		return nil, refusal(p.Name, err)
	}
	defer h.Close()
	var out []Mounted
	for _, host := range hosts {
		m.Host = host.Ref
		r := Mounted{Host: host.Name, Done: DoneMounted}
		already, err := h.Mount(ctx, m)
		switch {
		case err != nil:
			r.Done, r.Err = DoneFailed, err
			c.cfg.Log.Warn("a host did not mount a vpool", "pmachine", p.Name, "host", host.Name, "vpool", s.VPool, "err", text(err))
		case already:
			r.Done = DoneAlready
		default:
			c.cfg.Log.Info("a host mounted a vpool", "pmachine", p.Name, "host", host.Name, "vpool", s.VPool, "server", m.Server)
		}
		out = append(out, r)
	}
	return out, c.after(ctx, p, h, m.Server)
}

// after records what a hypervisor tells once something was done there. server is one of ours from now on.
func (c *Controller) after(ctx context.Context, p state.PMachine, h hypervisor.Hypervisor, server string) error {
	one := c.lock(p.ID)
	one.Lock()
	defer one.Unlock()
	inv, err := h.Inventory(ctx)
	if err != nil {
		return refusal(p.Name, err)
	}
	if server == "" {
		return c.record(ctx, p.ID, inv)
	}
	return c.withAddress(server).record(ctx, p.ID, inv)
}

// withAddress is the controller for one call, which takes one more address for ours.
func (c *Controller) withAddress(server string) *Controller {
	cfg := c.cfg
	cfg.Address = func() string { return server }
	return &Controller{cfg: cfg, asking: make(map[uuid.UUID]*sync.Mutex)}
}

// Unmount has all hosts of a pMachine unmount a vPool.
func (c *Controller) Unmount(ctx context.Context, name, vpool string) error {
	v := c.cfg.Store.View()
	p, err := v.PMachineByName(name)
	if err != nil {
		return err
	}
	pool, err := v.VPool(vpool)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, mountMax)
	defer cancel()
	h, err := c.dial(ctx, p)
	if err != nil {
		return refusal(p.Name, err)
	}
	defer h.Close()
	for _, m := range p.Mounts {
		if m.Pool != pool.ID {
			continue
		}
		if err := h.Unmount(ctx, m.Host, m.Name); err != nil {
			return errors.Join(refusal(p.Name, err), c.after(ctx, p, h, ""))
		}
		c.cfg.Log.Info("a host unmounted a vpool", "pmachine", p.Name, "host", m.Host, "vpool", vpool)
	}
	return c.after(ctx, p, h, "")
}
