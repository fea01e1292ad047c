package api

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "varve/control/api/customer"
	"varve/control/api/internal"
	"varve/control/auth"
	"varve/control/state"
)

// clock is one that a test moves.
type clock struct {
	mu sync.Mutex
	at time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = c.at.Add(d)
}

// vault is one in memory.
type vault struct {
	mu sync.Mutex
	by map[string][]byte
}

func newVault() *vault { return &vault{by: make(map[string][]byte)} }

func (v *vault) Set(_ context.Context, name string, plain []byte) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.by[name] = slices.Clone(plain)
	return nil
}

func (v *vault) Get(name string) ([]byte, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if b, ok := v.by[name]; ok {
		return slices.Clone(b), nil
	}
	return nil, &state.Error{Err: state.ErrNotFound, Object: "secret " + name}
}

func (v *vault) Delete(_ context.Context, name string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.by, name)
	return nil
}

const goodPassword = "correct horse battery"

var root = auth.Local("test")

func (w *world) must(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

// user makes a user with roles.
func (w *world) user(name string, roles ...string) {
	w.Helper()
	_, err := w.auth.CreateUser(w.Context(), root, auth.NewUser{Name: name, Password: goodPassword, Roles: roles})
	w.must(err)
}

// tokenOf makes a token that stands for a user.
func (w *world) tokenOf(user, name string, n auth.NewToken) string {
	w.Helper()
	u, err := w.auth.User(user)
	w.must(err)
	n.Name = name
	_, secret, err := w.auth.CreateToken(w.Context(), auth.Principal{Kind: auth.KindUser, Name: user, ID: u.ID, Roles: u.Roles, Via: auth.ViaAPI}, n)
	w.must(err)
	return secret
}

// send sends a request as somebody.
func (w *world) send(method, path, body string, as ...func(*http.Request)) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, path, strings.NewReader(body))
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	r.Header.Set("If-Match", "*")
	for _, f := range as {
		f(r)
	}
	rec := httptest.NewRecorder()
	w.server.Handler().ServeHTTP(rec, r)
	return rec
}

func bearer(token string) func(*http.Request) {
	return func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+token) }
}

func header(k, v string) func(*http.Request) { return func(r *http.Request) { r.Header.Set(k, v) } }

func from(addr string) func(*http.Request) {
	return func(r *http.Request) { r.RemoteAddr = addr + ":999" }
}

func socket(p peer) func(*http.Request) {
	return func(r *http.Request) { *r = *r.WithContext(context.WithValue(r.Context(), peerKey{}, p)) }
}

// session signs a user in and gives what a browser would send.
func (w *world) session(user string) (as func(*http.Request), csrf string) {
	w.Helper()
	in, err := w.auth.SignIn(w.Context(), auth.Credentials{Name: user, Password: goodPassword, From: "192.0.2.1"})
	w.must(err)
	return func(r *http.Request) { r.AddCookie(&http.Cookie{Name: sessionCookie, Value: in.Cookie}) }, auth.CSRFToken(in.Cookie)
}

// concrete gives a path with names in the places of its parameters.
func concrete(path string) string {
	return regexp.MustCompile(`\{[^}]*\}`).ReplaceAllString(path, "nope")
}

