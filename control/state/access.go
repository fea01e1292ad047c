package state

import (
	"fmt"
	"net/netip"
	"slices"
	"unicode/utf8"

	"github.com/google/uuid"
)

// Roles. RoleAdmin may do everything; what the others may is in the API's specification.
const (
	RoleAdmin         = "admin"
	RoleSecurityAdmin = "security-admin"
	RoleStorageAdmin  = "storage-admin"
	RoleOperator      = "operator"
	RoleViewer        = "viewer"
)

// Roles lists all roles, the weakest first.
func Roles() []string {
	return []string{RoleViewer, RoleOperator, RoleStorageAdmin, RoleSecurityAdmin, RoleAdmin}
}

// Limits of what gives access.
const (
	UsersMax          = 10_000
	GroupsMax         = 1_000
	APIClientsMax     = 1_000
	TokensMax         = 20_000
	TokensEachMax     = 200 // of one owner
	SessionsMax       = 10_000
	SessionsEachMax   = 20 // of one user; an older one ends
	scopeMax          = 256
	phcBytesMax       = 256
	sealedBytesMax    = 1024
	expiredSweptAtOne = 64
)

const (
	tUser      = "user"
	tGroup     = "group"
	tAPIClient = "api_client"
	tSession   = "session"
	byHash     = "hash"
	byOwner    = "owner"
)

// SecretText is a secret or what is derived from one: it has no printed form, in JSON neither.
type SecretText string

// MarshalText keeps it out of every encoder.
func (SecretText) MarshalText() ([]byte, error) { return []byte("[secret]"), nil }

// String keeps it out of logs and messages.
func (SecretText) String() string { return "[secret]" }

// GoString keeps it out of %#v.
func (SecretText) GoString() string { return "[secret]" }

// Sources of a user's identity.
const (
	SourcePassword = "password"
	SourceOIDC     = "oidc"
)

// User is a person who signs in.
type User struct {
	ID       uuid.UUID `json:"id"`
	Name     string    `json:"name"`
	FullName string    `json:"full_name,omitempty"`
	Source   string    `json:"source"`
	// Subject is issuer and subject of an OIDC user.
	Subject string   `json:"subject,omitempty"`
	Roles   []string `json:"roles,omitempty"`
	// Groups are ids.
	Groups   []uuid.UUID `json:"groups,omitempty"`
	Disabled bool        `json:"disabled,omitempty"`
	// Password is a PHC string; "" for nobody's password.
	Password SecretText `json:"-"`
	// TOTP says where the key of the second factor is, "" for none; TOTPStep the last time step that was accepted.
	TOTP     SecretText `json:"-"`
	TOTPStep int64      `json:"totp_step,omitempty"`
	Created  Time       `json:"created"`
	Rev      uint64     `json:"rev"`
}

// Group gives its members its roles.
type Group struct {
	ID      uuid.UUID `json:"id"`
	Name    string    `json:"name"`
	Roles   []string  `json:"roles,omitempty"`
	Created Time      `json:"created"`
	Rev     uint64    `json:"rev"`
}

// APIClient is a program that signs in by OAuth2 client credentials. Only the SHA-256 of its secret, 256 random bits, is known.
type APIClient struct {
	ID       uuid.UUID `json:"id"`
	Name     string    `json:"name"`
	Hash     Secret    `json:"-"`
	Roles    []string  `json:"roles,omitempty"`
	VPools   []string  `json:"vpools,omitempty"`
	Networks []string  `json:"networks,omitempty"`
	Created  Time      `json:"created"`
	Rev      uint64    `json:"rev"`
}

// Kinds of tokens.
const (
	TokenAPI   = "api"
	TokenOAuth = "oauth"
)

// Token gives its bearer roles. Only the SHA-256 of the token is known.
type Token struct {
	Name string    `json:"name"`
	ID   uuid.UUID `json:"id,omitzero"`
	Hash Secret    `json:"-"`
	// Role is that of a token without Roles.
	Role string `json:"role"`
	// Kind is TokenAPI if it is empty. Owner is the user or client whose roles bound the token's; Nil for the appliance's own.
	Kind     string    `json:"kind,omitempty"`
	Owner    uuid.UUID `json:"owner,omitzero"`
	Roles    []string  `json:"roles,omitempty"`
	VPools   []string  `json:"vpools,omitempty"`
	Networks []string  `json:"networks,omitempty"`
	// Expires is 0 for never.
	Expires Time   `json:"expires,omitempty"`
	Created Time   `json:"created"`
	Rev     uint64 `json:"rev"`
}

