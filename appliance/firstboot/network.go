package firstboot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"varve/control/durable"
)

// NIC is a network card.
type NIC struct {
	Name string `json:"name"`
	MAC  string `json:"mac"`
	Link bool   `json:"link"` // a cable is in
	Type string `json:"driver,omitempty"`
}

// NICs are the network cards of the machine.
func NICs(p Paths) ([]NIC, error) { return listNICs(p.Sys) }

// listNICs gives the cards in the order of their slots, which is that of the kernel's names.
func listNICs(sys string) ([]NIC, error) {
	dir := filepath.Join(sys, "class/net")
	list, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	read := func(name, file string) string {
		b, err := readBounded(filepath.Join(dir, name, file), 1<<10)
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(b))
	}
	type indexed struct {
		NIC
		index int
	}
	var found []indexed
	for _, e := range list {
		if _, err := os.Stat(filepath.Join(dir, e.Name(), "device")); err != nil || read(e.Name(), "type") != "1" {
			continue // bridges, VLANs, loopback
		}
		n := indexed{NIC: NIC{Name: e.Name(), MAC: read(e.Name(), "address"), Link: read(e.Name(), "carrier") == "1"}}
		if driver, err := os.Readlink(filepath.Join(dir, e.Name(), "device/driver")); err == nil {
			n.Type = filepath.Base(driver)
		}
		n.index, _ = strconv.Atoi(read(e.Name(), "ifindex"))
		found = append(found, n)
	}
	slices.SortFunc(found, func(a, b indexed) int { return a.index - b.index })
	var out []NIC
	for _, n := range found {
		out = append(out, n.NIC)
	}
	return out, nil
}

// pick finds the cards of the two networks: those named, else the first and the second of the rest.
func pick(s Settings, nics []NIC) (mgmt, storage string) {
	named := func(want string) string {
		for _, n := range nics {
			if want != "" && (n.Name == want || n.MAC == want) {
				return n.Name
			}
		}
		return ""
	}
	mgmt, storage = named(s.Get(MgmtNIC)), named(s.Get(StorageNIC))
	for _, n := range nics {
		if mgmt == "" && n.Name != storage {
			mgmt = n.Name
		}
	}
	for _, n := range nics {
		if storage == "" && n.Name != mgmt {
			storage = n.Name
		}
	}
	return mgmt, storage
}

const (
	filePrefix = "10-varve-"
	otherFile  = "90-varve-dhcp.network" // it takes the place of the image's own, which knows no order of cards
)

// networkFiles are systemd-networkd's files for these settings, by name. Cards that nothing is said of ask DHCP, and nothing waits
// for them.
func networkFiles(s Settings, nics []NIC) map[string]string {
	out := make(map[string]string)
	mgmt, storage := pick(s, nics)
	if mgmt != "" {
		if vlan := s.Get(VLAN); vlan != "" {
			link := "vlan" + vlan
			out[filePrefix+"mgmt-card.network"] = section("Match", "Name="+mgmt) + linkSection(s.Get(MTU), false) +
				section("Network", "VLAN="+link, "LinkLocalAddressing=no", "IPv6AcceptRA=no")
			out[filePrefix+"mgmt-vlan.netdev"] = section("NetDev", "Name="+link, "Kind=vlan") + section("VLAN", "Id="+vlan)
			out[filePrefix+"mgmt.network"] = networkFile(link, s, s.Get(MgmtIP), fields(s.Get(Gateway)), s.Get(MTU), true)
		} else {
			out[filePrefix+"mgmt.network"] = networkFile(mgmt, s, s.Get(MgmtIP), fields(s.Get(Gateway)), s.Get(MTU), true)
		}
	}
	if storage != "" && (s.Get(StorageIP) != "" || s.Get(StorageMTU) != "" || s.Get(StorageNIC) != "") {
		out[filePrefix+"storage.network"] = networkFile(storage, s, s.Get(StorageIP), nil, s.Get(StorageMTU), false)
	}
	out[otherFile] = section("Match", "Type=ether", "Kind=!*") + linkSection("", false) +
		section("Network", "DHCP=yes", "LinkLocalAddressing=ipv6") + section("DHCPv4", "ClientIdentifier=mac", "UseRoutes=yes", "RouteMetric=2048", "UseHostname=no")
	return out
}

func linkSection(mtu string, required bool) string {
	need := "RequiredForOnline=no"
	if required {
		need = "RequiredForOnline=routable"
	}
	if mtu != "" {
		return section("Link", "MTUBytes="+mtu, need)
	}
	return section("Link", need)
}

