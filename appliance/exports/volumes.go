// Package exports is where names meet bytes: it joins control's state (which vPools, files, owners there are) with the volume
// driver (what is in them) into what the gateways serve and what control's controllers ask of an engine.
//
//	Volumes    opens each volume once per process, as its owner
//	NBD        vDisks by name, for gateway/nbd
//	NFS        the tree of every vPool, for gateway/nfs
//	Engine     deletes, resizes, probes, for control
//
// # Opening a volume
//
//	slot of the volume taken (others wait)
//	raft: ActivateVolume(epoch -> epoch+1)     this process owns it; an earlier owner's epoch is void
//	driver: Create(spec with that epoch)       makes it, or opens what is there under the new epoch
//
// The raft entry precedes the engine's state, and a removal in raft precedes Engine.DeleteVolume, which takes the same slot.
// So whichever comes first, no engine state is left of a volume without a name: an activation after the removal is refused,
// and a removal after the activation finds the engine's state when it gets the slot.
//
// # Attributes
//
// Size and used of a file come from the engine once it knows the volume, mtime once something was written, everything else
// from state. ctime is the
// later of the two, so every write changes it. NFS sees one result whichever call carries it.
package exports

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/google/uuid"

	"varve/control/state"
	"varve/volumedriver"
	"varve/volumedriver/blockio"
)

// Proposer commits a command; control's raft node is one.
type Proposer interface {
	Apply(ctx context.Context, cmd state.Command) (state.Result, error)
}

// Volumes opens volumes for everything in this process.
type Volumes struct {
	raft   Proposer
	store  *state.Store
	driver *volumedriver.Driver
	node   uuid.UUID
	lost   map[uuid.UUID]bool // not written after NewVolumes
	meters meters

	mu    sync.Mutex // guards slots and what is in them
	slots map[uuid.UUID]*slot
}

// slot is one volume of this process. busy is non-nil, and closed at the end, while someone opens or deletes it.
type slot struct {
	busy   chan struct{}
	volume *volumedriver.Volume
	users  int
}

// ErrLost: the volume's log or map is gone and it was not rebuilt. Opening it would make it empty.
var ErrLost = errors.New("volume is lost until it is rebuilt")

// NewVolumes wires the set; node is the owner that activations name, lost are the volumes that may not be opened.
func NewVolumes(raft Proposer, store *state.Store, driver *volumedriver.Driver, node uuid.UUID, lost map[uuid.UUID]bool) *Volumes {
	return &Volumes{raft: raft, store: store, driver: driver, node: node, lost: lost, slots: make(map[uuid.UUID]*slot)}
}

// Lost counts the volumes that have a name and may not be opened.
func (s *Volumes) Lost() int {
	n := 0
	view := s.store.View()
	for id := range s.lost {
		if _, err := view.Volume(id); err == nil {
			n++
		}
	}
	return n
}

// Open gives the volume until release is called. state.ErrNotFound when it has no name any more.
func (s *Volumes) Open(ctx context.Context, id uuid.UUID) (v *volumedriver.Volume, release func(), err error) {
	for {
		s.mu.Lock()
		sl := s.slots[id]
		if sl == nil {
			sl = &slot{}
			s.slots[id] = sl
		}
		busy := sl.busy
		switch {
		case busy != nil:
		case sl.volume != nil:
			sl.users++
			v := sl.volume
			s.mu.Unlock()
			return v, sync.OnceFunc(func() { s.release(sl) }), nil
		default:
			sl.busy = make(chan struct{})
		}
		s.mu.Unlock()
		if busy == nil {
			v, err := s.activate(ctx, id)
			if err != nil {
				v = nil
			}
			s.settle(id, sl, v)
			if err != nil {
				return nil, nil, err
			}
			continue
		}
		select {
		case <-busy:
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		}
	}
}

func (s *Volumes) release(sl *slot) {
	s.mu.Lock()
	sl.users--
	s.mu.Unlock()
}

// settle ends a busy slot: with an open volume, or, with nil, without.
func (s *Volumes) settle(id uuid.UUID, sl *slot, v *volumedriver.Volume) {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(sl.busy)
	sl.busy, sl.volume = nil, v
	if v == nil {
		delete(s.slots, id)
	}
}

