package nfs_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"varve/gateway/nfs"
	"varve/gateway/nfs/nfstest"
	"varve/gateway/nfs/rpc"
	"varve/gateway/nfs/xdr"
	"varve/volumedriver/blockio"
)

// body makes a call and returns the reply's body from reply_stat on.
func (c *client) body(prog, vers, proc uint32, args []byte) []byte {
	c.t.Helper()
	if _, err := c.Send(prog, vers, proc, args); err != nil {
		c.t.Fatal(err)
	}
	_, body, err := c.Receive()
	if err != nil {
		c.t.Fatal(err)
	}
	return body
}

func words(v ...uint32) (b []byte) {
	for _, w := range v {
		b = xdr.AppendUint32(b, w)
	}
	return b
}

func TestRPCStatus(t *testing.T) {
	s := serve(t, nfs.Config{})
	c := s.dial()
	accepted := func(stat ...uint32) []byte { return words(append([]uint32{0, 0, 0}, stat...)...) }
	for _, x := range []struct {
		what             string
		prog, vers, proc uint32
		args             []byte
		want             []byte
	}{
		{"null", 100003, 3, 0, nil, accepted(0)},
		{"mount null", 100005, 3, 0, nil, accepted(0)},
		{"nfs 2", 100003, 2, 0, nil, accepted(2, 3, 3)},
		{"nfs 4", 100003, 4, 1, nil, accepted(2, 3, 3)},
		{"mount 1", 100005, 1, 1, nil, accepted(2, 3, 3)},
		{"nlm", 100021, 4, 0, nil, accepted(1)},
		{"nsm", 100024, 1, 0, nil, accepted(1)},
		{"nfsacl", 100227, 3, 0, nil, accepted(1)},
		{"unknown", 1, 1, 0, nil, accepted(1)},
		{"procedure 22", 100003, 3, 22, nil, accepted(3)},
		{"mount procedure 6", 100005, 3, 6, nil, accepted(3)},
		{"no arguments", 100003, 3, 1, nil, accepted(4)},
		{"claimed handle of 1 GiB", 100003, 3, 1, words(1 << 30), accepted(4)},
		{"claimed handle of 2^32-1", 100003, 3, 1, words(math.MaxUint32), accepted(4)},
		{"claimed name of 2^31", 100003, 3, 3, words(4, 0, 1<<31), accepted(4)},
		{"handle of 65", 100003, 3, 1, append(words(65), make([]byte, 68)...), accepted(4)},
		{"path of 2^32-1", 100005, 3, 1, words(math.MaxUint32), accepted(4)},
	} {
		if got := c.body(x.prog, x.vers, x.proc, x.args); !bytes.Equal(got, x.want) {
			t.Errorf("%s: % x, want % x", x.what, got, x.want)
		}
	}

	cred := c.Cred
	c.Cred = rpc.Credentials{Flavour: 6} // RPCSEC_GSS
	if got := c.body(100003, 3, 0, nil); !bytes.Equal(got, words(1, 1, 2)) {
		t.Errorf("RPCSEC_GSS: % x", got)
	}
	c.Cred = cred
	record := c.Record(77, 100003, 3, 0, nil)
	binary.BigEndian.PutUint32(record[12:], 3) // RPC version
	c.Conn.Write(record)
	if _, got, err := c.Receive(); err != nil || !bytes.Equal(got, words(1, 0, 2, 2)) {
		t.Errorf("RPC version 3: % x, %v", got, err)
	}
	for _, groups := range []uint32{17, 1 << 30, math.MaxUint32} {
		b, start := rpc.BeginRecord(nil)
		b = append(b, words(78, 0, 2, 100003, 3, 0, 1, 20, 0, 0, 0, 0, groups, 0, 0)...)
		c.Conn.Write(rpc.EndRecord(b, start))
		if _, got, err := c.Receive(); err != nil || !bytes.Equal(got, words(1, 1, 1)) {
			t.Errorf("%d groups: % x, %v", groups, got, err)
		}
	}
}

// ended tells that the server closed the connection without a further byte.
func (c *client) ended() bool {
	c.Conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	n, err := io.Copy(io.Discard, c.Conn)
	var timeout net.Error
	return n == 0 && !(errors.As(err, &timeout) && timeout.Timeout())
}

func TestRecordLimitsEndTheConnection(t *testing.T) {
	s := serve(t, nfs.Config{})
	for what, b := range map[string][]byte{
		"record of 2 GiB":      words(1<<31 | (1<<31 - 1)),
		"record of limit+1":    words(1<<31 | (rpc.RecordBytesMax + 1)),
		"65 empty fragments":   make([]byte, 4*65),
		"fragments beyond max": append(append(words(1<<20), make([]byte, 1<<20)...), words(1<<20)...),
		"a reply":              words(1<<31|8, 1, 1),
		"too short for a call": words(1<<31|8, 1, 0),
	} {
		c := s.mount("/default")
		if _, err := c.Conn.Write(b); err != nil {
			t.Fatal(err)
		}
		if !c.ended() {
			t.Errorf("%s: connection goes on", what)
		}
	}
}

