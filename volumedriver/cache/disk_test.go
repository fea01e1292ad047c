package cache

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"slices"
	"syscall"
	"testing"
	"time"

	"varve/volumedriver/backend"
	"varve/volumedriver/backend/backendtest"
	"varve/volumedriver/vfs"
)

// TestBitFlipsOnDiskGiveRightBytes flips bits all over the cache file: each read gives the right bytes all the same, and the
// damage is counted. This is what catches a cache without CRC.
func TestBitFlipsOnDiskGiveRightBytes(t *testing.T) {
	fs, mem := vfs.NewMem(1), backendtest.NewMem()
	data := put(t, mem, "v/a/00/1-1-0", 4*mib)
	c := mustOpen(t, Config{FS: fs, Bytes: 16 * mib})
	b := c.Wrap(poolID, mem)
	o := open(t, b, "v/a/00/1-1-0")
	want(t, o, data, 0, len(data))
	settle(t, c)
	rnd := rand.New(rand.NewPCG(1, 2))
	f, err := fs.OpenFile("/cache/lines", os.O_RDWR, 0)
	check(t, err)
	size, err := f.Size()
	check(t, err)
	for range 40 {
		flip(t, f, rnd.Int64N(size), 1<<rnd.IntN(8))
	}
	check(t, f.Close())
	for range 2 {
		for off := 0; off < len(data); off += 16 * kib {
			want(t, o, data, off, 16*kib)
		}
		settle(t, c)
	}
	s := c.Stats()
	if s.DiskCorrupt == 0 || s.DiskHits == 0 || s.DiskOff != "" {
		t.Errorf("%+v", s)
	}
	check(t, o.Close())
	check(t, b.Close())
	check(t, c.Close())
}

func flip(t testing.TB, f vfs.File, off int64, bits byte) {
	t.Helper()
	p := []byte{0}
	_, err := f.ReadAt(p, off)
	check(t, err)
	p[0] ^= bits
	_, err = f.WriteAt(p, off)
	check(t, err)
}

// TestOldIndexCostsOnlyMisses restarts with the index of an earlier time, whose slots have gone to other lines since.
func TestOldIndexCostsOnlyMisses(t *testing.T) {
	fs, mem := vfs.NewMem(1), backendtest.NewMem()
	var data [][]byte
	name := func(i int) string { return fmt.Sprintf("v/a/00/1-%d-0", i) }
	for i := range 6 {
		data = append(data, put(t, mem, name(i), mib))
	}
	cfg := Config{FS: fs, Bytes: 2 * mib}
	fill := func(c *Cache, from, to int) {
		b := c.Wrap(poolID, keepOpen{mem})
		for i := from; i < to; i++ {
			o := open(t, b, name(i))
			want(t, o, data[i], 0, mib)
			check(t, o.Close())
			settle(t, c)
		}
		check(t, b.Close())
	}
	c := mustOpen(t, cfg)
	fill(c, 0, 2)
	check(t, c.Close())
	old := read(t, fs, "/cache/index")
	c = mustOpen(t, cfg)
	fill(c, 2, 6)
	check(t, c.Close())
	write(t, fs, "/cache/index", old)

	c = mustOpen(t, cfg)
	if s := c.Stats(); s.DiskUsed == 0 {
		t.Fatalf("the old index was not loaded: %+v", s)
	}
	fill(c, 0, 6)
	fill(c, 0, 6)
	if s := c.Stats(); s.DiskStale == 0 || s.DiskCorrupt > 0 {
		t.Errorf("%+v", s)
	}
	check(t, c.Close())

	for i := range old { // and of any damage
		if i%7 != 0 && i > 64 {
			continue
		}
		bad := slices.Clone(old)
		bad[i] ^= 1 << (i % 8)
		write(t, fs, "/cache/index", bad)
		c := mustOpen(t, cfg)
		if s := c.Stats(); s.DiskUsed != 0 || s.Objects != 0 {
			t.Fatalf("an index with byte %d changed was taken", i)
		}
		check(t, c.Close())
	}
	write(t, fs, "/cache/index", old[:len(old)-1])
	c = mustOpen(t, cfg)
	fill(c, 0, 6)
	check(t, c.Close())
}

