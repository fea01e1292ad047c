// Package sco is the format of the volume driver's immutable objects on a backend: the SCO, which carries the net effect
// of a stretch of one volume's log, and the root, which carries what else a bucket must hold so that the volume can be
// rebuilt from it alone.
//
// # What an SCO means
//
// An SCO of (volume, epoch, seq) covers the volume's log records with FirstLog < sequence <= LastLog. Applying it to the
// volume's state at FirstLog gives the state at LastLog:
//
//	for each range in Zeros:    every block of the range reads as zeros
//	for each extent in Extents: its blocks take the object's next blocks     (after all Zeros, so data wins)
//	the volume's size is Size, its modification time ModTime
//
// A truncation is a zero range that reaches as far as the volume may have been long. PrevEpoch and PrevSeq name the SCO
// before this one (0, 0 for the first); its LastLog is this one's FirstLog. Follow checks that, and a rebuild accepts SCOs
// up to the first that does not follow. Block i of the data is the object's block index i, which the block map stores.
//
// # Format
//
// All integers are little endian; the header is padded with zeros to a multiple of 4096 bytes.
//
//	header   | "VSCO" 4 | version 2 | codec 1 | kind 1 | header bytes 4 | header crc 4 | volume 16 | epoch 8 | seq 8 |
//	         | first log 8 | last log 8 | prev epoch 8 | prev seq 8 | size 8 | mod time 8 | created 8 |
//	         | zeros 4 | extents 4 | blocks 4 | flags 4 | data bytes 8 |                                    = 128 bytes
//	         | zeros    x (lba 8, blocks 8) |      ascending, disjoint, not adjacent
//	         | extents  x (lba 8, blocks 4) |      ascending, disjoint, not adjacent
//	         | blocks   x crc32c of the plaintext block 4 |
//	data     | blocks x 4096 |
//	footer   | "VEND" 4 | header bytes 4 | seq 8 | object bytes 8 | header crc 4 | crc32c of the 28 bytes before 4 |
//
// The header crc is the CRC32C of all header bytes with the crc field as zeros. A block's CRC was computed when the guest
// wrote it, went with it through the log, and is checked on every read: Finish refuses to build from a block that does not
// match. Codec 0 (none) and kind 0 (data) are the only ones so far; a reader refuses others with ErrUnsupported.
//
// # Names
//
//	v/<volume uuid>/<low byte of seq, 2 hex>/<epoch, 8 hex>-<seq, 16 hex>-<attempt>
//	r/<volume uuid>/<epoch, 8 hex>-<n, 16 hex>
//
// The attempt is there because the outcome of a failed Put is unknown and names are never written twice.
package sco

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"strconv"
	"strings"

	"github.com/google/uuid"

	"varve/volumedriver/blockio"
)

const (
	// MaxBlocks is how many blocks an SCO may hold: 16 MiB.
	MaxBlocks = 4096
	// MaxZeros is how many zero ranges an SCO may hold.
	MaxZeros = 4096
	// MaxLBA bounds block addresses: LBA + blocks <= MaxLBA.
	MaxLBA = 1 << 48
	// MaxHeaderBytes bounds the header.
	MaxHeaderBytes = (fixedBytes + MaxZeros*zeroBytes + MaxBlocks*(extentBytes+4) + align - 1) / align * align
	// FooterBytes is the size of the footer.
	FooterBytes = 32

	align       = 4096
	fixedBytes  = 128
	zeroBytes   = 16
	extentBytes = 12
	version     = 1
)

