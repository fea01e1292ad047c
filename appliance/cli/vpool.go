package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	v1 "varve/control/api/customer"
)

func (e *env) vpoolCommand() *cobra.Command {
	c := &cobra.Command{Use: "vpool", Short: "Storage pools, each exported as one datastore"}
	c.AddCommand(e.vpoolCreate(), e.vpoolList(), e.vpoolShow(), e.vpoolSet(), e.vpoolSetCredentials(), e.vpoolRotateKeys(), e.vpoolVerify(), e.capacityCommand(), e.vpoolDelete())
	return c
}

func (e *env) vpoolCreate() *cobra.Command {
	var spec v1.VPoolCreate
	var bucket s3Flags
	c := &cobra.Command{
		Use: "create NAME --backend local:///DIR|s3://BUCKET/PREFIX?endpoint=URL", Short: "Make a vPool on a backend", Args: exactly("NAME"),
		Long: `Make a vPool. Its backend is probed first: what was found is printed.

  varve vpool create fast --backend local:///srv/fast --client 10.0.0.0/8
  varve vpool create cloud --backend 's3://bucket/prefix?endpoint=https://s3.example.com&region=eu-west-1'

A bucket is named ` + s3Help,
		RunE: func(cmd *cobra.Command, args []string) error {
			spec.Name = args[0]
			if err := e.fillBucket(&spec, bucket); err != nil {
				return err
			}
			return e.call("create vpool", spec.Name, func(s *session) error {
				p, err := s.CreateVPool(s.ctx(cmd), spec)
				if err != nil {
					return err
				}
				return e.show(p, func(w io.Writer) error { return printVPool(w, p) })
			})
		},
	}
	c.Flags().StringVar(&spec.Backend, "backend", "", "where the objects are kept: local:///absolute/directory, or s3://bucket/prefix?endpoint=…&region=…")
	bucket.add(c.Flags())
	c.Flags().StringSliceVar(&spec.Clients, "client", nil, "`NETWORK` that may mount it, as 10.0.0.0/8; repeatable (default: private networks)")
	c.Flags().StringVar(&spec.Compression, "compression", "", "`CODEC` of what is stored: none, s2 or zstd (default: none on a directory, s2 in a bucket)")
	c.Flags().BoolVar(&spec.Encrypt, "encrypt", false, "give each vDisk a key of its own, and encrypt objects and log with it")
	must(c.MarkFlagRequired("backend"))
	return c
}

func (e *env) vpoolRotateKeys() *cobra.Command {
	return e.verb(verb{use: "rotate-keys NAME", short: "Give an encrypted vPool and its vDisks new keys", args: []string{"NAME"},
		long: `Give an encrypted vPool a new key encryption key, and each of its vDisks a new key for what is written from now on. What was written before
stays under the former keys of the vDisks, which the new key wraps, until the scrub moves it.`,
		method: http.MethodPost, path: at("vpools", "$", "keys"), task: true})
}

func (e *env) vpoolVerify() *cobra.Command {
	return e.verb(verb{use: "verify NAME", short: "Read all that a vPool stores now and compare its checksums", args: []string{"NAME"},
		long: `Read all that a vPool stores now and compare its checksums, without waiting for its turn in the policy's days. The task's result names
what cannot be read back.`, method: http.MethodPost, path: at("vpools", "$", "verify"), task: true})
}

func (e *env) vpoolList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the vPools", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return e.call("list vpools", "", func(s *session) error {
				pools, err := s.VPools(s.ctx(cmd))
				if err != nil {
					return err
				}
				return e.show(notNil(pools), func(w io.Writer) error {
					var rows [][]string
					for _, p := range pools {
						rows = append(rows, []string{p.Name, p.Backend, p.Class, fmt.Sprint(p.VDisks), fmt.Sprint(p.Files),
							size(p.Free), size(p.Total), "/" + p.Name})
					}
					return printTable(w, []string{"Name", "Backend", "Class", "vDisks", "Files", "Free", "Total", "NFS export"}, rows)
				})
			})
		},
	}
}

func (e *env) vpoolShow() *cobra.Command {
	return &cobra.Command{
		Use: "show NAME", Short: "Show one vPool", Args: exactly("NAME"), ValidArgsFunction: e.completeVPools,
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.call("show vpool", args[0], func(s *session) error {
				p, err := s.VPool(s.ctx(cmd), args[0])
				if err != nil {
					return err
				}
				return e.show(p, func(w io.Writer) error { return printVPool(w, p) })
			})
		},
	}
}

func (e *env) vpoolSet() *cobra.Command {
	var clients []string
	return e.verb(verb{use: "set NAME --client NETWORK", short: "Change who may use a vPool", args: []string{"NAME"}, method: http.MethodPatch, path: at("vpools", "$"),
		complete: e.completeVPools, body: func([]string) (any, error) { return v1.VPoolPatch{Clients: notNil(clients)}, nil },
		flags: func(s *pflag.FlagSet) {
			s.StringSliceVar(&clients, "client", nil, "`NETWORK` that may use it, as 10.0.0.0/8; repeatable; none: nobody")
		}, table: func(w io.Writer, raw json.RawMessage) error {
			var p v1.VPool
			if err := json.Unmarshal(raw, &p); err != nil {
				return err
			}
			return printVPool(w, p)
		}})
}

func (e *env) vpoolDelete() *cobra.Command {
	var confirm string
	c := &cobra.Command{
		Use: "delete NAME --confirm NAME", Aliases: []string{"rm"}, Short: "Delete an empty vPool", Args: exactly("NAME"),
		Long:              "Delete a vPool that holds no files. Its backend's directory is left where it is.",
		ValidArgsFunction: e.completeVPools,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := confirmed("delete vpool", args[0], confirm); err != nil {
				return err
			}
			return e.call("delete vpool", args[0], func(s *session) error { return s.DeleteVPool(s.ctx(cmd), args[0]) })
		},
	}
	c.Flags().StringVar(&confirm, "confirm", "", "the vPool's `NAME` once more")
	return c
}

func printVPool(w io.Writer, p v1.VPool) error {
	fields := [][2]string{
		{"Name", p.Name}, {"ID", p.ID.String()}, {"Backend", p.Backend}, {"NFS export", "/" + p.Name},
		{"NFS clients", strings.Join(p.Clients, ", ")}, {"Durability", p.Class}, {"vDisks", fmt.Sprint(p.VDisks)},
		{"Files", fmt.Sprint(p.Files)}, {"Being deleted", fmt.Sprint(p.Deleting)}, {"Free", size(p.Free)}, {"Total", size(p.Total)},
		{"Created", formatTime(p.Created)},
	}
	for _, k := range sortedKeys(p.Findings) {
		fields = append(fields, [2]string{"Probe: " + k, p.Findings[k]})
	}
	return printFields(w, fields)
}
