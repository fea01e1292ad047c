package volumedriver

import (
	"fmt"
	"sync"

	"github.com/google/uuid"

	"varve/volumedriver/qos"
)

// poolGates are the limits that all volumes of a vPool share.
type poolGates struct {
	mu    sync.Mutex
	gates map[uuid.UUID]*qos.Gate
}

// of gives the vPool's gate, or nil if it has none.
func (p *poolGates) of(pool uuid.UUID) *qos.Gate {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.gates[pool]
}

// SetPoolLimits limits what all volumes of a vPool do together on this node; the zero value takes the limit away.
func (d *Driver) SetPoolLimits(pool uuid.UUID, l qos.Limits) {
	d.gates.mu.Lock()
	g := d.gates.gates[pool]
	if g == nil {
		if d.gates.gates == nil {
			d.gates.gates = make(map[uuid.UUID]*qos.Gate)
		}
		g = qos.NewGate(l)
		d.gates.gates[pool] = g
	} else {
		g.SetLimits(l)
	}
	d.gates.mu.Unlock()
	d.mu.RLock()
	volumes := make([]*Volume, 0, len(d.volumes))
	for _, v := range d.volumes {
		if v.root.Pool == pool {
			volumes = append(volumes, v)
		}
	}
	d.mu.RUnlock()
	for _, v := range volumes {
		v.applyLimits()
	}
}

// SetLimits limits the volume's requests, durably; the zero value takes the limits away.
func (v *Volume) SetLimits(l qos.Limits) error {
	for _, n := range []int64{l.IOPS, l.ReadIOPS, l.WriteIOPS, l.Bytes, l.ReadBytes, l.WriteBytes} {
		if n < 0 {
			return fmt.Errorf("limit of volume %s: %d per second", v.id, n)
		}
	}
	if err := v.editRoot(func(r *root) {
		if r.Options.Limits = nil; l != (qos.Limits{}) {
			r.Options.Limits = &l
		}
	}); err != nil {
		return err
	}
	v.applyLimits()
	return nil
}

// Limits are those of the volume alone.
func (v *Volume) Limits() qos.Limits {
	v.mu.RLock()
	defer v.mu.RUnlock()
	if v.root.Options.Limits == nil {
		return qos.Limits{}
	}
	return *v.root.Options.Limits
}

// applyLimits gives the volume the limiter that it needs: none, where neither it nor its vPool has a limit.
func (v *Volume) applyLimits() {
	own, gate := v.Limits(), v.d.gates.of(v.root.Pool)
	v.limiting.Lock()
	defer v.limiting.Unlock()
	l := v.limiter.Load()
	switch {
	case l != nil && v.limitGate == gate:
		l.SetLimits(own)
		return
	case own == (qos.Limits{}) && gate == nil:
		return
	case gate == nil:
		l = qos.NewLimiter(own)
	default:
		l = qos.NewLimiter(own, gate)
	}
	old := v.limiter.Swap(l)
	v.limitGate = gate
	old.Close()
}
