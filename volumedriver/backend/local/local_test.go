package local

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"varve/volumedriver/backend"
	"varve/volumedriver/backend/backendtest"
	"varve/volumedriver/vfs"
)

func TestConformanceOnOS(t *testing.T) {
	backendtest.Run(t, func(t *testing.T) backend.Backend { return mustOpen(t, vfs.OS(), t.TempDir()+"/new/dir") })
}

func TestConformanceOnMem(t *testing.T) {
	backendtest.Run(t, func(t *testing.T) backend.Backend { return mustOpen(t, vfs.NewMem(1), "/data/backend") })
}

func mustOpen(t *testing.T, fs vfs.FS, dir string) *Store {
	t.Helper()
	s, err := Open(fs, dir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestPowerCutAtEveryCall puts objects, some in new directories, some at once, some over existing ones, and cuts the power
// before each call that changes something, with all rates of survival. What a Put has acknowledged must be there, whole, after
// a restart, and nothing may be there in part. The restart is cut as well.
func TestPowerCutAtEveryCall(t *testing.T) {
	m := vfs.NewMem(1)
	type point struct {
		m     *vfs.Mem
		seq   int64
		acked []string
	}
	var mu sync.Mutex
	var acked []string
	var points []point
	m.OnCall(func(c vfs.Call) {
		mu.Lock()
		known := slices.Clone(acked)
		mu.Unlock()
		for i, survive := range []float64{0, 0.3, 0.8, 1} {
			points = append(points, point{m.Crash(c.Seq*10+int64(i), survive), c.Seq, known})
		}
		points = append(points, point{m.Kill().Crash(c.Seq, 0.5), c.Seq, known})
	})
	s := mustOpen(t, m, "/data/backend")
	put := func(name string) {
		if err := s.Put(t.Context(), name, content(name)); err != nil {
			t.Error(err)
		}
		mu.Lock()
		acked = append(acked, name)
		mu.Unlock()
	}
	for i := range 8 {
		put(fmt.Sprintf("v/%d/%d/o%d", i%2, i%5, i))
	}
	if err := s.Put(t.Context(), "v/0/0/o0", []byte("other")); !errors.Is(err, backend.ErrExist) {
		t.Error(err)
	}
	m.OnCall(nil)
	calls := m.Calls()

	for i, p := range points {
		where := fmt.Sprintf("call %d point %d", p.seq, i)
		var again *vfs.Mem
		p.m.OnCall(func(c vfs.Call) {
			if c.Seq == int64(i%9) {
				again = p.m.Crash(int64(i), 0.5)
			}
		})
		verify(t, where, p.m, p.acked)
		if again != nil {
			verify(t, where+" cut again", again, p.acked)
		}
	}
	t.Logf("%d power cuts over %d calls", len(points), calls)
	if len(points) < 250 {
		t.Error("too few points")
	}
}

// content gives the bytes that belong to a name.
func content(name string) []byte { return bytes.Repeat([]byte(name), 5000/len(name)+len(name)*300) }

// verify opens what a power cut left, and checks it. Then every name must be usable again, and nothing left behind.
func verify(t *testing.T, where string, m *vfs.Mem, acked []string) {
	t.Helper()
	s, err := Open(m, "/data/backend")
	if err != nil {
		t.Fatalf("%s: %v", where, err)
	}
	infos, err := s.List(t.Context(), "", "", 1000)
	if err != nil {
		t.Fatalf("%s: %v", where, err)
	}
	there := map[string]bool{}
	for _, info := range infos {
		there[info.Name] = true
		o, err := s.Open(t.Context(), info.Name)
		if err != nil {
			t.Fatalf("%s: %v", where, err)
		}
		p := make([]byte, o.Size())
		if err := errors.Join(o.ReadAt(t.Context(), p, 0), o.Close()); err != nil {
			t.Fatalf("%s: %v", where, err)
		}
		if !bytes.Equal(p, content(info.Name)) {
			t.Fatalf("%s: object %s has %d of %d bytes, or others", where, info.Name, len(p), len(content(info.Name)))
		}
	}
	for _, name := range acked {
		if !there[name] {
			t.Fatalf("%s: object %s was acknowledged and is lost", where, name)
		}
	}
	// What has been shown must not vanish any more.
	later, err := Open(m.Crash(1, 0), "/data/backend")
	if err != nil {
		t.Fatalf("%s: %v", where, err)
	}
	for name := range there {
		if _, err := later.Stat(t.Context(), name); err != nil {
			t.Fatalf("%s: object %s was listed, and lost by the next power cut: %v", where, name, err)
		}
	}
	if left, err := m.ReadDir("/data/backend/tmp"); err != nil || len(left) != 1 {
		t.Fatalf("%s: temporary directories %v, %v", where, left, err)
	}
	if err := s.Put(t.Context(), "v/0/9/new", []byte("new")); err != nil {
		t.Fatalf("%s: %v", where, err)
	}
	if err := s.Close(); err != nil {
		t.Fatalf("%s: %v", where, err)
	}
}

// TestKillThenPowerCut kills the process before each call. What the next one lists, and what it puts, must survive a power cut
// that keeps nothing unsynced: the killed one may have left names and directories that were not durable.
func TestKillThenPowerCut(t *testing.T) {
	m := vfs.NewMem(1)
	var killed []*vfs.Mem
	m.OnCall(func(vfs.Call) { killed = append(killed, m.Kill()) })
	s := mustOpen(t, m, "/data/backend")
	for _, name := range []string{"v/1/x", "v/1/y", "v/2/z"} {
		if err := s.Put(t.Context(), name, content(name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Delete(t.Context(), "v/2/z"); err != nil {
		t.Fatal(err)
	}
	m.OnCall(nil)
	for i, k := range killed {
		s := mustOpen(t, k, "/data/backend")
		infos, err := s.List(t.Context(), "", "", 100)
		if err != nil {
			t.Fatal(err)
		}
		cut := mustOpen(t, k.Crash(1, 0), "/data/backend")
		for _, info := range infos {
			if !isWhole(t, cut, info.Name) {
				t.Errorf("kill %d: object %s was listed, and lost by a power cut", i, info.Name)
			}
		}
		if err := s.Put(t.Context(), "v/1/new", content("v/1/new")); err != nil {
			t.Fatal(err)
		}
		if !isWhole(t, mustOpen(t, k.Crash(1, 0), "/data/backend"), "v/1/new") {
			t.Errorf("kill %d: an object put after it is lost by a power cut", i)
		}
	}
}

// TestLyingSyncIsFound proves that the power cuts see a sync left out: of the object's bytes, of its directory, of a new
// directory's parent.
func TestLyingSyncIsFound(t *testing.T) {
	for _, lie := range []string{"/data/backend/tmp/*/1", "/data/backend/objects/v/1", "/data/backend/objects/v",
		"/data/backend/objects"} {
		m := vfs.NewMem(1)
		s := mustOpen(t, m, "/data/backend")
		m.LieSync(lie, 1)
		if err := s.Put(t.Context(), "v/1/x", content("v/1/x")); err != nil {
			t.Fatal(err)
		}
		later := mustOpen(t, m.Crash(1, 0), "/data/backend")
		info, err := later.Stat(t.Context(), "v/1/x")
		if err == nil && info.Size == int64(len(content("v/1/x"))) {
			t.Errorf("with a sync of %s left out the object survives", lie)
		}
	}
}

// TestEveryCallFails fails each call of a Put once. The Put says so, nothing is there in part, and what a failed directory
// sync has made uncertain is not relied upon until the store is opened anew.
func TestEveryCallFails(t *testing.T) {
	for n := int64(1); ; n++ {
		m := vfs.NewMem(n)
		e := vfs.NewErrors(m)
		s := mustOpen(t, e, "/data/backend")
		hit := e.Inject(vfs.Fault{From: n, Times: 1, Err: syscall.EIO, Op: vfs.OpAny &^ (vfs.OpRemove | vfs.OpClose)})
		err := s.Put(t.Context(), "v/1/x", content("v/1/x"))
		if hit.Fired() == 0 {
			if err != nil || n < 10 {
				t.Errorf("the %dth call did not fail: %v", n, err)
			}
			break
		}
		if !errors.Is(err, syscall.EIO) {
			t.Errorf("call %d: %v", n, err)
		}
		if err := s.Put(t.Context(), "v/1/y", content("v/1/y")); err == nil {
			if c := mustOpen(t, m.Crash(1, 0), "/data/backend"); !isWhole(t, c, "v/1/y") {
				t.Errorf("call %d: a put after the failed one was acknowledged and is lost", n)
			}
		}
		if c := mustOpen(t, m.Kill(), "/data/backend"); !isWhole(t, c, "v/1/x") {
			if _, err := c.Stat(t.Context(), "v/1/x"); !errors.Is(err, backend.ErrNotExist) {
				t.Errorf("call %d: the object is there in part: %v", n, err)
			}
		}
	}
}

func isWhole(t *testing.T, s *Store, name string) bool {
	t.Helper()
	o, err := s.Open(t.Context(), name)
	if errors.Is(err, backend.ErrNotExist) {
		return false
	}
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, o.Size())
	if err := errors.Join(o.ReadAt(t.Context(), p, 0), o.Close()); err != nil {
		t.Fatal(err)
	}
	return bytes.Equal(p, content(name))
}

func TestFailedDirectorySyncIsNotRetried(t *testing.T) {
	m := vfs.NewMem(1)
	s := mustOpen(t, m, "/data/backend")
	if err := s.Put(t.Context(), "v/1/x", nil); err != nil {
		t.Fatal(err)
	}
	m.FailSync("/data/backend/objects/v/1", 1)
	for _, name := range []string{"v/1/y", "v/1/z"} {
		if err := s.Put(t.Context(), name, nil); !errors.Is(err, syscall.EIO) {
			t.Errorf("put %s: %v", name, err)
		}
	}
	if err := s.Put(t.Context(), "v/1/y", nil); err == nil || errors.Is(err, backend.ErrExist) {
		t.Errorf("an object of uncertain durability is said to exist: %v", err)
	}
}

func TestFullDisk(t *testing.T) {
	m := vfs.NewMem(1)
	m.SetCapacity(1 << 20)
	s := mustOpen(t, m, "/data/backend")
	if err := s.Put(t.Context(), "big", make([]byte, 2<<20)); !errors.Is(err, backend.ErrNoSpace) {
		t.Errorf("put of more than fits: %v", err)
	}
	e := vfs.NewErrors(m)
	s = mustOpen(t, e, "/data/backend")
	e.Inject(vfs.Fault{Op: vfs.OpWrite, Times: 1, Err: syscall.ENOSPC, After: 100})
	if err := s.Put(t.Context(), "x", make([]byte, 1000)); !errors.Is(err, backend.ErrNoSpace) {
		t.Errorf("put of more than fits: %v", err)
	}
	if err := s.Put(t.Context(), "x", make([]byte, 1000)); err != nil {
		t.Errorf("a put that fits: %v", err)
	}
	if total, free, err := s.Space(t.Context()); err != nil || total != 1<<20 || free != 1<<20-4096 {
		t.Errorf("%d of %d bytes free, %v: a failed put left its bytes", free, total, err)
	}
}

// TestTwoStores: two processes may use one directory; neither removes what the other is writing.
func TestTwoStores(t *testing.T) {
	dir := t.TempDir()
	a := mustOpen(t, vfs.OS(), dir)
	writing := a.tmp + "/being-written"
	if err := os.WriteFile(writing, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/tmp/notes", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	b := mustOpen(t, vfs.OS(), dir)
	if _, err := os.Stat(writing); err != nil {
		t.Errorf("the second store removed what the first one writes: %v", err)
	}
	var wg sync.WaitGroup
	var made atomic.Int64
	for i := range 40 {
		for _, s := range []*Store{a, b} {
			wg.Go(func() {
				switch err := s.Put(t.Context(), fmt.Sprintf("d/%d/x", i%20)); {
				case err == nil:
					made.Add(1)
				case !errors.Is(err, backend.ErrExist):
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
	if made.Load() != 20 {
		t.Errorf("%d puts say that they made one of 20 objects", made.Load())
	}
	for _, s := range []*Store{a, b} {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	if left, _ := os.ReadDir(dir + "/tmp"); len(left) != 1 || left[0].Name() != "notes" {
		t.Errorf("left in tmp: %v", left)
	}
	if err := a.Put(t.Context(), "y"); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("put to a closed store: %v", err)
	}
}

// TestSyncIsShared: Puts to one directory at the same time wait for few syncs of it.
func TestSyncIsShared(t *testing.T) {
	e := vfs.NewErrors(vfs.NewMem(1))
	s := mustOpen(t, e, "/data/backend")
	if err := s.Put(t.Context(), "d/first"); err != nil {
		t.Fatal(err)
	}
	slow := e.Inject(vfs.Fault{Op: vfs.OpSyncDir, Path: "/data/backend/objects/d", Delay: 5 * time.Millisecond})
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			if err := s.Put(t.Context(), fmt.Sprintf("d/%d", i)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := slow.Seen(); n == 0 || n > 32 {
		t.Errorf("64 puts at once took %d directory syncs", n)
	}
}

// TestListReadsLittle: a prefix and a start narrow what is read.
func TestListReadsLittle(t *testing.T) {
	e := vfs.NewErrors(vfs.NewMem(1))
	s := mustOpen(t, e, "/data/backend")
	for i := range 100 {
		if err := s.Put(t.Context(), fmt.Sprintf("v/%02d/%d", i%10, i)); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		prefix, after string
		max, found    int
		calls         int64
	}{
		{"v/03/", "", 100, 10, 11}, {"v/03/1", "", 100, 1, 2}, {"v/", "v/09", 100, 10, 13}, {"", "", 1, 1, 6}, {"w/", "", 10, 0, 1},
	} {
		hit := e.Inject(vfs.Fault{Op: vfs.OpReadDir | vfs.OpStat, Delay: 1})
		infos, err := s.List(t.Context(), c.prefix, c.after, c.max)
		if err != nil || len(infos) != c.found || hit.Seen() > c.calls {
			t.Errorf("list %+v: %d found in %d calls, %v", c, len(infos), hit.Seen(), err)
		}
		hit.Remove()
	}
}

// bypass is a file system whose files say how often they were written past the page cache, or taken out of it.
type bypass struct {
	vfs.FS
	n *atomic.Int64
}

type bypassFile struct {
	vfs.File
	n *atomic.Int64
}

func (b bypass) OpenFile(name string, flag int, perm fs.FileMode) (vfs.File, error) {
	f, err := b.FS.OpenFile(name, flag, perm)
	return bypassFile{f, b.n}, err
}

func (f bypassFile) WriteDirect(bufs [][]byte, off int64) (int, error) {
	f.n.Add(1)
	return f.WritevAt(bufs, off)
}

func (f bypassFile) DropCache() { f.n.Add(1) }

// TestCachedPut: a large object goes past the page cache, but not one that is likely to be read; a small one never does.
func TestCachedPut(t *testing.T) {
	var n atomic.Int64
	s := mustOpen(t, bypass{vfs.NewMem(1), &n}, "/data/backend")
	defer s.Close()
	large := bytes.Repeat([]byte{7}, directBytes)
	for _, c := range []struct {
		name   string
		ctx    context.Context
		object []byte
		past   bool
	}{
		{"large", t.Context(), large, true},
		{"large-cached", backend.WithCached(t.Context()), large, false},
		{"small", t.Context(), large[1:], false},
	} {
		n.Store(0)
		if err := s.Put(c.ctx, c.name, c.object); err != nil {
			t.Fatal(err)
		}
		if past := n.Load() > 0; past != c.past {
			t.Errorf("%s: past the page cache %v, want %v", c.name, past, c.past)
		}
		o, err := s.Open(t.Context(), c.name)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(c.object))
		if err := o.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, c.object) {
			t.Errorf("%s reads otherwise than it was put: %v", c.name, err)
		}
		if err := o.Close(); err != nil {
			t.Error(err)
		}
	}
}
