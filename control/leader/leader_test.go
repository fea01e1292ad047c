package leader_test

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"varve/control/leader"
)

type fake struct{ leads, broken atomic.Bool }

func (f *fake) IsLeader() bool { return f.leads.Load() }

func (f *fake) Sync(context.Context) error {
	if f.broken.Load() {
		return errors.New("no quorum")
	}
	return nil
}

func TestDuties(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var running, started atomic.Int32
		var fail atomic.Bool
		l := &fake{}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		duty := leader.Duty{Name: "x", Run: func(ctx context.Context) error {
			started.Add(1)
			running.Add(1)
			defer running.Add(-1)
			if fail.CompareAndSwap(true, false) {
				return errors.New("broken")
			}
			<-ctx.Done()
			return nil
		}}
		go func() { done <- leader.Run(ctx, l, slog.New(slog.DiscardHandler), duty, duty) }()
		expect := func(what string, want int32) {
			t.Helper()
			time.Sleep(time.Second)
			if got := running.Load(); got != want {
				t.Errorf("%s: %d duties run, want %d", what, got, want)
			}
		}
		expect("before", 0)
		l.broken.Store(true)
		l.leads.Store(true)
		expect("leads but is not up to date", 0)
		l.broken.Store(false)
		time.Sleep(10 * time.Second)
		expect("leads", 2)
		l.leads.Store(false)
		expect("leads no more", 0)
		fail.Store(true)
		l.leads.Store(true)
		expect("one has failed", 0)
		time.Sleep(10 * time.Second)
		expect("and begins anew", 2)
		cancel()
		if err := <-done; err != nil || running.Load() != 0 || started.Load() != 6 {
			t.Errorf("%v, %d run, %d started", err, running.Load(), started.Load())
		}
	})
}
