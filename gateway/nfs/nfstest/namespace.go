// Package nfstest is a namespace in memory, for tests of the NFS gateway and of its clients. It behaves as a namespace
// over a volume driver must, and more: its files know which bytes are durable, so that Crash shows what a power cut leaves,
// and tests can make them busy, slow or failing.
package nfstest

import (
	"context"
	"net/netip"
	"slices"
	"sort"
	"sync"
	"time"

	"varve/gateway/nfs"
)

// Namespace implements nfs.Namespace in memory.
type Namespace struct {
	// Behave is how all files behave.
	Behave Behaviour

	mu      sync.Mutex
	exports []nfs.Export
	trees   map[uint64]*tree
	last    time.Time
	opened  int
}

type tree struct {
	inodes map[uint64]*inode
	next   uint64
}

type inode struct {
	attr    nfs.Attr
	parent  uint64
	names   map[string]*entry
	order   []*entry // by cookie; removed ones have inode 0 until they are too many
	removed int
	cookie  uint64
	target  string
	verf    *[8]byte
	file    *File
}

type entry struct {
	cookie uint64
	name   string
	inode  uint64
}

// New makes a namespace with the exports, each with an empty root directory that everybody may write to. Exports without
// a root or a key get one.
func New(exports ...nfs.Export) *Namespace {
	n := &Namespace{trees: make(map[uint64]*tree)}
	for _, e := range exports {
		if e.Root == 0 {
			e.Root = 2
		}
		if e.Key == ([32]byte{}) {
			e.Key = [32]byte{1, byte(e.FSID), byte(e.FSID >> 8)}
		}
		t := &tree{inodes: make(map[uint64]*inode), next: e.Root + 1}
		now := n.nowLocked()
		t.inodes[e.Root] = &inode{parent: e.Root, names: make(map[string]*entry), attr: nfs.Attr{
			Inode: e.Root, Generation: 1, Kind: nfs.Dir, Mode: 0o777, Nlink: 2, FSID: e.FSID, Size: 4096, Used: 4096,
			Atime: now, Mtime: now, Ctime: now,
		}}
		n.trees[e.FSID] = t
		n.exports = append(n.exports, e)
	}
	return n
}

// Loopback is an export that every loopback address may use.
func Loopback(fsid uint64, path string) nfs.Export {
	return nfs.Export{FSID: fsid, Path: path, AnonUID: 65534, AnonGID: 65534,
		Clients: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}}
}

// SetExports replaces the exports; their trees stay.
func (n *Namespace) SetExports(f func([]nfs.Export) []nfs.Export) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.exports = f(slices.Clone(n.exports))
}

// Opened is how many files are open now.
func (n *Namespace) Opened() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.opened
}

// Crash makes every file what a power cut leaves of it: what was not made durable is gone.
func (n *Namespace) Crash() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, t := range n.trees {
		for _, i := range t.inodes {
			if i.file != nil {
				i.file.crash()
			}
		}
	}
}

// File returns the file at a path of names, nil if there is none.
func (n *Namespace) File(fsid uint64, names ...string) *File {
	n.mu.Lock()
	defer n.mu.Unlock()
	i := n.trees[fsid].inodes[n.rootLocked(fsid)]
	for _, name := range names {
		e := i.names[name]
		if e == nil {
			return nil
		}
		i = n.trees[fsid].inodes[e.inode]
	}
	return i.file
}

func (n *Namespace) rootLocked(fsid uint64) uint64 {
	for _, e := range n.exports {
		if e.FSID == fsid {
			return e.Root
		}
	}
	return 0
}

// nowLocked never returns the same time twice, so that every change shows.
func (n *Namespace) nowLocked() time.Time {
	now := time.Now().Round(0)
	if !now.After(n.last) {
		now = n.last.Add(1)
	}
	n.last = now
	return now
}

func (n *Namespace) now() time.Time {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.nowLocked()
}

