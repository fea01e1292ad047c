package api

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	v1 "varve/control/api/customer"
	"varve/control/auth"
	"varve/control/state"
)

// IssueToken is OAuth2's token endpoint. The client's secret comes in the form or, as the generated code does not see, by HTTP Basic.
func (a customerAPI) IssueToken(ctx context.Context, r v1.IssueTokenRequestObject) (v1.IssueTokenResponseObject, error) {
	c := callOf(ctx)
	if r.Body.GrantType != "client_credentials" {
		return nil, refuse(http.StatusBadRequest, "unsupported_grant_type", "grant_type is not client_credentials", "")
	}
	id, secret := r.Body.ClientID, r.Body.ClientSecret
	if basicID, basicSecret, ok := basicOf(c.authorization); ok {
		id, secret = basicID, basicSecret
	}
	about(ctx, "client "+clip(id))
	token, roles, err := a.auth.Grant(ctx, id, secret, r.Body.Scope, c.from)
	if err != nil {
		return nil, err
	}
	c.who = auth.Principal{Kind: auth.KindClient, Name: id, Via: auth.ViaAPI}
	return v1.IssueToken200JSONResponse{AccessToken: token, TokenType: "Bearer", ExpiresIn: int(auth.GrantLasts / time.Second),
		Scope: strings.Join(roles, " ")}, nil
}

// basicOf reads HTTP Basic with both parts form-encoded, as RFC 6749 section 2.3.1 has it.
func basicOf(header string) (id, secret string, ok bool) {
	scheme, value, _ := strings.Cut(header, " ")
	plain, err := base64.StdEncoding.DecodeString(value)
	if err != nil || !strings.EqualFold(scheme, "Basic") {
		return "", "", false
	}
	id, secret, ok = strings.Cut(string(plain), ":")
	id, err1 := url.QueryUnescape(id)
	secret, err2 := url.QueryUnescape(secret)
	return id, secret, ok && err1 == nil && err2 == nil
}

func (a customerAPI) GetSelf(ctx context.Context, _ v1.GetSelfRequestObject) (v1.GetSelfResponseObject, error) {
	who := callOf(ctx).who
	self := v1.Self{Kind: who.Kind, Name: who.Name, Roles: notNil(who.Roles), VPools: who.VPools, Operations: []string{}}
	if !who.Expires.IsZero() {
		until := who.Expires.UTC()
		self.Expires = &until
	}
	for _, o := range a.customer.operations {
		if (who.Has(o.Roles...) && (who.VPools == nil || o.Scoped)) || slices.Contains(o.Roles, signedIn) || slices.Contains(o.Roles, anyone) {
			self.Operations = append(self.Operations, o.ID)
		}
	}
	slices.Sort(self.Operations)
	return v1.GetSelf200JSONResponse(self), nil
}

func (a customerAPI) ChangeOwnPassword(ctx context.Context, r v1.ChangeOwnPasswordRequestObject) (v1.ChangeOwnPasswordResponseObject, error) {
	c := callOf(ctx)
	about(ctx, "user "+c.who.Name)
	return v1.ChangeOwnPassword204Response{}, a.auth.ChangePassword(ctx, c.who, r.Body.Old, r.Body.New, c.from)
}

// roleMeanings say what a role is for.
var roleMeanings = map[string]string{
	state.RoleViewer:        "sees everything but who may do what",
	state.RoleOperator:      "also takes snapshots, clones, and runs what is there",
	state.RoleStorageAdmin:  "also makes, changes and deletes vPools and vDisks",
	state.RoleSecurityAdmin: "sees everything; users, groups, clients, tokens, certificates and the audit log",
	state.RoleAdmin:         "everything",
}

func (a customerAPI) ListRoles(ctx context.Context, _ v1.ListRolesRequestObject) (v1.ListRolesResponseObject, error) {
	var all []v1.Role
	for _, name := range state.Roles() {
		r := v1.Role{Name: name, Description: roleMeanings[name], Operations: []string{}}
		who := auth.Principal{Roles: []string{name}}
		for _, o := range a.customer.operations {
			if who.Has(o.Roles...) || slices.Contains(o.Roles, signedIn) {
				r.Operations = append(r.Operations, o.ID)
			}
		}
		slices.Sort(r.Operations)
		all = append(all, r)
	}
	page, err := listPage(ctx, all, func(r v1.Role) string { return r.Name })
	return v1.ListRoles200JSONResponse{Items: page.items, Next: page.next, Count: page.count}, err
}

func notNil[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}

