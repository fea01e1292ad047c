package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"varve/appliance/nbdclient"
	"varve/volumedriver/blockio"
)

// rawSource is a raw image in a file or on a block device.
type rawSource struct {
	f    *os.File
	size int64
}

func openRaw(path string) (*rawSource, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() && info.Mode()&(fs.ModeDevice|fs.ModeCharDevice) != fs.ModeDevice {
		err = &Error{fmt.Errorf("%s is neither a file nor a block device", path), "give an image file"}
	}
	var size int64
	if err == nil {
		size, err = f.Seek(0, io.SeekEnd)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return &rawSource{f: f, size: size}, nil
}

func (s *rawSource) Size() int64  { return s.size }
func (s *rawSource) Close() error { return s.f.Close() }

func (s *rawSource) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	n, err := s.f.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// Extents asks the file system where data begins and ends. Where that is not known, all is data.
func (s *rawSource) Extents(_ context.Context, off, n int64) ([]blockio.Extent, error) {
	whole := []blockio.Extent{{Length: n}}
	data, err := unix.Seek(int(s.f.Fd()), off, unix.SEEK_DATA)
	if errors.Is(err, syscall.ENXIO) {
		return []blockio.Extent{{Length: n, Hole: true, Zero: true}}, nil
	}
	if err != nil {
		return whole, nil
	}
	if data > off {
		return []blockio.Extent{{Length: min(n, data-off), Hole: true, Zero: true}}, nil
	}
	hole, err := unix.Seek(int(s.f.Fd()), off, unix.SEEK_HOLE)
	if err != nil || hole <= off {
		return whole, nil
	}
	return []blockio.Extent{{Length: min(n, hole-off)}}, nil
}

// rawSink is a new raw file; what is not written stays a hole.
type rawSink struct{ f *os.File }

func (s rawSink) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	_, err := s.f.WriteAt(p, off)
	return err
}

func (s rawSink) Zero(context.Context, int64, int) error { return nbdclient.ErrUnsupported }
func (s rawSink) Flush(context.Context) error            { return s.f.Sync() }
func (s rawSink) Close() error                           { return s.f.Close() }

// exportFile makes dest appear whole or not at all.
func exportFile(ctx context.Context, src *nbdclient.Client, t nbdclient.Target, dest string, opt ExportOptions) error {
	if info, err := os.Stat(dest); err == nil {
		if !info.Mode().IsRegular() {
			return &Error{fmt.Errorf("%s is not a regular file", dest), "give the name of a new file"}
		}
		if !opt.Replace {
			return &Error{fmt.Errorf("%s: %w", dest, fs.ErrExist), "give another name, or --replace to replace it"}
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	partial := dest + ".partial"
	f, err := os.OpenFile(partial, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return &Error{fmt.Errorf("%s exists: another export is running or was killed", partial), "remove it when none is running"}
	}
	if err != nil {
		return err
	}
	if err := write(ctx, f, src, t, opt); err != nil {
		f.Close()
		os.Remove(partial)
		return err
	}
	if err := f.Close(); err != nil {
		os.Remove(partial)
		return err
	}
	if err := os.Rename(partial, dest); err != nil {
		os.Remove(partial)
		return err
	}
	return syncDir(filepath.Dir(dest))
}

// write fills f, which is new and empty, and makes it durable.
func write(ctx context.Context, f *os.File, src *nbdclient.Client, t nbdclient.Target, opt ExportOptions) error {
	if opt.Format != Raw {
		if err := convertOut(ctx, t, f.Name(), opt.Format, opt.Progress); err != nil {
			return err
		}
		return f.Sync() // the same inode: qemu-img truncates, it does not replace
	}
	if err := f.Truncate(src.Size()); err != nil {
		return err
	}
	sink := rawSink{f}
	if err := Copy(ctx, sink, src, true, opt.Progress); err != nil {
		return err
	}
	return sink.Flush(ctx)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
