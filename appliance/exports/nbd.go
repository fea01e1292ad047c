package exports

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"

	"varve/control/state"
	"varve/gateway/nbd"
	"varve/volumedriver"
)

// NBD offers the vDisks: export "vpool/path" without the disk suffix. A peer that may not mount a vPool over NFS may not
// attach its disks either and does not see them; whoever can open the unix socket may do both.
type NBD struct {
	store   *state.Store
	volumes *Volumes
	clients *clients
}

// NewNBD wires the exports.
func NewNBD(store *state.Store, volumes *Volumes) *NBD {
	return &NBD{store: store, volumes: volumes, clients: newClients()}
}

// device is a volume as an NBD connection has it.
type device struct{ *volumedriver.Volume }

func (device) ReadOnly() bool { return false }

// Open implements nbd.Exports.
func (e *NBD) Open(ctx context.Context, name string, peer nbd.Peer) (nbd.Device, func(), error) {
	poolName, path, ok := state.SplitName(name)
	if !ok {
		return nil, nil, nbd.ErrUnknownExport
	}
	view := e.store.View()
	pool, err := view.VPool(poolName)
	if err != nil || !e.allowed(pool, peer) {
		return nil, nil, nbd.ErrUnknownExport
	}
	disk, err := view.ResolveDisk(pool.FSID, path)
	if err != nil {
		return nil, nil, nbd.ErrUnknownExport
	}
	v, release, err := e.volumes.Open(ctx, disk.Volume)
	if errors.Is(err, state.ErrNotFound) {
		return nil, nil, nbd.ErrUnknownExport
	}
	if err != nil {
		return nil, nil, err
	}
	return device{v}, release, nil
}

// List implements nbd.Exports.
func (e *NBD) List(_ context.Context, peer nbd.Peer) ([]nbd.ExportInfo, error) {
	view := e.store.View()
	var list []nbd.ExportInfo
	for _, pool := range view.VPools() {
		if !e.allowed(pool, peer) {
			continue
		}
		for _, d := range view.Disks(pool.FSID) {
			list = append(list, nbd.ExportInfo{Name: pool.Name + "/" + d.Name})
		}
	}
	slices.SortFunc(list, func(a, b nbd.ExportInfo) int { return strings.Compare(a.Name, b.Name) })
	return list, nil
}

func (e *NBD) allowed(pool state.VPool, peer nbd.Peer) bool {
	if peer.Local {
		return true
	}
	tcp, ok := peer.Addr.(*net.TCPAddr)
	if !ok {
		return false
	}
	ip := tcp.AddrPort().Addr().Unmap().WithZone("")
	return slices.ContainsFunc(e.clients.of(pool), func(p netip.Prefix) bool { return p.Contains(ip) })
}
