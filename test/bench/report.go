package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// goal is one figure to reach: a ratio to the best of some peers, or an absolute limit of ours.
type goal struct {
	peers   []string
	atLeast float64 // ours / the peer with the best median
	atMost  float64 // in the load's unit, when there are no peers
	text    string  // what atMost means, where that is not obvious
	issue   bool    // the issue that this was built for asks for it; the others are the engine's goals
}

// recorder keeps what was measured.
type recorder struct {
	settings settings
	loads    []load
	samples  []sample
}

// value is the figure of a sample that its load is about.
func value(unit string, s sample) float64 {
	switch unit {
	case "MB/s":
		return s.MBs
	case "us":
		return s.CPUus
	case "ms":
		return s.P99us / 1e3
	}
	return s.Rate
}

// spread is a median with the least and the greatest value.
type spread struct {
	Median, Min, Max float64
}

func spreadOf(values []float64) spread {
	if len(values) == 0 {
		return spread{}
	}
	v := slices.Sorted(slices.Values(values))
	return spread{Median: (v[(len(v)-1)/2] + v[len(v)/2]) / 2, Min: v[0], Max: v[len(v)-1]}
}

func (r *recorder) of(l load, server string) []sample {
	var out []sample
	for _, s := range r.samples {
		if s.Row == l.row && s.Load == l.name && s.Server == server {
			out = append(out, s)
		}
	}
	return out
}

func (r *recorder) spread(l load, server string, f func(sample) float64) spread {
	var values []float64
	for _, s := range r.of(l, server) {
		values = append(values, f(s))
	}
	return spreadOf(values)
}

// serversOf lists who was measured, ours first.
func (r *recorder) serversOf(l load) []string {
	var names []string
	for _, s := range r.samples {
		if s.Row == l.row && s.Load == l.name && !slices.Contains(names, s.Server) {
			names = append(names, s.Server)
		}
	}
	return names
}

// verdict is a goal beside what was reached.
type verdict struct {
	Row     string  `json:"row"`
	Load    string  `json:"load"`
	Unit    string  `json:"unit"`
	Ours    spread  `json:"ours"`
	Peer    string  `json:"peer,omitempty"`
	Theirs  spread  `json:"theirs"`
	Ratio   spread  `json:"ratio"`
	Goal    float64 `json:"goal"`
	Text    string  `json:"text,omitempty"`
	Issue   bool    `json:"issue_asks"`
	Verdict string  `json:"verdict"` // "met", "below" or "not measured"
}

func (r *recorder) judge(l load, g goal) verdict {
	pick := func(s sample) float64 { return value(l.unit, s) }
	v := verdict{Row: l.row, Load: l.name, Unit: l.unit, Ours: r.spread(l, ours, pick),
		Goal: g.atMost, Text: g.text, Issue: g.issue, Verdict: "not measured"}
	mine := r.of(l, ours)
	if len(g.peers) == 0 {
		if len(mine) > 0 {
			v.Verdict = met(v.Ours.Median <= g.atMost)
		}
		return v
	}
	v.Goal = g.atLeast
	for _, p := range g.peers {
		if s := r.spread(l, p, pick); s.Median > v.Theirs.Median {
			v.Peer, v.Theirs = p, s
		}
	}
	var ratios []float64
	for _, t := range r.of(l, v.Peer) {
		for _, m := range mine {
			if m.Repetition == t.Repetition && pick(t) > 0 {
				ratios = append(ratios, pick(m)/pick(t))
			}
		}
	}
	if len(ratios) > 0 {
		v.Ratio = spreadOf(ratios)
		v.Verdict = met(v.Ratio.Median >= g.atLeast)
	}
	if v.Peer == "" {
		v.Peer = strings.Join(g.peers, ", ")
	}
	return v
}

func met(yes bool) string {
	if yes {
		return "met"
	}
	return "below"
}

func (r *recorder) verdicts() []verdict {
	var out []verdict
	for _, l := range r.loads {
		for _, g := range l.goals {
			out = append(out, r.judge(l, g))
		}
	}
	slices.SortStableFunc(out, func(a, b verdict) int { return cmp.Compare(rowNumber(a.Row), rowNumber(b.Row)) })
	return out
}

func rowNumber(row string) int {
	var n int
	fmt.Sscanf(row, "G%d", &n)
	return n
}

// brief is a load's medians in one line, printed as soon as they are known.
func (r *recorder) brief(l load) string {
	var parts []string
	for _, name := range r.serversOf(l) {
		figure := r.spread(l, name, func(s sample) float64 { return value(l.unit, s) }).Median
		parts = append(parts, name+" "+number(figure))
	}
	return l.unit + ": " + strings.Join(parts, " | ")
}

