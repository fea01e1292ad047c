package api

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	v1 "varve/control/api/customer"
	"varve/control/bytesize"
	"varve/control/schedule"
	"varve/control/state"
	"varve/control/upkeep"
	"varve/control/vdisk"
	"varve/control/vpool"
)

// customerAPI answers the operations of the customer API: it turns requests into calls of controllers and what those give into JSON.
// The guard has checked who calls before anything here runs; what is bound to vPools is checked here, where the vPool is known.
type customerAPI struct{ *Server }

var _ v1.StrictServerInterface = customerAPI{}

func utc(t state.Time) time.Time { return time.Unix(0, int64(t)).UTC() }

func location(parts ...string) string {
	for i, p := range parts {
		parts[i] = url.PathEscape(p)
	}
	return v1.Prefix + "/" + strings.Join(parts, "/")
}

// unseen is the answer about what the caller may not see: the same as about what there is not.
func unseen(object string) error { return &state.Error{Err: state.ErrNotFound, Object: object} }

// vpoolName gives the name of a vPool that is named or whose id is given, if the caller may see it.
func (s *Server) vpoolName(ctx context.Context, given string) (string, error) {
	if id, err := uuid.Parse(given); err == nil {
		if p, err := s.cfg.Store.View().VPoolByID(id); err == nil {
			given = p.Name
		}
	}
	about(ctx, "vpool "+given)
	if !callOf(ctx).who.Sees(given) {
		return "", unseen("vpool " + given)
	}
	return given, nil
}

// vdiskName gives the full name of a vDisk that is named or whose id is given, if the caller may see its vPool.
func (s *Server) vdiskName(ctx context.Context, given string) (string, error) {
	if id, err := uuid.Parse(given); err == nil {
		view := s.cfg.Store.View()
		vol, err := view.Volume(id)
		if err != nil {
			return "", unseen("vdisk " + given)
		}
		p, perr := view.VPoolByID(vol.Pool)
		file, ferr := view.Path(vol.FSID, vol.Ino)
		if err := errors.Join(perr, ferr); err != nil {
			return "", err
		}
		disk, ok := state.DiskName(file)
		if !ok {
			return "", unseen("vdisk " + given)
		}
		given = p.Name + "/" + strings.TrimPrefix(disk, "/")
	}
	about(ctx, "vdisk "+given)
	if pool, _, _ := strings.Cut(given, "/"); !callOf(ctx).who.Sees(pool) {
		return "", unseen("vdisk " + given)
	}
	return given, nil
}

func (a customerAPI) ListVPools(ctx context.Context, _ v1.ListVPoolsRequestObject) (v1.ListVPoolsResponseObject, error) {
	var all []v1.VPool
	for _, p := range a.cfg.VPools.List(ctx) {
		if callOf(ctx).who.Sees(p.Name) {
			all = append(all, toVPool(p))
		}
	}
	page, err := listPage(ctx, all, func(p v1.VPool) string { return p.ID.String() })
	return v1.ListVPools200JSONResponse{Items: page.items, Next: page.next, Count: page.count}, err
}

func (a customerAPI) GetVPool(ctx context.Context, r v1.GetVPoolRequestObject) (v1.GetVPoolResponseObject, error) {
	name, err := a.vpoolName(ctx, r.Vpool)
	if err != nil {
		return nil, err
	}
	p, err := a.cfg.VPools.Get(ctx, name)
	return v1.GetVPool200JSONResponse{Body: toVPool(p), Headers: v1.GetVPool200ResponseHeaders{ETag: etag(p.Rev)}}, err
}

func (a customerAPI) CreateVPool(ctx context.Context, r v1.CreateVPoolRequestObject) (v1.CreateVPoolResponseObject, error) {
	in := *r.Body
	about(ctx, "vpool "+in.Name)
	if r.Params.DryRun {
		b, err := vpool.ParseBackend(in.Backend)
		if err != nil {
			return nil, err
		}
		if _, err := a.cfg.VPools.Get(ctx, in.Name); err == nil {
			return nil, &state.Error{Err: state.ErrExist, Object: "vpool " + in.Name}
		}
		return nil, wouldDo("makes vPool "+in.Name, []string{"NFS export /" + in.Name, "its objects on " + vpool.URL(b)}, nil, nil, "")
	}
	p, err := a.cfg.VPools.Create(ctx, vpool.Spec{Name: in.Name, Backend: in.Backend, Clients: in.Clients, CA: in.CA,
		Keys: vpool.Keys{Access: in.Credentials.AccessKey, Secret: in.Credentials.SecretKey}, AllowUnsafe: in.AllowUnsafe, Compression: in.Compression, Encrypt: in.Encrypt})
	return v1.CreateVPool201JSONResponse{Body: toVPool(p), Headers: v1.CreateVPool201ResponseHeaders{ETag: etag(p.Rev),
		Location: location("vpools", p.Name)}}, err
}