// Who may call what, for every operation of both specifications: the specification's roles and nobody else.
func TestAccessMatrix(t *testing.T) {
	w := newWorld(t)
	if n := len(w.server.operations) + len(w.server.plain) + 1; n != len(w.server.echo.Routes()) { // one is the console's, for all that is no route
		t.Fatalf("%d operations and routes, %d in the router", n, len(w.server.echo.Routes()))
	}
	w.user("boss", state.RoleAdmin)
	type caller struct {
		name  string
		as    []func(*http.Request)
		who   auth.Principal // whose rights it has; the zero value: nobody's
		wrong bool           // shows credentials that are not valid
		kind  string         // token, session, local
	}
	callers := []caller{
		{name: "anonymous"},
		{name: "loopback", as: []func(*http.Request){from("127.0.0.1")}},
		{name: "wrong token", as: []func(*http.Request){bearer("varve_x")}, wrong: true},
		{name: "empty token", as: []func(*http.Request){bearer("")}, wrong: true},
		{name: "endless token", as: []func(*http.Request){bearer(strings.Repeat("x", 10000))}, wrong: true},
		{name: "basic", as: []func(*http.Request){func(r *http.Request) { r.SetBasicAuth("admin", w.token) }}, wrong: true},
		{name: "wrong cookie", as: []func(*http.Request){func(r *http.Request) { r.AddCookie(&http.Cookie{Name: sessionCookie, Value: "x"}) }}, kind: "cookie"},
		{name: "admin.token", as: []func(*http.Request){bearer(w.token)}, who: auth.Principal{Roles: []string{state.RoleAdmin}}, kind: "token"},
		{name: "lower case scheme", as: []func(*http.Request){header("Authorization", "bearer "+w.token)},
			who: auth.Principal{Roles: []string{state.RoleAdmin}}, kind: "token"},
		{name: "socket, own user", as: []func(*http.Request){socket(peer{unix: true, known: true, uid: w.server.self})}, who: root, kind: "local"},
		{name: "socket, root", as: []func(*http.Request){socket(peer{unix: true, known: true})}, who: root, kind: "local"},
		{name: "socket, another user", as: []func(*http.Request){socket(peer{unix: true, known: true, uid: 12345})}, kind: "stranger"},
		{name: "socket, unknown user", as: []func(*http.Request){socket(peer{unix: true})}, kind: "stranger"},
	}
	for _, role := range state.Roles() {
		name := "u-" + role
		w.user(name, role)
		rights := auth.Principal{Roles: []string{role}}
		callers = append(callers, caller{name: "token of " + role, who: rights, kind: "token",
			as: []func(*http.Request){bearer(w.tokenOf(name, "t-"+role, auth.NewToken{}))}})
		cookie, csrf := w.session(name)
		callers = append(callers, caller{name: "session of " + role, who: rights, kind: "session", as: []func(*http.Request){cookie, header(csrfHeader, csrf)}})
		scoped := rights
		scoped.VPools = []string{"other"}
		callers = append(callers, caller{name: "token of " + role + " for another vPool", who: scoped, kind: "token",
			as: []func(*http.Request){bearer(w.tokenOf(name, "s-"+role, auth.NewToken{VPools: []string{"other"}}))}})
	}
	w.user("many", state.RoleAdmin)
	w.user("gone", state.RoleAdmin)
	w.user("off", state.RoleAdmin)
	narrow := bearer(w.tokenOf("many", "narrow", auth.NewToken{Roles: []string{state.RoleViewer}}))
	revoked := bearer(w.tokenOf("many", "revoked", auth.NewToken{}))
	w.must(w.auth.DeleteToken(t.Context(), root, "revoked", 0))
	deleted := bearer(w.tokenOf("gone", "deleted", auth.NewToken{}))
	w.must(w.auth.DeleteUser(t.Context(), root, "gone", 0))
	disabled, yes := bearer(w.tokenOf("off", "disabled", auth.NewToken{})), true
	_, err := w.auth.EditUser(t.Context(), root, "off", auth.UserEdit{Disabled: &yes})
	w.must(err)
	elsewhere := bearer(w.tokenOf("many", "elsewhere", auth.NewToken{Networks: []string{"198.51.100.0/24"}}))
	old := bearer(w.tokenOf("many", "old", auth.NewToken{Lasts: time.Minute}))
	w.clock.add(2 * time.Minute)
	callers = append(callers, caller{name: "expired token", as: []func(*http.Request){old}, wrong: true},
		caller{name: "revoked token", as: []func(*http.Request){revoked}, wrong: true},
		caller{name: "token of a deleted user", as: []func(*http.Request){deleted}, wrong: true},
		caller{name: "token of a disabled user", as: []func(*http.Request){disabled}, wrong: true},
		caller{name: "token from elsewhere", as: []func(*http.Request){elsewhere}, wrong: true},
		caller{name: "admin's token with the role viewer", as: []func(*http.Request){narrow}, who: auth.Principal{Roles: []string{state.RoleViewer}}, kind: "token"})

	calls, refusals := 0, 0
	for _, o := range w.server.operations {
		if len(o.Roles) == 0 || o.CLI == "" {
			t.Errorf("%s has no roles or no command line", o.ID)
		}
		for _, c := range callers {
			if o.ID == "signOut" && c.kind == "session" {
				continue // would end the session that the rest of the matrix uses
			}
			w.server.limits = newLimiter()
			as := c.as
			if o.ID == "streamEvents" || o.ID == "streamChanges" { // a caller that is admitted, and gone
				as = append(slices.Clone(as), func(r *http.Request) {
					ctx, cancel := context.WithCancel(r.Context())
					cancel()
					*r = *r.WithContext(ctx)
				})
			}
			rec := w.send(o.Method, concrete(o.Path)+"?dryRun=true", "", as...)
			calls++
			want := 0 // admitted
			open := slices.Contains(o.Roles, anyone)
			switch {
			case c.kind == "stranger":
				want = 403
			case c.wrong && !(o.ID == "issueToken" && c.name == "basic"):
				want = 401
			case open:
			case c.kind == "" || c.kind == "cookie":
				want = 401
			case o.Local && c.kind != "local", o.Internal && c.kind == "token":
				want = 403
			case slices.Contains(o.Roles, signedIn):
			case !c.who.Has(o.Roles...), c.who.VPools != nil && !o.Scoped:
				want = 403
			}
			refused := rec.Code == 401 || rec.Code == 403
			if want != 0 {
				refusals++
			}
			if open && want == 0 { // what is signed in by may be refused by the handler itself
				refused = rec.Code == 403
			}
			if want != 0 && rec.Code != want || want == 0 && refused && o.ID != "enrolTOTP" && o.ID != "confirmTOTP" {
				t.Errorf("%s %s as %s: %d %s, want %d", o.Method, o.Path, c.name, rec.Code, rec.Body, want)
			}
			if rec.Code == 401 && rec.Header().Get("WWW-Authenticate") == "" {
				t.Errorf("%s as %s: no WWW-Authenticate", o.ID, c.name)
			}
			if rec.Code == 500 {
				t.Errorf("%s as %s: %s", o.ID, c.name, rec.Body)
			}
		}
		if slices.Contains(o.Roles, anyone) {
			continue
		}
		// Tricks with the path or the method reach no handler without credentials.
		path := concrete(o.Path)
		for _, trick := range []struct{ method, path string }{
			{o.Method, "/" + path}, {o.Method, path + "/"}, {o.Method, strings.ToUpper(path)}, {o.Method, path + "%2e%2e"},
			{o.Method, strings.Replace(path, "/api", "/%61pi", 1)}, {o.Method, "/healthz/.." + path}, {"HEAD", path}, {"OPTIONS", path}, {"TRACE", path}} {
			rec := w.send(trick.method, trick.path, "", header("X-HTTP-Method-Override", o.Method), header("Upgrade", "websocket"), header("Connection", "Upgrade"))
			if rec.Code < 400 && rec.Code != 204 || rec.Code == 204 && trick.method != "OPTIONS" {
				t.Errorf("%s %s without credentials: %d %s", trick.method, trick.path, rec.Code, rec.Body)
			}
		}
	}
	for _, r := range w.server.plain {
		for who, as := range map[string]func(*http.Request){"stranger": from("192.0.2.9"), "proxied": func(r *http.Request) {
			from("127.0.0.1")(r)
			r.Header.Set("X-Forwarded-For", "192.0.2.1")
		}} {
			want := map[access]int{open: 200, local: 401}[r.access]
			if rec := w.send(r.method, r.path, "", as); rec.Code != want {
				t.Errorf("%s as %s: %d", r.path, who, rec.Code)
			}
		}
	}
	for _, path := range []string{"/debug/pprof/", "/debug/vars", "/.git/config", "/api/customer/v2/vpools", "/api/internal/debug"} {
		if rec := w.send("GET", path, "", bearer(w.token)); rec.Code != 404 {
			t.Errorf("%s: %d", path, rec.Code)
		}
	}
	fmt.Printf("» access matrix: %d operations x %d callers = %d calls, %d of them refused as they must be\n", len(w.server.operations), len(callers), calls, refusals)
}

