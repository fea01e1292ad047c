package firstboot

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"varve/control/durable"
)

// Sources of settings, the one that counts most first.
const (
	SourceConsole    = "console"
	SourceOVF        = "ovf"
	SourceGuestInfo  = "guestinfo"
	SourceNoCloud    = "nocloud"
	SourceCredential = "credential"
	SourceFWCfg      = "fw_cfg"
)

// Keys of settings. The OVF property of a key is guestinfo.varve.KEY.
const (
	Hostname    = "hostname"     // a host name, with or without domain
	MgmtNIC     = "mgmt_nic"     // name or MAC of the card; the first one
	MgmtIP      = "mgmt_ip"      // ADDRESS/PREFIX, IPv4 or IPv6, two of them for both; dhcp
	Gateway     = "gateway"      // one address per family
	DNS         = "dns"          // addresses
	Search      = "search"       // domains
	VLAN        = "vlan"         // 1 to 4094, of the management network
	MTU         = "mtu"          // of the management network
	StorageNIC  = "storage_nic"  // name or MAC of the card; the second one
	StorageIP   = "storage_ip"   // ADDRESS/PREFIX; dhcp
	StorageMTU  = "storage_mtu"  // 9000 for jumbo frames
	NTP         = "ntp"          // servers
	Timezone    = "timezone"     // Europe/Brussels
	SSHKeys     = "ssh_keys"     // authorized keys, one a line; ssh stays off until it is switched on
	Mode        = "mode"         // new, join or ask
	ClusterName = "cluster_name" // a label for people
	// Secrets: used once, then forgotten.
	AdminPassword = "admin_password"
	JoinToken     = "join_token"
)

// key says what values a setting takes. normal gives the value as it is kept, or why there can be no such value.
type key struct {
	name   string
	secret bool
	normal func(string) (string, error)
}

const valueBytesMax = 8 << 10

var keys = []key{
	{Hostname, false, hostname},
	{MgmtNIC, false, nicName},
	{MgmtIP, false, addresses},
	{Gateway, false, list(4, plainAddress)},
	{DNS, false, list(8, plainAddress)},
	{Search, false, list(8, hostname)},
	{VLAN, false, number(1, 4094)},
	{MTU, false, number(1280, 9216)},
	{StorageNIC, false, nicName},
	{StorageIP, false, addresses},
	{StorageMTU, false, number(1280, 9216)},
	{NTP, false, list(8, ntpServer)},
	{Timezone, false, timezone},
	{SSHKeys, false, sshKeys},
	{Mode, false, oneOf("new", "join", "ask")},
	{ClusterName, false, label},
	{AdminPassword, true, secretText(8, 256)},
	{JoinToken, true, secretText(16, 4096)},
}

func keyOf(name string) (key, bool) {
	i := slices.IndexFunc(keys, func(k key) bool { return k.name == name })
	if i < 0 {
		return key{}, false
	}
	return keys[i], true
}

// Value of a setting.
type Value struct {
	Text   string `json:"value"`
	Source string `json:"source"`
}

// Settings by key. Secrets are never among them.
type Settings map[string]Value

// Get is a setting's text, "" if it is not set.
func (s Settings) Get(name string) string { return s[name].Text }

// InvalidError is a setting that cannot be.
type InvalidError struct{ Key, Why string }

func (e *InvalidError) Error() string { return e.Key + " " + e.Why }

// normal checks a value from outside and gives it its kept form.
func normal(name, text string) (string, error) {
	k, ok := keyOf(name)
	if !ok {
		return "", &InvalidError{name, "is no setting"}
	}
	if len(text) > valueBytesMax || !utf8.ValidString(text) {
		return "", &InvalidError{name, fmt.Sprintf("is longer than %d bytes or not UTF-8", valueBytesMax)}
	}
	v, err := k.normal(strings.TrimSpace(text))
	if err != nil {
		if k.secret { // what it was is not for a log
			return "", &InvalidError{name, err.Error()}
		}
		return "", &InvalidError{name, fmt.Sprintf("%q %v", clip(text), err)}
	}
	return v, nil
}

func clip(s string) string {
	if len(s) > 60 {
		return strings.ToValidUTF8(s[:60], "") + "…"
	}
	return s
}

// check refuses what a damaged file or another version may hold.
func (s Settings) check() error {
	for name, v := range s {
		k, ok := keyOf(name)
		if !ok {
			continue // of a newer version
		}
		if k.secret {
			return &InvalidError{name, "is a secret and may not be kept"}
		}
		if _, err := normal(name, v.Text); err != nil {
			return err
		}
	}
	return s.together()
}

