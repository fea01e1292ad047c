// Package cli is the command line of varve: what a person types and a script relies on.
//
//	data goes to standard output, everything else to standard error
//	-o table for people, -o json and -o yaml for scripts: the API's own schema, errors as {"error":{code,exit,message,object,remedy}}
//	an error is one line: varve: <what> <object>: <why>; <remedy>
//	what cannot be undone needs --confirm NAME with the object's name; nothing ever prompts
//	progress bars and colour only on a terminal, colour not at all under NO_COLOR
//
// Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 conflict, 5 not allowed, 6 unavailable.
//
// Every command but serve, rebuild and doctor is one or two API calls, over DATA/varve.sock or with --at URL over HTTPS.
package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// Std is the process as the commands see it.
type Std struct {
	In       io.Reader
	Out, Err io.Writer
	ErrTTY   bool // Err is a terminal
	Getenv   func(string) string
	// Version is the binary's.
	Version string
}

// env is what the global flags say.
type env struct {
	std       Std
	data      string
	at        string
	tokenFile string
	ca        string
	output    string
	timeout   time.Duration
	lines     *bufio.Reader // what is left of standard input
}

const (
	outputTable = "table"
	outputJSON  = "json"
	outputYAML  = "yaml"
)

// json says whether the output is for programs.
func (e *env) json() bool { return e.output == outputJSON || e.output == outputYAML }

// Main runs one command line and gives the exit code. ctx ends when the process is asked to stop.
func Main(ctx context.Context, args []string, std Std) int {
	e := &env{std: std, output: outputTable}
	root := e.root()
	root.SetArgs(args)
	root.SetIn(std.In)
	root.SetOut(std.Out)
	root.SetErr(std.Err)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return ExitDone
	}
	if quiet, ok := errors.AsType[*silent](err); ok {
		return quiet.exit
	}
	// A command line that does not parse leaves e.output unset, but its error is still wanted in the form asked for.
	return report(std.Err, err, e.json() || wantsJSON(args))
}

// silent ends a command with an exit code when it has said everything already.
type silent struct{ exit int }

func (s *silent) Error() string { return fmt.Sprintf("exit %d", s.exit) }

func wantsJSON(args []string) bool {
	for i, a := range args {
		if a == "-ojson" || a == "-o=json" || a == "--output=json" ||
			(a == "-o" || a == "--output") && i+1 < len(args) && args[i+1] == outputJSON {
			return true
		}
	}
	return false
}

func (e *env) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "varve",
		Short: "Virtual storage appliance: vDisks for hypervisors over NBD and NFS",
		Long: `Varve serves virtual disks to hypervisors over NBD and NFS from one log-structured store.

  varve serve --data DIR                                run an appliance
  varve --data DIR vdisk create default/disk1 --size 10GiB
  varve --data DIR vdisk import debian.qcow2 default/debian
  varve --data DIR status

The other commands talk to the appliance that runs on --data DIR, or with --at URL to one elsewhere.
Environment: VARVE_DATA, VARVE_AT, VARVE_TOKEN_FILE, VARVE_CA stand for the global flags.
Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 conflict, 5 not allowed, 6 unavailable.`,
		SilenceErrors: true, SilenceUsage: true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return e.check() },
	}
	root.CompletionOptions.HiddenDefaultCmd = false
	f := root.PersistentFlags()
	f.StringVar(&e.data, "data", e.std.Getenv("VARVE_DATA"), "data `DIR` of the appliance on this machine")
	f.StringVar(&e.at, "at", e.std.Getenv("VARVE_AT"), "`URL` of an appliance elsewhere, such as https://host:8443")
	f.StringVar(&e.tokenFile, "token-file", e.std.Getenv("VARVE_TOKEN_FILE"), "`FILE` with the API token for --at")
	f.StringVar(&e.ca, "ca", e.std.Getenv("VARVE_CA"), "`FILE` with the CA certificate of the appliance (its DATA/tls has it)")
	f.StringVarP(&e.output, "output", "o", outputTable, "output `FORMAT`: table, json or yaml")
	f.DurationVar(&e.timeout, "timeout", 5*time.Minute, "give up on a call to the appliance after this time")
	root.AddCommand(e.serveCommand(), e.gatewayCommand(), e.controlCommand(), e.vpoolCommand(), e.vdiskCommand(), e.nodeCommand(), e.clusterCommand(), e.statusCommand(),
		e.doctorCommand(), e.explainCommand(), e.rebuildCommand(), e.versionCommand(), e.firstbootCommand(), e.updateCommand(), e.screenCommand(), e.crashesCommand(), e.logsCommand())
	root.AddCommand(e.accessCommands()...)
	root.AddCommand(e.snapshotCommands()...)
	root.AddCommand(e.automationCommands()...)
	root.AddCommand(e.estateCommands()...)
	root.AddCommand(e.machineCommands()...)
	strict(root)
	return root
}

