package server

import (
	"fmt"
	"net"

	"github.com/coreos/go-systemd/v22/activation"
)

// portmapSocket is the name under which the service manager hands over port 111, both its stream and its datagram socket: the
// only one of the appliance's doors that is both.
const portmapSocket = "portmap"

// handedOver gives the sockets that the service manager has opened, by name. It keeps them open while the process restarts, so
// that clients who come meanwhile wait instead of being refused, and no right to open low ports is needed here.
func handedOver() (map[string][]net.Listener, map[string][]net.PacketConn, error) {
	streams, datagrams := map[string][]net.Listener{}, map[string][]net.PacketConn{}
	var failed error
	for _, f := range activation.Files(true) {
		name := f.Name()
		if ln, err := net.FileListener(f); err == nil {
			streams[name] = append(streams[name], ln)
		} else if pc, err := net.FilePacketConn(f); err == nil {
			datagrams[name] = append(datagrams[name], pc)
		} else if failed == nil {
			failed = fmt.Errorf("socket %q listens to nothing known: %w", name, err)
		}
		f.Close() // the listener has a copy
	}
	if failed != nil {
		for _, l := range streams {
			closeListeners(l)
		}
		for _, l := range datagrams {
			closePackets(l)
		}
		return nil, nil, failed
	}
	return streams, datagrams, nil
}

func closePackets(list []net.PacketConn) {
	for _, l := range list {
		l.Close()
	}
}

// portmapAddress is where the portmapper answers, "" if nowhere.
func (a *appliance) portmapAddress() string {
	if len(a.doors.portmap) > 0 {
		return first(a.doors.portmap)
	}
	if a.cfg.Portmap != Off {
		return a.cfg.Portmap
	}
	return ""
}
