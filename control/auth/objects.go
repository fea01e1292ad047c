package auth

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"varve/control/state"
)

// NewUser is a user to make. Groups are names.
type NewUser struct {
	Name, FullName, Password string
	Roles, Groups            []string
}

// CheckNewUser refuses what CreateUser would.
func (a *Authenticator) CheckNewUser(by Principal, n NewUser) error {
	if _, err := a.cfg.Store.View().UserByName(n.Name); err == nil {
		return &state.Error{Err: state.ErrExist, Object: "user " + n.Name}
	}
	if _, err := a.groupIDs(by, n.Groups); err != nil {
		return err
	}
	if err := mayGrant(by, n.Roles); err != nil {
		return err
	}
	return weak(n.Name, n.Password)
}

func weak(name, password string) error {
	if err := CheckPassword(name, password); err != nil {
		return &state.Error{Err: state.ErrInvalid, Object: "user " + clip(name, 63), Field: "password", Detail: err.Error(),
			Remedy: "use a longer one, such as four random words"}
	}
	return nil
}

// mayGrant keeps anybody from giving more than it has: a security administrator makes no administrator.
func mayGrant(by Principal, roles []string) error {
	for _, r := range roles {
		if !MayGrant(by.Roles, r) && slices.Contains(state.Roles(), r) && r != state.RoleViewer && r != state.RoleOperator &&
			r != state.RoleStorageAdmin || r == state.RoleAdmin && !by.Has(state.RoleAdmin) {
			return fmt.Errorf("%w: only an administrator gives the role %s", ErrForbidden, r)
		}
	}
	return nil
}

// CreateUser makes a user with a password.
func (a *Authenticator) CreateUser(ctx context.Context, by Principal, n NewUser) (state.User, error) {
	if err := a.CheckNewUser(by, n); err != nil {
		return state.User{}, err
	}
	return a.createUser(ctx, n, false)
}

func (a *Authenticator) createUser(ctx context.Context, n NewUser, first bool) (state.User, error) {
	if err := weak(n.Name, n.Password); err != nil {
		return state.User{}, err
	}
	groups, err := a.groupIDs(Local("set-up"), n.Groups)
	if err != nil {
		return state.User{}, err
	}
	phc, err := a.hasher.hash(ctx, n.Password)
	if err != nil {
		return state.User{}, err
	}
	cmd := &state.SetUser{ID: uuid.New(), Create: true, First: first, Name: n.Name, Source: state.SourcePassword, FullName: &n.FullName,
		Roles: &n.Roles, Groups: &groups, Password: &phc}
	if n.Roles == nil {
		cmd.Roles = &[]string{}
	}
	if _, err := a.cfg.Raft.Apply(ctx, cmd); err != nil {
		return state.User{}, err
	}
	a.cfg.Log.Info("user created", "user", n.Name)
	return a.cfg.Store.View().User(cmd.ID)
}

func (a *Authenticator) groupIDs(by Principal, names []string) ([]uuid.UUID, error) {
	ids := make([]uuid.UUID, 0, len(names))
	for _, n := range names {
		g, err := a.Group(n)
		if err != nil {
			return nil, err
		}
		if err := mayGrant(by, g.Roles); err != nil {
			return nil, err
		}
		if !slices.Contains(ids, g.ID) {
			ids = append(ids, g.ID)
		}
	}
	return ids, nil
}

// UserEdit is a change of a user; nil leaves a field as it is.
type UserEdit struct {
	Rev           uint64
	FullName      *string
	Password      *string
	Roles, Groups *[]string
	Disabled      *bool
	ResetTOTP     bool
}

