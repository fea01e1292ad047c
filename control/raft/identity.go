package raft

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/google/uuid"

	"varve/control/durable"
	"varve/control/state"
)

// Phases of an identity file.
const (
	forming = "forming" // the ids are chosen; raft may or may not have been bootstrapped
	joining = "joining" // a cluster has given the ids; its leader has not sent its state yet
	member  = "member"  // raft holds the cluster's record: an empty raft directory means lost votes and lost state
	removed = "removed" // the cluster has taken this node out; its raft files are history
)

const (
	identityFile  = "node.json"
	lockFile      = "lock"
	watermarkFile = "watermark"
	metaFile      = "wal-meta.db" // of raft-wal
)

type identity struct {
	Format  int       `json:"format"`
	Cluster uuid.UUID `json:"cluster"`
	Node    uuid.UUID `json:"node"`
	Phase   string    `json:"phase"`
}

// loadIdentity reads who this node is, or chooses it in a directory that holds nothing yet.
func loadIdentity(dir string) (identity, error) {
	path := filepath.Join(dir, identityFile)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return newIdentity(dir)
	}
	if err != nil {
		return identity{}, fmt.Errorf("read node identity: %w", err)
	}
	var id identity
	if err := json.Unmarshal(b, &id); err != nil {
		return identity{}, fmt.Errorf("%w: %s does not decode (%w); restore it from a backup", ErrIdentity, path, err)
	}
	switch {
	case id.Format != state.Format:
		return identity{}, fmt.Errorf("%w: %s has format %d, this binary knows %d; run the version that wrote it",
			ErrIdentity, path, id.Format, state.Format)
	case id.Node == uuid.Nil || id.Cluster == uuid.Nil || !slices.Contains([]string{forming, joining, member, removed}, id.Phase):
		return identity{}, fmt.Errorf("%w: %s is incomplete; restore it from a backup", ErrIdentity, path)
	case id.Phase == removed:
		return identity{}, fmt.Errorf("%w: node %s was removed from cluster %s; join again with an empty data directory",
			ErrIdentity, id.Node, id.Cluster)
	}
	return id, nil
}

func newIdentity(dir string) (identity, error) {
	if left, err := os.ReadDir(filepath.Join(dir, "raft")); err == nil && len(left) > 0 {
		return identity{}, fmt.Errorf("%w: %s holds raft state but %s is missing; restore it, or move the directory away to start anew",
			ErrIdentity, filepath.Join(dir, "raft"), identityFile)
	}
	id := identity{Format: state.Format, Cluster: uuid.New(), Node: uuid.New(), Phase: forming}
	return id, id.save(dir)
}

// Identify says who the node with this directory is, choosing ids for a new one, so that certificates can be made before Open.
// The caller keeps other processes out.
func Identify(dir string) (cluster, node uuid.UUID, err error) {
	if err := durable.MakeDir(dir); err != nil {
		return uuid.Nil, uuid.Nil, err
	}
	id, err := loadIdentity(dir)
	return id.Cluster, id.Node, err
}

// WriteJoining makes dir that of a node which a cluster has admitted. It must hold no raft state.
func WriteJoining(dir string, cluster, node uuid.UUID) error {
	if err := durable.MakeDir(dir); err != nil {
		return err
	}
	for _, name := range []string{"raft", identityFile} {
		if _, err := os.Stat(filepath.Join(dir, name)); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%w: %s holds a node's state already; join with an empty data directory", ErrIdentity, dir)
		}
	}
	return identity{Format: state.Format, Cluster: cluster, Node: node, Phase: joining}.save(dir)
}

func (id identity) save(dir string) error {
	b, err := json.Marshal(id)
	if err != nil {
		return fmt.Errorf("encode node identity: %w", err)
	}
	return durable.Replace(dir, identityFile, append(b, '\n'), 0o600)
}

// checkRaftDir refuses a member whose raft directory lost its metadata: raft-wal would start an empty log there and
// delete the segments it does not know.
func (id identity) checkRaftDir(dir string) error {
	_, err := os.Stat(filepath.Join(dir, metaFile))
	switch {
	case err == nil || id.Phase != member && errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: node %s was a member but %s is empty or lost %s; restore it from a backup, or start in an empty data "+
			"directory as a new node", ErrIdentity, id.Node, dir, metaFile)
	}
	return fmt.Errorf("look for the raft log: %w", err)
}

// The watermark is an index that the log is known to have reached durably. It is written now and then, so it only ever
// lags; a log that ends before it has lost committed entries, which raft-wal takes for a torn tail.
func loadWatermark(dir string) (uint64, error) {
	b, err := os.ReadFile(filepath.Join(dir, watermarkFile))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read raft watermark: %w", err)
	}
	var index uint64
	var sum uint32
	if _, err := fmt.Sscanf(string(b), "%d %08x\n", &index, &sum); err != nil || formatWatermark(index) != string(b) {
		return 0, fmt.Errorf("%w: %s is corrupt; check the disk, then remove the file", ErrIdentity, filepath.Join(dir, watermarkFile))
	}
	return index, nil
}

func formatWatermark(index uint64) string {
	n := fmt.Sprintf("%d", index)
	return fmt.Sprintf("%s %08x\n", n, crc32.ChecksumIEEE([]byte(n)))
}

func saveWatermark(dir string, index uint64) error {
	return durable.Replace(dir, watermarkFile, []byte(formatWatermark(index)), 0o600)
}
