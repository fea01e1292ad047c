// Package s3test gives S3 stores to tests: Fake is one in this process, Gateway a real one in a process of its own, and Fault
// stands before either and spoils what passes.
//
// What a Fault does to a request is decided when it arrives, from a seed:
//
//	Delay        wait first                               Status     answer with this status and an S3 error code
//	Drop         cut the connection, the store unasked    LostReply  let the store do it, then cut the connection
//	Error200     let the store do it or not, answer 200 with an <Error> body
//	Truncate     cut the reply's body in the middle       Flip       change one bit of it
//	SlowReply    send the reply's body in small pieces    Strip    take a header off the request
package s3test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"
)

// Bucket is the one that every store of this package has.
const Bucket = "varve-test"

// FakeHandler is a store in memory. It checks no signatures.
func FakeHandler() (http.Handler, error) {
	mem := s3mem.New()
	if err := mem.CreateBucket(Bucket); err != nil {
		return nil, err
	}
	return gofakes3.New(mem, gofakes3.WithLogger(gofakes3.DiscardLog()), gofakes3.WithTimeSkewLimit(0)).Server(), nil
}

// Fake serves a store in memory behind a Fault until the test ends.
func Fake(t testing.TB) (endpoint string, f *Fault) {
	t.Helper()
	h, err := FakeHandler()
	if err != nil {
		t.Fatal(err)
	}
	f = NewFault(h)
	srv := httptest.NewServer(f)
	t.Cleanup(srv.Close)
	return srv.URL, f
}

// Forward is a handler that passes requests on to another endpoint as they are, signatures included.
func Forward(endpoint string) (http.Handler, error) {
	u, err := url.Parse(endpoint)
	if err != nil {
		return nil, err
	}
	return &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			host := r.In.Host
			r.SetURL(u)
			r.Out.Host = host
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
		Transport:    &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 64},
	}, nil
}

// Spoil says which requests a Fault spoils, and how. Requests that match are counted from Add on.
type Spoil struct {
	Method string  // "" for all
	Key    string  // part of the path; "" for all
	Query  string  // part of the query; "" for all
	From   int64   // the first to spoil; 0 and 1 are the first that matches
	Times  int64   // how many from there; 0 for all further ones
	Rate   float64 // spoil only this part of them, at random; 0 for all

	Delay     time.Duration
	Status    int    // answer with it, without asking the store
	Code      string // S3's error code that goes with Status; "" for no body
	Drop      bool
	LostReply bool
	Error200  bool
	Truncate  bool
	Flip      bool
	SlowReply time.Duration // between pieces of 4 KiB
	Applied   bool          // with Status and Error200: the store did it all the same
	Header    [2]string     // set in the reply; an empty value removes it
	Strip     string        // header of the request that the store does not get to see
}

// Fault passes requests on, apart from those that it spoils.
type Fault struct {
	inner http.Handler

	mu       sync.Mutex
	rnd      *rand.Rand
	spoils   []*Added
	down     bool
	done     func(r *http.Request)
	requests map[string]int64 // by method
	active   int
	activeMx int
}

// Added is a Spoil in effect.
type Added struct {
	f           *Fault
	s           Spoil
	seen, fired int64
}

// NewFault wraps a handler, with seed 1.
func NewFault(inner http.Handler) *Fault {
	return &Fault{inner: inner, rnd: rand.New(rand.NewPCG(1, 0)), requests: map[string]int64{}}
}

// Seed starts the random choices anew.
func (f *Fault) Seed(seed uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rnd = rand.New(rand.NewPCG(seed, 0))
}

// SetDown cuts every connection at once, or ends that.
func (f *Fault) SetDown(down bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.down = down
}

// OnDone has f called after each request that was passed on unspoiled and answered.
func (f *Fault) OnDone(done func(r *http.Request)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.done = done
}

// Requests counts those of a method, "" for all.
func (f *Fault) Requests(method string) (n int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for m, k := range f.requests {
		if method == "" || method == m {
			n += k
		}
	}
	return n
}

// ActiveMax is the largest number of requests that were under way at a time.
func (f *Fault) ActiveMax() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.activeMx
}

