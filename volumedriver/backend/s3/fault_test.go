package s3

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"varve/volumedriver/backend"
	"varve/volumedriver/backend/backendtest"
	"varve/volumedriver/backend/s3/s3test"
)

// rough spoils a part of all requests in every way that a call has to get over.
func rough(f *s3test.Fault) []*s3test.Added {
	return []*s3test.Added{
		f.Add(s3test.Spoil{Rate: 0.01, Status: 503, Code: "SlowDown"}),
		f.Add(s3test.Spoil{Rate: 0.01, Status: 500, Code: "InternalError", Applied: true}),
		f.Add(s3test.Spoil{Rate: 0.01, Drop: true}),
		f.Add(s3test.Spoil{Rate: 0.01, LostReply: true}),
		f.Add(s3test.Spoil{Method: "PUT", Rate: 0.01, Error200: true}),
		f.Add(s3test.Spoil{Method: "PUT", Rate: 0.01, Error200: true, Applied: true}),
		f.Add(s3test.Spoil{Method: "GET", Rate: 0.02, Truncate: true}),
		f.Add(s3test.Spoil{Method: "GET", Query: "!", Rate: 0.02, Delay: 20 * time.Millisecond}),
	}
}

func TestConformanceThroughFaults(t *testing.T) {
	g := s3test.StartGateway(t)
	forward, err := s3test.Forward(g.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	var fired int64
	n := 0
	for _, under := range []string{"fake", "versitygw"} {
		backendtest.Run(t, func(t *testing.T) backend.Backend {
			n++
			var inner http.Handler = forward
			cfg := gatewayConfig(g, fmt.Sprintf("f%d", n))
			if under == "fake" {
				var err error
				if inner, err = s3test.FakeHandler(); err != nil {
					t.Fatal(err)
				}
			}
			f := s3test.NewFault(inner)
			f.Seed(uint64(n))
			srv := httptest.NewServer(f)
			spoils := rough(f)
			t.Cleanup(func() {
				srv.Close()
				for _, a := range spoils {
					fired += a.Fired()
				}
			})
			cfg.Endpoint = srv.URL
			return mustOpen(t, cfg)
		})
	}
	http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	if fired < 50 {
		t.Errorf("only %d requests were spoiled", fired)
	}
	fmt.Printf("» S3: in-process store and versitygw behind the fault server pass the conformance suite, %d requests spoiled\n", fired)
}

func wantBytes(t *testing.T, s *Store, name string, want []byte) {
	t.Helper()
	o, err := s.Open(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, o.Size())
	if err := errors.Join(o.ReadAt(t.Context(), got, 0), o.Close()); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("object %s has other bytes (%d, want %d), %v", name, len(got), len(want), err)
	}
}

// TestPutsOfUnknownOutcome: whatever happened to the first attempts, the call ends with the object there, once, and no error.
func TestPutsOfUnknownOutcome(t *testing.T) {
	endpoint, f := s3test.Fake(t)
	s := mustOpen(t, testConfig(endpoint))
	for i, spoil := range []s3test.Spoil{
		{LostReply: true}, {Drop: true}, {Error200: true}, {Error200: true, Applied: true}, {Status: 500, Code: "InternalError"},
		{Status: 500, Code: "InternalError", Applied: true}, {Status: 503, Code: "SlowDown", Applied: true}, {Status: 503},
		{Status: 502}, {Status: 409, Code: "ConditionalRequestConflict"}, {Status: 409, Code: "OperationAborted", Applied: true},
		{Status: 400, Code: "RequestTimeout"}, {Status: 400, Code: "BadDigest"}, {Status: 429, Code: "TooManyRequests"},
	} {
		name, want := fmt.Sprintf("v/%d", i), pattern(byte(i), 50_000)
		spoil.Method, spoil.Key, spoil.Times = "PUT", name, 2
		a := f.Add(spoil)
		if err := s.Put(t.Context(), name, want); err != nil {
			t.Errorf("put through %+v: %v", spoil, err)
			continue
		}
		if a.Fired() == 0 {
			t.Errorf("%+v was not met", spoil)
		}
		a.Remove()
		wantBytes(t, s, name, want)
		if err := s.Put(t.Context(), name, []byte("late")); !errors.Is(err, backend.ErrExist) {
			t.Errorf("late put after %+v: %v", spoil, err)
		}
		wantBytes(t, s, name, want)
	}
}

