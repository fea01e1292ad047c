package harness

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Node is one appliance: the real binary on loopback ports and a data directory, which may be killed and started again.
type Node struct {
	Data      string
	NBDPort   int
	NFSPort   int
	HTTPSPort int
	Args      []string // further flags of `varve serve`
	Program   string   // another varve than Binary

	proc *Process
	http *http.Client
}

// Binary is the varve that the tests run: VARVE_BIN or bin/varve.
func Binary() string {
	if b := os.Getenv("VARVE_BIN"); b != "" {
		return b
	}
	return filepath.Join(Root(), "bin", "varve")
}

// NewNode chooses ports and a data directory below dir. It starts nothing.
func NewNode(dir string, args ...string) (*Node, error) {
	n := &Node{Data: filepath.Join(dir, "data"), Args: args}
	for _, p := range []*int{&n.NBDPort, &n.NFSPort, &n.HTTPSPort} {
		port, err := FreePort()
		if err != nil {
			return nil, err
		}
		*p = port
	}
	n.http = &http.Client{Timeout: time.Second, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true}}
	return n, nil
}

// StartNode gives a node that serves, and stops it at the end of the test. The stop itself is checked: exit status 0.
func StartNode(t testing.TB, args ...string) *Node {
	t.Helper()
	if _, err := os.Stat(Binary()); err != nil {
		t.Fatalf("%v; `make build` makes it", err)
	}
	n, err := NewNode(t.TempDir(), args...)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if n.proc == nil || n.proc.Ended() {
			return
		}
		if err := n.Stop(); err != nil {
			t.Errorf("stop: %v", err)
		}
		if t.Failed() {
			t.Logf("the node printed last:\n%s", lastLines(n.proc.Log(), 60))
		}
	})
	return n
}

func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// Start runs the node and waits until it is ready to serve.
func (n *Node) Start() error {
	if err := n.Launch(); err != nil {
		return err
	}
	if err := n.WaitReady(60 * time.Second); err != nil {
		log := n.proc.Log()
		n.proc.Kill()
		return fmt.Errorf("varve serve: %w; it printed:\n%s", err, lastLines(log, 60))
	}
	return nil
}

// Launch runs the node without waiting.
func (n *Node) Launch() error {
	args := append([]string{"serve", "--data", n.Data,
		"--nbd", fmt.Sprintf("127.0.0.1:%d", n.NBDPort),
		"--nfs", fmt.Sprintf("127.0.0.1:%d", n.NFSPort),
		"--https", fmt.Sprintf("127.0.0.1:%d", n.HTTPSPort)}, n.Args...)
	program := n.Program
	if program == "" {
		program = Binary()
	}
	p, err := Start(program, args...)
	if err != nil {
		return err
	}
	n.proc = p
	return nil
}

// WaitReady waits until /readyz answers 200.
func (n *Node) WaitReady(limit time.Duration) error {
	return Poll(limit, func() error {
		if n.proc.Ended() {
			return fmt.Errorf("it ended: %w", errors.Join(errors.New("not running"), n.proc.Wait(0)))
		}
		resp, err := n.http.Get(fmt.Sprintf("https://127.0.0.1:%d/readyz", n.HTTPSPort))
		if err != nil {
			return err
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("readyz: %s", resp.Status)
		}
		return nil
	})
}

func (n *Node) PID() int { return n.proc.PID() }

func (n *Node) Ended() bool { return n.proc == nil || n.proc.Ended() }

// Log is what the process that runs now, or ran last, has printed.
func (n *Node) Log() string { return n.proc.Log() }

// Kill ends the node with SIGKILL.
func (n *Node) Kill() { n.proc.Kill() }

// Stop ends the node with SIGTERM and expects exit status 0.
func (n *Node) Stop() error {
	if err := n.proc.Stop(60 * time.Second); err != nil {
		return fmt.Errorf("varve serve after SIGTERM: %w; it printed:\n%s", err, lastLines(n.proc.Log(), 40))
	}
	return nil
}

