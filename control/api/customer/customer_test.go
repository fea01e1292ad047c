package customer

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
)

const generator = "github.com/oapi-codegen/oapi-codegen/v2/cmd/oapi-codegen@v2.8.2"

// The generated code is what the generator makes of the specifications, here and of the internal API.
func TestGenerated(t *testing.T) {
	if testing.Short() {
		t.Skip("runs the generator")
	}
	for _, dir := range []string{".", "../internal"} {
		config, err := os.ReadFile(filepath.Join(dir, "generate.yaml"))
		if err != nil {
			t.Fatal(err)
		}
		var c struct {
			Output string `yaml:"output"`
		}
		if err := yaml.Unmarshal(config, &c); err != nil {
			t.Fatal(err)
		}
		out := filepath.Join(t.TempDir(), c.Output)
		temp := filepath.Join(t.TempDir(), "generate.yaml")
		if err := os.WriteFile(temp, bytes.Replace(config, []byte("output: "+c.Output), []byte("output: "+out), 1), 0o600); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, "go", "run", generator, "-config", temp, "openapi.yaml")
		cmd.Dir = dir
		if text, err := cmd.CombinedOutput(); err != nil {
			if os.Getenv("VARVE_REQUIRE_TOOLS") == "" && bytes.Contains(text, []byte("dial tcp")) {
				t.Skipf("the generator cannot be had: %s", text)
			}
			t.Fatalf("%v: %s", err, text)
		}
		want, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		have, err := os.ReadFile(filepath.Join(dir, c.Output))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(want, have) {
			t.Errorf("%s is not what the generator makes: run go generate ./control/api/...", filepath.Join(dir, c.Output))
		}
	}
}

// tree is a node of a specification.
type tree = map[string]any

func parse(t *testing.T, b []byte) tree {
	t.Helper()
	var out tree
	if err := yaml.Unmarshal(b, &out); err != nil {
		t.Fatal(err)
	}
	return out
}

// comparison finds what in a specification breaks a client of an older one.
type comparison struct {
	old, new tree
	breaks   []string
	seen     map[string]bool
}

func compare(old, new tree) []string {
	c := &comparison{old: old, new: new, seen: make(map[string]bool)}
	c.paths()
	slices.Sort(c.breaks)
	return c.breaks
}

func (c *comparison) broken(where, format string, args ...any) {
	c.breaks = append(c.breaks, where+": "+fmt.Sprintf(format, args...))
}

func sub(t any, name string) tree {
	m, ok := t.(tree)
	if !ok {
		return nil
	}
	s, _ := m[name].(tree)
	return s
}

func list(t tree, name string) []any { l, _ := t[name].([]any); return l }

// resolve follows a reference.
func resolve(root, t tree) tree {
	ref, ok := t["$ref"].(string)
	if !ok {
		return t
	}
	at := root
	for part := range strings.SplitSeq(strings.TrimPrefix(ref, "#/"), "/") {
		at = sub(at, part)
	}
	return at
}

func (c *comparison) paths() {
	for path, item := range sub(c.old, "paths") {
		for method, op := range item.(tree) {
			if method == "parameters" {
				continue
			}
			where := strings.ToUpper(method) + " " + path
			now := sub(sub(sub(c.new, "paths"), path), method)
			if now == nil {
				c.broken(where, "is gone")
				continue
			}
			c.operation(where, op.(tree), now, parameters(c.old, item, op), parameters(c.new, sub(sub(c.new, "paths"), path), now))
		}
	}
}

// parameters are an operation's, and those of its path, by place and name.
func parameters(root tree, item, op any) map[string]tree {
	out := make(map[string]tree)
	for _, owner := range []any{item, op} {
		o, _ := owner.(tree)
		for _, p := range list(o, "parameters") {
			r := resolve(root, p.(tree))
			out[fmt.Sprint(r["in"], " ", r["name"])] = r
		}
	}
	return out
}

func (c *comparison) operation(where string, old, now tree, oldParameters, newParameters map[string]tree) {
	if old["operationId"] != now["operationId"] {
		c.broken(where, "operationId %v has become %v", old["operationId"], now["operationId"])
	}
	for _, role := range list(old, "x-varve-roles") {
		if !slices.Contains(list(now, "x-varve-roles"), role) {
			c.broken(where, "role %v may not call it any more", role)
		}
	}
	for name, p := range oldParameters {
		n, ok := newParameters[name]
		if !ok {
			c.broken(where, "parameter %s is gone", name)
			continue
		}
		c.schema(where+" parameter "+name, sub(p, "schema"), sub(n, "schema"), true)
	}
	for name, n := range newParameters {
		if o := oldParameters[name]; n["required"] == true && (o == nil || o["required"] != true) {
			c.broken(where, "parameter %s is required now", name)
		}
	}
	c.content(where+" body", sub(old, "requestBody"), sub(now, "requestBody"), true)
	for status, r := range sub(old, "responses") {
		n, ok := sub(now, "responses")[status].(tree)
		if !ok {
			c.broken(where, "answer %s is gone", status)
			continue
		}
		c.content(where+" answer "+status, resolve(c.old, r.(tree)), resolve(c.new, n), false)
	}
}

func (c *comparison) content(where string, old, now tree, request bool) {
	for media, o := range sub(old, "content") {
		n := sub(sub(now, "content"), media)
		if n == nil {
			c.broken(where, "%s is gone", media)
			continue
		}
		c.schema(where, sub(o, "schema"), sub(n, "schema"), request)
	}
}

