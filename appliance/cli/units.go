package cli

import (
	"log/slog"

	"github.com/spf13/cobra"

	"varve/appliance/server"
)

func (e *env) gatewayCommand() *cobra.Command {
	c := e.serveUnit(server.UnitGateway)
	c.Use, c.Short = "gateway --data DIR", "Run the data path of an appliance, beside varve control"
	c.Long = `Run the data path of the appliance on DIR. Its control unit is another process on the same DIR, varve control: that one can be
restarted while guests read and write; what changes names waits for it, for 20 seconds at most. The flags are those of varve serve; those
of the API and of the node port are the control unit's.`
	return c
}

func (e *env) controlCommand() *cobra.Command {
	var f serveFlags
	c := &cobra.Command{
		Use: "control --data DIR", Short: "Run the control unit of an appliance, beside varve gateway", Args: cobra.NoArgs,
		Long: `Run the control unit of the appliance on DIR: the cluster's state, the node port, the API and the console, the task queue, schedules
and events. varve gateway on the same DIR does the rest. varve serve is both in one process.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := e.serverConfig(cmd, &f)
			if err != nil {
				return err
			}
			var level slog.Level
			if err := level.UnmarshalText([]byte(f.logLevel)); err != nil {
				return usage("--log-level %q is none of debug, info, warn, error", f.logLevel)
			}
			cfg.Log, cfg.Node, cfg.HTTPS, cfg.Unit = e.logger(level), f.node, f.https, server.UnitControl
			if err := cfg.Check(); err != nil {
				return e.startFailure("control", err)
			}
			log, done := e.keepRecords(cfg.Log, cfg.Data, server.UnitControl)
			defer done()
			cfg.Log = log
			return e.startFailure("control", e.again(func() error {
				return server.Control(cmd.Context(), cfg, func(s server.Summary) { e.printSummary(s) })
			}))
		},
	}
	s := c.Flags()
	s.StringVar(&f.https, "https", ":8443", "`ADDR` for the API and the console, or off")
	s.StringVar(&f.node, "node", "", "`ADDR` for the other nodes of the cluster, or off (default: :7443 if it is free)")
	s.StringVar(&f.updateKeys, "update-keys", updateKeys, "`FILE` with the public keys that an update has to be signed by")
	s.StringVar(&f.logLevel, "log-level", "info", "debug, info, warn or error")
	return c
}
