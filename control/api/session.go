package api

import (
	"context"
	"net/http"
	"strings"
	"time"

	"varve/control/api/internal"
	"varve/control/auth"
)

// internalAPI answers the operations of the internal API.
type internalAPI struct{ *Server }

var _ internal.StrictServerInterface = internalAPI{}

// cookie is the session's: of this host alone, for HTTPS alone, out of reach of scripts, and not sent with what another site starts.
func cookie(value string, lasts time.Duration) string {
	c := http.Cookie{Name: sessionCookie, Value: value, Path: "/", Secure: true, HttpOnly: true, SameSite: http.SameSiteStrictMode,
		MaxAge: int(lasts / time.Second)}
	if value == "" {
		c.MaxAge = -1
	}
	return c.String()
}

func opened(ctx context.Context, in auth.SignedIn) internal.SessionJSONResponse {
	c := callOf(ctx)
	c.who = in.Principal
	return internal.SessionJSONResponse{
		Body: internal.Session{Name: in.Principal.Name, Roles: notNil(in.Principal.Roles), Expires: in.Principal.Expires.UTC(),
			CSRF: auth.CSRFToken(in.Cookie)},
		Headers: internal.SessionResponseHeaders{SetCookie: cookie(in.Cookie, auth.SessionLasts)},
	}
}

func (a internalAPI) GetSetup(context.Context, internal.GetSetupRequestObject) (internal.GetSetupResponseObject, error) {
	out := internal.GetSetup200JSONResponse{Needed: a.auth.NeedsSetUp(), Version: a.cfg.Version}
	if cl, ok := a.cfg.Store.View().Cluster(); ok {
		out.Cluster = cl.ID.String()
	}
	_, err := a.auth.OIDC()
	out.OIDC = err == nil
	return out, nil
}

func (a internalAPI) SetUp(ctx context.Context, r internal.SetUpRequestObject) (internal.SetUpResponseObject, error) {
	about(ctx, "user "+clip(r.Body.Name))
	in, err := a.auth.SetUp(ctx, r.Body.Code, r.Body.Name, r.Body.Password, callOf(ctx).from)
	if err != nil {
		return nil, err
	}
	return internal.SetUp200JSONResponse{SessionJSONResponse: opened(ctx, in)}, nil
}

func (a internalAPI) SetUpJoin(ctx context.Context, r internal.SetUpJoinRequestObject) (internal.SetUpJoinResponseObject, error) {
	about(ctx, "this appliance")
	if err := a.auth.CheckSetUp(r.Body.Code); err != nil {
		return nil, err
	}
	of, err := a.appliance()
	if err != nil {
		return nil, err
	}
	j, err := of.Join(ctx, r.Body.Token)
	return internal.SetUpJoin202JSONResponse{Cluster: j.Cluster.String(), Node: j.Node.String(), Fingerprint: j.Fingerprint}, err
}

func (a internalAPI) NewSetupCode(context.Context, internal.NewSetupCodeRequestObject) (internal.NewSetupCodeResponseObject, error) {
	if !a.auth.NeedsSetUp() {
		return nil, refuse(http.StatusConflict, "conflict", "the first administrator is made already", "make users with: varve user create")
	}
	return internal.NewSetupCode200JSONResponse{Code: a.auth.SetUpCode()}, nil
}

func (a internalAPI) SignIn(ctx context.Context, r internal.SignInRequestObject) (internal.SignInResponseObject, error) {
	about(ctx, "user "+clip(r.Body.Name))
	in, err := a.auth.SignIn(ctx, auth.Credentials{Name: r.Body.Name, Password: r.Body.Password, Code: r.Body.Code, From: callOf(ctx).from})
	if err != nil {
		return nil, err
	}
	return internal.SignIn200JSONResponse{SessionJSONResponse: opened(ctx, in)}, nil
}

func (a internalAPI) GetSession(ctx context.Context, _ internal.GetSessionRequestObject) (internal.GetSessionResponseObject, error) {
	c := callOf(ctx)
	out := internal.Session{Name: c.who.Name, Roles: notNil(c.who.Roles), Expires: c.who.Expires.UTC()}
	if c.cookie == "" {
		return sessionWithoutCookie(out), nil
	}
	out.CSRF = auth.CSRFToken(c.cookie)
	left := time.Until(c.who.Expires)
	return internal.GetSession200JSONResponse{SessionJSONResponse: internal.SessionJSONResponse{Body: out,
		Headers: internal.SessionResponseHeaders{SetCookie: cookie(c.cookie, left)}}}, nil
}

// sessionWithoutCookie answers a caller that has shown something else than a session.
type sessionWithoutCookie internal.Session

// VisitGetSessionResponse implements the generated interface.
func (s sessionWithoutCookie) VisitGetSessionResponse(w http.ResponseWriter) error {
	return writeJSON(w, http.StatusOK, internal.Session(s))
}

