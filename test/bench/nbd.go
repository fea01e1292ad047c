package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"varve/test/harness"
)

// The pseudo servers of G1 and G4.
const (
	floorName    = "append+fdatasync"
	oneVolume    = "varve, one volume"
	manyQemuWB   = "32 x " + qemuWB
	manyQemuNone = "32 x " + qemuNone
	manyVolumes  = 32
	manyBytes    = 16 << 20 // of each of the many
)

var (
	qemus     = []string{qemuWB, qemuNone}
	withFiles = []string{qemuWB, qemuNone, kitFile, nbdSrv}
)

// nbdRun measures G1 to G8.
func nbdRun(ctx context.Context, r *recorder, dir string) (err error) {
	loads := slices.DeleteFunc(nbdLoads(r.settings), func(l load) bool { return !r.settings.wantsRow(l.row) })
	if len(loads) == 0 {
		return nil
	}
	node, err := startOurs(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopOurs(node)) }()
	if _, err := node.CLI("vdisk", "create", "default/bench", "--size", fmt.Sprint(areaBytes)); err != nil {
		return err
	}
	servers := []*server{{name: ours, node: node, pids: []int{node.PID()}, uris: []string{node.NBD("bench")}}}
	names := slices.DeleteFunc(slices.Clone(harness.NBDPeers), func(p string) bool { return p == nbdSrv || !r.settings.wantsPeer(p) })
	peers, err := startPeers(names, dir, areaBytes)
	defer stopPeers(peers)
	for i, p := range peers {
		image, _ := filepath.Glob(filepath.Join(peerDir(dir, i), "*.img")) // none: in memory
		servers = append(servers, &server{name: p.Name, pids: []int{p.PID()}, uris: []string{p.URI}, image: strings.Join(image, "")})
	}
	if r.settings.wantsPeer(nbdSrv) {
		image := filepath.Join(dir, "nbd-server.img")
		if ierr := sparse(image, areaBytes); ierr != nil {
			return errors.Join(err, ierr)
		}
		s, stop, serr := startNBDServer(image, "")
		if serr == nil {
			defer stop()
			servers = append(servers, s)
		}
		err = errors.Join(err, serr)
	}
	servers, aerr := age(ctx, servers, ageNBD)
	err = errors.Join(err, aerr)
	if perr := pause(node); perr != nil {
		return errors.Join(err, perr)
	}
	floor := &server{name: floorName, raw: filepath.Join(dir, "floor")}
	for _, l := range loads {
		switch {
		case ctx.Err() != nil:
		case l.row == "G4":
			err = errors.Join(err, manyRun(ctx, r, l, node, dir))
		case l.unix:
			err = errors.Join(err, unixRun(ctx, r, l, servers, dir))
		case l.root && os.Geteuid() != 0:
			err = errors.Join(err, fmt.Errorf("%s %s needs root to drop the page cache", l.row, l.name))
		case l.row == "G1":
			err = errors.Join(err, r.compare(ctx, l, append(slices.Clone(servers), floor)))
		default:
			err = errors.Join(err, r.compare(ctx, l, servers))
		}
	}
	return errors.Join(err, ctx.Err())
}

// age overwrites all servers' disks and gives those with which that went well, ours first.
func age(ctx context.Context, servers []*server, f func(context.Context, *server) error) (aged []*server, err error) {
	start := time.Now()
	for _, s := range servers {
		if ctx.Err() != nil {
			return aged, ctx.Err()
		}
		if aerr := f(ctx, s); aerr != nil {
			err = errors.Join(err, fmt.Errorf("overwrite %s before the measurement: %w", s.name, aerr))
			continue
		}
		aged = append(aged, s)
	}
	fmt.Printf("%d servers pre-aged in %.0f s\n", len(aged), time.Since(start).Seconds())
	return aged, err
}

func sparse(path string, size int64) error {
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return err
	}
	return os.Truncate(path, size)
}

// ageNBD overwrites the export twice. The second pass touches each block once, in random order.
func ageNBD(ctx context.Context, s *server) error {
	if _, err := fillNBD(ctx, s.uris[0], 1); err != nil {
		return err
	}
	_, err := nbdFio(ctx, s, 5*time.Minute, []string{"--rw=randwrite", "--bs=4k", "--iodepth=64"})
	return err
}

