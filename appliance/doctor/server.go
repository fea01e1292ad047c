package doctor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"

	vmware "github.com/vmware/go-nfs-client/nfs"
	vmwarerpc "github.com/vmware/go-nfs-client/nfs/rpc"
	fork "github.com/willscott/go-nfs-client/nfs"
	forkrpc "github.com/willscott/go-nfs-client/nfs/rpc"

	"varve/appliance/nbdclient"
)

const (
	portmapPort  = "111"
	exportsMax   = 256 // looked at; more are counted but not opened
	readBytes    = 4096
	filesPerPool = 4
)

// Server is a running appliance as its self-checks need it.
type Server struct {
	// NBD reaches its exports; Export is ignored.
	NBD nbdclient.Target
	// NFS and Portmap are host:port; Portmap is empty when none is served.
	NFS, Portmap string
	// Exports are the NFS exports, such as /default.
	Exports []string
	// State tells in words what is wrong with the appliance; empty if nothing is.
	State, Evidence string
}

// Running gives the checks of a running appliance.
func Running(s Server) []Check {
	return []Check{
		{"server.state", "appliance is up and sound", 10 * time.Second, func(context.Context) Finding { return state(s) }},
		{"server.nbd", "every NBD export opens and reads", 60 * time.Second, func(ctx context.Context) Finding { return checkNBD(ctx, s.NBD) }},
		{"server.nfs", "every NFS export mounts and reads", 60 * time.Second, func(ctx context.Context) Finding { return checkNFS(ctx, s) }},
	}
}

// NotRunning stands in for Running when no server answers.
func NotRunning(evidence string) []Check {
	f := func(context.Context) Finding { return Finding{Skip, evidence, "start it with: varve serve --data DIR"} }
	return []Check{{"server.state", "appliance is up and sound", time.Second, f}}
}

func state(s Server) Finding {
	if s.State != "" {
		return Finding{Fail, s.State, "see the appliance's log; a fenced log needs a restart, on a sound disk"}
	}
	return Finding{OK, s.Evidence, ""}
}

func checkNBD(ctx context.Context, t nbdclient.Target) Finding {
	names, err := nbdclient.List(ctx, t)
	if err != nil {
		return failed(err, "check that the appliance listens there and that nothing filters the port")
	}
	start := time.Now()
	for _, name := range names[:min(len(names), exportsMax)] {
		t.Export = name
		if err := nbdRead(ctx, t); err != nil {
			return failed(err, "see the appliance's log for this vDisk: varve explain, varve status")
		}
	}
	return Finding{OK, fmt.Sprintf("%d exports listed, %d read in %s", len(names), min(len(names), exportsMax),
		time.Since(start).Round(time.Millisecond)), ""}
}

func nbdRead(ctx context.Context, t nbdclient.Target) error {
	c, err := nbdclient.Dial(ctx, t)
	if err != nil {
		return err
	}
	defer c.Close()
	p := make([]byte, min(c.Size(), readBytes))
	if len(p) == 0 {
		return nil
	}
	if err := c.ReadAt(ctx, p, 0); err != nil {
		return err
	}
	return c.ReadAt(ctx, p, c.Size()-int64(len(p)))
}

// mounted is what both NFS clients offer.
type mounted interface {
	// files gives up to max names of regular, non-empty files.
	files(max int) ([]string, error)
	read(name string, p []byte) (int, error)
	close()
}

func checkNFS(ctx context.Context, s Server) Finding {
	host, port, err := net.SplitHostPort(s.NFS)
	if err != nil {
		return failed(fmt.Errorf("NFS address %q: %w", s.NFS, err), "give --nfs HOST:PORT")
	}
	dial, client := dialFork(host, port), "by port"
	if h, p, err := net.SplitHostPort(s.Portmap); err == nil && p == portmapPort {
		dial, client = dialVMware(h), "through the portmapper"
	}
	start, read := time.Now(), 0
	for _, export := range s.Exports {
		if ctx.Err() != nil {
			return failed(fmt.Errorf("mount %s: %w", export, ctx.Err()), "look for an overloaded disk")
		}
		n, err := readExport(dial, export)
		if err != nil {
			return failed(fmt.Errorf("NFS export %s: %w", export, err),
				"check that the vPool's client allow list contains this host: varve vpool show NAME")
		}
		read += n
	}
	return Finding{OK, fmt.Sprintf("%d exports mounted %s, %d files read in %s", len(s.Exports), client, read,
		time.Since(start).Round(time.Millisecond)), ""}
}

func readExport(dial func(export string) (mounted, error), export string) (read int, err error) {
	m, err := dial(export)
	if err != nil {
		return 0, fmt.Errorf("mount: %w", err)
	}
	defer m.close()
	names, err := m.files(filesPerPool)
	if err != nil {
		return 0, fmt.Errorf("read directory: %w", err)
	}
	p := make([]byte, readBytes)
	for _, name := range names {
		if n, err := m.read(name, p); n == 0 && err != nil && !errors.Is(err, io.EOF) {
			return read, fmt.Errorf("read %s: %w", name, err)
		}
		read++
	}
	return read, nil
}

const machineName = "varve-doctor"

type vmwareMount struct {
	*vmware.Target
	mount *vmware.Mount
}

func dialVMware(host string) func(string) (mounted, error) {
	return func(export string) (mounted, error) {
		m, err := vmware.DialMount(host)
		if err != nil {
			return nil, err
		}
		t, err := m.Mount(export, vmwarerpc.NewAuthUnix(machineName, 0, 0).Auth())
		if err != nil {
			m.Close()
			return nil, err
		}
		return vmwareMount{t, m}, nil
	}
}

func (m vmwareMount) close() {
	m.mount.Unmount()
	m.mount.Close()
	m.Target.Close()
}

func (m vmwareMount) files(max int) ([]string, error) {
	entries, err := m.ReadDirPlus("/")
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if len(names) < max && e.Attr.Attr.Type == vmware.NF3Reg && e.Size() > 0 {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

func (m vmwareMount) read(name string, p []byte) (int, error) {
	f, err := m.Open("/" + name)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return f.Read(p)
}

type forkMount struct{ *fork.Target }

func dialFork(host, port string) func(string) (mounted, error) {
	return func(export string) (mounted, error) {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil {
			return nil, err
		}
		if strings.Contains(host, ":") {
			host = "[" + host + "]"
		}
		c, err := fork.DialServiceAtPort(host, int(n))
		if err != nil {
			return nil, err
		}
		// One connection for MOUNT and NFS: both are served on one port. An empty Addr makes Mount keep the connection.
		t, err := (&fork.Mount{Client: c}).Mount(export, forkrpc.NewAuthUnix(machineName, 0, 0).Auth())
		if err != nil {
			c.Close()
			return nil, err
		}
		return forkMount{t}, nil
	}
}

func (m forkMount) close() { m.Target.Close() }

func (m forkMount) files(max int) ([]string, error) {
	entries, err := m.ReadDirPlus("/")
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if len(names) < max && e.Attr.Attr.Type == fork.NF3Reg && e.Size() > 0 {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

func (m forkMount) read(name string, p []byte) (int, error) {
	f, err := m.Open("/" + name)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return f.Read(p)
}
