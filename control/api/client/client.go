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

	v1 "varve/control/api/v1"
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

// call sends in, unless nil, as JSON and decodes the answer into out, unless nil.
func (c *Client) call(ctx context.Context, method, path string, query url.Values, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("%s %s: %w", method, path, err)
		}
		body = bytes.NewReader(b)
	}
	target := c.base + (&url.URL{Path: path, RawQuery: query.Encode()}).String()
	r, err := http.NewRequestWithContext(ctx, method, target, body)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	if in != nil {
		r.Header.Set("Content-Type", "application/json")
	}
	if c.token != "" {
		r.Header.Set("Authorization", "Bearer "+c.token)
	}
	resp, err := c.http.Do(r)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, answerBytesMax))
	if err != nil {
		return fmt.Errorf("%w: the answer broke off: %w", ErrUnreachable, err)
	}
	if resp.StatusCode >= 300 {
		return failure(resp, answer)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(answer, out); err != nil {
		return fmt.Errorf("%s %s: the answer does not decode: %w", method, path, err)
	}
	return nil
}

func failure(resp *http.Response, answer []byte) error {
	p := &v1.Problem{}
	if resp.Header.Get("Content-Type") != "application/problem+json" || json.Unmarshal(answer, p) != nil || p.Status == 0 {
		return fmt.Errorf("%w: %s answered %s, which is no answer of an appliance", ErrUnreachable, resp.Request.URL.Host, resp.Status)
	}
	return p
}

// VPools lists all vPools.
func (c *Client) VPools(ctx context.Context) (out []v1.VPool, err error) {
	return out, c.call(ctx, http.MethodGet, v1.Prefix+"/vpools", nil, nil, &out)
}

// VPool returns one vPool.
func (c *Client) VPool(ctx context.Context, name string) (out v1.VPool, err error) {
	return out, c.call(ctx, http.MethodGet, v1.Prefix+"/vpools/"+name, nil, nil, &out)
}

// CreateVPool makes a vPool.
func (c *Client) CreateVPool(ctx context.Context, in v1.VPoolCreate) (out v1.VPool, err error) {
	return out, c.call(ctx, http.MethodPost, v1.Prefix+"/vpools", nil, in, &out)
}

// PatchVPool changes who may mount.
func (c *Client) PatchVPool(ctx context.Context, name string, in v1.VPoolPatch) (out v1.VPool, err error) {
	return out, c.call(ctx, http.MethodPatch, v1.Prefix+"/vpools/"+name, nil, in, &out)
}

// DeleteVPool takes an empty vPool away.
func (c *Client) DeleteVPool(ctx context.Context, name string) error {
	return c.call(ctx, http.MethodDelete, v1.Prefix+"/vpools/"+name, nil, nil, nil)
}

// VDisks lists the vDisks of a vPool, or of all for "".
func (c *Client) VDisks(ctx context.Context, vpool string) (out []v1.VDisk, err error) {
	q := url.Values{}
	if vpool != "" {
		q.Set("vpool", vpool)
	}
	return out, c.call(ctx, http.MethodGet, v1.Prefix+"/vdisks", q, nil, &out)
}

// VDisk returns one vDisk by "vpool/path".
func (c *Client) VDisk(ctx context.Context, name string) (out v1.VDisk, err error) {
	return out, c.call(ctx, http.MethodGet, v1.Prefix+"/vdisks/"+name, nil, nil, &out)
}

// CreateVDisk makes a sparse vDisk.
func (c *Client) CreateVDisk(ctx context.Context, name string, size int64) (out v1.VDisk, err error) {
	in := v1.VDiskCreate{Name: name, Size: v1.Size(size)}
	return out, c.call(ctx, http.MethodPost, v1.Prefix+"/vdisks", nil, in, &out)
}

// ResizeVDisk sets a vDisk's size; a smaller one needs shrink.
func (c *Client) ResizeVDisk(ctx context.Context, name string, size int64, shrink bool) (out v1.VDisk, err error) {
	s := v1.Size(size)
	return out, c.call(ctx, http.MethodPatch, v1.Prefix+"/vdisks/"+name, nil, v1.VDiskPatch{Size: &s, Shrink: shrink}, &out)
}

// RenameVDisk moves a vDisk to another name of its vPool.
func (c *Client) RenameVDisk(ctx context.Context, name, to string) (out v1.VDisk, err error) {
	return out, c.call(ctx, http.MethodPatch, v1.Prefix+"/vdisks/"+name, nil, v1.VDiskPatch{Name: to}, &out)
}

// DeleteVDisk takes a vDisk away, also while a client has it open if force.
func (c *Client) DeleteVDisk(ctx context.Context, name string, force bool) error {
	return c.call(ctx, http.MethodDelete, v1.Prefix+"/vdisks/"+name, url.Values{"force": {strconv.FormatBool(force)}}, nil, nil)
}

// Nodes lists all nodes.
func (c *Client) Nodes(ctx context.Context) (out []v1.Node, err error) {
	return out, c.call(ctx, http.MethodGet, v1.Prefix+"/nodes", nil, nil, &out)
}

// Node returns one node by name or id.
func (c *Client) Node(ctx context.Context, name string) (out v1.Node, err error) {
	return out, c.call(ctx, http.MethodGet, v1.Prefix+"/nodes/"+name, nil, nil, &out)
}

// Status of the appliance.
func (c *Client) Status(ctx context.Context) (out v1.Status, err error) {
	return out, c.call(ctx, http.MethodGet, v1.Prefix+"/status", nil, nil, &out)
}

// Explain says where the block at a byte offset of a vDisk is.
func (c *Client) Explain(ctx context.Context, name string, offset int64) (out v1.Explanation, err error) {
	q := url.Values{"offset": {strconv.FormatInt(offset, 10)}}
	return out, c.call(ctx, http.MethodGet, v1.Prefix+"/explain/"+name, q, nil, &out)
}

// Rebuild opens a vPool again from its backend.
func (c *Client) Rebuild(ctx context.Context, in v1.RebuildRequest) (out v1.RebuildReport, err error) {
	return out, c.call(ctx, http.MethodPost, v1.Prefix+"/rebuild", nil, in, &out)
}

// Ready is nil when the appliance's exports are open.
func (c *Client) Ready(ctx context.Context) error {
	return c.call(ctx, http.MethodGet, "/readyz", nil, nil, nil)
}
