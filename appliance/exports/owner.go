package exports

import (
	"github.com/google/uuid"

	"varve/control/state"
)

// holder is the node that has a volume's bytes; uuid.Nil where nobody has opened it yet and whoever does so first may have it. A volume
// that nobody has opened belongs to where its vPool's backend is; a clone, to where its parent is.
func holder(view *state.View, vol state.Volume) uuid.UUID {
	if vol.Owner != uuid.Nil {
		return vol.Owner
	}
	if pool, err := view.VPoolByID(vol.Pool); err == nil && pool.Backend.Node != uuid.Nil {
		return pool.Backend.Node
	}
	if vol.Parent != nil {
		if parent, err := view.Volume(vol.Parent.Volume); err == nil {
			return parent.Owner
		}
	}
	return uuid.Nil
}

// here refuses a volume whose bytes another node has: names are everywhere, data is at its owner.
func (s *Volumes) here(view *state.View, vol state.Volume) error {
	if _, err := view.VPoolByID(vol.Pool); err != nil {
		return err
	}
	if node := holder(view, vol); node != uuid.Nil {
		return s.elsewhere(view, vol, node)
	}
	return nil
}

func (s *Volumes) elsewhere(view *state.View, vol state.Volume, node uuid.UUID) error {
	if node == s.node {
		return nil
	}
	e := &state.Error{Err: state.ErrConflict, Object: "volume " + vol.ID.String(), Detail: "is served by node " + node.String()}
	if n, err := view.Node(node); err == nil {
		e.Detail, e.Remedy = "is served by node "+n.Name, "use that appliance: NBD "+n.NBD+", NFS "+n.NFS
	}
	return e
}