// TestAcknowledgedButNotStored: a store that says 200 and keeps nothing, or keeps a part, is not believed.
func TestAcknowledgedButNotStored(t *testing.T) {
	endpoint, f := s3test.Fake(t)
	s := mustOpen(t, testConfig(endpoint))
	f.Add(s3test.Spoil{Method: "PUT", Key: "gone", Status: 200})
	if err := s.Put(t.Context(), "gone", []byte("bytes")); err == nil || errors.Is(err, backend.ErrExist) {
		t.Errorf("put that was not kept: %v", err)
	}
	f.Add(s3test.Spoil{Method: "PUT", Key: "wrong", Header: [2]string{"X-Amz-Checksum-Crc32c", "AAAAAA=="}})
	if err := s.Put(t.Context(), "wrong", []byte("bytes")); err == nil {
		t.Error("put whose reply names another checksum succeeded")
	}
	f.Add(s3test.Spoil{Method: "HEAD", Key: "unconfirmed", Status: 500})
	if err := s.Put(t.Context(), "unconfirmed", []byte("bytes")); err == nil {
		t.Error("put that nobody confirms succeeded")
	}
}

// TestReadsThatComeBackWrong: a body, length or range that is not what was asked for is never handed on.
func TestReadsThatComeBackWrong(t *testing.T) {
	endpoint, f := s3test.Fake(t)
	s := mustOpen(t, testConfig(endpoint))
	want := pattern(1, 200_000)
	if err := s.Put(t.Context(), "o", want); err != nil {
		t.Fatal(err)
	}
	o, err := s.Open(t.Context(), "o")
	if err != nil {
		t.Fatal(err)
	}
	if err := o.ReadAt(t.Context(), make([]byte, 1), 150_000); err != nil { // uses up what came with the opening
		t.Fatal(err)
	}
	for _, spoil := range []s3test.Spoil{
		{Truncate: true}, {Drop: true}, {Status: 500}, {Status: 503, Code: "SlowDown"}, {Status: 403, Code: "AccessDenied"},
		{Status: 404, Code: "NoSuchBucket"}, {Header: [2]string{"Content-Range", "bytes 0-9/200000"}}, {Header: [2]string{"Content-Range", "bytes 100-5099/9"}},
		{Header: [2]string{"Content-Range", ""}}, {Header: [2]string{"Content-Length", "17"}}, {Strip: "Range", Flip: true},
		{Delay: 10 * time.Millisecond, SlowReply: time.Millisecond},
	} {
		spoil.Method, spoil.Times = "GET", 2
		a := f.Add(spoil)
		got := make([]byte, 5000)
		if err := o.ReadAt(t.Context(), got, 100); err != nil || !bytes.Equal(got, want[100:5100]) {
			t.Errorf("read through %+v: %v", spoil, err)
		}
		if a.Fired() == 0 {
			t.Errorf("%+v was not met", spoil)
		}
		a.Remove()
	}
	f.Add(s3test.Spoil{Method: "GET", Header: [2]string{"ETag", `"another"`}})
	short := testConfig(endpoint)
	short.Patience = 100 * time.Millisecond
	o2 := &object{s: mustOpen(t, short), name: "o", key: o.(*object).key, size: o.Size(), etag: o.(*object).etag}
	err = o2.ReadAt(t.Context(), make([]byte, 10), 5)
	if e, ok := errors.AsType[*Error](err); !ok || e.Code != "Replaced" {
		t.Errorf("read of a replaced object: %v", err)
	}
}

// TestRequestsPerRead: opening an SCO and reading its header takes one request, each read one more.
func TestRequestsPerRead(t *testing.T) {
	endpoint, f := s3test.Fake(t)
	s := mustOpen(t, testConfig(endpoint))
	if err := s.Put(t.Context(), "o", pattern(1, 1<<20)); err != nil {
		t.Fatal(err)
	}
	before := f.Requests("")
	o, err := s.Open(t.Context(), "o")
	if err != nil {
		t.Fatal(err)
	}
	if err := o.ReadAt(t.Context(), make([]byte, openBytes), 0); err != nil {
		t.Fatal(err)
	}
	if n := f.Requests("") - before; n != 1 {
		t.Errorf("opening and reading the header took %d requests", n)
	}
	for i := range 10 {
		if err := o.ReadAt(t.Context(), make([]byte, 4096), int64(i)*4096); err != nil {
			t.Fatal(err)
		}
	}
	if n := f.Requests("") - before; n != 11 {
		t.Errorf("that and ten reads took %d requests", n)
	}
}

