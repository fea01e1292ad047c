package upkeep

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"maps"
	"time"

	"github.com/google/uuid"

	"varve/control/jobs"
	"varve/control/policy"
	"varve/control/schedule"
	"varve/control/state"
)

func mapsKeys(m map[uuid.UUID]bool) iter.Seq[uuid.UUID] { return maps.Keys(m) }

// pools returns the vPools that a scheduled task is for: all that have no nearer row.
func (u *Upkeep) pools(r *jobs.Run) (*state.View, []state.VPool, schedule.Args, error) {
	var args schedule.Args
	if err := r.Args(&args); err != nil {
		return nil, nil, args, err
	}
	v := u.cfg.Store.View()
	var out []state.VPool
	if args.Only != uuid.Nil {
		p, err := v.VPoolByID(args.Only)
		return v, []state.VPool{p}, args, err
	}
	for _, p := range v.VPools() {
		at := state.ScopeOfCluster()
		if _, own := v.Schedule(args.Schedule, state.Ref{Kind: state.ScopeVPool, ID: p.ID}); own {
			at = state.Ref{Kind: state.ScopeVPool, ID: p.ID}
		}
		if at == args.Scope {
			out = append(out, p)
		}
	}
	return v, out, args, nil
}

// eachPool makes a pass over each vPool and sums up. It goes on after a failure and returns the first.
func (u *Upkeep) eachPool(ctx context.Context, r *jobs.Run, pools []state.VPool, o func(p state.VPool) ScrubOptions) (ScrubReport, error) {
	var sum ScrubReport
	var first error
	for i, p := range pools {
		if err := r.Step("vpool " + p.Name); err != nil {
			return sum, err
		}
		r.Progress(int64(i), int64(len(pools)))
		got, err := u.cfg.Engine.Scrub(ctx, p.ID, o(p))
		if err != nil {
			if ctx.Err() != nil {
				return sum, ctx.Err()
			}
			r.Log("vpool %s: %v", p.Name, err)
			if first == nil {
				first = fmt.Errorf("vpool %s: %w", p.Name, err)
			}
			continue
		}
		r.Log("vpool %s: %d bytes held, %d live, %d moved, %d freed, %d objects verified, %d orphans", p.Name, got.HeldBytes, got.LiveBytes,
			got.MovedBytes, got.FreedBytes, got.Verified, got.Orphans)
		sum.HeldBytes += got.HeldBytes
		sum.LiveBytes += got.LiveBytes
		sum.MovedBytes += got.MovedBytes
		sum.FreedBytes += got.FreedBytes
		sum.Deleted += got.Deleted
		sum.Orphans += got.Orphans
		sum.OrphanBytes += got.OrphanBytes
		sum.Unknown += got.Unknown
		sum.Verified += got.Verified
		sum.VerifyErrors = append(sum.VerifyErrors, got.VerifyErrors...)
	}
	r.Progress(int64(len(pools)), int64(len(pools)))
	if len(sum.VerifyErrors) > failuresNamed {
		sum.VerifyErrors = append(sum.VerifyErrors[:failuresNamed:failuresNamed], fmt.Sprintf("and %d more", len(sum.VerifyErrors)-failuresNamed))
	}
	if err := r.Result(sum); err != nil {
		return sum, errors.Join(first, err)
	}
	return sum, first
}

func (u *Upkeep) scrub(ctx context.Context, r *jobs.Run) error {
	v, pools, _, err := u.pools(r)
	if err != nil {
		return err
	}
	_, err = u.eachPool(ctx, r, pools, func(p state.VPool) ScrubOptions {
		return ScrubOptions{OverheadPercent: policy.OfVPool(v, p.ID).SpaceOverheadPercent.Value}
	})
	return err
}

// turn says whether a vPool's day has come: one of every so many, another one for each vPool, so that the reading is spread.
func turn(pool uuid.UUID, days int, due time.Time) bool {
	return (uint64(due.Unix()/86400)+binary.BigEndian.Uint64(pool[8:]))%uint64(max(days, 1)) == 0
}

