package server

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"runtime/pprof"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/errgroup"

	"varve/appliance/console"
	"varve/appliance/exports"
	"varve/appliance/history"
	"varve/control/api"
	v1 "varve/control/api/customer"
	"varve/control/auth"
	"varve/control/pmachine"
	"varve/control/vmachine"
	"varve/gateway/nbd"
	"varve/gateway/nfs"
)

func held(err error) bool { return errors.Is(err, syscall.EWOULDBLOCK) }

// Summary is what a person needs to know of an appliance that has become ready.
type Summary struct {
	Data string `json:"data"`
	// Addresses as others reach them; empty when off.
	NBD       string `json:"nbd,omitempty"`
	NFS       string `json:"nfs,omitempty"`
	HTTPS     string `json:"https,omitempty"`
	Portmap   string `json:"portmap,omitempty"`
	NBDSocket string `json:"nbd_socket"`
	APISocket string `json:"api_socket"`
	TokenFile string `json:"token_file"`
	CAFile    string `json:"ca_file"`
	// SetupCode makes the first administrator; empty once there is one.
	SetupCode string   `json:"setup_code,omitempty"`
	Fresh     bool     `json:"fresh"` // this start made it
	Component string   `json:"component"`
	VPools    []string `json:"vpools"`
}

// Serve runs an appliance until ctx ends, then stops it cleanly and returns nil. ready is called once, when all is open. An
// error means that the appliance could not start or had to give up; ErrRestart, that it wants to be started again.
func Serve(ctx context.Context, cfg Config, ready func(Summary)) (err error) {
	cfg, err = cfg.withDefaults()
	if err != nil {
		return err
	}
	if err := awaitJoin(ctx, cfg); err != nil {
		return err
	}
	lock, err := openData(cfg)
	if err != nil {
		return err
	}
	if cfg.Unit == UnitAll {
		if err := finishJoin(ctx, cfg); err != nil {
			return errors.Join(err, lock.Close())
		}
	}
	doors, err := openListeners(cfg)
	if err != nil {
		return errors.Join(err, lock.Close())
	}
	a := &appliance{base: base{cfg: cfg, lock: lock, doors: doors}, started: time.Now()}
	if err := a.open(ctx, true); err != nil {
		return errors.Join(err, a.close())
	}
	if err := a.stampLevel(); err != nil {
		return errors.Join(err, a.close())
	}
	if err := a.wire(ctx); err != nil {
		return errors.Join(err, a.close())
	}
	return a.run(ctx, ready)
}

// appliance is a base with the doors open.
type appliance struct {
	base
	started time.Time
	fresh   bool
	nbd     *nbd.Server
	// nbdLocal serves the unix socket; it is nbd itself unless that insists on TLS.
	nbdLocal   *nbd.Server
	nfs        *nfs.Server
	api        *api.Server
	auth       *auth.Authenticator
	automation *automation
	vmachines  *vmachine.Controller
	pmachines  *pmachine.Controller
	gateway    *gateway // in the control unit alone
	figures    *history.Store
	sightings  sightings
	ready      atomic.Bool
	joining    sync.Mutex // held while a cluster is asked to admit this appliance
}

