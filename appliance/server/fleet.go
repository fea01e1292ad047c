package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"varve/control/bytesize"
	"varve/control/durable"
	"varve/control/state"
)

// Settings of varve serve can be set for the whole cluster, by its versioned configuration, which every node renders for itself:
//
//	config serve.FLAG        for all nodes              varve config set serve.log-level debug
//	config serve.FLAG.NODE   for one, which wins         varve config set serve.map-size.host3 1GiB
//	DATA/config.cluster.json what this node has rendered; varve serve reads it at its start, below flags, environment and config.json
//
// The health check config.drift says which node runs with something else than what the cluster's configuration says: because it has
// not been started again since, or because its own flags, environment or file say otherwise. varve config history, diff and rollback
// go through the former values.
const (
	// ClusterConfigName is the file's name below a data directory.
	ClusterConfigName = "config.cluster.json"
	configPrefix      = "serve."
	configEvery       = 2 * time.Second
)

// fleetSettings are the flags that a cluster may set: those that make sense on every node and with which a node starts whatever they are,
// once check has passed them.
var fleetSettings = map[string]func(string) error{
	"log-level":   oneOf("debug", "info", "warn", "error"),
	"nbd-tls":     oneOf("off", "optional", "required"),
	"drain-time":  checkDuration,
	"map-size":    checkSize(mapBytesMin, false),
	"cache-ram":   checkSize(cacheRAMMin, true),
	"cache-bytes": checkSize(cacheMin, true),
}

func oneOf(words ...string) func(string) error {
	return func(s string) error {
		if slices.Contains(words, s) {
			return nil
		}
		return fmt.Errorf("%q is none of %s", s, strings.Join(words, ", "))
	}
}

func checkDuration(s string) error {
	d, err := time.ParseDuration(s)
	if err != nil || d < time.Second || d > time.Hour {
		return fmt.Errorf("%q is no time from 1s to 1h", s)
	}
	return nil
}

func checkSize(least int64, none bool) func(string) error {
	return func(s string) error {
		n, err := bytesize.Parse(s)
		if err != nil {
			return err
		}
		if n < least && !(none && n == 0) || n > logBytesMax {
			return fmt.Errorf("%q is out of range: at least %s", s, bytesize.Format(least))
		}
		return nil
	}
}

// CheckFleetSetting says what is wrong with a value for the whole cluster, or that a flag cannot be set so.
func CheckFleetSetting(flag, value string) error {
	check, ok := fleetSettings[flag]
	if !ok {
		return fmt.Errorf("%s cannot be set for a cluster; these can: %s", flag, strings.Join(slices.Sorted(maps.Keys(fleetSettings)), ", "))
	}
	return check(value)
}

// checkConfig refuses a value that no node could start with.
func checkConfig(key, value string) error {
	name, ours := strings.CutPrefix(key, configPrefix)
	if !ours {
		return nil
	}
	flag, _, _ := strings.Cut(name, ".")
	if err := CheckFleetSetting(flag, value); err != nil {
		return &state.Error{Err: state.ErrInvalid, Object: "config " + key, Field: "value", Detail: err.Error()}
	}
	return nil
}

// rendered is what the cluster's configuration says for a node, by flag, and what in it cannot be.
func rendered(v *state.View, node string) (settings map[string]string, wrong []string) {
	settings = make(map[string]string)
	own := make(map[string]bool)
	for _, k := range v.Configs() {
		name, ours := strings.CutPrefix(k.Key, configPrefix)
		if !ours {
			continue
		}
		flag, of, single := strings.Cut(name, ".")
		if single && of != node {
			continue
		}
		if err := CheckFleetSetting(flag, k.Value); err != nil {
			wrong = append(wrong, k.Key+": "+err.Error())
			continue
		}
		if single || !own[flag] {
			settings[flag], own[flag] = k.Value, own[flag] || single
		}
	}
	return settings, wrong
}

// render writes what holds for this node, if it has changed.
func (b *base) render() error {
	self, err := b.nodes.Self()
	if errors.Is(err, state.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	settings, _ := rendered(b.raft.State().View(), self.Name)
	text, err := json.MarshalIndent(settings, "", "  ")
	if err != nil {
		return fmt.Errorf("encode configuration: %w", err)
	}
	text = append(text, '\n')
	have, err := os.ReadFile(filepath.Join(b.cfg.Data, ClusterConfigName))
	if err == nil && string(have) == string(text) || errors.Is(err, fs.ErrNotExist) && len(settings) == 0 {
		return nil
	}
	b.cfg.Log.Info("the cluster's configuration is rendered, it counts from the next start on", "settings", len(settings))
	return durable.Replace(b.cfg.Data, ClusterConfigName, text, 0o644)
}

// followConfig renders until ctx ends.
func (b *base) followConfig(ctx context.Context) error {
	return tick(ctx, configEvery, func() {
		if err := b.render(); err != nil && ctx.Err() == nil {
			b.cfg.Log.Warn("the cluster's configuration could not be rendered, it is tried again", "err", err)
		}
	})
}

// driftChecks compares what this node runs with to what the cluster's configuration says.
func (e estate) driftChecks(f *findings) {
	settings, wrong := rendered(e.raft.State().View(), f.node)
	var drift []string
	for _, flag := range slices.Sorted(maps.Keys(settings)) {
		if have := e.cfg.Settings[flag]; !same(have, settings[flag]) {
			drift = append(drift, fmt.Sprintf("%s is %q, the cluster says %q", flag, have, settings[flag]))
		}
	}
	switch drift := append(wrong, drift...); {
	case len(drift) > 0:
		f.add("config.drift", stateWarning, "node "+f.node, strings.Join(drift, "; "), "")
	default:
		f.add("config.drift", stateOK, "node "+f.node, fmt.Sprintf("runs with the cluster's %d settings", len(settings)), "")
	}
}

// same compares values of a flag, whose text may differ: 1GiB and 1024MiB, 60s and 1m0s.
func same(a, b string) bool {
	if a == b {
		return true
	}
	if x, err := bytesize.Parse(a); err == nil {
		y, err := bytesize.Parse(b)
		return err == nil && x == y
	}
	if x, err := time.ParseDuration(a); err == nil {
		y, err := time.ParseDuration(b)
		return err == nil && x == y
	}
	return false
}
