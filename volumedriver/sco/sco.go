// Package sco is the format of the volume driver's immutable objects on a backend: the SCO, which carries the net effect
// of a stretch of one volume's log; the container, which holds several SCOs that scrub has made small; and the root, which
// carries what else a bucket must hold so that the volume can be rebuilt from it alone.
//
// # What an SCO means
//
// An SCO of (volume, epoch, seq) covers the volume's log records with FirstLog < sequence <= LastLog. Applying it to the
// volume's state at FirstLog gives the state at LastLog:
//
//	if Revert is not 0:         the volume is again as it was at log sequence Revert
//	for each range in Zeros:    every block of the range reads as zeros
//	for each extent in Extents: its blocks take the object's blocks from Index on        (after all Zeros, so data wins)
//	the volume's size is Size, its modification time ModTime
//
// A truncation is a zero range that reaches as far as the volume may have been long. PrevEpoch and PrevSeq name the SCO
// before this one (0, 0 for the first); its LastLog is this one's FirstLog. Follow checks that, and a rebuild accepts SCOs
// up to the first that does not follow. Marks are the snapshots within the log range; this package does not look into them.
//
// # Index, position, frame
//
// A block's index is its name within the SCO: the block map stores it. Its position is where it lies among the blocks that
// the object holds. As first written, position = index. Scrub later writes the SCO again without its dead blocks: those that
// are left keep their indexes and move up, so every entry of every map stays valid and only the object has changed. Extents
// say both; the look-up is a binary search over them, and none at all while position = index.
//
// Positions [nk, nk+n) make frame k, the unit of compression and encryption, where n is 1 to 16 blocks: a large frame
// compresses better, a small one costs less where one block is read (the figures are at DefaultFrameBlocks). Each frame has
// its own codec; one that does not shrink by an eighth is stored raw, and one whose bytes look random is not even tried. If
// all frames are raw and there is no key, there is no frame list: the block at position p begins at header bytes + 4096 p
// and is read directly.
//
// Whatever the codec and key, each block's CRC32C of the plaintext is in the header, was computed when the guest wrote the
// block, went with it through the log, and is checked on every read. Finish refuses a block that does not match.
//
// # Format, version 2
//
// All integers are little endian. Version 1 was never released and is refused.
//
//	header   | "VSCO" 4 | version 2 | kind 1 | flags 1 | header bytes 4 | header crc 4 | volume 16 | epoch 8 | seq 8 |
//	         | first log 8 | last log 8 | prev epoch 8 | prev seq 8 | size 8 | mod time 8 | created 8 | revert 8 |
//	         | zeros 4 | extents 4 | blocks 4 | marks 4 | mark bytes 4 | log2 of the alignment 1 | log2 of n 1 | 0 2 | data bytes 8 |
//	         | salt 16 | key id 16 | 0 16 |                                                              = 192 bytes, in clear
//	lists    | zeros   x (lba 8, blocks 8) |            ascending, disjoint, not adjacent
//	         | extents x (lba 8, blocks 2, index 2) |   ascending, disjoint, LBAs not adjacent
//	         | frames  x (stored bytes 3, codec 1) |    only with flag framed
//	         | blocks  x crc32c of the plaintext block 4 |
//	         | marks   x (seq 8, bytes 2, data) |       ascending by seq
//	         | tag 16 |                                 only with flag sealed: then the lists are encrypted
//	         | zeros up to a multiple of the alignment |
//	data     | frames, one directly after the other; each with a tag 16 at its end if sealed |
//	footer   | "VEND" 4 | header bytes 4 | seq 8 | object bytes 8 | header crc 4 | crc32c of the 28 bytes before 4 |
//
// Flags: 1 sealed, 2 framed; sealed implies framed. Kind 0 is the only one. Codecs: 0 none, 1 S2, 2 zstd. A reader refuses
// others with ErrUnsupported. The header crc is the CRC32C of all header bytes with the crc field as zeros.
//
// # Encryption
//
// The subkey of an object is derived from the volume's key (package seal) with the salt and (volume, epoch, seq). The salt is
// drawn anew each time an object is finished, also when the same SCO is built again or compacted, so (subkey, nonce) never
// repeats. AES-256-GCM for each frame: the nonce is the frame's number, the additional data | volume | epoch | seq | frame 4 |
// salt |. The lists tell what the guest wrote, so they are encrypted as well, as frame 2^32-1; their additional data goes on
// with the 192 bytes of the header (crc field as zeros), which so can't be forged either.
//
// # Names
//
//	v/<volume uuid>/<low byte of seq, 2 hex>/<epoch, 8 hex>-<seq, 16 hex>-<attempt>
//	c/<volume uuid>/<low byte of n, 2 hex>/<epoch, 8 hex>-<n, 16 hex>-<attempt>
//	r/<volume uuid>/<epoch, 8 hex>-<n, 16 hex>
//
// The attempt is there because the outcome of a failed Put is unknown and names are never written twice.
package sco

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"strconv"
	"strings"

	"github.com/google/uuid"

	"varve/volumedriver/blockio"
	"varve/volumedriver/seal"
)

