package qos

import "context"

// Limiter is one volume's way through its own gate and those that it shares. Methods may be called concurrently.
type Limiter struct {
	own   *Gate
	gates []*Gate
	flows []flow
}

// NewLimiter makes a volume's limiter; shared are the gates behind its own. Close it with the volume.
func NewLimiter(l Limits, shared ...*Gate) *Limiter {
	own := NewGate(l)
	gates := append([]*Gate{own}, shared...)
	return &Limiter{own: own, gates: gates, flows: make([]flow, len(gates))}
}

// SetLimits changes the volume's own limits.
func (l *Limiter) SetLimits(limits Limits) { l.own.SetLimits(limits) }

// Try lets a request of n bytes through if it needs no wait. It allocates nothing, and takes no lock where there is no limit.
// A nil Limiter has none.
func (l *Limiter) Try(k Kind, n int) bool {
	if l == nil {
		return true
	}
	for i, g := range l.gates {
		if g.limited.Load()&(1<<k) == 0 || g.try(k, n) {
			continue
		}
		l.refund(i, k, n)
		return false
	}
	return true
}

// Wait lets a request of n bytes through in its turn, or fails with ctx.
func (l *Limiter) Wait(ctx context.Context, k Kind, n int) error {
	if err := ctx.Err(); err != nil || l == nil {
		return err
	}
	for i, g := range l.gates {
		if g.limited.Load()&(1<<k) == 0 {
			continue
		}
		if err := g.wait(ctx, &l.flows[i], k, n); err != nil {
			l.refund(i, k, n)
			return err
		}
	}
	return nil
}

// Refund gives back what Try or Wait let through and was not done after all, such as a request that the log had no room for.
func (l *Limiter) Refund(k Kind, n int) {
	if l != nil {
		l.refund(len(l.gates), k, n)
	}
}

func (l *Limiter) refund(gates int, k Kind, n int) {
	for _, g := range l.gates[:gates] {
		if g.limited.Load()&(1<<k) != 0 {
			g.refund(k, n)
		}
	}
}

// Stats of the volume's own gate.
func (l *Limiter) Stats() Stats { return l.own.Stats() }

// Close lets everybody pass who waits at the volume's own gate.
func (l *Limiter) Close() {
	if l != nil {
		l.own.Close()
	}
}
