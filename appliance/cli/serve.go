package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"varve/appliance/server"
	"varve/control/bytesize"
)

const configName = "config.json"

// serveFlags are the flags of serve, each with its name as key in DATA/config.json and as VARVE_NAME in the environment.
type serveFlags struct {
	nbd, nfs, https, portmap, nbdTLS string
	node, unit                       string
	logSize, mapSize, scoSize        string
	cacheDir, cacheBytes, cacheRAM   string
	s3                               string
	bucket                           s3Flags
	updateKeys                       string
	drain                            time.Duration
	logLevel                         string
}

func (e *env) serveCommand() *cobra.Command { return e.serveUnit(server.UnitAll) }

// serveUnit is serve, or the part of it that runs beside varve control.
func (e *env) serveUnit(unit string) *cobra.Command {
	f := serveFlags{unit: unit}
	c := &cobra.Command{
		Use: "serve --data DIR", Short: "Run an appliance", Args: cobra.NoArgs,
		Long: `Run an appliance on DIR. A fresh DIR is initialised: a cluster of one, certificates, vPool "default" on DIR/backend/default, and an
administrator's token in DIR/admin.token. When it is ready, how to mount and attach is printed. SIGTERM stops it: exports
drain, the log is synced, exit code 0.

Every flag below can also be set by an environment variable (VARVE_LOG_SIZE for --log-size) or in DIR/config.json
({"log-size": "8GiB"}). A flag wins over the environment, and that over the file.

Who may use the exports: each vPool has a list of client networks (by default this host and the private networks 10/8, 172.16/12,
192.168/16), which holds for NFS and for NBD.

With --s3 the vPool default of a fresh DIR is a bucket: ` + s3Help,
		RunE: func(cmd *cobra.Command, _ []string) error { return e.serve(cmd, &f) },
	}
	s := c.Flags()
	s.StringVar(&f.nbd, "nbd", ":10809", "`ADDR` for NBD, or off")
	s.StringVar(&f.nfs, "nfs", ":2049", "`ADDR` for NFSv3 and MOUNT, or off")
	s.StringVar(&f.https, "https", ":8443", "`ADDR` for the API, or off")
	s.StringVar(&f.node, "node", "", "`ADDR` for the other nodes of the cluster, or off (default: :7443 if it is free)")
	s.StringVar(&f.portmap, "portmap", "off", "`ADDR` for a portmapper, such as :111, which ESXi and Proxmox VE want; or off")
	s.StringVar(&f.nbdTLS, "nbd-tls", "off", "TLS for NBD: off, optional or required")
	s.StringVar(&f.logSize, "log-size", "", "`SIZE` of the write log (default: 4GiB, or an eighth of a smaller disk)")
	s.StringVar(&f.mapSize, "map-size", "256MiB", "memory `SIZE` for the block map")
	s.StringVar(&f.scoSize, "sco-size", "16MiB", "largest `SIZE` of an object on a backend")
	s.StringVar(&f.cacheDir, "cache-dir", "", "`DIR`, on an SSD, of the read cache of vPools whose backend is remote (default: DIR/cache)")
	s.StringVar(&f.cacheBytes, "cache-bytes", "", "`SIZE` of that cache on the SSD, 0 for none (default: an eighth of the disk, at most 64GiB)")
	s.StringVar(&f.cacheRAM, "cache-ram", "256MiB", "memory `SIZE` of that cache, 0 for none")
	s.StringVar(&f.s3, "s3", "", "`URL` of the bucket for vPool default of a fresh DIR: s3://bucket/prefix?endpoint=…&region=…")
	f.bucket.add(s)
	s.StringVar(&f.updateKeys, "update-keys", updateKeys, "`FILE` with the public keys that an update has to be signed by")
	s.DurationVar(&f.drain, "drain-time", 30*time.Second, "how long a stop may take")
	s.StringVar(&f.logLevel, "log-level", "info", "debug, info, warn or error")
	return c
}

func (e *env) serve(cmd *cobra.Command, f *serveFlags) error {
	cfg, err := e.serverConfig(cmd, f)
	if err != nil {
		return err
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(f.logLevel)); err != nil {
		return usage("--log-level %q is none of debug, info, warn, error", f.logLevel)
	}
	cfg.Log = e.logger(level)
	cfg.NBD, cfg.NFS, cfg.HTTPS, cfg.Portmap, cfg.NBDTLS, cfg.DrainTime = f.nbd, f.nfs, f.https, f.portmap, f.nbdTLS, f.drain
	cfg.Node, cfg.Unit = f.node, f.unit
	cfg.Settings = settingsOf(cmd.Flags())
	if err := cfg.Check(); err != nil {
		return e.startFailure("serve", err)
	}
	unit := f.unit
	if unit == server.UnitAll {
		unit = "appliance"
	}
	log, done := e.keepRecords(cfg.Log, cfg.Data, unit)
	defer done()
	cfg.Log = log
	return e.startFailure("serve", e.again(func() error {
		return server.Serve(cmd.Context(), cfg, func(s server.Summary) { e.printSummary(s) })
	}))
}

