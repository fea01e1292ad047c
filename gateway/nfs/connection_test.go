package nfs_test

import (
	"bytes"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"time"

	"varve/gateway/nfs"
	"varve/gateway/nfs/nfstest"
	"varve/gateway/nfs/rpc"
	"varve/gateway/nfs/xdr"
)

func TestRetransmissionsGetTheFirstReply(t *testing.T) {
	s := serve(t, nfs.Config{})
	c := s.mount("/default")
	again := s.mount("/default") // as after a reconnect: another port, the same address
	c.create("removed")
	c.create("renamed")
	c.want(0, mkdir, append(nfstest.NameArgs(c.root, "dir"), nfstest.SetArgs(nil, nil)...))
	once := func(xid, proc uint32, args []byte) (bodies [3][]byte) {
		t.Helper()
		for i, x := range []*client{c, c, again} {
			if _, err := x.Conn.Write(x.Record(xid, nfstest.NFS, 3, proc, args)); err != nil {
				t.Fatal(err)
			}
			got, body, err := x.Receive()
			if err != nil || got != xid {
				t.Fatalf("xid %d, %v", got, err)
			}
			bodies[i] = body
		}
		return bodies
	}
	set := nfstest.SetArgs(nil, nil)
	for i, x := range []struct {
		proc uint32
		args []byte
	}{
		{remove, nfstest.NameArgs(c.root, "removed")},
		{rename, append(nfstest.NameArgs(c.root, "renamed"), nfstest.NameArgs(c.root, "to")...)},
		{create, nfstest.CreateArgs(c.root, "guarded", 1, nil)},
		{mkdir, append(nfstest.NameArgs(c.root, "new"), set...)},
		{rmdir, nfstest.NameArgs(c.root, "dir")},
		{symlink, xdr.AppendString(append(nfstest.NameArgs(c.root, "link"), set...), "target")},
		{mknod, append(xdr.AppendUint32(nfstest.NameArgs(c.root, "fifo"), 7), set...)},
	} {
		xid := uint32(100 + i)
		bodies := once(xid, x.proc, x.args)
		results, err := nfstest.Results(bodies[0])
		if err != nil {
			t.Fatal(err)
		}
		if r, err := nfstest.Decode(x.proc, results); err != nil || r.Status != 0 {
			t.Fatalf("procedure %d: status %d, %v", x.proc, r.Status, err)
		}
		if !bytes.Equal(bodies[0], bodies[1]) || !bytes.Equal(bodies[0], bodies[2]) {
			t.Errorf("procedure %d: a retransmission got another reply", x.proc)
		}
		// The same xid with other arguments is another call.
		if r := once(xid, remove, nfstest.NameArgs(c.root, "none"))[0]; bytes.Equal(r, bodies[0]) {
			t.Errorf("procedure %d: another call with the same xid got its reply", x.proc)
		}
	}
	if n := s.server.Stats().Replayed; n < 14 {
		t.Errorf("%d calls replayed", n)
	}
	// Another user or machine behind the same address with the same xid.
	xid, args := uint32(500), nfstest.CreateArgs(c.root, "theirs", 1, nil)
	callers := []rpc.Credentials{c.Cred, {Flavour: 1, Machine: []byte("other")}, {Flavour: 1, Machine: c.Cred.Machine, UID: 9}}
	for i, cred := range callers {
		again.Cred = cred
		again.Conn.Write(again.Record(xid, nfstest.NFS, 3, create, args))
		if r := again.receive(create); (r.Status == 0) != (i == 0) {
			t.Errorf("caller %d: status %d", i, r.Status)
		}
	}
}

