package screen

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base32"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"varve/appliance/firstboot"
	"varve/appliance/update"
	"varve/control/api/client"
	v1 "varve/control/api/customer"
	"varve/control/bytesize"
	"varve/control/durable"
	"varve/control/state"
)

// Config of the machine below the screen.
type Config struct {
	Paths   firstboot.Paths
	Host    firstboot.Host
	Data    string // --data of the appliance
	Socket  string // its API socket
	Version string
	Self    string // this binary
	Log     *slog.Logger
}

// System is the appliance on this machine.
type System struct {
	cfg   Config
	tried map[string]string // what Try has put into force
}

// NewSystem takes back a network change that a screen before this one left being tried.
func NewSystem(ctx context.Context, cfg Config) (*System, error) {
	s := &System{cfg: cfg}
	var t trial
	if b, err := os.ReadFile(filepath.Join(cfg.Paths.Run, trialFile)); err == nil && json.Unmarshal(b, &t) == nil && !alive(t.PID) {
		return s, s.Revert(ctx)
	}
	return s, nil
}

// trial is RUN/network-test.json.
type trial struct {
	PID int `json:"pid"`
}

const (
	trialFile  = "network-test.json"
	codeFile   = "setup-code.json"
	callLimit  = 3 * time.Second
	logsShown  = "800"
	sshUnit    = "varve-ssh.service"
	bootUnit   = "varve-firstboot.service"
	httpsPort  = "443"
	rescueName = "admin"
)

func alive(pid int) bool { return pid > 0 && unix.Kill(pid, 0) == nil }

func (s *System) boot() firstboot.Config {
	return firstboot.Config{Paths: s.cfg.Paths, Host: unnamed{s.cfg.Host}, Log: s.cfg.Log}
}

// unnamed is a host whose name the screen may not set: first boot does, which is started again when settings have been kept.
type unnamed struct{ firstboot.Host }

// SetHostname implements firstboot.Host.
func (unnamed) SetHostname(string) error { return nil }

// api runs f with the appliance's own socket.
func (s *System) api(ctx context.Context, f func(context.Context, *client.Client) error) error {
	c, err := client.New(client.Config{Socket: s.cfg.Socket})
	if err != nil {
		return err
	}
	defer c.Close()
	return f(ctx, c)
}

// Facts implements Machine.
func (s *System) Facts(ctx context.Context) Facts {
	f := Facts{Product: "Varve", Version: s.cfg.Version, Links: links()}
	f.Hostname, _ = os.Hostname()
	boot, err := firstboot.LastReport(s.cfg.Paths)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		f.Problems = append(f.Problems, Problem{What: err.Error()})
	}
	for _, p := range boot.Problems {
		f.Problems = append(f.Problems, Problem{What: p, Remedy: "correct the setting where it comes from, or press c"})
	}
	for _, src := range boot.Sources {
		if src.Error != "" {
			f.Problems = append(f.Problems, Problem{What: "settings from " + src.Source + ": " + firstLine(src.Error), Remedy: "correct it there, or press c"})
		}
	}
	f.Time = clock()
	f.State = "starting"
	disk, err := firstboot.LastDisk(s.cfg.Paths)
	switch {
	case err != nil:
		f.Disk = "not looked for yet"
	case disk.State != firstboot.DataReady:
		f.State, f.Disk = "no data disk", disk.Advice
		f.Problems = append(f.Problems, Problem{What: orNone(disk.Error, disk.Advice), Remedy: "attach a disk, or press b to choose one"})
	default:
		f.Disk = disk.Device
		if i := slices.IndexFunc(disk.Disks, func(d firstboot.Disk) bool { return strings.HasSuffix(disk.Device, "/"+d.Name) }); i >= 0 {
			f.Disk += "  " + bytesize.Format(disk.Disks[i].Size)
		}
		var room unix.Statfs_t
		if unix.Statfs(s.cfg.Paths.Data, &room) == nil {
			f.Disk += fmt.Sprintf(", %d %% used", 100-int(100*room.Bavail/max(1, room.Blocks)))
		}
	}
	port := httpsPort
	err = s.api(ctx, func(ctx context.Context, c *client.Client) error {
		call, cancel := context.WithTimeout(ctx, callLimit)
		defer cancel()
		st, err := c.Status(call)
		if err != nil {
			return err
		}
		port = s.serving(call, c, st, &f)
		return nil
	})
	if err != nil && disk.State == firstboot.DataReady {
		f.State = "starting, or stopped: see the logs (l)"
		if how := firstboot.IsJoining(s.cfg.Paths); how != "" {
			f.State = "joining a cluster"
			f.Problems = append(f.Problems, Problem{What: "join: " + firstLine(how), Remedy: "it is tried again; check the network, or press j for another token"})
		}
	}
	f.URLs = urls(f.Links, port)
	f.Fingerprint = fingerprint(ctx, port)
	if a, err := update.Answer(update.Dir(s.cfg.Data)); err == nil && a.Now != nil {
		f.Slot = string(a.Now.Running)
		f.Update = describe(*a.Now)
		if l := a.Now.Last; l != nil && !l.Done && time.Since(l.At) < 7*24*time.Hour {
			f.Problems = append(f.Problems, Problem{What: "update to " + l.Version + " went back: " + firstLine(l.Why), Remedy: "varve update status says more"})
		}
	}
	return f
}

