package s3

import (
	"testing"
	"time"

	"go.uber.org/goleak"

	"varve/volumedriver/backend"
	"varve/volumedriver/backend/backendtest"
	"varve/volumedriver/backend/s3/s3test"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func testConfig(endpoint string) Config {
	return Config{Endpoint: endpoint, Bucket: s3test.Bucket, Prefix: "pool/a", Credentials: Credentials{"key", "secret"},
		Patience: 5 * time.Second, Attempt: 5 * time.Second, Backoff: 20 * time.Millisecond}
}

func mustOpen(t *testing.T, cfg Config) *Store {
	t.Helper()
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func TestConformance(t *testing.T) {
	backendtest.Run(t, func(t *testing.T) backend.Backend {
		endpoint, _ := s3test.Fake(t)
		return mustOpen(t, testConfig(endpoint))
	})
}
