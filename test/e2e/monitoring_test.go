//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"varve/appliance/doctor"
	"varve/test/harness"
)

// Every metric that the shipped alert rules and dashboard use is one that an appliance has, every check that a rule names is one, and
// promtool, where it is installed, takes the rules.
func TestAPIMonitoring(t *testing.T) {
	n := harness.StartNode(t)
	n.CreateDisk(t, "m", "64MiB")
	harness.Qemu(t, time.Minute, "qemu-io", "-f", "raw", "-c", "write 0 1M", "-c", "read 0 1M", n.NBD("m"))
	client := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(n.Data, "varve.sock"))
	}}}
	defer client.CloseIdleConnections()
	start := time.Now()
	res, err := client.Get("http://varve/metrics")
	must(t, err)
	body, err := io.ReadAll(res.Body)
	must(t, errFirst(err, res.Body.Close()))
	took := time.Since(start)
	have := map[string]bool{"up": true}
	for line := range strings.Lines(string(body)) {
		if name, ok := strings.CutPrefix(line, "# TYPE "); ok {
			name, _, _ = strings.Cut(name, " ")
			for _, suffix := range []string{"", "_bucket", "_sum", "_count"} {
				have[name+suffix] = true
			}
		}
	}
	for _, want := range []string{`varve_vdisk_io_operations_total{op="write",vdisk="m",vpool="default"}`, `varve_vpool_io_duration_seconds_bucket{op="write",vpool="default"`,
		`varve_backend_up{vpool="default"} 1`, "varve_control_leader 1", `varve_health_check_status{check="log.room"} 0`} {
		if !strings.Contains(string(body), want) {
			t.Errorf("no %s among the metrics", want)
		}
	}
	rules := n.MustCLI(t, "monitoring", "rules")
	var file struct {
		Groups []struct {
			Rules []struct {
				Alert, Record, Expr string
				Labels, Annotations map[string]string
			}
		}
	}
	must(t, yaml.Unmarshal([]byte(rules), &file))
	var exprs []string
	alerts := 0
	for _, g := range file.Groups {
		for _, r := range g.Rules {
			exprs = append(exprs, r.Expr)
			if r.Record != "" {
				have[r.Record] = true
				continue
			}
			alerts++
			if check := r.Labels["check"]; check != "" {
				if _, ok := doctor.CodeOf(check); !ok {
					t.Errorf("%s names the check %s, which there is not", r.Alert, check)
				}
			}
			if r.Annotations["summary"] == "" || r.Annotations["remedy"] == "" || r.Labels["severity"] == "" {
				t.Errorf("%s lacks a summary, remedy or severity", r.Alert)
			}
		}
	}
	var board struct {
		Panels []struct {
			Targets []struct{ Expr string }
		}
		Templating struct{ List []struct{ Query any } }
	}
	must(t, json.Unmarshal([]byte(n.MustCLI(t, "monitoring", "dashboard")), &board))
	panels := 0
	for _, p := range board.Panels {
		for _, target := range p.Targets {
			exprs = append(exprs, target.Expr)
		}
		panels += min(1, len(p.Targets))
	}
	for _, v := range board.Templating.List {
		if q, ok := v.Query.(string); ok {
			exprs = append(exprs, q)
		}
	}
	used := regexp.MustCompile(`\b(varve|process|go)_[a-z0-9_]+`)
	names := make(map[string]bool)
	for _, e := range exprs {
		for _, name := range used.FindAllString(e, -1) {
			names[name] = true
			if !have[name] {
				t.Errorf("%s is no metric of an appliance, and is used in: %s", name, e)
			}
		}
	}
	by := "promtool is not installed"
	tool, err := exec.LookPath("promtool")
	if err != nil {
		tool = filepath.Join(harness.Root(), ".cache/promtool")
		_, err = os.Stat(tool)
	}
	if err != nil && os.Getenv("VARVE_REQUIRE_TOOLS") != "" {
		t.Errorf("%s: run test/setup.sh cache", by)
	}
	if err == nil {
		path := filepath.Join(t.TempDir(), "rules.yaml")
		must(t, os.WriteFile(path, []byte(rules), 0o600))
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		out, err := exec.CommandContext(ctx, tool, "check", "rules", path).CombinedOutput()
		if err != nil {
			t.Fatalf("promtool: %v: %s", err, out)
		}
		by = "promtool takes the rules"
	}
	if scrape := n.MustCLI(t, "monitoring", "scrape"); !strings.Contains(scrape, fmt.Sprint(n.HTTPSPort)) {
		t.Errorf("scrape configuration: %s", scrape)
	}
	fmt.Printf("» monitoring: %d alerts and %d panels use %d metrics, all there; %s; a scrape took %s for %d KiB\n", alerts, panels, len(names), by,
		took.Round(time.Millisecond), len(body)>>10)
}

func errFirst(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
