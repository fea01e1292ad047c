//go:build e2e

// Package console drives the web console of the real binary with a real browser, from an empty data directory: the first run, a day's work with
// data written and read back by real NBD and NFS clients on a local vPool and on one in a bucket, every dialog by the keyboard alone, a viewer who
// is refused, an update, a broken connection, 1,000 vDisks with 10,000 snapshots; then every page in light and dark, wide and narrow: no axe
// violation, no error in the browser's console, nothing that scrolls sideways. Three nodes, beside it, lose one and then their leader, and a
// fourth joins.
//
// console.mjs and cluster.mjs are the scripts, browser.mjs is what they share; the Node.js that builds the console runs them with its
// playwright-core and Debian's chromium. Each step that they print is one result here. Screenshots are left in .cache/console.
package console

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"varve/appliance/update"
	"varve/control/durable"
	"varve/control/state"
	"varve/test/harness"
	"varve/volumedriver/backend/s3/s3test"
)

const limit = 8 * time.Minute

// step is one line that the script prints.
type step struct {
	Step    string  `json:"step"`
	Seconds float64 `json:"seconds"`
	Error   string  `json:"error"`
	Show    string  `json:"show"`
	Do      string  `json:"do"`
	Node    int     `json:"node"` // which to kill or start
}

var setupCode = regexp.MustCompile(`code ([A-Z0-9]+(?:-[A-Z0-9]+)+)`)

func TestConsole(t *testing.T) {
	t.Parallel()
	shots := artefacts(t)
	keys, bundle := release(t)
	n := harness.StartNode(t, "--update-keys", keys)
	updates := agent{update.Dir(n.Data)}
	updates.run(t)
	s3 := s3test.StartGateway(t)
	script(t, "console.mjs", []*harness.Node{n}, map[string]func() error{"give up": updates.giveUp}, "VARVE_BUNDLE="+bundle, "VARVE_BUNDLE_VERSION="+bundleVersion, "VARVE_URL="+url(n), "VARVE_CODE="+setUp(t, n), "VARVE_NBD="+n.NBDAddr(),
		fmt.Sprintf("VARVE_NFS_PORT=%d", n.NFSPort), "VARVE_SHOTS="+shots, "VARVE_TMP="+t.TempDir(),
		"VARVE_S3="+s3.Endpoint, "VARVE_S3_BUCKET="+s3test.Bucket, "VARVE_S3_ACCESS="+s3.Access, "VARVE_S3_SECRET="+s3.SecretKey, "VARVE_S3_DIR="+s3.Dir,
		fmt.Sprintf("VARVE_SOAK_SECONDS=%.0f", soak(t).Seconds()))
}

const bundleVersion = "77.1.0-console"