// together refuses settings that make no sense beside each other.
func (s Settings) together() error {
	static := slices.DeleteFunc(fields(s.Get(MgmtIP)), func(a string) bool { return a == dhcp })
	for _, g := range fields(s.Get(Gateway)) {
		gw, err := netip.ParseAddr(g)
		if err != nil {
			return &InvalidError{Gateway, "is no address"}
		}
		reached := slices.ContainsFunc(static, func(a string) bool {
			p, err := netip.ParsePrefix(a)
			return err == nil && p.Contains(gw) && p.Addr() != gw
		})
		if !reached && !gw.IsLinkLocalUnicast() {
			return &InvalidError{Gateway, fmt.Sprintf("%s is not in the network of mgmt_ip %q", g, s.Get(MgmtIP))}
		}
	}
	for _, a := range fields(s.Get(StorageIP)) {
		st, err := netip.ParsePrefix(a)
		for _, b := range static {
			if mg, e := netip.ParsePrefix(b); err == nil && e == nil && st.Overlaps(mg) {
				return &InvalidError{StorageIP, fmt.Sprintf("%s overlaps mgmt_ip %s: the two cards need networks of their own", a, b)}
			}
		}
	}
	return nil
}

// Merge gives the settings in force from those kept and those that the sources give now.
func Merge(kept, found Settings) Settings {
	out := make(Settings, len(kept)+len(found))
	maps.Copy(out, kept)
	for k, v := range found {
		if have, ok := kept[k]; ok && have.Source == SourceConsole {
			continue
		}
		out[k] = v
	}
	if out.together() == nil {
		return out
	}
	// New values beside old ones make no sense: what belongs together is taken from the sources as a whole.
	for _, k := range []string{Gateway, MgmtIP, StorageIP} {
		if _, given := found[k]; !given && out[k].Source != SourceConsole {
			delete(out, k)
		}
	}
	if out.together() == nil {
		return out
	}
	if kept.together() == nil { // as before, which worked
		return maps.Clone(kept)
	}
	for _, k := range []string{Gateway, MgmtIP, StorageIP} {
		delete(out, k)
	}
	return out
}

// pending are secrets by key; done names those that were used, so that a source that still gives them is not listened to again.
type pending struct {
	Secrets map[string]string `json:"secrets,omitempty"`
	Done    []string          `json:"done,omitempty"`
}

func loadPending(p Paths) (pending, error) {
	var have pending
	err := readJSON(filepath.Join(p.State, pendingFile), &have)
	if errors.Is(err, fs.ErrNotExist) {
		return pending{}, nil
	}
	return have, err
}

func (n pending) save(p Paths) error {
	b, err := json.Marshal(n)
	if err != nil {
		return fmt.Errorf("encode one-time settings: %w", err)
	}
	return durable.Replace(p.State, pendingFile, append(b, '\n'), 0o600)
}

// keepPending keeps secrets that wait for their use and returns the keys of all that do. With a data disk that has served before,
// there is nothing left to claim or to join.
func keepPending(p Paths, found map[string]string) ([]string, error) {
	have, err := loadPending(p)
	if err != nil {
		return nil, err
	}
	changed := false
	for k, v := range found {
		if slices.Contains(have.Done, k) || have.Secrets[k] == v {
			continue
		}
		if have.Secrets == nil {
			have.Secrets = make(map[string]string)
		}
		have.Secrets[k] = v
		changed = true
	}
	if changed {
		err = have.save(p)
	}
	return slices.Sorted(maps.Keys(have.Secrets)), err
}

// Pending is a secret that waits for its use, "" if there is none.
func Pending(p Paths, name string) (string, error) {
	have, err := loadPending(p)
	return have.Secrets[name], err
}

func used(p Paths, name string) bool {
	have, err := loadPending(p)
	return err == nil && slices.Contains(have.Done, name)
}

// Used forgets a secret for ever.
func Used(p Paths, name string) error {
	have, err := loadPending(p)
	if err != nil {
		return err
	}
	delete(have.Secrets, name)
	if !slices.Contains(have.Done, name) {
		have.Done = append(have.Done, name)
	}
	return have.save(p)
}

// Ask keeps a secret that the administrator typed, also where one was used before.
func Ask(p Paths, name, text string) error {
	v, err := normal(name, text)
	if err != nil {
		return err
	}
	have, err := loadPending(p)
	if err != nil {
		return err
	}
	have.Done = slices.DeleteFunc(have.Done, func(k string) bool { return k == name })
	if have.Secrets == nil {
		have.Secrets = make(map[string]string)
	}
	have.Secrets[name] = v
	return have.save(p)
}

const joiningFile = "joining"