var (
	// ErrFormat: the bytes are not an intact object.
	ErrFormat = errors.New("not an intact object")
	// ErrUnsupported: written in a version or with a codec that this program does not know. Never treat it as garbage.
	ErrUnsupported = errors.New("unsupported object version or codec")
	// ErrFull: the SCO has no room for it; finish this one and begin the next.
	ErrFull = errors.New("object is full")
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Checksum is the CRC32C that all formats of the volume driver use.
func Checksum(p []byte) uint32 { return crc32.Checksum(p, castagnoli) }

// Range is a run of blocks that read as zeros.
type Range struct {
	LBA    uint64
	Blocks uint64
}

// Extent is a run of blocks whose data is in the object.
type Extent struct {
	LBA    uint64
	Blocks uint32
}

// Header describes an SCO. The caller of New sets the fields up to Created, the Builder the others.
type Header struct {
	Volume             uuid.UUID
	Epoch              uint64
	Seq                uint64 // number of the SCO in the volume, from 1, never used twice
	FirstLog, LastLog  uint64 // the log sequences covered: FirstLog < sequence <= LastLog
	PrevEpoch, PrevSeq uint64 // the SCO before this one; 0, 0 if this is the first
	Size               uint64 // of the volume in bytes at LastLog
	ModTime            int64  // of the volume at LastLog, Unix nanoseconds
	Created            int64  // of this SCO, Unix nanoseconds

	Zeros   []Range
	Extents []Extent
	CRC     []uint32 // of each block

	headerBytes int
	headerCRC   uint32
}

// Name is the SCO's name on the backend.
func Name(volume uuid.UUID, epoch, seq uint64, attempt int) string {
	return fmt.Sprintf("v/%s/%02x/%08x-%016x-%d", volume, seq&0xff, epoch, seq, attempt)
}

// Prefix is what the names of all SCOs of the volume begin with.
func Prefix(volume uuid.UUID) string { return "v/" + volume.String() + "/" }

// ParseName undoes Name.
func ParseName(name string) (volume uuid.UUID, epoch, seq uint64, attempt int, err error) {
	bad := func() (uuid.UUID, uint64, uint64, int, error) {
		return uuid.Nil, 0, 0, 0, fmt.Errorf("%q is not the name of an SCO", name)
	}
	parts := strings.Split(name, "/")
	if len(parts) != 4 {
		return bad()
	}
	fields := strings.Split(parts[3], "-")
	if len(fields) != 3 {
		return bad()
	}
	volume, err1 := uuid.Parse(parts[1])
	epoch, err2 := strconv.ParseUint(fields[0], 16, 64)
	seq, err3 := strconv.ParseUint(fields[1], 16, 64)
	attempt, err4 := strconv.Atoi(fields[2])
	if errors.Join(err1, err2, err3, err4) != nil || attempt < 0 || Name(volume, epoch, seq, attempt) != name {
		return bad()
	}
	return volume, epoch, seq, attempt, nil
}

// Blocks is the number of blocks in the object.
func (h *Header) Blocks() int { return len(h.CRC) }

// DataOffset is where in the object the block begins.
func (h *Header) DataOffset(index uint32) int64 {
	return int64(h.headerBytes) + int64(index)*blockio.BlockSize
}

// CRCOf is the CRC32C of the block, which must be one of the object's.
func (h *Header) CRCOf(index uint32) uint32 { return h.CRC[index] }

// ObjectBytes is the size of the whole object.
func (h *Header) ObjectBytes() int64 { return h.DataOffset(uint32(len(h.CRC))) + FooterBytes }

// Follow is nil if h continues the volume's history directly after prev; prev is nil at the beginning of the history.
func (h *Header) Follow(prev *Header) error {
	var before Header
	if prev != nil {
		before = *prev
		if h.Volume != prev.Volume || h.Epoch < prev.Epoch || h.Seq <= prev.Seq {
			return fmt.Errorf("sco %s/%d-%d cannot follow %s/%d-%d", h.Volume, h.Epoch, h.Seq, prev.Volume, prev.Epoch, prev.Seq)
		}
	}
	if h.PrevEpoch != before.Epoch || h.PrevSeq != before.Seq || h.FirstLog != before.LastLog {
		return fmt.Errorf("sco %d-%d continues %d-%d at log %d, not %d-%d at log %d",
			h.Epoch, h.Seq, h.PrevEpoch, h.PrevSeq, h.FirstLog, before.Epoch, before.Seq, before.LastLog)
	}
	return nil
}

// encode gives the header's bytes and sets headerBytes and headerCRC.
func (h *Header) encode() []byte {
	n := fixedBytes + len(h.Zeros)*zeroBytes + len(h.Extents)*extentBytes + len(h.CRC)*4
	h.headerBytes = (n + align - 1) / align * align
	le := binary.LittleEndian
	b := make([]byte, 0, h.headerBytes)
	b = append(b, "VSCO"...)
	b = le.AppendUint16(b, version)
	b = append(b, 0, 0) // codec, kind
	b = le.AppendUint32(b, uint32(h.headerBytes))
	b = le.AppendUint32(b, 0) // crc
	b = append(b, h.Volume[:]...)
	for _, v := range [...]uint64{h.Epoch, h.Seq, h.FirstLog, h.LastLog, h.PrevEpoch, h.PrevSeq, h.Size,
		uint64(h.ModTime), uint64(h.Created)} {
		b = le.AppendUint64(b, v)
	}
	for _, v := range [...]int{len(h.Zeros), len(h.Extents), len(h.CRC), 0} {
		b = le.AppendUint32(b, uint32(v))
	}
	b = le.AppendUint64(b, uint64(len(h.CRC))*blockio.BlockSize)
	for _, z := range h.Zeros {
		b = le.AppendUint64(le.AppendUint64(b, z.LBA), z.Blocks)
	}
	for _, e := range h.Extents {
		b = le.AppendUint32(le.AppendUint64(b, e.LBA), e.Blocks)
	}
	for _, c := range h.CRC {
		b = le.AppendUint32(b, c)
	}
	b = b[:h.headerBytes]
	h.headerCRC = headerCRC(b)
	le.PutUint32(b[12:], h.headerCRC)
	return b
}

func headerCRC(b []byte) uint32 {
	c := crc32.Update(0, castagnoli, b[:12])
	c = crc32.Update(c, castagnoli, []byte{0, 0, 0, 0})
	return crc32.Update(c, castagnoli, b[16:])
}

func (h *Header) footer() []byte {
	le := binary.LittleEndian
	b := make([]byte, 0, FooterBytes)
	b = append(b, "VEND"...)
	b = le.AppendUint32(b, uint32(h.headerBytes))
	b = le.AppendUint64(b, h.Seq)
	b = le.AppendUint64(b, uint64(h.ObjectBytes()))
	b = le.AppendUint32(b, h.headerCRC)
	return le.AppendUint32(b, Checksum(b))
}

// HeaderBytes tells from the first bytes of an object (at least 16) how long its header is.
func HeaderBytes(first []byte) (int, error) {
	if len(first) < 16 || string(first[:4]) != "VSCO" {
		return 0, fmt.Errorf("no SCO header: %w", ErrFormat)
	}
	if v := binary.LittleEndian.Uint16(first[4:]); v != version {
		return 0, fmt.Errorf("SCO version %d: %w", v, ErrUnsupported)
	}
	if first[6] != 0 || first[7] != 0 {
		return 0, fmt.Errorf("SCO codec %d, kind %d: %w", first[6], first[7], ErrUnsupported)
	}
	n := binary.LittleEndian.Uint32(first[8:])
	if n == 0 || n%align != 0 || n > MaxHeaderBytes {
		return 0, fmt.Errorf("SCO header of %d bytes: %w", n, ErrFormat)
	}
	return int(n), nil
}

// Parse reads the header at the beginning of b; what follows it in b is not looked at.
func Parse(b []byte) (*Header, error) {
	n, err := HeaderBytes(b)
	if err != nil {
		return nil, err
	}
	if len(b) < n {
		return nil, fmt.Errorf("SCO header: %d of %d bytes: %w", len(b), n, ErrFormat)
	}
	b = b[:n]
	le := binary.LittleEndian
	h := &Header{headerBytes: n, headerCRC: le.Uint32(b[12:])}
	if headerCRC(b) != h.headerCRC {
		return nil, fmt.Errorf("SCO header checksum: %w", ErrFormat)
	}
	copy(h.Volume[:], b[16:32])
	u := func(off int) uint64 { return le.Uint64(b[off:]) }
	h.Epoch, h.Seq, h.FirstLog, h.LastLog, h.PrevEpoch, h.PrevSeq = u(32), u(40), u(48), u(56), u(64), u(72)
	h.Size, h.ModTime, h.Created = u(80), int64(u(88)), int64(u(96))
	zeros, extents, blocks := le.Uint32(b[104:]), le.Uint32(b[108:]), le.Uint32(b[112:])
	if zeros > MaxZeros || extents > blocks || blocks > MaxBlocks || u(120) != uint64(blocks)*blockio.BlockSize ||
		le.Uint32(b[116:]) != 0 {
		return nil, fmt.Errorf("SCO with %d zero ranges, %d extents, %d blocks: %w", zeros, extents, blocks, ErrFormat)
	}
	used := fixedBytes + int(zeros)*zeroBytes + int(extents)*extentBytes + int(blocks)*4
	if (used+align-1)/align*align != n {
		return nil, fmt.Errorf("SCO header of %d bytes with %d in use: %w", n, used, ErrFormat)
	}
	for _, padding := range b[used:] {
		if padding != 0 {
			return nil, fmt.Errorf("SCO header padding: %w", ErrFormat)
		}
	}
	h.decodeLists(b[fixedBytes:], int(zeros), int(extents), int(blocks))
	if err := h.check(); err != nil {
		return nil, err
	}
	return h, nil
}

func (h *Header) decodeLists(b []byte, zeros, extents, blocks int) {
	le := binary.LittleEndian
	h.Zeros = make([]Range, zeros)
	for i := range h.Zeros {
		h.Zeros[i] = Range{le.Uint64(b), le.Uint64(b[8:])}
		b = b[zeroBytes:]
	}
	h.Extents = make([]Extent, extents)
	for i := range h.Extents {
		h.Extents[i] = Extent{le.Uint64(b), le.Uint32(b[8:])}
		b = b[extentBytes:]
	}
	h.CRC = make([]uint32, blocks)
	for i := range h.CRC {
		h.CRC[i] = le.Uint32(b[i*4:])
	}
}

// check tells whether the lists are as New and Finish make them.
func (h *Header) check() error {
	if h.FirstLog > h.LastLog {
		return fmt.Errorf("SCO of log %d to %d: %w", h.FirstLog, h.LastLog, ErrFormat)
	}
	end := uint64(0)
	for i, z := range h.Zeros {
		if z.Blocks == 0 || (i > 0 && z.LBA <= end) || z.LBA > MaxLBA || z.Blocks > MaxLBA-z.LBA {
			return fmt.Errorf("SCO zero range %d (%d+%d): %w", i, z.LBA, z.Blocks, ErrFormat)
		}
		end = z.LBA + z.Blocks
	}
	end = 0
	total := 0
	for i, e := range h.Extents {
		if e.Blocks == 0 || e.Blocks > MaxBlocks || (i > 0 && e.LBA <= end) || e.LBA > MaxLBA-uint64(e.Blocks) {
			return fmt.Errorf("SCO extent %d (%d+%d): %w", i, e.LBA, e.Blocks, ErrFormat)
		}
		end = e.LBA + uint64(e.Blocks)
		total += int(e.Blocks)
	}
	if total != len(h.CRC) {
		return fmt.Errorf("SCO extents of %d blocks with %d checksums: %w", total, len(h.CRC), ErrFormat)
	}
	return nil
}

// CheckFooter is nil if b is the footer of h's object. It tells a whole object from a cut one without reading the data.
func (h *Header) CheckFooter(b []byte) error {
	if string(b) != string(h.footer()) {
		return fmt.Errorf("SCO %d-%d footer: %w", h.Epoch, h.Seq, ErrFormat)
	}
	return nil
}

// Verify checks a whole object: header, length, footer, and the checksum of every block.
func Verify(object []byte) (*Header, error) {
	h, err := Parse(object)
	if err != nil {
		return nil, err
	}
	if int64(len(object)) != h.ObjectBytes() {
		return nil, fmt.Errorf("SCO %d-%d: %d of %d bytes: %w", h.Epoch, h.Seq, len(object), h.ObjectBytes(), ErrFormat)
	}
	if err := h.CheckFooter(object[len(object)-FooterBytes:]); err != nil {
		return nil, err
	}
	for i, crc := range h.CRC {
		if off := h.DataOffset(uint32(i)); Checksum(object[off:off+blockio.BlockSize]) != crc {
			return nil, fmt.Errorf("SCO %d-%d block %d: %w", h.Epoch, h.Seq, i, ErrFormat)
		}
	}
	return h, nil
}

// Builder makes one SCO.
type Builder struct {
	h    Header
	data []byte
}

// New begins an SCO of at most capacity blocks. Of h, the lists are ignored.
func New(h Header, capacity int) *Builder {
	b := &Builder{}
	b.Reset(h, capacity)
	return b
}

// Reset begins another SCO in the memory of the last, whose parts are then no longer valid.
func (b *Builder) Reset(h Header, capacity int) {
	capacity = max(0, min(capacity, MaxBlocks))
	h.Zeros, h.Extents, h.CRC = b.h.Zeros[:0], b.h.Extents[:0], b.h.CRC[:0]
	b.h = h
	if cap(b.data) < capacity*blockio.BlockSize {
		b.data = make([]byte, 0, capacity*blockio.BlockSize)
	}
	b.data = b.data[: 0 : capacity*blockio.BlockSize]
}

// Blocks is how many blocks were added so far.
func (b *Builder) Blocks() int { return len(b.h.CRC) }

// AddZero makes n blocks from lba read as zeros, except where the SCO has data. Any order, overlaps are merged.
func (b *Builder) AddZero(lba, n uint64) error {
	if lba > MaxLBA || n > MaxLBA-lba {
		return fmt.Errorf("zero range %d+%d in an SCO: beyond the address limit", lba, n)
	}
	if n == 0 {
		return nil
	}
	if k := len(b.h.Zeros); k > 0 && b.h.Zeros[k-1].LBA+b.h.Zeros[k-1].Blocks == lba {
		b.h.Zeros[k-1].Blocks += n
		return nil
	}
	if len(b.h.Zeros) == MaxZeros {
		b.mergeZeros()
		if len(b.h.Zeros) == MaxZeros {
			return fmt.Errorf("zero range %d+%d: %w", lba, n, ErrFull)
		}
	}
	b.h.Zeros = append(b.h.Zeros, Range{lba, n})
	return nil
}

// Add appends one block; block addresses must ascend.
func (b *Builder) Add(lba uint64, block []byte, crc uint32) error {
	if len(block) != blockio.BlockSize {
		return fmt.Errorf("block %d of %d bytes in an SCO", lba, len(block))
	}
	dst, err := b.Reserve(lba, []uint32{crc})
	if err != nil {
		return err
	}
	copy(dst, block)
	return nil
}

// Reserve appends len(crcs) blocks from lba and returns the memory that the caller must fill with them before Finish.
func (b *Builder) Reserve(lba uint64, crcs []uint32) ([]byte, error) {
	n, k := len(crcs), len(b.h.Extents)
	if off := len(b.data); n == 0 || off+n*blockio.BlockSize > cap(b.data) {
		return nil, fmt.Errorf("%d blocks from %d: %w", n, lba, ErrFull)
	}
	if lba > MaxLBA-uint64(n) {
		return nil, fmt.Errorf("block %d in an SCO: beyond the address limit", lba)
	}
	switch {
	case k > 0 && b.h.Extents[k-1].LBA+uint64(b.h.Extents[k-1].Blocks) > lba:
		return nil, fmt.Errorf("block %d in an SCO: after block %d", lba,
			b.h.Extents[k-1].LBA+uint64(b.h.Extents[k-1].Blocks)-1)
	case k > 0 && b.h.Extents[k-1].LBA+uint64(b.h.Extents[k-1].Blocks) == lba:
		b.h.Extents[k-1].Blocks += uint32(n)
	default:
		b.h.Extents = append(b.h.Extents, Extent{lba, uint32(n)})
	}
	b.h.CRC = append(b.h.CRC, crcs...)
	off := len(b.data)
	b.data = b.data[:off+n*blockio.BlockSize]
	return b.data[off:], nil
}

func (b *Builder) mergeZeros() {
	z := b.h.Zeros
	slices.SortFunc(z, func(x, y Range) int { return cmp.Compare(x.LBA, y.LBA) })
	out := z[:0]
	for _, r := range z {
		if k := len(out); k > 0 && r.LBA <= out[k-1].LBA+out[k-1].Blocks {
			out[k-1].Blocks = max(out[k-1].Blocks, r.LBA+r.Blocks-out[k-1].LBA)
			continue
		}
		out = append(out, r)
	}
	b.h.Zeros = out
}

// Finish gives the object's bytes as parts (header, data, footer) that stay valid until Reset, after checking every block
// against its checksum. The same Builder gives the same bytes again.
func (b *Builder) Finish() ([][]byte, error) {
	b.mergeZeros()
	for i, crc := range b.h.CRC {
		if Checksum(b.data[i*blockio.BlockSize:(i+1)*blockio.BlockSize]) != crc {
			return nil, fmt.Errorf("build sco %d-%d: block %d does not match its checksum: %w",
				b.h.Epoch, b.h.Seq, i, blockio.ErrCorrupt)
		}
	}
	if err := b.h.check(); err != nil {
		return nil, err
	}
	header := b.h.encode()
	return [][]byte{header, b.data, b.h.footer()}, nil
}

// Header describes what Finish has built. It is valid until Reset; Table makes a lasting form.
func (b *Builder) Header() *Header { return &b.h }