// CLI runs a varve command against the node's data directory.
func (n *Node) CLI(args ...string) (string, error) {
	return Run(5*time.Minute, Binary(), append([]string{"--data", n.Data}, args...)...)
}

// MustCLI runs a varve command that has to succeed.
func (n *Node) MustCLI(t testing.TB, args ...string) string {
	t.Helper()
	out, err := n.CLI(args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// CreateDisk makes the vDisk default/name.
func (n *Node) CreateDisk(t testing.TB, name, size string) {
	t.Helper()
	n.MustCLI(t, "vdisk", "create", "default/"+name, "--size", size)
}

// NBD is the URI of the vDisk default/name.
func (n *Node) NBD(name string) string {
	return fmt.Sprintf("nbd://127.0.0.1:%d/default/%s", n.NBDPort, name)
}

// NBDAddr and NFSAddr are where the two gateways listen; MOUNT shares the NFS port.
func (n *Node) NBDAddr() string { return fmt.Sprintf("127.0.0.1:%d", n.NBDPort) }
func (n *Node) NFSAddr() string { return fmt.Sprintf("127.0.0.1:%d", n.NFSPort) }

// NFS is libnfs's URL of a path in the datastore default.
func (n *Node) NFS(path string) string {
	return fmt.Sprintf("nfs://127.0.0.1/default%s?version=3&nfsport=%d&mountport=%d&uid=0&gid=0", path, n.NFSPort, n.NFSPort)
}

// Qemu runs qemu-img or another tool of the host that must succeed within limit.
func Qemu(t testing.TB, limit time.Duration, name string, args ...string) string {
	t.Helper()
	out, err := Run(limit, name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Fio runs fio with --output-format=json and gives its first job; an error of fio or of a verification is an error here.
func Fio(limit time.Duration, program string, args ...string) (FioJob, error) {
	cmd := exec.Command(program, append(args, "--verify_state_save=0", "--output-format=json")...)
	out, err := runFor(cmd, limit)
	i := strings.IndexByte(out, '{')
	if err != nil || i < 0 {
		return FioJob{}, fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), errors.Join(err, errIf(i < 0, "no result")), lastLines(out, 25))
	}
	var result struct{ Jobs []FioJob }
	if err := json.NewDecoder(strings.NewReader(out[i:])).Decode(&result); err != nil {
		return FioJob{}, fmt.Errorf("result of fio: %w\n%s", err, lastLines(out, 25))
	}
	if len(result.Jobs) == 0 {
		return FioJob{}, errors.New("fio ran no job")
	}
	if e := result.Jobs[0].Error; e != 0 {
		return result.Jobs[0], fmt.Errorf("fio ended with error %d\n%s", e, out[:i])
	}
	return result.Jobs[0], nil
}

func errIf(cond bool, text string) error {
	if cond {
		return errors.New(text)
	}
	return nil
}

// ErrTimeLimit: the program was ended because it took too long.
var ErrTimeLimit = errors.New("ended at its time limit")

func runFor(cmd *exec.Cmd, limit time.Duration) (string, error) {
	var out tail
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = 2 * time.Second
	if err := cmd.Start(); err != nil {
		return "", err
	}
	stop := time.AfterFunc(limit, func() { cmd.Process.Kill() })
	err := cmd.Wait()
	if !stop.Stop() {
		err = fmt.Errorf("%w: %s", ErrTimeLimit, limit)
	}
	return out.String(), err
}

// FioJob is what the tests read of fio's result.
type FioJob struct {
	Error int
	Read  FioSide
	Write FioSide
	Sync  struct {
		TotalIOs int64 `json:"total_ios"`
	}
}

// FioSide is one direction of a job; latencies in nanoseconds.
type FioSide struct {
	IOPS     float64
	BWBytes  float64 `json:"bw_bytes"`
	TotalIOs int64   `json:"total_ios"`
	Clat     struct {
		Percentile map[string]float64
	} `json:"clat_ns"`
}
