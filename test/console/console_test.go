//go:build e2e

// Package console drives the web console of the real binary with a real browser, from an empty data directory: the first run, a day's work with
// data written and read back by real NBD and NFS clients, a viewer who is refused, a broken connection; then every page in light and dark, wide
// and narrow: no axe violation, no error in the browser's console, nothing that scrolls sideways.
//
// console.mjs is the script, run by the Node.js that builds the console with its playwright-core and Debian's chromium; each step that it prints
// is one result here. Screenshots are left in .cache/console.
package console

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"varve/test/harness"
)

const limit = 8 * time.Minute

// step is one line that the script prints.
type step struct {
	Step  string `json:"step"`
	Error string `json:"error"`
	Show  string `json:"show"`
	Do    string `json:"do"`
}

var setupCode = regexp.MustCompile(`code ([A-Z0-9]+(?:-[A-Z0-9]+)+)`)

func TestConsole(t *testing.T) {
	t.Setenv("PATH", harness.Cache("node/bin")+":"+os.Getenv("PATH")) // where setup puts Node.js if the system's is too old
	harness.Need(t, "chromium", "node", "nbdcopy", "nfs-cp")
	shots := harness.Cache("console")
	if err := os.RemoveAll(shots); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(shots, 0o755); err != nil {
		t.Fatal(err)
	}
	n := harness.StartNode(t)
	var code []string
	if err := harness.Poll(10*time.Second, func() error {
		if code = setupCode.FindStringSubmatch(n.Log()); code == nil {
			return fmt.Errorf("no set-up code in the log")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "node", filepath.Join(harness.Root(), "test/console/console.mjs"))
	cmd.Env = append(os.Environ(), "VARVE_URL="+fmt.Sprintf("https://127.0.0.1:%d", n.HTTPSPort), "VARVE_CODE="+code[1], "VARVE_NBD="+n.NBDAddr(),
		fmt.Sprintf("VARVE_NFS_PORT=%d", n.NFSPort), "VARVE_SHOTS="+shots, "VARVE_TMP="+t.TempDir())
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
			t.Logf("console.mjs: %s", lines.Text())
			continue
		}
		switch {
		case s.Show != "":
			harness.Show("%s", s.Show)
		case s.Do == "kill":
			n.Kill()
		case s.Do == "start":
			if err := n.Start(); err != nil {
				t.Errorf("start the appliance again: %v", err)
			}
		case s.Step == "end":
			finished = true
		default:
			t.Run(s.Step, func(t *testing.T) {
				if s.Error != "" {
					t.Error(s.Error)
				}
			})
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("console.mjs: %v", err)
	}
	if !finished {
		t.Error("the script did not come to its end")
	}
}

// TestParity: every operation of the customer API is used by the console or exempt with a reason.
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
			calls := regexp.MustCompile(`(call|useCall|effectOf)\((\w+ \? '\w+' : )?'` + o.ID + `'|\bop="` + o.ID + `"|act\('` + o.ID + `'`)
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
