package auth

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/google/uuid"
	"golang.org/x/oauth2"

	"varve/control/events"
	"varve/control/state"
)

// Sign-in by OpenID Connect: authorization code with PKCE, against one provider.
//
//	StartOIDC     -> where the browser goes, and what it must bring back: state, nonce and verifier, in a cookie for ten minutes
//	FinishOIDC    state compared, code exchanged, ID token verified (signature, issuer, audience, time, nonce), groups -> roles
//
// A user of the provider is told by issuer and subject, never by its name: a local user of the same name is somebody else, and the
// sign-in is refused. Its roles follow from its groups at every sign-in; without any it is refused. Users with passwords sign in as ever.

// OIDCConfig is the provider and what its groups mean here.
type OIDCConfig struct {
	Issuer       string `json:"issuer"`
	ClientID     string `json:"client_id"`
	ClientSecret string `json:"client_secret,omitempty"`
	// RedirectURL is this cluster's, ending in /api/internal/oidc/callback, as the provider knows it.
	RedirectURL string `json:"redirect_url"`
	// CA is the PEM of the only authorities to trust; "" for those of the system.
	CA string `json:"ca,omitempty"`
	// GroupClaim names the claim with the groups; "" is "groups".
	GroupClaim string `json:"group_claim,omitempty"`
	// Groups give roles.
	Groups map[string][]string `json:"groups"`
	// Local allows a provider on this host or its link.
	Local bool `json:"local,omitempty"`
}

const (
	oidcSecret    = "sign-in/oidc"
	oidcTimeout   = 15 * time.Second
	oidcGroupsMax = 256
	oidcAnswerMax = 1 << 20
	oidcFieldMax  = 2048
	oidcCAMax     = 16 << 10
	oidcClaimsMax = 1000
)

// ErrNoOIDC: no provider is set.
var ErrNoOIDC = errors.New("sign-in by OpenID Connect is not set up")

// SetOIDC sets the provider, after it has answered. A secret left out is kept.
func (a *Authenticator) SetOIDC(ctx context.Context, by Principal, c OIDCConfig) error {
	bad := func(detail, remedy string) error {
		return &state.Error{Err: state.ErrInvalid, Object: "sign-in by OpenID Connect", Detail: detail, Remedy: remedy}
	}
	if a.cfg.Vault == nil {
		return fmt.Errorf("%w: this appliance cannot keep secrets", ErrForbidden)
	}
	for _, u := range []string{c.Issuer, c.RedirectURL} {
		p, err := url.Parse(u)
		if err != nil || p.Scheme != "https" || p.Host == "" || p.User != nil || p.Fragment != "" || len(u) > oidcFieldMax {
			return bad("issuer or redirect_url is no https URL", "write https://host/path")
		}
	}
	if c.ClientID == "" || len(c.ClientID) > oidcFieldMax || len(c.ClientSecret) > oidcFieldMax || len(c.GroupClaim) > oidcFieldMax || len(c.CA) > oidcCAMax {
		return bad("client_id is missing, or a field is too long", "")
	}
	if len(c.Groups) == 0 || len(c.Groups) > oidcGroupsMax {
		return bad(fmt.Sprintf("%d groups have roles", len(c.Groups)), "give 1 to 256 groups roles")
	}
	for g, roles := range c.Groups {
		if err := mayGrant(by, roles); err != nil {
			return err
		}
		for _, r := range roles {
			if !slices.Contains(state.Roles(), r) {
				return bad(fmt.Sprintf("group %q has the role %q, which is none", clip(g, 80), clip(r, 80)), "")
			}
		}
	}
	if c.ClientSecret == "" {
		if old, err := a.oidc(); err == nil {
			c.ClientSecret = old.ClientSecret
		}
	}
	ctx, cancel := context.WithTimeout(ctx, oidcTimeout)
	defer cancel()
	if _, _, _, err := c.provider(ctx); err != nil {
		return bad("the provider does not answer as one: "+err.Error(), "see that "+c.Issuer+"/.well-known/openid-configuration can be read from here")
	}
	plain, err := json.Marshal(c)
	if err != nil {
		return err
	}
	defer clear(plain)
	return a.cfg.Vault.Set(ctx, oidcSecret, plain)
}