// Credentials that are bound to vPools see no others.
func TestScopedToken(t *testing.T) {
	w := newWorld(t)
	w.user("u", state.RoleStorageAdmin)
	if rec := w.send("POST", base+"/vpools", `{"name":"fast","backend":"local:///fast"}`, bearer(w.token)); rec.Code != 201 {
		t.Fatal(rec.Body)
	}
	for _, name := range []string{"default/a", "fast/b"} {
		if rec := w.send("POST", base+"/vdisks", `{"name":"`+name+`","size":512}`, bearer(w.token)); rec.Code != 201 {
			t.Fatal(rec.Body)
		}
	}
	scoped := bearer(w.tokenOf("u", "scoped", auth.NewToken{VPools: []string{"fast"}}))
	var disks v1.VDiskList
	w.must(json.Unmarshal(w.send("GET", base+"/vdisks", "", scoped).Body.Bytes(), &disks))
	var pools v1.VPoolList
	w.must(json.Unmarshal(w.send("GET", base+"/vpools", "", scoped).Body.Bytes(), &pools))
	if len(disks.Items) != 1 || disks.Items[0].Name != "fast/b" || len(pools.Items) != 1 || pools.Items[0].Name != "fast" {
		t.Fatal(disks, pools)
	}
	var all v1.VDiskList
	w.must(json.Unmarshal(w.send("GET", base+"/vdisks", "", bearer(w.token)).Body.Bytes(), &all))
	for _, c := range []struct {
		method, path, body string
		want               int
	}{
		{"GET", "/vdisks/fast%2Fb", "", 200}, {"GET", "/vdisks/default%2Fa", "", 404}, {"GET", "/vdisks/" + all.Items[0].ID.String(), "", 404},
		{"GET", "/vpools/default", "", 404}, {"GET", "/vdisks?vpool=default", "", 404}, {"POST", "/vdisks", `{"name":"default/c","size":512}`, 404},
		{"PATCH", "/vdisks/fast%2Fb", `{"name":"default/b"}`, 404}, {"DELETE", "/vdisks/default%2Fa?confirm=default/a", "", 404},
		{"POST", "/vdisks", `{"name":"fast/c","size":512}`, 201}, {"GET", "/status", "", 403}, {"POST", "/tokens", `{"name":"wide","vpools":["default"]}`, 403},
	} {
		if rec := w.send(c.method, base+c.path, c.body, scoped); rec.Code != c.want {
			t.Errorf("%s %s: %d %s", c.method, c.path, rec.Code, rec.Body)
		}
	}
	// What it makes is no wider than itself.
	var made v1.TokenSecret
	w.must(json.Unmarshal(w.send("POST", base+"/tokens", `{"name":"child"}`, scoped).Body.Bytes(), &made))
	if !slices.Equal(made.Token.VPools, []string{"fast"}) || w.send("GET", base+"/vdisks/default%2Fa", "", bearer(made.Secret)).Code != 404 {
		t.Fatal(made.Token)
	}
}

// The first administrator is made by the code that the appliance prints, once.
func TestSetUp(t *testing.T) {
	w := newWorld(t)
	at := internal.Prefix + "/setup"
	body := func(code string) string {
		return fmt.Sprintf(`{"code":%q,"name":"alice","password":%q}`, code, goodPassword)
	}
	if rec := w.send("GET", at, ""); !strings.Contains(rec.Body.String(), `"needed":true`) {
		t.Fatal(rec.Body)
	}
	if rec := w.send("POST", at, body("AAAA-BBBB-CCCC")); rec.Code != 409 { // no code was made yet
		t.Fatal(rec.Code, rec.Body)
	}
	code := w.auth.SetUpCode()
	for range 10 {
		if rec := w.send("POST", at, body("AAAA-BBBB-CCCC")); rec.Code != 401 && rec.Code != 409 {
			t.Fatal(rec.Code, rec.Body)
		}
	}
	if rec := w.send("POST", at, body(code)); rec.Code != 409 || !strings.Contains(rec.Body.String(), "locked") {
		t.Fatal("the right code after ten wrong ones:", rec.Code, rec.Body)
	}
	if rec := w.send("POST", at+"/code", "", bearer(w.token)); rec.Code != 403 {
		t.Fatal("a code over the network:", rec.Code)
	}
	rec := w.send("POST", at+"/code", "", socket(peer{unix: true, known: true}))
	var made internal.SetupCode
	w.must(json.Unmarshal(rec.Body.Bytes(), &made))
	if rec := w.send("POST", at, strings.Replace(body(made.Code), goodPassword, "short", 1)); rec.Code != 400 {
		t.Fatal("a weak password:", rec.Code, rec.Body)
	}
	rec = w.send("POST", at, body(strings.ToLower(strings.ReplaceAll(made.Code, "-", ""))))
	set := rec.Header().Get("Set-Cookie")
	if rec.Code != 200 || !strings.Contains(rec.Body.String(), `"roles":["admin"]`) {
		t.Fatal(rec.Code, rec.Body)
	}
	for _, want := range []string{"__Host-", "HttpOnly", "Secure", "SameSite=Strict", "Path=/"} {
		if !strings.Contains(set, want) {
			t.Errorf("the cookie lacks %s: %s", want, set)
		}
	}
	if rec := w.send("POST", at, body(made.Code)); rec.Code != 409 {
		t.Fatal("set up twice:", rec.Code)
	}
}

// A browser's session changes nothing at the wish of another site.
func TestCSRFAndFixation(t *testing.T) {
	w := newWorld(t)
	w.user("alice", state.RoleAdmin)
	signIn := fmt.Sprintf(`{"name":"alice","password":%q}`, goodPassword)
	planted := func(r *http.Request) { r.AddCookie(&http.Cookie{Name: sessionCookie, Value: "varve_planted"}) }
	rec := w.send("POST", internal.Prefix+"/session", signIn, planted)
	if rec.Code != 200 || strings.Contains(rec.Header().Get("Set-Cookie"), "planted") {
		t.Fatal("a planted session:", rec.Code, rec.Header(), rec.Body)
	}
	var s internal.Session
	w.must(json.Unmarshal(rec.Body.Bytes(), &s))
	cookies, err := http.ParseSetCookie(rec.Header().Get("Set-Cookie"))
	w.must(err)
	cookie := func(r *http.Request) { r.AddCookie(&http.Cookie{Name: sessionCookie, Value: cookies.Value}) }
	body := `{"name":"default/x","size":512}`
	csrf := header(csrfHeader, s.CSRF)
	for what, as := range map[string][]func(*http.Request){
		"no csrf token": {cookie}, "wrong csrf token": {cookie, header(csrfHeader, "x")},
		"another origin": {cookie, csrf, header("Origin", "https://evil.example")},
		"cross-site":     {cookie, csrf, header("Sec-Fetch-Site", "cross-site")},
		"same-site":      {cookie, csrf, header("Sec-Fetch-Site", "same-site")},
		"null origin":    {cookie, csrf, header("Origin", "null")},
	} {
		if rec := w.send("POST", base+"/vdisks", body, as...); rec.Code != 403 {
			t.Errorf("%s: %d %s", what, rec.Code, rec.Body)
		}
	}
	if rec := w.send("POST", internal.Prefix+"/session", signIn, header("Sec-Fetch-Site", "cross-site")); rec.Code != 403 {
		t.Error("sign-in from another site:", rec.Code)
	}
	if rec := w.send("POST", base+"/vdisks", "name=default/x&size=512", cookie, csrf, header("Content-Type", "application/x-www-form-urlencoded")); rec.Code != 415 {
		t.Error("a form:", rec.Code)
	}
	if rec := w.send("POST", base+"/vdisks", body, cookie, csrf, header("Origin", "https://example.com"), header("Sec-Fetch-Site", "same-origin")); rec.Code != 201 {
		t.Error("the console itself:", rec.Code, rec.Body)
	}
	if rec := w.send("GET", base+"/vdisks", "", cookie); rec.Code != 200 {
		t.Error("reading:", rec.Code)
	}
	var again internal.Session
	w.must(json.Unmarshal(w.send("GET", internal.Prefix+"/session", "", cookie).Body.Bytes(), &again))
	if again.CSRF != s.CSRF {
		t.Error("the console gets another csrf token after it is loaded again")
	}

	// A new sign-in is a new session; signing out, a new password and idling end it.
	other, otherCSRF := w.session("alice")
	if rec := w.send("DELETE", internal.Prefix+"/session", "", cookie, csrf); rec.Code != 204 || !strings.Contains(rec.Header().Get("Set-Cookie"), "Max-Age=0") {
		t.Error("sign out:", rec.Code, rec.Header())
	}
	if rec := w.send("GET", base+"/vdisks", "", cookie); rec.Code != 401 {
		t.Error("after signing out:", rec.Code)
	}
	if rec := w.send("POST", base+"/self/password", fmt.Sprintf(`{"old":%q,"new":"another good password"}`, goodPassword), other, header(csrfHeader, otherCSRF)); rec.Code != 204 {
		t.Fatal(rec.Code, rec.Body)
	}
	if rec := w.send("GET", base+"/vdisks", "", other); rec.Code != 401 {
		t.Error("after a new password:", rec.Code)
	}
	w.user("bob", state.RoleViewer)
	idle, _ := w.session("bob")
	for range 20 { // in use
		w.clock.add(20 * time.Minute)
		if rec := w.send("GET", base+"/vdisks", "", idle); rec.Code != 200 {
			t.Fatal("a session in use:", rec.Code)
		}
	}
	w.clock.add(31 * time.Minute)
	if rec := w.send("GET", base+"/vdisks", "", idle); rec.Code != 401 {
		t.Error("an idle session:", rec.Code)
	}
	long, _ := w.session("bob")
	for range 36 {
		w.clock.add(20 * time.Minute)
		w.send("GET", base+"/vdisks", "", long)
	}
	if rec := w.send("GET", base+"/vdisks", "", long); rec.Code != 401 {
		t.Error("a session after its twelve hours:", rec.Code)
	}
}

