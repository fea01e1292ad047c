package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"varve/control/api/client"
	v1 "varve/control/api/customer"
	"varve/control/bytesize"
)

// Most commands are one call and print what it answers. listing, showing and verb describe such a command; the tables' columns are the
// API's own field names, with how to print them after a colon: "size:bytes", "created:time".

// listing is a command that lists objects.
type listing struct {
	use, short string
	path       func(args []string) []string // of the API, without its prefix
	args       []string
	columns    []string
	complete   func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective)
}

func fixed(path ...string) func([]string) []string {
	return func([]string) []string { return path }
}

func (e *env) listing(l listing) *cobra.Command {
	var s client.Select
	c := &cobra.Command{
		Use: l.use, Aliases: []string{"ls"}, Short: l.short, Args: exactly(l.args...), ValidArgsFunction: l.complete,
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.call(saying(cmd), strings.Join(args, " "), func(se *session) error {
				items, err := client.List[json.RawMessage](se.ctx(cmd), se.Client, s, l.path(args)...)
				if err != nil {
					return err
				}
				return e.show(items, func(w io.Writer) error { return printRows(w, items, l.columns) })
			})
		},
	}
	c.Flags().StringVar(&s.Filter, "filter", "", `only those that `+"`MATCH`"+`, such as 'size>10GiB and name~"db"'`)
	c.Flags().StringVar(&s.Sort, "sort", "", "by these `FIELDS`, - for descending: -size,name")
	return c
}

// verb is a command that shows, makes, changes or destroys one object.
type verb struct {
	use, short, long string
	args             []string
	method           string
	path             func(args []string) []string // of the API, without its prefix
	query            func() map[string]string
	body             func(args []string) (any, error) // nil: none
	flags            func(*pflag.FlagSet)
	// confirm, unless nil, names what must be repeated in --confirm.
	confirm func(args []string) string
	// task: the answer is a task, to be waited for.
	task bool
	// done is printed where there is no answer.
	done     string
	complete func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective)
	table    func(w io.Writer, raw json.RawMessage) error
	// failed says that an answer tells of a failure, in whatever format it is printed.
	failed func(raw json.RawMessage) bool
}

func (e *env) verb(v verb) *cobra.Command {
	var confirmation string
	var noWait, dryRun bool
	c := &cobra.Command{
		Use: v.use, Short: v.short, Long: v.long, Args: exactly(v.args...), ValidArgsFunction: v.complete,
		RunE: func(cmd *cobra.Command, args []string) error {
			what := saying(cmd)
			object := ""
			if len(args) > 0 {
				object = args[0]
			}
			if v.confirm != nil && !dryRun {
				if err := confirmed(what, v.confirm(args), confirmation); err != nil {
					return err
				}
			}
			var in any
			if v.body != nil {
				var err error
				if in, err = v.body(args); err != nil {
					return usageOf(cmd, err)
				}
			}
			return e.call(what, object, func(s *session) error {
				raw, err := s.change(s.ctx(cmd), v, args, in, client.Change{Confirm: confirmation, DryRun: dryRun})
				if err != nil {
					return err
				}
				if v.task && !dryRun {
					return e.follow(cmd, s, raw, !noWait)
				}
				return e.printAnswer(v, raw, dryRun)
			})
		},
	}
	if v.method != http.MethodGet {
		c.Flags().BoolVar(&dryRun, "dry-run", false, "say what would be done, and do nothing")
	}
	if v.confirm != nil {
		c.Flags().StringVar(&confirmation, "confirm", "", "its `NAME` once more")
	}
	if v.task {
		c.Flags().BoolVar(&noWait, "no-wait", false, "do not wait for the task, print it")
	}
	if v.flags != nil {
		v.flags(c.Flags())
	}
	return c
}

// saying is a command as a message has it: "delete vdisk".
func saying(cmd *cobra.Command) string {
	if cmd.Parent() == cmd.Root() {
		return cmd.Name()
	}
	return cmd.Name() + " " + cmd.Parent().Name()
}

