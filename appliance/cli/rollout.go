package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"varve/appliance/server"
	"varve/control/api/client"
	v1 "varve/control/api/customer"
	"varve/control/state"
)

var digest = regexp.MustCompile(`^[0-9a-f]{64}$`)

// rolloutCommands update the whole cluster.
func (e *env) rolloutCommands() []*cobra.Command {
	var finalise bool
	c := &cobra.Command{
		Use: "rollout FILE|SHA256", Short: "Update all appliances of the cluster, one after the other", Args: exactly("FILE|SHA256"),
		Long: `Update all appliances of the cluster with a signed bundle, one after the other. It is uploaded first, unless it is there: then its
SHA-256 will do. Each appliance fetches it, writes it into the slot that does not run, restarts and proves itself before the next one
begins; where one does not, the rollout ends and that one runs what it ran before. A node's guests wait while it restarts.

varve task watch ID follows it. varve task cancel ID pauses it before the next node; varve task retry ID goes on, also after a failure.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.call("update", args[0], func(s *session) error {
				sum := args[0]
				if !digest.MatchString(sum) {
					b, err := e.upload(cmd.Context(), s, args[0])
					if err != nil {
						return err
					}
					sum = b.SHA256
				}
				t, _, err := client.Post[v1.Task](s.ctx(cmd), s.Client, v1.RolloutStart{SHA256: sum, Finalise: finalise}, client.Change{}, "updates", "rollout")
				if err != nil {
					return err
				}
				raw, err := json.Marshal(t)
				if err != nil {
					return err
				}
				return e.follow(cmd, s, raw, false) // the appliance that answers restarts too
			})
		},
	}
	c.Flags().BoolVar(&finalise, "finalise", false, "when all run it, let them write its data formats: no way back from there")
	up := &cobra.Command{
		Use: "upload FILE", Short: "Check a signed bundle and keep it on the appliance, for a rollout", Args: exactly("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.call("upload", args[0], func(s *session) error {
				b, err := e.upload(cmd.Context(), s, args[0])
				if err != nil {
					return err
				}
				return e.show(b, func(w io.Writer) error {
					_, err := fmt.Fprintf(w, "version %s: %s on %s\n", b.Version, b.SHA256, b.Node)
					return err
				})
			})
		},
	}
	list := e.verb(verb{use: "list", short: "Say what each appliance runs, which bundles are here, and how the last rollout goes", method: http.MethodGet,
		path: fixed("updates"), table: printUpdates})
	return []*cobra.Command{c, up, list, e.overNetwork(&cobra.Command{
		Use: "finalise", Short: "Let all nodes write the data formats of the version that all of them run; there is no way back", Args: cobra.NoArgs,
		Long: `Let all nodes write the data formats of the version that all of them run. Until then each of them can go back to the version before.
It is refused while a node runs a version that does not know them.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return e.onNode(cmd, "finalise", "", func(ctx context.Context, l local) error { return l.commit(ctx, &state.RaiseLevel{To: state.LevelMax}) })
		},
	}, verb{use: "finalise", short: "Let all nodes write the data formats of the version that all of them run", method: http.MethodPost,
		path: fixed("updates", "finalise"), confirm: func([]string) string { return "finalise" }, done: "finalised"})}
}

// upload sends a bundle, however long it takes.
func (e *env) upload(ctx context.Context, s *session, path string) (b v1.UpdateBundle, err error) {
	f, err := os.Open(path)
	if err != nil {
		return b, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return b, err
	}
	report, stop := e.bar("upload " + path)
	defer func() { stop(err) }()
	err = client.Upload(ctx, s.Client, &metered{r: f, total: info.Size(), report: report}, info.Size(), &b, "updates", "bundles")
	return b, err
}

// metered tells how much of a file has been read.
type metered struct {
	r           io.Reader
	done, total int64
	report      func(done, total int64)
}

// Read implements io.Reader.
func (m *metered) Read(p []byte) (int, error) {
	n, err := m.r.Read(p)
	if m.done += int64(n); m.report != nil && n > 0 {
		m.report(m.done, m.total)
	}
	return n, err
}

func printUpdates(w io.Writer, raw json.RawMessage) error {
	var u v1.Updates
	if err := json.Unmarshal(raw, &u); err != nil {
		return err
	}
	var rows [][]string
	for _, n := range u.Nodes {
		st := "ready"
		switch {
		case !n.Reachable:
			st = "no answer"
		case n.Busy:
			st = "being updated"
		case n.Trying:
			st = "on trial"
		case !n.Ready:
			st = "not ready"
		case !n.Updatable:
			st = "ready, updated as a package"
		}
		last := n.Error
		if n.Failed != "" {
			last = n.Failed + " went back: " + n.Why
		}
		rows = append(rows, []string{n.Name, n.Version, st, dash(last)})
	}
	if err := printTable(w, []string{"Node", "Version", "State", "Last failure"}, rows); err != nil {
		return err
	}
	rows = nil
	for _, b := range u.Bundles {
		rows = append(rows, []string{b.Version, b.Node, strconv.FormatInt(int64(b.Size), 10), b.SHA256})
	}
	if len(rows) > 0 {
		if err := printTable(w, []string{"Bundle", "On", "Bytes", "SHA-256"}, rows); err != nil {
			return err
		}
	}
	fields := [][2]string{{"Data formats", fmt.Sprintf("level %d", u.Level)}}
	if u.LevelReady > u.Level {
		fields[0][1] += fmt.Sprintf("; all nodes know %d: varve update finalise", u.LevelReady)
	}
	if t := u.Rollout; t != nil {
		fields = append(fields, [2]string{"Rollout", fmt.Sprintf("%s, %d of %d nodes, task %s", t.State, t.Done, t.Total, t.ID)})
	}
	return printFields(w, fields)
}

// joinRunning has an appliance that runs join, and waits until it is back.
func (e *env) joinRunning(cmd *cobra.Command, token string) error {
	return e.call("join", "", func(s *session) error {
		ctx, cancel := context.WithTimeout(cmd.Context(), joinCallTime)
		defer cancel()
		j, _, err := client.Post[v1.ClusterJoined](ctx, s.Client, v1.ClusterJoin{Token: token}, client.Change{}, "cluster", "join")
		if err != nil {
			return err
		}
		return e.show(j, func(w io.Writer) error {
			return printFields(w, [][2]string{{"Cluster", j.Cluster.String()}, {"Node", j.Node.String()}, {"Certificate", j.Fingerprint},
				{"Next", "it starts again by itself; " + server.TokenFile(e.data) + " is of no use any more"}})
		})
	})
}

// joinCallTime is longer than the appliance tries.
const joinCallTime = 90 * time.Second
