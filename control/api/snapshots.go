package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	v1 "varve/control/api/customer"
	"varve/control/bytesize"
	"varve/control/state"
	"varve/control/vdisk"
)

func toSnapshot(disk string, s vdisk.Snapshot) v1.Snapshot {
	return v1.Snapshot{Name: s.Name, ID: s.ID, VDisk: disk, Created: s.Created.UTC(), Consistent: s.Consistent, Automatic: s.Automatic,
		Sticky: s.Sticky, Labels: s.Labels, Seq: s.Seq, Size: v1.Size(s.Size), Backed: s.Backed, Clones: s.Clones}
}

func (a customerAPI) ListSnapshots(ctx context.Context, r v1.ListSnapshotsRequestObject) (v1.ListSnapshotsResponseObject, error) {
	name, err := a.vdiskName(ctx, r.Vdisk)
	if err != nil {
		return nil, err
	}
	snaps, err := a.cfg.VDisks.Snapshots(ctx, name)
	if err != nil {
		return nil, err
	}
	all := make([]v1.Snapshot, 0, len(snaps))
	for _, s := range snaps {
		all = append(all, toSnapshot(name, s))
	}
	page, err := listPage(ctx, all, func(s v1.Snapshot) string { return s.ID.String() })
	return v1.ListSnapshots200JSONResponse{Items: page.items, Next: page.next, Count: page.count}, err
}

func (a customerAPI) CreateSnapshot(ctx context.Context, r v1.CreateSnapshotRequestObject) (v1.CreateSnapshotResponseObject, error) {
	d, err := a.vdisk(ctx, r.Vdisk)
	if err != nil {
		return nil, err
	}
	name, in := d.FullName(), *r.Body
	about(ctx, "snapshot "+name+"@"+in.Name)
	if r.Params.DryRun {
		return nil, wouldDo("takes a snapshot of vDisk "+name, []string{"snapshot " + name + "@" + in.Name}, nil, nil, "")
	}
	s, err := a.cfg.VDisks.Snapshot(ctx, name, vdisk.SnapshotSpec{Name: in.Name, Consistent: in.Consistent, Sticky: in.Sticky, Labels: in.Labels})
	if err != nil {
		return nil, err
	}
	return v1.CreateSnapshot201JSONResponse{Body: toSnapshot(name, s),
		Headers: v1.CreateSnapshot201ResponseHeaders{Location: location("vdisks", name, "snapshots", s.Name)}}, nil
}

func (a customerAPI) CreateSnapshotGroup(ctx context.Context, r v1.CreateSnapshotGroupRequestObject) (v1.CreateSnapshotGroupResponseObject, error) {
	in := *r.Body
	var names []string
	for _, given := range in.VDisks {
		name, err := a.vdiskName(ctx, given)
		if err != nil {
			return nil, err
		}
		names = append(names, name)
	}
	about(ctx, "snapshot "+in.Name+" of "+strings.Join(names, ", "))
	if r.Params.DryRun {
		return nil, wouldDo(fmt.Sprintf("takes a snapshot of %d vDisks at one point in time", len(names)), names, nil, nil, "")
	}
	snaps, err := a.cfg.VDisks.SnapshotGroup(ctx, names, vdisk.SnapshotSpec{Name: in.Name, Consistent: in.Consistent, Sticky: in.Sticky, Labels: in.Labels})
	if err != nil {
		return nil, err
	}
	out := v1.CreateSnapshotGroup201JSONResponse{Items: []v1.Snapshot{}}
	for i, s := range snaps {
		out.Items = append(out.Items, toSnapshot(names[i], s))
	}
	return out, nil
}

func (a customerAPI) GetSnapshot(ctx context.Context, r v1.GetSnapshotRequestObject) (v1.GetSnapshotResponseObject, error) {
	name, err := a.vdiskName(ctx, r.Vdisk)
	if err != nil {
		return nil, err
	}
	s, unique, shared, err := a.cfg.VDisks.GetSnapshot(ctx, name, r.Snapshot)
	return v1.GetSnapshot200JSONResponse{Snapshot: toSnapshot(name, s), Unique: v1.Size(unique), Shared: v1.Size(shared)}, err
}