// Session is a user's sign-in at the console. Hash is the SHA-256 of its cookie.
type Session struct {
	Hash Secret    `json:"-"`
	ID   uuid.UUID `json:"id"`
	User uuid.UUID `json:"user"`
	// Until is when it ends whatever is done, Idle when it ends if nothing is done.
	Until   Time   `json:"until"`
	Idle    Time   `json:"idle"`
	From    string `json:"from,omitempty"`
	Created Time   `json:"created"`
	Rev     uint64 `json:"rev"`
}

func checkRoles(object string, roles []string) error {
	for i, r := range roles {
		if !slices.Contains(Roles(), r) || slices.Contains(roles[:i], r) {
			return &Error{Err: ErrInvalid, Object: object, Field: "roles", Detail: "role " + quote(r) + " is unknown or named twice",
				Remedy: "use viewer, operator, storage-admin, security-admin or admin"}
		}
	}
	return nil
}

func checkScope(object string, vpools, networks []string) error {
	if len(vpools) > scopeMax || len(networks) > scopeMax {
		return invalid(object, fmt.Sprintf("more than %d vPools or networks", scopeMax))
	}
	for _, p := range vpools {
		if err := checkLabel("vpool", p); err != nil {
			return err
		}
	}
	for _, n := range networks {
		p, err := netip.ParsePrefix(n)
		if err != nil || p.Masked() != p {
			return &Error{Err: ErrInvalid, Object: object, Field: "networks", Detail: "network " + quote(n) + " is none",
				Remedy: "use CIDR with host bits zero, such as 10.0.0.0/8 or 192.0.2.7/32"}
		}
	}
	return nil
}

// SetUser makes a user, or changes the one with this id. Fields that are nil stay as they are. Ending its sessions is part of
// every change of what a sign-in rests on.
type SetUser struct {
	ID       uuid.UUID    `json:"id"`
	Rev      uint64       `json:"rev,omitempty"`
	Create   bool         `json:"create,omitempty"`
	Name     string       `json:"name,omitempty"`
	Source   string       `json:"source,omitempty"`
	Subject  string       `json:"subject,omitempty"`
	FullName *string      `json:"full_name,omitempty"`
	Roles    *[]string    `json:"roles,omitempty"`
	Groups   *[]uuid.UUID `json:"groups,omitempty"`
	Disabled *bool        `json:"disabled,omitempty"`
	Password *string      `json:"password,omitempty"`
	TOTP     *string      `json:"totp,omitempty"`
	// First refuses if there is a user already: what the set-up code may do.
	First bool `json:"first,omitempty"`
}

func (*SetUser) kind() (string, int) { return "set_user", 1 }

func (c *SetUser) check() error {
	object := "user " + quote(c.Name)
	if c.ID == uuid.Nil {
		return invalid(object, "no id")
	}
	if c.Create {
		if err := checkLabel("user", c.Name); err != nil {
			return err
		}
		if c.Source != SourcePassword && c.Source != SourceOIDC || (c.Source == SourceOIDC) != (c.Subject != "") {
			return invalid(object, "source "+quote(c.Source))
		}
	}
	if len(c.Subject) > sealedBytesMax || !utf8.ValidString(c.Subject) {
		return invalid(object, "subject too long")
	}
	if c.FullName != nil && (len(*c.FullName) > NameBytesMax || !utf8.ValidString(*c.FullName)) {
		return invalid(object, "full name too long or not UTF-8")
	}
	if c.Password != nil && len(*c.Password) > phcBytesMax || c.TOTP != nil && len(*c.TOTP) > sealedBytesMax {
		return invalid(object, "hash or key too long")
	}
	if c.Roles != nil {
		if err := checkRoles(object, *c.Roles); err != nil {
			return err
		}
	}
	if c.Groups != nil && len(*c.Groups) > scopeMax {
		return invalid(object, fmt.Sprintf("more than %d groups", scopeMax))
	}
	return nil
}

