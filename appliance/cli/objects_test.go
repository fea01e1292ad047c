package cli

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	v1 "varve/control/api/customer"
)

// Every operation of the customer API has a command, or says why it has none; every such command is there.
func TestEveryOperationHasACommand(t *testing.T) {
	var spec struct {
		Paths map[string]map[string]yaml.Node `yaml:"paths"`
	}
	if err := yaml.Unmarshal(v1.Spec, &spec); err != nil {
		t.Fatal(err)
	}
	e := &env{std: Std{In: strings.NewReader(""), Out: io.Discard, Err: io.Discard, Getenv: func(string) string { return "" }}}
	root := e.root()
	operations, exempt := 0, 0
	for path, item := range spec.Paths {
		for method, node := range item {
			var op struct {
				ID  string `yaml:"operationId"`
				CLI string `yaml:"x-varve-cli"`
			}
			if method == "parameters" {
				continue
			}
			if err := node.Decode(&op); err != nil {
				t.Fatal(err)
			}
			operations++
			if reason, ok := strings.CutPrefix(op.CLI, "none:"); ok {
				exempt++
				if len(reason) < 15 {
					t.Errorf("%s: no reason for having no command", op.ID)
				}
				continue
			}
			for _, line := range strings.Split(op.CLI, "|") {
				words := strings.Fields(line)
				c, rest, err := root.Find(words)
				if err != nil || len(rest) > 0 || c.HasSubCommands() || len(words) == 0 {
					t.Errorf("%s %s (%s): there is no command %q", method, path, op.ID, line)
				}
			}
		}
	}
	fmt.Printf("» every one of %d customer operations has a command, %d with a written exemption\n", operations, exempt)
}

