package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"varve/test/harness"
	"varve/test/nbdclient"
	"varve/volumedriver/backend/s3/s3test"
)

// The rows of S3 (G17-G20) print lines of their own. They compare ours with itself at another round-trip time, with what the store gives to a plain
// HTTP client, and with others who use such a store (rivals.go). The store is this program again, as a process of its own: objects in memory, each answer delayed by the round-trip time.

// s3ServerEnv makes this program that store, on the address that it holds.
const s3ServerEnv = "BENCH_S3_SERVER"

var s3Rows = []string{"G17", "G18", "G19", "G20"}

var roundTrips = []time.Duration{0, 5 * time.Millisecond, 20 * time.Millisecond, 50 * time.Millisecond}

// link lets so many bytes a second pass, in both directions together; 0: all there are.
type link struct {
	mu   sync.Mutex
	rate float64
	free time.Time
}

func (l *link) set(rate float64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rate = rate
}

// pass waits until n bytes have passed.
func (l *link) pass(n int) {
	l.mu.Lock()
	if l.rate == 0 {
		l.mu.Unlock()
		return
	}
	now := time.Now()
	if l.free.Before(now) {
		l.free = now
	}
	l.free = l.free.Add(time.Duration(float64(n) / l.rate * float64(time.Second)))
	wait := l.free.Sub(now)
	l.mu.Unlock()
	time.Sleep(wait)
}

// handler has bodies of requests and replies pass the link.
func (l *link) handler(inner http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Body = &linkBody{r.Body, l}
		inner.ServeHTTP(&linkWriter{w, l}, r)
	})
}

type linkBody struct {
	io.ReadCloser
	l *link
}

func (b *linkBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p[:min(len(p), 64<<10)])
	b.l.pass(n)
	return n, err
}

type linkWriter struct {
	http.ResponseWriter
	l *link
}

func (w *linkWriter) Write(p []byte) (written int, err error) {
	for len(p) > 0 && err == nil {
		var n int
		n, err = w.ResponseWriter.Write(p[:min(len(p), 64<<10)])
		w.l.pass(n)
		p, written = p[n:], written+n
	}
	return written, err
}

// serveS3 serves until the process is killed. POST /-/set?rtt=20ms&down=true changes it, and its link by rate=125e6 bytes a second, GET
// /-/count counts requests.
func serveS3(address string) error {
	inner, err := s3test.FakeHandler()
	if err != nil {
		return err
	}
	wire := new(link)
	f := s3test.NewFault(wire.handler(inner))
	mux := http.NewServeMux()
	mux.HandleFunc("/-/set", func(w http.ResponseWriter, r *http.Request) {
		d, err := time.ParseDuration(r.FormValue("rtt"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		f.SetSpoils()
		if d > 0 {
			f.SetSpoils(s3test.Spoil{Delay: d})
		}
		f.SetDown(r.FormValue("down") == "true")
		if rate := r.FormValue("rate"); rate != "" {
			v, err := strconv.ParseFloat(rate, 64)
			if err != nil || v < 0 {
				http.Error(w, "rate", http.StatusBadRequest)
				return
			}
			wire.set(v)
		}
	})
	mux.HandleFunc("/-/count", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, f.Requests("")) })
	mux.Handle("/", f)
	return http.ListenAndServe(address, mux)
}

type s3Bench struct {
	endpoint string
	http     *http.Client
	node     *harness.Node
	dir      string
	time     time.Duration
	repeat   int
}

// s3Run measures the rows of S3 that are wanted.
func s3Run(ctx context.Context, r *recorder, dir string) error {
	if !slices.ContainsFunc(s3Rows, r.settings.wantsRow) {
		return nil
	}
	b := &s3Bench{http: &http.Client{Timeout: time.Minute, Transport: &http.Transport{MaxIdleConnsPerHost: 16}}, dir: dir, time: r.settings.runTime,
		repeat: r.settings.repeat}
	store, err := b.startStore()
	if err != nil {
		return err
	}
	defer store.Kill()
	if err := b.startNode(); err != nil {
		return err
	}
	defer func() { b.node.Kill() }()
	for _, row := range []struct {
		name string
		run  func(context.Context) error
	}{{"G17", b.flushLatency}, {"G18", b.rivals}, {"G19", b.coldReads}, {"G20", func(ctx context.Context) error { return b.onEachLink(ctx, b.outage) }}} {
		if !r.settings.wantsRow(row.name) || ctx.Err() != nil {
			continue
		}
		if err := row.run(ctx); err != nil {
			return fmt.Errorf("%s: %w", row.name, err)
		}
	}
	return ctx.Err()
}

