package vfs

import (
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Mem is a file system in memory that knows what a power cut would leave of it.
//
// What has not been synced survives at random, decided by hashes of the seed given to Crash, so equal histories and seeds give
// equal images:
//   - Each 4 KiB block written since the last Sync or Datasync of its file holds its new bytes, its synced bytes, now and then
//     an overwritten version between the two, or is torn: each 512 B sector new or old. A file's size is the synced one,
//     the new one, or between.
//   - A truncation that is not synced happens whole or not at all.
//   - Names made, renamed or removed since SyncDir of their directory: some crashes keep a prefix of these calls, as a
//     journal does; others keep any subset. A rename is never half done.
//
// A kill of the process (Kill) loses nothing, but what was not synced stays so.
//
// Cloning is cheap: blocks are copy-on-write, and a clone costs one pointer for each MiB of file, plus work for each block
// that is not synced.
type Mem struct {
	seed uint64
	seq  atomic.Int64
	hook atomic.Pointer[func(Call)]

	mu       sync.RWMutex
	root     *inode
	lastID   int64
	clock    int64    // counts changes; stands in for the time
	owner    *owner   // of the blocks that may be changed in place
	pending  []nameOp // not yet durable, in order
	locks    map[string]bool
	capacity int64 // in blocks, 0 for no limit
	used     int64 // in blocks
	lies     []syncRule
	failures []syncRule
}

// syncRule changes the next syncs of matching paths.
type syncRule struct {
	pattern string
	times   int
}

// inode is a file or a directory.
type inode struct {
	id       int64
	perm     fs.FileMode
	mtime    int64
	links    int // names
	opens    int
	*file    // nil for a directory
	dirNames // of a directory
}

// dirNames holds a directory's names as they are, and as a power cut would leave them if no pending nameOp survived.
type dirNames struct {
	names   map[string]*inode
	durable map[string]*inode // nil: the same as names
}

// nameOp is one call that changed names; it becomes durable whole.
type nameOp struct {
	id      int64
	changes []nameChange
	rmdir   *inode // the directory that it removed, or nil
}

// moves tells whether the op takes a name out of one directory and puts it into another.
func (op nameOp) moves() bool { return len(op.changes) == 2 && op.changes[0].dir != op.changes[1].dir }

type nameChange struct {
	dir  *inode
	name string
	to   *inode // nil: removed
}

// NewMem gives an empty file system. The seed decides which overwritten versions of unsynced blocks are remembered.
func NewMem(seed int64) *Mem {
	m := &Mem{seed: uint64(seed), owner: new(owner), locks: map[string]bool{}}
	m.root = m.newInode(true, 0o755)
	return m
}

// OnCall has f called before each mutating call, with no lock held: f may call Crash and Kill. nil ends that.
func (m *Mem) OnCall(f func(Call)) {
	if f == nil {
		m.hook.Store(nil)
		return
	}
	m.hook.Store(&f)
}

// Calls is the number of mutating calls so far.
func (m *Mem) Calls() int64 { return m.seq.Load() }

// SetCapacity limits the bytes that files take, in units of 4 KiB blocks; 0 for no limit.
func (m *Mem) SetCapacity(bytes int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.capacity = bytes / memBlock
}

// LieSync lets the next syncs (that many) of files or directories that match pattern return nil without making anything durable.
// A pattern without a slash is matched against the last element, one that ends in "/**" against all below.
func (m *Mem) LieSync(pattern string, times int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.lies = append(m.lies, syncRule{pattern, times})
}

// FailSync lets the next syncs that match pattern fail with EIO, and forget which blocks they should have written: reads
// still show them and later syncs succeed, yet only a new write to a block can make it durable. So Linux behaves.
func (m *Mem) FailSync(pattern string, times int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.failures = append(m.failures, syncRule{pattern, times})
}

func takeRule(rules []syncRule, name string) bool {
	for i := range rules {
		if r := &rules[i]; r.times > 0 && matchPath(r.pattern, name) {
			r.times--
			return true
		}
	}
	return false
}

func (m *Mem) call(op Op, name string, off, n int64) {
	seq := m.seq.Add(1)
	if h := m.hook.Load(); h != nil {
		(*h)(Call{Seq: seq, Op: op, Path: name, Off: off, Len: n})
	}
}

func (m *Mem) newInode(dir bool, perm fs.FileMode) *inode {
	m.lastID++
	n := &inode{id: m.lastID, perm: perm.Perm(), mtime: m.clock}
	if dir {
		n.names = map[string]*inode{}
	} else {
		n.file = newFile()
	}
	return n
}

func (n *inode) isDir() bool { return n.file == nil }

func memPath(name string) string { return path.Clean("/" + name) }

func pathError(op, name string, errno syscall.Errno) error {
	return &fs.PathError{Op: op, Path: name, Err: errno}
}

// walkLocked finds the inode of a clean path.
func (m *Mem) walkLocked(name string) (*inode, syscall.Errno) {
	n := m.root
	for name = name[1:]; name != ""; {
		var elem string
		elem, name, _ = strings.Cut(name, "/")
		if !n.isDir() {
			return nil, syscall.ENOTDIR
		}
		if n = n.names[elem]; n == nil {
			return nil, syscall.ENOENT
		}
	}
	return n, 0
}

// parentLocked finds the directory that holds a clean path's last element, and what that names, or nil.
func (m *Mem) parentLocked(name string) (dir *inode, base string, n *inode, errno syscall.Errno) {
	if name == "/" {
		return nil, "", nil, syscall.EBUSY
	}
	dir, errno = m.walkLocked(path.Dir(name))
	if errno != 0 {
		return nil, "", nil, errno
	}
	if !dir.isDir() {
		return nil, "", nil, syscall.ENOTDIR
	}
	base = path.Base(name)
	if len(base) > 255 {
		return nil, "", nil, syscall.ENAMETOOLONG
	}
	return dir, base, dir.names[base], 0
}

// changeNamesLocked does the changes now, and durably when a directory of theirs is synced.
func (m *Mem) changeNamesLocked(changes ...nameChange) {
	m.clock++
	op := nameOp{changes: changes}
	for _, c := range changes {
		if c.dir.durable == nil {
			c.dir.durable = make(map[string]*inode, len(c.dir.names)+1)
			for name, n := range c.dir.names {
				c.dir.durable[name] = n
			}
		}
		old := c.dir.names[c.name]
		if c.to == nil {
			delete(c.dir.names, c.name)
		} else {
			c.to.links++
			c.dir.names[c.name] = c.to
		}
		if old != nil {
			if old.links--; old.links == 0 && old.isDir() {
				op.rmdir = old
			}
			m.releaseLocked(old)
		}
		c.dir.mtime = m.clock
	}
	m.lastID++
	op.id = m.lastID
	m.pending = append(m.pending, op)
}

// releaseLocked frees the space of a file that has no name and is not open.
func (m *Mem) releaseLocked(n *inode) {
	if n.file != nil && n.links == 0 && n.opens == 0 {
		m.used -= n.charged
		n.charged = 0
	}
}

// syncNamesLocked makes a directory's names durable, with what these calls depend on, as a journal does: a call that touched
// two directories is durable in both, with all that came before it there, and so are the directories that it moved
// something into. The directory's own name in its parent is not.
func (m *Mem) syncNamesLocked(dir *inode) {
	if dir.durable == nil {
		return
	}
	touched := map[*inode]bool{dir: true}
	needed := map[*inode]bool{} // directories that must have a durable name
	keep := make([]bool, len(m.pending))
	for i := len(m.pending) - 1; i >= 0; i-- {
		op := m.pending[i]
		creates := false
		keep[i] = true
		for _, c := range op.changes {
			creates = creates || c.to != nil && needed[c.to]
			if creates || touched[c.dir] {
				keep[i] = false
			}
		}
		if keep[i] {
			continue
		}
		for _, c := range op.changes {
			touched[c.dir] = true
			if creates || op.moves() {
				needed[c.dir] = true
			}
		}
	}
	var rest []nameOp
	for i, op := range m.pending {
		if keep[i] {
			rest = append(rest, op)
			continue
		}
		for _, c := range op.changes {
			c.apply(c.dir.durable)
		}
	}
	m.pending = rest
	dir.durable = nil
}

func (c nameChange) apply(names map[string]*inode) {
	if c.to == nil {
		delete(names, c.name)
	} else {
		names[c.name] = c.to
	}
}

func (m *Mem) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	clean := memPath(name)
	m.mu.RLock()
	n, errno := m.walkLocked(clean)
	m.mu.RUnlock()
	switch {
	case errno == syscall.ENOENT && flag&os.O_CREATE != 0:
		m.call(OpCreate, clean, 0, 0)
	case errno == 0 && flag&os.O_TRUNC != 0 && flag&os.O_EXCL == 0 && !n.isDir():
		m.call(OpTruncate, clean, 0, 0)
	}

	m.mu.Lock()
	defer m.mu.Unlock()
	writes := flag&(os.O_WRONLY|os.O_RDWR) != 0
	n, errno = m.walkLocked(clean)
	switch {
	case errno == syscall.ENOENT && flag&os.O_CREATE != 0:
		dir, base, _, errno := m.parentLocked(clean)
		if errno != 0 {
			return nil, pathError("open", name, errno)
		}
		n = m.newInode(false, perm)
		m.changeNamesLocked(nameChange{dir, base, n})
	case errno != 0:
		return nil, pathError("open", name, errno)
	case flag&os.O_CREATE != 0 && flag&os.O_EXCL != 0:
		return nil, pathError("open", name, syscall.EEXIST)
	case n.isDir() && (writes || flag&os.O_CREATE != 0):
		return nil, pathError("open", name, syscall.EISDIR)
	case flag&os.O_TRUNC != 0 && !n.isDir():
		if errno := m.truncateLocked(n, 0); errno != 0 {
			return nil, pathError("open", name, errno)
		}
	}
	n.opens++
	return &memFile{m: m, n: n, name: clean, writes: writes}, nil
}

