package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	v1 "varve/control/api/customer"
	"varve/control/bytesize"
)

const certificateBytesMax = 16 << 10

// pemFile reads a certificate or key that is named by a flag; "" is none.
func pemFile(name string) (string, error) {
	if name == "" {
		return "", nil
	}
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, certificateBytesMax+1))
	if err == nil && len(b) > certificateBytesMax {
		err = errors.New("is longer than a certificate is")
	}
	if err != nil {
		return "", fmt.Errorf("read %s: %w", name, err)
	}
	return string(b), nil
}

// machineSnapshot takes NAME@SNAPSHOT apart.
func machineSnapshot(more ...string) func([]string) []string {
	return func(args []string) []string {
		i := strings.LastIndexByte(args[0], '@')
		if i < 0 {
			return append([]string{"vmachines", args[0]}, more...)
		}
		return append([]string{"vmachines", args[0][:i], "snapshots", args[0][i+1:]}, more...)
	}
}

func snapshotOnly(args []string) string { return args[0][strings.LastIndexByte(args[0], '@')+1:] }

// machineOf is NAME of NAME@SNAPSHOT.
func machineOf(arg string) (name, snapshot string) {
	if i := strings.LastIndexByte(arg, '@'); i >= 0 {
		return arg[:i], arg[i+1:]
	}
	return arg, ""
}

func machinePath(more ...string) func([]string) []string {
	return func(args []string) []string {
		name, _ := machineOf(args[0])
		return append([]string{"vmachines", name}, more...)
	}
}

// machineCommands are VMs, hypervisors and mounts.
func (e *env) machineCommands() []*cobra.Command {
	return []*cobra.Command{e.vmachineCommand(), e.pmachineCommand(), e.mountCommand()}
}

