// Package backendtest holds what every backend is held to, and two backends for tests of those who use one: Mem keeps objects
// in memory, Fault spoils calls to another backend.
package backendtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"varve/volumedriver/backend"
	"varve/volumedriver/vfs"
)

// Run holds the backends that fresh gives to the contract of package backend. Each must be empty; Run closes it.
func Run(t *testing.T, fresh func(*testing.T) backend.Backend) {
	for name, test := range map[string]func(*testing.T, backend.Backend){
		"PutAndRead":     putAndRead,
		"Empty":          emptyObject,
		"Big":            bigObject,
		"Absent":         absentObject,
		"CreateOnly":     createOnly,
		"WholeOrNot":     wholeOrNot,
		"OutOfRange":     outOfRange,
		"ListPages":      listPages,
		"ListWhileDoing": listWhileDoing,
		"Delete":         deleteObject,
		"Names":          names,
		"Cancelled":      cancelled,
		"Concurrent":     concurrent,
		"OpenOutlives":   openOutlives,
		"Space":          space,
	} {
		t.Run(name, func(t *testing.T) {
			b := fresh(t)
			test(t, b)
			check(t, b.Close())
		})
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// pattern gives n bytes that depend on the seed.
func pattern(seed uint64, n int) []byte {
	p := make([]byte, n)
	rnd := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)})
	_, _ = rnd.Read(p)
	return p
}

// read gives an object's bytes.
func read(ctx context.Context, b backend.Backend, name string) ([]byte, error) {
	o, err := b.Open(ctx, name)
	if err != nil {
		return nil, err
	}
	p := make([]byte, o.Size())
	return p, errors.Join(o.ReadAt(ctx, p, 0), o.Close())
}

func wantObject(t *testing.T, b backend.Backend, name string, want []byte) {
	t.Helper()
	got, err := read(t.Context(), b, name)
	check(t, err)
	if !bytes.Equal(got, want) {
		t.Fatalf("object %s has other bytes than were put (%d, want %d)", name, len(got), len(want))
	}
	info, err := b.Stat(t.Context(), name)
	check(t, err)
	if info.Name != name || info.Size != int64(len(want)) {
		t.Fatalf("stat gives %+v for %s of %d bytes", info, name, len(want))
	}
}

func putAndRead(t *testing.T, b backend.Backend) {
	ctx, want := t.Context(), pattern(1, 100_000)
	check(t, b.Put(ctx, "v/one/a-1.0_x", want[:1], nil, want[1:70_000], want[70_000:]))
	wantObject(t, b, "v/one/a-1.0_x", want)
	o, err := b.Open(ctx, "v/one/a-1.0_x")
	check(t, err)
	for _, r := range [][2]int{{0, 1}, {99_999, 1}, {4095, 4098}, {50_000, 0}, {100_000, 0}, {0, 100_000}} {
		p := make([]byte, r[1])
		check(t, o.ReadAt(ctx, p, int64(r[0])))
		if !bytes.Equal(p, want[r[0]:r[0]+r[1]]) {
			t.Errorf("bytes %d+%d differ", r[0], r[1])
		}
		p = make([]byte, r[1])
		if err := o.TryReadAt(p, int64(r[0])); err == nil && !bytes.Equal(p, want[r[0]:r[0]+r[1]]) {
			t.Errorf("bytes %d+%d differ when tried", r[0], r[1])
		} else if err != nil && !errors.Is(err, vfs.ErrWouldBlock) {
			t.Error(err)
		}
	}
	check(t, o.Close())
}

func emptyObject(t *testing.T, b backend.Backend) {
	check(t, b.Put(t.Context(), "none"))
	check(t, b.Put(t.Context(), "nil", nil, []byte{}))
	wantObject(t, b, "none", nil)
	wantObject(t, b, "nil", nil)
	if err := b.Put(t.Context(), "none", []byte("x")); !errors.Is(err, backend.ErrExist) {
		t.Errorf("put over an empty object: %v", err)
	}
}