func (n *Namespace) findLocked(fsid, number uint64) (*tree, *inode, error) {
	t := n.trees[fsid]
	if t == nil {
		return nil, nil, nfs.ErrStale
	}
	i := t.inodes[number]
	if i == nil {
		return t, nil, nfs.ErrStale
	}
	return t, i, nil
}

func (n *Namespace) dirLocked(fsid, number uint64) (*tree, *inode, error) {
	t, i, err := n.findLocked(fsid, number)
	if err == nil && i.attr.Kind != nfs.Dir {
		err = nfs.ErrNotDir
	}
	return t, i, err
}

// attrOf is the inode's attributes with what only its file knows.
func (i *inode) attrOf() nfs.Attr {
	a := i.attr
	if i.file != nil {
		size, used, mtime := i.file.state()
		a.Size, a.Used = size, used
		if mtime.After(a.Mtime) && !i.file.timeSet() {
			a.Mtime = mtime
		}
		if mtime.After(a.Ctime) {
			a.Ctime = mtime
		}
	}
	return a
}

// Exports implements nfs.Namespace.
func (n *Namespace) Exports() []nfs.Export {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.exports)
}

// Attr implements nfs.Namespace.
func (n *Namespace) Attr(_ context.Context, fsid, number uint64, generation uint32) (nfs.Attr, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	_, i, err := n.findLocked(fsid, number)
	if err != nil {
		return nfs.Attr{}, err
	}
	if generation != 0 && generation != i.attr.Generation {
		return nfs.Attr{}, nfs.ErrStale
	}
	return i.attrOf(), nil
}

// Lookup implements nfs.Namespace.
func (n *Namespace) Lookup(_ context.Context, fsid, dir uint64, name string) (nfs.Attr, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	t, d, err := n.dirLocked(fsid, dir)
	if err != nil {
		return nfs.Attr{}, err
	}
	if name == ".." {
		return t.inodes[d.parent].attrOf(), nil
	}
	e := d.names[name]
	if e == nil {
		return nfs.Attr{}, nfs.ErrNotFound
	}
	return t.inodes[e.inode].attrOf(), nil
}

func (d *inode) add(name string, number uint64) {
	d.cookie++
	e := &entry{cookie: d.cookie, name: name, inode: number}
	d.names[name] = e
	d.order = append(d.order, e)
}

func (d *inode) drop(name string) {
	d.names[name].inode = 0
	delete(d.names, name)
	d.removed++
	if d.removed > 64 && d.removed > len(d.order)/2 {
		d.order = slices.DeleteFunc(d.order, func(e *entry) bool { return e.inode == 0 })
		d.removed = 0
	}
}

func (d *inode) touch(now time.Time) { d.attr.Mtime, d.attr.Ctime = now, now }

