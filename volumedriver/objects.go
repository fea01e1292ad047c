package volumedriver

import (
	"cmp"
	"container/list"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"sync"

	"github.com/google/uuid"

	"varve/volumedriver/backend"
	"varve/volumedriver/blockio"
	"varve/volumedriver/blockmap"
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
	open  map[uint64]*openObject // by (number of the volume that wrote it, ordinal)
	order *list.List             // most recently used first
	bytes int
}

func newObjectCache() *objectCache {
	return &objectCache{open: make(map[uint64]*openObject), order: list.New()}
}

// objectKey is the same for all volumes that share the SCO.
func objectKey(v *Volume, ordinal uint32) uint64 {
	return uint64(v.writer(uint64(ordinal)).Number)<<32 | uint64(ordinal)
}

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

// drop takes an object out, so that it is opened anew for whoever comes next.
func (c *objectCache) drop(o *openObject) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open[o.key] == o {
		c.evictLocked(o)
	}
}

// forgetSCO takes an SCO out by who wrote it and its number.
func (c *objectCache) forgetSCO(number uint32, seq uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if o := c.open[uint64(number)<<32|seq]; o != nil {
		c.evictLocked(o)
	}
}

// forget closes the objects that a volume wrote, or all with v nil.
func (c *objectCache) forget(v *Volume) {
	var own uint32
	if v != nil {
		spans := *v.span.Load()
		own = spans[len(spans)-1].Number
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for key, o := range c.open {
		if v == nil || uint32(key>>32) == own {
			c.evictLocked(o)
		}
	}
}

// place says where on its backend an SCO is: in an object of its own, or in a container together with others.
type place struct {
	Epoch     uint64 `json:"epoch"` // of the SCO
	Attempt   int    `json:"attempt,omitempty"`
	Prev      uint64 `json:"prev,omitempty"` // number of the SCO before it in the volume's history
	Container string `json:"in,omitempty"`   // name of the container, where it begins at
	Off       int64  `json:"off,omitempty"`
	Bytes     int64  `json:"bytes"`            // of the SCO with its header
	Blocks    int    `json:"blocks,omitempty"` // that are in it
	Last      uint64 `json:"last,omitempty"`   // its last log record
	Time      int64  `json:"time,omitempty"`   // of that, Unix nanoseconds; 0: not known
	Revert    uint64 `json:"revert,omitempty"` // it is a rollback, to the snapshot with this log sequence
}

// own says that the SCO is an object of its own.
func (p *place) own() bool { return p.Container == "" }

func (p *place) name(volume uuid.UUID, seq uint64) string {
	if p.own() {
		return sco.Name(volume, p.Epoch, seq, p.Attempt)
	}
	return p.Container
}

// after says whether p is in a later container than q. Names of one volume's containers differ in the shard, which says nothing.
func (p *place) after(q place) bool {
	_, e1, n1, a1, err1 := sco.ParseContainerName(p.Container)
	_, e2, n2, a2, err2 := sco.ParseContainerName(q.Container)
	if err1 != nil || err2 != nil {
		return err1 == nil
	}
	return cmp.Or(cmp.Compare(e1, e2), cmp.Compare(n1, n2), cmp.Compare(a1, a2)) > 0
}

func objectRecordKey(volume uuid.UUID, seq uint64) []byte {
	return binary.BigEndian.AppendUint64(objectsKey(volume), seq)
}

func (p *place) encode(volume uuid.UUID, seq uint64) blockmap.KV {
	b, err := json.Marshal(p)
	if err != nil {
		panic(fmt.Sprintf("encode the place of an SCO: %v", err)) // strings and numbers
	}
	return blockmap.KV{Key: objectRecordKey(volume, seq), Value: b}
}

// placeOf says where an SCO is.
func (d *Driver) placeOf(volume uuid.UUID, seq uint64) (place, error) {
	b, err := d.maps.Get(objectRecordKey(volume, seq))
	if err != nil {
		if errors.Is(err, blockmap.ErrNotFound) {
			err = errors.Join(blockio.ErrCorrupt, err)
		}
		return place{}, fmt.Errorf("where SCO %d of volume %s is: %w", seq, volume, err)
	}
	var p place
	if err := json.Unmarshal(b, &p); err != nil {
		return place{}, fmt.Errorf("where SCO %d of volume %s is: %w", seq, volume, errors.Join(blockio.ErrCorrupt, err))
	}
	return p, nil
}

// openSCO opens an SCO of the volume's map, whoever wrote it.
func (v *Volume) openSCO(ctx context.Context, seq uint64) (*openObject, error) {
	by := v.writer(seq)
	at, err := v.d.placeOf(by.Volume, seq)
	if err != nil {
		return nil, err
	}
	o, _, err := v.d.openPlace(ctx, v.root.Pool, by.Volume, seq, at)
	return o, err
}

// openPlace opens the SCO that is said to be at a place, with its header.
func (d *Driver) openPlace(ctx context.Context, pool, volume uuid.UUID, seq uint64, at place) (*openObject, *sco.Header, error) {
	store, err := d.backendOf(pool)
	if err != nil {
		return nil, nil, err
	}
	name := at.name(volume, seq)
	object, err := store.Open(ctx, name)
	if err != nil {
		if errors.Is(err, backend.ErrNotExist) {
			err = errors.Join(blockio.ErrCorrupt, err)
		}
		return nil, nil, fmt.Errorf("open sco %s: %w", name, err)
	}
	h, err := d.readHeaderOf(ctx, object, volume, seq, at)
	for tries := 0; errors.Is(err, blockio.ErrCorrupt) && tries < rereads; tries++ {
		discard(object)
		h, err = d.readHeaderOf(ctx, object, volume, seq, at)
	}
	if err != nil {
		object.Close()
		return nil, nil, fmt.Errorf("read header of sco %s at %d: %w", name, at.Off, err)
	}
	t := h.Table().Within(at.Off)
	return &openObject{name: name, lastLog: h.LastLog, object: object, table: blockTable{t}, bytes: t.Bytes()}, h, nil
}

// readHeaderOf reads the header of the SCO that is said to be at a place of an open object, and makes sure that it is that one.
func (d *Driver) readHeaderOf(ctx context.Context, object backend.Object, volume uuid.UUID, seq uint64, at place) (*sco.Header, error) {
	h, err := readHeader(ctx, object, at.Off, d.keys(volume))
	if err == nil && (h.Volume != volume || h.Epoch != at.Epoch || h.Seq != seq) {
		err = fmt.Errorf("it says volume %s epoch %d seq %d: %w", h.Volume, h.Epoch, h.Seq, blockio.ErrCorrupt)
	}
	return h, err
}

// eachSCO calls fn for each SCO that an object holds: itself, or what is in a container.
func (d *Driver) eachSCO(ctx context.Context, store backend.Backend, name string, fn func(*sco.Header, place) error) error {
	object, err := store.Open(ctx, name)
	if err != nil {
		return fmt.Errorf("open %s: %w", name, err)
	}
	defer object.Close()
	if id, _, _, attempt, err := sco.ParseName(name); err == nil {
		h, err := readHeader(ctx, object, 0, d.keys(id))
		if err == nil && object.Size() != h.ObjectBytes() {
			err = fmt.Errorf("%d of %d bytes: %w", object.Size(), h.ObjectBytes(), blockio.ErrCorrupt)
		}
		if err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		return fn(h, place{Epoch: h.Epoch, Attempt: attempt, Bytes: h.ObjectBytes(), Blocks: h.Blocks(), Last: h.LastLog, Revert: h.Revert})
	}
	id, _, _, _, err := sco.ParseContainerName(name)
	if err != nil {
		return err
	}
	c, err := readContainer(ctx, object)
	if err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	for _, e := range c.Entries {
		h, err := readHeader(ctx, object, e.Offset, d.keys(id))
		if err != nil {
			return fmt.Errorf("read %s at %d: %w", name, e.Offset, err)
		}
		at := place{Epoch: h.Epoch, Container: name, Off: e.Offset, Bytes: e.Bytes, Blocks: h.Blocks(), Last: h.LastLog, Revert: h.Revert}
		if err := fn(h, at); err != nil {
			return err
		}
	}
	return nil
}

func readContainer(ctx context.Context, object backend.Object) (*sco.Container, error) {
	first := make([]byte, min(headerGuess, object.Size()))
	if err := object.ReadAt(ctx, first, 0); err != nil {
		return nil, err
	}
	n, err := sco.ContainerHeaderBytes(first)
	if err == nil && int64(n) > object.Size() {
		err = sco.ErrFormat
	}
	if err != nil {
		return nil, errors.Join(blockio.ErrCorrupt, err)
	}
	if n > len(first) {
		first = make([]byte, n)
		if err := object.ReadAt(ctx, first, 0); err != nil {
			return nil, err
		}
	}
	c, err := sco.ParseContainer(first[:n])
	if err == nil && c.ObjectBytes() != object.Size() {
		err = fmt.Errorf("%d of %d bytes: %w", object.Size(), c.ObjectBytes(), sco.ErrFormat)
	}
	if err != nil {
		return nil, errors.Join(blockio.ErrCorrupt, err)
	}
	return c, nil
}

// readHeader reads and parses the header of the SCO at offset off of an object.
func readHeader(ctx context.Context, object backend.Object, off int64, keys sco.KeySource) (*sco.Header, error) {
	room := object.Size() - off
	if room <= 0 {
		return nil, fmt.Errorf("offset %d in an object of %d: %w", off, object.Size(), blockio.ErrCorrupt)
	}
	first := make([]byte, min(headerGuess, room))
	if err := object.ReadAt(ctx, first, off); err != nil {
		return nil, err
	}
	n, err := sco.HeaderBytes(first)
	if err != nil {
		return nil, errors.Join(blockio.ErrCorrupt, err)
	}
	if int64(n) > room {
		return nil, fmt.Errorf("header of %d bytes in an object of %d: %w", n, object.Size(), blockio.ErrCorrupt)
	}
	if n > len(first) {
		rest := make([]byte, n-len(first))
		if err := object.ReadAt(ctx, rest, off+int64(len(first))); err != nil {
			return nil, err
		}
		first = append(first, rest...)
	}
	h, err := sco.Parse(first[:n], keys)
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
	at, crc, ok := t.Block(index)
	return ok && at == lba && sco.Checksum(p) == crc
}