func (a internalAPI) SignOut(ctx context.Context, _ internal.SignOutRequestObject) (internal.SignOutResponseObject, error) {
	c := callOf(ctx)
	about(ctx, "user "+c.who.Name)
	if c.cookie == "" {
		return nil, refuse(http.StatusBadRequest, "invalid", "there is no session", "")
	}
	return internal.SignOut204Response{Headers: internal.SignOut204ResponseHeaders{SetCookie: cookie("", 0)}}, a.auth.SignOut(ctx, c.who)
}

func (a internalAPI) PasswordGrant(ctx context.Context, r internal.PasswordGrantRequestObject) (internal.PasswordGrantResponseObject, error) {
	about(ctx, "user "+clip(r.Body.Username))
	if r.Body.GrantType != "password" {
		return nil, refuse(http.StatusBadRequest, "unsupported_grant_type", "grant_type is not password", "")
	}
	token, lasts, err := a.auth.PasswordGrant(ctx, auth.Credentials{Name: r.Body.Username, Password: r.Body.Password, Code: r.Body.Code,
		From: callOf(ctx).from})
	if err != nil {
		return nil, err
	}
	callOf(ctx).who = auth.Principal{Kind: auth.KindUser, Name: r.Body.Username, Via: auth.ViaAPI}
	return internal.PasswordGrant200JSONResponse{AccessToken: token, TokenType: "Bearer", ExpiresIn: int(lasts / time.Second)}, nil
}

func (a internalAPI) EnrolTOTP(ctx context.Context, _ internal.EnrolTOTPRequestObject) (internal.EnrolTOTPResponseObject, error) {
	c := callOf(ctx)
	about(ctx, "user "+c.who.Name)
	uri, err := a.auth.EnrolTOTP(ctx, c.who, "Varve")
	return internal.EnrolTOTP200JSONResponse{URI: uri}, err
}

func (a internalAPI) ConfirmTOTP(ctx context.Context, r internal.ConfirmTOTPRequestObject) (internal.ConfirmTOTPResponseObject, error) {
	c := callOf(ctx)
	about(ctx, "user "+c.who.Name)
	return internal.ConfirmTOTP204Response{}, a.auth.ConfirmTOTP(ctx, c.who, r.Body.Code)
}

func (a internalAPI) RemoveTOTP(ctx context.Context, r internal.RemoveTOTPRequestObject) (internal.RemoveTOTPResponseObject, error) {
	c := callOf(ctx)
	about(ctx, "user "+c.who.Name)
	return internal.RemoveTOTP204Response{}, a.auth.RemoveTOTP(ctx, c.who, r.Body.Code, c.from)
}

// oidcCookie holds a sign-in under way. It is sent with the way back from the provider, which is another site's doing.
const oidcCookie = "__Host-varve-oidc"

const oidcLasts = 10 * time.Minute

func (a internalAPI) StartOIDC(ctx context.Context, _ internal.StartOIDCRequestObject) (internal.StartOIDCResponseObject, error) {
	location, value, err := a.auth.StartOIDC(ctx)
	if err != nil {
		return nil, err
	}
	c := http.Cookie{Name: oidcCookie, Value: value, Path: "/", Secure: true, HttpOnly: true, SameSite: http.SameSiteLaxMode, MaxAge: int(oidcLasts / time.Second)}
	return internal.StartOIDC302Response{Headers: internal.StartOIDC302ResponseHeaders{Location: location, SetCookie: c.String()}}, nil
}

func (a internalAPI) FinishOIDC(ctx context.Context, r internal.FinishOIDCRequestObject) (internal.FinishOIDCResponseObject, error) {
	c := callOf(ctx)
	in, err := a.auth.FinishOIDC(ctx, c.oidc, r.Params.State, r.Params.Code, c.from)
	if err != nil {
		return nil, err
	}
	c.who = in.Principal
	about(ctx, "user "+in.Principal.Name)
	if err := a.signedInElsewhere(ctx, c); err != nil {
		return nil, err
	}
	const page = `<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Varve</title><meta http-equiv="refresh" content="0;url=/"></head>` +
		`<body><a href="/">Signed in: go on</a></body></html>`
	return internal.FinishOIDC200TextHTMLResponse{Body: strings.NewReader(page), ContentLength: int64(len(page)),
		Headers: internal.FinishOIDC200ResponseHeaders{SetCookie: cookie(in.Cookie, auth.SessionLasts)}}, nil
}

// signedInElsewhere writes a sign-in down that comes as a GET, which the guard takes for reading.
func (s *Server) signedInElsewhere(ctx context.Context, c *call) error {
	c.audited = true
	return s.auth.Record(ctx, auth.Entry{Who: c.who.Who(), Via: c.who.Via, From: c.from, Action: c.ID, Object: c.object, Result: "ok", Request: c.request})
}