// TestUploadsNeverStarveReads fills every budget but that of reads with requests that do not end.
func TestUploadsNeverStarveReads(t *testing.T) {
	endpoint, f := s3test.Fake(t)
	cfg := testConfig(endpoint)
	cfg.Attempt = time.Minute
	s := mustOpen(t, cfg)
	want := pattern(1, 300_000)
	if err := s.Put(t.Context(), "o", want); err != nil {
		t.Fatal(err)
	}
	f.Add(s3test.Spoil{Method: "PUT", Delay: time.Hour})
	f.Add(s3test.Spoil{Method: "GET", Key: "scrubbed", Delay: time.Hour})
	f.Add(s3test.Spoil{Method: "POST", Delay: time.Hour})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() { s.Put(ctx, fmt.Sprintf("u/%d", i), want) })
		wg.Go(func() { s.Put(backend.WithClass(ctx, backend.Replication), fmt.Sprintf("r/%d", i), want) })
		wg.Go(func() { s.Open(backend.WithClass(ctx, backend.Scrub), "scrubbed") })
		wg.Go(func() { s.DeleteAll(ctx, []string{"x"}) })
	}
	for st := s.Stats(); st.Uploads.Active < 8 || st.Scrubs.Active < 4 || st.Replications.Active < 4; st = s.Stats() {
		time.Sleep(time.Millisecond)
	}
	var worst atomic.Int64
	var readers sync.WaitGroup
	for range 16 {
		readers.Go(func() {
			for range 10 {
				start := time.Now()
				o, err := s.Open(ctx, "o")
				if err == nil {
					err = o.ReadAt(ctx, make([]byte, 4096), 100_000)
				}
				if err != nil {
					t.Error(err)
				}
				if d := int64(time.Since(start)); d > worst.Load() {
					worst.Store(d)
				}
			}
		})
	}
	readers.Wait()
	if d := time.Duration(worst.Load()); d > 2*time.Second {
		t.Errorf("a read took %s while uploads hang", d)
	}
	if n := f.ActiveMax(); n > 64+8+4+4 {
		t.Errorf("%d requests at a time", n)
	}
	fmt.Printf("» S3: with 400 uploads, copies, scrubs and deletes hanging, the worst of 160 reads took %s\n",
		time.Duration(worst.Load()).Round(time.Millisecond))
	cancel()
	wg.Wait()
}

// TestMistakesOfTheOperator are refused at once, by a text that says what to do.
func TestMistakesOfTheOperator(t *testing.T) {
	g := s3test.StartGateway(t)
	good := gatewayConfig(g, "x")
	try := func(what, want string, change func(*Config)) {
		t.Helper()
		cfg := good
		change(&cfg)
		start := time.Now()
		s, err := Open(cfg)
		if err == nil {
			_, err = s.Probe(t.Context())
			s.Close()
		}
		e, ok := errors.AsType[*Error](err)
		if !ok || !strings.Contains(e.Remedy(), want) {
			t.Errorf("%s: %v (%v)", what, err, e)
			return
		}
		if took := time.Since(start); took > 3*time.Second {
			t.Errorf("%s took %s", what, took)
		}
		if k := cfg.Credentials.SecretKey; k != "" && strings.Contains(err.Error(), k) {
			t.Errorf("%s: the secret is in the error", what)
		}
	}
	try("wrong access key", "right keys", func(c *Config) { c.Credentials.AccessKey = "nobody" })
	try("wrong secret", "right keys", func(c *Config) { c.Credentials.SecretKey = "guess-that-is-wrong" })
	try("no bucket", "make the bucket", func(c *Config) { c.Bucket = "no-such-bucket" })
	try("wrong region", "region=", func(c *Config) { c.Region = "eu-west-9" })
	try("no credentials", "access key", func(c *Config) { c.Credentials = Credentials{} })
	try("nobody listens", "up and reachable", func(c *Config) { c.Endpoint = "http://127.0.0.1:1" })
	try("endpoint with a path", "address of the S3 service", func(c *Config) { c.Endpoint += "/x" })
	try("bucket's name", "name of a bucket", func(c *Config) { c.Bucket = "Ab" })
	try("prefix", "without slashes", func(c *Config) { c.Prefix = "/x" })

	endpoint, f := s3test.Fake(t)
	good = testConfig(endpoint)
	spoiled := func(spoil s3test.Spoil) func(*Config) {
		return func(*Config) {
			a := f.Add(spoil)
			t.Cleanup(a.Remove)
		}
	}
	f.Seed(1)
	for _, c := range []struct {
		what, want string
		s3test.Spoil
	}{
		{"rights", "s3:PutObject", s3test.Spoil{Status: 403, Code: "AccessDenied"}},
		{"quota", "quota", s3test.Spoil{Status: 403, Code: "QuotaExceeded"}},
		{"full", "space", s3test.Spoil{Status: 507}},
		{"redirect", "endpoint=", s3test.Spoil{Status: 307, Header: [2]string{"Location", "http://192.0.2.1/x"}}},
		{"clock", "NTP", s3test.Spoil{Status: 403, Code: "RequestTimeTooSkewed", Header: [2]string{"Date", "Mon, 02 Jan 2006 15:04:05 GMT"}}},
	} {
		f.SetSpoils()
		try(c.what, c.want, spoiled(c.Spoil))
	}
	f.SetSpoils(s3test.Spoil{Status: 403, Code: "RequestTimeTooSkewed",
		Header: [2]string{"Date", time.Now().Add(time.Hour).UTC().Format(http.TimeFormat)}})
	err := mustOpen(t, good).Put(t.Context(), "x")
	if err == nil || !strings.Contains(err.Error(), "this node's clock is 1h0m0s behind") && !strings.Contains(err.Error(), "clock is 59m59s behind") {
		t.Errorf("clock an hour apart: %v", err)
	}
	f.SetSpoils(s3test.Spoil{Status: 507})
	if err := mustOpen(t, good).Put(t.Context(), "x"); !errors.Is(err, backend.ErrNoSpace) {
		t.Errorf("put to a full store: %v", err)
	}
}

