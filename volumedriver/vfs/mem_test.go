package vfs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func create(t testing.TB, m FS, name string) File {
	t.Helper()
	f, err := m.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	check(t, err)
	return f
}

func open(t testing.TB, m FS, name string) File {
	t.Helper()
	f, err := m.OpenFile(name, os.O_RDWR, 0)
	check(t, err)
	return f
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func write(t testing.TB, f File, p []byte, off int64) {
	t.Helper()
	_, err := f.WriteAt(p, off)
	check(t, err)
}

func contents(t testing.TB, m FS, name string) []byte {
	t.Helper()
	f, err := m.OpenFile(name, os.O_RDONLY, 0)
	check(t, err)
	defer f.Close()
	size, err := f.Size()
	check(t, err)
	p := make([]byte, size)
	if n, err := f.ReadAt(p, 0); n != len(p) {
		t.Fatalf("read %d of %d bytes: %v", n, len(p), err)
	}
	return p
}

func exists(t testing.TB, m FS, name string) bool {
	t.Helper()
	_, err := m.Stat(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return err == nil
}

func blocks(n int, v byte) []byte { return bytes.Repeat([]byte{v}, n*memBlock) }

func TestMemOnlySyncedBytesSurvive(t *testing.T) {
	m := NewMem(1)
	f := create(t, m, "/a")
	check(t, m.SyncDir("/"))
	write(t, f, blocks(8, 1), 0)
	check(t, f.Datasync())
	write(t, f, blocks(8, 2), 0)
	write(t, f, blocks(1, 2), 8*memBlock)

	if got := contents(t, m.Crash(1, 0), "a"); !bytes.Equal(got, blocks(8, 1)) {
		t.Error("a cut that loses all did not bring back the synced bytes")
	}
	if got := contents(t, m.Crash(1, 1), "a"); !bytes.Equal(got, blocks(9, 2)) {
		t.Error("a cut that keeps all lost some")
	}
	if got := contents(t, m.Kill(), "a"); !bytes.Equal(got, blocks(9, 2)) {
		t.Error("a kill lost written bytes")
	}
	var whole, torn, sizes = map[byte]int{}, 0, map[int]bool{}
	for seed := range int64(100) {
		got := contents(t, m.Crash(seed, 0.5), "a")
		sizes[len(got)] = true
		for b := 0; b < 8; b++ {
			block := got[b*memBlock:][:memBlock]
			for s := 0; s < memBlock; s += memSector {
				if v := block[s]; v != 1 && v != 2 || !bytes.Equal(block[s:s+memSector], bytes.Repeat([]byte{v}, memSector)) {
					t.Fatalf("seed %d: sector %d of block %d is neither old nor new", seed, s/memSector, b)
				}
			}
			if bytes.Equal(block, bytes.Repeat(block[:1], memBlock)) {
				whole[block[0]]++
			} else {
				torn++
			}
		}
	}
	if whole[1] < 100 || whole[2] < 100 || torn < 50 || len(sizes) < 3 {
		t.Errorf("too little variety: old %d new %d torn %d sizes %d", whole[1], whole[2], torn, len(sizes))
	}
	if !bytes.Equal(contents(t, m.Crash(7, 0.5), "a"), contents(t, m.Crash(7, 0.5), "a")) {
		t.Error("the same seed gave two images")
	}
}

func TestMemClonesAreApart(t *testing.T) {
	m := NewMem(1)
	f := create(t, m, "/a")
	check(t, m.SyncDir("/"))
	write(t, f, blocks(4, 1), 0)
	c, k := m.Crash(1, 1), m.Kill()
	write(t, f, blocks(4, 2), 0)
	g := open(t, c, "/a")
	write(t, g, blocks(2, 3), 0)
	check(t, g.Truncate(3*memBlock))
	if got := contents(t, m, "a"); !bytes.Equal(got, blocks(4, 2)) {
		t.Error("a write to the clone showed in the original")
	}
	if got := contents(t, k, "a"); !bytes.Equal(got, blocks(4, 1)) {
		t.Error("a write to the original showed in the killed clone")
	}
	if got := contents(t, c.Crash(1, 0), "a"); !bytes.Equal(got, blocks(4, 1)) {
		t.Error("the clone did not take its image as durable")
	}
	if got := contents(t, k.Crash(1, 0), "a"); len(got) != 0 {
		t.Error("a kill made unsynced bytes durable")
	}
}

func TestMemOverwrittenVersionMayBeOnDisk(t *testing.T) {
	m := NewMem(3)
	f := create(t, m, "/a")
	check(t, m.SyncDir("/"))
	for v := range byte(20) {
		write(t, f, blocks(1, v+1), 0)
	}
	seen := map[byte]bool{}
	for seed := range int64(300) {
		if got := contents(t, m.Crash(seed, 0.5), "a"); len(got) > 0 {
			seen[got[0]] = true
		}
	}
	if !seen[20] || !seen[0] || len(seen) != 3 {
		t.Errorf("want the newest, zeros and one version between, got %v", seen)
	}
}

func TestMemTruncateIsAtomic(t *testing.T) {
	m := NewMem(1)
	f := create(t, m, "/a")
	check(t, m.SyncDir("/"))
	write(t, f, blocks(8, 1), 0)
	check(t, f.Sync())
	check(t, f.Truncate(5000))
	write(t, f, blocks(1, 2), 4*memBlock)
	old, cut := 0, 0
	for seed := range int64(200) {
		got := contents(t, m.Crash(seed, 0.5), "a")
		if len(got) == 8*memBlock {
			old++
			if !bytes.Equal(got, blocks(8, 1)) {
				t.Fatalf("seed %d: the old size with other than the old bytes", seed)
			}
			continue
		}
		cut++
		if len(got) < 5000 || !bytes.Equal(got[:5000], blocks(2, 1)[:5000]) {
			t.Fatalf("seed %d: bytes before the cut changed", seed)
		}
		if i := bytes.IndexByte(got[5000:], 1); i >= 0 {
			t.Fatalf("seed %d: byte %d beyond the cut is back", seed, 5000+i)
		}
	}
	if old < 20 || cut < 20 {
		t.Errorf("too little variety: %d old, %d cut", old, cut)
	}
	if got := contents(t, m, "a"); len(got) != 5*memBlock || bytes.IndexByte(got[5000:4*memBlock], 1) >= 0 {
		t.Error("bytes beyond a truncation show again")
	}
}

func TestMemNamesNeedSyncDir(t *testing.T) {
	m := NewMem(1)
	check(t, m.MkdirAll("/d/e", 0o700))
	check(t, m.SyncDir("/"))
	f := create(t, m, "/d/e/x")
	write(t, f, blocks(1, 1), 0)
	check(t, f.Sync())
	check(t, m.SyncDir("/d/e"))
	if c := m.Crash(1, 0); !exists(t, c, "/d") || exists(t, c, "/d/e") {
		t.Error("syncing a directory made its own name durable, or syncing the root did not")
	}
	check(t, m.SyncDir("/d"))
	if c := m.Crash(1, 0); !bytes.Equal(contents(t, c, "/d/e/x"), blocks(1, 1)) {
		t.Error("a synced file is lost")
	}
	check(t, m.Link("/d/e/x", "/d/y"))
	if err := m.Link("/d/e/x", "/d/y"); !errors.Is(err, fs.ErrExist) {
		t.Errorf("link over a name: %v", err)
	}
	check(t, m.Remove("/d/e/x"))
	check(t, m.SyncDir("/d"))
	if c := m.Crash(1, 0); !exists(t, c, "/d/y") || !exists(t, c, "/d/e/x") {
		t.Error("the link is lost, or an unsynced removal survived")
	}
	check(t, m.SyncDir("/d/e"))
	if c := m.Crash(1, 0); exists(t, c, "/d/e/x") {
		t.Error("a synced removal is undone")
	}
}

func TestMemRenameIsAtomic(t *testing.T) {
	m := NewMem(1)
	check(t, m.MkdirAll("/a", 0o700))
	check(t, m.SyncDir("/"))
	f := create(t, m, "/a/x")
	write(t, f, []byte("x"), 0)
	check(t, f.Sync())
	check(t, m.SyncDir("/a"))
	check(t, m.MkdirAll("/b", 0o700))
	check(t, m.Rename("/a/x", "/b/y"))
	check(t, m.Rename("/b/y", "/b/z"))
	seen := map[string]int{}
	for seed := range int64(300) {
		c := m.Crash(seed, 0.5)
		var at []string
		for _, name := range []string{"/a/x", "/b/y", "/b/z"} {
			if exists(t, c, name) {
				at = append(at, name)
			}
		}
		if len(at) == 0 {
			t.Fatalf("seed %d: the file is lost", seed)
		}
		seen[fmt.Sprint(at)]++
	}
	if seen["[/a/x]"] == 0 || seen["[/b/y]"] == 0 || seen["[/b/z]"] == 0 {
		t.Errorf("too little variety: %v", seen)
	}
	for _, dir := range []string{"/a", "/b"} {
		k := m.Kill()
		check(t, k.SyncDir(dir))
		c := k.Crash(1, 0)
		if dir == "/a" && (exists(t, c, "/a/x") || !exists(t, c, "/b/y")) {
			t.Errorf("sync of %s did not make its rename durable", dir)
		}
		if dir == "/b" && exists(t, c, "/a/x") {
			t.Errorf("sync of %s made half of a rename durable", dir)
		}
		if dir == "/b" {
			check(t, k.SyncDir("/"))
			if c := k.Crash(1, 0); !exists(t, c, "/b/z") || exists(t, c, "/b/y") {
				t.Errorf("sync of %s and the root did not make both renames durable", dir)
			}
		}
	}
}

func TestMemLyingSync(t *testing.T) {
	m := NewMem(1)
	f := create(t, m, "/a")
	check(t, m.SyncDir("/"))
	write(t, f, blocks(2, 1), 0)
	m.LieSync("a", 1)
	check(t, f.Datasync())
	if got := contents(t, m.Crash(1, 0), "a"); len(got) != 0 {
		t.Error("the lying sync made bytes durable")
	}
	check(t, f.Datasync())
	if got := contents(t, m.Crash(1, 0), "a"); !bytes.Equal(got, blocks(2, 1)) {
		t.Error("the honest sync after it did not")
	}
	m.LieSync("/", 1)
	create(t, m, "/b")
	check(t, m.SyncDir("/"))
	if exists(t, m.Crash(1, 0), "b") {
		t.Error("the lying directory sync made a name durable")
	}
}

func TestMemFailedSyncForgets(t *testing.T) {
	m := NewMem(1)
	f := create(t, m, "/a")
	check(t, m.SyncDir("/"))
	write(t, f, blocks(2, 1), 0)
	check(t, f.Sync())
	write(t, f, blocks(2, 2), 0)
	m.FailSync("/a", 1)
	if err := f.Sync(); !errors.Is(err, syscall.EIO) {
		t.Fatalf("sync: %v", err)
	}
	check(t, f.Sync()) // the retry that must not be trusted
	if got := contents(t, m, "a"); !bytes.Equal(got, blocks(2, 2)) {
		t.Error("reads changed before the cut")
	}
	for _, survive := range []float64{0, 0.5, 1} {
		if got := contents(t, m.Kill().Crash(1, survive), "a"); !bytes.Equal(got, blocks(2, 1)) {
			t.Errorf("survive %v: forgotten bytes are durable", survive)
		}
	}
	write(t, f, blocks(1, 3), 0)
	check(t, f.Sync())
	if got := contents(t, m.Crash(1, 0), "a"); !bytes.Equal(got, append(blocks(1, 3), blocks(1, 1)...)) {
		t.Error("a new write and sync did not make its block durable")
	}
}

func TestMemCapacity(t *testing.T) {
	m := NewMem(1)
	m.SetCapacity(10 * memBlock)
	f := create(t, m, "/a")
	check(t, f.Preallocate(4*memBlock))
	if err := f.Preallocate(11 * memBlock); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("reserve too much: %v", err)
	}
	g := create(t, m, "/b")
	if n, err := g.WriteAt(blocks(8, 1), 0); n != 6*memBlock || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("wrote %d, %v", n, err)
	}
	write(t, f, blocks(4, 1), 0)
	if _, free, _ := m.Space("/"); free != 0 {
		t.Errorf("%d bytes free", free)
	}
	check(t, m.Remove("/b"))
	if _, free, _ := m.Space("/"); free != 0 {
		t.Errorf("%d bytes free with the removed file open", free)
	}
	check(t, g.Close())
	total, free, _ := m.Space("/")
	if total != 10*memBlock || free != 6*memBlock {
		t.Errorf("%d of %d bytes free", free, total)
	}
	check(t, f.Truncate(memBlock))
	for _, c := range []*Mem{m, m.Kill(), m.Crash(1, 1)} {
		if c == m || exists(t, c, "/a") {
			if _, free, _ = c.Space("/"); free != 9*memBlock {
				t.Errorf("%d bytes free after a truncation", free)
			}
		}
	}
}

