package sco

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/google/uuid"
)

const (
	// MaxEntries is how many SCOs a container may hold.
	MaxEntries = 4096
	// MaxContainerHeaderBytes bounds a container's header.
	MaxContainerHeaderBytes = containerFixedBytes + MaxEntries*entryBytes + 4
	// MaxContainerBytes bounds a whole container. Nothing but sense asks that it be about as large as an SCO.
	MaxContainerBytes = 1 << 30

	containerFixedBytes = 64
	entryBytes          = 40
	containerVersion    = 1
)

// Container describes an object that holds several SCOs of one volume, whole, one after the other: those that scrub has made
// so small that each alone would be too small an object. The SCOs keep their numbers; only where they lie changes.
//
//	header  | "VCON" 4 | version 2 | 0 2 | entries 4 | header bytes 4 | volume 16 | epoch 8 | n 8 | created 8 | object bytes 8 |
//	        | entries x (epoch 8, seq 8, offset 8, bytes 8, live blocks 4, 0 4) | crc32c of all before 4 |
//	SCOs    | each as it would be alone, with its own header and footer |
//	footer  | "VEND" 4 | header bytes 4 | n 8 | object bytes 8 | crc32c of the header 4 | crc32c of the 28 bytes before 4 |
//
// Entries ascend by offset and lie directly one after the other. A container has no key: what it says of an SCO, the SCO's
// own header says in clear.
type Container struct {
	Volume  uuid.UUID
	Epoch   uint64 // of the owner that made it
	N       uint64 // number of the container in the volume, never used twice
	Created int64  // Unix nanoseconds
	Entries []Entry

	headerCRC uint32
}

// Entry is one SCO in a container.
type Entry struct {
	Epoch, Seq uint64
	Offset     int64 // of the SCO's header in the container
	Bytes      int64
	Live       uint32 // blocks
}

// ContainerName is the container's name on the backend.
func ContainerName(volume uuid.UUID, epoch, n uint64, attempt int) string {
	return fmt.Sprintf("c/%s/%02x/%08x-%016x-%d", volume, n&0xff, epoch, n, attempt)
}

// ContainerPrefix is what the names of all containers of the volume begin with.
func ContainerPrefix(volume uuid.UUID) string { return "c/" + volume.String() + "/" }

// ParseContainerName undoes ContainerName.
func ParseContainerName(name string) (volume uuid.UUID, epoch, n uint64, attempt int, err error) {
	volume, epoch, n, attempt, ok := parseName(name)
	if !ok || ContainerName(volume, epoch, n, attempt) != name {
		return uuid.Nil, 0, 0, 0, fmt.Errorf("%q is not the name of a container", name)
	}
	return volume, epoch, n, attempt, nil
}

func (c *Container) headerBytes() int { return containerFixedBytes + len(c.Entries)*entryBytes + 4 }

// ObjectBytes is the size of the whole object.
func (c *Container) ObjectBytes() int64 {
	if n := len(c.Entries); n > 0 {
		return c.Entries[n-1].Offset + c.Entries[n-1].Bytes + FooterBytes
	}
	return int64(c.headerBytes()) + FooterBytes
}

func (c *Container) encode() []byte {
	le := binary.LittleEndian
	b := make([]byte, 0, c.headerBytes())
	b = append(b, "VCON"...)
	b = le.AppendUint16(le.AppendUint16(b, containerVersion), 0)
	b = le.AppendUint32(le.AppendUint32(b, uint32(len(c.Entries))), uint32(c.headerBytes()))
	b = append(b, c.Volume[:]...)
	for _, v := range [...]uint64{c.Epoch, c.N, uint64(c.Created), uint64(c.ObjectBytes())} {
		b = le.AppendUint64(b, v)
	}
	for _, e := range c.Entries {
		for _, v := range [...]uint64{e.Epoch, e.Seq, uint64(e.Offset), uint64(e.Bytes), uint64(e.Live)} {
			b = le.AppendUint64(b, v)
		}
	}
	c.headerCRC = Checksum(b)
	return le.AppendUint32(b, c.headerCRC)
}