func (m *Mem) MkdirAll(name string, perm fs.FileMode) error {
	clean := memPath(name)
	for i := 1; i <= len(clean); i++ {
		if i < len(clean) && clean[i] != '/' || clean == "/" {
			continue
		}
		if err := m.mkdir(clean[:i], perm); err != nil {
			return err
		}
	}
	return nil
}

// mkdir makes one directory, unless it is there.
func (m *Mem) mkdir(name string, perm fs.FileMode) error {
	m.mu.RLock()
	n, errno := m.walkLocked(name)
	m.mu.RUnlock()
	if errno == 0 && n.isDir() {
		return nil
	}
	if errno == syscall.ENOENT {
		m.call(OpMkdir, name, 0, 0)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	dir, base, n, errno := m.parentLocked(name)
	if errno != 0 {
		return pathError("mkdir", name, errno)
	}
	if n == nil {
		m.changeNamesLocked(nameChange{dir, base, m.newInode(true, perm)})
	} else if !n.isDir() {
		return pathError("mkdir", name, syscall.ENOTDIR)
	}
	return nil
}

func (m *Mem) Remove(name string) error {
	clean := memPath(name)
	m.call(OpRemove, clean, 0, 0)
	m.mu.Lock()
	defer m.mu.Unlock()
	dir, base, n, errno := m.parentLocked(clean)
	switch {
	case errno != 0:
		return pathError("remove", name, errno)
	case n == nil:
		return pathError("remove", name, syscall.ENOENT)
	case n.isDir() && len(n.names) > 0:
		return pathError("remove", name, syscall.ENOTEMPTY)
	}
	m.changeNamesLocked(nameChange{dir, base, nil})
	return nil
}

func (m *Mem) RemoveAll(name string) error {
	clean := memPath(name)
	m.mu.RLock()
	n, errno := m.walkLocked(clean)
	var below []string
	if errno == 0 && n.isDir() {
		below = sortedNames(n.names)
	}
	m.mu.RUnlock()
	if errno == syscall.ENOENT {
		return nil
	}
	if errno != 0 {
		return pathError("remove", name, errno)
	}
	for _, b := range below {
		if err := m.RemoveAll(path.Join(clean, b)); err != nil {
			return err
		}
	}
	if clean == "/" {
		return nil
	}
	return m.Remove(clean)
}

func (m *Mem) Rename(from, to string) error {
	f, t := memPath(from), memPath(to)
	m.call(OpRename, t, 0, 0)
	m.mu.Lock()
	defer m.mu.Unlock()
	fail := func(errno syscall.Errno) error {
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: errno}
	}
	fdir, fbase, n, errno := m.parentLocked(f)
	if errno != 0 {
		return fail(errno)
	}
	tdir, tbase, over, errno := m.parentLocked(t)
	switch {
	case errno != 0:
		return fail(errno)
	case n == nil:
		return fail(syscall.ENOENT)
	case n == over:
		return nil
	case n.isDir() && strings.HasPrefix(t, f+"/"):
		return fail(syscall.EINVAL)
	case over != nil && over.isDir() && !n.isDir():
		return fail(syscall.EISDIR)
	case over != nil && !over.isDir() && n.isDir():
		return fail(syscall.ENOTDIR)
	case over != nil && over.isDir() && len(over.names) > 0:
		return fail(syscall.ENOTEMPTY)
	}
	m.changeNamesLocked(nameChange{tdir, tbase, n}, nameChange{fdir, fbase, nil})
	return nil
}

