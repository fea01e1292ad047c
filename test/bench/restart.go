package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver"
	"varve/volumedriver/backend/backendtest"
	"varve/volumedriver/blockio"
	"varve/volumedriver/blockmap"
	"varve/volumedriver/vfs"
)

// The row S3 restarts the driver with a volume of which 10 GiB or 10 TiB are mapped: the leaves are made in the block map while the
// driver is stopped, since a restart never looks at the data. S4 rebuilds volumes from a store 20 ms away that holds real SCOs.

const (
	restartSmall = 10 << 30
	restartLarge = 10 << 40
	restartRuns  = 5
	// logWriterEnv makes this program one that fills the log of the driver in that directory and waits to be killed.
	logWriterEnv  = "BENCH_LOG_WRITER"
	restartLog    = 1 << 30
	restartLogged = 256 << 20
)

var restartVolume, restartPool = uuid.MustParse("5ca1ab1e-0000-4000-8000-000000000003"), uuid.MustParse("5ca1ab1e-0000-4000-8000-000000000004")

func restartRows(ctx context.Context, r *recorder, dir string) error {
	for _, row := range []struct {
		name string
		run  func(context.Context, string) error
	}{{"S3", restarts}, {"S4", attachFromBackend}} {
		if !r.settings.wantsRow(row.name) {
			continue
		}
		sub := filepath.Join(dir, row.name)
		if err := errors.Join(os.MkdirAll(sub, 0o755), row.run(ctx, sub), os.RemoveAll(sub)); err != nil {
			return fmt.Errorf("%s: %w", row.name, err)
		}
	}
	return nil
}

// openRestart opens the driver without a backend and its volume; what is written stays in the log.
func openRestart(ctx context.Context, dir string) (*lab, *volumedriver.Volume, error) {
	l, err := openLab(ctx, volumedriver.Config{LogBytes: restartLog}, dir, restartPool, nil)
	if err != nil {
		return nil, nil, err
	}
	v, err := l.d.Create(ctx, volumedriver.Spec{ID: restartVolume, Pool: restartPool, Epoch: 1, Size: 2 * restartLarge, PoolName: "bench", Path: "s3.raw", Kind: "disk"})
	if err != nil {
		return nil, nil, errors.Join(err, l.stop())
	}
	return l, v, nil
}

// writeLog is the program that is killed.
func writeLog(dir string) error {
	ctx := context.Background()
	_, v, err := openRestart(ctx, dir)
	if err != nil {
		return err
	}
	w, r, p := newWriter(v, 32), rand.New(rand.NewPCG(3, 3)), make([]byte, blockio.BlockSize)
	fillRandom(r, p)
	for range restartLogged / blockio.BlockSize {
		if err := w.write(ctx, p, r.Int64N(1<<18)*blockio.BlockSize, 0); err != nil {
			return err
		}
	}
	if err := errors.Join(w.wait(), v.Flush(ctx)); err != nil {
		return err
	}
	fmt.Println("logged")
	select {}
}

func restarts(ctx context.Context, dir string) error {
	var clean, crash [2]time.Duration
	for i, bytes := range []int64{restartSmall, restartLarge} {
		sub := filepath.Join(dir, fmt.Sprint(bytes>>30))
		l, _, err := openRestart(ctx, sub)
		if err != nil {
			return err
		}
		if err := errors.Join(l.stop(), mapVolume(ctx, sub, bytes)); err != nil {
			return err
		}
		var times []time.Duration
		for range restartRuns {
			start := time.Now()
			l, v, err := openRestart(ctx, sub)
			if err != nil {
				return err
			}
			p := make([]byte, blockio.BlockSize)
			if err := v.Read(ctx, p, restartLarge+1<<30); err != nil { // beyond what is mapped
				return errors.Join(err, l.stop())
			}
			times = append(times, time.Since(start))
			if err := l.stop(); err != nil {
				return err
			}
		}
		clean[i], _ = quantiles(times)
		if crash[i], err = crashed(ctx, sub); err != nil {
			return err
		}
		if err := os.RemoveAll(sub); err != nil {
			return err
		}
	}
	ratio := float64(clean[1]) / float64(clean[0])
	line("S3", fmt.Sprintf("clean restart to the first read: %.0f ms with 10 GiB mapped, %.0f ms with 10 TiB, ratio %.2f", millis(clean[0]), millis(clean[1]), ratio),
		"<= 100 ms, ratio <= 1.2", clean[1] <= 100*time.Millisecond && ratio <= 1.2)
	perGiB := func(d time.Duration) float64 { return d.Seconds() * (1 << 30) / restartLogged }
	ratio = float64(crash[1]) / float64(crash[0])
	line("S3", fmt.Sprintf("restart after a kill with %d MiB of 4 KiB writes in the log: %.2f s a GiB with 10 GiB mapped, %.2f s a GiB with 10 TiB, ratio %.2f",
		restartLogged>>20, perGiB(crash[0]), perGiB(crash[1]), ratio), "<= 1 s a GiB, independent of size", perGiB(crash[1]) <= 1 && ratio <= 1.2)
	return nil
}

