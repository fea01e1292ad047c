package volumedriver

import "github.com/prometheus/client_golang/prometheus"

// metrics are the driver's figures; those that the log, the map and the volumes keep themselves are read when asked for.
type metrics struct {
	reg           prometheus.Registerer
	all           []prometheus.Collector
	objects       prometheus.Counter
	objectBytes   prometheus.Counter
	backendErrors prometheus.Counter
	corrupt       prometheus.Counter
	scrubMoved    prometheus.Counter
	scrubFreed    prometheus.Counter
	bootBytes     prometheus.Counter
	checkpoint    prometheus.Histogram
}

func newMetrics(d *Driver, reg prometheus.Registerer) *metrics {
	m := &metrics{reg: reg}
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Namespace: "varve", Subsystem: "volumedriver", Name: name, Help: help})
		m.all = append(m.all, c)
		return c
	}
	read := func(name, help string, fn func(Stats) float64) {
		m.all = append(m.all, prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "varve", Subsystem: "volumedriver", Name: name, Help: help},
			func() float64 { return fn(d.Stats()) }))
	}
	m.objects = counter("objects_put_total", "SCOs put on backends.")
	m.objectBytes = counter("object_bytes_put_total", "Bytes of SCOs put on backends.")
	m.backendErrors = counter("backend_errors_total", "Calls of a backend that failed and were tried again.")
	m.corrupt = counter("corrupt_blocks_total", "Blocks read that did not match their checksum.")
	m.scrubMoved = counter("scrub_moved_objects_total", "SCOs that the scrub has compacted into containers.")
	m.scrubFreed = counter("scrub_freed_bytes_total", "Bytes of objects that the scrub has deleted.")
	m.bootBytes = counter("boot_trace_bytes_total", "Bytes of clones fetched ahead, since an earlier clone of the same snapshot has read them first.")
	m.checkpoint = prometheus.NewHistogram(prometheus.HistogramOpts{Namespace: "varve", Subsystem: "volumedriver", Name: "checkpoint_seconds",
		Help: "Time of a checkpoint of the block map.", Buckets: prometheus.ExponentialBuckets(0.001, 4, 8)})
	m.all = append(m.all, m.checkpoint)
	read("log_occupancy_ratio", "Share of the write log that is in use.", func(s Stats) float64 { return s.Log.Occupancy })
	read("log_written_bytes", "Bytes written to the log since start.", func(s Stats) float64 { return float64(s.Log.BytesWritten) })
	read("log_syncs", "Syncs of the log since start.", func(s Stats) float64 { return float64(s.Log.Syncs) })
	read("log_batches", "Batches committed to the log since start.", func(s Stats) float64 { return float64(s.Log.Batches) })
	read("pending_bytes", "Bytes logged and not yet on a backend.", func(s Stats) float64 { return float64(s.Pending) })
	read("volumes", "Volumes of this node.", func(s Stats) float64 { return float64(s.Volumes) })
	read("open_volumes", "Volumes that are open.", func(s Stats) float64 { return float64(s.Open) })
	read("map_resident_bytes", "Memory of the resident part of the block map.", func(s Stats) float64 { return float64(s.Map.Bytes) })
	if reg != nil {
		reg.MustRegister(m.all...)
	}
	return m
}

func (m *metrics) unregister() {
	if m.reg == nil {
		return
	}
	for _, c := range m.all {
		m.reg.Unregister(c)
	}
}
