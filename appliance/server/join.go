package server

import (
	"context"
	"crypto/sha256"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	v1 "varve/control/api/customer"
	"varve/control/cluster"
	"varve/control/durable"
	"varve/control/node"
	"varve/control/pki"
	"varve/control/raft"
	"varve/control/secrets"
	"varve/control/state"
	"varve/volumedriver/vfs"
)

// A running appliance that holds nothing joins a cluster by its API. What makes it a node of that cluster cannot be put in the place of what it
// runs on, so it is put beside it, and the appliance restarts:
//
//	DATA/join.new/control, tls, secrets     written while it runs: the cluster has admitted it
//	DATA/join.new/ready                     all of them are there and durable: from here on there is one way, forward
//	restart                                 of all of the appliance's processes (ErrRestart); with both locks held, before anything is opened:
//	    what belongs to the old cluster of one gets the suffix .left (in a directory that is a mount: goes to its .left)
//	    ready becomes moved; what is new takes its place; join.new goes
//
// A crash before `ready` leaves the appliance what it was (and in the cluster a node that never comes, to be removed); one after it is met by
// the next start, which does what is missing. The gateway unit gives its lock up when it sees `ready`, and waits until that is gone.
const (
	joinDir       = "join.new"
	joinReady     = "ready"
	joinMoved     = "moved"
	joinSecrets   = "secrets"
	leftSuffix    = ".left"
	joinPoll      = 200 * time.Millisecond
	joinLockWait  = 2 * time.Minute
	joinAskExtra  = 15 * time.Second
	joinBytesMost = 1 << 20
)

// ErrRestart says that an appliance ended to be started again at once.
var ErrRestart = errors.New("the appliance has to start again")

// JoinOptions say what a joining appliance tells of itself.
type JoinOptions struct {
	Token string
	// Node is the address of its node port, if it is to be reached there before it has said more.
	Node string
}

