package api

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/labstack/echo/v4"
	"golang.org/x/time/rate"

	v1 "varve/control/api/customer"
	"varve/control/auth"
	"varve/control/state"
)

// access says who may call a route that is no operation of a specification.
type access int

const (
	local access = iota // a reader of metrics: this host, or whoever has a role
	open
)

type plainRoute struct {
	method, path string
	access       access
	handle       echo.HandlerFunc
}

// Names of what a session shows.
const (
	sessionCookie = "__Host-varve-session"
	csrfHeader    = "X-Varve-CSRF"
)

// call is one request, as its handlers see it.
type call struct {
	operation
	who     auth.Principal
	from    string
	request string
	query   url.Values
	header  http.Header // of the answer
	cookie  string
	// authorization is the request's header, for the token endpoint.
	authorization string
	// oidc is the cookie of a sign-in under way at an OpenID provider.
	oidc string
	// object is what the audit log names.
	object  string
	audited bool
}

type callKey struct{}

// callOf is the request that ctx belongs to; one without a guard has no rights.
func callOf(ctx context.Context) *call {
	if c, ok := ctx.Value(callKey{}).(*call); ok {
		return c
	}
	return &call{who: auth.Nobody(), query: url.Values{}, header: http.Header{}}
}

// about names the object of a change for the audit log.
func about(ctx context.Context, object string) { callOf(ctx).object = object }

const requestKey = "request"

func requestID(c echo.Context) string {
	id, _ := c.Get(requestKey).(string)
	return id
}

// observe gives every request an id and keeps browsers from guessing about the answers.
func (s *Server) observe(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		id := uuid.NewString()
		c.Set(requestKey, id)
		h := c.Response().Header()
		h.Set("X-Request-Id", id)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Cache-Control", "no-store")
		h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
		h.Set("Referrer-Policy", "no-referrer")
		if c.Request().TLS != nil {
			h.Set("Strict-Transport-Security", "max-age=31536000")
		}
		return next(c)
	}
}

func remoteIP(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	return host
}

func isLoopback(remote string) bool {
	ip := net.ParseIP(remote)
	return ip != nil && ip.IsLoopback()
}

// authenticate says who calls: the unix socket's peer, a bearer token, or a session's cookie, in this order. Nobody is no error; wrong
// credentials are one.
func (s *Server) authenticate(c *call, r *http.Request) (auth.Principal, error) {
	if p, ok := r.Context().Value(peerKey{}).(peer); ok && p.unix {
		if p.known && (p.uid == 0 || p.uid == s.self) {
			return auth.Local(fmt.Sprintf("uid/%d", p.uid)), nil
		}
		return auth.Nobody(), refuse(http.StatusForbidden, "forbidden", "this user may not administer the appliance",
			"run the command as root or as the appliance's user")
	}
	if header := r.Header.Get("Authorization"); header != "" {
		scheme, token, _ := strings.Cut(header, " ")
		if !strings.EqualFold(scheme, "Bearer") {
			if c.ID == "issueToken" { // the client's own way to show its secret
				return auth.Nobody(), nil
			}
			return auth.Nobody(), unauthenticated("a bearer token is needed")
		}
		p, err := s.auth.Bearer(token, c.from)
		if err != nil {
			return p, unauthenticated("the token is not valid")
		}
		return p, nil
	}
	if cookie, err := r.Cookie(sessionCookie); err == nil && !slices.Contains(c.Roles, anyone) {
		p, err := s.auth.Cookie(r.Context(), cookie.Value)
		if err != nil {
			return p, unauthenticated("the session has ended")
		}
		c.cookie = cookie.Value
		return p, nil
	}
	return auth.Nobody(), nil
}

func unauthenticated(why string) error {
	return refuse(http.StatusUnauthorized, "unauthenticated", why,
		"sign in, or send a token: DATA/admin.token of the appliance, or one of varve token create")
}

