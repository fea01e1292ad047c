package volumedriver

import (
	"context"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"varve/volumedriver/backend/backendtest"
	"varve/volumedriver/vfs"
)

// TestHogLeavesOthersTheirShareOfTheLog: while the log is paced because a backend is slow, a volume that writes a block now and then does
// not wait behind the many large writes of another.
func TestHogLeavesOthersTheirShareOfTheLog(t *testing.T) {
	if testing.Short() {
		t.Skip("compares times")
	}
	fault := backendtest.NewFault(backendtest.NewMem())
	fault.Add(backendtest.Spoil{Op: backendtest.OpPut, Delay: 40 * time.Millisecond})
	s := shape{log: 256 << 20, seg: 8 << 20, mapBudget: 8 << 20, sco: 2 << 20, cp: 256 << 20, sealAge: 10 * time.Millisecond}
	d := startOn(t, vfs.NewMem(1), s, fault, 10*time.Second)
	hog, small := create(t, d, uuid.New(), 64<<20), create(t, d, uuid.New(), 1<<20)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var wg sync.WaitGroup
	var mu sync.Mutex
	var large []time.Duration
	for w := range 32 {
		wg.Go(func() {
			p := make([]byte, 1<<20)
			for i := 0; ctx.Err() == nil; i++ {
				began := time.Now()
				if err := hog.Write(ctx, p, int64(w*2+i%2)<<20, 0); err != nil && ctx.Err() == nil {
					t.Error(err)
				} else if d.pace.over() && err == nil {
					mu.Lock()
					large = append(large, time.Since(began))
					mu.Unlock()
				}
			}
		})
	}
	for !d.pace.over() && ctx.Err() == nil {
		time.Sleep(time.Millisecond)
	}
	const enough = 60 // of each
	var waits []time.Duration
	some := func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(waits) >= enough && len(large) >= enough
	}
	for ctx.Err() == nil && !some() {
		began := time.Now()
		if err := small.Write(ctx, block(1), 0, 0); err == nil {
			waits = append(waits, time.Since(began))
		}
		time.Sleep(5 * time.Millisecond)
	}
	cancel()
	wg.Wait()
	if len(waits) < 10 || len(large) < 10 {
		t.Fatalf("%d small and %d large writes at a paced log", len(waits), len(large))
	}
	slices.Sort(waits)
	slices.Sort(large)
	// In one queue with the large ones they would take as long as those.
	if p50, hogs := waits[len(waits)/2], large[len(large)/2]; p50 > hogs/4 {
		t.Errorf("half of the small writes took %v and more, half of the large ones %v", p50, hogs)
	}
	t.Logf("%d small writes beside %d large ones at a paced log: p50 %v beside %v, p99 %v", len(waits), len(large), waits[len(waits)/2],
		large[len(large)/2], waits[len(waits)*99/100])
}
