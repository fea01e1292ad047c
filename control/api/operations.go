package api

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/labstack/echo/v4"
	"go.yaml.in/yaml/v3"

	v1 "varve/control/api/customer"
	"varve/control/api/internal"
	"varve/control/state"
)

// Roles of an operation that are no roles of a user.
const (
	anyone   = "anyone"
	signedIn = "signed-in"
)

// operation is one method of one path, as its specification has it.
type operation struct {
	ID, Method, Path string // Path as in the specification, with its prefix
	Summary, Tag     string
	Roles            []string
	CLI              string
	// Scoped operations keep to the caller's vPools; a caller bound to some may call no other.
	Scoped bool
	// Secret operations hand a secret out in their answer, which therefore is not remembered.
	Secret bool
	// Local operations are the socket's.
	Local bool
	// Internal operations are refused to API tokens and clients.
	Internal bool
	// Slow operations may take longer than a request's time.
	Slow bool
	// BodyMax is the most bytes of a body that is no JSON and goes to its handler as it comes; 0 for others.
	BodyMax int64
	// LocalView operations tell what this node sees, whether or not it has heard the latest.
	LocalView bool
	// Keyed operations take an Idempotency-Key, Dry ones dryRun.
	Keyed, Dry bool
	Deprecated time.Time
	Sunset     time.Time
}

// change says whether it may change something.
func (o operation) change() bool { return o.Method != http.MethodGet }

// echoPath is its path in echo's notation.
func (o operation) echoPath() string {
	return strings.NewReplacer("{", ":", "}", "").Replace(o.Path)
}

// document is a specification as this package needs it.
type document struct {
	operations []operation
	json       []byte // as it is served
	tree       map[string]any
}

var methods = []string{"get", "put", "post", "patch", "delete"}

// readSpec reads a specification. Every operation must say who may call it and which command line does the same.
func readSpec(spec []byte, prefix string) (*document, error) {
	d := &document{}
	if err := yaml.Unmarshal(spec, &d.tree); err != nil {
		return nil, fmt.Errorf("read specification of %s: %w", prefix, err)
	}
	var err error
	if d.json, err = json.Marshal(d.tree); err != nil {
		return nil, fmt.Errorf("specification of %s as JSON: %w", prefix, err)
	}
	var typed struct {
		Paths map[string]map[string]json.RawMessage `json:"paths"`
	}
	if err := json.Unmarshal(d.json, &typed); err != nil {
		return nil, fmt.Errorf("read paths of %s: %w", prefix, err)
	}
	for path, item := range typed.Paths {
		for _, m := range methods {
			raw, ok := item[m]
			if !ok {
				continue
			}
			o, err := readOperation(raw)
			if err != nil {
				return nil, fmt.Errorf("%s %s: %w", m, path, err)
			}
			o.Method, o.Path, o.Internal = strings.ToUpper(m), prefix+path, prefix == internal.Prefix
			d.operations = append(d.operations, o)
		}
	}
	slices.SortFunc(d.operations, func(a, b operation) int { return strings.Compare(a.Path+a.Method, b.Path+b.Method) })
	return d, nil
}

func readOperation(raw json.RawMessage) (operation, error) {
	var y struct {
		ID         string   `json:"operationId"`
		Summary    string   `json:"summary"`
		Tags       []string `json:"tags"`
		Roles      []string `json:"x-varve-roles"`
		CLI        string   `json:"x-varve-cli"`
		Scope      string   `json:"x-varve-scope"`
		Secret     bool     `json:"x-varve-secret"`
		Local      bool     `json:"x-varve-local"`
		Slow       bool     `json:"x-varve-slow"`
		LocalView  bool     `json:"x-varve-local-view"`
		Body       int64    `json:"x-varve-body"`
		Deprecated string   `json:"x-varve-deprecated"`
		Sunset     string   `json:"x-varve-sunset"`
		Parameters []struct {
			Ref string `json:"$ref"`
		} `json:"parameters"`
	}
	if err := json.Unmarshal(raw, &y); err != nil {
		return operation{}, err
	}
	o := operation{ID: y.ID, Summary: y.Summary, Roles: y.Roles, CLI: y.CLI, Scoped: y.Scope == "vpool", Secret: y.Secret, Local: y.Local, Slow: y.Slow,
		LocalView: y.LocalView, BodyMax: y.Body}
	if len(y.Tags) > 0 {
		o.Tag = y.Tags[0]
	}
	for _, p := range y.Parameters {
		o.Keyed = o.Keyed || strings.HasSuffix(p.Ref, "/IdempotencyKey")
		o.Dry = o.Dry || strings.HasSuffix(p.Ref, "/DryRun")
	}
	if o.ID == "" || o.CLI == "" || len(o.Roles) == 0 {
		return o, errors.New("operationId, x-varve-roles or x-varve-cli is missing")
	}
	for _, r := range o.Roles {
		if r != anyone && r != signedIn && !slices.Contains(state.Roles(), r) {
			return o, fmt.Errorf("role %q is unknown", r)
		}
	}
	var err error
	if y.Deprecated != "" {
		if o.Deprecated, err = time.Parse(time.DateOnly, y.Deprecated); err != nil {
			return o, err
		}
		if o.Sunset, err = time.Parse(time.DateOnly, y.Sunset); err != nil {
			return o, fmt.Errorf("a deprecated operation needs x-varve-sunset: %w", err)
		}
	}
	return o, nil
}

