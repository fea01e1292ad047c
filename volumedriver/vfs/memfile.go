package vfs

import (
	"io"
	"io/fs"
	"maps"
	"syscall"
)

const (
	memBlock    = 4096
	memSector   = 512
	chunkBlocks = 256
)

// owner marks the blocks and chunks that a Mem made since it was last cloned: only those may be changed in place.
type owner struct{ _ byte }

type page struct {
	owner *owner
	b     [memBlock]byte
}

type chunk struct {
	owner *owner
	pages [chunkBlocks]*page
}

// file is the content of an inode. Bytes from size to the end of its block are zero, and no page lies beyond. A nil page or
// chunk is a hole.
type file struct {
	chunks []*chunk
	size   int64

	// What a power cut may bring back:
	durableSize int64
	cut         int64              // smallest size it was truncated to since the last sync, or -1
	dirty       map[int64]unsynced // by block
	lost        map[int64]*page    // what is on disk of blocks that a failed sync forgot

	reserved int64 // blocks [0,reserved) count as used whether or not they are holes
	charged  int64 // blocks counted as used
}

// unsynced says what the disk may hold of a block in place of its newest bytes.
type unsynced struct {
	old *page // the synced bytes
	mid *page // a version between those and the newest, or nil
}

func newFile() *file { return &file{cut: -1} }

func (f *file) page(b int64) *page {
	i := b / chunkBlocks
	if i >= int64(len(f.chunks)) || f.chunks[i] == nil {
		return nil
	}
	return f.chunks[i].pages[b%chunkBlocks]
}

// setPage puts a page, and returns by how many blocks more the file takes space now.
func (f *file) setPage(o *owner, b int64, p *page) (growth int64) {
	i := b / chunkBlocks
	for i >= int64(len(f.chunks)) {
		if p == nil {
			return 0
		}
		f.chunks = append(f.chunks, nil)
	}
	c := f.chunks[i]
	switch {
	case c == nil && p == nil:
		return 0
	case c == nil:
		c = &chunk{owner: o}
		f.chunks[i] = c
	case c.owner != o:
		copied := *c
		copied.owner = o
		c = &copied
		f.chunks[i] = c
	}
	was := c.pages[b%chunkBlocks]
	c.pages[b%chunkBlocks] = p
	if b < f.reserved || (was == nil) == (p == nil) {
		return 0
	}
	growth = 1
	if p == nil {
		growth = -1
	}
	f.charged += growth
	return growth
}

// dropBeyond removes all pages from block b on.
func (f *file) dropBeyond(o *owner, b int64, dropped func(b int64, p *page)) (growth int64) {
	for i := b / chunkBlocks; i < int64(len(f.chunks)); i++ {
		if f.chunks[i] == nil {
			continue
		}
		for j := max(b, i*chunkBlocks); j < (i+1)*chunkBlocks; j++ {
			if p := f.page(j); p != nil {
				growth += f.setPage(o, j, nil)
				if dropped != nil {
					dropped(j, p)
				}
			}
		}
	}
	return growth
}

func (f *file) markDirty(b int64, u unsynced) {
	if f.dirty == nil {
		f.dirty = map[int64]unsynced{}
	}
	f.dirty[b] = u
}

// onDisk is what the disk holds of a block that is not dirty.
func (f *file) onDisk(b int64) *page {
	if p, ok := f.lost[b]; ok {
		return p
	}
	return f.page(b)
}

// writableLocked gives the page of block b to change in place, or nil if there is no space.
func (m *Mem) writableLocked(f *file, b int64) *page {
	cur := f.page(b)
	u, dirty := f.dirty[b]
	if dirty && cur != nil && cur.owner == m.owner && !m.rememberLocked(b) {
		return cur
	}
	if cur == nil && b >= f.reserved && m.capacity > 0 && m.used >= m.capacity {
		return nil
	}
	fresh := &page{owner: m.owner}
	if cur != nil {
		fresh.b = cur.b
	}
	if dirty {
		u.mid = cur
	} else {
		u.old = f.onDisk(b)
		delete(f.lost, b)
	}
	f.markDirty(b, u)
	m.used += f.setPage(m.owner, b, fresh)
	return fresh
}