// wire makes what a fresh appliance lacks and the servers, and starts nothing.
func (a *appliance) wire(ctx context.Context) error {
	if err := a.vpools.Start(ctx); err != nil {
		return err
	}
	_, known := a.nodes.Self()
	a.fresh = known != nil
	if err := a.initialise(ctx, a.nodeSpec(a.doors)); err != nil {
		return err
	}
	log := a.cfg.Log
	store := a.raft.State()
	nbdTLS, tlsConfig := nbd.TLSOff, (*tls.Config)(nil)
	switch a.cfg.NBDTLS {
	case "optional":
		nbdTLS, tlsConfig = nbd.TLSOptional, a.tls.TLS()
	case "required":
		nbdTLS, tlsConfig = nbd.TLSRequired, a.tls.TLS()
	}
	nbdLog := log.With("component", component(a.raft.Cluster(), a.raft.ID(), "nbd"))
	names := exports.NewNBD(store, a.volumes)
	listener := func(which string) prometheus.Registerer {
		return prometheus.WrapRegistererWith(prometheus.Labels{"listener": which}, a.metrics)
	}
	a.nbd = nbd.New(nbd.Config{Exports: names, TLS: nbdTLS, TLSConfig: tlsConfig, Seats: seats(),
		Log: nbdLog, Metrics: listener("network")})
	a.nbdLocal = a.nbd
	if nbdTLS == nbd.TLSRequired { // but not from programs of this host
		a.nbdLocal = nbd.New(nbd.Config{Exports: names, Seats: seats(), Log: nbdLog, Metrics: listener("local")})
	}
	nfsLog := log.With("component", component(a.raft.Cluster(), a.raft.ID(), "nfs"))
	observed := newNFSMetrics(a.metrics, func() nfs.Stats { return a.nfs.Stats() })
	a.nfs = nfs.New(nfs.Config{Namespace: exports.NewNFS(a.raft, store, a.volumes, a.pools, nfsLog).WithSnapshots(), Verifier: a.driver.Verifier,
		Seats: seats(), Log: nfsLog, Observe: observed.observe})
	if err := a.wireMachines(mounts{a}.Address, a.engine); err != nil {
		return err
	}
	if err := a.openHistory(); err != nil {
		return err
	}
	estate{a}.answer()
	estate{a}.answerLogs()
	a.metrics.MustRegister(estateMetrics{estate{a}})
	if a.cfg.Unit == UnitGateway {
		return nil
	}
	return a.wireAPI(apiParts{mounts: mounts{a}, status: a.status, ready: a.notReady, metrics: a.metricsHandler()})
}

// wireMachines makes what hypervisors are about, and the tasks of all.
func (a *appliance) wireMachines(address func() string, files vmachine.Files) error {
	store := a.raft.State()
	a.pmachines = pmachine.New(pmachine.Config{Raft: a.raft, Store: store, Vault: a.secrets, Machines: knownDisks{a}, Address: address, Log: a.logOf("pmachine")})
	a.vmachines = vmachine.New(vmachine.Config{Raft: a.raft, Store: store, Disks: a.vdisks, Files: files, Node: a.raft.ID(), Power: a.pmachines.Power,
		Emit: a.events.Emit, Log: a.logOf("vmachine")})
	roll := a.newRollout()
	if err := a.newAutomation(slices.Concat(a.vdisks.TaskTypes(), a.vdisks.LongTypes(), a.vmachines.TaskTypes(), a.vpools.TaskTypes(), roll.Types())...); err != nil {
		return err
	}
	roll.Use(a.automation.broker)
	return nil
}

// apiParts are what the API has of the data path: that of this process, or the gateway's.
type apiParts struct {
	mounts  api.Mounts
	status  func(ctx context.Context, s *v1.Status)
	ready   func() error
	metrics http.Handler
}

// wireAPI makes both APIs and the console.
func (a *appliance) wireAPI(p apiParts) error {
	a.auth = auth.New(auth.Config{Raft: a.raft, Store: a.raft.State(), Vault: a.secrets, Log: a.logOf("auth")})
	web, err := console.New()
	if err != nil {
		return err
	}
	status := func(ctx context.Context, s *v1.Status) {
		p.status(ctx, s)
		if addr := first(a.doors.https); addr != "" {
			s.Services = append(s.Services, v1.Service{Name: "https", Address: addr})
		}
	}
	auto := a.automation
	a.api, err = api.New(api.Config{Raft: a.raft, Auth: a.auth, VPools: a.vpools, VDisks: a.vdisks, Nodes: a.nodes, Store: a.raft.State(),
		Tasks: auto.broker, Types: auto.types, Schedules: auto.schedules, Sinks: auto.sinks, Status: status, Ready: p.ready,
		Appliance: estate{a}, Sync: a.raft.Sync, VMachines: a.vmachines, PMachines: a.pmachines, Mounts: p.mounts, CheckConfig: checkConfig,
		Metrics: p.metrics, Console: web, Version: a.cfg.Version, Log: a.logOf("api")})
	return err
}

func (a *appliance) metricsHandler() http.Handler {
	return promhttp.HandlerFor(a.metrics, promhttp.HandlerOpts{})
}