func bigObject(t *testing.T, b backend.Backend) {
	want := pattern(2, 32<<20)
	var parts [][]byte
	for p := range slices.Chunk(want, 20_000) { // more parts than one system call takes
		parts = append(parts, p)
	}
	check(t, b.Put(t.Context(), "big", parts...))
	wantObject(t, b, "big", want)
}

func absentObject(t *testing.T, b backend.Backend) {
	check(t, b.Put(t.Context(), "d/x", []byte("x")))
	for _, name := range []string{"none", "d", "d/y", "d/x/y", "e/f/g"} {
		if _, err := b.Open(t.Context(), name); !errors.Is(err, backend.ErrNotExist) {
			t.Errorf("open %s: %v", name, err)
		}
		if _, err := b.Stat(t.Context(), name); !errors.Is(err, backend.ErrNotExist) {
			t.Errorf("stat %s: %v", name, err)
		}
	}
}

// createOnly lets 16 race for each name; one wins, and its bytes are there.
func createOnly(t *testing.T, b backend.Backend) {
	const racers = 16
	for round := range 5 {
		name := fmt.Sprintf("v/%d/race", round)
		var wg sync.WaitGroup
		var winners atomic.Int64
		winner := -1
		for r := range racers {
			wg.Go(func() {
				err := b.Put(t.Context(), name, pattern(uint64(r), 10_000+r))
				switch {
				case err == nil:
					winners.Add(1)
					winner = r
				case !errors.Is(err, backend.ErrExist):
					t.Errorf("racer %d: %v", r, err)
				}
			})
		}
		wg.Wait()
		if winners.Load() != 1 {
			t.Fatalf("%d of %d racing puts say that they made the object", winners.Load(), racers)
		}
		want := pattern(uint64(winner), 10_000+winner)
		wantObject(t, b, name, want)
		if err := b.Put(t.Context(), name, []byte("late")); !errors.Is(err, backend.ErrExist) {
			t.Errorf("late put: %v", err)
		}
		wantObject(t, b, name, want)
	}
}

// wholeOrNot opens objects while they are being put.
func wholeOrNot(t *testing.T, b backend.Backend) {
	const objects, size = 30, 300_000
	var wg sync.WaitGroup
	var done atomic.Bool
	name := func(i int) string { return fmt.Sprintf("whole/%d", i) }
	wg.Go(func() {
		defer done.Store(true)
		for i := range objects {
			if err := b.Put(t.Context(), name(i), pattern(uint64(i), size)); err != nil {
				t.Error(err)
			}
		}
	})
	for i := 0; i < objects; {
		last := done.Load()
		p, err := read(t.Context(), b, name(i))
		switch {
		case errors.Is(err, backend.ErrNotExist) && !last:
			continue
		case err != nil:
			t.Error(err)
		case !bytes.Equal(p, pattern(uint64(i), size)):
			t.Errorf("object %d was seen with %d of %d bytes", i, len(p), size)
		}
		i++
	}
	wg.Wait()
}

func outOfRange(t *testing.T, b backend.Backend) {
	check(t, b.Put(t.Context(), "o", make([]byte, 5000)))
	o, err := b.Open(t.Context(), "o")
	check(t, err)
	for _, r := range [][2]int64{{5000, 1}, {4999, 2}, {0, 5001}, {-1, 1}, {1 << 62, 1}, {5001, 0}} {
		p := make([]byte, r[1])
		if o.ReadAt(t.Context(), p, r[0]) == nil {
			t.Errorf("a read of %d+%d of 5000 bytes succeeded", r[0], r[1])
		}
		if o.TryReadAt(p, r[0]) == nil {
			t.Errorf("a tried read of %d+%d of 5000 bytes succeeded", r[0], r[1])
		}
	}
	check(t, o.Close())
}