func (a customerAPI) PatchVPool(ctx context.Context, r v1.PatchVPoolRequestObject) (v1.PatchVPoolResponseObject, error) {
	name, err := a.vpoolName(ctx, r.Vpool)
	if err != nil {
		return nil, err
	}
	p, err := a.cfg.VPools.Get(ctx, name)
	if err != nil {
		return nil, err
	}
	rev, err := based(r.Params.IfMatch, "vpool "+name, p.Rev)
	if err != nil {
		return nil, err
	}
	if r.Body.Clients == nil {
		return nil, refuse(http.StatusBadRequest, "invalid", "nothing to change", "send clients")
	}
	if r.Params.DryRun {
		var changes, affected []string
		for _, c := range r.Body.Clients {
			if !slices.Contains(p.Clients, c) {
				changes = append(changes, c+" may use it")
			}
		}
		for _, c := range p.Clients {
			if !slices.Contains(r.Body.Clients, c) {
				changes = append(changes, c+" may use it no more")
				affected = append(affected, "clients in "+c+", unless another network has them")
			}
		}
		return nil, wouldDo("changes who may use vPool "+name, changes, nil, affected, "")
	}
	p, err = a.cfg.VPools.SetClients(ctx, name, rev, r.Body.Clients)
	return v1.PatchVPool200JSONResponse{Body: toVPool(p), Headers: v1.PatchVPool200ResponseHeaders{ETag: etag(p.Rev)}}, err
}

func (a customerAPI) SetVPoolCredentials(ctx context.Context, r v1.SetVPoolCredentialsRequestObject) (v1.SetVPoolCredentialsResponseObject, error) {
	name, err := a.vpoolName(ctx, r.Vpool)
	if err != nil {
		return nil, err
	}
	return v1.SetVPoolCredentials204Response{}, a.cfg.VPools.SetKeys(ctx, name, vpool.Keys{Access: r.Body.AccessKey, Secret: r.Body.SecretKey}, r.Body.Force)
}

// RotateVPoolKeys makes a task on each node, since each has keys of its own volumes to wrap anew; it answers with that of this node.
func (a customerAPI) RotateVPoolKeys(ctx context.Context, r v1.RotateVPoolKeysRequestObject) (v1.RotateVPoolKeysResponseObject, error) {
	name, err := a.vpoolName(ctx, r.Vpool)
	if err != nil {
		return nil, err
	}
	about(ctx, "vpool "+name)
	if r.Params.DryRun {
		return nil, wouldDo("gives vPool "+name+" a new key encryption key, and its vDisks new keys for what is written from then on", nil, nil, nil, "")
	}
	nodes, err := a.cfg.VPools.NewKEK(ctx, name)
	if err != nil {
		return nil, err
	}
	var here v1.Task
	for i, node := range nodes {
		task, err := a.submitAt(ctx, node, vpool.RekeyTask, "vpool "+name, vpool.RekeyArgs{VPool: name, Node: node})
		if err != nil {
			return nil, err
		}
		if i == 0 {
			here = task
		}
	}
	return v1.RotateVPoolKeys202JSONResponse{Body: here, Headers: v1.RotateVPoolKeys202ResponseHeaders{Location: location("tasks", here.ID.String())}}, nil
}