func (b *s3Bench) startStore() (*harness.Process, error) {
	port, err := harness.FreePort()
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	address := net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
	b.endpoint = "http://" + address
	if err := os.Setenv(s3ServerEnv, address); err != nil {
		return nil, err
	}
	defer os.Unsetenv(s3ServerEnv)
	p, err := harness.Start(self)
	if err != nil {
		return nil, err
	}
	return p, harness.Poll(10*time.Second, func() error { return b.set(0, false) })
}

func (b *s3Bench) set(rtt time.Duration, down bool) error {
	return b.post(fmt.Sprintf("rtt=%s&down=%v", rtt, down))
}

func (b *s3Bench) post(settings string) error {
	resp, err := b.http.Post(b.endpoint+"/-/set?"+settings, "", nil)
	if err != nil {
		return err
	}
	return errors.Join(resp.Body.Close(), notOK(resp))
}

func notOK(resp *http.Response) error {
	if resp.StatusCode/100 == 2 {
		return nil
	}
	return errors.New(resp.Status)
}

func (b *s3Bench) requests() (n int64, err error) {
	resp, err := b.http.Get(b.endpoint + "/-/count")
	if err != nil {
		return 0, err
	}
	_, err = fmt.Fscan(resp.Body, &n)
	return n, errors.Join(err, resp.Body.Close())
}

func (b *s3Bench) startNode() error {
	for k, v := range map[string]string{"VARVE_S3_ACCESS_KEY": "bench", "VARVE_S3_SECRET_KEY": "bench-secret"} {
		if err := os.Setenv(k, v); err != nil {
			return err
		}
	}
	var err error
	b.node, err = harness.NewNode(filepath.Join(b.dir, "s3"), "--log-size", logSize, "--log-level", "error", "--s3",
		fmt.Sprintf("s3://%s/bench?endpoint=%s", s3test.Bucket, b.endpoint))
	if err != nil {
		return err
	}
	if err := b.node.Start(); err != nil {
		return err
	}
	_, err = b.node.CLI("vdisk", "create", "default/s3", "--size", "8GiB")
	return err
}

func (b *s3Bench) dial() (*nbdclient.Client, error) {
	return nbdclient.Dial("tcp", b.node.NBDAddr(), "default/s3")
}

// median and p99 of durations, which are sorted.
func quantiles(d []time.Duration) (median, p99 time.Duration) {
	slices.Sort(d)
	if len(d) == 0 {
		return 0, 0
	}
	return d[len(d)/2], d[len(d)*99/100]
}

// flushLatency is a 4 KiB write and a flush, one after the other, while the log is uploaded.
func (b *s3Bench) flushLatency(ctx context.Context) error {
	c, err := b.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	took := make([][]time.Duration, len(roundTrips))
	r := rand.New(rand.NewPCG(1, 1))
	p := make([]byte, 4096)
	fillRandom(r, p)
	for rep := range b.repeat {
		for k := range roundTrips {
			i := k
			if rep%2 == 1 {
				i = len(roundTrips) - 1 - k
			}
			if err := b.set(roundTrips[i], false); err != nil {
				return err
			}
			for end := time.Now().Add(b.time / 2); time.Now().Before(end) && ctx.Err() == nil; {
				start := time.Now()
				if err := errors.Join(c.Do(nbdclient.Write, 0, r.Int64N(1<<18)*4096, 0, p), c.Do(nbdclient.Flush, 0, 0, 0, nil)); err != nil {
					return err
				}
				took[i] = append(took[i], time.Since(start))
			}
		}
	}
	base, _ := quantiles(took[0])
	for i, rtt := range roundTrips {
		m, p99 := quantiles(took[i])
		line := fmt.Sprintf("G17  4K write + flush, S3 at %-5s  median %4d us, p99 %5d us", rtt, m.Microseconds(), p99.Microseconds())
		if i > 0 {
			line += fmt.Sprintf(", %.2f of that at 0 (goal <= 1.1: %s)", float64(m)/float64(base), met(float64(m) <= 1.1*float64(base)))
		}
		fmt.Println(line)
	}
	return nil
}

