package vfs

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TestWriteDirect: what is written past the page cache is what WritevAt would have written, whatever the pieces' sizes and
// addresses, on a file system that knows direct writes and on one that may not; and the descriptor is as before.
func TestWriteDirect(t *testing.T) {
	dirs := []string{t.TempDir()}
	if shm, err := os.MkdirTemp("/dev/shm", "varve-direct"); err == nil {
		t.Cleanup(func() { os.RemoveAll(shm) })
		dirs = append(dirs, shm)
	}
	if p := bounces.Get().(*[bounceBytes]byte); uintptr(unsafe.Pointer(p))%directAlign != 0 {
		t.Fatal("the allocator does not align what is bounced")
	}
	rng := rand.New(rand.NewPCG(1, 2))
	random := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		return b
	}
	const mib = 1 << 20
	for _, dir := range dirs {
		for i, parts := range [][][]byte{
			{},
			{random(100)},
			{random(4096)},
			{random(8192), random(2 * mib), random(777)},        // an object as the builder makes it
			{random(1000), random(mib + 5), nil, random(40000)}, // nothing is aligned
			{random(3*mib + 4097)[1:], random(4095), random(1)},
			{random(bounceBytes - 1), random(1), random(bounceBytes)},
		} {
			f := create(t, OS(), fmt.Sprintf("%s/f%d", dir, i))
			want := bytes.Join(parts, nil)
			off := int64(i%3) * 4096
			if i == 4 {
				off = 512
			}
			n, err := f.(DirectWriter).WriteDirect(parts, off)
			if err != nil || n != len(want) {
				t.Fatalf("case %d in %s: wrote %d of %d: %v", i, dir, n, len(want), err)
			}
			check(t, f.Sync())
			got := make([]byte, len(want))
			if len(want) > 0 {
				if _, err := f.ReadAt(got, off); err != nil || !bytes.Equal(got, want) {
					t.Errorf("case %d in %s: other bytes, %v", i, dir, err)
				}
			}
			if size, err := f.Size(); err != nil || len(want) > 0 && size != off+int64(len(want)) {
				t.Errorf("case %d in %s: %d bytes long, %v", i, dir, size, err)
			}
			flags, err := unix.FcntlInt(uintptr(f.(*osFile).fd), syscall.F_GETFL, 0)
			if err != nil || flags&unix.O_DIRECT != 0 {
				t.Errorf("case %d in %s: the descriptor's flags are %#x, %v", i, dir, flags, err)
			}
			check(t, f.Close())
			if _, err := f.(DirectWriter).WriteDirect(parts, off); err == nil {
				t.Errorf("case %d in %s: a closed file was written", i, dir)
			}
		}
	}
}
