package nfs_test

import (
	"fmt"
	"testing"
	"time"

	"varve/gateway/nfs"
	"varve/gateway/nfs/nfstest"
	"varve/gateway/nfs/rpc"
)

// BenchmarkCalls keeps depth calls of one kind in flight on one connection to files in memory. The client is in the same
// process, so its cost is in the figures.
func BenchmarkCalls(b *testing.B) {
	for _, x := range []struct {
		name string
		proc uint32
		args func(fh []byte) []byte
		size int
	}{
		{"GETATTR", getattr, nfstest.HandleArgs, 0},
		{"READ4k", read, func(fh []byte) []byte { return nfstest.ReadArgs(fh, 4096, 4096) }, 4096},
		{"WRITE4k", write, func(fh []byte) []byte { return nfstest.WriteArgs(fh, 4096, make([]byte, 4096), 0) }, 4096},
		{"WRITE4kSYNC", write, func(fh []byte) []byte { return nfstest.WriteArgs(fh, 4096, make([]byte, 4096), 2) }, 4096},
		{"READ1M", read, func(fh []byte) []byte { return nfstest.ReadArgs(fh, 0, 1<<20) }, 1 << 20},
		{"WRITE1M", write, func(fh []byte) []byte { return nfstest.WriteArgs(fh, 0, make([]byte, 1<<20), 0) }, 1 << 20},
		{"LOOKUP", lookup, nil, 0},
		{"MKDIRexist", mkdir, nil, 0},
	} {
		for _, depth := range []int{1, 16} {
			b.Run(fmt.Sprintf("%s/%d", x.name, depth), func(b *testing.B) {
				s := serve(b, nfs.Config{})
				c := s.mount("/default")
				fh := c.create("f")
				c.want(0, write, nfstest.WriteArgs(fh, 0, make([]byte, 1<<20), 2))
				var args []byte
				switch {
				case x.proc == lookup:
					args = nfstest.NameArgs(c.root, "f")
				case x.proc == mkdir:
					args = append(nfstest.NameArgs(c.root, "f"), nfstest.SetArgs(nil, nil)...)
				default:
					args = x.args(fh)
				}
				call := c.Record(1, nfstest.NFS, 3, x.proc, args)
				if _, err := c.Conn.Write(call); err != nil {
					b.Fatal(err)
				}
				if _, _, err := c.Receive(); err != nil {
					b.Fatal(err)
				}
				if err := c.Conn.SetReadDeadline(time.Time{}); err != nil {
					b.Fatal(err)
				}
				var in rpc.Records
				b.SetBytes(int64(x.size))
				b.ReportAllocs()
				b.ResetTimer()
				for sent, got := 0, 0; got < b.N; {
					for ; sent < b.N && sent-got < depth; sent++ {
						if _, err := c.Conn.Write(call); err != nil {
							b.Fatal(err)
						}
					}
					n, err := c.Conn.Read(in.Space())
					if err != nil {
						b.Fatal(err)
					}
					in.Filled(n)
					for ok := true; ok; got++ {
						if _, ok, err = in.Next(); err != nil {
							b.Fatal(err)
						}
						if !ok {
							break
						}
					}
				}
			})
		}
	}
}