func (s *Server) toUser(u state.User) v1.User {
	out := v1.User{Name: u.Name, ID: u.ID, FullName: u.FullName, Roles: notNil(u.Roles), Groups: []string{}, Disabled: u.Disabled,
		Source: u.Source, TOTP: u.TOTP != "", Created: utc(u.Created), Rev: u.Rev}
	for _, id := range u.Groups {
		if g, err := s.cfg.Store.View().Group(id); err == nil {
			out.Groups = append(out.Groups, g.Name)
		}
	}
	return out
}

func (a customerAPI) ListUsers(ctx context.Context, _ v1.ListUsersRequestObject) (v1.ListUsersResponseObject, error) {
	var all []v1.User
	for _, u := range a.cfg.Store.View().Users() {
		all = append(all, a.toUser(u))
	}
	page, err := listPage(ctx, all, func(u v1.User) string { return u.ID.String() })
	return v1.ListUsers200JSONResponse{Items: page.items, Next: page.next, Count: page.count}, err
}

func (a customerAPI) GetUser(ctx context.Context, r v1.GetUserRequestObject) (v1.GetUserResponseObject, error) {
	u, err := a.auth.User(r.User)
	if err != nil {
		return nil, err
	}
	return v1.GetUser200JSONResponse{Body: a.toUser(u), Headers: v1.GetUser200ResponseHeaders{ETag: etag(u.Rev)}}, nil
}

func (a customerAPI) CreateUser(ctx context.Context, r v1.CreateUserRequestObject) (v1.CreateUserResponseObject, error) {
	in, who := *r.Body, callOf(ctx).who
	about(ctx, "user "+in.Name)
	n := auth.NewUser{Name: in.Name, FullName: in.FullName, Password: in.Password, Roles: in.Roles, Groups: in.Groups}
	if r.Params.DryRun {
		if err := a.auth.CheckNewUser(who, n); err != nil {
			return nil, err
		}
		return nil, wouldDo("makes user "+in.Name, []string{"roles: " + strings.Join(in.Roles, ", ")}, nil, nil, "")
	}
	u, err := a.auth.CreateUser(ctx, who, n)
	if err != nil {
		return nil, err
	}
	return v1.CreateUser201JSONResponse{Body: a.toUser(u), Headers: v1.CreateUser201ResponseHeaders{ETag: etag(u.Rev),
		Location: location("users", u.Name)}}, nil
}

func (a customerAPI) PatchUser(ctx context.Context, r v1.PatchUserRequestObject) (v1.PatchUserResponseObject, error) {
	u, err := a.auth.User(r.User)
	if err != nil {
		return nil, err
	}
	about(ctx, "user "+u.Name)
	rev, err := based(r.Params.IfMatch, "user "+u.Name, u.Rev)
	if err != nil {
		return nil, err
	}
	in := *r.Body
	e := auth.UserEdit{Rev: rev, FullName: in.FullName, Disabled: in.Disabled, ResetTOTP: in.ResetTOTP}
	if in.Password != "" {
		e.Password = &in.Password
	}
	if in.Roles != nil {
		e.Roles = &in.Roles
	}
	if in.Groups != nil {
		e.Groups = &in.Groups
	}
	if r.Params.DryRun {
		n := len(a.cfg.Store.View().SessionsOf(u.ID))
		return nil, wouldDo("changes user "+u.Name, []string{fmt.Sprintf("%d sessions end", n)}, nil, nil, "")
	}
	u, err = a.auth.EditUser(ctx, callOf(ctx).who, u.Name, e)
	if err != nil {
		return nil, err
	}
	return v1.PatchUser200JSONResponse{Body: a.toUser(u), Headers: v1.PatchUser200ResponseHeaders{ETag: etag(u.Rev)}}, nil
}

func (a customerAPI) DeleteUser(ctx context.Context, r v1.DeleteUserRequestObject) (v1.DeleteUserResponseObject, error) {
	u, err := a.auth.User(r.User)
	if err != nil {
		return nil, err
	}
	about(ctx, "user "+u.Name)
	rev, err := based(r.Params.IfMatch, "user "+u.Name, u.Rev)
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		return nil, wouldDo("deletes user "+u.Name, []string{fmt.Sprintf("%d sessions end", len(a.cfg.Store.View().SessionsOf(u.ID)))},
			[]string{"the user and its tokens"}, nil, u.Name)
	}
	if err := confirm(r.Params.Confirm, u.Name); err != nil {
		return nil, err
	}
	return v1.DeleteUser204Response{}, a.auth.DeleteUser(ctx, callOf(ctx).who, u.Name, rev)
}

