package console

import (
	"bytes"
	"compress/gzip"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/fstest"
)

func zipped(t *testing.T, text string) *fstest.MapFile {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if _, err := io.WriteString(z, text); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return &fstest.MapFile{Data: b.Bytes()}
}

func ask(c *Console, target, accept, encoding string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodGet, target, nil)
	r.Header.Set("Accept", accept)
	r.Header.Set("Accept-Encoding", encoding)
	w := httptest.NewRecorder()
	c.ServeHTTP(w, r)
	return w
}

func TestServe(t *testing.T) {
	c, err := newConsole(fstest.MapFS{"README": {Data: []byte("x")}, "index.html.gz": zipped(t, "<p>index"), "theme.js.gz": zipped(t, "theme"),
		"assets/app-1234.js.gz": zipped(t, "app"), "assets/font-1.woff2": {Data: []byte("font")}})
	if err != nil || !c.Built() {
		t.Fatal(err, c.Built())
	}
	for _, test := range []struct {
		path, accept, encoding string
		status                 int
		body, kind, cache      string
	}{
		{"/", "text/html", "", 200, "<p>index", "text/html; charset=utf-8", "no-cache"},
		{"/vdisks/default%2Fdisk1?tab=snapshots", "text/html,*/*", "", 200, "<p>index", "text/html; charset=utf-8", "no-cache"},
		{"/vdisks", "application/json", "", 404, "", "", ""},
		{"/assets/app-1234.js", "*/*", "", 200, "app", "text/javascript; charset=utf-8", "public, max-age=31536000, immutable"},
		{"/assets/gone-1.js", "text/html", "", 404, "", "", ""},
		{"/assets/font-1.woff2", "*/*", "gzip", 200, "font", "font/woff2", "public, max-age=31536000, immutable"},
		{"/README", "*/*", "", 404, "", "", ""},
	} {
		w := ask(c, test.path, test.accept, test.encoding)
		if w.Code != test.status {
			t.Errorf("%s: status %d, want %d", test.path, w.Code, test.status)
			continue
		}
		if test.status != 200 {
			continue
		}
		h := w.Header()
		if w.Body.String() != test.body || h.Get("Content-Type") != test.kind || h.Get("Cache-Control") != test.cache {
			t.Errorf("%s: %q, %v", test.path, w.Body, h)
		}
		if csp := h.Get("Content-Security-Policy"); !strings.Contains(csp, "default-src 'none'") || strings.Contains(csp, "unsafe") {
			t.Errorf("%s: policy %q", test.path, csp)
		}
	}
	w := ask(c, "/assets/app-1234.js", "*/*", "gzip, br")
	if w.Header().Get("Content-Encoding") != "gzip" || w.Body.String() == "app" {
		t.Errorf("gzip is not used: %v", w.Header())
	}
	r := httptest.NewRequest(http.MethodGet, "/assets/app-1234.js", nil)
	r.Header.Set("If-None-Match", w.Header().Get("ETag"))
	again := httptest.NewRecorder()
	if c.ServeHTTP(again, r); again.Code != http.StatusNotModified {
		t.Errorf("If-None-Match: status %d", again.Code)
	}
	post := httptest.NewRecorder()
	if c.ServeHTTP(post, httptest.NewRequest(http.MethodPost, "/", nil)); post.Code != http.StatusMethodNotAllowed {
		t.Errorf("POST: status %d", post.Code)
	}
}

func TestNotBuilt(t *testing.T) {
	c, err := newConsole(fstest.MapFS{"README": {Data: []byte("x")}})
	if err != nil || c.Built() {
		t.Fatal(err, c.Built())
	}
	for _, path := range []string{"/", "/vpools", "/login"} {
		if w := ask(c, path, "text/html", ""); w.Code != 200 || !strings.Contains(w.Body.String(), "console is not in this binary") {
			t.Errorf("%s: %d %s", path, w.Code, w.Body)
		}
	}
}