func TestFragments(t *testing.T) {
	s := serve(t, nfs.Config{})
	c := s.mount("/default")
	fh := c.create("f")
	record := c.Record(5, 100003, 3, write, nfstest.WriteArgs(fh, 0, bytes.Repeat([]byte("x"), 600_000), 2))[4:]
	for _, pieces := range []int{1, 2, 3, 63, 64} {
		var b []byte
		rest := record
		for i := range pieces {
			n := len(rest) / (pieces - i)
			mark := uint32(n)
			if i == pieces-1 {
				mark |= 1 << 31
			}
			b = append(xdr.AppendUint32(b, mark), rest[:n]...)
			rest = rest[n:]
		}
		if _, err := c.Conn.Write(b); err != nil {
			t.Fatal(err)
		}
		_, body, err := c.Receive()
		if err != nil {
			t.Fatal(err)
		}
		results, err := nfstest.Results(body)
		if err != nil {
			t.Fatal(err)
		}
		if r, err := nfstest.Decode(write, results); err != nil || r.Status != 0 || r.Count != 600_000 {
			t.Fatalf("%d fragments: %+v, %v", pieces, r, err)
		}
	}
	// One byte a fragment, one fragment a packet.
	null := c.Record(9, 100003, 3, 0, nil)[4:]
	null = append(null[:24:24], make([]byte, 16)...) // AUTH_NONE twice: 40 bytes
	for i, v := range null {
		mark := uint32(1)
		if i == len(null)-1 {
			mark |= 1 << 31
		}
		c.Conn.Write(append(words(mark), v))
	}
	if xid, _, err := c.Receive(); err != nil || xid != 9 {
		t.Fatalf("one byte fragments: xid %d, %v", xid, err)
	}
}

func TestReadBounds(t *testing.T) {
	for _, busy := range []bool{false, true} {
		t.Run(fmt.Sprintf("busy=%v", busy), func(t *testing.T) {
			s := serve(t, nfs.Config{})
			c := s.mount("/default")
			fh := c.create("f")
			data := make([]byte, 10_001)
			for i := range data {
				data[i] = byte(i * 7)
			}
			c.want(0, write, nfstest.WriteArgs(fh, 0, data, 2))
			s.ns.Behave.Busy.Store(busy)
			size := uint64(len(data))
			for _, x := range []struct {
				off   uint64
				count uint32
				n     int
				eof   bool
			}{
				{0, 0, 0, false}, {0, 1, 1, false}, {0, 10_000, 10_000, false}, {0, 10_001, 10_001, true}, {0, 10_002, 10_001, true},
				{size - 1, 1, 1, true}, {size - 1, 2, 1, true}, {size - 2, 1, 1, false}, {size, 0, 0, true}, {size, 1, 0, true},
				{size + 1, 5, 0, true}, {0, math.MaxUint32, 10_001, true}, {math.MaxUint64, math.MaxUint32, 0, true},
				{math.MaxUint64, 0, 0, true}, {1 << 63, 4096, 0, true}, {5, 3, 3, false},
			} {
				r := c.want(0, read, nfstest.ReadArgs(fh, x.off, x.count))
				if len(r.Data) != x.n || r.EOF != x.eof || x.n > 0 && !bytes.Equal(r.Data, data[x.off:][:x.n]) {
					t.Errorf("READ %d+%d: %d bytes, eof %v; want %d, %v", x.off, x.count, len(r.Data), r.EOF, x.n, x.eof)
				}
				if !r.HasAttr || r.Attr.Size != int64(size) {
					t.Errorf("READ %d+%d: attributes %+v", x.off, x.count, r.Attr)
				}
			}
		})
	}
	s := serve(t, nfs.Config{})
	c := s.mount("/default")
	size := uint64(3 << 20)
	fh := c.want(0, create, nfstest.CreateArgs(c.root, "big", 1, &size)).Handle
	for _, count := range []uint32{1 << 20, 1<<20 + 1, 1 << 31, math.MaxUint32} {
		if r := c.want(0, read, nfstest.ReadArgs(fh, 0, count)); len(r.Data) != 1<<20 || r.EOF {
			t.Errorf("READ of %d gives %d", count, len(r.Data))
		}
	}
	c.want(nfs.StatusIsDir, read, nfstest.ReadArgs(c.root, 0, 1))
}

func TestWriteBounds(t *testing.T) {
	s := serve(t, nfs.Config{})
	c := s.mount("/default")
	fh := c.create("f")
	c.want(0, write, nfstest.WriteArgs(fh, 0, make([]byte, 1<<20), 2))
	max := uint64(64 << 40)
	c.want(0, write, nfstest.WriteArgs(fh, max-4, []byte("tail"), 2))
	c.want(nfs.StatusFBig, write, nfstest.WriteArgs(fh, max-3, []byte("tail"), 2))
	for _, off := range []uint64{max, 1 << 62, 1 << 63, math.MaxUint64} {
		c.want(nfs.StatusFBig, write, nfstest.WriteArgs(fh, off, []byte("x"), 2))
	}
	before := c.want(0, getattr, nfstest.HandleArgs(fh)).Attr
	if r := c.want(0, write, nfstest.WriteArgs(fh, 100, nil, 2)); r.Count != 0 {
		t.Errorf("empty WRITE: %+v", r)
	}
	if after := c.want(0, getattr, nfstest.HandleArgs(fh)).Attr; after.Mtime != before.Mtime {
		t.Error("an empty WRITE changed the file")
	}
	c.want(nfs.StatusIsDir, write, nfstest.WriteArgs(c.root, 0, []byte("x"), 2))

	garbage := words(0, 0, 0, 4)
	claim := func(count, length uint32, data string) []byte {
		b := append(xdr.AppendUint64(nfstest.HandleArgs(fh), 0), words(count, 2, length)...)
		return append(b, data...)
	}
	for what, args := range map[string][]byte{
		"count beyond data":      claim(9, 8, "12345678"),
		"data beyond the record": claim(8, 12, "12345678"),
		"length of 2^32-1":       claim(8, math.MaxUint32, "12345678"),
		"length of 2^31":         claim(8, 1<<31, "12345678"),
		"stable_how 3":           append(xdr.AppendUint64(nfstest.HandleArgs(fh), 0), words(0, 3, 0)...),
	} {
		if got := c.body(100003, 3, write, args); !bytes.Equal(got, garbage) {
			t.Errorf("%s: % x", what, got)
		}
	}
	if r := c.want(0, write, claim(4, 8, "12345678")); r.Count != 4 {
		t.Errorf("count below data: %+v", r)
	}
}

