package nfs

import (
	"context"
	"net"
	"time"
)

// ServeConn serves one connection to its end, for tests that need no socket.
func (s *Server) ServeConn(ctx context.Context, nc net.Conn) {
	c := newConn(s, nc, peerAddr(nc), time.Now())
	c.serve(ctx)
}