// TestRetransmissionOvertakesItsOriginal: it waits for the original's reply and runs nothing.
func TestRetransmissionOvertakesItsOriginal(t *testing.T) {
	s := serve(t, nfs.Config{})
	c, again := s.mount("/default"), s.mount("/default")
	hold := make(chan struct{})
	s.ns.Behave.HoldNames.Store(&hold)
	args := nfstest.CreateArgs(c.root, "once", 1, nil)
	for _, x := range []*client{c, again, again} {
		if _, err := x.Conn.Write(x.Record(9, nfstest.NFS, 3, create, args)); err != nil {
			t.Fatal(err)
		}
	}
	waitFor(t, "the retransmissions", func() bool { return s.server.Stats().Replayed == 2 })
	close(hold)
	first := c.receive(create)
	for range 2 {
		if r := again.receive(create); r.Status != 0 || !bytes.Equal(r.Handle, first.Handle) {
			t.Errorf("status %d", r.Status)
		}
	}
}

// TestSlowReadsDoNotHoldUpOthers: calls that wait for storage are overtaken by those that need not wait.
func TestSlowReadsDoNotHoldUpOthers(t *testing.T) {
	s := serve(t, nfs.Config{})
	c := s.mount("/default")
	fh := c.create("f")
	c.want(0, write, nfstest.WriteArgs(fh, 0, make([]byte, 1<<20), 2))
	hold := make(chan struct{})
	s.ns.Behave.Hold.Store(&hold)
	s.ns.Behave.Busy.Store(true)
	var b []byte
	for xid := uint32(1); xid <= 20; xid++ {
		b = append(b, c.Record(xid, nfstest.NFS, 3, read, nfstest.ReadArgs(fh, 0, 4096))...)
	}
	b = append(b, c.Record(99, nfstest.NFS, 3, getattr, nfstest.HandleArgs(fh))...)
	c.Conn.Write(b)
	if xid, _, err := c.Receive(); err != nil || xid != 99 {
		t.Fatalf("first reply is to %d, %v", xid, err)
	}
	close(hold)
	seen := make(map[uint32]bool)
	for range 20 {
		xid, _, err := c.Receive()
		if err != nil || seen[xid] || xid < 1 || xid > 20 {
			t.Fatalf("xid %d, %v", xid, err)
		}
		seen[xid] = true
	}
}

