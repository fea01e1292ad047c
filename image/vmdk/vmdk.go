// Package vmdk writes and reads streamOptimized VMDK files, the form of a disk inside an OVA (Virtual Disk Format 5.0, "Stream-
// Optimized Compressed Sparse Extents"). The file can be written and read in one pass; it is made of sectors of 512 bytes:
//
//	header        version 3, flags 0x30001, its grain directory "at the end"; then the descriptor, padded to a grain
//	grains        | LBA 8 | size 4 | zlib data | padded to a sector; 64 KiB each, ascending, those of zeros left out
//	grain tables  marker 1, then 512 sectors of where a grain begins, 0 where it was left out; every table, also of zeros
//	directory     marker 2, then the sector of each table
//	footer        marker 3, then the header again, with the directory's place
//	end           marker 0: a sector of zeros, and it is the last one of the file
//
// The end marker is why this package exists. qemu-img writes none, or zeros behind it; tools that import by streaming then take
// what follows for data, or find the manifest's digest wrong. The invariant that Inspect checks: reading marker by marker from
// the start arrives at the end marker exactly at the end of the file, and the tables say the same as the stream.
//
// The same disk and Options give the same bytes (compress/zlib of one Go release is deterministic).
package vmdk

import (
	"bufio"
	"bytes"
	"compress/zlib"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Sizes of the format, in bytes and entries.
const (
	Sector      = 512
	Grain       = 128 * Sector
	perTable    = 512
	tableBytes  = perTable * 4
	overhead    = Grain // header and descriptor, padded
	descSectors = 20
	magic       = 0x564d444b // "KDMV"
	version     = 3
	flags       = 1 | 1<<16 | 1<<17 // newline test, compressed, markers
	deflate     = 1
	atEnd       = 1<<64 - 1
	sizeMax     = int64(2) << 40 // 32-bit sector numbers reach this far
)

// Types of markers.
const (
	markEnd = iota
	markTable
	markDirectory
	markFooter
)

// Options name a disk. ID tells contents apart: two files with one ID are the same to a hypervisor.
type Options struct {
	ID      [16]byte
	Name    string // of the file, in the descriptor
	Adapter string // lsilogic by default
	Virtual int    // hardware version; 14
}

// header is the SparseExtentHeader, as it lies in the file.
type header struct {
	Magic, Version, Flags    uint32
	Capacity, GrainSectors   uint64
	DescriptorAt, Descriptor uint64
	PerTable                 uint32
	RedundantAt, DirectoryAt uint64
	Overhead                 uint64
	Unclean                  uint8
	EndLine, NotEndLine      byte
	DoubleEndLine            [2]byte
	Compression              uint16
	_                        [433]byte
}

// Write writes the disk of size bytes in r, a whole number of sectors, and returns how many bytes it wrote.
func Write(w io.Writer, r io.ReaderAt, size int64, o Options) (int64, error) {
	if size <= 0 || size%Sector != 0 || size > sizeMax {
		return 0, fmt.Errorf("a VMDK of %d bytes: not a whole number of sectors up to %d bytes", size, sizeMax)
	}
	s := &stream{w: bufio.NewWriterSize(w, 1<<20)}
	tables := make([]uint32, (size+Grain-1)/Grain)
	h := header{Magic: magic, Version: version, Flags: flags, Capacity: uint64(size / Sector), GrainSectors: Grain / Sector,
		DescriptorAt: 1, Descriptor: descSectors, PerTable: perTable, DirectoryAt: atEnd, Overhead: overhead / Sector,
		EndLine: '\n', NotEndLine: ' ', DoubleEndLine: [2]byte{'\r', '\n'}, Compression: deflate}
	s.put(h)
	d := descriptor(size, o)
	if len(d) > descSectors*Sector {
		return 0, fmt.Errorf("descriptor of %d bytes: the name %q is too long", len(d), o.Name)
	}
	s.bytes([]byte(d))
	s.zeros(overhead - s.at)
	if err := s.grains(r, size, tables); err != nil {
		return s.at, err
	}

	var directory []uint32
	for len(tables) > 0 {
		var t [perTable]uint32
		tables = tables[copy(t[:], tables):]
		s.marker(markTable, tableBytes/Sector)
		directory = append(directory, s.sector())
		s.put(t)
	}
	s.marker(markDirectory, int64(len(directory)*4+Sector-1)/Sector)
	h.DirectoryAt = uint64(s.sector())
	s.put(directory)
	s.pad()
	s.marker(markFooter, 1)
	s.put(h)
	s.marker(markEnd, 0)
	if s.err == nil {
		s.err = s.w.Flush()
	}
	if s.err != nil {
		return s.at, fmt.Errorf("write VMDK: %w", s.err)
	}
	return s.at, nil
}

// stream counts what it writes; after an error it writes nothing.
type stream struct {
	w   *bufio.Writer
	at  int64
	err error
}

func (s *stream) bytes(b []byte) {
	if s.err == nil {
		_, s.err = s.w.Write(b)
		s.at += int64(len(b))
	}
}

func (s *stream) put(v any) {
	var b bytes.Buffer
	if err := binary.Write(&b, binary.LittleEndian, v); err != nil && s.err == nil {
		s.err = err
	}
	s.bytes(b.Bytes())
}

func (s *stream) zeros(n int64)  { s.bytes(make([]byte, n)) }
func (s *stream) pad()           { s.zeros(-s.at & (Sector - 1)) }
func (s *stream) sector() uint32 { return uint32(s.at / Sector) }

func (s *stream) marker(kind uint32, sectors int64) {
	s.put(struct {
		Sectors    uint64
		Size, Kind uint32
		_          [496]byte
	}{Sectors: uint64(sectors), Kind: kind})
}

// grains writes every grain that is not all zeros and notes in tables where.
func (s *stream) grains(r io.ReaderAt, size int64, tables []uint32) error {
	buf := make([]byte, Grain)
	var packed bytes.Buffer
	z, err := zlib.NewWriterLevel(&packed, zlib.DefaultCompression)
	if err != nil {
		return err
	}
	for g := range tables {
		at := int64(g) * Grain
		n := min(Grain, size-at)
		clear(buf[n:])
		if k, err := r.ReadAt(buf[:n], at); int64(k) < n {
			return fmt.Errorf("read %d bytes of the disk at %d: %w", n, at, err)
		}
		if zero(buf) {
			continue
		}
		packed.Reset()
		z.Reset(&packed)
		if _, err := z.Write(buf); err != nil {
			return err
		}
		if err := z.Close(); err != nil {
			return err
		}
		if s.at/Sector > 1<<32-2 {
			return errors.New("the VMDK's sectors have no 32-bit numbers any more")
		}
		tables[g] = s.sector()
		s.put(struct {
			LBA  uint64
			Size uint32
		}{uint64(at / Sector), uint32(packed.Len())})
		s.bytes(packed.Bytes())
		s.pad()
		if s.err != nil {
			return fmt.Errorf("write VMDK: %w", s.err)
		}
	}
	return nil
}

var zeroGrain [Grain]byte

func zero(b []byte) bool { return bytes.Equal(b, zeroGrain[:len(b)]) }

// descriptor is the text that VMware reads. The geometry is what a BIOS expects; nothing boots by it any more.
func descriptor(size int64, o Options) string {
	if o.Adapter == "" {
		o.Adapter = "lsilogic"
	}
	if o.Virtual == 0 {
		o.Virtual = 14
	}
	cid := binary.BigEndian.Uint32(o.ID[:4])
	if cid >= 0xfffffffe { // these mean "none"
		cid = 1
	}
	return fmt.Sprintf(`# Disk DescriptorFile
version=1
CID=%08x
parentCID=ffffffff
createType="streamOptimized"

# Extent description
RDONLY %d SPARSE "%s"

# The Disk Data Base
#DDB

ddb.adapterType = "%s"
ddb.encoding = "UTF-8"
ddb.geometry.cylinders = "%d"
ddb.geometry.heads = "255"
ddb.geometry.sectors = "63"
ddb.longContentID = "%08x%x"
ddb.toolsVersion = "2147483647"
ddb.virtualHWVersion = "%d"
`, cid, size/Sector, o.Name, o.Adapter, max(1, min(size/Sector/(255*63), 65535)), cid, o.ID[4:], o.Virtual)
}