// urls are where the console is, IPv4 first.
func urls(links []Link, port string) []string {
	var four, six []string
	for _, l := range links {
		for _, a := range l.Addresses {
			ip, _, _ := strings.Cut(a, "/")
			host := net.ParseIP(ip)
			if host == nil || !host.IsGlobalUnicast() {
				continue
			}
			at := net.JoinHostPort(ip, port)
			if port == httpsPort {
				at = strings.TrimSuffix(at, ":"+httpsPort)
			}
			u := "https://" + at + "/"
			switch {
			case slices.Contains(four, u) || slices.Contains(six, u):
			case host.To4() != nil:
				four = append(four, u)
			default:
				six = append(six, u)
			}
		}
	}
	return append(four, six...)
}

// serving fills in what the appliance says of itself and returns its HTTPS port.
func (s *System) serving(ctx context.Context, c *client.Client, st v1.Status, f *Facts) (port string) {
	f.State, f.Good = "serving", st.State == "ok" && st.Ready
	switch {
	case !st.Ready:
		f.State = "starting"
	case st.State != "ok":
		f.State = "serving, " + st.State
	}
	f.Component = st.Cluster.String()[:8] + "." + st.NodeID.String()[:8] + ".appliance"
	f.Cluster = st.Cluster.String()[:8]
	if nodes, err := c.Nodes(ctx); err == nil {
		f.Cluster += fmt.Sprintf(", %d appliances", len(nodes))
		if len(nodes) == 1 {
			f.Cluster = st.Cluster.String()[:8] + ", this appliance alone"
		}
	}
	f.SetupCode = s.setupCode(ctx, c, st.Started)
	health, err := client.Get[v1.Health](ctx, c, "health")
	for _, h := range health.Checks {
		if err == nil && h.State != "ok" {
			f.Problems = append(f.Problems, Problem{What: h.Code + ": " + firstLine(h.Evidence), Remedy: firstLine(h.Remedy)})
		}
	}
	if err != nil || len(health.Checks) == 0 {
		for _, p := range st.Problems {
			f.Problems = append(f.Problems, Problem{What: firstLine(p)})
		}
	}
	port = httpsPort
	for _, v := range st.Services {
		if v.Name == "https" {
			if _, p, err := net.SplitHostPort(v.Address); err == nil {
				port = p
			}
		}
	}
	return port
}

// keptCode is a set-up code, which the screens of one machine share; it is good for one life of the appliance's process.
type keptCode struct {
	Code    string    `json:"code"`
	Started time.Time `json:"started"`
}