// fillRandom makes bytes that do not compress.
func fillRandom(r *rand.Rand, p []byte) {
	for i := 0; i+8 <= len(p); i += 8 {
		for j, v := 0, r.Uint64(); j < 8; j, v = j+1, v>>8 {
			p[i+j] = byte(v)
		}
	}
}

const (
	s3AreaAt    = 2 << 30 // where the area of the cold reads begins
	s3AreaBytes = 256 << 20
	lineBytes   = 64 << 10 // of the read cache
)

// coldReads writes an area, restarts without a cache, and reads what nobody has read before.
func (b *s3Bench) coldReads(ctx context.Context) error {
	if err := b.set(0, false); err != nil {
		return err
	}
	if err := b.fillArea(s3AreaAt, s3AreaBytes); err != nil {
		return err
	}
	if err := errors.Join(b.drained(ctx), b.restartCold()); err != nil {
		return err
	}
	c, err := b.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	p := make([]byte, 4096)
	for off := int64(0); off < s3AreaBytes; off += 1 << 20 { // opens every object
		if err := c.Do(nbdclient.Read, 0, s3AreaAt+off, 0, p); err != nil {
			return err
		}
	}
	lines := rand.New(rand.NewPCG(3, 3)).Perm(s3AreaBytes / lineBytes)
	lines = slices.DeleteFunc(lines, func(i int) bool { return i%(1<<20/lineBytes) <= 1 })
	for _, rtt := range roundTrips {
		if err := b.set(rtt, false); err != nil {
			return err
		}
		before, err := b.requests()
		if err != nil {
			return err
		}
		const reads = 150
		var took []time.Duration
		for range reads {
			off := s3AreaAt + int64(lines[0])*lineBytes + lineBytes/2
			lines = lines[1:]
			start := time.Now()
			if err := c.Do(nbdclient.Read, 0, off, 0, p); err != nil {
				return err
			}
			took = append(took, time.Since(start))
		}
		after, err := b.requests()
		if err != nil {
			return err
		}
		m, p99 := quantiles(took)
		line := fmt.Sprintf("G19  cold 4K random read, S3 at %-5s  median %6d us, p99 %6d us, %.2f requests a read", rtt, m.Microseconds(), p99.Microseconds(),
			float64(after-before)/reads)
		if rtt > 0 {
			line += fmt.Sprintf(", %.2f round trips", float64(m)/float64(rtt))
		}
		if rtt == 20*time.Millisecond {
			line += fmt.Sprintf(" (goal <= 1.15 round trips, <= 1.02 requests: %s)", met(m <= rtt*115/100 && float64(after-before) <= 1.02*reads))
		}
		fmt.Println(line)
	}
	return b.onEachLink(ctx, b.coldSequential)
}

// Links to the store. Without a limit it is the processor that limits: the store, the bench and ours share it.
var s3Links = []struct {
	name string
	rate float64 // bytes a second
}{{"1 Gbit/s", 125e6}, {"loopback", 0}}

// onEachLink runs a measurement over each link.
func (b *s3Bench) onEachLink(ctx context.Context, run func(ctx context.Context, link string) error) error {
	for _, l := range s3Links {
		if err := b.post(fmt.Sprintf("rtt=0s&rate=%.0f", l.rate)); err != nil {
			return err
		}
		if err := run(ctx, l.name); err != nil {
			return fmt.Errorf("%s: %w", l.name, err)
		}
	}
	return b.post("rtt=0s&rate=0")
}