// Joining tells the screen that the appliance waits for the cluster that it is to join, and what of it does not work. "" ends it.
func Joining(p Paths, how string) error {
	if how == "" {
		if err := os.Remove(filepath.Join(p.Run, joiningFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	if err := os.MkdirAll(p.Run, 0o755); err != nil {
		return fmt.Errorf("make %s: %w", p.Run, err)
	}
	return durable.Replace(p.Run, joiningFile, []byte(how+"\n"), 0o600)
}

// IsJoining is what Joining was told last, "" if nothing is joined now.
func IsJoining(p Paths) string {
	b, err := readBounded(filepath.Join(p.Run, joiningFile), 4<<10)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

const dhcp = "dhcp"

// fields splits a list: commas, semicolons and blanks.
func fields(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == ';' || unicode.IsSpace(r) })
}

func list(most int, one func(string) (string, error)) func(string) (string, error) {
	return func(s string) (string, error) {
		parts := fields(s)
		if len(parts) == 0 || len(parts) > most {
			return "", fmt.Errorf("has to be 1 to %d values", most)
		}
		for i, p := range parts {
			v, err := one(p)
			if err != nil {
				return "", err
			}
			parts[i] = v
		}
		return strings.Join(parts, " "), nil
	}
}

func plainAddress(s string) (string, error) {
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() {
		return "", errors.New("is no address")
	}
	return a.Unmap().String(), nil
}

// addresses are one or two ADDRESS/PREFIX, or dhcp.
func addresses(s string) (string, error) {
	parts := fields(s)
	if len(parts) == 1 && strings.EqualFold(parts[0], dhcp) {
		return dhcp, nil
	}
	if len(parts) == 0 || len(parts) > 2 {
		return "", errors.New("has to be ADDRESS/PREFIX, one for each of IPv4 and IPv6, or dhcp")
	}
	four := -1
	for i, p := range parts {
		a, err := netip.ParsePrefix(p)
		switch {
		case err != nil:
			return "", errors.New("is no ADDRESS/PREFIX such as 192.168.1.10/24")
		case a.Addr().IsUnspecified() || a.Addr().IsMulticast() || a.Addr().IsLoopback() || a.Bits() == 0:
			return "", errors.New("is no address for a host")
		case a.Addr().Is4() && a.Bits() < 31 && (a.Addr() == a.Masked().Addr() || a.Addr() == broadcast(a)):
			return "", errors.New("is the network's own or its broadcast address")
		}
		is4 := 0
		if a.Addr().Is4() {
			is4 = 1
		}
		if four == is4 {
			return "", errors.New("has two addresses of one family")
		}
		four = is4
		parts[i] = a.String()
	}
	return strings.Join(parts, " "), nil
}

func broadcast(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	return netip.AddrFrom4(b)
}

// hostname is RFC 1123's, in small letters.
func hostname(s string) (string, error) {
	s = strings.ToLower(strings.TrimSuffix(s, "."))
	if len(s) == 0 || len(s) > 253 {
		return "", errors.New("is no host name")
	}
	for _, l := range strings.Split(s, ".") {
		if l == "" || len(l) > 63 || l[0] == '-' || l[len(l)-1] == '-' || strings.Trim(l, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
			return "", errors.New("is no host name")
		}
	}
	return s, nil
}

func ntpServer(s string) (string, error) {
	if a, err := plainAddress(s); err == nil {
		return a, nil
	}
	return hostname(s)
}

func number(low, high int) func(string) (string, error) {
	return func(s string) (string, error) {
		n, err := strconv.Atoi(s)
		if err != nil || n < low || n > high {
			return "", fmt.Errorf("is not a number from %d to %d", low, high)
		}
		return strconv.Itoa(n), nil
	}
}

// nicName is an interface's name or its MAC address.
func nicName(s string) (string, error) {
	if m := strings.ToLower(s); len(m) == 17 && strings.Count(m, ":") == 5 && strings.Trim(m, "0123456789abcdef:") == "" {
		return m, nil
	}
	if s == "" || len(s) > 15 || strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.") != "" || s == "." || s == ".." {
		return "", errors.New("is neither a network card's name nor its MAC address")
	}
	return s, nil
}

func timezone(s string) (string, error) {
	if s == "" || len(s) > 64 || strings.Contains(s, "..") || s[0] == '/' || s[0] == '-' ||
		strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_+/") != "" {
		return "", errors.New("is no time zone such as Europe/Brussels")
	}
	return s, nil
}

func sshKeys(s string) (string, error) {
	var out []string
	for line := range strings.Lines(s) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		kind, rest, _ := strings.Cut(line, " ")
		known := slices.Contains([]string{"ssh-ed25519", "ssh-rsa", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521",
			"sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com"}, kind)
		if !known || len(rest) < 16 || strings.ContainsFunc(line, unicode.IsControl) {
			return "", errors.New("is no SSH public key")
		}
		out = append(out, line)
	}
	if len(out) == 0 || len(out) > 16 {
		return "", errors.New("has to be 1 to 16 SSH public keys")
	}
	return strings.Join(out, "\n"), nil
}

func oneOf(words ...string) func(string) (string, error) {
	return func(s string) (string, error) {
		if s = strings.ToLower(s); slices.Contains(words, s) {
			return s, nil
		}
		return "", fmt.Errorf("is none of %s", strings.Join(words, ", "))
	}
}

func label(s string) (string, error) {
	if s == "" || utf8.RuneCountInString(s) > 63 || strings.ContainsFunc(s, unicode.IsControl) {
		return "", errors.New("has to be 1 to 63 characters")
	}
	return s, nil
}

func secretText(low, high int) func(string) (string, error) {
	return func(s string) (string, error) {
		if len(s) < low || len(s) > high || strings.ContainsFunc(s, unicode.IsControl) {
			return "", fmt.Errorf("has to be %d to %d characters", low, high)
		}
		return s, nil
	}
}
