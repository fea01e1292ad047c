package nbd

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"runtime/pprof"
	"syscall"
	"testing"

	"go.uber.org/goleak"
)

// TestMain is also a server of its own process, for measuring: with VARVE_NBD_SERVE=ADDRESS in its environment the test
// binary serves the export "d", 4 GiB of memory, until it gets SIGTERM. A path is a unix socket. VARVE_NBD_PROFILE
// names a file for a CPU profile.
func TestMain(m *testing.M) {
	if addr := os.Getenv("VARVE_NBD_SERVE"); addr != "" {
		if err := serveMemory(addr); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

func serveMemory(addr string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	network := "tcp"
	if addr[0] == '/' {
		network = "unix"
	}
	l, err := net.Listen(network, addr)
	if err != nil {
		return err
	}
	if path := os.Getenv("VARVE_NBD_PROFILE"); path != "" {
		f, err := os.Create(path)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	d := newMemory(4 << 30)
	return New(Config{Exports: newExports(map[string]Device{"d": d, "other": newMemory(1 << 30)})}).Run(ctx, l)
}