func (a customerAPI) PatchSnapshot(ctx context.Context, r v1.PatchSnapshotRequestObject) (v1.PatchSnapshotResponseObject, error) {
	name, err := a.vdiskName(ctx, r.Vdisk)
	if err != nil {
		return nil, err
	}
	in := *r.Body
	about(ctx, "snapshot "+name+"@"+r.Snapshot)
	if r.Params.DryRun {
		return nil, wouldDo("changes snapshot "+name+"@"+r.Snapshot, nil, nil, nil, "")
	}
	s, err := a.cfg.VDisks.EditSnapshot(ctx, name, r.Snapshot, func(spec *vdisk.SnapshotSpec) {
		if in.Name != "" {
			spec.Name = in.Name
		}
		if in.Sticky != nil {
			spec.Sticky = *in.Sticky
		}
		if in.Labels != nil {
			spec.Labels = in.Labels
		}
	})
	return v1.PatchSnapshot200JSONResponse(toSnapshot(name, s)), err
}

func (a customerAPI) DeleteSnapshot(ctx context.Context, r v1.DeleteSnapshotRequestObject) (v1.DeleteSnapshotResponseObject, error) {
	name, err := a.vdiskName(ctx, r.Vdisk)
	if err != nil {
		return nil, err
	}
	s, unique, _, err := a.cfg.VDisks.GetSnapshot(ctx, name, r.Snapshot)
	if err != nil {
		return nil, err
	}
	full := name + "@" + s.Name
	about(ctx, "snapshot "+full)
	if r.Params.DryRun {
		return nil, wouldDo("deletes snapshot "+full, []string{bytesize.Format(unique) + " that only it holds become free"},
			[]string{"what " + name + " was at " + s.Created.UTC().Format(time.RFC3339)}, nil, full)
	}
	if err := confirm(r.Params.Confirm, full); err != nil {
		return nil, err
	}
	return v1.DeleteSnapshot204Response{}, a.cfg.VDisks.DeleteSnapshot(ctx, name, s.ID.String(), r.Params.Force)
}

func (a customerAPI) RollbackVDisk(ctx context.Context, r v1.RollbackVDiskRequestObject) (v1.RollbackVDiskResponseObject, error) {
	d, err := a.vdisk(ctx, r.Vdisk)
	if err != nil {
		return nil, err
	}
	name := d.FullName()
	s, _, _, err := a.cfg.VDisks.GetSnapshot(ctx, name, r.Body.Snapshot)
	if err != nil {
		return nil, err
	}
	about(ctx, "vdisk "+name+" to "+s.Name)
	if r.Params.DryRun {
		e := wouldDo("rolls vDisk "+name+" back to "+s.Name, []string{"what it is now stays as an automatic snapshot"}, nil, clientsOf(d), name)
		return nil, e
	}
	if err := confirm(r.Params.Confirm, name); err != nil {
		return nil, err
	}
	if a.async(r.Params.Prefer) {
		task, err := a.submit(ctx, vdisk.RollbackTask, "vdisk "+name, vdisk.RollbackArgs{VDisk: name, Snapshot: s.ID.String(), Force: r.Body.Force})
		return v1.RollbackVDisk202JSONResponse{Body: task, Headers: v1.RollbackVDisk202ResponseHeaders{Location: location("tasks", task.ID.String())}}, err
	}
	saved, err := a.cfg.VDisks.Rollback(ctx, name, s.ID.String(), r.Body.Force)
	return v1.RollbackVDisk200JSONResponse(toSnapshot(name, saved)), err
}

func (a customerAPI) CloneVDisk(ctx context.Context, r v1.CloneVDiskRequestObject) (v1.CloneVDiskResponseObject, error) {
	from, err := a.vdiskName(ctx, r.Vdisk)
	if err != nil {
		return nil, err
	}
	if r.Body.Snapshot != "" {
		from += "@" + r.Body.Snapshot
	}
	to, err := a.vdiskName(ctx, r.Body.Name)
	if err != nil {
		return nil, err
	}
	about(ctx, "vdisk "+to+" from "+from)
	if r.Params.DryRun {
		return nil, wouldDo("makes vDisk "+to+" from "+from, []string{"it shares what it does not change, so it takes no space yet"}, nil, nil, "")
	}
	if a.async(r.Params.Prefer) {
		task, err := a.submit(ctx, vdisk.CloneTask, "vdisk "+to, vdisk.CloneArgs{From: from, To: to})
		return v1.CloneVDisk202JSONResponse{Body: task, Headers: v1.CloneVDisk202ResponseHeaders{Location: location("tasks", task.ID.String())}}, err
	}
	d, err := a.cfg.VDisks.Clone(ctx, from, to)
	if err != nil {
		return nil, err
	}
	out := toVDisk(d, a.naming())
	return v1.CloneVDisk201JSONResponse{Body: out, Headers: v1.CloneVDisk201ResponseHeaders{ETag: etag(out.Rev), Location: location("vdisks", out.Name)}}, nil
}