// allowed checks what the caller may do, before anything of the request's body is read.
func (s *Server) allowed(c *call, r *http.Request) error {
	o := c.operation
	if o.change() {
		// Browsers tell where a request comes from; nothing may be changed from another site.
		if err := s.origin.Check(r); err != nil {
			return refuse(http.StatusForbidden, "forbidden", "a change from another site", "use the console at its own address")
		}
	}
	switch {
	case slices.Contains(o.Roles, anyone):
		return nil
	case !c.who.SignedIn():
		return unauthenticated("a bearer token is needed")
	case c.cookie != "" && o.change() && !auth.CSRFRight(c.cookie, r.Header.Get(csrfHeader)):
		return refuse(http.StatusForbidden, "forbidden", csrfHeader+" is missing or not this session's", "send the session's csrf")
	case o.Local && c.who.Kind != auth.KindLocal:
		return refuse(http.StatusForbidden, "forbidden", "only the appliance's own socket takes this", "run it on the appliance with --data DIR")
	case o.Internal && c.who.TokenKind != "" && (c.who.TokenKind != state.TokenOAuth || c.who.Kind != auth.KindUser):
		return refuse(http.StatusForbidden, "forbidden", "the internal API is not for tokens and clients", "use the customer API")
	case slices.Contains(o.Roles, signedIn):
		return nil
	case !c.who.Has(o.Roles...):
		return refuse(http.StatusForbidden, "forbidden", fmt.Sprintf("%s needs one of the roles: %s", o.ID, strings.Join(o.Roles, ", ")), "")
	case c.who.VPools != nil && !o.Scoped:
		return refuse(http.StatusForbidden, "forbidden", "these credentials are bound to some vPools, "+o.ID+" is about more", "")
	}
	return nil
}

// guarded is what every operation goes through: who calls and may it, how often, has the same been done already, and what of it is
// written down. A change is in the audit log before it is answered.
func (s *Server) guarded(o operation, h echo.HandlerFunc) echo.HandlerFunc {
	return func(ec echo.Context) error {
		start, r := time.Now(), ec.Request()
		c := &call{operation: o, who: auth.Nobody(), from: remoteIP(r), request: requestID(ec), query: r.URL.Query(),
			header: ec.Response().Header(), authorization: r.Header.Get("Authorization")}
		if len(ec.ParamValues()) > 0 {
			if name, err := url.PathUnescape(ec.ParamValues()[0]); err == nil {
				c.object = name
			}
		}
		if o.Internal {
			c.header.Set("X-API-Stability", "internal")
			if cookie, err := r.Cookie(oidcCookie); err == nil {
				c.oidc = cookie.Value
			}
		}
		o.warn(c.header)
		var err error
		if c.who, err = s.authenticate(c, r); err == nil {
			err = s.allowed(c, r)
		}
		if err == nil {
			err = s.limits.take(c)
		}
		if err == nil && o.change() && !o.Dry && c.query.Has("dryRun") && c.query.Get("dryRun") != "false" {
			err = refuse(http.StatusBadRequest, "invalid", o.ID+" has no dry run", "leave dryRun out: it would be done") // and not done by mistake
		}
		if err == nil {
			err = s.fresh(r.Context(), c)
		}
		if err == nil {
			err = o.lift(ec)
		}
		if err == nil {
			r.Body = http.MaxBytesReader(ec.Response(), r.Body, max(bodyBytesMax, o.BodyMax))
			if o.BodyMax > 0 {
				r.Body = &paced{r.Body, http.NewResponseController(ec.Response())}
			}
			ec.SetRequest(r.WithContext(context.WithValue(r.Context(), callKey{}, c)))
			ec.Response().Before(func() { s.audit(r.Context(), c, nil) })
			err = s.once(ec, c, h)
		}
		if err != nil {
			s.audit(r.Context(), c, err)
		}
		if o.change() {
			s.cfg.Log.Info("api request", "request", c.request, "operation", o.ID, "object", clip(c.object), "who", c.who.Who(),
				"from", c.from, "took", time.Since(start), "err", err)
		}
		return err
	}
}