func TestMemCallsAreSeen(t *testing.T) {
	m := NewMem(1)
	var calls []string
	var clones []*Mem
	m.OnCall(func(c Call) {
		calls = append(calls, fmt.Sprintf("%d %v %s %d+%d", c.Seq, c.Op, c.Path, c.Off, c.Len))
		clones = append(clones, m.Crash(c.Seq, 1))
	})
	f := create(t, m, "a")
	write(t, f, []byte("hello"), 3)
	check(t, f.Sync())
	check(t, m.Rename("a", "b"))
	check(t, m.SyncDir("/"))
	m.OnCall(nil)
	check(t, m.Remove("b"))
	want := []string{"1 create /a 0+0", "2 write /a 3+5", "3 sync /a 0+0", "4 rename /b 0+0", "5 syncdir / 0+0"}
	if fmt.Sprint(calls) != fmt.Sprint(want) {
		t.Errorf("calls %q", calls)
	}
	if exists(t, clones[0], "a") || !exists(t, clones[1], "a") || !exists(t, clones[4], "b") {
		t.Error("a clone is not from before its call")
	}
}

// TestConformance holds OS and Mem to the same behaviour.
func TestConformance(t *testing.T) {
	t.Run("os", func(t *testing.T) { conformance(t, OS(), t.TempDir()) })
	t.Run("mem", func(t *testing.T) {
		m := NewMem(1)
		check(t, m.MkdirAll("/x/y", 0o700))
		conformance(t, m, "/x/y")
	})
	t.Run("errors", func(t *testing.T) { conformance(t, NewErrors(OS()), t.TempDir()) })
}

