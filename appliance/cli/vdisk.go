package cli

import (
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"varve/control/api/client"
	v1 "varve/control/api/customer"
	"varve/control/bytesize"
)

func (e *env) vdiskCommand() *cobra.Command {
	c := &cobra.Command{
		Use: "vdisk", Short: "Virtual disks",
		Long: `Virtual disks. A vDisk is named VPOOL/PATH, such as default/disk1 or default/vms/web/root. It is the file PATH.raw of the NFS
export /VPOOL and the NBD export VPOOL/PATH.`,
	}
	c.AddCommand(e.vdiskCreate(), e.vdiskList(), e.vdiskShow(), e.vdiskResize(), e.vdiskRename(), e.vdiskDelete(), e.protectionCommand(),
		e.importCommand(), e.exportCommand(), e.explainCommand())
	c.AddCommand(e.vdiskVerbs()...)
	return c
}

func (e *env) vdiskCreate() *cobra.Command {
	var text string
	c := &cobra.Command{
		Use: "create VPOOL/NAME --size SIZE", Short: "Make a sparse vDisk", Args: exactly("VPOOL/NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			n, err := bytesize.Parse(text)
			if err != nil {
				return usageOf(cmd, err)
			}
			return e.call("create vdisk", args[0], func(s *session) error {
				d, err := s.CreateVDisk(s.ctx(cmd), args[0], n)
				if err != nil {
					return err
				}
				return e.show(d, func(w io.Writer) error { return printVDisk(w, d) })
			})
		},
	}
	c.Flags().StringVar(&text, "size", "", "`SIZE` in bytes or with KiB, MiB, GiB, TiB: 10GiB")
	must(c.MarkFlagRequired("size"))
	return c
}

func (e *env) vdiskList() *cobra.Command {
	var sel client.Select
	c := &cobra.Command{
		Use: "list [VPOOL]", Aliases: []string{"ls"}, Short: "List the vDisks, of one vPool or of all", Args: cobra.MaximumNArgs(1),
		ValidArgsFunction: e.completeVPools,
		RunE: func(cmd *cobra.Command, args []string) error {
			pool := ""
			if len(args) > 0 {
				pool = args[0]
			}
			return e.call("list vdisks", pool, func(s *session) error {
				disks, err := s.VDisks(s.ctx(cmd), pool, sel)
				if err != nil {
					return err
				}
				return e.show(notNil(disks), func(w io.Writer) error {
					var rows [][]string
					for _, d := range disks {
						rows = append(rows, []string{d.Name, size(d.Size), size(d.Used), size(d.Pending), fmt.Sprint(d.Clients), d.State,
							formatTime(d.Modified)})
					}
					return printTable(w, []string{"Name", "Size", "Used", "Pending", "Clients", "State", "Modified"}, rows)
				})
			})
		},
	}
	c.Flags().StringVar(&sel.Filter, "filter", "", `only those that `+"`MATCH`"+`, such as 'size>10GiB and name~"db"'`)
	c.Flags().StringVar(&sel.Sort, "sort", "", "by these `FIELDS`, - for descending: -size,name")
	return c
}

func (e *env) vdiskShow() *cobra.Command {
	return &cobra.Command{
		Use: "show VPOOL/NAME", Short: "Show one vDisk", Args: exactly("VPOOL/NAME"), ValidArgsFunction: e.completeVDisks,
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.call("show vdisk", args[0], func(s *session) error {
				d, err := s.VDisk(s.ctx(cmd), args[0])
				if err != nil {
					return err
				}
				return e.show(d, func(w io.Writer) error { return printVDisk(w, d) })
			})
		},
	}
}

func (e *env) vdiskResize() *cobra.Command {
	var text string
	var shrink bool
	c := &cobra.Command{
		Use: "resize VPOOL/NAME --size SIZE", Short: "Change a vDisk's size", Args: exactly("VPOOL/NAME"),
		Long: `Change a vDisk's size. Clients over NFS see it at once, clients over NBD when they attach again.
A smaller size discards what lies beyond it and needs --shrink.`,
		ValidArgsFunction: e.completeVDisks,
		RunE: func(cmd *cobra.Command, args []string) error {
			n, err := bytesize.Parse(text)
			if err != nil {
				return usageOf(cmd, err)
			}
			return e.call("resize vdisk", args[0], func(s *session) error {
				d, err := s.ResizeVDisk(s.ctx(cmd), args[0], n, shrink)
				if err != nil {
					return err
				}
				return e.show(d, func(w io.Writer) error { return printVDisk(w, d) })
			})
		},
	}
	c.Flags().StringVar(&text, "size", "", "new `SIZE`")
	c.Flags().BoolVar(&shrink, "shrink", false, "allow a smaller size, which discards data")
	must(c.MarkFlagRequired("size"))
	return c
}