func clip(s string) string {
	if len(s) > 256 {
		return strings.ToValidUTF8(s[:256], "") + "…"
	}
	return s
}

// lift takes the deadlines off a slow operation.
func (o operation) lift(ec echo.Context) error {
	if !o.Slow {
		return nil
	}
	rc := http.NewResponseController(ec.Response())
	err := errors.Join(rc.SetReadDeadline(time.Time{}), rc.SetWriteDeadline(time.Time{}))
	if err != nil && !errors.Is(err, http.ErrNotSupported) {
		return fmt.Errorf("lift the deadlines of %s: %w", o.ID, err)
	}
	return nil
}

// paced is a long body that has to go on arriving.
type paced struct {
	io.ReadCloser
	rc *http.ResponseController
}

// Read implements io.Reader.
func (p *paced) Read(b []byte) (int, error) {
	if err := p.rc.SetReadDeadline(time.Now().Add(readTimeout)); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return 0, fmt.Errorf("read the body: %w", err)
	}
	return p.ReadCloser.Read(b)
}

// warn tells the caller of a deprecated operation, as RFC 9745 and RFC 8594 have it.
func (o operation) warn(h http.Header) {
	if o.Deprecated.IsZero() {
		return
	}
	h.Set("Deprecation", "@"+strconv.FormatInt(o.Deprecated.Unix(), 10))
	h.Set("Sunset", o.Sunset.UTC().Format(http.TimeFormat))
	h.Add("Link", `</api/docs#deprecation>; rel="deprecation"`)
}

// audit writes down what was changed or refused, once for a call. Reading, and asking what a change would do, are not written down.
func (s *Server) audit(ctx context.Context, c *call, err error) {
	if _, dryRun := errors.AsType[*effect](err); dryRun {
		c.audited = true
	}
	if c.audited {
		return
	}
	result, detail, refused := "ok", "", false
	if err != nil {
		p := problem(err)
		result, detail = p.Code, p.Detail
		refused = p.Status == http.StatusUnauthorized || p.Status == http.StatusForbidden || p.Status == http.StatusTooManyRequests
	}
	if !c.change() && !refused {
		return
	}
	c.audited = true
	if !c.who.SignedIn() && err != nil {
		refused = true
	}
	// The change is made: the caller's going away may not keep it out of the log.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), auditTimeout)
	defer cancel()
	if err := s.auth.Record(ctx, auth.Entry{Who: c.who.Who(), Via: c.who.Via, From: c.from, Action: c.ID, Object: c.object, Result: result,
		Detail: detail, Request: c.request, Refused: refused}); err != nil {
		s.cfg.Log.Error("what was done is not in the audit log", "request", c.request, "operation", c.ID, "who", c.who.Who(), "err", err)
	}
}

const auditTimeout = 10 * time.Second