func (e *env) vmachineCommand() *cobra.Command {
	var snap v1.VMachineSnapshotCreate
	var force, purge, off bool
	var keep time.Duration
	query := func() map[string]string {
		q := map[string]string{}
		if force {
			q["force"] = "true"
		}
		if purge {
			q["purge"] = "true"
		}
		if keep > 0 {
			q["keep"] = strconv.FormatInt(int64(keep/time.Second), 10)
		}
		return q
	}
	forceFlag := func(s *pflag.FlagSet) { s.BoolVar(&force, "force", false, "also while it runs") }
	return group("vmachine", "VMs whose disks lie on vPools; NAME is a name, an id, or VPOOL/PATH of the describing file",
		e.listing(listing{use: "list", short: "List the VMs", path: fixed("vmachines"),
			columns: []string{"name", "power", "host", "config", "size:bytes", "used:bytes", "clients", "template", "problem"}}),
		e.verb(verb{use: "show NAME", short: "Show one VM and its disks", args: []string{"NAME"}, method: http.MethodGet, path: machinePath(), table: printVMachine}),
		e.listing(listing{use: "snapshots NAME", short: "List the snapshots of a VM", args: []string{"NAME"}, path: machinePath("snapshots"),
			columns: []string{"name", "created:time", "disks", "of", "complete", "consistent", "automatic", "sticky", "backed", "clones", "id"}}),
		e.verb(verb{use: "snapshot NAME [--name SNAPSHOT]", short: "Take a snapshot of all disks of a VM at one point in time", args: []string{"NAME"}, method: http.MethodPost,
			path: machinePath("snapshots"), body: func([]string) (any, error) { return snap, nil }, flags: func(s *pflag.FlagSet) {
				s.StringVar(&snap.Name, "name", "", "`SNAPSHOT` (default: the time)")
				s.BoolVar(&snap.Consistent, "consistent", false, "the guest's file systems are quiet")
				s.BoolVar(&snap.Sticky, "keep", false, "retention leaves it alone")
				s.BoolVar(&snap.Partial, "partial", false, "also if some disks of the VM are on no vPool")
				s.StringToStringVar(&snap.Labels, "label", nil, "`KEY=VALUE`; repeatable")
			}}),
		e.verb(verb{use: "delete-snapshot NAME@SNAPSHOT --confirm SNAPSHOT", short: "Delete a snapshot of a VM", args: []string{"NAME@SNAPSHOT"}, method: http.MethodDelete,
			path: machineSnapshot(), confirm: snapshotOnly, query: query, flags: func(s *pflag.FlagSet) { s.BoolVar(&force, "force", false, "also if it is kept") }}),
		e.verb(verb{use: "rollback NAME@SNAPSHOT --confirm NAME", short: "Make all disks of a VM what they were at a snapshot", args: []string{"NAME@SNAPSHOT"},
			method: http.MethodPost, path: machinePath("rollback"), task: true, confirm: func(args []string) string { name, _ := machineOf(args[0]); return name },
			body: func(args []string) (any, error) {
				_, snapshot := machineOf(args[0])
				if snapshot == "" {
					return nil, errors.New("give NAME@SNAPSHOT")
				}
				return v1.Rollback{Snapshot: snapshot, Force: force}, nil
			}, flags: forceFlag}),
		e.cloneVMachine(),
		e.verb(verb{use: "template NAME", short: "Make a VM a template, whose disks take no writes, or with --off a VM like any other again", args: []string{"NAME"},
			method: http.MethodPut, path: machinePath("template"), table: printVMachine,
			body:  func([]string) (any, error) { return v1.TemplateState{Template: !off, Force: force}, nil },
			flags: func(s *pflag.FlagSet) { forceFlag(s); s.BoolVar(&off, "off", false, "let its disks take writes again") }}),
		e.verb(verb{use: "delete NAME --confirm NAME", short: "Delete a VM: its disks and the files that describe it into the trash", args: []string{"NAME"},
			method: http.MethodDelete, path: machinePath(), task: true, confirm: firstArg, query: query, flags: func(s *pflag.FlagSet) {
				forceFlag(s)
				s.BoolVar(&purge, "purge", false, "its disks at once and for good")
				s.DurationVar(&keep, "keep", 0, "how long they stay in the trash (default 7 days)")
			}}))
}

// cloneVMachine takes one or more new names.
func (e *env) cloneVMachine() *cobra.Command {
	var names []string
	return e.verb(verb{use: "clone NAME[@SNAPSHOT] --to NEW …", short: "Make VMs of a VM, a snapshot of one, or a template, without copying", args: []string{"NAME[@SNAPSHOT]"},
		long:   "Each new VM gets a directory of its name with clones of the disks and a describing file; register that on the hypervisor.",
		method: http.MethodPost, path: machinePath("clones"), task: true, body: func(args []string) (any, error) {
			_, snapshot := machineOf(args[0])
			if len(names) == 0 {
				return nil, errors.New("name the new VMs with --to")
			}
			return v1.VMachineClone{Names: names, Snapshot: snapshot}, nil
		}, flags: func(s *pflag.FlagSet) { s.StringSliceVar(&names, "to", nil, "`NEW` VM; repeatable") }})
}

func printVMachine(w io.Writer, raw json.RawMessage) error {
	var m v1.VMachine
	if err := json.Unmarshal(raw, &m); err != nil {
		return err
	}
	fields := [][2]string{{"Name", m.Name}, {"ID", m.ID.String()}, {"Config", dash(m.Config)}, {"Guest", dash(m.Guest)},
		{"CPUs, memory", fmt.Sprintf("%d, %s", m.VCPUs, bytesize.Format(int64(m.Memory)))}, {"Power", m.Power}, {"Hypervisor", dash(strings.TrimSpace(m.PMachine + " " + m.Host))},
		{"Template", cell(m.Template, "")}, {"Open by", strconv.Itoa(m.Clients) + " clients"}}
	for _, d := range m.Disks {
		where := "on no vPool: " + d.File
		if d.VDisk != "" {
			where = fmt.Sprintf("%s, %s, %s used", d.VDisk, bytesize.Format(int64(d.Size)), bytesize.Format(int64(d.Used)))
		}
		fields = append(fields, [2]string{"Disk " + d.Label, where})
	}
	if m.Problem != "" {
		fields = append(fields, [2]string{"Problem", m.Problem})
	}
	return printFields(w, fields)
}

