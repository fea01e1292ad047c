package server

import (
	"strconv"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"varve/gateway/nfs"
)

// nfsMetrics counts what the NFS gateway answers. NBD and the volume driver register their own.
type nfsMetrics struct {
	requests *prometheus.CounterVec
	bytes    *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
	known    sync.Map // outcome -> *counted
}

func newNFSMetrics(reg prometheus.Registerer, stats func() nfs.Stats) *nfsMetrics {
	m := &nfsMetrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "varve", Subsystem: "nfs", Name: "requests_total",
			Help: "NFS and MOUNT calls answered."}, []string{"proc", "status"}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "varve", Subsystem: "nfs", Name: "bytes_total",
			Help: "Bytes of file data read and written."}, []string{"proc"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{Namespace: "varve", Subsystem: "nfs", Name: "request_duration_seconds",
			Help: "Time from a call's arrival to its answer.", Buckets: prometheus.ExponentialBuckets(20e-6, 4, 10)}, []string{"proc"}),
	}
	reg.MustRegister(m.requests, m.bytes, m.seconds)
	gauge := func(name, help string, f func(nfs.Stats) int64) {
		reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "varve", Subsystem: "nfs", Name: name, Help: help},
			func() float64 { return float64(f(stats())) }))
	}
	gauge("connections", "Open client connections.", func(s nfs.Stats) int64 { return s.Connections })
	gauge("replayed", "Calls answered from the duplicate request cache since start.", func(s nfs.Stats) int64 { return s.Replayed })
	gauge("waited", "Calls that had to wait for storage since start.", func(s nfs.Stats) int64 { return s.Waited })
	return m
}

// outcome is what an answered call is counted under. Both are few, whatever clients send.
type outcome struct {
	proc   string
	status nfs.Status
}

// counted are the series of one outcome, looked up once.
type counted struct {
	requests, bytes prometheus.Counter
	seconds         prometheus.Observer
}

func (m *nfsMetrics) of(k outcome) *counted {
	if c, ok := m.known.Load(k); ok {
		return c.(*counted)
	}
	c, _ := m.known.LoadOrStore(k, &counted{
		requests: m.requests.WithLabelValues(k.proc, strconv.FormatUint(uint64(k.status), 10)),
		bytes:    m.bytes.WithLabelValues(k.proc),
		seconds:  m.seconds.WithLabelValues(k.proc),
	})
	return c.(*counted)
}

func (m *nfsMetrics) observe(o nfs.Observation) {
	c := m.of(outcome{o.Procedure, o.Status})
	c.requests.Inc()
	c.seconds.Observe(o.Duration.Seconds())
	if o.Bytes > 0 {
		c.bytes.Add(float64(o.Bytes))
	}
}
