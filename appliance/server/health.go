package server

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"varve/appliance/doctor"
	v1 "varve/control/api/customer"
	"varve/control/bytesize"
	"varve/control/state"
)

// Health is what holds now, looked at when somebody asks: each check has a code of package doctor. What lasts is an alert as well, which the
// health task raises (jobs.go), so that it is an event and survives the node; its time is then the check's.

// sightings remember since when a finding is as it is, while the process runs.
type sightings struct {
	mu sync.Mutex
	by map[string]sighting
}

type sighting struct {
	state string
	since time.Time
}

const sightingsMax = 10000

func (s *sightings) since(key, state string, now time.Time) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	have, ok := s.by[key]
	if ok && have.state == state {
		return have.since
	}
	if s.by == nil || len(s.by) > sightingsMax {
		s.by = make(map[string]sighting)
	}
	s.by[key] = sighting{state, now}
	return now
}

// since fills in when a check became what it is.
func (e estate) since(c v1.HealthCheck) v1.HealthCheck {
	at := e.sightings.since(c.Code+"\x00"+c.Node+"\x00"+c.Object, c.State, c.At)
	c.Since = &at
	return c
}

// findings collects checks of a node.
type findings struct {
	e    estate
	node string
	now  time.Time
	out  []v1.HealthCheck
}

func (f *findings) add(code, state, object, evidence, remedy string) {
	known, _ := doctor.CodeOf(code)
	if state == stateOK {
		remedy = ""
	} else if remedy == "" {
		remedy = known.Remedy
	}
	f.out = append(f.out, f.e.since(v1.HealthCheck{Code: code, Title: known.Title, State: state, Node: f.node, Object: object, Evidence: shortText(evidence),
		Remedy: remedy, At: f.now}))
}

// Words of Health.
const (
	stateOK      = "ok"
	stateWarning = "warning"
	stateError   = "error"
)

// grade is warning or error where a value is at least one or the other.
func grade(value, warning, worse float64) string {
	switch {
	case value >= worse:
		return stateError
	case value >= warning:
		return stateWarning
	}
	return stateOK
}

const (
	dataWarn, dataFail     = 0.90, 0.97
	certWarn, certFail     = 30 * 24 * time.Hour, 7 * 24 * time.Hour
	secondsPerDay          = 24 * time.Hour
	logWarn, logFail       = 0.8, 0.95
	backendWarn            = 0.90
	backendFail            = 0.97
	volumesNamed           = 5
	waitWarn               = 15 * time.Minute
	dueWarn                = 10 * time.Minute
	memoryWarn, memoryFail = 0.10, 0.04 // available share
)

// checks are this node's own.
func (e estate) checks(ctx context.Context) []v1.HealthCheck {
	f := &findings{e: e, node: e.nodeName(e.raft.ID()), now: time.Now().UTC()}
	self := "node " + f.node
	if err := e.notReady(); err != nil {
		f.add("node.ready", stateError, self, err.Error(), "")
	} else {
		f.add("node.ready", stateOK, self, "exports are open since "+e.started.UTC().Format(time.RFC3339), "")
	}
	d := e.driver.Stats()
	if err := e.driver.Err(); err != nil {
		f.add("log.failed", stateError, self, err.Error(), "")
	} else {
		f.add("log.failed", stateOK, self, fmt.Sprintf("%d syncs since the start", d.Log.Syncs), "")
	}
	f.add("log.room", grade(d.Log.Occupancy, logWarn, logFail), self, fmt.Sprintf("%.0f %% of %s in use, %s not on a backend yet", d.Log.Occupancy*100,
		bytesize.Format(e.cfg.LogBytes), bytesize.Format(d.Pending)), "")
	if n := e.volumes.Lost(); n > 0 {
		f.add("volumes.lost", stateError, self, fmt.Sprintf("%d volumes are lost until they are rebuilt", n), "")
	} else {
		f.add("volumes.lost", stateOK, self, "log and map are there", "")
	}
	e.volumeChecks(f)
	e.backendChecks(ctx, f)
	e.hostChecks(f, self)
	e.driftChecks(f)
	e.crashChecks(f, self)
	if e.secrets.Missing() {
		f.add("secrets.keys", stateError, self, "there are secrets that no key of this node opens: vPools in buckets and encrypted ones stay closed", "")
	} else {
		f.add("secrets.keys", stateOK, self, "every secret has its key here", "")
	}
	return f.out
}