func TestStoreThatIgnoresTheCondition(t *testing.T) {
	endpoint, f := s3test.Fake(t)
	f.Add(s3test.Spoil{Method: "PUT", Strip: "If-None-Match"})
	v, err := mustOpen(t, testConfig(endpoint)).Probe(t.Context())
	if err != nil || !slices.Equal(v.Unsafe, []string{"create-only"}) || !strings.Contains(v.Findings["create-only"], "NOT SAFE") {
		t.Errorf("%+v %v", v, err)
	}
}

func TestCredentialsChangeWithoutRestart(t *testing.T) {
	g := s3test.StartGateway(t)
	s := mustOpen(t, gatewayConfig(g, "rotate"))
	want := pattern(4, 100_000)
	if err := s.Put(t.Context(), "o", want); err != nil {
		t.Fatal(err)
	}
	o, err := s.Open(t.Context(), "o")
	if err != nil {
		t.Fatal(err)
	}
	s.SetCredentials(Credentials{s3test.AccessKey, "revoked"})
	if err := s.Put(t.Context(), "p", want); kindOf(err) != refusal {
		t.Errorf("put with revoked keys: %v", err)
	}
	read := make(chan error, 1)
	got := make([]byte, 4096)
	go func() { read <- o.ReadAt(t.Context(), got, 50_000) }()
	select {
	case err := <-read:
		t.Errorf("a guest's read does not wait for better keys: %v", err)
	case <-time.After(300 * time.Millisecond):
	}
	s.SetCredentials(Credentials{s3test.AccessKey, s3test.SecretKey})
	if err := <-read; err != nil || !bytes.Equal(got, want[50_000:54_096]) {
		t.Errorf("read after the change: %v", err)
	}
	if err := s.Put(t.Context(), "p", want); err != nil {
		t.Errorf("put after the change: %v", err)
	}
	for _, text := range []string{fmt.Sprint(s.cfg), fmt.Sprintf("%+v", s.cfg), fmt.Sprintf("%#v", s.cfg), fmt.Sprintf("%v %#v", s.keys.current, s.keys.current)} {
		if strings.Contains(text, s3test.SecretKey) {
			t.Errorf("the secret is printed: %s", text)
		}
	}
}

func TestOwnAuthority(t *testing.T) {
	h, err := s3test.FakeHandler()
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewTLSServer(h)
	defer srv.Close()
	cfg := testConfig(srv.URL)
	cfg.Patience = 100 * time.Millisecond
	_, err = mustOpen(t, cfg).Probe(t.Context())
	if e, ok := errors.AsType[*Error](err); !ok || !strings.Contains(e.Remedy(), "--ca-file") {
		t.Errorf("unknown authority: %v", err)
	}
	cfg.CA = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	if v, err := mustOpen(t, cfg).Probe(t.Context()); err != nil || len(v.Unsafe) > 0 {
		t.Errorf("own authority: %+v %v", v, err)
	}
}

