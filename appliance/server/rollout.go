package server

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/uuid"

	"varve/appliance/update"
	"varve/control/durable"
	"varve/control/peer"
	"varve/control/rollout"
)

const (
	callUpdateStatus = "update/status"
	callUpdatePiece  = "update/piece"
	partSuffix       = ".part"
)

// updates is this node's side of a rollout: the exchange with the update agent, below DATA/update.
type updates struct{ *appliance }

var (
	_ rollout.Machine = updates{}
	_ rollout.Nodes   = updatesOf{}
)

func (u updates) dir() string { return update.Dir(u.cfg.Data) }

// Status implements rollout.Machine.
func (u updates) Status(context.Context) (rollout.NodeStatus, error) {
	st := rollout.NodeStatus{Version: u.cfg.Version, Ready: u.notReady() == nil}
	a, err := update.Answer(u.dir())
	if err != nil {
		return st, err
	}
	req, pending, err := update.Asked(u.dir())
	if err != nil {
		return st, err
	}
	st.Request, st.Busy, st.Done, st.Total = a.ID, pending, a.Done, a.Total
	if pending {
		st.Request = req.ID
	}
	if a.State == update.StateFailed && !pending {
		st.Error = a.Error
	}
	if a.Now != nil {
		st.Trying = a.Now.Boot.Try != ""
		if l := a.Now.Last; l != nil && !l.Done {
			st.Failed, st.FailedAt, st.Why = l.Version, l.At, l.Why
		}
	}
	return st, nil
}

// Request implements rollout.Machine.
func (u updates) Request(id, sum string) error {
	a, err := update.Answer(u.dir())
	if err != nil {
		return err
	}
	if a.Now == nil {
		return errors.New("this appliance was not installed from the image: update its package instead")
	}
	return update.Ask(u.dir(), update.Request{ID: id, Action: update.ActionApply, Bundle: update.BundleName(sum), Reboot: true})
}

// Have implements rollout.Machine.
func (u updates) Have(sum string) (int64, error) {
	for _, suffix := range []string{"", partSuffix} {
		info, err := os.Stat(filepath.Join(u.dir(), update.BundleName(sum)+suffix))
		if err == nil {
			return info.Size(), nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return 0, err
		}
	}
	return 0, nil
}

// Add implements rollout.Machine.
func (u updates) Add(sum string, at int64, piece []byte, whole bool) error {
	if err := durable.MakeDir(u.dir()); err != nil {
		return err
	}
	path := filepath.Join(u.dir(), update.BundleName(sum))
	f, err := os.OpenFile(path+partSuffix, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	if _, err = f.WriteAt(piece, at); err == nil && whole {
		err = u.finish(f, sum)
	}
	return errors.Join(err, f.Close())
}

// finish gives a bundle that is all here its name. One that is another than asked for goes.
func (u updates) finish(f *os.File, sum string) error {
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(f, 0, 1<<62)); err != nil {
		return err
	}
	if hex.EncodeToString(h.Sum(nil)) != sum {
		return errors.Join(fmt.Errorf("the bundle that was fetched is not %s", sum), os.Remove(f.Name()))
	}
	if err := f.Sync(); err != nil {
		return err
	}
	// Older bundles make room: one is enough.
	old, err := filepath.Glob(filepath.Join(u.dir(), update.BundleName("*")))
	if err != nil {
		return err
	}
	for _, o := range old {
		if err := os.Remove(o); err != nil {
			return err
		}
	}
	if err := os.Rename(f.Name(), filepath.Join(u.dir(), update.BundleName(sum))); err != nil {
		return err
	}
	return durable.SyncDir(u.dir())
}

// Piece implements rollout.Machine.
func (u updates) Piece(sum string, at int64, n int) ([]byte, error) {
	if len(sum) != 2*sha256.Size || n < 0 || n > rollout.PieceBytes || at < 0 {
		return nil, errors.New("no piece of a bundle")
	}
	if _, err := hex.DecodeString(sum); err != nil {
		return nil, errors.New("no piece of a bundle")
	}
	f, err := os.Open(filepath.Join(u.dir(), update.BundleName(sum)))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, n)
	k, err := f.ReadAt(b, at)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return b[:k], nil
}

// pieceArgs ask for a part of a bundle.
type pieceArgs struct {
	SHA256 string `json:"sha256"`
	At     int64  `json:"at"`
	N      int    `json:"n"`
}

// answer answers the other nodes' questions.
func (u updates) answer() {
	u.peers.Handle(callUpdateStatus, 16, func(ctx context.Context, _ []byte) (any, error) { return u.Status(ctx) })
	peer.Handle1(u.peers, callUpdatePiece, smallCall, func(_ context.Context, a pieceArgs) (any, error) { return u.Piece(a.SHA256, a.At, a.N) })
}

// updatesOf asks any node.
type updatesOf struct{ p *peer.Peers }

// Status implements rollout.Nodes.
func (u updatesOf) Status(ctx context.Context, node uuid.UUID) (rollout.NodeStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, peer.EachTimeout)
	defer cancel()
	var st rollout.NodeStatus
	return st, u.p.Call(ctx, node, callUpdateStatus, nil, &st)
}

// Piece implements rollout.Nodes.
func (u updatesOf) Piece(ctx context.Context, node uuid.UUID, sum string, at int64, n int) ([]byte, error) {
	var b []byte
	return b, u.p.Call(ctx, node, callUpdatePiece, pieceArgs{sum, at, n}, &b)
}

// newRollout wires rolling updates; its tasks are among those of newAutomation.
func (a *appliance) newRollout() *rollout.Rollout {
	u := updates{a}
	if err := durable.MakeDir(u.dir()); err != nil { // the update agent, which is root, leaves its status there
		a.cfg.Log.Warn("updates are not possible", "err", err)
	}
	if a.cfg.Unit != UnitControl {
		u.answer()
	}
	return rollout.New(rollout.Config{Self: a.raft.ID(), Store: a.raft.State(), Raft: a.raft, Machine: u, Nodes: updatesOf{a.peers}})
}
