package api

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/labstack/echo/v4"

	v1 "varve/control/api/v1"
	"varve/control/state"
	"varve/control/vdisk"
	"varve/control/vpool"
)

// route is one line of the router table, from which the test makes the matrix of who may call what.
type route struct {
	method, path string
	access       access
	handle       echo.HandlerFunc
}

func (s *Server) register() {
	const p = v1.Prefix
	s.routes = []route{
		{http.MethodGet, "/healthz", open, s.healthz},
		{http.MethodGet, "/readyz", open, s.readyz},
		{http.MethodGet, "/metrics", local, echo.WrapHandler(s.cfg.Metrics)},
		{http.MethodGet, p + "/vpools", admin, s.listVPools},
		{http.MethodPost, p + "/vpools", admin, s.createVPool},
		{http.MethodGet, p + "/vpools/:name", admin, s.getVPool},
		{http.MethodPatch, p + "/vpools/:name", admin, s.patchVPool},
		{http.MethodDelete, p + "/vpools/:name", admin, s.deleteVPool},
		{http.MethodGet, p + "/vdisks", admin, s.listVDisks},
		{http.MethodPost, p + "/vdisks", admin, s.createVDisk},
		{http.MethodGet, p + "/vdisks/*", admin, s.getVDisk},
		{http.MethodPatch, p + "/vdisks/*", admin, s.patchVDisk},
		{http.MethodDelete, p + "/vdisks/*", admin, s.deleteVDisk},
		{http.MethodGet, p + "/nodes", admin, s.listNodes},
		{http.MethodGet, p + "/nodes/:name", admin, s.getNode},
		{http.MethodGet, p + "/status", admin, s.status},
		{http.MethodGet, p + "/explain/*", admin, s.explain},
		{http.MethodPost, p + "/rebuild", admin, s.rebuild},
	}
	for _, r := range s.routes {
		s.echo.Add(r.method, r.path, s.guarded(r))
	}
}

const requestKey = "request"

func requestID(c echo.Context) string {
	id, _ := c.Get(requestKey).(string)
	return id
}

// observe gives every request an id and keeps browsers from guessing about the answers.
func (s *Server) observe(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		id := uuid.NewString()
		c.Set(requestKey, id)
		h := c.Response().Header()
		h.Set("X-Request-Id", id)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Cache-Control", "no-store")
		h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
		if c.Request().TLS != nil {
			h.Set("Strict-Transport-Security", "max-age=31536000")
		}
		return next(c)
	}
}

// guarded checks access before anything of the request is read, and logs every change.
func (s *Server) guarded(r route) echo.HandlerFunc {
	return func(c echo.Context) error {
		start := time.Now()
		who, err := s.allow(c, r.access)
		if err == nil {
			c.Request().Body = http.MaxBytesReader(c.Response(), c.Request().Body, bodyBytesMax)
			err = r.handle(c)
		}
		if r.method != http.MethodGet {
			s.cfg.Log.Info("api request", "request", requestID(c), "method", r.method, "path", c.Request().URL.Path, "who", who,
				"from", c.Request().RemoteAddr, "took", time.Since(start), "err", err)
		}
		return err
	}
}

func (s *Server) healthz(c echo.Context) error { return c.String(http.StatusOK, "ok\n") }

func (s *Server) readyz(c echo.Context) error {
	if err := s.notReady(); err != nil {
		return &v1.Problem{Status: http.StatusServiceUnavailable, Code: "unavailable", Title: "Not ready", Detail: err.Error()}
	}
	return c.String(http.StatusOK, "ready\n")
}

func (s *Server) notReady() error {
	if err := s.cfg.Store.Halted(); err != nil {
		return err
	}
	if s.cfg.Ready == nil {
		return nil
	}
	return s.cfg.Ready()
}

func (s *Server) listVPools(c echo.Context) error {
	pools := s.cfg.VPools.List(c.Request().Context())
	out := make([]v1.VPool, 0, len(pools))
	for _, p := range pools {
		out = append(out, toVPool(p))
	}
	return c.JSON(http.StatusOK, out)
}

func (s *Server) getVPool(c echo.Context) error {
	p, err := s.cfg.VPools.Get(c.Request().Context(), c.Param("name"))
	if err != nil {
		return err
	}
	return c.JSON(http.StatusOK, toVPool(p))
}

func (s *Server) createVPool(c echo.Context) error {
	var in v1.VPoolCreate
	if err := decode(c.Request(), &in); err != nil {
		return err
	}
	p, err := s.cfg.VPools.Create(c.Request().Context(), vpool.Spec{Name: in.Name, Backend: in.Backend, Clients: in.Clients})
	if err != nil {
		return err
	}
	c.Response().Header().Set("Location", v1.Prefix+"/vpools/"+url.PathEscape(p.Name))
	return c.JSON(http.StatusCreated, toVPool(p))
}

