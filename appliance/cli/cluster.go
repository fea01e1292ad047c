package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"varve/appliance/server"
	v1 "varve/control/api/customer"
	"varve/control/raft"
	"varve/control/replica"
	"varve/control/state"
	"varve/control/wire"
)

// local calls the appliance's control socket, which is for whoever may open the file.
type local struct {
	client *http.Client
}

// onNode runs f against the control socket of --data.
func (e *env) onNode(cmd *cobra.Command, what, object string, f func(context.Context, local) error) error {
	if e.data == "" || e.at != "" {
		return usage("the cluster is administered on one of its appliances: give --data DIR")
	}
	l := local{client: replica.NewHTTP(server.ControlSocket(e.data))}
	defer l.client.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(cmd.Context(), e.timeout)
	defer cancel()
	err := f(ctx, l)
	if errors.Is(err, raft.ErrUnavailable) {
		return &Failure{Exit: ExitUnavailable, What: what, Object: object, Why: reason(err),
			Remedy: "see that the appliance on " + e.data + " runs, and that a majority of the masters does", Err: err}
	}
	return e.failure(what, object, err)
}

func (l local) call(ctx context.Context, name string, body, answer any) error {
	var b []byte
	if body != nil {
		var err error
		if b, err = json.Marshal(body); err != nil {
			return fmt.Errorf("encode %s: %w", name, err)
		}
	}
	return wire.Call(ctx, l.client, name, b, answer)
}

// commit has a command done.
func (l local) commit(ctx context.Context, cmd state.Command) error {
	entry, err := state.Encode(cmd, uuid.New(), state.Time(time.Now().UnixNano()))
	if err != nil {
		return err
	}
	var o wire.Outcome
	if err := wire.Call(ctx, l.client, "propose", entry, &o); err != nil {
		return err
	}
	return o.Unpack().Refusal
}

func (l local) status(ctx context.Context) (server.ClusterStatus, error) {
	var s server.ClusterStatus
	err := l.call(ctx, "status", nil, &s)
	return s, err
}

// node finds one by name or id.
func (l local) node(ctx context.Context, name string) (server.NodeStatus, error) {
	s, err := l.status(ctx)
	if err != nil {
		return server.NodeStatus{}, err
	}
	for _, n := range s.Nodes {
		if n.Name == name || n.ID.String() == name {
			return n, nil
		}
	}
	return server.NodeStatus{}, &state.Error{Err: state.ErrNotFound, Object: "node " + name, Remedy: "see the names: varve node list"}
}

func (e *env) clusterCommand() *cobra.Command {
	c := &cobra.Command{Use: "cluster", Short: "The cluster of appliances: status, join tokens, join, leave"}
	c.AddCommand(e.clusterInitCommand(), e.clusterStatusCommand(), e.clusterTokenCommand(), e.clusterJoinCommand(), e.clusterLeaveCommand())
	return c
}

