package cli

import (
	"archive/tar"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"slices"
	"sync"
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
	Name   string   `json:"name"`
	What   string   `json:"what"`
	Path   string   `json:"path"`
	Fields []string `json:"fields"`
	// Of is the member of the answer that has the items; whole is the answer itself, "" is items.
	Of string `json:"of"`
}

// supportJSON is read by the console too, whose bundle holds the same.
//
//go:embed support.json
var supportJSON []byte

var sections = sync.OnceValue(func() (list []section) {
	if err := json.Unmarshal(supportJSON, &list); err != nil {
		panic(fmt.Sprintf("support.json: %v", err))
	}
	return list
})

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
				if s != crashSection.Name && !slices.ContainsFunc(sections(), func(x section) bool { return x.Name == s }) {
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
			for _, s := range append(slices.Clip(sections()), crashSection) {
				rows = append(rows, []string{s.Name, s.What})
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
	for _, sec := range sections() {
		if len(only) > 0 && !slices.Contains(only, sec.Name) {
			continue
		}
		b, err := collect(ctx, s.Client, sec)
		if errors.Is(err, client.ErrUnreachable) {
			return n, err
		}
		if err != nil {
			parts = append(parts, part{Section: sec.Name, Missing: err.Error()})
			continue
		}
		if err := add(sec.Name+".json", b); err != nil {
			return n, err
		}
		n++
		parts = append(parts, part{Section: sec.Name, File: sec.Name + ".json", SHA256: fmt.Sprintf("%x", sha256.Sum256(b))})
	}
	crashes, err := e.crashReports(only)
	if err != nil {
		parts = append(parts, part{Section: crashSection.Name, Missing: err.Error()})
	}
	for _, c := range crashes {
		if err := add(c.name, c.text); err != nil {
			return n, err
		}
		parts = append(parts, part{Section: crashSection.Name, File: c.name, SHA256: fmt.Sprintf("%x", sha256.Sum256(c.text))})
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
	path := v1.Prefix + sec.Path + "?consistency=stale" // what it knows is enough, and all there is without a majority
	if sec.Of == "" {
		path += fmt.Sprintf("&limit=%d", bundleItemsMax)
	}
	raw, err := c.Do(ctx, http.MethodGet, path, nil, nil)
	if err != nil {
		return nil, err
	}
	var answer map[string]json.RawMessage
	if err := json.Unmarshal(raw.Body, &answer); err != nil {
		return nil, fmt.Errorf("read %s: %w", sec.Name, err)
	}
	items := []map[string]json.RawMessage{answer}
	if sec.Of != whole {
		items = nil
		if err := json.Unmarshal(answer[cmp.Or(sec.Of, "items")], &items); err != nil {
			return nil, fmt.Errorf("read %s: %w", sec.Name, err)
		}
	}
	kept := make([]map[string]json.RawMessage, 0, len(items))
	for _, item := range items {
		only := make(map[string]json.RawMessage)
		for _, f := range sec.Fields {
			if v, ok := item[f]; ok {
				only[f] = v
			}
		}
		kept = append(kept, only)
	}
	return json.MarshalIndent(kept, "", "  ")
}
