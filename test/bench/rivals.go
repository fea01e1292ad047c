package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"varve/test/harness"
	"varve/test/nbdclient"
	"varve/volumedriver/backend/s3/s3test"
)

// The row G18 sets ours beside s3backer (Debian's, with a cache file) and JuiceFS (built by test/setup.sh; metadata in Badger, which is the
// quickest it has without a server) on the same store, 20 ms away: a 4 KiB write at random in a GiB and a flush, one after the other.
// Ours is spoken to by NBD, they by the file system that they mount through FUSE (root only). What a flush means differs: JuiceFS
// uploads, unless it runs with --writeback; s3backer's cache is written to the store later, whatever the client asks.

const (
	rivalBytes = 1 << 30
	rivalRTT   = 20 * time.Millisecond
)

// rival is one thing that takes a write and a flush.
type rival struct {
	name  string
	goal  float64 // ours to theirs
	write func(p []byte, off int64) error
	stop  func() error
	rates []float64
}

func (b *s3Bench) rivals(ctx context.Context) error {
	if err := b.set(rivalRTT, false); err != nil {
		return err
	}
	c, err := b.dial()
	if err != nil {
		return err
	}
	all := []*rival{{name: ours, stop: func() error { c.Close(); return nil }, write: func(p []byte, off int64) error {
		return errors.Join(c.Do(nbdclient.Write, 0, off, 0, p), c.Do(nbdclient.Flush, 0, 0, 0, nil))
	}}}
	for _, start := range []func() (*rival, error){
		func() (*rival, error) { return b.juiceFS("JuiceFS", 20) },
		func() (*rival, error) { return b.juiceFS("JuiceFS --writeback", 3, "--writeback") },
		b.s3backer,
	} {
		r, err := start()
		if err != nil {
			fmt.Printf("G18  not measured: %v\n", err)
			continue
		}
		all = append(all, r)
	}
	err = b.race(ctx, all)
	for _, r := range all {
		err = errors.Join(err, r.stop())
	}
	if err != nil {
		return err
	}
	for _, r := range all[1:] {
		var ratios []float64
		for i, rate := range r.rates {
			ratios = append(ratios, all[0].rates[i]/rate)
		}
		ratio := spreadOf(ratios)
		line("G18", fmt.Sprintf("4 KiB write + flush, S3 at %s: ours %.0f/s, %s %.1f/s, ratio %.1f (%.1f-%.1f)", rivalRTT, spreadOf(all[0].rates).Median, r.name,
			spreadOf(r.rates).Median, ratio.Median, ratio.Min, ratio.Max), fmt.Sprintf(">= %.0f", r.goal), ratio.Median >= r.goal)
	}
	return nil
}

func (b *s3Bench) race(ctx context.Context, all []*rival) error {
	r, p := rand.New(rand.NewPCG(18, 1)), make([]byte, 4096)
	fillRandom(r, p)
	order := slices.Clone(all)
	for range b.repeat {
		for _, v := range order {
			n, start := 0, time.Now()
			for time.Since(start) < b.time && ctx.Err() == nil {
				if err := v.write(p, r.Int64N(rivalBytes/4096)*4096); err != nil {
					return fmt.Errorf("%s: %w", v.name, err)
				}
				n++
			}
			v.rates = append(v.rates, float64(n)/time.Since(start).Seconds())
		}
		slices.Reverse(order)
	}
	return ctx.Err()
}

// mount starts what serves a file system until it is there, and opens a file of it.
func (b *s3Bench) mount(r *rival, dir, file string, program string, args ...string) (*rival, error) {
	p, err := harness.Start(program, args...)
	if err != nil {
		return nil, err
	}
	unmount := func() error {
		err := syscall.Unmount(dir, syscall.MNT_DETACH)
		p.Kill()
		return err
	}
	var before, now syscall.Stat_t
	if err := syscall.Stat(filepath.Dir(dir), &before); err != nil {
		return nil, errors.Join(err, unmount())
	}
	err = harness.Poll(30*time.Second, func() error {
		if err := syscall.Stat(dir, &now); err != nil {
			return err
		}
		if now.Dev == before.Dev {
			return fmt.Errorf("%s is not mounted; %s said:\n%s", dir, program, p.Log())
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(err, unmount())
	}
	f, err := os.OpenFile(filepath.Join(dir, file), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, errors.Join(err, unmount())
	}
	if st, err := f.Stat(); err != nil || st.Size() < rivalBytes {
		if err := errors.Join(err, f.Truncate(rivalBytes)); err != nil {
			return nil, errors.Join(err, f.Close(), unmount())
		}
	}
	r.write = func(p []byte, off int64) error {
		if _, err := f.WriteAt(p, off); err != nil {
			return err
		}
		return f.Sync()
	}
	r.stop = func() error { return errors.Join(f.Close(), unmount()) }
	return r, nil
}

// JuiceFS is where test/setup.sh puts it.
func juiceFSBinary() string { return harness.Cache("juicefs") }

func (b *s3Bench) juiceFS(name string, goal float64, options ...string) (*rival, error) {
	program := juiceFSBinary()
	if _, err := os.Stat(program); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	dir := filepath.Join(b.dir, fmt.Sprint("juicefs-", len(options)))
	at := filepath.Join(dir, "mnt")
	if err := os.MkdirAll(at, 0o700); err != nil {
		return nil, err
	}
	meta := "badger://" + filepath.Join(dir, "meta")
	out, err := harness.Run(time.Minute, program, "format", "--storage", "s3", "--bucket", b.endpoint+"/"+s3test.Bucket, "--access-key", "bench",
		"--secret-key", "bench-secret", "--trash-days", "0", meta, filepath.Base(dir))
	if err != nil {
		return nil, fmt.Errorf("%s: format: %w\n%s", name, err, out)
	}
	args := append([]string{"mount", "--no-usage-report", "--cache-dir", filepath.Join(dir, "cache")}, options...)
	return b.mount(&rival{name: name, goal: goal}, at, "file", program, append(args, meta, at)...)
}

func (b *s3Bench) s3backer() (*rival, error) {
	program, err := exec.LookPath("s3backer")
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(b.dir, "s3backer")
	at := filepath.Join(dir, "mnt")
	if err := os.MkdirAll(at, 0o700); err != nil {
		return nil, err
	}
	return b.mount(&rival{name: "s3backer with a cache file", goal: 5}, at, "file", program, "-f", "--baseURL="+b.endpoint+"/", "--accessId=bench",
		"--accessKey=bench-secret", "--blockSize=4k", "--size="+fmt.Sprint(rivalBytes), "--prefix=s3backer-", "--blockCacheFile="+filepath.Join(dir, "cache"),
		"--blockCacheSize=65536", s3test.Bucket, at)
}
