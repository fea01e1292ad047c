package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"varve/appliance/doctor"
	"varve/control/api/client"
	v1 "varve/control/api/customer"
)

// estateCommands tell of the cluster's health, disks, backends and figures.
func (e *env) estateCommands() []*cobra.Command {
	return []*cobra.Command{e.healthCommand(), e.historyCommand(), e.monitoringCommand(), group("disk", "The disks of the nodes",
		e.listing(listing{use: "list", short: "List the disks, and what each is used for", path: fixed("disks"),
			columns: []string{"id", "kind", "model", "size:bytes", "used:bytes", "free:bytes", "roles", "state"}})),
		group("backend", "Where the objects of vPools are",
			e.listing(listing{use: "list", short: "List the backends, how they answer and their room", path: fixed("backends"),
				columns: []string{"vpool", "kind", "node", "state", "total:bytes", "free:bytes", "pending:bytes", "error"}}),
			e.verb(verb{use: "show VPOOL", short: "Show the backend of a vPool", args: []string{"VPOOL"}, method: http.MethodGet,
				path: func(args []string) []string { return []string{"backends", args[0]} }}),
			e.verb(verb{use: "test VPOOL", short: "Probe the backend of a vPool beside its work", args: []string{"VPOOL"}, method: http.MethodPost,
				path: func(args []string) []string { return []string{"backends", args[0], "test"} }}))}
}

func (e *env) protectionCommand() *cobra.Command {
	return e.listing(listing{use: "protection", short: "List what of each vDisk is not safe elsewhere yet, most first", path: fixed("protection"),
		columns: []string{"vdisk", "owner", "class", "unlogged:bytes", "unbacked:bytes", "unbacked_age", "known"}})
}

func (e *env) capacityCommand() *cobra.Command {
	return e.listing(listing{use: "capacity", short: "List how full vPools are, and when they will be", path: fixed("capacity"),
		columns: []string{"vpool", "total:bytes", "free:bytes", "used:bytes", "provisioned:bytes", "growth:bytes", "full:time"}})
}

func (e *env) healthCommand() *cobra.Command {
	var all bool
	c := &cobra.Command{
		Use: "health", Short: "Say what every node has checked", Args: cobra.NoArgs,
		Long: "Say what every node has checked: what is wrong, and with --all what is not. Exit code 1 if the state is error. varve doctor --codes explains the codes.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return e.call("health", "", func(s *session) error {
				h, err := client.Get[v1.Health](s.ctx(cmd), s.Client, "health")
				if err != nil {
					return err
				}
				if err := e.show(h, func(w io.Writer) error { return printHealth(w, h, all) }); err != nil {
					return err
				}
				if h.State == "error" {
					return &silent{ExitFailed}
				}
				return nil
			})
		},
	}
	c.Flags().BoolVar(&all, "all", false, "also what is well")
	return c
}

func printHealth(w io.Writer, h v1.Health, all bool) error {
	var rows [][]string
	for _, c := range h.Checks {
		if c.State == "ok" && !all {
			continue
		}
		since := ""
		if c.Since != nil {
			since = formatTime(*c.Since)
		}
		rows = append(rows, []string{strings.ToUpper(c.State), c.Code, c.Node, dash(c.Object), c.Evidence, since})
		if c.Remedy != "" {
			rows = append(rows, []string{"", "", "", "", "-> " + c.Remedy, ""})
		}
	}
	if len(rows) > 0 {
		if err := printTable(w, []string{"State", "Code", "Node", "Object", "Found", "Since"}, rows); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintf(w, "%s: %d checks at %s\n", strings.ToUpper(h.State), len(h.Checks), formatTime(h.At))
	return err
}

func (e *env) historyCommand() *cobra.Command {
	var metrics []string
	var last time.Duration
	var points int
	c := &cobra.Command{
		Use: "history OBJECT", Short: "Show how figures of a node, vPool or vDisk were", Args: exactly("OBJECT"),
		Long: `Show how figures were over time: OBJECT is node:NAME, vpool:NAME or vdisk:VPOOL/NAME. Kept are steps of 10 s for a day, of a minute for a
week and of 15 minutes for 30 days.`,
		Example: "  varve history vdisk:default/disk1 --last 24h --metric write_iops,write_p99",
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.call("history", args[0], func(s *session) error {
				var raw json.RawMessage
				q := map[string]string{"object": args[0], "metric": strings.Join(metrics, ","), "points": fmt.Sprint(points),
					"from": fmt.Sprint(time.Now().Add(-last).Unix())}
				if _, err := client.Call(s.ctx(cmd), s.Client, http.MethodGet, []string{"metrics", "history"}, q, nil, &raw, client.Change{}); err != nil {
					return err
				}
				return e.show(raw, func(w io.Writer) error {
					var h v1.History
					if err := json.Unmarshal(raw, &h); err != nil {
						return err
					}
					return printHistory(w, h)
				})
			})
		},
	}
	c.Flags().StringSliceVar(&metrics, "metric", nil, "only this `METRIC`; repeatable")
	c.Flags().DurationVar(&last, "last", time.Hour, "how far back")
	c.Flags().IntVar(&points, "points", 30, "at most this many rows")
	return c
}

func printHistory(w io.Writer, h v1.History) error {
	head := []string{"Time"}
	var rows [][]string
	for i := range (h.To - h.From) / max(h.Step, 1) {
		rows = append(rows, []string{formatTime(time.Unix(h.From+i*h.Step, 0))})
	}
	for _, s := range h.Series {
		head = append(head, s.Metric)
		for i := range rows {
			cell := "-"
			if i < len(s.Values) && s.Values[i] != nil {
				cell = figure(*s.Values[i], s.Unit)
			}
			rows[i] = append(rows[i], cell)
		}
	}
	return printTable(w, head, rows)
}

// figure prints a value with its unit.
func figure(v float64, unit string) string {
	switch unit {
	case "bytes":
		return size(v1.Size(math.Round(v)))
	case "bytes/s":
		return size(v1.Size(math.Round(v))) + "/s"
	case "seconds":
		return time.Duration(v * float64(time.Second)).Round(time.Microsecond).String()
	case "ratio":
		return fmt.Sprintf("%.1f %%", v*100)
	}
	return fmt.Sprintf("%.4g", v)
}

// printCodes lists what is checked.
func printCodes(w io.Writer) error {
	var rows [][]string
	for _, c := range doctor.Codes() {
		rows = append(rows, []string{c.Code, c.By, c.Title, c.Remedy})
	}
	return printTable(w, []string{"Code", "Checked by", "What", "Remedy"}, rows)
}

// overNetwork makes a verb of the API of one that is otherwise done on the appliance's own socket: with --at.
func (e *env) overNetwork(local *cobra.Command, v verb) *cobra.Command {
	remote := e.verb(v)
	remote.Flags().VisitAll(func(f *pflag.Flag) {
		if local.Flags().Lookup(f.Name) == nil {
			local.Flags().AddFlag(f)
		}
	})
	here := local.RunE
	local.RunE = func(cmd *cobra.Command, args []string) error {
		if e.at == "" {
			return here(cmd, args)
		}
		return remote.RunE(cmd, args)
	}
	return local
}