const (
	// MaxBlocks is how many blocks an SCO may hold: 16 MiB. Indexes are below it.
	MaxBlocks = 4096
	// MaxZeros is how many zero ranges an SCO may hold.
	MaxZeros = 4096
	// MaxMarks is how many marks an SCO may hold.
	MaxMarks = 1024
	// MaxMarkBytes bounds the data of a mark.
	MaxMarkBytes = 4096
	// MaxLBA bounds block addresses: LBA + blocks <= MaxLBA.
	MaxLBA = 1 << 48
	// MaxHeaderBytes bounds the header.
	MaxHeaderBytes = (fixedBytes + MaxZeros*zeroBytes + MaxBlocks*(extentBytes+4) + MaxBlocks*4 +
		MaxMarks*(markBytes+MaxMarkBytes) + tagBytes + MaxAlign - 1) / MaxAlign * MaxAlign
	// MaxObjectBytes bounds a whole SCO.
	MaxObjectBytes = MaxHeaderBytes + MaxBlocks*blockio.BlockSize + MaxBlocks*tagBytes + FooterBytes
	// FooterBytes is the size of the footer.
	FooterBytes = 32
	// MaxAlign is the largest alignment, and what 0 stands for in Options.
	MaxAlign = 4096

	fixedBytes  = 192
	zeroBytes   = 16
	extentBytes = 12
	markBytes   = 10
	version     = 2

	flagSealed = 1
	flagFramed = 2
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

// Extent is a run of blocks whose data is in the object, under the indexes from Index on.
type Extent struct {
	LBA    uint64
	Blocks uint32
	Index  uint32
}

// Mark is a snapshot that was made when the log had reached Seq.
type Mark struct {
	Seq  uint64
	Data []byte
}

// KeySource finds the key that an object names. seal.Ring is one. Its errors come back from Parse.
type KeySource interface {
	Key(id uuid.UUID) (*seal.Key, error)
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
	Revert             uint64 // log sequence to which the volume went back before this SCO's effects, at most FirstLog; 0: it did not
	Created            int64  // of this object, Unix nanoseconds

	Zeros   []Range
	Extents []Extent
	Marks   []Mark
	CRC     []uint32 // of each block, by position
	KeyID   uuid.UUID

	frames    frames
	headerCRC uint32
}

// Name is the SCO's name on the backend.
func Name(volume uuid.UUID, epoch, seq uint64, attempt int) string {
	return fmt.Sprintf("v/%s/%02x/%08x-%016x-%d", volume, seq&0xff, epoch, seq, attempt)
}

// Prefix is what the names of all SCOs of the volume begin with.
func Prefix(volume uuid.UUID) string { return "v/" + volume.String() + "/" }

// ParseName undoes Name.
func ParseName(name string) (volume uuid.UUID, epoch, seq uint64, attempt int, err error) {
	volume, epoch, seq, attempt, ok := parseName(name)
	if !ok || Name(volume, epoch, seq, attempt) != name {
		return uuid.Nil, 0, 0, 0, fmt.Errorf("%q is not the name of an SCO", name)
	}
	return volume, epoch, seq, attempt, nil
}

// parseName reads the parts of an SCO's or container's name. Only a name that is made of them again is one.
func parseName(name string) (volume uuid.UUID, epoch, number uint64, attempt int, ok bool) {
	parts := strings.Split(name, "/")
	if len(parts) != 4 {
		return uuid.Nil, 0, 0, 0, false
	}
	fields := strings.Split(parts[3], "-")
	if len(fields) != 3 {
		return uuid.Nil, 0, 0, 0, false
	}
	volume, err1 := uuid.Parse(parts[1])
	epoch, err2 := strconv.ParseUint(fields[0], 16, 64)
	number, err3 := strconv.ParseUint(fields[1], 16, 64)
	attempt, err4 := strconv.Atoi(fields[2])
	return volume, epoch, number, attempt, errors.Join(err1, err2, err3, err4) == nil && attempt >= 0
}

// Blocks is the number of blocks in the object.
func (h *Header) Blocks() int { return len(h.CRC) }

// DataOffset is where in the object the data begins, which is the size of the header.
func (h *Header) DataOffset() int64 { return h.frames.header }

// ObjectBytes is the size of the whole object.
func (h *Header) ObjectBytes() int64 { return h.frames.end() + FooterBytes }

// Compacted says whether blocks were left out so that positions and indexes differ.
func (h *Header) Compacted() bool {
	n := len(h.Extents)
	return n > 0 && int(h.Extents[n-1].Index+h.Extents[n-1].Blocks) != len(h.CRC)
}

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

// listBytes gives the size of the lists, and of the marks among them.
func (h *Header) listBytes() (lists, marks int) {
	for _, m := range h.Marks {
		marks += markBytes + len(m.Data)
	}
	return len(h.Zeros)*zeroBytes + len(h.Extents)*extentBytes + len(h.frames.stored)*4 + len(h.CRC)*4 + marks, marks
}

// encode gives the header's bytes and sets its size and CRC. The frames are known: all but the header's size.
func (h *Header) encode(dst []byte) ([]byte, error) {
	f := &h.frames
	n, marks := h.listBytes()
	used := fixedBytes + n
	if f.seal != nil {
		used += tagBytes
	}
	size := f.alignUp(used)
	f.header = int64(size)
	le := binary.LittleEndian
	b := append(dst[:0], "VSCO"...)
	b = le.AppendUint16(b, version)
	b = append(b, 0, f.flags())
	b = le.AppendUint32(b, uint32(size))
	b = le.AppendUint32(b, 0) // crc
	b = append(b, h.Volume[:]...)
	for _, v := range [...]uint64{h.Epoch, h.Seq, h.FirstLog, h.LastLog, h.PrevEpoch, h.PrevSeq, h.Size,
		uint64(h.ModTime), uint64(h.Created), h.Revert} {
		b = le.AppendUint64(b, v)
	}
	for _, v := range [...]int{len(h.Zeros), len(h.Extents), len(h.CRC), len(h.Marks), marks} {
		b = le.AppendUint32(b, uint32(v))
	}
	b = append(b, f.alignLog2, f.log2, 0, 0)
	b = le.AppendUint64(b, uint64(f.bytes))
	b = append(b, f.salt[:]...)
	b = append(b, h.KeyID[:]...)
	b = le.AppendUint64(le.AppendUint64(b, 0), 0)
	for _, z := range h.Zeros {
		b = le.AppendUint64(le.AppendUint64(b, z.LBA), z.Blocks)
	}
	for _, e := range h.Extents {
		b = le.AppendUint16(le.AppendUint16(le.AppendUint64(b, e.LBA), uint16(e.Blocks)), uint16(e.Index))
	}
	for _, s := range f.stored {
		b = le.AppendUint32(b, s)
	}
	for _, c := range h.CRC {
		b = le.AppendUint32(b, c)
	}
	for _, m := range h.Marks {
		b = append(le.AppendUint16(le.AppendUint64(b, m.Seq), uint16(len(m.Data))), m.Data...)
	}
	if f.seal != nil {
		b = f.seal.sealLists(b)
	}
	b = append(b, make([]byte, size-len(b))...)
	h.headerCRC = headerCRC(b)
	le.PutUint32(b[12:], h.headerCRC)
	return b, nil
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
	b = le.AppendUint32(b, uint32(h.frames.header))
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
		return 0, fmt.Errorf("SCO of version %d, this program reads version %d: %w", v, version, ErrUnsupported)
	}
	if flags := first[7]; first[6] != 0 || flags&^(flagSealed|flagFramed) != 0 || flags == flagSealed {
		return 0, fmt.Errorf("SCO of kind %d with flags %#x: %w", first[6], flags, ErrUnsupported)
	}
	n := binary.LittleEndian.Uint32(first[8:])
	if n < fixedBytes || n > MaxHeaderBytes {
		return 0, fmt.Errorf("SCO header of %d bytes: %w", n, ErrFormat)
	}
	return int(n), nil
}

