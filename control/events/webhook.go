package events

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"github.com/google/uuid"

	"varve/control/state"
)

// Message is an event as a webhook or an AMQP consumer gets it.
type Message struct {
	ID    uuid.UUID       `json:"id"`
	Seq   uint64          `json:"seq"`
	At    time.Time       `json:"at"`
	Type  string          `json:"type"`
	Topic string          `json:"topic"`
	Key   string          `json:"key,omitempty"`
	Node  *uuid.UUID      `json:"node,omitempty"`
	Data  json.RawMessage `json:"data,omitempty"`
}

func message(e state.Event) ([]byte, error) {
	m := Message{ID: e.ID, Seq: e.Seq, At: time.Unix(0, int64(e.At)).UTC(), Type: e.Type, Topic: e.Topic, Key: e.Key, Data: e.Data}
	if e.Node != uuid.Nil {
		m.Node = &e.Node
	}
	b, err := json.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("event %s: %w", e.ID, err)
	}
	return b, nil
}

// Headers of a webhook's request.
const (
	HeaderID        = "Varve-Event-Id"
	HeaderType      = "Varve-Event-Type"
	HeaderSignature = "Varve-Signature"
)

const (
	webhookTimeout  = 20 * time.Second
	answerBytesMax  = 4 << 10
	signatureMaxAge = 5 * time.Minute
)

// webhook posts events one by one, each when the one before was taken with a 2xx.
type webhook struct {
	url    string
	key    []byte
	client *http.Client
	now    func() time.Time
}

func newWebhook(s state.Sink, key []byte) (*webhook, error) {
	roots, err := rootsOf(s)
	if err != nil {
		return nil, err
	}
	return &webhook{url: s.URL, key: key, now: time.Now, client: &http.Client{
		Timeout: webhookTimeout,
		Transport: &http.Transport{DialContext: dialer(s.Local), TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
			MaxIdleConnsPerHost: 1, IdleConnTimeout: time.Minute, MaxResponseHeaderBytes: 16 << 10},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// rootsOf is what a receiver's certificate is checked against.
func rootsOf(s state.Sink) (*x509.CertPool, error) {
	roots, err := x509.SystemCertPool()
	if err != nil {
		roots = x509.NewCertPool()
	}
	if s.CA != "" && !roots.AppendCertsFromPEM([]byte(s.CA)) {
		return nil, fmt.Errorf("sink %s: its CA holds no certificate", s.Name)
	}
	return roots, nil
}

// Sign makes the signature of a body: t=<unix seconds>,v1=<hex of HMAC-SHA256 over "<t>.<body>">.
func Sign(key, body []byte, at time.Time) string {
	t := strconv.FormatInt(at.Unix(), 10)
	return "t=" + t + ",v1=" + hex.EncodeToString(mac(key, t, body))
}

func mac(key []byte, t string, body []byte) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(t + "."))
	h.Write(body)
	return h.Sum(nil)
}

// Verify is what a receiver does with the signature. One that is older than five minutes does not count.
func Verify(key, body []byte, signature string, now time.Time) bool {
	var t int64
	var sum string
	if n, err := fmt.Sscanf(signature, "t=%d,v1=%64s", &t, &sum); n != 2 || err != nil {
		return false
	}
	got, err := hex.DecodeString(sum)
	if err != nil || now.Sub(time.Unix(t, 0)).Abs() > signatureMaxAge {
		return false
	}
	return hmac.Equal(got, mac(key, strconv.FormatInt(t, 10), body))
}

func (w *webhook) send(ctx context.Context, batch []state.Event, done func(state.Event)) error {
	for _, e := range batch {
		if err := w.post(ctx, e); err != nil {
			return err
		}
		done(e)
	}
	return nil
}

func (w *webhook) post(ctx context.Context, e state.Event) error {
	body, err := message(e)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, w.url, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("post event: %w", err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("User-Agent", "varve-webhook")
	req.Header.Set(HeaderID, e.ID.String())
	req.Header.Set(HeaderType, e.Type)
	if len(w.key) > 0 {
		req.Header.Set(HeaderSignature, Sign(w.key, body, w.now()))
	}
	res, err := w.client.Do(req)
	if err != nil {
		return fmt.Errorf("post event %s: %w", e.ID, err)
	}
	defer res.Body.Close()
	if _, err := io.Copy(io.Discard, io.LimitReader(res.Body, answerBytesMax)); err != nil {
		return fmt.Errorf("post event %s: read the answer: %w", e.ID, err)
	}
	if res.StatusCode < 200 || res.StatusCode > 299 {
		return fmt.Errorf("post event %s: answered %d", e.ID, res.StatusCode)
	}
	return nil
}

func (w *webhook) close() { w.client.CloseIdleConnections() }
