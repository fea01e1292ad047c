package s3

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash/crc32"
	"io"
	"net/http"
	"runtime"

	"github.com/minio/minio-go/v7"

	"varve/volumedriver/backend"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

const (
	checksumHeader = "x-amz-checksum-crc32c"
	idKey          = "Varve-Put" // of the user metadata
	hashBytes      = 64 << 10
)

// upload is one call of Put.
type upload struct {
	key   string
	parts [][]byte
	size  int64
	id    string // tells this call's object from anybody else's
	crc   string
	sha   string // signed where TLS does not protect the body
}

func newUpload(key string, parts [][]byte, secure bool) *upload {
	u := &upload{key: key, parts: parts}
	id := make([]byte, 16)
	rand.Read(id)
	u.id = hex.EncodeToString(id)
	crc := uint32(0)
	sum := sha256.New()
	for _, p := range parts {
		u.size += int64(len(p))
		for ; len(p) > 0; p = p[min(hashBytes, len(p)):] {
			piece := p[:min(hashBytes, len(p))]
			crc = crc32.Update(crc, castagnoli, piece)
			if !secure {
				sum.Write(piece)
			}
			runtime.Gosched() // a hash cannot be interrupted
		}
	}
	u.crc = base64.StdEncoding.EncodeToString(binary.BigEndian.AppendUint32(nil, crc))
	if !secure {
		u.sha = hex.EncodeToString(sum.Sum(nil))
	}
	return u
}

// Put implements backend.Backend.
func (s *Store) Put(ctx context.Context, name string, parts ...[]byte) error {
	key, err := s.key(name)
	if err != nil {
		return err
	}
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	leave, err := backend.TakeTurn(ctx)
	if err != nil {
		return err
	}
	u := newUpload(key, parts, s.secure)
	leave()
	if err := s.put(ctx, u, policy{attempts: putAttempts}); err != nil {
		return fmt.Errorf("put object %s: %w", name, err)
	}
	return nil
}

func (s *Store) put(ctx context.Context, u *upload, p policy) error {
	l := s.lane(ctx, laneUpload)
	echoed := false
	err := s.retry(ctx, l, p, u.size, func(ctx context.Context, _ int) error {
		var err error
		echoed, err = s.putOnce(ctx, l.core, u)
		return err
	})
	switch {
	case err == nil && echoed:
		return nil
	case err == nil:
		return s.confirm(ctx, l, u)
	case kindOf(err) == exists || kindOf(err) == conflict:
		ours, e := s.isOurs(ctx, l, u)
		if e != nil {
			return fmt.Errorf("whose object it is after %w: %w", err, e)
		}
		if ours {
			return nil
		}
	}
	return err
}

// putOnce sends the object. echoed says that the store has named our checksum in its reply.
func (s *Store) putOnce(ctx context.Context, core *minio.Core, u *upload) (echoed bool, err error) {
	opts := minio.PutObjectOptions{
		UserMetadata: map[string]string{checksumHeader: u.crc, idKey: u.id}, DisableMultipart: true, DisableContentSha256: true,
	}
	opts.SetMatchETagExcept("*")
	info, err := core.PutObject(ctx, s.cfg.Bucket, u.key, &reader{parts: u.parts}, u.size, "", u.sha, opts)
	if err != nil {
		return false, err
	}
	if info.ChecksumCRC32C != "" && info.ChecksumCRC32C != u.crc {
		// Not tried again under this name: what is there may be anything.
		return false, &Error{Code: "WrongChecksum", Status: http.StatusOK, kind: refusal,
			Detail: fmt.Sprintf("the store has checksum %s of what was sent with %s", clip(info.ChecksumCRC32C), u.crc)}
	}
	return info.ChecksumCRC32C != "", nil
}

// confirm looks whether an object that was acknowledged without its checksum is there in full.
func (s *Store) confirm(ctx context.Context, l *lane, u *upload) error {
	ours, err := s.isOurs(ctx, l, u)
	if err != nil {
		return fmt.Errorf("confirm: %w", err)
	}
	if !ours {
		return &Error{Code: "NotStored", Status: http.StatusOK, Detail: "it was acknowledged, and is not there as it was sent"}
	}
	return nil
}

// isOurs says whether the object is the one that this call sent.
func (s *Store) isOurs(ctx context.Context, l *lane, u *upload) (ours bool, err error) {
	err = s.retry(ctx, l, s.ask(), 0, func(ctx context.Context, _ int) error {
		info, err := l.core.StatObject(ctx, s.cfg.Bucket, u.key, minio.StatObjectOptions{})
		if err == nil {
			ours = info.UserMetadata[idKey] == u.id && info.Size == u.size
		}
		return err
	})
	if kindOf(err) == absent && err != nil {
		// The object that stood in the way is gone, or the store acknowledged what it does not have: unknown either way.
		return false, &Error{Code: "Vanished", Detail: "no object is there after all"}
	}
	return ours, err
}

// reader reads the parts one after the other.
type reader struct {
	parts [][]byte
	at    int // in parts[0]
}

func (r *reader) Read(p []byte) (int, error) {
	for len(r.parts) > 0 {
		if n := copy(p, r.parts[0][r.at:]); n > 0 {
			r.at += n
			return n, nil
		}
		if r.at < len(r.parts[0]) { // len(p) == 0
			return 0, nil
		}
		r.parts, r.at = r.parts[1:], 0
	}
	return 0, io.EOF
}
