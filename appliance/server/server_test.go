package server

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"varve/appliance/nbdclient"
	"varve/control/api/client"
	"varve/control/state"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// running is an appliance in this process.
type running struct {
	t       *testing.T
	cfg     Config
	summary Summary
	client  *client.Client
	cancel  context.CancelFunc
	ended   chan error
	over    bool
}

func config(dir string) Config {
	return Config{Data: dir, NBD: "127.0.0.1:0", NFS: "127.0.0.1:0", HTTPS: "127.0.0.1:0", LogBytes: logBytesMin, MapBytes: mapBytesMin,
		Version: "test", Log: slog.New(slog.NewTextHandler(io.Discard, nil))}
}

func start(t *testing.T, cfg Config) *running {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{t: t, cfg: cfg, cancel: cancel, ended: make(chan error, 1)}
	ready := make(chan Summary, 1)
	go func() { r.ended <- Serve(ctx, cfg, func(s Summary) { ready <- s }) }()
	select {
	case r.summary = <-ready:
	case err := <-r.ended:
		t.Fatal(err)
	case <-time.After(60 * time.Second):
		t.Fatal("not ready within a minute")
	}
	var err error
	if r.client, err = client.New(client.Config{Socket: APISocket(cfg.Data)}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.stop)
	return r
}

func (r *running) stop() {
	r.t.Helper()
	if r.over {
		return
	}
	r.over = true
	r.client.Close()
	r.cancel()
	select {
	case err := <-r.ended:
		if err != nil {
			r.t.Error(err)
		}
	case <-time.After(40 * time.Second):
		r.t.Error("does not stop")
	}
}

func (r *running) dial(name string) *nbdclient.Client {
	r.t.Helper()
	c, err := nbdclient.Dial(r.t.Context(), nbdclient.Target{Network: "unix", Address: NBDSocket(r.cfg.Data), Export: name})
	if err != nil {
		r.t.Fatal(err)
	}
	return c
}

func TestServeStopsCleanlyAndKeepsEverything(t *testing.T) {
	r := start(t, config(t.TempDir()))
	if !r.summary.Fresh || len(r.summary.VPools) != 1 || r.summary.VPools[0] != DefaultPool {
		t.Errorf("summary %+v", r.summary)
	}
	if err := r.client.Ready(t.Context()); err != nil {
		t.Errorf("readyz: %v", err)
	}
	if _, err := r.client.CreateVDisk(t.Context(), "default/d", 1<<20); err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte("varve"), 1000)
	c := r.dial("default/d")
	if err := c.WriteAt(t.Context(), want, 777); err != nil { // not flushed: a clean stop keeps it all the same
		t.Fatal(err)
	}
	defer c.Close()
	began := time.Now()
	r.stop()
	if took := time.Since(began); took > 15*time.Second {
		t.Errorf("stopping took %s", took)
	}
	for _, socket := range []string{APISocket(r.cfg.Data), NBDSocket(r.cfg.Data)} {
		if _, err := os.Stat(socket); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", socket, err)
		}
	}
	r = start(t, config(r.cfg.Data))
	if r.summary.Fresh {
		t.Error("the second start says that it is the first")
	}
	c2 := r.dial("default/d")
	defer c2.Close()
	got := make([]byte, len(want))
	if err := c2.ReadAt(t.Context(), got, 777); err != nil || !bytes.Equal(got, want) {
		t.Errorf("after a restart the bytes differ (%v)", err)
	}
}

func TestHTTPSNeedsTheTokenAndThePinnedCA(t *testing.T) {
	r := start(t, config(t.TempDir()))
	pem, err := os.ReadFile(r.summary.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	web := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}, Timeout: 10 * time.Second}
	defer web.CloseIdleConnections()
	token, err := os.ReadFile(r.summary.TokenFile)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(r.summary.TokenFile); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("token file: %v %v", info.Mode(), err)
	}
	get := func(path, token string) (int, string) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+r.summary.HTTPS+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if token != "" {
			req.Header.Set("Authorization", "Bearer "+token)
		}
		resp, err := web.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(body)
	}
	if code, _ := get("/readyz", ""); code != http.StatusOK {
		t.Errorf("readyz: %d", code)
	}
	if code, _ := get("/api/customer/v1/status", ""); code != http.StatusUnauthorized {
		t.Errorf("status without a token: %d", code)
	}
	if code, body := get("/api/customer/v1/status", strings.TrimSpace(string(token))); code != http.StatusOK || !strings.Contains(body, `"state":"ok"`) {
		t.Errorf("status: %d %s", code, body)
	}
	code, body := get("/metrics", "")
	for _, want := range []string{"go_goroutines", "process_resident_memory_bytes", "varve_volumedriver_volumes", "varve_nfs_connections", "varve_nbd_"} {
		if code != http.StatusOK || !strings.Contains(body, want) {
			t.Errorf("metrics (%d) lack %s", code, want)
		}
	}
}