func listPages(t *testing.T, b backend.Backend) {
	all := []string{"a-b/x", "a.b", "a/1", "a/2/3", "a/2-3", "a0", "b",
		"v/1/00/1-1-0", "v/1/00/1-10-0", "v/1/00/1-2-0", "v/1/01/1-3-0", "v/10/00/1-1-0", "v/2/00/1-1-0", "w-/_", "w", "x.y/z"}
	for i, name := range all {
		check(t, b.Put(t.Context(), name, make([]byte, i)))
	}
	prefixes := []string{"", "a", "a/", "a/2", "a-", "v/", "v/1", "v/1/", "v/1/00/1-", "v/1/00/1-1", "w", "z", "v/3/", "b", "b/",
		"/", "../", "A"}
	afters := []string{"", "a", "a.b", "a/2", "a/2/3", "b", "v", "v/1/00/1-10-0", "v/1/00", "v/1/00/", "zz", "w"}
	for _, prefix := range prefixes {
		for _, after := range afters {
			var want []string
			for _, name := range all {
				if strings.HasPrefix(name, prefix) && name > after {
					want = append(want, name)
				}
			}
			slices.Sort(want)
			for _, max := range []int{1, 3, 1000} {
				got, at := []string(nil), after
				for {
					page, err := b.List(t.Context(), prefix, at, max)
					check(t, err)
					if len(page) == 0 {
						break
					}
					if len(page) > max {
						t.Fatalf("list %q after %q gives %d objects, more than %d", prefix, at, len(page), max)
					}
					for _, info := range page {
						if all[info.Size] != info.Name {
							t.Errorf("list gives size %d for %s", info.Size, info.Name)
						}
						got = append(got, info.Name)
					}
					at = got[len(got)-1]
				}
				if !slices.Equal(got, want) {
					t.Errorf("list %q after %q by %d: %q, want %q", prefix, after, max, got, want)
				}
			}
		}
	}
	if got, err := b.List(t.Context(), "", "", 0); err != nil || len(got) != 0 {
		t.Errorf("list of at most none: %v, %v", got, err)
	}
}

// listWhileDoing lists while objects come and go; those that stay must all be seen.
func listWhileDoing(t *testing.T, b backend.Backend) {
	const stay = 40
	for i := range stay {
		check(t, b.Put(t.Context(), fmt.Sprintf("l/%02d/stay", i)))
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := range 80 {
			name := fmt.Sprintf("l/%02d/go", i%stay)
			if err := errors.Join(b.Put(t.Context(), name), b.Delete(t.Context(), name)); err != nil {
				t.Error(err)
			}
		}
	})
	for range 20 {
		infos, err := b.List(t.Context(), "l/", "", 10*stay)
		check(t, err)
		seen := 0
		for _, info := range infos {
			if strings.HasSuffix(info.Name, "/stay") {
				seen++
			}
		}
		if seen != stay {
			t.Errorf("a list saw %d of %d objects that stay", seen, stay)
		}
	}
	wg.Wait()
}

func deleteObject(t *testing.T, b backend.Backend) {
	ctx := t.Context()
	check(t, b.Put(ctx, "d/e/x", []byte("1")))
	check(t, b.Put(ctx, "d/e/y", []byte("2")))
	for range 2 {
		check(t, b.Delete(ctx, "d/e/x"))
	}
	check(t, b.Delete(ctx, "no/such/object"))
	check(t, b.Delete(ctx, "d/e")) // no object
	if _, err := b.Stat(ctx, "d/e/x"); !errors.Is(err, backend.ErrNotExist) {
		t.Errorf("stat of a deleted object: %v", err)
	}
	wantObject(t, b, "d/e/y", []byte("2"))
	check(t, b.Delete(ctx, "d/e/y"))
	if infos, err := b.List(ctx, "", "", 10); err != nil || len(infos) != 0 {
		t.Errorf("list after all is deleted: %v, %v", infos, err)
	}
	check(t, b.Put(ctx, "d/e/x", []byte("3")))
	wantObject(t, b, "d/e/x", []byte("3"))
	check(t, b.Delete(ctx, "d/e/x"))
	check(t, b.Put(ctx, "d", []byte("4"))) // what was a prefix may be a name now
	wantObject(t, b, "d", []byte("4"))
}

