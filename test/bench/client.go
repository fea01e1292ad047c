package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/url"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"varve/test/harness"
	"varve/test/nbdclient"
)

// clientCrashes counts the times that fio itself broke down. Its engines do that now and then at the end of a job.
var clientCrashes atomic.Int64

// fio runs one job. args say what it does; the engine's own arguments say to whom. A job that fio did not survive is run once
// more; one in which the server gave an error is not.
func fio(ctx context.Context, limit time.Duration, program string, engine, args []string) (outcome, error) {
	got, err := fioOnce(ctx, limit, program, engine, args)
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && ctx.Err() == nil {
		clientCrashes.Add(1)
		fmt.Printf("fio: %s, once more\n", exit)
		got, err = fioOnce(ctx, limit, program, engine, args)
	}
	return got, err
}

func fioOnce(ctx context.Context, limit time.Duration, program string, engine, args []string) (outcome, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, slices.Concat([]string{"--name=bench", "--thread", "--randrepeat=0",
		"--output-format=json"}, engine, args)...)
	cmd.WaitDelay = 2 * time.Second
	var out, complaints bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaints
	err := cmd.Run()
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	j, notes, perr := fioResult(out.String())
	if err == nil || j.Error != 0 {
		err = perr
	}
	if err != nil {
		return outcome{}, fmt.Errorf("%s: %w\n%s%s", strings.Join(cmd.Args, " "), err, notes, complaints.String())
	}
	side := j.Read
	if j.Write.TotalIOs > j.Read.TotalIOs {
		side = j.Write
	}
	at := func(p string) time.Duration { return time.Duration(side.Clat.Percentile[p]) }
	return outcome{ops: j.Read.TotalIOs + j.Write.TotalIOs, rate: j.Read.IOPS + j.Write.IOPS,
		bytesSec: j.Read.BWBytes + j.Write.BWBytes, p50: at("50.000000"), p99: at("99.000000")}, nil
}

// fioResult reads the one job of fio's JSON, before which an engine may have printed notes.
func fioResult(text string) (j harness.FioJob, notes string, err error) {
	at := max(0, strings.IndexByte(text, '{'))
	var result struct{ Jobs []harness.FioJob }
	if err := json.NewDecoder(strings.NewReader(text[at:])).Decode(&result); err != nil {
		return j, text, fmt.Errorf("its result: %w", err)
	}
	notes = text[:at]
	if len(result.Jobs) != 1 {
		return j, notes, fmt.Errorf("%d jobs in its result", len(result.Jobs))
	}
	j = result.Jobs[0]
	if j.Error != 0 {
		return j, notes, fmt.Errorf("its job ended: %w", syscall.Errno(j.Error))
	}
	return j, notes, nil
}

// timed makes a fio job run for a time, over an area that may be visited again.
func timed(d time.Duration, args string) []string {
	return append(strings.Fields(args), "--norandommap", "--time_based", fmt.Sprintf("--runtime=%dms", d.Milliseconds()))
}

var benchTook = regexp.MustCompile(`Run completed in ([0-9.]+) seconds`)

// qemuBench writes 4 KiB at depth 16 with exactly one flush per 32 writes, which does not wait for the queue to empty. The
// pattern is not zero, which a server could take for a hole; the step visits the whole image, never two neighbours.
func qemuBench(limit time.Duration, uri string, writes int) (outcome, error) {
	out, err := harness.Run(limit, "qemu-img", "bench", "-w", "-f", "raw", "-t", "none", "-d", "16", "-s", "4096", "-S", "69632",
		"--pattern=165", "--flush-interval=32", "--no-drain", "-c", strconv.Itoa(writes), uri)
	if err != nil {
		return outcome{}, err
	}
	m := benchTook.FindStringSubmatch(out)
	if m == nil {
		return outcome{}, fmt.Errorf("qemu-img bench printed no time: %s", out)
	}
	seconds, err := strconv.ParseFloat(m[1], 64)
	if err != nil || seconds <= 0 {
		return outcome{}, fmt.Errorf("qemu-img bench took %s seconds", m[1])
	}
	rate := float64(writes) / seconds
	return outcome{ops: int64(writes), rate: rate, bytesSec: rate * 4096}, nil
}

// payload is what our own clients write: random bytes, so that nothing can be saved by looking at them.
var payload = func() []byte {
	p := make([]byte, 4<<20)
	r := rand.NewChaCha8([32]byte{1})
	r.Read(p)
	return p
}()

// piece is n bytes of payload from a random place.
func piece(n int) []byte {
	if n == len(payload) {
		return payload
	}
	at := rand.IntN((len(payload)-n)/512) * 512
	return payload[at : at+n]
}