// mapVolume maps the first bytes of the volume of the driver that is stopped, as writes in order would have.
func mapVolume(ctx context.Context, dir string, bytes int64) error {
	s, err := blockmap.Open(blockmap.Config{FS: vfs.OS(), Dir: filepath.Join(dir, "data", "map"), BudgetBytes: 256 << 20})
	if err != nil {
		return err
	}
	const run = blockmap.LeafBlocks * 8
	h := blockmap.Handle(1) // of the only volume
	for lba, n := uint64(0), uint32(1); lba < uint64(bytes/blockio.BlockSize) && err == nil; lba, n = lba+run, n+1 {
		err = errors.Join(s.Set(h, lba, blockmap.MakeRef(n, 0), run), ctx.Err())
	}
	err = errors.Join(err, s.Checkpoint(nil, nil))
	// Such a load takes weeks in service, so the store has long put itself in order.
	for last, still, n := int64(0), 0, 0; err == nil && still < 10 && n < 150; n++ {
		if now := s.Stats().PebbleBytes; now == last {
			still++
		} else {
			last, still = now, 0
		}
		time.Sleep(100 * time.Millisecond)
	}
	return errors.Join(err, s.Close())
}

// crashed has a process fill the log, kills it, and opens the driver; the median of some times.
func crashed(ctx context.Context, dir string) (time.Duration, error) {
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	c := exec.CommandContext(ctx, self)
	c.Env, c.Stderr = append(os.Environ(), logWriterEnv+"="+dir), os.Stderr
	out, err := c.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := c.Start(); err != nil {
		return 0, err
	}
	text, err := bufio.NewReader(out).ReadString('\n')
	c.Process.Kill()
	c.Wait()
	if err != nil {
		return 0, fmt.Errorf("the process that fills the log said %q: %w", text, err)
	}
	var times []time.Duration
	for range restartRuns { // nothing leaves the log, so each restart reads all of it
		start := time.Now()
		l, _, err := openRestart(ctx, dir)
		if err != nil {
			return 0, err
		}
		times = append(times, time.Since(start))
		if err := l.stop(); err != nil {
			return 0, err
		}
	}
	took, _ := quantiles(times)
	return took, nil
}

// attachFromBackend brings volumes back that this node knows nothing of.
func attachFromBackend(ctx context.Context, dir string) error {
	const rtt = 20 * time.Millisecond
	var requests, scos [2]int64
	var took [2]time.Duration
	for i, bytes := range []int64{128 << 20, 512 << 20} {
		mem, pool := backendtest.NewMem(), uuid.New()
		l, err := openLab(ctx, volumedriver.Config{LogBytes: 1 << 30}, filepath.Join(dir, fmt.Sprint("a", i)), pool, mem)
		if err != nil {
			return err
		}
		s := l.spec(bytes)
		v, err := l.d.Create(ctx, s)
		if err == nil {
			err = l.fillOrdered(ctx, v, 0, bytes)
		}
		if err := errors.Join(err, l.stop()); err != nil {
			return err
		}
		store := newTally(mem)
		store.rtt = rtt
		if l, err = openLab(ctx, volumedriver.Config{LogBytes: 256 << 20, NoPrewrite: true}, filepath.Join(dir, fmt.Sprint("b", i)), pool, store); err != nil {
			return err
		}
		start := time.Now()
		found, err := l.d.Rebuild(ctx, pool)
		if err == nil {
			v, err = l.d.Volume(ctx, s.ID)
		}
		if err == nil {
			scos[i] = int64(found[0].Objects)
			p := make([]byte, blockio.BlockSize)
			err = v.Read(ctx, p, 0)
		}
		took[i], requests[i] = time.Since(start), store.requests.Load()
		if err := errors.Join(err, l.stop()); err != nil {
			return err
		}
	}
	per := float64(requests[1]-requests[0]) / float64(scos[1]-scos[0])
	fixed := float64(requests[0]) - per*float64(scos[0])
	line("S4", fmt.Sprintf("volume from its backend alone, %s away, to the first read: %d SCOs %.2f s and %d requests, %d SCOs %.2f s and %d requests: %.0f and %.1f for each SCO",
		rtt, scos[0], took[0].Seconds(), requests[0], scos[1], took[1].Seconds(), requests[1], fixed, per),
		"<= 5 requests and 1 for each SCO of the tail, whatever the volume's size", false)
	note("S4", "the map is not on the backend: all SCOs' headers are read, so it grows with the volume")
	return nil
}