// again runs a unit until it ends for good. Under a service manager, which has its sockets, the process ends and is started anew.
func (e *env) again(run func() error) error {
	for {
		err := run()
		if !errors.Is(err, server.ErrRestart) {
			return err
		}
		if e.std.Getenv("INVOCATION_ID") != "" {
			return nil
		}
	}
}

// serverConfig fills the flags that were not given from the environment and the file, and makes the part of a server's
// configuration that serve and rebuild share.
func (e *env) serverConfig(cmd *cobra.Command, f *serveFlags) (server.Config, error) {
	if e.at != "" {
		return server.Config{}, usage("%s runs on this machine: leave --at out", cmd.Name())
	}
	if e.data == "" {
		return server.Config{}, usage("no directory is named: give --data DIR")
	}
	if err := e.settle(cmd.Flags()); err != nil {
		return server.Config{}, err
	}
	cfg := server.Config{Data: e.data, Version: e.std.Version}
	for _, s := range []struct {
		flag, text string
		into       *int64
	}{{"log-size", f.logSize, &cfg.LogBytes}, {"map-size", f.mapSize, &cfg.MapBytes}, {"sco-size", f.scoSize, &cfg.SCOBytes}} {
		if s.text == "" {
			continue
		}
		n, err := bytesize.Parse(s.text)
		if err != nil {
			return cfg, usage("--%s: %v", s.flag, err)
		}
		*s.into = n
	}
	for _, s := range []struct {
		flag, text string
		into       *int64
	}{{"cache-bytes", f.cacheBytes, &cfg.CacheBytes}, {"cache-ram", f.cacheRAM, &cfg.CacheRAM}} {
		if s.text == "" {
			continue
		}
		n, err := bytesize.Parse(s.text)
		if err != nil {
			return cfg, usage("--%s: %v", s.flag, err)
		}
		if *s.into = n; n == 0 {
			*s.into = -1 // none
		}
	}
	cfg.CacheDir, cfg.UpdateKeys = f.cacheDir, f.updateKeys
	var err error
	cfg.S3, err = e.s3Config(f.s3, f.bucket)
	return cfg, err
}

// settle sets every flag of the command's own that was not given from VARVE_NAME, else from DATA/config.json.
func (e *env) settle(flags *pflag.FlagSet) error {
	path := filepath.Join(e.data, configName)
	file, err := readConfig(path)
	if err != nil {
		return &Failure{Exit: ExitUsage, What: "read configuration", Object: path, Why: reason(err), Remedy: "correct the file or remove it", Err: err}
	}
	fleet := e.fleetConfig()
	global := map[string]bool{"data": true, "at": true, "token-file": true, "ca": true, "output": true, "timeout": true, "help": true}
	known := e.serveCommand().Flags() // the file is serve's, also where a command uses some of it
	for name := range file {
		if known.Lookup(name) == nil || global[name] {
			return &Failure{Exit: ExitUsage, What: "read configuration", Object: path, Why: fmt.Sprintf("there is no setting %q", name),
				Remedy: "see varve serve --help"}
		}
	}
	var failed error
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Changed || global[f.Name] || failed != nil {
			return
		}
		value, from := e.std.Getenv("VARVE_"+strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))), "environment"
		if value == "" {
			value, from = file[f.Name], path
		}
		if value == "" {
			value, from = fleet[f.Name], server.ClusterConfigName
		}
		if value == "" {
			return
		}
		if err := flags.Set(f.Name, value); err != nil {
			failed = usage("%s: --%s %q: %v", from, f.Name, value, err)
		}
	})
	return failed
}

// fleetConfig is what the cluster sets for this node. What it does not know or like it leaves out: a cluster's setting keeps no node from
// starting.
func (e *env) fleetConfig() map[string]string {
	list, err := readConfig(filepath.Join(e.data, server.ClusterConfigName))
	if err != nil {
		fmt.Fprintf(e.std.Err, "varve: the cluster's settings are left out: %v\n", err)
		return nil
	}
	for name, value := range list {
		if err := server.CheckFleetSetting(name, value); err != nil {
			fmt.Fprintf(e.std.Err, "varve: a setting of the cluster's is left out: %v\n", err)
			delete(list, name)
		}
	}
	return list
}

