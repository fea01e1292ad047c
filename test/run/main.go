// Command run runs the test layers that CI runs, one after the other, and ends with the line `N passed, N failed`.
//
// A layer that mostly waits (ten minutes of a steady load) is marked to run beside: it starts with the first layer, at a low
// priority, and what it printed is shown when its turn comes. Chosen alone it runs as any other.
//
// A layer is a list of commands. Those that are `go test` are run with -json, so that every test counts as one result;
// any other command counts as one. Of what tests print, three kinds of lines reach the terminal: results to be shown
// (harness.Show prints them with the prefix `» `), everything that a failing test printed, and skips. A skipped test is
// neither passed nor failed and is named at the end, unless the command says -short, which asks for it; in CI nothing else
// is skipped, since `make setup` installs all tools.
//
//	run                  all layers of the default list
//	run check unit nbd   these only
//	run -list            the names
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// layer is a named part of the suite. Commands run in order, each under the layer's limit.
type layer struct {
	name     string
	what     string
	limit    time.Duration
	optional bool // not part of the default list
	beside   bool // runs while those before it do; its commands say `nice`
	commands [][]string
}

const module = "varve"

// e2e is a `go test` of the end-to-end package, restricted to the tests whose names begin with one of the prefixes.
func e2e(limit string, prefixes ...string) []string {
	return []string{"go", "test", "-tags", "e2e", "-count=1", "-timeout", limit, "-run", "^Test(" + strings.Join(prefixes, "|") + ")", "./test/e2e"}
}

// notRaced are the tests that measure time and memory, and those that go through thousands of cases with one goroutine,
// where the detector finds nothing and costs minutes; the unit layer runs them all.
var notRaced = []string{
	"TestTrim1TiB", "TestTrim1TiBWithSnapshots", "TestBudgetFullyMapped", "TestScanOf1TiB",
	"TestCrash", "TestGenerationsCrash", "TestFailingCalls", "TestFailingFreeze", "TestReleaseDeletes",
	"TestScanLeavesTheHotSet", "TestRoundTrip", "TestBitFlips",
}