// OIDC is the provider that is set, without its secret.
func (a *Authenticator) OIDC() (OIDCConfig, error) {
	c, err := a.oidc()
	c.ClientSecret = ""
	return c, err
}

func (a *Authenticator) oidc() (OIDCConfig, error) {
	var c OIDCConfig
	if a.cfg.Vault == nil {
		return c, ErrNoOIDC
	}
	plain, err := a.cfg.Vault.Get(oidcSecret)
	if errors.Is(err, state.ErrNotFound) {
		return c, ErrNoOIDC
	}
	if err != nil {
		return c, err
	}
	defer clear(plain)
	if json.Unmarshal(plain, &c) != nil { // its error may quote what it read
		return c, errors.New("settings of OpenID Connect are not readable")
	}
	return c, nil
}

// UnsetOIDC takes the provider away. Its users' sessions last until they end by themselves.
func (a *Authenticator) UnsetOIDC(ctx context.Context) error {
	if _, err := a.oidc(); err != nil {
		return err
	}
	return a.cfg.Vault.Delete(ctx, oidcSecret)
}

// client reaches the provider: the address is checked where it is dialled, redirects are not followed, answers are bounded.
func (c OIDCConfig) client() (*http.Client, error) {
	t := &http.Transport{DialContext: events.Dialer(c.Local), TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12}, DisableKeepAlives: true,
		ResponseHeaderTimeout: oidcTimeout, MaxResponseHeaderBytes: oidcAnswerMax}
	if c.CA != "" {
		t.TLSClientConfig.RootCAs = x509.NewCertPool()
		if !t.TLSClientConfig.RootCAs.AppendCertsFromPEM([]byte(c.CA)) {
			return nil, errors.New("ca holds no certificate")
		}
	}
	return &http.Client{Transport: t, Timeout: oidcTimeout, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}, nil
}

func (c OIDCConfig) provider(ctx context.Context) (context.Context, *oidc.Provider, *oauth2.Config, error) {
	client, err := c.client()
	if err != nil {
		return ctx, nil, nil, err
	}
	ctx = oidc.ClientContext(ctx, client)
	p, err := oidc.NewProvider(ctx, c.Issuer)
	if err != nil {
		return ctx, nil, nil, err
	}
	return ctx, p, &oauth2.Config{ClientID: c.ClientID, ClientSecret: c.ClientSecret, RedirectURL: c.RedirectURL, Endpoint: p.Endpoint(),
		Scopes: []string{oidc.ScopeOpenID, "profile", "email", "groups"}}, nil
}

// oidcPending is what a browser brings back in its cookie.
type oidcPending struct {
	State    string `json:"s"`
	Nonce    string `json:"n"`
	Verifier string `json:"v"`
}

func randomText() string {
	b := make([]byte, 32)
	rand.Read(b)
	return base64.RawURLEncoding.EncodeToString(b)
}

// StartOIDC gives the provider's page and the value of the cookie.
func (a *Authenticator) StartOIDC(ctx context.Context) (location, cookie string, err error) {
	c, err := a.oidc()
	if err != nil {
		return "", "", err
	}
	ctx, cancel := context.WithTimeout(ctx, oidcTimeout)
	defer cancel()
	_, _, conf, err := c.provider(ctx)
	if err != nil {
		return "", "", fmt.Errorf("reach the OpenID provider: %w", err)
	}
	p := oidcPending{State: randomText(), Nonce: randomText(), Verifier: oauth2.GenerateVerifier()}
	b, err := json.Marshal(p)
	if err != nil {
		return "", "", err
	}
	return conf.AuthCodeURL(p.State, oidc.Nonce(p.Nonce), oauth2.S256ChallengeOption(p.Verifier)), base64.RawURLEncoding.EncodeToString(b), nil
}

