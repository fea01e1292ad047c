package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"syscall"
	"time"
)

// outcome is what a load did. Latencies are zero where the client does not tell them.
type outcome struct {
	ops      int64
	rate     float64 // operations a second
	bytesSec float64
	p50, p99 time.Duration
}

// runner carries out one run of a load.
type runner func(ctx context.Context, s *server, repetition int) (outcome, error)

// load is one workload and the goals that it serves.
type load struct {
	row, name string
	unit      string                                     // what is compared: "op/s", "MB/s", "us" (server CPU), "ms" (p99), "s"
	peers     []string                                   // names of the servers that take part beside ours; nil: all there are
	unix      bool                                       // over unix sockets, not TCP
	before    func(ctx context.Context, s *server) error // not measured, before every run
	root      bool                                       // before needs it
	run       runner
	goals     []goal
}

// sample is one run's figures.
type sample struct {
	Row        string  `json:"row"`
	Load       string  `json:"load"`
	Server     string  `json:"server"`
	Repetition int     `json:"repetition"`
	Rate       float64 `json:"ops_per_s"`
	MBs        float64 `json:"mb_per_s"`
	P50us      float64 `json:"p50_us"`
	P99us      float64 `json:"p99_us"`
	CPUus      float64 `json:"server_cpu_us_per_op"`
	CPUAllus   float64 `json:"server_cpu_us_per_op_with_destage"`
	RSS        int64   `json:"rss_bytes"`
	Other      float64 `json:"other_cores"` // what everything but server and client used meanwhile
	Steal      float64 `json:"stolen_cores"`
}

// failuresMax is how many failed runs of a load a server may have before it is left out of the load's further ones.
const failuresMax = 2

// compare runs a load on all its servers, as often as asked, in an order that turns round each time.
func (r *recorder) compare(ctx context.Context, l load, servers []*server) error {
	var chosen []*server
	for _, s := range servers {
		if s.name == ours || l.peers == nil || slices.Contains(l.peers, s.name) {
			chosen = append(chosen, s)
		}
	}
	r.loads = append(r.loads, l)
	start := time.Now()
	var errs error
	failed := map[string]int{}
	turn := func(s *server, f func() error) {
		if ctx.Err() != nil || failed[s.name] >= failuresMax {
			return
		}
		if err := withTurn(s, f); err != nil {
			failed[s.name]++
			errs = errors.Join(errs, fmt.Errorf("%s %s on %s: %w", l.row, l.name, s.name, err))
		}
	}
	for repetition := range r.settings.repeat {
		for _, s := range chosen {
			turn(s, func() error {
				got, err := r.once(ctx, l, s, repetition)
				if err == nil {
					r.samples = append(r.samples, got)
				}
				return err
			})
		}
		slices.Reverse(chosen)
	}
	fmt.Printf("%-4s %-28s %4.0f s  %s\n", l.row, l.name, time.Since(start).Seconds(), r.brief(l))
	return errors.Join(errs, ctx.Err())
}

// withTurn wakes ours for its turn and stops it afterwards.
func withTurn(s *server, f func() error) error {
	if s.node == nil {
		return f()
	}
	if err := resume(s.node); err != nil {
		return err
	}
	return errors.Join(f(), pause(s.node))
}

// once measures one run.
func (r *recorder) once(ctx context.Context, l load, s *server, repetition int) (sample, error) {
	if s.node != nil {
		quiesce(ctx, s) // of the peers, the kernel does what is left to do
	}
	syscall.Sync()
	if l.before != nil {
		if err := l.before(ctx, s); err != nil {
			return sample{}, err
		}
	}
	if ctx.Err() != nil {
		return sample{}, ctx.Err()
	}
	start, server0, client0 := time.Now(), s.cpu(), clientCPU()
	busy0, steal0 := machineCPU()
	got, err := l.run(ctx, s, repetition)
	if err != nil {
		return sample{}, err
	}
	elapsed, server, client := time.Since(start).Seconds(), s.cpu()-server0, clientCPU()-client0
	busy, steal := machineCPU()
	rss := s.rss()
	var rest time.Duration
	if s.node != nil {
		rest = quiesce(ctx, s)
	}
	perOp := func(d time.Duration) float64 { return float64(d.Microseconds()) / float64(max(1, got.ops)) }
	return sample{Row: l.row, Load: l.name, Server: s.name, Repetition: repetition, Rate: got.rate, MBs: got.bytesSec / 1e6,
		P50us: float64(got.p50.Nanoseconds()) / 1e3, P99us: float64(got.p99.Nanoseconds()) / 1e3,
		CPUus: perOp(server), CPUAllus: perOp(server + rest), RSS: rss,
		Other: max(0, (busy-busy0-server-client).Seconds()/elapsed), Steal: (steal - steal0).Seconds() / elapsed}, nil
}

// clientCPU is the processor time of this process and of the clients that it has waited for.
func clientCPU() time.Duration {
	var sum time.Duration
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var u syscall.Rusage
		if syscall.Getrusage(who, &u) == nil {
			sum += time.Duration(u.Utime.Nano() + u.Stime.Nano())
		}
	}
	return sum
}

// machineCPU is the processor time that all of the machine has used, and what its hypervisor kept from it.
func machineCPU() (busy, steal time.Duration) {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, 0
	}
	line, _, _ := bytes.Cut(text, []byte("\n"))
	for i, f := range bytes.Fields(line) {
		ticks, err := strconv.ParseInt(string(f), 10, 64)
		if err != nil {
			continue // the line's name
		}
		d := time.Duration(ticks) * 10 * time.Millisecond
		switch i {
		case 1, 2, 3, 6, 7: // user, nice, system, interrupts
			busy += d
		case 8:
			steal += d
		}
	}
	return busy, steal
}