// coldSequential reads the area once through, in order, and compares with eight plain ranged GETs at a time.
func (b *s3Bench) coldSequential(ctx context.Context, link string) error {
	const rtt = 20 * time.Millisecond
	var ratios, ours []float64
	for range min(b.repeat, 3) {
		if err := errors.Join(b.set(rtt, false), b.restartCold()); err != nil {
			return err
		}
		plain, err := b.plainGets(ctx)
		if err != nil {
			return err
		}
		c, err := b.dial()
		if err != nil {
			return err
		}
		p := make([]byte, 1<<20)
		start := time.Now()
		for off := int64(0); off < s3AreaBytes; off += int64(len(p)) {
			if err := c.Do(nbdclient.Read, 0, s3AreaAt+off, 0, p); err != nil {
				c.Close()
				return err
			}
		}
		rate := s3AreaBytes / time.Since(start).Seconds() / 1e6
		c.Close()
		ours, ratios = append(ours, rate), append(ratios, rate/plain)
	}
	o, ratio := spreadOf(ours), spreadOf(ratios)
	fmt.Printf("G19  cold sequential read, 1 MiB one at a time, S3 at %s over %s  %.0f MB/s (%.0f to %.0f), %.2f of 8 plain GETs of 1 MiB at a time (goal >= 0.8: %s)\n",
		rtt, link, o.Median, o.Min, o.Max, ratio.Median, met(ratio.Median >= 0.8))
	return nil
}

// plainGets is what the store gives to a plain client: MB/s of ranged GETs, eight at a time.
func (b *s3Bench) plainGets(ctx context.Context) (float64, error) {
	object := b.endpoint + "/" + s3test.Bucket + "/plain"
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, object, bytes.NewReader(make([]byte, 16<<20)))
	if err != nil {
		return 0, err
	}
	resp, err := b.http.Do(req)
	if err != nil {
		return 0, err
	}
	if err := errors.Join(resp.Body.Close(), notOK(resp)); err != nil {
		return 0, err
	}
	const gets = s3AreaBytes >> 20
	errs := make([]error, 8)
	var wg sync.WaitGroup
	start := time.Now()
	for w := range errs {
		wg.Go(func() {
			for i := w; i < gets && errs[w] == nil; i += len(errs) {
				errs[w] = b.plainGet(ctx, object, i%16)
			}
		})
	}
	wg.Wait()
	return gets * (1 << 20) / time.Since(start).Seconds() / 1e6, errors.Join(errs...)
}

func (b *s3Bench) plainGet(ctx context.Context, object string, mib int) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, object, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", mib<<20, (mib+1)<<20-1))
	resp, err := b.http.Do(req)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, resp.Body)
	return errors.Join(err, resp.Body.Close(), notOK(resp))
}

// fillArea writes bytes that do not compress, in order.
func (b *s3Bench) fillArea(at, n int64) error {
	c, err := b.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	r := rand.New(rand.NewPCG(uint64(at), 1))
	p := make([]byte, 1<<20)
	for off := int64(0); off < n; off += int64(len(p)) {
		fillRandom(r, p)
		if err := c.Do(nbdclient.Write, 0, at+off, 0, p); err != nil {
			return err
		}
	}
	return c.Do(nbdclient.Flush, 0, 0, 0, nil)
}

// drained waits until all but the last bit of the log is on the store.
func (b *s3Bench) drained(context.Context) error {
	return harness.Poll(3*time.Minute, func() error {
		out, err := b.node.CLI("vdisk", "show", "default/s3", "-o", "json")
		if err != nil {
			return err
		}
		var d struct{ Pending int64 }
		if err := json.Unmarshal([]byte(out), &d); err != nil {
			return err
		}
		if d.Pending > 1<<20 {
			return fmt.Errorf("%d bytes are pending", d.Pending)
		}
		return nil
	})
}

// restartCold restarts the node with an empty read cache.
func (b *s3Bench) restartCold() error {
	if err := b.node.Stop(); err != nil {
		return err
	}
	return errors.Join(os.RemoveAll(filepath.Join(b.node.Data, "cache")), b.node.Start())
}

