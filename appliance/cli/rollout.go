package cli

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/google/uuid"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"varve/appliance/update"
	"varve/control/durable"
	"varve/control/rollout"
	"varve/control/state"
)

// rolloutCommands update the whole cluster.
func (e *env) rolloutCommands() []*cobra.Command {
	var finalise bool
	var keyList string
	c := &cobra.Command{
		Use: "rollout FILE", Short: "Update all appliances of the cluster, one after the other", Args: exactly("FILE"),
		Long: `Update all appliances of the cluster with a signed bundle, one after the other. Each fetches it from this one, writes it into the slot
that does not run, restarts and proves itself before the next one begins; where one does not, the rollout ends and that one runs
what it ran before. A node's guests wait while it restarts. varve task watch ID follows it; a rollout that failed goes on with
varve task retry ID.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if e.data == "" {
				return usage("give --data DIR")
			}
			keys, err := trustedKeys(keyList)
			if err != nil {
				return e.failure("read keys", keyList, err)
			}
			a, err := e.takeBundle(args[0], keys)
			if err != nil {
				return e.failure("update", args[0], err)
			}
			a.Finalise = finalise
			return e.onNode(cmd, "update", a.Version, func(ctx context.Context, l local) error {
				st, err := l.status(ctx)
				if err != nil {
					return err
				}
				a.Source = st.Self
				spec, err := rollout.New(rollout.Config{}).Spec(a, "local")
				if err != nil {
					return err
				}
				id := uuid.New()
				if err := l.commit(ctx, &state.SubmitTask{ID: id, Spec: spec}); err != nil {
					return err
				}
				return e.show(map[string]string{"task": id.String(), "version": a.Version}, func(w io.Writer) error {
					_, err := fmt.Fprintf(w, "version %s: task %s\n", a.Version, id)
					return err
				})
			})
		},
	}
	c.Flags().BoolVar(&finalise, "finalise", false, "when all run it, let them write its data formats: no way back from there")
	c.Flags().StringVar(&keyList, "keys", updateKeys, "`FILE` with trusted public keys; each node goes by its own as well")
	return []*cobra.Command{c, {
		Use: "finalise", Short: "Let all nodes write the data formats of the version that all of them run; there is no way back", Args: cobra.NoArgs,
		Long: `Let all nodes write the data formats of the version that all of them run. Until then each of them can go back to the version before.
It is refused while a node runs a version that does not know them.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return e.onNode(cmd, "finalise", "", func(ctx context.Context, l local) error { return l.commit(ctx, &state.RaiseLevel{To: state.LevelMax}) })
		},
	}}
}

// takeBundle checks a bundle and copies it to where the other nodes fetch it.
func (e *env) takeBundle(path string, keys []ed25519.PublicKey) (a rollout.Args, err error) {
	in, err := os.Open(path)
	if err != nil {
		return a, err
	}
	defer in.Close()
	dir := update.Dir(e.data)
	if err := durable.MakeDir(dir); err != nil {
		return a, err
	}
	part := filepath.Join(dir, "import.part")
	out, err := os.OpenFile(part, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o644)
	if err != nil {
		return a, err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	sum := sha256.New()
	if a.Size, err = io.Copy(io.MultiWriter(out, sum), in); err != nil {
		return a, err
	}
	a.SHA256 = hex.EncodeToString(sum.Sum(nil))
	if _, err := out.Seek(0, io.SeekStart); err != nil {
		return a, err
	}
	m, root, err := update.OpenBundle(out, keys)
	if err == nil {
		_, err = io.Copy(io.Discard, root)
	}
	if err == nil {
		err = root.Whole()
	}
	if err != nil {
		return a, errors.Join(err, os.Remove(part))
	}
	a.Version = m.Version
	if err := out.Sync(); err != nil {
		return a, err
	}
	if err := os.Rename(part, filepath.Join(dir, update.BundleName(a.SHA256))); err != nil {
		return a, err
	}
	return a, errors.Join(ownAs(e.data, dir), durable.SyncDir(dir))
}

// ownAs gives a directory to the owner of another: the services do not run as root.
func ownAs(like, dir string) error {
	var st unix.Stat_t
	if err := unix.Stat(like, &st); err != nil {
		return fmt.Errorf("owner of %s: %w", like, err)
	}
	if os.Geteuid() != 0 {
		return nil
	}
	return os.Chown(dir, int(st.Uid), int(st.Gid))
}