func (u *Upkeep) verify(ctx context.Context, r *jobs.Run) error {
	v, all, args, err := u.pools(r)
	if err != nil {
		return err
	}
	due := time.Unix(0, int64(args.Due))
	var pools []state.VPool
	for _, p := range all {
		if args.Only == p.ID || turn(p.ID, policy.OfVPool(v, p.ID).VerifyDays.Value, due) {
			pools = append(pools, p)
		}
	}
	got, err := u.eachPool(ctx, r, pools, func(p state.VPool) ScrubOptions {
		return ScrubOptions{OverheadPercent: policy.OfVPool(v, p.ID).SpaceOverheadPercent.Value, Verify: true}
	})
	if err != nil {
		return err
	}
	if len(got.VerifyErrors) > 0 {
		return &jobs.Problem{Problem: state.Problem{Code: "data_damaged", Cause: "data on a backend cannot be read back: " + got.VerifyErrors[0],
			Consequence: "reads of these blocks fail; nothing else is affected",
			Remedy:      "restore the objects that the task's result names, or roll the vDisk back to a snapshot without them"}}
	}
	return nil
}

func (u *Upkeep) audit(ctx context.Context, r *jobs.Run) error {
	v, pools, _, err := u.pools(r)
	if err != nil {
		return err
	}
	got, err := u.eachPool(ctx, r, pools, func(p state.VPool) ScrubOptions {
		return ScrubOptions{OverheadPercent: policy.OfVPool(v, p.ID).SpaceOverheadPercent.Value, Audit: true}
	})
	if err != nil {
		return err
	}
	// With several nodes such objects are mostly the others'; where there is one node they are nobody's.
	var found []state.AlertSpec
	if got.Unknown > 0 && len(v.Nodes()) == 1 {
		found = append(found, state.AlertSpec{Code: "objects_unknown", Severity: "warning",
			Detail: "objects on the backends belong to volumes that this cluster does not have",
			Remedy: "if they are of a cluster that was lost, run varve rebuild; else remove them at the backend"})
	}
	return u.alert(ctx, "audit", found)
}

// alert commits what holds at one of this node's sources.
func (u *Upkeep) alert(ctx context.Context, source string, alerts []state.AlertSpec) error {
	if len(alerts) > state.AlertsMax {
		alerts = alerts[:state.AlertsMax]
	}
	for i := range alerts {
		alerts[i].Node = u.cfg.Node
	}
	if _, err := u.cfg.Raft.Apply(ctx, &state.SetAlerts{Source: source + "/" + u.cfg.Node.String(), Alerts: alerts}); err != nil {
		return fmt.Errorf("set alerts: %w", err)
	}
	return nil
}

func (u *Upkeep) health(ctx context.Context, r *jobs.Run) error {
	found := u.cfg.Health(ctx)
	for _, a := range found {
		r.Log("%s %s: %s", a.Code, a.Object, a.Detail)
	}
	if err := u.alert(ctx, "health", found); err != nil {
		return err
	}
	return r.Result(map[string]int{"alerts": len(found)})
}

// reality compares the volumes that the state says this node has with those that its driver has.
func (u *Upkeep) reality(ctx context.Context, r *jobs.Run) error {
	v := u.cfg.Store.View()
	var found []state.AlertSpec
	volumes := 0
	for _, p := range v.VPools() {
		for _, vol := range v.VolumesOf(p.FSID) {
			if vol.Owner != u.cfg.Node || vol.State != state.VolumeActive {
				continue
			}
			volumes++
			if u.cfg.Engine.Has(vol.ID) {
				continue
			}
			if _, err := u.cfg.Store.View().Volume(vol.ID); err == nil { // it was not deleted meanwhile
				found = append(found, state.AlertSpec{Code: "volume_missing", Object: pathOf(v, vol), Severity: "error",
					Detail: "the cluster says that this node has it, its volume driver does not", Remedy: "run varve doctor on the node"})
			}
		}
	}
	for _, a := range found {
		r.Log("%s: %s", a.Object, a.Detail)
	}
	if err := u.alert(ctx, "reality", found); err != nil {
		return err
	}
	return r.Result(map[string]int{"volumes": volumes, "alerts": len(found)})
}

func (u *Upkeep) certificates(ctx context.Context, _ *jobs.Run) error {
	if err := u.cfg.Renew(ctx); err != nil {
		return &jobs.Retry{Err: fmt.Errorf("renew certificates: %w", err)}
	}
	return nil
}
