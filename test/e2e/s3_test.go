//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"varve/test/harness"
	"varve/test/nbdclient"
	"varve/volumedriver/backend/s3/s3test"
)

// keys puts the bucket's credentials into the environment of the nodes that the test starts.
func keys(t *testing.T, access, secret string) {
	t.Setenv("VARVE_S3_ACCESS_KEY", access)
	t.Setenv("VARVE_S3_SECRET_KEY", secret)
}

func bucketURL(endpoint, prefix string) string {
	return "s3://" + s3test.Bucket + "/" + prefix + "?endpoint=" + endpoint + "&region=us-east-1"
}

// faultBefore gives the endpoint of a fault server before another store.
func faultBefore(t *testing.T, endpoint string) (string, *s3test.Fault) {
	forward, err := s3test.Forward(endpoint)
	must(t, err)
	f := s3test.NewFault(forward)
	srv := httptest.NewServer(f)
	t.Cleanup(srv.Close)
	return srv.URL, f
}

// TestS3Kills kills a node whose vPool is a bucket: of a real S3 server, and of the same behind a fault server.
func TestS3Kills(t *testing.T) {
	g := s3test.StartGateway(t)
	keys(t, g.Access, g.SecretKey)
	t.Run("real server", func(t *testing.T) {
		killLoop(t, func(done int, _ time.Duration) bool { return done < 12 }, "--sco-size", "1MiB", "--s3", bucketURL(g.Endpoint, "kills"))
	})
	t.Run("fault server", func(t *testing.T) {
		endpoint, f := faultBefore(t, g.Endpoint)
		rough := []*s3test.Added{
			f.Add(s3test.Spoil{Rate: 0.03, Status: 503, Code: "SlowDown"}), f.Add(s3test.Spoil{Rate: 0.03, Drop: true}),
			f.Add(s3test.Spoil{Rate: 0.03, LostReply: true}), f.Add(s3test.Spoil{Method: "PUT", Rate: 0.05, Error200: true, Applied: true}),
			f.Add(s3test.Spoil{Method: "GET", Rate: 0.03, Truncate: true}), f.Add(s3test.Spoil{Method: "GET", Key: "/v/", Rate: 0.004, Flip: true}),
		}
		for _, a := range rough {
			defer a.Remove()
		}
		killLoop(t, func(done int, _ time.Duration) bool { return done < 12 }, "--sco-size", "1MiB", "--s3", bucketURL(endpoint, "faults"))
		var fired int64
		for _, a := range rough {
			fired += a.Fired()
		}
		harness.Show("S3: kills with the store behind a fault server: %d of %d requests spoiled", fired, f.Requests(""))
	})
}

// cachedReads reads blocks at random until stop, and tells how many a second and the slow end.
func cachedReads(t *testing.T, n *harness.Node, blocks int, stop <-chan struct{}) (perSecond float64, p99 time.Duration) {
	c := dial(t, n.NBD("disk"))
	defer c.Close()
	r := rand.New(rand.NewPCG(1, 2))
	p, want := make([]byte, block), make([]byte, block)
	var took []time.Duration
	begin := time.Now()
	for {
		select {
		case <-stop:
			slices.Sort(took)
			return float64(len(took)) / time.Since(begin).Seconds(), took[len(took)*99/100]
		default:
		}
		lba := uint64(r.IntN(blocks))
		start := time.Now()
		if err := c.Do(nbdclient.Read, 0, int64(lba)*block, 0, p); err != nil {
			t.Errorf("read of cached block %d: %v", lba, err)
			<-stop
			return 0, 0
		}
		took = append(took, time.Since(start))
		if fill(want, 1, lba, 1); string(want) != string(p) {
			t.Errorf("cached block %d holds %s", lba, describe(p))
		}
		time.Sleep(200 * time.Microsecond)
	}
}

