package server

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"syscall"

	"varve/control/api"
)

// listeners are the appliance's open doors. They are opened before anything slow, so that a port that is taken is told at
// once; clients that come early wait in the kernel's queue.
type listeners struct {
	nbd, nfs, https     []net.Listener
	node                []net.Listener
	portmap             []net.Listener // only what systemd hands over
	portmapUDP          []net.PacketConn
	apiSocket, nbdLocal net.Listener
	control, gateway    net.Listener // where the two units ask each other
}

// openListeners takes what systemd hands over by the names nbd, nfs, https, node and portmap, and opens the rest.
func openListeners(cfg Config) (*listeners, error) {
	given, datagrams, err := handedOver()
	if err != nil {
		return nil, fmt.Errorf("take sockets from systemd: %w", err)
	}
	l := &listeners{portmap: given[portmapSocket], portmapUDP: datagrams[portmapSocket]}
	delete(given, portmapSocket)
	delete(datagrams, portmapSocket)
	switch cfg.Unit {
	case UnitGateway:
		cfg.Node, cfg.HTTPS = Off, Off
		l.gateway, err = api.ListenUnix(filepath.Join(cfg.Data, gatewaySocketName))
	case UnitControl:
		cfg.NBD, cfg.NFS = Off, Off
	}
	if err == nil && cfg.Unit != UnitGateway {
		l.apiSocket, err = api.ListenUnix(APISocket(cfg.Data))
	}
	if err == nil && cfg.Unit != UnitControl {
		l.nbdLocal, err = api.ListenUnix(NBDSocket(cfg.Data))
	}
	if err == nil && cfg.Unit != UnitGateway {
		l.control, err = api.ListenUnix(ControlSocket(cfg.Data))
	}
	for _, s := range []struct {
		name, address string
		into          *[]net.Listener
	}{{"nbd", cfg.NBD, &l.nbd}, {"nfs", cfg.NFS, &l.nfs}, {"https", cfg.HTTPS, &l.https}, {"node", cfg.Node, &l.node}} {
		if err == nil {
			*s.into, err = listenTCP(given[s.name], s.name, s.address)
		}
		delete(given, s.name)
	}
	if cfg.Unit == UnitGateway && err == nil && len(l.https) > 0 {
		err = errors.New("systemd hands over a socket named https, which is varve-control's: set its Service= so")
	}
	for name, rest := range given {
		closeListeners(rest)
		if err == nil {
			err = fmt.Errorf("systemd hands over a socket named %q; name it nbd, nfs, https, node or portmap", name)
		}
	}
	for name, rest := range datagrams {
		closePackets(rest)
		if err == nil {
			err = fmt.Errorf("systemd hands over a datagram socket named %q; only portmap takes one", name)
		}
	}
	if err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

func listenTCP(given []net.Listener, name, address string) ([]net.Listener, error) {
	if len(given) > 0 || address == Off {
		return given, nil
	}
	asked := address
	if asked == NodeDefault {
		address = nodeAddress
	}
	ln, err := net.Listen("tcp", address)
	if asked == NodeDefault && errors.Is(err, syscall.EADDRINUSE) {
		return nil, nil // another appliance of this host has it: this one stays a cluster of one
	}
	if err != nil {
		return nil, fmt.Errorf("listen for %s on %s: %w", name, address, err)
	}
	return []net.Listener{ln}, nil
}

const nodeAddress = ":7443"

func closeListeners(list []net.Listener) {
	for _, l := range list {
		if l != nil {
			l.Close()
		}
	}
}

func (l *listeners) close() {
	closeListeners([]net.Listener{l.apiSocket, l.nbdLocal, l.control, l.gateway})
	closeListeners(l.nbd)
	closeListeners(l.nfs)
	closeListeners(l.https)
	closeListeners(l.node)
	closeListeners(l.portmap)
	closePackets(l.portmapUDP)
}

// first gives the address of the first listener, "" if there is none.
func first(list []net.Listener) string {
	if len(list) == 0 {
		return ""
	}
	return list[0].Addr().String()
}

// reachable turns a listener's address into one that a client on this host can use, and host into what others may use.
func reachable(address, host string) string {
	h, port, err := net.SplitHostPort(address)
	if err != nil {
		return address
	}
	if ip := net.ParseIP(h); h == "" || ip != nil && ip.IsUnspecified() {
		h = host
	}
	return net.JoinHostPort(h, port)
}