func nbdFio(ctx context.Context, s *server, limit time.Duration, args []string) (outcome, error) {
	return fio(ctx, limit, "fio", []string{"--ioengine=nbd", "--uri=" + s.uris[0], fmt.Sprintf("--size=%d", areaBytes)}, args)
}

// warmNBD reads the area once, in order. It goes before every run and not once before all: a host may reclaim pages of its guests
// that nobody has touched for half a minute (DAMON's pageout), which is less than the other servers' turns take.
func warmNBD(ctx context.Context, s *server) error {
	_, err := nbdFio(ctx, s, 5*time.Minute, []string{"--rw=read", "--bs=1M", "--iodepth=8"})
	return err
}

func nbdLoads(s settings) []load {
	limit := s.runTime*4 + 2*time.Minute
	timedFio := func(args string) runner {
		return func(ctx context.Context, srv *server, _ int) (outcome, error) {
			return nbdFio(ctx, srv, limit, timed(s.runTime, args))
		}
	}
	once := func(args ...string) runner {
		return func(ctx context.Context, srv *server, _ int) (outcome, error) { return nbdFio(ctx, srv, limit, args) }
	}
	syncedWrite := timedFio("--rw=randwrite --bs=4k --iodepth=1 --fsync=1")
	flush32 := int(30000 * s.runTime.Seconds())
	return []load{
		{row: "G1", name: "4K randwrite QD1 fsync=1", unit: "op/s",
			run: func(ctx context.Context, srv *server, i int) (outcome, error) {
				if srv.raw != "" {
					return appendSynced(ctx, srv.raw, s.runTime)
				}
				return syncedWrite(ctx, srv, i)
			},
			goals: []goal{
				{peers: []string{kitFile}, atLeast: 1.0, issue: true},
				{peers: qemus, atLeast: 1.5, issue: true},
				{peers: []string{floorName}, atLeast: 0.8},
			}},
		{row: "G2", name: "4K write QD16 flush/32", unit: "op/s", unix: true,
			run: func(_ context.Context, srv *server, _ int) (outcome, error) {
				return qemuBench(limit, srv.uris[0], flush32)
			},
			goals: []goal{
				{peers: []string{qemuWB}, atLeast: 2.0},
				{peers: []string{qemuNone, kitFile}, atLeast: 1.3},
			}},
		{row: "G3", name: "4K randwrite QD64", unit: "op/s", run: timedFio("--rw=randwrite --bs=4k --iodepth=64"),
			goals: []goal{
				{peers: qemus, atLeast: 1.2},
				{peers: []string{kitFile}, atLeast: 0.8},
				{peers: []string{kitMem}, atLeast: 0.45},
			}},
		{row: "G4", name: "4K FUA QD1 on 32 volumes", unit: "op/s",
			run: func(ctx context.Context, srv *server, _ int) (outcome, error) {
				return durableWrites(ctx, srv.uris, s.runTime)
			},
			goals: []goal{
				{peers: []string{oneVolume}, atLeast: 8},
				{peers: []string{manyQemuWB, manyQemuNone}, atLeast: 4},
			}},
		{row: "G5", name: "4K randread QD1 warm", unit: "op/s", before: warmNBD, run: timedFio("--rw=randread --bs=4k --iodepth=1"),
			goals: []goal{{peers: []string{qemuWB}, atLeast: 0.9}}},
		{row: "G5", name: "4K randread QD64 warm", unit: "op/s", before: warmNBD, run: timedFio("--rw=randread --bs=4k --iodepth=64"),
			goals: []goal{
				{peers: []string{qemuWB}, atLeast: 1.0},
				{peers: []string{kitMem}, atLeast: 0.55},
			}},
		{row: "G6", name: "4K 70/30 mix QD16", unit: "op/s", run: timedFio("--rw=randrw --rwmixread=70 --bs=4k --iodepth=16"),
			goals: []goal{{peers: qemus, atLeast: 1.2}}},
		{row: "G8", name: "4K randwrite QD16", unit: "us", run: timedFio("--rw=randwrite --bs=4k --iodepth=16"),
			goals: []goal{{atMost: 16, issue: true}, {atMost: 15}}},
		{row: "G8", name: "4K randread QD16 warm", unit: "us", before: warmNBD, run: timedFio("--rw=randread --bs=4k --iodepth=16"),
			goals: []goal{{atMost: 16, issue: true}, {atMost: 12}}},
		{row: "G7", name: "64K write burst 256 MiB", unit: "MB/s", run: once("--rw=write", "--bs=64k", "--iodepth=16", "--io_size=256m"),
			goals: []goal{{peers: qemus, atLeast: 0.9}}},
		{row: "G7", name: "1M write burst 256 MiB", unit: "MB/s", run: once("--rw=write", "--bs=1M", "--iodepth=8", "--io_size=256m"),
			goals: []goal{{peers: qemus, atLeast: 0.9}}},
		{row: "G7", name: "1M write 2 GiB and flush", unit: "MB/s", peers: withFiles,
			run:   func(ctx context.Context, srv *server, _ int) (outcome, error) { return fillNBD(ctx, srv.uris[0], 2) },
			goals: []goal{{peers: qemus, atLeast: 0.45}}},
		{row: "G7", name: "1M read warm", unit: "MB/s", before: warmNBD, run: timedFio("--rw=read --bs=1M --iodepth=8"),
			goals: []goal{{peers: qemus, atLeast: 0.9}}},
		{row: "G7", name: "1M read cold 1 GiB", unit: "MB/s", peers: withFiles, before: dropCaches, root: true,
			run:   once("--rw=read", "--bs=1M", "--iodepth=8"),
			goals: []goal{{peers: qemus, atLeast: 0.7}}},
	}
}