func read(t testing.TB, fs vfs.FS, name string) []byte {
	t.Helper()
	f, err := fs.OpenFile(name, os.O_RDONLY, 0)
	check(t, err)
	size, err := f.Size()
	check(t, err)
	p := make([]byte, size)
	_, err = f.ReadAt(p, 0)
	check(t, err)
	check(t, f.Close())
	return p
}

func write(t testing.TB, fs vfs.FS, name string, p []byte) {
	t.Helper()
	f, err := fs.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	check(t, err)
	_, err = f.WriteAt(p, 0)
	check(t, err)
	check(t, f.Close())
}

// TestObjectDeletedAfterTheIndexWasSaved is not found by its lines after a restart.
func TestObjectDeletedAfterTheIndexWasSaved(t *testing.T) {
	fs, mem := vfs.NewMem(1), backendtest.NewMem()
	data := put(t, mem, "v/a/00/1-1-0", mib)
	cfg := Config{FS: fs, Bytes: 4 * mib, RAMBytes: mib}
	c := mustOpen(t, cfg)
	b := c.Wrap(poolID, keepOpen{mem})
	o := open(t, b, "v/a/00/1-1-0")
	want(t, o, data, 0, mib)
	check(t, o.Close())
	check(t, b.Close())
	check(t, c.Close())
	check(t, mem.Delete(t.Context(), "v/a/00/1-1-0"))

	c = mustOpen(t, cfg)
	b = c.Wrap(poolID, keepOpen{mem})
	if _, err := b.Open(t.Context(), "v/a/00/1-1-0"); !errors.Is(err, backend.ErrNotExist) {
		t.Errorf("open of an object that is cached and gone: %v", err)
	}
	if s := c.Stats(); s.DiskUsed != 0 || s.Objects != 0 {
		t.Errorf("its lines are kept: %+v", s)
	}
	check(t, b.Close())
	check(t, c.Close())
}

// TestFailingDiskIsNoError fails each call on the SSD once, and then all from there on: readers get their bytes.
func TestFailingDiskIsNoError(t *testing.T) {
	for _, times := range []int64{1, 0} {
		for _, err := range []error{syscall.EIO, syscall.ENOSPC} {
			for n := int64(1); n < 60; n++ {
				e := vfs.NewErrors(vfs.NewMem(1))
				hit := e.Inject(vfs.Fault{From: n, Times: times, Err: err})
				useDisk(t, e)
				if hit.Fired() == 0 {
					break
				}
			}
		}
	}
	e := vfs.NewErrors(vfs.NewMem(1))
	e.Inject(vfs.Fault{Op: vfs.OpWrite, Path: "lines", Err: syscall.ENOSPC})
	c := mustOpen(t, Config{FS: e, Bytes: 4 * mib})
	b := c.Wrap(poolID, backendtest.NewMem())
	data := put(t, b, "x", mib)
	o := open(t, b, "x")
	want(t, o, data, 0, mib)
	settle(t, c)
	want(t, o, data, 0, mib)
	if s := c.Stats(); s.DiskOff == "" {
		t.Errorf("a full disk raises no alarm: %+v", s)
	}
	check(t, o.Close())
	check(t, b.Close())
	check(t, c.Close())
}

