package api

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	v1 "varve/control/api/customer"
	"varve/control/api/internal"
	"varve/control/auth"
	"varve/control/state"
)

// provider is an OpenID provider in this process. edit changes the claims of the next ID tokens.
type provider struct {
	*httptest.Server
	key       *rsa.PrivateKey
	challenge string
	nonce     string
	edit      func(map[string]any)
	forge     bool // sign with another key
	now       func() time.Time
}

func newProvider(t *testing.T, now func() time.Time) *provider {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p := &provider{key: key, now: now, edit: func(map[string]any) {}}
	mux := http.NewServeMux()
	answer := func(w http.ResponseWriter, v any) {
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(v)
	}
	mux.HandleFunc("/.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, map[string]any{"issuer": p.URL, "authorization_endpoint": p.URL + "/auth", "token_endpoint": p.URL + "/token", "jwks_uri": p.URL + "/keys",
			"id_token_signing_alg_values_supported": []string{"RS256"}})
	})
	mux.HandleFunc("/keys", func(w http.ResponseWriter, _ *http.Request) {
		enc := base64.RawURLEncoding.EncodeToString
		answer(w, map[string]any{"keys": []any{map[string]string{"kty": "RSA", "kid": "1", "alg": "RS256", "use": "sig",
			"n": enc(key.N.Bytes()), "e": enc(big.NewInt(int64(key.E)).Bytes())}}})
	})
	mux.HandleFunc("/token", func(w http.ResponseWriter, r *http.Request) {
		id, secret, _ := r.BasicAuth()
		sum := sha256.Sum256([]byte(r.FormValue("code_verifier")))
		if id != "varve" || secret != "provider-secret" || r.FormValue("code") != "good-code" || base64.RawURLEncoding.EncodeToString(sum[:]) != p.challenge {
			http.Error(w, `{"error":"invalid_grant"}`, http.StatusBadRequest)
			return
		}
		answer(w, map[string]any{"access_token": "x", "token_type": "Bearer", "id_token": p.token()})
	})
	p.Server = httptest.NewTLSServer(mux)
	t.Cleanup(p.Close)
	return p
}

// token is an ID token for the sign-in under way.
func (p *provider) token() string {
	claims := map[string]any{"iss": p.URL, "aud": "varve", "sub": "subject-1", "exp": p.now().Add(time.Minute).Unix(), "iat": p.now().Unix(), "nonce": p.nonce,
		"preferred_username": "Ann.Example@corp", "name": "Ann Example", "groups": []string{"storage", "others"}}
	p.edit(claims)
	body, err := json.Marshal(claims)
	if err != nil {
		panic(err)
	}
	enc := base64.RawURLEncoding.EncodeToString
	signed := enc([]byte(`{"alg":"RS256","kid":"1"}`)) + "." + enc(body)
	sum := sha256.Sum256([]byte(signed))
	key := p.key
	if p.forge {
		if key, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
			panic(err)
		}
	}
	sig, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, sum[:])
	if err != nil {
		panic(err)
	}
	return signed + "." + enc(sig)
}