// Failures slow further tries down, by account and address and whatever connection they come over, and never for good.
func TestBackOff(t *testing.T) {
	w := newWorld(t)
	w.user("alice", state.RoleAdmin)
	try := func(name, password, ip string) *httptest.ResponseRecorder {
		return w.send("POST", internal.Prefix+"/session", fmt.Sprintf(`{"name":%q,"password":%q}`, name, password), from(ip))
	}
	var wrong, unknown string
	for i := range 5 {
		rec := try("alice", "wrong", "192.0.2.1")
		if rec.Code != 401 {
			t.Fatal(i, rec.Code, rec.Body)
		}
		wrong = regexp.MustCompile(`[0-9a-f-]{36}`).ReplaceAllString(rec.Body.String(), "")
	}
	unknown = regexp.MustCompile(`[0-9a-f-]{36}`).ReplaceAllString(try("nobody", "wrong", "192.0.2.1").Body.String(), "")
	if wrong != unknown {
		t.Errorf("a wrong password and an unknown name differ: %s / %s", wrong, unknown)
	}
	rec := try("alice", goodPassword, "192.0.2.1")
	if rec.Code != 429 || rec.Header().Get("Retry-After") != "15" {
		t.Fatal("the sixth try:", rec.Code, rec.Header(), rec.Body)
	}
	if rec := try("alice", goodPassword, "192.0.2.2"); rec.Code != 200 {
		t.Fatal("the owner from elsewhere is locked out:", rec.Code, rec.Body)
	}
	wait := 15 * time.Second
	for range 8 {
		w.clock.add(wait + time.Second)
		if rec := try("alice", "wrong", "192.0.2.1"); rec.Code != 401 {
			t.Fatal(rec.Code, rec.Body)
		}
		wait = min(wait*2, 15*time.Minute)
		if rec := try("alice", goodPassword, "192.0.2.1"); rec.Code != 429 {
			t.Fatal("during the wait:", rec.Code)
		}
	}
	w.clock.add(15*time.Minute + time.Second)
	if rec := try("alice", goodPassword, "192.0.2.1"); rec.Code != 200 {
		t.Fatal("after the longest wait:", rec.Code, rec.Body)
	}
}

// An API client asks for a token by its credentials, and has the roles that it names.
func TestClientCredentials(t *testing.T) {
	w := newWorld(t)
	rec := w.send("POST", base+"/clients", `{"name":"backup","roles":["storage-admin","viewer"],"networks":["192.0.2.0/24"]}`, bearer(w.token))
	var made v1.ClientSecret
	w.must(json.Unmarshal(rec.Body.Bytes(), &made))
	if rec.Code != 201 || !strings.HasPrefix(made.Secret, auth.TokenPrefix) {
		t.Fatal(rec.Code, rec.Body)
	}
	ask := func(form url.Values, as ...func(*http.Request)) *httptest.ResponseRecorder {
		return w.send("POST", base+"/oauth/token", form.Encode(), append(as, header("Content-Type", "application/x-www-form-urlencoded"))...)
	}
	grant := url.Values{"grant_type": {"client_credentials"}}
	full := url.Values{"grant_type": {"client_credentials"}, "client_id": {"backup"}, "client_secret": {made.Secret}}
	for what, rec := range map[string]*httptest.ResponseRecorder{
		"in the form": ask(full), "basic": ask(grant, func(r *http.Request) { r.SetBasicAuth("backup", made.Secret) }),
	} {
		var got v1.TokenResponse
		w.must(json.Unmarshal(rec.Body.Bytes(), &got))
		if rec.Code != 200 || got.TokenType != "Bearer" || got.ExpiresIn != 3600 || got.Scope != "storage-admin viewer" {
			t.Fatal(what, rec.Code, rec.Body)
		}
		if rec := w.send("POST", base+"/vdisks", fmt.Sprintf(`{"name":"default/%d","size":512}`, len(what)), bearer(got.AccessToken)); rec.Code != 201 {
			t.Error(what, rec.Code, rec.Body)
		}
		if rec := w.send("GET", base+"/vdisks", "", bearer(got.AccessToken), from("198.51.100.1")); rec.Code != 401 {
			t.Error("from another network:", rec.Code)
		}
		if rec := w.send("GET", internal.Prefix+"/session", "", bearer(got.AccessToken)); rec.Code != 403 {
			t.Error("a client at the internal API:", rec.Code)
		}
	}
	scoped := url.Values{"grant_type": {"client_credentials"}, "client_id": {"backup"}, "client_secret": {made.Secret}, "scope": {"viewer"}}
	var got v1.TokenResponse
	w.must(json.Unmarshal(ask(scoped).Body.Bytes(), &got))
	if rec := w.send("POST", base+"/vdisks", `{"name":"default/z","size":512}`, bearer(got.AccessToken)); rec.Code != 403 {
		t.Error("a viewer's token makes a vDisk:", rec.Code)
	}
	scoped.Set("scope", "admin")
	if rec := ask(scoped); rec.Code != 403 {
		t.Error("more than the client has:", rec.Code)
	}
	for _, bad := range []url.Values{{"grant_type": {"password"}, "username": {"x"}, "password": {"y"}}, {}} {
		if rec := ask(bad); rec.Code != 400 {
			t.Error(bad, rec.Code, rec.Body)
		}
	}
	if rec := ask(url.Values{"grant_type": {"client_credentials"}, "client_id": {"backup"}, "client_secret": {"varve_x"}}); rec.Code != 401 {
		t.Error(rec.Code)
	}
	w.clock.add(61 * time.Minute)
	if rec := w.send("GET", base+"/vdisks", "", bearer(got.AccessToken)); rec.Code != 401 {
		t.Error("after its hour:", rec.Code)
	}
	var fresh v1.TokenResponse
	w.must(json.Unmarshal(ask(full).Body.Bytes(), &fresh))
	if rec := w.send("DELETE", base+"/clients/backup?confirm=backup", "", bearer(w.token)); rec.Code != 204 {
		t.Fatal(rec.Code, rec.Body)
	}
	if rec := w.send("GET", base+"/vdisks", "", bearer(fresh.AccessToken)); rec.Code != 401 {
		t.Error("a deleted client's token:", rec.Code)
	}
}

