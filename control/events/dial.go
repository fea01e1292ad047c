package events

import (
	"context"
	"net"
)

// Dialer connects to addresses that an operator has named, for others than sinks: never, unless local is set, to this host, its link
// or a cloud's metadata service, whatever the name resolves to.
func Dialer(local bool) func(ctx context.Context, network, address string) (net.Conn, error) {
	return dialer(local)
}