var layers = []layer{
	{name: "check", what: "formatting, vet, layout and import directions", limit: 12 * time.Minute, commands: [][]string{
		{"test/check.sh"},
		{"go", "test", "-count=1", "./test/layout"},
	}},
	{name: "unit", what: "unit tests, models and crash points", limit: 32 * time.Minute, commands: [][]string{
		{"go", "test", "-timeout", "25m", "-coverprofile", ".cache/volumedriver.cover", "-coverpkg=./volumedriver/...", "./volumedriver/..."},
		{"go", "test", "-timeout", "8m", "./appliance/...", "./control/...", "./gateway/...", "./image/...", "./systemd/...", "./test/..."},
		{"test/cover.sh", ".cache/volumedriver.cover", "85", "volumedriver"},
	}},
	{name: "race", what: "the race detector on the data path and the control state (short)", limit: 25 * time.Minute, commands: [][]string{
		{"env", "CGO_ENABLED=1", "go", "test", "-race", "-short", "-timeout", "12m", "-skip", "^(" + strings.Join(notRaced, "|") + ")$",
			"./volumedriver/...", "./gateway/...", "./control/..."},
	}},
	{name: "fuzz", what: "a short run of every fuzz target", limit: 12 * time.Minute, commands: [][]string{
		{"go", "run", "./test/fuzz"},
	}},
	{name: "planted", what: "known bugs planted in a copy, each caught by its test", limit: 20 * time.Minute, commands: [][]string{
		{"go", "test", "-count=1", "-timeout", "18m", "-tags", "planted", "./test/planted"},
	}},
	{name: "build", what: "the static binary", limit: 8 * time.Minute, commands: [][]string{{"make", "--no-print-directory", "build"}}},
	{name: "nbd", what: "libnbd, nbdcopy, qemu-img, qemu-io and fio against the NBD server", limit: 8 * time.Minute,
		commands: [][]string{e2e("7m", "NBD")}},
	{name: "nfs", what: "libnfs and fio's nfs engine against the NFS server", limit: 8 * time.Minute,
		commands: [][]string{e2e("7m", "NFS")}},
	{name: "kill", what: "kills of the real process under load, rebuild from the backend", limit: 10 * time.Minute,
		commands: [][]string{e2e("9m", "Kill", "Rebuild")}},
	{name: "s3", what: "vPools on a real S3 server: a life from import to rebuild, an outage, kills, kills through a fault server", limit: 12 * time.Minute,
		commands: [][]string{e2e("11m", "S3")}},
	{name: "rude", what: "clients that are slow, do not read, or talk nonsense", limit: 8 * time.Minute,
		commands: [][]string{e2e("7m", "Rude")}},
	{name: "api", what: "README's API examples by curl, planted secrets in no file", limit: 5 * time.Minute,
		commands: [][]string{e2e("4m", "API")}},
	{name: "automation", what: "simulated weeks of schedules on a real vPool, a real RabbitMQ through an outage", limit: 8 * time.Minute,
		commands: [][]string{{"go", "test", "-tags", "e2e", "-count=1", "-timeout", "7m", "./test/automation"}}},
	{name: "cluster", what: "three appliances lose leaders, links, time and disk; control restarts under guests", limit: 10 * time.Minute,
		commands: [][]string{{"go", "test", "-tags", "e2e", "-count=1", "-timeout", "9m", "./test/cluster"}}},
	{name: "console", what: "the web console: types, then a real browser from the set-up code to every page", limit: 10 * time.Minute, commands: [][]string{
		{"make", "--no-print-directory", "console-check"},
		{"go", "test", "-tags", "e2e", "-count=1", "-timeout", "9m", "./test/console"},
	}},
	{name: "console-hour", what: "a browser that follows a busy cluster for an hour does not grow", limit: 80 * time.Minute, optional: true, commands: [][]string{
		{"env", "VARVE_CONSOLE_SOAK=1h", "go", "test", "-tags", "e2e", "-count=1", "-timeout", "75m", "-run", "^TestConsole$", "./test/console"},
	}},
	{name: "guest", what: "a Linux guest's nbd-client and NFSv3 mounts", limit: 7 * time.Minute,
		commands: [][]string{e2e("6m", "Guest")}},
	{name: "vm", what: "a VM boots from our disk over NBD and over an NFS mount, is killed, boots again", limit: 7 * time.Minute,
		commands: [][]string{e2e("6m", "VM")}},
	{name: "image", what: "units and their sandboxes, the Debian package", limit: 8 * time.Minute,
		commands: [][]string{{"go", "test", "-tags", "e2e", "-count=1", "-timeout", "7m", "-run", "^Test(Units|Deb)", "./test/image"}}},
	{name: "memory", what: "memory with many volumes, a map at random under a budget, ten minutes of mixed load", limit: 45 * time.Minute, beside: true,
		commands: [][]string{
			append([]string{"nice", "env", "VARVE_MIXED_SECONDS=600"}, e2e("40m", "Memory")...),
			{"nice", "env", "VARVE_MAP_GIB=100", "VARVE_MAP_SECONDS=25", "go", "test", "-count=1", "-timeout", "4m", "-run", "^TestBudgetFullyMapped$",
				"./volumedriver/blockmap"},
		}},
	// It takes an image, which takes a mirror of Debian and some minutes, and half an hour of emulation.
	{name: "image-boot", what: "the image in QEMU: set up in a browser, under load updated and cut off from power, redeployed, joined", limit: 75 * time.Minute, optional: true,
		commands: [][]string{{"go", "test", "-tags", "e2e", "-count=1", "-timeout", "73m", "-run", "^TestImage", "./test/image"}}},
	{name: "soak", what: "random operations on families of volumes, kills under load, then mixed load without, each for VARVE_SOAK_MINUTES", limit: 24 * time.Hour,
		optional: true, commands: [][]string{
			{"go", "test", "-count=1", "-timeout", "24h", "-run", "^TestFamily$", "./volumedriver"},
			e2e("24h", "Soak", "MemoryMixed")}},
}

// tally collects results over all layers.
type tally struct {
	passed  int
	failed  []string
	skipped []string
	said    []string // what the failed ones said, in short
}

func (t *tally) add(o tally) {
	t.passed += o.passed
	t.failed = append(t.failed, o.failed...)
	t.skipped = append(t.skipped, o.skipped...)
	t.said = append(t.said, o.said...)
}

// started is a layer's run: its own output and results until done is closed.
type started struct {
	begin time.Time
	took  time.Duration
	out   output
	sum   tally
	done  chan struct{}
}

// output takes what a command's two streams say, and is read when the command has ended.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (l layer) start(ctx context.Context) *started {
	s := &started{begin: time.Now(), done: make(chan struct{})}
	go func() {
		defer close(s.done)
		l.run(ctx, &s.out, &s.sum)
		s.took = time.Since(s.begin)
	}()
	return s
}