func (s *Server) patchVPool(c echo.Context) error {
	var in v1.VPoolPatch
	if err := decode(c.Request(), &in); err != nil {
		return err
	}
	if in.Clients == nil {
		return refuse(http.StatusBadRequest, "invalid", "nothing to change", "send clients")
	}
	p, err := s.cfg.VPools.SetClients(c.Request().Context(), c.Param("name"), in.Rev, in.Clients)
	if err != nil {
		return err
	}
	return c.JSON(http.StatusOK, toVPool(p))
}

func (s *Server) deleteVPool(c echo.Context) error {
	if err := s.cfg.VPools.Delete(c.Request().Context(), c.Param("name")); err != nil {
		return err
	}
	return c.NoContent(http.StatusNoContent)
}

// rest is the decoded path behind a wildcard route's prefix.
func rest(c echo.Context, prefix string) string {
	return strings.TrimPrefix(c.Request().URL.Path, v1.Prefix+prefix)
}

func (s *Server) listVDisks(c echo.Context) error {
	disks, err := s.cfg.VDisks.List(c.Request().Context(), c.QueryParam("vpool"))
	if err != nil {
		return err
	}
	out := make([]v1.VDisk, 0, len(disks))
	for _, d := range disks {
		out = append(out, s.toVDisk(d))
	}
	return c.JSON(http.StatusOK, out)
}

func (s *Server) getVDisk(c echo.Context) error {
	d, err := s.cfg.VDisks.Get(c.Request().Context(), rest(c, "/vdisks/"))
	if err != nil {
		return err
	}
	return c.JSON(http.StatusOK, s.toVDisk(d))
}

func (s *Server) createVDisk(c echo.Context) error {
	var in v1.VDiskCreate
	if err := decode(c.Request(), &in); err != nil {
		return err
	}
	d, err := s.cfg.VDisks.Create(c.Request().Context(), in.Name, int64(in.Size))
	if err != nil {
		return err
	}
	c.Response().Header().Set("Location", (&url.URL{Path: v1.Prefix + "/vdisks/" + d.FullName()}).EscapedPath())
	return c.JSON(http.StatusCreated, s.toVDisk(d))
}

func (s *Server) patchVDisk(c echo.Context) error {
	var in v1.VDiskPatch
	if err := decode(c.Request(), &in); err != nil {
		return err
	}
	name := rest(c, "/vdisks/")
	var d vdisk.VDisk
	var err error
	switch {
	case (in.Size != nil) == (in.Name != ""):
		return refuse(http.StatusBadRequest, "invalid", "exactly one change at a time", "send size or name")
	case in.Size != nil:
		d, err = s.cfg.VDisks.Resize(c.Request().Context(), name, int64(*in.Size), in.Shrink)
	default:
		d, err = s.cfg.VDisks.Rename(c.Request().Context(), name, in.Name)
	}
	if err != nil {
		return err
	}
	return c.JSON(http.StatusOK, s.toVDisk(d))
}

func (s *Server) deleteVDisk(c echo.Context) error {
	force := false
	if q := c.QueryParam("force"); q != "" {
		var err error
		if force, err = strconv.ParseBool(q); err != nil {
			return refuse(http.StatusBadRequest, "invalid", "force is neither true nor false", "")
		}
	}
	if err := s.cfg.VDisks.Delete(c.Request().Context(), rest(c, "/vdisks/"), force); err != nil {
		return err
	}
	return c.NoContent(http.StatusNoContent)
}

func (s *Server) listNodes(c echo.Context) error {
	nodes := s.cfg.Nodes.List()
	out := make([]v1.Node, 0, len(nodes))
	for _, n := range nodes {
		out = append(out, s.toNode(n))
	}
	return c.JSON(http.StatusOK, out)
}

func (s *Server) getNode(c echo.Context) error {
	n, err := s.cfg.Nodes.Get(c.Param("name"))
	if err != nil {
		return err
	}
	return c.JSON(http.StatusOK, s.toNode(n))
}