// setupCode is "" when there is an administrator.
func (s *System) setupCode(ctx context.Context, c *client.Client, started time.Time) string {
	var setup struct {
		Needed bool `json:"needed"`
	}
	raw, err := c.Do(ctx, "GET", "/api/internal/setup", nil, nil)
	if err != nil || json.Unmarshal(raw.Body, &setup) != nil || !setup.Needed {
		return ""
	}
	unlock, err := s.lock()
	if err != nil {
		return ""
	}
	defer unlock()
	var k keptCode
	if b, err := os.ReadFile(filepath.Join(s.cfg.Paths.Run, codeFile)); err == nil && json.Unmarshal(b, &k) == nil && k.Started.Equal(started) {
		return k.Code
	}
	code, err := s.renewCode(ctx, c, started)
	if err != nil {
		return "press p for one"
	}
	return code
}

func (s *System) renewCode(ctx context.Context, c *client.Client, started time.Time) (string, error) {
	code, err := c.SetupCode(ctx)
	if err != nil {
		return "", err
	}
	b, err := json.Marshal(keptCode{code, started})
	if err != nil {
		return "", fmt.Errorf("encode set-up code: %w", err)
	}
	return code, durable.Replace(s.cfg.Paths.Run, codeFile, b, 0o600)
}

// lock keeps the machine's screens from doing the same thing at once.
func (s *System) lock() (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(s.cfg.Paths.Run, "screen.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return func() { f.Close() }, nil
}

// NewSetupCode implements Machine.
func (s *System) NewSetupCode(ctx context.Context) error {
	return s.api(ctx, func(ctx context.Context, c *client.Client) error {
		st, err := c.Status(ctx)
		if err != nil {
			return err
		}
		unlock, err := s.lock()
		if err != nil {
			return err
		}
		defer unlock()
		_, err = s.renewCode(ctx, c, st.Started)
		return err
	})
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(s), "\n")
	return line
}

func links() []Link {
	list, err := net.Interfaces()
	if err != nil {
		return nil
	}
	var out []Link
	for _, i := range list {
		if i.Flags&net.FlagLoopback != 0 || len(i.HardwareAddr) == 0 {
			continue
		}
		l := Link{Name: i.Name, State: "no cable"}
		if i.Flags&net.FlagRunning != 0 {
			l.State = "up"
		}
		addrs, err := i.Addrs()
		if err != nil {
			continue
		}
		for _, a := range addrs {
			if p, ok := a.(*net.IPNet); ok && p.IP.IsGlobalUnicast() {
				l.Addresses = append(l.Addresses, a.String())
			}
		}
		if _, err := os.Stat(filepath.Join("/sys/class/net", i.Name, "device")); err != nil && len(l.Addresses) == 0 {
			continue // the kernel's own
		}
		if l.State == "up" && len(l.Addresses) == 0 {
			l.State = "no address"
		}
		out = append(out, l)
	}
	return out
}

func clock() string {
	now := time.Now().UTC().Format("2006-01-02 15:04 UTC")
	var t unix.Timex
	if _, err := unix.Adjtimex(&t); err != nil || t.Status&unix.STA_UNSYNC != 0 {
		return now + ", not synchronised"
	}
	return now + ", synchronised"
}

// fingerprint is that of the certificate that a browser will be shown.
func fingerprint(ctx context.Context, port string) string {
	d := tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true}} // it is looked at, not trusted
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	conn, err := d.DialContext(ctx, "tcp", net.JoinHostPort("127.0.0.1", port))
	if err != nil {
		return ""
	}
	defer conn.Close()
	t, ok := conn.(*tls.Conn)
	if !ok || len(t.ConnectionState().PeerCertificates) == 0 {
		return ""
	}
	sum := sha256.Sum256(t.ConnectionState().PeerCertificates[0].Raw)
	pairs := make([]string, len(sum))
	for i, b := range sum {
		pairs[i] = fmt.Sprintf("%02X", b)
	}
	return strings.Join(pairs, ":")
}

func describe(st update.Status) string {
	text := fmt.Sprintf("Slot %s runs version %s.", st.Running, st.Version)
	if st.Previous != "" {
		text += " The other slot holds version " + st.Previous + "."
	}
	if st.Trying != "" {
		text += " Version " + st.Trying + " is being tried."
	}
	return text
}

