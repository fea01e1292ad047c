package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	v1 "varve/control/api/customer"
	"varve/control/mount"
	"varve/control/raft"
	"varve/control/replica"
	"varve/control/state"
	"varve/control/vpool"
	"varve/control/wire"
)

// Where control and gateway are two processes, control asks the gateway of its own node for what only a data path knows:
//
//	DATA/gateway.sock   POST /call/NAME, JSON both ways (package wire); GET /metrics
//	    report          is it ready, where are its doors, how full are log and backends
//	    pool/…          vpool.Engine: backends are opened where they are used
//	    file/…          vmachine.Files
//	    mount/test      api.Mounts
//	DATA/peer.sock      calls that other nodes' control makes as well: engines of volumes, health, figures (peers.go)
//
// A call carries the index of control's state, and the gateway waits until its copy is as new. While the gateway is away these calls fail
// at once, and everything that is in control's state goes on being answered and changed.
const gatewaySocketName = "gateway.sock"

const (
	reportEvery    = time.Second
	reportTimeout  = 2 * time.Second
	reportOld      = 5 * time.Second
	localBytesMax  = 2 << 20
	metricsTimeout = 8 * time.Second
	metricsMax     = 64 << 20
)

// gatewayReport is what the gateway says of itself.
type gatewayReport struct {
	NotReady string      `json:"not_ready,omitempty"`
	Status   v1.Status   `json:"status"` // Log, Services and Problems
	Doors    exportDoors `json:"doors"`
}

// gatewayCall is what any of the calls takes.
type gatewayCall struct {
	Index   uint64        `json:"index"` // how new the caller's state is
	Pool    uuid.UUID     `json:"pool,omitzero"`
	Backend state.Backend `json:"backend,omitzero"`
	Keys    *vpool.Keys   `json:"keys,omitempty"`
	Volume  state.Volume  `json:"volume,omitzero"`
	Bytes   []byte        `json:"bytes,omitempty"`
	Most    int64         `json:"most,omitempty"`
	Host    string        `json:"host,omitempty"`
	Wait    time.Duration `json:"wait,omitempty"`
}

// backendAnswer carries what a backend's error says: it is no error of the call.
type backendAnswer struct {
	Probe  vpool.Probe `json:"probe"`
	Error  string      `json:"error,omitempty"`
	Remedy string      `json:"remedy,omitempty"`
}

// backendError is one that was met in the gateway.
type backendError struct{ text, remedy string }

func (e *backendError) Error() string  { return e.text }
func (e *backendError) Remedy() string { return e.remedy }

func (a *backendAnswer) fill(err error) {
	if err == nil {
		return
	}
	a.Error = err.Error()
	if r, ok := errors.AsType[interface {
		error
		Remedy() string
	}](err); ok {
		a.Remedy = r.Remedy()
	}
}

func (a *backendAnswer) failure() error {
	if a.Error == "" {
		return nil
	}
	return &backendError{a.Error, a.Remedy}
}

// fileStat is the answer of file/stat.
type fileStat struct {
	Size     int64     `json:"size"`
	Modified time.Time `json:"modified"`
	Known    bool      `json:"known"`
}

// serveControl answers DATA/gateway.sock until ctx ends.
func (a *appliance) serveControl(ctx context.Context) error {
	mux := http.NewServeMux()
	handle := func(name string, do func(ctx context.Context, c gatewayCall) (any, error)) {
		mux.HandleFunc("POST /call/"+name, func(w http.ResponseWriter, r *http.Request) {
			wire.Serve(w, r, localBytesMax, func(ctx context.Context, body []byte) (any, error) {
				var c gatewayCall
				if json.Unmarshal(body, &c) != nil { // its error may quote credentials
					return nil, &state.Error{Err: state.ErrInvalid, Object: "call " + name, Detail: "its arguments do not read"}
				}
				if a.raft.State().Index() < c.Index {
					if err := a.raft.Sync(ctx); err != nil {
						return nil, err
					}
				}
				return do(ctx, c)
			})
		})
	}
	nothing := func(err error) (any, error) { return struct{}{}, err }
	here := poolsHere{a.pools, &a.base}
	tried := func(p vpool.Probe, err error) (any, error) {
		out := backendAnswer{Probe: p}
		out.fill(err)
		return out, nil
	}
	keys := func(c gatewayCall) vpool.Keys {
		if c.Keys == nil {
			return vpool.Keys{}
		}
		return *c.Keys
	}
	handle("report", func(ctx context.Context, _ gatewayCall) (any, error) { return a.report(ctx), nil })
	handle("pool/probe", func(ctx context.Context, c gatewayCall) (any, error) {
		return tried(here.ProbeBackend(ctx, c.Backend, keys(c)))
	})
	handle("pool/try-keys", func(ctx context.Context, c gatewayCall) (any, error) {
		p, err := a.raft.State().View().VPoolByID(c.Pool)
		if err != nil {
			return nil, err
		}
		return tried(vpool.Probe{}, here.TryKeys(ctx, p, keys(c)))
	})
	handle("pool/keys-changed", func(ctx context.Context, c gatewayCall) (any, error) {
		return tried(vpool.Probe{}, here.KeysChanged(ctx, c.Pool))
	})
	handle("pool/add", func(ctx context.Context, c gatewayCall) (any, error) {
		p, err := a.raft.State().View().VPoolByID(c.Pool)
		if err != nil {
			return nil, err
		}
		return tried(vpool.Probe{}, here.AddPool(ctx, p))
	})
	handle("pool/remove", func(ctx context.Context, c gatewayCall) (any, error) {
		return tried(vpool.Probe{}, here.RemovePool(ctx, c.Pool))
	})
	handle("file/stat", func(_ context.Context, c gatewayCall) (any, error) {
		var s fileStat
		s.Size, s.Modified, s.Known = a.engine.Stat(c.Volume.ID)
		return s, nil
	})
	handle("file/read", func(ctx context.Context, c gatewayCall) (any, error) {
		return a.engine.Read(ctx, c.Volume, min(c.Most, localBytesMax))
	})
	handle("file/write", func(ctx context.Context, c gatewayCall) (any, error) {
		return nothing(a.engine.Write(ctx, c.Volume, c.Bytes))
	})
	handle("mount/test", func(ctx context.Context, c gatewayCall) (any, error) {
		p, err := a.raft.State().View().VPoolByID(c.Pool)
		if err != nil {
			return nil, err
		}
		return mounts{a}.Test(ctx, p, c.Host, c.Wait)
	})
	mux.Handle("GET /metrics", a.metricsHandler())
	return replica.Serve(ctx, a.doors.gateway, mux)
}

