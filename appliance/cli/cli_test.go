package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	v1 "varve/control/api/customer"
)

func TestMain(m *testing.M) {
	// The NFS client by which doctor mounts has a goroutine that nothing ends; the command's process ends soon.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/willscott/go-nfs-client/nfs.(*Target).cleanupCache"))
}

// ran is what a command line did.
type ran struct {
	code     int
	out, err string
}

type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func varve(ctx context.Context, vars map[string]string, args ...string) ran {
	var out, errOut buffer
	code := Main(ctx, args, Std{In: strings.NewReader(""), Out: &out, Err: &errOut, Getenv: func(k string) string { return vars[k] }, Version: "1.2.3"})
	return ran{code, out.String(), errOut.String()}
}

// serving starts an appliance by its command line and gives its directory; it is stopped, with exit code 0, at the end.
func serving(t *testing.T, more ...string) (data string) {
	t.Helper()
	data = t.TempDir()
	ctx, cancel := context.WithCancel(context.Background())
	var out, errOut buffer
	args := append([]string{"serve", "--data", data, "--nbd", "127.0.0.1:0", "--nfs", "127.0.0.1:0", "--https", "127.0.0.1:0",
		"--log-size", "256MiB", "--map-size", "16MiB"}, more...)
	ended := make(chan int, 1)
	go func() {
		ended <- Main(ctx, args, Std{Out: &out, Err: &errOut, Getenv: func(string) string { return "" }, Version: "1.2.3"})
	}()
	t.Cleanup(func() {
		cancel()
		select {
		case code := <-ended:
			if code != ExitDone {
				t.Errorf("serve ends with %d: %s", code, errOut.String())
			}
		case <-time.After(40 * time.Second):
			t.Error("serve does not end")
		}
	})
	for end := time.Now().Add(60 * time.Second); !strings.Contains(out.String(), "CLI "); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not ready: %s", errOut.String())
		}
	}
	for _, want := range []string{"Varve is ready on " + data, "mount -t nfs -o vers=3,nolock", ":/default /mnt", "nbd://", "admin.token", "https://"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the summary lacks %q:\n%s", want, out.String())
		}
	}
	return data
}