func (c *SetUser) apply(t *tx) (Result, error) {
	u, err := t.User(c.ID)
	switch {
	case c.Create && err == nil:
		return Result{}, &Error{Err: ErrExist, Object: "user " + quote(u.Name)}
	case c.Create:
		if _, err := t.UserByName(c.Name); err == nil {
			return Result{}, &Error{Err: ErrExist, Object: "user " + quote(c.Name)}
		}
		n := count[User](&t.View, tUser, byID, nil)
		if c.First && n > 0 {
			return Result{}, &Error{Err: ErrConflict, Object: "cluster", Detail: "is set up already", Remedy: "sign in"}
		}
		if n >= UsersMax {
			return Result{}, &Error{Err: ErrNoSpace, Object: "users", Detail: fmt.Sprintf("there are %d", n)}
		}
		u = User{ID: c.ID, Name: c.Name, Source: c.Source, Subject: c.Subject, Created: t.at}
	case err != nil:
		return Result{}, err
	default:
		if err := fresh("user "+quote(u.Name), c.Rev, u.Rev); err != nil {
			return Result{}, err
		}
	}
	if c.Groups != nil {
		for _, g := range *c.Groups {
			if _, err := t.Group(g); err != nil {
				return Result{}, err
			}
		}
		u.Groups = slices.Clone(*c.Groups)
	}
	set(&u.FullName, c.FullName)
	set(&u.Disabled, c.Disabled)
	if c.Roles != nil {
		u.Roles = slices.Clone(*c.Roles)
	}
	if c.Password != nil {
		u.Password = SecretText(*c.Password)
	}
	if c.TOTP != nil {
		u.TOTP, u.TOTPStep = SecretText(*c.TOTP), 0
	}
	had := t.hasAdmin()
	u.Rev = t.index
	t.put(tUser, &u)
	if had && !t.hasAdmin() {
		return Result{}, lastAdmin("user " + quote(u.Name))
	}
	if c.Roles != nil || c.Groups != nil || c.Disabled != nil || c.Password != nil || c.TOTP != nil {
		t.endSessions(u.ID)
	}
	if u.Disabled {
		t.dropTokens(u.ID)
	}
	return Result{Object: u.ID}, nil
}

// hasAdmin says whether some administrator can sign in with a password. A change that takes the last one away is refused; a
// cluster that has no user yet is administered by the local socket.
func (t *tx) hasAdmin() bool {
	return slices.ContainsFunc(t.Users(), func(u User) bool {
		return !u.Disabled && u.Source == SourcePassword && slices.Contains(t.RolesOf(u), RoleAdmin)
	})
}

func lastAdmin(object string) error {
	return &Error{Err: ErrConflict, Object: object, Detail: "no administrator with a password would be left",
		Remedy: "make another one first"}
}

// RolesOf are a user's own roles and those of its groups.
func (v *View) RolesOf(u User) []string {
	roles := slices.Clone(u.Roles)
	for _, id := range u.Groups {
		if g, err := v.Group(id); err == nil {
			roles = append(roles, g.Roles...)
		}
	}
	slices.Sort(roles)
	return slices.Compact(roles)
}

// DeleteUser takes a user away with its tokens and sessions.
type DeleteUser struct {
	ID  uuid.UUID `json:"id"`
	Rev uint64    `json:"rev,omitempty"`
}

func (*DeleteUser) kind() (string, int) { return "delete_user", 1 }

func (c *DeleteUser) check() error { return nil }

func (c *DeleteUser) apply(t *tx) (Result, error) {
	u, err := t.User(c.ID)
	if err != nil {
		return Result{}, err
	}
	if err := fresh("user "+quote(u.Name), c.Rev, u.Rev); err != nil {
		return Result{}, err
	}
	had := t.hasAdmin()
	t.endSessions(u.ID)
	t.dropTokens(u.ID)
	t.del(tUser, &u)
	if had && !t.hasAdmin() {
		return Result{}, lastAdmin("user " + quote(u.Name))
	}
	return Result{Object: u.ID}, nil
}

