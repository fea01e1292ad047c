package cli

import (
	"fmt"
	"io"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"varve/appliance/firstboot"
	"varve/appliance/screen"
	"varve/appliance/server"
)

func (e *env) screenCommand() *cobra.Command {
	var tty string
	c := &cobra.Command{
		Use: "screen", Short: "Show the appliance's own screen: how it is, where its console is, network, doctor, logs", Args: cobra.NoArgs,
		Long: "Show the appliance's own screen on this terminal, or on --tty. The appliance's image runs it on the VGA and the serial console.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if e.data == "" {
				return usage("give --data DIR")
			}
			in, out := e.std.In, e.std.Out
			if tty != "" {
				f, err := os.OpenFile(tty, os.O_RDWR, 0)
				if err != nil {
					return e.failure("open terminal", tty, err)
				}
				defer f.Close()
				in, out = f, f
			}
			self, err := os.Executable()
			if err != nil {
				return e.failure("find this program", "", err)
			}
			// Nothing but the screen goes to the terminal.
			m, err := screen.NewSystem(cmd.Context(), screen.Config{Paths: firstboot.SystemPaths(e.std.Getenv), Host: firstboot.System{}, Data: e.data,
				Socket: server.APISocket(e.data), Version: e.std.Version, Self: self, Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
			if err != nil {
				return e.failure("take a network change back", "", err)
			}
			term := e.std.Getenv("TERM")
			if term == "" {
				term = "linux"
			}
			if err := screen.Run(cmd.Context(), m, in, out, []string{"TERM=" + term}); err != nil {
				return e.failure("screen", "", fmt.Errorf("terminal: %w", err))
			}
			return nil
		},
	}
	c.Flags().StringVar(&tty, "tty", "", "`DEVICE` to show it on")
	return c
}
