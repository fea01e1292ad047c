// Package harness starts what the end-to-end tests and benchmarks talk to, the real varve binary and its peers, and
// watches it from outside: readiness, CPU time, resident memory, the end by a signal.
//
// All addresses are on the loopback; every process is started with a parent-death signal and ended by its own id; every
// wait has a deadline. Show prints a line that `make test` passes on to its reader.
package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Show prints a result that belongs in the output of `make test`.
func Show(format string, args ...any) {
	fmt.Printf("» "+format+"\n", args...)
}

// Root is the repository's directory.
func Root() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Dir(filepath.Dir(filepath.Dir(file)))
}

// Cache is the directory of what is made once: the guest's kernel, fio with the nfs engine.
func Cache(name string) string { return filepath.Join(Root(), ".cache", name) }

// Process is a running server.
type Process struct {
	Name string
	Cmd  *exec.Cmd
	log  *tail
	done chan struct{}
	err  error
}

// tail keeps the last part of what a process printed, and lets a reader wait for a piece of text.
type tail struct {
	mu   sync.Mutex
	text []byte
}

const tailBytesMax = 256 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.text = append(t.text, p...)
	if over := len(t.text) - tailBytesMax; over > 0 {
		t.text = append(t.text[:0], t.text[over:]...)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.text)
}

// Start runs a program until Kill or Stop. The operating system ends it when the test process ends.
func Start(name string, args ...string) (*Process, error) {
	p := &Process{Name: filepath.Base(name), Cmd: exec.Command(name, args...), log: &tail{}, done: make(chan struct{})}
	p.Cmd.Stdout, p.Cmd.Stderr = p.log, p.log
	p.Cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	p.Cmd.WaitDelay = 5 * time.Second
	started := make(chan error, 1)
	// The parent-death signal follows the thread that forked: that thread lives as long as the process.
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.Cmd.Start()
		started <- err
		if err != nil {
			return
		}
		p.err = p.Cmd.Wait()
		close(p.done)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	return p, nil
}

func (p *Process) PID() int { return p.Cmd.Process.Pid }

// Log is what the process printed last.
func (p *Process) Log() string { return p.log.String() }

// Ended reports whether the process is gone, without waiting.
func (p *Process) Ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// Wait waits for the end of the process.
func (p *Process) Wait(limit time.Duration) error {
	select {
	case <-p.done:
		return p.err
	case <-time.After(limit):
		return fmt.Errorf("%s still runs after %s", p.Name, limit)
	}
}

// Kill ends the process with SIGKILL and waits until it is gone.
func (p *Process) Kill() {
	p.Cmd.Process.Signal(syscall.SIGKILL)
	<-p.done
}

// Stop asks the process to end with SIGTERM and kills it when it does not within limit.
func (p *Process) Stop(limit time.Duration) error {
	if p.Ended() {
		return p.err
	}
	p.Cmd.Process.Signal(syscall.SIGTERM)
	if err := p.Wait(limit); err != nil {
		if !p.Ended() {
			p.Kill()
		}
		return err
	}
	return nil
}

// CPU is the processor time of a process and its children so far, user and system.
func CPU(pid int) time.Duration {
	total := cpuOf(pid, true)
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, f := range threads {
		text, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		for _, c := range strings.Fields(string(text)) {
			if child, err := strconv.Atoi(c); err == nil {
				total += cpuOf(child, false)
			}
		}
	}
	return total
}

// clockTick is the unit of /proc/PID/stat on Linux: USER_HZ is 100 on every architecture that Debian has.
const clockTick = 10 * time.Millisecond

func cpuOf(pid int, waited bool) time.Duration {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	_, rest, ok := bytes.Cut(text, []byte(") ")) // the name may hold spaces
	if !ok {
		return 0
	}
	f := bytes.Fields(rest)
	last := 13
	if waited {
		last = 15 // and the children that it has waited for
	}
	var ticks int64
	for i := 11; i < last && i < len(f); i++ {
		n, _ := strconv.ParseInt(string(f[i]), 10, 64)
		ticks += n
	}
	return time.Duration(ticks) * clockTick
}

// RSS is the resident memory of a process in bytes.
func RSS(pid int) int64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for line := range strings.SplitSeq(string(text), "\n") {
		if v, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kib, _ := strconv.ParseInt(strings.Fields(v)[0], 10, 64)
			return kib << 10
		}
	}
	return 0
}

// The ports that tests give to servers lie below those that the kernel gives to clients: one of those may be a client's own, of this test or
// of one beside it, before the server gets it.
const portsFrom, portsTo = 10_000, 32_000

// FreePort gives a TCP port of the loopback that nothing listens on now.
func FreePort() (int, error) {
	var last error
	for range 100 {
		port := portsFrom + rand.IntN(portsTo-portsFrom)
		l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err == nil {
			return port, l.Close()
		}
		last = err
	}
	return 0, fmt.Errorf("no port is free: %w", last)
}

// Poll calls ready until it returns nil, every few milliseconds up to limit.
func Poll(limit time.Duration, ready func() error) error {
	deadline := time.Now().Add(limit)
	for {
		err := ready()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not within %s: %w", limit, err)
		}
		time.Sleep(3 * time.Millisecond)
	}
}

// Dial reports whether something accepts connections at addr.
func Dial(network, addr string) error {
	c, err := net.DialTimeout(network, addr, time.Second)
	if err != nil {
		return err
	}
	return c.Close()
}

// Run runs a command to its end and gives what it printed. The error carries the output.
func Run(limit time.Duration, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.WaitDelay = 2 * time.Second
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if ctx.Err() != nil {
		err = fmt.Errorf("ended after %s: %w", limit, ctx.Err())
	}
	if err != nil {
		return out.String(), fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, strings.TrimSpace(out.String()))
	}
	return out.String(), nil
}

// Need ends the test when a program of the host is missing, naming the remedy. It fails in place of skipping when
// VARVE_REQUIRE_TOOLS is set, as CI does.
func Need(t testing.TB, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err == nil {
			continue
		} else if !errors.Is(err, exec.ErrNotFound) && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		if os.Getenv("VARVE_REQUIRE_TOOLS") != "" {
			t.Fatalf("%s is missing; `make setup` installs it", p)
		}
		t.Skipf("%s is missing; `make setup` installs it", p)
	}
}