func conformance(t *testing.T, m FS, dir string) {
	is := func(what string, err, want error) {
		t.Helper()
		if !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
	}
	at := func(name string) string { return dir + "/" + name }
	_, err := m.OpenFile(at("none"), os.O_RDWR, 0)
	is("open of nothing", err, fs.ErrNotExist)
	_, err = m.Stat(at("none"))
	is("stat of nothing", err, fs.ErrNotExist)
	_, err = m.ReadDir(at("none"))
	is("readdir of nothing", err, fs.ErrNotExist)
	is("remove of nothing", m.Remove(at("none")), fs.ErrNotExist)
	is("rename of nothing", m.Rename(at("none"), at("n")), fs.ErrNotExist)
	is("link of nothing", m.Link(at("none"), at("n")), fs.ErrNotExist)
	is("sync of no directory", m.SyncDir(at("none")), fs.ErrNotExist)
	check(t, m.RemoveAll(at("none")))

	f := create(t, m, at("f"))
	_, err = m.OpenFile(at("f"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	is("create of what exists", err, fs.ErrExist)
	var bufs [][]byte
	var want []byte
	for i := range 3000 { // more than one pwritev takes
		b := bytes.Repeat([]byte{byte(i)}, i%7)
		bufs, want = append(bufs, b), append(want, b...)
	}
	n, err := f.WritevAt(bufs, 5)
	check(t, err)
	if n != len(want) {
		t.Errorf("wrote %d of %d bytes", n, len(want))
	}
	want = append(make([]byte, 5), want...)
	if got := contents(t, m, at("f")); !bytes.Equal(got, want) {
		t.Error("WritevAt wrote other bytes")
	}
	got := make([]byte, len(want))
	if err := f.TryReadAt(got, 0); err != nil && err != ErrWouldBlock {
		t.Error(err)
	} else if err == nil && !bytes.Equal(got, want) {
		t.Error("TryReadAt read other bytes")
	}
	if err := f.TryReadAt(got, 1); err != ErrWouldBlock {
		t.Errorf("TryReadAt across the end: %v", err)
	}
	if n, err := f.ReadAt(got, 1); n != len(want)-1 || err != io.EOF {
		t.Errorf("read across the end: %d, %v", n, err)
	}
	check(t, f.Preallocate(1<<20))
	if size, err := f.Size(); size != int64(len(want)) || err != nil {
		t.Errorf("size %d, %v after Preallocate", size, err)
	}
	check(t, f.Datasync())
	check(t, f.Sync())
	check(t, f.Truncate(7))
	check(t, f.Truncate(9))
	if got := contents(t, m, at("f")); !bytes.Equal(got, append(want[:7:7], 0, 0)) {
		t.Errorf("after truncations: %q", got)
	}

	check(t, m.MkdirAll(at("d/e"), 0o700))
	check(t, m.MkdirAll(at("d/e"), 0o700))
	is("mkdir over a file", m.MkdirAll(at("f"), 0o700), syscall.ENOTDIR)
	is("path through a file", m.MkdirAll(at("f/x"), 0o700), syscall.ENOTDIR)
	is("remove of a full directory", m.Remove(at("d")), syscall.ENOTEMPTY)
	check(t, m.Link(at("f"), at("d/g")))
	is("link over a name", m.Link(at("f"), at("d/g")), fs.ErrExist)
	check(t, m.Rename(at("f"), at("d/b")))
	check(t, m.Rename(at("d/b"), at("d/g"))) // two names of one file: nothing happens
	names, err := m.ReadDir(at("d"))
	check(t, err)
	if fmt.Sprint(names) != "[b e g]" {
		t.Errorf("names %v", names)
	}
	check(t, m.Remove(at("d/b")))
	check(t, m.SyncDir(at("d")))
	fi, err := m.Stat(at("d/g"))
	check(t, err)
	if fi.Size() != 9 || fi.IsDir() || fi.Name() != "g" {
		t.Errorf("stat: %v %v %v", fi.Size(), fi.IsDir(), fi.Name())
	}
	check(t, f.Close())
	is("second close", f.Close(), fs.ErrClosed)
	_, err = f.ReadAt(got, 0)
	is("read after close", err, fs.ErrClosed)
	_, err = f.WritevAt([][]byte{{1}}, 0)
	is("write after close", err, fs.ErrClosed)
	is("datasync after close", f.Datasync(), fs.ErrClosed)
	is("try read after close", f.TryReadAt(got, 0), fs.ErrClosed)

	r, err := m.OpenFile(at("d/g"), os.O_RDONLY, 0)
	check(t, err)
	_, err = r.WriteAt([]byte{1}, 0)
	is("write to a file open for reading", err, syscall.EBADF)
	check(t, r.Close())
	check(t, m.RemoveAll(at("d")))
	if exists(t, m, at("d")) {
		t.Error("RemoveAll left its directory")
	}

	l, err := m.Lock(at("lock"))
	check(t, err)
	_, err = m.Lock(at("lock"))
	is("second lock", err, syscall.EWOULDBLOCK)
	check(t, l.Close())
	l, err = m.Lock(at("lock"))
	check(t, err)
	check(t, l.Close())
	total, free, err := m.Space(dir)
	if err != nil || total == 0 || free > total {
		t.Errorf("space %d of %d, %v", free, total, err)
	}
}

func TestMemConcurrent(t *testing.T) {
	m := NewMem(1)
	f := create(t, m, "/shared")
	check(t, m.SyncDir("/"))
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range 100 {
				off := int64(w*100+i) * memBlock
				if _, err := f.WriteAt(blocks(1, byte(w+1)), off); err != nil {
					t.Error(err)
				}
				if err := f.Datasync(); err != nil {
					t.Error(err)
				}
				p := make([]byte, memBlock)
				g, err := m.Crash(int64(i), 0.5).OpenFile("/shared", os.O_RDWR, 0)
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := g.ReadAt(p, off); err != nil || !bytes.Equal(p, blocks(1, byte(w+1))) {
					t.Errorf("synced block %d is lost: %v", off/memBlock, err)
				}
			}
		})
	}
	wg.Wait()
}

