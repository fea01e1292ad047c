// Command bench measures Varve beside its peers on this machine, in one interleaved run, and prints every figure as a
// ratio beside its goal.
//
// NBD peers: qemu-nbd with the page cache (writeback) and without (none), nbdkit file, nbdkit memory, nbd-server. NFSv3
// peer: nfs-ganesha with its VFS back end. Clients: fio's nbd and nfs engines; `qemu-img bench` where a flush has to come
// after exactly 32 writes (fio's --fsync=32 sends one after 2 to 6); our own pipelined clients where neither can ask for
// what the row is about (FUA, FILE_SYNC, COMMIT per 32, one RPC per metadata operation). The client is the same for all
// servers of a row.
//
// # What makes the comparison fair
//
//   - All servers keep their files below one directory, on one file system. All are spoken to over TCP on the loopback, but
//     for G2: there qemu-img and qemu-nbd wait for each other's delayed acknowledgements over TCP (20 flushes a second), which
//     would flatter us, so that all servers of that row are spoken to over unix sockets.
//   - The servers run side by side, and each repetition measures all of them, forwards and backwards in turn (ABBA), so that
//     drift of the machine meets all alike. A ratio is taken within a repetition; printed are its median, least and greatest.
//   - Every server's disk is overwritten twice before anything is measured, once in order with 1 MiB, once at random with
//     4 KiB. Ours has a log of 1 GiB, so by then it has wrapped: no segment is fresh, and uploads go on all the time.
//   - Before each run the machine's dirty pages are synced. Ours works off what it has to destage in its own time: it is
//     stopped (SIGSTOP) while a peer is measured, so that its background work neither disturbs a peer nor is given away.
//   - Page cache: the area is 1 GiB and fits in it. "warm" means read through once before; "cold" that the page cache was
//     dropped before each run (root only).
//   - CPU is utime+stime of the server and its children per 4 KiB operation, over the run; "with destage" adds what ours uses
//     until it is idle again. What the kernel spends on writeback is in no server's figure. RSS is that after the run.
//
// # Rows of their own
//
// G17 to G20 run on an S3 store of this program, over round trips of 0 to 50 ms and a link of 1 Gbit/s (s3.go, rivals.go). The scaling laws
// S1 to S11, S15 and S16 run in this process and print a line for each figure (scaling.go and the files that it names). What is too large
// for a minute is scaled down with all ratios kept, or exists in the block map only; the line or its file says which.
//
// # Settings
//
//	BENCH_TIME    seconds of each timed run (2; all rows then take about 35 minutes)
//	BENCH_REPEAT  repetitions (5)
//	BENCH_ROWS    "G1 G13": these rows only
//	BENCH_PEERS   "nbdkit file,nfs-ganesha": these peers only; ours is always there
//
// All samples go to .cache/bench as JSON. The exit status says whether the measurement succeeded, not whether goals are met.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"varve/test/harness"
)

// settings are what the environment says.
type settings struct {
	runTime time.Duration
	repeat  int
	rows    []string // empty: all
	peers   []string // empty: all
}

const (
	repeatMax  = 100
	runTimeMax = 10 * time.Minute
)

func readSettings(getenv func(string) string) (settings, error) {
	s := settings{runTime: 2 * time.Second, repeat: 5}
	if v := getenv("BENCH_TIME"); v != "" {
		f, err := strconv.ParseFloat(strings.TrimSuffix(v, "s"), 64)
		s.runTime = time.Duration(f * float64(time.Second))
		if err != nil || s.runTime < 100*time.Millisecond || s.runTime > runTimeMax {
			return s, fmt.Errorf("BENCH_TIME=%s: want seconds between 0.1 and %.0f", v, runTimeMax.Seconds())
		}
	}
	if v := getenv("BENCH_REPEAT"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil || n < 1 || n > repeatMax {
			return s, fmt.Errorf("BENCH_REPEAT=%s: want a number between 1 and %d", v, repeatMax)
		}
		s.repeat = n
	}
	s.rows = strings.FieldsFunc(getenv("BENCH_ROWS"), func(r rune) bool { return r == ' ' || r == ',' })
	for _, row := range s.rows {
		if !slices.Contains(rows, row) {
			return s, fmt.Errorf("BENCH_ROWS: no row %q; there are %s", row, strings.Join(rows, " "))
		}
	}
	known := append(slices.Clone(harness.NBDPeers), ganesha)
	for p := range strings.SplitSeq(getenv("BENCH_PEERS"), ",") {
		if p = strings.TrimSpace(p); p == "" {
			continue
		}
		if !slices.Contains(known, p) {
			return s, fmt.Errorf("BENCH_PEERS: no peer %q; there are %s", p, strings.Join(known, ", "))
		}
		s.peers = append(s.peers, p)
	}
	return s, nil
}

