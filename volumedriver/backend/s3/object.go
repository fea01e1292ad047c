package s3

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"

	"github.com/minio/minio-go/v7"

	"varve/volumedriver/backend"
	"varve/volumedriver/vfs"
)

// openBytes are read when an object is opened: its size comes with them, and an SCO's header, which is read first, is in them.
const openBytes = 32 << 10

// object reads one object by ranges.
type object struct {
	s    *Store
	name string
	key  string
	size int64
	etag string

	mu    sync.Mutex
	start []byte // what came with the opening, until the first read
}

// Open implements backend.Backend. It takes one request, which brings the first bytes along.
func (s *Store) Open(ctx context.Context, name string) (backend.Object, error) {
	key, err := s.key(name)
	if err != nil {
		return nil, err
	}
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	o := &object{s: s, name: name, key: key}
	l := s.lane(ctx, laneRead)
	err = s.retry(ctx, l, s.read(), openBytes, func(ctx context.Context, _ int) error { return s.believe(ctx, l, o.open(ctx, l.core)) })
	if err != nil {
		return nil, fmt.Errorf("open object %s: %w", name, err)
	}
	return o, nil
}

func (o *object) open(ctx context.Context, core *minio.Core) error {
	var opts minio.GetObjectOptions
	if err := opts.SetRange(0, openBytes-1); err != nil {
		return err
	}
	body, info, header, err := core.GetObject(ctx, o.s.cfg.Bucket, o.key, opts)
	if err != nil {
		if a, ok := errors.AsType[minio.ErrorResponse](err); ok && a.StatusCode == http.StatusRequestedRangeNotSatisfiable {
			return o.openEmpty(ctx, core)
		}
		return err
	}
	defer body.Close()
	size := info.Size
	if r := header.Get("Content-Range"); r != "" {
		from, to, total, ok := contentRange(r)
		if !ok || from != 0 || to+1 != info.Size || to >= total || info.Size != min(total, openBytes) {
			return fmt.Errorf("asked for the first %d bytes, got range %s of length %d: %w", openBytes, clip(r), info.Size, errWrongLength)
		}
		size = total
	}
	if info.Size < 0 || info.Size > openBytes {
		return fmt.Errorf("asked for the first %d bytes, got %d: %w", openBytes, info.Size, errWrongLength)
	}
	start := make([]byte, info.Size)
	if _, err := io.ReadFull(body, start); err != nil {
		return err
	}
	o.size, o.etag, o.start = size, info.ETag, start
	return nil
}

// openEmpty opens an object that has no first byte to give.
func (o *object) openEmpty(ctx context.Context, core *minio.Core) error {
	info, err := core.StatObject(ctx, o.s.cfg.Bucket, o.key, minio.StatObjectOptions{})
	if err != nil {
		return err
	}
	if info.Size != 0 {
		return fmt.Errorf("object of %d bytes has no range from 0: %w", info.Size, errWrongLength)
	}
	o.size, o.etag = 0, info.ETag
	return nil
}

// contentRange reads "bytes from-to/total".
func contentRange(s string) (from, to, total int64, ok bool) {
	span, all, ok1 := strings.Cut(strings.TrimPrefix(s, "bytes "), "/")
	a, b, ok2 := strings.Cut(span, "-")
	from, err1 := strconv.ParseInt(a, 10, 64)
	to, err2 := strconv.ParseInt(b, 10, 64)
	total, err3 := strconv.ParseInt(all, 10, 64)
	return from, to, total, ok1 && ok2 && err1 == nil && err2 == nil && err3 == nil && from >= 0 && to >= from && total > to
}

func (o *object) Size() int64  { return o.size }
func (o *object) Close() error { return nil }

func (o *object) inside(p []byte, off int64) error {
	if off < 0 || off > o.size || int64(len(p)) > o.size-off {
		return fmt.Errorf("read object %s: bytes %d+%d of %d: %w", o.name, off, len(p), o.size, io.ErrUnexpectedEOF)
	}
	return nil
}

// TryReadAt implements backend.Object: the network is always a wait.
func (o *object) TryReadAt(p []byte, off int64) error {
	if err := o.inside(p, off); err != nil {
		return err
	}
	return vfs.ErrWouldBlock
}

// ReadAt implements backend.Object.
func (o *object) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := o.inside(p, off); err != nil {
		return err
	}
	if len(p) == 0 || o.fromStart(p, off) {
		return nil
	}
	ctx, end, err := o.s.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	l := o.s.lane(ctx, laneRead)
	err = o.s.retry(ctx, l, o.s.read(), int64(len(p)), func(ctx context.Context, _ int) error { return o.s.believe(ctx, l, o.get(ctx, l.core, p, off)) })
	if err != nil {
		return fmt.Errorf("read object %s: %w", o.name, err)
	}
	return nil
}

// fromStart answers the first read from what came with the opening, if that holds it.
func (o *object) fromStart(p []byte, off int64) bool {
	o.mu.Lock()
	start := o.start
	o.start = nil
	o.mu.Unlock()
	if off+int64(len(p)) > int64(len(start)) {
		return false
	}
	copy(p, start[off:])
	return true
}

func (o *object) get(ctx context.Context, core *minio.Core, p []byte, off int64) error {
	var opts minio.GetObjectOptions
	last := off + int64(len(p)) - 1
	if err := opts.SetRange(off, last); err != nil {
		return err
	}
	body, info, header, err := core.GetObject(ctx, o.s.cfg.Bucket, o.key, opts)
	if err != nil {
		return err
	}
	defer body.Close()
	r := header.Get("Content-Range")
	from, to, total, ok := contentRange(r)
	whole := r == "" && off == 0 && int64(len(p)) == o.size // a range that is everything may be answered as such
	if !whole && (!ok || from != off || to != last || total != o.size) || info.Size != int64(len(p)) {
		return fmt.Errorf("asked for bytes %d-%d of %d, got range %s of length %d: %w", off, last, o.size, clip(r), info.Size, errWrongLength)
	}
	if o.etag != "" && info.ETag != "" && info.ETag != o.etag {
		return &Error{Code: "Replaced", Status: http.StatusOK, Detail: fmt.Sprintf("entity tag %s was %s when it was opened: somebody has replaced "+
			"an object that is never changed", clip(info.ETag), clip(o.etag)), remedy: "find out who else writes to the bucket", kind: refusal}
	}
	if _, err := io.ReadFull(body, p); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	return nil
}