// VerifyVPool is a task on every node that has objects of the vPool.
func (a customerAPI) VerifyVPool(ctx context.Context, r v1.VerifyVPoolRequestObject) (v1.VerifyVPoolResponseObject, error) {
	name, err := a.vpoolName(ctx, r.Vpool)
	if err != nil {
		return nil, err
	}
	p, err := a.cfg.VPools.Get(ctx, name)
	if err != nil {
		return nil, err
	}
	about(ctx, "vpool "+name)
	if r.Params.DryRun {
		return nil, wouldDo("reads all that vPool "+name+" stores, and compares checksums", []string{"nothing is changed; it takes reads of its backend"}, nil, nil, "")
	}
	nodes := []uuid.UUID{p.Backend.Node}
	if p.Backend.Node == uuid.Nil {
		nodes = nil
		self, err := a.cfg.Nodes.Self()
		if err != nil {
			return nil, err
		}
		for _, n := range a.cfg.Nodes.List() {
			switch {
			case n.ID == self.ID:
				nodes = slices.Insert(nodes, 0, n.ID)
			case !n.Offline:
				nodes = append(nodes, n.ID)
			}
		}
	}
	var first v1.Task
	for i, node := range nodes {
		task, err := a.submitAt(ctx, node, upkeep.VerifyTask, "vpool "+name, schedule.Args{Only: p.ID})
		if err != nil {
			return nil, err
		}
		if i == 0 {
			first = task
		}
	}
	return v1.VerifyVPool202JSONResponse{Body: first, Headers: v1.VerifyVPool202ResponseHeaders{Location: location("tasks", first.ID.String())}}, nil
}

func (a customerAPI) DeleteVPool(ctx context.Context, r v1.DeleteVPoolRequestObject) (v1.DeleteVPoolResponseObject, error) {
	name, err := a.vpoolName(ctx, r.Vpool)
	if err != nil {
		return nil, err
	}
	p, err := a.cfg.VPools.Get(ctx, name)
	if err != nil {
		return nil, err
	}
	if _, err := based(r.Params.IfMatch, "vpool "+name, p.Rev); err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		if n := p.Disks + p.Files; n > 0 {
			return nil, &state.Error{Err: state.ErrNotEmpty, Object: "vpool " + name, Detail: fmt.Sprintf("holds %d vDisks and %d files", p.Disks, p.Files),
				Remedy: "delete what it holds first"}
		}
		return nil, wouldDo("deletes vPool "+name, []string{"NFS export /" + name + " is closed", vpool.URL(p.Backend) + " is left where it is"},
			[]string{"the vPool's settings"}, []string{"hosts that have it mounted"}, name)
	}
	if err := confirm(r.Params.Confirm, name); err != nil {
		return nil, err
	}
	return v1.DeleteVPool204Response{}, a.cfg.VPools.Delete(ctx, name)
}

func (a customerAPI) ListVDisks(ctx context.Context, r v1.ListVDisksRequestObject) (v1.ListVDisksResponseObject, error) {
	if r.Params.VPool != "" {
		if _, err := a.vpoolName(ctx, r.Params.VPool); err != nil {
			return nil, err
		}
	}
	names, err := a.cfg.VDisks.Names(r.Params.VPool)
	if err != nil {
		return nil, err
	}
	if who := callOf(ctx).who; who.VPools != nil {
		names = slices.DeleteFunc(slices.Clone(names), func(d vdisk.Listed) bool { return !who.Sees(d.VPool) })
	}
	owners := a.naming()
	describe := func(list []vdisk.Listed) []v1.VDisk {
		out := make([]v1.VDisk, 0, len(list))
		for _, d := range a.cfg.VDisks.Describe(list) {
			out = append(out, toVDisk(d, owners))
		}
		return out
	}
	if knows[vdisk.Listed](ctx) { // then the page alone is looked at
		page, err := listPageBy(ctx, names, "name", func(d vdisk.Listed) string { return d.ID.String() })
		return v1.ListVDisks200JSONResponse{Items: describe(page.items), Next: page.next, Count: page.count}, err
	}
	page, err := listPageBy(ctx, describe(names), "name", func(d v1.VDisk) string { return d.ID.String() })
	return v1.ListVDisks200JSONResponse{Items: page.items, Next: page.next, Count: page.count}, err
}

func (a customerAPI) GetVDisk(ctx context.Context, r v1.GetVDiskRequestObject) (v1.GetVDiskResponseObject, error) {
	d, err := a.vdisk(ctx, r.Vdisk)
	if err != nil {
		return nil, err
	}
	out := toVDisk(d, a.naming())
	return v1.GetVDisk200JSONResponse{Body: out, Headers: v1.GetVDisk200ResponseHeaders{ETag: etag(out.Rev)}}, nil
}