// TestS3Outage takes the store away while a client writes and another one reads what is cached.
func TestS3Outage(t *testing.T) {
	outage := 20 * time.Second
	if d, err := time.ParseDuration(os.Getenv("VARVE_S3_OUTAGE")); err == nil {
		outage = d
	}
	g := s3test.StartGateway(t)
	keys(t, g.Access, g.SecretKey)
	endpoint, f := faultBefore(t, g.Endpoint)
	var mu sync.Mutex
	var putOrder []string
	f.OnDone(func(r *http.Request) {
		if i := strings.Index(r.URL.Path, "/v/"); r.Method == http.MethodPut && i >= 0 {
			mu.Lock()
			putOrder = append(putOrder, filepath.Base(r.URL.Path))
			mu.Unlock()
		}
	})
	n := harness.StartNode(t, "--log-size", "1GiB", "--sco-size", "4MiB", "--log-level", "error", "--s3", bucketURL(endpoint, "outage"))
	n.CreateDisk(t, "disk", "8GiB")
	c := dial(t, n.NBD("disk"))
	const cached = 8192 // blocks
	p := make([]byte, 32*block)
	for lba := 0; lba < cached; lba += 32 {
		for i := range 32 {
			fill(p[i*block:(i+1)*block], 1, uint64(lba+i), 1)
		}
		must(t, c.Do(nbdclient.Write, 0, int64(lba)*block, 0, p))
	}
	must(t, c.Do(nbdclient.Flush, 0, 0, 0, nil))
	must(t, harness.Poll(120*time.Second, func() error { return pendingBelow(n, 1<<20) }))
	for range 2 { // what was read once or twice is in the cache
		for lba := 0; lba < cached; lba += 32 {
			must(t, c.Do(nbdclient.Read, 0, int64(lba)*block, 0, p))
		}
	}
	var slowest time.Duration
	writes, q := uint64(0), make([]byte, 16*block)
	// beside writes some MiB a second, each durable, while it reads what is cached. The log has room for what comes in a long outage.
	pause := max(10*time.Millisecond, outage*(16*block)/(600<<20))
	beside := func(d time.Duration) (perSecond float64, p99 time.Duration) {
		stop := make(chan struct{})
		var load sync.WaitGroup
		load.Go(func() { perSecond, p99 = cachedReads(t, n, cached, stop) })
		for began := time.Now(); time.Since(began) < d; writes++ {
			for i := range 16 {
				fill(q[i*block:(i+1)*block], 2, 100_000+writes*16+uint64(i), 1)
			}
			start := time.Now()
			must(t, c.Do(nbdclient.Write, nbdclient.FUA, int64(100_000+writes*16)*block, 0, q))
			slowest = max(slowest, time.Since(start))
			time.Sleep(pause)
		}
		close(stop)
		load.Wait()
		return perSecond, p99
	}
	before, p99Before := beside(4 * time.Second)
	slowest = 0

	f.SetDown(true)
	during, p99During := beside(outage)
	var st struct{ Problems []string }
	status, _ := n.CLI("status", "-o", "json") // it ends with 1 while the appliance is degraded
	must(t, json.NewDecoder(strings.NewReader(status)).Decode(&st))
	if !strings.Contains(strings.Join(st.Problems, "\n"), "backend of vPool default") {
		t.Errorf("status does not tell of the outage: %v", st.Problems)
	}
	mu.Lock()
	putOrder = nil
	mu.Unlock()

	drain := time.Now()
	f.SetDown(false)
	stop := make(chan struct{})
	var load sync.WaitGroup
	var draining float64
	var p99Draining time.Duration
	load.Go(func() { draining, p99Draining = cachedReads(t, n, cached, stop) })
	err := harness.Poll(120*time.Second, func() error { return pendingBelow(n, 1<<20) })
	took := time.Since(drain)
	close(stop)
	load.Wait()
	must(t, err)

	mu.Lock()
	order := slices.Clone(putOrder)
	mu.Unlock()
	checkOrder(t, order)
	n.Kill()
	must(t, n.Start())
	c = dial(t, n.NBD("disk"))
	want := make([]byte, block)
	for w := range writes {
		must(t, c.Do(nbdclient.Read, 0, int64(100_000+w*16)*block, 0, q))
		for i := range uint64(16) {
			lba := 100_000 + w*16 + i
			if fill(want, 2, lba, 1); string(want) != string(q[i*block:(i+1)*block]) {
				t.Fatalf("block %d, written while the store was away, holds %s", lba, describe(q[i*block:(i+1)*block]))
			}
		}
	}
	mib := float64(writes*16*block) / (1 << 20)
	harness.Show("S3 away for %s: %d durable writes (%.0f MiB) without an error, slowest %d ms; then %d objects drained in order, "+
		"less than 1 MiB pending after %.1f s", outage, writes, mib, slowest.Milliseconds(), len(order), took.Seconds())
	harness.Show("S3 away: reads of cached data %.0f/s p99 %d us before, %.0f/s p99 %d us during (ratio %.2f, goal 0.95, least 0.8), %.0f/s p99 %d us while it drains",
		before, p99Before.Microseconds(), during, p99During.Microseconds(), during/before, draining, p99Draining.Microseconds())
	if during < before*0.8 { // other work on the machine moves this figure
		t.Errorf("reads of cached data fell from %.0f/s to %.0f/s", before, during)
	}
}