func (s *Server) status(c echo.Context) error {
	st := v1.Status{State: "ok", Problems: []string{}, Services: []v1.Service{}, Version: s.cfg.Version, Started: s.started.UTC(),
		Index: s.cfg.Store.Index()}
	if n, err := s.cfg.Nodes.Self(); err == nil {
		st.Node, st.NodeID = n.Name, n.ID
	}
	if cl, ok := s.cfg.Store.View().Cluster(); ok {
		st.Cluster = cl.ID
	}
	for _, p := range s.cfg.VPools.List(c.Request().Context()) {
		st.VPools++
		st.VDisks += p.Disks
		st.Files += p.Files
		st.Deleting += p.Deleting
	}
	err := s.notReady()
	if st.Ready = err == nil; err != nil {
		st.Problems = append(st.Problems, err.Error())
	}
	if s.cfg.Status != nil {
		s.cfg.Status(c.Request().Context(), &st)
	}
	if len(st.Problems) > 0 {
		st.State = "degraded"
	}
	return c.JSON(http.StatusOK, st)
}

const blockBytes = 4096

func (s *Server) explain(c echo.Context) error {
	lba, offset := c.QueryParam("lba"), c.QueryParam("offset")
	if (lba == "") == (offset == "") {
		return refuse(http.StatusBadRequest, "invalid", "exactly one address is needed",
			"send lba (in 4 KiB blocks) or offset (in bytes)")
	}
	at, err := strconv.ParseUint(lba+offset, 10, 63)
	if err != nil || lba != "" && at > 1<<50 {
		return refuse(http.StatusBadRequest, "invalid", "the address is not a number in range", "")
	}
	if lba != "" {
		at *= blockBytes
	}
	name := rest(c, "/explain/")
	e, err := s.cfg.VDisks.Explain(c.Request().Context(), name, int64(at))
	if err != nil {
		return err
	}
	out := v1.Explanation{VDisk: name, LBA: at / blockBytes, Offset: v1.Size(at), State: e.State, Seq: e.Seq, Object: e.Object,
		Index: e.Index, Detail: e.Detail}
	if e.State != "hole" {
		out.CRC = fmt.Sprintf("%08x", e.CRC)
	}
	return c.JSON(http.StatusOK, out)
}

// rebuild reads a whole backend, which takes longer than any other call: its deadlines are lifted.
func (s *Server) rebuild(c echo.Context) error {
	var in v1.RebuildRequest
	if err := decode(c.Request(), &in); err != nil {
		return err
	}
	if s.cfg.Rebuild == nil {
		return refuse(http.StatusServiceUnavailable, "unavailable", "this appliance cannot rebuild while it serves",
			"stop it and run varve rebuild")
	}
	rc := http.NewResponseController(c.Response())
	err := errors.Join(rc.SetReadDeadline(time.Time{}), rc.SetWriteDeadline(time.Time{}))
	if err != nil && !errors.Is(err, http.ErrNotSupported) {
		return fmt.Errorf("lift the deadlines of a rebuild: %w", err)
	}
	report, err := s.cfg.Rebuild(c.Request().Context(), in)
	if err != nil {
		return err
	}
	return c.JSON(http.StatusOK, report)
}

func utc(t state.Time) time.Time { return time.Unix(0, int64(t)).UTC() }

func toVPool(p vpool.VPool) v1.VPool {
	clients := p.Clients
	if clients == nil {
		clients = []string{}
	}
	return v1.VPool{Name: p.Name, ID: p.ID, Backend: p.Backend.Kind + "://" + p.Backend.Dir, Clients: clients, Class: p.Class,
		VDisks: p.Disks, Files: p.Files, Deleting: p.Deleting, Total: v1.Size(p.Space.Total), Free: v1.Size(p.Space.Free),
		Stored: v1.Size(p.Space.Stored), Findings: p.Findings, Created: utc(p.Created), Rev: p.Rev}
}

func (s *Server) toVDisk(d vdisk.VDisk) v1.VDisk {
	out := v1.VDisk{Name: d.FullName(), VPool: d.Pool.Name, ID: d.Volume.ID, File: d.Path,
		Size: v1.Size(d.Info.Size), Used: v1.Size(d.Info.Used),
		State: string(d.Volume.State), Class: d.Pool.Class, Epoch: d.Volume.Epoch, Open: d.Info.Open, Clients: d.Clients,
		Pending: v1.Size(d.Info.Pending), Created: utc(d.Volume.Created), Modified: d.Info.Modified.UTC(),
		Rev: max(d.Volume.Rev, d.Inode.Rev)}
	if n, err := s.cfg.Store.View().Node(d.Volume.Owner); err == nil {
		out.Owner = n.Name
	}
	return out
}

func (s *Server) toNode(n state.Node) v1.Node {
	self, err := s.cfg.Nodes.Self()
	return v1.Node{Name: n.Name, ID: n.ID, Role: n.Role, NBD: n.NBD, NFS: n.NFS, HTTPS: n.HTTPS, Version: n.Version,
		Self: err == nil && self.ID == n.ID, Joined: utc(n.Joined), Seen: utc(n.Seen)}
}