// report is what this data path says of itself.
func (a *appliance) report(ctx context.Context) gatewayReport {
	r := gatewayReport{Doors: a.exportDoors()}
	if err := a.notReady(); err != nil {
		r.NotReady = err.Error()
	}
	a.status(ctx, &r.Status)
	return r
}

// gateway is the data path of this node as the control unit sees it.
type gateway struct {
	b      *base
	client *http.Client
	last   atomic.Pointer[heard]
}

// heard is what the gateway said last, or why it does not.
type heard struct {
	gatewayReport
	at  time.Time // of the report
	err error     // nil: it answers
}

func newGateway(b *base) *gateway {
	return &gateway{b: b, client: replica.NewHTTP(filepath.Join(b.cfg.Data, gatewaySocketName))}
}

// Run keeps the report fresh until ctx ends.
func (g *gateway) Run(ctx context.Context) error {
	defer g.client.CloseIdleConnections()
	return tick(ctx, reportEvery, func() { g.refresh(ctx) })
}

func (g *gateway) refresh(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, reportTimeout)
	defer cancel()
	now := &heard{}
	if was := g.last.Load(); was != nil {
		*now = *was
	}
	var r gatewayReport
	if now.err = g.call(ctx, "report", gatewayCall{}, &r); now.err == nil {
		now.gatewayReport, now.at = r, time.Now()
	}
	if was := g.last.Load(); ctx.Err() == nil && (was == nil || (was.err == nil) != (now.err == nil)) {
		if now.err != nil {
			g.b.cfg.Log.Warn("the gateway does not answer, it is asked again", "err", now.err)
		} else {
			g.b.cfg.Log.Info("the gateway answers")
		}
	}
	g.last.Store(now)
}

var errGatewayAway = errors.New("the gateway of this node does not answer: guests are not served")

// heard is what it said last; an error says that it does not answer now.
func (g *gateway) heard() (heard, error) {
	h := g.last.Load()
	switch {
	case h == nil:
		return heard{}, errors.New("the gateway was not asked yet")
	case h.err != nil: // why is in the log
		return *h, errGatewayAway
	case time.Since(h.at) > reportOld:
		return *h, fmt.Errorf("the gateway has not answered for %s", time.Since(h.at).Round(time.Second))
	}
	return *h, nil
}

// Ready says why guests are not served.
func (g *gateway) Ready() error {
	h, err := g.heard()
	if err == nil && h.NotReady != "" {
		err = errors.New(h.NotReady)
	}
	return err
}

func (g *gateway) call(ctx context.Context, name string, c gatewayCall, answer any) error {
	c.Index = g.b.raft.State().Index()
	body, err := json.Marshal(c)
	if err != nil {
		return fmt.Errorf("encode call %s: %w", name, err)
	}
	return wire.Call(ctx, g.client, name, body, answer)
}

// status adds to the API's answer what the gateway says.
func (g *gateway) status(_ context.Context, s *v1.Status) {
	h, err := g.heard()
	s.Log, s.Services = h.Status.Log, append(s.Services, h.Status.Services...)
	if err == nil { // else Ready tells
		s.Problems = append(s.Problems, h.Status.Problems...)
	}
}

