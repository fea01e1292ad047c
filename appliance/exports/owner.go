package exports

import (
	"github.com/google/uuid"

	"varve/control/state"
)

// here refuses a volume whose bytes another node has: names are everywhere, data is at its owner. A volume that nobody has
// opened yet belongs to whoever opens it first and can reach its backend; a clone, to where its parent is.
func (s *Volumes) here(view *state.View, vol state.Volume) error {
	if vol.Owner != uuid.Nil {
		return s.elsewhere(view, vol, vol.Owner)
	}
	pool, err := view.VPoolByID(vol.Pool)
	if err != nil {
		return err
	}
	if pool.Backend.Node != uuid.Nil {
		return s.elsewhere(view, vol, pool.Backend.Node)
	}
	if vol.Parent != nil {
		if parent, err := view.Volume(vol.Parent.Volume); err == nil && parent.Owner != uuid.Nil {
			return s.elsewhere(view, vol, parent.Owner)
		}
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