// TestContract is a list of command lines with their exit codes and what they print, run one after the other.
func TestContract(t *testing.T) {
	data := serving(t)
	tok := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(tok, []byte("wrong"), 0o600); err != nil {
		t.Fatal(err)
	}
	var st v1.Status
	if r := varve(t.Context(), nil, "--data", data, "status", "-o", "json"); json.Unmarshal([]byte(r.out), &st) != nil || st.State != "ok" {
		t.Fatalf("status: %+v", r)
	}
	https := ""
	for _, s := range st.Services {
		if s.Name == "https" {
			https = "https://" + s.Address
		}
	}
	ca := filepath.Join(data, "tls", "ca.crt")
	remote := "--at " + https + " --ca " + ca + " --token-file "
	for _, step := range []struct {
		line     string
		code     int
		out, err string // regular expressions; empty: nothing is printed
	}{
		{"version", 0, `^varve 1\.2\.3\n$`, ``},
		{"vdisk create default/disk1 --size 10GiB", 0, `(?m)^Size: +10 GiB$`, ``},
		{"vdisk create default/disk1 --size 10GiB", 4, ``, `^varve: create vdisk default/disk1: exists already\n$`},
		{"vdisk create nopool/x --size 1G", 3, ``, `^varve: create vdisk nopool/x: vpool "nopool" not found`},
		{"vdisk create default/x --size 1000", 2, ``, `multiple of 512`},
		{"vdisk create default/x --size lots", 2, ``, `^varve: size "lots".*; see varve vdisk create --help\n$`},
		{"vdisk create default/x", 2, ``, `required flag.*"size" not set; see varve vdisk create --help`},
		{"vdisk create --size 1G", 2, ``, `VPOOL/NAME is missing`},
		{"vdisk create a b --size 1G", 2, ``, `"b" is too much`},
		{"vdisk list", 0, `(?s)^NAME +SIZE .*\ndefault/disk1  10 GiB `, ``},
		{"vdisk list default -o json", 0, `(?s)^\[\n  \{\n .*"name": "default/disk1",`, ``},
		{"vdisk list nopool", 3, ``, `not found`},
		{"vdisk show default/disk1", 0, `(?m)^NFS file: +/disk1\.raw$`, ``},
		{"vdisk show default/none -o json", 3, ``, `^\{"error":\{"code":"not_found","exit":3,"message":"show vdisk default/none: not found","object":"default/none"`},
		{"vdisk resize default/disk1 --size 1GiB", 4, ``, `would cut data off`},
		{"vdisk resize default/disk1 --size 1GiB --shrink", 0, `1 GiB`, ``},
		{"vdisk resize default/disk1 --size 20GiB", 0, `20 GiB`, ``},
		{"vdisk rename default/disk1 default/vm/root", 0, `(?m)^NFS file: +/vm/root\.raw$`, ``},
		{"vdisk rename default/disk1 default/x", 3, ``, `not found`},
		{"explain default/vm/root --lba 3", 0, `(?m)^State: +hole$`, ``},
		{"vdisk explain default/vm/root --offset 12288 -o json", 0, `"lba": 3,`, ``},
		{"explain default/vm/root", 2, ``, `either --lba or --offset`},
		{"explain default/vm/root --lba 99999999999", 2, ``, `beyond`},
		{"vdisk delete default/vm/root", 2, ``, `^varve: delete vdisk default/vm/root: this cannot be undone; repeat with --confirm default/vm/root\n$`},
		{"vdisk delete default/vm/root --confirm default/vm", 2, ``, `--confirm says "default/vm"`},
		{"vdisk delete default/vm/root --confirm default/vm/root", 0, ``, ``},
		{"vdisk delete default/vm/root --confirm default/vm/root", 3, ``, `not found`},
		{"vdisk list -o json", 0, `^\[\]\n$`, ``},
		{"vpool create fast --backend local://" + data + "/fast --client 10.0.0.0/8", 0, `Probe: create-only`, ``},
		{"vpool create fast --backend local://" + data + "/faster", 4, ``, `exists already`},
		{"vpool create Bad --backend local:///x", 2, ``, `not a valid name`},
		{"vpool create other --backend s4://x", 2, ``, `local:///`},
		{"vpool create other --backend local://" + data + "/fast/inside", 4, ``, `overlaps`},
		{"vpool list", 0, `(?s)^NAME .*\ndefault .*\nfast `, ``},
		{"vpool show fast -o json", 0, `"clients": \[\n    "10.0.0.0/8"`, ``},
		{"vdisk create fast/d --size 1M", 0, `fast/d`, ``},
		{"vpool delete fast --confirm fast", 4, ``, `^varve: delete vpool fast: not empty.* d; delete what it holds first\n$`},
		{"vdisk delete fast/d --purge --confirm fast/d", 0, ``, ``},
		{"vpool delete fast", 2, ``, `--confirm fast`},
		{"vpool delete fast --confirm fast", 0, ``, ``},
		{"vpool show fast", 3, ``, `not found`},
		{"node list", 0, `^NAME +ID +ROLE`, ``},
		{"node list -o json", 0, `"self": true`, ``},
		{"status", 0, `(?m)^State: +ok$`, ``},
		{"vdisk export default/none /tmp/never", 3, ``, `^varve: export default/none: not found`},
		{"vdisk import /no/such/file default/x", 3, ``, `no such file or directory; check the path\n$`},
		{"vdisk import " + tok + " default/x --format vdi", 2, ``, `use raw, qcow2, vmdk or vhdx`},
		{"-o xml status", 2, ``, `neither table nor json nor yaml`},
		{"--timeout 0s status", 2, ``, `not above zero`},
		{"frobnicate", 2, ``, `"frobnicate" is no command of "varve"`},
		{"vdisk lsit", 2, ``, `did you mean "list"`},
		{"vdisk list --frob", 2, ``, `unknown flag: --frob; see varve vdisk list --help\n$`},
		{"vdisk list --frob -o json", 2, ``, `^\{"error":\{"code":"usage","exit":2,`},
		{"vdisk", 2, ``, `(?s)Virtual disks\..*Available Commands`},
		{"help vdisk", 0, `(?s)Virtual disks\..*Available Commands`, ``},
		{"completion bash", 0, `bash completion`, ``},
		{"__complete vdisk show ", 0, `:4`, `Completion ended`},
		{remote + filepath.Join(data, "admin.token") + " vdisk list -o json", 0, `^\[\]\n$`, ``},
		{remote + tok + " vdisk list", 5, ``, `the token is not valid`},
		{remote + "/no/file vdisk list", 2, ``, `read token /no/file`},
		{"--at " + https + " --token-file " + tok + " vdisk list", 6, ``, `certificate.*give --ca FILE`},
		{"--at http://127.0.0.1:1 --token-file " + tok + " status", 2, ``, `https://host:8443`},
		{"--at https://127.0.0.1:1 --token-file " + tok + " status", 6, ``, `no appliance answers at https://127.0.0.1:1: .*refused`},
		{"serve", 4, ``, `another varve uses this data directory; stop that one`},
		{"rebuild", 4, ``, `another varve uses this data directory`},
	} {
		args := strings.Split(step.line, " ")
		if !strings.Contains(step.line, "--at") {
			args = append([]string{"--data", data}, args...)
		}
		r := varve(t.Context(), nil, args...)
		if r.code != step.code {
			t.Errorf("varve %s: exit %d, want %d (%s%s)", step.line, r.code, step.code, r.out, r.err)
		}
		for _, c := range []struct{ stream, got, want string }{{"stdout", r.out, step.out}, {"stderr", r.err, step.err}} {
			if c.want == "" && c.got != "" || c.want != "" && !regexp.MustCompile(c.want).MatchString(c.got) {
				t.Errorf("varve %s: %s is %q, want %q", step.line, c.stream, c.got, c.want)
			}
		}
	}
}

