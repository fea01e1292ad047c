package doctor

import (
	"context"
	"errors"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"varve/volumedriver/backend"
)

// shelf is a backend in memory. overwrite makes it break the promise that an object is created once.
type shelf struct {
	mu        sync.Mutex
	objects   map[string][]byte
	overwrite bool
}

func (s *shelf) Put(_ context.Context, name string, parts ...[]byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.objects[name]; ok && !s.overwrite {
		return backend.ErrExist
	}
	s.objects[name] = slices.Concat(parts...)
	return nil
}

func (s *shelf) Open(_ context.Context, name string) (backend.Object, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, ok := s.objects[name]
	if !ok {
		return nil, backend.ErrNotExist
	}
	return object(b), nil
}

func (s *shelf) Stat(_ context.Context, name string) (backend.Info, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, ok := s.objects[name]
	if !ok {
		return backend.Info{}, backend.ErrNotExist
	}
	return backend.Info{Name: name, Size: int64(len(b))}, nil
}

func (s *shelf) Delete(_ context.Context, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.objects, name)
	return nil
}

func (s *shelf) List(_ context.Context, prefix, after string, max int) ([]backend.Info, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []backend.Info
	for _, name := range slices.Sorted(maps.Keys(s.objects)) {
		if strings.HasPrefix(name, prefix) && name > after && len(list) < max {
			list = append(list, backend.Info{Name: name, Size: int64(len(s.objects[name]))})
		}
	}
	return list, nil
}

func (s *shelf) Space(context.Context) (uint64, uint64, error) { return 0, 0, nil }
func (s *shelf) Close() error                                  { return nil }

type object []byte

func (o object) ReadAt(_ context.Context, p []byte, off int64) error {
	if copy(p, o[off:]) != len(p) {
		return errors.New("short object")
	}
	return nil
}
func (o object) TryReadAt(p []byte, off int64) error { return o.ReadAt(context.Background(), p, off) }
func (o object) Size() int64                         { return int64(len(o)) }
func (o object) Close() error                        { return nil }

func TestDiskAndHostChecksGiveDatedEvidence(t *testing.T) {
	dir := t.TempDir()
	open := func(string) (backend.Backend, error) { return &shelf{objects: map[string][]byte{}}, nil }
	checks := append(Disk(dir+"/not/made/yet", open), Host()...)
	results := Run(t.Context(), checks)
	var ids []string
	for _, r := range results {
		ids = append(ids, r.ID)
		t.Logf("%-14s %-5s %s %s", r.ID, r.Status, r.Evidence, r.Remedy)
		if r.Evidence == "" || r.At.IsZero() || time.Since(r.At) > time.Minute {
			t.Errorf("%s: evidence %q at %s", r.ID, r.Evidence, r.At)
		}
		if (r.Status == Warn || r.Status == Fail) && r.Remedy == "" {
			t.Errorf("%s is %s without a remedy", r.ID, r.Status)
		}
	}
	want := "disk.mount disk.space disk.flush disk.log backend.local host.clock host.files host.memory"
	if got := strings.Join(ids, " "); got != want {
		t.Errorf("ids %q, want %q", got, want)
	}
	if i := slices.IndexFunc(results, func(r Result) bool { return r.ID == "backend.local" }); results[i].Status != OK {
		t.Errorf("sound backend: %+v", results[i])
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

func TestBackendThatOverwritesFails(t *testing.T) {
	f := contract(t.Context(), t.TempDir(), func(string) (backend.Backend, error) {
		return &shelf{objects: map[string][]byte{}, overwrite: true}, nil
	})
	if f.Status != Fail || !strings.Contains(f.Evidence, "not refused") || f.Remedy == "" {
		t.Errorf("finding %+v", f)
	}
}

func TestProbesThatPanicOrHangFail(t *testing.T) {
	release := make(chan struct{})
	defer close(release)
	results := Run(t.Context(), []Check{
		{"a", "", time.Second, func(context.Context) Finding { panic("boom") }},
		{"b", "", 10 * time.Millisecond, func(context.Context) Finding { <-release; return Finding{} }},
		{"c", "", time.Second, func(context.Context) Finding { return Finding{Status: OK, Evidence: "fine"} }},
	})
	if results[0].Status != Fail || !strings.Contains(results[0].Evidence, "boom") {
		t.Errorf("panic: %+v", results[0])
	}
	if results[1].Status != Fail || !strings.Contains(results[1].Evidence, "no answer within 10ms") {
		t.Errorf("hang: %+v", results[1])
	}
	if results[2].Status != OK || !Failed(results) || Failed(results[2:]) {
		t.Errorf("after them: %+v", results[2])
	}
}

func TestServerChecksFailWithRemedyWhenNobodyListens(t *testing.T) {
	s := Server{NFS: "127.0.0.1:1", Exports: []string{"/default"}, State: "log is fenced"}
	s.NBD.Network, s.NBD.Address = "tcp", "127.0.0.1:1"
	for _, r := range Run(t.Context(), Running(s)) {
		if r.Status != Fail || r.Remedy == "" {
			t.Errorf("%+v", r)
		}
	}
}