func (s *Server) toGroup(g state.Group) v1.Group {
	out := v1.Group{Name: g.Name, ID: g.ID, Roles: notNil(g.Roles), Members: []string{}, Created: utc(g.Created), Rev: g.Rev}
	for _, u := range s.cfg.Store.View().Users() {
		if slices.Contains(u.Groups, g.ID) {
			out.Members = append(out.Members, u.Name)
		}
	}
	return out
}

func (a customerAPI) ListGroups(ctx context.Context, _ v1.ListGroupsRequestObject) (v1.ListGroupsResponseObject, error) {
	var all []v1.Group
	for _, g := range a.cfg.Store.View().Groups() {
		all = append(all, a.toGroup(g))
	}
	page, err := listPage(ctx, all, func(g v1.Group) string { return g.ID.String() })
	return v1.ListGroups200JSONResponse{Items: page.items, Next: page.next, Count: page.count}, err
}

func (a customerAPI) GetGroup(_ context.Context, r v1.GetGroupRequestObject) (v1.GetGroupResponseObject, error) {
	g, err := a.auth.Group(r.Group)
	if err != nil {
		return nil, err
	}
	return v1.GetGroup200JSONResponse{Body: a.toGroup(g), Headers: v1.GetGroup200ResponseHeaders{ETag: etag(g.Rev)}}, nil
}

func (a customerAPI) CreateGroup(ctx context.Context, r v1.CreateGroupRequestObject) (v1.CreateGroupResponseObject, error) {
	about(ctx, "group "+r.Body.Name)
	if r.Params.DryRun {
		return nil, wouldDo("makes group "+r.Body.Name, []string{"roles: " + strings.Join(r.Body.Roles, ", ")}, nil, nil, "")
	}
	g, err := a.auth.CreateGroup(ctx, callOf(ctx).who, r.Body.Name, notNil(r.Body.Roles))
	if err != nil {
		return nil, err
	}
	return v1.CreateGroup201JSONResponse{Body: a.toGroup(g), Headers: v1.CreateGroup201ResponseHeaders{ETag: etag(g.Rev),
		Location: location("groups", g.Name)}}, nil
}

func (a customerAPI) PatchGroup(ctx context.Context, r v1.PatchGroupRequestObject) (v1.PatchGroupResponseObject, error) {
	g, err := a.auth.Group(r.Group)
	if err != nil {
		return nil, err
	}
	about(ctx, "group "+g.Name)
	rev, err := based(r.Params.IfMatch, "group "+g.Name, g.Rev)
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		return nil, wouldDo("changes group "+g.Name, []string{"roles: " + strings.Join(r.Body.Roles, ", ")}, nil, a.toGroup(g).Members, "")
	}
	g, err = a.auth.EditGroup(ctx, callOf(ctx).who, g.Name, rev, notNil(r.Body.Roles))
	if err != nil {
		return nil, err
	}
	return v1.PatchGroup200JSONResponse{Body: a.toGroup(g), Headers: v1.PatchGroup200ResponseHeaders{ETag: etag(g.Rev)}}, nil
}

func (a customerAPI) DeleteGroup(ctx context.Context, r v1.DeleteGroupRequestObject) (v1.DeleteGroupResponseObject, error) {
	g, err := a.auth.Group(r.Group)
	if err != nil {
		return nil, err
	}
	about(ctx, "group "+g.Name)
	rev, err := based(r.Params.IfMatch, "group "+g.Name, g.Rev)
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		return nil, wouldDo("deletes group "+g.Name, nil, []string{"the group"}, a.toGroup(g).Members, g.Name)
	}
	if err := confirm(r.Params.Confirm, g.Name); err != nil {
		return nil, err
	}
	return v1.DeleteGroup204Response{}, a.auth.DeleteGroup(ctx, g.Name, rev)
}

func toClient(c state.APIClient) v1.Client {
	return v1.Client{Name: c.Name, ID: c.ID, Roles: notNil(c.Roles), VPools: c.VPools, Networks: c.Networks, Created: utc(c.Created), Rev: c.Rev}
}

func (a customerAPI) ListClients(ctx context.Context, _ v1.ListClientsRequestObject) (v1.ListClientsResponseObject, error) {
	var all []v1.Client
	for _, c := range a.cfg.Store.View().APIClients() {
		all = append(all, toClient(c))
	}
	page, err := listPage(ctx, all, func(c v1.Client) string { return c.ID.String() })
	return v1.ListClients200JSONResponse{Items: page.items, Next: page.next, Count: page.count}, err
}