func (e *env) pmachineCommand() *cobra.Command {
	var in v1.PMachineCreate
	var ca, certificate, key string
	var password bool
	var set *pflag.FlagSet
	files := func() (caText, certText, keyText string, err error) {
		if caText, err = pemFile(ca); err != nil {
			return
		}
		if certText, err = pemFile(certificate); err != nil {
			return
		}
		keyText, err = pemFile(key)
		return
	}
	flags := func(s *pflag.FlagSet) {
		s.StringVar(&in.Address, "address", "", "`URL`: https://HOST of a vCenter or ESXi; qemu+tls://HOST/system, qemu+tcp://HOST/system, "+
			"qemu+unix:///system?socket=/run/libvirt/libvirt-sock")
		s.StringVar(&in.User, "user", "", "`USER` there")
		s.StringVar(&in.Thumbprint, "thumbprint", "", "`SHA256` of the certificate to trust")
		s.StringVar(&ca, "ca-file", "", "`FILE` with who signs its certificate")
		s.StringVar(&certificate, "cert-file", "", "`FILE` with the client certificate for qemu+tls")
		s.StringVar(&key, "key-file", "", "`FILE` with its key")
		s.BoolVar(&in.Insecure, "insecure", false, "take qemu+tcp, which neither encrypts nor asks who calls")
	}
	return group("pmachine", "Hypervisors: vSphere and libvirt",
		e.listing(listing{use: "list", short: "List the hypervisors", path: fixed("pmachines"), columns: []string{"name", "kind", "address", "state", "vmachines", "version", "error"}}),
		e.verb(verb{use: "show NAME", short: "Show a hypervisor, its hosts and what they have mounted", args: []string{"NAME"}, method: http.MethodGet, path: at("pmachines", "$"),
			table: printPMachine}),
		e.verb(verb{use: "add NAME --kind vsphere|libvirt --address URL", short: "Add a hypervisor; it is asked first", args: []string{"NAME"}, method: http.MethodPost, path: at("pmachines"),
			long: "Add a hypervisor. The password, if --user is given, is asked for on a terminal, else it is the first line of standard input.",
			body: func(args []string) (any, error) {
				var err error
				in.Name = args[0]
				if in.CA, in.Certificate, in.Key, err = files(); err != nil {
					return nil, err
				}
				if in.User != "" {
					in.Password, err = e.secretLine("Password of " + in.User)
				}
				return in, err
			}, flags: func(s *pflag.FlagSet) {
				flags(s)
				s.StringVar(&in.Kind, "kind", "vsphere", "`KIND`: vsphere or libvirt")
			}, table: printPMachine}),
		e.verb(verb{use: "set NAME", short: "Change how a hypervisor is reached; it is asked first", args: []string{"NAME"}, method: http.MethodPatch, path: at("pmachines", "$"),
			body: func(args []string) (any, error) {
				caText, certText, keyText, err := files()
				if err != nil {
					return nil, err
				}
				out := v1.PMachinePatch{Address: in.Address, Insecure: in.Insecure}
				for _, f := range []struct {
					flag string
					to   **string
					from string
				}{{"user", &out.User, in.User}, {"thumbprint", &out.Thumbprint, in.Thumbprint}, {"ca-file", &out.CA, caText},
					{"cert-file", &out.Certificate, certText}, {"key-file", &out.Key, keyText}} {
					if set.Changed(f.flag) {
						*f.to = &f.from
					}
				}
				if password {
					p, err := e.secretLine("New password for " + args[0])
					if err != nil {
						return nil, err
					}
					out.Password = &p
				}
				return out, nil
			}, flags: func(s *pflag.FlagSet) {
				set = s
				flags(s)
				s.BoolVar(&password, "password", false, "give a password, asked for or from standard input")
			}, table: printPMachine}),
		e.verb(verb{use: "test NAME", short: "Ask a hypervisor now", args: []string{"NAME"}, method: http.MethodPost, path: at("pmachines", "$", "test"), table: printPMachine}),
		e.verb(verb{use: "remove NAME --confirm NAME", short: "Forget a hypervisor and its credentials; nothing on it changes", args: []string{"NAME"}, method: http.MethodDelete,
			path: at("pmachines", "$"), confirm: firstArg}))
}

