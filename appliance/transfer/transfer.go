// Package transfer moves disk images into vDisks and out of them.
//
// The vDisk's side is always its NBD export at the running server, so an import passes the same log, acknowledgement and
// back-pressure as a guest's writes. The other side is a raw file or block device, another NBD export, or any format that
// qemu-img knows, in which case qemu-img reads or writes our export itself.
//
//	import: inspect the source -> create the vDisk at the source's size -> copy data, skip zeros -> flush
//	        any failure, also a cancelled context: delete the vDisk again
//	export: open the vDisk -> write FILE.partial with holes where the vDisk has none -> fsync -> rename
//	        any failure: remove FILE.partial
//
// Copying walks the source's extents (SEEK_DATA, NBD block status), so a sparse terabyte costs what its data costs. An
// export of a vDisk that a guest is writing is not one point in time.
package transfer

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"varve/appliance/nbdclient"
	"varve/volumedriver/blockio"
)

const (
	chunkBytes  = 1 << 20
	workers     = 8
	zeroGrain   = 64 << 10 // zeros are looked for in runs of this many bytes
	extentsSpan = 1 << 30  // bytes of the source whose extents are asked for at once
	undoTimeout = 30 * time.Second
)

// Source is a disk image to read.
type Source interface {
	Size() int64
	ReadAt(ctx context.Context, p []byte, off int64) error
	// Extents gives the allocation of [off,off+n) or of a shorter range from off on: at least one extent.
	Extents(ctx context.Context, off, n int64) ([]blockio.Extent, error)
	Close() error
}

// Sink is a disk image to write.
type Sink interface {
	WriteAt(ctx context.Context, p []byte, off int64) error
	// Zero makes a range read as zeros, or says nbdclient.ErrUnsupported.
	Zero(ctx context.Context, off int64, n int) error
	// Flush makes what was written durable.
	Flush(ctx context.Context) error
	Close() error
}

// Progress is told how many of the image's bytes are dealt with. Calls do not overlap.
type Progress func(done, total int64)

// Error is a failure whose remedy is known.
type Error struct {
	Err  error
	Help string
}

func (e *Error) Error() string  { return e.Err.Error() }
func (e *Error) Unwrap() error  { return e.Err }
func (e *Error) Remedy() string { return e.Help }

