// Command fuzz runs every fuzz target of the tree for a few seconds: VARVE_FUZZ_SECONDS in total (60), shared evenly. A
// target is a function FuzzX in a test file; a target that is not found here does not exist. The seeds and whatever was
// once found run with the unit tests as well; this looks for something new.
package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"sort"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

type target struct{ dir, name string }

var declared = regexp.MustCompile(`(?m)^func (Fuzz\w+)\(`)

func targets() ([]target, error) {
	var all []target
	err := filepath.WalkDir(".", func(p string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (strings.HasPrefix(d.Name(), ".") && p != "." || d.Name() == "testdata" || d.Name() == "node_modules") {
			return filepath.SkipDir
		}
		if !strings.HasSuffix(p, "_test.go") {
			return nil
		}
		text, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		for _, m := range declared.FindAllStringSubmatch(string(text), -1) {
			all = append(all, target{"./" + filepath.Dir(p), m[1]})
		}
		return nil
	})
	sort.Slice(all, func(i, j int) bool { return all[i].dir+all[i].name < all[j].dir+all[j].name })
	return all, err
}

var executed = regexp.MustCompile(`execs: (\d+)`)

// build makes one test binary per package, instrumented for coverage.
func build(dir, out string) error {
	cmd := exec.Command("go", "test", "-c", "-fuzz=.", "-o", out, dir)
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", dir, err, text)
	}
	return nil
}

// endedLate tells that go's fuzzer failed for no other reason than that its own time ran out: its coordinator sometimes takes the
// end of -fuzztime for a failure of the target (golang/go#75804, mended in Go 1.27). A target that fails names its input.
func endedLate(text string) bool {
	_, failure, found := strings.Cut(text, "--- FAIL: ")
	if !found || strings.Contains(text, "Failing input") || strings.Contains(text, "panic:") {
		return false
	}
	lines := strings.Split(strings.TrimSpace(failure), "\n")
	return len(lines) == 3 && strings.TrimSpace(lines[1]) == "context deadline exceeded" && lines[2] == "FAIL"
}

// run fuzzes one target in its package's directory, so that an input that fails it is kept in its testdata.
func run(ctx context.Context, t target, binary, cache string, each time.Duration) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, each+60*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, "-test.run=^$", "-test.fuzz=^"+t.name+"$", "-test.fuzztime="+each.String(),
		"-test.fuzzminimizetime=5s", "-test.parallel=1", "-test.fuzzcachedir="+cache)
	cmd.Dir = t.dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: false, Pdeathsig: syscall.SIGKILL}
	text, err := cmd.CombinedOutput()
	if err != nil && !endedLate(string(text)) {
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		return "", fmt.Errorf("%s in %s: %w\n    %s", t.name, t.dir, err, strings.Join(lines[max(0, len(lines)-30):], "\n    "))
	}
	execs := "0"
	if all := executed.FindAllStringSubmatch(string(text), -1); len(all) > 0 {
		execs = all[len(all)-1][1]
	}
	return execs, nil
}

func main() {
	total := 60
	if v, err := strconv.Atoi(os.Getenv("VARVE_FUZZ_SECONDS")); err == nil {
		total = v
	}
	all, err := targets()
	if err == nil && len(all) == 0 {
		err = fmt.Errorf("no fuzz target found")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	scratch, err := os.MkdirTemp("", "varve-fuzz")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	defer os.RemoveAll(scratch)
	workers := runtime.NumCPU()
	each := max(time.Duration(total)*time.Second*time.Duration(workers)/time.Duration(len(all)), 2*time.Second).Round(100 * time.Millisecond)
	fmt.Printf("  %d fuzz targets, %s each\n", len(all), each)

	binaries := map[string]string{}
	failed := 0
	for _, t := range all {
		if _, ok := binaries[t.dir]; ok {
			continue
		}
		out := filepath.Join(scratch, strings.ReplaceAll(strings.TrimPrefix(t.dir, "./"), "/", "_")+".test")
		if err := build(t.dir, out); err != nil {
			fmt.Println("  FAILED", err)
			failed++
			out = ""
		}
		binaries[t.dir] = out
	}
	results := make([]string, len(all))
	queue := make(chan int)
	var wait sync.WaitGroup
	var mu sync.Mutex
	for range workers {
		wait.Go(func() {
			for i := range queue {
				t := all[i]
				if binaries[t.dir] == "" {
					continue
				}
				execs, err := run(context.Background(), t, binaries[t.dir], filepath.Join(scratch, "cache"), each)
				mu.Lock()
				if err != nil {
					fmt.Println("  FAILED", err)
					failed++
				}
				results[i] = execs
				mu.Unlock()
			}
		})
	}
	for i := range all {
		queue <- i
	}
	close(queue)
	wait.Wait()
	dir := ""
	for i, t := range all {
		if t.dir != dir {
			dir = t.dir
			fmt.Printf("\n  %s:", strings.TrimPrefix(dir, "./"))
		}
		fmt.Printf(" %s %s", t.name, results[i])
	}
	fmt.Printf("\n  fuzz smoke: %d targets, %d failed\n", len(all), failed)
	if failed > 0 {
		os.Exit(1)
	}
}