// The password grant is the internal API's, for users.
func TestPasswordGrant(t *testing.T) {
	w := newWorld(t)
	w.user("alice", state.RoleOperator)
	form := url.Values{"grant_type": {"password"}, "username": {"alice"}, "password": {goodPassword}}
	ask := func(path string) *httptest.ResponseRecorder {
		return w.send("POST", path, form.Encode(), header("Content-Type", "application/x-www-form-urlencoded"))
	}
	if rec := ask(base + "/oauth/token"); rec.Code != 400 {
		t.Error("at the customer API:", rec.Code)
	}
	rec := ask(internal.Prefix + "/oauth/token")
	var got internal.GrantedToken
	w.must(json.Unmarshal(rec.Body.Bytes(), &got))
	if rec := w.send("GET", internal.Prefix+"/session", "", bearer(got.AccessToken)); rec.Code != 200 || rec.Header().Get("X-API-Stability") != "internal" {
		t.Error(rec.Code, rec.Body)
	}
	if rec := w.send("GET", base+"/self", "", bearer(got.AccessToken)); !strings.Contains(rec.Body.String(), `"name":"alice"`) {
		t.Error(rec.Body)
	}
}

// Nobody gives what it does not have, and the last administrator stays.
func TestNoEscalation(t *testing.T) {
	w := newWorld(t)
	w.user("boss", state.RoleAdmin)
	w.user("sec", state.RoleSecurityAdmin)
	w.user("op", state.RoleOperator)
	sec := bearer(w.tokenOf("sec", "sec", auth.NewToken{}))
	op := bearer(w.tokenOf("op", "op", auth.NewToken{}))
	w.must(func() error {
		_, err := w.auth.CreateGroup(t.Context(), root, "admins", []string{state.RoleAdmin})
		return err
	}())
	for _, c := range []struct {
		as                 func(*http.Request)
		method, path, body string
		want               int
	}{
		{sec, "POST", "/users", `{"name":"evil","password":"` + goodPassword + `","roles":["admin"]}`, 403},
		{sec, "POST", "/users", `{"name":"evil","password":"` + goodPassword + `","groups":["admins"]}`, 403},
		{sec, "PATCH", "/users/sec", `{"roles":["admin"]}`, 403}, {sec, "PATCH", "/users/sec", `{"groups":["admins"]}`, 403},
		{sec, "PATCH", "/users/boss", `{"password":"a quite different one"}`, 403}, {sec, "DELETE", "/users/boss?confirm=boss", "", 403},
		{sec, "POST", "/clients", `{"name":"evil","roles":["admin"]}`, 403}, {sec, "POST", "/tokens", `{"name":"evil","roles":["admin"]}`, 403},
		{sec, "POST", "/groups", `{"name":"evil","roles":["admin"]}`, 403}, {sec, "DELETE", "/tokens/admin", "", 403},
		{sec, "PATCH", "/groups/admins", `{"roles":["viewer"]}`, 403},
		{op, "POST", "/tokens", `{"name":"evil","roles":["storage-admin"]}`, 403}, {op, "GET", "/users", "", 403}, {op, "DELETE", "/tokens/sec", "", 404},
		{op, "GET", "/tokens/admin", "", 404}, {op, "POST", "/tokens", `{"name":"mine","roles":["viewer"]}`, 201}, {op, "GET", "/tokens/mine", "", 200},
		{bearer(w.token), "DELETE", "/users/boss?confirm=boss", "", 409}, {bearer(w.token), "PATCH", "/users/boss", `{"disabled":true}`, 409},
		{bearer(w.token), "PATCH", "/users/boss", `{"roles":[]}`, 409}, {bearer(w.token), "DELETE", "/users/op?confirm=op", "", 204},
	} {
		if rec := w.send(c.method, base+c.path, c.body, c.as); rec.Code != c.want {
			t.Errorf("%s %s %s: %d %s, want %d", c.method, c.path, c.body, rec.Code, rec.Body, c.want)
		}
	}
}

