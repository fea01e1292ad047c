package vmdk

import (
	"bytes"
	"compress/zlib"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Layout is what Inspect found.
type Layout struct {
	Capacity   int64 // bytes of the disk
	Grains     int   // that are in the file
	Tables     int
	EndAt      int64 // of the end marker
	Descriptor string
}

// Inspect reads a file of length bytes marker by marker, as an importer that streams does, then compares the tables with what the
// stream had, as one that seeks does. With disk, the grains are unpacked into it; its zeros are left as they are. Anything but a
// file of the form that the package comment describes is an error.
func Inspect(r io.ReaderAt, length int64, disk io.WriterAt) (Layout, error) {
	var l Layout
	h, err := readHeader(r, 0)
	if err != nil {
		return l, err
	}
	if h.DirectoryAt != atEnd {
		return l, fmt.Errorf("grain directory at sector %d, not at the end", h.DirectoryAt)
	}
	l.Capacity = int64(h.Capacity) * Sector
	text := make([]byte, h.Descriptor*Sector)
	if _, err := r.ReadAt(text, int64(h.DescriptorAt)*Sector); err != nil {
		return l, fmt.Errorf("read descriptor: %w", err)
	}
	l.Descriptor = string(bytes.TrimRight(text, "\x00"))

	w := walk{r: r, length: length, at: int64(h.Overhead) * Sector, capacity: h.Capacity, grains: map[uint64]uint32{}, disk: disk}
	if err := w.run(); err != nil {
		return l, fmt.Errorf("at byte %d: %w", w.at, err)
	}
	l.Grains, l.Tables, l.EndAt = len(w.grains), len(w.tables), w.end
	if err := w.compare(h); err != nil {
		return l, err
	}
	if l.EndAt+Sector != length {
		return l, fmt.Errorf("the end marker is at byte %d, the file has %d bytes: it must be the last sector", l.EndAt, length)
	}
	return l, nil
}

func readHeader(r io.ReaderAt, at int64) (header, error) {
	var h header
	if err := binary.Read(io.NewSectionReader(r, at, Sector), binary.LittleEndian, &h); err != nil {
		return h, fmt.Errorf("read header at %d: %w", at, err)
	}
	switch {
	case h.Magic != magic:
		return h, fmt.Errorf("no VMDK: magic %#x", h.Magic)
	case h.Version != version || h.Flags != flags || h.Compression != deflate:
		return h, fmt.Errorf("version %d, flags %#x, compression %d: not streamOptimized", h.Version, h.Flags, h.Compression)
	case h.GrainSectors != Grain/Sector || h.PerTable != perTable:
		return h, fmt.Errorf("grains of %d sectors, tables of %d entries", h.GrainSectors, h.PerTable)
	case h.Capacity == 0 || h.Capacity > uint64(sizeMax/Sector):
		return h, fmt.Errorf("capacity of %d sectors", h.Capacity)
	case h.DescriptorAt == 0 || h.Descriptor == 0 || h.DescriptorAt+h.Descriptor > h.Overhead || h.Overhead > 2048:
		return h, fmt.Errorf("descriptor of %d sectors at %d, data at %d", h.Descriptor, h.DescriptorAt, h.Overhead)
	case string([]byte{h.EndLine, h.NotEndLine, h.DoubleEndLine[0], h.DoubleEndLine[1]}) != "\n \r\n":
		return h, errors.New("the header's line ends are damaged, as by a transfer as text")
	}
	return h, nil
}

// walk is a reading of the stream.
type walk struct {
	r          io.ReaderAt
	length, at int64
	capacity   uint64
	disk       io.WriterAt

	grains    map[uint64]uint32 // LBA to sector in the file
	tables    []uint32          // sectors of the tables, in order
	directory int64
	footer    header
	end       int64
}

func (w *walk) run() error {
	next := uint64(0)
	for {
		var m struct {
			LBA        uint64
			Size, Kind uint32
		}
		if err := binary.Read(io.NewSectionReader(w.r, w.at, w.length-w.at), binary.LittleEndian, &m); err != nil {
			return fmt.Errorf("no end marker: %w", err)
		}
		if m.Size > 0 {
			if m.LBA < next || m.LBA >= w.capacity || m.LBA%(Grain/Sector) != 0 {
				return fmt.Errorf("grain at LBA %d, expected %d or later, below %d", m.LBA, next, w.capacity)
			}
			if len(w.tables) > 0 {
				return errors.New("a grain behind the tables")
			}
			if err := w.grain(m.LBA, m.Size); err != nil {
				return err
			}
			next = m.LBA + Grain/Sector
			continue
		}
		body := w.at + Sector
		switch {
		case m.Kind == markEnd && m.LBA == 0:
			w.end = w.at
			return nil
		case m.Kind == markTable && m.LBA == tableBytes/Sector:
			w.tables = append(w.tables, uint32(body/Sector))
		case m.Kind == markDirectory && m.LBA > 0 && m.LBA <= 1<<16:
			w.directory = body
		case m.Kind == markFooter && m.LBA == 1:
			var err error
			if w.footer, err = readHeader(w.r, body); err != nil {
				return err
			}
		default:
			return fmt.Errorf("marker of kind %d with %d sectors", m.Kind, m.LBA)
		}
		w.at = body + int64(m.LBA)*Sector
	}
}

func (w *walk) grain(lba uint64, size uint32) error {
	if size > 2*Grain {
		return fmt.Errorf("a grain of %d bytes", size)
	}
	z, err := zlib.NewReader(io.NewSectionReader(w.r, w.at+12, int64(size)))
	if err != nil {
		return fmt.Errorf("grain at LBA %d: %w", lba, err)
	}
	data := make([]byte, Grain)
	if _, err := io.ReadFull(z, data); err != nil {
		return fmt.Errorf("grain at LBA %d: %w", lba, err)
	}
	if n, err := z.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		return fmt.Errorf("grain at LBA %d is longer than a grain: %v", lba, err)
	}
	if w.disk != nil {
		at := int64(lba) * Sector
		data = data[:min(Grain, int64(w.capacity)*Sector-at)]
		if _, err := w.disk.WriteAt(data, at); err != nil {
			return fmt.Errorf("unpack grain at LBA %d: %w", lba, err)
		}
	}
	w.grains[lba] = uint32(w.at / Sector)
	w.at += (12 + int64(size) + Sector - 1) &^ (Sector - 1)
	return nil
}

