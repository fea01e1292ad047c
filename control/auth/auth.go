// Package auth says who a caller is and what it may do: users with passwords, second factors or OpenID Connect, sessions of the
// console, API clients and tokens, the first administrator, and the log of what all of them did.
//
//	a := auth.New(auth.Config{Raft: node, Store: node.State(), Vault: secrets, Log: log})
//	a.Bearer(token, from) (Principal, error)            Authorization: Bearer …
//	a.Cookie(ctx, cookie, from) (Principal, error)      the console's session
//	a.SignIn(ctx, Credentials) (SignedIn, error)        password, and a code where a second factor is set up
//	a.Grant(ctx, client, secret, scope, from)           OAuth2 client credentials: a token for an hour
//	a.SetUp(ctx, code, name, password)                  the first administrator
//	a.Record(ctx, Entry)                                the audit log
//	Users, Groups, Clients, Tokens: the controllers of these objects
//
// # What is kept
//
//	password      argon2id as a PHC string; a sign-in that succeeds makes it anew if the parameters have changed
//	token, client secret, session cookie     256 random bits; the state holds their SHA-256
//	TOTP key      in the Vault, which seals it before it enters the raft log
//	set-up code   memory of one process
//
// So neither the raft log, nor a snapshot, nor the API's answers ever hold what would let somebody in, but for the one answer that
// hands a secret to whoever asked for it.
//
// # Rules
//
// Every request looks at the state of its own node: what was revoked is refused as soon as this node has applied it, and a stream asks
// again while it lasts. A token's roles are those that it names and that its owner still has. Whether the name or the password was
// wrong cannot be told from a refusal or from how long it takes. Failures are counted per request, by account, address and both
// (backoff.go). A session ends 12 hours after the sign-in, or 30 minutes after it was last used; it is always a new one, so that nobody
// can plant a known one.
package auth

import (
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"golang.org/x/time/rate"

	"varve/control/state"
)

// Refusals.
var (
	// ErrUnauthenticated: no credentials, or wrong, expired or revoked ones.
	ErrUnauthenticated = errors.New("not signed in")
	// ErrForbidden: known, but not allowed.
	ErrForbidden = errors.New("not allowed")
	// ErrCodeNeeded: the password is right and a code of the second factor is needed too.
	ErrCodeNeeded = errors.New("a code of the second factor is needed")
)

// WaitError refuses for a while.
type WaitError struct{ Wait time.Duration }

func (e *WaitError) Error() string {
	return "too many failures, wait " + e.Wait.Round(time.Second).String()
}

// Proposer commits a command and returns what it did. raft.Node is one.
type Proposer interface {
	Apply(ctx context.Context, cmd state.Command) (state.Result, error)
}

// Vault keeps secrets sealed in the state; secrets.Store is one.
type Vault interface {
	Set(ctx context.Context, name string, plain []byte) error
	Get(name string) ([]byte, error)
	Delete(ctx context.Context, name string) error
}

// Times.
const (
	SessionLasts   = 12 * time.Hour
	SessionIdle    = 30 * time.Minute
	touchEvery     = 5 * time.Minute
	GrantLasts     = time.Hour
	TokenLasts     = 90 * 24 * time.Hour
	TokenLastsMax  = 366 * 24 * time.Hour
	refusedPerSec  = 2
	refusedBurst   = 50
	auditTextBytes = 500
)

// TokenPrefix starts every token and secret, so that secret scanners know them.
const TokenPrefix = "varve_"

const tokenBytesMax = 256

// Config wires an Authenticator. Raft and Store are required.
type Config struct {
	Raft  Proposer
	Store *state.Store
	Vault Vault // nil: no second factors
	Log   *slog.Logger
	Now   func() time.Time
}

// Authenticator of one node.
type Authenticator struct {
	cfg     Config
	hasher  hasher
	backoff *backoff
	setup   setupCode
	refused *rate.Limiter
}

// New wires an Authenticator and starts nothing.
func New(cfg Config) *Authenticator {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Authenticator{cfg: cfg, hasher: newHasher(), backoff: newBackoff(cfg.Now), refused: rate.NewLimiter(refusedPerSec, refusedBurst)}
}

