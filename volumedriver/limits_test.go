package volumedriver

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver/blockio"
	"varve/volumedriver/qos"
	"varve/volumedriver/vfs"
)

// TestLimits: a volume does what its limits allow, its vPool's gate holds for all, both survive or are set again, and what
// is refused without waiting is not charged.
func TestLimits(t *testing.T) {
	ctx := context.Background()
	mem := vfs.NewMem(1)
	r, err := start(mem, eager, 1<<20, 1)
	must(t, err)
	must(t, r.v.SetLimits(qos.Limits{WriteIOPS: 50, Burst: 20 * time.Millisecond}))
	p := make([]byte, blockSize)
	took := func(n int, do func() error) time.Duration {
		t.Helper()
		began := time.Now()
		for range n {
			must(t, do())
		}
		return time.Since(began)
	}
	write := func() error { return r.v.Write(ctx, p, 0, 0) }
	if d := took(11, write); d < 150*time.Millisecond {
		t.Fatalf("11 writes at 50 a second took %s", d)
	}
	err = nil
	for i := 0; i < 20 && err == nil; i++ { // what one is worth may come meanwhile
		err = r.v.TryWrite(p, 0, 0, &completion{func(error) {}}, 0)
	}
	if !errors.Is(err, blockio.ErrBusy) {
		t.Fatalf("a write beyond the limit that may not wait: %v", err)
	}
	if d := took(100, func() error { return r.v.Read(ctx, p, 0) }); d > 2*time.Second {
		t.Fatalf("100 reads without a limit took %s", d)
	}
	must(t, r.stop())

	r, err = start(mem, eager, 0, 1)
	must(t, err)
	defer func() { must(t, r.stop()) }()
	if l := r.v.Limits(); l.WriteIOPS != 50 {
		t.Fatalf("limits after a restart: %+v", l)
	}
	must(t, r.v.SetLimits(qos.Limits{}))
	if d := took(100, write); d > 2*time.Second {
		t.Fatalf("100 writes without a limit took %s", d)
	}
	other := create(t, r.d, uuid.New(), 1<<20)
	r.d.SetPoolLimits(testPool, qos.Limits{ReadIOPS: 50, Burst: 20 * time.Millisecond})
	both := 0
	if d := took(11, func() error {
		if both++; both%2 == 0 {
			return other.Read(ctx, p, 0)
		}
		return r.v.Read(ctx, p, 0)
	}); d < 150*time.Millisecond {
		t.Fatalf("11 reads of two volumes of a vPool with 50 a second took %s", d)
	}
}
