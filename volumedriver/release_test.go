package volumedriver

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver/vfs"
)

// A snapshot is given back in the very moment in which the map makes a younger one a generation: what that one holds is no
// garbage, neither then nor after the volume was written over and frozen again.
func TestReleaseDuringFreeze(t *testing.T) {
	const rounds, blocks = 8, 16
	ctx := context.Background()
	mem := vfs.NewMem(1)
	x, err := openSmall(mem, true)
	must(t, err)
	v, err := x.d.Create(ctx, Spec{ID: testVolume, Pool: testPool, Epoch: 1, Size: blocks * blockSize, PoolName: "default", Path: "disk.raw", Kind: "disk"})
	must(t, err)
	var freezing atomic.Pointer[chan struct{}] // closed when the map syncs, which takes a while then
	mem.OnCall(func(c vfs.Call) {
		if c.Op&(vfs.OpSync|vfs.OpDatasync) != 0 && strings.HasPrefix(c.Path, "/data/map") {
			if p := freezing.Swap(nil); p != nil {
				close(*p)
				time.Sleep(20 * time.Millisecond)
			}
		}
	})
	value := uint64(0)
	take := func() uuid.UUID {
		value++
		must(t, v.Write(ctx, fill(blocks, value), 0, 0))
		s := SnapshotSpec{ID: uuid.New(), Name: uuid.NewString()}
		_, err := v.Snapshot(ctx, s)
		must(t, err)
		return s.ID
	}
	caught := 0
	for round := 0; caught < rounds && round < 50*rounds; round++ {
		old := take()
		must(t, x.d.Drain(ctx))
		young, want := take(), value
		// DeleteSnapshot, but for the record in the map, whose sync would be taken for the freeze
		v.snapping.Lock()
		s, err := v.findSnapshot(old)
		must(t, err)
		v.mu.Lock()
		v.snaps = slices.DeleteFunc(v.snaps, func(o *snapshot) bool { return o.ID == old })
		v.mu.Unlock()
		began := make(chan struct{})
		freezing.Store(&began)
		drained := make(chan error, 1)
		go func() { drained <- x.d.Drain(ctx) }()
		select {
		case <-began:
			caught++
			must(t, v.release(s.point()))
			must(t, <-drained)
		case err := <-drained: // it was frozen already
			freezing.Store(nil)
			must(t, err)
			must(t, v.release(s.point()))
		}
		must(t, x.d.maps.Update(nil, [][]byte{snapshotKey(v.id, old)}))
		v.snapping.Unlock()

		next := take() // what is no use for the head any more goes when the next snapshot does
		must(t, x.d.Drain(ctx))
		last := take()
		must(t, x.d.Drain(ctx))
		must(t, v.DeleteSnapshot(ctx, next))
		r, err := x.d.OpenSnapshot(ctx, v.ID(), young)
		must(t, err)
		p := make([]byte, blocks*blockSize)
		must(t, r.Read(ctx, p, 0))
		for i := range blocks {
			if got, err := valueOf(p[i*blockSize : (i+1)*blockSize]); err != nil || got != want {
				t.Fatalf("round %d: block %d of the younger snapshot holds %#x (%v), want %#x", round, i, got, err, want)
			}
		}
		must(t, r.Close())
		must(t, v.DeleteSnapshot(ctx, young))
		must(t, v.DeleteSnapshot(ctx, last))
	}
	must(t, x.stop())
	if caught == 0 {
		t.Fatal("never in the moment of a freeze")
	}
	fmt.Printf("» a snapshot given back %d times while the map froze a younger one: nothing lost\n", caught)
}
