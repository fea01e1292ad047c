// Package client calls the customer API over the appliance's unix socket, or over HTTPS with the cluster's CA pinned.
//
//	c, err := client.New(client.Config{Socket: "DATA/varve.sock"})
//	c, err := client.New(client.Config{URL: "https://host:8443", Token: token, CAFile: "ca.crt"})
//
// Errors: a *v1.Problem is the appliance's answer (Status, Code, Remedy); ErrUnreachable means that none came.
package client

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	v1 "varve/control/api/customer"
	"varve/control/api/internal"
)

// ErrUnreachable: no answer came.
var ErrUnreachable = errors.New("appliance is not reachable")

const (
	dialTimeout    = 5 * time.Second
	answerBytesMax = 64 << 20
)

// Config says where the appliance is: Socket, or URL with Token and, unless the host's own CAs will do, CAFile.
type Config struct {
	Socket string
	URL    string
	Token  string
	CAFile string
}

// Client of one appliance.
type Client struct {
	base  string
	token string
	http  *http.Client
}

// New checks the configuration and connects to nothing yet.
func New(cfg Config) (*Client, error) {
	if (cfg.Socket == "") == (cfg.URL == "") {
		return nil, errors.New("api client: give a socket or a URL")
	}
	t := &http.Transport{MaxIdleConns: 2, IdleConnTimeout: 10 * time.Second, TLSHandshakeTimeout: dialTimeout}
	c := &Client{token: cfg.Token, http: &http.Client{Transport: t, CheckRedirect: noRedirect}}
	if cfg.Socket != "" {
		c.base = "http://varve"
		t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) { return dialUnix(ctx, cfg.Socket) }
		return c, nil
	}
	u, err := url.Parse(cfg.URL)
	if err != nil || u.Scheme != "https" || u.Host == "" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" {
		return nil, fmt.Errorf("api client: %q is not a URL like https://host:8443", cfg.URL)
	}
	c.base = "https://" + u.Host
	t.DialContext = (&net.Dialer{Timeout: dialTimeout}).DialContext
	t.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12}
	if cfg.CAFile != "" {
		pem, err := os.ReadFile(cfg.CAFile)
		if err != nil {
			return nil, fmt.Errorf("api client: read the CA: %w", err)
		}
		t.TLSClientConfig.RootCAs = x509.NewCertPool()
		if !t.TLSClientConfig.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("api client: %s holds no certificate", cfg.CAFile)
		}
	}
	return c, nil
}

// ReadToken reads a token from a file such as DATA/admin.token.
func ReadToken(path string) (string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("read token: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

func noRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// dialUnix connects through the directory's descriptor, because a socket's address has 108 bytes.
func dialUnix(ctx context.Context, path string) (net.Conn, error) {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	d := net.Dialer{Timeout: dialTimeout}
	return d.DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(path)))
}

// Close lets go of idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// request is one call.
type request struct {
	method, path string // path escaped
	query        url.Values
	header       http.Header
	in, out      any       // JSON, unless nil
	stream       io.Reader // the body instead of in, of size bytes
	size         int64
}

// Raw is an answer as it came.
type Raw struct {
	Status int
	Header http.Header
	Body   []byte
}

// call sends a request and decodes the answer.
func (c *Client) call(ctx context.Context, q request) error {
	var body []byte
	if q.in != nil {
		var err error
		if body, err = json.Marshal(q.in); err != nil {
			return fmt.Errorf("%s %s: %w", q.method, q.path, err)
		}
	}
	raw, err := c.send(ctx, q, body)
	if err != nil {
		return err
	}
	if q.out == nil || raw.Status == http.StatusNoContent || len(raw.Body) == 0 {
		return nil
	}
	if err := json.Unmarshal(raw.Body, q.out); err != nil {
		return fmt.Errorf("%s %s: the answer does not decode: %w", q.method, q.path, err)
	}
	return nil
}

// Do sends any request to a path of the appliance, such as /api/customer/v1/vdisks?limit=5, with a JSON body unless it is nil.
func (c *Client) Do(ctx context.Context, method, path string, header http.Header, body []byte) (Raw, error) {
	return c.send(ctx, request{method: method, path: path, header: header}, body)
}