func TestDeleteMany(t *testing.T) {
	for _, batch := range []bool{true, false} {
		endpoint, f := s3test.Fake(t)
		s := mustOpen(t, testConfig(endpoint))
		var names []string
		for i := range 1300 {
			names = append(names, fmt.Sprintf("d/%d", i))
			if i%100 == 0 {
				if err := s.Put(t.Context(), names[i]); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := s.Put(t.Context(), "d/stays"); err != nil {
			t.Fatal(err)
		}
		if !batch {
			f.Add(s3test.Spoil{Method: "POST", Status: 501, Code: "NotImplemented"})
			names = names[:201]
		}
		if err := backend.DeleteAll(t.Context(), s, names); err != nil {
			t.Fatal(err)
		}
		infos, err := s.List(t.Context(), "d/", "", 100)
		if left := len(infos); err != nil || batch && left != 1 || !batch && left != 11 {
			t.Errorf("%d objects are left, %v", left, err)
		}
		if batch && f.Requests("POST") != 2 {
			t.Errorf("1300 deletions took %d requests", f.Requests("POST"))
		}
	}
}

// TestOutage: calls that only ask give up after a while, a read goes on, and all is well when the store is back.
func TestOutage(t *testing.T) {
	endpoint, f := s3test.Fake(t)
	s := mustOpen(t, testConfig(endpoint))
	if err := s.Put(t.Context(), "o", pattern(1, 100_000)); err != nil {
		t.Fatal(err)
	}
	o, err := s.Open(t.Context(), "o")
	if err != nil {
		t.Fatal(err)
	}
	f.SetDown(true)
	if err := s.Put(t.Context(), "p"); err == nil {
		t.Error("put to a store that is down")
	}
	if _, err := s.Stat(t.Context(), "o"); err == nil || errors.Is(err, backend.ErrNotExist) {
		t.Errorf("stat at a store that is down: %v", err)
	}
	if _, err := s.List(t.Context(), "", "", 1); err == nil {
		t.Error("list at a store that is down")
	}
	read := make(chan error, 1)
	go func() { read <- o.ReadAt(t.Context(), make([]byte, 10), 90_000) }()
	time.Sleep(50 * time.Millisecond)
	f.SetDown(false)
	if err := <-read; err != nil {
		t.Errorf("read across the outage: %v", err)
	}
	cfg := testConfig(endpoint)
	cfg.Patience = 100 * time.Millisecond
	hasty := mustOpen(t, cfg)
	f.SetDown(true)
	if _, err := hasty.Open(t.Context(), "o"); err == nil || errors.Is(err, backend.ErrNotExist) {
		t.Errorf("open at a store that stays down: %v", err)
	}
}

func TestCloseEndsWhatIsUnderWay(t *testing.T) {
	endpoint, f := s3test.Fake(t)
	s := mustOpen(t, testConfig(endpoint))
	f.Add(s3test.Spoil{Delay: time.Hour})
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if err := s.Put(t.Context(), "x"); !errors.Is(err, fs.ErrClosed) {
				t.Errorf("put while closing: %v", err)
			}
		})
	}
	for s.Stats().Uploads.Active < 8 {
		time.Sleep(time.Millisecond)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	wg.Wait()
	if _, err := s.Stat(t.Context(), "x"); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("stat after close: %v", err)
	}
}

// TestAnswersAreBounded: a store that never ends its answers costs no more than their limits.
func TestAnswersAreBounded(t *testing.T) {
	var sent atomic.Int64
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("kind") == "" && strings.Contains(r.URL.Path, "refused") {
			w.WriteHeader(http.StatusBadRequest)
		}
		junk := bytes.Repeat([]byte("<Contents><Key>x</Key>"), 5000)
		for r.Context().Err() == nil {
			n, err := w.Write(junk)
			if sent.Add(int64(n)); err != nil {
				return
			}
		}
	}))
	defer srv.Close()
	cfg := testConfig(srv.URL)
	cfg.Patience, cfg.Attempt = 10*time.Millisecond, 200*time.Millisecond
	s := mustOpen(t, cfg)
	if _, err := s.List(t.Context(), "", "", 10); err == nil {
		t.Error("endless list succeeded")
	}
	if err := s.Put(t.Context(), "refused"); err == nil {
		t.Error("put with an endless error succeeded")
	}
	if err := s.Put(t.Context(), "x"); err == nil {
		t.Error("put with an endless reply succeeded")
	}
	if o, err := s.Open(t.Context(), "x"); err == nil {
		t.Errorf("open with an endless body of unknown length succeeded: %d bytes", o.Size())
	}
	if st := s.Stats(); st.Reads.Received+st.Uploads.Received > 20*answerBytesMax {
		t.Errorf("%+v were read", st)
	}
}