func (e *env) clusterInitCommand() *cobra.Command {
	return &cobra.Command{
		Use: "init", Short: "Make a cluster of one in an empty data directory", Args: cobra.NoArgs,
		Long: `Make a cluster of one in an empty data directory: ids, certificate authority, state. varve serve does so by itself. It is an error
if the directory holds a node already.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if e.data == "" {
				return usage("give --data DIR")
			}
			log := e.logger(slog.LevelError)
			st, err := server.InitCluster(cmd.Context(), server.Config{Data: e.data, Log: log})
			if err != nil {
				return e.startFailure("make cluster", err)
			}
			return e.show(st, func(w io.Writer) error {
				return printFields(w, [][2]string{{"Cluster", st.Cluster.String()}, {"Node", st.Self.String()}})
			})
		},
	}
}

func (e *env) clusterStatusCommand() *cobra.Command {
	return e.overNetwork(&cobra.Command{
		Use: "status", Short: "Say how the nodes are, as this one sees them", Args: cobra.NoArgs,
		Long: "Say how the nodes are, as this one sees them. It needs no majority. Exit code 1 if something is wrong.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return e.onNode(cmd, "cluster status", "", func(ctx context.Context, l local) error {
				s, err := l.status(ctx)
				if err != nil {
					return err
				}
				err = e.show(s, func(w io.Writer) error { return printCluster(w, s) })
				if err == nil && len(s.Problems) > 0 {
					return &silent{ExitFailed}
				}
				return err
			})
		},
	}, verb{use: "status", short: "Say how the nodes are, as the one at --at sees them", method: http.MethodGet, path: fixed("cluster")})
}

func printCluster(w io.Writer, s server.ClusterStatus) error {
	if err := printFields(w, [][2]string{{"Cluster", s.Cluster.String()}, {"Voters", fmt.Sprint(s.Voters)}}); err != nil {
		return err
	}
	var rows [][]string
	for _, n := range s.Nodes {
		rows = append(rows, nodeRow(n))
	}
	if err := printTable(w, nodeHeader, rows); err != nil {
		return err
	}
	for _, p := range s.Problems {
		if _, err := fmt.Fprintln(w, "Problem:", p); err != nil {
			return err
		}
	}
	return nil
}

var nodeHeader = []string{"Name", "Role", "Control", "State", "Behind", "Node port", "Certificate until", "ID"}

func nodeRow(n server.NodeStatus) []string {
	control := "follows"
	switch {
	case n.Leader:
		control = "leads"
	case n.Voter:
		control = "votes"
	}
	st := "online"
	switch {
	case n.Offline && n.Reachable:
		st = "online, marked offline"
	case n.Offline:
		st = "marked offline"
	case !n.Reachable:
		st = "no answer"
	}
	return []string{n.Name, n.Role, control, st, fmt.Sprint(n.Lag), dash(n.Peer), formatTime(n.Expires), n.ID.String()}
}

func (e *env) clusterTokenCommand() *cobra.Command {
	token := &cobra.Command{Use: "token", Short: "Tokens that let appliances join"}
	var role string
	var ttl time.Duration
	create := &cobra.Command{
		Use: "create", Short: "Make a token that lets one appliance join", Args: cobra.NoArgs,
		Long: `Make a token that lets one appliance join with a role. It works once, until it expires, and is shown once: the cluster keeps only
its hash. On the other appliance, before it holds anything:

  varve --data DIR cluster join TOKEN`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return e.onNode(cmd, "make join token", "", func(ctx context.Context, l local) error {
				var a server.TokenAnswer
				if err := l.call(ctx, "token", server.TokenRequest{Role: role, TTL: ttl}, &a); err != nil {
					return err
				}
				return e.show(a, func(w io.Writer) error { _, err := fmt.Fprintln(w, a.Token); return err })
			})
		},
	}
	create.Flags().StringVar(&role, "role", state.RoleMaster, "master, which votes when it has a place, or extra")
	create.Flags().DurationVar(&ttl, "ttl", time.Hour, "how long it may be used, at most 24h")
	token.AddCommand(e.overNetwork(create, verb{use: create.Use, short: create.Short, method: http.MethodPost, path: func([]string) []string { return []string{"cluster", "tokens"} },
		body: func([]string) (any, error) { return v1.JoinTokenCreate{Role: role, TTL: int(ttl / time.Second)}, nil },
		table: func(w io.Writer, raw json.RawMessage) error {
			var t v1.JoinToken
			if err := json.Unmarshal(raw, &t); err != nil {
				return err
			}
			_, err := fmt.Fprintln(w, t.Token)
			return err
		}}))
	return token
}

func (e *env) clusterJoinCommand() *cobra.Command {
	var node string
	c := &cobra.Command{
		Use: "join TOKEN|-", Short: "Make this appliance a node of a cluster", Args: cobra.ExactArgs(1),
		Long: `Make the appliance with --data DIR, or at --at URL, a node of the cluster that made the token. It must be empty or hold a cluster of
one without a file; that one is put aside. "-" reads the token from standard input. An appliance that runs starts again by itself;
start the others with varve serve.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if e.data == "" && e.at == "" {
				return usage("give --data DIR, or --at URL, of the appliance that joins")
			}
			token := args[0]
			if token == "-" {
				b, err := io.ReadAll(io.LimitReader(os.Stdin, 8<<10))
				if err != nil {
					return e.failure("read token", "", err)
				}
				token = strings.TrimSpace(string(bytes.TrimSpace(b)))
			}
			if e.at != "" {
				return e.joinRunning(cmd, token)
			}
			j, err := server.Join(cmd.Context(), server.Config{Data: e.data, Log: e.logger(slog.LevelError)}, server.JoinOptions{Token: token, Node: node})
			if _, runs := errors.AsType[*server.LockedError](err); runs {
				return e.joinRunning(cmd, token)
			}
			if ne, ok := errors.AsType[*server.NotEmptyError](err); ok {
				return &Failure{Exit: ExitConflict, What: "join", Object: ne.Data, Why: "it holds " + ne.What,
					Remedy: "join with an empty --data directory", Err: err}
			}
			if err != nil {
				return e.startFailure("join", err)
			}
			return e.show(j, func(w io.Writer) error {
				return printFields(w, [][2]string{{"Cluster", j.Cluster.String()}, {"Node", j.Node.String()},
					{"Next", "varve serve --data " + e.data}})
			})
		},
	}
	c.Flags().StringVar(&node, "node", "", "`HOST:PORT` of this appliance's node port, if the cluster is to know it before the first start")
	return c
}

