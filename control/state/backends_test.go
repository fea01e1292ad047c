package state

import (
	"errors"
	"testing"

	"github.com/google/uuid"
)

func TestBackendsThatOverlap(t *testing.T) {
	s3 := func(bucket, prefix string) Backend {
		return Backend{Kind: BackendS3, Endpoint: "http://h", Bucket: bucket, Prefix: prefix}
	}
	for _, c := range []struct {
		a, b Backend
		want bool
	}{
		{s3("b-1", "a"), s3("b-1", "a"), true}, {s3("b-1", ""), s3("b-1", "a"), true}, {s3("b-1", "a"), s3("b-1", "a/b"), true},
		{s3("b-1", "a"), s3("b-1", "ab"), false}, {s3("b-1", "a"), s3("b-2", "a"), false},
		{Backend{Kind: BackendLocal, Dir: "/a"}, Backend{Kind: BackendLocal, Dir: "/a/b"}, true},
		{Backend{Kind: BackendLocal, Dir: "/a"}, Backend{Kind: BackendLocal, Dir: "/ab"}, false},
	} {
		if c.a.Overlaps(c.b) != c.want || c.b.Overlaps(c.a) != c.want {
			t.Errorf("%+v and %+v overlap: want %v", c.a, c.b, c.want)
		}
	}
}

// TestSecretsGoWithTheirVPool and stand in a snapshot as they were given: sealed.
func TestSecretsGoWithTheirVPool(t *testing.T) {
	s := New()
	index := uint64(0)
	do := func(cmd Command) error {
		t.Helper()
		entry, err := Encode(cmd, uuid.New(), Time(index))
		if err != nil {
			return err
		}
		index++
		_, err = s.Apply(index, entry)
		return err
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(do(&InitCluster{ID: uuid.New(), Format: Format}))
	id := uuid.New()
	make := &CreateVPool{ID: id, Name: "fast", Backend: Backend{Kind: BackendS3, Endpoint: "http://h", Bucket: "bucket"}, Key: make([]byte, 32), Mode: 0o755,
		Findings: []Finding{{"create-only", "honoured"}}}
	if err := do(make); !errors.Is(err, ErrInvalid) {
		t.Errorf("bucket without credentials: %v", err)
	}
	make.Keys = &SetSecret{Name: S3KeysOf(uuid.New()), Key: "k", Sealed: []byte("x")}
	if err := do(make); !errors.Is(err, ErrInvalid) {
		t.Errorf("credentials of another vpool: %v", err)
	}
	make.Keys.Name = S3KeysOf(id)
	must(do(make))
	must(do(&SetSecret{Name: "other", Key: "k", Sealed: []byte("y")}))
	if got, err := s.View().Secret(S3KeysOf(id)); err != nil || string(got.Sealed) != "x" {
		t.Errorf("%+v %v", got, err)
	}
	have, _ := s.View().Secret("other")
	if err := do(&SetSecret{Name: "other", Key: "k2", Sealed: []byte("z"), Rev: have.Rev + 9}); !errors.Is(err, ErrConflict) {
		t.Errorf("stale change: %v", err)
	}
	must(do(&SetVPoolFindings{ID: id, Findings: []Finding{{"range", "exact"}}}))
	if p, err := s.View().VPool("fast"); err != nil || len(p.Findings) != 1 || p.Findings[0].Check != "range" {
		t.Errorf("%+v %v", p, err)
	}
	must(do(&DeleteVPool{ID: id}))
	if left := s.View().Secrets(); len(left) != 1 || left[0].Name != "other" {
		t.Errorf("left: %+v", left)
	}
	must(do(&DeleteSecret{Name: "other"}))
	if err := do(&DeleteSecret{Name: "other"}); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
}
