package firstboot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// found is what the sources say.
type found struct {
	settings Settings
	secrets  map[string]string
}

// source is a place that settings come from. Nothing there is no error.
type source struct {
	name string
	read func(ctx context.Context, cfg Config) (map[string]string, error)
}

var sources = []source{
	{SourceOVF, readOVF},
	{SourceGuestInfo, readGuestInfo},
	{SourceNoCloud, readNoCloud},
	{SourceCredential, readCredentials},
	{SourceFWCfg, readFWCfg},
}

// gather asks all sources. A value that cannot be is reported and left out; the others count.
func gather(ctx context.Context, cfg Config) (found, []SourceReport) {
	out := found{settings: make(Settings), secrets: make(map[string]string)}
	var reports []SourceReport
	for _, src := range sources {
		got, err := src.read(ctx, cfg)
		rep := SourceReport{Source: src.name}
		var errs []error
		if err != nil {
			errs = append(errs, err)
		}
		for _, name := range slices.Sorted(maps.Keys(got)) {
			v, err := normal(name, got[name])
			if err != nil {
				errs = append(errs, err)
				continue
			}
			rep.Keys = append(rep.Keys, name)
			k, _ := keyOf(name)
			if k.secret {
				if _, have := out.secrets[name]; !have {
					out.secrets[name] = v
				}
			} else if _, have := out.settings[name]; !have {
				out.settings[name] = Value{Text: v, Source: src.name}
			}
		}
		if err := errors.Join(errs...); err != nil {
			rep.Error = err.Error()
			cfg.Log.Warn("settings of a source are left out", "source", src.name, "err", err)
		}
		if len(got) > 0 || rep.Error != "" {
			reports = append(reports, rep)
		}
	}
	return out, reports
}

const (
	outputBytesMax = 256 << 10
	toolTimeout    = 10 * time.Second
)

// guestInfo asks VMware's backdoor. Off VMware, or where the key is not set, the answer is nothing.
func guestInfo(ctx context.Context, h Host, key string) string {
	ctx, cancel := context.WithTimeout(ctx, toolTimeout)
	defer cancel()
	for _, tool := range [][]string{{"vmware-rpctool", "info-get " + key}, {"vmtoolsd", "--cmd", "info-get " + key}} {
		if b, err := h.Run(ctx, tool[0], tool[1:]...); err == nil && len(strings.TrimSpace(string(b))) > 0 {
			return strings.TrimSpace(string(b))
		}
	}
	return ""
}

// onVMware keeps the tools away from other hypervisors, where they wait or complain.
func onVMware(p Paths) bool {
	b, err := readBounded(filepath.Join(p.Sys, "class/dmi/id/sys_vendor"), 1<<10)
	return err == nil && strings.Contains(string(b), "VMware")
}

func readOVF(ctx context.Context, cfg Config) (map[string]string, error) {
	if onVMware(cfg.Paths) {
		if doc := guestInfo(ctx, cfg.Host, "guestinfo.ovfEnv"); doc != "" {
			return parseOVF([]byte(doc))
		}
	}
	var doc []byte
	err := eachDisc(ctx, cfg, func(root string) (bool, error) {
		b, err := readBounded(filepath.Join(root, "ovf-env.xml"), ovfBytesMax)
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		doc = b
		return true, err
	})
	if err != nil || doc == nil {
		return nil, err
	}
	return parseOVF(doc)
}

func readGuestInfo(ctx context.Context, cfg Config) (map[string]string, error) {
	if !onVMware(cfg.Paths) {
		return nil, nil
	}
	out := make(map[string]string)
	for _, k := range keys {
		if v := guestInfo(ctx, cfg.Host, ovfPrefix+k.name); v != "" {
			out[k.name] = v
		}
	}
	return out, nil
}

// eachDisc mounts every CD-ROM, read-only, until f has found what it looks for.
func eachDisc(ctx context.Context, cfg Config, f func(root string) (bool, error)) error {
	discs, err := filepath.Glob(filepath.Join(cfg.Paths.Dev, "sr[0-9]*"))
	if err != nil {
		return err
	}
	for _, dev := range discs {
		fstype, _ := probe(ctx, cfg.Host, dev)
		if fstype["TYPE"] != "iso9660" && fstype["TYPE"] != "udf" {
			continue
		}
		done, err := mounted(cfg, dev, fstype["TYPE"], true, f)
		if err != nil || done {
			return err
		}
	}
	return nil
}