func (e *env) vdiskRename() *cobra.Command {
	return &cobra.Command{
		Use: "rename VPOOL/NAME VPOOL/NEWNAME", Aliases: []string{"mv"}, Short: "Rename a vDisk inside its vPool",
		Args: exactly("VPOOL/NAME", "VPOOL/NEWNAME"), ValidArgsFunction: e.completeVDisks,
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.call("rename vdisk", args[0], func(s *session) error {
				d, err := s.RenameVDisk(s.ctx(cmd), args[0], args[1])
				if err != nil {
					return err
				}
				return e.show(d, func(w io.Writer) error { return printVDisk(w, d) })
			})
		},
	}
}

func (e *env) vdiskDelete() *cobra.Command {
	var force, purge bool
	var keep time.Duration
	c := e.verb(verb{use: "delete VPOOL/NAME --confirm VPOOL/NAME", short: "Delete a vDisk; the trash keeps it for a while",
		long: "Delete a vDisk. For 7 days, or as long as --keep says, varve vdisk trash restore brings it back; with --purge it is gone at once.",
		args: []string{"VPOOL/NAME"}, method: http.MethodDelete, path: diskPath(), confirm: firstArg, complete: e.completeVDisks,
		query: func() map[string]string {
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
		}, flags: func(s *pflag.FlagSet) {
			s.BoolVar(&force, "force", false, "delete it although clients have it open")
			s.BoolVar(&purge, "purge", false, "delete it for good")
			s.DurationVar(&keep, "keep", 0, "how long it can be had back (default 7 days)")
		}})
	c.Aliases = []string{"rm"}
	return c
}

func printVDisk(w io.Writer, d v1.VDisk) error {
	return printFields(w, [][2]string{
		{"Name", d.Name}, {"Volume", d.ID.String()}, {"NBD export", d.Name}, {"NFS file", d.File}, {"Size", size(d.Size)},
		{"Used", size(d.Used)}, {"Not on backend yet", size(d.Pending)}, {"State", d.State}, {"Durability", d.Class},
		{"Clients", fmt.Sprint(d.Clients)}, {"Epoch", fmt.Sprint(d.Epoch)}, {"Created", formatTime(d.Created)}, {"Modified", formatTime(d.Modified)},
	})
}

func (e *env) explainCommand() *cobra.Command {
	var lba, offset int64
	c := &cobra.Command{
		Use: "explain VPOOL/NAME --lba N", Short: "Say where one block of a vDisk is", Args: exactly("VPOOL/NAME"),
		Long: `Say where one 4 KiB block of a vDisk is: in the write log, in an object of the backend (which, and at which index), or nowhere
(a hole), with the sequence number of its write and its checksum.`,
		ValidArgsFunction: e.completeVDisks,
		RunE: func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().Changed("lba") == cmd.Flags().Changed("offset") {
				return usageOf(cmd, fmt.Errorf("give either --lba or --offset"))
			}
			at := offset
			if cmd.Flags().Changed("lba") {
				if lba < 0 || lba > 1<<50 {
					return usageOf(cmd, fmt.Errorf("--lba %d is out of range", lba))
				}
				at = lba * 4096
			}
			if at < 0 {
				return usageOf(cmd, fmt.Errorf("--offset %d is out of range", at))
			}
			return e.call("explain", args[0], func(s *session) error {
				x, err := s.Explain(s.ctx(cmd), args[0], at)
				if err != nil {
					return err
				}
				return e.show(x, func(w io.Writer) error {
					fields := [][2]string{{"vDisk", x.VDisk}, {"LBA", fmt.Sprint(x.LBA)}, {"Offset", fmt.Sprint(int64(x.Offset))}, {"State", x.State}}
					if x.Seq > 0 {
						fields = append(fields, [2]string{"Sequence", fmt.Sprint(x.Seq)})
					}
					if x.Object != "" {
						fields = append(fields, [2]string{"Object", x.Object}, [2]string{"Index", fmt.Sprint(x.Index)})
					}
					if x.CRC != "" {
						fields = append(fields, [2]string{"CRC32C", x.CRC})
					}
					if len(x.Copies) > 0 {
						fields = append(fields, [2]string{"Copies", strings.Join(x.Copies, ", ")})
					}
					if x.Detail != "" {
						fields = append(fields, [2]string{"Detail", x.Detail})
					}
					return printFields(w, fields)
				})
			})
		},
	}
	c.Flags().Int64Var(&lba, "lba", 0, "number of the 4 KiB block")
	c.Flags().Int64Var(&offset, "offset", 0, "offset in `BYTES`")
	return c
}
