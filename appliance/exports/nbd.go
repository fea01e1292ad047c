package exports

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/uuid"

	"varve/control/state"
	"varve/gateway/nbd"
	"varve/volumedriver"
	"varve/volumedriver/blockio"
)

// NBD offers the vDisks: export "vpool/path" without the disk suffix, and their snapshots, read-only, as "vpool/path@name". A peer that may not mount a vPool over NFS may not
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
type device struct{ metered }

// ReadOnly implements nbd.Device.
func (d device) ReadOnly() bool { return d.Template() }

// find gives the volume's snapshot of a name.
func (d device) find(snapshot string) (uuid.UUID, bool) {
	for _, s := range d.Snapshots() {
		if s.Name == snapshot {
			return s.ID, true
		}
	}
	return uuid.Nil, false
}

// Since implements nbd.Differ.
func (d device) Since(snapshot string) bool {
	_, ok := d.find(snapshot)
	return ok
}

// Changed implements nbd.Differ.
func (d device) Changed(ctx context.Context, snapshot string, off, n int64, max int) ([]blockio.Extent, error) {
	id, ok := d.find(snapshot)
	if !ok {
		return nil, fmt.Errorf("snapshot %s is gone: %w", snapshot, blockio.ErrClosed)
	}
	return d.Volume.Changed(ctx, id, off, n, max)
}

// snapshot is a vDisk's snapshot as an NBD connection has it: nothing changes it, and there is nothing to flush.
type snapshot struct{ *volumedriver.SnapshotReader }

// ReadOnly implements nbd.Device.
func (snapshot) ReadOnly() bool { return true }

// TryWrite implements nbd.Device.
func (snapshot) TryWrite([]byte, int64, blockio.Flags, blockio.Completer, uint64) error {
	return blockio.ErrReadOnly
}

// TryZero implements nbd.Device.
func (snapshot) TryZero(int64, int64, blockio.Flags, blockio.Completer, uint64) error {
	return blockio.ErrReadOnly
}

// TryFlush implements nbd.Device.
func (snapshot) TryFlush(c blockio.Completer, tag uint64) error {
	c.Done(tag, nil)
	return nil
}

// Kick implements nbd.Device.
func (snapshot) Kick()      {}
func (snapshot) KickSync()  {}
func (snapshot) KickAhead() {}

// FlushInline implements nbd.Device.
func (snapshot) FlushInline() error { return nil }

// Write implements nbd.Device.
func (snapshot) Write(context.Context, []byte, int64, blockio.Flags) error {
	return blockio.ErrReadOnly
}

// Zero implements nbd.Device.
func (snapshot) Zero(context.Context, int64, int64, blockio.Flags) error { return blockio.ErrReadOnly }

// Flush implements nbd.Device.
func (snapshot) Flush(context.Context) error { return nil }

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
	if at := strings.LastIndexByte(path, '@'); err != nil && at > 0 {
		if disk, err = view.ResolveDisk(pool.FSID, path[:at]); err == nil {
			return e.openSnapshot(ctx, disk.Volume, path[at+1:])
		}
	}
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
	return device{e.volumes.metered(disk.Volume, v)}, release, nil
}

func (e *NBD) openSnapshot(ctx context.Context, volume uuid.UUID, name string) (nbd.Device, func(), error) {
	v, release, err := e.volumes.Open(ctx, volume)
	if errors.Is(err, state.ErrNotFound) {
		return nil, nil, nbd.ErrUnknownExport
	}
	if err != nil {
		return nil, nil, err
	}
	defer release()
	for _, s := range v.Snapshots() {
		if s.Name != name {
			continue
		}
		r, err := e.volumes.driver.OpenSnapshot(ctx, volume, s.ID)
		if err != nil {
			return nil, nil, err
		}
		return snapshot{r}, func() { _ = r.Close() }, nil
	}
	return nil, nil, nbd.ErrUnknownExport
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
