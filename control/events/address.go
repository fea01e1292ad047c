package events

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"time"
)

// AddressError: a sink's name leads to an address that events must not go to.
type AddressError struct{ Addr netip.Addr }

func (e *AddressError) Error() string {
	return fmt.Sprintf("address %s is this host's, its link's or reserved", e.Addr)
}

// Ranges that embed an IPv4 address behind a prefix of so many bytes.
var embedding = []struct {
	prefix netip.Prefix
	at     int
}{
	{netip.MustParsePrefix("64:ff9b::/96"), 12}, // NAT64
	{netip.MustParsePrefix("2002::/16"), 2},     // 6to4
}

// Where clouds serve their instances' credentials, beside 169.254.0.0/16.
var metadata = []netip.Prefix{
	netip.MustParsePrefix("fd00:ec2::/32"),
	netip.MustParsePrefix("fd20:ce::/32"),
	netip.MustParsePrefix("100.100.100.200/32"),
	netip.MustParsePrefix("168.63.129.16/32"),
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("240.0.0.0/4"),
}

// localAddress says whether an address is this host's, its link's, a cloud's metadata service or no host's at all.
func localAddress(a netip.Addr) bool {
	a = a.Unmap().WithZone("")
	if a.IsLoopback() || a.IsLinkLocalUnicast() || a.IsMulticast() || a.IsUnspecified() || !a.IsValid() {
		return true
	}
	for _, p := range metadata {
		if p.Contains(a) {
			return true
		}
	}
	for _, e := range embedding {
		if e.prefix.Contains(a) {
			b := a.As16()
			return localAddress(netip.AddrFrom4([4]byte(b[e.at : e.at+4])))
		}
	}
	return false
}

const dialTimeout = 10 * time.Second

// dialer connects to a sink. The address is checked after its name was resolved, on the connection that will be used, so
// that a name cannot answer differently the second time.
func dialer(local bool) func(ctx context.Context, network, address string) (net.Conn, error) {
	d := net.Dialer{Timeout: dialTimeout}
	if !local {
		d.Control = func(_, address string, _ syscall.RawConn) error {
			ap, err := netip.ParseAddrPort(address)
			if err != nil {
				return fmt.Errorf("check address %s: %w", address, err)
			}
			if localAddress(ap.Addr()) {
				return &AddressError{ap.Addr().Unmap()}
			}
			return nil
		}
	}
	return d.DialContext
}