// TestSmallDisk: where the file system has less room than the tier may take, the tier stays smaller and leaves some to others.
func TestSmallDisk(t *testing.T) {
	fs, mem := vfs.NewMem(1), backendtest.NewMem()
	fs.SetCapacity(2 * mib)
	c := mustOpen(t, Config{FS: fs, Bytes: 64 * mib, LineBytes: 16 * kib})
	c.ssd.step = 512 * kib
	b := c.Wrap(poolID, mem)
	data := put(t, mem, "x", 4*mib)
	o := open(t, b, "x")
	for range 3 {
		for off := 0; off < len(data); off += 256 * kib {
			want(t, o, data, off, 256*kib)
			settle(t, c)
		}
	}
	s := c.Stats()
	if s.DiskOff != "" || s.DiskBytes < mib || s.DiskBytes > 2*mib || s.DiskUsed != s.DiskBytes || s.DiskHits == 0 || s.DiskEvicted == 0 {
		t.Errorf("%+v", s)
	}
	if _, free, err := fs.Space("/"); err != nil || free < 100*kib {
		t.Errorf("%d bytes are left, %v", free, err)
	}
	if ram, disk := b.(Holder).Held("x", 0, 10*mib); ram != 0 || disk != s.DiskUsed {
		t.Errorf("%d and %d bytes are held", ram, disk)
	}
	check(t, o.Close())
	check(t, b.Close())
	check(t, c.Close())
}

func useDisk(t *testing.T, fs vfs.FS) {
	mem := backendtest.NewMem()
	for round := range 2 {
		c := mustOpen(t, Config{FS: fs, Bytes: 2 * mib, KeepWrites: true})
		b := c.Wrap(poolID, keepOpen{mem})
		if round == 0 {
			put(t, b, "x", 300_000)
		}
		data := content("x", 300_000)
		o := open(t, b, "x")
		for range 2 {
			for off := 0; off < 300_000; off += 100_000 {
				want(t, o, data, off, 100_000)
			}
			settle(t, c)
		}
		check(t, o.Close())
		check(t, b.Close())
		_ = c.Close() // may fail to save its index
	}
}

// TestDiskThatLies: reads of the cache file that return nothing, old or shifted bytes, writes that do not happen.
func TestDiskThatLies(t *testing.T) {
	for _, fault := range []vfs.Fault{
		{Op: vfs.OpRead, Drop: true}, {Op: vfs.OpRead, Shift: 4128}, {Op: vfs.OpRead, Flip: true}, {Op: vfs.OpRead, Shift: 66048},
		{Op: vfs.OpWrite, Drop: true}, {Op: vfs.OpWrite, Shift: 4128}, {Op: vfs.OpWrite, Shift: 66048}, {Op: vfs.OpWrite, Flip: true},
	} {
		fault.Path = "lines"
		e := vfs.NewErrors(vfs.NewMem(1))
		hit := e.Inject(fault)
		useDisk(t, e)
		if hit.Fired() == 0 {
			t.Errorf("%+v did not happen", fault)
		}
	}
}

// TestPowerCuts cuts the power before every call that changes the cache's files. After a restart every byte is right.
func TestPowerCuts(t *testing.T) {
	m := vfs.NewMem(7)
	var images []*vfs.Mem
	m.OnCall(func(c vfs.Call) {
		for i, survive := range []float64{0, 0.5, 1} {
			images = append(images, m.Crash(c.Seq*3+int64(i), survive))
		}
	})
	mem := backendtest.NewMem()
	work := func(fs vfs.FS) {
		c := mustOpen(t, Config{FS: fs, Bytes: 512 * kib, LineBytes: 16 * kib})
		b := c.Wrap(poolID, keepOpen{mem})
		for i := range 6 {
			name := fmt.Sprintf("v/a/00/1-%d-0", i)
			data := content(name, 200_000)
			if _, err := mem.Stat(t.Context(), name); err != nil {
				check(t, mem.Put(t.Context(), name, data))
			}
			o := open(t, b, name)
			for off := 0; off+20_000 <= len(data); off += 20_000 {
				want(t, o, data, off, 20_000)
			}
			check(t, o.Close())
			if i == 3 {
				settle(t, c)
				check(t, c.ssd.save())
			}
		}
		settle(t, c)
		check(t, b.Close())
		check(t, c.Close())
	}
	work(m)
	m.OnCall(nil)
	for _, image := range images {
		work(image)
	}
	t.Logf("%d images", len(images))
}

