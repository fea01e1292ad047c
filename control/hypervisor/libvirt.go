package hypervisor

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/xml"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"

	libvirt "github.com/digitalocean/go-libvirt"

	"varve/control/state"
	"varve/control/vmachine/vmconfig"
)

const tlsPort, tcpPort = "16514", "16509"

// virt is a session with a libvirt daemon. Its host is the only one, called by what the daemon calls itself.
type virt struct {
	l    *libvirt.Libvirt
	host string
	stop func() bool
}

// dialer makes the connection of a session.
type dialer struct {
	ctx  context.Context // of the one session
	e    Endpoint
	u    *url.URL
	conn atomic.Pointer[packets]
}

// hangUp ends the connection, if there is one by now.
func (d *dialer) hangUp() {
	if c := d.conn.Load(); c != nil {
		_ = c.Close()
	}
}

// Dial implements go-libvirt's Dialer.
func (d *dialer) Dial() (net.Conn, error) {
	_, transport, _ := strings.Cut(d.u.Scheme, "+")
	var nd net.Dialer
	at := func(port string) string {
		if p := d.u.Port(); p != "" {
			port = p
		}
		return net.JoinHostPort(d.u.Hostname(), port)
	}
	var c net.Conn
	var err error
	switch transport {
	case "unix":
		c, err = nd.DialContext(d.ctx, "unix", d.u.Query().Get("socket"))
	case "tcp":
		c, err = nd.DialContext(d.ctx, "tcp", at(tcpPort))
	default:
		c, err = d.dialTLS(&nd, at(tlsPort))
	}
	if err != nil {
		return nil, err
	}
	p := &packets{Conn: c}
	d.conn.Store(p)
	if err := d.ctx.Err(); err != nil { // it ended before there was something to hang up
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

// dialTLS waits for the byte with which libvirt says that it takes our certificate.
func (d *dialer) dialTLS(nd *net.Dialer, at string) (net.Conn, error) {
	conf, err := tlsConfig(d.e, d.u.Hostname())
	if err != nil {
		return nil, err
	}
	c, err := (&tls.Dialer{NetDialer: nd, Config: conf}).DialContext(d.ctx, "tcp", at)
	if err != nil {
		return nil, err
	}
	if limit, ok := d.ctx.Deadline(); ok {
		if err := c.SetDeadline(limit); err != nil {
			return nil, errors.Join(err, c.Close())
		}
	}
	var ok [1]byte
	if _, err := c.Read(ok[:]); err != nil || ok[0] != 1 {
		return nil, errors.Join(errors.New("libvirt does not take our certificate, or our address"), err, c.Close())
	}
	return c, nil
}

// packets refuses a packet whose length would have the client fail or take too much memory.
type packets struct {
	net.Conn
	mu   sync.Mutex
	head []byte // of a length that has not come in full
	left int    // of the packet
}

// Read implements net.Conn. It gives at most what is left of a packet, so that it sees each length.
func (p *packets) Read(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(b) == 0 {
		return 0, nil
	}
	if p.left > 0 {
		n, err := p.Conn.Read(b[:min(len(b), p.left)])
		p.left -= n
		return n, err
	}
	n, err := p.Conn.Read(b[:min(len(b), 4-len(p.head))])
	p.head = append(p.head, b[:n]...)
	if len(p.head) < 4 {
		return n, err
	}
	length := binary.BigEndian.Uint32(p.head)
	p.head = p.head[:0]
	if length < 28 || length > packetBytesMax {
		return 0, errors.Join(fmt.Errorf("%d bytes: %w", length, errPacket), p.Conn.Close())
	}
	p.left = int(length) - 4
	return n, err
}

func dialLibvirt(ctx context.Context, e Endpoint) (Hypervisor, error) {
	u, err := url.Parse(e.Address)
	if err != nil {
		return nil, fmt.Errorf("address of a libvirt: %w", ErrAddress)
	}
	driver, _, _ := strings.Cut(u.Scheme, "+")
	d := &dialer{ctx: ctx, e: e, u: u}
	v := &virt{l: libvirt.NewWithDialer(d)}
	// Calls of the library take no context: its end closes the connection, which ends them.
	v.stop = context.AfterFunc(ctx, d.hangUp)
	if err := v.l.ConnectToURI(libvirt.ConnectURI(driver + "://" + u.Path)); err != nil {
		v.stop()
		return nil, fmt.Errorf("reach libvirt at %s: %w", shown(u), errors.Join(err, ctx.Err()))
	}
	if v.host, err = v.l.ConnectGetHostname(); err != nil {
		v.Close()
		return nil, fmt.Errorf("name of the host of libvirt at %s: %w", shown(u), err)
	}
	v.host = clip(v.host, 200)
	return v, nil
}

func shown(u *url.URL) string {
	if u.Host != "" {
		return u.Host
	}
	return u.Query().Get("socket")
}

// Close implements Hypervisor.
func (v *virt) Close() {
	_ = v.l.Disconnect() // what is not said now the daemon finds out by itself
	v.stop()
}

// Inventory implements Hypervisor.
func (v *virt) Inventory(context.Context) (Inventory, error) {
	var inv Inventory
	if n, err := v.l.ConnectGetLibVersion(); err == nil {
		inv.Version = fmt.Sprintf("libvirt %d.%d.%d", n/1e6, n/1000%1000, n%1000)
	}
	inv.Hosts = []Host{{Ref: v.host, Name: v.host, State: "connected", Version: inv.Version}}
	pools, err := v.pools()
	if err != nil {
		return inv, err
	}
	inv.Mounts = pools
	domains, _, err := v.l.ConnectListAllDomains(1, 0)
	if err != nil {
		return inv, fmt.Errorf("list domains: %w", err)
	}
	if len(domains) > machinesMax {
		return inv, fmt.Errorf("%d domains are more than this version takes", len(domains))
	}
	for _, d := range domains {
		m, err := v.machine(d)
		if gone(err, libvirt.ErrNoDomain) {
			continue // undefined meanwhile
		}
		if err != nil {
			return inv, err
		}
		inv.Machines = append(inv.Machines, m)
	}
	return inv, nil
}

// gone says that libvirt knows no such object.
func gone(err error, code libvirt.ErrorNumber) bool {
	e, ok := errors.AsType[libvirt.Error](err)
	return ok && e.Code == uint32(code)
}

func (v *virt) machine(d libvirt.Domain) (Machine, error) {
	text, err := v.l.DomainGetXMLDesc(d, 0)
	if err != nil {
		return Machine{}, fmt.Errorf("domain %.80q: %w", d.Name, err)
	}
	at, _, err := v.l.DomainGetState(d, 0)
	if err != nil {
		return Machine{}, fmt.Errorf("domain %.80q: %w", d.Name, err)
	}
	c, err := vmconfig.Parse(vmconfig.Libvirt, []byte(text))
	if err != nil {
		return Machine{}, fmt.Errorf("domain %.80q: %w", d.Name, err)
	}
	m := Machine{UUID: c.UUID, Name: c.Name, Host: v.host, Format: state.FormatLibvirt, Guest: c.Guest, VCPUs: c.VCPUs, Memory: c.Memory, Disks: c.Disks}
	switch libvirt.DomainState(at) {
	case libvirt.DomainRunning, libvirt.DomainBlocked, libvirt.DomainShutdown:
		m.Power = state.PowerRunning
	case libvirt.DomainPaused, libvirt.DomainPmsuspended:
		m.Power = state.PowerPaused
	case libvirt.DomainShutoff, libvirt.DomainCrashed:
		m.Power = state.PowerHalted
	}
	return m, nil
}

// storagePool is what matters of a pool's XML.
type storagePool struct {
	Type   string `xml:"type,attr"`
	Name   string `xml:"name"`
	Source struct {
		Host struct {
			Name string `xml:"name,attr"`
		} `xml:"host"`
		Dir struct {
			Path string `xml:"path,attr"`
		} `xml:"dir"`
	} `xml:"source"`
	Target struct {
		Path string `xml:"path"`
	} `xml:"target"`
}

// pools are the netfs pools.
func (v *virt) pools() ([]Mount, error) {
	all, _, err := v.l.ConnectListAllStoragePools(1, 0)
	if err != nil {
		return nil, fmt.Errorf("list storage pools: %w", err)
	}
	if len(all) > mountsMax {
		return nil, fmt.Errorf("%d storage pools are more than this version takes", len(all))
	}
	var out []Mount
	for _, p := range all {
		m, ok, err := v.pool(p)
		if err != nil {
			return nil, err
		}
		if ok {
			out = append(out, m)
		}
	}
	return out, nil
}

func (v *virt) pool(p libvirt.StoragePool) (m Mount, ok bool, err error) {
	text, err := v.l.StoragePoolGetXMLDesc(p, 0)
	if gone(err, libvirt.ErrNoStoragePool) {
		return m, false, nil
	}
	if err != nil {
		return m, false, fmt.Errorf("storage pool %.80q: %w", p.Name, err)
	}
	var x storagePool
	if err := xml.Unmarshal([]byte(text), &x); err != nil {
		return m, false, fmt.Errorf("storage pool %.80q: %w", p.Name, err)
	}
	if x.Type != "netfs" {
		return m, false, nil
	}
	is, _, _, _, err := v.l.StoragePoolGetInfo(p)
	if err != nil {
		return m, false, fmt.Errorf("storage pool %.80q: %w", p.Name, err)
	}
	return Mount{Host: v.host, Name: clip(x.Name, 200), Server: clip(x.Source.Host.Name, 200), Export: clip(x.Source.Dir.Path, 200),
		Path: clip(x.Target.Path, 200), Usable: libvirt.StoragePoolState(is) == libvirt.StoragePoolRunning}, true, nil
}

// PoolXML is the storage pool that a libvirt host mounts an export with.
func PoolXML(m Mount) string {
	esc := func(s string) string {
		var b strings.Builder
		_ = xml.EscapeText(&b, []byte(s)) // a builder takes everything
		return b.String()
	}
	return fmt.Sprintf(`<pool type='netfs'>
  <name>%s</name>
  <source>
    <host name='%s'/>
    <dir path='%s'/>
    <format type='nfs'/>
    <protocol ver='3'/>
  </source>
  <target><path>%s</path></target>
</pool>
`, esc(m.Name), esc(m.Server), esc(m.Export), esc(m.Path))
}

// PoolPath is where a libvirt host has a vPool mounted unless told otherwise.
func PoolPath(name string) string { return "/var/lib/libvirt/images/" + name }

// Mount implements Hypervisor: a netfs pool, which is started and will be with its host.
func (v *virt) Mount(_ context.Context, m Mount) (already bool, err error) {
	p, err := v.l.StoragePoolLookupByName(m.Name)
	switch {
	case err == nil:
		have, ok, err := v.pool(p)
		if err != nil {
			return false, err
		}
		if !ok || have.Server != m.Server || have.Export != m.Export {
			return false, fmt.Errorf("it has a storage pool %s already, which is another: %s:%s", m.Name, have.Server, have.Export)
		}
		if have.Usable {
			return true, nil
		}
	case gone(err, libvirt.ErrNoStoragePool):
		if m.Path == "" {
			m.Path = PoolPath(m.Name)
		}
		if p, err = v.l.StoragePoolDefineXML(PoolXML(m), 0); err != nil {
			return false, fmt.Errorf("define storage pool %s: %w", m.Name, err)
		}
	default:
		return false, fmt.Errorf("look for storage pool %s: %w", m.Name, err)
	}
	if err := v.l.StoragePoolBuild(p, 0); err != nil { // makes the directory
		return false, fmt.Errorf("build storage pool %s: %w", m.Name, err)
	}
	if err := v.l.StoragePoolCreate(p, 0); err != nil {
		return false, fmt.Errorf("start storage pool %s: %w", m.Name, err)
	}
	if err := v.l.StoragePoolSetAutostart(p, 1); err != nil {
		return false, fmt.Errorf("have storage pool %s start with its host: %w", m.Name, err)
	}
	return false, nil
}

// Unmount implements Hypervisor.
func (v *virt) Unmount(_ context.Context, _, name string) error {
	p, err := v.l.StoragePoolLookupByName(name)
	if gone(err, libvirt.ErrNoStoragePool) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for storage pool %s: %w", name, err)
	}
	m, ok, err := v.pool(p)
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("storage pool %s is no mount", name)
	}
	if m.Usable {
		if err := v.l.StoragePoolDestroy(p); err != nil {
			return fmt.Errorf("stop storage pool %s: %w", name, err)
		}
	}
	if err := v.l.StoragePoolUndefine(p); err != nil {
		return fmt.Errorf("undefine storage pool %s: %w", name, err)
	}
	return nil
}