// compare checks that directory and tables lead to exactly the grains that the stream had.
func (w *walk) compare(h header) error {
	if w.directory == 0 || w.footer.Magic == 0 {
		return errors.New("no directory or no footer")
	}
	f := w.footer
	if int64(f.DirectoryAt)*Sector != w.directory {
		return fmt.Errorf("the footer's directory is at sector %d, the stream's at byte %d", f.DirectoryAt, w.directory)
	}
	f.DirectoryAt = h.DirectoryAt
	if f != h {
		return fmt.Errorf("footer %+v and header %+v differ", f, h)
	}
	grains := int((h.Capacity + Grain/Sector - 1) / (Grain / Sector))
	if want := (grains + perTable - 1) / perTable; len(w.tables) != want {
		return fmt.Errorf("%d tables for %d grains, not %d", len(w.tables), grains, want)
	}
	directory := make([]uint32, len(w.tables))
	if err := binary.Read(io.NewSectionReader(w.r, w.directory, w.length), binary.LittleEndian, directory); err != nil {
		return fmt.Errorf("read directory: %w", err)
	}
	found := 0
	for i, sector := range directory {
		if sector != w.tables[i] {
			return fmt.Errorf("directory entry %d is sector %d, the table is at %d", i, sector, w.tables[i])
		}
		var t [perTable]uint32
		if err := binary.Read(io.NewSectionReader(w.r, int64(sector)*Sector, tableBytes), binary.LittleEndian, &t); err != nil {
			return fmt.Errorf("read table %d: %w", i, err)
		}
		for j, at := range t {
			lba := uint64(i*perTable+j) * (Grain / Sector)
			if at != w.grains[lba] {
				return fmt.Errorf("table entry of LBA %d is sector %d, the stream's is %d", lba, at, w.grains[lba])
			}
			if at != 0 {
				found++
			}
		}
	}
	if found != len(w.grains) {
		return fmt.Errorf("the tables have %d grains, the stream %d", found, len(w.grains))
	}
	return nil
}