func TestNames(t *testing.T) {
	s := serve(t, nfs.Config{})
	c := s.mount("/default")
	c.create("f")
	c.want(0, mkdir, append(nfstest.NameArgs(c.root, "d"), nfstest.SetArgs(nil, nil)...))
	long := strings.Repeat("n", 255)
	set := nfstest.SetArgs(nil, nil)
	mk := func(name string) []byte { return append(nfstest.NameArgs(c.root, name), set...) }
	for _, x := range []struct {
		name                        string
		make, look, remove, moveOut nfs.Status
	}{
		{"", nfs.StatusAcces, nfs.StatusAcces, nfs.StatusAcces, nfs.StatusAcces},
		{".", nfs.StatusExist, nfs.StatusOK, nfs.StatusInval, nfs.StatusInval},
		{"..", nfs.StatusExist, nfs.StatusOK, nfs.StatusExist, nfs.StatusExist},
		{"a/b", nfs.StatusInval, nfs.StatusAcces, nfs.StatusInval, nfs.StatusInval},
		{"a\x00b", nfs.StatusInval, nfs.StatusAcces, nfs.StatusInval, nfs.StatusInval},
		{long + "x", nfs.StatusNameTooLong, nfs.StatusNameTooLong, nfs.StatusNameTooLong, nfs.StatusNameTooLong},
		{strings.Repeat("n", 100_000), nfs.StatusNameTooLong, nfs.StatusNameTooLong, nfs.StatusNameTooLong, nfs.StatusNameTooLong},
	} {
		what := fmt.Sprintf("%.10q", x.name)
		check := func(op string, proc uint32, args []byte, want nfs.Status) {
			if r := c.do(proc, args); r.Status != want {
				t.Errorf("%s %s: status %d, want %d", op, what, r.Status, want)
			}
		}
		check("CREATE", create, nfstest.CreateArgs(c.root, x.name, 0, nil), x.make)
		check("MKDIR", mkdir, mk(x.name), x.make)
		check("SYMLINK", symlink, xdr.AppendString(mk(x.name), "t"), x.make)
		check("MKNOD", mknod, append(xdr.AppendUint32(nfstest.NameArgs(c.root, x.name), 7), set...), x.make)
		check("RENAME to", rename, append(nfstest.NameArgs(c.root, "f"), nfstest.NameArgs(c.root, x.name)...), x.make)
		check("LOOKUP", lookup, nfstest.NameArgs(c.root, x.name), x.look)
		check("REMOVE", remove, nfstest.NameArgs(c.root, x.name), x.remove)
		check("RMDIR", rmdir, nfstest.NameArgs(c.root, x.name), x.remove)
		check("RENAME from", rename, append(nfstest.NameArgs(c.root, x.name), nfstest.NameArgs(c.root, "g")...), x.moveOut)
	}
	for _, name := range []string{long, "trailing ", " ", "-", "\xff\xfe", "ümlaut", "...", "~"} {
		c.create(name)
		c.want(0, lookup, nfstest.NameArgs(c.root, name))
		c.want(0, remove, nfstest.NameArgs(c.root, name))
		c.want(nfs.StatusNoEnt, lookup, nfstest.NameArgs(c.root, name))
	}
}

func TestNobodyClimbsOutOfAnExport(t *testing.T) {
	s := serve(t, nfs.Config{}, nfstest.Loopback(7, "/default"), nfstest.Loopback(8, "/other"))
	c := s.mount("/default")
	if r := c.want(0, lookup, nfstest.NameArgs(c.root, "..")); !bytes.Equal(r.Handle, c.root) {
		t.Error("\"..\" of the root is not the root")
	}
	d := c.want(0, mkdir, append(nfstest.NameArgs(c.root, "d"), nfstest.SetArgs(nil, nil)...)).Handle
	if r := c.want(0, lookup, nfstest.NameArgs(d, "..")); !bytes.Equal(r.Handle, c.root) {
		t.Error("\"..\" of a directory is not its parent")
	}
	for _, p := range []string{"/default/..", "/default/../..", "/default/../../etc", "", "/", "default2", "/defaultx", "/etc"} {
		if fh, status, err := c.MountExport(p); err != nil || status != nfs.StatusNoEnt {
			t.Errorf("MNT %q: status %d, handle %x, %v", p, status, fh, err)
		}
	}
	for _, p := range []string{"/default", "/default/", "default", "//default//", "/default/d/.."} {
		if fh, status, err := c.MountExport(p); err != nil || status != 0 || !bytes.Equal(fh, c.root) {
			t.Errorf("MNT %q: status %d, %v", p, status, err)
		}
	}
	if fh, status, _ := c.MountExport("/default/d"); status != 0 || !bytes.Equal(fh, d) {
		t.Errorf("MNT of a directory below: status %d", status)
	}
	// Across exports.
	o := s.mount("/other")
	c.create("f")
	c.want(nfs.StatusXDev, rename, append(nfstest.NameArgs(c.root, "f"), nfstest.NameArgs(o.root, "f")...))
	f := c.create("f")
	c.want(nfs.StatusXDev, link, append(nfstest.HandleArgs(f), nfstest.NameArgs(o.root, "f")...))
}