// TestWholePutsAreKept: also of an object with more lines than may wait to be written.
func TestWholePutsAreKept(t *testing.T) {
	mem := &counting{Backend: backendtest.NewMem()}
	c := mustOpen(t, Config{FS: vfs.OS(), Dir: t.TempDir(), Bytes: 128 * mib, KeepWrites: true})
	b := c.Wrap(poolID, mem)
	var all [][]byte
	for i := range 3 {
		all = append(all, put(t, b, fmt.Sprint(i), 16*mib))
	}
	settle(t, c)
	for i, data := range all {
		o := open(t, b, fmt.Sprint(i))
		want(t, o, data, 0, len(data))
		check(t, o.Close())
	}
	if s := c.Stats(); mem.reads.Load() > 0 || s.DiskDropped > 0 {
		t.Errorf("%d reads of the backend; %+v", mem.reads.Load(), s)
	}
	check(t, b.Close())
	check(t, c.Close())
}

// TestOnARealFile runs through the operating system's files.
func TestOnARealFile(t *testing.T) {
	dir, mem := t.TempDir(), backendtest.NewMem()
	data := put(t, mem, "v/a/00/1-1-0", 4*mib)
	for round := range 2 {
		c := mustOpen(t, Config{FS: vfs.OS(), Dir: dir, Bytes: 16 * mib})
		b := c.Wrap(poolID, keepOpen{mem})
		o := open(t, b, "v/a/00/1-1-0")
		want(t, o, data, 0, len(data))
		settle(t, c)
		p := make([]byte, 4096)
		if err := o.TryReadAt(p, 40_960); err == nil && !bytes.Equal(p, data[40_960:45_056]) || err != nil && !errors.Is(err, vfs.ErrWouldBlock) {
			t.Errorf("tried read: %v", err)
		}
		if s := c.Stats(); round == 1 && (s.Fetches > 0 || s.DiskHits < 64) || s.DiskOff != "" {
			t.Errorf("round %d: %+v", round, s)
		}
		check(t, o.Close())
		check(t, b.Close())
		if _, err := b.Open(t.Context(), "v/a/00/1-1-0"); !errors.Is(err, fs.ErrClosed) {
			t.Errorf("open after close: %v", err)
		}
		if err := o.ReadAt(t.Context(), p, int64(len(data))); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("read beyond the end: %v", err)
		}
		check(t, c.Close())
	}
}

// TestRefusedPut: the bytes of a put that the backend refuses never pass for those of the object that it has, be the index as old as
// it may.
func TestRefusedPut(t *testing.T) {
	fs, mem := vfs.NewMem(1), backendtest.NewMem()
	fault := backendtest.NewFault(mem)
	// One slot, so that every line of the object goes where the one before it was.
	cfg := Config{FS: fs, Bytes: 80 * kib, LineBytes: 64 * kib, KeepWrites: true}
	c := mustOpen(t, cfg)
	b := c.Wrap(poolID, keepOpen{fault})
	data := put(t, b, "v/a/x", 50_000)
	settle(t, c)
	check(t, b.Close())
	check(t, c.Close())
	index := read(t, fs, "/cache/index")

	c = mustOpen(t, cfg)
	b = c.Wrap(poolID, keepOpen{fault})
	fault.Add(backendtest.Spoil{Op: backendtest.OpPut, Delay: 100 * time.Millisecond})
	for range 2 { // the first empties the slot, if it is counted as forgotten
		if err := b.Put(t.Context(), "v/a/x", content("other", 50_000)); !errors.Is(err, backend.ErrExist) {
			t.Fatal(err)
		}
		settle(t, c)
	}
	check(t, b.Close())
	check(t, c.Close())
	write(t, fs, "/cache/index", index) // as a crash leaves it

	c = mustOpen(t, cfg)
	b = c.Wrap(poolID, keepOpen{fault})
	o := open(t, b, "v/a/x")
	want(t, o, data, 0, len(data))
	check(t, o.Close())
	check(t, b.Close())
	check(t, c.Close())
}