// SetGroup makes a group or changes the roles of the one with this id.
type SetGroup struct {
	ID     uuid.UUID `json:"id"`
	Rev    uint64    `json:"rev,omitempty"`
	Create bool      `json:"create,omitempty"`
	Name   string    `json:"name,omitempty"`
	Roles  []string  `json:"roles"`
}

func (*SetGroup) kind() (string, int) { return "set_group", 1 }

func (c *SetGroup) check() error {
	if c.ID == uuid.Nil {
		return invalid("group "+quote(c.Name), "no id")
	}
	if c.Create {
		if err := checkLabel("group", c.Name); err != nil {
			return err
		}
	}
	return checkRoles("group "+quote(c.Name), c.Roles)
}

func (c *SetGroup) apply(t *tx) (Result, error) {
	g, err := t.Group(c.ID)
	switch {
	case c.Create:
		if _, taken := t.GroupByName(c.Name); err == nil || taken == nil {
			return Result{}, &Error{Err: ErrExist, Object: "group " + quote(c.Name)}
		}
		if n := count[Group](&t.View, tGroup, byID, nil); n >= GroupsMax {
			return Result{}, &Error{Err: ErrNoSpace, Object: "groups", Detail: fmt.Sprintf("there are %d", n)}
		}
		g = Group{ID: c.ID, Name: c.Name, Created: t.at}
	case err != nil:
		return Result{}, err
	default:
		if err := fresh("group "+quote(g.Name), c.Rev, g.Rev); err != nil {
			return Result{}, err
		}
	}
	had := t.hasAdmin()
	g.Roles, g.Rev = slices.Clone(c.Roles), t.index
	t.put(tGroup, &g)
	if c.Create {
		return Result{Object: g.ID}, nil
	}
	if had && !t.hasAdmin() {
		return Result{}, lastAdmin("group " + quote(g.Name))
	}
	for _, u := range t.Users() {
		if slices.Contains(u.Groups, g.ID) {
			t.endSessions(u.ID)
		}
	}
	return Result{Object: g.ID}, nil
}

// DeleteGroup takes a group without members away.
type DeleteGroup struct {
	ID  uuid.UUID `json:"id"`
	Rev uint64    `json:"rev,omitempty"`
}

func (*DeleteGroup) kind() (string, int) { return "delete_group", 1 }

func (c *DeleteGroup) check() error { return nil }

func (c *DeleteGroup) apply(t *tx) (Result, error) {
	g, err := t.Group(c.ID)
	if err != nil {
		return Result{}, err
	}
	if err := fresh("group "+quote(g.Name), c.Rev, g.Rev); err != nil {
		return Result{}, err
	}
	if err := t.free(Ref{"group", g.ID}, "group "+quote(g.Name)); err != nil {
		return Result{}, err
	}
	t.del(tGroup, &g)
	return Result{Object: g.ID}, nil
}

// CreateAPIClient makes an API client.
type CreateAPIClient struct {
	ID       uuid.UUID `json:"id"`
	Name     string    `json:"name"`
	Hash     []byte    `json:"hash"`
	Roles    []string  `json:"roles"`
	VPools   []string  `json:"vpools,omitempty"`
	Networks []string  `json:"networks,omitempty"`
}

func (*CreateAPIClient) kind() (string, int) { return "create_api_client", 1 }

func (c *CreateAPIClient) check() error {
	object := "client " + quote(c.Name)
	if c.ID == uuid.Nil || len(c.Hash) != len(Secret{}) {
		return invalid(object, "no id or hash")
	}
	if len(c.Roles) == 0 {
		return invalid(object, "no role")
	}
	if err := checkRoles(object, c.Roles); err != nil {
		return err
	}
	if err := checkScope(object, c.VPools, c.Networks); err != nil {
		return err
	}
	return checkLabel("client", c.Name)
}

