package exports

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"

	"varve/control/peer"
	"varve/control/properties"
	"varve/control/state"
	"varve/control/vdisk"
)

// A node that has lost its power answers nothing: what it said last is shown with its time, and a list of its volumes waits for nobody.
func TestSilentNodeIsShownAsItWas(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		node := uuid.New()
		peers := peer.New(peer.Config{Self: node}) // its handlers stand for the other node's
		r := NewDistant(state.New(), uuid.New(), peers, silence)
		cache, err := properties.New([]properties.Property{r.Property()}, nil, silence)
		if err != nil {
			t.Fatal(err)
		}
		r.Use(cache)
		ids := make([]uuid.UUID, 1000)
		for i := range ids {
			ids[i] = uuid.New()
		}
		silent := make(chan struct{})
		peers.Handle(callInfos, 16, func(ctx context.Context, _ []byte) (any, error) {
			select {
			case <-silent:
				<-ctx.Done()
				return nil, ctx.Err()
			default:
			}
			out := make(map[uuid.UUID]RemoteInfo)
			for _, id := range ids {
				out[id] = RemoteInfo{Info: vdisk.Info{Size: 1 << 30, Used: 7 << 20, Pending: 3}, Known: true, Clients: 2, Ledger: vdisk.Ledger{UnbackedBytes: 3}}
			}
			return out, nil
		})
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- cache.Run(ctx) }()
		if i, fresh := r.Told(node, ids[0]); !fresh || !i.AsOf.IsZero() || i.Used != 7<<20 || i.Clients != 2 || i.Ledger.UnbackedBytes != 3 || !i.Known {
			t.Errorf("while it answers: %+v %t", i, fresh)
		}
		close(silent)
		said := time.Now()
		time.Sleep(10 * time.Minute) // nobody looks, so nobody asks
		began := time.Now()
		for round := range 3 {
			for _, id := range ids {
				i, fresh := r.Told(node, id)
				if fresh || i.Used != 7<<20 || i.Size != 1<<30 || !i.Known || i.AsOf.Sub(said).Abs() > 2*infoEvery {
					t.Fatalf("round %d, ten minutes later: %+v %t", round, i, fresh)
				}
			}
			if took := time.Since(began); took > 2*time.Second {
				t.Errorf("round %d: %s for a list", round, took)
			}
			time.Sleep(infoWait)
			began = time.Now()
		}
		if i, fresh := r.Told(node, uuid.New()); fresh || i.Known {
			t.Errorf("a volume that it never told of: %+v", i)
		}
		cancel()
		<-ended
	})
}
