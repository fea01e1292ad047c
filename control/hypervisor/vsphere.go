package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/session"
	"github.com/vmware/govmomi/view"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"

	"varve/control/state"
	"varve/control/vmachine/vmconfig"
)

const logoutMax = 5 * time.Second

// vsphere is a session with a vCenter or an ESXi.
type vsphere struct {
	client  *vim25.Client
	session *session.Manager
}

// capped bounds the bodies of answers.
type capped struct{ next http.RoundTripper }

func (c capped) RoundTrip(r *http.Request) (*http.Response, error) {
	res, err := c.next.RoundTrip(r)
	if err == nil {
		if res.StatusCode/100 == 3 {
			res.Body.Close()
			return nil, fmt.Errorf("it redirects to %.120q, which is not followed", res.Header.Get("Location"))
		}
		res.Body = struct {
			io.Reader
			io.Closer
		}{io.LimitReader(res.Body, answerBytesMax), res.Body}
	}
	return res, err
}

func dialVSphere(ctx context.Context, e Endpoint) (Hypervisor, error) {
	u, err := url.Parse(e.Address)
	if err != nil {
		return nil, fmt.Errorf("address of a vSphere: %w", ErrAddress)
	}
	u.Path = "/sdk"
	conf, err := tlsConfig(e, u.Hostname())
	if err != nil {
		return nil, err
	}
	c := soap.NewClient(u, false)
	transport := c.DefaultTransport()
	transport.TLSClientConfig, transport.DialTLSContext, transport.Proxy = conf, nil, nil
	c.Transport = capped{transport}
	client, err := vim25.NewClient(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("reach vSphere at %s: %w", u.Host, err)
	}
	v := &vsphere{client: client, session: session.NewManager(client)}
	if err := v.session.Login(ctx, url.UserPassword(e.User, e.Credentials.Password)); err != nil {
		transport.CloseIdleConnections()
		return nil, fmt.Errorf("sign in at vSphere %s as %s: %w", u.Host, e.User, err)
	}
	return v, nil
}

// Close implements Hypervisor.
func (v *vsphere) Close() {
	ctx, cancel := context.WithTimeout(context.Background(), logoutMax)
	defer cancel()
	_ = v.session.Logout(ctx) // an idle session ends by itself
	v.client.CloseIdleConnections()
}

// retrieve reads properties of all objects of a type.
func (v *vsphere) retrieve(ctx context.Context, typ string, properties []string, into any) error {
	views := view.NewManager(v.client)
	all, err := views.CreateContainerView(ctx, v.client.ServiceContent.RootFolder, []string{typ}, true)
	if err != nil {
		return fmt.Errorf("list every %s: %w", typ, err)
	}
	defer func() { _ = all.Destroy(context.WithoutCancel(ctx)) }() // it ends with the session
	if err := all.Retrieve(ctx, []string{typ}, properties, into); err != nil {
		return fmt.Errorf("read every %s: %w", typ, err)
	}
	return nil
}

// Inventory implements Hypervisor.
func (v *vsphere) Inventory(ctx context.Context) (Inventory, error) {
	about := v.client.ServiceContent.About
	inv := Inventory{Version: clip(about.FullName, 200)}
	var hosts []mo.HostSystem
	if err := v.retrieve(ctx, "HostSystem", []string{"name", "runtime", "summary"}, &hosts); err != nil {
		return inv, err
	}
	var stores []mo.Datastore
	if err := v.retrieve(ctx, "Datastore", []string{"name", "info", "host", "summary"}, &stores); err != nil {
		return inv, err
	}
	var machines []mo.VirtualMachine
	if err := v.retrieve(ctx, "VirtualMachine", []string{"name", "config", "runtime"}, &machines); err != nil {
		return inv, err
	}
	if len(hosts) > hostsMax || len(machines) > machinesMax {
		return inv, fmt.Errorf("%d hosts and %d VMs are more than this version takes", len(hosts), len(machines))
	}
	names := make(map[string]string)
	for _, h := range hosts {
		names[h.Self.Value] = h.Name
		inv.Hosts = append(inv.Hosts, hostOf(h))
	}
	for _, s := range stores {
		inv.Mounts = append(inv.Mounts, mountsIn(s)...)
	}
	if len(inv.Mounts) > mountsMax {
		return inv, fmt.Errorf("%d mounts are more than this version takes", len(inv.Mounts))
	}
	for _, m := range machines {
		if m.Config != nil && !m.Config.Template {
			inv.Machines = append(inv.Machines, machineOf(m, names))
		}
	}
	return inv, nil
}

func hostOf(h mo.HostSystem) Host {
	out := Host{Ref: h.Self.Value, Name: clip(h.Name, 200), State: clip(string(h.Runtime.ConnectionState), 60), Address: clip(h.Summary.ManagementServerIp, 60)}
	if h.Runtime.InMaintenanceMode {
		out.State = "maintenance"
	}
	if h.Summary.Config.Product != nil {
		out.Version = clip(h.Summary.Config.Product.FullName, 200)
	}
	out.Address = clip(h.Summary.Config.Name, 200) // the name or address that vCenter reaches it by
	return out
}