func (s *Volumes) activate(ctx context.Context, id uuid.UUID) (*volumedriver.Volume, error) {
	view := s.store.View()
	vol, err := view.Volume(id)
	if err != nil {
		return nil, err
	}
	if s.lost[id] {
		return nil, fmt.Errorf("open volume %s: %w", id, ErrLost)
	}
	if err := s.here(view, vol); err != nil {
		return nil, err
	}
	spec, err := s.spec(view, vol)
	if err != nil {
		return nil, err
	}
	res, err := s.raft.Apply(ctx, &state.ActivateVolume{Volume: id, Node: s.node, Epoch: vol.Epoch})
	if err != nil {
		return nil, fmt.Errorf("activate volume %s: %w", id, err)
	}
	spec.Epoch = res.Epoch
	var v *volumedriver.Volume
	if _, known := s.driver.Stat(id); vol.Parent != nil && !known {
		v, err = s.driver.Clone(ctx, vol.Parent.Volume, vol.Parent.Snapshot, spec)
	} else {
		v, err = s.driver.Create(ctx, spec)
	}
	if err != nil {
		return nil, fmt.Errorf("open volume %s: %w", id, err)
	}
	return v, limit(ctx, view, vol, v)
}

func (s *Volumes) spec(view *state.View, vol state.Volume) (volumedriver.Spec, error) {
	pool, err := view.VPoolByID(vol.Pool)
	if err != nil {
		return volumedriver.Spec{}, err
	}
	path, err := view.Path(vol.FSID, vol.Ino)
	if err != nil {
		return volumedriver.Spec{}, err
	}
	return volumedriver.Spec{ID: vol.ID, Pool: vol.Pool, Epoch: vol.Epoch, Size: vol.Size, PoolName: pool.Name, Path: path,
		Kind: string(vol.Kind)}, nil
}

// Users counts who has the volume open: NBD connections, and NFS files that were used within the last half minute.
func (s *Volumes) Users(id uuid.UUID) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if sl := s.slots[id]; sl != nil {
		return sl.users
	}
	return 0
}

// opened gives the volume if this process has it open.
func (s *Volumes) opened(id uuid.UUID) (*volumedriver.Volume, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sl := s.slots[id]
	if sl == nil || sl.volume == nil {
		return nil, false
	}
	return sl.volume, true
}

// Flush flushes up to max open volumes, whichever come first.
func (s *Volumes) Flush(ctx context.Context, max int) error {
	var some []*volumedriver.Volume
	s.mu.Lock()
	for _, sl := range s.slots {
		if len(some) == max {
			break
		}
		if sl.volume != nil {
			some = append(some, sl.volume)
		}
	}
	s.mu.Unlock()
	for _, v := range some {
		// A volume that was deleted meanwhile says nothing about the data path.
		if err := v.Flush(ctx); err != nil && !errors.Is(err, blockio.ErrClosed) {
			return fmt.Errorf("flush volume %s: %w", v.ID(), err)
		}
	}
	return nil
}

// Info is what the engine knows of a volume, without opening it.
func (s *Volumes) Info(id uuid.UUID) (volumedriver.Info, bool) {
	if v, ok := s.opened(id); ok {
		return v.Info(), true
	}
	return s.driver.Stat(id)
}

// Attr is what a file's attributes need of Info; changed is zero when the volume never was.
func (s *Volumes) Attr(id uuid.UUID) (size, used int64, changed time.Time, ok bool) {
	if v, ok := s.opened(id); ok {
		size, used, changed = v.Attr()
		return size, used, changed, true
	}
	info, ok := s.driver.Stat(id)
	if info.Accepted > 0 {
		changed = info.ModTime
	}
	return info.Size, info.Used, changed, ok
}

// Delete removes what the engine holds of a volume. Its users get blockio.ErrClosed from then on.
func (s *Volumes) Delete(ctx context.Context, id uuid.UUID) error {
	for {
		s.mu.Lock()
		sl := s.slots[id]
		if sl == nil {
			sl = &slot{}
			s.slots[id] = sl
		}
		busy := sl.busy
		if busy == nil {
			sl.busy = make(chan struct{})
		}
		s.mu.Unlock()
		if busy != nil {
			select {
			case <-busy:
				continue
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		err := s.driver.Delete(ctx, id)
		s.settle(id, sl, nil)
		if err != nil && !errors.Is(err, volumedriver.ErrUnknownVolume) {
			return fmt.Errorf("delete volume %s: %w", id, err)
		}
		return nil
	}
}

// Renamed tells the driver the present paths of volumes it knows, for their roots on the backend. A volume that it does not
// know gets its path when it is first opened.
func (s *Volumes) Renamed(ctx context.Context, moved []state.Volume) error {
	for _, vol := range moved {
		if _, ok := s.driver.Stat(vol.ID); !ok {
			continue
		}
		spec, err := s.spec(s.store.View(), vol)
		if errors.Is(err, state.ErrNotFound) {
			continue // removed meanwhile
		}
		if err != nil {
			return err
		}
		err = s.driver.Rename(ctx, vol.ID, spec.PoolName, spec.Path)
		if err != nil && !errors.Is(err, volumedriver.ErrUnknownVolume) && !errors.Is(err, blockio.ErrClosed) {
			return fmt.Errorf("rename volume %s to %s%s: %w", vol.ID, spec.PoolName, spec.Path, err)
		}
	}
	return nil
}