// change calls the API for a verb and gives the answer, nil where there is none.
func (s *session) change(ctx context.Context, v verb, args []string, in any, g client.Change) (json.RawMessage, error) {
	var out json.RawMessage
	q := map[string]string{}
	if v.query != nil {
		q = v.query()
	}
	effect, err := client.Call(ctx, s.Client, v.method, v.path(args), q, in, &out, g)
	if err != nil {
		return nil, err
	}
	if effect != nil {
		return json.Marshal(effect)
	}
	return out, nil
}

func (e *env) printAnswer(v verb, raw json.RawMessage, dryRun bool) error {
	err := e.printAs(v, raw, dryRun)
	if err == nil && !dryRun && v.failed != nil && v.failed(raw) {
		err = &silent{exit: ExitFailed}
	}
	return err
}

func (e *env) printAs(v verb, raw json.RawMessage, dryRun bool) error {
	if len(raw) == 0 {
		if v.done != "" && !e.json() {
			_, err := fmt.Fprintln(e.std.Err, v.done)
			return err
		}
		return nil
	}
	return e.show(raw, func(w io.Writer) error {
		if dryRun {
			var f v1.Effect
			if err := json.Unmarshal(raw, &f); err != nil {
				return err
			}
			return printEffect(w, f)
		}
		if v.table != nil {
			return v.table(w, raw)
		}
		return printObject(w, raw)
	})
}

// printEffect says what a dry run found.
func printEffect(w io.Writer, f v1.Effect) error {
	var b strings.Builder
	fmt.Fprintf(&b, "Would: %s\n", f.Summary)
	for _, part := range []struct {
		head  string
		lines []string
	}{{"change", f.Changes}, {"LOST", f.Lost}, {"affected", f.Affected}} {
		for _, l := range part.lines {
			fmt.Fprintf(&b, "  %s: %s\n", part.head, l)
		}
	}
	if !f.Reversible {
		fmt.Fprintln(&b, "  this cannot be undone")
	}
	return printTrimmed(w, oneLines(b.String()))
}

func oneLines(s string) string {
	var b strings.Builder
	for l := range strings.Lines(s) {
		b.WriteString(oneLine(strings.TrimSuffix(l, "\n")) + "\n")
	}
	return b.String()
}

// taskWait is how long one question for a task's end waits.
const taskWait = 20

// follow waits for a task that was started, with a bar on a terminal. An interrupt leaves the task running and says its id.
func (e *env) follow(cmd *cobra.Command, s *session, raw json.RawMessage, wait bool) error {
	var t v1.Task
	if err := json.Unmarshal(raw, &t); err != nil {
		return err
	}
	report, stop := e.bar(t.Title)
	for wait && (t.State == "queued" || t.State == "running") {
		ctx, cancel := context.WithTimeout(cmd.Context(), 2*taskWait*time.Second)
		_, err := client.Call(ctx, s.Client, http.MethodGet, []string{"tasks", t.ID.String()}, map[string]string{"wait": strconv.Itoa(e.taskStep())}, nil, &raw, client.Change{})
		cancel()
		if err == nil {
			err = json.Unmarshal(raw, &t)
		}
		if err != nil {
			stop(err)
			if errors.Is(cmd.Context().Err(), context.Canceled) {
				return &Failure{Exit: ExitFailed, What: "wait for task", Object: t.ID.String(), Why: "interrupted; the task goes on",
					Remedy: "see it with: varve task show " + t.ID.String(), Err: err}
			}
			return err
		}
		if report != nil && t.Total > 0 {
			report(t.Done, t.Total)
		}
	}
	var failed error
	if t.State == "failed" || t.State == "cancelled" {
		f := &Failure{Exit: ExitFailed, What: t.Title, Object: t.Object, Why: "the task was " + t.State}
		if t.Problem != nil {
			f.Why, f.Remedy = t.Problem.Cause+": "+t.Problem.Consequence, t.Problem.Remedy
		}
		failed = f
	}
	stop(failed)
	if failed != nil {
		return failed
	}
	return e.show(raw, func(w io.Writer) error { return printTask(w, raw) })
}

// taskStep is how often a bar moves, or how long a question waits without one.
func (e *env) taskStep() int {
	if e.std.ErrTTY {
		return 1
	}
	return taskWait
}