// pipeline keeps depth operations in flight until more says that there are enough, and waits for all. submit must see to it
// that done is called once; the next operation is submitted in it. The outcome is about the operations that counts names (nil: all).
func pipeline(depth int, more, counts func(i int) bool, submit func(i int, done func(error))) (outcome, error) {
	var (
		mu    sync.Mutex // guards what follows
		next  int
		first error
		took  []time.Duration
		lanes sync.WaitGroup
	)
	var lane func()
	lane = func() {
		mu.Lock()
		i := next
		over := first != nil || !more(i)
		next++
		mu.Unlock()
		if over {
			lanes.Done()
			return
		}
		begun := time.Now()
		submit(i, func(err error) {
			d := time.Since(begun)
			mu.Lock()
			if err != nil {
				first = cmp.Or(first, err)
			} else if counts == nil || counts(i) {
				took = append(took, d)
			}
			mu.Unlock()
			lane()
		})
	}
	start := time.Now()
	lanes.Add(depth)
	for range depth {
		lane()
	}
	lanes.Wait()
	return summary(took, time.Since(start)), first
}

// summary makes an outcome of the latencies of all operations.
func summary(took []time.Duration, elapsed time.Duration) outcome {
	if len(took) == 0 {
		return outcome{}
	}
	slices.Sort(took)
	return outcome{ops: int64(len(took)), rate: float64(len(took)) / elapsed.Seconds(),
		p50: took[len(took)/2], p99: took[len(took)*99/100]}
}

// until gives the condition of a timed pipeline.
func until(ctx context.Context, d time.Duration) func(int) bool {
	deadline := time.Now().Add(d)
	return func(int) bool { return ctx.Err() == nil && time.Now().Before(deadline) }
}

// upTo gives the condition of a pipeline of n operations.
func upTo(ctx context.Context, n int) func(int) bool {
	return func(i int) bool { return i < n && ctx.Err() == nil }
}

// dialURI connects our own client to nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH.
func dialURI(uri string) (*nbdclient.Client, error) {
	u, err := url.Parse(uri)
	if err != nil {
		return nil, err
	}
	export := strings.TrimPrefix(u.Path, "/")
	if u.Scheme == "nbd+unix" {
		return nbdclient.Dial("unix", u.Query().Get("socket"), export)
	}
	return nbdclient.Dial("tcp", u.Host, export)
}

// fillNBD writes the whole export in order, 1 MiB at a time and eight in flight, and flushes it.
func fillNBD(ctx context.Context, uri string, passes int) (outcome, error) {
	const size = 1 << 20
	c, err := dialURI(uri)
	if err != nil {
		return outcome{}, err
	}
	defer c.Close()
	each := int(c.Size / size)
	start := time.Now()
	got, err := pipeline(8, upTo(ctx, passes*each), nil, func(i int, done func(error)) {
		c.Submit(nbdclient.Write, 0, int64(i%each)*size, 0, piece(size), done)
	})
	if err == nil {
		err = c.Do(nbdclient.Flush, 0, 0, 0, nil)
	}
	seconds := time.Since(start).Seconds()
	got.rate = float64(got.ops) / seconds
	got.bytesSec = got.rate * size
	return got, err
}

// durableWrites writes 4 KiB with FUA at random places, one at a time on each export, all exports at once.
func durableWrites(ctx context.Context, uris []string, d time.Duration) (outcome, error) {
	clients := make([]*nbdclient.Client, 0, len(uris))
	defer func() {
		for _, c := range clients {
			c.Close()
		}
	}()
	for _, uri := range uris {
		c, err := dialURI(uri)
		if err != nil {
			return outcome{}, err
		}
		clients = append(clients, c)
	}
	took, errs := make([][]time.Duration, len(clients)), make([]error, len(clients))
	more := until(ctx, d)
	start := time.Now()
	var wg sync.WaitGroup
	for i, c := range clients {
		wg.Go(func() {
			for errs[i] == nil && more(0) {
				begun := time.Now()
				errs[i] = c.Do(nbdclient.Write, nbdclient.FUA, rand.Int64N(c.Size/4096)*4096, 0, piece(4096))
				took[i] = append(took[i], time.Since(begun))
			}
		})
	}
	wg.Wait()
	return summary(slices.Concat(took...), time.Since(start)), errors.Join(errs...)
}

// appendSynced appends 4 KiB to a file and syncs it, one after the other: the floor of a durable write on this disk.
func appendSynced(ctx context.Context, path string, d time.Duration) (outcome, error) {
	f, err := os.Create(path)
	if err != nil {
		return outcome{}, err
	}
	defer f.Close()
	var took []time.Duration
	more := until(ctx, d)
	start := time.Now()
	for more(0) {
		begun := time.Now()
		if _, err := f.Write(piece(4096)); err != nil {
			return outcome{}, err
		}
		if err := syscall.Fdatasync(int(f.Fd())); err != nil {
			return outcome{}, err
		}
		took = append(took, time.Since(begun))
	}
	return summary(took, time.Since(start)), nil
}

// dropCaches empties the page cache.
func dropCaches(context.Context, *server) error {
	syscall.Sync()
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
}