func (c *CreateAPIClient) apply(t *tx) (Result, error) {
	_, byID := t.APIClient(c.ID)
	_, byName := t.APIClientByName(c.Name)
	if byID == nil || byName == nil {
		return Result{}, &Error{Err: ErrExist, Object: "client " + quote(c.Name)}
	}
	if n := len(t.APIClients()); n >= APIClientsMax {
		return Result{}, &Error{Err: ErrNoSpace, Object: "clients", Detail: fmt.Sprintf("there are %d", n)}
	}
	a := &APIClient{ID: c.ID, Name: c.Name, Roles: slices.Clone(c.Roles), VPools: slices.Clone(c.VPools),
		Networks: slices.Clone(c.Networks), Created: t.at, Rev: t.index}
	copy(a.Hash[:], c.Hash)
	t.put(tAPIClient, a)
	return Result{Object: a.ID}, nil
}

// DeleteAPIClient takes an API client away with its tokens.
type DeleteAPIClient struct {
	ID  uuid.UUID `json:"id"`
	Rev uint64    `json:"rev,omitempty"`
}

func (*DeleteAPIClient) kind() (string, int) { return "delete_api_client", 1 }

func (c *DeleteAPIClient) check() error { return nil }

func (c *DeleteAPIClient) apply(t *tx) (Result, error) {
	a, err := t.APIClient(c.ID)
	if err != nil {
		return Result{}, err
	}
	if err := fresh("client "+quote(a.Name), c.Rev, a.Rev); err != nil {
		return Result{}, err
	}
	t.dropTokens(a.ID)
	t.del(tAPIClient, &a)
	return Result{Object: a.ID}, nil
}

// SetToken makes a token. One of that name is replaced unless New is set.
type SetToken struct {
	Name     string    `json:"name"`
	Hash     []byte    `json:"hash"`
	Role     string    `json:"role"`
	ID       uuid.UUID `json:"id,omitzero"`
	New      bool      `json:"new,omitempty"`
	Kind     string    `json:"kind,omitempty"`
	Owner    uuid.UUID `json:"owner,omitzero"`
	Roles    []string  `json:"roles,omitempty"`
	VPools   []string  `json:"vpools,omitempty"`
	Networks []string  `json:"networks,omitempty"`
	Expires  Time      `json:"expires,omitempty"`
}

func (*SetToken) kind() (string, int) { return "set_token", 1 }

func (c *SetToken) check() error {
	object := "token " + quote(c.Name)
	if len(c.Hash) != len(Secret{}) || (c.Role == RoleAdmin) == (len(c.Roles) > 0) || c.Role != "" && c.Role != RoleAdmin {
		return invalid(object, "no hash or unknown role "+quote(c.Role))
	}
	if c.Kind != "" && c.Kind != TokenAPI && c.Kind != TokenOAuth {
		return invalid(object, "kind "+quote(c.Kind))
	}
	if err := checkRoles(object, c.Roles); err != nil {
		return err
	}
	if err := checkScope(object, c.VPools, c.Networks); err != nil {
		return err
	}
	return checkLabel("token", c.Name)
}

func (c *SetToken) apply(t *tx) (Result, error) {
	t.sweepTokens()
	if _, err := t.Token(c.Name); err == nil && c.New {
		return Result{}, &Error{Err: ErrExist, Object: "token " + quote(c.Name)}
	}
	if c.Owner != uuid.Nil {
		_, user := t.User(c.Owner)
		_, client := t.APIClient(c.Owner)
		if user != nil && client != nil {
			return Result{}, missing("owner of token " + quote(c.Name))
		}
		if n := count[Token](&t.View, tToken, byOwner, c.Owner[:]); n >= TokensEachMax {
			return Result{}, &Error{Err: ErrNoSpace, Object: "token " + quote(c.Name), Detail: fmt.Sprintf("its owner has %d tokens", n),
				Remedy: "revoke some, or wait until some have expired"}
		}
	}
	if n := count[Token](&t.View, tToken, byID, nil); n >= TokensMax {
		return Result{}, &Error{Err: ErrNoSpace, Object: "tokens", Detail: fmt.Sprintf("there are %d", n)}
	}
	tok := &Token{Name: c.Name, ID: c.ID, Role: c.Role, Kind: c.Kind, Owner: c.Owner, Roles: slices.Clone(c.Roles),
		VPools: slices.Clone(c.VPools), Networks: slices.Clone(c.Networks), Expires: c.Expires, Created: t.at, Rev: t.index}
	copy(tok.Hash[:], c.Hash)
	t.put(tToken, tok)
	return Result{Object: c.ID}, nil
}