func (m *Mem) Link(from, to string) error {
	f, t := memPath(from), memPath(to)
	m.call(OpLink, t, 0, 0)
	m.mu.Lock()
	defer m.mu.Unlock()
	fail := func(errno syscall.Errno) error {
		return &os.LinkError{Op: "link", Old: from, New: to, Err: errno}
	}
	n, errno := m.walkLocked(f)
	if errno != 0 {
		return fail(errno)
	}
	dir, base, over, errno := m.parentLocked(t)
	switch {
	case errno != 0:
		return fail(errno)
	case over != nil:
		return fail(syscall.EEXIST)
	case n.isDir():
		return fail(syscall.EPERM)
	}
	m.changeNamesLocked(nameChange{dir, base, n})
	return nil
}

func (m *Mem) ReadDir(name string) ([]string, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	n, errno := m.walkLocked(memPath(name))
	if errno == 0 && !n.isDir() {
		errno = syscall.ENOTDIR
	}
	if errno != 0 {
		return nil, pathError("readdir", name, errno)
	}
	return sortedNames(n.names), nil
}

func sortedNames(names map[string]*inode) []string {
	s := make([]string, 0, len(names))
	for name := range names {
		s = append(s, name)
	}
	slices.Sort(s)
	return s
}

func (m *Mem) Stat(name string) (fs.FileInfo, error) {
	clean := memPath(name)
	m.mu.RLock()
	defer m.mu.RUnlock()
	n, errno := m.walkLocked(clean)
	if errno != 0 {
		return nil, pathError("stat", name, errno)
	}
	info := memInfo{name: path.Base(clean), mode: n.perm, mtime: n.mtime}
	if n.isDir() {
		info.mode |= fs.ModeDir
	} else {
		info.size = n.size
	}
	return info, nil
}