// Sign-in by a provider: groups become roles, and everything that can be forged on the way is refused.
func TestOIDC(t *testing.T) {
	w := newWorld(t)
	p := newProvider(t, w.clock.now)
	ca := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.Certificate().Raw}))
	set := v1.OIDC{Issuer: p.URL, ClientID: "varve", ClientSecret: "provider-secret", RedirectURL: "https://varve.example/api/internal/oidc/callback", CA: ca,
		Groups: map[string][]string{"storage": {state.RoleStorageAdmin}, "bosses": {state.RoleAdmin}}}
	put := func(o v1.OIDC, status int, as ...func(*http.Request)) {
		t.Helper()
		b, err := json.Marshal(o)
		w.must(err)
		if len(as) == 0 {
			as = append(as, bearer(w.token))
		}
		if rec := w.send("PUT", base+"/oidc", string(b), as...); rec.Code != status {
			t.Fatalf("%d %s", rec.Code, rec.Body)
		}
	}
	if rec := w.send("GET", internal.Prefix+"/oidc/login", ""); rec.Code != 404 {
		t.Fatal("without a provider:", rec.Code)
	}
	put(set, 400) // a provider on this host is not reached unless that is allowed
	set.Local = true
	w.user("sec", state.RoleSecurityAdmin)
	put(set, 403, bearer(w.tokenOf("sec", "sec", auth.NewToken{}))) // it would make administrators
	put(set, 204)
	for _, bad := range []func(*v1.OIDC){
		func(o *v1.OIDC) { o.Issuer = "http://169.254.169.254/" }, func(o *v1.OIDC) { o.Issuer = "https://169.254.169.254/"; o.Local = false },
		func(o *v1.OIDC) { o.Groups = map[string][]string{"a": {"god"}} }, func(o *v1.OIDC) { o.Issuer = p.URL + "/other" }, func(o *v1.OIDC) { o.CA = "x" },
	} {
		o := set
		bad(&o)
		put(o, 400)
	}
	shown := w.send("GET", base+"/oidc", "", bearer(w.token))
	if strings.Contains(shown.Body.String(), "provider-secret") || !strings.Contains(shown.Body.String(), p.URL) {
		t.Fatal(shown.Body)
	}
	start := func() (cookie *http.Cookie, st string) {
		t.Helper()
		rec := w.send("GET", internal.Prefix+"/oidc/login", "")
		to, err := url.Parse(rec.Header().Get("Location"))
		w.must(err)
		if rec.Code != 302 || !strings.HasPrefix(to.String(), p.URL+"/auth?") || to.Query().Get("code_challenge_method") != "S256" {
			t.Fatal(rec.Code, rec.Header(), rec.Body)
		}
		p.challenge, p.nonce = to.Query().Get("code_challenge"), to.Query().Get("nonce")
		c, err := http.ParseSetCookie(rec.Header().Get("Set-Cookie"))
		w.must(err)
		if !c.HttpOnly || !c.Secure || c.SameSite != http.SameSiteLaxMode {
			t.Fatal(c)
		}
		return c, to.Query().Get("state")
	}
	finish := func(c *http.Cookie, st, code string) *httptest.ResponseRecorder {
		return w.send("GET", internal.Prefix+"/oidc/callback?state="+url.QueryEscape(st)+"&code="+code, "", func(r *http.Request) {
			if c != nil {
				r.AddCookie(&http.Cookie{Name: c.Name, Value: c.Value})
			}
		})
	}
	c, st := start()
	rec := finish(c, st, "good-code")
	if rec.Code != 200 || !strings.Contains(rec.Body.String(), `content="0;url=/"`) {
		t.Fatal(rec.Code, rec.Body)
	}
	session, err := http.ParseSetCookie(rec.Header().Get("Set-Cookie"))
	w.must(err)
	self := w.send("GET", base+"/self", "", func(r *http.Request) { r.AddCookie(&http.Cookie{Name: session.Name, Value: session.Value}) })
	if !strings.Contains(self.Body.String(), `"name":"ann.example"`) || !strings.Contains(self.Body.String(), `"roles":["storage-admin"]`) {
		t.Fatal(self.Body)
	}
	if rec := w.send("POST", internal.Prefix+"/session", `{"name":"ann.example","password":""}`); rec.Code != 401 {
		t.Error("a provider's user signs in with a password:", rec.Code)
	}
	refused := func(what string, status int, edit func(map[string]any), way func(c *http.Cookie, st string) *httptest.ResponseRecorder) {
		t.Helper()
		c, st := start()
		if p.edit = edit; edit == nil {
			p.edit = func(map[string]any) {}
		}
		if rec := way(c, st); rec.Code != status || rec.Header().Get("Set-Cookie") != "" {
			t.Errorf("%s: %d %s", what, rec.Code, rec.Body)
		}
		p.edit = func(map[string]any) {}
	}
	well := func(c *http.Cookie, st string) *httptest.ResponseRecorder { return finish(c, st, "good-code") }
	refused("no cookie", 401, nil, func(_ *http.Cookie, st string) *httptest.ResponseRecorder { return finish(nil, st, "good-code") })
	refused("another state", 401, nil, func(c *http.Cookie, st string) *httptest.ResponseRecorder { return finish(c, st+"x", "good-code") })
	refused("a wrong code", 401, nil, func(c *http.Cookie, st string) *httptest.ResponseRecorder { return finish(c, st, "bad") })
	refused("another nonce", 401, func(m map[string]any) { m["nonce"] = "x" }, well)
	refused("another audience", 401, func(m map[string]any) { m["aud"] = "other" }, well)
	refused("another issuer", 401, func(m map[string]any) { m["iss"] = "https://evil.example" }, well)
	refused("expired", 401, func(m map[string]any) { m["exp"] = w.clock.now().Add(-time.Minute).Unix() }, well)
	refused("no group with a role", 403, func(m map[string]any) { m["groups"] = []string{"others"} }, well)
	refused("a local user's name", 403, func(m map[string]any) { m["sub"], m["preferred_username"] = "subject-2", "sec" }, well)
	p.forge = true
	refused("signed by another key", 401, nil, well)
	p.forge = false
	// Its roles follow its groups.
	c, st = start()
	p.edit = func(m map[string]any) { m["groups"] = []string{"bosses"} }
	if rec := finish(c, st, "good-code"); rec.Code != 200 {
		t.Fatal(rec.Code, rec.Body)
	}
	u, err := w.auth.User("ann.example")
	w.must(err)
	if fmt.Sprint(u.Roles) != "[admin]" || u.Source != state.SourceOIDC || len(w.log.Store.View().Users()) != 2 {
		t.Fatalf("%+v", u)
	}
	if rec := w.send("DELETE", base+"/oidc", "", bearer(w.token)); rec.Code != 204 {
		t.Fatal(rec.Code, rec.Body)
	}
}
