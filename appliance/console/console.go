// Package console holds the web console and serves it: a React application (src/) that talks to the two APIs and nothing else.
//
// `make console` builds it into dist/, which is embedded and not committed; without it, as after a plain `go build`, a page says so. With
// the build tag `release` a missing console is an error of the compiler.
//
//	/assets/NAME-HASH.EXT   never changes: kept by browsers for a year
//	/theme.js, /favicon.svg checked by ETag at each use
//	anything else           index.html where a page is asked for (Accept: text/html), so that the console's own addresses can be reloaded;
//	                        otherwise not found
//
// What compresses is embedded compressed (NAME.gz) and decompressed for the rare client that does not take it.
//
// The content security policy lets nothing in but the appliance's own scripts, styles, fonts and pictures, and nothing out but calls of its
// API: no inline script, no inline style, no frame, no other host.
package console

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"net/http"
	"path"
	"strconv"
	"strings"
)

const contentSecurityPolicy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; connect-src 'self'; " +
	"manifest-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"

// file is one file of the console.
type file struct {
	body       []byte
	gzipped    bool
	kind       string // media type
	etag       string
	changeless bool // its name has a hash of its content
}

// Console answers requests for the console. Make it with New.
type Console struct{ files map[string]file }

// New reads what is embedded.
func New() (*Console, error) {
	sub, err := fs.Sub(built, "dist")
	if err != nil {
		return nil, fmt.Errorf("read the embedded console: %w", err)
	}
	return newConsole(sub)
}

func newConsole(dist fs.FS) (*Console, error) {
	c := &Console{files: make(map[string]file)}
	err := fs.WalkDir(dist, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || name == "README" {
			return err
		}
		body, err := fs.ReadFile(dist, name)
		if err != nil {
			return err
		}
		plain, gzipped := strings.CutSuffix(name, ".gz")
		sum := sha256.Sum256(body)
		c.files["/"+plain] = file{body: body, gzipped: gzipped, kind: mediaType(plain), etag: `"` + hex.EncodeToString(sum[:12]) + `"`,
			changeless: strings.HasPrefix(plain, "assets/")}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read the embedded console: %w", err)
	}
	if !c.Built() {
		sum := sha256.Sum256([]byte(notBuilt))
		c.files = map[string]file{indexName: {body: []byte(notBuilt), kind: mediaType(indexName), etag: `"` + hex.EncodeToString(sum[:12]) + `"`}}
	}
	return c, nil
}

const indexName = "/index.html"

// Built says whether the console is there. Otherwise every page says that it is not.
func (c *Console) Built() bool {
	_, ok := c.files["/theme.js"]
	return ok
}

// mediaType does not depend on what the host knows of file names.
func mediaType(name string) string {
	switch path.Ext(name) {
	case ".html":
		return "text/html; charset=utf-8"
	case ".js":
		return "text/javascript; charset=utf-8"
	case ".css":
		return "text/css; charset=utf-8"
	case ".svg":
		return "image/svg+xml"
	case ".png":
		return "image/png"
	case ".woff2":
		return "font/woff2"
	case ".json":
		return "application/json"
	}
	if t := mime.TypeByExtension(path.Ext(name)); t != "" {
		return t
	}
	return "application/octet-stream"
}

// ServeHTTP implements http.Handler for GET and HEAD.
func (c *Console) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "only GET and HEAD", http.StatusMethodNotAllowed)
		return
	}
	f, ok := c.files[r.URL.Path]
	if !ok {
		page := strings.Contains(r.Header.Get("Accept"), "text/html") && path.Ext(r.URL.Path) != ".js" && !strings.HasPrefix(r.URL.Path, "/assets/")
		if r.URL.Path != "/" && !page {
			http.NotFound(w, r)
			return
		}
		f = c.files[indexName]
	}
	h := w.Header()
	h.Set("Content-Type", f.kind)
	h.Set("Content-Security-Policy", contentSecurityPolicy)
	h.Set("Cross-Origin-Opener-Policy", "same-origin")
	h.Set("ETag", f.etag)
	h.Set("Vary", "Accept-Encoding, Accept")
	h.Set("Cache-Control", "no-cache")
	if f.changeless {
		h.Set("Cache-Control", "public, max-age=31536000, immutable")
	}
	if r.Header.Get("If-None-Match") == f.etag {
		w.WriteHeader(http.StatusNotModified)
		return
	}
	body := f.body
	switch {
	case f.gzipped && strings.Contains(r.Header.Get("Accept-Encoding"), "gzip"):
		h.Set("Content-Encoding", "gzip")
	case f.gzipped:
		var err error
		if body, err = decompress(f.body); err != nil {
			http.Error(w, "the console is damaged", http.StatusInternalServerError)
			return
		}
	}
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(http.StatusOK)
	if r.Method == http.MethodGet {
		w.Write(body) // a client that went away is no concern of the appliance
	}
}

// fileBytesMax bounds what an embedded file becomes.
const fileBytesMax = 16 << 20

func decompress(b []byte) ([]byte, error) {
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	out, err := io.ReadAll(io.LimitReader(z, fileBytesMax))
	return out, errors.Join(err, z.Close())
}

const notBuilt = `<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Varve</title></head><body>
<h1>The console is not in this binary</h1>
<p>The appliance is running, and everything but the console is here. This binary was built without it: build with
<code>make build</code>, which needs Node.js and fetches npm packages once.</p>
<p>Meanwhile: <a href="/api/docs">the API</a>, and on the appliance <code>varve --data DIR status</code>.</p>
</body></html>
`