// checkOrder holds the objects "epoch-seq-attempt" to their order: four may be under way at a time, and are installed in order.
func checkOrder(t *testing.T, order []string) {
	t.Helper()
	if len(order) == 0 {
		t.Error("no object was put after the outage")
	}
	last := uint64(0)
	for _, name := range order {
		var epoch, seq, attempt uint64
		if _, err := fmt.Sscanf(name, "%x-%x-%x", &epoch, &seq, &attempt); err != nil {
			t.Fatalf("object %q: %v", name, err)
		}
		if seq+3 < last {
			t.Errorf("object %s came after number %d", name, last)
		}
		last = max(last, seq)
	}
}

// TestS3EndToEnd: a second vPool on a bucket, import, restart, export, keys changed in service, rebuild from the bucket alone.
func TestS3EndToEnd(t *testing.T) {
	harness.Need(t, "qemu-img")
	g := s3test.StartGateway(t)
	n := harness.StartNode(t, "--log-size", "256MiB", "--sco-size", "1MiB", "--log-level", "warn")
	url := bucketURL(g.Endpoint, "deep/er")
	out, err := n.CLI("vpool", "create", "fast", "--backend", url)
	wantFailure(t, out, err, "no credentials", "VARVE_S3_ACCESS_KEY")
	keys(t, g.Access, "wrong-secret-of-the-test")
	out, err = n.CLI("vpool", "create", "fast", "--backend", url)
	wantFailure(t, out, err, "SignatureDoesNotMatch", "give the right keys")
	file := filepath.Join(t.TempDir(), "keys")
	must(t, os.WriteFile(file, []byte("[default]\naws_access_key_id = "+g.Access+"\naws_secret_access_key = "+g.SecretKey+"\n"), 0o600))
	out, err = n.CLI("vpool", "create", "fast", "--backend", "s3://no-such-bucket?endpoint="+g.Endpoint, "--credentials-file", file)
	wantFailure(t, out, err, "NoSuchBucket", "make the bucket")
	if names := n.MustCLI(t, "vpool", "list"); strings.Contains(names, "fast") {
		t.Errorf("a failed create left a vPool:\n%s", names)
	}
	n.MustCLI(t, "vpool", "create", "fast", "--backend", url, "--credentials-file", file)
	if out := n.MustCLI(t, "vpool", "show", "fast"); !strings.Contains(out, "If-None-Match is honoured") || !strings.Contains(out, url) {
		t.Errorf("vpool show:\n%s", out)
	}
	out, err = n.CLI("vpool", "create", "again", "--backend", bucketURL(g.Endpoint, "deep"), "--credentials-file", file)
	wantFailure(t, out, err, "overlaps", "prefix of its own")

	image := filepath.Join(t.TempDir(), "image")
	data := make([]byte, 24<<20)
	rand.NewChaCha8([32]byte{7}).Read(data[:16<<20])
	must(t, os.WriteFile(image, data, 0o600))
	n.MustCLI(t, "vdisk", "import", image, "fast/vm/disk")
	same := func(what string) {
		t.Helper()
		back := filepath.Join(t.TempDir(), "back")
		n.MustCLI(t, "vdisk", "export", "fast/vm/disk", back)
		if b, err := os.ReadFile(back); err != nil || string(b) != string(data) {
			t.Fatalf("%s: the exported disk differs (%d bytes, %v)", what, len(b), err)
		}
	}
	must(t, harness.Poll(90*time.Second, func() error { return diskPending(n, "fast/vm/disk") }))
	must(t, n.Stop())
	must(t, n.Start())
	same("after a restart")

	// The store's keys change. Guests' writes go on; the state says what is wrong; the new keys need no restart.
	g.Stop()
	g.SecretKey = "another-secret-of-the-test"
	must(t, g.Start())
	c := dial(t, fmt.Sprintf("nbd://%s/fast/vm/disk", n.NBDAddr()))
	fresh := data[3<<20 : 5<<20]
	rand.NewChaCha8([32]byte{8}).Read(fresh)
	must(t, c.Do(nbdclient.Write, nbdclient.FUA, 3<<20, 0, fresh[:1<<20]))
	must(t, c.Do(nbdclient.Write, nbdclient.FUA, 4<<20, 0, fresh[1<<20:]))
	begin := time.Now()
	must(t, harness.Poll(60*time.Second, func() error {
		// status ends with 1 while the appliance is degraded
		if out, _ := n.CLI("status"); !strings.Contains(out, "SignatureDoesNotMatch") || !strings.Contains(out, "set-credentials") {
			return fmt.Errorf("status does not tell of the revoked keys:\n%s", out)
		}
		return nil
	}))
	told := time.Since(begin)
	keys(t, g.Access, "still-wrong-secret")
	out, err = n.CLI("vpool", "set-credentials", "fast")
	wantFailure(t, out, err, "do not work", "nothing is changed")
	keys(t, g.Access, g.SecretKey)
	n.MustCLI(t, "vpool", "set-credentials", "fast")
	begin = time.Now()
	must(t, harness.Poll(60*time.Second, func() error { return diskPending(n, "fast/vm/disk") }))
	harness.Show("S3: revoked keys named by status after %.1f s; with new ones, without a restart, all pending data stored after %.1f s",
		told.Seconds(), time.Since(begin).Seconds())
	same("after the change of keys")
	must(t, n.Stop())

	// The bucket alone, in a directory that knows nothing.
	m, err := harness.NewNode(t.TempDir(), "--log-size", "256MiB", "--log-level", "warn")
	must(t, err)
	table := m.MustCLI(t, "rebuild", "--pool", "fast", "--backend", url)
	if !strings.Contains(table, "fast/vm/disk.raw") || !strings.Contains(table, "rebuilt") {
		t.Errorf("rebuild:\n%s", table)
	}
	first := n
	n = m
	must(t, m.Start())
	same("after a rebuild from the bucket alone")
	must(t, m.Stop())
	for _, dir := range []string{first.Data, m.Data} {
		for _, secret := range []string{s3test.SecretKey, g.SecretKey} {
			if where := holds(t, dir, secret); where != "" {
				t.Errorf("the secret key is in clear in %s", where)
			}
		}
	}
	for _, log := range []string{first.Log(), m.Log()} {
		if strings.Contains(log, g.SecretKey) || strings.Contains(log, s3test.SecretKey) {
			t.Error("the secret key is in the log")
		}
	}
	harness.Show("S3: import, restart, export, change of keys, rebuild from the bucket alone in an empty directory: bytes equal, no key in clear on disk")
}

