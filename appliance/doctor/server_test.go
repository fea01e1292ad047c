package doctor

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"varve/gateway/nfs"
	"varve/gateway/nfs/nfstest"
)

// serveNFS serves a namespace on 127.11.1.7, an address of this host that nothing else uses, and a portmapper beside it.
func serveNFS(t *testing.T, ns *nfstest.Namespace, portmap bool) (addr string) {
	t.Helper()
	const host = "127.11.1.7"
	ln, err := net.Listen("tcp", host+":0")
	if err != nil {
		t.Fatal(err)
	}
	s := nfs.New(nfs.Config{Namespace: ns, Verifier: func() [8]byte { return [8]byte{1} }})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.Run(ctx, ln); err != nil {
			t.Error(err)
		}
	})
	if portmap {
		probe, err := net.Listen("tcp", host+":111")
		if err != nil {
			cancel()
			wg.Wait()
			t.Skipf("SKIPPED: port 111 cannot be used: %v", err)
		}
		probe.Close()
		wg.Go(func() {
			if err := s.RunPortmap(ctx, host+":111"); err != nil {
				t.Error(err)
			}
		})
		for end := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			c, err := net.Dial("tcp", host+":111")
			if err == nil {
				c.Close()
				break
			}
			if time.Now().After(end) {
				t.Fatal(err)
			}
		}
	}
	t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
	return ln.Addr().String()
}

func TestNFSIsMountedAndReadAsAHypervisorWould(t *testing.T) {
	for _, portmap := range []bool{false, true} {
		name, how := "by port", "mounted by port"
		if portmap {
			name, how = "vmware client", "mounted through the portmapper"
		}
		t.Run(name, func(t *testing.T) {
			open, shut := nfstest.Loopback(7, "/default"), nfstest.Loopback(8, "/shut")
			shut.Clients = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
			ns := nfstest.New(open, shut)
			root := ns.Exports()[0].Root
			size := int64(5000)
			for _, f := range []string{"a.raw", "b.raw"} {
				if _, _, err := ns.Create(t.Context(), 7, root, f, nfs.CreateSpec{Kind: nfs.Regular, Mode: 0o600, Size: &size}); err != nil {
					t.Fatal(err)
				}
			}
			if _, _, err := ns.Create(t.Context(), 7, root, "link", nfs.CreateSpec{Kind: nfs.Symlink, Target: "a.raw"}); err != nil {
				t.Fatal(err)
			}
			s := Server{NFS: serveNFS(t, ns, portmap), Exports: []string{"/default"}}
			if portmap {
				host, _, _ := net.SplitHostPort(s.NFS)
				s.Portmap = host + ":111"
			}
			check := Check{"server.nfs", "", 10 * time.Second, func(ctx context.Context) Finding { return checkNFS(ctx, s) }}
			f := check.run(t.Context())
			if f.Status != OK || !strings.Contains(f.Evidence, "1 exports "+how+", 2 files read") {
				t.Errorf("finding %+v", f)
			}
			s.Exports = []string{"/default", "/shut"}
			if f := check.run(t.Context()); f.Status != Fail || !strings.Contains(f.Evidence, "/shut") || !strings.Contains(f.Remedy, "allow list") {
				t.Errorf("an export that refuses this host: %+v", f)
			}
		})
	}
}

func TestNFSServerThatNeverAnswersFailsInTime(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	s := Server{NFS: ln.Addr().String(), Exports: []string{"/default"}}
	c := Check{"server.nfs", "", 200 * time.Millisecond, func(ctx context.Context) Finding { return checkNFS(ctx, s) }}
	start := time.Now()
	if f := c.run(t.Context()); f.Status != Fail || time.Since(start) > 5*time.Second {
		t.Errorf("%+v after %s", f, time.Since(start))
	}
}