func (a customerAPI) SetTemplate(ctx context.Context, r v1.SetTemplateRequestObject) (v1.SetTemplateResponseObject, error) {
	name, err := a.vdiskName(ctx, r.Vdisk)
	if err != nil {
		return nil, err
	}
	if err := a.cfg.VDisks.SetTemplate(ctx, name, r.Body.Template, r.Body.Force); err != nil {
		return nil, err
	}
	d, err := a.cfg.VDisks.Get(ctx, name)
	return v1.SetTemplate200JSONResponse(toVDisk(d, a.naming())), err
}

func (a customerAPI) ListTemplates(ctx context.Context, _ v1.ListTemplatesRequestObject) (v1.ListTemplatesResponseObject, error) {
	disks, err := a.cfg.VDisks.List(ctx, "")
	if err != nil {
		return nil, err
	}
	who, owners := callOf(ctx).who, a.naming()
	all := []v1.VDisk{}
	for _, d := range disks {
		if d.Info.Template && who.Sees(d.Pool.Name) {
			all = append(all, toVDisk(d, owners))
		}
	}
	page, err := listPage(ctx, all, func(d v1.VDisk) string { return d.ID.String() })
	return v1.ListTemplates200JSONResponse{Items: page.items, Next: page.next, Count: page.count}, err
}

// CreateFromTemplate is a task: a thousand vDisks take longer than a request may.
func (a customerAPI) CreateFromTemplate(ctx context.Context, r v1.CreateFromTemplateRequestObject) (v1.CreateFromTemplateResponseObject, error) {
	d, err := a.vdisk(ctx, r.Vdisk)
	if err != nil {
		return nil, err
	}
	template, names := d.FullName(), []string{}
	for _, given := range r.Body.Names {
		name, err := a.vdiskName(ctx, given)
		if err != nil {
			return nil, err
		}
		if _, err := a.cfg.VDisks.Get(ctx, name); err == nil {
			return nil, &state.Error{Err: state.ErrExist, Object: "vdisk " + name}
		}
		if slices.Contains(names, name) {
			return nil, refuse(http.StatusBadRequest, "invalid", "vDisk "+name+" is named twice", "")
		}
		names = append(names, name)
	}
	about(ctx, fmt.Sprintf("%d vdisks from %s", len(names), template))
	if len(names) == 0 || len(names) > vdisk.FromTemplateMax {
		return nil, refuse(http.StatusBadRequest, "invalid", fmt.Sprintf("%d names", len(names)), fmt.Sprintf("give 1 to %d", vdisk.FromTemplateMax))
	}
	if !d.Info.Template {
		return nil, &state.Error{Err: state.ErrConflict, Object: "vdisk " + template, Detail: "is no template", Remedy: "make it one: varve template set " + template}
	}
	if r.Params.DryRun {
		return nil, wouldDo(fmt.Sprintf("makes %d vDisks from template %s", len(names), template), names, nil, nil, "")
	}
	task, err := a.submit(ctx, vdisk.FromTemplateTask, "vdisk "+template, vdisk.FromTemplateArgs{Template: template, Names: names})
	if err != nil {
		return nil, err
	}
	return v1.CreateFromTemplate202JSONResponse{Body: task, Headers: v1.CreateFromTemplate202ResponseHeaders{Location: location("tasks", task.ID.String())}}, nil
}

func toLedger(l vdisk.Ledger) v1.Ledger {
	return v1.Ledger{Accepted: l.Accepted, Logged: l.Logged, Backed: l.Backed, UnloggedBytes: v1.Size(l.UnloggedBytes),
		UnbackedBytes: v1.Size(l.UnbackedBytes), UnbackedSeconds: float32(l.UnbackedAge.Seconds())}
}

func (a customerAPI) GetLedger(ctx context.Context, r v1.GetLedgerRequestObject) (v1.GetLedgerResponseObject, error) {
	name, err := a.vdiskName(ctx, r.Vdisk)
	if err != nil {
		return nil, err
	}
	l, err := a.cfg.VDisks.Ledger(ctx, name)
	return v1.GetLedger200JSONResponse(toLedger(l)), err
}

const (
	waitDefault = 60 * time.Second
	waitMax     = time.Hour
)

