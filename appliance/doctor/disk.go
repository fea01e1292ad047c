package doctor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"varve/volumedriver/backend"
)

const (
	syncsMax      = 400
	syncsFor      = 2 * time.Second
	streamBytes   = 64 << 20
	streamFor     = 5 * time.Second
	suspectRate   = 20_000  // fdatasyncs per second; the fastest drives with protected caches stay below
	incredible    = 100_000 // no device answers in 10 us
	slowSyncP99   = 50 * time.Millisecond
	slowStreamMBs = 40

	spaceFailBytes = 512 << 20
	spaceWarnBytes = 8 << 30
)

// Disk gives the checks of the directory that holds, or will hold, the appliance's data. open makes a local backend in an
// empty directory. Files of their own are made in a new directory below dir and removed again.
func Disk(dir string, open func(dir string) (backend.Backend, error)) []Check {
	return []Check{
		{"disk.mount", "data directory is on a real disk", 10 * time.Second, func(context.Context) Finding { return mount(dir) }},
		{"disk.space", "room left for data", 10 * time.Second, func(context.Context) Finding { return space(dir) }},
		{"disk.flush", "fdatasync reaches the device", 30 * time.Second, func(ctx context.Context) Finding {
			return inScratch(dir, func(d string) Finding { return flush(ctx, d) })
		}},
		{"disk.log", "speed of the log disk", 40 * time.Second, func(ctx context.Context) Finding {
			return inScratch(dir, func(d string) Finding { return logSpeed(ctx, d) })
		}},
		{"backend.local", "local backend keeps its contract", 30 * time.Second, func(ctx context.Context) Finding {
			return inScratch(dir, func(d string) Finding { return contract(ctx, d, open) })
		}},
	}
}

// existing gives dir or the nearest directory above it that exists, so that a directory can be judged before it is made.
func existing(dir string) (string, error) {
	for d, err := filepath.Abs(dir); ; d = filepath.Dir(d) {
		if err != nil {
			return "", err
		}
		if info, e := os.Stat(d); e == nil {
			if !info.IsDir() {
				return "", fmt.Errorf("%s is not a directory", d)
			}
			return d, nil
		} else if !errors.Is(e, os.ErrNotExist) {
			return "", e
		}
	}
}

func inScratch(dir string, probe func(scratch string) Finding) Finding {
	dir, err := existing(dir)
	if err != nil {
		return failed(err, "give another --data directory")
	}
	d, err := os.MkdirTemp(dir, ".doctor-")
	if err != nil {
		return failed(err, "make the data directory writable for this user")
	}
	defer os.RemoveAll(d)
	return probe(d)
}

func mount(dir string) Finding {
	dir, err := existing(dir)
	if err != nil {
		return failed(err, "give another --data directory")
	}
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return failed(fmt.Errorf("statfs %s: %w", dir, err), "check the file system")
	}
	const remedy = "put --data on a disk of its own with ext4 or xfs"
	for _, k := range []struct {
		magic  int64
		name   string
		status Status
	}{
		{unix.TMPFS_MAGIC, "tmpfs: everything is lost at power off", Warn},
		{unix.RAMFS_MAGIC, "ramfs: everything is lost at power off", Warn},
		{unix.OVERLAYFS_SUPER_MAGIC, "overlayfs: the layer of a container, which often ends with it", Warn},
		{unix.NFS_SUPER_MAGIC, "nfs: a log on the network is slow, and locks and syncs are the server's word", Warn},
		{unix.FUSE_SUPER_MAGIC, "fuse: flushes are the FUSE daemon's word", Warn},
		{unix.EXT4_SUPER_MAGIC, "ext4", OK},
		{unix.XFS_SUPER_MAGIC, "xfs", OK},
		{unix.BTRFS_SUPER_MAGIC, "btrfs: copy-on-write makes a log slower than it has to be", Warn},
	} {
		if int64(s.Type) == k.magic {
			f := Finding{k.status, fmt.Sprintf("%s is on %s", dir, k.name), ""}
			if k.status != OK {
				f.Remedy = remedy
			}
			return f
		}
	}
	return Finding{Warn, fmt.Sprintf("%s is on a file system of type %#x, which varve was not tried on", dir, s.Type), remedy}
}

func space(dir string) Finding {
	dir, err := existing(dir)
	if err != nil {
		return failed(err, "give another --data directory")
	}
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return failed(fmt.Errorf("statfs %s: %w", dir, err), "check the file system")
	}
	avail, total := s.Bavail*uint64(s.Bsize), s.Blocks*uint64(s.Bsize)
	f := Finding{OK, fmt.Sprintf("%.1f GiB of %.1f GiB available in %s", gib(avail), gib(total), dir), ""}
	const remedy = "free space or move --data to a larger disk; a full disk makes guests wait and then see ENOSPC"
	switch {
	case avail < spaceFailBytes:
		f.Status, f.Remedy = Fail, remedy
	case avail < spaceWarnBytes || avail < total/20:
		f.Status, f.Remedy = Warn, remedy
	}
	return f
}

func gib(n uint64) float64 { return float64(n) / (1 << 30) }