// metrics gives the gateway's and, with names of their own, control's.
func (g *gateway) metrics(own http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), metricsTimeout)
		defer cancel()
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://gateway/metrics", nil)
		if err == nil {
			var res *http.Response
			if res, err = g.client.Do(req); err == nil {
				if res.StatusCode == http.StatusOK {
					_, err = io.Copy(w, io.LimitReader(res.Body, metricsMax))
				} else {
					err = errors.New(res.Status)
				}
				res.Body.Close()
			}
		}
		if err != nil {
			g.b.cfg.Log.Debug("metrics of the gateway are missing", "err", err)
		}
		plain := r.Clone(ctx)
		plain.Header.Del("Accept")
		plain.Header.Del("Accept-Encoding")
		own.ServeHTTP(w, plain)
	})
}

// poolsThere are the gateway's backends.
type poolsThere struct{ *gateway }

var _ vpool.Engine = poolsThere{}

func (g poolsThere) try(ctx context.Context, name string, c gatewayCall) (vpool.Probe, error) {
	var a backendAnswer
	if err := g.call(ctx, name, c, &a); err != nil {
		return vpool.Probe{}, err
	}
	return a.Probe, a.failure()
}

// ProbeBackend implements vpool.Engine.
func (g poolsThere) ProbeBackend(ctx context.Context, b state.Backend, k vpool.Keys) (vpool.Probe, error) {
	return g.try(ctx, "pool/probe", gatewayCall{Backend: b, Keys: &k})
}

// TryKeys implements vpool.Engine.
func (g poolsThere) TryKeys(ctx context.Context, p state.VPool, k vpool.Keys) error {
	_, err := g.try(ctx, "pool/try-keys", gatewayCall{Pool: p.ID, Keys: &k})
	return err
}

// KeysChanged implements vpool.Engine.
func (g poolsThere) KeysChanged(ctx context.Context, pool uuid.UUID) error {
	_, err := g.try(ctx, "pool/keys-changed", gatewayCall{Pool: pool})
	return err
}

// Rekey implements vpool.Engine: it is a task of the gateway's.
func (g poolsThere) Rekey(context.Context, uuid.UUID, func(done, total int64)) error {
	return errors.New("wrap keys: this process has no volume driver")
}

// AddPool implements vpool.Engine. While the gateway is away it is done already: it takes all vPools when it starts.
func (g poolsThere) AddPool(ctx context.Context, p state.VPool) error {
	_, err := g.try(ctx, "pool/add", gatewayCall{Pool: p.ID})
	g.b.properties.Renew(ctx, propertyBackend, g.b.raft.ID().String()) // with its room
	return away(err)
}

// RemovePool implements vpool.Engine.
func (g poolsThere) RemovePool(ctx context.Context, id uuid.UUID) error {
	_, err := g.try(ctx, "pool/remove", gatewayCall{Pool: id})
	return away(err)
}

// away is nil where the gateway could not be asked.
func away(err error) error {
	if errors.Is(err, raft.ErrUnavailable) {
		return nil
	}
	return err
}

// Space implements vpool.Engine.
func (g poolsThere) Space(id uuid.UUID) (vpool.Space, bool) {
	return g.b.space(id)
}

// filesThere are small files, through the gateway.
type filesThere struct{ *gateway }

const statTimeout = 2 * time.Second

// Stat implements vmachine.Files.
func (g filesThere) Stat(id uuid.UUID) (int64, time.Time, bool) {
	ctx, cancel := context.WithTimeout(context.Background(), statTimeout)
	defer cancel()
	var s fileStat
	if err := g.call(ctx, "file/stat", gatewayCall{Volume: state.Volume{ID: id}}, &s); err != nil {
		return 0, time.Time{}, false
	}
	return s.Size, s.Modified, s.Known
}

// Read implements vmachine.Files.
func (g filesThere) Read(ctx context.Context, v state.Volume, most int64) (b []byte, err error) {
	err = g.call(ctx, "file/read", gatewayCall{Volume: v, Most: most}, &b)
	return b, err
}

// Write implements vmachine.Files.
func (g filesThere) Write(ctx context.Context, v state.Volume, b []byte) error {
	return g.call(ctx, "file/write", gatewayCall{Volume: v, Bytes: b}, nil)
}

// mountsThere tell of the gateway's exports.
type mountsThere struct{ *gateway }

// Address is this node's as hypervisors reach it.
func (g mountsThere) Address() string {
	h, _ := g.heard() // where it was counts
	return h.Doors.address()
}

// Export implements api.Mounts.
func (g mountsThere) Export(p state.VPool) mount.Export {
	h, _ := g.heard()
	return h.Doors.export(p)
}

// Test implements api.Mounts.
func (g mountsThere) Test(ctx context.Context, p state.VPool, host string, wait time.Duration) (checks []mount.Check, err error) {
	err = g.call(ctx, "mount/test", gatewayCall{Pool: p.ID, Host: host, Wait: wait}, &checks)
	return checks, err
}
