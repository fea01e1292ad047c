package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"varve/test/harness"
	"varve/test/nfsclient"
)

// Names of the servers as they are printed. The NBD peers have those of harness.NBDPeers.
const (
	ours     = "varve"
	qemuWB   = "qemu-nbd writeback"
	qemuNone = "qemu-nbd none"
	kitFile  = "nbdkit file"
	kitMem   = "nbdkit memory"
	nbdSrv   = "nbd-server"
	ganesha  = "nfs-ganesha"
)

const (
	areaBytes = 1 << 30 // what is written and read of every server
	logSize   = "1GiB"
)

// server is what a load runs against: one server process, or several that are measured as one.
type server struct {
	name  string
	node  *harness.Node // ours, else nil
	pids  []int
	uris  []string // NBD exports
	image string   // the file behind uris[0], "" if there is none
	raw   string   // a plain file, for the floor that no server can beat

	nfsAddr, mountAddr string
	fioURL             string // libnfs's form of the NFS export
	export             string
	dirs               map[string]nfsclient.Handle // directories that a load made
}

func (s *server) cpu() time.Duration {
	var sum time.Duration
	for _, pid := range s.pids {
		sum += harness.CPU(pid)
	}
	return sum
}

func (s *server) rss() int64 {
	var sum int64
	for _, pid := range s.pids {
		sum += harness.RSS(pid)
	}
	return sum
}

// pause and resume keep ours from doing anything while a peer is measured.
func pause(n *harness.Node) error  { return signalNode(n, syscall.SIGSTOP) }
func resume(n *harness.Node) error { return signalNode(n, syscall.SIGCONT) }

func signalNode(n *harness.Node, sig syscall.Signal) error {
	if n.Ended() {
		return fmt.Errorf("varve serve ended; it printed:\n%s", n.Log())
	}
	if err := syscall.Kill(n.PID(), sig); err != nil {
		return fmt.Errorf("%s to varve serve: %w", sig, err)
	}
	return nil
}

// startOurs starts an appliance on a fresh data directory below dir.
func startOurs(dir string) (*harness.Node, error) {
	n, err := harness.NewNode(filepath.Join(dir, "varve"), "--log-size", logSize)
	if err != nil {
		return nil, err
	}
	return n, n.Start()
}

// stopOurs wakes the appliance and stops it; that it ends well is part of the measurement's success.
func stopOurs(n *harness.Node) error {
	return errors.Join(resume(n), n.Stop())
}

// peerDir keeps what the i-th peer that started writes.
func peerDir(dir string, i int) string { return filepath.Join(dir, fmt.Sprintf("peer-%d", i)) }

// startPeers starts NBD peers one after the other; one that does not start is left out and named in the error.
func startPeers(names []string, dir string, size int64) (peers []*harness.Peer, err error) {
	for _, name := range names {
		sub := peerDir(dir, len(peers))
		if merr := os.MkdirAll(sub, 0o755); merr != nil {
			return peers, errors.Join(err, merr)
		}
		p, perr := harness.StartNBD(name, sub, size)
		if perr != nil {
			err = errors.Join(err, perr)
			continue
		}
		peers = append(peers, p)
	}
	return peers, err
}

func stopPeers(peers []*harness.Peer) {
	var wg sync.WaitGroup
	for _, p := range peers {
		wg.Go(p.Stop)
	}
	wg.Wait()
}

const (
	quietStep = 150 * time.Millisecond
	quietMax  = 10 * time.Second
)

// quiesce waits until the server uses next to no processor time, so that it has worked off what it destages at once.
// It gives the processor time that took.
func quiesce(ctx context.Context, s *server) time.Duration {
	start := s.cpu()
	last := start
	for deadline := time.Now().Add(quietMax); time.Now().Before(deadline) && ctx.Err() == nil; {
		time.Sleep(quietStep)
		now := s.cpu()
		if now-last <= 10*time.Millisecond { // one tick of the clock that /proc counts with
			return now - start
		}
		last = now
	}
	return last - start
}