// once answers a request with an Idempotency-Key that was answered before with the same answer, and does others.
func (s *Server) once(ec echo.Context, c *call, h echo.HandlerFunc) error {
	key := ec.Request().Header.Get("Idempotency-Key")
	if key == "" || !c.Keyed || c.query.Get("dryRun") == "true" {
		return h(ec)
	}
	if len(key) > idempotencyKeyMax {
		return refuse(http.StatusBadRequest, "invalid", fmt.Sprintf("the Idempotency-Key has more than %d bytes", idempotencyKeyMax), "")
	}
	body, err := io.ReadAll(ec.Request().Body)
	if _, over := errors.AsType[*http.MaxBytesError](err); over {
		return refuse(http.StatusRequestEntityTooLarge, "too_large", fmt.Sprintf("the body has more than %d bytes", bodyBytesMax), "")
	}
	if err != nil {
		return refuse(http.StatusBadRequest, "invalid", "the body broke off", "")
	}
	ec.Request().Body = io.NopCloser(bytes.NewReader(body))
	id := sha256.Sum256([]byte(c.who.Who() + "\x00" + key))
	request := sha256.Sum256(slices.Concat([]byte(c.Method+" "+ec.Request().URL.RequestURI()+"\x00"), body))
	ctx := ec.Request().Context()
	if _, err := s.cfg.Raft.Apply(ctx, &state.BeginAnswer{Key: id, Request: request}); err != nil {
		if !errors.Is(err, state.ErrExist) {
			return err
		}
		return s.again(ec, id, request)
	}
	kept := &keptAnswer{ResponseWriter: ec.Response().Writer}
	ec.Response().Writer = kept
	err = h(ec)
	ec.Response().Writer = kept.ResponseWriter
	end := &state.EndAnswer{Key: id, Status: kept.status, Body: kept.body.String(), Location: c.header.Get("Location"), ETag: c.header.Get("ETag")}
	if err != nil {
		if problem(err).Status >= http.StatusInternalServerError {
			return err // what has been done is not known: the key stays taken
		}
		end = &state.EndAnswer{Key: id}
	}
	if c.Secret || len(end.Body) > state.AnswerBytesMax {
		end.Body = ""
	}
	end.Location, end.ETag = clip(end.Location), clip(end.ETag)
	if _, err := s.cfg.Raft.Apply(context.WithoutCancel(ctx), end); err != nil {
		s.cfg.Log.Warn("an answer is not kept for its Idempotency-Key", "request", c.request, "operation", c.ID, "err", err)
	}
	if err != nil {
		return err
	}
	return kept.send()
}

const idempotencyKeyMax = 255

// again answers a request whose key is taken.
func (s *Server) again(ec echo.Context, id, request [32]byte) error {
	a, ok := s.cfg.Store.View().Answer(id)
	switch {
	case !ok:
		return refuse(http.StatusConflict, "idempotency", "the same key is being used now", "try again in a moment")
	case a.Request != request:
		return refuse(http.StatusUnprocessableEntity, "idempotency", "the Idempotency-Key was used for another request", "use a new key")
	case a.Status == 0:
		return refuse(http.StatusConflict, "idempotency", "the same request is under way, or its end is not known",
			"look whether it was done, then use a new key")
	case a.Body == "" && a.Status != http.StatusNoContent:
		return refuse(http.StatusConflict, "idempotency", "the same request was done; its answer is not kept", "look at "+a.Location)
	}
	h := ec.Response().Header()
	h.Set("Idempotency-Replayed", "true")
	if a.Location != "" {
		h.Set("Location", a.Location)
	}
	if a.ETag != "" {
		h.Set("ETag", a.ETag)
	}
	return ec.Blob(a.Status, "application/json", []byte(a.Body))
}

// keptAnswer holds an answer back until it is remembered.
type keptAnswer struct {
	http.ResponseWriter
	status int
	body   bytes.Buffer
}

func (k *keptAnswer) WriteHeader(status int) { k.status = status }

func (k *keptAnswer) Write(b []byte) (int, error) {
	if k.status == 0 {
		k.status = http.StatusOK
	}
	return k.body.Write(b)
}

func (k *keptAnswer) send() error {
	if k.status != 0 {
		k.ResponseWriter.WriteHeader(k.status)
	}
	_, err := k.ResponseWriter.Write(k.body.Bytes())
	if errors.Is(err, http.ErrBodyNotAllowed) && k.body.Len() == 0 {
		return nil
	}
	return err
}

// limiter bounds how often each caller may call. The socket's are not counted.
type limiter struct {
	// mu guards by.
	mu sync.Mutex
	by map[string]*rate.Limiter
}

const (
	callsPerSecond = 100
	callsBurst     = 400
	callersMax     = 4096
)

func newLimiter() *limiter { return &limiter{by: make(map[string]*rate.Limiter)} }