// vdisk finds one that the caller may see.
func (s *Server) vdisk(ctx context.Context, given string) (vdisk.VDisk, error) {
	name, err := s.vdiskName(ctx, given)
	if err != nil {
		return vdisk.VDisk{}, err
	}
	return s.cfg.VDisks.Get(ctx, name)
}

func (a customerAPI) CreateVDisk(ctx context.Context, r v1.CreateVDiskRequestObject) (v1.CreateVDiskResponseObject, error) {
	name, err := a.vdiskName(ctx, r.Body.Name)
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		pool, _, _ := strings.Cut(name, "/")
		p, err := a.cfg.VPools.Get(ctx, pool)
		if err != nil {
			return nil, err
		}
		if _, err := a.cfg.VDisks.Get(ctx, name); err == nil {
			return nil, &state.Error{Err: state.ErrExist, Object: "vdisk " + name}
		}
		var affected []string
		if p.SpaceKnown && int64(r.Body.Size) > p.Space.Free {
			affected = append(affected, fmt.Sprintf("vPool %s has %s free, less than this vDisk may grow to", pool, bytesize.Format(p.Space.Free)))
		}
		return nil, wouldDo("makes vDisk "+name, []string{"a sparse vDisk of " + bytesize.Format(int64(r.Body.Size)), "NBD export " + name}, nil, affected, "")
	}
	d, err := a.cfg.VDisks.Create(ctx, name, int64(r.Body.Size))
	if err != nil {
		return nil, err
	}
	out := toVDisk(d, a.naming())
	return v1.CreateVDisk201JSONResponse{Body: out, Headers: v1.CreateVDisk201ResponseHeaders{ETag: etag(out.Rev),
		Location: location("vdisks", out.Name)}}, nil
}

func (a customerAPI) PatchVDisk(ctx context.Context, r v1.PatchVDiskRequestObject) (v1.PatchVDiskResponseObject, error) {
	d, err := a.vdisk(ctx, r.Vdisk)
	if err != nil {
		return nil, err
	}
	name, in := d.FullName(), *r.Body
	if _, err := based(r.Params.IfMatch, "vdisk "+name, max(d.Volume.Rev, d.Inode.Rev)); err != nil {
		return nil, err
	}
	switch {
	case (in.Size != nil) == (in.Name != ""):
		return nil, refuse(http.StatusBadRequest, "invalid", "exactly one change at a time", "send size or name")
	case in.Size != nil:
		d, err = a.resize(ctx, d, int64(*in.Size), in.Shrink, r.Params.DryRun, r.Params.Confirm)
	default:
		if _, err := a.vdiskName(ctx, in.Name); err != nil {
			return nil, err
		}
		about(ctx, "vdisk "+name+" to "+in.Name)
		if r.Params.DryRun {
			return nil, wouldDo("renames vDisk "+name, []string{"its NBD export is " + in.Name}, nil, clientsOf(d), "")
		}
		d, err = a.cfg.VDisks.Rename(ctx, name, in.Name)
	}
	if err != nil {
		return nil, err
	}
	out := toVDisk(d, a.naming())
	return v1.PatchVDisk200JSONResponse{Body: out, Headers: v1.PatchVDisk200ResponseHeaders{ETag: etag(out.Rev)}}, nil
}

func (a customerAPI) resize(ctx context.Context, d vdisk.VDisk, size int64, shrink, dryRun bool, confirmed string) (vdisk.VDisk, error) {
	name := d.FullName()
	smaller := size < d.Info.Size
	if dryRun {
		change := []string{fmt.Sprintf("%s instead of %s", bytesize.Format(size), bytesize.Format(d.Info.Size))}
		if !smaller {
			return d, wouldDo("resizes vDisk "+name, change, nil, nil, "")
		}
		return d, wouldDo("shrinks vDisk "+name, change, []string{fmt.Sprintf("the last %s of it", bytesize.Format(d.Info.Size-size))}, clientsOf(d), name)
	}
	if smaller && shrink {
		if err := confirm(confirmed, name); err != nil {
			return d, err
		}
	}
	return a.cfg.VDisks.Resize(ctx, name, size, shrink)
}