// strict turns every mistake on the command line into a usage error, also for what cobra adds by itself.
func strict(c *cobra.Command) {
	c.SetFlagErrorFunc(func(c *cobra.Command, err error) error { return usageOf(c, err) })
	if check := c.Args; check != nil {
		c.Args = func(c *cobra.Command, args []string) error {
			if err := check(c, args); err != nil {
				return usageOf(c, err)
			}
			return nil
		}
	}
	c.PreRunE = func(c *cobra.Command, _ []string) error {
		if err := c.ValidateRequiredFlags(); err != nil {
			return usageOf(c, err)
		}
		return nil
	}
	c.SuggestionsMinimumDistance = 2
	if c.HasSubCommands() && !c.Runnable() {
		c.Args = cobra.ArbitraryArgs
		c.RunE = func(c *cobra.Command, args []string) error {
			if len(args) > 0 {
				why := fmt.Errorf("%q is no command of %q", args[0], c.CommandPath())
				if near := c.SuggestionsFor(args[0]); len(near) > 0 {
					why = fmt.Errorf("%w, did you mean %q", why, near[0])
				}
				return usageOf(c, why)
			}
			c.SetOut(c.ErrOrStderr())
			if err := c.Help(); err != nil {
				return err
			}
			return &silent{ExitUsage}
		}
	}
	for _, sub := range c.Commands() {
		strict(sub)
	}
}

func usageOf(c *cobra.Command, err error) error {
	f := &Failure{Exit: ExitUsage, Why: err.Error(), Remedy: "see " + c.CommandPath() + " --help", Err: err}
	if h, ok := errors.AsType[remedied](err); ok {
		f.Remedy = h.Remedy()
	}
	return f
}

func (e *env) check() error {
	if e.output != outputTable && !e.json() {
		return usage("output format %q is neither table nor json nor yaml", e.output)
	}
	if e.timeout <= 0 {
		return usage("--timeout %s is not above zero", e.timeout)
	}
	return nil
}

// show writes v as JSON, or has table write it for people.
func (e *env) show(v any, table func(io.Writer) error) error {
	switch e.output {
	case outputJSON:
		return printJSON(e.std.Out, v)
	case outputYAML:
		return printYAML(e.std.Out, v)
	}
	return table(e.std.Out)
}

// confirmed refuses what cannot be undone unless the object was named twice.
func confirmed(what, name, confirm string) error {
	if confirm == name {
		return nil
	}
	why := "this cannot be undone"
	if confirm != "" {
		why = fmt.Sprintf("--confirm says %q", confirm)
	}
	return &Failure{Exit: ExitUsage, What: what, Object: name, Why: why, Remedy: "repeat with --confirm " + name}
}

// exactly is cobra.ExactArgs with the arguments' names in the message.
func exactly(names ...string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) < len(names) {
			return fmt.Errorf("%s is missing", strings.Join(names[len(args):], " "))
		}
		if len(args) > len(names) {
			return fmt.Errorf("%q is too much, the arguments are: %s", args[len(names)], strings.Join(names, " "))
		}
		if i := slices.Index(args, ""); i >= 0 {
			return fmt.Errorf("%s is empty", names[i])
		}
		return nil
	}
}

func (e *env) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version of this binary", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			v := struct {
				Version string `json:"version"`
			}{e.std.Version}
			return e.show(v, func(w io.Writer) error {
				_, err := fmt.Fprintln(w, "varve", v.Version)
				return err
			})
		},
	}
}
