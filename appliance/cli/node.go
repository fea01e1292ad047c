package cli

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
)

func (e *env) nodeCommand() *cobra.Command {
	c := &cobra.Command{Use: "node", Short: "The appliances of the cluster"}
	c.AddCommand(e.nodeVerbs()...)
	c.AddCommand(&cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the nodes", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return e.call("list nodes", "", func(s *session) error {
				nodes, err := s.Nodes(s.ctx(cmd))
				if err != nil {
					return err
				}
				return e.show(notNil(nodes), func(w io.Writer) error {
					var rows [][]string
					for _, n := range nodes {
						rows = append(rows, []string{n.Name, n.ID.String(), n.Role, dash(n.NBD), dash(n.NFS), dash(n.HTTPS), n.Version, formatTime(n.Seen)})
					}
					return printTable(w, []string{"Name", "ID", "Role", "NBD", "NFS", "HTTPS", "Version", "Started"}, rows)
				})
			})
		},
	})
	return c
}

func (e *env) statusCommand() *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Say how the appliance is", Args: cobra.NoArgs,
		Long: "Say how the appliance is. Exit code 1 if it is degraded, 6 if it does not answer.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return e.call("status", "", func(s *session) error {
				st, err := s.Status(s.ctx(cmd))
				if err != nil {
					return err
				}
				err = e.show(st, func(w io.Writer) error {
					fields := [][2]string{
						{"State", st.State}, {"Node", st.Node + " (" + st.NodeID.String() + ")"}, {"Cluster", st.Cluster.String()},
						{"Version", st.Version}, {"Started", formatTime(st.Started)}, {"Ready", fmt.Sprint(st.Ready)},
						{"vPools", fmt.Sprint(st.VPools)}, {"vDisks", fmt.Sprint(st.VDisks)}, {"Files", fmt.Sprint(st.Files)},
						{"Write log", fmt.Sprintf("%s of %s in use, %s not on a backend yet", size(st.Log.Used), size(st.Log.Capacity), size(st.Log.Pending))},
					}
					for _, v := range st.Services {
						fields = append(fields, [2]string{strings.ToUpper(v.Name), fmt.Sprintf("%s, %d connections", v.Address, v.Connections)})
					}
					for _, p := range st.Problems {
						fields = append(fields, [2]string{"Problem", p})
					}
					return printFields(w, fields)
				})
				if err == nil && st.State != "ok" {
					return &silent{ExitFailed}
				}
				return err
			})
		},
	}
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
