package exports

import (
	"testing"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"

	"varve/control/state"
	"varve/volumedriver/backend"
	"varve/volumedriver/backend/backendtest"
	"varve/volumedriver/backend/s3"
)

// counted is a backend with some requests behind it.
type counted struct{ backend.Backend }

func (counted) Stats() s3.Stats {
	return s3.Stats{Reads: s3.LaneStats{Requests: 7, Received: 700}, Uploads: s3.LaneStats{Requests: 3, Failed: 1, Active: 2}, Retries: 4}
}

// TestS3Metrics: what a store has counted is there under its vPool's name; a vPool in a directory has none.
func TestS3Metrics(t *testing.T) {
	p := &Pools{pools: map[uuid.UUID]pool{
		uuid.New(): {vp: state.VPool{Name: "cloud"}, store: counted{backendtest.NewMem()}},
		uuid.New(): {vp: state.VPool{Name: "here"}, store: backendtest.NewMem()},
	}}
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(NewS3Metrics(p))
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string]float64)
	for _, f := range families {
		for _, m := range f.Metric {
			name := f.GetName()
			for _, l := range m.Label {
				name += " " + l.GetValue()
			}
			got[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	for name, want := range map[string]float64{"varve_s3_requests_total read cloud": 7, "varve_s3_received_bytes_total read cloud": 700,
		"varve_s3_failed_requests_total upload cloud": 1, "varve_s3_active_requests upload cloud": 2, "varve_s3_retries_total cloud": 4} {
		if v, ok := got[name]; !ok || v != want {
			t.Errorf("%s is %v (%v), want %v", name, v, ok, want)
		}
	}
	if len(got) != 4*6+2 {
		t.Errorf("%d figures: %v", len(got), got)
	}
}
