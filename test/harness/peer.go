package harness

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Peer is another server of the same protocol: the yardstick of the benchmarks.
type Peer struct {
	Name string
	URI  string // NBD
	Port int    // NFS and MOUNT share nothing in ganesha, so there are two
	Mnt  int
	Path string // NFS export
	proc *Process
}

func (p *Peer) PID() int    { return p.proc.PID() }
func (p *Peer) Log() string { return p.proc.Log() }

// Stop ends the peer and waits for its end.
func (p *Peer) Stop() {
	p.proc.Cmd.Process.Signal(syscall.SIGTERM)
	if p.proc.Wait(5*time.Second) != nil && !p.proc.Ended() {
		p.proc.Kill()
	}
}

// NBDPeers names the NBD servers that StartNBD knows.
var NBDPeers = []string{"qemu-nbd writeback", "qemu-nbd none", "nbdkit file", "nbdkit memory", "nbd-server"}

// StartNBD starts one of NBDPeers with an export of size bytes, on TCP; files are kept in dir.
func StartNBD(name, dir string, size int64) (*Peer, error) {
	port, err := FreePort()
	if err != nil {
		return nil, err
	}
	ps, image := strconv.Itoa(port), filepath.Join(dir, strings.ReplaceAll(name, " ", "-")+".img")
	if name != "nbdkit memory" {
		if err := sparse(image, size); err != nil {
			return nil, err
		}
	}
	p := &Peer{Name: name, URI: "nbd://127.0.0.1:" + ps}
	var args []string
	switch name {
	case "qemu-nbd writeback":
		args = []string{"qemu-nbd", "-f", "raw", "--cache=writeback", "--discard=unmap", "-t", "-e", "16", "-b", "127.0.0.1", "-p", ps, image}
	case "qemu-nbd none":
		args = []string{"qemu-nbd", "-f", "raw", "--cache=none", "--aio=native", "--discard=unmap", "-t", "-e", "16", "-b", "127.0.0.1", "-p", ps, image}
	case "nbdkit file":
		args = []string{"nbdkit", "-f", "-i", "127.0.0.1", "-p", ps, "file", image}
	case "nbdkit memory":
		args = []string{"nbdkit", "-f", "-i", "127.0.0.1", "-p", ps, "memory", strconv.FormatInt(size, 10)}
	case "nbd-server":
		config := filepath.Join(dir, "nbd-server.conf")
		text := fmt.Sprintf("[generic]\nlistenaddr = 127.0.0.1\nport = %d\n[e]\nexportname = %s\nflush = true\nfua = true\ntrim = true\n", port, image)
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			return nil, err
		}
		p.URI += "/e"
		args = []string{"nbd-server", "-d", "-C", config}
	default:
		return nil, fmt.Errorf("no peer %q", name)
	}
	if p.proc, err = Start(args[0], args[1:]...); err != nil {
		return nil, err
	}
	// nbd-server -d serves one process: a probing connection must not be all it does, so ask like a client.
	err = Poll(10*time.Second, func() error {
		if p.proc.Ended() {
			return fmt.Errorf("%s ended: %s", name, p.proc.Log())
		}
		_, err := Run(5*time.Second, "nbdinfo", "--size", p.URI)
		return err
	})
	if err != nil {
		p.Stop()
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	return p, nil
}

func sparse(path string, size int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(size), f.Close())
}

// StartGanesha starts nfs-ganesha with the VFS back end on dir/export. Ganesha insists on a portmapper, which it finds
// through a socket in /run; one runs in a network namespace of its own for as long as the start takes.
func StartGanesha(dir string) (*Peer, error) {
	export := filepath.Join(dir, "export")
	for _, d := range []string{export, "/run/rpcbind", "/var/run/ganesha"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	nfs, err := FreePort()
	if err != nil {
		return nil, err
	}
	mnt, err := FreePort()
	if err != nil {
		return nil, err
	}
	config := filepath.Join(dir, "ganesha.conf")
	text := fmt.Sprintf(`NFS_CORE_PARAM { NFS_Port = %d; MNT_Port = %d; NFS_Protocols = 3; Bind_addr = 127.0.0.1; Enable_NLM = false;
  Enable_RQUOTA = false; Enable_UDP = false; mount_path_pseudo = false; }
EXPORT_DEFAULTS { Squash = No_Root_Squash; SecType = sys; Protocols = 3; Transports = TCP; Access_Type = RW; }
EXPORT { Export_Id = 77; Path = %s; Pseudo = /bench; Tag = bench; MaxRead = 1048576; MaxWrite = 1048576; FSAL { Name = VFS; } }
LOG { Default_Log_Level = EVENT; }
`, nfs, mnt, export)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	portmapper, err := Start("unshare", "-n", "sh", "-c", "ip link set lo up; exec rpcbind -f")
	if err != nil {
		return nil, err
	}
	defer portmapper.Kill()
	if err := Poll(5*time.Second, func() error { return Dial("unix", "/run/rpcbind.sock") }); err != nil {
		return nil, fmt.Errorf("rpcbind: %w: %s", err, portmapper.Log())
	}
	p := &Peer{Name: "nfs-ganesha", Port: nfs, Mnt: mnt, Path: export}
	p.proc, err = Start("ganesha.nfsd", "-F", "-f", config, "-L", filepath.Join(dir, "ganesha.log"), "-p", filepath.Join(dir, "ganesha.pid"))
	if err != nil {
		return nil, err
	}
	err = Poll(15*time.Second, func() error {
		if p.proc.Ended() {
			log, _ := os.ReadFile(filepath.Join(dir, "ganesha.log"))
			return fmt.Errorf("it ended: %s", lastLines(string(log), 10))
		}
		return errors.Join(Dial("tcp", fmt.Sprintf("127.0.0.1:%d", nfs)), Dial("tcp", fmt.Sprintf("127.0.0.1:%d", mnt)))
	})
	if err != nil {
		p.Stop()
		return nil, fmt.Errorf("start nfs-ganesha: %w", err)
	}
	time.Sleep(300 * time.Millisecond) // it registers with the portmapper after it listens
	return p, nil
}