// run is the appliance's life after everything is open.
func (a *appliance) run(ctx context.Context, ready func(Summary)) error {
	inner, stopInner := context.WithCancel(context.WithoutCancel(ctx))
	defer stopInner()
	core, coreCtx := errgroup.WithContext(inner)
	core.Go(func() error { return named("volume driver", a.driver.Run(coreCtx)) })
	core.Go(func() error { return named("control", a.raft.Run(coreCtx)) })
	core.Go(func() error { return named("vPools", a.pools.Run(coreCtx)) })
	core.Go(func() error { return named("node port", a.runNetwork(coreCtx)) })
	core.Go(func() error { return named("vPools", a.followPools(coreCtx)) })
	core.Go(func() error { return named("calls of other nodes", a.runPeers(coreCtx)) })
	core.Go(func() error { return named("history", a.figures.Run(coreCtx)) })
	core.Go(func() error { return named("volume driver", a.untilBroken(coreCtx)) })
	core.Go(func() error { return named("data level", a.followLevel(coreCtx)) })
	core.Go(func() error { return named("configuration", a.followConfig(coreCtx)) })

	outer, stopOuter := context.WithCancelCause(ctx)
	defer stopOuter(nil)
	unlink := context.AfterFunc(coreCtx, func() { stopOuter(errCore) })
	defer unlink()
	serving, ctx := errgroup.WithContext(outer)
	a.serve(ctx, serving)
	serving.Go(func() error { return watchdog(ctx, a.cfg.Log, a.alive) })
	serving.Go(func() error { return a.untilJoined(ctx) })
	serving.Go(func() error {
		a.ready.Store(true)
		tell(a.cfg.Log, daemon.SdNotifyReady)
		a.cfg.Log.Info("appliance is ready", "data", a.cfg.Data, "took", time.Since(a.started).Round(time.Millisecond))
		ready(a.summary())
		<-ctx.Done()
		a.ready.Store(false)
		tell(a.cfg.Log, daemon.SdNotifyStopping)
		a.cfg.Log.Info("appliance is stopping")
		return nil
	})
	ended := make(chan error, 1)
	go func() {
		err := serving.Wait()
		stopInner()
		ended <- errors.Join(core.Wait(), err, a.close())
	}()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	select {
	case err := <-ended:
		return err
	case <-time.After(a.cfg.DrainTime):
		a.cfg.Log.Error("what keeps the appliance from stopping", "goroutines", goroutines())
		return fmt.Errorf("the appliance did not stop within %s; what was acknowledged as durable is on the disk", a.cfg.DrainTime)
	}
}

// goroutinesMax bytes of them are told: journald cuts a line at 48 KiB.
const goroutinesMax = 40 << 10

// goroutines says what all of them are doing, those that do the same together.
func goroutines() string {
	var b bytes.Buffer
	if err := pprof.Lookup("goroutine").WriteTo(&b, 1); err != nil {
		return err.Error()
	}
	return string(b.Bytes()[:min(b.Len(), goroutinesMax)])
}

const brokenPoll = 200 * time.Millisecond

// untilBroken returns the driver's error when it can no longer keep what it promised: its block map has no channel that
// tells so, its log has.
func (a *appliance) untilBroken(ctx context.Context) error {
	t := time.NewTicker(brokenPoll)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
			if err := a.driver.Err(); err != nil {
				return err
			}
		}
	}
}

// errCore ends the outer group when the inner one failed; the inner group's error says why.
var errCore = errors.New("volume driver or control failed")

// serve starts what talks to clients.
func (a *appliance) serve(ctx context.Context, g *errgroup.Group) {
	network, local := a.doors.nbd, []net.Listener{a.doors.nbdLocal}
	if a.nbdLocal == a.nbd {
		network = append(local, network...)
	} else {
		g.Go(func() error { return named("NBD", a.nbdLocal.Run(ctx, local...)) })
	}
	g.Go(func() error { return named("NBD", a.nbd.Run(ctx, network...)) })
	for _, ln := range a.doors.nfs {
		g.Go(func() error { return named("NFS", a.nfs.Run(ctx, ln)) })
	}
	if len(a.doors.portmap)+len(a.doors.portmapUDP) > 0 {
		g.Go(func() error { return named("portmapper", a.nfs.ServePortmap(ctx, a.doors.portmap, a.doors.portmapUDP)) })
	} else if a.cfg.Portmap != Off {
		g.Go(func() error { return named("portmapper", a.nfs.RunPortmap(ctx, a.cfg.Portmap)) })
	}
	g.Go(func() error { return a.keepAddresses(ctx) })
	g.Go(func() error { return named("vDisk controller", a.vdisks.Run(ctx)) })
	g.Go(func() error { return named("vMachine controller", a.vmachines.Run(ctx)) })
	a.automation.run(ctx, g, a)
	if a.cfg.Unit == UnitGateway {
		g.Go(func() error { return named("gateway socket", a.serveControl(ctx)) })
		return
	}
	g.Go(func() error { return named("control socket", a.controlServer().Serve(ctx, a.doors.control)) })
	a.automation.lead(ctx, g, a)
	a.serveAPI(ctx, g)
}