// schema compares what is sent (request) or answered.
func (c *comparison) schema(where string, old, now tree, request bool) {
	if ref, ok := old["$ref"].(string); ok {
		key := fmt.Sprint(ref, request)
		if c.seen[key] {
			return
		}
		c.seen[key] = true
		where += " " + ref[strings.LastIndexByte(ref, '/')+1:]
	}
	old, now = resolve(c.old, old), resolve(c.new, now)
	if now == nil {
		c.broken(where, "is gone")
		return
	}
	if a, b := kinds(old), kinds(now); !a.covers(b) && !request || request && !b.covers(a) {
		c.broken(where, "type %v has become %v", old["type"], now["type"])
	}
	for _, limit := range []struct {
		name string
		sign float64
	}{{"maxLength", 1}, {"maximum", 1}, {"maxItems", 1}, {"minLength", -1}, {"minimum", -1}, {"minItems", -1}} {
		o, had := number(old[limit.name])
		n, has := number(now[limit.name])
		if request && has && (!had || (o-n)*limit.sign > 0) {
			c.broken(where, "%s is narrower", limit.name)
		}
	}
	for _, v := range list(old, "enum") {
		if !slices.Contains(list(now, "enum"), v) && now["enum"] != nil {
			c.broken(where, "value %v is gone", v)
		}
	}
	for name, p := range sub(old, "properties") {
		n := sub(sub(now, "properties"), name)
		if n == nil {
			c.broken(where, "field %s is gone", name)
			continue
		}
		c.schema(where+"."+name, p.(tree), n, request)
	}
	for _, name := range list(now, "required") {
		if request && !slices.Contains(list(old, "required"), name) {
			c.broken(where, "field %v is required now", name)
		}
	}
	for _, name := range list(old, "required") {
		if !request && !slices.Contains(list(now, "required"), name) {
			c.broken(where, "field %v is not always there any more", name)
		}
	}
	if items := sub(old, "items"); items != nil {
		c.schema(where+"[]", items, sub(now, "items"), request)
	}
}

type kindSet map[any]bool

func kinds(t tree) kindSet {
	if l, ok := t["type"].([]any); ok {
		s := kindSet{}
		for _, k := range l {
			s[k] = true
		}
		return s
	}
	return kindSet{t["type"]: true}
}

func (k kindSet) covers(other kindSet) bool {
	for v := range maps.Keys(other) {
		if !k[v] {
			return false
		}
	}
	return true
}

func number(v any) (float64, bool) {
	switch n := v.(type) {
	case int:
		return float64(n), true
	case float64:
		return n, true
	}
	return 0, false
}

// Nothing that a client of the last release relies on is gone.
func TestNothingBreaks(t *testing.T) {
	released, err := os.ReadFile("released.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range compare(parse(t, released), parse(t, Spec)) {
		t.Errorf("breaks clients of the last release: %s", b)
	}
}

// The gate itself: each kind of break planted in a copy is found, and an addition is not taken for one.
func TestGateFindsBreaks(t *testing.T) {
	text := string(Spec)
	for what, edit := range map[string][2]string{
		"an operation gone":              {"    delete:\n      operationId: deleteVPool", "    x-delete:\n      operationId: deleteVPool"},
		"a field of an answer gone":      {"        deleting: {type: integer, description: Deleted files", "        removing: {type: integer, description: Deleted files"},
		"a type changed":                 {"        findings: {type: object, additionalProperties", "        findings: {type: string, additionalProperties"},
		"a required field of a request":  {"      required: [name, backend]", "      required: [name, backend, clients]"},
		"a field not always there":       {"      required: [unique, shared, snapshot]", "      required: [snapshot]"},
		"a parameter gone":               {"        - {$ref: '#/components/parameters/Count'}\n      responses:\n        '200':\n          description: A page of vDisks", "      responses:\n        '200':\n          description: A page of vDisks"},
		"a narrower limit":               {"maximum: 1000, default: 100", "maximum: 500, default: 100"},
		"a role that may call no longer": {"      x-varve-roles: [security-admin, admin]\n      x-varve-cli: audit list", "      x-varve-roles: [admin]\n      x-varve-cli: audit list"},
		"an answer's status changed":     {"        '201':\n          description: The vPool", "        '203':\n          description: The vPool"},
	} {
		if what == "a field not always there" {
			edit = [2]string{"      required: [snapshot, unique, shared]", "      required: [snapshot]"}
		}
		if strings.Count(text, edit[0]) == 0 {
			t.Errorf("%s: nothing to plant it in", what)
			continue
		}
		if len(compare(parse(t, Spec), parse(t, []byte(strings.Replace(text, edit[0], edit[1], 1))))) == 0 {
			t.Errorf("%s is not found", what)
		}
	}
	added := strings.Replace(text, "        name: {type: string, pattern: '^[a-z0-9][a-z0-9-]{0,62}$'}\n        backend:", "        note: {type: string}\n        name: {type: string, pattern: '^[a-z0-9][a-z0-9-]{0,62}$'}\n        backend:", 1)
	if breaks := compare(parse(t, Spec), parse(t, []byte(added))); added == text || len(breaks) > 0 {
		t.Errorf("an optional field is taken for a break: %v", breaks)
	}
}

// What is deprecated stays for at least twelve months.
func TestDeprecationsLast(t *testing.T) {
	for path, item := range sub(parse(t, Spec), "paths") {
		for method, op := range item.(tree) {
			o, ok := op.(tree)
			if !ok || o["x-varve-deprecated"] == nil {
				continue
			}
			from, err1 := time.Parse(time.DateOnly, fmt.Sprint(o["x-varve-deprecated"]))
			until, err2 := time.Parse(time.DateOnly, fmt.Sprint(o["x-varve-sunset"]))
			if err1 != nil || err2 != nil || until.Before(from.AddDate(1, 0, 0)) {
				t.Errorf("%s %s: deprecated %v, sunset %v", method, path, o["x-varve-deprecated"], o["x-varve-sunset"])
			}
		}
	}
}
