package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/progress"
	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/jedib0t/go-pretty/v6/text"
	"go.yaml.in/yaml/v3"

	"varve/appliance/transfer"
)

// printJSON writes data as the API gives it.
func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// printYAML writes what printJSON would as YAML.
func printYAML(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	var plain any
	if err := yaml.Unmarshal(b, &plain); err != nil { // JSON is YAML; numbers stay whole
		return err
	}
	e := yaml.NewEncoder(w)
	e.SetIndent(2)
	if err := e.Encode(plain); err != nil {
		return err
	}
	return e.Close()
}

// printTable writes rows under a header: columns apart by spaces, no frame, so that awk and people can both read it.
func printTable(w io.Writer, header []string, rows [][]string) error {
	t := table.NewWriter()
	style := table.StyleDefault
	style.Options = table.OptionsNoBordersAndSeparators
	style.Box.PaddingLeft, style.Box.PaddingRight = "", "  "
	style.Format.Header = text.FormatUpper
	t.SetStyle(style)
	t.AppendHeader(toRow(header))
	for _, r := range rows {
		t.AppendRow(toRow(r))
	}
	return printTrimmed(w, t.Render())
}

func toRow(cells []string) table.Row {
	r := make(table.Row, len(cells))
	for i, c := range cells {
		r[i] = oneLine(c)
	}
	return r
}

// printFields writes one object: a name and a value per line.
func printFields(w io.Writer, fields [][2]string) error {
	width := 0
	for _, f := range fields {
		width = max(width, len(f[0]))
	}
	var b strings.Builder
	for _, f := range fields {
		fmt.Fprintf(&b, "%-*s  %s\n", width+1, f[0]+":", oneLine(f[1]))
	}
	return printTrimmed(w, b.String())
}

func printTrimmed(w io.Writer, s string) error {
	for line := range strings.Lines(s) {
		if _, err := fmt.Fprintln(w, strings.TrimRight(line, " \n")); err != nil {
			return err
		}
	}
	return nil
}

// bar shows a transfer's progress on standard error while that is a terminal. stop must be called with how it ended.
func (e *env) bar(what string) (report transfer.Progress, stop func(error)) {
	if !e.std.ErrTTY {
		return nil, func(error) {}
	}
	w := progress.NewWriter()
	w.SetOutputWriter(e.std.Err)
	w.SetUpdateFrequency(200 * time.Millisecond)
	w.SetTrackerLength(30)
	w.SetNumTrackersExpected(1)
	w.SetAutoStop(true)
	w.Style().Visibility.TrackerOverall = false
	w.Style().Visibility.ETA = true
	w.Style().Visibility.Speed = true
	if e.colour() {
		w.Style().Colors = progress.StyleColorsExample
	}
	t := &progress.Tracker{Message: what, Units: progress.UnitsBytes}
	w.AppendTracker(t)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		w.Render() // until the tracker is done or errored
	}()
	report = func(done, total int64) {
		t.UpdateTotal(total)
		t.SetValue(min(done, total-1)) // the last byte is counted when the flush is over, too
	}
	return report, func(err error) {
		if err != nil {
			t.MarkAsErrored()
		} else {
			t.MarkAsDone()
		}
		<-ended
	}
}

// colour follows no-color.org.
func (e *env) colour() bool {
	return e.std.ErrTTY && e.std.Getenv("NO_COLOR") == "" && e.std.Getenv("TERM") != "dumb"
}