// networkFile is one card's. primary is the network that names and time come through.
func networkFile(link string, s Settings, ip string, gateways []string, mtu string, primary bool) string {
	four, six := false, false
	var lines, routes []string
	for _, a := range fields(ip) {
		if p, err := netip.ParsePrefix(a); err == nil {
			four, six = four || p.Addr().Is4(), six || p.Addr().Is6()
			lines = append(lines, "Address="+a)
		}
	}
	for _, g := range gateways {
		routes = append(routes, section("Route", "Gateway="+g))
	}
	switch { // a family without a fixed address is automatic
	case !four && !six:
		lines = append(lines, "DHCP=yes")
	case four && !six:
		lines = append(lines, "DHCP=no")
	default:
		lines = append(lines, "DHCP=no", "IPv6AcceptRA=no")
	}
	lines = append(lines, "LinkLocalAddressing=ipv6")
	if primary {
		for _, d := range fields(s.Get(DNS)) {
			lines = append(lines, "DNS="+d)
		}
		if d := fields(s.Get(Search)); len(d) > 0 {
			lines = append(lines, "Domains="+strings.Join(d, " "))
		}
	}
	text := section("Match", "Name="+link) + linkSection(mtu, primary) + section("Network", lines...) + strings.Join(routes, "")
	if !four && !six {
		use := []string{"ClientIdentifier=mac", "UseHostname=no"}
		if primary {
			use = append(use, "UseDomains=yes")
			if s.Get(DNS) != "" {
				use = append(use, "UseDNS=no")
			}
		} else {
			use = append(use, "UseRoutes=no", "UseGateway=no", "UseDNS=no")
		}
		text += section("DHCPv4", use...)
	}
	return text
}

func section(name string, lines ...string) string {
	return "[" + name + "]\n" + strings.Join(lines, "\n") + "\n\n"
}

const ntpDefault = "2.debian.pool.ntp.org"

// Render writes what the settings mean. It is done at every boot and after every change; the same settings give the same files.
func Render(ctx context.Context, cfg Config, s Settings, nics []NIC) error {
	var errs []error
	write := func(dir, name, text string, perm fs.FileMode) {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			errs = append(errs, err)
			return
		}
		errs = append(errs, durable.Replace(dir, name, []byte(text), perm))
	}
	files := networkFiles(s, nics)
	for name, text := range files {
		write(cfg.Paths.Network, name, text, 0o644)
	}
	for _, name := range []string{"mgmt-card.network", "mgmt-vlan.netdev", "storage.network", "mgmt.network"} {
		if _, still := files[filePrefix+name]; !still {
			if err := os.Remove(filepath.Join(cfg.Paths.Network, filePrefix+name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	servers := fields(s.Get(NTP))
	var chrony strings.Builder
	for _, n := range servers {
		fmt.Fprintf(&chrony, "server %s iburst\n", n)
	}
	if len(servers) == 0 {
		fmt.Fprintf(&chrony, "pool %s iburst maxsources 4\n", ntpDefault)
	}
	write(cfg.Paths.Chrony, "varve.sources", chrony.String(), 0o644)
	name := hostnameOf(s, nics)
	write(cfg.Paths.Run, "hostname", name+"\n", 0o644)
	if err := cfg.Host.SetHostname(name); err != nil {
		errs = append(errs, fmt.Errorf("set host name %s: %w", name, err))
	}
	if tz := s.Get(Timezone); tz != "" {
		errs = append(errs, link(filepath.Join("/usr/share/zoneinfo", tz), filepath.Join(cfg.Paths.Run, "localtime")))
	}
	if k := s.Get(SSHKeys); k != "" {
		write(filepath.Join(cfg.Paths.Run, "ssh"), "authorized_keys", k+"\n", 0o600)
	}
	return errors.Join(errs...)
}

// hostnameOf is the name set, else one that tells the appliances of one image apart.
func hostnameOf(s Settings, nics []NIC) string {
	if n := s.Get(Hostname); n != "" {
		return n
	}
	if mgmt, _ := pick(s, nics); mgmt != "" {
		for _, n := range nics {
			if hex := strings.ReplaceAll(n.MAC, ":", ""); n.Name == mgmt && len(hex) == 12 {
				return "varve-" + hex[6:]
			}
		}
	}
	return "varve"
}

// link makes a symlink in place of whatever file is there.
func link(to, at string) error {
	tmp := at + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(to, tmp); err != nil {
		return err
	}
	return os.Rename(tmp, at)
}
