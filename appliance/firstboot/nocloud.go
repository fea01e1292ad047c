package firstboot

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// seed is a NoCloud data source: what lies on a disk labelled CIDATA. Files that are not there are empty.
type seed struct {
	meta, user, network []byte
}

const seedBytesMax = 64 << 10

// parseSeed reads the part of cloud-init's formats that says what an appliance needs to know. What else is in user-data (packages,
// commands, users) does not apply to an appliance and is left alone.
//
//	meta-data       local-hostname, public-keys
//	user-data       #cloud-config: hostname, fqdn, timezone, ssh_authorized_keys, ntp.servers, ntp.pools, and varve: {KEY: VALUE}
//	network-config  version 2: ethernets, vlans; version 1: physical, vlan, nameserver (what Proxmox VE writes)
//
// The first card with an address is management, the second storage. Keys under varve: count more than the rest.
func parseSeed(s seed) (map[string]string, error) {
	out := make(map[string]string)
	var errs []error
	for _, part := range []struct {
		name  string
		b     []byte
		parse func([]byte, map[string]string) error
	}{{"network-config", s.network, parseNetwork}, {"meta-data", s.meta, parseMeta}, {"user-data", s.user, parseUser}} {
		if len(strings.TrimSpace(string(part.b))) == 0 {
			continue
		}
		err := error(nil)
		if len(part.b) > seedBytesMax {
			err = fmt.Errorf("more than %d bytes", seedBytesMax)
		} else {
			err = part.parse(part.b, out)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", part.name, err))
		}
	}
	return out, errors.Join(errs...)
}

func set(out map[string]string, k, v string) {
	if strings.TrimSpace(v) != "" {
		out[k] = v
	}
}

func parseMeta(b []byte, out map[string]string) error {
	var m struct {
		Hostname string `yaml:"local-hostname"`
		Old      string `yaml:"hostname"`
		Keys     texts  `yaml:"public-keys"`
	}
	if err := yaml.Unmarshal(b, &m); err != nil {
		return err
	}
	set(out, Hostname, m.Old)
	set(out, Hostname, m.Hostname)
	set(out, SSHKeys, strings.Join(m.Keys, "\n"))
	return nil
}

// texts is a list of strings, or one string.
type texts []string

// UnmarshalYAML implements yaml.Unmarshaler.
func (l *texts) UnmarshalYAML(n *yaml.Node) error {
	switch n.Kind {
	case yaml.ScalarNode:
		if n.Tag != "!!null" {
			*l = texts{n.Value}
		}
		return nil
	case yaml.SequenceNode:
		for _, c := range n.Content {
			if c.Kind != yaml.ScalarNode {
				return fmt.Errorf("line %d: not a list of words", c.Line)
			}
			*l = append(*l, c.Value)
		}
		return nil
	}
	return nil // a form that says nothing to us
}

const cloudConfig = "#cloud-config"

func parseUser(b []byte, out map[string]string) error {
	first, _, _ := strings.Cut(string(b), "\n")
	if strings.TrimSpace(first) != cloudConfig {
		return nil // a script, a MIME archive: not for an appliance
	}
	var u struct {
		Hostname string `yaml:"hostname"`
		FQDN     string `yaml:"fqdn"`
		Timezone string `yaml:"timezone"`
		Keys     texts  `yaml:"ssh_authorized_keys"`
		NTP      struct {
			Servers texts `yaml:"servers"`
			Pools   texts `yaml:"pools"`
		} `yaml:"ntp"`
		Varve map[string]yaml.Node `yaml:"varve"`
	}
	if err := yaml.Unmarshal(b, &u); err != nil {
		return err
	}
	set(out, Hostname, u.Hostname)
	set(out, Hostname, u.FQDN)
	set(out, Timezone, u.Timezone)
	set(out, SSHKeys, strings.Join(u.Keys, "\n"))
	set(out, NTP, strings.Join(append(u.NTP.Servers, u.NTP.Pools...), " "))
	return words(u.Varve, out)
}

// words takes a mapping of our own keys.
func words(m map[string]yaml.Node, out map[string]string) error {
	for k, n := range m {
		sep := " "
		if k == SSHKeys {
			sep = "\n"
		}
		var l texts
		if err := l.UnmarshalYAML(&n); err != nil {
			return fmt.Errorf("%s: %w", clip(k), err)
		}
		set(out, k, strings.Join(l, sep))
	}
	return nil
}

// port is a card or a VLAN on one, as network-config has it.
type port struct {
	id       string // how vlans refer to it
	nic      string // MAC, else name
	vlan     int
	dhcp     bool
	addrs    []string
	gateways []string
	dns      []string
	search   []string
	mtu      int
}

const portsMax = 32