var formKeys = []Field{
	{firstboot.Hostname, "Host name", "", "store1 or store1.example.com"},
	{firstboot.MgmtNIC, "Management card", "", "name or MAC; the first one"},
	{firstboot.MgmtIP, "Management IP", "", "192.168.1.10/24, or dhcp"},
	{firstboot.Gateway, "Gateway", "", "192.168.1.1"},
	{firstboot.VLAN, "VLAN", "", "1 to 4094"},
	{firstboot.DNS, "DNS servers", "", "192.168.1.1 9.9.9.9"},
	{firstboot.Search, "DNS search", "", "example.com"},
	{firstboot.NTP, "NTP servers", "", "ntp.example.com"},
	{firstboot.StorageNIC, "Storage card", "", "name or MAC; the second one"},
	{firstboot.StorageIP, "Storage IP", "", "10.10.0.10/24, or dhcp"},
	{firstboot.StorageMTU, "Storage MTU", "", "9000 for jumbo frames"},
}

// Fields implements Machine.
func (s *System) Fields() ([]Field, error) {
	set, err := firstboot.Current(s.cfg.Paths)
	if err != nil {
		return nil, err
	}
	out := slices.Clone(formKeys)
	for i := range out {
		out[i].Value = set.Get(out[i].Key)
	}
	return out, nil
}

// changes are the values that differ from the settings in force: the others stay their sources'.
func (s *System) changes(values map[string]string) (map[string]string, error) {
	set, err := firstboot.Current(s.cfg.Paths)
	if err != nil {
		return nil, err
	}
	out := make(map[string]string)
	for k, v := range values {
		if v != set.Get(k) {
			out[k] = v
		}
	}
	return out, nil
}

// Try implements Machine.
func (s *System) Try(ctx context.Context, values map[string]string) error {
	changed, err := s.changes(values)
	if err != nil {
		return err
	}
	next, err := firstboot.Changed(s.cfg.Paths, changed)
	if err != nil {
		return err
	}
	b, err := json.Marshal(trial{os.Getpid()})
	if err != nil {
		return fmt.Errorf("encode network test: %w", err)
	}
	if err := durable.Replace(s.cfg.Paths.Run, trialFile, b, 0o600); err != nil {
		return err
	}
	s.tried = changed
	if err := s.render(ctx, next); err != nil {
		return errors.Join(err, s.Revert(ctx))
	}
	return nil
}

func (s *System) render(ctx context.Context, set firstboot.Settings) error {
	nics, err := firstboot.NICs(s.cfg.Paths)
	if err != nil {
		return err
	}
	if err := firstboot.Render(ctx, s.boot(), set, nics); err != nil {
		return err
	}
	for _, args := range [][]string{{"networkctl", "reload"}, {"chronyc", "reload", "sources"}} {
		if _, err := s.cfg.Host.Run(ctx, args[0], args[1:]...); err != nil && args[0] == "networkctl" {
			return err
		}
	}
	return nil
}

// Keep implements Machine.
func (s *System) Keep(ctx context.Context) error {
	if _, err := firstboot.Change(ctx, s.boot(), s.tried); err != nil {
		return err
	}
	s.tried = nil
	_, err := s.cfg.Host.Run(ctx, "systemctl", "restart", bootUnit)
	return errors.Join(err, s.settleTrial())
}

// Revert implements Machine.
func (s *System) Revert(ctx context.Context) error {
	set, err := firstboot.Current(s.cfg.Paths)
	if err != nil {
		return err
	}
	s.tried = nil
	if err := s.render(ctx, set); err != nil {
		return err
	}
	return s.settleTrial()
}