// syncs times single 4 KiB overwrites, each followed by fdatasync, in a file whose blocks exist.
func syncs(ctx context.Context, dir string) ([]time.Duration, error) {
	f, err := os.OpenFile(filepath.Join(dir, "sync"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	const length = 4 << 20
	if _, err := f.Write(make([]byte, length)); err != nil {
		return nil, err
	}
	if err := f.Sync(); err != nil {
		return nil, fmt.Errorf("fsync: %w", err)
	}
	block := bytes.Repeat([]byte{0xA5}, 4096)
	var took []time.Duration
	for end := time.Now().Add(syncsFor); len(took) < syncsMax && time.Now().Before(end) && ctx.Err() == nil; {
		start := time.Now()
		if _, err := f.WriteAt(block, int64(len(took))*4096%length); err != nil {
			return nil, err
		}
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			return nil, fmt.Errorf("fdatasync: %w", err)
		}
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	if len(took) == 0 {
		return nil, fmt.Errorf("not one fdatasync ended: %w", ctx.Err())
	}
	return took, nil
}

func flush(ctx context.Context, dir string) Finding {
	took, err := syncs(ctx, dir)
	if err != nil {
		return failed(err, "replace the disk or the file system; a failed sync means lost data")
	}
	median := took[len(took)/2]
	rate := float64(time.Second) / float64(max(median, 1))
	f := Finding{OK, fmt.Sprintf("%d syncs, median %s (%.0f/s)", len(took), median.Round(time.Microsecond), rate), ""}
	const remedy = "flushes seem to end in a volatile cache; on a VM set the disk's cache mode to none or directsync, " +
		"on a drive without power-loss protection switch its write cache off"
	switch {
	case rate > incredible:
		f.Status, f.Remedy = Fail, "no device is that fast: "+remedy
	case rate > suspectRate:
		f.Status, f.Remedy = Warn, remedy
	}
	return f
}

func logSpeed(ctx context.Context, dir string) Finding {
	took, err := syncs(ctx, dir)
	if err != nil {
		return failed(err, "replace the disk or the file system")
	}
	mbs, err := stream(ctx, dir)
	if err != nil {
		return failed(err, "replace the disk or the file system")
	}
	p50, p99 := took[len(took)/2], took[len(took)*99/100]
	f := Finding{OK, fmt.Sprintf("4K write+fdatasync p50 %s p99 %s; sequential %.0f MB/s",
		p50.Round(time.Microsecond), p99.Round(time.Microsecond), mbs), ""}
	if p99 > slowSyncP99 || mbs < slowStreamMBs {
		f.Status, f.Remedy = Warn, "guests' flushes wait for this disk: use an SSD, and one that nothing else uses"
	}
	return f
}

// stream gives the speed of sequential 1 MiB writes with one fdatasync at the end, in 10^6 bytes per second.
func stream(ctx context.Context, dir string) (float64, error) {
	f, err := os.OpenFile(filepath.Join(dir, "stream"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	block := bytes.Repeat([]byte{0x5A}, 1<<20)
	start := time.Now()
	written := 0
	for written < streamBytes && time.Since(start) < streamFor && ctx.Err() == nil {
		if _, err := f.Write(block); err != nil {
			return 0, err
		}
		written += len(block)
	}
	if err := unix.Fdatasync(int(f.Fd())); err != nil {
		return 0, fmt.Errorf("fdatasync: %w", err)
	}
	return float64(written) / 1e6 / time.Since(start).Seconds(), nil
}

// contract tries the promises that the volume driver relies on.
func contract(ctx context.Context, dir string, open func(string) (backend.Backend, error)) Finding {
	if err := tryBackend(ctx, dir, open); err != nil {
		return failed(err, "this file system cannot hold a backend; use ext4 or xfs on a local disk")
	}
	return Finding{OK, "create-only refused the second time, read back equal, listed after write, gone after delete", ""}
}

func tryBackend(ctx context.Context, dir string, open func(string) (backend.Backend, error)) error {
	b, err := open(dir)
	if err != nil {
		return fmt.Errorf("open backend: %w", err)
	}
	return errors.Join(TryBackend(ctx, b), b.Close())
}

// TryBackend puts, reads, lists and deletes one object of a new name below "doctor/", and says which promise was broken.
func TryBackend(ctx context.Context, b backend.Backend) error {
	name := "doctor/probe-" + uuid.NewString()
	want := bytes.Repeat([]byte("varve"), 20_000)
	if err := b.Put(ctx, name, want[:5000], want[5000:]); err != nil {
		return fmt.Errorf("put: %w", err)
	}
	if err := b.Put(ctx, name, []byte("other")); !errors.Is(err, backend.ErrExist) {
		return fmt.Errorf("a second put of one name was not refused as existing: %v", err)
	}
	o, err := b.Open(ctx, name)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	got := make([]byte, len(want))
	err = o.ReadAt(ctx, got, 0)
	if e := o.Close(); err != nil || e != nil {
		return fmt.Errorf("read back: %w", errors.Join(err, e))
	}
	if !bytes.Equal(got, want) {
		return errors.New("read back other bytes than were put")
	}
	list, err := b.List(ctx, name, "", 10)
	if err != nil {
		return fmt.Errorf("list: %w", err)
	}
	if len(list) != 1 || list[0].Name != name || list[0].Size != int64(len(want)) {
		return fmt.Errorf("the list after a put is %v", list)
	}
	if err := b.Delete(ctx, name); err != nil {
		return fmt.Errorf("delete: %w", err)
	}
	if _, err := b.Stat(ctx, name); !errors.Is(err, backend.ErrNotExist) {
		return fmt.Errorf("the object is still there after its delete: %v", err)
	}
	return nil
}