type memInfo struct {
	name  string
	size  int64
	mode  fs.FileMode
	mtime int64
}

func (i memInfo) Name() string       { return i.name }
func (i memInfo) Size() int64        { return i.size }
func (i memInfo) Mode() fs.FileMode  { return i.mode }
func (i memInfo) ModTime() time.Time { return time.Unix(i.mtime, 0) }
func (i memInfo) IsDir() bool        { return i.mode.IsDir() }
func (i memInfo) Sys() any           { return nil }

func (m *Mem) SyncDir(name string) error {
	clean := memPath(name)
	m.call(OpSyncDir, clean, 0, 0)
	m.mu.Lock()
	defer m.mu.Unlock()
	n, errno := m.walkLocked(clean)
	if errno == 0 && !n.isDir() {
		errno = syscall.ENOTDIR
	}
	if errno != 0 {
		return pathError("sync", name, errno)
	}
	if takeRule(m.failures, clean) {
		return pathError("sync", name, syscall.EIO)
	}
	if !takeRule(m.lies, clean) {
		m.syncNamesLocked(n)
	}
	return nil
}

func (m *Mem) Lock(name string) (io.Closer, error) {
	f, err := m.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	clean := memPath(name)
	if m.locks[clean] {
		f.(*memFile).closeLocked()
		return nil, pathError("lock", name, syscall.EWOULDBLOCK)
	}
	m.locks[clean] = true
	return &memLock{m: m, f: f.(*memFile)}, nil
}

type memLock struct {
	m *Mem
	f *memFile
}

func (l *memLock) Close() error {
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	if err := l.f.closeLocked(); err != nil {
		return err
	}
	delete(l.m.locks, l.f.name)
	return nil
}

// unlimited is the size that a Mem without a capacity claims to have.
const unlimited = 1 << 40 / memBlock

func (m *Mem) Space(name string) (total, available uint64, err error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if _, errno := m.walkLocked(memPath(name)); errno != 0 {
		return 0, 0, pathError("statfs", name, errno)
	}
	blocks := m.capacity
	if blocks == 0 {
		blocks = unlimited
	}
	return uint64(blocks) * memBlock, uint64(max(0, blocks-m.used)) * memBlock, nil
}