func TestHandles(t *testing.T) {
	s := serve(t, nfs.Config{})
	c := s.mount("/default")
	fh := c.create("f")
	if len(fh) != 40 {
		t.Fatalf("handle of %d bytes", len(fh))
	}
	for i := range fh {
		bad := bytes.Clone(fh)
		bad[i] ^= 1
		want := nfs.StatusBadHandle
		if i >= 4 && i < 12 {
			want = nfs.StatusStale // of an export that there is not
		}
		c.want(want, getattr, nfstest.HandleArgs(bad))
	}
	for n := range 65 {
		if n != 40 {
			c.want(nfs.StatusBadHandle, getattr, nfstest.HandleArgs(make([]byte, n)))
		}
	}
	c.want(0, remove, nfstest.NameArgs(c.root, "f"))
	for _, proc := range []uint32{getattr, read, write, commit, access, setattr} {
		args := nfstest.HandleArgs(fh)
		switch proc {
		case read, commit:
			args = nfstest.ReadArgs(fh, 0, 10)
		case write:
			args = nfstest.WriteArgs(fh, 0, []byte("x"), 2)
		case access:
			args = append(args, words(1)...)
		case setattr:
			args = append(append(args, nfstest.SetArgs(nil, nil)...), words(0)...)
		}
		c.want(nfs.StatusStale, proc, args)
	}
	// Handles survive a restart of the server.
	fh = c.create("g")
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	again := nfs.New(nfs.Config{Namespace: s.ns, Verifier: verifier})
	stop := runServer(t, again, ln)
	defer stop()
	nc, err := nfstest.Dial(ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	if r, err := nc.Do(getattr, nfstest.HandleArgs(fh)); err != nil || r.Status != 0 {
		t.Fatalf("GETATTR after restart: %+v, %v", r, err)
	}
}

func TestAllowListIsCheckedOnEveryCall(t *testing.T) {
	b := nfstest.Loopback(8, "/b")
	b.Clients = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
	none := nfstest.Loopback(9, "/none")
	none.Clients = nil
	s := serve(t, nfs.Config{}, nfstest.Loopback(7, "/a"), b, none)
	c := s.mount("/a")
	for _, p := range []string{"/b", "/none"} {
		if _, status, err := c.MountExport(p); err != nil || status != nfs.StatusAcces {
			t.Errorf("MNT %s: status %d, %v", p, status, err)
		}
	}
	// A good handle of /b, as an allowed client would know it.
	allow := func(e []nfs.Export) []nfs.Export {
		e[1].Clients = append(e[1].Clients, netip.MustParsePrefix("127.0.0.1/32"))
		return e
	}
	s.ns.SetExports(allow)
	fh, status, err := c.MountExport("/b")
	if err != nil || status != 0 {
		t.Fatalf("MNT once allowed: %d, %v", status, err)
	}
	f := c.want(0, create, nfstest.CreateArgs(fh, "secret", 0, nil)).Handle
	s.ns.SetExports(func(e []nfs.Export) []nfs.Export { e[1].Clients = e[1].Clients[:1]; return e })
	time.Sleep(300 * time.Millisecond) // a change of the allow list may take that long
	for proc, args := range map[uint32][]byte{
		getattr:     nfstest.HandleArgs(f),
		read:        nfstest.ReadArgs(f, 0, 10),
		write:       nfstest.WriteArgs(f, 0, []byte("x"), 2),
		commit:      nfstest.ReadArgs(f, 0, 0),
		lookup:      nfstest.NameArgs(fh, "secret"),
		remove:      nfstest.NameArgs(fh, "secret"),
		create:      nfstest.CreateArgs(fh, "x", 0, nil),
		readdir:     nfstest.ListArgs(fh, 0, 0, 4096),
		readdirplus: nfstest.ListArgs(fh, 0, 4096, 4096),
		fsstat:      nfstest.HandleArgs(fh),
		fsinfo:      nfstest.HandleArgs(fh),
		rename:      append(nfstest.NameArgs(fh, "secret"), nfstest.NameArgs(c.root, "mine")...),
		mkdir:       append(nfstest.NameArgs(fh, "d"), nfstest.SetArgs(nil, nil)...),
		readlink:    nfstest.HandleArgs(f),
	} {
		if r := c.do(proc, args); r.Status != nfs.StatusAcces {
			t.Errorf("procedure %d on a handle of another's export: status %d", proc, r.Status)
		}
	}
}

func TestExclusiveCreate(t *testing.T) {
	s := serve(t, nfs.Config{})
	c := s.mount("/default")
	mine, other := [8]byte{1}, [8]byte{2}
	first := c.want(0, create, nfstest.ExclusiveArgs(c.root, ".lck-1", mine))
	again := c.want(0, create, nfstest.ExclusiveArgs(c.root, ".lck-1", mine))
	if !bytes.Equal(first.Handle, again.Handle) {
		t.Error("the same verifier gives another file")
	}
	c.want(nfs.StatusExist, create, nfstest.ExclusiveArgs(c.root, ".lck-1", other))
	c.want(nfs.StatusExist, create, nfstest.CreateArgs(c.root, ".lck-1", 1, nil))
	c.want(0, write, nfstest.WriteArgs(first.Handle, 0, []byte("owner"), 2))
	if r := c.want(0, create, nfstest.CreateArgs(c.root, ".lck-1", 0, nil)); r.Attr.Size != 5 {
		t.Errorf("UNCHECKED create of an existing file left %d bytes, want 5", r.Attr.Size)
	}
	size := uint64(2)
	if r := c.want(0, create, nfstest.CreateArgs(c.root, ".lck-1", 0, &size)); r.Attr.Size != 2 {
		t.Errorf("UNCHECKED create with size 2 left %d bytes", r.Attr.Size)
	}
	c.want(0, mkdir, append(nfstest.NameArgs(c.root, "d"), nfstest.SetArgs(nil, nil)...))
	c.want(nfs.StatusExist, create, nfstest.CreateArgs(c.root, "d", 0, nil))
	c.want(nfs.StatusExist, mkdir, append(nfstest.NameArgs(c.root, "d"), nfstest.SetArgs(nil, nil)...))
	c.want(nfs.StatusExist, mkdir, append(nfstest.NameArgs(c.root, ".lck-1"), nfstest.SetArgs(nil, nil)...))
	c.want(nfs.StatusNotDir, create, nfstest.CreateArgs(first.Handle, "x", 0, nil))
}

func TestRenameAndRemove(t *testing.T) {
	s := serve(t, nfs.Config{})
	c := s.mount("/default")
	dir := func(in []byte, name string) []byte {
		return c.want(0, mkdir, append(nfstest.NameArgs(in, name), nfstest.SetArgs(nil, nil)...)).Handle
	}
	move := func(status nfs.Status, fd []byte, from string, td []byte, to string) nfstest.Reply {
		t.Helper()
		return c.want(status, rename, append(nfstest.NameArgs(fd, from), nfstest.NameArgs(td, to)...))
	}
	a, b := c.create("a"), c.create("b")
	c.want(0, write, nfstest.WriteArgs(a, 0, []byte("aaa"), 2))
	c.want(0, write, nfstest.WriteArgs(b, 0, []byte("b"), 2))
	move(0, c.root, "a", c.root, "b")
	if r := c.want(0, lookup, nfstest.NameArgs(c.root, "b")); !bytes.Equal(r.Handle, a) || r.Attr.Size != 3 {
		t.Error("RENAME over an existing file did not replace it")
	}
	c.want(nfs.StatusStale, getattr, nfstest.HandleArgs(b))
	c.want(0, getattr, nfstest.HandleArgs(a)) // the handle goes with the file
	c.want(nfs.StatusNoEnt, lookup, nfstest.NameArgs(c.root, "a"))
	move(nfs.StatusNoEnt, c.root, "a", c.root, "x")
	move(0, c.root, "b", c.root, "b")

	d, e := dir(c.root, "d"), dir(c.root, "e")
	dir(e, "sub")
	r := move(0, c.root, "b", d, "b")
	if !r.Wcc.HasPre || !r.Wcc2.HasPre || r.Wcc.Post.Inode == r.Wcc2.Post.Inode || !r.Wcc.Post.Mtime.After(r.Wcc.Mtime) {
		t.Errorf("wcc of RENAME between directories: %+v %+v", r.Wcc, r.Wcc2)
	}
	move(nfs.StatusNotEmpty, c.root, "d", c.root, "e")
	move(nfs.StatusExist, c.root, "d", d, "b")
	move(nfs.StatusInval, c.root, "d", d, "inside")
	c.create("file")
	move(nfs.StatusExist, c.root, "file", c.root, "d")
	move(nfs.StatusExist, c.root, "d", c.root, "file")

	c.want(nfs.StatusIsDir, remove, nfstest.NameArgs(c.root, "d"))
	c.want(nfs.StatusNotDir, rmdir, nfstest.NameArgs(c.root, "file"))
	c.want(nfs.StatusNotEmpty, rmdir, nfstest.NameArgs(c.root, "d"))
	c.want(nfs.StatusNoEnt, remove, nfstest.NameArgs(c.root, "none"))
	c.want(nfs.StatusNoEnt, rmdir, nfstest.NameArgs(c.root, "none"))
	c.want(nfs.StatusNotDir, remove, nfstest.NameArgs(a, "x"))
	c.want(0, remove, nfstest.NameArgs(d, "b"))
	empty := dir(c.root, "empty")
	move(0, c.root, "empty", c.root, "d") // an empty directory over an empty one
	if r := c.want(0, lookup, nfstest.NameArgs(c.root, "d")); !bytes.Equal(r.Handle, empty) {
		t.Error("RENAME over an empty directory did not replace it")
	}
	r = c.want(0, rmdir, nfstest.NameArgs(c.root, "d"))
	if !r.Wcc.HasPre || !r.Wcc.HasPost || !r.Wcc.Post.Mtime.After(r.Wcc.Mtime) {
		t.Errorf("wcc of RMDIR: %+v", r.Wcc)
	}
}

func TestForwardedProcedures(t *testing.T) {
	s := serve(t, nfs.Config{})
	c := s.mount("/default")
	set := nfstest.SetArgs(nil, nil)
	mode := uint32(0o711)
	r := c.want(0, mkdir, append(nfstest.NameArgs(c.root, "d"), nfstest.SetArgs(&mode, nil)...))
	if r.Attr.Mode != 0o711 || r.Attr.FSID != 7 || r.Attr.Kind != nfs.Dir || !r.Wcc.HasPre || !r.Wcc.HasPost {
		t.Errorf("MKDIR: %+v", r)
	}
	for _, target := range []string{"t", "../../etc/passwd", "/etc/passwd", strings.Repeat("x/", 2048)} {
		name := fmt.Sprintf("l%d", len(target))
		l := c.want(0, symlink, xdr.AppendString(append(nfstest.NameArgs(c.root, name), set...), target))
		if l.Attr.Kind != nfs.Symlink {
			t.Errorf("SYMLINK: %+v", l.Attr)
		}
		if got := c.want(0, readlink, nfstest.HandleArgs(l.Handle)); got.Target != target || got.Attr.Inode != l.Attr.Inode {
			t.Errorf("READLINK: %+v", got)
		}
	}
	long := strings.Repeat("x", 4097)
	c.want(nfs.StatusNameTooLong, symlink, xdr.AppendString(append(nfstest.NameArgs(c.root, "long"), set...), long))
	c.want(nfs.StatusExist, symlink, xdr.AppendString(append(nfstest.NameArgs(c.root, "d"), set...), "t"))
	c.want(nfs.StatusInval, readlink, nfstest.HandleArgs(r.Handle))
	node := func(kind uint32, name string, more ...byte) []byte {
		return append(append(xdr.AppendUint32(nfstest.NameArgs(c.root, name), kind), set...), more...)
	}
	if r := c.want(0, mknod, node(6, "socket")); r.Attr.Kind != nfs.Socket {
		t.Errorf("MKNOD socket: %+v", r.Attr)
	}
	if r := c.want(0, mknod, node(7, "fifo")); r.Attr.Kind != nfs.FIFO {
		t.Errorf("MKNOD fifo: %+v", r.Attr)
	}
	c.want(nfs.StatusNotSupp, mknod, node(4, "chr", make([]byte, 8)...))
	c.want(nfs.StatusNotSupp, mknod, node(3, "blk", make([]byte, 8)...))
	for _, kind := range []uint32{0, 1, 2, 5, 8, math.MaxUint32} {
		c.want(nfs.StatusBadType, mknod, xdr.AppendUint32(nfstest.NameArgs(c.root, "x"), kind))
	}
	c.want(nfs.StatusNoEnt, lookup, nfstest.NameArgs(c.root, "chr"))
}

func TestPermissions(t *testing.T) {
	squashed := nfstest.Loopback(7, "/squashed")
	squashed.RootSquash = true
	all := nfstest.Loopback(8, "/all")
	all.AllSquash, all.AnonUID, all.AnonGID = true, 1234, 1235
	ro := nfstest.Loopback(9, "/ro")
	ro.ReadOnly = true
	s := serve(t, nfs.Config{}, nfstest.Loopback(6, "/open"), squashed, all, ro)
	as := func(c *client, uid, gid uint32, groups ...uint32) {
		c.Cred.UID, c.Cred.GID = uid, gid
		c.Cred.SetGroups(groups)
	}
	c := s.mount("/open")
	mode := func(fh []byte, m uint32) []byte {
		return append(append(nfstest.HandleArgs(fh), nfstest.SetArgs(&m, nil)...), words(0)...)
	}
	as(c, 100, 200)
	f := c.want(0, create, nfstest.CreateArgs(c.root, "f", 0, nil))
	if f.Attr.UID != 100 || f.Attr.GID != 200 {
		t.Fatalf("owner of a new file: %d:%d", f.Attr.UID, f.Attr.GID)
	}
	c.want(0, setattr, mode(f.Handle, 0o640))
	bits := func() uint32 {
		return c.want(0, access, append(nfstest.HandleArgs(f.Handle), words(0x3f)...)).Access
	}
	const r, w = 0x01, 0x04 | 0x08
	if got := bits(); got != r|w {
		t.Errorf("owner: %#x", got)
	}
	as(c, 101, 200)
	if got := bits(); got != r {
		t.Errorf("group: %#x", got)
	}
	c.want(0, read, nfstest.ReadArgs(f.Handle, 0, 1))
	c.want(nfs.StatusAcces, write, nfstest.WriteArgs(f.Handle, 0, []byte("x"), 2))
	c.want(nfs.StatusPerm, setattr, mode(f.Handle, 0o777))
	as(c, 101, 201, 5, 200)
	if got := bits(); got != r {
		t.Errorf("supplementary group: %#x", got)
	}
	as(c, 101, 201)
	if got := bits(); got != 0 {
		t.Errorf("others: %#x", got)
	}
	c.want(nfs.StatusAcces, read, nfstest.ReadArgs(f.Handle, 0, 1))
	c.want(nfs.StatusAcces, commit, nfstest.ReadArgs(f.Handle, 0, 0))
	size := uint64(0)
	c.want(nfs.StatusAcces, setattr, append(append(nfstest.HandleArgs(f.Handle), nfstest.SetArgs(nil, &size)...), words(0)...))
	as(c, 0, 0)
	if got := bits(); got != r|w {
		t.Errorf("root: %#x", got)
	}
	c.want(0, write, nfstest.WriteArgs(f.Handle, 0, []byte("x"), 2))
	// chown is root's.
	chown := append(nfstest.HandleArgs(f.Handle), words(0, 1, 101, 0, 0, 0, 0, 0)...)
	as(c, 100, 200)
	c.want(nfs.StatusPerm, setattr, chown)
	as(c, 0, 0)
	c.want(0, setattr, chown)
	// A directory only its owner may write to, and a sticky one.
	as(c, 100, 200)
	d := c.want(0, mkdir, append(nfstest.NameArgs(c.root, "d"), nfstest.SetArgs(nil, nil)...)).Handle
	as(c, 101, 201)
	c.want(nfs.StatusAcces, create, nfstest.CreateArgs(d, "x", 0, nil))
	c.want(nfs.StatusAcces, mkdir, append(nfstest.NameArgs(d, "x"), nfstest.SetArgs(nil, nil)...))
	as(c, 100, 200)
	c.want(0, setattr, mode(d, 0o1777))
	c.want(0, create, nfstest.CreateArgs(d, "mine", 0, nil))
	as(c, 101, 201)
	c.want(0, create, nfstest.CreateArgs(d, "theirs", 0, nil))
	c.want(nfs.StatusPerm, remove, nfstest.NameArgs(d, "mine"))
	c.want(nfs.StatusPerm, rename, append(nfstest.NameArgs(d, "mine"), nfstest.NameArgs(d, "m")...))
	c.want(nfs.StatusPerm, rename, append(nfstest.NameArgs(d, "theirs"), nfstest.NameArgs(d, "mine")...))
	as(c, 100, 200)
	c.want(0, setattr, mode(d, 0o700))
	as(c, 101, 201)
	c.want(nfs.StatusAcces, lookup, nfstest.NameArgs(d, "mine"))
	c.want(nfs.StatusAcces, readdir, nfstest.ListArgs(d, 0, 0, 4096))

	q := s.mount("/squashed")
	if r := q.want(0, create, nfstest.CreateArgs(q.root, "f", 0, nil)); r.Attr.UID != 65534 || r.Attr.GID != 65534 {
		t.Errorf("root's file under root_squash is %d:%d", r.Attr.UID, r.Attr.GID)
	}
	n := s.mount("/all")
	as(n, 100, 200)
	if r := n.want(0, create, nfstest.CreateArgs(n.root, "f", 0, nil)); r.Attr.UID != 1234 || r.Attr.GID != 1235 {
		t.Errorf("file under all_squash is %d:%d", r.Attr.UID, r.Attr.GID)
	}
	n.Cred = rpc.Credentials{}
	if r := n.want(0, create, nfstest.CreateArgs(n.root, "g", 0, nil)); r.Attr.UID != 1234 {
		t.Errorf("file of AUTH_NONE is of user %d", r.Attr.UID)
	}

	o := s.mount("/ro")
	o.want(nfs.StatusROFS, create, nfstest.CreateArgs(o.root, "f", 0, nil))
	o.want(nfs.StatusROFS, mkdir, append(nfstest.NameArgs(o.root, "d"), nfstest.SetArgs(nil, nil)...))
	o.want(nfs.StatusROFS, remove, nfstest.NameArgs(o.root, "f"))
	o.want(nfs.StatusROFS, setattr, mode(o.root, 0o700))
	if r := o.want(0, access, append(nfstest.HandleArgs(o.root), words(0x3f)...)); r.Access != 0x01|0x02 {
		t.Errorf("ACCESS of a read-only export: %#x", r.Access)
	}
}

func TestWccShowsOnlyOwnChange(t *testing.T) {
	s := serve(t, nfs.Config{})
	c := s.mount("/default")
	fh := c.create("f")
	before := c.want(0, getattr, nfstest.HandleArgs(fh)).Attr
	for i := range 5 {
		r := c.want(0, write, nfstest.WriteArgs(fh, uint64(i*10), []byte("0123456789"), 2))
		if !r.Wcc.HasPre || r.Wcc.PreSize != uint64(before.Size) || !r.Wcc.Mtime.Equal(before.Mtime) || !r.Wcc.Ctime.Equal(before.Ctime) {
			t.Fatalf("WRITE %d: pre %+v, want %+v", i, r.Wcc, before)
		}
		if r.Wcc.Post.Size != int64(i*10+10) || !r.Wcc.Post.Mtime.After(before.Mtime) {
			t.Fatalf("WRITE %d: post %+v", i, r.Wcc.Post)
		}
		before = r.Wcc.Post
	}
	// Two changes at once: neither may pretend that it was alone.
	s.ns.Behave.Background.Store(true)
	s.ns.Behave.Delay.Store(int64(30 * time.Millisecond))
	var b []byte
	for i := range 2 {
		b = append(b, c.Record(uint32(50+i), 100003, 3, write, nfstest.WriteArgs(fh, uint64(i), []byte("x"), 2))...)
	}
	c.Conn.Write(b)
	for range 2 {
		if r := c.receive(write); r.Status != 0 || r.Wcc.HasPre {
			t.Error("attributes from before a WRITE that was not alone")
		}
	}
	s.ns.Behave.Background.Store(false)
	// Directories.
	dir := c.want(0, getattr, nfstest.HandleArgs(c.root)).Attr
	r := c.want(0, create, nfstest.CreateArgs(c.root, "g", 1, nil))
	if !r.Wcc.HasPre || !r.Wcc.Mtime.Equal(dir.Mtime) || !r.Wcc.Post.Mtime.After(dir.Mtime) {
		t.Errorf("CREATE: %+v", r.Wcc)
	}
	// A guard that no longer holds.
	guard := append(nfstest.HandleArgs(fh), nfstest.SetArgs(nil, nil)...)
	guard = append(guard, words(1, uint32(before.Ctime.Unix()), uint32(before.Ctime.Nanosecond()))...)
	c.want(nfs.StatusNotSync, setattr, guard)
}

func TestFileSystemProcedures(t *testing.T) {
	s := serve(t, nfs.Config{})
	c := s.mount("/default")
	fh := c.create("f")
	c.want(0, write, nfstest.WriteArgs(fh, 0, make([]byte, 1<<20), 2))
	stat := c.want(0, fsstat, nfstest.HandleArgs(c.root)).Numbers
	if stat[0] != 1<<40 || stat[1] != 1<<40-1<<20-4096 || stat[2] != stat[1] || stat[3] != 1<<20 || stat[4] != 1<<20-2 {
		t.Errorf("FSSTAT: %v", stat)
	}
	info := c.want(0, fsinfo, nfstest.HandleArgs(c.root)).Numbers
	want := []uint64{1 << 20, 1 << 20, 4096, 1 << 20, 1 << 20, 4096, 64 << 10, 64 << 40, 0, 1, 0x1a}
	if fmt.Sprint(info) != fmt.Sprint(want) {
		t.Errorf("FSINFO: %v, want %v", info, want)
	}
	if conf := c.want(0, pathconf, nfstest.HandleArgs(c.root)).Numbers; fmt.Sprint(conf) != "[1 255 1 1 0 1]" {
		t.Errorf("PATHCONF: %v", conf)
	}
	for _, proc := range []uint32{fsstat, fsinfo, pathconf} {
		if r := c.want(nfs.StatusBadHandle, proc, nfstest.HandleArgs([]byte("bad"))); r.HasAttr {
			t.Error("attributes with a bad handle")
		}
	}
	c.want(0, link, append(nfstest.HandleArgs(fh), nfstest.NameArgs(c.root, "second")...))
	if a := c.want(0, getattr, nfstest.HandleArgs(fh)).Attr; a.Nlink != 2 {
		t.Errorf("%d links", a.Nlink)
	}
}

func TestMountProtocol(t *testing.T) {
	b := nfstest.Loopback(8, "/secret")
	b.Clients = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
	s := serve(t, nfs.Config{}, nfstest.Loopback(7, "/default"), b)
	c := s.mount("/default")
	call := func(proc uint32, args []byte) *xdr.Decoder {
		t.Helper()
		results, err := c.Call(nfstest.Mount, 3, proc, args)
		if err != nil {
			t.Fatal(err)
		}
		d := xdr.NewDecoder(results)
		return &d
	}
	d := call(5, nil) // EXPORT
	if !d.Bool() || string(d.Opaque(100)) != "/default" || !d.Bool() || string(d.Opaque(100)) != "127.0.0.0/8" || !d.Bool() ||
		string(d.Opaque(100)) != "::1/128" || d.Bool() || d.Bool() || d.Bad() || len(d.Rest()) > 0 {
		t.Error("EXPORT shows other than what this client may use")
	}
	listed := func() (n int) {
		d := call(2, nil)
		for d.Bool() {
			if string(d.Opaque(100)) != "127.0.0.1" || string(d.Opaque(100)) != "/default" {
				t.Error("DUMP shows something else")
			}
			n++
		}
		return n
	}
	if listed() != 1 {
		t.Error("DUMP does not show the mount once")
	}
	call(3, xdr.AppendString(nil, "/default/"))
	if listed() != 0 {
		t.Error("DUMP shows an unmounted path")
	}
	s.mount("/default")
	call(4, nil)
	if listed() != 0 {
		t.Error("DUMP shows mounts after UMNTALL")
	}
}

// failing makes every write and flush end with err.
func (s *served) failing(err error) { s.ns.Behave.Fail.Store(&err) }

func TestErrorsOfTheDriver(t *testing.T) {
	for _, busy := range []bool{false, true} {
		s := serve(t, nfs.Config{})
		c := s.mount("/default")
		fh := c.create("f")
		c.want(0, write, nfstest.WriteArgs(fh, 0, []byte("x"), 2))
		s.ns.Behave.Busy.Store(busy)
		for err, want := range map[error]nfs.Status{
			blockio.ErrNoSpace: nfs.StatusNoSpc, blockio.ErrReadOnly: nfs.StatusROFS, blockio.ErrCorrupt: nfs.StatusIO,
			fmt.Errorf("write: %w", blockio.ErrNoSpace): nfs.StatusNoSpc, errors.New("disk on fire"): nfs.StatusIO,
		} {
			s.failing(err)
			c.want(want, write, nfstest.WriteArgs(fh, 0, []byte("x"), 0))
			c.want(want, commit, nfstest.ReadArgs(fh, 0, 0))
		}
		// An unknown outcome is answered by silence.
		s.failing(fmt.Errorf("sync: %w", blockio.ErrFenced))
		if _, err := c.Send(nfstest.NFS, 3, write, nfstest.WriteArgs(fh, 0, []byte("x"), 2)); err != nil {
			t.Fatal(err)
		}
		if !c.ended() {
			t.Errorf("busy=%v: a write of unknown outcome was answered", busy)
		}
	}
}

// cutPower writes in every way, cuts the power after each, and returns what was lost though it was promised.
func cutPower(s *served) (lost []string) {
	c := s.mount("/default")
	fh := c.create("f")
	c.want(0, write, nfstest.WriteArgs(fh, 0, []byte("...."), 2)) // opens the file, so that what follows need not wait
	at := func(stable uint32, off uint64, what string) {
		c.want(0, write, nfstest.WriteArgs(fh, off<<20, []byte(what), stable))
	}
	check := func(off int, what string) {
		b := s.ns.File(7, "f").Bytes()
		if len(b) < off<<20+4 || string(b[off<<20:][:4]) != what {
			lost = append(lost, what)
		}
	}
	at(2, 1, "sync")
	at(1, 2, "data")
	s.ns.Crash()
	check(1, "sync")
	check(2, "data")
	at(0, 4, "comm")
	c.want(0, commit, nfstest.ReadArgs(fh, 0, 0))
	at(0, 5, "none")
	s.ns.Crash()
	check(4, "comm")
	before := len(lost)
	if check(5, "none"); len(lost) == before {
		s.t.Error("the test's files keep what nobody made durable")
	}
	return lost[:before]
}

// TestStableWritesSurviveAPowerCut is the promise of FILE_SYNC, DATA_SYNC and COMMIT.
func TestStableWritesSurviveAPowerCut(t *testing.T) {
	for _, mode := range []string{"inline", "busy", "background"} {
		t.Run(mode, func(t *testing.T) {
			s := serve(t, nfs.Config{})
			s.ns.Behave.Busy.Store(mode == "busy")
			s.ns.Behave.Background.Store(mode == "background")
			if lost := cutPower(s); len(lost) > 0 {
				t.Errorf("lost %v", lost)
			}
		})
	}
}

// TestALieIsFound: the check above sees files that claim durability without giving it.
func TestALieIsFound(t *testing.T) {
	s := serve(t, nfs.Config{})
	s.ns.Behave.Lie.Store(true)
	if lost := cutPower(s); fmt.Sprint(lost) != "[sync data comm]" {
		t.Errorf("lost %v", lost)
	}
}

func TestVerifierOfAWriteIsReadBeforeIt(t *testing.T) {
	var now atomic.Uint32
	s := serve(t, nfs.Config{Verifier: func() [8]byte { return [8]byte{byte(now.Load())} }})
	c := s.mount("/default")
	fh := c.create("f")
	c.want(0, write, nfstest.WriteArgs(fh, 0, []byte("x"), 0))
	now.Store(1)
	s.ns.Behave.Background.Store(true)
	hold := make(chan struct{})
	s.ns.Behave.Hold.Store(&hold)
	kicks := s.ns.Behave.Kicks.Load()
	if _, err := c.Send(nfstest.NFS, 3, write, nfstest.WriteArgs(fh, 0, []byte("x"), 0)); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the WRITE to be submitted", func() bool { return s.ns.Behave.Kicks.Load() > kicks })
	now.Store(2) // data accepted under verifier 1 may be lost from here on
	close(hold)
	if r := c.receive(write); r.Verifier[0] != 1 {
		t.Fatalf("WRITE's verifier is %v", r.Verifier)
	}
	if r := c.want(0, commit, nfstest.ReadArgs(fh, 0, 0)); r.Verifier[0] != 2 {
		t.Fatalf("COMMIT's verifier is %v", r.Verifier)
	}
}

// waitFor polls until a condition that the test cannot be told of holds.
func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited too long for %s", what)
		}
	}
}

// receive decodes the next reply.
func (c *client) receive(proc uint32) nfstest.Reply {
	c.t.Helper()
	_, body, err := c.Receive()
	if err != nil {
		c.t.Fatal(err)
	}
	results, err := nfstest.Results(body)
	if err != nil {
		c.t.Fatal(err)
	}
	r, err := nfstest.Decode(proc, results)
	if err != nil {
		c.t.Fatal(err)
	}
	return r
}