// sweepTokens takes some expired tokens away.
func (t *tx) sweepTokens() {
	var expired []*Token
	rows(&t.View, tToken, byID, nil, func(k *Token) bool {
		if k.Expires != 0 && k.Expires <= t.at {
			expired = append(expired, k)
		}
		return len(expired) < expiredSweptAtOne
	})
	for _, k := range expired {
		t.del(tToken, k)
	}
}

func (t *tx) dropTokens(owner uuid.UUID) {
	for _, k := range all[Token](&t.View, tToken, byOwner, owner[:]) {
		t.del(tToken, &k)
	}
}

// DeleteToken revokes a token.
type DeleteToken struct {
	Name string `json:"name"`
	Rev  uint64 `json:"rev,omitempty"`
}

func (*DeleteToken) kind() (string, int) { return "delete_token", 1 }

func (c *DeleteToken) check() error { return nil }

func (c *DeleteToken) apply(t *tx) (Result, error) {
	tok, err := t.Token(c.Name)
	if err != nil {
		return Result{}, err
	}
	if err := fresh("token "+quote(c.Name), c.Rev, tok.Rev); err != nil {
		return Result{}, err
	}
	t.del(tToken, &tok)
	return Result{Object: tok.ID}, nil
}

// CreateSession signs a user in. TOTPStep, where a second factor was used, must be later than the last one: a code works once.
type CreateSession struct {
	ID       uuid.UUID `json:"id"`
	User     uuid.UUID `json:"user"`
	UserRev  uint64    `json:"user_rev"`
	Hash     []byte    `json:"hash"`
	TOTPStep int64     `json:"totp_step,omitempty"`
	Lasts    Time      `json:"lasts"`
	Idle     Time      `json:"idle"`
	From     string    `json:"from,omitempty"`
	// Rehash, unless empty, is the password's hash by today's parameters.
	Rehash string `json:"rehash,omitempty"`
}

func (*CreateSession) kind() (string, int) { return "create_session", 1 }

func (c *CreateSession) check() error {
	if c.ID == uuid.Nil || len(c.Hash) != len(Secret{}) || c.Lasts <= 0 || c.Idle <= 0 ||
		len(c.From) > NameBytesMax || len(c.Rehash) > phcBytesMax {
		return invalid("session", "not whole")
	}
	return nil
}

func (c *CreateSession) apply(t *tx) (Result, error) {
	u, err := t.User(c.User)
	if err != nil {
		return Result{}, err
	}
	// The password was checked against the user as it was at UserRev.
	if u.Rev != c.UserRev || u.Disabled {
		return Result{}, stale("user "+quote(u.Name), u.Rev)
	}
	if c.TOTPStep != 0 && c.TOTPStep <= u.TOTPStep {
		return Result{}, &Error{Err: ErrConflict, Object: "user " + quote(u.Name), Detail: "the code was used before"}
	}
	if c.TOTPStep != 0 || c.Rehash != "" {
		u.TOTPStep = max(u.TOTPStep, c.TOTPStep)
		if c.Rehash != "" {
			u.Password = SecretText(c.Rehash)
		}
		u.Rev = t.index
		t.put(tUser, &u)
	}
	t.sweepSessions()
	have := all[Session](&t.View, tSession, byOwner, u.ID[:])
	if len(have) >= SessionsEachMax {
		oldest := slices.MinFunc(have, func(a, b Session) int { return int(a.Created - b.Created) })
		t.del(tSession, &oldest)
	}
	if n := count[Session](&t.View, tSession, byID, nil); n >= SessionsMax {
		return Result{}, &Error{Err: ErrNoSpace, Object: "sessions", Detail: fmt.Sprintf("there are %d", n)}
	}
	s := &Session{ID: c.ID, User: u.ID, Until: t.at + c.Lasts, Idle: t.at + c.Idle, From: c.From, Created: t.at, Rev: t.index}
	copy(s.Hash[:], c.Hash)
	t.put(tSession, s)
	return Result{Object: s.ID}, nil
}

