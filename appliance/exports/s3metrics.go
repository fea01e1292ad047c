package exports

import (
	"github.com/prometheus/client_golang/prometheus"

	"varve/volumedriver/backend/s3"
)

// counting is a backend that counts its requests; s3.Store is one.
type counting interface{ Stats() s3.Stats }

// S3Metrics are the requests of the vPools on S3, by vPool and by the budget that they come from: reads, uploads, scrub, replication.
type S3Metrics struct {
	pools *Pools

	requests, failed, sent, received, waiting, active *prometheus.Desc
	retries, refusals                                 *prometheus.Desc
}

// NewS3Metrics wires a collector.
func NewS3Metrics(p *Pools) *S3Metrics {
	of := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("varve_s3_"+name, help, append([]string{"vpool"}, labels...), nil)
	}
	return &S3Metrics{pools: p,
		requests: of("requests_total", "Requests to the store.", "budget"),
		failed:   of("failed_requests_total", "Requests to the store that failed.", "budget"),
		sent:     of("sent_bytes_total", "Bytes of bodies sent.", "budget"),
		received: of("received_bytes_total", "Bytes of bodies received.", "budget"),
		waiting:  of("waiting_requests", "Requests that wait for a place in their budget.", "budget"),
		active:   of("active_requests", "Requests under way.", "budget"),
		retries:  of("retries_total", "Attempts after the first of a call."),
		refusals: of("refusals_total", "Calls that ended with a definite refusal: keys, rights, bucket."),
	}
}

// Describe implements prometheus.Collector.
func (m *S3Metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{m.requests, m.failed, m.sent, m.received, m.waiting, m.active, m.retries, m.refusals} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *S3Metrics) Collect(ch chan<- prometheus.Metric) {
	m.pools.mu.Lock()
	stores := make(map[string]counting, len(m.pools.pools))
	for _, p := range m.pools.pools {
		if s, ok := p.store.(counting); ok {
			stores[p.vp.Name] = s
		}
	}
	m.pools.mu.Unlock()
	for name, store := range stores {
		s := store.Stats()
		put := func(d *prometheus.Desc, kind prometheus.ValueType, v int64, labels ...string) {
			ch <- prometheus.MustNewConstMetric(d, kind, float64(v), append([]string{name}, labels...)...)
		}
		for budget, l := range map[string]s3.LaneStats{"read": s.Reads, "upload": s.Uploads, "scrub": s.Scrubs, "replication": s.Replications} {
			put(m.requests, prometheus.CounterValue, l.Requests, budget)
			put(m.failed, prometheus.CounterValue, l.Failed, budget)
			put(m.sent, prometheus.CounterValue, l.Sent, budget)
			put(m.received, prometheus.CounterValue, l.Received, budget)
			put(m.waiting, prometheus.GaugeValue, l.Waiting, budget)
			put(m.active, prometheus.GaugeValue, l.Active, budget)
		}
		put(m.retries, prometheus.CounterValue, s.Retries)
		put(m.refusals, prometheus.CounterValue, s.Refusals)
	}
}