// Parse reads the header at the beginning of b; what follows it in b is not looked at. keys may be nil if the SCO is not
// encrypted; else the error is that of keys, or seal.ErrNoKey.
func Parse(b []byte, keys KeySource) (*Header, error) {
	h, lists, err := parse(b)
	if err != nil {
		return nil, err
	}
	if h.KeyID != uuid.Nil {
		if keys == nil {
			return nil, fmt.Errorf("SCO %d-%d under key %s: %w", h.Epoch, h.Seq, h.KeyID, seal.ErrNoKey)
		}
		key, err := keys.Key(h.KeyID)
		if err != nil {
			return nil, fmt.Errorf("SCO %d-%d: %w", h.Epoch, h.Seq, err)
		}
		if h.frames.seal, err = newSealer(h, key); err != nil {
			return nil, fmt.Errorf("SCO %d-%d: %w", h.Epoch, h.Seq, err)
		}
		if lists, err = h.frames.seal.openLists(b[:fixedBytes], lists); err != nil {
			return nil, fmt.Errorf("SCO %d-%d, lists of the header: %w", h.Epoch, h.Seq, err)
		}
	}
	if err := h.decodeLists(lists); err != nil {
		return nil, err
	}
	if err := h.check(); err != nil {
		return nil, err
	}
	return h, nil
}

