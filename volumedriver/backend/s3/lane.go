package s3

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/s3utils"

	"varve/volumedriver/backend"
)

// The budgets.
const (
	laneRead = iota
	laneUpload
	laneScrub
	laneReplication
	lanes
)

// lane is one budget: its connections, and a place for each request under way. As the transport of its client it also keeps
// what comes back within limits.
type lane struct {
	core      *minio.Core
	transport *http.Transport
	scheme    string
	host      string
	amazon    bool
	places    chan struct{}

	date atomic.Pointer[string] // the store's clock when it last refused something

	requests, failed, waiting, sent, received atomic.Int64
}

const (
	dialTimeout    = 5 * time.Second
	idleTimeout    = 60 * time.Second
	headerBytesMax = 64 << 10
	bufferBytes    = 256 << 10
	answerBytesMax = 8 << 20  // of a list: 1000 names with what belongs to them
	replyBytesMax  = 64 << 10 // of anything else that is not an object's bytes
)

func newLane(u *url.URL, trust *tls.Config, n int) *lane {
	dialer := &net.Dialer{Timeout: dialTimeout, KeepAlive: 15 * time.Second}
	one := new(http.Protocols)
	one.SetHTTP1(true)
	return &lane{
		scheme: u.Scheme, host: u.Host, amazon: s3utils.IsAmazonEndpoint(*u), places: make(chan struct{}, n),
		transport: &http.Transport{
			Proxy: http.ProxyFromEnvironment, DialContext: dialer.DialContext, TLSClientConfig: trust, TLSHandshakeTimeout: dialTimeout,
			MaxIdleConns: n, MaxIdleConnsPerHost: n, MaxConnsPerHost: n, IdleConnTimeout: idleTimeout, Protocols: one,
			MaxResponseHeaderBytes: headerBytesMax, DisableCompression: true, WriteBufferSize: bufferBytes, ReadBufferSize: bufferBytes,
		},
	}
}

// lane gives the budget that a call is charged to.
func (s *Store) lane(ctx context.Context, foreground int) *lane {
	switch backend.ClassOf(ctx) {
	case backend.Scrub:
		return s.lanes[laneScrub]
	case backend.Replication:
		return s.lanes[laneReplication]
	default:
		return s.lanes[foreground]
	}
}

// enter waits for a place.
func (l *lane) enter(ctx context.Context) error {
	l.waiting.Add(1)
	defer l.waiting.Add(-1)
	select {
	case l.places <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (l *lane) leave() { <-l.places }

func (l *lane) stats() LaneStats {
	return LaneStats{Requests: l.requests.Load(), Failed: l.failed.Load(), Waiting: l.waiting.Load(), Active: int64(len(l.places)),
		Sent: l.sent.Load(), Received: l.received.Load()}
}

// RoundTrip implements http.RoundTripper.
func (l *lane) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme != l.scheme || req.URL.Host != l.host && !(l.amazon && strings.HasSuffix(req.URL.Hostname(), ".amazonaws.com")) {
		return nil, fmt.Errorf("request for %s://%s kept back: the endpoint is %s://%s", req.URL.Scheme, req.URL.Host, l.scheme, l.host)
	}
	l.requests.Add(1)
	if req.ContentLength > 0 {
		l.sent.Add(req.ContentLength)
	}
	resp, err := l.transport.RoundTrip(req)
	if err != nil {
		l.failed.Add(1)
		return nil, err
	}
	if resp.StatusCode >= 400 && resp.StatusCode != http.StatusNotFound && resp.StatusCode != http.StatusPreconditionFailed {
		l.failed.Add(1)
	}
	if err := l.bound(req, resp); err != nil {
		resp.Body.Close()
		l.failed.Add(1)
		return nil, err
	}
	return resp, nil
}

// bound limits what is read of a response, and unmasks an error that comes with status 200.
func (l *lane) bound(req *http.Request, resp *http.Response) error {
	switch {
	case resp.StatusCode >= 300 && resp.StatusCode < 400 && resp.StatusCode != http.StatusNotModified:
		return &redirectError{status: resp.StatusCode, to: clip(resp.Header.Get("Location")), region: clip(resp.Header.Get("X-Amz-Bucket-Region"))}
	case req.Method == http.MethodHead:
		return nil
	case resp.StatusCode >= 300:
		resp.Body = l.limited(resp.Body, replyBytesMax)
		date := resp.Header.Get("Date")
		l.date.Store(&date)
		return nil
	case req.Method == http.MethodPut || req.Method == http.MethodDelete:
		return unmask(resp)
	case req.Method == http.MethodGet && req.Header.Get("Range") != "":
		want := rangeBytes(req.Header.Get("Range"))
		if resp.ContentLength > want {
			return fmt.Errorf("a range of %d bytes is answered with %d: %w", want, resp.ContentLength, errWrongLength)
		}
		resp.Body = l.limited(resp.Body, want)
		return nil
	default:
		if resp.ContentLength > answerBytesMax {
			return fmt.Errorf("answer of %d bytes, more than %d: %w", resp.ContentLength, answerBytesMax, errWrongLength)
		}
		resp.Body = l.limited(resp.Body, answerBytesMax)
		return nil
	}
}

var errWrongLength = errors.New("wrong length")

// rangeBytes reads "bytes=a-b" as this package writes it.
func rangeBytes(header string) int64 {
	a, b, _ := strings.Cut(strings.TrimPrefix(header, "bytes="), "-")
	from, err1 := strconv.ParseInt(a, 10, 64)
	to, err2 := strconv.ParseInt(b, 10, 64)
	if err1 != nil || err2 != nil || to < from {
		return 0
	}
	return to - from + 1
}

// unmask reads the short body of a write's success and turns an <Error> in it into the status it should have had: some stores
// send 200 before they know, to keep the connection alive.
func unmask(resp *http.Response) error {
	body, err := io.ReadAll(io.LimitReader(resp.Body, replyBytesMax+1))
	resp.Body.Close()
	if err != nil {
		return fmt.Errorf("read the reply of a write: %w", err)
	}
	if len(body) > replyBytesMax {
		return fmt.Errorf("reply of a write is longer than %d bytes: %w", replyBytesMax, errWrongLength)
	}
	resp.Body = io.NopCloser(bytes.NewReader(body))
	if bytes.Contains(body, []byte("<Error>")) || bytes.Contains(body, []byte("<Error ")) {
		resp.StatusCode, resp.Status = http.StatusInternalServerError, "500 error in a reply with status 200"
	}
	return nil
}

// limited is a body of which at most n bytes are read.
func (l *lane) limited(body io.ReadCloser, n int64) io.ReadCloser {
	return &limitedBody{io.LimitReader(body, n), body, &l.received}
}

type limitedBody struct {
	r     io.Reader
	body  io.Closer
	count *atomic.Int64
}

func (b *limitedBody) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	b.count.Add(int64(n))
	return n, err
}

func (b *limitedBody) Close() error { return b.body.Close() }

func clip(s string) string {
	if len(s) > 200 {
		s = s[:200] + "…"
	}
	return strconv.QuoteToGraphic(s)
}
