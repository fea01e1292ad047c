package cli

import (
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/spf13/cobra"

	"varve/appliance/server"
	"varve/control/bytesize"
)

func (e *env) rebuildCommand() *cobra.Command {
	var f serveFlags
	var opt server.RebuildOptions
	c := &cobra.Command{
		Use: "rebuild --data DIR [--pool NAME [--backend local:///DIR|s3://…]]", Short: "Make volumes again from their backend alone", Args: cobra.NoArgs,
		Long: `Make the volumes of a vPool again from what is on its backend: after the log disk or the block map is lost, or in a fresh DIR with
nothing but the backend's directory. The appliance must be stopped. Each volume comes back as an exact prefix of its writes;
which one, and how much was lost after it if that is known, is printed. Then start the appliance with varve serve.

  varve rebuild --data /var/lib/varve                                   every vPool that this appliance knows
  varve rebuild --data /var/lib/new --pool default --backend local:///srv/old/backend/default
  varve rebuild --data /var/lib/new --pool cloud --backend 's3://bucket/prefix?endpoint=https://s3.example.com'

Exit code 1 if a volume could not be rebuilt; the others are.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := e.serverConfig(cmd, &f)
			if err != nil {
				return err
			}
			cfg.Log = e.logger(slog.LevelWarn)
			cfg.ControlLog = e.logger(slog.LevelError) // raft warns of the election that every start has
			volumes, err := server.Rebuild(cmd.Context(), cfg, opt)
			if err != nil && len(volumes) == 0 {
				return e.startFailure("rebuild", err)
			}
			if e := e.show(notNil(volumes), func(w io.Writer) error { return printRebuilt(w, volumes) }); e != nil {
				return e
			}
			if err != nil {
				return e.startFailure("rebuild", err)
			}
			for _, v := range volumes {
				if v.State == server.StateFailed {
					return &silent{ExitFailed}
				}
			}
			return nil
		},
	}
	s := c.Flags()
	s.StringVar(&opt.Pool, "pool", "", "`NAME` of the vPool (default: all that this appliance knows)")
	s.StringVar(&opt.Backend, "backend", "", "where its objects are, for a vPool that this appliance does not know")
	f.bucket.add(s)
	s.StringVar(&f.logSize, "log-size", "", "`SIZE` of the write log")
	s.StringVar(&f.mapSize, "map-size", "", "memory `SIZE` for the block map")
	return c
}

func printRebuilt(w io.Writer, volumes []server.RebuiltVolume) error {
	var rows [][]string
	for _, v := range volumes {
		written, lost := "-", "not known"
		if v.Written != nil {
			written = formatTime(*v.Written)
		}
		if v.LostRecords != nil && *v.LostRecords == 0 {
			lost = "none, as of " + formatTime(*v.NotedAt)
		} else if v.LostRecords != nil {
			lost = fmt.Sprintf("%d writes", *v.LostRecords)
			if v.Written != nil {
				lost += fmt.Sprintf(" in %s", v.NotedAt.Sub(*v.Written).Round(time.Second))
			}
		}
		switch v.State {
		case server.StateFailed:
			lost = v.Error
		case server.StateKept:
			lost = "nothing: its log and map are here"
		case server.StateEmpty:
			lost = "everything: nothing of it had reached the backend"
		}
		rows = append(rows, []string{v.VPool + v.Path, v.State, bytesize.Format(v.Size), bytesize.Format(v.Used), fmt.Sprint(v.Seq), written,
			fmt.Sprint(v.Objects), lost})
	}
	return printTable(w, []string{"Volume", "State", "Size", "Used", "Prefix up to", "Written", "Objects", "Lost after it"}, rows)
}