func printTask(w io.Writer, raw json.RawMessage) error {
	var t v1.Task
	if err := json.Unmarshal(raw, &t); err != nil {
		return err
	}
	fields := [][2]string{{"ID", t.ID.String()}, {"Task", t.Title}, {"State", t.State}, {"Object", t.Object}, {"Started by", t.By}, {"Node", t.Node},
		{"Created", formatTime(t.Created)}}
	if t.Total > 0 {
		fields = append(fields, [2]string{"Progress", fmt.Sprintf("%d of %d", t.Done, t.Total)})
	}
	for _, s := range t.Steps {
		fields = append(fields, [2]string{"Step", s.Name})
	}
	for _, l := range t.Log {
		fields = append(fields, [2]string{"Log", formatTime(l.At) + " " + l.Text})
	}
	if p := t.Problem; p != nil {
		fields = append(fields, [2]string{"Cause", p.Cause}, [2]string{"Consequence", p.Consequence}, [2]string{"Remedy", p.Remedy})
	}
	return printFields(w, fields)
}

// printRows prints the columns of objects.
func printRows(w io.Writer, items []json.RawMessage, columns []string) error {
	header := make([]string, len(columns))
	for i, c := range columns {
		name, _, _ := strings.Cut(c, ":")
		header[i] = strings.ReplaceAll(name, "_", " ")
	}
	rows := make([][]string, 0, len(items))
	for _, raw := range items {
		object, err := fieldsOf(raw)
		if err != nil {
			return err
		}
		row := make([]string, len(columns))
		for i, c := range columns {
			name, how, _ := strings.Cut(c, ":")
			row[i] = dash(cell(object[name], how))
		}
		rows = append(rows, row)
	}
	return printTable(w, header, rows)
}

func fieldsOf(raw json.RawMessage) (map[string]any, error) {
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	var object map[string]any
	if err := d.Decode(&object); err != nil {
		return nil, fmt.Errorf("read the answer: %w", err)
	}
	return object, nil
}

// cell prints a value.
func cell(v any, how string) string {
	switch v := v.(type) {
	case nil:
		return ""
	case string:
		if how == "time" {
			if t, err := time.Parse(time.RFC3339, v); err == nil {
				return formatTime(t)
			}
		}
		return v
	case json.Number:
		if n, err := v.Int64(); err == nil && how == "bytes" {
			return bytesize.Format(n)
		}
		return v.String()
	case bool:
		if v {
			return "yes"
		}
		return "no"
	case []any:
		parts := make([]string, 0, len(v))
		for _, x := range v {
			parts = append(parts, cell(x, how))
		}
		return strings.Join(parts, ", ")
	}
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Sprint(v)
	}
	return string(b)
}

// looks says how fields of any object are printed.
var looks = map[string]string{"size": "bytes", "unique": "bytes", "shared": "bytes", "unlogged_bytes": "bytes", "unbacked_bytes": "bytes",
	"used": "bytes", "pending": "bytes", "created": "time", "modified": "time", "expires": "time", "removed": "time", "until": "time",
	"time": "time", "at": "time", "last": "time", "next": "time", "failing": "time"}

// printObject prints every field of an object, name first, and those of objects inside it under their names.
func printObject(w io.Writer, raw json.RawMessage) error {
	object, err := fieldsOf(raw)
	if err != nil {
		return err
	}
	return printFields(w, objectFields("", object))
}

func objectFields(prefix string, object map[string]any) [][2]string {
	names := slices.SortedFunc(maps.Keys(object), func(a, b string) int {
		if (a == "name") != (b == "name") {
			if a == "name" {
				return -1
			}
			return 1
		}
		return strings.Compare(a, b)
	})
	var fields [][2]string
	for _, n := range names {
		if inner, ok := object[n].(map[string]any); ok && prefix == "" {
			fields = append(fields, objectFields(n+" ", inner)...)
			continue
		}
		label := strings.ReplaceAll(prefix+n, "_", " ")
		fields = append(fields, [2]string{strings.ToUpper(label[:1]) + label[1:], dash(cell(object[n], looks[n]))})
	}
	return fields
}
