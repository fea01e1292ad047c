package cli

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"varve/appliance/doctor"
	"varve/appliance/server"
	"varve/control/api/client"
	v1 "varve/control/api/customer"
	"varve/control/bytesize"
)

// layout is where the appliance on --data has its parts, as far as its files and environment say.
func (e *env) layout() doctor.Layout {
	l := doctor.Layout{Data: e.data, Cache: filepath.Join(e.data, "cache"), Backends: []string{filepath.Join(e.data, "backend")}}
	c := e.serveCommand()
	flags := pflag.NewFlagSet("serve", pflag.ContinueOnError)
	flags.AddFlagSet(c.Flags())
	if e.settle(flags) != nil {
		return l // serve says what is wrong with them
	}
	for _, name := range []string{"map-size", "cache-ram"} {
		if n, err := bytesize.Parse(flags.Lookup(name).Value.String()); err == nil {
			l.Budgets += n
		}
	}
	if dir := flags.Lookup("cache-dir").Value.String(); dir != "" {
		l.Cache = dir
	}
	return l
}

// versions are the values that a setting has and had, the newest first, and its revision.
func (e *env) versions(cmd *cobra.Command, s *session, key string) ([]v1.ConfigValue, uint64, error) {
	k, err := client.Get[v1.ConfigKey](s.ctx(cmd), s.Client, "config", key)
	if err != nil {
		return nil, 0, err
	}
	return append([]v1.ConfigValue{{Value: k.Value, Version: k.Version, By: k.By, At: k.At}}, k.Former...), k.Rev, nil
}

// pickVersion finds a version; 0 is the one at place def.
func pickVersion(key string, list []v1.ConfigValue, version uint64, def int) (v1.ConfigValue, error) {
	if version == 0 && def < len(list) {
		return list[def], nil
	}
	i := slices.IndexFunc(list, func(v v1.ConfigValue) bool { return version != 0 && v.Version == version })
	if i >= 0 {
		return list[i], nil
	}
	return v1.ConfigValue{}, &Failure{Exit: ExitNotFound, What: "find version of setting", Object: key, Why: "there is no such version",
		Remedy: "see varve config history " + key}
}

// configVersions go through the versions of the cluster's settings.
func (e *env) configVersions() []*cobra.Command {
	history := &cobra.Command{
		Use: "history KEY", Short: "List the values that a setting has had, the newest first", Args: exactly("KEY"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.call("show setting", args[0], func(s *session) error {
				list, _, err := e.versions(cmd, s, args[0])
				if err != nil {
					return err
				}
				return e.show(list, func(w io.Writer) error {
					var rows [][]string
					for _, v := range list {
						rows = append(rows, []string{fmt.Sprint(v.Version), v.Value, v.By, formatTime(v.At)})
					}
					return printTable(w, []string{"Version", "Value", "By", "At"}, rows)
				})
			})
		},
	}
	var from, to uint64
	diff := &cobra.Command{
		Use: "diff KEY", Short: "Compare two versions of a setting, line by line: the last two, or --from and --to", Args: exactly("KEY"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.call("compare setting", args[0], func(s *session) error {
				list, _, err := e.versions(cmd, s, args[0])
				if err != nil {
					return err
				}
				b, err := pickVersion(args[0], list, to, 0)
				if err != nil {
					return err
				}
				a, err := pickVersion(args[0], list, from, 1)
				if err != nil {
					return err
				}
				return e.show(map[string]v1.ConfigValue{"from": a, "to": b}, func(w io.Writer) error {
					_, err := io.WriteString(w, lineDiff(a, b))
					return err
				})
			})
		},
	}
	diff.Flags().Uint64Var(&from, "from", 0, "`VERSION` to compare; the one before the last")
	diff.Flags().Uint64Var(&to, "to", 0, "`VERSION` to compare with; the last")
	var back uint64
	rollback := &cobra.Command{
		Use: "rollback KEY", Short: "Give a setting the value of a former version again, which makes a new version", Args: exactly("KEY"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.call("roll back setting", args[0], func(s *session) error {
				list, rev, err := e.versions(cmd, s, args[0])
				if err != nil {
					return err
				}
				v, err := pickVersion(args[0], list, back, 1)
				if err != nil {
					return err
				}
				// Of this revision: what somebody changes in the meantime is not overwritten.
				now, _, err := client.Put[v1.ConfigKey](s.ctx(cmd), s.Client, map[string]string{"value": v.Value}, client.Change{Rev: rev}, "config", args[0])
				if err != nil {
					return err
				}
				return e.show(now, func(w io.Writer) error { _, err := fmt.Fprintf(w, "%s is %q again\n", args[0], v.Value); return err })
			})
		},
	}
	rollback.Flags().Uint64Var(&back, "to", 0, "`VERSION` to take the value of; the one before the last")
	return []*cobra.Command{history, diff, rollback, e.driftCommand()}
}