func parseNetwork(b []byte, out map[string]string) error {
	var doc struct {
		Inner yaml.Node `yaml:"network"`
	}
	if err := yaml.Unmarshal(b, &doc); err != nil {
		return err
	}
	var root yaml.Node
	if err := yaml.Unmarshal(b, &root); err != nil {
		return err
	}
	node := &root
	if doc.Inner.Kind != 0 {
		node = &doc.Inner
	}
	var v struct {
		Version int `yaml:"version"`
	}
	if err := node.Decode(&v); err != nil {
		return err
	}
	var ports []port
	var dns, search []string
	var err error
	switch v.Version {
	case 1:
		ports, dns, search, err = networkV1(node)
	case 2:
		ports, err = networkV2(node)
	default:
		return fmt.Errorf("version %d is neither 1 nor 2", v.Version)
	}
	if err != nil {
		return err
	}
	assign(ports, dns, search, out)
	return nil
}

// assign makes the first port with an address the management network and the second the storage network.
func assign(ports []port, dns, search []string, out map[string]string) {
	var used []port
	for _, p := range ports {
		if p.dhcp || len(p.addrs) > 0 {
			used = append(used, p)
		}
	}
	// The one with a gateway is management, wherever it stands.
	if len(used) > 1 && len(used[0].gateways) == 0 && !used[0].dhcp && len(used[1].gateways) > 0 {
		used[0], used[1] = used[1], used[0]
	}
	ip := func(p port) string {
		if len(p.addrs) == 0 {
			return dhcp
		}
		return strings.Join(p.addrs, " ")
	}
	if len(used) > 0 {
		m := used[0]
		set(out, MgmtNIC, m.nic)
		set(out, MgmtIP, ip(m))
		set(out, Gateway, strings.Join(m.gateways, " "))
		dns, search = append(m.dns, dns...), append(m.search, search...)
		if m.vlan > 0 {
			set(out, VLAN, strconv.Itoa(m.vlan))
		}
		if m.mtu > 0 {
			set(out, MTU, strconv.Itoa(m.mtu))
		}
	}
	if len(used) > 1 && used[1].vlan == 0 {
		s := used[1]
		set(out, StorageNIC, s.nic)
		set(out, StorageIP, ip(s))
		if s.mtu > 0 {
			set(out, StorageMTU, strconv.Itoa(s.mtu))
		}
		dns, search = append(dns, s.dns...), append(search, s.search...)
	}
	set(out, DNS, strings.Join(unique(dns), " "))
	set(out, Search, strings.Join(unique(search), " "))
}

func unique(list []string) []string {
	var out []string
	seen := make(map[string]bool)
	for _, s := range list {
		if !seen[s] {
			out, seen[s] = append(out, s), true
		}
	}
	return out
}

// v2Port is an entry of ethernets or vlans.
type v2Port struct {
	Match struct {
		MAC  string `yaml:"macaddress"`
		Name string `yaml:"name"`
	} `yaml:"match"`
	SetName   string      `yaml:"set-name"`
	DHCP4     bool        `yaml:"dhcp4"`
	DHCP6     bool        `yaml:"dhcp6"`
	Addresses []yaml.Node `yaml:"addresses"`
	Gateway4  string      `yaml:"gateway4"`
	Gateway6  string      `yaml:"gateway6"`
	Routes    []struct {
		To  string `yaml:"to"`
		Via string `yaml:"via"`
	} `yaml:"routes"`
	Nameservers struct {
		Addresses texts `yaml:"addresses"`
		Search    texts `yaml:"search"`
	} `yaml:"nameservers"`
	MTU  int    `yaml:"mtu"`
	ID   int    `yaml:"id"`
	Link string `yaml:"link"`
}

func (v v2Port) port(id string) port {
	p := port{id: id, nic: id, dhcp: v.DHCP4 || v.DHCP6, dns: v.Nameservers.Addresses, search: v.Nameservers.Search, mtu: v.MTU}
	switch {
	case v.Match.MAC != "":
		p.nic = v.Match.MAC
	case v.Match.Name != "" && !strings.ContainsAny(v.Match.Name, "*?["):
		p.nic = v.Match.Name
	case v.SetName != "":
		p.nic = v.SetName
	}
	for _, a := range v.Addresses {
		switch {
		case a.Kind == yaml.ScalarNode:
			p.addrs = append(p.addrs, a.Value)
		case a.Kind == yaml.MappingNode && len(a.Content) > 0: // "10.0.0.1/24": {label: …}
			p.addrs = append(p.addrs, a.Content[0].Value)
		}
	}
	for _, g := range []string{v.Gateway4, v.Gateway6} {
		if g != "" {
			p.gateways = append(p.gateways, g)
		}
	}
	for _, r := range v.Routes {
		if r.Via != "" && (r.To == "default" || r.To == "0.0.0.0/0" || r.To == "::/0") {
			p.gateways = append(p.gateways, r.Via)
		}
	}
	return p
}