// release makes a key and a small bundle that is signed with it.
func release(t *testing.T) (keys, bundle string) {
	t.Helper()
	private, public, err := update.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	key, err := update.ParsePrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	keys, bundle = filepath.Join(dir, "update.pub"), filepath.Join(dir, "bundle.varve")
	if err := os.WriteFile(keys, []byte(public+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	root := make([]byte, 4<<20)
	if _, err := rand.Read(root); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(bundle)
	if err != nil {
		t.Fatal(err)
	}
	_, err = update.Pack(f, update.Manifest{Version: bundleVersion, Built: time.Unix(0, 0), LevelMin: state.LevelMin, LevelMax: state.LevelMax}, bytes.NewReader(root), key)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	return keys, bundle
}

// agent stands where the image has its update agent: it says that the machine can be updated, tells of half the work once it is asked for an
// update, and gives that up when it is told to. dir is where it and control meet.
type agent struct{ dir string }

func (a agent) tell(st update.AgentStatus) error {
	st.At, st.Now = time.Now(), &update.Status{Running: update.SlotA, Boot: update.BootState{Slot: update.SlotA}}
	b, err := json.Marshal(st)
	if err != nil {
		return err
	}
	if err := durable.MakeDir(a.dir); err != nil {
		return err
	}
	return durable.Replace(a.dir, "status.json", b, 0o644)
}

// run answers requests until the test ends.
func (a agent) run(t *testing.T) {
	if err := a.tell(update.AgentStatus{}); err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() {
		for told := ""; t.Context().Err() == nil; time.Sleep(100 * time.Millisecond) {
			r, pending, err := update.Asked(a.dir)
			if err == nil && pending && r.ID != told {
				told = r.ID
				err = a.tell(update.AgentStatus{ID: r.ID, State: update.StateRunning, Done: 2 << 20, Total: 4 << 20})
			}
			if err != nil {
				t.Errorf("update agent: %v", err)
				return
			}
		}
	})
	t.Cleanup(running.Wait)
}

func (a agent) giveUp() error {
	r, _, err := update.Asked(a.dir)
	if err != nil {
		return err
	}
	if err := a.tell(update.AgentStatus{ID: r.ID, State: update.StateFailed, Error: "this machine has no second slot"}); err != nil {
		return err
	}
	return os.Remove(filepath.Join(a.dir, "request.json"))
}

// TestConsoleCluster: three nodes, of which one goes away, and then the leader; a fourth one joins them.
func TestConsoleCluster(t *testing.T) {
	t.Parallel()
	shots := artefacts(t)
	var nodes []*harness.Node
	var urls, nfs []string
	for i := range 4 {
		port, err := harness.FreePort()
		if err != nil {
			t.Fatal(err)
		}
		n, err := harness.NewNode(t.TempDir(), "--node", fmt.Sprintf("127.0.0.1:%d", port), "--log-size", "256MiB")
		if err != nil {
			t.Fatal(err)
		}
		if i == 1 || i == 2 {
			if _, err := n.CLI("cluster", "join", strings.TrimSpace(nodes[0].MustCLI(t, "cluster", "token", "create"))); err != nil {
				t.Fatalf("join: %v", err)
			}
		}
		if err := n.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(n.Kill)
		nodes, urls, nfs = append(nodes, n), append(urls, url(n)), append(nfs, n.NFSAddr())
	}
	script(t, "cluster.mjs", nodes, nil, "VARVE_FRESH_CODE="+setUp(t, nodes[3]), "VARVE_URLS="+strings.Join(urls, " "), "VARVE_NFS="+strings.Join(nfs, " "), "VARVE_CODE="+setUp(t, nodes[0]), "VARVE_SHOTS="+shots)
}

var clearArtefacts sync.Once

// artefacts is where screenshots go, cleared once.
func artefacts(t *testing.T) string {
	harness.Need(t, "chromium", "nbdcopy", "nfs-cp")
	dir := harness.Cache("console")
	clearArtefacts.Do(func() {
		if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o755)); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func url(n *harness.Node) string { return fmt.Sprintf("https://127.0.0.1:%d", n.HTTPSPort) }

// setUp is the set-up code that a fresh node has printed.
func setUp(t *testing.T, n *harness.Node) string {
	var code []string
	if err := harness.Poll(10*time.Second, func() error {
		if code = setupCode.FindStringSubmatch(n.Log()); code == nil {
			return fmt.Errorf("no set-up code in the log")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return code[1]
}

// script runs a script of this directory; it may ask for one of the nodes to be killed, and started again, or for something else.
func script(t *testing.T, name string, nodes []*harness.Node, other map[string]func() error, env ...string) {
	ctx, cancel := context.WithTimeout(t.Context(), limit+soak(t)*5/4)
	defer cancel()
	node := "node"
	if own := harness.Cache("node/bin/node"); exists(own) { // where setup puts Node.js if the system's is too old
		node = own
	}
	cmd := exec.CommandContext(ctx, node, filepath.Join(harness.Root(), "test/console", name))
	cmd.Env = append(os.Environ(), env...)
	// The browser's processes are the script's: they end with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 10 * time.Second
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	finished := false
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var s step
		if err := json.Unmarshal(lines.Bytes(), &s); err != nil {
			t.Logf("%s: %s", name, lines.Text())
			continue
		}
		switch {
		case s.Show != "":
			harness.Show("%s", s.Show)
		case s.Do == "kill":
			nodes[s.Node].Kill()
		case s.Do == "start":
			if err := nodes[s.Node].Start(); err != nil {
				t.Errorf("start the appliance again: %v", err)
			}
		case s.Do != "":
			do, ok := other[s.Do]
			if !ok {
				t.Errorf("%s asks for %q, which is not known", name, s.Do)
			} else if err := do(); err != nil {
				t.Errorf("%s: %v", s.Do, err)
			}
		case s.Step == "end":
			finished = true
		default:
			t.Run(s.Step, func(t *testing.T) {
				t.Logf("%.1f s", s.Seconds)
				if s.Error != "" {
					t.Error(s.Error)
				}
			})
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%s: %v", name, err)
	}
	if !finished {
		t.Error("the script did not come to its end")
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// soak is how long the memory of a browser that follows changes is watched, beyond what every run does: VARVE_CONSOLE_SOAK=1h.
func soak(t *testing.T) time.Duration {
	text := os.Getenv("VARVE_CONSOLE_SOAK")
	if text == "" {
		return 0
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		t.Fatalf("VARVE_CONSOLE_SOAK: %v", err)
	}
	return d
}

// TestParity: every operation of the customer API is used by the console or exempt with a reason. Replication to other clusters (pairs, lag,
// promote, failback) has no operation and no page: nothing behind it exists yet, and a page that could do nothing would say otherwise.
func TestParity(t *testing.T) {
	exempt := map[string]string{
		"issueToken":          "a program asks for its own token; the page of API clients says how",
		"streamEvents":        "the console follows /api/internal/changes, which tells of more",
		"getClient":           "the list of API clients says all of each",
		"getToken":            "the list of tokens says all of each",
		"getVMachineSnapshot": "the list of a VM's snapshots says all of each",
	}
	spec, err := os.ReadFile(filepath.Join(harness.Root(), "control/api/customer/openapi.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	// Of a path's members only those that are methods have an operationId; parameters are lists.
	var doc struct {
		Paths map[string]map[string]yaml.Node `yaml:"paths"`
	}
	if err := yaml.Unmarshal(spec, &doc); err != nil {
		t.Fatal(err)
	}
	var source strings.Builder
	err = filepath.WalkDir(filepath.Join(harness.Root(), "appliance/console/src"), func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || strings.Contains(path, ".gen.") || !strings.HasSuffix(path, ".ts") && !strings.HasSuffix(path, ".tsx") {
			return err
		}
		b, err := os.ReadFile(path)
		source.Write(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	text := source.String()
	used, operations := 0, 0
	for path, item := range doc.Paths {
		for method, node := range item {
			var o struct {
				ID string `yaml:"operationId"`
			}
			if node.Kind != yaml.MappingNode || node.Decode(&o) != nil || o.ID == "" {
				continue
			}
			operations++
			// A call, a hook, a table or a confirmation; or a choice between two in a call: what a page merely lists does not count.
			calls := regexp.MustCompile(`(call|useCall|effectOf|upload)\((\w+ \? '\w+' : )?'` + o.ID + `'|\bop="` + o.ID + `"|act\('` + o.ID + `'`)
			isUsed := calls.MatchString(text)
			switch reason := exempt[o.ID]; {
			case isUsed && reason != "":
				t.Errorf("%s is exempt and used", o.ID)
			case isUsed:
				used++
			case reason == "":
				t.Errorf("%s (%s %s) is not used by the console and not exempt", o.ID, method, path)
			}
		}
	}
	harness.Show("console: %d of %d operations of the customer API, %d exempt", used, operations, len(exempt))
}
