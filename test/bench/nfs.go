package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"time"

	"varve/test/harness"
	"varve/test/nfsclient"
)

const (
	benchFile  = "bench.raw" // with ours a vDisk like any other
	manyFiles  = 10000
	programNFS = 100003
)

// nfsRun measures G13 to G15.
func nfsRun(ctx context.Context, r *recorder, dir string) (err error) {
	loads := slices.DeleteFunc(nfsLoads(r.settings), func(l load) bool { return !r.settings.wantsRow(l.row) })
	if len(loads) == 0 {
		return nil
	}
	if _, err := os.Stat(harness.Cache("fio-nfs")); err != nil {
		return fmt.Errorf("%w; `make setup` makes it", err)
	}
	node, err := startOurs(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopOurs(node)) }()
	servers := []*server{{name: ours, node: node, pids: []int{node.PID()}, nfsAddr: node.NFSAddr(), mountAddr: node.NFSAddr(),
		export: "/default", fioURL: node.NFS("/")}}
	if r.settings.wantsPeer(ganesha) {
		s, stop, gerr := startGanesha(dir)
		if err = gerr; err == nil {
			defer stop()
			servers = append(servers, s)
		}
	}
	servers, aerr := age(ctx, servers, ageNFS)
	err = errors.Join(err, aerr)
	if perr := pause(node); perr != nil {
		return errors.Join(err, perr)
	}
	for _, l := range loads {
		if ctx.Err() == nil {
			err = errors.Join(err, r.compare(ctx, l, servers))
		}
	}
	return errors.Join(err, ctx.Err())
}

// startGanesha starts nfs-ganesha and waits until it mounts: for a while after it listens it knows no program yet.
func startGanesha(dir string) (*server, func(), error) {
	p, err := harness.StartGanesha(dir)
	if err != nil {
		return nil, nil, err
	}
	s := &server{name: ganesha, pids: []int{p.PID()}, export: p.Path,
		nfsAddr: fmt.Sprintf("127.0.0.1:%d", p.Port), mountAddr: fmt.Sprintf("127.0.0.1:%d", p.Mnt),
		fioURL: fmt.Sprintf("nfs://127.0.0.1%s?version=3&nfsport=%d&mountport=%d&uid=0&gid=0", p.Path, p.Port, p.Mnt)}
	err = harness.Poll(15*time.Second, func() error {
		c, root, err := s.mount()
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.GetAttr(root)
		return err
	})
	if err != nil {
		p.Stop()
		return nil, nil, fmt.Errorf("mount of nfs-ganesha: %w", err)
	}
	return s, p.Stop, nil
}

// mount opens a connection to the NFS service and gives the export's root.
func (s *server) mount() (*nfsclient.Client, nfsclient.Handle, error) {
	m, err := nfsclient.Dial(s.mountAddr)
	if err != nil {
		return nil, "", err
	}
	root, err := m.Mount(s.export)
	m.Close()
	if err != nil {
		return nil, "", err
	}
	c, err := nfsclient.Dial(s.nfsAddr)
	if err == nil {
		c.Cork() // as Linux's client does
	}
	return c, root, err
}

// ageNFS makes the file and overwrites it twice, as ageNBD does.
func ageNFS(ctx context.Context, s *server) error {
	c, root, err := s.mount()
	if err != nil {
		return err
	}
	defer c.Close()
	h, err := c.Create(root, benchFile, true)
	if err != nil {
		return fmt.Errorf("create %s: %w", benchFile, err)
	}
	if err := c.Truncate(h, areaBytes); err != nil {
		return fmt.Errorf("truncate %s: %w", benchFile, err)
	}
	if _, err := nfsFio(ctx, s, 5*time.Minute, []string{"--rw=write", "--bs=1M", "--iodepth=4"}); err != nil {
		return err
	}
	_, err = nfsFio(ctx, s, 5*time.Minute, []string{"--rw=randwrite", "--bs=4k", "--iodepth=64"})
	return err
}

func nfsFio(ctx context.Context, s *server, limit time.Duration, args []string) (outcome, error) {
	return fio(ctx, limit, harness.Cache("fio-nfs"), []string{"--ioengine=nfs", "--nfs_url=" + s.fioURL, "--filename=/" + benchFile,
		fmt.Sprintf("--size=%d", areaBytes)}, args)
}

func warmNFS(ctx context.Context, s *server) error {
	_, err := nfsFio(ctx, s, 5*time.Minute, []string{"--rw=read", "--bs=1M", "--iodepth=4"})
	return err
}