func (c *Container) footer() []byte {
	le := binary.LittleEndian
	b := append(make([]byte, 0, FooterBytes), "VEND"...)
	b = le.AppendUint32(b, uint32(c.headerBytes()))
	b = le.AppendUint64(b, c.N)
	b = le.AppendUint64(b, uint64(c.ObjectBytes()))
	b = le.AppendUint32(b, c.headerCRC)
	return le.AppendUint32(b, Checksum(b))
}

// ContainerHeaderBytes tells from the first bytes of an object (at least 16) how long its header is.
func ContainerHeaderBytes(first []byte) (int, error) {
	if len(first) < 16 || string(first[:4]) != "VCON" {
		return 0, fmt.Errorf("no container header: %w", ErrFormat)
	}
	le := binary.LittleEndian
	if v := le.Uint16(first[4:]); v != containerVersion || le.Uint16(first[6:]) != 0 {
		return 0, fmt.Errorf("container of version %d, this program reads version %d: %w", v, containerVersion, ErrUnsupported)
	}
	entries, n := le.Uint32(first[8:]), le.Uint32(first[12:])
	if entries > MaxEntries || int(n) != containerFixedBytes+int(entries)*entryBytes+4 {
		return 0, fmt.Errorf("container of %d entries with a header of %d bytes: %w", entries, n, ErrFormat)
	}
	return int(n), nil
}

// ParseContainer reads the header at the beginning of b; what follows it in b is not looked at.
func ParseContainer(b []byte) (*Container, error) {
	n, err := ContainerHeaderBytes(b)
	if err != nil {
		return nil, err
	}
	if len(b) < n {
		return nil, fmt.Errorf("container header: %d of %d bytes: %w", len(b), n, ErrFormat)
	}
	b = b[:n]
	le := binary.LittleEndian
	c := &Container{headerCRC: le.Uint32(b[n-4:]), Entries: make([]Entry, le.Uint32(b[8:]))}
	if Checksum(b[:n-4]) != c.headerCRC {
		return nil, fmt.Errorf("container header checksum: %w", ErrFormat)
	}
	copy(c.Volume[:], b[16:])
	c.Epoch, c.N, c.Created = le.Uint64(b[32:]), le.Uint64(b[40:]), int64(le.Uint64(b[48:]))
	at := int64(n)
	for i := range c.Entries {
		p := b[containerFixedBytes+i*entryBytes:]
		e := Entry{le.Uint64(p), le.Uint64(p[8:]), int64(le.Uint64(p[16:])), int64(le.Uint64(p[24:])), le.Uint32(p[32:])}
		if e.Offset != at || e.Bytes < fixedBytes+FooterBytes || e.Bytes > MaxObjectBytes || e.Live > MaxBlocks || le.Uint32(p[36:]) != 0 {
			return nil, fmt.Errorf("container entry %d of %d bytes at %d, not %d: %w", i, e.Bytes, e.Offset, at, ErrFormat)
		}
		at += e.Bytes
		c.Entries[i] = e
	}
	if c.ObjectBytes() > MaxContainerBytes || uint64(c.ObjectBytes()) != le.Uint64(b[56:]) {
		return nil, fmt.Errorf("container of %d bytes: %w", c.ObjectBytes(), ErrFormat)
	}
	return c, nil
}

// CheckFooter is nil if b is the footer of c's object.
func (c *Container) CheckFooter(b []byte) error {
	if string(b) != string(c.footer()) {
		return fmt.Errorf("container %d-%d footer: %w", c.Epoch, c.N, ErrFormat)
	}
	return nil
}

// Find gives the entry of an SCO.
func (c *Container) Find(epoch, seq uint64) (Entry, bool) {
	i := slices.IndexFunc(c.Entries, func(e Entry) bool { return e.Epoch == epoch && e.Seq == seq })
	if i < 0 {
		return Entry{}, false
	}
	return c.Entries[i], true
}