// Ways that a caller comes in.
const (
	ViaLocal   = "local"
	ViaConsole = "console"
	ViaAPI     = "api"
)

// Kinds of principals.
const (
	KindLocal  = "local"
	KindUser   = "user"
	KindClient = "client"
	KindToken  = "token" // one of the appliance's own, without an owner
	KindNobody = "anonymous"
)

// Principal is who calls. The zero value is nobody.
type Principal struct {
	Kind string
	Name string
	// ID is that of the user or client.
	ID    uuid.UUID
	Via   string
	Roles []string
	// VPools are the only ones it may see; nil for all.
	VPools []string
	// Expires is when this way in ends; zero for never.
	Expires time.Time
	// Token is the name of the token that was shown, Session the id of the session.
	Token   string
	Session uuid.UUID
	// TokenKind is that of the token, "" where none was shown.
	TokenKind string
}

// Local is whoever may open the appliance's socket.
func Local(who string) Principal {
	return Principal{Kind: KindLocal, Name: who, Via: ViaLocal, Roles: []string{state.RoleAdmin}}
}

// Nobody has not signed in.
func Nobody() Principal { return Principal{Kind: KindNobody, Name: KindNobody, Via: ViaAPI} }

// Who names it in the audit log.
func (p Principal) Who() string {
	switch {
	case p.Kind == KindNobody || p.Kind == "":
		return KindNobody
	case p.Kind == KindToken || p.Token == "":
		return p.Kind + "/" + p.Name
	}
	return p.Kind + "/" + p.Name + " token/" + p.Token
}

// SignedIn says whether it is somebody.
func (p Principal) SignedIn() bool { return p.Kind != KindNobody && p.Kind != "" }

// Has says whether it has one of the roles. An administrator has all.
func (p Principal) Has(roles ...string) bool {
	return slices.ContainsFunc(p.Roles, func(r string) bool { return r == state.RoleAdmin || slices.Contains(roles, r) })
}

// Sees says whether it may see a vPool.
func (p Principal) Sees(vpool string) bool {
	return p.VPools == nil || slices.Contains(p.VPools, vpool)
}

// implied are the roles that whoever has one may hand on besides it.
var implied = map[string][]string{
	state.RoleAdmin:         state.Roles(),
	state.RoleStorageAdmin:  {state.RoleStorageAdmin, state.RoleOperator, state.RoleViewer},
	state.RoleOperator:      {state.RoleOperator, state.RoleViewer},
	state.RoleSecurityAdmin: {state.RoleSecurityAdmin, state.RoleViewer},
	state.RoleViewer:        {state.RoleViewer},
}

// MayGrant says whether somebody with roles may hand on role.
func MayGrant(roles []string, role string) bool {
	return slices.ContainsFunc(roles, func(r string) bool { return slices.Contains(implied[r], role) })
}

// within are those of the wanted roles that the owner's cover.
func within(wanted, owner []string) []string {
	var out []string
	for _, r := range wanted {
		if MayGrant(owner, r) {
			out = append(out, r)
		}
	}
	return out
}

func newSecret() string {
	b := make([]byte, 32)
	rand.Read(b)
	return TokenPrefix + base64.RawURLEncoding.EncodeToString(b)
}

func inNetworks(networks []string, from string) bool {
	if len(networks) == 0 {
		return true
	}
	ip, err := netip.ParseAddr(from)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(networks, func(n string) bool {
		p, err := netip.ParsePrefix(n)
		return err == nil && p.Contains(ip.Unmap().WithZone(""))
	})
}

