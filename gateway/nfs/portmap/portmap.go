// Package portmap is a portmapper, RFC 1833 version 2, that answers for one server: what it maps is asked from a function
// at each call, and nobody can set or unset anything. Clients that cannot be told a port need it, ESXi among them.
// NULL, GETPORT and DUMP are served; SET and UNSET answer false. Version 3 and 4 get PROG_MISMATCH, upon which Linux and
// libnfs ask again in version 2.
package portmap

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"

	"varve/gateway/nfs/rpc"
	"varve/gateway/nfs/xdr"
)

const (
	program = 100000
	version = 2

	// TCP and UDP are the protocols of a mapping.
	TCP = 6
	UDP = 17

	connectionsMax   = 64
	recordBytesMax   = 4 << 10
	idleTimeout      = 10 * time.Second
	datagramsPerS    = 1000
	datagramBytesMax = 2 << 10
)

// Mapping says that a program's version is served at a port.
type Mapping struct {
	Program, Version, Protocol, Port uint32
}

// Run serves on TCP and UDP at addr until ctx ends. mappings is called for each call, from several goroutines.
func Run(ctx context.Context, addr string, mappings func() []Mapping) error {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return fmt.Errorf("listen for portmap calls: %w", err)
	}
	// The same port for both, also when addr leaves it open.
	pc, err := net.ListenPacket("udp", ln.Addr().String())
	if err != nil {
		ln.Close()
		return fmt.Errorf("listen for portmap datagrams: %w", err)
	}
	return Serve(ctx, []net.Listener{ln}, []net.PacketConn{pc}, mappings)
}

// Serve is Run on sockets that are open already, which it closes.
func Serve(ctx context.Context, tcp []net.Listener, udp []net.PacketConn, mappings func() []Mapping) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		<-ctx.Done()
		var failed []error
		for _, ln := range tcp {
			failed = append(failed, ln.Close())
		}
		for _, pc := range udp {
			failed = append(failed, pc.Close())
		}
		return errors.Join(failed...)
	})
	for _, ln := range tcp {
		g.Go(func() error { return serveTCP(ctx, ln, mappings) })
	}
	for _, pc := range udp {
		g.Go(func() error { return serveUDP(ctx, pc, mappings) })
	}
	return g.Wait()
}

func serveUDP(ctx context.Context, pc net.PacketConn, mappings func() []Mapping) error {
	limit := rate.NewLimiter(datagramsPerS, datagramsPerS)
	b := make([]byte, datagramBytesMax)
	for {
		n, from, err := pc.ReadFrom(b)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read portmap datagram: %w", err)
		}
		if !limit.Allow() {
			continue // a flood, perhaps with forged senders
		}
		if reply := Answer(b[:n], mappings()); reply != nil {
			// A lost datagram is the client's to repeat.
			_, _ = pc.WriteTo(reply, from)
		}
	}
}

func serveTCP(ctx context.Context, ln net.Listener, mappings func() []Mapping) error {
	var g errgroup.Group
	room := semaphore.NewWeighted(connectionsMax)
	g.Go(func() error {
		for {
			nc, err := ln.Accept()
			if ctx.Err() != nil {
				if err == nil {
					nc.Close()
				}
				return nil
			}
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("accept portmap connection: %w", err)
			}
			if err != nil {
				select { // out of descriptors, most likely
				case <-time.After(50 * time.Millisecond):
				case <-ctx.Done():
				}
				continue
			}
			if !room.TryAcquire(1) {
				nc.Close()
				continue
			}
			g.Go(func() error {
				defer room.Release(1)
				stop := context.AfterFunc(ctx, func() { nc.Close() })
				defer stop()
				serveConn(nc, mappings)
				return nil
			})
		}
	})
	return g.Wait()
}

// serveConn ends when the client does, breaks a limit or is silent for idleTimeout.
func serveConn(nc net.Conn, mappings func() []Mapping) {
	defer nc.Close()
	in := rpc.Records{BytesMax: recordBytesMax}
	for {
		record, ok, err := in.Next()
		if err != nil {
			return
		}
		if !ok {
			if nc.SetDeadline(time.Now().Add(idleTimeout)) != nil {
				return
			}
			n, err := nc.Read(in.Space())
			in.Filled(n)
			if err != nil && (n == 0 || errors.Is(err, os.ErrDeadlineExceeded)) {
				return
			}
			continue
		}
		reply := Answer(record, mappings())
		if reply == nil {
			return
		}
		b, start := rpc.BeginRecord(nil)
		b = rpc.EndRecord(append(b, reply...), start)
		if _, err := nc.Write(b); err != nil {
			return
		}
	}
}

// Answer returns the reply to one call, nil if the message is none.
func Answer(message []byte, mappings []Mapping) []byte {
	var c rpc.Call
	switch {
	case !rpc.DecodeCall(message, &c):
		return nil
	case c.RPCVersion != rpc.Version:
		return rpc.AppendRPCMismatch(nil, c.XID)
	case c.Program != program:
		return rpc.AppendAccepted(nil, c.XID, rpc.ProgUnavail)
	case c.Version != version:
		return rpc.AppendProgMismatch(nil, c.XID, version, version)
	}
	d := xdr.NewDecoder(c.Args)
	b := rpc.AppendAccepted(nil, c.XID, rpc.Success)
	const null, set, unset, getport, dump = 0, 1, 2, 3, 4
	switch c.Proc {
	case null:
	case set, unset, getport:
		want := Mapping{d.Uint32(), d.Uint32(), d.Uint32(), d.Uint32()}
		if d.Bad() {
			return rpc.AppendAccepted(nil, c.XID, rpc.GarbageArgs)
		}
		if c.Proc != getport {
			return xdr.AppendBool(b, false)
		}
		return xdr.AppendUint32(b, port(want, mappings))
	case dump:
		for _, m := range mappings {
			b = xdr.AppendBool(b, true)
			for _, v := range []uint32{m.Program, m.Version, m.Protocol, m.Port} {
				b = xdr.AppendUint32(b, v)
			}
		}
		b = xdr.AppendBool(b, false)
	default:
		return rpc.AppendAccepted(nil, c.XID, rpc.ProcUnavail)
	}
	return b
}

// port is 0 when the program is not served. Any version finds the one there is: the program itself says which it has.
func port(want Mapping, mappings []Mapping) uint32 {
	for _, m := range mappings {
		if m.Program == want.Program && m.Protocol == want.Protocol {
			return m.Port
		}
	}
	return 0
}