func (a customerAPI) GetClient(_ context.Context, r v1.GetClientRequestObject) (v1.GetClientResponseObject, error) {
	c, err := a.auth.Client(r.Client)
	return v1.GetClient200JSONResponse{Body: toClient(c), Headers: v1.GetClient200ResponseHeaders{ETag: etag(c.Rev)}}, err
}

func (a customerAPI) CreateClient(ctx context.Context, r v1.CreateClientRequestObject) (v1.CreateClientResponseObject, error) {
	in := *r.Body
	about(ctx, "client "+in.Name)
	if r.Params.DryRun {
		return nil, wouldDo("makes API client "+in.Name, []string{"roles: " + strings.Join(in.Roles, ", ")}, nil, nil, "")
	}
	c, secret, err := a.auth.CreateClient(ctx, callOf(ctx).who, auth.NewClient{Name: in.Name, Roles: in.Roles, VPools: in.VPools, Networks: in.Networks})
	if err != nil {
		return nil, err
	}
	return v1.CreateClient201JSONResponse{Body: v1.ClientSecret{Client: toClient(c), Secret: secret},
		Headers: v1.CreateClient201ResponseHeaders{ETag: etag(c.Rev), Location: location("clients", c.Name)}}, nil
}

func (a customerAPI) DeleteClient(ctx context.Context, r v1.DeleteClientRequestObject) (v1.DeleteClientResponseObject, error) {
	c, err := a.auth.Client(r.Client)
	if err != nil {
		return nil, err
	}
	about(ctx, "client "+c.Name)
	rev, err := based(r.Params.IfMatch, "client "+c.Name, c.Rev)
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		return nil, wouldDo("deletes API client "+c.Name, nil, []string{"the client and its tokens"}, []string{"programs that use it"}, c.Name)
	}
	if err := confirm(r.Params.Confirm, c.Name); err != nil {
		return nil, err
	}
	return v1.DeleteClient204Response{}, a.auth.DeleteClient(ctx, c.Name, rev)
}

func (s *Server) toToken(t state.Token) v1.Token {
	out := v1.Token{Name: t.Name, ID: t.ID, Owner: s.auth.OwnerName(t), Kind: t.Kind, Roles: t.Roles, VPools: t.VPools, Networks: t.Networks,
		Created: utc(t.Created), Rev: t.Rev}
	if out.Kind == "" {
		out.Kind = state.TokenAPI
	}
	if len(t.Roles) == 0 {
		out.Roles = []string{t.Role}
	}
	if t.Expires != 0 {
		until := utc(t.Expires)
		out.Expires = &until
	}
	return out
}

func (a customerAPI) ListTokens(ctx context.Context, _ v1.ListTokensRequestObject) (v1.ListTokensResponseObject, error) {
	var all []v1.Token
	for _, t := range a.auth.Tokens(callOf(ctx).who) {
		all = append(all, a.toToken(t))
	}
	page, err := listPage(ctx, all, func(t v1.Token) string { return t.Name })
	return v1.ListTokens200JSONResponse{Items: page.items, Next: page.next, Count: page.count}, err
}

func (a customerAPI) GetToken(ctx context.Context, r v1.GetTokenRequestObject) (v1.GetTokenResponseObject, error) {
	t, err := a.auth.Token(callOf(ctx).who, r.Token)
	if err != nil {
		return nil, err
	}
	return v1.GetToken200JSONResponse{Body: a.toToken(t), Headers: v1.GetToken200ResponseHeaders{ETag: etag(t.Rev)}}, nil
}

func (a customerAPI) CreateToken(ctx context.Context, r v1.CreateTokenRequestObject) (v1.CreateTokenResponseObject, error) {
	in, who := *r.Body, callOf(ctx).who
	about(ctx, "token "+in.Name)
	n := auth.NewToken{Name: in.Name, Roles: in.Roles, VPools: in.VPools, Networks: in.Networks, Lasts: time.Duration(in.ExpiresIn) * time.Second}
	if in.ExpiresIn < 0 || in.ExpiresIn > int64(auth.TokenLastsMax/time.Second) {
		return nil, refuse(http.StatusBadRequest, "invalid", "expires_in is out of range", "use 60 to 31622400 seconds")
	}
	if r.Params.DryRun {
		n, err := a.auth.CheckNewToken(who, n)
		if err != nil {
			return nil, err
		}
		return nil, wouldDo("makes token "+in.Name, []string{"roles: " + strings.Join(n.Roles, ", ")}, nil, nil, "")
	}
	t, secret, err := a.auth.CreateToken(ctx, who, n)
	if err != nil {
		return nil, err
	}
	return v1.CreateToken201JSONResponse{Body: v1.TokenSecret{Token: a.toToken(t), Secret: secret},
		Headers: v1.CreateToken201ResponseHeaders{ETag: etag(t.Rev), Location: location("tokens", t.Name)}}, nil
}