func main() {
	list := flag.Bool("list", false, "print the layers and end")
	flag.Parse()
	if *list {
		for _, l := range layers {
			fmt.Printf("%-10s %s\n", l.name, l.what)
		}
		return
	}
	chosen, err := choose(flag.Args())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	var sum tally
	var times []string
	begin := time.Now()
	var early []*started
	for _, l := range chosen {
		var s *started
		if l.beside && len(chosen) > 1 {
			s = l.start(ctx)
		}
		early = append(early, s)
	}
	for i, l := range chosen {
		s := early[i]
		if ctx.Err() != nil {
			sum.failed = append(sum.failed, l.name+": interrupted")
		}
		switch {
		case s != nil:
			fmt.Printf("\n== %s (ran beside the others): %s\n", l.name, l.what)
			<-s.done
			os.Stdout.Write(s.out.b.Bytes())
		case ctx.Err() != nil:
			continue
		default:
			fmt.Printf("\n== %s: %s\n", l.name, l.what)
			s = &started{begin: time.Now()}
			l.run(ctx, os.Stdout, &s.sum)
			s.took = time.Since(s.begin)
		}
		sum.add(s.sum)
		took := s.took.Round(100 * time.Millisecond)
		fmt.Printf("== %s took %s\n", l.name, took)
		times = append(times, fmt.Sprintf("%s %s", l.name, took))
	}
	fmt.Printf("\n%s; in total %s\n", strings.Join(times, ", "), time.Since(begin).Round(time.Second))
	for _, s := range sum.skipped {
		fmt.Println("skipped:", s)
	}
	for _, s := range sum.said {
		fmt.Println(s)
	}
	for _, f := range sum.failed {
		fmt.Println("FAILED:", f)
	}
	fmt.Printf("%d passed, %d failed\n", sum.passed, len(sum.failed))
	if len(sum.failed) > 0 {
		os.Exit(1)
	}
}

func choose(names []string) ([]layer, error) {
	var chosen []layer
	if len(names) == 0 {
		for _, l := range layers {
			if !l.optional {
				chosen = append(chosen, l)
			}
		}
		return chosen, nil
	}
	for _, n := range names {
		i := slices.IndexFunc(layers, func(l layer) bool { return l.name == n })
		if i < 0 {
			return nil, fmt.Errorf("unknown layer %q; `go run ./test/run -list` names them", n)
		}
		chosen = append(chosen, layers[i])
	}
	return chosen, nil
}

func (l layer) run(ctx context.Context, w io.Writer, sum *tally) {
	ctx, cancel := context.WithTimeout(ctx, l.limit)
	defer cancel()
	for _, c := range l.commands {
		label := l.name + ": " + strings.Join(c, " ")
		failedBefore := len(sum.failed)
		err := runCommand(ctx, c, w, sum)
		switch {
		case err == nil && !isGoTest(c):
			sum.passed++
		case err == nil:
		case ctx.Err() != nil:
			sum.failed = append(sum.failed, fmt.Sprintf("%s: ended at the layer's limit of %s", label, l.limit))
		case len(sum.failed) == failedBefore: // it failed without a test that says so
			sum.failed = append(sum.failed, fmt.Sprintf("%s: %v", label, err))
		}
	}
}

func isGoTest(c []string) bool {
	i := slices.Index(c, "test")
	return i > 0 && c[i-1] == "go"
}

// runCommand runs c in a process group of its own, which is killed when the command ends, so that nothing stays behind.
func runCommand(ctx context.Context, c []string, w io.Writer, sum *tally) error {
	if isGoTest(c) {
		i := slices.Index(c, "test")
		c = slices.Insert(slices.Clone(c), i+1, "-json")
	}
	cmd := exec.Command(c[0], c[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 10 * time.Second
	cmd.Stderr = w
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", c[0], err)
	}
	stop := context.AfterFunc(ctx, func() { syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) })
	defer stop()
	hard, cancel := context.WithCancel(context.Background())
	defer cancel()
	go killLater(ctx, hard, cmd.Process.Pid)
	if isGoTest(c) {
		readTests(out, w, sum, slices.Contains(c, "-short"))
	} else {
		io.Copy(w, out)
	}
	err = cmd.Wait()
	syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	return err
}

// killLater ends the group for good some seconds after ctx ended, unless the command has ended by then.
func killLater(ctx, ended context.Context, pid int) {
	select {
	case <-ended.Done():
		return
	case <-ctx.Done():
	}
	select {
	case <-ended.Done():
	case <-time.After(15 * time.Second):
		syscall.Kill(-pid, syscall.SIGKILL)
	}
}