// networkV2 reads the ports in the order of the document.
func networkV2(node *yaml.Node) ([]port, error) {
	var doc struct {
		Ethernets yaml.Node `yaml:"ethernets"`
		VLANs     yaml.Node `yaml:"vlans"`
	}
	if err := node.Decode(&doc); err != nil {
		return nil, err
	}
	ethernets, _, err := v2Ports(&doc.Ethernets)
	if err != nil {
		return nil, err
	}
	vlans, details, err := v2Ports(&doc.VLANs)
	if err != nil {
		return nil, err
	}
	for i, p := range vlans {
		p.vlan, p.nic = details[i].ID, details[i].Link
		for _, e := range ethernets {
			if e.id == details[i].Link {
				p.nic = e.nic
			}
		}
		vlans[i] = p
	}
	return append(ethernets, vlans...), nil
}

func v2Ports(n *yaml.Node) ([]port, []v2Port, error) {
	if n.Kind != yaml.MappingNode {
		return nil, nil, nil
	}
	if len(n.Content)/2 > portsMax {
		return nil, nil, fmt.Errorf("more than %d ports", portsMax)
	}
	var ports []port
	var details []v2Port
	for i := 0; i+1 < len(n.Content); i += 2 {
		var v v2Port
		if err := n.Content[i+1].Decode(&v); err != nil {
			return nil, nil, err
		}
		ports, details = append(ports, v.port(n.Content[i].Value)), append(details, v)
	}
	return ports, details, nil
}

// networkV1 reads version 1: a list of devices with subnets.
func networkV1(node *yaml.Node) (ports []port, dns, search []string, err error) {
	var doc struct {
		Config []struct {
			Type    string `yaml:"type"`
			Name    string `yaml:"name"`
			MAC     string `yaml:"mac_address"`
			MTU     int    `yaml:"mtu"`
			VLAN    int    `yaml:"vlan_id"`
			Link    string `yaml:"vlan_link"`
			Address texts  `yaml:"address"`
			Search  texts  `yaml:"search"`
			Subnets []struct {
				Type    string `yaml:"type"`
				Address string `yaml:"address"`
				Netmask string `yaml:"netmask"`
				Gateway string `yaml:"gateway"`
				DNS     texts  `yaml:"dns_nameservers"`
				Search  texts  `yaml:"dns_search"`
			} `yaml:"subnets"`
		} `yaml:"config"`
	}
	if err := node.Decode(&doc); err != nil {
		return nil, nil, nil, err
	}
	if len(doc.Config) > portsMax {
		return nil, nil, nil, fmt.Errorf("more than %d entries", portsMax)
	}
	for _, c := range doc.Config {
		switch c.Type {
		case "nameserver":
			dns, search = append(dns, c.Address...), append(search, c.Search...)
			continue
		case "physical", "vlan":
		default:
			continue
		}
		p := port{id: c.Name, nic: c.MAC, mtu: c.MTU, vlan: c.VLAN}
		if p.nic == "" {
			p.nic = c.Name
		}
		if c.Type == "vlan" {
			p.nic = c.Link
			for _, other := range ports {
				if other.id == c.Link {
					p.nic = other.nic
				}
			}
		}
		for _, s := range c.Subnets {
			switch {
			case strings.HasPrefix(s.Type, "dhcp"), s.Type == "ipv6_slaac":
				p.dhcp = true
			case s.Address != "":
				a, err := withMask(s.Address, s.Netmask)
				if err != nil {
					return nil, nil, nil, err
				}
				p.addrs = append(p.addrs, a)
				if s.Gateway != "" {
					p.gateways = append(p.gateways, s.Gateway)
				}
			}
			p.dns, p.search = append(p.dns, s.DNS...), append(p.search, s.Search...)
		}
		ports = append(ports, p)
	}
	return ports, dns, search, nil
}

// withMask gives ADDRESS/PREFIX for an address with a netmask, or with a prefix already.
func withMask(address, mask string) (string, error) {
	if strings.Contains(address, "/") || mask == "" {
		return address, nil
	}
	if n, err := strconv.Atoi(mask); err == nil {
		return fmt.Sprintf("%s/%d", address, n), nil
	}
	m, err := netip.ParseAddr(mask)
	if err != nil || !m.Is4() {
		return "", fmt.Errorf("netmask %q", clip(mask))
	}
	b := m.As4()
	ones, bits := net.IPMask(b[:]).Size()
	if bits == 0 {
		return "", fmt.Errorf("netmask %q has holes", clip(mask))
	}
	return fmt.Sprintf("%s/%d", address, ones), nil
}
