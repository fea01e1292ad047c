package server

import (
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"varve/appliance/exports"
	"varve/appliance/history"
	"varve/control/state"
)

const historyName = "history"

// openHistory finds what was measured before.
func (a *appliance) openHistory() (err error) {
	c := &collector{a: a, before: make(map[uuid.UUID]exports.Load)}
	a.figures, err = history.Open(history.Config{Dir: filepath.Join(a.cfg.Data, historyName), Collect: c.collect, Log: a.logOf("history")})
	return err
}

// collector turns counters into what happened in a step. It is used by one goroutine.
type collector struct {
	a      *appliance
	before map[uuid.UUID]exports.Load
	cpu    time.Duration
	at     time.Time
	hits   int64
	misses int64
}

// collect tells what happened since the last call.
func (c *collector) collect() map[history.Object]*history.Sample {
	out := make(map[history.Object]*history.Sample)
	a, view := c.a, c.a.raft.State().View()
	node := &history.Sample{Gauges: make(map[history.Gauge]float64)}
	out[history.Object{Kind: history.Node, ID: a.raft.ID()}] = node
	known := make(map[uuid.UUID]bool)
	loads := a.volumes.Loads(func(id uuid.UUID) bool { _, err := view.Volume(id); return err == nil })
	stats := a.driver.Stats()
	for _, p := range view.VPools() {
		pool := &history.Sample{Gauges: make(map[history.Gauge]float64)}
		served := p.Backend.Node == uuid.Nil || p.Backend.Node == a.raft.ID()
		for _, vol := range view.VolumesOf(p.FSID) {
			if vol.Owner != a.raft.ID() {
				continue
			}
			known[vol.ID] = true
			s := step(c.before[vol.ID], loads[vol.ID])
			info, _ := a.engine.Info(vol.ID)
			clients := a.engine.Clients(vol.ID)
			s.Gauges = map[history.Gauge]float64{history.Used: float64(info.Used), history.Pending: float64(info.Pending), history.Clients: float64(clients)}
			total(pool, s)
			if vol.Kind == state.DiskVolume {
				s.Gauges[history.Provisioned] = float64(max(info.Size, vol.Size))
				pool.Gauges[history.Provisioned] += float64(max(info.Size, vol.Size))
				out[history.Object{Kind: history.VDisk, ID: vol.ID}] = s
			}
		}
		if served {
			if space, ok := a.pools.Space(p.ID); ok && space.Total > 0 {
				pool.Gauges[history.Free], pool.Gauges[history.Total] = float64(space.Free), float64(space.Total)
			}
		}
		total(node, pool)
		out[history.Object{Kind: history.VPool, ID: p.ID}] = pool
	}
	for id := range c.before {
		if !known[id] {
			delete(c.before, id)
		}
	}
	for id, l := range loads {
		c.before[id] = l
	}
	node.Gauges[history.LogUsed] = stats.Log.Occupancy
	node.Gauges[history.Pending] = float64(stats.Pending)
	c.process(node)
	if s, ok := a.cache.Stats(); ok {
		hits, misses := s.RAMHits+s.DiskHits, s.Misses
		if asked := hits - c.hits + misses - c.misses; asked > 0 {
			node.Gauges[history.CacheHit] = float64(hits-c.hits) / float64(asked)
		}
		c.hits, c.misses = hits, misses
	}
	return out
}

// process fills in what the process takes: resident memory, and its share of all processors since the last call.
func (c *collector) process(node *history.Sample) {
	if b, err := os.ReadFile("/proc/self/statm"); err == nil {
		if f := strings.Fields(string(b)); len(f) > 1 {
			if pages, err := strconv.ParseInt(f[1], 10, 64); err == nil {
				node.Gauges[history.Memory] = float64(pages * int64(os.Getpagesize()))
			}
		}
	}
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &u) != nil {
		return
	}
	now, cpu := time.Now(), time.Duration(u.Utime.Nano()+u.Stime.Nano())
	if took := now.Sub(c.at); !c.at.IsZero() && took > 0 {
		node.Gauges[history.CPU] = float64(cpu-c.cpu) / float64(took) / float64(runtime.NumCPU())
	}
	c.at, c.cpu = now, cpu
}

// step is what was counted between two looks. Counters that went back began anew.
func step(before, now exports.Load) *history.Sample {
	s := &history.Sample{Reads: now.Reads, Writes: now.Writes, BytesRead: now.BytesRead, BytesWrite: now.BytesWrite, ReadTime: now.ReadTime, WriteTime: now.WriteTime}
	if now.Reads < before.Reads || now.Writes < before.Writes {
		return s
	}
	s.Reads -= before.Reads
	s.Writes -= before.Writes
	s.BytesRead -= before.BytesRead
	s.BytesWrite -= before.BytesWrite
	for i := range s.ReadTime {
		s.ReadTime[i] -= before.ReadTime[i] // they wrap like the counters of the meter do
		s.WriteTime[i] -= before.WriteTime[i]
	}
	return s
}

// total adds a part's figures to a whole's.
func total(whole, part *history.Sample) {
	gauges := whole.Gauges
	whole.Reads, whole.Writes = whole.Reads+part.Reads, whole.Writes+part.Writes
	whole.BytesRead, whole.BytesWrite = whole.BytesRead+part.BytesRead, whole.BytesWrite+part.BytesWrite
	for i := range whole.ReadTime {
		whole.ReadTime[i] += part.ReadTime[i]
		whole.WriteTime[i] += part.WriteTime[i]
	}
	for _, g := range []history.Gauge{history.Used, history.Provisioned, history.Pending, history.Clients} {
		if v, ok := part.Gauges[g]; ok {
			gauges[g] += v
		}
	}
}