func (c *Client) send(ctx context.Context, q request, body []byte) (Raw, error) {
	resp, err := c.open(ctx, q, body)
	if err != nil {
		return Raw{}, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, answerBytesMax))
	if err != nil {
		return Raw{}, fmt.Errorf("%w: the answer broke off: %w", ErrUnreachable, err)
	}
	if resp.StatusCode >= 300 {
		return Raw{}, failure(resp, answer)
	}
	return Raw{Status: resp.StatusCode, Header: resp.Header, Body: answer}, nil
}

func (c *Client) open(ctx context.Context, q request, body []byte) (*http.Response, error) {
	target := c.base + q.path
	if len(q.query) > 0 {
		target += "?" + q.query.Encode()
	}
	r, err := http.NewRequestWithContext(ctx, q.method, target, bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", q.method, q.path, err)
	}
	if q.stream != nil {
		r.Body, r.ContentLength, r.GetBody = io.NopCloser(q.stream), q.size, nil
		r.Header.Set("Content-Type", "application/octet-stream")
	}
	for k, v := range q.header {
		r.Header[k] = v
	}
	if body != nil && r.Header.Get("Content-Type") == "" {
		r.Header.Set("Content-Type", "application/json")
	}
	if c.token != "" {
		r.Header.Set("Authorization", "Bearer "+c.token)
	}
	resp, err := c.http.Do(r)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	return resp, nil
}

// at is the path of an object below the customer API.
func at(parts ...string) string {
	var b strings.Builder
	b.WriteString(v1.Prefix)
	for _, p := range parts {
		b.WriteString("/" + url.PathEscape(p))
	}
	return b.String()
}

// Change says how a change is to be made: only if the object is still at Rev (0: whatever it is), really or as a dry run, confirmed by
// the object's name.
type Change struct {
	Rev     uint64
	Confirm string
	DryRun  bool
	Force   bool
	// Purge deletes a vDisk for good instead of into the trash.
	Purge bool
}

func (g Change) header() http.Header {
	if g.Rev == 0 {
		return http.Header{"If-Match": {"*"}}
	}
	return http.Header{"If-Match": {`"` + strconv.FormatUint(g.Rev, 10) + `"`}}
}

func (g Change) query() url.Values {
	q := url.Values{}
	if g.Confirm != "" {
		q.Set("confirm", g.Confirm)
	}
	if g.DryRun {
		q.Set("dryRun", "true")
	}
	if g.Force {
		q.Set("force", "true")
	}
	if g.Purge {
		q.Set("purge", "true")
	}
	return q
}

const pageLimit = 1000

// list reads all pages of a list.
func list[T any](ctx context.Context, c *Client, path string, query url.Values) ([]T, error) {
	out := []T{}
	q := url.Values{"limit": {strconv.Itoa(pageLimit)}}
	for k, v := range query {
		q[k] = v
	}
	for {
		var page struct {
			Items []T    `json:"items"`
			Next  string `json:"next"`
		}
		if err := c.call(ctx, request{method: http.MethodGet, path: path, query: q, out: &page}); err != nil {
			return nil, err
		}
		out = append(out, page.Items...)
		if page.Next == "" {
			return out, nil
		}
		q.Set("cursor", page.Next)
	}
}

// Select narrows and orders a list: Filter and Sort as the API has them.
type Select struct{ Filter, Sort string }

func (s Select) query() url.Values {
	q := url.Values{}
	if s.Filter != "" {
		q.Set("filter", s.Filter)
	}
	if s.Sort != "" {
		q.Set("sort", s.Sort)
	}
	return q
}

// List reads all pages of a list of the customer API, such as List[v1.User](ctx, c, Select{}, "users").
func List[T any](ctx context.Context, c *Client, s Select, path ...string) ([]T, error) {
	return list[T](ctx, c, at(path...), s.query())
}

// Get reads one object, such as Get[v1.User](ctx, c, "users", "alice").
func Get[T any](ctx context.Context, c *Client, path ...string) (out T, err error) {
	return out, c.call(ctx, request{method: http.MethodGet, path: at(path...), out: &out})
}

// Post makes something. A dry run's effect is returned instead of out.
func Post[T any](ctx context.Context, c *Client, in any, g Change, path ...string) (out T, effect *v1.Effect, err error) {
	return send[T](ctx, c, http.MethodPost, in, g, nil, path)
}