// ParseClear reads what a header says in clear, for those who have no key: the identity, the log range, the key's id, and
// how large the object is; no lists.
func ParseClear(b []byte) (*Header, error) {
	h, _, err := parse(b)
	if err != nil {
		return nil, err
	}
	h.Zeros, h.Extents, h.Marks, h.CRC = nil, nil, nil, nil
	return h, nil
}

// parse checks all that can be checked without a key and makes the lists as long as they will be, which is in proportion to
// the bytes that are there. The lists' bytes, perhaps encrypted, are those of b.
func parse(b []byte) (*Header, []byte, error) {
	n, err := HeaderBytes(b)
	if err != nil {
		return nil, nil, err
	}
	if len(b) < n {
		return nil, nil, fmt.Errorf("SCO header: %d of %d bytes: %w", len(b), n, ErrFormat)
	}
	b = b[:n]
	le := binary.LittleEndian
	h := &Header{headerCRC: le.Uint32(b[12:])}
	if headerCRC(b) != h.headerCRC {
		return nil, nil, fmt.Errorf("SCO header checksum: %w", ErrFormat)
	}
	copy(h.Volume[:], b[16:])
	u := func(off int) uint64 { return le.Uint64(b[off:]) }
	h.Epoch, h.Seq, h.FirstLog, h.LastLog, h.PrevEpoch, h.PrevSeq = u(32), u(40), u(48), u(56), u(64), u(72)
	h.Size, h.ModTime, h.Created, h.Revert = u(80), int64(u(88)), int64(u(96)), u(104)
	zeros, extents, blocks := le.Uint32(b[112:]), le.Uint32(b[116:]), le.Uint32(b[120:])
	marks, markSize := le.Uint32(b[124:]), le.Uint32(b[128:])
	copy(h.frames.salt[:], b[144:])
	copy(h.KeyID[:], b[160:])
	sealed, framed := b[7]&flagSealed != 0, b[7]&flagFramed != 0
	if zeros > MaxZeros || extents > blocks || blocks > MaxBlocks || marks > MaxMarks || u(136) > MaxObjectBytes ||
		markSize < marks*markBytes || markSize > marks*(markBytes+MaxMarkBytes) || 1<<(b[132]&31) > MaxAlign || b[132] > 31 ||
		1<<(b[133]&31) > MaxFrameBlocks || b[133] > 31 || b[134]|b[135] != 0 || u(176)|u(184) != 0 ||
		sealed != (h.KeyID != uuid.Nil) || !sealed && h.frames.salt != [seal.SaltBytes]byte{} {
		return nil, nil, fmt.Errorf("SCO with %d zero ranges, %d extents, %d blocks, %d marks: %w",
			zeros, extents, blocks, marks, ErrFormat)
	}
	h.frames.header, h.frames.blocks, h.frames.bytes, h.frames.alignLog2, h.frames.log2 = int64(n), int(blocks), int64(u(136)), b[132], b[133]
	frames := 0
	if framed {
		frames = h.frames.count()
	}
	used := fixedBytes + int(zeros)*zeroBytes + int(extents)*extentBytes + frames*4 + int(blocks)*4 + int(markSize)
	if sealed {
		used += tagBytes
	}
	if h.frames.alignUp(used) != n {
		return nil, nil, fmt.Errorf("SCO header of %d bytes with %d in use: %w", n, used, ErrFormat)
	}
	if !isZero(b[used:]) {
		return nil, nil, fmt.Errorf("SCO header padding: %w", ErrFormat)
	}
	h.Zeros, h.Extents, h.CRC, h.Marks = make([]Range, zeros), make([]Extent, extents), make([]uint32, blocks), make([]Mark, marks)
	if framed {
		h.frames.stored = make([]uint32, frames)
	}
	return h, b[fixedBytes:used], nil
}

func isZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

func (h *Header) decodeLists(b []byte) error {
	le := binary.LittleEndian
	for i := range h.Zeros {
		h.Zeros[i] = Range{le.Uint64(b), le.Uint64(b[8:])}
		b = b[zeroBytes:]
	}
	for i := range h.Extents {
		h.Extents[i] = Extent{le.Uint64(b), uint32(le.Uint16(b[8:])), uint32(le.Uint16(b[10:]))}
		b = b[extentBytes:]
	}
	for i := range h.frames.stored {
		h.frames.stored[i] = le.Uint32(b)
		b = b[4:]
	}
	for i := range h.CRC {
		h.CRC[i] = le.Uint32(b)
		b = b[4:]
	}
	data := append([]byte(nil), b...) // the marks must not keep all of the header in memory
	for i := range h.Marks {
		if len(data) < markBytes || len(data)-markBytes < int(le.Uint16(data[8:])) {
			return fmt.Errorf("SCO mark %d: %w", i, ErrFormat)
		}
		end := markBytes + int(le.Uint16(data[8:]))
		h.Marks[i] = Mark{le.Uint64(data), data[markBytes:end:end]}
		data = data[end:]
	}
	if len(data) != 0 {
		return fmt.Errorf("SCO marks: %w", ErrFormat)
	}
	return nil
}

