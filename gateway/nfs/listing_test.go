package nfs_test

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"varve/gateway/nfs"
	"varve/gateway/nfs/nfstest"
)

// TestListingWhileNamesChange lists a directory of 10,000 names while others come, go and change: each of the 10,000 must
// appear exactly once, no other one twice, and cookies must ascend.
func TestListingWhileNamesChange(t *testing.T) {
	const names = 10_000
	for _, x := range []struct {
		what            string
		proc            uint32
		dircount, count uint32
	}{
		{"READDIR 4096", readdir, 0, 4096},
		{"READDIR 512", readdir, 0, 512},
		{"READDIR 65536", readdir, 0, 65536},
		{"READDIRPLUS 512/4096", readdirplus, 512, 4096},
		{"READDIRPLUS 8192/32768", readdirplus, 8192, 32768},
		{"READDIRPLUS 1 MiB", readdirplus, 1 << 20, 1 << 20},
	} {
		t.Run(x.what, func(t *testing.T) {
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			r := rand.New(rand.NewPCG(seed, 1))
			s := serve(t, nfs.Config{})
			c := s.mount("/default")
			ctx := t.Context()
			spec := nfs.CreateSpec{Kind: nfs.Regular, Mode: 0o644}
			for i := range names {
				if _, _, err := s.ns.Create(ctx, 7, 2, fmt.Sprintf("stays-%05d", i), spec); err != nil {
					t.Fatal(err)
				}
				if i%3 == 0 {
					if _, _, err := s.ns.Create(ctx, 7, 2, fmt.Sprintf("goes-%05d", i), spec); err != nil {
						t.Fatal(err)
					}
				}
			}
			seen := make(map[string]int)
			ids := make(map[uint64]string)
			cookie, calls := uint64(0), 0
			for eof := false; !eof; calls++ {
				reply := c.want(0, x.proc, nfstest.ListArgs(c.root, cookie, x.dircount, x.count))
				if len(reply.Entries) == 0 && !reply.EOF {
					t.Fatal("no entries and no end")
				}
				for _, e := range reply.Entries {
					if e.Cookie <= cookie {
						t.Fatalf("cookie %d after %d", e.Cookie, cookie)
					}
					cookie = e.Cookie
					seen[e.Name]++
					if e.FileID == 0 || x.proc == readdirplus && (e.Attr.Inode != e.FileID || len(e.Handle) != 40) {
						t.Fatalf("entry %+v", e)
					}
					if e.Name != "." && e.Name != ".." {
						if other := ids[e.FileID]; other != "" && other[:4] == "stay" {
							t.Fatalf("%s and %s have one file id", e.Name, other)
						}
						ids[e.FileID] = e.Name
					}
				}
				eof = reply.EOF
				// Names come, go, and change place between the calls.
				for range 5 {
					n := r.IntN(names/3) * 3
					_ = s.ns.Remove(ctx, 7, 2, fmt.Sprintf("goes-%05d", n))
					n = r.IntN(names/3) * 3
					_ = s.ns.Rename(ctx, 7, 2, fmt.Sprintf("goes-%05d", n), 2, fmt.Sprintf("moved-%05d-%d", n, calls))
				}
				if calls < 500 {
					if _, _, err := s.ns.Create(ctx, 7, 2, fmt.Sprintf("comes-%d", calls), spec); err != nil {
						t.Fatal(err)
					}
				}
				if calls > 20_000 {
					t.Fatal("the listing does not end")
				}
			}
			for i := range names {
				if n := seen[fmt.Sprintf("stays-%05d", i)]; n != 1 {
					t.Fatalf("name %d was listed %d times", i, n)
				}
			}
			for name, n := range seen {
				if n != 1 {
					t.Errorf("%s was listed %d times", name, n)
				}
			}
			if seen["."] != 1 || seen[".."] != 1 {
				t.Error("\".\" or \"..\" is missing")
			}
			// A cookie from anywhere stays good, also beyond the end.
			c.want(0, x.proc, nfstest.ListArgs(c.root, cookie, max(x.dircount, 1)*boolTo(x.proc == readdirplus), x.count))
			if reply := c.want(0, x.proc, nfstest.ListArgs(c.root, 1<<63, x.dircount, x.count)); !reply.EOF || len(reply.Entries) > 0 {
				t.Error("entries beyond the last cookie")
			}
		})
	}
}

func boolTo(b bool) uint32 {
	if b {
		return 1
	}
	return 0
}

func TestListingSizes(t *testing.T) {
	s := serve(t, nfs.Config{})
	c := s.mount("/default")
	for i := range 300 {
		c.create(fmt.Sprintf("%0*d", 1+i%200, i))
	}
	for _, count := range []uint32{0, 1, 100, 107} {
		c.want(nfs.StatusTooSmall, readdir, nfstest.ListArgs(c.root, 0, 0, count))
		c.want(nfs.StatusTooSmall, readdirplus, nfstest.ListArgs(c.root, 0, 4096, count))
	}
	for _, count := range []uint32{512, 1000, 4096, 32768, 65536, 1 << 31, 1<<32 - 1} {
		for _, proc := range []uint32{readdir, readdirplus} {
			dircount := boolTo(proc == readdirplus) * count
			seen := 0
			cookie := uint64(0)
			for {
				results, err := c.Call(nfstest.NFS, 3, proc, nfstest.ListArgs(c.root, cookie, dircount, count))
				if err != nil {
					t.Fatal(err)
				}
				r, err := nfstest.Decode(proc, results)
				if err != nil || r.Status != 0 {
					t.Fatal(r.Status, err)
				}
				if limit := min(int64(count), 64<<10); int64(len(results)) > limit {
					t.Fatalf("results of %d bytes, asked for at most %d", len(results), limit)
				}
				for _, e := range r.Entries {
					cookie = e.Cookie
					seen++
				}
				if r.EOF {
					break
				}
			}
			if seen != 302 {
				t.Errorf("procedure %d by %d: %d entries", proc, count, seen)
			}
		}
	}
	fh := c.create("file")
	c.want(nfs.StatusNotDir, readdir, nfstest.ListArgs(fh, 0, 0, 4096))
	c.want(nfs.StatusNotDir, readdirplus, nfstest.ListArgs(fh, 0, 4096, 4096))
}