// FinishOIDC makes a session of what the provider sent the browser back with.
func (a *Authenticator) FinishOIDC(ctx context.Context, cookie, returned, code, from string) (SignedIn, error) {
	var p oidcPending
	b, err := base64.RawURLEncoding.DecodeString(cookie)
	if err != nil || json.Unmarshal(b, &p) != nil || len(p.State) < 32 || subtle.ConstantTimeCompare([]byte(p.State), []byte(returned)) != 1 || code == "" {
		return SignedIn{}, ErrUnauthenticated
	}
	c, err := a.oidc()
	if err != nil {
		return SignedIn{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, oidcTimeout)
	defer cancel()
	ctx, provider, conf, err := c.provider(ctx)
	if err != nil {
		return SignedIn{}, fmt.Errorf("reach the OpenID provider: %w", err)
	}
	refuse := func(why string, err error) (SignedIn, error) {
		a.cfg.Log.Warn("sign-in by OpenID Connect is refused", "why", why, "err", err)
		return SignedIn{}, ErrUnauthenticated
	}
	token, err := conf.Exchange(ctx, code, oauth2.VerifierOption(p.Verifier))
	if err != nil {
		return refuse("the provider does not take the code", nil) // its answer may hold anything
	}
	raw, ok := token.Extra("id_token").(string)
	if !ok {
		return refuse("the provider gave no ID token", nil)
	}
	id, err := provider.VerifierContext(ctx, &oidc.Config{ClientID: c.ClientID, Now: a.cfg.Now}).Verify(ctx, raw)
	if err != nil {
		return refuse("the ID token does not verify", err)
	}
	if subtle.ConstantTimeCompare([]byte(id.Nonce), []byte(p.Nonce)) != 1 {
		return refuse("the ID token is for another sign-in", nil)
	}
	u, err := a.oidcUser(ctx, c, id)
	if err != nil {
		return SignedIn{}, err
	}
	return a.open(ctx, u, from, "", 0)
}

// oidcUser finds or makes the user of an ID token, with the roles of its groups.
func (a *Authenticator) oidcUser(ctx context.Context, c OIDCConfig, id *oidc.IDToken) (state.User, error) {
	var claims map[string]any
	if err := id.Claims(&claims); err != nil || id.Subject == "" {
		return state.User{}, ErrUnauthenticated
	}
	claim := c.GroupClaim
	if claim == "" {
		claim = "groups"
	}
	roles := []string{}
	groups, _ := claims[claim].([]any)
	for _, g := range groups[:min(len(groups), oidcClaimsMax)] {
		if name, ok := g.(string); ok {
			roles = append(roles, c.Groups[name]...)
		}
	}
	slices.Sort(roles)
	roles = slices.Compact(roles)
	if len(roles) == 0 {
		return state.User{}, fmt.Errorf("%w: none of the groups that the provider names has a role here", ErrForbidden)
	}
	text := func(names ...string) string {
		for _, n := range names {
			if s, ok := claims[n].(string); ok && s != "" {
				return s
			}
		}
		return ""
	}
	full := clip(text("name", "preferred_username", "email"), state.NameBytesMax)
	subject := id.Issuer + " " + id.Subject
	view := a.cfg.Store.View()
	at := slices.IndexFunc(view.Users(), func(u state.User) bool { return u.Source == state.SourceOIDC && u.Subject == subject })
	cmd := &state.SetUser{FullName: &full, Roles: &roles}
	if at >= 0 {
		u := view.Users()[at]
		if u.Disabled {
			return state.User{}, ErrUnauthenticated
		}
		cmd.ID = u.ID
		if slices.Equal(u.Roles, roles) && u.FullName == full {
			return u, nil
		}
	} else {
		name := userName(text("preferred_username", "email"))
		if _, err := view.UserByName(name); err == nil {
			return state.User{}, fmt.Errorf("%w: there is another user called %s here", ErrForbidden, name)
		}
		cmd.ID, cmd.Create, cmd.Name, cmd.Source, cmd.Subject = uuid.New(), true, name, state.SourceOIDC, subject
	}
	if _, err := a.cfg.Raft.Apply(ctx, cmd); err != nil {
		return state.User{}, err
	}
	return a.cfg.Store.View().User(cmd.ID)
}

// userName makes a name that a user can have of what a provider calls it.
func userName(s string) string {
	s, _, _ = strings.Cut(strings.ToLower(s), "@")
	s = strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-' || r == '.' || r == '_' {
			return r
		}
		return '-'
	}, s)
	s = strings.TrimLeft(s, "-._")
	if s == "" {
		s = "user-" + uuid.NewString()[:8]
	}
	return s[:min(len(s), 63)]
}