// settingsOf are all flags with their values.
func settingsOf(flags *pflag.FlagSet) map[string]string {
	out := make(map[string]string)
	flags.VisitAll(func(f *pflag.Flag) { out[f.Name] = f.Value.String() })
	return out
}

const configBytesMax = 64 << 10

// readConfig reads an object of strings and numbers. No file is an empty one.
func readConfig(path string) (map[string]string, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	d := json.NewDecoder(io.LimitReader(f, configBytesMax))
	d.UseNumber()
	var raw map[string]any
	if err := d.Decode(&raw); err != nil {
		return nil, err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("there is more than one JSON value")
	}
	out := make(map[string]string, len(raw))
	for k, v := range raw {
		switch v := v.(type) {
		case string:
			out[k] = v
		case json.Number:
			out[k] = v.String()
		default:
			return nil, fmt.Errorf("%q is neither a string nor a number", k)
		}
	}
	return out, nil
}

// logger writes text to a terminal or file and JSON where the service manager's journal reads.
func (e *env) logger(level slog.Level) *slog.Logger {
	opt := &slog.HandlerOptions{Level: level}
	if e.std.Getenv("JOURNAL_STREAM") != "" || e.std.Getenv("INVOCATION_ID") != "" {
		return slog.New(slog.NewJSONHandler(e.std.Err, opt))
	}
	return slog.New(slog.NewTextHandler(e.std.Err, opt))
}

// startFailure gives the errors of an appliance that does not start, or had to give up, their exit codes.
func (e *env) startFailure(what string, err error) error {
	if err == nil {
		return nil
	}
	f := &Failure{Exit: ExitFailed, What: what, Object: e.data, Err: err}
	if u, ok := errors.AsType[*server.UsageError](err); ok {
		f.Exit, f.Why, f.Remedy = ExitUsage, u.Why, u.Remedy
		return f
	}
	if l, ok := errors.AsType[*server.LockedError](err); ok {
		f.Exit, f.Why, f.Remedy = ExitConflict, "another varve uses this data directory", "stop that one, or give another --data"
		f.Object = l.Data
		return f
	}
	if l, ok := errors.AsType[*server.LostError](err); ok {
		f.Why = fmt.Sprintf("%s is missing but %d volumes had data in it", l.Missing, l.Volumes)
		f.Remedy = "put it back, or run: varve rebuild --data " + l.Data
		return f
	}
	if l, ok := errors.AsType[*server.LevelError](err); ok {
		f.Exit, f.Why = ExitConflict, fmt.Sprintf("it holds data of level %d, written by version %s, which this version does not know; nothing was touched", l.Level, l.Version)
		f.Object, f.Remedy = l.Data, "run that version, or a later one"
		return f
	}
	if errors.Is(err, syscall.EADDRINUSE) {
		f.Exit, f.Why, f.Remedy = ExitConflict, err.Error(), "stop what listens there, or give another address with --nbd, --nfs or --https"
		return f
	}
	return e.failure(what, e.data, err)
}

func (e *env) printSummary(s server.Summary) {
	if e.json() {
		if err := printJSON(e.std.Out, s); err != nil {
			fmt.Fprintf(e.std.Err, "varve: print summary: %v\n", err)
		}
		return
	}
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("Varve is ready on %s", s.Data)
	if s.HTTPS != "" {
		line("  API     https://%s/api/customer/v1   (CA %s, token %s)", s.HTTPS, s.CAFile, s.TokenFile)
	}
	if s.SetupCode != "" && s.HTTPS != "" {
		line("  set-up  code %s makes the first administrator, at the console or by POST /api/internal/setup", s.SetupCode)
	}
	if host, port, err := net.SplitHostPort(s.NFS); err == nil {
		for _, p := range s.VPools {
			line("  NFS     mount -t nfs -o vers=3,nolock,proto=tcp,hard,port=%s,mountport=%s,mountproto=tcp %s:/%s /mnt", port, port, host, p)
		}
	}
	if s.Portmap != "" {
		line("  ports   portmapper on %s: clients find NFS and MOUNT by themselves", s.Portmap)
	}
	if s.NBD != "" {
		line("  NBD     qemu-system-x86_64 … -drive file=nbd://%s/VPOOL/NAME,format=raw,if=virtio,cache=none", s.NBD)
	}
	line("  CLI     varve --data %s vdisk create %s/disk1 --size 10GiB", s.Data, firstOr(s.VPools, server.DefaultPool))
	if _, err := io.WriteString(e.std.Out, b.String()); err != nil {
		fmt.Fprintf(e.std.Err, "varve: print summary: %v\n", err)
	}
}

func firstOr(list []string, or string) string {
	if len(list) > 0 {
		return list[0]
	}
	return or
}
