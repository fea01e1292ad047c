package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"varve/appliance/logbook"
	"varve/appliance/server"
	"varve/control/api/client"
	v1 "varve/control/api/customer"
)

// keepRecords has a unit's log lines kept beside its data, numbered, and what the runtime says if the process crashes.
func (e *env) keepRecords(log *slog.Logger, data, unit string) (kept *slog.Logger, done func()) {
	if level, err := server.DataLevel(data); err != nil || !server.KnowsLevel(level) {
		return log, func() {} // nothing is touched there
	}
	ends := []func(){}
	if b, err := logbook.Open(server.LogDir(data), unit); err != nil {
		log.Warn("log lines are not kept", "err", err)
	} else {
		plain := log
		log = slog.New(b.Handler(log.Handler()))
		ends = append(ends, func() {
			if err := b.Close(); err != nil {
				plain.Warn("log book", "err", err)
			}
		})
	}
	dir := e.std.Getenv("VARVE_CRASH_DIR")
	if dir == "" {
		dir = server.CrashDir(data)
	}
	if end, err := server.KeepCrash(dir, e.std.Version, unit); err != nil {
		log.Warn("a crash would not be kept", "err", err)
	} else {
		ends = append(ends, end)
	}
	return log, func() {
		for _, end := range ends {
			end()
		}
	}
}

func (e *env) logsCommand() *cobra.Command {
	var node, level, component, match, until string
	var since time.Duration
	var limit int
	c := &cobra.Command{
		Use: "logs", Short: "Show the log lines of all nodes in the order of their times", Args: cobra.NoArgs,
		Long: `Show the log lines of all nodes, or of one, in the order of their times. Every line has the component that wrote it, CLUSTER.NODE.SERVICE,
and a number; a gap in the numbers of a node's unit means that lines were lost. A node that does not answer is named at the end.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			end := time.Now()
			if until != "" {
				var err error
				if end, err = time.Parse(time.RFC3339, until); err != nil {
					return usage("--until: %v", err)
				}
			}
			q := map[string]string{"since": fmt.Sprint(end.Add(-since).Unix()), "level": level, "limit": fmt.Sprint(limit)}
			for k, v := range map[string]string{"node": node, "component": component, "match": match} {
				if v != "" {
					q[k] = v
				}
			}
			if until != "" {
				q["until"] = fmt.Sprint(end.Unix())
			}
			return e.call("query logs", "", func(s *session) error {
				var raw json.RawMessage
				if _, err := client.Call(s.ctx(cmd), s.Client, http.MethodGet, []string{"logs"}, q, nil, &raw, client.Change{}); err != nil {
					return err
				}
				var got v1.LogLines
				if err := json.Unmarshal(raw, &got); err != nil {
					return err
				}
				if err := e.show(got, func(w io.Writer) error { return printLogs(w, got) }); err != nil {
					return err
				}
				if len(got.Unreachable) > 0 {
					fmt.Fprintf(e.std.Err, "varve: no answer from %s\n", strings.Join(got.Unreachable, ", "))
				}
				return nil
			})
		},
	}
	f := c.Flags()
	f.StringVar(&node, "node", "", "only this `NODE`'s")
	f.DurationVar(&since, "since", time.Hour, "from this long before the end on")
	f.StringVar(&until, "until", "", "up to this `TIME`, RFC 3339")
	f.StringVar(&level, "level", "info", "the least: debug, info, warn or error")
	f.StringVar(&component, "component", "", "only components whose id has this in it")
	f.StringVar(&match, "match", "", "only lines that have this in their message, or in an attribute as key=value")
	f.IntVar(&limit, "limit", 500, "how many of the newest, at most 5000")
	return c
}

func printLogs(w io.Writer, got v1.LogLines) error {
	for _, l := range got.Items {
		var attrs strings.Builder
		for _, k := range slices.Sorted(maps.Keys(l.Attrs)) {
			fmt.Fprintf(&attrs, " %s=%q", k, l.Attrs[k])
		}
		if _, err := fmt.Fprintf(w, "%s %-5s %s %s#%d %s: %s%s\n", l.At.Local().Format("2006-01-02 15:04:05.000"), l.Level, l.Node, l.Unit, l.Seq, dash(l.Component),
			l.Message, attrs.String()); err != nil {
			return err
		}
	}
	return nil
}