// event is a line of `go test -json`.
type event struct {
	Action  string
	Package string
	Test    string
	Output  string
	Elapsed float64
}

// readTests counts top-level tests and subtests alike: a test with subtests counts through those.
func readTests(r io.Reader, w io.Writer, sum *tally, short bool) {
	output := map[string][]string{} // of each test, until its result is known
	parents := map[string]bool{}
	failedBelow := map[string]bool{} // tests of which a subtest failed
	broken := map[string]bool{}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e event
		if json.Unmarshal(lines.Bytes(), &e) != nil {
			fmt.Fprintln(w, lines.Text()) // the toolchain itself speaks: a build error
			continue
		}
		pkg := strings.TrimPrefix(e.Package, module+"/")
		key := e.Package + " " + e.Test
		label := strings.TrimSpace(filepath.ToSlash(pkg) + " " + e.Test)
		switch e.Action {
		case "run":
			if i := strings.LastIndexByte(e.Test, '/'); i >= 0 {
				parents[e.Package+" "+e.Test[:i]] = true
			}
		case "output", "build-output":
			if text, ok := shown(e.Output); ok {
				fmt.Fprint(w, "  ", text)
			}
			output[key] = append(output[key], e.Output)
		case "pass":
			if e.Test != "" && !parents[key] {
				sum.passed++
			}
			if e.Test == "" {
				fmt.Fprintf(w, "  ok %-40s %6.1fs\n", pkg, e.Elapsed)
			}
			delete(output, key)
		case "skip":
			if e.Test != "" && !short {
				sum.skipped = append(sum.skipped, label+": "+reason(output[key]))
			}
			delete(output, key)
		case "fail", "build-fail":
			if e.Test == "" && broken[e.Package] {
				continue
			}
			broken[e.Package] = true
			if i := strings.LastIndexByte(e.Test, '/'); i >= 0 {
				failedBelow[e.Package+" "+e.Test[:i]] = true
			}
			if failedBelow[key] {
				continue // told already
			}
			sum.failed = append(sum.failed, label)
			fmt.Fprintf(w, "--- FAILED %s\n", label)
			text := output[key]
			if e.Test == "" { // it ended without a result of the tests that were under way, as at a time limit
				text = append(unended(output, e.Package), text...)
			}
			sum.said = append(sum.said, gist(label, text))
			if over := len(text) - 400; over > 0 {
				fmt.Fprintf(w, "    (%d lines left out)\n", over)
				text = text[over:]
			}
			for _, o := range text {
				fmt.Fprint(w, "    ", o)
			}
			delete(output, key)
		}
	}
}

// unended gives what tests of a package said whose result is not known.
func unended(output map[string][]string, pkg string) []string {
	var text []string
	for _, key := range slices.Sorted(maps.Keys(output)) {
		if p, test, _ := strings.Cut(key, " "); p == pkg && test != "" {
			text = append(text, output[key]...)
		}
	}
	return text
}

// gist is what is said again of a failure at the very end, where it is found when what comes before is cut off: the lines of a panic or
// of running out of time, else the last that the test printed.
func gist(label string, text []string) string {
	const most = 12
	lines := slices.DeleteFunc(slices.Clone(text), func(o string) bool {
		return strings.HasPrefix(o, "=== ") || strings.TrimSpace(o) == "" || strings.HasPrefix(o, "» ")
	})
	at := slices.IndexFunc(lines, func(o string) bool {
		return strings.HasPrefix(o, "panic: ") || strings.HasPrefix(o, "WARNING: DATA RACE")
	})
	if at < 0 {
		at = max(0, len(lines)-most)
	}
	lines = lines[at:min(len(lines), at+most)]
	return label + ":\n        " + strings.TrimSuffix(strings.Join(lines, "        "), "\n")
}

// logged is what a test of the map's budget logs; it is a result to be shown as well.
var logged = regexp.MustCompile(`_test\.go:\d+: (\d+ GiB, \d+ sets in .*)`)

func shown(output string) (string, bool) {
	if m := logged.FindStringSubmatch(output); m != nil {
		return "map at random under a budget: " + m[1] + "\n", true
	}
	return strings.CutPrefix(output, "» ")
}

// reason finds why a test skipped: the line that t.Skip logged.
func reason(output []string) string {
	for _, o := range output {
		if _, text, ok := strings.Cut(o, ".go:"); ok {
			if _, text, ok = strings.Cut(text, ": "); ok {
				return strings.TrimSpace(text)
			}
		}
	}
	return "no reason given"
}
