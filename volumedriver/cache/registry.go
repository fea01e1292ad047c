package cache

import (
	"crypto/sha256"
	"encoding/binary"
	"sync"

	"github.com/google/uuid"
)

// objectHash stands for an object of a pool. It is what the lines on the disk name.
type objectHash [16]byte

func hashOf(pool uuid.UUID, name string) objectHash {
	var buf [16 + 256]byte
	sum := sha256.Sum256(append(append(buf[:0], pool[:]...), name...))
	return objectHash(sum[:16])
}

// print is what ghosts remember a line by.
func (h objectHash) print(line uint32) uint32 {
	return uint32(mix(binary.LittleEndian.Uint64(h[:]) + uint64(line)*0x9e3779b97f4a7c15))
}

// registry numbers the objects of which something is cached or open, so that a line's key takes eight bytes. A number is
// used again when nothing refers to it. An object that was deleted keeps its number but is found no more: what is read of it by those who
// have it open goes to no one else, even if an object of the same name is made again.
type registry struct {
	mu     sync.Mutex
	byHash map[objectHash]uint32
	all    []known
	free   []uint32
}

type known struct {
	hash  objectHash
	size  int64
	lines uint32 // cached, in both tiers, or about to be
	refs  uint32 // open handles
	dead  bool
	found bool // the backend had it since this process started
}

func newRegistry() *registry { return &registry{byHash: make(map[objectHash]uint32)} }

// open refers to an object that is known, and not only from an index: it may have been deleted after that was written.
func (r *registry) open(h objectHash) (id uint32, size int64, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	id, ok = r.byHash[h]
	if !ok || !r.all[id].found {
		return 0, 0, false
	}
	r.all[id].refs++
	return id, r.all[id].size, true
}

// add refers to an object whose size the backend just told. One of the same name and another size that was known until now is
// forgotten: the store was changed behind our back.
func (r *registry) add(h objectHash, size int64) (id uint32) {
	r.mu.Lock()
	defer r.mu.Unlock()
	id, ok := r.byHash[h]
	if ok && r.all[id].size != size {
		r.killLocked(id)
		ok = false
	}
	if !ok {
		id = r.newLocked(h, size)
	}
	r.all[id].refs++
	r.all[id].found = true
	return id
}

func (r *registry) newLocked(h objectHash, size int64) uint32 {
	var id uint32
	if n := len(r.free); n > 0 {
		id, r.free = r.free[n-1], r.free[:n-1]
	} else {
		id = uint32(len(r.all))
		r.all = append(r.all, known{})
	}
	r.all[id] = known{hash: h, size: size}
	r.byHash[h] = id
	return id
}

// use refers to an object that is referred to already.
func (r *registry) use(id uint32) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all[id].refs++
}

// close ends one open, add or use.
func (r *registry) close(id uint32) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all[id].refs--
	r.settleLocked(id)
}

// retain counts a line that is about to be cached; false if the object is deleted.
func (r *registry) retain(id uint32) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.all[id].dead {
		return false
	}
	r.all[id].lines++
	return true
}

// release uncounts a line.
func (r *registry) release(id uint32) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all[id].lines--
	r.settleLocked(id)
}

// kill makes an object unknown. The caller drops its lines.
func (r *registry) kill(h objectHash) (id uint32, size int64, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if id, ok = r.byHash[h]; !ok {
		return 0, 0, false
	}
	size = r.all[id].size
	r.all[id].refs++ // keeps the number until the caller closes it
	r.killLocked(id)
	return id, size, true
}

func (r *registry) killLocked(id uint32) {
	delete(r.byHash, r.all[id].hash)
	r.all[id].dead = true
	r.settleLocked(id)
}

func (r *registry) settleLocked(id uint32) {
	k := &r.all[id]
	if k.refs > 0 || k.lines > 0 {
		return
	}
	if !k.dead {
		delete(r.byHash, k.hash)
	}
	*k = known{dead: true}
	r.free = append(r.free, id)
}

func (r *registry) len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.byHash)
}

// describe gives an object's hash and size, if it may be found.
func (r *registry) describe(id uint32) (known, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if int(id) >= len(r.all) || r.all[id].dead {
		return known{}, false
	}
	return r.all[id], true
}

// restore makes an object known of which lines are on the disk. It is open until closed.
func (r *registry) restore(h objectHash, size int64) (uint32, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.byHash[h]; ok {
		return 0, false
	}
	id := r.newLocked(h, size)
	r.all[id].refs = 1
	return id, true
}