// EditUser changes a user, which ends its sessions where that matters. Nobody but an administrator changes an administrator.
func (a *Authenticator) EditUser(ctx context.Context, by Principal, name string, e UserEdit) (state.User, error) {
	u, err := a.User(name)
	if err != nil {
		return u, err
	}
	if err := a.mayEdit(by, u); err != nil {
		return u, err
	}
	cmd := &state.SetUser{ID: u.ID, Rev: e.Rev, FullName: e.FullName, Roles: e.Roles, Disabled: e.Disabled}
	if e.Roles != nil {
		if err := mayGrant(by, *e.Roles); err != nil {
			return u, err
		}
	}
	if e.Groups != nil {
		ids, err := a.groupIDs(by, *e.Groups)
		if err != nil {
			return u, err
		}
		cmd.Groups = &ids
	}
	if e.Password != nil {
		if u.Source != state.SourcePassword {
			return u, &state.Error{Err: state.ErrInvalid, Object: "user " + u.Name, Detail: "signs in elsewhere, it has no password here"}
		}
		if err := weak(u.Name, *e.Password); err != nil {
			return u, err
		}
		phc, err := a.hasher.hash(ctx, *e.Password)
		if err != nil {
			return u, err
		}
		cmd.Password = &phc
	}
	if e.ResetTOTP {
		cmd.TOTP = new(string)
	}
	if _, err := a.cfg.Raft.Apply(ctx, cmd); err != nil {
		return u, err
	}
	a.cfg.Log.Info("user changed", "user", u.Name)
	return a.cfg.Store.View().User(u.ID)
}

func (a *Authenticator) mayEdit(by Principal, u state.User) error {
	if slices.Contains(a.cfg.Store.View().RolesOf(u), state.RoleAdmin) && !by.Has(state.RoleAdmin) {
		return fmt.Errorf("%w: only an administrator changes an administrator", ErrForbidden)
	}
	return nil
}

// ChangePassword changes the caller's own, which it must know. All its sessions end.
func (a *Authenticator) ChangePassword(ctx context.Context, p Principal, old, password, from string) error {
	if p.Kind != KindUser {
		return fmt.Errorf("%w: only a user has a password", ErrForbidden)
	}
	u, err := a.cfg.Store.View().User(p.ID)
	if err != nil {
		return err
	}
	if w := a.backoff.wait(u.Name, from); w > 0 {
		return &WaitError{w}
	}
	right, _, err := a.hasher.verify(ctx, string(u.Password), old)
	if err != nil {
		return err
	}
	if !right {
		a.backoff.failed(u.Name, from)
		return fmt.Errorf("%w: the old password is wrong", ErrForbidden)
	}
	if err := weak(u.Name, password); err != nil {
		return err
	}
	phc, err := a.hasher.hash(ctx, password)
	if err != nil {
		return err
	}
	_, err = a.cfg.Raft.Apply(ctx, &state.SetUser{ID: u.ID, Rev: u.Rev, Password: &phc})
	return err
}

// DeleteUser takes a user away with its tokens and sessions.
func (a *Authenticator) DeleteUser(ctx context.Context, by Principal, name string, rev uint64) error {
	u, err := a.User(name)
	if err != nil {
		return err
	}
	if err := a.mayEdit(by, u); err != nil {
		return err
	}
	_, err = a.cfg.Raft.Apply(ctx, &state.DeleteUser{ID: u.ID, Rev: rev})
	return err
}

// User finds one by name or id.
func (a *Authenticator) User(name string) (state.User, error) {
	view := a.cfg.Store.View()
	if id, err := uuid.Parse(name); err == nil {
		return view.User(id)
	}
	return view.UserByName(name)
}

// Group finds one by name or id.
func (a *Authenticator) Group(name string) (state.Group, error) {
	view := a.cfg.Store.View()
	if id, err := uuid.Parse(name); err == nil {
		return view.Group(id)
	}
	return view.GroupByName(name)
}

// CreateGroup makes a group.
func (a *Authenticator) CreateGroup(ctx context.Context, by Principal, name string, roles []string) (state.Group, error) {
	if err := mayGrant(by, roles); err != nil {
		return state.Group{}, err
	}
	cmd := &state.SetGroup{ID: uuid.New(), Create: true, Name: name, Roles: roles}
	if _, err := a.cfg.Raft.Apply(ctx, cmd); err != nil {
		return state.Group{}, err
	}
	return a.cfg.Store.View().Group(cmd.ID)
}