func (a customerAPI) DeleteToken(ctx context.Context, r v1.DeleteTokenRequestObject) (v1.DeleteTokenResponseObject, error) {
	who := callOf(ctx).who
	t, err := a.auth.Token(who, r.Token)
	if err != nil {
		return nil, err
	}
	about(ctx, "token "+t.Name)
	rev, err := based(r.Params.IfMatch, "token "+t.Name, t.Rev)
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		return nil, wouldDo("revokes token "+t.Name, nil, []string{"the token"}, []string{"whoever uses it"}, "")
	}
	return v1.DeleteToken204Response{}, a.auth.DeleteToken(ctx, who, t.Name, rev)
}

func toAudit(e state.AuditEntry) v1.AuditEntry {
	return v1.AuditEntry{Seq: e.Seq, Time: utc(e.Time), Who: e.Who, Via: e.Via, From: e.From, Action: e.Action, Object: e.Object, Result: e.Result,
		Detail: e.Detail, RequestID: e.Request, Previous: e.Previous, Hash: e.Hash}
}

// ListAudit gives the newest entries first unless a sort says otherwise.
func (a customerAPI) ListAudit(ctx context.Context, _ v1.ListAuditRequestObject) (v1.ListAuditResponseObject, error) {
	entries := a.cfg.Store.View().Audit(0, state.AuditEntriesMax)
	all := make([]v1.AuditEntry, 0, len(entries))
	for _, e := range slices.Backward(entries) {
		all = append(all, toAudit(e))
	}
	page, err := listPage(ctx, all, func(e v1.AuditEntry) string { return e.Hash })
	return v1.ListAudit200JSONResponse{Items: page.items, Next: page.next, Count: page.count}, err
}

func (a customerAPI) VerifyAudit(context.Context, v1.VerifyAuditRequestObject) (v1.VerifyAuditResponseObject, error) {
	first, last, n, head, broken := a.cfg.Store.View().VerifyAudit()
	return v1.VerifyAudit200JSONResponse{Intact: broken == 0, Entries: n, First: first, Last: last, Head: head, BrokenAt: broken}, nil
}

// ExportAudit writes the entries as the chain has them, so that whoever keeps them can verify it: the JSON that the hash is over.
func (a customerAPI) ExportAudit(ctx context.Context, _ v1.ExportAuditRequestObject) (v1.ExportAuditResponseObject, error) {
	var b bytes.Buffer
	for _, e := range a.cfg.Store.View().Audit(0, state.AuditEntriesMax) {
		line, err := json.Marshal(e)
		if err != nil {
			return nil, fmt.Errorf("export audit entry %d: %w", e.Seq, err)
		}
		b.Write(line)
		b.WriteByte('\n')
	}
	return v1.ExportAudit200ApplicationXNdjsonResponse{Body: &b, ContentLength: int64(b.Len())}, nil
}

func (a customerAPI) GetOIDC(context.Context, v1.GetOIDCRequestObject) (v1.GetOIDCResponseObject, error) {
	c, err := a.auth.OIDC()
	return v1.GetOIDC200JSONResponse{Issuer: c.Issuer, ClientID: c.ClientID, RedirectURL: c.RedirectURL, CA: c.CA, GroupClaim: c.GroupClaim,
		Groups: c.Groups, Local: c.Local}, err
}

func (a customerAPI) SetOIDC(ctx context.Context, r v1.SetOIDCRequestObject) (v1.SetOIDCResponseObject, error) {
	in := *r.Body
	about(ctx, "oidc "+clip(in.Issuer))
	return v1.SetOIDC204Response{}, a.auth.SetOIDC(ctx, callOf(ctx).who, auth.OIDCConfig{Issuer: in.Issuer, ClientID: in.ClientID,
		ClientSecret: in.ClientSecret, RedirectURL: in.RedirectURL, CA: in.CA, GroupClaim: in.GroupClaim, Groups: in.Groups, Local: in.Local})
}

func (a customerAPI) UnsetOIDC(ctx context.Context, _ v1.UnsetOIDCRequestObject) (v1.UnsetOIDCResponseObject, error) {
	about(ctx, "oidc")
	return v1.UnsetOIDC204Response{}, a.auth.UnsetOIDC(ctx)
}
