package server

import (
	"cmp"
	"context"
	"net"
	"time"

	"varve/control/node"
	"varve/control/state"
)

// What this node says of where it is. Doors are mostly opened on all of the host's addresses, so that others need one of them: that
// of the default route, or in a network without a gateway that of the first interface. A host may have none for a while, as when it
// boots before its switch or gets its address late, and the address may become another one while the node runs. So it is asked for
// again and again, what was said before stands while there is none, and only a node that has never had one says loopback.

// ownAddress is the address that others most likely reach this host by; "" while there is none. Tests change it.
var ownAddress = func() string {
	c, err := net.DialTimeout("udp", "192.0.2.1:9", time.Second) // sends nothing
	if err != nil {
		return interfaceAddress()
	}
	defer c.Close()
	host, _, err := net.SplitHostPort(c.LocalAddr().String())
	if err != nil {
		return ""
	}
	return host
}

// interfaceAddress is that of the first interface that runs and has one.
func interfaceAddress() string {
	all, err := net.Interfaces()
	if err != nil {
		return ""
	}
	for _, i := range all {
		if i.Flags&net.FlagRunning == 0 || i.Flags&net.FlagLoopback != 0 {
			continue
		}
		if addrs, err := i.Addrs(); err == nil {
			if a := reachableOf(addrs); a != "" {
				return a
			}
		}
	}
	return ""
}

// reachableOf gives the first of an interface's addresses that others can reach, IPv4 before IPv6; "" if there is none.
func reachableOf(addrs []net.Addr) (found string) {
	for _, a := range addrs {
		n, ok := a.(*net.IPNet)
		if !ok || !n.IP.IsGlobalUnicast() {
			continue
		}
		if n.IP.To4() != nil {
			return n.IP.String()
		}
		found = cmp.Or(found, n.IP.String())
	}
	return found
}

const loopback = "127.0.0.1"

// hostAddress is where this host is at the moment, loopback if nobody else reaches it.
func hostAddress() string { return cmp.Or(ownAddress(), loopback) }

// doorAddress is where others reach the first of these doors: by the host's address if it has none of its own, and while the host
// has none where they were told before. "" without doors.
func doorAddress(doors []net.Listener, host, before string) string {
	if host == "" {
		host, _, _ = net.SplitHostPort(before)
	}
	return reachable(first(doors), cmp.Or(host, loopback))
}

// nodeSpec is what this node says of itself.
func (b *base) nodeSpec(l *listeners) state.NodeSpec {
	var said state.NodeSpec
	if self, err := b.raft.State().View().Node(b.raft.ID()); err == nil {
		said = self.NodeSpec
	}
	host := ownAddress()
	spec := state.NodeSpec{Name: node.HostName(), Role: state.RoleMaster, Peer: doorAddress(l.node, host, said.Peer),
		NBD: doorAddress(l.nbd, host, said.NBD), NFS: doorAddress(l.nfs, host, said.NFS), HTTPS: doorAddress(l.https, host, said.HTTPS),
		Version: b.cfg.Version, LevelMax: state.LevelMax}
	if b.cfg.Unit == UnitGateway { // control has these doors, and records them
		spec.Peer, spec.HTTPS = said.Peer, said.HTTPS
	}
	return spec
}

// keepAddresses records where this unit's doors are, once the node is registered, and again whenever that becomes another place.
func (a *appliance) keepAddresses(ctx context.Context) error {
	return tick(ctx, time.Second, func() {
		self, err := a.nodes.Self()
		if err != nil {
			return
		}
		spec, mine := self.NodeSpec, a.nodeSpec(a.doors)
		if a.cfg.Unit != UnitGateway {
			spec.Peer, spec.HTTPS = mine.Peer, mine.HTTPS
		}
		if a.cfg.Unit != UnitControl {
			spec.NBD, spec.NFS = mine.NBD, mine.NFS
		}
		if spec == self.NodeSpec {
			return
		}
		if err := a.nodes.Register(ctx, spec); err != nil && ctx.Err() == nil {
			a.cfg.Log.Warn("where this node is reached could not be recorded, it is tried again", "err", err)
		}
		if err := a.renew(ctx); err != nil && ctx.Err() == nil { // the certificate names the address
			a.cfg.Log.Warn("certificates could not be renewed, the old ones stay in use", "err", err)
		}
	})
}