func (s settings) wantsRow(row string) bool { return len(s.rows) == 0 || slices.Contains(s.rows, row) }
func (s settings) wantsPeer(peer string) bool {
	return len(s.peers) == 0 || slices.Contains(s.peers, peer)
}

// rows are G1-G8, G13-G15, those of S3 (s3.go), of scaling (scaling.go; some go together) and of control (control.go) of the goals, in the order in which
// they run: G7 comes last of NBD since it
// rewrites the area in order, which would make the random rows easier.
var rows = []string{"G1", "G2", "G3", "G4", "G5", "G6", "G8", "G7", "G13", "G14", "G15", "G17", "G18", "G19", "G20", "S3", "S4", "S5", "S6", "S7",
	"S8", "S9", "S10", "S11", "S15", "S1", "S2", "S16", "C1", "C2", "C3", "C4"}

func main() {
	if address := os.Getenv(s3ServerEnv); address != "" {
		fmt.Fprintln(os.Stderr, "bench:", serveS3(address))
		os.Exit(1)
	}
	if dir := os.Getenv(logWriterEnv); dir != "" {
		fmt.Fprintln(os.Stderr, "bench:", writeLog(dir))
		os.Exit(1)
	}
	s, err := readSettings(os.Getenv)
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, s); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// diskBytesMin is what has to be free: dead blocks of ours stay for the time of a run. The rows of S3 keep their objects in
// memory, and those of scaling are small.
const (
	diskBytesMin   = 24 << 30
	diskBytesOfS3s = 6 << 30
)

func (s settings) diskBytes() int64 {
	if len(s.rows) > 0 && !slices.ContainsFunc(s.rows, func(row string) bool {
		return !slices.Contains(s3Rows, row) && !slices.Contains(scalingRows, row) && !slices.Contains(controlRows, row)
	}) {
		return diskBytesOfS3s
	}
	return diskBytesMin
}

func run(ctx context.Context, s settings) error {
	if _, err := os.Stat(harness.Binary()); err != nil {
		return fmt.Errorf("%w; `make build` makes it", err)
	}
	out := harness.Cache("bench")
	if err := os.MkdirAll(out, 0o755); err != nil {
		return err
	}
	if free, err := freeBytes(out); err != nil {
		return err
	} else if need := s.diskBytes(); free < need {
		return fmt.Errorf("%s has %d GiB free, the run needs %d", out, free>>30, need>>30)
	}
	begin := time.Now()
	r := &recorder{settings: s}
	chosen := slices.DeleteFunc(slices.Clone(rows), func(row string) bool { return !s.wantsRow(row) })
	fmt.Printf("%s: runs of %s, %d repetitions interleaved (ABBA), TCP loopback (G2: unix sockets),\n"+
		"area of %d MiB, all on one file system, overwritten twice before, log of ours %s\n",
		strings.Join(chosen, " "), s.runTime, s.repeat, areaBytes>>20, logSize)
	err := errors.Join(phase(ctx, out, r, nbdRun), phase(ctx, out, r, nfsRun), phase(ctx, out, r, s3Run), phase(ctx, out, r, scalingRun), phase(ctx, out, r, controlRun))
	r.print(os.Stdout)
	path := filepath.Join(out, begin.UTC().Format("20060102-150405")+".json")
	if werr := r.write(path, begin); werr != nil {
		err = errors.Join(err, werr)
	} else {
		fmt.Printf("\nsamples in %s; the run took %s\n", path, time.Since(begin).Round(time.Second))
	}
	return err
}

// phase runs one protocol's rows in a directory of their own, which goes away with what the servers wrote.
func phase(ctx context.Context, out string, r *recorder, f func(context.Context, *recorder, string) error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	dir, err := os.MkdirTemp(out, "run-")
	if err != nil {
		return err
	}
	return errors.Join(f(ctx, r, dir), os.RemoveAll(dir))
}

func freeBytes(dir string) (int64, error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return 0, fmt.Errorf("statfs %s: %w", dir, err)
	}
	return int64(st.Bavail) * st.Bsize, nil
}