// TestClientThatDoesNotRead: the server stops reading from it, holds a bounded amount for it, and serves others.
func TestClientThatDoesNotRead(t *testing.T) {
	s := serve(t, nfs.Config{})
	slow, other := s.mount("/default"), s.mount("/default")
	fh := slow.create("f")
	slow.want(0, write, nfstest.WriteArgs(fh, 0, make([]byte, 1<<20), 2))
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	const calls = 400 // of 1 MiB each
	written := make(chan error, 1)
	go func() {
		var b []byte
		for xid := uint32(1); xid <= calls; xid++ {
			b = append(b, slow.Record(xid, nfstest.NFS, 3, read, nfstest.ReadArgs(fh, 0, 1<<20))...)
		}
		_, err := slow.Conn.Write(b)
		written <- err
	}()
	for range 50 {
		other.want(0, getattr, nfstest.HandleArgs(fh))
		time.Sleep(2 * time.Millisecond)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if held := int64(after.HeapAlloc) - int64(before.HeapAlloc); held > 64<<20 {
		t.Errorf("%d MiB held for a client that does not read", held>>20)
	}
	for range calls {
		if _, _, err := slow.Receive(); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-written; err != nil {
		t.Fatal(err)
	}
}

func TestDeepPipeline(t *testing.T) {
	for _, mode := range []string{"inline", "busy", "background"} {
		t.Run(mode, func(t *testing.T) {
			s := serve(t, nfs.Config{})
			c := s.mount("/default")
			fh := c.create("f")
			c.want(0, write, nfstest.WriteArgs(fh, 0, make([]byte, 8192), 2))
			s.ns.Behave.Busy.Store(mode == "busy")
			s.ns.Behave.Background.Store(mode == "background")
			const calls = 3000
			sent := make(chan error, 1)
			go func() {
				var b []byte
				for xid := uint32(1); xid <= calls; xid++ {
					switch {
					case xid%50 == 0:
						b = append(b, c.Record(xid, nfstest.NFS, 3, commit, nfstest.ReadArgs(fh, 0, 0))...)
					case xid%2 == 0:
						b = append(b, c.Record(xid, nfstest.NFS, 3, read, nfstest.ReadArgs(fh, uint64(xid), 4096))...)
					default:
						b = append(b, c.Record(xid, nfstest.NFS, 3, write, nfstest.WriteArgs(fh, uint64(xid)*4096, make([]byte, 4096), xid%3))...)
					}
				}
				_, err := c.Conn.Write(b)
				sent <- err
			}()
			seen := make(map[uint32]bool)
			for range calls {
				xid, body, err := c.Receive()
				if err != nil {
					t.Fatal(err)
				}
				results, err := nfstest.Results(body)
				if err != nil {
					t.Fatal(err)
				}
				proc := uint32(write)
				if xid%50 == 0 {
					proc = commit
				} else if xid%2 == 0 {
					proc = read
				}
				if r, err := nfstest.Decode(proc, results); err != nil || r.Status != 0 || seen[xid] {
					t.Fatalf("xid %d: status %d, %v", xid, r.Status, err)
				}
				seen[xid] = true
			}
			if err := <-sent; err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestEndOfInputStillAnswers: a client that shuts its side down gets the replies to what it sent.
func TestEndOfInputStillAnswers(t *testing.T) {
	s := serve(t, nfs.Config{})
	c := s.mount("/default")
	fh := c.create("f")
	c.want(0, write, nfstest.WriteArgs(fh, 0, make([]byte, 8192), 2))
	s.ns.Behave.Busy.Store(true)
	s.ns.Behave.Delay.Store(int64(20 * time.Millisecond))
	for range 5 {
		if _, err := c.Send(nfstest.NFS, 3, write, nfstest.WriteArgs(fh, 0, []byte("x"), 2)); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		if r := c.receive(write); r.Status != 0 {
			t.Fatal(r.Status)
		}
	}
	if !c.ended() {
		t.Error("connection goes on")
	}
}

// TestStopAnswersWhatIsInFlight: Run ends only when accepted calls are answered.
func TestStopAnswersWhatIsInFlight(t *testing.T) {
	s := serve(t, nfs.Config{})
	c := s.mount("/default")
	fh := c.create("f")
	c.want(0, write, nfstest.WriteArgs(fh, 0, make([]byte, 8192), 2))
	s.ns.Behave.Background.Store(true)
	s.ns.Behave.Delay.Store(int64(100 * time.Millisecond))
	kicks := s.ns.Behave.Kicks.Load()
	if _, err := c.Send(nfstest.NFS, 3, write, nfstest.WriteArgs(fh, 0, []byte("last"), 2)); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the WRITE to be submitted", func() bool { return s.ns.Behave.Kicks.Load() > kicks })
	s.stop()
	if r := c.receive(write); r.Status != 0 {
		t.Fatal(r.Status)
	}
	if !c.ended() {
		t.Error("connection goes on after Run ended")
	}
}

func TestStopDoesNotWaitForEver(t *testing.T) {
	s := serve(t, nfs.Config{Drain: 200 * time.Millisecond})
	c := s.mount("/default")
	fh := c.create("f")
	c.want(0, write, nfstest.WriteArgs(fh, 0, []byte("x"), 2))
	s.ns.Behave.Busy.Store(true)
	hold := make(chan struct{})
	defer close(hold)
	s.ns.Behave.Hold.Store(&hold)
	waited := s.server.Stats().Waited
	if _, err := c.Send(nfstest.NFS, 3, write, nfstest.WriteArgs(fh, 0, []byte("y"), 2)); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the WRITE to wait", func() bool { return s.server.Stats().Waited > waited })
	s.stop()
	if !c.ended() {
		t.Error("a write that was given up was answered")
	}
}

// TestIdleConnections: silent ones are bounded in number and memory, and cannot keep a client out.
func TestIdleConnections(t *testing.T) {
	const limit, idle = 200, 5000
	s := serve(t, nfs.Config{Connections: limit})
	busy := s.mount("/default")
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	var conns []net.Conn
	defer func() {
		for _, nc := range conns {
			nc.Close()
		}
	}()
	for range idle {
		nc, err := net.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		nc.Write(words(1<<31 | 1<<20)) // announces a large record and says no more
		conns = append(conns, nc)
	}
	waitFor(t, "the server to take them", func() bool { st := s.server.Stats(); return st.Accepted+st.Refused >= idle })
	runtime.GC()
	runtime.ReadMemStats(&after)
	st := s.server.Stats()
	if st.Connections > limit+limit/8 {
		t.Errorf("%d connections, limit %d", st.Connections, limit)
	}
	grown := int64(after.HeapAlloc+after.StackInuse) - int64(before.HeapAlloc+before.StackInuse)
	if grown > limit*64<<10 {
		t.Errorf("%d KiB for each idle connection", grown/limit>>10)
	}
	t.Logf("%d connections, %d KiB each", st.Connections, grown/max(st.Connections, 1)>>10)
	busy.want(0, getattr, nfstest.HandleArgs(busy.root))
	s.mount("/default") // a new client gets in
}

// TestStrangersGetLittle: who may use no export cannot make the server hold a large record.
func TestStrangersGetLittle(t *testing.T) {
	e := nfstest.Loopback(7, "/default")
	e.Clients = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
	s := serve(t, nfs.Config{}, e)
	c := s.dial()
	if _, status, err := c.MountExport("/default"); err != nil || status != nfs.StatusAcces {
		t.Fatalf("MNT: %d, %v", status, err)
	}
	c.Conn.Write(append(words(1<<31|32<<10), make([]byte, 32<<10)...))
	if !c.ended() {
		t.Error("a stranger's record of 32 KiB was taken")
	}
}

// TestManyConnections reads and writes from many connections at once.
func TestManyConnections(t *testing.T) {
	s := serve(t, nfs.Config{})
	s.ns.Behave.Background.Store(true)
	var wg sync.WaitGroup
	for i := range 20 {
		c := s.mount("/default")
		wg.Go(func() {
			fh, err := c.Do(create, nfstest.CreateArgs(c.root, "shared", 0, nil))
			if err != nil {
				t.Error(err)
				return
			}
			for k := range 100 {
				off := uint64(i*100+k) * 512
				data := bytes.Repeat([]byte{byte(i), byte(k)}, 256)
				if r, err := c.Do(write, nfstest.WriteArgs(fh.Handle, off, data, uint32(k%3))); err != nil || r.Status != 0 {
					t.Errorf("WRITE: %d, %v", r.Status, err)
					return
				}
				if r, err := c.Do(read, nfstest.ReadArgs(fh.Handle, off, 512)); err != nil || !bytes.Equal(r.Data, data) {
					t.Errorf("READ: %d, %v", r.Status, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestLargeBuffersAreGivenBack(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for the buffers to be idle")
	}
	s := serve(t, nfs.Config{})
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	const conns = 20
	var all []*client
	for range conns {
		all = append(all, s.mount("/default"))
	}
	fh := all[0].create("f")
	all[0].want(0, write, nfstest.WriteArgs(fh, 0, make([]byte, 1<<20), 2))
	before := heap()
	for _, c := range all {
		c.want(0, write, nfstest.WriteArgs(fh, 0, make([]byte, 1<<20), 2))
		c.want(0, read, nfstest.ReadArgs(fh, 0, 1<<20))
	}
	// One buffer of each connection for what it reads, one for what it writes: 2.3 MiB, of which little may stay.
	waitFor(t, "buffers to be given back", func() bool { return heap() < before+conns*256<<10 })
	for _, c := range all {
		c.want(0, getattr, nfstest.HandleArgs(c.root))
	}
}
