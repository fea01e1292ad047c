// Package api serves the customer API (customer/openapi.yaml) and the internal API (internal/openapi.yaml) on DATA/varve.sock and over
// HTTPS. The generated code turns requests into calls of customerAPI and internalAPI, which call controllers and nothing else.
//
//	s, err := api.New(api.Config{VPools, VDisks, Nodes, Store, Raft, Auth, …})
//	ln, err := api.ListenUnix(path)                    // mode 0600, replaces a socket left behind
//	s.Serve(ctx, ln, nil)                              // unix socket
//	s.Serve(ctx, tcp, pkiServer.TLS())                 // HTTPS; nil when ctx ends
//	created, err := api.EnsureAdminToken(ctx, raft, store, dataDir)   // DATA/admin.token at the first start
//
// # The way of a request
//
//	observe       an id, headers against guessing browsers
//	guarded       who calls (socket peer, bearer token, session cookie) and may it: roles of the specification, origin and CSRF token of
//	              browsers, vPools that credentials are bound to, rate; nothing of the body is read before
//	fresh         reads see everything acknowledged before, on any node; ?consistency=stale does without
//	once          Idempotency-Key: the same request again gets the same answer
//	decode        strict JSON of bounded size and depth, no unknown field
//	a handler     If-Match, dryRun, confirm; then the controller
//	audit         every change, sign-in and refusal, before it is answered
//	fail          the one place where errors become application/problem+json
//
// An operation that the specification does not have cannot be registered, and one without roles does not start the server.
// Besides them: /healthz /readyz /api /api/docs and the specifications, open to anybody; /metrics for this host, or any role.
//
// Limits (reliability.md 4.2): body 1 MiB, header 32 KiB, JSON depth 32, read-header 5 s, read 30 s, write 60 s, 512 connections, 64 per
// address, 100 calls a second per caller.
package api

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/labstack/echo/v4"

	v1 "varve/control/api/customer"
	"varve/control/auth"
	"varve/control/events"
	"varve/control/jobs"
	"varve/control/node"
	"varve/control/pmachine"
	"varve/control/schedule"
	"varve/control/state"
	"varve/control/vdisk"
	"varve/control/vmachine"
	"varve/control/vpool"
)

// Limits.
const (
	bodyBytesMax      = 1 << 20
	headerBytesMax    = 32 << 10
	jsonDepthMax      = 32
	readHeaderTimeout = 5 * time.Second
	readTimeout       = 30 * time.Second
	writeTimeout      = 60 * time.Second
	idleTimeout       = 2 * time.Minute
	connectionsMax    = 512
	perAddressMax     = 64
	drainTimeout      = 5 * time.Second
)

// Config wires a server. VPools, VDisks, Nodes, Store, Raft and Auth are required.
type Config struct {
	Raft   auth.Proposer
	Auth   *auth.Authenticator
	VPools *vpool.Controller
	VDisks *vdisk.Controller
	Nodes  *node.Controller
	Store  *state.Store
	Log    *slog.Logger
	// Tasks, Types, Schedules and Sinks may be missing: then the operations about them are, too.
	Tasks     Tasks
	Types     jobs.Types
	Schedules *schedule.Dispatcher
	Sinks     *events.Sinks
	// VMachines, PMachines and Mounts may be missing: then the operations about them are, too.
	VMachines *vmachine.Controller
	PMachines *pmachine.Controller
	Mounts    Mounts
	// Appliance tells of nodes, disks, backends and what they measure; nil: the operations about those are unavailable.
	Appliance Appliance
	// Sync returns when this node's state has everything that was acknowledged anywhere before the call; nil where it always has.
	Sync func(ctx context.Context) error
	// Status adds what control does not know: services, log, problems. State, VPools … are filled already.
	Status func(ctx context.Context, s *v1.Status)
	// Rebuild opens a vPool again from its backend.
	Rebuild func(ctx context.Context, r v1.RebuildRequest) (v1.RebuildReport, error)
	// CheckConfig says what is wrong with a value of a config key; nil: any may be set.
	CheckConfig func(key, value string) error
	// Ready is nil while the exports are open, else says what is missing.
	Ready func() error
	// Metrics answers /metrics.
	Metrics http.Handler
	// Console answers what is asked for outside /api; nil is not found.
	Console http.Handler
	Version string
}

// Server of the API.
type Server struct {
	cfg     Config
	echo    *echo.Echo
	auth    *auth.Authenticator
	origin  *http.CrossOriginProtection
	limits  *limiter
	streams streams
	ending  atomic.Bool // Serve is being stopped: streams end
	started time.Time
	self    uint32 // the user whose connections the unix socket takes, besides root

	customer, internal *document
	operations         []operation // of both
	plain              []plainRoute
}

// New wires a server and starts nothing.
func New(cfg Config) (*Server, error) {
	if cfg.VPools == nil || cfg.VDisks == nil || cfg.Nodes == nil || cfg.Store == nil || cfg.Raft == nil || cfg.Auth == nil {
		return nil, errors.New("api server: a controller is missing")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Metrics == nil {
		cfg.Metrics = http.NotFoundHandler()
	}
	s := &Server{cfg: cfg, echo: echo.New(), auth: cfg.Auth, origin: http.NewCrossOriginProtection(), limits: newLimiter(),
		started: time.Now(), self: ownUser()}
	s.echo.HideBanner, s.echo.HidePort = true, true
	s.echo.HTTPErrorHandler = s.fail
	s.echo.Binder = strictBinder{}
	s.echo.Use(s.observe)
	if err := s.register(); err != nil {
		return nil, fmt.Errorf("api server: %w", err)
	}
	return s, nil
}

// serving is false once the server is being stopped.
func (s *Server) serving() bool { return !s.ending.Load() }

// Handler answers requests; Serve uses it, and tests do.
func (s *Server) Handler() http.Handler { return s.echo }

// Serve answers requests that arrive at ln until ctx ends, then lets those under way end for a while. tls nil is plain,
// which only a unix socket may be.
func (s *Server) Serve(ctx context.Context, ln net.Listener, conf *tls.Config) error {
	if conf == nil && ln.Addr().Network() != "unix" {
		return fmt.Errorf("serve api on %s: without TLS only a unix socket is served", ln.Addr())
	}
	capped := newCappedListener(ln, connectionsMax, perAddressMax)
	srv := &http.Server{
		Handler: s.echo, TLSConfig: conf, MaxHeaderBytes: headerBytesMax, ReadHeaderTimeout: readHeaderTimeout,
		ReadTimeout: readTimeout, WriteTimeout: writeTimeout, IdleTimeout: idleTimeout, ConnContext: withPeer,
		ErrorLog: slog.NewLogLogger(s.cfg.Log.Handler(), slog.LevelDebug),
	}
	done := make(chan error, 1)
	go func() {
		if conf != nil {
			done <- srv.ServeTLS(capped, "", "")
			return
		}
		done <- srv.Serve(capped)
	}()
	select {
	case err := <-done:
		return fmt.Errorf("serve api on %s: %w", ln.Addr(), err)
	case <-ctx.Done():
	}
	s.ending.Store(true)
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
	defer cancel()
	err := srv.Shutdown(drain)
	if errors.Is(err, context.DeadlineExceeded) {
		err = srv.Close()
	}
	<-done
	if err != nil {
		return fmt.Errorf("stop api on %s: %w", ln.Addr(), err)
	}
	return nil
}
