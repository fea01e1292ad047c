// Package firstboot turns a machine that has just been started into one that an appliance can run on: host name, network, time,
// the data disk. It runs at every boot, as root, before the network; the first one differs only in what it finds.
//
// # Settings
//
// A setting is a key of the table in settings.go with a value and where it came from. Nothing has to be set: without any the
// appliance takes addresses by DHCP. Sources, a later one gives only what an earlier one has left open:
//
//	ovf        the OVF environment: guestinfo.ovfEnv, or ovf-env.xml on a CD-ROM (vSphere, and tools that follow it)
//	guestinfo  guestinfo.varve.KEY, one by one (govc, Terraform)
//	nocloud    meta-data, user-data and network-config on a disk labelled CIDATA (Proxmox, libvirt, cloud images' tools)
//	credential systemd credentials varve.KEY: SMBIOS type 11 io.systemd.credential:varve.KEY=…, fw_cfg opt/io.systemd.credentials/…
//	fw_cfg     QEMU's -fw_cfg name=opt/varve/KEY
//
// Credentials and fw_cfg also take all settings at once: varve.config and opt/varve/config hold a YAML or JSON mapping of keys.
//
// What the administrator sets on the appliance's screen has the source "console" and is kept against every source until it is set
// otherwise there. Everything else follows the sources: a value that its source gives no longer stays as it was.
//
//	STATE/settings.json            the settings in force, 0600. A copy goes to DATA/appliance/settings.json: a new system disk
//	                               with an old data disk gets them back before anything is read from the sources
//	STATE/pending.json             secrets that are used once: admin_password, join_token. Gone when they have been used
//	STATE/disk.json                that formatting of a data disk was begun (datadisk.go)
//	STATE/reset                    a factory reset was asked for: settings go at the next boot, then everything on the data disk; the
//	                               file goes last, so that a reset that power cuts short goes on
//	RUN/firstboot.json             what this boot found, for the screen
//	RUN/joining                    that control waits until the cluster of the join token answers, and why it does not yet
//
// Everything that is rendered from settings lies below /run and is made again at every boot, so that the root can be read-only
// and no two places say different things: systemd/network/10-varve-*.{netdev,network}, chrony-sources/varve.sources,
// varve/hostname, varve/localtime.
//
// # The data disk
//
// Never formats a disk with anything on it: see datadisk.go.
package firstboot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"varve/control/durable"
)

// Paths of the machine. A test has them below a directory of its own.
type Paths struct {
	State   string // /state
	Data    string // /var/lib/varve, where the data disk will be mounted
	Run     string // /run/varve
	Network string // /run/systemd/network
	Chrony  string // /run/chrony-sources
	Sys     string // /sys
	Dev     string // /dev
	// Credentials are directories with systemd credentials.
	Credentials []string
}

// SystemPaths are those of the appliance's image; below VARVE_ROOT, if that is set, for a trial on another machine.
func SystemPaths(getenv func(string) string) Paths {
	root := getenv("VARVE_ROOT")
	at := func(p string) string { return filepath.Join("/", root, p) }
	p := Paths{State: at("state/varve"), Data: at("var/lib/varve"), Run: at("run/varve"), Network: at("run/systemd/network"),
		Chrony: at("run/chrony-sources"), Sys: at("sys"), Dev: at("dev")}
	if dir := getenv("CREDENTIALS_DIRECTORY"); dir != "" {
		p.Credentials = append(p.Credentials, dir)
	}
	p.Credentials = append(p.Credentials, at("run/credentials/@system"))
	return p
}

// Host is what the machine does for first boot.
type Host interface {
	// Run starts a program and returns what it wrote to standard output, at most outputBytesMax of it.
	Run(ctx context.Context, name string, args ...string) ([]byte, error)
	SetHostname(name string) error
	Mount(source, target, fstype string, readOnly bool) error
	Unmount(target string) error
}

// Config of a boot.
type Config struct {
	Paths Paths
	Host  Host
	Log   *slog.Logger
}

// Report is what a boot found and did. The screen shows it.
type Report struct {
	At       time.Time      `json:"at"`
	Settings Settings       `json:"settings"`
	Sources  []SourceReport `json:"sources"`
	Disk     DiskReport     `json:"disk"`
	NICs     []NIC          `json:"nics"`
	Pending  []string       `json:"pending,omitempty"`
	Problems []string       `json:"problems,omitempty"`
}

// SourceReport says what one source gave. One that is not there is left out.
type SourceReport struct {
	Source string   `json:"source"`
	Keys   []string `json:"keys"`
	Error  string   `json:"error,omitempty"`
}

const (
	settingsFile = "settings.json"
	pendingFile  = "pending.json"
	reportFile   = "firstboot.json"
	keptDir      = "appliance" // below Data
	fileBytesMax = 256 << 10
)

