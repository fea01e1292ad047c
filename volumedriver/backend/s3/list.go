package s3

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/minio/minio-go/v7"

	"varve/volumedriver/backend"
)

const (
	pageMax = 1000 // of S3, for lists and batches
)

// Stat implements backend.Backend.
func (s *Store) Stat(ctx context.Context, name string) (backend.Info, error) {
	key, err := s.key(name)
	if err != nil {
		return backend.Info{}, err
	}
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return backend.Info{}, err
	}
	defer end()
	l := s.lane(ctx, laneRead)
	info := backend.Info{Name: name}
	err = s.retry(ctx, l, s.ask(), 0, func(ctx context.Context, _ int) error {
		o, err := l.core.StatObject(ctx, s.cfg.Bucket, key, minio.StatObjectOptions{})
		info.Size = o.Size
		return s.believe(ctx, l, err)
	})
	if err != nil {
		return backend.Info{}, fmt.Errorf("stat object %s: %w", name, err)
	}
	return info, nil
}

// believe takes no 404 for an object that is not there before the bucket has been seen: HEAD has no body to tell one from the
// other, and a proxy or a store with the wrong keys may answer 404 to everything.
func (s *Store) believe(ctx context.Context, l *lane, err error) error {
	a, ok := errors.AsType[minio.ErrorResponse](err)
	if !ok || a.StatusCode != http.StatusNotFound {
		return err
	}
	there, e := l.core.BucketExists(ctx, s.cfg.Bucket)
	switch {
	case e != nil:
		return e
	case !there && a.Code == "NoSuchKey":
		return minio.ErrorResponse{Code: "NoSuchBucket", Message: "The bucket is not there, or not for these keys", StatusCode: http.StatusNotFound,
			BucketName: s.cfg.Bucket}
	}
	return err
}

// Delete implements backend.Backend.
func (s *Store) Delete(ctx context.Context, name string) error {
	key, err := s.key(name)
	if err != nil {
		return err
	}
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	l := s.lane(ctx, laneScrub)
	err = s.retry(ctx, l, s.ask(), 0, func(ctx context.Context, _ int) error {
		return s.believe(ctx, l, l.core.RemoveObject(ctx, s.cfg.Bucket, key, minio.RemoveObjectOptions{}))
	})
	if err != nil && kindOf(err) != absent {
		return fmt.Errorf("delete object %s: %w", name, err)
	}
	return nil
}

// DeleteAll implements backend.BatchDeleter.
func (s *Store) DeleteAll(ctx context.Context, names []string) error {
	keys := make([]string, len(names))
	for i, name := range names {
		var err error
		if keys[i], err = s.key(name); err != nil {
			return err
		}
	}
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	l := s.lane(ctx, laneScrub)
	for batch := range slices.Chunk(keys, pageMax) {
		err := s.retry(ctx, l, s.ask(), 0, func(ctx context.Context, _ int) error { return s.deleteBatch(ctx, l.core, batch) })
		if e, ok := errors.AsType[*Error](err); ok && (e.Code == "NotImplemented" || e.Status == http.StatusMethodNotAllowed || e.Status == http.StatusNotImplemented) {
			err = s.deleteEach(ctx, l, batch)
		}
		if err != nil {
			return fmt.Errorf("delete %d objects: %w", len(names), err)
		}
	}
	return nil
}

func (s *Store) deleteBatch(ctx context.Context, core *minio.Core, keys []string) error {
	objects := make(chan minio.ObjectInfo, len(keys))
	for _, key := range keys {
		objects <- minio.ObjectInfo{Key: key}
	}
	close(objects)
	deleted := 0
	var first error
	for r := range core.RemoveObjectsWithResult(ctx, s.cfg.Bucket, objects, minio.RemoveObjectsOptions{}) {
		switch a, _ := errors.AsType[minio.ErrorResponse](r.Err); {
		case r.Err == nil || a.Code == "NoSuchKey":
			deleted++
		case first == nil:
			first = r.Err
		}
	}
	if first == nil && deleted < len(keys) {
		return fmt.Errorf("%d of %d deletions are confirmed", deleted, len(keys))
	}
	return first
}

func (s *Store) deleteEach(ctx context.Context, l *lane, keys []string) error {
	for _, key := range keys {
		err := s.retry(ctx, l, s.ask(), 0, func(ctx context.Context, _ int) error {
			return s.believe(ctx, l, l.core.RemoveObject(ctx, s.cfg.Bucket, key, minio.RemoveObjectOptions{}))
		})
		if err != nil && kindOf(err) != absent {
			return err
		}
	}
	return nil
}

// List implements backend.Backend.
func (s *Store) List(ctx context.Context, prefix, after string, limit int) ([]backend.Info, error) {
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	if limit <= 0 || !possible(prefix) || len(s.prefix)+len(prefix) > keyBytesMax {
		return nil, nil
	}
	w := &listing{s: s, prefix: prefix, last: after, limit: limit}
	l := s.lane(ctx, laneRead)
	for !w.done {
		// One page at a time, so that a page that fails is all that is asked for again.
		err := s.retry(ctx, l, s.ask(), 0, func(ctx context.Context, _ int) error { return w.page(ctx, l.core) })
		if err != nil {
			return nil, fmt.Errorf("list objects from %q after %q: %w", prefix, after, err)
		}
	}
	return w.found, nil
}

// possible says whether an object's name can begin with prefix.
func possible(prefix string) bool {
	i := strings.LastIndexByte(prefix, '/')
	if i >= 0 && backend.CheckName(prefix[:i]) != nil {
		return false
	}
	rest := prefix[i+1:]
	return rest == "" || backend.CheckName("x"+rest) == nil
}

// listing is a List under way.
type listing struct {
	s      *Store
	prefix string
	last   string // the name after which it goes on
	limit  int
	found  []backend.Info
	done   bool
}

func (w *listing) page(ctx context.Context, core *minio.Core) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	no := false
	opts := minio.ListObjectsOptions{Prefix: w.s.prefix + w.prefix, Recursive: true, MaxKeys: min(pageMax, w.limit-len(w.found)), FetchOwner: &no}
	if w.last != "" {
		opts.StartAfter = w.s.prefix + w.last
	}
	seen, kept := 0, len(w.found)
	last := w.last
	var strange error
	for o := range core.ListObjectsIter(ctx, w.s.cfg.Bucket, opts) {
		if o.Err != nil {
			w.found = w.found[:kept]
			return o.Err
		}
		seen++
		name, ours := strings.CutPrefix(o.Key, w.s.prefix+w.prefix)
		name = w.prefix + name
		if !ours || name <= last || o.Size < 0 {
			strange = refused(fmt.Sprintf("the store lists %s after %s: it does not list in the order of names from start-after", clip(o.Key), clip(last)),
				"use a store whose ListObjectsV2 does; S3 directory buckets do not")
			break
		}
		last = name
		if backend.CheckName(name) == nil { // else somebody else put it there
			w.found = append(w.found, backend.Info{Name: name, Size: o.Size})
		}
		if seen == opts.MaxKeys {
			break
		}
	}
	if strange != nil {
		w.found = w.found[:kept]
		return strange
	}
	if err := ctx.Err(); err != nil {
		w.found = w.found[:kept]
		return err
	}
	w.last = last
	w.done = seen < opts.MaxKeys || len(w.found) >= w.limit
	return nil
}