func TestNobodyAnswers(t *testing.T) {
	dir := t.TempDir()
	r := varve(t.Context(), nil, "--data", dir, "vdisk", "list")
	if want := "varve: list vdisks: no appliance answers on " + dir + "; start it with: varve serve --data " + dir + "\n"; r != (ran{ExitUnavailable, "", want}) {
		t.Errorf("got %+v", r)
	}
	if r := varve(t.Context(), map[string]string{"VARVE_DATA": dir}, "status"); r.code != ExitUnavailable {
		t.Errorf("by VARVE_DATA: %+v", r)
	}
	if r := varve(t.Context(), nil, "status"); r.code != ExitUsage || !strings.Contains(r.err, "--data DIR or --at URL") {
		t.Errorf("without an appliance: %+v", r)
	}
}

// The JSON of a command is what scripts rely on: its keys, level by level.
func TestJSONSchema(t *testing.T) {
	data := serving(t)
	keys := func(args ...string) string {
		r := varve(t.Context(), nil, append([]string{"--data", data, "-o", "json"}, args...)...)
		if r.code != 0 {
			t.Fatalf("%v: %+v", args, r)
		}
		var v any
		if err := json.Unmarshal([]byte(r.out), &v); err != nil {
			t.Fatal(err)
		}
		return shape(v)
	}
	vdisk := "{class clients created epoch file id modified name open pending rev size state used vpool}"
	for _, c := range []struct{ line, want string }{
		{"vdisk create default/d --size 1M", vdisk},
		{"vdisk list", "[" + vdisk + "]"},
		{"vpool list", "[{backend class clients[] compression created deleting files findings{create-only delete list after write read back} free id name rev stored total vdisks}]"},
		{"node list", "[{https id joined name nbd nfs rev role seen self version}]"},
		{"status", "{cluster deleting files index log{capacity pending used} node node_id problems[] ready services[{address connections name}]" +
			" started state vdisks version vpools}"},
		{"explain default/d --lba 0", "{detail lba offset state vdisk}"},
		{"doctor", "{checks[{at duration_ms evidence id status title}] status}"},
		{"version", "{version}"},
	} {
		got := keys(strings.Split(c.line, " ")...)
		got = strings.ReplaceAll(got, " remedy ", " ") // only where a check has one
		if got != c.want {
			t.Errorf("%s: %s, want %s", c.line, got, c.want)
		}
	}
}

