package cli

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"varve/appliance/nbdclient"
	"varve/appliance/transfer"
	"varve/control/bytesize"
)

func (e *env) importCommand() *cobra.Command {
	var format string
	opt := transfer.ImportOptions{}
	c := &cobra.Command{
		Use: "import FILE|URI VPOOL/NAME", Short: "Make a vDisk from an image", Args: exactly("FILE|URI", "VPOOL/NAME"),
		Long: `Make a vDisk from a raw, qcow2, vmdk or vhdx image, or from another server's NBD export. Raw images and NBD are read by varve
itself and holes cost nothing; the other formats need qemu-img. If anything fails, no vDisk is left behind.

  varve vdisk import debian-12.qcow2 default/debian
  varve vdisk import nbd://oldhost/disk1 default/disk1
  varve vdisk import /dev/vg0/lv1 default/lv1 --format raw`,
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if opt.Format, err = transfer.ParseFormat(format); err != nil {
				return usageOf(cmd, err)
			}
			return e.call("import "+args[0]+" as", args[1], func(s *session) error {
				progress, stop := e.bar("import " + args[1])
				opt.Progress = progress
				made, err := transfer.Import(cmd.Context(), disks{s, cmd}, args[0], args[1], opt)
				stop(err)
				if err != nil {
					return err
				}
				d, err := s.VDisk(s.ctx(cmd), made.Name)
				if err != nil {
					return err
				}
				fmt.Fprintf(e.std.Err, "imported %s: %s, from %s\n", made.Name, bytesize.Format(made.Size), made.Format)
				return e.show(d, func(w io.Writer) error { return printVDisk(w, d) })
			})
		},
	}
	c.Flags().StringVar(&format, "format", "", "raw, qcow2, vmdk or vhdx (default: what the image's first bytes say)")
	c.Flags().BoolVar(&opt.AllowBacking, "allow-backing", false, "read other files that the image refers to; only for images you trust")
	return c
}

// exported is what an export prints.
type exported struct {
	Name   string          `json:"name"`
	Target string          `json:"target"`
	Format transfer.Format `json:"format"`
	Size   int64           `json:"size"`
}

func (e *env) exportCommand() *cobra.Command {
	var format string
	opt := transfer.ExportOptions{}
	c := &cobra.Command{
		Use: "export VPOOL/NAME FILE|URI", Short: "Write a vDisk to an image", Args: exactly("VPOOL/NAME", "FILE|URI"),
		Long: `Write a vDisk to a sparse raw image, to another server's NBD export, or with qemu-img to qcow2, vmdk or vhdx. The file appears whole
or not at all. A vDisk that is written meanwhile is not exported as of one point in time: stop its VM first.

  varve vdisk export default/disk1 disk1.raw
  varve vdisk export default/disk1 disk1.qcow2 --format qcow2`,
		ValidArgsFunction: e.completeVDisks,
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if opt.Format, err = transfer.ParseFormat(format); err != nil {
				return usageOf(cmd, err)
			}
			return e.call("export", args[0], func(s *session) error {
				d, err := s.VDisk(s.ctx(cmd), args[0]) // says not found, also by the file's name
				if err != nil {
					return err
				}
				t, err := s.nbdTarget(s.ctx(cmd))
				if err != nil {
					return err
				}
				t.Export = d.Name
				progress, stop := e.bar("export " + d.Name)
				opt.Progress = progress
				n, err := transfer.Export(cmd.Context(), t, args[1], opt)
				stop(err)
				if err != nil {
					return err
				}
				if opt.Format == "" {
					opt.Format = transfer.Raw
				}
				x := exported{d.Name, args[1], opt.Format, n}
				return e.show(x, func(w io.Writer) error {
					_, err := fmt.Fprintf(w, "exported %s to %s: %s, %s\n", x.Name, oneLine(x.Target), bytesize.Format(x.Size), x.Format)
					return err
				})
			})
		},
	}
	c.Flags().StringVar(&format, "format", "", "raw, qcow2, vmdk or vhdx (default raw)")
	c.Flags().BoolVar(&opt.Replace, "replace", false, "replace an existing file")
	return c
}

var _ transfer.Sink = (*nbdclient.Client)(nil)
