package nfs

import (
	"context"

	"varve/gateway/nfs/rpc"
	"varve/gateway/nfs/xdr"
)

// pathBytesMax is the longest target of a symbolic link.
const pathBytesMax = 4096

// named is the directory handle and the name that most procedures begin with.
type named struct {
	dir    object
	name   string
	status Status // of the handle, then of the name
}

func (c *conn) readNamed(q *request, check func([]byte) Status) (n named) {
	n.dir, n.status = c.open(q)
	name := q.d.Opaque(rpc.RecordBytesMax)
	if n.status == StatusOK {
		n.status = check(name)
	}
	n.name = string(name[:min(len(name), nameBytesMax)])
	return n
}

func (c *conn) lookup(ctx context.Context, q *request, b []byte) ([]byte, outcome) {
	n := c.readNamed(q, oldName)
	if q.d.Bad() {
		return b, garbage
	}
	if n.dir.x == nil {
		return appendPostOp(q.fail(b, n.status), 0, nil), answered
	}
	dir, s, _ := c.attr(ctx, n.dir)
	if s != StatusOK {
		return appendPostOp(q.fail(b, s), 0, nil), answered
	}
	s = n.status
	if s == StatusInval {
		s = StatusAcces // LOOKUP has no INVAL
	}
	switch {
	case dir.Kind != Dir:
		s = StatusNotDir
	case !may(&dir, &q.Cred, wantExec):
		s = StatusAcces
	}
	var a Attr
	if s == StatusOK {
		a, s = c.resolve(ctx, n.dir, &dir, n.name)
	}
	if s != StatusOK {
		return appendPostOp(q.fail(b, s), n.dir.x.FSID, &dir), answered
	}
	b = n.dir.x.appendHandle(q.fail(b, StatusOK), a.Inode, a.Generation)
	b = appendPostOp(b, n.dir.x.FSID, &a)
	return appendPostOp(b, n.dir.x.FSID, &dir), answered
}

// resolve looks a name up, "." and the root's ".." included: nobody climbs out of an export.
func (c *conn) resolve(ctx context.Context, dir object, a *Attr, name string) (Attr, Status) {
	if name == "." || name == ".." && dir.inode == dir.x.Root {
		return *a, StatusOK
	}
	found, err := c.s.cfg.Namespace.Lookup(ctx, dir.x.FSID, dir.inode, name)
	return found, toStatus(err)
}

// dirChange is a change of names in a directory: its attributes from before, and what the reply needs from after.
type dirChange struct {
	dir    object
	ch     change
	pre    Attr
	status Status
}

// beginDir begins a change in a directory and checks what every change needs; status tells. It must be ended.
func (c *conn) beginDir(ctx context.Context, q *request, dir object) (d dirChange) {
	d.dir = dir
	d.ch = c.s.changes.begin(dir.key())
	d.pre, d.status, _ = c.attr(ctx, dir)
	switch {
	case d.status != StatusOK:
	case d.pre.Kind != Dir:
		d.status = StatusNotDir
	case dir.x.ReadOnly:
		d.status = StatusROFS
	case !may(&d.pre, &q.Cred, wantWrite|wantExec):
		d.status = StatusAcces
	}
	return d
}

// endDir appends the directory's wcc_data.
func (c *conn) endDir(ctx context.Context, b []byte, d *dirChange) []byte {
	post := c.postOp(ctx, d.dir)
	return appendWcc(b, d.dir.x.FSID, preIf(c.s.changes.end(d.ch), &d.pre), post)
}

func noWcc(b []byte) []byte { return appendWcc(b, 0, nil, nil) }

// newOwner gives a new object's owner, group and mode.
func newOwner(q *request, dir *Attr, set *SetAttr, kind Kind, mode uint32) (spec CreateSpec, s Status) {
	spec = CreateSpec{Kind: kind, Mode: mode, UID: q.Cred.UID, GID: q.Cred.GID}
	if dir.Mode&0o2000 != 0 {
		spec.GID = dir.GID
	}
	if set.Mode != nil {
		spec.Mode = *set.Mode
	}
	if set.UID != nil {
		if q.Cred.UID != 0 && *set.UID != q.Cred.UID {
			return spec, StatusPerm
		}
		spec.UID = *set.UID
	}
	if set.GID != nil {
		if q.Cred.UID != 0 && *set.GID != spec.GID && !inGroup(&q.Cred, *set.GID) {
			return spec, StatusPerm
		}
		spec.GID = *set.GID
	}
	if kind == Dir && dir.Mode&0o2000 != 0 {
		spec.Mode |= 0o2000
	}
	return spec, StatusOK
}

// times is what of sattr3 an object cannot be created with.
func times(set SetAttr) (t SetAttr, any bool) {
	t = SetAttr{Atime: set.Atime, Mtime: set.Mtime}
	return t, t.Atime != nil || t.Mtime != nil
}