// The same request with the same key is done once and answered the same; another one with it is refused.
func TestIdempotency(t *testing.T) {
	w := newWorld(t)
	key := header("Idempotency-Key", "k1")
	body := `{"name":"default/x","size":512}`
	first := w.send("POST", base+"/vdisks", body, bearer(w.token), key)
	again := w.send("POST", base+"/vdisks", body, bearer(w.token), key)
	if first.Code != 201 || again.Code != 201 || first.Body.String() == "" || first.Body.String() != again.Body.String() ||
		again.Header().Get("Idempotency-Replayed") != "true" || again.Header().Get("Location") != first.Header().Get("Location") ||
		again.Header().Get("ETag") != first.Header().Get("ETag") || first.Header().Get("Location") != base+"/vdisks/default%2Fx" {
		t.Fatal(first.Code, first.Header(), again.Code, again.Header(), again.Body)
	}
	if rec := w.send("POST", base+"/vdisks", `{"name":"default/y","size":512}`, bearer(w.token), key); rec.Code != 422 {
		t.Error("another request with the key:", rec.Code)
	}
	w.user("bob", state.RoleStorageAdmin)
	if rec := w.send("POST", base+"/vdisks", `{"name":"default/y","size":512}`, bearer(w.tokenOf("bob", "b", auth.NewToken{})), key); rec.Code != 201 {
		t.Error("another caller's key:", rec.Code, rec.Body)
	}
	// A refusal gives the key back; a dry run takes none.
	k2 := header("Idempotency-Key", "k2")
	if rec := w.send("POST", base+"/vdisks?dryRun=true", `{"name":"default/z","size":512}`, bearer(w.token), k2); rec.Code != 200 || rec.Header().Get("Content-Type") != "application/effect+json" {
		t.Error(rec.Code, rec.Header(), rec.Body)
	}
	if rec := w.send("POST", base+"/vdisks", `{"name":"nopool/z","size":512}`, bearer(w.token), k2); rec.Code != 404 {
		t.Error(rec.Code)
	}
	if rec := w.send("POST", base+"/vdisks", `{"name":"default/z","size":512}`, bearer(w.token), k2); rec.Code != 201 {
		t.Error(rec.Code, rec.Body)
	}
	// What is a secret is not kept.
	k3 := header("Idempotency-Key", "k3")
	if rec := w.send("POST", base+"/clients", `{"name":"c","roles":["viewer"]}`, bearer(w.token), k3); rec.Code != 201 {
		t.Fatal(rec.Code, rec.Body)
	}
	if rec := w.send("POST", base+"/clients", `{"name":"c","roles":["viewer"]}`, bearer(w.token), k3); rec.Code != 409 || strings.Contains(rec.Body.String(), auth.TokenPrefix) {
		t.Error(rec.Code, rec.Body)
	}
	// Ten at once are one.
	var wg sync.WaitGroup
	codes := make([]int, 10)
	for i := range codes {
		wg.Go(func() {
			codes[i] = w.send("POST", base+"/vdisks", `{"name":"default/once","size":512}`, bearer(w.token), header("Idempotency-Key", "k4")).Code
		})
	}
	wg.Wait()
	for _, c := range codes {
		if c != 201 && c != 409 {
			t.Error(codes)
		}
	}
	if !slices.Contains(codes, 201) {
		t.Error(codes)
	}
}

// Every change, sign-in and refusal is in the audit log, in a chain that a change of any entry breaks.
func TestAudit(t *testing.T) {
	w := newWorld(t)
	w.user("alice", state.RoleSecurityAdmin)
	w.send("POST", base+"/vdisks", `{"name":"default/x","size":512}`, bearer(w.token))
	w.send("POST", base+"/vdisks", `{"name":"default/x","size":512}`, bearer(w.token))
	w.send("POST", base+"/vdisks?dryRun=true", `{"name":"default/y","size":512}`, bearer(w.token))
	w.send("GET", base+"/vdisks", "", bearer("varve_wrong"))
	w.send("DELETE", base+"/vdisks/default%2Fx?confirm=default/x", "", bearer(w.tokenOf("alice", "a", auth.NewToken{})))
	w.send("POST", internal.Prefix+"/session", `{"name":"alice","password":"wrong"}`)
	w.send("POST", internal.Prefix+"/session", fmt.Sprintf(`{"name":"alice","password":%q}`, goodPassword))
	var got v1.AuditList
	w.must(json.Unmarshal(w.send("GET", base+"/audit?sort=seq", "", bearer(w.token)).Body.Bytes(), &got))
	var lines []string
	for _, e := range got.Items {
		lines = append(lines, e.Who+" "+e.Action+" "+e.Object+": "+e.Result)
		if e.RequestID == "" || e.From == "" || e.Hash == "" || e.Time.IsZero() {
			t.Errorf("%+v", e)
		}
	}
	want := []string{
		"token/admin createVDisk vdisk default/x: ok", "token/admin createVDisk vdisk default/x: exists", "anonymous listVDisks : unauthenticated",
		"user/alice token/a deleteVDisk default/x: forbidden", "anonymous signIn user alice: unauthenticated", "user/alice signIn user alice: ok",
	}
	if !slices.Equal(lines, want) {
		t.Fatalf("%s\nwant\n%s", strings.Join(lines, "\n"), strings.Join(want, "\n"))
	}
	var v v1.AuditVerification
	w.must(json.Unmarshal(w.send("GET", base+"/audit/verification", "", bearer(w.token)).Body.Bytes(), &v))
	export := w.send("GET", base+"/audit/export", "", bearer(w.token)).Body.String()
	if !v.Intact || v.Entries != 6 || v.Last != 6 || !strings.HasSuffix(strings.TrimSpace(export), `"hash":"`+v.Head+`"}`) {
		t.Fatal(v, export)
	}
	// Whoever has the export can check it without the appliance.
	previous := ""
	for line := range strings.Lines(export) {
		var e state.AuditEntry
		w.must(json.Unmarshal([]byte(line), &e))
		if e.Previous != previous || e.Sum() != e.Hash {
			t.Fatalf("entry %d does not verify", e.Seq)
		}
		previous = e.Hash
		e.Result = "ok, really"
		if e.Sum() == e.Hash {
			t.Fatal("a changed entry has the same sum")
		}
	}
	// Strangers cannot fill it.
	before := len(w.log.Store.View().Audit(0, 10000))
	for range 300 {
		w.server.limits = newLimiter()
		w.send("GET", base+"/vdisks", "", bearer("varve_wrong"))
	}
	if n := len(w.log.Store.View().Audit(0, 10000)) - before; n > 60 || n < 10 {
		t.Fatalf("%d of 300 refusals are in the log", n)
	}
}

// A list is cut into pages, sorted and filtered by any field, and items that come or go meanwhile shift no others.
func TestLists(t *testing.T) {
	w := newWorld(t)
	for i := range 25 {
		_, err := w.server.cfg.VDisks.Create(t.Context(), fmt.Sprintf("default/d%02d", i), int64(1+i%5)<<20)
		w.must(err)
	}
	get := func(query string) (out v1.VDiskList, link string) {
		t.Helper()
		rec := w.send("GET", base+"/vdisks?"+query, "", bearer(w.token))
		if rec.Code != 200 {
			t.Fatal(query, rec.Body)
		}
		w.must(json.Unmarshal(rec.Body.Bytes(), &out))
		return out, rec.Header().Get("Link")
	}
	names := func(l v1.VDiskList) (out []string) {
		for _, d := range l.Items {
			out = append(out, strings.TrimPrefix(d.Name, "default/"))
		}
		return out
	}
	var walked []string
	query := "limit=7&sort=-size,name&count=true"
	for cursor := ""; ; {
		l, link := get(query + "&cursor=" + cursor)
		if *l.Count < 24 {
			t.Fatal(*l.Count)
		}
		walked = append(walked, names(l)...)
		if cursor = l.Next; cursor == "" {
			break
		}
		if !strings.Contains(link, `rel="next"`) {
			t.Fatal(link)
		}
		if len(walked) == 7 { // the one where the page ended goes, and one comes that belongs to what was read already
			w.must(w.server.cfg.VDisks.Delete(t.Context(), "default/"+walked[6], false))
			_, err := w.server.cfg.VDisks.Create(t.Context(), "default/a", 5<<20)
			w.must(err)
		}
	}
	if len(walked) != 25 || !slices.Equal(walked[:6], []string{"d04", "d09", "d14", "d19", "d24", "d03"}) || walked[7] != "d13" || walked[24] != "d20" {
		t.Fatal(walked)
	}
	for filter, want := range map[string]int{
		`size>=4MiB`: 10, `size>3MiB and size<5MiB`: 4, `name~"d1" or name~"d2"`: 15, `not (name~"t/d") and size=5242880`: 1, `open=true`: 0,
		`state=new and vpool="default"`: 25, `created>2020-01-01`: 25, `created<2020-01-01T00:00:00Z`: 0, `name="default/a"`: 1, `clients!=0`: 0,
	} {
		if l, _ := get("filter=" + url.QueryEscape(filter)); len(l.Items) != want {
			t.Errorf("%s: %d, want %d: %v", filter, len(l.Items), want, names(l))
		}
	}
	for _, bad := range []string{"limit=0", "limit=1001", "limit=x", "sort=colour", "sort=a,b,c,d,e", "cursor=x", "filter=size", "filter=size%3Ebig", "filter=colour%3Dred",
		"filter=%28size%3E1", "filter=size%3E1+size", "filter=" + strings.Repeat("%28", 20), "filter=" + strings.Repeat("x", 2000), "filter=name%3D%22x",
		"filter=open%3Dperhaps", "filter=created%3Etomorrow", "filter=size+and+1", "count=perhaps"} {
		w.problem("GET", base+"/vdisks?"+bad, "", 400, "invalid")
	}
	page, _ := get("limit=3&sort=name")
	w.problem("GET", base+"/vdisks?sort=size&cursor="+page.Next, "", 400, "invalid")
}