// Patch changes something.
func Patch[T any](ctx context.Context, c *Client, in any, g Change, path ...string) (out T, effect *v1.Effect, err error) {
	return send[T](ctx, c, http.MethodPatch, in, g, g.header(), path)
}

// Put sets something.
func Put[T any](ctx context.Context, c *Client, in any, g Change, path ...string) (out T, effect *v1.Effect, err error) {
	return send[T](ctx, c, http.MethodPut, in, g, g.header(), path)
}

// Delete takes something away.
func Delete(ctx context.Context, c *Client, g Change, path ...string) (effect *v1.Effect, err error) {
	_, effect, err = send[struct{}](ctx, c, http.MethodDelete, nil, g, g.header(), path)
	return effect, err
}

// Upload posts what a reader gives, as it is.
func Upload(ctx context.Context, c *Client, from io.Reader, size int64, out any, path ...string) error {
	return c.call(ctx, request{method: http.MethodPost, path: at(path...), stream: from, size: size, out: out})
}

// Call makes any call to a path of the customer API with more parameters in its query; out gets the answer, or effect that of a dry run.
func Call(ctx context.Context, c *Client, method string, path []string, query map[string]string, in any, out *json.RawMessage, g Change) (effect *v1.Effect, err error) {
	q := request{method: method, path: at(path...), query: g.query(), in: in, out: out}
	for k, v := range query {
		q.query.Set(k, v)
	}
	if method != http.MethodGet && method != http.MethodPost {
		q.header = g.header()
	}
	if g.DryRun {
		effect = &v1.Effect{}
		q.out = effect
	}
	return effect, c.call(ctx, q)
}

func send[T any](ctx context.Context, c *Client, method string, in any, g Change, header http.Header, path []string) (out T, effect *v1.Effect, err error) {
	q := request{method: method, path: at(path...), query: g.query(), header: header, in: in}
	if g.DryRun {
		effect = &v1.Effect{}
		q.out = effect
	} else {
		q.out = &out
	}
	if err := c.call(ctx, q); err != nil {
		return out, nil, err
	}
	return out, effect, nil
}

func failure(resp *http.Response, answer []byte) error {
	p := &v1.Problem{}
	if resp.Header.Get("Content-Type") != "application/problem+json" || json.Unmarshal(answer, p) != nil || p.Status == 0 {
		return fmt.Errorf("%w: %s answered %s, which is no answer of an appliance", ErrUnreachable, resp.Request.URL.Host, resp.Status)
	}
	return p
}

// VPools lists all vPools.
func (c *Client) VPools(ctx context.Context) ([]v1.VPool, error) {
	return List[v1.VPool](ctx, c, Select{}, "vpools")
}

// VPool returns one vPool.
func (c *Client) VPool(ctx context.Context, name string) (v1.VPool, error) {
	return Get[v1.VPool](ctx, c, "vpools", name)
}

// CreateVPool makes a vPool.
func (c *Client) CreateVPool(ctx context.Context, in v1.VPoolCreate) (v1.VPool, error) {
	out, _, err := Post[v1.VPool](ctx, c, in, Change{}, "vpools")
	return out, err
}

// PatchVPool changes who may mount.
func (c *Client) PatchVPool(ctx context.Context, name string, in v1.VPoolPatch, g Change) (v1.VPool, error) {
	out, _, err := Patch[v1.VPool](ctx, c, in, g, "vpools", name)
	return out, err
}

// SetVPoolCredentials changes the credentials of a vPool's bucket.
func (c *Client) SetVPoolCredentials(ctx context.Context, name string, k v1.Credentials) error {
	return c.call(ctx, request{method: http.MethodPut, path: at("vpools", name, "credentials"), in: k})
}

// DeleteVPool takes an empty vPool away.
func (c *Client) DeleteVPool(ctx context.Context, name string) error {
	_, err := Delete(ctx, c, Change{Confirm: name}, "vpools", name)
	return err
}

// VDisks lists the vDisks of a vPool, or of all for "".
func (c *Client) VDisks(ctx context.Context, vpool string, s Select) ([]v1.VDisk, error) {
	q := s.query()
	if vpool != "" {
		q.Set("vpool", vpool)
	}
	return list[v1.VDisk](ctx, c, at("vdisks"), q)
}