// createmode3
const (
	unchecked = 0
	guarded   = 1
	exclusive = 2
)

func (c *conn) create(ctx context.Context, q *request, b []byte) ([]byte, outcome) {
	n := c.readNamed(q, newName)
	mode := q.d.Uint32()
	var set SetAttr
	var tooBig bool
	var verf [8]byte
	switch mode {
	case unchecked, guarded:
		set, tooBig = readSetAttr(&q.d)
	case exclusive:
		copy(verf[:], q.d.Fixed(8))
	default:
		q.d.Fail()
	}
	if q.d.Bad() {
		return b, garbage
	}
	if n.status != StatusOK {
		return noWcc(q.fail(b, n.status)), answered
	}
	d := c.beginDir(ctx, q, n.dir)
	s := d.status
	if s == StatusOK && tooBig {
		s = StatusFBig
	}
	var a Attr
	var err error
	if s == StatusOK {
		bits := uint32(0o644)
		if mode == exclusive {
			bits = 0o600 // until the SETATTR that follows
		}
		var spec CreateSpec
		if spec, s = newOwner(q, &d.pre, &set, Regular, bits); s == StatusOK {
			spec.Size, spec.Guarded, spec.Exclusive, spec.Verf = set.Size, mode == guarded, mode == exclusive, verf
			a, s, err = c.createFile(ctx, q, n, spec, set)
		}
	}
	if unknownOutcome(err) {
		c.s.changes.end(d.ch)
		return b, silent
	}
	return c.appendCreated(ctx, q, b, &d, s, &a), answered
}

// createFile makes a file, or takes the one there is for UNCHECKED, of which nothing but the size may change.
func (c *conn) createFile(ctx context.Context, q *request, n named, spec CreateSpec, set SetAttr) (Attr, Status, error) {
	ctx = withCaller(ctx, &q.Cred)
	ns := c.s.cfg.Namespace
	a, created, err := ns.Create(ctx, n.dir.x.FSID, n.dir.inode, n.name, spec)
	if err != nil {
		return a, toStatus(err), err
	}
	if a.Kind != Regular {
		return a, StatusExist, nil
	}
	var after SetAttr
	change := false
	if created {
		after, change = times(set)
	} else if set.Size != nil && *set.Size != a.Size {
		if !mayWriteData(&a, &q.Cred) {
			return a, StatusAcces, nil
		}
		after.Size, change = set.Size, true
	}
	if !change {
		return a, StatusOK, nil
	}
	ch := c.s.changes.begin(inodeKey{n.dir.x.FSID, a.Inode})
	a, err = ns.SetAttr(ctx, n.dir.x.FSID, a.Inode, after)
	c.s.changes.end(ch)
	return a, toStatus(err), err
}

// appendCreated writes the results of CREATE, MKDIR, SYMLINK and MKNOD, which are the same.
func (c *conn) appendCreated(ctx context.Context, q *request, b []byte, d *dirChange, s Status, a *Attr) []byte {
	b = q.fail(b, s)
	if s == StatusOK {
		b = xdr.AppendBool(b, true)
		b = d.dir.x.appendHandle(b, a.Inode, a.Generation)
		b = appendPostOp(b, d.dir.x.FSID, a)
	}
	return c.endDir(ctx, b, d)
}

func (c *conn) remove(ctx context.Context, q *request, b []byte) ([]byte, outcome) {
	return c.unlink(ctx, q, b, false)
}

func (c *conn) rmdir(ctx context.Context, q *request, b []byte) ([]byte, outcome) {
	return c.unlink(ctx, q, b, true)
}

// victimName checks a name that is to be removed or renamed: "." and ".." are never.
func victimName(name []byte) Status {
	switch string(name) {
	case ".":
		return StatusInval
	case "..":
		return StatusExist
	default:
		return oldName(name)
	}
}

func (c *conn) unlink(ctx context.Context, q *request, b []byte, directory bool) ([]byte, outcome) {
	n := c.readNamed(q, victimName)
	if q.d.Bad() {
		return b, garbage
	}
	if n.status != StatusOK {
		return noWcc(q.fail(b, n.status)), answered
	}
	ns, fsid := c.s.cfg.Namespace, n.dir.x.FSID
	d := c.beginDir(ctx, q, n.dir)
	s := d.status
	var victim Attr
	var err error
	if s == StatusOK {
		victim, err = ns.Lookup(ctx, fsid, n.dir.inode, n.name)
		s = toStatus(err)
	}
	if s == StatusOK {
		s = mayUnlink(&d.pre, &victim, &q.Cred)
	}
	switch {
	case s != StatusOK:
	case directory && victim.Kind != Dir:
		s = StatusNotDir
	case !directory && victim.Kind == Dir:
		s = StatusIsDir
	case directory:
		err = ns.Rmdir(withCaller(ctx, &q.Cred), fsid, n.dir.inode, n.name)
		s = toStatus(err)
	default:
		err = ns.Remove(withCaller(ctx, &q.Cred), fsid, n.dir.inode, n.name)
		s = toStatus(err)
		c.s.files.forget(fileKey{fsid, victim.Inode, victim.Generation})
	}
	if unknownOutcome(err) {
		c.s.changes.end(d.ch)
		return b, silent
	}
	return c.endDir(ctx, q.fail(b, s), &d), answered
}