// rememberLocked decides whether the version of an unsynced block that is about to be overwritten is kept as one that the
// disk may hold.
func (m *Mem) rememberLocked(b int64) bool { return mix(m.seed, uint64(m.clock), uint64(b))%8 == 0 }

func (m *Mem) writeLocked(n *inode, p []byte, off int64) (int, syscall.Errno) {
	m.clock++
	n.mtime = m.clock
	f, done := n.file, 0
	for done < len(p) {
		pg := m.writableLocked(f, off/memBlock)
		if pg == nil {
			return done, syscall.ENOSPC
		}
		k := copy(pg.b[off%memBlock:], p[done:])
		done += k
		off += int64(k)
		f.size = max(f.size, off)
	}
	return done, 0
}

func (m *Mem) truncateLocked(n *inode, size int64) syscall.Errno {
	m.clock++
	n.mtime = m.clock
	f := n.file
	if size >= f.size {
		f.size = size
		return 0
	}
	if tail := size % memBlock; tail != 0 && f.page(size/memBlock) != nil {
		pg := m.writableLocked(f, size/memBlock)
		if pg == nil {
			return syscall.ENOSPC
		}
		clear(pg.b[tail:])
	}
	end := (size + memBlock - 1) / memBlock
	if f.reserved > end {
		// Blocks reserved beyond the new end are given back.
		for b := end; b < f.reserved; b++ {
			if f.page(b) == nil {
				f.charged--
				m.used--
			}
		}
		f.reserved = end
	}
	m.used += f.dropBeyond(m.owner, end, func(b int64, p *page) {
		u, dirty := f.dirty[b]
		if !dirty {
			u.old = p
			if l, ok := f.lost[b]; ok {
				u.old = l
				delete(f.lost, b)
			}
		}
		u.mid = nil
		f.markDirty(b, u)
	})
	f.size = size
	if f.cut < 0 || size < f.cut {
		f.cut = size
	}
	return 0
}

func (m *Mem) preallocateLocked(f *file, size int64) syscall.Errno {
	end := (size + memBlock - 1) / memBlock
	var need int64
	for b := f.reserved; b < end; b++ {
		if f.page(b) == nil {
			need++
		}
	}
	if m.capacity > 0 && m.used+need > m.capacity {
		return syscall.ENOSPC
	}
	m.used += need
	f.charged += need
	f.reserved = max(f.reserved, end)
	return 0
}

func (f *file) synced() {
	f.dirty = nil
	f.durableSize = f.size
	f.cut = -1
}

// forget is a failed sync: the blocks count as clean, but the disk has what it had.
func (f *file) forget() {
	if f.lost == nil {
		f.lost = map[int64]*page{}
	}
	for b, u := range f.dirty {
		f.lost[b] = u.old
	}
	f.dirty = nil
}

// clone shares all blocks. Both file systems must take a new owner.
func (f *file) clone() *file {
	c := *f
	c.chunks = append([]*chunk(nil), f.chunks...)
	c.dirty = maps.Clone(f.dirty)
	c.lost = maps.Clone(f.lost)
	return &c
}

// memFile is an open file of a Mem.
type memFile struct {
	m      *Mem
	n      *inode
	name   string
	writes bool
	closed bool // guarded by m.mu
}

// readyLocked checks that the file may be used as op asks.
func (h *memFile) readyLocked(op string, write bool) error {
	switch {
	case h.closed:
		return &fs.PathError{Op: op, Path: h.name, Err: fs.ErrClosed}
	case h.n.isDir():
		return pathError(op, h.name, syscall.EISDIR)
	case write && !h.writes:
		return pathError(op, h.name, syscall.EBADF)
	}
	return nil
}