func names(t *testing.T, b backend.Backend) {
	ctx := t.Context()
	long := strings.Repeat("abcdefghi/", 20)
	for _, name := range []string{"a", "0", "b/b-c_d.e/f", "...", "a..b", ".a", long[:199] + "x"} {
		check(t, b.Put(ctx, name, []byte(name)))
		wantObject(t, b, name, []byte(name))
	}
	for _, name := range []string{"", ".", "..", "/", "/x", "x/", "x//y", "../x", "x/../y", "x/./y", "x/..", "X", "x y", "x\x00",
		"x\n", "é", "x\\y", "x:y", long + "x"} {
		if b.Put(ctx, name, nil) == nil {
			t.Errorf("put %q succeeded", name)
		}
		if _, err := b.Open(ctx, name); err == nil {
			t.Errorf("open %q succeeded", name)
		}
		if _, err := b.Stat(ctx, name); err == nil {
			t.Errorf("stat %q succeeded", name)
		}
		if b.Delete(ctx, name) == nil {
			t.Errorf("delete %q succeeded", name)
		}
	}
}

func cancelled(t *testing.T, b backend.Backend) {
	check(t, b.Put(t.Context(), "x", []byte("x")))
	o, err := b.Open(t.Context(), "x")
	check(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, oerr := b.Open(ctx, "x")
	_, serr := b.Stat(ctx, "x")
	_, lerr := b.List(ctx, "", "", 1)
	_, _, perr := b.Space(ctx)
	for what, err := range map[string]error{"put": b.Put(ctx, "y"), "open": oerr, "stat": serr, "list": lerr, "space": perr,
		"delete": b.Delete(ctx, "x"), "read": o.ReadAt(ctx, make([]byte, 1), 0)} {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s with a cancelled context: %v", what, err)
		}
	}
	check(t, o.Close())
	wantObject(t, b, "x", []byte("x"))
	if _, err := b.Stat(t.Context(), "y"); !errors.Is(err, backend.ErrNotExist) {
		t.Errorf("a cancelled put made its object: %v", err)
	}
}

func concurrent(t *testing.T, b backend.Backend) {
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := range 15 {
				name := fmt.Sprintf("c/%d/%d/%d", i%2, w, i)
				want := pattern(uint64(w*100+i), 5000)
				if err := b.Put(t.Context(), name, want); err != nil {
					t.Error(err)
				}
				if got, err := read(t.Context(), b, name); err != nil || !bytes.Equal(got, want) {
					t.Errorf("read %s: %v", name, err)
				}
				if i%3 == 0 {
					if err := b.Delete(t.Context(), name); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	infos, err := b.List(t.Context(), "c/", "", 1000)
	check(t, err)
	if len(infos) != 8*10 {
		t.Errorf("%d objects are left, want %d", len(infos), 8*10)
	}
	o, err := b.Open(t.Context(), infos[0].Name)
	check(t, err)
	for range 4 {
		wg.Go(func() {
			for i := range 50 {
				if err := o.ReadAt(t.Context(), make([]byte, 100), int64(i)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	check(t, o.Close())
}

// openOutlives reads an object that is deleted after it was opened: its bytes, or an error, but nothing else.
func openOutlives(t *testing.T, b backend.Backend) {
	want := pattern(9, 20_000)
	check(t, b.Put(t.Context(), "gone/x", want))
	o, err := b.Open(t.Context(), "gone/x")
	check(t, err)
	check(t, b.Delete(t.Context(), "gone/x"))
	p := make([]byte, len(want))
	if err := o.ReadAt(t.Context(), p, 0); err == nil && !bytes.Equal(p, want) {
		t.Error("other bytes were read from a deleted object")
	}
	check(t, o.Close())
}

func space(t *testing.T, b backend.Backend) {
	total, available, err := b.Space(t.Context())
	if err != nil || available > total {
		t.Errorf("%d of %d bytes are available, %v", available, total, err)
	}
}
