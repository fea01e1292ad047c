package nfs_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"varve/gateway/nfs"
	"varve/gateway/nfs/nfstest"
	"varve/gateway/nfs/rpc"
	"varve/gateway/nfs/xdr"
)

// scripted is a connection whose input is given and whose output is kept.
type scripted struct {
	in   *bytes.Reader
	step int
	peer net.Addr
	mu   sync.Mutex
	out  bytes.Buffer
}

func (s *scripted) Read(p []byte) (int, error) {
	if s.step > 0 && len(p) > s.step {
		p = p[:s.step]
	}
	return s.in.Read(p)
}

func (s *scripted) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.out.Write(p)
}
func (s *scripted) Close() error                     { return nil }
func (s *scripted) LocalAddr() net.Addr              { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 2049} }
func (s *scripted) RemoteAddr() net.Addr             { return s.peer }
func (s *scripted) SetDeadline(time.Time) error      { return nil }
func (s *scripted) SetReadDeadline(time.Time) error  { return nil }
func (s *scripted) SetWriteDeadline(time.Time) error { return nil }

var clients atomic.Uint32

// exchange gives the input to the server and returns the replies' bodies by xid.
func (s *served) exchange(t *testing.T, input []byte, step int) map[uint32][]byte {
	t.Helper()
	n := clients.Add(1) // each from an address of its own, as the server slows down those that mount too often
	peer := &net.TCPAddr{IP: net.IPv4(127, byte(n>>16), byte(n>>8), byte(n)), Port: 900}
	nc := &scripted{in: bytes.NewReader(input), step: step, peer: peer}
	began := time.Now()
	s.server.ServeConn(context.Background(), nc)
	if d := time.Since(began); d > 5*time.Second {
		t.Fatalf("%d bytes took %v", len(input), d)
	}
	c := nfstest.Client{Conn: &scripted{in: bytes.NewReader(nc.out.Bytes())}}
	replies := make(map[uint32][]byte)
	for {
		xid, body, err := c.Receive()
		if errors.Is(err, io.EOF) {
			return replies
		}
		if err != nil {
			t.Fatalf("output is not a sequence of replies: %v", err)
		}
		replies[xid] = body
	}
}

// fuzzed is a server with two exports, one of them not for this client, and some objects in the other.
func fuzzed(f testing.TB) (s *served, handles [][]byte) {
	secret := nfstest.Loopback(8, "/secret")
	secret.Clients = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
	s = serve(f, nfs.Config{}, nfstest.Loopback(7, "/default"), secret)
	if _, _, err := s.ns.Create(context.Background(), 8, 2, "kept", nfs.CreateSpec{Kind: nfs.Regular}); err != nil {
		f.Fatal(err)
	}
	c := s.mount("/default")
	set := nfstest.SetArgs(nil, nil)
	d := c.want(0, mkdir, append(nfstest.NameArgs(c.root, "d"), set...)).Handle
	fh := c.create("f")
	c.want(0, write, nfstest.WriteArgs(fh, 0, make([]byte, 10_000), 2))
	l := c.want(0, symlink, xdr.AppendString(append(nfstest.NameArgs(c.root, "l"), set...), "target")).Handle
	gone := c.create("gone")
	c.want(0, remove, nfstest.NameArgs(c.root, "gone"))
	return s, [][]byte{c.root, d, fh, l, gone}
}