// unixRun measures a load through unix sockets: ours serves one anyway, of the peers a second process is started.
func unixRun(ctx context.Context, r *recorder, l load, servers []*server, dir string) (err error) {
	var twins []*server
	for i, s := range servers {
		if s.node != nil {
			twins = append(twins, &server{name: s.name, node: s.node, pids: s.pids,
				uris: []string{unixURI("default/bench", filepath.Join(s.node.Data, "nbd.sock"))}})
			continue
		}
		t, stop, terr := twin(s, filepath.Join(dir, fmt.Sprintf("twin-%d", i)))
		if terr != nil {
			err = errors.Join(err, terr)
			continue
		}
		defer stop()
		if t.image == "" {
			if _, ferr := fillNBD(ctx, t.uris[0], 1); ferr != nil {
				err = errors.Join(err, ferr)
				continue
			}
		}
		twins = append(twins, t)
	}
	return errors.Join(err, r.compare(ctx, l, twins))
}

// manyRun measures G4: 32 volumes of one appliance, one volume of it, and 32 processes of qemu-nbd in either mode.
func manyRun(ctx context.Context, r *recorder, l load, node *harness.Node, dir string) error {
	all := &server{name: ours, node: node, pids: []int{node.PID()}}
	err := withTurn(all, func() error {
		for i := range manyVolumes {
			name := fmt.Sprintf("many-%d", i)
			if _, err := node.CLI("vdisk", "create", "default/"+name, "--size", fmt.Sprint(manyBytes)); err != nil {
				return err
			}
			all.uris = append(all.uris, node.NBD(name))
		}
		return fillAll(ctx, all.uris)
	})
	if err != nil {
		return err
	}
	servers := []*server{all, {name: oneVolume, node: node, pids: all.pids, uris: all.uris[:1]}}
	for i, mode := range qemus {
		if !r.settings.wantsPeer(mode) {
			continue
		}
		sub := filepath.Join(dir, fmt.Sprintf("many-%d", i))
		peers, err := startPeers(slices.Repeat([]string{mode}, manyVolumes), sub, manyBytes)
		defer stopPeers(peers)
		if err != nil {
			return err
		}
		s := &server{name: []string{manyQemuWB, manyQemuNone}[i]}
		for _, p := range peers {
			s.pids, s.uris = append(s.pids, p.PID()), append(s.uris, p.URI)
		}
		if err := fillAll(ctx, s.uris); err != nil {
			return err
		}
		servers = append(servers, s)
	}
	return r.compare(ctx, l, servers)
}

func fillAll(ctx context.Context, uris []string) error {
	for _, uri := range uris {
		if _, err := fillNBD(ctx, uri, 2); err != nil {
			return err
		}
	}
	return nil
}