func (s *System) settleTrial() error {
	if err := os.Remove(filepath.Join(s.cfg.Paths.Run, trialFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// TestNetwork implements Machine.
func (s *System) TestNetwork(ctx context.Context) []string {
	var out []string
	say := func(what string, err error) {
		if err != nil {
			out = append(out, fmt.Sprintf("  FAIL  %s: %s", what, firstLine(err.Error())))
			return
		}
		out = append(out, "  ok    "+what)
	}
	for _, l := range links() {
		err := error(nil)
		if l.State != "up" {
			err = errors.New(l.State)
		}
		say(strings.TrimSpace("card "+l.Name+" "+strings.Join(l.Addresses, " ")), err)
	}
	gateways, err := gateways()
	if err != nil || len(gateways) == 0 {
		say("default gateway", errors.Join(err, errors.New("there is none")))
	}
	for _, g := range gateways {
		say("gateway "+g+" answers", neighbour(ctx, g))
	}
	set, err := firstboot.Current(s.cfg.Paths)
	if err != nil {
		say("settings", err)
	}
	for _, n := range strings.Fields(orNone(set.Get(firstboot.NTP), "2.debian.pool.ntp.org")) {
		look, cancel := context.WithTimeout(ctx, 5*time.Second)
		_, err := net.DefaultResolver.LookupHost(look, n)
		cancel()
		say("name of the time server "+n, err)
	}
	out = append(out, "  "+clock())
	err = s.api(ctx, func(ctx context.Context, c *client.Client) error {
		nodes, err := c.Nodes(ctx)
		for _, n := range nodes {
			host, _, err := net.SplitHostPort(n.HTTPS)
			if n.Self || err != nil {
				continue
			}
			dial := net.Dialer{Timeout: 3 * time.Second}
			conn, err := dial.DialContext(ctx, "tcp", net.JoinHostPort(host, "7443"))
			if err == nil {
				err = conn.Close()
			}
			say("appliance "+n.Name+" on its node port", err)
		}
		return err
	})
	if err != nil {
		say("the other appliances", err)
	}
	return out
}

// neighbour has the kernel find a host of this network by its address.
func neighbour(ctx context.Context, ip string) error {
	d := net.Dialer{Timeout: time.Second}
	conn, err := d.DialContext(ctx, "udp", net.JoinHostPort(ip, "9"))
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := conn.Write([]byte{0}); err != nil {
		return err
	}
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for range 15 {
		b, err := os.ReadFile("/proc/net/arp")
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) > 3 && f[0] == ip && f[2] != "0x0" {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
	return errors.New("no answer")
}

// gateways reads the IPv4 default routes.
func gateways() ([]string, error) {
	b, err := os.ReadFile("/proc/net/route")
	if err != nil {
		return nil, err
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		var g uint32
		if len(f) > 7 && f[1] == "00000000" && f[7] == "00000000" {
			if _, err := fmt.Sscanf(f[2], "%x", &g); err == nil && g != 0 {
				out = append(out, net.IPv4(byte(g), byte(g>>8), byte(g>>16), byte(g>>24)).String())
			}
		}
	}
	return out, nil
}

// Doctor implements Machine.
func (s *System) Doctor(ctx context.Context) []string {
	cmd := exec.CommandContext(ctx, s.cfg.Self, "--data", s.cfg.Data, "doctor", "-o", "json")
	cmd.WaitDelay = time.Second
	b, err := cmd.Output()
	var r struct {
		Checks []struct{ ID, Title, Status, Evidence, Remedy string }
	}
	if e := json.Unmarshal(b, &r); e != nil {
		return []string{"  doctor: " + errors.Join(err, e).Error()}
	}
	var out []string
	for _, c := range r.Checks {
		for i, l := range wrap(fmt.Sprintf("%-4s %s: %s", strings.ToUpper(c.Status), c.ID, c.Evidence), Width-6) {
			if i > 0 {
				l = "     " + l
			}
			out = append(out, " "+l)
		}
		if c.Remedy != "" {
			for _, l := range wrap(c.Remedy, Width-12) {
				out = append(out, "        "+l)
			}
		}
	}
	return out
}

// Logs implements Machine.
func (s *System) Logs(ctx context.Context) []string {
	b, err := s.cfg.Host.Run(ctx, "journalctl", "--no-pager", "-o", "short-iso", "-n", logsShown, "-u", "varve-*")
	if err != nil {
		return []string{"  " + err.Error()}
	}
	var out []string
	for line := range strings.Lines(string(bytes.TrimSpace(b))) {
		out = append(out, wrap(strings.TrimSpace(line), Width-3)...)
	}
	for i := range out {
		out[i] = " " + out[i]
	}
	return out
}

// Disks implements Machine.
func (s *System) Disks() []Choice {
	r, err := firstboot.LastDisk(s.cfg.Paths)
	if err != nil {
		return nil
	}
	var out []Choice
	for _, d := range r.Disks {
		if d.Kind != firstboot.DiskOurs && d.Kind != firstboot.DiskBlank {
			continue
		}
		what := "empty, will be formatted"
		if d.Kind == firstboot.DiskOurs {
			what = "a data disk"
		}
		if strings.HasSuffix(r.Device, "/"+d.Name) {
			what = "in use"
		}
		out = append(out, Choice{d.Name, clip(fmt.Sprintf("%-8s %-10s %s  %s %s", d.Name, bytesize.Format(d.Size), what, d.Model, d.Serial), Width-6)})
	}
	return out
}

// ChooseDisk implements Machine.
func (s *System) ChooseDisk(id string) error { return firstboot.Choose(s.cfg.Paths, id) }

// Join implements Machine.
func (s *System) Join(ctx context.Context, token string) error {
	if err := firstboot.Ask(s.cfg.Paths, firstboot.JoinToken, token); err != nil {
		return err
	}
	return s.Power(ctx, false) // the units join before anything else starts
}

// ResetAdmin implements Machine.
func (s *System) ResetAdmin(ctx context.Context) (name, password string, err error) {
	b := make([]byte, 15)
	rand.Read(b)
	text := base32.StdEncoding.EncodeToString(b)
	password = strings.ToLower(text[:6] + "-" + text[6:12] + "-" + text[12:18] + "-" + text[18:])
	err = s.api(ctx, func(ctx context.Context, c *client.Client) error {
		users, err := client.List[v1.User](ctx, c, client.Select{}, "users")
		if err != nil {
			return err
		}
		name = ""
		for _, u := range users {
			if slices.Contains(u.Roles, state.RoleAdmin) && u.Source != "oidc" && (name == "" || u.Name == rescueName) {
				name = u.Name
			}
		}
		if name == "" {
			name = rescueName
			_, _, err := client.Post[v1.User](ctx, c, v1.UserCreate{Name: name, Password: password, Roles: []string{state.RoleAdmin}}, client.Change{}, "users")
			return err
		}
		off := false
		_, _, err = client.Patch[v1.User](ctx, c, v1.UserPatch{Password: password, Disabled: &off, ResetTOTP: true}, client.Change{}, "users", name)
		return err
	})
	return name, password, err
}

// SSH implements Machine.
func (s *System) SSH(ctx context.Context) (string, error) {
	set, err := firstboot.Current(s.cfg.Paths)
	if err != nil {
		return "", err
	}
	if set.Get(firstboot.SSHKeys) == "" {
		return "", errors.New("the settings hold no SSH key: give ssh_keys where the other settings come from, passwords are not taken")
	}
	_, err = s.cfg.Host.Run(ctx, "systemctl", "start", sshUnit)
	return "SSH is open for an hour, for root with the keys of the settings.", err
}

// Back implements Machine.
func (s *System) Back(ctx context.Context) (string, error) {
	if err := update.Ask(update.Dir(s.cfg.Data), update.Request{ID: "screen", Action: update.ActionBack, Reboot: true}); err != nil {
		return "", err
	}
	return "The previous version is started if there is one; see the first page.", nil
}

// Power implements Machine.
func (s *System) Power(ctx context.Context, off bool) error {
	verb := "reboot"
	if off {
		verb = "poweroff"
	}
	_, err := s.cfg.Host.Run(ctx, "systemctl", "--no-block", verb)
	return err
}

// FactoryReset implements Machine. What it asks for is done by first boot, before anything is opened.
func (s *System) FactoryReset(ctx context.Context) error {
	if err := firstboot.AskReset(s.cfg.Paths); err != nil {
		return err
	}
	return s.Power(ctx, false)
}

var _ Machine = (*System)(nil)