// Bearer says whose token it is. from is the caller's IP address.
func (a *Authenticator) Bearer(token, from string) (Principal, error) {
	if len(token) == 0 || len(token) > tokenBytesMax {
		return Nobody(), ErrUnauthenticated
	}
	view := a.cfg.Store.View()
	hash := sha256.Sum256([]byte(token))
	t, ok := view.TokenByHash(hash)
	if !ok || subtle.ConstantTimeCompare(hash[:], t.Hash[:]) != 1 || t.Expires != 0 && int64(t.Expires) <= a.cfg.Now().UnixNano() ||
		!inNetworks(t.Networks, from) {
		return Nobody(), ErrUnauthenticated
	}
	p := Principal{Kind: KindToken, Name: t.Name, Via: ViaAPI, Roles: t.Roles, VPools: t.VPools, Token: t.Name, TokenKind: cmp.Or(t.Kind, state.TokenAPI)}
	if len(t.Roles) == 0 {
		p.Roles = []string{t.Role}
	}
	if t.Expires != 0 {
		p.Expires = time.Unix(0, int64(t.Expires))
	}
	if t.Owner == uuid.Nil {
		return p, nil
	}
	if u, err := view.User(t.Owner); err == nil && !u.Disabled {
		p.Kind, p.Name, p.ID, p.Roles = KindUser, u.Name, u.ID, within(p.Roles, view.RolesOf(u))
		return p, nil
	}
	if c, err := view.APIClient(t.Owner); err == nil && inNetworks(c.Networks, from) {
		p.Kind, p.Name, p.ID, p.Roles = KindClient, c.Name, c.ID, within(p.Roles, c.Roles)
		if c.VPools != nil {
			p.VPools = c.VPools
		}
		return p, nil
	}
	return Nobody(), ErrUnauthenticated
}

// Cookie says whose session it is, and puts its idle end off.
func (a *Authenticator) Cookie(ctx context.Context, cookie string) (Principal, error) {
	if len(cookie) == 0 || len(cookie) > tokenBytesMax {
		return Nobody(), ErrUnauthenticated
	}
	view := a.cfg.Store.View()
	hash := sha256.Sum256([]byte(cookie))
	s, ok := view.SessionByHash(hash)
	if !ok || subtle.ConstantTimeCompare(hash[:], s.Hash[:]) != 1 {
		return Nobody(), ErrUnauthenticated
	}
	p, err := a.sessionPrincipal(view, s)
	if err != nil {
		return p, err
	}
	if left := time.Duration(int64(s.Idle) - a.cfg.Now().UnixNano()); left < SessionIdle-touchEvery {
		if _, err := a.cfg.Raft.Apply(ctx, &state.TouchSession{ID: s.ID, Idle: state.Time(SessionIdle)}); err != nil {
			a.cfg.Log.Debug("idle end of a session is not put off", "session", s.ID, "err", err)
		}
	}
	return p, nil
}

func (a *Authenticator) sessionPrincipal(view *state.View, s state.Session) (Principal, error) {
	now := a.cfg.Now().UnixNano()
	u, err := view.User(s.User)
	if err != nil || u.Disabled || int64(s.Until) <= now || int64(s.Idle) <= now {
		return Nobody(), ErrUnauthenticated
	}
	return Principal{Kind: KindUser, Name: u.Name, ID: u.ID, Via: ViaConsole, Roles: view.RolesOf(u), Expires: time.Unix(0, int64(s.Until)),
		Session: s.ID}, nil
}

// Still says whether the principal could come in the same way now, with the same roles: what a stream asks while it lasts.
func (a *Authenticator) Still(p Principal) bool {
	view := a.cfg.Store.View()
	now := a.cfg.Now()
	switch {
	case p.Kind == KindLocal:
		return true
	case !p.Expires.IsZero() && !now.Before(p.Expires):
		return false
	case p.Session != uuid.Nil:
		s, err := view.Session(p.Session)
		if err != nil {
			return false
		}
		q, err := a.sessionPrincipal(view, s)
		return err == nil && slices.Equal(p.Roles, q.Roles)
	case p.Token != "":
		t, err := view.Token(p.Token)
		if err != nil || t.Owner == uuid.Nil {
			return err == nil
		}
		if u, err := view.User(t.Owner); err == nil {
			return !u.Disabled && len(within(p.Roles, view.RolesOf(u))) == len(p.Roles)
		}
		c, err := view.APIClient(t.Owner)
		return err == nil && len(within(p.Roles, c.Roles)) == len(p.Roles)
	}
	return false
}