// EditGroup changes a group's roles.
func (a *Authenticator) EditGroup(ctx context.Context, by Principal, name string, rev uint64, roles []string) (state.Group, error) {
	g, err := a.Group(name)
	if err != nil {
		return g, err
	}
	if err := errors.Join(mayGrant(by, roles), mayGrant(by, g.Roles)); err != nil {
		return g, err
	}
	if _, err := a.cfg.Raft.Apply(ctx, &state.SetGroup{ID: g.ID, Rev: rev, Roles: roles}); err != nil {
		return g, err
	}
	return a.cfg.Store.View().Group(g.ID)
}

// DeleteGroup takes a group without members away.
func (a *Authenticator) DeleteGroup(ctx context.Context, name string, rev uint64) error {
	g, err := a.Group(name)
	if err != nil {
		return err
	}
	_, err = a.cfg.Raft.Apply(ctx, &state.DeleteGroup{ID: g.ID, Rev: rev})
	return err
}

// Client finds an API client by name or id.
func (a *Authenticator) Client(name string) (state.APIClient, error) {
	view := a.cfg.Store.View()
	if id, err := uuid.Parse(name); err == nil {
		return view.APIClient(id)
	}
	return view.APIClientByName(name)
}

// NewClient is an API client to make.
type NewClient struct {
	Name                    string
	Roles, VPools, Networks []string
}

// CreateClient makes an API client. The secret is told this once.
func (a *Authenticator) CreateClient(ctx context.Context, by Principal, n NewClient) (c state.APIClient, secret string, err error) {
	if err := mayGrant(by, n.Roles); err != nil {
		return c, "", err
	}
	secret = newSecret()
	hash := sha256.Sum256([]byte(secret))
	cmd := &state.CreateAPIClient{ID: uuid.New(), Name: n.Name, Hash: hash[:], Roles: n.Roles, VPools: n.VPools, Networks: n.Networks}
	if _, err := a.cfg.Raft.Apply(ctx, cmd); err != nil {
		return c, "", err
	}
	a.cfg.Log.Info("api client created", "client", n.Name)
	c, err = a.cfg.Store.View().APIClient(cmd.ID)
	return c, secret, err
}

// DeleteClient takes an API client away with its tokens.
func (a *Authenticator) DeleteClient(ctx context.Context, name string, rev uint64) error {
	c, err := a.Client(name)
	if err != nil {
		return err
	}
	_, err = a.cfg.Raft.Apply(ctx, &state.DeleteAPIClient{ID: c.ID, Rev: rev})
	return err
}

// NewToken is an API token to make. Roles nil are all of the caller's, Lasts 0 is TokenLasts.
type NewToken struct {
	Name                    string
	Roles, VPools, Networks []string
	Lasts                   time.Duration
}

// CheckNewToken refuses what CreateToken would, and fills in what was left out.
func (a *Authenticator) CheckNewToken(by Principal, n NewToken) (NewToken, error) {
	if n.Roles == nil {
		n.Roles = by.Roles
	}
	if len(n.Roles) == 0 {
		return n, fmt.Errorf("%w: the caller has no role to hand on", ErrForbidden)
	}
	for _, r := range n.Roles {
		if slices.Contains(state.Roles(), r) && !MayGrant(by.Roles, r) {
			return n, fmt.Errorf("%w: the caller does not have the role %s", ErrForbidden, r)
		}
	}
	if by.VPools != nil {
		if n.VPools == nil {
			n.VPools = by.VPools
		}
		for _, p := range n.VPools {
			if !by.Sees(p) {
				return n, fmt.Errorf("%w: the caller is bound to other vPools", ErrForbidden)
			}
		}
	}
	if n.Lasts == 0 {
		n.Lasts = TokenLasts
	}
	if n.Lasts < time.Minute || n.Lasts > TokenLastsMax {
		return n, &state.Error{Err: state.ErrInvalid, Object: "token " + clip(n.Name, 63), Detail: "lasts " + n.Lasts.String(),
			Remedy: "use a minute to 366 days"}
	}
	if _, err := a.cfg.Store.View().Token(n.Name); err == nil {
		return n, &state.Error{Err: state.ErrExist, Object: "token " + n.Name}
	}
	return n, nil
}