func printPMachine(w io.Writer, raw json.RawMessage) error {
	var p v1.PMachine
	if err := json.Unmarshal(raw, &p); err != nil {
		return err
	}
	fields := [][2]string{{"Name", p.Name}, {"Kind", p.Kind}, {"Address", p.Address}, {"User", dash(p.User)}, {"State", p.State}}
	if p.Error != "" {
		fields = append(fields, [2]string{"Error", p.Error})
	}
	fields = append(fields, [2]string{"Version", dash(p.Version)}, [2]string{"VMs on vPools", strconv.Itoa(p.VMachines)})
	if p.Checked != nil {
		fields = append(fields, [2]string{"Asked", formatTime(*p.Checked)})
	}
	for _, h := range p.Hosts {
		fields = append(fields, [2]string{"Host " + h.Name, strings.TrimSpace(h.State + ", " + strconv.Itoa(h.Mounted) + " vPools mounted")})
	}
	for _, m := range p.Mounts {
		text := fmt.Sprintf("%s has %s:%s as %s", m.Host, m.Server, m.Export, m.Datastore)
		if m.Warning != "" {
			text += "; " + m.Warning
		}
		fields = append(fields, [2]string{"vPool " + m.VPool, text})
	}
	return printFields(w, fields)
}

func (e *env) mountCommand() *cobra.Command {
	var target, address, datastore, pmachine, host string
	var hosts []string
	var script bool
	var wait time.Duration
	mounts := func([]string) []string { return []string{"pmachines", pmachine, "mounts"} }
	pmachineFlag := func(s *pflag.FlagSet) { s.StringVar(&pmachine, "pmachine", "", "`NAME` of the hypervisor") }
	return group("mount", "How hypervisors mount a vPool",
		e.verb(verb{use: "command VPOOL --for esxi|vcenter|pve|libvirt|xcp|qemu|linux|k8s", short: "Print what to paste where", args: []string{"VPOOL"}, method: http.MethodGet,
			path: at("vpools", "$", "mount"), query: func() map[string]string { return map[string]string{"for": target, "address": address} },
			table: func(w io.Writer, raw json.RawMessage) error { return printMountHelp(w, raw, script) }, flags: func(s *pflag.FlagSet) {
				s.StringVar(&target, "for", "linux", "`HYPERVISOR`: esxi, vcenter, pve, libvirt, xcp, qemu, linux or k8s")
				s.StringVar(&address, "address", "", "`ADDRESS` of the appliance as the hypervisor reaches it")
				s.BoolVar(&script, "script", false, "print the commands alone, as a script")
			}, complete: e.completeVPools}),
		e.verb(verb{use: "test VPOOL [--host ADDRESS]", short: "Prove from both ends that a vPool can be mounted and written", args: []string{"VPOOL"}, method: http.MethodPost,
			path: at("vpools", "$", "mount-test"), long: "The appliance mounts the vPool itself as a hypervisor does, writes, reads back and cleans up.\n" +
				"With --host it then waits until that host has mounted and written: write a file on the datastore meanwhile.",
			body: func([]string) (any, error) {
				return v1.MountTestRequest{Host: host, Seconds: int(wait / time.Second)}, nil
			},
			flags: func(s *pflag.FlagSet) {
				s.StringVar(&host, "host", "", "IP `ADDRESS` of the host, as it comes from there")
				s.DurationVar(&wait, "wait", 60*time.Second, "how long to wait for the host")
			}, table: printMountTest, failed: mountTestFailed, complete: e.completeVPools}),
		e.verb(verb{use: "apply VPOOL --pmachine NAME", short: "Have the hosts of a hypervisor mount a vPool", args: []string{"VPOOL"}, method: http.MethodPost, path: mounts,
			body: func(args []string) (any, error) {
				if pmachine == "" {
					return nil, errors.New("name the hypervisor with --pmachine")
				}
				return v1.PMachineMountRequest{VPool: args[0], Hosts: hosts, Address: address, Datastore: datastore}, nil
			}, flags: func(s *pflag.FlagSet) {
				pmachineFlag(s)
				s.StringSliceVar(&hosts, "host", nil, "`HOST` as the hypervisor calls it; repeatable (default: all)")
				s.StringVar(&address, "address", "", "`ADDRESS` of the appliance as the hosts reach it")
				s.StringVar(&datastore, "datastore", "", "`NAME` it gets there (default: the vPool's)")
			}, table: func(w io.Writer, raw json.RawMessage) error {
				var r v1.PMachineMountResult
				if err := json.Unmarshal(raw, &r); err != nil {
					return err
				}
				var rows [][]string
				for _, h := range r.Hosts {
					rows = append(rows, []string{h.Host, h.Done, dash(h.Error)})
				}
				return printTable(w, []string{"host", "done", "error"}, rows)
			}, complete: e.completeVPools}),
		e.verb(verb{use: "remove VPOOL --pmachine NAME --confirm VPOOL", short: "Have the hosts of a hypervisor unmount a vPool", args: []string{"VPOOL"}, method: http.MethodDelete,
			path: func(args []string) []string { return append(mounts(nil), args[0]) }, confirm: firstArg, flags: pmachineFlag, done: "unmounted", complete: e.completeVPools}))
}