// TestMemCloneIsCheap keeps ten thousand crash points over a few MiB within seconds.
func TestMemCloneIsCheap(t *testing.T) {
	m := NewMem(1)
	f := create(t, m, "/log")
	check(t, m.SyncDir("/"))
	write(t, f, make([]byte, 8<<20), 0)
	check(t, f.Sync())
	start, points := time.Now(), 2000
	for i := range points {
		write(t, f, blocks(2, byte(i)), int64(i%2000)*memBlock)
		m.Crash(int64(i), 0.5)
		if i%8 == 7 {
			check(t, f.Datasync())
		}
	}
	each := time.Since(start) / time.Duration(points)
	t.Logf("write and crash clone of an 8 MiB file: %v each", each)
	if each > 2*time.Millisecond {
		t.Errorf("%v a crash point", each)
	}
}

// TestMemAgainstModel compares a file with a byte slice over random writes, truncations, reservations, syncs and clones.
func TestMemAgainstModel(t *testing.T) {
	for seed := range uint64(60) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		m := NewMem(int64(seed))
		m.SetCapacity(1 << 30)
		f := create(t, m, "/f")
		check(t, m.SyncDir("/"))
		var now, synced []byte
		for step := range 60 {
			switch rnd.IntN(8) {
			case 0, 1, 2:
				off, p := rnd.IntN(5*memBlock), make([]byte, rnd.IntN(3*memBlock))
				for i := range p {
					p[i] = byte(step + 1)
				}
				write(t, f, p, int64(off))
				if len(p) > 0 {
					now = grown(now, off+len(p))
					copy(now[off:], p)
				}
			case 3:
				size := rnd.IntN(6 * memBlock)
				check(t, f.Truncate(int64(size)))
				now = grown(now, size)[:size]
			case 4:
				check(t, f.Datasync())
				synced = bytes.Clone(now)
			case 5:
				check(t, f.Preallocate(rnd.Int64N(8*memBlock)))
			case 6: // the process is killed, and goes on with what is left
				m = m.Kill()
				f = open(t, m, "/f")
			case 7:
				if rnd.IntN(3) > 0 {
					continue
				}
				if rnd.IntN(2) == 0 {
					m, now = m.Crash(int64(step), 0), bytes.Clone(synced)
				} else {
					m, synced = m.Crash(int64(step), 1), bytes.Clone(now)
				}
				f = open(t, m, "/f")
			}
			if !bytes.Equal(contents(t, m, "/f"), now) {
				t.Fatalf("seed %d step %d: other bytes than were written", seed, step)
			}
			if !bytes.Equal(contents(t, m.Crash(1, 0), "/f"), synced) {
				t.Fatalf("seed %d step %d: other bytes than were synced", seed, step)
			}
			half := m.Crash(int64(step), 0.5)
			contents(t, half, "/f")
			for _, c := range []*Mem{m, half} {
				if got, want := c.used, recount(c); got != want {
					t.Fatalf("seed %d step %d: %d blocks count as used, %d are", seed, step, got, want)
				}
			}
		}
	}
}

