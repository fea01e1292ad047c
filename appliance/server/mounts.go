package server

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	fork "github.com/willscott/go-nfs-client/nfs"
	forkrpc "github.com/willscott/go-nfs-client/nfs/rpc"

	"varve/control/mount"
	"varve/control/state"
	"varve/control/vmachine/vmconfig"
	"varve/gateway/nfs"
)

// mounts tells how this appliance's vPools are mounted, and proves it: as a client of its own, and by what others are seen to do.
type mounts struct{ a *appliance }

const (
	portmapPort  = 111
	roundTripMax = 30 * time.Second
	contactPoll  = 250 * time.Millisecond
)

// exportDoors is where clients reach a data path.
type exportDoors struct {
	NFS     string `json:"nfs,omitempty"` // from outside
	NBDPort int    `json:"nbd_port,omitempty"`
	Portmap bool   `json:"portmap,omitempty"` // at the port where ESXi and Proxmox VE look
}

func (a *appliance) exportDoors() exportDoors {
	d := exportDoors{NBDPort: portOf(first(a.doors.nbd)), Portmap: portOf(a.portmapAddress()) == portmapPort}
	if addr := first(a.doors.nfs); addr != "" {
		d.NFS = reachable(addr, hostAddress())
	}
	return d
}

// address is "" without NFS.
func (d exportDoors) address() string {
	host, _, err := net.SplitHostPort(d.NFS)
	if err != nil {
		return ""
	}
	return host
}

func (d exportDoors) export(p state.VPool) mount.Export {
	e := mount.Export{VPool: p.Name, Address: d.address(), Clients: p.Clients, Portmap: d.Portmap, Port: portOf(d.NFS), NBDPort: d.NBDPort}
	if e.Address == "" {
		e.Address = hostAddress()
	}
	return e
}

// Address is this node's as hypervisors reach it.
func (m mounts) Address() string { return m.a.exportDoors().address() }

// nfs is where NFS is reached from outside.
func (m mounts) nfs() string { return m.a.exportDoors().NFS }

// Export implements api.Mounts.
func (m mounts) Export(p state.VPool) mount.Export { return m.a.exportDoors().export(p) }

func portOf(address string) int {
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		return 0
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		return 0
	}
	return n
}

// Test implements api.Mounts.
func (m mounts) Test(ctx context.Context, p state.VPool, host string, wait time.Duration) ([]mount.Check, error) {
	var client netip.Addr
	if host != "" {
		a, err := netip.ParseAddr(host)
		if err != nil {
			return nil, &state.Error{Err: state.ErrInvalid, Object: fmt.Sprintf("host %.80q", host), Detail: "not an IP address",
				Remedy: "give the address that it comes from on the storage network"}
		}
		client = a.Unmap()
	}
	if m.nfs() == "" {
		return nil, &state.Error{Err: state.ErrConflict, Object: "vpool " + p.Name, Detail: "this appliance serves no NFS", Remedy: "start it with --nfs"}
	}
	checks := m.roundTrip(ctx, p)
	if !client.IsValid() {
		return checks, nil
	}
	return append(checks, m.watch(ctx, p, client, wait)...), nil
}

