package cli

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"varve/appliance/doctor"
	"varve/appliance/firstboot"
	"varve/appliance/server"
	"varve/appliance/update"
	"varve/control/durable"
	"varve/control/state"
)

const (
	updateKeys    = "/etc/varve/update.pub"
	espGrubenv    = "/boot/efi/grub/grubenv"
	espDevice     = "/dev/disk/by-partlabel/varve-esp"
	slotDevices   = "/dev/disk/by-partlabel"
	healthTimeout = 5 * time.Minute
	healthSteady  = 30 * time.Second
)

// onSlots runs f with this machine's slots.
func (e *env) onSlots(what string, f func(update.Config) error) error {
	run := func() error {
		keys, err := update.ReadKeys(updateKeys)
		if err != nil {
			return err
		}
		c := update.Config{State: firstboot.SystemPaths(e.std.Getenv).State, Keys: keys, Version: e.std.Version, LevelMax: state.LevelMax, Level: state.LevelMin,
			Log: e.logger(slog.LevelInfo)}
		if e.data != "" {
			if c.Level, err = server.DataLevel(e.data); err != nil {
				return err
			}
		}
		return withGrub(func(g update.Grub) error { c.Slots = g; return f(c) })
	}
	err := run()
	if errors.Is(err, update.ErrRefused) {
		return &Failure{Exit: ExitConflict, What: what, Why: err.Error(), Err: err}
	}
	return e.failure(what, "", err)
}