// Join makes the appliance with this data directory, which is not running, a node of the cluster that the token is for. The
// directory is empty, or that of a cluster of one without a file or vDisk, which is put aside.
func Join(ctx context.Context, cfg Config, opt JoinOptions) (joined cluster.Joined, err error) {
	cfg, err = cfg.withDefaults()
	if err != nil {
		return joined, err
	}
	lock, err := openData(cfg)
	if err != nil {
		return joined, err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	if err := holdsNothing(cfg); err != nil {
		return joined, err
	}
	if joined, err = stageJoin(ctx, cfg, opt); err != nil {
		return joined, err
	}
	return joined, moveJoin(cfg.Data)
}

// NotEmptyError: a node that holds something cannot join another cluster.
type NotEmptyError struct {
	Data string
	What string
}

func (e *NotEmptyError) Error() string {
	return fmt.Sprintf("%s holds %s; an appliance joins with an empty data directory", e.Data, e.What)
}

// holds names what is in a cluster of one that another cluster would not know; "" for nothing.
func holds(view *state.View) string {
	if len(view.Nodes()) > 1 {
		return "a node of a cluster"
	}
	for _, p := range view.VPools() {
		switch {
		case p.Inodes > 1:
			return "files in vPool " + p.Name
		case p.Name != DefaultPool:
			return "vPool " + p.Name
		}
	}
	return ""
}

// holdsNothing looks into the control state of an appliance that does not run.
func holdsNothing(cfg Config) error {
	dir := filepath.Join(cfg.Data, controlName)
	if _, err := os.Stat(filepath.Join(dir, "node.json")); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if cluster.HasPeers(dir) {
		return &NotEmptyError{cfg.Data, "a node of a cluster"}
	}
	n, err := raft.Open(raft.Config{Dir: dir, Log: cfg.ControlLog})
	if err != nil {
		return err
	}
	what := holds(n.State().View())
	if err := n.Close(); err != nil {
		return err
	}
	if what != "" {
		return &NotEmptyError{cfg.Data, what}
	}
	return nil
}

// stageJoin has the cluster admit this appliance and keeps what it needs in DATA/join.new, complete when it returns.
func stageJoin(ctx context.Context, cfg Config, opt JoinOptions) (joined cluster.Joined, err error) {
	dir := filepath.Join(cfg.Data, joinDir)
	if err := os.RemoveAll(dir); err != nil { // of a join that ended in between
		return joined, err
	}
	if err := durable.MakeDir(dir); err != nil {
		return joined, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	joined, err = cluster.Join(ctx, opt.Token, cluster.JoinConfig{ControlDir: filepath.Join(dir, controlName), TLSDir: filepath.Join(dir, tlsName),
		Hosts:       pki.LocalHosts(),
		KeepSecrets: func(bundle []byte) error { return durable.Replace(dir, joinSecrets, bundle, 0o600) },
		Spec:        state.NodeSpec{Name: node.HostName(), Peer: opt.Node, Version: cfg.Version, LevelMax: state.LevelMax}})
	if err != nil {
		return joined, err
	}
	return joined, durable.Replace(dir, joinReady, nil, 0o600)
}

// joinIsReady says whether what has been joined waits for a restart.
func joinIsReady(data string) bool {
	for _, name := range []string{joinReady, joinMoved} {
		if _, err := os.Stat(filepath.Join(data, joinDir, name)); err == nil {
			return true
		}
	}
	return false
}

// moveJoin puts what stageJoin has kept into its place, from wherever it stopped last. Nothing in the directory is in use.
func moveJoin(data string) error {
	dir := filepath.Join(data, joinDir)
	if _, err := os.Stat(filepath.Join(dir, joinReady)); err == nil {
		for _, name := range []string{tlsName, logName, mapName, tokenName, ledgerName, controlName} {
			from := filepath.Join(data, name)
			if _, err := os.Lstat(from); errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err := putAside(from); err != nil {
				return fmt.Errorf("put %s aside: %w", from, err)
			}
		}
		if err := durable.SyncDir(data); err != nil {
			return err
		}
		if err := os.Rename(filepath.Join(dir, joinReady), filepath.Join(dir, joinMoved)); err != nil {
			return fmt.Errorf("join: %w", err)
		}
		if err := durable.SyncDir(dir); err != nil {
			return err
		}
	}
	for _, name := range []string{tlsName, controlName} {
		err := putInPlace(filepath.Join(dir, name), filepath.Join(data, name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // it is there already
			return fmt.Errorf("join: %w", err)
		}
	}
	bundle, err := readShort(filepath.Join(dir, joinSecrets), joinBytesMost)
	if err == nil {
		err = secrets.Adopt(data, bundle)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("keep the keys of sealed secrets: %w", err)
	}
	if err := durable.SyncDir(data); err != nil {
		return err
	}
	// The marker goes last: without it nothing says that the rest is to be taken.
	for _, name := range []string{joinSecrets, joinMoved} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("join: %w", err)
		}
	}
	return os.RemoveAll(dir)
}

// putAside gives what is at a path the suffix .left. The root of a file system (control and log may have disks of their own) cannot be
// renamed: what is in it goes to its directory .left.
func putAside(from string) error {
	if err := os.RemoveAll(from + leftSuffix); err != nil {
		return err
	}
	if err := os.Rename(from, from+leftSuffix); !errors.Is(err, syscall.EBUSY) {
		return err
	}
	return emptyInto(from, filepath.Join(from, leftSuffix))
}

// emptyInto moves what is in a directory into one of its own. A cut between two entries leaves the rest for the next time.
func emptyInto(dir, left string) error {
	all, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	if err := durable.MakeDir(left); err != nil {
		return err
	}
	for _, e := range all {
		if e.Name() == filepath.Base(left) || e.Name() == "lost+found" {
			continue
		}
		to := filepath.Join(left, e.Name())
		if err := os.RemoveAll(to); err != nil { // of a join before
			return err
		}
		if err := os.Rename(filepath.Join(dir, e.Name()), to); err != nil {
			return err
		}
	}
	return errors.Join(durable.SyncDir(left), durable.SyncDir(dir))
}

// putInPlace moves a directory to where there is none, or copies its files into the root of a file system.
func putInPlace(from, to string) error {
	// Which of them it is depends on whether there is something in the mounted directory.
	if err := os.Rename(from, to); !errors.Is(err, syscall.EBUSY) && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return copyInto(from, to)
}

// copyInto copies a directory's files, which are few and short, durably.
func copyInto(from, to string) error {
	return filepath.WalkDir(from, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		at := filepath.Join(to, name)
		if e.IsDir() {
			return durable.MakeDir(at)
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		b, err := os.ReadFile(path) // what a node needs to join is small
		if err != nil {
			return err
		}
		return durable.Replace(filepath.Dir(at), filepath.Base(at), b, info.Mode().Perm())
	})
}

// readShort reads a file that is at most so long.
func readShort(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(b)) > most {
		err = fmt.Errorf("%s is longer than %d bytes", path, most)
	}
	return b, err
}