func FuzzFilter(f *testing.F) {
	for _, s := range []string{`size>10GiB and name~"db"`, `not (a=1 or b!="x")`, `((((`, `"`, `open=true`, `created>2020-01-01`} {
		f.Add(s)
	}
	fields := fieldsOf(reflect.TypeFor[v1.VDisk]())
	f.Fuzz(func(t *testing.T, s string) {
		if keep, err := parseFilter(s, fields); err == nil {
			keep(reflect.ValueOf(v1.VDisk{}))
		}
	})
}

// The second factor: made, confirmed by a code, asked for, and each code used once.
func TestSecondFactor(t *testing.T) {
	w := newWorld(t)
	w.user("alice", state.RoleAdmin)
	cookie, csrf := w.session("alice")
	as := []func(*http.Request){cookie, header(csrfHeader, csrf)}
	var key internal.TOTPKey
	w.must(json.Unmarshal(w.send("POST", internal.Prefix+"/totp", "", as...).Body.Bytes(), &key))
	if w.send("POST", internal.Prefix+"/totp/confirmation", `{"code":"000000"}`, as...).Code != 400 {
		t.Fatal("a wrong code turned it on")
	}
	code := func() string {
		c, err := auth.CodeOf(key.URI, w.clock.now())
		w.must(err)
		return c
	}
	if rec := w.send("POST", internal.Prefix+"/totp/confirmation", `{"code":"`+code()+`"}`, as...); rec.Code != 204 {
		t.Fatal(rec.Code, rec.Body)
	}
	if w.send("GET", base+"/vdisks", "", cookie).Code != 401 {
		t.Error("the session outlived the change")
	}
	signIn := func(code string) *httptest.ResponseRecorder {
		return w.send("POST", internal.Prefix+"/session", fmt.Sprintf(`{"name":"alice","password":%q,"code":%q}`, goodPassword, code))
	}
	if rec := signIn(""); rec.Code != 401 || !strings.Contains(rec.Body.String(), "code_needed") {
		t.Error(rec.Code, rec.Body)
	}
	c := code()
	if rec := signIn(c); rec.Code != 200 {
		t.Fatal(rec.Code, rec.Body)
	}
	if rec := signIn(c); rec.Code != 401 {
		t.Error("a code worked twice:", rec.Code)
	}
	w.clock.add(31 * time.Second)
	if rec := signIn(code()); rec.Code != 200 {
		t.Error("the next code:", rec.Code, rec.Body)
	}
	if rec := w.send("PATCH", base+"/users/alice", `{"reset_totp":true}`, bearer(w.token)); rec.Code != 200 || signIn("").Code != 200 {
		t.Error("an administrator takes it away:", rec.Code, rec.Body)
	}
	removeOwnSecondFactor(t, w)
}

// A user turns the own second factor off with a code of it; guessing meets the back-off of sign-ins.
func removeOwnSecondFactor(t *testing.T, w *world) {
	w.user("bob", state.RoleViewer)
	cookie, csrf := w.session("bob")
	as := []func(*http.Request){cookie, header(csrfHeader, csrf)}
	remove := func(code string, as ...func(*http.Request)) int {
		return w.send("POST", internal.Prefix+"/totp/removal", `{"code":"`+code+`"}`, as...).Code
	}
	if code := remove("000000", as...); code != 409 {
		t.Error("one that is off was turned off:", code)
	}
	var key internal.TOTPKey
	w.must(json.Unmarshal(w.send("POST", internal.Prefix+"/totp", "", as...).Body.Bytes(), &key))
	code, err := auth.CodeOf(key.URI, w.clock.now())
	w.must(err)
	if rec := w.send("POST", internal.Prefix+"/totp/confirmation", `{"code":"`+code+`"}`, as...); rec.Code != 204 {
		t.Fatal(rec.Code, rec.Body)
	}
	signIn := func(code string) *httptest.ResponseRecorder {
		return w.send("POST", internal.Prefix+"/session", fmt.Sprintf(`{"name":"bob","password":%q,"code":%q}`, goodPassword, code))
	}
	rec := signIn(code)
	var in internal.Session
	w.must(json.Unmarshal(rec.Body.Bytes(), &in))
	cookies, err := http.ParseSetCookie(rec.Header().Get("Set-Cookie"))
	w.must(err)
	as = []func(*http.Request){func(r *http.Request) { r.AddCookie(&http.Cookie{Name: sessionCookie, Value: cookies.Value}) }, header(csrfHeader, in.CSRF)}
	if got := remove(code, as...); got != 400 {
		t.Error("a code that was used turned it off:", got)
	}
	wrong := 0
	for range 20 {
		if wrong = remove("000000", as...); wrong == 429 {
			break
		}
	}
	if wrong != 429 {
		t.Error("guessing goes on:", wrong)
	}
	w.clock.add(20 * time.Minute)
	code, err = auth.CodeOf(key.URI, w.clock.now())
	w.must(err)
	if got := remove(code, as...); got != 204 {
		t.Fatal("the right code:", got)
	}
	if rec := signIn(""); rec.Code != 200 {
		t.Error("it is still asked for:", rec.Code, rec.Body)
	}
}