// FuzzCall runs sequences of NFS calls. A byte in the input chooses a procedure, one a handle, one how many bytes of
// arguments follow. Whatever they are, each call gets one reply, which decodes to its last byte.
func FuzzCall(f *testing.F) {
	s, handles := fuzzed(f)
	for proc := range byte(22) {
		for h := range byte(5) {
			f.Add([]byte{proc, h, 24, 0, 0, 0, 1, 'x', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, byte(0))
		}
	}
	f.Add(append([]byte{7, 2, 28, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 4, 0, 0, 0, 2, 0, 0, 0, 4}, "data____"...), byte(1))
	f.Fuzz(func(t *testing.T, script []byte, step byte) {
		if len(script) > 4096 {
			return
		}
		client := nfstest.Client{Cred: rpc.Credentials{Flavour: rpc.FlavourSys}}
		var input []byte
		procs := make(map[uint32]uint32)
		for xid := uint32(1); len(script) >= 3; xid++ {
			proc, h, n := uint32(script[0])%24, int(script[1]), min(int(script[2]), len(script)-3)
			args := nfstest.HandleArgs(handles[h%len(handles)])
			more := script[3 : 3+n]
			script = script[3+n:]
			if h >= 128 {
				args = nil // no handle but whatever follows
			}
			args = append(args, more...)
			if h >= 64 && h < 128 { // a second handle, as RENAME and LINK have
				args = append(args, nfstest.HandleArgs(handles[n%len(handles)])...)
				args = append(args, more...)
			}
			procs[xid] = proc
			input = append(input, client.Record(xid, nfstest.NFS, 3, proc, args)...)
		}
		replies := s.exchange(t, input, int(step))
		for xid, proc := range procs {
			body, ok := replies[xid]
			if !ok {
				t.Fatalf("procedure %d got no reply", proc)
			}
			results, err := nfstest.Results(body)
			if err != nil { // GARBAGE_ARGS, or PROC_UNAVAIL
				if len(body) != 16 || body[15] != 4 && !(proc > 21 && body[15] == 3) {
					t.Fatalf("procedure %d: % x", proc, body)
				}
				continue
			}
			if proc == 0 {
				if len(results) > 0 {
					t.Fatal("NULL has results")
				}
				continue
			}
			if _, err := nfstest.Decode(proc, results); err != nil {
				t.Fatal(err)
			}
		}
		if s.ns.File(8, "kept") == nil {
			t.Fatal("an export that is not this client's was changed")
		}
	})
}

// FuzzStream gives arbitrary bytes to a connection: it may end it, but must not fail, hang or answer what is no call.
func FuzzStream(f *testing.F) {
	s, handles := fuzzed(f)
	client := nfstest.Client{Cred: rpc.Credentials{Flavour: rpc.FlavourSys}}
	f.Add(client.Record(1, nfstest.NFS, 3, 1, nfstest.HandleArgs(handles[0])), byte(3))
	f.Add(client.Record(1, nfstest.Mount, 3, 5, nil), byte(1))
	f.Add(client.Record(1, nfstest.NFS, 4, 1, nil), byte(0))
	f.Fuzz(func(t *testing.T, stream []byte, step byte) {
		if len(stream) > 1<<16 {
			return
		}
		s.exchange(t, stream, int(step))
	})
}

// FuzzHandle tries handles: only one that was given out is good.
func FuzzHandle(f *testing.F) {
	s, handles := fuzzed(f)
	for _, h := range handles {
		f.Add(h)
		f.Add(append(bytes.Clone(h), 0))
		f.Add(h[:39])
	}
	good := make(map[string]bool)
	for _, h := range handles {
		good[string(h)] = true
	}
	f.Fuzz(func(t *testing.T, fh []byte) {
		client := nfstest.Client{Cred: rpc.Credentials{Flavour: rpc.FlavourSys}}
		reply := s.exchange(t, client.Record(1, nfstest.NFS, 3, getattr, nfstest.HandleArgs(fh)), 0)[1]
		results, err := nfstest.Results(reply)
		if err != nil {
			if len(fh) <= 64 {
				t.Fatalf("handle of %d bytes: %v", len(fh), err)
			}
			return
		}
		r, err := nfstest.Decode(getattr, results)
		if err != nil {
			t.Fatal(err)
		}
		if (r.Status == nfs.StatusOK) && !good[string(fh)] {
			t.Fatalf("handle %x was taken", fh)
		}
	})
}

// FuzzMount tries MOUNT calls: nobody gets a handle of an export that is not for him.
func FuzzMount(f *testing.F) {
	s, _ := fuzzed(f)
	for proc := range byte(7) {
		f.Add(proc, xdr.AppendString(nil, "/default"))
		f.Add(proc, xdr.AppendString(nil, "/default/../secret"))
	}
	f.Fuzz(func(t *testing.T, proc byte, args []byte) {
		client := nfstest.Client{Cred: rpc.Credentials{Flavour: rpc.FlavourSys}}
		reply, ok := s.exchange(t, client.Record(1, nfstest.Mount, 3, uint32(proc), args), 0)[1]
		if !ok {
			if len(args) < rpc.RecordBytesMax-1000 {
				t.Fatal("no reply")
			}
			return
		}
		if results, err := nfstest.Results(reply); err == nil && proc == 1 {
			d := xdr.NewDecoder(results)
			if d.Uint32() == 0 && bytes.Contains(results, []byte{0, 0, 0, 0, 0, 0, 0, 8}) {
				t.Fatalf("MNT %q gave a handle of another's export", args)
			}
		}
	})
}