func (h *memFile) ReadAt(p []byte, off int64) (int, error) {
	h.m.mu.RLock()
	defer h.m.mu.RUnlock()
	if err := h.readyLocked("read", false); err != nil {
		return 0, err
	}
	if off < 0 {
		return 0, pathError("read", h.name, syscall.EINVAL)
	}
	f, done := h.n.file, 0
	want := int(min(int64(len(p)), max(0, f.size-off)))
	for done < want {
		at := off + int64(done)
		part := p[done:min(want, done+memBlock-int(at%memBlock))]
		if pg := f.page(at / memBlock); pg != nil {
			copy(part, pg.b[at%memBlock:])
		} else {
			clear(part)
		}
		done += len(part)
	}
	if done < len(p) {
		return done, io.EOF
	}
	return done, nil
}

func (h *memFile) TryReadAt(p []byte, off int64) error {
	n, err := h.ReadAt(p, off)
	if err == io.EOF && n > 0 {
		return ErrWouldBlock
	}
	return err
}

func (h *memFile) WriteAt(p []byte, off int64) (int, error) {
	return h.WritevAt([][]byte{p}, off)
}

func (h *memFile) WritevAt(bufs [][]byte, off int64) (int, error) {
	total := 0
	for _, b := range bufs {
		total += len(b)
	}
	h.m.call(OpWrite, h.name, off, int64(total))
	h.m.mu.Lock()
	defer h.m.mu.Unlock()
	if err := h.readyLocked("write", true); err != nil {
		return 0, err
	}
	if off < 0 {
		return 0, pathError("write", h.name, syscall.EINVAL)
	}
	done := 0
	for _, b := range bufs {
		k, errno := h.m.writeLocked(h.n, b, off+int64(done))
		done += k
		if errno != 0 {
			return done, pathError("write", h.name, errno)
		}
	}
	return done, nil
}

func (h *memFile) Sync() error     { return h.sync(OpSync) }
func (h *memFile) Datasync() error { return h.sync(OpDatasync) }

func (h *memFile) sync(op Op) error {
	h.m.call(op, h.name, 0, 0)
	h.m.mu.Lock()
	defer h.m.mu.Unlock()
	if err := h.readyLocked("sync", false); err != nil {
		return err
	}
	if takeRule(h.m.failures, h.name) {
		h.n.forget()
		return pathError("sync", h.name, syscall.EIO)
	}
	if !takeRule(h.m.lies, h.name) {
		h.n.synced()
	}
	return nil
}

func (h *memFile) Truncate(size int64) error {
	h.m.call(OpTruncate, h.name, size, 0)
	h.m.mu.Lock()
	defer h.m.mu.Unlock()
	if err := h.readyLocked("truncate", true); err != nil {
		return err
	}
	if size < 0 {
		return pathError("truncate", h.name, syscall.EINVAL)
	}
	if errno := h.m.truncateLocked(h.n, size); errno != 0 {
		return pathError("truncate", h.name, errno)
	}
	return nil
}

func (h *memFile) Preallocate(size int64) error {
	h.m.call(OpPreallocate, h.name, 0, size)
	h.m.mu.Lock()
	defer h.m.mu.Unlock()
	if err := h.readyLocked("fallocate", true); err != nil {
		return err
	}
	if errno := h.m.preallocateLocked(h.n.file, size); errno != 0 {
		return pathError("fallocate", h.name, errno)
	}
	return nil
}

func (h *memFile) Size() (int64, error) {
	h.m.mu.RLock()
	defer h.m.mu.RUnlock()
	if err := h.readyLocked("stat", false); err != nil {
		return 0, err
	}
	return h.n.size, nil
}

func (h *memFile) Close() error {
	h.m.mu.Lock()
	defer h.m.mu.Unlock()
	return h.closeLocked()
}

func (h *memFile) closeLocked() error {
	if h.closed {
		return &fs.PathError{Op: "close", Path: h.name, Err: fs.ErrClosed}
	}
	h.closed = true
	h.n.opens--
	h.m.releaseLocked(h.n)
	return nil
}