// mounted runs f with dev mounted.
func mounted(cfg Config, dev, fstype string, readOnly bool, f func(root string) (bool, error)) (done bool, err error) {
	dir, err := os.MkdirTemp(cfg.Paths.Run, "seed-")
	if err != nil {
		return false, err
	}
	defer os.Remove(dir)
	if err := cfg.Host.Mount(dev, dir, fstype, readOnly); err != nil {
		return false, fmt.Errorf("mount %s: %w", dev, err)
	}
	done, err = f(dir)
	return done, errors.Join(err, cfg.Host.Unmount(dir))
}

// readNoCloud looks for a file system labelled CIDATA on any disk or CD-ROM.
func readNoCloud(ctx context.Context, cfg Config) (map[string]string, error) {
	dev, fstype := labelled(ctx, cfg, "cidata")
	if dev == "" {
		return nil, nil
	}
	var s seed
	_, err := mounted(cfg, dev, fstype, true, func(root string) (bool, error) {
		var err error
		s, err = readSeed(root)
		return true, err
	})
	if err != nil {
		return nil, err
	}
	return parseSeed(s)
}

func readSeed(root string) (seed, error) {
	var s seed
	for name, into := range map[string]*[]byte{"meta-data": &s.meta, "user-data": &s.user, "network-config": &s.network} {
		b, err := readBounded(filepath.Join(root, name), seedBytesMax)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return s, err
		}
		*into = b
	}
	return s, nil
}

// labelled finds a small file system by its label, whatever the case.
func labelled(ctx context.Context, cfg Config, label string) (dev, fstype string) {
	ctx, cancel := context.WithTimeout(ctx, toolTimeout)
	defer cancel()
	for _, l := range []string{strings.ToUpper(label), strings.ToLower(label)} {
		b, err := cfg.Host.Run(ctx, "blkid", "-c", "/dev/null", "-t", "LABEL="+l, "-o", "device")
		if err != nil {
			continue
		}
		for _, d := range strings.Fields(string(b)) {
			if tags, err := probe(ctx, cfg.Host, d); err == nil && (tags["TYPE"] == "iso9660" || tags["TYPE"] == "vfat") {
				return d, tags["TYPE"]
			}
		}
	}
	return "", ""
}

// readCredentials reads systemd credentials varve.KEY and varve.config.
func readCredentials(_ context.Context, cfg Config) (map[string]string, error) {
	out := make(map[string]string)
	var errs []error
	for _, dir := range cfg.Paths.Credentials {
		got, err := readKeys(func(name string) string { return filepath.Join(dir, "varve."+name) })
		errs = append(errs, err)
		for k, v := range got {
			if _, have := out[k]; !have {
				out[k] = v
			}
		}
	}
	return out, errors.Join(errs...)
}

// readFWCfg reads what QEMU was given as -fw_cfg name=opt/varve/KEY,string=VALUE or name=opt/varve/config,file=FILE.
func readFWCfg(_ context.Context, cfg Config) (map[string]string, error) {
	dir := filepath.Join(cfg.Paths.Sys, "firmware/qemu_fw_cfg/by_name/opt/varve")
	return readKeys(func(name string) string { return filepath.Join(dir, name, "raw") })
}

const configBytesMax = 64 << 10

// readKeys reads a file for each key, and one with all. A key's own file counts more.
func readKeys(path func(name string) string) (map[string]string, error) {
	out := make(map[string]string)
	var errs []error
	b, err := readBounded(path("config"), configBytesMax)
	if err == nil {
		out, err = parseConfig(b)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	for _, k := range keys {
		b, err := readBounded(path(k.name), valueBytesMax)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		set(out, k.name, strings.TrimRight(string(b), "\x00"))
	}
	return out, errors.Join(errs...)
}

// parseConfig reads a YAML or JSON mapping of keys; a list is a value of several words.
func parseConfig(b []byte) (map[string]string, error) {
	out := make(map[string]string)
	if len(b) > configBytesMax {
		return out, fmt.Errorf("config of more than %d bytes", configBytesMax)
	}
	var m map[string]yaml.Node
	if err := yaml.Unmarshal([]byte(strings.TrimRight(string(b), "\x00")), &m); err != nil {
		return out, fmt.Errorf("config: %w", err)
	}
	return out, words(m, out)
}
