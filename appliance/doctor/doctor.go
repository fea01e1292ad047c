// Package doctor probes whether a machine is fit to hold people's disks, and whether a running appliance serves them.
//
// A check has an id that never changes, a time limit, and gives a dated finding with evidence (what was measured) and a
// remedy (what to do). The ids:
//
//	disk.flush      does fdatasync reach a device          host.clock    is the clock kept by NTP
//	disk.log        4K write+fdatasync, sequential speed   host.files    limit of open files
//	disk.mount      is the data directory on a real disk   host.memory   memory against the budget
//	disk.space      room left                              server.state  is the appliance up and sound
//	backend.local   create-only, read back, list, delete   server.nbd    open and read every NBD export
//	backend.vpool   what the probe of a vPool found        server.nfs    mount and read every NFS export
//
// server.nfs goes through github.com/vmware/go-nfs-client, a client written for a hypervisor's use of NFSv3, wherever that
// can work: it finds its ports through a portmapper. Without one on port 111 the fork that takes ports is used.
//
// A probe that hangs in the kernel cannot be stopped; its goroutine is left behind and the check fails. So checks belong in
// a process that ends soon, as the command does.
package doctor

import (
	"context"
	"fmt"
	"runtime/debug"
	"time"
)

// Status is how a check ended.
type Status string

// Worst last.
const (
	Skip Status = "skip" // nothing to check here
	OK   Status = "ok"
	Warn Status = "warn" // works, but not as it should
	Fail Status = "fail"
)

// Finding is what a probe found. Remedy is empty when all is well.
type Finding struct {
	Status   Status
	Evidence string
	Remedy   string
}

// Check is one probe.
type Check struct {
	ID, Title string
	Limit     time.Duration
	Probe     func(ctx context.Context) Finding
}

// Result is a dated finding. It is part of the command's JSON output.
type Result struct {
	ID         string    `json:"id"`
	Title      string    `json:"title"`
	Status     Status    `json:"status"`
	Evidence   string    `json:"evidence"`
	Remedy     string    `json:"remedy,omitempty"`
	At         time.Time `json:"at"`
	DurationMS int64     `json:"duration_ms"`
}

// Run does the checks one after the other, because they measure the same disk.
func Run(ctx context.Context, checks []Check) []Result {
	results := make([]Result, 0, len(checks))
	for _, c := range checks {
		start := time.Now()
		f := c.run(ctx)
		results = append(results, Result{
			ID: c.ID, Title: c.Title, Status: f.Status, Evidence: f.Evidence, Remedy: f.Remedy,
			At: start.UTC(), DurationMS: time.Since(start).Milliseconds(),
		})
	}
	return results
}

func (c Check) run(ctx context.Context) Finding {
	ctx, cancel := context.WithTimeout(ctx, c.Limit)
	defer cancel()
	found := make(chan Finding, 1)
	go func() {
		defer func() {
			if p := recover(); p != nil {
				found <- Finding{Fail, fmt.Sprintf("the probe panicked: %v\n%s", p, debug.Stack()), "report this as a bug of varve"}
			}
		}()
		found <- c.Probe(ctx)
	}()
	grace := time.NewTimer(c.Limit + time.Second)
	defer grace.Stop()
	select {
	case f := <-found:
		return f
	case <-grace.C:
		return Finding{Fail, fmt.Sprintf("no answer within %s", c.Limit), "look for hung I/O: dmesg, iostat -x 1"}
	}
}

// Failed says whether any check failed.
func Failed(results []Result) bool {
	for _, r := range results {
		if r.Status == Fail {
			return true
		}
	}
	return false
}

func failed(err error, remedy string) Finding { return Finding{Fail, err.Error(), remedy} }