// Create implements nfs.Namespace.
func (n *Namespace) Create(ctx context.Context, fsid, dir uint64, name string, spec nfs.CreateSpec) (nfs.Attr, bool, error) {
	if err := await(ctx, &n.Behave.HoldNames); err != nil {
		return nfs.Attr{}, false, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	t, d, err := n.dirLocked(fsid, dir)
	if err != nil {
		return nfs.Attr{}, false, err
	}
	if e := d.names[name]; e != nil {
		i := t.inodes[e.inode]
		same := spec.Exclusive && i.verf != nil && *i.verf == spec.Verf
		if same || !spec.Guarded && !spec.Exclusive && spec.Kind == nfs.Regular && i.attr.Kind == nfs.Regular {
			return i.attrOf(), same, nil
		}
		return nfs.Attr{}, false, nfs.ErrExist
	}
	now := n.nowLocked()
	i := &inode{parent: dir, target: spec.Target, attr: nfs.Attr{
		Inode: t.next, Generation: 1, Kind: spec.Kind, Mode: spec.Mode, UID: spec.UID, GID: spec.GID, Nlink: 1, FSID: fsid,
		Atime: now, Mtime: now, Ctime: now, Size: int64(len(spec.Target)),
	}}
	t.next++
	switch spec.Kind {
	case nfs.Dir:
		i.names = make(map[string]*entry)
		i.attr.Nlink, i.attr.Size, i.attr.Used = 2, 4096, 4096
		d.attr.Nlink++
	case nfs.Regular:
		i.file = newFile(n)
		if spec.Size != nil {
			i.file.resize(*spec.Size, now)
		}
		if spec.Exclusive {
			verf := spec.Verf
			i.verf = &verf
		}
	}
	t.inodes[i.attr.Inode] = i
	d.add(name, i.attr.Inode)
	d.touch(now)
	return i.attrOf(), true, nil
}

// SetAttr implements nfs.Namespace.
func (n *Namespace) SetAttr(_ context.Context, fsid, number uint64, set nfs.SetAttr) (nfs.Attr, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	_, i, err := n.findLocked(fsid, number)
	if err != nil {
		return nfs.Attr{}, err
	}
	if set.Guard != nil && !set.Guard.Equal(i.attrOf().Ctime) {
		return nfs.Attr{}, nfs.ErrNotSync
	}
	now := n.nowLocked()
	if set.Size != nil {
		if i.attr.Kind == nfs.Dir {
			return nfs.Attr{}, nfs.ErrIsDir
		}
		if i.file == nil {
			return nfs.Attr{}, nfs.ErrInvalid
		}
		i.file.resize(*set.Size, now)
	}
	for _, f := range []struct{ to, from *uint32 }{{&i.attr.Mode, set.Mode}, {&i.attr.UID, set.UID}, {&i.attr.GID, set.GID}} {
		if f.from != nil {
			*f.to = *f.from
		}
	}
	if set.AtimeNow {
		i.attr.Atime = now
	}
	if set.Atime != nil {
		i.attr.Atime = *set.Atime
	}
	mtime := set.Mtime
	if set.MtimeNow {
		mtime = &now
	}
	if mtime != nil {
		i.attr.Mtime = *mtime
		if i.file != nil {
			i.file.setTime()
		}
	}
	i.attr.Ctime = now
	return i.attrOf(), nil
}

// Remove implements nfs.Namespace.
func (n *Namespace) Remove(ctx context.Context, fsid, dir uint64, name string) error {
	if err := await(ctx, &n.Behave.HoldNames); err != nil {
		return err
	}
	return n.unlink(fsid, dir, name, false)
}

// Rmdir implements nfs.Namespace.
func (n *Namespace) Rmdir(_ context.Context, fsid, dir uint64, name string) error {
	return n.unlink(fsid, dir, name, true)
}

func (n *Namespace) unlink(fsid, dir uint64, name string, directory bool) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	t, d, err := n.dirLocked(fsid, dir)
	if err != nil {
		return err
	}
	e := d.names[name]
	if e == nil {
		return nfs.ErrNotFound
	}
	i := t.inodes[e.inode]
	switch {
	case directory && i.attr.Kind != nfs.Dir:
		return nfs.ErrNotDir
	case !directory && i.attr.Kind == nfs.Dir:
		return nfs.ErrIsDir
	case len(i.names) > 0:
		return nfs.ErrNotEmpty
	}
	now := n.nowLocked()
	d.drop(name)
	d.touch(now)
	t.unlinkedLocked(d, i, now)
	return nil
}

// unlinkedLocked takes one name off an inode, the last one ends it.
func (t *tree) unlinkedLocked(d, i *inode, now time.Time) {
	if i.attr.Kind == nfs.Dir {
		d.attr.Nlink--
		i.attr.Nlink = 0
	} else {
		i.attr.Nlink--
	}
	i.attr.Ctime = now
	if i.attr.Nlink == 0 {
		delete(t.inodes, i.attr.Inode)
	}
}