func (e *env) clusterLeaveCommand() *cobra.Command {
	var force bool
	c := &cobra.Command{
		Use: "leave", Short: "Take this appliance out of its cluster", Args: cobra.NoArgs,
		Long: "Take this appliance out of its cluster; it stops. With --force also if it owns vPools or volumes, which are then given up.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return e.onNode(cmd, "leave", "", func(ctx context.Context, l local) error {
				s, err := l.status(ctx)
				if err != nil {
					return err
				}
				return l.commit(ctx, &state.RemoveNode{ID: s.Self, Force: force})
			})
		},
	}
	c.Flags().BoolVar(&force, "force", false, "give up what it owns")
	return c
}

func nodePath(args []string) []string { return []string{"nodes", args[0]} }

// nodeVerbs are those of `varve node` that change the cluster.
func (e *env) nodeVerbs() []*cobra.Command {
	master, extra, yes, no := state.RoleMaster, state.RoleExtra, true, false
	set := func(use, short string, change state.SetNode) *cobra.Command {
		patch := v1.NodePatch{Offline: change.Offline}
		if change.Role != nil {
			patch.Role = *change.Role
		}
		return e.overNetwork(&cobra.Command{Use: use + " NAME", Short: short, Args: cobra.ExactArgs(1),
			RunE: func(cmd *cobra.Command, args []string) error {
				return e.onNode(cmd, use+" node", args[0], func(ctx context.Context, l local) error {
					n, err := l.node(ctx, args[0])
					if err != nil {
						return err
					}
					c := change
					c.ID = n.ID
					return l.commit(ctx, &c)
				})
			}}, verb{use: use + " NAME", short: short, args: []string{"NAME"}, method: http.MethodPatch, path: nodePath,
			body: func([]string) (any, error) { return patch, nil }})
	}
	var force bool
	remove := &cobra.Command{Use: "remove NAME", Short: "Take a node out of the cluster for ever", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.onNode(cmd, "remove node", args[0], func(ctx context.Context, l local) error {
				n, err := l.node(ctx, args[0])
				if err != nil {
					return err
				}
				return l.commit(ctx, &state.RemoveNode{ID: n.ID, Rev: n.Rev, Force: force})
			})
		}}
	remove.Flags().BoolVar(&force, "force", false, "give up the vPools and volumes that it owns")
	remove = e.overNetwork(remove, verb{use: remove.Use, short: remove.Short, args: []string{"NAME"}, method: http.MethodDelete, path: nodePath,
		query: func() map[string]string { return map[string]string{"force": fmt.Sprint(force)} }, confirm: func(args []string) string { return args[0] }})
	show := &cobra.Command{Use: "show NAME", Short: "Show a node", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.onNode(cmd, "show node", args[0], func(ctx context.Context, l local) error {
				n, err := l.node(ctx, args[0])
				if err != nil {
					return err
				}
				return e.show(n, func(w io.Writer) error {
					var fields [][2]string
					for i, v := range nodeRow(n) {
						fields = append(fields, [2]string{nodeHeader[i], v})
					}
					fields = append(fields, [2]string{"NBD", dash(n.NBD)}, [2]string{"NFS", dash(n.NFS)}, [2]string{"HTTPS", dash(n.HTTPS)},
						[2]string{"Version", n.Version}, [2]string{"Joined", formatTime(time.Unix(0, int64(n.Joined)))},
						[2]string{"Error", dash(n.Error)})
					return printFields(w, fields)
				})
			})
		}}
	return []*cobra.Command{show, remove,
		set("promote", "Make a node a master, which votes when it has a place", state.SetNode{Role: &master}),
		set("demote", "Make a node an extra, which does not vote", state.SetNode{Role: &extra}),
		set("offline", "Say that a node is not expected; a spare master takes its vote", state.SetNode{Offline: &yes}),
		set("online", "Say that a node is expected again", state.SetNode{Offline: &no}),
	}
}
