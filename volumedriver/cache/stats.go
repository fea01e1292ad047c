package cache

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

// Stats counts since Open. A hit, a miss and a share are each of one line for one read.
type Stats struct {
	RAMBytes, RAMUsed   int64 // room and use
	RAMHits, RAMEvicted int64

	DiskBytes, DiskUsed   int64
	DiskHits, DiskEvicted int64
	DiskWritten           int64  // bytes
	DiskDropped           int64  // lines that were left out because the SSD was busy
	DiskStale             int64  // lines that an old index promised
	DiskCorrupt           int64  // lines that failed their CRC
	DiskErrors            int64  // reads that failed
	DiskOff               string // why the SSD tier is off, else empty

	Misses      int64 // lines that were fetched for a read
	Shared      int64 // lines that another read was fetching already
	Fetches     int64 // ranged reads of backends
	FetchErrors int64
	Fetched     int64 // bytes
	Read        int64 // bytes that readers got
	Exact       int64 // reads that went round the cache because whole lines were of little use
	Prefetched  int64 // lines fetched ahead of need
	Discarded   int64 // lines that readers found wrong
	Objects     int   // of which something is cached or open
}

// Stats counts.
func (c *Cache) Stats() Stats {
	lines, room, hits, evicted := c.ram.count()
	s := Stats{RAMBytes: int64(room) * c.line, RAMUsed: int64(lines) * c.line, RAMHits: hits, RAMEvicted: evicted,
		Misses: c.misses.Load(), Shared: c.shared.Load(), Fetches: c.fetches.Load(), FetchErrors: c.fetchErrors.Load(),
		Fetched: c.fetched.Load(), Read: c.read.Load(), Exact: c.exact.Load(), Prefetched: c.prefetched.Load(),
		Discarded: c.discarded.Load(), Objects: c.reg.len()}
	if d := c.ssd; d != nil {
		d.mu.RLock()
		used := d.f.len()
		d.mu.RUnlock()
		room := int64(d.slots)
		if limit := d.limit.Load(); limit > 0 {
			room = limit
		}
		s.DiskBytes, s.DiskUsed = room*c.line, int64(used)*c.line
		s.DiskHits, s.DiskEvicted, s.DiskWritten, s.DiskDropped = d.hits.Load(), d.evicted.Load(), d.written.Load(), d.dropped.Load()
		s.DiskStale, s.DiskCorrupt, s.DiskErrors = d.stale.Load(), d.corrupt.Load(), d.readErrors.Load()
		if why := d.off.Load(); why != nil {
			s.DiskOff = *why
		}
	}
	return s
}

// register makes the metrics, which are read when asked for.
func (c *Cache) register() error {
	if c.cfg.Metrics == nil {
		return nil
	}
	counter := func(name, help string, f func(Stats) int64) {
		c.metrics = append(c.metrics, prometheus.NewCounterFunc(prometheus.CounterOpts{Namespace: "varve", Subsystem: "cache", Name: name,
			Help: help}, func() float64 { return float64(f(c.Stats())) }))
	}
	gauge := func(name, help string, f func(Stats) int64) {
		c.metrics = append(c.metrics, prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "varve", Subsystem: "cache", Name: name,
			Help: help}, func() float64 { return float64(f(c.Stats())) }))
	}
	gauge("ram_bytes", "Room in the RAM tier.", func(s Stats) int64 { return s.RAMBytes })
	gauge("ram_used_bytes", "Lines in the RAM tier.", func(s Stats) int64 { return s.RAMUsed })
	counter("ram_hits_total", "Lines read from RAM.", func(s Stats) int64 { return s.RAMHits })
	counter("ram_evictions_total", "Lines that left RAM for others.", func(s Stats) int64 { return s.RAMEvicted })
	gauge("disk_bytes", "Room on the SSD.", func(s Stats) int64 { return s.DiskBytes })
	gauge("disk_used_bytes", "Lines on the SSD.", func(s Stats) int64 { return s.DiskUsed })
	counter("disk_hits_total", "Lines read from the SSD.", func(s Stats) int64 { return s.DiskHits })
	counter("disk_evictions_total", "Lines that left the SSD for others.", func(s Stats) int64 { return s.DiskEvicted })
	counter("disk_written_bytes_total", "Bytes written to the SSD.", func(s Stats) int64 { return s.DiskWritten })
	counter("disk_dropped_total", "Lines not written because the SSD was busy.", func(s Stats) int64 { return s.DiskDropped })
	counter("disk_stale_total", "Lines on the SSD that an old index promised.", func(s Stats) int64 { return s.DiskStale })
	counter("disk_corrupt_total", "Lines on the SSD that failed their CRC.", func(s Stats) int64 { return s.DiskCorrupt })
	counter("disk_errors_total", "Reads of the SSD that failed.", func(s Stats) int64 { return s.DiskErrors })
	gauge("disk_off", "1 if the SSD tier is off because of an error.", func(s Stats) int64 {
		if s.DiskOff != "" {
			return 1
		}
		return 0
	})
	counter("misses_total", "Lines fetched for a read.", func(s Stats) int64 { return s.Misses })
	counter("shared_total", "Lines that another read was fetching already.", func(s Stats) int64 { return s.Shared })
	counter("fetches_total", "Ranged reads of backends.", func(s Stats) int64 { return s.Fetches })
	counter("fetch_errors_total", "Ranged reads of backends that failed.", func(s Stats) int64 { return s.FetchErrors })
	counter("fetched_bytes_total", "Bytes read from backends.", func(s Stats) int64 { return s.Fetched })
	counter("read_bytes_total", "Bytes that readers got.", func(s Stats) int64 { return s.Read })
	counter("exact_total", "Reads that fetched just their bytes.", func(s Stats) int64 { return s.Exact })
	counter("prefetched_total", "Lines fetched ahead of need.", func(s Stats) int64 { return s.Prefetched })
	counter("discarded_total", "Lines that readers found wrong.", func(s Stats) int64 { return s.Discarded })
	for i, m := range c.metrics {
		if err := c.cfg.Metrics.Register(m); err != nil {
			c.metrics = c.metrics[:i]
			c.unregister()
			return fmt.Errorf("register metrics of the read cache: %w", err)
		}
	}
	return nil
}

func (c *Cache) unregister() {
	for _, m := range c.metrics {
		c.cfg.Metrics.Unregister(m)
	}
	c.metrics = nil
}