// VDisk returns one vDisk by "vpool/path" or id.
func (c *Client) VDisk(ctx context.Context, name string) (v1.VDisk, error) {
	return Get[v1.VDisk](ctx, c, "vdisks", name)
}

// CreateVDisk makes a sparse vDisk.
func (c *Client) CreateVDisk(ctx context.Context, name string, size int64) (v1.VDisk, error) {
	out, _, err := Post[v1.VDisk](ctx, c, v1.VDiskCreate{Name: name, Size: v1.Size(size)}, Change{}, "vdisks")
	return out, err
}

// ResizeVDisk sets a vDisk's size; a smaller one needs shrink.
func (c *Client) ResizeVDisk(ctx context.Context, name string, size int64, shrink bool) (v1.VDisk, error) {
	s, g := v1.Size(size), Change{}
	if shrink {
		g.Confirm = name
	}
	out, _, err := Patch[v1.VDisk](ctx, c, v1.VDiskPatch{Size: &s, Shrink: shrink}, g, "vdisks", name)
	return out, err
}

// RenameVDisk moves a vDisk to another name of its vPool.
func (c *Client) RenameVDisk(ctx context.Context, name, to string) (v1.VDisk, error) {
	out, _, err := Patch[v1.VDisk](ctx, c, v1.VDiskPatch{Name: to}, Change{}, "vdisks", name)
	return out, err
}

// DeleteVDisk takes a vDisk away for good, also while a client has it open if force.
func (c *Client) DeleteVDisk(ctx context.Context, name string, force bool) error {
	_, err := Delete(ctx, c, Change{Confirm: name, Force: force, Purge: true}, "vdisks", name)
	return err
}

// Nodes lists all nodes.
func (c *Client) Nodes(ctx context.Context) ([]v1.Node, error) {
	return List[v1.Node](ctx, c, Select{}, "nodes")
}

// Node returns one node by name or id.
func (c *Client) Node(ctx context.Context, name string) (v1.Node, error) {
	return Get[v1.Node](ctx, c, "nodes", name)
}

// Status of the appliance.
func (c *Client) Status(ctx context.Context) (v1.Status, error) {
	return Get[v1.Status](ctx, c, "status")
}

// Explain says where the block at a byte offset of a vDisk is.
func (c *Client) Explain(ctx context.Context, name string, offset int64) (out v1.Explanation, err error) {
	q := url.Values{"offset": {strconv.FormatInt(offset, 10)}}
	return out, c.call(ctx, request{method: http.MethodGet, path: at("vdisks", name, "explain"), query: q, out: &out})
}

// Rebuild opens a vPool again from its backend.
func (c *Client) Rebuild(ctx context.Context, in v1.RebuildRequest) (out v1.RebuildReport, err error) {
	return out, c.call(ctx, request{method: http.MethodPost, path: at("rebuild"), in: in, out: &out})
}

// SetupCode makes a new code for the first administrator. Only the appliance's own socket gives one.
func (c *Client) SetupCode(ctx context.Context) (string, error) {
	var out internal.SetupCode
	err := c.call(ctx, request{method: http.MethodPost, path: internal.Prefix + "/setup/code", out: &out})
	return out.Code, err
}

// Login trades a password, and a code where a second factor is set up, for a token of an hour.
func (c *Client) Login(ctx context.Context, name, password, code string) (token string, err error) {
	form := url.Values{"grant_type": {"password"}, "username": {name}, "password": {password}}
	if code != "" {
		form.Set("code", code)
	}
	raw, err := c.send(ctx, request{method: http.MethodPost, path: internal.Prefix + "/oauth/token",
		header: http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}}, []byte(form.Encode()))
	if err != nil {
		return "", err
	}
	var out internal.GrantedToken
	if err := json.Unmarshal(raw.Body, &out); err != nil {
		return "", fmt.Errorf("sign in: the answer does not decode: %w", err)
	}
	return out.AccessToken, nil
}

// Ready is nil when the appliance's exports are open.
func (c *Client) Ready(ctx context.Context) error {
	_, err := c.send(ctx, request{method: http.MethodGet, path: "/readyz"}, nil)
	return err
}
