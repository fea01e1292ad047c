package server

import (
	"net"
	"sync/atomic"
	"testing"
	"time"
)

// TestAddressesFollowTheRoute: a node says where it is now; without a route what it said before stands; it says loopback only if it
// never had one.
func TestAddressesFollowTheRoute(t *testing.T) {
	var route atomic.Pointer[string]
	set := func(s string) { route.Store(&s) }
	set("")
	before := routedAddress
	routedAddress = func() string { return *route.Load() }
	t.Cleanup(func() { routedAddress = before })

	cfg := config(t.TempDir())
	cfg.NFS, cfg.HTTPS = "0.0.0.0:0", "0.0.0.0:0" // NBD stays where the test put it
	r := start(t, cfg)
	port := func(address string) string {
		t.Helper()
		_, p, err := net.SplitHostPort(address)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	awaits := func(r *running, host string) {
		t.Helper()
		want := net.JoinHostPort(host, port(r.summary.NFS))
		var got string
		for end := time.Now().Add(20 * time.Second); got != want; time.Sleep(50 * time.Millisecond) {
			nodes, err := r.client.Nodes(t.Context())
			if err != nil || len(nodes) != 1 {
				t.Fatal(nodes, err)
			}
			if got = nodes[0].NFS; time.Now().After(end) {
				t.Fatalf("NFS at %s, want %s", got, want)
			}
			if nodes[0].NBD != r.summary.NBD || nodes[0].HTTPS != net.JoinHostPort(host, port(r.summary.HTTPS)) && got == want {
				t.Fatalf("%+v", nodes[0])
			}
		}
	}
	awaits(r, "127.0.0.1")
	set("192.0.2.7")
	awaits(r, "192.0.2.7")
	set("192.0.2.8")
	awaits(r, "192.0.2.8")
	set("")
	time.Sleep(1500 * time.Millisecond)
	awaits(r, "192.0.2.8")
}

func TestDoorAddress(t *testing.T) {
	open := func(address string) []net.Listener {
		ln, err := net.Listen("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ln.Close() })
		return []net.Listener{ln}
	}
	everywhere, here := open("0.0.0.0:0"), open("127.0.0.1:0")
	_, port, _ := net.SplitHostPort(first(everywhere))
	for _, x := range []struct {
		doors               []net.Listener
		route, before, want string
	}{
		{nil, "192.0.2.7", "192.0.2.7:1", ""},
		{nil, "", "192.0.2.7:1", ""},
		{everywhere, "192.0.2.7", "192.0.2.9:1", "192.0.2.7:" + port},
		{everywhere, "", "192.0.2.9:1", "192.0.2.9:" + port},
		{everywhere, "", "", "127.0.0.1:" + port},
		{here, "192.0.2.7", "192.0.2.9:1", first(here)},
		{here, "", "192.0.2.9:1", first(here)},
	} {
		if got := doorAddress(x.doors, x.route, x.before); got != x.want {
			t.Errorf("%+v: %s", x, got)
		}
	}
}
