package server

import (
	"context"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"

	"varve/appliance/history"
	"varve/control/state"
)

// estateMetrics are what is asked of the node at each scrape: its vDisks, vPools and checks. Each series is of this node's own, so a sum
// over nodes counts nothing twice.
type estateMetrics struct{ e estate }

func describe(subsystem, name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(prometheus.BuildFQName("varve", subsystem, name), help, labels, nil)
}

var (
	descBuild       = describe("", "build_info", "Version and component id of the process.", "version", "component")
	descOps         = describe("vdisk", "io_operations_total", "Requests of clients, by vDisk.", "vpool", "vdisk", "op")
	descBytes       = describe("vdisk", "io_bytes_total", "Bytes read and written by clients.", "vpool", "vdisk", "op")
	descSize        = describe("vdisk", "size_bytes", "Size of a vDisk.", "vpool", "vdisk")
	descUsed        = describe("vdisk", "used_bytes", "Bytes that a vDisk holds.", "vpool", "vdisk")
	descUnbacked    = describe("vdisk", "unbacked_bytes", "Bytes of a vDisk that are on the log disk alone.", "vpool", "vdisk")
	descUnbackedAge = describe("vdisk", "oldest_unbacked_seconds", "Age of the oldest of them.", "vpool", "vdisk")
	descLatency     = describe("vpool", "io_duration_seconds", "Time from a request to its answer, of vDisks and files; sampled where there are many.", "vpool", "op")
	descBackendUp   = describe("backend", "up", "1 if the backend of a vPool answers.", "vpool")
	descBackendFree = describe("backend", "free_bytes", "Room on the backend of a vPool; without a limit there is none.", "vpool")
	descBackendSize = describe("backend", "capacity_bytes", "Size of the backend of a vPool.", "vpool")
	descCheck       = describe("health", "check_status", "Worst of what this node finds by a check: 0 ok, 1 warning, 2 error.", "check")
	descLeader      = describe("control", "leader", "1 if this node leads the control cluster.")
	descIndex       = describe("control", "applied_index", "Index of the last command that is in this node's state.")
	descTasks       = describe("", "tasks", "Tasks that are known, by state.", "state")
	descCert        = describe("", "certificate_expiry_timestamp_seconds", "When the certificate of the node port ends.")
	descLog         = describe("", "log_capacity_bytes", "Size of the write log.")
)

// Describe implements prometheus.Collector.
func (m estateMetrics) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descBuild, descOps, descBytes, descSize, descUsed, descUnbacked, descUnbackedAge, descLatency, descBackendUp,
		descBackendFree, descBackendSize, descCheck, descLeader, descIndex, descTasks, descCert, descLog} {
		out <- d
	}
}

const scrapeTimeout = 5 * time.Second

// Collect implements prometheus.Collector.
func (m estateMetrics) Collect(out chan<- prometheus.Metric) {
	e := m.e
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v uint64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	flag := func(d *prometheus.Desc, on bool, labels ...string) {
		v := 0.0
		if on {
			v = 1
		}
		gauge(d, v, labels...)
	}
	ctx, cancel := context.WithTimeout(context.Background(), scrapeTimeout)
	defer cancel()
	gauge(descBuild, 1, e.cfg.Version, component(e.raft.Cluster(), e.raft.ID(), "appliance"))
	gauge(descLog, float64(e.cfg.LogBytes))
	flag(descLeader, e.raft.IsLeader())
	gauge(descIndex, float64(e.raft.State().Index()))
	if until := e.tls.NodeExpires(); !until.IsZero() {
		gauge(descCert, float64(until.Unix()))
	}
	view := e.raft.State().View()
	loads := e.volumes.Peek()
	for _, p := range view.VPools() {
		var reads, writes history.Latency
		for _, vol := range view.VolumesOf(p.FSID) {
			if vol.Owner != e.raft.ID() {
				continue
			}
			l := loads[vol.ID]
			for i := range reads {
				reads[i] += l.ReadTime[i]
				writes[i] += l.WriteTime[i]
			}
			path, err := view.Path(vol.FSID, vol.Ino)
			disk, is := state.DiskName(path)
			if err != nil || !is || vol.Kind != state.DiskVolume {
				continue
			}
			counter(descOps, l.Reads, p.Name, disk, "read")
			counter(descOps, l.Writes, p.Name, disk, "write")
			counter(descOps, l.Flushes, p.Name, disk, "flush")
			counter(descBytes, l.BytesRead, p.Name, disk, "read")
			counter(descBytes, l.BytesWrite, p.Name, disk, "write")
			i := e.remote.Own(vol)
			gauge(descSize, float64(i.Size), p.Name, disk)
			gauge(descUsed, float64(i.Used), p.Name, disk)
			gauge(descUnbacked, float64(i.Ledger.UnbackedBytes), p.Name, disk)
			gauge(descUnbackedAge, i.Ledger.UnbackedAge.Seconds(), p.Name, disk)
		}
		for op, l := range map[string]*history.Latency{"read": &reads, "write": &writes} {
			count, sum, buckets := l.Cumulative()
			out <- prometheus.MustNewConstHistogram(descLatency, count, sum, buckets, p.Name, op)
		}
		if p.Backend.Node != uuid.Nil && p.Backend.Node != e.raft.ID() {
			continue
		}
		flag(descBackendUp, e.driver.PoolHealth(p.ID).Err == "", p.Name)
		if space, ok := e.pools.Space(p.ID); ok && space.Total > 0 {
			gauge(descBackendFree, float64(space.Free), p.Name)
			gauge(descBackendSize, float64(space.Total), p.Name)
		}
	}
	worst := make(map[string]float64)
	rank := map[string]float64{stateOK: 0, stateWarning: 1, stateError: 2}
	for _, c := range e.checks(ctx) {
		worst[c.Code] = max(worst[c.Code], rank[c.State])
	}
	for code, v := range worst {
		gauge(descCheck, v, code)
	}
	tasks := map[state.TaskState]float64{state.TaskQueued: 0, state.TaskRunning: 0, state.TaskSucceeded: 0, state.TaskFailed: 0, state.TaskCancelled: 0}
	view.Tasks(func(t *state.Task) bool { tasks[t.State]++; return true })
	for s, n := range tasks {
		gauge(descTasks, n, string(s))
	}
}