// CreateToken makes a token that stands for the caller. The secret is told this once.
func (a *Authenticator) CreateToken(ctx context.Context, by Principal, n NewToken) (t state.Token, secret string, err error) {
	if n, err = a.CheckNewToken(by, n); err != nil {
		return t, "", err
	}
	expires := a.cfg.Now().Add(n.Lasts)
	if by.Kind == KindClient || by.Kind == KindUser && by.Token != "" {
		// What comes in by a token cannot outlive it.
		if !by.Expires.IsZero() && expires.After(by.Expires) {
			expires = by.Expires
		}
	}
	secret = newSecret()
	hash := sha256.Sum256([]byte(secret))
	_, err = a.cfg.Raft.Apply(ctx, &state.SetToken{Name: n.Name, ID: uuid.New(), New: true, Hash: hash[:], Kind: state.TokenAPI, Owner: by.ID,
		Roles: n.Roles, VPools: n.VPools, Networks: n.Networks, Expires: state.Time(expires.UnixNano())})
	if err != nil {
		return t, "", err
	}
	t, err = a.cfg.Store.View().Token(n.Name)
	return t, secret, err
}

// Tokens are those that the caller may see: its own, or all for a security administrator.
func (a *Authenticator) Tokens(by Principal) []state.Token {
	var out []state.Token
	for _, t := range a.cfg.Store.View().Tokens() {
		if mayToken(by, t) {
			out = append(out, t)
		}
	}
	return out
}

func mayToken(by Principal, t state.Token) bool {
	return by.Has(state.RoleSecurityAdmin) || by.ID != uuid.Nil && t.Owner == by.ID
}

// Token finds one that the caller may see, by name or id.
func (a *Authenticator) Token(by Principal, name string) (state.Token, error) {
	for _, t := range a.Tokens(by) {
		if t.Name == name || t.ID != uuid.Nil && t.ID.String() == name {
			return t, nil
		}
	}
	return state.Token{}, &state.Error{Err: state.ErrNotFound, Object: "token " + clip(name, 63)}
}

// DeleteToken revokes one that the caller may see. The appliance's own are for administrators.
func (a *Authenticator) DeleteToken(ctx context.Context, by Principal, name string, rev uint64) error {
	t, err := a.Token(by, name)
	if err != nil {
		return err
	}
	if t.Owner == uuid.Nil && !by.Has(state.RoleAdmin) {
		return fmt.Errorf("%w: only an administrator revokes the appliance's own token", ErrForbidden)
	}
	_, err = a.cfg.Raft.Apply(ctx, &state.DeleteToken{Name: t.Name, Rev: rev})
	return err
}

// OwnerName names the owner of a token for people.
func (a *Authenticator) OwnerName(t state.Token) string {
	view := a.cfg.Store.View()
	if t.Owner == uuid.Nil {
		return KindLocal
	}
	if u, err := view.User(t.Owner); err == nil {
		return KindUser + "/" + u.Name
	}
	if c, err := view.APIClient(t.Owner); err == nil {
		return KindClient + "/" + c.Name
	}
	return t.Owner.String()
}

// totpOn marks a user whose key is in the vault.
const totpOn = "vault"

func totpName(user uuid.UUID) string    { return "totp/" + user.String() }
func totpPending(user uuid.UUID) string { return "totp-pending/" + user.String() }

func (a *Authenticator) secondFactor(p Principal) error {
	if p.Kind != KindUser || p.Session == uuid.Nil {
		return fmt.Errorf("%w: sign in with a password for this", ErrForbidden)
	}
	if a.cfg.Vault == nil {
		return fmt.Errorf("%w: this appliance cannot keep secrets", ErrForbidden)
	}
	return nil
}

// EnrolTOTP makes a key for a second factor, which is not active before ConfirmTOTP has seen a code of it. uri is for the
// authenticator app.
func (a *Authenticator) EnrolTOTP(ctx context.Context, p Principal, issuer string) (uri string, err error) {
	if err := a.secondFactor(p); err != nil {
		return "", err
	}
	key := newTOTPKey()
	if err := a.cfg.Vault.Set(ctx, totpPending(p.ID), key); err != nil {
		return "", err
	}
	return totpURI(key, p.Name, issuer), nil
}

