package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"varve/appliance/doctor"
	"varve/appliance/server"
	"varve/control/api/client"
	v1 "varve/control/api/customer"
	"varve/control/vpool"
)

// report of the doctor command.
type doctorReport struct {
	Status doctor.Status   `json:"status"` // the worst of all
	Checks []doctor.Result `json:"checks"`
}

func (e *env) doctorCommand() *cobra.Command {
	var codes bool
	c := &cobra.Command{
		Use: "doctor", Short: "Probe whether this machine is fit, and whether the appliance serves", Args: cobra.NoArgs,
		Long: `Probe the disk under --data DIR (flushes, speed, space, backend behaviour), the machine (clock, limits, memory) and, if an appliance
runs on DIR, that every export opens and reads, as a hypervisor would mount it. Works before the first start, too.
Every check has a code that never changes; --codes lists them with what helps. varve health tells what the running nodes have checked.
Exit code 1 if a check fails; warnings do not change it.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if codes {
				return e.show(doctor.Codes(), printCodes)
			}
			if e.at != "" {
				return usage("doctor probes this machine: run it on the appliance with --data DIR")
			}
			if e.data == "" {
				return usage("no directory is named: give --data DIR")
			}
			checks := slices.Concat(doctor.Disk(e.data, server.OpenLocalBackend), doctor.Host(), doctor.Layouts(e.layout()))
			running, err := e.runningChecks(cmd)
			if err != nil {
				return err
			}
			r := doctorReport{Status: doctor.OK, Checks: doctor.Run(cmd.Context(), append(checks, running...))}
			for _, c := range r.Checks {
				if c.Status == doctor.Fail || c.Status == doctor.Warn && r.Status == doctor.OK {
					r.Status = c.Status
				}
			}
			if err := e.show(r, func(w io.Writer) error { return printChecks(w, r.Checks) }); err != nil {
				return err
			}
			if cmd.Context().Err() != nil {
				return e.failure("doctor", "", cmd.Context().Err())
			}
			if doctor.Failed(r.Checks) {
				return &silent{ExitFailed}
			}
			return nil
		},
	}
	c.Flags().BoolVar(&codes, "codes", false, "list the codes of all checks, and check nothing")
	return c
}

func printChecks(w io.Writer, checks []doctor.Result) error {
	var rows [][]string
	for _, c := range checks {
		rows = append(rows, []string{c.ID, strings.ToUpper(string(c.Status)), c.Evidence})
		if c.Remedy != "" {
			rows = append(rows, []string{"", "", "-> " + c.Remedy})
		}
	}
	return printTable(w, []string{"Check", "Status", "Found"}, rows)
}

// runningChecks asks the appliance on --data what it serves; if none answers there is nothing to check.
func (e *env) runningChecks(cmd *cobra.Command) ([]doctor.Check, error) {
	s, err := e.session()
	if err != nil {
		return nil, err
	}
	defer s.Close()
	ctx, cancel := context.WithTimeout(cmd.Context(), 10*time.Second)
	defer cancel()
	st, err := s.Status(ctx)
	if errors.Is(err, client.ErrUnreachable) {
		return doctor.NotRunning("no appliance answers on " + e.data), nil
	}
	if err != nil {
		return nil, e.failure("status", "", err)
	}
	pools, err := s.VPools(ctx)
	if err != nil {
		return nil, e.failure("list vpools", "", err)
	}
	d := doctor.Server{Evidence: fmt.Sprintf("%s, up since %s", st.State, st.Started.Format(time.RFC3339)), State: strings.Join(st.Problems, "; ")}
	if d.NBD, err = s.nbdTarget(ctx); err != nil {
		return nil, e.failure("find NBD", "", err)
	}
	d.NFS, d.Portmap = serviceAddress(st, "nfs"), serviceAddress(st, "portmap")
	checks := []doctor.Check{}
	for _, p := range pools {
		d.Exports = append(d.Exports, "/"+p.Name)
		checks = append(checks, vpoolCheck(p))
	}
	return append(doctor.Running(d), checks...), nil
}

// vpoolCheck tells what the last probe of a vPool's backend found.
func vpoolCheck(p v1.VPool) doctor.Check {
	found := doctor.Finding{Status: doctor.OK, Evidence: p.Name + " on " + p.Backend}
	for _, k := range sortedKeys(p.Findings) {
		found.Evidence += "; " + k + ": " + p.Findings[k]
	}
	if p.Findings[vpool.NotSafe] != "" {
		found.Status, found.Remedy = doctor.Warn, "move the vPool's vDisks to a store that honours If-None-Match"
	}
	return doctor.Check{ID: "backend.vpool", Title: "what the probe of the vPool's backend found", Limit: time.Second,
		Probe: func(context.Context) doctor.Finding { return found }}
}

// serviceAddress is where this host reaches a service, "" if it is not served.
func serviceAddress(st v1.Status, name string) string {
	for _, v := range st.Services {
		if v.Name != name {
			continue
		}
		host, port, err := net.SplitHostPort(v.Address)
		if err != nil {
			return v.Address
		}
		if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
			host = "127.0.0.1"
		}
		return net.JoinHostPort(host, port)
	}
	return ""
}