// CSRFToken is what changes by a session must bear besides its cookie. Only who can read the API's answers can know it.
func CSRFToken(cookie string) string {
	mac := hmac.New(sha256.New, []byte(cookie))
	mac.Write([]byte("varve csrf"))
	return base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

// CSRFRight says whether the token shown is the cookie's.
func CSRFRight(cookie, shown string) bool {
	return hmac.Equal([]byte(CSRFToken(cookie)), []byte(shown))
}

// Credentials of a sign-in.
type Credentials struct {
	Name, Password, Code string
	From                 string
}

// SignedIn is a new session. Its cookie is told this once.
type SignedIn struct {
	Principal Principal
	Cookie    string
}

// SignIn makes a session for a user with a password.
func (a *Authenticator) SignIn(ctx context.Context, c Credentials) (SignedIn, error) {
	u, rehash, step, err := a.password(ctx, c)
	if err != nil {
		return SignedIn{}, err
	}
	return a.open(ctx, u, c.From, rehash, step)
}

// PasswordGrant is SignIn for a program of the internal API: a token for an hour instead of a session.
func (a *Authenticator) PasswordGrant(ctx context.Context, c Credentials) (token string, lasts time.Duration, err error) {
	u, _, step, err := a.password(ctx, c)
	if err != nil {
		return "", 0, err
	}
	if step != 0 { // a code works once: the session that spends it is thrown away
		in, err := a.open(ctx, u, c.From, "", step)
		if err != nil {
			return "", 0, err
		}
		if err := a.SignOut(ctx, in.Principal); err != nil {
			return "", 0, err
		}
	}
	token, err = a.grant(ctx, u.ID, a.cfg.Store.View().RolesOf(u), nil, nil)
	return token, GrantLasts, err
}

// password checks name, password and second factor, slowly and the same way whoever is named.
func (a *Authenticator) password(ctx context.Context, c Credentials) (u state.User, rehash string, step int64, err error) {
	account := clip(c.Name, 63)
	if w := a.backoff.wait(account, c.From); w > 0 {
		return u, "", 0, &WaitError{w}
	}
	u, err = a.cfg.Store.View().UserByName(c.Name)
	stored := ""
	if err == nil && u.Source == state.SourcePassword && !u.Disabled {
		stored = string(u.Password)
	}
	right, old, err := a.hasher.verify(ctx, stored, c.Password)
	if err != nil {
		return u, "", 0, err
	}
	if !right {
		a.backoff.failed(account, c.From)
		return state.User{}, "", 0, ErrUnauthenticated
	}
	if u.TOTP != "" {
		if c.Code == "" {
			return u, "", 0, ErrCodeNeeded
		}
		key, err := a.openTOTP(u)
		if err != nil {
			return u, "", 0, err
		}
		if step = totpMatch(key, c.Code, a.cfg.Now(), u.TOTPStep); step == 0 {
			a.backoff.failed(account, c.From)
			return state.User{}, "", 0, ErrUnauthenticated
		}
	}
	a.backoff.succeeded(account, c.From)
	if old {
		if rehash, err = a.hasher.hash(ctx, c.Password); err != nil {
			return u, "", 0, err
		}
	}
	return u, rehash, step, nil
}

// open makes a session.
func (a *Authenticator) open(ctx context.Context, u state.User, from, rehash string, step int64) (SignedIn, error) {
	cookie := newSecret()
	hash := sha256.Sum256([]byte(cookie))
	cmd := &state.CreateSession{ID: uuid.New(), User: u.ID, UserRev: u.Rev, Hash: hash[:], TOTPStep: step,
		Lasts: state.Time(SessionLasts), Idle: state.Time(SessionIdle), From: clip(from, 64), Rehash: rehash}
	if _, err := a.cfg.Raft.Apply(ctx, cmd); err != nil {
		if errors.Is(err, state.ErrConflict) { // changed while the password was checked, or a code used twice
			return SignedIn{}, ErrUnauthenticated
		}
		return SignedIn{}, err
	}
	view := a.cfg.Store.View()
	s, err := view.Session(cmd.ID)
	if err != nil {
		return SignedIn{}, err
	}
	p, err := a.sessionPrincipal(view, s)
	return SignedIn{Principal: p, Cookie: cookie}, err
}

// SignOut ends a session.
func (a *Authenticator) SignOut(ctx context.Context, p Principal) error {
	_, err := a.cfg.Raft.Apply(ctx, &state.EndSession{ID: p.Session})
	if errors.Is(err, state.ErrNotFound) {
		return nil
	}
	return err
}

// Grant is OAuth2's client credentials: a token for an hour with the roles in scope, or with all of the client's.
func (a *Authenticator) Grant(ctx context.Context, client, secret, scope, from string) (token string, roles []string, err error) {
	account := "client " + clip(client, 63)
	if w := a.backoff.wait(account, from); w > 0 {
		return "", nil, &WaitError{w}
	}
	c, err := a.cfg.Store.View().APIClientByName(client)
	hash := sha256.Sum256([]byte(secret))
	if err != nil || subtle.ConstantTimeCompare(hash[:], c.Hash[:]) != 1 || !inNetworks(c.Networks, from) {
		a.backoff.failed(account, from)
		return "", nil, ErrUnauthenticated
	}
	a.backoff.succeeded(account, from)
	roles = c.Roles
	if scope != "" {
		wanted := strings.Fields(scope)
		if roles = within(wanted, c.Roles); len(roles) != len(wanted) || len(roles) == 0 {
			return "", nil, ErrForbidden
		}
	}
	token, err = a.grant(ctx, c.ID, roles, c.VPools, c.Networks)
	return token, roles, err
}

func (a *Authenticator) grant(ctx context.Context, owner uuid.UUID, roles, vpools, networks []string) (string, error) {
	if len(roles) == 0 {
		return "", ErrForbidden
	}
	token, id := newSecret(), uuid.New()
	hash := sha256.Sum256([]byte(token))
	_, err := a.cfg.Raft.Apply(ctx, &state.SetToken{Name: "oauth-" + id.String(), ID: id, New: true, Hash: hash[:], Kind: state.TokenOAuth,
		Owner: owner, Roles: roles, VPools: vpools, Networks: networks, Expires: state.Time(a.cfg.Now().Add(GrantLasts).UnixNano())})
	return token, err
}

// NeedsSetUp says whether there is no user yet.
func (a *Authenticator) NeedsSetUp() bool { return len(a.cfg.Store.View().Users()) == 0 }

// SetUpCode makes a new code for the first administrator; it replaces the one before.
func (a *Authenticator) SetUpCode() string { return a.setup.renew() }

// CheckSetUp is nil for the right code while there is no user yet. The code stays; wrong ones are counted.
func (a *Authenticator) CheckSetUp(code string) error {
	if !a.NeedsSetUp() {
		return &state.Error{Err: state.ErrConflict, Object: "cluster", Detail: "is set up already", Remedy: "sign in"}
	}
	right, locked := a.setup.check(code)
	if locked {
		return &state.Error{Err: state.ErrConflict, Object: "set-up", Detail: "is locked",
			Remedy: "make a new code on the appliance: varve setup-code"}
	}
	if !right {
		return ErrUnauthenticated
	}
	return nil
}

// SetUp makes the first administrator.
func (a *Authenticator) SetUp(ctx context.Context, code, name, password, from string) (SignedIn, error) {
	if err := a.CheckSetUp(code); err != nil {
		return SignedIn{}, err
	}
	roles := []string{state.RoleAdmin}
	u, err := a.createUser(ctx, NewUser{Name: name, Password: password, Roles: roles}, true)
	if err != nil {
		return SignedIn{}, err
	}
	a.setup.spend()
	return a.open(ctx, u, from, "", 0)
}

func clip(s string, n int) string {
	s = strings.ToValidUTF8(s, "?")
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n], "")
}