// serveAPI starts it.
func (a *appliance) serveAPI(ctx context.Context, g *errgroup.Group) {
	g.Go(func() error { return named("API", a.api.Serve(ctx, a.doors.apiSocket, nil)) })
	for _, ln := range a.doors.https {
		g.Go(func() error { return named("API", a.api.Serve(ctx, ln, a.tls.TLS())) })
	}
}

func named(what string, err error) error {
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// notReady says what is missing while the exports are not open.
func (a *appliance) notReady() error {
	if !a.ready.Load() {
		return errors.New("the exports are not open")
	}
	return errors.Join(a.driver.Err(), a.raft.Err())
}

// alive does what a guest's flush does on a few open volumes: where nothing is to be synced it costs nothing, and where a
// sync hangs it hangs too, until ctx ends.
func (a *appliance) alive(ctx context.Context) error {
	if err := a.notReady(); err != nil {
		return err
	}
	return a.volumes.Flush(ctx, aliveVolumes)
}

const aliveVolumes = 8

// status adds to the API's answer what control does not know.
func (a *appliance) status(_ context.Context, s *v1.Status) {
	d := a.driver.Stats()
	s.Log = v1.LogStatus{Capacity: v1.Size(a.cfg.LogBytes), Used: v1.Size(float64(a.cfg.LogBytes) * d.Log.Occupancy), Pending: v1.Size(d.Pending)}
	service := func(name, address string, connections int) {
		if address != "" {
			s.Services = append(s.Services, v1.Service{Name: name, Address: address, Connections: connections})
		}
	}
	service("nbd", first(a.doors.nbd), len(a.nbd.Attachments()))
	service("nfs", first(a.doors.nfs), int(a.nfs.Stats().Connections))
	service("portmap", a.portmapAddress(), 0)
	if d.Log.Occupancy > logFull {
		s.Problems = append(s.Problems, fmt.Sprintf("the write log is %.0f %% full: the backend does not keep up, guests' writes are slowed",
			d.Log.Occupancy*100))
	}
	if n := a.volumes.Lost(); n > 0 {
		s.Problems = append(s.Problems, fmt.Sprintf("%d volumes are lost until they are rebuilt: stop the appliance and run varve rebuild", n))
	}
	for _, p := range a.raft.State().View().VPools() {
		if h := a.driver.PoolHealth(p.ID); h.Err != "" {
			s.Problems = append(s.Problems, fmt.Sprintf("backend of vPool %s: %s", p.Name, h.Err))
		}
	}
}

const logFull = 0.8

func (a *appliance) summary() Summary {
	host := hostAddress()
	at := func(list []net.Listener) string {
		if addr := first(list); addr != "" {
			return reachable(addr, host)
		}
		return ""
	}
	s := Summary{Data: a.cfg.Data, NBD: at(a.doors.nbd), NFS: at(a.doors.nfs), HTTPS: at(a.doors.https), NBDSocket: NBDSocket(a.cfg.Data),
		APISocket: APISocket(a.cfg.Data), TokenFile: TokenFile(a.cfg.Data), CAFile: a.tls.CAFile(), Fresh: a.fresh,
		Component: component(a.raft.Cluster(), a.raft.ID(), "appliance")}
	s.Portmap = a.portmapAddress()
	if a.auth != nil && a.auth.NeedsSetUp() {
		s.SetupCode = a.auth.SetUpCode()
	}
	for _, p := range a.raft.State().View().VPools() {
		s.VPools = append(s.VPools, p.Name)
	}
	return s
}