// Copy brings every byte of src to dst and flushes dst. With fresh set, dst is known to read as zeros and zeros are skipped;
// otherwise they are written.
func Copy(ctx context.Context, dst Sink, src Source, fresh bool, progress Progress) error {
	g, ctx := errgroup.WithContext(ctx)
	chunks, dealt := make(chan chunk, workers), make(chan int64, workers)
	total := src.Size()
	g.Go(func() error {
		defer close(chunks)
		return plan(ctx, src, func(c chunk) error {
			select {
			case chunks <- c:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
	})
	for range workers {
		g.Go(func() error {
			buf := make([]byte, chunkBytes)
			for c := range chunks {
				if err := c.copy(ctx, dst, src, buf, fresh); err != nil {
					return err
				}
				select {
				case dealt <- c.n:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			return nil
		})
	}
	g.Go(func() error {
		for done := int64(0); done < total; {
			select {
			case n := <-dealt:
				done += n
				if progress != nil {
					progress(done, total)
				}
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	if err := g.Wait(); err != nil {
		return err
	}
	return nil
}

// chunk is a range of the image: of at most chunkBytes if it holds data, of any length if it reads as zeros.
type chunk struct {
	off, n int64
	zero   bool
}

// plan cuts the whole image into chunks.
func plan(ctx context.Context, src Source, emit func(chunk) error) error {
	size := src.Size()
	for off := int64(0); off < size; {
		extents, err := src.Extents(ctx, off, min(size-off, extentsSpan))
		if err != nil {
			return err
		}
		for _, e := range extents {
			end := min(off+e.Length, size)
			for off < end {
				c := chunk{off: off, n: end - off, zero: e.Zero}
				if !c.zero {
					c.n = min(c.n, chunkBytes)
				}
				if err := emit(c); err != nil {
					return err
				}
				off += c.n
			}
		}
	}
	return nil
}

func (c chunk) copy(ctx context.Context, dst Sink, src Source, buf []byte, fresh bool) error {
	if c.zero {
		if fresh {
			return nil
		}
		return zero(ctx, dst, buf, c.off, c.n)
	}
	p := buf[:c.n]
	if err := src.ReadAt(ctx, p, c.off); err != nil {
		return err
	}
	for at := 0; at < len(p); {
		empty := isZero(p[at:min(at+zeroGrain, len(p))])
		end := at
		for end < len(p) && isZero(p[end:min(end+zeroGrain, len(p))]) == empty {
			end = min(end+zeroGrain, len(p))
		}
		var err error
		switch {
		case !empty:
			err = dst.WriteAt(ctx, p[at:end], c.off+int64(at))
		case !fresh:
			err = zero(ctx, dst, p[at:end], c.off+int64(at), int64(end-at))
		}
		if err != nil {
			return err
		}
		at = end
	}
	return nil
}

// zero clears a range of the sink, by writing zeros from buf where it cannot do that by itself.
func zero(ctx context.Context, dst Sink, buf []byte, off, n int64) error {
	for n > 0 {
		step := min(n, 1<<30)
		err := dst.Zero(ctx, off, int(step))
		if errors.Is(err, nbdclient.ErrUnsupported) {
			step = min(n, int64(len(buf)))
			clear(buf[:step])
			err = dst.WriteAt(ctx, buf[:step], off)
		}
		if err != nil {
			return err
		}
		off, n = off+step, n-step
	}
	return nil
}

func isZero(p []byte) bool {
	const word = 4096
	var zeros [word]byte
	for len(p) > 0 {
		n := min(len(p), word)
		if string(p[:n]) != string(zeros[:n]) {
			return false
		}
		p = p[n:]
	}
	return true
}

// Disks is the appliance as an import needs it.
type Disks interface {
	// Create makes an empty vDisk of that size.
	Create(ctx context.Context, name string, size int64) error
	Delete(ctx context.Context, name string) error
	// Target gives the NBD export of a vDisk.
	Target(ctx context.Context, name string) (nbdclient.Target, error)
}

// ImportOptions change how a source is read.
type ImportOptions struct {
	// Format overrides what the source's first bytes say.
	Format Format
	// AllowBacking lets an image refer to other files. Those are read with the caller's rights: only for trusted images.
	AllowBacking bool
	Progress     Progress
}

// sectorBytes is what a vDisk's size is a multiple of: a source's last, partial sector is filled with zeros.
const sectorBytes = 512

// Imported says what an import made.
type Imported struct {
	Name   string
	Format Format
	Size   int64
}

// Import makes the vDisk name from a file or an NBD URI. On any error no vDisk is left behind.
func Import(ctx context.Context, disks Disks, source, name string, opt ImportOptions) (Imported, error) {
	img, err := inspect(ctx, source, opt)
	if err != nil {
		return Imported{}, err
	}
	if img.size == 0 {
		return Imported{}, &Error{fmt.Errorf("%s is empty", source), "give an image with a size above zero"}
	}
	size := (img.size + sectorBytes - 1) / sectorBytes * sectorBytes
	if err := disks.Create(ctx, name, size); err != nil {
		return Imported{}, err
	}
	if err := fill(ctx, disks, img, name, opt.Progress); err != nil {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		if e := disks.Delete(undo, name); e != nil {
			return Imported{}, &Error{fmt.Errorf("%w; the half-made vDisk could not be deleted: %w", err, e),
				"delete it with: varve vdisk delete " + name + " --confirm " + name}
		}
		return Imported{}, err
	}
	return Imported{Name: name, Format: img.format, Size: size}, nil
}

func fill(ctx context.Context, disks Disks, img image, name string, progress Progress) error {
	t, err := disks.Target(ctx, name)
	if err != nil {
		return err
	}
	dst, err := nbdclient.Dial(ctx, t)
	if err != nil {
		return err
	}
	defer dst.Close()
	if img.native() {
		src, err := img.open(ctx)
		if err != nil {
			return err
		}
		defer src.Close()
		if src.Size() != img.size {
			return fmt.Errorf("%s changed its size from %d to %d bytes", img.source, img.size, src.Size())
		}
		if err := Copy(ctx, dst, src, true, progress); err != nil {
			return err
		}
		return dst.Flush(ctx)
	}
	if err := convertIn(ctx, img, t, progress); err != nil {
		return err
	}
	return dst.Flush(ctx)
}

// ExportOptions change how an image is written.
type ExportOptions struct {
	// Format of the image; empty means raw.
	Format Format
	// Replace allows an existing file to be replaced.
	Replace  bool
	Progress Progress
}

// Export writes the vDisk behind t to a file, or to another server's NBD export, which must be at least as large.
func Export(ctx context.Context, t nbdclient.Target, dest string, opt ExportOptions) (size int64, err error) {
	if opt.Format == "" {
		opt.Format = Raw
	}
	src, err := nbdclient.Dial(ctx, t)
	if err != nil {
		return 0, err
	}
	defer src.Close()
	switch {
	case nbdclient.IsURI(dest) && opt.Format != Raw:
		return 0, &Error{fmt.Errorf("format %s does not go to an NBD export", opt.Format), "leave --format out"}
	case nbdclient.IsURI(dest):
		return src.Size(), exportNBD(ctx, src, dest, opt.Progress)
	}
	return src.Size(), exportFile(ctx, src, t, dest, opt)
}

func exportNBD(ctx context.Context, src *nbdclient.Client, uri string, progress Progress) error {
	t, err := nbdclient.ParseURI(uri)
	if err != nil {
		return err
	}
	dst, err := nbdclient.Dial(ctx, t)
	if err != nil {
		return err
	}
	defer dst.Close()
	if dst.ReadOnly() {
		return &Error{fmt.Errorf("%s is read-only", t), "export it writable"}
	}
	if dst.Size() < src.Size() {
		return &Error{fmt.Errorf("%s has %d bytes, the vDisk has %d", t, dst.Size(), src.Size()), "give a target that is large enough"}
	}
	if err := Copy(ctx, dst, src, false, progress); err != nil {
		return err
	}
	return dst.Flush(ctx)
}