func (a *Authenticator) openTOTP(u state.User) ([]byte, error) {
	if a.cfg.Vault == nil {
		return nil, fmt.Errorf("open the second factor of user %s: %w", u.Name, ErrForbidden)
	}
	key, err := a.cfg.Vault.Get(totpName(u.ID))
	if err != nil {
		return nil, fmt.Errorf("open the second factor of user %s: %w", u.Name, err)
	}
	return key, nil
}

// ConfirmTOTP turns the second factor on. All the user's sessions end.
func (a *Authenticator) ConfirmTOTP(ctx context.Context, p Principal, code string) error {
	if err := a.secondFactor(p); err != nil {
		return err
	}
	key, err := a.cfg.Vault.Get(totpPending(p.ID))
	if errors.Is(err, state.ErrNotFound) {
		return &state.Error{Err: state.ErrConflict, Object: "second factor", Detail: "none has been made for this user", Remedy: "make one first"}
	}
	if err != nil {
		return err
	}
	if totpMatch(key, code, a.cfg.Now(), 0) == 0 {
		return &state.Error{Err: state.ErrInvalid, Object: "second factor", Detail: "the code is wrong",
			Remedy: "check the clock of the device that shows it"}
	}
	if err := a.cfg.Vault.Set(ctx, totpName(p.ID), key); err != nil {
		return err
	}
	on := totpOn
	if _, err := a.cfg.Raft.Apply(ctx, &state.SetUser{ID: p.ID, TOTP: &on}); err != nil {
		return err
	}
	return a.cfg.Vault.Delete(ctx, totpPending(p.ID))
}

// RemoveTOTP turns the user's own second factor off, with a code of it, under the back-off of sign-ins. All the user's sessions end.
func (a *Authenticator) RemoveTOTP(ctx context.Context, p Principal, code, from string) error {
	if err := a.secondFactor(p); err != nil {
		return err
	}
	u, err := a.cfg.Store.View().User(p.ID)
	if err != nil {
		return err
	}
	if u.TOTP == "" {
		return &state.Error{Err: state.ErrConflict, Object: "second factor", Detail: "is off already"}
	}
	if w := a.backoff.wait(u.Name, from); w > 0 {
		return &WaitError{w}
	}
	key, err := a.openTOTP(u)
	if err != nil {
		return err
	}
	if totpMatch(key, code, a.cfg.Now(), u.TOTPStep) == 0 {
		a.backoff.failed(u.Name, from)
		return &state.Error{Err: state.ErrInvalid, Object: "second factor", Detail: "the code is wrong, or was used to sign in",
			Remedy: "wait for the next code"}
	}
	a.backoff.succeeded(u.Name, from)
	if _, err := a.cfg.Raft.Apply(ctx, &state.SetUser{ID: u.ID, Rev: u.Rev, TOTP: new(string)}); err != nil {
		return err
	}
	return a.cfg.Vault.Delete(ctx, totpName(u.ID))
}

// Entry is what Record writes.
type Entry struct {
	Who, Via, From         string
	Action, Object, Result string
	Detail, Request        string
	// Refused entries are what strangers can cause: beyond a rate they are counted only.
	Refused bool
}

// Record appends to the audit log and returns when that is durable.
func (a *Authenticator) Record(ctx context.Context, e Entry) error {
	if e.Refused && !a.refused.AllowN(a.cfg.Now(), 1) {
		a.cfg.Log.Debug("refusal is not in the audit log, there are too many", "who", e.Who, "action", e.Action, "from", e.From)
		return nil
	}
	c := func(s string) string { return clip(s, auditTextBytes) }
	_, err := a.cfg.Raft.Apply(ctx, &state.AppendAudit{Entries: []state.AuditEntry{{Who: c(e.Who), Via: c(e.Via), From: c(e.From),
		Action: c(e.Action), Object: c(e.Object), Result: c(e.Result), Detail: c(e.Detail), Request: c(e.Request)}}})
	if err != nil {
		return fmt.Errorf("write the audit log: %w", err)
	}
	return nil
}