func (t *tx) sweepSessions() {
	var ended []*Session
	rows(&t.View, tSession, byID, nil, func(s *Session) bool {
		if s.Until <= t.at || s.Idle <= t.at {
			ended = append(ended, s)
		}
		return len(ended) < expiredSweptAtOne
	})
	for _, s := range ended {
		t.del(tSession, s)
	}
}

func (t *tx) endSessions(user uuid.UUID) {
	for _, s := range all[Session](&t.View, tSession, byOwner, user[:]) {
		t.del(tSession, &s)
	}
}

// TouchSession puts the end of an idle session off.
type TouchSession struct {
	ID   uuid.UUID `json:"id"`
	Idle Time      `json:"idle"`
}

func (*TouchSession) kind() (string, int) { return "touch_session", 1 }

func (c *TouchSession) check() error { return nil }

func (c *TouchSession) apply(t *tx) (Result, error) {
	s, err := t.Session(c.ID)
	if err != nil {
		return Result{}, err
	}
	s.Idle, s.Rev = max(s.Idle, t.at+c.Idle), t.index
	t.put(tSession, &s)
	return Result{Object: s.ID}, nil
}

// EndSession signs out: one session, or with User all of that user's.
type EndSession struct {
	ID   uuid.UUID `json:"id,omitzero"`
	User uuid.UUID `json:"user,omitzero"`
}

func (*EndSession) kind() (string, int) { return "end_session", 1 }

func (c *EndSession) check() error { return nil }

func (c *EndSession) apply(t *tx) (Result, error) {
	if c.User != uuid.Nil {
		t.endSessions(c.User)
	}
	if c.ID != uuid.Nil {
		s, err := t.Session(c.ID)
		if err != nil {
			return Result{}, err
		}
		t.del(tSession, &s)
	}
	return Result{Object: c.ID}, nil
}

// User returns one user.
func (v *View) User(id uuid.UUID) (User, error) {
	u, ok := first[User](v, tUser, byID, id[:])
	if !ok {
		return User{}, missing("user " + id.String())
	}
	return *u, nil
}

// UserByName returns the user of this name.
func (v *View) UserByName(name string) (User, error) {
	u, ok := first[User](v, tUser, byName, []byte(name))
	if !ok {
		return User{}, missing("user " + quote(name))
	}
	return *u, nil
}

// Users returns all users, by name.
func (v *View) Users() []User { return all[User](v, tUser, byName, nil) }

// Group returns one group.
func (v *View) Group(id uuid.UUID) (Group, error) {
	g, ok := first[Group](v, tGroup, byID, id[:])
	if !ok {
		return Group{}, missing("group " + id.String())
	}
	return *g, nil
}

// GroupByName returns the group of this name.
func (v *View) GroupByName(name string) (Group, error) {
	g, ok := first[Group](v, tGroup, byName, []byte(name))
	if !ok {
		return Group{}, missing("group " + quote(name))
	}
	return *g, nil
}

// Groups returns all groups, by name.
func (v *View) Groups() []Group { return all[Group](v, tGroup, byName, nil) }

// APIClient returns one API client.
func (v *View) APIClient(id uuid.UUID) (APIClient, error) {
	c, ok := first[APIClient](v, tAPIClient, byID, id[:])
	if !ok {
		return APIClient{}, missing("client " + id.String())
	}
	return *c, nil
}

// APIClientByName returns the API client of this name.
func (v *View) APIClientByName(name string) (APIClient, error) {
	c, ok := first[APIClient](v, tAPIClient, byName, []byte(name))
	if !ok {
		return APIClient{}, missing("client " + quote(name))
	}
	return *c, nil
}

// APIClients returns all API clients, by name.
func (v *View) APIClients() []APIClient { return all[APIClient](v, tAPIClient, byName, nil) }

// TokenByHash returns the token with this SHA-256.
func (v *View) TokenByHash(hash [32]byte) (Token, bool) {
	t, ok := first[Token](v, tToken, byHash, hash[:])
	if !ok {
		return Token{}, false
	}
	return *t, true
}

// Session returns a session by its id.
func (v *View) Session(id uuid.UUID) (Session, error) {
	s, ok := first[Session](v, tSession, byID, id[:])
	if !ok {
		return Session{}, missing("session " + id.String())
	}
	return *s, nil
}

