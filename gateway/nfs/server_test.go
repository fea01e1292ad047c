package nfs_test

import (
	"bytes"
	"context"
	"net"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"varve/gateway/nfs"
	"varve/gateway/nfs/nfstest"
	"varve/gateway/seat"
)

// served is a server with its namespace, as a test needs it.
type served struct {
	t      testing.TB
	ns     *nfstest.Namespace
	server *nfs.Server
	addr   string
	stop   func()
}

func verifier() [8]byte { return [8]byte{'v', 'e', 'r', 'i', 'f', 'i', 'e', 'r'} }

func serve(t testing.TB, cfg nfs.Config, exports ...nfs.Export) *served {
	t.Helper()
	if len(exports) == 0 {
		exports = []nfs.Export{nfstest.Loopback(7, "/default")}
	}
	s := &served{t: t, ns: nfstest.New(exports...)}
	cfg.Namespace = s.ns
	if cfg.Verifier == nil {
		cfg.Verifier = verifier
	}
	if cfg.Seats == nil { // for everybody, at the third burst; who rests for some milliseconds is back with the poller
		cfg.Seats = seat.New(1<<10, seat.Rules{Bursts: 1, Within: time.Hour})
	}
	s.server = nfs.New(cfg)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.addr = ln.Addr().String()
	s.stop = runServer(t, s.server, ln)
	t.Cleanup(func() {
		s.stop()
		if n := s.ns.Opened(); n != 0 {
			t.Errorf("%d files still open after Run ended", n)
		}
	})
	return s
}

// runServer runs a server until stop is called.
func runServer(t testing.TB, server *nfs.Server, ln net.Listener) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- server.Run(ctx, ln) }()
	var once sync.Once
	return func() {
		once.Do(func() {
			cancel()
			select {
			case err := <-ended:
				if err != nil {
					t.Errorf("Run: %v", err)
				}
			case <-time.After(15 * time.Second):
				t.Error("Run did not end")
			}
		})
	}
}

// client is a nfstest.Client that fails the test on any error.
type client struct {
	*nfstest.Client
	t    testing.TB
	root []byte
}

func (s *served) dial() *client {
	s.t.Helper()
	c, err := nfstest.Dial(s.addr)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	return &client{Client: c, t: s.t}
}

func (s *served) mount(path string) *client {
	s.t.Helper()
	c := s.dial()
	fh, status, err := c.MountExport(path)
	if err != nil || status != nfs.StatusOK {
		s.t.Fatalf("mount %s: status %d, %v", path, status, err)
	}
	c.root = fh
	return c
}

func (c *client) do(proc uint32, args []byte) nfstest.Reply {
	c.t.Helper()
	r, err := c.Do(proc, args)
	if err != nil {
		c.t.Fatalf("procedure %d: %v", proc, err)
	}
	return r
}

// want makes a call that must end with the status.
func (c *client) want(status nfs.Status, proc uint32, args []byte) nfstest.Reply {
	c.t.Helper()
	r := c.do(proc, args)
	if r.Status != status {
		c.t.Fatalf("procedure %d: status %d, want %d", proc, r.Status, status)
	}
	return r
}

func (c *client) create(name string) []byte {
	c.t.Helper()
	return c.want(nfs.StatusOK, create, nfstest.CreateArgs(c.root, name, 0, nil)).Handle
}

const (
	getattr     = 1
	setattr     = 2
	lookup      = 3
	access      = 4
	readlink    = 5
	read        = 6
	write       = 7
	create      = 8
	mkdir       = 9
	symlink     = 10
	mknod       = 11
	remove      = 12
	rmdir       = 13
	rename      = 14
	link        = 15
	readdir     = 16
	readdirplus = 17
	fsstat      = 18
	fsinfo      = 19
	pathconf    = 20
	commit      = 21
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestFirstSteps(t *testing.T) {
	s := serve(t, nfs.Config{})
	c := s.mount("/default")
	if a := c.want(nfs.StatusOK, getattr, nfstest.HandleArgs(c.root)).Attr; a.Kind != nfs.Dir || a.FSID != 7 || a.Mode != 0o777 {
		t.Fatalf("root: %+v", a)
	}
	fh := c.create("disk1.raw")
	if again := c.want(nfs.StatusOK, lookup, nfstest.NameArgs(c.root, "disk1.raw")); !bytes.Equal(again.Handle, fh) {
		t.Fatal("LOOKUP gives another handle than CREATE")
	}
	data := bytes.Repeat([]byte("0123456789abcdef"), 300)
	for _, stable := range []uint32{2, 0, 1} {
		r := c.want(nfs.StatusOK, write, nfstest.WriteArgs(fh, 1000, data, stable))
		want := uint32(2)
		if stable == 0 {
			want = 0
		}
		if r.Count != uint32(len(data)) || r.Stable != want || r.Verifier != verifier() {
			t.Fatalf("WRITE %d: %+v", stable, r)
		}
		if r.Wcc.Post.Size != int64(1000+len(data)) {
			t.Fatalf("size after WRITE is %d", r.Wcc.Post.Size)
		}
	}
	if r := c.want(nfs.StatusOK, commit, nfstest.ReadArgs(fh, 0, 0)); r.Verifier != verifier() {
		t.Fatalf("COMMIT: %+v", r)
	}
	r := c.want(nfs.StatusOK, read, nfstest.ReadArgs(fh, 1000, 1<<20))
	if !bytes.Equal(r.Data, data) || !r.EOF {
		t.Fatalf("READ: %d bytes, eof %v", len(r.Data), r.EOF)
	}
	list := c.want(nfs.StatusOK, readdirplus, nfstest.ListArgs(c.root, 0, 8192, 32768))
	if len(list.Entries) != 3 || list.Entries[2].Name != "disk1.raw" || !bytes.Equal(list.Entries[2].Handle, fh) || !list.EOF {
		t.Fatalf("READDIRPLUS: %+v", list)
	}
	r = c.want(nfs.StatusOK, mkdir, append(nfstest.NameArgs(c.root, "vm"), nfstest.SetArgs(nil, nil)...))
	if r.Attr.Kind != nfs.Dir || r.Attr.Mode != 0o755 {
		t.Fatalf("MKDIR: %+v", r)
	}
}