func grown(p []byte, size int) []byte {
	if size > len(p) {
		p = append(p, make([]byte, size-len(p))...)
	}
	return p
}

// recount counts the blocks that the one file in the root takes.
func recount(m *Mem) (used int64) {
	f := m.root.names["f"].file
	for b := range int64(len(f.chunks) * chunkBlocks) {
		if b < f.reserved || f.page(b) != nil {
			used++
		}
	}
	return max(used, f.reserved)
}

// TestMemNamesAgainstModel does random calls on names, and checks after each that what is synced is there after any power cut,
// that nothing is lost that only moved, and that ten cuts in a row leave a file system that works.
func TestMemNamesAgainstModel(t *testing.T) {
	dirs := []string{"/a", "/b", "/b/c"}
	for seed := range uint64(40) {
		rnd := rand.New(rand.NewPCG(seed, 2))
		m := NewMem(int64(seed))
		for _, d := range dirs {
			check(t, m.MkdirAll(d, 0o700))
			check(t, m.SyncDir(d[:strings.LastIndexByte(d, '/')+1]))
		}
		at := func() string { return fmt.Sprintf("%s/%d", dirs[rnd.IntN(len(dirs))], rnd.IntN(4)) }
		g := create(t, m, "/a/keep") // renamed now and then, never removed
		check(t, g.Sync())
		check(t, m.SyncDir("/a"))
		keep := "/a/keep"
		for step := range 40 {
			switch rnd.IntN(6) {
			case 0:
				f, err := m.OpenFile(at(), os.O_RDWR|os.O_CREATE, 0o600)
				check(t, err)
				check(t, f.Close())
			case 1:
				_ = m.Remove(at())
			case 2:
				_ = m.Rename(at(), at())
			case 3:
				_ = m.Link(at(), at())
			case 4:
				check(t, m.SyncDir(dirs[rnd.IntN(len(dirs))]))
			case 5:
				to := dirs[rnd.IntN(len(dirs))] + "/keep"
				check(t, m.Rename(keep, to))
				keep = to
			}
			var c *Mem
			for i := range 3 {
				c = m.Crash(int64(step*10+i), float64(i)/2)
				if !exists(t, c, "/a/keep") && !exists(t, c, "/b/keep") && !exists(t, c, "/b/c/keep") {
					t.Fatalf("seed %d step %d: a power cut lost a file that was only renamed", seed, step)
				}
			}
			if rnd.IntN(10) == 0 {
				m = c
				for _, k := range []string{"/a/keep", "/b/keep", "/b/c/keep"} {
					if exists(t, m, k) {
						keep = k
					}
				}
			}
		}
		for _, d := range append(dirs, "/") {
			check(t, m.SyncDir(d))
		}
		if len(m.pending) != 0 {
			t.Errorf("seed %d: %d name changes are pending after all directories were synced", seed, len(m.pending))
		}
		want := tree(t, m, "/")
		for i := range 3 {
			if got := tree(t, m.Crash(1, float64(i)/2), "/"); got != want {
				t.Errorf("seed %d: synced names %s became %s", seed, want, got)
			}
		}
	}
}

// tree lists all names below dir.
func tree(t *testing.T, m FS, dir string) (s string) {
	names, err := m.ReadDir(dir)
	check(t, err)
	for _, name := range names {
		fi, err := m.Stat(dir + "/" + name)
		check(t, err)
		s += name + " "
		if fi.IsDir() {
			s += "(" + tree(t, m, dir+"/"+name) + ") "
		}
	}
	return s
}