// Nothing that would let somebody in is in the log, in the commands or in an answer, other than the one that hands it out.
func TestSecretsStayOut(t *testing.T) {
	w := newWorld(t)
	const canary = "canary-horse-battery-staple"
	var secrets []string
	secret := func(rec *httptest.ResponseRecorder) string {
		var out struct {
			Secret      string `json:"secret"`
			AccessToken string `json:"access_token"`
			CSRF        string `json:"csrf"`
		}
		w.must(json.Unmarshal(rec.Body.Bytes(), &out))
		s := out.Secret + out.AccessToken
		if s != "" {
			secrets = append(secrets, s)
		}
		return s
	}
	answers := ""
	do := func(method, path, body string, as ...func(*http.Request)) {
		rec := w.send(method, path, body, append([]func(*http.Request){bearer(w.token)}, as...)...)
		answers += rec.Body.String()
	}
	do("POST", base+"/users", `{"name":"eve","password":"`+canary+`","roles":["admin"]}`)
	do("POST", base+"/users", `{"name":"eve","password":"`+canary+`","roles":["admin"]}`)
	do("POST", base+"/users", `{"name":"`+canary+`!","password":"x"}`)
	do("PATCH", base+"/users/eve", `{"password":"`+canary+`2"}`)
	do("GET", base+"/users/eve", "")
	do("POST", base+"/self/password", `{"old":"`+canary+`","new":"`+canary+`3"}`)
	client := secret(w.send("POST", base+"/clients", `{"name":"c","roles":["viewer"]}`, bearer(w.token), header("Idempotency-Key", "k")))
	secret(w.send("POST", base+"/tokens", `{"name":"t"}`, bearer(w.token)))
	form := url.Values{"grant_type": {"client_credentials"}, "client_id": {"c"}, "client_secret": {client}}
	token := secret(w.send("POST", base+"/oauth/token", form.Encode(), header("Content-Type", "application/x-www-form-urlencoded")))
	w.send("POST", internal.Prefix+"/session", `{"name":"eve","password":"`+canary+`"}`)
	in := w.send("POST", internal.Prefix+"/session", `{"name":"eve","password":"`+canary+`2"}`)
	c, err := http.ParseSetCookie(in.Header().Get("Set-Cookie"))
	w.must(err)
	secrets = append(secrets, c.Value, w.token)
	do("GET", base+"/clients/c", "")
	do("GET", base+"/tokens", "")
	do("GET", base+"/audit", "")
	do("GET", base+"/vdisks", "", bearer(token))
	do("PUT", base+"/vpools/default/credentials", `{"access_key":"`+canary+`4","secret_key":"`+canary+`5"}`)
	var snapshot strings.Builder
	snap, err := w.log.Store.Snapshot()
	w.must(err)
	_, err = snap.WriteTo(&snapshot)
	w.must(err)
	secrets = append(secrets, canary+"2", canary+"3", canary+"4", canary+"5", auth.CSRFToken(c.Value))
	if len(secrets) < 9 {
		t.Fatal(len(secrets))
	}
	for where, text := range map[string]string{"log": w.logged.String(), "answers": answers, "state snapshot": snapshot.String(), "commands": w.log.Entries()} {
		if len(text) < 500 {
			t.Errorf("%s: only %d bytes were looked through", where, len(text))
		}
		for i, s := range secrets {
			if strings.Contains(text, s) {
				t.Errorf("secret %d is in the %s", i, where)
			}
		}
	}
}

// Every customer operation has a command line or says why it has none; both specifications are what the code was generated from.
func TestSpecification(t *testing.T) {
	w := newWorld(t)
	ids := map[string]bool{}
	for _, o := range w.server.operations {
		if ids[o.ID] {
			t.Errorf("operation %s twice", o.ID)
		}
		ids[o.ID] = true
		if o.CLI == "none" || strings.HasPrefix(o.CLI, "none") && len(o.CLI) < 20 {
			t.Errorf("%s: an exemption without a reason", o.ID)
		}
		if o.change() && !slices.Contains(o.Roles, anyone) && !slices.Contains(o.Roles, signedIn) && slices.Contains(o.Roles, state.RoleViewer) {
			t.Errorf("a viewer may call %s", o.ID)
		}
	}
	for _, path := range []string{"/openapi.json", "/openapi.yaml"} {
		if rec := w.send("GET", base+path, ""); rec.Code != 200 || !strings.Contains(rec.Body.String(), "listVDisks") {
			t.Error(path, rec.Code)
		}
	}
	docs := w.send("GET", "/api/docs", "")
	for _, o := range w.server.customer.operations {
		if !strings.Contains(docs.Body.String(), `id="`+o.ID+`"`) {
			t.Errorf("%s is not on the documentation page", o.ID)
		}
	}
	if s := docs.Body.String(); strings.Contains(s, "<script") || strings.Contains(s, "http://") || strings.Contains(s, "https://host") && strings.Contains(s, "src=") {
		t.Error("the documentation page fetches or runs something")
	}
	if rec := w.send("GET", "/api/", ""); !strings.Contains(rec.Body.String(), `"path":"/api/customer/v1"`) {
		t.Error(rec.Body)
	}
}

// Deprecated operations say so in their answers.
func TestDeprecation(t *testing.T) {
	o, err := readOperation(json.RawMessage(`{"operationId":"x","x-varve-cli":"x","x-varve-roles":["viewer"],"x-varve-deprecated":"2027-03-01","x-varve-sunset":"2028-03-01"}`))
	if err != nil {
		t.Fatal(err)
	}
	h := http.Header{}
	o.warn(h)
	if h.Get("Deprecation") != "@1803859200" || h.Get("Sunset") != "Wed, 01 Mar 2028 00:00:00 GMT" || !strings.Contains(h.Get("Link"), `rel="deprecation"`) {
		t.Fatal(h)
	}
	for _, bad := range []string{`{"operationId":"x","x-varve-cli":"x"}`, `{"operationId":"x","x-varve-roles":["viewer"]}`, `{"operationId":"x","x-varve-cli":"x","x-varve-roles":["god"]}`,
		`{"operationId":"x","x-varve-cli":"x","x-varve-roles":["viewer"],"x-varve-deprecated":"2027-03-01"}`} {
		if _, err := readOperation(json.RawMessage(bad)); err == nil {
			t.Errorf("%s was taken", bad)
		}
	}
}

// Too many calls of one caller are put off; the socket's are not counted.
func TestRateLimit(t *testing.T) {
	w := newWorld(t)
	limited := 0
	for range callsBurst + 200 {
		if rec := w.send("GET", base+"/self", "", bearer(w.token)); rec.Code == 429 {
			limited++
			if rec.Header().Get("Retry-After") == "" {
				t.Fatal("no Retry-After")
			}
		}
		if rec := w.send("GET", base+"/self", "", socket(peer{unix: true, known: true})); rec.Code != 200 {
			t.Fatal(rec.Code)
		}
	}
	if limited < 50 {
		t.Errorf("%d calls were put off", limited)
	}
}