// withGrub finds grub's environment, mounting its partition if it is not.
func withGrub(f func(update.Grub) error) (err error) {
	g := update.Grub{Env: espGrubenv, Devices: slotDevices, Cmdline: "/proc/cmdline"}
	if _, err := g.Running(); err != nil {
		return err
	}
	if _, err := os.Stat(g.Env); err == nil {
		return f(g)
	}
	dir, err := os.MkdirTemp("", "varve-esp-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(dir)) }()
	host := firstboot.System{}
	if err := host.Mount(espDevice, dir, "vfat", false); err != nil {
		return fmt.Errorf("mount %s: %w", espDevice, err)
	}
	defer func() { err = errors.Join(err, host.Unmount(dir)) }()
	g.Env = filepath.Join(dir, "grub", "grubenv")
	return f(g)
}

func reboot(ctx context.Context) error {
	if out, err := exec.CommandContext(ctx, "systemctl", "--no-block", "reboot").CombinedOutput(); err != nil {
		return fmt.Errorf("restart the machine: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

func (e *env) updateCommand() *cobra.Command {
	c := &cobra.Command{Use: "update", Short: "Updates of the appliance's system"}
	var restart bool
	apply := &cobra.Command{
		Use: "apply FILE", Short: "Write an update into the slot that does not run; the next start tries it", Args: exactly("FILE"),
		Long: `Write a signed bundle into the slot that does not run. The next start tries it: if it is healthy it stays, if it is not, or does not come
up three times, the system of before starts again by itself. varve update rollout does a whole cluster.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.onSlots("update", func(c update.Config) error {
				f, err := os.Open(args[0])
				if err != nil {
					return err
				}
				defer f.Close()
				m, err := c.Apply(cmd.Context(), f, nil)
				if err != nil {
					return err
				}
				if err := e.show(m, func(w io.Writer) error {
					_, err := fmt.Fprintf(w, "version %s is written; it is tried at the next start\n", m.Version)
					return err
				}); err != nil || !restart {
					return err
				}
				return reboot(cmd.Context())
			})
		},
	}
	apply.Flags().BoolVar(&restart, "restart", false, "restart the machine when it is written")
	c.AddCommand(apply, &cobra.Command{
		Use: "status", Short: "Show the slots and how the last update went", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return e.onSlots("update status", func(c update.Config) error {
				st, err := c.Status()
				if err != nil {
					return err
				}
				return e.show(st, func(w io.Writer) error { return printUpdate(w, st) })
			})
		},
	}, &cobra.Command{
		Use: "back", Short: "Have the previous system tried at the next start", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return e.onSlots("go back", func(c update.Config) error {
				sys, err := c.Back()
				if err != nil {
					return err
				}
				return e.show(sys, func(w io.Writer) error {
					_, err := fmt.Fprintf(w, "version %s is tried at the next start\n", sys.Version)
					return err
				})
			})
		},
	}, &cobra.Command{
		Use: "cancel", Short: "Forget an update that has been written and not been started", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return e.onSlots("cancel update", update.Config.Cancel) },
	}, &cobra.Command{
		Use: "confirm", Short: "Keep an update that is being tried if it is healthy, leave it if it is not; run at every start", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return e.updateConfirm(cmd) },
	}, &cobra.Command{
		Use: "agent", Short: "Do what the appliance's services ask for, as root", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if e.data == "" {
				return usage("give --data DIR")
			}
			return e.onSlots("update", func(c update.Config) error { return c.Serve(cmd.Context(), update.Dir(e.data), reboot) })
		},
	})
	c.AddCommand(e.rolloutCommands()...)
	c.AddCommand(e.packCommands()...)
	return c
}

func printUpdate(w io.Writer, st update.Status) error {
	fields := [][2]string{{"Running", fmt.Sprintf("slot %s, version %s", st.Running, st.Version)}}
	if other, ok := st.Slots[st.Running.Other()]; ok {
		fields = append(fields, [2]string{"Other slot", "version " + other.Version})
	} else {
		fields = append(fields, [2]string{"Other slot", "no complete system"})
	}
	if st.Trying != "" {
		fields = append(fields, [2]string{"Being tried", fmt.Sprintf("version %s, %d starts left", st.Trying, st.Boot.Tries)})
	}
	if st.Last != nil {
		how := "done"
		if !st.Last.Done {
			how = "went back: " + st.Last.Why
		}
		fields = append(fields, [2]string{"Last update", fmt.Sprintf("version %s at %s: %s", st.Last.Version, formatTime(st.Last.At), how)})
	}
	return printFields(w, fields)
}

// updateConfirm is the health gate. What is unhealthy restarts the machine, which then runs the system of before.
func (e *env) updateConfirm(cmd *cobra.Command) error {
	ctx := cmd.Context()
	return e.onSlots("confirm update", func(c update.Config) error {
		v, err := c.Confirm(ctx, func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, healthTimeout)
			defer cancel()
			return e.healthy(cmd, ctx)
		})
		if err != nil {
			return err
		}
		if e.data != "" {
			if _, err := os.Stat(e.data); err == nil {
				if err := c.Tell(update.Dir(e.data)); err != nil {
					c.Log.Warn("tell of the update", "err", err)
				}
			}
		}
		if v == update.Bad {
			return reboot(ctx)
		}
		return e.show(map[string]update.Verdict{"verdict": v}, func(w io.Writer) error { _, err := fmt.Fprintln(w, v); return err })
	})
}

// healthy waits until the appliance has served for half a minute, and its exports open and read.
func (e *env) healthy(cmd *cobra.Command, ctx context.Context) error {
	if e.data == "" {
		return usage("give --data DIR")
	}
	s, err := e.session()
	if err != nil {
		return err
	}
	defer s.Close()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	since := time.Time{}
	for since.IsZero() || time.Since(since) < healthSteady {
		call, cancel := context.WithTimeout(ctx, 5*time.Second)
		err = s.Ready(call)
		cancel()
		if err != nil {
			since = time.Time{}
		} else if since.IsZero() {
			since = time.Now()
		}
		select {
		case <-ctx.Done():
			if err == nil {
				err = ctx.Err()
			}
			return fmt.Errorf("the appliance did not become ready within %s: %w", healthTimeout, err)
		case <-tick.C:
		}
	}
	checks, err := e.runningChecks(cmd)
	if err != nil {
		return err
	}
	// By the appliance's sockets alone: the unit has no network. And a backend that is away is not the update's doing.
	checks = slices.DeleteFunc(checks, func(c doctor.Check) bool { return c.ID != "server.nbd" })
	for _, r := range doctor.Run(ctx, checks) {
		if r.Status == doctor.Fail {
			return fmt.Errorf("%s: %s", r.ID, r.Evidence)
		}
	}
	return nil
}

// packCommands are for whoever makes releases.
func (e *env) packCommands() []*cobra.Command {
	var m update.Manifest
	var root, out, built string
	var keyFiles []string
	pack := &cobra.Command{
		Use: "pack --root FILE --key FILE --version V --out FILE", Short: "Make a signed update bundle", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			var err error
			if built != "" {
				if m.Built, err = time.Parse(time.RFC3339, built); err != nil {
					return usage("--built: %v", err)
				}
			}
			m.LevelMin, m.LevelMax = state.LevelMin, state.LevelMax
			var signers []ed25519.PrivateKey
			for _, f := range keyFiles {
				text, err := readSecret(f)
				if err != nil {
					return e.failure("read key", f, err)
				}
				k, err := update.ParsePrivateKey(text)
				if err != nil {
					return e.failure("read key", f, err)
				}
				signers = append(signers, k)
			}
			system, err := os.Open(root)
			if err != nil {
				return e.failure("read system", root, err)
			}
			defer system.Close()
			f, err := os.OpenFile(out, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
			if err != nil {
				return e.failure("make bundle", out, err)
			}
			done, err := update.Pack(f, m, system, signers...)
			if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
				return e.failure("make bundle", out, err)
			}
			return e.show(done, func(w io.Writer) error { _, err := fmt.Fprintf(w, "%s: version %s\n", out, done.Version); return err })
		},
	}
	s := pack.Flags()
	s.StringVar(&root, "root", "", "`FILE` with the system, as it goes into a slot")
	s.StringVar(&out, "out", "", "`FILE` to write")
	s.StringVar(&m.Version, "version", "", "`VERSION` of the system")
	s.StringVar(&built, "built", "", "`TIME` of the build, RFC 3339; none for bytes that depend on the input alone")
	s.IntVar(&m.Floor, "floor", 0, "appliances that ran this do not go below `N` again")
	s.StringSliceVar(&keyFiles, "key", nil, "`FILE` with a signing key; repeatable")
	for _, f := range []string{"root", "out", "version", "key"} {
		must(pack.MarkFlagRequired(f))
	}
	key := &cobra.Command{
		Use: "key FILE", Short: "Make a signing key: the private part into FILE, the public one into FILE.pub", Args: exactly("FILE"),
		RunE: func(_ *cobra.Command, args []string) error {
			if _, err := os.Stat(args[0]); err == nil {
				return e.failure("make key", args[0], fs.ErrExist)
			}
			private, public, err := update.NewKey()
			if err == nil {
				err = durable.Replace(filepath.Dir(args[0]), filepath.Base(args[0]), []byte(private+"\n"), 0o600)
			}
			if err == nil {
				err = durable.Replace(filepath.Dir(args[0]), filepath.Base(args[0])+".pub", []byte(public+"\n"), 0o644)
			}
			if err != nil {
				return e.failure("make key", args[0], err)
			}
			return e.show(map[string]string{"public": public}, func(w io.Writer) error { _, err := fmt.Fprintln(w, public); return err })
		},
	}
	verify := &cobra.Command{
		Use: "verify FILE", Short: "Check a bundle's signature and contents against the keys of a list", Args: exactly("FILE"),
	}
	keyList := verify.Flags().String("keys", updateKeys, "`FILE` with trusted public keys")
	verify.RunE = func(_ *cobra.Command, args []string) error {
		text, err := os.ReadFile(*keyList)
		if err != nil {
			return e.failure("read keys", *keyList, err)
		}
		keys, err := update.ParseKeys(string(text))
		if err != nil {
			return e.failure("read keys", *keyList, err)
		}
		f, err := os.Open(args[0])
		if err != nil {
			return e.failure("open bundle", args[0], err)
		}
		defer f.Close()
		m, r, err := update.OpenBundle(f, keys)
		if err == nil {
			_, err = io.Copy(io.Discard, r)
		}
		if err == nil {
			err = r.Whole()
		}
		if err != nil {
			return e.failure("verify", args[0], err)
		}
		return e.show(m, func(w io.Writer) error { _, err := fmt.Fprintf(w, "version %s, intact\n", m.Version); return err })
	}
	return []*cobra.Command{pack, key, verify}
}