func (c *conn) rename(ctx context.Context, q *request, b []byte) ([]byte, outcome) {
	from := c.readNamed(q, victimName)
	to := c.readNamed(q, newName)
	if q.d.Bad() {
		return b, garbage
	}
	s := from.status
	if s == StatusOK {
		s = to.status
	}
	if s == StatusOK && from.dir.x != to.dir.x {
		s = StatusXDev
	}
	if s != StatusOK {
		return noWcc(noWcc(q.fail(b, s))), answered
	}
	// Within one directory both wcc_data speak of the same change.
	df := c.beginDir(ctx, q, from.dir)
	dt := df
	if to.dir.inode != from.dir.inode {
		dt = c.beginDir(ctx, q, to.dir)
	}
	if s = df.status; s == StatusOK {
		s = dt.status
	}
	var err error
	if s == StatusOK {
		s, err = c.renameChecked(ctx, q, from, to, &df, &dt)
	}
	var postFrom, postTo *Attr
	postFrom = c.postOp(ctx, from.dir)
	aloneFrom := c.s.changes.end(df.ch)
	postTo, aloneTo := postFrom, aloneFrom
	if to.dir.inode != from.dir.inode {
		postTo = c.postOp(ctx, to.dir)
		aloneTo = c.s.changes.end(dt.ch)
	}
	if unknownOutcome(err) {
		return b, silent
	}
	fsid := from.dir.x.FSID
	b = appendWcc(q.fail(b, s), fsid, preIf(aloneFrom, &df.pre), postFrom)
	return appendWcc(b, fsid, preIf(aloneTo, &dt.pre), postTo), answered
}

func (c *conn) renameChecked(ctx context.Context, q *request, from, to named, df, dt *dirChange) (Status, error) {
	ns, fsid := c.s.cfg.Namespace, from.dir.x.FSID
	moved, err := ns.Lookup(ctx, fsid, from.dir.inode, from.name)
	if err != nil {
		return toStatus(err), err
	}
	if s := mayUnlink(&df.pre, &moved, &q.Cred); s != StatusOK {
		return s, nil
	}
	// A directory that changes its parent has its ".." rewritten.
	if moved.Kind == Dir && from.dir.inode != to.dir.inode && !may(&moved, &q.Cred, wantWrite) {
		return StatusAcces, nil
	}
	replaced, err := ns.Lookup(ctx, fsid, to.dir.inode, to.name)
	switch s := toStatus(err); {
	case s == StatusNoEnt:
	case s != StatusOK:
		return s, err
	case replaced.Inode == moved.Inode:
		return StatusOK, nil // two names of one file, or one name: nothing to do
	default:
		if s := mayUnlink(&dt.pre, &replaced, &q.Cred); s != StatusOK {
			return s, nil
		}
		// RFC 1813: the target must be compatible, or the status is EXIST.
		if (replaced.Kind == Dir) != (moved.Kind == Dir) {
			return StatusExist, nil
		}
	}
	err = ns.Rename(withCaller(ctx, &q.Cred), fsid, from.dir.inode, from.name, to.dir.inode, to.name)
	if err == nil && replaced.Inode != 0 {
		c.s.files.forget(fileKey{fsid, replaced.Inode, replaced.Generation})
	}
	return toStatus(err), err
}

func (c *conn) link(ctx context.Context, q *request, b []byte) ([]byte, outcome) {
	o, s := c.open(q)
	n := c.readNamed(q, newName)
	if q.d.Bad() {
		return b, garbage
	}
	if s == StatusOK {
		s = n.status
	}
	if s == StatusOK && n.dir.x != o.x {
		s = StatusXDev
	}
	if s != StatusOK {
		return noWcc(appendPostOp(q.fail(b, s), 0, nil)), answered
	}
	ch := c.s.changes.begin(o.key())
	d := c.beginDir(ctx, q, n.dir)
	a, s, _ := c.attr(ctx, o)
	switch {
	case s != StatusOK:
	case d.status != StatusOK:
		s = d.status
	case a.Kind == Dir:
		s = StatusInval
	}
	var err error
	if s == StatusOK {
		err = c.s.cfg.Namespace.Link(withCaller(ctx, &q.Cred), o.x.FSID, o.inode, n.dir.inode, n.name)
		s = toStatus(err)
	}
	c.s.changes.end(ch)
	if unknownOutcome(err) {
		c.s.changes.end(d.ch)
		return b, silent
	}
	b = appendPostOp(q.fail(b, s), o.x.FSID, c.postOp(ctx, o))
	return c.endDir(ctx, b, &d), answered
}