// guardedRouter gives every route that the generated code registers the guard of its operation.
type guardedRouter struct {
	*echo.Echo
	server *Server
	failed *error
}

func (g guardedRouter) add(method, path string, h echo.HandlerFunc) *echo.Route {
	i := slices.IndexFunc(g.server.operations, func(o operation) bool { return o.Method == method && o.echoPath() == path })
	if i < 0 {
		*g.failed = fmt.Errorf("%s %s is not in the specification", method, path)
		return nil
	}
	if g.server.lacks(g.server.operations[i]) {
		return nil
	}
	return g.Echo.Add(method, path, g.server.guarded(g.server.operations[i], h))
}

// lacks says whether this server was given no controller for an operation, which it then does not offer.
func (s *Server) lacks(o operation) bool {
	switch o.Tag {
	case "task":
		return s.cfg.Tasks == nil
	case "schedule":
		return s.cfg.Schedules == nil
	case "vmachine":
		return s.cfg.VMachines == nil || s.cfg.Tasks == nil
	case "pmachine":
		return s.cfg.PMachines == nil
	case "mount":
		return s.cfg.Mounts == nil
	}
	return slices.Contains([]string{"createFromTemplate", "flattenVDisk", "rewindVDisk", "rotateVPoolKeys", "verifyVPool"}, o.ID) && s.cfg.Tasks == nil || strings.HasSuffix(o.ID, "Sink") && s.cfg.Sinks == nil ||
		o.ID == "listSinks" && s.cfg.Sinks == nil
}

// GET implements the generated EchoRouter; the other methods too.
func (g guardedRouter) GET(path string, h echo.HandlerFunc, _ ...echo.MiddlewareFunc) *echo.Route {
	return g.add(http.MethodGet, path, h)
}

func (g guardedRouter) POST(path string, h echo.HandlerFunc, _ ...echo.MiddlewareFunc) *echo.Route {
	return g.add(http.MethodPost, path, h)
}

func (g guardedRouter) PUT(path string, h echo.HandlerFunc, _ ...echo.MiddlewareFunc) *echo.Route {
	return g.add(http.MethodPut, path, h)
}

func (g guardedRouter) PATCH(path string, h echo.HandlerFunc, _ ...echo.MiddlewareFunc) *echo.Route {
	return g.add(http.MethodPatch, path, h)
}

func (g guardedRouter) DELETE(path string, h echo.HandlerFunc, _ ...echo.MiddlewareFunc) *echo.Route {
	return g.add(http.MethodDelete, path, h)
}

// register reads the specifications and gives echo all routes.
func (s *Server) register() error {
	var err error
	if s.customer, err = readSpec(v1.Spec, v1.Prefix); err != nil {
		return err
	}
	if s.internal, err = readSpec(internal.Spec, internal.Prefix); err != nil {
		return err
	}
	s.operations = append(slices.Clone(s.customer.operations), s.internal.operations...)
	var failed error
	router := guardedRouter{Echo: s.echo, server: s, failed: &failed}
	v1.RegisterHandlersWithBaseURL(router, v1.NewStrictHandler(customerAPI{s}, nil), v1.Prefix)
	internal.RegisterHandlersWithBaseURL(router, internal.NewStrictHandler(internalAPI{s}, nil), internal.Prefix)
	if failed != nil {
		return failed
	}
	s.plain = []plainRoute{
		{http.MethodGet, "/healthz", open, s.healthz},
		{http.MethodGet, "/readyz", open, s.readyz},
		{http.MethodGet, "/metrics", local, echo.WrapHandler(s.cfg.Metrics)},
		{http.MethodGet, "/api", open, s.discover},
		{http.MethodGet, "/api/", open, s.discover},
		{http.MethodGet, "/api/docs", open, s.docs},
		{http.MethodGet, v1.Prefix + "/openapi.json", open, s.serveSpec("application/json", s.customer.json)},
		{http.MethodGet, v1.Prefix + "/openapi.yaml", open, s.serveSpec("application/yaml", v1.Spec)},
		{http.MethodGet, internal.Prefix + "/openapi.json", open, s.serveSpec("application/json", s.internal.json)},
	}
	for _, r := range s.plain {
		s.echo.Add(r.method, r.path, s.guardedPlain(r))
	}
	s.echo.RouteNotFound("/*", s.console)
	return nil
}

// noRoute tells a path that takes other methods from one that there is not.
func (s *Server) noRoute(c echo.Context) error {
	for _, m := range methods {
		probe := s.echo.NewContext(c.Request(), nil)
		s.echo.Router().Find(strings.ToUpper(m), c.Request().URL.EscapedPath(), probe)
		if probe.Path() != "" && probe.Path() != "/*" {
			return echo.ErrMethodNotAllowed
		}
	}
	return echo.ErrNotFound
}

// console hands the console what is no route of the APIs'.
func (s *Server) console(c echo.Context) error {
	r := c.Request()
	if s.cfg.Console == nil || r.URL.Path == "/api" || strings.HasPrefix(r.URL.Path, "/api/") || r.Method != http.MethodGet && r.Method != http.MethodHead {
		return s.noRoute(c)
	}
	s.cfg.Console.ServeHTTP(c.Response(), r)
	return nil
}