// SessionByHash returns the session whose cookie has this SHA-256.
func (v *View) SessionByHash(hash [32]byte) (Session, bool) {
	s, ok := first[Session](v, tSession, byHash, hash[:])
	if !ok {
		return Session{}, false
	}
	return *s, true
}

// SessionsOf returns a user's sessions.
func (v *View) SessionsOf(user uuid.UUID) []Session {
	return all[Session](v, tSession, byOwner, user[:])
}

type tokenRow struct {
	Token
	Hash []byte `json:"hash"`
}

func ownerKey(owner uuid.UUID, tail string) []byte {
	return append(owner[:len(owner):len(owner)], tail...)
}

func tokenTable(frame byte) object {
	o := secretObject(frame, tToken, map[string]index{
		byID:    always(func(t *Token) []byte { return []byte(t.Name) }),
		byHash:  always(func(t *Token) []byte { return t.Hash[:] }),
		byOwner: always(func(t *Token) []byte { return ownerKey(t.Owner, t.Name) }),
	},
		func(t Token) tokenRow { return tokenRow{Token: t, Hash: t.Hash[:]} },
		func(r tokenRow) Token { copy(r.Token.Hash[:], r.Hash); return r.Token })
	o.commands = []func() Command{command[SetToken], command[DeleteToken]}
	return o
}

type userRow struct {
	User
	Password string `json:"password"`
	TOTP     string `json:"totp,omitempty"`
}

func userTable(frame byte) object {
	o := secretObject(frame, tUser, map[string]index{
		byID:   always(func(u *User) []byte { return u.ID[:] }),
		byName: always(func(u *User) []byte { return []byte(u.Name) }),
	},
		func(u User) userRow { return userRow{User: u, Password: string(u.Password), TOTP: string(u.TOTP)} },
		func(r userRow) User {
			r.User.Password, r.User.TOTP = SecretText(r.Password), SecretText(r.TOTP)
			return r.User
		})
	o.commands = []func() Command{command[SetUser], command[DeleteUser]}
	o.points = func(v *View, at Ref, by func(string)) {
		if at.Kind != "group" {
			return
		}
		for _, u := range v.Users() {
			if slices.Contains(u.Groups, at.ID) {
				by("user " + u.Name)
			}
		}
	}
	return o
}

func groupTable(frame byte) object {
	o := rowObject[Group](frame, tGroup, map[string]index{
		byID:   always(func(g *Group) []byte { return g.ID[:] }),
		byName: always(func(g *Group) []byte { return []byte(g.Name) }),
	})
	o.commands = []func() Command{command[SetGroup], command[DeleteGroup]}
	return o
}

type apiClientRow struct {
	APIClient
	Hash []byte `json:"hash"`
}

func apiClientTable(frame byte) object {
	o := secretObject(frame, tAPIClient, map[string]index{
		byID:   always(func(c *APIClient) []byte { return c.ID[:] }),
		byName: always(func(c *APIClient) []byte { return []byte(c.Name) }),
	},
		func(c APIClient) apiClientRow { return apiClientRow{APIClient: c, Hash: c.Hash[:]} },
		func(r apiClientRow) APIClient { copy(r.APIClient.Hash[:], r.Hash); return r.APIClient })
	o.commands = []func() Command{command[CreateAPIClient], command[DeleteAPIClient]}
	return o
}

type sessionRow struct {
	Session
	Hash []byte `json:"hash"`
}

func sessionTable(frame byte) object {
	o := secretObject(frame, tSession, map[string]index{
		byID:    always(func(s *Session) []byte { return s.ID[:] }),
		byHash:  always(func(s *Session) []byte { return s.Hash[:] }),
		byOwner: always(func(s *Session) []byte { return ownerKey(s.User, string(s.ID[:])) }),
	},
		func(s Session) sessionRow { return sessionRow{Session: s, Hash: s.Hash[:]} },
		func(r sessionRow) Session { copy(r.Session.Hash[:], r.Hash); return r.Session })
	o.commands = []func() Command{command[CreateSession], command[TouchSession], command[EndSession]}
	return o
}