// ContainerBuilder collects SCOs for one container.
type ContainerBuilder struct {
	c      Container
	images []byte
}

// NewContainer begins a container; Entries of c are ignored. Reset may be called on the zero ContainerBuilder instead.
func NewContainer(c Container) *ContainerBuilder {
	b := &ContainerBuilder{}
	b.Reset(c)
	return b
}

// Reset begins another container in the memory of the last, whose parts are then no longer valid.
func (b *ContainerBuilder) Reset(c Container) {
	c.Entries = b.c.Entries[:0]
	b.c, b.images = c, b.images[:0]
}

// Add copies an SCO that a Builder has finished. ErrFull if there is no room.
func (b *ContainerBuilder) Add(h *Header, parts [][]byte) error {
	n := 0
	for _, p := range parts {
		n += len(p)
	}
	if h.Volume != b.c.Volume || int64(n) != h.ObjectBytes() {
		return fmt.Errorf("sco %s/%d-%d of %d bytes, not %d, in container %s/%d-%d", h.Volume, h.Epoch, h.Seq, n, h.ObjectBytes(),
			b.c.Volume, b.c.Epoch, b.c.N)
	}
	if len(b.c.Entries) == MaxEntries || MaxContainerHeaderBytes+len(b.images)+n+FooterBytes > MaxContainerBytes {
		return fmt.Errorf("sco %d-%d in container %d-%d: %w", h.Epoch, h.Seq, b.c.Epoch, b.c.N, ErrFull)
	}
	if _, ok := b.c.Find(h.Epoch, h.Seq); ok {
		return fmt.Errorf("sco %d-%d is in container %d-%d already", h.Epoch, h.Seq, b.c.Epoch, b.c.N)
	}
	b.c.Entries = append(b.c.Entries, Entry{Epoch: h.Epoch, Seq: h.Seq, Bytes: int64(n), Live: uint32(h.Blocks())})
	for _, p := range parts {
		b.images = append(b.images, p...)
	}
	return nil
}

// Bytes is about how large the container is so far.
func (b *ContainerBuilder) Bytes() int64 {
	return int64(b.c.headerBytes()) + int64(len(b.images)) + FooterBytes
}

// Entries is how many SCOs were added so far.
func (b *ContainerBuilder) Entries() int { return len(b.c.Entries) }

// Finish gives the object's bytes as parts that stay valid until Reset.
func (b *ContainerBuilder) Finish() [][]byte {
	at := int64(b.c.headerBytes())
	for i := range b.c.Entries {
		b.c.Entries[i].Offset = at
		at += b.c.Entries[i].Bytes
	}
	header := b.c.encode()
	return [][]byte{header, b.images, b.c.footer()}
}

// Container describes what Finish has built. It is valid until Reset.
func (b *ContainerBuilder) Container() *Container { return &b.c }

// VerifyContainer checks a whole container and every SCO in it.
func VerifyContainer(object []byte, keys KeySource) (*Container, error) {
	c, err := ParseContainer(object)
	if err != nil {
		return nil, err
	}
	if int64(len(object)) != c.ObjectBytes() {
		return nil, fmt.Errorf("container %d-%d: %d of %d bytes: %w", c.Epoch, c.N, len(object), c.ObjectBytes(), ErrFormat)
	}
	if err := c.CheckFooter(object[len(object)-FooterBytes:]); err != nil {
		return nil, err
	}
	for _, e := range c.Entries {
		h, err := Verify(object[e.Offset:e.Offset+e.Bytes], keys)
		if err != nil {
			return nil, fmt.Errorf("container %d-%d: %w", c.Epoch, c.N, err)
		}
		if h.Volume != c.Volume || h.Epoch != e.Epoch || h.Seq != e.Seq || h.Blocks() != int(e.Live) {
			return nil, fmt.Errorf("container %d-%d: entry of sco %d-%d holds %s/%d-%d: %w", c.Epoch, c.N, e.Epoch, e.Seq,
				h.Volume, h.Epoch, h.Seq, ErrFormat)
		}
	}
	return c, nil
}
