package firstboot

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// System is this machine.
type System struct{}

const runTimeout = 5 * time.Minute

// bounded keeps the first bytes of a program's output and swallows the rest.
type bounded struct{ bytes.Buffer }

// Write implements io.Writer.
func (b *bounded) Write(p []byte) (int, error) {
	if room := outputBytesMax - b.Len(); room > 0 {
		b.Buffer.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

// Run implements Host.
func (System) Run(ctx context.Context, name string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, runTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.WaitDelay = time.Second
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	var out, errText bounded
	cmd.Stdout, cmd.Stderr = &out, &errText
	if err := cmd.Run(); err != nil {
		if text := strings.TrimSpace(errText.String()); text != "" {
			return out.Bytes(), fmt.Errorf("%s: %w: %s", name, err, clip(text))
		}
		return out.Bytes(), fmt.Errorf("%s: %w", name, err)
	}
	return out.Bytes(), nil
}

// SetHostname implements Host.
func (System) SetHostname(name string) error { return unix.Sethostname([]byte(name)) }

// Mount implements Host. What comes from outside is mounted without devices, programs or set-uid.
func (System) Mount(source, target, fstype string, readOnly bool) error {
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_NOATIME)
	if readOnly {
		flags |= unix.MS_RDONLY
	}
	return unix.Mount(source, target, fstype, flags, "")
}

// Unmount implements Host.
func (System) Unmount(target string) error { return unix.Unmount(target, 0) }

var _ Host = System{}