// Rename implements nfs.Namespace.
func (n *Namespace) Rename(ctx context.Context, fsid, fromDir uint64, from string, toDir uint64, to string) error {
	if err := await(ctx, &n.Behave.HoldNames); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	t, fd, err := n.dirLocked(fsid, fromDir)
	if err != nil {
		return err
	}
	_, td, err := n.dirLocked(fsid, toDir)
	if err != nil {
		return err
	}
	e := fd.names[from]
	if e == nil {
		return nfs.ErrNotFound
	}
	i := t.inodes[e.inode]
	for up := td; ; up = t.inodes[up.parent] {
		if up == i {
			return nfs.ErrInvalid
		}
		if up.parent == up.attr.Inode {
			break
		}
	}
	now := n.nowLocked()
	if over := td.names[to]; over != nil {
		r := t.inodes[over.inode]
		switch {
		case r == i:
			return nil
		case r.attr.Kind == nfs.Dir && i.attr.Kind != nfs.Dir:
			return nfs.ErrIsDir
		case r.attr.Kind != nfs.Dir && i.attr.Kind == nfs.Dir:
			return nfs.ErrNotDir
		case len(r.names) > 0:
			return nfs.ErrNotEmpty
		}
		td.drop(to)
		t.unlinkedLocked(td, r, now)
	}
	fd.drop(from)
	td.add(to, i.attr.Inode)
	if i.attr.Kind == nfs.Dir && fd != td {
		fd.attr.Nlink--
		td.attr.Nlink++
	}
	i.parent = toDir
	i.attr.Ctime = now
	fd.touch(now)
	td.touch(now)
	return nil
}

// Link implements nfs.Namespace.
func (n *Namespace) Link(_ context.Context, fsid, number, dir uint64, name string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	_, i, err := n.findLocked(fsid, number)
	if err != nil {
		return err
	}
	_, d, err := n.dirLocked(fsid, dir)
	if err != nil {
		return err
	}
	if d.names[name] != nil {
		return nfs.ErrExist
	}
	now := n.nowLocked()
	d.add(name, number)
	d.touch(now)
	i.attr.Nlink++
	i.attr.Ctime = now
	return nil
}

// Readlink implements nfs.Namespace.
func (n *Namespace) Readlink(_ context.Context, fsid, number uint64) (string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	_, i, err := n.findLocked(fsid, number)
	if err != nil {
		return "", err
	}
	if i.attr.Kind != nfs.Symlink {
		return "", nfs.ErrInvalid
	}
	return i.target, nil
}

// ReadDir implements nfs.Namespace.
func (n *Namespace) ReadDir(_ context.Context, fsid, dir uint64, after uint64, max int) ([]nfs.Entry, bool, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	t, d, err := n.dirLocked(fsid, dir)
	if err != nil {
		return nil, false, err
	}
	at := sort.Search(len(d.order), func(k int) bool { return d.order[k].cookie > after })
	var list []nfs.Entry
	for ; at < len(d.order); at++ {
		e := d.order[at]
		if e.inode == 0 {
			continue
		}
		if len(list) == max {
			return list, false, nil
		}
		list = append(list, nfs.Entry{Cookie: e.cookie, Name: e.name, Attr: t.inodes[e.inode].attrOf()})
	}
	return list, true, nil
}

// Space implements nfs.Namespace: a terabyte, less what files use.
func (n *Namespace) Space(_ context.Context, fsid uint64) (total, free, avail uint64, files, ffree uint64, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	t := n.trees[fsid]
	if t == nil {
		return 0, 0, 0, 0, 0, nfs.ErrStale
	}
	used := uint64(0)
	for _, i := range t.inodes {
		used += uint64(i.attrOf().Used)
	}
	const bytes, inodes = 1 << 40, 1 << 20
	return bytes, bytes - used, bytes - used, inodes, inodes - uint64(len(t.inodes)), nil
}

// Open implements nfs.Namespace.
func (n *Namespace) Open(_ context.Context, fsid, number uint64) (nfs.File, func(), error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	_, i, err := n.findLocked(fsid, number)
	if err != nil {
		return nil, nil, err
	}
	if i.file == nil {
		return nil, nil, nfs.ErrInvalid
	}
	n.opened++
	var once sync.Once
	return i.file, func() {
		once.Do(func() {
			n.mu.Lock()
			n.opened--
			n.mu.Unlock()
		})
	}, nil
}
