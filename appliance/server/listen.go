package server

import (
	"errors"
	"fmt"
	"net"
	"syscall"

	"github.com/coreos/go-systemd/v22/activation"

	"varve/control/api"
)

// listeners are the appliance's open doors. They are opened before anything slow, so that a port that is taken is told at
// once; clients that come early wait in the kernel's queue.
type listeners struct {
	nbd, nfs, https     []net.Listener
	node                []net.Listener
	apiSocket, nbdLocal net.Listener
	control             net.Listener
}

// openListeners takes what systemd hands over by the names nbd, nfs and https, and opens the rest.
func openListeners(cfg Config) (*listeners, error) {
	given, err := activation.ListenersWithNames()
	if err != nil {
		return nil, fmt.Errorf("take sockets from systemd: %w", err)
	}
	l := &listeners{}
	switch cfg.Unit {
	case UnitGateway:
		cfg.Node = Off
	case UnitControl:
		cfg.NBD, cfg.NFS, cfg.HTTPS = Off, Off, Off
	}
	if cfg.Unit != UnitControl {
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
	for name, rest := range given {
		closeListeners(rest)
		if err == nil {
			err = fmt.Errorf("systemd hands over a socket named %q; name it nbd, nfs, https or node", name)
		}
	}
	if err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

func listenTCP(given []net.Listener, name, address string) ([]net.Listener, error) {
	var kept []net.Listener
	for _, g := range given {
		if g == nil {
			return nil, fmt.Errorf("systemd's socket %q is not a stream socket", name)
		}
		kept = append(kept, g)
	}
	if len(kept) > 0 || address == Off {
		return kept, nil
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
	closeListeners([]net.Listener{l.apiSocket, l.nbdLocal, l.control})
	closeListeners(l.nbd)
	closeListeners(l.nfs)
	closeListeners(l.https)
	closeListeners(l.node)
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