// Boot does what a boot needs. An error is one that leaves the appliance without settings or network; everything else is a
// problem in the report.
func Boot(ctx context.Context, cfg Config) (Report, error) {
	r := Report{At: time.Now().UTC()}
	problem := func(what string, err error) {
		r.Problems = append(r.Problems, what+": "+err.Error())
		cfg.Log.Warn(what, "err", err)
	}
	if err := os.MkdirAll(cfg.Paths.Run, 0o755); err != nil {
		return r, fmt.Errorf("make %s: %w", cfg.Paths.Run, err)
	}
	if err := durable.MakeDir(cfg.Paths.State); err != nil {
		return r, err
	}
	if resetAsked(cfg.Paths) {
		if err := forget(cfg.Paths); err != nil {
			problem("factory reset", err)
		}
	}
	kept, err := keptSettings(cfg.Paths.State)
	if err == nil && kept == nil && !resetAsked(cfg.Paths) {
		kept, err = settingsOfDataDisk(ctx, cfg)
	}
	readable := err == nil
	if err != nil {
		problem("settings of the last boot", err)
	}
	found, sources := gather(ctx, cfg)
	r.Sources = sources
	r.Settings = Merge(kept, found.settings)
	if r.NICs, err = listNICs(cfg.Paths.Sys); err != nil {
		problem("network cards", err)
	}
	if readable { // else what is there is not to be lost
		if err := keepSettings(cfg.Paths, r.Settings); err != nil {
			problem("keep settings", err)
		}
	}
	if r.Pending, err = keepPending(cfg.Paths, found.secrets); err != nil {
		problem("keep one-time settings", err)
	}
	if r.Settings.Get(Mode) == "join" && !slices.Contains(r.Pending, JoinToken) && !used(cfg.Paths, JoinToken) {
		problem("join", errors.New("mode is join and no join_token is given: type it on the screen"))
	}
	if err := Render(ctx, cfg, r.Settings, r.NICs); err != nil {
		problem("render settings", err)
	}
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return r, fmt.Errorf("encode report: %w", err)
	}
	return r, durable.Replace(cfg.Paths.Run, reportFile, append(b, '\n'), 0o600)
}

// LastReport is that of this boot.
func LastReport(p Paths) (Report, error) {
	var r Report
	err := readJSON(filepath.Join(p.Run, reportFile), &r)
	return r, err
}

// keptSettings are those that a directory holds, nil if there are none.
func keptSettings(dir string) (Settings, error) {
	var s Settings
	err := readJSON(filepath.Join(dir, settingsFile), &s)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return s, s.check()
}

// keepSettings writes them to the system disk and, if it is mounted, to the data disk. What has not changed is not written.
func keepSettings(p Paths, s Settings) error {
	err := keepIn(p.State, s)
	if _, e := os.Stat(filepath.Join(p.Data, markFile)); e == nil {
		err = errors.Join(err, keepIn(filepath.Join(p.Data, keptDir), s))
	}
	return err
}

func keepIn(dir string, s Settings) error {
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return fmt.Errorf("encode settings: %w", err)
	}
	b = append(b, '\n')
	if have, err := os.ReadFile(filepath.Join(dir, settingsFile)); err == nil && string(have) == string(b) {
		return nil
	}
	if err := durable.MakeDir(dir); err != nil {
		return err
	}
	return durable.Replace(dir, settingsFile, b, 0o600)
}

// Change sets values from the screen, which count more than any source, keeps and renders them. "" takes a value back to what
// the sources say at the next boot.
func Change(ctx context.Context, cfg Config, values map[string]string) (Settings, error) {
	s, err := Changed(cfg.Paths, values)
	if err != nil {
		return nil, err
	}
	if err := keepSettings(cfg.Paths, s); err != nil {
		return nil, err
	}
	nics, err := listNICs(cfg.Paths.Sys)
	if err != nil {
		return nil, err
	}
	return s, Render(ctx, cfg, s, nics)
}

// Changed is what Change would keep; it writes nothing.
func Changed(p Paths, values map[string]string) (Settings, error) {
	s, err := keptSettings(p.State)
	if err != nil {
		return nil, err
	}
	out := make(Settings, len(s)+len(values))
	for k, v := range s {
		out[k] = v
	}
	for k, text := range values {
		if text == "" {
			delete(out, k)
			continue
		}
		v, err := normal(k, text)
		if err != nil {
			return nil, err
		}
		out[k] = Value{Text: v, Source: SourceConsole}
	}
	return out, out.together()
}

// Current are the settings in force.
func Current(p Paths) (Settings, error) { return keptSettings(p.State) }

func readJSON(path string, into any) error {
	b, err := readBounded(path, fileBytesMax)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return nil
}

// readBounded reads a file that may not be larger than most.
func readBounded(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if int64(len(b)) > most {
		return nil, fmt.Errorf("read %s: more than %d bytes", path, most)
	}
	return b, nil
}
