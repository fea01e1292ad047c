package volumedriver

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver/seal"
	"varve/volumedriver/vfs"
)

// TestKeysOfPoolChange: a vPool gets another key encryption key and its volumes other keys. Then the former one is needed no more: not after
// a restart, and not for a rebuild from the backend alone; what was written before and after is there.
func TestKeysOfPoolChange(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	former, err := seal.NewKEK()
	must(t, err)
	next, err := seal.NewKEK()
	must(t, err)
	mem := vfs.NewMem(1)
	open := func(kek *seal.KEK, old ...*seal.KEK) *small {
		x, err := openSmall(mem, true)
		must(t, err)
		x.d.SetPoolOptions(testPool, PoolOptions{Encrypt: true, KEK: kek, OldKEKs: old})
		return x
	}
	x := open(former)
	ids := []uuid.UUID{testVolume, cloneID}
	for i, id := range ids {
		v := create(t, x.d, id, 8*blockSize)
		must(t, v.Write(ctx, fill(4, uint64(i+1)), 0, 0))
	}
	must(t, x.d.Drain(ctx))

	x.d.SetPoolOptions(testPool, PoolOptions{Encrypt: true, KEK: next, OldKEKs: []*seal.KEK{former}})
	must(t, x.d.RewrapKeys(ctx, testPool))
	var done int64
	must(t, x.d.RotateKeys(ctx, testPool, func(n, total int64) { done = n }))
	if done != int64(len(ids)) {
		t.Errorf("%d volumes have other keys", done)
	}
	for _, id := range ids {
		v, err := x.d.Volume(ctx, id)
		must(t, err)
		if n := len(v.root.Keys); n != 2 {
			t.Errorf("volume %s has %d keys", id, n)
		}
		must(t, v.Write(ctx, fill(2, 9), 4*blockSize, 0))
	}
	check := func(x *small) {
		t.Helper()
		for i, id := range ids {
			v, err := x.d.Volume(ctx, id)
			must(t, err)
			got, err := contentOf(v.Size(), func(p []byte) error { return v.Read(ctx, p, 0) })
			if want := []string{"11119900", "22229900"}[i]; err != nil || got != want {
				t.Errorf("volume %s reads %q (%v), want %s", id, got, err, want)
			}
		}
	}
	must(t, x.stop())
	x = open(next) // with something in the log under the new keys
	check(x)
	must(t, x.d.Drain(ctx))
	must(t, x.stop())

	must(t, mem.RemoveAll("/data"))
	x = open(next)
	got, err := x.d.Rebuild(ctx, testPool)
	must(t, err)
	for _, r := range got {
		must(t, r.Err)
	}
	check(x)
	must(t, x.stop())

	must(t, mem.RemoveAll("/data"))
	x = open(former)
	if got, err := x.d.Rebuild(ctx, testPool); err != nil || len(got) != 2 || !errors.Is(got[0].Err, seal.ErrNoKey) || !errors.Is(got[1].Err, seal.ErrNoKey) {
		t.Errorf("with the former key alone a rebuild gives %v, %v", got, err)
	}
	must(t, x.stop())
}