// mountsIn are the mounts of an NFS datastore by hosts.
func mountsIn(s mo.Datastore) []Mount {
	nas, ok := s.Info.(*types.NasDatastoreInfo)
	if !ok || nas.Nas == nil {
		return nil
	}
	var out []Mount
	for _, h := range s.Host {
		is := func(b *bool) bool { return b == nil || *b }
		out = append(out, Mount{Host: h.Key.Value, Name: clip(s.Name, 200), Server: clip(nas.Nas.RemoteHost, 200), Export: clip(nas.Nas.RemotePath, 200),
			Path: clip(mountPath(h.MountInfo.Path, s.Name), 200), Usable: is(h.MountInfo.Mounted) && is(h.MountInfo.Accessible),
			ReadOnly: h.MountInfo.AccessMode == string(types.HostMountModeReadOnly)})
	}
	return out
}

// mountPath is where a host has a datastore: /vmfs/volumes/<id>. Its name is a link to that.
func mountPath(path, name string) string {
	if strings.HasPrefix(path, "/vmfs/volumes/") {
		return path
	}
	return "/vmfs/volumes/" + name
}

// inStore turns "[datastore] dir/file" into "datastore/dir/file".
func inStore(s string) string {
	var p object.DatastorePath
	if !p.FromString(s) {
		return ""
	}
	return p.Datastore + "/" + strings.TrimPrefix(p.Path, "/")
}

func machineOf(m mo.VirtualMachine, hosts map[string]string) Machine {
	out := Machine{UUID: m.Config.Uuid, Name: clip(m.Name, 250), Format: state.FormatVMX, Guest: clip(m.Config.GuestFullName, 200),
		Config: clip(inStore(m.Config.Files.VmPathName), 1000), VCPUs: int(m.Config.Hardware.NumCPU), Memory: int64(m.Config.Hardware.MemoryMB) << 20}
	if m.Runtime.Host != nil {
		out.Host = clip(hosts[m.Runtime.Host.Value], 200)
	}
	switch m.Runtime.PowerState {
	case types.VirtualMachinePowerStatePoweredOn:
		out.Power = state.PowerRunning
	case types.VirtualMachinePowerStateSuspended:
		out.Power = state.PowerPaused
	case types.VirtualMachinePowerStatePoweredOff:
		out.Power = state.PowerHalted
	}
	devices := object.VirtualDeviceList(m.Config.Hardware.Device)
	for _, d := range devices.SelectByType((*types.VirtualDisk)(nil)) {
		disk := d.(*types.VirtualDisk)
		file := ""
		if b, ok := disk.Backing.(types.BaseVirtualDeviceFileBackingInfo); ok {
			file = inStore(b.GetVirtualDeviceFileBackingInfo().FileName)
		}
		if len(out.Disks) < state.VMachineDisksMax {
			out.Disks = append(out.Disks, vmconfig.Disk{Label: clip(devices.Name(d), 200), Kind: vmconfig.InPool, File: clip(file, 1000)})
		}
	}
	return out
}

// storage is a host's datastore system.
func (v *vsphere) storage(ctx context.Context, host string) (*object.HostDatastoreSystem, *object.HostSystem, error) {
	h := object.NewHostSystem(v.client, types.ManagedObjectReference{Type: "HostSystem", Value: host})
	dss, err := h.ConfigManager().DatastoreSystem(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("datastores of host %s: %w", host, err)
	}
	return dss, h, nil
}

// here finds the NFS datastore of a name that a host has.
func (v *vsphere) here(ctx context.Context, host, name string) (m Mount, ref types.ManagedObjectReference, found bool, err error) {
	var stores []mo.Datastore
	if err := v.retrieve(ctx, "Datastore", []string{"name", "info", "host", "summary"}, &stores); err != nil {
		return m, ref, false, err
	}
	for _, s := range stores {
		for _, at := range mountsIn(s) {
			if at.Host == host && at.Name == name {
				return at, s.Self, true, nil
			}
		}
	}
	return m, ref, false, nil
}

// Mount implements Hypervisor.
func (v *vsphere) Mount(ctx context.Context, m Mount) (already bool, err error) {
	have, _, found, err := v.here(ctx, m.Host, m.Name)
	if err != nil {
		return false, err
	}
	if found {
		if have.Server == m.Server && have.Export == m.Export {
			return true, nil
		}
		return false, fmt.Errorf("it has a datastore %s already, which is %s:%s", m.Name, have.Server, have.Export)
	}
	dss, _, err := v.storage(ctx, m.Host)
	if err != nil {
		return false, err
	}
	_, err = dss.CreateNasDatastore(ctx, types.HostNasVolumeSpec{RemoteHost: m.Server, RemotePath: m.Export, LocalPath: m.Name,
		AccessMode: string(types.HostMountModeReadWrite), Type: string(types.HostFileSystemVolumeFileSystemTypeNFS)})
	if err != nil {
		return false, fmt.Errorf("mount %s:%s as %s: %w", m.Server, m.Export, m.Name, err)
	}
	return false, nil
}

// Unmount implements Hypervisor.
func (v *vsphere) Unmount(ctx context.Context, host, name string) error {
	_, ref, found, err := v.here(ctx, host, name)
	if err != nil || !found {
		return err
	}
	dss, _, err := v.storage(ctx, host)
	if err != nil {
		return err
	}
	if err := dss.Remove(ctx, object.NewDatastore(v.client, ref)); err != nil {
		return fmt.Errorf("unmount %s: %w", name, err)
	}
	return nil
}

var errPacket = errors.New("a packet of libvirt has an impossible length")