// outage takes the store away while 300 MiB are written, and measures how fast they go when it is back, and reads meanwhile.
func (b *s3Bench) outage(ctx context.Context, wire string) error {
	const rtt, written, away = 20 * time.Millisecond, 300 << 20, 12 * time.Second
	if err := b.set(rtt, false); err != nil {
		return err
	}
	link, err := b.plainPuts(ctx, 4)
	if err != nil {
		return err
	}
	c, err := b.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	p := make([]byte, 4096)
	read := func(d time.Duration, until <-chan struct{}) ([]time.Duration, error) {
		var took []time.Duration
		r := rand.New(rand.NewPCG(5, 5))
		for end := time.Now().Add(d); time.Now().Before(end); {
			select {
			case <-until:
				return took, nil
			default:
			}
			start := time.Now()
			if err := c.Do(nbdclient.Read, 0, r.Int64N(4096)*4096, 0, p); err != nil { // 16 MiB, read before
				return nil, err
			}
			took = append(took, time.Since(start))
			time.Sleep(200 * time.Microsecond) // a client, not a load: the figure is how long one waits
		}
		return took, nil
	}
	for range 2 {
		for off := int64(0); off < 16<<20; off += 4096 {
			if err := c.Do(nbdclient.Read, 0, off, 0, p); err != nil {
				return err
			}
		}
	}
	before, err := read(2*time.Second, nil)
	if err != nil {
		return err
	}
	if err := b.set(rtt, true); err != nil {
		return err
	}
	down := time.Now()
	if err := b.fillArea(4<<30, written); err != nil {
		return fmt.Errorf("write while the store is away: %w", err)
	}
	during, err := read(away-time.Since(down), nil)
	if err != nil {
		return fmt.Errorf("read of cached data while the store is away: %w", err)
	}
	if err := b.set(rtt, false); err != nil {
		return err
	}
	start := time.Now()
	done := make(chan error, 1)
	over := make(chan struct{})
	var took time.Duration
	go func() {
		err := b.drained(ctx)
		took = time.Since(start)
		close(over)
		done <- err
	}()
	draining, rerr := read(3*time.Minute, over)
	if err := errors.Join(<-done, rerr); err != nil {
		return err
	}
	_, p0 := quantiles(before)
	_, p1 := quantiles(during)
	_, p2 := quantiles(draining)
	rate := written / took.Seconds() / 1e6
	fmt.Printf("G20  S3 over %s away for %s while %d MiB are written: 0 errors; cached reads p99 %d us before, %d us while it is away, %d us while it drains (goal <= 2x: %s)\n",
		wire, away, written>>20, p0.Microseconds(), p1.Microseconds(), p2.Microseconds(), met(p2 <= 2*p0))
	fmt.Printf("G20  drain afterwards %.0f MB/s, %.2f of 4 plain PUTs of 16 MiB at a time (%.0f MB/s; goal >= 0.8: %s)\n", rate, rate/link, link,
		met(rate >= 0.8*link))
	return nil
}

// plainPuts is what the store takes from a plain client, some PUTs of 16 MiB at a time: MB/s.
func (b *s3Bench) plainPuts(ctx context.Context, parallel int) (float64, error) {
	const puts, size = 16, 16 << 20
	body := make([]byte, size)
	errs := make([]error, parallel)
	var wg sync.WaitGroup
	start := time.Now()
	for w := range errs {
		wg.Go(func() {
			for i := w; i < puts && errs[w] == nil; i += parallel {
				req, err := http.NewRequestWithContext(ctx, http.MethodPut, fmt.Sprintf("%s/%s/plain%d", b.endpoint, s3test.Bucket, i), bytes.NewReader(body))
				if err != nil {
					errs[w] = err
					return
				}
				resp, err := b.http.Do(req)
				if err != nil {
					errs[w] = err
					return
				}
				errs[w] = errors.Join(resp.Body.Close(), notOK(resp))
			}
		})
	}
	wg.Wait()
	return puts * size / time.Since(start).Seconds() / 1e6, errors.Join(errs...)
}
