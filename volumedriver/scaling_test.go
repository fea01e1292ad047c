package volumedriver

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver/backend/local"
	"varve/volumedriver/blockio"
	"varve/volumedriver/blockmap"
	"varve/volumedriver/vfs"
)

// scaled is a driver on a real directory with one volume of which the first bytes are mapped.
func scaled(t *testing.T, dir string, mapped int64) (*Driver, *Volume, func()) {
	t.Helper()
	d, err := Open(Config{FS: vfs.OS(), Dir: filepath.Join(dir, "data"), LogBytes: 256 << 20, SegmentBytes: 16 << 20, NoPrewrite: true,
		MapBudgetBytes: 64 << 20, ScrubEvery: -1})
	must(t, err)
	b, err := local.Open(vfs.OS(), filepath.Join(dir, "backend"))
	must(t, err)
	d.AddPool(testPool, b)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx) }()
	v, err := d.Create(ctx, Spec{ID: testVolume, Pool: testPool, Epoch: 1, Size: 2 << 40, PoolName: "default", Path: "big.raw", Kind: "disk"})
	must(t, err)
	// As if it had been written: the snapshots and clones below never look at these blocks.
	for at := uint64(0); v.backed() == 0 && at < uint64(mapped/blockSize); at += blockmap.LeafBlocks {
		must(t, d.maps.Set(v.handle(), at, blockmap.MakeRef(uint32(1+at>>12), 0), blockmap.LeafBlocks))
	}
	must(t, d.maps.Checkpoint(nil, nil))
	return d, v, func() {
		cancel()
		must(t, <-ended)
		must(t, d.Close())
	}
}

func percentile(ds []time.Duration, p float64) time.Duration {
	slices.Sort(ds)
	return ds[min(len(ds)-1, int(float64(len(ds))*p))].Round(time.Microsecond)
}

// TestSnapshotScaling: what a snapshot and a clone cost depends neither on the size of the volume nor on how many there are.
func TestSnapshotScaling(t *testing.T) {
	if testing.Short() {
		t.Skip("seconds, on a real disk")
	}
	ctx := context.Background()
	var p99, clone [2]time.Duration
	for i, mapped := range []int64{1 << 30, 1 << 40} {
		dir, err := os.MkdirTemp("", "varve-scaling")
		must(t, err)
		d, v, stop := scaled(t, dir, mapped)
		p := fill(1, 7)
		var took, cloned []time.Duration
		for k := range 100 {
			must(t, v.Write(ctx, p, int64(k)*blockSize, 0))
			began := time.Now()
			_, err := v.Snapshot(ctx, SnapshotSpec{ID: uuid.New(), Name: fmt.Sprint("s", k)})
			must(t, err)
			took = append(took, time.Since(began))
		}
		snaps := v.Snapshots()
		wait, cancel := context.WithTimeout(ctx, time.Minute)
		must(t, v.WaitBacked(wait, snaps[99].Seq))
		cancel()
		for k := range 20 {
			began := time.Now()
			_, err := d.Clone(ctx, testVolume, snaps[k].ID, Spec{ID: uuid.New(), Epoch: 1, PoolName: "default", Path: fmt.Sprintf("c%d.raw", k), Kind: "disk"})
			must(t, err)
			cloned = append(cloned, time.Since(began))
		}
		p99[i], clone[i] = percentile(took, 0.99), percentile(cloned, 0.5)
		began := time.Now()
		must(t, v.DeleteSnapshot(ctx, snaps[50].ID))
		deleted := time.Since(began)
		stop()
		began = time.Now()
		_, _, stop = scaled(t, dir, 0)
		fmt.Printf("» S5, S6, S7, S3 at %d GiB mapped: snapshot p50 %s p99 %s (goal 10 ms), clone %s (goal 50 ms), delete of a snapshot %s, clean restart %s\n",
			mapped>>30, percentile(took, 0.5), p99[i], clone[i], deleted.Round(time.Microsecond), time.Since(began).Round(time.Millisecond))
		stop()
		must(t, os.RemoveAll(dir))
	}
}

// TestManySnapshots: thousands of snapshots slow neither writes nor reads of the head.
func TestManySnapshots(t *testing.T) {
	if testing.Short() {
		t.Skip("seconds, on a real disk")
	}
	const snapshots = 2000
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "varve-snapshots")
	must(t, err)
	defer func() { must(t, os.RemoveAll(dir)) }()
	d, v, stop := scaled(t, dir, 64<<20)
	defer stop()
	p := fill(1, 7)
	rate := func() (w, r float64) {
		const n = 4000
		began := time.Now()
		for k := range n {
			must(t, v.Write(ctx, p, int64(k%1024)*blockSize, 0))
		}
		w = n / time.Since(began).Seconds()
		began = time.Now()
		for k := range n {
			must(t, v.Read(ctx, p, int64(k%1024)*blockSize))
		}
		return w, n / time.Since(began).Seconds()
	}
	settle := func() { // everything on the backend, and read once
		wait, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		must(t, d.Drain(wait))
		all := make([]byte, 1024*blockSize)
		must(t, v.Read(ctx, all, 0))
	}
	rate()
	settle()
	w0, r0 := rate()
	began := time.Now()
	for k := range snapshots {
		if k%8 == 0 {
			must(t, v.Write(ctx, p, int64(k%1024)*blockSize, 0))
		}
		_, err := v.Snapshot(ctx, SnapshotSpec{ID: uuid.New(), Name: fmt.Sprint("s", k)})
		must(t, err)
	}
	took := time.Since(began)
	settle()
	w1, r1 := rate()
	fmt.Printf("» %d snapshots taken in %s; 4K writes then %.2f and reads %.2f of the rate before (goal 0.95)\n", snapshots, took.Round(time.Millisecond), w1/w0, r1/r0)
	if len(v.Snapshots()) != snapshots {
		t.Fatalf("%d snapshots", len(v.Snapshots()))
	}
	must(t, v.Write(ctx, p, 0, blockio.FUA))
}
