package volumedriver

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"sync"

	"varve/volumedriver/backend"
	"varve/volumedriver/blockio"
	"varve/volumedriver/sco"
	"varve/volumedriver/seal"
)

const (
	openObjectsMax  = 2048
	objectTablesMax = 64 << 20 // bytes of CRC tables
	headerGuess     = 32 << 10 // read at once from the start of an object: the whole header, mostly
)

// openObject is an SCO that is open for reading, with the table that vouches for its blocks.
type openObject struct {
	key     uint64
	name    string
	lastLog uint64
	object  backend.Object
	table   blockTable
	bytes   int
	users   int
	evicted bool
	at      *list.Element
}

// objectCache keeps the SCOs read last open, within a count and a budget.
type objectCache struct {
	mu    sync.Mutex
	open  map[uint64]*openObject // by (volume handle, ordinal)
	order *list.List             // most recently used first
	bytes int
}

func newObjectCache() *objectCache {
	return &objectCache{open: make(map[uint64]*openObject), order: list.New()}
}

func objectKey(v *Volume, ordinal uint32) uint64 { return uint64(v.handle)<<32 | uint64(ordinal) }

// acquire gives the volume's SCO number ordinal, open. ctx nil: only if it is open already, else ErrBusy.
func (c *objectCache) acquire(ctx context.Context, v *Volume, ordinal uint32) (*openObject, error) {
	key := objectKey(v, ordinal)
	if o := c.lookup(key); o != nil {
		return o, nil
	}
	if ctx == nil {
		return nil, blockio.ErrBusy
	}
	o, err := v.openSCO(ctx, uint64(ordinal))
	if err != nil {
		return nil, err
	}
	o.key, o.users = key, 1
	c.mu.Lock()
	defer c.mu.Unlock()
	if other := c.open[key]; other != nil { // someone else was faster
		other.users++
		o.object.Close()
		return other, nil
	}
	o.at = c.order.PushFront(o)
	c.open[key] = o
	c.bytes += o.bytes
	for e := c.order.Back(); e != nil && (len(c.open) > openObjectsMax || c.bytes > objectTablesMax); e = c.order.Back() {
		old := e.Value.(*openObject)
		if old == o {
			break
		}
		c.evictLocked(old)
	}
	return o, nil
}

func (c *objectCache) lookup(key uint64) *openObject {
	c.mu.Lock()
	defer c.mu.Unlock()
	o := c.open[key]
	if o != nil {
		o.users++
		c.order.MoveToFront(o.at)
	}
	return o
}

func (c *objectCache) evictLocked(o *openObject) {
	delete(c.open, o.key)
	c.order.Remove(o.at)
	c.bytes -= o.bytes
	o.evicted = true
	if o.users == 0 {
		o.object.Close()
	}
}

func (c *objectCache) release(o *openObject) {
	c.mu.Lock()
	o.users--
	last := o.users == 0 && o.evicted
	c.mu.Unlock()
	if last {
		o.object.Close()
	}
}

// forget closes the objects of a volume, or all with v nil.
func (c *objectCache) forget(v *Volume) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for key, o := range c.open {
		if v == nil || uint32(key>>32) == uint32(v.handle) {
			c.evictLocked(o)
		}
	}
}

// openSCO opens an SCO of the volume and reads its header, whatever attempt put it there.
func (v *Volume) openSCO(ctx context.Context, seq uint64) (*openObject, error) {
	store, err := v.d.backendOf(v.root.Pool)
	if err != nil {
		return nil, err
	}
	v.mu.RLock()
	epoch := epochOf(v.root.Epochs, seq)
	v.mu.RUnlock()
	name := sco.Name(v.id, epoch, seq, 0)
	object, err := store.Open(ctx, name)
	if errors.Is(err, backend.ErrNotExist) {
		prefix := name[:len(name)-1]
		found, listErr := store.List(ctx, prefix, "", 1)
		if listErr != nil || len(found) == 0 {
			return nil, fmt.Errorf("open sco %s: %w", name, errors.Join(blockio.ErrCorrupt, err, listErr))
		}
		name = found[0].Name
		object, err = store.Open(ctx, name)
	}
	if err != nil {
		return nil, fmt.Errorf("open sco %s: %w", name, err)
	}
	h, err := readHeader(ctx, object)
	if err == nil && (h.Volume != v.id || h.Epoch != epoch || h.Seq != seq) {
		err = fmt.Errorf("it says volume %s epoch %d seq %d: %w", h.Volume, h.Epoch, h.Seq, blockio.ErrCorrupt)
	}
	if err != nil {
		object.Close()
		return nil, fmt.Errorf("read header of sco %s: %w", name, err)
	}
	t := h.Table()
	return &openObject{name: name, lastLog: h.LastLog, object: object, table: blockTable{t}, bytes: t.Bytes()}, nil
}

// readHeader reads and parses an SCO's header.
func readHeader(ctx context.Context, object backend.Object) (*sco.Header, error) {
	first := make([]byte, min(headerGuess, object.Size()))
	if err := object.ReadAt(ctx, first, 0); err != nil {
		return nil, err
	}
	n, err := sco.HeaderBytes(first)
	if err != nil {
		return nil, errors.Join(blockio.ErrCorrupt, err)
	}
	if int64(n) > object.Size() {
		return nil, fmt.Errorf("header of %d bytes in an object of %d: %w", n, object.Size(), blockio.ErrCorrupt)
	}
	if n > len(first) {
		rest := make([]byte, n-len(first))
		if err := object.ReadAt(ctx, rest, int64(len(first))); err != nil {
			return nil, err
		}
		first = append(first, rest...)
	}
	h, err := sco.Parse(first[:n], nil)
	if err != nil && !errors.Is(err, seal.ErrNoKey) {
		err = errors.Join(blockio.ErrCorrupt, err)
	}
	if err != nil {
		return nil, err
	}
	return h, nil
}

// blockTable tells whether what was read from an SCO is the block that was asked for.
type blockTable struct{ *sco.Table }

// vouches says whether block p, read at index, is block lba as it was written.
func (t blockTable) vouches(index uint32, lba uint64, p []byte) bool {
	at, ok := t.Table.LBA(index)
	if !ok || at != lba {
		return false
	}
	crc, ok := t.CRCOf(index)
	return ok && sco.Checksum(p) == crc
}
