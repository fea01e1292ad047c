package cli

import (
	"fmt"
	"io"
	"net"
	"strings"

	"github.com/spf13/cobra"

	"varve/appliance/monitoring"
)

// monitoringCommand prints what Prometheus and Grafana need.
func (e *env) monitoringCommand() *cobra.Command {
	text := func(use, short, content string) *cobra.Command {
		return &cobra.Command{Use: use, Short: short, Args: cobra.NoArgs, RunE: func(*cobra.Command, []string) error {
			_, err := io.WriteString(e.std.Out, content)
			return err
		}}
	}
	return group("monitoring", "What Prometheus and Grafana need to watch the cluster",
		text("rules", "Print alert and recording rules for Prometheus", monitoring.Rules),
		text("dashboard", "Print a dashboard for Grafana to import", monitoring.Dashboard),
		&cobra.Command{Use: "scrape", Short: "Print the scrape configuration of this cluster for Prometheus", Args: cobra.NoArgs,
			Long: `Print the scrape configuration of this cluster for Prometheus, to be put under scrape_configs. Make the token that it names first:

  varve token create prometheus --role viewer --ttl 8760h`,
			RunE: func(cmd *cobra.Command, _ []string) error {
				return e.call("list nodes", "", func(s *session) error {
					nodes, err := s.Nodes(s.ctx(cmd))
					if err != nil {
						return err
					}
					var targets []string
					for _, n := range nodes {
						if _, _, err := net.SplitHostPort(n.HTTPS); err == nil {
							targets = append(targets, fmt.Sprintf("%q", n.HTTPS))
						}
					}
					_, err = fmt.Fprintf(e.std.Out, `- job_name: varve
  scheme: https
  scrape_interval: 30s
  authorization: {credentials_file: /etc/prometheus/varve.token}
  tls_config: {ca_file: /etc/prometheus/varve-ca.crt}   # DATA/tls/ca.crt of any appliance
  static_configs:
    - targets: [%s]
`, strings.Join(targets, ", "))
					return err
				})
			}})
}