// Commands of objects against a real appliance, one after the other.
func TestObjectCommands(t *testing.T) {
	data := serving(t)
	dir := t.TempDir()
	write := func(name, text string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	policy := write("policy.json", `{"iops_max":700,"retention":{"all_days":2}}`)
	for _, step := range []struct {
		line, in string
		code     int
		out, err string
	}{
		{"vdisk create default/d --size 1MiB", "", 0, `default/d`, ``},
		{"snapshot create default/d --name s1 --dry-run", "", 0, `^Would: takes a snapshot of vDisk default/d`, ``},
		{"snapshot create default/d --name s1 --keep", "", 0, `(?m)^Name: +s1$`, ``},
		{"snapshot list default/d", "", 0, `(?s)^NAME .*\ns1 `, ``},
		{"snapshot list default/d -o yaml", "", 0, `(?m)^  +name: s1$`, ``},
		{"snapshot show default/d@s1", "", 0, `Snapshot name`, ``},
		{"snapshot delete default/d@s1", "", 2, ``, `repeat with --confirm default/d@s1`},
		{"snapshot delete default/d@s1 --confirm default/d@s1", "", 4, ``, `is kept`},
		{"snapshot keep default/d@s1 --off", "", 0, `(?m)^Sticky: +no$`, ``},
		{"vdisk clone default/d@s1 default/c", "", 0, `(?m)^Parent: +default/d@`, ``},
		{"vdisk clone default/d@nope default/x", "", 3, ``, `not found`},
		{"vdisk rollback default/d@s1 --confirm default/d", "", 0, `(?m)^Automatic: +yes$`, ``},
		{"vpool rotate-keys default", "", 4, ``, `is not encrypted`},
		{"vdisk promote default/d", "", 4, ``, `is no clone`},
		{"vdisk promote default/c --dry-run", "", 0, `nothing is copied`, ``},
		{"vdisk promote default/c", "", 0, `(?m)^Name: +default/c$`, ``},
		{"vdisk show default/d -o json", "", 0, `"parent": ?"default/c@`, ``},
		{"snapshot list default/c", "", 0, `(?s)^NAME .*\ns1 `, ``},
		{"vdisk promote default/d", "", 0, `(?m)^Name: +default/d$`, ``},
		{"vdisk flatten default/d", "", 4, ``, `is no clone`},
		{"vdisk flatten default/c", "", 0, `(?m)^State: +succeeded$`, ``},
		{"vdisk show default/c -o json", "", 0, `"name": ?"default/c"`, ``},
		{"vdisk rewind default/d --to 5m", "", 4, ``, `no rewind window`},
		{"vdisk rewind default/d --to yesterday", "", 2, ``, `how long ago`},
		{"vdisk ledger default/d", "", 0, `Unbacked bytes`, ``},
		{"vdisk delete default/c --confirm default/c --dry-run", "", 0, `stay in the trash`, ``},
		{"vdisk delete default/c --confirm default/c", "", 0, ``, ``},
		{"vdisk trash list", "", 0, `default/c`, ``},
		{"vdisk trash restore default/c --as default/back", "", 0, `default/back`, ``},
		{"template set default/back", "", 0, `(?m)^Template: +yes$`, ``},
		{"template create-vdisks default/back default/vm --count 3", "", 0, `(?m)^State: +succeeded$`, ``},
		{"vdisk list --filter name~vm -o json", "", 0, `default/vm-3`, ``},
		{"task list", "", 0, `make vDisks from a template`, ``},
		{"task show nope", "", 3, ``, `not found`},
		{"user create alice --role admin", "correct horse battery\n", 0, `(?m)^Name: +alice$`, ``},
		{"user create bob --role viewer", "short\n", 2, ``, `weak`},
		{"user create bob --role viewer", "correct horse battery\n", 0, `bob`, ``},
		{"user set bob --role operator --full-name Bob", "", 0, `(?m)^Roles: +operator$`, ``},
		{"user set bob", "", 2, ``, `nothing to change`},
		{"user list", "", 0, `(?s)alice.*bob`, ``},
		{"user delete alice --confirm alice", "", 4, ``, `no administrator`},
		{"group create ops --role operator", "", 0, `ops`, ``},
		{"user set bob --group ops", "", 0, `(?m)^Groups: +ops$`, ``},
		{"group delete ops --confirm ops", "", 4, ``, `in use`},
		{"role list", "", 0, `storage-admin`, ``},
		{"client create backup --role storage-admin", "", 0, `(?m)^Secret: +varve_`, ``},
		{"client list", "", 0, `backup`, ``},
		{"token create ci --role viewer --lasts 24h", "", 0, `(?m)^Secret: +varve_`, ``},
		{"token list", "", 0, `(?s)admin.*ci`, ``},
		{"token delete ci", "", 0, ``, ``},
		{"audit verify", "", 0, `(?m)^Intact: +yes$`, ``},
		{"audit list --filter action=createToken", "", 0, `token ci`, ``},
		{"audit export", "", 0, `"action":"createUser"`, ``},
		{"whoami", "", 0, `(?m)^Name: +uid/`, ``},
		{"setup-code", "", 4, ``, `made already`},
		{"policy set vdisk:default/d --file " + policy, "", 0, `(?m)^iops_max +700 +vdisk$`, ``},
		{"policy show vdisk:default/d", "", 0, `(?m)^verify_days +30 +default$`, ``},
		{"policy inherit vdisk:default/d", "", 0, ``, ``},
		{"schedule set scrub --disable", "", 0, ``, `schedule set`},
		{"schedule list", "", 0, `(?m)^scrub .* no `, ``},
		{"schedule inherit scrub", "", 0, ``, ``},
		{"config set console.motd hello", "", 0, `hello`, ``},
		{"config get console.motd -o json", "", 0, `"version": 1`, ``},
		{"config unset console.motd", "", 0, ``, ``},
		{"domain create rack1", "", 0, `rack1`, ``},
		{"domain delete rack1 --confirm rack1", "", 0, ``, ``},
		{"branding create acme --product Acme", "", 0, `Acme`, ``},
		{"sink create hook --url https://hooks.example/x --disabled", "", 0, `(?m)^Secret: +[0-9a-f]{64}$`, ``},
		{"sink delete hook --confirm hook", "", 0, ``, ``},
		{"event list --filter topic=volume", "", 0, `volume_create`, ``},
		{"vpool set default --client 127.0.0.0/8", "", 0, `(?m)^NFS clients: +127.0.0.0/8$`, ``},
		{"api GET /self", "", 0, `"kind":"local"`, ``},
		{"api GET /nope", "", 3, ``, `no such path`},
		{"man " + dir + "/man", "", 0, ``, ``},
		{"support sections", "", 0, `(?m)^vdisks `, ``},
		{"support bundle " + dir + "/bundle.tar.gz", "", 0, `holds 17 sections`, ``},
		{"support bundle " + dir + "/bundle.tar.gz", "", 4, ``, `there already`},
		{"support bundle " + dir + "/b2 --section moon", "", 2, ``, `no section`},
	} {
		r := feed(t.Context(), step.in, append([]string{"--data", data}, strings.Split(step.line, " ")...)...)
		for _, c := range []struct{ what, got, want string }{{"stdout", r.out, step.out}, {"stderr", r.err, step.err}} {
			if c.want == "" && c.got != "" || !regexp.MustCompile(c.want).MatchString(c.got) {
				t.Errorf("varve %s: %s is %q, want %q", step.line, c.what, c.got, c.want)
			}
		}
		if r.code != step.code {
			t.Errorf("varve %s: exit code %d, want %d: %s", step.line, r.code, step.code, r.err)
		}
	}
	if b, err := os.ReadFile(filepath.Join(dir, "man", "varve-vdisk-clone.1")); err != nil || !strings.Contains(string(b), "without copying") {
		t.Errorf("manual page: %v", err)
	}
	for name, text := range unpack(t, filepath.Join(dir, "bundle.tar.gz")) {
		for _, canary := range []string{"alice", "hooks.example", "local://", "varve_", "argon2", "127.0.0.1:0", "correct horse"} {
			if strings.Contains(text, canary) && name != "audit.json" {
				t.Errorf("%s of the support bundle holds %s:\n%s", name, canary, text)
			}
		}
		if name == "vdisks.json" && !strings.Contains(text, "default/d") || name == "manifest.json" && strings.Contains(text, "missing") {
			t.Errorf("%s: %s", name, text)
		}
	}
	var st v1.Status
	if r := varve(t.Context(), nil, "--data", data, "status", "-o", "json"); json.Unmarshal([]byte(r.out), &st) != nil {
		t.Fatal(r)
	}
	// Signing in over the network: a token for an hour in a file of one's own.
	for _, s := range st.Services {
		if s.Name != "https" {
			continue
		}
		token := filepath.Join(dir, "token")
		remote := []string{"--at", "https://" + s.Address, "--ca", filepath.Join(data, "tls", "ca.crt"), "--token-file", token}
		if r := feed(t.Context(), "wrong\n", append(remote, "login", "alice")...); r.code != ExitNotAllowed {
			t.Errorf("a wrong password: %+v", r)
		}
		if r := feed(t.Context(), "correct horse battery\n", append(remote, "login", "alice")...); r.code != 0 {
			t.Fatalf("login: %+v", r)
		}
		if r := varve(t.Context(), nil, append(remote, "whoami")...); !strings.Contains(r.out, "alice") {
			t.Errorf("whoami: %+v", r)
		}
	}
}

// feed is varve with something on standard input.
func feed(ctx context.Context, in string, args ...string) ran {
	var out, errOut buffer
	code := Main(ctx, args, Std{In: strings.NewReader(in), Out: &out, Err: &errOut, Getenv: func(string) string { return "" }, Version: "1.2.3"})
	return ran{code, out.String(), errOut.String()}
}

// unpack reads a support bundle.
func unpack(t *testing.T, path string) map[string]string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	zip, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	out := make(map[string]string)
	for files := tar.NewReader(zip); ; {
		h, err := files.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(files)
		if err != nil {
			t.Fatal(err)
		}
		out[filepath.Base(h.Name)] = string(b)
	}
}