func (a customerAPI) WaitLevel(ctx context.Context, r v1.WaitLevelRequestObject) (v1.WaitLevelResponseObject, error) {
	name, err := a.vdiskName(ctx, r.Vdisk)
	if err != nil {
		return nil, err
	}
	wait := time.Duration(r.Body.Seconds) * time.Second
	if wait == 0 {
		wait = waitDefault
	}
	if wait < 0 || wait > waitMax {
		return nil, refuse(http.StatusBadRequest, "invalid", "seconds is out of range", "use 1 to 3600")
	}
	bound, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	if err := a.cfg.VDisks.WaitLevel(bound, name, r.Body.Level); err != nil {
		return nil, err
	}
	l, err := a.cfg.VDisks.Ledger(ctx, name)
	return v1.WaitLevel200JSONResponse(toLedger(l)), err
}

func (s *Server) toTrashed(t state.Trashed) v1.Trashed {
	name := t.Path
	if p, err := s.cfg.Store.View().VPoolByID(t.Pool); err == nil {
		disk, ok := state.DiskName(t.Path)
		if !ok { // a file that went with its VM
			disk = t.Path
		}
		name = p.Name + "/" + strings.TrimPrefix(disk, "/")
	}
	return v1.Trashed{ID: t.ID, Name: name, Size: v1.Size(t.Size), Removed: utc(t.Removed), Until: utc(t.Until)}
}

// trashed finds a deleted vDisk by its id or its name, if the caller may see its vPool.
func (s *Server) trashed(ctx context.Context, given string) (v1.Trashed, error) {
	all, err := s.cfg.VDisks.Trashed(ctx, "")
	if err != nil {
		return v1.Trashed{}, err
	}
	var found []v1.Trashed
	for _, t := range all {
		out := s.toTrashed(t)
		pool, _, _ := strings.Cut(out.Name, "/")
		if (t.ID.String() == given || out.Name == given) && callOf(ctx).who.Sees(pool) {
			found = append(found, out)
		}
	}
	switch len(found) {
	case 1:
		about(ctx, "vdisk "+found[0].Name)
		return found[0], nil
	case 0:
		return v1.Trashed{}, unseen("deleted vdisk " + clip(given))
	}
	return v1.Trashed{}, &state.Error{Err: state.ErrConflict, Object: "deleted vdisk " + given, Detail: fmt.Sprintf("there are %d of that name", len(found)),
		Remedy: "give its id"}
}

func (a customerAPI) ListTrash(ctx context.Context, _ v1.ListTrashRequestObject) (v1.ListTrashResponseObject, error) {
	trash, err := a.cfg.VDisks.Trashed(ctx, "")
	if err != nil {
		return nil, err
	}
	all := []v1.Trashed{}
	for _, t := range trash {
		out := a.toTrashed(t)
		if pool, _, _ := strings.Cut(out.Name, "/"); callOf(ctx).who.Sees(pool) {
			all = append(all, out)
		}
	}
	page, err := listPage(ctx, all, func(t v1.Trashed) string { return t.ID.String() })
	return v1.ListTrash200JSONResponse{Items: page.items, Next: page.next, Count: page.count}, err
}

func (a customerAPI) RestoreTrash(ctx context.Context, r v1.RestoreTrashRequestObject) (v1.RestoreTrashResponseObject, error) {
	t, err := a.trashed(ctx, r.Volume)
	if err != nil {
		return nil, err
	}
	to := r.Body.Name
	if to != "" {
		if _, err := a.vdiskName(ctx, to); err != nil {
			return nil, err
		}
	}
	if r.Params.DryRun {
		return nil, wouldDo("brings vDisk "+t.Name+" back", []string{"as " + orElse(to, t.Name)}, nil, nil, "")
	}
	d, err := a.cfg.VDisks.Restore(ctx, t.ID, to)
	if err != nil {
		return nil, err
	}
	return v1.RestoreTrash200JSONResponse(toVDisk(d, a.naming())), nil
}

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

func (a customerAPI) PurgeTrash(ctx context.Context, r v1.PurgeTrashRequestObject) (v1.PurgeTrashResponseObject, error) {
	t, err := a.trashed(ctx, r.Volume)
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		return nil, wouldDo("makes the deletion of vDisk "+t.Name+" final", nil, []string{"its data"}, nil, t.Name)
	}
	if err := confirm(r.Params.Confirm, t.Name); err != nil {
		return nil, err
	}
	return v1.PurgeTrash204Response{}, a.cfg.VDisks.EmptyTrash(ctx, t.ID)
}

// parent names the snapshot that a vDisk was cloned from: "VPOOL/PATH@id", or its ids where the parent is gone.
func (n naming) parent(vol state.Volume) string {
	if vol.Parent == nil || vol.Parent.Volume == uuid.Nil {
		return ""
	}
	v := n.view
	p, perr := v.Volume(vol.Parent.Volume)
	file, ferr := v.Path(p.FSID, p.Ino)
	pool, verr := v.VPoolByID(p.Pool)
	disk, isDisk := state.DiskName(file)
	if errors.Join(perr, ferr, verr) != nil || !isDisk {
		return vol.Parent.Volume.String() + "@" + vol.Parent.Snapshot.String()
	}
	return pool.Name + "/" + strings.TrimPrefix(disk, "/") + "@" + vol.Parent.Snapshot.String()
}