// roundTrip is what a hypervisor does: mount, make a file, write, commit, read back, remove.
func (m mounts) roundTrip(ctx context.Context, p state.VPool) (checks []mount.Check) {
	ctx, cancel := context.WithTimeout(ctx, roundTripMax)
	defer cancel()
	step := func(name, remedy string, do func() (string, error)) bool {
		began := time.Now()
		detail, err := do()
		c := mount.Check{Name: name, OK: err == nil, Detail: detail, Took: time.Since(began)}
		if err != nil {
			c.Detail, c.Remedy = errors.Join(err, ctx.Err()).Error(), remedy
		}
		checks = append(checks, c)
		return err == nil
	}
	address := m.nfs()
	var c *forkrpc.Client
	if !step("connect", "check that nothing filters this port on the appliance itself", func() (string, error) {
		host, port, err := net.SplitHostPort(address)
		if err != nil {
			return "", err
		}
		if strings.Contains(host, ":") {
			host = "[" + host + "]"
		}
		n, err := strconv.Atoi(port)
		if err != nil {
			return "", err
		}
		c, err = fork.DialServiceAtPort(host, n)
		return "NFS answers on " + address, err
	}) {
		return checks
	}
	// The client's calls take no context: its end closes the connection, which ends them.
	defer context.AfterFunc(ctx, func() { c.Close() })()
	var t *fork.Target
	if !step("mount", "allow the appliance's own address too: varve vpool set "+p.Name+" --client NETWORK", func() (detail string, err error) {
		t, err = (&fork.Mount{Client: c}).Mount("/"+p.Name, forkrpc.NewAuthUnix("varve-mount-test", 0, 0).Auth())
		return "export /" + p.Name + " gives its root", err
	}) {
		c.Close()
		return checks
	}
	defer t.Close()
	var random [8]byte
	rand.Read(random[:])
	name := "/.varve-mount-test-" + hex.EncodeToString(random[:])
	data := bytes.Repeat(random[:], 8<<10)
	written := step("write", "look at the appliance's log and at varve status: is the backend away, or the log full?", func() (string, error) {
		f, err := t.OpenFile(name, 0o600)
		if err != nil {
			return "", err
		}
		if _, err := f.Write(data); err != nil {
			return "", errors.Join(err, f.Close())
		}
		return fmt.Sprintf("%d bytes, committed", len(data)), f.Close()
	})
	if written {
		step("read back", "varve doctor", func() (string, error) {
			f, err := t.Open(name)
			if err != nil {
				return "", err
			}
			have, err := io.ReadAll(io.LimitReader(f, int64(len(data))+1))
			if err == nil && !bytes.Equal(have, data) {
				err = errors.New("other bytes than those written")
			}
			return "the same bytes", errors.Join(err, f.Close())
		})
	}
	step("remove", "remove "+name+" by hand", func() (string, error) { return "nothing is left", t.Remove(name) })
	return checks
}

// watch waits until a host has mounted and written.
func (m mounts) watch(ctx context.Context, p state.VPool, client netip.Addr, wait time.Duration) []mount.Check {
	began := time.Now()
	allowed := slices.ContainsFunc(p.Clients, func(c string) bool {
		n, err := netip.ParsePrefix(c)
		return err == nil && n.Contains(client)
	})
	list := mount.Check{Name: "allowed", OK: allowed, Detail: fmt.Sprintf("%s is in the vPool's list of networks", client)}
	if !allowed {
		list.Detail = fmt.Sprintf("%s is in none of %s", client, strings.Join(p.Clients, ", "))
		list.Remedy = "varve vpool set " + p.Name + " --client NETWORK"
		return []mount.Check{list}
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	tick := time.NewTicker(contactPoll)
	defer tick.Stop()
	for {
		seen := m.contact(p, client)
		if seen.Wrote.After(began) || ctx.Err() != nil {
			return []mount.Check{list, mountSeen(seen, client, began), writeSeen(seen, client, began, wait)}
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
}

func (m mounts) contact(p state.VPool, client netip.Addr) nfs.Contact {
	for _, c := range m.a.nfs.Contacts() {
		if c.FSID == p.FSID && c.Client.Unmap() == client {
			return c
		}
	}
	return nfs.Contact{}
}

func mountSeen(c nfs.Contact, client netip.Addr, began time.Time) mount.Check {
	out := mount.Check{Name: "mounted by host", OK: true}
	switch {
	case c.Mounted.After(began):
		out.Detail, out.Took = fmt.Sprintf("%s has mounted it now", client), c.Mounted.Sub(began)
	case !c.Mounted.IsZero():
		out.Detail = fmt.Sprintf("%s mounted it at %s", client, c.Mounted.UTC().Format(time.RFC3339))
	case !c.Wrote.IsZero():
		out.Detail = fmt.Sprintf("%s uses a mount from before this appliance started", client)
	default:
		out.OK, out.Detail = false, fmt.Sprintf("no mount by %s was seen at this appliance", client)
		out.Remedy = "is it the address that the host comes from, and does the host use this appliance's address?"
	}
	return out
}

func writeSeen(c nfs.Contact, client netip.Addr, began time.Time, wait time.Duration) mount.Check {
	if c.Wrote.After(began) {
		return mount.Check{Name: "written by host", OK: true, Detail: fmt.Sprintf("a write by %s was seen", client), Took: c.Wrote.Sub(began)}
	}
	return mount.Check{Name: "written by host", Detail: fmt.Sprintf("no write by %s within %s", client, wait), Took: wait,
		Remedy: "while this waits, write a file on the datastore from that host; mounted read-only, it shows as mounted and not as written"}
}

// knownDisks lets hypervisors' VMs find their vDisks; the two controllers know each other only here.
type knownDisks struct{ a *appliance }

// KnownDisks implements pmachine.Machines.
func (k knownDisks) KnownDisks(ctx context.Context, format string, disks []vmconfig.Disk) ([]state.VMachineDisk, bool) {
	return k.a.vmachines.KnownDisks(ctx, format, disks)
}