// Add spoils requests. The first of the Spoils added that picks a request is the only one to spoil it.
func (f *Fault) Add(s Spoil) *Added {
	if s.From == 0 {
		s.From = 1
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	a := &Added{f: f, s: s}
	f.spoils = append(f.spoils, a)
	return a
}

// SetSpoils takes the place of all that were added.
func (f *Fault) SetSpoils(spoils ...Spoil) {
	f.mu.Lock()
	f.spoils = nil
	f.mu.Unlock()
	for _, s := range spoils {
		f.Add(s)
	}
}

// Seen is the number of requests that matched.
func (a *Added) Seen() int64 {
	a.f.mu.Lock()
	defer a.f.mu.Unlock()
	return a.seen
}

// Fired is the number of requests that were spoiled.
func (a *Added) Fired() int64 {
	a.f.mu.Lock()
	defer a.f.mu.Unlock()
	return a.fired
}

// Remove ends it.
func (a *Added) Remove() {
	a.f.mu.Lock()
	defer a.f.mu.Unlock()
	a.f.spoils = slices.DeleteFunc(a.f.spoils, func(o *Added) bool { return o == a })
}

// pick gives what is to be done to a request, and a random number to do it with.
func (f *Fault) pick(r *http.Request) (s Spoil, chance uint64, spoiled bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.down {
		return Spoil{Drop: true}, 0, true
	}
	for _, a := range f.spoils {
		if a.s.Method != "" && a.s.Method != r.Method || !strings.Contains(r.URL.Path, a.s.Key) || !strings.Contains(r.URL.RawQuery, a.s.Query) {
			continue
		}
		a.seen++
		if spoiled || a.seen < a.s.From || a.s.Times > 0 && a.seen >= a.s.From+a.s.Times || a.s.Rate > 0 && f.rnd.Float64() >= a.s.Rate {
			continue
		}
		a.fired++
		s, chance, spoiled = a.s, f.rnd.Uint64(), true
	}
	return s, chance, spoiled
}

func (f *Fault) count(method string, by int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if by > 0 {
		f.requests[method]++
	}
	f.active += by
	f.activeMx = max(f.activeMx, f.active)
}

// ServeHTTP implements http.Handler.
func (f *Fault) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.count(r.Method, 1)
	defer f.count(r.Method, -1)
	s, chance, spoiled := f.pick(r)
	if !spoiled {
		f.inner.ServeHTTP(w, r)
		f.mu.Lock()
		done := f.done
		f.mu.Unlock()
		if done != nil {
			done(r)
		}
		return
	}
	if s.Delay > 0 {
		// Only when the body is read does net/http notice that the client has gone.
		body, err := io.ReadAll(r.Body)
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		t := time.NewTimer(s.Delay)
		defer t.Stop()
		select {
		case <-t.C:
		case <-r.Context().Done():
			panic(http.ErrAbortHandler)
		}
	}
	if s.Strip != "" {
		r.Header.Del(s.Strip)
	}
	switch {
	case s.Drop:
		panic(http.ErrAbortHandler)
	case s.Status != 0 || s.Error200:
		if s.Applied {
			f.inner.ServeHTTP(httptest.NewRecorder(), r)
		} else {
			io.Copy(io.Discard, r.Body)
		}
		answer(w, r, s)
	case s.LostReply:
		f.inner.ServeHTTP(httptest.NewRecorder(), r)
		panic(http.ErrAbortHandler)
	case s.Truncate || s.Flip || s.SlowReply > 0 || s.Header[0] != "":
		rec := httptest.NewRecorder()
		f.inner.ServeHTTP(rec, r)
		change(w, rec, s, chance)
	default:
		f.inner.ServeHTTP(w, r)
	}
}

func answer(w http.ResponseWriter, r *http.Request, s Spoil) {
	status, code := s.Status, s.Code
	if s.Error200 {
		status = http.StatusOK
		if code == "" {
			code = "InternalError"
		}
	}
	body := ""
	if code != "" {
		body = fmt.Sprintf(`<?xml version="1.0" encoding="UTF-8"?><Error><Code>%s</Code><Message>spoiled</Message><Resource>%s</Resource></Error>`, code, r.URL.Path)
	}
	w.Header().Set("Content-Type", "application/xml")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	if s.Header[0] != "" {
		w.Header().Set(s.Header[0], s.Header[1])
	}
	w.WriteHeader(status)
	if r.Method != http.MethodHead {
		io.WriteString(w, body)
	}
}

// change passes on a reply that is not what the store sent.
func change(w http.ResponseWriter, rec *httptest.ResponseRecorder, s Spoil, chance uint64) {
	body := bytes.Clone(rec.Body.Bytes())
	for k, v := range rec.Header() {
		w.Header()[k] = v
	}
	switch {
	case s.Header[0] != "" && s.Header[1] == "":
		w.Header().Del(s.Header[0])
	case s.Header[0] != "":
		w.Header().Set(s.Header[0], s.Header[1])
	}
	if w.Header().Get("Content-Length") == "" {
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	}
	if s.Flip && len(body) > 0 {
		bit := chance % uint64(len(body)*8)
		body[bit/8] ^= 1 << (bit % 8)
	}
	w.WriteHeader(rec.Code)
	if s.Truncate {
		w.Write(body[:len(body)/2])
		if fl, ok := w.(http.Flusher); ok {
			fl.Flush()
		}
		panic(http.ErrAbortHandler)
	}
	if s.SlowReply == 0 {
		w.Write(body)
		return
	}
	for piece := range slices.Chunk(body, 4096) {
		w.Write(piece)
		if fl, ok := w.(http.Flusher); ok {
			fl.Flush()
		}
		time.Sleep(s.SlowReply)
	}
}