// cloned finds a vDisk that is a clone, and says which it is for the audit log.
func (s *Server) cloned(ctx context.Context, given string) (d vdisk.VDisk, name string, err error) {
	if d, err = s.vdisk(ctx, given); err != nil {
		return d, "", err
	}
	name = d.FullName()
	about(ctx, "vdisk "+name)
	if d.Volume.Parent == nil {
		err = &state.Error{Err: state.ErrConflict, Object: "vdisk " + name, Detail: "is no clone", Remedy: "there is nothing to do"}
	}
	return d, name, err
}

// FlattenVDisk is a task: it copies what the clone has inherited.
func (a customerAPI) FlattenVDisk(ctx context.Context, r v1.FlattenVDiskRequestObject) (v1.FlattenVDiskResponseObject, error) {
	d, name, err := a.cloned(ctx, r.Vdisk)
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		return nil, wouldDo("copies what vDisk "+name+" shares with its parent", []string{"it takes up to " + bytesize.Format(d.Info.Used) + " of its own then",
			"its parent can be deleted, if nothing else needs it"}, nil, nil, "")
	}
	task, err := a.submitAt(ctx, d.Volume.Owner, vdisk.FlattenTask, "vdisk "+name, vdisk.FlattenArgs{VDisk: name})
	if err != nil {
		return nil, err
	}
	return v1.FlattenVDisk202JSONResponse{Body: task, Headers: v1.FlattenVDisk202ResponseHeaders{Location: location("tasks", task.ID.String())}}, nil
}

func (a customerAPI) PromoteVDisk(ctx context.Context, r v1.PromoteVDiskRequestObject) (v1.PromoteVDiskResponseObject, error) {
	_, name, err := a.cloned(ctx, r.Vdisk)
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		return nil, wouldDo("gives vDisk "+name+" the snapshots that it shares with its parent", []string{"the parent is a clone of it then",
			"the parent can be deleted, if nothing else needs it", "nothing is copied"}, nil, nil, "")
	}
	d, err := a.cfg.VDisks.Promote(ctx, name)
	return v1.PromoteVDisk200JSONResponse(toVDisk(d, a.naming())), err
}

func (a customerAPI) GetRewind(ctx context.Context, r v1.GetRewindRequestObject) (v1.GetRewindResponseObject, error) {
	name, err := a.vdiskName(ctx, r.Vdisk)
	if err != nil {
		return nil, err
	}
	w, err := a.cfg.VDisks.RewindRange(ctx, name)
	out := v1.RewindRange{WindowSeconds: int64(w.Window / time.Second), HistoryBytes: v1.Size(w.History)}
	if !w.From.IsZero() {
		from := w.From.UTC()
		out.From = &from
	}
	return v1.GetRewind200JSONResponse(out), err
}

// RewindVDisk is a task: it reads what was written since the last base.
func (a customerAPI) RewindVDisk(ctx context.Context, r v1.RewindVDiskRequestObject) (v1.RewindVDiskResponseObject, error) {
	d, err := a.vdisk(ctx, r.Vdisk)
	if err != nil {
		return nil, err
	}
	name := d.FullName()
	args := vdisk.RewindArgs{VDisk: name, At: r.Body.At, Snapshot: r.Body.Snapshot}
	what := "snapshot of vDisk " + name
	if r.Body.Name != "" {
		if args.To, err = a.vdiskName(ctx, r.Body.Name); err != nil {
			return nil, err
		}
		what = "vDisk " + args.To + " from vDisk " + name
	}
	at := args.At.UTC().Truncate(time.Second).Format(time.RFC3339)
	about(ctx, what+" at "+at)
	if err := a.cfg.VDisks.CheckRewind(ctx, args); err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		return nil, wouldDo("makes "+what+" as it was at "+at, []string{"it shares what it does not change, so it takes no space yet"}, nil, nil, "")
	}
	task, err := a.submitAt(ctx, d.Volume.Owner, vdisk.RewindTask, "vdisk "+name, args)
	if err != nil {
		return nil, err
	}
	return v1.RewindVDisk202JSONResponse{Body: task, Headers: v1.RewindVDisk202ResponseHeaders{Location: location("tasks", task.ID.String())}}, nil
}