func (l *limiter) take(c *call) error {
	if c.who.Kind == auth.KindLocal {
		return nil
	}
	key := c.who.Who()
	if !c.who.SignedIn() {
		key = "from " + c.from
	}
	l.mu.Lock()
	r := l.by[key]
	if r == nil {
		if len(l.by) >= callersMax {
			clear(l.by) // everyone starts anew: memory is bounded, and nobody is refused for another's sake
		}
		r = rate.NewLimiter(callsPerSecond, callsBurst)
		l.by[key] = r
	}
	l.mu.Unlock()
	if !r.Allow() {
		c.header.Set("Retry-After", "1")
		return refuse(http.StatusTooManyRequests, "rate_limited", "too many requests", "wait a second")
	}
	return nil
}

// guardedPlain checks access to a route that is no operation.
func (s *Server) guardedPlain(r plainRoute) echo.HandlerFunc {
	return func(ec echo.Context) error {
		if r.access == open {
			return r.handle(ec)
		}
		req := ec.Request()
		c := &call{operation: operation{ID: "metrics", Roles: []string{state.RoleViewer}}, from: remoteIP(req)}
		if isLoopback(c.from) && req.Header.Get("X-Forwarded-For") == "" && req.Header.Get("Forwarded") == "" {
			return r.handle(ec)
		}
		var err error
		if c.who, err = s.authenticate(c, req); err != nil {
			return err
		}
		if !c.who.SignedIn() {
			return unauthenticated("a bearer token is needed")
		}
		if !c.who.Has(state.Roles()...) || c.who.VPools != nil {
			return refuse(http.StatusForbidden, "forbidden", "metrics are about the whole appliance", "")
		}
		return r.handle(ec)
	}
}

// ifMatch is the rev that a change is based on; 0 for whatever is there.
func ifMatch(header string) (uint64, error) {
	switch header {
	case "":
		return 0, &v1.Problem{Status: http.StatusPreconditionRequired, Code: "precondition_required", Title: "Precondition required",
			Detail: "If-Match is missing", Remedy: "send If-Match with the ETag of the object, or *"}
	case "*":
		return 0, nil
	}
	rev, err := strconv.ParseUint(strings.Trim(strings.TrimPrefix(header, "W/"), `"`), 10, 64)
	if err != nil || rev == 0 {
		return 0, refuse(http.StatusBadRequest, "invalid", "If-Match is no ETag of this API", "send the ETag of the object, or *")
	}
	return rev, nil
}

// based refuses a change that is based on another rev than the present one.
func based(header, object string, present uint64) (uint64, error) {
	rev, err := ifMatch(header)
	if err == nil && rev != 0 && rev != present {
		err = &state.Error{Err: state.ErrConflict, Object: object, Detail: "changed meanwhile", Rev: present,
			Remedy: "read it again and repeat the change"}
	}
	return rev, err
}

func etag(rev uint64) string { return `"` + strconv.FormatUint(rev, 10) + `"` }

// confirm refuses to destroy an object whose name was not repeated.
func confirm(given, name string) error {
	if given == name {
		return nil
	}
	why := "this cannot be undone"
	if given != "" {
		why = "confirm names another object"
	}
	return &v1.Problem{Status: http.StatusPreconditionRequired, Code: "confirmation_required", Title: "Confirmation required", Detail: why,
		Object: name, Remedy: "repeat with ?confirm=" + url.QueryEscape(name)}
}

// effect is the answer to a dry run. It goes the way of an error, past everything that would do something.
type effect struct{ v1.Effect }

func (*effect) Error() string { return "dry run" }

// wouldDo makes an effect. lost is what would be gone for good.
func wouldDo(summary string, changes, lost, affected []string, confirm string) error {
	some := func(list []string) []string {
		if list == nil {
			return []string{}
		}
		return list
	}
	return &effect{v1.Effect{Summary: summary, Changes: some(changes), Lost: some(lost), Affected: some(affected), Reversible: len(lost) == 0,
		Confirm: confirm}}
}
