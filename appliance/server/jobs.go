package server

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"varve/appliance/exports"
	"varve/control/events"
	"varve/control/jobs"
	"varve/control/leader"
	"varve/control/policy"
	"varve/control/schedule"
	"varve/control/state"
	"varve/control/upkeep"
)

// automation is what the appliance does by itself: tasks, schedules, events and where they are sent.
type automation struct {
	types     jobs.Types
	broker    *jobs.Broker
	worker    *jobs.Worker
	schedules *schedule.Dispatcher
	policies  *policy.Controller
	sinks     *events.Sinks
	upkeep    *upkeep.Upkeep
}

// newAutomation wires it and starts nothing. more are the types of task that others bring.
func (a *appliance) newAutomation(more ...jobs.Type) error {
	store, log := a.raft.State(), a.logOf
	m := &automation{}
	m.sinks = events.NewSinks(a.raft, store, a.secrets, a.events, log("events"))
	m.upkeep = upkeep.New(upkeep.Config{Raft: a.raft, Store: store, Node: a.raft.ID(), Engine: exports.UpkeepEngine{Engine: a.engine},
		Events: a.events, Health: a.health, Renew: a.renew, Log: log("upkeep")})
	var err error
	if m.types, err = jobs.NewTypes(append(m.upkeep.Types(), more...)...); err != nil {
		return err
	}
	m.broker = jobs.NewBroker(jobs.BrokerConfig{Raft: a.raft, Store: store, Types: m.types, Log: log("jobs")})
	queues := []string{state.QueueOf(a.raft.ID()), state.QueueGeneric}
	if n, err := store.View().Node(a.raft.ID()); err == nil && n.Role == state.RoleMaster {
		queues = append(queues, state.QueueMasters)
	}
	m.worker = jobs.NewWorker(jobs.WorkerConfig{Node: a.raft.ID(), Queues: queues, Types: m.types, Source: m.broker, Log: log("jobs")})
	m.schedules = schedule.New(schedule.Config{Raft: a.raft, Store: store, Entries: schedule.Defaults(), Log: log("schedule"),
		Task: func(typ, object, by string, args json.RawMessage) (state.TaskSpec, error) {
			t, ok := m.types[typ]
			if !ok {
				return state.TaskSpec{}, &state.Error{Err: state.ErrInvalid, Object: fmt.Sprintf("task %q", typ), Detail: "no such type of task"}
			}
			return t.Spec(object, by, args)
		}})
	m.policies = &policy.Controller{Raft: a.raft, Store: store}
	a.automation = m
	return nil
}

// renew makes new certificates where they are due; those of a gateway unit are control's, which does so by itself.
func (a *appliance) renew(ctx context.Context) error {
	if a.cfg.Unit == UnitGateway {
		return nil
	}
	return a.tls.Renew(ctx)
}

// lead starts what the control unit does of it; the leader's duties run where this node leads.
func (m *automation) lead(ctx context.Context, g *errgroup.Group, a *appliance) {
	if a.cfg.Unit == UnitControl {
		g.Go(func() error { return named("events", a.events.Run(ctx)) })
	}
	g.Go(func() error {
		return named("leader's duties", leader.Run(ctx, a.raft, a.logOf("leader"),
			leader.Duty{Name: "tasks", Run: m.broker.Run},
			leader.Duty{Name: "schedules", Run: m.schedules.Run},
			leader.Duty{Name: "event sinks", Run: m.sinks.Run},
			leader.Duty{Name: "hypervisors", Run: a.pmachines.Run}))
	})
}

// run starts what is done beside the data: this node's tasks, and its events.
func (m *automation) run(ctx context.Context, g *errgroup.Group, a *appliance) {
	g.Go(func() error { return named("events", a.events.Run(ctx)) })
	g.Go(func() error { return named("tasks", m.worker.Run(ctx)) })
	g.Go(func() error { return a.watchBackends(ctx) })
	g.Go(func() error { return named("policies", a.volumes.FollowPolicies(ctx, a.logOf("policy"))) })
	a.events.Emit(events.UpAndRunning, events.TopicNode, a.raft.ID().String(), map[string]string{"version": a.cfg.Version})
}

func (a *appliance) logOf(service string) *slog.Logger {
	return a.cfg.Log.With("component", component(a.raft.Cluster(), a.raft.ID(), service))
}

const backendsEvery = 5 * time.Second

// watchBackends tells when a vPool's backend begins to fail, and when it works again, without waiting for the health check.
func (a *appliance) watchBackends(ctx context.Context) error {
	failing := make(map[uuid.UUID]bool)
	tick := time.NewTicker(backendsEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		for _, p := range a.raft.State().View().VPools() {
			h := a.driver.PoolHealth(p.ID)
			if now := h.Err != ""; now != failing[p.ID] {
				failing[p.ID] = now
				code := "backend_works_again"
				if now {
					code = "backend_failing"
				}
				a.events.Emit(events.VolumeDriverError, events.TopicVPool, p.ID.String(),
					map[string]string{"code": code, "vpool": p.Name, "detail": shortText(h.Err)})
			}
		}
	}
}

// health finds what is wrong with this node.
func (a *appliance) health(context.Context) []state.AlertSpec {
	var out []state.AlertSpec
	add := func(code, severity, object, detail, remedy string) {
		out = append(out, state.AlertSpec{Code: code, Severity: severity, Object: shortText(object), Detail: shortText(detail), Remedy: remedy})
	}
	self := "node " + a.raft.ID().String()
	if n, err := a.nodes.Self(); err == nil {
		self = "node " + n.Name
	}
	if err := a.notReady(); err != nil {
		add("not_ready", "error", self, err.Error(), "look at the node's log; restart it if it does not recover")
	}
	if full := a.driver.Stats().Log.Occupancy; full > logFull {
		// In steps, so that the alert does not change with every check.
		add("write_log_full", "warning", self, fmt.Sprintf("the write log is more than %d %% full, guests' writes are slowed", int(full*10)*10),
			"check that the backends answer and are fast enough, or give the log more room")
	}
	if n := a.volumes.Lost(); n > 0 {
		add("volumes_lost", "error", self, fmt.Sprintf("%d volumes are lost until they are rebuilt", n), "stop the appliance and run varve rebuild")
	}
	for _, p := range a.raft.State().View().VPools() {
		if h := a.driver.PoolHealth(p.ID); h.Err != "" {
			add("backend_failing", "error", "vpool "+p.Name, h.Err, "check the backend: its server, its credentials, its space")
		}
	}
	return out
}

func shortText(s string) string {
	const most = state.TaskTextBytesMax - 4
	if len(s) > most {
		s = s[:most] + "…"
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}
