package server

import (
	"net"
	"sync/atomic"
	"testing"
	"time"
)

// TestAddressesFollowTheHost: a node says where it is now; while the host has no address what it said before stands; it says loopback only if it
// never had one.
func TestAddressesFollowTheHost(t *testing.T) {
	var host atomic.Pointer[string]
	set := func(s string) { host.Store(&s) }
	set("")
	before := ownAddress
	ownAddress = func() string { return *host.Load() }
	t.Cleanup(func() { ownAddress = before })

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
		doors              []net.Listener
		host, before, want string
	}{
		{nil, "192.0.2.7", "192.0.2.7:1", ""},
		{nil, "", "192.0.2.7:1", ""},
		{everywhere, "192.0.2.7", "192.0.2.9:1", "192.0.2.7:" + port},
		{everywhere, "", "192.0.2.9:1", "192.0.2.9:" + port},
		{everywhere, "", "", "127.0.0.1:" + port},
		{here, "192.0.2.7", "192.0.2.9:1", first(here)},
		{here, "", "192.0.2.9:1", first(here)},
	} {
		if got := doorAddress(x.doors, x.host, x.before); got != x.want {
			t.Errorf("%+v: %s", x, got)
		}
	}
}

func TestReachableOf(t *testing.T) {
	list := func(cidrs ...string) (out []net.Addr) {
		for _, c := range cidrs {
			ip, n, err := net.ParseCIDR(c)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, &net.IPNet{IP: ip, Mask: n.Mask})
		}
		return out
	}
	for _, x := range []struct {
		addrs []net.Addr
		want  string
	}{
		{nil, ""},
		{list("169.254.3.4/16", "fe80::1/64"), ""},
		{list("fe80::1/64", "2001:db8::5/64", "10.1.2.3/24", "10.1.2.4/24"), "10.1.2.3"},
		{list("fe80::1/64", "2001:db8::5/64"), "2001:db8::5"},
	} {
		if got := reachableOf(x.addrs); got != x.want {
			t.Errorf("%v: %q", x.addrs, got)
		}
	}
	if a := interfaceAddress(); a != "" && net.ParseIP(a) == nil {
		t.Error(a)
	}
}