// writeNFS writes 4 KiB at random places of the file; with commitEvery n, a COMMIT goes with every n-th write, and neither
// waits for the other.
func writeNFS(ctx context.Context, s *server, d time.Duration, depth int, stable uint32, commitEvery int) (outcome, error) {
	c, root, err := s.mount()
	if err != nil {
		return outcome{}, err
	}
	defer c.Close()
	h, err := c.Lookup(root, benchFile)
	if err != nil {
		return outcome{}, err
	}
	isWrite := func(i int) bool { return commitEvery == 0 || i%(commitEvery+1) != commitEvery }
	got, err := pipeline(depth, until(ctx, d), isWrite, func(i int, done func(error)) {
		answered := func(_ nfsclient.Written, err error) { done(err) }
		if isWrite(i) {
			c.SubmitWrite(h, piece(4096), rand.Int64N(areaBytes/4096)*4096, stable, answered)
		} else {
			c.SubmitCommit(h, answered)
		}
	})
	got.bytesSec = got.rate * 4096
	return got, err
}

// call sends one NFS procedure and takes its status off.
func call(c *nfsclient.Client, proc uint32, args nfsclient.Encoder, done func(error)) {
	c.Submit(programNFS, proc, args, func(d *nfsclient.Decoder, err error) {
		if err == nil {
			if status := d.Uint32(); status != 0 {
				err = nfsclient.Status(status)
			}
		}
		done(err)
	})
}

// inDir gives diropargs3, the arguments that name a file.
func inDir(dir nfsclient.Handle, i int) nfsclient.Encoder {
	var e nfsclient.Encoder
	e.Opaque([]byte(dir))
	e.String(fileName(i))
	return e
}

func fileName(i int) string { return fmt.Sprintf("file-%06d", i) }

// operation is a metadata call on the i-th file of a directory.
type operation func(c *nfsclient.Client, dir nfsclient.Handle, i int, done func(error))

func createOne(c *nfsclient.Client, dir nfsclient.Handle, i int, done func(error)) {
	e := inDir(dir, i)
	for _, v := range []uint32{0, 1, 0o644, 0, 0, 0, 0, 0} { // UNCHECKED; mode set, and no uid, gid, size, atime, mtime
		e.Uint32(v)
	}
	call(c, nfsclient.Create, e, done)
}

func removeOne(c *nfsclient.Client, dir nfsclient.Handle, i int, done func(error)) {
	call(c, nfsclient.Remove, inDir(dir, i), done)
}

func lookupOne(c *nfsclient.Client, dir nfsclient.Handle, i int, done func(error)) {
	call(c, nfsclient.Lookup, inDir(dir, i%manyFiles), done)
}

// metadata carries out an operation for as long as more says, depth in flight, in a directory, which it makes when it has to.
func metadata(s *server, dirName string, depth int, more func(int) bool, issue operation) (outcome, error) {
	c, root, err := s.mount()
	if err != nil {
		return outcome{}, err
	}
	defer c.Close()
	dir, ok := s.dirs[dirName]
	if !ok {
		if dir, err = c.MkDir(root, dirName); err != nil {
			return outcome{}, fmt.Errorf("mkdir %s: %w", dirName, err)
		}
		if s.dirs == nil {
			s.dirs = map[string]nfsclient.Handle{}
		}
		s.dirs[dirName] = dir
	}
	return pipeline(depth, more, nil, func(i int, done func(error)) { issue(c, dir, i, done) })
}

// getAttrs asks for the attributes of files of a directory in turn.
func getAttrs(ctx context.Context, s *server, dirName string, depth int, d time.Duration) (outcome, error) {
	c, _, err := s.mount()
	if err != nil {
		return outcome{}, err
	}
	defer c.Close()
	handles := make([]nfsclient.Encoder, 0, 1000)
	for i := range cap(handles) {
		h, err := c.Lookup(s.dirs[dirName], fileName(i))
		if err != nil {
			return outcome{}, err
		}
		var e nfsclient.Encoder
		e.Opaque([]byte(h))
		handles = append(handles, e)
	}
	return pipeline(depth, until(ctx, d), nil, func(i int, done func(error)) {
		call(c, nfsclient.GetAttr, handles[i%len(handles)], done)
	})
}

// listAll reads a directory of 10,000 files; the outcome's latency is the time of the whole listing.
func listAll(s *server, dirName string) (outcome, error) {
	c, _, err := s.mount()
	if err != nil {
		return outcome{}, err
	}
	defer c.Close()
	begun := time.Now()
	names, err := c.Names(s.dirs[dirName])
	took := time.Since(begun)
	if err == nil && len(names) != manyFiles {
		err = fmt.Errorf("%d names in place of %d", len(names), manyFiles)
	}
	return outcome{ops: 1, rate: 1 / took.Seconds(), p50: took, p99: took}, err
}

