package s3test

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Keys that a Gateway takes at first.
const (
	AccessKey = "varve-test-key"
	SecretKey = "varve-test-secret-4711"
)

// Gateway is versitygw, an S3 server over a directory, as a process of its own.
type Gateway struct {
	Endpoint          string
	Dir               string // of the bucket's objects
	Access, SecretKey string // in force from the next Start on

	binary, address string
	process         *os.Process
	done            chan struct{}
}

// StartGateway starts the server that test/setup.sh has built, until the test ends. Without it the test is skipped, or fails
// where VARVE_REQUIRE_TOOLS is set.
func StartGateway(t testing.TB) *Gateway {
	t.Helper()
	binary, err := cached("versitygw")
	if err != nil {
		if os.Getenv("VARVE_REQUIRE_TOOLS") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := ln.Addr().String()
	ln.Close()
	root := t.TempDir()
	g := &Gateway{Endpoint: "http://" + address, Dir: filepath.Join(root, Bucket), Access: AccessKey, SecretKey: SecretKey, binary: binary,
		address: address}
	if err := os.Mkdir(g.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := g.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.Stop)
	return g
}

// cached finds a program in .cache of the repository.
func cached(name string) (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			p := filepath.Join(dir, ".cache", name)
			if _, err := os.Stat(p); err != nil {
				return "", fmt.Errorf("%s is not built: run test/setup.sh cache", name)
			}
			return p, nil
		}
	}
	return "", fmt.Errorf("no repository above the working directory")
}

// output is what a process printed.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// Start starts it, again after Stop, on the same address with the same objects.
func (g *Gateway) Start() error {
	cmd := exec.Command(g.binary, "--port", g.address, "--region", "us-east-1", "--quiet", "--keep-alive", "posix", filepath.Dir(g.Dir))
	cmd.Env = append(os.Environ(), "ROOT_ACCESS_KEY="+g.Access, "ROOT_SECRET_KEY="+g.SecretKey)
	var printed output
	cmd.Stdout, cmd.Stderr = &printed, &printed
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, done := make(chan error, 1), make(chan struct{})
	// The parent-death signal follows the thread that forked: that thread lives as long as the process.
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(done)
		err := cmd.Start()
		started <- err
		if err == nil {
			cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start versitygw: %w", err)
	}
	g.process, g.done = cmd.Process, done
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		c, err := net.DialTimeout("tcp", g.address, time.Second)
		if err == nil {
			return c.Close()
		}
		if time.Now().After(end) {
			g.Stop()
			return fmt.Errorf("versitygw does not listen: %w\n%s", err, printed.String())
		}
	}
}

// Stop kills it.
func (g *Gateway) Stop() {
	if g.process == nil {
		return
	}
	g.process.Kill()
	<-g.done
	g.process = nil
}
