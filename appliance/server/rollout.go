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
	"slices"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"varve/appliance/update"
	v1 "varve/control/api/customer"
	"varve/control/durable"
	"varve/control/peer"
	"varve/control/rollout"
	"varve/control/state"
)

const (
	callUpdateStatus = "update/status"
	callUpdatePiece  = "update/piece"
	callUpdateHeld   = "update/held"
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
		st.Updatable = true
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
	return update.Keep(u.dir(), filepath.Base(f.Name()), sum)
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
	u.peers.Handle(callUpdateHeld, 16, func(ctx context.Context, _ []byte) (any, error) {
		st, err := u.Status(ctx)
		if err != nil {
			return nil, err
		}
		held, err := update.Held(u.dir())
		return updateState{st, held}, err
	})
	peer.Handle1(u.peers, callUpdatePiece, smallCall, func(_ context.Context, a pieceArgs) (any, error) { return u.Piece(a.SHA256, a.At, a.N) })
}

// updateState is what a node says of updates.
type updateState struct {
	rollout.NodeStatus
	Held []update.Holding `json:"held"`
}

// Updates implements api.Appliance.
func (e estate) Updates(ctx context.Context) (v1.Updates, error) {
	out := v1.Updates{Nodes: []v1.UpdateNode{}, Bundles: []v1.UpdateBundle{}}
	view := e.raft.State().View()
	out.Level = view.Level()
	out.LevelReady, _ = view.LevelReady()
	nodes := view.Nodes()
	var ask []uuid.UUID
	for _, n := range nodes {
		ask = append(ask, n.ID)
	}
	for i, a := range tellAll[updateState](ctx, &e.base, ask, callUpdateHeld) {
		n := nodes[i]
		one := v1.UpdateNode{Name: n.Name, ID: n.ID, Version: n.Version}
		if a.Err != nil {
			one.Error = shortText(a.Err.Error())
			out.Nodes = append(out.Nodes, one)
			continue
		}
		st := a.Value
		one.Version, one.Reachable, one.Ready, one.Updatable, one.Busy, one.Trying = st.Version, true, st.Ready, st.Updatable, st.Busy, st.Trying
		one.Done, one.Total, one.Error, one.Failed, one.Why = v1.Size(st.Done), v1.Size(st.Total), st.Error, st.Failed, st.Why
		if at := st.FailedAt.UTC(); !at.IsZero() {
			one.FailedAt = &at
		}
		out.Nodes = append(out.Nodes, one)
		for _, h := range st.Held {
			out.Bundles = append(out.Bundles, toBundle(h, n.Name))
		}
	}
	return out, nil
}

func toBundle(h update.Holding, node string) v1.UpdateBundle {
	b := v1.UpdateBundle{SHA256: h.SHA256, Version: h.Version, Size: v1.Size(h.Size), Node: node, LevelMin: h.LevelMin, LevelMax: h.LevelMax}
	if at := h.Built.UTC(); !at.IsZero() {
		b.Built = &at
	}
	return b
}

// TakeUpdate implements api.Appliance.
func (e estate) TakeUpdate(_ context.Context, bundle io.Reader) (v1.UpdateBundle, error) {
	refused := func(err error, remedy string) error {
		return &state.Error{Err: state.ErrInvalid, Object: "update bundle", Detail: err.Error(), Remedy: remedy}
	}
	if !e.joining.TryLock() { // one change of what this appliance is at a time
		return v1.UpdateBundle{}, &state.Error{Err: state.ErrConflict, Object: "update bundle", Detail: "another one is being taken, or the appliance joins a cluster"}
	}
	defer e.joining.Unlock()
	keys, err := update.ReadKeys(e.cfg.UpdateKeys)
	if err != nil {
		return v1.UpdateBundle{}, fmt.Errorf("read keys of updates: %w", err)
	}
	h, err := update.Take(updates{e.appliance}.dir(), bundle, keys)
	switch {
	case errors.Is(err, unix.ENOSPC):
		return v1.UpdateBundle{}, &state.Error{Err: state.ErrNoSpace, Object: "update bundle", Detail: err.Error(), Remedy: "make room on the data disk"}
	case errors.Is(err, update.ErrRefused), errors.Is(err, update.ErrDamaged):
		return v1.UpdateBundle{}, refused(err, "take the bundle as it was released; varve update verify FILE checks one")
	case err != nil:
		return v1.UpdateBundle{}, err
	}
	e.cfg.Log.Info("an update bundle was taken", "version", h.Version, "sha256", h.SHA256, "bytes", h.Size)
	return toBundle(h, e.nodeName(e.raft.ID())), nil
}

// Rollout implements api.Appliance.
func (e estate) Rollout(ctx context.Context, sum string, finalise bool, by string) (state.TaskSpec, error) {
	u, err := e.Updates(ctx)
	if err != nil {
		return state.TaskSpec{}, err
	}
	i := slices.IndexFunc(u.Bundles, func(b v1.UpdateBundle) bool { return b.SHA256 == sum })
	if i < 0 {
		return state.TaskSpec{}, &state.Error{Err: state.ErrNotFound, Object: "update bundle " + shortText(sum), Remedy: "upload it first"}
	}
	for _, n := range u.Nodes {
		if n.Reachable && !n.Updatable {
			return state.TaskSpec{}, &state.Error{Err: state.ErrConflict, Object: "node " + n.Name,
				Detail: "was not installed from the image", Remedy: "update its package instead"}
		}
	}
	b := u.Bundles[i]
	source, err := e.nodes.Get(b.Node)
	if err != nil {
		return state.TaskSpec{}, err
	}
	return rollout.New(rollout.Config{}).Spec(rollout.Args{Version: b.Version, SHA256: b.SHA256, Size: int64(b.Size), Source: source.ID, Finalise: finalise}, by)
}

// updatesOf asks any node.
type updatesOf struct{ p *peer.Peers }

// Status implements rollout.Nodes.
func (u updatesOf) Status(ctx context.Context, node uuid.UUID) (rollout.NodeStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, peer.EachTimeout)
	defer cancel()
	var st rollout.NodeStatus
	err := u.p.Call(ctx, node, callUpdateStatus, nil, &st)
	return st, err
}

// Piece implements rollout.Nodes.
func (u updatesOf) Piece(ctx context.Context, node uuid.UUID, sum string, at int64, n int) ([]byte, error) {
	var b []byte
	err := u.p.Call(ctx, node, callUpdatePiece, pieceArgs{sum, at, n}, &b)
	return b, err
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