// finishJoin completes a join, at the start of the unit that has control. The caller holds its lock; the data's is the gateway's, which gives
// it up.
func finishJoin(ctx context.Context, cfg Config) error {
	if !joinIsReady(cfg.Data) {
		return nil
	}
	if cfg.Unit == UnitControl {
		wait, cancel := context.WithTimeout(ctx, joinLockWait)
		defer cancel()
		lock, err := lockSoon(wait, filepath.Join(cfg.Data, lockName))
		if err != nil {
			return fmt.Errorf("join: wait for the gateway to stop: %w", err)
		}
		defer lock.Close()
	}
	cfg.Log.Info("the appliance becomes a node of the cluster that it has joined", "data", cfg.Data)
	return moveJoin(cfg.Data)
}

func lockSoon(ctx context.Context, path string) (io.Closer, error) {
	for {
		lock, err := vfs.OS().Lock(path)
		if err == nil || !held(err) {
			return lock, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(joinPoll):
		}
	}
}

// untilJoined returns ErrRestart when this appliance has joined a cluster, nil when ctx ends.
func (b *base) untilJoined(ctx context.Context) error {
	t := time.NewTicker(joinPoll)
	defer t.Stop()
	for {
		if joinIsReady(b.cfg.Data) {
			b.cfg.Log.Info("the appliance has joined a cluster and starts again")
			return ErrRestart
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

// awaitJoin waits, in the gateway unit, while control puts a join into its place.
func awaitJoin(ctx context.Context, cfg Config) error {
	for cfg.Unit == UnitGateway && joinIsReady(cfg.Data) {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(joinPoll):
		}
	}
	return nil
}

// Joinable implements api.Appliance.
func (e estate) Joinable() error {
	refused := func(detail, remedy string) error {
		return &state.Error{Err: state.ErrConflict, Object: "this appliance", Detail: detail, Remedy: remedy}
	}
	if what := holds(e.raft.State().View()); what != "" {
		return refused("holds "+what, "join with an appliance that holds nothing, or move what it holds away first")
	}
	if e.cfg.S3.URL != "" {
		return refused("was started with --s3, which names what the cluster would not know", "start it without --s3, then join")
	}
	if e.network == nil {
		return refused("has no node port", "start it with --node ADDR")
	}
	return nil
}

// Join implements api.Appliance.
func (e estate) Join(ctx context.Context, token string) (out v1.ClusterJoined, err error) {
	if !e.joining.TryLock() {
		return out, &state.Error{Err: state.ErrConflict, Object: "this appliance", Detail: "is joining a cluster already"}
	}
	defer e.joining.Unlock()
	if joinIsReady(e.cfg.Data) {
		return out, &state.Error{Err: state.ErrConflict, Object: "this appliance", Detail: "has joined a cluster and is about to start again"}
	}
	if err := e.Joinable(); err != nil {
		return out, err
	}
	// Whoever asked may go away: what the cluster has admitted is not given up for that.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cluster.JoinTimeout+joinAskExtra)
	defer cancel()
	j, err := stageJoin(ctx, e.cfg, JoinOptions{Token: token, Node: e.nodeSpec(e.doors).Peer})
	if err != nil {
		return out, err
	}
	out.Cluster, out.Node = j.Cluster, j.Node
	out.Fingerprint, err = fingerprintOf(filepath.Join(e.cfg.Data, joinDir, tlsName, "server.pem"))
	if err != nil {
		e.cfg.Log.Warn("fingerprint of the new certificate", "err", err)
	}
	return out, nil
}

// fingerprintOf is the SHA-256 of the first certificate of a file, as browsers show it.
func fingerprintOf(path string) (string, error) {
	b, err := readShort(path, joinBytesMost)
	if err != nil {
		return "", err
	}
	for block, rest := pem.Decode(b); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "CERTIFICATE" {
			sum := sha256.Sum256(block.Bytes)
			pairs := make([]string, len(sum))
			for i, b := range sum {
				pairs[i] = fmt.Sprintf("%02X", b)
			}
			return strings.Join(pairs, ":"), nil
		}
	}
	return "", fmt.Errorf("%s holds no certificate", path)
}