// number prints three significant figures or whole numbers.
func number(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

func (s spread) String() string {
	return fmt.Sprintf("%s (%s-%s)", number(s.Median), number(s.Min), number(s.Max))
}

// print writes every server's medians and then the goals.
func (r *recorder) print(w io.Writer) {
	if len(r.samples) == 0 {
		return
	}
	fmt.Fprintf(w, "\nAbsolute figures: median (least-greatest) of %d repetitions\n", r.settings.repeat)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "row\tload\tserver\top/s\tMB/s\tp50 us\tp99 us\tCPU us/op\twith destage\tRSS MiB")
	loads := slices.Clone(r.loads)
	slices.SortStableFunc(loads, func(a, b load) int { return cmp.Compare(rowNumber(a.row), rowNumber(b.row)) })
	for _, l := range loads {
		for _, name := range r.serversOf(l) {
			median := func(f func(sample) float64) string {
				if v := r.spread(l, name, f).Median; v > 0 {
					return number(v)
				}
				return "-"
			}
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", l.row, l.name, name,
				r.spread(l, name, func(s sample) float64 { return s.Rate }), median(func(s sample) float64 { return s.MBs }),
				median(func(s sample) float64 { return s.P50us }), median(func(s sample) float64 { return s.P99us }),
				median(func(s sample) float64 { return s.CPUus }), median(func(s sample) float64 { return s.CPUAllus }),
				median(func(s sample) float64 { return float64(s.RSS) / (1 << 20) }))
		}
	}
	t.Flush()
	fmt.Fprintf(w, "\nGoals: ours beside the best of the peers named; * the issue asks for it, the others are the engine's goals.\n"+
		"op/s and MB/s: ratio within a repetition, median (least-greatest). us: server CPU per operation. ms: time, p99.\n")
	t = tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "row\tload\tunit\tours\tpeer\ttheirs\tratio\tgoal\tverdict\tCPU us/op ours:theirs\tRSS MiB ours:theirs")
	count := map[string]int{}
	for _, v := range r.verdicts() {
		l := r.loads[slices.IndexFunc(r.loads, func(l load) bool { return l.row == v.Row && l.name == v.Load })]
		both := func(f func(sample) float64) string {
			text := number(r.spread(l, ours, f).Median)
			if theirs := r.spread(l, v.Peer, f).Median; theirs > 0 {
				text += " : " + number(theirs)
			}
			return text
		}
		peer, theirs, ratio, target := v.Peer, v.Theirs.String(), v.Ratio.String(), ">= "+number(v.Goal)
		if peer == "" {
			peer, theirs, ratio, target = "-", "-", "-", "<= "+number(v.Goal)+" "+v.Unit
			if v.Text != "" {
				target += " (" + v.Text + ")"
			}
		} else if v.Verdict == "not measured" {
			theirs, ratio = "-", "-"
		}
		star := ""
		if v.Issue {
			star = " *"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s%s\t%s\t%s\t%s\n", v.Row, v.Load, v.Unit, v.Ours, peer, theirs, ratio, target, star,
			v.Verdict, both(func(s sample) float64 { return s.CPUus }), both(func(s sample) float64 { return float64(s.RSS) / (1 << 20) }))
		count[v.Verdict]++
	}
	t.Flush()
	fmt.Fprintf(w, "%d met, %d below, %d not measured\n", count["met"], count["below"], count["not measured"])
	var other, steal []float64
	for _, s := range r.samples {
		other, steal = append(other, s.Other), append(steal, s.Steal)
	}
	fmt.Fprintf(w, "Meanwhile the kernel's background and other processes used %s cores, and the hypervisor withheld %s.\n",
		spreadOf(other), spreadOf(steal))
	if n := clientCrashes.Load(); n > 0 {
		fmt.Fprintf(w, "fio itself broke down %d times and was run once more.\n", n)
	}
	if spreadOf(other).Median > 0.25 {
		fmt.Fprintln(w, "That is a busy machine: ratios hold roughly, absolute figures do not.")
	}
}

// write keeps everything as JSON.
func (r *recorder) write(path string, begin time.Time) error {
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	text, err := json.MarshalIndent(struct {
		Begin    time.Time `json:"begin"`
		Kernel   string    `json:"kernel"`
		Seconds  float64   `json:"seconds_per_run"`
		Repeat   int       `json:"repetitions"`
		Area     int64     `json:"area_bytes"`
		Verdicts []verdict `json:"verdicts"`
		Samples  []sample  `json:"samples"`
	}{begin, strings.TrimSpace(string(kernel)), r.settings.runTime.Seconds(), r.settings.repeat, areaBytes,
		r.verdicts(), r.samples}, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}