// lineDiff marks the lines that only one of two values has, in their places.
func lineDiff(a, b v1.ConfigValue) string {
	var out strings.Builder
	fmt.Fprintf(&out, "--- version %d, %s\n+++ version %d, %s\n", a.Version, formatTime(a.At), b.Version, formatTime(b.At))
	x, y := strings.Split(a.Value, "\n"), strings.Split(b.Value, "\n")
	// The longest common subsequence; values are 4 KiB at most.
	longest := make([][]int, len(x)+1)
	for i := range longest {
		longest[i] = make([]int, len(y)+1)
	}
	for i := len(x) - 1; i >= 0; i-- {
		for j := len(y) - 1; j >= 0; j-- {
			if x[i] == y[j] {
				longest[i][j] = longest[i+1][j+1] + 1
			} else {
				longest[i][j] = max(longest[i+1][j], longest[i][j+1])
			}
		}
	}
	for i, j := 0, 0; i < len(x) || j < len(y); {
		switch {
		case i < len(x) && j < len(y) && x[i] == y[j]:
			out.WriteString(" " + x[i] + "\n")
			i, j = i+1, j+1
		case j == len(y) || i < len(x) && longest[i+1][j] >= longest[i][j+1]:
			out.WriteString("-" + x[i] + "\n")
			i++
		default:
			out.WriteString("+" + y[j] + "\n")
			j++
		}
	}
	return out.String()
}

func (e *env) driftCommand() *cobra.Command {
	return &cobra.Command{
		Use: "drift", Short: "Say which nodes run with something else than the cluster's configuration", Args: cobra.NoArgs,
		Long: `Say which nodes run with something else than what the cluster's configuration sets for them: serve.FLAG, and serve.FLAG.NODE for
one node. Every node renders it into DATA/config.cluster.json; it counts from the next start of that node on, below its own flags,
environment and config.json. Exit code 1 if a node drifts or does not answer.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return e.call("look for drift", "", func(s *session) error {
				h, err := client.Get[v1.Health](s.ctx(cmd), s.Client, "health")
				if err != nil {
					return err
				}
				checks, bad := []v1.HealthCheck{}, len(h.Unreachable) > 0
				for _, c := range h.Checks {
					if c.Code == "config.drift" {
						checks = append(checks, c)
						bad = bad || c.State != "ok"
					}
				}
				err = e.show(map[string]any{"nodes": checks, "unreachable": notNil(h.Unreachable)}, func(w io.Writer) error {
					var rows [][]string
					for _, c := range checks {
						rows = append(rows, []string{c.Node, c.State, c.Evidence})
					}
					for _, n := range h.Unreachable {
						rows = append(rows, []string{n, "unknown", "does not answer"})
					}
					return printTable(w, []string{"Node", "State", "Found"}, rows)
				})
				if err == nil && bad {
					return &silent{ExitFailed}
				}
				return err
			})
		},
	}
}

func (e *env) crashesCommand() *cobra.Command {
	return &cobra.Command{
		Use: "crashes", Short: "List the reports of processes of this appliance that crashed", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if e.data == "" {
				return usage("give --data DIR")
			}
			list, err := server.Crashes(server.CrashDir(e.data))
			if err != nil {
				return e.failure("list crashes", "", err)
			}
			return e.show(notNil(list), func(w io.Writer) error {
				var rows [][]string
				for _, c := range list {
					rows = append(rows, []string{formatTime(c.At), c.Head, c.File})
				}
				return printTable(w, []string{"When", "What", "Report"}, rows)
			})
		},
	}
}

// crashSection of a support bundle: of this machine alone.
var crashSection = section{Name: "crash", What: "reports of processes of this appliance that crashed: places in the program, no data"}

type crashReport struct {
	name string
	text []byte
}

const crashBytesMax = 1 << 20

// crashReports are the crash section, if it is wanted.
func (e *env) crashReports(only []string) ([]crashReport, error) {
	if e.data == "" || e.at != "" || len(only) > 0 && !slices.Contains(only, crashSection.Name) {
		return nil, nil
	}
	list, err := server.Crashes(server.CrashDir(e.data))
	if err != nil {
		return nil, err
	}
	var out []crashReport
	for _, c := range list {
		f, err := os.Open(c.File)
		if err != nil {
			return out, err
		}
		b, err := io.ReadAll(io.LimitReader(f, crashBytesMax))
		if err = errors.Join(err, f.Close()); err != nil {
			return out, err
		}
		out = append(out, crashReport{"crash/" + filepath.Base(c.File), b})
	}
	return out, nil
}