func shape(v any) string {
	switch v := v.(type) {
	case []any:
		if len(v) == 0 {
			return "[]"
		}
		return "[" + shape(v[0]) + "]"
	case map[string]any:
		var parts []string
		for k := range v {
			parts = append(parts, k+shape(v[k]))
		}
		slices.Sort(parts)
		return "{" + strings.Join(parts, " ") + "}"
	}
	return ""
}

func TestImportAndExportRoundTrip(t *testing.T) {
	data, dir := serving(t), t.TempDir()
	in, out := filepath.Join(dir, "in.raw"), filepath.Join(dir, "out.raw")
	f, err := os.Create(in)
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 3<<20)
	rand.NewChaCha8([32]byte{3}).Read(p)
	if _, err := f.WriteAt(p, 5<<20); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(64 << 20); err != nil {
		t.Fatal(err)
	}
	f.Close()
	r := varve(t.Context(), nil, "--data", data, "vdisk", "import", in, "default/img", "-o", "json")
	var d v1.VDisk
	if err := json.Unmarshal([]byte(r.out), &d); r.code != 0 || err != nil || d.Size != 64<<20 || d.Used != 3<<20 {
		t.Fatalf("import: %+v %v", r, err)
	}
	if !strings.Contains(r.err, "imported default/img") || strings.ContainsAny(r.err, "\r\x1b") {
		t.Errorf("stderr, which is no terminal: %q", r.err)
	}
	if r := varve(t.Context(), nil, "--data", data, "vdisk", "import", in, "default/img"); r.code != ExitConflict {
		t.Errorf("second import: %+v", r)
	}
	if r := varve(t.Context(), nil, "--data", data, "vdisk", "export", "default/img", out); r.code != 0 {
		t.Fatalf("export: %+v", r)
	}
	a, errA := os.ReadFile(in)
	b, errB := os.ReadFile(out)
	if errA != nil || errB != nil || !bytes.Equal(a, b) {
		t.Errorf("the round trip changes bytes (%v %v)", errA, errB)
	}
	if r := varve(t.Context(), nil, "--data", data, "vdisk", "export", "default/img", out); r.code != ExitConflict || !strings.Contains(r.err, "--replace") {
		t.Errorf("export over a file: %+v", r)
	}
	huge := filepath.Join(dir, "huge.raw")
	if err := os.WriteFile(huge, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if r := varve(t.Context(), nil, "--data", data, "vdisk", "import", huge, "default/huge"); r.code != ExitFailed || !strings.Contains(r.err, "is empty") {
		t.Errorf("empty image: %+v", r)
	}
	if r := varve(t.Context(), nil, "--data", data, "vdisk", "list", "-o", "json"); strings.Contains(r.out, "huge") {
		t.Errorf("a vDisk is left: %s", r.out)
	}
}

