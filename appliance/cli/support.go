package cli

import (
	"archive/tar"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"varve/control/api/client"
	v1 "varve/control/api/customer"
)

// whole says that the answer itself is the one item.
const whole = "."

// section is a part of a support bundle: what the API answers at a path, of which only the fields named are kept. What is not named
// here is not collected, so that a field that comes later is left out until somebody has thought about it.
type section struct {
	name, what, path string
	fields           []string
	// of is the member of the answer that has the items; whole is the answer itself, "" is items.
	of string
}

var sections = []section{
	{"status", "state of the appliance", "/status", []string{"state", "problems", "node", "node_id", "cluster", "version", "started", "ready", "vpools", "vdisks",
		"files", "deleting", "services", "log", "index"}, whole},
	{"cluster", "how the nodes are, as this one sees them", "/cluster", []string{"id", "self", "leader", "voters", "nodes", "problems"}, whole},
	{"health", "what every node has checked, without what was seen", "/health", []string{"code", "title", "state", "node", "object", "remedy", "since", "at"}, "checks"},
	{"disks", "the nodes' disks, without serial numbers", "/disks", []string{"id", "node", "device", "kind", "model", "size", "roles", "mounts", "used", "free", "state"}, ""},
	{"backends", "backends without where they are", "/backends", []string{"vpool", "id", "kind", "node", "state", "since", "total", "free", "stored", "pending", "findings"}, ""},
	{"protection", "what of each vDisk is not safe elsewhere yet", "/protection", []string{"vdisk", "id", "vpool", "owner", "class", "unlogged", "unbacked", "unbacked_age", "known"}, ""},
	{"nodes", "nodes with their addresses", "/nodes", []string{"name", "id", "role", "nbd", "nfs", "https", "version", "self", "joined", "seen", "rev"}, ""},
	{"vpools", "vPools without their backends' addresses", "/vpools", []string{"name", "id", "class", "vdisks", "files", "deleting", "total", "free", "stored", "findings", "rev"}, ""},
	{"vdisks", "vDisks with their sizes and states", "/vdisks", []string{"name", "id", "vpool", "size", "used", "pending", "state", "class", "owner", "epoch", "open",
		"clients", "template", "rev"}, ""},
	{"tasks", "tasks with their problems", "/tasks", []string{"id", "type", "state", "queue", "object", "done", "total", "steps", "log", "problem", "node", "created",
		"started", "ended"}, ""},
	{"events", "the last events, without what they say", "/events", []string{"seq", "at", "type", "topic", "key", "node"}, ""},
	{"schedules", "schedules", "/schedules", []string{"name", "scope", "cron", "zone", "enabled", "last", "next", "error"}, ""},
	{"policies", "policies", "/policies", []string{"scope", "set", "rev"}, ""},
	{"config", "names of the settings, without their values", "/config", []string{"key", "version", "at"}, ""},
	{"sinks", "how sending events goes, without where to", "/sinks", []string{"name", "kind", "enabled", "sent", "failing", "missed"}, ""},
	{"users", "how many users and with which roles, without names", "/users", []string{"roles", "source", "totp", "disabled"}, ""},
	{"audit", "the audit log without addresses", "/audit", []string{"seq", "time", "who", "via", "action", "object", "result", "request_id"}, ""},
}

const bundleItemsMax = 1000