// volumeChecks finds volumes that this node should serve and cannot.
func (e estate) volumeChecks(f *findings) {
	view, open, bad := e.raft.State().View(), 0, 0
	for _, p := range view.VPools() {
		for _, vol := range view.VolumesOf(p.FSID) {
			if vol.Owner != e.raft.ID() {
				continue
			}
			open++
			why := e.volumes.Failure(vol.ID)
			if why == "" {
				continue
			}
			if bad++; bad > volumesNamed {
				continue
			}
			name := vol.ID.String()
			if path, err := view.Path(vol.FSID, vol.Ino); err == nil {
				name = p.Name + path
			}
			f.add("volumes.halted", stateError, "vdisk "+name, why, "")
		}
	}
	if bad == 0 {
		f.add("volumes.halted", stateOK, "", fmt.Sprintf("%d volumes are this node's, none has failed", open), "")
	}
}

func (e estate) backendChecks(ctx context.Context, f *findings) {
	for _, b := range e.ownBackends() {
		object := "vpool " + b.VPool
		switch b.State {
		case "unknown":
			continue // another node's
		case "failing":
			f.add("backend.answers", stateError, object, b.Error+"; writes stay in the log", "")
		default:
			f.add("backend.answers", stateOK, object, b.URL+" answers", "")
		}
		if b.Total > 0 {
			used := 1 - float64(b.Free)/float64(b.Total)
			f.add("backend.room", grade(used, backendWarn, backendFail), object, fmt.Sprintf("%s of %s free", bytesize.Format(int64(b.Free)),
				bytesize.Format(int64(b.Total))), "")
		}
	}
}

func (e estate) hostChecks(f *findings, self string) {
	var st unix.Statfs_t
	if err := unix.Statfs(e.cfg.Data, &st); err != nil {
		f.add("disk.data", stateWarning, self, err.Error(), "")
	} else if st.Blocks > 0 {
		used := 1 - float64(st.Bavail)/float64(st.Blocks)
		f.add("disk.data", grade(used, dataWarn, dataFail), self, fmt.Sprintf("%s free on the disk of %s", bytesize.Format(int64(st.Bavail)*st.Bsize), e.cfg.Data), "")
	}
	for _, c := range doctor.Host() {
		found := c.Probe(context.Background()) // reads /proc
		state := map[doctor.Status]string{doctor.OK: stateOK, doctor.Skip: stateOK, doctor.Warn: stateWarning, doctor.Fail: stateError}[found.Status]
		f.add(c.ID, state, self, found.Evidence, found.Remedy)
	}
	if e.network != nil {
		left := time.Until(e.tls.NodeExpires())
		state := stateOK
		switch {
		case left < certFail:
			state = stateError
		case left < certWarn:
			state = stateWarning
		}
		f.add("certificate.node", state, self, fmt.Sprintf("ends %s, renewed by itself before", e.tls.NodeExpires().UTC().Format(time.DateOnly)), "")
	}
}

// clusterChecks are about the cluster as this node sees it; the node that is asked makes them.
func (e estate) clusterChecks(ctx context.Context) []v1.HealthCheck {
	f := &findings{e: e, node: e.nodeName(e.raft.ID()), now: time.Now().UTC()}
	c, err := e.Cluster(ctx)
	switch {
	case err != nil:
		f.add("cluster.leader", stateError, "", "control does not answer: "+err.Error(), "")
	case c.Leader == "":
		f.add("cluster.leader", stateError, "", "there is none: nothing can be changed", "")
	default:
		f.add("cluster.leader", stateOK, "", c.Leader+" leads", "")
	}
	masters, versions := 0, make(map[string]int)
	for _, n := range c.Nodes {
		versions[n.Version]++
		if n.Role == state.RoleMaster && !n.Offline {
			masters++
		}
	}
	switch {
	case len(c.Nodes) > 1 && masters < 3:
		f.add("cluster.masters", stateWarning, "", fmt.Sprintf("%d masters: the loss of one stops control", masters), "")
	case err == nil:
		f.add("cluster.masters", stateOK, "", fmt.Sprintf("%d masters of %d nodes", masters, len(c.Nodes)), "")
	}
	if len(versions) > 1 {
		f.add("cluster.versions", stateWarning, "", fmt.Sprintf("%d versions: %v", len(versions), versions), "")
	} else if err == nil {
		f.add("cluster.versions", stateOK, "", "one version", "")
	}
	e.taskChecks(f)
	e.alertChecks(f)
	return f.out
}

