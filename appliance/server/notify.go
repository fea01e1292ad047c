package server

import (
	"context"
	"log/slog"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// tell sends a state to the service manager. Without one it does nothing.
func tell(log *slog.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.Warn("service manager not told", "state", state, "err", err)
	}
}

// watchdog ticks while alive says that the data path answers. Where it does not, nothing is sent and the service manager
// ends the process, which is the only cure for a sync that hangs in the kernel.
func watchdog(ctx context.Context, log *slog.Logger, alive func(context.Context) error) error {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		log.Warn("watchdog setting cannot be read", "err", err)
	}
	if err != nil || interval <= 0 {
		<-ctx.Done()
		return nil
	}
	return tick(ctx, interval/3, func() {
		check, cancel := context.WithTimeout(ctx, interval/3)
		defer cancel()
		if err := alive(check); err != nil {
			if ctx.Err() == nil {
				log.Error("data path does not answer, watchdog is not told", "err", err)
			}
			return
		}
		tell(log, daemon.SdNotifyWatchdog)
	})
}

// tick calls f now and then every interval until ctx ends.
func tick(ctx context.Context, interval time.Duration, f func()) error {
	t := time.NewTicker(interval)
	defer t.Stop()
	for {
		f()
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}