func (e *env) supportCommand() *cobra.Command {
	c := group("support", "What somebody who helps needs to see")
	var only []string
	bundle := &cobra.Command{
		Use: "bundle FILE", Short: "Collect what somebody who helps needs to see, and nothing else", Args: exactly("FILE"),
		Long: `Collect what somebody who helps needs to see into FILE, a .tar.gz of JSON files with a manifest. Only fields on a list are taken:
no secrets, no passwords, no tokens, no data of vDisks, no addresses of backends. varve support sections shows what; read the files
before you send them. Nothing is sent anywhere.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, s := range only {
				if s != crashSection.name && !slices.ContainsFunc(sections, func(x section) bool { return x.name == s }) {
					return usage("there is no section %q", s)
				}
			}
			return e.call("bundle support", args[0], func(s *session) error {
				n, err := e.writeBundle(s.ctx(cmd), s, args[0], only)
				if err != nil {
					return err
				}
				return e.show(map[string]any{"file": args[0], "sections": n}, func(w io.Writer) error {
					_, err := fmt.Fprintf(w, "%s holds %d sections\n", args[0], n)
					return err
				})
			})
		},
	}
	bundle.Flags().StringSliceVar(&only, "section", nil, "only this `SECTION`; repeatable")
	c.AddCommand(bundle, &cobra.Command{
		Use: "sections", Short: "Say what a bundle holds", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			var rows [][]string
			for _, s := range append(slices.Clip(sections), crashSection) {
				rows = append(rows, []string{s.name, s.what})
			}
			return e.show(rows, func(w io.Writer) error { return printTable(w, []string{"Section", "What"}, rows) })
		},
	})
	return c
}

// writeBundle collects the sections. One that the appliance cannot give is in the manifest with the reason. The file is new, whole
// or not there, and for this user alone.
func (e *env) writeBundle(ctx context.Context, s *session, path string, only []string) (n int, err error) {
	var out bytes.Buffer
	zip := gzip.NewWriter(&out)
	files := tar.NewWriter(zip)
	now := time.Now().UTC().Truncate(time.Second)
	add := func(name string, b []byte) error {
		if err := files.WriteHeader(&tar.Header{Name: "varve-support/" + name, Mode: 0o600, Size: int64(len(b)), ModTime: now}); err != nil {
			return err
		}
		_, err := files.Write(b)
		return err
	}
	type part struct {
		Section string `json:"section"`
		File    string `json:"file,omitempty"`
		SHA256  string `json:"sha256,omitempty"`
		Missing string `json:"missing,omitempty"`
	}
	var parts []part
	for _, sec := range sections {
		if len(only) > 0 && !slices.Contains(only, sec.name) {
			continue
		}
		b, err := collect(ctx, s.Client, sec)
		if errors.Is(err, client.ErrUnreachable) {
			return n, err
		}
		if err != nil {
			parts = append(parts, part{Section: sec.name, Missing: err.Error()})
			continue
		}
		if err := add(sec.name+".json", b); err != nil {
			return n, err
		}
		n++
		parts = append(parts, part{Section: sec.name, File: sec.name + ".json", SHA256: fmt.Sprintf("%x", sha256.Sum256(b))})
	}
	crashes, err := e.crashReports(only)
	if err != nil {
		parts = append(parts, part{Section: crashSection.name, Missing: err.Error()})
	}
	for _, c := range crashes {
		if err := add(c.name, c.text); err != nil {
			return n, err
		}
		parts = append(parts, part{Section: crashSection.name, File: c.name, SHA256: fmt.Sprintf("%x", sha256.Sum256(c.text))})
	}
	if len(crashes) > 0 {
		n++
	}
	manifest, err := json.MarshalIndent(map[string]any{"made": now, "by": "varve " + e.std.Version, "parts": parts}, "", "  ")
	if err != nil {
		return n, err
	}
	if err := errors.Join(add("manifest.json", manifest), files.Close(), zip.Close()); err != nil {
		return n, err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return n, &Failure{Exit: ExitConflict, What: "bundle support", Object: path, Why: "the file is there already", Remedy: "give another name", Err: err}
	}
	if err != nil {
		return n, err
	}
	_, err = f.Write(out.Bytes())
	if err = errors.Join(err, f.Close()); err != nil {
		return n, errors.Join(err, os.Remove(path))
	}
	return n, nil
}

// collect reads a section and keeps the fields that it names.
func collect(ctx context.Context, c *client.Client, sec section) ([]byte, error) {
	path := v1.Prefix + sec.path + "?consistency=stale" // what it knows is enough, and all there is without a majority
	if sec.of == "" {
		path += fmt.Sprintf("&limit=%d", bundleItemsMax)
	}
	raw, err := c.Do(ctx, http.MethodGet, path, nil, nil)
	if err != nil {
		return nil, err
	}
	var answer map[string]json.RawMessage
	if err := json.Unmarshal(raw.Body, &answer); err != nil {
		return nil, fmt.Errorf("read %s: %w", sec.name, err)
	}
	items := []map[string]json.RawMessage{answer}
	if sec.of != whole {
		items = nil
		if err := json.Unmarshal(answer[cmp.Or(sec.of, "items")], &items); err != nil {
			return nil, fmt.Errorf("read %s: %w", sec.name, err)
		}
	}
	kept := make([]map[string]json.RawMessage, 0, len(items))
	for _, item := range items {
		only := make(map[string]json.RawMessage)
		for _, f := range sec.fields {
			if v, ok := item[f]; ok {
				only[f] = v
			}
		}
		kept = append(kept, only)
	}
	return json.MarshalIndent(kept, "", "  ")
}