func clientsOf(d vdisk.VDisk) []string {
	if d.Clients == 0 {
		return nil
	}
	return []string{fmt.Sprintf("%d clients have it open", d.Clients)}
}

func (a customerAPI) DeleteVDisk(ctx context.Context, r v1.DeleteVDiskRequestObject) (v1.DeleteVDiskResponseObject, error) {
	d, err := a.vdisk(ctx, r.Vdisk)
	if err != nil {
		return nil, err
	}
	name := d.FullName()
	if _, err := based(r.Params.IfMatch, "vdisk "+name, max(d.Volume.Rev, d.Inode.Rev)); err != nil {
		return nil, err
	}
	keep := time.Duration(r.Params.Keep) * time.Second
	if keep == 0 {
		keep = vdisk.TrashKeep
	}
	if keep < time.Minute || keep > 366*24*time.Hour {
		return nil, badQuery("keep", "is not a number from 60 to 31622400")
	}
	if r.Params.DryRun {
		changes, lost := []string{"its NBD export and its file " + d.Path + " go"}, []string(nil)
		if r.Params.Purge {
			lost = []string{fmt.Sprintf("%s of data in %s", bytesize.Format(d.Info.Used), name)}
		} else {
			changes = append(changes, fmt.Sprintf("its %s of data stay in the trash until %s", bytesize.Format(d.Info.Used),
				time.Now().Add(keep).UTC().Format(time.RFC3339)))
		}
		return nil, wouldDo("deletes vDisk "+name, changes, lost, clientsOf(d), name)
	}
	if err := confirm(r.Params.Confirm, name); err != nil {
		return nil, err
	}
	if r.Params.Purge {
		return v1.DeleteVDisk204Response{}, a.cfg.VDisks.Delete(ctx, name, r.Params.Force)
	}
	return v1.DeleteVDisk204Response{}, a.cfg.VDisks.Trash(ctx, name, keep, r.Params.Force)
}

const (
	blockBytes = 4096
	lbaMax     = 1 << 50
)

func (a customerAPI) ExplainVDisk(ctx context.Context, r v1.ExplainVDiskRequestObject) (v1.ExplainVDiskResponseObject, error) {
	d, err := a.vdisk(ctx, r.Vdisk)
	if err != nil {
		return nil, err
	}
	lba, offset := r.Params.LBA, r.Params.Offset
	if (lba == nil) == (offset == nil) {
		return nil, refuse(http.StatusBadRequest, "invalid", "exactly one address is needed", "send lba (in 4 KiB blocks) or offset (in bytes)")
	}
	var at int64
	if lba != nil {
		if *lba < 0 || *lba > lbaMax {
			return nil, refuse(http.StatusBadRequest, "invalid", "the address is not a number in range", "")
		}
		at = *lba * blockBytes
	} else {
		at = *offset
	}
	name := d.FullName()
	e, err := a.cfg.VDisks.Explain(ctx, name, at)
	if err != nil {
		return nil, err
	}
	out := v1.Explanation{VDisk: name, LBA: uint64(at / blockBytes), Offset: v1.Size(at), State: e.State, Seq: e.Seq, Object: e.Object,
		Index: e.Index, Detail: e.Detail, Copies: e.Copies}
	if e.State != "hole" {
		out.CRC = fmt.Sprintf("%08x", e.CRC)
	}
	return v1.ExplainVDisk200JSONResponse(out), nil
}

func (a customerAPI) ListNodes(ctx context.Context, _ v1.ListNodesRequestObject) (v1.ListNodesResponseObject, error) {
	var all []v1.Node
	for _, n := range a.cfg.Nodes.List() {
		all = append(all, a.toNode(n))
	}
	page, err := listPage(ctx, all, func(n v1.Node) string { return n.ID.String() })
	return v1.ListNodes200JSONResponse{Items: page.items, Next: page.next, Count: page.count}, err
}

func (a customerAPI) GetNode(_ context.Context, r v1.GetNodeRequestObject) (v1.GetNodeResponseObject, error) {
	n, err := a.cfg.Nodes.Get(r.Node)
	return v1.GetNode200JSONResponse{Body: a.toNode(n), Headers: v1.GetNode200ResponseHeaders{ETag: etag(n.Rev)}}, err
}

