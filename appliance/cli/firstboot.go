package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"varve/appliance/firstboot"
	"varve/appliance/server"
	"varve/control/api/client"
	v1 "varve/control/api/customer"
	"varve/control/cluster"
	"varve/control/state"
)

// bootConfig is first boot on this machine.
func (e *env) bootConfig() firstboot.Config {
	return firstboot.Config{Paths: firstboot.SystemPaths(e.std.Getenv), Host: firstboot.System{}, Log: e.logger(slog.LevelInfo)}
}

func (e *env) firstbootCommand() *cobra.Command {
	c := &cobra.Command{
		Use: "firstboot", Short: "Set this appliance up from what the hypervisor gives: host name, network, time", Args: cobra.NoArgs,
		Long: `Set this appliance up from what the hypervisor gives, at every boot, before the network: OVF properties, guestinfo, a NoCloud seed,
systemd credentials, fw_cfg. What was set on the appliance's screen counts more. Without any setting addresses come by DHCP.

This and what is below it are for the appliance's image, whose units run them as root.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := firstboot.Boot(cmd.Context(), e.bootConfig())
			if err != nil {
				return e.failure("first boot", "", err)
			}
			return e.show(r, func(w io.Writer) error { return printBoot(w, r) })
		},
	}
	c.AddCommand(&cobra.Command{
		Use: "show", Short: "Show the settings in force and where each comes from", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			r, err := firstboot.LastReport(firstboot.SystemPaths(e.std.Getenv))
			if err != nil {
				return e.failure("read first boot's report", "", err)
			}
			return e.show(r, func(w io.Writer) error { return printBoot(w, r) })
		},
	}, &cobra.Command{
		Use: "set KEY=VALUE…", Short: "Set settings of this machine, against every source; KEY= leaves one to the sources again", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			values := make(map[string]string)
			for _, a := range args {
				k, v, ok := strings.Cut(a, "=")
				if !ok {
					return usage("%q is not KEY=VALUE", a)
				}
				values[k] = v
			}
			s, err := firstboot.Change(cmd.Context(), e.bootConfig(), values)
			if bad, ok := errors.AsType[*firstboot.InvalidError](err); ok {
				return usage("%v", bad)
			}
			if err != nil {
				return e.failure("set", "", err)
			}
			return e.show(s, func(w io.Writer) error { return printSettings(w, s) })
		},
	}, &cobra.Command{
		Use: "data", Short: "Wait until there is a data disk; an empty one is formatted if it is the only one", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := firstboot.WaitForData(cmd.Context(), e.bootConfig())
			if err != nil {
				return e.failure("data disk", r.Device, err)
			}
			return e.show(r, func(w io.Writer) error { _, err := fmt.Fprintln(w, r.Device); return err })
		},
	}, &cobra.Command{
		Use: "disk DEVICE", Short: "Choose the data disk where there is more than one to choose from", Args: exactly("DEVICE"),
		Long: "Choose the data disk. One that is empty is formatted; one with anything on it but an appliance's data is refused.",
		RunE: func(_ *cobra.Command, args []string) error {
			return e.failure("choose disk", args[0], firstboot.Choose(firstboot.SystemPaths(e.std.Getenv), args[0]))
		},
	}, &cobra.Command{
		Use: "join", Short: "Join the cluster of the token that came with the settings", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return e.bootJoin(cmd.Context()) },
	}, &cobra.Command{
		Use: "claim", Short: "Make the first administrator with the password that came with the settings", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return e.bootClaim(cmd) },
	})
	return c
}

func printBoot(w io.Writer, r firstboot.Report) error {
	if err := printSettings(w, r.Settings); err != nil {
		return err
	}
	for _, p := range r.Problems {
		if _, err := fmt.Fprintln(w, "Problem:", p); err != nil {
			return err
		}
	}
	return nil
}

func printSettings(w io.Writer, s firstboot.Settings) error {
	var rows [][]string
	for _, k := range slices.Sorted(maps.Keys(s)) {
		rows = append(rows, []string{k, strings.ReplaceAll(s[k].Text, "\n", " | "), s[k].Source})
	}
	return printTable(w, []string{"Setting", "Value", "From"}, rows)
}

// joinEvery is the pause between two attempts to join, of which each takes up to cluster.JoinTimeout.
const joinEvery = 5 * time.Second

// bootJoin joins, however long the cluster cannot be reached: control starts after it, and an appliance that was told to join does not become a
// cluster of its own instead. A token that cannot work any more is forgotten, so that the appliance starts; the screen takes another.
func (e *env) bootJoin(ctx context.Context) error {
	paths := firstboot.SystemPaths(e.std.Getenv)
	token, err := firstboot.Pending(paths, firstboot.JoinToken)
	if err != nil || token == "" {
		return e.failure("read join token", "", err)
	}
	if e.data == "" {
		return usage("give --data DIR")
	}
	log := e.logger(slog.LevelInfo)
	if err := firstboot.Joining(paths, "the cluster is asked"); err != nil {
		return e.failure("tell of the join", "", err)
	}
	var j cluster.Joined
	var full, hopeless bool
	for {
		j, err = server.Join(ctx, server.Config{Data: e.data, Log: log}, server.JoinOptions{Token: token})
		_, full = errors.AsType[*server.NotEmptyError](err)
		hopeless = full || errors.Is(err, state.ErrInvalid) || errors.Is(err, state.ErrNotFound) || errors.Is(err, state.ErrConflict)
		if err == nil || hopeless || ctx.Err() != nil {
			break
		}
		log.Warn("the cluster cannot be joined yet, it is asked again", "err", err)
		if err := firstboot.Joining(paths, err.Error()); err != nil {
			return e.failure("tell of the join", "", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(joinEvery):
		}
	}
	if err := firstboot.Joining(paths, ""); err != nil {
		log.Warn("tell of the join", "err", err)
	}
	if err == nil || hopeless {
		if e2 := firstboot.Used(paths, firstboot.JoinToken); e2 != nil {
			return e.failure("forget join token", "", e2)
		}
	}
	if full {
		return &Failure{Exit: ExitConflict, What: "join", Object: e.data, Why: "this appliance holds data of its own",
			Remedy: "deploy another appliance, or reset this one on its screen", Err: err}
	}
	if err != nil {
		return e.startFailure("join", err)
	}
	return e.show(j, func(w io.Writer) error { _, err := fmt.Fprintln(w, "joined cluster", j.Cluster); return err })
}

const (
	firstAdmin = "admin"
	claimWait  = 5 * time.Minute
)

// bootClaim makes the administrator, if there is no user yet, and forgets the password.
func (e *env) bootClaim(cmd *cobra.Command) error {
	paths := firstboot.SystemPaths(e.std.Getenv)
	password, err := firstboot.Pending(paths, firstboot.AdminPassword)
	if err != nil || password == "" {
		return e.failure("read password", "", err)
	}
	return e.call("make administrator", firstAdmin, func(s *session) error {
		ctx, cancel := context.WithTimeout(cmd.Context(), claimWait)
		defer cancel()
		if err := untilReady(ctx, s); err != nil {
			return err
		}
		users, err := client.List[v1.User](ctx, s.Client, client.Select{}, "users")
		if err != nil {
			return err
		}
		if len(users) == 0 {
			in := v1.UserCreate{Name: firstAdmin, Password: password, Roles: []string{state.RoleAdmin}}
			_, _, err := client.Post[v1.User](ctx, s.Client, in, client.Change{}, "users")
			if p, ok := errors.AsType[*v1.Problem](err); ok && p.Status < 500 {
				// A password that the policy refuses will not get better: the set-up code on the screen is the way on.
				return errors.Join(err, firstboot.Used(paths, firstboot.AdminPassword))
			}
			if err != nil {
				return err
			}
		}
		return firstboot.Used(paths, firstboot.AdminPassword)
	})
}

// untilReady waits for the appliance on this machine.
func untilReady(ctx context.Context, s *session) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		call, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := s.Ready(call)
		cancel()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-tick.C:
		}
	}
}
