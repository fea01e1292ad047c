package nbd

import (
	"context"
	"errors"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// TestMetrics: what clients did is what the counters say.
func TestMetrics(t *testing.T) {
	reg := prometheus.NewRegistry()
	m := newMemory(1 << 20)
	m.hook = func(_ context.Context, op string, off, n int64, _ bool) error {
		if op == "read" && off == 8192 {
			return errors.New("medium error")
		}
		return nil
	}
	_, addr, _ := listen(t, "tcp", Config{Exports: newExports(map[string]Device{"d": m}), Metrics: reg})
	c := attach(t, addr, "d", true)
	c.pwrite(0, make([]byte, 5000))
	c.pread(0, 512)
	c.pread(0, 256<<10)
	c.fails(cmdRead, 0, 8192, 512, nil, errnoIO)
	c.fails(cmdTrim, 0, 1<<40, 512, nil, errnoInval)
	c.fails(77, 0, 0, 0, nil, errnoInval)
	c.ok(cmdFlush, 0, 0, 0, nil)
	c.ok(cmdFlush, 0, 0, 0, nil) // the burst before this one is counted by now
	hello(t, addr)
	got := gather(t, reg)
	for name, want := range map[string]float64{
		"varve_nbd_requests_total/write": 1, "varve_nbd_requests_total/read": 3, "varve_nbd_requests_total/trim": 1,
		"varve_nbd_request_errors_total/read": 1, "varve_nbd_request_errors_total/trim": 1, "varve_nbd_request_errors_total/write": 0,
		"varve_nbd_unknown_commands_total": 1, "varve_nbd_written_bytes_total": 5000, "varve_nbd_read_bytes_total": 512 + 256<<10 + 512,
		"varve_nbd_connections": 1, "varve_nbd_handshakes": 1, "varve_nbd_attached_total": 1, "varve_nbd_in_flight": 0, "varve_nbd_payload_bytes": 0,
	} {
		if got[name] != want {
			t.Errorf("%s is %v, want %v", name, got[name], want)
		}
	}
}

// gather reads every counter and gauge, by name and label.
func gather(t *testing.T, reg *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := f.GetName()
			for _, l := range m.GetLabel() {
				name += "/" + l.GetValue()
			}
			if f.GetType().String() == "COUNTER" {
				all[name] = m.GetCounter().GetValue()
			} else {
				all[name] = m.GetGauge().GetValue()
			}
		}
	}
	return all
}