func TestRequiredTLSIsForTheNetwork(t *testing.T) {
	cfg := config(t.TempDir())
	cfg.NBDTLS = "required"
	r := start(t, cfg)
	if _, err := r.client.CreateVDisk(t.Context(), "default/d", 1<<20); err != nil {
		t.Fatal(err)
	}
	plain := nbdclient.Target{Network: "tcp", Address: r.summary.NBD, Export: "default/d"}
	if _, err := nbdclient.Dial(t.Context(), plain); !errors.Is(err, nbdclient.ErrTLSRequired) {
		t.Errorf("without TLS: %v", err)
	}
	pem, err := os.ReadFile(r.summary.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	secure := plain
	secure.TLS = &tls.Config{RootCAs: pool, ServerName: "127.0.0.1"}
	c, err := nbdclient.Dial(t.Context(), secure)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	local := r.dial("default/d")
	defer local.Close()
	got := make([]byte, 4)
	if err := errors.Join(c.WriteAt(t.Context(), []byte("both"), 0), local.ReadAt(t.Context(), got, 0)); err != nil || string(got) != "both" {
		t.Errorf("written over TLS, read over the socket: %q %v", got, err)
	}
}

func TestSecondServerIsRefused(t *testing.T) {
	r := start(t, config(t.TempDir()))
	err := Serve(t.Context(), config(r.cfg.Data), func(Summary) { t.Error("two appliances on one directory") })
	if _, ok := errors.AsType[*LockedError](err); !ok {
		t.Errorf("second server: %v", err)
	}
	if _, err := Rebuild(t.Context(), config(r.cfg.Data), RebuildOptions{}); err == nil {
		t.Error("rebuild runs beside a server")
	}
	if err := r.client.Ready(t.Context()); err != nil {
		t.Errorf("the first one is hurt: %v", err)
	}
}

func TestAddressInUseIsToldBeforeAnythingIsMade(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	cfg := config(t.TempDir())
	cfg.NFS = ln.Addr().String()
	err = Serve(t.Context(), cfg, func(Summary) { t.Error("ready") })
	if err == nil || !strings.Contains(err.Error(), "listen for nfs on "+cfg.NFS) {
		t.Errorf("error %v", err)
	}
	if _, err := os.Stat(filepath.Join(cfg.Data, controlName)); !errors.Is(err, os.ErrNotExist) {
		t.Error("control was made all the same")
	}
}

// settled waits until the vDisk's data is on its backend, where idle data goes by itself after some seconds.
func (r *running) settled(name string) {
	r.t.Helper()
	for end := time.Now().Add(60 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		d, err := r.client.VDisk(r.t.Context(), name)
		if err == nil && d.Pending == 0 {
			return
		}
		if time.Now().After(end) {
			r.t.Fatalf("still pending: %+v %v", d, err)
		}
	}
}

func (r *running) expect(name string, want []byte, off int64) {
	r.t.Helper()
	c := r.dial(name)
	defer c.Close()
	got := make([]byte, len(want))
	if err := c.ReadAt(r.t.Context(), got, off); err != nil || !bytes.Equal(got, want) {
		r.t.Errorf("%s differs at %d (%v)", name, off, err)
	}
}

func TestLostLogOrMapIsRebuiltAndNeverReplacedByAnEmptyOne(t *testing.T) {
	r := start(t, config(t.TempDir()))
	if _, err := r.client.CreateVDisk(t.Context(), "default/vm/d", 8<<20); err != nil {
		t.Fatal(err)
	}
	c := r.dial("default/vm/d")
	want := bytes.Repeat([]byte{0xC3}, 1<<20)
	if err := errors.Join(c.WriteAt(t.Context(), want, 2<<20), c.Flush(t.Context())); err != nil {
		t.Fatal(err)
	}
	c.Close()
	r.settled("default/vm/d")
	pool := filepath.Join(r.cfg.Data, backendName, DefaultPool)
	for _, lost := range [][]string{{logName}, {mapName}, {logName, mapName}} {
		r.stop()
		for _, dir := range lost {
			if err := os.RemoveAll(filepath.Join(r.cfg.Data, dir)); err != nil {
				t.Fatal(err)
			}
		}
		err := Serve(t.Context(), r.cfg, func(Summary) { t.Error("serves an empty volume") })
		if _, ok := errors.AsType[*LostError](err); !ok {
			t.Fatalf("serve without %v: %v", lost, err)
		}
		// A backend whose disk is not mounted would make every volume empty.
		if err := errors.Join(os.Rename(pool, pool+".away"), os.Mkdir(pool, 0o700)); err != nil {
			t.Fatal(err)
		}
		if _, err := Rebuild(t.Context(), r.cfg, RebuildOptions{}); !errors.Is(err, state.ErrConflict) {
			t.Errorf("rebuild from an empty directory: %v", err)
		}
		// That has made a new log and map; the volume must not begin again in them.
		half := start(t, r.cfg)
		plain := nbdclient.Target{Network: "unix", Address: NBDSocket(r.cfg.Data), Export: "default/vm/d"}
		if c, err := nbdclient.Dial(t.Context(), plain); err == nil {
			c.Close()
			t.Error("a lost volume can be attached")
		}
		if st, err := half.client.Status(t.Context()); err != nil || st.State != "degraded" {
			t.Errorf("status with a lost volume: %+v %v", st, err)
		}
		half.stop()
		if err := errors.Join(os.RemoveAll(pool), os.Rename(pool+".away", pool)); err != nil {
			t.Fatal(err)
		}
		volumes, err := Rebuild(t.Context(), r.cfg, RebuildOptions{})
		if err != nil || len(volumes) != 1 {
			t.Fatalf("rebuild: %+v %v", volumes, err)
		}
		v := volumes[0]
		if v.State != StateRebuilt || v.Path != "/vm/d.raw" || v.Seq == 0 || v.Written == nil || v.Objects == 0 || v.Size != 8<<20 {
			t.Errorf("rebuilt without %v: %+v", lost, v)
		}
		again, err := Rebuild(t.Context(), r.cfg, RebuildOptions{})
		if err != nil || len(again) != 1 || again[0].State != StateKept {
			t.Errorf("a second rebuild: %+v %v", again, err)
		}
		r = start(t, r.cfg)
		r.expect("default/vm/d", want, 2<<20)
	}
	c = r.dial("default/vm/d")
	if err := errors.Join(c.WriteAt(t.Context(), want, 0), c.Flush(t.Context())); err != nil {
		t.Errorf("a rebuilt volume takes no writes: %v", err)
	}
	c.Close()
	r.stop()

	// The backend alone, in a directory that knows nothing.
	backend := "local://" + filepath.Join(r.cfg.Data, backendName, DefaultPool)
	cfg := config(t.TempDir())
	volumes, err := Rebuild(t.Context(), cfg, RebuildOptions{Pool: "again", Backend: backend})
	if err != nil || len(volumes) != 1 || volumes[0].State != StateRebuilt || volumes[0].LostRecords != nil {
		t.Fatalf("rebuild: %+v %v", volumes, err)
	}
	r = start(t, cfg)
	r.expect("again/vm/d", want, 2<<20)
}

func TestRebuildOfNothingSaysSo(t *testing.T) {
	if _, err := Rebuild(t.Context(), config(t.TempDir()), RebuildOptions{Pool: "x", Backend: "local:///nowhere/at/all"}); err == nil {
		t.Error("a backend that does not exist was rebuilt")
	}
	_, err := Rebuild(t.Context(), config(t.TempDir()), RebuildOptions{})
	if _, ok := errors.AsType[*UsageError](err); !ok {
		t.Errorf("rebuild without a vPool: %v", err)
	}
}

func TestConfigMistakesSayWhatToGive(t *testing.T) {
	good := config("/tmp/x")
	for name, change := range map[string]func(*Config){
		"--data":     func(c *Config) { c.Data = "" },
		"--nbd":      func(c *Config) { c.NBD = "here" },
		"--portmap":  func(c *Config) { c.NFS, c.Portmap = Off, ":111" },
		"--nbd-tls":  func(c *Config) { c.NBDTLS = "maybe" },
		"--log-size": func(c *Config) { c.LogBytes = 1 << 20 },
		"--map-size": func(c *Config) { c.MapBytes = 1 },
		"--sco-size": func(c *Config) { c.SCOBytes = 1 << 40 },
	} {
		cfg := good
		change(&cfg)
		_, err := cfg.withDefaults()
		u, ok := errors.AsType[*UsageError](err)
		if !ok || !strings.Contains(u.Why+u.Remedy, name) || u.Remedy == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
	for total, want := range map[uint64]int64{1 << 40: 4 << 30, 8 << 30: 1 << 30, 1 << 30: logBytesMin} {
		if got := logBytes(total); got != want {
			t.Errorf("log of %d bytes on a disk of %d, want %d", got, total, want)
		}
	}
}

func TestWatchdogTicksOnlyWhileTheDataPathAnswers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", "60000")
	t.Setenv("WATCHDOG_PID", "")
	if err := os.Unsetenv("WATCHDOG_PID"); err != nil {
		t.Fatal(err)
	}
	ticks := func(alive func(context.Context) error) int {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		n, counted := 0, make(chan struct{})
		conn.SetReadDeadline(time.Now().Add(time.Second))
		go func() {
			defer close(counted)
			for buf := make([]byte, 100); ; n++ {
				k, err := conn.Read(buf)
				if err != nil {
					return
				}
				if string(buf[:k]) != "WATCHDOG=1" {
					t.Errorf("notified %q", buf[:k])
				}
			}
		}()
		if err := watchdog(ctx, slog.New(slog.DiscardHandler), alive); err != nil {
			t.Fatal(err)
		}
		<-counted
		return n
	}
	if n := ticks(func(context.Context) error { return nil }); n < 3 {
		t.Errorf("%d ticks while alive", n)
	}
	hang := func(ctx context.Context) error {
		<-ctx.Done()
		return ctx.Err()
	}
	if n := ticks(hang); n != 0 {
		t.Errorf("%d ticks while a sync hangs", n)
	}
}
