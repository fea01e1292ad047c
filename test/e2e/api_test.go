//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"varve/test/harness"
)

// readmeExamples is the block of commands in README's chapter on the API.
func readmeExamples(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(harness.Root(), "README.md"))
	must(t, err)
	_, chapter, found := strings.Cut(string(b), "## The API\n")
	_, block, begun := strings.Cut(chapter, "```bash\n")
	block, _, ended := strings.Cut(block, "```")
	if !found || !begun || !ended {
		t.Fatal("README has no block of API examples")
	}
	return block
}

// curl with client credentials does README's API examples as they stand there.
func TestAPIReadmeExamples(t *testing.T) {
	harness.Need(t, "curl", "jq", "bash")
	n := harness.StartNode(t)
	bin := t.TempDir()
	must(t, os.Symlink(harness.Binary(), filepath.Join(bin, "varve")))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	block := readmeExamples(t)
	cmd := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", block)
	cmd.Env = append(os.Environ(), "DATA="+n.Data, fmt.Sprintf("URL=https://127.0.0.1:%d", n.HTTPSPort), "PATH="+bin+":"+os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v:\n%s", err, out)
	}
	for _, want := range []string{`"name":"default/web"`, `"size":21474836480`, `"name":"before"`, `"parent":"default/web@`, `"size":42949672960`, `"summary":"deletes vDisk default/test"`,
		"event: volume_create"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("no %s in the answers:\n%s", want, out)
		}
	}
	if text := n.MustCLI(t, "vdisk", "trash", "list"); !strings.Contains(text, "default/test") {
		t.Errorf("trash: %s", text)
	}
	fmt.Printf("» README's %d API calls by curl with client credentials do what they say\n", strings.Count(block, "\napi "))
}

// Secrets planted in every place that takes one are in no file of the appliance, in no output and in no log.
func TestAPISecretsStayOut(t *testing.T) {
	n := harness.StartNode(t, "--log-level", "debug")
	const canary = "canary-7f3a-horse-battery"
	secrets := []string{canary}
	feed := func(in string, args ...string) string {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		cmd := exec.CommandContext(ctx, harness.Binary(), append([]string{"--data", n.Data, "-o", "json"}, args...)...)
		cmd.Stdin = strings.NewReader(in)
		out, _ := cmd.CombinedOutput()
		return string(out)
	}
	shown := feed(canary+"1\n", "user", "create", "eve", "--role", "admin")
	shown += feed(canary+"1\n", "user", "create", "eve", "--role", "admin")
	shown += feed(canary+"2\n", "user", "set", "eve", "--password")
	for _, args := range [][]string{{"client", "create", "c", "--role", "viewer"}, {"token", "create", "t"},
		{"sink", "create", "hook", "--url", "https://hooks.example/", "--disabled"}} {
		var made struct {
			Secret string `json:"secret"`
		}
		must(t, json.Unmarshal([]byte(feed("", args...)), &made))
		if len(made.Secret) < 32 {
			t.Fatalf("%v shows no secret", args)
		}
		secrets = append(secrets, made.Secret)
	}
	key := filepath.Join(t.TempDir(), "key")
	must(t, os.WriteFile(key, []byte(canary+"3:pass"), 0o600))
	shown += feed("", "sink", "create", "mq", "--kind", "amqp", "--url", "amqps://mq.example/", "--exchange", "x", "--secret-file", key, "--disabled")
	credentials := filepath.Join(t.TempDir(), "credentials")
	must(t, os.WriteFile(credentials, []byte("access_key = "+canary+"4\nsecret_key = "+canary+"5\n"), 0o600))
	shown += feed("", "vpool", "create", "bucket", "--backend", "s3://b/p?endpoint=https://127.0.0.1:1&region=x", "--credentials-file", credentials)
	for _, args := range [][]string{{"user", "list"}, {"client", "list"}, {"token", "list"}, {"sink", "list"}, {"audit", "list"}, {"event", "list"}, {"status"}, {"task", "list"}} {
		shown += feed("", args...)
	}
	must(t, n.Stop())
	places, looked := map[string]string{"what was printed": shown, "the log": n.Log()}, 0
	must(t, filepath.WalkDir(n.Data, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || filepath.Base(filepath.Dir(path)) == "log" {
			return err
		}
		b, err := os.ReadFile(path)
		looked++
		places[path] = string(b)
		return err
	}))
	for where, text := range places {
		for i, s := range secrets {
			if strings.Contains(text, s) {
				t.Errorf("secret %d is in %s", i, where)
			}
		}
	}
	if looked < 5 || !strings.Contains(shown, "eve") {
		t.Fatalf("looked through %d files, %d bytes of output", looked, len(shown))
	}
	fmt.Printf("» %d planted secrets are in none of %d files, in no log and in no output\n", len(secrets)+5, looked)
}