// check tells whether the lists are as New and Finish make them.
func (h *Header) check() error {
	if h.FirstLog > h.LastLog || h.Revert > h.FirstLog {
		return fmt.Errorf("SCO of log %d to %d, reverting to %d: %w", h.FirstLog, h.LastLog, h.Revert, ErrFormat)
	}
	end := uint64(0)
	for i, z := range h.Zeros {
		if z.Blocks == 0 || (i > 0 && z.LBA <= end) || z.LBA > MaxLBA || z.Blocks > MaxLBA-z.LBA {
			return fmt.Errorf("SCO zero range %d (%d+%d): %w", i, z.LBA, z.Blocks, ErrFormat)
		}
		end = z.LBA + z.Blocks
	}
	end = 0
	total, index := uint32(0), uint32(0)
	for i, e := range h.Extents {
		if e.Blocks == 0 || e.Blocks > MaxBlocks || (i > 0 && e.LBA <= end) || e.LBA > MaxLBA-uint64(e.Blocks) {
			return fmt.Errorf("SCO extent %d (%d+%d): %w", i, e.LBA, e.Blocks, ErrFormat)
		}
		// The blocks left out between two extents had addresses of their own between theirs.
		if e.Index < index || e.Index+e.Blocks > MaxBlocks || uint64(e.Index-index) > e.LBA-end {
			return fmt.Errorf("SCO extent %d (%d+%d) at index %d after %d: %w", i, e.LBA, e.Blocks, e.Index, index, ErrFormat)
		}
		end, index = e.LBA+uint64(e.Blocks), e.Index+e.Blocks
		total += e.Blocks
	}
	if int(total) != len(h.CRC) {
		return fmt.Errorf("SCO extents of %d blocks with %d checksums: %w", total, len(h.CRC), ErrFormat)
	}
	at := h.FirstLog
	for i, m := range h.Marks {
		if m.Seq <= at || m.Seq > h.LastLog || len(m.Data) > MaxMarkBytes {
			return fmt.Errorf("SCO mark %d at log %d: %w", i, m.Seq, ErrFormat)
		}
		at = m.Seq
	}
	return h.frames.check()
}

// CheckFooter is nil if b is the footer of h's object. It tells a whole object from a cut one without reading the data.
func (h *Header) CheckFooter(b []byte) error {
	if string(b) != string(h.footer()) {
		return fmt.Errorf("SCO %d-%d footer: %w", h.Epoch, h.Seq, ErrFormat)
	}
	return nil
}

// Verify checks a whole object: header, length, footer, and the checksum of every block.
func Verify(object []byte, keys KeySource) (*Header, error) {
	h, err := Parse(object, keys)
	if err != nil {
		return nil, err
	}
	if int64(len(object)) != h.ObjectBytes() {
		return nil, fmt.Errorf("SCO %d-%d: %d of %d bytes: %w", h.Epoch, h.Seq, len(object), h.ObjectBytes(), ErrFormat)
	}
	if err := h.CheckFooter(object[len(object)-FooterBytes:]); err != nil {
		return nil, err
	}
	plain := make([]byte, frameBytes)
	for k := range h.frames.count() {
		f := h.frames.ref(k)
		p := plain[:f.Blocks*blockio.BlockSize]
		if err := h.frames.decode(p, object[f.Off:f.Off+int64(f.Stored)], f); err != nil {
			return nil, fmt.Errorf("SCO %d-%d: %w", h.Epoch, h.Seq, err)
		}
		for i := range f.Blocks {
			if Checksum(p[i*blockio.BlockSize:(i+1)*blockio.BlockSize]) != h.CRC[int(f.First)+i] {
				return nil, fmt.Errorf("SCO %d-%d block at position %d: %w", h.Epoch, h.Seq, int(f.First)+i, ErrFormat)
			}
		}
	}
	return h, nil
}
