package vfs

import (
	"bytes"
	"errors"
	"math/bits"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestErrorsReachEveryCall fails each call of a save once, and checks that the save reports it.
func TestErrorsReachEveryCall(t *testing.T) {
	save := func(m FS) error {
		f, err := m.OpenFile("/tmp", os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return err
		}
		_, werr := f.WriteAt([]byte("data"), 0)
		err = errors.Join(werr, f.Sync(), f.Close())
		return errors.Join(err, m.Rename("/tmp", "/final"), m.SyncDir("/"))
	}
	n := int64(1)
	for ; n < 100; n++ {
		e := NewErrors(NewMem(n))
		hit := e.Inject(Fault{From: n, Times: 1, Err: syscall.EIO})
		err := save(e)
		if hit.Fired() == 0 {
			check(t, err)
			break
		}
		if !errors.Is(err, syscall.EIO) {
			t.Errorf("call %d: %v", n, err)
		}
	}
	if n != 7 {
		t.Errorf("the save took %d calls, want 6", n-1)
	}
}

func TestErrorsSpoilReadsAndWrites(t *testing.T) {
	m := NewMem(1)
	e := NewErrors(m)
	f := create(t, e, "/d.dat")
	write(t, f, blocks(2, 7), 0)

	p := make([]byte, memBlock)
	differing := func(p []byte) (n int) {
		for _, v := range p {
			n += bits.OnesCount8(v ^ 7)
		}
		return n
	}
	hit := e.Inject(Fault{Op: OpRead, Path: "*.dat", Flip: true, From: 2, Times: 1})
	for i, want := range []int{0, 1, 0} {
		if _, err := f.ReadAt(p, 0); err != nil || differing(p) != want {
			t.Errorf("read %d: %d bits differ, %v", i, differing(p), err)
		}
	}
	if hit.Seen() != 3 || hit.Fired() != 1 {
		t.Errorf("seen %d, fired %d", hit.Seen(), hit.Fired())
	}
	hit.Remove()

	short := e.Inject(Fault{Op: OpWrite, Err: syscall.ENOSPC, After: 5})
	if n, err := f.WritevAt([][]byte{{1, 1, 1}, {1, 1, 1}}, 0); n != 5 || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("short write: %d, %v", n, err)
	}
	short.Remove()
	if got := contents(t, m, "/d.dat"); !bytes.Equal(got[:7], []byte{1, 1, 1, 1, 1, 7, 7}) {
		t.Errorf("after a short write: %v", got[:7])
	}
	drop := e.Inject(Fault{Op: OpWrite, Drop: true})
	write(t, f, blocks(2, 9), 0)
	drop.Remove()
	shift := e.Inject(Fault{Op: OpWrite, Shift: memBlock})
	write(t, f, []byte{8}, 0)
	shift.Remove()
	if got := contents(t, m, "/d.dat"); got[0] != 1 || got[memBlock] != 8 {
		t.Errorf("after a lost and a misdirected write: %d %d", got[0], got[memBlock])
	}
	done := e.Inject(Fault{Op: OpRename, Err: syscall.EIO, Done: true, Delay: time.Millisecond})
	if err := e.Rename("/d.dat", "/e"); !errors.Is(err, syscall.EIO) || !exists(t, m, "/e") || done.Fired() != 1 {
		t.Errorf("rename that was done and failed: %v", err)
	}
	block := e.Inject(Fault{Op: OpTryRead, Path: "/d.dat", Err: ErrWouldBlock})
	if err := f.TryReadAt(p, 0); err != ErrWouldBlock {
		t.Errorf("try read: %v", err)
	}
	block.Remove()
	check(t, f.TryReadAt(p, 0))
}

func TestErrorsConcurrent(t *testing.T) {
	e := NewErrors(NewMem(1))
	f := create(t, e, "/f")
	hit := e.Inject(Fault{Op: OpWrite, From: 100, Times: 10, Err: syscall.EIO})
	var wg sync.WaitGroup
	var mu sync.Mutex
	failed := 0
	for w := range 4 {
		wg.Go(func() {
			for range 100 {
				if _, err := f.WriteAt([]byte{1}, int64(w)); err != nil {
					mu.Lock()
					failed++
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	if failed != 10 || hit.Seen() != 400 || hit.Fired() != 10 {
		t.Errorf("%d failed, %d seen, %d fired", failed, hit.Seen(), hit.Fired())
	}
}

func TestMatchPath(t *testing.T) {
	for _, c := range []struct {
		pattern, name string
		want          bool
	}{
		{"", "/a/b", true}, {"b", "/a/b", true}, {"a", "/a/b", false}, {"*.log", "/x/1.log", true}, {"/a/*", "/a/b", true},
		{"/a/*", "/a/b/c", false}, {"/a/**", "/a/b/c", true}, {"/a/**", "/a", false}, {"[", "/[", false},
	} {
		if got := matchPath(c.pattern, c.name); got != c.want {
			t.Errorf("matchPath(%q, %q) = %v", c.pattern, c.name, got)
		}
	}
}