func TestDoctorFindsEveryExportReadable(t *testing.T) {
	data := serving(t)
	if r := varve(t.Context(), nil, "--data", data, "vdisk", "create", "default/d", "--size", "1M"); r.code != 0 {
		t.Fatal(r)
	}
	r := varve(t.Context(), nil, "--data", data, "doctor")
	if r.code != 0 || r.err != "" {
		t.Errorf("doctor: %+v", r)
	}
	for _, want := range []string{`server\.state +OK`, `server\.nbd +OK +1 exports listed, 1 read`, `server\.nfs +OK +1 exports mounted`,
		`backend\.local +OK`, `disk\.flush `, `host\.clock `} {
		if !regexp.MustCompile(want).MatchString(r.out) {
			t.Errorf("doctor lacks %q:\n%s", want, r.out)
		}
	}
	before := varve(t.Context(), nil, "--data", filepath.Join(t.TempDir(), "new"), "doctor", "-o", "json")
	if before.code != 0 || !strings.Contains(before.out, `"id": "server.state"`) || !strings.Contains(before.out, `"status": "skip"`) {
		t.Errorf("doctor before the first start: %+v", before)
	}
}

func TestSettingsByFlagThenEnvironmentThenFile(t *testing.T) {
	dir := t.TempDir()
	write := func(s string) {
		if err := os.WriteFile(filepath.Join(dir, configName), []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	resolve := func(vars map[string]string, args ...string) (serveFlags, error) {
		e := &env{std: Std{Getenv: func(k string) string { return vars[k] }}, data: dir, output: outputTable}
		c := e.serveCommand()
		var f serveFlags
		// The command's flags point into its own struct, so they are read back by name.
		if err := c.ParseFlags(args); err != nil {
			t.Fatal(err)
		}
		err := e.settle(c.Flags())
		get := func(name string) string { return c.Flags().Lookup(name).Value.String() }
		f.nbd, f.nfs, f.logSize = get("nbd"), get("nfs"), get("log-size")
		return f, err
	}
	write(`{"nbd": ":1", "nfs": ":1", "log-size": "1GiB"}`)
	e := &env{std: Std{Getenv: func(string) string { return "" }}, data: dir, output: outputTable}
	if c := e.rebuildCommand(); e.settle(c.Flags()) != nil || c.Flags().Lookup("log-size").Value.String() != "1GiB" {
		t.Error("rebuild does not take its part of serve's file")
	}
	f, err := resolve(map[string]string{"VARVE_NBD": ":2", "VARVE_NFS": ":2"}, "--nbd", ":3")
	if err != nil || f.nbd != ":3" || f.nfs != ":2" || f.logSize != "1GiB" {
		t.Errorf("settled %+v %v", f, err)
	}
	for text, want := range map[string]string{
		`{"ndb": ":1"}`:          `there is no setting "ndb"`,
		`{"data": "/x"}`:         `there is no setting "data"`,
		`{"nbd": [1]}`:           "neither a string nor a number",
		`{`:                      "unexpected EOF",
		`{} {}`:                  "more than one JSON value",
		`{"drain-time": "long"}`: "--drain-time",
	} {
		write(text)
		if _, err := resolve(nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

func TestBadServeFlagsExitWithUsage(t *testing.T) {
	dir := t.TempDir()
	for _, line := range []string{"--nbd here", "--log-size 1MiB", "--log-size big", "--nbd-tls perhaps", "--log-level loud", "--nfs off --portmap :111"} {
		r := varve(t.Context(), nil, append([]string{"serve", "--data", dir}, strings.Split(line, " ")...)...)
		if r.code != ExitUsage || r.out != "" || !strings.HasPrefix(r.err, "varve: ") {
			t.Errorf("serve %s: %+v", line, r)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("bad flags left %v %v", left, err)
	}
}

func TestMessagesCannotDrawLines(t *testing.T) {
	var b bytes.Buffer
	code := report(&b, &Failure{Exit: ExitNotFound, What: "show", Object: "a\nvarve: b\x1b[31m", Why: "gone"}, false)
	if want := "varve: show a; varve: b?[31m: gone\n"; code != 3 || b.String() != want {
		t.Errorf("%d %q, want %q", code, b.String(), want)
	}
	b.Reset()
	report(&b, fmt.Errorf("plain"), true)
	if want := `{"error":{"code":"failed","exit":1,"message":"plain"}}` + "\n"; b.String() != want {
		t.Errorf("%q", b.String())
	}
}
