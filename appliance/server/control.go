package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"

	"varve/appliance/exports"
	"varve/control/api"
	"varve/control/events"
	"varve/control/node"
	"varve/control/vdisk"
	"varve/control/vpool"
)

// Control runs the control unit until ctx ends. ready is called when it has caught up with the cluster and answers.
func Control(ctx context.Context, cfg Config, ready func(Summary)) error {
	cfg.Unit = UnitControl
	cfg, err := cfg.withDefaults()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(cfg.Data, 0o700); err != nil {
		return fmt.Errorf("make data directory: %w", err)
	}
	if err := checkLevel(cfg.Data); err != nil {
		return err
	}
	lock, err := lockControl(cfg)
	if err != nil {
		return err
	}
	if err := finishJoin(ctx, cfg); err != nil {
		return errors.Join(err, lock.Close())
	}
	doors, err := openListeners(cfg)
	if err != nil {
		return errors.Join(err, lock.Close())
	}
	a := &appliance{base: base{cfg: cfg, doors: doors, lock: lock}, started: time.Now()}
	if err := a.wireControl(ctx); err != nil {
		return errors.Join(err, a.close())
	}
	return a.runControl(ctx, ready)
}

// wireControl opens control and makes the servers, and starts nothing but raft and the node port.
func (a *appliance) wireControl(ctx context.Context) error {
	if err := a.openControl(ctx); err != nil {
		return err
	}
	if err := a.openSecrets(); err != nil {
		return err
	}
	store, self := a.raft.State(), a.raft.ID()
	a.metrics = prometheus.NewRegistry()
	prometheus.WrapRegistererWithPrefix("varve_control_", a.metrics).MustRegister(collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	a.gateway = newGateway(&a.base)
	a.shareSecrets()
	a.remote = exports.NewDistant(store, self, a.peers, a.logOf("peers"))
	if err := a.openProperties(); err != nil {
		return err
	}
	a.vpools = vpool.New(vpool.Config{Raft: a.raft, Store: store, Node: self, Engine: poolsThere{a.gateway}, Vault: a.secrets, Log: a.logOf("vpool")})
	a.events = events.NewPublisher(a.raft, self, a.logOf("events"))
	a.vdisks = vdisk.New(vdisk.Config{Emit: a.events.Emit, Raft: a.raft, Store: store, Engine: a.remote, Log: a.logOf("vdisk")})
	a.nodes = node.New(a.raft, store, self)
	if _, err := api.EnsureAdminToken(ctx, a.raft, store, a.cfg.Data); err != nil {
		return err
	}
	if err := a.wireMachines(mountsThere{a.gateway}.Address, filesThere{a.gateway}); err != nil {
		return err
	}
	estate{a}.answerLogs() // by this unit too: they are there while the gateway is not
	return a.wireAPI(apiParts{mounts: mountsThere{a.gateway}, status: a.gateway.status, ready: func() error { return errors.Join(a.gateway.Ready(), a.raft.Err()) },
		metrics: a.gateway.metrics(a.metricsHandler())})
}

// runControl is the unit's life after everything is open. What serves clients ends first; what it commits by goes on until then.
func (a *appliance) runControl(ctx context.Context, ready func(Summary)) error {
	inner, stopInner := context.WithCancel(context.WithoutCancel(ctx))
	defer stopInner()
	core, coreCtx := errgroup.WithContext(inner)
	core.Go(func() error { return named("control", a.raft.Run(coreCtx)) })
	core.Go(func() error { return named("node port", a.runNetwork(coreCtx)) })
	core.Go(func() error { return named("calls of nodes", a.runPeers(coreCtx)) })
	core.Go(func() error { return named("calls of other nodes", a.runDial(coreCtx)) })
	core.Go(func() error { return named("gateway's report", a.gateway.Run(coreCtx)) })

	outer, stopOuter := context.WithCancelCause(ctx)
	defer stopOuter(nil)
	defer context.AfterFunc(coreCtx, func() { stopOuter(errCore) })()
	g, run := errgroup.WithContext(outer)
	g.Go(func() error { return named("control socket", a.controlServer().Serve(run, a.doors.control)) })
	g.Go(func() error { return a.keepAddresses(run) })
	g.Go(func() error { return a.keepCertificates(run) })
	g.Go(func() error { return a.untilJoined(run) })
	g.Go(func() error { return watchdog(run, a.cfg.Log, func(context.Context) error { return a.raft.Err() }) })
	a.automation.lead(run, g, a)
	a.serveAPI(run, g)
	g.Go(func() error {
		tell(a.cfg.Log, daemon.SdNotifyReady)
		ready(a.summary())
		<-run.Done()
		tell(a.cfg.Log, daemon.SdNotifyStopping)
		return nil
	})
	err := g.Wait()
	stopInner()
	return errors.Join(core.Wait(), err, a.close())
}

const certificatesEvery = time.Hour

// keepCertificates renews them where they are due; with a node port that does so too.
func (a *appliance) keepCertificates(ctx context.Context) error {
	return tick(ctx, certificatesEvery, func() {
		if err := a.tls.Renew(ctx); err != nil && ctx.Err() == nil {
			a.cfg.Log.Warn("certificates could not be renewed, the old ones stay in use", "err", err)
		}
	})
}
