package s3

import (
	"fmt"
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

func TestConformanceOfVersityGateway(t *testing.T) {
	g := s3test.StartGateway(t)
	n := 0
	backendtest.Run(t, func(t *testing.T) backend.Backend {
		n++
		return mustOpen(t, gatewayConfig(g, fmt.Sprintf("c%d", n)))
	})
	fmt.Println("» S3: versitygw passes the conformance suite of backends")
}

func gatewayConfig(g *s3test.Gateway, prefix string) Config {
	cfg := testConfig(g.Endpoint)
	cfg.Prefix, cfg.Credentials = prefix, Credentials{s3test.AccessKey, s3test.SecretKey}
	return cfg
}

func TestProbe(t *testing.T) {
	endpoint, _ := s3test.Fake(t)
	g := s3test.StartGateway(t)
	for name, cfg := range map[string]Config{"fake": testConfig(endpoint), "versitygw": gatewayConfig(g, "probe")} {
		v, err := mustOpen(t, cfg).Probe(t.Context())
		if err != nil || len(v.Unsafe) > 0 {
			t.Errorf("%s: %+v %v", name, v, err)
		}
		t.Log(name, v.Findings)
	}
}