// lookupsBesideWriters looks names up one after the other while fio writes 4 KiB at depth 64 over another connection.
func lookupsBesideWriters(ctx context.Context, s *server, dirName string, d time.Duration) (outcome, error) {
	written := make(chan error, 1)
	go func() {
		_, err := nfsFio(ctx, s, d*4+2*time.Minute, timed(d+time.Second, "--rw=randwrite --bs=4k --iodepth=64"))
		written <- err
	}()
	time.Sleep(700 * time.Millisecond) // fio writes by then, and goes on until after the last lookup
	got, err := metadata(s, dirName, 1, until(ctx, d), lookupOne)
	return got, errors.Join(err, <-written)
}

func nfsLoads(s settings) []load {
	limit := s.runTime*4 + 2*time.Minute
	toGanesha := func(atLeast float64, issue bool) []goal {
		return []goal{{peers: []string{ganesha}, atLeast: atLeast, issue: issue}}
	}
	write := func(depth int, stable uint32, commitEvery int) runner {
		return func(ctx context.Context, srv *server, _ int) (outcome, error) {
			return writeNFS(ctx, srv, s.runTime, depth, stable, commitEvery)
		}
	}
	timedFio := func(args string) runner {
		return func(ctx context.Context, srv *server, _ int) (outcome, error) {
			return nfsFio(ctx, srv, limit, timed(s.runTime, args))
		}
	}
	// Each repetition has a directory of its own.
	inOwn := func(prefix string, depth, n int, issue operation) runner {
		return func(ctx context.Context, srv *server, i int) (outcome, error) {
			return metadata(srv, fmt.Sprintf("%s-%d", prefix, i), depth, upTo(ctx, n), issue)
		}
	}
	const first = "many-0" // the directory of the first repetition's creates
	perCore := []goal{{atMost: 50, text: "20k/s a core"}}
	return []load{
		{row: "G13", name: "4K FILE_SYNC QD1", unit: "op/s", run: write(1, nfsclient.FileSync, 0), goals: toGanesha(1.0, false)},
		{row: "G13", name: "4K FILE_SYNC QD16", unit: "op/s", run: write(16, nfsclient.FileSync, 0), goals: toGanesha(3.0, true)},
		{row: "G13", name: "4K FILE_SYNC QD64", unit: "op/s", run: write(64, nfsclient.FileSync, 0), goals: toGanesha(5.0, false)},
		{row: "G14", name: "4K UNSTABLE QD16 COMMIT/32", unit: "op/s", run: write(16, nfsclient.Unstable, 32),
			goals: toGanesha(1.5, false)},
		{row: "G14", name: "4K randread QD16 warm", unit: "op/s", before: warmNFS,
			run: timedFio("--rw=randread --bs=4k --iodepth=16"), goals: toGanesha(1.0, false)},
		{row: "G14", name: "1M write QD4", unit: "MB/s", run: timedFio("--rw=write --bs=1M --iodepth=4"), goals: toGanesha(0.9, false)},
		{row: "G14", name: "1M read QD4 warm", unit: "MB/s", before: warmNFS,
			run: timedFio("--rw=read --bs=1M --iodepth=4"), goals: toGanesha(0.9, false)},
		{row: "G15", name: "CREATE QD1", unit: "op/s", run: inOwn("few", 1, 500, createOne), goals: toGanesha(1.0, false)},
		{row: "G15", name: "CREATE 10k QD16", unit: "op/s", run: inOwn("many", 16, manyFiles, createOne), goals: toGanesha(1.0, false)},
		{row: "G15", name: "READDIRPLUS of 10k", unit: "ms",
			run:   func(_ context.Context, srv *server, _ int) (outcome, error) { return listAll(srv, first) },
			goals: []goal{{atMost: 200}}},
		{row: "G15", name: "LOOKUP QD16", unit: "us",
			run: func(ctx context.Context, srv *server, _ int) (outcome, error) {
				return metadata(srv, first, 16, until(ctx, s.runTime), lookupOne)
			}, goals: perCore},
		{row: "G15", name: "GETATTR QD16", unit: "us",
			run: func(ctx context.Context, srv *server, _ int) (outcome, error) {
				return getAttrs(ctx, srv, first, 16, s.runTime)
			}, goals: perCore},
		{row: "G15", name: "LOOKUP p99 beside 4K writers", unit: "ms",
			run: func(ctx context.Context, srv *server, _ int) (outcome, error) {
				return lookupsBesideWriters(ctx, srv, first, s.runTime)
			}, goals: []goal{{atMost: 5}}},
		{row: "G15", name: "REMOVE 10k QD16", unit: "op/s", run: inOwn("many", 16, manyFiles, removeOne), goals: toGanesha(1.0, false)},
	}
}