func (e estate) taskChecks(f *findings) {
	view, failed, waiting := e.raft.State().View(), 0, 0
	var last, oldest state.Task
	view.Tasks(func(t *state.Task) bool {
		switch {
		case t.State == state.TaskFailed && f.now.Sub(time.Unix(0, int64(t.Ended))) < secondsPerDay:
			if failed++; t.Ended > last.Ended {
				last = *t
			}
		case t.State == state.TaskQueued && f.now.Sub(time.Unix(0, int64(max(t.Created, t.NotBefore)))) > waitWarn:
			if waiting++; waiting == 1 || t.Created < oldest.Created {
				oldest = *t
			}
		}
		return true
	})
	if failed > 0 {
		why := ""
		if last.Problem != nil {
			why = ": " + last.Problem.Cause
		}
		f.add("tasks.failed", stateWarning, "task "+last.ID.String(), fmt.Sprintf("%d failed, the last one %s%s", failed, last.Type, why), "")
	} else {
		f.add("tasks.failed", stateOK, "", "none failed", "")
	}
	if waiting > 0 {
		f.add("tasks.waiting", stateWarning, "task "+oldest.ID.String(), fmt.Sprintf("%d wait for more than %s, the oldest %s in queue %s", waiting, waitWarn,
			oldest.Type, oldest.Queue), "")
	} else {
		f.add("tasks.waiting", stateOK, "", "none waits", "")
	}
	late := 0
	for _, s := range e.automation.schedules.List() {
		if !s.Spec.Disabled && (s.Err != nil || !s.Next.IsZero() && f.now.Sub(s.Next) > dueWarn) {
			if late++; late <= volumesNamed {
				why := "was due " + s.Next.UTC().Format(time.RFC3339)
				if s.Err != nil {
					why = s.Err.Error()
				}
				f.add("schedules.due", stateWarning, "schedule "+s.Entry.Name, why, "")
			}
		}
	}
	if late == 0 {
		f.add("schedules.due", stateOK, "", "none is late", "")
	}
	behind := 0
	for _, sink := range view.Sinks() {
		if s := e.automation.sinks.Status(sink.ID); !s.Failing.IsZero() { // the leader's to know
			behind++
			f.add("events.sinks", stateWarning, "sink "+sink.Name, "failing since "+s.Failing.UTC().Format(time.RFC3339)+": "+s.Error, "")
		}
	}
	if behind == 0 {
		f.add("events.sinks", stateOK, "", "none is behind", "")
	}
}

// healthSource is what the health task names its alerts' source.
const healthSource = "health/"

// alertChecks are what tasks have found that is not looked at here.
func (e estate) alertChecks(f *findings) {
	diverged := 0
	for _, a := range e.raft.State().View().Alerts() {
		if strings.HasPrefix(a.Source, healthSource) { // looked at above, and now
			continue
		}
		diverged++
		since, node := time.Unix(0, int64(a.Since)).UTC(), f.node
		if a.Node != uuid.Nil {
			node = e.nodeName(a.Node)
		}
		known, _ := doctor.CodeOf("model.reality")
		f.out = append(f.out, v1.HealthCheck{Code: known.Code, Title: known.Title, State: a.Severity, Node: node, Object: a.Object, Evidence: a.Code + ": " + a.Detail,
			Remedy: a.Remedy, Since: &since, At: f.now})
	}
	if diverged == 0 {
		f.add("model.reality", stateOK, "", "they are the same", "")
	}
}