func (a customerAPI) GetStatus(ctx context.Context, _ v1.GetStatusRequestObject) (v1.GetStatusResponseObject, error) {
	st := v1.Status{State: "ok", Problems: []string{}, Services: []v1.Service{}, Version: a.cfg.Version, Started: a.started.UTC(),
		Index: a.cfg.Store.Index()}
	if n, err := a.cfg.Nodes.Self(); err == nil {
		st.Node, st.NodeID = n.Name, n.ID
	}
	if cl, ok := a.cfg.Store.View().Cluster(); ok {
		st.Cluster = cl.ID
	}
	for _, p := range a.cfg.VPools.List(ctx) {
		st.VPools++
		st.VDisks += p.Disks
		st.Files += p.Files
		st.Deleting += p.Deleting
	}
	err := a.notReady()
	if st.Ready = err == nil; err != nil {
		st.Problems = append(st.Problems, err.Error())
	}
	if a.cfg.Status != nil {
		a.cfg.Status(ctx, &st)
	}
	if len(st.Problems) > 0 {
		st.State = "degraded"
	}
	return v1.GetStatus200JSONResponse(st), nil
}

func (a customerAPI) Rebuild(ctx context.Context, r v1.RebuildRequestObject) (v1.RebuildResponseObject, error) {
	about(ctx, "vpool "+r.Body.Name)
	if a.cfg.Rebuild == nil {
		return nil, refuse(http.StatusServiceUnavailable, "unavailable", "this appliance cannot rebuild while it serves",
			"stop it and run varve rebuild")
	}
	report, err := a.cfg.Rebuild(ctx, *r.Body)
	return v1.Rebuild200JSONResponse(report), err
}

func toVPool(p vpool.VPool) v1.VPool {
	clients := p.Clients
	if clients == nil {
		clients = []string{}
	}
	return v1.VPool{Name: p.Name, ID: p.ID, Backend: vpool.URL(p.Backend), Clients: clients, Class: p.Class,
		Compression: cmp.Or(p.Compression, "none"), Encrypted: p.Encrypted,
		VDisks: p.Disks, Files: p.Files, Deleting: p.Deleting, Total: v1.Size(p.Space.Total), Free: v1.Size(p.Space.Free),
		Stored: v1.Size(p.Space.Stored), Findings: findings(p.Findings), Created: utc(p.Created), Rev: p.Rev, AsOf: since(p.Space.AsOf)}
}

// since is nil for the zero time.
func since(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC()
	return &t
}

func findings(list []state.Finding) map[string]string {
	out := make(map[string]string, len(list))
	for _, f := range list {
		out[f.Check] = f.Found
	}
	return out
}

// naming gives names to ids.
type naming struct {
	view  *state.View
	nodes map[uuid.UUID]string
}

func (s *Server) naming() naming {
	n := naming{view: s.cfg.Store.View(), nodes: make(map[uuid.UUID]string)}
	for _, node := range n.view.Nodes() {
		n.nodes[node.ID] = node.Name
	}
	return n
}

func toVDisk(d vdisk.VDisk, n naming) v1.VDisk {
	return v1.VDisk{Name: d.FullName(), VPool: d.Pool.Name, ID: d.Volume.ID, File: d.Path,
		Size: v1.Size(d.Info.Size), Used: v1.Size(d.Info.Used), Owner: n.nodes[d.Volume.Owner], Parent: n.parent(d.Volume),
		State: string(d.Volume.State), Template: d.Info.Template, Class: d.Pool.Class, Epoch: d.Volume.Epoch, Open: d.Info.Open, Clients: d.Clients,
		Pending: v1.Size(d.Info.Pending), Created: utc(d.Volume.Created), Modified: d.Info.Modified.UTC(),
		Rev: max(d.Volume.Rev, d.Inode.Rev), AsOf: since(d.Info.AsOf)}
}

func (s *Server) toNode(n state.Node) v1.Node {
	self, err := s.cfg.Nodes.Self()
	return v1.Node{Name: n.Name, ID: n.ID, Role: n.Role, Offline: n.Offline, NBD: n.NBD, NFS: n.NFS, HTTPS: n.HTTPS, Version: n.Version,
		Self: err == nil && self.ID == n.ID, Joined: utc(n.Joined), Seen: utc(n.Seen), Rev: n.Rev}
}