func wantFailure(t *testing.T, out string, err error, texts ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("succeeded:\n%s", out)
		return
	}
	for _, text := range texts {
		if !strings.Contains(err.Error()+out, text) {
			t.Errorf("no %q in: %v\n%s", text, err, out)
		}
	}
}

func diskPending(n *harness.Node, name string) error {
	out, err := n.CLI("vdisk", "show", name, "-o", "json")
	if err != nil {
		return err
	}
	var d struct{ Pending int64 }
	if err := json.Unmarshal([]byte(out), &d); err != nil {
		return err
	}
	if d.Pending > 0 {
		time.Sleep(100 * time.Millisecond)
		return fmt.Errorf("%d bytes are not on the backend yet", d.Pending)
	}
	return nil
}

// holds gives a file below dir that has text in it.
func holds(t *testing.T, dir, text string) string {
	t.Helper()
	var found atomic.Pointer[string]
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || d.Name() == "cache" {
			return err
		}
		info, err := d.Info()
		if err != nil || info.Size() > 300<<20 {
			return err
		}
		b, err := os.ReadFile(path)
		if err == nil && strings.Contains(string(b), text) {
			found.Store(&path)
		}
		return err
	}))
	if p := found.Load(); p != nil {
		return *p
	}
	return ""
}