func printMountHelp(w io.Writer, raw json.RawMessage, script bool) error {
	var h v1.MountHelp
	if err := json.Unmarshal(raw, &h); err != nil {
		return err
	}
	if script {
		_, err := io.WriteString(w, h.Script)
		return err
	}
	var b strings.Builder
	for _, p := range h.Problems {
		fmt.Fprintf(&b, "! %s\n", p)
	}
	if len(h.Problems) > 0 {
		b.WriteString("\n")
	}
	for _, s := range h.Steps {
		fmt.Fprintf(&b, "%s", s.Title)
		if s.Where != "" {
			fmt.Fprintf(&b, " (%s)", s.Where)
		}
		b.WriteString("\n\n")
		for line := range strings.Lines(s.Command) {
			b.WriteString("    " + strings.TrimSuffix(line, "\n") + "\n")
		}
		b.WriteString("\n")
	}
	for _, n := range h.Notes {
		fmt.Fprintf(&b, "- %s\n", n)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func printMountTest(w io.Writer, raw json.RawMessage) error {
	var r v1.MountTest
	if err := json.Unmarshal(raw, &r); err != nil {
		return err
	}
	var rows [][]string
	for _, c := range r.Checks {
		verdict := "ok"
		if !c.OK {
			verdict = "FAILED"
		}
		rows = append(rows, []string{verdict, c.Name, c.Detail, strconv.FormatFloat(float64(c.MS), 'f', 1, 32) + " ms", dash(c.Remedy)})
	}
	return printTable(w, []string{"", "check", "found", "took", "remedy"}, rows)
}

func mountTestFailed(raw json.RawMessage) bool {
	var r v1.MountTest
	return json.Unmarshal(raw, &r) == nil && !r.OK
}
